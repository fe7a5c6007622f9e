#!/usr/bin/env -S node --import tsx
/** Step 2 of 7: a kernel that has WireGuard, where the distro's own has none. The only step that restarts a box. */
import { run } from "../lib/cli.ts";
import { isEl7, osOf } from "../lib/os.ts";
import { sh, writeFile } from "../lib/sh.ts";
import { type Change, type Facts, Refusal, type Step } from "../lib/step.ts";

/** WireGuard is in Linux since 5.6; elsewhere a module may have it (Debian and Ubuntu have backports). */
export function wireguardIn(facts: Facts): string | undefined {
  if (facts.module?.trim()) return `WireGuard is in kernel ${facts.kernel?.trim()}`;
  if (facts.userspace?.trim()) return "wireguard-go is here, WireGuard outside the kernel";
  return undefined;
}

/** Facts about WireGuard in the running kernel. modprobe -n loads nothing. */
export const moduleLook = `fact module; { test -d /sys/module/wireguard || modprobe -n -q wireguard; } 2>/dev/null && echo yes
fact userspace; test -c /dev/net/tun && command -v wireguard-go
`;

const GRUB = `grub=/boot/grub2/grub.cfg
[ -d /sys/firmware/efi ] && grub=/boot/efi/EFI/centos/grub.cfg`;

export const upgradeKernel: Step = {
  name: "upgrade-kernel",
  options: ["ELREPO_URL", "ELREPO_KERNEL_URL"],

  look: () => [
    moduleLook,
    `fact kernel-ml; rpm -q --qf '%{VERSION}-%{RELEASE}.%{ARCH}\\n' kernel-ml 2>/dev/null | grep -v 'not installed' | tail -n 1
fact tools; rpm -q kernel-ml-tools kernel-ml-devel kernel-ml-headers >/dev/null 2>&1 && echo yes
fact entries; ${GRUB}; grep '^menuentry' "$grub" 2>/dev/null | cut -d "'" -f2
fact saved; grub2-editenv list 2>/dev/null | sed -n 's/^saved_entry=//p'`,
  ],

  plan(want, facts) {
    if (wireguardIn(facts)) return [];
    const os = osOf(facts);
    // Other distros get WireGuard as a package: install-wireguard's work, and its to prove.
    if (!isEl7(os)) return [];
    const installed = facts["kernel-ml"]?.trim();
    if (!installed || !facts.tools?.trim())
      return [
        ...installChanges(want.ELREPO_URL, want.ELREPO_KERNEL_URL),
        { ...SET_DEFAULT, lookAgain: true },
      ];
    const running = facts.kernel?.trim();
    if (running === installed)
      throw new Refusal(
        `Kernel ${running} is running and has no WireGuard all the same: is its module there?`,
      );
    const entry = facts.entries?.split("\n").find((line) => line.includes(installed));
    return [
      ...(facts.saved?.trim() === entry ? [] : [SET_DEFAULT]),
      {
        why: `restart into kernel ${installed}: ${running} has no WireGuard`,
        sh: "nohup sh -c 'sleep 1; systemctl reboot' >/dev/null 2>&1 &",
        reboot: true,
        seconds: 600,
      },
    ];
  },
};

/**
 * Steps 1 to 6 of the article. What is there already stays: each may be run again after a cut. ELRepo has
 * dropped el7, and the lists of its release package answer no more: with a repository of one's own that
 * package is left out, since it would also enable [elrepo] and break every later yum.
 */
function installChanges(elrepo: string, repository: string): Change[] {
  const id = repository ? "k3s-elrepo-kernel" : "elrepo-kernel";
  const only = `--disablerepo=* --enablerepo=${id}`;
  const key = `${elrepo}/RPM-GPG-KEY-elrepo.org`;
  return [
    { why: "import ELRepo's key", sh: `rpm --import ${sh(key)}`, seconds: 120 },
    repository
      ? {
          why: `add the repository ${repository}`,
          sh: writeFile(
            `/etc/yum.repos.d/${id}.repo`,
            `[${id}]\nname=kernel-ml\nbaseurl=${repository}\nenabled=0\ngpgcheck=1\ngpgkey=${key}\n`,
          ),
        }
      : {
          why: "install ELRepo's release package",
          // By rpm: yum would first load the lists of all repositories, of which CentOS's own may be gone.
          sh: `rpm -q elrepo-release >/dev/null || rpm -Uvh ${sh(`${elrepo}/elrepo-release-7.el7.elrepo.noarch.rpm`)}`,
          seconds: 120,
        },
    {
      why: "install kernel-ml from ELRepo",
      sh: `set -f
yum ${only} repolist
yum -y ${only} install kernel-ml`,
      seconds: 1800,
    },
    {
      why: "replace the old kernel's tools by kernel-ml's",
      sh: `set -f
for old in kernel-tools kernel-tools-libs; do
  if rpm -q "$old" >/dev/null; then yum -y remove "$old"; fi
done
yum -y ${only} install kernel-ml-tools kernel-ml-devel kernel-ml-headers`,
      seconds: 1800,
    },
  ];
}

/** Steps 7 to 9. grub2-set-default returns 0 even when it fails: the entry is read back. */
const SET_DEFAULT: Change = {
  why: "make kernel-ml the default boot entry, and read it back",
  sh: `${GRUB}
version=$(rpm -q --qf '%{VERSION}-%{RELEASE}.%{ARCH}\\n' kernel-ml | tail -n 1)
entry=$(grep '^menuentry' "$grub" | cut -d "'" -f2 | grep -F "$version" | head -n 1)
[ -n "$entry" ] || { echo "$grub has no entry for kernel $version:"; grep '^menuentry' "$grub" | cut -d "'" -f2; exit 1; }
grub2-set-default "$entry"
saved=$(grub2-editenv list | sed -n 's/^saved_entry=//p')
[ "$saved" = "$entry" ] || { echo "the default boot entry is \\"$saved\\", not \\"$entry\\""; exit 1; }
say "default: $entry"`,
};

await run(import.meta, {
  about: "Gives CentOS 7 a kernel with WireGuard, as the article's nine steps do, and restarts into it.",
  steps: [upgradeKernel],
  nothing: (_want, facts) =>
    wireguardIn(facts) ?? `${osOf(facts).name} gets WireGuard as a package: see install-wireguard`,
});

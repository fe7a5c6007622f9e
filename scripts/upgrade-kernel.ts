#!/usr/bin/env -S node --import tsx
/** Step 2 of 7: a kernel that has WireGuard, where the distro's own has none. The only step that restarts a box. */
import { byProxy, PROXY_SETTINGS } from "../lib/k3s/config.ts";
import { drainHere, drainLook, uncordonHere } from "../lib/k3s/drain.ts";
import { isEl7, osOf } from "../lib/k3s/packages.ts";
import { main } from "../lib/k3s/script.ts";
import { binaryLook, releaseOf } from "../lib/k3s/unit.ts";
import type { Settings } from "../lib/settings.ts";
import { raw, sh, writeFile } from "../lib/sh.ts";
import { type Change, type Facts, prints, Refusal, type Step, step } from "../lib/step.ts";

/**
 * Does k3s find WireGuard here? It is in Linux since 5.6; elsewhere a module may have it (Debian and Ubuntu have
 * backports). wireguard-go is for the script of old k3s: modern k3s asks the kernel alone (v1.36.3, seen).
 */
export function wireguardIn(want: Settings, facts: Facts<"module" | "userspace">): string | undefined {
  if (facts.module?.trim()) return `WireGuard is in kernel ${facts.kernel?.trim()}`;
  if (facts.userspace?.trim() && releaseOf(want, facts).generation !== "modern")
    return "wireguard-go is here, WireGuard outside the kernel";
  return undefined;
}

/** Facts about WireGuard in the running kernel, and about k3s's release. modprobe -n loads nothing. */
export const moduleLook = [
  binaryLook,
  prints("module userspace")(
    `module=; { test -d /sys/module/wireguard || modprobe -n -q wireguard; } 2>/dev/null && module=yes
fact module; echo "$module"
fact userspace; test -c /dev/net/tun && command -v wireguard-go
`,
  ),
] as const;

/** Facts about kernel-ml on el7: its release as `uname -r` prints it, and its boot entry. */
const BOOT = sh`grub=/boot/grub2/grub.cfg
if [ -d /sys/firmware/efi ]; then
  for grub in /boot/efi/EFI/*/grub.cfg; do if [ -s "$grub" ]; then break; fi; done
fi
kernel_ml() { rpm -ql kernel-ml 2>/dev/null | sed -n 's|^/boot/vmlinuz-||p' | sort -V | tail -n 1; }
# With BLS an entry is a file's name, else a title, behind its submenu's if it has one.
entry_of() {
  if grep -q '^ *blscfg' "$grub" 2>/dev/null; then
    grep -lE "^linux[[:blank:]].*/vmlinuz-$1\$" /boot/loader/entries/*.conf 2>/dev/null | head -n 1 | sed 's|.*/||; s|[.]conf$||'
  else
    awk -F"'" -v kernel="/vmlinuz-$1 " '/^submenu / { menu = $2 ">" } /^}/ { menu = "" } /^[ \t]*menuentry / { title = menu $2 }
      /^[ \t]+linux/ && index($0, kernel) { print title; exit }' "$grub" 2>/dev/null
  fi
}
saved_entry() { grub2-editenv list 2>/dev/null | sed -n 's/^saved_entry=//p'; }`;

/** Space for a kernel and its initramfs in /boot, in MiB; rpm does not count the initramfs. */
const ROOM = 80;

export const upgradeKernel = step({
  name: "upgrade-kernel",
  options: [
    "SERVER",
    "PUBLIC_IP",
    "K3S_VERSION",
    "K3S_BIN",
    "ELREPO_URL",
    "ELREPO_KERNEL_URL",
    ...PROXY_SETTINGS,
  ],

  look: () => [
    ...moduleLook,
    ...drainLook,
    prints("kernel-ml tools entry saved chosen room")(`${BOOT}
if command -v rpm >/dev/null; then
  fact kernel-ml; kernel_ml
  fact tools; rpm -q kernel-ml-tools kernel-ml-devel kernel-ml-headers >/dev/null 2>&1 && echo yes
  fact entry; entry_of "$(kernel_ml)"
  fact saved; saved_entry
  fact chosen; stat -L -c %Y /boot/grub2/grubenv 2>/dev/null
  fact room; df -Pk /boot 2>/dev/null | awk 'NR == 2 { print int($4 / 1024) }'
fi`),
  ],

  plan(want, facts) {
    const [installed, running, saved] = [facts["kernel-ml"], facts.kernel, facts.saved].map((f) => f?.trim());
    if (wireguardIn(want, facts)) return installed ? uncordonHere(want, facts) : [];
    // Other distros get WireGuard as a package, from install-wireguard.
    if (!isEl7(osOf(facts))) return [];
    if (!installed && Number(facts.room) < ROOM)
      throw new Refusal(
        `/boot has ${facts.room?.trim()} MiB free, and a kernel with its initramfs takes up to ${ROOM}: remove an old kernel (package-cleanup --oldkernels --count=1)`,
      );
    if (!installed || !facts.tools?.trim())
      return [
        ...installChanges(want.ELREPO_URL, want.ELREPO_KERNEL_URL).map((change) => byProxy(want, change)),
        { ...SET_DEFAULT, lookAgain: true },
      ];
    if (running === installed)
      throw new Refusal(
        `Kernel ${running} is running and has no WireGuard all the same: is its module there?`,
      );
    const chosen = saved && saved === facts.entry?.trim();
    if (chosen && Number(facts.chosen) < Number(facts.now) - Number(facts.uptime))
      throw new Refusal(
        `"${saved}" is the default boot entry, and yet this box has booted kernel ${running} since: choose the entry at its console; where the vendor boots a kernel of its own, choose GRUB in the vendor's panel. It is not restarted again for this`,
      );
    return [
      ...(chosen ? [] : [SET_DEFAULT]),
      ...drainHere(want, facts),
      {
        why: `restart into kernel ${installed}: ${running} has no WireGuard`,
        sh: "nohup sh -c 'sleep 1; systemctl reboot' >/dev/null 2>&1 &",
        reboot: true,
        seconds: 600,
      },
    ];
  },
});

/**
 * Steps 1 to 6 of the article; each can be run again after an interruption. ELRepo has dropped el7: with
 * ELREPO_KERNEL_URL its release package is left out, since it would enable the dead [elrepo] and break every later yum.
 */
function installChanges(elrepo: string, repository: string): Change[] {
  const id = repository ? "k3s-elrepo-kernel" : "elrepo-kernel";
  const only = ["--disablerepo=*", `--enablerepo=${id}`];
  const key = `${elrepo}/RPM-GPG-KEY-elrepo.org`;
  const archive =
    "an archive's repository with kernel-ml for el7, such as http://mirrors.coreix.net/elrepo-archive-archive/kernel/el7/x86_64";
  const gone = repository
    ? `ELREPO_KERNEL_URL is ${repository}: expected ${archive}, signed with the key of ELREPO_URL`
    : `ELRepo itself has no kernel for el7 any more: set ELREPO_KERNEL_URL to ${archive}`;
  return [
    {
      why: "import ELRepo's key",
      sh: sh`rpm --import ${key} || { echo 'ELREPO_URL may name another place that has this key'; exit 1; }`,
      seconds: 120,
    },
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
          // By rpm: yum would first load the metadata of all repositories, and CentOS's own may be gone.
          sh: sh`rpm -q elrepo-release >/dev/null || rpm -Uvh ${elrepo}/elrepo-release-7.el7.elrepo.noarch.rpm`,
          seconds: 120,
        },
    {
      why: "install kernel-ml from ELRepo",
      // An installed one may lack its initramfs or boot entry after a power loss.
      sh: sh`gone() { echo ${gone}; exit 1; }
yum ${only} repolist || gone
if rpm -q kernel-ml >/dev/null; then yum -y ${only} reinstall kernel-ml || :; fi
yum -y ${only} install kernel-ml || gone
sync`,
      seconds: 1800,
    },
    {
      why: "replace the old kernel's tools by kernel-ml's",
      sh: sh`for old in kernel-tools kernel-tools-libs; do
  if rpm -q "$old" >/dev/null; then yum -y remove "$old"; fi
done
yum -y ${only} install kernel-ml-tools kernel-ml-devel kernel-ml-headers
sync`,
      seconds: 1800,
    },
  ];
}

/** Steps 7 to 9. grub2-set-default returns 0 even when it fails: the entry is read back. */
const SET_DEFAULT: Change = {
  why: "make kernel-ml the default boot entry, and read it back",
  sh: sh`${raw(BOOT)}
entry=$(entry_of "$(kernel_ml)")
[ -n "$entry" ] || { echo "$grub has no entry for kernel $(kernel_ml): grub2-mkconfig -o $grub writes one"; exit 1; }
grep -q saved_entry "$grub" || { echo "$grub does not ask for the saved entry: write GRUB_DEFAULT=saved into /etc/default/grub, then grub2-mkconfig -o $grub"; exit 1; }
grub2-set-default "$entry"
saved=$(saved_entry)
[ "$saved" = "$entry" ] || { echo "The default boot entry is still \"$saved\", not \"$entry\": can /boot/grub2/grubenv be written (lsattr, df)? grub2-editenv create makes a new one"; exit 1; }
sync
say "default: $entry"`,
};

/** By itself: nothing follows that would mend a node which is drained and not Ready. */
const byItself: Step = {
  ...upgradeKernel,
  plan: (want, facts) =>
    wireguardIn(want, facts) && facts["kernel-ml"]?.trim()
      ? uncordonHere(want, facts, true)
      : upgradeKernel.plan(want, facts),
};

await main(import.meta, {
  about: "Installs a kernel with WireGuard on CentOS 7, in the article's nine steps, and reboots into it.",
  steps: [byItself],
  asksLate: true,
  nothing: (want, facts) =>
    wireguardIn(want, facts) ?? `${osOf(facts).name} gets WireGuard as a package: see install-wireguard`,
});

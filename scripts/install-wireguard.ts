#!/usr/bin/env -S node --import tsx
/** Step 3 of 7: WireGuard's tools, its module where the kernel has none, and proof that an interface can be made. */
import { run } from "../lib/cli.ts";
import { byProxy, PROXY_SETTINGS } from "../lib/node.ts";
import { install, isEl7, type Manager, type Os, osOf } from "../lib/os.ts";
import { SETTINGS, type Settings } from "../lib/settings.ts";
import { sh } from "../lib/sh.ts";
import { type Change, Refusal, type Step } from "../lib/step.ts";
import { moduleLook, wireguardIn } from "./upgrade-kernel.ts";

export const installWireguard: Step = {
  name: "install-wireguard",
  options: ["ELREPO_URL", "EPEL_URL", ...PROXY_SETTINGS],

  look: () => [
    moduleLook,
    `fact tool; command -v wg
fact half; dpkg-query -W -f '\${db:Status-Status}' wireguard-tools 2>/dev/null | grep -E '^(half|unpacked)'`,
    `fact loaded; test -d /sys/module/wireguard && echo yes; test -c /dev/net/tun && command -v wireguard-go
fact probe; test -d /sys/class/net/${PROBE} && echo yes`,
  ],

  plan(want, facts) {
    const changes: Change[] = [];
    const kernel = wireguardIn(facts) ? undefined : facts.kernel?.trim();
    // A dpkg that was cut has put the tool there, and not ended.
    if (!facts.tool?.trim() || facts.half?.trim() || kernel)
      changes.push(...packages(osOf(facts), kernel, want));
    if (changes.length || !facts.loaded?.trim() || facts.probe?.trim()) changes.push(PROOF);
    return changes;
  },
};

/** EPEL has archived el7, whose release package still asks for mirrors that have dropped it. */
const EPEL7 = "https://archives.fedoraproject.org/pub/archive/epel";

/**
 * What to install by distro. The tools are in EPEL for EL 7 and 8, else the distro's own.
 * @param kernel the running kernel where a module for it is needed.
 */
export function packages(os: Os, kernel: string | undefined, want: Settings): Change[] {
  const names = [...(kernel ? [moduleFor(os, kernel)] : []), "wireguard-tools"];
  let before = "";
  const options: string[] = [];
  if (isEl7(os) || (os.manager === "dnf" && os.major === 8)) {
    const m = os.major;
    const archived = m === 7 && want.EPEL_URL === SETTINGS.EPEL_URL.value;
    const base = archived ? EPEL7 : want.EPEL_URL;
    const file = archived ? "7/x86_64/Packages/e/epel-release-7-14" : `epel-release-latest-${m}`;
    if (names.includes("kmod-wireguard"))
      before += release("elrepo-release", `${want.ELREPO_URL}/elrepo-release-${m}.el${m}.elrepo.noarch.rpm`);
    before += release("epel-release", `${base}/${file}.noarch.rpm`);
    // The tools need nothing else, and of el7's other lists any may be gone.
    if (m === 7) options.push("--disablerepo=*", "--enablerepo=epel");
    // The release package asks Fedora for a mirror: one that was named is used instead.
    if (base !== SETTINGS.EPEL_URL.value)
      options.push(
        `--setopt=epel.baseurl=${base}/${m}${m < 8 ? "" : "/Everything"}/$basearch`,
        "--setopt=epel.metalink=",
      );
  }
  return [
    byProxy(want, {
      why: `install ${names.join(", ")} (${os.name}, ${os.manager})`,
      sh: before + install(os.manager, names, options.map(sh).join(" ")),
      seconds: 900,
    }),
  ];
}

/** What else has WireGuard where no package brings it to the running kernel. */
const KERNELS: Record<Manager, string> = {
  yum: "make upgrade-kernel gives CentOS 7 another (Amazon Linux 2: amazon-linux-extras install kernel-5.10)",
  dnf: "dnf install kernel",
  apt: "apt-get install linux-image-amd64 (arm64: linux-image-arm64), of Debian 11 or later",
  zypper: "zypper install kernel-default",
  pacman: "pacman -Syu linux",
  apk: "apk add linux-lts",
};

/**
 * The package with WireGuard's module for a running kernel that lacks it. Linux has had it since 5.6, Ubuntu's
 * 5.4 and Oracle's UEK too: where a distro splits its modules, it may be in the other half.
 * @throws {Refusal} where only another kernel helps.
 */
function moduleFor(os: Os, kernel: string): string {
  if ([os.id, ...os.like].includes("ubuntu")) return `linux-modules-extra-${kernel}`;
  if (os.manager === "dnf" && os.id !== "amzn") {
    if (kernel.includes("uek")) return `kernel-uek-modules-${kernel}`;
    // EL8's 4.18 has none: ELRepo builds it.
    return os.major === 8 ? "kmod-wireguard" : `kernel-modules-${kernel}`;
  }
  throw new Refusal(
    `Kernel ${kernel} has no WireGuard, and no package of ${os.name} adds it: restart into its newest kernel; where that has none either: ${KERNELS[os.manager]}`,
  );
}

/** A repository's release package, by rpm: yum would first load the lists of all repositories. */
const release = (name: string, url: string) => `rpm -q ${name} >/dev/null || rpm -Uvh ${sh(url)}\n`;

/** The interface that is made for proof: one that a cut run has left is known by it. */
const PROBE = "kac-probe";

/** A tool that is there proves nothing: an interface is made and removed (by wireguard-go where flannel would too). */
const PROOF: Change = {
  why: "prove that a WireGuard interface can be made",
  sh: `wg --version
name=${PROBE}
[ -d "/sys/class/net/$name" ] || ip link add "$name" type wireguard 2>/dev/null || wireguard-go "$name" >/dev/null 2>&1 || {
  echo "Kernel $(uname -r) can make no WireGuard interface: it needs the module wireguard, or Linux 5.6"
  exit 1
}
wg show "$name" >/dev/null
ip link del "$name"`,
};

await run(import.meta, {
  about:
    "Installs WireGuard's tools by the distro's package manager and proves that an interface can be made.",
  steps: [installWireguard],
});

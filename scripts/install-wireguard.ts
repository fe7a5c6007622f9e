#!/usr/bin/env -S node --import tsx
/** Step 3 of 7: WireGuard's tools, its module where the kernel has none, and proof that an interface can be made. */
import { byProxy, PROXY_SETTINGS } from "../lib/k3s/config.ts";
import { DEAD, install, isEl7, managersLook, type Os, osOf } from "../lib/k3s/packages.ts";
import { main } from "../lib/k3s/script.ts";
import { type Generation, releaseOf } from "../lib/k3s/unit.ts";
import type { Settings } from "../lib/settings.ts";
import { raw, sh } from "../lib/sh.ts";
import { type Change, type Facts, prints, Refusal, step } from "../lib/step.ts";
import { SETTINGS } from "../lib/table.ts";
import { moduleLook, wireguardIn } from "./upgrade-kernel.ts";

export const installWireguard = step({
  name: "install-wireguard",
  options: ["K3S_VERSION", "K3S_BIN", "ELREPO_URL", "EPEL_URL", ...PROXY_SETTINGS],

  look: () => [
    ...moduleLook,
    managersLook,
    // Where k3s has its interface the tool is complete.
    prints("tool half")(`fact tool; command -v wg
fact half; if [ ! -d /sys/class/net/flannel-wg ] && [ ! -d /sys/class/net/flannel.1 ]; then
  status=$(dpkg-query -W -f '\${db:Status-Status}' wireguard-tools 2>/dev/null)
  case $status in half* | unpacked*) echo "$status" ;; esac
fi`),
    prints("loaded probe split glibc")(`fact loaded; test -d /sys/module/wireguard && echo yes
fact probe; test -d /sys/class/net/${PROBE} && echo yes
# The package of the running kernel, where a distro has its modules in two.
fact split; if [ -z "$module" ]; then
  kernel=$(uname -r)
  dpkg-query -W -f '\${Package}\n' "linux-modules-$kernel" 2>/dev/null
  rpm -q kernel-core kernel-uek-core kernel-rt-core kernel-64k-core 2>/dev/null | grep -F -- "-core-$kernel"
fi
fact glibc; ! command -v rpm >/dev/null || getconf GNU_LIBC_VERSION 2>/dev/null`),
  ],

  plan(want, facts) {
    const changes: Change[] = [];
    const lacks = !wireguardIn(want, facts);
    // An interrupted dpkg has unpacked the tool but not configured it.
    if (!facts.tool?.trim() || facts.half?.trim() || lacks)
      changes.push(packages(osOf(facts), lacks ? moduleFor(want, facts) : undefined, want, facts));
    const outside = !facts.module?.trim() && facts.userspace?.trim();
    if (changes.length || !(facts.loaded?.trim() || outside) || facts.probe?.trim())
      changes.push(proof(releaseOf(want, facts).generation));
    return changes;
  },
});

/** EPEL has archived el7; its release package still points to mirrors that dropped it. */
const EPEL7 = "https://archives.fedoraproject.org/pub/archive/epel";

/**
 * Installs the tools and the package `module`. On EL 7 and 8 the tools are in EPEL (derivatives are recognised by their
 * glibc), elsewhere in the distro's repositories.
 */
export function packages(os: Os, module: string | undefined, want: Settings, facts: Facts<"glibc">): Change {
  const names = [...(module ? [module] : []), "wireguard-tools"];
  let before = "";
  const options: string[] = [];
  const el = elOf(os, facts);
  if (el < 9) {
    const archived = el === 7 && want.EPEL_URL === SETTINGS.EPEL_URL.value;
    const base = archived ? EPEL7 : want.EPEL_URL;
    const file = archived ? "7/x86_64/Packages/e/epel-release-7-14" : `epel-release-latest-${el}`;
    const epel = release("epel", `${base}/${file}.noarch.rpm`);
    if (module === ELREPO)
      before += release("elrepo", `${want.ELREPO_URL}/elrepo-release-${el}.el${el}.elrepo.noarch.rpm`);
    // The tools need no other repository, and any of el7's may be gone.
    if (el === 7) options.push("--disablerepo=*", "--enablerepo=epel");
    before +=
      el === 7
        ? epel
        : sh`dnf -q ${DEAD} list wireguard-tools >/dev/null 2>&1 || {
${raw(epel)}} || { echo 'No list here has wireguard-tools, and EPEL is not for this distro'; exit 1; }
`;
    // The release package uses Fedora's mirror list: EPEL_URL replaces it.
    if (base !== SETTINGS.EPEL_URL.value)
      options.push(
        `--setopt=epel.baseurl=${base}/${el}${el < 8 ? "" : "/Everything"}/$basearch`,
        "--setopt=epel.metalink=",
      );
  }
  return byProxy(want, {
    why: `install ${names.join(", ")} (${os.name}, ${os.manager})`,
    sh: before + install(os, names, options),
    seconds: 900,
  });
}

/**
 * The EL version whose packages fit. Derivatives have their own version numbers but EL's glibc. NaN for other distros.
 */
function elOf(os: Os, { glibc = "" }: Facts<"glibc">): number {
  if (os.manager !== "yum" && os.manager !== "dnf") return Number.NaN;
  const minor = Number(/^glibc 2\.(\d+)/.exec(glibc)?.[1]);
  return isEl7(os) || minor < 28 ? 7 : minor < 34 ? 8 : 9;
}

/** EL 8's 4.18 has no WireGuard: ELRepo builds it. */
const ELREPO = "kmod-wireguard";

/**
 * The package with WireGuard's module for the running kernel, which lacks it. Linux has had it since 5.6, Ubuntu's
 * 5.4 and Oracle's UEK too: where a distro splits its modules, it may be in the other half.
 * @throws {Refusal} where only another kernel helps.
 */
function moduleFor(want: Settings, facts: Facts<"split" | "userspace">): string {
  const kernel = facts.kernel?.trim() ?? "";
  const split = facts.split?.trim().split("\n")[0] ?? "";
  const [major = 0, minor = 0] = kernel.split(".").map(Number);
  if (/^4\.18\..*\.el8/.test(kernel)) return ELREPO;
  if (split && (major > 5 || (major === 5 && minor >= 4)))
    return split.replace("-core-", "-modules-").replace(/^linux-modules-/, "linux-modules-extra-");
  const outside = facts.userspace?.trim()
    ? `; wireguard-go is here, but k3s ${releaseOf(want, facts).version} asks the kernel alone`
    : "";
  const os = osOf(facts);
  throw new Refusal(
    `Kernel ${kernel} has no WireGuard, and no package of ${os.name} adds it${outside}: restart into its newest kernel; where that has none either: ${otherKernel(os, Boolean(split), facts)}`,
  );
}

/** What else has WireGuard where no package brings it to the running kernel. */
function otherKernel(os: Os, split: boolean, facts: Facts<"managers">): string {
  if (isEl7(os)) return "make upgrade-kernel gives CentOS 7 another";
  if (facts.managers?.includes("amazon-linux-extras")) return "amazon-linux-extras install kernel-5.10";
  switch (os.manager) {
    case "apt":
      return split
        ? `apt-get install linux-generic-hwe-${os.version}`
        : "apt-get install linux-image-amd64 (arm64: linux-image-arm64), of Debian 11 or later";
    case "zypper":
      return `${os.image ? "transactional-update pkg" : "zypper"} install kernel-default`;
    case "pacman":
      return "pacman -Syu linux";
    case "apk":
      return "apk add linux-lts";
    default:
      return `an image with Linux 5.6 or later${os.manager ? ` (${os.manager} list kernel says what there is)` : ""}`;
  }
}

/** Installs a repository's release package by rpm: yum would first load the metadata of all repositories. */
const release = (name: string, url: string) =>
  `${sh`grep -qs ${`^\\[${name}\\]`} /etc/yum.repos.d/*.repo || rpm -Uvh ${url}`}\n`;

/** The name of the test interface, by which a leftover of an interrupted run is found. */
const PROBE = "kac-probe";

/** The tool alone proves nothing: creates an interface as flannel does, and removes it. */
function proof(generation: Generation | undefined): Change {
  const outside = generation === "modern" ? "" : '|| wireguard-go "$name" >/dev/null 2>&1 ';
  return {
    why: "prove that a WireGuard interface can be made",
    sh: sh`wg --version
name=${PROBE}
[ -d "/sys/class/net/$name" ] || said=$(ip link add "$name" type wireguard 2>&1) ${raw(outside)}|| {
  echo "Kernel $(uname -r) can make no WireGuard interface ($said): it needs the module wireguard, or Linux 5.6"
  exit 1
}
wg show "$name" >/dev/null
ip link del "$name"`,
  };
}

await main(import.meta, {
  about:
    "Installs wireguard-tools from the distribution's packages, and verifies that an interface can be created.",
  steps: [installWireguard],
});

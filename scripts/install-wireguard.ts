#!/usr/bin/env -S node --import tsx
/** Step 3 of 7: WireGuard's tools, its module where the kernel has none, and proof that an interface can be made. */
import { run } from "../lib/cli.ts";
import { byProxy } from "../lib/node.ts";
import { install, isEl7, type Os, osOf } from "../lib/os.ts";
import { SETTINGS, type Settings } from "../lib/settings.ts";
import { sh } from "../lib/sh.ts";
import type { Change, Step } from "../lib/step.ts";
import { moduleLook, wireguardIn } from "./upgrade-kernel.ts";

export const installWireguard: Step = {
  name: "install-wireguard",
  options: ["ELREPO_URL", "EPEL_URL"],

  look: () => [
    moduleLook,
    "fact tool; command -v wg",
    "fact loaded; test -d /sys/module/wireguard && echo yes; test -c /dev/net/tun && command -v wireguard-go",
  ],

  plan(want, facts) {
    const changes: Change[] = [];
    const tools = Boolean(facts.tool?.trim());
    if (!tools || !wireguardIn(facts)) changes.push(...packages(osOf(facts), !wireguardIn(facts), want));
    if (changes.length || !facts.loaded?.trim()) changes.push(PROOF);
    return changes;
  },
};

/** What to install by distro. EL has the tools in EPEL (7 and 8) or AppStream (9 and later), modules at ELRepo. */
export function packages(os: Os, needsModule: boolean, want: Settings): Change[] {
  const change = (names: string[], before = "", options = ""): Change =>
    byProxy(want, {
      why: `install ${names.join(", ")} (${os.name}, ${os.manager})`,
      sh: before + install(os.manager, names, options),
      seconds: 900,
    });
  if (os.manager === "apt") return [change(["wireguard-tools", ...(needsModule ? ["wireguard-dkms"] : [])])];
  if (os.manager !== "yum" && os.manager !== "dnf") return [change(["wireguard-tools"])];
  if (os.id === "fedora" || os.id === "amzn") return [change(["wireguard-tools"])];
  const m = os.major;
  const elrepo = needsModule
    ? release("elrepo-release", `${want.ELREPO_URL}/elrepo-release-${m}.el${m}.elrepo.noarch.rpm`)
    : "";
  const epel = m <= 8 ? release("epel-release", `${want.EPEL_URL}/epel-release-latest-${m}.noarch.rpm`) : "";
  const module = needsModule ? [...(isEl7(os) ? ["yum-plugin-elrepo"] : []), "kmod-wireguard"] : [];
  const options = [
    // Where upgrade-kernel has installed elrepo-release, its lists may be gone: they are not needed here.
    ...(needsModule ? [] : ["--disablerepo=elrepo*"]),
    // EPEL's release package asks Fedora for a mirror: one that was named is used instead.
    ...(epel && want.EPEL_URL !== SETTINGS.EPEL_URL.value
      ? [
          `--setopt=epel.baseurl=${want.EPEL_URL}/${m}${m < 8 ? "" : "/Everything"}/$basearch`,
          "--setopt=epel.metalink=",
        ]
      : []),
  ];
  return [change([...module, "wireguard-tools"], elrepo + epel, options.map(sh).join(" "))];
}

/** A repository's release package, by rpm: yum would first load the lists of all repositories. */
const release = (name: string, url: string) => `rpm -q ${name} >/dev/null || rpm -Uvh ${sh(url)}\n`;

/** A tool that is there proves nothing: an interface is made and removed (by wireguard-go where flannel would too). */
const PROOF: Change = {
  why: "prove that a WireGuard interface can be made",
  sh: `wg --version
name=kac$$
ip link add "$name" type wireguard 2>/dev/null || wireguard-go "$name" >/dev/null 2>&1 || {
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

import { sh } from "./sh.ts";
import { type Facts, Refusal } from "./step.ts";
import { pairs } from "./text.ts";

export type Manager = "apt" | "yum" | "dnf" | "zypper" | "apk" | "pacman";

export interface Os {
  /** `ID` of os-release, such as centos, and all of `ID_LIKE`. */
  id: string;
  like: string[];
  /** Major version, such as 7; NaN where the distro has none. */
  major: number;
  name: string;
  manager: Manager;
}

/** Package managers by the distro's family. @see os-release(5) */
const MANAGERS: readonly [RegExp, Manager][] = [
  [/^(debian|ubuntu)$/, "apt"],
  [/^(fedora|rhel|centos|rocky|almalinux|ol|amzn)$/, "dnf"],
  [/^(opensuse|suse|sles|opensuse-.*)$/, "zypper"],
  [/^alpine$/, "apk"],
  [/^(arch|archarm)$/, "pacman"],
];

/** @throws {Refusal} for a distro that no package manager of ours is known for. */
export function osOf(facts: Facts): Os {
  const release = Object.fromEntries(
    Object.entries(pairs(facts.os)).map(([k, v]) => [k, v.trim().replace(/^(["'])(.*)\1$/, "$2")]),
  );
  const id = release.ID ?? "";
  const like = (release.ID_LIKE ?? "").split(" ").filter(Boolean);
  const major = Number.parseInt(release.VERSION_ID ?? "", 10);
  const found = MANAGERS.find(([family]) => [id, ...like].some((name) => family.test(name)))?.[1];
  const name = release.PRETTY_NAME ?? (id || "a distro without os-release");
  if (!found)
    throw new Refusal(`This is ${name}: install WireGuard's tools and curl there by hand, then try again`);
  const old = major === 7 || (id === "amzn" && major === 2);
  return { id, like, major, name, manager: found === "dnf" && old ? "yum" : found };
}

/** Is it CentOS 7 or another of its family, whose kernel 3.10 has no WireGuard? */
export const isEl7 = (os: Os): boolean => os.manager === "yum" && os.id !== "amzn";

/** CentOS 7's mirrors went in 2024. */
const VAULT = `The mirrors of CentOS 7 are gone, its packages are at vault.centos.org:
sed -i 's/^mirrorlist/#&/; s|^#* *baseurl=http://mirror.centos.org|baseurl=http://vault.centos.org|' /etc/yum.repos.d/CentOS-*.repo`;

/**
 * Shell that installs packages without a question. Another apt at work (cloud-init's, on a new box) is waited for;
 * what a dpkg that was cut has left half done is ended first, else apt refuses.
 */
export function install(manager: Manager, packages: readonly string[], options = ""): string {
  const names = [options, ...packages.map(sh)].filter(Boolean).join(" ");
  switch (manager) {
    case "apt":
      return `export DEBIAN_FRONTEND=noninteractive
dpkg --configure -a || : # locked: apt-get waits
# DPkg::Lock::Timeout is not for the lists' lock (apt 2.6).
for _ in $(seq 60); do
  said=$(apt-get -q -o DPkg::Lock::Timeout=120 update 2>&1) && break
  case $said in *'Could not get lock'*) sleep 2 ;; *) echo "$said"; exit 1 ;; esac
done
echo "$said"
apt-get -q -y -o DPkg::Lock::Timeout=120 --no-install-recommends install ${names}`;
    case "yum":
      return `yum -y install ${names} || { printf '%s\\n' ${sh(VAULT)}; exit 1; }`;
    case "dnf":
      return `dnf -y install ${names}`;
    case "zypper":
      return `zypper --non-interactive install --no-recommends ${names}`;
    case "apk":
      return `apk add ${names}`;
    case "pacman":
      return `pacman -Sy --noconfirm --needed ${names}`;
  }
}

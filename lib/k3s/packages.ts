/** Package managers of a box, and its read-only folders. */
import { raw, sh } from "../sh.ts";
import { type Facts, prints, Refusal } from "../step.ts";
import { parseKeyValues } from "../text.ts";

export type Manager = "apt" | "yum" | "dnf" | "zypper" | "apk" | "pacman";

export interface Os {
  /** `ID` of os-release, such as centos, and all of `ID_LIKE`. */
  id: string;
  like: string[];
  /** Major version, such as 7; NaN where the distro has none. */
  major: number;
  /** `VERSION_ID`, such as 18.04. */
  version: string;
  name: string;
  /** Undefined where none of them is there. */
  manager: Manager | undefined;
  /** The tool that installs packages where /usr is read-only; "" if there is none. */
  image: string | undefined;
}

/**
 * Facts about package managers, found by what is installed, since most distros derive from another and keep its tools.
 * A tool of another family may be installed too: the first one whose database exists counts.
 */
export const managersLook = prints("managers image")(`fact managers
[ ! -s /var/lib/dpkg/status ] || command -v apt-get
[ ! -e /var/lib/pacman/local/ALPM_DB_VERSION ] || command -v pacman
for db in /lib/apk/db /usr/lib/apk/db; do [ ! -s $db/installed ] || command -v apk; done
for list in /etc/zypp/repos.d/*.repo; do [ ! -e "$list" ] || command -v zypper; done
for name in dnf yum amazon-linux-extras; do command -v $name; done
fact image; [ -w /usr ] || { for name in transactional-update rpm-ostree; do command -v $name; done; echo none; }
`);

const MANAGERS: Record<string, Manager> = {
  "apt-get": "apt",
  pacman: "pacman",
  apk: "apk",
  zypper: "zypper",
  dnf: "dnf",
  yum: "yum",
};

const programs = (paths = "") => paths.replace(/.*\//g, "").trim().split("\n");

export function osOf(facts: Facts<"managers" | "image">): Os {
  const release = parseKeyValues(facts.os?.replace(/=[^\S\n]*(["']?)(.*?)\1[^\S\n]*$/gm, "=$2"));
  const { ID: id = "", VERSION_ID: version = "" } = release;
  const [image] = programs(facts.image);
  return {
    id,
    like: (release.ID_LIKE ?? "").split(" ").filter(Boolean),
    major: Number.parseInt(version, 10),
    version,
    name: release.PRETTY_NAME ?? (id || "a distro without os-release"),
    manager: programs(facts.managers)
      .map((name) => MANAGERS[name])
      .find(Boolean),
    image: image === "none" ? "" : image || undefined,
  };
}

/** Is it CentOS 7 or another of its family, whose kernel 3.10 has no WireGuard? */
export const isEl7 = ({ id, like, major }: Os): boolean =>
  major === 7 && [id, ...like].some((name) => /^(rhel|centos|fedora)$/.test(name));

/** Lets dnf and yum skip a repository that is gone. */
export const DEAD = "--setopt=*.skip_if_unavailable=1";

/** CentOS 7's mirrors went in 2024. */
const VAULT = `The mirrors of CentOS 7 are gone, its packages are at vault.centos.org:
sed -i 's/^mirrorlist/#&/; s|^#* *baseurl=http://mirror.centos.org|baseurl=http://vault.centos.org|' /etc/yum.repos.d/CentOS-*.repo`;

/**
 * Shell that installs packages non-interactively. It waits for another running apt (cloud-init's, on a new box) and
 * completes an interrupted dpkg first, since apt would refuse. A repository that is gone is ignored: the exit status of
 * the installation decides.
 *
 * @throws {Refusal} for an unsupported package manager, naming what is missing.
 */
export function install(os: Os, packages: readonly string[], options: readonly string[] = []): string {
  if (os.image !== undefined) {
    const command = {
      "transactional-update": "transactional-update pkg install",
      "rpm-ostree": "rpm-ostree install",
    }[os.image];
    throw new Refusal(
      `/usr of ${os.name} is read-only, and this box lacks ${packages.join(", ")}: ${command ? `${command} ${packages.join(" ")}` : "put it into its image"}, restart it, then run the same again`,
    );
  }
  const names = [...options, ...packages];
  switch (os.manager) {
    case "apt":
      return sh`export DEBIAN_FRONTEND=noninteractive
dpkg --configure -a || : # locked: apt-get waits
# DPkg::Lock::Timeout is not for the lists' lock (apt 2.6).
for _ in $(seq 60); do
  said=$(apt-get -q -o DPkg::Lock::Timeout=120 update 2>&1) && break
  case $said in *'Could not get lock'*) sleep 2 ;; *) break ;; esac
done
echo "$said"
apt-get -q -y -o DPkg::Lock::Timeout=120 --no-install-recommends install ${names}`;
    case "yum":
      return sh`yum -y ${DEAD} install ${names}${raw(isEl7(os) ? sh` || { printf '%s\n' ${VAULT}; exit 1; }` : "")}`;
    case "dnf":
      return sh`dnf -y ${DEAD} install ${names}`;
    case "zypper":
      // 102, 103 and 106 mean installed: a restart is due, or a repository was skipped.
      return sh`zypper --non-interactive install --no-recommends ${names} || case $? in 10[236]) ;; *) exit 1 ;; esac`;
    case "apk":
      return sh`apk add ${names}`;
    case "pacman":
      return sh`pacman -Sy --noconfirm || :
pacman -S --noconfirm --needed ${names}`;
    default:
      throw new Refusal(
        `${os.name} has none of ${Object.keys(MANAGERS).join(", ")}: install ${packages.join(", ")} there by hand, then run the same again`,
      );
  }
}

/**
 * The fact `readonly`: k3s's folders that cannot be written. For a missing folder its nearest existing parent is
 * tested.
 */
export const foldersLook = prints(
  "readonly",
)(`fact readonly; for folder in /usr/local/bin /etc/systemd/system /var/lib/rancher; do
  at=$folder
  until [ -e "$at" ]; do at=\${at%/*}; at=\${at:-/}; done
  [ -w "$at" ] || echo "$folder"
done
`);

/** @throws {Refusal} before anything is changed, when one of these folders cannot be written. */
export function writable(facts: Facts<"readonly">, ...folders: string[]): void {
  const folder = (facts.readonly ?? "").split("\n").find((name) => folders.includes(name));
  if (folder)
    throw new Refusal(
      `${folder} cannot be written, and k3s needs it: is its file system read-only (findmnt -T ${folder}), or an image's? Nothing was installed`,
    );
}

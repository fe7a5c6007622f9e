import assert from "node:assert/strict";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { install, type Manager, osOf } from "../lib/k3s/packages.ts";
import { quote } from "../lib/sh.ts";
import { Refusal } from "../lib/step.ts";
import { installWireguard } from "../scripts/install-wireguard.ts";
import { type Facts, fixture, MODERN, OLD, prepared, programs, shell, temporary, wanted } from "./helpers.ts";

const EL8 = "https://www.elrepo.org/elrepo-release-8.el8.elrepo.noarch.rpm";
const EPEL7 =
  "https://archives.fedoraproject.org/pub/archive/epel/7/x86_64/Packages/e/epel-release-7-14.noarch.rpm";
const EPEL8 = "https://dl.fedoraproject.org/pub/epel/epel-release-latest-8.noarch.rpm";
const TOOLS = "wireguard-tools";

const EL7 = `--enablerepo=epel ${TOOLS}`;

/** A box of a distribution: what its look prints about package managers, the C library and the kernel. */
interface Distro {
  /** Package managers that are installed, in the order in which the look prints them. */
  has: string;
  manager: Manager;
  glibc?: number;
  kernel: string;
  /** The package of that kernel, if the distribution has its modules in two packages. */
  split?: string;
  /** What is installed if only the tools are missing: release packages, repositories, packages. */
  tools: string;
  /** The same if the kernel lacks its module too; or the error. */
  module: string | RegExp;
}

const el = (glibc: number, kernel: string, more: Partial<Distro> = {}): Distro => ({
  has: "dnf yum",
  manager: "dnf",
  glibc,
  kernel,
  split: `kernel-core-${kernel}`,
  tools: TOOLS,
  module: `kernel-modules-${kernel} ${TOOLS}`,
  ...more,
});
const apt = (kernel: string, module: string | RegExp, more: Partial<Distro> = {}): Distro => ({
  has: "apt-get",
  manager: "apt",
  kernel,
  tools: TOOLS,
  module,
  ...more,
});
const ubuntu = (kernel: string): Distro =>
  apt(kernel, `linux-modules-extra-${kernel} ${TOOLS}`, { split: `linux-modules-${kernel}` });
const other = (manager: Manager, kernel: string, module: RegExp, more: Partial<Distro> = {}): Distro => ({
  has: manager,
  manager,
  kernel,
  tools: TOOLS,
  module,
  ...more,
});
/** EL 7's userland: yum 3 and glibc 2.17, or Amazon's 2.26; its tools are in EPEL's archive. */
const yum = (kernel: string, module: RegExp, more: Partial<Distro> = {}): Distro =>
  other("yum", kernel, module, { glibc: 17, tools: `${EPEL7} ${EL7}`, ...more });

const DISTROS: Record<string, Distro> = {
  "centos-7": yum("3.10.0-1160.el7.x86_64", /make upgrade-kernel/),
  "alinux-2": yum(
    "4.19.91-27.7.al7.x86_64",
    /Alibaba Cloud Linux.*an image with Linux 5\.6 or later \(yum list kernel/,
  ),
  "tencentos-2.4": yum("5.4.119-19-0009.11", /TencentOS Server 2\.4 adds it.*an image with Linux 5\.6/),
  "amazon-2": yum("4.14.355-275.amzn2.x86_64", /amazon-linux-extras install kernel-5\.10/, {
    has: "yum amazon-linux-extras",
    glibc: 26,
  }),
  "rocky-8": el(28, "4.18.0-553.el8_10.x86_64", {
    tools: `${EPEL8} ${TOOLS}`,
    module: `${EL8} ${EPEL8} kmod-wireguard ${TOOLS}`,
  }),
  "oracle-8": el(28, "5.15.0-300.el8uek.x86_64", {
    split: "kernel-uek-core-5.15.0-300.el8uek.x86_64",
    tools: `${EPEL8} ${TOOLS}`,
    module: `${EPEL8} kernel-uek-modules-5.15.0-300.el8uek.x86_64 ${TOOLS}`,
  }),
  "alinux-3": el(32, "5.10.134-16.1.al8.x86_64", {
    tools: `${EPEL8} ${TOOLS}`,
    module: `${EPEL8} kernel-modules-5.10.134-16.1.al8.x86_64 ${TOOLS}`,
  }),
  "kylin-v10": other(
    "dnf",
    "4.19.90-52.22.v2207.ky10.x86_64",
    /Kylin.*V10 \(Lance\) adds it.*dnf list kernel/,
    {
      has: "dnf yum",
      glibc: 28,
      tools: `${EPEL8} ${TOOLS}`,
    },
  ),
  "openeuler-22.03": other("dnf", "5.10.0-182.oe2203sp3.x86_64", /no package of openEuler 22\.03/, {
    has: "dnf yum",
    glibc: 34,
  }),
  "opencloudos-9": other("dnf", "6.6.47-12.oc9.x86_64", /no package of OpenCloudOS 9\.2/, {
    has: "dnf yum",
    glibc: 38,
  }),
  "almalinux-9": el(34, "5.14.0-503.el9.x86_64"),
  "rhel-9": el(34, "5.14.0-503.el9.x86_64"),
  "centos-stream-10": el(39, "6.12.0-55.el10.x86_64"),
  "fedora-41": el(40, "6.11.4-301.fc41.x86_64"),
  "amazon-2023": other("dnf", "6.1.100-1.amzn2023.x86_64", /newest kernel/, { has: "dnf yum", glibc: 34 }),
  "debian-11": apt("5.10.0-30-amd64", /linux-image-amd64/),
  "debian-12": apt("6.1.0-40-cloud-amd64", /linux-image-amd64/, { has: "apt-get dnf yum" }),
  "debian-13": apt("6.12.0-1-amd64", /linux-image-amd64/),
  "ubuntu-18.04": apt("4.15.0-213-generic", /linux-generic-hwe-18\.04/, {
    split: "linux-modules-4.15.0-213-generic",
  }),
  "ubuntu-20.04": ubuntu("5.4.0-200-generic"),
  "ubuntu-22.04": ubuntu("5.15.0-1070-aws"),
  "ubuntu-24.04": ubuntu("6.8.0-50-generic"),
  "ubuntu-26.04": ubuntu("7.0.0-10-generic"),
  "opensuse-leap-15.6": other("zypper", "6.4.0-150600.23-default", /zypper install kernel-default/),
  "opensuse-tumbleweed": other("zypper", "6.17.1-1-default", /kernel-default/, { has: "zypper dnf" }),
  "sles-15": other("zypper", "5.14.21-150500.55-default", /kernel-default/),
  arch: other("pacman", "6.17.1-arch1-1", /pacman -Syu linux/),
  "alpine-3.20": other("apk", "6.6.50-0-virt", /apk add linux-lts/),
};
const OTHERS = ["fedora-coreos-41", "nixos-24.05", "opensuse-microos"];

const paths = (names: string) =>
  names
    .split(" ")
    .map((name) => `/usr/bin/${name}\n`)
    .join("");
const plan = (over: Facts, want = {}) => installWireguard.plan(wanted(want), prepared(MODERN, over));
const refused = (over: Facts, pattern: RegExp, want = {}) =>
  assert.throws(
    () => plan(over, want),
    (e: Error) => e instanceof Refusal && pattern.test(e.message),
  );
/** What the look of such a box prints. */
const box = (name: string, { has, glibc, kernel, split }: Distro): Facts => ({
  os: fixture(`os-release/${name}`),
  managers: paths(has),
  ...(glibc ? { glibc: `glibc 2.${glibc}\n` } : {}),
  kernel: `${kernel}\n`,
  split: split ? `${split}\n` : "",
});

/** What the package manager would install, in order: the script runs with functions in its place. */
function installs(manager: Manager, script: string): string {
  const asked = `for word; do case $word in list) return 1 ;; install | add | -S) found=1 ;; --enablerepo=*) echo "$word" ;; -*) ;; *) [ -z "\${found-}" ] || printf '%s\\n' "$word" ;; esac; done; found=`;
  const fakes = ["apt-get", "yum", "dnf", "zypper", "apk", "pacman"].map(
    (name) => `${name.replace("-", "_")}() { used=${name}; ${asked}; }`,
  );
  const text = `${fakes.join("\n")}\ndpkg() { return 2; }\nrpm() { [ "$1" = -Uvh ] && echo "$2"; }\nset -eu\n${script.replaceAll("apt-get", "apt_get")}\necho "by $used"`;
  const { stdout, stderr, status } = shell(text);
  assert.equal(status, 0, stderr);
  const words = stdout
    .trim()
    .split("\n")
    .filter((word) => word !== "DPkg::Lock::Timeout=120");
  assert.equal(words.pop(), `by ${manager === "apt" ? "apt-get" : manager}`);
  return words.join(" ").trim();
}

describe("WireGuard", () => {
  for (const [name, distro] of Object.entries(DISTROS)) {
    const { manager, kernel, tools, module } = distro;
    const os = box(name, distro);
    const lacking = { ...os, module: "", loaded: "" };
    test(`of ${name} is installed by ${manager}`, () => {
      assert.equal(osOf(os).manager, manager);
      assert.equal(installs(manager, plan({ ...os, tool: "" })[0]?.sh ?? ""), tools);
    });
    test(`for kernel ${kernel} of ${name} without the module ${module instanceof RegExp ? "is refused, with advice on another kernel" : "is installed with the module"}`, () => {
      if (module instanceof RegExp) {
        refused(lacking, module);
        refused(lacking, new RegExp(`Kernel ${kernel.replaceAll(".", "\\.")} has no WireGuard`));
      } else
        for (const tool of ["", "/usr/bin/wg\n"])
          assert.equal(installs(manager, plan({ ...lacking, tool })[0]?.sh ?? ""), module);
    });
  }

  test("is tested for each distribution in the fixtures, except those without a package manager", () => {
    const all = readdirSync(join(import.meta.dirname, "fixtures/os-release"));
    assert.deepEqual(
      all.filter((name) => !(name in DISTROS)),
      OTHERS,
    );
  });

  const cases: [name: string, over: Facts, kinds: string[]][] = [
    ["that is installed and loaded needs no change", {}, []],
    ["that is installed but was never used is only tested", { loaded: "" }, ["prove"]],
    [
      "whose installation was interrupted is installed again",
      { half: "half-configured" },
      ["install", "prove"],
    ],
    ["whose test was interrupted is tested again, which cleans up", { probe: "yes" }, ["prove"]],
    ["without its tools gets them, and is tested", { tool: "" }, ["install", "prove"]],
  ];
  for (const [name, over, kinds] of cases)
    test(name, () =>
      assert.deepEqual(
        plan(over).map(({ why }) => why.split(" ")[0]),
        kinds,
      ),
    );

  const outside = { module: "", userspace: "/usr/bin/wireguard-go\n", loaded: "" };
  test("of wireguard-go is sufficient for old k3s", () =>
    assert.deepEqual(plan(outside, { K3S_VERSION: OLD }), []));
  for (const version of [MODERN, "v1.26.15+k3s1", "v1.36.3+k3s1"])
    test(`of wireguard-go is refused before any change for ${version}, which needs the kernel's`, () => {
      refused(outside, /wireguard-go is here, but k3s v1\.\S+ asks the kernel alone/, {
        K3S_VERSION: version,
      });
      const { kernel = "", split = "" } = DISTROS["ubuntu-22.04"] ?? {};
      assert.deepEqual(
        plan({ ...outside, kernel, split }, { K3S_VERSION: version }).map(({ why }) => why.split(" ")[0]),
        ["install", "prove"],
      );
    });

  test("is downloaded from the mirrors that are set", () => {
    const want = { ELREPO_URL: "https://m.example/elrepo", EPEL_URL: "https://m.example/epel" };
    const of = (name: string) =>
      plan({ ...box(name, DISTROS[name] as Distro), tool: "", module: "", loaded: "" }, want)[0]?.sh ?? "";
    assert.match(of("rocky-8"), /https:\/\/m\.example\/epel\/epel-release-latest-8/);
    assert.match(of("rocky-8"), /https:\/\/m\.example\/elrepo\/elrepo-release-8/);
    const el7 = plan({ ...box("centos-7", DISTROS["centos-7"] as Distro), tool: "" }, want)[0]?.sh ?? "";
    assert.match(el7, /https:\/\/m\.example\/epel\/epel-release-latest-7/);
    for (const text of [of("rocky-8"), el7]) assert.doesNotMatch(text, /fedoraproject|www\.elrepo/);
  });

  test("of CentOS 7 uses only EPEL's repository, and the error names the vault if that fails", () => {
    const sh = plan({ ...box("centos-7", DISTROS["centos-7"] as Distro), tool: "" })[0]?.sh ?? "";
    assert.match(sh, /yum -y .* install '--disablerepo=\*' --enablerepo=epel /);
    const fakes = { yum: "echo 'Cannot find a valid baseurl for repo: base/7/x86_64'; exit 1", rpm: ":" };
    const { status, stdout } = shell(`set -eu\n${sh}`, ["sh", "-s"], { PATH: programs(temporary(), fakes) });
    assert.equal(status, 1);
    assert.match(stdout, /vault\.centos\.org/);
  });

  for (const [name, os, pattern] of [
    [
      "a distribution without a supported package manager",
      { os: fixture("os-release/nixos-24.05") },
      /by hand/,
    ],
    [
      "a distribution without os-release",
      { os: "" },
      /has none of apt-get.*install wireguard-tools there by hand/,
    ],
    [
      "a transactional system",
      {
        os: fixture("os-release/opensuse-microos"),
        managers: paths("zypper"),
        image: "/usr/sbin/transactional-update\nnone\n",
      },
      /MicroOS is read-only.*lacks wireguard-tools: transactional-update pkg install wireguard-tools, restart it/,
    ],
    [
      "an ostree system",
      {
        os: fixture("os-release/fedora-coreos-41"),
        managers: paths("dnf"),
        image: "/usr/bin/rpm-ostree\nnone\n",
      },
      /CoreOS.*rpm-ostree install wireguard-tools, restart it/,
    ],
    [
      "another system with a read-only /usr",
      { os: fixture("os-release/debian-12"), managers: paths("apt-get"), image: "none\n" },
      /is read-only, and this box lacks wireguard-tools: put it into its image/,
    ],
  ] as const)
    test(`on ${name} is refused with advice on how to install it`, () => {
      const facts = { managers: "", ...os };
      refused({ ...facts, tool: "" }, pattern);
      assert.deepEqual(plan(facts), [], "if it is installed, it is accepted");
    });
});

describe("the test of WireGuard", () => {
  const prove = (ip: string, version = MODERN, go = "exit 1") => {
    const proof = plan({ loaded: "" }, { K3S_VERSION: version }).at(-1)?.sh ?? "";
    return shell(`set -eu\n${proof}`, ["sh", "-s"], {
      PATH: programs(temporary(), { ip, wg: ":", "wireguard-go": go }),
    });
  };

  test("succeeds if an interface can be created, and removes it", () => {
    const { status, stdout } = prove('echo "$1 $2" >&2; [ "$2" != del ] || echo removed');
    assert.deepEqual({ status, stdout }, { status: 0, stdout: "removed\n" });
  });

  test("succeeds with wireguard-go only for old k3s, because modern k3s needs the kernel's", () => {
    const ip = '[ "$2" != add ]';
    assert.equal(prove(ip, OLD, ":").status, 0);
    const { status, stdout } = prove(ip, MODERN, ":");
    assert.equal(status, 1);
    assert.match(stdout, /Kernel .* can make no WireGuard interface/);
  });

  test("fails if no interface can be created, even if the tools are installed", () => {
    const { status, stdout } = prove("exit 2");
    assert.equal(status, 1);
    assert.match(stdout, /Kernel .* can make no WireGuard interface/);
  });
});

describe("a package repository that fails", () => {
  /** Runs the installation with an apt-get whose updates print these errors, one after the other, and then succeed. */
  const updates = (installed: number, ...said: string[]) => {
    const fakes = said.map((text, i) => `${i + 1}) echo ${quote(text)} >&2; return 100 ;;`).join("\n");
    const text = `count=$(mktemp)
dpkg() { :; }
sleep() { :; }
apt_get() {
  case "$*" in *update) ;; *) echo "tries: $(wc -c <"$count")"; return ${installed} ;; esac
  printf x >>"$count"
  case $(($(wc -c <"$count"))) in
  ${fakes}
  esac
}
set -eu
${by("apt", ["curl"]).replaceAll("apt-get", "apt_get")}`;
    return shell(text);
  };
  const by = (manager: Manager, names: string[]) =>
    install({ id: "", like: [], major: 0, version: "", name: "", manager, image: undefined }, names);
  const GONE = "E: The repository 'https://gone.example stable Release' does not have a Release file.";

  test("because another apt holds the lock is waited for", () => {
    const lock = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 77 (apt-get)";
    assert.match(updates(0, lock, lock).stdout, /^tries: +3$/m);
  });

  test("does not prevent an installation with apt, because the package may be in another one", () => {
    const { status, stdout } = updates(0, GONE);
    assert.equal(status, 0);
    assert.match(stdout, /^tries: +1$/m);
  });

  test("is reported if the installation with apt fails, which returns its status", () => {
    const { status, stdout } = updates(100, GONE);
    assert.deepEqual([status, stdout.split("\n")[0]], [100, GONE]);
  });

  /** The exit status of an installation with this package manager. */
  const ends = (manager: Manager, script: string) =>
    shell(`set -eu\n${by(manager, ["curl"])}`, ["sh", "-s"], {
      PATH: programs(temporary(), { [manager]: script }),
    }).status;

  test("does not prevent an installation with dnf, yum, zypper and pacman", () => {
    for (const manager of ["dnf", "yum"] as const)
      assert.equal(
        ends(manager, `case "$*" in *'--setopt=*.skip_if_unavailable=1'*) ;; *) exit 1 ;; esac`),
        0,
      );
    // zypper's statuses for: installed, but a repository was skipped; a reboot is needed; zypper itself was updated.
    for (const status of [0, 102, 103, 106]) assert.equal(ends("zypper", `exit ${status}`), 0);
    assert.equal(ends("pacman", 'case "$1" in -Sy) exit 1 ;; esac'), 0);
  });

  test("does not hide a failed installation", () => {
    for (const manager of ["dnf", "yum", "pacman", "apk"] as const) assert.equal(ends(manager, "exit 1"), 1);
    for (const status of [1, 4, 8, 104]) assert.equal(ends("zypper", `exit ${status}`), 1);
  });
});

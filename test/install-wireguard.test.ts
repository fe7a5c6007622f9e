import assert from "node:assert/strict";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { install, type Manager, osOf } from "../lib/os.ts";
import { sh } from "../lib/sh.ts";
import { type Facts, Refusal } from "../lib/step.ts";
import { installWireguard } from "../scripts/install-wireguard.ts";
import { fixture, MODERN, prepared, programs, shell, temporary, wanted } from "./helpers.ts";

const EL8 = "https://www.elrepo.org/elrepo-release-8.el8.elrepo.noarch.rpm";
const EPEL7 =
  "https://archives.fedoraproject.org/pub/archive/epel/7/x86_64/Packages/e/epel-release-7-14.noarch.rpm";
const EPEL8 = "https://dl.fedoraproject.org/pub/epel/epel-release-latest-8.noarch.rpm";
const TOOLS = "wireguard-tools";

/**
 * By distro: its package manager; what the tools alone need, repositories first; and for a kernel that lacks the
 * module, what brings it (the tools come too), or what the user is told to do instead.
 */
const DISTROS: Record<string, [manager: Manager, tools: string, kernel: string, module: string | RegExp]> = {
  "centos-7": ["yum", `${EPEL7} ${TOOLS}`, "3.10.0-1160.el7.x86_64", /make upgrade-kernel/],
  "rocky-8": ["dnf", `${EPEL8} ${TOOLS}`, "4.18.0-553.el8_10.x86_64", `${EL8} ${EPEL8} kmod-wireguard`],
  "oracle-8": [
    "dnf",
    `${EPEL8} ${TOOLS}`,
    "5.15.0-300.el8uek.x86_64",
    `${EPEL8} kernel-uek-modules-5.15.0-300.el8uek.x86_64`,
  ],
  "almalinux-9": ["dnf", TOOLS, "5.14.0-503.el9.x86_64", "kernel-modules-5.14.0-503.el9.x86_64"],
  "rhel-9": ["dnf", TOOLS, "5.14.0-503.el9.x86_64", "kernel-modules-5.14.0-503.el9.x86_64"],
  "centos-stream-10": ["dnf", TOOLS, "6.12.0-55.el10.x86_64", "kernel-modules-6.12.0-55.el10.x86_64"],
  "fedora-41": ["dnf", TOOLS, "6.11.4-301.fc41.x86_64", "kernel-modules-6.11.4-301.fc41.x86_64"],
  "amazon-2": ["yum", TOOLS, "4.14.355-275.amzn2.x86_64", /amazon-linux-extras install kernel-5\.10/],
  "amazon-2023": ["dnf", TOOLS, "6.1.100-1.amzn2023.x86_64", /newest kernel/],
  "debian-11": ["apt", TOOLS, "5.10.0-30-amd64", /linux-image-amd64/],
  "debian-12": ["apt", TOOLS, "6.1.0-40-cloud-amd64", /linux-image-amd64/],
  "debian-13": ["apt", TOOLS, "6.12.0-1-amd64", /linux-image-amd64/],
  "ubuntu-20.04": ["apt", TOOLS, "5.4.0-200-generic", "linux-modules-extra-5.4.0-200-generic"],
  "ubuntu-22.04": ["apt", TOOLS, "5.15.0-1070-aws", "linux-modules-extra-5.15.0-1070-aws"],
  "ubuntu-24.04": ["apt", TOOLS, "6.8.0-50-generic", "linux-modules-extra-6.8.0-50-generic"],
  "ubuntu-26.04": ["apt", TOOLS, "7.0.0-10-generic", "linux-modules-extra-7.0.0-10-generic"],
  "opensuse-leap-15.6": ["zypper", TOOLS, "6.4.0-150600.23-default", /kernel-default/],
  "opensuse-tumbleweed": ["zypper", TOOLS, "6.17.1-1-default", /kernel-default/],
  "sles-15": ["zypper", TOOLS, "5.14.21-150500.55-default", /kernel-default/],
  arch: ["pacman", TOOLS, "6.17.1-arch1-1", /pacman -Syu linux/],
  "alpine-3.20": ["apk", TOOLS, "6.6.50-0-virt", /apk add linux-lts/],
};

const plan = (over: Facts, want = {}) => installWireguard.plan(wanted(want), prepared(MODERN, over));

/** What the package manager would be asked to install, in order: the script runs with functions in its place. */
function installs(manager: Manager, script: string): string {
  const asked = `for word; do case $word in install | add | -Sy) found=1 ;; -*) ;; *) [ -z "\${found-}" ] || printf '%s\\n' "$word" ;; esac; done; found=`;
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
  return words.join(" ");
}

describe("WireGuard", () => {
  for (const [name, [manager, tools, kernel, module]] of Object.entries(DISTROS)) {
    const os = { os: fixture(`os-release/${name}`), kernel: `${kernel}\n` };
    const lacking = { ...os, module: "", loaded: "" };
    test(`of ${name} is installed by ${manager}`, () => {
      assert.equal(osOf(os).manager, manager);
      assert.equal(installs(manager, plan({ ...os, tool: "" })[0]?.sh ?? ""), tools);
    });
    test(`in kernel ${kernel} of ${name} that lacks its module ${module instanceof RegExp ? "needs another kernel, and that is said" : "comes with it"}`, () => {
      if (module instanceof RegExp)
        assert.throws(
          () => plan(lacking),
          (e: Error) => e instanceof Refusal && module.test(e.message) && e.message.includes(kernel),
        );
      else
        for (const tool of ["", "/usr/bin/wg\n"])
          assert.equal(installs(manager, plan({ ...lacking, tool })[0]?.sh ?? ""), `${module} ${TOOLS}`);
    });
  }

  test("has a row here for each distro of the fixtures, but for the one without a package manager of ours", () => {
    const all = readdirSync(join(import.meta.dirname, "fixtures/os-release"));
    assert.deepEqual(
      all.filter((name) => !(name in DISTROS)),
      ["nixos-24.05"],
    );
  });

  const cases: [name: string, over: Facts, kinds: string[]][] = [
    ["that is here and loaded is left alone", {}, []],
    ["that is here and was never used is only proven", { loaded: "" }, ["prove"]],
    ["whose package was cut is installed to its end", { half: "half-configured" }, ["install", "prove"]],
    ["whose proof was cut is proven again, which clears it up", { probe: "yes" }, ["prove"]],
    ["that lacks its tools gets them, and is proven", { tool: "" }, ["install", "prove"]],
    [
      "of wireguard-go's is left alone",
      { module: "", userspace: "/usr/bin/wireguard-go\n", loaded: "/usr/bin/wireguard-go\n" },
      [],
    ],
  ];
  for (const [name, over, kinds] of cases)
    test(name, () =>
      assert.deepEqual(
        plan(over).map(({ why }) => why.split(" ")[0]),
        kinds,
      ),
    );

  test("comes from the mirrors that are set", () => {
    const want = { ELREPO_URL: "https://m.example/elrepo", EPEL_URL: "https://m.example/epel" };
    const of = (name: string) =>
      plan({ os: fixture(`os-release/${name}`), tool: "", module: "", loaded: "", kernel: "4.18.0" }, want)[0]
        ?.sh ?? "";
    assert.match(of("rocky-8"), /https:\/\/m\.example\/epel\/epel-release-latest-8/);
    assert.match(of("rocky-8"), /https:\/\/m\.example\/elrepo\/elrepo-release-8/);
    const el7 = plan({ os: fixture("os-release/centos-7"), tool: "" }, want)[0]?.sh ?? "";
    assert.match(el7, /https:\/\/m\.example\/epel\/epel-release-latest-7/);
    for (const text of [of("rocky-8"), el7]) assert.doesNotMatch(text, /fedoraproject|www\.elrepo/);
  });

  test("of CentOS 7 asks no list but EPEL's, and names the vault where even that fails", () => {
    const sh = plan({ os: fixture("os-release/centos-7"), tool: "" })[0]?.sh ?? "";
    assert.match(sh, /yum -y install '--disablerepo=\*' --enablerepo=epel /);
    const fakes = { yum: "echo 'Cannot find a valid baseurl for repo: base/7/x86_64'; exit 1", rpm: ":" };
    const { status, stdout } = shell(`set -eu\n${sh}`, ["sh", "-s"], { PATH: programs(temporary(), fakes) });
    assert.equal(status, 1);
    assert.match(stdout, /vault\.centos\.org/);
  });

  for (const [name, os] of Object.entries({
    "a distro of no package manager of ours": fixture("os-release/nixos-24.05"),
    "no os-release": "",
  }))
    test(`on ${name} is for the user to install, and that is said`, () => {
      assert.throws(
        () => plan({ os, tool: "" }),
        (e: Error) => e instanceof Refusal && /by hand/.test(e.message),
      );
      assert.deepEqual(plan({ os }), [], "and where it is installed, all is well");
    });
});

describe("the proof", () => {
  const proof = plan({ loaded: "" }).at(-1)?.sh ?? "";
  const prove = (ip: string) =>
    shell(`set -eu\n${proof}`, ["sh", "-s"], {
      PATH: programs(temporary(), { ip, wg: ":", "wireguard-go": "exit 1" }),
    });

  test("holds where an interface can be made, and leaves none", () => {
    const { status, stdout } = prove('echo "$1 $2" >&2; [ "$2" != del ] || echo removed');
    assert.deepEqual({ status, stdout }, { status: 0, stdout: "removed\n" });
  });

  test("fails where none can be made, whatever tools are there", () => {
    const { status, stdout } = prove("exit 2");
    assert.equal(status, 1);
    assert.match(stdout, /Kernel .* can make no WireGuard interface/);
  });
});

describe("apt-get update", () => {
  /** Runs the installation by an apt-get whose updates say these, one after the other, and then go well. */
  const updates = (...said: string[]) => {
    const fakes = said.map((text, i) => `${i + 1}) echo ${sh(text)} >&2; return 100 ;;`).join("\n");
    const text = `count=$(mktemp)
dpkg() { :; }
sleep() { :; }
apt_get() {
  case "$*" in *update) ;; *) echo "tries: $(wc -c <"$count")"; return ;; esac
  printf x >>"$count"
  case $(($(wc -c <"$count"))) in
  ${fakes}
  esac
}
set -eu
${install("apt", ["curl"]).replaceAll("apt-get", "apt_get")}`;
    return shell(text);
  };

  test("waits for another apt that holds the lists", () => {
    const lock = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 77 (apt-get)";
    assert.match(updates(lock, lock).stdout, /^tries: +3$/m);
  });

  test("fails at once for any other reason, and says it", () => {
    const { status, stdout } = updates("E: The repository has no Release file");
    assert.deepEqual([status, stdout], [1, "E: The repository has no Release file\n"]);
  });
});

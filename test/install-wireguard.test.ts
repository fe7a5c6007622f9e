import assert from "node:assert/strict";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { type Manager, osOf } from "../lib/os.ts";
import { type Facts, Refusal } from "../lib/step.ts";
import { installWireguard } from "../scripts/install-wireguard.ts";
import { fixture, MODERN, prepared, programs, shell, temporary, wanted } from "./helpers.ts";

const EL7 = "https://www.elrepo.org/elrepo-release-7.el7.elrepo.noarch.rpm";
const EL8 = "https://www.elrepo.org/elrepo-release-8.el8.elrepo.noarch.rpm";
const EL9 = "https://www.elrepo.org/elrepo-release-9.el9.elrepo.noarch.rpm";
const EL10 = "https://www.elrepo.org/elrepo-release-10.el10.elrepo.noarch.rpm";
const EPEL7 = "https://dl.fedoraproject.org/pub/epel/epel-release-latest-7.noarch.rpm";
const EPEL8 = "https://dl.fedoraproject.org/pub/epel/epel-release-latest-8.noarch.rpm";

/** By distro: its package manager; what the tools alone need; what they and a module need. Repositories first. */
const DISTROS: Record<string, [manager: Manager, tools: string, withModule: string]> = {
  "centos-7": [
    "yum",
    `${EPEL7} wireguard-tools`,
    `${EL7} ${EPEL7} yum-plugin-elrepo kmod-wireguard wireguard-tools`,
  ],
  "rocky-8": ["dnf", `${EPEL8} wireguard-tools`, `${EL8} ${EPEL8} kmod-wireguard wireguard-tools`],
  "oracle-8": ["dnf", `${EPEL8} wireguard-tools`, `${EL8} ${EPEL8} kmod-wireguard wireguard-tools`],
  "almalinux-9": ["dnf", "wireguard-tools", `${EL9} kmod-wireguard wireguard-tools`],
  "rhel-9": ["dnf", "wireguard-tools", `${EL9} kmod-wireguard wireguard-tools`],
  "centos-stream-10": ["dnf", "wireguard-tools", `${EL10} kmod-wireguard wireguard-tools`],
  "fedora-41": ["dnf", "wireguard-tools", "wireguard-tools"],
  "amazon-2023": ["dnf", "wireguard-tools", "wireguard-tools"],
  "debian-11": ["apt", "wireguard-tools", "wireguard-tools wireguard-dkms"],
  "debian-12": ["apt", "wireguard-tools", "wireguard-tools wireguard-dkms"],
  "debian-13": ["apt", "wireguard-tools", "wireguard-tools wireguard-dkms"],
  "ubuntu-20.04": ["apt", "wireguard-tools", "wireguard-tools wireguard-dkms"],
  "ubuntu-22.04": ["apt", "wireguard-tools", "wireguard-tools wireguard-dkms"],
  "ubuntu-24.04": ["apt", "wireguard-tools", "wireguard-tools wireguard-dkms"],
  "ubuntu-26.04": ["apt", "wireguard-tools", "wireguard-tools wireguard-dkms"],
  "opensuse-leap-15.6": ["zypper", "wireguard-tools", "wireguard-tools"],
  "opensuse-tumbleweed": ["zypper", "wireguard-tools", "wireguard-tools"],
  "sles-15": ["zypper", "wireguard-tools", "wireguard-tools"],
  arch: ["pacman", "wireguard-tools", "wireguard-tools"],
  "alpine-3.20": ["apk", "wireguard-tools", "wireguard-tools"],
};

const plan = (over: Facts, want = {}) => installWireguard.plan(wanted(want), prepared(MODERN, over));

/** What the package manager would be asked to install, in order: the script runs with functions in its place. */
function installs(manager: Manager, script: string): string {
  const asked = `for word; do case $word in install | add | -Sy) found=1 ;; -*) ;; *) [ -z "\${found-}" ] || printf '%s\\n' "$word" ;; esac; done; found=`;
  const fakes = ["apt-get", "yum", "dnf", "zypper", "apk", "pacman"].map(
    (name) => `${name.replace("-", "_")}() { used=${name}; ${asked}; }`,
  );
  const text = `${fakes.join("\n")}\nrpm() { [ "$1" = -Uvh ] && echo "$2"; }\nset -eu\n${script.replaceAll("apt-get", "apt_get")}\necho "by $used"`;
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
  for (const [name, [manager, tools, withModule]] of Object.entries(DISTROS)) {
    const os = { os: fixture(`os-release/${name}`) };
    test(`of ${name} is installed by ${manager}, its module only where the kernel has none`, () => {
      assert.equal(osOf(os).manager, manager);
      assert.equal(installs(manager, plan({ ...os, tool: "" })[0]?.sh ?? ""), tools);
      assert.equal(
        installs(manager, plan({ ...os, tool: "", module: "", loaded: "" })[0]?.sh ?? ""),
        withModule,
      );
      assert.equal(installs(manager, plan({ ...os, module: "", loaded: "" })[0]?.sh ?? ""), withModule);
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
    ["that lacks its tools gets them, and is proven", { tool: "" }, ["install", "prove"]],
    [
      "that lacks all of it gets it, and is proven",
      { tool: "", module: "", loaded: "" },
      ["install", "prove"],
    ],
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
    const sh =
      plan({ os: fixture("os-release/centos-7"), tool: "", module: "", loaded: "" }, want)[0]?.sh ?? "";
    assert.match(sh, /https:\/\/m\.example\/epel\/epel-release-latest-7/);
    assert.match(sh, /https:\/\/m\.example\/elrepo\/elrepo-release-7/);
    assert.doesNotMatch(sh, /fedoraproject|www\.elrepo/);
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

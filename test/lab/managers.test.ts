/**
 * The package managers that Debian has packages of, each with a small repository and a separate root. apt
 * runs in the boxes of the other suites, yum (as dnf) in that of the kernel; Debian has no package of apk.
 */
import assert from "node:assert/strict";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { before, describe, test } from "node:test";
import { $ as zx } from "zx";
import { osOf } from "../../lib/k3s/packages.ts";
import { packages } from "../../scripts/install-wireguard.ts";
import { fixture, programs, shell, temporary, wanted } from "../helpers.ts";

const $ = zx({ quiet: true });
const folder = temporary();
const root = (name: string) => join(folder, `root-${name}`);
const TOOL = "#!/bin/sh\necho wireguard-tools v1.0\n";
const put = (path: string, text: string) => {
  mkdirSync(join(path, ".."), { recursive: true });
  writeFileSync(path, text, { mode: 0o755 });
};

/** A repository of RPMs with wireguard-tools, which recommends a package that must not be installed. */
async function rpms() {
  const repository = join(folder, "rpms");
  put(join(folder, "wg"), TOOL);
  put(
    join(folder, "wireguard-tools.spec"),
    `Name: wireguard-tools
Version: 1.0
Release: 1
Summary: A stand-in
License: MIT
BuildArch: noarch
AutoReqProv: no
Recommends: not-needed
%description
A stand-in for tests.
%install
install -D -m 755 ${folder}/wg %{buildroot}/usr/bin/wg
%files
/usr/bin/wg
`,
  );
  const defines = [`_topdir ${folder}/build`, `_rpmdir ${repository}`, `_dbpath ${folder}/db`];
  await $`rpmbuild --quiet -bb ${defines.flatMap((line) => ["--define", line])} ${folder}/wireguard-tools.spec`;
  await $`createrepo_c -q ${repository}`;
  // And one that no longer exists, as a third-party one may.
  return [
    ["lab", repository],
    ["gone", "/gone"],
  ]
    .map(([name, path]) => `[${name}]\nname=${name}\nbaseurl=file://${path}\nenabled=1\ngpgcheck=0\n`)
    .join("");
}

/** A repository of Arch's with wireguard-tools. */
async function pacman() {
  const build = join(folder, "arch");
  put(join(build, ".PKGINFO"), "pkgname = wireguard-tools\npkgver = 1.0-1\narch = any\nsize = 1\n");
  put(join(build, "usr/bin/wg"), TOOL);
  await $`tar -C ${build} --zstd -cf ${folder}/wireguard-tools-1.0-1-any.pkg.tar.zst .PKGINFO usr`;
  const fields = {
    FILENAME: "wireguard-tools-1.0-1-any.pkg.tar.zst",
    NAME: "wireguard-tools",
    VERSION: "1.0-1",
    ARCH: "any",
  };
  const desc = Object.entries(fields).map(([key, value]) => `%${key}%\n${value}\n\n`);
  put(join(folder, "db/wireguard-tools-1.0-1/desc"), desc.join(""));
  await $`tar -C ${folder}/db -czf ${folder}/lab.db wireguard-tools-1.0-1`;
  // Without any repository database, however old, pacman does nothing.
  const lists = join(root("arch"), "var/lib/pacman/sync");
  mkdirSync(lists, { recursive: true });
  await $`tar -czf ${lists}/gone.db -T /dev/null`;
  put(
    join(folder, "pacman.conf"),
    `[options]\nArchitecture = auto\nSigLevel = Never\n[lab]\nServer = file://${folder}\n[gone]\nServer = file:///gone\n`,
  );
}

describe("WireGuard's tools are installed", () => {
  before(async () => {
    const repository = await rpms();
    put(join(root("almalinux-9"), "etc/yum.repos.d/lab.repo"), repository);
    put(join(root("opensuse-leap-15.6"), "etc/zypp/repos.d/lab.repo"), repository);
    await pacman();
  });

  for (const [name, command] of [
    [
      "almalinux-9",
      `dnf --installroot=${root("almalinux-9")} --releasever=9 --setopt=reposdir=${root("almalinux-9")}/etc/yum.repos.d`,
    ],
    ["opensuse-leap-15.6", `zypper --root ${root("opensuse-leap-15.6")} --no-gpg-checks`],
    [
      "arch",
      `pacman --root ${root("arch")} --dbpath ${root("arch")}/var/lib/pacman --config ${folder}/pacman.conf --cachedir ${folder}/pacman`,
    ],
  ] as const)
    test(`with ${command.split(" ")[0]} as on ${name}, in spite of a repository that no longer exists, and again in a second run`, async () => {
      const [manager = ""] = command.split(" ");
      const facts = { os: fixture(`os-release/${name}`), managers: `/usr/bin/${manager}\n` };
      const real = (await $`command -v ${manager}`).stdout.trim();
      const PATH = programs(join(folder, name), { [manager]: `exec ${command.replace(manager, real)} "$@"` });
      const script = packages(osOf(facts), undefined, wanted(), facts).sh;
      for (let time = 1; time <= 2; time++) {
        const { status, stdout, stderr } = shell(
          `main() {\nset -eu\n${script}\n}\nmain </dev/null 2>&1`,
          ["sh", "-s"],
          { PATH },
        );
        assert.equal(status, 0, stdout + stderr);
        assert.match((await $`${root(name)}/usr/bin/wg`).stdout, /wireguard-tools/);
      }
    });
});

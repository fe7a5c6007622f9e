import assert from "node:assert/strict";
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { describe, test } from "node:test";
import { SettingError } from "../lib/settings.ts";
import { Refusal } from "../lib/step.ts";
import { upgradeKernel } from "../scripts/upgrade-kernel.ts";
import {
  type Facts,
  fixture,
  look,
  MODERN,
  NOW,
  OLD,
  prepared,
  programs,
  shell,
  temporary,
  wanted,
} from "./helpers.ts";

const OWN = "3.10.0-1160.el7.x86_64";
const ML = "5.7.7-1.el7.elrepo.x86_64";
const ENTRY = `CentOS Linux (${ML}) 7 (Core)`;
/** CentOS 7 with its own kernel, before any of the article's steps. */
const el7 = (over: Facts = {}): Facts =>
  prepared(OLD, {
    os: fixture("os-release/centos-7"),
    kernel: `${OWN}\n`,
    module: "",
    userspace: "",
    "kernel-ml": "",
    tools: "",
    entry: "",
    saved: `CentOS Linux (${OWN}) 7 (Core)\n`,
    chosen: `${NOW - 7200}\n`,
    room: "700\n",
    ...over,
  });
const installed = (over: Facts = {}) =>
  el7({
    "kernel-ml": `${ML}\n`,
    tools: "yes\n",
    entry: `${ENTRY}\n`,
    saved: `${ENTRY}\n`,
    chosen: `${NOW - 60}\n`,
    ...over,
  });
const plan = (facts: Facts, over = {}) => upgradeKernel.plan(wanted(over), facts);
const whys = (facts: Facts, over = {}) => plan(facts, over).map(({ why }) => why);

describe("the kernel is not changed", () => {
  const cases: [name: string, facts: Facts][] = [
    ["if it has WireGuard", prepared(OLD)],
    ["on CentOS 7 if a WireGuard module for it is installed", el7({ module: "yes\n" })],
    ["on CentOS 7 once kernel-ml runs", installed({ kernel: `${ML}\n`, module: "yes\n" })],
    ...["debian-11", "ubuntu-20.04", "rocky-8", "fedora-41", "arch", "alpine-3.20", "opensuse-leap-15.6"].map(
      (name): [string, Facts] => [
        `on ${name} without WireGuard, which a package provides there`,
        prepared(OLD, { os: fixture(`os-release/${name}`), module: "" }),
      ],
    ),
  ];
  for (const [name, facts] of cases) test(name, () => assert.deepEqual(plan(facts), []));
});

test("wireguard-go is sufficient on CentOS 7 only for old k3s, because modern k3s needs the kernel's WireGuard", () => {
  const facts = el7({ userspace: "/usr/bin/wireguard-go\n" });
  assert.deepEqual(plan(facts, { K3S_VERSION: OLD }), []);
  assert.match(whys(facts, { K3S_VERSION: MODERN }).join(), /install kernel-ml from ELRepo/);
  // A K3S_BIN has its own version.
  const bin = { K3S_BIN: "./k3s", K3S_VERSION: OLD };
  assert.match(whys({ ...facts, version: `${MODERN}\n` }, bin).join(), /install kernel-ml from ELRepo/);
});

test("a vendor's own kernel is not replaced, even on a distribution that is derived from CentOS 7", () => {
  for (const [name, kernel] of [
    ["alinux-2", "4.19.91-27.7.al7.x86_64"],
    ["tencentos-2.4", "5.4.119-19-0009.11"],
    ["amazon-2", "4.14.355-275.amzn2.x86_64"],
  ] as const)
    assert.deepEqual(
      plan(el7({ os: fixture(`os-release/${name}`), kernel, managers: "/usr/bin/yum\n" })),
      [],
    );
});

describe("CentOS 7", () => {
  test("gets the article's steps in their order, and is examined again before the reboot", () => {
    assert.deepEqual(
      whys(el7()).map((why) => why.split(/[,:]/)[0]),
      [
        "import ELRepo's key",
        "install ELRepo's release package",
        "install kernel-ml from ELRepo",
        "replace the old kernel's tools by kernel-ml's",
        "make kernel-ml the default boot entry",
      ],
    );
    assert.equal(plan(el7()).at(-1)?.lookAgain, true);
  });

  test("completes an installation that was interrupted between kernel-ml and its tools", () => {
    assert.match(whys(el7({ "kernel-ml": ML })).join(), /kernel-ml's/);
  });

  test("with kernel-ml installed and chosen is only rebooted", () => {
    const changes = plan(installed());
    assert.deepEqual(
      changes.map((c) => [c.why, c.reboot]),
      [[`restart into kernel ${ML}: ${OWN} has no WireGuard`, true]],
    );
    assert.ok((changes[0]?.seconds ?? 0) >= 300, "with time for a slow machine");
  });

  test("needs PUBLIC_IP only if its node must be drained or uncordoned", () => {
    const none = { PUBLIC_IP: "" };
    assert.deepEqual(whys(installed(), none), whys(installed()));
    for (const over of [{}, { kernel: `${ML}\n`, module: "yes\n" }] as Facts[])
      assert.throws(
        () => plan(installed({ ...over, roles: "k3s-agent\n" }), none),
        (e: Error) => e instanceof SettingError && /^PUBLIC_IP is not set, and this box is/.test(e.message),
      );
  });

  const others: [name: string, over: Facts][] = [
    ["another entry", { saved: `CentOS Linux (${OWN}) 7 (Core)\n` }],
    ["no entry", { saved: "" }],
    ["an entry by number", { saved: "0\n" }],
    ["an entry of an older kernel-ml", { saved: "CentOS Linux (5.6.1-1.el7.elrepo.x86_64) 7 (Core)\n" }],
  ];
  for (const [name, over] of others)
    test(`with ${name} chosen gets its boot entry set and verified before the reboot`, () => {
      const changes = plan(installed(over));
      assert.deepEqual(
        changes.map((c) => Boolean(c.reboot)),
        [false, true],
      );
      assert.match(changes[0]?.sh ?? "", /grub2-set-default "\$entry"\nsaved=/);
    });

  test("that runs kernel-ml without WireGuard is refused, and not rebooted again", () => {
    assert.throws(
      () => plan(installed({ kernel: `${ML}\n` })),
      (e: Error) => e instanceof Refusal && e.message.includes(ML),
    );
  });

  test("gets its packages from ELREPO_URL, and the kernel from ELREPO_KERNEL_URL", () => {
    const mirror = {
      ELREPO_URL: "https://m.example/elrepo",
      ELREPO_KERNEL_URL: "https://m.example/archive/kernel/el7/x86_64",
    };
    const text = plan(el7(), mirror)
      .map((c) => c.sh)
      .join("\n");
    assert.match(text, /rpm --import https:\/\/m\.example\/elrepo\/RPM-GPG-KEY-elrepo\.org/);
    assert.match(text, /baseurl=https:\/\/m\.example\/archive\/kernel\/el7\/x86_64/);
    assert.match(text, /gpgcheck=1\ngpgkey=https:\/\/m\.example\/elrepo\/RPM-GPG-KEY-elrepo\.org/);
    assert.doesNotMatch(text, /www\.elrepo\.org|elrepo-release/, "whose lists are gone");
  });

  test("without ELREPO_KERNEL_URL gets ELRepo's release package from ELREPO_URL", () => {
    const text = plan(el7(), { ELREPO_URL: "https://m.example/elrepo" })
      .map((c) => c.sh)
      .join("\n");
    assert.match(text, /https:\/\/m\.example\/elrepo\/elrepo-release-7\.el7\.elrepo\.noarch\.rpm/);
    assert.doesNotMatch(text, /baseurl|www\.elrepo\.org/);
  });
});

describe("CentOS 7 is refused, with advice on what to do,", () => {
  const cases: [name: string, facts: Facts, text: RegExp][] = [
    [
      "if /boot has too little space",
      el7({ room: "34\n" }),
      /\/boot has 34 MiB free.*up to 80.*package-cleanup/,
    ],
    [
      "if an older kernel was booted although kernel-ml is the default",
      installed({ chosen: `${NOW - 7200}\n` }),
      /has booted kernel 3\.10.* since: choose the entry at its console.*not restarted again/,
    ],
  ];
  for (const [name, facts, text] of cases)
    test(name, () =>
      assert.throws(
        () => plan(facts),
        (e: Error) => e instanceof Refusal && text.test(e.message),
      ),
    );

  test("but not because of /boot if nothing has to be installed", () => {
    assert.equal(plan(installed({ room: "3\n" })).length, 1);
  });
});

describe("a repository that no longer exists", () => {
  const install = (want: object) => {
    const sh = plan(el7(), want).find(({ why }) => why.startsWith("install kernel-ml"))?.sh ?? "";
    const fakes = { yum: "echo 'Cannot find a valid baseurl'; exit 1", rpm: "exit 1" };
    return shell(`set -eu\n${sh}`, ["sh", "-s"], { PATH: programs(temporary(), fakes) });
  };

  test("at ELRepo leads to an error with the setting for an archive", () => {
    const { status, stdout } = install({});
    assert.equal(status, 1);
    assert.match(stdout, /no kernel for el7 any more: set ELREPO_KERNEL_URL to an archive's repository/);
  });

  test("in ELREPO_KERNEL_URL leads to an error with its URL", () => {
    const { status, stdout } = install({ ELREPO_KERNEL_URL: "https://m.example/el7" });
    assert.equal(status, 1);
    assert.match(stdout, /ELREPO_KERNEL_URL is https:\/\/m\.example\/el7: expected/);
  });
});

describe("a kernel-ml that is already installed", () => {
  test("is reinstalled if its installation may have been interrupted", () => {
    const sh =
      plan(el7({ "kernel-ml": ML })).find(({ why }) => why.startsWith("install kernel-ml"))?.sh ?? "";
    const { stdout } = shell(`set -eu\n${sh}`, ["sh", "-s"], {
      PATH: programs(temporary(), { yum: 'echo "$*"', rpm: ":", sync: ":" }),
    });
    assert.match(stdout, / repolist\n.* reinstall kernel-ml\n.* install kernel-ml\n/);
  });
});

/** The files of a boot loader under a temporary root, and what the step does there. */
describe("the default boot entry", () => {
  const OTHER = "CentOS Linux (3.10.0-1160.el7.x86_64) 7 (Core)";
  const entry = (title: string, kernel: string, indent = "") =>
    `${indent}menuentry '${title}' --class centos {\n${indent}\tlinux16 /vmlinuz-${kernel} root=/dev/vda2 ro\n${indent}}\n`;
  const HEAD =
    'if [ "${next_entry}" ] ; then\n  set default="${next_entry}"\nelse\n  set default="${saved_entry}"\nfi\n';
  const BLS = "96820b9851c24560b5f942f2496b9aeb";
  const bls = (kernel: string) => ({
    [`boot/loader/entries/${BLS}-${kernel}.conf`]: `title CentOS Linux (${kernel})\nlinux /vmlinuz-${kernel}\n`,
  });
  const both = entry(ENTRY, ML) + entry(OTHER, OWN) + entry("CentOS Linux (0-rescue-0123)", "0-rescue-0123");

  const LAYOUTS: [name: string, files: Record<string, string>, entry: string][] = [
    ["BIOS", { "boot/grub2/grub.cfg": HEAD + both }, ENTRY],
    [
      "BIOS and the newest entry last",
      { "boot/grub2/grub.cfg": HEAD + entry(OTHER, OWN) + entry(ENTRY, ML) },
      ENTRY,
    ],
    [
      "BIOS and a submenu",
      {
        "boot/grub2/grub.cfg": `${HEAD}${entry(OTHER, OWN)}submenu 'Advanced options' {\n${entry(OTHER, OWN, "\t")}${entry(ENTRY, ML, "\t")}}\n`,
      },
      `Advanced options>${ENTRY}`,
    ],
    [
      "UEFI",
      {
        "sys/firmware/efi/x": "",
        "boot/efi/EFI/centos/grub.cfg": HEAD + both.replaceAll("linux16", "linuxefi"),
      },
      ENTRY,
    ],
    [
      "BLS",
      {
        "boot/grub2/grub.cfg": `${HEAD}insmod blscfg\nblscfg\n`,
        ...bls(OWN),
        ...bls(ML),
        ...bls("0-rescue-0123"),
      },
      `${BLS}-${ML}`,
    ],
    [
      "BLS and UEFI",
      {
        "sys/firmware/efi/x": "",
        "boot/efi/EFI/centos/grub.cfg": `${HEAD}blscfg\n`,
        ...bls(ML),
        ...bls(OWN),
      },
      `${BLS}-${ML}`,
    ],
  ];

  /** What runs in this root, with an environment block that is one file, written unless it is read-only. */
  function box(files: Record<string, string>, setDefault = 'echo "saved_entry=$1" >ROOT/env') {
    const root = temporary();
    for (const [path, text] of Object.entries(files)) {
      mkdirSync(dirname(join(root, path)), { recursive: true });
      writeFileSync(join(root, path), text);
    }
    writeFileSync(join(root, "env"), `saved_entry=${OTHER}\n`);
    const there = (text: string) =>
      text.replaceAll("ROOT", root).replace(/(?<![\w/])\/(boot|sys)\//g, `${root}/$1/`);
    const PATH = programs(join(root, "bin"), {
      rpm: there(
        `[ "$1" = -q ] || printf '%s\\n' /boot/System.map-${ML} /boot/vmlinuz-${ML} /boot/vmlinuz-5.4.1-1.el7.elrepo.x86_64 /lib/modules/${ML}/vmlinuz-x`,
      ),
      "grub2-set-default": there(setDefault),
      "grub2-editenv": there("cat ROOT/env"),
      sync: ":",
    });
    const env = { PATH };
    return {
      look: () => look([{ look: (want) => upgradeKernel.look(want).map(there) }], wanted(), env),
      set: () =>
        shell(
          `set -eu\nsay() { echo "$@"; }\n${there(plan(installed({ saved: "" }))[0]?.sh ?? "")}`,
          ["sh", "-s"],
          env,
        ),
    };
  }

  for (const [name, files, title] of LAYOUTS)
    test(`with ${name} is found, set and verified`, () => {
      const { look, set } = box(files);
      const before = look();
      assert.deepEqual(
        [before["kernel-ml"]?.trim(), before.entry?.trim(), before.saved?.trim()],
        [ML, title, OTHER],
      );
      const { status, stdout } = set();
      assert.equal(status, 0, stdout);
      assert.equal(stdout, `default: ${title}\n`);
      assert.equal(look().saved?.trim(), title);
    });

  const FAULTS: [
    name: string,
    files: Record<string, string>,
    setDefault: string | undefined,
    text: RegExp,
  ][] = [
    [
      "was not changed although grub2-set-default returned 0",
      LAYOUTS[0]?.[1] ?? {},
      "echo 'invalid environment block' >&2",
      /still "CentOS Linux \(3\.10.*", not ".*5\.7\.7.*grub2-editenv create/,
    ],
    [
      "is missing in the menu",
      { "boot/grub2/grub.cfg": HEAD + entry(OTHER, OWN) },
      undefined,
      /no entry for kernel 5\.7\.7.*grub2-mkconfig -o/,
    ],
    [
      "is not used by the menu",
      { "boot/grub2/grub.cfg": `set default="0"\n${both}` },
      undefined,
      /GRUB_DEFAULT=saved/,
    ],
  ];
  for (const [name, files, setDefault, text] of FAULTS)
    test(`that ${name} leads to an error with advice on what to do`, () => {
      const { status, stdout } = box(files, setDefault).set();
      assert.equal(status, 1);
      assert.match(stdout, text);
    });
});

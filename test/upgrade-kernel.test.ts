import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { type Facts, Refusal } from "../lib/step.ts";
import { upgradeKernel } from "../scripts/upgrade-kernel.ts";
import { fixture, OLD, prepared, wanted } from "./helpers.ts";

const OWN = "3.10.0-1160.el7.x86_64";
const ML = "5.7.7-1.el7.elrepo.x86_64";
const ENTRY = `CentOS Linux (${ML}) 7 (Core)`;
const ENTRIES = `${ENTRY}\nCentOS Linux (${OWN}) 7 (Core)\nCentOS Linux (0-rescue-0123) 7 (Core)\n`;
/** CentOS 7 with its own kernel, and nothing of the article's done. */
const el7 = (over: Facts = {}): Facts =>
  prepared(OLD, {
    os: fixture("os-release/centos-7"),
    kernel: `${OWN}\n`,
    module: "",
    userspace: "",
    "kernel-ml": "",
    tools: "",
    entries: ENTRIES.split("\n").slice(1).join("\n"),
    saved: `CentOS Linux (${OWN}) 7 (Core)\n`,
    ...over,
  });
const installed = (over: Facts = {}) =>
  el7({ "kernel-ml": `${ML}\n`, tools: "yes\n", entries: ENTRIES, saved: `${ENTRY}\n`, ...over });
const plan = (facts: Facts, over = {}) => upgradeKernel.plan(wanted(over), facts);
const whys = (facts: Facts, over = {}) => plan(facts, over).map(({ why }) => why);

describe("the kernel is left alone", () => {
  const cases: [name: string, facts: Facts][] = [
    ["where it has WireGuard", prepared(OLD)],
    ["of CentOS 7 where a module for it is installed", el7({ module: "yes\n" })],
    ["where wireguard-go does its work", el7({ userspace: "/usr/bin/wireguard-go\n" })],
    ["of CentOS 7 once kernel-ml runs", installed({ kernel: `${ML}\n`, module: "yes\n" })],
    ...["debian-11", "ubuntu-20.04", "rocky-8", "fedora-41", "arch", "alpine-3.20", "opensuse-leap-15.6"].map(
      (name): [string, Facts] => [
        `of ${name} without WireGuard: there it is a package's matter`,
        prepared(OLD, { os: fixture(`os-release/${name}`), module: "" }),
      ],
    ),
  ];
  for (const [name, facts] of cases) test(name, () => assert.deepEqual(plan(facts), []));
});

describe("CentOS 7", () => {
  test("gets the article's steps in their order, and is looked at again before the restart", () => {
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

  test("takes up an installation that was cut after kernel-ml and before its tools", () => {
    assert.match(whys(el7({ "kernel-ml": ML })).join(), /kernel-ml's/);
  });

  test("with kernel-ml installed and chosen is only restarted", () => {
    const changes = plan(installed());
    assert.deepEqual(
      changes.map((c) => [c.why, c.reboot]),
      [[`restart into kernel ${ML}: ${OWN} has no WireGuard`, true]],
    );
    assert.ok((changes[0]?.seconds ?? 0) >= 300, "with time for a slow machine");
  });

  const others: [name: string, over: Facts][] = [
    ["another entry", { saved: `CentOS Linux (${OWN}) 7 (Core)\n` }],
    ["no entry", { saved: "" }],
    ["an entry by number", { saved: "0\n" }],
    ["an entry of an older kernel-ml", { saved: "CentOS Linux (5.6.1-1.el7.elrepo.x86_64) 7 (Core)\n" }],
  ];
  for (const [name, over] of others)
    test(`with ${name} chosen gets its boot entry set and read back before the restart`, () => {
      const changes = plan(installed(over));
      assert.deepEqual(
        changes.map((c) => Boolean(c.reboot)),
        [false, true],
      );
      assert.match(changes[0]?.sh ?? "", /grub2-set-default "\$entry"\nsaved=/);
      assert.match(changes[0]?.sh ?? "", /the default boot entry is/);
    });

  test("that runs kernel-ml without WireGuard is not restarted for ever", () => {
    assert.throws(
      () => plan(installed({ kernel: `${ML}\n` })),
      (e: Error) => e instanceof Refusal && e.message.includes(ML),
    );
  });

  test("takes its packages from ELREPO_URL, and the kernel's repository from ELREPO_KERNEL_URL", () => {
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

  test("without a repository of one's own gets ELRepo's release package, from ELREPO_URL", () => {
    const text = plan(el7(), { ELREPO_URL: "https://m.example/elrepo" })
      .map((c) => c.sh)
      .join("\n");
    assert.match(text, /https:\/\/m\.example\/elrepo\/elrepo-release-7\.el7\.elrepo\.noarch\.rpm/);
    assert.doesNotMatch(text, /baseurl|www\.elrepo\.org/);
  });
});

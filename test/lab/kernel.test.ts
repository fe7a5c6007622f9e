/** CentOS 7 for real: its kernel is swapped over ssh, it restarts, and joins over kernel WireGuard. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { bench, script } from "./suite.ts";
import { addMachine, type Machine, REPOSITORIES } from "./vm.ts";

const t = await bench({ name: "kernel", boxes: ["a1"] });
after(() => t.lab.down());
const a1 = t.box("a1");
const upgrade = script("upgrade-kernel", "--host b3");
let b3: Machine;

before(async () => {
  t.settings(REPOSITORIES, { agents: "b3" });
  [b3] = await Promise.all([addMachine(t.lab, "b3"), t.ok("make server")]);
});

const kernel = async () => (await b3.sh("uname -r")).trim();
const boot = async () => (await b3.sh("cat /proc/sys/kernel/random/boot_id")).trim();
const saved = async () => (await b3.sh("grub2-editenv list")).match(/^saved_entry=(.*)$/m)?.[1] ?? "";

describe("a kernel is not installed", () => {
  /** What a refusal must leave alone. */
  const state = () => b3.sh("rpm -qa | sort; ls -l /boot /etc/yum.repos.d; cat /boot/grub2/grubenv");

  test("where /boot has no room for it", async () => {
    await b3.sh("fallocate -l 120M /boot/full");
    const was = await state();
    await t.says(upgrade, 1, [/\/boot has \d\d MiB free.*package-cleanup/]);
    assert.equal(await state(), was);
    await b3.sh("rm /boot/full");
  });

  test("from lists that no longer carry el7, and the setting that helps is named", async () => {
    const said = await t.says(upgrade, 1, [/set ELREPO_KERNEL_URL to an archive's repository/], {
      env: { ELREPO_KERNEL_URL: "" },
    });
    assert.match(said.text, /again: make upgrade-kernel HOST=b3/);
  });
});

test("the kernel is swapped in the article's nine steps, and the box comes back with it", async () => {
  const [oldBoot, oldDefault] = [await boot(), await saved()];
  assert.equal(await kernel(), b3.image.old);
  assert.match(oldDefault, /cloud/);
  const said = await t.says(upgrade, 0, [
    "import ELRepo's key",
    "add the repository",
    "install kernel-ml from ELRepo",
    "replace the old kernel's tools by kernel-ml's",
    "make kernel-ml the default boot entry, and read it back",
    `restart into kernel ${b3.image.next}: ${b3.image.old} has no WireGuard`,
    `WireGuard is in kernel ${b3.image.next}`,
  ]);
  const entry = /default: (.*)$/m.exec(said.text)?.[1];
  assert.deepEqual([await kernel(), await saved()], [b3.image.next, entry]);
  assert.notEqual(entry, oldDefault);
  assert.notEqual(await boot(), oldBoot);
  const packages = await b3.sh("rpm -qa --qf '%{NAME}\\n' | sort");
  for (const name of ["kernel-ml", "kernel-ml-devel", "kernel-ml-headers", "kernel-ml-tools"])
    assert.match(packages, new RegExp(`^${name}$`, "m"));
  assert.doesNotMatch(packages, /^kernel-tools/m);
});

test("it joins the server in the other cloud over kernel WireGuard, and ipvs is loaded", async () => {
  await t.ok("make agent HOST=b3 PROXY_MODE=ipvs");
  assert.match(await b3.sh("ip -o -d link show type wireguard"), /flannel-wg: .* wireguard /);
  assert.equal(await b3.sh("pgrep wireguard-go || true"), "");
  await handshakes();
  assert.match(await b3.sh("lsmod"), /^ip_vs +\d+ +[1-9]/m);
});

/** b3 and a1 have each other as the one peer, at the public address, with a fresh handshake. */
async function handshakes() {
  for (const [box, other] of [
    [b3, a1],
    [a1, b3],
  ] as const) {
    const [now, , line = ""] = (await box.sh("date +%s; wg show flannel-wg dump")).trim().split("\n");
    const [, , endpoint, , handshake] = line.split("\t");
    assert.equal(endpoint, `${other.publicIp}:51820`);
    assert(Number(now) - Number(handshake) < 180, `${box.name}: ${now} ${line}`);
  }
}

test("a second time there is nothing to do", async () => {
  const was = await boot();
  await t.says("make upgrade-kernel HOST=b3", 0, ["nothing to do: WireGuard is in kernel"]);
  await t.says("make agent HOST=b3 PROXY_MODE=ipvs", 0, ["nothing to do"]);
  assert.equal(await boot(), was);
});

test("a box that booted its old kernel although the new one is its default is not restarted for ever", async () => {
  await b3.sh(`grub2-reboot "$(grep '^menuentry' /boot/grub2/grub.cfg | cut -d"'" -f2 | grep cloud)"; sync`);
  const was = await boot();
  await b3.sh("systemctl reboot").catch(() => {});
  for (const end = Date.now() + 180_000; (await boot().catch(() => was)) === was; )
    assert(Date.now() < end, "it did not restart");
  assert.equal(await kernel(), b3.image.old);
  const now = await boot();
  await t.says(upgrade, 1, [/is the default boot entry, and yet this box has booted kernel .*cloud.* since/]);
  assert.equal(await boot(), now);
});

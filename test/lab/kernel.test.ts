/** CentOS 7 for real: its kernel is swapped over ssh, it restarts, joins over kernel WireGuard, and leaves its cluster for the next swap. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { DRAINED } from "../../lib/k3s.ts";
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

interface Seen {
  spec: { unschedulable?: boolean };
  metadata: { annotations: Record<string, string> };
  status: { conditions: { type: string; status: string }[]; nodeInfo: { kernelVersion: string } };
}
const node = async (): Promise<Seen> => JSON.parse(await a1.sh("kubectl get node b3 -o json"));
/** Cordoned or not, and the mark. */
const place = async () => {
  const { spec, metadata } = await node();
  return [Boolean(spec.unschedulable), metadata.annotations[DRAINED]];
};

describe("a node of a living cluster whose old kernel was booted again", () => {
  /** WireGuard is k3s's alone here, where the step does not find it: so the node is Ready without the kernel's. */
  before(async () => {
    await t.ok("ssh a1 cat /usr/bin/wireguard-go | ssh b3 'mkdir /opt/wg && cat >/opt/wg/wireguard-go'");
    await b3.sh(`chmod 755 /opt/wg/wireguard-go
mkdir -p /etc/systemd/system/k3s-agent.service.d
printf '[Service]\\nEnvironment=PATH=/opt/wg:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\\n' >/etc/systemd/system/k3s-agent.service.d/lab.conf
grub2-reboot "$(grep '^menuentry' /boot/grub2/grub.cfg | cut -d"'" -f2 | grep cloud)"`);
    const was = await boot();
    await b3.sh("sync; systemctl reboot").catch(() => {});
    while ((await boot().catch(() => was)) === was);
    assert.equal(await kernel(), b3.image.old);
  });

  test("is not restarted for ever: its default entry was not what was booted", async () => {
    const was = await boot();
    await t.says(upgrade, 1, [
      /is the default boot entry, and yet this box has booted kernel .*cloud.* since/,
    ]);
    assert.equal(await boot(), was);
  });

  test("is drained, restarted into the kernel, and uncordoned", async () => {
    await b3.sh(`grub2-set-default "$(grep '^menuentry' /boot/grub2/grub.cfg | cut -d"'" -f2 | grep cloud)"`);
    const ready = ({ status }: Seen) =>
      status.nodeInfo.kernelVersion === b3.image.old &&
      status.conditions.some((c) => c.type === "Ready" && c.status === "True");
    const up = () => b3.sh("wg show flannel-wg >/dev/null 2>&1 && pgrep -x wireguard-go || true");
    for (const end = Date.now() + 120_000; !(ready(await node()) && (await up())); )
      assert(Date.now() < end, await b3.sh("journalctl -u k3s-agent -o cat --no-pager -n 30"));
    const said = await t.says(upgrade, 0, [
      "make kernel-ml the default boot entry",
      "drain node b3",
      "restart into kernel",
      "uncordon node b3 once it is Ready",
    ]);
    const order = ["drain node", "restart into", "uncordon node"].map((what) => said.text.indexOf(what));
    assert.deepEqual(
      order,
      [...order].sort((a, b) => a - b),
    );
    assert.equal(await kernel(), b3.image.next);
    assert.deepEqual(await place(), [false, undefined]);
    assert.equal((await node()).status.nodeInfo.kernelVersion, b3.image.next);
  });

  test("is uncordoned by the next run when the first was cut after its restart", async () => {
    await a1.sh(
      `kubectl annotate node b3 ${DRAINED}=88e9fd3e-8477-40e7-aaf5-7b4c1351751a; kubectl cordon b3`,
    );
    await t.says(upgrade, 0, ["uncordon node b3 once it is Ready"]);
    assert.deepEqual(await place(), [false, undefined]);
  });

  test("stays cordoned when that was the user's wish", async () => {
    await a1.sh("kubectl cordon b3");
    await t.says(upgrade, 0, ["nothing to do"]);
    assert.deepEqual(await place(), [true, undefined]);
    await a1.sh("kubectl uncordon b3");
  });
});

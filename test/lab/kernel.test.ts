/** A simulated CentOS 7 in QEMU: its kernel is upgraded over ssh, it reboots, and joins with kernel WireGuard; other nodes are drained for theirs in turn. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { nodesOf } from "../../lib/k3s/nodes.ts";
import { fixture } from "../helpers.ts";
import type { Box } from "./lab.ts";
import { bench, connected, script } from "./suite.ts";
import { addMachine, type Machine, REPOSITORIES } from "./vm.ts";
import { menuEntry } from "./vm-image.ts";

const t = await bench({ name: "kernel", boxes: ["a1", "b1", "b2"] });
after(() => t.lab.down());
const [a1, b1, b2] = [t.box("a1"), t.box("b1"), t.box("b2")];
const upgrade = script("upgrade-kernel", "--host b3");
let b3: Machine;

before(async () => {
  t.settings(REPOSITORIES, { agents: "b1 b2 b3" });
  const cluster = async () => [await t.ok("make server"), await t.ok('make agent HOST="b1 b2"')];
  [b3] = await Promise.all([addMachine(t.lab, "b3"), cluster()]);
});

const kernel = async () => (await b3.sh("uname -r")).trim();
const boot = async (box: Box = b3) => (await box.sh("cat /proc/sys/kernel/random/boot_id")).trim();
/** Waits until it has rebooted, and returns its new boot ID. */
async function restarted(box: Box, was: string) {
  for (const end = Date.now() + 600_000; ; await sleep(200)) {
    const now = await boot(box).catch(() => was);
    if (now !== was) return now;
    assert(Date.now() < end, `${box.name} did not restart`);
  }
}
const saved = async () => (await b3.sh("grub2-editenv list")).match(/^saved_entry=(.*)$/m)?.[1] ?? "";

describe("a kernel is not installed", () => {
  /** What a refusal must not change. */
  const state = () => b3.sh("rpm -qa | sort; ls -l /boot /etc/yum.repos.d; cat /boot/grub2/grubenv");

  test("if /boot has no space for it", async () => {
    await b3.sh("fallocate -l 120M /boot/full");
    const was = await state();
    await t.says(upgrade, 1, [/\/boot has \d\d MiB free.*package-cleanup/]);
    assert.equal(await state(), was);
    await b3.sh("rm /boot/full");
  });

  test("if the repository no longer has el7, and the error names the setting for an archive", async () => {
    const said = await t.says(upgrade, 1, [/set ELREPO_KERNEL_URL to an archive's repository/], {
      env: { ELREPO_KERNEL_URL: "" },
    });
    assert.match(said.text, /again: make upgrade-kernel HOST=b3/);
  });
});

test("upgrade-kernel performs the article's nine steps, and the box runs the new kernel after its reboot", async () => {
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

test("a box with cgroup v1 joins a server in the other cloud with kernel WireGuard, and ipvs is loaded", async () => {
  // Like CentOS 7: all controllers of the kernel are in v1, and v2 is not mounted.
  assert.equal(await b3.sh("stat -fc %T /sys/fs/cgroup; grep -c cgroup2 /proc/mounts || :"), "tmpfs\n0\n");
  await t.ok("make agent HOST=b3 PROXY_MODE=ipvs");
  const running = "tr '\\0' ' ' </proc/$(systemctl show k3s-agent -p MainPID --value)/cmdline; k3s --version";
  assert.match(
    await b3.sh(running),
    /v1\.36\.2\+k3s1.*--kubelet-arg=fail-cgroupv1=false.*k3s version v1\.36\.2/,
  );
  assert.match(await b3.sh("ip -o -d link show type wireguard"), /flannel-wg: .* wireguard /);
  assert.equal(await b3.sh("pgrep wireguard-go || true"), "");
  await connected([a1, b1, b2, b3]);
  assert.match(await b3.sh("lsmod"), /^ip_vs +\d+ +[1-9]/m);
});

test("a second run has nothing to do", async () => {
  const was = await boot();
  await t.says("make upgrade-kernel HOST=b3", 0, ["nothing to do: WireGuard is in kernel"]);
  await t.says("make agent HOST=b3 PROXY_MODE=ipvs", 0, ["nothing to do"]);
  assert.equal(await boot(), was);
});

/** The cluster's nodes by name, as its server has them. */
const nodes = async () => byName(await a1.sh("kubectl get nodes -o json"));
const byName = (json: string) => Object.fromEntries(nodesOf(json).map((node) => [node.name, node]));
/** It accepts pods, and has no mark. */
async function givenBack(name: string) {
  const node = (await nodes())[name];
  assert.deepEqual([node?.ready, node?.cordoned, node?.drained], [true, false, undefined]);
}

describe("a node of a running cluster", () => {
  const NEXT = "5.19.17-1.el7.elrepo.x86_64";
  /**
   * The box as CentOS 7 with kernel-ml installed, and its old kernel running. Simulated: the output of rpm and GRUB, and
   * the difference of the two kernels, which is that wireguard-go, a box's WireGuard, is not in PATH until the box
   * boots with the new one as its default. The node, its drain, the reboot and its return are real.
   */
  const oldKernel = (box: Box) =>
    box.sh(`mkdir -p /boot/grub2 /etc/systemd/system/ssh.service.d
rm -f /etc/os-release
cat >/etc/os-release <<'TEXT'
${fixture("os-release/centos-7")}TEXT
cat >/boot/grub2/grub.cfg <<'TEXT'
set default="\${saved_entry}"
${menuEntry(NEXT, NEXT)}TEXT
echo 'saved_entry=old' >/boot/grub2/grubenv
cd /usr/local/sbin
echo '[ "$*" != "-ql kernel-ml" ] || echo /boot/vmlinuz-${NEXT}' >rpm
echo 'cat /boot/grub2/grubenv' >grub2-editenv
echo 'echo "saved_entry=$1" >/boot/grub2/grubenv' >grub2-set-default
echo 'grep -q ${NEXT} /boot/grub2/grubenv && mv /opt/wireguard-go /usr/bin/' >lab-kernel
for name in rpm grub2-editenv grub2-set-default lab-kernel; do sed -i '1i #!/bin/sh' $name; chmod 755 $name; done
cat >/etc/systemd/system/lab-kernel.service <<'TEXT'
[Unit]
Before=k3s-agent.service
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/lab-kernel
[Install]
WantedBy=multi-user.target
TEXT
systemctl -q enable lab-kernel
# The uptime is this machine's, so the box does not seem to have just booted: its k3s is started first.
printf '[Unit]\nAfter=k3s-agent.service\n' >/etc/systemd/system/ssh.service.d/lab.conf
[ ! -e /usr/bin/wireguard-go ] || mv /usr/bin/wireguard-go /opt/
# A machine whose kernel has WireGuard would show it here.
[ ! -d /sys/module ] || mount -t tmpfs lab /sys/module`);
  const swap = (name: string) => script("upgrade-kernel", `--host ${name}`);

  /** What the server has of the nodes while \`part\` runs, again and again. */
  async function watched(part: () => Promise<unknown>) {
    const seen = a1.sh(`rm -f /run/enough
until [ -e /run/enough ]; do kubectl get nodes -o json | tr -d '\\n'; echo; sleep 0.2; done`);
    await part().finally(() => a1.sh("touch /run/enough"));
    return (await seen).trim().split("\n").map(byName);
  }

  test("is drained, rebooted into the kernel and uncordoned, one node at a time", async () => {
    await Promise.all([b1, b2].map(oldKernel));
    const was = await nodes();
    const seen = await watched(() => t.ok('make kernel HOST="b1 b2"'));
    for (const now of seen)
      assert(
        [now.b1, now.b2].filter((node) => !node?.ready || node.cordoned).length < 2,
        JSON.stringify(now),
      );
    for (const name of ["b1", "b2"]) {
      const story = seen.map(({ [name]: node }) => [node?.boot === was[name]?.boot, node?.cordoned].join());
      assert.deepEqual(
        story.filter((state, i) => state !== story[i - 1]),
        ["true,false", "true,true", "false,true", "false,false"],
        name,
      );
      await givenBack(name);
    }
    await t.says('make kernel HOST="b1 b2"', 0, ["nothing to do: WireGuard is in kernel"]);
  });

  test("is not rebooted while a pod cannot be evicted, which is named, and the node is uncordoned", async () => {
    await oldKernel(b1);
    const was = await boot(b1);
    // There are no pods here: kubectl's output for a disruption budget that allows no eviction is simulated.
    await a1.sh(`cd /usr/local/bin; mv k3s k3s-stand-in; cat >k3s <<'TEXT'
#!/bin/sh
case "$*" in *' drain b1 '*)
  /usr/local/bin/k3s-stand-in kubectl cordon b1
  echo 'error when evicting pods/"web-0" -n "shop" (will retry after 5s): Cannot evict pod as it would violate the pod'"'"'s disruption budget.'
  echo 'error: unable to drain node "b1" due to error: error when evicting pods/"web-0" -n "shop": global timeout reached: 5m0s, continuing command...'
  exit 1
esac
exec /usr/local/bin/k3s-stand-in "$@"
TEXT
chmod 755 k3s`);
    const said = await t
      .says(swap("b1"), 1, [
        /FAILED after .*: drain node b1, for 300 s at most/,
        /"web-0" -n "shop".* violate the pod's disruption budget/,
        "Move by hand what stays (kubectl drain), and run this again",
      ])
      .finally(() => a1.sh("cd /usr/local/bin; mv k3s-stand-in k3s"));
    assert.doesNotMatch(said.text, /restart into/);
    assert.equal(await boot(b1), was);
    await givenBack("b1");
  });

  test("is uncordoned by the next run if the first was interrupted after the reboot", async () => {
    await oldKernel(b1);
    const was = await boot(b1);
    const run = await t.cut(swap("b1"), /restart into/, "KILL");
    assert(run.reached, run.text);
    await restarted(b1, was);
    await b1.answers();
    assert.equal((await nodes()).b1?.cordoned, true);
    const { text } = await t.says(swap("b1"), 0, ["uncordon node b1 once it is Ready"]);
    assert.doesNotMatch(text, /drain node|restart into/);
    await givenBack("b1");
  });

  test("stays cordoned if the user has cordoned it", async () => {
    await oldKernel(b2);
    const was = await boot(b2);
    await a1.sh("kubectl cordon b2");
    const { text } = await t.says(swap("b2"), 0, ["restart into"]);
    assert.doesNotMatch(text, /drain node|uncordon/);
    assert.notEqual(await boot(b2), was);
    const node = (await nodes()).b2;
    assert.deepEqual([node?.cordoned, node?.drained], [true, undefined]);
  });
});

describe("a machine that booted its old kernel although the new one is its default", () => {
  const entry = `"$(grep '^menuentry' /boot/grub2/grub.cfg | cut -d"'" -f2 | grep cloud)"`;

  test("is not rebooted repeatedly", async () => {
    // Its node must be Ready nevertheless: only k3s gets a working WireGuard, from wireguard-go.
    await t.ok("ssh a1 cat /usr/bin/wireguard-go | ssh b3 'mkdir /opt/wg && cat >/opt/wg/wireguard-go'");
    await b3.sh(`cat >/opt/wg/ip <<'TEXT'
#!/bin/sh
case "$1 $2 $4 $5" in 'link add type wireguard')
  wireguard-go "$3" </dev/null >/dev/null 2>&1
  until [ -e "/sys/class/net/$3" ]; do sleep 0.1; done
  exit ;;
esac
exec /usr/bin/ip "$@"
TEXT
chmod 755 /opt/wg/*
mkdir -p /etc/systemd/system/k3s-agent.service.d
printf '[Service]\nEnvironment=PATH=/opt/wg:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n' >/etc/systemd/system/k3s-agent.service.d/lab.conf
grub2-reboot ${entry}; sync`);
    const was = await boot();
    await b3.sh("systemctl reboot").catch(() => {});
    const now = await restarted(b3, was);
    assert.equal(await kernel(), b3.image.old);
    await t.says(upgrade, 1, [
      /is the default boot entry, and yet this box has booted kernel .*cloud.* since/,
    ]);
    assert.equal(await boot(), now);
  });

  test("is drained, rebooted and uncordoned once the new kernel can be made its default again", async () => {
    await b3.sh(`grub2-set-default ${entry}`);
    const was = await boot();
    for (const end = Date.now() + 600_000; ; ) {
      const { b3: node } = await nodes();
      if (node?.ready && node.boot === was) break;
      assert(Date.now() < end, await b3.sh("journalctl -u k3s-agent -o cat --no-pager -n 30"));
    }
    const { text } = await t.says(upgrade, 0, [
      /make kernel-ml the default boot entry(.*\n)*.*drain node b3(.*\n)*.*restart into kernel(.*\n)*.*uncordon node b3/,
    ]);
    assert.equal(await kernel(), b3.image.next);
    assert.notEqual(await boot(), was);
    assert.match(text, /WireGuard is in kernel/);
    await givenBack("b3");
  });
});

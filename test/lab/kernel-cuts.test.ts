/** A kernel upgrade that is interrupted: the connection is lost, the operator presses Ctrl-C or is killed, the machine loses power. The next run completes it. */
import assert from "node:assert/strict";
import { existsSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { bench, hangUp, script } from "./suite.ts";
import { addMachine, type Machine, REPOSITORIES } from "./vm.ts";

const t = await bench({ name: "kernel-cuts", boxes: [] });
after(() => t.lab.down());
t.settings(REPOSITORIES, { server: "", agents: "b3 b4" });
/** Two in parallel: one works while the other waits. */
let b3: Machine;
let b4: Machine;
before(async () => {
  [b3, b4] = await Promise.all([addMachine(t.lab, "b3"), addMachine(t.lab, "b4")]);
});
const upgrade = ({ name }: Machine) => script("upgrade-kernel", `--host ${name}`);

const STEPS = {
  key: /import ELRepo's key/,
  repository: /add the repository/,
  kernel: /install kernel-ml/,
  tools: /replace the old kernel's tools/,
  entry: /make kernel-ml the default/,
  restart: /restart into/,
};

type Signal = (name: "INT" | "KILL") => Promise<unknown>;

/** Starts the upgrade, and calls `how` once it has reached the step, `wait` seconds later. */
async function cut(
  machine: Machine,
  step: keyof typeof STEPS,
  how: (machine: Machine, signal: Signal) => Promise<unknown>,
  wait = 0,
) {
  const own = join(t.lab.dir, "home", machine.name);
  rmSync(`${own}.log`, { force: true });
  const command = `echo $$ >${own}.pid; exec ${upgrade(machine)} >${own}.log 2>&1`;
  const run = t.lab.op(["setsid", "sh", "-c", command], { env: { TMPDIR: "/run" } });
  let ended = false;
  void run.finally(() => (ended = true));
  const said = () => (existsSync(`${own}.log`) ? readFileSync(`${own}.log`, "utf8") : "");
  while (!STEPS[step].test(said())) {
    assert(!ended, `It ended before "${step}":\n${said()}`);
    await sleep(20);
  }
  await sleep(wait * 1000);
  const signal: Signal = (name) => t.ok(`kill -s ${name} -- -$(cat ${own}.pid)`);
  await how(machine, signal);
  const hangs = setTimeout(() => signal("KILL"), 90_000);
  const { exitCode } = await run;
  clearTimeout(hangs);
  assert.notEqual(exitCode, 0, said());
}

/** The ways in which an operator is lost. */
const LOST = {
  "Ctrl-C": (_: Machine, signal: Signal) => signal("INT"),
  "a killed operator": (_: Machine, signal: Signal) => signal("KILL"),
  "a lost connection": (machine: Machine) => hangUp(machine, "sshd"),
};

const off = async (machine: Machine, signal: Signal) => {
  await machine.off();
  await signal("INT");
};

/** It runs the new kernel, whose files are all as packaged, and which is the default boot entry. */
async function swapped(machine: Machine) {
  assert.equal((await machine.sh("uname -r")).trim(), machine.image.next);
  assert.equal(await machine.sh("rpm -V kernel-ml 2>&1 || true"), "");
  assert.match(await machine.sh("grub2-editenv list"), /^saved_entry=.*[.]rt[.]/m);
  assert.doesNotMatch(await machine.sh("rpm -qa"), /^kernel-tools/m);
  await t.says(upgrade(machine), 0, ["nothing to do: WireGuard is in kernel"]);
}

describe("an upgrade of the kernel", { concurrency: 2 }, () => {
  test("that is interrupted at each step by a lost operator, or by a boot entry that cannot be set, is completed by the next run", async (test) => {
    const lose = async (step: keyof typeof STEPS, how: keyof typeof LOST) => {
      await cut(b3, step, LOST[how]);
      test.diagnostic(`${how} at "${step}"`);
    };
    await lose("key", "Ctrl-C");
    await lose("repository", "a killed operator");
    await lose("kernel", "a lost connection");
    await lose("kernel", "a killed operator");
    await lose("tools", "a lost connection");

    await b3.sh("chattr +i /boot/grub/grubenv");
    const { text } = await t.says(upgrade(b3), 1, [
      /The default boot entry is still ".*cloud.*", not ".*rt.*"/,
      "grub2-editenv create",
    ]);
    assert.doesNotMatch(text, /restart into/);
    await b3.sh("chattr -i /boot/grub/grubenv");

    await lose("entry", "Ctrl-C");
    const boot = () => b3.sh("cat /proc/sys/kernel/random/boot_id");
    const was = await boot();
    await lose("restart", "a killed operator");
    for (const end = Date.now() + 600_000; Date.now() < end; await sleep(500))
      if ((await boot().catch(() => was)) !== was) break;
    await swapped(b3);
  });

  test("that is interrupted by a loss of power leaves a machine that boots, and is completed by the next run", async (test) => {
    const steps = [
      ["key", 0],
      ["repository", 0.2],
      ["kernel", 8],
      ["tools", 3],
      ["entry", 0],
      ["restart", 1],
    ] as const;
    // Each needs a boot in software emulation: `make faults` tests all of them, CI those that leave an incomplete system.
    for (const [step, wait] of steps.filter(
      ([step]) => process.env.ALL || /kernel|tools|restart/.test(step),
    )) {
      await cut(b4, step, off, wait);
      await b4.on();
      const left =
        await b4.sh(`uname -r; rpm -qa 'kernel*' | sort | tr '\\n' ' '; rpm -V kernel-ml 2>&1 | head -n 3
ls /boot | grep rt || true; grub2-editenv list | sed -n 's/^saved/default: &/p'; grep -c "^menuentry.*rt" /boot/grub2/grub.cfg || true`);
      test.diagnostic(`power lost at "${step}" left: ${left.trim().replace(/\s*\n/g, "; ")}`);
      // Interrupted when the new default was already on the disk.
      if (left.startsWith(b4.image.next)) break;
    }
    await t.ok(upgrade(b4));
    await swapped(b4);
  });
});

/** A kernel swap that is cut off: the connection goes, the operator presses Ctrl-C or dies, the machine loses its power. The next run finishes. */
import assert from "node:assert/strict";
import { existsSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { bench, script } from "./suite.ts";
import { addMachine, type Machine, REPOSITORIES } from "./vm.ts";

const t = await bench({ name: "kernel-cuts", boxes: [] });
after(() => t.lab.down());
const upgrade = script("upgrade-kernel", "--host b3");
let b3: Machine;

before(async () => {
  t.settings(REPOSITORIES, { server: "", agents: "b3" });
  b3 = await addMachine(t.lab, "b3");
  await b3.save("fresh");
});

const STEPS = {
  key: /import ELRepo's key/,
  repository: /add the repository/,
  kernel: /install kernel-ml/,
  tools: /replace the old kernel's tools/,
  entry: /make kernel-ml the default/,
  restart: /restart into/,
};

/** Starts the swap, does `how` once it has come to the step and `wait` seconds on, and answers what was said until then. */
async function cut(
  step: keyof typeof STEPS,
  how: (signal: (name: string) => Promise<unknown>) => Promise<unknown>,
  wait = 0,
) {
  const log = join(t.lab.dir, "home/cut.log");
  rmSync(log, { force: true });
  const run = t.lab.op(
    ["setsid", "sh", "-c", `echo $$ >$HOME/cut.pid; exec ${upgrade} >$HOME/cut.log 2>&1`],
    {
      env: { TMPDIR: "/run" },
    },
  );
  let ended = false;
  void run.finally(() => (ended = true));
  const said = () => (existsSync(log) ? readFileSync(log, "utf8") : "");
  while (!STEPS[step].test(said())) {
    assert(!ended, `It ended before "${step}":\n${said()}`);
    await sleep(20);
  }
  await sleep(wait * 1000);
  const signal = (name: string) => t.ok(`kill -s ${name} -- -$(cat $HOME/cut.pid)`);
  await how(signal);
  const hangs = setTimeout(() => signal("KILL"), 90_000);
  const { exitCode } = await run;
  clearTimeout(hangs);
  assert.notEqual(exitCode, 0, said());
  return said();
}

/** The ways in which an operator is lost. */
const LOST = {
  "Ctrl-C": (signal: (name: string) => Promise<unknown>) => signal("INT"),
  "a killed operator": (signal: (name: string) => Promise<unknown>) => signal("KILL"),
  "a cut connection": () =>
    b3.sh(`for pid in $(pgrep -f 'sshd: root@notty'); do [ "$pid" = "$PPID" ] || kill -9 "$pid"; done`),
};

/** It runs the new kernel, of which no file is missing or other than packed, and that will be so after the next start. */
async function swapped() {
  assert.equal((await b3.sh("uname -r")).trim(), b3.image.next);
  assert.equal(await b3.sh("rpm -V kernel-ml 2>&1 || true"), "");
  assert.match(await b3.sh("grub2-editenv list"), /^saved_entry=.*[.]rt[.]/m);
  assert.doesNotMatch(await b3.sh("rpm -qa"), /^kernel-tools/m);
  await t.says(upgrade, 0, ["nothing to do: WireGuard is in kernel"]);
}

const restarted = async (was: string) => {
  for (const end = Date.now() + 180_000; Date.now() < end; await sleep(500))
    if ((await b3.sh("cat /proc/sys/kernel/random/boot_id").catch(() => was)) !== was) return;
};

test("cut at each step by a lost operator, the next run goes on", async (test) => {
  for (const [step, how] of [
    ["key", "Ctrl-C"],
    ["repository", "a killed operator"],
    ["kernel", "a cut connection"],
    ["kernel", "a killed operator"],
    ["tools", "a cut connection"],
    ["entry", "Ctrl-C"],
  ] as const) {
    await cut(step, LOST[how]);
    test.diagnostic(`${how} at "${step}"`);
  }
  const was = await b3.sh("cat /proc/sys/kernel/random/boot_id");
  await cut("restart", LOST["a killed operator"]);
  await restarted(was);
  await swapped();
});

test("a default entry that did not take is a failure, and the next run sets it", async () => {
  await b3.restore("fresh");
  await b3.sh("chattr +i /boot/grub/grubenv");
  const said = await t.says(upgrade, 1, [
    /The default boot entry is still ".*cloud.*", not ".*rt.*"/,
    "grub2-editenv create",
  ]);
  assert.doesNotMatch(said.text, /restart into/);
  await b3.sh("chattr -i /boot/grub/grubenv; sync");
  await b3.save("installed");
});

test("cut at each step by a loss of power, the machine still boots, and the next run goes on", async (test) => {
  const off = async (signal: (name: string) => Promise<unknown>) => {
    await b3.off();
    await signal("INT");
  };
  const left = async (step: string) => {
    await b3.on();
    const said =
      await b3.sh(`uname -r; rpm -qa 'kernel*' | sort | tr '\\n' ' '; rpm -V kernel-ml 2>&1 | head -n 3
ls /boot | grep rt || true; grub2-editenv list | sed -n 's/^saved/default: &/p'; grep -c "^menuentry.*rt" /boot/grub2/grub.cfg || true`);
    test.diagnostic(`power lost at "${step}" left: ${said.trim().replace(/\s*\n/g, "; ")}`);
  };
  await b3.restore("installed");
  for (const step of ["entry", "restart"] as const) {
    await cut(step, off, step === "restart" ? 1 : 0);
    await left(step);
    if ((await b3.sh("uname -r")).trim() === b3.image.next) break;
  }
  await t.ok(upgrade);
  await swapped();

  await b3.restore("fresh");
  for (const [step, wait] of [
    ["key", 0],
    ["repository", 0.2],
    ["kernel", 8],
    ["tools", 3],
  ] as const) {
    await cut(step, off, wait);
    await left(step);
  }
  await t.ok(upgrade);
  await swapped();
});

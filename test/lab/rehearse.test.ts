/** The rehearsal as its users run it: created, used, created again, and removed completely; also after a crash. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { $ } from "zx";
import { attach } from "./lab.ts";

const cwd = join(import.meta.dirname, "../..");
/** As its users run it: with their Node.js, and without the variables of the make that runs these tests. */
const { MAKELEVEL: _, MAKEFLAGS: __, K3S_LAB_NODE: ___, ...env } = process.env;
const run = $({
  quiet: true,
  nothrow: true,
  cwd,
  env,
  stdio: ["ignore", "pipe", "pipe"],
});
let mine = false;
/** What the last make rehearse said. */
let said = "";

before(async () => {
  if (await attach("rehearse")) throw new Error("A rehearsal is running: make rehearse-down, then try again");
  mine = true;
  // The machine of an earlier rehearsal may have crashed.
  await run`make rehearse-down`;
});
after(async () => {
  if (mine) await run`make rehearse-down`;
});

/** What a rehearsal could leave behind: namespaces, links, mounts, cgroups, processes, its folder. */
async function traces() {
  const processes = readdirSync("/proc").filter((pid) => {
    if (!/^\d+$/.test(pid)) return false;
    try {
      return /k3s-across-clouds\/rehearse\b|k3s-lab-rehearse-/.test(
        readFileSync(`/proc/${pid}/cmdline`, "utf8") + readFileSync(`/proc/${pid}/cgroup`, "utf8"),
      );
    } catch {
      return false;
    }
  });
  const groups = (await run`find /sys/fs/cgroup -maxdepth 2 -name ${"k3s-lab-rehearse-*"}`).stdout;
  return {
    processes,
    groups,
    namespaces: (await run`ip netns list`).stdout.match(/^(op|inet|router-[abhi]|[abhi]\d+)\b.*$/gm) ?? [],
    mounts: readFileSync("/proc/self/mountinfo", "utf8")
      .split("\n")
      .filter((line) => line.includes("rehearse")),
    folder: (await run`ls -d /var/lib/k3s-across-clouds/rehearse`).stdout,
  };
}

/** The table of handshakes: every box with every other, none older than three minutes. */
function table(text: string) {
  const rows = text
    .split("\n")
    .filter((line) => /^(from|a1|b1|b2|h1)( +\S+){5}/.test(line))
    .slice(-5);
  const cells = rows.map((row) => row.trim().split(/ +/));
  assert.deepEqual(cells[0], ["from", "a1", "b1", "b2", "h1", "public", "address"], text);
  for (const [i, row] of cells.slice(1).entries())
    for (const [j, cell] of row.slice(1, 5).entries())
      if (i === j) assert.equal(cell, "-");
      else assert(Number(cell) >= 0 && Number(cell) < 180, `${row[0]}: ${cell}`);
}

test("a rehearsal that is killed while it is being created does not prevent the next one", async () => {
  const child = spawn("make", ["rehearse"], { cwd, detached: true, stdio: ["ignore", "ignore", "pipe"] });
  const ended = once(child, "exit");
  let text = "";
  const building = new Promise<void>((resolve) => {
    child.stderr.on("data", (chunk) => {
      text += chunk;
      if (text.includes("building two clouds")) resolve();
    });
  });
  await Promise.race([building, ended]);
  await sleep(1500);
  assert.equal(child.exitCode, null, text);
  process.kill(-(child.pid as number), "SIGKILL");
  await ended;
  assert.equal(await attach("rehearse"), undefined);
});

test("make rehearse creates two clouds, a home and a cluster with recent handshakes, and reports that its k3s is a stand-in", async (context) => {
  const began = Date.now();
  const { exitCode, stdout, stderr } = await run`make rehearse`;
  assert.equal(exitCode, 0, stderr);
  table(stdout);
  assert.match(stderr, /The k3s in this rehearsal is a STAND-IN/);
  context.diagnostic(`first: ${Math.round((Date.now() - began) / 1000)} s`);
});

test("a second make rehearse keeps the boxes and has nothing to do", async (context) => {
  const began = Date.now();
  const { exitCode, stdout, stderr } = await run`make rehearse`;
  assert.equal(exitCode, 0, stderr);
  table(stdout);
  assert.match(stderr, /the boxes run already/);
  said = stderr;
  assert.equal(stderr.match(/nothing to do/g)?.length, 4, stderr);
  context.diagnostic(`again: ${Math.round((Date.now() - began) / 1000)} s`);
});

test("make in-rehearsal runs any command as the operator, and returns its exit status", async () => {
  const agent = await run`make in-rehearsal ${"CMD=make agent HOST=b2"}`;
  assert.equal(agent.exitCode, 0, agent.stderr);
  assert.match(agent.stderr, /^b2 +nothing to do/m);
  assert.equal((await run`make in-rehearsal ${"CMD=ssh a1 hostname"}`).stdout, "a1\n");
  assert.notEqual((await run`make in-rehearsal CMD=false`).exitCode, 0);
});

test("the rehearsal's laptop reaches the cluster's API by name, as make rehearse says", async () => {
  const commands = [...said.matchAll(/make in-rehearsal CMD='(.*(?:laptop|kubernetes).*)'/g)].map(
    ([, command]) => command as string,
  );
  assert.equal(commands.length, 3, said);
  let last = "";
  for (const command of commands) {
    const { exitCode, stdout, stderr } = await run`make in-rehearsal ${`CMD=${command}`}`;
    assert.equal(exitCode, 0, stdout + stderr);
    last = stdout;
  }
  assert.match(last, /gitVersion|Unauthorized/);
});

test("make rehearse-down removes everything", async () => {
  const { exitCode, stderr } = await run`make rehearse-down`;
  assert.equal(exitCode, 0, stderr);
  assert.deepEqual(await traces(), { processes: [], groups: "", namespaces: [], mounts: [], folder: "" });
  const after = await run`make in-rehearsal CMD=true`;
  assert.match(after.stderr, /No rehearsal is running: make rehearse/);
});

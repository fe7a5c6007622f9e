#!/usr/bin/env -S node --import tsx
/**
 * How long a cluster takes, and what it costs: `make -j up` fresh and again, beside the article by hand, the floor and
 * other projects, in turn, each time in a new lab (slow.ts). Boxes have equal shares of the CPU, and the operator, whose
 * machine is another one, goes before them. What was measured goes into results.json, and the table of all that is
 * there is printed.
 *
 *     BOXES="3 9 17"    how many boxes
 *     MS="50 150"       round trip of the operator, in milliseconds
 *     ONLY="up floor"   which contenders; default all
 *     K3S_INSTALL_SH=…  k3s's install.sh, which both of these use:
 *     K3SUP=…           k3sup's binary, to have it run as well
 *     K3S_ANSIBLE=…     a clone of k3s-ansible, where ansible-playbook with ansible.posix is on PATH
 *     TIMES=3           rounds of all contenders; of each figure the median counts
 */
import { copyFileSync, existsSync, readFileSync, writeFileSync } from "node:fs";
import { cpus, loadavg } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { type Lab, spread } from "../lab/lab.ts";
import { MODERN, trips } from "../lab/suite.ts";
import { all, READY, slowLab, when } from "./slow.ts";

const RESULTS = join(import.meta.dirname, "results.json");
const list = (name: string, value: string) => (process.env[name] || value).split(/\s+/).filter(Boolean);

interface Contender {
  about: string;
  /** The command of the operator; both runs are the same. */
  command(lab: Lab): string[];
  /** What it needs that is not ours: variables that name files. Without them it is left out. */
  needs?: string[];
  prepare?(lab: Lab): Promise<unknown>;
}

const script =
  (name: string, ...first: string[]) =>
  (lab: Lab) => [join(import.meta.dirname, name), ...first, lab.mirror.plain, MODERN, ...all(lab)];

/** Lets a box find k3s's installation script, and all that it asks curl for, at the lab's mirror. */
async function redirect(lab: Lab) {
  const [host, github] = [lab.mirror.plain, lab.mirror.github].map((base) => new URL(base).host);
  copyFileSync(process.env.K3S_INSTALL_SH as string, join(lab.mirror.dir, `${host}/install.sh`));
  const curl = `#!/bin/bash
args=("\${@/#https:\\/\\/get.k3s.io/http://${host}/install.sh}")
exec /usr/bin/curl "\${args[@]/#https:\\/\\/github.com/http://${github}}"
`;
  const put = `cat >/usr/local/bin/curl <<'SH'\n${curl}SH\nchmod 755 /usr/local/bin/curl`;
  await Promise.all(lab.boxes.map((box) => box.sh(put)));
}

/** Ansible's modules need a Python on each box: this machine's, as its packages have it. */
async function python(lab: Lab) {
  const { host } = new URL(lab.mirror.plain);
  const archive = join(lab.mirror.dir, host, "python.tar");
  await lab.net(
    "op",
    `apt-cache depends --recurse --installed -i python3 python3-apt | grep '^[a-z]' | sort -u | xargs dpkg -L 2>/dev/null |
sort -u | while read -r path; do [ -d "$path" ] || echo "$path"; done | tar -c -T - -f ${archive}`,
  );
  await Promise.all(
    lab.boxes.map((box) => box.sh(`curl -fsS http://${host}/python.tar | tar -x -C / --skip-old-files`)),
  );
}

const K3SUP = { needs: ["K3SUP", "K3S_INSTALL_SH"], prepare: redirect };

const CONTENDERS: Record<string, Contender> = {
  up: { about: "make -j up", command: () => ["make", "-j", "up"] },
  floor: { about: "the floor: 3 commands a box, all at once", command: script("floor.sh") },
  "by-hand": { about: "the article by hand", command: script("by-hand.sh") },
  k3sup: { ...K3SUP, about: "k3sup, eight joins at once", command: script("k3sup.sh", "8") },
  "k3sup-plan": {
    ...K3SUP,
    about: "k3sup as its plan has it, all joins at once",
    command: script("k3sup.sh", "0"),
  },
  "k3s-ansible": {
    about: "k3s-ansible, all boxes at once",
    command: script("k3s-ansible.sh"),
    needs: ["K3S_ANSIBLE", "K3S_INSTALL_SH"],
    prepare: (lab) => Promise.all([redirect(lab), python(lab)]),
  },
};

interface Run {
  seconds: number;
  /** Of the operator's processes, in seconds; their peak memory in MB, what they sent in kB. */
  cpu: number;
  memory: number;
  sent: number;
  /** CPU that the boxes took, in seconds a box, k3s's stand-in included. */
  boxCpu: number;
  /** How much of its cores' time the machine was busy, in percent: boxes, operator, and the lab's lines and mirror. */
  busy: number;
  /** The most that any one box saw. */
  commands: number;
  logins: number;
}

interface Result {
  contender: string;
  boxes: number;
  ms: number;
  times: number;
  lab: number;
  /** `ssh box true` on all boxes at once, in seconds. */
  bare: number;
  fresh: Run;
  /** Until the last node became Ready, in seconds. */
  ready: number;
  again: Run;
  /** The machine, and its load average when the run ended. */
  machine: string;
  load: number;
}

const round = (value: number, digits = 1) => Number(value.toFixed(digits));
const since = (began: number) => (performance.now() - began) / 1000;

async function measure(lab: Lab, command: string[]): Promise<Run> {
  const sent = async () => {
    const [link] = JSON.parse(await lab.net("op", "ip -s -j link show eth0"));
    return link.stats64.tx.bytes / 1000;
  };
  const boxCpu = async () => {
    const each = await Promise.all(lab.boxes.map((box) => lab.cpuOf(box.name)));
    return each.reduce((sum, seconds) => sum + seconds, 0) / each.length;
  };
  const machine = () => {
    const times = cpus().map(({ times }) => times);
    const idle = times.reduce((sum, t) => sum + t.idle, 0);
    return { idle, all: times.reduce((sum, t) => sum + t.user + t.nice + t.sys + t.irq + t.idle, 0) };
  };
  let run: Run | undefined;
  const seen = await trips(lab.boxes, async () => {
    const before = await sent();
    const cpuBefore = await boxCpu();
    const machineBefore = machine();
    const began = performance.now();
    const { K3SUP = "", K3S_ANSIBLE = "", PATH = "" } = process.env;
    const env = { K3SUP, K3S_ANSIBLE, PATH };
    const { ran, cpu, memory } = await lab.metered(command, { timeout: 400, env });
    const seconds = since(began);
    const { idle, all } = machine();
    const busy = 100 * (1 - (idle - machineBefore.idle) / (all - machineBefore.all));
    if (ran.exitCode) throw new Error(`${command[0]} failed:\n${ran.stdout}${ran.stderr}`);
    run = {
      seconds: round(seconds),
      cpu: round(cpu, 2),
      memory: round(memory / 1e6, 0),
      sent: round((await sent()) - before, 0),
      boxCpu: round((await boxCpu()) - cpuBefore, 2),
      busy: round(busy, 0),
      commands: 0,
      logins: 0,
    };
  });
  const most = (what: "commands" | "logins") => Math.max(...Object.values(seen).map((box) => box[what]));
  return { ...(run as Run), commands: most("commands"), logins: most("logins") };
}

async function once(contender: string, boxes: number, ms: number): Promise<Result> {
  const began = performance.now();
  const lab = await slowLab("bench", spread(boxes), ms);
  const started = since(began);
  try {
    const bare = await measure(lab, [
      "sh",
      "-c",
      `${lab.boxes.map(({ name }) => `ssh ${name} true &`).join(" ")} wait`,
    ]);
    const { command, prepare } = CONTENDERS[contender] as Contender;
    await prepare?.(lab);
    const launched = Date.now();
    const fresh = await measure(lab, command(lab));
    // k3sup and k3s-ansible end before that.
    let ready = await when(lab, READY);
    for (const end = Date.now() + 60_000; ready.includes(undefined); await sleep(500)) {
      if (Date.now() > end) throw new Error(`${contender}: not all of ${boxes} nodes are Ready`);
      ready = await when(lab, READY);
    }
    const allReady = round((Math.max(...(ready as number[])) - launched) / 1000);
    const again = await measure(lab, command(lab));
    const machine = `${cpus().length} × ${cpus()[0]?.model}, Node ${process.versions.node}`;
    return {
      contender,
      boxes,
      ms,
      times: 1,
      lab: round(started),
      bare: bare.seconds,
      fresh,
      ready: allReady,
      again,
      machine,
      load: round(loadavg()[0] as number),
    };
  } finally {
    await lab.down();
  }
}

/** Of values of one shape: the median of each number, and the rest as the first has it. */
function median<T>(values: T[]): T {
  const [first] = values as [T];
  if (typeof first === "number")
    return values.toSorted((a, b) => Number(a) - Number(b))[Math.floor((values.length - 1) / 2)] as T;
  if (typeof first !== "object") return first;
  const keys = Object.keys(first as object) as (keyof T)[];
  return Object.fromEntries(keys.map((key) => [key, median(values.map((value) => value[key]))])) as T;
}

const key = (r: Result) => `${r.boxes} ${r.ms} ${r.contender}`;

function table(results: Result[]): string {
  const head = [
    "boxes",
    "ms",
    "what",
    "Ready",
    "floor ×",
    "end",
    "floor ×",
    "again",
    "bare ssh ×",
    "commands",
    "logins",
    "CPU",
    "CPU a box",
    "busy %",
    "MB",
    "kB sent",
    "lab",
  ];
  const rows = results.map((r) => {
    const floor = results.find((f) => f.contender === "floor" && f.boxes === r.boxes && f.ms === r.ms);
    const of = (value: number, other?: number) => (other ? (value / other).toFixed(2) : "-");
    const both = (what: keyof Run) => `${r.fresh[what]}, ${r.again[what]}`;
    return [
      `${r.boxes}`,
      `${r.ms}`,
      r.contender,
      `${r.ready} s`,
      of(r.ready, floor?.ready),
      `${r.fresh.seconds} s`,
      of(r.fresh.seconds, floor?.fresh.seconds),
      `${r.again.seconds} s`,
      of(r.again.seconds, r.bare),
      both("commands"),
      both("logins"),
      both("cpu"),
      both("boxCpu"),
      both("busy"),
      both("memory"),
      both("sent"),
      `${r.lab} s`,
    ];
  });
  const widths = head.map((_, i) => Math.max(...[head, ...rows].map((row) => (row[i] as string).length)));
  return [head, ...rows]
    .map((row) =>
      row
        .map((cell, i) => cell.padEnd(widths[i] as number))
        .join("  ")
        .trimEnd(),
    )
    .join("\n");
}

const TIMES = Number(process.env.TIMES || 3);
const contenders = list("ONLY", Object.keys(CONTENDERS).join(" ")).filter((name) => {
  const missing = CONTENDERS[name]?.needs?.filter((variable) => !process.env[variable]) ?? [];
  if (missing.length) console.error(`${name} is left out: ${missing.join(" and ")} not set`);
  return !missing.length;
});
const kept: Result[] = existsSync(RESULTS) ? JSON.parse(readFileSync(RESULTS, "utf8")) : [];
for (const boxes of list("BOXES", "3 9 17").map(Number))
  for (const ms of list("MS", "50 150").map(Number)) {
    const runs: Result[] = [];
    for (let i = 0; i < TIMES; i++)
      for (const contender of contenders) {
        const run = await once(contender, boxes, ms);
        runs.push(run);
        console.error(
          `${boxes} boxes, ${ms} ms, ${contender}: Ready ${run.ready} s, end ${run.fresh.seconds} s, again ${run.again.seconds} s, load ${run.load}`,
        );
      }
    for (const contender of contenders) {
      const result = { ...median(runs.filter((run) => run.contender === contender)), times: TIMES };
      const at = kept.findIndex((r) => key(r) === key(result));
      if (at < 0) kept.push(result);
      else kept[at] = result;
    }
    kept.sort((a, b) => a.boxes - b.boxes || a.ms - b.ms);
    writeFileSync(RESULTS, `${JSON.stringify(kept, null, 2)}\n`);
  }
console.log(table(kept));

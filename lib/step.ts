/** A step: look at a box, plan the changes, apply them, look again. Here is the one place that changes a box. */

import { randomBytes } from "node:crypto";
import type { Settings } from "./settings.ts";
import { sh } from "./sh.ts";
import type { Box } from "./shell.ts";
import type { SettingName } from "./table.ts";
import { quoted } from "./text.ts";

/** What a box printed about itself: a fact's name and its text. */
export type Facts = Record<string, string>;

export interface Change {
  /** What will be done and for what reason, in one line; shown to the user, never with a secret in it. */
  why: string;
  /** Lines that a dry run shows below it: what of a file goes and comes. No secrets here either. */
  detail?: string[];
  /**
   * The shell that does it, as root, under `set -eu`. `say TEXT` reports progress, `early FACT TEXT` a fact that
   * others wait for; `beat`, now and then in a long wait, ends it when the operator is gone.
   */
  sh: string;
  /** Time limit in seconds; default 60. */
  seconds?: number;
  /** Settings that `sh` reads as shell variables: they travel on stdin and never show. */
  secrets?: readonly SettingName[];
  /** A local file that is put on the box before `sh` runs. */
  push?: { file: string; path: string };
  /** The box restarts after this change: wait for its new boot id, then look again. */
  reboot?: true;
  /**
   * A step on the cluster's server in place of `sh`, for what an agent's credentials do not allow: it is looked at and
   * planned there, by what the server itself knows of this box.
   */
  onServer?: Step;
  /** It takes a node out of its cluster: one box at a time, and none after one that failed. */
  alone?: true;
  /** Why it could not be seen whether this is still to be done. */
  unknown?: string;
  /** What follows depends on what this brings to light: look again before planning on. A preview may foresee it. */
  lookAgain?: true | "foreseen";
}

/** Settings, and what this call was allowed by a word of its own: force, take-over. */
export type Want = Settings & { allowed?: ReadonlySet<string> };

/** One step of the deployment. `look` prints facts and changes nothing; `plan` is pure. */
export interface Step {
  /** The script's name, and the make target that runs it. */
  name: string;
  /** Settings it reads, for its flags and --help. */
  options: readonly SettingName[];
  /** Pieces of shell that print facts: `fact NAME`, then its text. A piece that several steps share is sent once. */
  look(want: Settings): string[];
  /** @throws {Refusal} where the facts say that nothing must be touched. */
  plan(want: Want, facts: Facts): Change[];
  /** What the operator's env file should remember once the plan is empty. */
  learn?(want: Want, facts: Facts): Partial<Settings>;
}

/** A step must not go on: the box or the cluster is not as it has to be. Nothing was touched. Exit status 1. */
export class Refusal extends Error {}

/** A change failed on a box, or was made and did not take. */
export class Failure extends Error {
  readonly change: Change | undefined;
  readonly output: string;
  constructor(message: string, change?: Change, output = "") {
    super(message);
    this.change = change;
    this.output = output;
  }
}

/** Facts that every step may use. uptime before now: so their difference errs to one side only. */
const BASE = `
fact uptime; cut -d' ' -f1 /proc/uptime
fact now; date +%s.%N
fact boot; cat /proc/sys/kernel/random/boot_id
fact machine; cat /etc/machine-id 2>/dev/null
fact named; sed -n 's/.*[[:space:]]--node-name=\\([a-z0-9.-]*\\).*/\\1/p' /etc/systemd/system/k3s.service /etc/systemd/system/k3s-agent.service 2>/dev/null
fact hostname; uname -n
fact arch; uname -m
fact kernel; uname -r
fact os; cat /etc/os-release 2>/dev/null
fact systemd; test -d /run/systemd/system && echo yes
fact addresses; ip -o -4 addr show 2>/dev/null
`;

/** Two boxes' worth of markers cannot be mixed up with a file's text: the mark is random. */
const newMark = () => `k3s-across-clouds-${randomBytes(8).toString("hex")}`;

/** The script that looks: facts of all steps, in one trip. It never fails: what is not there is not printed. */
export function lookScript(steps: readonly Step[], want: Settings, mark: string): string {
  return `m=${mark}
fact() { printf '\\n%s fact %s\\n' "$m" "$1"; }
${BASE}${[...new Set(steps.flatMap((step) => step.look(want)))].join("\n")}
printf '\\n%s end\\n' "$m"`;
}

/** For a comment, which may quote what a box said: on one line, and for a terminal too. */
const oneLine = (text: string) => text.replace(/[\s\p{C}\p{Zl}\p{Zp}]+/gu, " ");

/** How long an earlier run may go on on a box whose operator it has lost, in seconds. */
const PATIENCE = 900;

/**
 * The script that applies: each change is a shell of its own under \`timeout\`, with the output of both
 * streams in order; the first that fails ends it. A lock keeps out a second operator, and what an earlier
 * run that lost its connection may have left running: after waiting for that one the plan is out of date,
 * and nothing of it is done.
 */
export function applyScript(
  changes: readonly Change[],
  mark: string,
  secrets: (name: SettingName) => string,
  reader: "program" | "person" = "program",
): string {
  // A fact may be a secret: it is for the program that asked.
  const asides =
    reader === "person"
      ? "early() { :; }\nbeat() { :; }"
      : `early() { printf '%s early %s %s\\n' ${mark} "$1" "$2"; }\nbeat() { printf '%s beat\\n' ${mark}; }`;
  const body = changes.map((change, i) => {
    const given = (change.secrets ?? []).map((name) => `${name}=${secrets(name)}\n`).join("");
    return `# ${oneLine(change.why)}
change ${i} ${change.seconds ?? 60} <<'${mark}'
main() {
set -eu
say() { printf '%s say %s\\n' ${mark} "$*"; }
${asides}
${given}${change.sh}
}
main </dev/null
${mark}`;
  });
  return `lock=/run/k3s-across-clouds.lock; waited=
exec 9>>$lock
flock -n 9 || {
  waited=yes
  printf '\\n%s say waits for an earlier run, process %s here\\n' ${mark} "$(cat $lock)"
  flock -w ${PATIENCE} 9 || { printf '\\n%s busy %s\\n' ${mark} "$(cat $lock)"; exit 1; }
  printf '\\n%s waited\\n' ${mark}
}
echo $$ >$lock
# A package manager must not die of a connection that was cut: its output is still read then. A wait's is not.
relay() (
  trap '' PIPE
  while IFS= read -r line || [ -n "$line" ]; do
    printf '%s\\n' "$line" 2>/dev/null || [ "$line" != '${mark} beat' ] || exit
    line=
  done
)
change() {
  [ -z "$waited" ] || return 0
  printf '\\n%s change %s\\n' ${mark} "$1"
  { status=$({ { timeout -k 5 "$2" sh -s 2>&1 3>&- 4>&- 9>&-; echo $? >&3; } | relay >&4; } 3>&1); } 4>&1
  [ "$status" != 0 ] || return 0
  printf '\\n%s failed %s %s\\n' ${mark} "$1" "$status"
  exit 1
}
${body.join("\n")}
exec 9>&-`;
}

/** sudo on the family of RHEL leaves /usr/local/bin out of PATH, a plain ssh the folders of root's programs. */
const PATH = 'PATH="$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"';

/** Runs only when it has arrived whole: a connection that is cut half-way runs nothing. */
export const whole = (script: string): string =>
  `main() {\nexport LC_ALL=C ${PATH}\n${script}\n}\nmain </dev/null\n`;

/** A plan as one sh script that a person could paste on the box; secrets are to be given in the environment. */
export function printed(changes: readonly Change[]): string {
  const names = [...new Set(changes.flatMap((change) => change.secrets ?? []))];
  const needs = names.map(
    (name) => `: "\${${name}:?is a secret: set it before you run this}"; export ${name}`,
  );
  const pushes = changes.flatMap(({ push }) =>
    push ? [`# first copy ${oneLine(push.file)} to ${push.path}`] : [],
  );
  const elsewhere = changes.flatMap(({ onServer, why }) =>
    onServer ? [`# first, on the server: ${oneLine(why)}`] : [],
  );
  const here = changes.filter((change) => !change.onServer);
  const late = `[ -z "$waited" ] || { echo 'An earlier run has just ended here: make this plan anew'; exit 1; }`;
  const apply = applyScript(here, newMark(), (name) => `"$${name}"`, "person");
  return `#!/bin/sh\n${whole([...needs, ...pushes, ...elsewhere, apply, late].join("\n"))}`;
}

/** How often a box may use the mark on one trip: a step that takes two hours reports every ten seconds. */
const WORDS = 5000;

/** Cuts what a box printed into markers; text between them goes to the last one. */
export function reader(
  mark: string,
  on: { change?(i: number): void; say?(text: string): void; early?(fact: Facts): void },
) {
  const facts: Facts = {};
  const seen = {
    facts,
    ended: false,
    /** Nothing was done, since an earlier run was still at work. */
    waited: false,
    /** The process of an earlier run that did not end. */
    busy: undefined as string | undefined,
    failed: undefined as { i: number; status: number } | undefined,
    output: "",
  };
  let fact: string | undefined;
  let words = 0;
  return {
    seen,
    /** @throws {Failure} for a box whose words of its own are without an end. */
    line(line: string) {
      if (line.startsWith(`${mark} `) && line !== `${mark} beat` && ++words > WORDS)
        throw new Failure(`The box said more than ${WORDS} words of ours: it has no end`);
      if (!line.startsWith(`${mark} `)) {
        if (fact === undefined) seen.output += `${line}\n`;
        else facts[fact] = facts[fact] === undefined ? line : `${facts[fact]}\n${line}`;
        return;
      }
      const [kind, ...rest] = line.slice(mark.length + 1).split(" ");
      if (kind === "fact") {
        fact = rest[0] as string;
        delete facts[fact];
      } else if (kind === "say") on.say?.(rest.join(" "));
      else if (kind === "early") on.early?.({ [rest[0] as string]: rest.slice(1).join(" ") });
      else if (kind === "beat") return;
      else if (kind === "end") seen.ended = true;
      else if (kind === "waited") seen.waited = true;
      else if (kind === "busy") seen.busy = rest[0] ?? "";
      else if (kind === "failed") seen.failed = { i: Number(rest[0]), status: Number(rest[1]) };
      else if (kind === "change") {
        seen.output = "";
        on.change?.(Number(rest[0]));
      }
    },
  };
}

export interface Progress {
  /** A change starts. */
  starts(why: string): void;
  /** How it goes on; in the box's own words. */
  says(text: string, box?: true): void;
}

/** What the operator's side must remember of a box while it brings it through its steps. */
export interface Job {
  box: Box;
  /** The box of the cluster's server. */
  server: Box;
  want: Want;
  progress: Progress;
  /** A fact that a change reports before it has ended. */
  early?(fact: Facts): void;
  /** Restart a box where a change needs it (over ssh: yes; on this machine: only with --reboot). */
  mayReboot: boolean;
}

/** What a look may take beside its changes, in seconds: a box that hangs must not hang the rest. */
const LOOK = 120;

/** One trip: facts, and nothing else. @throws {Failure} when the box did not answer to the end. */
export async function look(job: Job, steps: readonly Step[], seconds = LOOK): Promise<Facts> {
  return (await trip(job, steps, [], seconds)).facts;
}

/** One trip: the changes, then the facts that confirm them. @throws {Failure} naming the change that failed. */
async function trip(job: Job, steps: readonly Step[], changes: readonly Change[], extra = LOOK + PATIENCE) {
  const mark = newMark();
  const stream = reader(mark, {
    // A box may say what it likes, of changes that were never sent too.
    change: (i) => changes[i] && job.progress.starts(changes[i].why),
    say: (text) => job.progress.says(text, true),
    early: (fact) => job.early?.(fact),
  });
  const apply = changes.length ? applyScript(changes, mark, (name) => sh(job.want[name])) : "";
  const script = whole(`${apply}\n${lookScript(steps, job.want, mark)}`);
  const seconds = changes.reduce((sum, change) => sum + (change.seconds ?? 60), extra);
  const { status, stderr } = await job.box.run(script, seconds, stream.line);
  const { seen } = stream;
  if (seen.failed) {
    const change = changes[seen.failed.i];
    const how =
      seen.failed.status === 124
        ? `no end after ${change?.seconds ?? 60} s`
        : `exit status ${seen.failed.status}`;
    throw new Failure(`${change?.why ?? "A change that was not asked for"} (${how})`, change, seen.output);
  }
  if (seen.busy !== undefined)
    throw new Failure(
      `An earlier run is still at work on this box after ${PATIENCE} s: wait, or end it there (kill ${seen.busy})`,
    );
  if (!seen.ended)
    throw new Failure(`The connection was lost (exit status ${status})`, undefined, seen.output + stderr);
  sane(seen.facts);
  return seen;
}

/** What every plan goes by. What a box has not is not printed; what is printed has a form. */
const FORMS: Record<string, RegExp> = {
  uptime: /^\d+(\.\d+)?$/,
  now: /^\d{9,11}\D?/,
  boot: /^[\w-]{1,64}$/,
  machine: /^\w{1,64}$/,
  hostname: /^[^\s\p{Cc}]{1,64}$/u,
  arch: /^\w{1,20}$/,
  kernel: /^\d[\w.+~-]{0,100}$/,
  addresses: /^(\d+: +\S+ +inet \d[^\n]*(\n|$))+$/,
};

/** @throws {Failure} for a box whose answers are none: nothing is planned on them. */
function sane(facts: Facts): void {
  for (const [name, form] of Object.entries(FORMS)) {
    const text = facts[name]?.trim();
    if (text && !form.test(text))
      throw new Failure(`The box's answer makes no sense: its ${name} is ${quoted(text)}`);
  }
}

/** Is what follows this change not known before it is made? */
export const unforeseen = ({ reboot, lookAgain }: Change): boolean => Boolean(reboot) || lookAgain === true;

/** Plans of several steps as one, up to a change after which the box must be looked at anew; a preview goes further. */
export function planAll(steps: readonly Step[], want: Want, facts: Facts, preview = false): Change[] {
  const changes: Change[] = [];
  for (const step of steps) {
    changes.push(...step.plan(want, facts));
    if (changes.some((change) => unforeseen(change) || (change.lookAgain && !preview))) break;
  }
  return changes;
}

/** Nodes leave their cluster in turn. */
let turn: Promise<unknown> = Promise.resolve();

/**
 * Applies the plan of `steps` and looks again until nothing is left to do. `all` is what each look takes in.
 *
 * @throws {Failure} when a change fails, or when the same plan is left over after it was applied.
 */
export async function converge(
  job: Job,
  steps: readonly Step[],
  facts: Facts,
  all = steps,
  myTurn = false,
): Promise<Facts> {
  let now = facts;
  for (let before = "", round = 1; ; round++) {
    const changes = planAll(steps, job.want, now);
    if (changes.length === 0) return now;
    if (!myTurn && changes.some((change) => change.alone)) {
      const others = turn.catch(() => {
        throw new Refusal("Not restarted: another node of this call has failed before it");
      });
      const mine = others.then(async () => converge(job, steps, await look(job, all), all, true));
      turn = mine;
      return await mine;
    }
    // How long it took not to answer differs from time to time.
    const same = JSON.stringify(changes.map(({ unknown: _, ...change }) => change));
    if (same === before || round > 6) {
      const unknown = changes.find((change) => change.unknown)?.unknown;
      throw new Failure(
        unknown
          ? `It was done, but it cannot be seen whether all is as wanted: ${unknown}`
          : `Still to be done after it was done: ${changes.map((c) => c.why).join("; ")}`,
        changes[0],
      );
    }
    const { facts: after, waited } = await apply(job, all, changes, now);
    before = waited ? "" : same;
    now = after;
  }
}

/** A look at the box, and what these steps then find to do. */
export const lookAndConverge = async (job: Job, ...steps: Step[]): Promise<Facts> =>
  await converge(job, steps, await look(job, steps));

async function apply(job: Job, all: readonly Step[], changes: Change[], facts: Facts) {
  /** What comes before a push, a restart or the server's part; it is not worth a look, unless it had to wait. */
  const waits = async (some: readonly Change[]) => some.length > 0 && (await trip(job, [], some)).waited;
  const anew = async (waited = true) => ({ facts: await look(job, all), waited });
  const last = changes.at(-1) as Change;
  if (last.reboot && !job.mayReboot) {
    if (await waits(changes.filter((change) => change !== last && !change.alone))) return await anew();
    throw new Refusal(`${last.why}: restart this machine (or add --reboot), then run the same again`);
  }
  let from = 0;
  for (const [i, change] of changes.entries()) {
    if (!change.push && !change.onServer) continue;
    if (await waits(changes.slice(from, i))) return await anew();
    from = i;
    if (change.push) {
      job.progress.says(`copies ${change.push.file} to the box`);
      await job.box.push(change.push.file, change.push.path);
    } else {
      await lookAndConverge({ ...job, box: job.server }, change.onServer as Step);
      from = i + 1;
    }
  }
  const rest = changes.slice(from);
  if (!rest.length) return await anew(false);
  if (!last.reboot) return await trip(job, all, rest);
  if (await waits(rest)) return await anew();
  return { facts: await rebooted(job, all, facts, last.seconds ?? 600), waited: false };
}

/** Waits until the box answers with another boot id. @throws {Failure} after `seconds`, with what was last seen of it. */
async function rebooted(job: Job, all: readonly Step[], facts: Facts, seconds: number): Promise<Facts> {
  const began = Date.now();
  const since = (time: number) => `${Math.round((time - began) / 1000)} s after the order`;
  let seen = began;
  let silence = "";
  await job.box.close();
  while (Date.now() < began + seconds * 1000) {
    await new Promise((done) => setTimeout(done, 3000));
    try {
      const now = await look(job, all);
      if (now.boot && now.boot !== facts.boot) return now;
      seen = Date.now();
      silence = "";
    } catch (error) {
      silence = (error as Error).message;
      await job.box.close();
    }
  }
  const kernel = `kernel ${facts.kernel?.trim()}, boot ${facts.boot?.trim()}`;
  throw new Failure(
    silence
      ? `The box did not come back within ${seconds} s of its restart. Last seen ${since(seen)}, still with ${kernel}; since then: ${silence}. Look at its console at the vendor's: if the new kernel does not start there, choose the old one in the boot menu`
      : `The box did not restart within ${seconds} s: ${since(seen)} it still answered with ${kernel}. "systemctl list-jobs" there says what it waits for`,
  );
}

/** The loop: look at a box, plan, apply, look again. The only place that changes a box. */
import { applyScript, EARLIER_RUN, lookScript, newMark, reader, wrapInMain } from "./protocol.ts";
import type { Box } from "./script.ts";
import { type Change, type Facts, Failure, planAll, Refusal, type Step } from "./step.ts";
import { quoted } from "./text.ts";

/** Time limit of a look in seconds, so that one hanging box does not block the others. */
const LOOK = 120;

/** One round trip that only reads facts. @throws {Failure} when the answer is incomplete. */
export async function look<F extends string>(
  box: Box,
  steps: readonly Step<F>[],
  seconds = LOOK,
): Promise<Facts<F>> {
  return (await trip(box, steps, [], seconds)).facts;
}

/**
 * One round trip: applies the changes, then reads the facts that confirm them. @throws {Failure} naming the failed
 * change.
 */
async function trip<F extends string>(
  box: Box,
  steps: readonly Step<F>[],
  changes: readonly Change[],
  extra = LOOK + EARLIER_RUN,
): Promise<{ facts: Facts<F>; waited: boolean }> {
  const mark = newMark();
  const stream = reader(mark, {
    // The box's output is not trusted: it may name changes that were never sent.
    change: (i) => changes[i] && box.line.starts(changes[i].why),
    say: (text) => box.line.says(text, true),
    early: (fact) => box.early?.(fact),
  });
  const apply = changes.length ? applyScript(changes, mark, (name) => box.want[name]) : "";
  const script = wrapInMain(`${apply}\n${lookScript(steps, box.want, mark)}`);
  const seconds = changes.reduce((sum, change) => sum + (change.seconds ?? 60), extra);
  const { status, stderr } = await box.shell.run(script, seconds, stream.line);
  const { seen } = stream;
  if (seen.failed) {
    const change = changes[seen.failed.i];
    const how =
      seen.failed.status === 124
        ? `timed out after ${change?.seconds ?? 60} s`
        : `exit status ${seen.failed.status}`;
    throw new Failure(`${change?.why ?? "An unknown change"} (${how})`, change, seen.output);
  }
  if (seen.busy !== undefined)
    throw new Failure(
      `An earlier run is still active on this box after ${EARLIER_RUN} s: wait, or end it there (kill ${seen.busy})`,
    );
  if (!seen.ended)
    throw new Failure(`The connection was lost (exit status ${status})`, undefined, seen.output + stderr);
  checkForms(seen.facts);
  return { facts: seen.facts as Facts<F>, waited: seen.waited };
}

/** The form of the base facts. A fact that a box does not have is empty. */
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

/** @throws {Failure} for malformed base facts: no plan is based on them. */
function checkForms(facts: Facts<string>): void {
  for (const [name, form] of Object.entries(FORMS)) {
    const text = facts[name]?.trim();
    if (text && !form.test(text))
      throw new Failure(`Unexpected answer from the box: its ${name} is ${quoted(text)}`);
  }
}

/** Boxes whose node is taken out of service are changed one at a time. */
let turn: Promise<unknown> = Promise.resolve();

/**
 * Applies the plan of `steps` and looks again until nothing is left to do. Each look covers the steps `all`.
 * @throws {Failure} when a change fails, or when the same plan is left over after it was applied.
 */
export async function converge<F extends string>(
  box: Box,
  steps: readonly Step<F>[],
  facts: Facts<F>,
  all = steps,
  myTurn = false,
): Promise<Facts<F>> {
  let now = facts;
  for (let before = "", round = 1; ; round++) {
    const changes = planAll(steps, box.want, now);
    if (changes.length === 0) return now;
    if (!myTurn && changes.some((change) => change.alone)) {
      const others = turn.catch(() => {
        throw new Refusal("Not restarted, because another node of this run has failed");
      });
      const mine = others.then(async () => converge(box, steps, await look(box, all), all, true));
      turn = mine;
      return await mine;
    }
    // The text of `unknown` contains a varying number of seconds.
    const same = JSON.stringify(changes.map(({ unknown: _, ...change }) => change));
    if (same === before || round > 6) {
      const unknown = changes.find((change) => change.unknown)?.unknown;
      throw new Failure(
        unknown
          ? `Applied, but the result could not be verified: ${unknown}`
          : `Applied, but still needed: ${changes.map((c) => c.why).join("; ")}`,
        changes[0],
      );
    }
    const { facts: after, waited } = await apply(box, all, changes, now);
    before = waited ? "" : same;
    now = after;
  }
}

/** Looks at the box, then applies what these steps plan. */
export const lookAndConverge = async <F extends string>(box: Box, ...steps: Step<F>[]): Promise<Facts<F>> =>
  await converge(box, steps, await look(box, steps));

async function apply<F extends string>(
  box: Box,
  all: readonly Step<F>[],
  changes: Change[],
  facts: Facts<F>,
) {
  /** Applies the changes before a push, a restart or a change on the server. True: it waited for an earlier run instead. */
  const waits = async (some: readonly Change[]) => some.length > 0 && (await trip(box, [], some)).waited;
  const anew = async (waited = true) => ({ facts: await look(box, all), waited });
  const last = changes.at(-1) as Change;
  if (last.reboot && !box.mayReboot) {
    if (await waits(changes.filter((change) => change !== last && !change.alone))) return await anew();
    throw new Refusal(`${last.why}: restart this machine (or add --reboot), then run this again`);
  }
  let from = 0;
  for (const [i, change] of changes.entries()) {
    if (!change.push && !change.onServer) continue;
    if (await waits(changes.slice(from, i))) return await anew();
    from = i;
    if (change.push) {
      box.line.says(`copies ${change.push.file} to the box`);
      await box.shell.push(change.push.file, change.push.path);
    } else {
      await lookAndConverge({ ...box, shell: box.server }, change.onServer as Step);
      from = i + 1;
    }
  }
  const rest = changes.slice(from);
  if (!rest.length) return await anew(false);
  if (!last.reboot) return await trip(box, all, rest);
  if (await waits(rest)) return await anew();
  return { facts: await rebooted(box, all, facts, last.seconds ?? 600), waited: false };
}

/** Waits until the box answers with a new boot id. @throws {Failure} after `seconds`, with the last state seen. */
async function rebooted<F extends string>(
  box: Box,
  all: readonly Step<F>[],
  facts: Facts<F>,
  seconds: number,
): Promise<Facts<F>> {
  const began = Date.now();
  const since = (time: number) => `${Math.round((time - began) / 1000)} s after the restart was ordered`;
  let seen = began;
  let silence = "";
  await box.shell.close();
  while (Date.now() < began + seconds * 1000) {
    await new Promise((done) => setTimeout(done, 3000));
    try {
      const now = await look(box, all);
      if (now.boot && now.boot !== facts.boot) return now;
      seen = Date.now();
      silence = "";
    } catch (error) {
      silence = (error as Error).message;
      await box.shell.close();
    }
  }
  const kernel = `kernel ${facts.kernel?.trim()}, boot ${facts.boot?.trim()}`;
  throw new Failure(
    silence
      ? `The box did not come back within ${seconds} s of its restart. Last seen ${since(seen)}, still with ${kernel}; since then: ${silence}. Look at its console at the vendor: if the new kernel does not boot, select the old one in the boot menu`
      : `The box did not restart within ${seconds} s: ${since(seen)} it still answered with ${kernel}. "systemctl list-jobs" on it shows what it waits for`,
  );
}

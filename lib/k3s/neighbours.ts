/** With FIREWALL: boxes beside those of a call, whose firewalls let them in, or those that have left no longer. */

import { jobFor, targets } from "../boxes.ts";
import { converge, look } from "../converge.ts";
import { attempt, showPlan } from "../fleet.ts";
import type { Line } from "../report.ts";
import type { Call, Target } from "../script.ts";
import { Failure, planAll, Refusal } from "../step.ts";
import { boxNames } from "../text.ts";
import { firewall } from "./firewall.ts";

/** With FIREWALL: the boxes of SERVER and AGENTS beside those of this call, which are let in there. */
async function boxesBeside(call: Call, boxes: readonly Target[]): Promise<Target[]> {
  if (!call.letIn) return [];
  const all = { ...call, settings: { ...call.settings, PUBLIC_IP: "" } };
  const named = await Promise.all(
    (["SERVER", "AGENTS"] as const).map(async (name) =>
      call.settings[name] ? await targets(all, name) : [],
    ),
  );
  call.letIn.push(...[...named.flat(), ...boxes].map(({ ip }) => ip));
  return named.flat().filter(({ host, ip }) => !boxes.some((box) => box.host === host || box.ip === ip));
}

/**
 * Has the firewalls of other boxes follow: none is touched where one refuses, and those of servers stand when this
 * answers, for nobody joins before. `done` has the statuses of all.
 * @param retry the box of the call that is to be tried again as a whole; without it, the firewall of the one that failed.
 */
async function follow(
  call: Call,
  ui: { line(name: string): Line },
  boxes: readonly Target[],
  retry?: Target,
): Promise<{ refused: boolean; done: Promise<number[]> }> {
  const steps = [firewall];
  const looked = await Promise.allSettled(
    boxes.map(async (box) => {
      const job = jobFor(call, box, ui.line(box.name));
      const facts = await look(job, steps);
      planAll(steps, job.want, facts);
      return { job, facts };
    }),
  );
  const refused = looked.some((one) => one.status === "rejected" && one.reason instanceof Refusal);
  const all = boxes.map((box, i) =>
    attempt(call, retry ? call.script : firewall.name, retry ?? box, ui.line(box.name), async (line) => {
      const one = looked[i] as (typeof looked)[number];
      if (one.status === "rejected") {
        if (one.reason instanceof Refusal) throw one.reason;
        throw new Failure(
          `${one.reason.message}. Its firewall is as it was: ${retry ? "the removed node is still allowed there" : "the new node is not allowed there yet"}`,
        );
      }
      const { job, facts } = one.value;
      if (call.mode !== "apply") return showPlan(call, box, steps, job, facts);
      if (!refused) line.done((await converge(job, steps, facts)) === facts, "its firewall is up to date");
    }),
  );
  const servers = boxNames(call.settings.SERVER);
  await Promise.all(all.filter((_, i) => refused || servers.includes(boxes[i]?.name as string)));
  return { refused, done: Promise.all(all) };
}

/** How they follow, for a script to declare. */
export const neighbours = { boxes: boxesBeside, follow };

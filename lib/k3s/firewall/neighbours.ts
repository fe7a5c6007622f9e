/** With FIREWALL: updates the firewalls of the other boxes when a box joins or leaves. */

import { boxAt, boxes, isSame } from "../../boxes.ts";
import { look } from "../../converge.ts";
import { attempt, bring } from "../../fleet.ts";
import type { Box, Run } from "../../script.ts";
import { type Facts, Failure, planAll, Refusal } from "../../step.ts";
import { boxNames } from "../../text.ts";
import { firewall } from "./firewall.ts";

/** With FIREWALL: the boxes of SERVER and AGENTS that are not part of this run. */
async function boxesBeside(run: Run, those: readonly Box[]): Promise<Box[]> {
  if (!run.letIn) return [];
  const all = { ...run, settings: { ...run.settings, PUBLIC_IP: "" } };
  const named = [
    ...(run.settings.SERVER ? await boxes(all, "SERVER") : []),
    ...(await boxes(all, "AGENTS")),
  ].map((box) => boxAt(run, box));
  const beside = named.filter((box) => !those.some((other) => isSame(other, box)));
  // A home node that leaves is not let in: its address is that of all others.
  const stay = those.filter(({ ip }) => !run.letIn?.includes(`-${ip}`));
  run.letIn.push(...[...beside, ...stay].map(({ ip }) => ip));
  return beside;
}

/**
 * Has the firewalls of other boxes follow: none is touched where one refuses, and those of servers stand when this
 * answers, for nobody joins before. `done` has the statuses of all.
 * @param retry the box of the run that is to be tried again as a whole; without it, the firewall of the one that failed.
 */
async function follow(
  run: Run,
  others: readonly Box[],
  retry?: Box,
): Promise<{ refused: boolean; done: Promise<number[]> }> {
  const steps = [firewall];
  const looked = await Promise.allSettled(
    others.map(async (box) => {
      const facts = await look(box, steps);
      planAll(steps, box.want, facts);
      return facts;
    }),
  );
  const refused = looked.some((one) => one.status === "rejected" && one.reason instanceof Refusal);
  const follows = async (box: Box, one: PromiseSettledResult<Facts>) => {
    if (one.status === "rejected") {
      if (one.reason instanceof Refusal) throw one.reason;
      throw new Failure(
        `${one.reason.message}. Its firewall is as it was: ${retry ? "the removed node is still allowed there" : "the new node is not allowed there yet"}`,
      );
    }
    if (refused && run.mode === "apply") return;
    const now = await bring(run, box, steps, one.value);
    if (now) box.line.done(now.nothing, "its firewall is up to date");
  };
  const all = others.map((box, i) => {
    const part = () => follows(box, looked[i] as PromiseSettledResult<Facts>);
    return attempt(run, box, part, retry ? run.name : firewall.name, retry);
  });
  const servers = boxNames(run.settings.SERVER);
  await Promise.all(all.filter((_, i) => refused || servers.includes(others[i]?.name as string)));
  return { refused, done: Promise.all(all) };
}

/** How they follow, for a script to declare. */
export const neighbours = { boxes: boxesBeside, follow };

/** Why a script failed on a box: what check finds there, else what its journal says. */
import { boxAt } from "../boxes.ts";
import { meaningOf } from "../k3s/journal.ts";
import type { Role } from "../k3s/unit.ts";
import type { Problem } from "../report.ts";
import type { Box, Run, Script } from "../script.ts";
import { diagnose } from "./diagnose.ts";
import { clusterOf, listed, type Member, surveyAndTry } from "./survey.ts";

/** For scripts whose failure may be caused elsewhere in the cluster. */
export const causes: Required<Script>["causes"] = async (run, script, box, output, retry) => {
  // A firewall failure has no cause elsewhere.
  if (script === "firewall") return [];
  box.line.says("looks for the cause");
  const role = script === "agent" || script === "annotate" ? "agent" : "server";
  // A failed upgrade has been rolled back: only its output tells the cause.
  const problems = script === "upgrade" ? [] : await explain(run, box, role, script);
  const meaning = meaningOf(output, retry);
  return problems.length || !meaning || meaning.remedy.startsWith(`"${retry}"`)
    ? problems
    : [{ box: box.name, ...meaning }];
};

/** Boxes that fail at the same time share one look. */
let underWay: Promise<Member[]> | undefined;

/** Problems that explain a failure: of the box itself, else of any other; without those that the script was to fix. */
export function causesOf(problems: readonly Problem[], name: string | undefined, script: string): Problem[] {
  const own = problems.filter(({ box }) => box === name);
  const itself = new RegExp(`^make ${script}(?![\\w-])`);
  return (own.length ? own : problems).filter(({ box, remedy }) => box !== name || !itself.test(remedy));
}

/** Why a script failed on a box, as check reports it; empty if not known. */
async function explain(run: Run, failed: Box, role: Role, script: string): Promise<Problem[]> {
  try {
    // Without SERVER the script runs on the failed box itself, and knows no other.
    const boxes = run.settings.SERVER ? await listed(run) : [];
    const known = boxes.some(({ box }) => box.host === failed.host);
    if (!known) boxes.push({ box: boxAt(run, failed), role });
    const look = (known && underWay) || surveyAndTry(boxes);
    if (known) underWay = look;
    const members = await look.finally(() => {
      if (underWay === look) underWay = undefined;
    });
    const { boxes: seen, ...cluster } = clusterOf(members);
    // Devices are no node's concern.
    const problems = diagnose({ ...cluster, boxes: seen.map((box) => ({ ...box, entry: undefined })) });
    const name = members.find(({ box }) => box.host === failed.host)?.box.name;
    return causesOf(problems, name, script);
  } catch {
    return [];
  }
}

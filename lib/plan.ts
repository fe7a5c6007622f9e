/** What a dry run with --json collects, and the document that it becomes. */
import type { Line } from "./report.ts";
import { type Change, unforeseen } from "./step.ts";
import { jsonOf, redacted } from "./text.ts";

/** What is to be done on a box in one part of the run, or why it is not known. */
interface Part {
  box: { name: string; ip: string; line: Line };
  changes: readonly Change[];
  error?: string;
}

export interface Plan {
  parts: Part[];
  /** What follows, and can be planned only then. */
  later: string[];
}

/** How much there is to do: 0 is what CI asks for. */
const todo = ({ parts, later }: Plan): number =>
  parts.reduce((sum, { changes }) => sum + changes.length, later.length);

/** Exit status of a dry run with --json that has succeeded: 3 if there is something to do. */
export const planStatus = (plan: Plan): 0 | 3 => (todo(plan) ? 3 : 0);

/**
 * The document. Shell code is left out: it is long, and PRINT=1 prints it. Parts are in the order of the output's boxes,
 * whichever was examined first.
 */
export function documentOf(script: string, plan: Plan): string {
  const parts = plan.parts.toSorted((a, b) => a.box.line.row - b.box.line.row);
  return jsonOf({
    script,
    todo: todo(plan),
    failed: parts.filter(({ error }) => error !== undefined).length,
    boxes: parts.map(partOf),
    later: plan.later.map(redacted),
  });
}

function partOf({ box, changes, error }: Part) {
  const assumes = changes.flatMap((change) => change.assumes ?? []);
  return {
    name: box.name,
    address: box.ip,
    changes: changes.map(({ why, detail, reboot, onServer }) => ({
      why: redacted(why),
      ...(detail?.length ? { detail: redacted(detail.join("\n")).split("\n") } : {}),
      ...(onServer ? { on: "server" } : {}),
      ...(reboot ? { reboot } : {}),
    })),
    ...(assumes.length ? { assumes: assumes.map(redacted) } : {}),
    ...(changes.some(unforeseen)
      ? { later: ["look again: the rest of the plan depends on these changes"] }
      : {}),
    ...(error === undefined ? {} : { error: redacted(error) }),
  };
}

/** Runs on several boxes in parallel: a failure is reported with the command to retry, and does not stop the others. */
import { boxes as boxesOf } from "./boxes.ts";
import { converge, look } from "./converge.ts";
import { updateEnv } from "./env-file.ts";
import { Unwritten } from "./files.ts";
import { asScript } from "./protocol.ts";
import { forTerminal, watch } from "./report.ts";
import { type Box, type Run, switchOf } from "./script.ts";
import { check, givenNow, isSecret, NAMES, SettingError, type Settings } from "./settings.ts";
import { quote } from "./sh.ts";
import { Unreachable } from "./shell.ts";
import { type Change, type Facts, Failure, planAll, Refusal, type Step, unforeseen } from "./step.ts";
import { NAT, SETTINGS, type SettingName } from "./table.ts";
import { hide, splitWords } from "./text.ts";

/** Runs a script's steps on every box of the run, in parallel; a failure does not stop the others. */
export async function fanOut(run: Run): Promise<number> {
  const { script, settings } = run;
  const known = splitWords(`${settings.SERVER} ${settings.AGENTS}`);
  if (run.origins.HOST === "default" && script.host !== "SERVER" && known.length)
    throw new SettingError(
      `HOST is not set: expected some of ${known.join(", ")}, or HOST= (empty) for this machine`,
    );
  let boxes = await boxesOf(run, run.origins.HOST === "default" ? (script.host ?? "HOST") : "HOST");
  if (script.host && !script.everyServer && run.origins.HOST === "default") boxes = boxes.slice(0, 1);
  script.examine?.(run, boxes);
  const others = (await script.others?.boxes(run, boxes)) ?? [];
  await watch([...boxes, ...others]);
  // The others' firewalls do not admit a box that cannot be set up. Whether it can join is known only afterwards.
  const before = script.steps.slice(
    0,
    script.steps.findIndex(({ name }) => name === run.name),
  );
  const tried = await each(run, others.length ? boxes : [], async (box) => {
    planAll(before, box.want, await look(box, before));
  });
  const [lost, fit] = [boxes.filter((_, i) => tried[i]), boxes.filter((_, i) => !tried[i])];
  if (!fit.length || (lost.length && script.everyServer)) return worst(tried);
  run.letIn = run.letIn?.filter((ip) => ip === NAT || !lost.some((box) => box.ip === ip));
  const following = await script.others?.follow(run, others);
  if (following?.refused) return 1;
  const one = async (box: Box) => {
    const now = await bring(run, box, script.steps);
    if (!now) return;
    const learned = await learn(run, script.steps, box, now.facts);
    box.line.done(now.nothing, script.nothing?.(box.want, now.facts));
    Object.assign(run.settings, learned);
  };
  // Further servers join with the URL and token of the first.
  const first = script.everyServer ? fit.splice(0, 1) : [];
  const done = [...tried, ...(await each(run, first, one))];
  if (worst(done) === 0 || !first.length) done.push(...(await each(run, fit, one)));
  return worst([...done, ...((await following?.done) ?? [])]);
}

/** Looks at a box and applies the plan of these steps. A dry run shows the plan, and returns undefined. */
export async function bring<F extends string>(
  run: Run,
  box: Box,
  steps: readonly Step<F>[],
  facts?: Facts<F>,
): Promise<{ facts: Facts<F>; nothing: boolean } | undefined> {
  const found = facts ?? (await look(box, steps));
  if (run.mode !== "apply") return void showPlan(run, box, steps, found);
  const after = await converge(box, steps, found);
  return { facts: after, nothing: after === found };
}

/** Exit status for several boxes: 1 (a failure) takes precedence over 2 (a wrong setting, nothing touched). */
export const worst = (statuses: readonly number[]): number =>
  statuses.includes(1) ? 1 : Math.max(0, ...statuses);

/**
 * Calls `part` for each box in parallel, and returns their exit statuses. A failure is reported with the command to
 * retry, and does not stop the others.
 */
export const each = (
  run: Run,
  boxes: readonly Box[],
  part: (box: Box) => Promise<void>,
  script = run.name,
): Promise<number[]> => Promise.all(boxes.map((box) => attempt(run, box, () => part(box), script)));

/** The same for one box. `again`: the box in the command to retry, if it is another one. */
export async function attempt(
  run: Run,
  box: Box,
  part: () => Promise<void>,
  script = run.name,
  again = box,
): Promise<number> {
  try {
    await part();
    return 0;
  } catch (error) {
    const { message, change, output } = error as Failure;
    const known = [Failure, Refusal, Unreachable, Unwritten, SettingError].some(
      (type) => error instanceof type,
    );
    const retry = retryLine(run, script, again);
    // Causes are looked for only when a change failed, not when the box waited for another one.
    run.plan?.parts.push({ box, changes: [], error: message });
    const problems =
      error instanceof Failure && change
        ? ((await run.script.causes?.(run, script, again, output, retry)) ?? [])
        : [];
    box.line.failed(message, change, known ? output : (error as Error).stack, retry, problems);
    return error instanceof SettingError ? 2 : 1;
  }
}

const takesHost = (step: Step) => step.options.includes("HOST");

/** Quotes a value for make's command line: the shell removes the quotes, and make halves each $$. */
export const forMake = (value: string): string => quote(value.replaceAll("$", () => "$$"));

/** The command to retry, with everything given for this run except secrets. */
function retryLine(run: Run, script: string, box: Box): string {
  const given = NAMES.filter((n) => n !== "HOST" && !("secret" in SETTINGS[n]) && givenNow(run.origins, n));
  const local = run.origins.HOST !== "default" || run.script.work ? "HOST=" : "";
  // A script for the whole cluster is retried as a whole.
  const whole = script === run.name && run.script.work && !run.script.steps.some(takesHost);
  const own = [
    whole ? "" : box.host ? `HOST=${quote(box.word)}` : local,
    ...given.map((n) => `${n}=${forMake(run.settings[n])}`),
    ...(script === run.name ? [...run.flags] : []).map((flag) => `${switchOf(flag)}=1`),
    // A dry run is retried as a dry run.
    run.mode === "dry-run" ? "DRY=1" : run.mode === "print" ? "PRINT=1" : "",
    run.plan ? "JSON=1" : "",
    run.reboot ? "REBOOT=1" : "",
  ];
  // Variables that the env file cannot hold.
  const files = ["ENV_FILE", ...(["kubeconfig", "certs"].includes(script) ? ["KUBECONFIG"] : [])]
    .filter((name) => process.env[name])
    .map((name) => `${name}=${forMake(process.env[name] as string)}`);
  return ["make", script, ...own, ...files].filter(Boolean).join(" ");
}

/** Shows the plan of a dry run, or prints it as a script. */
export function showPlan(run: Run, box: Box, steps: readonly Step[], facts: Facts): void {
  const changes: Change[] = planAll(steps, box.want, facts, true);
  if (run.plan) run.plan.parts.push({ box, changes });
  else if (run.mode === "print")
    process.stdout.write(
      changes.length ? `# on ${box.name}\n${asScript(changes)}` : `# on ${box.name}: nothing to do\n`,
    );
  else
    process.stdout.write(
      changes.length
        ? forTerminal(
            `${box.name}: ${changes.length} to do\n${changes.map(planned).join("")}${changes.some(unforeseen) ? "  … then look again\n" : ""}${changes.map(({ assumes }) => (assumes ? `  … if ${assumes}\n` : "")).join("")}`,
          )
        : `${box.name}: nothing to do\n`,
    );
}

/** Shows what follows on the plan of a dry run, and can be planned only then. */
export function showLater(run: Run, what: string): void {
  if (run.plan) run.plan.later.push(what);
  else process.stdout.write(forTerminal(`${run.mode === "print" ? "# " : ""}then: ${what}\n`));
}

/** Settings that the steps learned from the facts. @throws {SettingError} for an invalid value. */
export function learnedFrom(steps: readonly Step[], box: Box, facts: Facts): Partial<Settings> {
  const values: Partial<Settings> = Object.assign(
    {},
    ...steps.map((step) => step.learn?.(box.want, facts) ?? {}),
  );
  hide(Object.entries(values).flatMap(([name, value]) => (isSecret(name) ? [value] : [])));
  for (const [name, value] of Object.entries(values))
    check(name as SettingName, value, `learned from ${box.host || "this machine"}`);
  return values;
}

/** A change as a dry run shows it, with a line for each difference of a file. */
const planned = ({ why, detail = [] }: Change, i: number) =>
  `  ${i + 1}. ${detail.length ? why.replace(/: .*/, ":") : why}\n${detail.map((line) => `       ${line}\n`).join("")}`;

/** Writes what the steps learned to the env file. */
export async function learn(
  run: Run,
  steps: readonly Step[],
  box: Box,
  facts: Facts,
): Promise<Partial<Settings>> {
  const values = learnedFrom(steps, box, facts);
  if (Object.keys(values).length) await updateEnv(run.envFile, values as Record<string, string>);
  return values;
}

/** Runs boxes side by side: a failure is reported with the command to retry, and does not stop the others. */
import { boxes as boxesOf } from "./boxes.ts";
import { converge, look } from "./converge.ts";
import { updateEnv } from "./env-file.ts";
import { Unwritten } from "./files.ts";
import { printed } from "./protocol.ts";
import { plain, watch } from "./report.ts";
import { type Box, type Call, switchOf } from "./script.ts";
import { check, givenNow, isSecret, NAMES, SettingError, type Settings } from "./settings.ts";
import { quote } from "./sh.ts";
import { Unreachable } from "./shell.ts";
import { type Change, type Facts, Failure, planAll, Refusal, type Step, unforeseen } from "./step.ts";
import { SETTINGS, type SettingName } from "./table.ts";
import { hide, splitWords } from "./text.ts";

/** Runs a script's steps on every box of the run, side by side; a failure does not stop the others. */
export async function fanOut(call: Call): Promise<number> {
  const { recipe, settings } = call;
  const known = splitWords(`${settings.SERVER} ${settings.AGENTS}`);
  if (call.origins.HOST === "default" && recipe.host !== "SERVER" && known.length)
    throw new SettingError(
      `HOST is not set: expected some of ${known.join(", ")}, or HOST= (empty) for this machine`,
    );
  let boxes = await boxesOf(call, call.origins.HOST === "default" ? (recipe.host ?? "HOST") : "HOST");
  if (recipe.host && !recipe.everyServer && call.origins.HOST === "default") boxes = boxes.slice(0, 1);
  recipe.examine?.(call, boxes);
  const others = (await recipe.others?.boxes(call, boxes)) ?? [];
  await watch([...boxes, ...others]);
  // A box that cannot be set up is not let in by the others' firewalls. Whether it can join is known only afterwards.
  const before = recipe.steps.slice(
    0,
    recipe.steps.findIndex(({ name }) => name === call.script),
  );
  const tried = await each(call, others.length ? boxes : [], async (box) => {
    planAll(before, box.want, await look(box, before));
  });
  const [lost, fit] = [boxes.filter((_, i) => tried[i]), boxes.filter((_, i) => !tried[i])];
  if (!fit.length || (lost.length && recipe.everyServer)) return worst(tried);
  call.letIn = call.letIn?.filter((ip) => !lost.some((box) => box.ip === ip));
  const following = await recipe.others?.follow(call, others);
  if (following?.refused) return 1;
  const one = async (box: Box) => {
    const now = await bring(call, box, recipe.steps);
    if (!now) return;
    const learned = await learn(call, recipe.steps, box, now.facts);
    box.line.done(now.nothing, recipe.nothing?.(box.want, now.facts));
    Object.assign(call.settings, learned);
  };
  // Further servers join with the URL and token of the first.
  const first = recipe.everyServer ? fit.splice(0, 1) : [];
  const done = [...tried, ...(await each(call, first, one))];
  if (worst(done) === 0 || !first.length) done.push(...(await each(call, fit, one)));
  return worst([...done, ...((await following?.done) ?? [])]);
}

/** Brings a box through steps, from a look at it on. A dry run shows what that would be, and answers nothing. */
export async function bring(
  call: Call,
  box: Box,
  steps: readonly Step[],
  facts?: Facts,
): Promise<{ facts: Facts; nothing: boolean } | undefined> {
  const found = facts ?? (await look(box, steps));
  if (call.mode !== "apply") return void showPlan(call, box, steps, found);
  const after = await converge(box, steps, found);
  return { facts: after, nothing: after === found };
}

/** Exit status for several boxes: 1 (a failure) takes precedence over 2 (a wrong setting, nothing touched). */
export const worst = (statuses: readonly number[]): number =>
  statuses.includes(1) ? 1 : Math.max(0, ...statuses);

/**
 * Does a part on each box, side by side, and answers their exit statuses; a failure is said with the line that tries it
 * again, and stops none of the others.
 */
export const each = (
  call: Call,
  boxes: readonly Box[],
  part: (box: Box) => Promise<void>,
  script = call.script,
): Promise<number[]> => Promise.all(boxes.map((box) => attempt(call, box, () => part(box), script)));

/** The same on one box. `again` is the box that is tried again in its place. */
export async function attempt(
  call: Call,
  box: Box,
  part: () => Promise<void>,
  script = call.script,
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
    const retry = retryLine(call, script, again);
    // Causes are looked for only when a change failed, not when the box waited for another one.
    const problems =
      error instanceof Failure && change
        ? ((await call.recipe.causes?.(call, script, again, output, retry)) ?? [])
        : [];
    box.line.failed(message, change, known ? output : (error as Error).stack, retry, problems);
    return error instanceof SettingError ? 2 : 1;
  }
}

const takesHost = (step: Step) => step.options.includes("HOST");

/** Quotes a value for make's command line: the shell removes the quotes, and make halves each $$. */
export const forMake = (value: string): string => quote(value.replaceAll("$", () => "$$"));

/** The command to retry, with everything given for this run except secrets. */
function retryLine(call: Call, script: string, box: Box): string {
  const given = NAMES.filter((n) => n !== "HOST" && !("secret" in SETTINGS[n]) && givenNow(call.origins, n));
  const local = call.origins.HOST !== "default" || call.recipe.work ? "HOST=" : "";
  // A script for the whole cluster is retried as a whole.
  const whole = script === call.script && call.recipe.work && !call.recipe.steps.some(takesHost);
  const own = [
    whole ? "" : box.host ? `HOST=${quote(box.word)}` : local,
    ...given.map((n) => `${n}=${forMake(call.settings[n])}`),
    ...(script === call.script ? [...call.flags] : []).map((flag) => `${switchOf(flag)}=1`),
    // A dry run is retried as a dry run.
    call.mode === "dry-run" ? "DRY=1" : call.mode === "print" ? "PRINT=1" : "",
    call.reboot ? "REBOOT=1" : "",
  ];
  // Variables that the env file cannot hold.
  const files = ["ENV_FILE", ...(script === "kubeconfig" ? ["KUBECONFIG"] : [])]
    .filter((name) => process.env[name])
    .map((name) => `${name}=${forMake(process.env[name] as string)}`);
  return ["make", script, ...own, ...files].filter(Boolean).join(" ");
}

export function showPlan(call: Call, box: Box, steps: readonly Step[], facts: Facts): void {
  const changes: Change[] = planAll(steps, box.want, facts, true);
  if (call.mode === "print")
    process.stdout.write(
      changes.length ? `# on ${box.name}\n${printed(changes)}` : `# on ${box.name}: nothing to do\n`,
    );
  else
    process.stdout.write(
      changes.length
        ? plain(
            `${box.name}: ${changes.length} to do\n${changes.map(planned).join("")}${changes.some(unforeseen) ? "  … then look again\n" : ""}${changes.map(({ assumes }) => (assumes ? `  … if ${assumes}\n` : "")).join("")}`,
          )
        : `${box.name}: nothing to do\n`,
    );
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
  call: Call,
  steps: readonly Step[],
  box: Box,
  facts: Facts,
): Promise<Partial<Settings>> {
  const values = learnedFrom(steps, box, facts);
  if (Object.keys(values).length) await updateEnv(call.envFile, values as Record<string, string>);
  return values;
}

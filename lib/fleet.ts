/** Boxes side by side: one that fails is said with the line that tries it again, and stops none of the others. */
import { jobFor, targets } from "./boxes.ts";
import { converge, type Job, look } from "./converge.ts";
import { updateEnv } from "./env-file.ts";
import { Unwritten } from "./files.ts";
import { printed } from "./protocol.ts";
import { type Line, plain, report } from "./report.ts";
import { type Call, switchOf, type Target } from "./script.ts";
import { check, givenNow, isSecret, NAMES, SettingError, type Settings } from "./settings.ts";
import { quote } from "./sh.ts";
import { Unreachable } from "./shell.ts";
import { type Change, type Facts, Failure, planAll, Refusal, type Step, unforeseen } from "./step.ts";
import { SETTINGS, type SettingName } from "./table.ts";
import { hide, splitWords } from "./text.ts";

/** One recipe on every box of the call, side by side: one that fails stops none of the others. */
export async function fanOut(call: Call): Promise<number> {
  const { recipe, settings } = call;
  const known = splitWords(`${settings.SERVER} ${settings.AGENTS}`);
  if (call.origins.HOST === "default" && recipe.host !== "SERVER" && known.length)
    throw new SettingError(
      `HOST is not set: expected some of ${known.join(", ")}, or HOST= (empty) for this machine`,
    );
  let boxes = await targets(call, call.origins.HOST === "default" ? (recipe.host ?? "HOST") : "HOST");
  if (recipe.host && !recipe.everyServer && call.origins.HOST === "default") boxes = boxes.slice(0, 1);
  recipe.examine?.(call, boxes);
  const others = (await recipe.others?.boxes(call, boxes)) ?? [];
  const ui = await report([...boxes, ...others].map((box) => box.name));
  // Who cannot be set up is let in nowhere. Whether it can join shows only when it is let in.
  const before = recipe.steps.slice(
    0,
    recipe.steps.findIndex(({ name }) => name === call.script),
  );
  const tried = await Promise.all(
    (others.length ? boxes : []).map((box) =>
      attempt(call, call.script, box, ui.line(box.name), async (line) => {
        const job = jobFor(call, box, line);
        planAll(before, job.want, await look(job, before));
      }),
    ),
  );
  const [lost, fit] = [boxes.filter((_, i) => tried[i]), boxes.filter((_, i) => !tried[i])];
  if (!fit.length || (lost.length && recipe.everyServer)) return worst(tried);
  call.letIn = call.letIn?.filter((ip) => !lost.some((box) => box.ip === ip));
  const following = await recipe.others?.follow(call, ui, others);
  if (following?.refused) return 1;
  const one = (box: Target) =>
    attempt(call, call.script, box, ui.line(box.name), async (line) => {
      const job = jobFor(call, box, line);
      const facts = await look(job, recipe.steps);
      if (call.mode !== "apply") return showPlan(call, box, recipe.steps, job, facts);
      const after = await converge(job, recipe.steps, facts);
      Object.assign(call.settings, await learn(call, recipe.steps, job, after));
      line.done(facts === after, recipe.nothing?.(job.want, after));
    });
  // Further servers join by what the first one teaches.
  const first = recipe.everyServer ? fit.splice(0, 1) : [];
  const done = [...tried];
  for (const box of first) done.push(await one(box));
  if (worst(done) === 0 || !first.length) done.push(...(await Promise.all(fit.map(one))));
  return worst([...done, ...((await following?.done) ?? [])]);
}

/** Exit status of several boxes: a failure counts more than a wrong setting, which touched nothing. */
export const worst = (statuses: readonly number[]): number =>
  statuses.includes(1) ? 1 : Math.max(0, ...statuses);

/** Runs one box's part and answers its exit status; a failure is said with the line that tries it again. */
export async function attempt(
  call: Call,
  script: string,
  box: Target,
  line: Line,
  part: (line: Line) => Promise<void>,
) {
  try {
    await part(line);
    return 0;
  } catch (error) {
    const { message, change, output } = error as Failure;
    const known = [Failure, Refusal, Unreachable, Unwritten, SettingError].some(
      (type) => error instanceof type,
    );
    const retry = again(call, script, box);
    // What failed has to be a change: who only waited for another box has no cause of its own.
    const problems =
      error instanceof Failure && change
        ? ((await call.recipe.causes?.(call, script, box, line, output, retry)) ?? [])
        : [];
    line.failed(message, change, known ? output : (error as Error).stack, retry, problems);
    return error instanceof SettingError ? 2 : 1;
  }
}

const takesHost = (step: Step) => step.options.includes("HOST");

/** A value on make's command line: the shell takes the quotes, and make the second $. */
export const forMake = (value: string): string => quote(value.replaceAll("$", () => "$$"));

/** The command that tries it again: what was given for this call is given again, but for secrets. */
function again(call: Call, script: string, box: Target): string {
  const given = NAMES.filter((n) => n !== "HOST" && !("secret" in SETTINGS[n]) && givenNow(call.origins, n));
  const local = call.origins.HOST !== "default" || call.recipe.work ? "HOST=" : "";
  // A script that looks after a whole cluster is tried again as a whole.
  const whole = script === call.script && call.recipe.work && !call.recipe.steps.some(takesHost);
  const own = [
    whole ? "" : box.host ? `HOST=${quote(box.word)}` : local,
    ...given.map((n) => `${n}=${forMake(call.settings[n])}`),
    ...(script === call.script ? [...call.flags] : []).map((flag) => `${switchOf(flag)}=1`),
    // What only looked is not done in earnest by a line that was pasted.
    call.mode === "dry-run" ? "DRY=1" : call.mode === "print" ? "PRINT=1" : "",
    call.reboot ? "REBOOT=1" : "",
  ];
  // What the env file cannot say.
  const files = ["ENV_FILE", ...(script === "kubeconfig" ? ["KUBECONFIG"] : [])]
    .filter((name) => process.env[name])
    .map((name) => `${name}=${forMake(process.env[name] as string)}`);
  return ["make", script, ...own, ...files].filter(Boolean).join(" ");
}

export function showPlan(call: Call, box: Target, steps: readonly Step[], job: Job, facts: Facts): void {
  const changes: Change[] = planAll(steps, job.want, facts, true);
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

/** What the steps learned from the facts. @throws {SettingError} where it cannot be a setting's value. */
export function learnedFrom(steps: readonly Step[], job: Job, facts: Facts): Partial<Settings> {
  const values: Partial<Settings> = Object.assign(
    {},
    ...steps.map((step) => step.learn?.(job.want, facts) ?? {}),
  );
  hide(Object.entries(values).flatMap(([name, value]) => (isSecret(name) ? [value] : [])));
  for (const [name, value] of Object.entries(values))
    check(name as SettingName, value, `learned from ${job.box.host || "this machine"}`);
  return values;
}

/** A change as a dry run shows it: the differences of a file have a line each. */
const planned = ({ why, detail = [] }: Change, i: number) =>
  `  ${i + 1}. ${detail.length ? why.replace(/: .*/, ":") : why}\n${detail.map((line) => `       ${line}\n`).join("")}`;

/** Writes what the steps learned to the env file. */
export async function learn(
  call: Call,
  steps: readonly Step[],
  job: Job,
  facts: Facts,
): Promise<Partial<Settings>> {
  const values = learnedFrom(steps, job, facts);
  if (Object.keys(values).length) await updateEnv(call.envFile, values as Record<string, string>);
  return values;
}

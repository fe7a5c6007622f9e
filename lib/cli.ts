/** What every script has in common: its flags and --help, which boxes it is for, and its exit status. */

import { existsSync, realpathSync } from "node:fs";
import { hostname } from "node:os";
import { join, relative } from "node:path";
import minimist from "minimist";
import { readEnv, updateEnv } from "./env-file.ts";
import { noFile, Unwritten } from "./files.ts";
import { type Ill, type Line, plain, report } from "./report.ts";
import {
  check,
  flagOf,
  givenNow,
  NAMES,
  type Origins,
  SettingError,
  type Settings,
  settle,
} from "./settings.ts";
import { sh } from "./sh.ts";
import { addressOf, closeAll, open, Unreachable } from "./shell.ts";
import {
  type Change,
  converge,
  type Facts,
  Failure,
  type Job,
  look,
  planAll,
  printed,
  Refusal,
  type Step,
  unforeseen,
  type Want,
} from "./step.ts";
import { publicIp, SETTINGS, type SettingName } from "./table.ts";
import { hide, nameOf, quoted, splitWords } from "./text.ts";

/** What a script is: its steps in order, and what to say when there is nothing to do. */
export interface Recipe {
  about: string;
  steps: readonly Step[];
  /** Settings that must not be empty, and where they come from. */
  needs?: Partial<Record<SettingName, string>>;
  /** The setting that names the box when HOST does not. */
  host?: "SERVER";
  /** With `host`: it is for all servers, and the first one goes before the others. */
  everyServer?: true;
  /** It goes to all boxes, whatever HOST says: what there is for one of them. A HOST of the call is refused. */
  everyBox?: string;
  /** A box's address may be unknown: a step asks for PUBLIC_IP where it needs it. */
  asksLate?: true;
  /** With `host`: how the boxes must be together. @throws {SettingError} */
  examine?(call: Call, boxes: readonly Target[]): void;
  nothing?(want: Settings, facts: Facts): string;
  /** Where more is to be done than these steps on each box. Answers the exit status. */
  work?(call: Call): Promise<number>;
  /** Switches of its own and their help. */
  flags?: Record<string, string>;
  /** Will it have to write the env file, as far as that can be known before? */
  writes?(want: Settings, known: Record<string, string>): boolean;
  /** It changes nothing on a box: it has no --dry-run, --print and --reboot. */
  readOnly?: true;
  /** Boxes beside those of the call that have to follow before anything is done, and how they do. */
  others?: {
    boxes(call: Call, boxes: readonly Target[]): Promise<Target[]>;
    follow(
      call: Call,
      ui: { line(name: string): Line },
      others: readonly Target[],
    ): Promise<{ refused: boolean; done: Promise<number[]> }>;
  };
  /** Why a change failed, as far as the cause is elsewhere than where it shows; `output` is what it said. */
  causes?(call: Call, script: string, box: Target, line: Line, output: string, retry: string): Promise<Ill[]>;
  /** What the files that settings name hold, in their settings' places. @throws {SettingError} */
  filesOf?(want: Settings): Promise<Partial<Settings>>;
  /** What has to be known of all boxes before anything is done. @throws {SettingError} */
  prepare?(call: Call): Promise<void>;
  /** A box's settings as its steps read them, where they depend on other boxes too. */
  wantOnBox?(call: Call, box: Target, want: Want): Want;
}

/** A box of this call. */
export interface Target {
  host: string;
  ip: string;
  /** The word that names it in its setting: HOST or HOST=PUBLIC_IP. */
  word: string;
  /** As the user reads it: the host without its user, or this machine's name. */
  name: string;
}

type Mode = "apply" | "dry-run" | "print";

export interface Call {
  script: string;
  recipe: Recipe;
  settings: Settings;
  origins: Origins;
  /**
   * By a box's name ("" for one that has none here) what it has in place of those: its own lines of the env file,
   * and what is in the files that are named.
   */
  own: Record<string, Partial<Settings>>;
  /** Public addresses of SERVER and AGENTS, where the boxes have a proxy that must not come between them. */
  addresses: { servers: string[]; agents: string[] };
  /** With FIREWALL: whom each box lets in, and as -ADDRESS whom no longer. */
  letIn?: string[];
  envFile: string;
  mode: Mode;
  reboot: boolean;
  /** The recipe's own switches that were given. */
  flags: ReadonlySet<string>;
}

const PROJECT = join(import.meta.dirname, "..");

const SIGNALS = { SIGHUP: 1, SIGINT: 2, SIGQUIT: 3, SIGTERM: 15 };

/**
 * Runs a script when it is the program itself, not an import. Exit status: 0 done or nothing to do, 1 failed,
 * 2 a setting is wrong (nothing was touched), 128 and a signal's number: interrupted.
 */
export async function runScript(meta: ImportMeta, recipe: Recipe): Promise<void> {
  // import.meta.main is missing in Node 20.
  if (!process.argv[1] || realpathSync(process.argv[1]) !== realpathSync(meta.filename)) return;
  let ends = false;
  for (const [signal, number] of Object.entries(SIGNALS))
    process.on(signal, () => {
      // make hands a SIGTERM on to a script that has had it with its process group; a second Ctrl-C does not wait.
      if (ends && signal !== "SIGINT") return;
      if (ends) process.exit(128 + number);
      ends = true;
      process.stderr.write(
        "\nInterrupted. A change that was begun ends on its box; run the same again to finish.\n",
      );
      void closeAll().finally(() => process.exit(128 + number));
    });
  for (const stream of [process.stdout, process.stderr]) {
    const write = stream.write.bind(stream) as (...given: unknown[]) => boolean;
    // Deno throws where it writes.
    stream.write = (...given: unknown[]) => {
      try {
        return write(...given);
      } catch (error) {
        return !stream.emit("error", error);
      }
    };
    stream.on("error", (error: NodeJS.ErrnoException) => {
      // Nobody reads on, as in `make check | head`: no more than SIGPIPE would say is said. Or its disk is full.
      const isShut = error.code === "EPIPE";
      if (!isShut && stream === process.stdout) process.stderr.write(`Standard output: ${error.message}\n`);
      void closeAll().finally(() => process.exit(isShut ? 128 + 13 : 1));
    });
  }
  try {
    process.exitCode = await main(meta, recipe);
  } catch (error) {
    const isSetting = error instanceof SettingError;
    if (!isSetting && !(error instanceof Unwritten)) throw error;
    process.stderr.write(`${plain(error.message).replaceAll(/[\n\t]/g, " ")}\n`);
    process.exitCode = isSetting ? 2 : 1;
  } finally {
    await closeAll();
  }
}

async function main(meta: ImportMeta, recipe: Recipe): Promise<number> {
  const script = /([\w-]+)\.ts$/.exec(meta.filename)?.[1] as string;
  const flags = flagsOf(process.argv.slice(2), switchesOf(recipe));
  if (flags.help) {
    process.stdout.write(help(script, relative(PROJECT, meta.filename), recipe));
    return 0;
  }
  const envFile = envFileBy(process.env.ENV_FILE ?? "");
  // csh and its like export HOST as this machine's own name.
  const env = { ...process.env, HOST: process.env.HOST === hostname() ? undefined : process.env.HOST };
  const { settings, origins, own } = settle(flags, env, shown(envFile));
  // In an env file it may be there for other scripts.
  if (recipe.everyBox && settings.HOST && givenNow(origins, "HOST"))
    throw new SettingError(
      `HOST is ${quoted(settings.HOST)} (${origins.HOST}): expected none, for make ${script} goes to all boxes; ${recipe.everyBox}`,
    );
  const needs = Object.entries(recipe.needs ?? {}).find(([name]) => !settings[name as SettingName]);
  const none = recipe.work || needs ? unnamed(settings, origins, envFile) : undefined;
  if (none) throw new SettingError(none);
  if (needs) throw new SettingError(`${needs[0]} is not set: expected ${needs[1]} ${shown(envFile)}`);
  if (!flags.print && !flags["dry-run"] && recipe.writes?.(settings, readEnv(envFile).values))
    await tryEnv(envFile);
  own[""] = {};
  for (const name of Object.keys(own))
    own[name] = { ...own[name], ...(await recipe.filesOf?.({ ...settings, ...own[name] })) };
  const secrets = NAMES.filter(isSecret);
  hide([settings, ...Object.values(own)].flatMap((of) => secrets.flatMap((name) => of[name] ?? [])));
  const mode = flags.print ? "print" : flags["dry-run"] ? "dry-run" : "apply";
  const call: Call = {
    ...{ script, recipe, settings, origins, own, envFile, mode },
    addresses: { servers: [], agents: [] },
    reboot: Boolean(flags.reboot),
    flags: new Set(Object.keys(recipe.flags ?? {}).filter((name) => flags[name])),
  };
  await recipe.prepare?.(call);
  return await (recipe.work ?? fanOut)(call);
}

/** @throws {SettingError} for a file that was named and is not there, and for what is no file. */
function envFileBy(named: string): string {
  const path = named || join(PROJECT, ".env");
  const wrong = noFile(path) ?? (named && !existsSync(path) && "not there");
  if (!wrong) return path;
  throw new SettingError(
    `ENV_FILE is ${quoted(shown(path))}, which is ${wrong}: expected a file with the settings of a cluster${wrong === "not there" ? `; a new one is made by cp ${sh(shown(join(PROJECT, "env.example")))} ${sh(shown(path))}` : ""}`,
  );
}

/** Before any box is touched. @throws {SettingError} for an env file that cannot be written. */
async function tryEnv(path: string): Promise<void> {
  try {
    await updateEnv(path, undefined);
  } catch (error) {
    if (!(error instanceof Unwritten)) throw error;
    throw new SettingError(`The env file is to be written by this: ${error.message}`);
  }
}

const addressesIn = (text: string): string[] => text.match(/\d+(\.\d+){3}/g) ?? [];
const EXAMPLES = addressesIn(`${SETTINGS.SERVER.example} ${SETTINGS.AGENTS.example}`);
/** Does a box have an address of env.example? It would be timed out on. The ranges themselves are those of the lab too. */
const isExample = (word: string) => addressesIn(word).some((address) => EXAMPLES.includes(address));

/** For who has not begun yet: nothing says what the boxes are. */
function unnamed(settings: Settings, origins: Origins, envFile: string): string | undefined {
  const { SERVER, AGENTS, PUBLIC_IP, K3S_URL } = settings;
  if (SERVER || AGENTS || PUBLIC_IP || K3S_URL || origins.HOST !== "default") return undefined;
  const copy = existsSync(envFile) ? "" : `cp env.example ${shown(envFile)}, and `;
  return `No servers are named yet: ${copy}say which in SERVER and AGENTS; or try make rehearse. On the box itself: PUBLIC_IP=…, its address for other clouds`;
}

const isSecret = (name: string) => "secret" in SETTINGS[name as SettingName];

/** A path as short as it can be said from here. */
const shown = (path: string) => {
  const near = relative(process.cwd(), path);
  return near.startsWith("..") ? path : near;
};

const MODES = {
  "dry-run": "print the plan, change nothing",
  print: "print the plan as a sh script",
  reboot: "restart this machine where a step needs it",
};

const switchesOf = (recipe: Recipe): Record<string, string> => ({
  ...(recipe.readOnly ? {} : MODES),
  ...recipe.flags,
  help: "this text",
});

function flagsOf(argv: string[], switches: Record<string, string>): Record<string, string> {
  const strings = NAMES.map(flagOf);
  const known = [...strings, ...Object.keys(switches)];
  const wrong = (flag: string): never => {
    // A slip in the name of --k3s-token does not make its value any less secret.
    const name = /^-[^=]*/.exec(flag)?.[0] ?? "A word without --";
    throw new SettingError(`${name} (flag): expected one of --${known.join(", --")}`);
  };
  // minimist takes --yes=no for yes, and a "false" that follows for its value.
  for (const [i, word] of argv.entries()) {
    const [, no, name = ""] = /^--(no-)?([\w-]+)/.exec(word) ?? [];
    const alone = word === `--${name}` && !/^(true|false)$/.test(argv[i + 1] ?? "");
    if (Object.hasOwn(switches, name) && !alone)
      throw new SettingError(`--${no ?? ""}${name} (flag): expected --${name} alone, or not at all`);
  }
  const { _: rest, ...flags } = minimist(argv, {
    string: strings,
    boolean: Object.keys(switches),
    unknown: wrong,
  });
  for (const word of rest) wrong(word);
  for (const name of strings) {
    if (Array.isArray(flags[name])) throw new SettingError(`--${name} (flag): expected it once`);
    if (flags[name] === "" && argv.includes(`--${name}`))
      throw new SettingError(`--${name} (flag): expected a value after it`);
  }
  return flags;
}

/** A switch as make has it. */
const switchOf = (flag: string) => flag.toUpperCase().replaceAll("-", "_");

function help(script: string, file: string, recipe: Recipe): string {
  const boxes = recipe.work ? (recipe.host ?? "AGENTS") : "HOST";
  const names = NAMES.filter(
    (n) => n === boxes || n === "HOST_KEY" || recipe.steps.some((step) => step.options.includes(n)),
  );
  const usage = [
    names.includes("HOST") ? "HOST=…" : "",
    "SETTING=…",
    recipe.readOnly ? "" : "DRY=1 | PRINT=1",
    ...Object.keys(recipe.flags ?? {}).map((flag) => `${switchOf(flag)}=1`),
  ].filter(Boolean);
  const width = Math.max(60, process.stdout.columns || 80);
  const row = (left: string, right: string) => wrapped(`  ${left.padEnd(26)} ${right}`, width, 29);
  const rows = (some: SettingName[]) =>
    some
      .map((n) =>
        row(
          `--${flagOf(n)} …`,
          `${SETTINGS[n].help}${SETTINGS[n].value && `; default: ${SETTINGS[n].value}`}`,
        ),
      )
      .join("");
  const [first, rare] = [true, false].map((is) => names.filter((n) => FIRST.includes(n) === is));
  return `${wrapped(recipe.about, width)}
${wrapped(`Usage: make ${script} ${usage.map((word) => `[${word}]`).join(" ")}`, width, 7)}   or: node --import tsx ${file} [flags]
   or: deno run -A ${file} [flags]

${wrapped(`Settings, each a flag, an environment variable or a line of the env file (--${flagOf(names[0] as string)} is ${names[0]}):`, width)}${rows(first ?? [])}
${rare?.length ? `Rarely needed:\n${rows(rare)}\n` : ""}Flags:
${Object.entries(switchesOf(recipe))
  .map(([flag, text]) => row(`--${flag}`, text))
  .join("")}
${wrapped("The env file is .env beside the Makefile, or what ENV_FILE names.", width)}${wrapped("Exit status: 0 done or nothing to do, 1 failed, 2 a setting is wrong and nothing was touched, 130 interrupted (129 by HUP, 143 by TERM).", width)}`;
}

/** Settings that most calls have to do with; --help has the others below them. */
const FIRST: readonly string[] =
  "SERVER AGENTS HOST PUBLIC_IP K3S_VERSION STEPS BACKUP K3S_URL K3S_TOKEN".split(" ");

/** Lines of at most so many columns, each but the first indented. */
function wrapped(text: string, width: number, indent = 0): string {
  const lines = [""];
  for (const word of text.split(/(?<=\S)(?= \S)/)) {
    if (lines.at(-1) && (lines.at(-1) as string).length + word.length > width)
      lines.push(" ".repeat(indent) + word.trimStart());
    else lines[lines.length - 1] += word;
  }
  return `${lines.join("\n")}\n`;
}

/** Boxes of a setting, each with the address at which other clouds reach it. @throws {SettingError} */
export async function targets(call: Call, setting: "HOST" | "SERVER" | "AGENTS"): Promise<Target[]> {
  const { settings, origins } = call;
  const list = splitWords(settings[setting]);
  if (setting !== "HOST" && list.some(isExample))
    throw new SettingError(
      `${setting} is "${settings[setting]}" (${origins[setting]}): that is env.example's, and nobody's box; edit SERVER and AGENTS first`,
    );
  const known = splitWords(`${settings.SERVER} ${settings.AGENTS}`).map((word) => word.split("="));
  const needsIp = call.recipe.steps.some((step) => step.options.includes("PUBLIC_IP"));
  if (settings.PUBLIC_IP && setting !== "AGENTS" && list.length > 1)
    throw new SettingError(
      `PUBLIC_IP (${origins.PUBLIC_IP}): expected one box, not ${list.join(", ")}; write HOST=PUBLIC_IP for each`,
    );
  const found = await Promise.all(
    (list.length ? list : [""]).map(async (word) => {
      const [host = "", own] = word.split("=");
      const name = nameOf(host);
      const given =
        own ??
        ((setting !== "AGENTS" && settings.PUBLIC_IP) ||
          known.find(([h = "", ip]) => nameOf(h) === name && host && ip)?.[1]);
      if (given || !needsIp) return { host, ip: given ?? "", word, name };
      const late = call.recipe.asksLate && { host, ip: "", word, name };
      if (!host && late) return late;
      if (!host)
        throw new SettingError(
          unnamed(settings, origins, call.envFile) ??
            "PUBLIC_IP is not set: expected the address at which other clouds reach this machine",
        );
      const ip = await addressOf(host).catch((error) => {
        throw new SettingError(`${setting} names ${host} (${origins[setting]}): ${error.message}`);
      });
      const right = publicIp(ip);
      if (right && late) return late;
      if (right)
        throw new SettingError(
          `${host} (${origins[setting]}) resolves to ${ip}: expected ${right}; write ${host}=PUBLIC_IP`,
        );
      return { host, ip, word, name };
    }),
  );
  for (const [i, box] of found.entries()) {
    const twin = found
      .slice(0, i)
      .find((other) => other.host === box.host || (box.ip && other.ip === box.ip));
    if (twin)
      throw new SettingError(
        `${setting} (${origins[setting]}): expected each box once, but ${twin.host} and ${box.host} are the same`,
      );
  }
  if (needsIp) await ownAddresses(call, setting, found);
  return found;
}

/**
 * Every node has a public address of its own: the lists are held against each other, and an agent against the server.
 * @throws {SettingError}
 */
async function ownAddresses(call: Call, setting: string, found: readonly Target[]): Promise<void> {
  const { settings, origins, script } = call;
  // A restored server may have the address of the one that is gone.
  const lists = script === "restore" ? settings.AGENTS : `${settings.SERVER} ${settings.AGENTS}`;
  const others = await Promise.all(
    splitWords(lists).map(async (word) => {
      const [host = "", own] = word.split("=");
      // What cannot be resolved is told by whom it concerns.
      return { name: nameOf(host), ip: own ?? (await addressOf(host).catch(() => "")) };
    }),
  );
  if (setting === "AGENTS" && !settings.SERVER && settings.PUBLIC_IP)
    others.push({ name: hostname(), ip: settings.PUBLIC_IP });
  const url = /^https:\/\/([\w.-]+)/.exec(settings.K3S_URL)?.[1];
  if (script === "agent" && setting !== "SERVER" && url)
    others.push({ name: "the server, by K3S_URL,", ip: url });
  for (const box of found) {
    const other = others.find(({ name, ip }) => name !== box.name && ip && ip === box.ip);
    // One box may be named in two ways, unless it is said where it is.
    const said = box.word.includes("=") || (box.host && settings.PUBLIC_IP);
    const named = setting === "HOST" && !said && !other?.name.startsWith("the server");
    // By the name that the lists have for it, the env file has settings of its own for it.
    if (other && named && box.host) box.name = other.name;
    if (other && !named)
      throw new SettingError(
        `${setting} (${origins[setting as SettingName]}): every node needs a public address of its own, but ${other.name} and ${box.name} have ${box.ip}`,
      );
  }
}

/** What is needed to bring a box of this call through its steps. */
export function jobFor(call: Call, target: Target, line: Line): Job {
  const { recipe, settings, own } = call;
  const given = { HOST: target.host, PUBLIC_IP: target.ip, allowed: call.flags };
  const want = { ...settings, ...(own[target.name] ?? own[""]), ...given };
  const server = (splitWords(want.SERVER)[0] ?? "").split("=")[0] as string;
  return {
    box: open(target.host, want.HOST_KEY),
    server: open(server, own[nameOf(server)]?.HOST_KEY ?? settings.HOST_KEY),
    want: recipe.wantOnBox?.(call, target, want) ?? want,
    progress: line,
    mayReboot: Boolean(target.host) || call.reboot,
  };
}

/** One recipe on every box of the call, side by side: one that fails stops none of the others. */
async function fanOut(call: Call): Promise<number> {
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
  const first = recipe.everyServer ? boxes.splice(0, 1) : [];
  const done = [];
  for (const box of first) done.push(await one(box));
  if (worst(done) === 0) done.push(...(await Promise.all(boxes.map(one))));
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
    const ills =
      error instanceof Failure && change
        ? ((await call.recipe.causes?.(call, script, box, line, output, retry)) ?? [])
        : [];
    line.failed(message, change, known ? output : (error as Error).stack, retry, ills);
    return error instanceof SettingError ? 2 : 1;
  }
}

const takesHost = (step: Step) => step.options.includes("HOST");

/** A value on make's command line: the shell takes the quotes, and make the second $. */
export const forMake = (value: string): string => sh(value.replaceAll("$", () => "$$"));

/** The command that tries it again: what was given for this call is given again, but for secrets. */
function again(call: Call, script: string, box: Target): string {
  const given = NAMES.filter((n) => n !== "HOST" && !("secret" in SETTINGS[n]) && givenNow(call.origins, n));
  const local = call.origins.HOST !== "default" || call.recipe.work ? "HOST=" : "";
  // A script that looks after a whole cluster is tried again as a whole.
  const whole = script === call.script && call.recipe.work && !call.recipe.steps.some(takesHost);
  const own = [
    whole ? "" : box.host ? `HOST=${sh(box.word)}` : local,
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
            `${box.name}: ${changes.length} to do\n${changes.map(planned).join("")}${changes.some(unforeseen) ? "  … then look again\n" : ""}${changes.some((c) => c.push && c.lookAgain) ? `  … if ${job.want.K3S_BIN} is k3s ${job.want.K3S_VERSION}\n` : ""}`,
          )
        : `${box.name}: nothing to do\n`,
    );
}

/** What the steps learned from the facts. @throws {SettingError} where it cannot be a setting's value. */
export function learned(steps: readonly Step[], job: Job, facts: Facts): Partial<Settings> {
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
  const values = learned(steps, job, facts);
  if (Object.keys(values).length) await updateEnv(call.envFile, values as Record<string, string>);
  return values;
}

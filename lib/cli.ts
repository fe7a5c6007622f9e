/** What every script has in common: its flags and --help, which boxes it is for, and its exit status. */

import { existsSync, realpathSync } from "node:fs";
import { hostname } from "node:os";
import { join, relative } from "node:path";
import minimist from "minimist";
import { unnamed } from "./boxes.ts";
import { readEnv, readExample, updateEnv } from "./env-file.ts";
import { noFile, shown, Unwritten } from "./files.ts";
import { fanOut } from "./fleet.ts";
import { documentOf, planStatus } from "./plan.ts";
import { forTerminal } from "./report.ts";
import { type Run, type Script, switchOf } from "./script.ts";
import { flagOf, givenNow, isSecret, NAMES, SettingError, settle } from "./settings.ts";
import { quote } from "./sh.ts";
import { closeAll } from "./shell.ts";
import { SETTINGS, type SettingName } from "./table.ts";
import { hide, quoted } from "./text.ts";

const PROJECT = join(import.meta.dirname, "..");

const SIGNALS = { SIGHUP: 1, SIGINT: 2, SIGQUIT: 3, SIGTERM: 15 };

/**
 * Runs a script when it is the program itself, not an import. Exit status: 0 done or nothing to do, 1 failed,
 * 2 a setting is wrong (nothing was touched), 3 a dry run with --json has something to do, 128 and a signal's number: interrupted.
 */
export async function runScript(meta: ImportMeta, script: Script): Promise<void> {
  // import.meta.main is missing in Node 20.
  if (!process.argv[1] || realpathSync(process.argv[1]) !== realpathSync(meta.filename)) return;
  let ends = false;
  for (const [signal, number] of Object.entries(SIGNALS))
    process.on(signal, () => {
      // The script may get SIGTERM twice, from its process group and from make. A second Ctrl-C exits at once.
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
    // Deno throws at the write itself.
    stream.write = (...given: unknown[]) => {
      try {
        return write(...given);
      } catch (error) {
        return !stream.emit("error", error);
      }
    };
    stream.on("error", (error: NodeJS.ErrnoException) => {
      // The reader has gone, as in `make check | head` (then exit as SIGPIPE would, silently), or its disk is full.
      const isShut = error.code === "EPIPE";
      if (!isShut && stream === process.stdout) process.stderr.write(`Standard output: ${error.message}\n`);
      void closeAll().finally(() => process.exit(isShut ? 128 + 13 : 1));
    });
  }
  try {
    process.exitCode = await main(meta, script);
  } catch (error) {
    const isSetting = error instanceof SettingError;
    if (!isSetting && !(error instanceof Unwritten)) throw error;
    process.stderr.write(`${forTerminal(error.message).replaceAll(/[\n\t]/g, " ")}\n`);
    process.exitCode = isSetting ? 2 : 1;
  } finally {
    await closeAll();
  }
}

async function main(meta: ImportMeta, script: Script): Promise<number> {
  const name = /([\w-]+)\.ts$/.exec(meta.filename)?.[1] as string;
  const flags = flagsOf(process.argv.slice(2), switchesOf(script));
  if (flags.help) {
    process.stdout.write(help(name, relative(PROJECT, meta.filename), script));
    return 0;
  }
  const asJson = !script.readOnly && flags.json;
  if (asJson && (flags.print || !flags["dry-run"]))
    throw new SettingError(
      "--json (flag): expected --dry-run beside it, whose plan it prints, and no --print (make: DRY=1 JSON=1)",
    );
  const envFile = envFileBy(process.env.ENV_FILE ?? "");
  // csh exports HOST as this machine's name.
  const env = { ...process.env, HOST: process.env.HOST === hostname() ? undefined : process.env.HOST };
  const { settings, origins, own } = settle(flags, env, shown(envFile));
  // In the env file it may be meant for other scripts.
  if (script.everyBox && settings.HOST && givenNow(origins, "HOST"))
    throw new SettingError(
      `HOST is ${quoted(settings.HOST)} (${origins.HOST}): expected none, since make ${name} runs on all boxes; ${script.everyBox}`,
    );
  const needs = Object.entries(script.needs ?? {}).find(([name]) => !settings[name as SettingName]);
  const none = script.work || needs ? unnamed(settings, origins, envFile) : undefined;
  if (none) throw new SettingError(none);
  if (needs) throw new SettingError(`${needs[0]} is not set: expected ${needs[1]} ${shown(envFile)}`);
  if (!flags.print && !flags["dry-run"] && script.writes?.(settings, readEnv(envFile).values))
    await tryEnv(envFile);
  own[""] = {};
  for (const name of Object.keys(own))
    own[name] = { ...own[name], ...(await script.filesOf?.({ ...settings, ...own[name] })) };
  const secrets = NAMES.filter(isSecret);
  hide([settings, ...Object.values(own)].flatMap((of) => secrets.flatMap((name) => of[name] ?? [])));
  const mode = flags.print ? "print" : flags["dry-run"] ? "dry-run" : "apply";
  const run: Run = {
    ...{ name, script, settings, origins, own, envFile, mode },
    addresses: { servers: [], agents: [] },
    reboot: Boolean(flags.reboot),
    flags: new Set(Object.keys(script.flags ?? {}).filter((name) => flags[name])),
    ...(asJson ? { plan: { parts: [], later: [] } } : {}),
  };
  await script.prepare?.(run);
  const status = await (script.work ?? fanOut)(run);
  if (!run.plan) return status;
  process.stdout.write(`${documentOf(name, run.plan)}\n`);
  return status || planStatus(run.plan);
}

/** @throws {SettingError} when ENV_FILE is missing or not a regular file. */
function envFileBy(named: string): string {
  const path = named || join(PROJECT, ".env");
  const wrong = noFile(path) ?? (named && !existsSync(path) && "not there");
  if (!wrong) return path;
  throw new SettingError(
    `ENV_FILE is ${quoted(shown(path))}, which is ${wrong}: expected a file with the settings of a cluster${wrong === "not there" ? `; a new one is made by cp ${quote(shown(join(PROJECT, "env.example")))} ${quote(shown(path))}` : ""}`,
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

const MODES = {
  "dry-run": "show the plan, change nothing",
  json: "with --dry-run: print the plan as JSON; exit status 3 if there is something to do",
  print: "print the plan as a shell script",
  reboot: "reboot this machine if a step needs it",
};

const switchesOf = (script: Script): Record<string, string> => ({
  ...(script.readOnly ? {} : MODES),
  ...script.flags,
  help: "show this help",
});

function flagsOf(argv: string[], switches: Record<string, string>): Record<string, string> {
  const strings = NAMES.map(flagOf);
  const known = [...strings, ...Object.keys(switches)];
  const wrong = (flag: string): never => {
    // A slip in the name of a secret's flag does not make its value any less secret.
    const name = /^-[^=]*/.exec(flag)?.[0] ?? "A word without --";
    throw new SettingError(`${name} (flag): expected one of --${known.join(", --")}`);
  };
  // minimist reads --yes=no as yes, and a following "false" as its value.
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

function help(name: string, file: string, script: Script): string {
  const boxes = script.work ? (script.host ?? "AGENTS") : "HOST";
  const names = NAMES.filter(
    (n) => n === boxes || n === "HOST_KEY" || script.steps.some((step) => step.options.includes(n)),
  );
  const usage = [
    names.includes("HOST") ? "HOST=…" : "",
    "SETTING=…",
    ...(script.readOnly ? [] : ["DRY=1 | PRINT=1", "JSON=1"]),
    ...Object.keys(script.flags ?? {}).map((flag) => `${switchOf(flag)}=1`),
  ].filter(Boolean);
  const width = Math.max(60, process.stdout.columns || 80);
  const row = (left: string, right: string) => wrapped(`  ${left.padEnd(26)} ${right}`, width, 29);
  const words = readExample();
  const rows = (some: SettingName[]) =>
    some.map((n) => row(`--${flagOf(n)} …`, words[n]?.help ?? "")).join("");
  // What is the cluster's, most calls have to do with.
  const [first, rare] = [true, false].map((is) => names.filter((n) => "shared" in SETTINGS[n] === is));
  return `${wrapped(script.about, width)}
${wrapped(`Usage: make ${name} ${usage.map((word) => `[${word}]`).join(" ")}`, width, 7)}   or: node --import tsx ${file} [flags]
   or: deno run -A ${file} [flags]

${wrapped(`Settings, each as a flag, an environment variable or a line in the env file (--${flagOf(names[0] as string)} is ${names[0]}):`, width)}${rows(first ?? [])}
${rare?.length ? `Rarely needed:\n${rows(rare)}\n` : ""}Flags:
${Object.entries(switchesOf(script))
  .map(([flag, text]) => row(`--${flag}`, text))
  .join("")}
${wrapped("The env file is .env beside the Makefile, or the one that ENV_FILE names.", width)}${wrapped("Exit status: 0 success or nothing to do, 1 failed, 2 a setting is wrong and nothing was changed, 130 interrupted (129 by HUP, 143 by TERM).", width)}`;
}

/** Wraps text at this many columns; all lines but the first are indented. */
function wrapped(text: string, width: number, indent = 0): string {
  const lines = [""];
  for (const word of text.split(/(?<=\S)(?= \S)/)) {
    if (lines.at(-1) && (lines.at(-1) as string).length + word.length > width)
      lines.push(" ".repeat(indent) + word.trimStart());
    else lines[lines.length - 1] += word;
  }
  return `${lines.join("\n")}\n`;
}

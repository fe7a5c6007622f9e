/** Where the value of a setting comes from: flag, environment, env file, default. */
import { hostname } from "node:os";
import { parseArgs, secretIn } from "./args.ts";
import { readEnv, slipIn } from "./env-file.ts";
import { noFile } from "./files.ts";
import { apartIn, SETTINGS, type Setting, type SettingName, WITH_PASSWORD } from "./table.ts";
import { boxNames, quoted } from "./text.ts";

/** A wrong setting: names its origin, what was found and what is expected. Exit status 2, nothing was touched. */
export class SettingError extends Error {}

export type Settings = Record<SettingName, string>;
export const NAMES = Object.keys(SETTINGS) as SettingName[];

/** Where each value came from, for messages: `flag --host`, `variable HOST`, `.env line 3`, `default`. */
export type Origins = Record<SettingName, string>;

/** Was it given for this run only (by a flag or a variable)? */
export const givenNow = (origins: Origins, name: SettingName): boolean =>
  /^(flag|variable)/.test(origins[name]);

export const flagOf = (name: string): string => name.toLowerCase().replaceAll("_", "-");

/** Must its value never be shown? */
export const isSecret = (name: string) => "secret" in SETTINGS[name as SettingName];

/**
 * Resolves settings by precedence: flag, environment, env file, default. An empty value counts as set. NAME__BOX in the
 * env file overrides NAME for that box; `own` holds these by box name.
 *
 * @throws {SettingError} for the first wrong value, with its origin; also for an unknown key or an unknown box in the
 * env file, since a typing error would have no effect.
 */
export function settle(
  flags: Record<string, string>,
  env: Record<string, string | undefined>,
  path: string,
): { settings: Settings; origins: Origins; own: Record<string, Partial<Settings>> } {
  const { values, lines } = fileAt(path);
  const [line, right] = slipIn(path) ?? [];
  if (line) throw new SettingError(`${path} line ${line}: expected ${right}`);
  const settings = {} as Settings;
  const origins = {} as Origins;
  const isAmbient = (name: SettingName) => (SETTINGS[name] as Setting).ambient;
  const madeWith = (name: string) => new RegExp(`(^| )${name}=`).test(env.MAKEFLAGS ?? "");
  for (const name of NAMES) {
    const [value, origin] =
      flags[flagOf(name)] !== undefined
        ? [flags[flagOf(name)], `flag --${flagOf(name)}`]
        : env[name] !== undefined && (!isAmbient(name) || madeWith(name))
          ? [env[name], `variable ${name}`]
          : values[name] !== undefined
            ? [values[name], `${path} line ${lines[name]}`]
            : [SETTINGS[name].value, "default"];
    settings[name] = (value as string).trim();
    origins[name] = origin as string;
    if (origin === `variable ${name}` && isEaten(name, value as string, env.MAKEFLAGS))
      throw new SettingError(
        `${name} (make's command line): it has a $, which make takes for one of its variables; write it into the env file, or each $ as $$`,
      );
    if (settings[name]) check(name, settings[name], origins[name]);
  }
  const [apart, expected] = apartIn(settings) ?? [];
  if (apart) throw new SettingError(`${apart} (${origins[apart]}): expected ${expected}`);
  const boxes = boxNames(`${settings.SERVER} ${settings.AGENTS} ${settings.HOST}`);
  // A box may be called __proto__.
  const own: Record<string, Partial<Settings>> = Object.create(null);
  for (const [key, value] of Object.entries(values)) {
    if (Object.hasOwn(SETTINGS, key)) continue;
    const origin = `${path} line ${lines[key]}`;
    const [, name, box = ""] = /^([A-Z0-9_]+?)__(.+)$/.exec(key) ?? [];
    if (name === undefined || !Object.hasOwn(SETTINGS, name))
      throw new SettingError(`${key} (${origin}): expected a setting: ${NAMES.join(", ")}`);
    if ((SETTINGS as Record<string, Setting>)[name]?.shared)
      throw new SettingError(`${key} (${origin}): expected ${name}, which is one for all boxes`);
    if (![...boxes, hostname()].includes(box))
      throw new SettingError(
        `${key} (${origin}): expected a box of SERVER, AGENTS or HOST after the __: ${boxes.join(", ") || hostname()}`,
      );
    if (value.trim()) check(name as SettingName, value.trim(), origin);
    // A flag or variable applies to all boxes of the run.
    if (!givenNow(origins, name as SettingName)) own[box] = { ...own[box], [name]: value.trim() };
  }
  return { settings, origins, own };
}

/** Did make expand a $ in this value? MAKEFLAGS has the original, with blanks escaped and each $ doubled. */
function isEaten(name: string, value: string, makeflags = ""): boolean {
  const given = new RegExp(`(?<=(?<!\\\\) )${name}[:?+]*=((?:\\\\[^]|[^\\\\ ])*)`, "g");
  const said = [...makeflags.matchAll(given)].at(-1)?.[1]?.replace(/\\(.|\n)|\$\$/g, (_, c) => c ?? "$");
  return Boolean(said?.includes("$")) && said?.replaceAll("$$", "$").trim() !== value.trim();
}

/** @throws {SettingError} for a file that cannot be read. */
function fileAt(path: string): ReturnType<typeof readEnv> {
  try {
    return readEnv(path);
  } catch (error) {
    throw new SettingError(`The env file cannot be read: ${(error as Error).message}`);
  }
}

/** @throws {SettingError} for anything but a regular file: a device has no end, and a pipe may block forever. */
export function aFile(name: SettingName, path: string): void {
  const wrong = noFile(path);
  if (wrong) throw new SettingError(`${name} is ${quoted(path)}, which is ${wrong}: expected a file`);
}

/** @throws {SettingError} for an invalid value; a secret is not repeated in it. */
export function check(name: SettingName, value: string, origin: string): void {
  const setting: Setting = SETTINGS[name];
  const most = name === "AGENTS" ? 16384 : 4096; // a box takes some 20
  const right = value.length > most ? `at most ${most} characters` : setting.check(value);
  if (right === undefined) return;
  const shown =
    setting.secret || secretIn(parseArgs(value)) || WITH_PASSWORD.test(value) ? "" : ` is ${quoted(value)}`;
  throw new SettingError(`${name}${shown} (${origin}): expected ${right}`);
}

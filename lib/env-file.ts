import { isUtf8 } from "node:buffer";
import { randomBytes } from "node:crypto";
import {
  closeSync,
  fsyncSync,
  openSync,
  readdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  writeSync,
} from "node:fs";
import { basename, dirname, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { parse } from "dotenv";

/** An assignment as dotenv 18 reads it (its LINE, plus the blanks and comment that follow kept apart). */
const LINE =
  /^(\uFEFF?[ \t]*(?:export[ \t]+)?([\w.-]+)(?:[ \t]*=[ \t]*?|:[ \t]+?))([ \t]*'(?:\\'|[^'])*'|[ \t]*"(?:\\"|[^"])*"|[ \t]*`(?:\\`|[^`])*`|[^#\r\n]*)(?=[ \t]*(?:#[^\r\n]*)?\r?$)/gm;

/** What an env file says, and on which line each key stands (1-based). A missing file is an empty one. */
export function readEnv(path: string): { values: Record<string, string>; lines: Record<string, number> } {
  const text = textOf(path);
  const lines: Record<string, number> = {};
  for (const m of text.matchAll(LINE)) lines[m[2] as string] = text.slice(0, m.index).split("\n").length;
  return { values: parse(text), lines };
}

/**
 * The text of an env file after some keys are set: comments, order and every other line stay as they are.
 *
 * @throws {RangeError} where dotenv has no notation for the value (it has no escapes: a value that holds
 * all three kinds of quotes, for instance).
 */
export function withValues(text: string, values: Record<string, string>): string {
  let result = text;
  for (const [key, value] of Object.entries(values)) {
    const found = [...result.matchAll(LINE)].filter((m) => m[2] === key).at(-1);
    const head = found
      ? result.slice(0, found.index)
      : result && !result.endsWith("\n")
        ? `${result}\n`
        : result;
    const tail = found ? result.slice((found.index as number) + found[0].length) : "\n";
    const gap = tail.startsWith("#") ? " " : "";
    const fits = [value, `'${value}'`, `"${value}"`, `\`${value}\``]
      .map((word) => `${head}${found?.[1] ?? `${key}=`}${word}${gap}${tail}`)
      .find((next) => isSame(parse(next), { ...parse(result), [key]: value }));
    if (fits === undefined) throw new RangeError(`An env file has no notation for the value of ${key}`);
    result = fits;
  }
  return result;
}

/**
 * Sets keys of an env file under a lock, so that parallel writers lose nothing; the file is 0600 and
 * replaced atomically, so that a crash leaves the old one or the new one. A link is followed.
 *
 * @throws {Error} when another living process holds the lock for more than `seconds`.
 */
export async function updateEnv(path: string, values: Record<string, string>, seconds = 10): Promise<void> {
  const file = realPath(path);
  const release = await lock(`${file}.lock`, seconds);
  try {
    sweep(file);
    const old = textOf(file);
    const text = withValues(old, values);
    if (text === old) return;
    replaceFile(file, text);
  } finally {
    release();
  }
}

/** Removes what writers that were killed have left beside the file, with its secrets. Nobody else writes under the lock. */
function sweep(file: string): void {
  const half = /^\.[0-9a-f]{8}\.tmp$/;
  for (const name of readdirSync(dirname(file)))
    if (name.startsWith(basename(file)) && half.test(name.slice(basename(file).length)))
      rmSync(join(dirname(file), name), { force: true });
}

/** Puts a text in a file's place, 0600: a crash leaves the old one or the new one. */
export function replaceFile(file: string, text: string): void {
  const temporary = `${file}.${randomBytes(4).toString("hex")}.tmp`;
  try {
    const handle = openSync(temporary, "wx", 0o600);
    writeSync(handle, text);
    fsyncSync(handle);
    closeSync(handle);
    renameSync(temporary, file);
  } finally {
    rmSync(temporary, { force: true });
  }
  const folder = openSync(dirname(file), "r");
  fsyncSync(folder);
  closeSync(folder);
}

/** Takes a lock file that holds its owner's process id; one left by a dead process is taken over. */
async function lock(path: string, seconds: number): Promise<() => void> {
  const mine = `${path}.${process.pid}.${randomBytes(4).toString("hex")}`;
  for (const end = Date.now() + seconds * 1000; ; await sleep(20 + Math.random() * 30)) {
    try {
      const handle = openSync(path, "wx", 0o600);
      writeSync(handle, String(process.pid));
      closeSync(handle);
      return () => rmSync(path, { force: true });
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
    }
    const owner = Number(textOf(path) || Number.NaN);
    const dead = Number.isNaN(owner) ? ageOf(path) > 2000 : !isAlive(owner);
    if (dead) {
      // Renamed before it is removed: of two processes that find it stale only one may move it away,
      // and what it moved away is looked at again, since a third may have locked in between.
      try {
        renameSync(path, mine);
        if (Number(textOf(mine) || Number.NaN) !== owner && !Number.isNaN(owner)) renameSync(mine, path);
      } catch {}
      rmSync(mine, { force: true });
    } else if (Date.now() > end) {
      throw new Error(`"${path}" is held by process ${owner}: try again when it has ended`);
    }
  }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}

function ageOf(path: string): number {
  const stat = statSync(path, { throwIfNoEntry: false });
  return stat ? Date.now() - stat.mtimeMs : 0;
}

/** @throws {Error} for a file that is no UTF-8: what cannot be read cannot be kept as it is either. */
function textOf(path: string): string {
  try {
    const bytes = readFileSync(path);
    if (isUtf8(bytes)) return bytes.toString();
    throw new Error(`${path} line ${lineOf(bytes)}: expected UTF-8, and no other encoding`);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return "";
    throw error;
  }
}

export function realPath(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return path;
  }
}

/** The first line, from 1 on, that is no UTF-8. */
function lineOf(bytes: Buffer): number {
  let line = 1;
  for (let from = 0; ; line++) {
    const to = bytes.indexOf("\n", from);
    if (to < 0 || !isUtf8(bytes.subarray(from, to))) return line;
    from = to + 1;
  }
}

function isSame(a: Record<string, string>, b: Record<string, string>): boolean {
  const keys = Object.keys(b);
  return keys.length === Object.keys(a).length && keys.every((k) => a[k] === b[k]);
}

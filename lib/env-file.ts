/** Reads the env file, and writes settings into it without changing anything else. */
import { isUtf8 } from "node:buffer";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { parse } from "dotenv";
import { ownerOf, realPath, replaceFile, take, tryWrite, Unwritten, unwritten } from "./files.ts";

/** An assignment as dotenv 18 matches it (its LINE), with trailing whitespace and comment as a separate group. */
const LINE =
  /^(\uFEFF?[ \t]*(?:export[ \t]+)?([\w.-]+)(?:[ \t]*=[ \t]*?|:[ \t]+?))([ \t]*'(?:\\'|[^'])*'|[ \t]*"(?:\\"|[^"])*"|[ \t]*`(?:\\`|[^`])*`|[^#\r\n]*)(?=[ \t]*(?:#[^\r\n]*)?\r?$)/gm;

/** Lines of a comment, and below them a setting, which may be one more comment. */
const EXAMPLE = /((?:^# .*\n)*)^(?:# )?(([A-Z][A-Z0-9_]*)=.*)$/gm;

const lineAt = (text: string, at: number): number => text.slice(0, at).split("\n").length;

/** The values of an env file and the line number of each key (from 1). A missing file is empty. */
export function readEnv(path: string): { values: Record<string, string>; lines: Record<string, number> } {
  const text = textOf(path);
  const lines: Record<string, number> = {};
  for (const m of text.matchAll(LINE)) lines[m[2] as string] = lineAt(text, m.index);
  return { values: parse(text), lines };
}

/**
 * What env.example says of each setting: the comment right above it, and a value as one would write it. Nothing where
 * that file was moved away.
 */
export function readExample(path = join(import.meta.dirname, "../env.example")) {
  const found: Record<string, { help: string; example: string }> = {};
  for (const [, comment = "", line = "", key = ""] of textOf(path).matchAll(EXAMPLE))
    found[key] = {
      help: comment.replaceAll(/^# /gm, "").trimEnd().replaceAll("\n", " "),
      example: parse(line)[key] as string,
    };
  return found;
}

/** The first line of which dotenv would silently drop a part: its number, and what is expected. */
export function slipIn(path: string): [line: number, right: string] | undefined {
  const text = textOf(path);
  const lines = new Map<string, number>();
  for (const { 0: all, 2: key = "", 3: value = "", index } of text.matchAll(LINE)) {
    const [line, before] = [lineAt(text, index), lines.get(key)];
    if (before) return [line, `${key} once, and line ${before} has it too`];
    lines.set(key, line);
    if (text[index + all.length] === "#" && /[^\s"'`]$/.test(value))
      return [line, "a blank before the # of a comment, or quotes around the value that has it"];
  }
  const rest = text.replace(LINE, (all) => all.replace(/[^\n]/g, "")).split("\n");
  const at = rest.findIndex((line) => /^\s*[^#\s]/.test(line));
  return at < 0 ? undefined : [at + 1, "KEY=VALUE on one line, or a # before a comment"];
}

/**
 * The text of an env file with some keys set, or removed where undefined. Comments, order and all other lines stay
 * unchanged.
 *
 * @throws {RangeError} when dotenv cannot represent the value: it has no escapes, so not all three kinds of quotes at
 * once.
 */
export function withValues(text: string, values: Record<string, string | undefined>): string {
  let result = text;
  for (const [key, value] of Object.entries(values)) {
    const all = [...result.matchAll(LINE)].filter((m) => m[2] === key);
    if (value === undefined) {
      for (const m of all.reverse()) {
        const rest = result.slice(m.index + m[0].length).replace(/^[ \t]*(\r?\n|(?=#|$))/, "");
        result = result.slice(0, m.index) + (m[0].startsWith("\uFEFF") ? "\uFEFF" : "") + rest;
      }
      continue;
    }
    const found = all.at(-1);
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
 * Sets keys of an env file, or removes those that are undefined. It holds a lock, so parallel writers lose nothing; the
 * file is 0600 and replaced atomically; symlinks are followed. Without values it only tests whether the file can be
 * written.
 *
 * @throws {Unwritten} when it cannot be written, or another live process holds the lock for more than `seconds`.
 */
export async function updateEnv(
  path: string,
  values: Record<string, string | undefined> | undefined,
  seconds = 10,
): Promise<void> {
  const file = realPath(path);
  const lock = `${file}.lock`;
  const end = Date.now() + seconds * 1000;
  let release = take(lock, 2000);
  for (; !release; release = take(lock, 2000)) {
    if (Date.now() > end)
      throw new Unwritten(`"${lock}" is held by process ${ownerOf(lock)}: try again when it has ended`);
    await sleep(20 + Math.random() * 30);
  }
  try {
    if (!values) return tryWrite(file);
    const old = textOf(file);
    const text = withValues(old, values);
    if (text !== old) replaceFile(file, text);
  } catch (error) {
    throw unwritten(file, error);
  } finally {
    release();
  }
}

/** @throws {Error} for a file that is not UTF-8, since its bytes could not be preserved. */
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

/** The first line (from 1) that is not UTF-8. */
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

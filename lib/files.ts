/** Files on the operator's machine: regular files only, replaced atomically. */
import { createHash, randomBytes } from "node:crypto";
import {
  closeSync,
  constants,
  copyFileSync,
  createReadStream,
  existsSync,
  fchownSync,
  fstatSync,
  fsyncSync,
  linkSync,
  lstatSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  writeSync,
} from "node:fs";
import { hostname } from "node:os";
import { dirname, join, relative } from "node:path";
import { sha256 } from "./text.ts";

/** A local file could not be written; it is unchanged. */
export class Unwritten extends Error {}

/** The error without its last part, which may name a temporary file. */
const reasonOf = (error: unknown): string => (error as Error).message.replace(/, [a-z]+( '.*)?$/s, "");

/** Why a path is not, and cannot become, a regular file; symlinks are followed. */
export function noFile(path: string): string | undefined {
  try {
    const stat = statSync(path, { throwIfNoEntry: false });
    if (!stat) return lstatSync(path, { throwIfNoEntry: false }) && "a link that leads nowhere";
    if (stat.isFile()) return undefined;
    return stat.isDirectory() ? "a folder" : stat.isFIFO() ? "a pipe" : "a device or a socket";
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "ELOOP" ? "a link that leads to itself" : undefined;
  }
}

/** The sha256 of a file, in hex. */
export async function hashOf(path: string): Promise<string> {
  const hash = createHash("sha256");
  for await (const chunk of createReadStream(path)) hash.update(chunk as Buffer);
  return hash.digest("hex");
}

export function realPath(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return path;
  }
}

/** A path relative to the working directory, if it is below it. */
export const shown = (path: string) => {
  const near = relative(process.cwd(), path);
  return near.startsWith("..") ? path : near;
};

/** Temporary files of this process that still exist. */
const own = new Set<string>();
let watched = false;

/** Identifies the PID namespace: process ids are only comparable within one. */
const HERE = sha256(
  `${hostname()}${existsSync("/proc/self/ns/pid") && readlinkSync("/proc/self/ns/pid")}`,
).slice(0, 6);
const NAME = /^\.?clouds-([0-9a-f]{6})-(\d+)-[0-9a-f]{8}$/;
const DAY = 86_400_000;

/**
 * A path for a temporary file. It is removed when this process exits; what a killed process left is removed by the next
 * one that asks for a path in the same folder.
 */
export function temporary(folder: string, dot = "."): string {
  sweep(folder);
  if (!watched) process.once("exit", () => [...own].forEach(remove));
  watched = true;
  const path = join(folder, `${dot}clouds-${HERE}-${process.pid}-${randomBytes(4).toString("hex")}`);
  own.add(path);
  return path;
}

/** Removes what `temporary` named. */
export function remove(path: string): void {
  own.delete(path);
  try {
    rmSync(path, { recursive: true, force: true });
  } catch {
    // The next process retries.
  }
}

function sweep(folder: string): void {
  try {
    for (const name of readdirSync(folder)) {
      const [, here, pid] = NAME.exec(name) ?? [];
      const path = join(folder, name);
      if (!pid || own.has(path)) continue;
      const { uid, mtimeMs } = lstatSync(path);
      const left = here === HERE ? !isAnother(Number(pid)) : Date.now() - mtimeMs > DAY;
      if (left && uid === process.getuid?.()) remove(path);
    }
  } catch {
    // The folder is not readable, or another process was faster.
  }
}

/** Is it another live process? In a container this process may have reused the id of a dead one. */
function isAnother(pid: number): boolean {
  try {
    return pid !== process.pid && process.kill(pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}

/** Writes and syncs a new file, mode 0600. */
function writeNew(path: string, text: string | Buffer, like?: { uid: number; gid: number }): void {
  const bytes = Buffer.from(text as string);
  const handle = openSync(path, "wx", 0o600);
  try {
    for (let at = 0; at < bytes.length; ) {
      const n = writeSync(handle, bytes, at);
      if (n === 0) throw new Error("the file system takes no more");
      at += n;
    }
    // A file that root replaces keeps its owner.
    if (like && process.getuid?.() === 0) fchownSync(handle, like.uid, like.gid);
    fsyncSync(handle);
    if (fstatSync(handle).size !== bytes.length) throw new Error("the file system has not kept all of it");
  } finally {
    closeSync(handle);
  }
}

/**
 * Replaces a file atomically, mode 0600: a crash or a full disk leaves the old one. Symlinks are followed.
 * @throws {Unwritten} with the file unchanged.
 */
export function replaceFile(path: string, text: string | Buffer): void {
  const wrong = noFile(path);
  if (wrong) throw new Unwritten(`${path} is ${wrong}: expected a file`);
  const file = realPath(path);
  const half = temporary(dirname(file));
  try {
    writeNew(half, text, statSync(file, { throwIfNoEntry: false }));
    renameSync(half, file);
  } catch (error) {
    throw unwritten(file, error);
  } finally {
    remove(half);
  }
  syncFolder(file);
}

/** Syncs a finished temporary file and gives it its name. @throws {Unwritten} when the name is taken. */
export function putNew(half: string, file: string): void {
  try {
    const handle = openSync(half, "r+");
    fsyncSync(handle);
    closeSync(handle);
    if (lstatSync(file, { throwIfNoEntry: false })) throw new Unwritten(`${file} already exists`);
    renameSync(half, file);
  } catch (error) {
    throw unwritten(file, error);
  }
  syncFolder(file);
}

/** Turns a system error into an Unwritten for that file. Deno gives some errors, such as EFBIG, no code. */
export const unwritten = (file: string, error: unknown): unknown =>
  (error as NodeJS.ErrnoException).code || / \(os error \d+\)$/.test((error as Error).message)
    ? new Unwritten(`${file} could not be written, and is unchanged: ${reasonOf(error)}`)
    : error;

function syncFolder(file: string): void {
  try {
    const folder = openSync(dirname(file), "r");
    fsyncSync(folder);
    closeSync(folder);
  } catch {
    // Not every file system supports it, and the file is already in place.
  }
}

/**
 * Tests whether the file can be replaced: rewrites it unchanged, or writes a temporary file beside it.
 * @throws {Unwritten} when it cannot.
 */
export function tryWrite(path: string): void {
  const file = realPath(path);
  const half = temporary(dirname(file));
  try {
    if (statSync(file, { throwIfNoEntry: false })) replaceFile(file, readFileSync(file));
    else writeNew(half, " ".repeat(4096));
  } catch (error) {
    throw unwritten(file, error);
  } finally {
    remove(half);
  }
}

/**
 * Takes a lock file that holds its owner's process id. The lock of a dead process is taken over, and one without an id
 * after `forgiven` milliseconds. Returns the function that releases it, or undefined while another process holds it.
 *
 * @throws {Unwritten}
 */
export function take(path: string, forgiven: number): (() => void) | undefined {
  const mine = temporary(dirname(path));
  try {
    writeNew(mine, String(process.pid));
    const taken = put(mine, path) || (clear(path, forgiven) && put(mine, path));
    return taken ? () => remove(path) : undefined;
  } catch (error) {
    throw unwritten(path, error);
  } finally {
    remove(mine);
  }
}

/** A hard link creates the lock together with its content; not every file system has hard links. */
function put(mine: string, path: string): boolean {
  let failure: unknown;
  for (const make of [linkSync, (a: string, b: string) => copyFileSync(a, b, constants.COPYFILE_EXCL)])
    try {
      make(mine, path);
      return true;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "EEXIST") return false;
      failure = error;
    }
  throw failure;
}

/** Process id of a lock's owner; NaN if the file does not contain one. */
export function ownerOf(path: string): number {
  try {
    return statSync(path).isFile() ? Number(readFileSync(path, "utf8") || Number.NaN) : Number.NaN;
  } catch {
    return Number.NaN; // it is gone
  }
}

/** Removes a dead process's lock. */
function clear(path: string, forgiven: number): boolean {
  const owner = ownerOf(path);
  const stat = lstatSync(path, { throwIfNoEntry: false });
  if (!stat) return true;
  if (Number.isNaN(owner) ? Date.now() - stat.mtimeMs <= forgiven : isAnother(owner)) return false;
  // Renamed before it is removed: of two processes that find it stale only one can rename it, and checks what it
  // renamed, since a third may have taken the lock in between.
  const away = temporary(dirname(path));
  try {
    renameSync(path, away);
    if (ownerOf(away) !== owner && !Number.isNaN(owner)) renameSync(away, path);
  } catch {
    // The other one was first.
  } finally {
    remove(away);
  }
  return true;
}

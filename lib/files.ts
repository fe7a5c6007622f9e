/** Files on this machine: written whole or not at all, and nothing but files. */
import { randomBytes } from "node:crypto";
import {
  closeSync,
  constants,
  copyFileSync,
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

/** A file of this machine could not be written: it is as it was. */
export class Unwritten extends Error {}

/** The last part of what the system says of a path goes: it may be of a name that nobody gave. */
const reasonOf = (error: unknown): string => (error as Error).message.replace(/, [a-z]+( '.*)?$/s, "");

/** What is wrong with a path that is to be a file, or to become one; a link counts as what it leads to. */
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

export function realPath(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return path;
  }
}

/** A path as short as it can be said from here. */
export const shown = (path: string) => {
  const near = relative(process.cwd(), path);
  return near.startsWith("..") ? path : near;
};

/** What this process has made and not yet put in its place, or taken away. */
const own = new Set<string>();
let watched = false;

/** Process ids mean something on one machine, and in one container of it. */
const HERE = sha256(
  `${hostname()}${existsSync("/proc/self/ns/pid") && readlinkSync("/proc/self/ns/pid")}`,
).slice(0, 6);
const NAME = /^\.?clouds-([0-9a-f]{6})-(\d+)-[0-9a-f]{8}$/;
const DAY = 86_400_000;

/**
 * A name for what is there for a while only: the end of this process removes it, and where that was killed the next
 * one that makes such a name in this folder.
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
    // The next process tries again.
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
    // A folder that may be written but not read, or another process was faster.
  }
}

/** Another process that lives. In containers this one may have the number of one that has died. */
function isAnother(pid: number): boolean {
  try {
    return pid !== process.pid && process.kill(pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}

/** Writes a new file, 0600, to its last byte. */
function writeNew(path: string, text: string | Buffer, like?: { uid: number; gid: number }): void {
  const bytes = Buffer.from(text as string);
  const handle = openSync(path, "wx", 0o600);
  try {
    for (let at = 0; at < bytes.length; ) {
      const n = writeSync(handle, bytes, at);
      if (n === 0) throw new Error("the file system takes no more");
      at += n;
    }
    // What root replaces stays its owner's.
    if (like && process.getuid?.() === 0) fchownSync(handle, like.uid, like.gid);
    fsyncSync(handle);
    if (fstatSync(handle).size !== bytes.length) throw new Error("the file system has not kept all of it");
  } finally {
    closeSync(handle);
  }
}

/**
 * Puts a text in a file's place, 0600, whole or not at all, whatever becomes of this process or the disk. A link is
 * followed.
 *
 * @throws {Unwritten} and the file is as it was.
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

/** Gives a whole file, written by `pull` or its like, its name. @throws {Unwritten} where something has the name. */
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

/** What the system says of a file, as what it means for that. Deno has no code for some of it, such as EFBIG. */
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
    // Not every file system can, and the file is in its place.
  }
}

/**
 * Writes the file anew as it is, or where there is none a file beside it: as a change of it will be written.
 *
 * @throws {Unwritten} where that will not go.
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
 * Takes a lock file, which has its owner's process id in it; one of a dead process is taken over. One without an id
 * counts as such after `forgiven` milliseconds. Answers how to give it back, or undefined where another has it.
 *
 * @throws {Unwritten}
 */
export function take(path: string, forgiven: number): (() => void) | undefined {
  const mine = temporary(dirname(path));
  try {
    writeNew(mine, String(process.pid));
    for (const again of [true, false]) {
      if (put(mine, path)) return () => remove(path);
      if (again && !clear(path, forgiven)) return undefined;
    }
    return undefined;
  } catch (error) {
    throw unwritten(path, error);
  } finally {
    remove(mine);
  }
}

/** A link makes the lock with its owner's id at once; not every file system has links. */
function put(mine: string, path: string): boolean {
  try {
    linkSync(mine, path);
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "EEXIST") return false;
  }
  try {
    copyFileSync(mine, path, constants.COPYFILE_EXCL);
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "EEXIST") return false;
    throw error;
  }
}

/** Who has a lock; NaN where it does not say. */
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
  // Renamed before it is removed: of two processes that find it stale only one may move it away, and what it moved
  // away is looked at again, since a third may have locked in between.
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

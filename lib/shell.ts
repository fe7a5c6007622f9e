/** The shell of a box: a machine that takes POSIX sh as root, this one or another over ssh. */

import { type ChildProcess, type ChildProcessWithoutNullStreams, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { lookup } from "node:dns/promises";
import { once } from "node:events";
import { createReadStream, mkdirSync, statSync } from "node:fs";
import { open as openFile } from "node:fs/promises";
import { isIPv4 } from "node:net";
import { tmpdir } from "node:os";
import { dirname } from "node:path";
import { PassThrough, Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { StringDecoder } from "node:string_decoder";
import { createGzip } from "node:zlib";
import { $, kill } from "zx/core";
import { remove, temporary } from "./files.ts";
import { SettingError } from "./settings.ts";
import { raw, sh } from "./sh.ts";
import { nameOf } from "./text.ts";

/** The box could not be reached, or refused the login; nothing was run on it. */
export class Unreachable extends Error {}

/** A shell on a machine: this one, or another over ssh. */
export interface Shell {
  /** Its ssh destination; empty for this machine. */
  host: string;
  /**
   * Runs a script as root, given over stdin, so that no secret stands on an argument list. Every line of
   * standard output goes to `onLine`. Resolves to the exit status; standard error is in `stderr`.
   * @throws {Unreachable} when ssh or sudo failed before the script began, or after `seconds`.
   */
  run(
    script: string,
    seconds: number,
    onLine: (line: string) => void,
  ): Promise<{ status: number; stderr: string }>;
  /**
   * Copies a local file to `path` on the box, compressed in transit. An interrupted copy is resumed, so the path should
   * identify the content, and the caller has to verify a hash.
   */
  push(file: string, path: string): Promise<void>;
  /** Copies a file of the box to a new file here, 0600. */
  pull(path: string, file: string): Promise<void>;
  /** Drops the connection, as before a reboot. */
  close(): Promise<void>;
}

/** Printed first by every script: output without it comes from ssh, sudo or the login shell. */
export const BEGIN = "k3s-across-clouds: begin";

/** How many bytes of output before that line are kept: the end, which says why. */
const GREETING = 1000;

/** Limit of a trip's output in bytes; the JSON of a thousand nodes is half of it. */
const MUCH = 32e6;

/** Limit of a trip's output in lines, since each costs memory. */
const LINES = 1e6;

/** How many characters of standard error are kept: the end, which says why. */
const ERRORS = 64_000;

/** Limit for a file that is copied from a box, in bytes. */
const FILE = 64e9;

let sockets: string | undefined;
const opened = new Set<string>();
/** Running ssh processes: one that is still connecting has no control socket yet, and has to be killed. */
const clients = new Set<ChildProcess>();

/**
 * A private folder for ssh's control sockets. A socket's path has at most 104 bytes (macOS; 108 on Linux), of which ssh
 * needs 40 for %C and 17 more while creating it. ssh would interpret blanks, % and $ in it.
 */
function folderFor(): string {
  const wanted = process.platform === "darwin" ? "/tmp" : tmpdir();
  let why = "";
  for (const folder of [wanted, "/tmp"]) {
    const path = temporary(folder, "");
    if (!/^[\w/.+-]+$/.test(path) || path.length > 104 - "//".length - 40 - 17) continue;
    try {
      mkdirSync(path, { mode: 0o700 });
      return path;
    } catch (error) {
      why = (error as Error).message;
    }
  }
  throw new SettingError(
    `TMPDIR is "${wanted}": expected a folder for ssh's sockets, or one at /tmp (${why})`,
  );
}

/**
 * These override ~/.ssh/config: host keys have to be known, and nothing of this machine is forwarded to a box (agent,
 * display, ports, network).
 */
const GUARD = {
  StrictHostKeyChecking: "yes",
  VerifyHostKeyDNS: "no",
  NoHostAuthenticationForLocalhost: "no",
  UpdateHostKeys: "no",
  ForwardAgent: "no",
  ForwardX11: "no",
  ClearAllForwardings: "yes",
  Tunnel: "no",
  PermitLocalCommand: "no",
};

/**
 * The system's ssh, so that ~/.ssh/config, ssh-agent, jump hosts and known_hosts apply. One connection per box: the
 * first command opens it, later ones share it. A dead box is noticed after about 15 s.
 */
function ssh(host: string, keys: string): string[] {
  sockets ??= folderFor();
  opened.add(host);
  const options = {
    BatchMode: "yes",
    ConnectTimeout: 15,
    ServerAliveInterval: 15,
    ServerAliveCountMax: 4,
    ControlMaster: "auto",
    ControlPath: `${sockets}/%C`,
    ControlPersist: 60,
    // A look is some 15 kB of shell, more than fits into a connection's first round trip.
    Compression: "yes",
    ...GUARD,
    ...(keys ? pinned(keys) : {}),
  };
  return ["ssh", "-T", ...Object.entries(options).flatMap(([k, v]) => ["-o", `${k}=${v}`]), "--", host];
}

/**
 * Options that accept a host key by these fingerprints instead of known_hosts. ssh checks the offered key within the
 * same connection (KnownHostsCommand, OpenSSH 8.5 and later), so jump hosts and ~/.ssh/config apply; ssh-keyscan would
 * ignore both.
 */
const pinned = (keys: string) => ({
  UserKnownHostsFile: "/dev/null",
  GlobalKnownHostsFile: "/dev/null",
  // ssh first asks for the order of key algorithms, with the fingerprint NONE.
  KnownHostsCommand: `/bin/sh -c 'case " $1 " in *" $2 "*) echo "$3 $4 $5" ;; *) [ "$2" = NONE ] || echo "offers $2" >&2 ;; esac' - "${keys}" %f %H %t %K`,
});

let closing: Promise<void> | undefined;
/** Closes every connection, at the end of the process. */
export const closeAll = (): Promise<void> => (closing ??= closeEach());

async function closeEach(): Promise<void> {
  for (const session of idle.values()) session.end();
  for (const client of clients) client.kill();
  await Promise.all([...opened].map((host) => open(host).close()));
  if (sockets) remove(sockets);
}

/** Wraps a one-line command to run as root: directly, or by `sudo -n`. */
const asRoot = (command: string) =>
  `sh -c ${escaped(sh`if [ "$(id -u)" = 0 ]; then exec sh -c ${command}; else exec sudo -n sh -c ${command}; fi`)}`;

/**
 * Quotes a word for any login shell: fish and csh read nested quotes differently from sh, but a backslash means the
 * same to all.
 */
const escaped = (word: string) => word.replace(/[^\w@+:,./=\u0080-\uffff-]/g, "\\$&");

/** Time limit for copying a file, in seconds: 70 MB at 20 kB/s, more for larger files. */
const COPY = 3600;

/** How a command ended; one that did not begin left its login shell's words alone. */
interface Ended {
  status: number | null;
  stderr: string;
  greeting?: string | undefined;
}

/** Starts a command as root: here, or over ssh. */
function start(host: string, keys: string, command: string): ChildProcessWithoutNullStreams {
  const rooted = asRoot(command);
  const [program = "", ...argv] = host ? [...ssh(host, keys), rooted] : ["sh", "-c", rooted];
  const child = spawn(program, argv);
  if (host) clients.add(child);
  child.once("close", () => clients.delete(child));
  // If a command ends before it has read its input, its exit status counts, not our broken pipe.
  child.stdin.on("error", () => {});
  return child;
}

/** Ends a command that hangs or floods: a killed client of a shared connection may keep its pipes open (runtimes differ). */
function abandon(child: ChildProcessWithoutNullStreams): void {
  child.stdout.destroy();
  child.stderr.destroy();
  clients.delete(child);
  if (child.pid !== undefined) kill(child.pid).catch(() => {});
}

/** After an interrupt nothing is started: an upgrade would otherwise begin its rollback with an ssh that outlives it. */
const unlessClosing = async () => {
  if (closing) await new Promise<never>(() => {});
};

/** The bytes of an output after BEGIN; the end of what comes before it is a login shell's greeting. */
function afterBegin() {
  let greeting: Buffer | undefined = Buffer.alloc(0);
  return {
    greeting: () => greeting?.toString(),
    next(chunk: Buffer): Buffer | undefined {
      if (!greeting) return chunk;
      const said = Buffer.concat([greeting, chunk]);
      const at = said.indexOf(`${BEGIN}\n`);
      greeting = at < 0 ? said.subarray(-GREETING) : undefined;
      return at < 0 ? undefined : said.subarray(at + BEGIN.length + 1);
    },
  };
}

const tooMuch = (bytes: number) =>
  new Unreachable(`The box sent more than ${bytes / 1e6} MB, far more than expected`);

/** @throws {Unreachable} after `seconds`, where `ended` is not settled. */
async function within<T>(seconds: number, ended: Promise<T>): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    const why = `Timed out after ${seconds} s: the box, or a command on it, hangs`;
    timer = setTimeout(() => reject(new Unreachable(why)), seconds * 1000);
  });
  return await Promise.race([ended, late]).finally(() => clearTimeout(timer));
}

/** The output of one script on a session, up to the marks: one on each stream, or both on one where a box joins them. */
class Output {
  readonly mark = `k3s-across-clouds-${randomBytes(8).toString("hex")} exit `;
  readonly #onLine: (line: string) => void;
  readonly #begin = afterBegin();
  readonly #decoders = [new StringDecoder("utf8"), new StringDecoder("utf8")] as const;
  readonly #bytes: [out: number, error: number] = [0, 0];
  #lines = 0;
  #rest = "";
  #stderr = "";
  #marks = 0;
  #status: number | undefined;

  constructor(onLine: (line: string) => void) {
    this.#onLine = onLine;
  }

  /** Takes bytes of standard output (0) or standard error (1), and says if the script has ended. */
  take(stream: 0 | 1, chunk: Buffer): boolean {
    this.#bytes[stream] += chunk.length;
    if (this.#bytes[stream] > MUCH) throw tooMuch(MUCH);
    const bytes = stream === 0 ? this.#begin.next(chunk) : chunk;
    const text = bytes ? this.#decoders[stream].write(bytes) : "";
    if (stream === 0) this.#split(text);
    else {
      const said = this.#stderr + text;
      const unmarked = said.replace(`${this.mark}\n`, "");
      if (unmarked !== said) this.#marks++;
      this.#stderr = unmarked.slice(-ERRORS);
    }
    return this.#marks > 1;
  }

  #split(text: string): void {
    // An unfinished line is not split again with each chunk.
    const lines = text.includes("\n") ? (this.#rest + text).split("\n") : [this.#rest + text];
    this.#rest = lines.pop() as string;
    this.#lines += lines.length;
    if (this.#lines > LINES) throw new Unreachable(`The box sent more than ${LINES} lines`);
    for (const line of lines) {
      const [said = "", status] = line.split(this.mark);
      if (said || status === undefined) this.#onLine(said);
      if (status !== undefined) this.#marks++;
      if (status) this.#status = Number(status);
    }
  }

  /** `code`, `why`: of a session that ended before its script. */
  ended(code: number | null = null, why = ""): Ended {
    if (this.#rest) this.#onLine(this.#rest);
    return {
      status: this.#status ?? code,
      stderr: this.#stderr + why,
      greeting: this.#begin.greeting(),
    };
  }
}

type End = Parameters<Output["ended"]>;

/** By box, the session that waits for its next script, or has ended. While one is busy, another script opens its own. */
const idle = new Map<string, Session>();

/**
 * A shell that stays open on a box and runs one script after the other: as a command of its own, each script would cost
 * three round trips instead of one, and some processes on both sides (issue 14).
 */
class Session {
  closed = false;
  readonly #host: string;
  readonly #child: ChildProcessWithoutNullStreams;
  #job: { output: Output; done(end: End): void; fail(error: unknown): void } | undefined;

  constructor(host: string, keys: string) {
    this.#host = host;
    this.#child = start(host, keys, "exec sh");
    this.#child.stdout.on("data", (chunk) => this.#hear(0, chunk));
    this.#child.stderr.on("data", (chunk) => this.#hear(1, chunk));
    this.#child.once("close", (code) => this.#close(code));
    this.#child.once("error", (error) => this.#close(null, error.message));
  }

  /** Rejects when the box says too much, or `onLine` throws: the session is then to be abandoned. */
  async run(script: string, onLine: (line: string) => void): Promise<Ended> {
    const output = new Output(onLine);
    this.#child.stdin.write(sh`echo ${BEGIN}
(
${raw(script)}
) </dev/null; echo ${output.mark}$?; echo ${output.mark} >&2
`);
    const end = await new Promise<End>((done, fail) => {
      this.#job = { output, done, fail };
    });
    return output.ended(...end);
  }

  #hear(stream: 0 | 1, chunk: Buffer): void {
    const job = this.#job;
    // A script has left something running: the next gets a shell of its own.
    if (!job) this.end();
    try {
      if (!job?.output.take(stream, chunk)) return;
      job.done([]);
    } catch (error) {
      job?.fail(error);
    }
    this.#job = undefined;
  }

  #close(code: number | null, why = ""): void {
    this.closed = true;
    this.#job?.done([code, why]);
    this.#job = undefined;
  }

  abandon(): void {
    this.#job = undefined;
    if (!this.closed) abandon(this.#child);
  }

  end(): void {
    this.closed = true;
    this.#child.stdin.end();
    this.#child.stdout.destroy();
    this.#child.stderr.destroy();
    if (this.#host) this.#child.kill();
  }
}

/** @param keys accepted host key fingerprints; empty: known_hosts decides. */
export function open(host: string, keys = ""): Shell {
  const box = `${host} ${keys}`;

  /**
   * Runs one command as root, with `input` on its standard input. Output is passed to `onData` with backpressure and
   * not buffered: a file may not fit into memory.
   */
  async function execute(
    command: string,
    input: Readable,
    seconds: number,
    onData: (chunk: Buffer) => Promise<void> | void,
    most = MUCH,
  ): Promise<Ended> {
    await unlessClosing();
    const child = start(host, keys, sh`echo ${BEGIN}; ${raw(command)}`);
    pipeline(input, child.stdin).catch(() => {});
    const begin = afterBegin();
    const decoder = new StringDecoder("utf8");
    let stderr = "";
    const read = async (stream: Readable, take: (chunk: Buffer) => Promise<void> | void) => {
      let size = 0;
      for await (const chunk of stream) {
        size += chunk.length;
        const limit = stream === child.stdout && begin.greeting() === undefined ? most : MUCH;
        if (size > limit) throw tooMuch(limit);
        await take(chunk);
      }
    };
    const all = Promise.all([
      once(child, "close").then(([code]) => code as number | null),
      read(child.stdout, (chunk) => {
        const bytes = begin.next(chunk);
        return bytes && onData(bytes);
      }),
      read(child.stderr, (chunk) => {
        stderr = (stderr + decoder.write(chunk)).slice(-ERRORS);
      }),
    ]);
    try {
      const [status] = await within(seconds, all);
      return { status, stderr, greeting: begin.greeting() };
    } catch (error) {
      if (child.pid === undefined) return { status: null, stderr: (error as Error).message, greeting: "" };
      all.catch(() => {});
      abandon(child);
      throw error;
    }
  }

  return {
    host,
    async run(script, seconds, onLine) {
      await unlessClosing();
      const kept = idle.get(box);
      const shell = kept?.closed === false ? kept : new Session(host, keys);
      idle.delete(box);
      try {
        const { status, stderr, greeting } = await within(seconds, shell.run(script, onLine));
        if (greeting !== undefined) throw new Unreachable(reasonOf(host, stderr, status, greeting));
        if (closing || idle.has(box)) shell.end();
        else idle.set(box, shell);
        return { status: status ?? 1, stderr };
      } catch (error) {
        shell.abandon();
        throw error;
      }
    },
    async push(file, path) {
      let have = "";
      const there = sh`mkdir -p ${dirname(path)}; wc -c 2>/dev/null <${path} || echo 0`;
      await execute(there, Readable.from([]), 60, (said) => {
        have = (have + said).slice(-GREETING);
      });
      const { size } = statSync(file);
      const start = /^\s*\d+\s*$/.test(have) && Number(have) <= size ? Number(have) : 0;
      const packed = /\.(zst|gz)$/.test(file);
      const stream = packed ? new PassThrough() : createGzip({ level: 1 });
      // An unreadable file ends the stream, and with it the copy.
      pipeline(createReadStream(file, { start }), stream).catch(() => {});
      // Into a file of its own: an earlier copy, whose operator was lost, may still write, and keeps a program from starting.
      const half = `${path}.new`;
      const begun = start
        ? sh`{ head -c ${start} ${path} >${half} && mv -f ${half} ${path}; } || { rm -f ${[path, half]}; exit 1; }`
        : sh`rm -f ${path}`;
      const write = sh`umask 077; ${raw(begun)}; ${raw(packed ? "cat" : "gzip -dc")} >>${path}`;
      checkCopy(`push ${file}`, await execute(write, stream, Math.max(COPY, size / 20_000), () => {}));
    },
    async pull(path, file) {
      const wrong = (error: Error) => {
        throw new Unreachable(`Could not write ${file}: ${error.message}`);
      };
      const out = await openFile(file, "wx", 0o600).catch(wrong);
      const write = (bytes: Buffer) => out.writeFile(bytes).catch(wrong);
      const copy = execute(sh`exec cat ${path}`, Readable.from([]), COPY, write, FILE);
      checkCopy(`copy ${path}`, await copy.finally(() => out.close()));
    },
    async close() {
      idle.get(box)?.end();
      if (!host || !opened.has(host)) return;
      const leave = ssh(host, "").toSpliced(-2, 0, "-O", "exit");
      await $({ quiet: true, nothrow: true, stdio: "ignore" })`${leave}`;
    },
  };
}

/** @throws {Unreachable} unless the command of a copy began, and ended well. */
function checkCopy(what: string, { status, stderr, greeting }: Ended): void {
  if (status !== 0 || greeting !== undefined)
    throw new Unreachable(`Could not ${what}: ${stderr.trim() || `exit status ${status}`}`);
}

/**
 * One line on why a box was not reached and what to do: from the output of ssh and sudo, and from what the box printed
 * instead of running a shell (a forced command, nologin).
 */
export function reasonOf(host: string, stderr: string, status: number | null, stdout = ""): string {
  const said = lastOf(stderr) || `exit status ${status}`;
  const compare = `compare its fingerprint with what "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" says at the vendor's console`;
  const offered = /^offers (SHA256:\S+)/m.exec(stderr)?.[1];
  if (offered) return `The host key of ${host} is ${offered}, which HOST_KEY does not name: ${compare}`;
  if (/Bad configuration option: knownhostscommand/i.test(stderr))
    return "HOST_KEY needs OpenSSH 8.5 or later on this machine";
  if (/REMOTE HOST IDENTIFICATION HAS CHANGED/.test(stderr))
    return `The host key of ${host} has changed: ${compare}; if it is the box's, "ssh-keygen -R" the old one`;
  if (/Host key verification failed/.test(stderr))
    return `The host key of ${host} is not known here: connect once with "ssh ${host}" and ${compare}, or set HOST_KEY`;
  if (/sudo: .*(password|terminal|tty)/.test(stderr))
    return `sudo asks for a password${host && ` on ${host}`}: log in as root, or allow this user passwordless sudo`;
  const lines = `${stdout}\n${stderr}`.split("\n").map((line) => line.trim());
  for (const line of lines)
    for (const [pattern, remedy] of REMEDIES) {
      const match = pattern.exec(line);
      if (match) return `${nameOf(host)} says: ${line.slice(0, 300)}: ${remedy(host, match[1] ?? match[2])}`;
    }
  if (/Permission denied/.test(stderr))
    return `${host} refused the login (${said}): check the user and the key`;
  if (!host) return `Could not run a shell: ${said}`;
  // 255 is ssh's own status; any other comes from the box, after a successful login.
  if (status === 255 || status === null) return `Could not reach ${host}: ${said}`;
  const words = lastOf(stdout) || lastOf(stderr);
  return `${nameOf(host)} ${words ? `says: ${words}: it ` : ""}accepts the login, but runs no command (exit status ${status})`;
}

const lastOf = (text: string) => text.trim().split("\n").at(-1)?.trim().slice(0, 300);

const USER = "([a-z_][a-z0-9_-]{0,31})";
/** What boxes print when they refuse a login, and the remedy. Only a plain user name is taken from it. */
const REMEDIES: readonly [RegExp, (host: string, user?: string) => string][] = [
  [
    // cloud-init's disable_root (AWS, Oracle, OpenStack and others).
    new RegExp(`[Ll]og ?in as (?:the )?(?:user )?(?:["']${USER}["']|${USER}(?= (?:rather|instead)))`),
    (host, user) => `write ${host.replace(/^(ssh:\/\/)?([^@]*@)?/, `$1${user}@`)}`,
  ],
  [
    /account is (?:currently )?not available/,
    () => "the shell of this user lets nobody in: write another user, USER@HOST",
  ],
  [
    /password has expired|required to change your password|Password change required/,
    (host) => `log in once with "ssh ${host}", and set a new password`,
  ],
  [
    /\bsudo: .*not found|not in the sudoers file|is not allowed to (?:execute|run sudo)/,
    () => "log in as root, or allow this user passwordless sudo",
  ],
];

const addresses = new Map<string, Promise<string>>();

/**
 * The address to which ssh would connect, as an IPv4 address: the host itself if it is one, else HostName of
 * ~/.ssh/config, then the resolver. Each host is asked for once.
 * @throws {Error} when the name does not resolve.
 */
export function addressOf(host: string): Promise<string> {
  const known = addresses.get(host) ?? resolved(host);
  addresses.set(host, known);
  return known;
}

async function resolved(host: string): Promise<string> {
  const literal = host.replace(/^.*@/, "");
  if (isIPv4(literal)) return literal;
  const config = await $({ quiet: true, nothrow: true })`ssh -G -- ${host}`;
  if (config.exitCode !== 0) throw new Error(config.stderr.trim().split("\n").at(-1) || "ssh -G failed");
  const name = /^hostname (.*)$/m.exec(config.stdout)?.[1] ?? host;
  return (await lookup(name, { family: 4 })).address;
}

/**
 * Two clouds with the same private network behind 1:1 NAT, an operator and a download mirror, all in
 * namespaces of one Linux machine. Boxes are systemd-nspawn containers with sshd:
 *
 *     operator 203.0.113.254 ───┬── router a ── a1 192.168.0.11 = 198.51.100.11, a2 …
 *     mirror   203.0.113.80-82 ─┴── router b ── b1 192.168.0.11 = 198.51.101.11, b2 …
 *
 * A box's name says where it is: its letter the cloud, its number n the addresses 192.168.0.(10 + n)
 * and 198.51.(100 or 101).(10 + n). So a1 and b1 share a private address on purpose, and nothing can
 * work by accident. All addresses are from the documentation ranges, and no link leaves the namespaces.
 *
 * Boxes whose letter is h or i are at home, as h1 192.168.0.11: behind a router that masquerades, by
 * 198.51.102.1 or 198.51.103.1, and lets nothing in but ssh, at its port 2200 + n.
 */
import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { cp, mkdir, open, readdir, readFile, rm, rmdir, symlink, writeFile } from "node:fs/promises";
import { request } from "node:http";
import { dirname, join, relative } from "node:path";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { $, type ProcessOutput } from "zx";
import { boxFiles, COMPILED, standIn } from "../stand-in/pack.ts";
import { caches, PACKAGES_URL } from "./cache.ts";
import type { Fault } from "./mirror.ts";

export type { Fault };
export type Cloud = "a" | "b";
export type Home = "h" | "i";

export type LabSpec = {
  /** Short, of a-z, 0-9 and -; labs of different names run side by side. */
  name: string;
  /** Default: a1 b1 b2. */
  boxes?: string[];
  /** The clouds in which boxes reach each other, and themselves, by public addresses. Default: b. */
  hairpin?: Cloud[];
  /** The homes whose router takes another port for each peer. The others keep a box's own while it is free. Default: i. */
  symmetric?: Home[];
  /** Boxes come with wireguard-tools. Default: they have to be installed, from the lab's mirror. */
  tools?: boolean;
  /** Its lines can be made slow: `line`. */
  slow?: boolean;
  /** Boxes with a disk of so many megabytes, which can be filled, saved and restored. */
  disk?: number;
  /** Seconds from k3s's start to its node being Ready, for the stand-in; default: as fast as it can. */
  startSeconds?: number;
  /** A real k3s, served in place of the stand-in of its version; boxes are then made so that it runs. */
  k3sBin?: string;
};

export type Run = {
  input?: string;
  env?: Record<string, string>;
  /** Seconds; default 600. */
  timeout?: number;
  /** On this terminal, nothing captured. */
  live?: boolean;
};

export type Box = {
  name: string;
  privateIp: string;
  /** At home it is the router's, as it is now. */
  readonly publicIp: string;
  /** Runs a sh script as root in the box, without ssh; answers its standard output, throws if it fails. */
  sh(script: string): Promise<string>;
  /** Pulls the plug: no process of the box gets to say goodbye. Its disk stays. */
  off(): Promise<void>;
  /** Starts it again, and waits for ssh. */
  on(): Promise<void>;
  /** Waits for ssh, as after a reboot from inside; default at most 60 s. */
  answers(seconds?: number): Promise<void>;
};

/** One that is a container. */
export type Light = Box & {
  /** Keeps what is on its `disk`: it is off meanwhile. */
  save(tag: string): Promise<void>;
  /** Starts it with what was saved, running or not. */
  restore(tag: string): Promise<void>;
};

export type Metered = {
  ran: ProcessOutput;
  /** CPU of all its processes, in seconds, and their peak memory in bytes. */
  cpu: number;
  memory: number;
  /** The most that were seen at once: processes, and open files of one of them. */
  processes: number;
  files: number;
};

export type Lab = {
  name: string;
  dir: string;
  /** The operator's env file, ENV_FILE in their environment; not made by `up`. */
  envFile: string;
  /** The real k3s it was built for, if any. */
  k3sBin?: string;
  boxes: Light[];
  box(name: string): Light;
  add(name: string): Promise<Box>;
  /** Runs as the operator, in the project's folder: words, or one string for sh. Never throws. */
  op(command: string | string[], options?: Run): Promise<ProcessOutput>;
  /** The same, and what the command took. */
  metered(command: string[], options?: Run): Promise<Metered>;
  /** CPU that a box has taken so far, in seconds. */
  cpuOf(box: string): Promise<number>;
  /** Runs sh in a network namespace: op, inet, router-a, router-h and so on, or a box. */
  net(namespace: string, script: string): Promise<string>;
  hairpin(cloud: Cloud, on: boolean): Promise<void>;
  symmetric(home: Home, on: boolean): Promise<void>;
  /** A home's line comes up anew, with this address or MTU; what went through it before is cut. */
  dial(home: Home, address: string, mtu?: number): Promise<void>;
  /** What the line of a cloud or of the operator adds to every round trip, in milliseconds, and the percentage of packets it loses. */
  line(of: Cloud | "op", ms: number, loss?: number): Promise<void>;
  mirror: Mirror;
  down(): Promise<void>;
};

export type Mirror = {
  /** Folders by address; files put here are served at once. */
  dir: string;
  /** A line a request: address, method, path, range, status. */
  log: string;
  /** Download bases, to which /VERSION/FILE is added: two hosts with the same files. */
  github: string;
  plain: string;
  fault(base: string, fault: Fault): Promise<void>;
};

/** As in the Makefile: a script's start takes a quarter of the CPU time that way (Node 24). */
const NODE_COMPILE_CACHE = join(import.meta.dirname, "../../node_modules/.compiled");
const PROJECT = join(import.meta.dirname, "../..");
const INSIDE = join(import.meta.dirname, "inside.sh");
const STATE = process.env.K3S_LAB_STATE || "/var/lib/k3s-across-clouds";
const STAND_IN = "/opt/k3s-stand-in";
const VERSIONS = ["v1.17.6+k3s1", "v1.36.2+k3s1"];
const GITHUB = "203.0.113.80";
const PLAIN = "203.0.113.81";
const RELEASES = "k3s-io/k3s/releases/download";
/** command: the Debian package that has it. */
const NEEDS = {
  mmdebstrap: "mmdebstrap",
  "systemd-nspawn": "systemd-container",
  ip: "iproute2",
  nft: "nftables",
  nsenter: "util-linux",
  pgrep: "procps",
  ssh: "openssh-client",
  make: "make",
};

const run = $({ quiet: true, stdio: ["ignore", "pipe", "pipe"] });
let meters = 0;

/** Starts a lab, after clearing away what is left of one of this name. */
export async function up(spec: LabSpec, say: (line: string) => void = () => {}): Promise<Lab> {
  if (!/^[a-z0-9-]{1,24}$/.test(spec.name)) throw new Error(`"${spec.name}" is no name for a lab`);
  const names = spec.boxes ?? ["a1", "b1", "b2"];
  await requirements(spec.slow ? { ...NEEDS, python3: "python3" } : NEEDS, say);
  if (names.length > 8) await moreInotify(names.length, say);
  await down(spec.name);
  const dir = join(STATE, spec.name);
  await mkdir(join(dir, "boxes"), { recursive: true, mode: 0o700 });
  const cache = await caches(spec.tools ?? false, say);
  await writeFile(join(dir, "spec.json"), JSON.stringify({ ...spec, boxes: names, root: cache.root }));

  await furnishOperator(dir);
  await furnishMirror(dir, spec, cache.packages);
  for (const { from, to } of boxFiles()) await cp(from, join(dir, "stand-in", relative(STAND_IN, to)));
  await run`cp --link ${cache.node} ${dir}/stand-in/node 2>/dev/null || cp --reflink=auto ${cache.node} ${dir}/stand-in/node`;

  await run({
    env: { ...process.env, ...COMPILED(join(dir, "stand-in")) },
  })`${dir}/stand-in/node --no-warnings ${dir}/stand-in/k3s.ts ${VERSIONS[0]} k3s --version`;

  await detached(join(dir, "lab.log"), [
    "sh",
    INSIDE,
    "hold",
    spec.name,
    dir,
    ...(spec.slow ? ["slow"] : []),
  ]);
  await until(() => existsSync(join(dir, "ready")), 10, join(dir, "lab.log"));
  const inside = await entrance(dir);
  if (!inside) throw new Error(`The lab ended at once: ${await readFile(join(dir, "lab.log"), "utf8")}`);

  const socket = join(dir, "mirror.sock");
  const serve = [join(import.meta.dirname, "mirror.ts"), join(dir, "mirror"), socket];
  const sites = [GITHUB, PLAIN, new URL(PACKAGES_URL).hostname];
  const mirror = ["ip", "netns", "exec", "inet", `${dir}/stand-in/node`, ...serve, ...sites];
  await detached(join(dir, "mirror.log"), [...inside, ...mirror]);

  const lab = await handle(spec.name, dir, inside);
  for (const cloud of ["a", "b"] as const) await lab.hairpin(cloud, (spec.hairpin ?? ["b"]).includes(cloud));
  for (const name of names) await openHome(dir, name);
  await Promise.all(names.map((name) => furnishBox(dir, name)));
  await acquaint(dir);
  await Promise.all(names.map((name) => start(dir, name)));
  await Promise.all(lab.boxes.map((box) => box.answers(60 + 5 * names.length)));
  await Promise.all(lab.boxes.map(booted));
  await until(() => existsSync(socket), 10, join(dir, "mirror.log"));
  await writeFile(join(dir, "whole"), "");
  return lab;
}

/** The running lab of this name; not one whose `up` was interrupted. */
export async function attach(name: string): Promise<Lab | undefined> {
  const dir = join(STATE, name);
  const inside = await entrance(dir);
  return inside && existsSync(join(dir, "whole")) ? handle(name, dir, inside) : undefined;
}

async function handle(name: string, dir: string, inside: string[]): Promise<Lab> {
  const shell = async (...words: string[]) =>
    (await run`${[...inside, "sh", INSIDE, words[0] ?? "", name, dir, ...words.slice(1)]}`).stdout;

  const box = (name: string): Light => {
    const { privateIp, port } = place(name);
    const answers = async (seconds = 60) => {
      await shell("await", `${seconds}`, publicIpOf(dir, name), `${port}`).catch(
        async (error: ProcessOutput) => {
          const log = await readFile(join(dir, "boxes", name, "console.log"), "utf8");
          throw new Error(`${name}: ${error.stderr.trim()}. Its console:\n${log.slice(-2000)}`);
        },
      );
    };
    const off = async () => void (await shell("off", name));
    const on = async () => {
      await start(dir, name);
      await answers();
    };
    return {
      name,
      privateIp,
      get publicIp() {
        return publicIpOf(dir, name);
      },
      answers,
      sh: (script) => shell("enter", name, script),
      off,
      on,
      save: async (tag) => {
        await off();
        await shell("save", name, tag);
        await on();
      },
      restore: async (tag) => {
        await off().catch(() => {});
        const { root, disk } = await specOf(dir);
        await shell("restore", name, root, `${disk}`, tag);
        await on();
      },
    };
  };
  const op: Lab["op"] = async (command, { input, env = {}, timeout = 600, live } = {}) => {
    const words = typeof command === "string" ? ["sh", "-c", command] : command;
    const own = {
      HOME: join(dir, "home"),
      USER: "root",
      ENV_FILE: envFile,
      PATH,
      LANG: "C.UTF-8",
      NODE_COMPILE_CACHE,
    };
    const terminal = process.env.TERM ? { TERM: process.env.TERM } : {};
    const all = Object.entries({ ...own, ...terminal, ...env }).map(([key, value]) => `${key}=${value}`);
    const first = live ? "inherit" : input === undefined ? "ignore" : "pipe";
    const rest = live ? "inherit" : "pipe";
    const child = $({
      quiet: true,
      nothrow: true,
      stdio: [first, rest, rest],
      timeout: `${timeout}s`,
    })`${[...inside, "env", "-i", "-C", PROJECT, ...all, ...words]}`;
    // An ssh that ends before it has read everything says why by its status, not by our broken pipe.
    if (input !== undefined) pipeline(Readable.from([input]), child.stdin).catch(() => {});
    return await child;
  };
  const envFile = join(dir, "home/.env");
  const { k3sBin } = await specOf(dir);
  return {
    name,
    dir,
    envFile,
    ...(k3sBin ? { k3sBin } : {}),
    get boxes() {
      return boxNames(dir).map(box);
    },
    box,
    add: async (name) => {
      await openHome(dir, name);
      await furnishBox(dir, name);
      await acquaint(dir);
      await start(dir, name);
      await box(name).answers();
      await booted(box(name));
      return box(name);
    },
    op,
    metered: async (command, options) => {
      const meter = `meter${meters++}`;
      const group = `k3s-lab-${name}-${meter}`;
      let [processes, files] = [0, 0];
      const timer = setInterval(async () => {
        const pids = [...new Set((await counted(group, "cgroup.procs")).split("\n").filter(Boolean))];
        processes = Math.max(processes, pids.length);
        const open = (pid: string) => readdir(`/proc/${pid}/fd`).catch(() => []);
        files = Math.max(files, ...(await Promise.all(pids.map(open))).map((list) => list.length));
      }, 200);
      const ran = await op(["sh", INSIDE, "meter", name, dir, meter, ...command], options).finally(() =>
        clearInterval(timer),
      );
      const bytes =
        (await counted(group, "memory.peak")) || (await counted(group, "memory.max_usage_in_bytes"));
      if (!bytes) throw new Error("This machine's cgroups do not tell peak memory");
      return { ran, cpu: await cpuOf(group), memory: Number(bytes), processes, files };
    },
    cpuOf: (box) => cpuOf(`k3s-lab-${name}-${box}`),
    net: async (namespace, script) =>
      (await run`${[...inside, "ip", "netns", "exec", namespace, "sh", "-euc", script]}`).stdout,
    hairpin: async (cloud, on) => void (await shell("hairpin", cloud, on ? "on" : "off")),
    symmetric: async (home, on) => void (await shell("symmetric", home, on ? "on" : "off")),
    dial: async (home, address, mtu = 1500) => {
      await shell("dial", home, address, `${mtu}`);
      await acquaint(dir);
    },
    line: async (of, ms, loss = 0) => void (await shell("line", of, `${ms / 2}`, `${loss}`)),
    mirror: {
      dir: join(dir, "mirror"),
      log: join(dir, "mirror.log"),
      github: `http://${GITHUB}/${RELEASES}`,
      plain: `http://${PLAIN}/${RELEASES}`,
      fault: (base, fault) => tellMirror(join(dir, "mirror.sock"), new URL(base).hostname, fault),
    },
    down: () => down(name),
  };
}

/** sshd answers before the boot's last services (e2scrub_reap and others) have ended: a test would see them. */
const booted = (box: Box) => box.sh("systemctl is-system-running --quiet --wait || :");

/** Ends a lab and removes every trace of it; also of one that crashed, or that never was. */
export async function down(name: string) {
  const dir = join(STATE, name);
  const holder = await holderOf(dir);
  if (holder) {
    // Its child is the first process in there: with it all others end, and then the holder.
    const child = (await run({ nothrow: true })`pgrep -P ${holder}`).stdout.trim();
    process.kill(Number(child) || holder, "SIGKILL");
    await until(async () => !(await holderOf(dir)), 30);
  }
  for (const top of await cgroupTops())
    for (const group of await readdir(top))
      if (group.startsWith(`k3s-lab-${name}-`) && !group.slice(`k3s-lab-${name}-`.length).includes("-"))
        await removeGroup(join(top, group));
  await rm(dir, { recursive: true, force: true });
  await rmdir(STATE).catch(() => {});
}

/** The operator's Node: this one, unless another is named. */
const PATH = `${process.env.K3S_LAB_NODE ?? dirname(process.execPath)}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin`;

const boxNames = (dir: string) => readdirSync(join(dir, "boxes")).sort();

/** Names of so many boxes: a1 is the server; the agents are spread over both clouds. */
export const spread = (boxes: number) =>
  Array.from({ length: boxes }, (_, i) => `${i % 2 ? "b" : "a"}${Math.floor(i / 2) + 1}`);

export function place(box: string) {
  const [, cloud = "", digits] = /^([abhi])([1-9]\d?)$/.exec(box) ?? [];
  if (!cloud) throw new Error(`"${box}" is no name for a box: one is a letter, a, b, h or i, and a number`);
  const n = Number(digits);
  const home = "hi".includes(cloud);
  return {
    cloud,
    home,
    privateIp: `192.168.0.${n + 10}`,
    /** At home, the router's first one. */
    publicIp: `198.51.${100 + "abhi".indexOf(cloud)}.${home ? 1 : n + 10}`,
    /** Of ssh. */
    port: home ? 2200 + n : 22,
  };
}

/** Whether it has no public address of its own. */
export const atHome = ({ name }: Pick<Box, "name">) => place(name).home;

/** As it is now, unlike the one by its place. */
function publicIpOf(dir: string, box: string) {
  const { cloud, home, publicIp } = place(box);
  return home ? readFileSync(join(dir, `home-${cloud}`), "utf8").trim() : publicIp;
}

/** The router of the first box at that home. */
async function openHome(dir: string, box: string) {
  const { cloud, home, publicIp } = place(box);
  if (!home || existsSync(join(dir, `home-${cloud}`))) return;
  const { name, symmetric = ["i"] } = await specOf(dir);
  const words = [name, dir, cloud, publicIp, symmetric.includes(cloud as Home) ? "on" : "off"];
  await run`${[...((await entrance(dir)) ?? []), "sh", INSIDE, "home", ...words]}`;
}

async function requirements(needs: Record<string, string>, say: (line: string) => void) {
  // A shell by `su` has no sbin in its PATH.
  process.env.PATH += ":/usr/local/sbin:/usr/sbin:/sbin";
  if (process.platform !== "linux" || process.getuid?.() !== 0)
    throw new Error("The lab needs Linux and root: it makes namespaces and mounts");
  const missing = [];
  for (const [command, name] of Object.entries(needs))
    if ((await run({ nothrow: true })`command -v ${command}`).exitCode) missing.push(name);
  const install = `apt-get install -y --no-install-recommends ${missing.join(" ")}`;
  const apt = await run({ nothrow: true })`command -v apt-get`;
  if (apt.exitCode) throw new Error("The lab needs Debian or Ubuntu: its boxes are made by apt");
  if (missing.length) {
    say(install);
    await run`apt-get -q update && DEBIAN_FRONTEND=noninteractive sh -c ${install}`;
  }
  if (!existsSync("/dev/net/tun")) throw new Error("The lab needs /dev/net/tun: load the module tun");
}

/** A box holds some nine of inotify's instances, of which a machine's root has 128: too few for 15 boxes. */
async function moreInotify(boxes: number, say: (line: string) => void) {
  const limit = "/proc/sys/fs/inotify/max_user_instances";
  const needed = Math.max(1024, 12 * boxes);
  if (Number(await readFile(limit, "utf8")) >= needed) return;
  say(`${limit}: ${needed}, for this many boxes`);
  await writeFile(limit, `${needed}`);
}

/** The operator's home and what they know: names of boxes, keys, and nothing of this machine's. */
async function furnishOperator(dir: string) {
  await mkdir(join(dir, "etc"));
  await mkdir(join(dir, "home/.ssh"), { recursive: true, mode: 0o700 });
  await run`ssh-keygen -q -t ed25519 -N ${""} -C operator -f ${dir}/home/.ssh/id_ed25519`;
  const passwd = await readFile("/etc/passwd", "utf8");
  const home = join(dir, "home");
  await writeFile(join(dir, "etc/passwd"), passwd.replace(/^(root:(?:[^:]*:){4})[^:]*/m, `$1${home}`));
  await writeFile(join(dir, "etc/resolv.conf"), "");
  await writeFile(join(dir, "etc/hosts"), "");
}

/** Tells the operator the boxes' addresses and host keys. */
export async function acquaint(dir: string) {
  let hosts = "127.0.0.1 localhost operator\n";
  let config = "";
  let known = "";
  for (const name of boxNames(dir)) {
    const publicIp = publicIpOf(dir, name);
    const { port } = place(name);
    const key = await readFile(join(dir, "boxes", name, "host-key.pub"), "utf8");
    hosts += `${publicIp} ${name}\n`;
    config += `Host ${name}\n  HostName ${publicIp}\n  User root\n${port === 22 ? "" : `  Port ${port}\n`}`;
    known += `${name},${port === 22 ? publicIp : `[${publicIp}]:${port}`} ${key}`;
  }
  // In place: hosts is mounted, and a new file would not be.
  await writeFile(join(dir, "etc/hosts"), hosts);
  await writeFile(join(dir, "home/.ssh/config"), config, { mode: 0o600 });
  await writeFile(join(dir, "home/.ssh/known_hosts"), known);
}

async function furnishMirror(dir: string, spec: LabSpec, packages: string) {
  await mkdir(join(dir, "mirror"));
  const releases = new Map<string, string>();
  for (const version of VERSIONS) {
    releases.set(version, join(dir, "mirror", version));
    await writeFile(join(dir, "mirror", version), standIn(version));
  }
  if (spec.k3sBin) releases.set(await k3sVersion(spec.k3sBin), spec.k3sBin);
  for (const [version, binary] of releases) {
    const hash = createHash("sha256")
      .update(await readFile(binary))
      .digest("hex");
    for (const site of [GITHUB, PLAIN]) {
      const folder = join(dir, "mirror", site, RELEASES, version);
      await mkdir(folder, { recursive: true });
      for (const [arch, file] of Object.entries({ amd64: "k3s", arm64: "k3s-arm64", arm: "k3s-armhf" })) {
        await symlink(binary, join(folder, file));
        await writeFile(join(folder, `sha256sum-${arch}.txt`), `${hash}  ${file}\n`);
      }
    }
  }
  await cp(packages, join(dir, "mirror", new URL(PACKAGES_URL).hostname), { recursive: true });
}

export async function k3sVersion(bin: string) {
  const said = (await run`${bin} --version`).stdout;
  const version = /\bv\d+\.\d+\.\d+\S*\+k3s\d+/.exec(said)?.[0];
  if (!version) throw new Error(`"${bin}" is no k3s: --version says "${said.trim()}"`);
  return version;
}

async function furnishBox(dir: string, name: string) {
  place(name);
  const { name: lab, root, k3sBin, startSeconds, disk } = await specOf(dir);
  const words = [lab, dir, name, root, kindOf(k3sBin), `${startSeconds ?? ""}`, `${disk ?? ""}`];
  await mkdir(join(dir, "boxes", name));
  await run`${[...((await entrance(dir)) ?? []), "sh", INSIDE, "furnish", ...words]}`;
}

async function start(dir: string, name: string) {
  const { cloud, home, privateIp, publicIp, port } = place(name);
  const { name: lab, k3sBin } = await specOf(dir);
  const outside = home ? `${port}` : publicIp;
  const words = ["sh", INSIDE, "run", lab, dir, name, cloud, privateIp, outside, kindOf(k3sBin)];
  const binds = [`--bind-ro=${dir}/stand-in:${STAND_IN}`];
  // The overlays of containers do not stack on the box's own.
  if (k3sBin)
    for (const folder of ["/var/lib/rancher", "/var/lib/kubelet"]) {
      const disk = join(dir, "boxes", name, folder.replaceAll("/", "-"));
      await mkdir(disk, { recursive: true });
      binds.push(`--bind=${disk}:${folder}`);
    }
  await detached(join(dir, "boxes", name, "console.log"), [
    ...((await entrance(dir)) ?? []),
    ...words,
    ...binds,
  ]);
}

const kindOf = (k3sBin?: string) => (k3sBin ? "real" : "stand-in");

async function specOf(dir: string): Promise<LabSpec & { root: string }> {
  return JSON.parse(await readFile(join(dir, "spec.json"), "utf8"));
}

/** The process that holds the lab together, if it is still that one. */
async function holderOf(dir: string) {
  const record = await readFile(join(dir, "holder"), "utf8").catch(() => "");
  const [pid, started, boot] = record.trim().split(" ");
  if (!pid) return;
  const stat = await readFile(`/proc/${pid}/stat`, "utf8").catch(() => "");
  const fields = stat.replace(/^.*\) /s, "").split(" ");
  const same = fields[0] !== "Z" && fields[19] === started;
  const sameBoot = (await readFile("/proc/sys/kernel/random/boot_id", "utf8")).trim() === boot;
  return pid && same && sameBoot ? Number(pid) : undefined;
}

/** The words that run what follows them inside the lab, in the operator's network. */
async function entrance(dir: string) {
  const holder = await holderOf(dir);
  if (!holder || !existsSync(join(dir, "ready"))) return;
  const ns = `/proc/${holder}/ns`;
  const pid = `--pid=${ns}/pid_for_children`;
  return ["nsenter", `--mount=${ns}/mnt`, `--net=${ns}/net`, `--uts=${ns}/uts`, pid, "--"];
}

/** Starts a command that goes on when this process ends, whatever ends it. */
async function detached(log: string, words: string[]) {
  const { spawn } = await import("node:child_process");
  const file = await open(log, "a");
  spawn(words[0] ?? "", words.slice(1), { detached: true, stdio: ["ignore", file.fd, file.fd] }).unref();
  await file.close();
}

async function until(what: () => boolean | Promise<boolean>, seconds: number, log?: string) {
  for (const end = Date.now() + seconds * 1000; !(await what()); await sleep(20))
    if (Date.now() > end)
      throw new Error(
        `The lab did not settle in ${seconds} s${log ? `:\n${await readFile(log, "utf8")}` : ""}`,
      );
}

/** The tops of the cgroup trees: one in version 2, one a controller in version 1. */
async function cgroupTops() {
  const top = "/sys/fs/cgroup";
  if (existsSync(join(top, "cgroup.procs"))) return [top];
  return (await readdir(top)).map((name) => join(top, name));
}

/** What a cgroup's file says, in whichever tree it is. */
async function counted(group: string, file: string): Promise<string> {
  const read = (top: string) => readFile(join(top, group, file), "utf8").catch(() => "");
  return (await Promise.all((await cgroupTops()).map(read))).join("");
}

/** Seconds. They are counted in version 2's tree whatever controllers it has. */
async function cpuOf(group: string): Promise<number> {
  const usec = /(?<=^usage_usec )\d+/m.exec(await counted(group, "cpu.stat"))?.[0];
  if (!usec) throw new Error("This machine's cgroups do not tell CPU time");
  return Number(usec) / 1e6;
}

async function removeGroup(group: string) {
  for (const entry of await readdir(group, { withFileTypes: true }))
    if (entry.isDirectory()) await removeGroup(join(group, entry.name));
  // A cgroup stays busy for a moment after its last process.
  for (let tries = 100; ; tries--)
    try {
      return await rmdir(group);
    } catch (error) {
      if (!tries) throw error;
      await sleep(50);
    }
}

function tellMirror(socketPath: string, address: string, fault: Fault) {
  return new Promise<void>((resolve, reject) => {
    const call = request({ socketPath, path: `/${address}`, method: "PUT" }, (response) =>
      response.resume().on("end", resolve),
    );
    call.on("error", reject).end(JSON.stringify(fault));
  });
}

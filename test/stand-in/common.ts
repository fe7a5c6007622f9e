/** What server, agent and kubectl share: versions, k3s's log lines, the box's addresses, systemd. */
import { execFile, execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, readFileSync } from "node:fs";
import { networkInterfaces } from "node:os";
import { join } from "node:path";
import { asksShutdown, ending } from "./words.ts";

export type Generation = "old" | "modern";

/** In milliseconds. Real k3s takes 10 to 30 times as long for most of these. */
export const DELAY = {
  /** A real one takes 4 to 20 s: too long for each start in the lab, so a test says where that matters. */
  apiUp: existsSync("/run/stand-in-slow") ? 6000 : 700,
  kubelet: 300,
  hostIpUnknown: 2500,
  fatalBackend: 1000,
  /** The cloud controller goes through the nodes once a minute. */
  cloud: 1000 * Number(process.env.STAND_IN_CLOUD_SECONDS ?? 4),
  /** kube-controller-manager's node-monitor-grace-period is 40 s. */
  grace: 1000 * Number(process.env.STAND_IN_GRACE_SECONDS ?? 40),
  heartbeat: 3000,
  /** From the start to a Ready node, where one wants to know that beforehand (test/bench). */
  start: 1000 * Number(process.env.STAND_IN_START_SECONDS ?? 0),
  poll: 1000,
  manifests: 3000,
  /** kube-proxy's iptables.syncPeriod. */
  proxy: 30_000,
  metrics: 3000,
};

export function generation(version: string): Generation {
  const minor = Number(/^v1\.(\d+)\.\d+([-+].+)?$/.exec(version)?.[1]);
  if (minor >= 17 && minor <= 22) return "old";
  if (minor >= 26) return "modern";
  throw new Error(`The stand-in knows k3s v1.17 to v1.22 and v1.26 or later, not ${version}`);
}

const BUILDS: Record<string, string> = { "v1.17.6+k3s1": "bd7fb4b0", "v1.36.3+k3s1": "66a14f0e" };

/** `v1.17.6+k3s1 (bd7fb4b0)`; for a version that was not recorded, a made-up commit. */
export function build(version: string): string {
  return `${version} (${BUILDS[version] ?? createHash("sha256").update(version).digest("hex").slice(0, 8)})`;
}

export function versionText(version: string): string {
  return `k3s version ${build(version)}\n${generation(version) === "modern" ? "go version go1.26.8\n" : ""}`;
}

/** A recorded text. In a box the fixtures lie beside this file, in the project one folder up. */
export function fixture(name: string): string {
  const path = [
    join(import.meta.dirname, "fixtures", name),
    join(import.meta.dirname, "..", "fixtures", name),
  ].find(existsSync);
  if (!path) throw new Error(`No fixture ${name}`);
  return readFileSync(path, "utf8").replace(/^#.*\n/, "");
}

let nanoseconds = false;
/** v1.17 prints nanoseconds once its logging is set up; modern k3s prints seconds. */
export function useNanoseconds(): void {
  nanoseconds = true;
}

/** One line as logrus writes it when its output is no terminal. */
export function logLine(level: string, message: string): string {
  const micros = Math.floor((performance.timeOrigin + performance.now()) * 1000);
  const time = new Date(micros / 1000)
    .toISOString()
    .replace(/\.\d+Z$/, nanoseconds ? `.${String(micros % 1e6).padStart(6, "0")}000Z` : "Z");
  const text = /^[A-Za-z0-9._/@^+-]+$/.test(message) ? message : JSON.stringify(message);
  return `time="${time}" level=${level} msg=${text}\n`;
}

export function log(level: "info" | "warning" | "error", message: string): void {
  process.stderr.write(logLine(level, message));
}

/** One line as klog writes it, the log of Kubernetes within k3s. */
export function klog(where: string, message: string): void {
  const [, month, day, time] = /-(..)-(..)T(.*)Z/.exec(new Date().toISOString()) ?? [];
  process.stderr.write(
    `I${month}${day} ${time}000 ${String(process.pid).padStart(7)} ${where}] ${JSON.stringify(message)}\n`,
  );
}

/** How k3s gives up. */
export function fatal(gen: Generation, message: string): never {
  process.stderr.write(logLine("fatal", ending(gen, message)));
  process.exit(1);
}

/** Modern k3s: a component that fails after the start asks for a shutdown, which ends with status 0. */
export function shutdown(message: string): never {
  log("error", asksShutdown(message));
  process.exit(0);
}

export const sleep = (ms: number): Promise<void> => new Promise((r) => setTimeout(r, ms));

/** Runs a command to its end and gives its output; throws with its stderr. */
export function run(command: string, ...args: string[]): string {
  return execFileSync(command, args, {
    encoding: "utf8",
    stdio: ["ignore", "pipe", "pipe"],
    env: { ...process.env, NOTIFY_SOCKET: "" },
  });
}

/**
 * READY=1 from the main process, as Type=notify with NotifyAccess=main wants it. node cannot send a unix datagram;
 * systemd-notify run by root sends it in the name of the process given.
 */
export function ready(socket: string | undefined): Promise<void> {
  if (!socket) return Promise.resolve();
  return new Promise((done) =>
    execFile(
      "systemd-notify",
      [`--pid=${process.pid}`, "--ready"],
      { env: { ...process.env, NOTIFY_SOCKET: socket } },
      (error) => {
        if (error) log("error", `stand-in: systemd-notify: ${error.message}`);
        done();
      },
    ),
  );
}

/** The interface of the default route with the least metric. */
export function defaultInterface(
  routes: string = readFileSync("/proc/net/route", "utf8"),
): string | undefined {
  return routes
    .trim()
    .split("\n")
    .slice(1)
    .map((l) => l.split("\t"))
    .filter((f) => f[1] === "00000000" && f[7] === "00000000")
    .sort((a, b) => Number(a[6]) - Number(b[6]))[0]?.[0];
}

/** An interface's first global IPv4 address. */
export function addressOf(iface: string): string | undefined {
  return networkInterfaces()[iface]?.find((a) => a.family === "IPv4" && !/^(127|169\.254)\./.test(a.address))
    ?.address;
}

export function hostAddress(): string | undefined {
  const iface = defaultInterface();
  return iface && addressOf(iface);
}

export function isLocal(ip: string): boolean {
  return Object.values(networkInterfaces()).some((l) => l?.some((a) => a.address === ip));
}

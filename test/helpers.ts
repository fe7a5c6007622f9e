import { strict as assert } from "node:assert";
import { spawn, spawnSync } from "node:child_process";
import { chmodSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import type { Member } from "../lib/check/survey.ts";
import { admits, type Device, ENTRY_UNIT, peersText } from "../lib/k3s/devices.ts";
import { ENTRY_PROGRAM } from "../lib/k3s/firewall/traffic.ts";
import { interfaceOf, type Role, unitOf, unitPath } from "../lib/k3s/unit.ts";
import { lookScript, reader, wrapInMain } from "../lib/protocol.ts";
import { silent } from "../lib/report.ts";
import type { Box } from "../lib/script.ts";
import { SettingError, type Settings } from "../lib/settings.ts";
import { quote, sh } from "../lib/sh.ts";
import type { Shell } from "../lib/shell.ts";
import { type Change, Refusal, type Step } from "../lib/step.ts";
import { SETTINGS } from "../lib/table.ts";

export const ROOT = join(import.meta.dirname, "..");

/** Each script's file by its name. */
export const SCRIPT_FILES: Record<string, string> = Object.fromEntries(
  ["scripts", "scripts/cluster"].flatMap((folder) =>
    readdirSync(join(ROOT, folder))
      .filter((name) => name.endsWith(".ts"))
      .map((name) => [name.replace(/\.ts$/, ""), `${folder}/${name}`]),
  ),
);
export const fileOf = (script: string): string => SCRIPT_FILES[script] as string;
export const OLD = "v1.17.6+k3s1";
export const MODERN = "v1.36.2+k3s1";
export const TOKEN = `K10${"ab".repeat(32)}::server:${"0123456789abcdef".repeat(2)}`;
/** What a test says that a box printed: the tables of cases have facts of several steps, and some that are none. */
export type Facts = Record<string, string>;
/** The box of these tests: a1, behind 1:1 NAT. */
export const IP = "198.51.100.11";
/** The facts' present, in seconds since 1970; the box has been up for an hour and k3s for half of one. */
export const NOW = Date.parse("2026-11-23T15:20:00Z") / 1000;
const STARTED = NOW - 1800;

export const fixture = (name: string): string =>
  readFileSync(join(import.meta.dirname, "fixtures", name), "utf8");

export const wanted = (over: Partial<Settings> = {}): Settings => ({
  ...(Object.fromEntries(Object.entries(SETTINGS).map(([name, s]) => [name, s.value])) as Settings),
  PUBLIC_IP: IP,
  K3S_URL: "https://198.51.100.11:6443",
  K3S_TOKEN: TOKEN,
  ...over,
});

/** The boot id and machine id of a1, which the facts are of; those of other nodes end with their number. */
export const BOOT = "f193e011-2833-4503-812f-2c98931dc2e0";
export const MACHINE = "33e005557d0340dfb2bcad364d0ec4a0";
const ofNode = (id: string, n: number) => id.slice(0, -1) + n.toString(16);
/** What a box of one of these nodes says of who it is. */
export const box = ({ name, n }: NodeSpec): Facts => ({
  hostname: `${name}\n`,
  boot: `${ofNode(BOOT, n)}\n`,
  machine: `${ofNode(MACHINE, n)}\n`,
});

/** The facts of a box on which steps 1 to 3 are done and nothing of k3s is set up. */
export const prepared = (version: string, over: Facts = {}): Facts => ({
  uptime: "3600.00",
  now: `${NOW}.000000000`,
  boot: `${BOOT}\n`,
  machine: `${MACHINE}\n`,
  hostname: "a1\n",
  arch: "x86_64\n",
  kernel: "6.1.0-50-cloud-amd64\n",
  os: fixture("os-release/debian-12"),
  managers: "/usr/bin/apt-get\n",
  systemd: "yes\n",
  addresses: "1: lo    inet 127.0.0.1/8 scope host lo\n2: eth0    inet 192.168.0.11/24 brd 192.168.0.255",
  curl: "/usr/bin/curl\n",
  kubectl: "/usr/local/bin/kubectl\n",
  version: `${version}\n`,
  module: "yes\n",
  tool: "/usr/bin/wg\n",
  loaded: "yes\n",
  ...over,
});

export interface NodeSpec {
  name: string;
  ip: string;
  n: number;
  ready?: boolean;
  beat?: number;
  external?: string;
  public?: string;
  overwrite?: string;
  boot?: string;
  machine?: string;
  /** What k3s says that it was given; default: nothing. */
  args?: string[];
  version?: string;
  labels?: Record<string, string>;
  taints?: { key: string; value?: string; effect: string }[];
}

/** A node as kubectl prints it. What is not said is as it should be. */
export const node = (spec: NodeSpec) => ({
  kind: "Node",
  metadata: {
    name: spec.name,
    labels: spec.labels ?? {},
    annotations: Object.fromEntries(
      [
        ["flannel.alpha.coreos.com/public-ip", spec.public ?? spec.ip],
        ["flannel.alpha.coreos.com/public-ip-overwrite", spec.overwrite ?? spec.ip],
        ["k3s.io/node-args", spec.args && JSON.stringify(spec.args)],
      ].filter(([, value]) => value),
    ),
  },
  spec: { podCIDR: `10.42.${spec.n}.0/24`, ...(spec.taints ? { taints: spec.taints } : {}) },
  status: {
    addresses: [
      { type: "InternalIP", address: spec.ip },
      ...(spec.external === "" ? [] : [{ type: "ExternalIP", address: spec.external ?? spec.ip }]),
      { type: "Hostname", address: spec.name },
    ],
    conditions: [
      { type: "MemoryPressure", status: "False", lastHeartbeatTime: "2026-11-23T15:00:00Z" },
      {
        type: "Ready",
        status: spec.ready === false ? "Unknown" : "True",
        lastHeartbeatTime: new Date((spec.beat ?? NOW - 20) * 1000).toISOString(),
      },
    ],
    nodeInfo: {
      kubeletVersion: spec.version ?? MODERN,
      bootID: spec.boot ?? ofNode(BOOT, spec.n),
      machineID: spec.machine ?? ofNode(MACHINE, spec.n),
    },
  },
});
export const nodes = (...specs: NodeSpec[]): string =>
  JSON.stringify({ kind: "List", items: specs.map(node) });
export const A1 = { name: "a1", ip: IP, n: 0 };
export const B1 = { name: "b1", ip: "198.51.101.11", n: 1 };
export const B2 = { name: "b2", ip: "198.51.101.12", n: 2 };

/** A line of the fact `peers`: a peer of a1's, `age` seconds after its handshake (or without one). */
export const peer = (version: string, of: NodeSpec, endpoint = of.ip, age?: number, allowed?: string) =>
  [
    interfaceOf(version === OLD ? "old" : "modern"),
    "K34wY4qud184kBjd2diVrHmJyyjK4gaQB38QJOQ5a3c=",
    "(none)",
    `${endpoint}:51820`,
    allowed ?? `10.42.${of.n}.0/24`,
    age === undefined ? "0" : String(NOW - age),
    "124",
    "180",
    "25",
  ].join("\t");

/** The facts of a healthy box of a1, b1 and b2, on which `unit` and `env` are as this project wrote them. */
export function healthy(version: string, written: Facts, over: Facts = {}): Facts {
  const running = interfaceOf(version === OLD ? "old" : "modern");
  return prepared(version, {
    ...written,
    written: [1, 2, 3].map((n) => STARTED - n).join("\n"),
    service: service(STARTED),
    enabled: "enabled\n",
    other: "inactive\n",
    processes: unitsOf(service(STARTED)),
    interfaces: `eth0\n${running}\nlo\n`,
    nodes: nodes(A1, B1, B2),
    peers: [peer(version, B1, B1.ip, 30), peer(version, B2, B2.ip, 90)].join("\n"),
    ...over,
  });
}

/** A box with no shell: one that may be asked for anything but to do something. */
export const boxOf = (over: Partial<Box> = {}): Box => {
  const nobody = { host: "b1" } as Shell;
  const place = { host: "b1", ip: B1.ip, word: "b1", name: "b1" };
  return { ...place, want: wanted(), shell: nobody, server: nobody, line: silent, mayReboot: true, ...over };
};

/** A shell of a box that answers every look by these facts, and keeps what it was sent. */
export const answering = (facts: Facts, sent: string[] = []): Shell => ({
  ...boxOf().shell,
  run: async (script, _, onLine) => {
    sent.push(script);
    const mark = /^m=(\S+)$/m.exec(script)?.[1];
    for (const [name, text] of Object.entries(facts))
      for (const line of [`${mark} fact ${name}`, ...text.split("\n")]) onLine(line);
    onLine(`${mark} end`);
    return { status: 0, stderr: "" };
  },
});

/** A box of a1, b1 and b2 as `check` finds it in a healthy cluster; a1 is the server. */
export function member(version: string, spec: NodeSpec, facts: Facts = {}, tried: Facts = {}) {
  const others = [A1, B1, B2].filter(({ name }) => name !== spec.name);
  const role = spec.name === "a1" ? "server" : "agent";
  const iface = interfaceOf(version === OLD ? "old" : "modern");
  const hash = "c1".repeat(32);
  const dump = others.map(({ name, ip, n }) =>
    [iface, keyOf(name), "(none)", `${ip}:51820`, `10.42.${n}.0/24`, NOW - 30, 4096, 123_456, 25].join("\t"),
  );
  const ways = others.map(({ name }) => `tunnel ${name} 1420`);
  /** As the box says it: by the tunnel's address. */
  const byAddress = (tries = "") =>
    [A1, B1, B2].reduce(
      (text, { name, n }) => text.replaceAll(`tunnel ${name} `, `tunnel 10.42.${n}.0 `),
      tries,
    );
  const reached =
    role === "server" ? [A1, B1, B2].map(({ name }) => `kubelet ${name} open`) : ["api server open"];
  return {
    box: boxOf({ host: spec.name, ip: spec.ip, word: spec.name, name: spec.name }),
    role,
    clock: 0.04,
    facts: {
      now: `${NOW}.5`,
      uptime: "3600.00",
      ...box(spec),
      kernel: "6.1.0-50-cloud-amd64",
      addresses: `1: lo    inet ${spec.ip}/32 scope global lo\n3: ${iface}    inet 10.42.${spec.n}.0/32 scope global ${iface}`,
      units: `Id=${unitOf(role)}.service\nActiveState=active\nNRestarts=0\nMainPID=812\nExecMainStartTimestampMonotonic=1800000000\n\nId=${unitOf(role === "server" ? "agent" : "server")}.service\nActiveState=inactive\nMainPID=0`,
      wg: `${iface} 1420 ${keyOf(spec.name)}`,
      peers: dump.join("\n"),
      disk: "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/vda1 20000000 8000000 12000000 40% /",
      load: "0.52 0.40 0.30 1/300 999\n2\nMemTotal:       2000000 kB\nMemAvailable:   1500000 kB",
      ...(role === "server"
        ? {
            nodes: nodes(A1, B1, B2),
            ca: `${hash}  -`,
            metrics: "/var/lib/rancher/k3s/server/manifests/metrics-server",
          }
        : { joins: `https://${IP}:6443\n${hash}` }),
      ...facts,
    },
    tried: {
      ...(role === "server" ? { top: figures("a1", "b1", "b2") } : {}),
      ...tried,
      tries: byAddress(tried.tries ?? [...ways, ...reached].join("\n")),
    },
  } satisfies Member;
}

/** What the API and flannel say of a cluster's networks. */
export const NETWORKS = {
  "pod-network": "10.42.0.0/16\n",
  "api-service": "10.43.0.1\n",
  "dns-service": "10.43.0.10\n",
};

/** The text that a change writes to a file, by running it. */
export function written(sh: string, path: string): string {
  const folder = temporary();
  const text = sh.replaceAll("/etc/", `${folder}/etc/`).replaceAll("/usr/local/", `${folder}/usr/local/`);
  const PATH = programs(`${folder}/bin`, { systemctl: ":", wg: "echo KEY" });
  const { status, stderr } = shell(`set -eu\n${text}`, ["sh", "-s"], { PATH });
  assert.equal(status, 0, stderr);
  return readFileSync(`${folder}${path}`, "utf8").replaceAll(folder, "");
}

/** A WireGuard key of a device's or an entry's. */
export const deviceKey = (letter: string): string => `${letter.repeat(42)}A=`;

const limited = (devices: readonly Device[]) => devices.flatMap(({ ip, only }) => (only ? [ip] : []));

/** The rules of an entry with these devices, as `nft list` prints them. */
export const NFT_RULES = (devices: readonly Device[]): string =>
  [
    "table inet k3s_devices {",
    "\tchain prerouting {",
    "\t\ttype filter hook prerouting priority raw; policy accept;",
    '\t\tiifname != "k3s-devices" accept',
    "\t\tip daddr 10.43.0.0/16 accept",
    ...limited(devices).map((ip) => `\t\tip saddr ${ip} drop`),
    "\t\tip daddr { 10.42.0.0/16, 10.44.0.0/24 } accept",
    "\t\tdrop",
    "\t}",
    "}",
    "",
  ].join("\n");

/** The same of iptables. */
export const IPTABLES_RULES = (devices: readonly Device[]): string =>
  [
    "-N K3S-DEVICES",
    "-A PREROUTING -i k3s-devices -j K3S-DEVICES",
    "-A K3S-DEVICES -d 10.43.0.0/16 -j ACCEPT",
    ...limited(devices).map((ip) => `-A K3S-DEVICES -s ${ip}/32 -j DROP`),
    "-A K3S-DEVICES -d 10.42.0.0/16 -j ACCEPT",
    "-A K3S-DEVICES -d 10.44.0.0/24 -j ACCEPT",
    "-A K3S-DEVICES -j DROP",
    "",
  ].join("\n");

/** What an entry says that has these devices, as a change has left it; the first of them is on. */
export function entryFacts(devices: readonly Device[], want = wanted()): Facts {
  const facts = { ...prepared(MODERN), ...NETWORKS };
  const sh = admits(devices[0] as Device).plan(want, facts)[0]?.sh ?? "";
  return {
    entry: [ENTRY_PROGRAM, ENTRY_UNIT].map((path) => written(sh, path)).join(""),
    "peers-file": peersText(devices),
    "entry-key": `${deviceKey("E")}\n`,
    "entry-state": `active\nenabled\n${deviceKey("E")}\n51822\n`,
    "entry-rules": NFT_RULES(devices),
    "entry-dump": devices
      .map(({ key, ip }, i) =>
        [key, "(none)", "198.51.102.1:5", `${ip}/32`, i ? 0 : NOW - 12, 1500, 2e6, "off"].join("\t"),
      )
      .join("\n"),
  };
}

/** What the metrics API says of these nodes. */
export const figures = (...names: string[]): string =>
  JSON.stringify({ kind: "NodeMetricsList", items: names.map((name) => ({ metadata: { name } })) });

/** A public key of its own for each box. */
export const keyOf = (name: string): string => `${name}${"k".repeat(41)}=`;

/** `systemctl show` of a unit whose process began then, in seconds since 1970. */
export const service = (started: number, more = "NeedDaemonReload=no"): string =>
  `ActiveState=active\nMainPID=812\nExecMainStartTimestampMonotonic=${(3600 - (NOW - started)) * 1e6}\n${more}\n`;

const STOPPED = "ActiveState=inactive\nMainPID=0\nExecMainStartTimestampMonotonic=0\n";
/** `systemctl show` of the server's unit and the agent's. */
export const unitsOf = (server = STOPPED, agent = STOPPED): string => `${server.trim()}\n\n${agent}`;

/** Facts of a step's files, read back by the real look after the real changes wrote them under a temporary root. */
export function filesAfter(step: Step, want: Settings, changes: readonly Change[]): Facts {
  const root = temporary();
  const there = (text: string) =>
    text
      .replaceAll("/etc/systemd/system", `${root}/etc`)
      .replaceAll("/var/lib/rancher", `${root}/var`)
      .replaceAll("/etc/rancher", `${root}/rancher`);
  const back = (text: string) =>
    text
      .replaceAll(`${root}/etc`, "/etc/systemd/system")
      .replaceAll(`${root}/var`, "/var/lib/rancher")
      .replaceAll(`${root}/rancher`, "/etc/rancher");
  for (const change of changes.filter((c) => c.why.startsWith("write "))) {
    // The text of the unit names the folders too: only the paths that the shell writes to are moved.
    const given = (change.secrets ?? []).map((name) => `${name}=${quote(want[name])}\n`).join("");
    const { status, stderr } = shell(`set -eu\n${given}${there(change.sh)}`);
    if (status !== 0) throw new Error(`"${change.why}" failed with ${status}: ${stderr}`);
  }
  const unit = `${root}/etc/${unitPath(step.name as Role)
    .split("/")
    .at(-1)}`;
  for (const file of [unit, `${unit}.env`]) writeFileSync(file, back(readFileSync(file, "utf8")));
  const PATH = programs(`${root}/bin`, { curl: "echo 'curl must not be asked' >&2; exit 7" });
  return look([{ look: () => step.look(want).map(there) }], want, { PATH });
}

/** What these steps would do; a step that refuses does nothing. */
export const planned = (steps: readonly Step[], want: Settings, facts: Facts): Change[] =>
  steps.flatMap((step) => {
    try {
      return step.plan(want, facts);
    } catch (error) {
      if (error instanceof Refusal || error instanceof SettingError) return [];
      throw error;
    }
  });

/** What the real look script says, run by this machine's sh. */
export function look(steps: readonly Pick<Step, "look">[], want: Settings, env: Facts = {}): Facts {
  const stream = reader("mark", {});
  const { stdout } = shell(wrapInMain(lookScript(steps as Step[], want, "mark")), ["sh", "-s"], env);
  const lines = stdout.split("\n");
  if (lines.at(-1) === "") lines.pop();
  for (const line of lines) stream.line(line);
  if (!stream.seen.ended) throw new Error(`The look did not end: ${stdout.slice(-500)}`);
  return stream.seen.facts;
}

/** Runs a script over stdin, as a box does. */
export function shell(script: string, argv = ["sh", "-s"], env: Facts = {}) {
  const [command = "sh", ...rest] = argv;
  const { status, stdout, stderr } = spawnSync(command, rest, {
    input: script,
    env: { ...process.env, ...env },
    maxBuffer: 1e8,
  });
  return { status, stdout: stdout.toString(), stderr: stderr.toString(), bytes: stdout };
}

const made: string[] = [];
after(() => {
  for (const path of made) rmSync(path, { recursive: true, force: true });
});

/** A folder of its own, removed when the tests have ended. */
export function temporary(): string {
  const path = mkdtempSync(join(tmpdir(), "k3s-across-clouds-test-"));
  made.push(path);
  return path;
}

/** Puts programs, as sh scripts, into a folder; answers a PATH that has them first. */
export function programs(folder: string, scripts: Record<string, string>): string {
  mkdirSync(folder, { recursive: true });
  for (const [name, script] of Object.entries(scripts)) {
    writeFileSync(join(folder, name), `#!/bin/sh\n${script}\n`);
    chmodSync(join(folder, name), 0o755);
  }
  return `${folder}:${process.env.PATH}`;
}

export const has = (command: string): boolean =>
  spawnSync("sh", ["-c", `command -v ${command}`]).status === 0;

/** Why a test is skipped for want of programs; in CI nothing may skip, and the test fails instead. */
export function lacks(...commands: string[]): string | false {
  const missing = commands.filter((command) => !has(command));
  return !process.env.CI && missing.length > 0 && `needs ${missing.join(", ")}`;
}

/** This runtime's words for running a TypeScript file. */
export const RUNTIME =
  "Deno" in globalThis
    ? ["run", "-A", "--config", join(ROOT, "deno.json")]
    : "typescript" in process.features && process.features.typescript
      ? ["--disable-warning=ExperimentalWarning"]
      : ["--import", "tsx"];

export interface Ended {
  status: number | null;
  stdout: string;
  stderr: string;
  seconds: number;
}

/** Runs a TypeScript file as a process; `kill` seconds after its first output it is killed. */
export async function program(args: string[], env: Facts = {}, kill?: number): Promise<Ended> {
  const began = Date.now();
  const child = spawn(process.execPath, [...RUNTIME, ...args], {
    cwd: ROOT,
    env: { PATH: process.env.PATH ?? "", HOME: process.env.HOME ?? "", ...env },
    stdio: ["ignore", "pipe", "pipe"],
  });
  const said = { stdout: "", stderr: "" };
  child.stdout.on("data", (chunk) => (said.stdout += chunk));
  child.stderr.on("data", (chunk) => (said.stderr += chunk));
  const ended = new Promise<number | null>((resolve) => child.on("close", resolve));
  if (kill !== undefined) {
    await new Promise((resolve) => child.stdout.once("data", resolve));
    await sleep(kill * 1000);
    child.kill("SIGKILL");
  }
  return { status: await ended, ...said, seconds: (Date.now() - began) / 1000 };
}

/** A certificate that ends then, as base64 of its DER: k3s's CA with another end, whose signature nobody asks for. */
export function certificate(ends: number): string {
  const der = Buffer.from(fixture("cacerts-v1.17.6.pem").replace(/-----.*-----|\n/g, ""), "base64");
  const stamp = new Date(ends * 1000).toISOString().replace(/^..|[-:T]|\.\d+/g, "");
  return Buffer.from(der.toString("latin1").replace("361120150805Z", stamp), "latin1").toString("base64");
}

/** The fact `certificates` of a box: the ends by file. */
export const certificates = (ends: Record<string, number>): string =>
  Object.entries(ends)
    .map(([file, end]) => {
      const text = certificate(end);
      const block = `-----BEGIN CERTIFICATE-----\n${text}\n-----END CERTIFICATE-----\n`;
      return `${file} ${file.endsWith(".json") ? Buffer.from(block).toString("base64") : text}`;
    })
    .join("\n");

/** Nothing here reads SQLite. */
export const noSqlite = lacks("sqlite3") && lacks("python3");

/**
 * A datastore as a running kine has it, partly in its log: two nodes and one that was deleted, a deployment, three secrets,
 * one of them changed, and `more` events.
 */
export function database(folder: string, more = 0) {
  if (noSqlite) return;
  const row = (name: string, deleted = 0) =>
    `insert into kine (name, created, deleted, create_revision, prev_revision, lease, value) values ('/registry/${name}', 1, ${deleted}, 0, abs(random()), 0, hex(randomblob(200)));`;
  const sql = `create table kine (id integer primary key autoincrement, name text, created integer, deleted integer, create_revision integer, prev_revision integer, lease integer, value blob, old_value blob);
create index kine_name_index on kine (name);
begin;
${Array.from({ length: more }, (_, i) => row(`events/${i}`)).join("\n")}
${["minions/a1", "minions/b1", "minions/b2", "deployments/kube-system/coredns", "secrets/default/x"].map((name) => row(name)).join("\n")}
commit;
pragma journal_mode = wal;
${row("minions/b2", 1)}${row("secrets/default/y")}${row("secrets/default/x")}${row("secrets/kube-system/z")}
`;
  const copy = `cp made.db made.db-wal ${folder}; cd ${folder}; mv made.db state.db; mv made.db-wal state.db-wal`;
  const python =
    "import os, sqlite3, sys; d = sqlite3.connect('made.db', isolation_level=None); d.executescript(sys.argv[1]); sys.exit(os.system(sys.argv[2]))";
  const make = lacks("sqlite3")
    ? sh`python3 -c ${python} ${sql} ${copy}`
    : sh`printf '%s\n' ${sql} ${`.shell ${copy}`} | sqlite3 made.db`;
  const { status, stderr } = shell(`cd ${temporary()} && ${make}`);
  assert.equal(status, 0, stderr);
}

/** Who a box is: its address, boot id, machine id and cluster CA, checked against each other. */

import { parseArgs, secretIn } from "../args.ts";
import { cardsOf } from "../protocol.ts";
import type { Settings } from "../settings.ts";
import { sh } from "../sh.ts";
import { type Facts, prints, Refusal, type Step, type Want } from "../step.ts";
import { liesIn, NAT } from "../table.ts";
import { nameOf, splitWords } from "../text.ts";
import { caIn, caSed } from "../token.ts";
import { rangesOf } from "./config.ts";
import { type Node, nodesOf } from "./nodes.ts";
import { compare } from "./releases.ts";
import {
  argsOf,
  cgroupArgs,
  NAME,
  NODE_TOKEN,
  nameLook,
  nodeNameIn,
  type Role,
  releaseOf,
  shownLook,
  unitOf,
  WRITTEN_BY,
} from "./unit.ts";

/** The identity of a box: its address in the settings, and what it reports; a box that is gone reports nothing. */
export interface Who {
  ip: string;
  /** The name that takes the place of an address for a box without a public one. */
  name?: string;
  boot?: string;
  machine?: string;
  /** Seconds since its start. */
  uptime?: number;
}

/** @param want of the box: it names the node of one that has no unit, or does not answer. */
export const whoIs = (
  ip: string,
  facts: Facts<"named"> = {},
  want: Pick<Settings, "AGENT_ARGS" | "HOST"> = { AGENT_ARGS: "", HOST: "" },
): Who => ({
  ip,
  name: pinned(facts) || ownName(want.AGENT_ARGS, facts) || nameOf(want.HOST).toLowerCase(),
  boot: facts.boot?.trim() ?? "",
  machine: facts.machine?.trim() ?? "",
  uptime: Number(facts.uptime),
});

/** For how long after a restart a node may still have the old boot id and be Ready, in seconds. */
export const RESTARTING = 180;

export interface Match {
  node: Node;
  /**
   * `restarted`: the same machine after a reboot that k3s has not reported yet. `anew`: neither id of the box matches the
   * node, which is not Ready: the box was reinstalled, or the node belongs to a box that is off.
   */
  is: "same" | "restarted" | "anew";
}

/** The name of a box's node by its role's arguments, else by its unit, else by its host name. */
const ownName = (args: string, facts: Facts<"named">): string =>
  nodeNameIn(args) ?? pinned(facts) ?? (facts.hostname?.trim() ?? "").toLowerCase();

/** The name of a box's node in its unit. */
const pinned = (facts: Facts<"named">): string | undefined => /^\S+/.exec(facts.named?.trim() ?? "")?.[0];

/** The nodes at a box's address; the one of its name if it has no public address. */
export const nodesAt = (nodes: readonly Node[], { ip, name }: Pick<Who, "ip" | "name">): Node[] =>
  nodes.filter((node) =>
    ip === NAT ? node.name === name : node.externalIp === ip || node.internalIp === ip,
  );

/** Where a box is, in a message. */
export const place = ({ ip, name }: Who): string => (ip === NAT ? `named ${name}` : `at ${ip}`);

/**
 * The node of a box. Machine ids prove nothing (copies of an image share one), nor do boot ids (an agent may write its
 * own): box and node have to agree, and no other node may claim the same.
 *
 * @param nodes the server's list, if anything destructive is to follow.
 * @returns undefined when the cluster knows neither the address nor the box.
 * @throws {Refusal} when they do not agree.
 */
export function nodeOf(nodes: readonly Node[], who: Who): Match | undefined {
  const { ip, boot, machine, uptime = 0 } = who;
  const at = nodesAt(nodes, who);
  const [node, other] = at;
  if (other)
    throw new Refusal(
      `Nodes ${at.map(({ name }) => name).join(" and ")} have the same address, ${ip}: delete the one that is not this box (kubectl delete node …), then run this again`,
    );
  // Containers of one host share a boot id.
  const sure = node?.boot === boot && node?.machine !== undefined && node.machine === machine;
  const twin = boot && !sure ? nodes.find((n) => n.boot === boot && n !== node) : undefined;
  if (twin)
    throw new Refusal(
      ip === NAT
        ? `This box is named ${who.name}, and its boot id is that of node ${twin.name}: is it this box under another name? Then make remove HOST=… first`
        : `The address ${ip} is not this box's in the cluster: its boot id is that of node ${twin.name}, at ${twin.externalIp ?? twin.internalIp ?? "no address"}. Is ${ip} the address of another box?`,
    );
  if (!node) return undefined;
  // The name is the box's own word: it is not to pass for a node that has an address in the settings.
  if (ip === NAT && node.externalIp)
    throw new Refusal(
      `Node ${node.name} has the public address ${node.externalIp}, which k3s keeps until the node is deleted: if it is this box, make remove HOST=…=${node.externalIp} first; if not, rename this box`,
    );
  if (!boot || node.boot === boot) return { node, is: "same" };
  const restarted = Boolean(machine) && node.machine === machine;
  if (!node.ready) return { node, is: restarted ? "restarted" : "anew" };
  if (restarted && uptime < RESTARTING) return { node, is: "restarted" };
  throw new Refusal(
    `Node ${node.name}, ${place(who)}, is Ready, and is another box than this one: it has the boot id ${node.boot ?? "none"}, this box ${boot}`,
  );
}

/**
 * May a box join at its address? A node with this address that is not Ready may be this box before it was reinstalled.
 * Of several nodes with this address, the machine id tells which one is this box.
 *
 * @throws {Refusal} when the address belongs to another box.
 */
function addressFree(nodes: readonly Node[], who: Who): void {
  const at = nodesAt(nodes, who);
  const own = at.filter((n) => n.machine === who.machine);
  const node = (own.length ? own : at).find(({ ready }) => ready);
  if (node) nodeOf([node], who);
}

/** Nodes at a box's address that are of this machine. */
const ownIn = (nodes: readonly Node[], who: Who) =>
  nodesAt(nodes, who).filter(
    (n) => (n.boot && n.boot === who.boot) || (n.machine && n.machine === who.machine),
  );

/**
 * The name under which k3s registers a box: `--node-name` of the settings or of the box's unit; else the name of its
 * existing node; else the host name in lower case (os.Hostname, kubelet).
 *
 * @throws {Refusal} for a name that Kubernetes does not accept.
 */
export function nodeNameOf(
  role: Role,
  want: Settings,
  facts: Facts<"nodes" | "named">,
  nodes: readonly Node[] = nodesOf(facts.nodes),
): string {
  const own = ownIn(nodes, whoIs(want.PUBLIC_IP, facts));
  // It may have joined again under another name, before its unit had one.
  const [node, more] = own.length > 1 ? own.filter(({ ready }) => ready) : own;
  const args = role === "server" ? want.SERVER_ARGS : want.AGENT_ARGS;
  const told = facts.named?.trim() || nodeNameIn(args);
  const name = (!told && !more && node?.name) || ownName(args, facts);
  if (!NAME.test(name))
    throw new Refusal(`"${name}" is not a valid node name: rename the box (hostnamectl set-hostname …)`);
  return name;
}

/** The cluster CAs on a box: of a server's data, and of the cluster that an agent has joined or is to join. */
export interface Cas {
  server: string[];
  agent: string[];
}

/** The fact for casOf: hashes only. A token contains the hash of the root CA. */
export const caLook = prints("cas")(sh`fact cas; d=/var/lib/rancher/k3s
for role in server/tls agent; do
  [ ! -s $d/$role/server-ca.crt ] || echo "\${role%/*} $(digest $d/$role/server-ca.crt)"
done
[ ! -s ${NODE_TOKEN} ] || sed -n ${caSed("", "server ")} ${NODE_TOKEN}
env=/etc/systemd/system/k3s-agent.service.env
[ ! -s $env ] || sed -n ${caSed("K3S_TOKEN=.\\{0,1\\}", "agent ")} $env
`);

export function casOf(facts: Facts<"cas">): Cas {
  const of = (role: string) =>
    [...(facts.cas ?? "").matchAll(/^(server|agent) ([0-9a-f]{64})$/gm)].flatMap(([, of, hash]) =>
      of === role ? (hash as string) : [],
    );
  return { server: of("server"), agent: of("agent") };
}

/** A CA in a message. */
export const brief = (hash: string | undefined): string => (hash ? `${hash.slice(0, 12)}…` : "none");

const share = (some: readonly string[], others: readonly string[]) => some.some((ca) => others.includes(ca));

/**
 * Checks that a box belongs to this cluster before k3s is removed from it.
 * @param cluster known hashes of the cluster's CA.
 * @param role what the box is by the settings.
 * @param known the cluster has a node for this box.
 * @param force also remove an unknown server, or a box whose cluster is not known.
 * @param allowing the switch that would allow it.
 * @throws {Refusal} for another cluster's box.
 */
export function mayGo(
  facts: Facts<UnitFact>,
  cluster: readonly string[],
  role: "server" | "agent",
  known: boolean,
  force: boolean,
  allowing = "FORCE=1",
): void {
  for (const role of ["server", "agent"] as const) {
    const unit = unitFact(facts, role);
    const where = elsewhere(unit, facts.told);
    if (where)
      throw new Refusal(
        `k3s on this box (${unitOf(role)}) has its data ${where}, which is never removed by this project: use the k3s-uninstall.sh of its installer`,
      );
    if (isForeign(unit) && !known && !force)
      throw new Refusal(
        `${unitOf(role)}.service on this box was not written by this project: FORCE=1 removes it anyway, with k3s's data`,
      );
  }
  const { server, agent } = casOf(facts);
  const anothers = (what: string, cas: readonly string[]) => {
    throw new Refusal(
      `k3s on this box is ${what} of another cluster (CA ${brief(cas[0])}, this cluster's ${brief(cluster[0])}): make down with that cluster's env file removes it`,
    );
  };
  if (cluster.length) {
    if (server.length && !share(server, cluster)) anothers("a server", server);
    // A server's own agent has its CA.
    if (agent.length && !share(agent, [...cluster, ...server])) anothers("an agent", agent);
  } else if (server.length + agent.length && role === "agent" && !force)
    throw new Refusal(
      `It is not known which cluster this box belongs to (CA ${brief([...server, ...agent][0])}): the server has no CA, and K3S_TOKEN names none. FORCE=1 removes k3s anyway`,
    );
  if (server.length && role === "agent" && !known && !force)
    throw new Refusal(
      `This box has a server's data, with the same CA, but is no node of the cluster: is it a former server, or one in use? ${allowing} removes it with its datastore`,
    );
}

/**
 * Facts for mayBecome and isForeign: each role's unit with its drop-ins, and data directories of k3s that are set
 * elsewhere.
 */
export const unitsLook = prints("unit-k3s unit-k3s-agent told")(sh`unit_files() {
  # A link to /dev/null, whose owner wants no k3s here.
  property "$2" UnitFileState; case $value in masked*) echo '# masked' ;; esac
  property "$2" FragmentPath; text "\${value:-/etc/systemd/system/$1.service}"
  # Drop-ins stand with blanks between.
  property "$2" DropInPaths; for f in $value; do text "$f"; done
}
fact unit-k3s; unit_files k3s "$server_unit"
fact unit-k3s-agent; unit_files k3s-agent "$agent_unit"
fact told; d=/etc/systemd/system
for f in $d/k3s.service.env $d/k3s-agent.service.env /etc/default/k3s /etc/sysconfig/k3s; do
  [ ! -s "$f" ] || sed -n "s/^K3S_DATA_DIR=['\"]\{0,1\}\([^'\"]*\).*/data-dir \1/p; s/^K3S_DATASTORE_ENDPOINT=..*/datastore-endpoint/p; s/^K3S_CLUSTER_INIT=..*/cluster-init/p" "$f"
done
files=$(for f in $d/k3s.service $d/k3s-agent.service; do
  [ ! -s "$f" ] || sed -n "s/.*-c\(onfig\)\{0,1\}[=[:space:]]['\"]\{0,1\}\([^'\"[:space:]]*\).*/\2/p" "$f"
done)
for file in /etc/rancher/k3s/config.yaml /etc/rancher/k3s/config.yaml.d/* $files; do
  [ ! -f "$file" ] || sed -n "s/^data-dir:[[:space:]]*['\"]\{0,1\}\([^'\"[:space:]]*\).*/data-dir \1/p; s/^\(datastore-endpoint\|cluster-init\):.*/\1/p" "$file"
done
[ ! -d /var/lib/rancher/k3s/server/db/etcd ] || echo cluster-init
[ -e /var/lib/rancher/k3s/server/db/state.db ] || echo no-database
[ -e /var/lib/rancher/k3s/agent/server-ca.crt ] || echo no-agent
`);

/** Units that this project wrote before it marked them; those of k3s's installer differ. */
const BEFORE = [
  /^EnvironmentFile=\/etc\/systemd\/system\/k3s(-agent)?\.service\.env$/m,
  /^# Limits other than infinity cost performance: the kernel would have to count\.$/m,
];

/** Is there a unit that this project did not write? */
export const isForeign = (unit = ""): boolean =>
  unit.trim() !== "" && !unit.split("\n").includes(WRITTEN_BY) && !BEFORE.every((line) => line.test(unit));

/** As systemd parses it: continued lines, comments within them, and blanks around names and =. */
const plainly = (unit: string) =>
  unit.replace(/\\\r?\n(?:[ \t]*[#;].*\n)*/g, " ").replace(/^[ \t]*(\w+)[ \t]*=[ \t]*/gm, "$1=");

/** The arguments of a unit's last ExecStart, unquoted. */
export function argumentsIn(unit: string): string[] {
  const [, line = ""] =
    [...plainly(unit).matchAll(/^ExecStart=[-@:+!]*\S*([^\n]*)$/gm)].findLast(
      ([whole]) => !/^ExecStart=\s*$/.test(whole),
    ) ?? [];
  return splitWords(line.replace(/['"]/g, ""));
}

const DATA = "/var/lib/rancher/k3s";

/** The data directory of a unit's k3s, if it is not the default. */
function elsewhere(unit: string, told = ""): string | undefined {
  const foreign = isForeign(unit);
  const set = [...plainly(unit).matchAll(/^Environment=(.*)$/gm)].map(([, line]) => line).join(" ");
  const args = [
    ...parseArgs(argumentsIn(unit).join(" ")),
    ...[...set.matchAll(/\bK3S_(DATA_DIR|DATASTORE_ENDPOINT|CLUSTER_INIT)=([^\s"']+)/g)].map(
      ([, name = "", value]) => ({ flag: name.toLowerCase().replaceAll("_", "-"), value }),
    ),
    ...told.split("\n").map((row) => ({ flag: row.split(" ")[0], value: row.split(" ")[1] })),
  ];
  for (const { flag, value = "" } of args) {
    if ((flag === "data-dir" || flag === "d") && value.replace(/\/+$/, "") !== DATA)
      return `in ${value} (--data-dir)`;
    if (!foreign) continue;
    if (flag === "datastore-endpoint" || flag === "storage-endpoint")
      return "in a datastore of its own (--datastore-endpoint)";
    if (flag === "cluster-init") return "in embedded etcd (--cluster-init)";
  }
  return undefined;
}

/** A foreign unit's arguments, without secrets. */
const shown = (args: readonly string[]) =>
  args
    .map((word) => {
      const secret = secretIn(parseArgs(word)) !== undefined;
      return secret ? word.replace(/=.*/, "=********") : word;
    })
    .join(" ");

type UnitFact = "unit-k3s" | "unit-k3s-agent" | "told";
const unitFact = (facts: Facts<UnitFact>, role: Role) => facts[`unit-${unitOf(role)}`] ?? "";

/**
 * @param goes arguments of this project's unit.
 * @throws {Refusal} for a unit that this project did not write, unless TAKE_OVER allows it; always if its data are
 * elsewhere, since k3s would start a new, empty cluster.
 */
function notForeign(role: Role, want: Want, facts: Facts<UnitFact>, goes: readonly string[]): void {
  const unit = unitFact(facts, role);
  // It may be set in another config file, a script or a variable: without data here, the data is elsewhere or missing.
  const [lack, file] =
    role === "server" ? ["no-database", "server/db/state.db"] : ["no-agent", "agent/server-ca.crt"];
  const missing = isForeign(unit) && facts.told?.split("\n").includes(lack);
  const where =
    elsewhere(unit, facts.told) ?? (missing ? `elsewhere: there is no ${DATA}/${file}` : undefined);
  if (where)
    throw new Refusal(
      `k3s is already installed on this box (${unitOf(role)}), and has its data ${where}: this would start a new, empty ${role === "server" ? "cluster" : "node"}. It is not changed; the k3s-uninstall.sh of its installer removes it`,
    );
  if (!isForeign(unit) || want.allowed?.has("take-over")) return;
  const gone: string[] = [];
  const list = argumentsIn(unit).slice(1);
  for (let i = 0; i < list.length; i++) {
    // The value of a flag may be the next word.
    const next = list[i + 1];
    const own = list[i] as string;
    const word = own.includes("=") || !next || next.startsWith("-") ? own : `${own}=${list[++i]}`;
    if (!goes.includes(word)) gone.push(word);
  }
  throw new Refusal(
    `${unitOf(role)}.service on this box was not written by this project. TAKE_OVER=1 replaces it${gone.length ? `, and drops these arguments: ${shown(gone)}` : ""}`,
  );
}

/** May this box take or keep its role in the cluster of K3S_TOKEN? @throws {Refusal} */
export function mayBecome(role: Role, want: Want, facts: Facts, goes: readonly string[]): void {
  const other = role === "server" ? "agent" : "server";
  if (unitFact(facts, other).trim())
    throw new Refusal(
      `This box runs ${unitOf(other)}, or is set up to: it cannot be ${unitOf(role)} as well; make remove or make down removes it`,
    );
  notForeign(role, want, facts, goes);
  if (want.allowed?.has("force")) return;
  const asked = caIn(want.K3S_TOKEN);
  const have = casOf(facts)[role];
  if (role === "agent" && want.K3S_TOKEN && moving(want, facts))
    throw new Refusal(
      `This box is an agent of another cluster: its CA is ${brief(have[0])}, this cluster's ${asked ? brief(asked) : "a new one"}. FORCE=1 moves it to this cluster`,
    );
  if (role === "agent" || !asked || share(have, [asked])) return;
  if (have.length)
    throw new Refusal(
      `This box is the server of another cluster: its CA is ${brief(have[0])}, K3S_TOKEN names ${brief(asked)}. Is SERVER right? FORCE=1 continues, and replaces K3S_TOKEN with its token`,
    );
  // A further server gets the cluster's CA from the datastore.
  if (!want.K3S_DATASTORE_ENDPOINT)
    throw new Refusal(
      `K3S_TOKEN belongs to a cluster (CA ${brief(asked)}), and this box has no server's data: this would start a new, empty cluster and replace K3S_TOKEN. Is SERVER right? make restore restores a backup here; FORCE=1 starts a new cluster`,
    );
}

/** The message for an agent that would move to another cluster. */
export function moving(want: Settings, facts: Facts): string {
  const [have, asked] = [casOf(facts).agent, caIn(want.K3S_TOKEN)];
  return have.length && !share(have, asked ? [asked] : [])
    ? `moves to another cluster: from the CA ${brief(have[0])} to ${asked ? brief(asked) : "a new one"}`
    : "";
}

/**
 * Only make upgrade, which drains, changes the release of a running node; and no agent may join that is newer than its
 * server, which Kubernetes does not support. The release of a K3S_BIN is known only on the box.
 * @throws {Refusal}
 */
function rightRelease(
  role: Role,
  want: Want,
  facts: Facts<"cas" | "nodes" | "registered" | "boot" | "machine">,
): void {
  if (want.K3S_BIN || want.allowed?.has("release")) return;
  const leaves = role === "agent" && moving(want, facts);
  const nodes = [leaves ? "" : facts.nodes, facts.registered].flatMap(nodesOf);
  const own = ownIn(nodes, whoIs(want.PUBLIC_IP, facts)).find(({ ready }) => ready);
  const wanted = want.K3S_VERSION;
  if (own && own.version !== wanted)
    throw new Refusal(
      `Node ${own.name} runs k3s ${own.version}, and K3S_VERSION is ${wanted}: make upgrade K3S_VERSION=${wanted} upgrades it, drained and one node at a time; to keep ${own.version}, set K3S_VERSION=${own.version} in the env file`,
    );
  const server = nodes.find(
    // A server that is gone may have left its node.
    ({ labels, version, ready }) =>
      ready &&
      (labels["node-role.kubernetes.io/control-plane"] || labels["node-role.kubernetes.io/master"]) &&
      compare(version, wanted) < 0,
  );
  if (role === "agent" && !own && server)
    throw new Refusal(
      `The server ${server.name} runs k3s ${server.version}, and no agent may be newer, as K3S_VERSION ${wanted} is: make upgrade K3S_VERSION=${wanted} first, or set K3S_VERSION=${server.version} in the env file`,
    );
}

/** A LAN within the cluster's networks hides other nodes' pods from a box at home. @throws {Refusal} */
function lanApart(want: Want, facts: Facts): void {
  if (want.PUBLIC_IP !== NAT) return;
  const ranges = rangesOf(want).flatMap((range) => range.split(","));
  for (const { card, ip, bits } of cardsOf(facts)) {
    // Addresses alone are those of ipvs and NodeLocal DNSCache.
    if (bits === 32 || /^(lo$|cni|flannel|veth)/.test(card)) continue;
    const range = ranges.find((range) => liesIn(ip, range));
    if (range)
      throw new Refusal(
        `This box has the address ${ip} (${card}), within ${range}, a network of the cluster's pods or services: give its LAN another network; if the cluster's are others, SERVER_ARGS has to say so (--cluster-cidr, --service-cidr)`,
      );
  }
}

/** The switches that allow moving a box to another cluster and taking over a foreign unit. */
export const ALLOWED = {
  force: "move an agent to another cluster, or replace K3S_TOKEN with the token of a new cluster",
  "take-over": "replace a k3s unit that this project did not write; k3s's data is kept",
};

/** Checked before a box is changed. */
export const identityAs = (role: Role): Step<UnitFact | "cas" | "nodes" | "registered"> => ({
  name: "identity",
  options: [],
  look: () => [shownLook, nameLook, caLook, unitsLook],
  plan(want, facts) {
    const { version, generation = "modern" } = releaseOf(want, facts);
    lanApart(want, facts);
    if (role === "agent")
      addressFree([facts.nodes, facts.registered].flatMap(nodesOf), whoIs(want.PUBLIC_IP, facts));
    mayBecome(role, want, facts, [
      ...argsOf(role, generation, want, want.PROXY_MODE, nodeNameOf(role, want, facts)),
      // K3S_CONFIG is checked later.
      ...cgroupArgs(role, version, { ...want, K3S_CONFIG: "" }, facts),
    ]);
    rightRelease(role, want, facts);
    return [];
  },
});

/** The box's firewall: what it blocks of the cluster's traffic, and what opens it to the nodes and to nobody else. */

import { isIPv4 } from "node:net";
import { cardsOf } from "../../protocol.ts";
import type { Settings } from "../../settings.ts";
import { raw, sh } from "../../sh.ts";
import { type Change, type Facts, type Printed, Refusal, step } from "../../step.ts";
import { NAT } from "../../table.ts";
import { splitWords } from "../../text.ts";
import { rangesOf } from "../config.ts";
import { clusterLook, isHome, nodesOf } from "../nodes.ts";
import { type Chain, drops, type End, ends, type Packet } from "./chains.ts";
import { clearFirewalld, firewalld, firewalldLook, leftInFirewalld } from "./firewalld.ts";
import { chainsOf, kernelLook, unread } from "./kernel.ts";
import { CLEAR_OWN, isWritten, LEFT_OF_OWN, ownLook, scriptText, TABLE, written } from "./own.ts";
import {
  ANYWHERE,
  CLOSED,
  devicePort,
  devicePortLook,
  ENTRY,
  entryOf,
  type FirewallManager,
  ipv4Of,
  openings,
  TUNNEL,
} from "./traffic.ts";
import { CLEAR_UFW, LEFT_IN_UFW, ufw, ufwLook } from "./ufw.ts";

export const firewallLooks = [firewalldLook, ufwLook, kernelLook, ownLook, devicePortLook];

export type RuleFact = Printed<(typeof firewallLooks)[number]>;
type Box = Facts<RuleFact>;

const managerOf = (facts: Box): FirewallManager<RuleFact> | undefined =>
  [firewalld, ufw].find((manager) => manager.runs(facts));

/** Is it a base chain of the firewall that runs here? */
const isManaged = (chain: Chain, facts: Box) => Boolean(chain.base && managerOf(facts)?.owns(chain));

/** A packet that must pass; `whom` is empty where `what` says it. */
interface Probe {
  what: string;
  whom: string;
  packet: Packet;
}

/** A new connection to this box, of somebody whom no rule names. */
function fromWorld(facts: Box): Packet {
  const iif = facts.card?.trim() ?? "";
  const to = cardsOf(facts).flatMap(({ card, ip }) => (card === iif ? [ip] : []));
  return { hook: "input", family: "ip", iif, oif: "", from: "", to, protocol: "tcp", port: 0 };
}

/** Packets that must pass: from nodes and devices to this box, from pods to it, and between pods. */
function wanted(facts: Box, nodes: readonly string[], ranges: readonly string[]): Probe[] {
  const packet = fromWorld(facts);
  const [pods = ""] = ranges;
  const pod = (host: number) => `${ipv4Of(ranges).split(/\.\d+\//)[0]}.${host}`;
  const ways: (readonly [iif: string, oif: string, whom: string, from: string])[] = [
    ["cni0", "flannel-wg", pods, pod(5)],
    ["flannel-wg", "cni0", pods, pod(5)],
    ...(devicePort(nodes) ? [[ENTRY, "cni0", "devices", ""] as const] : []),
  ];
  return [
    ...openings(nodes).map(({ ip, protocol, port }) => {
      const what = `${port}/${protocol}`;
      const whom = nodes.includes(what) ? "devices" : ip === ANYWHERE ? "home nodes" : ip;
      return { what, whom, packet: { ...packet, from: ip === ANYWHERE ? "" : ip, protocol, port } };
    }),
    ...(ranges.length ? ways : []).flatMap(([iif, oif, whom, from]): Probe[] => [
      ...[6443, 10250].map((port) => ({
        what: "everything",
        whom,
        // Before it gets here, the entry's own chain has dropped what is for other networks.
        packet: { ...packet, iif, from, to: iif === ENTRY ? [pod(1)] : packet.to, port },
      })),
      ...(["tcp", "udp"] as const).map((protocol) => ({
        what: `what is forwarded for ${whom}`,
        whom: "",
        packet: {
          ...{ hook: "forward" as const, family: "ip" as const, iif, oif, from, to: [pod(6)] },
          ...{ protocol, port: protocol === "tcp" ? 80 : 53 },
        },
      })),
    ]),
  ];
}

/** A rule or policy that drops packets, or may. */
interface Cut {
  end: End;
  sure: boolean;
  probes: Probe[];
}

/** What the rules drop, or may drop, by rule. */
function cuts(chains: readonly Chain[], probes: readonly Probe[]): Cut[] {
  const found = new Map<string, Cut>();
  for (const probe of probes) {
    const met = ends(chains, probe.packet);
    const sure = met.find(drops);
    const end = (sure ?? met.flat()).find(({ verdict }) => verdict !== "accept");
    if (!end) continue;
    const key = `${end.chain.table} ${end.chain.name} ${end.why} ${!sure}`;
    const cut = found.get(key) ?? { end, sure: Boolean(sure), probes: [] };
    found.set(key, cut);
    cut.probes.push(probe);
  }
  return [...found.values()];
}

/** The values of each key, in a list. */
function listed(pairs: readonly (readonly [key: string, value: string])[]): [key: string, values: string][] {
  const keys = [...new Set(pairs.map(([key]) => key))];
  const valuesOf = (key: string) => pairs.flatMap(([of, value]) => (of === key ? [value] : []));
  return keys.map((key) => [key, [...new Set(valuesOf(key))].join(", ")]);
}

const whose = ({ chain }: End, facts: Box) =>
  isManaged(chain, facts) ? managerOf(facts)?.name : `${chain.table} ${chain.name}`;

function sentence({ end, sure, probes }: Cut, facts: Box): string {
  // Ports that are blocked for the same addresses are reported together.
  const whom = listed(probes.map(({ what, whom }) => [what, whom]));
  const all = listed(whom.map(([what, whom]) => [whom, what]));
  const said = all.map(([whom, what]) => (whom ? `${what} from ${whom}` : what)).sort();
  return `${whose(end, facts)} ${sure ? "drops" : "may drop"} ${said.join(", and ")} (${end.why})`;
}

/** Which of k3s's ports are open to an address that no rule names, and by which rule; without those of home nodes. */
function opened(chains: readonly Chain[], facts: Box, nodes: readonly string[]): string[] {
  // The manager takes its rules for home nodes away itself.
  const home = nodes.includes(NAT) || managerOf(facts)?.letsAllIn(facts);
  const forHome = home ? openings([NAT]).map(({ protocol, port }) => `ip ${protocol} ${port}`) : [];
  const found: [why: string, port: string][] = [];
  for (const [protocol, low, high] of CLOSED)
    for (let port: number = low; port <= high; port++)
      for (const family of ["ip", "ip6"] as const) {
        if (forHome.includes(`${family} ${protocol} ${port}`)) continue;
        const met = ends(chains, { ...fromWorld(facts), family, protocol, port });
        if (met.some(drops)) continue;
        const end = met
          .flat()
          .findLast(({ verdict, why }) => verdict !== "drop" && !why.startsWith("policy"));
        const why = end ? `${whose(end, facts)}: ${end.why}` : "no rule that drops it";
        found.push([`${protocol} by ${why}`, `${port}`]);
      }
  return listed(found).map(([why, ports]) => `${ports}/${why}`);
}

/**
 * What the box's firewall blocks, or may block, of the cluster's traffic, one sentence each.
 * @param nodes public addresses of nodes that must get through; NAT where there is a home node; TUNNEL where kubelets
 * are reached inside the tunnel; `entryOf` where it is an entry for devices.
 * @param ranges networks of pods and services, where they must. @see k3s docs, "Requirements", "Operating Systems"
 */
export function blocked(facts: Box, nodes: readonly string[], ranges: readonly string[]): string[] {
  if (nodes.length + ranges.length === 0) return [];
  return [
    ...cuts(chainsOf(facts), wanted(facts, nodes, ranges)).map((cut) => sentence(cut, facts)),
    ...unread(facts),
  ];
}

/** The remedy: `make firewall` if that helps, else its refusal. */
export function remedy(
  facts: Box,
  nodes: readonly string[],
  ranges: readonly [string, string],
  word: string,
): string {
  try {
    firewallPlan(facts, nodes, ranges);
    return `make firewall HOST=${word}`;
  } catch (error) {
    if (error instanceof Refusal) return error.message;
    throw error;
  }
}

/** The rules after ours are added. */
function withOurs(chains: readonly Chain[], facts: Box, probes: readonly Probe[]): Chain[] {
  return chains.map((chain) => {
    const foreign = /^(input|forward)$/.test(chain.base?.hook ?? "") && !isManaged(chain, facts);
    const opens = foreign ? ["nodes", "pods"] : (managerOf(facts)?.opens(chain, facts) ?? []);
    const ours = probes.filter(({ what }) => opens.includes(/^\d/.test(what) ? "nodes" : "pods"));
    const test = (packet: Packet) => ours.some((probe) => probe.packet === packet);
    return { ...chain, rules: [{ text: "ours", tests: [test], verdict: "accept" }, ...chain.rules] };
  });
}

/** Which ports are to be open, in words; `to` is "to" or "from". */
function doors(nodes: readonly string[], to: string): string {
  const port = devicePort(nodes);
  const known = nodes.filter((ip) => ip !== NAT && ip !== TUNNEL && !devicePort([ip])).join(", ");
  const inside = nodes.includes(TUNNEL);
  const devices = port ? `, ${port}/udp ${to} devices` : "";
  if (!nodes.includes(NAT))
    return `6443/tcp${inside ? "" : ", 10250/tcp"} and 51820/udp ${to} ${known}${devices}`;
  const kubelets = known && !inside ? `, 10250/tcp ${to} ${known}` : "";
  return `6443/tcp and 51820/udp ${to} all, since home nodes have no fixed address${kubelets}${devices}`;
}

/** Changes that open k3s's ports to the nodes and close them to the world; ssh is not touched. @throws {Refusal} */
export function firewallPlan(
  facts: Box,
  nodes: readonly string[],
  ranges: readonly [string, string],
): Change[] {
  const manager = managerOf(facts);
  const chains = chainsOf(facts);
  const probes = wanted(facts, nodes, ranges);
  const refuse = (list: readonly Cut[]) => {
    const cut = list.find(({ sure }) => sure);
    if (cut)
      throw new Refusal(
        `${sentence(cut, facts)}, and no rule can be placed before that one: remove it, or let ${doors(nodes, "from")} and everything from ${ranges.join(" and ")} through there`,
      );
  };
  refuse(cuts(withOurs(chains, facts, probes), probes));
  const open = opened(
    chains.filter(({ table }) => table !== `nft inet ${TABLE}`),
    facts,
    nodes,
  );
  const now = cuts(chains, probes);
  const [late, foreign] = [true, false].map((own) =>
    now.some(({ end }) => isManaged(end.chain, facts) === own),
  );
  const rest = nodes.includes(NAT) ? "k3s's other ports" : "k3s's ports to all others";
  const inside = nodes.includes(TUNNEL) ? ": kubelets are reached inside the tunnel" : "";
  const opens = `open ${doors(nodes, "to")}, and close ${rest}${inside}`;
  const changes: Change[] = [];
  const commands = manager?.commands(facts, nodes, ranges, late as boolean) ?? [];
  if (commands.length)
    changes.push({ why: `${manager?.name}: ${opens}`, sh: commands.join("\n"), seconds: 300 });
  if (!manager || open.length || foreign || facts.script?.trim()) {
    if (!facts.nft?.trim())
      throw new Refusal(
        manager
          ? `Ports of k3s's are open to everybody: ${open.join("; ")}. Take that out, or install nftables, then try again`
          : "Neither firewalld nor ufw runs here, and nft is missing: install nftables, then try again",
      );
    const script = scriptText(nodes, ipv4Of(ranges));
    const stands = new RegExp(`^table inet ${TABLE} `, "m").test(facts.ruleset ?? "");
    if (foreign || !stands || !isWritten(facts, script))
      changes.push({ why: `nft: ${opens}`, sh: written(script) });
  }
  if (!changes.length) refuse(now);
  return changes;
}

/**
 * The firewall of a box with FIREWALL=yes: k3s's ports are open to the nodes and closed to the world; ssh is not
 * touched. On a box FIREWALL holds the known addresses, and -ADDRESS for a node that leaves.
 */
export const firewall = step({
  name: "firewall",
  options: ["PUBLIC_IP", "SERVER_ARGS", "FIREWALL", "TUNNEL_KUBELETS"],
  look: (want) => (want.FIREWALL ? ["others=names", ...clusterLook, ...firewallLooks] : []),
  plan: (want, facts) => (want.FIREWALL ? firewallPlan(facts, admitted(want, facts), rangesOf(want)) : []),
});

/**
 * The addresses to let in: the known ones and those of the cluster's nodes (IPv4 only); NAT where one has none, and TUNNEL
 * with TUNNEL_KUBELETS; the port of devices where the box is an entry.
 */
export function admitted(want: Settings, facts: Facts<"nodes" | "device-port">): string[] {
  const known = splitWords(want.FIREWALL);
  const joined = nodesOf(facts.nodes).flatMap((node) => {
    // Not every node without one: a node that is joining gets its address a moment later.
    const { externalIp: ip = isHome(node) ? NAT : "" } = node;
    return ip === NAT || isIPv4(ip) ? ip : [];
  });
  const all = [...known, ...joined, want.PUBLIC_IP, want.TUNNEL_KUBELETS && TUNNEL, ...entryOf(facts)];
  // A home node that leaves may not be the only one.
  const leaves = (ip: string) => ip !== NAT && known.includes(`-${ip}`);
  return [...new Set(all.filter((ip) => ip && !ip.startsWith("-") && !leaves(ip)))].sort();
}

/** Prints `firewall` where there is something for `closeAgain`. */
export const closeLook = (ranges: readonly [string, string]): string =>
  sh`if ${raw(LEFT_OF_OWN)} || ${raw(LEFT_IN_UFW)}; then echo firewall; fi
${raw(leftInFirewalld(ranges))}`;

/** Shell that removes everything that `firewallPlan` added, for any of the three firewalls. */
export const closeAgain = (ranges: readonly [string, string]): string =>
  [CLEAR_OWN, CLEAR_UFW, clearFirewalld(ranges)].join("\n");

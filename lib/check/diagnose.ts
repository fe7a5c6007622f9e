/** Diagnoses a cluster from its boxes' reports: what is wrong, and what to do. Pure. */

import { rangesOf } from "../k3s/config.ts";
import { meaningOf } from "../k3s/journal.ts";
import { FRESH, type Node, overload, peerOf, standing } from "../k3s/nodes.ts";
import { generationOf, unitOf } from "../k3s/unit.ts";
import type { Problem } from "../report.ts";
import { publicIp } from "../table.ts";
import type { BoxReport, Cluster } from "./survey.ts";

/** Tolerated difference between clocks, in seconds; NTP keeps them within one. */
const APART = 5;

/**
 * How long metrics for a node may be missing, in seconds: metrics-server scrapes every 15 s (v0.3: 60), and needs its
 * start and two scrapes. A joining node may also restart its k3s for as long.
 */
export const TURN = 150;

/**
 * A finding: the path that does not work, and the paths it depends on. If one of those is broken too, this is a
 * consequence, and not reported as a cause.
 */
interface Finding extends Problem {
  /** Not a fault yet, only a note; this proof does not count as failed. */
  note?: string;
  /** `node b1`, `tunnel a1 b1`, `kubelet b1`: what others may depend on. */
  breaks: string[];
  by: string[];
}

/** Names of paths that others depend on. */
const tunnel = (a: string, b: string) => `tunnel ${[a, b].sort().join(" ")}`;
const full = (a: string, b: string) => `full ${tunnel(a, b)}`;
const pods = (a: string, b: string) => `pods ${tunnel(a, b)}`;
const between = (a: string, b: string) =>
  a === b ? [`node ${a}`] : [`node ${a}`, `node ${b}`, tunnel(a, b)];
const betweenPods = (a: string, b: string) => [...between(a, b), full(a, b), pods(a, b)];

/** What is wrong, causes before consequences; empty for a healthy cluster. */
export const diagnose = (cluster: Cluster): Problem[] => judge(cluster).wrong;

/** What is wrong, what is worth a note, and the proofs that are not available yet. */
export function judge(cluster: Cluster): { wrong: Problem[]; notes: string[]; early: string[] } {
  const { boxes } = cluster;
  const broken = new Set<string>();
  const wrong: Problem[] = [];
  const notes = notesOf(cluster);
  const early: string[] = [];
  const add = (findings: Finding[]) => {
    for (const { breaks, by, note, ...problem } of findings) {
      const followed = by.some((way) => broken.has(way));
      // A consequence also breaks what depends on it.
      for (const way of breaks) broken.add(way);
      if (note) early.push(note);
      if (!followed && note) notes.push(`${problem.box}: ${problem.cause}`);
      else if (!followed) wrong.push(problem);
    }
  };
  add(boxFindings(cluster));
  add(addressFindings(cluster, broken));
  add(smallFindings(cluster));
  const sound = boxes.filter(
    (box) => box.error === undefined && !broken.has(`node ${box.name}`) && box.wireguard,
  );
  add(endpointFindings(sound, cluster.nodes));
  add(tunnelFindings(sound, broken));
  add(kubeletFindings(cluster));
  add(busyFindings(cluster, broken));
  add(startFindings(cluster));
  add(dnsFindings(cluster));
  add(topFindings(cluster, broken));
  add(podFindings(cluster));
  return { wrong, notes, early };
}

/** Each box by itself: does k3s run on it, as a node of this cluster? */
function boxFindings(cluster: Cluster): Finding[] {
  const { boxes } = cluster;
  const clock = median(boxes.flatMap((box) => box.clock ?? []));
  const server = boxes.find(({ role }) => role === "server");
  const findings: Finding[] = boxes.flatMap((box): Finding[] => {
    const node = `node ${box.name}`;
    const say = (cause: string, remedy: string, breaks = [node], by: string[] = []): Finding => ({
      box: box.name,
      cause,
      remedy,
      breaks,
      by,
    });
    if (box.error !== undefined) return [say(box.error, `see that "ssh ${box.host}" works from here`)];
    const ahead = Math.round((box.clock ?? clock) - clock);
    const problem = serviceProblem(box, cluster);
    return [
      ...(boxes.length > 1 && Math.abs(ahead) > APART
        ? [
            say(
              `its clock is ${Math.abs(ahead)} s ${ahead < 0 ? "behind" : "ahead of"} the others'`,
              "timedatectl set-ntp true on it",
              [`clock ${box.name}`],
            ),
          ]
        : []),
      ...(problem
        ? [
            say(
              problem[0],
              problem[1],
              [node],
              problem[2] === "clock"
                ? [`clock ${box.name}`]
                : problem[2] === "server" && server && server !== box
                  ? [`node ${server.name}`]
                  : [],
            ),
          ]
        : []),
      ...(box.blocked.length ? [say(box.blocked.join("; "), box.opens)] : []),
    ];
  });
  for (const [a, b] of pairs(boxes))
    if (a.wireguard?.key && a.wireguard.key === b.wireguard?.key)
      findings.push({
        box: b.name,
        cause: `it has the same WireGuard key as ${a.name}: one was cloned from the other`,
        remedy: `on ${b.name}: rm -f /run/flannel/wgkey && systemctl restart ${unitOf(b.role)}; then restart k3s on the others`,
        breaks: [`node ${a.name}`, `node ${b.name}`],
        by: [],
      });
  return findings;
}

function addressFindings(cluster: Cluster, broken: Set<string>): Finding[] {
  return cluster.boxes.flatMap((box) => {
    if (broken.has(`node ${box.name}`) || !box.node) return [];
    const problem = addressProblem(box, box.node, cluster);
    return problem
      ? [{ box: box.name, cause: problem[0], remedy: problem[1], breaks: [`node ${box.name}`], by: [] }]
      : [];
  });
}

function smallFindings({ boxes, nodes }: Cluster): Finding[] {
  const servers = boxes.filter(({ role }) => role === "server").map(({ name }) => `node ${name}`);
  return [
    ...boxes.flatMap((box) =>
      smallProblems(box).map(([cause, remedy, way = ""]) => ({
        box: box.name,
        cause,
        remedy,
        breaks: [`${way} ${box.name}`],
        // The API's service depends on the server; a box without a healthy k3s has no rules, and its unit restarts.
        by: way === "service" || way === "starts again" ? [`node ${box.name}`, ...servers] : [],
      })),
    ),
    ...nodes
      .filter((node) => !boxOf(boxes, node) && !node.ready)
      .map((node) => ({
        box: node.name,
        cause: "this node is not Ready, and is in neither SERVER nor AGENTS",
        remedy: `add it to AGENTS, or: kubectl delete node ${node.name}`,
        breaks: [`node ${node.name}`],
        by: [],
      })),
  ];
}

/** Peers with a fresh handshake at an address that cannot stay theirs. */
function endpointFindings(boxes: BoxReport[], nodes: readonly Node[]): Finding[] {
  return boxes.flatMap((a) =>
    boxes.flatMap((b) => {
      if (a === b || !b.node) return [];
      const { wrong } = standing(peerOf(a.peers, b.node.podCidr), b.node, nodes, a.now - FRESH);
      return wrong
        ? [
            {
              box: a.name,
              cause: `its WireGuard has ${b.name} at ${wrong}`,
              remedy: `systemctl restart ${unitOf(a.role)} on it: flannel sets its peers anew`,
              breaks: [tunnel(a.name, b.name)],
              by: between(a.name, b.name),
            },
          ]
        : [];
    }),
  );
}

/** Timeouts seen by an overloaded box: the load is the cause, reported once. */
function busyFindings({ boxes }: Cluster, broken: Set<string>): Finding[] {
  return boxes.flatMap((box) => {
    const load = overload(box.load);
    const slow = Object.entries(box.tried.why).filter(([what, how]) => {
      const name = named(boxes, what.split(" ")[1] ?? "");
      return SLOW.test(how) && !broken.has(`kubelet ${name}`) && !broken.has(`node ${name}`);
    });
    if (!load || slow.length === 0) return [];
    return [
      {
        box: box.name,
        cause: `${load}: ${slow.length} ${slow.length === 1 ? "question" : "questions"} did not answer in time`,
        remedy: "end what loads it (top shows it), or give it more cores or memory; then make check",
        breaks: [`ease ${box.name}`],
        by: [],
      },
    ];
  });
}

/** A timeout of the API does not mean a closed port. */
const SLOW = /did not answer|time(d )?out|deadline exceeded/i;

/** The command that repairs a box. */
export const makeLine = (box: Pick<BoxReport, "role" | "word">): string =>
  box.role === "server" ? "make server" : `make agent HOST=${box.word}`;

/** @param by what it may be a consequence of. */
type Line = [cause: string, remedy: string, by?: string];

/** Why k3s does not run on the box as a node of this cluster. */
function serviceProblem(box: BoxReport, { boxes, nodes }: Cluster): Line | undefined {
  const server = boxes.find(({ role }) => role === "server");
  const unit = unitOf(box.role);
  const again = makeLine(box);
  const well = box.unit.runs !== undefined && box.node?.ready;
  if (
    box.unit.state === "unknown" ||
    (box.unit.state === "inactive" && box.unit.runs === undefined && !box.node)
  )
    return [`k3s does not run on it: ${unit} is not set up or not started`, again];
  const other = boxes.find((b) => b !== box && b.ip === box.node?.externalIp);
  if (other)
    return [
      `its host name ${box.nodeName} is taken: that node is the box ${other.name} at ${other.ip}`,
      `hostnamectl set-hostname another name on it, then ${again}`,
    ];
  if (box.role === "agent" && box.ca && server?.ca && box.ca !== server.ca)
    return [
      `its K3S_TOKEN belongs to another cluster: it names the CA ${box.ca.slice(0, 12)}…, the server has ${server.ca.slice(0, 12)}…`,
      `make server, then ${again}`,
    ];
  const servers = boxes.filter(({ role }) => role === "server");
  const joins = box.url && new URL(box.url).hostname;
  // A name may resolve to any of them.
  if (joins && publicIp(joins) === undefined && server && !servers.some(({ ip }) => ip === joins))
    return [`it joins ${box.url}, not ${server.name} at ${server.ip}`, again];
  if (box.tried.api === "dropped")
    return [
      "it does not reach the server's 6443/tcp: packets are dropped",
      "open 6443/tcp in the server's security group and firewall for this box's address",
      "server",
    ];
  if (box.tried.api && box.tried.api !== "open" && !well)
    return [
      `it does not reach the server's 6443/tcp (${box.tried.api})`,
      "make server: k3s has to run there",
      "server",
    ];
  const absent =
    box.node?.args.some((arg) => arg === `--node-ip=${box.ip}` || arg === box.ip) &&
    !box.addresses.includes(box.ip);
  if (absent)
    return [
      `--node-ip is ${box.ip}, and no interface of the box has it: k3s dies with "host IP unknown"`,
      again,
    ];
  const silent: Line | undefined = box.silence
    ? [
        box.silence,
        overload(box.load)
          ? "end what loads it (top shows it), or give it more cores or memory; then make check"
          : again,
      ]
    : undefined;
  if (well) return silent;
  const meaning = meaningOf(box.said, again);
  if (meaning)
    return [
      meaning.cause,
      meaning.remedy,
      meaning.cause.startsWith("its clock")
        ? "clock"
        : meaning.cause === "it does not reach the server's 6443/tcp"
          ? "server"
          : "",
    ];
  if (box.unit.runs === undefined) return [`${unit} does not run (systemd: ${box.unit.state})`, again];
  if (silent) return silent;
  if (nodes.length === 0 && box.role === "server") return ["the API does not answer on it", again];
  if (nodes.length === 0) return undefined;
  return box.node
    ? [`node ${box.nodeName} is not Ready`, `${again} waits for it and shows the journal`]
    : [`the cluster has no node ${box.nodeName || "of its name"}`, again];
}

/** Why peers do not send to the box's public address. */
function addressProblem(box: BoxReport, node: Node, { boxes }: Cluster): Line | undefined {
  const again = makeLine(box);
  if (node.externalIp !== box.ip)
    return [`its ExternalIP is ${node.externalIp ?? "not set"}, not ${box.ip}`, again];
  if (node.publicIp === box.ip) return undefined;
  const is = node.publicIp
    ? `${node.publicIp}${publicIp(node.publicIp) ? ", a private address" : ""}`
    : "not set";
  if (generationOf(node.version, "") === "old")
    return [
      `flannel's address of it is ${is}: ${node.overwrite === box.ip ? "it was annotated and not restarted since" : "it is not annotated with its public one"}`,
      `make annotate HOST=${box.word}`,
    ];
  const server = boxes.find(({ role }) => role === "server");
  if (server?.node && !server.node.args.includes("--flannel-external-ip"))
    return [
      `flannel's address of it is ${is}: without --flannel-external-ip k3s ${server.node.version} deletes the annotation public-ip-overwrite at each start`,
      "make server, then systemctl restart k3s-agent on the agents",
    ];
  return [`flannel's address of it is ${is}, not ${box.ip}`, `systemctl restart ${unitOf(box.role)} on it`];
}

/** Findings about a box itself: clock, disk, memory, load. */
function smallProblems(box: BoxReport): Line[] {
  if (box.error !== undefined) return [];
  const lines: Line[] = [];
  const ipvs = box.proxyMode === "ipvs" || box.node?.args.some((arg) => arg.endsWith("proxy-mode=ipvs"));
  if (ipvs && !box.ipvs)
    lines.push([
      `ipvs is asked for, but its kernel ${box.kernel} has no ip_vs: kube-proxy uses iptables`,
      "PROXY_MODE=iptables, or a kernel with ip_vs on it",
    ]);
  for (const [ip, answers] of Object.entries(box.tried.resolvers))
    if (!answers)
      lines.push([
        `its DNS upstream ${ip} is a private address that does not answer: where CoreDNS runs there, no pod resolves outside names`,
        `put a resolver that answers into its /etc/resolv.conf, then systemctl restart ${unitOf(box.role)}`,
      ]);
  if (box.tried.service && box.tried.service !== "open")
    lines.push([
      `it does not reach the API's service (${box.tried.service}): kube-proxy's rules, or 6443 at the server's public address`,
      `systemctl restart ${unitOf(box.role)} on it`,
      "service",
    ]);
  for (const what of box.node?.pressure ?? [])
    lines.push([
      `the kubelet reports ${what} (disk ${box.disk ?? "?"} %, memory ${box.load.memory ?? "?"} % in use)`,
      "make room on it",
      "starts",
    ]);
  const { wireguard, cniMtu = 0 } = box;
  // v1.17 always gives pods an MTU of 1500 over 1420, and they cope.
  if (wireguard?.name === "flannel-wg" && cniMtu > wireguard.mtu)
    lines.push([
      `its pods at cni0 have an MTU of ${cniMtu}, larger than the ${wireguard.mtu} of flannel-wg: large packets of its pods are lost`,
      `restart the box, which starts its pods anew (or: systemctl restart ${unitOf(box.role)}, and delete its pods)`,
      "cni",
    ]);
  if (loops(box) === "wrong")
    lines.push([
      `${unitOf(box.role)} starts again and again (${box.starts.length} times in ${Math.round(Math.max(...box.starts))} s)`,
      `${makeLine(box)} shows the journal`,
      "starts again",
    ]);
  return lines;
}

/**
 * Does systemd restart k3s in a loop? A joining node may do so for a while, and a k3s that now runs longer than before
 * has recovered.
 */
function loops({ starts, unit: { runs } }: BoxReport): "wrong" | "young" | undefined {
  if (runs === undefined || runs >= 60 || starts.length < 3) return undefined;
  const longest = Math.max(...starts.slice(1).map((ago, i) => (starts[i] as number) - ago));
  return Math.max(...starts) < TURN || runs > longest ? "young" : "wrong";
}

/** What is worth a line, and no fault. */
function notesOf({ boxes, nodes }: Cluster): string[] {
  return boxes.flatMap((box) => [
    ...(box.latent.length
      ? [
          `${box.name}: by its rules ${box.latent.join("; ")}; it passes now, and may not after a restart: ${box.opens}`,
        ]
      : []),
    ...(loops(box) === "young"
      ? [
          `${box.name}: ${unitOf(box.role)} was started ${box.starts.length} times in ${Math.round(Math.max(...box.starts))} s, and has run for ${Math.round(box.unit.runs ?? 0)} s since`,
        ]
      : []),
    ...(box.error === undefined ? nodes : []).flatMap((node) => {
      if (node.name === box.nodeName) return [];
      const { note } = standing(peerOf(box.peers, node.podCidr), node, nodes, box.now - FRESH);
      return note ? [`${box.name}: ${node.name} sends from ${note}`] : [];
    }),
  ]);
}

/** The cluster's networks of pods and of services, by what its server got. */
const rangesIn = (boxes: readonly BoxReport[]): string => {
  const server = boxes.find(({ role, node }) => role === "server" && node);
  return rangesOf({ SERVER_ARGS: server?.node?.args.join(" ") ?? "" }).join(" and ");
};

/** Tunnels between otherwise healthy boxes: packet size, closed ports, stale peers. */
function tunnelFindings(boxes: BoxReport[], broken: Set<string>): Finding[] {
  const ranges = rangesIn(boxes);
  const problems: Finding[] = [];
  const peerAt = (a: BoxReport, b: BoxReport) => peerOf(a.peers, b.node?.podCidr);
  /** Without ping the handshake decides. */
  const reach = (a: BoxReport, b: BoxReport) =>
    a.tried.tunnel[b.nodeName] ?? (a.now - (peerAt(a, b)?.handshake ?? 0) > FRESH ? 0 : undefined);
  const lost: [BoxReport, BoxReport][] = [];

  const small = pairs(boxes).flatMap(([a, b]) => {
    const sizes = [reach(a, b), reach(b, a)].filter((size) => size !== undefined && size > 0) as number[];
    const least = Math.min(...sizes);
    return least < Math.min(a.wireguard?.mtu ?? 0, b.wireguard?.mtu ?? 0) ? [{ a, b, least }] : [];
  });
  // If all of them share one end, that box's network is the limit.
  const at =
    small.length > 1 ? boxes.find((box) => small.every(({ a, b }) => a === box || b === box)) : undefined;
  const ends = boxes.filter((box) => small.some(({ a, b }) => a === box || b === box));
  const fits = Math.min(...small.map(({ least }) => least));
  const [first] = ends;
  if (first?.wireguard) {
    const { name, mtu } = first.wireguard;
    const where = at ? "it and its peers" : ends.map((box) => box.name).join(", ");
    problems.push({
      box: (at ?? ends.at(-1) ?? first).name,
      cause: `the MTU ${mtu} of ${name} is too large between ${where}: larger packets than ${fits} are lost`,
      // flannel's wireguard-native uses the interface's MTU minus 80 (v0.28.4); the old backend's script sets none.
      remedy:
        name === "flannel.1"
          ? `ip link set flannel.1 mtu ${fits} on every box, after each start of k3s`
          : `set the network card's MTU to ${fits + 80} on every box, in its network's configuration too; then restart k3s`,
      breaks: small.map(({ a, b }) => full(a.name, b.name)),
      by: [],
    });
  }

  for (const a of boxes)
    for (const b of boxes) {
      if (a === b || !b.node?.ready) continue;
      const [there, back] = [peerAt(a, b), peerAt(b, a)];
      if (!there || (b.wireguard?.key && there.key !== b.wireguard.key)) {
        if (reach(a, b) === 0 || !there)
          problems.push({
            box: a.name,
            cause: there ? `it has an old WireGuard key of ${b.name}` : `its WireGuard has no peer ${b.name}`,
            remedy: `systemctl restart ${there ? `${unitOf(b.role)} on ${b.name}` : `${unitOf(a.role)} on it`}`,
            breaks: [tunnel(a.name, b.name)],
            by: [],
          });
      } else if (reach(a, b) === 0 && back?.key === a.wireguard?.key && !broken.has(tunnel(a.name, b.name)))
        lost.push([a, b]);
    }

  /** Did packets that a sent arrive at b's WireGuard in the seconds that both were watched? */
  const arrives = (a: BoxReport, b: BoxReport) => (b.tried.passed[a.wireguard?.key ?? ""]?.received ?? 0) > 0;
  const dropped = lost.filter(([a, b]) => !arrives(a, b));
  const explained = new Set<BoxReport>();
  for (const b of boxes) {
    const senders = dropped.filter(([, to]) => to === b).map(([from]) => from);
    const others = boxes.filter((a) => a !== b && arrives(a, b));
    const open = boxes.some((a) => a !== b && (reach(b, a) ?? 0) > 0);
    if (senders.length === 0 || others.length || open) continue;
    const seen = b.tried.arrived?.some((ip) => senders.some((a) => a.ip === ip));
    // With only one sender its outgoing packets may be dropped.
    const elsewhere = senders.length === 1 ? ` (or the one of ${senders[0]?.name} drops what goes out)` : "";
    explained.add(b);
    problems.push({
      box: b.name,
      breaks: senders.map((a) => tunnel(a.name, b.name)),
      by: [],
      ...(seen
        ? {
            cause:
              "UDP 51820 is closed by its own firewall: its peers' packets reach its network card, not WireGuard",
            remedy:
              "look there for what drops it, beside the rules that are read here, which do not: eBPF, an agent of the vendor's",
          }
        : b.tried.arrived
          ? {
              cause: "UDP 51820 is closed before it: its peers' packets do not reach its network card",
              remedy: `open 51820/udp in the security group of ${b.name}${elsewhere}`,
            }
          : {
              cause: "UDP 51820 is closed on its side: its peers' packets do not arrive",
              remedy: `open 51820/udp in the security group and the firewall of ${b.name}${elsewhere}`,
            }),
    });
  }
  for (const [a, b] of pairs(boxes)) {
    if (explained.has(a) || explained.has(b)) continue;
    const ways = lost.filter(([x, y]) => (x === a && y === b) || (x === b && y === a));
    if (ways.length === 0) continue;
    const deaf = ways.every(([x, y]) => arrives(x, y));
    problems.push({
      box: b.name,
      breaks: [tunnel(a.name, b.name)],
      by: [],
      ...(deaf
        ? {
            cause: `WireGuard passes between it and ${a.name}, but nothing answers behind it: a firewall on one of them drops what comes out of the tunnel`,
            remedy: `trust ${ranges} in the firewalls of both`,
          }
        : {
            cause: `it and ${a.name} do not reach each other at ${b.ip} and ${a.ip}, while others do`,
            remedy:
              "in one cloud: does its NAT lead public addresses back inside (hairpin)? else open 51820/udp for each other's addresses",
          }),
    });
  }
  return problems;
}

/** Nodes on which no pod starts, in the kubelet's words. */
function startFindings({ boxes }: Cluster): Finding[] {
  return boxes.flatMap(({ tried }) =>
    Object.entries(tried.unstarted).map(([node, said]) => {
      const name = named(boxes, node);
      return {
        box: name,
        cause: `no pod starts on it: ${said}`,
        remedy: "mend what the kubelet says there; journalctl -u k3s -u k3s-agent on it has more",
        breaks: [`starts ${name}`],
        by: [`node ${name}`, `starts ${name}`],
      };
    }),
  );
}

/** CoreDNS: while it does not run, no pod can resolve names. */
function dnsFindings({ boxes, nodes, system }: Cluster): Finding[] {
  const dns = system?.filter(({ app }) => app === "kube-dns") ?? [];
  const server = boxes.find(({ role, error }) => role === "server" && error === undefined);
  const [first] = dns;
  if (!first || !server || dns.some(({ ready }) => ready)) return [];
  const where = named(boxes, first.node ?? "");
  const node = nodes.find(({ name }) => name === first.node);
  const [what, seconds] = latest(boxes, server, node, [["CoreDNS was made", ago(server.now, first.created)]]);
  const state = `CoreDNS does not run (${first.reason ?? "not Ready"}): no pod of the cluster resolves a name`;
  return [
    {
      box: where || server.name,
      cause: seconds < TURN ? `${state} yet; ${what} ${Math.round(seconds)} s ago` : state,
      remedy: `kubectl -n kube-system describe pod ${first.name}`,
      breaks: ["coredns"],
      by: where ? [`node ${where}`, `starts ${where}`] : [],
      ...(seconds < TURN ? { note: "DNS from the pods of every node" } : {}),
    },
  ];
}

type Event = [what: string, seconds: number];

/** The last event of a node that others have to catch up with. */
function latest(boxes: BoxReport[], server: BoxReport, node: Node | undefined, more: Event[]): Event {
  const box = node && boxOf(boxes, node);
  const runs = ({ unit }: BoxReport) => unit.runs ?? Number.POSITIVE_INFINITY;
  const events: Event[] = [
    [`k3s of ${server.name} was started`, runs(server)],
    ...(box ? [[`k3s of ${box.name} was started`, runs(box)] as Event] : []),
    ...(node ? ([[`${node.name} joined`, ago(server.now, node.created)]] as Event[]) : []),
    ...(node ? ([[`${node.name} became Ready`, ago(server.now, node.readySince)]] as Event[]) : []),
    ...more,
  ];
  return events.sort((a, b) => a[1] - b[1])[0] as Event;
}

/** Seconds since then; infinite if not known, or in the future (a clock was set back). */
function ago(now: number, then: number): number {
  const seconds = now - then;
  return then && seconds > -APART ? Math.max(0, seconds) : Number.POSITIVE_INFINITY;
}

/** Nodes missing from `kubectl top nodes`: only a note until metrics-server had time. */
function topFindings({ boxes, nodes, system }: Cluster, broken: Set<string>): Finding[] {
  const server = boxes.find(({ role }) => role === "server");
  if (!server?.metrics || server.error !== undefined) return [];
  const own = system?.filter(({ app }) => app === "metrics-server") ?? [];
  const pod = own.find(({ ready }) => ready) ?? own[0];
  const where = pod?.node ? named(boxes, pod.node) : "";
  const ground = [
    `node ${server.name}`,
    ...(where ? [...between(server.name, where), `starts ${where}`] : []),
  ];
  const missing = nodes.filter((node) => {
    const name = boxOf(boxes, node)?.name ?? node.name;
    const by = [...ground, `node ${name}`, `kubelet ${name}`];
    return node.ready && !server.tried.top.includes(node.name) && !by.some((way) => broken.has(way));
  });
  const began: Event[] = own.map(({ started, created }) =>
    started
      ? ["metrics-server was started", ago(server.now, started)]
      : ["metrics-server was made", ago(server.now, created)],
  );
  const last = (node: Node) => latest(boxes, server, node, began);
  const young = missing.filter((node) => last(node)[1] < TURN);
  const late = missing.filter((node) => !young.includes(node));
  const nothing = (some: Node[]) =>
    `"kubectl top nodes" has nothing of ${some.map(({ name }) => name).join(", ")}`;
  const down = pod && !pod.ready ? ` and metrics-server does not run (${pod.reason ?? "not Ready"})` : "";
  const same = { box: server.name, breaks: [], by: [] };
  const findings: Finding[] = [];
  if (late.length)
    findings.push({
      ...same,
      cause: `${nothing(late)}${down && `,${down}`}`,
      remedy: down ? `kubectl -n kube-system describe pod ${pod?.name}` : "make fix-metrics",
    });
  if (young.length) {
    const [what, seconds] = young.map(last).sort((a, b) => a[1] - b[1])[0] as Event;
    findings.push({
      ...same,
      cause: `${nothing(young)} yet: ${what} ${Math.round(seconds)} s ago, and metrics-server may take ${TURN}`,
      remedy: "make check again then",
      note: TOP,
    });
  }
  return findings;
}

/** The proof of what `kubectl top nodes` has. */
export const TOP = "nodes in kubectl top";

/** What pods cannot reach although their boxes can: each kind once, with the boxes. */
function podFindings({ boxes, system }: Cluster): Finding[] {
  const ranges = rangesIn(boxes);
  const failed = (of: (box: BoxReport) => Record<string, boolean>) =>
    boxes.flatMap((box) =>
      Object.entries(box.error === undefined ? of(box) : {}).flatMap(([to, fine]) =>
        fine ? [] : [{ box, to }],
      ),
    );
  const name = (nodeName: string) => named(boxes, nodeName);
  const server = boxes.find(({ role, error }) => role === "server" && error === undefined);
  const dns = system
    ?.filter(({ app, ready }) => app === "kube-dns" && ready)
    .flatMap(({ node }) => node ?? []);
  return [
    ...failed(({ tried }) => tried.pods)
      .filter(({ box, to }) => (box.tried.tunnel[to] ?? 1) > 0)
      .map(({ box, to }) => ({
        box: box.name,
        cause: `its pods do not reach the pods of ${to}, although the boxes reach each other`,
        remedy: `a firewall on one of them drops what is forwarded: trust ${ranges} on both`,
        breaks: [pods(box.name, name(to))],
        by: [...between(box.name, name(to)), full(box.name, name(to))],
      })),
    ...failed(({ tried }) => tried.services).map(({ box, to }) =>
      to === "DNS"
        ? {
            box: box.name,
            cause: "its pods get no answer of CoreDNS",
            remedy: "kubectl -n kube-system get pods -o wide -l k8s-app=kube-dns: does it run, and where?",
            breaks: [],
            by: [
              `node ${box.name}`,
              `service ${box.name}`,
              "coredns",
              // Its node is not always known; then any broken tunnel of this box may be the cause.
              ...(dns?.length ? dns : boxes.map(({ nodeName }) => nodeName)).flatMap((node) =>
                betweenPods(box.name, name(node)),
              ),
            ],
          }
        : {
            box: box.name,
            cause: `its pods do not reach the service ${to}: kube-proxy's rules, or 6443 at the server's public address`,
            remedy: `systemctl restart ${unitOf(box.role)} on it`,
            breaks: [],
            by: [`node ${box.name}`, `service ${box.name}`],
          },
    ),
    ...(["logs", "exec"] as const).flatMap((what) =>
      failed(({ tried }) => tried[what]).map(({ box, to }) => {
        const why = box.tried.why[`${what} ${to}`] ?? "";
        const slow = SLOW.test(why);
        return {
          box: name(to),
          cause: slow
            ? `kubectl ${what} of it: ${why}`
            : `kubectl ${what} does not work on it${why ? `: ${why}` : ""}`,
          remedy: slow
            ? "make check again; if it stays so: 10250/tcp for the server, and 6443/tcp on the server for it, have to be open"
            : "open 10250/tcp for the server, and 6443/tcp on the server for it; then make agent",
          breaks: [],
          by: [
            `node ${name(to)}`,
            `kubelet ${name(to)}`,
            `node ${server?.name}`,
            ...(slow ? [`ease ${box.name}`] : []),
            // If logs fail, exec fails for the same reason.
            ...(what === "exec" && box.tried.logs[to] === false ? [`logs ${name(to)}`] : []),
          ],
        };
      }),
    ),
  ];
}

/** Kubelets that the server does not reach. */
function kubeletFindings({ boxes, nodes }: Cluster): Finding[] {
  const server = boxes.find(({ role }) => role === "server");
  if (!server || server.error !== undefined) return [];
  return nodes.flatMap((node): Finding[] => {
    const how = server.tried.kubelet[node.name];
    const box = boxOf(boxes, node);
    const name = box?.name ?? node.name;
    if (!node.ready || !how || how === "open") return [];
    return [
      {
        box: name,
        cause: `its kubelet cannot be reached at ${node.externalIp}:10250 (${how}): no logs, exec and metrics`,
        remedy:
          how === "refused"
            ? `${box ? makeLine(box) : "restart k3s there"}: nothing listens`
            : "open 10250/tcp in its security group and firewall for the nodes' addresses",
        breaks: [`kubelet ${name}`],
        by: box === server ? [] : [`node ${name}`],
      },
    ];
  });
}

const named = (boxes: BoxReport[], nodeName: string): string =>
  boxes.find((box) => nodeName && box.nodeName === nodeName)?.name ?? nodeName;

/** The box of a node, by address, since host names may repeat. */
const boxOf = (boxes: BoxReport[], node: Node) =>
  boxes.find(({ ip }) => ip === node.externalIp) ?? boxes.find(({ nodeName }) => nodeName === node.name);

function pairs<T>(list: T[]): [T, T][] {
  return list.flatMap((a, i) => list.slice(i + 1).map((b): [T, T] => [a, b]));
}

function median(numbers: number[]): number {
  return [...numbers].sort((a, b) => a - b)[Math.floor((numbers.length - 1) / 2)] ?? 0;
}

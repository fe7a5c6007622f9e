/** Diagnoses a cluster from its boxes' reports: what is wrong, and what to do. Pure. */

import { type Certificate, DUE, daysTo, ending, firstOf, PRESSING, renewsFrom } from "../k3s/certificates.ts";
import { rangesOf } from "../k3s/config.ts";
import { eachOf } from "../k3s/firewall/traffic.ts";
import { meaningOf } from "../k3s/journal.ts";
import {
  FRESH,
  isHome,
  isInside,
  kubeletIpOf,
  type Node,
  overload,
  peerOf,
  standing,
  tunnelIpOf,
} from "../k3s/nodes.ts";
import { generationOf, unitOf } from "../k3s/unit.ts";
import type { Problem } from "../report.ts";
import { NAT, overlap, publicIp } from "../table.ts";
import type { BoxReport, Cluster } from "./survey.ts";

/** Tolerated difference between clocks, in seconds; NTP keeps them within one. */
const APART = 5;

/**
 * How long metrics for a node may be missing, in seconds: metrics-server scrapes every 15 s (v0.3: 60), and needs its
 * start and two scrapes. A joining node may also restart its k3s for as long.
 */
export const TURN = 150;

/**
 * A finding: the paths that do not work, and the paths that they depend on. If one of those is broken too, this is a
 * consequence of it, and not reported.
 */
interface Finding extends Problem {
  /** Not a problem yet, only a note: these tests do not count as failed. */
  note: string[];
  /** `node b1`, `tunnel a1 b1`, `kubelet b1`: what others may depend on. */
  breaks: string[];
  by: string[];
}

/** No finding where a condition does not hold. */
type Findings = (Finding | false | "" | undefined)[];

const finding = (
  box: string,
  cause: string,
  remedy: string,
  breaks: string[] = [],
  by: string[] = [],
  note: string[] = [],
): Finding => ({ box, cause, remedy, breaks, by, note });

/** Names of paths that others depend on. */
const tunnel = (a: string, b: string) => `tunnel ${[a, b].sort().join(" ")}`;
const full = (a: string, b: string) => `full ${tunnel(a, b)}`;
const pods = (a: string, b: string) => `pods ${tunnel(a, b)}`;
const between = (a: string, b: string) =>
  a === b ? [`node ${a}`] : [`node ${a}`, `node ${b}`, tunnel(a, b)];
const betweenPods = (a: string, b: string) => [...between(a, b), full(a, b), pods(a, b)];

/** Remedies that several findings share. */
const RELIEVE = "stop what overloads it (see top), or add cores or memory; then run make check";
const restart = ({ role }: BoxReport, where = " on it") => `systemctl restart ${unitOf(role)}${where}`;

/** What is wrong, causes before consequences; empty for a healthy cluster. */
export const diagnose = (cluster: Cluster): Problem[] => judge(cluster).wrong;

/** Problems, notes, and the tests whose results are not available yet. */
export function judge(cluster: Cluster): { wrong: Problem[]; notes: string[]; early: string[] } {
  const { boxes } = cluster;
  const broken = new Set<string>();
  const wrong: Problem[] = [];
  const notes = notesOf(cluster);
  const early: string[] = [];
  const add = (findings: Findings) => {
    for (const one of findings) {
      if (!one) continue;
      const { breaks, by, note, ...problem } = one;
      const followed = by.some((way) => broken.has(way));
      // A consequence also breaks what depends on it.
      for (const way of breaks) broken.add(way);
      early.push(...note);
      if (!followed && note.length) notes.push(`${problem.box}: ${problem.cause}`);
      else if (!followed) wrong.push(problem);
    }
  };
  add(boxFindings(cluster));
  for (const box of boxes) if (!broken.has(`node ${box.name}`)) add([addressFinding(box, cluster)]);
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
  add(entryFindings(cluster));
  add(certificateFindings(cluster));
  add(
    cluster.boxes.flatMap(({ name, backups }) =>
      (backups?.wrong ?? []).map((cause) => finding(name, cause, "make backup")),
    ),
  );
  add(boxes.map(({ name, watch }) => watch?.fault && finding(name, watch.fault, "make watch")));
  return { wrong, notes, early };
}

/** Each box by itself: does k3s run on it, as a node of this cluster? */
function boxFindings(cluster: Cluster): Findings {
  const { boxes } = cluster;
  const clock = median(boxes.flatMap((box) => box.clock ?? []));
  return [
    ...boxes.flatMap((box): Findings => {
      const node = [`node ${box.name}`];
      if (box.error !== undefined)
        return [finding(box.name, box.error, `make sure that "ssh ${box.host}" works from here`, node)];
      const ahead = Math.round((box.clock ?? clock) - clock);
      return [
        boxes.length > 1 &&
          Math.abs(ahead) > APART &&
          finding(
            box.name,
            `its clock is ${Math.abs(ahead)} s ${ahead < 0 ? "behind" : "ahead of"} the others'`,
            "run timedatectl set-ntp true on it",
            [`clock ${box.name}`],
          ),
        endedFinding(box) || serviceFinding(box, cluster),
        box.blocked.length > 0 && finding(box.name, box.blocked.join("; "), box.opens, node),
      ];
    }),
    ...pairs(boxes).map(
      ([a, b]) =>
        a.wireguard?.key &&
        a.wireguard.key === b.wireguard?.key &&
        finding(
          b.name,
          `it has the same WireGuard key as ${a.name}: one was cloned from the other`,
          `on ${b.name}: rm -f /run/flannel/wgkey && ${restart(b, "")}; then restart k3s on the others`,
          [`node ${a.name}`, `node ${b.name}`],
        ),
    ),
  ];
}

/** Days until the first of them ends; infinite without any. */
const daysLeft = ({ now }: BoxReport, list: readonly Certificate[]): number =>
  daysTo(firstOf(list)?.ends ?? Number.POSITIVE_INFINITY, now);

const first = ({ now }: BoxReport, list: readonly Certificate[]): string =>
  ending(firstOf(list)?.ends ?? now, now);

/** Certificates that have ended: nodes refuse each other, whatever else there is. */
const endedFinding = (box: BoxReport): Findings[number] =>
  daysLeft(box, box.certificates) < 0 &&
  finding(
    box.name,
    `its certificates ${first(box, box.certificates)}: k3s renews them when it starts`,
    "make certs",
    [`node ${box.name}`, `certificates ${box.name}`],
    // A clock that is ahead makes all of them look old.
    [`clock ${box.name}`],
  );

/** Certificates that end soon, of boxes, of the cluster, and of the user. */
const certificateFindings = ({ boxes, access }: Cluster): Findings => {
  const server = boxes.find(({ role, error }) => role === "server" && error === undefined);
  const old = server && generationOf(server.node?.version ?? "", "") === "old";
  return [
    ...boxes.flatMap((box): Findings => {
      const own = daysLeft(box, box.certificates);
      return [
        own >= 0 &&
          own <= PRESSING &&
          finding(
            box.name,
            `its certificates ${first(box, box.certificates)}: k3s renews them only when it starts`,
            "make certs",
            [`certificates ${box.name}`],
          ),
        daysLeft(box, box.cas) <= PRESSING &&
          finding(
            box.name,
            `the cluster's CA certificates ${first(box, box.cas)}, and no restart renews them`,
            old
              ? "make upgrade: k3s can rotate its CA from v1.25 on (k3s certificate rotate-ca)"
              : "k3s certificate rotate-ca: https://docs.k3s.io/cli/certificate",
          ),
      ];
    }),
    access &&
      server &&
      daysTo(access.ends, server.now) <= PRESSING &&
      finding(
        "kubeconfig",
        `the certificate of its context ${access.context} ${ending(access.ends, server.now, "s")}`,
        "make kubeconfig",
        [],
        [`certificates ${server.name}`],
      ),
  ];
};

/** The same as notes, while there is time. */
const certificateNotes = (box: BoxReport): (string | false)[] => {
  const later = (list: readonly Certificate[]) =>
    daysLeft(box, list) > PRESSING && daysLeft(box, list) <= DUE;
  const days = renewsFrom(generationOf(box.node?.version ?? "", ""));
  return [
    later(box.certificates) &&
      `its certificates ${first(box, box.certificates)}: any restart of k3s renews them from ${days} days before, and make certs does it one node at a time`,
    later(box.cas) && `the cluster's CA certificates ${first(box, box.cas)}, and no restart renews them`,
  ];
};

/** Peers with a fresh handshake at an address that cannot stay theirs. */
const endpointFindings = (boxes: BoxReport[], nodes: readonly Node[]): Findings =>
  boxes.flatMap((a) =>
    boxes.map((b) => {
      if (a === b || !b.node) return undefined;
      const { wrong } = standing(peerOf(a.peers, b.node.podCidr), b.node, nodes, a.now - FRESH);
      return (
        wrong &&
        finding(
          a.name,
          `its WireGuard has ${b.name} at ${wrong}`,
          `${restart(a)}: flannel then sets its peers again`,
          [tunnel(a.name, b.name)],
          between(a.name, b.name),
        )
      );
    }),
  );

/** Timeouts seen by an overloaded box: the load is the cause, reported once. */
const busyFindings = ({ boxes }: Cluster, broken: Set<string>): Findings =>
  boxes.map((box) => {
    const load = overload(box.load);
    const slow = Object.entries(box.tried.why).filter(([what, how]) => {
      const name = named(boxes, what.split(" ")[1] ?? "");
      return SLOW.test(how) && !broken.has(`kubelet ${name}`) && !broken.has(`node ${name}`);
    }).length;
    const questions = slow === 1 ? "question" : "questions";
    return (
      load &&
      slow > 0 &&
      finding(box.name, `${load}: ${slow} ${questions} did not answer in time`, RELIEVE, [`ease ${box.name}`])
    );
  });

/** A timeout of the API does not mean a closed port. */
const SLOW = /did not answer|time(d )?out|deadline exceeded/i;

/** The command that repairs a box. */
export const makeLine = (box: Pick<BoxReport, "role" | "word">): string =>
  box.role === "server" ? "make server" : `make agent HOST=${box.word}`;

/** Why k3s does not run on the box as a node of this cluster: the first cause that holds. */
function serviceFinding(box: BoxReport, { boxes, nodes }: Cluster): Findings[number] {
  const servers = boxes.filter(({ role }) => role === "server");
  const [server] = servers;
  const { state, runs } = box.unit;
  const { api } = box.tried;
  const unit = unitOf(box.role);
  const again = makeLine(box);
  const healthy = runs !== undefined && box.node?.ready;
  const say = (cause: string, remedy: string, by: string[] = []) =>
    finding(box.name, cause, remedy, [`node ${box.name}`], by);
  const byServer = server && server !== box ? [`node ${server.name}`] : [];
  const other = boxes.find((b) => b !== box && b.ip === box.node?.externalIp);
  const joins = box.url && new URL(box.url).hostname;
  const silent = box.silence && say(box.silence, overload(box.load) ? RELIEVE : again);
  const meaning = meaningOf(box.said, again);
  const causes: Findings = [
    (state === "unknown" || (state === "inactive" && runs === undefined && !box.node)) &&
      say(`k3s does not run on it: ${unit} is not set up or not started`, again),
    other &&
      say(
        `its host name ${box.nodeName} is taken: that node is the box ${other.name} at ${other.ip}`,
        `hostnamectl set-hostname another name on it, then ${again}`,
      ),
    box.role === "agent" &&
      box.ca &&
      server?.ca &&
      box.ca !== server.ca &&
      say(
        `its K3S_TOKEN belongs to another cluster: it names the CA ${box.ca.slice(0, 12)}…, the server has ${server.ca.slice(0, 12)}…`,
        `make server, then ${again}`,
      ),
    // A name may resolve to any of them.
    joins &&
      publicIp(joins) === undefined &&
      server?.ip &&
      !servers.some(({ ip }) => ip === joins) &&
      say(`it joins ${box.url}, not ${server.name} at ${server.ip}`, again),
    api === "dropped" &&
      say(
        "it does not reach the server's 6443/tcp: packets are dropped",
        `open 6443/tcp in the server's security group and firewall for ${box.ip === NAT ? "every address, since that of a box behind a NAT is not fixed" : "this box's address"}`,
        byServer,
      ),
    api &&
      api !== "open" &&
      !healthy &&
      say(`it does not reach the server's 6443/tcp (${api})`, "make server: k3s has to run there", byServer),
    box.node?.args.some((arg) => arg === `--node-ip=${box.ip}` || arg === box.ip) &&
      !box.addresses.includes(box.ip) &&
      say(
        `--node-ip is ${box.ip}, and no interface of the box has it: k3s exits with "host IP unknown"`,
        again,
      ),
    !healthy &&
      meaning &&
      say(
        meaning.cause,
        meaning.remedy,
        meaning.cause.startsWith("its clock")
          ? [`clock ${box.name}`, ...(server ? [`certificates ${server.name}`] : [])]
          : meaning.cause === "it does not reach the server's 6443/tcp"
            ? byServer
            : [],
      ),
    !healthy && runs === undefined && say(`${unit} does not run (systemd: ${state})`, again),
    silent,
    !healthy &&
      (nodes.length === 0
        ? box.role === "server" && say("the API does not answer on it", again)
        : box.node
          ? say(`node ${box.nodeName} is not Ready`, `${again} waits for it and shows the journal`)
          : say(`the cluster has no node ${box.nodeName || "of its name"}`, again)),
  ];
  return causes.find(Boolean);
}

/** Why peers do not send to the box's public address. */
function addressFinding(box: BoxReport, { boxes, nodes }: Cluster): Findings[number] {
  const { node } = box;
  const say = (cause: string, remedy: string) => finding(box.name, cause, remedy, [`node ${box.name}`]);
  // A script that needs no address does not know it.
  if (!node || !box.ip) return;
  if (box.ip === NAT) return homeFinding(box, node, nodes, say);
  if (node.externalIp !== box.ip)
    return say(`its ExternalIP is ${node.externalIp ?? "not set"}, not ${box.ip}`, makeLine(box));
  const outside =
    box.inside &&
    !isInside(node) &&
    finding(
      box.name,
      `its InternalIP is ${node.internalIp ?? "not set"}, not ${tunnelIpOf(node) ?? "an address"} inside the tunnel, as TUNNEL_KUBELETS has it: metrics-server asks its kubelet there`,
      makeLine(box),
      [`kubelet ${box.name}`],
    );
  if (node.publicIp === box.ip) return outside;
  const is = `flannel's address for it is ${node.publicIp ?? "not set"}${node.publicIp && publicIp(node.publicIp) ? ", a private address" : ""}`;
  if (generationOf(node.version, "") === "old")
    return say(
      `${is}: ${node.overwrite === box.ip ? "it was annotated, but k3s was not restarted since" : "it is not annotated with its public address"}`,
      `make annotate HOST=${box.word}`,
    );
  const server = boxes.find(({ role }) => role === "server")?.node;
  return server && !server.args.includes("--flannel-external-ip")
    ? say(
        `${is}: without --flannel-external-ip k3s ${server.version} deletes the annotation public-ip-overwrite at each start`,
        "make server, then systemctl restart k3s-agent on the agents",
      )
    : say(`${is}, not ${box.ip}`, restart(box));
}

/** What keeps others from a node without a public address, as far as the cluster and its units say it. */
function homeFinding(
  box: BoxReport,
  node: Node,
  nodes: readonly Node[],
  say: (cause: string, remedy: string) => Finding,
): Findings[number] {
  if (node.externalIp)
    return say(
      `its node has the public address ${node.externalIp}, which k3s keeps until the node is deleted`,
      `make remove HOST=${box.word.replace(/=.*/, "")}=${node.externalIp}, then ${makeLine(box)}`,
    );
  if (!isHome(node))
    return say(
      `its InternalIP is ${node.internalIp ?? "not set"}, not ${tunnelIpOf(node) ?? "an address"} inside the tunnel: the others do not reach its kubelet`,
      makeLine(box),
    );
  if (nodes.some((one) => tunnelIpOf(one) === node.publicIp))
    return say(
      `flannel's public-ip of it is ${node.publicIp}, inside the tunnel: WireGuard's own packets go round in it, without end`,
      `kubectl annotate node ${node.name} flannel.alpha.coreos.com/public-ip-overwrite-; then ${restart(box)}`,
    );
  return (
    box.error === undefined &&
    box.keepalive !== "active" &&
    finding(
      box.name,
      "k3s-keepalive does not run on it: after a restart of k3s elsewhere, or a new address of its router, it is out of reach for minutes",
      makeLine(box),
    )
  );
}

/** A box's clock, disk, memory and load, and nodes that are no box of the settings. */
function smallFindings({ boxes, nodes }: Cluster): Findings {
  const servers = boxes.filter(({ role }) => role === "server").map(({ name }) => `node ${name}`);
  return [
    ...boxes.flatMap((box): Findings => {
      if (box.error !== undefined) return [];
      const { node, tried, load, wireguard, cniMtu = 0, starts } = box;
      const say = (cause: string, remedy: string, breaks?: string, by?: string[]) =>
        finding(box.name, cause, remedy, breaks ? [`${breaks} ${box.name}`] : [], by);
      // The API's service depends on the server; a box without a healthy k3s has no rules, and its unit restarts.
      const by = [`node ${box.name}`, ...servers];
      const ipvs = box.proxyMode === "ipvs" || node?.args.some((arg) => arg.endsWith("proxy-mode=ipvs"));
      return [
        box.closed.length > 0 && say(box.closed.join("; "), box.opens),
        ipvs &&
          !box.ipvs &&
          say(
            `ipvs is configured, but its kernel ${box.kernel} has no ip_vs: kube-proxy uses iptables`,
            "PROXY_MODE=iptables, or a kernel with ip_vs on it",
          ),
        ...Object.entries(tried.resolvers).map(
          ([ip, answers]) =>
            !answers &&
            say(
              `its DNS upstream ${ip} is a private address that does not answer: where CoreDNS runs there, no pod resolves outside names`,
              `put a resolver that answers into its /etc/resolv.conf, then ${restart(box, "")}`,
            ),
        ),
        tried.service &&
          tried.service !== "open" &&
          say(
            `it does not reach the API's service (${tried.service}): kube-proxy's rules, or 6443 at the server's public address`,
            restart(box),
            "service",
            by,
          ),
        ...(node?.pressure ?? []).map((what) =>
          say(
            `the kubelet reports ${what} (disk ${box.disk ?? "?"} %, memory ${load.memory ?? "?"} % in use)`,
            "make room on it",
            "starts",
          ),
        ),
        // v1.17 always gives pods an MTU of 1500 over 1420, and they cope.
        wireguard?.name === "flannel-wg" &&
          cniMtu > wireguard.mtu &&
          say(
            `its pods at cni0 have an MTU of ${cniMtu}, larger than the ${wireguard.mtu} of flannel-wg: large packets of its pods are lost`,
            `restart the box, which recreates its pods (or: ${restart(box, "")}, and delete its pods)`,
          ),
        loops(box) === "wrong" &&
          say(
            `${unitOf(box.role)} restarts repeatedly (${starts.length} times in ${Math.round(Math.max(...starts))} s)`,
            `${makeLine(box)} shows the journal`,
            "starts again",
            by,
          ),
      ];
    }),
    ...nodes.map(
      (node) =>
        !boxOf(boxes, node) &&
        !node.ready &&
        finding(
          node.name,
          "this node is not Ready, and is in neither SERVER nor AGENTS",
          `add it to AGENTS, or: kubectl delete node ${node.name}`,
          [`node ${node.name}`],
        ),
    ),
  ];
}

/**
 * Does systemd restart k3s repeatedly? A node that is joining may do so for a while, and a k3s that now runs longer than
 * before has recovered.
 */
function loops({ starts, unit: { runs } }: BoxReport): "wrong" | "young" | undefined {
  if (runs === undefined || runs >= 60 || starts.length < 3) return undefined;
  const longest = Math.max(...starts.slice(1).map((ago, i) => (starts[i] as number) - ago));
  return Math.max(...starts) < TURN || runs > longest ? "young" : "wrong";
}

/** Notes: worth a line, but no problem. */
const notesOf = ({ boxes, nodes }: Cluster): string[] =>
  boxes.flatMap((box) => {
    const { latent, opens, starts, unit, now, error, apart } = box;
    const away = (error === undefined ? nodes : []).filter(({ name }) => name !== box.nodeName);
    return [
      latent.length > 0 &&
        `by its rules ${latent.join("; ")}; this passes now, but may not after a restart: ${opens}`,
      loops(box) === "young" &&
        `${unitOf(box.role)} was started ${starts.length} times in ${Math.round(Math.max(...starts))} s, and has run for ${Math.round(unit.runs ?? 0)} s since`,
      box.entry?.devices.every(({ handshake }) => !handshake) &&
        !box.entry.fault &&
        !box.closed.length &&
        `no device has had a handshake with its k3s-devices: is ${box.entry.port}/udp open to all at its vendor?`,
      ...certificateNotes(box),
      ...(box.backups?.notes ?? []),
      box.watch?.note ?? false,
      ...away.map((node) => {
        const { note } = standing(peerOf(box.peers, node.podCidr), node, nodes, now - FRESH);
        return note && `${node.name} sends from ${note}`;
      }),
      ...apart.map(
        (name) =>
          name > box.nodeName &&
          `${name} and it are behind NATs that let nothing in: their pods do not reach each other, and the services of one find no pods on the other`,
      ),
    ].flatMap((note) => (note ? [`${box.name}: ${note}`] : []));
  });

/** The cluster's networks of pods and of services, by what its server got. */
const rangesIn = (boxes: readonly BoxReport[]): string =>
  rangesOf({ SERVER_ARGS: serverNode(boxes)?.args.join(" ") ?? "" }).join(" and ");

const serverNode = (boxes: readonly BoxReport[]) =>
  boxes.find(({ role, node }) => role === "server" && node)?.node;

/** Tunnels between otherwise healthy boxes: packet size, closed ports, stale peers. */
function tunnelFindings(boxes: BoxReport[], broken: Set<string>): Findings {
  const peerAt = (a: BoxReport, b: BoxReport) => peerOf(a.peers, b.node?.podCidr);
  /** Without ping the handshake decides. */
  const reach = (a: BoxReport, b: BoxReport) =>
    a.tried.tunnel[b.nodeName] ?? (a.now - (peerAt(a, b)?.handshake ?? 0) > FRESH ? 0 : undefined);
  const findings: Findings = [sizeFinding(boxes, reach)];
  const lost: [BoxReport, BoxReport][] = [];
  for (const [a, b] of pairs(boxes, true)) {
    if (!b.node?.ready || (isAtHome(a) && isAtHome(b))) continue;
    const [there, back] = [peerAt(a, b), peerAt(b, a)];
    const way = [tunnel(a.name, b.name)];
    if (!there) findings.push(finding(a.name, `its WireGuard has no peer ${b.name}`, restart(a), way));
    else if (b.wireguard?.key && there.key !== b.wireguard.key)
      findings.push(
        reach(a, b) === 0 &&
          finding(a.name, `it has an old WireGuard key of ${b.name}`, restart(b, ` on ${b.name}`), way),
      );
    else if (reach(a, b) === 0 && back?.key === a.wireguard?.key && !broken.has(tunnel(a.name, b.name)))
      lost.push([a, b]);
  }

  /** Did packets that a sent arrive at b's WireGuard in the seconds that both were watched? */
  const arrives = (a: BoxReport, b: BoxReport) => (b.tried.passed[a.wireguard?.key ?? ""]?.received ?? 0) > 0;
  const explained = new Set<BoxReport>();
  for (const b of boxes) {
    if (isAtHome(b)) continue;
    const senders = lost.filter(([a, to]) => to === b && !arrives(a, b)).map(([a]) => a);
    const passes = boxes.some((a) => a !== b && (arrives(a, b) || (reach(b, a) ?? 0) > 0));
    if (senders.length === 0 || passes) continue;
    explained.add(b);
    const seen = b.tried.arrived?.some((ip) => senders.some((a) => a.ip === ip));
    // With only one sender its outgoing packets may be dropped.
    const elsewhere = senders.length === 1 ? ` (or the one of ${senders[0]?.name} drops what goes out)` : "";
    const [where, remedy] = seen
      ? [
          "by its own firewall: its peers' packets reach its network card, not WireGuard",
          "find what drops them there; the rules read here do not: perhaps eBPF, or a vendor's agent",
        ]
      : b.tried.arrived
        ? [
            "before it: its peers' packets do not reach its network card",
            `open 51820/udp in the security group of ${b.name}${elsewhere}`,
          ]
        : [
            "on its side: its peers' packets do not arrive",
            `open 51820/udp in the security group and the firewall of ${b.name}${elsewhere}`,
          ];
    const ways = senders.map((a) => tunnel(a.name, b.name));
    findings.push(finding(b.name, `UDP 51820 is closed ${where}`, remedy, ways));
  }
  for (const home of boxes.filter(isAtHome)) {
    const others = boxes.filter((box) => !isAtHome(box) && !explained.has(box));
    const deaf = others.filter((box) => lost.some((pair) => pair.includes(home) && pair.includes(box)));
    explained.add(home);
    const names = deaf.map(({ name }) => name).join(", ");
    const ways = deaf.map((box) => tunnel(home.name, box.name));
    const ages = deaf.map(({ unit }) => unit.runs ?? Number.POSITIVE_INFINITY);
    if (deaf.length && Math.max(...ages) < AGAIN) {
      const since = `${ages.map(Math.round).join(", ")} s ago`;
      findings.push(
        finding(
          home.name,
          `its WireGuard does not reach ${names} yet: k3s was started there ${since}, and a box without a public address shakes hands again within ${AGAIN} s`,
          "run make check again in half a minute",
          ways,
          [],
          // One that systemd had to start again may not stay.
          deaf.every(({ starts }) => starts.length === 0) ? Object.values(TESTS) : [],
        ),
      );
      continue;
    }
    const open = `open 51820/udp to every address in the security group and firewall of ${names}: that of ${home.name} is not fixed`;
    if (deaf.length > 1 && deaf.length === others.length)
      findings.push(
        finding(
          home.name,
          "its WireGuard reaches no other node: its router or its provider drops UDP to port 51820",
          "allow outgoing UDP in its router; another network, such as a phone's, shows whether it is the provider",
          ways,
        ),
      );
    else if (deaf.length)
      findings.push(
        finding(
          home.name,
          `its WireGuard does not reach ${names}${others.length > 1 ? ", while it reaches others" : ""}`,
          `${open}${others.length > 1 ? "" : "; if it is open, its router or provider drops outgoing UDP"}`,
          ways,
        ),
      );
  }
  for (const [a, b] of pairs(boxes)) {
    const ways = lost.filter(([x, y]) => (x === a && y === b) || (x === b && y === a));
    if (explained.has(a) || explained.has(b) || ways.length === 0) continue;
    const [cause, remedy] = ways.every(([x, y]) => arrives(x, y))
      ? [
          `WireGuard passes between it and ${a.name}, but nothing answers behind it: a firewall on one of them drops what comes out of the tunnel`,
          `trust ${rangesIn(boxes)} in the firewalls of both`,
        ]
      : [
          `it and ${a.name} do not reach each other at ${b.ip} and ${a.ip}, while others do`,
          "within one cloud: does its NAT support hairpin? otherwise open 51820/udp for each other's addresses",
        ];
    findings.push(finding(b.name, cause, remedy, [tunnel(a.name, b.name)]));
  }
  return findings;
}

/**
 * Seconds after a start of k3s within which a node at home shakes hands with it again: the home has to begin, and does so
 * when what it sends every three seconds (keepalive.ts) was not answered for 15 s (WireGuard).
 */
const AGAIN = 30;

const isAtHome = ({ ip, node }: BoxReport): boolean => ip === NAT || (node !== undefined && isHome(node));

/** Tunnels that pass packets, but none of their MTU. */
function sizeFinding(
  boxes: BoxReport[],
  reach: (a: BoxReport, b: BoxReport) => number | undefined,
): Findings[number] {
  const small = pairs(boxes).flatMap(([a, b]) => {
    const least = Math.min(...[reach(a, b), reach(b, a)].flatMap((size) => size || []));
    return least < Math.min(a.wireguard?.mtu ?? 0, b.wireguard?.mtu ?? 0) ? [{ a, b, least }] : [];
  });
  const ends = boxes.filter((box) => small.some(({ a, b }) => a === box || b === box));
  const [first] = ends;
  if (!first?.wireguard) return;
  // If all of them share one end, that box's network is the limit.
  const at = small.length > 1 && boxes.find((box) => small.every(({ a, b }) => a === box || b === box));
  const fits = Math.min(...small.map(({ least }) => least));
  const { name, mtu } = first.wireguard;
  const where = at ? "it and its peers" : ends.map((box) => box.name).join(", ");
  return finding(
    (at || ends.at(-1) || first).name,
    `the MTU ${mtu} of ${name} is too large between ${where}: packets larger than ${fits} are lost`,
    // flannel's wireguard-native uses the interface's MTU minus 80 (v0.28.4); the old backend's script sets none.
    name === "flannel.1"
      ? `ip link set flannel.1 mtu ${fits} on every box, after each start of k3s`
      : `set the network card's MTU to ${fits + 80} on ${at && isAtHome(at) ? "it" : "every box"}, in its network's configuration too; then restart k3s`,
    small.map(({ a, b }) => full(a.name, b.name)),
  );
}

/** Nodes on which no pod starts, in the kubelet's words. */
const startFindings = ({ boxes }: Cluster): Findings =>
  boxes.flatMap(({ tried }) =>
    Object.entries(tried.unstarted).map(([node, said]) => {
      const name = named(boxes, node);
      return finding(
        name,
        `no pod starts on it: ${said}`,
        "fix what the kubelet reports; journalctl -u k3s -u k3s-agent on it shows more",
        [`starts ${name}`],
        [`node ${name}`, `starts ${name}`],
      );
    }),
  );

/** CoreDNS: while it does not run, no pod can resolve names. */
function dnsFindings({ boxes, nodes, system }: Cluster): Findings {
  const dns = system?.filter(({ app }) => app === "kube-dns") ?? [];
  const server = boxes.find(({ role, error }) => role === "server" && error === undefined);
  const [first] = dns;
  if (!first || !server || dns.some(({ ready }) => ready)) return [];
  const where = named(boxes, first.node ?? "");
  const node = nodes.find(({ name }) => name === first.node);
  const [what, seconds] = latest(boxes, server, node, [
    ["CoreDNS was created", ago(server.now, first.created)],
  ]);
  const state = `CoreDNS does not run (${first.reason ?? "not Ready"}): no pod of the cluster resolves a name`;
  const early = seconds < TURN;
  return [
    finding(
      where || server.name,
      early ? `${state} yet; ${what} ${Math.round(seconds)} s ago` : state,
      `kubectl -n kube-system describe pod ${first.name}`,
      ["coredns"],
      where ? [`node ${where}`, `starts ${where}`] : [],
      early ? [TESTS.dns] : [],
    ),
  ];
}

type Event = [what: string, seconds: number];

/** The latest event on which the state of a node depends. */
function latest(boxes: BoxReport[], server: BoxReport, node: Node | undefined, more: Event[]): Event {
  const box = node && boxOf(boxes, node);
  const runs = ({ unit }: BoxReport) => unit.runs ?? Number.POSITIVE_INFINITY;
  const events: Event[] = [
    [`k3s of ${server.name} was started`, runs(server)],
    ...(box ? [[`k3s of ${box.name} was started`, runs(box)] as Event] : []),
    ...(node
      ? ([
          [`${node.name} joined`, ago(server.now, node.created)],
          [`${node.name} became Ready`, ago(server.now, node.readySince)],
        ] as Event[])
      : []),
    ...more,
  ];
  return events.sort((a, b) => a[1] - b[1])[0] as Event;
}

/** Seconds since then; infinite if unknown or in the future (a clock was set back). */
function ago(now: number, then: number): number {
  const seconds = now - then;
  return then && seconds > -APART ? Math.max(0, seconds) : Number.POSITIVE_INFINITY;
}

/** Nodes missing from `kubectl top nodes`: only a note until metrics-server had time. */
function topFindings({ boxes, nodes, system }: Cluster, broken: Set<string>): Findings {
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
      : ["metrics-server was created", ago(server.now, created)],
  );
  const last = (node: Node) => latest(boxes, server, node, began);
  const young = missing.filter((node) => last(node)[1] < TURN);
  const late = missing.filter((node) => !young.includes(node));
  const nothing = (some: Node[]) =>
    `"kubectl top nodes" does not list ${some.map(({ name }) => name).join(", ")}`;
  const home = nodes.find((node) => node.name === pod?.node && isHome(node) && !server.inside);
  const down = pod && !pod.ready ? ` and metrics-server does not run (${pod.reason ?? "not Ready"})` : "";
  const [soonest] = young.map(last).sort((a, b) => a[1] - b[1]);
  return [
    late.length > 0 &&
      finding(
        server.name,
        `${nothing(late)}${down ? `,${down}` : home ? `: metrics-server runs on ${home.name}, and their 10250/tcp is closed to a node without a public address` : ""}`,
        down
          ? `kubectl -n kube-system describe pod ${pod?.name}`
          : home
            ? `TUNNEL_KUBELETS=yes, then make up; or keep it off ${home.name} by a taint (NODE_TAINTS)`
            : "make fix-metrics",
      ),
    soonest &&
      finding(
        server.name,
        `${nothing(young)} yet: ${soonest[0]} ${Math.round(soonest[1])} s ago, and metrics-server may take ${TURN}`,
        "run make check again then",
        [],
        [],
        [TESTS.top],
      ),
  ];
}

/** The tests of `make check`, by what its report calls them. */
export const TESTS = {
  sizes: "full-size packets through the tunnels",
  kubelets: "kubelets at 10250 from the server",
  service: "the API's service from every node",
  top: "nodes in kubectl top",
  pods: "full-size packets from pod to pod",
  podService: "pods to the service of the API",
  dns: "DNS from the pods of every node",
  logs: "kubectl logs",
  exec: "kubectl exec",
};

/** What pods cannot reach although their boxes can. */
function podFindings({ boxes, system }: Cluster): Findings {
  const failed = (of: (tried: BoxReport["tried"]) => Record<string, boolean>) =>
    boxes.flatMap((box) =>
      Object.entries(box.error === undefined ? of(box.tried) : {}).flatMap(([to, fine]) =>
        fine ? [] : [{ box, to, name: named(boxes, to) }],
      ),
    );
  const server = boxes.find(({ role, error }) => role === "server" && error === undefined);
  const dns = system
    ?.filter(({ app, ready }) => app === "kube-dns" && ready)
    .flatMap(({ node }) => node ?? []);
  // Its node is not always known; then any broken tunnel of this box may be the cause.
  const dnsNodes = dns?.length ? dns : boxes.map(({ nodeName }) => nodeName);
  return [
    ...failed(({ pods }) => pods).map(
      ({ box, to, name }) =>
        (box.tried.tunnel[to] ?? 1) > 0 &&
        finding(
          box.name,
          `its pods do not reach the pods of ${to}, although the boxes reach each other`,
          `a firewall on one of them drops what is forwarded: trust ${rangesIn(boxes)} on both`,
          [pods(box.name, name)],
          [...between(box.name, name), full(box.name, name)],
        ),
    ),
    ...failed(({ services }) => services).map(({ box, to }) => {
      const by = [`node ${box.name}`, `service ${box.name}`];
      return to === "DNS"
        ? finding(
            box.name,
            "its pods get no answer from CoreDNS",
            "kubectl -n kube-system get pods -o wide -l k8s-app=kube-dns: does it run, and where?",
            [],
            [...by, "coredns", ...dnsNodes.flatMap((node) => betweenPods(box.name, named(boxes, node)))],
          )
        : finding(
            box.name,
            `its pods do not reach the service ${to}: kube-proxy's rules, or 6443 at the server's public address`,
            restart(box),
            [],
            by,
          );
    }),
    ...(["logs", "exec"] as const).flatMap((what) =>
      failed((tried) => tried[what]).map(({ box, to, name }) => {
        const why = box.tried.why[`${what} ${to}`] ?? "";
        const slow = SLOW.test(why);
        const ports = server?.inside ? "" : "10250/tcp for the server, and ";
        return finding(
          name,
          slow
            ? `kubectl ${what} of it: ${why}`
            : `kubectl ${what} does not work on it${why ? `: ${why}` : ""}`,
          slow
            ? `run make check again; if that stays: open ${ports}6443/tcp on the server for it`
            : `open ${ports}6443/tcp on the server for it; then make agent`,
          [`${what} ${name}`],
          [
            `node ${name}`,
            `kubelet ${name}`,
            `node ${server?.name}`,
            ...(slow ? [`ease ${box.name}`] : []),
            // If logs fail, exec fails for the same reason.
            ...(what === "exec" ? [`logs ${name}`] : []),
          ],
        );
      }),
    ),
  ];
}

/** Entries that are not as their files have them, and networks that collide. A device that is switched off is no fault. */
function entryFindings({ boxes }: Cluster): Findings {
  const args = serverNode(boxes)?.args.join(" ");
  const cluster =
    args === undefined ? [] : eachOf(rangesOf({ SERVER_ARGS: args })).filter((range) => range.includes("."));
  return boxes.flatMap(({ name: box, entry }): Findings => {
    if (!entry) return [];
    const { devices, network, fault, taken } = entry;
    const names = devices.map(({ name }) => name);
    // All entries of the device: those of a run are numbered.
    const make = (device = names[0]) => {
      const via = boxes.filter((one) => one.entry?.devices.some(({ name }) => name === device));
      const list = via.map(({ name }) => name).join(" ");
      return `make device NAME=${device} VIA=${via.length > 1 ? `"${list}"` : list}`;
    };
    // A new key has to go into the configurations of all.
    const all = names.length > 1 ? `${make()}, and so on for ${names.slice(1).join(", ")}` : make();
    const mends = fault?.mends && `${fault.mends} on it`;
    const repair = !mends ? all : names.length ? `${make()}; or ${mends}` : mends;
    const met = network && cluster.find((range) => overlap(network, range));
    const what = met ? `${met}, which the cluster has` : taken && `its own address ${taken}`;
    return [
      fault && finding(box, fault.cause, repair),
      what &&
        finding(
          box,
          `its devices have addresses of ${network}, which collides with ${what}`,
          `take them away (make device NAME=… REMOVE=1 for ${names.join(", ")}), set DEVICE_CIDR to another network, and make them anew`,
        ),
      ...devices.map(({ name, lan }) => {
        const other = lan && [...cluster, ...(network ? [network] : [])].find((range) => overlap(lan, range));
        return (
          other &&
          finding(
            box,
            `the home's network of device ${name}, ${lan}, collides with ${other}, which ${other === network ? "devices have" : "the cluster has"}: from there it is out of reach`,
            `give that LAN another network, then: ${make(name)} LAN=that network`,
          )
        );
      }),
    ];
  });
}

/** Kubelets that the server does not reach. */
function kubeletFindings({ boxes, nodes }: Cluster): Findings {
  const server = boxes.find(({ role }) => role === "server");
  if (!server || server.error !== undefined) return [];
  return nodes.map((node) => {
    const how = server.tried.kubelet[node.name];
    const box = boxOf(boxes, node);
    const name = box?.name ?? node.name;
    return (
      node.ready &&
      how &&
      how !== "open" &&
      finding(
        name,
        `its kubelet cannot be reached at ${kubeletIpOf(node, server.inside)}:10250 (${how}): no metrics of it${generationOf(node.version, "") === "old" ? ", and perhaps no logs and exec" : ""}`,
        how === "refused"
          ? `${box ? makeLine(box) : "restart k3s there"}: nothing listens`
          : server.inside
            ? `a firewall on it drops what comes out of the tunnel: make firewall${box ? ` HOST=${box.word}` : ""}, or trust ${rangesIn(boxes)} there`
            : "open 10250/tcp in its security group and firewall for the nodes' addresses",
        [`kubelet ${name}`],
        [
          `kubelet ${name}`,
          ...(box === server ? [] : [`node ${name}`]),
          ...(box !== server && isInside(node) ? [tunnel(server.name, name)] : []),
        ],
      )
    );
  });
}

const named = (boxes: BoxReport[], nodeName: string): string =>
  boxes.find((box) => nodeName && box.nodeName === nodeName)?.name ?? nodeName;

/** The box of a node, by address, since host names may repeat. */
const boxOf = (boxes: BoxReport[], node: Node) =>
  boxes.find(({ ip }) => ip === node.externalIp) ?? boxes.find(({ nodeName }) => nodeName === node.name);

/** All pairs, and with `both` each in both orders. */
const pairs = <T>(list: T[], both = false): [T, T][] =>
  list.flatMap((a, i) => (both ? list.filter((b) => b !== a) : list.slice(i + 1)).map((b): [T, T] => [a, b]));

/** The median, of an even number the lower one. */
export function median(numbers: number[]): number {
  return [...numbers].sort((a, b) => a - b)[Math.floor((numbers.length - 1) / 2)] ?? 0;
}

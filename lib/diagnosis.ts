/** From what the boxes of a cluster said to what is wrong and what to do: pure. */
import type { Cluster, Seen } from "./cluster.ts";
import { type Ill, meaningOf } from "./journal.ts";
import { generationOf, unitOf } from "./k3s.ts";
import { FRESH, type Node, peerOf } from "./kube.ts";
import { publicIp } from "./settings.ts";

/** Clocks may differ so much, in seconds: NTP keeps them within one. */
const APART = 5;

/** What is wrong, the ground before what follows from it; nothing for a healthy cluster. */
export function diagnose(cluster: Cluster): Ill[] {
  const { boxes } = cluster;
  const blamed = new Set<string>();
  const ills: Ill[] = [];
  const say = (box: string, cause: string, remedy: string) => void ills.push({ box, cause, remedy });
  /** Said of a box that so cannot be reached through the tunnel: its packets need no reason of their own. */
  const blame = (box: Seen, cause: string, remedy: string) => {
    blamed.add(box.name);
    say(box.name, cause, remedy);
  };

  const clock = median(boxes.flatMap((box) => box.clock ?? []));
  for (const box of boxes) {
    if (box.error !== undefined) {
      blame(box, box.error, `see that "ssh ${box.host}" works from here`);
      continue;
    }
    const ahead = Math.round((box.clock ?? clock) - clock);
    if (boxes.length > 1 && Math.abs(ahead) > APART)
      say(
        box.name,
        `its clock is ${Math.abs(ahead)} s ${ahead < 0 ? "behind" : "ahead of"} the others'`,
        "timedatectl set-ntp true on it",
      );
    const ill = serviceIll(box, cluster);
    if (ill) blame(box, ...ill);
    if (box.blocked.length) blame(box, box.blocked.join("; "), `make firewall HOST=${box.word}`);
  }
  for (const [a, b] of pairs(boxes))
    if (a.wireguard?.key && a.wireguard.key === b.wireguard?.key) {
      blamed.add(a.name).add(b.name);
      say(
        b.name,
        `it has the same WireGuard key as ${a.name}: one was cloned from the other`,
        `on ${b.name}: rm -f /run/flannel/wgkey && systemctl restart ${unitOf(b.role)}; then restart k3s on the others`,
      );
    }
  for (const box of boxes) {
    if (blamed.has(box.name) || !box.node) continue;
    const ill = addressIll(box, box.node, cluster);
    if (ill) blame(box, ...ill);
  }
  for (const box of boxes) for (const [cause, remedy] of smallIlls(box)) say(box.name, cause, remedy);
  for (const node of cluster.nodes)
    if (!boxOf(boxes, node) && !node.ready)
      say(
        node.name,
        "this node is not Ready, and is in neither SERVER nor AGENTS",
        `add it to AGENTS, or: kubectl delete node ${node.name}`,
      );

  const sound = boxes.filter((box) => box.error === undefined && !blamed.has(box.name) && box.wireguard);
  ills.push(...tunnelIlls(sound), ...serverIlls(cluster, blamed), ...podIlls(boxes, blamed));
  return ills;
}

/** The line that brings a box to what it should be. */
export const makeLine = (box: Pick<Seen, "role" | "word">): string =>
  box.role === "server" ? "make server" : `make agent HOST=${box.word}`;

type Line = [cause: string, remedy: string];

/** Why k3s does not run on the box as a node of this cluster. */
function serviceIll(box: Seen, { boxes, nodes }: Cluster): Line | undefined {
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
      `its K3S_TOKEN is of another cluster: it names the CA ${box.ca.slice(0, 12)}…, the server has ${server.ca.slice(0, 12)}…`,
      `make server, then ${again}`,
    ];
  const servers = boxes.filter(({ role }) => role === "server");
  const joins = box.url && new URL(box.url).hostname;
  // A name may lead to any of them.
  if (joins && publicIp(joins) === undefined && server && !servers.some(({ ip }) => ip === joins))
    return [`it joins ${box.url}, not ${server.name} at ${server.ip}`, again];
  if (box.tried.api === "dropped")
    return [
      "it does not reach the server's 6443/tcp: packets are dropped",
      "open 6443/tcp in the server's security group and firewall for this box's address",
    ];
  if (box.tried.api && box.tried.api !== "open" && !well)
    return [
      `it does not reach the server's 6443/tcp (${box.tried.api})`,
      "make server: k3s has to run there",
    ];
  const absent =
    box.node?.args.some((arg) => arg === `--node-ip=${box.ip}` || arg === box.ip) &&
    !box.addresses.includes(box.ip);
  if (absent)
    return [
      `--node-ip is ${box.ip}, and no interface of the box has it: k3s dies with "host IP unknown"`,
      again,
    ];
  if (well) return undefined;
  const meaning = meaningOf(box.said, again);
  if (meaning) return [meaning.cause, meaning.remedy];
  if (box.unit.runs === undefined) return [`${unit} does not run (systemd: ${box.unit.state})`, again];
  if (nodes.length === 0 && box.role === "server") return ["the API does not answer on it", again];
  if (nodes.length === 0) return undefined;
  return box.node
    ? [`node ${box.nodeName} is not Ready`, `${again} waits for it and shows the journal`]
    : [`the cluster has no node ${box.nodeName || "of its name"}`, again];
}

/** Why its peers do not send to the box's public address. */
function addressIll(box: Seen, node: Node, { boxes }: Cluster): Line | undefined {
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

/** What a box has beside its place in the cluster. */
function smallIlls(box: Seen): Line[] {
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
    ]);
  for (const what of box.node?.pressure ?? [])
    lines.push([
      `the kubelet reports ${what} (disk ${box.disk ?? "?"} %, memory ${box.memory ?? "?"} % in use)`,
      "make room on it",
    ]);
  const { runs, restarts } = box.unit;
  if (runs !== undefined && runs < 60 && (restarts ?? 0) >= 3)
    lines.push([
      `${unitOf(box.role)} starts again and again (${restarts} restarts)`,
      `${makeLine(box)} shows the journal`,
    ]);
  return lines;
}

/** Tunnels of boxes that have nothing else: too large packets, closed ports, stale peers. */
function tunnelIlls(boxes: Seen[]): Ill[] {
  const ills: Ill[] = [];
  const peerAt = (a: Seen, b: Seen) => peerOf(a.peers, b.node?.podCidr);
  /** Where nothing could be sent for want of ping, the handshake tells. */
  const reach = (a: Seen, b: Seen) =>
    a.tried.tunnel[b.nodeName] ?? (a.now - (peerAt(a, b)?.handshake ?? 0) > FRESH ? 0 : undefined);
  const lost: [Seen, Seen][] = [];

  const small = pairs(boxes).flatMap(([a, b]) => {
    const sizes = [reach(a, b), reach(b, a)].filter((size) => size !== undefined && size > 0) as number[];
    const least = Math.min(...sizes);
    return least < Math.min(a.wireguard?.mtu ?? 0, b.wireguard?.mtu ?? 0) ? [{ a, b, least }] : [];
  });
  // Where one box is at an end of all of them, its network is the narrow one.
  const at =
    small.length > 1 ? boxes.find((box) => small.every(({ a, b }) => a === box || b === box)) : undefined;
  const ends = boxes.filter((box) => small.some(({ a, b }) => a === box || b === box));
  const fits = Math.min(...small.map(({ least }) => least));
  const [first] = ends;
  if (first?.wireguard) {
    const { name, mtu } = first.wireguard;
    const where = at ? "it and its peers" : ends.map((box) => box.name).join(", ");
    ills.push({
      box: (at ?? ends.at(-1) ?? first).name,
      cause: `the MTU ${mtu} of ${name} is too large between ${where}: larger packets than ${fits} are lost`,
      // flannel's wireguard-native takes the card's MTU less 80 (v0.28.4); the old backend's script sets none.
      remedy:
        name === "flannel.1"
          ? `ip link set flannel.1 mtu ${fits} on every box, after each start of k3s`
          : `set the network card's MTU to ${fits + 80} on every box, in its network's configuration too; then restart k3s`,
    });
  }

  for (const a of boxes)
    for (const b of boxes) {
      if (a === b || !b.node?.ready) continue;
      const [there, back] = [peerAt(a, b), peerAt(b, a)];
      if (!there || (b.wireguard?.key && there.key !== b.wireguard.key)) {
        if (reach(a, b) === 0 || !there)
          ills.push({
            box: a.name,
            cause: there ? `it has an old WireGuard key of ${b.name}` : `its WireGuard has no peer ${b.name}`,
            remedy: `systemctl restart ${there ? `${unitOf(b.role)} on ${b.name}` : `${unitOf(a.role)} on it`}`,
          });
      } else if (reach(a, b) === 0 && back?.key === a.wireguard?.key) lost.push([a, b]);
    }

  /** Did packets that a sent arrive at b's WireGuard in the seconds that both were watched? */
  const arrives = (a: Seen, b: Seen) => (b.tried.passed[a.wireguard?.key ?? ""]?.received ?? 0) > 0;
  const dropped = lost.filter(([a, b]) => !arrives(a, b));
  const explained = new Set<Seen>();
  for (const b of boxes) {
    const senders = dropped.filter(([, to]) => to === b).map(([from]) => from);
    const others = boxes.filter((a) => a !== b && arrives(a, b));
    const open = boxes.some((a) => a !== b && (reach(b, a) ?? 0) > 0);
    if (senders.length === 0 || others.length || open) continue;
    const seen = b.tried.arrived?.some((ip) => senders.some((a) => a.ip === ip));
    // With one sender only, its own outgoing packets may be what is dropped.
    const elsewhere = senders.length === 1 ? ` (or the one of ${senders[0]?.name} drops what goes out)` : "";
    explained.add(b);
    ills.push({
      box: b.name,
      ...(seen
        ? {
            cause:
              "UDP 51820 is closed by its own firewall: its peers' packets reach its network card, not WireGuard",
            remedy:
              "make firewall, or allow 51820/udp on it (ufw allow 51820/udp; firewall-cmd --permanent --add-port=51820/udp)",
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
    ills.push({
      box: b.name,
      ...(deaf
        ? {
            cause: `WireGuard passes between it and ${a.name}, but nothing answers behind it: a firewall on one of them drops what comes out of the tunnel`,
            remedy: "trust 10.42.0.0/16 and 10.43.0.0/16 in the firewalls of both",
          }
        : {
            cause: `it and ${a.name} do not reach each other at ${b.ip} and ${a.ip}, while others do`,
            remedy:
              "in one cloud: does its NAT lead public addresses back inside (hairpin)? else open 51820/udp for each other's addresses",
          }),
    });
  }
  return ills;
}

/** What pods do not reach, where the boxes themselves do: each kind once, with the boxes it concerns. */
function podIlls(boxes: Seen[], blamed: Set<string>): Ill[] {
  const sound = boxes.filter((box) => box.error === undefined && !blamed.has(box.name));
  const failed = (of: (box: Seen) => Record<string, boolean>) =>
    sound.flatMap((box) => Object.entries(of(box)).flatMap(([to, fine]) => (fine ? [] : [{ box, to }])));
  const ills: Ill[] = [];
  for (const { box, to } of failed(({ tried }) => tried.pods))
    if ((box.tried.tunnel[to] ?? 1) > 0)
      ills.push({
        box: box.name,
        cause: `its pods do not reach the pods of ${to}, although the boxes reach each other`,
        remedy:
          "a firewall on one of them drops what is forwarded: trust 10.42.0.0/16 and 10.43.0.0/16 on both",
      });
  for (const { box, to } of failed(({ tried }) => tried.services))
    ills.push({
      box: box.name,
      ...(to === "DNS"
        ? {
            cause: "its pods get no answer of CoreDNS",
            remedy: "kubectl -n kube-system get pods -o wide -l k8s-app=kube-dns: does it run, and where?",
          }
        : {
            cause: `its pods do not reach the service ${to}: kube-proxy's rules, or 6443 at the server's public address`,
            remedy: `systemctl restart ${unitOf(box.role)} on it`,
          }),
    });
  for (const what of ["logs", "exec"] as const)
    for (const { to } of failed(({ tried }) => tried[what]))
      ills.push({
        box: sound.find(({ nodeName }) => nodeName === to)?.name ?? to,
        cause: `kubectl ${what} does not work on it`,
        remedy: "open 10250/tcp for the server, and 6443/tcp on the server for it; then make agent",
      });
  return ills;
}

/** What the server does not reach: kubelets, metrics. */
function serverIlls({ boxes, nodes }: Cluster, blamed: Set<string>): Ill[] {
  const server = boxes.find(({ role }) => role === "server");
  if (!server || server.error !== undefined) return [];
  const ills: Ill[] = [];
  const closed = new Set<string>();
  for (const node of nodes.filter(({ ready }) => ready)) {
    const how = server.tried.kubelet[node.name];
    const box = boxOf(boxes, node);
    if (box && blamed.has(box.name) && box !== server) closed.add(node.name);
    else if (how && how !== "open") {
      closed.add(node.name);
      ills.push({
        box: box?.name ?? node.name,
        cause: `its kubelet cannot be reached at ${node.externalIp}:10250 (${how}): no logs, exec and metrics`,
        remedy:
          how === "refused"
            ? `${box ? makeLine(box) : "restart k3s there"}: nothing listens`
            : "open 10250/tcp in its security group and firewall for the nodes' addresses",
      });
    }
  }
  const { top } = server.tried;
  const without = nodes.filter(({ name, ready }) => ready && !closed.has(name) && !top.includes(name));
  if (server.metrics && !blamed.has(server.name) && without.length && ills.length === 0)
    ills.push({
      box: server.name,
      cause: `"kubectl top nodes" has nothing of ${without.map(({ name }) => name).join(", ")}`,
      remedy: "make fix-metrics",
    });
  return ills;
}

/** The box on which a node runs: of its address, for a host name may be another's. */
const boxOf = (boxes: Seen[], node: Node) =>
  boxes.find(({ ip }) => ip === node.externalIp) ?? boxes.find(({ nodeName }) => nodeName === node.name);

function pairs<T>(list: T[]): [T, T][] {
  return list.flatMap((a, i) => list.slice(i + 1).map((b): [T, T] => [a, b]));
}

function median(numbers: number[]): number {
  return [...numbers].sort((a, b) => a - b)[Math.floor((numbers.length - 1) / 2)] ?? 0;
}

/**
 * Surveys the cluster from all boxes in parallel: a first trip collects facts, a second one tests the paths between
 * boxes. Changes nothing.
 */

import { boxes } from "../boxes.ts";
import { look } from "../converge.ts";
import { rangesOf } from "../k3s/config.ts";
import { blocked, firewallLook, type RuleFact, remedy } from "../k3s/firewall.ts";
import { nodeNameOf } from "../k3s/identity.ts";
import { MEANT } from "../k3s/journal.ts";
import {
  API,
  address as addressIn,
  apiMessage,
  FRESH,
  itemsOf,
  type Load,
  loadLook,
  loadOf,
  type Node,
  nodesLook,
  nodesOf,
  type Peer,
  peerOf,
  peersLook,
  peersOf,
  type SystemPod,
  silence,
  systemLook,
  systemOf,
} from "../k3s/nodes.ts";
import { nameLook, type Role, unitOf } from "../k3s/unit.ts";
import { silent } from "../report.ts";
import type { Box, Call } from "../script.ts";
import type { Settings } from "../settings.ts";
import { raw, sh } from "../sh.ts";
import { type Facts, type Look, type Printed, prints, type Step } from "../step.ts";
import { publicIp } from "../table.ts";
import { pairs, splitWords } from "../text.ts";
import { caSed } from "../token.ts";

/** A box of the cluster and its answers. */
export interface Member<F extends string = never> {
  box: Box;
  role: Role;
  /** Why it could not be looked at. */
  error?: string;
  facts: Facts<BoxFact | F>;
  /** Clock offset in seconds (box minus here), too low by one network delay. */
  clock?: number;
  /** The second trip: what it reaches. */
  tried: Facts<TriedFact>;
  /** The third trip, with check's own pods: what they reach. */
  paths?: Facts<TriedFact>;
}

/** A step that only looks: no plan. */
export const ask = <F extends string = never>(looks: Look<F>[], options: Step["options"] = []): Step<F> => ({
  name: "check",
  options,
  look: () => looks,
  plan: () => [],
});

const boxLook = prints("named units wg peers cni disk load starts ipvs resolvers said")(sh`
${raw(nameLook)}
printf '%s say %s\n' "$m" "$(date +%s.%N)"
fact units; systemctl show k3s k3s-agent -p Id -p ActiveState -p NRestarts -p MainPID -p ExecMainStartTimestampMonotonic
fact wg; for i in flannel.1 flannel-wg; do
  [ ! -d /sys/class/net/$i ] || echo "$i $(cat /sys/class/net/$i/mtu) $(wg show $i public-key 2>/dev/null)"
done
${raw(peersLook)}
# A bridge without a port has the kernel's 1500 whatever it was made with (v1.36.3, seen).
fact cni; cat /sys/class/net/cni0/brif/*/../mtu 2>/dev/null | sort -n | tail -n 1
fact disk; df -Pk /var/lib/rancher 2>/dev/null || df -Pk /
${raw(loadLook)}
# systemd's own lines: of 219 "holdoff time over, scheduling restart", later "Scheduled restart job".
fact starts; journalctl _PID=1 UNIT=k3s.service UNIT=k3s-agent.service -o short-unix --no-pager --since -600s 2>/dev/null |
  grep -iE 'scheduled restart job|scheduling restart' | cut -d. -f1 | tail -n 30
fact ipvs; { test -d /sys/module/ip_vs || modprobe -n -q ip_vs 2>/dev/null; } && echo yes
# As k3s picks it (pkg/agent/config): a resolver that is not the host's own, else 8.8.8.8.
fact resolvers; for f in /etc/resolv.conf /run/systemd/resolve/resolv.conf; do
  list=$(sed -n 's/^nameserver[[:space:]]*//p' $f 2>/dev/null)
  case $list in ''|127.*|*'
127.'*|169.254.*) ;; *) echo "$list"; break ;; esac
done
fact said; journalctl -u k3s -u k3s-agent -o cat --no-pager --since -60s -n 5000 2>/dev/null |
  grep -E ${MEANT} | sed -E 's/^time="[^"]*" //' | tac | awk '!seen[$0]++' | cut -c1-400 | head -n 5 | tac
`);

export const LOOKS = {
  server: prints(
    "named units wg peers cni disk load starts ipvs resolvers said metrics ca nodes api system",
  )(`${boxLook}
fact metrics; ls -d /var/lib/rancher/k3s/server/manifests/metrics-server* 2>/dev/null
fact ca; sha256sum </var/lib/rancher/k3s/server/tls/server-ca.crt 2>/dev/null
${nodesLook}
${systemLook}`),
  // Only the token's CA hash, which is not secret.
  agent: prints("named units wg peers cni disk load starts ipvs resolvers said joins")(`${boxLook}
fact joins; sed -n 's/^K3S_URL=//p; ${caSed("K3S_TOKEN=")}' /etc/systemd/system/k3s-agent.service.env 2>/dev/null`),
};

type BoxFact = Printed<(typeof LOOKS)[Role]> | RuleFact;
type TriedFact = Printed<ReturnType<typeof tries>> | "paths" | "kubelets" | "unstarted";

/** Time limit for a box's facts, in seconds; ssh itself gives up on a dead box after 15. */
export const PATIENCE = 40;

/** The same for a number of tests that run a few at a time. */
export const patience = (ways: number): number => PATIENCE + ways;

/** Parallel pings and connections on a box: a hundred at once take 100 MB of memory. */
const FEW = 8;

/** Runs lines of shell in parallel, a limited number at a time. */
export const few = (lines: readonly string[], many = FEW): string =>
  lines.map((line, i) => `  ${line} &\n${(i + 1) % many && i + 1 < lines.length ? "" : "  wait\n"}`).join("");

/** Boxes, and what is to run on each. */
export type Listed = { box: Box; role: Role }[];

/** Looks at all boxes in parallel, also at `more`. A box that cannot be reached carries its error. */
export async function survey<F extends string = never>(
  listed: Listed,
  ...more: Look<F>[]
): Promise<Member<F>[]> {
  return await Promise.all(
    listed.map(async ({ box, role }) => {
      const member: Member<F> = { box, role, facts: {}, tried: {} };
      const says = (text: string) => {
        member.clock ??= Number(text) - Date.now() / 1000;
      };
      try {
        member.facts = await look(
          { ...box, line: { ...silent, says } },
          [ask<BoxFact | F>([LOOKS[role], ...more])],
          PATIENCE,
        );
      } catch (error) {
        member.error = (error as Error).message;
      }
      return member;
    }),
  );
}

/** A box's report, as shown and judged; unknown values are undefined. */
export interface BoxReport {
  name: string;
  host: string;
  word: string;
  ip: string;
  role: Role;
  error: string | undefined;
  /** The name of the box's node; and the cluster's node of that name, if any. */
  nodeName: string;
  node: Node | undefined;
  kernel: string | undefined;
  /** systemd's ActiveState of the role's unit, restarts since boot (unknown to systemd 219), and uptime in seconds. */
  unit: { state: string; restarts: number | undefined; runs: number | undefined };
  /** Clock offset in seconds, box minus here. */
  clock: number | undefined;
  /** Restarts of k3s by systemd in the last ten minutes: seconds ago, oldest first. */
  starts: number[];
  /** Percent in use. */
  disk: number | undefined;
  load: Load;
  /** On a server: why the API gave no list of nodes. */
  silence: string | undefined;
  /** The interface of flannel's WireGuard, its own address, MTU and public key. */
  wireguard: { name: string; mtu: number; key: string; address: string | undefined } | undefined;
  /** The largest MTU of the pods' ports on the bridge; undefined without a pod. */
  cniMtu: number | undefined;
  peers: Peer[];
  addresses: string[];
  /** kube-proxy's mode by the settings. */
  proxyMode: string;
  /** The kernel has ip_vs. */
  ipvs: boolean;
  /** Upstream DNS servers for pods. */
  resolvers: string[];
  /** sha256 of the cluster's CA: the server's own, or the one in the agent's token. */
  ca: string | undefined;
  /** The server that the agent joins. */
  url: string | undefined;
  /** Known messages in the journal's last minute. */
  said: string;
  /**
   * What its firewall drops of the cluster's traffic, one sentence each; and what its rules drop although it passes
   * now.
   */
  blocked: string[];
  latent: string[];
  /** The remedy for both. */
  opens: string;
  /** metrics-server is deployed: k3s's own, or fix-metrics'. */
  metrics: boolean;
  now: number;
  tried: Tried;
}

/** What was tested from a box, by the name of the other end. */
export interface Tried {
  /** The largest packet that passes the tunnel, in bytes; 0: none. */
  tunnel: Record<string, number>;
  /** TCP: open, refused, dropped, or another word. */
  kubelet: Record<string, string>;
  api: string | undefined;
  /** The API's service, by kube-proxy's rules. */
  service: string | undefined;
  /** Nodes in `kubectl top nodes`; or the API's error. */
  top: string[];
  topless: string | undefined;
  /** By the resolver's address. */
  resolvers: Record<string, boolean>;
  /** While packets were lost: bytes received and sent within some seconds, by the peer's public key. */
  passed: Record<string, { received: number; sent: number }>;
  /** Senders of UDP 51820 seen at the network interface in those seconds; undefined: no tool to watch. */
  arrived: string[] | undefined;
  /** By node: did a packet pass from this box's pod to that node's? */
  pods: Record<string, boolean>;
  /** From this box's pod. */
  services: Record<string, boolean>;
  /** From the server, by node. */
  logs: Record<string, boolean>;
  exec: Record<string, boolean>;
  /** The API's error, by `logs NODE` or `exec NODE`. */
  why: Record<string, string>;
  /** Nodes on which check's own pod did not start, with the kubelet's reason. */
  unstarted: Record<string, string>;
  /** Tools that the box lacks. */
  missing: string[];
}

/** The cluster: the boxes of the settings, and all nodes that the API knows. */
export interface Cluster {
  boxes: BoxReport[];
  nodes: Node[];
  /** CoreDNS and metrics-server, where the API said. */
  system?: SystemPod[] | undefined;
}

/** Combines the boxes' answers. */
export function clusterOf(members: readonly Member[]): Cluster {
  // Servers share one datastore: the first that answers is enough.
  const lists = members.filter(({ role }) => role === "server").map(({ facts }) => nodesOf(facts.nodes));
  const nodes = lists.find((list) => list.length) ?? [];
  const system = members.flatMap(({ facts }) => systemOf(facts.system) ?? []);
  const boxes = members.map((member) => seen(member, nodes));
  return {
    boxes: boxes.map((box, i) => ({ ...box, ...firewallOf(box, members[i] as Member, boxes, nodes) })),
    nodes,
    system: members.some(({ facts }) => systemOf(facts.system)) ? system : undefined,
  };
}

/** A box's own report; its firewall is judged together with the others. */
type Alone = Omit<BoxReport, "blocked" | "latent" | "opens">;

/**
 * What has passed is not reported as blocked: a rule may be misunderstood here, or the connection is older than the
 * rules.
 */
function firewallOf(
  box: Alone,
  { facts, box: { want } }: Member,
  boxes: readonly Alone[],
  nodes: readonly Node[],
) {
  const passes = (node: Node) => {
    const other = boxes.find(({ nodeName }) => nodeName === node.name);
    const handshake = peerOf(box.peers, node.podCidr)?.handshake ?? 0;
    const size = box.tried.tunnel[node.name] ?? other?.tried.tunnel[box.nodeName];
    return (
      (size === undefined ? box.now - handshake < FRESH : size > 0) &&
      (other?.role !== "server" || [undefined, "open"].includes(other.tried.kubelet[box.nodeName])) &&
      (box.role !== "server" || [undefined, "open"].includes(other?.tried.api))
    );
  };
  const others = nodes.filter(({ externalIp }) => externalIp && externalIp !== box.ip);
  const pods = Object.values({ ...box.tried.pods, ...box.tried.services });
  const said = (some: Node[], ranges: boolean) =>
    blocked(facts, some.map(({ externalIp }) => externalIp as string).sort(), ranges ? rangesOf(want) : []);
  const lost = others.filter((node) => !passes(node));
  const now = said(lost, lost.length > 0 || !pods.every(Boolean));
  const latent = now.length ? [] : said(others, true);
  const every = others.map(({ externalIp }) => externalIp as string);
  const opens =
    now.length + latent.length ? remedy(facts, [...every, box.ip].sort(), rangesOf(want), box.word) : "";
  return { blocked: now, latent, opens };
}

function seen({ box, role, error, facts, clock, tried, paths }: Member, nodes: Node[]): Alone {
  const there = nodes.find(({ externalIp }) => externalIp === box.ip);
  // A box that does not answer is found by its address only.
  const name = nameOf(role, { ...box.want, PUBLIC_IP: box.ip }, facts, nodes) || (there?.name ?? "");
  const unit = (facts.units ?? "")
    .split(/\n\n+/)
    .map(pairs)
    .find(({ Id }) => Id === `${unitOf(role)}.service`);
  const started = Number(unit?.MainPID) ? Number(unit?.ExecMainStartTimestampMonotonic) / 1e6 : 0;
  const [, wg, mtu, key] =
    [...(facts.wg ?? "").matchAll(/^(flannel\.1|flannel-wg) (\d{3,5}) ?([\w+/=]*)$/gm)].at(-1) ?? [];
  const joins = (facts.joins ?? "").trim().split("\n");
  const addresses = (facts.addresses ?? "").split("\n").map((row) => row.split(/\s+/));
  return {
    name: box.name,
    host: box.host,
    word: box.word,
    ip: box.ip,
    role,
    error,
    nodeName: name,
    node: nodes.find((node) => node.name === name),
    kernel: facts.kernel?.trim(),
    unit: {
      state: unit?.ActiveState ?? "unknown",
      restarts: unit?.NRestarts === undefined ? undefined : Number(unit.NRestarts),
      runs: started ? Number(facts.uptime) - started : undefined,
    },
    clock,
    disk: numberOf(/(\d+)%/.exec(facts.disk ?? "")?.[1]),
    load: loadOf(facts),
    silence: role === "server" ? silence(facts) : undefined,
    starts: (facts.starts ?? "")
      .split("\n")
      .filter((row) => /^\d+$/.test(row))
      .map((row) => Math.max(0, Number(facts.now) - Number(row))),
    wireguard: wg
      ? {
          name: wg,
          mtu: Number(mtu),
          key: key ?? "",
          address: addressIn(addresses.find(([, device]) => device === wg)?.[3]?.split("/")[0]),
        }
      : undefined,
    cniMtu: numberOf(facts.cni?.trim()),
    peers: peersOf(facts.peers).filter((peer) => peer.interface === wg),
    addresses: addresses.flatMap(([, , , address]) => address?.split("/")[0] ?? []),
    proxyMode: box.want.PROXY_MODE,
    ipvs: Boolean(facts.ipvs?.trim()),
    resolvers: splitWords((facts.resolvers ?? "").replaceAll("\n", " ")),
    ca:
      role === "server" ? facts.ca?.split(" ")[0]?.trim() : joins.find((word) => /^[0-9a-f]{64}$/.test(word)),
    url: joins.find((word) => word.startsWith("http") && URL.canParse(word)),
    said: facts.said?.trim() ?? "",
    metrics: Boolean(facts.metrics?.trim()),
    now: Number(facts.now),
    tried: triedOf({ ...tried, ...paths }),
  };
}

const numberOf = (text: string | undefined) => (text ? Number(text) : undefined);

function nameOf(role: Role, want: Settings, facts: Facts<"nodes">, nodes: readonly Node[]): string {
  try {
    return nodeNameOf(role, want, facts, nodes);
  } catch {
    return "";
  }
}

function triedOf(facts: Facts<TriedFact>): Tried {
  const tried: Tried = {
    tunnel: {},
    kubelet: {},
    api: undefined,
    service: undefined,
    top: itemsOf<{ metadata?: { name?: string } }>(facts.top).flatMap(({ metadata }) => metadata?.name ?? []),
    topless: facts.topless?.trim() ? apiMessage(facts.topless.trim()) : undefined,
    resolvers: {},
    passed: {},
    arrived: undefined,
    pods: {},
    services: {},
    logs: {},
    exec: {},
    why: {},
    unstarted: {},
    missing: [],
  };
  for (const row of `${facts.tries ?? ""}\n${facts.paths ?? ""}\n${facts.kubelets ?? ""}\n${facts.unstarted ?? ""}`.split(
    "\n",
  )) {
    const [what, name = "", ...rest] = row.split(" ");
    const how = rest.join(" ");
    if (what === "tunnel") tried.tunnel[name] = Number(how);
    else if (what === "kubelet") tried.kubelet[name] = how;
    else if (what === "api") tried.api = how;
    else if (what === "proxied") tried.service = how;
    else if (what === "resolver") tried.resolvers[name] = how === "yes";
    else if (what === "pod") tried.pods[name] = how === "yes";
    else if (what === "service") tried.services[name] = how === "yes";
    else if (what === "unstarted") tried.unstarted[name] = how;
    else if (what === "logs" || what === "exec") {
      tried[what][name] = how === "yes";
      if (how !== "yes") tried.why[`${what} ${name}`] = apiMessage(how.replace(/^no ?/, ""));
    } else if (what === "without") tried.missing.push(name);
  }
  const bytes = (text = "") =>
    new Map(text.split("\n").map((row) => [row.split("\t")[0], row.split("\t").slice(1).map(Number)]));
  const [before, after] = [bytes(facts.before), bytes(facts.after)];
  for (const [key, [received = 0, sent = 0]] of after) {
    const [r = 0, s = 0] = before.get(key) ?? [];
    if (key) tried.passed[key] = { received: received - r, sent: sent - s };
  }
  const arrived = facts.arrived?.trim().split("\n").filter(Boolean);
  if (arrived && !arrived.includes("?")) tried.arrived = arrived;
  return tried;
}

/** The boxes of the settings. @throws {SettingError} */
export async function listed(call: Call): Promise<Listed> {
  const servers = await boxes(call, "SERVER");
  const agents = await boxes(call, "AGENTS");
  return [
    ...servers.map((box) => ({ box, role: "server" as const })),
    ...agents.map((box) => ({ box, role: "agent" as const })),
  ];
}

/** Surveys all boxes: one trip for facts, one for the paths between them. */
export async function surveyAndTry(boxes: Listed) {
  const members = await survey(boxes, firewallLook);
  await tryPaths(members, clusterOf(members));
  return members;
}

/** The second trip, all boxes side by side: packets through every tunnel, kubelets, the API, resolvers. */
async function tryPaths(members: readonly Member[], cluster: Cluster): Promise<void> {
  await Promise.all(
    members.map(async (member) => {
      const box = cluster.boxes.find(({ name }) => name === member.box.name) as BoxReport;
      if (member.error) return;
      try {
        member.tried = await look(member.box, [ask([tries(box, cluster)])], patience(cluster.nodes.length));
      } catch (error) {
        member.error = (error as Error).message;
      }
    }),
  );
}

/** The other nodes by the address of their tunnel interface: flannel uses the first of the node's pod network. */
function tunnels(box: BoxReport, { boxes, nodes }: Cluster): [string, string][] {
  const names = new Map<string, string>();
  for (const { name, podCidr } of nodes)
    if (name !== box.nodeName && podCidr) names.set(name, podCidr.replace(/\/.*/, ""));
  for (const { nodeName, wireguard } of boxes)
    if (nodeName && nodeName !== box.nodeName && wireguard?.address) names.set(nodeName, wireguard.address);
  return [...names];
}

/** Packet sizes to try when full ones do not pass, in bytes: the largest that passes is the MTU to set. */
const SIZES = [1412, 1400, 1392, 1380, 1372, 1360, 1340, 1320, 1300, 1280, 1240, 1200, 1000, 576, 128];
/** Seconds of watching while packets are lost: WireGuard repeats a handshake every five. */
const WATCH = 7;

/** The shell that tests a box's paths to the others. It sends packets and leaves nothing behind. */
export function tries(box: BoxReport, cluster: Cluster) {
  const wg = box.wireguard;
  const to = wg ? tunnels(box, cluster) : [];
  const kubelets = box.role === "server" ? cluster.nodes.filter((n) => n.externalIp) : [];
  const own = cluster.boxes.find(({ role }) => role === "server");
  const [, host = own?.ip, port = "6443"] = /^https:\/\/([\w.-]+)(?::(\d+))?$/.exec(box.url ?? "") ?? [];
  // The API's service has the first address of the services' network.
  const cidr = own?.node?.args.join(" ").match(/--service-cidr[= ]([\d.]+)\.\d+\//)?.[1] ?? "10.43.0";
  const server = box.role === "server";
  const dead = box.resolvers.filter((ip) => /is (private|the provider)/.test(publicIp(ip) ?? ""));
  return prints("tries top topless before after arrived")(sh`${raw(server ? API : "")}
echoes() { ping -n -c 1 -W 1 \${dont:+-M do} -s "$(($2 - 28))" "$1" >/dev/null 2>&1; }
through() {
  full=${wg?.mtu ?? 0}
  if echoes "$2" $full || echoes "$2" $full; then size=$full
  else size=$(for n in ${SIZES}; do { echoes "$2" "$n" && echo "$n"; } & done | sort -n | tail -n 1); fi
  echo "tunnel $1 \${size:-0}"
}
knock() {
  # shellcheck disable=SC2016
  for s in 3 5; do # what is only slow gets a second, longer try
    said=$(timeout $s bash -c ': <"/dev/tcp/$1/$2"' - "$3" "$4" 2>&1)
    code=$?
    [ $code = 124 ] || break
  done
  case $code,$said in 0,*) how=open ;; 124,*) how=dropped ;; *refused*) how=refused ;; *) how=\${said##*: } ;; esac
  echo "$1 $2 $how"
}
resolves() {
  for _ in 1 2; do
    # shellcheck disable=SC2016
    got=$(timeout 2 bash -c 'exec 3<>"/dev/udp/$1/53"
printf "\x13\x37\x01\0\0\x01\0\0\0\0\0\0\0\0\x02\0\x01" >&3; head -c 3 <&3' - "$1" 2>/dev/null | wc -c)
    if [ "$got" -gt 0 ]; then echo "resolver $1 yes"; return; fi
  done
  echo "resolver $1 no"
}
serves() {
  case $(knock proxy '' 127.0.0.1 10256) in
    *open) knock proxied kubernetes ${cidr}.1 443 ;;
    *) echo without kube-proxy ;;
  esac
}
fact tries
has=yes; for c in bash timeout; do command -v $c >/dev/null || { echo "without $c"; has=; }; done
ping=yes; command -v ping >/dev/null || { echo "without ping"; ping=; }
dont=; ping -n -c 1 -W 1 -M "do" 127.0.0.1 >/dev/null 2>&1 && dont=yes
said=$(
  if [ -n "$ping" ]; then :
${raw(few(to.map(([name, ip]) => sh`through ${name} ${ip}`)))}  fi
  if [ -n "$has" ]; then :
${raw(
  few([
    ...kubelets.map((n) => sh`knock kubelet ${n.name} ${n.externalIp as string} 10250`),
    ...(box.role === "agent" && host ? [sh`knock api server ${host} ${port}`] : []),
    ...dead.map((ip) => sh`resolves ${ip}`),
    ...(cluster.nodes.length ? ["serves"] : []),
  ]),
)}  fi
)
printf '%s\n' "$said"
${raw(server ? TOP_LOOK : "")}
${raw(wg ? watch(wg.name, to) : "")}`);
}

/** The nodes that metrics-server has figures for, or its error. */
export const TOP_LOOK = prints(
  "top topless",
)(`fact top; { topless=$(api GET '/apis/metrics.k8s.io/v1beta1/nodes?pretty=false' 10 2>&1 >&3); } 3>&1
fact topless; echo "$topless"`);

/**
 * For a tunnel that passes nothing: WireGuard's counters while packets are sent, and whose packets reach the network
 * interface, before any firewall of the box. Both ends together show where they are lost.
 */
const watch = (name: string, to: [string, string][]) => sh`
case $said in *' 0
'*|*' 0')
  fact before; wg show ${name} transfer
  lost=$(
    {
${raw(to.map(([node, ip]) => `      ${sh`case $said in *${`tunnel ${node} 0`}*) ping -n -w ${WATCH} ${ip} & ;; esac`}\n`).join(""))}      wait
    } >/dev/null 2>&1 &
    python=; for p in python3 /usr/libexec/platform-python python; do command -v $p >/dev/null && python=$p; done
    # shellcheck disable=SC2016
    if command -v perl >/dev/null; then timeout 20 perl -e ${PERL}
    elif [ -n "$python" ]; then timeout 20 $python -c ${PYTHON}
    else sleep ${WATCH}; echo '?'; fi
    wait
  )
  fact after; wg show ${name} transfer
  fact arrived; echo "$lost" ;;
esac`;

/** Senders of UDP 51820 to this box, from a packet socket (17; 0x800 is IPv4; type 4 is outgoing). */
const PERL = `socket(S, 17, 2, unpack("S", pack("n", 0x800))) or do { print "?\\n"; exit };
my ($end, %seen, $set) = (time + ${WATCH});
while (time < $end) {
  vec($set = "", fileno(S), 1) = 1;
  next unless select($set, undef, undef, 1) > 0;
  my $from = recv(S, my $p, 64, 0);
  next if length $p < 28 or ord(substr($from, 10, 1)) == 4 or ord(substr($p, 9, 1)) != 17;
  my $ports = (ord($p) & 15) * 4;
  $seen{join ".", unpack("C4", substr($p, 12, 4))} = 1 if unpack("n", substr($p, $ports + 2, 2)) == 51820;
}
print "$_\\n" for keys %seen;`;

const PYTHON = `import socket, time
try: s = socket.socket(17, socket.SOCK_DGRAM, socket.htons(0x800))
except Exception: print("?"); raise SystemExit
s.settimeout(1); end = time.time() + ${WATCH}; seen = set()
while time.time() < end:
    try: p, a = s.recvfrom(64)
    except socket.timeout: continue
    p = bytearray(p); h = (p[0] & 15) * 4
    if len(p) < 28 or a[2] == 4 or p[9] != 17: continue
    if p[h + 2] * 256 + p[h + 3] == 51820: seen.add(".".join(map(str, p[12:16])))
for ip in seen: print(ip)`;

/**
 * Surveys the cluster from all boxes in parallel: one trip a box collects facts and tests the paths to the others, which
 * the box knows by its WireGuard, its unit and, on a server, the API. Changes nothing.
 */

import { boxes } from "../boxes.ts";
import { look } from "../converge.ts";
import { certificatesIn, certificatesLook } from "../k3s/certificates.ts";
import { rangesOf } from "../k3s/config.ts";
import { entryIn, entryLook } from "../k3s/devices.ts";
import { blocked, firewallLooks, type RuleFact, remedy } from "../k3s/firewall/firewall.ts";
import { entryOf, TUNNEL } from "../k3s/firewall/traffic.ts";
import { nodeNameOf, nodesAt, whoIs } from "../k3s/identity.ts";
import { MEANT } from "../k3s/journal.ts";
import {
  address as addressIn,
  apiMessage,
  FRESH,
  ITEMS,
  isHome,
  itemsOf,
  kubeletIpOf,
  loadLook,
  loadOf,
  type Node,
  nodesLook,
  nodesOf,
  peerOf,
  peersLook,
  peersOf,
  type SystemPod,
  silence,
  systemLook,
  systemOf,
  tunnelIpOf,
} from "../k3s/nodes.ts";
import { backupsIn, scheduleLook } from "../k3s/schedule.ts";
import { goesInside, nameLook, type Role, unitOf } from "../k3s/unit.ts";
import { watchIn, watchLook } from "../k3s/watch.ts";
import { cardsOf } from "../protocol.ts";
import { silent } from "../report.ts";
import type { Box, Run } from "../script.ts";
import type { Settings } from "../settings.ts";
import { raw, sh } from "../sh.ts";
import { type Facts, type Look, type Printed, prints, type Step } from "../step.ts";
import { NAT, PRIVATE_RANGES, publicIp } from "../table.ts";
import { parseKeyValues, splitWords } from "../text.ts";
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
  /** What it reaches. */
  tried: Facts<TriedFact>;
  /** The second trip, with check's own pods: what they reach. */
  paths?: Facts<TriedFact>;
}

/** A step that only looks: no plan. */
export const ask = <F extends string = never>(looks: Look<F>[], options: Step["options"] = []): Step<F> => ({
  name: "check",
  options,
  look: () => looks,
  plan: () => [],
});

const boxLook = prints("named units wg peers cni disk load starts ipvs said")(sh`
${raw(nameLook)}
fact units; systemctl show k3s k3s-agent k3s-keepalive -p Id -p ActiveState -p NRestarts -p MainPID -p ExecMainStartTimestampMonotonic
fact wg; for i in flannel.1 flannel-wg; do
  ! { read -r mtu </sys/class/net/$i/mtu; } 2>/dev/null || echo "$i $mtu $(wg show $i public-key 2>/dev/null)"
done
${raw(peersLook)}
# A bridge without a port has the kernel's 1500 whatever it was made with (v1.36.3, seen).
fact cni; awk '$1 > most { most = $1 } END { if (most) print most }' /sys/class/net/cni0/brif/*/../mtu 2>/dev/null
fact disk; df -Pk /var/lib/rancher 2>/dev/null || df -Pk /
${raw(loadLook)}
# systemd's own lines: of 219 "holdoff time over, scheduling restart", later "Scheduled restart job".
fact starts; journalctl _PID=1 UNIT=k3s.service UNIT=k3s-agent.service -o short-unix --no-pager --since -600s 2>/dev/null |
  awk 'tolower($0) ~ /scheduled restart job|scheduling restart/ { sub(/\..*/, ""); print }' | tail -n 30
fact ipvs; { test -d /sys/module/ip_vs || modprobe -n -q ip_vs 2>/dev/null; } && echo yes
fact said; journalctl -u k3s -u k3s-agent -o cat --no-pager --since -60s -n 5000 2>/dev/null |
  grep -E ${MEANT} | awk '{ sub(/^time="[^"]*" /, ""); said[NR] = $0; last[$0] = NR }
    END {
      for (i = NR; i && few < 5; i--) if (last[said[i]] == i) kept[++few] = substr(said[i], 1, 400)
      while (few) print kept[few--]
    }'
`);

const serverLook = prints("metrics ca nodes api load system")(`
fact metrics; ls -d /var/lib/rancher/k3s/server/manifests/metrics-server* 2>/dev/null
fact ca; sha256sum </var/lib/rancher/k3s/server/tls/server-ca.crt 2>/dev/null
${nodesLook}
${systemLook}`);

/** Only the token's CA hash, which is not secret. */
const agentLook = prints("joins")(
  `joins=$(sed -n 's/^K3S_URL=//p; ${caSed("K3S_TOKEN=")}' /etc/systemd/system/k3s-agent.service.env 2>/dev/null)
fact joins; echo "$joins"`,
);

/** What a box is asked for, by its role. */
export const LOOKS = { server: [boxLook, serverLook], agent: [boxLook, agentLook] } as const;

type BoxFact =
  | Printed<
      | (typeof LOOKS)[Role][number]
      | (typeof entryLook)[number]
      | typeof certificatesLook
      | typeof scheduleLook
    >
  | RuleFact
  | Printed<typeof watchLook>;
/** What tries() and its companions print, and the second trip. */
type TriedFact = Printed<ReturnType<typeof tries | typeof answersLook>> | "paths" | "kubelets" | "unstarted";

/** Time limit for a box's facts, in seconds; ssh itself gives up on a dead box after 15. */
export const PATIENCE = 40;

/** The same for a number of tests that run a few at a time. */
export const patience = (ways: number): number => PATIENCE + ways;

/** Parallel pings and connections on a box: a hundred at once take 100 MB of memory (a third, where each starts more). */
const FEW = 24;

/** Runs lines of shell in parallel, in as many lanes at most. */
export const few = (lines: readonly string[], many = FEW): string =>
  `${lines
    .slice(0, many)
    .map((_, lane) => `  {\n    ${lines.filter((_, i) => i % many === lane).join("\n    ")}\n  } &\n`)
    .join("")}  wait\n`;

/** Boxes, and what is to run on each. */
export type Listed = { box: Box; role: Role }[];

/** The box's clock, as the last of a trip: what a look prints before may come late, and without an end of its line. */
export const CLOCK = `printf '\\n%s say %s\\n' "$m" "$(date +%s.%N)"` as Look;

/** Asks all boxes in parallel. A box that cannot be reached carries its error. */
export async function survey<F extends string = never>(
  listed: Listed,
  looks: (role: Role) => readonly Look<BoxFact | F>[],
  seconds = PATIENCE,
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
          [ask<BoxFact | F>([...looks(role), CLOCK])],
          seconds,
        );
      } catch (error) {
        member.error = (error as Error).message;
      }
      return member;
    }),
  );
}

/** A box's report, as shown and judged; unknown values are undefined. */
export interface BoxReport extends ReturnType<typeof reportAlone> {
  /**
   * What its firewall drops of the cluster's traffic, one sentence each; and what its rules drop although it passes
   * now.
   */
  blocked: string[];
  latent: string[];
  /** On an entry for devices: what its firewall drops of theirs. */
  closed: string[];
  /** The remedy for all three. */
  opens: string;
  /** Other nodes without a public address that this one, which has none either, does not reach. */
  apart: string[];
}

/** The cluster: the boxes of the settings, and all nodes that the API knows. */
export interface Cluster {
  boxes: BoxReport[];
  nodes: Node[];
  /** CoreDNS and metrics-server, where the API said. */
  system?: SystemPod[] | undefined;
  /** The user's own kubeconfig, if it has the cluster's context: when its certificate ends, in seconds since 1970. */
  access?: { context: string; ends: number } | undefined;
}

/** Combines the boxes' answers, but for their firewalls: to judge those takes the longest. */
export function reportsOf(members: readonly Member[]) {
  // Servers share one datastore: the first that answers is enough.
  const lists = members.filter(({ role }) => role === "server").map(({ facts }) => nodesOf(facts.nodes));
  const nodes = lists.find((list) => list.length) ?? [];
  const alone = members.map((member) => reportAlone(member, nodes));
  const homes = nodes.filter(isHome).map(({ name }) => name);
  const boxes = alone.map((box, i) => {
    if (members[i]?.tried.tries === undefined) return { ...box, apart: [] };
    const far = homes.includes(box.nodeName) ? homes : [];
    const tunnel = tunnelsOf(box, alone, nodes);
    const tried = {
      ...box.tried,
      tunnel: betweenHomes(tunnel, far),
      pods: betweenHomes(box.tried.pods, far),
    };
    return { ...box, tried, apart: far.filter((name) => tunnel[name] === 0) };
  });
  return { boxes, nodes };
}

/** Two nodes without a public address reach each other only where their NATs allow it: else that is no failed test. */
const betweenHomes = <T>(tried: Record<string, T>, homes: readonly string[]): Record<string, T> =>
  Object.fromEntries(Object.entries(tried).filter(([to, how]) => how || !homes.includes(to)));

/** Combines the boxes' answers. */
export function clusterOf(members: readonly Member[]): Cluster {
  const { boxes, nodes } = reportsOf(members);
  const system = members.flatMap(({ facts }) => systemOf(facts.system) ?? []);
  return {
    boxes: boxes.map((box, i) => ({ ...box, ...firewallOf(box, members[i] as Member, boxes, nodes) })),
    nodes,
    system: members.some(({ facts }) => systemOf(facts.system)) ? system : undefined,
  };
}

/**
 * What has passed is not reported as blocked: a rule may be misunderstood here, or the connection is older than the
 * rules.
 */
function firewallOf(
  box: ReturnType<typeof reportAlone>,
  { facts, box: { want } }: Member,
  boxes: readonly ReturnType<typeof reportAlone>[],
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
  const ipOf = (node: Node) => node.externalIp ?? (isHome(node) ? NAT : "");
  const tunnel = want.TUNNEL_KUBELETS ? [TUNNEL] : [];
  const ipsOf = (some: readonly Node[]) =>
    some.length ? [...new Set([...some.map(ipOf), ...tunnel])].sort() : [];
  const others = nodes.filter(
    (node) => ipOf(node) && node.name !== box.nodeName && node.externalIp !== box.ip,
  );
  const pods = Object.values({ ...box.tried.pods, ...box.tried.services });
  const said = (some: Node[], ranges: boolean) => blocked(facts, ipsOf(some), ranges ? rangesOf(want) : []);
  const lost = others.filter((node) => !passes(node));
  const now = said(lost, lost.length > 0 || !pods.every(Boolean));
  const latent = now.length ? [] : said(others, true);
  const entry = entryOf(facts);
  const closed = blocked(facts, entry, []);
  const opens =
    now.length + latent.length + closed.length
      ? remedy(facts, [...new Set([...ipsOf(others), ...entry, box.ip])].sort(), rangesOf(want), box.word)
      : "";
  return { blocked: now, latent, closed, opens };
}

/** A box's own report; its firewall is judged together with the others. */
function reportAlone({ box, role, error, facts, clock, tried, paths }: Member, nodes: Node[]) {
  const [there] = nodesAt(nodes, whoIs(box.ip, facts, box.want));
  // A box that does not answer is found by its address only, or by its name in the settings.
  const name = nameOf(role, { ...box.want, PUBLIC_IP: box.ip }, facts, nodes) || (there?.name ?? "");
  const units = (facts.units ?? "").split(/\n\n+/).map(parseKeyValues);
  const unit = units.find(({ Id }) => Id === `${unitOf(role)}.service`);
  const started = Number(unit?.MainPID) ? Number(unit?.ExecMainStartTimestampMonotonic) / 1e6 : 0;
  const [, wg, mtu, key] =
    [...(facts.wg ?? "").matchAll(/^(flannel\.1|flannel-wg) (\d{3,5}) ?([\w+/=]*)$/gm)].at(-1) ?? [];
  const joins = (facts.joins ?? "").trim().split("\n");
  const cards = cardsOf(facts);
  const { own: certificates, cas } = certificatesIn(facts);
  return {
    name: box.name,
    host: box.host,
    word: box.word,
    ip: box.ip,
    role,
    /** Is its kubelet to be reached inside the tunnel? */
    inside: goesInside({ ...box.want, PUBLIC_IP: box.ip }),
    error,
    /** The name of the box's node; and the cluster's node of that name, if any. */
    nodeName: name,
    node: nodes.find((node) => node.name === name),
    kernel: facts.kernel?.trim(),
    /** systemd's ActiveState of the role's unit, restarts since boot (unknown to systemd 219), and uptime in seconds. */
    unit: {
      state: unit?.ActiveState ?? "unknown",
      restarts: unit?.NRestarts === undefined ? undefined : Number(unit.NRestarts),
      runs: started ? Number(facts.uptime) - started : undefined,
    },
    /** The unit by which a box without a public address stays reachable. */
    keepalive: units.find(({ Id }) => Id === "k3s-keepalive.service")?.ActiveState,
    /** Clock offset in seconds, box minus here. */
    clock,
    /** Percent in use. */
    disk: numberOf(/(\d+)%/.exec(facts.disk ?? "")?.[1]),
    load: loadOf(facts),
    /** On a server: why the API gave no list of nodes. */
    silence: role === "server" ? silence(facts) : undefined,
    /** Restarts of k3s by systemd in the last ten minutes: seconds ago, oldest first. */
    starts: (facts.starts ?? "")
      .split("\n")
      .filter((row) => /^\d+$/.test(row))
      .map((row) => Math.max(0, Number(facts.now) - Number(row))),
    /** The interface of flannel's WireGuard, its own address, MTU and public key. */
    wireguard: wg
      ? {
          name: wg,
          mtu: Number(mtu),
          key: key ?? "",
          address: addressIn(cards.find(({ card }) => card === wg)?.ip),
        }
      : undefined,
    /** The largest MTU of the pods' ports on the bridge; undefined without a pod. */
    cniMtu: numberOf(facts.cni?.trim()),
    peers: peersOf(facts.peers).filter((peer) => peer.interface === wg),
    addresses: cards.map(({ ip }) => ip),
    /** kube-proxy's mode by the settings. */
    proxyMode: box.want.PROXY_MODE,
    /** The kernel has ip_vs. */
    ipvs: Boolean(facts.ipvs?.trim()),
    /** Upstream DNS servers for pods. */
    resolvers: splitWords((tried.resolvers ?? "").replaceAll("\n", " ")),
    /** sha256 of the cluster's CA: the server's own, or the one in the agent's token. */
    ca:
      role === "server" ? facts.ca?.split(" ")[0]?.trim() : joins.find((word) => /^[0-9a-f]{64}$/.test(word)),
    /** The server that the agent joins. */
    url: joins.find((word) => word.startsWith("http") && URL.canParse(word)),
    /** Known messages in the journal's last minute. */
    said: facts.said?.trim() ?? "",
    /** metrics-server is deployed: k3s's own, or fix-metrics'. */
    metrics: Boolean(facts.metrics?.trim()),
    /** What devices have as their entry here. */
    entry: entryIn(facts),
    /** What looks after the cluster. */
    watch: role === "server" && error === undefined ? watchIn(box.want, facts) : undefined,
    /** Of k3s, without the CAs; and those of a server. */
    certificates,
    cas,
    /** On a server: what is wrong with its own backups, and how old the last one is. */
    backups: role === "server" && error === undefined ? backupsIn(box.want, facts, nodes) : undefined,
    now: Number(facts.now),
    tried: triedOf({ ...tried, ...paths }, nodes, Boolean(box.want.TUNNEL_KUBELETS)),
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

/** What was tested from a box, by the name of the other end. Without nodes there are no rules of kube-proxy to test. */
function triedOf(facts: Facts<TriedFact>, nodes: readonly Node[], inside: boolean) {
  const { tries, ports, paths, kubelets, unstarted } = facts;
  const rows = [tries, ports, paths, kubelets, unstarted].flatMap((text) =>
    (text ?? "").split("\n").map((row) => row.split(" ")),
  );
  const named = (what: string) =>
    rows.flatMap(([is, name = "", ...how]): [string, string][] =>
      is === what ? [[name, how.join(" ")]] : [],
    );
  const words = (what: string): Record<string, string> => Object.fromEntries(named(what));
  const passed = (what: string): Record<string, boolean> =>
    Object.fromEntries(named(what).map(([name, how]) => [name, how === "yes"]));
  const errors = (what: string) =>
    named(what).flatMap(([name, how]): [string, string][] =>
      how === "yes" ? [] : [[`${what} ${name}`, apiMessage(how.replace(/^no ?/, ""))]],
    );
  const bytes = (text = "") =>
    new Map(
      text
        .split("\n")
        .map((row) => [row.split("\t")[0] ?? "", row.split("\t").slice(1).map(Number)] as const),
    );
  const before = bytes(facts.before);
  const arrived = facts.arrived?.trim().split("\n").filter(Boolean);
  return {
    /** The largest packet that passes the tunnel, in bytes; 0: none. */
    tunnel: Object.fromEntries(named("tunnel").map(([name, size]): [string, number] => [name, Number(size)])),
    /** TCP: open, refused, dropped, or another word. */
    kubelet: Object.fromEntries(
      named("kubelet").map(([at, how]) => [
        nodes.find((node) => kubeletIpOf(node, inside) === at)?.name ?? at,
        how,
      ]),
    ),
    api: named("api").at(-1)?.[1],
    /** The API's service, by kube-proxy's rules. */
    service: nodes.length ? named("proxied").at(-1)?.[1] : undefined,
    /** Nodes in `kubectl top nodes`; or the API's error. */
    top: figuresOf(facts.top),
    topless: facts.topless?.trim() ? apiMessage(facts.topless.trim()) : undefined,
    /** By the resolver's address, of those that are near or nowhere. */
    resolvers: Object.fromEntries(
      Object.entries(passed("resolver")).filter(([ip]) =>
        /is (private|the provider)/.test(publicIp(ip) ?? ""),
      ),
    ),
    /** While packets were lost: bytes received and sent within some seconds, by the peer's public key. */
    passed: Object.fromEntries(
      [...bytes(facts.after)].flatMap(([key, [received = 0, sent = 0]]) => {
        const [r = 0, s = 0] = before.get(key) ?? [];
        return key ? [[key, { received: received - r, sent: sent - s }] as const] : [];
      }),
    ),
    /** Senders of UDP 51820 seen at the network interface in those seconds; undefined: no tool to watch. */
    arrived: arrived?.includes("?") ? undefined : arrived,
    /** By node: did a packet pass from this box's pod to that node's? */
    pods: passed("pod"),
    /** From this box's pod. */
    services: passed("service"),
    /** From the server, by node. */
    logs: passed("logs"),
    exec: passed("exec"),
    /** The API's error, by `logs NODE` or `exec NODE`. */
    why: Object.fromEntries([...errors("logs"), ...errors("exec")]),
    /** Nodes on which check's own pod did not start, with the kubelet's reason. */
    unstarted: words("unstarted"),
    /** Tools that the box lacks. */
    missing: named("without").flatMap(([name]) => (name === "kube-proxy" && !nodes.length ? [] : [name])),
  };
}

/** The boxes of the settings. @throws {SettingError} */
export async function listed(run: Run): Promise<Listed> {
  const servers = await boxes(run, "SERVER");
  const agents = await boxes(run, "AGENTS");
  return [
    ...servers.map((box) => ({ box, role: "server" as const })),
    ...agents.map((box) => ({ box, role: "agent" as const })),
  ];
}

/** Surveys all boxes in one trip each, and tries the paths between them: tunnels, kubelets, the API, resolvers. */
export async function surveyAndTry(boxes: Listed): Promise<Member[]> {
  const [server] = boxes.filter(({ role }) => role === "server");
  const guess = serviceOf(server?.box.want.SERVER_ARGS);
  const looks = {
    // What the API may take long for comes last: both ends of a lost tunnel are watched at the same time.
    server: [
      boxLook,
      tries("server", guess),
      serverLook,
      watchLook,
      answersLook(Boolean(server?.box.want.TUNNEL_KUBELETS)),
    ],
    agent: [...LOOKS.agent, tries("agent", guess, server?.box.ip)],
  };
  const found = await survey<TriedFact>(
    boxes,
    (role) => [
      ...looks[role],
      ...firewallLooks,
      ...entryLook,
      certificatesLook,
      ...(role === "server" ? [scheduleLook] : []),
    ],
    patience(20 + boxes.length),
  );
  const members = found.map((member) => ({ ...member, tried: member.facts }));
  const known = reportsOf(members).boxes.find(({ role, node }) => role === "server" && node)?.node;
  const real = known ? serviceOf(known.args.join(" ")) : guess;
  // A service network that only the server's own files name is known late.
  if (real === guess) return members;
  const again = ask([
    prints("ports")(sh`${raw(KNOCK)}
fact ports; [ -z "$has" ] || serves ${real}`),
  ]);
  return await Promise.all(
    members.map(async (member) => {
      if (member.error) return member;
      try {
        const { ports } = await look(member.box, [again], PATIENCE);
        return { ...member, tried: { ...member.tried, ports: `${member.tried.ports ?? ""}\n${ports}` } };
      } catch (error) {
        return { ...member, error: (error as Error).message };
      }
    }),
  );
}

/** The API's service has the first address of the services' network. */
const serviceOf = (args = "") => `${/--service-cidr[= ]([\d.]+)\.\d+\//.exec(args)?.[1] ?? "10.43.0"}.1`;

/**
 * Sizes of the packets that passed to each other node. A box tries its peers by their tunnel's address: flannel uses the
 * first of the node's pod network. To what is no peer of its nothing passes.
 */
function tunnelsOf(
  { nodeName, wireguard, tried }: ReturnType<typeof reportAlone>,
  boxes: readonly ReturnType<typeof reportAlone>[],
  nodes: readonly Node[],
): Record<string, number> {
  const at = new Map(nodes.map((node) => [node.name, tunnelIpOf(node)]));
  for (const box of boxes)
    if (box.nodeName && box.wireguard?.address) at.set(box.nodeName, box.wireguard.address);
  at.delete(nodeName);
  const none = wireguard && !tried.missing.includes("ping") ? 0 : undefined;
  return Object.fromEntries(
    [...at].flatMap(([name, ip]): [string, number][] => {
      const size = ip ? (tried.tunnel[ip] ?? none) : undefined;
      return size === undefined ? [] : [[name, size]];
    }),
  );
}

/** Packet sizes to try when full ones do not pass, in bytes: the largest that passes is the MTU to set. */
const SIZES = [1412, 1400, 1392, 1380, 1372, 1360, 1340, 1320, 1300, 1280, 1240, 1200, 1000, 576, 128];
/** Seconds of watching while packets are lost: WireGuard repeats a handshake every five. */
const WATCH = 7;

/** Shell functions that try what listens; `has` is empty where they cannot. */
const KNOCK = `knock() {
  # shellcheck disable=SC2016
  for s in 3 5; do # what is only slow gets a second, longer try
    said=$(timeout $s bash -c ': <"/dev/tcp/$1/$2"' - "$3" "$4" 2>&1)
    code=$?
    [ $code = 124 ] || break
  done
  case $code,$said in 0,*) how=open ;; 124,*) how=dropped ;; *refused*) how=refused ;; *) how=\${said##*: } ;; esac
  echo "$1 $2 $how"
}
serves() {
  case $(knock proxy '' 127.0.0.1 10256) in
    *open) knock proxied kubernetes "$1" 443 ;;
    *) echo without kube-proxy ;;
  esac
}
has=yes; for c in bash timeout; do command -v $c >/dev/null || has=; done`;

/**
 * The shell that tests a box's paths to the others, by what the box knows of them itself, so that its length is the same
 * for any number of nodes. It sends packets and leaves nothing behind. On an agent it follows agentLook.
 *
 * @param service the address of the API's service.
 * @param api the server's address, for an agent whose unit does not name one.
 */
export const tries = (role: Role, service: string, api = "") =>
  prints("resolvers tries before after arrived")(sh`${raw(KNOCK)}
echoes() { ping -n -c 1 -W 1 \${dont:+-M do} -s "$(($2 - 28))" "$1" >/dev/null 2>&1; }
through() { if echoes "$1" "$mtu" || echoes "$1" "$mtu"; then echo "tunnel $1 $mtu"; else echo "$1"; fi; }
fits() {
  case $1 in tunnel*) echo "$1"; return ;; esac
  size=$(for n in ${SIZES}; do { echoes "$1" "$n" && echo "$n"; } & done | sort -n | tail -n 1)
  echo "tunnel $1 \${size:-0}"
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
# A command with each line, so many at a time.
few() {
  i=0
  while read -r line; do
    "$2" "$line" &
    i=$((i + 1))
    [ $((i % $1)) != 0 ] || wait
  done
  wait
}
# As k3s picks it (pkg/agent/config): a resolver that is not the host's own, else 8.8.8.8.
fact resolvers; dns=; for f in /etc/resolv.conf /run/systemd/resolve/resolv.conf; do
  list=$(sed -n 's/^nameserver[[:space:]]*//p' $f 2>/dev/null)
  case $list in ''|127.*|*'
127.'*|169.254.*) ;; *) echo "$list"; dns=$list; break ;; esac
done
fact tries
wg=; for i in flannel.1 flannel-wg; do ! { read -r size </sys/class/net/$i/mtu; } 2>/dev/null || wg=$i mtu=$size; done
for c in bash timeout ping; do command -v $c >/dev/null || echo "without $c"; done
dont=; ping -n -c 1 -W 1 -M "do" 127.0.0.1 >/dev/null 2>&1 && dont=yes
said=$(
  if [ -n "$wg" ] && command -v ping >/dev/null; then
    wg show "$wg" allowed-ips 2>/dev/null | tr '[:blank:]' '[\n*]' | sed -n 's/^\([0-9]*\.[0-9.]*\)\/.*/\1/p' |
      few ${FEW} through | few ${FEW / 3} fits &
  fi
  if [ -n "$has" ]; then
${raw(role === "agent" ? knocksAt(api) : "")}
    for ip in $(printf '%s\n' "$dns" | grep -E ${PRIVATE_RANGES}); do resolves "$ip" & done
    serves ${service} &
  fi
  wait
)
printf '%s\n' "$said"
${raw(watch)}`);

/** The server that an agent joins. */
const knocksAt = (api: string) => sh`    host=${api} port=6443
    for url in $joins; do
      at=\${url#https://}
      case $url,$at in
        "$at",*|*,*[!A-Za-z0-9_.:-]*) ;;
        *) host=\${at%%:*}; [ "$host" = "$at" ] || port=\${at#*:} ;;
      esac
    done
    [ -z "$host" ] || knock api server "$host" "$port" &`;

/** What `kubectl top nodes` asks the API for. */
export const FIGURES = "/apis/metrics.k8s.io/v1beta1/nodes?pretty=false";

/** The nodes that metrics-server has figures for, or its error. */
export const TOP_LOOK = prints("top topless")(sh`fact top; { topless=$(api GET ${FIGURES} 10 2>&1 >&3); } 3>&1
fact topless; echo "$topless"`);

/** The names of the nodes in the fact `top`. */
export const figuresOf = (top?: string): string[] =>
  itemsOf<{ metadata?: { name?: string } }>(top).flatMap(({ metadata }) => metadata?.name ?? []);

/** On a server whose API answers: the shell that knocks at every kubelet, and asks for figures. */
const answersLook = (inside: boolean) => {
  const types = inside ? ["Internal", "External"] : ["External", "Internal"];
  const found = types.map((type) => `match($0, /"type":"${type}IP","address":"[0-9.]+/)`).join(" || ");
  return prints("ports top topless")(sh`if [ -z "$failed" ]; then
fact ports
kubelet() { knock kubelet "$1" "$1" 10250; }
# One a node: its kubelet may name any number.
[ -z "$has" ] || printf '%s\n' "$list" | ${raw(ITEMS)} |
  awk ${`${found} { print substr($0, RSTART + 31, RLENGTH - 31) }`} | few ${FEW} kubelet
${raw(TOP_LOOK)}
fi`);
};

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

/**
 * For a tunnel that passes nothing: WireGuard's counters while packets are sent, and whose packets reach the network
 * interface, before any firewall of the box. Both ends together show where they are lost.
 */
const watch = sh`lost=$(printf '%s\n' "$said" | sed -n 's/^tunnel \(.*\) 0$/\1/p')
if [ -n "$lost" ]; then
  fact before; wg show "$wg" transfer
  from=$(
    { for ip in $lost; do ping -n -w ${WATCH} "$ip" & done; wait; } >/dev/null 2>&1 &
    python=; for p in python3 /usr/libexec/platform-python python; do command -v $p >/dev/null && python=$p; done
    # shellcheck disable=SC2016
    if command -v perl >/dev/null; then timeout 20 perl -e ${PERL}
    elif [ -n "$python" ]; then timeout 20 $python -c ${PYTHON}
    else sleep ${WATCH}; echo '?'; fi
    wait
  )
  fact after; wg show "$wg" transfer
  fact arrived; echo "$from"
fi`;

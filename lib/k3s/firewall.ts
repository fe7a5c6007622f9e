/** The box's firewall: what it lets through, and the rules to add, for firewalld, ufw, or nft if neither runs. */

import { isIPv4 } from "node:net";
import type { Settings } from "../settings.ts";
import { sh, writeFile } from "../sh.ts";
import { type Change, type Facts, type Printed, prints, Refusal, step } from "../step.ts";
import { splitWords } from "../text.ts";
import { rangesOf } from "./config.ts";
import { clusterLook, nodesOf } from "./nodes.ts";
import { type Chain, type End, ends, iptables, nft, type Packet } from "./rules.ts";

/** Traffic between nodes: API, kubelet, WireGuard. */
const BETWEEN = [
  ["tcp", 6443],
  ["tcp", 10250],
  ["udp", 51820],
] as const;
/** Interfaces of pod traffic. */
const INTERFACES = ["cni0", "flannel.1", "flannel-wg"];
/**
 * Ports to close to the world: API, kubelet, health and metrics of kube-proxy, scheduler and controller manager
 * (v1.17's 10251 and 10252 need no credentials), vxlan and WireGuard.
 */
const CLOSED = {
  tcp: [
    [6443, 6443],
    [10248, 10259],
  ],
  udp: [
    [8472, 8472],
    [51820, 51821],
  ],
} as const;

const SCRIPT = "/usr/local/sbin/k3s-firewall";
const UNIT = "/etc/systemd/system/k3s-firewall.service";
const RULE_COMMENT = "k3s-across-clouds";
const TABLE = "k3s_across_clouds";

/** Longer rule sets are not read and not judged, in bytes. */
const LONG = 300_000;

/**
 * Facts about the active firewall and the kernel's rules, without nat, kube-proxy's table and k3s's own chains, of
 * which there may be thousands.
 */
export const firewallLook = prints(
  "firewalld firewalld-version zones rules rules--permanent sources sources--permanent ufw added nft card ruleset iptables iptables-legacy ip6tables ip6tables-legacy iploaded ip6loaded script start booted",
)(sh`state=$(firewall-cmd --state 2>/dev/null)
fact firewalld; echo "$state"
if [ "$state" = running ]; then
  fact firewalld-version; firewall-cmd --version
  zones=$( (firewall-cmd --get-active-zones | sed -n 's/^\([^ ]*\).*/\1/p'; firewall-cmd --get-default-zone) | grep -vx -e trusted -e '' | sort -u)
  fact zones; echo "$zones"
  for when in '' --permanent; do
    fact "rules$when"; for zone in $zones; do firewall-cmd $when --zone="$zone" --list-rich-rules | sed "s/^/$zone /"; done
    fact "sources$when"; firewall-cmd $when --zone=trusted --list-sources
  done
fi
fact ufw; ufw status verbose 2>/dev/null
fact added; ufw show added 2>/dev/null
fact nft; command -v nft
fact card; ip -4 route show default | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n 1
fact ruleset; nft list ruleset 2>/dev/null | awk '
  /^table / { other = $2 !~ /^(ip6?|inet|netdev)$/ || $3 ~ /^(nat|kube-proxy)$/ }
  /^[^\t]/ { k3s = 0 }
  /^\t[a-z]+ [^ ]+ \{/ { k3s = $2 ~ /^(KUBE|CNI)-/ }
  !other && !k3s' | head -c ${LONG}
# Of iptables there are two, and k3s brings its own where the box has none.
saved() (
  PATH=$PATH:/var/lib/rancher/k3s/data/current/bin/aux tool=$1-save kind=$2
  shift 2
  if command -v "\${tool%-save}-$kind-save" >/dev/null; then tool=\${tool%-save}-$kind-save
  elif command -v "xtables-$kind-multi" >/dev/null; then set -- "$tool" "$@"; tool=xtables-$kind-multi
  else
    case $("\${tool%-save}" --version 2>/dev/null) in *nf_tables*) have=nft ;; ?*) have=legacy ;; *) have= ;; esac
    [ "$have" = "$kind" ] || return
  fi
  "$tool" "$@" 2>/dev/null | awk '/^\*/ { nat = /nat/ } !nat && !/^(:|-A )(KUBE|CNI)-/' | head -c ${LONG}
)
for family in ip ip6; do
  fact "\${family}tables"; saved \${family}tables nft
  fact "\${family}tables-legacy"
  # To look at a table loads it.
  for table in raw mangle filter security; do
    ! grep -qsx $table /proc/net/\${family}_tables_names || saved \${family}tables legacy -t $table
  done
  fact "\${family}loaded"; grep -sx -e raw -e mangle -e filter -e security /proc/net/\${family}_tables_names
done
fact script; cat ${SCRIPT} 2>/dev/null
fact start; cat ${UNIT} 2>/dev/null
fact booted; systemctl is-enabled k3s-firewall 2>/dev/null; systemctl is-active k3s-firewall 2>/dev/null
`);

export type RuleFact = Printed<typeof firewallLook>;

type Kind = "firewalld" | "ufw" | "nft";
const kindOf = (facts: Facts<RuleFact>): Kind =>
  facts.firewalld?.trim() === "running"
    ? "firewalld"
    : /^Status: active/m.test(facts.ufw ?? "")
      ? "ufw"
      : "nft";

const split = (text = "") => text.split(/\s+/).filter(Boolean);
const lines = (text = "") => text.split("\n").filter(Boolean);

/**
 * The kernel's rules, as far as they were read. Those of iptables are taken from iptables-save rather than from nft.
 */
function chainsOf(facts: Facts<RuleFact>): Chain[] {
  const own = (["ip", "ip6"] as const).flatMap((family) =>
    (["", "-legacy"] as const).flatMap((backend) =>
      iptables(facts[`${family}tables${backend}`] ?? "", family, `iptables${backend}`),
    ),
  );
  // Per chain: iptables-save omits chains that nft added to the same table.
  const twice = (["ip", "ip6"] as const).flatMap((family) =>
    (facts[`${family}tables`] ?? "").split(/^\*/m).flatMap((table) => {
      const [name = ""] = /^\w+/.exec(table) ?? [];
      return [...table.matchAll(/^:(\S+)/gm)].map(([, chain]) => `${family} ${name} ${chain}`);
    }),
  );
  return [...own, ...nft(facts.ruleset ?? "", twice)];
}

/** Base chains that belong to a firewall manager, which drops other rules in them at its next start. */
const isOf = (chain: Chain, kind: Kind): boolean =>
  (kind === "firewalld" && chain.table === "nft inet firewalld") ||
  (chain.base !== undefined &&
    chain.rules.some(({ text }) =>
      ({ firewalld: / (INPUT|FORWARD(_IN)?)_ZONES$/, ufw: / ufw-before-(input|forward)$/, nft: /$^/ })[
        kind
      ].test(text),
    ));

/** Networks of pods and services may be dual-stack. */
const eachOf = (ranges: readonly string[]) => ranges.flatMap((range) => range.split(","));
const ipv4Of = (pods: string) => eachOf([pods]).find((range) => range.includes(".")) ?? "10.42.0.0/16";
const inPods = (pods: string, host: number) => `${ipv4Of(pods).split(/\.\d+\//)[0]}.${host}`;

interface Probe {
  what: string;
  packet: Packet;
}

/** Packets that must pass: from nodes to this box, from pods to it, and between pods. */
function wanted(facts: Facts<RuleFact>, nodes: readonly string[], ranges: readonly string[]): Probe[] {
  const own = [...(facts.addresses ?? "").matchAll(/^\d+: +(\S+) +inet ([\d.]+)/gm)];
  const iif = facts.card?.trim() ?? "";
  const to = own.filter(([, name]) => name === iif).map(([, , ip]) => ip as string);
  const packet: Packet = {
    hook: "input",
    family: "ip",
    iif,
    oif: "",
    from: "",
    to,
    protocol: "tcp",
    port: 0,
  };
  const pods = inPods(ranges[0] ?? "", 5);
  const tunnels = ["cni0", "flannel-wg"];
  return [
    ...BETWEEN.flatMap(([protocol, port]) =>
      nodes.map((from) => ({
        what: `${port}/${protocol} from ${from}`,
        packet: { ...packet, from, protocol, port },
      })),
    ),
    ...(ranges.length ? tunnels : []).flatMap((iif) => [
      ...[6443, 10250].map((port) => ({
        what: `everything from ${ranges[0]}`,
        packet: { ...packet, iif, from: pods, port },
      })),
      ...(
        [
          ["tcp", 80],
          ["udp", 53],
        ] as const
      ).map(([protocol, port]) => ({
        what: `what is forwarded for ${ranges[0]}`,
        packet: {
          ...packet,
          ...{ hook: "forward" as const, iif, oif: tunnels.find((other) => other !== iif) as string },
          ...{ from: pods, to: [inPods(ranges[0] ?? "", 6)], protocol, port },
        },
      })),
    ]),
  ];
}

interface Cut {
  end: End;
  what: string[];
}

/** What the rules drop, or may drop, by rule. */
function cuts(chains: readonly Chain[], probes: readonly Probe[]): Cut[] {
  const found = new Map<string, Cut>();
  for (const { what, packet } of probes) {
    const met = ends(chains, packet);
    const sure = met.find((list) => list.every(({ verdict }) => verdict === "drop"));
    const end = (sure ?? met.flat()).find(({ verdict }) => verdict !== "accept");
    if (!end) continue;
    const key = `${end.chain.table} ${end.chain.name} ${end.why} ${end.sure}`;
    const cut = found.get(key) ?? { end, what: [] };
    found.set(key, cut);
    if (!cut.what.includes(what)) cut.what.push(what);
  }
  return [...found.values()];
}

const whose = ({ chain }: End, kind: Kind) => (isOf(chain, kind) ? kind : `${chain.table} ${chain.name}`);

function sentence({ end, what }: Cut, kind: Kind): string {
  // Ports that are blocked for the same addresses are reported together.
  const ips = new Map<string, string>();
  const ports = new Map<string, string[]>();
  for (const one of what) {
    const [, port = "", ip = one] = /^(\d\S+) from (.*)$/.exec(one) ?? [];
    if (port) ips.set(port, [...(ips.get(port)?.split(", ") ?? []), ip].join(", "));
    else ports.set(one, []);
  }
  for (const [port, from] of ips) ports.set(`from ${from}`, [...(ports.get(`from ${from}`) ?? []), port]);
  const all = [...ports].map(([from, list]) => [...(list.length ? [list.join(", ")] : []), from].join(" "));
  const how = end.sure && end.verdict === "drop" ? "drops" : "may drop";
  return `${whose(end, kind)} ${how} ${all.sort().join(", and ")} (${end.why})`;
}

/** Which of these ports are open to an address that no rule names, and by which rule. */
function opened(chains: readonly Chain[], facts: Facts<RuleFact>): string[] {
  const [first] = wanted(facts, [""], []) as [Probe];
  const found = new Map<string, number[]>();
  for (const protocol of ["tcp", "udp"] as const)
    for (const [low, high] of CLOSED[protocol])
      for (let port = low as number; port <= high; port++)
        for (const family of ["ip", "ip6"] as const) {
          const met = ends(chains, { ...first.packet, family, protocol, port });
          if (met.some((list) => list.every(({ verdict }) => verdict === "drop"))) continue;
          const end = met
            .flat()
            .findLast(({ verdict, why }) => verdict !== "drop" && !why.startsWith("policy"));
          const why = `${protocol} by ${end ? `${whose(end, kindOf(facts))}: ${end.why}` : "no rule that drops it"}`;
          found.set(why, [...(found.get(why) ?? []), port]);
        }
  return [...found].map(([why, ports]) => `${[...new Set(ports)].join(", ")}/${why}`);
}

/** Why the rules are not known: they are too long, or no tool here prints them. */
function unread(facts: Facts<RuleFact>): string[] {
  const long = (["ruleset", "iptables", "ip6tables", "iptables-legacy", "ip6tables-legacy"] as const).some(
    (name) => (facts[name]?.length ?? 0) >= LONG - 1,
  );
  const hidden = facts.iploaded?.trim() && !facts["iptables-legacy"]?.trim();
  return [
    ...(long ? ["there are more rules here than are read"] : []),
    ...(hidden ? ["iptables-legacy has rules here that nothing shows: install iptables"] : []),
  ];
}

/**
 * What the box's firewall blocks, or may block, of the cluster's traffic, one sentence each.
 * @param nodes public addresses of nodes that must get through.
 * @param ranges networks of pods and services, where they must. @see k3s docs, "Requirements", "Operating Systems"
 */
export function blocked(
  facts: Facts<RuleFact>,
  nodes: readonly string[],
  ranges: readonly string[],
): string[] {
  if (nodes.length + ranges.length === 0) return [];
  return [
    ...cuts(chainsOf(facts), wanted(facts, nodes, ranges)).map((cut) => sentence(cut, kindOf(facts))),
    ...unread(facts),
  ];
}

/** The remedy: `make firewall` if that helps, else its refusal. */
export function remedy(
  facts: Facts<RuleFact>,
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
function withOurs(chains: readonly Chain[], facts: Facts<RuleFact>, probes: readonly Probe[]): Chain[] {
  const kind = kindOf(facts);
  const zones = split(facts.zones);
  const into = ({ name, base, ...chain }: Chain) =>
    kind === "ufw" && /^ufw-user-(input|forward)$/.test(name)
      ? true
      : kind === "firewalld" &&
          /^(filter_)?(IN|FWD|(INPUT|FORWARD(_IN)?)(?=_ZONES))_(.*_(pre|allow)|ZONES(_SOURCE)?)$/.test(
            name,
          ) &&
          (/ZONES/.test(name) ||
            zones.some((zone) => name.endsWith(`_${zone}_${early(facts) ? "pre" : "allow"}`)))
        ? /ZONES/.test(name)
          ? "pods"
          : "nodes"
        : base && /^(input|forward)$/.test(base.hook) && !isOf({ name, base, ...chain }, kind);
  return chains.map((chain) => {
    const which = into(chain);
    const mine = probes.filter(({ what }) => (which === "pods") === !/^\d/.test(what) || which === true);
    const test = (p: Packet) =>
      mine.some(
        ({ packet }) =>
          packet.hook === p.hook &&
          packet.from === p.from &&
          (packet.hook === "forward" || (packet.port === p.port && packet.protocol === p.protocol)),
      );
    return which
      ? {
          ...chain,
          rules: [{ text: RULE_COMMENT, tests: [test], ends: [[undefined, "accept"]] }, ...chain.rules],
        }
      : chain;
  });
}

/** firewalld before 0.7 has no priorities among rich rules: those that deny come first. */
const early = (facts: Facts<RuleFact>) => !/^0\.[0-6]\./.test(facts["firewalld-version"] ?? "");
const rich = (facts: Facts<RuleFact>, ip: string, protocol: string, port: number) =>
  `rule ${early(facts) ? 'priority="-1000" ' : ""}family="ipv4" source address="${ip}" port port="${port}" protocol="${protocol}" accept`;
const RICH =
  /^\S+ rule (priority="-1000" )?family="ipv4" source address="[\d.]+" port port="(6443|10250|51820)" protocol="(tcp|udp)" accept$/;

/** Changes that open k3s's ports to the nodes and close them to the world; ssh is not touched. @throws {Refusal} */
export function firewallPlan(
  facts: Facts<RuleFact>,
  nodes: readonly string[],
  ranges: readonly [string, string],
): Change[] {
  const kind = kindOf(facts);
  const chains = chainsOf(facts);
  const probes = wanted(facts, nodes, ranges);
  const refused = (cut: Cut): never => {
    throw new Refusal(
      `${sentence(cut, kind)}, and no rule can be placed before that one: remove it, or let 6443/tcp, 10250/tcp and 51820/udp from ${nodes.join(", ")} and everything from ${ranges.join(" and ")} through there`,
    );
  };
  const drops = (list: Cut[]) => list.find(({ end }) => end.sure && end.verdict === "drop");
  const never = drops(cuts(withOurs(chains, facts, probes), probes));
  if (never) refused(never);
  const open = opened(
    chains.filter(({ table }) => table !== `nft inet ${TABLE}`),
    facts,
  );
  const now = cuts(chains, probes);
  const foreign = now.some(({ end }) => !isOf(end.chain, kind));
  const changes = [
    ...managed(kind, facts, nodes, ranges, now),
    ...(kind === "nft" || open.length || foreign || facts.script?.trim()
      ? tabled(facts, nodes, ranges, foreign, open)
      : []),
  ];
  const still = changes.length ? undefined : drops(now);
  return still ? refused(still) : changes;
}

const say = (nodes: readonly string[]) =>
  `open 6443/tcp, 10250/tcp and 51820/udp to ${nodes.join(", ")}, and close k3s's ports to all others`;

/** Commands for firewalld or ufw. */
function managed(
  kind: Kind,
  facts: Facts<RuleFact>,
  nodes: readonly string[],
  ranges: readonly [string, string],
  now: readonly Cut[],
): Change[] {
  const each = <T>(rule: (ip: string, protocol: string, port: number) => T) =>
    nodes.flatMap((ip) => BETWEEN.map(([protocol, port]) => rule(ip, protocol, port)));
  const commands: string[] = [];
  if (kind === "firewalld") {
    const rules = split(facts.zones).flatMap((zone) =>
      each((ip, protocol, port) => `${zone} ${rich(facts, ip, protocol, port)}`),
    );
    const inZone = (rule: string, option: string) =>
      sh`--zone=${rule.replace(/ .*/, "")} --${option}-rich-rule=${rule.replace(/^\S+ /, "")}`;
    for (const when of ["", "--permanent"] as const) {
      const have = lines(facts[`rules${when}`]);
      commands.push(
        ...[
          ...rules.filter((rule) => !have.includes(rule)).map((rule) => inZone(rule, "add")),
          ...eachOf(ranges)
            .filter((range) => !split(facts[`sources${when}`]).includes(range))
            .map((range) => sh`--zone=trusted --add-source=${range}`),
          ...have
            .filter((rule) => RICH.test(rule) && !rules.includes(rule))
            .map((rule) => inZone(rule, "remove")),
        ].map((command) => ["firewall-cmd -q", when, command].filter(Boolean).join(" ")),
      );
    }
  } else if (kind === "ufw") {
    const ours = lines(facts.added).flatMap(
      (line) =>
        new RegExp(`^ufw ((?:route )?allow [\\w.:/ ]+) comment '${RULE_COMMENT}'$`).exec(line)?.[1] ?? [],
    );
    const rules = [
      ...each((ip, protocol, port) => sh`allow from ${ip} to any port ${port} proto ${protocol}`),
      ...eachOf(ranges).map((range) => sh`allow from ${range}`),
      ...["from", "to"].flatMap((end) => eachOf([ranges[0]]).map((pods) => sh`route allow ${end} ${pods}`)),
    ];
    const told = (rule: string, how: string) =>
      rule.startsWith("route ") ? `ufw route ${how}${rule.slice(5)}` : `ufw --force ${how} ${rule}`;
    // The first match decides, and ufw does not move an existing rule: a rule of ours behind a deny is deleted and
    // inserted again.
    const late = now.some(({ end }) => isOf(end.chain, kind)) && rules.every((rule) => ours.includes(rule));
    commands.push(
      ...ours.filter((rule) => late || !rules.includes(rule)).map((rule) => told(rule, "delete")),
      // ufw cannot insert at position 1 when there are no rules.
      ...rules
        .filter((rule) => late || !ours.includes(rule))
        .map(
          (rule) =>
            `${told(rule, "insert 1").replace("--force ", "")} comment ${RULE_COMMENT} 2>/dev/null || ufw ${rule} comment ${RULE_COMMENT}`,
        ),
    );
  }
  return commands.length ? [{ why: `${kind}: ${say(nodes)}`, sh: commands.join("\n"), seconds: 300 }] : [];
}

/** Our own table closes the ports, and rules in unmanaged chains open them, by a script at each start of the box. */
function tabled(
  facts: Facts<RuleFact>,
  nodes: readonly string[],
  ranges: readonly [string, string],
  foreign: boolean,
  open: readonly string[],
): Change[] {
  if (!facts.nft?.trim())
    throw new Refusal(
      kindOf(facts) === "nft"
        ? "Neither firewalld nor ufw runs here, and nft is missing: install nftables, then try again"
        : `Ports of k3s's are open to everybody: ${open.join("; ")}. Take that out, or install nftables, then try again`,
    );
  const script = scriptText(nodes, ipv4Of(ranges[0]));
  if (
    facts.script?.trimEnd() === script.trimEnd() &&
    facts.start?.trimEnd() === UNIT_TEXT.trimEnd() &&
    facts.booted?.trim() === "enabled\nactive" &&
    new RegExp(`^table inet ${TABLE} `, "m").test(facts.ruleset ?? "") &&
    !foreign
  )
    return [];
  return [
    {
      why: `nft: ${say(nodes)}`,
      sh: `# shellcheck disable=SC2016 # what is written is a script
{
${writeFile(SCRIPT, script, "755")}
}
${writeFile(UNIT, UNIT_TEXT)}
systemctl daemon-reload
systemctl enable k3s-firewall >/dev/null 2>&1
systemctl restart k3s-firewall`,
    },
  ];
}

/**
 * The firewall of a box with FIREWALL=yes: k3s's ports are open to the nodes and closed to the world; ssh is not
 * touched. On a box FIREWALL holds the known addresses, and -ADDRESS for a node that leaves.
 */
export const firewall = step({
  name: "firewall",
  options: ["PUBLIC_IP", "SERVER_ARGS", "FIREWALL"],
  look: (want) => (want.FIREWALL ? [clusterLook, firewallLook] : []),
  plan: (want, facts) => (want.FIREWALL ? firewallPlan(facts, admitted(want, facts), rangesOf(want)) : []),
});

/** The addresses to let in: the known ones and those of the cluster's nodes (IPv4 only). */
export function admitted(want: Settings, facts: Facts<"nodes">): string[] {
  const known = splitWords(want.FIREWALL);
  const joined = nodesOf(facts.nodes).flatMap(({ externalIp: ip = "" }) => (isIPv4(ip) ? ip : []));
  const all = [...known, ...joined, want.PUBLIC_IP];
  return [...new Set(all.filter((ip) => ip && !ip.startsWith("-") && !known.includes(`-${ip}`)))].sort();
}

const RICH_ERE = `rule (priority="-1000" )?family="ipv4" source address="[0-9.]+" port port="(6443|10250|51820)" protocol="(tcp|udp)" accept$`;

/** Prints `firewall` where there is something for `closeAgain`. */
export const closeLook = (
  ranges: readonly [string, string],
): string => sh`if [ -e ${UNIT} ] || [ -e ${SCRIPT} ] || ufw show added 2>/dev/null | grep -q "comment '${RULE_COMMENT}'"; then echo firewall; fi
if [ "$(firewall-cmd --state 2>/dev/null)" = running ]; then
  for when in '' --permanent; do
    firewall-cmd $when --list-all-zones 2>/dev/null | grep -qE ${`^[[:blank:]]+${RICH_ERE}|^ +sources:.* (${eachOf(ranges).join("|").replaceAll(".", "\\.")})( |$)`} && echo firewall
  done
fi`;

/** Shell that removes everything that `firewallPlan` added, for any of the three firewalls. */
export const closeAgain = (
  ranges: readonly [string, string],
): string => sh`if [ -e ${UNIT} ] || [ -e ${SCRIPT} ]; then
  systemctl disable --now k3s-firewall >/dev/null 2>&1 || :
  rm -f ${UNIT} ${SCRIPT}
  systemctl daemon-reload
fi
if ufw show added 2>/dev/null | grep -q "comment '${RULE_COMMENT}'"; then
  ufw show added | sed -n "s/^ufw \(.*\) comment '${RULE_COMMENT}'$/\1/p" | while read -r rule; do
    # shellcheck disable=SC2086
    case $rule in
      'route '*) ufw route delete \${rule#route } </dev/null ;;
      *) ufw --force delete $rule </dev/null ;;
    esac
  done
fi
if [ "$(firewall-cmd --state 2>/dev/null)" = running ]; then
  for when in '' --permanent; do
    for zone in $(firewall-cmd $when --get-zones); do
      firewall-cmd $when --zone="$zone" --list-rich-rules |
        grep -E ${`^${RICH_ERE}`} |
        while read -r rule; do firewall-cmd -q $when --zone="$zone" --remove-rich-rule="$rule" </dev/null; done
    done
    for range in ${eachOf(ranges)}; do firewall-cmd -q $when --zone=trusted --remove-source=$range 2>/dev/null || :; done
  done
fi`;

/** Runs the script at boot, and again after nftables.service has flushed the rules. */
export const UNIT_TEXT = `[Unit]
Description=Who reaches k3s's ports, by k3s-across-clouds
# These begin by flushing everything, and so does their reload.
After=nftables.service iptables.service netfilter-persistent.service ufw.service firewalld.service
PartOf=nftables.service iptables.service netfilter-persistent.service
ReloadPropagatedFrom=nftables.service iptables.service netfilter-persistent.service
Before=k3s.service k3s-agent.service

[Install]
WantedBy=multi-user.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=${SCRIPT} start
ExecReload=${SCRIPT} start
ExecStop=${SCRIPT} stop
`;

const set = (ranges: readonly (readonly [number, number])[]) =>
  `{ ${ranges.map(([from, to]) => (from === to ? from : `${from}-${to}`)).join(", ")} }`;

/** The script for a box without firewalld and ufw: our own table, and accept rules in chains that drop. */
export const scriptText = (nodes: readonly string[], pods: string): string => `#!/bin/sh
# Written by k3s-across-clouds, make firewall.
set -eu
# An accept in one table does not overrule a drop in another: where somebody's chain may drop, it gets our rules too.
# Not in firewalld's, ufw's and kube-proxy's: they write them anew.
tools=""; managed=""
for tool in iptables-nft iptables-legacy; do if command -v $tool >/dev/null; then tools="$tools $tool"; fi; done
if [ -z "$tools" ] && command -v iptables >/dev/null; then tools=iptables; fi
for tool in $tools; do
  case $("$tool" --version) in
    # It refuses a table that has what only nft can.
    *nf_tables*) if "$tool" -S INPUT >/dev/null 2>&1; then managed=yes; fi ;;
    # To ask about a legacy table loads it.
    *) grep -qsx filter /proc/net/ip_tables_names || tools=$(echo "$tools" | sed "s/ *$tool *$//") ;;
  esac
done
ours() {
  nft -a list ruleset 2>/dev/null | awk '/^table/ { table = $2 " " $3 } /^\\tchain/ { chain = $2 }
    /comment "${RULE_COMMENT}"/ && table != "inet ${TABLE}" { print table, chain, $NF }'
}
bases() { # input or forward
  nft list ruleset 2>/dev/null | awk -v hook="$1" -v managed="$managed" '
    /^table/ { table = $2 " " $3; other = table == "inet ${TABLE}" || $2 !~ /^(ip|inet)$/ || $3 ~ /^(firewalld|kube-proxy)$/ }
    /^\\tchain/ { chain = $2; base = 0 }
    $0 ~ "type filter hook " hook " " { base = !other && !(managed && table == "ip filter") }
    base && /policy drop;|[ \\t](drop|reject|jump|goto|vmap|queue)/ { print table, chain; base = 0 }'
}
for tool in $tools; do
  for chain in INPUT FORWARD; do
    "$tool" -S "$chain" 2>/dev/null | sed -n 's/^-A \\(.*--comment "*${RULE_COMMENT}"* .*\\)/\\1/p' | tr -d '"' | while read -r rule; do
      # shellcheck disable=SC2086
      "$tool" -w -D $rule
    done
  done
done
ours | while read -r family table chain handle; do nft delete rule "$family" "$table" "$chain" handle "$handle"; done
nft "table inet ${TABLE}; delete table inet ${TABLE}"
[ "$1" = start ] || exit 0
nft -f - <<'NFT'
table inet ${TABLE} {
	set nodes {
		type ipv4_addr
		elements = { ${nodes.join(", ")} }
	}
	chain input {
		type filter hook input priority -5; policy accept;
		iifname { "lo", ${INTERFACES.map((name) => `"${name}"`).join(", ")} } accept
		ip saddr @nodes tcp dport { 6443, 10250 } accept
		ip saddr @nodes udp dport 51820 accept
		tcp dport ${set(CLOSED.tcp)} drop
		udp dport ${set(CLOSED.udp)} drop
	}
}
NFT
nodes='${nodes.join(" ")}'
rule() { nft insert rule "$@" accept comment '"${RULE_COMMENT}"'; }
bases input | while read -r family table chain; do
  for card in ${INTERFACES.join(" ")}; do rule "$family" "$table" "$chain" iifname "$card"; done
  for ip in $nodes; do
    for port in ${BETWEEN.map(([protocol, port]) => `"${protocol} dport ${port}"`).join(" ")}; do
      # shellcheck disable=SC2086
      rule "$family" "$table" "$chain" ip saddr "$ip" $port
    done
  done
done
bases forward | while read -r family table chain; do
  for end in saddr daddr; do rule "$family" "$table" "$chain" ip $end ${pods}; done
done
for tool in $tools; do
  may_drop() {
    "$tool" -S "$1" 2>/dev/null | grep -v -e ' KUBE-' -e ' CNI-' -e ' FLANNEL' | grep -v -- '^-[AP].* ACCEPT$' >/dev/null &&
      ! "$tool" -S "$1" | grep -q -e ' ufw-before-' -e '_ZONES$'
  }
  put() { "$tool" -w -I "$@" -m comment --comment ${RULE_COMMENT} -j ACCEPT; }
  if may_drop INPUT; then
    for card in ${INTERFACES.join(" ")}; do put INPUT -i "$card"; done
    for ip in $nodes; do
      for port in ${BETWEEN.map(([protocol, port]) => `"-p ${protocol} --dport ${port}"`).join(" ")}; do
        # shellcheck disable=SC2086
        put INPUT -s "$ip" $port
      done
    done
  fi
  if may_drop FORWARD; then
    for end in -s -d; do put FORWARD $end ${pods}; done
  fi
done
`;

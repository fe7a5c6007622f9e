/** Rules in the kernel of a network namespace, and packets sent at them: what lib/k3s/firewall/ says of them must be so. */
import assert from "node:assert/strict";
import { drops, ends, type Packet } from "../../lib/k3s/firewall/chains.ts";
import { kernelLook } from "../../lib/k3s/firewall/kernel.ts";
import { iptables, nft } from "../../lib/k3s/firewall/rules.ts";

export type Backend = "nft" | "iptables-nft" | "iptables-legacy";

const BOX = "192.168.77.2";
/** Two nodes, a neighbour of one, and somebody whom no rule names. */
const SOURCES = ["198.51.100.11", "198.51.101.11", "198.51.100.99", "192.0.2.77"];
const WORLD = SOURCES.at(-1);
const PORTS = [
  ["tcp", 22],
  ["tcp", 6443],
  ["tcp", 10250],
  ["udp", 53],
  ["udp", 51820],
] as const;

const packet = (over: Partial<Packet>): Packet => ({
  ...{ hook: "input", family: "ip", iif: "eth0", oif: "", from: "", to: [BOX], protocol: "tcp", port: 0 },
  ...over,
});
const probes = [
  ...SOURCES.flatMap((from) =>
    PORTS.map(([protocol, port]) => ({
      key: `${from} . ${protocol} . ${port}`,
      packet: packet({ from: from === WORLD ? "" : from, protocol, port }),
    })),
  ),
  ...(["tcp", "udp"] as const).map((protocol) => ({
    key: `10.42.1.5 . ${protocol} . 80`,
    packet: packet({
      ...{ hook: "forward", iif: "cni0", oif: "flannel-wg", from: "10.42.1.5", to: ["10.42.2.6"] },
      ...{ protocol, port: 80 },
    }),
  })),
];

/** A box with a card, pods behind cni0, and a tunnel; the sources of all packets are elsewhere. */
export const SET_UP = `for n in judged sender pods; do ip netns add $n; done
ip link add eth0 netns judged type veth peer name eth0 netns sender
ip link add cni0 netns judged type veth peer name eth0 netns pods
ip link add flannel-wg netns judged type veth peer name wg0 netns pods
ip -n judged addr add ${BOX}/24 dev eth0
ip -n judged addr add 10.42.1.1/24 dev cni0
ip -n sender addr add 192.168.77.1/24 dev eth0
ip -n pods addr add 10.42.1.5/24 dev eth0
for ip in ${SOURCES.join(" ")}; do ip -n sender addr add $ip/32 dev eth0; done
for n in judged sender pods; do for i in lo eth0; do ip -n $n link set $i up; done; done
ip -n pods link set wg0 up
ip -n judged link set cni0 up; ip -n judged link set flannel-wg up
ip -n judged route add default via 192.168.77.1
ip -n judged route add 10.42.2.0/24 dev flannel-wg
ip -n pods route add default via 10.42.1.1
ip netns exec judged sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward; for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$f; done'
`;

/**
 * Loads the rules, looks as the scripts do, sends a packet of each kind, and prints which got through. A connection has
 * so many seconds to send its first packet; one that is dropped takes them all.
 */
export const tried = (rules: string, backend: Backend, seconds: number) => `cat >/run/judge.sh <<'JUDGE'
nft flush ruleset
for table in filter mangle raw; do
  grep -qsx $table /proc/net/ip_tables_names || continue
  for chain in PREROUTING INPUT FORWARD OUTPUT; do iptables-legacy -t $table -P $chain ACCEPT 2>/dev/null; done
  iptables-legacy -t $table -F; iptables-legacy -t $table -X
done
${backend === "nft" ? "nft -f -" : `${backend}-restore`} <<'RULES' || echo 'not loaded'
${rules}
RULES
fact() { echo "@$1"; }
${kernelLook}
echo @end
nft -f - <<'SEEN'
table inet seen {
  set s {
    type ipv4_addr . inet_proto . inet_service
    flags dynamic
    size 1000
  }
  chain i { type filter hook input priority 1000; meta l4proto { tcp, udp } add @s { ip saddr . meta l4proto . th dport } drop; }
  chain f { type filter hook forward priority 1000; meta l4proto { tcp, udp } add @s { ip saddr . meta l4proto . th dport } drop; }
}
SEEN
JUDGE
ip netns exec judged sh /run/judge.sh
for ip in ${SOURCES.join(" ")}; do
  ip -n sender route replace ${BOX}/32 dev eth0 src $ip
  ip netns exec sender bash -c '${PORTS.map(([protocol, port]) => (protocol === "udp" ? `echo x >/dev/udp/${BOX}/${port}` : `timeout ${seconds} bash -c ": </dev/tcp/${BOX}/${port}" 2>/dev/null &`)).join("\n")}
wait' 2>/dev/null || :
done
ip netns exec pods bash -c 'echo x >/dev/udp/10.42.2.6/80; timeout ${seconds} bash -c ": </dev/tcp/10.42.2.6/80"' 2>/dev/null || :
ip netns exec judged nft list set inet seen s
`;

/** Holds what was printed against the judgement. Answers how many packets were judged for certain. */
export function compared(rules: string, printed: string): number {
  // nft takes no rule that contradicts itself.
  if (printed.includes("not loaded")) return 0;
  const facts: Record<string, string> = {};
  for (const part of printed.slice(0, printed.indexOf("@end")).split(/^@/m).slice(1))
    facts[part.split("\n")[0] as string] = part.slice(part.indexOf("\n") + 1);
  const twice = [...(facts.iptables ?? "").matchAll(/^\*(\w+)/gm)].map(([, table]) => `ip ${table}`);
  const chains = [
    ...iptables(facts.iptables ?? "", "iptables"),
    ...iptables(facts["iptables-legacy"] ?? "", "iptables-legacy"),
    ...nft(facts.ruleset ?? "", twice),
  ];
  const seen = printed
    .slice(printed.indexOf("@end"))
    .replaceAll(/\s+/g, " ")
    .replaceAll(" domain", " 53")
    .replaceAll(" ssh", " 22")
    .replaceAll(" http", " 80");
  let certain = 0;
  for (const { key, packet } of probes) {
    const met = ends(chains, packet);
    const dropped = met.some(drops);
    const passes = met.every((list) => list.every(({ verdict }) => verdict === "accept"));
    if (!dropped && !passes) continue;
    certain++;
    assert.equal(
      passes,
      new RegExp(`[ {]${key.replaceAll(".", "\\.")}[ ,}]`).test(seen),
      `${key} of\n${rules}\n${JSON.stringify(met.flat().map(({ verdict, why }) => [verdict, why]))}\n${seen}\n${printed}`,
    );
  }
  return certain;
}

/** Numbers that look random, and are the same each time. */
export function dice(seed: number) {
  let state = seed;
  return (n: number) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return Math.floor((state / 2 ** 32) * n);
  };
}

const JUMPS = ["ACCEPT", "ACCEPT", "DROP", "REJECT", "RETURN", "LOG", "one", "two"];
function iptablesRule(roll: (n: number) => number, jumps: readonly string[]): string {
  const pick = <T>(list: readonly T[]): T => list[roll(list.length)] as T;
  const no = () => (roll(5) === 0 ? "! " : "");
  const parts = [
    () =>
      `${no()}-s ${pick([...SOURCES.slice(0, 3), "198.51.100.0/24", "198.51.0.0/16", "0.0.0.0/0", "10.42.0.0/16"])}`,
    () => `${no()}-d ${pick([BOX, "192.168.77.0/24", "10.42.0.0/16", "203.0.113.1"])}`,
    () => `${no()}-i ${pick(["eth0", "lo", "cni0", "eth+"])}`,
    () => "-m conntrack --ctstate RELATED,ESTABLISHED",
    () => "-m conntrack --ctstate NEW",
    () => `-m conntrack ${no()}--ctstate INVALID`,
    () => "-m addrtype --dst-type LOCAL",
    () => '-m comment --comment "do not ACCEPT -j DROP"',
    () => `-m iprange ${no()}--src-range 198.51.100.1-198.51.100.50`,
    () => "-m limit --limit 5/min",
    () => "-m mark --mark 0x4000/0x4000",
  ];
  const ports = [
    () => `-p tcp -m tcp ${no()}--dport ${pick(["22", "6443", "10250", "10000:11000", "80"])}`,
    () => `-p udp -m udp ${no()}--dport ${pick(["53", "51820", "51820:51821", "80"])}`,
    () => `-p tcp -m multiport ${no()}--dports ${pick(["22,6443", "6443,10250:10259", "80,443"])}`,
    () => "-p udp -m multiport --dports 53,51820,80",
    () => `-p tcp -m tcp ${pick(["--syn", "! --syn", "--tcp-flags ALL SYN", "--tcp-flags SYN,RST SYN,RST"])}`,
    () => `${no()}-p ${pick(["tcp", "udp", "icmp"])}`,
    () => "-p udp -m udp --sport 1024:65535",
  ];
  const some = [...(roll(3) ? [pick(ports)()] : []), ...(roll(3) ? [pick(parts)()] : [])];
  // An option counts once.
  return `${some.join(" ")} ${roll(12) ? "-j" : "-g"} ${pick(jumps)}`.replace(/-g ([A-Z]+)$/, "-j $1");
}

/** A filter table as iptables-restore takes it. */
export function iptablesText(roll: (n: number) => number): string {
  const rules = (chain: string, n: number, jumps: readonly string[]) =>
    Array.from({ length: n }, () => `-A ${chain} ${iptablesRule(roll, jumps)}`);
  return [
    "*filter",
    `:INPUT ${roll(2) ? "ACCEPT" : "DROP"} [0:0]`,
    `:FORWARD ${roll(2) ? "ACCEPT" : "DROP"} [0:0]`,
    ...[":OUTPUT ACCEPT [0:0]", ":one - [0:0]", ":two - [0:0]"],
    ...rules("INPUT", 2 + roll(5), JUMPS),
    ...rules("FORWARD", 1 + roll(4), JUMPS),
    ...rules("one", 1 + roll(4), [...JUMPS.slice(0, 6), "two"]),
    ...rules("two", 1 + roll(3), JUMPS.slice(0, 6)),
    "COMMIT",
  ].join("\n");
}

const VERDICTS = ["accept", "accept", "drop", "reject", "return", "jump one", "jump two", "goto two"];
function nftRule(roll: (n: number) => number, verdicts: readonly string[]): string {
  const pick = <T>(list: readonly T[]): T => list[roll(list.length)] as T;
  const no = () => (roll(5) === 0 ? "!= " : "");
  const parts = [
    () =>
      `ip saddr ${no()}${pick(["198.51.100.11", "198.51.100.0/24", "{ 198.51.100.11, 198.51.101.0/24 }", "198.51.100.5-198.51.100.20", "@ok", "0.0.0.0/0"])}`,
    () => `ip daddr ${no()}${pick([BOX, "10.42.0.0/16", "203.0.113.1"])}`,
    () => `${pick(["iifname", "iif"])} ${no()}${pick(['"eth0"', '"lo"', '{ "lo", "cni0" }'])}`,
    () => 'iifname "eth*"',
    () => `meta l4proto ${no()}${pick(["tcp", "udp", "{ tcp, udp }", "icmp"])}`,
    () => `tcp dport ${no()}${pick(["22", "6443", "{ 6443, 10250 }", "10000-11000", "@ports", "80"])}`,
    () => `udp dport ${no()}${pick(["53", "51820", "{ 53, 51820-51821 }", "80"])}`,
    () => `th dport ${no()}${pick(["{ 53, 6443 }", "51820"])}`,
    () =>
      `ct state ${pick(["new", "established,related", "invalid", "{ established, related }", "{ new, untracked }"])}`,
    () =>
      pick([
        "tcp flags & (fin|syn|rst|ack) != syn",
        "tcp flags & (fin|syn|rst|ack) == syn",
        "tcp flags syn",
        "tcp flags syn / fin,syn,rst,ack",
      ]),
    () => "meta nfproto ipv4",
    () => "ip protocol tcp",
    () => "limit rate 5/minute",
    () => "fib daddr type local",
    () => 'iifname . tcp dport { "eth0" . 6443, "cni0" . 80 }',
    () => "ip saddr . udp dport { 198.51.100.11 . 51820, 198.51.100.11 . 53 }",
  ];
  const some = Array.from({ length: roll(3) }, () => pick(parts)());
  const kinds = new Set(
    some.map((text) => /^(tcp|udp)|\. (tcp|udp)/.exec(text)?.[0].slice(-3)).filter(Boolean),
  );
  const tests = kinds.size > 1 ? some.slice(0, 1) : some;
  if (roll(6) === 0)
    return `${tests[0] ?? ""} ${pick([
      "ct state vmap { established : accept, related : accept, invalid : drop }",
      "tcp dport vmap { 22 : accept, 6443 : jump two, 10250 : drop }",
      'iifname vmap { "lo" : accept, "eth0" : jump two, "cni0" : accept }',
      "ip saddr vmap @who",
      "meta l4proto . th dport vmap { tcp . 6443 : accept, udp . 51820 : drop }",
    ])}`
      .replace(/^udp \S+ (?:!= )?(\{.*?\}|\S+) (?=tcp)/, "")
      .replace(/jump two/g, verdicts.includes("jump two") ? "jump two" : "drop");
  return `${tests.join(" ")} ${pick(["", "counter", 'log prefix "drop accept "'])} ${pick(verdicts)} ${roll(4) ? "" : 'comment "then drop"'}`;
}

/** Tables as nft takes them. */
export function nftText(roll: (n: number) => number): string {
  const table = (name: string, priority: number) => {
    const rules = (n: number, verdicts: readonly string[]) =>
      Array.from({ length: n }, () => `    ${nftRule(roll, verdicts)}`).join("\n");
    const policy = () => (roll(3) ? "accept" : "drop");
    return `table inet ${name} {
  set ok { type ipv4_addr; flags interval; elements = { 198.51.100.0/25, 203.0.113.7 }; }
  set ports { type inet_service; elements = { 6443, 10250, 10255 }; }
  map who { type ipv4_addr : verdict; elements = { 198.51.100.11 : accept, 198.51.100.99 : drop }; }
  chain two {
${rules(1 + roll(3), VERDICTS.slice(0, 5))}
  }
  chain one {
${rules(1 + roll(3), [...VERDICTS.slice(0, 5), "jump two"])}
  }
  chain in {
    type filter hook input priority ${priority}; policy ${policy()};
${rules(2 + roll(4), VERDICTS)}
  }
  chain through {
    type filter hook forward priority ${priority}; policy ${policy()};
${rules(1 + roll(3), VERDICTS)}
  }
  chain pre {
    type filter hook prerouting priority -150; policy accept;
${roll(3) ? "" : `    ${nftRule(roll, ["accept", "drop"])}`}
  }
}`;
  };
  return roll(3) ? table("mine", 0) : `${table("mine", 0)}\n${table("other", -10)}`;
}

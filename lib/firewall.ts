/** What a box's own firewall lets through, and what has to be in it: for firewalld, ufw, and nft where neither runs. */
import { sh, writeFile } from "./sh.ts";
import { type Change, type Facts, Refusal } from "./step.ts";

/** What nodes say to each other's hosts: API, kubelet, WireGuard. */
const BETWEEN = [
  ["tcp", "6443"],
  ["tcp", "10250"],
  ["udp", "51820"],
] as const;
/** What pods come by. */
const INTERFACES = ["cni0", "flannel.1", "flannel-wg"];
/**
 * The world has no business at these: the API and kubelets, and kube-proxy's, the scheduler's and the controller
 * manager's health and metrics, of which v1.17's 10251 and 10252 ask for no credentials; vxlan and WireGuard.
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
export const MARK = "k3s-across-clouds";

/** Facts about the firewall that runs, whichever it is; of nft only chains that stand at a hook, and ours. */
export const firewallLook = `state=$(firewall-cmd --state 2>/dev/null)
fact firewalld; echo "$state"
if [ "$state" = running ]; then
  card=$(ip -4 route show default | sed -n 's/.* dev \\([^ ]*\\).*/\\1/p' | head -n 1)
  zone=$(firewall-cmd --get-zone-of-interface="$card" 2>/dev/null) || zone=$(firewall-cmd --get-default-zone)
  fact zone; echo "$zone"
  fact target; firewall-cmd --permanent --zone="$zone" --get-target
  for when in '' --permanent; do
    fact "ports$when"; firewall-cmd $when --zone="$zone" --list-ports
    fact "rules$when"; firewall-cmd $when --zone="$zone" --list-rich-rules
    fact "sources$when"; firewall-cmd $when --zone=trusted --list-sources
  done
fi
fact ufw; ufw status verbose 2>/dev/null
fact added; ufw show added 2>/dev/null
fact nft; command -v nft
fact ruleset; nft list ruleset 2>/dev/null | awk '
  /^table / { print; next } /^\\tchain / { text = ""; here = 1 }
  here { text = text $0 "\\n" } /hook (input|forward) / { hooked = here }
  /^\\t}/ { if (hooked) printf "%s", text; here = hooked = 0 }'
fact script; cat ${SCRIPT} 2>/dev/null
fact start; cat ${UNIT} 2>/dev/null
fact booted; systemctl is-enabled k3s-firewall 2>/dev/null; systemctl is-active k3s-firewall 2>/dev/null
`;

type Kind = "firewalld" | "ufw" | "nft";
const kindOf = (facts: Facts): Kind =>
  facts.firewalld?.trim() === "running"
    ? "firewalld"
    : /^Status: active/m.test(facts.ufw ?? "")
      ? "ufw"
      : "nft";

const lines = (text = "") => text.split("\n").filter(Boolean);
const words = (text = "") => text.split(/\s+/).filter(Boolean);

/** A port of ours in a firewall's words: `10250/tcp`, `10248:10259/tcp` or `10248-10259/tcp`; both where no protocol. */
function isClosed(port: string): boolean {
  const [, from, to = from, protocol] = /^(\d+)(?:[:-](\d+))?(?:\/(tcp|udp))?$/.exec(port) ?? [];
  return (["tcp", "udp"] as const).some(
    (p) =>
      (!protocol || protocol === p) &&
      CLOSED[p].some(([low, high]) => Number(from) >= low && Number(to) <= high),
  );
}

/** Is the port open to everybody, in a list such as `22/tcp 10000-11000/tcp`? */
const open = (ports: readonly string[], protocol: string, port: string) =>
  ports.some((text) => {
    const [, from, to = from, p] = /^(\d+)(?:[:-](\d+))?(?:\/(tcp|udp))?$/.exec(text) ?? [];
    return (!p || p === protocol) && Number(from) <= Number(port) && Number(port) <= Number(to);
  });

const rich = (ip: string, protocol: string, port: string) =>
  `rule family="ipv4" source address="${ip}" port port="${port}" protocol="${protocol}" accept`;
const RICH =
  /^rule family="ipv4" source address="([\d.]+)" port port="(6443|10250|51820)" protocol="(tcp|udp)" accept$/;

/** ufw's rule as `ufw show added` has it, less the comment. */
const allow = (ip: string, protocol: string, port: string) =>
  `allow from ${ip} to any port ${port} proto ${protocol}`;
/** Rules of ufw: those with our comment, and those that open ports of k3s's to everybody. */
function ufwRules(facts: Facts) {
  const all = lines(facts.added).flatMap((line) => /^ufw (.*)$/.exec(line)?.[1] ?? []);
  const ours = all.flatMap(
    (rule) => new RegExp(`^(allow from [\\w.:/ ]+) comment '${MARK}'$`).exec(rule)?.[1] ?? [],
  );
  const others = all
    .filter((rule) => !rule.endsWith(`'${MARK}'`))
    .map((rule) => rule.replace(/ comment '.*'$/, ""));
  const world = others.flatMap((rule) => /^allow (\d\S*)$/.exec(rule)?.[1] ?? []);
  return { ours, others, world };
}

/** Base chains of nft that drop what they do not name, apart from iptables' own and those that we have been in. */
function dropping(ruleset = ""): { table: string; chain: string; hook: string; text: string }[] {
  const chains: { table: string; chain: string; hook: string; text: string }[] = [];
  let table = "";
  for (const block of ruleset.split(/\n(?=table |\tchain )/)) {
    table = /^table (\S+ \S+)/m.exec(block)?.[1] ?? table;
    const [, chain = "", hook = "", policy = ""] =
      /\tchain (\S+) \{\n\t\ttype filter hook (input|forward) [^;]*;(?: policy (\w+);)?/.exec(block) ?? [];
    const last = /^\t\t(?:counter packets \d+ bytes \d+ )?(drop|reject.*)$/m.test(block);
    if (chain && !table.endsWith(` ${TABLE}`) && (policy === "drop" || last))
      chains.push({ table, chain, hook, text: block });
  }
  return chains;
}
const isIptables = ({ chain }: { chain: string }) => chain === "INPUT" || chain === "FORWARD";
const TABLE = "k3s_across_clouds";

/**
 * What the box's firewall keeps from the cluster, a sentence each; none: it lets the cluster work.
 * @param nodes public addresses of nodes that must get through.
 * @param ranges networks of pods and services, where they must. @see k3s docs, "Requirements", "Operating Systems"
 */
export function blocked(facts: Facts, nodes: readonly string[], ranges: readonly string[]): string[] {
  const kind = kindOf(facts);
  const missing = (has: (ip: string, protocol: string, port: string) => boolean) =>
    BETWEEN.flatMap(([protocol, port]) => {
      const from = nodes.filter((ip) => !has(ip, protocol, port));
      return from.length ? [`${port}/${protocol} from ${from.join(", ")}`] : [];
    });
  if (kind === "firewalld") {
    const zone = facts.zone?.trim();
    if (facts.target?.trim() === "ACCEPT") return [];
    const sources = words(facts.sources);
    return [
      ...missing(
        (ip, protocol, port) =>
          open(words(facts.ports), protocol, port) || lines(facts.rules).includes(rich(ip, protocol, port)),
      ),
      ...ranges.filter((range) => !sources.includes(range)).map((range) => `everything from ${range}`),
    ].map((what) => `firewalld (zone ${zone}) drops ${what}`);
  }
  if (kind === "ufw") {
    if (/Default: allow \(incoming\)/.test(facts.ufw ?? "")) return [];
    const { ours, others, world } = ufwRules(facts);
    const has = (rule: string) => [...ours, ...others].includes(rule);
    return [
      ...missing((ip, protocol, port) => open(world, protocol, port) || has(allow(ip, protocol, port))),
      ...ranges.filter((range) => !has(`allow from ${range}`)).map((range) => `everything from ${range}`),
    ].map((what) => `ufw drops ${what}`);
  }
  return dropping(facts.ruleset)
    .filter(({ hook }) => (hook === "input" ? nodes : ranges).length)
    .filter(({ text }) => !text.includes(MARK) && !/51820|FLANNEL/.test(text))
    .map(({ table, chain, hook }) =>
      hook === "input"
        ? `nft's ${table} ${chain} drops what it does not name, and it does not name 51820/udp`
        : `nft's ${table} ${chain} drops what it does not name, and it does not name the pods' ${ranges[0]}`,
    );
}

/** Changes after which the nodes reach each other's k3s and the world does not. ssh is not touched. @throws {Refusal} */
export function firewallPlan(
  facts: Facts,
  nodes: readonly string[],
  ranges: readonly [string, string],
): Change[] {
  const kind = kindOf(facts);
  const what = `open 6443/tcp, 10250/tcp and 51820/udp to ${nodes.join(", ")}, and close k3s's ports to all others`;
  const wanted = (rule: (ip: string, protocol: string, port: string) => string) =>
    nodes.flatMap((ip) => BETWEEN.map(([protocol, port]) => rule(ip, protocol, port)));
  if (kind === "firewalld") {
    if (facts.target?.trim() === "ACCEPT")
      throw new Refusal(
        `firewalld's zone ${facts.zone?.trim()} accepts everything: give the box's card another zone, one that has ssh (firewall-cmd --permanent --zone=public --change-interface=…)`,
      );
    const zone = sh(`--zone=${facts.zone?.trim()}`);
    const commands = ["", "--permanent"].flatMap((when) => {
      const rules = lines(facts[`rules${when}`]);
      const rule = wanted(rich);
      return [
        ...rule.filter((r) => !rules.includes(r)).map((r) => `${zone} --add-rich-rule=${sh(r)}`),
        ...ranges
          .filter((range) => !words(facts[`sources${when}`]).includes(range))
          .map((range) => `--zone=trusted --add-source=${range}`),
        ...rules
          .filter((r) => RICH.test(r) && !rule.includes(r))
          .map((r) => `${zone} --remove-rich-rule=${sh(r)}`),
        ...words(facts[`ports${when}`])
          .filter(isClosed)
          .map((port) => `${zone} --remove-port=${sh(port)}`),
      ].map((command) => `firewall-cmd -q ${when} ${command}`.replace(/ +/g, " "));
    });
    return commands.length ? [{ why: `firewalld: ${what}`, sh: commands.join("\n"), seconds: 300 }] : [];
  }
  if (kind === "ufw") {
    if (/Default: allow \(incoming\)/.test(facts.ufw ?? ""))
      throw new Refusal(
        "ufw lets everything in by default: allow ssh (ufw allow OpenSSH), then ufw default deny incoming",
      );
    const { ours, world } = ufwRules(facts);
    const rules = [...wanted(allow), ...ranges.map((range) => `allow from ${range}`)];
    // `allow PORT` twice is one rule; new ones come first, so that nothing is cut off in between.
    const commands = [
      ...rules.filter((rule) => !ours.includes(rule)).map((rule) => `ufw ${rule} comment ${sh(MARK)}`),
      ...ours.filter((rule) => !rules.includes(rule)).map((rule) => `ufw --force delete ${rule}`),
      ...world.filter(isClosed).map((port) => `ufw --force delete allow ${sh(port)}`),
    ];
    return commands.length ? [{ why: `ufw: ${what}`, sh: commands.join("\n"), seconds: 300 }] : [];
  }
  if (!facts.nft?.trim())
    throw new Refusal(
      "Neither firewalld nor ufw runs here, and nft is missing: install nftables, then try again",
    );
  const iptables = dropping(facts.ruleset).filter((c) => isIptables(c) && !/51820|FLANNEL/.test(c.text));
  if (iptables.length)
    throw new Refusal(
      `iptables' own ${iptables.map(({ chain }) => chain).join(" and ")} drops: its rules are nobody's but yours; let through 6443/tcp, 10250/tcp and 51820/udp from ${nodes.join(", ")} and everything from ${ranges.join(" and ")} there`,
    );
  const script = scriptText(nodes, ranges[0]);
  const live = new RegExp(`^table inet ${TABLE} `, "m").test(facts.ruleset ?? "");
  const cut = dropping(facts.ruleset).some((c) => !isIptables(c) && !c.text.includes(MARK));
  if (
    facts.script?.trimEnd() === script.trimEnd() &&
    facts.start?.trimEnd() === UNIT_TEXT.trimEnd() &&
    facts.booted?.trim() === "enabled\nactive" &&
    live &&
    !cut
  )
    return [];
  return [
    {
      why: `nft: ${what}`,
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

const RICH_ERE = `rule family="ipv4" source address="[0-9.]+" port port="(6443|10250|51820)" protocol="(tcp|udp)" accept$`;

/** Prints `firewall` where there is something for `closeAgain`. */
export const closeLook = (
  ranges: readonly [string, string],
): string => `if [ -e ${UNIT} ] || [ -e ${SCRIPT} ] || ufw show added 2>/dev/null | grep -q "comment '${MARK}'"; then echo firewall; fi
if [ "$(firewall-cmd --state 2>/dev/null)" = running ]; then
  for when in '' --permanent; do
    firewall-cmd $when --list-all-zones 2>/dev/null | grep -qE '^[[:blank:]]+${RICH_ERE}|^ +sources:.* (${ranges.join("|").replaceAll(".", "\\.")})( |$)' && echo firewall
  done
fi`;

/** Shell that takes away all of it, and the files: what \`firewallPlan\` made, whichever firewall runs. */
export const closeAgain = (
  ranges: readonly [string, string],
): string => `if [ -e ${UNIT} ] || [ -e ${SCRIPT} ]; then
  systemctl disable --now k3s-firewall >/dev/null 2>&1 || :
  rm -f ${UNIT} ${SCRIPT}
  systemctl daemon-reload
fi
if ufw show added 2>/dev/null | grep -q "comment '${MARK}'"; then
  ufw show added | sed -n "s/^ufw \\(.*\\) comment '${MARK}'$/\\1/p" | while read -r rule; do
    # shellcheck disable=SC2086
    ufw --force delete $rule </dev/null
  done
fi
if [ "$(firewall-cmd --state 2>/dev/null)" = running ]; then
  for when in '' --permanent; do
    for zone in $(firewall-cmd $when --get-zones); do
      firewall-cmd $when --zone="$zone" --list-rich-rules |
        grep -E '^${RICH_ERE}' |
        while read -r rule; do firewall-cmd -q $when --zone="$zone" --remove-rich-rule="$rule" </dev/null; done
    done
    for range in ${ranges.join(" ")}; do firewall-cmd -q $when --zone=trusted --remove-source=$range 2>/dev/null || :; done
  done
fi`;

/** Sets up the script's work when the box starts, and again when nftables.service has flushed it. */
export const UNIT_TEXT = `[Unit]
Description=Who reaches k3s's ports, by k3s-across-clouds
# nftables.service begins by flushing everything, and so does its reload.
After=nftables.service
PartOf=nftables.service
ReloadPropagatedFrom=nftables.service
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

/** The script of a box without firewalld and ufw: a table of our own, and a way through chains that drop. */
export const scriptText = (nodes: readonly string[], pods: string): string => `#!/bin/sh
# Written by k3s-across-clouds, make firewall.
set -eu
# An accept in one table does not overrule a drop in another: where somebody's chain drops, it gets our rules too.
ours() {
  nft -a list ruleset | awk '/^table/ { table = $2 " " $3 } /^\\tchain/ { chain = $2 }
    /comment "${MARK}"/ && table != "inet ${TABLE}" { print table, chain, $NF }'
}
dropping() { # input or forward
  nft list ruleset | awk -v hook="$1" '/^table/ { table = $2 " " $3 } /^\\tchain/ { chain = $2; base = 0 }
    $0 ~ "type filter hook " hook " " { base = 1 } table == "inet ${TABLE}" || chain ~ /^(INPUT|FORWARD)$/ { base = 0 }
    base && (/policy drop;/ || /^\\t\\t(counter packets [0-9]+ bytes [0-9]+ )?(drop|reject.*)$/) { print table, chain; base = 0 }'
}
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
rule() { nft insert rule "$@" accept comment '"${MARK}"'; }
dropping input | while read -r family table chain; do
  rule "$family" "$table" "$chain" iifname '{ ${INTERFACES.join(", ")} }'
  rule "$family" "$table" "$chain" ip saddr '{ ${nodes.join(", ")} }' tcp dport '{ 6443, 10250 }'
  rule "$family" "$table" "$chain" ip saddr '{ ${nodes.join(", ")} }' udp dport 51820
done
dropping forward | while read -r family table chain; do
  rule "$family" "$table" "$chain" ip saddr ${pods}
  rule "$family" "$table" "$chain" ip daddr ${pods}
done
`;

/** Our own nft table, and rules in chains that drop, by a script that a unit runs at each start of the box. */

import { raw, sh, writeFile } from "../../sh.ts";
import { type Facts, type Printed, prints } from "../../step.ts";
import {
  ANYWHERE,
  CLOSED,
  devicePort,
  ENTRY,
  INTERFACES,
  openings,
  portsTo,
  RULE_COMMENT,
} from "./traffic.ts";

const SCRIPT = "/usr/local/sbin/k3s-firewall";
const UNIT = "/etc/systemd/system/k3s-firewall.service";
export const TABLE = "k3s_across_clouds";

export const ownLook = prints("script start booted")(sh`fact script; cat ${SCRIPT} 2>/dev/null
fact start; cat ${UNIT} 2>/dev/null
fact booted; systemctl is-enabled k3s-firewall 2>/dev/null; systemctl is-active k3s-firewall 2>/dev/null`);

/** Is the script with this text in place, and does it run? The table itself is the caller's to see. */
export const isWritten = (facts: Facts<Printed<typeof ownLook>>, script: string): boolean =>
  facts.script?.trimEnd() === script.trimEnd() &&
  facts.start?.trimEnd() === UNIT_TEXT.trimEnd() &&
  facts.booted?.trim() === "enabled\nactive";

/** Shell that puts a program and its unit in place. */
export const placed = (program: string, text: string, unit: string, unitText: string): string =>
  `# shellcheck disable=SC1003,SC2016 # what is written is a script
{
${writeFile(program, text, "755")}
}
${writeFile(unit, unitText)}`;

export const written = (script: string): string => `${placed(SCRIPT, script, UNIT, UNIT_TEXT)}
systemctl daemon-reload
systemctl enable k3s-firewall >/dev/null 2>&1
systemctl restart k3s-firewall`;

/** Is there something of it? */
export const LEFT_OF_OWN = sh`[ -e ${UNIT} ] || [ -e ${SCRIPT} ]`;

/** Takes it away. */
export const CLEAR_OWN = sh`if ${raw(LEFT_OF_OWN)}; then
  systemctl disable --now k3s-firewall >/dev/null 2>&1 || :
  rm -f ${UNIT} ${SCRIPT}
  systemctl daemon-reload
fi`;

/**
 * A unit that runs a program that loads rules: at boot, and again after nftables.service has flushed all of them.
 * @param order what else it is to come before.
 */
export const loadingUnit = (description: string, program: string, order = ""): string => `[Unit]
Description=${description}
# These begin by flushing everything, and so does their reload.
After=nftables.service iptables.service netfilter-persistent.service ufw.service firewalld.service
PartOf=nftables.service iptables.service netfilter-persistent.service
ReloadPropagatedFrom=nftables.service iptables.service netfilter-persistent.service
${order}
[Install]
WantedBy=multi-user.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=${program} start
ExecReload=${program} start
ExecStop=${program} stop
`;

export const UNIT_TEXT = loadingUnit(
  "Who reaches k3s's ports, by k3s-across-clouds",
  SCRIPT,
  "Before=k3s.service k3s-agent.service\n",
);

const closed = (protocol: string) =>
  `{ ${CLOSED.filter(([of]) => of === protocol)
    .map(([, from, to]) => (from === to ? from : `${from}-${to}`))
    .join(", ")} }`;

/** The script for a box without firewalld and ufw: our own table, and accept rules in chains that drop. */
export function scriptText(nodes: readonly string[], pods: string): string {
  const device = devicePort(nodes);
  const cards = device ? [...INTERFACES, ENTRY] : INTERFACES;
  const open = openings(nodes.filter((node) => !devicePort([node])));
  const toAll = open.filter(({ ip }) => ip === ANYWHERE);
  const sources = [...new Set(open.map(({ ip }) => ip))];
  const known = sources.filter((ip) => ip !== ANYWHERE);
  const ports = portsTo(nodes);
  const tcp = ports.flatMap(([protocol, port]) => (protocol === "tcp" ? port : []));
  const skip = toAll.length ? `\n      case "$ip $port" in "${ANYWHERE} "*10250) continue ;; esac` : "";
  return `#!/bin/sh
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
${known.length ? `\t\telements = { ${known.join(", ")} }\n` : ""}	}
	chain input {
		type filter hook input priority -5; policy accept;
		iifname { "lo", ${cards.map((name) => `"${name}"`).join(", ")} } accept
		ip saddr @nodes tcp dport { ${tcp.join(", ")} } accept
		ip saddr @nodes udp dport 51820 accept
${toAll.map(({ ip, protocol, port }) => `\t\tip saddr ${ip} ${protocol} dport ${port} accept\n`).join("")}${device ? `\t\tudp dport ${device} accept\n` : ""}		tcp dport ${closed("tcp")} drop
		udp dport ${closed("udp")} drop
	}
}
NFT
nodes='${sources.join(" ")}'
rule() { nft insert rule "$@" accept comment '"${RULE_COMMENT}"'; }
bases input | while read -r family table chain; do
  for card in ${cards.join(" ")}; do rule "$family" "$table" "$chain" iifname "$card"; done${device ? `\n  rule "$family" "$table" "$chain" udp dport ${device}` : ""}
  for ip in $nodes; do
    for port in ${ports.map(([protocol, port]) => `"${protocol} dport ${port}"`).join(" ")}; do${skip}
      # shellcheck disable=SC2086
      rule "$family" "$table" "$chain" ip saddr "$ip" $port
    done
  done
done
bases forward | while read -r family table chain; do
  for end in saddr daddr; do rule "$family" "$table" "$chain" ip $end ${pods}; done${device ? `\n  rule "$family" "$table" "$chain" iifname ${ENTRY}` : ""}
done
for tool in $tools; do
  may_drop() {
    "$tool" -S "$1" 2>/dev/null | grep -v -e ' KUBE-' -e ' CNI-' -e ' FLANNEL' | grep -v -- '^-[AP].* ACCEPT$' >/dev/null &&
      ! "$tool" -S "$1" | grep -q -e ' ufw-before-' -e '_ZONES$'
  }
  put() { "$tool" -w -I "$@" -m comment --comment ${RULE_COMMENT} -j ACCEPT; }
  if may_drop INPUT; then
    for card in ${cards.join(" ")}; do put INPUT -i "$card"; done${device ? `\n    put INPUT -p udp --dport ${device}` : ""}
    for ip in $nodes; do
      for port in ${ports.map(([protocol, port]) => `"-p ${protocol} --dport ${port}"`).join(" ")}; do${skip}
        # shellcheck disable=SC2086
        put INPUT -s "$ip" $port
      done
    done
  fi
  if may_drop FORWARD; then
    for end in -s -d; do put FORWARD $end ${pods}; done${device ? `\n    put FORWARD -i ${ENTRY}` : ""}
  fi
done
`;
}

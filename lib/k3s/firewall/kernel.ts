/** The kernel's rules, as far as a box shows them. */

import { sh } from "../../sh.ts";
import { type Facts, type Printed, prints } from "../../step.ts";
import type { Chain } from "./chains.ts";
import { iptables, nft } from "./rules.ts";

/** Longer rule sets are not read and not judged, in bytes. */
const LONG = 300_000;

/** Without nat, kube-proxy's table and k3s's own chains, of which there may be thousands. */
export const kernelLook = prints(
  "nft card ruleset iptables iptables-legacy ip6tables ip6tables-legacy iploaded ip6loaded",
)(sh`fact nft; command -v nft
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
  loaded=$(grep -sx -e raw -e mangle -e filter -e security /proc/net/\${family}_tables_names)
  fact "\${family}tables"; saved \${family}tables nft
  fact "\${family}tables-legacy"
  # To look at a table loads it.
  for table in raw mangle filter security; do
    for there in $loaded; do [ "$there" != $table ] || saved \${family}tables legacy -t $table; done
  done
  fact "\${family}loaded"; echo "$loaded"
done`);

type KernelFact = Printed<typeof kernelLook>;

const TABLES = ["iptables", "iptables-legacy", "ip6tables", "ip6tables-legacy"] as const;

/** Those of iptables are taken from iptables-save rather than from nft. */
export function chainsOf(facts: Facts<KernelFact>): Chain[] {
  const own = TABLES.flatMap((tool) => iptables(facts[tool] ?? "", tool));
  // Per chain: iptables-save omits chains that nft added to the same table.
  const twice = own.map(({ table, family, name }) => `${family} ${table.split(" ")[1] ?? "filter"} ${name}`);
  return [...own, ...nft(facts.ruleset ?? "", twice)];
}

/** Why the rules are not known: they are too long, or no tool here prints them. */
export function unread(facts: Facts<KernelFact>): string[] {
  const long = (["ruleset", ...TABLES] as const).some((name) => (facts[name]?.length ?? 0) >= LONG - 1);
  const hidden = facts.iploaded?.trim() && !facts["iptables-legacy"]?.trim();
  return [
    ...(long ? ["there are more rules here than are read"] : []),
    ...(hidden ? ["iptables-legacy has rules here that nothing shows: install iptables"] : []),
  ];
}

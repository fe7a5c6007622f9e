/** firewalld: rich rules for the nodes; the networks of pods and services, and the interface of devices, are trusted. */

import { sh } from "../../sh.ts";
import { type Facts, type Printed, prints } from "../../step.ts";
import { ANYWHERE, devicePort, ENTRY, eachOf, type FirewallManager, openings } from "./traffic.ts";

export const firewalldLook = prints(
  "firewalld firewalld-version zones rules rules--permanent sources sources--permanent",
)(sh`state=$(firewall-cmd --state 2>/dev/null)
fact firewalld; echo "$state"
if [ "$state" = running ]; then
  fact firewalld-version; firewall-cmd --version
  zones=$( (firewall-cmd --get-active-zones | sed -n 's/^\([^ ]*\).*/\1/p'; firewall-cmd --get-default-zone) | grep -vx -e trusted -e '' | sort -u)
  fact zones; echo "$zones"
  for when in '' --permanent; do
    fact "rules$when"; for zone in $zones; do firewall-cmd $when --zone="$zone" --list-rich-rules | sed "s/^/$zone /"; done
    fact "sources$when"; firewall-cmd $when --info-zone=trusted | sed -n 's/^  \(sources\|interfaces\): *//p'
  done
fi`);

type FirewalldFact = Printed<typeof firewalldLook>;

/** firewalld before 0.7 has no priorities among rich rules: those that deny come first. */
const early = (facts: Facts<FirewalldFact>) => !/^0\.[0-6]\./.test(facts["firewalld-version"] ?? "");
/** A rich rule of ours. The port of devices, which can be any, is written as a range: a rule of the user's is not. */
const RICH = `rule (priority="-1000" )?family="ipv4" source address="[0-9.]+(/0)?" port port="(6443|10250|51820|([0-9]+)-\\4)" protocol="(tcp|udp)" accept$`;

const OURS = new RegExp(`^\\S+ ${RICH}`);
const zoneOf = (rule: string) => rule.replace(/ .*/, "");

const split = (text = "") => text.split(/\s+/).filter(Boolean);

export const firewalld: FirewallManager<FirewalldFact> = {
  name: "firewalld",
  runs: ({ firewalld }) => firewalld?.trim() === "running",
  owns: ({ table, rules }) =>
    table === "nft inet firewalld" || rules.some(({ text }) => / (INPUT|FORWARD(_IN)?)_ZONES$/.test(text)),
  opens: ({ name }, facts) =>
    /^(filter_)?(INPUT|FORWARD(_IN)?)_ZONES(_SOURCE)?$/.test(name)
      ? ["pods"]
      : /^(filter_)?(IN|FWD)_/.test(name) &&
          split(facts.zones).some((zone) => name.endsWith(`_${zone}_${early(facts) ? "pre" : "allow"}`))
        ? ["nodes"]
        : [],
  letsAllIn: (facts) =>
    `${facts.rules}\n${facts["rules--permanent"]}`
      .split("\n")
      .some((rule) => OURS.test(rule) && rule.includes(`"${ANYWHERE}" port port="6443"`)),
  commands(facts, nodes, ranges) {
    const device = devicePort(nodes);
    const rules = split(facts.zones).flatMap((zone) =>
      openings(nodes).map(
        ({ ip, protocol, port }) =>
          `${zone} rule ${early(facts) ? 'priority="-1000" ' : ""}family="ipv4" source address="${ip}" port port="${port === device ? `${port}-${port}` : port}" protocol="${protocol}" accept`,
      ),
    );
    const networks = eachOf(ranges).map((range) => `trusted ${range}`);
    return (["", "--permanent"] as const).flatMap((when) => {
      const have = (facts[`rules${when}`] ?? "").split("\n");
      const sources = split(facts[`sources${when}`]).map((source) => `trusted ${source}`);
      const trusted = `trusted ${ENTRY}`;
      const isTrusted = sources.includes(trusted);
      const todo = {
        "add-rich-rule": rules.filter((rule) => !have.includes(rule)),
        "add-source": networks.filter((range) => !sources.includes(range)),
        "add-interface": device && !isTrusted ? [trusted] : [],
        "remove-interface": !device && isTrusted ? [trusted] : [],
        "remove-rich-rule": have.filter((rule) => OURS.test(rule) && !rules.includes(rule)),
      };
      // Each call starts python: one for all of a zone.
      return Object.entries(todo).flatMap(([option, zoned]) =>
        [...new Set(zoned.map(zoneOf))].map((zone) => {
          const own = zoned.filter((one) => zoneOf(one) === zone);
          const options = own.map((one) => `--${option}=${one.slice(zone.length + 1)}`);
          return sh`firewall-cmd -q ${[when, `--zone=${zone}`, ...options].filter(Boolean)}`;
        }),
      );
    });
  },
};

/** Prints `firewall` where it has rules of ours. */
export const leftInFirewalld = (ranges: readonly string[]): string =>
  sh`if [ "$(firewall-cmd --state 2>/dev/null)" = running ]; then
  for when in '' --permanent; do
    firewall-cmd $when --list-all-zones 2>/dev/null | grep -qE ${`^[[:blank:]]+${RICH}|^ +(sources|interfaces):.* (${[...eachOf(ranges), ENTRY].join("|").replaceAll(".", "\\.")})( |$)`} && echo firewall
  done
fi`;

/** Takes them away. */
export const clearFirewalld = (ranges: readonly string[]): string =>
  sh`if [ "$(firewall-cmd --state 2>/dev/null)" = running ]; then
  for when in '' --permanent; do
    for zone in $(firewall-cmd $when --get-zones); do
      firewall-cmd $when --zone="$zone" --list-rich-rules |
        grep -E ${`^${RICH}`} |
        while read -r rule; do firewall-cmd -q $when --zone="$zone" --remove-rich-rule="$rule" </dev/null; done
    done
    for range in ${eachOf(ranges)}; do firewall-cmd -q $when --zone=trusted --remove-source=$range 2>/dev/null || :; done
    firewall-cmd -q $when --zone=trusted --remove-interface=${ENTRY} 2>/dev/null || :
  done
fi`;

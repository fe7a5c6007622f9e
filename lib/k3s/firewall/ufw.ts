/** ufw: rules with our comment, before all others. */

import { raw, sh } from "../../sh.ts";
import { type Printed, prints } from "../../step.ts";
import {
  ANYWHERE,
  devicePort,
  ENTRY,
  eachOf,
  type FirewallManager,
  openings,
  RULE_COMMENT,
} from "./traffic.ts";

export const ufwLook = prints("ufw added")(sh`fact ufw; ufw status verbose 2>/dev/null
fact added; ufw show added 2>/dev/null`);

const RULE = /^ufw ((?:route )?allow [\w.:/ -]+?)(?: comment '(.*)')?$/gm;

/** The rules with their comments. ufw does not show a source or destination that is any. */
const rulesIn = (added: string) =>
  [...added.matchAll(RULE)].map(([, rule = "", comment]) => ({
    rule: rule.replace(/^allow (\d+)\/(\w+)$/, `allow from ${ANYWHERE} to any port $1 proto $2`),
    comment,
  }));
const oursIn = (added = "") =>
  rulesIn(added).flatMap(({ rule, comment }) => (comment === RULE_COMMENT ? rule : []));

export const ufw: FirewallManager<Printed<typeof ufwLook>> = {
  name: "ufw",
  runs: ({ ufw = "" }) => /^Status: active/m.test(ufw),
  owns: ({ rules }) => rules.some(({ text }) => / ufw-before-(input|forward)$/.test(text)),
  opens: ({ name }) => (/^ufw-user-(input|forward)$/.test(name) ? ["nodes", "pods"] : []),
  letsAllIn: ({ added }) => oursIn(added).some((rule) => rule.includes(`${ANYWHERE} to any port 6443 `)),
  commands({ added = "" }, nodes, ranges, blocked) {
    const ours = oursIn(added);
    // A rule of the user stays theirs: to add it again would only change its comment.
    const present = rulesIn(added).map(({ rule }) => rule);
    const rules = [
      ...openings(nodes).map(
        ({ ip, protocol, port }) => sh`allow from ${ip} to any port ${port} proto ${protocol}`,
      ),
      ...eachOf(ranges).map((range) => sh`allow from ${range}`),
      ...["from", "to"].flatMap((end) =>
        eachOf(ranges.slice(0, 1)).map((pods) => sh`route allow ${end} ${pods}`),
      ),
      ...(devicePort(nodes) ? [sh`allow in on ${ENTRY}`, sh`route allow in on ${ENTRY}`] : []),
    ];
    const told = (rule: string, how: string) =>
      rule.startsWith("route ") ? `ufw route ${how}${rule.slice(5)}` : `ufw ${how} ${rule}`;
    // The first match decides, and ufw does not move an existing rule: a rule of ours behind a deny is deleted and
    // inserted again.
    const late = blocked && rules.every((rule) => ours.includes(rule));
    return [
      ...ours
        .filter((rule) => late || !rules.includes(rule))
        .map((rule) => told(rule, "delete").replace(/^ufw delete/, "ufw --force delete")),
      // ufw cannot insert at position 1 when there are no rules.
      ...rules
        .filter((rule) => late || !present.includes(rule))
        .map(
          (rule) =>
            `${told(rule, "insert 1")} comment ${RULE_COMMENT} 2>/dev/null || ufw ${rule} comment ${RULE_COMMENT}`,
        ),
    ];
  },
};

/** Has it rules of ours? */
export const LEFT_IN_UFW = sh`ufw show added 2>/dev/null | grep -q "comment '${RULE_COMMENT}'"`;

/** Takes them away. */
export const CLEAR_UFW = sh`if ${raw(LEFT_IN_UFW)}; then
  ufw show added | sed -n "s/^ufw \(.*\) comment '${RULE_COMMENT}'$/\1/p" | while read -r rule; do
    # shellcheck disable=SC2086
    case $rule in
      'route '*) ufw route delete \${rule#route } </dev/null ;;
      *) ufw --force delete $rule </dev/null ;;
    esac
  done
fi`;

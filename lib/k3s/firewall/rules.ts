/** Reads the rules of the kernel, as `iptables-save` and `nft list ruleset` print them. */

import {
  all,
  any,
  type Chain,
  flagsAre,
  isCard,
  isOfType,
  isProtocol,
  not,
  type Packet,
  PRIORITIES,
  portIn,
  type Rule,
  sentFrom,
  sentTo,
  type Test,
  type Truth,
  type Verdict,
  within,
} from "./chains.ts";

/** Parses the output of `tool`-save, such as "ip6tables-legacy". KUBE- and CNI- chains are k3s's own and may be missing. */
export function iptables(text: string, tool: string): Chain[] {
  const chains: Chain[] = [];
  let table = "";
  for (const line of text.split("\n")) {
    table = /^\*(\w+)/.exec(line)?.[1] ?? table;
    const priority = PRIORITIES[table];
    if (priority === undefined) continue;
    const owner = table === "filter" ? tool : `${tool} ${table}`;
    const [, name, policy] = /^:(\S+) (\S+)/.exec(line) ?? [];
    if (name) {
      const hook = name.toLowerCase();
      const base = { hook, priority, policy: policy === "DROP" ? "drop" : "accept" } as const;
      const family = tool.startsWith("ip6") ? "ip6" : "ip";
      chains.push({ table: owner, family, name, rules: [], ...(policy === "-" ? {} : { base }) });
    }
    const [, to] = /^-A (\S+)/.exec(line) ?? [];
    chains.findLast((one) => one.name === to && one.table === owner)?.rules.push(...iptablesRules(line));
  }
  return chains;
}

/** Targets after which evaluation continues. */
const GOES_ON =
  /^(LOG|NFLOG|ULOG|MARK|CONNMARK|CLASSIFY|TCPMSS|TOS|DSCP|SET|CT|NOTRACK|TRACE|AUDIT|CHECKSUM|TTL|HL|LED|TCPOPTSTRIP|SECMARK|CONNSECMARK|IDLETIMER|RATEEST)$/;

const TARGETS: Record<string, Verdict> = { ACCEPT: "accept", DROP: "drop", REJECT: "drop", RETURN: "return" };

/** What an option or a key says of a packet, by its value, and for an option by the word after it. */
type Match = (packet: Packet, value: string, next: string) => Truth;

/** A table in which several names, separated by "|", stand for the same. */
const byName = (table: Record<string, Match>): Record<string, Match> =>
  Object.fromEntries(
    Object.entries(table).flatMap(([names, match]) => names.split("|").map((name) => [name, match])),
  );

/** For a list of values, any of which may match. */
const some =
  (match: (packet: Packet, value: string) => Truth): Match =>
  (packet, values) =>
    any(values.split(",").map((value) => match(packet, value)));

const OPTIONS = byName({
  "-m|--comment": () => true,
  "-s|--src-range": ({ from }, net) => within(from, net),
  "-d|--dst-range": sentTo,
  "-i": ({ iif }, name) => isCard(iif, name),
  "-o": ({ hook, oif }, name) => hook === "forward" && isCard(oif, name),
  "-p": isProtocol,
  "-f|--icmp-type|--icmpv6-type": () => false,
  "--dport|--dports": some(({ port }, ports) => portIn(port, ports)),
  "--sport|--sports": some(sentFrom),
  "--ports": some(({ port }, ports) => portIn(port, ports) || undefined),
  "--state|--ctstate": some((_, state) => state === "NEW"),
  "--ctstatus": some((_, status) => !/^(DNAT|ASSURED|EXPECTED|SEEN_REPLY)$/.test(status) && undefined),
  "--dst-type": some(isOfType),
  "--src-type": some((_, type) => type === "UNICAST"),
  "--tcp-flags": ({ protocol }, mask, flags) => protocol === "tcp" && flagsAre(mask, flags),
  "--syn": ({ protocol }) => protocol === "tcp",
});

/** A rule; none where it only counts, logs or marks. */
function iptablesRules(text: string): Rule[] {
  const words = text.match(/"(?:\\.|[^"\\])*"|\S+/g)?.slice(2) ?? [];
  const tests: Test[] = [];
  while (words.length) {
    const wrong = words[0] === "!";
    if (wrong) words.shift();
    const option = words.shift() ?? "";
    const end = words.findIndex((word) => /^(!|--?[a-z])/.test(word));
    const [value = "", next = ""] = words.splice(0, end < 0 ? words.length : end);
    if (option === "-j" || option === "-g")
      return GOES_ON.test(value)
        ? []
        : [{ text, tests, verdict: TARGETS[value] ?? { to: value, goto: option === "-g" } }];
    const test: Test = (packet) => OPTIONS[option]?.(packet, value, next);
    tests.push(wrong ? (packet) => not(test(packet)) : test);
  }
  return [];
}

/** Elements of the sets and maps of a table by their names. */
type Sets = Map<string, string>;

/** Parses the output of `nft list ruleset`, without the chains in `without` ("ip filter INPUT"). */
export function nft(text: string, without: readonly string[] = []): Chain[] {
  // The elements of a named set continue on further lines.
  const tables = text
    .replace(/,\n\s+/g, ", ")
    .split(/^table /m)
    .slice(1);
  return tables.flatMap((part) => {
    const [table, family] = /^(\S+) \S+/.exec(part) as unknown as [string, string];
    const blocks = part.split(/^\t(?!\t)/m).slice(1);
    if (blocks.some((block) => /^flags .*\bdormant\b/.test(block))) return [];
    const named = (kinds: string) =>
      blocks
        .map((block) => [new RegExp(`^(?:${kinds}) (\\S+) \\{`).exec(block)?.[1] ?? "", block] as const)
        .filter(([name]) => name);
    const sets: Sets = new Map(
      named("set|map").map(([name, block]) => [name, /^\t\telements = \{(.*)\}/m.exec(block)?.[1] ?? ""]),
    );
    return named("chain")
      .filter(([name]) => !without.includes(`${table} ${name}`))
      .map(([name, block]) => {
        const lines = [...block.matchAll(/^\t+(?!#|type |comment |flags |\})(\S.*)/gm)];
        const rules = lines.flatMap(([, line]) => nftRules(line as string, sets));
        return { table: `nft ${table}`, family, name, rules, ...baseOf(block) };
      });
  });
}

function baseOf(chain: string): Pick<Chain, "base"> {
  const [, hook, card, at = "", sign = "", more = 0, policy] =
    /^\t\ttype filter hook (\w+) (?:devices? (?:= )?(.*?) )?priority ([^ ;]+)(?: ([+-]) (\d+))?;(?: policy (\w+);)?/m.exec(
      chain,
    ) ?? [];
  if (!hook) return {};
  const priority = (PRIORITIES[at] ?? (Number(at) || 0)) + Number(`${sign}${more}`);
  return {
    base: { hook, priority, policy: policy === "drop" ? "drop" : "accept", ...(card ? { card } : {}) },
  };
}

/** Match keys by their first words; a longer one comes before its prefix. */
const KEYS = byName({
  "ip saddr": (p, word) => p.family === "ip" && within(p.from, word),
  "ip6 saddr": (p, word) => p.family === "ip6" && within(p.from, word),
  "ip daddr": (p, word) => p.family === "ip" && sentTo(p, word),
  "ip6 daddr": (p) => (p.family === "ip6" ? undefined : false),
  "ip protocol": (p, word) => p.family === "ip" && isProtocol(p, word),
  "ip6 nexthdr": (p, word) => p.family === "ip6" && isProtocol(p, word),
  "meta l4proto": isProtocol,
  "meta nfproto": (p, word) => word === { ip: "ipv4", ip6: "ipv6" }[p.family],
  "meta protocol|ether type": (p, word) => word === p.family,
  "meta pkttype": (_, word) => word === "host" || word === "unicast",
  "iif|iifname|meta iif|meta iifname": (p, word) => isCard(p.iif, word),
  "oif|oifname|meta oif|meta oifname": (p, word) => p.hook === "forward" && isCard(p.oif, word),
  "tcp dport": (p, word) => p.protocol === "tcp" && portIn(p.port, word),
  "udp dport": (p, word) => p.protocol === "udp" && portIn(p.port, word),
  "th dport": (p, word) => portIn(p.port, word),
  "tcp sport": (p, word) => p.protocol === "tcp" && sentFrom(p, word),
  "udp sport": (p, word) => p.protocol === "udp" && sentFrom(p, word),
  "tcp flags": (p, word) => p.protocol === "tcp" && /syn/.test(word),
  syn: (p, word) => p.protocol === "tcp" && word === "yes",
  "icmp type|icmp code|icmpv6 type": () => false,
  "ct state": (_, word) => word === "new",
  "ct status": (_, word) => !/^(dnat|snat|assured|seen-reply|expected)$/.test(word) && undefined,
  "ct direction": (_, word) => word === "original",
  "fib daddr type": isOfType,
});

/** Words that begin a match or a statement. */
const HEADS =
  /^(ip|ip6|meta|ether|iif|oif|iifname|oifname|tcp|udp|th|icmp|icmpv6|ct|fib|counter|log|limit|comment|accept|drop|reject|return|continue|jump|goto|queue|notrack|add|update|delete|set)$/;

const tokens = (text: string): string[] => text.match(/"[^"]*"|[{},]|[^\s{},"]+/g) ?? [];

/** Takes the words up to the closing brace. */
const braces = (words: string[]): string[] => words.splice(0, words.indexOf("}") + 1).slice(0, -1);

/** Takes the words up to the next match or statement. */
function skip(words: string[]) {
  while (words.length && !HEADS.test(words[0] as string)) if (words.shift() === "{") braces(words);
}

/** Takes a value, a list of them, or a set's; undefined where it is not understood. */
function valuesOf(words: string[], sets: Sets): string[] | undefined {
  const word = words.shift() ?? "";
  const set = word.startsWith("@") ? sets.get(word.slice(1)) : word;
  if (set === undefined || /^([&|^<>(]|$)/.test(word)) return undefined;
  const inner = word === "{" ? braces(words) : tokens(set);
  while (word !== "{" && words[0] === ",") inner.push(...words.splice(0, 2));
  if (["/", "&", "|", "<<"].includes(words[0] ?? "")) return undefined;
  const text = inner
    .join(" ")
    .replace(/ (timeout|expires) [\dsmhd]+(ms)?| (counter packets \d+ bytes \d+)| comment "[^"]*"/g, "");
  return text ? text.split(" , ") : [];
}

const verdictOf = (word: string, to: string): Verdict | undefined =>
  word === "continue"
    ? undefined
    : (TARGETS[word.toUpperCase()] ?? { to: word === "queue" ? "" : to, goto: word === "goto" });

/** A rule, or one for each verdict of a map; none where it only counts or logs. */
function nftRules(line: string, sets: Sets): Rule[] {
  const words = tokens(
    line.replace(
      /tcp flags (?:& \(?([a-z| ,]+?)\)? (==|!=) (0x0|[a-z]+(?: ?\| ?[a-z]+)*)|(!= )?([a-z,|]+) \/ ([a-z,|]+))/g,
      (_, mask = "", is = "", right = "", no = "", flags = "", of = "") =>
        `syn ${flagsAre(mask || of, right || flags) === !(is === "!=" || no) ? "yes" : "no"}`,
    ),
  );
  const tests: Test[] = [];
  const verdicts: { test?: Test; verdict: Verdict | undefined }[] = [];
  /** `KEY [. KEY …] [OPERATOR] VALUE`, or `… vmap MAP`; false where it is not understood. */
  const compare = (): boolean => {
    const keys: string[] = [];
    do {
      if (keys.length) words.shift();
      const key = [3, 2, 1].map((n) => words.slice(0, n).join(" ")).find((some) => Object.hasOwn(KEYS, some));
      if (!key) return false;
      keys.push(key);
      words.splice(0, key.split(" ").length);
    } while (words[0] === ".");
    const operator = /^(vmap|!=|==)$/.test(words[0] ?? "") ? words.shift() : "";
    const values = valuesOf(words, sets);
    const is = (value: string): Test => {
      const parts = value.split(" . ");
      return (p) => all(keys.map((key, i) => KEYS[key]?.(p, (parts[i] ?? "").trim(), "")));
    };
    if (!values) {
      tests.push(() => undefined);
      // Then every verdict of the map is possible.
      if (operator === "vmap") verdicts.push({ verdict: { to: "", goto: false } });
    } else if (operator === "vmap") {
      const cases = values.map((value) => {
        const [key = "", verdict = ""] = value.split(" : ");
        const [word = "", to = ""] = verdict.split(" ");
        return { key, test: is(key), verdict: verdictOf(word, to) };
      });
      const named = cases.filter(({ key }) => key !== "*");
      // The default case applies where no other does, wherever it stands.
      const other: Test = (p) => not(any(named.map(({ test }) => test(p))));
      verdicts.push(...cases.map((one) => (one.key === "*" ? { ...one, test: other } : one)));
    } else {
      const one: Test = (p) => any(values.map((value) => is(value)(p)));
      // The protocol decides before the port does: udp is not "anything but tcp's 22".
      const [, protocol] = /^(tcp|udp) /.exec(keys[0] as string) ?? [];
      tests.push(
        operator === "!=" ? (p) => (protocol && p.protocol !== protocol ? false : not(one(p))) : one,
      );
    }
    return true;
  };
  while (words.length) {
    const [head = "", next = ""] = words;
    const [effect] =
      /^(counter|log|comment|notrack|(meta|ct) \S+ set)(?= |$)/.exec(words.slice(0, 3).join(" ")) ?? [];
    if (effect) {
      words.splice(0, effect.split(" ").length);
      skip(words);
    } else if (/^(accept|drop|reject|return|continue|jump|goto|queue)$/.test(head)) {
      verdicts.push({ verdict: verdictOf(head, next) });
      // `with tcp reset`, `with icmp type …` are not matches.
      words.splice(0, next !== "with" ? 1 : words[3] === "type" ? 5 : 4);
      skip(words);
    } else if (!compare()) {
      words.shift();
      skip(words);
      tests.push(() => undefined);
    }
  }
  const text = line.replace(/ ?counter packets \d+ bytes \d+/, "").trim();
  return verdicts.flatMap(({ test, verdict }) =>
    verdict ? [{ text, tests: test ? [...tests, test] : tests, verdict }] : [],
  );
}

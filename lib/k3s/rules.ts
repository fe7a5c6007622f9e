/** Simulates the kernel's packet filter: what the rules of nft and iptables do with a packet, in their order. */

/** The first packet of a connection, as it arrives at the box. */
export interface Packet {
  hook: "input" | "forward";
  family: "ip" | "ip6";
  /** Its interface; "" if not known. */
  iif: string;
  oif: string;
  /** Its source; "" for an address that no rule names. */
  from: string;
  /** Its possible destinations; none if not known. */
  to: readonly string[];
  protocol: "tcp" | "udp";
  port: number;
}

/** undefined: not known here. */
type Truth = boolean | undefined;
type Test = (packet: Packet) => Truth;
type Verdict = "accept" | "drop" | "return" | "unclear" | { to: string; goto: boolean };

interface Rule {
  text: string;
  tests: Test[];
  /** A verdict map has several, each with its own test; a rule that only counts or logs has none. */
  ends: readonly (readonly [Test | undefined, Verdict])[];
}

export interface Chain {
  /** Its owner, such as "iptables" or "nft inet filter", which distinguishes chains of the same name. */
  table: string;
  name: string;
  rules: Rule[];
  /** Only for base chains. */
  base?: { hook: string; priority: number; policy: "accept" | "drop"; card?: string };
}

/** A possible outcome for a packet in one chain, and its reason. */
export interface End {
  verdict: "accept" | "drop" | "unclear";
  /** The rule or policy, as the user can find it. */
  why: string;
  /** Is no other outcome possible? */
  sure: boolean;
  chain: Chain;
}

const not = (truth: Truth): Truth => (truth === undefined ? undefined : !truth);
const any = (list: readonly Truth[]): Truth =>
  list.includes(true) ? true : list.includes(undefined) ? undefined : false;
const all = (list: readonly Truth[]): Truth => not(any(list.map(not)));

const number = (ip: string) => ip.split(".").reduce((sum, part) => sum * 256 + Number(part), 0);

/** Is the address in `net`: an address, ADDRESS/BITS, ADDRESS/MASK or FROM-TO? */
function within(ip: string, net: string): Truth {
  const [low = "", high = ""] = net.split("-");
  const [base = "", bits = "32"] = low.split("/");
  if (net.includes(":")) return ip.includes(":") ? (ip === net ? true : undefined) : /^::\/0$/.test(net);
  if (!/^\d+(\.\d+){3}$/.test(base)) return undefined;
  const size = bits.includes(".") ? 2 ** 32 - number(bits) : 2 ** (32 - Number(bits));
  const first = Math.floor(number(base) / size) * size;
  const last = high ? number(high) : first + size - 1;
  // A range of at least this size does not count as naming an address.
  if (!ip) return last - first >= 2 ** 32 - 1 ? true : last - first >= 2 ** 25 ? undefined : false;
  return first <= number(ip) && number(ip) <= last;
}

const SERVICES: Record<string, number> = { ssh: 22, domain: 53, http: 80, https: 443 };
/** Is the port in `ports`: a port, FROM-TO or FROM:TO? */
function portIn(port: number, ports: string): Truth {
  const [from, to = from] = ports.split(/[:-]/).map((word) => SERVICES[word] ?? Number(word || 0));
  if (Number.isNaN(from) || Number.isNaN(to)) return undefined;
  return (from as number) <= port && port <= ((to as number) || 65_535);
}
/** Nodes send from an arbitrary high port; a stranger can choose the port. */
const sentFrom = ({ from }: Packet, ports: string): Truth =>
  portIn(1024, ports) && portIn(65_535, ports)
    ? true
    : from && Number(ports.split(/[:-]/).at(-1) || 65_535) < 1024
      ? false
      : undefined;

function card(have: string, word: string): Truth {
  const name = word.replaceAll('"', "");
  if (!have && !/^(lo|cni|flannel|veth|docker|br-|wg|tun|tailscale)/.test(name)) return undefined;
  return /[*+]$/.test(name) ? have.startsWith(name.slice(0, -1)) : have === name;
}

const isProtocol = (packet: Packet, word: string): Truth =>
  word === "all" ||
  word === "0" ||
  word === packet.protocol ||
  word === { tcp: "6", udp: "17" }[packet.protocol];
const sentTo = (packet: Packet, word: string): Truth => {
  const each = packet.to.map((ip) => within(ip, word));
  return each.length && each.every((truth) => truth === each[0]) ? each[0] : undefined;
};
/** Address types by the routing table: LOCAL for packets to the box itself. */
const kindOf = (packet: Packet, word: string): Truth =>
  /^local$/i.test(word)
    ? packet.hook === "input"
    : /^unicast$/i.test(word)
      ? packet.hook === "forward"
      : false;
/** Does a SYN match the TCP flags `right` under `mask`? */
const flagsAre = (mask: string, right: string): boolean => {
  const [m, r] = [mask, right].map((text) => new Set(text.toLowerCase().match(/[a-z]+/g) ?? []));
  const has = (set: Set<string> | undefined, flag: string) => Boolean(set?.has(flag) || set?.has("all"));
  return [...(r ?? [])].every((flag) => flag === "syn" || flag === "none") && has(m, "syn") === has(r, "syn");
};

/** Parses the output of iptables-save (either backend). KUBE- and CNI- chains are k3s's own and may be missing. */
export function iptables(text: string, family: "ip" | "ip6", name: string): Chain[] {
  const chains: Chain[] = [];
  let table = "";
  for (const line of text.split("\n")) {
    const [, named] = /^\*(\w+)/.exec(line) ?? [];
    if (named) table = named;
    const priority = { raw: -300, mangle: -150, filter: 0, security: 50 }[table];
    if (priority === undefined) continue;
    const at = `${family === "ip6" ? name.replace("ip", "ip6") : name}${table === "filter" ? "" : ` ${table}`}`;
    const [, chain, policy] = /^:(\S+) (\S+)/.exec(line) ?? [];
    if (chain)
      chains.push({
        ...{ table: at, name: chain, rules: [] },
        ...(policy === "-"
          ? {}
          : { base: { hook: chain.toLowerCase(), priority, policy: policy === "DROP" ? "drop" : "accept" } }),
      });
    const [, to] = /^-A (\S+)/.exec(line) ?? [];
    const into = chains.findLast((one) => one.name === to && one.table === at);
    if (into) into.rules.push(iptablesRule(line.replace(/^\[\d+:\d+\] /, ""), family));
  }
  return chains;
}

const TARGETS: Record<string, Verdict> = { ACCEPT: "accept", DROP: "drop", REJECT: "drop", RETURN: "return" };
/** iptables targets after which evaluation continues. */
const GOES_ON =
  /^(LOG|NFLOG|ULOG|MARK|CONNMARK|CLASSIFY|TCPMSS|TOS|DSCP|SET|CT|NOTRACK|TRACE|AUDIT|CHECKSUM|TTL|HL|LED|TCPOPTSTRIP|SECMARK|CONNSECMARK|IDLETIMER|RATEEST)$/;
const UNCLEAR = /^(QUEUE|NFQUEUE|SYNPROXY|TPROXY|TARPIT|STEAL|CLUSTERIP|ECHO|MIRROR)$/;

function iptablesRule(text: string, family: "ip" | "ip6"): Rule {
  const words = text.match(/"(?:\\.|[^"\\])*"|\S+/g)?.slice(2) ?? [];
  const tests: Test[] = [(p) => p.family === family];
  const ends: [undefined, Verdict][] = [];
  while (words.length) {
    let word = words.shift() as string;
    const wrong = word === "!";
    if (wrong) word = words.shift() ?? "";
    const values: string[] = [];
    while (words.length && !/^(!|--?[a-z])/.test(words[0] as string)) values.push(words.shift() as string);
    const value = values[0] ?? "";
    const list = value.split(",");
    const some =
      (test: (p: Packet, one: string) => Truth): Test =>
      (p) =>
        any(list.map((one) => test(p, one)));
    const test = ((): Test | null => {
      switch (word) {
        case "-m":
        case "--comment":
          return null;
        case "-j":
        case "-g":
          if (!GOES_ON.test(value))
            ends.push([
              undefined,
              TARGETS[value] ?? (UNCLEAR.test(value) ? "unclear" : { to: value, goto: word === "-g" }),
            ]);
          words.length = 0;
          return null;
        case "-s":
          return (p) => within(p.from, value);
        case "-d":
          return (p) => sentTo(p, value);
        case "--src-range":
          return (p) => within(p.from, value);
        case "--dst-range":
          return (p) => sentTo(p, value);
        case "-i":
          return (p) => card(p.iif, value);
        case "-o":
          return (p) => (p.hook === "input" ? false : card(p.oif, value));
        case "-p":
          return (p) => isProtocol(p, value);
        case "-f":
        case "--icmp-type":
        case "--icmpv6-type":
          return () => false;
        case "--dport":
        case "--dports":
          return some((p, one) => portIn(p.port, one));
        case "--sport":
        case "--sports":
          return some(sentFrom);
        case "--ports":
          return some((p, one) => portIn(p.port, one) || undefined);
        case "--state":
        case "--ctstate":
          return () => list.includes("NEW");
        case "--ctstatus":
          return () =>
            list.every((one) => /^(DNAT|ASSURED|EXPECTED|SEEN_REPLY)$/.test(one)) ? false : undefined;
        case "--dst-type":
          return some(kindOf);
        case "--src-type":
          return some((_, one) => one === "UNICAST");
        case "--tcp-flags":
          return (p) => p.protocol === "tcp" && flagsAre(value, values[1] ?? "");
        case "--syn":
          return (p) => p.protocol === "tcp";
        default:
          return () => undefined;
      }
    })();
    if (test) tests.push(wrong ? (p) => not(test(p)) : test);
  }
  return { text, tests, ends };
}

const PRIORITIES: Record<string, number> = {
  ...{ raw: -300, mangle: -150, dstnat: -100, filter: 0, security: 50, srcnat: 100 },
};

/** Parses the output of `nft list ruleset`, without the chains in `without` ("ip filter INPUT"). */
export function nft(text: string, without: readonly string[] = []): Chain[] {
  const chains: Chain[] = [];
  let table = "";
  let asleep = false;
  let chain: Chain | undefined;
  let sets: Record<string, string> = {};
  // The elements of a named set continue on further lines.
  for (const line of text.replace(/,\n\s+/g, ", ").split("\n")) {
    const [, at] = /^table (\S+ \S+)/.exec(line) ?? [];
    const [, kind, name = ""] = /^\t(chain|set|map) (\S+) \{/.exec(line) ?? [];
    if (at) [table, sets, asleep] = [at, {}, false];
    if (/^\tflags .*\bdormant\b/.test(line)) asleep = true;
    if (at || kind || /^\t?\}/.test(line)) chain = undefined;
    if (asleep) continue;
    if (kind === "chain" && !without.includes(`${table} ${name}`)) {
      chain = { table: `nft ${table}`, name, rules: [] };
      chains.push(chain);
    } else if (kind && kind !== "chain") sets[name] = "";
    const [, elements] = /^\t\telements = \{(.*)\}/.exec(line) ?? [];
    const last = Object.keys(sets).at(-1);
    if (elements !== undefined && last) sets[last] = elements;
    if (!chain || kind) continue;
    const [, type, hook = "", device, priority = "", policy] =
      /^\t\ttype (\w+) hook (\w+) (?:devices? (?:= )?(.*?) )?priority ([^;]*);(?: policy (\w+);)?/.exec(
        line,
      ) ?? [];
    if (type === "filter")
      chain.base = {
        ...{ hook, priority: priorityOf(priority), policy: policy === "drop" ? "drop" : "accept" },
        ...(device ? { card: device } : {}),
      };
    else if (!type && line.trim() && !/^\t\t(#|comment |flags )/.test(line))
      chain.rules.push(nftRule(line.trim(), table.split(" ")[0] as string, sets));
  }
  return chains;
}

function priorityOf(text: string): number {
  const [, name, sign, more] = /^([a-z]+)(?: ([+-]) (\d+))?$/.exec(text) ?? [];
  return name ? (PRIORITIES[name] ?? 0) + Number(`${sign ?? ""}${more ?? 0}`) : Number(text);
}

/** Match keys by their first words; a longer one comes before its prefix. */
const KEYS: Record<string, (p: Packet, word: string) => Truth> = {
  "ip saddr": (p, word) => p.family === "ip" && within(p.from, word),
  "ip6 saddr": (p, word) => p.family === "ip6" && within(p.from, word),
  "ip daddr": (p, word) => p.family === "ip" && sentTo(p, word),
  "ip6 daddr": (p) => (p.family === "ip6" ? undefined : false),
  "ip protocol": (p, word) => p.family === "ip" && isProtocol(p, word),
  "ip6 nexthdr": (p, word) => p.family === "ip6" && isProtocol(p, word),
  "meta l4proto": isProtocol,
  "meta nfproto": (p, word) => word === { ip: "ipv4", ip6: "ipv6" }[p.family],
  "meta protocol": (p, word) => word === p.family,
  "ether type": (p, word) => word === p.family,
  "meta pkttype": (_, word) => word === "host" || word === "unicast",
  "meta iifname": (p, word) => card(p.iif, word),
  "meta oifname": (p, word) => p.hook === "forward" && card(p.oif, word),
  "tcp dport": (p, word) => p.protocol === "tcp" && portIn(p.port, word),
  "udp dport": (p, word) => p.protocol === "udp" && portIn(p.port, word),
  "th dport": (p, word) => portIn(p.port, word),
  "tcp sport": (p, word) => p.protocol === "tcp" && sentFrom(p, word),
  "udp sport": (p, word) => p.protocol === "udp" && sentFrom(p, word),
  "tcp flags": (p, word) => p.protocol === "tcp" && /syn/.test(word),
  "icmp type": () => false,
  "icmpv6 type": () => false,
  "icmp code": () => false,
  "ct state": (_, word) => word === "new",
  "ct status": (_, word) => (/^(dnat|snat|assured|seen-reply|expected)$/.test(word) ? false : undefined),
  "ct direction": (_, word) => word === "original",
  "fib daddr type": kindOf,
};
for (const name of ["iif", "oif"])
  for (const key of [name, `${name}name`, `meta ${name}`])
    KEYS[key] ??= KEYS[`meta ${name}name`] as (typeof KEYS)[string];

const VERDICTS = /^(accept|drop|reject|return|continue|jump|goto|queue|vmap)$/;
const HEADS =
  /^(ip|ip6|meta|ether|iif|oif|iifname|oifname|tcp|udp|th|icmp|icmpv6|ct|fib|counter|log|limit|comment|accept|drop|reject|return|continue|jump|goto|queue|notrack|masquerade|redirect|dnat|snat|add|update|delete|set)$/;

function nftRule(text: string, family: string, sets: Record<string, string>): Rule {
  const words =
    text
      .replace(
        /tcp flags (?:& \(?([a-z| ,]+?)\)? (==|!=) ([a-z| ]+|0x0)(?= |$)|(!= )?([a-z,|]+) \/ ([a-z,|]+))/g,
        (_, mask = "", is = "", right = "", no = "", flags = "", of = "") =>
          `syn ${flagsAre(mask || of, right || flags) === !(is === "!=" || no) ? "yes" : "no"}`,
      )
      .match(/"[^"]*"|[{},]|[^\s{},"]+/g) ?? [];
  const tests: Test[] = family === "ip" || family === "ip6" ? [(p) => p.family === family] : [];
  const ends: [Test | undefined, Verdict][] = [];
  const braces = (): string[] => {
    const inner: string[] = [];
    for (let depth = 1; words.length && depth; ) {
      const word = words.shift() as string;
      depth += word === "{" ? 1 : word === "}" ? -1 : 0;
      if (depth) inner.push(word);
    }
    return inner;
  };
  const rest = () => {
    while (words.length && !HEADS.test(words[0] as string)) if (words.shift() === "{") braces();
  };
  /** `KEY [. KEY …] [OPERATOR] VALUE`, or `… vmap MAP`; false where it is not understood. */
  const compare = (): boolean => {
    const keys: string[] = [];
    for (;;) {
      const key = [3, 2, 1].map((n) => words.slice(0, n).join(" ")).find((some) => Object.hasOwn(KEYS, some));
      if (!key) return false;
      keys.push(key);
      words.splice(0, key.split(" ").length);
      if (words[0] !== ".") break;
      words.shift();
    }
    const verdicts = words[0] === "vmap";
    const wrong = words[0] === "!=";
    if (verdicts || wrong || words[0] === "==") words.shift();
    const values = valuesOf();
    if (!values) {
      tests.push(() => undefined);
      // Then every verdict of the map is possible.
      if (verdicts) ends.push([undefined, "unclear"]);
      return true;
    }
    const is = (value: string): Test => {
      const parts = value.split(" . ");
      return (p) => all(keys.map((key, i) => KEYS[key]?.(p, (parts[i] ?? "").trim())));
    };
    if (verdicts) {
      const named: Test[] = [];
      for (const value of values) {
        const [key = "", verdict = ""] = value.split(" : ");
        // The default case applies where no other does, wherever it stands.
        const test = key === "*" ? (p: Packet) => not(any(named.map((one) => one(p)))) : is(key);
        if (key !== "*") named.push(test);
        const [what, to = ""] = verdict.split(" ");
        const end = verdictOf(what as string, to);
        if (end) ends.push([test, end]);
      }
    } else {
      // `protocol` decides before the port does: udp is not "anything but tcp's 22".
      const base = /^(tcp|udp) /.exec(keys[0] as string)?.[1];
      const one: Test = (p) => any(values.map((value) => is(value)(p)));
      tests.push(wrong ? (p) => (base && p.protocol !== base ? false : not(one(p))) : one);
    }
    return true;
  };
  /** A value, a list of them, or a set's. */
  const valuesOf = (): string[] | undefined => {
    const word = words.shift();
    if (word === undefined || /^[&|^<>(]/.test(word)) return undefined;
    const list = word.startsWith("@") ? sets[word.slice(1)]?.match(/"[^"]*"|[{},]|[^\s{},"]+/g) : undefined;
    if (word.startsWith("@") && sets[word.slice(1)] === undefined) return undefined;
    const inner = word === "{" ? braces() : word.startsWith("@") ? (list ?? []) : [word];
    while (word !== "{" && words[0] === ",") inner.push(words.shift() as string, words.shift() as string);
    if (["/", "&", "|", "<<"].includes(words[0] ?? "")) return undefined;
    const text = inner
      .join(" ")
      .replace(/ (timeout|expires) [\dsmhd]+(ms)?| (counter packets \d+ bytes \d+)| comment "[^"]*"/g, "");
    return text ? text.split(" , ") : [];
  };
  while (words.length) {
    const head = words[0] as string;
    if (head === "syn") {
      const yes = words.splice(0, 2)[1] === "yes";
      tests.push((p) => p.protocol === "tcp" && yes);
    } else if (/^(counter|log|comment|notrack|masquerade|redirect|dnat|snat)$/.test(head)) {
      words.shift();
      rest();
    } else if (/^(meta|ct) \S+ set /.test(words.slice(0, 4).join(" "))) {
      words.splice(0, 3);
      rest();
    } else if (VERDICTS.test(head) && head !== "vmap") {
      words.shift();
      const end = verdictOf(head, words[0] ?? "");
      if (end) ends.push([undefined, end]);
      // `with tcp reset`, `with icmp type …` are not matches.
      if (words[0] === "with") words.splice(0, words[2] === "type" ? 4 : 3);
      rest();
    } else if (!compare()) {
      words.shift();
      rest();
      tests.push(() => undefined);
    }
  }
  return { text: text.replace(/ ?counter packets \d+ bytes \d+/, "").trim(), tests, ends };
}

const verdictOf = (word: string, to: string): Verdict | undefined =>
  word === "accept" || word === "drop" || word === "return"
    ? word
    : word === "reject"
      ? "drop"
      : word === "jump" || word === "goto"
        ? { to, goto: word === "goto" }
        : word === "queue"
          ? "unclear"
          : undefined;

/** k3s's own chains only concern k3s's own traffic. */
const K3S = /^(KUBE|CNI)-/;

type Way = { verdict: End["verdict"] | "return"; why: string };

/** All possible outcomes for a packet in a chain, in rule order. */
function walk(chain: Chain, chains: readonly Chain[], packet: Packet, depth = 0): Way[] {
  const ways: Way[] = [];
  for (const rule of chain.rules) {
    const matches = all(rule.tests.map((test) => test(packet)));
    if (matches === false) continue;
    for (const [test, verdict] of rule.ends) {
      const here = all([matches, test ? test(packet) : true]);
      if (here === false) continue;
      let came: Way[];
      if (typeof verdict === "string") came = [{ verdict, why: rule.text }];
      else {
        const next = chains.find((one) => one.table === chain.table && one.name === verdict.to);
        came = next
          ? depth < 16
            ? walk(next, chains, packet, depth + 1)
            : [{ verdict: "unclear", why: rule.text }]
          : K3S.test(verdict.to)
            ? [{ verdict: "return", why: "" }]
            : [
                { verdict: "unclear", why: rule.text },
                { verdict: "return", why: "" },
              ];
      }
      const back = typeof verdict === "object" && !verdict.goto;
      const goesOn = back && came.some((way) => way.verdict === "return");
      ways.push(...(back ? came.filter((way) => way.verdict !== "return") : came));
      if (here === true && !goesOn) return ways;
    }
  }
  return [...ways, { verdict: "return", why: "" }];
}

/** The base chains that a packet passes on its way in, with its possible outcomes at each. */
export function ends(chains: readonly Chain[], packet: Packet): End[][] {
  const hooks = ["ingress", "prerouting", packet.hook];
  const order = ({ base }: Chain) => hooks.indexOf(base?.hook as string) * 1e6 + (base?.priority ?? 0);
  return chains
    .filter(
      ({ base, table }) =>
        base &&
        hooks.includes(base.hook) &&
        (!/^nft ip6? /.test(table) || table.startsWith(`nft ${packet.family} `)) &&
        (!table.startsWith("ip6") || packet.family === "ip6") &&
        (!table.startsWith("ipt") || packet.family === "ip"),
    )
    .filter(({ base }) => !base?.card || !packet.iif || base.card.includes(packet.iif))
    .sort((a, b) => order(a) - order(b))
    .map((chain) => {
      const policy = chain.base?.policy as "accept" | "drop";
      const ways = walk(chain, chains, packet).map(({ verdict, why }) =>
        verdict === "return" ? { verdict: policy, why: `policy ${policy}` } : { verdict, why },
      );
      const sure = ways.every(({ verdict }) => verdict === ways[0]?.verdict);
      return ways.map((way) => ({ ...way, sure, chain }));
    });
}

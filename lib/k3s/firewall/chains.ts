/** Simulates the kernel's packet filter: what chains of rules do with a packet, in their order. */

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
export type Truth = boolean | undefined;
export type Test = (packet: Packet) => Truth;
export type Verdict = "accept" | "drop" | "return" | { to: string; goto: boolean };

export interface Rule {
  text: string;
  tests: readonly Test[];
  verdict: Verdict;
}

export interface Chain {
  /** Its owner, such as "iptables" or "nft inet filter", which distinguishes chains of the same name. */
  table: string;
  family: string;
  name: string;
  rules: Rule[];
  /** Only for base chains. */
  base?: { hook: string; priority: number; policy: "accept" | "drop"; card?: string };
}

/** A possible outcome for a packet in one chain, and the rule or policy behind it, as the user can find it. */
export interface End {
  verdict: "accept" | "drop" | "unclear";
  why: string;
  chain: Chain;
}

export const PRIORITIES: Record<string, number> = {
  ...{ raw: -300, mangle: -150, dstnat: -100, filter: 0, security: 50, srcnat: 100 },
};

export const not = (truth: Truth): Truth => (truth === undefined ? undefined : !truth);
export const any = (list: readonly Truth[]): Truth =>
  list.includes(true) ? true : list.includes(undefined) ? undefined : false;
export const all = (list: readonly Truth[]): Truth => not(any(list.map(not)));

const number = (ip: string) => ip.split(".").reduce((sum, part) => sum * 256 + Number(part), 0);

/** Is the address in `net`: an address, ADDRESS/BITS, ADDRESS/MASK or FROM-TO? */
export function within(ip: string, net: string): Truth {
  const [low = "", high = ""] = net.split("-");
  const [base = "", bits = "32"] = low.split("/");
  if (net.includes(":")) return ip.includes(":") ? ip === net || undefined : net === "::/0";
  if (!/^\d+(\.\d+){3}$/.test(base)) return undefined;
  const size = bits.includes(".") ? 2 ** 32 - number(bits) : 2 ** (32 - Number(bits));
  const first = Math.floor(number(base) / size) * size;
  const last = high ? number(high) : first + size - 1;
  // A range of at least this size does not count as naming an address.
  if (!ip) return last - first >= 2 ** 32 - 1 || (last - first >= 2 ** 25 ? undefined : false);
  return first <= number(ip) && number(ip) <= last;
}

const SERVICES: Record<string, number> = { ssh: 22, domain: 53, http: 80, https: 443 };
/** Is the port in `ports`: a port, FROM-TO or FROM:TO? */
export function portIn(port: number, ports: string): Truth {
  const [from = 0, to = from] = ports.split(/[:-]/).map((word) => SERVICES[word] ?? Number(word));
  return Number.isNaN(from + to) ? undefined : from <= port && port <= (to || 65_535);
}
/** Nodes send from an arbitrary high port; a stranger can choose the port. */
export const sentFrom = ({ from }: Packet, ports: string): Truth =>
  portIn(1024, ports) && portIn(65_535, ports)
    ? true
    : from && Number(ports.split(/[:-]/).at(-1) || 65_535) < 1024
      ? false
      : undefined;

export const sentTo = (packet: Packet, net: string): Truth => {
  const [first, ...others] = packet.to.map((ip) => within(ip, net));
  return others.every((truth) => truth === first) ? first : undefined;
};

export function isCard(have: string, word: string): Truth {
  const name = word.replaceAll('"', "");
  if (!have && !/^(lo|cni|flannel|veth|docker|br-|wg|tun|tailscale|k3s-)/.test(name)) return undefined;
  return /[*+]$/.test(name) ? have.startsWith(name.slice(0, -1)) : have === name;
}

export const isProtocol = ({ protocol }: Packet, word: string): Truth =>
  ["all", "0", protocol, { tcp: "6", udp: "17" }[protocol]].includes(word);

/** Address types by the routing table: LOCAL for packets to the box itself. */
export const isOfType = ({ hook }: Packet, word: string): Truth =>
  word.toLowerCase() === { input: "local", forward: "unicast" }[hook];

/** Does a SYN match the TCP flags `right` under `mask`? */
export const flagsAre = (mask: string, right: string): boolean => {
  const flags = (text: string) => text.toLowerCase().match(/[a-z]+/g) ?? [];
  const syn = (text: string) => flags(text).some((flag) => flag === "syn" || flag === "all");
  return flags(right).every((flag) => flag === "syn" || flag === "none") && syn(mask) === syn(right);
};

type Way = { verdict: End["verdict"] | "return"; why: string };

/** All possible outcomes for a packet in a chain, in rule order. */
function walk(chain: Chain, chains: readonly Chain[], packet: Packet, depth = 0): Way[] {
  const ways: Way[] = [];
  for (const { text: why, tests, verdict } of chain.rules) {
    const matches = all(tests.map((test) => test(packet)));
    if (matches === false) continue;
    if (typeof verdict === "string") ways.push({ verdict, why });
    else {
      const next = chains.find(
        ({ table, name }) => depth < 16 && table === chain.table && name === verdict.to,
      );
      const came: Way[] = next ? walk(next, chains, packet, depth + 1) : [{ verdict: "return", why }];
      // k3s's own chains only concern k3s's own traffic.
      if (!next && !/^(KUBE|CNI)-/.test(verdict.to)) came.unshift({ verdict: "unclear", why });
      ways.push(...came.filter((way) => verdict.goto || way.verdict !== "return"));
      if (!verdict.goto && came.some((way) => way.verdict === "return")) continue;
    }
    if (matches) return ways;
  }
  return [...ways, { verdict: "return", why: "" }];
}

/** The base chains that a packet passes on its way in, with its possible outcomes at each. */
export function ends(chains: readonly Chain[], packet: Packet): End[][] {
  const hooks = ["ingress", "prerouting", packet.hook];
  const order = ({ base }: Chain) => hooks.indexOf(base?.hook as string) * 1e6 + (base?.priority ?? 0);
  return chains
    .filter(
      ({ base, family }) =>
        base &&
        hooks.includes(base.hook) &&
        (!family.startsWith("ip") || family === packet.family) &&
        (!base.card || !packet.iif || base.card.includes(packet.iif)),
    )
    .sort((a, b) => order(a) - order(b))
    .map((chain) => {
      const policy = chain.base?.policy as "accept" | "drop";
      return walk(chain, chains, packet).map(({ verdict, why }) =>
        verdict === "return" ? { verdict: policy, why: `policy ${policy}`, chain } : { verdict, why, chain },
      );
    });
}

/** Do all outcomes drop it? */
export const drops = (list: readonly End[]): boolean => list.every(({ verdict }) => verdict === "drop");

/** kube-proxy: rules by which packets to a service's address go to one of its pods, as v1.17.6's and v1.36.3's were recorded. */
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { type Generation, run } from "./common.ts";
import type { Node } from "./nodes.ts";

/** Where a pod answers. */
export const HTTP = 8080;
/** Addresses by name, in the cluster's domain. */
export const ADDRESSES = {
  "kubernetes.default": "10.43.0.1",
  "kube-dns.kube-system": "10.43.0.10",
  /** All pods: each says its node's name. */
  "hello.default": "10.43.0.80",
};
const PODS = "10.42.0.0/16";

export type Service = {
  name: string;
  protocol: "tcp" | "udp";
  ip: string;
  port: number;
  endpoints: string[];
};

export const podAddress = (podCidr: string): string => podCidr.replace(/\.0\/24$/, ".2");

/** @param api endpoints of the API, `ADDRESS:PORT`. */
export function services(nodes: Node[], api: string[]): Service[] {
  const up = nodes
    .filter(
      (node) =>
        node.spec.podCIDR && node.status.conditions.some((c) => c.type === "Ready" && c.status === "True"),
    )
    .sort((a, b) => (a.metadata.name < b.metadata.name ? -1 : 1));
  const at = (of: Node[], port: number) => of.map((node) => `${podAddress(node.spec.podCIDR)}:${port}`);
  const isServer = ({ metadata: { labels } }: Node) =>
    ["master", "control-plane"].some((role) => `node-role.kubernetes.io/${role}` in labels);
  const dns = {
    ip: ADDRESSES["kube-dns.kube-system"],
    port: 53,
    endpoints: at(up.filter(isServer).slice(0, 1), 53),
  };
  const kubernetes = { ip: ADDRESSES["kubernetes.default"], port: 443, endpoints: api };
  const hello = { ip: ADDRESSES["hello.default"], port: 80, endpoints: at(up, HTTP) };
  return [
    { name: "default/kubernetes:https", protocol: "tcp", ...kubernetes },
    { name: "kube-system/kube-dns:dns", protocol: "udp", ...dns },
    { name: "kube-system/kube-dns:dns-tcp", protocol: "tcp", ...dns },
    { name: "default/hello:http", protocol: "tcp", ...hello },
  ];
}

/** The first 16 digits of base 32, as in names of kube-proxy's chains. */
function digest(text: string): string {
  const bits = [...createHash("sha256").update(text).digest()]
    .map((byte) => byte.toString(2).padStart(8, "0"))
    .join("");
  return Array.from(
    { length: 16 },
    (_, i) => "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[Number.parseInt(bits.slice(5 * i, 5 * i + 5), 2)],
  ).join("");
}

const PORTALS = '-m comment --comment "kubernetes service portals" -j KUBE-SERVICES';
const NEW = `-m conntrack --ctstate NEW ${PORTALS}`;
/** By table; kube-proxy puts them in front of what is there. */
const JUMPS = {
  nat: [
    `PREROUTING ${PORTALS}`,
    `OUTPUT ${PORTALS}`,
    'POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
  ],
  filter: [
    `FORWARD ${NEW}`,
    'FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',
    `OUTPUT ${NEW}`,
  ],
};

/** Rules for iptables-restore without the jumps to them, by table. */
export function iptables(gen: Generation, all: Service[]): { nat: string[]; filter: string[] } {
  const old = gen === "old";
  const comment = (text: string) => `-m comment --comment "${text}"`;
  const unlessOld = (text: string) => (old ? "" : `${comment(text)} `);
  const nat = [
    "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
    ...(old
      ? [
          `-A KUBE-POSTROUTING ${comment("kubernetes service traffic requiring SNAT")} -m mark --mark 0x4000/0x4000 -j MASQUERADE`,
        ]
      : [
          "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
          "-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0",
          `-A KUBE-POSTROUTING ${comment("kubernetes service traffic requiring SNAT")} -j MASQUERADE --random-fully`,
        ]),
  ];
  const filter = [
    "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
    `-A KUBE-FORWARD ${comment("kubernetes forwarding rules")} -m mark --mark 0x4000/0x4000 -j ACCEPT`,
    ...(old
      ? ["source", "destination"].map(
          (end) =>
            `-A KUBE-FORWARD -${end[0]} ${PODS} ${comment(`kubernetes forwarding conntrack pod ${end} rule`)} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT`,
        )
      : [
          `-A KUBE-FORWARD ${comment("kubernetes forwarding conntrack rule")} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT`,
        ]),
  ];
  for (const { name, protocol, ip, port, endpoints } of all) {
    const chain = `KUBE-SVC-${digest(name + protocol)}`;
    const to = (text: string) =>
      `-d ${ip}/32 -p ${protocol} ${comment(`${name} ${text}`)} -m ${protocol} --dport ${port}`;
    if (!endpoints.length) {
      filter.push(`-A KUBE-SERVICES ${to("has no endpoints")} -j REJECT --reject-with icmp-port-unreachable`);
      continue;
    }
    const marked = `-A ${old ? "KUBE-SERVICES" : chain} ! -s ${PODS} ${to("cluster IP")} -j KUBE-MARK-MASQ`;
    nat.push(marked, `-A KUBE-SERVICES ${to("cluster IP")} -j ${chain}`);
    endpoints.forEach((endpoint, i) => {
      const sep = `KUBE-SEP-${digest(name + protocol + endpoint)}`;
      const left = endpoints.length - i;
      const share = left > 1 ? `-m statistic --mode random --probability ${(1 / left).toFixed(10)} ` : "";
      nat.push(
        `-A ${chain} ${unlessOld(`${name} -> ${endpoint}`)}${share}-j ${sep}`,
        `-A ${sep} -s ${endpoint.split(":")[0]}/32 ${unlessOld(name)}-j KUBE-MARK-MASQ`,
        `-A ${sep} -p ${protocol} ${unlessOld(name)}-m ${protocol} -j DNAT --to-destination ${endpoint}`,
      );
    });
  }
  const last = comment("kubernetes service nodeports; NOTE: this must be the last rule in this chain");
  nat.push(`-A KUBE-SERVICES ${last} -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS`);
  return { nat, filter };
}

/** The same for `nft -f`. */
export function nftables(all: Service[]): string {
  const chains: string[] = [];
  const known: string[] = [];
  const empty: string[] = [];
  for (const { name, protocol, ip, port, endpoints } of all) {
    const id = (text: string) =>
      `${digest(name + protocol + text).slice(0, 8)}-${name.replace(":", `/${protocol}/`)}`;
    const key = `${ip} . ${protocol} . ${port}`;
    if (!endpoints.length) {
      empty.push(`${key} : goto reject-chain`);
      continue;
    }
    const to = endpoints.map((endpoint) => `endpoint-${id(endpoint)}__${endpoint.replace(":", "/")}`);
    endpoints.forEach((endpoint, i) => {
      chains.push(
        `chain ${to[i]} { ip saddr ${endpoint.split(":")[0]} jump mark-for-masquerade; meta l4proto ${protocol} dnat to ${endpoint}; }`,
      );
    });
    chains.push(
      `chain service-${id("")} { ip daddr ${ip} ${protocol} dport ${port} ip saddr != ${PODS} jump mark-for-masquerade; numgen random mod ${to.length} vmap { ${to.map((chain, i) => `${i} : goto ${chain}`).join(", ")} }; }`,
    );
    known.push(`${key} : goto service-${id("")}`);
  }
  const map = (name: string, elements: string[]) =>
    `map ${name} { type ipv4_addr . inet_proto . inet_service : verdict; ${elements.length ? `elements = { ${elements.join(", ")} };` : ""} }`;
  return `table ip kube-proxy
delete table ip kube-proxy
table ip kube-proxy {
chain mark-for-masquerade { mark set mark or 0x4000; }
chain masquerading { mark and 0x4000 == 0 return; mark set mark xor 0x4000; masquerade fully-random; }
chain reject-chain { reject; }
${chains.join("\n")}
${map("service-ips", known)}
${map("no-endpoint-services", empty)}
chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
chain filter-forward { type filter hook forward priority -110; ct state new jump service-endpoints-check; }
chain filter-output { type filter hook output priority -110; ct state new jump service-endpoints-check; }
chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
chain nat-output { type nat hook output priority -100; jump services; }
chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }
}
`;
}

let written = "";

/** Writes them, if they differ from what was written last or are no longer there. */
export function writeRules(gen: Generation, all: Service[], nft: boolean): void {
  const saved = run("iptables-save");
  if (nft) {
    if (saved.includes("KUBE-SERVICES"))
      restore(
        saved.split("\n").filter((line) => !line.includes("KUBE-")),
        [],
      );
    const rules = nftables(all);
    if (rules === written && spawnSync("nft", ["list", "table", "ip", "kube-proxy"]).status === 0) return;
    given("nft", ["-f", "-"], rules);
    written = rules;
    return;
  }
  spawnSync("nft", ["delete", "table", "ip", "kube-proxy"]);
  const rules = iptables(gen, all);
  const missing = (table: "nat" | "filter") => JUMPS[table].filter((jump) => !saved.includes(`-A ${jump}`));
  const same = JSON.stringify(rules) === written;
  if (same && !missing("nat").length && !missing("filter").length) return;
  const lines = (["nat", "filter"] as const).flatMap((table) => {
    const used = rules[table].flatMap((rule) => rule.match(/KUBE-[A-Z0-9-]+/g) as string[]);
    const jumped = JUMPS[table].map((jump) => jump.split(" ").at(-1) as string);
    const chains = new Set([...used, ...jumped]);
    const stale =
      table === "nat"
        ? [...saved.matchAll(/^:(KUBE-(?:SVC|SEP)-\S+)/gm)]
            .map((m) => m[1] as string)
            .filter((chain) => !chains.has(chain))
        : [];
    return [
      `*${table}`,
      ...[...chains, ...stale].map((chain) => `:${chain} - [0:0]`),
      ...missing(table).map((jump) => `-I ${jump}`),
      ...rules[table],
      ...stale.map((chain) => `-X ${chain}`),
      "COMMIT",
    ];
  });
  restore(lines, ["--noflush"]);
  written = JSON.stringify(rules);
}

export const restore = (lines: string[], options: string[]): void =>
  given("iptables-restore", options, `${lines.join("\n")}\n`);

function given(command: string, args: string[], input: string): void {
  const said = spawnSync(command, args, { input, encoding: "utf8" });
  if (said.status !== 0) throw new Error(`${command}: ${said.error ?? said.stderr}`);
}

/** The table of the settings and their valid values. The only file of lib/*.ts that knows k3s. */
import { BlockList, isIP } from "node:net";
import { type Arg, lastOf, parseArgs, secretIn } from "./args.ts";
import { withValues } from "./env-file.ts";
import { boxNames, splitWords } from "./text.ts";
import { isToken, TOKEN_FORM } from "./token.ts";

export interface Setting {
  /** The default. */
  value: string;
  secret?: true;
  /** The same for all boxes: it cannot be set for one box. */
  shared?: true;
  /** Other programs use the variable too: from the environment it is read only if it was given to make. */
  ambient?: true;
  /** Written by a script: if it is set, a cluster exists. */
  learned?: true;
  /** Returns what is expected if the (non-empty) value is wrong. */
  check(value: string): string | undefined;
}

type Check = Setting["check"];
const matches =
  (pattern: RegExp, right: string): Check =>
  (value) =>
    pattern.test(value) ? undefined : right;
const firstWrong = (words: readonly string[], check: Check) =>
  words.map(check).find((wrong) => wrong !== undefined);
const each =
  (check: Check): Check =>
  (value) =>
    firstWrong(splitWords(value), check);
const byCommas =
  (check: Check): Check =>
  (value) =>
    firstWrong(value.split(","), check)?.replace("separated by spaces", "separated by commas");

const file = matches(/^\P{Cc}+$/u, "the path of a file, without control characters");
const yes = matches(/^yes$/, "yes, or nothing");
const release = matches(
  /^v1\.(1[7-9]|[2-9]\d)\.\d+(-rc\d+)?\+k3s\d+$/,
  "a release of v1.17 or later, such as v1.36.2+k3s1",
);
const fingerprint = matches(
  /^SHA256:[A-Za-z0-9+/]{43}$/,
  'fingerprints SHA256:…, as "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" says on the box',
);
const url: Check = (value) =>
  /^https?:\/\/[\w.:[\]-]+(\/[\w.,:/%+~@-]*)?$/.test(value) && URL.canParse(value)
    ? undefined
    : "an http:// or https:// address without spaces or quotes";

/** Values and keys of labels and taints, as the API accepts them. */
export const WORD = "[A-Za-z0-9]([\\w.-]{0,61}[A-Za-z0-9])?";
export const KEY = `([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?${WORD}`;
function label(value: string): string | undefined {
  if (!new RegExp(`^${KEY}=(${WORD})?$`).test(value)) return "labels KEY=VALUE, separated by spaces";
  const owned = /^([^/]*\.)?(kubernetes|k8s)\.io\//.test(value);
  const own =
    /^([^/]*\.)?(kubelet|node)\.kubernetes\.io\/|^(topology|failure-domain\.beta)\.kubernetes\.io\/(zone|region)=/;
  return owned && !own.test(value)
    ? `labels that a node may give itself, and ${value.split("=")[0]} is none (NodeRestriction)`
    : undefined;
}
const taint = matches(
  new RegExp(`^${KEY}(=(${WORD})?)?:(NoSchedule|PreferNoSchedule|NoExecute)$`),
  "taints KEY=VALUE:EFFECT or KEY:EFFECT, separated by spaces, with NoSchedule, PreferNoSchedule or NoExecute",
);

function args(role: "server" | "agent", value: string): string | undefined {
  if (!/^([^\p{Cc}'"`\\]|\t)*$/u.test(value))
    return "arguments separated by spaces, on one line, without quotes, backslashes or control characters";
  const list = parseArgs(value);
  const secret = secretIn(list);
  if (secret)
    return `no secret among arguments, which every user of the box can read (--${secret.slice(0, 40)}): K3S_TOKEN, K3S_DATASTORE_ENDPOINT or the file of K3S_CONFIG has it`;
  // The unit has one argument per line: a line that starts with # or ; is a comment, and a lone ; ends a command.
  if (/(^|\s)[#;]/.test(value))
    return "arguments that do not begin with # or ;, which systemd would not pass on";
  const refused = refusedIn(role, list);
  if (refused) return `no --${refused[0]}: ${refused[1]}`;
  // For k3s these end the flags: it silently drops the rest.
  if (splitWords(value).some((word) => /^-+$/.test(word))) return "arguments, not a lone dash or two";
  // The same holds for a word that is no flag's value.
  const stray = splitWords(value).find(
    (word, i, all) => word[0] !== "-" && (/^(true|false)$/.test(word) || !/^-[^=]*$/.test(all[i - 1] ?? "")),
  );
  if (stray)
    return `arguments that begin with --, as "${stray.slice(0, 40)}" does not: k3s drops all that follow it`;
  for (const { flag, value: word = "" } of list) {
    const right = Object.hasOwn(ARGUMENTS, flag) && ARGUMENTS[flag]?.(word);
    if (right) return `${right} after --${flag}`;
  }
  // Old releases use the last one, later ones all.
  const twice = ["cluster-cidr", "service-cidr"].find(
    (name) => list.filter(({ flag }) => flag === name).length > 1,
  );
  if (twice) return `one --${twice}, with its networks separated by commas`;
  return role === "server" ? overlapIn(list) : undefined;
}

const network: Check = (value) => (networkIn(value) ? undefined : "networks such as 10.42.0.0/16");
/** Arguments that are used elsewhere too: in names of the cluster and in firewall rules. */
const ARGUMENTS: Record<string, Check> = {
  "cluster-cidr": byCommas(network),
  "service-cidr": byCommas(network),
  "cluster-domain": matches(/^[\w.-]+$/, "a domain such as cluster.local"),
  // The kubelet exits for one that it does not accept.
  "node-label": byCommas(label),
  "node-taint": byCommas(taint),
  "node-name": matches(/^[A-Za-z\d]([A-Za-z\d.-]{0,251}[A-Za-z\d])?$/, "a name of letters, digits, - and ."),
};

const family = (ip: string) => (isIP(ip) === 4 ? "ipv4" : "ipv6");

/** Parses a network; undefined if it is none. */
function networkIn(text: string): BlockList | undefined {
  const [, ip = "", bits] = /^([\da-f.:]+)\/([1-9]\d{0,2})$/.exec(text) ?? [];
  if (!isIP(ip) || Number(bits) > (isIP(ip) === 4 ? 32 : 128)) return undefined;
  const network = new BlockList();
  network.addSubnet(ip, Number(bits), family(ip));
  return network;
}

/** Is an address, or the first one of a network, in a network? */
export function liesIn(one: string, other: string): boolean {
  const ip = one.replace(/\/.*/, "");
  return networkIn(other)?.check(ip, family(ip)) ?? false;
}

const numberOf = (ip: string) => ip.split(".").reduce((sum, byte) => sum * 256 + Number(byte), 0);

/** An IPv4 network's n-th address. */
export const hostIn = (network: string, n: number): string => {
  const at = numberOf(network.replace(/\/.*/, "")) + n;
  return [24, 16, 8, 0].map((bits) => Math.floor(at / 2 ** bits) % 256).join(".");
};

/** How many addresses an IPv4 network has. */
export const sizeOf = (network: string): number => 2 ** (32 - Number(network.split("/")[1]));

/** Have two networks an address in common? */
export const overlap = (one: string, other: string): boolean => liesIn(one, other) || liesIn(other, one);

const HOMES = /^(10|172\.(1[6-9]|2\d|3[01])|192\.168|100\.(6[4-9]|[7-9]\d|1[01]\d|12[0-7]))\./;
/** The check of a private IPv4 network with between 2^least and 2^most addresses. */
const network4 =
  (least: number, most: number, example: string): Check =>
  (value) => {
    const [first = ""] = value.split("/");
    const bits = Math.log2(sizeOf(value));
    return networkIn(value) &&
      isIP(first) === 4 &&
      HOMES.test(first) &&
      bits >= least &&
      bits <= most &&
      !(numberOf(first) % 2 ** bits)
      ? undefined
      : `a private IPv4 network of ${2 ** least} to ${2 ** most} addresses by its first one, such as ${example}`;
  };

/** The cluster's domain among a server's arguments, or k3s's default. */
export const domainIn = (args: readonly Arg[]): string => lastOf(args, "cluster-domain") || "cluster.local";

/** The networks of pods and services among a server's arguments, or k3s's defaults. */
export const rangesIn = (args: readonly Arg[]): [pods: string, services: string] => [
  lastOf(args, "cluster-cidr") || "10.42.0.0/16",
  lastOf(args, "service-cidr") || "10.43.0.0/16",
];

/** What is expected when they overlap. */
function overlapIn(args: readonly Arg[]): string | undefined {
  const [pods, services] = rangesIn(args).map((networks) => networks.split(",")) as [string[], string[]];
  for (const one of pods)
    for (const other of services)
      if (overlap(one, other))
        return `networks of their own for pods and services, --cluster-cidr and --service-cidr: ${one} and ${other} overlap`;
  return undefined;
}

const ETCD =
  "embedded etcd needs its members' private addresses and a few milliseconds between them, which clouds do not give";
/**
 * k3s's embedded etcd uses private addresses and timeouts of milliseconds: upstream does not support it across clouds
 * (k3s docs, "Distributed hybrid or multicloud cluster").
 */
const serverArgs = (value: string) =>
  parseArgs(value).some(({ flag }) => /^(cluster-init|cluster-reset.*|server|s)$/.test(flag))
    ? `no argument for several servers: they go by K3S_DATASTORE_ENDPOINT (${ETCD})`
    : args("server", value);

function token(value: string): string | undefined {
  if (!isToken(value)) return TOKEN_FORM;
  try {
    withValues("", { K3S_TOKEN: value });
  } catch {
    return "a password that an env file can hold: not # and all three kinds of quotes";
  }
  return undefined;
}

/** The API rejects a node with the same key and effect twice. */
const twiceIn = (taints: string) => {
  const places = splitWords(taints).map((one) => one.replace(/=[^:]*/, ""));
  const twice = places.find((place, i) => places.indexOf(place) < i);
  return twice && `one value of ${twice}`;
};

const mirror = (value: string) => {
  const [, registry, address = ""] = /^([^=]*)=(.*)$/.exec(value) ?? [];
  return /^([\w.-]+(:\d+)?|\*)$/.test(registry ?? "") && !url(address)
    ? undefined
    : "mirrors REGISTRY=URL, separated by spaces, such as docker.io=https://mirror.example.org";
};
const proxy = matches(
  /^(https?|socks5):\/\/([\w.~%!*+,;=:-]+@)?[\w.-]+(:\d+)?\/?$/,
  "a proxy such as http://proxy.example.org:3128, or http://USER:PASSWORD@…",
);

const WHOLE = "every server is a whole one here, and a node";
const WIREGUARD = "flannel's backend is WireGuard here, between the nodes' public addresses";
const ADDRESS = "PUBLIC_IP, or HOST=PUBLIC_IP in SERVER and AGENTS, is the node's address";
const PORTS = "k3s is asked, and let through firewalls, at its own ports of every address";
const OWN_PORTS = [6443, 10250, 51820, 51821];
/** A port range as Kubernetes reads it: A-B, A+SIZE or a single port. */
const holdsOurs = {
  test(value: string): boolean {
    const [, first, sign, more = "0"] = /(?:^|=)(\d+)(?:([-+])(\d+))?$/.exec(value) ?? [];
    const last = sign === "-" ? Number(more) : Number(first) + Number(more);
    return first !== undefined && OWN_PORTS.some((port) => port >= Number(first) && port <= last);
  },
};

/** Arguments that this project sets itself or relies on: other values would break it. */
const OURS: readonly [flag: RegExp, why: string, value?: Pick<RegExp, "test">][] = [
  [/^(node-ip|i|node-external-ip|advertise-address)$/, ADDRESS],
  [/^kubelet-arg$/, ADDRESS, /^-*node-ip=/],
  [/^(bind-address|https-listen-port|advertise-port|(supervisor|apiserver)-port|apiserver-bind-address)$/, PORTS],
  [/^kubelet-arg$/, PORTS, /^-*(address|port)=/],
  [/^kube-apiserver-arg$/, PORTS, /^-*(secure-port|bind-address|advertise-address)=/],
  [/^service-node-port-range$/, `k3s's own ports are not for services: ${OWN_PORTS.join(", ")}`, holdsOurs],
  [/^lb-server-port$/, "k3s has that port for something else; its own is 6444", /^(6443|10250)$/],
  [/^kube-apiserver-arg$/, "--service-node-port-range has it", /^-*service-node-port-range=/],
  [/^kube-.*-arg$/, "--cluster-cidr and --service-cidr have it", /^-*(cluster-cidr|service-cluster-ip-range)=/],
  [/^kube-proxy-arg$/, "with a file kube-proxy ignores all flags: give each of it as an argument", /^-*config=/],
  [/^(flannel-(backend|external-ip|conf)|no-flannel|vpn-auth(-file)?)$/, WIREGUARD],
  [/^(data-dir|d)$/, "k3s's data are looked for in /var/lib/rancher/k3s, which may be a link or a mount"],
  [/^kubelet-arg$/, "the kubelet's data are looked for in /var/lib/kubelet, which may be a link or a mount", /^-*root-dir=/],
  [/^(with-node-id|hostname-override)$/, "--node-name is what a node is called"],
  [/^kube(let|-proxy)-arg$/, "--node-name is what a node is called", /^-*hostname-override=/],
  [/^kube-proxy-arg$/, "PROXY_MODE has it", /^-*proxy-mode=/],
  [/^(config|c)$/, "K3S_CONFIG has the name of such a file"],
  [/^(write-kubeconfig|o)$/, "the kubeconfig is looked for in /etc/rancher/k3s/k3s.yaml, and `make kubeconfig` brings it here"],
  [/^private-registry$/, "REGISTRY_MIRRORS has it, or a registries.yaml of yours in /etc/rancher/k3s"],
  [/^(docker|container-runtime-endpoint|rootless)$/, "pods are looked for in k3s's own containerd, run by root"],
  [/^(help|h|version)$/, "k3s would print that, and end"],
  [/^(log|l)$/, "the cause of a failure is looked for in the journal"],
  [/^disable-(agent|apiserver|controller-manager|etcd|scheduler|cloud-controller|kube-proxy)$/, WHOLE],
  [/^agent-token(-file)?$/, "nodes join by one token, K3S_TOKEN"],
]; // biome-ignore format: a table

/** Flags that may be given as =false, which is their default. */
const SWITCHES = /^(with-node-id|no-flannel|docker|rootless|disable-.*)$/;

/**
 * Flags that `k3s agent` does not know in any release: it exits for one, in its config file too (pkg/configfilearg).
 */
const OF_SERVERS =
  /^(advertise-|agent-token|cluster-(cidr|dns|domain|init|reset)|datastore-|default-local-storage-path|disable$|disable-(agent|apiserver$|controller-manager|etcd|scheduler|cloud-controller|kube-proxy|network-policy|helm-controller)|egress-selector-mode|embedded-registry|etcd-|flannel-(backend|external-ip|ipv6-masq)|helm-|https-listen-port|kine-|kube-(apiserver|cloud-controller|controller|scheduler)|no-deploy|o$|secrets-encryption|service|supervisor-|system-default-registry|tls-san|write-kubeconfig)/;

/** The first argument that is refused for a role, in arguments or a config file, and why. */
export function refusedIn(
  role: "server" | "agent" | undefined,
  args: readonly Arg[],
): [flag: string, why: string] | undefined {
  for (const { flag, value = "" } of args) {
    const rule = OURS.find(([name, , of]) => name.test(flag) && (!of || of.test(value)));
    if (rule && !(value === "false" && SWITCHES.test(flag))) return [flag, rule[1]];
    if (role !== "agent") continue;
    if (/^(server|s)$/.test(flag)) return [flag, "K3S_URL has it"];
    if (flag === "token-file") return [flag, "K3S_TOKEN has the token"];
    if (OF_SERVERS.test(flag)) return [flag, "only servers know it, and an agent ends at it"];
  }
  return undefined;
}

/** Matches an ssh destination with a password in it. */
export const WITH_PASSWORD = /(^|\s)(ssh:\/\/)?[^\s/@]*:(?!\/\/)\S*@/;

/** A destination is a host, user@host, an alias or ssh://…; a leading - would be an option of ssh. */
function destination(value: string): string | undefined {
  const [host = "", ip, more] = value.split("=");
  if (WITH_PASSWORD.test(value)) return "no password in it: ssh goes by keys here";
  if (more === undefined && /^[A-Za-z0-9_[:][\w.@:/%[\]-]*$/.test(host) && !/[@/]-/.test(host))
    return ip === undefined ? undefined : address(ip);
  return "an ssh destination such as root@203.0.113.10 or an alias of ~/.ssh/config, with =PUBLIC_IP if needed";
}

const PRIVATE: readonly [RegExp, string][] = [
  [/^(0|127)\./, "means the box itself"],
  [/^(10\.|192\.168\.|172\.(1[6-9]|2\d|3[01])\.)/, "is private"],
  [/^100\.(6[4-9]|[7-9]\d|1[01]\d|12[0-7])\./, "is the provider's own (RFC 6598)"],
  [/^169\.254\./, "is link-local"],
  [/^(192\.(0\.[02]|88\.99)|198\.1[89])\./, "is for tests, documents or protocols alone (RFC 6890)"],
  [/^(22[4-9]|2[3-5]\d)\./, "is not a host's address"],
];

/** These ranges as one expression, valid for awk too. */
export const PRIVATE_RANGES = PRIVATE.map(([range]) => range.source.replaceAll("\\d", "[0-9]")).join("|");

/** What is expected, unless `value` is an IPv4 address that other clouds can reach. */
export function publicIp(value: string): string | undefined {
  const octet = "(25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)";
  if (!new RegExp(`^${octet}(\\.${octet}){3}$`).test(value)) return "an IPv4 address such as 203.0.113.10";
  const reason = PRIVATE.find(([range]) => range.test(value))?.[1];
  return reason && `an address that other clouds can reach; ${value} ${reason}`;
}

/** Given in place of a box's public address where it has none, as behind a router at home. */
export const NAT = "nat";

/** A box's address for the other nodes. */
function address(value: string): string | undefined {
  const wrong = value !== NAT && publicIp(value);
  return wrong ? `${wrong}, or ${NAT} for a box that has no public address` : undefined;
}

/** From an hour to a month. */
function every(value: string): string | undefined {
  const [, number, unit] = /^([1-9]\d{0,2})([hd])$/.exec(value) ?? [];
  const hours = Number(number) * (unit === "d" ? 24 : 1);
  return hours <= 720 ? undefined : "hours or days from 1h to 30d, such as 6h";
}

/** A box, or a folder in an S3 bucket. */
function backupTo(value: string): string | undefined {
  const expected = "a box of SERVER or AGENTS, or the https:// address of a folder in an S3 bucket";
  if (!value.startsWith("https://"))
    return /[=\s]|^(?!ssh:)\w+:\/\//.test(value) ? expected : destination(value);
  return /^https:\/\/[\w.-]+(:\d+)?(\/[\w.~-]+)*\/?$/.test(value) && URL.canParse(value)
    ? undefined
    : `${expected}, of letters, digits, -, ., _ and ~`;
}

/** A server is called by all others. */
function server(value: string): string | undefined {
  const expected = `a public address: only an agent can do without (${NAT})`;
  return value.endsWith(`=${NAT}`) ? expected : destination(value);
}

/** What the configuration of a device may be written for. */
export const FORMS = ["phone", "linux", "macos", "windows", "router"] as const;

/** What the watch's webhook takes. */
export const NOTIFY_FORMS = ["json", "ntfy", "slack", "dingtalk", "wecom", "telegram"] as const;

/** A webhook's address; curl reads it from a file, between quotes. */
function webhook(value: string): string | undefined {
  if (!/^https?:\/\/[^\s"'`\\\p{Cc}]+$/u.test(value) || !URL.canParse(value))
    return "an https:// or http:// address without spaces, quotes and backslashes";
  const { hostname, pathname, searchParams } = new URL(value);
  const telegram = /^\/bot[^/]+\/sendMessage$/.test(pathname) && searchParams.get("chat_id");
  return hostname === "api.telegram.org" && !telegram
    ? "Telegram's https://api.telegram.org/botTOKEN/sendMessage?chat_id=CHAT"
    : undefined;
}

/** Every setting: flags and the env file's keys come from here, what each is for and an example from env.example. */
export const SETTINGS = {
  SERVER: { value: "", shared: true, check: each(server) },
  AGENTS: { value: "", shared: true, check: each(destination) },
  HOST: { value: "", shared: true, check: each(destination) },
  HOST_KEY: { value: "", check: each(fingerprint) },
  PUBLIC_IP: { value: "", shared: true, check: address },
  K3S_VERSION: { value: "v1.36.2+k3s1", shared: true, check: release },
  STEPS: { value: "", shared: true, check: each(release) },
  K3S_MIRRORS: {
    value: "https://github.com/k3s-io/k3s/releases/download https://rancher-mirror.rancher.cn/k3s",
    check: each(url),
  },
  K3S_SHA256: { value: "", check: matches(/^[0-9a-f]{64}$/, "64 lower-case hex digits") },
  K3S_BIN: { value: "", check: file },
  PROXY_MODE: {
    value: "iptables",
    check: matches(/^(iptables|ipvs|nftables)$/, "iptables, ipvs or nftables"),
  },
  SERVER_ARGS: { value: "", check: serverArgs },
  AGENT_ARGS: { value: "", check: (value) => args("agent", value) },
  NODE_LABELS: { value: "", check: each(label) },
  NODE_TAINTS: { value: "", check: (value) => each(taint)(value) ?? twiceIn(value) },
  FIREWALL: { value: "", shared: true, check: yes },
  TUNNEL_KUBELETS: { value: "", shared: true, check: yes },
  AIRGAP: { value: "", check: yes },
  REGISTRY_MIRRORS: { value: "", check: each(mirror) },
  HTTPS_PROXY: { value: "", secret: true, ambient: true, check: proxy },
  HTTP_PROXY: { value: "", secret: true, ambient: true, check: proxy },
  NO_PROXY: {
    value: "",
    ambient: true,
    check: matches(/^[\w.,:/*-]+$/, "names, addresses and ranges, separated by commas"),
  },
  K3S_CONFIG: { value: "", check: file },
  BACKUP: { value: "", shared: true, check: file },
  BACKUP_EVERY: { value: "", shared: true, check: every },
  BACKUP_TO: { value: "", shared: true, check: backupTo },
  BACKUP_KEEP: {
    value: "7",
    shared: true,
    check: matches(/^([1-9]\d{0,2}|1000)$/, "how many backups to keep, from 1 to 1000"),
  },
  S3_REGION: {
    value: "us-east-1",
    shared: true,
    check: matches(/^[a-z0-9-]{1,40}$/, "a region such as eu-central-1"),
  },
  S3_ACCESS_KEY: {
    value: "",
    secret: true,
    shared: true,
    check: matches(/^[^\s\p{Cc}"'\\:]+$/u, "an access key's id, without quotes, blanks and colons"),
  },
  S3_SECRET_KEY: {
    value: "",
    secret: true,
    shared: true,
    check: matches(/^[^\s\p{Cc}"'\\]+$/u, "a secret key, without quotes, blanks and backslashes"),
  },
  ELREPO_URL: { value: "https://www.elrepo.org", check: url },
  ELREPO_KERNEL_URL: { value: "", check: url },
  EPEL_URL: { value: "https://dl.fedoraproject.org/pub/epel", check: url },
  K3S_DATASTORE_ENDPOINT: {
    value: "",
    secret: true,
    shared: true,
    // systemd's EnvironmentFile takes such a value literally.
    check: matches(
      /^(postgres|postgresql|mysql|nats|https?):\/\/[^\s\p{Cc}'"\\`]+$/u,
      "postgres://…, mysql://… or https://… (etcd), without spaces, quotes, backslashes or control characters",
    ),
  },
  NAME: {
    value: "",
    shared: true,
    ambient: true,
    // NAME-2 is the file of its second entry, and still a WireGuard interface's name.
    check: matches(
      /^(?!.*-\d+$)[a-z0-9][a-z0-9-]{0,11}$/,
      "a name of 1 to 12 lower-case letters, digits and -, without a number at its end as in tv-2",
    ),
  },
  FOR: {
    value: "phone",
    shared: true,
    ambient: true,
    check: matches(
      new RegExp(`^(${FORMS.join("|")})$`),
      `${FORMS.slice(0, -1).join(", ")} or ${FORMS.at(-1)}`,
    ),
  },
  VIA: { value: "", shared: true, ambient: true, check: each(destination) },
  ONLY: { value: "", shared: true, ambient: true, check: matches(/^services$/, "services, or nothing") },
  LAN: { value: "", shared: true, ambient: true, check: network4(1, 16, "192.168.1.0/24") },
  PUBLIC_KEY: {
    value: "",
    shared: true,
    check: matches(
      /^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$/,
      "a device's WireGuard public key, as `wg pubkey` prints it",
    ),
  },
  DEVICE_CIDR: { value: "10.44.0.0/24", shared: true, check: network4(3, 16, "10.44.0.0/24") },
  DEVICE_PORT: {
    value: "51822",
    shared: true,
    check: (value) =>
      /^[1-9]\d{0,4}$/.test(value) && Number(value) < 65536 && !OWN_PORTS.includes(Number(value))
        ? undefined
        : `a port from 1 to 65535 that k3s does not use (${OWN_PORTS.join(", ")})`,
  },
  NOTIFY_URL: { value: "", secret: true, shared: true, check: webhook },
  NOTIFY_FORM: {
    value: "",
    shared: true,
    check: matches(
      new RegExp(`^(${NOTIFY_FORMS.join("|")})$`),
      `${NOTIFY_FORMS.slice(0, -1).join(", ")} or ${NOTIFY_FORMS.at(-1)}`,
    ),
  },
  K3S_URL: {
    value: "",
    shared: true,
    learned: true,
    check: matches(/^https:\/\/[\w.-]+(:\d+)?$/, "an address such as https://203.0.113.10:6443"),
  },
  K3S_TOKEN: { value: "", secret: true, shared: true, learned: true, check: token },
} satisfies Record<string, Setting>;

export type SettingName = keyof typeof SETTINGS;

/** The first setting that contradicts the others, and what would be right. */
export function apartIn(settings: Record<SettingName, string>): [SettingName, string] | undefined {
  const { SERVER, AGENTS, K3S_DATASTORE_ENDPOINT } = settings;
  const servers = splitWords(SERVER);
  if (servers.length > 1 && !K3S_DATASTORE_ENDPOINT)
    return ["SERVER", `one of ${servers.join(", ")}, or a K3S_DATASTORE_ENDPOINT that they share: ${ETCD}`];
  const both = boxNames(AGENTS).find((name) => boxNames(SERVER).includes(name));
  return both
    ? ["AGENTS", `boxes that are not in SERVER, but ${both} is in both: a server is a node too`]
    : undefined;
}

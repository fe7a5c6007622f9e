/** The settings: the table that declares each once, and where a value comes from (flag, environment, env file). */
import { BlockList, isIP } from "node:net";
import { hostname } from "node:os";
import { readEnv, slipIn, withValues } from "./env-file.ts";
import { lastOf, parseArgs, refusedIn, secretIn } from "./k3s/args.ts";
import type { Role } from "./k3s/unit.ts";
import { jsonOf, redacted } from "./text.ts";

/** A setting is wrong: where it came from, what was found, what would be right. Exit status 2, nothing touched. */
export class SettingError extends Error {}

interface Setting {
  value: string;
  help: string;
  /** A value as one would write it: env.example shows it, and the tests hold `check` against it. */
  example: string;
  secret?: true;
  /** One for all boxes: it says which they are, or is the cluster's own. */
  shared?: true;
  /** Programs of this machine go by it too: from the environment it counts only where make was given it. */
  ambient?: true;
  /** What would be right, when the (non-empty) value is wrong. */
  check(value: string): string | undefined;
}

const matches = (pattern: RegExp, right: string) => (value: string) =>
  pattern.test(value) ? undefined : right;
const url = (value: string) =>
  /^https?:\/\/[\w.:[\]-]+(\/[\w.,:/%+~@-]*)?$/.test(value) && URL.canParse(value)
    ? undefined
    : "an http:// or https:// address without blanks or quotes";
const each = (check: Setting["check"]) => (value: string) =>
  words(value)
    .map(check)
    .find((wrong) => wrong !== undefined);
const release = matches(
  /^v1\.(1[7-9]|[2-9]\d)\.\d+(-rc\d+)?\+k3s\d+$/,
  "a release of v1.17 or later, such as v1.36.2+k3s1",
);
const file = matches(/^\P{Cc}+$/u, "the path of a file, without control characters");

function args(role: Role, value: string): string | undefined {
  if (!/^([^\p{Cc}'"`\\]|\t)*$/u.test(value))
    return "arguments separated by blanks, on one line, without quotes, backslashes or control characters";
  const list = parseArgs(value);
  const secret = secretIn(list);
  if (secret)
    return `no secret among arguments, which every user of the box can read (--${secret.slice(0, 40)}): K3S_TOKEN, K3S_DATASTORE_ENDPOINT or the file of K3S_CONFIG has it`;
  // The unit has an argument a line, and a line that begins so is a comment, a lone ; the end of a command.
  if (/(^|\s)[#;]/.test(value))
    return "arguments that do not begin with # or ;, which systemd would not pass on";
  const refused = refusedIn(role, list);
  if (refused) return `no --${refused[0]}: ${refused[1]}`;
  // To k3s they are the end of its flags: the rest is dropped without a word.
  if (words(value).some((word) => /^-+$/.test(word))) return "arguments, not a lone dash or two";
  // Likewise a word that no argument can take for its value.
  const stray = words(value).find(
    (word, i, all) => word[0] !== "-" && (/^(true|false)$/.test(word) || !/^-[^=]*$/.test(all[i - 1] ?? "")),
  );
  if (stray)
    return `arguments that begin with --, as "${stray.slice(0, 40)}" does not: k3s drops all that follow it`;
  for (const { flag, value: word = "" } of list) {
    const right = Object.hasOwn(ARGUMENTS, flag) && ARGUMENTS[flag]?.(word);
    if (right) return `${right} after --${flag}`;
  }
  // Old releases take the last of them, later ones all.
  const twice = ["cluster-cidr", "service-cidr"].find(
    (name) => list.filter(({ flag }) => flag === name).length > 1,
  );
  if (twice) return `one --${twice}, with its networks separated by commas`;
  return role === "server" ? overlapIn(list) : undefined;
}

/** Arguments that go further than to k3s: into the cluster's names, and into rules of the boxes' firewalls. */
const RANGES = (value: string) =>
  value.split(",").every((one) => networkIn(one)) ? undefined : "networks such as 10.42.0.0/16";
const ARGUMENTS: Record<string, Setting["check"]> = {
  "cluster-cidr": RANGES,
  "service-cidr": RANGES,
  "cluster-domain": matches(/^[\w.-]+$/, "a domain such as cluster.local"),
  // The kubelet ends at one that it does not take.
  "node-label": (value) => byCommas(label, value),
  "node-taint": (value) => byCommas(taint, value),
  "node-name": matches(/^[A-Za-z\d]([A-Za-z\d.-]{0,251}[A-Za-z\d])?$/, "a name of letters, digits, - and ."),
};

const byCommas = (check: Setting["check"], value: string) =>
  value
    .split(",")
    .map(check)
    .find((wrong) => wrong !== undefined)
    ?.replace("separated by blanks", "separated by commas");

/** A network as node knows it; nothing for what is none. */
function networkIn(text: string): BlockList | undefined {
  const [, ip = "", bits] = /^([\da-f.:]+)\/(\d{1,3})$/.exec(text) ?? [];
  const size = { 0: 0, 4: 32, 6: 128 }[isIP(ip)] ?? 0;
  if (!size || Number(bits) < 1 || Number(bits) > size) return undefined;
  const network = new BlockList();
  network.addSubnet(ip, Number(bits), size === 32 ? "ipv4" : "ipv6");
  return network;
}

/** What would be right where networks of pods and of services, given or by default, have addresses in common. */
function overlapIn(list: ReturnType<typeof parseArgs>): string | undefined {
  const [pods, services] = [
    ["cluster-cidr", "10.42.0.0/16"],
    ["service-cidr", "10.43.0.0/16"],
  ].map(([flag = "", own = ""]) => (lastOf(list, flag) || own).split(",")) as [string[], string[]];
  const within = (one: string, other: string) => {
    const ip = one.replace(/\/.*/, "");
    return networkIn(other)?.check(ip, isIP(ip) === 4 ? "ipv4" : "ipv6");
  };
  for (const one of pods)
    for (const other of services)
      if (within(one, other) || within(other, one))
        return `networks of their own for pods and services, --cluster-cidr and --service-cidr: ${one} and ${other} overlap`;
  return undefined;
}

const ETCD =
  "embedded etcd needs its members' private addresses and a few milliseconds between them, which clouds do not give";
/**
 * k3s's own way to several servers has etcd's members at private addresses, and its clock ticks in milliseconds:
 * upstream does not support it across clouds (k3s docs, "Distributed hybrid or multicloud cluster").
 */
const serverArgs = (value: string) =>
  parseArgs(value).some(({ flag }) => /^(cluster-init|cluster-reset.*|server|s)$/.test(flag))
    ? `no argument for several servers: they go by K3S_DATASTORE_ENDPOINT (${ETCD})`
    : args("server", value);

/** The password is what k3s takes, in pkg/clientaccess: all that follows, colons too. */
function token(value: string): string | undefined {
  if (!/^K10[0-9a-f]{64}::[\w-]+:[^\p{Cc}]*[^\p{Cc}\s]$/u.test(value))
    return "K10, the hash of the cluster's CA, ::server: and a password, as server/node-token has it";
  try {
    withValues("", { K3S_TOKEN: value });
  } catch {
    return "a password that an env file can hold: not # and all three kinds of quotes";
  }
  return undefined;
}

/** A label's value and its key, and a taint's, as the API has them. */
export const WORD = "[A-Za-z0-9]([\\w.-]{0,61}[A-Za-z0-9])?";
export const KEY = `([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?${WORD}`;
function label(value: string): string | undefined {
  if (!new RegExp(`^${KEY}=(${WORD})?$`).test(value)) return "labels KEY=VALUE, separated by blanks";
  const owned = /^([^/]*\.)?(kubernetes|k8s)\.io\//.test(value);
  const own =
    /^([^/]*\.)?(kubelet|node)\.kubernetes\.io\/|^(topology|failure-domain\.beta)\.kubernetes\.io\/(zone|region)=/;
  return owned && !own.test(value)
    ? `labels that a node may give itself, and ${value.split("=")[0]} is none (NodeRestriction)`
    : undefined;
}
const taint = matches(
  new RegExp(`^${KEY}(=(${WORD})?)?:(NoSchedule|PreferNoSchedule|NoExecute)$`),
  "taints KEY=VALUE:EFFECT or KEY:EFFECT, separated by blanks, with NoSchedule, PreferNoSchedule or NoExecute",
);

/** The API takes no node that has a key and effect twice. */
const twiceIn = (taints: string) => {
  const places = words(taints).map((one) => one.replace(/=[^:]*/, ""));
  const twice = places.find((place, i) => places.indexOf(place) < i);
  return twice && `one value of ${twice}`;
};

const mirror = (value: string) => {
  const [, registry, address = ""] = /^([^=]*)=(.*)$/.exec(value) ?? [];
  return /^([\w.-]+(:\d+)?|\*)$/.test(registry ?? "") && !url(address)
    ? undefined
    : "mirrors REGISTRY=URL, separated by blanks, such as docker.io=https://mirror.example.org";
};
const proxy = matches(
  /^(https?|socks5):\/\/([\w.~%!*+,;=:-]+@)?[\w.-]+(:\d+)?\/?$/,
  "a proxy such as http://proxy.example.org:3128, or http://USER:PASSWORD@…",
);

/** Every setting, declared once: flags, the env file's keys, `--help` and env.example come from here. */
export const SETTINGS = {
  SERVER: {
    value: "",
    help: "ssh destination of the control plane, HOST or HOST=PUBLIC_IP; empty: this machine; several by K3S_DATASTORE_ENDPOINT, the first first",
    example: "root@203.0.113.10",
    shared: true,
    check: each(destination),
  },
  AGENTS: {
    value: "",
    help: "ssh destinations of the agents, HOST or HOST=PUBLIC_IP, separated by blanks",
    example: "root@198.51.100.20 debian@cloud-b=198.51.100.21",
    shared: true,
    check: each(destination),
  },
  HOST: {
    value: "",
    help: "the box or boxes of this call, HOST or HOST=PUBLIC_IP; empty: this machine",
    example: "root@198.51.100.20",
    shared: true,
    check: each(destination),
  },
  HOST_KEY: {
    value: "",
    help: "fingerprints of the box's ssh host keys, in place of known_hosts; of one box by HOST_KEY__BOX",
    example: "SHA256:8LQwEQFwHa95Gb8MALXFryk7xa71/wmGZDe+++EwR+I",
    check: each(
      matches(
        /^SHA256:[A-Za-z0-9+/]{43}$/,
        'fingerprints SHA256:…, as "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" says on the box',
      ),
    ),
  },
  PUBLIC_IP: {
    value: "",
    help: "address at which other clouds reach this call's box; default: what ssh resolves HOST to",
    example: "198.51.100.20",
    shared: true,
    check: publicIp,
  },
  K3S_VERSION: {
    value: "v1.36.2+k3s1",
    help: "k3s release, v1.17 or later",
    example: "v1.17.6+k3s1",
    shared: true,
    check: release,
  },
  STEPS: {
    value: "",
    help: "releases that `upgrade` passes through, one of each minor version in between",
    example: "v1.34.2+k3s1 v1.35.4+k3s1",
    shared: true,
    check: each(release),
  },
  K3S_MIRRORS: {
    value: "https://github.com/k3s-io/k3s/releases/download https://rancher-mirror.rancher.cn/k3s",
    help: "download bases in order; a checksum is taken from another host than the file it checks",
    example: "https://rancher-mirror.rancher.cn/k3s https://github.com/k3s-io/k3s/releases/download",
    check: each(url),
  },
  K3S_SHA256: {
    value: "",
    help: "sha256 of the k3s binary, in place of a second host's word",
    example: "a".repeat(64),
    check: matches(/^[0-9a-f]{64}$/, "64 lower-case hex digits"),
  },
  K3S_BIN: {
    value: "",
    help: "a k3s binary at hand, pushed to the box instead of downloaded",
    example: "./k3s",
    check: file,
  },
  PROXY_MODE: {
    value: "iptables",
    help: "kube-proxy's mode: iptables, ipvs or nftables (v1.31 and later)",
    example: "ipvs",
    check: matches(/^(iptables|ipvs|nftables)$/, "iptables, ipvs or nftables"),
  },
  SERVER_ARGS: {
    value: "",
    help: "more arguments of k3s server",
    example: "--disable=traefik",
    check: serverArgs,
  },
  AGENT_ARGS: {
    value: "",
    help: "more arguments of k3s agent",
    example: "--node-label=cloud=b",
    check: (value) => args("agent", value),
  },
  NODE_LABELS: {
    value: "",
    help: "labels of the node, KEY=VALUE, separated by blanks; one that goes here goes from the node",
    example: "disk=ssd region=b",
    check: each(label),
  },
  NODE_TAINTS: {
    value: "",
    help: "taints of the node, KEY=VALUE:EFFECT, separated by blanks",
    example: "dedicated=build:NoSchedule",
    check: (value) => each(taint)(value) ?? twiceIn(value),
  },
  FIREWALL: {
    value: "",
    help: "yes: `make up`, server, agent, remove and restore look after the boxes' own firewalls too, as `make firewall` does",
    example: "yes",
    shared: true,
    check: matches(/^yes$/, "yes, or nothing"),
  },
  AIRGAP: {
    value: "",
    help: "yes: boxes get k3s's images too, from K3S_MIRRORS or from beside K3S_BIN, where they are taken in any case",
    example: "yes",
    check: matches(/^yes$/, "yes, or nothing"),
  },
  REGISTRY_MIRRORS: {
    value: "",
    help: "registries to ask in place of others, REGISTRY=URL, in order, for /etc/rancher/k3s/registries.yaml",
    example: "docker.io=https://mirror.example.org registry.k8s.io=https://mirror.example.org:5000",
    check: each(mirror),
  },
  HTTPS_PROXY: {
    value: "",
    help: "proxy of k3s and its downloads on the box (not this machine's: not from the environment)",
    example: "http://proxy.example.org:3128",
    secret: true,
    ambient: true,
    check: proxy,
  },
  HTTP_PROXY: {
    value: "",
    help: "the same for addresses that begin with http://",
    example: "http://proxy.example.org:3128",
    secret: true,
    ambient: true,
    check: proxy,
  },
  NO_PROXY: {
    value: "",
    help: "what goes by no proxy, separated by commas; the cluster's ranges and nodes are added",
    example: "registry.example.org,192.0.2.0/24",
    ambient: true,
    check: matches(/^[\w.,:/*-]+$/, "names, addresses and ranges, separated by commas"),
  },
  K3S_CONFIG: {
    value: "",
    help: "a YAML file at hand with more settings of k3s, for /etc/rancher/k3s/config.yaml.d (modern k3s)",
    example: "./k3s-config.yaml",
    check: file,
  },
  BACKUP: {
    value: "",
    help: "the new file that `backup` writes, by default a new one beside the env file, and `restore` reads",
    example: "./k3s-backup.tar.gz",
    shared: true,
    check: file,
  },
  ELREPO_URL: {
    value: "https://www.elrepo.org",
    help: "ELRepo: its key and release packages, for kernels and WireGuard modules",
    example: "https://mirrors.example.org/elrepo",
    check: url,
  },
  ELREPO_KERNEL_URL: {
    value: "",
    help: "yum repository with kernel-ml for el7; empty: what ELRepo's release package says",
    example: "https://mirrors.example.org/elrepo-archive/kernel/el7/x86_64",
    check: url,
  },
  EPEL_URL: {
    value: "https://dl.fedoraproject.org/pub/epel",
    help: "EPEL, which has wireguard-tools for el7 and el8",
    example: "https://mirrors.example.org/epel",
    check: url,
  },
  K3S_DATASTORE_ENDPOINT: {
    value: "",
    help: "a database that several servers share, in place of the server's own SQLite",
    example: "postgres://k3s:PASSWORD@db.example.org:5432/k3s?sslmode=verify-full",
    secret: true,
    shared: true,
    // As an EnvironmentFile of systemd reads it: without quotes nothing in it means anything.
    check: matches(
      /^(postgres|postgresql|mysql|nats|https?):\/\/[^\s\p{Cc}'"\\`]+$/u,
      "postgres://…, mysql://… or https://… (etcd), without blanks, quotes, backslashes or control characters",
    ),
  },
  K3S_URL: {
    value: "",
    help: "the cluster's API; written by `server`, read by `agent`",
    example: "https://203.0.113.10:6443",
    shared: true,
    check: matches(/^https:\/\/[\w.-]+(:\d+)?$/, "an address such as https://203.0.113.10:6443"),
  },
  K3S_TOKEN: {
    value: "",
    help: "what joins a box to the cluster; written by `server`, read by `agent`",
    example: `K10${"0".repeat(64)}::server:${"0".repeat(32)}`,
    secret: true,
    shared: true,
    check: token,
  },
} satisfies Record<string, Setting>;

export type SettingName = keyof typeof SETTINGS;
export type Settings = Record<SettingName, string>;
export const NAMES = Object.keys(SETTINGS) as SettingName[];

/** Where each value came from, for messages: `flag --host`, `variable HOST`, `.env line 3`, `default`. */
export type Origins = Record<SettingName, string>;

/** Was it given for this call alone, and not by the env file or a default? */
export const givenNow = (origins: Origins, name: SettingName): boolean =>
  /^(flag|variable)/.test(origins[name]);

export const flagOf = (name: string): string => name.toLowerCase().replaceAll("_", "-");

export const words = (value: string): string[] => value.split(/[ \t]+/).filter(Boolean);

/** A box as the user reads it: its ssh destination without the user, or this machine's name. */
export const nameOf = (host: string): string => host.replace(/^(ssh:\/\/)?([^@]*@)?/, "") || hostname();

/** Names of the boxes of a list such as SERVER's: HOST or HOST=PUBLIC_IP each. */
export const boxNames = (list: string): string[] =>
  words(list).map((word) => nameOf(word.split("=")[0] as string));

/**
 * Settings by precedence: flag, environment, env file, default. A value that is set but empty counts. What the
 * env file says for one box, NAME__BOX, counts before its NAME, on that box: `own` has it by the box's name.
 *
 * @throws {SettingError} for the first value that is wrong, named with its origin, and for a key of the env
 * file that is no setting, or one of a box that is not there: a slip of the pen would be lost.
 */
export function settle(
  flags: Record<string, string>,
  env: Record<string, string | undefined>,
  path: string,
): { settings: Settings; origins: Origins; own: Record<string, Partial<Settings>> } {
  const { values, lines } = fileAt(path);
  const [line, right] = slipIn(path) ?? [];
  if (line) throw new SettingError(`${path} line ${line}: expected ${right}`);
  const settings = {} as Settings;
  const origins = {} as Origins;
  const isAmbient = (name: SettingName) => (SETTINGS[name] as Setting).ambient;
  const madeWith = (name: string) => new RegExp(`(^| )${name}=`).test(env.MAKEFLAGS ?? "");
  for (const name of NAMES) {
    const [value, origin] =
      flags[flagOf(name)] !== undefined
        ? [flags[flagOf(name)], `flag --${flagOf(name)}`]
        : env[name] !== undefined && (!isAmbient(name) || madeWith(name))
          ? [env[name], `variable ${name}`]
          : values[name] !== undefined
            ? [values[name], `${path} line ${lines[name]}`]
            : [SETTINGS[name].value, "default"];
    settings[name] = (value as string).trim();
    origins[name] = origin as string;
    if (origin === `variable ${name}` && isEaten(name, value as string, env.MAKEFLAGS))
      throw new SettingError(
        `${name} (make's command line): it has a $, which make takes for one of its variables; write it into the env file, or each $ as $$`,
      );
    if (settings[name]) check(name, settings[name], origins[name]);
  }
  const servers = words(settings.SERVER);
  if (servers.length > 1 && !settings.K3S_DATASTORE_ENDPOINT)
    throw new SettingError(
      `SERVER (${origins.SERVER}): expected one of ${servers.join(", ")}, or a K3S_DATASTORE_ENDPOINT that they share: ${ETCD}`,
    );
  const both = boxNames(settings.AGENTS).find((name) => boxNames(settings.SERVER).includes(name));
  if (both)
    throw new SettingError(
      `AGENTS (${origins.AGENTS}): expected boxes that are not in SERVER, but ${both} is in both: a server is a node too`,
    );
  const boxes = boxNames(`${settings.SERVER} ${settings.AGENTS} ${settings.HOST}`);
  // A box may have any name.
  const own: Record<string, Partial<Settings>> = Object.create(null);
  for (const [key, value] of Object.entries(values)) {
    if (Object.hasOwn(SETTINGS, key)) continue;
    const origin = `${path} line ${lines[key]}`;
    const [, name, box = ""] = /^([A-Z0-9_]+?)__(.+)$/.exec(key) ?? [];
    if (name === undefined || !Object.hasOwn(SETTINGS, name))
      throw new SettingError(`${key} (${origin}): expected a setting: ${NAMES.join(", ")}`);
    if ((SETTINGS as Record<string, Setting>)[name]?.shared)
      throw new SettingError(`${key} (${origin}): expected ${name}, which is one for all boxes`);
    if (![...boxes, hostname()].includes(box))
      throw new SettingError(
        `${key} (${origin}): expected a box of SERVER, AGENTS or HOST after the __: ${boxes.join(", ") || hostname()}`,
      );
    if (value.trim()) check(name as SettingName, value.trim(), origin);
    // What was given for this call alone counts for all its boxes.
    if (!givenNow(origins, name as SettingName)) own[box] = { ...own[box], [name]: value.trim() };
  }
  return { settings, origins, own };
}

/** Is this not what stands on make's command line, which MAKEFLAGS has with a \\ before blanks and each $ twice? */
function isEaten(name: string, value: string, makeflags = ""): boolean {
  const given = new RegExp(`(?<=(?<!\\\\) )${name}[:?+]*=((?:\\\\[^]|[^\\\\ ])*)`, "g");
  const said = [...makeflags.matchAll(given)].at(-1)?.[1]?.replace(/\\(.|\n)|\$\$/g, (_, c) => c ?? "$");
  return Boolean(said?.includes("$")) && said?.replaceAll("$$", "$").trim() !== value.trim();
}

/** @throws {SettingError} for a file that cannot be read. */
function fileAt(path: string): ReturnType<typeof readEnv> {
  try {
    return readEnv(path);
  } catch (error) {
    throw new SettingError(`The env file cannot be read: ${(error as Error).message}`);
  }
}

/** @throws {SettingError} when the value is not one this setting can have. Secrets are not repeated. */
export function check(name: SettingName, value: string, origin: string): void {
  const setting: Setting = SETTINGS[name];
  const right = value.length > 4096 ? "at most 4096 characters" : setting.check(value);
  if (right === undefined) return;
  const shown =
    setting.secret || secretIn(parseArgs(value)) || PASSWORD.test(value) ? "" : ` is ${quoted(value)}`;
  throw new SettingError(`${name}${shown} (${origin}): expected ${right}`);
}

/** A value as it was read, cut short. */
export const quoted = (value: string): string => jsonOf(redacted(value.slice(0, 5000)).slice(0, 80));

const PASSWORD = /(^|\s)(ssh:\/\/)?[^\s/@]*:(?!\/\/)\S*@/;

/** A leading `-` would be an option to ssh; a destination is a host, user@host, an alias or ssh://… */
function destination(value: string): string | undefined {
  const [host = "", ip, more] = value.split("=");
  if (PASSWORD.test(value)) return "no password in it: ssh goes by keys here";
  if (more === undefined && /^[A-Za-z0-9_[:][\w.@:/%[\]-]*$/.test(host) && !/[@/]-/.test(host))
    return ip === undefined ? undefined : publicIp(ip);
  return "an ssh destination such as root@203.0.113.10 or an alias of ~/.ssh/config, with =PUBLIC_IP if needed";
}

const PRIVATE: readonly [RegExp, string][] = [
  [/^(0|127)\./, "means the box itself"],
  [/^(10\.|192\.168\.|172\.(1[6-9]|2\d|3[01])\.)/, "is private"],
  [/^100\.(6[4-9]|[7-9]\d|1[01]\d|12[0-7])\./, "is the provider's own (RFC 6598)"],
  [/^169\.254\./, "is link-local"],
  [/^(192\.(0\.[02]|88\.99)|198\.1[89])\./, "is for tests, documents or protocols alone (RFC 6890)"],
  [/^(22[4-9]|2[3-5]\d)\./, "is no host's"],
];

/** Those ranges as one expression, for awk too. */
export const PRIVATE_RANGES = PRIVATE.map(([range]) => range.source.replaceAll("\\d", "[0-9]")).join("|");

/** What would be right, unless `value` is an IPv4 address that other clouds can reach. */
export function publicIp(value: string): string | undefined {
  const octet = "(25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)";
  if (!new RegExp(`^${octet}(\\.${octet}){3}$`).test(value)) return "an IPv4 address such as 203.0.113.10";
  const reason = PRIVATE.find(([range]) => range.test(value))?.[1];
  return reason && `an address that other clouds can reach; ${value} ${reason}`;
}

import { readEnv } from "./env-file.ts";

/** A setting is wrong: where it came from, what was found, what would be right. Exit status 2, nothing touched. */
export class SettingError extends Error {}

interface Setting {
  value: string;
  help: string;
  /** A value as one would write it: env.example shows it, and the tests hold `check` against it. */
  example: string;
  secret?: true;
  /** What would be right, when the (non-empty) value is wrong. */
  check(value: string): string | undefined;
}

const matches = (pattern: RegExp, right: string) => (value: string) =>
  pattern.test(value) ? undefined : right;
const url = (value: string) =>
  /^https?:\/\/[\w.:[\]-]+(\/[\w.,:/%+~@-]*)?$/.test(value)
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
const file = matches(/^[^\0\n]+$/, "the path of a file");
const args = matches(
  /^[^\0\n\r'"`\\]*$/,
  "arguments separated by blanks, on one line, without quotes or backslashes",
);

/** Every setting, declared once: flags, the env file's keys, `--help` and env.example come from here. */
export const SETTINGS = {
  SERVER: {
    value: "",
    help: "ssh destination of the control plane, HOST or HOST=PUBLIC_IP; empty: this machine",
    example: "root@203.0.113.10",
    check: destination,
  },
  AGENTS: {
    value: "",
    help: "ssh destinations of the agents, HOST or HOST=PUBLIC_IP, separated by blanks",
    example: "root@198.51.100.20 debian@cloud-b=198.51.100.21",
    check: each(destination),
  },
  HOST: {
    value: "",
    help: "the box or boxes of this call, HOST or HOST=PUBLIC_IP; empty: this machine",
    example: "root@198.51.100.20",
    check: each(destination),
  },
  PUBLIC_IP: {
    value: "",
    help: "address at which other clouds reach this call's box; default: what ssh resolves HOST to",
    example: "198.51.100.20",
    check: publicIp,
  },
  K3S_VERSION: {
    value: "v1.36.2+k3s1",
    help: "k3s release, v1.17 or later",
    example: "v1.17.6+k3s1",
    check: release,
  },
  STEPS: {
    value: "",
    help: "releases that `upgrade` passes through, one of each minor version in between",
    example: "v1.34.2+k3s1 v1.35.4+k3s1",
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
  SERVER_ARGS: { value: "", help: "more arguments of k3s server", example: "--disable=traefik", check: args },
  AGENT_ARGS: {
    value: "",
    help: "more arguments of k3s agent",
    example: "--node-label=cloud=b",
    check: args,
  },
  BACKUP: {
    value: "",
    help: "the file that `backup` writes, by default a new one beside the env file, and `restore` reads",
    example: "./k3s-backup.tar.gz",
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
  K3S_URL: {
    value: "",
    help: "the cluster's API; written by `server`, read by `agent`",
    example: "https://203.0.113.10:6443",
    check: matches(/^https:\/\/[\w.-]+(:\d+)?$/, "an address such as https://203.0.113.10:6443"),
  },
  K3S_TOKEN: {
    value: "",
    help: "what joins a box to the cluster; written by `server`, read by `agent`",
    example: `K10${"0".repeat(64)}::server:${"0".repeat(32)}`,
    secret: true,
    check: matches(
      /^K10[0-9a-f]{64}::[\w-]+:[\w.-]+$/,
      "K10, the hash of the cluster's CA, ::server: and a password, as server/node-token has it",
    ),
  },
} satisfies Record<string, Setting>;

export type SettingName = keyof typeof SETTINGS;
export type Settings = Record<SettingName, string>;
export const NAMES = Object.keys(SETTINGS) as SettingName[];

/** Where each value came from, for messages: `flag --host`, `variable HOST`, `.env line 3`, `default`. */
export type Origins = Record<SettingName, string>;

export const flagOf = (name: string): string => name.toLowerCase().replaceAll("_", "-");

export const words = (value: string): string[] => value.split(/[ \t]+/).filter(Boolean);

/**
 * Settings by precedence: flag, environment, env file, default. A value that is set but empty counts.
 *
 * @throws {SettingError} for the first value that is wrong, named with its origin, and for a key of the env
 * file that is no setting: a slip of the pen would be lost.
 */
export function settle(
  flags: Record<string, string>,
  env: Record<string, string | undefined>,
  path: string,
): { settings: Settings; origins: Origins } {
  const { values, lines } = readEnv(path);
  for (const key of Object.keys(values))
    if (!(key in SETTINGS))
      throw new SettingError(`${key} (${path} line ${lines[key]}): expected a setting: ${NAMES.join(", ")}`);
  const settings = {} as Settings;
  const origins = {} as Origins;
  for (const name of NAMES) {
    const [value, origin] =
      flags[flagOf(name)] !== undefined
        ? [flags[flagOf(name)], `flag --${flagOf(name)}`]
        : env[name] !== undefined
          ? [env[name], `variable ${name}`]
          : values[name] !== undefined
            ? [values[name], `${path} line ${lines[name]}`]
            : [SETTINGS[name].value, "default"];
    settings[name] = (value as string).trim();
    origins[name] = origin as string;
    if (settings[name]) check(name, settings[name], origins[name]);
  }
  return { settings, origins };
}

/** @throws {SettingError} when the value is not one this setting can have. Secrets are not repeated. */
export function check(name: SettingName, value: string, origin: string): void {
  const setting: Setting = SETTINGS[name];
  const right = value.length > 4096 ? "at most 4096 characters" : setting.check(value);
  if (right === undefined) return;
  const shown = setting.secret ? "" : ` is ${JSON.stringify(value.slice(0, 80))}`;
  throw new SettingError(`${name}${shown} (${origin}): expected ${right}`);
}

/** A leading `-` would be an option to ssh; a destination is a host, user@host, an alias or ssh://… */
function destination(value: string): string | undefined {
  const [host, ip, more] = value.split("=");
  if (more === undefined && /^[A-Za-z0-9_[:][\w.@:/%[\]-]*$/.test(host ?? ""))
    return ip === undefined ? undefined : publicIp(ip);
  return "an ssh destination such as root@203.0.113.10 or an alias of ~/.ssh/config, with =PUBLIC_IP if needed";
}

const PRIVATE: readonly [RegExp, string][] = [
  [/^(0|127)\./, "means the box itself"],
  [/^(10\.|192\.168\.|172\.(1[6-9]|2\d|3[01])\.)/, "is private"],
  [/^100\.(6[4-9]|[7-9]\d|1[01]\d|12[0-7])\./, "is the provider's own (RFC 6598)"],
  [/^169\.254\./, "is link-local"],
  [/^(22[4-9]|2[3-5]\d)\./, "is no host's"],
];

/** What would be right, unless `value` is an IPv4 address that other clouds can reach. */
export function publicIp(value: string): string | undefined {
  const octet = "(25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)";
  if (!new RegExp(`^${octet}(\\.${octet}){3}$`).test(value)) return "an IPv4 address such as 203.0.113.10";
  const reason = PRIVATE.find(([range]) => range.test(value))?.[1];
  return reason && `an address that other clouds can reach; ${value} ${reason}`;
}

/** k3s's arguments, and its config file as the arguments that it makes of it (pkg/configfilearg). */
import { YAML } from "zx";
import type { Role } from "./unit.ts";

/** A flag by its name without dashes; its value, unless the next word is a flag or there is none. */
export interface Arg {
  flag: string;
  value: string | undefined;
}

/**
 * Splits arguments as urfave/cli does, on Go's flags: one dash or two, the value behind = or in the next word. Which
 * flags take no value only the release knows: the word behind one of those is taken for its value.
 */
export function parseArgs(args: string): Arg[] {
  const list = args.trim().split(/[ \t]+/);
  return list.flatMap((word, i) => {
    const [, flag, value] = /^-+([^=]*)(?:=(.*))?$/s.exec(word) ?? [];
    if (!flag) return [];
    const next = list[i + 1];
    // What is for another program may begin with a dash as well.
    const none = next?.startsWith("-") && !flag.endsWith("-arg");
    return [{ flag, value: value ?? (none ? undefined : next) }];
  });
}

/**
 * What k3s takes out of its config file, by YAML 1.1 with merge keys: a list is a flag for each of its values, and
 * `key+` adds to what other files say.
 *
 * @throws {Error} in one line, for what is no mapping of YAML, or is several documents (k3s reads the first alone).
 */
export function configArgs(text: string): Arg[] {
  const documents = YAML.parseAllDocuments(text, { version: "1.1", merge: true });
  if (documents.length > 1) throw new Error("it has several documents, of which k3s reads one");
  const [document] = documents;
  if (!document) return [];
  const [wrong] = document.errors;
  if (wrong) throw new Error(wrong.message.split("\n")[0].replace(/:$/, ""));
  // Aliases are followed here: it throws for those that lead nowhere, or to too much.
  const map: unknown = document.toJS();
  if (map === null) return [];
  if (typeof map !== "object" || Array.isArray(map))
    throw new Error("it is no mapping, key: value on each line");
  return Object.entries(map).flatMap(([key, value]) =>
    (Array.isArray(value) ? value : [value]).map((one) => ({
      flag: key.replace(/\+$/, ""),
      value: one === null ? "" : typeof one === "object" ? JSON.stringify(one) : String(one),
    })),
  );
}

/** The value that counts: k3s takes the last. */
export const lastOf = (args: readonly Arg[], ...flags: string[]): string | undefined =>
  args.findLast(({ flag }) => flags.includes(flag))?.value;

const SECRET =
  /^(token|t|agent-token|cluster-secret|datastore-endpoint|vpn-auth|etcd-s3-(access-key|secret-key|session-token))$/;

/** The first flag that gives k3s a secret, by its name or by a password or token in its value. */
export const secretIn = (args: readonly Arg[]): string | undefined =>
  args.find(
    ({ flag, value = "" }) =>
      SECRET.test(flag.toLowerCase().replaceAll("_", "-")) ||
      /:\/\/[^\s/]*@|[?&;](password|secret|token)=|joinkey=|K10[0-9a-f]{64}::/i.test(value),
  )?.flag;

const WHOLE = "every server is a whole one here, and a node";
const WIREGUARD = "flannel's backend is WireGuard here, between the nodes' public addresses";
const ADDRESS = "PUBLIC_IP, or HOST=PUBLIC_IP in SERVER and AGENTS, is the node's address";
const PORTS = "k3s is asked, and let through firewalls, at its own ports of every address";
const OWN_PORTS = [6443, 10250, 51820, 51821];
/** Ports as Kubernetes reads them: A-B, A+SIZE or one. What is none it refuses itself. */
const holdsOurs = {
  test(value: string): boolean {
    const [, first, sign, more = "0"] = /(?:^|=)(\d+)(?:([-+])(\d+))?$/.exec(value) ?? [];
    const last = sign === "-" ? Number(more) : Number(first) + Number(more);
    return first !== undefined && OWN_PORTS.some((port) => port >= Number(first) && port <= last);
  },
};

/** What this project gives k3s itself, or goes by: with another value nothing works after the change. */
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

/** Of those what may say no: it is so in any case. */
const SWITCHES = /^(with-node-id|no-flannel|docker|rootless|disable-.*)$/;

/** What `k3s agent` does not know, in any release: it ends at such a flag, of its config file too (pkg/configfilearg). */
const OF_SERVERS =
  /^(advertise-|agent-token|cluster-(cidr|dns|domain|init|reset)|datastore-|default-local-storage-path|disable$|disable-(agent|apiserver$|controller-manager|etcd|scheduler|cloud-controller|kube-proxy|network-policy|helm-controller)|egress-selector-mode|embedded-registry|etcd-|flannel-(backend|external-ip|ipv6-masq)|helm-|https-listen-port|kine-|kube-(apiserver|cloud-controller|controller|scheduler)|no-deploy|o$|secrets-encryption|service|supervisor-|system-default-registry|tls-san|write-kubeconfig)/;

/** The first flag that a role's k3s must not be given here, by arguments or its config file; and why. */
export function refusedIn(
  role: Role | undefined,
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

const RANGE = "SERVER_ARGS: boxes and their firewalls go by it";
/** Keys of k3s's config file that this project has to know of, and where they belong; as arguments they are followed. */
const ELSEWHERE: Record<string, string> = {
  "node-name": "SERVER_ARGS or AGENT_ARGS: --node-name=…",
  "node-label": "NODE_LABELS",
  "node-taint": "NODE_TAINTS",
  token: "K3S_TOKEN",
  t: "K3S_TOKEN",
  "cluster-secret": "K3S_TOKEN",
  "datastore-endpoint": "K3S_DATASTORE_ENDPOINT",
  "cluster-init": "no file: several servers go by K3S_DATASTORE_ENDPOINT",
  server: "K3S_URL",
  s: "K3S_URL",
  "cluster-cidr": RANGE,
  "service-cidr": RANGE,
  "cluster-domain": RANGE,
};

/** The first key that a role's k3s must not have in a config file, with where it belongs or why; nothing: all are well. */
export function wrongIn(role: Role | undefined, args: readonly Arg[]): string | undefined {
  const key = args.find(({ flag }) => Object.hasOwn(ELSEWHERE, flag))?.flag;
  if (key) return `${key}, expected it in ${ELSEWHERE[key]}`;
  return refusedIn(role, args)?.join(": ");
}

import { createHash } from "node:crypto";
import { HOPELESS } from "./journal.ts";
import { CLEAR } from "./leftovers.ts";
import { filesLook, filesPlan, labelArgs, labelsPlan } from "./node.ts";
import { type SettingName, type Settings, words } from "./settings.ts";
import { sh, writeFile } from "./sh.ts";
import { type Change, type Facts, Refusal, type Step } from "./step.ts";

export const K3S = "/usr/local/bin/k3s";

/** k3s has two ways of doing WireGuard, and this project one for each. */
export type Generation = "old" | "modern";
export type Role = "server" | "agent";

/** The interface that flannel makes: `flannel.1` by the old extension backend, `flannel-wg` since wireguard-native. */
export const interfaceOf = (generation: Generation): string =>
  generation === "old" ? "flannel.1" : "flannel-wg";

/** flannel's name for its backend, on a node: nodes of the other one are no peers. */
export const backendOf = (generation: Generation): string =>
  generation === "old" ? "extension" : "wireguard";

/**
 * Which way a k3s release goes. From v1.23 to v1.25 the names of both exist, so the binary is asked:
 * `flags` is what its help has of the modern way; without it the answer is not known yet.
 */
export function generationOf(version: string, flags?: string): Generation | undefined {
  const minor = Number(/^v1\.(\d+)\./.exec(version)?.[1]);
  if (minor < 23) return "old";
  if (minor > 25) return "modern";
  if (!minor || flags === undefined) return undefined;
  return flags.includes("--flannel-external-ip") && flags.includes("wireguard-native") ? "modern" : "old";
}

/** Facts about the binary: its version, and for the releases in between what its help has of the modern way. */
export const binaryLook = `said=$(${K3S} --version 2>/dev/null)
fact version; echo "$said" | sed -n 's/^k3s version \\(v[^ ]*\\).*/\\1/p'
fact flags; case $said in *'version v1.2'[345].*) ${K3S} server --help | grep -oE -- '--flannel-external-ip|wireguard-native' ;; esac
`;

/** Which k3s the box will run: the wanted release, or what a pushed K3S_BIN said of itself. */
export function releaseOf(want: Settings, facts: Facts): { version: string; generation?: Generation } {
  const installed = facts.version?.trim();
  const version = want.K3S_BIN ? (installed ?? "") : want.K3S_VERSION;
  const generation = generationOf(version, installed === version ? facts.flags : undefined);
  return generation ? { version, generation } : { version };
}

/** `--node-name` out of a role's arguments. */
export const nodeNameIn = (args: string): string | undefined =>
  /(?:^|\s)--node-name[= ]\s*(\S+)/.exec(args)?.[1]?.toLowerCase();

/**
 * The name under which k3s registers a box: `--node-name`, or the host name in lower case (os.Hostname, kubelet).
 * @throws {Refusal} for one that Kubernetes would not take.
 */
export function nodeNameOf(args: string, facts: Facts): string {
  const name = nodeNameIn(args) ?? (facts.hostname?.trim() ?? "").toLowerCase();
  if (!NAME.test(name))
    throw new Refusal(`"${name}" cannot be a node's name: give the box another (hostnamectl set-hostname …)`);
  return name;
}

/**
 * The article's `--node-ip <public_ip>` for both generations, with the public address put on `lo` first
 * where no network card has it. It gives every node a unique InternalIP even when two clouds use the same
 * private address, and lets a box reach its own public address without hairpin NAT. Without the address on
 * `lo`, v1.17.6 dies with "host IP unknown" until its node has addresses by luck.
 */
export function argsOf(role: Role, generation: Generation, want: Settings, proxyMode: string): string[] {
  const ip = want.PUBLIC_IP;
  const shared = [`--node-ip=${ip}`, `--node-external-ip=${ip}`];
  // One flag an argument: of the article's `--kube-proxy-arg "a" "b"` k3s drops "b" as a positional.
  if (proxyMode !== "iptables") shared.push(`--kube-proxy-arg=proxy-mode=${proxyMode}`);
  shared.push(...labelArgs(want));
  if (role === "agent") return [...shared, ...words(want.AGENT_ARGS)];
  const flannel =
    generation === "old"
      ? ["--flannel-backend=wireguard"]
      : // Without --flannel-external-ip a modern k3s deletes public-ip-overwrite at every start.
        ["--flannel-backend=wireguard-native", "--flannel-external-ip"];
  return [`--tls-san=${ip}`, ...shared, "--disable=servicelb", ...flannel, ...words(want.SERVER_ARGS)];
}

/** Before anything else is done to a box that is to run k3s: Alpine's OpenRC is not supported. */
export const systemdFirst: Step = {
  name: "systemd",
  options: [],
  look: () => ["fact openrc; test -d /run/openrc && echo yes"],
  plan(_want, facts) {
    if (facts.systemd?.trim()) return [];
    const name = /^PRETTY_NAME="?([^"\n]*)/m.exec(facts.os ?? "")?.[1] ?? "This box";
    throw new Refusal(
      `${name} is run by ${facts.openrc?.trim() ? "OpenRC" : "something else"}, not by systemd: k3s is a systemd unit here, so take a distro that has it; nothing was installed`,
    );
  },
};

export const unitOf = (role: Role): string => (role === "server" ? "k3s" : "k3s-agent");
export const unitPath = (role: Role): string => `/etc/systemd/system/${unitOf(role)}.service`;
export const envPath = (role: Role): string => `${unitPath(role)}.env`;

/** The systemd unit of the article's steps 4 and 5, with its limits. */
export function unitText(
  role: Role,
  generation: Generation,
  args: readonly string[],
  onCard: boolean,
  ip: string,
): string {
  // v1.17.6 writes the node's WireGuard private key, 0644, into its working directory: / for an agent.
  // A file that is there already keeps its mode, and both folders are 0700.
  const folder = `/var/lib/rancher/k3s/${role}`;
  const key = `ExecStartPre=/usr/bin/install -m 600 /dev/null ${folder}/privatekey`;
  const before = [
    ...["br_netfilter", "overlay", "wireguard"].map((name) => `ExecStartPre=-/sbin/modprobe ${name}`),
    ...(args.some((a) => a.endsWith("proxy-mode=ipvs"))
      ? ["ExecStartPre=-/sbin/modprobe -a ip_vs ip_vs_rr"]
      : []),
    // The label is how an address that is this box's no longer is found, and goes.
    ...(onCard
      ? []
      : [
          `ExecStartPre=/bin/sh -c 'ip addr flush dev lo label lo:k3s; ip addr replace ${ip}/32 dev lo label lo:k3s'`,
        ]),
    ...(generation === "old" ? [key] : []),
  ];
  // A modern agent tells systemd when it has joined; the old one never does. Type=exec is unknown to the
  // systemd of CentOS 7, which then takes the unit as Type=simple: as good.
  const type = role === "server" || generation === "modern" ? "notify" : "exec";
  return `[Unit]
Description=Lightweight Kubernetes
Documentation=https://k3s.io
Wants=network-online.target
After=network-online.target

[Install]
WantedBy=multi-user.target

[Service]
Type=${type}
EnvironmentFile=${envPath(role)}
${generation === "old" ? `WorkingDirectory=${folder}\n` : ""}KillMode=process
Delegate=yes
# Limits other than infinity cost performance: the kernel would have to count.
LimitNOFILE=${role === "server" ? "1048576" : "infinity"}
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
TimeoutStartSec=0
Restart=always
RestartSec=5s
${before.join("\n")}
ExecStart=${K3S} ${[role, ...args.map(unitWord)].join(" \\\n    ")}
`;
}

/** One word of ExecStart=: systemd expands % and $ in it. @see systemd.service(5), COMMAND LINES */
const unitWord = (word: string) => word.replaceAll("%", "%%").replaceAll("$", "$$$$");

/**
 * The shell function `kc`: kubectl with what this box may read the nodes with: the admin's on a server; on an
 * agent k3s-controller's, which lists nodes on modern k3s, or the kubelet's own, which could before v1.32
 * (AuthorizeNodeWithSelectors). So an agent is checked, and annotated, without going to the server.
 */
export const KUBECTL = `kc() {
  agent=/var/lib/rancher/k3s/agent
  for config in /etc/rancher/k3s/k3s.yaml $agent/k3scontroller.kubeconfig $agent/kubelet.kubeconfig; do
    [ -s "$config" ] || continue
    # kubectl prints an empty list beside "Forbidden": its word counts only when it succeeds.
    if out=$(timeout 20 ${K3S} kubectl --kubeconfig "$config" --request-timeout=10s "$@"); then
      printf '%s\\n' "$out"
      return
    fi
    case $config in /etc/*) return 1 ;; esac
  done
  return 1
}`;

/** Facts about the service of a role on its box, and the cluster's nodes as that box can see them. */
export function serviceLook(role: Role): string[] {
  const unit = unitOf(role);
  const other = unitOf(role === "server" ? "agent" : "server");
  const service = `fact unit; cat ${unitPath(role)} 2>/dev/null
fact envfile; stat -c %a ${envPath(role)} 2>/dev/null && sha256sum <${envPath(role)} | cut -d' ' -f1
fact written; stat -c %Z ${K3S} ${unitPath(role)} ${envPath(role)} 2>/dev/null
fact service; systemctl show ${unit} -p ActiveState -p MainPID -p ExecMainStartTimestampMonotonic -p NeedDaemonReload
fact enabled; systemctl is-enabled ${unit} 2>/dev/null
fact other; systemctl is-active ${other} 2>/dev/null
fact ipvs; { test -d /sys/module/ip_vs || modprobe -n -q ip_vs 2>/dev/null; } && echo yes
`;
  return [binaryLook, service, filesLook, clusterLook];
}

/** WireGuard's peers, never the private key. */
export const peersLook =
  'fact peers; for i in flannel.1 flannel-wg; do wg show "$i" dump 2>/dev/null | sed "1d;s/^/$i\t/"; done';

export const nodesLook = `${KUBECTL}
fact nodes; kc get nodes -o json 2>/dev/null`;

/** Facts about the cluster as this box sees it: its nodes, and WireGuard's peers. */
export const clusterLook = `${nodesLook}
${peersLook}
fact interfaces; ls /sys/class/net
`;

/**
 * Marks a node that this project drains, so that a run which was cut is taken up and no node of the user's is
 * uncordoned: with the box's boot id then, and `.done` behind it when no pods are left.
 */
export const DRAINED = "k3s-across-clouds/drained";

export interface Node {
  name: string;
  ready: boolean;
  cordoned: boolean;
  /** Its box's boot id as its kubelet has it, and the one in which this project drained it. */
  boot: string | undefined;
  drained: { boot: string; done: boolean } | undefined;
  /** When it joined, in seconds since 1970 by the server's clock. */
  created: number;
  /** When its kubelet last said so, in seconds since 1970 by the node's own clock. */
  heartbeat: number;
  internalIp: string | undefined;
  externalIp: string | undefined;
  podCidr: string | undefined;
  /** flannel's annotations: the address its peers use, and the one it was told to use at its next start. */
  publicIp: string | undefined;
  overwrite: string | undefined;
  version: string;
  /** The arguments that k3s really got, secrets masked by k3s (its annotation node-args). */
  args: string[];
  /** What the kubelet runs short of: MemoryPressure, DiskPressure, PIDPressure. */
  pressure: string[];
  labels: Record<string, string>;
  /** `key=value:Effect` or `key:Effect`. */
  taints: string[];
  /** flannel's backend, see backendOf(). */
  backend: string | undefined;
}

/** What is read of a Node as the API gives it. */
interface NodeObject {
  kind?: string;
  metadata: {
    name: string;
    creationTimestamp?: string;
    annotations?: Record<string, string>;
    labels?: Record<string, string>;
  };
  spec?: {
    podCIDR?: string;
    unschedulable?: boolean;
    taints?: { key: string; value?: string; effect: string }[];
  };
  status?: {
    addresses?: { type: string; address: string }[];
    conditions?: { type: string; status: string; lastHeartbeatTime: string }[];
    nodeInfo?: { kubeletVersion: string; bootID?: string };
  };
}

/** Names and addresses as the API server itself would have them; any agent may write annotations. */
const NAME = /^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$/;
const IP = /^[0-9a-f.:]{2,39}$/;
const BOOT = /^[0-9a-f-]{36}$/;
const CIDR = /^[0-9a-f.:]{2,39}\/\d{1,3}$/;
const VERSION = /^v[\w.+-]{1,60}$/;
const only = (pattern: RegExp, value: string | undefined) => (pattern.test(value ?? "") ? value : undefined);

/**
 * Nodes out of the JSON of a NodeList or of one Node; none where the text is neither. What is no address is
 * left out: an agent may write into its own node what it likes, and must not reach another box's shell.
 */
export function nodesOf(json = ""): Node[] {
  try {
    const object = JSON.parse(json);
    const list: NodeObject[] = object.kind === "Node" ? [object] : object.items;
    return list.flatMap(({ metadata, spec, status }) => {
      if (!NAME.test(metadata.name)) return [];
      const address = (type: string) => only(IP, status?.addresses?.find((a) => a.type === type)?.address);
      const note = (name: string) => only(IP, metadata.annotations?.[`flannel.alpha.coreos.com/${name}`]);
      const ready = status?.conditions?.find((c) => c.type === "Ready");
      return {
        name: metadata.name,
        ready: ready?.status === "True",
        cordoned: spec?.unschedulable === true,
        boot: only(BOOT, status?.nodeInfo?.bootID),
        drained: drainedIn(metadata.annotations?.[DRAINED]),
        created: Date.parse(metadata.creationTimestamp ?? "") / 1000 || 0,
        heartbeat: Date.parse(ready?.lastHeartbeatTime ?? "") / 1000 || 0,
        internalIp: address("InternalIP"),
        externalIp: address("ExternalIP"),
        podCidr: only(CIDR, spec?.podCIDR),
        publicIp: note("public-ip"),
        overwrite: note("public-ip-overwrite"),
        version: only(VERSION, status?.nodeInfo?.kubeletVersion) ?? "",
        args: argsIn(metadata.annotations?.["k3s.io/node-args"]),
        pressure: (status?.conditions ?? []).flatMap(({ type, status }) =>
          /^[A-Z][A-Za-z]+Pressure$/.test(type) && status === "True" ? [type] : [],
        ),
        labels: metadata.labels ?? {},
        taints: (spec?.taints ?? []).map(
          ({ key, value, effect }) => `${key}${value ? `=${value}` : ""}:${effect}`,
        ),
        backend: only(NAME, metadata.annotations?.["flannel.alpha.coreos.com/backend-type"]),
      };
    });
  } catch {
    return [];
  }
}

function drainedIn(mark = ""): Node["drained"] {
  const boot = mark.replace(/\.done$/, "");
  return BOOT.test(boot) ? { boot, done: boot !== mark } : undefined;
}

function argsIn(json = "[]"): string[] {
  try {
    return (JSON.parse(json) as unknown[]).filter((word) => typeof word === "string");
  } catch {
    return [];
  }
}

export interface Peer {
  interface: string;
  /** Its public key. */
  key: string;
  endpoint: string;
  allowedIps: string[];
  /** Time of the last handshake in seconds since 1970; 0: never. */
  handshake: number;
  /** Bytes received from it and sent to it. */
  received: number;
  sent: number;
}

/** Peers out of the fact `peers`: lines of `wg show IF dump` less the first, each behind its interface. @see wg(8) */
export function peersOf(dump = ""): Peer[] {
  return dump
    .split("\n")
    .map((line) => line.split("\t"))
    .filter((fields) => fields.length === 9)
    .map(([name, key, , endpoint, allowed, handshake, received, sent]) => ({
      interface: name as string,
      key: key as string,
      endpoint: endpoint as string,
      allowedIps: allowed === "(none)" ? [] : (allowed as string).split(","),
      handshake: Number(handshake),
      received: Number(received),
      sent: Number(sent),
    }));
}

/** `systemctl show` and other KEY=value lines. */
export function pairs(text = ""): Record<string, string> {
  return Object.fromEntries(
    text.split("\n").flatMap((line) => (line.includes("=") ? [split(line, "=")] : [])),
  );
}

function split(line: string, by: string): [string, string] {
  const at = line.indexOf(by);
  return [line.slice(0, at), line.slice(at + 1)];
}

/** When the service's process started, in seconds since 1970; undefined when it is not running. */
export function startedAt(facts: Facts): number | undefined {
  const service = pairs(facts.service);
  const since = Number(service.ExecMainStartTimestampMonotonic) / 1e6;
  // A modern agent may be Ready while systemd still has it "activating" (v1.36.3 on a slow box, seen).
  if (!Number(service.MainPID) || !since) return undefined;
  return Number(facts.now) - (Number(facts.uptime) - since);
}

/** Is the public address on a network card (and not only on \`lo\`, where our unit puts it)? */
export function onCard(ip: string, facts: Facts): boolean {
  return (facts.addresses ?? "")
    .split("\n")
    .map((line) => line.split(/\s+/))
    .some(([, device, , address]) => device !== "lo" && address?.split("/")[0] === ip);
}

/** ipvs is wanted, but the kernel lacks it: iptables, as kube-proxy itself would do (v1.17.6, recorded). */
const lacksIpvs = (want: Settings, facts: Facts): boolean =>
  want.PROXY_MODE === "ipvs" && !facts.ipvs?.trim();

/** How a healthy node is told of; with what of the settings could not be had. */
export function healthySaying(role: Role, want: Settings, facts: Facts): string {
  const name = nodeNameOf(role === "server" ? want.SERVER_ARGS : want.AGENT_ARGS, facts);
  const proxy = lacksIpvs(want, facts) ? "; its kernel has no ip_vs, so kube-proxy uses iptables" : "";
  return `k3s ${releaseOf(want, facts).version} runs as wanted, node ${name} is Ready${proxy}`;
}

/** Why the node is not healthy yet; systemd's word is not asked: a looping k3s is "active" too. */
export function ailments(name: string, ip: string, generation: Generation, facts: Facts): string[] {
  const node = nodesOf(facts.nodes).find((n) => n.name === name);
  if (!node) return [`node ${name} is not registered`];
  const started = startedAt(facts) ?? Number.POSITIVE_INFINITY;
  return [
    node.ready ? "" : `node ${name} is not Ready`,
    // A node counts as Ready for 40 s after its kubelet has died: it must have said so since this start.
    node.heartbeat >= Math.floor(started) - 1 ? "" : `node ${name} has not reported since its last start`,
    node.externalIp === ip ? "" : `ExternalIP of ${name} is ${node.externalIp ?? "not set"}, not ${ip}`,
    (facts.interfaces ?? "").split("\n").includes(interfaceOf(generation))
      ? ""
      : `no ${interfaceOf(generation)} yet`,
  ].filter(Boolean);
}

const SECRET = /@([A-Z0-9_]+)@/g;

/** A text with its secrets in their places. */
export const filled = (text: string, want: Settings): string =>
  text.replace(SECRET, (_, name) => want[name as SettingName]);

export const sha256 = (text: string) => createHash("sha256").update(text).digest("hex");

/**
 * Changes that make a role's unit run as wanted: its two files, then one restart if what runs is older than
 * what is on disk (so a run that was cut between the two is finished by the next), then health.
 *
 * @param env lines of the EnvironmentFile; `@NAME@` stands for a setting that is secret.
 * @param before what else has to be made before the next start.
 */
export function servicePlan(
  role: Role,
  env: string,
  want: Settings,
  facts: Facts,
  before: readonly Change[] = [],
): Change[] {
  const { version, generation } = releaseOf(want, facts);
  if (!generation) return [{ why: "ask the k3s binary for its flags", sh: ":", lookAgain: true }];
  if (/^(active|activating)/.test(facts.other ?? ""))
    throw new Refusal(
      `This box runs ${unitOf(role === "server" ? "agent" : "server")}: it cannot be ${unitOf(role)} as well`,
    );
  if (want.PROXY_MODE === "nftables" && Number(version.split(".")[1]) < 31)
    throw new Refusal(`PROXY_MODE=nftables needs k3s v1.31 or later, not ${version}`);

  const unit = unitOf(role);
  const noIpvs = lacksIpvs(want, facts);
  const args = argsOf(role, generation, want, noIpvs ? "iptables" : want.PROXY_MODE);
  const text = unitText(role, generation, args, onCard(want.PUBLIC_IP, facts), want.PUBLIC_IP);
  const name = nodeNameOf(role === "server" ? want.SERVER_ARGS : want.AGENT_ARGS, facts);
  const { changes: files, gone } = filesPlan(generation, version, want, facts);
  const changes: Change[] = [...before, ...labelsPlan(role, name, args, facts), ...files];
  if (facts.envfile?.trim() !== `600\n${sha256(filled(env, want))}`) {
    const secrets = [...env.matchAll(SECRET)].map((m) => m[1] as SettingName);
    changes.push({
      why: `write ${envPath(role)} (0600)`,
      sh: writeFile(envPath(role), env, "600", secrets),
      ...(secrets.length ? { secrets } : {}),
    });
  }
  if (facts.unit !== text)
    changes.push({
      ...rewrite(
        unitPath(role),
        facts.unit,
        text,
        noIpvs ? "this kernel has no ip_vs: iptables instead" : "",
      ),
      sh: `install -d -m 700 /var/lib/rancher/k3s/${role}\n${writeFile(unitPath(role), text)}`,
    });

  const started = startedAt(facts);
  // ctime in whole seconds; half a second of grace for what was written just before this start. What was
  // written in the future was written by a clock that has been set back since.
  const stale = `${facts.written}\n${facts.read}`
    .split("\n")
    .some((s) => Number(s) > Math.floor((started ?? 0) + 0.5) && Number(s) <= Number(facts.now));
  const ills = ailments(name, want.PUBLIC_IP, generation, facts);
  const down = started === undefined || facts.enabled?.trim() !== "enabled";
  const border = (facts.interfaces ?? "")
    .split("\n")
    .includes(interfaceOf(generation === "old" ? "modern" : "old"));
  // Another binary is put in place before this change.
  const newBinary = facts.version?.trim() !== version;
  const reload = pairs(facts.service).NeedDaemonReload === "yes";
  const due = changes.length + gone.length > 0 || down || stale || border || newBinary || reload;
  const other = nodesOf(facts.nodes).find((node) => node.name === name)?.externalIp;
  if (!due && other && other !== want.PUBLIC_IP && Number(facts.now) - started > SETTLES)
    throw new Refusal(
      `Node ${name} has the public address ${other}, this box ${want.PUBLIC_IP}: another box has its name`,
    );
  if (due)
    changes.push(
      restart(role, generation, name, want, { verb: down ? "start" : "restart", gone, clear: border }),
    );
  else if (ills.length)
    changes.push({
      why: `wait until node ${name} is healthy: ${ills.join(", ")}`,
      sh: `unit=${unit}; pid=$(systemctl show ${unit} -p MainPID | cut -d= -f2); since=0; stand=0\n${healthSh(name, generation, want, role === "agent" ? 1 : 0)}`,
      seconds: WAIT + 60,
    });
  return changes;
}

/** After so many seconds a node that started with another ExternalIP has it: v1.17.6 took up to 60. */
const SETTLES = 120;

/** How long a node may take to become healthy, in seconds: v1.36.3 on two emulated CPUs took 168, starved ones 460. */
const WAIT = 600;

/**
 * The change that (re)starts a unit and waits until its node is healthy. Over the border of the generations
 * (`clear`) the other one's pods and interface go first: both of flannel's interfaces listen on 51820.
 */
export function restart(
  role: Role,
  generation: Generation,
  name: string,
  want: Settings,
  {
    verb = "restart",
    gone = [],
    clear = false,
  }: { verb?: string; gone?: readonly string[]; clear?: boolean } = {},
): Change {
  const unit = unitOf(role);
  // In one change: a run that is cut between the two would leave a k3s that runs by what is no longer there.
  const remove = gone.length ? `rm -f ${gone.join(" ")}\n` : "";
  const cleared = clear
    ? `timeout 60 systemctl stop ${unit} || systemctl kill -s KILL ${unit}\n${CLEAR}`
    : "";
  return {
    why: `${gone.map((path) => `remove ${path}, `).join("")}${verb} ${unit} and wait until node ${name} is Ready with its public address`,
    // --no-block: with wrong credentials a modern agent stays "activating" for ever (seen with v1.36.3).
    sh: `${remove}unit=${unit}; pid=; since=$(date +%s); stand=0
# v1.36.3 with a wrong backend dies a second after it was up. It makes no interface, but where one is left from
# before, only time tells: k3s has to stand for five seconds.
[ ! -d /sys/class/net/${interfaceOf(generation)} ] || stand=5
systemctl daemon-reload
systemctl enable ${unit} >/dev/null 2>&1
${cleared}systemctl restart --no-block ${unit}
${healthSh(name, generation, want, role === "agent" ? 1 : 0, role === "server" && generation === "modern" && verb === "start" ? DOOR : "")}`,
    seconds: WAIT + 60,
  };
}

/**
 * Tells the token as soon as it opens the server's door, so that agents join while the server's own node gets
 * Ready. Not on old k3s, which annotate restarts once more.
 */
const DOOR = `if [ -z "\${open-}" ] && token=$(cat /var/lib/rancher/k3s/server/node-token 2>/dev/null) && [ -n "$token" ]; then
    door=$(printf 'user = "node:%s"\\n' "\${token##*:}" |
      curl -s -K - --cacert /var/lib/rancher/k3s/server/tls/server-ca.crt --max-time 5 -o /dev/null -w '%{http_code}' \\
        https://127.0.0.1:6443/v1-k3s/client-k3s-controller.crt) || :
    if [ "$door" = 200 ]; then open=yes; early token "$token"; fi
  fi
`;

/** Waits for a healthy node, says how it goes, and on failure prints the journal's lines that matter. */
function healthSh(
  name: string,
  generation: Generation,
  want: Settings,
  peers: number,
  meanwhile = "",
): string {
  return `${KUBECTL}
began=$(date +%s); starts=0; was=; up=
nap() { sleep 0.5 2>/dev/null || sleep 1; }
# A second, or less when systemd hears just then that k3s is up.
pause() {
  for _ in 1 2; do
    nap
    [ -n "$up" ] || [ "$(systemctl is-active "$unit")" != active ] || { up=yes; return 0; }
  done
}
fail() {
  echo "$1"
  echo "journal of $unit since then, what matters of it:"
  # A start of v1.36.3 is some 600 lines; what it says last is why it ended.
  journalctl -u "$unit" -o cat --no-pager --since "@$began" -n 5000 |
    grep -E 'level=(error|fatal|warn)|^[EF][0-9]{4} |Incorrect Usage|not defined|panic:' |
    sed -E 's/^time="[^"]*" //; s/^[EF][0-9]{4} [0-9:.]+ +[0-9]+ //' | tac | awk '!seen[$0]++' | cut -c1-400 | head -n 12 | tac
  exit 1
}
while :; do
  pause
  beat
  now=$(date +%s)
  ${meanwhile}p=$(systemctl show "$unit" -p MainPID | cut -d= -f2)
  if [ "$p" != "$pid" ]; then pid=$p; since=$now; [ "$p" = 0 ] || starts=$((starts + 1)); fi
  [ "$starts" -lt 5 ] || fail "$unit starts again and again"
  if [ "$(journalctl -u "$unit" -o cat --no-pager --since "@$began" | grep -cE '${HOPELESS}')" -ge 3 ]; then
    fail "$unit cannot go on"
  fi
  # kubectl costs a small box a good part of a second: it is asked when it can say yes.
  state=; [ ! -d /sys/class/net/${interfaceOf(generation)} ] || state=$(kc get node ${sh(name)} -o json 2>/dev/null | awk -F'"' '
    /"lastHeartbeatTime":/ { beat = $4 } /"status":/ { status = $4 } /"type": "Ready"/ { ready = status " " beat }
    /"address":/ { address = $4 } /"type": "ExternalIP"/ { ip = address } END { print ready, ip }') || state=
  read -r ready beat ip <<END
$state
END
  case $ready in True) shown=Ready ;; '') shown='not registered yet' ;; *) shown='not Ready' ;; esac
  [ -d /sys/class/net/${interfaceOf(generation)} ] || shown='no ${interfaceOf(generation)} yet'
  [ "$ip" = ${sh(want.PUBLIC_IP)} ] || [ -z "$ready" ] || shown="$shown, ExternalIP \${ip:-not set}"
  if [ "$ready" = True ] && [ "$(date -d "$beat" +%s)" -ge $((since - 2)) ] && [ "$ip" = ${sh(want.PUBLIC_IP)} ]; then
    [ $((now - since)) -lt "$stand" ] || break
  fi
  [ "$shown" = "$was" ] || say "node ${name}: $shown"
  was=$shown
  [ $((now - began)) -lt ${WAIT} ] || fail "node ${name} is not healthy after ${WAIT} s: $shown"
done
# WireGuard needs some seconds more; who is still missing then is the next look's to say.
end=$(($(date +%s) + 10))
while [ "$(date +%s)" -lt "$end" ]; do
  wg show ${interfaceOf(generation)} dump | awk -v now="$(date +%s)" 'NR > 1 && $4 != "(none)" && now - $5 > 180 { bad = 1 } NR > 1 { n++ } END { exit bad || n < ${peers} }' && break
  nap
done`;
}

/** How two texts differ, line by line: `- ` what goes and `+ ` what comes, in the order of the new text. */
export function diff(have: string, text: string): string[] {
  // A line's continuation is no part of what it says: the last argument has none.
  const [a, b] = [have, text].map((t) => t.split("\n").map((line) => line.replace(/ \\$/, "").trim()));
  const [from, to] = [a as string[], b as string[]];
  // The longest common subsequence of what follows line i of one and line j of the other.
  const common = Array.from({ length: from.length + 1 }, () => new Array<number>(to.length + 1).fill(0));
  const at = (i: number, j: number) => common[i]?.[j] ?? 0;
  for (let i = from.length - 1; i >= 0; i--)
    for (let j = to.length - 1; j >= 0; j--)
      (common[i] as number[])[j] =
        from[i] === to[j] ? at(i + 1, j + 1) + 1 : Math.max(at(i + 1, j), at(i, j + 1));
  const lines: string[] = [];
  for (let i = 0, j = 0; i < from.length || j < to.length; )
    if (i < from.length && j < to.length && from[i] === to[j]) {
      i++;
      j++;
    } else if (i < from.length && (j === to.length || at(i + 1, j) >= at(i, j + 1)))
      lines.push(`- ${from[i++]}`);
    else lines.push(`+ ${to[j++]}`);
  return lines;
}

/** A file that is written anew: its differences for the dry run, and the first of them in one line; and a note. */
export function rewrite(
  path: string,
  have: string | undefined,
  text: string,
  note = "",
): Pick<Change, "why" | "detail"> {
  const more = note && `; ${note}`;
  if (!have) return { why: `write ${path}: it is not there${more}` };
  const detail = diff(have, text);
  if (detail.length === 0) return { why: `write ${path}: its blanks differ${more}` };
  const rest = detail.length > 6 ? `, and ${detail.length - 6} lines more` : "";
  return {
    why: `write ${path}: ${detail.slice(0, 6).join(", ")}${rest}${more}`,
    detail: note ? [...detail, note] : detail,
  };
}

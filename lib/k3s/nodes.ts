/** What a box sees of its cluster: the nodes by the API, WireGuard's peers by wg. */

import { isIP } from "node:net";
import { raw, sh } from "../sh.ts";
import { type Facts, prints } from "../step.ts";
import { KEY, PRIVATE_RANGES, publicIp, WORD } from "../table.ts";
import { type Generation, K3S, NAME, shownLook } from "./unit.ts";

/**
 * The shell function `kc`: kubectl with credentials that may read nodes: the admin's on a server; on an agent those of
 * k3s-controller (modern k3s), or of the kubelet, which could before v1.32 (AuthorizeNodeWithSelectors). So an agent is
 * checked, and annotated, without the server. A k3s.yaml on an agent is a leftover or belongs to another cluster.
 */
export const KUBECTL = sh`kc() {
  agent=/var/lib/rancher/k3s/agent
  configs="$agent/k3scontroller.kubeconfig $agent/kubelet.kubeconfig"
  [ ! -s /etc/rancher/k3s/k3s.yaml ] || case $(systemctl is-active k3s 2>/dev/null) in active | *ing) configs=/etc/rancher/k3s/k3s.yaml ;; esac
  for config in $configs; do
    [ -s "$config" ] || continue
    # kubectl prints an empty list beside "Forbidden": its word counts only when it succeeds.
    if out=$(timeout 20 ${K3S} kubectl --kubeconfig "$config" --request-timeout=10s "$@"); then
      printf '%s\n' "$out"
      return
    fi
  done
  return 1
}`;

/** Seconds after which WireGuard drops a session; while keepalives flow it is renewed every 120. */
export const FRESH = 180;

/**
 * The earliest time of a handshake that counts, in seconds since 1970. v1.17 recreates its key and flannel.1 some time
 * after `started`, its start: until then the previous process's are seen.
 */
export const oldest = (generation: Generation, now: number, started = 0): number =>
  Math.max(now - FRESH, generation === "old" ? Math.floor(started) - 2 : 0);

/** Shell for the time, in seconds since 1970: asked now, or as a look has read it already. */
const [ASKED, READ] = [raw("$(date +%s)"), raw("now")];

/** The same as shell code: computes `oldest` from `since`, the time of the start. */
export const oldestSh = (generation: Generation, now = ASKED): string =>
  sh`oldest=$((${now} - ${FRESH}))${raw(generation === "old" ? `; [ "$oldest" -ge $((since - 2)) ] || oldest=$((since - 2))` : "")}`;

/**
 * Shell that sets `since` to when a unit was started, in seconds since 1970. `monotonic`: shell for systemd's
 * ExecMainStartTimestampMonotonic, in microseconds.
 */
export const startedSh = (monotonic: string, now = ASKED): string =>
  sh`since=${raw(monotonic)}; since=\${since%??????}
read -r up _ </proc/uptime
since=$((${now} - \${up%.*} + \${since:-0}))
`;

/** WireGuard's peers, never the private key. */
const PEERS =
  'for i in flannel.1 flannel-wg; do [ ! -d "/sys/class/net/$i" ] || wg show "$i" dump 2>/dev/null | sed "1d;s/^/$i\t/"; done';
export const peersLook = prints("peers")(`fact peers; ${PEERS}`);

/**
 * curl as the user of `api`, whose certificate and key stay in k3s's own files of mode 0600: the admin on a server. On an
 * agent k3s-controller may read a node, and on modern k3s list them; the kubelet could list them before v1.32.
 */
export const CURL = `curl -q -sS --noproxy '*' --cacert "$tls/server-ca.crt" --cert "$tls/$user.crt" --key "$tls/$user.key"`;

/**
 * The shell function `api METHOD PATH [SECONDS]`: asks the API by curl, since a kubectl takes 0.2 s of CPU and 139 MB
 * (v1.36.3). A POST reads its body from standard input. On failure it prints one line to standard error. kubectl is the
 * fallback where curl is missing or cannot use the key (CentOS 7 and EC keys). `apiuser` finds out anew by what: files
 * that k3s writes at its start, v1.17.6's agent with another port each time.
 */
export const API = sh`${raw(KUBECTL)}
apiuser() {
  tls=/var/lib/rancher/k3s/server/tls; user=client-admin; users=$user; config=/etc/rancher/k3s/k3s.yaml
  # A look has asked systemd already.
  case \${agent_unit:-$(systemctl is-active k3s-agent 2>/dev/null)} in active | activating | *ActiveState=activ*) false ;; *) [ -s $tls/$user.key ] ;; esac || {
    tls=/var/lib/rancher/k3s/agent; users='client-k3s-controller client-kubelet'; config=$tls/kubelet.kubeconfig
  }
  key=
  [ ! -s "$config" ] || while read -r key apiurl; do [ "$key" != server: ] || break; done <"$config"
  [ "$key" = server: ] || apiurl=
}
apiuser
request() {
  ${raw(CURL)} -m "$patience" "$@" -w '\n%{http_code}' "\${apiurl:-https://127.0.0.1:6443}$path" 2>/dev/null
}
api() {
  path=$2; patience=\${3:-20}; body=; refused=
  case $1 in POST) verb=create; body=$(cat) ;; DELETE) verb=delete ;; *) verb="get" ;; esac
  set -- -X "$1"
  [ -z "$body" ] || set -- "$@" -H 'Content-Type: application/json' --data-binary @-
  for user in $users; do
    [ -s "$tls/$user.key" ] || continue
    if [ -n "$body" ]; then answer=$(printf %s "$body" | request "$@"); else answer=$(request "$@" </dev/null); fi
    case $? in
      0)
        code=\${answer##*"
"}
        answer=\${answer%"$code"}
        case $code in
          2*) printf '%s\n' "$answer"; return ;;
          401) refused=; break ;; # a curl that gave no certificate
          403) refused="$code $answer" ;;
          *) refused="$code $answer"; break ;;
        esac ;;
      7) refused='it refuses connections'; break ;;
      28) refused="did not answer in $patience s"; break ;;
      52 | 56) refused='it closes connections'; break ;;
      *) break ;;
    esac
  done
  [ -z "$refused" ] || { printf %s "$refused" | tr '\n' ' ' | cut -c1-600 >&2; return 1; }
  set -- "$verb" --raw "$path"
  [ -z "$body" ] || set -- "$@" -f -
  if [ -n "$body" ]; then printf %s "$body" | kc "$@"; else kc "$@" </dev/null; fi
}`;

/** Shell that puts each item of a list, as `?pretty=false` gives it, on a line of its own. */
export const ITEMS = String.raw`sed 's/},{"metadata":{/},\
{"metadata":{/g'`;

/**
 * Shell that shapes nodes, as `?pretty=false` gives them, down to about what nodesOf() reads, a line each: without
 * images and managedFields, most of a node's 6 to 20 kB. Any other text passes as it is. The quotes within a string are
 * escaped, so none can pass for a key.
 */
export const SHAPE = String.raw`${ITEMS} | sed -E '/^\{("kind":"Node|"metadata":\{)/!b
s/,"managedFields":\[.*\]\},"spec":\{/},"spec":{/
s/("nodeInfo":\{("[^"\\]*"|[^"{}]|\{("[^"\\]*"|[^"{}])*\})*\}),".*\}\}(,|\]\})?$/\1}}\4/
s/"(capacity|allocatable)":\{("[^"\\]*"|[:,])*\},//g
s/("lastTransitionTime":"[^"\\]*"),"reason":"[^"\\]*","message":"[^"\\]*"\}/\1}/g'`;

/**
 * The shell function `nodes [NAME]`, for what waits for a node: a line a node, with the status in kubectl's words, as
 * `b1 Ready,SchedulingDisabled boot=… version=… beat=… internal-ip=… external-ip=… public-ip=… .`. What a node may not have said is `-`, and no value has a
 * blank. A node ends with the next one's metadata; what stands last counts, since labels stand before conditions.
 */
export const NODES = sh`${raw(API)}
words() {
  awk -v RS='}' '
    function of(key, value) {
      if (!match($0, "\"" key "\": *\"[^\"]*")) return value
      value = substr($0, RSTART, RLENGTH); sub(/.*"/, "", value); gsub(/[^0-9A-Za-z.:+-]/, "?", value)
      return value
    }
    function ends() {
      if (name) print name, (ready == "True" ? "Ready" : "NotReady") cordoned, "boot=" boot, "version=" version, "beat=" beat, "internal-ip=" internal, "external-ip=" external, "public-ip=" flannel, "."
    }
    /"metadata":."name":/ { ends(); name = of("name"); boot = version = beat = internal = external = flannel = "-"; ready = cordoned = "" }
    { boot = of("bootID", boot); version = of("kubeletVersion", version); flannel = of("flannel.alpha.coreos.com/public-ip", flannel) }
    of("type") == "Ready" { ready = of("status"); beat = of("lastHeartbeatTime") }
    of("type") == "InternalIP" && internal == "-" { internal = of("address") }
    of("type") == "ExternalIP" && external == "-" { external = of("address") }
    /"unschedulable":true/ { cordoned = ",SchedulingDisabled" }
    END { ends() }'
}
nodes() {
  apiuser
  api GET "/api/v1/nodes\${1:+/$1}?pretty=false" 10 2>/dev/null | words
}`;

/**
 * The shell function `changed NAME SECONDS`: $node is what `nodes NAME` says, as soon as that is not what it was, or after
 * SECONDS. It watches as the last of `users`: the kubelet may watch its own node in both generations, even before there is
 * one. Where curl cannot, or the watch ended early or said nothing, it asks once, and a second passes.
 */
export const WATCH = sh`${raw(NODES)}
node=; seen=
changed() {
  [ -n "$seen" ] || apiuser
  user=\${users##* }
  # A watch begins with the node as it is, if there is one: grep passes over what is known, and curl is ended with the
  # first line that is new. Without one it says how much it got, and in what time: a server that stops ends it early. A shell may say whom it saw end.
  line=$(
    exec 2>/dev/null
    sh -c 'echo $$; exec "$@"' - ${raw(CURL)} -f -N -m "$2" -w '%{size_download} %{http_code} %{time_total}' \
      "\${apiurl:-https://127.0.0.1:6443}/api/v1/nodes?pretty=false&watch=1&fieldSelector=metadata.name%3D$1" | {
      read -r curl
      grep -m 1 -vF "\"resourceVersion\":\"$seen\""
      kill "$curl"
    }
  ) || :
  case $line in
    '{"type":"DELETED"'*) node=; seen= ;;
    [1-9]*" 200 $2."*) ;;
    '{"type":"'[AM]*'}') seen=\${line#*'"resourceVersion":"'}; seen=\${seen%%'"'*}; node=$(printf '%s\n' "$line" | words) ;;
    *) seen=; node=$(nodes "$1"); sleep 1 ;;
  esac
}`;

/** The fact `load`: load averages, cores, memory and swap. */
export const loadLook = prints(
  "load",
)(`fact load; cat /proc/loadavg; getconf _NPROCESSORS_ONLN 2>/dev/null || nproc
grep -E '^(MemTotal|MemAvailable|SwapTotal|SwapFree):' /proc/meminfo`);

/**
 * The shell function `concerns [OLDEST] [JOINING ADDRESS]`: reads WireGuard's peers, as peersLook prints them, then
 * shaped nodes, and prints what of both concerns an agent: servers, and whoever has no handshake with it at its public
 * address later than OLDEST. So what agents say grows with their number, not with its square (issue 14). Of the others
 * it prints names and addresses if somebody has no handshake, or if $others is "names". Before the agent has joined it
 * prints servers and nodes with its ADDRESS, and no peers. It passes on as it is what it cannot read, all if $others is
 * "whole", and all with peers of both generations.
 */
export const CONCERNS = String.raw`concerns() { awk -v oldest="$1" -v joining="$2" -v ip="$3" -v others="${"$"}{others:-}" -v mark="$m" '
function text(key,   start, value) {
  if (!(start = index($0, key "\""))) return ""
  value = substr($0, start + length(key) + 1)
  return substr(value, 1, index(value, "\"") - 1)
}
function add(node) { printf "%s%s", (added++ ? ",\n" : ""), node }
$0 == "" { next }
/^[^ {}]/ {
  peer[++peers] = $0; split($0, field, "\t"); nets = split(field[5], net, ",")
  if (!(field[1] in kind)) { kind[field[1]]; kinds++ }
  sub(/:[0-9]+$/, "", field[4])
  for (i = 1; i <= nets; i++) { by[net[i]] = peers; at[net[i]] = field[4]; shaken[net[i]] = field[6] }
  next
}
!list && !whole {
  if (kinds < 2 && others != "whole" && match($0, /^[{].*"items":\[/)) {
    list = 1; print substr($0, 1, RLENGTH); $0 = substr($0, RLENGTH + 1)
  } else whole = 1
}
whole { print; next }
{
  sub(/(,|\]\})$/, "")
  if ($0 == "") next
  external = text("\"type\":\"ExternalIP\",\"address\":")
  cidr = text("\"spec\":{\"podCIDR\":")
  internal = text("\"type\":\"InternalIP\",\"address\":")
  home = external == "" && internal "/" == substr(cidr, 1, index(cidr, "/"))
  proven = joining
  if (cidr in by && shaken[cidr] > oldest &&
      (home || at[cidr] == external && external == text("\"flannel.alpha.coreos.com/public-ip\":"))) proven = 1
  if (!proven) unproven++
  if (!proven || (ip && index($0, "\"" ip "\"")) || /"node-role.kubernetes.io\/(control-plane|master)":/) { add($0); next }
  # A peer of several networks relays to other nodes, and is itself one to report.
  if (cidr in by && peer[by[cidr]] !~ /\/[0-9]+,/) done[by[cidr]]
  rest[++left] = "{\"metadata\":{\"name\":\"" text("\"name\":") \
    (home ? "\"},\"spec\":{\"podCIDR\":\"" cidr : "") "\"},\"status\":{\"addresses\":[{\"type\":\"" \
    (home ? "Internal" : "External") "IP\",\"address\":\"" (home ? internal : external) "\"}]}}"
}
END {
  # The first one without a peer is the box itself.
  if (others || unproven > 1) for (i = 1; i <= left; i++) add(rest[i])
  if (list) print "\n]}"
  if (joining) exit
  printf "\n%s fact peers\n", mark
  for (i = 1; i <= peers; i++) if (!(i in done)) print peer[i]
}'
}`;

/** The fact `nodes`, as `show` prints `shaped`; if the API gave none, `api` has the seconds it took and its error. */
const nodesBy = (show: string) =>
  prints("nodes api load")(sh`${raw(API)}
shaped() { printf '%s\n' "$list" | grep '^[{ }]' | ${raw(SHAPE)}; }
fact nodes; read -r began _ </proc/uptime; failed=
list=$(api GET '/api/v1/nodes?pretty=false' 2>&1) || failed=yes
if [ -z "$failed" ]; then
  ${raw(show)}
elif [ -n "$list" ]; then
  read -r ended _ </proc/uptime
  fact api; echo "$((\${ended%.*} - \${began%.*})) $list" | cut -c1-600
  ${raw(loadLook)}
fi`);

export const nodesLook = nodesBy("shaped");

/**
 * Facts about the cluster as this box sees it: its nodes, and WireGuard's peers; on an agent what concerns it alone.
 * The variable `others` set before has it say more: names, whole.
 */
export const clusterLook = [
  shownLook,
  prints("nodes api load peers interfaces")(sh`peers=$(${raw(PEERS)})
${raw(CONCERNS)}
own() {
  case $tls in */server/tls) shaped; fact peers; printf '%s\n' "$peers"; return ;; esac
  # Which generation runs is not asked here: the old one's rule is the stricter.
  property "$agent_unit" ExecMainStartTimestampMonotonic
  ${raw(startedSh("$value", READ))}  ${raw(oldestSh("old", READ))}
  { printf '%s\n' "$peers"; shaped; } | concerns "$oldest"
}
${raw(nodesBy("own"))}
[ -z "$failed" ] || { fact peers; printf '%s\n' "$peers"; }
fact interfaces; for i in /sys/class/net/*; do echo "\${i##*/}"; done
`),
] as const;

/** A pod of CoreDNS or metrics-server. */
export interface SystemPod {
  app: "kube-dns" | "metrics-server";
  name: string;
  node: string | undefined;
  ready: boolean;
  /** Why it is not, in the API's word. */
  reason: string | undefined;
  /** When it was made and when its container started, in seconds since 1970; 0: not known. */
  created: number;
  started: number;
}

/** The fact `system`, see systemOf(). */
export const systemLook = prints("system")(`fact system
[ -n "$failed" ] || api GET '/api/v1/namespaces/kube-system/pods?pretty=false&labelSelector=k8s-app%20in%20(kube-dns,metrics-server)' 10 2>/dev/null`);

/** What is read of a Pod as the API gives it. */
export interface PodObject {
  metadata: { name?: string; labels?: Record<string, string>; creationTimestamp?: string };
  spec?: { nodeName?: string };
  status?: {
    phase?: string;
    podIP?: string;
    reason?: string;
    message?: string;
    conditions?: { type: string; status: string; reason?: string }[];
    containerStatuses?: {
      state?: { running?: { startedAt?: string }; waiting?: { reason?: string; message?: string } };
    }[];
  };
}

/** Items of a list from the API; none if the text is not such a list. */
export function itemsOf<T>(json = ""): T[] {
  try {
    const { items } = JSON.parse(json);
    return Array.isArray(items) ? items.filter((item) => typeof item === "object" && item !== null) : [];
  } catch {
    return [];
  }
}

const text = (value: unknown): string | undefined => (typeof value === "string" && value ? value : undefined);
const time = (value: unknown): number => Date.parse(text(value) ?? "") / 1000 || 0;

/** CoreDNS's pods and metrics-server's; undefined where they were not asked for, or the API did not say. */
export function systemOf(json = ""): SystemPod[] | undefined {
  if (!/"kind": ?"(PodList|List)"/.test(json)) return undefined;
  return itemsOf<PodObject>(json).flatMap(({ metadata, spec, status }) => {
    const app = record(metadata?.labels)["k8s-app"];
    if (app !== "kube-dns" && app !== "metrics-server") return [];
    const [container] = status?.containerStatuses ?? [];
    const scheduled = status?.conditions?.find(({ type }) => type === "PodScheduled");
    const unscheduled = scheduled?.status === "False" ? text(scheduled.reason) : undefined;
    return {
      app,
      name: only(NAME, metadata.name) ?? "",
      node: only(NAME, spec?.nodeName),
      ready: status?.conditions?.some(({ type, status }) => type === "Ready" && status === "True") ?? false,
      reason:
        text(container?.state?.waiting?.reason) ?? unscheduled ?? text(status?.reason) ?? text(status?.phase),
      created: time(metadata?.creationTimestamp),
      started: time(container?.state?.running?.startedAt),
    };
  });
}

/** The load of a box; unknown values are undefined. Percentages are of what is in use. */
export interface Load {
  average: number | undefined;
  cores: number | undefined;
  memory: number | undefined;
  swap: number | undefined;
}

export function loadOf({ load = "" }: Facts<"load">): Load {
  const number = (pattern: RegExp) => {
    const value = pattern.exec(load)?.[1];
    return value === undefined ? undefined : Number(value);
  };
  const used = (all = 0, free = 0) => (all > 0 ? Math.round(100 * (1 - free / all)) : undefined);
  const available = number(/^MemAvailable: +(\d+)/m);
  return {
    average: number(/^(\d+\.\d+) \d+\.\d+ /),
    cores: number(/^(\d+)$/m) || undefined,
    memory: available === undefined ? undefined : used(number(/^MemTotal: +(\d+)/m), available),
    swap: used(number(/^SwapTotal: +(\d+)/m), number(/^SwapFree: +(\d+)/m)),
  };
}

/** The message for an overloaded box, with figures. A load of one per core is merely busy. */
export function overload({ average, cores = 1, memory = 0, swap = 0 }: Load): string | undefined {
  if ((average ?? 0) < 2 * cores && memory < 95 && swap < 75) return undefined;
  const figures = [
    `load ${average ?? "?"} on ${cores} core${cores === 1 ? "" : "s"}`,
    `memory ${memory} % in use`,
    ...(swap ? [`swap ${swap} % in use`] : []),
  ];
  return `the box is overloaded (${figures.join(", ")})`;
}

/** An error of the API, or of a kubelet behind it, shortened. */
export const apiMessage = (said: string): string =>
  (/"message": ?"((?:[^"\\]|\\.)*)/.exec(said)?.[1] ?? said)
    .replaceAll('\\"', '"')
    .replace(/[\s\p{C}\p{Zl}\p{Zp}]+/gu, " ")
    .trim()
    .slice(0, 300);

/** Why the API gave no list of nodes: then no node is known to be missing. */
export function silence(facts: Facts<"api" | "nodes" | "load">): string | undefined {
  const [, seconds, said] = /^(\d+) (.*)/s.exec(facts.api?.trim() ?? "") ?? [];
  if (said === undefined || nodesOf(facts.nodes).length) return undefined;
  const how = /did not answer|time(d )?out|deadline exceeded/i.test(said)
    ? `the API did not answer in ${seconds} s`
    : /refuse/.test(said)
      ? "the API refuses connections: k3s is not up"
      : `the API does not answer: ${apiMessage(said)}`;
  const load = overload(loadOf(facts));
  return load ? `${how}; ${load}` : how;
}

/**
 * The annotation on a node that this project drains, so that an interrupted run is resumed and no node that the user
 * cordoned is uncordoned. Its value is the box's boot id at that time, with `.done` appended once no pods are left.
 */
export const DRAINED = "k3s-across-clouds/drained";

export interface Node {
  name: string;
  ready: boolean;
  /** Since when, in seconds since 1970 by the server's clock. */
  readySince: number;
  cordoned: boolean;
  /** Its box's boot id as its kubelet has it, the one in which this project drained it, and its machine id. */
  boot: string | undefined;
  machine: string | undefined;
  drained: { boot: string; done: boolean } | undefined;
  /** When it joined, in seconds since 1970 by the server's clock. */
  created: number;
  /** The kubelet's last heartbeat, in seconds since 1970 by the node's clock. */
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
  /** Pressure conditions: MemoryPressure, DiskPressure, PIDPressure. */
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
    conditions?: { type: string; status: string; lastHeartbeatTime: string; lastTransitionTime?: string }[];
    nodeInfo?: { kubeletVersion: string; bootID?: string; machineID?: string };
  };
}

/** Only values that the API server would accept: any agent may write annotations. */
const IP = /^[0-9a-f.:]{2,39}$/;
const BOOT = /^[0-9a-f-]{36}$/;
const MACHINE = /^[0-9a-f]{32}$/;
const CIDR = /^[0-9a-f.:]{2,39}\/\d{1,3}$/;
export const VERSION = /^v[\w.+-]{1,60}$/;
const only = (pattern: RegExp, value: unknown): string | undefined =>
  typeof value === "string" && pattern.test(value) ? value : undefined;
/** Digits and dots may still be a name that nft would resolve. */
export const address = (value: unknown): string | undefined => {
  const ip = only(IP, value);
  return ip && isIP(ip) ? ip : undefined;
};
const LABEL = new RegExp(`^(?=.{1,317}$)${KEY}$`);
const VALUE = new RegExp(`^(${WORD})?$`);
const EFFECT = /^(NoSchedule|PreferNoSchedule|NoExecute)$/;
const record = (value: unknown): Record<string, string> =>
  Object.fromEntries(
    typeof value === "object"
      ? Object.entries(value ?? {}).filter(([k, v]) => LABEL.test(k) && only(VALUE, v) !== undefined)
      : [],
  );

/**
 * Parses nodes from the JSON of a NodeList or Node; none if the text is neither. Invalid addresses, labels and taints
 * are left out, since they reach other boxes' shells and commands that people paste.
 */
export function nodesOf(json = ""): Node[] {
  try {
    const object = JSON.parse(json);
    const list: NodeObject[] = object.kind === "Node" ? [object] : object.items;
    return list.flatMap(({ metadata, spec, status }) => {
      const name = only(NAME, metadata.name);
      if (!name) return [];
      const ip = (type: string) => address(status?.addresses?.find((a) => a.type === type)?.address);
      const note = (name: string) => address(metadata.annotations?.[`flannel.alpha.coreos.com/${name}`]);
      const ready = status?.conditions?.find((c) => c.type === "Ready");
      return {
        name,
        ready: ready?.status === "True",
        readySince: Date.parse(ready?.lastTransitionTime ?? "") / 1000 || 0,
        cordoned: spec?.unschedulable === true,
        boot: only(BOOT, status?.nodeInfo?.bootID),
        machine: only(MACHINE, status?.nodeInfo?.machineID),
        drained: drainedIn(metadata.annotations?.[DRAINED]),
        created: Date.parse(metadata.creationTimestamp ?? "") / 1000 || 0,
        heartbeat: Date.parse(ready?.lastHeartbeatTime ?? "") / 1000 || 0,
        internalIp: ip("InternalIP"),
        externalIp: ip("ExternalIP"),
        podCidr: only(CIDR, spec?.podCIDR),
        publicIp: note("public-ip"),
        overwrite: note("public-ip-overwrite"),
        version: only(VERSION, status?.nodeInfo?.kubeletVersion) ?? "",
        args: argsIn(metadata.annotations?.["k3s.io/node-args"]),
        pressure: (status?.conditions ?? []).flatMap(({ type, status }) =>
          /^[A-Z][A-Za-z]+Pressure$/.test(type) && status === "True" ? [type] : [],
        ),
        labels: record(metadata.labels),
        taints: (spec?.taints ?? []).flatMap(({ key, value, effect }) =>
          only(LABEL, key) && VALUE.test(value ?? "") && only(EFFECT, effect)
            ? [`${key}${value ? `=${value}` : ""}:${effect}`]
            : [],
        ),
        backend: only(NAME, metadata.annotations?.["flannel.alpha.coreos.com/backend-type"]),
      };
    });
  } catch {
    return [];
  }
}

function drainedIn(mark: unknown): Node["drained"] {
  if (typeof mark !== "string") return undefined;
  const boot = mark.replace(/\.done$/, "");
  return BOOT.test(boot) ? { boot, done: boot !== mark } : undefined;
}

function argsIn(json = "[]"): string[] {
  try {
    const words: unknown = JSON.parse(json);
    return Array.isArray(words) ? words.filter((word) => typeof word === "string") : [];
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

/** The peer for a node's pod network: WireGuard has at most one for a network. */
export const peerOf = (peers: readonly Peer[], podCidr = "-"): Peer | undefined =>
  peers.find(({ allowedIps }) => allowedIps.includes(podCidr));

/**
 * The state of a node's peer. WireGuard follows a peer to the address it sends from, so a handshake later than `proves`
 * is the proof. An endpoint other than the node's address (a NAT that keeps old flows or changes ports) is worth a
 * note; a private one, or another node's, is wrong.
 */
export function standing(
  peer: Peer | undefined,
  of: Node,
  nodes: readonly Node[],
  proves: number,
): { fresh: boolean; note?: string; wrong?: string } {
  if (!peer || peer.handshake <= proves) return { fresh: false };
  // Its router may have any address, which it may share with another node.
  if (isHome(of)) return { fresh: true };
  const at = peer.endpoint.replace(/:\d+$/, "");
  if (at === of.publicIp || at === of.externalIp) return { fresh: true };
  const others = nodes.filter((node) => node.name !== of.name && addressesOf(node).includes(at));
  // An agent is told of some nodes first: of two with one address it names the same one as its server.
  others.sort(
    (a, b) => Number(b.externalIp === at) - Number(a.externalIp === at) || (a.name < b.name ? -1 : 1),
  );
  const [other] = others;
  if (other) return { fresh: true, wrong: `${at}, which is the address of ${other.name}` };
  if (publicIp(at)) return { fresh: true, wrong: `${at}, which is no public address` };
  return {
    fresh: true,
    note: `${peer.endpoint}, not from ${of.publicIp ?? of.externalIp ?? "its public address"}; the handshake is fresh`,
  };
}

/** A node's address inside the tunnel, which flannel gives its WireGuard interface: the first of its pod network. */
export const tunnelIpOf = ({ podCidr }: Pick<Node, "podCidr">): string | undefined => podCidr?.split("/")[0];

/** Its kubelet is reached inside the tunnel: always of a node without a public address, of others with TUNNEL_KUBELETS. */
export const isInside = (node: Node): boolean =>
  node.internalIp !== undefined && node.internalIp === tunnelIpOf(node);

/** The address at which metrics-server asks a node's kubelet; `inside` with TUNNEL_KUBELETS. */
export const kubeletIpOf = ({ externalIp, internalIp }: Node, inside: boolean): string | undefined =>
  inside ? (internalIp ?? externalIp) : (externalIp ?? internalIp);

/** A node without a public address: others reach it inside the tunnel alone, at an endpoint that may change. */
export const isHome = (node: Node): boolean => node.externalIp === undefined && isInside(node);

/** At which only that node can be. */
export const addressesOf = ({ publicIp, externalIp }: Node): string[] =>
  [publicIp, externalIp].filter((ip) => ip !== undefined);

/**
 * The same as an awk condition on a line of `wg show IF dump`; its variable `own` is the node's address or "any", `others`
 * those of the other nodes between blanks.
 */
export const STANDS = `{ at = $3; sub(/:[0-9]+$/, "", at) }
  NR > 1 && index("," $4 ",", "," c ",") && $5 > oldest {
    found = at == own || own == "any" || (at ~ /^[0-9.]+$/ && at !~ /${PRIVATE_RANGES}/ && !index(others, " " at " "))
  }
  END { exit !found }`;

/** Parses the fact `peers`: lines of `wg show IF dump` without the first, each preceded by its interface. @see wg(8) */
export function peersOf(dump = ""): Peer[] {
  return dump
    .split("\n")
    .map((line) => line.split("\t"))
    .filter((fields) => fields.length === 9 && fields.slice(5, 8).every((field) => /^\d+$/.test(field)))
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

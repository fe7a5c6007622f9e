/**
 * Pods that test the data path: one per node, using the pause image that every node has, removed afterwards. Packets
 * are sent by the box's own tools in the pod's network namespace.
 */

import { look } from "../converge.ts";
import { API, apiMessage, CURL, ITEMS, itemsOf, type Load, overload, type PodObject } from "../k3s/nodes.ts";
import { raw, sh } from "../sh.ts";
import { type Look, prints } from "../step.ts";
import { TURN } from "./diagnose.ts";
import { ask, type BoxReport, few, type Member, patience, type reportsOf } from "./survey.ts";

const LABEL = "k3s-across-clouds-check";
/** Time limit for pods to start, in seconds; an image may have to be pulled. */
const WAIT = 20;
/** Parallel requests to the API: a curl takes about 10 MB, and a small server's kubelet is busy too. */
const ASKING = 3;
/** Time limits in seconds: for one request, and for all. */
const [ONE, ALL] = [10, 60];

const PODS = "/api/v1/namespaces/kube-system/pods";
const nameOf = (mark: string, node: string) => `${LABEL}-${mark}-${node}`;

/** The shell function that sets `up` to the seconds since the boot, without a process. */
const UP = `up() { read -r up _ </proc/uptime; up=\${up%.*}; }`;

/** Shell that takes from pods, as `?pretty=false` gives them, what is long and not read: a pod a line. */
const STATUS = String.raw`${ITEMS} | sed -E 's/(,"managedFields":\[.*\])?\},"spec":\{.*\},"status":\{/},"status":{/'`;

/** A running pod. */
export interface Pod {
  name: string;
  node: string;
  ip: string;
}

/** The shell that creates the pods and waits until they run. activeDeadlineSeconds ends them if nothing else does. */
export function made(nodes: readonly string[], mark: string) {
  return prints("sandbox refused pods services")(sh`${raw(API)}
${raw(UP)}
image=$(sed -n "s/.*sandbox\(_image\)\{0,1\} = [\"']\([^\"']*\)[\"'].*/\2/p" /var/lib/rancher/k3s/agent/etc/containerd/config.toml 2>/dev/null | head -n 1)
fact sandbox; echo "$image"
fact refused
make() {
  said=$({ api POST ${PODS} ${ONE} >/dev/null; } 2>&1 <<EOF
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"${LABEL}-${mark}-$1","labels":{"app":"${LABEL}","run":"${mark}"}},
"spec":{"nodeName":"$1","restartPolicy":"Never","activeDeadlineSeconds":180,"terminationGracePeriodSeconds":0,
"automountServiceAccountToken":false,"tolerations":[{"operator":"Exists"}],
"containers":[{"name":"pause","image":"$image","imagePullPolicy":"IfNotPresent"}]}}
EOF
  ) || echo "$said"
}
if [ -n "$image" ]; then
  # Of a check that was cut off.
  api DELETE '${PODS}?labelSelector=app%3D${LABEL}&fieldSelector=status.phase%3DFailed' ${ONE} >/dev/null 2>&1
${raw(
  few(
    nodes.map((node) => sh`make ${node}`),
    ASKING,
  ),
)}  fact pods
  up; end=$((up + ${WAIT}))
  while :; do
    said=$(api GET '${PODS}?pretty=false&labelSelector=run%3D${mark}' ${ONE} 2>/dev/null)
    settled=$(printf '%s\n' "$said" | grep -oE '"phase": ?"(Running|Failed)"|"reason": ?"(ErrImage|ImagePull|InvalidImage)' | wc -l)
    up
    if [ "$settled" -ge ${nodes.length} ] || [ "$up" -ge "$end" ]; then break; fi
    sleep 1
  done
  printf '%s\n' "$said" | ${raw(STATUS)}
fi
fact services; for s in default/kubernetes kube-system/kube-dns; do
  echo "$s $(api GET "/api/v1/namespaces/\${s%/*}/services/\${s#*/}" ${ONE} 2>/dev/null | sed -n 's/.*"clusterIP": *"\([0-9.]*\)".*/\1/p' | head -n 1)"
done`);
}

/** The shell that asks for the events of pods that do not run. */
export const reasons = (names: readonly string[]) =>
  prints(names.map((name) => `events-${name}`).join(" ") as `events-${string}`)(
    `${API}\n${names
      .map(
        (name) =>
          sh`fact events-${name}; api GET ${`/api/v1/namespaces/kube-system/events?pretty=false&fieldSelector=involvedObject.name%3D${name}`} ${ONE} 2>/dev/null`,
      )
      .join("\n")}`,
  );

interface EventObject {
  type?: string;
  reason?: string;
  message?: string;
  lastTimestamp?: string | null;
  eventTime?: string | null;
}

const IMAGE = /ErrImage|ImagePull|InvalidImage|(pull|get|resolv|unpack)\w* (\w+ )*image/i;

/**
 * Why a pod does not run, from its object and events. A missing image is not the node's fault, any other reason of the
 * kubelet is; mere waiting proves nothing.
 */
export function unstarted(
  pod: PodObject | undefined,
  events: readonly EventObject[],
): { words: string; image: boolean; proven: boolean } {
  const waiting = pod?.status?.containerStatuses?.map(({ state }) => state?.waiting).find(Boolean);
  const at = ({ lastTimestamp, eventTime }: EventObject) => Date.parse(lastTimestamp ?? eventTime ?? "") || 0;
  const warnings = events.filter(({ type }) => type === "Warning").sort((a, b) => at(a) - at(b));
  const last = warnings.at(-1);
  const status = pod?.status;
  const found = last
    ? [last.reason, last.message]
    : status?.phase === "Failed"
      ? [status.reason, status.message]
      : waiting
        ? [waiting.reason, waiting.message]
        : [status?.reason ?? status?.phase ?? "it is not there", status?.message];
  const said = apiMessage(found.filter((word) => typeof word === "string" && word).join(": "));
  const pulls = events.some(({ reason }) => reason === "Pulling") && !last;
  return {
    words: said,
    image: pulls || IMAGE.test(`${waiting?.reason ?? ""} ${said}`),
    proven: Boolean(last) || status?.phase === "Failed",
  };
}

/** An idle box that has run for a while has no other reason for a pod that does not start. */
export const isFault = (
  { image, proven }: { image: boolean; proven: boolean },
  box: Pick<BoxReport, "unit" | "load"> | undefined,
): boolean => !image && (proven || ((box?.unit.runs ?? 0) > TURN && !overload(box?.load as Load)));

/** The shell that removes them, and waits until they are gone. */
const gone = (mark: string) =>
  prints("")(sh`${raw(API)}
api DELETE '${PODS}?labelSelector=run%3D${mark}' ${ONE} >/dev/null 2>&1
for _ in 1 2 3 4 5 6 7 8 9 10; do
  case $(api GET '${PODS}?pretty=false&limit=1&labelSelector=run%3D${mark}' ${ONE} 2>/dev/null) in *'"containers"'*) sleep 1 ;; *) break ;; esac
done`);

/**
 * A DNS query for CoreDNS's own name. None of its labels is ten letters long: bash would end the packet at that length
 * byte, a newline.
 */
const question = "kube-dns.kube-system.svc.cluster.local"
  .split(".")
  .map((word) => `\\x${word.length.toString(16).padStart(2, "0")}${word}`)
  .join("");

/** The shell that tests, on one box, what its pod reaches. */
export function paths(own: Pod, pods: readonly Pod[], services: Record<string, string>, size: number) {
  const others = pods.filter(({ node }) => node !== own.node);
  const { kubernetes, "kube-dns": dns } = services;
  return prints("paths")(sh`
ns=
for f in /run/netns/*; do
  ip netns exec "\${f##*/}" ip -o -4 addr show 2>/dev/null | grep -qF ${` ${own.ip}/`} && ns=\${f##*/}
done
inside() { ip netns exec "$ns" "$@"; }
reaches() {
  if inside ping -n -c 1 -W 1 -s ${size - 28} "$2" >/dev/null 2>&1 || inside ping -n -c 1 -W 2 -s ${size - 28} "$2" >/dev/null 2>&1
  then echo "pod $1 yes"; else echo "pod $1 no"; fi
}
serves() {
  # shellcheck disable=SC2016
  if inside timeout 5 bash -c ': <"/dev/tcp/$1/443"' - "$1" 2>/dev/null; then echo "service kubernetes yes"; else echo "service kubernetes no"; fi
}
resolves() {
  # shellcheck disable=SC2016
  got=$(inside timeout 5 bash -c 'exec 3<>"/dev/udp/$1/53"
printf "\x13\x37\x01\0\0\x01\0\0\0\0\0\0${raw(question)}\0\0\x01\0\x01" >&3; head -c 4 <&3 | od -An -tx1' - "$1" 2>/dev/null)
  # The last digit is the answer's word: 0, or 3 where the cluster has another domain.
  case $got in *[03]) echo "service DNS yes" ;; *) echo "service DNS no" ;; esac
}
fact paths
if [ -z "$ns" ]; then echo "without netns"; else
${raw(
  few([
    ...others.map(({ node, ip }) => sh`reaches ${node} ${ip}`),
    ...(kubernetes ? [sh`serves ${kubernetes}`] : []),
    ...(dns ? [sh`resolves ${dns}`] : []),
  ]),
)}fi`);
}

/**
 * The shell that asks each kubelet, through the API, for its pod's log and for exec. The image has no program to run: a
 * stream that the kubelet opened (101) is the proof.
 */
export const kubelets = (pods: readonly Pod[]) =>
  prints("kubelets")(sh`${raw(API)}
${raw(UP)}
up; end=$((up + ${ALL}))
late() {
  up
  [ "$up" -ge "$end" ] || return
  echo "$1 $2 no did not answer in ${ALL} s with all the others"
}
logs() {
  ! late logs "$1" || return 0
  if said=$(api GET "${PODS}/$2/log" ${ONE} 2>&1 >/dev/null); then echo "logs $1 yes"; else echo "logs $1 no" "$said"; fi
}
runs() {
  ! late exec "$1" || return 0
  said=$(
    {
      ${raw(CURL)} --http1.1 -N -i -m ${ONE} -H 'Connection: Upgrade' -H 'Upgrade: websocket' -H 'Sec-WebSocket-Version: 13' \
        -H 'Sec-WebSocket-Key: azNzLWFjcm9zcy1jbG91ZHM=' -H 'Sec-WebSocket-Protocol: v4.channel.k8s.io' \
        "\${apiurl:-https://127.0.0.1:6443}${PODS}/$2/exec?container=pause&command=%2Fk3s-across-clouds&stdout=true&stderr=true"
      echo " exit=$?"
    } 2>/dev/null | tr -cd '[:print:]\n' | tr '\n' ' ' | cut -c1-1000
  )
  case $said in
    'HTTP/1.1 101 '*) echo "exec $1 yes" ;;
    *exit=28*) echo "exec $1 no did not answer in ${ONE} s" ;;
    *exit=0*) echo "exec $1 no" "$said" ;;
    *exit=7*|*exit=5[26]*) echo "exec $1 no it refuses or closes connections" ;;
    *) echo "kubectl $1 $2" ;;
  esac
}
fact kubelets
said=$(
${raw(
  few(
    pods.flatMap(({ node, name }) => ["logs", "runs"].map((f) => sh`${f} ${node} ${name}`)),
    ASKING,
  ),
)})
printf '%s\n' "$said" | grep -v '^kubectl '
# Where curl cannot: one kubectl after the other.
printf '%s\n' "$said" | sed -n 's/^kubectl //p' | while read -r node pod; do
  ! late exec "$node" || continue
  said=$(kc -n kube-system exec "$pod" -- /k3s-across-clouds 2>&1 </dev/null)
  case $said in *'no such file'*|*'not found in'*|*'OCI runtime'*) echo "exec $node yes" ;; *) echo "exec $node no" "$said" | tr '\n' ' '; echo ;; esac
done`);

/**
 * Tests pods: each reaches each, the API's service and CoreDNS; logs and exec work on every node. Results are added to
 * the members. Returns why pods could not be tested, if so.
 */
export async function tryPods(
  members: readonly Member[],
  cluster: ReturnType<typeof reportsOf>,
  mark: string,
): Promise<string | undefined> {
  const server = members.find(({ role, error }) => role === "server" && error === undefined);
  const nodes = cluster.nodes.filter(({ ready }) => ready).map(({ name }) => name);
  if (!server || nodes.length === 0) return "the API does not answer";
  const trip = <F extends string>(member: Member, ...looks: Look<F>[]) =>
    look(member.box, [ask(looks)], patience(2 * nodes.length + ALL));
  try {
    const up = await trip(server, made(nodes, mark));
    const image = up.sandbox?.trim();
    if (!image) return "containerd's configuration on the server names no image for them";
    const objects = itemsOf<PodObject>(up.pods);
    const podOf = (node: string) => objects.find(({ metadata }) => metadata?.name === nameOf(mark, node));
    const pods = nodes.flatMap((node) => {
      const { phase, podIP: ip = "" } = podOf(node)?.status ?? {};
      return phase === "Running" && /^[\d.]+$/.test(ip) ? [{ name: nameOf(mark, node), node, ip }] : [];
    });
    const services = Object.fromEntries(
      [...(up.services ?? "").matchAll(/^\S+\/(\S+) ([\d.]+)$/gm)].map((m) => [m[1], m[2]]),
    );
    await Promise.all(
      cluster.boxes.map(async ({ name, nodeName, wireguard }) => {
        const member = members.find(({ box }) => box.name === name) as Member;
        const own = pods.find(({ node }) => node === nodeName);
        const parts = [
          ...(own ? [paths(own, pods, services, wireguard?.mtu ?? 1280)] : []),
          ...(member === server && pods.length ? [kubelets(pods)] : []),
        ];
        if (member.error === undefined && parts.length)
          member.paths = await trip(member, ...parts).catch(() => ({}));
      }),
    );
    const late = nodes.filter((node) => !pods.some((pod) => pod.node === node));
    const there = late.filter(podOf);
    const said = there.length ? await trip(server, reasons(there.map((node) => nameOf(mark, node)))) : {};
    await trip(server, gone(mark));
    const why = (node: string) => unstarted(podOf(node), itemsOf(said[`events-${nameOf(mark, node)}`]));
    const boxOf = (node: string) => cluster.boxes.find(({ nodeName }) => nodeName === node);
    const faults = there.filter((node) => isFault(why(node), boxOf(node)));
    server.paths = {
      ...server.paths,
      unstarted: faults
        .map(
          (node) =>
            `unstarted ${node} ${why(node).words}${why(node).proven ? "" : `, for ${WAIT} s, and no event says why`}`,
        )
        .join("\n"),
    };
    const rest = late.filter((node) => !faults.includes(node));
    const [first = ""] = rest;
    return rest.length
      ? `pods of ${image} do not run on ${rest.join(", ")} after ${WAIT} s (${podOf(first) ? why(first).words : apiMessage(up.refused?.trim() || "the API did not make them")})`
      : undefined;
  } catch (error) {
    await trip(server, gone(mark)).catch(() => {});
    return (error as Error).message;
  }
}

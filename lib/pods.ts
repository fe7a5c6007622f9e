/**
 * Pods to try the data path with: one a node, of the image that every node has for its pods' sandboxes, and
 * gone again afterwards. What is sent in their name is sent by the box's own tools in the pod's network.
 */
import { type Call, jobFor } from "./cli.ts";
import { ask, type Cluster, line, type Member, PATIENCE } from "./cluster.ts";
import { KUBECTL } from "./kube.ts";
import { sh } from "./sh.ts";
import { look } from "./step.ts";

const LABEL = "k3s-across-clouds-check";
/** How long pods may take until they run, in seconds: an image may have to be fetched. */
const WAIT = 15;

const nameOf = (mark: string, node: string) => `${LABEL}-${mark}-${node}`;

/** A pod that runs. */
export interface Pod {
  name: string;
  node: string;
  ip: string;
}

/** The shell that makes the pods and waits until they run. Should all else fail, the kubelet ends them by itself. */
export function made(nodes: readonly string[], mark: string): string {
  const pod = (node: string) => `---
apiVersion: v1
kind: Pod
metadata:
  name: ${nameOf(mark, node)}
  labels: {app: ${LABEL}, run: "${mark}"}
spec:
  nodeName: ${node}
  restartPolicy: Never
  activeDeadlineSeconds: 120
  terminationGracePeriodSeconds: 0
  automountServiceAccountToken: false
  tolerations: [{operator: Exists}]
  containers:
  - name: pause
    image: IMAGE
    imagePullPolicy: IfNotPresent
`;
  return `${KUBECTL}
image=$(sed -n "s/.*sandbox\\(_image\\)\\{0,1\\} = [\\"']\\([^\\"']*\\)[\\"'].*/\\2/p" /var/lib/rancher/k3s/agent/etc/containerd/config.toml 2>/dev/null | head -n 1)
fact image; echo "$image"
pods() {
  kc -n kube-system get pods -l run=${mark} -o 'jsonpath={range .items[*]}{.metadata.name} {.spec.nodeName} {.status.phase} {.status.podIP} {.status.containerStatuses[*].state.waiting.reason}{"\\n"}{end}'
}
fact pods; if [ -n "$image" ]; then
  # Of a check that was cut off.
  kc -n kube-system delete pods -l app=${LABEL} --field-selector status.phase=Failed --wait=false >/dev/null 2>&1
  kc -n kube-system create -f - >/dev/null 2>&1 <<EOF
${nodes.map(pod).join("").replaceAll("image: IMAGE", "image: $image")}EOF
  end=$(($(date +%s) + ${WAIT}))
  while [ "$(date +%s)" -lt "$end" ]; do
    said=$(pods 2>/dev/null)
    case $said in *ErrImage*|*ImagePull*|*InvalidImage*) break ;; esac
    [ "$(echo "$said" | grep -c ' Running [0-9]')" -lt ${nodes.length} ] || break
    sleep 0.5
  done
  echo "$said"
fi
fact services; for s in default/kubernetes kube-system/kube-dns; do
  echo "$s $(kc -n "\${s%/*}" get service "\${s#*/}" -o 'jsonpath={.spec.clusterIP}' 2>/dev/null)"
done`;
}

/** The shell that removes them, and waits until they are gone. */
const gone = (mark: string) => `${KUBECTL}
kc -n kube-system delete pods -l run=${mark} --timeout=15s >/dev/null 2>&1`;

/** CoreDNS's own name, as a question. No part of it has ten letters: bash would end the packet at that byte, a newline. */
const question = "kube-dns.kube-system.svc.cluster.local"
  .split(".")
  .map((word) => `\\x${word.length.toString(16).padStart(2, "0")}${word}`)
  .join("");

/** The shell that tries, on one box, the ways of its pod. */
export function paths(
  own: Pod,
  pods: readonly Pod[],
  services: Record<string, string>,
  size: number,
): string {
  const others = pods.filter(({ node }) => node !== own.node);
  const { kubernetes, "kube-dns": dns } = services;
  return `
ns=
for f in /run/netns/*; do
  ip netns exec "\${f##*/}" ip -o -4 addr show 2>/dev/null | grep -qF ${sh(` ${own.ip}/`)} && ns=\${f##*/}
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
printf "\\x13\\x37\\x01\\0\\0\\x01\\0\\0\\0\\0\\0\\0${question}\\0\\0\\x01\\0\\x01" >&3; head -c 4 <&3 | od -An -tx1' - "$1" 2>/dev/null)
  # The last digit is the answer's word: 0, or 3 where the cluster has another domain.
  case $got in *[03]) echo "service DNS yes" ;; *) echo "service DNS no" ;; esac
}
fact paths
if [ -z "$ns" ]; then echo "without netns"; else
${others.map(({ node, ip }) => `  reaches ${sh(node)} ${sh(ip)} &\n`).join("")}${kubernetes ? `  serves ${sh(kubernetes)} &\n` : ""}${dns ? `  resolves ${sh(dns)} &\n` : ""}  wait
fi`;
}

/** The shell that asks each kubelet, through the API, for its pod's log and for a process in it. */
export const kubelets = (pods: readonly Pod[]) => `${KUBECTL}
logs() { if kc -n kube-system logs "$2" >/dev/null 2>&1; then echo "logs $1 yes"; else echo "logs $1 no"; fi; }
# The image has no program to run: that its runtime looked for one is the answer.
runs() {
  said=$(kc -n kube-system exec "$2" -- /k3s-across-clouds 2>&1)
  case $said in *'no such file'*|*'not found in'*|*'OCI runtime'*) echo "exec $1 yes" ;; *) echo "exec $1 no" ;; esac
}
fact kubelets
${pods.flatMap(({ node, name }) => ["logs", "runs"].map((f) => `${f} ${sh(node)} ${sh(name)} &\n`)).join("")}wait`;

/**
 * Tries what pods do: each reaches each, the service of the API, and CoreDNS; and logs and exec on every node.
 * What was found is added to the members. Answers why pods could not be tried, where they could not.
 */
export async function tryPods(
  call: Call,
  members: readonly Member[],
  cluster: Cluster,
  mark: string,
): Promise<string | undefined> {
  const server = members.find(({ role, error }) => role === "server" && error === undefined);
  const nodes = cluster.nodes.filter(({ ready }) => ready).map(({ name }) => name);
  if (!server || nodes.length === 0) return "the API does not answer";
  const trip = (member: Member, text: string) =>
    look(jobFor(call, member.target, line()), [ask(text)], PATIENCE);
  try {
    const up = await trip(server, made(nodes, mark));
    const image = up.image?.trim();
    if (!image) return "containerd's configuration on the server names no image for them";
    const rows = (up.pods ?? "").split("\n").map((row) => row.split(" "));
    const pods = rows.flatMap(([name = "", node = "", phase, ip = ""]) =>
      nodes.includes(node) && name === nameOf(mark, node) && phase === "Running" && /^[\d.]+$/.test(ip)
        ? [{ name, node, ip }]
        : [],
    );
    const services = Object.fromEntries(
      [...(up.services ?? "").matchAll(/^\S+\/(\S+) ([\d.]+)$/gm)].map((m) => [m[1], m[2]]),
    );
    await Promise.all(
      cluster.boxes.map(async ({ name, nodeName, wireguard }) => {
        const member = members.find(({ target }) => target.name === name) as Member;
        const own = pods.find(({ node }) => node === nodeName);
        const parts = [
          own ? paths(own, pods, services, wireguard?.mtu ?? 1280) : "",
          member === server && pods.length ? kubelets(pods) : "",
        ].filter(Boolean);
        if (member.error === undefined && parts.length)
          member.paths = await trip(member, parts.join("\n")).catch(() => ({}));
      }),
    );
    await trip(server, gone(mark));
    const late = nodes.filter((node) => !pods.some((pod) => pod.node === node));
    const [, , phase, , reason] = rows.find(([, node]) => late.includes(node as string)) ?? [];
    return late.length
      ? `pods of ${image} do not run on ${late.join(", ")} within ${WAIT} s (${reason || phase || "they could not be made"})`
      : undefined;
  } catch (error) {
    await trip(server, gone(mark)).catch(() => {});
    return (error as Error).message;
  }
}

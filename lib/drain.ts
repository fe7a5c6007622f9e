import { K3S, nodeNameOf } from "./k3s.ts";
import { clusterLook, DRAINED, KUBECTL, type Node, nodesOf } from "./kube.ts";
import type { Settings } from "./settings.ts";
import { sh } from "./sh.ts";
import { type Change, type Facts, Refusal, type Step } from "./step.ts";

/** Facts about the node that this box is, if it is one; also while k3s is still starting. */
export const drainLook: string[] = [
  "fact roles; for unit in k3s k3s-agent; do systemctl -q is-enabled $unit 2>/dev/null && echo $unit; done",
  clusterLook,
];

/** How long pods may take to leave a node, and a node to come back, in seconds. */
const PATIENCE = 300;
/** How long after a boot k3s may take to answer, in seconds: v1.36.3 on two emulated CPUs took 55. */
const STARTING = 180;

/** The admin's kubectl: an agent's credentials do not allow to drain. */
const ADMIN = `[ -s /etc/rancher/k3s/k3s.yaml ] || { echo "No k3s server is on this box: SERVER has to name the cluster's"; exit 1; }
kc() { ${K3S} kubectl --kubeconfig /etc/rancher/k3s/k3s.yaml "$@"; }`;

/** A node that is not Ready has no kubelet to end its pods; one that the user has cordoned is theirs. */
const drainable = (node: Node) => node.ready && (!node.cordoned || node.drained !== undefined);

const givenBack = (name: string) => `kc uncordon ${sh(name)}\nkc annotate node ${sh(name)} ${DRAINED}-`;

/** kubectl names what blocks it, and the node then takes pods again. */
function draining(name: string, boot: string, flags = "", first = ""): Change {
  const mark = (value: string) => `kc annotate --overwrite node ${sh(name)} ${DRAINED}=${sh(value)}`;
  return {
    why: `drain node ${name}, for ${PATIENCE} s at most`,
    sh: `${ADMIN}
${first}${mark(boot)}
# The flag's name is of v1.20.
case $(${K3S} --version) in *'k3s version v1.1'[789].*) scratch=--delete-local-data ;; *) scratch=--delete-emptydir-data ;; esac
kc drain ${sh(name)} --ignore-daemonsets "$scratch" ${flags}--timeout=${PATIENCE}s || {
  ${givenBack(name).replace("\n", "\n  ")}
  echo 'Move by hand what stays (kubectl drain), and run this again: a node that you have cordoned is taken as it is'
  exit 1
}
${mark(`${boot}.done`)}`,
    seconds: PATIENCE + 60,
  };
}

/**
 * Changes, on the server, that move a node's pods elsewhere. None where it is done, or where no other node takes pods.
 *
 * @param force pods without a controller are deleted too: nothing starts them anew elsewhere.
 */
export function drain(node: Node, facts: Facts, force: boolean): Change[] {
  const others = nodesOf(facts.nodes).filter((n) => n.name !== node.name && n.ready && !n.cordoned);
  if (!drainable(node) || (node.cordoned && node.drained?.done) || others.length === 0) return [];
  return [draining(node.name, node.boot ?? "", force ? "--force " : "")];
}

/** Changes, on the server, that let pods come to a node again which was drained here. */
export function uncordon({ name, drained }: Node): Change[] {
  return drained ? [{ why: `let pods come to node ${name} again`, sh: `${ADMIN}\n${givenBack(name)}` }] : [];
}

/**
 * A step on the server about the node at a public address, if there is one: another box may have its name.
 * Its plan throws {Refusal} for an API that does not answer: nothing must be concluded from that.
 */
export const onNodeAt = (
  name: string,
  ip: string,
  plan: (node: Node | undefined, facts: Facts) => Change[],
): Step => ({
  name,
  options: [],
  look: () => [clusterLook],
  plan(_want, facts) {
    const nodes = nodesOf(facts.nodes);
    if (nodes.length === 0) throw new Refusal("The server's API does not answer: make server mends it");
    return plan(
      nodes.find((n) => n.externalIp === ip || n.internalIp === ip),
      facts,
    );
  },
});

/** `drain` on the server. */
export const drainedAt = (ip: string, force: boolean): Step =>
  onNodeAt("drain", ip, (node, facts) => (node ? drain(node, facts, force) : []));
/** `uncordon` on the server. */
export const uncordonedAt = (ip: string): Step =>
  onNodeAt("uncordon", ip, (node) => (node ? uncordon(node) : []));

/** The node that this box is: its name, what its cluster says of it, and where it may be drained. */
function nodeHere(want: Settings, facts: Facts) {
  const server = facts.roles?.split("\n")[0] === "k3s";
  const name = nodeNameOf(server ? want.SERVER_ARGS : want.AGENT_ARGS, facts);
  const nodes = nodesOf(facts.nodes);
  const how: Partial<Change> = { seconds: PATIENCE + 60, alone: true, ...(server ? {} : { onServer: true }) };
  return { name, known: nodes.length > 0, node: nodes.find((n) => n.name === name), how };
}

/**
 * Moves the pods of this box's own node elsewhere before the box restarts, through the cluster's server.
 *
 * @throws {Refusal} where the server is not known.
 */
export function drainHere(want: Settings, facts: Facts): Change[] {
  if (!facts.roles?.trim()) return [];
  const { name, known, node, how } = nodeHere(want, facts);
  if (known && !(node && drainable(node))) return [];
  if (how.onServer && !want.SERVER) {
    if (!known) return [];
    throw new Refusal(
      `Node ${name} is to be drained before its restart, which only the cluster's server may do: set SERVER, or cordon and drain it yourself first`,
    );
  }
  // A box that cannot see its cluster just now may be a healthy node all the same.
  const asked = `[ "$(kc get node ${sh(name)} --no-headers | awk '{ print $2 }')" = Ready ] || exit 0\n`;
  return [{ ...draining(name, facts.boot?.trim() ?? "", "", known ? "" : asked), ...how }];
}

/**
 * Gives this box's node its work back after the box's restart, if it was drained here for that; also if that run
 * was cut. One that was drained since is being upgraded or removed.
 */
export function uncordonHere(want: Settings, facts: Facts): Change[] {
  if (!facts.roles?.trim()) return [];
  const { known, name, node, how } = nodeHere(want, facts);
  if (!known && Number(facts.uptime) < STARTING)
    return [
      {
        why: "wait until the cluster says whether this node is drained",
        sh: `${KUBECTL}
until kc get nodes >/dev/null 2>&1; do
  [ "$(cut -d. -f1 /proc/uptime)" -lt ${STARTING} ] || { echo 'k3s does not answer here: if this node was drained it still is (kubectl uncordon)'; exit 1; }
  sleep 2
done`,
        seconds: STARTING + 60,
        lookAgain: true,
      },
    ];
  const old = node?.drained?.boot;
  // One that is long up and not Ready has something else to be mended first.
  if (!old || old === facts.boot?.trim() || (!node.ready && Number(facts.uptime) >= STARTING)) return [];
  return [
    {
      why: `uncordon node ${name} once it is Ready`,
      // A node counts as Ready for 40 s after its kubelet has died: it must have said so since the restart.
      sh: `${ADMIN}
end=$(($(date +%s) + ${PATIENCE}))
until kc get node ${sh(name)} -o json | awk -F'"' '
  /"bootID":/ { boot = $4 } /"status":/ { status = $4 } /"type": "Ready"/ { ready = status }
  END { exit !(ready == "True" && boot != "${old}") }'; do
  [ "$(date +%s)" -lt "$end" ] || { echo 'The node is not Ready after its restart: it stays cordoned, run this again once it is'; exit 1; }
  sleep 2
done
${givenBack(name)}`,
      ...how,
    },
  ];
}

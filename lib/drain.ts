import { clusterLook, DRAINED, K3S, KUBECTL, nodeNameOf, nodesOf } from "./k3s.ts";
import type { Settings } from "./settings.ts";
import { sh } from "./sh.ts";
import { type Change, type Facts, Refusal } from "./step.ts";

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

/** The node that this box is: its name, what its cluster says of it, and where it may be drained. */
function nodeHere(want: Settings, facts: Facts) {
  const server = facts.roles?.split("\n")[0] === "k3s";
  const name = nodeNameOf(server ? want.SERVER_ARGS : want.AGENT_ARGS, facts);
  const nodes = nodesOf(facts.nodes);
  const how: Partial<Change> = { seconds: PATIENCE + 60, alone: true, ...(server ? {} : { onServer: true }) };
  return { name, known: nodes.length > 0, node: nodes.find((n) => n.name === name), how };
}

/**
 * Moves the pods of this box's node elsewhere before a restart, through the cluster's server. A node that is
 * not Ready has none that could be asked to go; one that the user has cordoned is theirs.
 *
 * @throws {Refusal} where the server is not known.
 */
export function drain(want: Settings, facts: Facts): Change[] {
  if (!facts.roles?.trim()) return [];
  const { name, known, node, how } = nodeHere(want, facts);
  if (known && (!node?.ready || (node.cordoned && !node.drained))) return [];
  if (how.onServer && !want.SERVER) {
    if (!known) return [];
    throw new Refusal(
      `Node ${name} is to be drained before its restart, which only the cluster's server may do: set SERVER, or cordon and drain it yourself first`,
    );
  }
  // A box that cannot see its cluster just now may be a healthy node all the same.
  const asked = `[ "$(kc get node ${sh(name)} --no-headers | awk '{ print $2 }')" = Ready ] || exit 0\n`;
  return [
    {
      why: `drain node ${name}`,
      sh: `${ADMIN}
${known ? "" : asked}kc annotate --overwrite node ${sh(name)} ${DRAINED}=${sh(facts.boot?.trim() ?? "")}
# The flag's name is of v1.20.
case $(${K3S} --version) in *'k3s version v1.1'[789].*) scratch=--delete-local-data ;; *) scratch=--delete-emptydir-data ;; esac
kc drain ${sh(name)} --ignore-daemonsets "$scratch" --timeout=${PATIENCE}s || {
  kc uncordon ${sh(name)}
  kc annotate node ${sh(name)} ${DRAINED}-
  echo 'Move by hand what stays (kubectl drain), and run this again: a node that you have cordoned is restarted as it is'
  exit 1
}`,
      ...how,
    },
  ];
}

/** Gives the node its work back after a restart, if it was this project that took it; also if that run was cut. */
export function uncordon(want: Settings, facts: Facts): Change[] {
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
  // One that is long up and not Ready has something else to be mended first.
  if (!node?.drained || (!node.ready && Number(facts.uptime) >= STARTING)) return [];
  // A node counts as Ready for 40 s after its kubelet has died: it must have said so since the restart.
  const old = node.drained === facts.boot?.trim() ? "" : node.drained;
  return [
    {
      why: `uncordon node ${name} once it is Ready`,
      sh: `${ADMIN}
end=$(($(date +%s) + ${PATIENCE}))
until kc get node ${sh(name)} -o json | awk -F'"' '
  /"bootID":/ { boot = $4 } /"status":/ { status = $4 } /"type": "Ready"/ { ready = status }
  END { exit !(ready == "True" && boot != "${old}") }'; do
  [ "$(date +%s)" -lt "$end" ] || { echo 'The node is not Ready after its restart: it stays cordoned, run this again once it is'; exit 1; }
  sleep 2
done
kc uncordon ${sh(name)}
kc annotate node ${sh(name)} ${DRAINED}-`,
      ...how,
    },
  ];
}

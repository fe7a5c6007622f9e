import { DRAINED, K3S, KUBECTL, type Node, nodesOf } from "./k3s.ts";
import { sh } from "./sh.ts";
import type { Change, Facts } from "./step.ts";

/** How long pods may take to leave a node, in seconds. */
const PATIENCE = 180;

/**
 * Changes, on the server, that empty a node of its pods. None where it is not Ready (its kubelet ends no pod), is
 * empty already, or is the only one that takes pods. What blocks it is named, and the node then takes pods again.
 *
 * @param force pods without a controller are deleted too: nothing starts them anew elsewhere.
 */
export function drain(node: Node, facts: Facts, force: boolean): Change[] {
  const others = nodesOf(facts.nodes).filter((n) => n.name !== node.name && n.ready && !n.unschedulable);
  if (!node.ready || node.drained?.startsWith("yes") || others.length === 0) return [];
  const name = sh(node.name);
  // A node that somebody else has cordoned stays so.
  const cordon = node.drained ? node.drained.endsWith("cordoned") : node.unschedulable;
  const mark = (word: string) =>
    `kc annotate --overwrite node ${name} ${DRAINED}=${word}${cordon ? "-cordoned" : ""} >/dev/null`;
  const old = Number(facts.version?.split(".")[1]) < 20;
  const options = [
    "--ignore-daemonsets",
    `--delete-${old ? "local" : "emptydir"}-data`,
    ...(force ? ["--force"] : []),
    `--timeout=${PATIENCE}s`,
  ];
  return [
    {
      why: `drain node ${node.name}, for ${PATIENCE} s at most`,
      sh: `${KUBECTL}
${mark("begun")}
timeout ${PATIENCE + 20} ${K3S} kubectl --kubeconfig /etc/rancher/k3s/k3s.yaml drain ${name} ${options.join(" ")} || {
  echo 'Pods that are still there:'
  kc get pods --all-namespaces --field-selector spec.nodeName=${name} --no-headers || :
  ${undone(name, cordon)}
  exit 1
}
${mark("yes")}`,
      seconds: PATIENCE + 60,
    },
  ];
}

const undone = (name: string, cordon: boolean) =>
  `${cordon ? "" : `kc uncordon ${name}; `}kc annotate node ${name} ${DRAINED}-`;

/** Changes, on the server, that let pods come to a node again which was drained here. */
export function uncordon(node: Node): Change[] {
  if (!node.drained) return [];
  return [
    {
      why: `let pods come to node ${node.name} again`,
      sh: `${KUBECTL}\n${undone(sh(node.name), node.drained.endsWith("cordoned"))}`,
    },
  ];
}

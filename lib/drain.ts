import { DRAINED, K3S, type Node, nodesOf } from "./k3s.ts";
import { sh } from "./sh.ts";
import type { Change, Facts } from "./step.ts";

/** How long pods may take to leave a node, in seconds. */
const PATIENCE = 300;

/** The admin's kubectl, which is the server's: an agent's credentials do not allow to drain. */
const ADMIN = `kc() { ${K3S} kubectl --kubeconfig /etc/rancher/k3s/k3s.yaml "$@"; }`;

const undone = (node: Node) => `kc uncordon ${sh(node.name)}\nkc annotate node ${sh(node.name)} ${DRAINED}-`;

/**
 * Changes, on the server, that empty a node of its pods. None where it is not Ready (its kubelet ends no pod), is
 * empty already, is cordoned by somebody else (it is theirs), or is the only one that takes pods. kubectl names
 * what blocks it, and the node then takes pods again.
 *
 * @param force pods without a controller are deleted too: nothing starts them anew elsewhere.
 */
export function drain(node: Node, facts: Facts, force: boolean): Change[] {
  const others = nodesOf(facts.nodes).filter((n) => n.name !== node.name && n.ready && !n.cordoned);
  if (!node.ready || node.drained === "yes" || (node.cordoned && !node.drained) || others.length === 0)
    return [];
  const name = sh(node.name);
  // The flag's name is of v1.20.
  const scratch =
    Number(facts.version?.split(".")[1]) < 20 ? "--delete-local-data" : "--delete-emptydir-data";
  return [
    {
      why: `drain node ${node.name}, for ${PATIENCE} s at most`,
      sh: `${ADMIN}
kc annotate --overwrite node ${name} ${DRAINED}=begun
kc drain ${name} --ignore-daemonsets ${scratch} ${force ? "--force " : ""}--timeout=${PATIENCE}s || {
  ${undone(node).replace("\n", "\n  ")}
  exit 1
}
kc annotate --overwrite node ${name} ${DRAINED}=yes`,
      seconds: PATIENCE + 60,
    },
  ];
}

/** Changes, on the server, that let pods come to a node again which was drained here. */
export function uncordon(node: Node): Change[] {
  if (!node.drained) return [];
  return [{ why: `let pods come to node ${node.name} again`, sh: `${ADMIN}\n${undone(node)}` }];
}

/** Draining and uncordoning a box's node. */

import { SettingError, type Settings } from "../settings.ts";
import { raw, sh, waitUntil } from "../sh.ts";
import { type Change, type Facts, type Look, prints, Refusal, type Step } from "../step.ts";
import { type Match, nodeNameOf, nodeOf, nodesAt, place, RESTARTING, type Who, whoIs } from "./identity.ts";
import { API, clusterLook, DRAINED, NODES, type Node, nodesOf, WATCH } from "./nodes.ts";
import { K3S, nameLook, shownLook } from "./unit.ts";

/** Facts about this box's node, if any; also while k3s is still starting. */
export const drainLook = [
  shownLook,
  prints("roles")(`fact roles
property "$server_unit" UnitFileState; case $value in enabled*) echo k3s ;; esac
property "$agent_unit" UnitFileState; case $value in enabled*) echo k3s-agent ;; esac
`),
  nameLook,
  ...clusterLook,
];

/** Time limits for draining a node and for its return, in seconds. */
const PATIENCE = 300;
/**
 * How long after a boot k3s may take to answer, in seconds: v1.36.3 on two emulated CPUs took 55, starved ones over 180.
 * The first is for a box whose k3s is set up next, which waits for it too.
 */
const [STARTING, STARTED] = [180, 600];

/** kubectl as the admin: an agent's credentials do not allow draining. */
const ADMIN = sh`[ -s /etc/rancher/k3s/k3s.yaml ] || { echo "No k3s server is on this box: SERVER has to name the cluster's"; exit 1; }
admin() { ${K3S} kubectl --kubeconfig /etc/rancher/k3s/k3s.yaml "$@"; }`;

/** Without a Ready kubelet nothing ends the pods; a node that the user cordoned is left alone. */
const drainable = (node: Node) => node.ready && (!node.cordoned || node.drained !== undefined);

const givenBack = (name: string) => sh`admin uncordon ${name}
admin annotate node ${name} ${DRAINED}-`;

/** On failure kubectl names what blocks it, and the node is uncordoned again. */
function draining(name: string, boot: string, flags = "", first = ""): Change {
  const mark = (value: string) => sh`admin annotate --overwrite node ${name} ${DRAINED}=${value}`;
  return {
    why: `drain node ${name}, for ${PATIENCE} s at most`,
    sh: sh`${raw(ADMIN)}
${raw(first)}${raw(mark(boot))}
# The flag's name is of v1.20.
case $(${K3S} --version) in *'k3s version v1.1'[789].*) scratch=--delete-local-data ;; *) scratch=--delete-emptydir-data ;; esac
admin drain ${name} --ignore-daemonsets "$scratch" ${raw(flags)}--timeout=${PATIENCE}s || {
  ${raw(givenBack(name).replace("\n", "\n  "))}
  echo 'Move by hand what stays (kubectl drain), and run this again: a node that you have cordoned is taken as it is'
  exit 1
}
${raw(mark(`${boot}.done`))}`,
    seconds: PATIENCE + 60,
  };
}

/**
 * Changes on the server that drain a node. None if that is done, or if no other node takes pods.
 * @param force also delete pods without a controller, which nothing starts again.
 */
export function drain(node: Node, facts: Facts<"nodes">, force: boolean): Change[] {
  const others = nodesOf(facts.nodes).filter((n) => n.name !== node.name && n.ready && !n.cordoned);
  if (!drainable(node) || (node.cordoned && node.drained?.done) || others.length === 0) return [];
  return [draining(node.name, node.boot ?? "", force ? "--force " : "")];
}

/** Changes on the server that uncordon a node that this project drained. */
export function uncordon({ name, drained }: Node): Change[] {
  return drained ? [{ why: `let pods come to node ${name} again`, sh: `${ADMIN}\n${givenBack(name)}` }] : [];
}

/**
 * Waits while k3s starts on the server, for a minute at most, and prints nothing: after an interrupted run nothing could
 * be planned. One that fails in a loop is not waited for: systemd has it as "auto-restart".
 */
export const startedLook = sh`(${raw(
  waitUntil(60, "! systemctl show -p SubState k3s 2>/dev/null | grep -qE '=(start|stop|final)'", ":"),
)})` as Look;

/** The server's list of nodes. @throws {Refusal} where its API does not answer. */
export function serverNodes(facts: Facts<"nodes">): Node[] {
  const nodes = nodesOf(facts.nodes);
  if (nodes.length === 0) throw new Refusal("The server's API does not answer: run make server");
  return nodes;
}

/**
 * A step that runs on the server for a box's node, based on the server's own list of nodes: what the box reports about
 * the cluster is not trusted. Its plan throws {Refusal} when the API does not answer, since nothing follows from that.
 */
export const onNodeOf = <F extends string = "nodes">(
  name: string,
  box: Who,
  plan: (found: Match | undefined, facts: Facts<F | "nodes">) => Change[],
): Step<F | "nodes"> => ({
  name,
  options: [],
  look: () => [startedLook, ...clusterLook],
  plan(_want, facts) {
    const found = nodeOf(serverNodes(facts), box);
    if (found?.is !== "restarted" || !found.node.ready) return plan(found, facts);
    return [
      {
        why: `wait until node ${found.node.name} says that its box has restarted`,
        sh: `${WATCH}\n${waitUntil(
          RESTARTING,
          sh`changed ${found.node.name} 5; ! echo "$node" | grep -F ' Ready' | grep -qvF ${` boot=${box.boot} `}`,
          sh`echo ${"It is Ready, and in another boot than this box: two machines have one machine id (/etc/machine-id)"}`,
        )}`,
        seconds: RESTARTING + 60,
        lookAgain: true,
      },
    ];
  },
});

/** `drain` on the server. */
export const drainedOn = (box: Who, force: boolean) =>
  onNodeOf("drain", box, (found, facts) => (found ? drain(found.node, facts, force) : []));
/** `uncordon` on the server. */
export const uncordonedOn = (box: Who) =>
  onNodeOf("uncordon", box, (found) => (found ? uncordon(found.node) : []));

/** Uncordons a node on the server once it is Ready in the box's current boot. */
const uncordonedAfter = (box: Who): Step<"nodes"> => ({
  ...onNodeOf("uncordon", box, () => []),
  plan(_want, facts) {
    // Until k3s reports the new boot id, the box is recognised by its machine id.
    const node = nodeOf(serverNodes(facts), { ...box, uptime: 0 })?.node;
    return node?.drained && node.drained.boot !== box.boot ? [givingBack(node.name, box.boot ?? "")] : [];
  },
});

/** The change that waits until a node is Ready in this boot, then uncordons it. */
const givingBack = (name: string, boot: string): Change => ({
  why: `uncordon node ${name} once it is Ready`,
  // A node stays Ready for 40 s after its kubelet has died: the heartbeat must be later than the restart.
  sh: [
    WATCH,
    ADMIN,
    waitUntil(
      PATIENCE,
      sh`changed ${name} 5; echo "$node" | grep -F ' Ready' | grep -qF ${` boot=${boot} `}`,
      sh`echo ${`Node ${name} is not Ready after its restart, and is still cordoned: make check says why; run this again once it is Ready (or kubectl uncordon ${name})`}`,
    ),
    givenBack(name),
  ].join("\n"),
  seconds: PATIENCE + 60,
});

/**
 * This box's node as the box itself sees it, and whether the box is a server.
 * @throws {SettingError} when the address is not known.
 */
function here(want: Settings, facts: Facts<"nodes" | "roles">) {
  if (!want.PUBLIC_IP)
    throw new SettingError(
      "PUBLIC_IP is not set, and this box is set up as a node: expected the address at which other clouds reach it, by which the node to drain is found",
    );
  const nodes = nodesOf(facts.nodes);
  const box = whoIs(want.PUBLIC_IP, facts);
  return {
    isServer: facts.roles?.split("\n")[0] === "k3s",
    known: nodes.length > 0,
    box,
    node: nodesAt(nodes, box)[0],
  };
}

/**
 * Drains this box's node before the box restarts. An agent's report can only avoid a drain: the server finds the node
 * and decides.
 *
 * @throws {Refusal} when the server is not known.
 */
export function drainHere(want: Settings, facts: Facts<"nodes" | "roles">): Change[] {
  if (!facts.roles?.trim()) return [];
  const { isServer, known, box, node } = here(want, facts);
  if (known && !(node && drainable(node))) return [];
  const how = { seconds: PATIENCE + 60, alone: true } as const;
  if (isServer) {
    const name = (known && nodeOf(nodesOf(facts.nodes), box)?.node.name) || nodeNameOf("server", want, facts);
    // A server whose API is silent at the moment may still be a healthy node.
    const asked = sh`${raw(NODES)}
nodes ${name} | grep -qF ' Ready ' || exit 0
`;
    return [{ ...draining(name, box.boot ?? "", "", known ? "" : asked), ...how }];
  }
  if (want.SERVER)
    return [
      {
        why: `drain the node ${place(box)}, if the server has it, for ${PATIENCE} s at most`,
        sh: "",
        onServer: drainedOn(box, false),
        ...how,
      },
    ];
  if (!known) return [];
  throw new Refusal(
    `Node ${node?.name} is to be drained before its restart, which only the cluster's server may do: set SERVER, or cordon and drain it yourself first`,
  );
}

/**
 * Uncordons this box's node after the restart that it was drained for, also if that run was interrupted. A node drained
 * later is being upgraded or removed.
 *
 * @param last nothing follows that would mend a node which is long up and not Ready.
 */
export function uncordonHere(want: Settings, facts: Facts<"nodes" | "roles">, last = false): Change[] {
  if (!facts.roles?.trim()) return [];
  const { isServer, known, box, node } = here(want, facts);
  const mendedLater = !last && Number(facts.uptime) >= STARTING;
  const limit = last ? STARTED : STARTING;
  const silent = last
    ? "{ echo 'k3s does not answer here: if this node was drained it is still cordoned; run this again once it does (or kubectl uncordon)'; exit 1; }"
    : "break";
  if (!known && !mendedLater)
    return [
      {
        why: "wait until the cluster says whether this node is drained",
        sh: sh`${raw(API)}
until apiuser; api GET '/api/v1/nodes?limit=1' 10 >/dev/null 2>&1; do
  [ "$(cut -d. -f1 /proc/uptime)" -lt ${limit} ] || ${raw(silent)}
  sleep 2
done`,
        seconds: limit + 60,
        lookAgain: true,
      },
    ];
  const old = node?.drained?.boot;
  if (!old || old === box.boot || (!node.ready && mendedLater)) return [];
  const change = { ...givingBack(node.name, box.boot ?? ""), alone: true } as const;
  return [isServer ? change : { ...change, sh: "", onServer: uncordonedAfter(box) }];
}

/** The rules of nodes, without effects: what they hold, what becomes of annotations and addresses, who may do what. */
import type { Generation } from "./common.ts";

export const FLANNEL = "flannel.alpha.coreos.com/";
export const OVERWRITE = `${FLANNEL}public-ip-overwrite`;

export type Address = { type: string; address: string };
export type Condition = {
  type: string;
  status: string;
  reason: string;
  message: string;
  lastHeartbeatTime: string;
  lastTransitionTime: string;
};
export type Node = {
  apiVersion: string;
  kind: string;
  metadata: {
    name: string;
    uid: string;
    creationTimestamp: string;
    resourceVersion: string;
    selfLink?: string;
    annotations: Record<string, string>;
    labels: Record<string, string>;
    finalizers: string[];
  };
  spec: {
    podCIDR: string;
    podCIDRs: string[];
    providerID: string;
    unschedulable?: boolean;
    taints?: { key: string; value?: string; effect: string }[];
  };
  status: { addresses: Address[]; conditions: Condition[]; [more: string]: unknown };
};
export type Backend = "wireguard" | "wireguard-native" | "vxlan" | "none" | string;

/** What a node's k3s was told and found. */
export type Facts = {
  name: string;
  nodeIp: string;
  /** `--node-ip` was given, and is on no interface. */
  nodeIpMissing: boolean;
  nodeIpGiven: boolean;
  externalIp?: string;
  args: string;
  env: string;
  taints?: string[];
  labels?: string[];
};
export type Machine = {
  architecture: string;
  bootID: string;
  kernelVersion: string;
  machineID: string;
  osImage: string;
  cpus: number;
  memoryKi: number;
};

const now = (): string => new Date().toISOString().replace(/\.\d+/, "");

/** What the kubelet registers. Addresses come from it in v1.17, from the cloud controller in modern k3s. */
export function newNode(gen: Generation, version: string, facts: Facts, machine: Machine): Node {
  const labels: Record<string, string> = {
    "beta.kubernetes.io/arch": machine.architecture,
    "beta.kubernetes.io/instance-type": "k3s",
    "beta.kubernetes.io/os": "linux",
    "kubernetes.io/arch": machine.architecture,
    "kubernetes.io/hostname": facts.name,
    "kubernetes.io/os": "linux",
    "node.kubernetes.io/instance-type": "k3s",
  };
  const annotations: Record<string, string> = {
    "node.alpha.kubernetes.io/ttl": "0",
    "volumes.kubernetes.io/controller-managed-attach-detach": "true",
  };
  if (gen === "modern" && !facts.nodeIpMissing)
    annotations["alpha.kubernetes.io/provided-node-ip"] = facts.nodeIp;
  const amount = {
    cpu: String(machine.cpus),
    "ephemeral-storage": "8125880Ki",
    "hugepages-1Gi": "0",
    "hugepages-2Mi": "0",
    memory: `${machine.memoryKi}Ki`,
    pods: "110",
  };
  return {
    apiVersion: "v1",
    kind: "Node",
    metadata: {
      annotations,
      creationTimestamp: now(),
      finalizers: ["wrangler.cattle.io/node"],
      labels,
      name: facts.name,
      resourceVersion: "1",
      uid: "",
    },
    spec: {
      podCIDR: "",
      podCIDRs: [],
      providerID: `k3s://${facts.name}`,
      ...(facts.taints?.length ? { taints: facts.taints.map(taint) } : {}),
    },
    status: {
      addresses:
        gen === "old" && !facts.nodeIpMissing
          ? [
              { address: facts.nodeIp, type: "InternalIP" },
              { address: facts.name, type: "Hostname" },
            ]
          : [],
      allocatable: amount,
      capacity: amount,
      conditions: kubeletConditions(false),
      daemonEndpoints: { kubeletEndpoint: { Port: 10250 } },
      nodeInfo: {
        architecture: machine.architecture,
        bootID: machine.bootID,
        containerRuntimeVersion: gen === "old" ? "containerd://1.3.3-k3s2" : "containerd://2.3.2-k3s2",
        kernelVersion: machine.kernelVersion,
        kubeProxyVersion: gen === "old" ? version : "",
        kubeletVersion: version,
        machineID: machine.machineID,
        operatingSystem: "linux",
        osImage: machine.osImage,
        systemUUID: machine.machineID,
      },
    },
  };
}

/** What is named comes first, in this order. */
const first = <T extends object>(names: string, of: T): T => {
  const own = names.split(" ").filter((name) => name in of);
  return { ...Object.fromEntries(own.map((name) => [name, of[name as keyof T]])), ...of };
};

/** A node as a list of the API has it: in the order of Go's structs (v1.17.6, v1.36.3, recorded); kubectl sorts. */
export const ordered = ({ metadata, spec, status }: Node) => ({
  metadata: first("name selfLink uid resourceVersion creationTimestamp labels annotations", metadata),
  spec,
  status: {
    ...first("capacity allocatable", status),
    conditions: status.conditions.map((condition) => first("type status", condition)),
    addresses: status.addresses.map((address) => first("type", address)),
  },
});

/** `key=value:Effect` or `key:Effect`, as kubelet and kubectl take it. */
export function taint(text: string): { key: string; value?: string; effect: string } {
  const [, key, value, effect] =
    /^([^=:]+)(?:=([^:]*))?:(NoSchedule|PreferNoSchedule|NoExecute)$/.exec(text) ?? [];
  if (!key || !effect) throw new Error(`invalid taint spec: ${text}`);
  return { key, ...(value ? { value } : {}), effect };
}

export function kubeletConditions(ready: boolean): Condition[] {
  const condition = (type: string, status: string, reason: string, message: string): Condition => ({
    lastHeartbeatTime: now(),
    lastTransitionTime: now(),
    message,
    reason,
    status,
    type,
  });
  return [
    condition(
      "MemoryPressure",
      "False",
      "KubeletHasSufficientMemory",
      "kubelet has sufficient memory available",
    ),
    condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
    condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
    ready
      ? condition("Ready", "True", "KubeletReady", "kubelet is posting ready status")
      : condition(
          "Ready",
          "False",
          "KubeletNotReady",
          "runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:Network plugin returns error: cni plugin not initialized",
        ),
  ];
}

/** v1.17's flannel adds a condition; modern flannel does not. */
export const flannelCondition = (): Condition => ({
  lastHeartbeatTime: now(),
  lastTransitionTime: now(),
  message: "Flannel is running on this node",
  reason: "FlannelIsUp",
  status: "False",
  type: "NetworkUnavailable",
});

/** Keeps the time of the last change where the status is the same. */
export function mergeConditions(have: Condition[], next: Condition[]): Condition[] {
  const merged = next.map((n) => {
    const old = have.find((h) => h.type === n.type);
    return old?.status === n.status ? { ...n, lastTransitionTime: old.lastTransitionTime } : n;
  });
  return [...have.filter((h) => !next.some((n) => n.type === h.type)), ...merged];
}

export const unknownCondition = (c: Condition): Condition =>
  ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"].includes(c.type) && c.status !== "Unknown"
    ? {
        ...c,
        status: "Unknown",
        reason: "NodeStatusUnknown",
        message: "Kubelet stopped posting node status.",
        lastTransitionTime: now(),
      }
    : c;

/**
 * What k3s itself puts on its node: labels in v1.17, annotations in modern k3s, for the cloud controller to read. It takes
 * none away: an external address that was given once stays as long as the node.
 */
export function addressMarks(
  gen: Generation,
  facts: Facts,
): { labels: Record<string, string>; annotations: Record<string, string> } {
  const marks: Record<string, string> = { "k3s.io/hostname": facts.name, "k3s.io/internal-ip": facts.nodeIp };
  if (facts.externalIp) marks["k3s.io/external-ip"] = facts.externalIp;
  const given = Object.fromEntries(
    (facts.labels ?? []).map((l) => [l.split("=")[0], l.split("=").slice(1).join("=")]),
  );
  const annotations = { "k3s.io/node-args": facts.args, "k3s.io/node-env": facts.env };
  return gen === "old"
    ? { labels: { ...given, ...marks }, annotations }
    : { labels: given, annotations: { ...annotations, ...marks } };
}

/**
 * The cloud controller. A node without its marks keeps the addresses it has. Between two rounds the modern one takes
 * nodes that are new to it: others have changed addresses from the next round on.
 */
export function cloudAddresses(gen: Generation, node: Node, round = true): Address[] {
  if (!round && (gen === "old" || node.status.addresses.length)) return node.status.addresses;
  const marks = gen === "old" ? node.metadata.labels : node.metadata.annotations;
  const split = (type: string, value?: string): Address[] =>
    value ? value.split(",").map((address) => ({ address, type })) : [];
  const found = [
    ...split("InternalIP", marks["k3s.io/internal-ip"]),
    ...split("ExternalIP", marks["k3s.io/external-ip"]),
    ...split("Hostname", marks["k3s.io/hostname"]),
  ];
  return found.length ? found : node.status.addresses;
}

/**
 * flannel's annotations at a start of k3s. v1.17 honours a hand-made overwrite; modern k3s writes it itself with
 * --flannel-external-ip and deletes it without.
 */
export function flannelAnnotations(
  gen: Generation,
  have: Record<string, string>,
  own: { ifaceIp: string; externalIp?: string; useExternal: boolean; backend: Backend; publicKey: string },
): Record<string, string | null> {
  const wireguard = own.backend.startsWith("wireguard");
  const patch: Record<string, string | null> = {
    [`${FLANNEL}backend-data`]: !wireguard
      ? `{"VtepMAC":"00:00:00:00:00:00"}`
      : gen === "old"
        ? JSON.stringify(own.publicKey)
        : JSON.stringify({ PublicKey: own.publicKey, Port: 51820 }),
    [`${FLANNEL}backend-type`]: !wireguard ? own.backend : gen === "old" ? "extension" : "wireguard",
    [`${FLANNEL}kube-subnet-manager`]: "true",
  };
  let overwrite: string | undefined = have[OVERWRITE];
  if (gen === "modern" && own.useExternal && own.externalIp) patch[OVERWRITE] = overwrite = own.externalIp;
  if (gen === "modern" && !own.useExternal) {
    if (overwrite) patch[OVERWRITE] = null;
    overwrite = undefined;
  }
  patch[`${FLANNEL}public-ip`] = overwrite || own.ifaceIp;
  return patch;
}

export type Peer = { key: string; endpoint: string; allowed: string };

/** The peer a node is to the others, by its annotations. */
export function peer(gen: Generation, node: Node): Peer | undefined {
  const a = node.metadata.annotations,
    data = a[`${FLANNEL}backend-data`],
    ip = a[`${FLANNEL}public-ip`];
  if (a[`${FLANNEL}kube-subnet-manager`] !== "true" || !data || !ip || !node.spec.podCIDR) return undefined;
  if (a[`${FLANNEL}backend-type`] !== (gen === "old" ? "extension" : "wireguard")) return undefined;
  try {
    const parsed: unknown = JSON.parse(data);
    const own =
      typeof parsed === "string"
        ? { PublicKey: parsed, Port: 51820 }
        : (parsed as { PublicKey: string; Port: number });
    return { key: own.PublicKey, endpoint: `${ip}:${own.Port}`, allowed: node.spec.podCIDR };
  } catch {
    return undefined;
  }
}

/** The lowest free /24 of the cluster's /16. */
export function podCidr(cluster: string, taken: string[]): string {
  const [a, b] = cluster.split(".");
  for (let n = 0; n < 256; n++) if (!taken.includes(`${a}.${b}.${n}.0/24`)) return `${a}.${b}.${n}.0/24`;
  throw new Error("no pod CIDR left");
}

export type User = { name: string; groups: string[] };
export type Verb = "get" | "list" | "watch" | "create" | "patch" | "update" | "delete";
export type Ask = {
  verb: Verb;
  resource: string;
  group?: string;
  name?: string;
  namespace?: string;
  subresource?: string;
  fieldSelector?: string;
};

/** Who may do what with nodes and the few other things here. Undefined: yes; else the words of the 403. */
export function forbidden(gen: Generation, user: User, ask: Ask): string | undefined {
  if (user.groups.includes("system:masters")) return undefined;
  const what = ask.subresource ? `${ask.resource}/${ask.subresource}` : ask.resource;
  const subject = ask.name
    ? `${ask.resource} ${JSON.stringify(ask.name)} is forbidden`
    : `${ask.resource} is forbidden`;
  const no = `${subject}: User ${JSON.stringify(user.name)} cannot ${ask.verb} resource ${JSON.stringify(what)} in API group ${JSON.stringify(ask.group ?? "")} ${ask.namespace ? `in the namespace ${JSON.stringify(ask.namespace)}` : "at the cluster scope"}`;
  if (ask.resource !== "nodes") {
    const reads = ["get", "list", "watch"].includes(ask.verb);
    // Kubernetes lets kubelets read services (its NodeRules), k3s its controller what network policies are about.
    const mayRead =
      user.name === "system:k3s-controller"
        ? ["pods", "endpoints"]
        : user.groups.includes("system:nodes")
          ? ["services"]
          : [];
    return reads && !ask.group && mayRead.includes(ask.resource) ? undefined : no;
  }
  if (ask.group) return no;
  if (user.name === "system:k3s-controller") {
    if (gen === "modern" && ask.verb === "patch" && ask.subresource === "status") return undefined;
    return !ask.subresource && (gen === "old" ? ["get"] : ["get", "list", "watch"]).includes(ask.verb)
      ? undefined
      : no;
  }
  if (user.name === "system:kube-proxy")
    return !ask.subresource && ["get", "list", "watch"].includes(ask.verb) ? undefined : no;
  if (!user.groups.includes("system:nodes") || !user.name.startsWith("system:node:")) return no;
  const own = user.name.slice("system:node:".length);
  switch (ask.verb) {
    case "get":
    case "list":
    case "watch":
      if (gen === "old" || ask.name === own || ask.fieldSelector === `metadata.name=${own}`) return undefined;
      return `${no}: ${ask.name ? `node ${JSON.stringify(own)} cannot read ${JSON.stringify(ask.name)}, only its own Node object` : `node ${JSON.stringify(own)} cannot read all nodes, only its own Node object`}`;
    case "create":
    case "patch":
    case "update":
      return !ask.name || ask.name === own
        ? undefined
        : `${subject}: node ${JSON.stringify(own)} is not allowed to modify node ${JSON.stringify(ask.name)}`;
    default:
      return no;
  }
}

/** NodeRestriction: a kubelet may not give its node labels of kubernetes.io other than its own. */
export function forbiddenLabels(have: Record<string, string>, next: Record<string, string>): string[] {
  const mine =
    /^(beta\.)?kubernetes\.io\/(arch|os|hostname|instance-type)$|^(node|kubelet)\.kubernetes\.io\/|^topology\.kubernetes\.io\/|^failure-domain\.beta\.kubernetes\.io\//;
  return Object.keys({ ...have, ...next }).filter(
    (k) => have[k] !== next[k] && /(^|\.)(kubernetes|k8s)\.io\//.test(k) && !mine.test(k),
  );
}

/** RFC 7386, which is also what a strategic merge does to maps. */
export function mergePatch(target: unknown, patch: unknown): unknown {
  if (patch === null || typeof patch !== "object" || Array.isArray(patch)) return patch;
  const result: Record<string, unknown> =
    target && typeof target === "object" && !Array.isArray(target) ? { ...(target as object) } : {};
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete result[key];
    else if (value !== undefined) result[key] = mergePatch(result[key], value);
  }
  return result;
}

/** The address metrics-server takes: of the first type in its list that the node has. */
export function metricsAddress(types: string[], addresses: Address[]): Address | undefined {
  for (const type of types) {
    const found = addresses.find((a) => a.type === type);
    if (found) return found;
  }
  return undefined;
}

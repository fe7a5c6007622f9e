/** What a box sees of its cluster: the nodes by kubectl, WireGuard's peers by wg. */
import { isIP } from "node:net";
import { K3S, NAME } from "./k3s.ts";

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

/** As the API server itself would have them; any agent may write annotations. */
const IP = /^[0-9a-f.:]{2,39}$/;
const BOOT = /^[0-9a-f-]{36}$/;
const CIDR = /^[0-9a-f.:]{2,39}\/\d{1,3}$/;
const VERSION = /^v[\w.+-]{1,60}$/;
const only = (pattern: RegExp, value: unknown): string | undefined =>
  typeof value === "string" && pattern.test(value) ? value : undefined;
/** Digits and dots alone may still be a name that nft, say, would look up. */
export const address = (value: unknown): string | undefined => {
  const ip = only(IP, value);
  return ip && isIP(ip) ? ip : undefined;
};
const record = (value: unknown): Record<string, string> =>
  Object.fromEntries(
    typeof value === "object" ? Object.entries(value ?? {}).filter(([, v]) => typeof v === "string") : [],
  );

/**
 * Nodes out of the JSON of a NodeList or of one Node; none where the text is neither. What is no address is
 * left out: an agent may write into its own node what it likes, and must not reach another box's shell.
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
        cordoned: spec?.unschedulable === true,
        boot: only(BOOT, status?.nodeInfo?.bootID),
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

/** Seconds after which WireGuard drops a session; while keepalives flow it is renewed every 120. */
export const FRESH = 180;

/** The peer behind which a node's pods are: WireGuard has at most one for a network. */
export const peerOf = (peers: readonly Peer[], podCidr = "-"): Peer | undefined =>
  peers.find(({ allowedIps }) => allowedIps.includes(podCidr));

/** Peers out of the fact `peers`: lines of `wg show IF dump` less the first, each behind its interface. @see wg(8) */
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

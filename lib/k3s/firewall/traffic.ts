/** What the nodes of a cluster send each other, what is closed to all others, and the firewall that is to have it so. */

import { type Facts, type Printed, prints } from "../../step.ts";
import { NAT } from "../../table.ts";
import type { Chain } from "./chains.ts";

/** Traffic between nodes: API, kubelet, WireGuard. */
export const BETWEEN = [
  ["tcp", 6443],
  ["tcp", 10250],
  ["udp", 51820],
] as const;
/** Interfaces of pod traffic. */
export const INTERFACES = ["cni0", "flannel.1", "flannel-wg"];
/**
 * Ports to close to the world: API, kubelet, health and metrics of kube-proxy, scheduler and controller manager
 * (v1.17's 10251 and 10252 need no credentials), vxlan and WireGuard.
 */
export const CLOSED = [
  ["tcp", 6443, 6443],
  ["tcp", 10248, 10259],
  ["udp", 8472, 8472],
  ["udp", 51820, 51821],
] as const;

/** Marks our rules. */
export const RULE_COMMENT = "k3s-across-clouds";

/** Networks of pods and services may be dual-stack. */
export const eachOf = (ranges: readonly string[]) => ranges.flatMap((range) => range.split(","));
/** The IPv4 network of the pods. */
export const ipv4Of = ([pods = ""]: readonly string[]) =>
  eachOf([pods]).find((range) => range.includes(".")) ?? "10.42.0.0/16";

/** As a source in rules: any IPv4 address. */
export const ANYWHERE = "0.0.0.0/0";

/** Among the nodes: kubelets are reached inside the tunnel alone. */
export const TUNNEL = "tunnel";

/** The interface of an entry for devices. */
export const ENTRY = "k3s-devices";
/** What sets it up. */
export const ENTRY_PROGRAM = "/usr/local/sbin/k3s-devices";

export const devicePortLook = prints("device-port")(
  `[ ! -e ${ENTRY_PROGRAM} ] || { fact device-port; sed -n 's/^port=//p' ${ENTRY_PROGRAM}; }`,
);

/** Among the nodes, where the box is an entry for devices: its port, such as 51822/udp, which is open to all. */
export const entryOf = (facts: Facts<Printed<typeof devicePortLook>>): string[] => {
  const [port] = /^\d{1,5}$/.exec(facts["device-port"]?.trim() ?? "") ?? [];
  return port ? [`${port}/udp`] : [];
};

/** The port of devices among the nodes. */
export const devicePort = (nodes: readonly string[]): number | undefined => {
  const node = nodes.find((one) => one.endsWith("/udp"));
  return node ? Number.parseInt(node, 10) : undefined;
};

/** The ports that are to be open to nodes with a public address. */
export const portsTo = (nodes: readonly string[]) =>
  BETWEEN.filter(([, port]) => port !== 10250 || !nodes.includes(TUNNEL));

/**
 * What is to be open: each port to each node. A home node (NAT among `nodes`) comes from anywhere; it reaches kubelets
 * through the tunnel. Devices come from anywhere too, to their own port.
 */
export const openings = (nodes: readonly string[]) =>
  nodes
    .filter((node) => node !== TUNNEL)
    .flatMap((node) => {
      const port = devicePort([node]);
      const ports = port ? [["udp", port] as const] : portsTo(node === NAT ? [TUNNEL] : nodes);
      const ip = port || node === NAT ? ANYWHERE : node;
      return ports.map(([protocol, port]) => ({ ip, protocol, port }));
    });

/** A program that manages the box's firewall. */
export interface FirewallManager<F extends string> {
  name: string;
  runs(facts: Facts<F>): boolean;
  /** Is this base chain its own? It drops other rules in them at its next start. */
  owns(chain: Chain): boolean;
  /** Whose packets its commands let through in this chain. */
  opens(chain: Chain, facts: Facts<F>): ("nodes" | "pods")[];
  /** Has it rules of ours that let in anybody, for home nodes? */
  letsAllIn(facts: Facts<F>): boolean;
  /** @param late ours are there, but behind a rule that denies. */
  commands(facts: Facts<F>, nodes: readonly string[], ranges: readonly string[], late: boolean): string[];
}

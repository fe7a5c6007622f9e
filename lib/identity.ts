/** Who a box is: the settings' address, its boot id and machine id, and the CA of its cluster, held against each other. */
import type { Node } from "./kube.ts";
import { type Facts, Refusal } from "./step.ts";

/** A box by the settings' address, and by what it says of itself; one that is gone says nothing. */
export interface Who {
  ip: string;
  boot?: string;
  machine?: string;
  /** Seconds since its start. */
  uptime?: number;
}

export const whoIs = (ip: string, facts: Facts = {}): Who => ({
  ip,
  boot: facts.boot?.trim() ?? "",
  machine: facts.machine?.trim() ?? "",
  uptime: Number(facts.uptime),
});

/** After its restart a box's node still has the old boot id, and counts as Ready: until k3s has said so, in seconds. */
export const RESTARTING = 180;

export interface Match {
  node: Node;
  /**
   * `restarted`: the same machine in another boot, of which k3s has not told the cluster yet. `anew`: nothing of it is
   * the node's, which is not Ready: the box was set up anew, or the node's own is off.
   */
  is: "same" | "restarted" | "anew";
}

/**
 * The cluster's node of a box. Machine ids alone prove nothing (copies of an image have one), nor do boot ids (any
 * agent may write its own): node and box must agree, and nobody else may claim what is theirs.
 *
 * @param nodes as the server has them, if anything is to follow on it.
 * @returns nothing where the cluster knows neither the address nor the box.
 * @throws {Refusal} where they do not agree.
 */
export function nodeOf(nodes: readonly Node[], { ip, boot, machine, uptime = 0 }: Who): Match | undefined {
  const at = nodes.filter((n) => n.externalIp === ip || n.internalIp === ip);
  const [node, other] = at;
  if (other)
    throw new Refusal(
      `Nodes ${at.map(({ name }) => name).join(" and ")} have one address, ${ip}: which one is this box? Delete the other (kubectl delete node …), then again`,
    );
  // Containers of one host may share a boot id.
  const sure = node?.boot === boot && node?.machine !== undefined && node.machine === machine;
  const twin = boot && !sure ? nodes.find((n) => n.boot === boot && n !== node) : undefined;
  if (twin)
    throw new Refusal(
      `This box is not at ${ip} by the cluster: its boot id is that of node ${twin.name}, at ${twin.externalIp ?? twin.internalIp ?? "no address"}: is ${ip} another box's address?`,
    );
  if (!node) return undefined;
  if (!boot || node.boot === boot) return { node, is: "same" };
  const restarted = Boolean(machine) && node.machine === machine;
  if (!node.ready) return { node, is: restarted ? "restarted" : "anew" };
  if (restarted && uptime < RESTARTING) return { node, is: "restarted" };
  throw new Refusal(
    `Node ${node.name}, at ${ip}, is Ready, and is another box than this one: it has the boot id ${node.boot ?? "none"}, this box ${boot}`,
  );
}

/** The CAs by which a box is part of a cluster: of a server's data, and of what an agent has joined or is to join. */
export interface Cas {
  server: string[];
  agent: string[];
}

/** A fact for casOf: hashes alone. A token names the CA's root, k3s's own CA has nothing else; both are looked at. */
export const caLook = `fact cas; d=/var/lib/rancher/k3s
for role in server/tls agent; do
  [ ! -s $d/$role/server-ca.crt ] || echo "\${role%/*} $(sha256sum <$d/$role/server-ca.crt | cut -d' ' -f1)"
done
sed -n 's/^K10\\([0-9a-f]*\\)::.*/server \\1/p' $d/server/node-token 2>/dev/null
sed -n 's/^K3S_TOKEN=.\\{0,1\\}K10\\([0-9a-f]*\\)::.*/agent \\1/p' /etc/systemd/system/k3s-agent.service.env 2>/dev/null
`;

export function casOf(facts: Facts): Cas {
  const of = (role: string) =>
    [...(facts.cas ?? "").matchAll(/^(server|agent) ([0-9a-f]{64})$/gm)].flatMap(([, of, hash]) =>
      of === role ? (hash as string) : [],
    );
  return { server: of("server"), agent: of("agent") };
}

/** The hash of the CA that a token names. */
export const caIn = (token: string): string | undefined => /^K10([0-9a-f]{64})::/.exec(token)?.[1];

/** A CA as it is shown. */
export const brief = (hashes: readonly string[]): string =>
  hashes.length ? `${(hashes[0] as string).slice(0, 12)}…` : "none";

const share = (some: readonly string[], others: readonly string[]) => some.some((ca) => others.includes(ca));

/**
 * May k3s go from a box, as one of this cluster?
 *
 * @param cluster hashes of the cluster's CA, as far as they are known.
 * @param role what the box is by the settings.
 * @param known the cluster has a node of this box.
 * @param force it was told so: a server that the cluster does not know, and what no CA proves.
 * @throws {Refusal} for another cluster's box.
 */
export function mayGo(
  facts: Facts,
  cluster: readonly string[],
  role: "server" | "agent",
  known: boolean,
  force: boolean,
): void {
  const { server, agent } = casOf(facts);
  const anothers = (what: string, cas: readonly string[]) => {
    throw new Refusal(
      `k3s on this box is ${what} of another cluster (CA ${brief(cas)}, this cluster's ${brief(cluster)}): it goes by its own env file`,
    );
  };
  if (cluster.length) {
    if (server.length && !share(server, cluster)) anothers("a server", server);
    // A server's own agent has its CA.
    if (agent.length && !share(agent, [...cluster, ...server])) anothers("an agent", agent);
  } else if (server.length + agent.length && role === "agent" && !force)
    throw new Refusal(
      `Nothing tells of which cluster this box is (CA ${brief([...server, ...agent])}): the server has no CA, and K3S_TOKEN names none. FORCE=1 removes k3s all the same`,
    );
  if (server.length && role === "agent" && !known && !force)
    throw new Refusal(
      "This box has a server's data, with the same CA, and the cluster does not know it: is it the server that was, or one in use? FORCE=1 removes it with its datastore",
    );
}

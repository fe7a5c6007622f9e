#!/usr/bin/env -S node --import tsx
/**
 * Step 6 of 7: every peer reaches this node at its public address. Old k3s needs an annotation and a restart. A node
 * without a public address is reached at the address it sends from, so it has to send.
 */
import { causes } from "../lib/check/causes.ts";
import { nodeNameOf, nodesAt, whoIs } from "../lib/k3s/identity.ts";
import { keepaliveLook, keptAlive } from "../lib/k3s/keepalive.ts";
import {
  addressesOf,
  clusterLook,
  isHome,
  KUBECTL,
  type Node,
  nodesOf,
  oldest,
  oldestSh,
  peerOf,
  peersOf,
  STANDS,
  silence,
  standing,
  startedSh,
  WATCH,
} from "../lib/k3s/nodes.ts";
import { main } from "../lib/k3s/script.ts";
import { restart, startedAt } from "../lib/k3s/service.ts";
import {
  backendOf,
  binaryLook,
  type Generation,
  interfaceOf,
  nameLook,
  type Role,
  releaseOf,
  unitOf,
} from "../lib/k3s/unit.ts";
import { raw, sh, waitUntil } from "../lib/sh.ts";
import { type Change, type Facts, Refusal, step } from "../lib/step.ts";
import { NAT } from "../lib/table.ts";

const OVERWRITE = "flannel.alpha.coreos.com/public-ip-overwrite";

/** The step for a box of a known role; without one, for what runs there. */
export const annotateAs = (role?: Role) =>
  step({
    name: "annotate",
    options: ["PUBLIC_IP"],

    look: () => [...(role ? [] : ["others=whole"]), binaryLook, nameLook, ...clusterLook, ...keepaliveLook],

    plan(want, facts) {
      const [server = "", agent = ""] = (facts.processes ?? "").split("\n\n");
      // An agent of v1.36.3 may be Ready while systemd still has it "activating".
      const active = (unit: string) => /^ActiveState=(active|activating)$/m.test(unit);
      const as = role ?? (active(server) ? "server" : active(agent) ? "agent" : undefined);
      if (!as) throw new Refusal("Neither k3s nor k3s-agent runs on this box: bring it up first");
      const { generation } = releaseOf(
        role ? want : { ...want, K3S_VERSION: facts.version?.trim() ?? "" },
        facts,
      );
      if (!generation) return [];
      const started = startedAt(facts, as === "server" ? server : agent);
      const name = nodeNameOf(as, want, facts);
      const node = nodesOf(facts.nodes).find((n) => n.name === name);
      if (!role && !node)
        throw new Refusal(
          silence(facts)
            ? `The list of nodes is not available on this box: ${silence(facts)}`
            : `The cluster has no node ${name}: is k3s healthy here?`,
        );

      const ip = want.PUBLIC_IP;
      const home = ip === NAT;
      const kept = keptAlive(home ? interfaceOf(generation) : undefined, facts);
      const shaken = handshakes(facts, generation, name, home, as, started);
      if (generation === "old" && !home && (node?.publicIp !== ip || node.overwrite !== ip))
        return [
          ...kept,
          ...(node?.overwrite === ip
            ? []
            : [
                {
                  why: `annotate node ${name}: public-ip-overwrite ${node?.overwrite ?? "unset"} -> ${ip}`,
                  sh: sh`${raw(KUBECTL)}
kc annotate --overwrite node ${name} ${OVERWRITE}=${ip}`,
                },
              ]),
          // flannel reads the annotation when it starts; the other nodes follow live (v1.17.6, recorded).
          restart(as, generation, name, want),
          // A slow box is Ready before its flannel has started (v1.17.6, seen).
          known(name, ip, `wait until flannel's public-ip of ${name} is ${ip}`, "Did flannel start?"),
          ...shaken,
        ];
      if (!node) return [];
      if (!home && node.publicIp !== ip)
        return [
          ...kept,
          known(
            name,
            ip,
            `wait until flannel's public-ip of ${name} is ${ip}, not ${node.publicIp ?? "unset"}`,
            'Does the server run with --flannel-external-ip? "make server" sees to it',
          ),
          ...shaken,
        ];
      return [...kept, ...shaken];
    },
  });

/** The wait until peers know the node by this address. */
const known = (name: string, ip: string, why: string, hint: string): Change => ({
  why,
  sh: `${WATCH}\n${waitUntil(60, sh`changed ${name} 5; echo "$node" | grep -qF ${` public-ip=${ip} `}`, sh`echo ${hint}`)}`,
  seconds: 90,
});

/**
 * A node that was created less than this many seconds ago is still joining: it waits for handshakes only with nodes
 * created before it.
 */
const JOINING = 60;

/** The expected peers of this node, each with its state. */
function peersIn(
  facts: Facts<"peers" | "nodes">,
  generation: Generation,
  name: string,
  home: boolean,
  proves: number,
) {
  const peers = peersOf(facts.peers).filter((p) => p.interface === interfaceOf(generation));
  const nodes = nodesOf(facts.nodes);
  return expected(nodes, name, home, Number(facts.now), backendOf(generation)).map((node) => ({
    node,
    others: [...new Set(nodes.filter((other) => other.name !== node.name).flatMap(addressesOf))].sort(),
    ...standing(peerOf(peers, node.podCidr), node, nodes, proves),
  }));
}

/** The wait for peers without a fresh handshake at a valid address; nothing if there are none. */
function handshakes(
  facts: Facts<"peers" | "nodes">,
  generation: Generation,
  name: string,
  home: boolean,
  role: Role,
  started?: number,
): Change[] {
  const proves = oldest(generation, Number(facts.now), started);
  const missing = peersIn(facts, generation, name, home, proves).filter(
    ({ fresh, wrong }) => !fresh || wrong,
  );
  if (missing.length === 0) return [];
  const wrong = missing.flatMap(({ node, wrong }) => (wrong ? `${node.name} is at ${wrong}` : []));
  return [
    {
      why: `wait for a fresh handshake with ${missing.map(({ node }) => node.name).join(", ")} at the public address${wrong.length ? ` (${wrong.join("; ")})` : ""}`,
      sh: sh`${raw(generation === "old" ? startedSh(`$(systemctl show ${unitOf(role)} -p ExecMainStartTimestampMonotonic | cut -d= -f2)`) : "")}late() {
  ${raw(oldestSh(generation))}
  while read -r name c own others; do
    wg show ${interfaceOf(generation)} dump | awk -v c="$c" -v own="$own" -v others=" $others " -v oldest="$oldest" '
  ${raw(STANDS)}' || echo "$name"
  done <<'EOF'
${raw(missing.map(({ node, others }) => [node.name, node.podCidr, isHome(node) ? "any" : node.publicIp, ...others].join(" ")).join("\n"))}
EOF
}
${raw(
  waitUntil(
    90,
    'names=$(late) && [ -z "$names" ]',
    sh`echo "No handshake with $(echo "$names" | tr '\n' ' '): is 51820/udp open on both sides?"; wg show ${interfaceOf(generation)}`,
  ),
)}`,
      seconds: 120,
    },
  ];
}

/**
 * The expected peers of a node: every other node that is Ready and whose flannel address is its public one, and for nodes
 * with a public address those without. A node that
 * is down or still joining is checked by its own run, as is the later one of two that join at the same time. A node of
 * the other generation is not a peer until it is upgraded too. `home`: this node has no public address; `now` is in seconds
 * since 1970.
 */
export function expected(
  nodes: readonly Node[],
  name: string,
  home: boolean,
  now = Number.POSITIVE_INFINITY,
  backend?: string,
): Node[] {
  const own = nodes.find((n) => n.name === name);
  const later = (n: Node) =>
    own !== undefined &&
    now - n.created < JOINING &&
    (n.created > own.created || (n.created === own.created && n.name > name));
  return nodes.filter(
    (n) =>
      n.name !== name &&
      (n.backend ?? backend) === (backend ?? n.backend) &&
      n.ready &&
      n.podCidr &&
      (isHome(n) ? !home : n.publicIp && n.publicIp === n.externalIp) &&
      !later(n),
  );
}

export const annotate = annotateAs();

await main(import.meta, {
  about:
    "Makes every peer reach this node at its public address: by annotation on old k3s; else only verifies.",
  steps: [annotate],
  nothing: (want, facts) => {
    const fresh = peersOf(facts.peers).filter((p) => p.allowedIps.length);
    const { generation = "modern" } = releaseOf({ ...want, K3S_VERSION: facts.version?.trim() ?? "" }, facts);
    const [own] = nodesAt(nodesOf(facts.nodes), whoIs(want.PUBLIC_IP, facts));
    const notes = peersIn(facts, generation, own?.name ?? "", want.PUBLIC_IP === NAT, 0).flatMap(
      ({ node, note }) => (note ? [`; ${node.name} sends from ${note}`] : []),
    );
    return `every handshake is fresh, at public addresses (${fresh.map((p) => p.endpoint).join(", ") || "no peers yet"})${notes.join("")}`;
  },
  causes,
});

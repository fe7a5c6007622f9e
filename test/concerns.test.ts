/** What an agent reports of its cluster: as much as its plans need, however many nodes there are. */
import assert from "node:assert/strict";
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";
import { describe, test } from "node:test";
import fc from "fast-check";
import { admitted } from "../lib/k3s/firewall/firewall.ts";
import { identityAs } from "../lib/k3s/identity.ts";
import { CONCERNS, clusterLook, nodesOf, peersOf } from "../lib/k3s/nodes.ts";
import { annotateAs } from "../scripts/annotate.ts";
import {
  type Facts,
  has,
  healthy,
  look,
  MODERN,
  NOW,
  type NodeSpec,
  node,
  OLD,
  peer,
  programs,
  shell,
  temporary,
  wanted,
} from "./helpers.ts";

const AWKS = ["awk", "busybox awk"].filter((awk) => has(awk.split(" ")[0] as string));

/** A list as the API returns it, and as SHAPE divides it: one node per line. */
const listOf = (specs: readonly NodeSpec[], more: (i: number) => object = () => ({})) => {
  const items = specs.map((spec, i) => {
    const { kind: _, ...rest } = node(spec);
    return { ...rest, metadata: { ...rest.metadata, ...more(i) } };
  });
  return JSON.stringify({ kind: "NodeList", apiVersion: "v1", metadata: {}, items }).replaceAll(
    '},{"metadata":{',
    '},\n{"metadata":{',
  );
};

const ip = (n: number) => `198.51.100.${n + 11}`;
const specOf = (n: number, more: Partial<NodeSpec> = {}): NodeSpec => ({
  name: `a${n + 1}`,
  ip: ip(n),
  n,
  ...more,
});

/** The facts that are left of these on an agent that was started `since`. */
function concerned(facts: Facts, since: number, { others = "", joining = "", awk = "awk" } = {}): Facts {
  const { status, stdout, stderr } = shell(`m=mark others=${others}
${CONCERNS.replace("awk ", `${awk} `)}
{ cat <<'PEERS'; cat <<'NODES'; } | concerns ${joining || Math.max(NOW - 180, since - 2)}
${facts.peers}
PEERS
${facts.nodes}
NODES`);
  assert.equal(status, 0, stderr);
  const [nodes = "", peers] = stdout.split("\nmark fact peers\n");
  return { ...facts, nodes, ...(peers === undefined ? {} : { peers }) };
}

/** An agent, a2, whose peers all have recent handshakes. */
const cluster = (size: number, version: string) => {
  const specs = Array.from({ length: size }, (_, n) =>
    specOf(n, n === 0 ? { labels: { "node-role.kubernetes.io/control-plane": "true" } } : {}),
  );
  const peers = specs.filter(({ n }) => n !== 1).map((spec) => peer(version, spec, spec.ip, 30));
  return { nodes: listOf(specs), peers: peers.join("\n") };
};

describe("an agent reports", () => {
  for (const awk of AWKS)
    test(`the peer of a server that relays to a node without a public address (${awk})`, () => {
      const home = (n: number): NodeSpec => ({
        ...specOf(n),
        ip: `10.42.${n}.0`,
        external: "",
        public: "192.168.0.9",
      });
      const server = specOf(0, { labels: { "node-role.kubernetes.io/control-plane": "true" } });
      const relay = peer(MODERN, server, server.ip, 30, "10.42.0.0/24,10.42.2.0/24");
      const facts = healthy(MODERN, {}, { nodes: listOf([server, home(1), home(2)]), peers: relay });
      assert.deepEqual(
        peersOf(concerned(facts, 0, { awk }).peers).map(({ allowedIps }) => allowedIps),
        [["10.42.0.0/24", "10.42.2.0/24"]],
      );
    });

  for (const awk of AWKS)
    test(`only its own node and the server's if every handshake is recent, however many nodes there are (${awk})`, () => {
      for (const version of [OLD, MODERN]) {
        const [few, many] = [10, 100].map((size) =>
          concerned(healthy(version, {}, cluster(size, version)), 0, { awk }),
        );
        assert.deepEqual(
          nodesOf(many?.nodes).map(({ name }) => name),
          ["a1", "a2"],
        );
        assert.equal(many?.peers?.trim(), peer(version, specOf(0), ip(0), 30));
        assert.equal(many?.nodes?.length, few?.nodes?.length);
      }
    });

  test("every node's name and address if the firewall must allow all nodes", () => {
    const facts = healthy(MODERN, {}, cluster(30, MODERN));
    const same = (facts: Facts) =>
      assert.deepEqual(
        admitted(wanted(), concerned(facts, 0, { others: "names" })),
        admitted(wanted(), facts),
      );
    same(facts);
    const home = specOf(30, { ip: "10.42.30.0", external: "", public: "10.42.30.0" });
    const nodes = listOf([...Array.from({ length: 30 }, (_, n) => specOf(n)), home]);
    const seen = { ...facts, nodes, peers: `${facts.peers}\n${peer(MODERN, home, "203.0.113.77", 30)}` };
    assert.ok(admitted(wanted(), seen).includes("nat"));
    same(seen);
  });

  test("the complete list if that is requested, and an answer in another format unchanged", () => {
    const facts = healthy(MODERN, {}, cluster(5, MODERN));
    assert.deepEqual(nodesOf(concerned(facts, 0, { others: "whole" }).nodes), nodesOf(facts.nodes));
    const pretty = JSON.stringify(JSON.parse(facts.nodes as string), null, 4);
    assert.deepEqual(nodesOf(concerned({ ...facts, nodes: pretty }, 0).nodes), nodesOf(pretty));
    const empty = '{"kind":"NodeList","items":[]}';
    assert.deepEqual(JSON.parse(concerned({ ...facts, nodes: empty }, 0).nodes as string), JSON.parse(empty));
  });

  /** The complete look of a box, and how many peers were sent. */
  const looked = (active: string, curl: string) => {
    const root = temporary();
    for (const file of ["server/tls/client-admin.key", "agent/client-k3s-controller.key"]) {
      mkdirSync(dirname(`${root}/${file}`), { recursive: true });
      writeFileSync(`${root}/${file}`, "key");
    }
    const { nodes = "", peers = "" } = cluster(9, MODERN);
    writeFileSync(`${root}/list`, nodes.replaceAll("\n", ""));
    const dump = peers.replaceAll("flannel-wg\t", "").replaceAll(String(NOW - 30), "9999999999");
    writeFileSync(`${root}/dump`, `private\tkey\t51820\toff\n${dump}\n`);
    const PATH = programs(`${root}/bin`, {
      curl: curl.replace("LIST", `${root}/list`),
      wg: `[ "$2" = flannel-wg ] && cat ${root}/dump`,
      systemctl: `shift; for unit; do
  case $unit in -*) break ;; ${active}) state=active ;; *) state=inactive ;; esac
  printf 'ActiveState=%s\\nExecMainStartTimestampMonotonic=0\\n\\n' $state
done`,
    });
    mkdirSync(`${root}/flannel-wg`);
    const there = clusterLook
      .join("\n")
      .replaceAll("/sys/class/net", root)
      .replaceAll("/var/lib/rancher/k3s", root)
      .replaceAll("/usr/local/bin/k3s", "false");
    const facts = look([{ look: () => [there] }], wanted(), { PATH });
    return { nodes: nodesOf(facts.nodes).length, peers: peersOf(facts.peers).length };
  };

  test("only the peers among the nodes that it reports, but all peers if the API does not answer, as a server always does", () => {
    const list = "cat LIST; printf '\\n200'";
    assert.deepEqual(looked("k3s", list), { nodes: 9, peers: 8 });
    assert.deepEqual(looked("k3s-agent", list), { nodes: 2, peers: 1 });
    assert.deepEqual(looked("k3s-agent", "exit 7"), { nodes: 0, peers: 8 });
  });

  test("the servers and the node that has its address before it has joined", () => {
    const facts = healthy(MODERN, {}, cluster(30, MODERN));
    const { nodes } = concerned({ ...facts, peers: "" }, 0, { joining: `"" joining ${ip(20)}` });
    assert.deepEqual(
      nodesOf(nodes).map(({ name }) => name),
      ["a1", "a21"],
    );
  });

  test("enough for its plans to be the same as with the complete list", () => {
    const some = <T>(usual: T, ...others: T[]) =>
      fc.oneof({ weight: 3, arbitrary: fc.constant(usual) }, fc.constantFrom(...others));
    const member = fc.record({
      ready: some(true, false),
      public: some<number | undefined>(undefined, 1, 3),
      external: some<string | undefined>(undefined, "", ip(1), "10.0.0.7"),
      server: some(false, true),
      created: some(0, NOW - 20, NOW - 21),
      backend: some<string | undefined>(undefined, "extension", "wireguard"),
      version: some(MODERN, OLD, "v1.35.1+k3s1"),
      endpoint: some<string | undefined>(undefined, ip(0), ip(3), "10.0.0.7", "203.0.113.9", "(none)"),
      age: some<number | undefined>(30, undefined, 179, 181, 3000),
      link: some("own", "none", "other"),
    });
    const start = fc.constantFrom(NOW - 10_000, NOW - 100, NOW - 25);
    fc.assert(
      fc.property(
        fc.array(member, { minLength: 2, maxLength: 6 }),
        start,
        fc.constantFrom(OLD, MODERN),
        (members, since, version) => {
          const specs = members.map((m, n) =>
            specOf(n, {
              ready: m.ready,
              version: m.version,
              ...(m.public === undefined ? {} : { public: ip(m.public) }),
              ...(m.external === undefined ? {} : { external: m.external }),
              ...(m.server ? { labels: { "node-role.kubernetes.io/control-plane": "true" } } : {}),
            }),
          );
          const list = listOf(specs, (i) => {
            const { created = 0, backend } = members[i] ?? {};
            const { annotations } = node(specs[i] as NodeSpec).metadata;
            return {
              ...(created ? { creationTimestamp: new Date(created * 1000).toISOString() } : {}),
              annotations: {
                ...annotations,
                ...(backend ? { "flannel.alpha.coreos.com/backend-type": backend } : {}),
              },
            };
          });
          const peers = members.flatMap((m, n) => {
            if (n === 1 || m.link === "none") return [];
            const of = m.link === "own" ? version : version === OLD ? MODERN : OLD;
            return [peer(of, specs[n] as NodeSpec, m.endpoint ?? ip(n), m.age)];
          });
          // During the change to the other generation a node is restarted, and the look is repeated.
          fc.pre(!peers.length || members.some(({ link }, n) => n !== 1 && link === "own"));
          const elapsed = (NOW - since).toString();
          const unit = `ActiveState=active\nMainPID=7\nExecMainStartTimestampMonotonic=${5_000_000}\n`;
          const facts = healthy(
            version,
            {},
            {
              hostname: "a2",
              boot: node(specOf(1)).status.nodeInfo.bootID,
              machine: node(specOf(1)).status.nodeInfo.machineID,
              uptime: String(Number(elapsed) + 5),
              now: String(NOW),
              service: unit,
              processes: `\n\n${unit}`,
              nodes: list,
              peers: peers.join("\n"),
            },
          );
          const want = wanted({ PUBLIC_IP: ip(1), HOST: "a2", K3S_VERSION: version });
          const plans = (given: Facts) =>
            [identityAs("agent"), annotateAs("agent")].map((step) => {
              try {
                return step.plan(want, given).map(({ why, sh }) => [why, sh]);
              } catch (error) {
                return (error as Error).message;
              }
            });
          assert.deepEqual(plans(concerned(facts, since)), plans(facts));
        },
      ),
      { numRuns: 100 },
    );
  });
});

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { caIn, caLook, casOf, nodeOf, whoIs } from "../lib/identity.ts";
import { nodesOf } from "../lib/kube.ts";
import { type Facts, Refusal } from "../lib/step.ts";
import { examine } from "../scripts/remove.ts";
import { A1, B1, B2, box, type NodeSpec, nodes, prepared, shell, TOKEN, temporary } from "./helpers.ts";

const REBOOTED = "88e9fd3e-8477-40e7-aaf5-7b4c1351751a";
const [bootB2 = "", machineB2 = ""] = [box(B2).boot?.trim(), box(B2).machine?.trim()];
const refused = (words: RegExp) => (e: Error) => e instanceof Refusal && words.test(e.message);

describe("the node of a box", () => {
  type Case = [name: string, at: string, says: Facts, nodes: NodeSpec[], found: string | RegExp];
  const cases: Case[] = [
    ["is the one at its address, in its boot", B1.ip, box(B1), [A1, B1, B2], "b1 same"],
    ["also where its host name is another", B1.ip, { ...box(B1), hostname: "b9" }, [A1, B1, B2], "b1 same"],
    ["also by its InternalIP alone", B1.ip, box(B1), [A1, { ...B1, external: "" }], "b1 same"],
    ["is told by the address alone where the box is gone", B1.ip, {}, [A1, B1, B2], "b1 same"],
    ["is none where the cluster knows neither", "192.0.2.9", { boot: REBOOTED }, [A1, B1], "none"],
    [
      "is known by its machine id after its restart, before k3s has said so",
      B1.ip,
      { ...box(B1), boot: REBOOTED, uptime: "20.00" },
      [A1, B1],
      "b1 restarted",
    ],
    [
      "also where k3s is down since",
      B1.ip,
      { ...box(B1), boot: REBOOTED },
      [A1, { ...B1, ready: false }],
      "b1 restarted",
    ],
    [
      "is another's where it goes on in another boot, whatever the machine id: images are copied",
      B1.ip,
      { ...box(B1), boot: REBOOTED },
      [A1, B1],
      /Node b1, at .* is Ready, and is another box/,
    ],
    [
      "is what is left of it where the box was set up anew",
      B1.ip,
      { boot: REBOOTED, machine: "c".repeat(32) },
      [A1, { ...B1, ready: false }],
      "b1 anew",
    ],
    [
      "is not the healthy one of another box, by a slip in the address",
      B2.ip,
      box(B1),
      [A1, B1, B2],
      /its boot id is that of node b1, at 198\.51\.101\.11/,
    ],
    ["nor where its own was forgotten", B2.ip, box(B1), [A1, B2], /Node b2, at .* is another box than this/],
    ["nor one by its boot id alone, at another address", "192.0.2.9", box(B2), [A1, B2], /that of node b2/],
    [
      "is nobody's where two claim the address",
      B2.ip,
      box(B2),
      [A1, { ...B1, external: B2.ip }, B2],
      /Nodes b1 and b2 have one address/,
    ],
    [
      "also where the box is gone, and one claims it inside",
      B2.ip,
      {},
      [{ ...A1, ip: B2.ip, external: "192.0.2.1" }, B2],
      /Nodes a1 and b2 have one address/,
    ],
    [
      "is nobody's where two claim the boot id, by a slip in the address",
      B2.ip,
      box(B1),
      [A1, B1, { ...B2, boot: box(B1).boot?.trim() ?? "" }],
      /that of node b1/,
    ],
    [
      "may share its boot id, as containers of one host do",
      B1.ip,
      { ...box(B1), boot: bootB2 },
      [A1, { ...B1, boot: bootB2 }, B2],
      "b1 same",
    ],
    [
      "does not share a machine id that is not there",
      B1.ip,
      { boot: REBOOTED, machine: "" },
      [A1, { ...B1, machine: "" }],
      /is another box/,
    ],
  ];
  for (const [name, at, says, list, found] of cases)
    test(name, () => {
      const find = () => nodeOf(nodesOf(nodes(...list)), whoIs(at, { uptime: "3600.00", ...says }));
      if (found instanceof RegExp) return assert.throws(find, refused(found));
      const match = find();
      assert.equal(match ? `${match.node.name} ${match.is}` : "none", found);
    });
});

const [OWN, OTHER] = ["ab".repeat(32), "cd".repeat(32)];

test("the CA by which a box is part of a cluster is read from its files, without any secret", () => {
  const root = temporary();
  const text = caLook
    .replaceAll("/var/lib/rancher/k3s", `${root}/k3s`)
    .replaceAll("/etc/systemd/system", `${root}/etc`);
  const look = (files = "") => shell(`${files}fact() { :; }\nset -eu\nd=; ${text}true`, ["sh", "-s"]).stdout;
  assert.equal(look(), "");
  const said = look(`mkdir -p ${root}/etc ${root}/k3s/agent ${root}/k3s/server/tls; cd ${root}
printf x >k3s/agent/server-ca.crt; printf y >k3s/server/tls/server-ca.crt
echo ${TOKEN} >k3s/server/node-token; printf "K3S_URL=x\\nK3S_TOKEN='${TOKEN}'\\n" >etc/k3s-agent.service.env\n`);
  const cas = casOf({ cas: said });
  assert.equal(cas.server.length, 2);
  assert.equal(cas.agent.length, 2);
  assert.ok(cas.server.includes(OWN) && cas.agent.includes(OWN));
  assert.doesNotMatch(said, /0123456789abcdef/);
  assert.equal(caIn(TOKEN), OWN);
  assert.equal(caIn("(the server's)"), undefined);
});

describe("remove takes k3s from", () => {
  const cluster = (...list: NodeSpec[]): Facts => ({ cas: `server ${OWN}\n`, nodes: nodes(A1, ...list) });
  const b1 = (cas = "", over: Facts = {}) => prepared("", { ...box(B1), cas, ...over });
  type Case = [
    name: string,
    facts: Facts,
    cluster: Facts,
    how: { role?: "server"; force?: true; ip?: string },
    refusal?: RegExp,
  ];
  const cases: Case[] = [
    ["an agent of this cluster", b1(`agent ${OWN}\n`), cluster(B1, B2), {}],
    ["a box that was never joined", b1(), cluster(B2), {}],
    ["a box that is to join, and never has", b1(`agent ${OWN}\n`), cluster(B2), {}],
    ["a box whose uninstalling was cut", b1(), cluster({ ...B1, ready: false }), {}],
    [
      "a further server of this cluster",
      b1(`server ${OWN}\nagent ${OWN}\n`),
      cluster(B1),
      { role: "server" },
    ],
    [
      "a box that was set up anew, and whose node is left",
      b1("", { boot: REBOOTED, machine: machineB2 }),
      cluster({ ...B1, ready: false }),
      {},
    ],
    ["the server that was, where told", b1(`server ${OWN}\nagent ${OWN}\n`), cluster(B2), { force: true }],
    [
      "no server that the cluster does not know",
      b1(`server ${OWN}\nagent ${OWN}\n`),
      cluster(B2),
      {},
      /a server's data, with the same CA.*FORCE=1/,
    ],
    [
      "no server of another cluster",
      b1(`server ${OTHER}\nagent ${OTHER}\n`),
      cluster(B2),
      { force: true },
      /a server of another cluster \(CA cdcdcdcdcdcd…, this cluster's abababababab…\)/,
    ],
    [
      "no server of another cluster, though a node of this one claims its address",
      b1(`server ${OTHER}\n`),
      cluster({ ...B1, ready: false }),
      { role: "server" },
      /a server of another cluster/,
    ],
    ["no agent of another cluster", b1(`agent ${OTHER}\n`), cluster(B2), {}, /an agent of another cluster/],
    [
      "no box at another's address",
      b1(`agent ${OWN}\n`),
      cluster(B1, B2),
      { ip: B2.ip },
      /its boot id is that of node b1/,
    ],
    [
      "no box at the address of another that is off, after its own node was deleted",
      b1(`agent ${OWN}\n`),
      cluster({ ...B2, ready: false }),
      { ip: B2.ip },
      /Node b2, at .*, is another box than this one/,
    ],
    [
      "no box whose address a second node claims",
      b1(`agent ${OWN}\n`),
      cluster(B1, { ...B2, external: B1.ip }),
      { force: true },
      /Nodes b1 and b2 have one address/,
    ],
    [
      "no agent where nothing tells of the cluster",
      b1(`agent ${OTHER}\n`),
      { nodes: nodes(A1) },
      {},
      /Nothing tells of which cluster this box is/,
    ],
  ];
  for (const [name, facts, at, { role = "agent", force = false, ip = B1.ip }, refusal] of cases)
    test(name, () => {
      const token = at.cas ? TOKEN : "";
      const decide = () => examine(facts, at, whoIs(ip, facts), token, role, force);
      if (refusal) assert.throws(decide, refused(refusal));
      else decide();
    });
});

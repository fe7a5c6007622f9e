import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { describe, test } from "node:test";
import { identityAs, nodeOf, whoIs } from "../lib/k3s/identity.ts";
import { nodesOf } from "../lib/k3s/nodes.ts";
import { SETTINGS } from "../lib/table.ts";
import { agent } from "../scripts/agent.ts";
import { annotateAs, expected } from "../scripts/annotate.ts";
import {
  A1,
  B1,
  BOOT,
  box,
  type Facts,
  filesAfter,
  healthy,
  MACHINE,
  MODERN,
  NOW,
  type NodeSpec,
  nodes,
  peer,
  prepared,
  service,
  shell,
  temporary,
  unitsOf,
  wanted,
} from "./helpers.ts";

const want = wanted({ K3S_VERSION: MODERN, PUBLIC_IP: "nat", HOST: "nas" });
/** A box at home before its address is in the tunnel, and after. */
const JOINED = { name: "nas", ip: "192.168.0.11", n: 3, external: "", public: "192.168.0.11" };
const NAS = { ...JOINED, ip: "10.42.3.0" };
const OTHER = { ...NAS, name: "nuc", ip: "10.42.4.0", n: 4 };
const said = (over: Facts = {}) => ({ ...box(NAS), ...over });
const verbs = (plan: readonly { why: string }[]) => plan.map(({ why }) => why.replace(/: .*/, ""));

/** The unit's text and environment, as they are written when the cluster has these nodes. */
const written = (...specs: NodeSpec[]) => {
  const facts = prepared(MODERN, said({ nodes: nodes(A1, ...specs) }));
  const { unit, envfile } = filesAfter(agent, want, agent.plan(want, facts));
  return { unit, envfile } as Facts;
};
const running = (files: Facts, ...specs: NodeSpec[]) =>
  healthy(MODERN, files, said({ nodes: nodes(A1, ...specs) }));

describe("a box without a public address", () => {
  test("may be an agent, but not a server, in the settings", () => {
    assert.equal(SETTINGS.AGENTS.check("b1 nas=nat root@10.0.0.4=nat"), undefined);
    assert.equal(SETTINGS.PUBLIC_IP.check("nat"), undefined);
    assert.match(SETTINGS.SERVER.check("a1=nat") ?? "", /only an agent can do without/);
    assert.match(
      SETTINGS.AGENTS.check("nas=192.168.0.9") ?? "",
      /is private, or nat for a box that has no public/,
    );
  });

  test("joins without an address of its own", () => {
    const { unit = "" } = written();
    assert.doesNotMatch(unit, /--node-ip|--node-external-ip|ip addr/);
    assert.match(unit, /--node-name=nas/);
  });

  test("is refused if its LAN is part of the cluster's networks", () => {
    const plan = (card: string, ip: string, SERVER_ARGS = "", bits = 24) =>
      identityAs("agent").plan(
        { ...want, SERVER_ARGS },
        prepared(MODERN, said({ addresses: `1: lo    inet 127.0.0.1/8\n2: ${card}    inet ${ip}/${bits}` })),
      );
    assert.throws(
      () => plan("eth0", "10.42.1.7"),
      /10\.42\.1\.7 \(eth0\), within 10\.42\.0\.0\/16, .* another network/,
    );
    assert.throws(() => plan("eth0", "10.43.1.7"), /within 10\.43\.0\.0\/16/);
    assert.deepEqual(plan("eth0", "10.42.1.7", "--cluster-cidr=10.52.0.0/16"), []);
    for (const [card, ip, bits] of [
      ["cni0", "10.42.3.1"],
      ["flannel-wg", "10.42.3.0", 32],
      ["nodelocaldns", "10.43.0.10", 32],
      ["eth0", "10.44.0.7"],
    ] as [string, string, number?][])
      assert.deepEqual(plan(card, ip, "", bits), []);
  });

  test("gets its address inside the tunnel by one restart, once it has a pod network", () => {
    const facts = running(written(), JOINED);
    assert.deepEqual(verbs(agent.plan(want, facts)), [
      "write /etc/systemd/system/k3s-agent.service",
      "restart k3s-agent and wait until node nas is Ready with its address inside the tunnel",
    ]);
    const { unit = "" } = written(JOINED);
    assert.match(unit, /--node-ip=10\.42\.3\.0 /);
    assert.match(unit, /ip addr replace 10\.42\.3\.0\/32 dev lo label lo:k3s/);
    assert.doesNotMatch(unit, /--node-external-ip/);
  });

  test("is waited for until the cluster has this address, and needs nothing then", () => {
    assert.deepEqual(
      agent.plan(want, running(written(JOINED), JOINED)).map(({ why }) => why),
      ["wait until node nas is healthy: InternalIP of nas is 192.168.0.11, not 10.42.3.0"],
    );
    assert.deepEqual(agent.plan(want, running(written(NAS), NAS)), []);
  });

  test("follows to another pod network when its node was deleted and has joined anew", () => {
    const facts = running(written(NAS), { ...JOINED, n: 7 });
    assert.match(
      agent.plan(want, facts)[0]?.why ?? "",
      /- --node-ip=10\.42\.3\.0, \+ --node-ip=10\.42\.7\.0/,
    );
  });

  test("keeps its address while the API does not answer", () => {
    const facts = { ...running(written(NAS), NAS), nodes: "", api: "20 did not answer in 20 s" };
    assert.deepEqual(verbs(agent.plan(want, facts)), ["wait until node nas is healthy"]);
  });

  test("keeps its address while its node, which has joined anew, has no pod network yet", () => {
    const facts = running(written(NAS), NAS);
    const seen = JSON.parse(nodes(A1, NAS));
    seen.items[1].spec = {};
    assert.deepEqual(verbs(agent.plan(want, { ...facts, nodes: JSON.stringify(seen) })), [
      "wait until node nas is healthy",
    ]);
  });

  test("is refused while its node has a public address, which k3s would keep", () =>
    assert.throws(
      () => agent.plan(want, running(written(NAS), { ...NAS, external: "198.51.100.77" })),
      /has the public address 198\.51\.100\.77, which k3s keeps .* make remove HOST=nas=198\.51\.100\.77 first/,
    ));
});

describe("the node of a box without a public address", () => {
  const list = nodesOf(nodes(A1, B1, NAS, OTHER));
  test("is found by its name and boot ID, and by its name alone if the box is gone", () => {
    assert.equal(nodeOf(list, whoIs("nat", box(NAS)))?.node.name, "nas");
    assert.equal(nodeOf(list, whoIs("nat", {}, { AGENT_ARGS: "", HOST: "root@NUC" }))?.node.name, "nuc");
    assert.equal(nodeOf(list, whoIs("nat", {}, { AGENT_ARGS: "", HOST: "other" })), undefined);
  });

  test("is found by --node-name in the settings if the box has no unit, as after it was reinstalled", () => {
    const settings = { AGENT_ARGS: "--node-name=nuc", HOST: "root@nas" };
    for (const facts of [{}, { hostname: "nas\n" }])
      assert.equal(nodeOf(list, whoIs("nat", facts, settings))?.node.name, "nuc");
    const { boot = "", machine = "" } = box(NAS);
    const joined = { hostname: "new\n", named: "nas\n", boot, machine };
    assert.equal(nodeOf(list, whoIs("nat", joined, settings))?.node.name, "nas");
  });

  test("is not a node with a public address, whose name and boot id a hostile box may say", () => {
    for (const facts of [box(B1), {}])
      assert.throws(
        () => nodeOf(list, whoIs("nat", facts, { AGENT_ARGS: "", HOST: "b1" })),
        /Node b1 has the public address 198\.51\.101\.11, .* make remove HOST=…=198\.51\.101\.11 first/,
      );
  });

  test("is not another box of the same name, or the same box under another name", () => {
    const stranger = { ...box(NAS), boot: BOOT.replace(/.$/, "9"), machine: MACHINE.replace(/.$/, "9") };
    assert.throws(
      () => nodeOf(list, whoIs("nat", stranger)),
      /Node nas, named nas, is Ready, and is another box/,
    );
    const renamed = { ...box(NAS), hostname: "new\n" };
    assert.throws(() => nodeOf(list, whoIs("nat", renamed)), /boot id is that of node nas/);
  });

  test("is found by the name in its unit if its host name has changed", () =>
    assert.equal(
      nodeOf(list, whoIs("nat", { ...box(NAS), hostname: "new\n", named: "nas\n" }))?.node.name,
      "nas",
    ));
});

describe("handshakes with boxes without a public address", () => {
  const list = nodesOf(nodes(A1, B1, NAS, OTHER));
  const names = (of: string) => expected(list, of, of === "nas").map(({ name }) => name);

  test("are expected of every node with a public address, and not among themselves", () => {
    assert.deepEqual(names("a1"), ["b1", "nas", "nuc"]);
    assert.deepEqual(names("b1"), ["a1", "nas", "nuc"]);
    assert.deepEqual(names("nas"), ["a1", "b1"]);
  });

  test("count wherever they come from, also from the address of another node", () => {
    const step = annotateAs("server");
    const plan = (...lines: string[]) =>
      step.plan(
        wanted({ K3S_VERSION: MODERN }),
        healthy(MODERN, {}, { nodes: nodes(A1, B1, NAS), peers: lines.join("\n") }),
      );
    const b1 = peer(MODERN, B1, B1.ip, 30);
    for (const endpoint of ["203.0.113.13", "100.64.0.9", "192.168.0.7", B1.ip])
      assert.deepEqual(plan(b1, peer(MODERN, NAS, endpoint, 30)), [], endpoint);
    assert.match(plan(b1, peer(MODERN, NAS, "203.0.113.13", 300))[0]?.why ?? "", /fresh handshake with nas/);
  });
});

describe("the unit that keeps a box without a public address reachable", () => {
  const step = annotateAs("agent");
  const facts = (over: Facts = {}) =>
    healthy(
      MODERN,
      {},
      said({
        processes: unitsOf(undefined, service(NOW - 1800)),
        nodes: nodes(A1, B1, NAS),
        peers: [peer(MODERN, A1, A1.ip, 30), peer(MODERN, B1, B1.ip, 30)].join("\n"),
        ...over,
      }),
    );
  const [change] = step.plan(want, facts());
  test("is written and started once, and again when it does not run", () => {
    assert.match(change?.why ?? "", /write \/etc\/systemd\/system\/k3s-keepalive\.service and start it/);
    const folder = temporary();
    shell(
      (change?.sh ?? "")
        .replaceAll("/etc/systemd/system", `${folder}/units`)
        .replaceAll("/usr/local/bin", `${folder}/bin`)
        .replace(/\nsystemctl[\s\S]*/, ""),
    );
    const [program, unit] = ["bin/k3s-keepalive", "units/k3s-keepalive.service"].map((name) =>
      readFileSync(`${folder}/${name}`, "utf8")
        .replaceAll(`${folder}/units`, "/etc/systemd/system")
        .replaceAll(`${folder}/bin`, "/usr/local/bin"),
    );
    const had = (state: string) => ({ keepalive: `${program}${unit}${state}\n` });
    assert.match(`${unit}`, /^\[Service\]$/m);
    assert.deepEqual(step.plan(want, facts(had("active"))), []);
    assert.equal(step.plan(want, facts(had("failed"))).length, 1);
  });

  test("does not wait for the start of k3s, which may take for ever", () =>
    assert.doesNotMatch(change?.sh ?? "", /After=/));

  test("is not written over one of that name that somebody else has written, which stays", () => {
    const keepalive = "[Service]\nExecStart=/usr/local/bin/mine\nactive\n";
    assert.throws(() => step.plan(want, facts({ keepalive })), /was not written by this project/);
    const there = { ...NAS, ip: "198.51.100.77", external: "198.51.100.77", public: "198.51.100.77" };
    assert.deepEqual(
      step.plan(
        wanted({ K3S_VERSION: MODERN, PUBLIC_IP: "198.51.100.77" }),
        facts({ keepalive, nodes: nodes(A1, B1, there) }),
      ),
      [],
    );
  });

  test("is removed when the box has a public address", () => {
    const plan = step.plan(
      wanted({ K3S_VERSION: MODERN, PUBLIC_IP: "198.51.100.77" }),
      facts({
        keepalive: "# Written by k3s-across-clouds.\nx\nactive\n",
        nodes: nodes(A1, B1, {
          ...NAS,
          ip: "198.51.100.77",
          external: "198.51.100.77",
          public: "198.51.100.77",
        }),
      }),
    );
    assert.deepEqual(verbs(plan), ["remove /etc/systemd/system/k3s-keepalive.service"]);
  });
});

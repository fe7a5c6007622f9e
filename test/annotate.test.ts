import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { nodesOf, peersOf, standing } from "../lib/k3s/nodes.ts";
import { type Change, Refusal, type Step } from "../lib/step.ts";
import { annotate, annotateAs, expected } from "../scripts/annotate.ts";
import {
  A1,
  B1,
  B2,
  type Facts,
  healthy,
  IP,
  MODERN,
  NOW,
  nodes,
  OLD,
  peer,
  programs,
  service,
  shell,
  temporary,
  unitsOf,
  wanted,
} from "./helpers.ts";

const verbs = (changes: Change[]) => changes.map(({ why }) => why.split(" ").slice(0, 2).join(" "));
const facts = (version: string, over: Facts = {}) => healthy(version, {}, over);
const want = (version: string) => wanted({ K3S_VERSION: version });
const peers = (...lines: string[]) => ({ peers: lines.join("\n") });

for (const version of [OLD, MODERN]) {
  const plan = (over: Facts = {}, step: Step = annotate) => step.plan(want(version), facts(version, over));
  const good = peer(version, B1, B1.ip, 30);

  describe(`the peers of ${version}`, () => {
    test("need no change if each has a recent handshake at its public address", () => {
      assert.deepEqual(plan(), []);
      for (const role of ["server", "agent"] as const) assert.deepEqual(plan({}, annotateAs(role)), []);
    });

    const late: [name: string, over: Facts][] = [
      ["has its private address as endpoint", peers(good, peer(version, B2, "192.168.0.12", 30))],
      ["had its last handshake too long ago", peers(good, peer(version, B2, B2.ip, 400))],
      ["never had a handshake", peers(good, peer(version, B2))],
      ["is missing", peers(good)],
      [
        "is only left over from an earlier start, without allowed IPs",
        peers(good, peer(version, B2, B2.ip, 30, "(none)")),
      ],
      [
        "is on the other generation's interface",
        peers(good, peer(version === OLD ? MODERN : OLD, B2, B2.ip, 30)),
      ],
      ["has another node's pod network", peers(good, peer(version, B2, B2.ip, 30, "10.42.9.0/24"))],
      ["has another node's address as endpoint", peers(good, peer(version, B2, B1.ip, 30))],
    ];
    for (const [name, over] of late)
      test(`are waited for if one of them ${name}, and that one is named`, () => {
        const changes = plan(over);
        assert.deepEqual(verbs(changes), ["wait for"]);
        assert.match(changes[0]?.why ?? "", /handshake with b2 at/);
        assert.match(changes[0]?.sh ?? "", /^b2 10\.42\.2\.0\/24 198\.51\.101\.12 198\.51\.100\.11 /m);
        assert.doesNotMatch(changes[0]?.sh ?? "", /^b1 /m);
      });

    test("are identified by their allowed IPs, so peers left over from an earlier start are ignored", () => {
      const old = peer(version, B2, "192.168.0.12", undefined, "(none)");
      assert.deepEqual(plan(peers(old, good, peer(version, B2, B2.ip, 30), old)), []);
    });

    const others: [
      name: string,
      spec: Partial<typeof B2 & { ready: boolean; public: string; external: string }>,
    ][] = [
      ["is down", { ready: false }],
      ["still has its private address in flannel", { public: "192.168.0.12" }],
      ["has no public address yet", { external: "" }],
      ["has no annotations of flannel yet", { public: "" }],
    ];
    for (const [name, spec] of others)
      test(`are not waited for if their node ${name}, which only a run for that node can fix`, () => {
        assert.deepEqual(plan({ nodes: nodes(A1, B1, { ...B2, ...spec }), ...peers(good) }), []);
      });

    test("are not waited for in a cluster of one node", () => {
      assert.deepEqual(plan({ nodes: nodes(A1), peers: "" }), []);
    });

    test("are examined for whichever of k3s and k3s-agent runs, and it is an error if neither does", () => {
      assert.deepEqual(plan({ processes: unitsOf(undefined, service(NOW - 600)) }), []);
      assert.throws(() => plan({ processes: unitsOf().replaceAll("inactive", "failed") }), Refusal);
      assert.throws(() => plan({ processes: "" }), /Neither k3s nor k3s-agent runs/);
    });

    const made = version === OLD ? ["wait for"] : [];
    test(`${made.length ? "must" : "need not"} have had a handshake since k3s's last start`, () => {
      assert.deepEqual(verbs(plan({ processes: unitsOf(service(NOW - 10)) })), made);
      assert.deepEqual(verbs(plan({ processes: unitsOf(undefined, service(NOW - 10)) })), made);
    });

    test("are an error if the cluster has no node for this box", () => {
      assert.throws(() => plan({ nodes: nodes(B1) }), /no node a1/);
    });
  });
}

describe("an old k3s gets its public address as an annotation", () => {
  const plan = (over: Facts, step: Step = annotate) => step.plan(want(OLD), facts(OLD, over));
  const cases: [name: string, spec: object][] = [
    ["if flannel chose the private address", { public: "192.168.0.11", overwrite: "" }],
    ["if another address is annotated", { overwrite: "198.51.100.99", public: "198.51.100.99" }],
    ["if the annotation that preserves its address is missing", { public: IP, overwrite: "" }],
  ];
  for (const [name, spec] of cases)
    test(`${name}, and is restarted once`, () => {
      const changes = plan({ nodes: nodes({ ...A1, ...spec }, B1, B2) });
      assert.deepEqual(verbs(changes).slice(0, 2), ["annotate node", "restart k3s"]);
      assert.match(
        changes[0]?.sh ?? "",
        /annotate --overwrite node a1 flannel\.alpha\.coreos\.com\/public-ip-overwrite=198\.51\.100\.11/,
      );
    });

  test("once: if it was annotated but not restarted it is restarted, and waited for until flannel has the address", () => {
    const changes = plan({ nodes: nodes({ ...A1, public: "192.168.0.11", overwrite: IP }, B1, B2) });
    assert.deepEqual(verbs(changes).slice(0, 2), ["restart k3s", "wait until"]);
    assert.match(changes[1]?.why ?? "", /flannel's public-ip of a1 is 198\.51\.100\.11$/);
  });

  test("on an agent too, where k3s-agent is restarted", () => {
    const changes = plan({ nodes: nodes({ ...A1, overwrite: "" }, B1, B2) }, annotateAs("agent"));
    assert.match(changes[1]?.why ?? "", /^restart k3s-agent /);
  });

  test("if an old release runs, whatever K3S_VERSION is, when the script runs alone", () => {
    const over = facts(OLD, { nodes: nodes({ ...A1, overwrite: "" }, B1, B2) });
    assert.deepEqual(verbs(annotate.plan(want(MODERN), over)).slice(0, 1), ["annotate node"]);
  });
});

test("a modern k3s is never annotated or restarted, because it would undo the annotation", () => {
  for (const spec of [
    { public: "192.168.0.11", overwrite: "" },
    { overwrite: "" },
    { public: "192.168.0.11" },
  ]) {
    let changes: Change[] = [];
    try {
      changes = annotate.plan(want(MODERN), facts(MODERN, { nodes: nodes({ ...A1, ...spec }, B1, B2) }));
    } catch (error) {
      assert.ok(error instanceof Refusal);
    }
    for (const { sh } of changes) assert.doesNotMatch(sh, /annotate|systemctl restart/);
  }
});

test("the wait for the right address names the flag that is missing on the server", () => {
  const over = facts(MODERN, { nodes: nodes({ ...A1, public: "192.168.0.11" }, B1, B2) });
  assert.match(JSON.stringify(annotate.plan(want(MODERN), over)), /--flannel-external-ip/);
});

describe("the plan, the wait and check agree that a peer", () => {
  const cases: [name: string, line: string, fresh: boolean, wrong: RegExp | undefined, note?: RegExp][] = [
    ["is reached at its own address", peer(MODERN, B2, B2.ip, 30), true, undefined],
    ["is not reached if its handshake is too old", peer(MODERN, B2, B2.ip, 400), false, undefined],
    [
      "is not reached if an old handshake came from another public address",
      peer(MODERN, B2, "203.0.113.9", 400),
      false,
      undefined,
    ],
    ["is not reached if it never had a handshake", peer(MODERN, B2), false, undefined],
    [
      "is not reached if it has another node's pod network",
      peer(MODERN, B2, B2.ip, 30, "10.42.9.0/24"),
      false,
      undefined,
    ],
    [
      "is reached at another public address, from which its NAT still sends old flows",
      peer(MODERN, B2, "203.0.113.9", 30),
      true,
      undefined,
      /^203\.0\.113\.9:51820, not from 198\.51\.101\.12; the handshake is fresh$/,
    ],
    [
      "is reached at another port of its NAT",
      peer(MODERN, B2, B2.ip, 30).replace(":51820", ":40017"),
      true,
      undefined,
    ],
    [
      "has a wrong endpoint if that is a private address",
      peer(MODERN, B2, "192.168.0.12", 30),
      true,
      /no public address/,
    ],
    [
      "has a wrong endpoint if that is an address of RFC 6598",
      peer(MODERN, B2, "100.64.3.4", 30),
      true,
      /no public address/,
    ],
    [
      "has a wrong endpoint if that is a loopback address",
      peer(MODERN, B2, "127.0.0.1", 30),
      true,
      /no public address/,
    ],
    [
      "has a wrong endpoint if that is another node's address",
      peer(MODERN, B2, B1.ip, 30),
      true,
      /the address of b1$/,
    ],
    [
      "has a wrong endpoint if that is this node's own address",
      peer(MODERN, B2, IP, 30),
      true,
      /the address of a1$/,
    ],
  ];
  const list = nodesOf(nodes(A1, B1, B2));
  const [, , b2] = list;
  const waits = annotate.plan(
    want(MODERN),
    facts(MODERN, peers(peer(MODERN, B1, B1.ip, 30), peer(MODERN, B2, B2.ip, 400))),
  )[0]?.sh as string;
  for (const [name, line, fresh, wrong, note] of cases)
    test(name, () => {
      const peer = peersOf(line).find(({ allowedIps }) => allowedIps.includes("10.42.2.0/24"));
      const said = standing(peer, b2 as NonNullable<typeof b2>, list, NOW - 180);
      assert.equal(said.fresh, fresh);
      assert.equal(Boolean(said.wrong), Boolean(wrong));
      if (wrong) assert.match(said.wrong ?? "", wrong);
      if (note) assert.match(said.note ?? "", note);
      else assert.equal(said.note, undefined);
      // The shell code that waits, with this machine's awk and a wg that prints the same; it looks only once.
      const dump = `priv\tpub\t51820\toff\n${line.split("\t").slice(1).join("\t")}`;
      const PATH = programs(temporary(), {
        wg: `cat <<'EOF'\n${dump}\nEOF`,
        date: `echo ${NOW}`,
        sleep: "exit 9",
      });
      const { status } = shell(`set -eu\n${waits}`, ["sh", "-s"], { PATH });
      assert.equal(status === 0, fresh && !wrong, `exit status ${status}`);
    });
});

test("annotate reports an API that did not answer, instead of a missing node", () => {
  const over = { nodes: "", api: "20 did not answer in 20 s" };
  assert.throws(() => annotate.plan(want(MODERN), facts(MODERN, over)), /the API did not answer in 20 s/);
});

test("a node must have as peers all other nodes that are Ready with their public address", () => {
  const list = nodesOf(nodes(A1, B1, { ...B2, ready: false }));
  assert.deepEqual(
    expected(list, "a1", false).map((p) => p.name),
    ["b1"],
  );
  assert.deepEqual(
    expected(list, "b1", false).map((p) => p.name),
    ["a1"],
  );
});

test("nodes that join at the same time each wait for those that joined before them, and later for all others", () => {
  const at = (name: string, created: number) => ({
    ...nodesOf(nodes(A1, B1, B2)).find((n) => n.name === name)!,
    created,
  });
  const list = [at("a1", NOW - 90), at("b1", NOW - 3), at("b2", NOW - 3)];
  const waits = (name: string, now: number) => expected(list, name, false, now).map((p) => p.name);
  assert.deepEqual(waits("b1", NOW), ["a1"]);
  assert.deepEqual(waits("b2", NOW), ["a1", "b1"]);
  assert.deepEqual(waits("a1", NOW), []);
  for (const [name, others] of [
    ["a1", ["b1", "b2"]],
    ["b1", ["a1", "b2"]],
    ["b2", ["a1", "b1"]],
  ] as const)
    assert.deepEqual(waits(name, NOW + 60), [...others]);
});

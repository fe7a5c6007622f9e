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
    test("are left alone when each has a fresh handshake at its public address", () => {
      assert.deepEqual(plan(), []);
      for (const role of ["server", "agent"] as const) assert.deepEqual(plan({}, annotateAs(role)), []);
    });

    const late: [name: string, over: Facts][] = [
      ["is at its private address", peers(good, peer(version, B2, "192.168.0.12", 30))],
      ["has a handshake of long ago", peers(good, peer(version, B2, B2.ip, 400))],
      ["never had a handshake", peers(good, peer(version, B2))],
      ["is not there", peers(good)],
      [
        "is only what an earlier start left, without allowed ips",
        peers(good, peer(version, B2, B2.ip, 30, "(none)")),
      ],
      [
        "is on the other generation's interface",
        peers(good, peer(version === OLD ? MODERN : OLD, B2, B2.ip, 30)),
      ],
      ["has another node's pods", peers(good, peer(version, B2, B2.ip, 30, "10.42.9.0/24"))],
      ["is at another node's address", peers(good, peer(version, B2, B1.ip, 30))],
    ];
    for (const [name, over] of late)
      test(`are waited for when one ${name}, and that one is named`, () => {
        const changes = plan(over);
        assert.deepEqual(verbs(changes), ["wait for"]);
        assert.match(changes[0]?.why ?? "", /handshake with b2 at/);
        assert.match(changes[0]?.sh ?? "", /^b2 10\.42\.2\.0\/24 198\.51\.101\.12 198\.51\.100\.11 /m);
        assert.doesNotMatch(changes[0]?.sh ?? "", /^b1 /m);
      });

    test("count by their allowed ips: what an earlier start left beside the good one does no harm", () => {
      const old = peer(version, B2, "192.168.0.12", undefined, "(none)");
      assert.deepEqual(plan(peers(old, good, peer(version, B2, B2.ip, 30), old)), []);
    });

    const others: [
      name: string,
      spec: Partial<typeof B2 & { ready: boolean; public: string; external: string }>,
    ][] = [
      ["is down", { ready: false }],
      ["has not done its part: flannel has its private address", { public: "192.168.0.12" }],
      ["has no public address yet", { external: "" }],
      ["has nothing of flannel's yet", { public: "" }],
    ];
    for (const [name, spec] of others)
      test(`are not waited for where their node ${name}: that is its own call's to mend`, () => {
        assert.deepEqual(plan({ nodes: nodes(A1, B1, { ...B2, ...spec }), ...peers(good) }), []);
      });

    test("are none on a cluster of one", () => {
      assert.deepEqual(plan({ nodes: nodes(A1), peers: "" }), []);
    });

    test("are looked at by the role that runs", () => {
      assert.deepEqual(plan({ processes: unitsOf(undefined, service(NOW - 600)) }), []);
      assert.throws(() => plan({ processes: unitsOf().replaceAll("inactive", "failed") }), Refusal);
      assert.throws(() => plan({ processes: "" }), /Neither k3s nor k3s-agent runs/);
    });

    const made = version === OLD ? ["wait for"] : [];
    test(`count ${made.length ? "not at all" : "too"} where their handshakes are from before k3s's last start`, () => {
      assert.deepEqual(verbs(plan({ processes: unitsOf(service(NOW - 10)) })), made);
      assert.deepEqual(verbs(plan({ processes: unitsOf(undefined, service(NOW - 10)) })), made);
    });

    test("are nobody's where the cluster has no such node; within make server it may be on its way", () => {
      assert.throws(() => plan({ nodes: nodes(B1) }), /no node a1/);
    });
  });
}

describe("an old k3s is told its public address", () => {
  const plan = (over: Facts, step: Step = annotate) => step.plan(want(OLD), facts(OLD, over));
  const cases: [name: string, spec: object][] = [
    ["where flannel took the private one", { public: "192.168.0.11", overwrite: "" }],
    ["where another address was annotated", { overwrite: "198.51.100.99", public: "198.51.100.99" }],
    ["where it was annotated and not restarted", { public: "192.168.0.11", overwrite: IP }],
    ["where an annotation is missing that would keep it", { public: IP, overwrite: "" }],
  ];
  for (const [name, spec] of cases)
    test(`${name}, and restarted once`, () => {
      const changes = plan({ nodes: nodes({ ...A1, ...spec }, B1, B2) });
      assert.deepEqual(verbs(changes).slice(0, 2), ["annotate node", "restart k3s"]);
      assert.match(
        changes[0]?.sh ?? "",
        /annotate --overwrite node a1 flannel\.alpha\.coreos\.com\/public-ip-overwrite=198\.51\.100\.11/,
      );
    });

  test("by an agent in the same way, of its own unit", () => {
    const changes = plan({ nodes: nodes({ ...A1, overwrite: "" }, B1, B2) }, annotateAs("agent"));
    assert.match(changes[1]?.why ?? "", /^restart k3s-agent /);
  });

  test("by the generation that runs, not by the one that K3S_VERSION names, when the script runs alone", () => {
    const over = facts(OLD, { nodes: nodes({ ...A1, overwrite: "" }, B1, B2) });
    assert.deepEqual(verbs(annotate.plan(want(MODERN), over)).slice(0, 1), ["annotate node"]);
  });
});

test("a modern k3s is never annotated nor restarted: it would undo the annotation", () => {
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

test("the wait for a wrong address says which flag the server lacks", () => {
  const over = facts(MODERN, { nodes: nodes({ ...A1, public: "192.168.0.11" }, B1, B2) });
  assert.match(JSON.stringify(annotate.plan(want(MODERN), over)), /--flannel-external-ip/);
});

describe("a peer's handshake, as the plan, the wait and check judge it,", () => {
  const cases: [name: string, line: string, fresh: boolean, wrong: RegExp | undefined, note?: RegExp][] = [
    ["proves it at its own address", peer(MODERN, B2, B2.ip, 30), true, undefined],
    ["is too old", peer(MODERN, B2, B2.ip, 400), false, undefined],
    ["is too old elsewhere too", peer(MODERN, B2, "203.0.113.9", 400), false, undefined],
    ["was never made", peer(MODERN, B2), false, undefined],
    ["is another network's", peer(MODERN, B2, B2.ip, 30, "10.42.9.0/24"), false, undefined],
    [
      "proves it from another public address: its NAT still sends old flows from there",
      peer(MODERN, B2, "203.0.113.9", 30),
      true,
      undefined,
      /^203\.0\.113\.9:51820, not from 198\.51\.101\.12; the handshake is fresh$/,
    ],
    [
      "proves it from another port of its NAT",
      peer(MODERN, B2, B2.ip, 30).replace(":51820", ":40017"),
      true,
      undefined,
    ],
    ["is wrong at a private address", peer(MODERN, B2, "192.168.0.12", 30), true, /no public address/],
    ["is wrong at an address of RFC 6598", peer(MODERN, B2, "100.64.3.4", 30), true, /no public address/],
    ["is wrong on loopback", peer(MODERN, B2, "127.0.0.1", 30), true, /no public address/],
    ["is wrong at another node's address", peer(MODERN, B2, B1.ip, 30), true, /the address of b1$/],
    ["is wrong at this node's own address", peer(MODERN, B2, IP, 30), true, /the address of a1$/],
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
      // The shell that waits, with this machine's awk and a wg that says the same; its patience is one look.
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

test("an API that did not answer is not a node that is missing, here too", () => {
  const over = { nodes: "", api: "20 did not answer in 20 s" };
  assert.throws(() => annotate.plan(want(MODERN), facts(MODERN, over)), /the API did not answer in 20 s/);
});

test("the peers that a node must have are all others that are Ready at their public address", () => {
  const list = nodesOf(nodes(A1, B1, { ...B2, ready: false }));
  assert.deepEqual(
    expected(list, "a1").map((p) => p.name),
    ["b1"],
  );
  assert.deepEqual(
    expected(list, "b1").map((p) => p.name),
    ["a1"],
  );
});

test("of nodes that join side by side each waits for those that came before it, and later for all", () => {
  const at = (name: string, created: number) => ({
    ...nodesOf(nodes(A1, B1, B2)).find((n) => n.name === name)!,
    created,
  });
  const list = [at("a1", NOW - 90), at("b1", NOW - 3), at("b2", NOW - 3)];
  const waits = (name: string, now: number) => expected(list, name, now).map((p) => p.name);
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

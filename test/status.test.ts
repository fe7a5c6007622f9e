import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { clusterOf } from "../lib/check/survey.ts";
import { statusOf } from "../scripts/cluster/status.ts";
import { A1, B1, B2, type Facts, figures, MODERN, member, type NodeSpec, nodes } from "./helpers.ts";

const PODS = "coredns-1 1/1 Running\nhelm-1 0/1 Completed\nmetrics-1 1/1 Running";

const status = (facts: Facts = {}, pods = PODS, tried?: Facts) =>
  statusOf(clusterOf([member(MODERN, A1, facts, tried)]), pods);
const list = (...specs: NodeSpec[]) => ({ nodes: nodes(...specs) });

describe("status", () => {
  test("prints ten lines, none of which reports a problem in a healthy cluster", () => {
    const rows = status();
    assert.equal(rows.length, 10);
    assert.deepEqual(
      rows.filter(([, , well]) => !well),
      [],
    );
    const texts = Object.fromEntries(rows);
    assert.equal(texts.nodes, "3, all Ready");
    assert.equal(texts.WireGuard, "2 of 2 peers of a1 are fresh, the oldest handshake 31 s ago");
    assert.equal(texts.pods, "3, all healthy");
    assert.equal(texts.server, "k3s active, up 0 h 30 min, 0 restarts");
    assert.match(texts.verdict ?? "", /nothing is wrong as the server sees it/);
  });

  const cases: [name: string, rows: ReturnType<typeof status>, what: string, text: RegExp][] = [
    [
      "a node that is not Ready",
      status(list(A1, { ...B1, ready: false }, B2)),
      "nodes",
      /1 of 3 not Ready: b1/,
    ],
    [
      "a node with a private address",
      status(list(A1, B1, { ...B2, public: "192.168.0.12" })),
      "addresses",
      /wrong address of b2/,
    ],
    [
      "peers that are missing",
      status({ peers: "" }),
      "WireGuard",
      /0 of 2 peers of a1 are fresh, not: b1, b2/,
    ],
    [
      "a node that is missing in the metrics",
      status({}, PODS, { top: figures("a1") }),
      "metrics",
      /kubectl top has 1 of 3 nodes/,
    ],
    ["an API that does not answer", status({ nodes: "" }, ""), "k3s", /the API does not answer/],
    [
      "a unit that does not run",
      status({ units: "Id=k3s.service\nActiveState=failed\nMainPID=0" }),
      "server",
      /k3s failed, not running/,
    ],
  ];
  for (const [name, rows, what, text] of cases)
    test(`reports ${name}, in ten lines`, () => {
      assert.equal(rows.length, 10);
      const row = rows.find(([is]) => is === what);
      assert.match(row?.[1] ?? "", text);
      assert.equal(row?.[2], false);
      assert.deepEqual(rows.at(-1), ["verdict", "something is wrong: make check names the cause", false]);
      assert.doesNotMatch(JSON.stringify(rows), /undefined|NaN|Infinity/);
    });

  test("reports the nodes as not known if the API does not answer", () => {
    const rows = status({ nodes: "" }, "");
    assert.deepEqual(
      rows.slice(2, 7).map(([, text]) => text),
      Array(5).fill("not known"),
    );
  });

  test("lists pods that are not healthy, without treating them as a fault of the cluster", () => {
    for (const [pod, text] of [
      ["w-1 0/1 ImagePullBackOff", "1 of 4 not healthy: w-1 ImagePullBackOff"],
      ["w-1 1/2 Running", "1 of 4 not healthy: w-1 Running"],
    ]) {
      const rows = status({}, `${PODS}\n${pod}`);
      assert.deepEqual(
        rows.find(([what]) => what === "pods"),
        ["pods", text, true],
      );
    }
  });
});

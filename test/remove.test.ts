import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { drain, uncordon } from "../lib/drain.ts";
import { type Node, nodesOf } from "../lib/k3s.ts";
import { type Facts, Refusal } from "../lib/step.ts";
import { atServer, uninstall } from "../scripts/remove.ts";
import { A1, B1, B2, MODERN, node, nodes, OLD, wanted } from "./helpers.ts";

const whys = (changes: readonly { why: string }[]) => changes.map(({ why }) => why);
const want = wanted();

describe("what goes from a box", () => {
  test("nothing is left: nothing to do", () => assert.deepEqual(uninstall.plan(want, { left: "\n" }), []));

  test("what runs is stopped before its files go, and the units go last", () => {
    const changes = uninstall.plan(want, {
      left: "/etc/systemd/system/k3s-agent.service\n/usr/local/bin/k3s\nflannel-wg\n",
      running: "k3s-agent\n",
      volumes: "pvc-1\npvc-2\n",
    });
    assert.deepEqual(whys(changes), [
      "stop k3s-agent, and clear pods, mounts, interfaces and rules of k3s",
      "remove k3s's units, binary and data, with 2 local volumes of pods",
    ]);
    const files = changes[1]?.sh ?? "";
    assert.ok(files.indexOf("rm -rf") < files.indexOf("rm -f /etc/systemd/system/k3s.service"));
  });

  test("an interface alone is cleared too, as after a run that was cut", () =>
    assert.match(whys(uninstall.plan(want, { left: "flannel.1\n" }))[0] ?? "", /^clear pods, mounts/));
});

/** Nodes as the API gives them, with what is added to the first one of these names. */
const cluster = (more: Record<string, { spec?: object; annotations?: object }> = {}): string =>
  JSON.stringify({
    kind: "List",
    items: [A1, B1, B2].map((of) => {
      const made = node(of);
      return {
        ...made,
        metadata: {
          ...made.metadata,
          annotations: { ...made.metadata.annotations, ...more[of.name]?.annotations },
        },
        spec: { ...made.spec, ...more[of.name]?.spec },
      };
    }),
  });
const named = (json: string, name: string) => nodesOf(json).find((n) => n.name === name) as Node;

describe("a node is drained", () => {
  const cases: {
    name: string;
    nodes?: string;
    version?: string;
    force?: true;
    has?: RegExp;
    not?: RegExp;
  }[] = [
    { name: "with kubectl's flags of today", has: / --delete-emptydir-data --timeout=300s /, not: /--force/ },
    { name: "with those of v1.17", version: OLD, has: / --delete-local-data / },
    { name: "with pods that no controller starts anew, where told", force: true, has: / --force / },
    {
      name: "and takes pods again when something blocks it",
      has: /uncordon b1\n.*kc annotate node b1 .*-\n {2}exit 1/,
    },
    {
      name: "again, where a run was cut in the middle",
      nodes: cluster({
        b1: { spec: { unschedulable: true }, annotations: { "k3s-across-clouds/drained": "begun" } },
      }),
      has: /drained=yes$/,
    },
  ];
  for (const { name, nodes: json = cluster(), version = MODERN, force = false, has, not } of cases)
    test(name, () => {
      const [change] = drain(named(json, "b1"), { nodes: json, version: `${version}\n` }, force);
      if (has) assert.match(change?.sh ?? "", has);
      if (not) assert.doesNotMatch(change?.sh ?? "", not);
    });

  const none: [string, string][] = [
    ["is not Ready: nobody there would end a pod", nodes(A1, { ...B1, ready: false }, B2)],
    ["is the only one that takes pods", nodes({ ...A1, ready: false }, B1)],
    ["is cordoned by somebody else: it is theirs", cluster({ b1: { spec: { unschedulable: true } } })],
    ["is drained already", cluster({ b1: { annotations: { "k3s-across-clouds/drained": "yes" } } })],
  ];
  for (const [name, json] of none)
    test(`not, where it ${name}`, () =>
      assert.deepEqual(drain(named(json, "b1"), { nodes: json, version: MODERN }, false), []));

  test("and afterwards takes pods again, if it was drained here", () => {
    const as = (mark?: string) =>
      named(cluster({ b1: { annotations: mark ? { "k3s-across-clouds/drained": mark } : {} } }), "b1");
    assert.deepEqual(uncordon(as()), []);
    assert.match(uncordon(as("begun"))[0]?.sh ?? "", /kc uncordon b1\nkc annotate/);
  });
});

describe("the cluster forgets", () => {
  const facts: Facts = { nodes: nodes(A1, B1, B2), version: MODERN };
  const forgets = (ip: string, own: string | undefined, over: Facts = {}) =>
    whys(atServer(ip, own, false).forgotten.plan(want, { ...facts, ...over }));

  test("the node at the box's address, and its password: a secret", () =>
    assert.deepEqual(forgets(B1.ip, "b1", { secrets: "a1\nb1\nb2\n" }), [
      "delete node b1",
      "delete the password secret of b1",
    ]));
  test("or a line of a file", () =>
    assert.deepEqual(forgets(B1.ip, "b1", { passwords: "a1\nb1\nb2\n" }), [
      "delete node b1",
      "delete the password of b1",
    ]));
  test("a box that does not answer any more", () =>
    assert.deepEqual(forgets(B1.ip, undefined), ["delete node b1"]));
  test("the password of a node that is gone: who comes by its name would be rejected", () =>
    assert.deepEqual(forgets("198.51.101.99", "b9", { passwords: "a1\nb9\n" }), [
      "delete the password of b9",
    ]));
  test("never another box's node that has the same name", () =>
    assert.deepEqual(forgets("198.51.101.99", "b2", { secrets: "b2\n", passwords: "b2\n" }), []));
  test("nothing, where the API does not answer", () =>
    assert.throws(() => forgets(B1.ip, "b1", { nodes: "" }), Refusal));
});

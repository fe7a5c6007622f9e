import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { labelsPlan } from "../lib/node.ts";
import type { Settings } from "../lib/settings.ts";
import type { Facts } from "../lib/step.ts";
import { agent } from "../scripts/agent.ts";
import { server } from "../scripts/server.ts";
import { A1, B1, filesAfter, healthy, MODERN, nodes, OLD, prepared, wanted } from "./helpers.ts";

const verbs = (step: typeof server, want: Settings, facts: Facts) =>
  step.plan(want, facts).map(({ why }) => why.replace(/: [-+].*| and wait.*/, ""));
const taint = (key: string, value = "", effect = "NoSchedule") => ({
  key,
  ...(value ? { value } : {}),
  effect,
});

describe("labels and taints", () => {
  const unit = (...args: string[]) => `ExecStart=k3s server \\\n    ${args.join(" \\\n    ")}\n`;
  const cases: [
    name: string,
    old: string[],
    args: string[],
    node: Partial<typeof A1 & { labels: Record<string, string>; taints: object[] }>,
    whys: string[],
  ][] = [
    ["nothing where none are wanted and none were", [], [], { labels: { a: "b" }, taints: [taint("x")] }, []],
    ["a new label is k3s's to set", [], ["--node-label=a=b"], {}, []],
    [
      "a changed label is k3s's to set",
      ["--node-label=a=b"],
      ["--node-label=a=c"],
      { labels: { a: "b" } },
      [],
    ],
    [
      "a label that goes is taken away",
      ["--node-label=a=b"],
      [],
      { labels: { a: "b" } },
      ["label node a1: a-"],
    ],
    ["a label that is gone already is left so", ["--node-label=a=b"], [], {}, []],
    [
      "another's label stays",
      ["--node-label=a=b"],
      [],
      { labels: { a: "b", c: "d" } },
      ["label node a1: a-"],
    ],
    [
      "a taint that is new is set",
      [],
      ["--node-taint=x=y:NoSchedule"],
      {},
      ["taint node a1: x=y:NoSchedule"],
    ],
    ["a taint that is there is left", [], ["--node-taint=x=:NoSchedule"], { taints: [taint("x")] }, []],
    [
      "a taint that goes is taken away",
      ["--node-taint=x=y:NoExecute"],
      [],
      { taints: [taint("x", "y", "NoExecute")] },
      ["taint node a1: x:NoExecute-"],
    ],
    [
      "a taint's new value is set, with nothing taken away",
      ["--node-taint=x=y:NoSchedule"],
      ["--node-taint=x=z:NoSchedule"],
      { taints: [taint("x", "y")] },
      ["taint node a1: x=z:NoSchedule"],
    ],
    [
      "taints of Kubernetes and of others stay",
      [],
      [],
      { taints: [taint("node.kubernetes.io/unschedulable")] },
      [],
    ],
  ];
  for (const [name, old, args, node, whys] of cases)
    test(`: ${name}`, () => {
      const facts = { unit: unit("--a", ...old), nodes: nodes({ ...A1, ...node } as typeof A1) };
      assert.deepEqual(
        labelsPlan("server", "a1", ["--a", ...args], facts).map(({ why }) => why),
        whys,
      );
    });

  test("of a node that is not registered yet are k3s's to set", () =>
    assert.deepEqual(labelsPlan("agent", "b1", ["--node-taint=x:NoSchedule"], { nodes: nodes(A1) }), []));

  test("of an agent: a taint that differs is refused with the line for the server", () =>
    assert.throws(
      () => labelsPlan("agent", "b1", ["--node-taint=x=y:NoSchedule"], { nodes: nodes(A1, B1) }),
      /on the server run "kubectl taint --overwrite node b1 x=y:NoSchedule", then the same again/,
    ));
});

for (const step of [server, agent])
  describe(`K3S_CONFIG of a ${step.name}`, () => {
    const want = wanted({ K3S_CONFIG: "# mine\nkubelet-arg:\n  - max-pods=50" });
    const written = filesAfter(step, want, step.plan(want, prepared(MODERN)));
    const { unit, envfile, config } = written;
    const well = healthy(MODERN, { unit, envfile, config } as Facts);

    test("is written 0600, and k3s started after it", () => {
      assert.match(written.config ?? "", /^600\n[0-9a-f]{64}\n?$/);
      const plan = verbs(step, want, prepared(MODERN));
      assert.equal(plan[0], "write /etc/rancher/k3s/config.yaml.d/across-clouds.yaml (0600)");
      assert.match(plan.at(-1) ?? "", /^start /);
    });
    test("is left alone once it is there", () => assert.deepEqual(step.plan(want, well), []));
    test("is written anew when it changes, and k3s restarted once", () =>
      assert.deepEqual(verbs(step, { ...want, K3S_CONFIG: "debug: true" }, well), [
        "write /etc/rancher/k3s/config.yaml.d/across-clouds.yaml (0600)",
        `restart ${step.name === "server" ? "k3s" : "k3s-agent"}`,
      ]));
    test("goes with the setting, in one change with the restart", () =>
      assert.deepEqual(verbs(step, { ...want, K3S_CONFIG: "" }, well), [
        `remove /etc/rancher/k3s/config.yaml.d/across-clouds.yaml, restart ${step.name === "server" ? "k3s" : "k3s-agent"}`,
      ]));
    test("shows in no plan", () => {
      const secret = { ...want, K3S_CONFIG: "etcd-s3-secret-key: hunter2" };
      assert.doesNotMatch(JSON.stringify(step.plan(secret, prepared(MODERN))), /hunter2/);
    });
    test("is refused by a k3s that does not read it", () =>
      assert.throws(
        () => step.plan({ ...want, K3S_VERSION: OLD }, prepared(OLD)),
        /K3S_CONFIG needs k3s v1\.26/,
      ));
  });

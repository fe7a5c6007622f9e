import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { drain, drainHere, uncordon, uncordonHere } from "../lib/k3s/drain.ts";
import { DRAINED, type Node, nodesOf } from "../lib/k3s/nodes.ts";
import { type Change, Refusal } from "../lib/step.ts";
import {
  A1,
  B1,
  B2,
  box,
  type Facts,
  MODERN,
  type NodeSpec,
  node,
  nodes,
  OLD,
  planned,
  prepared,
  programs,
  shell,
  temporary,
  wanted,
} from "./helpers.ts";

const BOOT = (box(B1).boot ?? "").trim();
const BEFORE = "88e9fd3e-8477-40e7-aaf5-7b4c1351751a";

/** The box b1, and its node as the cluster has it: ready or not, cordoned or not, drained in a boot or not. */
function facts({
  ready = true,
  cordoned = false,
  drained = "",
  roles = "k3s-agent\n",
  name = "b1",
} = {}): Facts {
  const own = node({ ...(name === "a1" ? A1 : B1), ready });
  Object.assign(own.spec, cordoned ? { unschedulable: true } : {});
  Object.assign(own.metadata.annotations, drained ? { [DRAINED]: drained } : {});
  return prepared(OLD, {
    ...box(name === "a1" ? A1 : B1),
    roles,
    nodes: JSON.stringify({ kind: "List", items: [own] }),
  });
}
const want = wanted({ SERVER: "a1", PUBLIC_IP: B1.ip });
const atServer = wanted({ SERVER: "a1" });
const none = { ...facts(), nodes: "", roles: "" };
const onServer = facts({ roles: "k3s\n", name: "a1" });

/** What the server then does for a box, according to its own NodeList: the cluster of a1, b1 and b2. */
const does = (changes: readonly Change[], json: string): Change[] =>
  changes.flatMap((change) => change.onServer?.plan(atServer, { nodes: json }) ?? [change]);

describe("before a restart", () => {
  const cases: [name: string, facts: Facts, drained: boolean][] = [
    ["a node that is Ready is drained", facts(), true],
    ["a node whose drain was interrupted is drained again", facts({ cordoned: true, drained: BOOT }), true],
    ["a node that the user cordoned is not changed", facts({ cordoned: true }), false],
    ["a node that is not Ready is not drained", facts({ ready: false }), false],
    ["a box that is not a node is not drained", none, false],
    [
      "a node that cannot query the API is drained if the server finds it Ready",
      { ...facts(), nodes: "" },
      true,
    ],
  ];
  for (const [name, seen, drained] of cases)
    test(name, () => assert.equal(drainHere(want, seen).length, drained ? 1 : 0));

  test("an agent's node is drained from the server, and the server's own node locally", () => {
    const [of] = [drainHere(want, facts())[0], drainHere(atServer, onServer)[0]];
    assert.ok(of?.onServer);
    assert.equal(drainHere(atServer, onServer)[0]?.onServer, undefined);
  });

  test("an agent is refused if SERVER is not set", () => {
    assert.throws(
      () => drainHere(wanted({ PUBLIC_IP: B1.ip }), facts()),
      (e: Error) => e instanceof Refusal && /set SERVER, or cordon and drain it yourself/.test(e.message),
    );
    assert.equal(drainHere(wanted(), onServer).length, 1);
  });
});

describe("the server changes no other node if an agent's box reports", () => {
  const drainedB2 = cluster({ name: "b2", cordoned: true, drained: BEFORE });
  /** A box at b1's address that claims to be b2, with a forged NodeList. */
  const forged = (over: Facts = {}, own: Partial<NodeSpec> = {}) => {
    const item = node({ ...B2, ip: B1.ip, ...own });
    const seen = {
      ...facts(),
      hostname: "b2\n",
      nodes: JSON.stringify({ kind: "List", items: [item] }),
      ...over,
    };
    const marked = structuredClone(item);
    Object.assign(marked.spec, { unschedulable: true });
    Object.assign(marked.metadata.annotations, { [DRAINED]: BEFORE });
    const back = { ...seen, nodes: JSON.stringify({ kind: "List", items: [marked] }) };
    return [...drainHere(want, seen), ...uncordonHere(want, back)];
  };
  const lies: [name: string, changes: () => Change[], server: string][] = [
    ["a forged name and NodeList", () => forged(), drainedB2],
    ["the name and boot ID of another node", () => forged(box(B2)), drainedB2],
    ["a boot ID that no node has", () => forged({ boot: `${BEFORE}\n`, machine: "" }), drainedB2],
    ["no boot ID", () => forged({ boot: "" }), drainedB2],
    [
      "another node's address in its own node",
      () => forged(),
      nodes(A1, { ...B1, external: B2.ip, boot: box(B2).boot?.trim() ?? "" }, B2),
    ],
    ["another node's identity while no node has its own address", () => forged(box(B2)), nodes(A1, B2)],
  ];
  for (const [name, changes, server] of lies)
    test(name, () => {
      for (const change of changes()) {
        assert.ok(change.onServer && !change.sh, "planned on the box");
        const then = planned([change.onServer], atServer, { nodes: server });
        for (const { why, sh } of then) assert.doesNotMatch(why + sh, /\bb2\b/);
      }
      assert.ok(changes().length > 0);
    });

  test("its own identity, and drains its node according to the server's own NodeList", () => {
    const [change] = does(drainHere(want, facts()), cluster());
    assert.match(change?.why ?? "", /^drain node b1,/);
    assert.deepEqual(does(drainHere(want, facts()), cluster({ cordoned: true })), []);
    assert.throws(() => does(drainHere(want, facts()), ""), /API does not answer/);
  });
});

describe("after a restart", () => {
  const cases: [name: string, facts: Facts, whys: RegExp[], last?: true][] = [
    [
      "a node that this project drained is uncordoned",
      facts({ cordoned: true, drained: BEFORE }),
      [/^uncordon node b1/],
    ],
    ["a node that the user cordoned is not changed", facts({ cordoned: true }), []],
    [
      "a node that is marked but not cordoned loses the mark",
      facts({ drained: BEFORE }),
      [/^uncordon node b1/],
    ],
    [
      "a node that is not Ready yet is waited for",
      { ...facts({ cordoned: true, drained: BEFORE, ready: false }), uptime: "20.00" },
      [/^uncordon node b1/],
    ],
    [
      "a node that is not Ready long after its boot is left to the steps that repair it",
      facts({ cordoned: true, drained: BEFORE, ready: false }),
      [],
    ],
    [
      "a node that an upgrade has drained since is left to the upgrade",
      facts({ cordoned: true, drained: `${BOOT}.done` }),
      [],
    ],
    ["a node that is not cordoned is not changed", facts(), []],
    ["a box that is not a node is not changed", { ...none, uptime: "20.00" }, []],
    [
      "an API that does not answer yet is waited for",
      { ...facts(), nodes: "", uptime: "20.00" },
      [/^wait until the cluster says/],
    ],
    [
      "an API that does not answer long after the boot is not waited for",
      { ...facts(), nodes: "", uptime: "200.00" },
      [],
    ],
    [
      "if no step follows, a node that is not Ready is waited for even long after its boot",
      facts({ cordoned: true, drained: BEFORE, ready: false }),
      [/^uncordon node b1 once it is Ready/],
      true,
    ],
    [
      "if no step follows, an API that does not answer is waited for even long after the boot",
      { ...facts(), nodes: "", uptime: "200.00" },
      [/^wait until the cluster says/],
      true,
    ],
    [
      "if no step follows, a node that the user cordoned is not changed",
      facts({ cordoned: true, ready: false }),
      [],
      true,
    ],
    [
      "if no step follows, a node that an upgrade drained is left to the upgrade",
      facts({ cordoned: true, drained: BOOT, ready: false }),
      [],
      true,
    ],
  ];
  for (const [name, seen, whys, last] of cases)
    test(name, () => {
      const plan = uncordonHere(want, seen, last).map(({ why }) => why);
      assert.equal(plan.length, whys.length, `${plan}`);
      for (const [i, why] of whys.entries()) assert.match(plan[i] ?? "", why);
    });
});

test("an API that stays silent after a boot is waited for 180 s if a step follows that repairs k3s, else for 600 s, and that is an error", () => {
  const silent = { ...facts(), nodes: "", uptime: "20.00" };
  const waits = (last: boolean, uptime: number) => {
    const folder = temporary();
    const script = (uncordonHere(want, silent, last)[0]?.sh ?? "").replaceAll("/proc/uptime", `${folder}/up`);
    const PATH = programs(folder, { k3s: "exit 1", curl: "exit 7", sleep: "echo slept; exit 1" });
    return shell(`echo ${uptime}.00 >${folder}/up\nset -eu\n${script}`, ["sh", "-s"], { PATH });
  };
  assert.deepEqual([waits(false, 179).stdout, waits(true, 599).stdout], ["slept\n", "slept\n"]);
  const [before, last] = [waits(false, 180), waits(true, 600)];
  assert.deepEqual([before.status, before.stdout], [0, ""]);
  assert.equal(last.status, 1);
  assert.match(last.stdout, /if this node was drained it is still cordoned/);
});

/** Three nodes as the API returns them, one of them in this state. */
function cluster({ name = "b1", cordoned = false, drained = "" } = {}): string {
  const items = [A1, B1, B2].map((of) => node(of));
  const told = items.find(({ metadata }) => metadata.name === name) as (typeof items)[number];
  Object.assign(told.spec, cordoned ? { unschedulable: true } : {});
  Object.assign(told.metadata.annotations, drained ? { [DRAINED]: drained } : {});
  return JSON.stringify({ kind: "List", items });
}
const b1In = (json: string) => nodesOf(json).find((n) => n.name === "b1") as Node;

describe("before an upgrade or a removal", () => {
  const cases: [name: string, nodes: string, drained: boolean][] = [
    ["a node that is Ready is drained", cluster(), true],
    [
      "a node whose drain was interrupted is drained again",
      cluster({ cordoned: true, drained: BEFORE }),
      true,
    ],
    [
      "a node that is already drained is not drained again",
      cluster({ cordoned: true, drained: `${BEFORE}.done` }),
      false,
    ],
    [
      "a node that the user has uncordoned since its drain is drained again",
      cluster({ drained: `${BEFORE}.done` }),
      true,
    ],
    ["a node that the user cordoned is not changed", cluster({ cordoned: true }), false],
    [
      "a node that is not Ready is not drained, because nothing there would stop its pods",
      nodes(A1, { ...B1, ready: false }, B2),
      false,
    ],
    ["the only node that accepts pods is not drained", nodes({ ...A1, ready: false }, B1), false],
  ];
  for (const [name, json, drained] of cases)
    test(name, () => assert.equal(drain(b1In(json), { nodes: json }, false).length, drained ? 1 : 0));

  test("a node is marked with its boot ID, and uncordoned afterwards", () => {
    const [change] = drain(b1In(cluster()), { nodes: cluster() }, false);
    assert.deepEqual(asks(change?.sh ?? "", MODERN).asked(), [
      `annotate --overwrite node b1 ${DRAINED}=${b1In(cluster()).boot}`,
      "drain b1 --ignore-daemonsets --delete-emptydir-data --timeout=300s",
      `annotate --overwrite node b1 ${DRAINED}=${b1In(cluster()).boot}.done`,
    ]);
    assert.deepEqual(uncordon(b1In(cluster())), []);
    const [back] = uncordon(b1In(cluster({ drained: BEFORE })));
    assert.deepEqual(asks(back?.sh ?? "", MODERN).asked(), ["uncordon b1", `annotate node b1 ${DRAINED}-`]);
  });

  test("pods without a controller are deleted too if requested", () =>
    assert.match(
      drain(b1In(cluster()), { nodes: cluster() }, true)[0]?.sh ?? "",
      / --force --timeout=300s /,
    ));
});

/** The commands that a change's shell code passes to kubectl, without curl, line by line; `answers` are cases of a case statement. */
function asks(text: string, version: string, answers = "") {
  const folder = temporary();
  const kubectl = `shift; [ "$1 $2" = "--kubeconfig ${folder}/config" ] && shift 2
[ "$1" = --request-timeout=10s ] && shift
echo "$*" >>${folder}/asked
case $* in ${answers} *) ;; esac`;
  const k3s = `case $1 in --version) echo 'k3s version ${version} (abc)' ;; kubectl) ${kubectl} ;; esac`;
  const PATH = programs(folder, { k3s, sleep: ":", systemctl: "echo active" });
  const script = text
    .replaceAll("/usr/local/bin/k3s", `${folder}/k3s`)
    .replaceAll("/etc/rancher/k3s/k3s.yaml", `${folder}/config`);
  const run = (config: string) =>
    shell(`${config}set -eu\n${script}\ncat ${folder}/asked`, ["sh", "-s"], { PATH });
  return {
    ...run(`echo x >${folder}/config\n`),
    asked: () => shell(`cat ${folder}/asked`).stdout.trim().split("\n"),
    without: () => run(`rm ${folder}/config\n`),
  };
}

describe("kubectl", () => {
  const drainSh = does(drainHere(want, facts()), cluster())[0]?.sh ?? "";
  const restarted = cluster({ cordoned: true, drained: BEFORE });
  const backSh = does(uncordonHere(want, facts({ cordoned: true, drained: BEFORE })), restarted)[0]?.sh ?? "";
  const DRAIN = (flag: string) => `drain b1 --ignore-daemonsets ${flag} --timeout=300s`;
  const asked = (name: string) => `get --raw /api/v1/nodes/${name}?pretty=false`;
  /** A node as the API returns it. */
  const state = (
    name: "a1" | "b1",
    { cordoned = false, ...over }: Partial<NodeSpec> & { cordoned?: boolean },
  ) => {
    const own = node({ ...(name === "a1" ? A1 : B1), ...over });
    Object.assign(own.spec, cordoned ? { unschedulable: true } : {});
    return `"${asked(name)}") echo '${JSON.stringify(own)}' ;;`;
  };

  for (const [version, flag] of [
    [OLD, "--delete-local-data"],
    ["v1.19.3+k3s1", "--delete-local-data"],
    ["v1.20.0+k3s1", "--delete-emptydir-data"],
    [MODERN, "--delete-emptydir-data"],
  ] as const)
    test(`of ${version} marks and drains the node, with a time limit`, () => {
      const { status, asked } = asks(drainSh, version);
      assert.equal(status, 0);
      assert.deepEqual(asked(), [
        `annotate --overwrite node b1 ${DRAINED}=${BOOT}`,
        DRAIN(flag),
        `annotate --overwrite node b1 ${DRAINED}=${BOOT}.done`,
      ]);
    });

  test("does not drain the node of a box that cannot query the API if it is not Ready or is cordoned", () => {
    const blind = drainHere(atServer, { ...onServer, nodes: "" })[0]?.sh ?? "";
    for (const [over, drained] of [
      [{}, true],
      [{ ready: false }, false],
      [{ cordoned: true }, false],
    ] as const) {
      const { asked } = asks(blind, MODERN, state("a1", over));
      assert.equal(asked().includes(DRAIN("--delete-emptydir-data").replace("b1", "a1")), drained);
    }
    assert.equal(asks(blind, MODERN, "get*) exit 1 ;;").asked().length, 1);
  });

  test("uncordons the node if the drain fails, and the user is told what to do", () => {
    const { status, stdout, asked } = asks(drainSh, MODERN, "drain*) exit 1 ;;");
    assert.equal(status, 1);
    assert.match(stdout, /Move by hand what stays/);
    assert.deepEqual(asked().slice(-2), ["uncordon b1", `annotate node b1 ${DRAINED}-`]);
  });

  test("is not run on a box without a k3s server", () => {
    assert.match(asks(drainSh, MODERN).without().stdout, /No k3s server is on this box: SERVER/);
  });

  test("uncordons a node only once it is Ready after a reboot", () => {
    const back = asks(backSh, MODERN, state("b1", { boot: BOOT, cordoned: true }));
    assert.equal(back.status, 0);
    assert.deepEqual(back.asked(), [asked("b1"), "uncordon b1", `annotate node b1 ${DRAINED}-`]);
    const soon = backSh.replace("+ 300", "+ 1");
    for (const over of [{ boot: BEFORE }, { boot: BOOT, ready: false }]) {
      const { status, stdout, asked } = asks(soon, MODERN, state("b1", over));
      assert.equal(status, 1);
      assert.match(stdout, /Node b1 is not Ready after its restart, and is still cordoned: .*run this again/);
      assert.equal(asked().includes("uncordon b1"), false);
    }
  });
});

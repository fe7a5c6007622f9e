import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { judge } from "../lib/check/diagnose.ts";
import { clusterOf, surveyAndTry } from "../lib/check/survey.ts";
import * as walls from "../lib/k3s/firewall/firewall.ts";
import * as own from "../lib/k3s/firewall/own.ts";
import { meaningOf } from "../lib/k3s/journal.ts";
import { systemdFirst } from "../lib/k3s/service.ts";
import type { Box } from "../lib/script.ts";
import { agent } from "../scripts/agent.ts";
import { fixMetrics, withArguments } from "../scripts/fix-metrics.ts";
import { server } from "../scripts/server.ts";
import {
  A1,
  answering,
  B1,
  B2,
  type Facts,
  figures,
  filesAfter,
  fixture,
  healthy,
  IP,
  MODERN,
  member,
  type NodeSpec,
  nodes,
  OLD,
  prepared,
  wanted,
} from "./helpers.ts";

const without = wanted({ K3S_VERSION: MODERN });
const want = { ...without, TUNNEL_KUBELETS: "yes" };
/** A node with its InternalIP inside the tunnel. */
const inside = (spec: NodeSpec): NodeSpec => ({
  ...{ external: spec.ip, public: spec.ip, overwrite: spec.ip },
  ...{ ...spec, ip: `10.42.${spec.n}.0` },
});
const [TA1, TB1, TB2] = [A1, B1, B2].map(inside) as [NodeSpec, NodeSpec, NodeSpec];
const ON_CARD = { addresses: `2: eth0    inet ${IP}/24 scope global eth0` };
const whys = (plan: readonly { why: string }[]) => plan.map(({ why }) => why.replace(/: .*/, ""));

const written = (of: typeof want, list: string, over: Facts = {}) => {
  const facts = prepared(MODERN, { nodes: list, ...over });
  const { unit, envfile } = filesAfter(server, of, server.plan(of, facts));
  return { unit, envfile, ...over } as Facts;
};

describe("with TUNNEL_KUBELETS a box with a public address", () => {
  test("keeps it as its ExternalIP, and has both addresses on lo where no card has the public one", () => {
    const { unit = "" } = written(want, nodes(A1));
    assert.match(unit, /--node-ip=10\.42\.0\.0 \\\n +--node-external-ip=198\.51\.100\.11 /);
    assert.equal(unit.match(/ip addr flush/g)?.length, 1);
    assert.match(
      unit,
      /flush dev lo label lo:k3s; ip addr replace 198\.51\.100\.11\/32 .*\n.*10\.42\.0\.0\/32/,
    );
    assert.match(written(want, nodes(A1), ON_CARD).unit ?? "", /flush.*; ip addr replace 10\.42\.0\.0\/32 /);
  });

  test("joins with the public one, and moves its kubelet by one restart once it has a pod network", () => {
    const before = written(want, nodes());
    assert.equal(before.unit, written(without, nodes()).unit);
    const plan = server.plan(want, healthy(MODERN, before));
    assert.deepEqual(whys(plan), [
      "write /etc/systemd/system/k3s.service",
      "restart k3s and wait until node a1 is Ready with its address inside the tunnel",
    ]);
    assert.match(plan.at(-1)?.sh ?? "", /want=10\.42\.0\.0;/);
  });

  test("is waited for until the cluster has this address, and needs nothing then", () => {
    const after = written(want, nodes(A1));
    assert.deepEqual(
      server.plan(want, healthy(MODERN, after)).map(({ why }) => why),
      ["wait until node a1 is healthy: InternalIP of a1 is 198.51.100.11, not 10.42.0.0"],
    );
    assert.deepEqual(server.plan(want, healthy(MODERN, after, { nodes: nodes(TA1, TB1, TB2) })), []);
    assert.match(
      server.plan(want, healthy(MODERN, after, { nodes: nodes({ ...TA1, external: "" }) }))[0]?.why ?? "",
      /ExternalIP of a1 is not set/,
    );
  });

  test("keeps its address while the API does not answer", () => {
    const facts = healthy(MODERN, written(want, nodes(A1)), { nodes: "", api: "20 did not answer in 20 s" });
    assert.deepEqual(whys(server.plan(want, facts)), ["wait until node a1 is healthy"]);
  });

  test("gets everything back by the next run without the setting, also what was on lo", () => {
    for (const over of [{}, ON_CARD]) {
      const facts = healthy(MODERN, written(want, nodes(A1), over), { nodes: nodes(TA1, TB1, TB2) });
      const plan = server.plan(without, facts);
      assert.deepEqual(whys(plan), [
        "write /etc/systemd/system/k3s.service",
        "restart k3s and wait until node a1 is Ready with its public address",
      ]);
      assert.match(plan[0]?.sh ?? "", /ip addr flush dev lo label lo:k3s/);
      const after = healthy(MODERN, written(without, nodes(A1), over), { nodes: nodes(TA1, TB1, TB2) });
      assert.deepEqual(server.plan(without, after), []);
    }
  });

  test("is refused on k3s of the old backend before anything is changed", () => {
    const facts = prepared(OLD);
    const old = { ...want, K3S_VERSION: OLD };
    for (const step of [systemdFirst, server, agent])
      assert.throws(
        () => step.plan(old, facts),
        /^Error: TUNNEL_KUBELETS=yes has not been tried .* v1\.17\.6/,
      );
  });
});

describe("with TUNNEL_KUBELETS metrics-server", () => {
  // As k3s writes it with --flannel-external-ip.
  const manifest = fixture("metrics-server-v1.36.3.yaml").replace(
    "InternalIP,ExternalIP",
    "ExternalIP,InternalIP",
  );
  const facts = (over: Facts = {}) =>
    healthy(
      MODERN,
      {},
      {
        ...{ packaged: manifest, nodes: nodes(TA1, TB1, TB2), top: figures("a1", "b1", "b2") },
        ...over,
      },
    );
  const deployed = withArguments(manifest, [
    "--kubelet-preferred-address-types=InternalIP,ExternalIP,Hostname",
  ]);
  const done = { own: deployed, skipped: "yes\n", ours: "yes\n" };

  test("asks kubelets at their InternalIP first, by k3s's own manifest with nothing else changed", () => {
    const [change, next] = fixMetrics.plan(want, facts());
    assert.equal(change?.why, "deploy metrics-server with InternalIP first, in place of the packaged one");
    assert.match(next?.why ?? "", /^wait until `kubectl top nodes` answers for a1, b1, b2/);
    assert(change?.sh.includes(deployed.trimEnd().split("\n").at(-1) as string));
    const sorted = (text: string) => text.split("\n").sort();
    assert.deepEqual(
      sorted(deployed.replace("InternalIP,ExternalIP", "ExternalIP,InternalIP")),
      sorted(manifest),
    );
    assert.doesNotMatch(deployed, /insecure/);
  });

  test("needs nothing once this is deployed, and is deployed again after an upgrade or while another pod answers", () => {
    assert.deepEqual(fixMetrics.plan(want, facts(done)), []);
    for (const over of [
      { packaged: manifest.replace("v0.9.0", "v0.9.1") },
      { ours: "" },
      { skipped: "" },
    ] as Facts[])
      assert.match(fixMetrics.plan(want, facts({ ...done, ...over }))[0]?.why ?? "", /^deploy/);
  });

  test("is k3s's own again without the setting", () => {
    const [change] = fixMetrics.plan(without, facts(done));
    assert.equal(change?.why, "give k3s's own metrics-server back: this k3s needs no other");
    assert.deepEqual(fixMetrics.plan(without, facts()), []);
  });
});

describe("with TUNNEL_KUBELETS a box's firewall", () => {
  const [A, B] = [A1.ip, B1.ip];
  const RANGES = ["10.42.0.0/16", "10.43.0.0/16"] as const;
  const known = walls.admitted({ ...want, FIREWALL: `${A} ${B}` }, { nodes: "" });
  const home = walls.admitted({ ...want, FIREWALL: `${A} ${B} nat` }, { nodes: "" });
  const recorded = (name: string): Facts => JSON.parse(fixture(`firewall/${name}.json`));
  const BOX = { nft: "/usr/sbin/nft\n", card: "eth0\n", ...ON_CARD };
  const cases: [name: string, before: Facts, done: Facts][] = [
    ["nft", BOX, { ...BOX, script: own.scriptText([A, B], RANGES[0]) }],
    ["ufw", recorded("ufw-fresh"), recorded("ufw-fresh-done")],
    ["firewalld", recorded("firewalld-fresh"), recorded("firewalld-fresh-done")],
  ];
  for (const [name, before, done] of cases) {
    test(`${name} opens 10250/tcp to nobody but the pods' network`, () => {
      const [change, ...more] = walls.firewallPlan(before, known, RANGES);
      assert.deepEqual(more, []);
      assert.equal(
        change?.why,
        `${name}: open 6443/tcp and 51820/udp to ${A}, ${B}, and close k3s's ports to all others: kubelets are reached inside the tunnel`,
      );
      assert.doesNotMatch(change?.sh.replace(/case "\$ip.*/g, "") ?? "", /10250|\btunnel\b/);
      assert.match(change?.sh ?? "", /10\.42\.0\.0\/16|flannel-wg/);
      assert.match(
        walls.firewallPlan(before, home, RANGES)[0]?.why ?? "",
        /: open 6443\/tcp and 51820\/udp to all, since home nodes have no fixed address, and close k3s's other ports: kub/,
      );
    });
    test(`${name} closes it again where it was open to the nodes`, () => {
      const { sh = "" } = walls.firewallPlan(done, known, RANGES)[0] ?? {};
      if (name === "nft") assert.doesNotMatch(sh, /10250/);
      else {
        assert.match(sh, /(delete|remove).*10250/);
        assert.doesNotMatch(sh, /(insert 1|add-rich-rule)|(delete|remove)[^\n]*(6443|51820)/);
      }
    });
  }
});

describe("with TUNNEL_KUBELETS make check", () => {
  const survey = (list = nodes(TA1, TB1, TB2), tries = "", top = figures("a1", "b1", "b2")) =>
    [A1, B1, B2].map((spec) => {
      const ways = `tunnel a1 1420\ntunnel b1 1420\ntunnel b2 1420\n`;
      const facts: Facts = spec === A1 ? { nodes: list } : {};
      const tried: Facts = spec === A1 ? { tries: `${ways}${tries}`, top } : {};
      const one = member(MODERN, spec, facts, tried);
      return { ...one, box: { ...one.box, want } };
    });
  const found = (...args: Parameters<typeof survey>) => judge(clusterOf(survey(...args))).wrong;
  const open = "kubelet 10.42.0.0 open\nkubelet 10.42.2.0 open\n";

  test("finds nothing wrong where every kubelet answers inside the tunnel", () =>
    assert.deepEqual(found(undefined, `${open}kubelet 10.42.1.0 open`), []));

  test("asks for no open port where a firewall drops what comes out of the tunnel", () => {
    const [problem, ...more] = found(undefined, `${open}kubelet 10.42.1.0 dropped`, figures("a1", "b2"));
    assert.deepEqual(more, []);
    assert.match(problem?.cause ?? "", /^its kubelet cannot be reached at 10\.42\.1\.0:10250 \(dropped\)/);
    assert.match(problem?.remedy ?? "", /make firewall HOST=b1, or trust 10\.42\.0\.0\/16/);
    assert.doesNotMatch(problem?.remedy ?? "", /10250/);
  });

  test("names a node whose InternalIP is not there yet, and not the closed port as well", () => {
    const tries = `${open}kubelet ${B1.ip} dropped`;
    const [problem, ...more] = found(nodes(TA1, B1, TB2), tries, figures("a1", "b2"));
    assert.deepEqual([problem?.box, problem?.remedy, more], ["b1", "make agent HOST=b1", []]);
    assert.match(problem?.cause ?? "", /InternalIP is 198\.51\.101\.11, not 10\.42\.1\.0 inside the tunnel/);
  });

  test("knocks at the InternalIP, and without the setting at the ExternalIP", async () => {
    const types = async (of: typeof want) => {
      const sent: string[] = [];
      const a1 = survey()[0]?.box as Box;
      await surveyAndTry([
        {
          box: { ...a1, want: of, shell: answering({}, sent) },
          role: "server",
        },
      ]);
      return [...(sent[0] ?? "").matchAll(/"type":"(\w+)","address":"\[0-9\.\]\+\//g)].map(
        ([, type]) => type,
      );
    };
    assert.deepEqual(await types(want), ["InternalIP", "ExternalIP"]);
    assert.deepEqual(await types(without), ["ExternalIP", "InternalIP"]);
  });

  test("explains metrics-server's timeouts without an open port", () => {
    const line =
      'E1126 15:43:26.1       1 scraper.go:149] "Failed to scrape node" err="Get \\"https://10.42.1.0:10250/metrics/resource\\": dial tcp 10.42.1.0:10250: i/o timeout" node="b1"';
    const { cause, remedy } = meaningOf(line, "make fix-metrics") ?? {};
    assert.match(cause ?? "", /kubelet of node b1 inside the tunnel/);
    assert.match(remedy ?? "", /trust the pods' network .*make firewall/);
  });
});

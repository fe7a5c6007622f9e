import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { kubelets, made, type Pod, paths } from "../lib/check/pods.ts";
import { ask, clusterOf, LOOKS, surveyAndTry } from "../lib/check/survey.ts";
import { admits, type Device, shutsOut } from "../lib/k3s/devices.ts";
import { drainedOn } from "../lib/k3s/drain.ts";
import { closeAgain, firewallLooks, firewallPlan } from "../lib/k3s/firewall/firewall.ts";
import { scriptText } from "../lib/k3s/firewall/own.ts";
import { ENTRY_PROGRAM } from "../lib/k3s/firewall/traffic.ts";
import { keepaliveText } from "../lib/k3s/keepalive.ts";
import { DRAINED } from "../lib/k3s/nodes.ts";
import {
  PROGRAM,
  RECEIVES,
  receives,
  receivesNone,
  scheduled,
  scheduleKey,
  unscheduled,
} from "../lib/k3s/schedule.ts";
import { watchStep, watchText } from "../lib/k3s/watch.ts";
import { applyScript, asScript, lookScript, wrapInMain } from "../lib/protocol.ts";
import type { Look, Step } from "../lib/step.ts";
import { agentSteps } from "../scripts/agent.ts";
import { archive, cleared } from "../scripts/cluster/backup.ts";
import { certsAs } from "../scripts/cluster/certs.ts";
import { inside, proof } from "../scripts/cluster/drill.ts";
import { agentLeaves, replacesToken, stopped } from "../scripts/cluster/promote.ts";
import { forgotten, uninstall } from "../scripts/cluster/remove.ts";
import { forgetPasswords, placeData } from "../scripts/cluster/restore.ts";
import { MORE } from "../scripts/cluster/status.ts";
import { token } from "../scripts/cluster/token.ts";
import { stepsFor } from "../scripts/cluster/upgrade.ts";
import { downloadAhead } from "../scripts/download-k3s.ts";
import { fixMetrics } from "../scripts/fix-metrics.ts";
import { server, serverSteps } from "../scripts/server.ts";
import {
  A1,
  answering,
  B1,
  certificates,
  deviceKey,
  entryFacts,
  type Facts,
  fixture,
  healthy,
  IP,
  lacks,
  MODERN,
  member,
  NETWORKS,
  NOW,
  node,
  nodes,
  OLD,
  planned,
  prepared,
  shell,
  TOKEN,
  wanted,
  written,
} from "./helpers.ts";

const skip = lacks("shellcheck");

/** Runs shellcheck on a script as a box receives it. */
function check(script: string) {
  // It reports a function that another calls by its name as unreachable (SC2317, SC2329 since 0.11).
  const { status, stdout, stderr } = shell(script, ["shellcheck", "-s", "sh", "-e", "SC2317,SC2329", "-"]);
  assert.equal(status, 0, stdout + stderr);
}

/** Every change that these steps can plan, over several states of a box. */
function changesOf(steps: readonly Step[], version: string) {
  const want = wanted({
    K3S_VERSION: version,
    PROXY_MODE: "ipvs",
    SERVER: "a1",
    ELREPO_KERNEL_URL: "https://m.example/kernel",
    NODE_LABELS: "disk=ssd",
    K3S_DATASTORE_ENDPOINT: "postgres://k3s:x@m.example/k3s",
    AIRGAP: "yes",
    REGISTRY_MIRRORS: "docker.io=https://m.example",
    HTTPS_PROXY: "http://u:p@m.example:1",
    HTTP_PROXY: "http://m.example:1",
    NO_PROXY: "m.example",
    K3S_CONFIG: version === MODERN ? "debug: true" : "",
  });
  const el7 = { os: fixture("os-release/centos-7"), kernel: "3.10.0\n", module: "" };
  const member = { roles: "k3s-agent\n", nodes: nodes(A1) };
  const drained = node(A1);
  drained.metadata.annotations[DRAINED] = "88e9fd3e-8477-40e7-aaf5-7b4c1351751a";
  const states = [
    prepared(version, { curl: "", version: "", kubectl: "", tool: "", loaded: "" }),
    prepared(version, { ...el7, tool: "", loaded: "" }),
    prepared(version, {
      ...el7,
      ...member,
      "kernel-ml": "5.7.7\n",
      tools: "yes\n",
      saved: "",
      entry: "5.7.7\n",
    }),
    prepared(version, { "kernel-ml": "5.7.7\n", ...member, uptime: "20", nodes: "" }),
    prepared(version, { "kernel-ml": "5.7.7\n", ...member, nodes: JSON.stringify(drained) }),
    healthy(
      version,
      {},
      { service: "", nodes: nodes({ ...A1, public: "192.168.0.11", overwrite: "" }, B1), peers: "" },
    ),
    healthy(version, {}, { peers: "", packaged: fixture("metrics-server-v1.17.6.yaml"), top: "" }),
    healthy(version, {}, { packaged: "a", own: "a" }),
    healthy(version, {}, { own: "  - --kubelet-insecure-tls\n" }),
    healthy(version, {}, { nodes: "", runs: "active\n" }),
  ];
  const changes = states.flatMap((facts) => planned(steps, want, facts));
  return [...new Map(changes.map((change) => [change.sh, change])).values()];
}

describe("shellcheck reports nothing", { skip }, () => {
  for (const version of [OLD, MODERN])
    for (const [name, steps] of Object.entries({ server: [...serverSteps, fixMetrics], agent: agentSteps })) {
      const want = wanted({ K3S_VERSION: version, AIRGAP: "yes" });
      const changes = changesOf(steps, version);

      test(`about the look of ${name}, ${version}`, () =>
        check(`#!/bin/sh\n${wrapInMain(lookScript(steps, want, "mark"))}`));

      test(`about each change of ${name}, ${version}`, () => {
        assert.ok(changes.length >= 12, changes.map(({ why }) => why).join());
        // As apply() sends it: each change is a script of its own, which its here-document hides from shellcheck.
        for (const { sh, secrets = [] } of changes)
          check(
            `#!/bin/sh\nmain() {\nset -eu\nsay() { printf 'say %s\\n' "$*"; }\n${secrets.map((s) => `${s}=x\n`).join("")}${sh}\n}\nmain </dev/null\n`,
          );
      });

      test(`about the scripts that apply and print the changes of ${name}, ${version}`, () => {
        check(`#!/bin/sh\n${wrapInMain(applyScript(changes, "mark", () => "x y"))}`);
        check(asScript(changes));
      });
    }

  for (const spec of [A1, B1]) {
    const cluster = clusterOf([A1, B1].map((box) => member(MODERN, box, { resolvers: "10.0.0.2" })));
    const box = cluster.boxes.find(({ name }) => name === spec.name) as (typeof cluster.boxes)[number];
    const pods = [A1, B1].map(({ name, n }) => ({ name: `pod-${name}`, node: name, ip: `10.42.${n}.9` }));
    const services = { kubernetes: "10.43.0.1", "kube-dns": "10.43.0.10" };
    const scripts = {
      "make status": [...LOOKS.server, MORE].join("\n"),
      "the pods": made(["a1", "b1"], "abc"),
      "the paths between pods": paths(pods[0] as Pod, pods, services, 1420),
      "the kubelets": kubelets(pods),
    };
    for (const [what, text] of Object.entries(scripts))
      test(`about the script of check for ${what}, ${box.role}`, () =>
        check(`#!/bin/sh\n${wrapInMain(lookScript([ask([text as Look])], wanted(), "mark"))}`));

    test(`about the two scripts that check sends to every box if there is a --service-cidr, ${box.role}`, async () => {
      const sent: string[] = [];
      const list = nodes({ ...A1, args: ["server", "--service-cidr=10.99.0.0/16"] }, B1);
      await surveyAndTry(
        [A1, B1].map((one) => {
          const { box, role, facts } = member(MODERN, one, one === A1 ? { nodes: list } : {});
          return { box: { ...box, shell: answering(facts, one === spec ? sent : []) }, role };
        }),
      );
      assert.equal(sent.length, 2);
      for (const script of sent) check(`#!/bin/sh\n${script}`);
    });
  }
  test("about the firewall's look, its changes, its script, and the removal of its rules", () => {
    const ranges = ["10.42.0.0/16", "10.43.0.0/16"] as const;
    const fresh = { nft: "/usr/sbin/nft\n" };
    const firewalld = { firewalld: "running\n", zones: "public\n", nft: "/usr/sbin/nft\n" };
    const ufw = {
      ufw: "Status: active\nDefault: deny (incoming), allow (outgoing)\n",
      added: "ufw allow 10250/tcp\n",
      nft: "/usr/sbin/nft\n",
    };
    check(`#!/bin/sh\nfact() { echo "$1"; }\n${firewallLooks.join("\n")}`);
    check(scriptText(["198.51.100.11"], ranges[0]));
    check(scriptText(["198.51.100.11", "nat"], ranges[0]));
    check(scriptText(["198.51.100.11", "51822/udp"], ranges[0]));
    check(`#!/bin/sh\n${closeAgain(ranges)}\n`);
    for (const facts of [fresh, firewalld, ufw])
      for (const { sh } of firewallPlan(facts, ["198.51.100.11", "51822/udp"], ranges))
        check(`#!/bin/sh\n${sh}\n`);
  });
});

describe("shellcheck reports nothing in an entry of devices:", { skip }, () => {
  const device = (name: string, ip: string): Device => ({ name, ip, key: deviceKey("P"), form: "phone" });
  const [PHONE, TV] = [device("phone", "10.44.0.2"), { ...device("tv", "10.44.0.3"), only: "services" }] as [
    Device,
    Device,
  ];
  const none = { ...prepared(MODERN), ...NETWORKS };
  const entry = { ...none, ...entryFacts([PHONE]) };
  const steps: [string, Step, Facts][] = [
    ["that is new", admits(PHONE), none],
    ["with one device more", admits(TV), entry],
    ["that is repaired", admits(PHONE), { ...entry, "entry-state": "inactive\n" }],
    ["with one device less", shutsOut("tv"), { ...entry, ...entryFacts([PHONE, TV]) }],
    ["without its last device", shutsOut("phone"), entry],
  ];
  for (const [what, step, facts] of steps)
    test(what, () => {
      check(`#!/bin/sh\n${wrapInMain(lookScript([step], wanted(), "mark"))}`);
      const changes = step.plan(wanted(), facts);
      assert.equal(changes.length, 1);
      for (const { sh } of changes) check(`#!/bin/sh\nset -eu\n${sh}\n`);
    });

  test("its program", () => check(written(admits(PHONE).plan(wanted(), none)[0]?.sh ?? "", ENTRY_PROGRAM)));
});

describe("shellcheck reports nothing in backups that a server makes by itself:", { skip }, () => {
  const keeper = {
    "receiver-user": "debian\n/home/debian/.ssh/authorized_keys\n",
    "receiver-keys": "ssh-ed25519 AAAA\n",
    receiver: "of an earlier release\n",
  };
  const target = { login: "debian", port: "22", keys: ["ssh-ed25519 AAAA"] };
  const want = { BACKUP_EVERY: "6h", BACKUP_TO: "b1", S3_ACCESS_KEY: "id", S3_SECRET_KEY: "secret" };
  const bucket = { ...want, BACKUP_TO: "https://s3.example/bucket/folder" };
  const steps: [string, Step, Facts, Partial<ReturnType<typeof wanted>>][] = [
    ["the server's key", scheduleKey, {}, want],
    ["the node that keeps them", receives("a1", "7", "ssh-ed25519 AAAA"), keeper, want],
    ["the node that keeps none any more", receivesNone, keeper, want],
    ["the server, to a node", scheduled("a1", "CERTIFICATE", target), healthy(MODERN, {}), want],
    ["the server, to a bucket", scheduled("a1", "CERTIFICATE", undefined), healthy(MODERN, {}), bucket],
    ["a server that makes none any more", unscheduled, { schedule: "x" }, want],
  ];
  for (const [what, step, facts, more] of steps)
    test(what, () => {
      check(`#!/bin/sh\n${wrapInMain(lookScript([step], wanted(more), "mark"))}`);
      const changes = step.plan(wanted(more), facts);
      assert.ok(changes.length > 0);
      for (const { sh } of changes) check(`#!/bin/sh\nset -eu\n${sh}\n`);
    });
  test("the program and the receiver", () => {
    check(PROGRAM);
    check(RECEIVES);
  });
});

test("shellcheck reports nothing in the program that keeps a node without a public address in touch", {
  skip,
}, () => {
  const { status, stdout } = shell(keepaliveText("flannel-wg"), ["shellcheck", "-"]);
  assert.equal(status, 0, stdout);
});

describe("shellcheck reports nothing in the watch:", { skip }, () => {
  const want = wanted({
    NOTIFY_URL: "https://ntfy.sh/x",
    HTTPS_PROXY: "http://u:p@m.example:1",
    NO_PROXY: "m.example",
  });
  const facts = {
    ...healthy(MODERN, {}),
    subnet: "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.0.1/24\n",
  };

  test("its program", () => check(watchText({ node: "a1", inside: true, pods: "10.42." })));

  test("its look", () => check(`#!/bin/sh\n${wrapInMain(lookScript([watchStep], want, "mark"))}`));

  test("what sets it up and takes it away", () => {
    const given = ["NOTIFY_URL", "HTTPS_PROXY"].map((name) => `${name}=x\n`).join("");
    const away = { ...want, allowed: new Set(["remove"]) };
    for (const one of [want, wanted(), away]) {
      const [change, more] = watchStep.plan(one, { ...facts, watch: one === away ? "x" : "" });
      assert.equal(more, undefined);
      check(`#!/bin/sh\nset -eu\n${one === want ? given : ""}${change?.sh}\n`);
    }
  });
});

describe("shellcheck reports nothing in a drill,", { skip }, () => {
  const counts = { verified: true, revision: 1, nodes: 1, deployments: 1, secrets: 1 };
  const step = proof("./x.tar.gz", "ab".repeat(32), { version: MODERN }, counts);
  const facts = {
    version: MODERN,
    system: "Linux",
    tools: "/bin/unshare\n/sbin/ip\n/bin/mount",
    arch: "x86_64",
  };

  test("its look", () => check(`#!/bin/sh\n${wrapInMain(lookScript([step], wanted(), "mark"))}`));

  test("what it does with the box's own k3s, with one of its own, and within its namespaces", () => {
    for (const version of [MODERN, "none"])
      for (const { sh } of step.plan(wanted(), { ...facts, version })) check(`#!/bin/sh\nset -eu\n${sh}\n`);
    check(`#!/bin/sh\nset -eu\n${inside("/usr/local/bin/k3s", ["--disable=traefik"], 1)}\n`);
  });
});

describe("shellcheck reports nothing in the commands that operate a cluster,", { skip }, () => {
  const want = wanted({ HOST: "b1", K3S_VERSION: "v1.36.3+k3s1" });
  const facts = {
    ...healthy(MODERN, {}),
    left: "/usr/local/bin/k3s\nfirewall\n",
    secrets: "b1\n",
    passwords: "b1\n",
    token: `${TOKEN}\n`,
    rotates: "rotate\n",
    running: "k3s\n",
    active: "active\n",
    database: "yes\n",
    ahead: "",
    folder: "yes\n",
  };
  const upgrade = stepsFor("agent", MODERN, IP);
  const kept = { ...facts, kept: `${MODERN}\n`, generation: "modern\n", version: "v1.36.3+k3s1" };
  const cases: [Step, Facts][] = [
    ...[
      uninstall,
      drainedOn({ ip: B1.ip }, true),
      forgotten({ ip: B1.ip }, "b1"),
      token,
      archive("x"),
      cleared,
      placeData("./x.tar.gz", "abc"),
    ].map((step): [Step, Facts] => [step, facts]),
    [placeData("./x.tar.gz", "abc", "x", ["promoted"]), facts],
    [server, { ...facts, rotation: "token\n", service: "ActiveState=failed\nMainPID=0\n" }],
    [stopped("a1"), { ...facts, runs: "active\nenabled\n" }],
    [
      agentLeaves("ab".repeat(32), "./x.tar.gz"),
      { ...facts, joined: "/etc/systemd/system/k3s-agent.service\n" },
    ],
    [replacesToken, facts],
    [forgetPasswords, { ...facts, restored: "abc", secrets: "b1" }],
    [downloadAhead, facts],
    ...[OLD, MODERN].map((version): [Step, Facts] => [
      certsAs("server"),
      {
        ...healthy(version, {}),
        active: "active\n",
        certificates: certificates({ "dynamic-cert.json": NOW }),
      },
    ]),
    [upgrade.keep, facts],
    [upgrade.runs, facts],
    [upgrade.forget, kept],
    [upgrade.putBack, kept],
  ];
  for (const [step, facts] of cases)
    test(`about ${step.name}`, () => {
      check(`#!/bin/sh\n${wrapInMain(lookScript([step], want, "mark"))}`);
      const changes = step.plan(want, facts);
      assert.ok(changes.length > 0);
      for (const change of changes)
        check(
          `#!/bin/sh\nmain() {\nset -eu\nsay() { printf 'say %s\\n' "$*"; }\n${change.sh}\n}\nmain </dev/null\n`,
        );
    });
});

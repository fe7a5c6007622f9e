// Compares the stand-in with recordings of real k3s: test/fixtures/k3s-*.
import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import { API, CURL, WATCH } from "../lib/k3s/nodes.ts";
import { lacks, shell, temporary } from "./helpers.ts";
import { cgroupFault, kubeletFault, parseToken } from "./stand-in/agent.ts";
import {
  defaultInterface,
  fixture,
  type Generation,
  generation,
  logLine,
  versionText,
} from "./stand-in/common.ts";
import { patched } from "./stand-in/datastore.ts";
import { flagTable, incorrectUsage, nodeArgs, parseFlags } from "./stand-in/flags.ts";
import { age, parse as parseKubectl, table } from "./stand-in/kubectl.ts";
import { complaint, deployPass, packaged, readDeployment, settings } from "./stand-in/metrics.ts";
import {
  type Ask,
  addressMarks,
  cloudAddresses,
  type Facts,
  flannelAnnotations,
  flannelCondition,
  forbidden,
  forbiddenLabels,
  kubeletConditions,
  type Machine,
  mergePatch,
  metricsAddress,
  type Node,
  newNode,
  OVERWRITE,
  peer,
  podCidr,
  type User,
} from "./stand-in/nodes.ts";
import { boxFiles, standIn } from "./stand-in/pack.ts";
import { dnsAnswer } from "./stand-in/pod.ts";
import { passwordOf, servingNames } from "./stand-in/server.ts";
import { iptables, nftables, services } from "./stand-in/services.ts";
import * as words from "./stand-in/words.ts";

const VERSION: Record<Generation, string> = { old: "v1.17.6+k3s1", modern: "v1.36.3+k3s1" };
const generations: Generation[] = ["old", "modern"];
const recorded = (gen: Generation): Node =>
  (JSON.parse(fixture(gen === "old" ? "k3s-node-v1.17.6.json" : "k3s-node-v1.36.3.json")) as { node: Node })
    .node;
const machine: Machine = {
  architecture: "amd64",
  bootID: "b",
  kernelVersion: "6.1.0",
  machineID: "m",
  osImage: "Debian GNU/Linux 12 (bookworm)",
  cpus: 2,
  memoryKi: 2000000,
};
const facts: Facts = {
  name: "b1",
  nodeIp: "192.168.0.11",
  nodeIpGiven: false,
  nodeIpMissing: false,
  externalIp: "198.51.101.11",
  args: "[]",
  env: "{}",
};

describe("the stand-in", () => {
  for (const [version, gen] of [
    ["v1.17.6+k3s1", "old"],
    ["v1.22.17+k3s1", "old"],
    ["v1.26.0+k3s1", "modern"],
    ["v1.36.2+k3s1", "modern"],
  ] as const) {
    test(`treats ${version} as ${gen}`, () => assert.equal(generation(version), gen));
  }
  for (const version of ["v1.16.1", "v1.24.4+k3s1", "latest", ""])
    test(`refuses the version "${version}"`, () => assert.throws(() => generation(version)));
  test("prints its version as recorded", () => {
    assert.equal(versionText("v1.17.6+k3s1"), "k3s version v1.17.6+k3s1 (bd7fb4b0)\n");
    assert.equal(versionText("v1.36.3+k3s1"), "k3s version v1.36.3+k3s1 (66a14f0e)\ngo version go1.26.8\n");
  });
});

describe("the stand-in's flags", () => {
  const counts: [Generation, string, number][] = [
    ["old", "server", 54],
    ["old", "agent", 22],
    ["modern", "server", 112],
    ["modern", "agent", 44],
  ];
  for (const [gen, command, least] of counts) {
    test(`include all those in the recorded help: ${gen} ${command}`, () => {
      const lines = fixture(`k3s-${command}-help-${gen === "old" ? "v1.17.6" : "v1.36.3"}.txt`)
        .split("\n")
        .filter((l) => /^ {3}-/.test(l));
      const names = flagTable(gen, command).flatMap((f) => f.names);
      for (const line of lines) assert.ok(names.includes(/^ {3}-+([a-z0-9-]+)/.exec(line)![1]!), line);
      assert.ok(lines.length >= least, `${lines.length} flags`);
    });
  }
  const has = (gen: Generation, command: string, name: string): boolean =>
    flagTable(gen, command).some((f) => f.names.includes(name));
  test("differ between the generations", () => {
    assert.ok(has("old", "server", "no-deploy") && !has("modern", "server", "no-deploy"));
    assert.ok(
      has("modern", "server", "flannel-external-ip") &&
        !has("modern", "agent", "flannel-external-ip") &&
        !has("old", "server", "flannel-external-ip"),
    );
  });

  const values = (gen: Generation, command: string, args: string[], env = {}): unknown => {
    const parsed = parseFlags(gen, command, args, env);
    return "error" in parsed ? parsed.error : parsed.values;
  };
  const cases: {
    name: string;
    gen: Generation;
    args: string[];
    env?: Record<string, string>;
    want: unknown;
  }[] = [
    { name: "a value as the next word", gen: "old", args: ["--tls-san", "x"], want: { "tls-san": ["x"] } },
    {
      name: "a value after =",
      gen: "modern",
      args: ["--tls-san=x", "--tls-san", "y"],
      want: { "tls-san": ["x", "y"] },
    },
    { name: "one dash instead of two", gen: "old", args: ["-tls-san=x"], want: { "tls-san": ["x"] } },
    {
      name: "short names",
      gen: "modern",
      args: ["-t", "secret", "-i", "1.2.3.4"],
      want: { token: ["secret"], "node-ip": ["1.2.3.4"] },
    },
    {
      name: "a boolean without a value",
      gen: "modern",
      args: ["--flannel-external-ip"],
      want: { "flannel-external-ip": ["true"] },
    },
    {
      name: "a boolean with =",
      gen: "modern",
      args: ["--flannel-external-ip=false"],
      want: { "flannel-external-ip": [""] },
    },
    {
      name: "an invalid boolean",
      gen: "modern",
      args: ["--flannel-external-ip=maybe"],
      want: `invalid boolean value "maybe" for -flannel-external-ip: parse error`,
    },
    {
      name: "an unknown flag",
      gen: "old",
      args: ["--nonsense"],
      want: "flag provided but not defined: -nonsense",
    },
    {
      name: "--no-deploy, which was removed",
      gen: "modern",
      args: ["--no-deploy", "servicelb"],
      want: "flag provided but not defined: -no-deploy",
    },
    { name: "a missing value", gen: "old", args: ["--tls-san"], want: "flag needs an argument: -tls-san" },
    {
      name: "a stray word, which is skipped",
      gen: "old",
      args: ["--kube-proxy-arg", "proxy-mode=ipvs", "masquerade-all=true", "--kube-proxy-arg", "b=c"],
      want: { "kube-proxy-arg": ["proxy-mode=ipvs", "b=c"] },
    },
    {
      name: "a stray word, which ends the flags",
      gen: "modern",
      args: ["--kube-proxy-arg", "proxy-mode=ipvs", "masquerade-all=true", "--tls-san", "x"],
      want: { "kube-proxy-arg": ["proxy-mode=ipvs"] },
    },
    {
      name: "values in the environment",
      gen: "modern",
      args: [],
      env: { K3S_URL: "https://a:6443", K3S_TOKEN: "t", K3S_NODE_NAME: "n", HOME: "/" },
      want: { server: ["https://a:6443"], token: ["t"], "node-name": ["n"] },
    },
    {
      name: "a flag that overrides the environment",
      gen: "old",
      args: ["--token", "a"],
      env: { K3S_TOKEN: "b" },
      want: { token: ["a"] },
    },
  ];
  for (const { name, gen, args, env, want } of cases)
    test(`are parsed as in ${gen} k3s: ${name}`, () =>
      assert.deepEqual(values(gen, "server", args, env), want));

  test("lead to the help if one is wrong", () => {
    for (const gen of generations) {
      const text = incorrectUsage(gen, "agent", "flag provided but not defined: -x");
      assert.match(
        text,
        /^Incorrect Usage: flag provided but not defined: -x\n\nNAME:\n {3}k3s agent - Run node agent\n/,
      );
      assert.equal(/COMMANDS:\n {3}help, h/.test(text), gen === "modern");
    }
  });
  test("are split at = and masked in the annotation node-args", () => {
    assert.equal(
      nodeArgs(["agent", "--node-ip=1.2.3.4", "--token", "secret", "--kube-proxy-arg", "proxy-mode=ipvs"]),
      `["agent","--node-ip","1.2.3.4","--token","********","--kube-proxy-arg","proxy-mode","ipvs"]`,
    );
  });
});

describe("the stand-in's messages", () => {
  const hash = "0".repeat(64);
  const lines = Object.fromEntries(
    fixture("k3s-messages.txt")
      .trim()
      .split("\n")
      .map((l) => l.split("\t"))
      .map(([gen, what, line]) => [`${gen} ${what}`, line]),
  );
  const says: Record<string, [string, string]> = {
    "old wrong password": ["error", words.unauthorized("https://127.0.0.1:36007")],
    "old wrong CA hash": [
      "error",
      words.wrongCa("old", hash, "ecf69351c0d915d89f6fc79f180da4b817f83ef81436dd25a8c7d297ab0b63cf"),
    ],
    "old unreachable": [
      "error",
      words.noCa(
        "old",
        "https://127.0.0.1:41835/cacerts",
        words.got("https://127.0.0.1:41835/cacerts", words.reset(54054, "127.0.0.1:41835")),
      ),
    ],
    "old hostname taken": ["error", words.waiting("old", words.rejected("old", ""))],
    "old http URL": ["error", words.connecting("old", "", words.scheme("http://127.0.0.1:38287"))],
    "old no token": ["fatal", words.ending("old", "--token is required")],
    "old started twice": [
      "fatal",
      words.ending("old", words.portTaken("old", ":6443", "address already in use")),
    ],
    "old wrong backend": ["fatal", words.unknownBackend("old", "wireguard-native")],
    "old unknown flag": ["fatal", words.ending("old", "flag provided but not defined: -nonsense")],
    "modern wrong password": ["info", words.waiting("modern", words.noConfig("not authorized"))],
    "modern wrong CA hash": [
      "error",
      words.connecting(
        "modern",
        "https://198.51.100.21:6443",
        words.wrongCa("modern", hash, "db875ee8f10869e800d4427e920663f5a79e67d0c5ce87d079ea1379e0b48b69"),
      ),
    ],
    "modern unreachable": [
      "error",
      words.connecting(
        "modern",
        "https://198.51.100.99:6443",
        words.noCa(
          "modern",
          "",
          words.got("https://127.0.0.1:6444/cacerts", words.reset(40134, "127.0.0.1:6444")),
        ),
      ),
    ],
    "modern hostname taken": [
      "info",
      words.waiting("modern", words.rejected("modern", "/var/lib/rancher/k3s/agent/serving-kubelet.crt")),
    ],
    "modern http URL": [
      "error",
      words.connecting("modern", "http://192.168.0.12:6443", words.scheme("http://127.0.0.1:6444")),
    ],
    "modern no token": ["fatal", words.ending("modern", "--token is required")],
    "modern malformed token": [
      "error",
      words.connecting("modern", "https://192.168.0.12:6443", words.FORMAT.modern),
    ],
    "modern no default route": [
      "fatal",
      words.ending("modern", `failed to get node name and addresses: ${words.NO_ROUTE}`),
    ],
    "modern another token": ["fatal", words.ending("modern", words.otherToken)],
    "modern wrong backend": ["error", words.asksShutdown(words.unknownBackend("modern", "wireguard"))],
    "modern no WireGuard": ["error", words.asksShutdown(`flannel exited: ${words.noWireguard}`)],
    "modern unknown flag": ["fatal", words.ending("modern", "flag provided but not defined: -not-a-flag")],
    "old cgroup v2": ["fatal", words.ending("old", words.noMemory)],
    "modern cgroup v1": ["error", words.asksShutdown(words.noCgroup1)],
    "modern no memory cgroup": ["fatal", words.ending("modern", words.noController("memory"))],
  };
  test("include every recorded one", () =>
    assert.deepEqual(Object.keys(says).sort(), Object.keys(lines).sort()));
  for (const [what, [level, message]] of Object.entries(says)) {
    test(`are as recorded: ${what}`, () =>
      assert.equal(
        logLine(level, message)
          .replace(/^time="[^"]+" /, "")
          .trimEnd(),
        lines[what],
      ));
  }
  test("are not quoted if they are a single word", () =>
    assert.match(logLine("fatal", "Interrupted"), /msg=Interrupted\n$/));
});

describe("with cgroup", () => {
  const all = ["cpuset", "cpu", "io", "memory", "pids"];
  const ends: [version: string, controllers: string[] | undefined, fault: string | undefined][] = [
    ["v1.17.6+k3s1", all, words.noMemory],
    ["v1.20.2+k3s1", all, words.noMemory],
    ["v1.20.4+k3s1", all, undefined],
    ["v1.36.3+k3s1", all, undefined],
    ["v1.36.3+k3s1", ["cpu", "memory"], words.noController("cpuset")],
    ["v1.22.17+k3s1", ["cpu", "cpuset"], words.noController("memory")],
    ["v1.17.6+k3s1", undefined, undefined],
    ["v1.36.3+k3s1", undefined, undefined],
  ];
  for (const [version, controllers, fault] of ends)
    test(`${controllers ? `v2 and ${controllers}` : "v1"}, ${version} ${fault ? "exits" : "keeps running"}`, () =>
      assert.equal(cgroupFault(version, controllers), fault));

  const kubelets: [
    version: string,
    args: string[],
    controllers: string[] | undefined,
    fault: string | undefined,
  ][] = [
    ["v1.36.3+k3s1", [], undefined, words.noCgroup1],
    ["v1.35.0+k3s1", ["max-pods=50"], undefined, words.noCgroup1],
    ["v1.34.2+k3s1", [], undefined, undefined],
    ["v1.17.6+k3s1", [], undefined, undefined],
    ["v1.36.3+k3s1", [], all, undefined],
    ["v1.36.3+k3s1", ["fail-cgroupv1=false"], undefined, undefined],
    ["v1.36.3+k3s1", ["fail-cgroupv1=true", "fail-cgroupv1=0"], undefined, undefined],
    ["v1.36.3+k3s1", ["fail-cgroupv1=false", "fail-cgroupv1"], undefined, words.noCgroup1],
    ["v1.31.14+k3s1", ["fail-cgroupv1=true"], undefined, words.noCgroup1],
    ["v1.30.14+k3s2", ["fail-cgroupv1=false"], undefined, words.unknownKubeletFlag("fail-cgroupv1")],
  ];
  for (const [version, args, controllers, fault] of kubelets)
    test(`${controllers ? "v2" : "v1"}, the kubelet of ${version} with "${args}" ${fault ? "exits" : "keeps running"}`, () =>
      assert.equal(kubeletFault(version, { "kubelet-arg": args }, controllers), fault));
});

describe("a token", () => {
  const ca = "a".repeat(64);
  for (const gen of generations) {
    test(`of ${gen} k3s is parsed with and without the CA's hash`, () => {
      assert.deepEqual(parseToken(gen, `K10${ca}::server:pass:word`), {
        caHash: ca,
        user: "server",
        password: "pass:word",
      });
      assert.equal(parseToken(gen, "password").password, "password");
      assert.equal(parseToken(gen, "password").caHash, "");
    });
    test(`of ${gen} k3s is refused if it is malformed`, () =>
      assert.throws(() => parseToken(gen, "K10zz"), { message: words.FORMAT[gen] }));
  }
  test("is reduced to its password in every notation", () => {
    assert.equal(passwordOf(`K10${ca}::server:pw`), "pw");
    assert.equal(passwordOf("pw\n"), "pw");
    // Without K10 all of it is the password, as in parseToken of pkg/clientaccess.
    assert.equal(passwordOf("server:pw"), "server:pw");
  });
});

describe("a node", () => {
  const keys = (o: object): string[] => Object.keys(o).sort();
  for (const gen of generations) {
    test(`of ${gen} k3s has the recorded keys`, () => {
      const real = recorded(gen),
        node = newNode(gen, VERSION[gen], facts, machine);
      const marks = addressMarks(gen, facts);
      Object.assign(
        node.metadata.annotations,
        marks.annotations,
        flannelAnnotations(gen, gen === "old" ? { [OVERWRITE]: "198.51.101.11" } : {}, {
          ifaceIp: "192.168.0.11",
          externalIp: facts.externalIp,
          useExternal: true,
          backend: gen === "old" ? "wireguard" : "wireguard-native",
          publicKey: "key=",
        }),
      );
      if (gen === "old") node.metadata.annotations[OVERWRITE] = "198.51.101.11";
      Object.assign(node.metadata.labels, marks.labels);
      node.status.addresses = cloudAddresses(gen, node);
      const noise = ["k3s.io/node-config-hash", "node-role.kubernetes.io/control-plane"];
      const known = (o: object): string[] => keys(o).filter((k) => !noise.includes(k));
      assert.deepEqual(known(node.metadata.annotations), known(real.metadata.annotations));
      assert.deepEqual(known(node.metadata.labels), known(real.metadata.labels));
      assert.deepEqual(keys(node.spec), keys(real.spec));
      assert.deepEqual(keys(node.status.nodeInfo as object), keys(real.status.nodeInfo as object));
      assert.deepEqual(keys(node.status.capacity as object), keys(real.status.capacity as object));
      assert.deepEqual(
        node.status.addresses.map((a) => a.type),
        real.status.addresses.map((a) => a.type),
      );
      const conditions = [...(gen === "old" ? [flannelCondition()] : []), ...kubeletConditions(true)];
      const still = (c: object): object => ({ ...c, lastHeartbeatTime: "", lastTransitionTime: "" });
      assert.deepEqual(conditions.map(still), real.status.conditions.map(still));
      for (const key of keys(node.status)) assert.ok(key in real.status, key);
      for (const name of ["backend-type", "kube-subnet-manager"].map((n) => `flannel.alpha.coreos.com/${n}`))
        assert.equal(node.metadata.annotations[name], real.metadata.annotations[name]);
    });
    test(`of ${gen} k3s, as recorded, is a WireGuard peer`, () => {
      const real = recorded(gen),
        found = peer(gen, real)!;
      assert.equal(
        found.endpoint,
        `${real.metadata.annotations["flannel.alpha.coreos.com/public-ip"]}:51820`,
      );
      assert.equal(found.allowed, real.spec.podCIDR);
      assert.match(found.key, /^[A-Za-z0-9+/]{43}=$/);
      assert.equal(peer(gen === "old" ? "modern" : "old", real), undefined);
    });
  }

  const own = { ifaceIp: "192.168.0.11", externalIp: "198.51.100.11", publicKey: "k=" };
  const publicIp = "flannel.alpha.coreos.com/public-ip";
  const rules: {
    name: string;
    gen: Generation;
    have: Record<string, string>;
    external?: false;
    useExternal: boolean;
    ip: string;
    overwrite: string | null | undefined;
  }[] = [
    {
      name: "of v1.17 has the interface's address",
      gen: "old",
      have: {},
      useExternal: false,
      ip: "192.168.0.11",
      overwrite: undefined,
    },
    {
      name: "of v1.17 has the address of an overwrite annotation",
      gen: "old",
      have: { [OVERWRITE]: "198.51.100.9" },
      useExternal: false,
      ip: "198.51.100.9",
      overwrite: undefined,
    },
    {
      name: "of modern k3s gets an overwrite annotation",
      gen: "modern",
      have: {},
      useExternal: true,
      ip: "198.51.100.11",
      overwrite: "198.51.100.11",
    },
    {
      name: "of modern k3s has a manual overwrite annotation corrected",
      gen: "modern",
      have: { [OVERWRITE]: "1.2.3.4" },
      useExternal: true,
      ip: "198.51.100.11",
      overwrite: "198.51.100.11",
    },
    {
      name: "of modern k3s loses an overwrite annotation without the flag",
      gen: "modern",
      have: { [OVERWRITE]: "198.51.100.11" },
      useExternal: false,
      ip: "192.168.0.11",
      overwrite: null,
    },
    {
      name: "of modern k3s gets no overwrite annotation without the flag",
      gen: "modern",
      have: {},
      useExternal: false,
      ip: "192.168.0.11",
      overwrite: undefined,
    },
    {
      name: "of modern k3s without an external address has the interface's",
      gen: "modern",
      have: {},
      external: false,
      useExternal: true,
      ip: "192.168.0.11",
      overwrite: undefined,
    },
    {
      name: "of modern k3s that had an external address keeps it in the overwrite annotation",
      gen: "modern",
      have: { [OVERWRITE]: "198.51.100.11" },
      external: false,
      useExternal: true,
      ip: "198.51.100.11",
      overwrite: undefined,
    },
  ];
  for (const { name, gen, have, external = true, useExternal, ip, overwrite } of rules) {
    test(name, () => {
      const patch = flannelAnnotations(gen, have, {
        ...own,
        ...(external ? {} : { externalIp: undefined }),
        useExternal,
        backend: gen === "old" ? "wireguard" : "wireguard-native",
      });
      assert.equal(patch[publicIp], ip);
      assert.equal(patch[OVERWRITE], overwrite);
    });
  }

  for (const gen of generations) {
    /** Of the node after k3s has started with these facts, at the cloud controller's next round or before it. */
    const started = (node: Node, own: Facts, round: boolean): string[] => {
      const { labels, annotations } = addressMarks(gen, own);
      Object.assign(node.metadata.labels, labels);
      Object.assign(node.metadata.annotations, annotations);
      node.status.addresses = cloudAddresses(gen, node, round);
      return node.status.addresses
        .filter(({ type }) => type !== "Hostname")
        .map(({ type, address }) => `${type} ${address}`);
    };
    const home = { ...facts, nodeIp: "10.42.1.0", nodeIpGiven: true, externalIp: undefined };
    const fresh = (own: Facts): Node => newNode(gen, VERSION[gen], own, machine);

    test(`of ${gen} k3s has its internal address at once, and a changed one from the cloud controller's next round on`, () => {
      const node = fresh({ ...home, nodeIp: "192.168.0.11" });
      assert.deepEqual(started(node, { ...home, nodeIp: "192.168.0.11" }, false), [
        "InternalIP 192.168.0.11",
      ]);
      assert.deepEqual(started(node, home, false), ["InternalIP 192.168.0.11"]);
      assert.deepEqual(started(node, home, true), ["InternalIP 10.42.1.0"]);
    });
    test(`of ${gen} k3s keeps an external address that it is no longer given`, () => {
      const node = fresh(facts);
      const both = ["InternalIP 192.168.0.11", "ExternalIP 198.51.101.11"];
      assert.deepEqual(started(node, facts, true), both);
      assert.deepEqual(started(node, home, true), ["InternalIP 10.42.1.0", both[1]]);
      assert.deepEqual(started(fresh(home), home, true), ["InternalIP 10.42.1.0"]);
    });
  }

  test("of v1.17 registers without addresses if no interface has --node-ip", () => {
    assert.deepEqual(
      newNode("old", VERSION.old, { ...facts, nodeIpMissing: true }, machine).status.addresses,
      [],
    );
    assert.equal(newNode("old", VERSION.old, facts, machine).status.addresses[0]!.address, "192.168.0.11");
  });
  test("gets the lowest free pod network", () => {
    assert.equal(podCidr("10.42.0.0/16", []), "10.42.0.0/24");
    assert.equal(podCidr("10.42.0.0/16", ["10.42.0.0/24", "10.42.2.0/24"]), "10.42.1.0/24");
  });
  test("is changed by merge patches", () => {
    assert.deepEqual(mergePatch({ a: { b: "1", c: "2" }, d: 1 }, { a: { b: null, e: "3" }, d: undefined }), {
      a: { c: "2", e: "3" },
      d: 1,
    });
  });
  test("that is a server has a certificate with the expected names", () => {
    const old = servingNames("old", { "node-external-ip": ["198.51.100.11"] }, "a1", "192.168.0.11");
    assert.deepEqual(old, {
      dns: ["kubernetes", "kubernetes.default", "kubernetes.default.svc.cluster.local", "localhost"],
      ips: ["10.43.0.1", "127.0.0.1", "192.168.0.11", "198.51.100.11"],
    });
    const modern = servingNames("modern", { "node-external-ip": ["198.51.100.21"] }, "a1", "192.168.0.11");
    assert.deepEqual(modern.dns, [
      "a1",
      "kubernetes",
      "kubernetes.default",
      "kubernetes.default.svc",
      "kubernetes.default.svc.cluster.local",
      "localhost",
    ]);
    assert.deepEqual(modern.ips, ["10.43.0.1", "127.0.0.1", "192.168.0.11", "198.51.100.21", "::1"]);
  });
  test("uses the interface of the default route", () => {
    const routes =
      "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\nwlan0\t00000000\t0100A8C0\t0003\t0\t0\t600\t00000000\neth0\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\neth0\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\n";
    assert.equal(defaultInterface(routes), "eth0");
    assert.equal(defaultInterface(routes.split("\n")[0]), undefined);
  });
});

describe("authorization", () => {
  const kubelet: User = { name: "system:node:b1", groups: ["system:nodes"] };
  const controller: User = { name: "system:k3s-controller", groups: [] };
  const admin: User = { name: "system:admin", groups: ["system:masters"] };
  const joiner: User = { name: "node", groups: ["k3s:agent"] };
  const nodes = (verb: Ask["verb"], name?: string, subresource?: string): Ask => ({
    verb,
    resource: "nodes",
    name,
    subresource,
  });
  const cases: [string, User, Ask, Record<Generation, boolean>][] = [
    ["a kubelet lists nodes", kubelet, nodes("list"), { old: true, modern: false }],
    [
      "a kubelet lists itself",
      kubelet,
      { ...nodes("list"), fieldSelector: "metadata.name=b1" },
      { old: true, modern: true },
    ],
    ["a kubelet reads itself", kubelet, nodes("get", "b1"), { old: true, modern: true }],
    ["a kubelet reads another", kubelet, nodes("get", "a1"), { old: true, modern: false }],
    ["a kubelet changes itself", kubelet, nodes("patch", "b1"), { old: true, modern: true }],
    ["a kubelet changes another", kubelet, nodes("patch", "a1"), { old: false, modern: false }],
    ["a kubelet deletes itself", kubelet, nodes("delete", "b1"), { old: false, modern: false }],
    [
      "a kubelet reads deployments",
      kubelet,
      { verb: "list", resource: "deployments", group: "apps" },
      { old: false, modern: false },
    ],
    [
      "a kubelet reads a service",
      kubelet,
      { verb: "get", resource: "services", namespace: "default", name: "kubernetes" },
      { old: true, modern: true },
    ],
    ["k3s-controller lists nodes", controller, nodes("list"), { old: false, modern: true }],
    ["k3s-controller reads a node", controller, nodes("get", "a1"), { old: true, modern: true }],
    ["k3s-controller changes a node", controller, nodes("patch", "a1"), { old: false, modern: false }],
    [
      "k3s-controller changes a status",
      controller,
      nodes("patch", "a1", "status"),
      { old: false, modern: true },
    ],
    ["the token's user lists nodes", joiner, nodes("list"), { old: false, modern: false }],
    ["the admin deletes a node", admin, nodes("delete", "a1"), { old: true, modern: true }],
  ];
  for (const [name, user, ask, may] of cases) {
    for (const gen of generations)
      test(`${may[gen] ? "allows" : "denies"} that ${name}, in ${gen} k3s`, () =>
        assert.equal(forbidden(gen, user, ask) === undefined, may[gen]));
  }
  test("denies that a kubelet gives itself a role", () => {
    assert.deepEqual(
      forbiddenLabels(
        { "kubernetes.io/os": "linux" },
        {
          "kubernetes.io/os": "linux",
          "node-role.kubernetes.io/master": "true",
          "k3s.io/internal-ip": "1.2.3.4",
        },
      ),
      ["node-role.kubernetes.io/master"],
    );
  });
});

describe("metrics-server", () => {
  const addresses = [
    { type: "InternalIP", address: "192.168.0.11" },
    { type: "ExternalIP", address: "198.51.100.11" },
    { type: "Hostname", address: "a1" },
  ];
  const defaults: [Generation, boolean, string][] = [
    ["old", false, "a1"],
    ["modern", false, "192.168.0.11"],
    ["modern", true, "198.51.100.11"],
  ];
  for (const [gen, external, want] of defaults) {
    test(`of ${gen} k3s${external ? " with --flannel-external-ip" : ""} queries ${want}`, () => {
      const s = settings(readDeployment(packaged(gen, external))!);
      assert.equal(s.insecure, false);
      assert.equal(metricsAddress(s.types, addresses)!.address, want);
    });
  }
  test("of modern k3s with --flannel-external-ip queries the internal address of a node without an external one", () => {
    const deployment = readDeployment(packaged("modern", true));
    assert.ok(deployment);
    const home = [
      { type: "InternalIP", address: "10.42.1.0" },
      { type: "Hostname", address: "h1" },
    ];
    assert.equal(metricsAddress(settings(deployment).types, home)?.address, "10.42.1.0");
  });
  test("queries no address if the node has none of its types", () =>
    assert.equal(metricsAddress(["ExternalDNS"], addresses), undefined));
  test("reads command and args in every form", () => {
    const own = packaged("old", false).replace(
      "        volumeMounts:",
      `        command:\n          - /metrics-server\n          - "--kubelet-insecure-tls"  # why\n        args: ["--v=2", --kubelet-preferred-address-types=ExternalIP]\n        volumeMounts:`,
    );
    const found = readDeployment(own)!;
    assert.deepEqual(found.args, [
      "/metrics-server",
      "--kubelet-insecure-tls",
      "--v=2",
      "--kubelet-preferred-address-types=ExternalIP",
    ]);
    assert.deepEqual(settings(found), { types: ["ExternalIP"], insecure: true });
    const json = {
      kind: "Deployment",
      metadata: { name: "metrics-server", namespace: "kube-system" },
      spec: {
        template: { spec: { containers: [{ image: "x:v0.9.0", args: ["--kubelet-insecure-tls=false"] }] } },
      },
    };
    assert.equal(settings(readDeployment(JSON.stringify(json))!).insecure, false);
  });
  test("is not a deployment in another namespace or with another name", () => {
    assert.equal(
      readDeployment(packaged("old", false).replace("namespace: kube-system", "namespace: default")),
      undefined,
    );
    assert.equal(
      readDeployment(packaged("old", false).replace("  name: metrics-server\n", "  name: other\n")),
      undefined,
    );
  });
  test("of v0.3 refuses a flag of v0.4", () => {
    assert.match(
      settings({ image: "rancher/metrics-server:v0.3.6", args: ["--kubelet-use-node-status-port"] }).error!,
      /unknown flag/,
    );
    assert.equal(
      settings({ image: "rancher/metrics-server:v0.9.0", args: ["--kubelet-use-node-status-port"] }).error,
      undefined,
    );
  });

  const inFolder = (work: (dir: string, write: (path: string, text: string) => void) => void): void => {
    const dir = mkdtempSync(join(tmpdir(), "stand-in-test-"));
    mkdirSync(join(dir, "metrics-server"));
    const write = (path: string, text: string): void => writeFileSync(join(dir, path), text);
    write("metrics-server/metrics-server-deployment.yaml", packaged("old", false));
    try {
      work(dir, write);
    } finally {
      rmSync(dir, { recursive: true });
    }
  };
  const mine = packaged("old", false).replace("v0.3.6", "v0.3.7");
  test("is deployed from the packaged manifest", () =>
    inFolder((dir) => assert.match(deployPass(dir, new Set(), null)!.image, /v0\.3\.6/)));
  test("is not deployed from a skipped manifest, but not deleted either", () =>
    inFolder((dir, write) => {
      write("metrics-server/metrics-server-deployment.yaml.skip", "");
      assert.equal(deployPass(dir, new Set(), null), null);
      assert.deepEqual(deployPass(dir, new Set(), { image: "before", args: [] }), {
        image: "before",
        args: [],
      });
      write("own.yaml", mine);
      assert.match(deployPass(dir, new Set(), null)!.image, /v0\.3\.7/);
    }));
  test("is deployed from a manifest with a known checksum only at a start, and stays when its manifest is removed", () =>
    inFolder((dir, write) => {
      const skip = "metrics-server/metrics-server-deployment.yaml.skip";
      const addons: Record<string, string> = {};
      deployPass(dir, new Set(), null, addons);
      write(skip, "");
      write("own.yaml", mine);
      const own = deployPass(dir, new Set(), null, addons, false);
      assert.match(own!.image, /v0\.3\.7/);
      rmSync(join(dir, skip));
      rmSync(join(dir, "own.yaml"));
      assert.deepEqual(deployPass(dir, new Set(), own, addons, false), own);
      assert.match(deployPass(dir, new Set(), own, addons)!.image, /v0\.3\.6/);
      write("own.yaml", mine);
      assert.equal(deployPass(dir, new Set(), null, addons, false), null);
    }));
  test("prints the messages of v0.3.6 and of a modern release about a kubelet", () => {
    const node = { metadata: { name: "b1" }, status: { addresses } } as unknown as Node;
    const refused = Object.assign(new Error("connect"), { code: "ECONNREFUSED" });
    const other = Object.assign(new Error(), {
      code: "ERR_TLS_CERT_ALTNAME_INVALID",
      cert: { subjectaltname: "DNS:a1, IP Address:127.0.0.1" },
    });
    const nameless = Object.assign(new Error(), { ...other, cert: { subjectaltname: "DNS:a1" } });
    const said = (gen: Generation, error: Error) =>
      complaint(readDeployment(packaged(gen, true))!, node, error).replace(/^E\d{4} [\d:.]+/, "E");
    assert.equal(
      said("modern", other),
      `E       1 scraper.go:149] "Failed to scrape node" err="Get \\"https://198.51.100.11:10250/metrics/resource\\": tls: failed to verify certificate: x509: certificate is valid for a1, 127.0.0.1, not 198.51.100.11" node="b1"`,
    );
    assert.match(
      said("modern", new Error("i/o timeout")),
      /timeout to access kubelet" err=.*deadline exceeded.*timeout="10s"$/,
    );
    assert.match(
      said("old", refused),
      /manager\.go:111\] unable to fully collect metrics: unable to fully scrape metrics from source kubelet_summary:b1: unable to fetch metrics from Kubelet b1 \(a1\): Get https:\/\/a1:10250\/stats\/summary\?only_cpu_and_memory=true: dial tcp a1:10250: connect: connection refused$/,
    );
    assert.match(
      said("old", nameless),
      /: x509: cannot validate certificate for a1 because it doesn't contain any IP SANs$/,
    );
  });
  test("is deployed from the user's manifest if the packaged one is disabled, which is deleted", () =>
    inFolder((dir, write) => {
      write("own.yaml", mine);
      assert.match(deployPass(dir, new Set(["metrics-server"]), null)!.image, /v0\.3\.7/);
      assert.throws(() => statSync(join(dir, "metrics-server/metrics-server-deployment.yaml")));
    }));
  test("is deleted if it is disabled, with a user's manifest of the same name", () =>
    inFolder((dir, write) => {
      write("metrics-server.yaml", mine);
      assert.equal(deployPass(dir, new Set(["metrics-server"]), { image: "before", args: [] }), null);
      assert.throws(() => statSync(join(dir, "metrics-server.yaml")));
    }));
});

describe("kube-proxy", () => {
  const node = (name: string, podCIDR: string, labels = {}, ready = "True") =>
    ({
      metadata: { name, labels },
      spec: { podCIDR },
      status: { conditions: [{ type: "Ready", status: ready }] },
    }) as unknown as Node;
  const a1 = node("a1", "10.42.0.0/24", { "node-role.kubernetes.io/control-plane": "true" });
  const b1 = node("b1", "10.42.1.0/24");
  const api = ["198.51.100.21:6443"];

  test("of modern k3s writes the recorded rules", () => {
    const { nat } = iptables("modern", services([a1], api));
    for (const rule of [
      "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
      "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
      "-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0",
      '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
      '-A KUBE-SEP-ETQUULB6L7DIWC2R -s 198.51.100.21/32 -m comment --comment "default/kubernetes:https" -j KUBE-MARK-MASQ',
      '-A KUBE-SEP-ETQUULB6L7DIWC2R -p tcp -m comment --comment "default/kubernetes:https" -m tcp -j DNAT --to-destination 198.51.100.21:6443',
      '-A KUBE-SERVICES -d 10.43.0.1/32 -p tcp -m comment --comment "default/kubernetes:https cluster IP" -m tcp --dport 443 -j KUBE-SVC-NPX46M4PTMTKRN6Y',
      '-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS',
      '-A KUBE-SVC-NPX46M4PTMTKRN6Y ! -s 10.42.0.0/16 -d 10.43.0.1/32 -p tcp -m comment --comment "default/kubernetes:https cluster IP" -m tcp --dport 443 -j KUBE-MARK-MASQ',
      '-A KUBE-SVC-NPX46M4PTMTKRN6Y -m comment --comment "default/kubernetes:https -> 198.51.100.21:6443" -j KUBE-SEP-ETQUULB6L7DIWC2R',
    ])
      assert(nat.includes(rule), `no ${rule}`);
  });
  test("of old k3s writes the recorded rules", () => {
    const { nat, filter } = iptables("old", services([a1], api));
    for (const rule of [
      "-A KUBE-SEP-ETQUULB6L7DIWC2R -s 198.51.100.21/32 -j KUBE-MARK-MASQ",
      "-A KUBE-SEP-ETQUULB6L7DIWC2R -p tcp -m tcp -j DNAT --to-destination 198.51.100.21:6443",
      '-A KUBE-SERVICES ! -s 10.42.0.0/16 -d 10.43.0.1/32 -p tcp -m comment --comment "default/kubernetes:https cluster IP" -m tcp --dport 443 -j KUBE-MARK-MASQ',
    ])
      assert(nat.includes(rule), `no ${rule}`);
    const established =
      '-A KUBE-FORWARD -s 10.42.0.0/16 -m comment --comment "kubernetes forwarding conntrack pod source rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT';
    assert(filter.includes(established), `no ${established}`);
  });
  test("gives a service the pods of nodes that are Ready, and refuses one without", () => {
    const away = node("c1", "10.42.2.0/24", {}, "Unknown");
    const ends = (nodes: Node[]) => services(nodes, api).map(({ ip, endpoints }) => [ip, ...endpoints]);
    assert.deepEqual(ends([b1, away, a1]), [
      ["10.43.0.1", ...api],
      ["10.43.0.10", "10.42.0.2:53"],
      ["10.43.0.10", "10.42.0.2:53"],
      ["10.43.0.80", "10.42.0.2:8080", "10.42.1.2:8080"],
    ]);
    const { filter } = iptables("modern", services([b1], api));
    const refused =
      '-A KUBE-SERVICES -d 10.43.0.10/32 -p udp -m comment --comment "kube-system/kube-dns:dns has no endpoints" -m udp --dport 53 -j REJECT --reject-with icmp-port-unreachable';
    assert(filter.includes(refused), filter.join("\n"));
  });
  test("shares a service's connections evenly among its pods", () => {
    const { nat } = iptables("modern", services([a1, b1, node("b2", "10.42.2.0/24")], api));
    const shares = nat.filter((rule) => /hello:http -> /.test(rule));
    assert.deepEqual(
      shares.map((rule) => /--probability (\S+)/.exec(rule)?.[1]),
      ["0.3333333333", "0.5000000000", undefined],
    );
    assert.match(
      nftables(services([a1, b1], api)),
      /numgen random mod 2 vmap \{ 0 : goto endpoint-\S+\/8080, 1 : /,
    );
  });
});

describe("CoreDNS", () => {
  const ask = (name: string, type = 1) => {
    const labels = name
      .split(".")
      .map((label) => Buffer.from(`${String.fromCharCode(label.length)}${label}`));
    const question = [Buffer.from("12340120000100000000", "hex"), Buffer.from([0, 0])];
    const answer = dnsAnswer(Buffer.concat([...question, ...labels, Buffer.from([0, 0, type, 0, 1])]));
    return { flags: answer.readUInt16BE(2).toString(16), address: [...answer.subarray(-4)].join("."), count: answer.readUInt16BE(6) }; // biome-ignore format: a line
  };
  test("knows services by name", () => {
    const found = ask("Hello.default.svc.cluster.local");
    assert.deepEqual(found, { flags: "8580", address: "10.43.0.80", count: 1 });
    assert.equal(ask("kubernetes.default.svc.cluster.local").address, "10.43.0.1");
  });
  test("has no other address of them, and no other names", () => {
    const [ipv6, none, other] = [ask("hello.default.svc.cluster.local", 28), ask("x.default.svc.cluster.local"), ask("example.org")]; // biome-ignore format: a list
    assert.deepEqual([ipv6, none, other].map(({ flags, count }) => [flags, count]), [["8580", 0], ["8583", 0], ["8582", 0]]); // biome-ignore format: a list
  });
});

describe("kubectl", () => {
  const ages: [number, string][] = [
    [0, "0s"],
    [87, "87s"],
    [119, "119s"],
    [164, "2m44s"],
    [548, "9m8s"],
    [600, "10m"],
    [10799, "179m"],
    [10800, "3h"],
    [36000, "10h"],
    [200000, "2d"],
  ];
  for (const [seconds, want] of ages)
    test(`prints ${want} for an age of ${seconds} s`, () => assert.equal(age(seconds * 1000), want));
  test("aligns columns", () =>
    assert.equal(
      table([
        ["NAME", "AGE"],
        ["a-long-name", "3s"],
      ]),
      "NAME          AGE\na-long-name   3s\n",
    ));
  test("parses flags", () => {
    const { words: w, flags } = parseKubectl([
      "-n",
      "kube-system",
      "get",
      "deploy",
      "metrics-server",
      "-ojson",
      "--request-timeout=5s",
    ]);
    assert.deepEqual(
      [w, Object.fromEntries(flags)],
      [
        ["get", "deploy", "metrics-server"],
        { namespace: "kube-system", output: "json", "request-timeout": "5s" },
      ],
    );
    assert.throws(() => parseKubectl(["--nonsense"]), { message: "unknown flag: --nonsense" });
  });
});

describe("the binary's stand-in", () => {
  test("is a launcher with padding, and is reproducible", () => {
    const text = standIn("v1.17.6+k3s1");
    assert.match(
      text,
      /^#!\/bin\/sh\ncase .*\n'; exit ;; esac\nexec env NODE_COMPILE_CACHE=\S+ NODE_COMPILE_CACHE_PORTABLE=1 \/opt\/k3s-stand-in\/node --no-warnings \/opt\/k3s-stand-in\/k3s\.ts 'v1\.17\.6\+k3s1' "\$0" "\$@"\nexit 126\n#/,
    );
    assert.ok(text.length > 3_000_000 && text.length < 3_300_000);
    assert.equal(text, standIn("v1.17.6+k3s1"));
    assert.notEqual(text, standIn("v1.36.3+k3s1"));
  });
  for (const gen of generations)
    test(`of ${gen} k3s prints the version in its launcher`, () => {
      const file = join(temporary(), "k3s");
      writeFileSync(file, standIn(VERSION[gen]), { mode: 0o755 });
      assert.equal(shell(`exec ${file} --version`).stdout, versionText(VERSION[gen]));
    });
  test("is installed with its fixtures", () => {
    const to = boxFiles().map((f) => f.to);
    for (const name of ["k3s.ts", "fixtures/k3s-server-help-v1.17.6.txt"])
      assert.ok(to.includes(`/opt/k3s-stand-in/${name}`));
  });

  // Deno's https server cannot request client certificates, so the stand-in does not run on Deno.
  const skip = "Deno" in globalThis ? "needs node" : lacks("openssl", "curl");
  const command = (version: string, name: string, args: string[]): string[] => [
    ...process.execArgv.filter((a) => !/^--test/.test(a)),
    join(import.meta.dirname, "stand-in", "k3s.ts"),
    version,
    name,
    ...args,
  ];
  const k3s = (
    version: string,
    name: string,
    ...args: string[]
  ): { status: number | null; stdout: string; stderr: string } =>
    spawnSync(process.execPath, command(version, name, args), {
      encoding: "utf8",
      env: { PATH: process.env.PATH },
    });

  for (const gen of generations) {
    test(`of ${gen} k3s exits if a flag is wrong`, { skip }, () => {
      const ran = k3s(VERSION[gen], "/usr/local/bin/k3s", "server", "--nonsense");
      assert.equal(ran.status, 1);
      assert.equal(ran.stdout, incorrectUsage(gen, "server", "flag provided but not defined: -nonsense"));
      assert.match(ran.stderr, /level=fatal msg="(Error: )?flag provided but not defined: -nonsense"\n$/);
    });
    test(`of ${gen} k3s requires a token and a server for an agent`, { skip }, () => {
      assert.match(k3s(VERSION[gen], "k3s", "agent").stderr, /--token is required"\n$/);
      const ran = k3s(VERSION[gen], "k3s", "agent", "--token", "x");
      assert.match(ran.stderr, /--server is required"\n$/);
      assert.equal(ran.status, 1);
    });
    test(`of ${gen} k3s runs a server without an agent`, { skip }, async () => {
      const dir = mkdtempSync(join(tmpdir(), "stand-in-test-")),
        config = join(dir, "k3s.yaml"),
        port = gen === "old" ? 46443 : 46444;
      const args = [
        "server",
        "--disable-agent",
        "--data-dir",
        dir,
        "--write-kubeconfig",
        config,
        "--https-listen-port",
        String(port),
        "--node-ip",
        "127.0.0.1",
        "--bind-address",
        "127.0.0.1",
      ];
      const server = spawn(process.execPath, command(VERSION[gen], "k3s", args), {
        stdio: ["pipe", "pipe", "pipe"],
        env: { PATH: process.env.PATH },
      });
      try {
        let log = "";
        const ended = new Promise<never>((_, no) =>
          server.on("exit", (code) => no(new Error(`ended with ${code}: ${log}`))),
        );
        ended.catch(() => {});
        await Promise.race([
          ended,
          new Promise<void>((done) =>
            server.stderr.on("data", (d) => {
              log += d;
              if (/up and running/.test(log)) done();
            }),
          ),
        ]);
        assert.match(log.split("\n")[0]!, /k3s stand-in/);
        const path = (name: string): string => join(dir, "server", name),
          mode = (name: string): string => (statSync(name).mode & 0o777).toString(8);
        const token = readFileSync(path("token"), "utf8");
        assert.match(token, /^K10[0-9a-f]{64}::server:[0-9a-f]{32}\n$/);
        assert.equal(token.length, 109);
        assert.equal(
          token.slice(3, 67),
          createHash("sha256")
            .update(readFileSync(path("tls/server-ca.crt")))
            .digest("hex"),
        );
        assert.deepEqual(
          [
            mode(path("token")),
            mode(config),
            mode(path("")),
            mode(path("tls/server-ca.key")),
            mode(path("tls/server-ca.crt")),
          ],
          ["600", "600", "700", "600", "644"],
        );
        assert.ok(lstatSync(path("node-token")).isSymbolicLink());
        assert.equal(readlinkSync(path("node-token")), path("token"));
        assert.equal(
          k3s(VERSION[gen], "/usr/local/bin/kubectl", "--kubeconfig", config, "get", "nodes").stderr,
          "No resources found\n",
        );
        // As check queries it: by curl, with the key in the server's own file.
        const api = API.replaceAll("/var/lib/rancher/k3s/server/tls", path("tls")).replaceAll(
          "/etc/rancher/k3s/k3s.yaml",
          config,
        );
        const asked = shell(`${api}\napi GET '/api/v1/nodes?pretty=false'; api GET /api/v1/nodes/nope`);
        assert.equal(JSON.parse(asked.stdout).kind, "NodeList", asked.stderr);
        assert.match(asked.stderr, /^404 .*nodes \\?"nope\\?" not found/m);
        // A watch returns a node's state, then each change immediately, and nothing else until its time limit.
        const patient = WATCH.replace(API, api);
        const made = {
          metadata: { name: "w1", labels: {}, annotations: {} },
          spec: {},
          status: { conditions: [], addresses: [] },
        };
        const said = shell(`${patient}
turn() { began=$(date +%s%N); changed w1 "$1"; echo "$((($(date +%s%N) - began) / 1000000)) \${node%% boot*}"; }
patch() { ${CURL} -X PATCH -H 'Content-Type: application/merge-patch+json' -d "$1" "$apiurl/api/v1/nodes/w1"; }
turn 1
{ sleep 1; echo '${JSON.stringify(made)}' | api POST /api/v1/nodes; } >/dev/null &
turn 9; turn 1
{ sleep 1; patch '{"spec":{"unschedulable":true}}'; } >/dev/null &
turn 9
{ sleep 1; api DELETE /api/v1/nodes/w1; } >/dev/null &
turn 9; turn 1
watch() { ${CURL} -m 5 "$apiurl/api/v1/nodes?watch=1&$1"; }
watch timeoutSeconds=1; watch resourceVersion=1`);
        const took = said.stdout.split("\n").map((line) => Number(/^\d+/.exec(line)?.[0]));
        assert.deepEqual(
          said.stdout.split("\n").slice(0, 6).map((line) => line.replace(/^\d+ /, "")),
          ["", "w1 NotReady", "w1 NotReady", "w1 NotReady,SchedulingDisabled", "", ""],
          said.stdout + said.stderr,
        ); // biome-ignore format: a list
        for (const [i, ms] of [1000, 1000, 1000, 1000, 1000, 1000].entries())
          assert.ok(took[i]! >= ms - 300 && took[i]! < 5000, said.stdout);
        assert.match(
          said.stdout,
          /\n\{"type":"ERROR","object":\{"kind":"Status",.*"message":"too old resource version: 1 \(\d+\)","reason":"Expired","code":410\}\}\n$/,
        );
        const missing = k3s(
          VERSION[gen],
          "k3s",
          "kubectl",
          "--kubeconfig",
          config,
          "get",
          "node",
          "nope",
          "-o",
          "json",
        );
        assert.deepEqual(
          [missing.status, missing.stderr],
          [1, `Error from server (NotFound): nodes "nope" not found\n`],
        );
        const code = (path: string, user?: string): string =>
          spawnSync(
            "curl",
            [
              "-sk",
              "-o",
              "/dev/null",
              "-w",
              "%{http_code}",
              ...(user ? ["-u", user] : []),
              `https://127.0.0.1:${port}${path}`,
            ],
            { encoding: "utf8" },
          ).stdout;
        const good = `node:${token.trim().slice(-32)}`,
          own = gen === "old" ? "/v1-k3s/config" : "/v1-k3s/readyz";
        const paths = ["/cacerts", "/ping", "/healthz", "/apis"];
        assert.deepEqual(
          paths.map((p) => code(p)),
          ["200", "200", "401", "401"],
        );
        assert.deepEqual(
          paths.map((p) => code(p, good)),
          gen === "old" ? ["200", "200", "200", "200"] : ["200", "200", "401", "401"],
        );
        assert.deepEqual(
          [code(own), code(own, "node:wrong"), code(own, good)],
          gen === "old" ? ["401", "401", "200"] : ["403", "401", "200"],
        );
        const twice = k3s(VERSION[gen], "k3s", ...args.map((a) => (a === dir ? `${dir}2` : a)));
        assert.match(
          twice.stderr,
          new RegExp(`listen tcp 127.0.0.1:${port}: bind: address already in use"\\n$`),
        );
      } finally {
        server.removeAllListeners("exit");
        server.kill();
        await new Promise((done) =>
          server.exitCode !== null || server.signalCode ? done(0) : server.on("exit", done),
        );
        for (const d of [dir, `${dir}2`]) rmSync(d, { recursive: true, force: true });
      }
    });
  }
});

test("changes of a node by two servers of one datastore at the same time are both kept", () => {
  const before = { spec: { cordoned: true }, status: { beat: 1, list: [1] }, mark: "x" };
  const there = { ...before, status: { beat: 2, list: [1] } };
  assert.deepEqual(patched(there, before, { spec: {}, status: { beat: 1, list: [1, 2] } }), {
    spec: {},
    status: { beat: 2, list: [1, 2] },
  });
});

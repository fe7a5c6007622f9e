import assert from "node:assert/strict";
import { mkdirSync, writeFileSync } from "node:fs";
import { describe, test } from "node:test";
import fc from "fast-check";
import { nodeNameOf } from "../lib/k3s/identity.ts";
import {
  clusterLook,
  DRAINED,
  NODES,
  nodesLook,
  nodesOf,
  overload,
  peersOf,
  SHAPE,
  silence,
} from "../lib/k3s/nodes.ts";
import { healthProblems, onCard } from "../lib/k3s/service.ts";
import { argsOf, type Generation, generationOf, releaseOf, unitOf, unitText } from "../lib/k3s/unit.ts";
import type { Settings } from "../lib/settings.ts";
import { diff } from "../lib/text.ts";
import {
  A1,
  B1,
  fixture,
  IP,
  lacks,
  look,
  MODERN,
  NOW,
  nodes,
  OLD,
  prepared,
  programs,
  service,
  shell,
  temporary,
  wanted,
} from "./helpers.ts";

describe("the generation of a release", () => {
  const both = "--flannel-backend\n--flannel-external-ip\nwireguard-native";
  const cases: [version: string, flags: string | undefined, generation: Generation | undefined][] = [
    ["v1.17.6+k3s1", undefined, "old"],
    ["v1.22.17+k3s1", undefined, "old"],
    ["v1.23.17+k3s1", undefined, undefined],
    ["v1.24.1+k3s1", undefined, undefined],
    ["v1.24.1+k3s1", "wireguard-native", "old"],
    ["v1.24.17+k3s1", "--flannel-external-ip", "old"],
    ["v1.24.17+k3s1", both, "modern"],
    ["v1.25.3+k3s1", both, "modern"],
    ["v1.26.0+k3s1", undefined, "modern"],
    ["v1.36.2+k3s1", undefined, "modern"],
  ];
  for (const [version, flags, generation] of cases)
    test(`is ${generation ?? "not known yet"} for ${version} ${flags ? `whose help has ${flags.replaceAll("\n", " and ")}` : "without its help"}`, () =>
      assert.equal(generationOf(version, flags), generation));

  test("is that of the version of K3S_BIN if it is set, whatever K3S_VERSION is", () => {
    const want = wanted({ K3S_BIN: "./k3s", K3S_VERSION: MODERN });
    assert.deepEqual(releaseOf(want, prepared(OLD)), { version: OLD, generation: "old" });
  });

  test("is not determined by the help of another release than the requested one", () => {
    const want = wanted({ K3S_VERSION: "v1.24.17+k3s1" });
    assert.deepEqual(releaseOf(want, prepared("v1.25.3+k3s1", { flags: both })), {
      version: "v1.24.17+k3s1",
    });
    assert.equal(releaseOf(want, prepared("v1.24.17+k3s1", { flags: both })).generation, "modern");
  });
});

const RELEASES = [
  { generation: "old", help: "v1.17.6" },
  { generation: "modern", help: "v1.36.3" },
] as const;
const ROLES = ["server", "agent"] as const;
const MODES = ["iptables", "ipvs", "nftables"];

describe("the arguments of k3s", () => {
  for (const { generation, help } of RELEASES)
    for (const role of ROLES)
      test(`of the ${generation} ${role} are all flags that ${help} accepts`, () => {
        const known = new Set(fixture(`k3s-${role}-help-${help}.txt`).match(/--[a-z][a-z-]*/g));
        for (const mode of MODES)
          for (const arg of argsOf(role, generation, wanted(), mode, "a1")) {
            const [, flag = "", value] = /^(--[a-z-]+)(?:=(\S+))?$/.exec(arg) ?? [];
            assert.ok(known.has(flag), `${arg} of a ${generation} ${role}`);
            if (flag !== "--flannel-external-ip")
              assert.ok(value, `${arg} has its value with it, not after it`);
          }
      });

  test("contain no flags that a generation does not have", () => {
    const old = argsOf("server", "old", wanted(), "iptables", "a1").join(" ");
    const modern = argsOf("server", "modern", wanted(), "iptables", "a1").join(" ");
    assert.doesNotMatch(old, /native|flannel-external-ip/);
    assert.doesNotMatch(modern, /no-deploy|backend=wireguard(?!-native)/);
  });

  test("of an agent contain no flags that only a server accepts", () => {
    for (const { generation } of RELEASES)
      assert.doesNotMatch(
        argsOf("agent", generation, wanted(), "ipvs", "a1").join(" "),
        /tls-san|flannel|disable/,
      );
  });

  test("end with SERVER_ARGS or AGENT_ARGS, split into words", () => {
    const want = wanted({
      SERVER_ARGS: " --disable=traefik  --debug",
      AGENT_ARGS: "--node-label=a=b\t--docker",
    });
    assert.deepEqual(argsOf("server", "old", want, "iptables", "a1").slice(-2), [
      "--disable=traefik",
      "--debug",
    ]);
    assert.deepEqual(argsOf("agent", "modern", want, "iptables", "a1").slice(-2), [
      "--node-label=a=b",
      "--docker",
    ]);
  });
});

describe("the unit", () => {
  for (const { generation } of RELEASES)
    for (const role of ROLES) {
      const unit = (want: Settings, onCard: boolean, mode = "iptables") =>
        unitText(role, generation, argsOf(role, generation, want, mode, "a1"), onCard ? [] : [IP]);

      test(`of the ${generation} ${role} is the one in the fixtures`, () =>
        assert.equal(unit(wanted(), false, "ipvs"), fixture(`${unitOf(role)}-${generation}.service`)));

      test(`of the ${generation} ${role} adds the public address to lo only if no card has it`, () => {
        assert.match(unit(wanted(), false), new RegExp(`ExecStartPre=.*ip addr replace ${IP}/32 dev lo`));
        assert.doesNotMatch(unit(wanted(), true), /ip addr/);
      });

      test(`of the ${generation} ${role} passes every argument to k3s as one word, with % and $ unchanged`, () => {
        const args = "--node-label=p=%h --kubelet-arg=x=$HOME,100%,${y} --node-label=z=a;b&c|d";
        const text = unit(wanted({ SERVER_ARGS: args, AGENT_ARGS: args }), true);
        const command = text.slice(text.indexOf("ExecStart=") + "ExecStart=".length).replaceAll("\\\n", " ");
        const words = command
          .trim()
          .split(/\s+/)
          .map((w) => w.replaceAll("$$", "$").replaceAll("%%", "%"));
        assert.deepEqual(words.slice(-3), args.split(" "));
        assert.deepEqual(words.slice(0, 2), ["/usr/local/bin/k3s", role]);
        assert.deepEqual(
          words.slice(2).filter((word) => !word.startsWith("--")),
          [],
          "no stray positional",
        );
        assert.doesNotMatch(
          command.replaceAll("$$", "").replaceAll("%%", ""),
          /[$%]/,
          "nothing for systemd to expand",
        );
      });
    }

  test("loads ip_vs only for ipvs", () => {
    const unit = (mode: string) => unitText("agent", "old", argsOf("agent", "old", wanted(), mode, "a1"), []);
    assert.match(unit("ipvs"), /modprobe -a ip_vs/);
    assert.doesNotMatch(unit("iptables"), /ip_vs/);
  });
});

describe("nodes and peers", () => {
  test("are read from a modern cluster's list", () => {
    assert.deepEqual(nodesOf(fixture("nodes-v1.36.3.json")), [
      {
        name: "a1",
        ready: true,
        readySince: 0,
        cordoned: false,
        boot: undefined,
        machine: undefined,
        drained: undefined,
        created: 0,
        heartbeat: Date.parse("2026-11-23T15:15:19Z") / 1000,
        internalIp: "192.168.0.11",
        externalIp: "198.51.100.21",
        podCidr: "10.42.0.0/24",
        publicIp: "198.51.100.21",
        overwrite: "198.51.100.21",
        version: "v1.36.3+k3s1",
        args: [],
        pressure: [],
        labels: {},
        taints: [],
        backend: "wireguard",
      },
      {
        name: "b1",
        ready: true,
        readySince: 0,
        cordoned: false,
        boot: undefined,
        machine: undefined,
        drained: undefined,
        created: 0,
        heartbeat: Date.parse("2026-11-23T15:18:30Z") / 1000,
        internalIp: "192.168.0.12",
        externalIp: "198.51.101.21",
        podCidr: "10.42.1.0/24",
        publicIp: "198.51.101.21",
        overwrite: "198.51.101.21",
        version: "v1.36.3+k3s1",
        args: [],
        pressure: [],
        labels: {},
        taints: [],
        backend: "wireguard",
      },
    ]);
  });

  test("are read from an old cluster's node, before and after its annotation", () => {
    const [before] = nodesOf(fixture("node-before-annotation-v1.17.6.json"));
    const [after] = nodesOf(fixture("node-after-annotation-v1.17.6.json"));
    assert.deepEqual([before?.name, before?.publicIp, before?.overwrite], ["b1", "192.168.0.11", undefined]);
    assert.deepEqual(
      [after?.name, after?.publicIp, after?.overwrite],
      ["b1", "198.51.101.11", "198.51.101.11"],
    );
    assert.equal(after?.version, OLD);
  });

  test("are read with the mark of a drain and whether it was completed, ignoring malformed marks", () => {
    const boot = "88e9fd3e-8477-40e7-aaf5-7b4c1351751a";
    for (const [mark, drained] of [
      [boot, { boot, done: false }],
      [`${boot}.done`, { boot, done: true }],
      ["yes", undefined],
      ["$(reboot).done", undefined],
    ] as const) {
      const items = [{ metadata: { name: "b1", annotations: { [DRAINED]: mark } } }];
      assert.deepEqual(nodesOf(JSON.stringify({ items }))[0]?.drained, drained);
    }
  });

  for (const text of [
    "",
    "{}",
    "null",
    "Error from server (Forbidden)",
    '{"items": [{}]}',
    '{"kind":"Status"}',
  ])
    test(`are none if kubectl prints ${JSON.stringify(text)}`, () => assert.deepEqual(nodesOf(text), []));

  const dumps = {
    "v1.17.6 before its annotation": ["flannel.1", "before-annotation-v1.17.6"],
    "v1.17.6 after its annotation": ["flannel.1", "after-annotation-v1.17.6"],
    "v1.36.3": ["flannel-wg", "v1.36.3"],
  };
  const peers = {
    "v1.17.6 before its annotation": [
      { endpoint: "192.168.0.11:51820", allowedIps: ["10.42.0.0/24"], handshake: 0 },
      { endpoint: "192.168.0.12:51820", allowedIps: ["10.42.1.0/24"], handshake: 1795446621 },
    ],
    "v1.17.6 after its annotation": [
      { endpoint: "198.51.100.11:51820", allowedIps: ["10.42.0.0/24"], handshake: 1795446696 },
      { endpoint: "192.168.0.12:51820", allowedIps: [], handshake: 0 },
      { endpoint: "198.51.100.11:51820", allowedIps: [], handshake: 1795446681 },
      { endpoint: "198.51.101.12:51820", allowedIps: ["10.42.1.0/24"], handshake: 1795446676 },
    ],
    "v1.36.3": [{ endpoint: "198.51.100.21:51820", allowedIps: ["10.42.0.0/24"], handshake: 1795447105 }],
  };
  for (const [name, [iface = "", file]] of Object.entries(dumps))
    test(`are read from wg's output of ${name}, without the private key`, () => {
      const root = temporary();
      mkdirSync(`${root}/${iface}`);
      const path = programs(temporary(), {
        wg: `[ "$2" = ${iface} ] && cat '${import.meta.dirname}/fixtures/wg-dump-${file}.txt'`,
      });
      const here = clusterLook.join("\n").replaceAll("/sys/class/net", root);
      const facts = look([{ look: () => [here] }], wanted(), { PATH: path });
      const expected = peers[name as keyof typeof peers].map((p) => ({ interface: iface, ...p }));
      const found = peersOf(facts.peers);
      assert.deepEqual(
        found.map(({ key: _, received: _r, sent: _s, ...rest }) => rest),
        expected,
      );
      for (const { key, received, sent } of found) {
        assert.match(key, /^[\w+/]{43}=$/);
        assert.ok(received >= 0 && sent >= 0);
      }
      assert.doesNotMatch(JSON.stringify(facts), /PRIVATEKEY/);
    });
});

describe("a node's name", () => {
  const cases: [args: string, name: string][] = [
    ["", "b1.example"],
    ["--node-name=Cloud-B --docker", "cloud-b"],
    ["--docker --node-name cloud-b", "cloud-b"],
    ["--node-label=x--node-name=y", "b1.example"],
  ];
  for (const [args, name] of cases)
    test(`is ${name} with the arguments "${args}"`, () =>
      assert.equal(nodeNameOf("agent", wanted({ AGENT_ARGS: args }), { hostname: "B1.Example\n" }), name));
});

describe("a node is healthy", () => {
  const facts = (over = {}) =>
    prepared(MODERN, {
      nodes: nodes(A1, B1),
      interfaces: "lo\nflannel-wg\n",
      service: service(NOW - 600),
      ...over,
    });
  const cases: [name: string, over: Record<string, string>, problem: RegExp | undefined][] = [
    ["if it is Ready, has reported, and has its address and interface", {}, undefined],
    ["only once it is registered", { nodes: nodes(B1) }, /a1 is not registered/],
    ["only if it is Ready", { nodes: nodes({ ...A1, ready: false }) }, /not Ready/],
    [
      "only if it has reported since its start, because it stays Ready for a while without a kubelet",
      { nodes: nodes({ ...A1, beat: NOW - 640 }) },
      /not reported/,
    ],
    [
      "only if its ExternalIP is the public address",
      { nodes: nodes({ ...A1, external: "192.168.0.11" }) },
      /ExternalIP of a1 is 192.168.0.11, not 198/,
    ],
    [
      "only if it has an ExternalIP",
      { nodes: nodes({ ...A1, external: "" }) },
      /ExternalIP of a1 is not set/,
    ],
    ["only if the interface of its generation exists", { interfaces: "lo\nflannel.1\n" }, /no flannel-wg/],
    [
      "only while its service runs",
      { service: "ActiveState=activating\nMainPID=0\nExecMainStartTimestampMonotonic=0\n" },
      /not reported/,
    ],
  ];
  for (const [name, over, problem] of cases)
    test(name, () => {
      const problems = healthProblems("a1", IP, "modern", facts(over));
      if (problem === undefined) assert.deepEqual(problems, []);
      else assert.match(problems.join(", "), problem);
    });
});

describe("an API that returned no list of nodes", () => {
  const BUSY = `9.81 7.00 3.00 5/300 999\n2\nMemTotal:       2000000 kB\nMemAvailable:     40000 kB\nSwapTotal:      1000000 kB\nSwapFree:        100000 kB`;
  const IDLE =
    "0.50 0.40 0.30 1/300 999\n1\nMemTotal: 2000000 kB\nMemAvailable: 1500000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB";
  const cases: [said: string | undefined, load: string, silent: RegExp | undefined][] = [
    [undefined, IDLE, undefined],
    ["20 did not answer in 20 s", IDLE, /^the API did not answer in 20 s$/],
    [
      "10 Unable to connect to the server: net/http: TLS handshake timeout",
      IDLE,
      /^the API did not answer in 10 s$/,
    ],
    ["21 error: context deadline exceeded", IDLE, /did not answer in 21 s/],
    [
      "20 did not answer in 20 s",
      BUSY,
      /^the API did not answer in 20 s; the box is overloaded \(load 9\.81 on 2 cores, memory 98 % in use, swap 90 % in use\)$/,
    ],
    ["0 it refuses connections", IDLE, /refuses connections: k3s is not up/],
    [
      "0 The connection to the server 127.0.0.1:6443 was refused - did you specify",
      IDLE,
      /refuses connections/,
    ],
    [
      '1 503 {"kind":"Status","message":"apiserver not \\"ready\\"","code":503}',
      IDLE,
      /^the API does not answer: apiserver not "ready"$/,
    ],
  ];
  for (const [said, load, silent] of cases)
    test(`is ${silent ? "reported as not answering" : "treated as having no nodes"}: ${said}`, () => {
      const facts = { nodes: "", load, ...(said ? { api: said } : {}) };
      if (silent) assert.match(silence(facts) ?? "", silent);
      else assert.equal(silence(facts), undefined);
      const problems = healthProblems("a1", IP, "modern", facts).join();
      assert.equal(problems, silent ? "the API gave no list of nodes" : "node a1 is not registered");
    });

  test("is not reported if there is a list after all", () =>
    assert.equal(silence({ nodes: nodes(A1), api: "20 did not answer in 20 s" }), undefined));

  test("is attributed to an overloaded box only if the load per core, the memory or the swap exceeds a limit", () => {
    const idle = { average: 1.9, cores: 1, memory: 60, swap: 0 };
    assert.equal(overload(idle), undefined);
    assert.match(overload({ ...idle, average: 2.1 }) ?? "", /load 2\.1 on 1 core,/);
    assert.equal(overload({ ...idle, average: 7, cores: 4 }), undefined);
    assert.match(overload({ ...idle, memory: 97 }) ?? "", /memory 97 %/);
    assert.match(overload({ ...idle, swap: 80 }) ?? "", /swap 80 %/);
    assert.equal(
      overload({ average: undefined, cores: undefined, memory: undefined, swap: undefined }),
      undefined,
    );
  });

  /** The real look of a server, on whose disk are the admin's key and k3s.yaml. */
  const asked = (curl: string, k3s = "exit 1", agent = "inactive", users = ["k3s-controller", "kubelet"]) => {
    const root = temporary();
    mkdirSync(`${root}/tls`);
    writeFileSync(`${root}/tls/client-admin.key`, "key");
    writeFileSync(`${root}/k3s.yaml`, "    server: https://127.0.0.1:6555\n");
    const there = nodesLook
      .replaceAll("/var/lib/rancher/k3s/server/tls", `${root}/tls`)
      .replaceAll("/etc/rancher/k3s/k3s.yaml", `${root}/k3s.yaml`)
      .replaceAll("/usr/local/bin/k3s", `${root}/bin/k3s`)
      .replaceAll("/var/lib/rancher/k3s/agent", root);
    for (const user of users) writeFileSync(`${root}/client-${user}.key`, "key");
    writeFileSync(`${root}/kubelet.kubeconfig`, "    server: https://127.0.0.1:6444\n");
    const PATH = programs(`${root}/bin`, {
      curl,
      k3s,
      systemctl: `case $* in *k3s-agent) echo ${agent} ;; *) [ ${agent} = active ] && echo inactive || echo active ;; esac`,
    });
    return look([{ look: () => [there] }], wanted(), { PATH });
  };

  test("is reported according to curl's result, which may be a list, a status, a timeout or a refused connection", () => {
    const list = nodes(A1, B1);
    const good = asked(`printf '%s\\n200' '${list}'; echo "$*" >&2`);
    assert.deepEqual(
      nodesOf(good.nodes).map(({ name }) => name),
      ["a1", "b1"],
    );
    assert.equal(good.api, undefined);
    assert.match(asked("exit 28").api ?? "", /^\d+ did not answer in 20 s$/m);
    assert.match(asked("exit 7").api ?? "", /refuses connections/);
    const starting = asked(`printf '%s\\n503' '{"message":"starting"}'`);
    assert.match(silence(starting) ?? "", /^the API does not answer: starting/);
  });

  test("is queried with kubectl if curl is missing or cannot read the key, and on an agent without client keys", () => {
    const k3s = `echo '${nodes(A1)}'`;
    for (const curl of ["exit 58", "exit 127"])
      assert.equal(nodesOf(asked(curl, k3s).nodes)[0]?.name, "a1", curl);
    assert.equal(nodesOf(asked("exit 7", k3s, "active", []).nodes)[0]?.name, "a1");
    const said = asked("exit 58", "echo 'error: context deadline exceeded' >&2; exit 1");
    assert.match(said.api ?? "", /deadline exceeded/);
  });

  test("is queried on an agent as k3s-controller, then as the kubelet if that is not allowed, but never as the admin", () => {
    const as = (name: string) => `case $* in *client-${name}.crt*) printf '%s\\n200' '${nodes(A1)}' ;;
*6444/api*) printf '%s\\n403' '{"message":"forbidden"}' ;; *) exit 7 ;; esac`;
    for (const name of ["k3s-controller", "kubelet"])
      assert.equal(nodesOf(asked(as(name), "exit 1", "active").nodes)[0]?.name, "a1", name);
    const none = asked(as("admin"), `echo '${nodes(A1)}'`, "active");
    assert.equal(none.nodes, "");
    assert.match(silence(none) ?? "", /^the API does not answer: forbidden/);
  });

  test("is queried with a key file, and without a proxy or .curlrc", () => {
    const said = asked(
      `printf '%s\\n200' "{\\"items\\":[{\\"metadata\\":{\\"name\\":\\"a1\\"}}],\\"args\\":\\"$*\\"}"`,
    );
    assert.match(
      said.nodes ?? "",
      /"args":"-q -sS --noproxy \* --cacert \S+ --cert \S+ --key \S+client-admin\.key -m 20 -X GET .*https:\/\/127\.0\.0\.1:6555\/api\/v1\/nodes/,
    );
  });
});

describe("a list of nodes that was reduced on the box", () => {
  const list = fixture("nodes-raw-v1.36.3.json");
  const shaped = (json: string, sed = "sed") => {
    const { stdout, stderr } = shell(
      `{ ${SHAPE.replaceAll("sed ", `${sed} `)}\n} <<'EOF'\n${json.trim()}\nEOF`,
    );
    assert.equal(stderr, "");
    return stdout;
  };
  /** The list with other values in its second node. */
  const withStatus = (more: object) => {
    const parsed = JSON.parse(list);
    Object.assign(parsed.items[1].status, more);
    return JSON.stringify(parsed);
  };
  const images = (...names: string[]) => ({ images: [{ names, sizeBytes: 1 }] });
  const nasty = '}]}},{"metadata":{"name":"x"},"spec":{},"nodeInfo":{}}]}';
  const { nodeInfo } = JSON.parse(list).items[1].status;
  const cases: [what: string, json: string, most: number][] = [
    ["a list", list, list.length / 2],
    ["one node", JSON.stringify({ kind: "Node", apiVersion: "v1", ...JSON.parse(list).items[0] }), 3000],
    ["many images", withStatus({ images: Array(50).fill({ names: [`a@${"b".repeat(200)}`] }) }), 6000],
    ["an image whose name looks like JSON", withStatus(images(nasty, "a}]", '"')), list.length / 2],
    ["another string of a node that looks like JSON", withStatus({ nodeInfo: { ...nodeInfo, osImage: nasty } }), list.length],
    ["a node's swap", withStatus({ nodeInfo: { ...nodeInfo, swap: { capacity: 1 } } }), list.length / 2],
    ["kubectl's output", JSON.stringify(JSON.parse(list), null, 4), Number.POSITIVE_INFINITY],
    ["a list without nodes", '{"kind":"NodeList","apiVersion":"v1","metadata":{},"items":[]}', 100],
  ]; // biome-ignore format: a table
  /** Lists of nodes with strings that look like JSON. */
  const lists = () => {
    const part = fc.constantFrom(
      ...[
        '"',
        "\\",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        " ",
        "a",
        "é",
        '},{"metadata":{',
        ',"reason":"x","message":"y"',
      ],
      ...['"capacity":{', '"nodeInfo":{', ']},"spec":{', '"images":[', "}}]}"],
    );
    const nasty = fc.string({ unit: part, maxLength: 6 });
    const at = "2026-11-27T00:00:00Z";
    const node = fc.record({
      metadata: fc.record({
        name: fc.constantFrom("a1", "b-2", "c.3"),
        annotations: fc.dictionary(fc.oneof(nasty, fc.constant("k3s.io/node-args")), nasty),
        labels: fc.dictionary(fc.constantFrom("a", "capacity", "images", "message", "reason"), nasty),
        managedFields: fc.array(fc.record({ manager: nasty }), { maxLength: 1 }),
      }),
      spec: fc.record({
        podCIDR: fc.constant("10.42.1.0/24"),
        taints: fc.array(fc.record({ key: nasty, effect: nasty })),
      }),
      status: fc.record({
        capacity: fc.dictionary(fc.constant("cpu"), nasty),
        conditions: fc.uniqueArray(
          fc.record({
            ...{ type: fc.constantFrom("Ready", "DiskPressure"), status: fc.constantFrom("True", "False") },
            ...{
              lastHeartbeatTime: fc.constant(at),
              lastTransitionTime: fc.constant(at),
              reason: nasty,
              message: nasty,
            },
          }),
          { selector: ({ type }) => type },
        ),
        addresses: fc.array(
          fc.record({ type: fc.constantFrom("InternalIP", "ExternalIP"), address: fc.ipV4() }),
        ),
        nodeInfo: fc.record({
          osImage: nasty,
          swap: fc.constant({ capacity: 1 }),
          kubeletVersion: fc.constant(MODERN),
        }),
        images: fc.array(fc.record({ names: fc.array(nasty), sizeBytes: fc.nat() })),
      }),
    });
    return fc.array(node, { maxLength: 4 });
  };
  const listOf = (items: unknown[]) =>
    JSON.stringify({ kind: "NodeList", apiVersion: "v1", metadata: {}, items });
  test("is parsed like the complete list, whatever its strings contain", () => {
    const same = (items: unknown[]) =>
      assert.deepEqual(nodesOf(shaped(listOf(items))), nodesOf(listOf(items)));
    fc.assert(fc.property(lists(), same), { numRuns: 150 });
  });

  /** What the shell code that waits reads from a list, and what the parser does. */
  const waited = (json: string, awk = "awk") =>
    shell(
      `${NODES.replace("awk -v", `${awk} -v`)}\napiuser() { :; }\napi() { cat <<'EOF'\n${json}\nEOF\n}\nnodes`,
    ).stdout;
  const lines = (json: string) =>
    nodesOf(json)
      .map(
        ({ name, ready, cordoned, boot, version, heartbeat, internalIp, externalIp, publicIp }) =>
          `${name} ${ready ? "Ready" : "NotReady"}${cordoned ? ",SchedulingDisabled" : ""} boot=${boot ?? "-"} version=${version || "-"} beat=${heartbeat ? new Date(heartbeat * 1000).toISOString().replace(".000", "") : "-"} internal-ip=${internalIp ?? "-"} external-ip=${externalIp ?? "-"} public-ip=${publicIp ?? "-"} .\n`,
      )
      .join("");
  test("is parsed by the shell code that waits like by nodesOf, whatever its strings contain", () => {
    const same = (items: unknown[]) => assert.equal(waited(listOf(items)), lines(listOf(items)));
    fc.assert(fc.property(lists(), same), { numRuns: 150 });
    const [a1, b1] = JSON.parse(list).items;
    b1.spec.unschedulable = true;
    b1.status.conditions.find(({ type }: { type: string }) => type === "Ready").status = "Unknown";
    b1.metadata.labels = { type: "Ready", status: "True", bootID: "x", ...b1.metadata.labels };
    for (const awk of lacks("busybox") ? ["awk"] : ["awk", "busybox awk"])
      for (const json of [
        list.trim(),
        listOf([a1, b1]),
        listOf([]),
        JSON.stringify({ kind: "Node", apiVersion: "v1", ...b1 }),
      ])
        assert.equal(waited(json, awk), lines(json));
  });

  for (const [what, json, most] of cases)
    test(`is parsed like the complete list: ${what}`, () => {
      for (const sed of lacks("busybox") ? ["sed"] : ["sed", "busybox sed"]) {
        const less = shaped(json, sed);
        assert.deepEqual(nodesOf(less), nodesOf(json));
        assert.ok(less.length <= most, `${less.length} of ${json.length}`);
      }
    });
});

test("the public address is treated as being on a card only if a card has exactly this address", () => {
  const on = (addresses: string) => onCard(IP, { addresses });
  assert.equal(on(`2: eth0    inet ${IP}/24 brd 198.51.100.255 scope global eth0`), true);
  assert.equal(on(`1: lo    inet ${IP}/32 scope global lo`), false);
  assert.equal(on("2: eth0    inet 198.51.100.110/24 scope global eth0"), false);
  assert.equal(on(""), false);
});

describe("the difference of two units", () => {
  const unit = (...args: string[]) => `[Service]\nExecStart=k3s server \\\n    ${args.join(" \\\n    ")}\n`;
  const cases: [name: string, have: string, text: string, lines: string[]][] = [
    ["is empty if they are equal", unit("--a", "--b"), unit("--a", "--b"), []],
    [
      "lists an argument that is added at the end, and not the one before it",
      unit("--a"),
      unit("--a", "--b"),
      ["+ --b"],
    ],
    [
      "lists an argument that is removed in the middle",
      unit("--a", "--b", "--c"),
      unit("--a", "--c"),
      ["- --b"],
    ],
    [
      "lists the old and the new value of a changed argument together",
      unit("--a=1", "--c"),
      unit("--a=2", "--c"),
      ["- --a=1", "+ --a=2"],
    ],
    ["lists a duplicate line that is removed", unit("--a", "--a"), unit("--a"), ["- --a"]],
    ["lists a changed order", unit("--a", "--b"), unit("--b", "--a"), ["- --a", "+ --a"]],
  ];
  for (const [name, have, text, lines] of cases) test(name, () => assert.deepEqual(diff(have, text), lines));
});

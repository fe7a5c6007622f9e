import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { causesOf } from "../lib/check/causes.ts";
import { diagnose, judge } from "../lib/check/diagnose.ts";
import { ask, CLOCK, clusterOf, LOOKS, type Member, surveyAndTry } from "../lib/check/survey.ts";
import type { Device } from "../lib/k3s/devices.ts";
import { MEANT, meaningOf } from "../lib/k3s/journal.ts";
import { lookScript, reader, wrapInMain } from "../lib/protocol.ts";
import type { Settings } from "../lib/settings.ts";
import { prints } from "../lib/step.ts";
import { jsonOf } from "../lib/text.ts";
import { merged, reportOf, verdict } from "../scripts/cluster/check.ts";
import {
  A1,
  answering,
  B1,
  B2,
  deviceKey,
  entryFacts,
  type Facts,
  figures,
  fixture,
  IP,
  keyOf,
  MODERN,
  member,
  NFT_RULES,
  NOW,
  type NodeSpec,
  nodes,
  OLD,
  shell,
  TOKEN,
  wanted,
} from "./helpers.ts";

type Over = { facts?: Facts; tried?: Facts; error?: string; clock?: number };

/** Three healthy boxes, with these differences. */
function boxes(version: string, over: Record<string, Over> = {}): Member[] {
  return [A1, B1, B2].map((spec) => {
    const { facts, tried, ...rest } = over[spec.name] ?? {};
    return { ...member(version, spec, facts, tried), ...rest };
  });
}

const problemsOf = (members: Member[], want: Partial<Settings> = {}) => {
  const settings = wanted(want);
  return diagnose(clusterOf(members.map((one) => ({ ...one, box: { ...one.box, want: settings } }))));
};

const list = (...specs: (NodeSpec & { version?: string })[]) => ({
  a1: { facts: { nodes: nodes(...specs) } },
});
const units = (unit: string, state: string, pid = 0, more = "NRestarts=0") =>
  `Id=${unit}.service\nActiveState=${state}\n${more}\nMainPID=${pid}\nExecMainStartTimestampMonotonic=${pid ? 1800e6 : 0}`;
/** What a box reached, a line for each connection. */
const reached = (...rows: string[]): { tried: Facts } => ({ tried: { tries: rows.join("\n") } });
const tunnels = (over: Record<string, number>) =>
  ["a1", "b1", "b2"].map((name) => [name, over[name] ?? 1420]);
const ways = (own: string, over: Record<string, number>, more: Facts = {}) => ({
  tried: {
    tries: [
      ...tunnels(over)
        .filter(([name]) => name !== own)
        .map(([name, size]) => `tunnel ${name} ${size}`),
      ...(own === "a1" ? ["a1", "b1", "b2"].map((name) => `kubelet ${name} open`) : ["api server open"]),
    ].join("\n"),
    ...(own === "a1" ? { top: figures("a1", "b1", "b2") } : {}),
    ...more,
  },
});
/** WireGuard's counters of a peer before and after some seconds in which packets were sent. */
const passed = (of: Record<string, number>, arrived = "") => ({
  before: Object.keys(of)
    .map((name) => `${keyOf(name)}\t1000\t1000`)
    .join("\n"),
  after: Object.entries(of)
    .map(([name, bytes]) => `${keyOf(name)}\t${1000 + bytes}\t1900`)
    .join("\n"),
  arrived,
});

/** systemd's starts of a unit, 22 s apart, the last of them 11 s ago. */
const again = (many: number) =>
  Array.from({ length: many }, (_, i) => String(NOW - 11 - 22 * (many - 1 - i))).join("\n");

const FLAG = ["server", "--flannel-backend", "wireguard-native", "--flannel-external-ip"];
const DROPPED = { tries: "tunnel a1 0\ntunnel b2 0\napi server open" };

const {
  ufw = "",
  added = "",
  iptables = "",
  nft = "",
}: Facts = JSON.parse(fixture("firewall/ufw-fresh.json"));
const UFW = { ufw, added, iptables, nft };

describe("a box without a public address", () => {
  const NAS = { ...B2, ip: "10.42.2.0", external: "", public: "192.168.0.11" };
  /** The cluster with b2 at home; `over` is what its node says, `tried` what the boxes reached. */
  const home = (
    over: Partial<NodeSpec> = {},
    tried: Record<string, Facts> = {},
    keepalive = "active",
    more: Facts = {},
  ) => {
    const members = boxes(MODERN, {
      a1: {
        facts: { nodes: nodes(A1, B1, { ...NAS, ...over }), ...more },
        ...ways("a1", {}, tried.a1),
      },
      b1: ways("b1", {}, tried.b1),
      b2: {
        facts: {
          units: `${units("k3s-agent", "active", 812)}\n\n${units("k3s-keepalive", keepalive, 9)}`,
        },
        ...ways("b2", {}, tried.b2),
      },
    });
    const { problems, notes } = verdict(
      clusterOf(
        members.map((one) => {
          const box = { ...one.box, ...(one.box.name === "b2" ? { ip: "nat", word: "b2=nat" } : {}) };
          return { ...one, box: { ...box, want: wanted({ HOST: box.host, PUBLIC_IP: box.ip }) } };
        }),
      ),
      undefined,
    );
    const early = notes.filter((note) => / yet: /.test(note)).map((note) => `note ${note}`);
    return [...problems.map(({ cause, remedy }) => `${cause}: ${remedy}`), ...early];
  };
  const lost = {
    a1: { tries: "tunnel 10.42.1.0 1420\ntunnel 10.42.2.0 0" },
    b1: { tries: "tunnel 10.42.0.0 1420\ntunnel 10.42.2.0 0\napi server open" },
  };
  const metricsServer = JSON.stringify({
    kind: "PodList",
    items: [
      {
        metadata: { name: "metrics-server-1", labels: { "k8s-app": "metrics-server" } },
        spec: { nodeName: "b2" },
        status: { conditions: [{ type: "Ready", status: "True" }] },
      },
    ],
  });
  const cases: [name: string, seen: string[], cause: RegExp | undefined][] = [
    [
      "is named when metrics-server runs on it, which the other nodes' 10250/tcp is closed to",
      home({}, { a1: { top: figures("b2") } }, "active", { system: metricsServer }),
      /does not list a1, b1: metrics-server runs on b2, and their 10250\/tcp is closed to a node without a public address: TUNNEL_KUBELETS=yes/,
    ],
    ["has no problems when its address is inside the tunnel", home(), undefined],
    [
      "is repaired by make agent when it has another address",
      home({ ip: "192.168.0.11" }),
      /^its InternalIP is 192\.168\.0\.11, not 10\.42\.2\.0 inside the tunnel.*: make agent HOST=b2=nat$/,
    ],
    [
      "is removed by the public address that its node still has",
      home({ external: "198.51.101.77" }),
      /make remove HOST=b2=198\.51\.101\.77, then make agent HOST=b2=nat$/,
    ],
    [
      "is named when others would send WireGuard's packets into the tunnel itself",
      home({ public: "10.42.2.0" }),
      /^flannel's public-ip of it is 10\.42\.2\.0, inside the tunnel.*: kubectl annotate node b2 .*-overwrite-; then /,
    ],
    [
      "is named when nothing keeps it reachable",
      home({}, {}, "failed"),
      /^k3s-keepalive does not run on it.*: make agent HOST=b2=nat$/,
    ],
    [
      "is named, and not the others' security groups, when no packet passes its router",
      home({}, { ...lost, b2: { tries: "tunnel 10.42.0.0 0\ntunnel 10.42.1.0 0\napi server open" } }),
      /^its WireGuard reaches no other node: its router or its provider drops UDP/,
    ],
    [
      "is noted, and no problem yet, when k3s of the other was started seven seconds ago",
      home(
        {},
        { a1: lost.a1, b2: { tries: "tunnel 10.42.0.0 0\ntunnel 10.42.1.0 1420\napi server open" } },
        "active",
        {
          uptime: "1807.20\n",
        },
      ),
      /^note b2: its WireGuard does not reach a1 yet: k3s was started there 7 s ago, and .* again within 30 s$/,
    ],
    [
      "is a problem at once when systemd had to start that k3s again",
      home(
        {},
        { a1: lost.a1, b2: { tries: "tunnel 10.42.0.0 0\ntunnel 10.42.1.0 1420\napi server open" } },
        "active",
        { uptime: "1807.20\n", starts: `${NOW - 9}\n` },
      ),
      /^its WireGuard does not reach a1 yet: .*: run make check again in half a minute$/,
    ],
    [
      "has its security group named when it was started a minute ago",
      home(
        {},
        { a1: lost.a1, b2: { tries: "tunnel 10.42.0.0 0\ntunnel 10.42.1.0 1420\napi server open" } },
        "active",
        {
          uptime: "1860.00\n",
        },
      ),
      /^its WireGuard does not reach a1, while it reaches others: open 51820\/udp to every address/,
    ],
  ];
  for (const [name, seen, cause] of cases)
    test(name, () => {
      assert.equal(seen.length, cause ? 1 : 0, seen.join("\n"));
      if (cause) assert.match(seen[0] ?? "", cause);
    });
});

describe("an entry of devices", () => {
  const PHONE: Device = { name: "phone", ip: "10.44.0.2", key: deviceKey("P"), form: "phone" };
  const TV: Device = { name: "tv", ip: "10.44.0.3", key: deviceKey("T"), form: "linux", only: "services" };
  const attic = (lan: string): Device => ({
    ...{ name: "attic", ip: "10.44.0.4", key: deviceKey("R"), form: "router", lan },
  });
  const both = [PHONE, TV];
  const entries = (over: Record<string, Facts>, more: Record<string, Over> = {}) => {
    const made = Object.entries(over).map(([name, facts]) => [name, { ...more[name], facts }]);
    return boxes(MODERN, { ...more, ...Object.fromEntries(made) });
  };
  const found = (a1: Facts) => problemsOf(entries({ a1 }));
  const state = (...rows: string[]) => ({ "entry-state": `${rows.join("\n")}\n` });
  const E = deviceKey("E");
  const own = "make device NAME=phone VIA=a1; or systemctl restart k3s-devices on it";

  test("whose devices are all switched off has no problems, nor has a box that is none", () => {
    const off = entryFacts(both)["entry-dump"]?.replace(String(NOW - 12), String(NOW - 90_000)) ?? "";
    assert.deepEqual(found({ ...entryFacts(both), "entry-dump": off }), []);
    assert.equal(clusterOf(boxes(MODERN)).boxes[0]?.entry, undefined);
  });

  const cases: [name: string, over: Facts, cause: string, remedy: string][] = [
    [
      "whose interface is gone",
      { ...state("active", "enabled"), "entry-dump": "" },
      "its interface k3s-devices is gone, although the unit is active",
      own,
    ],
    [
      "whose unit is stopped",
      { ...state("inactive", "enabled"), "entry-dump": "", "entry-rules": "" },
      "k3s-devices does not run on it (systemd: inactive): devices reach nothing by it",
      own,
    ],
    [
      "whose unit does not start at boot",
      state("active", "disabled", E, "51822"),
      "k3s-devices does not start at boot (systemd: disabled)",
      "make device NAME=phone VIA=a1; or systemctl enable k3s-devices on it",
    ],
    [
      "whose interface has another key than its file",
      state("active", "enabled", deviceKey("X"), "51822"),
      "its interface k3s-devices has another key than /etc/rancher/k3s-devices/key",
      own,
    ],
    [
      "whose interface is at another port than its program says",
      state("active", "enabled", E, "4242"),
      "its interface k3s-devices is at port 4242, not 51822",
      own,
    ],
    [
      "whose interface lets in others than its file",
      { "entry-dump": entryFacts([PHONE, attic("")])["entry-dump"] ?? "" },
      "its interface k3s-devices has other peers than /etc/rancher/k3s-devices/peers: without tv, 1 more",
      own,
    ],
    [
      "whose rules are gone while its interface is up",
      { "entry-rules": "" },
      "the rules that keep its devices to the cluster's networks are gone: what they send is forwarded anywhere",
      own,
    ],
    [
      "whose rules no longer keep a device to services",
      { "entry-rules": NFT_RULES([PHONE]) },
      "the rules that keep its devices to the cluster's networks are gone: what they send is forwarded anywhere",
      own,
    ],
    [
      "whose key is gone, so that all devices need new configurations",
      { "entry-key": "\n" },
      "the key of k3s-devices is gone (/etc/rancher/k3s-devices/key)",
      "make device NAME=phone VIA=a1, and so on for tv",
    ],
    [
      "whose file of devices is gone, while its interface lets them in",
      { "peers-file": "" },
      "its interface k3s-devices has other peers than /etc/rancher/k3s-devices/peers: 2 more",
      "systemctl restart k3s-devices on it",
    ],
    [
      "whose box has an address in the devices' network",
      { addresses: "2: eth0    inet 10.44.0.77/16" },
      "its devices have addresses of 10.44.0.0/24, which collides with its own address 10.44.0.77 (eth0)",
      "take them away (make device NAME=… REMOVE=1 for phone, tv), set DEVICE_CIDR to another network, and make them anew",
    ],
  ];
  for (const [name, over, cause, remedy] of cases)
    test(`${name} is found, with its remedy`, () => {
      const facts = { ...entryFacts(both), ...over };
      assert.deepEqual(found(facts), [{ box: "a1", cause, remedy }]);
    });

  test("in whose network the cluster has its pods is found", () => {
    const list = nodes({ ...A1, args: ["server", "--cluster-cidr=10.44.0.0/16"] }, B1, B2);
    const [problem, ...more] = found({ ...entryFacts(both), nodes: list });
    assert.match(problem?.cause ?? "", /collides with 10\.44\.0\.0\/16, which the cluster has$/);
    assert.deepEqual(more, []);
  });

  test("with a device whose home has the cluster's addresses, or those of devices, is found", () => {
    for (const [lan, other] of [
      ["10.42.7.0/24", "10.42.0.0/16, which the cluster has"],
      ["10.43.0.0/24", "10.43.0.0/16, which the cluster has"],
      ["10.44.0.0/16", "10.44.0.0/24, which devices have"],
    ]) {
      const device = attic(lan as string);
      assert.deepEqual(found(entryFacts([device])), [
        {
          box: "a1",
          cause: `the home's network of device attic, ${lan}, collides with ${other}: from there it is out of reach`,
          remedy: "give that LAN another network, then: make device NAME=attic VIA=a1 LAN=that network",
        },
      ]);
    }
    assert.deepEqual(found(entryFacts([attic("192.168.0.0/24")])), []);
  });

  test("is repaired together with the others of its device, so that the device's files stay numbered alike", () => {
    const b1 = { ...entryFacts(both), "entry-rules": "" };
    assert.deepEqual(
      problemsOf(entries({ a1: entryFacts(both), b1 })).map(({ box, remedy }) => [box, remedy]),
      [["b1", 'make device NAME=phone VIA="a1 b1"; or systemctl restart k3s-devices on it']],
    );
  });

  test("that no device has ever reached gives a note about its port, and no problem", () => {
    const facts = entryFacts(both);
    const never = { ...facts, "entry-dump": facts["entry-dump"]?.replace(String(NOW - 12), "0") ?? "" };
    const { wrong, notes } = judge(clusterOf(entries({ a1: never })));
    assert.deepEqual(wrong, []);
    assert.deepEqual(notes, [
      "a1: no device has had a handshake with its k3s-devices: is 51822/udp open to all at its vendor?",
    ]);
    assert.deepEqual(judge(clusterOf(entries({ a1: facts }))).notes, []);
    const closed = judge(clusterOf(entries({ a1: { ...UFW, ...never, "device-port": "51822\n" } })));
    assert.deepEqual(
      closed.wrong.map(({ cause }) => cause),
      ["ufw drops 51822/udp from devices (policy drop)"],
    );
    assert.deepEqual(
      closed.notes.filter((note) => note.includes("vendor")),
      [],
    );
  });

  test("gets one line in the report, a device with two entries counts once, and without a device there is no line", () => {
    const text = (a1: Facts, b1: Facts) => reportOf(clusterOf(entries({ a1, b1 })), [], {});
    const line = (text: string) => text.match(/^.*device.*$/gm);
    assert.deepEqual(line(text(entryFacts([PHONE]), entryFacts([TV, PHONE]))), [
      "devices  2 at a1, b1, 2 of them with a handshake in the last 3 minutes",
    ]);
    const facts = entryFacts(both);
    const old = { ...facts, "entry-dump": facts["entry-dump"]?.replace(String(NOW - 12), "1") ?? "" };
    assert.deepEqual(line(text(facts, {})), [
      "devices  2 at a1, 1 of them with a handshake in the last 3 minutes",
    ]);
    assert.deepEqual(line(text(old, {})), [
      "devices  2 at a1, none of them with a handshake in the last 3 minutes",
    ]);
    assert.equal(line(text({}, {})), null);
  });

  test("is asked for by check alone, without a second trip", async () => {
    const sent: string[] = [];
    await surveyAndTry(
      boxes(MODERN).map(({ box, role, facts }) => ({
        box: { ...box, shell: answering(facts, sent) },
        role,
      })),
    );
    assert.equal(sent.length, 3);
    for (const script of sent) assert.match(script, /^fact entry-rules/m);
    assert.doesNotMatch([...LOOKS.server, ...LOOKS.agent].join("\n"), /k3s-devices/);
  });
});

test("a script that does not know the address of a box does not report it as wrong", () =>
  assert.deepEqual(
    diagnose(clusterOf(boxes(MODERN).map((one) => ({ ...one, box: { ...one.box, ip: "" } })))),
    [],
  ));

describe("a healthy cluster", () => {
  for (const version of [OLD, MODERN])
    test(`of ${version} has no problems`, () => assert.deepEqual(problemsOf(boxes(version)), []));

  test("without metrics-server has no problems", () => {
    const a1 = { facts: { metrics: "" }, tried: { tries: "tunnel b1 1420\ntunnel b2 1420" } };
    assert.deepEqual(problemsOf(boxes(MODERN, { a1 })), []);
  });

  test("of two servers has no problems, whichever server the agents join, and its nodes are read from the server that answers", () => {
    const [a1, b1, b2] = boxes(MODERN) as [Member, Member, Member];
    const { facts } = a1;
    const second: Member = {
      ...b1,
      role: "server",
      facts: {
        ...b1.facts,
        joins: "",
        ca: facts.ca ?? "",
        nodes: facts.nodes ?? "",
        units: units("k3s", "active", 7),
      },
      tried: { tries: [A1, B2].map(({ n }) => `tunnel 10.42.${n}.0 1420`).join("\n") },
    };
    const joins = `https://${B1.ip}:6443\n${"c1".repeat(32)}`;
    assert.deepEqual(problemsOf([a1, second, { ...b2, facts: { ...b2.facts, joins } }]), []);
    const { nodes: _, ...silent } = facts;
    assert.equal(clusterOf([{ ...a1, facts: silent }, second, b2]).nodes.length, 3);
  });

  test("whose firewall rules should block it, but do not, has no problems, but a note", () => {
    const pods = "pod a1 yes\npod b2 yes\nservice kubernetes yes\nservice DNS yes";
    const members = boxes(MODERN, { b1: { facts: UFW, ...ways("b1", {}, { paths: pods }) } });
    assert.deepEqual(problemsOf(members), []);
    assert.match(
      reportOf(clusterOf(members), [], {}),
      /^note {2}b1: by its rules ufw drops 6443\/tcp, .*: make firewall HOST=b1$/m,
    );
    assert.doesNotMatch(reportOf(clusterOf(boxes(MODERN)), [], {}), /note/);
  });

  test("that is an entry for devices whose firewall drops their packets has that problem, and only there", () => {
    const facts = { ...UFW, "device-port": "51822\n" };
    const pods = "pod a1 yes\npod b2 yes\nservice kubernetes yes\nservice DNS yes";
    const [problem, ...more] = problemsOf(
      boxes(MODERN, { b1: { facts, ...ways("b1", {}, { paths: pods }) } }),
    );
    assert.deepEqual(more, []);
    assert.deepEqual(problem, {
      box: "b1",
      cause: "ufw drops 51822/udp from devices (policy drop)",
      remedy: "make firewall HOST=b1",
    });
  });

  test("of one box has no problems", () => {
    const alone = member(
      MODERN,
      A1,
      { nodes: nodes(A1), peers: "" },
      { tries: "kubelet a1 open", top: figures("a1") },
    );
    assert.deepEqual(problemsOf([alone]), []);
  });

  test("may have clocks that are a second apart, an MTU of 1500 on the pods' bridge with old k3s, and a kernel with ip_vs", () => {
    const over = { b1: { clock: 1, facts: { cni: "1500", ipvs: "yes" } } };
    assert.deepEqual(problemsOf(boxes(OLD, over)), []);
  });
});

describe("check finds the box, the cause and the remedy of", () => {
  const cases: [
    name: string,
    members: Member[],
    box: string,
    cause: RegExp,
    remedy: RegExp,
    want?: Partial<Settings>,
  ][] = [
    [
      "an endpoint that is a private address, with old k3s",
      boxes(
        OLD,
        list({ ...A1, version: OLD }, { ...B1, version: OLD, public: "192.168.0.11", overwrite: "" }, B2),
      ),
      "b1",
      /flannel's address for it is 192\.168\.0\.11, a private address: it is not annotated/,
      /^make annotate HOST=b1$/,
    ],
    [
      "an annotation without a restart after it, with old k3s",
      boxes(OLD, list({ ...A1, version: OLD }, { ...B1, version: OLD, public: "192.168.0.11" }, B2)),
      "b1",
      /it was annotated, but k3s was not restarted since/,
      /make annotate HOST=b1/,
    ],
    [
      "an annotation deleted by modern k3s",
      boxes(
        MODERN,
        list({ ...A1, args: FLAG.slice(0, 3) }, { ...B1, public: "192.168.0.11", overwrite: "" }, B2),
      ),
      "b1",
      /without --flannel-external-ip k3s v1\.36\.2\+k3s1 deletes the annotation public-ip-overwrite at each start/,
      /^make server, then systemctl restart k3s-agent on the agents$/,
    ],
    [
      "a private address in spite of --flannel-external-ip",
      boxes(MODERN, list({ ...A1, args: FLAG }, { ...B1, public: "192.168.0.11" }, B2)),
      "b1",
      /192\.168\.0\.11, a private address, not 198\.51\.101\.11/,
      /systemctl restart k3s-agent/,
    ],
    [
      "a wrong ExternalIP",
      boxes(MODERN, list(A1, { ...B1, external: "198.51.101.99" }, B2)),
      "b1",
      /ExternalIP is 198\.51\.101\.99, not 198\.51\.101\.11/,
      /make agent HOST=b1/,
    ],
    [
      "two nodes with the same WireGuard key",
      boxes(MODERN, { b2: { facts: { wg: `flannel-wg 1420 ${keyOf("b1")}` } } }),
      "b2",
      /the same WireGuard key as b1/,
      /rm -f \/run\/flannel\/wgkey/,
    ],
    [
      "ufw that drops the packets of the other nodes",
      boxes(MODERN, {
        a1: ways("a1", { b1: 0 }, passed({ b1: 148, b2: 300 })),
        b1: { facts: UFW, tried: { ...DROPPED, ...passed({ a1: 0, b2: 0 }, `${IP}\n${B2.ip}`) } },
        b2: ways("b2", { b1: 0 }, passed({ b1: 148, a1: 300 })),
      }),
      "b1",
      new RegExp(
        `^ufw drops 6443/tcp, 10250/tcp, 51820/udp from ${IP}, ${B2.ip}, and everything from .*; ufw drops what is forwarded`,
      ),
      /^make firewall HOST=b1$/,
    ],
    [
      "UDP 51820 closed by the host's firewall",
      boxes(MODERN, {
        a1: ways("a1", { b1: 0 }, passed({ b1: 148, b2: 300 })),
        b1: { tried: { ...DROPPED, ...passed({ a1: 0, b2: 0 }, `${IP}\n${B2.ip}`) } },
        b2: ways("b2", { b1: 0 }, passed({ b1: 148, a1: 300 })),
      }),
      "b1",
      /UDP 51820 is closed by its own firewall/,
      /find what drops them there/,
    ],
    [
      "UDP 51820 closed by the security group",
      boxes(MODERN, {
        a1: ways("a1", { b1: 0 }, passed({ b1: 148, b2: 300 })),
        b1: { tried: { ...DROPPED, ...passed({ a1: 0, b2: 0 }, "203.0.113.77") } },
        b2: ways("b2", { b1: 0 }, passed({ b1: 148, a1: 300 })),
      }),
      "b1",
      /do not reach its network card/,
      /security group of b1$/,
    ],
    [
      "UDP 51820 closed for a box that cannot capture packets",
      boxes(MODERN, {
        a1: ways("a1", { b1: 0 }, passed({ b1: 148, b2: 300 })),
        b1: { tried: { ...DROPPED, ...passed({ a1: 0, b2: 0 }, "?") } },
        b2: ways("b2", { b1: 0 }, passed({ b1: 148, a1: 300 })),
      }),
      "b1",
      /closed on its side/,
      /the security group and the firewall of b1/,
    ],
    [
      "two boxes of one cloud without hairpin NAT",
      boxes(MODERN, {
        b1: ways("b1", { b2: 0 }, passed({ a1: 300, b2: 0 })),
        b2: ways("b2", { b1: 0 }, passed({ a1: 300, b1: 0 })),
      }),
      "b2",
      /it and b1 do not reach each other at 198\.51\.101\.12 and 198\.51\.101\.11, while others do/,
      /hairpin/,
    ],
    [
      "a firewall that drops packets from the tunnel",
      boxes(MODERN, {
        b1: ways("b1", { b2: 0 }, passed({ a1: 300, b2: 300 })),
        b2: ways("b2", { b1: 0 }, passed({ a1: 300, b1: 300 })),
      }),
      "b2",
      /nothing answers behind it/,
      /trust 10\.42\.0\.0\/16/,
    ],
    [
      "a firewall that drops packets from the tunnel, with another cluster CIDR than the default",
      boxes(MODERN, {
        ...list(
          { ...A1, args: ["server", "--cluster-cidr", "10.44.0.0/16", "--service-cidr=10.45.0.0/16"] },
          B1,
          B2,
        ),
        b1: ways("b1", { b2: 0 }, passed({ a1: 300, b2: 300 })),
        b2: ways("b2", { b1: 0 }, passed({ a1: 300, b1: 300 })),
      }),
      "b2",
      /nothing answers behind it/,
      /trust 10\.44\.0\.0\/16 and 10\.45\.0\.0\/16 in/,
    ],
    [
      "an MTU that is too large for the path to one box",
      boxes(MODERN, {
        a1: ways("a1", { b1: 1372 }),
        b1: ways("b1", { a1: 1380, b2: 1372 }),
        b2: ways("b2", { b1: 1372 }),
      }),
      "b1",
      /MTU 1420 of flannel-wg is too large between it and its peers: packets larger than 1372 are lost/,
      /network card's MTU to 1452/,
    ],
    [
      "an MTU that is too large between two boxes, with old k3s",
      boxes(OLD, { a1: ways("a1", { b2: 1280 }) }),
      "b2",
      /MTU 1420 of flannel\.1 is too large between a1, b2: packets larger than 1280/,
      /ip link set flannel\.1 mtu 1280/,
    ],
    [
      "a host name that another node has",
      boxes(MODERN, {
        a1: { facts: { nodes: nodes(A1, B2) } },
        b1: { facts: { hostname: "a1", units: units("k3s-agent", "activating", 812) } },
      }),
      "b1",
      /its host name a1 is taken: that node is the box a1 at 198\.51\.100\.11/,
      /hostnamectl set-hostname/,
    ],
    [
      "a clock that is behind",
      boxes(MODERN, { b1: { clock: -3600 } }),
      "b1",
      /its clock is 3600 s behind/,
      /timedatectl/,
    ],
    [
      "PROXY_MODE=ipvs on a kernel without ip_vs",
      boxes(MODERN, { a1: { facts: { ipvs: "yes" } }, b1: { facts: { ipvs: "yes" } } }),
      "b2",
      /its kernel 6\.1\.0-50-cloud-amd64 has no ip_vs: kube-proxy uses iptables/,
      /PROXY_MODE=iptables/,
      { PROXY_MODE: "ipvs" },
    ],
    [
      "a token of another cluster",
      boxes(MODERN, { b2: { facts: { joins: `https://${IP}:6443\n${"0".repeat(64)}` } } }),
      "b2",
      /K3S_TOKEN belongs to another cluster: it names the CA 000000000000…, the server has c1c1c1c1c1c1…/,
      /^make server, then make agent HOST=b2$/,
    ],
    [
      "an agent that joins another server",
      boxes(MODERN, { b2: { facts: { joins: `https://203.0.113.79:6443\n${"c1".repeat(32)}` } } }),
      "b2",
      /it joins https:\/\/203\.0\.113\.79:6443, not a1/,
      /make agent HOST=b2/,
    ],
    [
      "dropped packets to the server's 6443/tcp",
      boxes(MODERN, { b2: reached("tunnel a1 1420", "tunnel b1 1420", "api server dropped") }),
      "b2",
      /does not reach the server's 6443\/tcp: packets are dropped/,
      /open 6443\/tcp/,
    ],
    [
      "a kubelet that cannot be reached at 10250/tcp",
      boxes(MODERN, {
        a1: {
          tried: {
            tries: "tunnel b1 1420\ntunnel b2 1420\nkubelet a1 open\nkubelet b1 dropped\nkubelet b2 open",
            top: figures("a1", "b2"),
          },
        },
      }),
      "b1",
      /kubelet cannot be reached at 198\.51\.101\.11:10250 \(dropped\): no metrics of it$/,
      /open 10250\/tcp/,
    ],
    [
      "a node that is missing in the metrics",
      boxes(MODERN, { a1: ways("a1", {}, { top: figures("a1") }) }),
      "a1",
      /"kubectl top nodes" does not list b1, b2/,
      /make fix-metrics/,
    ],
    [
      "a DNS upstream at a private address that does not answer",
      boxes(MODERN, {
        b2: {
          tried: {
            ...boxes(MODERN)[2]?.tried,
            tries: `${boxes(MODERN)[2]?.tried.tries}\nresolver 10.0.0.2 no`,
          },
        },
      }),
      "b2",
      /its DNS upstream 10\.0\.0\.2 is a private address that does not answer/,
      /\/etc\/resolv\.conf/,
    ],
    [
      "a public address that no interface has",
      boxes(MODERN, {
        ...list(A1, { ...B1, ready: false, args: ["agent", "--node-ip", B1.ip] }, B2),
        b1: { facts: { addresses: "2: eth0    inet 192.168.0.11/24" } },
      }),
      "b1",
      /--node-ip is 198\.51\.101\.11, and no interface of the box has it/,
      /make agent HOST=b1/,
    ],
    [
      "a unit that does not run",
      boxes(MODERN, { b1: { facts: { units: units("k3s-agent", "failed"), wg: "", peers: "" } } }),
      "b1",
      /k3s-agent does not run \(systemd: failed\)/,
      /make agent HOST=b1/,
    ],
    [
      "a unit that restarts repeatedly",
      boxes(MODERN, {
        b1: {
          facts: {
            units: units("k3s-agent", "active", 9, "NRestarts=12").replace("1800", "3590"),
            starts: again(12),
          },
        },
      }),
      "b1",
      /restarts repeatedly \(12 times in 254 s\)/,
      /make agent HOST=b1/,
    ],
    [
      "a box that is not set up",
      boxes(MODERN, {
        ...list(A1, B1),
        b2: { facts: { units: units("k3s-agent", "inactive"), wg: "", peers: "", joins: "" } },
      }),
      "b2",
      /k3s does not run on it/,
      /make agent HOST=b2/,
    ],
    [
      "a box that cannot be reached",
      boxes(MODERN, { b1: { error: "Could not reach b1: timed out", facts: {}, tried: {} } }),
      "b1",
      /Could not reach b1: timed out/,
      /ssh b1/,
    ],
    [
      "a node that is no longer in SERVER or AGENTS",
      boxes(MODERN, list(A1, B1, B2, { name: "b9", ip: "198.51.101.19", n: 9, ready: false })),
      "b9",
      /not Ready, and is in neither SERVER nor AGENTS/,
      /kubectl delete node b9/,
    ],
    [
      "a server whose API does not answer",
      boxes(MODERN, { a1: { facts: { nodes: "" }, tried: { tries: "" } } }),
      "a1",
      /the API does not answer on it/,
      /^make server$/,
    ],
    [
      "a peer with an outdated key of another",
      boxes(MODERN, { a1: ways("a1", { b1: 0 }), b1: { facts: { wg: `flannel-wg 1420 ${keyOf("b7")}` } } }),
      "a1",
      /it has an old WireGuard key of b1/,
      /restart k3s-agent on b1/,
    ],
  ];
  for (const [name, members, box, cause, remedy, want] of cases)
    test(name, () => {
      const problems = problemsOf(members, want);
      assert.deepEqual(
        problems.map((problem) => problem.box),
        [box],
        JSON.stringify(problems),
      );
      assert.match(problems[0]?.cause ?? "", cause);
      assert.match(problems[0]?.remedy ?? "", remedy);
      assert.doesNotMatch(JSON.stringify(problems), /undefined|NaN|\\n/);
    });

  test("a full disk", () => {
    const full = JSON.parse(nodes(A1, B1, B2));
    full.items[1].status.conditions.push({ type: "DiskPressure", status: "True", lastHeartbeatTime: "" });
    const [problem] = problemsOf(boxes(MODERN, { a1: { facts: { nodes: JSON.stringify(full) } } }));
    assert.deepEqual(
      [problem?.box, problem?.cause],
      ["b1", "the kubelet reports DiskPressure (disk 40 %, memory 25 % in use)"],
    );
  });
});

test("a test that failed is a problem even if no cause is found", () => {
  const [a1, b1, b2] = boxes(MODERN, {
    a1: {
      facts: { nodes: nodes(A1, B1, B2, { name: "b9", ip: "198.51.101.19", n: 9 }) },
      tried: { tries: ["b1 1420", "b2 1420", "b9 0"].map((way) => `tunnel ${way}`).join("\n"), top: "" },
    },
  }) as [Member, Member, Member];
  a1.facts = { ...a1.facts, metrics: "" };
  const {
    problems: [problem, ...more],
  } = verdict(clusterOf([a1, b1, b2]), undefined);
  assert.match(
    problem?.cause ?? "",
    /^full-size packets through the tunnels: 6 of 9, and no cause was found/,
  );
  assert.deepEqual(more, []);
  assert.deepEqual(verdict(clusterOf(boxes(MODERN)), "no image"), { problems: [], notes: [] });
});

test("a box without ping is judged by its handshakes", () => {
  const old = (name: string) => {
    const [, b1] = boxes(MODERN) as [Member, Member];
    return (name === "b1" ? b1.facts.peers : "")?.replaceAll(`\t${NOW - 30}\t`, `\t${NOW - 999}\t`) ?? "";
  };
  const problems = problemsOf(
    boxes(MODERN, { b1: { facts: { peers: old("b1") }, tried: { tries: "without ping\napi server open" } } }),
  );
  assert.deepEqual(
    problems.map(({ box }) => box),
    ["b1", "b2"],
  );
});

describe("what check tests with its own pods", () => {
  const pods = (rows: string) => {
    const [a1, b1, b2] = boxes(MODERN) as [Member, Member, Member];
    return [{ ...a1, paths: { kubelets: rows } }, { ...b1, paths: { paths: rows } }, b2];
  };
  const cases: [rows: string, box: string, cause: RegExp][] = [
    ["pod b2 no", "b1", /its pods do not reach the pods of b2, although the boxes reach each other/],
    ["service kubernetes no", "b1", /its pods do not reach the service kubernetes/],
    ["service DNS no", "b1", /its pods get no answer from CoreDNS/],
  ];
  for (const [rows, box, cause] of cases)
    test(`is reported if it fails: ${rows}`, () => {
      const [, b1, b2] = pods(rows) as [Member, Member, Member];
      const [problem, ...more] = problemsOf([boxes(MODERN)[0] as Member, b1, b2]);
      assert.equal(problem?.box, box);
      assert.match(problem?.cause ?? "", cause);
      assert.deepEqual(more, []);
    });

  for (const what of ["logs", "exec"])
    test(`is reported if it fails: kubectl ${what}`, () => {
      const [a1] = pods(`${what} b2 no\n${what} a1 yes`) as [Member];
      const [problem, ...more] = problemsOf([a1, ...boxes(MODERN).slice(1)]);
      assert.deepEqual(
        [problem?.box, problem?.cause, more],
        ["b2", `kubectl ${what} does not work on it`, []],
      );
    });

  test("is reported once if neither kubectl logs nor exec work", () => {
    const [a1] = pods("logs b2 no\nexec b2 no\nlogs a1 yes\nexec a1 yes") as [Member];
    const causes = problemsOf([a1, ...boxes(MODERN).slice(1)]).map(({ box, cause }) => `${box}: ${cause}`);
    assert.deepEqual(causes, ["b2: kubectl logs does not work on it"]);
  });

  test("is listed as passed, or as not tested if there are no pods", () => {
    const cluster = clusterOf(pods("pod b2 yes\npod a1 yes\nservice DNS yes\nlogs b1 yes\nexec b1 yes"));
    const text = reportOf(cluster, [], {});
    for (const row of [
      "full-size packets from pod to pod: 4 of 4",
      "DNS from the pods of every node: 2 of 2",
      "kubectl exec: 2 of 2",
    ])
      assert.ok(text.includes(`ok    ${row}\n`), text);
    const without = reportOf(clusterOf(boxes(MODERN)), [], {}, "no image");
    assert.match(without, /^could not test pods, services, DNS, logs and exec: no image$/m);
    assert.doesNotMatch(without, /pod to pod/);
  });
});

describe("check reports causes without their consequences:", () => {
  const system = (node: string, over: object = {}) =>
    JSON.stringify({
      kind: "PodList",
      items: ["kube-dns", "metrics-server"].map((app) => ({
        metadata: { name: `${app}-1`, labels: { "k8s-app": app }, creationTimestamp: at(NOW - 9000) },
        spec: { nodeName: node },
        status: {
          phase: "Running",
          conditions: [{ type: "Ready", status: "True" }],
          containerStatuses: [{ state: { running: { startedAt: at(NOW - 9000) } } }],
          ...over,
        },
      })),
    });
  const down = {
    conditions: [],
    containerStatuses: [{ state: { waiting: { reason: "CrashLoopBackOff" } } }],
  };
  const at = (seconds: number) => new Date(seconds * 1000).toISOString();
  const services = (...rows: string[]) => rows.map((row) => `service ${row}`).join("\n");
  const closed = {
    a1: { facts: { system: system("a1") }, ...ways("a1", { b1: 0 }, passed({ b1: 148, b2: 300 })) },
    b1: {
      tried: {
        ...DROPPED,
        ...passed({ a1: 0, b2: 0 }, "203.0.113.77"),
        paths: `pod a1 no\npod b2 no\n${services("DNS no", "kubernetes yes")}`,
      },
    },
    b2: ways("b2", { b1: 0 }, passed({ b1: 148, a1: 300 })),
  };
  const cases: [name: string, members: Member[], causes: [box: string, cause: RegExp][]][] = [
    [
      "packets that are too large for the tunnels, and therefore for the pods",
      boxes(MODERN, {
        a1: ways("a1", { b1: 1340 }),
        b1: ways("b1", { a1: 1340, b2: 1340 }, { paths: "pod a1 no\npod b2 no" }),
        b2: ways("b2", { b1: 1340 }, { paths: "pod b1 no\npod a1 yes" }),
      }),
      [["b1", /MTU 1420 of flannel-wg is too large .* 1340/]],
    ],
    [
      "UDP closed in front of a box, whose pods therefore do not reach CoreDNS on another one",
      boxes(MODERN, closed),
      [["b1", /UDP 51820 is closed before it/]],
    ],
    [
      "UDP closed in front of a box, while it is not known where CoreDNS runs",
      boxes(MODERN, { ...closed, a1: { ...closed.a1, facts: {} } }),
      [["b1", /UDP 51820 is closed before it/]],
    ],
    [
      "a firewall between the pods of two boxes, one of which runs CoreDNS",
      boxes(MODERN, {
        a1: { facts: { system: system("a1") } },
        b1: { tried: { ...boxes(MODERN)[1]?.tried, paths: `pod a1 no\npod b2 yes\n${services("DNS no")}` } },
      }),
      [["b1", /its pods do not reach the pods of a1/]],
    ],
    [
      "two independent ones, packets that are too large for b1, and a CoreDNS on b2 that does not answer b2's pods",
      boxes(MODERN, {
        a1: { ...ways("a1", { b1: 1340 }), facts: { system: system("b2") } },
        b1: ways("b1", { a1: 1340, b2: 1340 }, { paths: "pod a1 no" }),
        b2: ways("b2", { b1: 1340 }, { paths: services("DNS no") }),
      }),
      [
        ["b1", /MTU 1420/],
        ["b2", /its pods get no answer from CoreDNS/],
      ],
    ],
    [
      "a server that cannot be reached, neither from here nor by its agents",
      [
        { ...(boxes(MODERN)[0] as Member), facts: {}, tried: {}, error: "Could not reach a1: timed out" },
        ...boxes(MODERN)
          .slice(1)
          .map((box) => ({
            ...box,
            facts: { ...box.facts, units: units("k3s-agent", "activating", 812) },
            tried: { tries: "api server dropped\nproxied kubernetes dropped" },
          })),
      ],
      [["a1", /Could not reach a1/]],
    ],
    [
      "a server on which k3s does not run, and which refuses its agents' connections to 6443/tcp",
      boxes(MODERN, {
        a1: { facts: { nodes: "", units: units("k3s", "failed") }, tried: { tries: "" } },
        b1: { tried: { tries: "api server refused" } },
        b2: { tried: { tries: "api server refused" } },
      }),
      [["a1", /k3s does not run \(systemd: failed\)/]],
    ],
    [
      "a closed 10250/tcp, without which there are no metrics",
      boxes(MODERN, {
        a1: {
          tried: {
            tries: "tunnel b1 1420\ntunnel b2 1420\nkubelet a1 open\nkubelet b1 dropped\nkubelet b2 open",
            top: figures("a1", "b2"),
            kubelets: "logs b1 no did not answer in 10 s\nexec b1 no x\nlogs b2 yes",
          },
        },
      }),
      [["b1", /its kubelet cannot be reached/]],
    ],
    [
      "a CoreDNS that does not run, without which no pod resolves a name",
      boxes(MODERN, {
        a1: { facts: { system: system("b1", down) } },
        b1: { tried: { ...boxes(MODERN)[1]?.tried, paths: services("DNS no") } },
        b2: { tried: { ...boxes(MODERN)[2]?.tried, paths: services("DNS no") } },
      }).map((box, i) => (i ? box : { ...box, tried: { ...box.tried, top: figures("a1", "b1", "b2") } })),
      [["b1", /CoreDNS does not run \(CrashLoopBackOff\)/]],
    ],
    [
      "missing rules of kube-proxy, which both the box and its pods need",
      boxes(MODERN, {
        b1: {
          tried: {
            tries: "tunnel a1 1420\ntunnel b2 1420\napi server open\nproxied kubernetes dropped",
            paths: services("kubernetes no", "DNS no"),
          },
        },
      }),
      [["b1", /does not reach the API's service/]],
    ],
    [
      "a node on which no pod starts, including CoreDNS and metrics-server",
      boxes(MODERN, {
        a1: {
          facts: { system: system("b1", down) },
          tried: {
            ...boxes(MODERN)[0]?.tried,
            top: "",
            unstarted: "unstarted b1 FailedCreatePodSandBox: no flannel",
          },
        },
        b2: { tried: { ...boxes(MODERN)[2]?.tried, paths: services("DNS no") } },
      }),
      [["b1", /^no pod starts on it: FailedCreatePodSandBox: no flannel$/]],
    ],
  ];
  for (const [name, members, causes] of cases)
    test(name, () => {
      const problems = problemsOf(members);
      assert.deepEqual(
        problems.map(({ box }) => box),
        causes.map(([box]) => box),
        JSON.stringify(problems),
      );
      for (const [i, [, cause]] of causes.entries()) assert.match(problems[i]?.cause ?? "", cause);
    });
});

describe("right after a join or a restart, check", () => {
  const runs = (unit: string, seconds: number) =>
    units(unit, "active", 9).replace("1800", String(3600 - seconds));
  const pod = (app: string, status: object) =>
    JSON.stringify({
      kind: "PodList",
      items: [{ metadata: { name: `${app}-1`, labels: { "k8s-app": app } }, status }],
    });
  const started = (seconds: number) => ({
    conditions: [{ type: "Ready", status: "True" }],
    containerStatuses: [
      { state: { running: { startedAt: new Date((NOW + seconds) * 1000).toISOString() } } },
    ],
  });
  const without = (facts: Facts, b1: Facts = {}) =>
    boxes(MODERN, { a1: { facts, ...ways("a1", {}, { top: figures("a1", "b2") }) }, b1: { facts: b1 } });
  const joined = JSON.parse(nodes(A1, B1, B2));
  joined.items[1].metadata.creationTimestamp = new Date((NOW - 40) * 1000).toISOString();
  const cases: [name: string, members: Member[], said: RegExp, fault?: true][] = [
    [
      "reports the seconds since an agent's start",
      without({}, { units: runs("k3s-agent", 33) }),
      /^a1: "kubectl top nodes" does not list b1 yet: k3s of b1 was started 3[34] s ago, and metrics-server may take 150$/,
    ],
    [
      "reports the seconds since the server's start",
      without({ units: runs("k3s", 12) }),
      /k3s of a1 was started 1[23] s ago/,
    ],
    ["reports the seconds since a join", without({ nodes: JSON.stringify(joined) }), /b1 joined 4[01] s ago/],
    [
      "reports the seconds since metrics-server's own start",
      without({ system: pod("metrics-server", started(-20)) }),
      /metrics-server was started 2[01] s ago/,
    ],
    [
      "treats a start that is a few seconds in the future as now",
      without({ system: pod("metrics-server", started(2)) }),
      /started 0 s ago/,
    ],
    [
      "reports a fault if a start is far in the future",
      without({ system: pod("metrics-server", started(900)) }),
      /does not list b1$/,
      true,
    ],
    [
      "reports a fault once metrics-server has had enough time",
      without({}, { units: runs("k3s-agent", 170) }),
      /does not list b1$/,
      true,
    ],
    [
      "reports a metrics-server that does not run",
      without({
        system: pod("metrics-server", {
          containerStatuses: [{ state: { waiting: { reason: "ImagePullBackOff" } } }],
        }),
      }),
      /does not list b1, and metrics-server does not run \(ImagePullBackOff\)$/,
      true,
    ],
    [
      "reports how long a unit has run that was restarted several times",
      boxes(MODERN, { b1: { facts: { units: runs("k3s-agent", 11), starts: again(4) } } }),
      /^b1: k3s-agent was started 4 times in 7[78] s, and has run for 1[12] s since$/,
    ],
    [
      "reports the same if the unit has now run longer than before",
      boxes(MODERN, { b1: { facts: { units: runs("k3s-agent", 40), starts: again(12) } } }),
      /^b1: k3s-agent was started 12 times/,
    ],
    [
      "reports a CoreDNS that does not run yet",
      boxes(MODERN, {
        a1: { facts: { units: runs("k3s", 30), system: pod("kube-dns", { phase: "Pending" }) } },
        b1: { tried: { ...boxes(MODERN)[1]?.tried, paths: "service DNS no" } },
      }),
      /^a1: CoreDNS does not run \(Pending\): no pod of the cluster resolves a name yet; k3s of a1 was started 3[01] s ago$/,
    ],
  ];
  for (const [name, members, said, fault] of cases)
    test(`${name}${fault ? "" : ", as a note"}`, () => {
      const cluster = clusterOf(members);
      const { problems, notes } = verdict(cluster, undefined);
      const lines = fault ? problems.map(({ cause }) => cause) : notes;
      assert.equal(lines.length, 1, JSON.stringify({ problems, notes }));
      assert.match(lines[0] ?? "", said);
      assert.equal(problems.length, fault ? 1 : 0, JSON.stringify(problems));
      const report = reportOf(cluster, problems, {}, undefined, notes);
      if (!fault) {
        assert.match(report, /^note {2}\S+: .*\n\nNothing is wrong\.$/m);
        assert.doesNotMatch(report, /^FAIL/m);
      }
    });

  test("reports nothing about a unit that was not restarted recently", () => {
    const facts = { units: runs("k3s-agent", 5).replace("NRestarts=0", "NRestarts=40") };
    assert.deepEqual(verdict(clusterOf(boxes(MODERN, { b1: { facts } })), undefined), {
      problems: [],
      notes: [],
    });
  });
});

describe("with a slow or overloaded server,", () => {
  const BUSY = "9.81 7.00 3.00 5/300 999\n2\nMemTotal: 2000000 kB\nMemAvailable: 40000 kB";
  const slow = {
    kubelets: "logs b1 no did not answer in 10 s\nlogs a1 yes\nexec b2 no did not answer in 10 s",
  };

  test("requests that timed out are attributed to the load, which is reported once, with its figures", () => {
    const tried = { ...boxes(MODERN)[0]?.tried, ...slow };
    const [problem, ...more] = problemsOf(boxes(MODERN, { a1: { facts: { load: BUSY }, tried } }));
    assert.deepEqual([problem?.box, more], ["a1", []]);
    assert.equal(
      problem?.cause,
      "the box is overloaded (load 9.81 on 2 cores, memory 98 % in use): 2 questions did not answer in time",
    );
    assert.doesNotMatch(problem?.remedy ?? "", /open/);
  });

  test("a closed port is still reported as a closed port", () => {
    const tries = "tunnel b1 1420\ntunnel b2 1420\nkubelet a1 open\nkubelet b1 dropped\nkubelet b2 open";
    const tried = { tries, top: figures("a1", "b1", "b2"), kubelets: "logs b1 no did not answer in 10 s" };
    const [problem, ...more] = problemsOf(boxes(MODERN, { a1: { facts: { load: BUSY }, tried } }));
    assert.match(problem?.cause ?? "", /its kubelet cannot be reached at 198\.51\.101\.11:10250/);
    assert.deepEqual(more, []);
  });

  test("a high load alone is not a fault, but is shown in the table", () => {
    const members = boxes(MODERN, { a1: { facts: { load: BUSY } } });
    assert.deepEqual(problemsOf(members), []);
    assert.match(reportOf(clusterOf(members), [], {}), /^a1 .* 98% +9\.81\/2$/m);
  });

  test("a timeout without a high load is not reported as a closed port", () => {
    const problems = problemsOf(boxes(MODERN, { a1: { tried: { ...boxes(MODERN)[0]?.tried, ...slow } } }));
    assert.deepEqual(
      problems.map(({ box, cause }) => [box, cause]),
      [
        ["b1", "kubectl logs of it: did not answer in 10 s"],
        ["b2", "kubectl exec of it: did not answer in 10 s"],
      ],
    );
    for (const { remedy } of problems) assert.match(remedy, /^run make check again/);
  });

  test("an error message of the API is quoted", () => {
    const kubelets =
      'logs b1 no 502 {"kind":"Status","message":"proxy error from 127.0.0.1:6443: \\"EOF\\""}';
    const [problem] = problemsOf(boxes(MODERN, { a1: { tried: { ...boxes(MODERN)[0]?.tried, kubelets } } }));
    assert.equal(problem?.cause, 'kubectl logs does not work on it: proxy error from 127.0.0.1:6443: "EOF"');
  });

  for (const [what, load, cause] of [
    ["does not answer in time", "0.5 0.4 0.3 1/3 9\n1", "the API did not answer in 20 s"],
    [
      "is too busy to answer",
      BUSY,
      "the API did not answer in 20 s; the box is overloaded (load 9.81 on 2 cores, memory 98 % in use)",
    ],
  ] as const)
    test(`an API that ${what} is not reported as a cluster without nodes`, () => {
      const facts = { nodes: "", api: "20 did not answer in 20 s", load };
      const problems = problemsOf(boxes(MODERN, { a1: { facts, tried: { tries: "" } } }));
      assert.deepEqual(
        problems.map((problem) => [problem.box, problem.cause]),
        [["a1", cause]],
      );
      assert.equal(/^stop what overloads it/.test(problems[0]?.remedy ?? ""), load === BUSY);
    });

  test("the one of two servers that does not answer is named, and the nodes are read from the other", () => {
    const [a1, b1, b2] = boxes(MODERN) as [Member, Member, Member];
    const facts = { ...b1.facts, joins: "", ca: a1.facts.ca ?? "", units: units("k3s", "active", 7) };
    const second: Member = {
      ...b1,
      role: "server",
      facts: { ...facts, nodes: "", api: "20 did not answer in 20 s" },
      tried: { tries: "" },
    };
    assert.deepEqual(
      problemsOf([a1, second, b2]).map(({ box, cause }) => [box, cause]),
      [["b1", "the API did not answer in 20 s"]],
    );
  });
});

describe("a peer with an unexpected endpoint", () => {
  const at = (name: string, endpoint: string) => {
    const peers = boxes(MODERN)[0]?.facts.peers as string;
    const own = { b1: B1.ip, b2: B2.ip }[name] as string;
    return boxes(MODERN, { a1: { facts: { peers: peers.replace(`${own}:51820`, endpoint) } } });
  };

  test("is reported as a note, and is not red in the table, if its handshake is recent", () => {
    const members = at("b1", "203.0.113.77:51820");
    assert.deepEqual(problemsOf(members), []);
    assert.deepEqual(judge(clusterOf(members)).notes, [
      "a1: b1 sends from 203.0.113.77:51820, not from 198.51.101.11; the handshake is fresh",
    ]);
    assert.doesNotMatch(reportOf(clusterOf(members), [], { isTTY: true, columns: 200 }), /\[31m/);
  });

  for (const [endpoint, cause] of [
    ["192.168.0.11:51820", "its WireGuard has b1 at 192.168.0.11, which is no public address"],
    [`${B2.ip}:51820`, "its WireGuard has b1 at 198.51.101.12, which is the address of b2"],
  ] as const)
    test(`is reported as a fault if that is ${endpoint}`, () =>
      assert.deepEqual(
        problemsOf(at("b1", endpoint)).map((problem) => [problem.box, problem.cause]),
        [["a1", cause]],
      ));
});

describe("the pods' bridge", () => {
  test("of modern k3s is reported if its MTU is larger than the tunnel's", () => {
    const [problem, ...more] = problemsOf(boxes(MODERN, { b1: { facts: { cni: "1500" } } }));
    assert.match(
      problem?.cause ?? "",
      /^its pods at cni0 have an MTU of 1500, larger than the 1420 of flannel-wg/,
    );
    assert.deepEqual([problem?.box, more], ["b1", []]);
  });

  test("is not reported if its MTU is the tunnel's or smaller", () => {
    for (const cni of ["1420", "1340", ""])
      assert.deepEqual(problemsOf(boxes(MODERN, { b1: { facts: { cni } } })), []);
  });
});

test("a node on which no pod starts is reported with the kubelet's message, without its control characters", () => {
  const words = 'FailedCreatePodSandBox: plugin type="flannel" failed (add): \u001b[2Jno subnet.env';
  const tried = { ...boxes(MODERN)[0]?.tried, unstarted: `unstarted b1 ${words}` };
  const cluster = clusterOf(boxes(MODERN, { a1: { tried } }));
  const { problems } = verdict(cluster, undefined);
  assert.deepEqual(
    problems.map(({ box }) => box),
    ["b1"],
  );
  const text = reportOf(cluster, problems, {});
  assert.match(
    text,
    /^b1: no pod starts on it: FailedCreatePodSandBox: plugin type="flannel" failed \(add\): {2}?.*no subnet\.env$/m,
  );
  assert.ok(!text.includes("\u001b") && !text.includes("Nothing is wrong"), text);
});

describe("a message in k3s's journal", () => {
  const known = fixture("k3s-messages.txt")
    .split("\n")
    .slice(1)
    .filter(Boolean)
    .map((row) => row.split("\t") as [string, string, string]);
  for (const [generation, name, text] of known)
    test(`is explained: ${name}, ${generation}`, () => {
      const meaning = meaningOf(text, "make agent HOST=b1");
      assert.ok(meaning, text);
      assert.doesNotMatch(`${meaning.cause}${meaning.remedy}`, /AGAIN|undefined/);
      const { status } = shell(text, ["grep", "-E", MEANT]);
      assert.equal(status, 0, "grep on the box does not find it");
    });

  test("is reported only for a node that is not Ready", () => {
    const said = `level=info msg="Waiting to retrieve agent configuration; server is not ready: failed to retrieve configuration from server: not authorized"`;
    const over = { facts: { said, units: units("k3s-agent", "activating", 812) } };
    assert.deepEqual(problemsOf(boxes(MODERN, { b1: over })), []);
    const [problem] = problemsOf(boxes(MODERN, { ...list(A1, { ...B1, ready: false }, B2), b1: over }));
    assert.match(problem?.cause ?? "", /the password in its K3S_TOKEN is wrong/);
  });

  test("takes precedence over earlier ones", () => {
    const [taken, flag] = ["hostname taken", "unknown flag"].map(
      (name) => known.find((row) => row[1] === name)?.[2],
    );
    assert.match(
      meaningOf(`${taken}\n${flag}\nlevel=fatal msg="context canceled"\n`, "x")?.cause ?? "",
      /--nonsense/,
    );
    assert.match(meaningOf(`${flag}\n${taken}`, "x")?.cause ?? "", /another node has this box's name/);
  });

  test("about an unknown flag is explained with the name of that flag", () => {
    const [row] = known.filter(([, name]) => name === "unknown flag");
    assert.match(
      meaningOf(row?.[2] ?? "", "x")?.cause ?? "",
      /^SERVER_ARGS or AGENT_ARGS has --nonsense, which this release/,
    );
  });
});

describe("the report", () => {
  // CI sets it; here the tests do.
  delete process.env.NO_COLOR;

  const ESC = "\x1b";
  const many = () => {
    const specs = Array.from({ length: 20 }, (_, i) => ({
      name: `cloud-${i + 1}`,
      ip: `203.0.113.${i + 1}`,
      n: i,
    }));
    return specs.map((spec, i) => {
      const others = specs.filter((s) => s !== spec);
      const peers = others.map(({ name, ip, n }) =>
        [
          "flannel-wg",
          keyOf(name),
          "(none)",
          `${ip}:51820`,
          `10.42.${n}.0/24`,
          1795446000 - n * 9,
          3e6,
          4e9,
          25,
        ].join("\t"),
      );
      const one = member(MODERN, spec, { peers: peers.join("\n"), now: "1795446000.1", joins: "" });
      return i
        ? one
        : {
            ...one,
            role: "server" as const,
            facts: { ...one.facts, nodes: nodes(...specs), ca: "", units: units("k3s", "active", 7) },
          };
    });
  };
  const page = (members: Member[], where: object) => {
    const cluster = clusterOf(members);
    return reportOf(cluster, diagnose(cluster), where);
  };

  test("of 20 nodes fits into 80 columns, and contains every pair of nodes", () => {
    const text = page(many(), { columns: 80 });
    const tables = text.split("\n\n").slice(0, 3);
    for (const row of tables.join("\n").split("\n")) assert.ok(row.length <= 80, `${row.length}: ${row}`);
    const rows = (tables[2] as string).split("\n").slice(1);
    assert.equal(rows.length, 20);
    for (const row of rows) assert.equal(row.slice(row.indexOf("cloud")).trim().split(/\s+/).length, 21, row);
  });

  test("has complete columns and no escape sequences in a pipe, and colours on a terminal unless NO_COLOR is set", () => {
    const plain = page(boxes(MODERN), {});
    assert.ok(!plain.includes(ESC) && !plain.includes("…"));
    assert.match(plain, /^b1 +30s 4\.1K\/123K +- +30s 4\.1K\/123K +198\.51\.101\.11:51820$/m);
    assert.match(plain, /Nothing is wrong\.\n$/);
    const terminal = { columns: 80, isTTY: true };
    assert.ok(page(boxes(MODERN), terminal).includes(`${ESC}[32m`));
    process.env.NO_COLOR = "1";
    try {
      assert.ok(!page(boxes(MODERN), terminal).includes(ESC));
    } finally {
      delete process.env.NO_COLOR;
    }
  });

  test("marks wrong values in the tables, and lists the causes and remedies below", () => {
    const text = page(
      boxes(
        OLD,
        list({ ...A1, version: OLD }, { ...B1, version: OLD, public: "192.168.0.11", overwrite: "" }, B2),
      ),
      {
        isTTY: true,
        columns: 100,
      },
    );
    assert.ok(text.includes(`${ESC}[31m192.168.0.11`));
    assert.match(text, /b1: flannel's address .*\n {4}do: make annotate HOST=b1/);
  });

  test("lists a problem that several boxes have once", () => {
    const same = ["a1", "b1"].map((box) => ({ box, cause: "c", remedy: "r" }));
    assert.deepEqual(merged([...same, { box: "b2", cause: "c", remedy: "other" }]), [
      { box: "a1, b1", cause: "c", remedy: "r" },
      { box: "b2", cause: "c", remedy: "other" },
    ]);
  });

  test("contains no token, whatever a box has printed", () => {
    assert.doesNotMatch(page(boxes(MODERN, { b1: { error: `broken ${TOKEN}` } }), {}), /0123456789abcdef/);
  });

  test("contains the boxes that did not answer", () => {
    const [a1, b1, b2] = boxes(MODERN) as [Member, Member, Member];
    const { clock: _, ...silent } = b1;
    const text = page([a1, { ...silent, error: "gone", facts: {}, tried: {} }, b2], {});
    assert.match(text, /^b1 +v1\.36\.2\+k3s1 +- +unseen +- +- +- +- +- +-$/m);
    assert.doesNotMatch(text, /undefined|NaN/);
  });
});

test("a failure is never explained by a problem whose remedy is the command that failed", () => {
  const setUp = { box: "b1", cause: "k3s-agent is not set up", remedy: "make agent HOST=b1" };
  const other = { ...setUp, box: "b2", remedy: "make agent HOST=b2" };
  const down = { box: "a1", cause: "k3s does not run on it", remedy: "make server" };
  const clock = { box: "b1", cause: "its clock is behind", remedy: "timedatectl set-ntp true on it" };
  const shown = { ...setUp, remedy: "make agent HOST=b1 waits for it and shows the journal" };
  const taken = { ...setUp, remedy: "hostnamectl set-hostname another name on it, then make agent HOST=b1" };
  for (const [problems, script, told] of [
    [[setUp, other], "agent", []],
    [[setUp, down], "agent", []],
    [[shown], "agent", []],
    [[down], "agent", [down]],
    [[clock, setUp], "agent", [clock]],
    [[taken], "agent", [taken]],
    [[setUp], "annotate", [setUp]],
    [[other], "agent", [other]],
    [[{ ...down, box: "b1" }], "server", []],
    [[{ ...down, box: "b1", remedy: "make fix-metrics" }], "fix-metrics", []],
    [
      [{ ...down, box: "b1", remedy: "make server-x" }],
      "server",
      [{ ...down, box: "b1", remedy: "make server-x" }],
    ],
  ] as const)
    assert.deepEqual(causesOf(problems, "b1", script), told, `${script}: ${JSON.stringify(problems)}`);
});

/** What check sends to each of these boxes, in a cluster with these nodes. */
async function sentTo(specs: NodeSpec[], args?: string[]): Promise<Record<string, string[]>> {
  const sent = Object.fromEntries(specs.map(({ name }) => [name, [] as string[]]));
  const json = nodes(...specs.map((spec) => ({ ...spec, ...(args && { args }) })));
  await surveyAndTry(
    specs.map((spec) => {
      const { box, role, facts } = member(MODERN, spec, spec.name === "a1" ? { nodes: json } : {});
      return { box: { ...box, shell: answering(facts, sent[spec.name]) }, role };
    }),
  );
  return sent;
}

test("check reads a box's clock, whatever the look before it printed last", () => {
  const said: string[] = [];
  const stream = reader("mark", { say: (text) => said.push(text) });
  const glued = prints("glued")("fact glued; printf 'a file without an end of its line'");
  const { stdout } = shell(wrapInMain(lookScript([ask([glued, CLOCK])], wanted(), "mark")));
  for (const line of stdout.split("\n")) stream.line(line);
  assert.equal(said.length, 1, stdout);
  assert(Math.abs(Number(said[0]) - Date.now() / 1000) < 60, said[0]);
});

describe("check sends each box", () => {
  const many = [
    A1,
    ...Array.from({ length: 99 }, (_, i) => ({ name: `n${i}`, ip: `198.51.102.${i + 1}`, n: i + 1 })),
  ];

  test("one script, which is as long in a cluster of a hundred nodes as in one of three", async () => {
    const length = (sent: Record<string, string[]>) => [
      ...new Set(
        Object.entries(sent).map(([name, texts]) => `${name === "a1"} ${texts.map((text) => text.length)}`),
      ),
    ];
    const lengths = length(await sentTo([A1, B1, B2]));
    assert.deepEqual(length(await sentTo(many)), lengths);
    assert.match(lengths.join(), /^true \d+,false \d+$/, "one length for the server, one for all agents");
  });

  test("a second script only for the API's service, if the server has its own --service-cidr", async () => {
    const sent = await sentTo([A1, B1, B2], ["server", "--service-cidr=10.99.0.0/16"]);
    for (const [, again, ...more] of Object.values(sent)) {
      assert.match(again ?? "", /serves 10\.99\.0\.1$/m);
      assert.deepEqual(more, []);
    }
  });
});

test("check's JSON output preserves all text, but contains no control characters", () => {
  const args = ["\u009b31m", "\u202eevil", "\u{e0001}", "\u001b[2J", "ü 中"];
  const text = jsonOf({ args });
  assert.deepEqual(JSON.parse(text), { args });
  assert.doesNotMatch(text, /[\p{Cc}\p{Cf}]/u);
  assert.match(text, /ü 中/);
});

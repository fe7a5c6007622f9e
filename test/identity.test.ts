import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { diagnose } from "../lib/check/diagnose.ts";
import { ask, clusterOf, LOOKS } from "../lib/check/survey.ts";
import { foreignFirst } from "../lib/k3s/foreign.ts";
import {
  argumentsIn,
  caLook,
  casOf,
  identityAs,
  isForeign,
  mayGo,
  nodeNameOf,
  nodeOf,
  unitsLook,
  whoIs,
} from "../lib/k3s/identity.ts";
import { nodesOf } from "../lib/k3s/nodes.ts";
import { argsOf, WRITTEN_BY } from "../lib/k3s/unit.ts";
import { planAll, Refusal, type Want } from "../lib/step.ts";
import { caIn } from "../lib/token.ts";
import { agent, agentSteps } from "../scripts/agent.ts";
import { annotateAs } from "../scripts/annotate.ts";
import { archive } from "../scripts/cluster/backup.ts";
import { mayRemove, uninstall } from "../scripts/cluster/remove.ts";
import { forgetPasswords } from "../scripts/cluster/restore.ts";
import { token } from "../scripts/cluster/token.ts";
import { stepsFor } from "../scripts/cluster/upgrade.ts";
import { server, serverSteps } from "../scripts/server.ts";
import { upgradeKernel } from "../scripts/upgrade-kernel.ts";
import {
  A1,
  B1,
  B2,
  BOOT,
  box,
  type Facts,
  fixture,
  IP,
  MACHINE,
  MODERN,
  member,
  type NodeSpec,
  nodes,
  prepared,
  shell,
  TOKEN,
  temporary,
  wanted,
} from "./helpers.ts";

const REBOOTED = "88e9fd3e-8477-40e7-aaf5-7b4c1351751a";
const [bootB2 = "", machineB2 = ""] = [box(B2).boot?.trim(), box(B2).machine?.trim()];
const refused = (words: RegExp) => (e: Error) => e instanceof Refusal && words.test(e.message);

describe("the node of a box", () => {
  type Case = [name: string, at: string, says: Facts, nodes: NodeSpec[], found: string | RegExp];
  const cases: Case[] = [
    ["is the one at its address, in its boot", B1.ip, box(B1), [A1, B1, B2], "b1 same"],
    ["also where its host name is another", B1.ip, { ...box(B1), hostname: "b9" }, [A1, B1, B2], "b1 same"],
    ["also by its InternalIP alone", B1.ip, box(B1), [A1, { ...B1, external: "" }], "b1 same"],
    ["is told by the address alone where the box is gone", B1.ip, {}, [A1, B1, B2], "b1 same"],
    ["is none where the cluster knows neither", "192.0.2.9", { boot: REBOOTED }, [A1, B1], "none"],
    [
      "is known by its machine id after its restart, before k3s has said so",
      B1.ip,
      { ...box(B1), boot: REBOOTED, uptime: "20.00" },
      [A1, B1],
      "b1 restarted",
    ],
    [
      "also where k3s is down since",
      B1.ip,
      { ...box(B1), boot: REBOOTED },
      [A1, { ...B1, ready: false }],
      "b1 restarted",
    ],
    [
      "is another's where it goes on in another boot, whatever the machine id: images are copied",
      B1.ip,
      { ...box(B1), boot: REBOOTED },
      [A1, B1],
      /Node b1, at .* is Ready, and is another box/,
    ],
    [
      "is what is left of it where the box was reinstalled",
      B1.ip,
      { boot: REBOOTED, machine: "c".repeat(32) },
      [A1, { ...B1, ready: false }],
      "b1 anew",
    ],
    [
      "is not the healthy one of another box, by a slip in the address",
      B2.ip,
      box(B1),
      [A1, B1, B2],
      /its boot id is that of node b1, at 198\.51\.101\.11/,
    ],
    ["nor where its own was forgotten", B2.ip, box(B1), [A1, B2], /Node b2, at .* is another box than this/],
    ["nor one by its boot id alone, at another address", "192.0.2.9", box(B2), [A1, B2], /that of node b2/],
    [
      "is nobody's where two claim the address",
      B2.ip,
      box(B2),
      [A1, { ...B1, external: B2.ip }, B2],
      /Nodes b1 and b2 have the same address/,
    ],
    [
      "also where the box is gone, and one claims it inside",
      B2.ip,
      {},
      [{ ...A1, ip: B2.ip, external: "192.0.2.1" }, B2],
      /Nodes a1 and b2 have the same address/,
    ],
    [
      "is nobody's where two claim the boot id, by a slip in the address",
      B2.ip,
      box(B1),
      [A1, B1, { ...B2, boot: box(B1).boot?.trim() ?? "" }],
      /that of node b1/,
    ],
    [
      "may share its boot id, as containers of one host do",
      B1.ip,
      { ...box(B1), boot: bootB2 },
      [A1, { ...B1, boot: bootB2 }, B2],
      "b1 same",
    ],
    [
      "does not share a machine id that is not there",
      B1.ip,
      { boot: REBOOTED, machine: "" },
      [A1, { ...B1, machine: "" }],
      /is another box/,
    ],
  ];
  for (const [name, at, says, list, found] of cases)
    test(name, () => {
      const find = () => nodeOf(nodesOf(nodes(...list)), whoIs(at, { uptime: "3600.00", ...says }));
      if (found instanceof RegExp) return assert.throws(find, refused(found));
      const match = find();
      assert.equal(match ? `${match.node.name} ${match.is}` : "none", found);
    });
});

describe("a box is called", () => {
  type Case = [name: string, facts: Facts, list: NodeSpec[], expected: string, args?: string];
  const unit = { named: "b1\n" };
  const renamed = { hostname: "b9\n" };
  const cases: Case[] = [
    ["what its host name says, before it has joined", {}, [], "b1"],
    ["what its unit says, whatever its host name is by now", { ...unit, ...renamed }, [], "b1"],
    ["what its node is called, by a unit that does not say", renamed, [A1, B1, B2], "b1"],
    ["also after a restart that renamed it", { ...renamed, boot: REBOOTED }, [A1, B1], "b1"],
    ["what the settings say in any case", { ...unit, ...renamed }, [A1, B1], "b7", "--node-name=b7"],
    [
      "what it has joined as since, where its node of before is left",
      renamed,
      [A1, { ...B1, ready: false }, { ...B1, name: "b9" }],
      "b9",
    ],
    [
      "not as a copy of it is, at another address",
      { ...renamed, ...{ boot: REBOOTED } },
      [A1, { ...B2, machine: "33e005557d0340dfb2bcad364d0ec4a1" }],
      "b9",
    ],
    ["not as another is that has its address", { ...renamed, boot: REBOOTED, machine: "" }, [A1, B1], "b9"],
    ["by its first unit's word, and nothing of a line that is none", { named: "b1\nx\n" }, [], "b1"],
  ];
  for (const [name, facts, list, expected, args = ""] of cases)
    test(name, () => {
      const want = wanted({ PUBLIC_IP: B1.ip, AGENT_ARGS: args });
      const seen = prepared(MODERN, { ...box(B1), nodes: list.length ? nodes(...list) : "", ...facts });
      assert.equal(nodeNameOf("agent", want, seen), expected);
    });

  test("and its unit says so, but where the settings do", () => {
    for (const args of ["", "--node-name=b7", "--node-name b7"]) {
      const want = wanted({ AGENT_ARGS: args, SERVER_ARGS: args });
      for (const role of ["agent", "server"] as const) {
        const names = argsOf(role, "modern", want, "iptables", "b1").filter((arg) =>
          arg.startsWith("--node-name"),
        );
        assert.deepEqual(names, [args.split(" ")[0] || "--node-name=b1"]);
      }
    }
  });

  const naming = [
    ...[foreignFirst("agent"), identityAs("agent"), annotateAs(), server, agent, upgradeKernel],
    ...[
      uninstall,
      forgetPasswords,
      archive("x"),
      token,
      stepsFor("agent", "", "").putBack,
      ask([...LOOKS.agent]),
    ],
  ];
  for (const step of naming)
    test(`is looked for on the box by the step that asks for it: ${step.name || "check"}`, () =>
      assert.match(step.look(wanted()).join("\n"), /^fact named;/m));

  test("check finds a renamed box's node, and has nothing to say of the name", () => {
    const members = [member(MODERN, A1), member(MODERN, B1, { hostname: "b9" }), member(MODERN, B2)];
    const cluster = clusterOf(members);
    assert.deepEqual(
      cluster.boxes.map(({ nodeName, node }) => [nodeName, node?.name]),
      [
        ["a1", "a1"],
        ["b1", "b1"],
        ["b2", "b2"],
      ],
    );
    assert.deepEqual(diagnose(cluster), []);
  });
});

const [OWN, OTHER] = ["ab".repeat(32), "cd".repeat(32)];

test("the CA by which a box is part of a cluster is read from its files, without any secret", () => {
  const root = temporary();
  const text = caLook
    .replaceAll("/var/lib/rancher/k3s", `${root}/k3s`)
    .replaceAll("/etc/systemd/system", `${root}/etc`);
  const look = (files = "") => shell(`${files}fact() { :; }\nset -eu\nd=; ${text}true`, ["sh", "-s"]).stdout;
  assert.equal(look(), "");
  const said = look(`mkdir -p ${root}/etc ${root}/k3s/agent ${root}/k3s/server/tls; cd ${root}
printf x >k3s/agent/server-ca.crt; printf y >k3s/server/tls/server-ca.crt
echo ${TOKEN} >k3s/server/node-token; printf "K3S_URL=x\\nK3S_TOKEN='${TOKEN}'\\n" >etc/k3s-agent.service.env\n`);
  const cas = casOf({ cas: said });
  assert.equal(cas.server.length, 2);
  assert.equal(cas.agent.length, 2);
  assert.ok(cas.server.includes(OWN) && cas.agent.includes(OWN));
  assert.doesNotMatch(said, /0123456789abcdef/);
  assert.equal(caIn(TOKEN), OWN);
  assert.equal(caIn("(the server's)"), undefined);
});

describe("remove takes k3s from", () => {
  const cluster = (...list: NodeSpec[]): Facts => ({ cas: `server ${OWN}\n`, nodes: nodes(A1, ...list) });
  const b1 = (cas = "", over: Facts = {}) => prepared("", { ...box(B1), cas, ...over });
  type Case = [
    name: string,
    facts: Facts,
    cluster: Facts,
    how: { role?: "server"; force?: true; ip?: string },
    refusal?: RegExp,
  ];
  const cases: Case[] = [
    ["an agent of this cluster", b1(`agent ${OWN}\n`), cluster(B1, B2), {}],
    ["a box that was never joined", b1(), cluster(B2), {}],
    ["a box that is to join, and never has", b1(`agent ${OWN}\n`), cluster(B2), {}],
    ["a box whose uninstalling was cut", b1(), cluster({ ...B1, ready: false }), {}],
    [
      "a further server of this cluster",
      b1(`server ${OWN}\nagent ${OWN}\n`),
      cluster(B1),
      { role: "server" },
    ],
    [
      "a box that was reinstalled, and whose node is left",
      b1("", { boot: REBOOTED, machine: machineB2 }),
      cluster({ ...B1, ready: false }),
      {},
    ],
    ["the server that was, where told", b1(`server ${OWN}\nagent ${OWN}\n`), cluster(B2), { force: true }],
    [
      "no server that the cluster does not know",
      b1(`server ${OWN}\nagent ${OWN}\n`),
      cluster(B2),
      {},
      /a server's data, with the same CA.*\? make remove HOST=old FORCE=1 removes it/,
    ],
    [
      "no server of another cluster",
      b1(`server ${OTHER}\nagent ${OTHER}\n`),
      cluster(B2),
      { force: true },
      /a server of another cluster \(CA cdcdcdcdcdcd…, this cluster's abababababab…\)/,
    ],
    [
      "no server of another cluster, though a node of this one claims its address",
      b1(`server ${OTHER}\n`),
      cluster({ ...B1, ready: false }),
      { role: "server" },
      /a server of another cluster/,
    ],
    ["no agent of another cluster", b1(`agent ${OTHER}\n`), cluster(B2), {}, /an agent of another cluster/],
    [
      "no box at another's address",
      b1(`agent ${OWN}\n`),
      cluster(B1, B2),
      { ip: B2.ip },
      /its boot id is that of node b1/,
    ],
    [
      "no box at the address of another that is off, after its own node was deleted",
      b1(`agent ${OWN}\n`),
      cluster({ ...B2, ready: false }),
      { ip: B2.ip },
      /Node b2, at .*, is another box than this one/,
    ],
    [
      "no box whose address a second node claims",
      b1(`agent ${OWN}\n`),
      cluster(B1, { ...B2, external: B1.ip }),
      { force: true },
      /Nodes b1 and b2 have the same address/,
    ],
    [
      "no agent where nothing tells of the cluster",
      b1(`agent ${OTHER}\n`),
      { nodes: nodes(A1) },
      {},
      /It is not known which cluster this box belongs to/,
    ],
  ];
  for (const [name, facts, at, { role = "agent", force = false, ip = B1.ip }, refusal] of cases)
    test(name, () => {
      const token = at.cas ? TOKEN : "";
      const decide = () =>
        mayRemove(facts, at, whoIs(ip, facts), token, role, force, "make remove HOST=old FORCE=1");
      if (refusal) assert.throws(decide, refused(refusal));
      else decide();
    });
});

/** A unit as k3s's own installer writes it (get.k3s.io; k3sup runs the same). */
const official = (role: string, ...args: string[]) => `[Unit]
Description=Lightweight Kubernetes
Documentation=https://k3s.io
Wants=network-online.target
After=network-online.target

[Install]
WantedBy=multi-user.target

[Service]
Type=notify
EnvironmentFile=-/etc/default/%N
EnvironmentFile=-/etc/sysconfig/%N
EnvironmentFile=-/etc/systemd/system/k3s.service.env
KillMode=process
Delegate=yes
User=root
# Having non-zero Limit*s causes performance problems due to accounting overhead
# in the kernel. We recommend using cgroups to do container-local accounting.
LimitNOFILE=1048576
Restart=always
RestartSec=5s
ExecStartPre=-/sbin/modprobe br_netfilter
ExecStart=/usr/local/bin/k3s \\
    ${role} \\
${args.map((arg) => `\t'${arg}' \\\n`).join("")}

`;

describe("a unit", () => {
  test("is this project's own by its first line, or by the words of those before it had one", () => {
    for (const name of ["k3s-old", "k3s-modern", "k3s-agent-old", "k3s-agent-modern"]) {
      const text = fixture(`${name}.service`);
      assert.equal(isForeign(`# /etc/systemd/system/k3s.service\n${text}`), false, name);
      assert.equal(isForeign(text.replace(`${WRITTEN_BY}\n`, "")), false, name);
    }
    assert.equal(isForeign(""), false);
    assert.equal(isForeign(official("server")), true);
    assert.equal(
      isForeign(
        fixture("k3s-old.service").replace("EnvironmentFile=", "EnvironmentFile=-").replace(WRITTEN_BY, ""),
      ),
      true,
    );
  });

  test("has the arguments of its last ExecStart", () => {
    assert.deepEqual(argumentsIn(official("server", "--disable", "traefik", "--tls-san=a.example")), [
      "server",
      "--disable",
      "traefik",
      "--tls-san=a.example",
    ]);
    const dropIn = `${official("server")}# /etc/systemd/system/k3s.service.d/x.conf\n[Service]\nExecStart=\nExecStart=/usr/bin/k3s server -d "/srv/k3s"\n`;
    assert.deepEqual(argumentsIn(dropIn), ["server", "-d", "/srv/k3s"]);
    for (const start of [
      "ExecStart = /usr/bin/k3s server -d /srv/k3s",
      "  ExecStart=/usr/bin/k3s server -d /srv/k3s",
      "ExecStart= /usr/bin/k3s server -d /srv/k3s",
      "ExecStart=/usr/bin/k3s \\\n# not -d /x\n  ; nor this\n  server \\\n  -d /srv/k3s",
    ])
      assert.deepEqual(argumentsIn(`[Service]\n${start}\n`), ["server", "-d", "/srv/k3s"], start);
    assert.deepEqual(argumentsIn(""), []);
  });

  test("is looked at with what it is told elsewhere, and no secret comes with that", () => {
    const root = temporary();
    const text = unitsLook.replaceAll(/\/(etc|var)\//g, `${root}/$1/`);
    const { stdout } =
      shell(`mkdir -p ${root}/etc/systemd/system ${root}/etc/rancher/k3s ${root}/var/lib/rancher/k3s/server/db/etcd
echo "K3S_DATA_DIR='/data/k3s'
K3S_DATASTORE_ENDPOINT=postgres://k3s:hunter2@db" >${root}/etc/systemd/system/k3s.service.env
echo 'data-dir: "/srv/k3s"
token: hunter2' >${root}/etc/rancher/k3s/config.yaml
mkdir ${root}/etc/rancher/k3s/config.yaml.d
echo 'data-dir: /d' >${root}/etc/rancher/k3s/config.yaml.d/x.yaml
for file in a b c; do echo "data-dir: /$file" >${root}/$file.yaml; done
cat >${root}/etc/systemd/system/k3s.service <<'EOF'
ExecStart=/usr/local/bin/k3s server -c ${root}/a.yaml
EOF
cat >${root}/etc/systemd/system/k3s-agent.service <<'EOF'
ExecStart=/usr/local/bin/k3s \\
\t'--config=${root}/b.yaml' \\
    --config "${root}/c.yaml" --debug
EOF
systemctl() { return 1; }
fact() { echo "fact $1"; }
${text}`);
    assert.equal(
      stdout.split("fact told\n")[1],
      "data-dir /data/k3s\ndatastore-endpoint\ndata-dir /srv/k3s\ndata-dir /d\ndata-dir /a\ndata-dir /b\ndata-dir /c\ncluster-init\nno-database\nno-agent\n",
    );
  });
});

describe("before a box gets a role", () => {
  const want = wanted({ K3S_TOKEN: "" });
  const known = wanted();
  type Case = [
    name: string,
    role: "server" | "agent",
    want: typeof known,
    facts: Facts,
    refusal?: RegExp,
    word?: string,
  ];
  const cases: Case[] = [
    ["a fresh one may be the server", "server", want, {}],
    ["a fresh one may be an agent", "agent", known, {}],
    ["the cluster's server goes on", "server", known, { cas: `server ${OWN}\n` }],
    ["an agent of the cluster goes on", "agent", known, { cas: `agent ${OWN}\n` }],
    ...(["nodes", "registered"] as const).flatMap((fact): Case[] => {
      const at = (spec: Partial<NodeSpec>) => ({ [fact]: nodes({ ...B1, ...spec }) });
      const taken = /^Node b1, at \S+, is Ready, and is another box than this one/;
      return [
        [`one does not join at another's address (${fact})`, "agent", known, at({ ip: IP }), taken],
        [`nor where that is inside (${fact})`, "agent", known, at({ ip: IP, external: B1.ip }), taken],
        [`nor where it is outside alone (${fact})`, "agent", known, at({ external: IP }), taken],
        ["one that was reinstalled joins at its own address", "agent", known, at({ ip: IP, ready: false })],
        [`nor as a copy of its image (${fact})`, "agent", known, at({ ip: IP, machine: MACHINE }), taken],
        [
          "one that has restarted goes on",
          "agent",
          known,
          { ...at({ ip: IP, machine: MACHINE }), uptime: "20" },
        ],
        ["so does a container, which has its host's boot id", "agent", known, at({ ip: IP, boot: BOOT })],
        ["so does one that gets another address", "agent", known, at({ boot: BOOT, machine: MACHINE })],
      ];
    }),
    [
      "one that was renamed goes on at its address",
      "agent",
      known,
      { registered: nodes({ ...B1, ip: IP }, { ...B2, ip: IP, boot: BOOT, machine: MACHINE }) },
    ],
    [
      "the server is not held against what its restored datastore has",
      "server",
      want,
      { nodes: nodes({ ...B1, ip: IP }) },
    ],
    [
      "an agent whose move was cut goes on: its environment names this cluster already",
      "agent",
      known,
      { cas: `agent ${OTHER}\nagent ${OWN}\n` },
    ],
    [
      "a fresh one is not the server of a known cluster: SERVER was changed by a slip",
      "server",
      known,
      {},
      /K3S_TOKEN belongs to a cluster \(CA abababababab…\), and this box has no server's data.*FORCE=1 starts a new cluster/,
      "force",
    ],
    [
      "another cluster's server is not this one's",
      "server",
      known,
      { cas: `server ${OTHER}\n` },
      /the server of another cluster: its CA is cdcdcdcdcdcd….*FORCE=1/,
      "force",
    ],
    [
      "a further server gets its CA from the datastore",
      "server",
      wanted({ K3S_DATASTORE_ENDPOINT: "postgres://k3s@db/k3s" }),
      {},
    ],
    [
      "another cluster's agent is not moved",
      "agent",
      known,
      { cas: `agent ${OTHER}\n` },
      /an agent of another cluster: its CA is cdcdcdcdcdcd…, this cluster's abababababab…\. FORCE=1 moves it/,
      "force",
    ],
    [
      "nor to a server that is new, as a dry run has it",
      "agent",
      wanted({ K3S_TOKEN: "(the server's)" }),
      { cas: `agent ${OTHER}\n` },
      /this cluster's a new one\. FORCE=1/,
      "force",
    ],
    [
      "an agent's box is no server",
      "server",
      want,
      { "unit-k3s-agent": fixture("k3s-agent-modern.service") },
      /This box runs k3s-agent, or is set up to/,
    ],
    [
      "a server's box is no agent, though it is stopped",
      "agent",
      known,
      { "unit-k3s": fixture("k3s-modern.service") },
      /This box runs k3s, or is set up to/,
    ],
    [
      "somebody else's unit stays, with what would go",
      "server",
      want,
      {
        "unit-k3s": official(
          "server",
          "--disable",
          "traefik",
          "--node-taint=a=b:NoSchedule",
          "--token=hunter2",
        ),
      },
      /not written by this project\. TAKE_OVER=1 .*drops these arguments: --disable=traefik --node-taint=a=b:NoSchedule --token=\*{8}$/,
      "take-over",
    ],
    [
      "an agent's too",
      "agent",
      known,
      { "unit-k3s-agent": official("agent"), cas: `agent ${OWN}\n` },
      /k3s-agent\.service on this box was not written by this project\. TAKE_OVER=1/,
      "take-over",
    ],
    [
      "what this project's own unit has for cgroup v1 is not said to go",
      "agent",
      known,
      {
        "unit-k3s-agent": official("agent", "--kubelet-arg=fail-cgroupv1=false", "--kubelet-arg=max-pods=50"),
        binary: "k3s version v1.36.3+k3s1",
        version: "v1.36.3+k3s1",
        cgroup: "tmpfs\n",
        cas: `agent ${OWN}\n`,
      },
      /drops these arguments: --kubelet-arg=max-pods=50$/,
      "take-over",
    ],
  ];
  const away: [string, Facts, RegExp][] = [
    ["--data-dir", { "unit-k3s": official("server", "--data-dir=/data/k3s") }, /in \/data\/k3s/],
    ["-d in a word of its own", { "unit-k3s": official("server", "-d", "/data/k3s") }, /in \/data\/k3s/],
    ["K3S_DATA_DIR", { "unit-k3s": official("server"), told: "data-dir /data/k3s\n" }, /in \/data\/k3s/],
    [
      "this project's unit, and another folder added",
      { "unit-k3s": `${fixture("k3s-modern.service").trimEnd()} \\\n    --data-dir=/x\n` },
      /in \/x/,
    ],
    [
      "--datastore-endpoint",
      { "unit-k3s": official("server", "--datastore-endpoint=mysql://a:hunter2@tcp(db)/k") },
      /in a datastore of its own/,
    ],
    [
      "K3S_DATA_DIR in the unit",
      {
        "unit-k3s": official("server").replace(
          "User=root",
          'Environment = "A=b" "K3S_DATA_DIR=/data/k3s" K3S_TOKEN=hunter2',
        ),
      },
      /in \/data\/k3s/,
    ],
    [
      "K3S_DATASTORE_ENDPOINT in a drop-in",
      {
        "unit-k3s": `${official("server")}[Service]\nEnvironment=K3S_DATASTORE_ENDPOINT=mysql://a:hunter2@db\n`,
      },
      /in a datastore/,
    ],
    [
      "K3S_DATASTORE_ENDPOINT",
      { "unit-k3s": official("server"), told: "datastore-endpoint\n" },
      /in a datastore/,
    ],
    ["--cluster-init", { "unit-k3s": official("server", "--cluster-init") }, /in embedded etcd/],
    ["etcd's folder", { "unit-k3s": official("server"), told: "cluster-init\n" }, /in embedded etcd/],
  ];
  cases.push([
    "a cluster that is elsewhere is not begun anew, however its k3s is told where",
    "server",
    want,
    { "unit-k3s": official("server", "--config=/root/k3s.yaml"), told: "no-database\n" },
    /has its data elsewhere: there is no \/var\/lib\/rancher\/k3s\/server\/db\/state\.db/,
  ]);
  const agents: [name: string, told: string, words: RegExp][] = [
    ["a config file says", "data-dir /data/k3s\n", /in \/data\/k3s \(--data-dir\)/],
    ["nothing here tells of it", "no-agent\n", /elsewhere: there is no \S+\/agent\/server-ca\.crt/],
  ];
  for (const [name, told, words] of agents) {
    const facts = { "unit-k3s-agent": official("agent"), told };
    const refusal = new RegExp(`has its data ${words.source}: this would start a new, empty node`);
    cases.push([`nor is an agent whose data are where ${name}`, "agent", known, facts, refusal]);
  }
  for (const [name, facts, words] of away) {
    const refusal = new RegExp(`has its data ${words.source}`);
    cases.push([`a cluster that is elsewhere is not begun anew: ${name}`, "server", want, facts, refusal]);
    test(`nor does it go from there, where down finds it: ${name}`, () => {
      assert.throws(() => mayGo(prepared(MODERN, facts), [], "server", false, true), refused(refusal));
    });
  }
  for (const [name, role, settings, facts, refusal, word] of cases)
    test(name, () => {
      const plan = (...allowed: string[]) =>
        identityAs(role).plan({ ...settings, allowed: new Set(allowed) }, prepared(MODERN, facts));
      if (!refusal) return assert.deepEqual(plan(), []);
      assert.throws(plan, refused(refusal));
      assert.throws(plan, (e: Error) => !e.message.includes("hunter2"));
      const words = ["force", "take-over"].filter((one) => one !== word);
      assert.throws(() => plan(...words), Refusal);
      if (word) assert.deepEqual(plan(word), []);
    });

  test("nothing at all is planned, in whatever order its steps come", () => {
    const fresh = prepared("", { tool: "", curl: "" });
    const moved = { ...fresh, cas: `agent ${OTHER}\n` };
    assert.throws(() => planAll(agentSteps, known, moved), refused(/FORCE=1 moves it/));
    assert.throws(() => planAll(serverSteps, known, fresh), refused(/FORCE=1 starts a new cluster/));
  });

  test("a move is in the plan", () => {
    const facts = prepared(MODERN, { cas: `agent ${OTHER}\n` });
    const whys = planAll(agentSteps, { ...known, allowed: new Set(["force"]) }, facts).map(({ why }) => why);
    assert.match(
      whys.join("\n"),
      /\.env \(0600\): moves to another cluster: from the CA cdcdcdcdcdcd… to abababababab…$/m,
    );
  });

  test("a token of another CA takes the place of none that is known, whatever shows only then", () => {
    const other = TOKEN.replace(OWN, OTHER);
    assert.throws(
      () => server.learn?.(known, { token: other }),
      refused(/another cluster \(CA \w+…\), and is not changed\. FORCE=1/),
    );
    assert.equal(
      server.learn?.({ ...known, allowed: new Set(["force"]) }, { token: other }).K3S_TOKEN,
      other,
    );
    assert.equal(server.learn?.(want, { token: other }).K3S_TOKEN, other);
    const facts = { token: other, active: "active", rotates: "rotate", opens: "200" };
    assert.throws(() => token.plan(known, facts), refused(/This server is another cluster's/));
  });
});

describe("the release of a node", () => {
  const OLDER = "v1.35.4+k3s1";
  const NEWER = "v1.36.3+k3s1";
  const role = { "node-role.kubernetes.io/control-plane": "true" };
  const list = (a1: string, b1?: string, more: Partial<NodeSpec> = {}) =>
    nodes({ ...A1, version: a1, labels: role }, ...(b1 ? [{ ...B1, version: b1, ...more }] : []));
  const cluster = (nodes: string) => ({ ...box(B1), nodes });
  const said = (registered: string) => ({ ...box(B1), registered });
  const upgrade =
    /^Node b1 runs k3s v1\.35\.4\+k3s1, and K3S_VERSION is v1\.36\.2\+k3s1: make upgrade K3S_VERSION=v1\.36\.2\+k3s1 .* set K3S_VERSION=v1\.35\.4\+k3s1 in the env file$/;
  const newer =
    /^The server a1 runs k3s v1\.35\.4\+k3s1, and no agent may be newer, .* make upgrade .* first, or set K3S_VERSION=v1\.35\.4/;
  const cases: [name: string, facts: Facts, refusal?: RegExp, want?: Partial<Want>][] = [
    ["that runs K3S_VERSION stays", cluster(list(MODERN, MODERN))],
    ["that is older is not replaced in passing", cluster(list(MODERN, OLDER)), upgrade],
    ["that is newer is not either", cluster(list(NEWER, NEWER)), /^Node b1 runs k3s v1\.36\.3/],
    ["that only its server can tell of is not either", said(list(MODERN, OLDER)), upgrade],
    [
      "that has just restarted is not either",
      { ...cluster(list(MODERN, OLDER)), boot: REBOOTED, uptime: "20" },
      upgrade,
    ],
    ["that is not Ready may be replaced", cluster(list(MODERN, OLDER, { ready: false }))],
    [
      "of a box that was reinstalled is not this box's",
      said(list(MODERN, OLDER, { ready: false, boot: "x", machine: "y" })),
    ],
    ["is free where k3s is installed and has no node", { ...box(B1), version: `${OLDER}\n` }],
    ["that joins may be as old as its server", said(list(MODERN))],
    ["that joins may be older than its server", said(list(NEWER))],
    ["that joins may not be newer than its server", said(list(OLDER)), newer],
    [
      "that joins again may not be newer than its server",
      cluster(list(OLDER, OLDER, { ready: false })),
      newer,
    ],
    [
      "that joins may be newer than the node of a server that is gone",
      said(nodes({ ...A1, version: OLDER, labels: role, ready: false })),
    ],
    ["is what a K3S_BIN says, once it is there", cluster(list(MODERN, OLDER)), undefined, { K3S_BIN: "k3s" }],
    ["changes by make upgrade", cluster(list(OLDER, OLDER)), undefined, { allowed: new Set(["release"]) }],
    ["does not change by FORCE=1", cluster(list(MODERN, OLDER)), upgrade, { allowed: new Set(["force"]) }],
    [
      "does not matter where it leaves for another cluster",
      { ...cluster(list(OLDER, OLDER)), cas: `agent ${OTHER}\n` },
      undefined,
      { allowed: new Set(["force"]) },
    ],
  ];
  for (const [name, facts, refusal, more] of cases)
    test(name, () => {
      const plan = () =>
        identityAs("agent").plan({ ...wanted({ PUBLIC_IP: B1.ip }), ...more }, prepared(MODERN, facts));
      if (refusal) assert.throws(plan, refused(refusal));
      else assert.deepEqual(plan(), []);
    });

  test("is refused of a server too", () => {
    const facts = prepared(MODERN, { ...box(A1), nodes: nodes({ ...A1, version: OLDER }) });
    assert.throws(
      () => identityAs("server").plan(wanted({ K3S_TOKEN: "" }), facts),
      refused(/^Node a1 runs k3s v1\.35/),
    );
  });
});

describe("down takes k3s from", () => {
  type Case = [
    name: string,
    facts: Facts,
    cluster: string[],
    role: "server" | "agent",
    force: boolean,
    refusal?: RegExp,
  ];
  const cases: Case[] = [
    ["the server and agents of the cluster", { cas: `server ${OWN}\n` }, [OWN], "server", false],
    ["a server of which no token is known", { cas: `server ${OWN}\n` }, [], "server", false],
    ["a box that has nothing", {}, [OWN], "agent", false],
    [
      "no server of another cluster",
      { cas: `server ${OTHER}\n` },
      [OWN],
      "server",
      false,
      /a server of another/,
    ],
    [
      "no agent of another cluster",
      { cas: `agent ${OTHER}\n` },
      [OWN],
      "agent",
      false,
      /an agent of another/,
    ],
    ["no server that is listed as an agent", { cas: `server ${OWN}\n` }, [OWN], "agent", false, /FORCE=1/],
    ["no agent of an unknown cluster", { cas: `agent ${OWN}\n` }, [], "agent", false, /FORCE=1/],
    ["any of them where it is told so", { cas: `agent ${OWN}\n` }, [], "agent", true],
    [
      "none that somebody else has set up",
      { "unit-k3s": official("server") },
      [],
      "server",
      false,
      /FORCE=1/,
    ],
  ];
  for (const [name, facts, cluster, role, force, refusal] of cases)
    test(name, () => {
      const decide = () => mayGo(prepared(MODERN, facts), cluster, role, false, force);
      if (refusal) assert.throws(decide, refused(refusal));
      else decide();
    });
});

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
import { argsOf, shownLook, WRITTEN_BY } from "../lib/k3s/unit.ts";
import { HELPERS } from "../lib/protocol.ts";
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
    ["is the one with its address and boot ID", B1.ip, box(B1), [A1, B1, B2], "b1 same"],
    [
      "is found even if the box has another host name",
      B1.ip,
      { ...box(B1), hostname: "b9" },
      [A1, B1, B2],
      "b1 same",
    ],
    ["is found by its InternalIP alone", B1.ip, box(B1), [A1, { ...B1, external: "" }], "b1 same"],
    ["is found by its address alone if the box is gone", B1.ip, {}, [A1, B1, B2], "b1 same"],
    ["is none if no node has its address or boot ID", "192.0.2.9", { boot: REBOOTED }, [A1, B1], "none"],
    [
      "is found by its machine ID after a reboot, before k3s has updated the node",
      B1.ip,
      { ...box(B1), boot: REBOOTED, uptime: "20.00" },
      [A1, B1],
      "b1 restarted",
    ],
    [
      "is found by its machine ID after a reboot since which k3s is down",
      B1.ip,
      { ...box(B1), boot: REBOOTED },
      [A1, { ...B1, ready: false }],
      "b1 restarted",
    ],
    [
      "is another box's if it is Ready with another boot ID, even with the same machine ID, because images are copied",
      B1.ip,
      { ...box(B1), boot: REBOOTED },
      [A1, B1],
      /Node b1, at .* is Ready, and is another box/,
    ],
    [
      "is its former one if the box was reinstalled",
      B1.ip,
      { boot: REBOOTED, machine: "c".repeat(32) },
      [A1, { ...B1, ready: false }],
      "b1 anew",
    ],
    [
      "is not the Ready one of another box whose address was entered by mistake",
      B2.ip,
      box(B1),
      [A1, B1, B2],
      /its boot id is that of node b1, at 198\.51\.101\.11/,
    ],
    [
      "is not the Ready one of another box even if its own was deleted",
      B2.ip,
      box(B1),
      [A1, B2],
      /Node b2, at .* is another box than this/,
    ],
    [
      "is not found by its boot ID alone, at another address",
      "192.0.2.9",
      box(B2),
      [A1, B2],
      /that of node b2/,
    ],
    [
      "is refused if two nodes have the address",
      B2.ip,
      box(B2),
      [A1, { ...B1, external: B2.ip }, B2],
      /Nodes b1 and b2 have the same address/,
    ],
    [
      "is refused if two nodes have the address, one as InternalIP, and the box is gone",
      B2.ip,
      {},
      [{ ...A1, ip: B2.ip, external: "192.0.2.1" }, B2],
      /Nodes a1 and b2 have the same address/,
    ],
    [
      "is refused if two nodes have the boot ID, and the address is that of the wrong one",
      B2.ip,
      box(B1),
      [A1, B1, { ...B2, boot: box(B1).boot?.trim() ?? "" }],
      /that of node b1/,
    ],
    [
      "may share its boot ID with other nodes, as containers of one host do",
      B1.ip,
      { ...box(B1), boot: bootB2 },
      [A1, { ...B1, boot: bootB2 }, B2],
      "b1 same",
    ],
    [
      "is not found by an empty machine ID",
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

describe("the node name of a box", () => {
  type Case = [name: string, facts: Facts, list: NodeSpec[], expected: string, args?: string];
  const unit = { named: "b1\n" };
  const renamed = { hostname: "b9\n" };
  const cases: Case[] = [
    ["is its host name before it has joined", {}, [], "b1"],
    ["is the one in its unit, even if its host name has changed", { ...unit, ...renamed }, [], "b1"],
    ["is that of its node if the unit has none", renamed, [A1, B1, B2], "b1"],
    [
      "is that of its node even after a reboot with another host name",
      { ...renamed, boot: REBOOTED },
      [A1, B1],
      "b1",
    ],
    [
      "is always the one in the settings, if they have one",
      { ...unit, ...renamed },
      [A1, B1],
      "b7",
      "--node-name=b7",
    ],
    [
      "is the one with which it has rejoined, even if its former node still exists",
      renamed,
      [A1, { ...B1, ready: false }, { ...B1, name: "b9" }],
      "b9",
    ],
    [
      "is not that of a copy of the box at another address",
      { ...renamed, ...{ boot: REBOOTED } },
      [A1, { ...B2, machine: "33e005557d0340dfb2bcad364d0ec4a1" }],
      "b9",
    ],
    [
      "is not that of another box that has its address",
      { ...renamed, boot: REBOOTED, machine: "" },
      [A1, B1],
      "b9",
    ],
    ["is the first one if its units have several", { named: "b1\nx\n" }, [], "b1"],
  ];
  for (const [name, facts, list, expected, args = ""] of cases)
    test(name, () => {
      const want = wanted({ PUBLIC_IP: B1.ip, AGENT_ARGS: args });
      const seen = prepared(MODERN, { ...box(B1), nodes: list.length ? nodes(...list) : "", ...facts });
      assert.equal(nodeNameOf("agent", want, seen), expected);
    });

  test("is written to its unit, unless the settings have one", () => {
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
    test(`is read on the box by each step that needs it: ${step.name || "check"}`, () =>
      assert.match(step.look(wanted()).join("\n"), /^fact named;/m));

  test("may differ from its host name without a problem in check", () => {
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

test("the CA of a box's cluster is read from its files, without any secret", () => {
  const root = temporary();
  const text = caLook
    .replaceAll("/var/lib/rancher/k3s", `${root}/k3s`)
    .replaceAll("/etc/systemd/system", `${root}/etc`);
  const look = (files = "") =>
    shell(`${HELPERS}${files}fact() { :; }\nset -eu\nd=; ${text}true`, ["sh", "-s"]).stdout;
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

describe("make remove uninstalls k3s from", () => {
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
    ["a box that was set up to join, but never has", b1(`agent ${OWN}\n`), cluster(B2), {}],
    ["a box whose removal was interrupted", b1(), cluster({ ...B1, ready: false }), {}],
    [
      "a further server of this cluster",
      b1(`server ${OWN}\nagent ${OWN}\n`),
      cluster(B1),
      { role: "server" },
    ],
    [
      "a box that was reinstalled and whose node still exists",
      b1("", { boot: REBOOTED, machine: machineB2 }),
      cluster({ ...B1, ready: false }),
      {},
    ],
    ["a former server, with FORCE=1", b1(`server ${OWN}\nagent ${OWN}\n`), cluster(B2), { force: true }],
    [
      "no server that is not in the cluster",
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
      "no server of another cluster, even if a node of this one has its address",
      b1(`server ${OTHER}\n`),
      cluster({ ...B1, ready: false }),
      { role: "server" },
      /a server of another cluster/,
    ],
    ["no agent of another cluster", b1(`agent ${OTHER}\n`), cluster(B2), {}, /an agent of another cluster/],
    [
      "no box at another box's address",
      b1(`agent ${OWN}\n`),
      cluster(B1, B2),
      { ip: B2.ip },
      /its boot id is that of node b1/,
    ],
    [
      "no box at the address of another one that is off, after its own node was deleted",
      b1(`agent ${OWN}\n`),
      cluster({ ...B2, ready: false }),
      { ip: B2.ip },
      /Node b2, at .*, is another box than this one/,
    ],
    [
      "no box whose address a second node has",
      b1(`agent ${OWN}\n`),
      cluster(B1, { ...B2, external: B1.ip }),
      { force: true },
      /Nodes b1 and b2 have the same address/,
    ],
    [
      "no agent if it is not known which cluster it belongs to",
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
  test("is recognized as this project's by its first line, or by its content if it is older than that line", () => {
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

  test("is read wherever systemd finds it, with its drop-ins; a masked one counts as written by others", () => {
    const root = temporary();
    const { stdout } =
      shell(`printf 'main\\n' >${root}/k3s.service; printf 'one\\n' >${root}/1.conf; printf 'two\\n' >${root}/2.conf
systemctl() {
  [ "$*" != "\${*#show k3s k3s-agent -p }" ] || return
  printf 'UnitFileState=enabled\\nFragmentPath=${root}/k3s.service\\nDropInPaths=${root}/1.conf ${root}/2.conf\\n\\n'
  printf 'UnitFileState=masked\\nFragmentPath=/dev/null\\nDropInPaths=\\n'
}
${HELPERS}fact() { echo "fact $1"; }
${shownLook}${unitsLook}`);
    const [, unit, masked] = /fact unit-k3s\n(.*)fact unit-k3s-agent\n(.*)fact told/s.exec(stdout) ?? [];
    assert.deepEqual([unit, masked], ["main\none\ntwo\n", "# masked\n"]);
    assert.ok(isForeign(masked));
  });

  test("is read together with its environment and config files, without their secrets", () => {
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
${HELPERS}fact() { echo "fact $1"; }
${text}`);
    assert.equal(
      stdout.split("fact told\n")[1],
      "data-dir /data/k3s\ndatastore-endpoint\ndata-dir /srv/k3s\ndata-dir /d\ndata-dir /a\ndata-dir /b\ndata-dir /c\ncluster-init\nno-database\nno-agent\n",
    );
  });
});

describe("a box", () => {
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
    ["that is new may become the server", "server", want, {}],
    ["that is new may become an agent", "agent", known, {}],
    ["that is the cluster's server stays its server", "server", known, { cas: `server ${OWN}\n` }],
    ["that is an agent of the cluster stays its agent", "agent", known, { cas: `agent ${OWN}\n` }],
    ...(["nodes", "registered"] as const).flatMap((fact): Case[] => {
      const at = (spec: Partial<NodeSpec>) => ({ [fact]: nodes({ ...B1, ...spec }) });
      const taken = /^Node b1, at \S+, is Ready, and is another box than this one/;
      return [
        [`may not join with the addresses of a Ready node (${fact})`, "agent", known, at({ ip: IP }), taken],
        [
          `may not join with the InternalIP of a Ready node (${fact})`,
          "agent",
          known,
          at({ ip: IP, external: B1.ip }),
          taken,
        ],
        [
          `may not join with the ExternalIP of a Ready node (${fact})`,
          "agent",
          known,
          at({ external: IP }),
          taken,
        ],
        ["that was reinstalled may join at its own address", "agent", known, at({ ip: IP, ready: false })],
        [
          `may not join as a copy of a Ready node with the same address (${fact})`,
          "agent",
          known,
          at({ ip: IP, machine: MACHINE }),
          taken,
        ],
        [
          "that has rebooted keeps its role",
          "agent",
          known,
          { ...at({ ip: IP, machine: MACHINE }), uptime: "20" },
        ],
        [
          "that is a container, and has its host's boot ID, keeps its role",
          "agent",
          known,
          at({ ip: IP, boot: BOOT }),
        ],
        ["that has a new address keeps its role", "agent", known, at({ boot: BOOT, machine: MACHINE })],
      ];
    }),
    [
      "that was renamed keeps its role at its address",
      "agent",
      known,
      { registered: nodes({ ...B1, ip: IP }, { ...B2, ip: IP, boot: BOOT, machine: MACHINE }) },
    ],
    [
      "that is the server is not compared with the nodes of its restored datastore",
      "server",
      want,
      { nodes: nodes({ ...B1, ip: IP }) },
    ],
    [
      "that is an agent whose move to this cluster was interrupted may complete it",
      "agent",
      known,
      { cas: `agent ${OTHER}\nagent ${OWN}\n` },
    ],
    [
      "that is new is refused as the server of an existing cluster, because SERVER may be wrong",
      "server",
      known,
      {},
      /K3S_TOKEN belongs to a cluster \(CA abababababab…\), and this box has no server's data.*FORCE=1 starts a new cluster/,
      "force",
    ],
    [
      "that is another cluster's server is refused as this one's",
      "server",
      known,
      { cas: `server ${OTHER}\n` },
      /the server of another cluster: its CA is cdcdcdcdcdcd….*FORCE=1/,
      "force",
    ],
    [
      "that becomes a further server gets its CA from the datastore",
      "server",
      wanted({ K3S_DATASTORE_ENDPOINT: "postgres://k3s@db/k3s" }),
      {},
    ],
    [
      "that is another cluster's agent is not moved without FORCE=1",
      "agent",
      known,
      { cas: `agent ${OTHER}\n` },
      /an agent of another cluster: its CA is cdcdcdcdcdcd…, this cluster's abababababab…\. FORCE=1 moves it/,
      "force",
    ],
    [
      "that is another cluster's agent is not moved to a new server without FORCE=1, in a dry run either",
      "agent",
      wanted({ K3S_TOKEN: "(the server's)" }),
      { cas: `agent ${OTHER}\n` },
      /this cluster's a new one\. FORCE=1/,
      "force",
    ],
    [
      "that is an agent is refused as a server",
      "server",
      want,
      { "unit-k3s-agent": fixture("k3s-agent-modern.service") },
      /This box runs k3s-agent, or is set up to/,
    ],
    [
      "that is a server is refused as an agent, even if k3s is stopped",
      "agent",
      known,
      { "unit-k3s": fixture("k3s-modern.service") },
      /This box runs k3s, or is set up to/,
    ],
    [
      "whose k3s unit is not this project's is refused, with the arguments that would be dropped",
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
      "whose k3s-agent unit is not this project's is refused",
      "agent",
      known,
      { "unit-k3s-agent": official("agent"), cas: `agent ${OWN}\n` },
      /k3s-agent\.service on this box was not written by this project\. TAKE_OVER=1/,
      "take-over",
    ],
    [
      "whose unit is not this project's is refused, without listing arguments that this project sets for cgroup v1",
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
    ["-d as a separate argument", { "unit-k3s": official("server", "-d", "/data/k3s") }, /in \/data\/k3s/],
    ["K3S_DATA_DIR", { "unit-k3s": official("server"), told: "data-dir /data/k3s\n" }, /in \/data\/k3s/],
    [
      "--data-dir added to this project's unit",
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
    ["an etcd folder", { "unit-k3s": official("server"), told: "cluster-init\n" }, /in embedded etcd/],
  ];
  cases.push([
    "whose unit is a server's, but has no database, does not get a new cluster",
    "server",
    want,
    { "unit-k3s": official("server", "--config=/root/k3s.yaml"), told: "no-database\n" },
    /has its data elsewhere: there is no \/var\/lib\/rancher\/k3s\/server\/db\/state\.db/,
  ]);
  const agents: [name: string, told: string, words: RegExp][] = [
    ["elsewhere according to a config file", "data-dir /data/k3s\n", /in \/data\/k3s \(--data-dir\)/],
    ["missing", "no-agent\n", /elsewhere: there is no \S+\/agent\/server-ca\.crt/],
  ];
  for (const [name, told, words] of agents) {
    const facts = { "unit-k3s-agent": official("agent"), told };
    const refusal = new RegExp(`has its data ${words.source}: this would start a new, empty node`);
    cases.push([
      `that is an agent whose data are ${name} does not become a new node`,
      "agent",
      known,
      facts,
      refusal,
    ]);
  }
  for (const [name, facts, words] of away) {
    const refusal = new RegExp(`has its data ${words.source}`);
    cases.push([
      `whose cluster data are elsewhere does not get a new cluster: ${name}`,
      "server",
      want,
      facts,
      refusal,
    ]);
    test(`whose cluster data are elsewhere is refused by make down: ${name}`, () => {
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

  test("whose role is refused gets no changes from any step", () => {
    const fresh = prepared("", { tool: "", curl: "" });
    const moved = { ...fresh, cas: `agent ${OTHER}\n` };
    assert.throws(() => planAll(agentSteps, known, moved), refused(/FORCE=1 moves it/));
    assert.throws(() => planAll(serverSteps, known, fresh), refused(/FORCE=1 starts a new cluster/));
  });

  test("that is moved to another cluster has this move in its plan", () => {
    const facts = prepared(MODERN, { cas: `agent ${OTHER}\n` });
    const whys = planAll(agentSteps, { ...known, allowed: new Set(["force"]) }, facts).map(({ why }) => why);
    assert.match(
      whys.join("\n"),
      /\.env \(0600\): moves to another cluster: from the CA cdcdcdcdcdcd… to abababababab…$/m,
    );
  });

  test("with a token of another CA does not replace the known token without FORCE=1", () => {
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
    ["is accepted if it is K3S_VERSION", cluster(list(MODERN, MODERN))],
    [
      "is refused if it is older than K3S_VERSION, with make upgrade as the remedy",
      cluster(list(MODERN, OLDER)),
      upgrade,
    ],
    [
      "is refused if it is newer than K3S_VERSION",
      cluster(list(NEWER, NEWER)),
      /^Node b1 runs k3s v1\.36\.3/,
    ],
    ["is refused if it is older and known only from the server", said(list(MODERN, OLDER)), upgrade],
    [
      "is refused if it is older and the box has just rebooted",
      { ...cluster(list(MODERN, OLDER)), boot: REBOOTED, uptime: "20" },
      upgrade,
    ],
    ["may change if the node is not Ready", cluster(list(MODERN, OLDER, { ready: false }))],
    [
      "may change if the box was reinstalled",
      said(list(MODERN, OLDER, { ready: false, boot: "x", machine: "y" })),
    ],
    ["may change if k3s is installed but has no node", { ...box(B1), version: `${OLDER}\n` }],
    ["may be that of its server when it joins", said(list(MODERN))],
    ["may be older than that of its server when it joins", said(list(NEWER))],
    ["may not be newer than that of its server when it joins", said(list(OLDER)), newer],
    [
      "may not be newer than that of its server when it joins again",
      cluster(list(OLDER, OLDER, { ready: false })),
      newer,
    ],
    [
      "may be newer than that of a server that is gone",
      said(nodes({ ...A1, version: OLDER, labels: role, ready: false })),
    ],
    ["is not compared if K3S_BIN is set", cluster(list(MODERN, OLDER)), undefined, { K3S_BIN: "k3s" }],
    [
      "may be changed by make upgrade",
      cluster(list(OLDER, OLDER)),
      undefined,
      { allowed: new Set(["release"]) },
    ],
    [
      "may not be changed with FORCE=1",
      cluster(list(MODERN, OLDER)),
      upgrade,
      { allowed: new Set(["force"]) },
    ],
    [
      "does not matter if the node moves to another cluster",
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

  test("is refused in the same way on a server", () => {
    const facts = prepared(MODERN, { ...box(A1), nodes: nodes({ ...A1, version: OLDER }) });
    assert.throws(
      () => identityAs("server").plan(wanted({ K3S_TOKEN: "" }), facts),
      refused(/^Node a1 runs k3s v1\.35/),
    );
  });
});

describe("make down uninstalls k3s from", () => {
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
    ["a server whose token is not known", { cas: `server ${OWN}\n` }, [], "server", false],
    ["a box without k3s", {}, [OWN], "agent", false],
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
    ["an agent of an unknown cluster, with FORCE=1", { cas: `agent ${OWN}\n` }, [], "agent", true],
    [
      "no box that was not set up by this project",
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

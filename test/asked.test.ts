/** How check queries a server, with a real shell and curl, and a simulated API with a hundred nodes. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { createServer, type IncomingMessage } from "node:http";
import type { AddressInfo } from "node:net";
import { after, before, describe, test } from "node:test";
import { isFault, kubelets, made, reasons, unstarted } from "../lib/check/pods.ts";
import { ask, clusterOf, survey, surveyAndTry } from "../lib/check/survey.ts";
import { itemsOf, nodesOf, type PodObject } from "../lib/k3s/nodes.ts";
import type { Role } from "../lib/k3s/unit.ts";
import { lookScript, reader, wrapInMain } from "../lib/protocol.ts";
import { type Look, prints } from "../lib/step.ts";
import {
  answering,
  boxOf,
  type Facts,
  lacks,
  MODERN,
  member,
  node,
  programs,
  shell,
  temporary,
  wanted,
} from "./helpers.ts";

const MANY = 100;
/** Everything on this machine: addresses of its loopback stand for nodes. */
const SPECS = Array.from({ length: MANY }, (_, i) => ({ name: `n${i}`, ip: `127.0.${i}.1`, n: i }));
/** The first of these nodes, as the API returns them: without a kind in each item. */
const listOf = (many: number) =>
  JSON.stringify({
    kind: "NodeList",
    metadata: { resourceVersion: "1" },
    items: SPECS.slice(0, many).map((spec) => {
      const { metadata, status } = node(spec);
      return {
        metadata,
        spec: { podCIDR: `127.1.${spec.n}.0/24` },
        status: { ...status, images: [{ names: ["x".repeat(9000)] }] },
      };
    }),
  });
/** How many nodes there are. */
let count = MANY;

const pods: Record<string, PodObject> = {};
/** Nodes by what is wrong with them. */
let broken: Record<string, "log 502" | "log hangs" | "exec 502" | "sandbox" | "image" | "refused"> = {};
let atOnce = 0;
let most = 0;
let questions = 0;

const server = createServer((q, r) => {
  most = Math.max(most, ++atOnce);
  questions++;
  r.on("close", () => atOnce--);
  const answer = (code: number, body: object | string) => {
    r.writeHead(code, { "content-type": "application/json" });
    r.end(typeof body === "string" ? body : JSON.stringify(body));
  };
  const fail = (code: number, message: string) => answer(code, { kind: "Status", message, code });
  const { pathname, searchParams } = new URL(q.url ?? "", "http://x");
  if (pathname === "/api/v1/nodes") return answer(200, listOf(count));
  if (pathname === "/apis/metrics.k8s.io/v1beta1/nodes")
    return answer(200, {
      kind: "NodeMetricsList",
      items: SPECS.slice(0, count).map(({ name }) => ({ metadata: { name } })),
    });
  if (pathname.includes("/services/"))
    return answer(200, JSON.stringify({ spec: { clusterIP: "10.43.0.1" } }, null, 2));
  if (pathname.endsWith("/events")) {
    const [, name] = /involvedObject\.name=(.*)/.exec(searchParams.get("fieldSelector") ?? "") ?? [];
    const event = {
      type: "Warning",
      reason: "FailedCreatePodSandBox",
      message: `Failed to create pod sandbox: rpc error: plugin type="flannel" failed (add): \u001b[2JloadFlannelSubnetEnv failed: ${name}`,
      lastTimestamp: "2026-11-26T15:00:00Z",
    };
    return answer(200, { kind: "EventList", items: broken[of(name)] === "sandbox" ? [event] : [] });
  }
  if (pathname.endsWith("/log")) {
    const how = broken[of(/pods\/([^/]+)/.exec(pathname)?.[1])];
    if (how === "log hangs") return;
    return how === "log 502"
      ? fail(502, 'Get "https://127.0.0.1:10250/containerLogs/x": dial tcp: "EOF"')
      : answer(200, "");
  }
  if (q.method === "DELETE") {
    for (const name of Object.keys(pods)) delete pods[name];
    return answer(200, { kind: "PodList", items: [] });
  }
  if (q.method === "POST") return void create(q, answer, fail);
  answer(200, { kind: "PodList", items: Object.values(pods) });
});

/** The node of a pod's name. */
const of = (name = "") => name.replace(/.*-/, "");

async function create(
  q: IncomingMessage,
  answer: (code: number, body: object) => void,
  fail: (code: number, message: string) => void,
) {
  let text = "";
  for await (const chunk of q) text += chunk;
  const pod = JSON.parse(text);
  const { name } = pod.metadata;
  const how = broken[of(name)];
  if (how === "refused") return fail(403, `pods "${name}" is forbidden: exceeded quota`);
  const waiting = { waiting: { reason: how === "image" ? "ImagePullBackOff" : "ContainerCreating" } };
  const runs = how !== "sandbox" && how !== "image";
  const { metadata, spec } = pod;
  pods[name] = {
    metadata: { ...metadata, managedFields: [{ manager: "curl", fieldsV1: { "f:spec": {} } }] },
    spec,
    status: {
      phase: runs ? "Running" : "Pending",
      ...(runs ? { podIP: "127.0.0.1" } : {}),
      containerStatuses: [{ state: runs ? { running: {} } : waiting }],
    },
  };
  answer(201, pod);
}

// kubectl's stream on the wire: the kubelet answers with the result of the command.
server.on("upgrade", (q, socket) => {
  if (broken[of(/pods\/([^/]+)/.exec(q.url ?? "")?.[1])] === "exec 502")
    return void socket.end(
      'HTTP/1.1 502 Bad Gateway\r\nconnection: close\r\n\r\n{"message":"error dialing backend: EOF"}',
    );
  assert.equal(q.headers["sec-websocket-protocol"], "v4.channel.k8s.io");
  socket.write("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
  socket.end(Buffer.concat([Buffer.from([0x82, 6]), Buffer.from("\x03{\x00x\x9b}", "latin1")]));
});

/** Megabytes of all processes below one, each page counted once among those that share it. */
function memory(root: number): { mb: number; processes: number } {
  const parent = new Map<number, number>();
  for (const pid of readdirSync("/proc").filter((name) => /^\d+$/.test(name)))
    try {
      parent.set(Number(pid), Number(/^.*\) \S (\d+)/.exec(readFileSync(`/proc/${pid}/stat`, "utf8"))?.[1]));
    } catch {
      // It has ended.
    }
  const below = (pid = 0): boolean => pid === root || (pid > 1 && below(parent.get(pid)));
  let [kb, processes] = [0, 0];
  for (const pid of [...parent.keys()].filter(below))
    try {
      kb += Number(/^Pss:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/smaps_rollup`, "utf8"))?.[1] ?? 0);
      processes++;
    } catch {
      // Likewise.
    }
  return { mb: kb / 1024, processes };
}

/** What check starts on a box. */
const COUNTED = `awk bash cat curl cut date df getconf grep head ip journalctl ls modprobe nft nproc od ping
sed sha256sum sort systemctl tail timeout tr ufw uname wc wg`.split(/\s/);

/** So many nodes are in the cluster, and all but the box's own are peers of its WireGuard. */
function nodesAre(many: number) {
  count = many;
  const peers = SPECS.slice(1, many).map(({ ip, n }) => ({ ip, n, key: `${n}`.padEnd(43, "k") }));
  writeFileSync(`${root}/allowed`, peers.map(({ n, key }) => `${key}=\t10.42.${n}.0/24\n`).join(""));
  const dump = peers.map(
    ({ ip, n, key }) => `${key}=\t(none)\t${ip}:51820\t10.42.${n}.0/24\t1795446681\t99180\t99272\t25\n`,
  );
  writeFileSync(`${root}/dump`, `own\n${dump.join("")}`);
}

const root = temporary();
let PATH = "";
before(async () => {
  await new Promise<void>((done) => server.listen(0, "127.0.0.1", done));
  mkdirSync(`${root}/tls`);
  writeFileSync(`${root}/tls/client-admin.key`, "key");
  writeFileSync(`${root}/config.toml`, "sandbox = 'rancher/mirrored-pause:3.6'\n");
  const url = `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
  writeFileSync(`${root}/k3s.yaml`, `    server: ${url}\n`);
  PATH = programs(`${root}/bin`, {
    // The API here is served without TLS.
    curl: `for word; do shift; case $word in https://*) word=http://\${word#https://} ;; esac; set -- "$@" "$word"; done
exec /usr/bin/curl "$@"`,
    k3s: `echo "kubectl $*" >>${root}/kubectl; exit 1`,
    systemctl: "case $* in *k3s-agent) echo inactive ;; *) echo active ;; esac",
    ping: `[ -e ${root}/lost ] || exec sleep 0.2
case $* in *-W*) printf + >>${root}/lost; sleep 0.2; printf - >>${root}/lost ;; esac
exit 1`,
    wg: `case $* in *flannel.1*) exit 1 ;; *allowed-ips) cat ${root}/allowed ;; *dump) cat ${root}/dump ;; esac`,
  });
  const counted = COUNTED.map((name) => [
    name,
    `printf . >>${root}/started; PATH=${PATH}; command -v ${name} >/dev/null || exit 127; exec ${name} "$@"`,
  ]);
  PATH = `${programs(`${root}/counted`, Object.fromEntries(counted)).split(":")[0]}:${PATH}`;
  mkdirSync(`${root}/net/flannel-wg`, { recursive: true });
  writeFileSync(`${root}/net/flannel-wg/mtu`, "1420\n");
  writeFileSync(`${root}/env`, "K3S_URL=https://127.0.0.1:1\n");
  nodesAre(MANY);
});
after(() => server.close());

/** The script that check sends a box for the survey. */
async function sent(role: Role): Promise<string> {
  const scripts: string[] = [];
  await surveyAndTry([{ box: boxOf({ ip: "198.51.100.11", shell: answering({}, scripts) }), role }]);
  assert.equal(scripts.length, 1);
  return scripts[0]?.replace(/^m=.*$/m, "m=mark") ?? "";
}

interface Ran {
  facts: Facts;
  mb: number;
  processes: number;
  /** Programs that were started, requests to the API, and bytes of output. */
  cost: { programs: number; questions: number; bytes: number };
}

/** What a part of check's survey finds on this machine, run as on a box; and what it cost. */
const run = (text: string, kubectl = true) =>
  runScript(wrapInMain(lookScript([ask([text as Look])], wanted(), "mark")), kubectl);

async function runScript(text: string, kubectl = true): Promise<Ran> {
  const there = text
    .replaceAll("/sys/class/net", `${root}/net`)
    .replaceAll("/etc/systemd/system/k3s-agent.service.env", `${root}/env`)
    .replaceAll("/var/lib/rancher/k3s/server/tls", `${root}/tls`)
    .replaceAll("/var/lib/rancher/k3s/agent/etc/containerd/config.toml", `${root}/config.toml`)
    .replaceAll("/etc/rancher/k3s/k3s.yaml", `${root}/k3s.yaml`)
    .replaceAll("/usr/local/bin/k3s", `${root}/bin/k3s`);
  const stream = reader("mark", {});
  writeFileSync(`${root}/started`, "");
  questions = 0;
  const child = spawn("sh", ["-s"], { env: { ...process.env, PATH }, stdio: ["pipe", "pipe", "ignore"] });
  let said = "";
  child.stdout.setEncoding("utf8").on("data", (chunk) => (said += chunk));
  child.stdin.end(there);
  let peak = { mb: 0, processes: 0 };
  const sampler = setInterval(() => {
    const now = memory(child.pid as number);
    if (now.mb > peak.mb) peak = now;
  }, 60);
  await new Promise((done) => child.on("close", done));
  clearInterval(sampler);
  for (const line of said.replace(/\n$/, "").split("\n")) stream.line(line);
  assert.ok(stream.seen.ended, said.slice(-500));
  if (kubectl) assert.ok(!readdirSync(root).includes("kubectl"), "kubectl was asked");
  const cost = { programs: statSync(`${root}/started`).size, questions, bytes: said.length };
  return { facts: stream.seen.facts, ...peak, cost };
}

const some = (names: string[]) => names.map((name) => ({ name: `p-${name}`, node: name, ip: "127.0.0.1" }));
const skip = lacks("curl", "bash", "timeout") || (process.platform !== "linux" && "needs /proc");

describe("in a cluster of a hundred nodes", { skip, concurrency: 1 }, () => {
  const asked: [what: string, role: Role, proves: (facts: Facts, many: number) => void][] = [
    [
      "a server",
      "server",
      ({ nodes, tries, ports, top }, many) => {
        assert.equal(nodesOf(nodes).length, many);
        assert.equal(tries?.match(/^tunnel 10\.42\.\d+\.0 1420$/gm)?.length, many - 1);
        assert.equal(ports?.match(/^kubelet 127\.0\.\d+\.1 refused$/gm)?.length, many);
        assert.equal(JSON.parse(top ?? "").items.length, many);
      },
    ],
    [
      "an agent",
      "agent",
      ({ nodes, tries, peers }, many) => {
        assert.equal(nodes, undefined);
        assert.equal(peers?.trim().split("\n").length, many - 1);
        assert.equal(tries?.match(/^tunnel 10\.42\.\d+\.0 1420$/gm)?.length, many - 1);
        assert.match(tries ?? "", /^api server refused$/m);
      },
    ],
  ];
  for (const [what, role, proves] of asked)
    test(`check examines ${what} with less than 100 MB of memory, and each additional node costs at most three programs and 1500 bytes of output`, async (t) => {
      const text = await sent(role);
      const ran: Ran[] = [];
      for (const many of [3, MANY]) {
        nodesAre(many);
        const one = await runScript(text);
        proves(one.facts, many);
        t.diagnostic(`${what} of ${many} nodes: ${JSON.stringify({ ...one.cost, mb: one.mb })}`);
        ran.push(one);
      }
      const [few, all] = ran as [Ran, Ran];
      const more = (of: keyof Ran["cost"]) => (all.cost[of] - few.cost[of]) / (MANY - 3);
      assert.ok(all.mb > 0 && all.mb < 100, `${all.mb} MB in ${all.processes} processes`);
      assert.equal(all.cost.questions, few.cost.questions);
      assert.ok(more("programs") <= 3, `${more("programs")} programs a node`);
      assert.ok(more("bytes") < (role === "server" ? 1500 : 200), `${more("bytes")} bytes a node`);
    });

  test("a box whose tunnels have all failed sends at most 150 pings at a time", async () => {
    const text = await sent("agent");
    nodesAre(MANY);
    writeFileSync(`${root}/lost`, "");
    const { facts } = await runScript(text);
    const signs = readFileSync(`${root}/lost`, "utf8");
    rmSync(`${root}/lost`);
    let [pings, most] = [0, 0];
    for (const sign of signs) {
      pings += sign === "+" ? 1 : -1;
      most = Math.max(most, pings);
    }
    assert.equal(facts.tries?.match(/^tunnel 10\.42\.\d+\.0 0$/gm)?.length, MANY - 1);
    assert.ok(most > 8 && most <= 150, `${most} at a time`);
  });

  const pieces: [what: string, text: () => string, proves: (facts: Facts) => void][] = [
    [
      "pods",
      () =>
        made(
          SPECS.map(({ name }) => name),
          "abc",
        ),
      ({ pods, refused, services }) => {
        const items = itemsOf<PodObject>(pods);
        assert.equal(items.filter(({ status }) => status?.phase === "Running").length, MANY);
        assert.doesNotMatch(pods ?? "", /managedFields|"spec"/);
        assert.equal(refused ?? "", "");
        assert.match(services ?? "", /^default\/kubernetes 10\.43\.0\.1$/m);
      },
    ],
    [
      "logs and exec",
      () => kubelets(some(SPECS.map(({ name }) => name))),
      ({ kubelets }) => {
        for (const what of ["logs", "exec"])
          assert.equal(kubelets?.match(new RegExp(`^${what} n\\d+ yes$`, "gm"))?.length, MANY, kubelets);
      },
    ],
  ];
  for (const [what, text, proves] of pieces)
    test(`check queries a server for ${what} with less than 100 MB of memory, at most three requests at a time, and without kubectl`, async (t) => {
      most = 0;
      const { facts, mb, processes, cost } = await run(text());
      proves(facts);
      t.diagnostic(
        `${what}: at most ${mb.toFixed(1)} MB in ${processes} processes, ${most} questions at a time, ${JSON.stringify(cost)}`,
      );
      assert.ok(mb > 0 && mb < 100, `${mb} MB in ${processes} processes`);
      assert.ok(most <= 3, `${most} at a time`);
    });
});

describe("a failure of a kubelet", { skip, concurrency: 1 }, () => {
  test("is reported with the API's error message, and a timeout as a timeout", async () => {
    broken = { n1: "log 502", n2: "log hangs", n3: "exec 502" };
    const text = kubelets(some(["n0", "n1", "n2", "n3"])).replaceAll(
      'GET "/api/v1/namespaces/kube-system/pods/$2/log" 10',
      'GET "/api/v1/namespaces/kube-system/pods/$2/log" 1',
    );
    const { tried } = clusterOf([
      member(MODERN, { name: "a1", ip: "198.51.100.11", n: 0 }, {}, (await run(text)).facts),
    ]).boxes[0] as { tried: { logs: object; exec: object; why: object } };
    broken = {};
    assert.deepEqual(tried.logs, { n0: true, n1: false, n2: false, n3: true });
    assert.deepEqual(tried.exec, { n0: true, n1: true, n2: true, n3: false });
    assert.deepEqual(tried.why, {
      "logs n1": 'Get "https://127.0.0.1:10250/containerLogs/x": dial tcp: "EOF"',
      "logs n2": "did not answer in 1 s",
      "exec n3": "error dialing backend: EOF",
    });
  });

  test("is distinguished from a failed image pull if a pod does not start", async () => {
    broken = { n1: "sandbox", n2: "image", n3: "refused" };
    const { facts } = await run(made(["n0", "n1", "n2", "n3"], "def").replace(/\+ 20\)\)/, "+ 2))"));
    const names = ["n1", "n2"].map((name) => `k3s-across-clouds-check-def-${name}`);
    const { facts: said } = await run(reasons(names));
    broken = {};
    assert.match(facts.refused ?? "", /^403 .*exceeded quota/m);
    const why = names.map((name) =>
      unstarted(
        JSON.parse(facts.pods ?? "").items.find(({ metadata }: PodObject) => metadata.name === name),
        JSON.parse(said[`events-${name}`] ?? "").items,
      ),
    );
    assert.match(
      why[0]?.words ?? "",
      /^FailedCreatePodSandBox: Failed to create pod sandbox: .*loadFlannelSubnetEnv failed/,
    );
    assert.doesNotMatch(why[0]?.words ?? "", /\p{Cc}/u);
    assert.deepEqual([why[0]?.image, why[0]?.proven], [false, true]);
    assert.deepEqual(why[1], { words: "ImagePullBackOff", image: true, proven: false });
  });

  test("is assumed without a message of the kubelet too, on a box that has run for some time and has little load", () => {
    const load = { average: 0.1, cores: 1, memory: 20, swap: undefined };
    const unit = { state: "active", restarts: 0, runs: 900 };
    const silent = { image: false, proven: false };
    assert.equal(isFault(silent, { unit, load }), true);
    assert.equal(isFault(silent, { unit: { ...unit, runs: 30 }, load }), false);
    assert.equal(isFault(silent, { unit, load: { ...load, average: 5 } }), false);
    assert.equal(isFault({ ...silent, image: true }, { unit, load }), false);
    assert.equal(isFault({ ...silent, proven: true }, { unit: { ...unit, runs: 30 }, load }), true);
    for (const [reason, image] of [
      [
        'FailedCreatePodSandBox: failed to get sandbox image "rancher/mirrored-pause:3.6": failed to pull image',
        true,
      ],
      ["FailedMount: MountVolume.SetUp failed", false],
      ["OutOfpods: Node didn't have enough resource: pods", false],
    ] as const) {
      const [word, message] = reason.split(/: (.*)/);
      const event = { type: "Warning", reason: word as string, message: message as string };
      assert.equal(unstarted({ metadata: {}, status: { phase: "Pending" } }, [event]).image, image, reason);
    }
  });

  test("is detected with kubectl exec, on one node after the other, if curl cannot open such a stream", async () => {
    const path = PATH;
    PATH = `${
      programs(`${root}/old`, {
        curl: `case $* in *--http1.1*) echo "option --http1.1: is unknown" >&2; exit 2 ;; esac; exec ${root}/bin/curl "$@"`,
      }).split(":")[0]
    }:${path}`;
    programs(`${root}/bin`, {
      k3s: `echo '${"OCI runtime exec failed: exec: /k3s-across-clouds: no such file or directory"}' >&2; exit 1`,
    });
    const { facts } = await run(kubelets(some(["n0", "n1"])), false);
    PATH = path;
    assert.match(facts.kubelets ?? "", /^exec n0 yes\nexec n1 yes$/m);
    assert.doesNotMatch(facts.kubelets ?? "", /^kubectl/m);
  });
});

test("a box's clock is compared at the end of its script, however long that takes and however late its output arrives", async () => {
  const own = {
    ...boxOf().shell,
    run: async (script: string, _: number, onLine: (line: string) => void) => {
      const { status, stdout, stderr } = shell(script);
      for (const line of stdout.split("\n")) onLine(line);
      return { status: status ?? 1, stderr };
    },
  };
  const slow = prints("wg")("fact wg; sleep 4");
  const [member] = await survey([{ box: boxOf({ shell: own }), role: "agent" as const }], () => [slow]);
  assert.equal(member?.error, undefined);
  assert.ok(Math.abs(member?.clock ?? 99) < 2, `${member?.clock}`);
});

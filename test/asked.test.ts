/** What check asks of a server: by real shells and curl, of an API of a hundred nodes that is made up here. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { createServer, type IncomingMessage } from "node:http";
import type { AddressInfo } from "node:net";
import { after, before, describe, test } from "node:test";
import { isFault, kubelets, made, reasons, unstarted } from "../lib/check/pods.ts";
import { ask, clusterOf, tries } from "../lib/check/survey.ts";
import { nodesLook, nodesOf, type PodObject } from "../lib/k3s/nodes.ts";
import { lookScript, reader, whole } from "../lib/protocol.ts";
import type { Look } from "../lib/step.ts";
import { type Facts, lacks, MODERN, member, node, programs, temporary, wanted } from "./helpers.ts";

const MANY = 100;
/** Everything on this machine: addresses of its loopback stand for nodes. */
const SPECS = Array.from({ length: MANY }, (_, i) => ({ name: `n${i}`, ip: `127.0.${i}.1`, n: i }));
const LIST = JSON.stringify({
  kind: "NodeList",
  items: SPECS.map((spec) => ({
    ...node(spec),
    spec: { podCIDR: `127.1.${spec.n}.0/24` },
    padding: "x".repeat(9000),
  })),
});

const pods: Record<string, PodObject> = {};
/** Nodes by what is wrong with them. */
let broken: Record<string, "log 502" | "log hangs" | "exec 502" | "sandbox" | "image" | "refused"> = {};
let atOnce = 0;
let most = 0;

const server = createServer((q, r) => {
  most = Math.max(most, ++atOnce);
  r.on("close", () => atOnce--);
  const answer = (code: number, body: object | string) => {
    r.writeHead(code, { "content-type": "application/json" });
    r.end(typeof body === "string" ? body : JSON.stringify(body));
  };
  const fail = (code: number, message: string) => answer(code, { kind: "Status", message, code });
  const { pathname, searchParams } = new URL(q.url ?? "", "http://x");
  if (pathname === "/api/v1/nodes") return answer(200, LIST);
  if (pathname === "/apis/metrics.k8s.io/v1beta1/nodes")
    return answer(200, { kind: "NodeMetricsList", items: SPECS.map(({ name }) => ({ metadata: { name } })) });
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
  pods[name] = {
    ...pod,
    status: {
      phase: runs ? "Running" : "Pending",
      ...(runs ? { podIP: "127.0.0.1" } : {}),
      containerStatuses: [{ state: runs ? { running: {} } : waiting }],
    },
  };
  answer(201, pod);
}

// What kubectl's stream is on the wire: the kubelet's own end answers, and says what became of the command.
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
    // The API here speaks without TLS.
    curl: `for word; do shift; case $word in https://*) word=http://\${word#https://} ;; esac; set -- "$@" "$word"; done
exec /usr/bin/curl "$@"`,
    k3s: `echo "kubectl $*" >>${root}/kubectl; exit 1`,
    systemctl: "case $* in *k3s-agent) echo inactive ;; *) echo active ;; esac",
    ping: "exec sleep 0.2",
  });
});
after(() => server.close());

/** What a piece of check's finds on this machine, as a box's shell would run it; and what that took. */
async function run(text: string, kubectl = true): Promise<{ facts: Facts; mb: number; processes: number }> {
  const there = text
    .replaceAll("/var/lib/rancher/k3s/server/tls", `${root}/tls`)
    .replaceAll("/var/lib/rancher/k3s/agent/etc/containerd/config.toml", `${root}/config.toml`)
    .replaceAll("/etc/rancher/k3s/k3s.yaml", `${root}/k3s.yaml`)
    .replaceAll("/usr/local/bin/k3s", `${root}/bin/k3s`);
  const stream = reader("mark", {});
  const child = spawn("sh", ["-s"], { env: { ...process.env, PATH }, stdio: ["pipe", "pipe", "ignore"] });
  let said = "";
  child.stdout.setEncoding("utf8").on("data", (chunk) => (said += chunk));
  child.stdin.end(whole(lookScript([ask([there as Look])], wanted(), "mark")));
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
  return { facts: stream.seen.facts, ...peak };
}

const some = (names: string[]) => names.map((name) => ({ name: `p-${name}`, node: name, ip: "127.0.0.1" }));
const skip = lacks("curl", "bash", "timeout") || (process.platform !== "linux" && "needs /proc");

describe("of a hundred nodes", { skip, concurrency: 1 }, () => {
  const boxes = () =>
    clusterOf([
      member(MODERN, { ...SPECS[0], name: "a1", ip: "198.51.100.11" } as (typeof SPECS)[0], {
        nodes: LIST,
        addresses: "",
      }),
    ]);
  const pieces: [what: string, text: () => string, proves: (facts: Facts) => void][] = [
    ["the list", () => nodesLook, ({ nodes }) => assert.equal(nodesOf(nodes).length, MANY)],
    [
      "tunnels, kubelets and metrics",
      () => {
        const cluster = boxes();
        const [box] = cluster.boxes;
        return tries(box as NonNullable<typeof box>, cluster);
      },
      ({ tries, top }) => {
        assert.equal(tries?.match(/^tunnel n\d+ 1420$/gm)?.length, MANY);
        assert.equal(tries?.match(/^kubelet n\d+ refused$/gm)?.length, MANY);
        assert.equal(JSON.parse(top ?? "").items.length, MANY);
      },
    ],
    [
      "pods",
      () =>
        made(
          SPECS.map(({ name }) => name),
          "abc",
        ),
      ({ pods, refused, services }) => {
        assert.equal(JSON.parse(pods ?? "").items.length, MANY);
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
    test(`a server is asked for ${what} with less than 100 MB, at most three questions at a time and no kubectl`, async (t) => {
      most = 0;
      const { facts, mb, processes } = await run(text());
      proves(facts);
      t.diagnostic(
        `${what}: at most ${mb.toFixed(1)} MB in ${processes} processes, ${most} questions at a time`,
      );
      assert.ok(mb > 0 && mb < 100, `${mb} MB in ${processes} processes`);
      assert.ok(most <= 3, `${most} at a time`);
    });
});

describe("what a kubelet does not do", { skip, concurrency: 1 }, () => {
  test("is said in the API's words, and what is only slow as that", async () => {
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

  test("is told apart where a pod does not start: by the kubelet's words it is a fault, for its image it is none", async () => {
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

  test("is a fault without a word of the kubelet's too, on a box that has run for some time and has little to do", () => {
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

  test("is asked of kubectl, one after the other, where curl cannot open such a stream", async () => {
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

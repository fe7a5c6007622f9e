import assert from "node:assert/strict";
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";
import { describe, test } from "node:test";
import { meaningOf } from "../lib/k3s/journal.ts";
import { Refusal } from "../lib/step.ts";
import { fixMetrics, withArguments } from "../scripts/fix-metrics.ts";
import {
  A1,
  B1,
  B2,
  type Facts,
  figures,
  fixture,
  healthy,
  look,
  MODERN,
  node,
  nodes,
  OLD,
  programs,
  shell,
  temporary,
  wanted,
} from "./helpers.ts";
import { type Deployment, deployPass, packaged, settings } from "./stand-in/metrics.ts";

const manifests: Record<string, string> = {
  [OLD]: fixture("metrics-server-v1.17.6.yaml"),
  [MODERN]: fixture("metrics-server-v1.36.3.yaml"),
};
const OURS = ["--kubelet-preferred-address-types=ExternalIP,InternalIP,Hostname", "--kubelet-insecure-tls"];
/** The arguments in a manifest of this shape, and what stands beside them. */
function containerOf(yaml: string) {
  const lines = yaml.split("\n");
  const image = lines.findIndex((line) => /^ +image:/.test(line));
  const indent = /^ +/.exec(lines[image] ?? "")?.[0] ?? "";
  const end = lines.findIndex((line, i) => i > image && line.trim() !== "" && !line.startsWith(indent));
  const own = lines.slice(image, end < 0 ? undefined : end).filter((line) => line.startsWith(indent));
  const keys = own.filter(
    (line) => /^ *[a-zA-Z]+:/.test(line) && line.startsWith(indent) && !line.startsWith(`${indent} `),
  );
  const from = own.indexOf(`${indent}args:`);
  const args: string[] = [];
  for (const line of own.slice(from + 1)) {
    if (!line.startsWith(`${indent}- `)) break;
    args.push(line.slice(indent.length + 2));
  }
  return { args: from < 0 ? [] : args, keys: keys.map((line) => line.trim().split(":")[0]) };
}

describe("the manifest of our own", () => {
  test("of the old release, which had no arguments, has ours", () => {
    const { args, keys } = containerOf(withArguments(manifests[OLD] as string));
    assert.deepEqual(args, OURS);
    assert.deepEqual(keys, ["image", "args", "volumeMounts"]);
  });

  test("of the modern release keeps its arguments, with the address types once", () => {
    const { args, keys } = containerOf(withArguments(manifests[MODERN] as string));
    assert.deepEqual(args, [
      ...OURS,
      "--cert-dir=/tmp",
      "--secure-port=10250",
      "--kubelet-use-node-status-port",
      "--metric-resolution=15s",
    ]);
    assert.deepEqual(keys, ["image", "args", "ports"]);
  });

  for (const [version, manifest] of Object.entries(manifests)) {
    test(`of ${version} changes nothing but arguments`, () => {
      const rest = (text: string) => text.split("\n").filter((line) => !/^ +(- --|args:)/.test(line));
      assert.deepEqual(rest(withArguments(manifest)), rest(manifest));
    });
    test(`of ${version}, made from itself, is itself`, () => {
      assert.equal(withArguments(withArguments(manifest)), withArguments(manifest));
    });
  }
});

const plan = (version: string, over: Facts) =>
  fixMetrics.plan(
    wanted({ K3S_VERSION: version }),
    healthy(version, {}, { packaged: manifests[version] as string, top: figures("a1", "b1", "b2"), ...over }),
  );
const done = (version: string) => ({
  own: withArguments(manifests[version] as string),
  skipped: "yes\n",
  ours: "yes\n",
});
const kinds = (changes: ReturnType<typeof plan>) => changes.map(({ why }) => why.split(" ")[0]);

describe("metrics", () => {
  const cases: [name: string, version: string, over: Facts, kinds: string[]][] = [
    ["of the old release are mended by a manifest, then waited for", OLD, { top: "" }, ["deploy", "wait"]],
    [
      "of the old release are mended even while they answer: a restart of k3s would undo less",
      OLD,
      {},
      ["deploy", "wait"],
    ],
    ["of the old release that are mended and answer are left alone", OLD, done(OLD), []],
    [
      "of the old release that are mended are waited for",
      OLD,
      { ...done(OLD), top: figures("a1") },
      ["wait"],
    ],
    [
      "of the old release whose .skip is gone are mended again",
      OLD,
      { ...done(OLD), skipped: "" },
      ["deploy", "wait"],
    ],
    [
      "of the old release are mended again after an upgrade brought another manifest",
      OLD,
      { ...done(OLD), packaged: (manifests[OLD] as string).replace("v0.3.6", "v0.3.7") },
      ["deploy", "wait"],
    ],
    [
      "of a pod that is not of our manifest do not count",
      OLD,
      { ...done(OLD), ours: "" },
      ["deploy", "wait"],
    ],
    [
      "of a node that kubectl calls <unknown> are waited for",
      OLD,
      { ...done(OLD), top: figures("a1", "b2") },
      ["wait"],
    ],
    ["of the modern release that answer are left alone", MODERN, {}, []],
    [
      "of the modern release that do not answer are waited for, and nothing is lowered, however long it takes",
      MODERN,
      { top: "" },
      ["wait"],
    ],
    ["of one node that are missing are waited for alone", MODERN, { top: figures("a1", "b2") }, ["wait"]],
    [
      "of a modern release get k3s's own back where this project or an upgrade had replaced it",
      MODERN,
      done(MODERN),
      ["give", "wait"],
    ],
    [
      "of a modern release get k3s's own back also after a run that was cut",
      MODERN,
      { ...done(MODERN), skipped: "", ours: "" },
      ["give", "wait"],
    ],
    [
      "of the old release's manifest on a modern one that has its own switched off go without the flag at least",
      MODERN,
      { ...done(OLD), packaged: "" },
      ["deploy", "wait"],
    ],
    ["that are switched off are left off", MODERN, { packaged: "", own: "", top: "" }, []],
    [
      "of a v1.24 with the modern backend are those of a modern one",
      "v1.24.17+k3s1",
      {
        ...done(MODERN),
        packaged: manifests[MODERN] as string,
        flags: "--flannel-backend\n--flannel-external-ip\nwireguard-native\n",
      },
      ["give", "wait"],
    ],
    [
      "of a v1.23 without it are those of an old one",
      "v1.23.1+k3s1",
      { packaged: manifests[OLD] as string, flags: "--flannel-backend\n" },
      ["deploy", "wait"],
    ],
    ...[OLD, MODERN].flatMap((version): [string, string, Facts, string[]][] => [
      [
        `of ${version} that the user deploys, with a .skip, are the user's`,
        version,
        { skipped: "yes\n", top: "" },
        [],
      ],
      [
        `of ${version} that a manifest of the user's deploys are the user's`,
        version,
        { foreign: "/var/lib/rancher/k3s/server/manifests/metrics.yaml\n", top: "" },
        [],
      ],
    ]),
  ];
  for (const [name, version, over, expected] of cases)
    test(name, () => {
      assert.deepEqual(kinds(plan(version, over)), expected);
    });

  test("of no modern release are ever asked without TLS", () => {
    const cases: Facts[] = [{ top: "" }, done(MODERN), done(OLD), { ...done(OLD), packaged: "" }];
    for (const over of cases)
      for (const change of plan(MODERN, over))
        assert.doesNotMatch(change.sh.replaceAll(/grep -cse \S+|\/\^ \*"\S+/g, ""), /--kubelet-insecure-tls/);
  });

  test("are waited for where they are missing, by name, and not for a node that is down", () => {
    assert.match(plan(OLD, { ...done(OLD), top: figures("a1") })[0]?.why ?? "", /for b1, b2$/);
    assert.deepEqual(
      plan(OLD, {
        ...done(OLD),
        nodes: nodes(A1, B1, { ...B2, ready: false }),
        top: figures("a1", "b1"),
      }),
      [],
    );
  });

  test("of a node whose name another's begins with are not taken for its own", () => {
    assert.match(
      plan(OLD, { ...done(OLD), nodes: nodes(A1, { ...B1, name: "b" }), top: figures("a1", "b1") })[0]?.why ??
        "",
      /for b$/,
    );
  });

  test("are refused where k3s does not run, without the command itself as its remedy", () => {
    for (const runs of ["inactive\n", "failed\n", ""])
      assert.throws(
        () => plan(MODERN, { nodes: "", runs }),
        (error) => error instanceof Refusal && /k3s does not run here.*\(make server\)/.test(error.message),
      );
  });

  for (const [name, nodeList] of [
    ["the API does not answer yet", ""],
    ["no node is Ready yet", nodes({ ...A1, ready: false })],
  ] as const)
    test(`wait, where k3s runs and ${name}, and are looked at again`, () => {
      for (const runs of ["active\n", "activating\n"]) {
        const [change, ...more] = plan(MODERN, { nodes: nodeList, runs });
        assert.match(change?.why ?? "", /^wait until the API answers/);
        assert.equal(change?.lookAgain, true);
        assert((change?.seconds ?? 0) <= 300);
        assert.deepEqual(more, []);
      }
    });
});

describe("on the box", () => {
  const FOLDER = "/var/lib/rancher/k3s/server/manifests";
  /** A box of a temporary folder, whose kubectl is `kubectl`. */
  function box(kubectl: string) {
    const root = temporary();
    const there = (text: string) =>
      text
        .replaceAll("/var/lib/rancher", `${root}/var`)
        .replaceAll("/etc/rancher", `${root}/etc`)
        .replaceAll("/usr/local/bin/k3s", `${root}/bin/k3s`)
        .replaceAll("began + 180", "began + 2")
        .replaceAll("began + 600", "began + 30");
    const put = (path: string, text: string) => {
      mkdirSync(dirname(there(path)), { recursive: true });
      writeFileSync(there(path), text);
    };
    const PATH = programs(`${root}/bin`, { k3s: kubectl, systemctl: "echo active" });
    put("/etc/rancher/k3s/k3s.yaml", "kind: Config\n");
    put(`${FOLDER}/coredns.yaml`, "metadata:\n  name: coredns\n");
    return {
      put,
      at: there,
      run: (text: string) => shell(`set -eu\nbeat() { :; }\n${there(text)}`, ["sh", "-s"], { PATH }),
      look: () => look([{ look: () => fixMetrics.look(wanted()).map(there) }], wanted(), { PATH }),
      has: (path: string) => existsSync(there(path)),
    };
  }
  const PACKAGED = `${FOLDER}/metrics-server/metrics-server-deployment.yaml`;
  const OWN = `${FOLDER}/metrics-server-across-clouds.yaml`;

  test("k3s's own metrics-server is really deployed again, before the next start of k3s and after it", () => {
    const { put, at, run, look, has } = box("exit 1");
    const manifest = packaged("modern", true);
    const addons: Record<string, string> = {};
    let running: Deployment | null = null;
    const pass = (force = false) => {
      running = deployPass(at(FOLDER), new Set(), running, addons, force);
      return settings(running as Deployment).insecure;
    };
    put(PACKAGED, manifest);
    assert.equal(pass(true), false);
    put(`${PACKAGED}.skip`, "");
    put(OWN, withArguments(manifest));
    assert.equal(pass(), true);

    const facts = { ...healthy(MODERN, {}), ...look(), version: MODERN, nodes: nodes(A1, B1, B2) };
    const [back] = fixMetrics.plan(wanted(), facts);
    assert.match(back?.why ?? "", /^give k3s's own metrics-server back/);
    assert.equal(run(back?.sh ?? "").status, 0);
    assert.equal(pass(), false, "until k3s starts again it goes on without TLS");
    assert(!has(OWN) && !has(`${PACKAGED}.skip`));
    put(PACKAGED, manifest);
    assert.equal(pass(true), false);
    assert.deepEqual(
      fixMetrics.plan(wanted(), {
        ...facts,
        ...look(),
        version: MODERN,
        nodes: nodes(A1),
        top: figures("a1"),
      }),
      [],
    );
  });

  test("a manifest of the user's is seen, and other manifests are none", () => {
    const { put, look, at } = box("exit 1");
    put(OWN, "metadata:\n  name: metrics-server\n");
    assert.equal(look().foreign ?? "", "");
    put(`${FOLDER}/mine.yaml`, "kind: HelmChart\nmetadata:\n  name: metrics-server\n");
    put(`${FOLDER}/mine.json`, '{\n  "metadata": {\n    "name": "metrics-server",\n    "a": 1\n  }\n}\n');
    assert.equal(look().foreign?.trim(), at(`${FOLDER}/mine.yaml\n${FOLDER}/mine.json`));
  });

  /** What kubectl says of a1 and b1, which are Ready, and b2; `tops` have figures, and the pod these arguments. */
  const KUBECTL = (
    log: string,
    { tops = ["a1", "b2"], args = ["--cert-dir=/tmp"], reason = "" } = {},
  ) => `shift 4
case "$*" in
'get --raw /api/v1/nodes?'*) echo '${JSON.stringify({ kind: "NodeList", items: [A1, B1, { ...B2, ready: false }].map(node) })}' ;;
'get --raw /apis/metrics'*) if [ -e "$0.pulls" ]; then echo '${figures("a1", "b1")}'; else echo '${figures(...tops)}'; fi ;;
'get --raw /api/v1/namespaces/kube-system/pods?pretty=true&labelSelector=k8s-app%3Dmetrics-server') cat <<'E'
${JSON.stringify({ kind: "PodList", items: [pod(args)] }, null, 2)}${reason && `\n"reason": "${reason}"`}
E
[ -z "${reason}" ] || : >"$0.pulls" ;;
'top nodes'*) printf '%s\\n' 'a1 1m 1% 1Mi 1%' 'b2 1m 1% 1Mi 1%' 'b1 <unknown> <unknown>' ;;
*' logs '*) ${log} ;;
*' describe '*) printf '%s\\n' 'Name: x' 'Events:' '  Warning  Failed  kubelet  Error: ErrImagePull' ;;
*' get pods '*) echo 'metrics-server-1 0/1 ImagePullBackOff 0 9m' ;;
*) exit 9 ;;
esac`;
  const pod = (args: string[]) => ({
    metadata: { name: "metrics-server-1", labels: { "k8s-app": "metrics-server" } },
    spec: { containers: [{ args }], affinity: { matchLabels: { "k8s-app": "metrics-server" } } },
    status: { phase: "Running" },
  });
  const waits = (kubectl: string) => box(kubectl).run(plan(MODERN, { top: figures("a1") })[0]?.sh ?? "");

  test("what is missed is told in the words of metrics-server's log and pods; a node that is not Ready answers for none", () => {
    const line =
      'E1126 15:43:26.123456       1 scraper.go:149] "Failed to scrape node" err="Get \\"https://198.51.101.11:10250/metrics/resource\\": tls: failed to verify certificate: x509: certificate is valid for 127.0.0.1, 192.168.0.11, not 198.51.101.11" node="b1"';
    const { status, stdout } = waits(KUBECTL(`cat <<'E'\n${line}\nI1126 quiet\nE\n`));
    assert.equal(status, 1);
    for (const word of ["ImagePullBackOff", "ErrImagePull", line, "b1 <unknown>"])
      assert(stdout.includes(word), `${word} is not in ${stdout}`);
    assert.doesNotMatch(stdout, /quiet|Name: x/);
  });

  test("a log that cannot be read is said, and nothing else is done for it", () => {
    const { status, stdout } = waits(KUBECTL("echo 'Error from server: proxy error' >&2; exit 1"));
    assert.equal(status, 1);
    assert.match(stdout, /Its log:\nError from server: proxy error/);
  });

  test("metrics of every Ready node end the wait, but not from a pod that asks without TLS", () => {
    const tops = ["b1", "a1"];
    assert.equal(waits(KUBECTL("exit 1", { tops })).status, 0);
    assert.equal(waits(KUBECTL("exit 1", { tops, args: ["--kubelet-insecure-tls"] })).status, 1);
  });

  test("the wait goes on while a pod of metrics-server waits for its image, not for another reason", () => {
    assert.equal(waits(KUBECTL("exit 1", { reason: "ContainerCreating" })).status, 0);
    assert.equal(waits(KUBECTL("exit 1", { reason: "ImagePullBackOff" })).status, 1);
  });
});

test("what metrics-server says of a kubelet has a meaning of its own, not that of k3s's journal", () => {
  const modern = (why: string) =>
    `E1126 15:43:26.1       1 scraper.go:149] "Failed to scrape node" err="Get \\"https://1.2.3.4:10250/metrics/resource\\": ${why}" node="b1"`;
  const old = (why: string) =>
    `E1126 15:43:26.1       1 manager.go:111] unable to fully collect metrics: unable to fully scrape metrics from source kubelet_summary:b1: unable to fetch metrics from Kubelet b1 (b1): Get https://b1:10250/stats/summary?only_cpu_and_memory=true: ${why}`;
  const cases: [string, RegExp, RegExp][] = [
    [
      modern("tls: failed to verify certificate: x509: certificate is valid for 127.0.0.1, not 1.2.3.4"),
      /certificate of node b1/,
      /restart k3s-agent/,
    ],
    [
      old("x509: cannot validate certificate for 1.2.3.4 because it doesn't contain any IP SANs"),
      /certificate of node b1/,
      /restart/,
    ],
    [
      modern("tls: failed to verify certificate: x509: certificate signed by unknown authority"),
      /certificate of node b1/,
      /restart/,
    ],
    [modern("dial tcp 1.2.3.4:10250: i/o timeout"), /reach the kubelet of node b1/, /10250\/tcp/],
    [modern("context deadline exceeded"), /reach the kubelet of node b1/, /10250\/tcp/],
    [old("dial tcp: lookup b1 on 10.43.0.10:53: no such host"), /reach the kubelet of node b1/, /10250\/tcp/],
    ["  Warning  Failed  3m  kubelet  Error: ErrImagePull", /image/, /REGISTRY_MIRRORS/],
  ];
  for (const [line, cause, remedy] of cases) {
    const meaning = meaningOf(line, "make fix-metrics");
    assert.match(meaning?.cause ?? "", cause, line);
    assert.match(meaning?.remedy ?? "", remedy, line);
  }
});

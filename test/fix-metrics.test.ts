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

describe("the modified manifest", () => {
  test("of the old release, which has no arguments, gets those of this project", () => {
    const { args, keys } = containerOf(withArguments(manifests[OLD] as string));
    assert.deepEqual(args, OURS);
    assert.deepEqual(keys, ["image", "args", "volumeMounts"]);
  });

  test("of the modern release keeps its arguments, and has the address types only once", () => {
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
    test(`of ${version} differs only in its arguments`, () => {
      const rest = (text: string) => text.split("\n").filter((line) => !/^ +(- --|args:)/.test(line));
      assert.deepEqual(rest(withArguments(manifest)), rest(manifest));
    });
    test(`of ${version} does not change if it is modified again`, () => {
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
    ["of the old release are fixed by a manifest, then waited for", OLD, { top: "" }, ["deploy", "wait"]],
    ["of the old release are fixed by a manifest even if they are complete", OLD, {}, ["deploy", "wait"]],
    ["of the old release that are fixed and complete need no change", OLD, done(OLD), []],
    [
      "of the old release that are fixed but incomplete are waited for",
      OLD,
      { ...done(OLD), top: figures("a1") },
      ["wait"],
    ],
    [
      "of the old release are fixed again if the .skip file is missing",
      OLD,
      { ...done(OLD), skipped: "" },
      ["deploy", "wait"],
    ],
    [
      "of the old release are fixed again after an upgrade that brought another manifest",
      OLD,
      { ...done(OLD), packaged: (manifests[OLD] as string).replace("v0.3.6", "v0.3.7") },
      ["deploy", "wait"],
    ],
    ["from a pod of another manifest do not count", OLD, { ...done(OLD), ours: "" }, ["deploy", "wait"]],
    [
      "of a node that kubectl lists as <unknown> are waited for",
      OLD,
      { ...done(OLD), top: figures("a1", "b2") },
      ["wait"],
    ],
    ["of the modern release that are complete need no change", MODERN, {}, []],
    [
      "of the modern release that are missing are only waited for, and TLS is not disabled",
      MODERN,
      { top: "" },
      ["wait"],
    ],
    [
      "of the modern release that are missing for one node are only waited for",
      MODERN,
      { top: figures("a1", "b2") },
      ["wait"],
    ],
    [
      "of a modern release come from k3s's own manifest again if it was replaced before",
      MODERN,
      done(MODERN),
      ["give", "wait"],
    ],
    [
      "of a modern release come from k3s's own manifest again even after an interrupted run",
      MODERN,
      { ...done(MODERN), skipped: "", ours: "" },
      ["give", "wait"],
    ],
    [
      "from the old release's manifest, on a modern one whose own is disabled, lose at least the flag that disables TLS",
      MODERN,
      { ...done(OLD), packaged: "" },
      ["deploy", "wait"],
    ],
    ["that are disabled stay disabled", MODERN, { packaged: "", own: "", top: "" }, []],
    [
      "of a v1.24 with the modern backend are handled like those of a modern release",
      "v1.24.17+k3s1",
      {
        ...done(MODERN),
        packaged: manifests[MODERN] as string,
        flags: "--flannel-backend\n--flannel-external-ip\nwireguard-native\n",
      },
      ["give", "wait"],
    ],
    [
      "of a v1.23 without the modern backend are handled like those of an old release",
      "v1.23.1+k3s1",
      { packaged: manifests[OLD] as string, flags: "--flannel-backend\n" },
      ["deploy", "wait"],
    ],
    ...[OLD, MODERN].flatMap((version): [string, string, Facts, string[]][] => [
      [
        `of ${version} that the user deploys, with a .skip file, are not changed`,
        version,
        { skipped: "yes\n", top: "" },
        [],
      ],
      [
        `of ${version} that the user deploys, with a manifest, are not changed`,
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

  test("of a modern release are never requested without TLS", () => {
    const cases: Facts[] = [{ top: "" }, done(MODERN), done(OLD), { ...done(OLD), packaged: "" }];
    for (const over of cases)
      for (const change of plan(MODERN, over))
        assert.doesNotMatch(change.sh.replaceAll(/grep -cse \S+|\/\^ \*"\S+/g, ""), /--kubelet-insecure-tls/);
  });

  test("are waited for by the names of the nodes that lack them, except for a node that is down", () => {
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

  test("of a node are not confused with those of a node whose name begins with the same letters", () => {
    assert.match(
      plan(OLD, { ...done(OLD), nodes: nodes(A1, { ...B1, name: "b" }), top: figures("a1", "b1") })[0]?.why ??
        "",
      /for b$/,
    );
  });

  test("are refused if k3s does not run, with make server as the remedy", () => {
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
    test(`are waited for, and examined again, if k3s runs and ${name}`, () => {
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

  test("k3s's own metrics-server is deployed again, both before and after the next start of k3s", () => {
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

  test("a user's manifest for metrics-server is detected, and other manifests are ignored", () => {
    const { put, look, at } = box("exit 1");
    put(OWN, "metadata:\n  name: metrics-server\n");
    assert.equal(look().foreign ?? "", "");
    put(`${FOLDER}/mine.yaml`, "kind: HelmChart\nmetadata:\n  name: metrics-server\n");
    put(`${FOLDER}/mine.json`, '{\n  "metadata": {\n    "name": "metrics-server",\n    "a": 1\n  }\n}\n');
    assert.equal(look().foreign?.trim(), at(`${FOLDER}/mine.yaml\n${FOLDER}/mine.json`));
  });

  /** kubectl with a1 and b1, which are Ready, and b2; the nodes in `tops` have metrics, and the pod has these arguments. */
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

  test("a timeout prints metrics-server's log and pods, and metrics of a node that is not Ready do not prevent it", () => {
    const line =
      'E1126 15:43:26.123456       1 scraper.go:149] "Failed to scrape node" err="Get \\"https://198.51.101.11:10250/metrics/resource\\": tls: failed to verify certificate: x509: certificate is valid for 127.0.0.1, 192.168.0.11, not 198.51.101.11" node="b1"';
    const { status, stdout } = waits(KUBECTL(`cat <<'E'\n${line}\nI1126 quiet\nE\n`));
    assert.equal(status, 1);
    for (const word of ["ImagePullBackOff", "ErrImagePull", line, "b1 <unknown>"])
      assert(stdout.includes(word), `${word} is not in ${stdout}`);
    assert.doesNotMatch(stdout, /quiet|Name: x/);
  });

  test("a log that cannot be read is replaced by the error message", () => {
    const { status, stdout } = waits(KUBECTL("echo 'Error from server: proxy error' >&2; exit 1"));
    assert.equal(status, 1);
    assert.match(stdout, /Its log:\nError from server: proxy error/);
  });

  test("metrics of every Ready node end the wait, unless they come from a pod that does not verify TLS", () => {
    const tops = ["b1", "a1"];
    assert.equal(waits(KUBECTL("exit 1", { tops })).status, 0);
    assert.equal(waits(KUBECTL("exit 1", { tops, args: ["--kubelet-insecure-tls"] })).status, 1);
  });

  test("metrics from a pod that asks at another address than the manifest says do not end the wait", () => {
    const types = (first: string, next: string) =>
      `--kubelet-preferred-address-types=${first},${next},Hostname`;
    const [inside, outside] = [types("InternalIP", "ExternalIP"), types("ExternalIP", "InternalIP")];
    const ends = (path: string, deployed: string, pod: string) => {
      const { put, run } = box(KUBECTL("exit 1", { tops: ["b1", "a1"], args: [pod] }));
      put(path, withArguments(manifests[MODERN] as string, [deployed]));
      return run(plan(MODERN, { top: "" })[0]?.sh ?? "").status === 0;
    };
    for (const path of [OWN, PACKAGED])
      assert.deepEqual(
        [ends(path, inside, inside), ends(path, inside, outside), ends(path, outside, inside)],
        [true, false, false],
      );
  });

  test("the wait is extended while the pod of metrics-server is being created, but not if its image cannot be pulled", () => {
    assert.equal(waits(KUBECTL("exit 1", { reason: "ContainerCreating" })).status, 0);
    assert.equal(waits(KUBECTL("exit 1", { reason: "ImagePullBackOff" })).status, 1);
  });
});

test("a message of metrics-server about a kubelet is explained differently from a similar one in k3s's journal", () => {
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

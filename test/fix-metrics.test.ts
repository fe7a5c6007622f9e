import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { type Facts, Refusal } from "../lib/step.ts";
import { fixMetrics, withArguments } from "../scripts/fix-metrics.ts";
import { A1, B1, B2, fixture, healthy, MODERN, nodes, OLD, wanted } from "./helpers.ts";

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

const top = (...names: string[]) => names.map((name) => `${name}   193m   9%   886Mi   22%`).join("\n");
const plan = (version: string, over: Facts) =>
  fixMetrics.plan(
    wanted({ K3S_VERSION: version }),
    healthy(
      version,
      {},
      { packaged: manifests[version] as string, top: top("a1", "b1", "b2"), age: "9999\n", ...over },
    ),
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
    ["of the old release that are mended are waited for", OLD, { ...done(OLD), top: top("a1") }, ["wait"]],
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
      {
        ...done(OLD),
        top: `${top("a1", "b2")}\nb1     <unknown>                           <unknown>               <unknown>               <unknown>`,
      },
      ["wait"],
    ],
    ["of the modern release that answer are left alone", MODERN, {}, []],
    [
      "of a young modern release are given time before anything is changed",
      MODERN,
      { top: "", age: "20\n" },
      ["wait"],
    ],
    [
      "of the modern release that do not answer are mended and waited for",
      MODERN,
      { top: top("a1", "b2") },
      ["deploy", "wait"],
    ],
    ["that are mended on a modern release stay so", MODERN, done(MODERN), []],
    ["that are switched off are left off", MODERN, { packaged: "", own: "", top: "" }, []],
  ];
  for (const [name, version, over, expected] of cases)
    test(name, () => {
      assert.deepEqual(kinds(plan(version, over)), expected);
    });

  test("of a young modern release are looked at again after their time", () => {
    assert.equal(plan(MODERN, { top: "", age: "20\n" })[0]?.lookAgain, true);
  });

  test("are waited for where they are missing, by name, and not for a node that is down", () => {
    assert.match(plan(OLD, { ...done(OLD), top: top("a1") })[0]?.why ?? "", /for b1, b2$/);
    assert.deepEqual(
      plan(OLD, { ...done(OLD), nodes: nodes(A1, B1, { ...B2, ready: false }), top: top("a1", "b1") }),
      [],
    );
  });

  test("of a node whose name another's begins with are not taken for its own", () => {
    assert.match(
      plan(OLD, { ...done(OLD), nodes: nodes(A1, { ...B1, name: "b" }), top: top("a1", "b1") })[0]?.why ?? "",
      /for b$/,
    );
  });

  test("are refused where the API does not answer", () => {
    assert.throws(() => plan(MODERN, { nodes: "" }), Refusal);
  });
});

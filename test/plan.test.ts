/** `DRY=1 JSON=1`: the plan as one JSON document, its exit status, and that no secret is in it. */
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { documentOf, type Plan, planStatus } from "../lib/plan.ts";
import { silent } from "../lib/report.ts";
import { isSecret, NAMES } from "../lib/settings.ts";
import { a1, b1, b2, ENV, fresh, JOINED, run } from "./cluster.ts";
import {
  A1,
  B1,
  B2,
  boxOf,
  type Facts,
  IP,
  MODERN,
  SCRIPT_FILES,
  shell,
  TOKEN,
  temporary,
} from "./helpers.ts";

const JSON_OF = ["--dry-run", "--json"];
/** What a consumer reads. */
interface Document {
  script: string;
  todo: number;
  failed: number;
  boxes: {
    name: string;
    address: string;
    changes: { why: string; detail?: string[]; reboot?: true; on?: string }[];
    assumes?: string[];
    later?: string[];
    error?: string;
  }[];
  later: string[];
}

/** Runs a script with these flags; its standard output has to be one line of JSON. */
async function planOf(script: string, args: string[], envFile: string, boxes: Record<string, Facts>) {
  const { status, stdout, stderr } = await run(script, [...JSON_OF, ...args], envFile, boxes);
  assert.match(stdout, /^\{.*\}\n$/, stderr);
  return { status, plan: JSON.parse(stdout) as Document, stderr };
}

describe("DRY=1 JSON=1", { concurrency: 2 }, () => {
  test("of boxes with nothing to do has todo 0 and an entry without changes for each, and exits with 0", async () => {
    const { status, plan } = await planOf("up", [], ENV + JOINED, { a1: a1(), b1: b1(), b2: b2() });
    assert.deepEqual(plan, {
      script: "up",
      todo: 0,
      failed: 0,
      boxes: [A1, B1, B2].map(({ name, ip }) => ({ name, address: ip, changes: [] })),
      later: [],
    });
    assert.equal(status, 0);
  });

  test("exits with 3 if there is something to do, with the lines of a file that change", async () => {
    const boxes = { a1: a1(), b1: { ...b1(), enabled: "disabled\n" }, b2: b2() };
    const { status, plan } = await planOf("up", ["--node-labels", "disk=ssd"], ENV + JOINED, boxes);
    assert.equal(status, 3);
    assert.equal(plan.todo, plan.boxes.flatMap(({ changes }) => changes).length);
    const [write] = plan.boxes[1]?.changes ?? [];
    assert.match(write?.why ?? "", /^write \/etc\/systemd\/system\/k3s-agent\.service/);
    assert.ok(write?.detail?.includes("+ --node-label=disk=ssd"), JSON.stringify(write));
  });

  test("lists boxes in the settings' order, whichever answers first", async () => {
    const { plan } = await planOf("firewall", [], ENV + JOINED, {
      ...{ a1: { ...a1(), nft: "/usr/sbin/nft\n" }, "a1.slow": {} },
      ...{ b1: b1(), "b1.slow": {}, b2: b2() },
    });
    assert.deepEqual(
      plan.boxes.map(({ name }) => name),
      ["a1", "b1", "b2"],
    );
  });

  test("says what is planned only after these changes", async () => {
    const boxes = { a1: fresh("a1"), b1: fresh("b1"), b2: fresh("b2") };
    const up = await planOf("up", [], ENV, boxes);
    assert.deepEqual(up.plan.later, ["annotate and fix-metrics on a1, once all have joined"]);
    assert.equal(up.plan.todo, up.plan.boxes.flatMap(({ changes }) => changes).length + 1);
    const server = await planOf("server", ["--k3s-version", "v1.24.17+k3s1"], ENV, { a1: fresh("a1") });
    assert.match(server.plan.boxes[0]?.later?.[0] ?? "", /^look again/);
    const bin = ["--k3s-bin", "package.json", "--k3s-version", "v1.36.3+k3s1"];
    const assumed = await planOf("server", bin, ENV, { a1: fresh("a1", { sha256: "" }) });
    assert.deepEqual(assumed.plan.boxes[0]?.assumes, ["package.json is k3s v1.36.3+k3s1"]);
  });

  test("of make upgrade has the releases that follow", async () => {
    const args = ["--k3s-version", "v1.38.1+k3s1", "--steps", "v1.37.1+k3s1"];
    const { status, plan, stderr } = await planOf("upgrade", args, ENV + JOINED, {
      ...{ a1: a1(), b1: b1(), b2: b2() },
    });
    assert.equal(status, 3, stderr);
    assert.deepEqual(plan.later, ["the same on all nodes, to v1.38.1+k3s1"]);
    // The server drains each node before its own plan.
    assert.deepEqual(
      plan.boxes.map(({ name }) => name),
      ["a1", "a1", "a1", "b1", "a1", "b2"],
    );
  });

  test("of make remove has what the server does before and after", async () => {
    const b2Full = { ...b2(), left: "/var/lib/rancher/k3s\n" };
    const args = ["--host", `b2=${B2.ip}`];
    const { status, plan, stderr } = await planOf("remove", args, ENV + JOINED, { a1: a1(), b2: b2Full });
    assert.equal(status, 3, stderr);
    assert.deepEqual(
      plan.boxes.map(({ name, changes }) => [name, changes[0]?.why.split(/[:;,]/)[0]]),
      [
        ["a1", "drain node b2"],
        ["b2", plan.boxes[1]?.changes[0]?.why.split(/[:;,]/)[0]],
        ["a1", "delete node b2"],
      ],
    );
  });

  test("of make down has the settings that would go", async () => {
    const full = { left: "/var/lib/rancher/k3s\n" };
    const boxes = { a1: full, b1: full, b2: { left: "" } };
    const { plan } = await planOf("down", [], ENV + JOINED, boxes);
    assert.match(plan.later[0] ?? "", /^K3S_URL and K3S_TOKEN go from /);
  });

  test("has the error of a box that cannot be examined, beside the plans of the others, and exits with 1", async () => {
    const { status, plan, stderr } = await planOf("up", [], ENV + JOINED, { a1: a1(), b2: b2() });
    assert.equal(status, 1);
    assert.equal(plan.failed, 1);
    const [, lost] = plan.boxes;
    assert.deepEqual([lost?.name, lost?.changes], ["b1", []]);
    assert.match(lost?.error ?? "", /No route to host/);
    assert.match(stderr, /again: make agent HOST=\S+ DRY=1 JSON=1 /m);
  });

  for (const script of ["up", "upgrade", "remove"])
    test(`of make ${script} prints no document for a wrong setting, and exits with 2`, async () => {
      const { status, stdout, stderr } = await run(script, JSON_OF, `${ENV}NONSENSE=1\n`, {});
      assert.deepEqual([status, stdout], [2, ""]);
      assert.match(stderr, /^NONSENSE \(.*\): expected a setting.*\n$/);
    });

  for (const args of [["--json"], ["--json", "--print"], ["--json", "--dry-run", "--print"]])
    test(`is the only way to ask for JSON: ${args.join(" ")} is refused`, async () => {
      const { status, stdout, stderr } = await run("up", args, ENV + JOINED, {});
      assert.deepEqual([status, stdout], [2, ""]);
      assert.match(stderr, /^--json \(flag\): expected --dry-run beside it/);
    });
});

test("the document escapes what a terminal would act on, and hides secrets before it escapes them", () => {
  const secret = `K3S_TOKEN=${TOKEN}`;
  const plan: Plan = {
    parts: [
      {
        box: boxOf({ line: { ...silent, row: 2 } }),
        changes: [{ why: `write \x1b[31m ${secret}`, detail: ["- a", `+ ${secret}`], sh: secret }],
      },
      { box: boxOf({ name: "a1" }), changes: [], error: `it says\n"${secret}"\u202e` },
    ],
    later: [secret],
  };
  const text = documentOf("up", plan);
  assert.doesNotMatch(text, /[\p{C}]|K10abab/u);
  assert.doesNotMatch(JSON.parse(text).boxes[1].changes[0].why, /0123456789abcdef/);
  assert.deepEqual(
    JSON.parse(text).boxes.map((box: { name: string }) => box.name),
    ["a1", "b1"],
  );
  assert.equal(planStatus(plan), 3);
  assert.equal(planStatus({ parts: [], later: [] }), 0);
});

/** A value of each secret setting, and the parts of it that nobody may see. */
const SECRET: Record<string, [value: string, ...parts: string[]]> = {
  K3S_TOKEN: [TOKEN, TOKEN.slice(-32)],
  K3S_DATASTORE_ENDPOINT: ["postgres://k3s:of-the-database@db.example.org:5432/k3s", "of-the-database"],
  HTTPS_PROXY: ["http://me:of-the-proxy@proxy.example.org:3128", "of-the-proxy"],
  HTTP_PROXY: ["http://me:of-the-other@proxy.example.org:3128", "of-the-other"],
  S3_ACCESS_KEY: ["AKIAOFTHEBUCKET12345"],
  S3_SECRET_KEY: ["of-the-bucket/0123456789+abcdefghijklmno"],
  NOTIFY_URL: ["https://hooks.example.org/services/of-the-webhook", "of-the-webhook"],
};

/** Every text that the output holds, also within base64, and within that. */
function decoded(text: string): string {
  const inside = [...text.matchAll(/[A-Za-z0-9+/_-]{16,}={0,2}/g)].flatMap(([word]) =>
    [0, 1, 2, 3].map((from) => Buffer.from(word.slice(from), "base64").toString("latin1")),
  );
  return [text, ...inside].join("\n");
}

test("no value of a secret setting is in any script's plan as JSON, in no encoding", {
  timeout: 120_000,
}, async () => {
  const secrets = NAMES.filter(isSecret);
  assert.deepEqual(
    secrets.filter((name) => !SECRET[name]),
    [],
    "needs a value here",
  );
  const folder = temporary();
  writeFileSync(join(folder, "about"), `version=${MODERN}\nnode=a1\nip=${IP}\n`);
  writeFileSync(join(folder, "token"), `${TOKEN}\n`);
  writeFileSync(join(folder, "node-password"), "x\n");
  shell(
    `cd ${folder}; mkdir tls cred manifests db; tar -czf backup.tar.gz about token node-password tls cred manifests db`,
  );
  const ARGS: Record<string, string[]> = {
    restore: ["--backup", join(folder, "backup.tar.gz"), "--host", "c1=198.51.100.30"],
    drill: ["--backup", join(folder, "backup.tar.gz"), "--host", "c1=198.51.100.30"],
    promote: ["--backup", join(folder, "backup.tar.gz"), "--host", "c1=198.51.100.30", "--force"],
    device: ["--name", "phone"],
    ...Object.fromEntries(
      ["agent", "annotate", "download-k3s", "install-wireguard", "upgrade-kernel", "remove"].map((name) => [
        name,
        ["--host", `b1=${B1.ip}`],
      ]),
    ),
    upgrade: ["--k3s-version", "v1.36.3+k3s1"],
  };
  const full = { left: "/var/lib/rancher/k3s\n", database: "x\n" };
  const due = { rotates: "  rotate \n", opens: "200", certificates: "" };
  // A unit's environment of somebody else's, in the diff of ours.
  const foreign = { unit: `[Service]\nEnvironment=K3S_TOKEN=${TOKEN}\nExecStart=/usr/local/bin/k3s agent\n` };
  const joined = {
    a1: { ...a1(), ...full, ...due, envfile: "K3S_TOKEN=another\n" },
    b1: { ...b1(), ...full, ...foreign, envfile: `K3S_URL=https://${IP}:6443\nK3S_TOKEN=${TOKEN}x\n` },
    b2: { ...b2(), ...full },
    c1: fresh("c1", { boot: "c1", system: "Linux", tools: "/bin/unshare\n/sbin/ip\n/bin/mount" }),
  };
  const scenes: [Record<string, Facts>, without?: string][] = [
    [{ a1: fresh("a1"), b1: fresh("b1", foreign), b2: fresh("b2") }],
    [joined, "K3S_DATASTORE_ENDPOINT"],
  ];
  let changes = 0;
  const planned = new Set<string>();
  const examine = async (script: string) => {
    for (const [boxes, without] of scenes) {
      const given = secrets.filter((name) => name !== without);
      const lines = given.map((name) => `${name}='${SECRET[name]?.[0]}'\n`).join("");
      const env = `${ENV}K3S_URL=https://${IP}:6443\n${lines}`;
      const { stdout, stderr } = await run(script, [...JSON_OF, ...(ARGS[script] ?? [])], env, boxes);
      if (stdout) {
        const plan = JSON.parse(stdout) as Document;
        if (plan.boxes.length) planned.add(script);
        changes += plan.todo;
      }
      const shown = decoded(stdout + stderr);
      for (const part of given.flatMap((name) => SECRET[name] ?? []))
        for (const form of [part, encodeURIComponent(part), Buffer.from(part).toString("hex")])
          assert(!shown.includes(form), `${script}: ${part} in ${stdout}${stderr}`);
    }
  };
  const read = ["check", "status", "kubeconfig", "devices"];
  const scripts = Object.keys(SCRIPT_FILES).filter((name) => !read.includes(name));
  const queue = [...scripts];
  const worker = async () => {
    for (let script = queue.shift(); script; script = queue.shift()) await examine(script);
  };
  await Promise.all([worker(), worker(), worker()]);
  assert(changes > 60, `${changes} changes`);
  assert.deepEqual(
    scripts.filter((name) => !planned.has(name)),
    [],
    "has no plan here",
  );
});

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { labelsPlan, noProxy } from "../lib/k3s/config.ts";
import type { Settings } from "../lib/settings.ts";
import type { Step } from "../lib/step.ts";
import { agent } from "../scripts/agent.ts";
import { downloadK3s } from "../scripts/download-k3s.ts";
import { installWireguard } from "../scripts/install-wireguard.ts";
import { server } from "../scripts/server.ts";
import { upgradeKernel } from "../scripts/upgrade-kernel.ts";
import {
  A1,
  B1,
  type Facts,
  filesAfter,
  fixture,
  healthy,
  MODERN,
  NOW,
  nodes,
  OLD,
  prepared,
  shell,
  wanted,
} from "./helpers.ts";

const verbs = (step: typeof server, want: Settings, facts: Facts) =>
  step.plan(want, facts).map(({ why }) => why.replace(/: [-+].*| and wait.*/, ""));
const taint = (key: string, value = "", effect = "NoSchedule") => ({
  key,
  ...(value ? { value } : {}),
  effect,
});

describe("labels and taints:", () => {
  const unit = (...args: string[]) => `ExecStart=k3s server \\\n    ${args.join(" \\\n    ")}\n`;
  const cases: [
    name: string,
    old: string[],
    args: string[],
    node: Partial<typeof A1 & { labels: Record<string, string>; taints: object[] }>,
    whys: string[],
  ][] = [
    [
      "nothing is changed if none are requested and none were set",
      [],
      [],
      { labels: { a: "b" }, taints: [taint("x")] },
      [],
    ],
    ["a new label is set by k3s", [], ["--node-label=a=b"], {}, []],
    ["a changed label is set by k3s", ["--node-label=a=b"], ["--node-label=a=c"], { labels: { a: "b" } }, []],
    [
      "a label that is no longer requested is removed",
      ["--node-label=a=b"],
      [],
      { labels: { a: "b" } },
      ["label node a1: a-"],
    ],
    [
      "a value may be a separate argument, and a flag may have a single dash",
      ["--node-label", "a=b,c=d", "-node-label=e=f"],
      ["-node-label", "c=d", "--node-taint", "x=y:NoSchedule"],
      { labels: { a: "b", c: "d", e: "f" } },
      ["label node a1: a- e-", "taint node a1: x=y:NoSchedule"],
    ],
    ["a label that was already removed needs no change", ["--node-label=a=b"], [], {}, []],
    [
      "a label that others have set is kept",
      ["--node-label=a=b"],
      [],
      { labels: { a: "b", c: "d" } },
      ["label node a1: a-"],
    ],
    ["a new taint is set", [], ["--node-taint=x=y:NoSchedule"], {}, ["taint node a1: x=y:NoSchedule"]],
    ["a taint that exists needs no change", [], ["--node-taint=x=:NoSchedule"], { taints: [taint("x")] }, []],
    [
      "a taint that is no longer requested is removed",
      ["--node-taint=x=y:NoExecute"],
      [],
      { taints: [taint("x", "y", "NoExecute")] },
      ["taint node a1: x:NoExecute-"],
    ],
    [
      "a taint's new value is set without removing the old one",
      ["--node-taint=x=y:NoSchedule"],
      ["--node-taint=x=z:NoSchedule"],
      { taints: [taint("x", "y")] },
      ["taint node a1: x=z:NoSchedule"],
    ],
    [
      "a taint that Kubernetes or others have set is kept",
      [],
      [],
      { taints: [taint("node.kubernetes.io/unschedulable")] },
      [],
    ],
  ];
  for (const [name, old, args, node, whys] of cases)
    test(name, () => {
      const facts = { unit: unit("--a", ...old), nodes: nodes({ ...A1, ...node } as typeof A1) };
      assert.deepEqual(
        labelsPlan("server", "a1", ["--a", ...args], facts).map(({ why }) => why),
        whys,
      );
    });

  test("those of a node that is not registered yet are set by k3s", () =>
    assert.deepEqual(labelsPlan("agent", "b1", ["--node-taint=x:NoSchedule"], { nodes: nodes(A1) }), []));

  test("a different taint of an agent is refused, with the command for the server", () =>
    assert.throws(
      () => labelsPlan("agent", "b1", ["--node-taint=x=y:NoSchedule"], { nodes: nodes(A1, B1) }),
      /on the server run "kubectl taint --overwrite node b1 x=y:NoSchedule", then the same again/,
    ));
});

const REGISTRIES = `# Written by k3s-across-clouds from REGISTRY_MIRRORS.
mirrors:
  "docker.io":
    endpoint:
      - "https://one.example"
      - "https://two.example:5000/v2"
  "registry.k8s.io":
    endpoint:
      - "https://one.example"
`;

describe("registries.yaml", () => {
  const want = wanted({
    REGISTRY_MIRRORS:
      "docker.io=https://one.example registry.k8s.io=https://one.example docker.io=https://two.example:5000/v2",
  });
  const path = "/etc/rancher/k3s/registries.yaml";
  for (const [name, version] of Object.entries({ old: OLD, modern: MODERN })) {
    const release = { ...want, K3S_VERSION: version };
    const { unit, envfile, registries } = filesAfter(agent, release, agent.plan(release, prepared(version)));
    const well = healthy(version, { unit, envfile, registries } as Facts);
    test(`of ${name} k3s contains each registry's mirrors in their order`, () =>
      assert.equal(`${registries?.trim()}\n`, REGISTRIES));
    test(`of ${name} k3s needs no change once it is written`, () =>
      assert.deepEqual(agent.plan(release, well), []));
    test(`of ${name} k3s is rewritten for another mirror, and k3s is restarted once`, () => {
      const plan = agent.plan(
        { ...release, REGISTRY_MIRRORS: "docker.io=https://two.example:5000/v2" },
        well,
      );
      assert.deepEqual(plan[0]?.detail, [
        '- - "https://one.example"',
        '- "registry.k8s.io":',
        "- endpoint:",
        '- - "https://one.example"',
      ]);
      assert.deepEqual(
        plan.map(({ why }) => why.split(" ")[0]),
        ["write", "restart"],
      );
    });
    test(`of ${name} k3s is removed with the setting`, () =>
      assert.deepEqual(verbs(agent, { ...release, REGISTRY_MIRRORS: "" }, well), [
        `remove ${path}, restart k3s-agent`,
      ]));
    test(`of ${name} k3s leads to a restart if it is newer than the process`, () =>
      assert.deepEqual(verbs(agent, release, { ...well, read: String(NOW - 60) }), ["restart k3s-agent"]));
    test(`of ${name} k3s that this project did not write is refused, or kept if the setting is empty`, () => {
      assert.throws(
        () => agent.plan(release, { ...well, registries: "foreign" }),
        /is somebody else's: move it away/,
      );
      assert.deepEqual(
        agent.plan({ ...release, REGISTRY_MIRRORS: "" }, { ...well, registries: "foreign" }),
        [],
      );
    });
  }
});

describe("a proxy", () => {
  const want = wanted({ HTTPS_PROXY: "http://u:hunter2@proxy.example:3128", NO_PROXY: "mine.example" });
  test("is not used for the cluster's networks and the nodes, each listed once", () => {
    assert.equal(
      noProxy(want, ["198.51.100.11", "198.51.101.11", "198.51.100.11"]),
      "mine.example,localhost,127.0.0.0/8,10.42.0.0/16,10.43.0.0/16,.svc,.cluster.local,198.51.100.11,198.51.101.11",
    );
  });
  test("is not used for home nodes, which are in the pods' network", () =>
    assert.equal(noProxy(want, ["198.51.100.11", "nat"]), noProxy(want, ["198.51.100.11"])));
  test("is not used for other networks if SERVER_ARGS contains them", () =>
    assert.match(
      noProxy(
        {
          ...want,
          SERVER_ARGS: "--cluster-cidr=10.1.0.0/16 --service-cidr 10.2.0.0/16 --cluster-domain=k.local",
        },
        [],
      ),
      /,10\.1\.0\.0\/16,10\.2\.0\.0\/16,\.svc,\.k\.local$/,
    ));
  for (const step of [server, agent])
    test(`of the ${step.name} is written only to its 0600 environment file, and is in no plan`, () => {
      const plan = step.plan(want, prepared(MODERN));
      assert.doesNotMatch(JSON.stringify(plan), /hunter2/);
      const { unit, envfile } = filesAfter(step, want, plan);
      assert.doesNotMatch(unit ?? "", /proxy/i);
      const well = healthy(MODERN, { unit, envfile } as Facts);
      assert.deepEqual(step.plan(want, well), []);
      assert.deepEqual(verbs(step, { ...want, NO_PROXY: "other.example" }, well).length, 2);
      assert.deepEqual(verbs(step, { ...want, HTTPS_PROXY: "" }, well).length, 2);
    });

  const el7 = { os: fixture("os-release/centos-7"), kernel: "3.10.0\n", module: "", room: "500\n" };
  const fetched: [what: string, step: Step, facts: Facts, why: RegExp][] = [
    ["curl itself", downloadK3s, { curl: "" }, /^install curl/],
    ["k3s", downloadK3s, { version: "" }, /^download k3s/],
    ["WireGuard's packages", installWireguard, { tool: "" }, /^install wireguard-tools/],
    ["ELRepo's key", upgradeKernel, el7, /^import ELRepo's key/],
    ["the kernel", upgradeKernel, el7, /^install kernel-ml/],
  ];
  for (const [what, step, facts, why] of fetched)
    test(`is used to download ${what}, and its password is only in the environment`, () => {
      const release = { ...want, K3S_VERSION: MODERN };
      const change = step.plan(release, prepared(MODERN, facts)).find((c) => why.test(c.why));
      assert.ok(change, what);
      assert.ok(change.secrets?.includes("HTTPS_PROXY"));
      assert.doesNotMatch(JSON.stringify(change), /hunter2/);
      // What a program of the change would see.
      const { stdout } = shell(
        `HTTPS_PROXY='${want.HTTPS_PROXY}'\n${change.sh.split("\n").slice(0, 2).join("\n")}\nenv | grep -i proxy=`,
      );
      assert.match(stdout, /^https_proxy=http:\/\/u:hunter2@proxy\.example:3128$/m);
      assert.match(stdout, /^no_proxy=mine\.example$/m);
      assert.ok(step.plan({ ...release, HTTPS_PROXY: "" }, prepared(MODERN, facts)).every((c) => !c.secrets));
    });
});

describe("airgap images", () => {
  const record = (id: string, name: string) => `${id} ${name} 700 1795000000\n${name} 700 1795000000`;
  const whys = (want: Settings, facts: Facts) => downloadK3s.plan(want, facts).map(({ why }) => why);
  const SUM = "c".repeat(64);
  const bin = { K3S_BIN: "/x/k3s", K3S_SHA256: "d".repeat(64) };
  const placed = { sha256: bin.K3S_SHA256 };
  const zst = "k3s-airgap-images-amd64.tar.zst";
  const cases: [name: string, want: Partial<Settings>, facts: Facts, whys: string[] | RegExp][] = [
    ["are not downloaded by default", {}, prepared(MODERN), []],
    ["are downloaded with AIRGAP", { AIRGAP: "yes" }, prepared(MODERN), [`download ${zst} of k3s ${MODERN}`]],
    [
      "are a plain tar for old k3s",
      { AIRGAP: "yes", K3S_VERSION: OLD },
      prepared(OLD),
      [`download k3s-airgap-images-amd64.tar of k3s ${OLD}`],
    ],
    [
      "need no change once they are downloaded",
      { AIRGAP: "yes" },
      prepared(MODERN, { images: record(MODERN, zst) }),
      [],
    ],
    [
      "of another release are replaced",
      { AIRGAP: "yes" },
      prepared(MODERN, { images: record("v1.30.0+k3s1", zst) }),
      [`download ${zst} of k3s ${MODERN}`],
    ],
    [
      "that were modified are replaced",
      { AIRGAP: "yes" },
      prepared(MODERN, { images: `${MODERN} ${zst} 700 1795000000\n${zst} 701 1795000000` }),
      [`download ${zst} of k3s ${MODERN}`],
    ],
    [
      "beside K3S_BIN are pushed after it",
      { ...bin, AIRGAP: `\n${SUM} /x/${zst}` },
      prepared(MODERN),
      [`put /x/k3s in place of ${MODERN}`],
    ],
    [
      "beside K3S_BIN are pushed",
      { ...bin, AIRGAP: `\n${SUM} /x/${zst}` },
      prepared(MODERN, placed),
      [`put ${zst} in place`],
    ],
    [
      "beside K3S_BIN are pushed only once",
      { ...bin, AIRGAP: `\n${SUM} /x/${zst}` },
      prepared(MODERN, { ...placed, images: record(SUM, zst) }),
      [],
    ],
    [
      "of another architecture are ignored",
      { ...bin, AIRGAP: `\n${SUM} /x/${zst}` },
      prepared(MODERN, { ...placed, arch: "aarch64" }),
      [],
    ],
    [
      "that AIRGAP=yes requires must be for the box's architecture",
      { ...bin, AIRGAP: `yes\n${SUM} /x/${zst}` },
      prepared(MODERN, { ...placed, arch: "aarch64" }),
      /no airgap images for arm64/,
    ],
    [
      "that old k3s cannot import are refused",
      { ...bin, AIRGAP: `\n${SUM} /x/${zst}` },
      prepared(OLD, placed),
      /imports no .*zst: unpack it/,
    ],
  ];
  for (const [name, over, facts, expected] of cases)
    test(name, () => {
      if (expected instanceof RegExp) assert.throws(() => whys(wanted(over), facts), expected);
      else assert.deepEqual(whys(wanted(over), facts), expected);
    });
});

for (const step of [server, agent])
  describe(`K3S_CONFIG of the ${step.name}`, () => {
    const want = wanted({ K3S_CONFIG: "# mine\nkubelet-arg:\n  - max-pods=50" });
    const written = filesAfter(step, want, step.plan(want, prepared(MODERN)));
    const { unit, envfile, config } = written;
    const well = healthy(MODERN, { unit, envfile, config } as Facts);

    test("is written with mode 0600 before k3s is started", () => {
      assert.match(written.config ?? "", /^600\n[0-9a-f]{64}\n?$/);
      const plan = verbs(step, want, prepared(MODERN));
      assert.equal(plan[0], "write /etc/rancher/k3s/config.yaml.d/across-clouds.yaml (0600)");
      assert.match(plan.at(-1) ?? "", /^start /);
    });
    test("needs no change once it is written", () => assert.deepEqual(step.plan(want, well), []));
    test("is rewritten if it changes, and k3s is restarted once", () =>
      assert.deepEqual(verbs(step, { ...want, K3S_CONFIG: "debug: true" }, well), [
        "write /etc/rancher/k3s/config.yaml.d/across-clouds.yaml (0600)",
        `restart ${step.name === "server" ? "k3s" : "k3s-agent"}`,
      ]));
    test("is removed with the setting, in one change with the restart", () =>
      assert.deepEqual(verbs(step, { ...want, K3S_CONFIG: "" }, well), [
        `remove /etc/rancher/k3s/config.yaml.d/across-clouds.yaml, restart ${step.name === "server" ? "k3s" : "k3s-agent"}`,
      ]));
    test("is in no plan", () => {
      const secret = { ...want, K3S_CONFIG: "etcd-s3-secret-key: hunter2" };
      assert.doesNotMatch(JSON.stringify(step.plan(secret, prepared(MODERN))), /hunter2/);
    });
    test("is refused for a release that does not read it", () =>
      assert.throws(
        () => step.plan({ ...want, K3S_VERSION: OLD }, prepared(OLD)),
        /K3S_CONFIG needs k3s v1\.26/,
      ));
  });

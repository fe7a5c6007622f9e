import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { SettingError } from "../lib/settings.ts";
import { applyScript, type Facts, lookScript, printed, Refusal, type Step, whole } from "../lib/step.ts";
import { agentSteps } from "../scripts/agent.ts";
import { cleared, copied } from "../scripts/backup.ts";
import { downloadAhead } from "../scripts/download-k3s.ts";
import { fixMetrics } from "../scripts/fix-metrics.ts";
import { atServer, uninstall } from "../scripts/remove.ts";
import { forgotten as forgottenServer, put } from "../scripts/restore.ts";
import { serverSteps } from "../scripts/server.ts";
import { token } from "../scripts/token.ts";
import { stepsFor } from "../scripts/upgrade.ts";
import {
  A1,
  B1,
  fixture,
  healthy,
  IP,
  lacks,
  MODERN,
  nodes,
  OLD,
  prepared,
  shell,
  TOKEN,
  wanted,
} from "./helpers.ts";

const skip = lacks("shellcheck");

/** shellcheck's word on a script as a box gets it. */
function check(script: string) {
  const { status, stdout, stderr } = shell(script, ["shellcheck", "-s", "sh", "-"]);
  assert.equal(status, 0, stdout + stderr);
}

/** Every change that these steps can want of a box, over several states of it. */
function changesOf(steps: readonly Step[], version: string) {
  const want = wanted({
    K3S_VERSION: version,
    PROXY_MODE: "ipvs",
    ELREPO_KERNEL_URL: "https://m.example/kernel",
  });
  const el7 = { os: fixture("os-release/centos-7"), kernel: "3.10.0\n", module: "" };
  const states = [
    prepared(version, { curl: "", version: "", kubectl: "", tool: "", loaded: "" }),
    prepared(version, { ...el7, tool: "", loaded: "" }),
    prepared(version, { ...el7, "kernel-ml": "5.7.7\n", tools: "yes\n", saved: "", entries: "(5.7.7)\n" }),
    healthy(
      version,
      {},
      { service: "", nodes: nodes({ ...A1, public: "192.168.0.11", overwrite: "" }, B1), peers: "" },
    ),
    healthy(
      version,
      {},
      { peers: "", packaged: fixture("metrics-server-v1.17.6.yaml"), age: "9999\n", top: "" },
    ),
  ];
  const changes = states.flatMap((facts) =>
    steps.flatMap((step) => {
      try {
        return step.plan(want, facts);
      } catch (error) {
        if (error instanceof Refusal || error instanceof SettingError) return [];
        throw error;
      }
    }),
  );
  return [...new Map(changes.map((change) => [change.sh, change])).values()];
}

describe("shellcheck finds nothing to say", { skip }, () => {
  for (const version of [OLD, MODERN])
    for (const [name, steps] of Object.entries({ server: [...serverSteps, fixMetrics], agent: agentSteps })) {
      const want = wanted({ K3S_VERSION: version });
      const changes = changesOf(steps, version);

      test(`about the look of ${name}, ${version}`, () =>
        check(`#!/bin/sh\n${whole(lookScript(steps, want, "mark"))}`));

      test(`about each change of ${name}, ${version}`, () => {
        assert.ok(changes.length >= 12, changes.map(({ why }) => why).join());
        // As apply() sends it: each change is a script of its own, which its here-document hides from shellcheck.
        for (const { sh, secrets = [] } of changes)
          check(
            `#!/bin/sh\nmain() {\nset -eu\nsay() { printf 'say %s\\n' "$*"; }\n${secrets.map((s) => `${s}=x\n`).join("")}${sh}\n}\nmain </dev/null\n`,
          );
      });

      test(`about what applies and prints them for ${name}, ${version}`, () => {
        check(`#!/bin/sh\n${whole(applyScript(changes, "mark", () => "'x'"))}`);
        check(printed(changes));
      });
    }
});

describe("shellcheck finds nothing to say of living with a cluster", { skip }, () => {
  const want = wanted({ HOST: "b1", K3S_VERSION: "v1.36.3+k3s1" });
  const { drained, forgotten } = atServer(B1.ip, "b1", true);
  const facts = {
    ...healthy(MODERN, {}),
    left: "/usr/local/bin/k3s\n",
    secrets: "b1\n",
    passwords: "b1\n",
    token: `${TOKEN}\n`,
    rotates: "rotate\n",
    running: "active\n",
    database: "yes\n",
    ahead: "",
    folder: "yes\n",
  };
  const upgrade = stepsFor("agent", MODERN, IP, false);
  const kept = { ...facts, kept: `${MODERN}\n`, generation: "modern\n", version: "v1.36.3+k3s1" };
  const cases: [Step, Facts][] = [
    ...[uninstall, drained, forgotten, token, copied("x"), cleared, put("./x.tar.gz", "abc")].map(
      (step): [Step, Facts] => [step, facts],
    ),
    [forgottenServer("b1", B1.ip), facts],
    [downloadAhead, facts],
    [upgrade.keep, facts],
    [upgrade.runs, facts],
    [upgrade.forget, kept],
    [upgrade.putBack, kept],
  ];
  for (const [step, facts] of cases)
    test(`about ${step.name}`, () => {
      check(`#!/bin/sh\n${whole(lookScript([step], want, "mark"))}`);
      const changes = step.plan(want, facts);
      assert.ok(changes.length > 0);
      for (const change of changes)
        check(
          `#!/bin/sh\nmain() {\nset -eu\nsay() { printf 'say %s\\n' "$*"; }\n${change.sh}\n}\nmain </dev/null\n`,
        );
    });
});

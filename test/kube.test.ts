import assert from "node:assert/strict";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { startedLook } from "../lib/k3s/drain.ts";
import { API, KUBECTL, WATCH } from "../lib/k3s/nodes.ts";
import { K3S } from "../lib/k3s/unit.ts";
import type { Step } from "../lib/step.ts";
import { agentSteps } from "../scripts/agent.ts";
import { annotate } from "../scripts/annotate.ts";
import { forgotten, uninstall } from "../scripts/cluster/remove.ts";
import { forgetPasswords } from "../scripts/cluster/restore.ts";
import { stepsFor } from "../scripts/cluster/upgrade.ts";
import { fixMetrics } from "../scripts/fix-metrics.ts";
import { serverSteps } from "../scripts/server.ts";
import { upgradeKernel } from "../scripts/upgrade-kernel.ts";
import { B1, lacks, MODERN, node, programs, shell, temporary, wanted } from "./helpers.ts";

test("a look starts kubectl only if curl cannot query the API, because kubectl takes 0.2 s of CPU and 139 MB", () => {
  const steps = [fixMetrics, forgotten({ ip: B1.ip }, "b1"), forgetPasswords, ...serverSteps, ...agentSteps];
  for (const { name, look } of [...steps, ...Object.values(stepsFor("agent", MODERN, B1.ip))])
    for (const text of look(wanted())) assert.doesNotMatch(text.replaceAll(API, ""), /\bkc |kubectl /, name);
});

test("a look queries systemd once for each unit, before any part of it reads the result", () => {
  const scripts = {
    ...stepsFor("agent", MODERN, B1.ip),
    fixMetrics,
    forgotten: forgotten({ ip: B1.ip }, "b1"),
  };
  const all: Step[][] = [
    serverSteps,
    agentSteps,
    [annotate],
    [uninstall],
    [upgradeKernel],
    ...Object.values(scripts).map((step) => [step]),
  ];
  for (const steps of all) {
    const looks = new Set(steps.flatMap(({ look }: Step) => look(wanted())));
    const text = [...looks].join("\n").replaceAll(API, "").replace(startedLook, "");
    const [defined, used] = [text.indexOf("property() {"), text.search(/\bproperty "/)];
    assert.ok(used > defined && defined >= 0, steps.map(({ name }) => name).join());
    assert.deepEqual(text.match(/systemctl [^"]*/g), ["systemctl show "]);
  }
});

describe("a box queries the cluster", () => {
  /** Which kubeconfigs it uses if these exist, systemd prints this state of k3s, and these work. */
  function asked(have: string[], state: string, answers: string[]) {
    const dir = temporary();
    const PATH = programs(join(dir, "bin"), {
      systemctl: `[ "$*" = "is-active k3s" ] && echo ${state}; [ ${state} = active ]`,
      k3s: `config=\${3##*/}; echo "$config" >>${dir}/asked; case " ${answers.join(" ")} " in *" $config "*) echo "$config answers" ;; *) exit 1 ;; esac`,
    });
    for (const name of have) {
      mkdirSync(join(dir, name === "k3s.yaml" ? "etc/rancher/k3s" : "var/lib/rancher/k3s/agent"), {
        recursive: true,
      });
      writeFileSync(
        join(dir, name === "k3s.yaml" ? "etc/rancher/k3s" : "var/lib/rancher/k3s/agent", name),
        "x",
      );
    }
    const kc = KUBECTL.replaceAll(K3S, "k3s").replaceAll(/\/(etc|var)\//g, `${dir}/$1/`);
    const { stdout } = shell(
      `PATH=${PATH}\n${kc}\nkc get nodes || echo failed; cat ${dir}/asked 2>/dev/null || :`,
    );
    return stdout.trim().split("\n").join(", ");
  }
  const AGENT = ["k3scontroller.kubeconfig", "kubelet.kubeconfig"];
  const ALL = ["k3s.yaml", ...AGENT];
  const cases: [name: string, have: string[], state: string, answers: string[], said: string][] = [
    ["on a server as the admin", ALL, "active", ALL, "k3s.yaml answers, k3s.yaml"],
    ["on a server that is starting as the admin", ALL, "activating", ALL, "k3s.yaml answers, k3s.yaml"],
    ["on a server that does not answer with no other kubeconfig", ALL, "active", AGENT, "failed, k3s.yaml"],
    ["on an agent as k3s-controller", AGENT, "inactive", AGENT, "k3scontroller.kubeconfig answers, k3scontroller.kubeconfig"],
    ["on an agent as the kubelet if k3s-controller fails", AGENT, "unknown", ["kubelet.kubeconfig"], "kubelet.kubeconfig answers, k3scontroller.kubeconfig, kubelet.kubeconfig"],
    ["on an agent never with a leftover k3s.yaml, if that fails", ALL, "inactive", AGENT, "k3scontroller.kubeconfig answers, k3scontroller.kubeconfig"],
    ["on an agent never with a k3s.yaml of another cluster, even if that works", ALL, "failed", ALL, "k3scontroller.kubeconfig answers, k3scontroller.kubeconfig"],
    ["on a box without k3s with no kubeconfig", ["k3s.yaml"], "inactive", ALL, "failed"],
  ]; // biome-ignore format: a table
  for (const [name, have, state, answers, said] of cases)
    test(name, () => assert.equal(asked(have, state, answers), said));
});

describe("a wait for a node", () => {
  const line = (type: string, version: string, ready = true) => {
    const of = node({ ...B1, ready });
    return JSON.stringify({
      type,
      object: { ...of, metadata: { ...of.metadata, resourceVersion: version } },
    });
  };
  const EXPIRED = `{"type":"ERROR","object":{"kind":"Status","metadata":{},"code":410}}`;
  /** What the wait prints after these answers of curl, one per turn. curl runs for 9 s unless it is stopped. */
  function waited(answers: string[], argv: string[]) {
    const dir = temporary();
    const PATH = programs(dir, {
      curl: `echo "$*" >>${dir}/asked; n=$(wc -l <${dir}/asked); cat ${dir}/$n; [ -e ${dir}/$n.ends ] || exec sleep 9`,
    });
    answers.forEach((answer, i) => {
      writeFileSync(join(dir, String(i + 1)), answer);
      if (/\d$/.test(answer)) writeFileSync(join(dir, `${i + 1}.ends`), "");
    });
    const began = Date.now();
    const turn = `changed b1 5; node=\${node%% boot*}; echo "\${node:-(none)}"`;
    const { status, stdout, stderr } = shell(
      `set -eu; PATH=${PATH}; ${WATCH}
apiuser() { echo user; tls=t; users='client-k3s-controller client-kubelet'; apiurl=https://127.0.0.1:6444; }
nodes() { echo 'b1 asked boot'; }
sleep() { echo "slept $1"; }
${answers.map(() => turn).join("\n")}`,
      argv,
    );
    assert.deepEqual([status, stderr], [0, ""]);
    assert.ok(Date.now() - began < 9000, "curl was not ended");
    const asked = readFileSync(join(dir, "asked"), "utf8").trim().split("\n");
    for (const each of asked)
      assert.match(
        each,
        /--key t\/client-kubelet\.key -f -N -m 5 .*&watch=1&fieldSelector=metadata\.name%3Db1$/,
      );
    return stdout.trim().split("\n").join(", ");
  }
  const [ADDED, SAME] = [`${line("ADDED", "7", false)}\n`, "900 200 5.002"];
  const NEXT = `${ADDED}${line("MODIFIED", "8")}\n`;
  const cases: [name: string, answers: string[], said: string][] = [
    ["ends immediately with the current state of the node", [ADDED], "user, b1 NotReady"],
    ["ignores the state that it knows, and ends with a new one", [ADDED, NEXT], "user, b1 NotReady, b1 Ready"],
    ["keeps the state that it knows when the time limit is reached", [ADDED, `${ADDED}${SAME}`, NEXT], "user, b1 NotReady, b1 NotReady, b1 Ready"],
    ["queries the node if a watch returns nothing, because there is no such node or the API is slow", ["0 200 5.001", ADDED], "user, slept 1, b1 asked, user, b1 NotReady"],
    ["queries the node if the server has ended the watch early", [ADDED, `${ADDED}900 200 1.207`], "user, b1 NotReady, slept 1, b1 asked"],
    ["does not loop quickly if the API ends a watch immediately", [`${ADDED}900 200 0.021`, "0 200 0.020"], "user, b1 NotReady, slept 1, b1 asked"],
    ["detects that the node was deleted", [ADDED, `${ADDED}${line("DELETED", "9")}\n`], "user, b1 NotReady, (none)"],
    ["queries the node if it was deleted between two watches", [ADDED, "0 200 5.000"], "user, b1 NotReady, slept 1, b1 asked"],
    ["queries the node once per second while the API refuses connections, and then watches again", ["0 000 0.001", NEXT], "user, slept 1, b1 asked, user, b1 NotReady"],
    ["queries the node if the user is not allowed to watch", ["0 403 0.012"], "user, slept 1, b1 asked"],
    ["queries the node if curl does not work", ["\n127"], "user, slept 1, b1 asked"],
    ["does not loop quickly if the resource version has expired", [`${EXPIRED}\n160 200 0.020`, `${EXPIRED}\n160 200 0.020`], "user, slept 1, b1 asked, user, slept 1, b1 asked"],
    ["ignores an incomplete line", [`${line("ADDED", "7").slice(0, 400)}400 200 0.050`], "user, slept 1, b1 asked"],
  ]; // biome-ignore format: a table
  for (const argv of [["dash"], ["bash", "--posix"], ["busybox", "sh"]])
    describe(argv.join(" "), { skip: lacks(argv[0] as string) }, () => {
      for (const [name, answers, said] of cases)
        test(name, () => assert.equal(waited(answers, [...argv, "-s"]), said));
    });
});

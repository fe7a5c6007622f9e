import assert from "node:assert/strict";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
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

test("no look starts kubectl but where curl cannot ask: it takes 0.2 s of CPU and 139 MB", () => {
  const steps = [fixMetrics, forgotten({ ip: B1.ip }, "b1"), forgetPasswords, ...serverSteps, ...agentSteps];
  for (const { name, look } of [...steps, ...Object.values(stepsFor("agent", MODERN, B1.ip))])
    for (const text of look(wanted())) assert.doesNotMatch(text.replaceAll(API, ""), /\bkc |kubectl /, name);
});

test("a look asks systemd once about each unit, before anything reads the answer", () => {
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
    const text = [...looks].join("\n").replaceAll(API, "");
    const [defined, used] = [text.indexOf("shown() {"), text.search(/\bshown "/)];
    assert.ok(used > defined && defined >= 0, steps.map(({ name }) => name).join());
    assert.deepEqual(text.match(/systemctl [^"]*/g), ["systemctl show "]);
  }
});

describe("a box asks the cluster", () => {
  /** Which kubeconfigs it asks by, where these are there, systemd says this of k3s, and these answer. */
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
    ["on a server that starts as the admin", ALL, "activating", ALL, "k3s.yaml answers, k3s.yaml"],
    ["on a server that does not answer by no other", ALL, "active", AGENT, "failed, k3s.yaml"],
    ["on an agent by what an agent may", AGENT, "inactive", AGENT, "k3scontroller.kubeconfig answers, k3scontroller.kubeconfig"],
    ["on an agent by the next where one does not answer", AGENT, "unknown", ["kubelet.kubeconfig"], "kubelet.kubeconfig answers, k3scontroller.kubeconfig, kubelet.kubeconfig"],
    ["on an agent never by a k3s.yaml of another life, dead", ALL, "inactive", AGENT, "k3scontroller.kubeconfig answers, k3scontroller.kubeconfig"],
    ["on an agent never by a k3s.yaml of another cluster, which answers", ALL, "failed", ALL, "k3scontroller.kubeconfig answers, k3scontroller.kubeconfig"],
    ["on a box without k3s by none", ["k3s.yaml"], "inactive", ALL, "failed"],
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
  /** What the wait knows after these answers of curl, one a turn. It goes on for 9 s where it is not ended. */
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
    ["ends at once with the node as it is", [ADDED], "user, b1 NotReady"],
    ["passes over what it knows, and ends with what is new", [ADDED, NEXT], "user, b1 NotReady, b1 Ready"],
    ["keeps what it knows when the time is over", [ADDED, `${ADDED}${SAME}`, NEXT], "user, b1 NotReady, b1 NotReady, b1 Ready"],
    ["asks where a watch said nothing: there is no such node, or the API is slow", ["0 200 5.001", ADDED], "user, slept 1, b1 asked, user, b1 NotReady"],
    ["does not believe that nothing changed where the server has ended the watch", [ADDED, `${ADDED}900 200 1.207`], "user, b1 NotReady, slept 1, b1 asked"],
    ["does not spin where the API ends a watch at once", [`${ADDED}900 200 0.021`, "0 200 0.020"], "user, b1 NotReady, slept 1, b1 asked"],
    ["hears that the node has gone", [ADDED, `${ADDED}${line("DELETED", "9")}\n`], "user, b1 NotReady, (none)"],
    ["asks anew where the node went while it did not watch", [ADDED, "0 200 5.000"], "user, b1 NotReady, slept 1, b1 asked"],
    ["asks once a second where the API refuses connections, and watches again", ["0 000 0.001", NEXT], "user, slept 1, b1 asked, user, b1 NotReady"],
    ["asks where the user may not watch", ["0 403 0.012"], "user, slept 1, b1 asked"],
    ["asks where curl cannot do anything", ["\n127"], "user, slept 1, b1 asked"],
    ["does not spin where the API is out of step", [`${EXPIRED}\n160 200 0.020`, `${EXPIRED}\n160 200 0.020`], "user, slept 1, b1 asked, user, slept 1, b1 asked"],
    ["does not believe half a line", [`${line("ADDED", "7").slice(0, 400)}400 200 0.050`], "user, slept 1, b1 asked"],
  ]; // biome-ignore format: a table
  for (const argv of [["dash"], ["bash", "--posix"], ["busybox", "sh"]])
    describe(argv.join(" "), { skip: lacks(argv[0] as string) }, () => {
      for (const [name, answers, said] of cases)
        test(name, () => assert.equal(waited(answers, [...argv, "-s"]), said));
    });
});

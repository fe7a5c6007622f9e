import assert from "node:assert/strict";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { KUBECTL } from "../lib/k3s/nodes.ts";
import { K3S } from "../lib/k3s/unit.ts";
import { programs, shell, temporary } from "./helpers.ts";

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

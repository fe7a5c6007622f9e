#!/usr/bin/env -S node --import tsx
/** Step 7 of 7: metrics-server reaches every kubelet at its public address. Runs on the server. */
import { run } from "../lib/cli.ts";
import { binaryLook, generationOf } from "../lib/k3s.ts";
import { clusterLook, KUBECTL, nodesOf } from "../lib/kube.ts";
import { sh, writeFile } from "../lib/sh.ts";
import { type Change, type Facts, Refusal, type Step } from "../lib/step.ts";

const FOLDER = "/var/lib/rancher/k3s/server/manifests";
const PACKAGED = `${FOLDER}/metrics-server/metrics-server-deployment.yaml`;
const OWN = `${FOLDER}/metrics-server-across-clouds.yaml`;
/** How long metrics-server may take from its start to its first answer, in seconds. */
const PATIENCE = 180;

export const fixMetrics: Step = {
  name: "fix-metrics",
  options: ["SERVER"],

  look: () => [
    binaryLook,
    clusterLook,
    `fact packaged; cat ${PACKAGED} 2>/dev/null
fact own; sed '/^# written /d' ${OWN} 2>/dev/null
fact skipped; test -e ${PACKAGED}.skip && echo yes
fact age; test -e ${PACKAGED} && echo $(($(date +%s) - $(stat -c %Y ${PACKAGED})))
${OURS}
fact ours; ours && echo yes
fact top; kc top nodes --no-headers 2>/dev/null`,
  ],

  plan(_want, facts): Change[] {
    const nodes = nodesOf(facts.nodes).filter((node) => node.ready);
    if (nodes.length === 0)
      throw new Refusal("The API does not answer here: fix-metrics runs on a healthy server");
    if (!facts.packaged && !facts.own) return []; // --disable=metrics-server
    const lines = (facts.top ?? "").split("\n");
    const answers = (name: string) =>
      lines.some((line) => line.split(/\s+/)[0] === name && !line.includes("<unknown>"));
    const names = nodes.map((node) => node.name);
    const silent = names.filter((name) => !answers(name));
    const old = generationOf(facts.version?.trim() ?? "", "") === "old";
    const young = Number(facts.age) < PATIENCE;
    if (!old && silent.length && !facts.own && young)
      return [{ ...wait(silent), sh: `${ANSWERED} || true`, lookAgain: true }];
    const changes = old || silent.length || facts.own ? manifest(facts) : [];
    // Until k3s sees a manifest (every 15 s) the pod that it replaces answers; then none does for a minute.
    const late = changes.length ? names : silent;
    return [...changes, ...(late.length ? [wait(late)] : [])];
  },
};

/**
 * A manifest of our own beside the packaged one, which is left out by a \`.skip\`: edits of the packaged file
 * or of the deployment are undone when k3s starts (pkg/deploy, both generations; k3s #8052).
 */
function manifest(facts: Facts): Change[] {
  const text = facts.packaged ? withArguments(facts.packaged) : facts.own;
  if (text === facts.own && facts.skipped?.trim() && facts.ours?.trim()) return [];
  return [
    {
      why: "deploy metrics-server with ExternalIP and --kubelet-insecure-tls, in place of the packaged one",
      // A file that is as it was would not be deployed again before the next start (v1.17.6: by its checksum).
      sh: `: >${sh(`${PACKAGED}.skip`)}\n${writeFile(OWN, text ?? "", "600")}\necho "# written $(date +%s)" >>${OWN}`,
    },
  ];
}

/**
 * metrics-server's manifest with the arguments of the article's step 7, as `args`, in whatever release of it.
 * v1.17.6's kubelet certificate names no address, hence --kubelet-insecure-tls.
 */
export function withArguments(packaged: string): string {
  const ours = ["--kubelet-preferred-address-types=ExternalIP,InternalIP,Hostname", "--kubelet-insecure-tls"];
  const lines = packaged
    .split("\n")
    .filter((line) => !/^\s*- --kubelet-(preferred-address-types|insecure-tls)/.test(line));
  const image = lines.findIndex((line) => /^\s*image:/.test(line));
  const indent = /^\s*/.exec(lines[image] ?? "")?.[0] ?? "";
  const args = lines.indexOf(`${indent}args:`);
  if (args < 0) lines.splice(image + 1, 0, `${indent}args:`);
  lines.splice((args < 0 ? image + 1 : args) + 1, 0, ...ours.map((argument) => `${indent}- ${argument}`));
  return lines.join("\n");
}

function wait(silent: string[]): Change {
  return {
    why: `wait until \`kubectl top nodes\` answers for ${silent.join(", ")}`,
    sh: `${ANSWERED} || {
  echo "No metrics after ${PATIENCE} s. metrics-server's pods:"
  kc -n kube-system get pods -l k8s-app=metrics-server || true
  kc top nodes || true
  echo 'An image that cannot be pulled from here: see REGISTRY_MIRRORS and AIRGAP in env.example'
  exit 1
}`,
    seconds: PATIENCE + 30,
  };
}

/** Is each running pod of metrics-server one of our manifest, where there is one? */
const OURS = `ours() {
  [ ! -e ${OWN} ] || kc -n kube-system get pods -o json 2>/dev/null | awk '
    /"k8s-app": "metrics-server"/ { it = 1; new = 0 }
    /^ *"--kubelet-preferred-address-types=ExternalIP/ { new = 1 }
    /"phase":/ { if (it && /Running/) { pods++; news += new } it = 0 }
    END { exit !pods || news < pods }'
}`;

/** Every node that is Ready has its line in \`top nodes\`, from a pod with our arguments where we gave some. */
const ANSWERED = `${KUBECTL}
${OURS}
answered() {
  ours || return 1
  ready=$(kc get nodes --no-headers 2>/dev/null | awk '$2 ~ /^Ready/ { n++ } END { print n + 0 }')
  [ "$(kc top nodes --no-headers 2>/dev/null | grep -cv unknown)" -ge "$ready" ] && [ "$ready" -gt 0 ]
}
try() {
  end=$(($(date +%s) + ${PATIENCE}))
  until answered; do
    [ "$(date +%s)" -lt "$end" ] || return 1
    sleep 1
  done
}
try`;

await run(import.meta, {
  about: "Has metrics-server reach every kubelet at its public address, in a way that survives restarts.",
  steps: [fixMetrics],
  host: "SERVER",
  nothing: (_want, facts) =>
    facts.packaged || facts.own ? "`kubectl top nodes` answers for every node" : "metrics-server is disabled",
});

#!/usr/bin/env -S node --import tsx
/** Step 7 of 7: `kubectl top` answers for every node. Runs on the server. */
import { causes } from "../lib/check/causes.ts";
import { FIGURES, figuresOf, TOP_LOOK } from "../lib/check/survey.ts";
import { clusterLook, NODES, nodesOf } from "../lib/k3s/nodes.ts";
import { main } from "../lib/k3s/script.ts";
import { binaryLook, generationOf } from "../lib/k3s/unit.ts";
import { raw, sh, UPTIME, waitUntil, writeFile } from "../lib/sh.ts";
import { type Change, type Facts, prints, Refusal, step } from "../lib/step.ts";

const FOLDER = "/var/lib/rancher/k3s/server/manifests";
const PACKAGED = `${FOLDER}/metrics-server/metrics-server-deployment.yaml`;
const OWN = `${FOLDER}/metrics-server-across-clouds.yaml`;
/** Time limits for metrics-server's first answer, without and with the pull of its image, in seconds. */
const PATIENCE = 180;
const PULL = 600;
/** How long the API may be silent, or no node Ready, after a start on a slow box, in seconds. */
const API = 120;
const INSECURE = "--kubelet-insecure-tls";
const TYPES = "--kubelet-preferred-address-types";
const ARTICLE = [`${TYPES}=ExternalIP,InternalIP,Hostname`, INSECURE];
const INSIDE = [`${TYPES}=InternalIP,ExternalIP,Hostname`];

export const fixMetrics = step({
  name: "fix-metrics",
  options: ["SERVER", "TUNNEL_KUBELETS"],

  look: () => [
    binaryLook,
    ...clusterLook,
    prints(
      "packaged own skipped foreign runs ours",
    )(`fact packaged; sed '/^# written /d' ${PACKAGED} 2>/dev/null
fact own; sed '/^# written /d' ${OWN} 2>/dev/null
fact skipped; test -e ${PACKAGED}.skip && echo yes
fact foreign; grep -lsE '^ *"?name"?: *"?metrics-server"?,? *$' ${FOLDER}/*.yaml ${FOLDER}/*.yml ${FOLDER}/*.json | grep -vxF ${OWN}
fact runs; property "$server_unit" ActiveState; echo "$value"
${OURS}
fact ours; [ ! -e ${OWN} ] || { ours && echo yes; }`),
    TOP_LOOK,
  ],

  plan(want, facts): Change[] {
    const nodes = nodesOf(facts.nodes).filter((node) => node.ready);
    if (nodes.length === 0) {
      if (/^activ/.test(facts.runs ?? "")) return [API_FIRST];
      throw new Refusal("k3s does not run here: fix-metrics runs on a healthy server (make server)");
    }
    if (absent(facts)) return [];
    const told = figuresOf(facts.top);
    const names = nodes.map((node) => node.name);
    const generation = generationOf(facts.version?.trim() ?? "", facts.flags ?? "");
    const modern = want.TUNNEL_KUBELETS ? tunnelled : packaged;
    const changes = generation === "old" ? articles(facts) : generation === "modern" ? modern(facts) : [];
    // k3s checks manifests every 15 s: until then the old pod answers, afterwards none for about a minute.
    const late = changes.length ? names : names.filter((name) => !told.includes(name));
    return [...changes, ...(late.length ? [wait(late)] : [])];
  },
});

type MetricsFact = "packaged" | "own" | "skipped" | "foreign" | "ours";

/** Why metrics-server is left alone: disabled, or the user's own. */
function absent({ packaged, own, skipped, foreign }: Facts<MetricsFact>): string | undefined {
  if (foreign?.trim()) return `metrics-server is your own: ${foreign.trim()}`;
  if (own) return undefined;
  if (!packaged) return "metrics-server is disabled";
  return skipped?.trim() ? `metrics-server is yours to deploy: ${PACKAGED}.skip` : undefined;
}

/**
 * Old k3s: our own manifest replaces the packaged one, which a `.skip` file disables: k3s reverts edits of the packaged
 * file or the deployment at its start (pkg/deploy, both generations; k3s #8052).
 */
const articles = (facts: Facts<MetricsFact>): Change[] =>
  replaced(
    facts.packaged ? withArguments(facts.packaged) : (facts.own ?? ""),
    `ExternalIP and ${INSECURE}`,
    facts,
  );

/** With TUNNEL_KUBELETS a modern k3s's own manifest would ask at the ExternalIP first. The certificates have both. */
const tunnelled = (facts: Facts<MetricsFact>): Change[] =>
  replaced(withArguments(facts.packaged || facts.own || "", INSIDE), "InternalIP first", facts);

function replaced(text: string, what: string, facts: Facts<MetricsFact>): Change[] {
  if (text === facts.own && facts.skipped?.trim() && facts.ours?.trim()) return [];
  return [deploy(text, `deploy metrics-server with ${what}, in place of the packaged one`)];
}

const deploy = (text: string, why: string): Change => ({
  why,
  // k3s does not deploy an unchanged file again before its next start (v1.17.6: by checksum). A .skip without our
  // manifest is the user's.
  sh: sh`${raw(writeFile(OWN, text, "600"))}
echo "# written $(date +%s)" >>${OWN}
: >${PACKAGED}.skip`,
});

/**
 * Modern k3s gets its packaged manifest back if ours replaced it: with --flannel-external-ip metrics-server uses the
 * ExternalIP (k3s #6386), which the kubelets' certificates contain.
 */
function packaged(facts: Facts<MetricsFact>): Change[] {
  if (!facts.own) return [];
  if (facts.packaged)
    return [
      {
        why: `give k3s's own metrics-server back: this k3s needs no other${facts.own.includes(INSECURE) ? `, and no ${INSECURE}` : ""}`,
        // It was deployed before: only a changed checksum makes k3s deploy it again before the next start.
        sh: sh`rm -f ${PACKAGED}.skip
echo "# written $(date +%s)" >>${PACKAGED}
rm -f ${OWN}`,
      },
    ];
  const strict = facts.own.replace(new RegExp(`^.*${INSECURE}.*\n`, "gm"), "");
  return strict === facts.own ? [] : [deploy(strict, `deploy metrics-server without ${INSECURE}`)];
}

/**
 * metrics-server's manifest with the arguments of the article's step 7, or others, as `args`, in whatever release of it.
 * v1.17.6's kubelet certificate names no address, hence --kubelet-insecure-tls.
 */
export function withArguments(packaged: string, ours: readonly string[] = ARTICLE): string {
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

/** TLS is not weakened because of a timeout: metrics-server's own error is reported. */
function wait(silent: string[]): Change {
  return {
    why: `wait until \`kubectl top nodes\` answers for ${silent.join(", ")}`,
    sh: sh`${raw(ANSWERED)} || {
  echo "No metrics of every node after $((up - began)) s. metrics-server's pods:"
  kc -n kube-system get pods -l k8s-app=metrics-server -o wide || :
  kc -n kube-system describe pods -l k8s-app=metrics-server 2>/dev/null | sed -n '/^Events:/,$p' | tail -n 6
  echo "Its log:"
  kc -n kube-system logs -l k8s-app=metrics-server --tail=50 2>&1 | grep -v '^I[0-9]' | tail -n 8
  kc top nodes || :
  exit 1
}`,
    seconds: PULL + 120,
  };
}

const API_FIRST: Change = {
  why: "wait until the API answers and a node is Ready",
  sh: `${NODES}\n${waitUntil(
    API,
    "nodes '' | grep -qF ' Ready'",
    sh`echo ${`Not after ${API} s:`}; kc get nodes`,
    "beat",
  )}`,
  seconds: API + 60,
  lookAgain: true,
};

/**
 * Do all running metrics-server pods verify TLS, or not, as our manifest has it (without one: they do), and ask kubelets
 * at the InternalIP first, or not, as the deployed one has it?
 */
const OURS = sh`pods() {
  api GET '/api/v1/namespaces/kube-system/pods?pretty=true&labelSelector=k8s-app%3Dmetrics-server' 10 2>/dev/null
}
ours() {
  deployed=${OWN}; [ -e ${OWN} ] || deployed=${PACKAGED}
  pods | awk -v lax="$(grep -cse ${INSECURE} ${OWN})" -v near="$(grep -cse ${`${TYPES}=InternalIP`} $deployed)" '
    /^ *"${INSECURE}/ { is = 1 }
    /^ *"${TYPES}=InternalIP/ { inside = 1 }
    /^ *"phase":/ { if (/Running/) { pods++; wrong += is != (lax > 0) || inside != (near > 0) } is = inside = 0 }
    END { exit !pods || wrong }'
}`;

/** Every Ready node has a line in `top nodes`, from a pod of the current manifest. */
const ANSWERED = sh`${raw(UPTIME)}
${raw(NODES)}
${raw(OURS)}
answered() {
  told=$(api GET ${FIGURES} 10 2>/dev/null | grep -o '"metadata":{"name":"[^"]*' | sed 's/.*"//')
  [ -n "$told" ] || return 1
  ready=$(nodes '' | awk '$2 ~ /^Ready/ { print $1 }')
  [ -n "$ready" ] && ! printf '%s\n' "$ready" | grep -qvxF -e "$told" && ours
}
try() {
  clock; began=$up; end=$((began + ${PATIENCE}))
  until answered; do
    beat
    clock
    if [ "$up" -ge "$end" ]; then
      [ "$up" -lt $((began + ${PULL})) ] || return 1
      # Its image is still on its way.
      pods | grep -q '"reason": "ContainerCreating"' || return 1
      end=$((up + 60))
    fi
    sleep 1
  done
}
try`;

await main(import.meta, {
  about:
    "Makes `kubectl top` list every node: on old k3s, or with TUNNEL_KUBELETS, by a manifest that survives restarts; else only verifies.",
  steps: [fixMetrics],
  host: "SERVER",
  nothing: (_want, facts) => absent(facts) ?? "`kubectl top nodes` answers for every node",
  causes,
});

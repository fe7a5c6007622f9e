/** What settings make of a node beside its unit: its labels and taints, and files of /etc/rancher/k3s. */
import { createHash } from "node:crypto";
import { type Generation, KUBECTL, nodesOf, type Role } from "./k3s.ts";
import { type Settings, words } from "./settings.ts";
import { sh, writeFile } from "./sh.ts";
import { type Change, type Facts, Refusal } from "./step.ts";

export const NODE_SETTINGS = ["NODE_LABELS", "NODE_TAINTS", "K3S_CONFIG"] as const;

/** Read by modern k3s after config.yaml, which is the user's own (v1.20.7 and v1.21.1 on). */
export const CONFIG = "/etc/rancher/k3s/config.yaml.d/across-clouds.yaml";

export const filesLook = `fact config; stat -c %a ${CONFIG} 2>/dev/null && sha256sum <${CONFIG} | cut -d' ' -f1
`;

/** The files that are ours, for \`stat\`: k3s reads them when it starts. */
export const FILES = CONFIG;

/** Changes that write files, and the paths that have to go before the next start. */
export function filesPlan(
  generation: Generation,
  version: string,
  want: Settings,
  facts: Facts,
): { changes: Change[]; gone: string[] } {
  const changes: Change[] = [];
  const gone: string[] = [];
  if (want.K3S_CONFIG && generation === "old")
    throw new Refusal(`K3S_CONFIG needs k3s v1.26 or later, not ${version}: use SERVER_ARGS and AGENT_ARGS`);
  if (!want.K3S_CONFIG && facts.config?.trim()) gone.push(CONFIG);
  if (want.K3S_CONFIG && facts.config?.trim() !== `600\n${sha256(`${want.K3S_CONFIG}\n`)}`)
    changes.push({
      why: `write ${CONFIG} (0600)`,
      sh: writeFile(CONFIG, "@K3S_CONFIG@\n", "600", ["K3S_CONFIG"]),
      secrets: ["K3S_CONFIG"],
    });
  return { changes, gone };
}

const sha256 = (text: string) => createHash("sha256").update(text).digest("hex");

export const labelArgs = (want: Settings): string[] => [
  ...words(want.NODE_LABELS).map((label) => `--node-label=${label}`),
  ...words(want.NODE_TAINTS).map((taint) => `--node-taint=${taint}`),
];

/**
 * Changes of a node that is registered already, to be made before its unit is written: k3s sets its labels at
 * each start but takes none away, and taints at its first start only. What was ours before is in the old unit.
 *
 * @throws {Refusal} for taints of an agent, which no node may change of itself (NodeRestriction).
 */
export function labelsPlan(role: Role, name: string, args: readonly string[], facts: Facts): Change[] {
  const node = nodesOf(facts.nodes).find((n) => n.name === name);
  if (!node) return [];
  const values = (flag: string, list: readonly string[]) =>
    list.flatMap((arg) => (arg.startsWith(`--${flag}=`) ? arg.slice(flag.length + 3).split(",") : []));
  const old = (facts.unit ?? "").split("\n").map((line) => line.trim().replace(/ \\$/, ""));

  const key = (label: string) => label.split("=")[0] as string;
  const keys = values("node-label", args).map(key);
  const labels = [...new Set(values("node-label", old).map(key))].filter(
    (label) => !keys.includes(label) && label in node.labels,
  );
  const taints = values("node-taint", args);
  const missing = taints.filter((taint) => !node.taints.includes(bare(taint)));
  const extra = values("node-taint", old).filter(
    (taint) => !taints.includes(taint) && node.taints.includes(bare(taint)),
  );
  // One key and effect has one value: setting it anew is no removal.
  const place = (taint: string) => taint.replace(/=[^:]*/, "");
  const words = [
    ...extra
      .filter((taint) => !missing.some((other) => place(other) === place(taint)))
      .map((t) => `${place(t)}-`),
    ...missing,
  ];
  if (words.length && role === "agent")
    throw new Refusal(
      `Node ${name} is registered with other taints, and Kubernetes lets no agent change its own: on the server run "kubectl taint --overwrite node ${name} ${words.join(" ")}", then the same again`,
    );
  const change = (verb: string, list: string[]): Change[] =>
    list.length
      ? [
          {
            why: `${verb} node ${name}: ${list.join(" ")}`,
            sh: `${KUBECTL}\nkc ${verb} --overwrite node ${sh(name)} ${list.map(sh).join(" ")}`,
          },
        ]
      : [];
  return [
    ...change(
      "label",
      labels.map((label) => `${label}-`),
    ),
    ...change("taint", words),
  ];
}

/** A taint as the API has it: \`key=:Effect\` and \`key:Effect\` are one. */
const bare = (taint: string) => taint.replace("=:", ":");

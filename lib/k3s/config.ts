/** A node's configuration besides its unit: labels, taints, and files in /etc/rancher/k3s. */

import { parseArgs } from "../args.ts";
import type { Settings } from "../settings.ts";
import { raw, sh, writeFile } from "../sh.ts";
import { type Change, type Facts, prints, Refusal } from "../step.ts";
import { domainIn, NAT, rangesIn } from "../table.ts";
import { rewrite, sha256, splitWords } from "../text.ts";
import { KUBECTL, nodesOf } from "./nodes.ts";
import type { Generation, Role } from "./unit.ts";

export const PROXY_SETTINGS = ["HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"] as const;
export const NODE_SETTINGS = [
  "NODE_LABELS",
  "NODE_TAINTS",
  "TUNNEL_KUBELETS",
  "K3S_CONFIG",
  "REGISTRY_MIRRORS",
  ...PROXY_SETTINGS,
] as const;

/** Read by modern k3s after config.yaml, which is the user's own (v1.20.7 and v1.21.1 on). */
export const CONFIG = "/etc/rancher/k3s/config.yaml.d/across-clouds.yaml";

export const REGISTRIES = "/etc/rancher/k3s/registries.yaml";
const OURS = "# Written by k3s-across-clouds from REGISTRY_MIRRORS.";
/** The password of a cluster whose servers share a datastore, on each of them. */
export const PASSWORD = "/etc/rancher/k3s/across-clouds.token";
/** Where k3s imports images from when it starts. */
export const IMAGES = "/var/lib/rancher/k3s/agent/images";

// A registries.yaml that this project did not write may hold passwords, and is not read.
export const filesLook = prints(
  "config registries read",
)(sh`fact config; [ ! -e ${CONFIG} ] || { stat -c %a ${CONFIG}; digest ${CONFIG}; }
fact registries; row=; [ ! -s ${REGISTRIES} ] || read -r row <${REGISTRIES}
if [ "$row" = ${OURS} ]; then text ${REGISTRIES}; elif [ -s ${REGISTRIES} ]; then echo foreign; fi
fact read; for f in ${CONFIG} ${REGISTRIES} ${PASSWORD} ${IMAGES}/k3s-airgap-images-*; do [ ! -e "$f" ] || stat -c %Z "$f"; done
`);

/** registries.yaml with the mirrors of each registry in their order. @see k3s docs, "Private Registry Configuration" */
export function registriesText(mirrors: string): string {
  const endpoints = new Map<string, string[]>();
  for (const word of splitWords(mirrors)) {
    const at = word.indexOf("=");
    const [registry, url] = [word.slice(0, at), word.slice(at + 1)];
    endpoints.set(registry, [...(endpoints.get(registry) ?? []), url]);
  }
  const rows = [...endpoints].map(
    ([registry, urls]) =>
      `  "${registry}":\n    endpoint:\n${urls.map((url) => `      - "${url}"\n`).join("")}`,
  );
  return `${OURS}\nmirrors:\n${rows.join("")}`;
}

/** The networks of pods and services. */
export const rangesOf = ({ SERVER_ARGS }: Pick<Settings, "SERVER_ARGS">) => rangesIn(parseArgs(SERVER_ARGS));

/**
 * NO_PROXY for k3s: its connections to the API, kubelets and pods use Go's defaults, which honour a proxy.
 * @param nodes public addresses of the nodes this one talks to; NAT among them is within the pod network.
 */
export function noProxy(want: Settings, nodes: readonly string[]): string {
  const own = [
    "localhost",
    "127.0.0.0/8",
    ...rangesOf(want),
    ".svc",
    `.${domainIn(parseArgs(want.SERVER_ARGS))}`,
  ];
  return [
    ...new Set([...want.NO_PROXY.split(","), ...own, ...nodes].filter((word) => word && word !== NAT)),
  ].join(",");
}

/** Lines of the unit's EnvironmentFile; `@NAME@` stands for a secret. */
export const proxyEnv = (want: Settings): string =>
  want.HTTPS_PROXY || want.HTTP_PROXY
    ? `${want.HTTPS_PROXY && "HTTPS_PROXY=@HTTPS_PROXY@\n"}${want.HTTP_PROXY && "HTTP_PROXY=@HTTP_PROXY@\n"}NO_PROXY=${want.NO_PROXY}\n`
    : "";

/**
 * Lets a change download through the box's proxy, if it has one, by the variables that curl and package managers know.
 */
export function byProxy(want: Settings, change: Change): Change {
  const names = (["HTTPS_PROXY", "HTTP_PROXY"] as const).filter((name) => want[name]);
  if (names.length === 0) return change;
  const set = names.map((name) => sh`export ${name.toLowerCase()}="$${name}"`);
  return {
    ...change,
    sh: [...set, sh`export no_proxy=${want.NO_PROXY}`, change.sh].join("\n"),
    secrets: [...(change.secrets ?? []), ...names],
  };
}

/** Changes that write files, and paths to remove before the next start. */
export function filesPlan(
  generation: Generation,
  version: string,
  want: Settings,
  facts: Facts<"config" | "registries">,
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
  const mirrors = want.REGISTRY_MIRRORS && registriesText(want.REGISTRY_MIRRORS);
  const have = `${facts.registries?.trim() ?? ""}\n`;
  if (mirrors && have === "foreign\n")
    throw new Refusal(
      `REGISTRY_MIRRORS is set, but ${REGISTRIES} is somebody else's: move it away, or set no REGISTRY_MIRRORS`,
    );
  if (!mirrors && have.startsWith(OURS)) gone.push(REGISTRIES);
  if (mirrors && have !== mirrors)
    changes.push({
      ...rewrite(REGISTRIES, facts.registries?.trim() && have, mirrors),
      sh: writeFile(REGISTRIES, mirrors),
    });
  return { changes, gone };
}

/**
 * Changes for a registered node, made before its unit is written: k3s sets labels at each start but never removes one,
 * and sets taints at its first start only. The old unit says which ones this project had set.
 *
 * @throws {Refusal} for an agent's taints, which a node may not change itself (NodeRestriction).
 */
export function labelsPlan(
  role: Role,
  name: string,
  args: readonly string[],
  facts: Facts<"nodes" | "unit">,
): Change[] {
  const node = nodesOf(facts.nodes).find((n) => n.name === name);
  if (!node) return [];
  const values = (flag: string, list: readonly string[]) =>
    parseArgs(list.join(" ")).flatMap((arg) => (arg.flag === flag ? (arg.value?.split(",") ?? []) : []));
  const old = (facts.unit ?? "").split("\n").map((line) => line.trim().replace(/ \\$/, ""));

  const key = (label: string) => label.split("=")[0] as string;
  const keys = values("node-label", args).map(key);
  const labels = [...new Set(values("node-label", old).map(key))].filter(
    (label) => !keys.includes(label) && Object.hasOwn(node.labels, label),
  );
  const taints = values("node-taint", args);
  const missing = taints.filter((taint) => !node.taints.includes(bare(taint)));
  const extra = values("node-taint", old).filter(
    (taint) => !taints.includes(taint) && node.taints.includes(bare(taint)),
  );
  // A key and effect has one value: setting another one replaces it.
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
            sh: sh`${raw(KUBECTL)}
kc ${verb} --overwrite node ${name} ${list}`,
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

/** Packaged manifests, and metrics-server: it answers only where its way to the kubelets would really work. */
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { request } from "node:https";
import { basename, dirname, join, relative } from "node:path";
import { checkServerIdentity } from "node:tls";
import { type Generation, log } from "./common.ts";
import { metricsAddress, type Node } from "./nodes.ts";

export type Deployment = { args: string[]; image: string };
export type Usage = { cpu: string; memory: string };

/** The packaged deployment, cut down to what is read here. */
export function packaged(gen: Generation, externalFirst: boolean): string {
  const container =
    gen === "old"
      ? "        image: rancher/metrics-server:v0.3.6\n"
      : `        image: "rancher/mirrored-metrics-server:v0.9.0"
        args:
        - --cert-dir=/tmp
        - --secure-port=10250
        - --kubelet-preferred-address-types=${externalFirst ? "ExternalIP,InternalIP,Hostname" : "InternalIP,ExternalIP,Hostname"}
        - --kubelet-use-node-status-port
        - --metric-resolution=15s
`;
  return `---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: metrics-server
  namespace: kube-system
  labels:
    k8s-app: metrics-server
spec:
  selector:
    matchLabels:
      k8s-app: metrics-server
  template:
    metadata:
      name: metrics-server
      labels:
        k8s-app: metrics-server
    spec:
      serviceAccountName: metrics-server
      volumes:
      - name: tmp-dir
        emptyDir: {}
      containers:
      - name: metrics-server
${container}        volumeMounts:
        - name: tmp-dir
          mountPath: /tmp
`;
}

const FILES = [
  "aggregated-metrics-reader",
  "auth-delegator",
  "auth-reader",
  "metrics-apiservice",
  "metrics-server-deployment",
  "metrics-server-service",
  "resource-reader",
];
const ROOT_FILES: Record<Generation, string[]> = {
  old: ["ccm", "coredns", "local-storage", "rolebindings", "traefik"],
  modern: ["ccm", "coredns", "local-storage", "rolebindings", "runtimes", "traefik"],
};

/** Written anew at every start, whatever lies there: a .skip file does not stop this, only --disable does (and v1.17's --no-deploy). */
export function stage(gen: Generation, dir: string, skips: Set<string>, externalFirst: boolean): void {
  const write = (path: string, text: string): void => {
    mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
    log("info", `Writing manifest: ${path}`);
    writeFileSync(path, text, { mode: 0o600 });
  };
  for (const name of ROOT_FILES[gen])
    if (!skips.has(name) && !skips.has(`${name}.yaml`))
      write(join(dir, `${name}.yaml`), `# stand-in: ${name} is not imitated\n`);
  if (skips.has("metrics-server")) return;
  for (const name of FILES) {
    write(
      join(dir, "metrics-server", `${name}.yaml`),
      name === "metrics-server-deployment"
        ? packaged(gen, externalFirst)
        : `# stand-in: ${name} is not imitated\n`,
    );
  }
}

const unquote = (text: string): string =>
  text
    .trim()
    .replace(/\s+#.*$/, "")
    .replace(/^(["'])(.*)\1$/, "$2");

type Container = { command?: string[]; args?: string[]; image?: string };
type Manifest = {
  kind?: string;
  metadata?: { name?: string; namespace?: string };
  spec?: { template?: { spec?: { containers?: Container[] } } };
};

/** The metrics-server deployment in a manifest: as much YAML as such files use, or JSON. */
export function readDeployment(text: string): Deployment | undefined {
  if (/^\s*\{/.test(text)) {
    try {
      const json = JSON.parse(text) as Manifest & { items?: Manifest[] };
      const object = (json.items ?? [json]).find(
        (o) =>
          o.kind === "Deployment" &&
          o.metadata?.name === "metrics-server" &&
          o.metadata?.namespace === "kube-system",
      );
      const container = object?.spec?.template?.spec?.containers?.[0];
      return (
        container && {
          args: [...(container.command ?? []), ...(container.args ?? [])],
          image: container.image ?? "",
        }
      );
    } catch {
      return undefined;
    }
  }
  for (const document of text.split(/^---.*$/m)) {
    const lines = document.split("\n").filter((l) => !/^\s*(#|$)/.test(l));
    const meta = lines.slice(lines.findIndex((l) => /^metadata:/.test(l)) + 1);
    const ends = meta.findIndex((l) => /^\S/.test(l));
    const own = (ends < 0 ? meta : meta.slice(0, ends)).join("\n");
    if (
      !lines.some((l) => /^kind:\s*["']?Deployment["']?\s*$/.test(l)) ||
      !/^\s+name:\s*["']?metrics-server["']?\s*$/m.test(own) ||
      !/^\s+namespace:\s*["']?kube-system["']?\s*$/m.test(own)
    )
      continue;
    const args: string[] = [];
    let image = "";
    for (let i = 0; i < lines.length; i++) {
      const key = /^(\s*)(- )?(args|command|image):\s*(.*)$/.exec(lines[i]!);
      if (!key) continue;
      if (key[3] === "image") image = unquote(key[4]!);
      else if (key[4]!.startsWith("["))
        args.push(
          ...key[4]!
            .replace(/^\[|\]\s*$/g, "")
            .split(",")
            .map(unquote)
            .filter(Boolean),
        );
      else {
        const indent = key[1]!.length + (key[2]?.length ?? 0);
        for (; i + 1 < lines.length; i++) {
          const item = /^(\s*)- (.*)$/.exec(lines[i + 1]!);
          if (!item || item[1]!.length < indent) break;
          args.push(unquote(item[2]!));
        }
      }
    }
    return { args, image };
  }
  return undefined;
}

function walk(dir: string): string[] {
  try {
    return readdirSync(dir).flatMap((f) =>
      statSync(join(dir, f)).isDirectory() ? walk(join(dir, f)) : [join(dir, f)],
    );
  } catch {
    return [];
  }
}

/**
 * One pass of the deploy controller: `undefined` keeps what is in force, `null` deletes it.
 * A disabled file is deleted, a user's metrics-server.yaml under --disable=metrics-server too;
 * a skipped one is not applied, but what it made earlier stays, as does what a file made that is gone.
 *
 * @param addons checksums by name up to the first dot, as k3s keeps them in the datastore: but for a start (`force`) a
 * file is applied only when its checksum is another one.
 */
export function deployPass(
  dir: string,
  disables: Set<string>,
  have: Deployment | null,
  addons: Record<string, string> = {},
  force = true,
): Deployment | null {
  const files = walk(dir).sort();
  const skips = new Set(files.filter((f) => f.endsWith(".skip")).map((f) => basename(f).slice(0, -5)));
  let result = have;
  for (const file of files) {
    const parts = relative(dir, file).split("/"),
      name = parts.at(-1)!;
    if (!/\.(ya?ml|json)$/i.test(name) || name.startsWith(".")) continue;
    const folders = parts.slice(0, -1).map((_, i) => parts.slice(0, i + 1).join("/"));
    if (
      folders.some((f) => disables.has(f)) ||
      disables.has(name) ||
      disables.has(name.replace(/\.[^.]+$/, ""))
    ) {
      if (readDeployment(readFileSync(file, "utf8"))) result = null;
      rmSync(file);
      delete addons[name.split(".")[0]!];
    } else if (!skips.has(name)) {
      const text = readFileSync(file, "utf8"),
        addon = name.split(".")[0]!,
        sum = createHash("sha256").update(text).digest("hex");
      if (!force && addons[addon] === sum) continue;
      addons[addon] = sum;
      result = readDeployment(text) ?? result;
    }
  }
  return result;
}

const V03 = [
  "kubelet-insecure-tls",
  "kubelet-preferred-address-types",
  "kubelet-port",
  "kubelet-certificate-authority",
  "deprecated-kubelet-completely-insecure",
  "metric-resolution",
  "cert-dir",
  "secure-port",
  "v",
  "logtostderr",
  "requestheader-allowed-names",
  "tls-cert-file",
  "tls-private-key-file",
];
const V04 = [
  ...V03.filter((f) => f !== "deprecated-kubelet-completely-insecure"),
  "kubelet-use-node-status-port",
  "kubelet-request-timeout",
  "kubelet-client-certificate",
  "kubelet-client-key",
  "tls-cipher-suites",
  "tls-min-version",
  "node-selector",
  "authorization-always-allow-paths",
];

export type Settings = { types: string[]; insecure: boolean; error?: string };

/** What the deployment's arguments make metrics-server do. Its releases differ in flags and defaults. */
export function settings(deployment: Deployment): Settings {
  const v03 = /:v0\.[0-3]\./.test(deployment.image);
  const flags = new Map(
    deployment.args
      .filter((a) => a.startsWith("-"))
      .map((a) => [a.replace(/^--?/, "").split("=")[0]!, a.split("=").slice(1).join("=")] as const),
  );
  const unknown = [...flags.keys()].find((f) => !(v03 ? V03 : V04).includes(f));
  const types = flags.get("kubelet-preferred-address-types")?.split(",") ?? [
    "Hostname",
    "InternalDNS",
    "InternalIP",
    "ExternalDNS",
    "ExternalIP",
  ];
  return {
    types,
    insecure: flags.has("kubelet-insecure-tls") && flags.get("kubelet-insecure-tls") !== "false",
    ...(unknown ? { error: `unknown flag: --${unknown}` } : {}),
  };
}

/** Asks one kubelet the way metrics-server would. Node names are resolved by CoreDNS, from the nodes' internal addresses. */
function ask(
  node: Node,
  s: Settings,
  tls: { ca: string; cert: string; key: string },
  dns: boolean,
): Promise<Usage> {
  return new Promise((done, failed) => {
    const chosen = metricsAddress(s.types, node.status.addresses);
    if (!chosen) return failed(new Error("no address matched types"));
    const host =
      chosen.type === "Hostname"
        ? dns
          ? node.status.addresses.find((a) => a.type === "InternalIP")?.address
          : undefined
        : chosen.address;
    if (!host) return failed(new Error(`lookup ${chosen.address}: no such host`));
    const req = request(
      {
        host,
        port: 10250,
        path: "/metrics/resource",
        agent: false,
        timeout: 3000,
        ...tls,
        rejectUnauthorized: !s.insecure,
        checkServerIdentity: (_, cert) =>
          s.insecure ? undefined : checkServerIdentity(chosen.address, cert),
      },
      (res) => {
        let body = "";
        res.on("data", (d) => (body += d));
        res.on("end", () =>
          res.statusCode === 200
            ? done(JSON.parse(body) as Usage)
            : failed(new Error(`status ${res.statusCode}`)),
        );
      },
    );
    req.on("timeout", () => req.destroy(new Error("i/o timeout")));
    req.on("error", failed);
    req.end();
  });
}

/** A line of its log on a node that it could not ask, as v0.3.6 has it, or a modern one (pkg/scraper). */
export function complaint(deployment: Deployment, node: Node, error: Error): string {
  const { name } = node.metadata;
  const at = metricsAddress(settings(deployment).types, node.status.addresses)?.address ?? "";
  const url = (path: string): string => `https://${at}:10250/${path}`;
  const seen = error as Error & { code?: string; cert?: { subjectaltname?: string } };
  const names = (seen.cert?.subjectaltname ?? "").replace(/DNS:|IP Address:/g, "");
  const late = seen.message === "i/o timeout";
  const why =
    seen.code === "ERR_TLS_CERT_ALTNAME_INVALID"
      ? `x509: ${/IP Address/.test(seen.cert?.subjectaltname ?? "") ? `certificate is valid for ${names}, not ${at}` : `cannot validate certificate for ${at} because it doesn't contain any IP SANs`}`
      : seen.code === "ECONNREFUSED"
        ? `dial tcp ${at}:10250: connect: connection refused`
        : late
          ? `dial tcp ${at}:10250: i/o timeout`
          : seen.message;
  const time = new Date().toISOString().slice(5, 23).replace("-", "").replace("T", " ");
  if (/:v0\.[0-3]\./.test(deployment.image))
    return `E${time}000       1 manager.go:111] unable to fully collect metrics: unable to fully scrape metrics from source kubelet_summary:${name}: unable to fetch metrics from Kubelet ${name} (${at}): Get ${url("stats/summary?only_cpu_and_memory=true")}: ${why}`;
  const err = JSON.stringify(
    `Get ${JSON.stringify(url("metrics/resource"))}: ${late ? "context deadline exceeded" : why.replace(/^x509/, "tls: failed to verify certificate: x509")}`,
  );
  return late
    ? `E${time}000       1 scraper.go:147] "Failed to scrape node, timeout to access kubelet" err=${err} node="${name}" timeout="10s"`
    : `E${time}000       1 scraper.go:149] "Failed to scrape node" err=${err} node="${name}"`;
}

/** The usage of every node that can be reached, and what it says of the others. */
export async function scrape(
  nodes: Node[],
  deployment: Deployment,
  tls: { ca: string; cert: string; key: string },
  dns: boolean,
  says: (line: string) => void = () => {},
): Promise<Map<string, Usage>> {
  const s = settings(deployment),
    found = new Map<string, Usage>();
  if (s.error) return found;
  await Promise.all(
    nodes.map((node) =>
      ask(node, s, tls, dns).then(
        (usage) => void found.set(node.metadata.name, usage),
        (error: Error) => says(complaint(deployment, node, error)),
      ),
    ),
  );
  return found;
}

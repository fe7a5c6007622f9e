/** The part of kubectl that deploying a cluster needs. Anything else is refused. */
import { accessSync, constants, existsSync, readFileSync } from "node:fs";
import { type Answer, type Call, type CallError, call } from "./client.ts";
import { generation, logLine, sleep } from "./common.ts";
import { type Node, taint as taintOf } from "./nodes.ts";

type Options = { words: string[]; flags: Map<string, string> };
const VALUE_FLAGS = [
  "kubeconfig",
  "server",
  "s",
  "request-timeout",
  "n",
  "namespace",
  "o",
  "output",
  "raw",
  "timeout",
  "tail",
];
/** Known to be flags, so that the refusal names the command, and refused where they would change what is done. */
const REFUSED = [
  "f",
  "filename",
  "k",
  "l",
  "selector",
  "p",
  "patch",
  "type",
  "field-selector",
  "context",
  "user",
  "cluster",
  "sort-by",
];
const BOOL_FLAGS = [
  "no-headers",
  "overwrite",
  "A",
  "all-namespaces",
  "ignore-daemonsets",
  "delete-emptydir-data",
  "delete-local-data",
  "force",
  "client",
  "short",
  "insecure-skip-tls-verify",
  "wait",
  "ignore-not-found",
];

export class KubectlError extends Error {}
const fail = (text: string): never => {
  throw new KubectlError(text);
};

export function parse(args: string[]): Options {
  const words: string[] = [],
    flags = new Map<string, string>();
  for (let i = 0; i < args.length; i++) {
    const arg = args[i]!,
      short = /^-([a-zA-Z])=?([\s\S]*)$/.exec(arg),
      long = /^--([^=]+)(?:=([\s\S]*))?$/.exec(arg);
    if (!short && !long) {
      words.push(arg);
      continue;
    }
    const name = long?.[1] ?? short![1]!;
    if (VALUE_FLAGS.includes(name) || REFUSED.includes(name))
      flags.set(
        { n: "namespace", o: "output", s: "server" }[name] ?? name,
        (long ? long[2] : short![2] || undefined) ??
          args[++i] ??
          fail(`flag needs an argument: ${long ? `--${name}` : `'${name}' in -${name}`}`),
      );
    else if (BOOL_FLAGS.includes(name))
      flags.set(name === "A" ? "all-namespaces" : name, long?.[2] ?? "true");
    else fail(`unknown ${long ? `flag: --${name}` : `shorthand flag: '${name}' in ${args[i]}`}`);
  }
  return { words, flags };
}

/** kubectl's ages: 87s, 2m44s, 9m8s, 10m, 5h, 3d. */
export function age(ms: number): string {
  const s = Math.max(0, Math.floor(ms / 1000)),
    m = Math.floor(s / 60),
    h = Math.floor(m / 60),
    d = Math.floor(h / 24);
  if (s < 120) return `${s}s`;
  if (m < 10) return s % 60 ? `${m}m${s % 60}s` : `${m}m`;
  if (m < 180) return `${m}m`;
  if (h < 8) return m % 60 ? `${h}h${m % 60}m` : `${h}h`;
  if (h < 48) return `${h}h`;
  return `${d}d`;
}

export function table(rows: string[][]): string {
  const widths = rows[0]?.map((_, i) => Math.max(...rows.map((r) => r[i]!.length))) ?? [];
  return rows
    .map((r) => `${r.map((c, i) => (i === r.length - 1 ? c : c.padEnd(widths[i]! + 3))).join("")}\n`)
    .join("");
}

const sortKeys = (value: unknown): unknown =>
  Array.isArray(value)
    ? value.map(sortKeys)
    : value && typeof value === "object"
      ? Object.fromEntries(
          Object.entries(value)
            .sort(([a], [b]) => (a < b ? -1 : 1))
            .map(([k, v]) => [k, sortKeys(v)]),
        )
      : value;
const pretty = (value: unknown): string => `${JSON.stringify(sortKeys(value), null, 4)}\n`;

/** A node's row as `get nodes` prints it. */
export function nodeRow(node: Node, wide: boolean, now = Date.now()): string[] {
  const ready = node.status.conditions.find((c) => c.type === "Ready");
  const roles = Object.keys(node.metadata.labels)
    .filter((l) => l.startsWith("node-role.kubernetes.io/"))
    .map((l) => l.split("/")[1])
    .sort();
  const at = (type: string): string =>
    node.status.addresses.find((a) => a.type === type)?.address ?? "<none>";
  const info = node.status.nodeInfo as Record<string, string>;
  const modern = info.kubeProxyVersion === "";
  return [
    node.metadata.name,
    `${ready?.status === "True" ? "Ready" : "NotReady"}${node.spec.unschedulable ? ",SchedulingDisabled" : ""}`,
    roles.join(",") || "<none>",
    age(now - Date.parse(node.metadata.creationTimestamp)),
    info.kubeletVersion!,
    ...(wide
      ? [
          at("InternalIP"),
          at("ExternalIP"),
          info.osImage!,
          modern ? `${info.kernelVersion} (${info.architecture})` : info.kernelVersion!,
          info.containerRuntimeVersion!,
        ]
      : []),
  ];
}

type Pod = {
  metadata: { namespace: string; name: string };
  status: { phase: string; conditions: { type: string; status: string }[] };
};
type Config = { server: string; call: Call };

function readConfig(flags: Map<string, string>): Config {
  const global = "/etc/rancher/k3s/k3s.yaml";
  const path = flags.get("kubeconfig") ?? process.env.KUBECONFIG ?? global;
  let text = "";
  if (existsSync(path)) {
    try {
      accessSync(path, constants.R_OK);
    } catch {
      if (path === global)
        process.stderr.write(
          logLine(
            "warning",
            `Unable to read ${path}, please start server with --write-kubeconfig-mode to modify kube config permissions`,
          ),
        );
      return fail(`error: error loading config file "${path}": open ${path}: permission denied`);
    }
    text = readFileSync(path, "utf8");
  } else if (flags.has("kubeconfig")) return fail(`error: stat ${path}: no such file or directory`);
  const field = (name: string): string | undefined =>
    new RegExp(`^\\s*${name}:\\s*"?([^"\\n]+)"?\\s*$`, "m").exec(text)?.[1]?.trim();
  const data = (name: string): string | undefined => {
    const inline = field(`${name}-data`),
      file = field(name);
    return inline ? Buffer.from(inline, "base64").toString() : file ? readFileSync(file, "utf8") : undefined;
  };
  const server = flags.get("server") ?? field("server") ?? "http://localhost:8080";
  const wait = /^(\d+)(ms|s|m)?$/.exec(flags.get("request-timeout") ?? "0");
  const timeout = wait
    ? Number(wait[1]) * ({ ms: 1, s: 1000, m: 60_000 }[wait[2] ?? "s"] ?? 1000)
    : fail(
        `error: Invalid timeout value. Timeout must be a single integer in seconds, or an integer followed by a corresponding time unit (e.g. 1s | 2m | 3h)`,
      );
  const user = field("username"),
    password = field("password");
  return {
    server: server.replace(/\/$/, ""),
    call: {
      ca: data("certificate-authority"),
      cert: data("client-certificate"),
      key: data("client-key"),
      auth: user && password ? `${user}:${password}` : undefined,
      timeout: timeout || 30_000,
      insecure: flags.get("insecure-skip-tls-verify") === "true",
    },
  };
}

function refused(server: string, error: CallError): string {
  const { host, hostname } = new URL(server);
  switch (error.code) {
    case "ECONNREFUSED":
      return `The connection to the server ${host} was refused - did you specify the right host or port?`;
    case "ETIMEDOUT":
      return `Unable to connect to the server: dial tcp ${host}: i/o timeout`;
    case "ENOTFOUND":
      return `Unable to connect to the server: dial tcp: lookup ${hostname}: no such host`;
    case "ERR_TLS_CERT_ALTNAME_INVALID":
      return `Unable to connect to the server: x509: certificate is valid for ${String((error as { cert?: { subjectaltname?: string } }).cert?.subjectaltname ?? "").replace(/DNS:|IP Address:/g, "")}, not ${hostname}`;
  }
  if (/SELF_SIGNED|UNABLE_TO|SIGNATURE/.test(error.code ?? ""))
    return "Unable to connect to the server: x509: certificate signed by unknown authority";
  if (error.code === "ECONNRESET") return "Unable to connect to the server: EOF";
  return `Unable to connect to the server: ${error.message}`;
}

/** What kubectl says of an answer that is no success. */
export function serverError(a: Answer, what: string): string {
  let message = a.body.trim(),
    reason = "";
  try {
    ({ message, reason } = JSON.parse(a.body) as { message: string; reason: string });
  } catch {
    // Not a Status: k3s's own words.
  }
  if (a.status === 401) return "error: You must be logged in to the server (Unauthorized)";
  if (a.status === 503)
    return `Error from server (ServiceUnavailable): the server is currently unable to handle the request${what ? ` (${what})` : ""}`;
  if (a.status === 404 && !reason)
    return "Error from server (NotFound): the server could not find the requested resource";
  return `Error from server (${reason || a.statusText}): ${message}`;
}

async function run(version: string, args: string[]): Promise<string> {
  const gen = generation(version),
    { words, flags } = parse(args);
  const [verb, ...rest] = words;
  const ofMetrics = ["l", "selector"].some((f) => flags.get(f) === "k8s-app=metrics-server");
  const known =
    verb &&
    [
      "get",
      "logs",
      "annotate",
      "label",
      "taint",
      "top",
      "delete",
      "cordon",
      "uncordon",
      "drain",
      "version",
      "config",
    ].includes(verb);
  if (!known) return fail(`k3s stand-in: kubectl ${verb ?? ""} is not imitated`);
  const refusedFlag = [...flags.keys()].find(
    (f) => REFUSED.includes(f) && !(ofMetrics && ["get", "logs"].includes(verb)),
  );
  if (refusedFlag)
    return fail(
      `k3s stand-in: kubectl ${verb} with ${refusedFlag.length > 1 ? "--" : "-"}${refusedFlag} is not imitated`,
    );
  if (verb === "version" && flags.get("client") === "true") return clientVersion(version);
  const config = readConfig(flags);
  if (verb === "config") {
    if (rest.join(" ") !== "view")
      return fail(`k3s stand-in: kubectl config ${rest.join(" ")} is not imitated`);
    return `apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: DATA+OMITTED\n    server: ${config.server}\n  name: default\ncontexts:\n- context:\n    cluster: default\n    user: default\n  name: default\ncurrent-context: default\nkind: Config\npreferences: {}\nusers:\n- name: default\n`;
  }
  const output = flags.get("output") ?? "";
  if (!["", "json", "wide", "name"].includes(output))
    return fail(`k3s stand-in: kubectl -o ${output} is not imitated`);

  const ask = (path: string, more: Call = {}): Promise<Answer> => {
    if (config.server.startsWith("http:"))
      return fail(
        `The connection to the server ${new URL(config.server).host} was refused - did you specify the right host or port?`,
      );
    return call(config.server + path, { ...config.call, ...more }).catch((e: CallError) =>
      fail(refused(config.server, e)),
    );
  };
  const good = async <T = Record<string, unknown>>(path: string, what = "", more: Call = {}): Promise<T> => {
    const answer = await ask(path, more);
    return answer.status < 300 ? (JSON.parse(answer.body) as T) : fail(serverError(answer, what));
  };
  const nodePath = (name: string): string => `/api/v1/nodes/${encodeURIComponent(name)}`;
  const secretPath = (name: string): string =>
    `/api/v1/namespaces/${flags.get("namespace") ?? "default"}/secrets${name && `/${encodeURIComponent(name)}`}`;
  const isNode = (w?: string): boolean => ["node", "nodes", "no"].includes(w ?? "");
  const named = (list: string[]): string[] =>
    list.flatMap((w) => {
      const [, kind, name] = /^(node|secret)s?\/(.+)$/.exec(w) ?? [];
      return kind ? [kind, name as string] : [w];
    });
  const [kind, ...names] = named(rest);

  if (verb === "version") {
    const answer = await good("/version");
    return (
      clientVersion(version) +
      (gen === "old"
        ? `Server Version: version.Info{Major:"1", Minor:"${answer.minor}", GitVersion:"${answer.gitVersion}"}\n`
        : `Server Version: ${answer.gitVersion}\n`)
    );
  }
  if (verb === "get") {
    const raw = flags.get("raw");
    if (raw !== undefined) {
      const answer = await ask(raw);
      return answer.status < 300 ? answer.body : fail(serverError(answer, ""));
    }
    if (isNode(kind)) {
      const listOf = (items: Node[]) => ({
        apiVersion: "v1",
        items,
        kind: "List",
        metadata: gen === "old" ? { resourceVersion: "", selfLink: "" } : { resourceVersion: "" },
      });
      const found = names.length
        ? await Promise.all(names.map((n) => good<Node>(nodePath(n))))
        : (
            await good<{ items: Node[] }>("/api/v1/nodes").catch((error) => {
              // Beside "Forbidden" kubectl prints an empty list (v1.17.6, seen): it must not be taken for one.
              if (output === "json") process.stdout.write(pretty(listOf([])));
              throw error;
            })
          ).items;
      const items = found.map((i) => ({ ...i, apiVersion: "v1", kind: "Node" }));
      if (output === "json") return pretty(names.length === 1 ? items[0] : listOf(items));
      if (output === "name") return items.map((n) => `node/${n.metadata.name}\n`).join("");
      if (!items.length) {
        process.stderr.write("No resources found\n");
        return "";
      }
      const wide = output === "wide";
      const head = [
        "NAME",
        "STATUS",
        "ROLES",
        "AGE",
        "VERSION",
        ...(wide ? ["INTERNAL-IP", "EXTERNAL-IP", "OS-IMAGE", "KERNEL-VERSION", "CONTAINER-RUNTIME"] : []),
      ];
      return table([...(flags.has("no-headers") ? [] : [head]), ...items.map((n) => nodeRow(n, wide))]);
    }
    const path = ["deploy", "deployment", "deployments", "deployments.apps"].includes(kind ?? "")
      ? "/apis/apps/v1"
      : ["pod", "pods", "po", "event", "events", "ev"].includes(kind ?? "")
        ? "/api/v1"
        : "";
    const everywhere = flags.has("all-namespaces");
    if (
      path === "/api/v1" &&
      /^po/.test(kind!) &&
      output !== "json" &&
      (everywhere || ofMetrics) &&
      !names[0]
    ) {
      // Of pods, only metrics-server's is imitated.
      const { items } = await good<{ items: Pod[] }>("/api/v1/pods");
      const head = ["NAMESPACE", "NAME", "READY", "STATUS", "RESTARTS", "AGE"];
      const rows = items.map(({ metadata, status }) => {
        const up = status.conditions.some((c) => c.type === "Ready" && c.status === "True");
        return [metadata.namespace, metadata.name, up ? "1/1" : "0/1", status.phase, "0", "<unknown>"];
      });
      return table([...(flags.has("no-headers") ? [] : [head]), ...rows]);
    }
    if (path && output === "json") {
      const plural = path === "/apis/apps/v1" ? "deployments" : /^ev/.test(kind!) ? "events" : "pods";
      const scope = flags.has("all-namespaces") ? "" : `/namespaces/${flags.get("namespace") ?? "default"}`;
      const answer = await good(`${path}${scope}/${plural}${names[0] ? `/${names[0]}` : ""}`);
      return pretty(names[0] ? answer : { ...answer, kind: "List", apiVersion: "v1" });
    }
    if (["secret", "secrets"].includes(kind ?? "") && output === "name" && !names.length) {
      const { items } = await good<{ items: Node[] }>(secretPath(""));
      return items.map((item) => `secret/${item.metadata.name}\n`).join("");
    }
    return fail(`k3s stand-in: kubectl get ${rest.join(" ")} is not imitated in this form`);
  }
  if (verb === "logs") {
    if (!ofMetrics || flags.get("namespace") !== "kube-system")
      return fail(`k3s stand-in: kubectl logs ${rest.join(" ")} is not imitated in this form`);
    const { items } = await good<{ items: Pod[] }>("/api/v1/namespaces/kube-system/pods");
    // With a selector kubectl shows ten lines unless it is told how many.
    const tail = flags.get("tail") ?? "10";
    const logs = items.map(({ metadata: { name } }) =>
      ask(`/api/v1/namespaces/kube-system/pods/${name}/log?tailLines=${tail}`),
    );
    return (await Promise.all(logs))
      .map((answer) => (answer.status < 300 ? answer.body : fail(serverError(answer, ""))))
      .join("");
  }
  if (verb === "annotate" || verb === "label") {
    const what = verb === "label" ? "label" : "annotation";
    const [name, ...changes] = names;
    if (!isNode(kind) || !name)
      return fail("error: one or more resources must be specified as <resource> <name> or <resource>/<name>");
    if (!changes.length) return fail(`error: at least one ${what} update is required`);
    const values: Record<string, string | null> = {};
    for (const change of changes) {
      const [, key, value] =
        /^([^=]+)=([\s\S]*)$/.exec(change) ??
        (change.endsWith("-")
          ? [change, change.slice(0, -1), null]
          : fail(`error: all ${what} updates must be of the form key=value or key-: ${change}`));
      values[key as string] = value as string | null;
    }
    const have = (await good<Node>(nodePath(name))).metadata[`${what}s`];
    const taken = Object.keys(values).filter((k) => values[k] !== null && k in have);
    if (taken.length && flags.get("overwrite") !== "true")
      return fail(
        `error: --overwrite is false but found the following declared ${what}(s): ${taken.map((k) => `'${k}' already has a value (${have[k]})`).join("; ")}`,
      );
    await good(nodePath(name), "", { method: "PATCH", body: { metadata: { [`${what}s`]: values } } });
    return `node/${name} ${verb === "label" ? "labeled" : "annotated"}\n`;
  }
  if (verb === "taint") {
    const [name, ...changes] = names;
    if (!isNode(kind) || !name || !changes.length)
      return fail("error: at least one resource name and one taint must be specified");
    let taints = (await good<Node>(nodePath(name))).spec.taints ?? [];
    for (const change of changes) {
      const gone = /^([^=:]+):(\w+)-$/.exec(change);
      const next = gone ? { key: gone[1], effect: gone[2] } : taintOf(change);
      const had = taints.find((t) => t.key === next.key && t.effect === next.effect);
      if (gone && !had) return fail(`error: taint ${JSON.stringify(change.slice(0, -1))} not found`);
      if (!gone && had && flags.get("overwrite") !== "true")
        return fail(
          `error: node ${name} already has ${next.key} taint(s) with same effect(s) and --overwrite is false`,
        );
      taints = taints.filter((t) => t !== had);
      if (!gone) taints = [...taints, next as (typeof taints)[number]];
    }
    await good(nodePath(name), "", {
      method: "PATCH",
      body: { spec: { taints: taints.length ? taints : null } },
    });
    return `node/${name} ${changes.every((c) => c.endsWith("-")) ? "untainted" : "tainted"}\n`;
  }
  if (verb === "top") {
    if (!isNode(kind)) return fail(`k3s stand-in: kubectl top ${rest.join(" ")} is not imitated`);
    const groups = (await good("/apis")).groups as { name: string }[];
    if (!groups.some((g) => g.name === "metrics.k8s.io"))
      return fail(
        gen === "old"
          ? `Error from server (NotFound): the server could not find the requested resource (get services http:heapster:)`
          : "error: Metrics API not available",
      );
    const items = (await good("/apis/metrics.k8s.io/v1beta1/nodes", "get nodes.metrics.k8s.io")).items as {
      metadata: { name: string };
      usage: { cpu: string; memory: string };
    }[];
    if (!items.length) return fail("error: metrics not available yet");
    const nodes = (await good("/api/v1/nodes")).items as Node[];
    const capacity = (n: string): { cpu: string; memory: string } =>
      nodes.find((i) => i.metadata.name === n)!.status.allocatable as { cpu: string; memory: string };
    const rows = items
      .filter((i) => nodes.some((n) => n.metadata.name === i.metadata.name))
      .map((i) => {
        const milli = Math.max(1, Math.ceil(parseInt(i.usage.cpu, 10) / 1e6)),
          mi = Math.floor(parseInt(i.usage.memory, 10) / 1024),
          c = capacity(i.metadata.name);
        return [
          i.metadata.name,
          `${milli}m`,
          `${Math.floor(milli / 10 / Number(c.cpu))}%`,
          `${mi}Mi`,
          `${Math.floor((100 * mi * 1024) / parseInt(c.memory, 10))}%`,
        ];
      });
    const missing = nodes
      .filter((n) => !items.some((i) => i.metadata.name === n.metadata.name))
      .map((n) => [n.metadata.name, "<unknown>", "<unknown>", "<unknown>", "<unknown>"]);
    const head =
      gen === "old"
        ? ["NAME", "CPU(cores)", "CPU%", "MEMORY(bytes)", "MEMORY%"]
        : ["NAME", "CPU(cores)", "CPU(%)", "MEMORY(bytes)", "MEMORY(%)"];
    return table([...(flags.has("no-headers") ? [] : [head]), ...rows, ...missing]);
  }
  if (verb === "delete") {
    const secret = kind === "secret";
    if (!(isNode(kind) || secret) || !names.length)
      return fail(`k3s stand-in: kubectl delete ${rest.join(" ")} is not imitated`);
    let done = "";
    for (const name of names) {
      const answer = await ask(secret ? secretPath(name) : nodePath(name), { method: "DELETE" });
      if (answer.status < 300) done += `${secret ? "secret" : "node"} "${name}" deleted\n`;
      else if (answer.status !== 404 || flags.get("ignore-not-found") !== "true")
        return fail(serverError(answer, ""));
    }
    return done;
  }
  // cordon, uncordon, drain
  const name = kind === "node" ? names[0] : kind;
  if (!name) return fail(`error: USAGE: ${verb} NODE [flags]`);
  // --delete-emptydir-data is new in v1.20; the older name is gone from modern kubectl.
  const strange =
    Number(/^v1\.(\d+)/.exec(version)![1]) < 20
      ? "delete-emptydir-data"
      : gen === "modern"
        ? "delete-local-data"
        : "";
  if (verb === "drain" && flags.has(strange)) return fail(`unknown flag: --${strange}`);
  const node = await good<Node>(nodePath(name)),
    on = verb !== "uncordon";
  if (!!node.spec.unschedulable !== on)
    await good(nodePath(name), "", {
      method: "PATCH",
      body: {
        spec: {
          unschedulable: on || null,
          taints: on ? [{ effect: "NoSchedule", key: "node.kubernetes.io/unschedulable" }] : null,
        },
      },
    });
  const first = `node/${name} ${!!node.spec.unschedulable === on ? "already " : ""}${on ? "cordoned" : "uncordoned"}\n`;
  if (verb !== "drain") return first;
  await sleep(200);
  return `${first}node/${name} ${gen === "old" ? "evicted" : "drained"}\n`;
}

const clientVersion = (version: string): string =>
  generation(version) === "old"
    ? `Client Version: version.Info{Major:"1", Minor:"${/^v1\.(\d+)/.exec(version)![1]}", GitVersion:"${version}"}\n`
    : `Client Version: ${version}\nKustomize Version: v5.8.1\n`;

export async function kubectl(version: string, args: string[]): Promise<void> {
  try {
    process.stdout.write(await run(version, args));
  } catch (error) {
    if (!(error instanceof KubectlError)) throw error;
    process.stderr.write(`${error.message}\n`);
    process.exitCode = 1;
  }
}

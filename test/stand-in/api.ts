/** What answers on 6443: the supervisor's paths, which nodes join by, and as much of Kubernetes as is needed. */
import { createHash, randomBytes, randomUUID } from "node:crypto";
import { EventEmitter } from "node:events";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import type { IncomingMessage } from "node:http";
import { basename, join } from "node:path";
import type { TLSSocket } from "node:tls";
import type { Generation } from "./common.ts";
import type { Deployment, Usage } from "./metrics.ts";
import * as rules from "./nodes.ts";
import { type Ca, type Subject, sign } from "./pki.ts";
import { ADDRESSES } from "./services.ts";

export type State = {
  nodes: Record<string, rules.Node>;
  passwords: Record<string, string>;
  deployment: Deployment | null;
  /** What the deploy controller has applied, by its checksums. */
  addons?: Record<string, string>;
  tokenHash: string;
  /** The secret k3s-serving: 6443's certificate and key. */
  serving?: string;
  starts: number;
  version: number;
};

/** A server, as its handlers and its timers share it. */
export type Cluster = {
  gen: Generation;
  version: string;
  hostname: string;
  port: number;
  advertised: string;
  backend: string;
  externalFirst: boolean;
  ca: Ca;
  clientCa: Ca;
  /** The path of a key in server/tls. */
  keyed: (name: string) => string;
  credDir: string;
  /** Lines of cred/passwd as they were at the start: a rotated token counts from the next one on (v1.36.3, seen). */
  logins: string[];
  state: State;
  save: () => void;
  /** Objects of a kind as they were at a revision; undefined: it is not here yet. Without SQLite: none. */
  at: (resource: string, revision: number) => unknown[] | undefined;
  /** Where several servers share it: what becomes of a node or its password there; undefined: it goes. */
  share?: (key: string, value: string | undefined) => void;
  /** Advertised addresses of all servers. */
  servers: string[];
  apiUp: boolean;
  /** When a kubelet last spoke. */
  seen: Map<string, number>;
  /** undefined until metrics-server has tried once. */
  usage: Map<string, Usage> | undefined;
  /** metrics-server's log. */
  metricsLog: string[];
};

export type Reply = {
  code: number;
  type: string;
  body: string;
  headers?: Record<string, string>;
  /** A watch: what it has to say now, and anew after each change; it ends after so many seconds. */
  watch?: { more: () => string; seconds: number };
};
type Question = { method: string; url: URL; req: IncomingMessage; body: string };

export const hash = (text: string): string => createHash("sha256").update(text).digest("hex");
const quote = (text: string): string => JSON.stringify(text);
const file = (path: string): string => readFileSync(path, "utf8");
const text = (code: number, body: string): Reply => ({ code, type: "text/plain; charset=utf-8", body });
const json = (code: number, body: unknown): Reply => ({
  code,
  type: "application/json",
  body: JSON.stringify(body, null, 2),
});
const notFound = text(404, "404 page not found\n");

const status = (code: number, reason: string, message: string, more: object = {}): Reply =>
  json(code, {
    kind: "Status",
    apiVersion: "v1",
    metadata: {},
    status: "Failure",
    message,
    reason,
    ...more,
    code,
  });
const nodeStatus = (code: number, reason: string, message: string, name: string): Reply =>
  status(code, reason, message, { details: { name, kind: "nodes" } });

export const sortedNodes = (c: Cluster): rules.Node[] =>
  Object.values(c.state.nodes).sort((a, b) => (a.metadata.name < b.metadata.name ? -1 : 1));

/** @param ours what every server works out for itself: no other needs to be told, or is overwritten by what is older. */
export function putNode(c: Cluster, node: rules.Node, ours = false): rules.Node {
  node.metadata.resourceVersion = String(++c.state.version);
  c.state.nodes[node.metadata.name] = node;
  if (!ours) c.share?.(`/registry/minions/${node.metadata.name}`, JSON.stringify(node));
  c.save();
  changes.emit("node");
  return node;
}

/** Whoever watches nodes hears of it here. */
export const changes = new EventEmitter().setMaxListeners(0);

export function answer(c: Cluster, q: Question): Reply {
  const path = q.url.pathname;
  if (path === "/cacerts") return { ...text(200, file(c.ca.crt)), type: "text/plain" };
  if (path === "/ping") return text(200, "pong");
  if (path.startsWith("/v1-k3s/")) return supervisor(c, q, path.slice("/v1-k3s/".length));
  const reply = kubernetes(c, q);
  if (reply.watch) return reply;
  // One line, but for curl and whom asks for more (isPrettyPrint of the API server, both generations).
  const pretty = q.url.searchParams.get("pretty") ?? String(/^curl/.test(q.req.headers["user-agent"] ?? ""));
  return pretty !== "true" && reply.type === "application/json"
    ? { ...reply, body: JSON.stringify(JSON.parse(reply.body)) }
    : reply;
}

/** A password first, then a certificate. undefined: wrong credentials; null: none. */
function identify(c: Cluster, req: IncomingMessage, passwords: boolean): rules.User | null | undefined {
  const basic = passwords ? /^Basic (.+)$/.exec(req.headers.authorization ?? "")?.[1] : undefined;
  if (basic) {
    const credentials = Buffer.from(basic, "base64").toString();
    const found = c.logins.map((l) => l.split(",")).find((l) => credentials === `${l[1]}:${l[0]}`);
    if (found) return { name: found[1]!, groups: [found[3]!] };
  }
  const socket = req.socket as TLSSocket;
  if (!socket.authorized) return basic ? undefined : null;
  const { CN, O } = socket.getPeerCertificate().subject;
  return { name: String(CN), groups: O ? [O].flat() : [] };
}

/** v1.17 keeps node passwords in a file, which people edit; modern k3s in secrets, which go with their node. */
function nodePasswordOk(c: Cluster, name: string, secret: string): boolean {
  if (c.gen === "modern") {
    if (c.state.passwords[name]) return c.state.passwords[name] === hash(secret);
    c.state.passwords[name] = hash(secret);
    c.share?.(`/registry/passwords/${name}`, hash(secret));
    c.save();
    return true;
  }
  const path = join(c.credDir, "node-passwd"),
    known = existsSync(path) ? file(path) : "";
  const line = known.split("\n").find((l) => l.split(",")[1] === name);
  if (line) return line.split(",")[0] === secret;
  writeFileSync(path, `${known}${secret},${name},${name},\n`, { mode: 0o600 });
  return true;
}

/** What servers of one datastore have in common: their CAs. */
export const bootstrap = (c: Cluster): string =>
  JSON.stringify(
    Object.fromEntries(
      [c.ca, c.clientCa].flatMap(({ crt, key }) => [crt, key].map((path) => [basename(path), file(path)])),
    ),
  );

/** The server's password, and the nodes' where it is the same, as the file of passwords and the token file have it. */
function rotateToken(c: Cluster, user: string): Reply {
  const passwd = join(c.credDir, "passwd"),
    tokenFile = join(c.credDir, "..", "token"),
    next = randomBytes(16).toString("hex");
  const lines = file(passwd).split("\n");
  const old = lines.find((l) => l.split(",")[1] === user)?.split(",")[0];
  writeFileSync(
    passwd,
    lines.map((l) => (l.startsWith(`${old},`) ? next + l.slice(old?.length) : l)).join("\n"),
  );
  writeFileSync(tokenFile, file(tokenFile).replace(/[^:]+$/, `${next}\n`));
  // Real k3s encrypts its data anew only now (pkg/server/handlers/token.go).
  if (existsSync("/run/stand-in-dies-rotating")) process.kill(process.pid, "SIGKILL");
  c.state.tokenHash = hash(next);
  c.save();
  // Servers of one datastore find their CAs there by the token.
  c.share?.(`/bootstrap/${hash(next)}`, bootstrap(c));
  c.share?.(`/bootstrap/${hash(old ?? "")}`, undefined);
  return text(200, "");
}

function supervisor(c: Cluster, { req }: Question, path: string): Reply {
  const { gen } = c;
  const user = identify(c, req, true);
  const refuse = (code: number, reason: string, message: string): Reply =>
    gen === "old"
      ? text(401, "")
      : json(code, { kind: "Status", metadata: {}, status: "Failure", message, reason, code });
  if (user === undefined) return refuse(401, "Unauthorized", "not authorized");
  if (path === "token" && gen === "modern" && req.method === "PUT" && user?.groups.includes("k3s:server"))
    return rotateToken(c, user.name);
  const roles = gen === "old" ? ["k3s:agent"] : ["k3s:agent", "system:nodes"];
  if (!user?.groups.some((g) => roles.includes(g))) return refuse(403, "Forbidden", "forbidden");

  const send = (key: string, ca: Ca, subject: Subject): Reply =>
    text(200, sign(gen, ca, c.keyed(key), subject) + file(ca.crt) + file(c.keyed(key)));
  const name = String(req.headers["k3s-node-name"] ?? "").toLowerCase();
  const secret = String(req.headers["k3s-node-password"] ?? "");
  const nodeError = (): Reply | undefined => {
    if (!name || !secret)
      return text(gen === "old" ? 500 : 400, `node ${name ? "password" : "name"} not set`);
    if (gen === "modern" && user.name.startsWith("system:node:")) {
      if (user.name !== `system:node:${name}`)
        return text(400, "header node name does not match auth node name");
      if (!c.state.nodes[name])
        return text(401, `unable to verify node identity: nodes ${quote(name)} not found`);
    }
    if (nodePasswordOk(c, name, secret)) return undefined;
    const passwd = join(c.credDir, "node-passwd");
    return text(
      403,
      gen === "old"
        ? `Node password validation failed for '${name}', using passwd file '${passwd}'`
        : `unable to verify password for node ${name}: hash does not match`,
    );
  };
  // In v1.17 all nodes have copies of the server's (fileHandler).
  if (gen === "old" && /^client-k(ube-proxy|3s-controller)\.crt$/.test(path)) {
    const key = c.keyed(path.replace(/\.crt$/, ""));
    return text(200, file(key.replace(/key$/, "crt")) + file(key));
  }
  switch (path) {
    case "client-ca.crt":
      return text(200, file(c.clientCa.crt));
    case "server-ca.crt":
      return text(200, file(c.ca.crt));
    case "client-kube-proxy.crt":
      return send("client-kube-proxy", c.clientCa, { cn: "system:kube-proxy", usage: "clientAuth" });
    case "client-k3s-controller.crt":
      return send("client-k3s-controller", c.clientCa, { cn: "system:k3s-controller", usage: "clientAuth" });
    case "client-kubelet.crt": {
      const subject: Subject = { cn: `system:node:${name}`, o: "system:nodes", usage: "clientAuth" };
      return nodeError() ?? send("client-kubelet", c.clientCa, subject);
    }
    case "serving-kubelet.crt": {
      // v1.17's has no address of the node: metrics-server can check it by name only.
      const own = String(req.headers["k3s-node-ip"] ?? "").split(",");
      const ips = gen === "old" ? ["127.0.0.1"] : ["127.0.0.1", "::1", ...own.filter(Boolean)];
      const subject: Subject = { cn: name, dns: [name, "localhost"], ips, usage: "serverAuth" };
      return nodeError() ?? send("serving-kubelet", c.ca, subject);
    }
    case "config":
      return json(200, {
        AdvertisePort: c.port,
        ListenPort: 6444,
        HTTPSPort: c.port,
        ClusterDNS: "10.43.0.10",
        ClusterDomain: "cluster.local",
        FlannelBackend: c.backend,
        ...(gen === "modern" ? { FlannelExternalIP: c.externalFirst } : {}),
      });
  }
  if (gen === "old") return notFound;
  if (path === "apiservers")
    return json(
      200,
      c.servers.map((ip) => `${ip}:${c.port}`),
    );
  if (path !== "readyz") return notFound;
  return c.apiUp ? text(200, "ok") : refuse(503, "ServiceUnavailable", "runtime core not ready");
}

function kubernetes(c: Cluster, q: Question): Reply {
  const { gen } = c,
    path = q.url.pathname.replace(/\/+$/, "") || "/";
  if (!c.apiUp) return status(503, "ServiceUnavailable", "starting");
  // Modern k3s has passwords for its own paths only.
  const user = identify(c, q.req, gen === "old");
  if (!user) {
    const headers = { "Www-Authenticate": `Basic realm="kubernetes-master"` };
    return { ...status(401, "Unauthorized", "Unauthorized"), ...(gen === "old" ? { headers } : {}) };
  }
  if (["/readyz", "/livez", "/healthz"].includes(path)) {
    const verbose = q.url.searchParams.has("verbose");
    return text(200, verbose ? `[+]ping ok\n${path.slice(1)} check passed\n` : "ok");
  }
  if (path === "/version") {
    const minor = c.version.split(".")[1];
    const made = { gitTreeState: "clean", compiler: "gc", platform: "linux/amd64" };
    return json(200, { major: "1", minor, gitVersion: c.version, ...made });
  }
  if (path === "/api") return json(200, { kind: "APIVersions", versions: ["v1"] });
  if (path === "/apis") {
    const group = (name: string, version: string): object => ({
      name,
      versions: [{ groupVersion: `${name}/${version}`, version }],
    });
    const metrics = c.state.deployment ? [group("metrics.k8s.io", "v1beta1")] : [];
    return json(200, { kind: "APIGroupList", apiVersion: "v1", groups: [group("apps", "v1"), ...metrics] });
  }
  const log = /^\/api\/v1\/namespaces\/([^/]+)\/pods\/([^/]+)\/log$/.exec(path);
  if (log) {
    const [, namespace, name] = log;
    const no = rules.forbidden(gen, user, {
      verb: "get",
      resource: "pods",
      subresource: "log",
      namespace,
      name,
    });
    if (no) return status(403, "Forbidden", no);
    if (!c.state.deployment || name !== POD || namespace !== "kube-system")
      return status(404, "NotFound", `pods ${quote(decodeURIComponent(name!))} not found`);
    const tail = Number(q.url.searchParams.get("tailLines") ?? 1e6);
    return text(
      200,
      c.metricsLog
        .slice(-tail)
        .map((line) => `${line}\n`)
        .join(""),
    );
  }
  const node = /^\/api\/v1\/nodes(?:\/([^/]+))?(?:\/([^/]+))?$/.exec(path);
  if (node) return nodes(c, q, user, node[1] && decodeURIComponent(node[1]), node[2]);
  const other = /^\/(?:api\/v1|apis\/([^/]+)\/[^/]+)(?:\/namespaces\/([^/]+))?\/([a-z]+)(?:\/([^/]+))?$/.exec(
    path,
  );
  const deletes = q.method === "DELETE" && other?.[3] === "secrets" && other[4];
  if (!other || (q.method !== "GET" && !deletes)) return notFound;
  const [, group, namespace, resource, name] = other;
  const no = rules.forbidden(gen, user, {
    verb: deletes ? "delete" : name ? "get" : "list",
    resource: resource!,
    group,
    namespace,
    name,
  });
  if (no) return status(403, "Forbidden", no);
  const past = !name && listAt(c, resource!, q.url.searchParams);
  if (past) return past;
  const here = !namespace || namespace === "kube-system";
  switch (`${group ?? ""}/${resource}`) {
    case "metrics.k8s.io/nodes":
      return metrics(c, name);
    case "apps/deployments": {
      const found = here ? deployment(c) : undefined;
      if (!name) return listOf(c, "DeploymentList", "apps/v1", found ? [found] : []);
      return found && name === "metrics-server"
        ? json(200, found)
        : status(404, "NotFound", `deployments.apps ${quote(name)} not found`);
    }
    case "/pods": {
      if (name) return notFound;
      const pods = here && c.state.deployment ? [pod(c)].filter(selected(q.url.searchParams)) : [];
      return /as=Table;g=meta\.k8s\.io;v=v1(,|$)/.test(q.req.headers.accept ?? "")
        ? json(200, {
            kind: "Table",
            apiVersion: "meta.k8s.io/v1",
            metadata: {},
            columnDefinitions: [],
            rows: pods.map(({ metadata: { name }, status: { phase, conditions } }) => ({
              cells: [name, conditions[0]?.status === "True" ? "1/1" : "0/1", phase, "0", "1d"],
              object: null,
            })),
          })
        : listOf(c, "PodList", "v1", pods);
    }
    case "/endpoints":
      return namespace === "default" && name === "kubernetes"
        ? json(200, {
            apiVersion: "v1",
            kind: "Endpoints",
            metadata: { name, namespace },
            subsets: [
              {
                addresses: c.servers.map((ip) => ({ ip })),
                ports: [{ name: "https", port: c.port, protocol: "TCP" }],
              },
            ],
          })
        : notFound;
    case "/services": {
      const clusterIP = ADDRESSES[`${name}.${namespace}` as keyof typeof ADDRESSES];
      if (!name || !clusterIP)
        return name ? status(404, "NotFound", `services ${quote(name)} not found`) : notFound;
      const metadata = { name, namespace };
      return json(200, {
        kind: "Service",
        apiVersion: "v1",
        metadata,
        spec: { clusterIP, type: "ClusterIP" },
      });
    }
    case "/secrets": {
      // Of modern k3s's secrets only node passwords are imitated; v1.17 keeps those in a file.
      const ofNodes = gen === "modern" && here ? Object.keys(c.state.passwords) : [];
      if (!name) return listOf(c, "SecretList", "v1", ofNodes.map(passwordSecret));
      if (here && deletes && name === "k3s-serving" && c.state.serving) {
        delete c.state.serving;
        c.save();
        return json(200, { kind: "Status", apiVersion: "v1", metadata: {}, status: "Success" });
      }
      const node = ofNodes.find((node) => passwordSecret(node).metadata.name === name);
      if (!node) return status(404, "NotFound", `secrets ${quote(name)} not found`);
      if (!deletes) return json(200, passwordSecret(node));
      delete c.state.passwords[node];
      c.save();
      return json(200, { kind: "Status", apiVersion: "v1", metadata: {}, status: "Success" });
    }
    case "/events":
      return name ? notFound : listOf(c, "EventList", "v1", []);
  }
  return notFound;
}

/** By `labelSelector`: `key=value` or `key in (one,other)`, separated by commas. */
const selected =
  (query: URLSearchParams) =>
  ({ metadata: { labels } }: { metadata: { labels: Record<string, string> } }): boolean =>
    [...(query.get("labelSelector") ?? "").matchAll(/([\w./-]+)(?: in \(([^)]*)\)|==?([^,]*))/g)].every(
      ([, key, several, one]) => (several?.split(",") ?? [one]).includes(labels[key as string] ?? ""),
    );

const passwordSecret = (node: string) => ({
  apiVersion: "v1",
  kind: "Secret",
  type: "k3s.cattle.io/node-password",
  metadata: { name: `${node}.node-password.k3s`, namespace: "kube-system" },
});

function listOf(c: Cluster, kind: string, apiVersion: string, items: unknown[]): Reply {
  const metadata = {
    resourceVersion: String(c.state.version),
    ...(c.gen === "old" ? { selfLink: "" } : {}),
  };
  return json(200, { kind, apiVersion, metadata, items });
}

const LISTS: Record<string, [kind: string, apiVersion: string]> = {
  nodes: ["NodeList", "v1"],
  secrets: ["SecretList", "v1"],
  deployments: ["DeploymentList", "apps/v1"],
};

/** With a limit a list is the one of exactly that revision (both generations, seen). */
function listAt(c: Cluster, resource: string, query: URLSearchParams): Reply | undefined {
  const revision = Number(query.get("resourceVersion") ?? 0);
  const list = LISTS[resource];
  if (!list || !revision || !query.get("limit") || query.get("watch")) return undefined;
  const items = c.at(resource, revision);
  return items
    ? listOf(c, ...list, resource === "nodes" ? (items as rules.Node[]).map(rules.ordered) : items)
    : status(504, "Timeout", `Too large resource version: ${revision}, current: ${c.state.version}`);
}

/** A line of a watch. */
const event = (type: string, object: object): string => `${JSON.stringify({ type, object })}\n`;
const nodeEvent = (type: string, node: rules.Node): string =>
  event(type, { kind: "Node", apiVersion: "v1", ...rules.ordered(node) });

function nodes(c: Cluster, q: Question, user: rules.User, name?: string, subresource?: string): Reply {
  const { gen, state } = c,
    query = q.url.searchParams;
  const verbs: Record<string, rules.Verb> = {
    GET: name ? "get" : query.get("watch") ? "watch" : "list",
    POST: "create",
    PATCH: "patch",
    PUT: "update",
    DELETE: "delete",
  };
  const verb = verbs[q.method] ?? "get",
    fieldSelector = query.get("fieldSelector") ?? undefined;
  const no = rules.forbidden(gen, user, { verb, resource: "nodes", name, subresource, fieldSelector });
  if (no) return nodeStatus(403, "Forbidden", no, name ?? "");
  const wanted = (n: rules.Node): boolean =>
    !fieldSelector || fieldSelector === `metadata.name=${n.metadata.name}`;
  const past = verb === "list" && listAt(c, "nodes", query);
  if (past) return past;
  if (verb === "watch") {
    // Of what was before it knows nothing: the real one has it for some minutes.
    const since = Number(query.get("resourceVersion") ?? 0);
    if (since && since !== state.version) {
      const message = `too old resource version: ${since} (${state.version})`;
      const expired = { metadata: {}, status: "Failure", message, reason: "Expired", code: 410 };
      let lines = event("ERROR", { kind: "Status", apiVersion: "v1", ...expired });
      const more = (): string => {
        const once = lines;
        lines = "";
        return once;
      };
      return { ...json(200, {}), body: "", watch: { more, seconds: 0 } };
    }
    let told: rules.Node[] = [];
    const more = (): string => {
      const before = new Map(told.map((n) => [n.metadata.name, n]));
      told = sortedNodes(c)
        .filter(wanted)
        .map((n) => structuredClone(n));
      const lines = told.flatMap((n) => {
        const was = before.get(n.metadata.name)?.metadata.resourceVersion;
        before.delete(n.metadata.name);
        return was === n.metadata.resourceVersion ? [] : nodeEvent(was ? "MODIFIED" : "ADDED", n);
      });
      // It has the version at which it went.
      const resourceVersion = String(state.version);
      const gone = [...before.values()].map((n) => ({ ...n, metadata: { ...n.metadata, resourceVersion } }));
      return [...gone.map((n) => nodeEvent("DELETED", n)), ...lines].join("");
    };
    if (since) more();
    const seconds = Number(query.get("timeoutSeconds")) || 1800;
    return { ...json(200, {}), body: "", watch: { more, seconds } };
  }
  if (verb === "list") {
    const items = sortedNodes(c).filter(wanted).map(rules.ordered);
    return listOf(c, "NodeList", "v1", items);
  }
  if (verb === "create") return createNode(c, JSON.parse(q.body) as rules.Node, user);
  const node = state.nodes[name ?? ""];
  if (name && !node) return nodeStatus(404, "NotFound", `nodes ${quote(name)} not found`, name);
  if (name && verb === "get")
    return json(200, { kind: "Node", apiVersion: "v1", ...rules.ordered(node as rules.Node) });
  if (name && verb === "patch") return patchNode(c, q, user, node!, subresource);
  if (name && verb === "delete") {
    delete state.nodes[name];
    state.version++;
    c.share?.(`/registry/minions/${name}`, undefined);
    if (gen === "modern") {
      delete state.passwords[name];
      c.share?.(`/registry/passwords/${name}`, undefined);
    }
    c.save();
    changes.emit("node");
    const details = { name, kind: "nodes", uid: node!.metadata.uid };
    return json(200, { kind: "Status", apiVersion: "v1", metadata: {}, status: "Success", details });
  }
  const message = "the server does not allow this method on the requested resource";
  return status(405, "MethodNotAllowed", message);
}

function createNode(c: Cluster, made: rules.Node, user: rules.User): Reply {
  const { name } = made.metadata;
  const no = rules.forbidden(c.gen, user, { verb: "create", resource: "nodes", name });
  if (no) return nodeStatus(403, "Forbidden", no, name);
  if (c.state.nodes[name])
    return nodeStatus(409, "AlreadyExists", `nodes ${quote(name)} already exists`, name);
  made.metadata.uid = randomUUID();
  if (c.gen === "old") made.metadata.selfLink = `/api/v1/nodes/${name}`;
  c.seen.set(name, Date.now());
  return json(201, putNode(c, c.servers[0] === c.advertised ? withPodCidr(c, made) : made));
}

/** What the controller manager gives a node; of several servers that of the first has the lease. */
export function withPodCidr(c: Cluster, node: rules.Node): rules.Node {
  const taken = sortedNodes(c).map((n) => n.spec.podCIDR);
  const podCIDR = rules.podCidr("10.42.0.0/16", taken);
  return { ...node, spec: { ...node.spec, podCIDR, podCIDRs: [podCIDR] } };
}

const PATCH_TYPES = ["json-patch+json", "merge-patch+json", "strategic-merge-patch+json"];

function patchNode(c: Cluster, q: Question, user: rules.User, node: rules.Node, subresource?: string): Reply {
  const { name } = node.metadata;
  let patch: Partial<rules.Node>;
  try {
    patch = JSON.parse(q.body) as Partial<rules.Node>;
  } catch {
    return status(400, "BadRequest", "error decoding patch");
  }
  if (!/^application\/(strategic-)?merge-patch\+json/.test(q.req.headers["content-type"] ?? "")) {
    const accepted = PATCH_TYPES.map((t) => `application/${t}`).join(", ");
    const message = `the body of the request was in an unknown format - accepted media types include: ${accepted}`;
    return status(415, "UnsupportedMediaType", message);
  }
  const { metadata, spec } = patch;
  const part = subresource === "status" ? { metadata, status: patch.status } : { metadata, spec };
  const next = rules.mergePatch(node, part) as rules.Node;
  if (part.status?.conditions)
    next.status.conditions = rules.mergeConditions(node.status.conditions, part.status.conditions);
  const strange = Object.entries(next.metadata.annotations).find(([, v]) => typeof v !== "string");
  if (strange) {
    const field = "Go struct field ObjectMeta.metadata.annotations";
    return status(400, "BadRequest", `json: cannot unmarshal into ${field} of type string: ${strange[0]}`);
  }
  if (user.name.startsWith("system:node:")) {
    const bad = rules.forbiddenLabels(node.metadata.labels, next.metadata.labels).join(", ");
    if (bad) {
      const message = `nodes ${quote(name)} is forbidden: is not allowed to modify labels: ${bad}`;
      return nodeStatus(403, "Forbidden", message, name);
    }
    if (JSON.stringify(next.spec.taints ?? []) !== JSON.stringify(node.spec.taints ?? [])) {
      const message = `nodes ${quote(name)} is forbidden: node ${quote(name)} is not allowed to modify taints`;
      return nodeStatus(403, "Forbidden", message, name);
    }
    if (part.status) c.seen.set(name, Date.now());
  }
  next.metadata.name = name;
  return json(200, putNode(c, next));
}

/** v0.3's metrics-server calls itself ready at once, a modern one after its first success. */
function metricsReady(c: Cluster): boolean {
  if (!c.state.deployment || !c.usage || (c.gen === "modern" && !c.usage.size)) return false;
  const conditions = c.state.nodes[c.hostname]?.status.conditions ?? [];
  return conditions.some((n) => n.type === "Ready" && n.status === "True");
}

function metrics(c: Cluster, name?: string): Reply {
  if (!c.state.deployment) return notFound;
  if (!metricsReady(c))
    return status(503, "ServiceUnavailable", "the server is currently unable to handle the request");
  const apiVersion = "metrics.k8s.io/v1beta1",
    timestamp = new Date().toISOString().replace(/\.\d+/, "");
  const known = [...(c.usage ?? [])].filter(([n]) => c.state.nodes[n]).sort();
  const items = known.map(([n, usage]) => ({
    metadata: { name: n, creationTimestamp: timestamp },
    timestamp,
    usage,
    window: "10s",
  }));
  if (!name) return json(200, { kind: "NodeMetricsList", apiVersion, metadata: {}, items });
  const item = items.find((i) => i.metadata.name === name);
  return item
    ? json(200, { kind: "NodeMetrics", apiVersion, ...item })
    : status(404, "NotFound", `nodemetrics.metrics.k8s.io ${quote(name)} not found`);
}

const LABELS = { "k8s-app": "metrics-server" };
const POD = "metrics-server-0000000000-00000";

function deployment(c: Cluster): object | undefined {
  const d = c.state.deployment;
  if (!d) return undefined;
  const available = metricsReady(c) ? { availableReplicas: 1, readyReplicas: 1 } : { unavailableReplicas: 1 };
  const containers = [{ args: d.args, image: d.image, name: "metrics-server" }];
  return {
    apiVersion: "apps/v1",
    kind: "Deployment",
    metadata: { annotations: {}, labels: LABELS, name: "metrics-server", namespace: "kube-system" },
    spec: {
      replicas: 1,
      selector: { matchLabels: LABELS },
      template: { metadata: { labels: LABELS }, spec: { containers } },
    },
    status: { observedGeneration: 1, replicas: 1, updatedReplicas: 1, ...available },
  };
}

function pod(c: Cluster) {
  const up = metricsReady(c);
  return {
    metadata: { name: POD, namespace: "kube-system", labels: LABELS },
    spec: { containers: [{ args: c.state.deployment?.args, name: "metrics-server" }], nodeName: c.hostname },
    status: {
      phase: up ? "Running" : "Pending",
      conditions: [{ type: "Ready", status: up ? "True" : "False" }],
    },
  };
}

/** `k3s server`: files, certificates, the API on 6443; then the agent in the same process. */
import { createHash, randomBytes, randomUUID } from "node:crypto";
import { chmodSync, existsSync, lstatSync, mkdirSync, readFileSync, renameSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import type { IncomingMessage, ServerResponse } from "node:http";
import { createServer, type Server } from "node:https";
import { dirname, join } from "node:path";
import { type TLSSocket } from "node:tls";
import { runAgent } from "./agent.ts";
import { build, DELAY, fatal, type Generation, hostAddress, log, ready, shutdown, sleep } from "./common.ts";
import { list, one, type Values } from "./flags.ts";
import { type Deployment, deployPass, scrape, stage } from "./metrics.ts";
import { type Ask, cloudAddresses, forbidden, forbiddenLabels, mergeConditions, mergePatch, type Node, podCidr, unknownCondition, type User, type Verb } from "./nodes.ts";
import { makeCa, newKey, sign, type Subject } from "./pki.ts";
import { NO_ROUTE, otherToken, portTaken, unknownBackend } from "./words.ts";

type State = { nodes: Record<string, Node>; passwords: Record<string, string>; deployment: Deployment | null; tokenHash: string; starts: number; version: number };
export type Start = { gen: Generation; version: string; values: Values; argv: string[]; notify?: string };

const hash = (text: string): string => createHash("sha256").update(text).digest("hex");
const NETWORK = "10.42.0.0/16";

/** The names on the API's certificate. */
export function servingNames(gen: Generation, values: Values, hostname: string, hostIp?: string): { dns: string[]; ips: string[] } {
  const given = gen === "old" ? values["tls-san"] ?? [] : list(values, "tls-san");
  const nodeIps = list(values, "node-ip"), external = list(values, "node-external-ip");
  const advertised = one(values, "advertise-address") ?? external[0] ?? nodeIps[0];
  const names = gen === "old"
    ? ["kubernetes", "kubernetes.default", "kubernetes.default.svc.cluster.local", "localhost", "10.43.0.1", "127.0.0.1", ...(hostIp ? [hostIp] : []), ...given, ...(advertised ? [advertised] : [])]
    : [hostname, "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost", "10.43.0.1", "127.0.0.1", "::1",
      ...(nodeIps.length ? nodeIps : hostIp ? [hostIp] : []), ...given, ...external, ...(advertised ? [advertised] : [])];
  const isIp = (n: string): boolean => /^[\d.]+$|:/.test(n);
  const unique = [...new Set(names)];
  return { dns: unique.filter((n) => !isIp(n)), ips: unique.filter(isIp) };
}

/** The password of a token in any of its forms. */
export const passwordOf = (token: string): string => token.trim().replace(/^K10[^]*?::/, "").replace(/^[^:]*:/, "");

export async function runServer(start: Start): Promise<void> {
  const { gen, version, values, argv } = start;
  const hostname = (one(values, "node-name") ?? readFileSync("/proc/sys/kernel/hostname", "utf8")).trim().toLowerCase();
  const hostIp = hostAddress();
  if (gen === "modern" && !hostIp && !values["node-ip"]) fatal(gen, NO_ROUTE);
  if (one(values, "server")) fatal(gen, "stand-in: one server only, --server is not imitated");
  log("info", `Starting k3s ${build(version)}`);

  const data = one(values, "data-dir") ?? "/var/lib/rancher/k3s", dir = join(data, "server"), tls = join(dir, "tls"), cred = join(dir, "cred");
  for (const d of [dir, tls, cred, join(dir, "db"), join(dir, "manifests")]) mkdirSync(d, { recursive: true, mode: 0o700 });
  process.chdir(dir);
  const port = Number(one(values, "https-listen-port") ?? 6443);

  const statePath = join(dir, "db", "stand-in.json");
  const state: State = existsSync(statePath)
    ? JSON.parse(readFileSync(statePath, "utf8")) as State
    : { nodes: {}, passwords: {}, deployment: null, tokenHash: "", starts: 0, version: 1 };
  const save = (): void => {
    writeFileSync(`${statePath}.new`, JSON.stringify(state), { mode: 0o600 });
    renameSync(`${statePath}.new`, statePath);
  };

  const tokenPath = join(dir, "token"), tokenFile = one(values, "token-file");
  const given = tokenFile ? readFileSync(tokenFile, "utf8").trim() : one(values, "token") ?? one(values, "cluster-secret");
  const password = given ? passwordOf(given) : existsSync(tokenPath) ? passwordOf(readFileSync(tokenPath, "utf8")) : randomBytes(16).toString("hex");
  if (gen === "modern" && state.tokenHash && state.tokenHash !== hash(password)) {
    log("info", "Shutdown request received");
    fatal(gen, otherToken);
  }
  if (gen === "old" && state.tokenHash) log("info", "Cluster bootstrap already complete");

  const ca = { crt: join(tls, "server-ca.crt"), key: join(tls, "server-ca.key") };
  const clientCa = { crt: join(tls, "client-ca.crt"), key: join(tls, "client-ca.key") };
  if (!existsSync(ca.crt)) makeCa(gen, ca, "k3s-server-ca");
  if (!existsSync(clientCa.crt)) makeCa(gen, clientCa, "k3s-client-ca");
  const keyed = (name: string): string => {
    const path = join(tls, `${name}.key`);
    if (!existsSync(path)) newKey(path);
    return path;
  };
  const client = (name: string, cn: string, o?: string): string => {
    const path = join(tls, `${name}.crt`);
    writeFileSync(path, sign(gen, clientCa, keyed(name), { cn, o, usage: "clientAuth" }) + readFileSync(clientCa.crt, "utf8"), { mode: 0o644 });
    chmodSync(path, 0o644);
    return path;
  };
  const admin = client("client-admin", "system:admin", "system:masters");
  const controllerKey = keyed("client-k3s-controller"), proxyKey = keyed("client-kube-proxy"), kubeletKey = keyed("client-kubelet"), servingKubeletKey = keyed("serving-kubelet");
  const serving = { cn: "k3s", o: "k3s", usage: "serverAuth", ...servingNames(gen, values, hostname, hostIp) } satisfies Subject;
  const servingKey = keyed("serving-kube-apiserver");
  const servingText = sign(gen, ca, servingKey, serving) + readFileSync(ca.crt, "utf8");
  writeFileSync(join(tls, "serving-kube-apiserver.crt"), servingText, { mode: 0o644 });

  const passwdPath = join(cred, "node-passwd");
  const adminPassword = existsSync(join(cred, "passwd")) ? readFileSync(join(cred, "passwd"), "utf8").split(",")[0] : randomBytes(16).toString("hex");
  writeFileSync(join(cred, "passwd"), (gen === "old" ? `${adminPassword},admin,admin,system:masters\n` : "") + `${password},node,node,k3s:agent\n${password},server,server,k3s:server\n`, { mode: 0o600 });

  /** v1.17 keeps node passwords in a file, which people edit; modern k3s in secrets, which go with their node. */
  const nodePasswordOk = (name: string, secret: string): boolean => {
    if (gen === "modern") {
      if (state.passwords[name]) return state.passwords[name] === hash(secret);
      state.passwords[name] = hash(secret);
      save();
      return true;
    }
    const text = existsSync(passwdPath) ? readFileSync(passwdPath, "utf8") : "";
    const line = text.split("\n").find((l) => l.split(",")[1] === name);
    if (line) return line.split(",")[0] === secret;
    writeFileSync(passwdPath, `${text}${secret},${name},${name},\n`, { mode: 0o600 });
    return true;
  };

  let apiUp = false;
  const seen = new Map<string, number>();
  let usage = new Map<string, { cpu: string; memory: string }>();
  let scraped = false;

  /** undefined: wrong credentials; null: none. */
  function identify(req: IncomingMessage): User | null | undefined {
    const socket = req.socket as TLSSocket;
    if (socket.authorized) {
      const { CN, O } = socket.getPeerCertificate().subject;
      return { name: String(CN), groups: O ? [O].flat() : [] };
    }
    const basic = /^Basic (.+)$/.exec(req.headers.authorization ?? "")?.[1];
    if (!basic) return null;
    const [name, secret] = Buffer.from(basic, "base64").toString().split(/:([^]*)/);
    const line = readFileSync(join(cred, "passwd"), "utf8").trim().split("\n").map((l) => l.split(",")).find((l) => l[1] === name);
    return line && line[0] === secret ? { name, groups: [line[3]] } : undefined;
  }

  const json = (res: ServerResponse, code: number, body: unknown, headers: Record<string, string> = {}): void => {
    res.writeHead(code, { "Content-Type": "application/json", ...headers });
    res.end(JSON.stringify(body, null, 2));
  };
  const text = (res: ServerResponse, code: number, body: string): void => {
    res.writeHead(code, { "Content-Type": "text/plain; charset=utf-8" });
    res.end(body);
  };
  const status = (res: ServerResponse, code: number, reason: string, message: string, more: object = {}): void =>
    json(res, code, { kind: "Status", apiVersion: "v1", metadata: {}, status: "Failure", message, reason, ...more, code }, code === 401 && gen === "old" ? { "Www-Authenticate": `Basic realm="kubernetes-master"` } : {});

  /** The supervisor's own paths, which nodes join by. */
  function supervisor(path: string, req: IncomingMessage, res: ServerResponse): void {
    const user = identify(req);
    const refuse = (code: number, message: string): void =>
      gen === "old" ? text(res, 401, "") : json(res, code, { kind: "Status", metadata: {}, status: "Failure", message, reason: code === 401 ? "Unauthorized" : "Forbidden", code });
    const roles = gen === "old" ? ["k3s:agent"] : ["k3s:agent", "system:nodes"];
    if (user === undefined) return refuse(401, "not authorized");
    if (!user?.groups.some((g) => roles.includes(g))) return refuse(403, "forbidden");
    const read = (file: string): string => readFileSync(file, "utf8");
    const send = (key: string, signer: typeof ca, subject: Subject): void => text(res, 200, sign(gen, signer, key, subject) + read(signer.crt) + read(key));
    const name = String(req.headers["k3s-node-name"] ?? "").toLowerCase(), secret = String(req.headers["k3s-node-password"] ?? "");
    const nodeError = (): boolean => {
      if (!name || !secret) text(res, gen === "old" ? 500 : 400, name ? "node password not set" : "node name not set");
      else if (gen === "modern" && user.name.startsWith("system:node:") && user.name !== `system:node:${name}`) text(res, 400, "header node name does not match auth node name");
      else if (gen === "modern" && user.name.startsWith("system:node:") && !state.nodes[name]) text(res, 401, `unable to verify node identity: nodes ${JSON.stringify(name)} not found`);
      else if (!nodePasswordOk(name, secret)) text(res, 403, gen === "old" ? `Node password validation failed for '${name}', using passwd file '${passwdPath}'` : `unable to verify password for node ${name}: hash does not match`);
      else return false;
      return true;
    };
    switch (path.slice("/v1-k3s/".length)) {
      case "client-ca.crt":
        return text(res, 200, read(clientCa.crt));
      case "server-ca.crt":
        return text(res, 200, read(ca.crt));
      case "client-kube-proxy.crt":
        return send(proxyKey, clientCa, { cn: "system:kube-proxy", usage: "clientAuth" });
      case "client-k3s-controller.crt":
        return send(controllerKey, clientCa, { cn: "system:k3s-controller", usage: "clientAuth" });
      case "client-kubelet.crt":
        return nodeError() ? undefined : send(kubeletKey, clientCa, { cn: `system:node:${name}`, o: "system:nodes", usage: "clientAuth" });
      case "serving-kubelet.crt": {
        const own = gen === "modern" ? String(req.headers["k3s-node-ip"] ?? "").split(",").filter(Boolean) : [];
        return nodeError() ? undefined : send(servingKubeletKey, ca, { cn: name, dns: [name, "localhost"], ips: ["127.0.0.1", ...(gen === "modern" ? ["::1"] : []), ...own], usage: "serverAuth" });
      }
      case "config":
        return json(res, 200, { AdvertisePort: port, ListenPort: 6444, HTTPSPort: port, ClusterDNS: "10.43.0.10", ClusterDomain: "cluster.local", FlannelBackend: backend, ...(gen === "modern" ? { FlannelExternalIP: externalFirst } : {}) });
      case "readyz":
        if (gen === "modern") return apiUp ? text(res, 200, "ok") : json(res, 503, { kind: "Status", metadata: {}, status: "Failure", message: "runtime core not ready", reason: "ServiceUnavailable", code: 503 });
        break;
      case "apiservers":
        if (gen === "modern") return json(res, 200, [`${advertised ?? "127.0.0.1"}:${port}`]);
    }
    text(res, 404, "404 page not found\n");
  }

  const backend = one(values, "flannel-backend") ?? "vxlan", externalFirst = !!one(values, "flannel-external-ip");
  const advertised = one(values, "advertise-address") ?? list(values, "node-external-ip")[0] ?? list(values, "node-ip")[0] ?? hostIp;
  const sorted = (): Node[] => Object.values(state.nodes).sort((a, b) => (a.metadata.name < b.metadata.name ? -1 : 1));
  const put = (node: Node): Node => {
    node.metadata.resourceVersion = String(++state.version);
    state.nodes[node.metadata.name] = node;
    save();
    return node;
  };
  const objectList = (kind: string, apiVersion: string, items: unknown[]): object => ({ apiVersion, items, kind, metadata: { resourceVersion: String(state.version), ...(gen === "old" ? { selfLink: "" } : {}) } });

  function nodes(parts: string[], url: URL, user: User, req: IncomingMessage, res: ServerResponse, body: string): void {
    const [name, subresource] = parts;
    const verbs: Record<string, Verb> = { GET: name ? "get" : url.searchParams.get("watch") ? "watch" : "list", POST: "create", PATCH: "patch", PUT: "update", DELETE: "delete" };
    const asked: Ask = { verb: verbs[req.method ?? ""] ?? "get", resource: "nodes", name, subresource, fieldSelector: url.searchParams.get("fieldSelector") ?? undefined };
    const details = { details: { name, kind: "nodes" } };
    const no = forbidden(gen, user, asked);
    if (no) return status(res, 403, "Forbidden", no, details);
    const node = name ? state.nodes[name] : undefined;
    if (name && !node) return status(res, 404, "NotFound", `nodes ${JSON.stringify(name)} not found`, details);
    const kubelet = user.name.startsWith("system:node:");
    switch (asked.verb) {
      case "get":
        return json(res, 200, node);
      case "list":
        return json(res, 200, objectList("NodeList", "v1", sorted().filter((n) => !asked.fieldSelector || asked.fieldSelector === `metadata.name=${n.metadata.name}`)));
      case "create": {
        const made = JSON.parse(body) as Node;
        if (kubelet && user.name !== `system:node:${made.metadata.name}`) return status(res, 403, "Forbidden", `nodes ${JSON.stringify(made.metadata.name)} is forbidden: node ${JSON.stringify(user.name.slice(12))} is not allowed to modify node ${JSON.stringify(made.metadata.name)}`);
        if (state.nodes[made.metadata.name]) return status(res, 409, "AlreadyExists", `nodes ${JSON.stringify(made.metadata.name)} already exists`);
        const cidr = podCidr(NETWORK, sorted().map((n) => n.spec.podCIDR));
        made.metadata.uid = randomUUID();
        if (gen === "old") made.metadata.selfLink = `/api/v1/nodes/${made.metadata.name}`;
        made.spec = { ...made.spec, podCIDR: cidr, podCIDRs: [cidr] };
        seen.set(made.metadata.name, Date.now());
        return json(res, 201, put(made));
      }
      case "patch": {
        let patch: Partial<Node>;
        try {
          patch = JSON.parse(body) as Partial<Node>;
        } catch {
          return status(res, 400, "BadRequest", "error decoding patch");
        }
        if (!/^application\/(strategic-)?merge-patch\+json/.test(req.headers["content-type"] ?? "")) return status(res, 415, "UnsupportedMediaType", "the body of the request was in an unknown format - accepted media types include: application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json");
        const next = mergePatch(node, subresource === "status" ? { metadata: patch.metadata, status: patch.status } : { metadata: patch.metadata, spec: patch.spec }) as Node;
        if (patch.status?.conditions) next.status.conditions = mergeConditions(node!.status.conditions, patch.status.conditions);
        for (const [key, value] of Object.entries(next.metadata.annotations)) {
          if (typeof value !== "string") return status(res, 400, "BadRequest", `json: cannot unmarshal into Go struct field ObjectMeta.metadata.annotations of type string: ${key}`);
        }
        if (kubelet) {
          const bad = forbiddenLabels(node!.metadata.labels, next.metadata.labels);
          // v1.17's and today's kubelet may set k3s.io labels: they are not of kubernetes.io.
          if (bad.length) return status(res, 403, "Forbidden", `nodes ${JSON.stringify(name)} is forbidden: is not allowed to modify labels: ${bad.join(", ")}`, details);
          if (patch.status) seen.set(name, Date.now());
        }
        next.metadata.name = name;
        return json(res, 200, put(next));
      }
      case "delete":
        delete state.nodes[name];
        if (gen === "modern") delete state.passwords[name];
        save();
        return json(res, 200, { kind: "Status", apiVersion: "v1", metadata: {}, status: "Success", details: { name, kind: "nodes", uid: node!.metadata.uid } });
      default:
        return status(res, 405, "MethodNotAllowed", "the server does not allow this method on the requested resource");
    }
  }

  const metricsReady = (): boolean => !!state.deployment && scraped && (gen === "old" || usage.size > 0) && state.nodes[hostname]?.status.conditions.some((c) => c.type === "Ready" && c.status === "True") === true;

  function deployment(): object | undefined {
    const d = state.deployment;
    if (!d) return undefined;
    const available = metricsReady() ? { availableReplicas: 1, readyReplicas: 1 } : { unavailableReplicas: 1 };
    return {
      apiVersion: "apps/v1", kind: "Deployment",
      metadata: { annotations: {}, labels: { "k8s-app": "metrics-server" }, name: "metrics-server", namespace: "kube-system" },
      spec: { replicas: 1, selector: { matchLabels: { "k8s-app": "metrics-server" } }, template: { metadata: { labels: { "k8s-app": "metrics-server" } }, spec: { containers: [{ args: d.args, image: d.image, name: "metrics-server" }] } } },
      status: { observedGeneration: 1, replicas: 1, updatedReplicas: 1, ...available },
    };
  }

  function api(url: URL, req: IncomingMessage, res: ServerResponse, body: string): void {
    if (!apiUp) return status(res, 503, "ServiceUnavailable", "starting");
    const user = identify(req);
    // Modern k3s has passwords for its own paths only.
    if (!user || (gen === "modern" && !(req.socket as TLSSocket).authorized)) return status(res, 401, "Unauthorized", "Unauthorized");
    const path = url.pathname.replace(/\/+$/, "") || "/";
    if (["/readyz", "/livez", "/healthz"].includes(path)) return text(res, 200, url.searchParams.has("verbose") ? `[+]ping ok\n${path.slice(1)} check passed\n` : "ok");
    if (path === "/version") {
      const minor = /^v1\.(\d+)/.exec(version)![1];
      return json(res, 200, { major: "1", minor, gitVersion: version, gitTreeState: "clean", compiler: "gc", platform: "linux/amd64" });
    }
    if (path === "/apis" || path === "/api") {
      return json(res, 200, path === "/api" ? { kind: "APIVersions", versions: ["v1"] } : { kind: "APIGroupList", apiVersion: "v1", groups: [{ name: "apps", versions: [{ groupVersion: "apps/v1", version: "v1" }] }, ...(state.deployment ? [{ name: "metrics.k8s.io", versions: [{ groupVersion: "metrics.k8s.io/v1beta1", version: "v1beta1" }] }] : [])] });
    }
    const core = /^\/api\/v1\/nodes(?:\/([^/]+))?(?:\/([^/]+))?$/.exec(path);
    if (core) return nodes(core.slice(1).filter(Boolean).map(decodeURIComponent), url, user, req, res, body);
    const other = /^\/(?:api\/v1|apis\/([^/]+)\/[^/]+)(?:\/namespaces\/([^/]+))?\/([a-z]+)(?:\/([^/]+))?$/.exec(path);
    if (!other || req.method !== "GET") return text(res, 404, "404 page not found\n");
    const [, group, namespace, resource, name] = other;
    const no = forbidden(gen, user, { verb: name ? "get" : "list", resource, group, namespace, name });
    if (no) return status(res, 403, "Forbidden", no);
    const here = !namespace || namespace === "kube-system";
    if (group === "metrics.k8s.io" && resource === "nodes") {
      if (!state.deployment) return text(res, 404, "404 page not found\n");
      if (!metricsReady()) return status(res, 503, "ServiceUnavailable", "the server is currently unable to handle the request");
      const at = new Date().toISOString().replace(/\.\d+/, "");
      const items = [...usage].filter(([n]) => state.nodes[n]).sort().map(([n, u]) => ({ metadata: { name: n, creationTimestamp: at }, timestamp: at, usage: u, window: "10s" }));
      if (!name) return json(res, 200, { kind: "NodeMetricsList", apiVersion: "metrics.k8s.io/v1beta1", metadata: {}, items });
      const item = items.find((i) => i.metadata.name === name);
      return item ? json(res, 200, { kind: "NodeMetrics", apiVersion: "metrics.k8s.io/v1beta1", ...item }) : status(res, 404, "NotFound", `nodemetrics.metrics.k8s.io ${JSON.stringify(name)} not found`);
    }
    if (group === "apps" && resource === "deployments") {
      const d = here ? deployment() : undefined;
      if (!name) return json(res, 200, objectList("DeploymentList", "apps/v1", d ? [d] : []));
      return d && name === "metrics-server" ? json(res, 200, d) : status(res, 404, "NotFound", `deployments.apps ${JSON.stringify(name)} not found`);
    }
    if (!group && resource === "pods" && !name) {
      const pod = { metadata: { name: "metrics-server-0000000000-00000", namespace: "kube-system", labels: { "k8s-app": "metrics-server" } }, spec: { nodeName: hostname }, status: { phase: metricsReady() ? "Running" : "Pending", conditions: [{ type: "Ready", status: metricsReady() ? "True" : "False" }] } };
      return json(res, 200, objectList("PodList", "v1", here && state.deployment ? [pod] : []));
    }
    if (!group && resource === "events" && !name) return json(res, 200, objectList("EventList", "v1", []));
    text(res, 404, "404 page not found\n");
  }

  const server: Server = createServer({ cert: servingText, key: readFileSync(servingKey), ca: readFileSync(clientCa.crt), requestCert: true, rejectUnauthorized: false }, (req, res) => {
    let body = "";
    req.on("data", (d) => (body += d));
    req.on("end", () => {
      try {
        const url = new URL(req.url ?? "/", "https://k3s");
        if (url.pathname === "/cacerts") {
          res.writeHead(200, { "Content-Type": "text/plain" });
          res.end(readFileSync(ca.crt));
        } else if (url.pathname === "/ping") text(res, 200, "pong");
        else if (url.pathname.startsWith("/v1-k3s/")) supervisor(url.pathname, req, res);
        else api(url, req, res, body);
      } catch (error) {
        log("error", `stand-in: ${req.method} ${req.url}: ${(error as Error).stack}`);
        if (!res.headersSent) status(res, 500, "InternalError", String(error));
      }
    });
  });
  server.on("tlsClientError", () => {});
  const bound = one(values, "bind-address");
  await new Promise<void>((done) => {
    server.once("error", (error: NodeJS.ErrnoException) => {
      const words = error.code === "EADDRINUSE" ? "address already in use" : error.code === "EADDRNOTAVAIL" ? "cannot assign requested address" : error.message;
      fatal(gen, portTaken(gen, `${bound ?? ""}:${port}`, words));
    });
    server.listen(port, bound ?? "::", () => done());
  });
  server.removeAllListeners("error");
  state.tokenHash = hash(password);
  state.starts++;
  save();

  const fullToken = `K10${hash(readFileSync(ca.crt, "utf8"))}::server:${password}`;
  const link = (name: string): void => {
    const path = join(dir, name);
    if (!lstatSync(path, { throwIfNoEntry: false })?.isSymbolicLink()) {
      rmSync(path, { force: true });
      symlinkSync(tokenPath, path);
    }
  };
  const skips = new Set([...list(values, "disable"), ...list(values, "no-deploy")]), disables = new Set(list(values, "disable"));
  await sleep(DELAY.apiUp);
  apiUp = true;
  stage(gen, join(dir, "manifests"), skips, externalFirst);
  writeFileSync(tokenPath, `${fullToken}\n`, { mode: 0o600 });
  link("node-token");
  if (gen === "modern") link("agent-token");
  log("info", `${gen === "old" ? "Node token" : "Server node token"} is available at ${tokenPath}`);
  log("info", gen === "old" ? `To join node to cluster: k3s agent -s https://${hostIp}:${port} -t \${NODE_TOKEN}` : `To join agent node to cluster: k3s agent -s https://${hostIp}:${port} -t \${AGENT_NODE_TOKEN}`);

  const b64 = (file: string): string => readFileSync(file).toString("base64");
  const adminKey = join(tls, "client-admin.key"), kubeconfig = one(values, "write-kubeconfig") ?? "/etc/rancher/k3s/k3s.yaml";
  const credentials = gen === "old" ? `    password: ${adminPassword}\n    username: admin\n` : `    client-certificate-data: ${b64(admin)}\n    client-key-data: ${b64(adminKey)}\n`;
  mkdirSync(dirname(kubeconfig), { recursive: true, mode: 0o755 });
  writeFileSync(kubeconfig, `apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: ${b64(ca.crt)}
    server: https://127.0.0.1:${port}
  name: default
contexts:
- context:
    cluster: default
    user: default
  name: default
current-context: default
kind: Config
${gen === "old" ? "preferences: {}\n" : ""}users:
- name: default
  user:
${credentials}`, { mode: 0o600 });
  chmodSync(kubeconfig, parseInt(one(values, "write-kubeconfig-mode") ?? "600", 8) || 0o600);
  for (const name of ["admin", "controller", "scheduler"]) {
    const path = join(cred, `${name}.kubeconfig`);
    writeFileSync(path, `apiVersion: v1\nclusters:\n- cluster:\n    server: https://127.0.0.1:${port}\n    certificate-authority: ${ca.crt}\n  name: local\ncontexts:\n- context:\n    cluster: local\n    user: user\n  name: Default\ncurrent-context: Default\nkind: Config\nusers:\n- name: user\n  user:\n    client-certificate: ${admin}\n    client-key: ${adminKey}\n`);
    chmodSync(path, gen === "old" ? 0o644 : 0o600);
  }
  log("info", `Wrote kubeconfig ${kubeconfig}`);
  log("info", "Run: k3s kubectl");
  log("info", "k3s is up and running");
  await ready(start.notify);

  // A start finds nodes that may have gone: their silence counts from now on.
  for (const name of Object.keys(state.nodes)) seen.set(name, Date.now());
  const copyAddresses = (): void => {
    for (const node of sorted()) {
      const addresses = cloudAddresses(gen, node);
      if (JSON.stringify(addresses) !== JSON.stringify(node.status.addresses)) put({ ...node, status: { ...node.status, addresses } });
    }
  };
  // v1.17's first pass after a start races with its caches: "until it settles by luck" is every third start here.
  if (gen === "old" && state.starts % 3 === 0) copyAddresses();
  setInterval(copyAddresses, gen === "old" ? DELAY.cloud : DELAY.poll);
  setInterval(() => {
    for (const node of sorted()) {
      if (Date.now() - (seen.get(node.metadata.name) ?? 0) < DELAY.grace) continue;
      const conditions = node.status.conditions.map(unknownCondition);
      if (JSON.stringify(conditions) !== JSON.stringify(node.status.conditions)) put({ ...node, status: { ...node.status, conditions } });
    }
  }, DELAY.poll);
  const manifests = (): void => {
    const next = deployPass(join(dir, "manifests"), disables, state.deployment);
    if (JSON.stringify(next) === JSON.stringify(state.deployment)) return;
    state.deployment = next;
    usage = new Map();
    scraped = false;
    save();
  };
  manifests();
  setInterval(manifests, DELAY.manifests);
  setInterval(() => {
    const { deployment: d } = state;
    if (!d) return;
    void scrape(sorted(), d, { ca: readFileSync(ca.crt, "utf8"), cert: readFileSync(admin, "utf8"), key: readFileSync(adminKey, "utf8") }, !skips.has("coredns")).then((found) => {
      if (state.deployment !== d) return;
      usage = found;
      scraped = true;
    });
  }, DELAY.metrics);

  if (one(values, "disable-agent")) return;
  const role = gen === "old" ? "master" : "control-plane";
  const label = setInterval(() => {
    const node = state.nodes[hostname];
    if (!node) return;
    clearInterval(label);
    put({ ...node, metadata: { ...node.metadata, labels: { ...node.metadata.labels, [`node-role.kubernetes.io/${role}`]: "true" } } });
  }, 100);
  if (gen === "modern" && !["none", "vxlan", "host-gw", "wireguard-native"].includes(backend)) {
    await sleep(DELAY.fatalBackend);
    shutdown(unknownBackend(gen, backend));
  }
  await runAgent({ gen, version, values: { ...values, server: [`https://127.0.0.1:${port}`], token: [`K10${hash(readFileSync(ca.crt, "utf8"))}::node:${password}`] }, argv, inServer: true });
}

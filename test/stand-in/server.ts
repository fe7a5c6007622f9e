/** `k3s server`: its files and certificates, the listener on 6443, its controllers, and its own node. */
import { randomBytes, X509Certificate } from "node:crypto";
import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { createServer as createPlain } from "node:http";
import { createServer } from "node:https";
import { dirname, join } from "node:path";
import { kubeconfig, runAgent } from "./agent.ts";
import {
  answer,
  bootstrap,
  type Cluster,
  changes,
  hash,
  putNode,
  type State,
  sortedNodes,
  withPodCidr,
} from "./api.ts";
import { build, DELAY, fatal, type Generation, hostAddress, log, ready, shutdown, sleep } from "./common.ts";
import { openStore, patched, patiently, type Store } from "./datastore.ts";
import { list, one, type Values } from "./flags.ts";
import { deployPass, scrape, stage } from "./metrics.ts";
import { cloudAddresses, unknownCondition } from "./nodes.ts";
import { lasts, makeCa, newKey, type Subject, sign, signedBy } from "./pki.ts";
import { NO_ROUTE, otherToken, portTaken, unknownBackend } from "./words.ts";

export type Start = { gen: Generation; version: string; values: Values; argv: string[]; notify?: string };

/** The names on the API's certificate. */
export function servingNames(
  gen: Generation,
  values: Values,
  hostname: string,
  hostIp?: string,
): { dns: string[]; ips: string[] } {
  const given = gen === "old" ? (values["tls-san"] ?? []) : list(values, "tls-san");
  const nodeIps = list(values, "node-ip"),
    external = list(values, "node-external-ip");
  const service = ["kubernetes", "kubernetes.default", "kubernetes.default.svc.cluster.local", "localhost"];
  const host = hostIp ? [hostIp] : [];
  const advertised = one(values, "advertise-address") ?? external[0] ?? nodeIps[0];
  const names =
    gen === "old"
      ? [...service, "10.43.0.1", "127.0.0.1", ...host, ...given]
      : [hostname, ...service, "kubernetes.default.svc", "10.43.0.1", "127.0.0.1", "::1"].concat(
          nodeIps.length ? nodeIps : host,
          given,
          external,
        );
  const isIp = (n: string): boolean => /^[\d.]+$|:/.test(n);
  const unique = [...new Set(advertised ? [...names, advertised] : names)];
  return { dns: unique.filter((n) => !isIp(n)).sort(), ips: unique.filter(isIp).sort() };
}

/** The password of a token in any of its forms; what does not begin with K10 is one. */
export const passwordOf = (token: string): string => token.trim().replace(/^K10.*?::[^:]*:/, "");

const file = (path: string): string => readFileSync(path, "utf8");
const write = (path: string, text: string, mode: number): void => {
  writeFileSync(path, text, { mode });
  chmodSync(path, mode);
};

type Database = {
  exec(sql: string): void;
  prepare(sql: string): {
    get(...values: unknown[]): unknown;
    all(...values: unknown[]): unknown[];
    run(...values: unknown[]): { lastInsertRowid: number | bigint };
  };
};
type Row = { id: number; name: string; value: Uint8Array; create_revision: number; deleted: number };

/** kine's table and indexes: v1.17's column `name` is an INTEGER, which keeps text as it is. */
const schema = (gen: Generation): string => `CREATE TABLE IF NOT EXISTS kine (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name ${gen === "old" ? "INTEGER" : "TEXT"}, created INTEGER, deleted INTEGER,
  create_revision INTEGER, prev_revision INTEGER, lease INTEGER, value BLOB, old_value BLOB);
CREATE INDEX IF NOT EXISTS kine_name_index ON kine (name);
CREATE UNIQUE INDEX IF NOT EXISTS kine_name_prev_revision_uindex ON kine (name, prev_revision)`;

const NODES = "/registry/minions/";
const SECRETS = "/registry/secrets/kube-system/";
const PASSWORD = ".node-password.k3s";
const METRICS = "/registry/deployments/kube-system/metrics-server";
/** What is not imitated as an object of Kubernetes. */
const REST = "/stand-in";

/** The state as kine's keys and values. */
function rowsOf(gen: Generation, { nodes, passwords, deployment, ...rest }: State): Map<string, string> {
  const rows = new Map([[REST, JSON.stringify(gen === "old" ? { ...rest, passwords } : rest)]]);
  for (const [name, node] of Object.entries(nodes)) rows.set(NODES + name, JSON.stringify(node));
  if (gen === "modern")
    for (const [name, password] of Object.entries(passwords)) rows.set(SECRETS + name + PASSWORD, password);
  if (deployment) rows.set(METRICS, JSON.stringify(deployment));
  return rows;
}

function stateOf(rows: ReadonlyMap<string, string>, fresh: State): State {
  const state = { ...fresh, ...(JSON.parse(rows.get(REST) ?? "{}") as Partial<State>) };
  for (const [name, value] of rows) {
    if (name.startsWith(NODES)) state.nodes[name.slice(NODES.length)] = JSON.parse(value);
    if (name.startsWith(SECRETS)) state.passwords[name.slice(SECRETS.length, -PASSWORD.length)] = value;
    if (name === METRICS) state.deployment = JSON.parse(value);
  }
  return state;
}

/**
 * SQLite with a write-ahead log, and kine's rows: one a revision, an object's newest says if it is there. A copy of a
 * running server has to cope with both files.
 */
async function datastore(gen: Generation, path: string): Promise<Pick<Cluster, "state" | "save" | "at">> {
  const fresh: State = { nodes: {}, passwords: {}, deployment: null, tokenHash: "", starts: 0, version: 1 };
  // Node 20, by which the unit tests may run, has no SQLite; in a box it is 24.
  const sqlite = (await import("node:sqlite" as string).catch(() => undefined)) as
    | { DatabaseSync: new (path: string) => Database }
    | undefined;
  if (!sqlite) return { state: fresh, save: () => {}, at: () => [] };
  const db = new sqlite.DatabaseSync(path);
  db.exec("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA busy_timeout = 5000");
  db.exec(schema(gen));
  const newest = db.prepare(
    "SELECT * FROM kine AS one WHERE id = (SELECT max(id) FROM kine WHERE name = one.name)",
  );
  const had = new Map((newest.all() as Row[]).map((row) => [row.name, row]));
  const text = (row: Row): string => Buffer.from(row.value).toString();
  const there = [...had].filter(([, row]) => !row.deleted);
  const state = stateOf(new Map(there.map(([name, row]) => [name, text(row)])), fresh);
  const insert = db.prepare(
    "INSERT INTO kine (name, created, deleted, create_revision, prev_revision, lease, value, old_value) VALUES (?, ?, ?, ?, ?, 0, ?, ?)",
  );
  // As kine compacts, which keeps the last thousand revisions.
  const compact = db.prepare(
    "DELETE FROM kine WHERE id < ? - 1000 AND (deleted = 1 OR EXISTS (SELECT 1 FROM kine AS later WHERE later.name = kine.name AND later.id > kine.id))",
  );
  const put = (name: string, value: string, deleted: 0 | 1): void => {
    const old = had.get(name);
    const bytes = Buffer.from(value);
    const created = !old || old.deleted ? 1 : 0;
    const made = created ? 0 : (old?.create_revision ?? 0);
    const { lastInsertRowid } = insert.run(
      ...[name, created, deleted, made, old?.id ?? 0, bytes, old?.value ?? null],
    );
    const id = Number(lastInsertRowid);
    had.set(name, { id, name, value: bytes, create_revision: made || id, deleted });
    if (id % 500 === 0) compact.run(id);
  };
  const save = (): void => {
    const rows = rowsOf(gen, state);
    const before = [...had];
    db.exec("BEGIN");
    try {
      for (const [name, row] of before) if (!row.deleted && !rows.has(name)) put(name, text(row), 1);
      for (const [name, value] of rows) {
        const old = had.get(name);
        if (!old || old.deleted || text(old) !== value) put(name, value, 0);
      }
      db.exec("COMMIT");
    } catch (error) {
      // On a full disk SQLite may have rolled it back itself.
      try {
        db.exec("ROLLBACK");
      } catch {}
      had.clear();
      for (const [name, row] of before) had.set(name, row);
      throw error;
    }
  };
  const past = db.prepare(
    "SELECT * FROM kine AS one WHERE name >= ?1 || '/' AND name < ?1 || '0' AND deleted = 0 AND id = (SELECT max(id) FROM kine WHERE name = one.name AND id <= ?2)",
  );
  const at: Cluster["at"] = (resource, revision) => {
    const { last } = db.prepare("SELECT max(id) AS last FROM kine").get() as { last: number };
    if (revision > last) return undefined;
    const key = `/registry/${resource === "nodes" ? "minions" : resource}`;
    return (past.all(key, revision) as Row[]).map((row) =>
      row.name.startsWith(SECRETS)
        ? { metadata: { name: row.name.slice(SECRETS.length), namespace: "kube-system" } }
        : JSON.parse(text(row)),
    );
  };
  return { state, save, at };
}

export async function runServer(start: Start): Promise<void> {
  const { gen, version, values } = start;
  const hostname = (one(values, "node-name") ?? file("/proc/sys/kernel/hostname")).trim().toLowerCase();
  const hostIp = hostAddress();
  if (gen === "modern" && !hostIp && !values["node-ip"]) fatal(gen, NO_ROUTE);
  if (one(values, "server")) fatal(gen, "stand-in: one server only, --server is not imitated");
  log("info", `Starting k3s ${build(version)}`);

  const dir = join(one(values, "data-dir") ?? "/var/lib/rancher/k3s", "server");
  const tls = join(dir, "tls"),
    cred = join(dir, "cred"),
    manifests = join(dir, "manifests");
  for (const d of [dir, tls, cred, manifests, join(dir, "db")])
    mkdirSync(d, { recursive: true, mode: 0o700 });
  process.chdir(dir);

  const { state, save, at } = await datastore(gen, join(dir, "db", "state.db"));

  const tokenPath = join(dir, "token");
  const password = serverPassword(values, tokenPath);
  const endpoint = one(values, "datastore-endpoint");
  const store = endpoint ? openStore(endpoint) : undefined;
  // v1.17 takes a token as it was given, and finds nothing under another; "" where none was.
  const bootstrapKey = hash(gen === "old" ? (givenToken(values) ?? "") : password);
  const late = (error: Error): void => log("error", `stand-in: ${error.message}`);
  if (store) {
    // What the first server has put there, under its token's hash: the others take their CAs from it.
    const found = await patiently(() => store.list("/bootstrap/"), late);
    if (gen === "modern" && Object.keys(found).some((key) => key !== bootstrapKey)) fatal(gen, otherToken);
    for (const [name, text] of Object.entries(
      JSON.parse(found[bootstrapKey] ?? "{}") as Record<string, string>,
    ))
      write(join(tls, name), text, 0o600);
    state.nodes = {};
    state.passwords = await store.list("/registry/passwords/");
    for (const [name, node] of Object.entries(await store.list("/registry/minions/")))
      state.nodes[name] = JSON.parse(node);
  }
  if (gen === "modern" && !store && state.tokenHash && state.tokenHash !== hash(password)) {
    log("info", "Shutdown request received");
    fatal(gen, otherToken);
  }
  if (gen === "old" && state.tokenHash) log("info", "Cluster bootstrap already complete");

  const passwd = join(cred, "passwd");
  const adminPassword = existsSync(passwd) ? file(passwd).split(",")[0] : randomBytes(16).toString("hex");
  const adminLine = gen === "old" ? `${adminPassword},admin,admin,system:masters\n` : "";
  write(passwd, `${adminLine}${password},node,node,k3s:agent\n${password},server,server,k3s:server\n`, 0o600);

  const authority = (name: string): { crt: string; key: string } => {
    const ca = { crt: join(tls, `${name}.crt`), key: join(tls, `${name}.key`) };
    if (!existsSync(ca.crt)) makeCa(gen, ca, `k3s-${name}`);
    return ca;
  };
  const keyed = (name: string): string => {
    const path = join(tls, `${name}.key`);
    if (!existsSync(path)) newKey(path);
    return path;
  };
  const c: Cluster = {
    gen,
    version,
    hostname,
    port: Number(one(values, "https-listen-port") ?? 6443),
    advertised:
      one(values, "advertise-address") ??
      list(values, "node-external-ip")[0] ??
      list(values, "node-ip")[0] ??
      hostIp ??
      "127.0.0.1",
    backend: one(values, "flannel-backend") ?? "vxlan",
    externalFirst: !!one(values, "flannel-external-ip"),
    ca: authority("server-ca"),
    clientCa: authority("client-ca"),
    keyed,
    credDir: cred,
    logins: file(passwd).trim().split("\n"),
    state,
    save,
    at,
    servers: [],
    apiUp: false,
    seen: new Map(),
    usage: undefined,
    metricsLog: [],
  };
  c.servers = [c.advertised];
  if (store) {
    await store.put(`/bootstrap/${bootstrapKey}`, bootstrap(c));
    await share(c, store, late);
  }
  for (const name of ["client-k3s-controller", "client-kube-proxy", "client-kubelet", "serving-kubelet"])
    keyed(name);
  const admin = join(tls, "client-admin.crt"),
    adminKey = keyed("client-admin");
  const adminSubject = { cn: "system:admin", o: "system:masters", usage: "clientAuth" } as const;
  const renewed = (name: string, ca: Cluster["ca"], subject: Subject): string => {
    const crt = join(tls, `${name}.crt`);
    if (!existsSync(crt) || !lasts(gen, file(crt), ca))
      write(crt, sign(gen, ca, keyed(name), subject) + file(ca.crt), 0o644);
    return crt;
  };
  renewed("client-admin", c.clientCa, adminSubject);
  if (gen === "old")
    for (const name of ["kube-proxy", "k3s-controller"])
      renewed(`client-${name}`, c.clientCa, { cn: `system:${name}`, usage: "clientAuth" });
  const names = servingNames(gen, values, hostname, hostIp);
  renewed("serving-kube-apiserver", c.ca, { cn: "kube-apiserver", usage: "serverAuth", ...names });

  const own = dynamic(c, names, tls);
  await listen(c, one(values, "bind-address"), own);
  // "Serving insecurely on [::]:10251": v1.17.6's scheduler and controller manager answer everybody.
  if (gen === "old" && c.port === 6443)
    for (const port of [10251, 10252])
      createPlain((_, res) => res.end("ok"))
        .on("error", () => {})
        .listen(port);
  state.tokenHash = hash(password);
  state.starts++;
  save();

  const skips = new Set([...list(values, "disable"), ...list(values, "no-deploy")]);
  await sleep(DELAY.apiUp);
  c.apiUp = true;
  stage(gen, manifests, skips, c.externalFirst);
  const pin = `K10${hash(file(c.ca.crt))}`;
  write(tokenPath, `${pin}::server:${password}\n`, 0o600);
  for (const name of gen === "old" ? ["node-token"] : ["node-token", "agent-token"]) {
    const path = join(dir, name);
    if (lstatSync(path, { throwIfNoEntry: false })?.isSymbolicLink()) continue;
    rmSync(path, { force: true });
    symlinkSync(tokenPath, path);
  }
  const invite = (what: string): string =>
    `To join ${what}: k3s agent -s https://${hostIp}:${c.port} -t \${${gen === "old" ? "" : "AGENT_"}NODE_TOKEN}`;
  log("info", `${gen === "old" ? "Node token" : "Server node token"} is available at ${tokenPath}`);
  log("info", invite(gen === "old" ? "node to cluster" : "agent node to cluster"));

  const config = one(values, "write-kubeconfig") ?? "/etc/rancher/k3s/k3s.yaml";
  const b64 = (path: string): string => readFileSync(path).toString("base64");
  mkdirSync(dirname(config), { recursive: true, mode: 0o755 });
  write(
    config,
    adminConfig(
      c,
      gen === "old"
        ? `password: ${adminPassword}\n    username: admin`
        : `client-certificate-data: ${b64(admin)}\n    client-key-data: ${b64(adminKey)}`,
    ),
    parseInt(one(values, "write-kubeconfig-mode") ?? "600", 8) || 0o600,
  );
  for (const name of ["admin", "controller", "scheduler"]) {
    const text = kubeconfig(`https://127.0.0.1:${c.port}`, c.ca.crt, admin, adminKey);
    write(join(cred, `${name}.kubeconfig`), text, gen === "old" ? 0o644 : 0o600);
  }
  log("info", `Wrote kubeconfig ${config}`);
  log("info", "Run: k3s kubectl");
  log("info", "k3s is up and running");
  await ready(start.notify);

  watchNodes(c);
  watchMetrics(c, manifests, new Set(list(values, "disable")), !skips.has("coredns"), admin, adminKey);
  if (one(values, "disable-agent")) return;
  labelOwn(c);
  if (gen === "modern" && !["none", "vxlan", "host-gw", "wireguard-native"].includes(c.backend)) {
    await sleep(DELAY.fatalBackend);
    shutdown(unknownBackend(gen, c.backend));
  }
  const joins = { server: [`https://127.0.0.1:${c.port}`], token: [`${pin}::node:${password}`] };
  await runAgent({ ...start, notify: undefined, values: { ...values, ...joins }, inServer: true });
}

function givenToken(values: Values): string | undefined {
  const path = one(values, "token-file");
  return path ? file(path).trim() : (one(values, "token") ?? one(values, "cluster-secret"));
}

/** What was given, else what was used before, else a new one. */
function serverPassword(values: Values, tokenPath: string): string {
  const given = givenToken(values);
  if (given) return passwordOf(given);
  return existsSync(tokenPath) ? passwordOf(file(tokenPath)) : randomBytes(16).toString("hex");
}

/** Does a start of this release renew the certificate of 6443? Since v1.19 (dynamiclistener v0.2.1). */
const renews = (version: string): boolean => Number(version.split(".")[1]) >= 19;

/**
 * The certificate of 6443: a file, and the secret k3s-serving. Up to v1.18 the secret comes first, and only a name that
 * it lacks makes it anew.
 */
function dynamic(
  c: Cluster,
  names: { dns: string[]; ips: string[] },
  tls: string,
): { cert: string; key: string } {
  const path = join(tls, "dynamic-cert.json");
  const local = existsSync(path) ? file(path) : undefined;
  const read = (text: string): { cert: string; key: string } => {
    const { data } = JSON.parse(text) as { data: Record<string, string> };
    const of = (name: string) => Buffer.from(data[name] as string, "base64").toString();
    return { cert: of("tls.crt"), key: of("tls.key") };
  };
  const good = (text: string): boolean => {
    const { cert } = read(text);
    const has = new X509Certificate(cert).subjectAltName?.split(", ") ?? [];
    const wants = [...names.dns.map((n) => `DNS:${n}`), ...names.ips.map((n) => `IP Address:${n}`)];
    return (
      wants.every((name) => has.includes(name) || name.endsWith("::1")) &&
      (renews(c.version) ? lasts(c.gen, cert, c.ca) : signedBy(cert, c.ca))
    );
  };
  let text = [c.state.serving, local].find((one) => one && good(one));
  if (!text) {
    const key = c.keyed("serving-kube-apiserver");
    const subject = { cn: "k3s", o: "k3s", usage: "serverAuth", ...names } as const;
    const made = { "tls.crt": sign(c.gen, c.ca, key, subject) + file(c.ca.crt), "tls.key": file(key) };
    const data = Object.entries(made).map(([name, pem]) => [name, Buffer.from(pem).toString("base64")]);
    text = JSON.stringify({ metadata: { name: "k3s-serving" }, data: Object.fromEntries(data) });
  }
  write(path, text, 0o600);
  c.state.serving = text;
  return read(text);
}

async function listen(
  c: Cluster,
  address: string | undefined,
  { cert, key }: { cert: string; key: string },
): Promise<void> {
  const asks = { ca: file(c.clientCa.crt), requestCert: true, rejectUnauthorized: false };
  const server = createServer({ cert, key, ...asks }, (req, res) => {
    const parts: Buffer[] = [];
    req.on("data", (part: Buffer) => parts.push(part));
    req.on("end", () => {
      const url = new URL(req.url ?? "/", "https://k3s"),
        method = req.method ?? "GET";
      try {
        const reply = answer(c, { method, url, req, body: Buffer.concat(parts).toString() });
        res.writeHead(reply.code, { "Content-Type": reply.type, ...reply.headers });
        if (!reply.watch) return void res.end(reply.body);
        const { more, seconds } = reply.watch;
        const tell = () => {
          const lines = more();
          if (lines) res.write(lines);
        };
        res.flushHeaders();
        tell();
        changes.on("node", tell);
        const over = setTimeout(() => res.end(), seconds * 1000);
        res.on("close", () => {
          changes.off("node", tell);
          clearTimeout(over);
        });
      } catch (error) {
        log("error", `stand-in: ${method} ${req.url}: ${(error as Error).stack}`);
        res.writeHead(500, { "Content-Type": "text/plain" }).end(String(error));
      }
    });
  });
  server.on("tlsClientError", () => {});
  const words: Record<string, string> = {
    EADDRINUSE: "address already in use",
    EADDRNOTAVAIL: "cannot assign requested address",
  };
  await new Promise<void>((done) => {
    server.on("error", (e: NodeJS.ErrnoException) =>
      fatal(c.gen, portTaken(c.gen, `${address ?? ""}:${c.port}`, words[e.code ?? ""] ?? e.message)),
    );
    server.listen(c.port, address ?? "::", () => done());
  });
}

const adminConfig = (c: Cluster, user: string): string => `apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: ${readFileSync(c.ca.crt).toString("base64")}
    server: https://127.0.0.1:${c.port}
  name: default
contexts:
- context:
    cluster: default
    user: default
  name: default
current-context: default
kind: Config
${c.gen === "old" ? "preferences: {}\n" : ""}users:
- name: default
  user:
    ${user}
`;

/** Nodes, passwords and leases of servers by way of the datastore: twice a second, and what each changes is kept. */
async function share(c: Cluster, store: Store, late: (error: Error) => void): Promise<void> {
  const writes = new Map<string, Promise<void>>();
  /** Values as they were last read or written here. */
  const known = new Map<string, string>();
  /** Keys that were written here since the last pass began: what it reads of them may be older. */
  const own = new Set<string>();
  c.share = (key, value) => {
    own.add(key);
    const before = known.get(key);
    if (value === undefined) known.delete(key);
    else known.set(key, value);
    const put = async (text: string): Promise<void> => {
      if (!before || !key.startsWith(NODES)) return store.put(key, text);
      for (;;) {
        const there = (await store.list(key))[""];
        // Another server has deleted it meanwhile.
        if (!there) return;
        const now = JSON.stringify(patched(JSON.parse(there), JSON.parse(before), JSON.parse(text)));
        if (await store.swap(key, there, now)) return;
      }
    };
    const write = (writes.get(key) ?? Promise.resolve())
      .then(() => (value === undefined ? store.remove(key) : put(value)))
      .catch(late)
      .finally(() => writes.get(key) === write && writes.delete(key));
    writes.set(key, write);
  };
  const LEASE = 15_000;
  const NODES = "/registry/minions/";
  const pass = async (): Promise<void> => {
    await store.put(`/registry/masterleases/${c.advertised}`, String(Date.now()));
    const leases = await store.list("/registry/masterleases/");
    c.servers = Object.keys(leases)
      .filter((ip) => Date.now() - Number(leases[ip]) < LEASE)
      .sort();
    own.clear();
    for (const key of writes.keys()) own.add(key);
    const nodes = await store.list(NODES);
    for (const [name, text] of Object.entries(nodes)) {
      const key = NODES + name;
      if (own.has(key) || known.get(key) === text) continue;
      known.set(key, text);
      c.state.nodes[name] = JSON.parse(text);
      // Its kubelet spoke to another server.
      c.seen.set(name, Date.now());
    }
    for (const name of Object.keys(c.state.nodes))
      if (!(name in nodes) && !own.has(NODES + name)) {
        delete c.state.nodes[name];
        known.delete(NODES + name);
      }
    if (c.servers[0] === c.advertised)
      for (const node of sortedNodes(c)) if (!node.spec.podCIDR) putNode(c, withPodCidr(c, node));
    c.state.passwords = { ...c.state.passwords, ...(await store.list("/registry/passwords/")) };
    changes.emit("node");
  };
  await pass().catch(late);
  void (async () => {
    for (;;) {
      await sleep(500);
      await pass().catch(late);
    }
  })();
}

/** The cloud controller, which copies addresses, and the node controller, which notices silence. */
function watchNodes(c: Cluster): void {
  // A start finds nodes that may have gone: their silence counts from now on.
  for (const name of Object.keys(c.state.nodes)) c.seen.set(name, Date.now());
  const copyAddresses = (round: boolean): void => {
    for (const node of sortedNodes(c)) {
      const addresses = cloudAddresses(c.gen, node, round);
      if (JSON.stringify(addresses) !== JSON.stringify(node.status.addresses))
        putNode(c, { ...node, status: { ...node.status, addresses } }, true);
    }
  };
  // v1.17's first pass races with its caches and wins now and then; here, at every third start.
  if (c.gen === "old" && c.state.starts % 3 === 0) copyAddresses(true);
  setInterval(() => copyAddresses(true), DELAY.cloud);
  setInterval(() => copyAddresses(false), DELAY.poll);
  setInterval(() => {
    for (const node of sortedNodes(c)) {
      if (Date.now() - (c.seen.get(node.metadata.name) ?? 0) < DELAY.grace) continue;
      const conditions = node.status.conditions.map(unknownCondition);
      if (JSON.stringify(conditions) !== JSON.stringify(node.status.conditions))
        putNode(c, { ...node, status: { ...node.status, conditions } }, true);
    }
  }, DELAY.poll);
}

/** The deploy controller, as far as metrics-server goes, and metrics-server itself. */
function watchMetrics(
  c: Cluster,
  dir: string,
  disables: Set<string>,
  dns: boolean,
  crt: string,
  key: string,
): void {
  c.state.addons ??= {};
  const deploy = (force: boolean): void => {
    const { deployment, addons } = c.state;
    const before = JSON.stringify([deployment, addons]);
    c.state.deployment = deployPass(dir, disables, deployment, addons, force);
    if (JSON.stringify(deployment) !== JSON.stringify(c.state.deployment)) {
      c.usage = undefined;
      c.metricsLog = [];
    }
    if (JSON.stringify([c.state.deployment, addons]) !== before) c.save();
  };
  deploy(true);
  setInterval(() => deploy(false), DELAY.manifests);
  setInterval(async () => {
    const { deployment } = c.state;
    if (!deployment) return;
    const own = { ca: file(c.ca.crt), cert: file(crt), key: file(key) };
    const said: string[] = [];
    const usage = await scrape(sortedNodes(c), deployment, own, dns, (line) => said.push(line));
    if (c.state.deployment !== deployment) return;
    c.usage = usage;
    c.metricsLog = [...c.metricsLog, ...said].slice(-1000);
  }, DELAY.metrics);
}

function labelOwn(c: Cluster): void {
  const role = `node-role.kubernetes.io/${c.gen === "old" ? "master" : "control-plane"}`;
  const timer = setInterval(() => {
    const node = c.state.nodes[c.hostname];
    if (!node) return;
    clearInterval(timer);
    const labels = { ...node.metadata.labels, [role]: "true" };
    putNode(c, { ...node, metadata: { ...node.metadata, labels } });
  }, 100);
}

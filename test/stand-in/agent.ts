/** `k3s agent`, and the agent part of a server: joins, registers its node, answers as kubelet, keeps WireGuard's peers. */
import { createHash, randomBytes } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, statfsSync, writeFileSync } from "node:fs";
import { createServer as createTls } from "node:https";
import { type AddressInfo, connect, createServer } from "node:net";
import { cpus, release } from "node:os";
import { dirname, join } from "node:path";
import type { TLSSocket } from "node:tls";
import { type Answer, type Call, type CallError, call } from "./client.ts";
import {
  addressOf,
  build,
  DELAY,
  defaultInterface,
  fatal,
  type Generation,
  hostAddress,
  isLocal,
  klog,
  log,
  ready,
  shutdown,
  sleep,
} from "./common.ts";
import { list, nodeArgs, nodeEnv, one, type Values } from "./flags.ts";
import {
  addressMarks,
  type Facts,
  flannelAnnotations,
  flannelCondition,
  kubeletConditions,
  type Machine,
  type Node,
  newNode,
  peer,
} from "./nodes.ts";
import { HOME } from "./pack.ts";
import { splitPem } from "./pki.ts";
import { SUBNET, startPod } from "./pods.ts";
import { services, writeRules } from "./services.ts";
import { bringUp, publicKey, removePeer, setPeer } from "./wg.ts";
import * as words from "./words.ts";

export type Start = {
  gen: Generation;
  version: string;
  values: Values;
  argv: string[];
  notify?: string;
  inServer?: boolean;
};
type Token = { caHash: string; user: string; password: string };

/** Throws with k3s's words. A bare password pins no CA. */
export function parseToken(gen: Generation, token: string): Token {
  const full = token.startsWith("K10") ? token.slice(3) : gen === "old" ? `::node:${token}` : `:::${token}`;
  const at = full.indexOf("::");
  const caHash = at < 0 ? "" : full.slice(0, at),
    rest = at < 0 ? full : full.slice(at + 2);
  if (gen === "modern" && caHash && caHash.length !== 64) throw new Error("invalid token CA hash length");
  const colon = rest.indexOf(":"),
    password = rest.slice(colon + 1);
  if (colon < 0 || (gen === "modern" && !password)) throw new Error(words.FORMAT[gen]);
  return { caHash, user: rest.slice(0, colon), password };
}

type Balancer = { url: string; update(servers: string[]): void };

/**
 * The local load balancer of an agent: what it cannot pass on, it resets, so clients never see the real cause.
 * Servers that it has learned of it keeps in `file` for the next start.
 */
async function balance(gen: Generation, server: URL, file: string): Promise<Balancer> {
  const given = `${server.hostname}:${server.port || 443}`;
  const known = existsSync(file)
    ? (JSON.parse(readFileSync(file, "utf8")) as { ServerURL: string; ServerAddresses: string[] })
    : undefined;
  let servers = known?.ServerURL === server.origin ? known.ServerAddresses : [given];
  const balancer = createServer((near) => {
    near.on("error", () => {});
    const left = [...new Set([...servers, given])];
    const attempt = (): void => {
      const [host = "", port] = (left.shift() ?? "").split(":");
      if (!host) return void near.resetAndDestroy();
      const far = connect(Number(port), host);
      let open = false;
      // Two requests a try: 20 s in v1.17 and 6 s in modern k3s until an unreachable server is reported.
      const timer = setTimeout(
        () => far.destroy(new Error("timeout")),
        (gen === "old" ? 10_000 : 3_000) / (left.length + 1),
      );
      far.on("connect", () => {
        clearTimeout(timer);
        open = true;
        near.pipe(far).pipe(near);
        near.on("close", () => far.destroy());
      });
      far.on("error", () => {});
      far.on("close", () => {
        clearTimeout(timer);
        if (!open && left.length) {
          // The one that answers is asked first from now on.
          servers = [...servers.slice(1), ...servers.slice(0, 1)];
          attempt();
        } else if (!open) near.resetAndDestroy();
        else near.destroy();
      });
    };
    attempt();
  });
  await new Promise<void>((done) => {
    balancer.on("error", (e) =>
      fatal(
        gen,
        `listen tcp 127.0.0.1:6444: bind: ${(e as NodeJS.ErrnoException).code === "EADDRINUSE" ? "address already in use" : e.message}`,
      ),
    );
    balancer.listen(gen === "old" ? 0 : 6444, "127.0.0.1", () => done());
  });
  const local = `127.0.0.1:${(balancer.address() as AddressInfo).port}`;
  if (gen === "old") log("info", `Running load balancer ${local} -> [${servers.join(" ")}]`);
  else {
    log("info", `Updated load balancer k3s-agent-load-balancer default server: ${given}`);
    log(
      "info",
      `Running load balancer k3s-agent-load-balancer ${local} -> [${known ? servers.join(" ") : ""}] [default: ${given}]`,
    );
  }
  return {
    url: `${server.protocol}//${local}`,
    update(next) {
      if (next.length === 0 || next.toSorted().join() === servers.toSorted().join()) return;
      servers = next;
      mkdirSync(dirname(file), { recursive: true });
      writeFileSync(file, JSON.stringify({ ServerURL: server.origin, ServerAddresses: next }, null, 2));
      log("info", `Updated load balancer k3s-agent-load-balancer server addresses -> [${next.join(" ")}]`);
    },
  };
}

/** Go's words for what went wrong with a request. */
function goError(url: string, error: CallError): string {
  const { host } = new URL(url),
    why =
      error.code === "ECONNRESET"
        ? error.localPort
          ? words.reset(error.localPort, host)
          : "EOF"
        : error.code === "ECONNREFUSED"
          ? `dial tcp ${host}: connect: connection refused`
          : error.code === "EPROTO"
            ? "tls: first record does not look like a TLS handshake"
            : /CERT_NOT_YET_VALID|CERT_HAS_EXPIRED/.test(error.code ?? "")
              ? "x509: certificate has expired or is not yet valid"
              : /SELF_SIGNED|UNABLE_TO|SIGNATURE/.test(error.code ?? "")
                ? "x509: certificate signed by unknown authority"
                : error.message;
  return words.got(url, why);
}

/** Fetches the CA and holds it against the token, as k3s does before anything else. */
async function validate(
  gen: Generation,
  url: string,
  rawToken: string,
): Promise<{ ca: string; token: Token }> {
  const scheme = (): void => {
    if (!url.startsWith("https:")) throw new Error(words.scheme(url));
  };
  if (gen === "old") scheme();
  const token = parseToken(gen, rawToken);
  scheme();
  const at = `${url}/cacerts`;
  // k3s first tries with the box's own CAs, and expects that to fail.
  await call(at, { insecure: true }).catch(() => {});
  const answer = await call(at, { insecure: true }).catch((e: CallError) => {
    throw new Error(words.noCa(gen, at, goError(at, e)));
  });
  if (answer.status !== 200)
    throw new Error(words.noCa(gen, at, `${at}: ${answer.status} ${answer.statusText}`));
  const ca = answer.body,
    got = createHash("sha256").update(ca).digest("hex");
  await call(at, { ca }).catch((e: CallError) => {
    throw new Error(
      gen === "old"
        ? `server ${at} is not trusted: ${goError(at, e)}`
        : `CA cert validation failed: ${goError(at, e)}`,
    );
  });
  if (token.caHash && token.caHash !== got) throw new Error(words.wrongCa(gen, token.caHash, got));
  if (gen === "old") {
    const apis = await call(`${url}/apis`, { ca, auth: `${token.user}:${token.password}` });
    if (apis.status !== 200)
      throw new Error(
        apis.status === 401
          ? words.unauthorized(url)
          : `token is not valid: ${url}/apis: ${apis.status} ${apis.statusText}`,
      );
    return { ca, token: { ...token, user: "node" } };
  }
  if (!token.caHash)
    log(
      "warning",
      "Cluster CA certificate is not trusted by the host CA bundle, but the token does not include a CA hash. Use the full token from the server's node-token file to enable Cluster CA validation.",
    );
  return { ca, token: { ...token, user: "node" } };
}

/** The kubeconfig of one of k3s's own parts: it names files. */
export const kubeconfig = (server: string, ca: string, cert: string, key: string): string => `apiVersion: v1
clusters:
- cluster:
    server: ${server}
    certificate-authority: ${ca}
  name: local
contexts:
- context:
    cluster: local
    namespace: default
    user: user
  name: Default
current-context: Default
kind: Config
preferences: {}
users:
- name: user
  user:
    client-certificate: ${cert}
    client-key: ${key}
`;

function machine(): Machine {
  const file = (path: string): string => (existsSync(path) ? readFileSync(path, "utf8").trim() : "");
  return {
    architecture: process.arch === "x64" ? "amd64" : process.arch,
    bootID: file("/proc/sys/kernel/random/boot_id"),
    kernelVersion: release(),
    machineID: file("/etc/machine-id"),
    osImage: /^PRETTY_NAME="?([^"\n]*)/m.exec(file("/etc/os-release"))?.[1] ?? "Linux",
    cpus: cpus().length,
    memoryKi: Number(/MemTotal:\s+(\d+)/.exec(file("/proc/meminfo"))?.[1] ?? 0),
  };
}

type Joined = {
  facts: Facts;
  backend: string;
  useExternal: boolean;
  dir: string;
  ca: string;
  kubelet: Call;
  controller: Call;
  lister: Call;
};

/** Fetches the server's configuration and this node's certificates, and writes the agent's files. */
async function configure(s: Start, url: string, ca: string, token: Token, dir: string): Promise<Joined> {
  const { gen, values } = s;
  const file = (name: string): string => join(dir, name);
  const cert =
    gen === "modern" && existsSync(file("client-kubelet.crt"))
      ? {
          cert: readFileSync(file("client-kubelet.crt"), "utf8"),
          key: readFileSync(file("client-kubelet.key"), "utf8"),
        }
      : {};
  const get = async (path: string, headers: Record<string, string> = {}): Promise<Answer> => {
    const at = `${url}/v1-k3s/${path}`,
      options: Call = { ca, auth: `${token.user}:${token.password}`, headers, ...cert };
    const ask = (how: Call): Promise<Answer> =>
      call(at, how).catch((e: CallError) => {
        throw new Error(goError(at, e));
      });
    let answer = await ask(options);
    if (answer.status === 401 && options.cert && headers["K3s-Node-Name"]) {
      log("info", "Node authorization rejected, retrying without client certificate authentication");
      answer = await ask({ ...options, cert: undefined, key: undefined });
    }
    if (answer.status === 200) return answer;
    throw Object.assign(
      new Error(
        gen === "old"
          ? `${at}: ${answer.status} ${answer.statusText}`
          : answer.status === 401
            ? "not authorized"
            : `${at}: ${answer.status} ${answer.statusText}`,
      ),
      { status: answer.status },
    );
  };
  const fetched = await get("config").catch((e: Error) => {
    throw gen === "old" ? e : new Error(words.noConfig(e.message));
  });
  const config = JSON.parse(fetched.body) as { FlannelBackend: string; FlannelExternalIP?: boolean };

  const external = list(values, "node-external-ip");
  const badIp = [...external, ...list(values, "node-ip")].find((ip) => !/^\d+(\.\d+){3}$|:/.test(ip));
  if (gen === "modern" && badIp)
    throw new Error(
      `invalid ${external.includes(badIp) ? "node-external-ip" : "node-ip"}: invalid ip format '${badIp}'`,
    );
  const given = list(values, "node-ip")[0],
    iface = one(values, "flannel-iface");
  const nodeIp = given ?? (iface ? addressOf(iface) : hostAddress());
  if (!nodeIp) throw new Error(words.NO_ROUTE);
  const name = (one(values, "node-name") ?? readFileSync("/proc/sys/kernel/hostname", "utf8"))
    .trim()
    .toLowerCase();
  const passwordFile = "/etc/rancher/node/password";
  mkdirSync("/etc/rancher/node", { recursive: true, mode: 0o755 });
  if (!existsSync(passwordFile))
    writeFileSync(passwordFile, `${randomBytes(16).toString("hex")}\n`, { mode: 0o600 });
  const headers = {
    "K3s-Node-Name": name,
    "K3s-Node-Password": readFileSync(passwordFile, "utf8").trim(),
    ...(gen === "modern" ? { "K3s-Node-IP": [nodeIp, ...external].join(",") } : {}),
  };
  const rejected =
    (path: string) =>
    (e: Error & { status?: number }): never => {
      if (e.status !== 403) throw gen === "old" ? e : new Error(`${file(path)}: ${e.message}`);
      throw new Error(words.rejected(gen, file(path)));
    };
  const write = (path: string, text: string): void => writeFileSync(file(path), text, { mode: 0o600 });
  const pair = async (path: string, named = false): Promise<{ cert: string; key: string }> => {
    const { certs, key } = splitPem(
      (await get(`${path}.crt`, named ? headers : {}).catch(rejected(`${path}.crt`))).body,
    );
    write(`${path}.crt`, certs);
    write(`${path}.key`, key);
    return { cert: certs, key };
  };
  write("client-ca.crt", (await get("client-ca.crt")).body);
  write("server-ca.crt", (await get("server-ca.crt")).body);
  await pair("serving-kubelet", true);
  const kubelet = await pair("client-kubelet", true);
  await pair("client-kube-proxy");
  const controller = await pair("client-k3s-controller");
  for (const [config, own] of [
    ["kubelet", "client-kubelet"],
    ["kubeproxy", "client-kube-proxy"],
    ["k3scontroller", "client-k3s-controller"],
  ]) {
    write(
      `${config}.kubeconfig`,
      kubeconfig(url, file("server-ca.crt"), file(`${own}.crt`), file(`${own}.key`)),
    );
  }
  const facts: Facts = {
    name,
    nodeIp,
    nodeIpGiven: !!given,
    nodeIpMissing: !isLocal(nodeIp),
    externalIp: external.join(",") || undefined,
    args: nodeArgs(s.argv),
    env: nodeEnv(process.env),
    labels: list(values, "node-label"),
    taints: list(values, "node-taint"),
  };
  return {
    facts,
    backend: config.FlannelBackend,
    useExternal: !!config.FlannelExternalIP,
    dir,
    ca,
    kubelet: { ca, ...kubelet },
    controller: { ca, ...controller },
    lister: { ca, ...(gen === "old" ? kubelet : controller) },
  };
}

/** The kubelet's port, as far as metrics-server asks it. */
function serveKubelet(gen: Generation, j: Joined): Promise<void> {
  const file = (name: string): string => readFileSync(join(j.dir, name), "utf8");
  const server = createTls(
    {
      cert: file("serving-kubelet.crt"),
      key: file("serving-kubelet.key"),
      ca: file("client-ca.crt"),
      requestCert: true,
      rejectUnauthorized: false,
    },
    (req, res) => {
      if (!(req.socket as TLSSocket).authorized)
        return void res.writeHead(401, { "Content-Type": "text/plain" }).end("Unauthorized");
      if (req.url === "/healthz") return void res.end("ok");
      if (req.url !== "/metrics/resource") return void res.writeHead(404).end("404 page not found\n");
      const { rss } = process.memoryUsage();
      res.end(
        JSON.stringify({
          cpu: `${Math.round(process.cpuUsage().user / 10)}n`,
          memory: `${Math.round(rss / 1024)}Ki`,
        }),
      );
    },
  );
  server.on("tlsClientError", () => {});
  return new Promise((done) => {
    server.on("error", (e: NodeJS.ErrnoException) => {
      log(
        "error",
        `stand-in: kubelet: listen tcp 0.0.0.0:10250: bind: ${e.code === "EADDRINUSE" ? "address already in use" : e.message}`,
      );
      fatal(gen, "kubelet exited: listen tcp 0.0.0.0:10250: bind: address already in use");
    });
    server.listen(10250, "0.0.0.0", () => done());
  });
}

/** A box's cgroups: v2's controllers; undefined with v1, or with both, where the controllers are v1's. */
function cgroup2(): string[] | undefined {
  if (statfsSync("/sys/fs/cgroup").type !== 0x63677270) return undefined;
  return readFileSync("/sys/fs/cgroup/cgroup.controllers", "utf8").trim().split(/\s+/);
}

/** Why k3s itself ends at once on a box with these cgroups (its validate(), since v1.20.4 with v2). */
export function cgroupFault(version: string, controllers: string[] | undefined): string | undefined {
  const [, minor, patch] = /^v1\.(\d+)\.(\d+)/.exec(version)!.map(Number);
  if (!controllers) return undefined;
  if (minor! < 20 || (minor === 20 && patch! < 4)) return words.noMemory;
  const missing = ["cpu", "cpuset", "memory"].find((name) => !controllers.includes(name));
  return missing && words.noController(missing);
}

/** Why its kubelet ends there. */
export function kubeletFault(
  version: string,
  values: Values,
  controllers: string[] | undefined,
): string | undefined {
  const minor = Number(version.split(".")[1]);
  const told = (values["kubelet-arg"] ?? [])
    .map((arg) => /^-*fail-cgroupv1(?:=(.*))?$/.exec(arg))
    .findLast(Boolean);
  if (told && minor < 31) return words.unknownKubeletFlag("fail-cgroupv1");
  const fails = told ? !/^(0|f|false)$/i.test(told[1] ?? "true") : minor >= 35;
  return fails && minor >= 31 && !controllers ? words.noCgroup1 : undefined;
}

const reason = (e: unknown): string => (e instanceof Error ? e.message : String(e));

export async function runAgent(s: Start): Promise<void> {
  const { gen, version, values } = s;
  const server = one(values, "server")!,
    tokenFile = one(values, "token-file");
  const rawToken =
    !s.inServer && tokenFile
      ? readFileSync(tokenFile, "utf8").trim()
      : (one(values, "token") ?? one(values, "cluster-secret")!);
  const dir = join(one(values, "data-dir") ?? "/var/lib/rancher/k3s", "agent");
  const fault = cgroupFault(version, cgroup2());
  if (fault === words.noMemory) log("error", fault.replace("f", "F"));
  if (fault) fatal(gen, fault);
  if (!s.inServer) {
    log("info", `Starting k3s agent ${build(version)}`);
    if (gen === "modern" && !hostAddress() && !values["node-ip"])
      fatal(gen, `failed to get node name and addresses: ${words.NO_ROUTE}`);
  }
  if (gen === "old")
    for (const module of ["overlay", "nf_conntrack", "br_netfilter"])
      log("info", `module ${module} was already loaded`);
  mkdirSync(dir, { recursive: true, mode: 0o700 });
  const balancer = s.inServer
    ? undefined
    : await balance(gen, new URL(server), join(dir, "etc", "k3s-agent-load-balancer.json"));
  const url = balancer?.url ?? server;

  let valid: Awaited<ReturnType<typeof validate>> | undefined;
  while (!valid) {
    valid = await validate(gen, url, rawToken).catch(
      (e) => void log("error", words.connecting(gen, server, reason(e))),
    );
    if (!valid) await sleep(2000);
  }
  // v1.17's agent calls itself ready as soon as its token is accepted.
  if (gen === "old") await ready(s.notify);

  let joined: Joined | undefined,
    waiting = "";
  const interrupted = (): never =>
    gen === "old"
      ? fatal(gen, "Interrupted")
      : fatal(gen, `failed to retrieve agent configuration: ${waiting}`);
  process.prependListener("SIGTERM", interrupted);
  while (!joined) {
    joined = await configure(s, url, valid.ca, valid.token, dir).catch((e) => {
      waiting = reason(e);
      log(gen === "old" ? "error" : "info", words.waiting(gen, waiting));
      return undefined;
    });
    if (!joined) await sleep(gen === "old" ? 5000 : 5000 + Math.random() * 5000);
  }
  process.removeListener("SIGTERM", interrupted);
  if (balancer) void learnServers(gen, balancer, joined, valid.token);
  await runNode(s, joined, url);
}

/** v1.17 watches the endpoints of the API, modern k3s asks its server; here both ask now and then. */
async function learnServers(gen: Generation, balancer: Balancer, j: Joined, token: Token): Promise<void> {
  const ask = async (): Promise<string[]> => {
    if (gen === "old") return apiEndpoints(balancer.url, j);
    const auth = `${token.user}:${token.password}`;
    const answer = await call(`${balancer.url}/v1-k3s/apiservers`, { ca: j.ca, auth });
    return answer.status === 200 ? (JSON.parse(answer.body) as string[]) : [];
  };
  for (;;) {
    balancer.update(await ask().catch(() => []));
    await sleep(DELAY.poll);
  }
}

async function apiEndpoints(url: string, j: Joined): Promise<string[]> {
  const answer = await call(`${url}/api/v1/namespaces/default/endpoints/kubernetes`, j.controller);
  if (answer.status !== 200) return [];
  const { subsets } = JSON.parse(answer.body) as {
    subsets: { addresses: { ip: string }[]; ports: { port: number }[] }[];
  };
  return subsets.flatMap(({ addresses, ports }) => addresses.map(({ ip }) => `${ip}:${ports[0]?.port}`));
}

/** From the kubelet's start on. Never returns. */
async function runNode(s: Start, j: Joined, url: string): Promise<void> {
  const { gen, version } = s,
    { facts } = j,
    path = `${url}/api/v1/nodes/${facts.name}`;
  const wireguard = j.backend === (gen === "old" ? "wireguard" : "wireguard-native");
  if (gen === "old" && !["none", "vxlan", "host-gw", "ipsec", "wireguard"].includes(j.backend)) {
    await sleep(DELAY.fatalBackend);
    fatal(gen, words.unknownBackend(gen, j.backend));
  }
  log("info", `Running kubelet --cloud-provider=external --hostname-override=${facts.name}`);
  const fault = kubeletFault(version, s.values, cgroup2());
  if (fault) return gen === "old" ? fatal(gen, fault) : shutdown(fault);
  await serveKubelet(gen, j);
  await sleep(DELAY.kubelet);

  const patch = async (body: object, status = false): Promise<Node | undefined> => {
    const answer = await call(status ? `${path}/status` : path, { ...j.kubelet, method: "PATCH", body });
    if (answer.status === 404) return undefined;
    if (answer.status !== 200) throw new Error(answer.body);
    return JSON.parse(answer.body) as Node;
  };
  const own = async (): Promise<Node | undefined> => {
    const answer = await call(path, j.kubelet);
    return answer.status === 200 ? (JSON.parse(answer.body) as Node) : undefined;
  };
  const again = async <T>(what: string, work: () => Promise<T | undefined>): Promise<T> => {
    for (;;) {
      const result = await work().catch((e) => void log("info", `${what}: ${reason(e)}`));
      if (result !== undefined) return result;
      await sleep(DELAY.poll);
    }
  };

  if (facts.nodeIpMissing)
    log(
      "error",
      `Failed to set some node status fields: failed to validate nodeIP: node IP: ${JSON.stringify(facts.nodeIp)} not found in the host's network interfaces`,
    );
  const fresh = newNode(gen, version, facts, machine());
  const node = await again("Unable to register node with API server", async () => {
    const made = await call(`${url}/api/v1/nodes`, { ...j.kubelet, method: "POST", body: fresh });
    if (made.status !== 409 && made.status !== 201) throw new Error(made.body);
    if (made.status === 201) return JSON.parse(made.body) as Node;
    const { annotations } = fresh.metadata;
    const keep = { nodeInfo: fresh.status.nodeInfo, conditions: kubeletConditions(false) };
    return patch({ metadata: { annotations }, status: keep }, true);
  });
  let isReady = false;
  const heart = (): Promise<Node | undefined> =>
    patch(
      {
        status: {
          conditions: [
            ...kubeletConditions(isReady),
            ...(isReady && gen === "old" ? [flannelCondition()] : []),
          ],
        },
      },
      true,
    );
  setInterval(
    () =>
      void heart().then(
        (n) => n ?? log("error", `Error updating node status: nodes ${JSON.stringify(facts.name)} not found`),
        (e) => log("error", `Error updating node status, will retry: ${reason(e)}`),
      ),
    DELAY.heartbeat,
  );

  const marks = addressMarks(gen, facts);
  await again("Waiting for kubelet to be ready", () => patch({ metadata: marks }));
  log(
    "info",
    gen === "old"
      ? `labels have been set successfully on node: ${facts.name}`
      : `Annotations and labels have been set successfully on node: ${facts.name}`,
  );

  // v1.17's network policy controller wants the node's address at once.
  if (gen === "old" && !s.values["disable-network-policy"]) {
    const checked = Date.now();
    const addressed = await own();
    if (!addressed?.status.addresses.some((a) => a.type === "InternalIP")) {
      log("error", `No InternalIP found for node ${facts.name}`);
      await sleep(Math.max(0, DELAY.hostIpUnknown - (Date.now() - checked)));
      fatal(gen, "host IP unknown");
    }
  }

  // Of several servers one gives nodes their pods' networks: perhaps another than this node has spoken to.
  const { podCIDR } = node.spec.podCIDR
    ? node.spec
    : await again("flannel", async () => (await own().then((n) => n?.spec.podCIDR && n.spec)) || undefined);
  const failed = (error: unknown): never =>
    gen === "old"
      ? fatal(gen, `flannel exited: ${reason(error)}`)
      : shutdown(`flannel exited: ${reason(error)}`);
  const pod = (): void => startPod(gen, podCIDR, facts.name);
  const inBox = import.meta.dirname === HOME;
  // As pkg/agent/syssetup does, both generations.
  for (const of of inBox ? ["all", "default"] : [])
    writeFileSync(`/proc/sys/net/ipv4/conf/${of}/forwarding`, "1");
  if (inBox && existsSync(SUBNET)) pod();
  if (gen === "modern") log("info", `Starting flannel with backend ${j.backend}`);
  const iface = one(s.values, "flannel-iface") ?? defaultInterface(),
    ifaceIp = iface && addressOf(iface);
  if (!ifaceIp)
    failed(
      new Error(
        `failed to find the interface: failed to get default interface: Unable to find default route`,
      ),
    );
  let key = "";
  if (wireguard) {
    log("info", `The interface ${iface} with ipv4 address ${ifaceIp} will be used by flannel`);
    try {
      key = publicKey(gen);
      // Modern flannel makes the interface before it tells the others; v1.17's backend tells them first.
      if (gen === "modern") await bringUp(gen, podCIDR, "10.42.0.0/16");
    } catch (error) {
      failed(error);
    }
  } else log("warning", `stand-in: flannel backend ${j.backend} is not imitated`);
  const current = await again("flannel", own);
  const annotations = flannelAnnotations(gen, current.metadata.annotations, {
    ifaceIp: ifaceIp!,
    externalIp: list(s.values, "node-external-ip")[0],
    useExternal: j.useExternal,
    backend: j.backend,
    publicKey: key,
  });
  await again("flannel", () => patch({ metadata: { annotations } }));
  if (gen === "old" && wireguard) await bringUp(gen, podCIDR, "10.42.0.0/16").catch(failed);
  if (gen === "modern") log("info", "Running flannel backend");
  await sleep(DELAY.start - performance.now());
  if (inBox) pod();
  isReady = true;
  if (gen === "modern")
    klog("kubelet_node_status.go:431", "Fast updating node status as it just became ready");
  await again("Error updating node status", heart);
  if (gen === "modern" && !s.inServer) {
    log("info", "k3s agent is up and running");
    await ready(s.notify);
  }

  const proxyByNft = list(s.values, "kube-proxy-arg").includes("proxy-mode=nftables");
  let proxied = "";
  let checked = 0;
  const peers = new Map<string, string>();
  for (; ; await sleep(DELAY.poll)) {
    if (!wireguard) continue;
    try {
      const answer = await call(`${url}/api/v1/nodes`, j.lister);
      if (answer.status !== 200) throw new Error(`failed to list nodes: ${answer.status}`);
      const all = (JSON.parse(answer.body) as { items: Node[] }).items;
      const nodes = all.filter((n) => n.metadata.name !== facts.name);
      for (const n of nodes) {
        const p = peer(gen, n),
          known = JSON.stringify(p);
        if (!p || peers.get(n.metadata.name) === known) continue;
        setPeer(gen, p);
        log("info", `Subnet added: ${p.allowed} via ${p.endpoint}`);
        peers.set(n.metadata.name, known);
      }
      for (const [name, known] of peers) {
        if (nodes.some((n) => n.metadata.name === name)) continue;
        removePeer(gen, (JSON.parse(known) as { key: string }).key);
        peers.delete(name);
      }
      const wanted = JSON.stringify(services(all, []));
      if (inBox && (wanted !== proxied || Date.now() - checked > DELAY.proxy)) {
        writeRules(gen, services(all, await apiEndpoints(url, j)), proxyByNft);
        proxied = wanted;
        checked = Date.now();
      }
    } catch (error) {
      log("error", `stand-in: flannel: ${reason(error)}`);
    }
  }
}

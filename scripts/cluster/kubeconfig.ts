#!/usr/bin/env -S node --import tsx
/** Merges the cluster's kubeconfig into the user's own, as a separate context. */
import { createHash, createPrivateKey, X509Certificate } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, statSync } from "node:fs";
import { homedir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import { isDeepStrictEqual } from "node:util";
import { boxes } from "../../lib/boxes.ts";
import { ask, type Cluster } from "../../lib/check/survey.ts";
import { look } from "../../lib/converge.ts";
import { noFile, realPath, replaceFile, take, unwritten } from "../../lib/files.ts";
import { attempt } from "../../lib/fleet.ts";
import { endOf } from "../../lib/k3s/certificates.ts";
import { main } from "../../lib/k3s/script.ts";
import { watch } from "../../lib/report.ts";
import type { Box, Run } from "../../lib/script.ts";
import { SettingError } from "../../lib/settings.ts";
import { Failure, prints } from "../../lib/step.ts";
import { caIn } from "../../lib/token.ts";
import { yamlIn, yamlLines } from "../../lib/yaml.ts";

/** The entries of one cluster in a kubeconfig. */
export interface Access {
  name: string;
  cluster: Record<string, string>;
  user: Record<string, string>;
  /** What its context has besides, such as a namespace. */
  context?: Record<string, unknown>;
}

/**
 * The access that the server's k3s.yaml gives, with the public address instead of 127.0.0.1. k3s writes that file in one
 * form only (v1.17.6 with a password, v1.36.3 with a certificate). Anything else is rejected: with one invalid entry
 * kubectl could not read the user's other clusters either.
 *
 * @param token the cluster's token, which has the hash of its CA.
 * @throws {Failure} when the text is not in that form.
 */
export function accessOf(text: string, ip: string, token: string): Access {
  const no = (why: string): never => {
    throw new Failure(`/etc/rancher/k3s/k3s.yaml is not as k3s writes it: ${why}`);
  };
  if (text.length > 50_000) no(`it has ${text.length} characters`);
  let config: Partial<Config> | undefined;
  try {
    config = yamlIn(text).data as typeof config;
  } catch (error) {
    no((error as Error).message);
  }
  const given = { ...config?.clusters?.[0]?.cluster, ...config?.users?.[0]?.user } as Record<string, unknown>;
  const field = (name: string) => {
    const value = given[name];
    return typeof value === "string" ? value : no(`it has no ${name}`);
  };
  const tried = <T>(name: string, what: () => T): T => {
    try {
      return what();
    } catch {
      return no(`its ${name} cannot be read`);
    }
  };
  /** Base64 of PEM that Go reads too: complete blocks only. */
  const pem = (name: string, kind: string): string[] => {
    const said = Buffer.from(field(name), "base64");
    const block = `-----BEGIN ${kind}-----\n[A-Za-z0-9+/=\n]+\n-----END ${kind}-----\n`;
    if (said.toString("base64") !== field(name)) no(`its ${name} is no base64`);
    if (!new RegExp(`^(?:${block})+$`).test(said.toString("latin1")))
      no(`its ${name} is no PEM of a ${kind.replace(/.* \)\?/, "")}`);
    return said.toString().match(new RegExp(block, "g")) as string[];
  };
  const certificates = (name: string) =>
    pem(name, "CERTIFICATE").map((one) => tried(name, () => new X509Certificate(one)));
  const port =
    /^https:\/\/[\w.:[\]-]+:(\d{1,5})$/.exec(field("server"))?.[1] ??
    no("its server is no https://HOST:PORT");
  certificates(CA);
  const hash = createHash("sha256")
    .update(Buffer.from(field(CA), "base64"))
    .digest("hex");
  if (token && caIn(token) !== hash)
    throw new Failure(
      "The CA in /etc/rancher/k3s/k3s.yaml is not the one that K3S_TOKEN names: the box's k3s belongs to another cluster",
    );
  const access = (...names: string[]): Access => ({
    name: contextOf(ip),
    cluster: { [CA]: field(CA), server: `https://${ip}:${port}` },
    user: Object.fromEntries(names.map((name) => [name, field(name)])),
  });
  if (given["client-key-data"] === undefined) {
    for (const name of ["username", "password"])
      if (!/^[\w.-]{1,200}$/.test(field(name))) no(`its ${name} is no plain word`);
    return access("username", "password");
  }
  const [certificate] = certificates("client-certificate-data");
  const [key = ""] = pem("client-key-data", "(?:EC |RSA )?PRIVATE KEY");
  if (!tried("client-key-data", () => certificate?.checkPrivateKey(createPrivateKey(key))))
    no("its client-key-data is of another certificate");
  return access("client-certificate-data", "client-key-data");
}

/** The cluster's name in the user's kubeconfig. */
const contextOf = (ip: string) => `k3s-${ip}`;

const CA = "certificate-authority-data";
const LISTS = ["clusters", "contexts", "users"] as const;
type Entry = { name: string } & { [kind in "cluster" | "context" | "user"]?: Record<string, unknown> };
type Config = Record<(typeof LISTS)[number], Entry[]> & { "current-context"?: string };

/** The kubeconfig cannot be edited. Nothing was touched. */
const no = (why: string): never => {
  throw new SettingError(
    `cannot be merged into: ${why}; expected what kubectl reads ("kubectl config view --raw" prints it so)`,
  );
};

/** @throws {SettingError} for a text that kubectl would not read, or with two entries of one name. */
function configIn(text: string) {
  let read: ReturnType<typeof yamlIn>;
  try {
    read = yamlIn(text);
  } catch (error) {
    return no((error as Error).message.replaceAll("\n", " "));
  }
  const { document, data } = read;
  if (data === null) return { config: {} as Partial<Config> };
  const config = data as Partial<Config> & { kind?: unknown };
  if (config.kind !== "Config") return no("it is of no kind Config");
  for (const key of LISTS) {
    const list = config[key] ?? [];
    if (!Array.isArray(list)) return no(`${key} is no list`);
    const names = list.map((one) => one?.name ?? no(`an entry of ${key} has no name`));
    const seen = new Set();
    const twice = names.find((name) => seen.size === seen.add(name).size);
    if (twice !== undefined) return no(`${key} has ${twice} twice`);
  }
  return { config, map: document.contents };
}

/**
 * Adds this cluster's three entries to a kubeconfig's text, or replaces them; all other bytes are kept. `use` makes it the
 * current context. The result is parsed again and must differ from the original in these entries only.
 *
 * @throws {SettingError} for a text that cannot be edited like that, or that uses the cluster's name for something else.
 */
export function withAccess(text: string, { name, cluster, user, context }: Access, use: boolean): string {
  const entries = {
    clusters: { cluster, name },
    contexts: { context: { ...context, cluster: name, user: name }, name },
    users: { name, user },
  };
  const { config, map } = configIn(text);
  foreign(config, name, cluster.server as string);
  if (!text.endsWith("\n") && endsInBlock(map))
    no("it ends within a block of text, to which a newline would be added: end its last line");
  let result = text;
  const empty = Object.keys(config).length === 0;
  if (empty) {
    result += text && !text.endsWith("\n") ? "\n" : "";
    result += 'apiVersion: v1\nkind: Config\npreferences: {}\ncurrent-context: ""\n';
  }
  const wanted = structuredClone(empty ? configIn(result).config : config);
  for (const key of LISTS) {
    const list = wanted[key] ?? [];
    const at = list.findIndex((one) => one.name === name);
    // The user's additions, such as a namespace, are kept as long as the rest is right.
    if (at >= 0 && holds(list[at], entries[key])) continue;
    list.splice(at < 0 ? list.length : at, 1, entries[key]);
    wanted[key] = list;
    result = withValue(result, key, entries[key], at);
  }
  if (use && wanted["current-context"] !== name) {
    wanted["current-context"] = name;
    result = withValue(result, "current-context", name);
  }
  if (!isDeepStrictEqual(configIn(result).config, wanted))
    no("its anchors or its style leave no place for more");
  return result;
}

/**
 * The same, and the entries of the server before are taken out; what was the current context still is.
 *
 * @param gone its name. It stays where it is of another cluster.
 */
export function withMoved(text: string, access: Access, gone: string): string {
  const { config } = configIn(text);
  const [cluster, context] = LISTS.map((key) => config[key]?.find((one) => one.name === gone));
  const use = config["current-context"] === gone;
  if (!cluster || cluster.cluster?.[CA] !== access.cluster[CA]) return withAccess(text, access, false);
  const { cluster: _, user: __, ...more } = context?.context ?? {};
  let result = withAccess(text, { ...access, context: more }, use);
  const wanted = structuredClone(configIn(result).config);
  for (const key of LISTS) {
    const at = (wanted[key] ?? []).findIndex((one) => one.name === gone);
    if (at < 0) continue;
    wanted[key]?.splice(at, 1);
    const { map } = configIn(result);
    const list = map.items.find((one: { key: { value?: unknown } | null }) => one.key?.value === key)?.value;
    const old = list?.items[at];
    if (!old?.range || list.flow) return no("its style leaves no place to take an entry out");
    const from = result.lastIndexOf("\n", old.range[0]) + 1;
    result = result.slice(0, from) + result.slice(old.range[2]);
  }
  if (!isDeepStrictEqual(configIn(result).config, wanted))
    no("its anchors or its style leave no place for less");
  return result;
}

/** Is its last value a block scalar? If the file has no final newline, this parser reads one in it and Go does not. */
function endsInBlock(map: { items?: unknown[] } | undefined): boolean {
  // biome-ignore lint/suspicious/noExplicitAny: nodes of the YAML library
  let node: any = map;
  while (node?.items?.length) node = node.items.at(-1).value ?? node.items.at(-1);
  return /^BLOCK/.test(node?.type) && node.value.endsWith("\n");
}

/** Does a value contain everything that another has? */
const holds = (have: unknown, want: unknown): boolean =>
  want instanceof Object
    ? Object.entries(want).every(([key, value]) => holds(Object(have)[key], value))
    : have === want;

/** @throws {SettingError} when the user has something else under this cluster's name. */
function foreign(config: Partial<Config>, name: string, server: string): void {
  const [cluster, context, user] = LISTS.map((key) => config[key]?.find((one) => one.name === name));
  const at = `${cluster?.cluster?.server}`;
  if (
    (cluster && !at.startsWith(server.replace(/:\d+$/, ":"))) ||
    (context && context.context?.cluster !== name) ||
    ((context || user) && !cluster)
  )
    no(`it has a ${name} that is not this cluster: give that another name`);
}

/**
 * Sets a value of the text's mapping: a name, or an entry of a list, which replaces the one at `at` or is appended. It is
 * written in block style, as kubectl does; within brackets, and instead of an alias, as JSON.
 */
function withValue(text: string, key: string, value: string | object, at = -1): string {
  const { map } = configIn(text);
  const pair = map.items.find((one: { key: { value?: unknown } | null }) => one.key?.value === key);
  const have = pair?.value;
  const old = have?.items?.[at];
  const eol = text.includes("\r\n") ? "\r\n" : "\n";
  const indent = (from: number) =>
    eol + " ".repeat(text.slice(text.lastIndexOf("\n", from - 1) + 1, from).replace("\uFEFF", "").length);
  const put = ([from, to]: number[], what: string) => text.slice(0, from) + what + text.slice(to);
  /** Inserts lines there, indented like the text at `like`. */
  const insert = (from: number, like: number, lines: string[]) => {
    const own = lines.map((line) => indent(like) + line).join("") + eol;
    return put([from, from], from && text[from - 1] !== "\n" ? own : own.slice(eol.length));
  };
  const json = JSON.stringify(value);
  const isName = typeof value === "string";
  const item = isName ? [] : yamlLines([value]);
  const [start, , end] = map.range;

  if (old?.items && !old.flow)
    return put([old.range[0], old.range[2]], yamlLines(value).join(indent(old.range[0])) + eol);
  if (old) return put(old.range, json);
  if (have?.items?.length && !have.flow) return insert(have.range[2], have.range[0], item);
  if (map.flow || have?.items?.length) {
    const last = have?.items?.at(-1) ?? map.items.at(-1).value;
    const one = isName ? json : `[${json}]`;
    if (have && !have.items?.length) return put(have.range, one);
    return put([last.range[1], last.range[1]], have ? `, ${json}` : `, "${key}": ${one}`);
  }
  if (!pair) return insert(end, start, isName ? [`${key}: ${value}`] : [`${key}:`, ...item]);
  if (!have) return no("its style leaves no place for more");
  const [from, to] = have.range;
  if (from < to && isName) return put(have.range, value);
  // An empty list is removed; a comment after it is kept.
  if (from < to) return withValue(put([text.slice(0, from).trimEnd().length, to], ""), key, value);
  const colon = text.indexOf(":", pair.key.range[1]) + 1;
  if (isName) return put([colon, colon], ` ${value}`);
  return insert(text.indexOf("\n", colon) + 1 || text.length, start, item);
}

/** The file that kubectl would read first. @throws {SettingError} when it is not a regular file. */
function pathOf(): string {
  const named = (process.env.KUBECONFIG ?? "").split(delimiter).find(Boolean);
  const path = named ?? join(homedir(), ".kube", "config");
  const wrong = noFile(path);
  if (wrong)
    throw new SettingError(`${path}${named ? " (KUBECONFIG)" : ""} is ${wrong}: expected a kubeconfig`);
  return path;
}

/**
 * Merges while holding kubectl's own lock; a link is followed. Before the first change the file is copied to
 * FILE.before-k3s-across-clouds. Returns whether anything had to be changed.
 *
 * @throws {SettingError} for a file that is locked or cannot be edited; it is unchanged then.
 */
export function merge(given: string, access: Access, use: boolean, gone = ""): boolean {
  const path = realPath(given);
  const release = lock(path);
  try {
    const old = existsSync(path) ? readFileSync(path) : Buffer.alloc(0);
    const text = old.toString();
    if (!Buffer.from(text).equals(old))
      throw new SettingError(`${path} cannot be merged into: it is no UTF-8`);
    let next: string;
    try {
      next = gone ? withMoved(text, access, gone) : withAccess(text, access, use);
    } catch (error) {
      throw error instanceof SettingError ? new SettingError(`${path} ${error.message}`) : error;
    }
    if (next === text) return false;
    const backup = `${path}.before-k3s-across-clouds`;
    const kept = !noFile(backup) && statSync(backup, { throwIfNoEntry: false })?.size;
    if (old.length && !kept) replaceFile(backup, text);
    replaceFile(path, next);
    return true;
  } catch (error) {
    throw unwritten(path, error);
  } finally {
    release();
  }
}

/** Takes kubectl's own lock, an empty file, which does not tell whether its owner still runs. @throws {SettingError} */
function lock(path: string): () => void {
  const file = `${path}.lock`;
  let release: (() => void) | undefined;
  try {
    mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
    release = take(file, Number.POSITIVE_INFINITY);
  } catch (error) {
    throw new SettingError(`${path} cannot be changed: ${(error as Error).message}`);
  }
  if (release) return release;
  throw new SettingError(`${path} is locked: expected no ${file}; remove it if no kubectl is at work`);
}

/**
 * The user's access to the cluster with this server, and when its certificate ends; undefined where the kubeconfig has
 * none, or cannot be read.
 */
export function accessEnd(ip = ""): Cluster["access"] {
  try {
    const config = configIn(readFileSync(pathOf(), "utf8")).config;
    const context = contextOf(ip);
    const user = config.users?.find(({ name }) => name === context)?.user;
    const ends = endOf(`${user?.["client-certificate-data"]}`);
    return ends ? { context, ends } : undefined;
  } catch {
    return undefined;
  }
}

/** The context of the server at this address, if the user's kubeconfig has one and can be read. */
export function contextAt(ip: string): string | undefined {
  try {
    const { config } = configIn(readFileSync(pathOf(), "utf8"));
    return config.clusters?.find(({ name }) => name === contextOf(ip))?.name;
  } catch {
    return undefined;
  }
}

/**
 * Merges the access that a server gives into the user's kubeconfig. Returns whether anything had to be changed.
 * @param gone the context of the server before, which it takes the place of.
 */
export async function mergeFrom(
  server: Box,
  use = false,
  gone = "",
): Promise<{ changed: boolean; access: Access; path: string }> {
  const path = pathOf();
  const facts = await look(server, [
    ask([prints("kubeconfig")("fact kubeconfig; cat /etc/rancher/k3s/k3s.yaml 2>/dev/null")]),
  ]);
  if (!facts.kubeconfig?.trim())
    throw new Failure("It has no /etc/rancher/k3s/k3s.yaml: k3s is no server there, or not up yet");
  const access = accessOf(facts.kubeconfig, server.ip, server.want.K3S_TOKEN);
  return { changed: merge(path, access, use, gone), access, path };
}

async function kubeconfig(run: Run): Promise<number> {
  const [server] = (await boxes(run, "SERVER")) as [Box];
  // Is it locked? Found out before the box is queried.
  lock(realPath(pathOf()))();
  await watch([server]);
  return await attempt(run, server, async () => {
    const use = run.flags.has("use");
    const { changed, access, path } = await mergeFrom(server, use);
    server.line.done(
      !changed,
      `context ${access.name} in ${path}; ${use ? "kubectl uses it" : `kubectl --context ${access.name} get nodes`}`,
    );
  });
}

await main(import.meta, {
  about: "Merges the cluster's kubeconfig into yours (KUBECONFIG or ~/.kube/config), as a separate context.",
  steps: [ask([], ["SERVER", "PUBLIC_IP"])],
  host: "SERVER",
  readOnly: true,
  flags: { use: "make it the current context" },
  work: kubeconfig,
});

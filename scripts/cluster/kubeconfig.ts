#!/usr/bin/env -S node --import tsx
/** The cluster's kubeconfig, merged into the user's own under a name of its own. */
import { createHash, createPrivateKey, X509Certificate } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, statSync } from "node:fs";
import { homedir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import { jobFor, targets } from "../../lib/boxes.ts";
import { ask } from "../../lib/check/survey.ts";
import { look } from "../../lib/converge.ts";
import { noFile, realPath, replaceFile, take, unwritten } from "../../lib/files.ts";
import { attempt } from "../../lib/fleet.ts";
import { run } from "../../lib/k3s/script.ts";
import { report } from "../../lib/report.ts";
import type { Call, Target } from "../../lib/script.ts";
import { SettingError } from "../../lib/settings.ts";
import { Failure } from "../../lib/step.ts";
import { caIn } from "../../lib/token.ts";

/** What a kubeconfig has of one cluster: lines of YAML as kubectl writes them, without indentation. */
export interface Access {
  name: string;
  cluster: string[];
  user: string[];
}

/**
 * What the server's k3s.yaml gives, with the public address in place of 127.0.0.1. k3s writes it in one form
 * only (v1.17.6 with a password, v1.36.3 with a certificate): what is not of it is not taken, and nothing that
 * kubectl could not read, for one such entry and it reads none of the user's other clusters either.
 *
 * @param token the cluster's, which names its CA.
 * @throws {Failure} when the text is not k3s's.
 */
export function accessOf(text: string, ip: string, token: string): Access {
  const no = (why: string): never => {
    throw new Failure(`/etc/rancher/k3s/k3s.yaml is not as k3s writes it: ${why}`);
  };
  if (text.length > 200_000) no(`it has ${text.length} characters`);
  const field = (name: string) => {
    const [one, ...more] = text.matchAll(new RegExp(`\\b${name}["']?:(.*)`, "g"));
    if (!one || more.length) return no(`it has ${one ? "several" : "no"} ${name}`);
    return (one[1] as string).trim();
  };
  const bytes = (name: string) => {
    const decoded = Buffer.from(field(name), "base64");
    if (decoded.toString("base64") !== field(name)) no(`its ${name} is no base64`);
    return decoded;
  };
  /** PEM as Go reads it too: nothing but whole blocks. */
  const pem = (name: string, kind: string): [string, ...string[]] => {
    const said = bytes(name).toString("latin1");
    const block = `-----BEGIN ${kind}-----\n[A-Za-z0-9+/=\n]+\n-----END ${kind}-----\n`;
    if (!new RegExp(`^(?:${block})+$`).test(said))
      no(`its ${name} is no PEM of a ${kind.replace(/.* \)\?/, "")}`);
    return said.match(new RegExp(block, "g")) as unknown as [string, ...string[]];
  };
  const certificates = (name: string) => {
    try {
      return pem(name, "CERTIFICATE").map((one) => new X509Certificate(one));
    } catch (error) {
      return error instanceof Failure ? no(error.message) : no(`its ${name} has no certificate`);
    }
  };
  const port =
    /^https:\/\/[\w.:[\]-]+:(\d{1,5})$/.exec(field("server"))?.[1] ??
    no("its server is no https://HOST:PORT");
  certificates("certificate-authority-data");
  const hash = createHash("sha256").update(bytes("certificate-authority-data")).digest("hex");
  if (token && caIn(token) !== hash)
    throw new Failure(
      "The CA in /etc/rancher/k3s/k3s.yaml is not the one that K3S_TOKEN names: the box's k3s belongs to another cluster",
    );
  const access = (user: string[]): Access => ({
    name: `k3s-${ip}`,
    cluster: [
      `certificate-authority-data: ${field("certificate-authority-data")}`,
      `server: https://${ip}:${port}`,
    ],
    user,
  });
  if (!/client-key-data/.test(text)) {
    // A password of digits alone would be a number.
    const word = (name: string) =>
      `${name}: "${/^"?([\w.-]{1,200})"?$/.exec(field(name))?.[1] ?? no(`its ${name} is no plain word`)}"`;
    return access([word("username"), word("password")]);
  }
  const [certificate] = certificates("client-certificate-data");
  const [key] = pem("client-key-data", "(?:EC |RSA )?PRIVATE KEY");
  try {
    if (!certificate?.checkPrivateKey(createPrivateKey(key)))
      no("its client-key-data is of another certificate");
  } catch (error) {
    if (error instanceof Failure) throw error;
    no("its client-key-data has no key");
  }
  const names = ["client-certificate-data", "client-key-data"];
  return access(names.map((name) => `${name}: ${field(name)}`));
}

/** A kubeconfig that cannot be edited line by line without knowing all of YAML. Nothing was touched. */
const no = (why: string, line?: number): never => {
  throw new SettingError(
    `cannot be merged into: ${why}${line === undefined ? "" : ` (line ${line + 1})`}; expected block style, as kubectl writes it ("kubectl config view --raw" prints it so)`,
  );
};

interface Section {
  /** Its line, and the line after its last. */
  from: number;
  to: number;
  /** Blanks before its items' dashes. */
  indent: string;
  items: { name: string; from: number; to: number }[];
}

const BLANK = /^\s*(#.*)?$/;

/**
 * Where the items of clusters, contexts and users stand. Only the plain block style that kubectl writes is
 * read; everything else is refused rather than guessed at.
 *
 * @throws {SettingError}
 */
function sectionsOf(lines: string[]): Map<string, Section> {
  const tops: { key: string; rest: string; from: number }[] = [];
  for (const [i, line] of lines.entries()) {
    if (BLANK.test(line) || (line === "---" && tops.length === 0)) continue;
    if (/[\r\t]/.test(line)) no("it has tabs or CR", i);
    if (/^\s*[{[]/.test(line)) no("it is JSON or in flow style", i);
    if (/(^|[:-] +)([&*!]|<<:)/.test(line)) no("it has anchors, aliases or tags", i);
    if (/^ |^- /.test(line)) {
      if (tops.length === 0) no("it does not begin with a key", i);
      continue;
    }
    const [, key, rest] = /^([A-Za-z][\w-]*):(?: +(.*))?$/.exec(line) ?? [];
    if (!key) return no(`"${line.slice(0, 20)}" is no key`, i);
    if (tops.some((top) => top.key === key)) no(`${key} is there twice`, i);
    tops.push({ key, rest: (rest ?? "").replace(/\s*#.*$/, ""), from: i });
  }
  const kind = tops.find(({ key }) => key === "kind");
  if (tops.length && kind?.rest.replaceAll(/["']/g, "") !== "Config") no("it is of no kind Config");

  const sections = new Map<string, Section>();
  for (const [t, { key, rest, from }] of tops.entries()) {
    let to = tops[t + 1]?.from ?? lines.length;
    while (to > from + 1 && BLANK.test(lines[to - 1] as string)) to--;
    const section: Section = { from, to, indent: "", items: [] };
    sections.set(key, section);
    if (!["clusters", "contexts", "users"].includes(key)) continue;
    if (!["", "[]", "null", "~"].includes(rest) || (rest && to > from + 1))
      no(`${key} is not a list in block style`, from);
    readItems(lines, key, section);
  }
  return sections;
}

function readItems(lines: string[], key: string, section: Section): void {
  const first = lines.slice(section.from + 1, section.to).find((line) => !BLANK.test(line));
  section.indent = /^ */.exec(first ?? "")?.[0] ?? "";
  let names: string[] = [];
  let inner = "";
  const close = (to: number) => {
    const item = section.items.at(-1);
    if (!item) return;
    while (BLANK.test(lines[to - 1] as string)) to--;
    item.to = to;
    if (names.length !== 1)
      no(`an entry of ${key} has ${names.length ? "several names" : "no name"}`, item.from);
    item.name = names[0] as string;
    names = [];
  };
  for (let i = section.from + 1; i < section.to; i++) {
    const line = lines[i] as string;
    if (BLANK.test(line)) continue;
    const dash = new RegExp(`^${section.indent}-( +)(?=\\S)`).exec(line);
    if (dash) {
      close(i);
      section.items.push({ name: "", from: i, to: i });
      inner = `${section.indent} ${dash[1]}`;
    } else if (!line.startsWith(`${section.indent} `)) no(`${key} is not indented evenly`, i);
    const own = dash ? inner + line.slice(dash[0].length) : line;
    const name =
      own.startsWith(`${inner}name:`) &&
      /^name: +("[^"\\]*"|'[^']*'|[^"'\s#|>][^#]*?)(?:\s+#.*|\s*)$/.exec(own.slice(inner.length))?.[1];
    if (name) names.push(name.replace(/^(["'])(.*)\1$/, "$2"));
    else if (own.startsWith(`${inner}name:`)) no(`a name in ${key} is not a plain word`, i);
  }
  close(section.to);
  for (const [i, { name, from }] of section.items.entries())
    if (section.items.findIndex((item) => item.name === name) < i) no(`${key} has ${name} twice`, from);
}

/**
 * A kubeconfig's text with this cluster in it: its three entries are added or replaced, and every other byte
 * stays. `use` makes it the current context.
 *
 * @throws {SettingError} where the text is not in kubectl's block style.
 */
export function withAccess(text: string, { name, cluster, user }: Access, use: boolean): string {
  foreign(text, name, cluster);
  let result = text.trim() ? text : 'apiVersion: v1\nkind: Config\npreferences: {}\ncurrent-context: ""\n';
  if (!result.endsWith("\n")) result += "\n";
  result = withItem(result, "clusters", name, ["cluster:", ...cluster.map((line) => `  ${line}`)]);
  result = withItem(result, "contexts", name, ["context:", `  cluster: ${name}`, `  user: ${name}`]);
  result = withItem(result, "users", name, ["user:", ...user.map((line) => `  ${line}`)], true);
  if (!use) return result;
  const lines = result.split("\n");
  const at = sectionsOf(lines).get("current-context");
  if (at && at.to > at.from + 1) no("current-context is more than one line", at.from);
  if (at) lines[at.from] = `current-context: ${name}`;
  else lines.splice(-1, 0, `current-context: ${name}`);
  return lines.join("\n");
}

/** @throws {SettingError} where the user has something else by the name that this cluster goes by. */
function foreign(text: string, name: string, cluster: readonly string[]): void {
  const lines = text.split("\n");
  const sections = sectionsOf(lines);
  const entry = (key: string) => {
    const item = sections.get(key)?.items.find((item) => item.name === name);
    return item && lines.slice(item.from, item.to).map((line) => line.replace(/^ *(- +)?/, ""));
  };
  const host = (cluster[1] as string).replace(/:\d+$/, ":");
  const [clusters, contexts, users] = ["clusters", "contexts", "users"].map(entry);
  if (
    (clusters && !clusters.some((line) => line.replace(/^server: ["']/, "server: ").startsWith(host))) ||
    (contexts && !contexts.includes(`cluster: ${name}`)) ||
    ((contexts || users) && !clusters)
  )
    no(`it has a ${name} that is not this cluster: give that another name`);
}

/** kubectl writes an entry's name first for users, last for the others. */
function withItem(text: string, key: string, name: string, body: string[], nameFirst = false): string {
  const lines = text.split("\n");
  const section = sectionsOf(lines).get(key);
  const item = section?.items.find((item) => item.name === name);
  const indent = section?.indent ?? "";
  const all = nameFirst ? [`name: ${name}`, ...body] : [...body, `name: ${name}`];
  const entry = all.map((line, i) => `${indent}${i ? " " : "-"} ${line}`);
  if (!section) lines.splice(-1, 0, `${key}:`, ...entry);
  else if (item) {
    // What the user added to it, a namespace say, stays as long as what matters is right.
    const have = lines.slice(item.from, item.to).map((line) => line.replace(/^ *(- +)?/, ""));
    if (!body.every((line) => have.includes(line.trim())))
      lines.splice(item.from, item.to - item.from, ...entry);
  } else {
    if (!section.items.length) lines[section.from] = `${key}:`;
    lines.splice(section.to, 0, ...entry);
  }
  return lines.join("\n");
}

/** Where kubectl would look first. @throws {SettingError} for what is no file. */
function pathOf(): string {
  const named = (process.env.KUBECONFIG ?? "").split(delimiter).find(Boolean);
  const path = named ?? join(homedir(), ".kube", "config");
  const wrong = noFile(path);
  if (wrong)
    throw new SettingError(`${path}${named ? " (KUBECONFIG)" : ""} is ${wrong}: expected a kubeconfig`);
  return path;
}

/**
 * Merges under kubectl's own lock; a link is followed. Before the first change the file is kept as FILE.before-k3s-across-clouds.
 * Answers whether anything had to be changed.
 *
 * @throws {SettingError} for a file that is locked or cannot be edited; it is as it was.
 */
export function merge(given: string, access: Access, use: boolean): boolean {
  const path = realPath(given);
  const release = lock(path);
  try {
    const old = existsSync(path) ? readFileSync(path) : Buffer.alloc(0);
    const text = old.toString();
    if (!Buffer.from(text).equals(old))
      throw new SettingError(`${path} cannot be merged into: it is no UTF-8`);
    let next: string;
    try {
      next = withAccess(text, access, use);
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

/** Takes kubectl's own lock, which has nothing in it, and says not whether its owner lives. @throws {SettingError} */
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

async function kubeconfig(call: Call): Promise<number> {
  const [server] = (await targets(call, "SERVER")) as [Target];
  const path = pathOf();
  // Before the box is asked.
  lock(realPath(path))();
  const ui = await report([server.name]);
  return await attempt(call, call.script, server, ui.line(server.name), async (line) => {
    const job = jobFor(call, server, line);
    const facts = await look(job, [ask("fact config; cat /etc/rancher/k3s/k3s.yaml 2>/dev/null")]);
    if (!facts.config?.trim())
      throw new Failure("It has no /etc/rancher/k3s/k3s.yaml: k3s is no server there, or not up yet");
    const access = accessOf(facts.config, server.ip, job.want.K3S_TOKEN);
    const use = call.flags.has("use");
    line.done(
      !merge(path, access, use),
      `context ${access.name} in ${path}; ${use ? "kubectl uses it" : `kubectl --context ${access.name} get nodes`}`,
    );
  });
}

await run(import.meta, {
  about:
    "Merges the cluster's kubeconfig into yours (KUBECONFIG or ~/.kube/config), under a name of its own.",
  steps: [ask("", ["SERVER", "PUBLIC_IP"])],
  host: "SERVER",
  readOnly: true,
  flags: { use: "make it the current context" },
  work: kubeconfig,
});

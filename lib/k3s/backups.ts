/** Backups on the operator's machine: which is the newest, what is in one, and the key that opens it. */
import { execFile } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { promisify } from "node:util";
import { boxes } from "../boxes.ts";
import { look } from "../converge.ts";
import { hashOf, putNew, remove, temporary } from "../files.ts";
import type { Run } from "../script.ts";
import { aFile, SettingError } from "../settings.ts";
import { sh } from "../sh.ts";
import { Failure, type Look, prints, type Step, step } from "../step.ts";
import { boxNames, parseKeyValues, quoted, sha256, splitWords } from "../text.ts";
import { caIn } from "../token.ts";
import { fetchFrom, textIn } from "./bucket.ts";
import { address, VERSION } from "./nodes.ts";
import { COPIES, calledIn, isBucket, keepsFor } from "./schedule.ts";

/** The operator's certificate, to which backups are encrypted, and its key, which alone opens them. */
export const certificateOf = (run: Run): string => join(dirname(run.envFile), "backup.crt");
export const keyOf = (run: Run): string => join(dirname(run.envFile), "backup.key");

/** The whole of it: a name from elsewhere becomes part of a path. */
const NAME = /^k3s-([\w.-]+)-(\d{8}T\d{6}Z)\.tar\.gz(\.cms)?$/;

/** When a backup of this name was made, as text that sorts; "" for other names. */
export const madeAt = (name: string): string => NAME.exec(name)?.[2] ?? "";

/** How long ago a backup was made, by its name and this machine's clock. */
export function age(file: string, now = Date.now()): string {
  const [, day = "", time = ""] = /^(\d{8})T(\d{6})Z$/.exec(madeAt(basename(file))) ?? [];
  if (!day) return "of unknown age";
  const iso = `${day.replace(/(....)(..)(..)/, "$1-$2-$3")}T${time.replace(/(..)(..)(..)/, "$1:$2:$3")}Z`;
  const minutes = Math.max(0, Math.round((now - Date.parse(iso)) / 60_000));
  const parts = [
    [Math.floor(minutes / 1440), "d"],
    [Math.floor(minutes / 60) % 24, "h"],
    [minutes % 60, "min"],
  ] as const;
  const shown = parts.filter(([count]) => count).map(([count, unit]) => `${count} ${unit}`);
  return `made ${shown.slice(0, 2).join(" ") || "less than a minute"} ago (${iso})`;
}

const ran = promisify(execFile);
const oneLine = (text: string) => splitWords(text.replaceAll("\n", " ")).join(" ").slice(0, 300);

/**
 * A backup as an archive: a plain one as it is, an encrypted one in a temporary file, 0600, until `done` is called.
 * @throws {SettingError} when the key is missing, or is another one's.
 */
export async function opened(file: string, run: Run, named = file): Promise<{ file: string; done(): void }> {
  aFile("BACKUP", file);
  if (!/\.cms( in |$)/.test(named)) return { file, done: () => {} };
  const key = keyOf(run);
  const says = (what: string) => new SettingError(`${quoted(named)} cannot be opened: ${what}`);
  if (!existsSync(key)) throw says(`expected the operator's key, ${key}`);
  const plain = temporary(dirname(resolve(run.envFile)));
  const done = () => remove(plain);
  const mask = process.umask(0o077);
  try {
    const words = [
      "cms",
      "-decrypt",
      "-binary",
      "-inform",
      "DER",
      "-inkey",
      key,
      "-in",
      resolve(file),
      "-out",
    ];
    await ran("openssl", [...words, plain]);
    // Under a wrong key, openssl may take what it finds for the content.
    const { stdout } = await ran("head", ["-c", "2", plain], { encoding: "buffer" });
    if (!stdout.equals(Buffer.from([0x1f, 0x8b]))) throw new Error("it is no archive under this key");
    return { file: plain, done };
  } catch (error) {
    done();
    const { code, stderr, message } = error as { code?: unknown; stderr?: unknown; message: string };
    if (code === "ENOENT") throw says("openssl is not installed here");
    const parts = /asn1|ASN1|not enough data|parse|Error reading/.test(String(stderr));
    throw says(
      parts
        ? "it is damaged, or cut off"
        : `${key} is not the key of the certificate that it was encrypted to, or it is damaged (${oneLine(String(stderr || message)).replace(/.*:(?=[a-z])/, "")})`,
    );
  } finally {
    process.umask(mask);
  }
}

/** What the database in a backup has; `verified` is false where the box had nothing that reads SQLite. */
export interface Counts {
  verified: boolean;
  revision?: number;
  nodes?: number;
  deployments?: number;
  secrets?: number;
}

/** What an archive says of its own database; undefined for one of an earlier release, which says nothing. */
export async function listOf(file: string): Promise<Counts | undefined> {
  const { stdout } = await member(file, "list");
  if (!stdout) return undefined;
  if (/^unverified$/m.test(stdout)) return { verified: false };
  const values = parseKeyValues(stdout);
  const count = (name: string) => (/^\d+$/.test(values[name] ?? "") ? { [name]: Number(values[name]) } : {});
  return {
    verified: true,
    ...count("revision"),
    ...count("nodes"),
    ...count("deployments"),
    ...count("secrets"),
  };
}

/** An archive's description. @throws {SettingError} when the file is no backup, or is damaged. */
export async function aboutOf(
  file: string,
  named = file,
): Promise<{ version: string; node: string; ip: string; made?: string }> {
  aFile("BACKUP", file);
  const { stdout, stderr } = await member(file, "about");
  const { version = "", node, ip, made } = parseKeyValues(stdout);
  if (VERSION.test(version) && node && address(ip))
    return { version, node, ip: ip as string, ...(made ? { made } : {}) };
  throw new SettingError(
    `BACKUP is "${named}": ${oneLine(stderr) || "it is not a file written by make backup"}`,
  );
}

/** A member's text. Reads to the end, for gzip's checksum. With the full path: tar takes host:file for another machine's. */
const member = async (file: string, name: string) =>
  await ran("tar", ["-xzOf", resolve(file), name], { maxBuffer: 100_000 }).catch((error) => ({
    stdout: "",
    stderr: String(error.stderr || error.message),
  }));

/** The CA hash of an archive's cluster. */
export const caOf = async (file: string): Promise<string> =>
  caIn((await member(file, "token")).stdout) ?? sha256((await member(file, "tls/server-ca.crt")).stdout);

/** A copy that is elsewhere: its name, and how it comes here. */
interface Copy {
  name: string;
  sha256: string;
  fetch(file: string): Promise<void>;
}

const copiesLook = prints(
  "copies",
)(sh`fact copies; cd ${COPIES} 2>/dev/null && for name in k3s-*.tar.gz.cms; do
  [ -f "$name" ] && echo "$name"
done`);
const sumLook = (name: string) =>
  prints("copy")(sh`fact copy; sha256sum <${`${COPIES}/${name}`} 2>/dev/null | cut -d' ' -f1`);
const looksAt = <F extends string>(look: Look<F>): Step<F> =>
  step({ name: "copies", options: [], look: () => [look], plan: () => [] });

const byTime = (one: string, other: string) => madeAt(other).localeCompare(madeAt(one));
const DAY = 86_400_000;
/** The newest of these names; none of tomorrow's, which would be the newest for ever. */
const latestOf = (names: readonly string[]) => {
  const end = new Date(Date.now() + DAY).toISOString().replace(/[-:]|\.\d+/g, "");
  return names.filter((name) => madeAt(name) && name.endsWith(".cms") && madeAt(name) < end).sort(byTime)[0];
};

/** The newest copy in BACKUP_TO. @throws {Failure | Unreachable} where it does not answer. */
async function newestCopy(run: Run, exclude: readonly string[]): Promise<Copy | undefined> {
  const { settings } = run;
  const to = settings.BACKUP_TO;
  const server = calledIn(boxNames(settings.SERVER)[0] ?? "");
  if (!to || !server) return undefined;
  const ours = (name: string) => NAME.exec(name)?.[1] === server;
  if (isBucket(to)) {
    const text = (await textIn(to, `k3s-${server}-latest`, settings)) ?? "";
    const rows = text.split("\n").map((row) => row.split(" "));
    const name = latestOf(rows.map(([name = ""]) => name).filter(ours));
    const sum = rows.find(([first]) => first === name)?.[1];
    if (!name || !/^[0-9a-f]{64}$/.test(sum ?? "")) return undefined;
    return { name, sha256: sum as string, fetch: (file) => fetchFrom(to, name, settings, file) };
  }
  const keepers = [...(await boxes(run, "SERVER")), ...(await boxes(run, "AGENTS"))];
  const keeper = keepers.find(keepsFor(to));
  if (!keeper || exclude.includes(keeper.name)) return undefined;
  const { copies = "" } = await look(keeper, [looksAt(copiesLook)]);
  // After a move the copies of the last server may be all there is.
  const names = copies.split("\n");
  const name = latestOf(names.filter(ours)) ?? latestOf(names);
  if (!name) return undefined;
  const { copy = "" } = await look(keeper, [looksAt(sumLook(name))]);
  return { name, sha256: copy.trim(), fetch: (file) => keeper.shell.pull(`${COPIES}/${name}`, file) };
}

/** Brings a copy here, if it is what its name says. */
async function brought(run: Run, copy: Copy, asked: string | undefined, folder: string): Promise<string> {
  const part = temporary(folder);
  const path = join(folder, copy.name);
  const named = `${copy.name} in ${run.settings.BACKUP_TO}`;
  try {
    await copy.fetch(part);
    const have = await hashOf(part);
    if (have !== copy.sha256)
      throw new Failure(`The copy of ${named} has sha256 ${have}, not ${copy.sha256}`);
    const { file, done } = await opened(part, run, named);
    try {
      const { made } = await aboutOf(file, named);
      if (made && made !== madeAt(copy.name))
        throw new Failure(`${named} was made at ${made}: it has another's name`);
      if (asked && (await caOf(file)) !== asked) throw new Failure(`${named} is of another cluster`);
    } finally {
      done();
    }
    putNew(part, path);
    return path;
  } finally {
    remove(part);
  }
}

/**
 * The path of the newest backup of this cluster, on this machine: of the files beside the env file and the newest copy in
 * BACKUP_TO, which is brought here if its name is later. Where BACKUP_TO has none that is of use, that is said, and those
 * that are here count.
 * @param exclude names of boxes that are not asked.
 * @throws {SettingError} when there is none, or the newest on this machine cannot be opened.
 */
export async function newest(run: Run, exclude: readonly string[] = []): Promise<string> {
  const folder = dirname(resolve(run.envFile));
  const asked = caIn(run.settings.K3S_TOKEN);
  let here = "";
  for (const name of readdirSync(folder).filter(madeAt).sort(byTime)) {
    const path = join(folder, name);
    const { file, done } = await opened(path, run);
    try {
      await aboutOf(file, path);
      // Several clusters' env files may be in one folder.
      if (asked && (await caOf(file)) !== asked) continue;
    } finally {
      done();
    }
    here = path;
    break;
  }
  try {
    const copy = await newestCopy(run, exclude);
    if (copy && madeAt(copy.name) > madeAt(basename(here))) return await brought(run, copy, asked, folder);
  } catch (error) {
    if (!here) throw error;
    process.stderr.write(`${(error as Error).message}: ${here} is taken\n`);
  }
  if (here) return here;
  const places = [folder, run.settings.BACKUP_TO].filter(Boolean).join(" or ");
  throw new SettingError(
    `BACKUP is not set, and there is no backup of this cluster in ${places}: expected one, as make backup makes it`,
  );
}

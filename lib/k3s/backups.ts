/** Backups on the operator's machine: which is the newest, what is in one, and the key that opens it. */
import { execFile } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { promisify } from "node:util";
import { remove, temporary } from "../files.ts";
import type { Run } from "../script.ts";
import { aFile, SettingError } from "../settings.ts";
import { parseKeyValues, quoted, sha256, splitWords } from "../text.ts";
import { caIn } from "../token.ts";
import { address, VERSION } from "./nodes.ts";

/** The operator's certificate, to which backups are encrypted, and its key, which alone opens them. */
export const certificateOf = (run: Run): string => join(dirname(run.envFile), "backup.crt");
export const keyOf = (run: Run): string => join(dirname(run.envFile), "backup.key");

const NAME = /^k3s-(.+)-(\d{8}T\d{6}Z)\.tar\.gz(\.cms)?$/;

/** When a backup of this name was made, as text that sorts; "" for other names. */
export const madeAt = (name: string): string => NAME.exec(basename(name))?.[2] ?? "";

const ran = promisify(execFile);
const oneLine = (text: string) => splitWords(text.replaceAll("\n", " ")).join(" ").slice(0, 300);

/**
 * A backup as an archive: a plain one as it is, an encrypted one in a temporary file, 0600, until `done` is called.
 * @throws {SettingError} when the key is missing, or is another one's.
 */
export async function opened(file: string, run: Run): Promise<{ file: string; done(): void }> {
  aFile("BACKUP", file);
  if (!/\.cms$/.test(file)) return { file, done: () => {} };
  const key = keyOf(run);
  const says = (what: string) => new SettingError(`${quoted(file)} cannot be opened: ${what}`);
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
): Promise<{ version: string; node: string; ip: string }> {
  aFile("BACKUP", file);
  const { stdout, stderr } = await member(file, "about");
  const { version = "", node, ip } = parseKeyValues(stdout);
  if (VERSION.test(version) && node && address(ip)) return { version, node, ip: ip as string };
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

/**
 * The path of the newest backup of this cluster, brought to this machine: of the files beside the env file and those in
 * BACKUP_TO, the latest name.
 * @param exclude names of boxes that are not asked.
 * @throws {SettingError} when there is none.
 */
export async function newest(run: Run, _exclude: readonly string[] = []): Promise<string> {
  const folder = dirname(resolve(run.envFile));
  const here = readdirSync(folder)
    .filter(madeAt)
    .sort((one, other) => madeAt(other).localeCompare(madeAt(one)))
    .map((name) => join(folder, name));
  const asked = caIn(run.settings.K3S_TOKEN);
  for (const path of here) {
    if (!asked) return path;
    // Several clusters' env files may be in one folder.
    const { file, done } = await opened(path, run);
    const ca = await caOf(file).finally(done);
    if (ca === asked) return path;
  }
  throw new SettingError(
    `BACKUP is not set, and there is no backup of this cluster in ${folder}: expected one, as make backup makes it`,
  );
}

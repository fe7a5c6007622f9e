#!/usr/bin/env -S node --import tsx
/** The server's datastore, token, certificates and manifests, in a file on this machine: all that `restore` needs. */
import { execFile } from "node:child_process";
import { createPrivateKey, X509Certificate } from "node:crypto";
import { existsSync, lstatSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { promisify } from "node:util";
import { boxes } from "../../lib/boxes.ts";
import { look, lookAndConverge } from "../../lib/converge.ts";
import { hashOf, putNew, remove, temporary, tryWrite } from "../../lib/files.ts";
import { attempt, bring, worst } from "../../lib/fleet.ts";
import { DATA, PACK } from "../../lib/k3s/archive.ts";
import { certificateOf, keyOf } from "../../lib/k3s/backups.ts";
import { nodeNameOf } from "../../lib/k3s/identity.ts";
import {
  calledIn,
  isBucket,
  keepsFor,
  receives,
  receivesNone,
  scheduled,
  scheduleIn,
  scheduleKey,
  scheduleKeyOf,
  type Target,
  targetOf,
  unscheduled,
} from "../../lib/k3s/schedule.ts";
import { main } from "../../lib/k3s/script.ts";
import { binaryLook, nameLook } from "../../lib/k3s/unit.ts";
import { watch } from "../../lib/report.ts";
import type { Box, Run } from "../../lib/script.ts";
import { aFile, SettingError } from "../../lib/settings.ts";
import { raw, sh } from "../../lib/sh.ts";
import { type Change, Failure, prints, Refusal, step } from "../../lib/step.ts";
import { nameOf, quoted } from "../../lib/text.ts";

const FOLDER = "/var/lib/rancher/k3s/backup";

/** Packs the archive `id` on the server. Its first file, `about`, describes the backup. */
export const archive = (id: string) =>
  step({
    name: "backup",
    options: ["SERVER", "PUBLIC_IP", "BACKUP", "K3S_DATASTORE_ENDPOINT"],

    look: () => [
      binaryLook,
      nameLook,
      prints("database made")(`fact database; ls ${DATA}/db/state.db 2>/dev/null
fact made; sha256sum <${FOLDER}/${id}.tar.gz 2>/dev/null | cut -d' ' -f1`),
    ],

    plan(want, facts): Change[] {
      if (want.K3S_DATASTORE_ENDPOINT)
        throw new Refusal(
          "The cluster is in the database of K3S_DATASTORE_ENDPOINT, which has its own ways of a backup; keep K3S_TOKEN with it, which decrypts the cluster's keys there",
        );
      if (facts.made?.trim()) return [];
      if (!facts.database?.trim())
        throw new Refusal(
          `There is no SQLite datastore on this box (${DATA}/db/state.db): is it the server?`,
        );
      const about = [
        `version=${facts.version?.trim()}`,
        `node=${nodeNameOf("server", want, facts)}`,
        `ip=${want.PUBLIC_IP}`,
      ].join("\n");
      return [
        {
          why: "copy the datastore, token, certificates, manifests and devices; k3s is paused meanwhile",
          sh: sh`${raw(PACK)}
pack ${FOLDER} ${id} ${about}`,
          seconds: 600,
        },
      ];
    },
  });

export const cleared = step({
  name: "clear",
  options: [],
  look: () => [prints("folder")(`fact folder; ls -d ${FOLDER} 2>/dev/null`)],
  plan: (_want, facts) =>
    facts.folder?.trim() ? [{ why: "remove the copy from the server", sh: `rm -rf ${FOLDER}` }] : [],
});

async function backup(run: Run): Promise<number> {
  const [server] = (await boxes(run, "SERVER")) as [Box];
  const id = new Date().toISOString().replace(/[-:]|\.\d+/g, "");
  const file = run.settings.BACKUP || join(dirname(run.envFile), `k3s-${calledIn(server.name)}-${id}.tar.gz`);
  freeName(file, run.settings.BACKUP ? run.origins.BACKUP : "default");
  const all = run.settings.K3S_DATASTORE_ENDPOINT ? [server] : [server, ...(await boxes(run, "AGENTS"))];
  const target = targetIn(run, all);
  const certificate = run.settings.BACKUP_EVERY ? await certificateIn(run) : "";
  await watch([server]);
  const byItself = await attempt(run, server, () => schedule(run, server, target, all, certificate));
  const here = await attempt(run, server, async () => {
    const now = await bring(run, server, [archive(id)]);
    if (!now) return;
    const made = now.facts.made?.trim();
    server.line.says(`copies it to ${file}`);
    const part = temporary(dirname(file));
    try {
      await server.shell.pull(`${FOLDER}/${id}.tar.gz`, part);
      const have = await hashOf(part);
      if (have !== made) throw new Failure(`The copy for ${file} has sha256 ${have}, not ${made}`);
      putNew(part, file);
    } catch (error) {
      // If this cleanup on the server fails, the next backup does it.
      await lookAndConverge(server, cleared).catch(() => {});
      throw error;
    } finally {
      remove(part);
    }
    await lookAndConverge(server, cleared);
    server.line.done(false, `${file}, a secret: it has the token and all keys of the cluster`);
    process.stdout.write(`${file}\n`);
  });
  return worst([byItself, here]);
}

/** The node that BACKUP_TO names; undefined for a bucket. @throws {SettingError} */
function targetIn({ settings, origins }: Run, all: readonly Box[]): Box | undefined {
  const { BACKUP_EVERY, BACKUP_TO, S3_ACCESS_KEY, S3_SECRET_KEY } = settings;
  if (!BACKUP_EVERY) return undefined;
  if (!BACKUP_TO)
    throw new SettingError(
      `BACKUP_TO is not set, and BACKUP_EVERY is (${origins.BACKUP_EVERY}): expected a node, or a folder in an S3 bucket`,
    );
  if (isBucket(BACKUP_TO)) {
    if (!S3_ACCESS_KEY || !S3_SECRET_KEY)
      throw new SettingError(
        `${S3_ACCESS_KEY ? "S3_SECRET_KEY" : "S3_ACCESS_KEY"} is not set: expected a key that may write to ${BACKUP_TO}`,
      );
    return undefined;
  }
  const target = all.find(keepsFor(BACKUP_TO));
  if (!target || target === all[0])
    throw new SettingError(
      `BACKUP_TO is ${BACKUP_TO} (${origins.BACKUP_TO}): expected ${
        target
          ? "another box than the server, with which they would be lost"
          : `one of ${
              all
                .slice(1)
                .map(({ host }) => host)
                .join(", ") || "AGENTS, which is empty"
            }`
      }`,
    );
  return target;
}

/** Sets up what the server does by itself, or takes it away. */
async function schedule(
  run: Run,
  server: Box,
  target: Box | undefined,
  all: readonly Box[],
  certificate: string,
): Promise<void> {
  const { BACKUP_EVERY, BACKUP_KEEP } = run.settings;
  const before = await look(server, [unscheduled]);
  const had = scheduleIn(before);
  const keeper = had && all.find((box) => box !== server && box.name === nameOf(had.to));
  // What was a target is none any more, unless it does not answer: then it is said.
  if (keeper && keeper !== target)
    await bring(run, { ...keeper, line: server.line }, [receivesNone]).catch((error) =>
      server.line.says(`${keeper.name} keeps the key that let backups in: ${error.message}`),
    );
  if (!BACKUP_EVERY) {
    if (had) await bring(run, server, [unscheduled], before);
    return;
  }
  let key: string | undefined;
  let at: Target | undefined;
  if (target) {
    const keyed = await bring(run, server, [scheduleKey], before);
    key = scheduleKeyOf(keyed?.facts ?? before);
    const receiver = receives(calledIn(server.name), BACKUP_KEEP, key);
    const found = await bring(run, { ...target, line: server.line }, [receiver]);
    at = targetOf(found?.facts ?? (await look(target, [receiver])));
  }
  await bring(run, server, [scheduled(calledIn(server.name), certificate, at)]);
}

/** A restored or promoted server backs itself up, if BACKUP_EVERY is set. @param all this server, then the agents. */
export async function backupsFollow(run: Run, all: readonly [Box, ...Box[]]): Promise<number> {
  const [server] = all;
  return await attempt(run, server, async () => {
    // The lost server's key may have let its backups in here.
    await bring(run, server, [receivesNone]);
    if (!run.settings.BACKUP_EVERY) return;
    let target: Box | undefined;
    try {
      target = targetIn(run, all);
    } catch (error) {
      // BACKUP_TO may be the lost server, or this one.
      server.line.says(
        `this server does not back itself up yet: ${(error as Error).message}; make backup is still to be run`,
      );
      return;
    }
    await schedule(run, server, target, all, await certificateIn(run));
  });
}

/** The certificate that backups are encrypted to; made with its key where neither is there. */
async function certificateIn(run: Run): Promise<string> {
  const [certificate, key] = [certificateOf(run), keyOf(run)];
  if (!existsSync(certificate) && run.mode === "apply") {
    const parts = [temporary(dirname(key)), temporary(dirname(certificate))] as const;
    const mask = process.umask(0o077);
    try {
      const made = existsSync(key) ? ["-key", key] : ["-newkey", "rsa:3072", "-nodes", "-keyout", parts[0]];
      const words = [
        "req",
        "-x509",
        "-sha256",
        "-days",
        "36500",
        "-subj",
        "/CN=k3s backups",
        ...made,
        "-out",
        parts[1],
      ];
      await promisify(execFile)("openssl", words);
      if (!existsSync(key)) putNew(parts[0], key);
      putNew(parts[1], certificate);
    } catch (error) {
      const { code, stderr, message } = error as { code?: unknown; stderr?: string; message: string };
      if (code === "ENOENT")
        throw new Failure("openssl is not installed here, which makes the key of backups");
      throw stderr
        ? new Failure(`openssl has made no key of backups: ${stderr.trim().split("\n").at(-1)}`)
        : new Failure(message);
    } finally {
      process.umask(mask);
      parts.forEach(remove);
    }
    process.stderr.write(`${key} opens the backups, and nothing else does: keep a copy of it elsewhere\n`);
  }
  if (!existsSync(certificate)) {
    if (run.mode === "print")
      throw new SettingError(
        `${certificate} is not there yet, which the script would have: make backup without PRINT=1 makes it`,
      );
    return "";
  }
  aFile("BACKUP", certificate);
  const text = readFileSync(certificate, "utf8");
  const says = (what: string) => new SettingError(`${certificate}: expected ${what}`);
  if (text.includes("PRIVATE KEY"))
    throw says("a certificate alone: it has a key too, and goes to the server");
  const [first] =
    /^-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]+-----END CERTIFICATE-----\n/m.exec(text) ?? [];
  let parsed: X509Certificate;
  try {
    parsed = new X509Certificate(first ?? "");
  } catch {
    throw says("a certificate in PEM, to which backups are encrypted");
  }
  if (existsSync(key) && !parsed.checkPrivateKey(createPrivateKey(readFileSync(key))))
    throw says(`the certificate of ${key}, which would not open what is encrypted to this one`);
  return first as string;
}

/** @throws {SettingError} when no new file of this name can be created. */
function freeName(file: string, origin: string): void {
  const says = (what: string) => new SettingError(`BACKUP is ${quoted(file)} (${origin}): ${what}`);
  if (lstatSync(file, { throwIfNoEntry: false }))
    throw says("that is there already: expected the name of a new file, or none");
  try {
    tryWrite(file);
  } catch (error) {
    throw says((error as Error).message);
  }
}

await main(import.meta, {
  about:
    "Copies the server's SQLite datastore, token, certificates and manifests to a file on this machine. With BACKUP_EVERY, the server also does so by itself, encrypted, to BACKUP_TO.",
  steps: [archive(""), scheduled("", "", undefined)],
  host: "SERVER",
  work: backup,
});

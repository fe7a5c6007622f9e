#!/usr/bin/env -S node --import tsx
/** The server's datastore, token, certificates and manifests, in a file on this machine: all that `restore` needs. */
import { lstatSync } from "node:fs";
import { dirname, join } from "node:path";
import { boxes } from "../../lib/boxes.ts";
import { lookAndConverge } from "../../lib/converge.ts";
import { hashOf, putNew, remove, temporary, tryWrite } from "../../lib/files.ts";
import { attempt, bring } from "../../lib/fleet.ts";
import { DATA, PACK } from "../../lib/k3s/archive.ts";
import { nodeNameOf } from "../../lib/k3s/identity.ts";
import { main } from "../../lib/k3s/script.ts";
import { binaryLook, nameLook } from "../../lib/k3s/unit.ts";
import { watch } from "../../lib/report.ts";
import type { Box, Run } from "../../lib/script.ts";
import { SettingError } from "../../lib/settings.ts";
import { raw, sh } from "../../lib/sh.ts";
import { type Change, Failure, prints, Refusal, step } from "../../lib/step.ts";
import { quoted } from "../../lib/text.ts";

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
  const file = run.settings.BACKUP || join(dirname(run.envFile), `k3s-${server.name}-${id}.tar.gz`);
  freeName(file, run.settings.BACKUP ? run.origins.BACKUP : "default");
  await watch([server]);
  return await attempt(run, server, async () => {
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
  about: "Copies the server's SQLite datastore, token, certificates and manifests to a file on this machine.",
  steps: [archive("")],
  host: "SERVER",
  work: backup,
});

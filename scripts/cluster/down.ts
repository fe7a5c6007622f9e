#!/usr/bin/env -S node --import tsx
/** Removes the whole cluster from SERVER and all AGENTS, after asking. */
import { createInterface } from "node:readline/promises";
import { boxes as boxesOf } from "../../lib/boxes.ts";
import { look } from "../../lib/converge.ts";
import { readEnv, updateEnv } from "../../lib/env-file.ts";
import { shown } from "../../lib/files.ts";
import { bring, each, showLater, showPlan, worst } from "../../lib/fleet.ts";
import { casOf, mayGo } from "../../lib/k3s/identity.ts";
import { main } from "../../lib/k3s/script.ts";
import type { Role } from "../../lib/k3s/unit.ts";
import { watch } from "../../lib/report.ts";
import type { Box, Run } from "../../lib/script.ts";
import { SettingError, type Settings } from "../../lib/settings.ts";
import { type Facts, planAll } from "../../lib/step.ts";
import { caIn } from "../../lib/token.ts";
import { uninstall } from "./remove.ts";

/** A box from which k3s is to be removed, with its facts if it answers. */
interface Leaving {
  box: Box;
  role: Role;
  facts?: Facts;
}

/**
 * Decides which boxes must not be removed, and which have something to remove, for the question to the user. One that
 * must not be removed stops the run: the settings may name another cluster. One that does not answer stops no other.
 *
 * @param leaving the boxes, the first server first.
 */
export function decide(
  leaving: readonly Leaving[],
  settings: Pick<Settings, "K3S_TOKEN">,
  force: boolean,
): { refused: Map<Box, unknown>; full: Box[] } {
  const asked = caIn(settings.K3S_TOKEN);
  const ca = asked ? [asked] : casOf(leaving[0]?.facts ?? {}).server;
  const refused = new Map<Box, unknown>();
  const full: Box[] = [];
  for (const { box, role, facts } of leaving) {
    if (!facts) continue;
    try {
      mayGo(facts, force ? [] : ca, role, false, force);
    } catch (why) {
      refused.set(box, why);
    }
    if (planAll([uninstall], box.want, facts).length) full.push(box);
  }
  return { refused, full };
}

/**
 * The settings that are deleted from the env file once k3s is `gone` from every box: URL and token of the cluster. In a
 * shared datastore the cluster continues to exist, and they are kept.
 */
export function outdated(
  leaving: readonly Leaving[],
  settings: Pick<Settings, "K3S_DATASTORE_ENDPOINT">,
  env: Record<string, string>,
  gone: readonly Box[],
): string[] {
  const over = leaving.every(({ box }) => gone.includes(box)) && !settings.K3S_DATASTORE_ENDPOINT;
  const own = leaving.some(
    ({ box, role }) => role === "server" && env.K3S_URL?.trim() === `https://${box.ip}:6443`,
  );
  return ["K3S_URL", "K3S_TOKEN"].filter((name) => over && own && env[name] !== undefined);
}

async function down(run: Run): Promise<number> {
  const { settings, mode, envFile } = run;
  const [yes, force] = [run.flags.has("yes"), run.flags.has("force")];
  if (run.origins.SERVER === "default")
    throw new SettingError(
      "SERVER is not set: expected the box that is to lose its cluster, or SERVER= (empty) for this machine",
    );
  const servers = await boxesOf(run, "SERVER");
  if (mode === "apply" && !yes && !process.stdin.isTTY)
    throw new SettingError(
      "This removes a whole cluster, and asks first: run it on a terminal, or add YES=1",
    );
  const boxes = [...servers, ...(await boxesOf(run, "AGENTS"))];
  await watch(boxes);
  const found = new Map<Box, Facts>();
  const looked = await each(run, boxes, async (box) => {
    found.set(box, await look(box, [uninstall]));
  });
  const leaving = boxes.map((box, i): Leaving => {
    return { box, role: i < servers.length ? "server" : "agent", facts: found.get(box) };
  });
  const there = [...found.keys()];
  const { refused, full } = decide(leaving, settings, force);
  const examined = await each(run, there, async (box) => {
    if (refused.has(box)) throw refused.get(box);
    if (mode !== "apply") showPlan(run, box, [uninstall], found.get(box) as Facts);
  });
  if (mode !== "apply") {
    const forgotten = outdated(leaving, settings, readEnv(envFile).values, there);
    if (forgotten.length) showLater(run, `${forgotten.join(" and ")} go from ${shown(envFile)}`);
  }
  if (mode !== "apply" || worst(examined) !== 0) return worst([...looked, ...examined]);
  if (full.length && !yes && !(await agreed(full.map(({ name }) => name)))) return 1;
  const removed = await each(run, there, async (box) => {
    const now = await bring(run, box, [uninstall], found.get(box));
    box.line.done(Boolean(now?.nothing), "no k3s on this box");
  });
  const gone = there.filter((_, i) => removed[i] === 0);
  const forgotten = outdated(leaving, settings, readEnv(envFile).values, gone);
  if (forgotten.length) {
    await updateEnv(envFile, Object.fromEntries(forgotten.map((name) => [name, undefined])));
    process.stderr.write(`${forgotten.join(" and ")} went from ${envFile} too\n`);
  }
  return worst([...looked, ...removed]);
}

async function agreed(names: string[]): Promise<boolean> {
  const terminal = createInterface({ input: process.stdin, output: process.stderr });
  // The terminal is in raw mode: Ctrl-C arrives as a key, and Ctrl-D does not end the question.
  terminal.once("SIGINT", () => process.emit("SIGINT"));
  const closed = new Promise<string>((done) => terminal.once("close", () => done("")));
  const asked = terminal.question(
    `k3s and all its data, local volumes too, will be gone from ${names.join(", ")}. Type "yes" to go on: `,
  );
  const said = await Promise.race([asked, closed]);
  terminal.close();
  if (said.trim() === "yes") return true;
  process.stderr.write("Nothing was touched.\n");
  return false;
}

await main(import.meta, {
  about: "Removes k3s and all its data from SERVER and all AGENTS, after confirmation.",
  steps: [{ ...uninstall, options: ["SERVER", "PUBLIC_IP", "SERVER_ARGS"] }],
  flags: {
    yes: "do not ask",
    force: "also remove a box of another cluster, or a k3s that this project did not install",
  },
  writes: (want, known) => Boolean(known.K3S_URL) && !want.K3S_DATASTORE_ENDPOINT,
  everyBox: "make remove HOST=… removes one",
  work: down,
});

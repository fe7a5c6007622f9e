#!/usr/bin/env -S node --import tsx
/** Removes the whole cluster from SERVER and all AGENTS, after asking. */
import { createInterface } from "node:readline/promises";
import { boxes as boxesOf } from "../../lib/boxes.ts";
import { look } from "../../lib/converge.ts";
import { readEnv, updateEnv } from "../../lib/env-file.ts";
import { bring, each, showPlan, worst } from "../../lib/fleet.ts";
import { casOf, mayGo } from "../../lib/k3s/identity.ts";
import { run } from "../../lib/k3s/script.ts";
import { watch } from "../../lib/report.ts";
import type { Box, Call } from "../../lib/script.ts";
import { SettingError } from "../../lib/settings.ts";
import { type Facts, planAll } from "../../lib/step.ts";
import { caIn } from "../../lib/token.ts";
import { uninstall } from "./remove.ts";

async function down(call: Call): Promise<number> {
  if (call.origins.SERVER === "default")
    throw new SettingError(
      "SERVER is not set: expected the box that is to lose its cluster, or SERVER= (empty) for this machine",
    );
  const servers = await boxesOf(call, "SERVER");
  if (call.mode === "apply" && !call.flags.has("yes") && !process.stdin.isTTY)
    throw new SettingError(
      "This removes a whole cluster, and asks first: run it on a terminal, or add YES=1",
    );
  const boxes = [...servers, ...(await boxesOf(call, "AGENTS"))];
  await watch(boxes);
  const found = new Map<Box, Facts>();
  const looked = await each(call, boxes, async (box) => {
    found.set(box, await look(box, [uninstall]));
  });
  // One that must not go stops all: the settings may be those of another cluster.
  const force = call.flags.has("force");
  const ca = [...found].flatMap(([box, facts]) => (box === servers[0] ? casOf(facts).server : []));
  const asked = caIn(call.settings.K3S_TOKEN);
  const cluster = force ? [] : asked ? [asked] : ca;
  const examined = await each(call, [...found.keys()], async (box) => {
    const facts = found.get(box) as Facts;
    mayGo(facts, cluster, servers.includes(box) ? "server" : "agent", false, force);
    if (call.mode !== "apply") showPlan(call, box, [uninstall], facts);
  });
  if (call.mode !== "apply" || worst(examined) !== 0) return worst([...looked, ...examined]);
  const full = [...found].filter(([box, facts]) => planAll([uninstall], box.want, facts).length);
  if (full.length && !call.flags.has("yes") && !(await agreed(full.map(([box]) => box.name)))) return 1;
  const gone = new Set<Box>();
  const removed = await each(call, [...found.keys()], async (box) => {
    const now = await bring(call, box, [uninstall], found.get(box));
    box.line.done(Boolean(now?.nothing), "no k3s on this box");
    gone.add(box);
  });
  // A box that could not be reached is known by them when its turn comes.
  if (boxes.every((box) => gone.has(box))) await forget(call, servers);
  return worst([...looked, ...removed]);
}

/** What joins boxes to a cluster that is no more goes from the env file. In a shared datastore it goes on living. */
async function forget(call: Call, servers: readonly Box[]): Promise<void> {
  const { K3S_URL, K3S_TOKEN } = readEnv(call.envFile).values;
  const own = servers.some(({ ip }) => K3S_URL?.trim() === `https://${ip}:6443`);
  if (!own || call.settings.K3S_DATASTORE_ENDPOINT) return;
  await updateEnv(call.envFile, { K3S_URL: undefined, K3S_TOKEN: undefined });
  process.stderr.write(
    `K3S_URL${K3S_TOKEN === undefined ? "" : " and K3S_TOKEN"} went from ${call.envFile} too\n`,
  );
}

async function agreed(names: string[]): Promise<boolean> {
  const terminal = createInterface({ input: process.stdin, output: process.stderr });
  // The terminal is read raw: Ctrl-C comes as a key, and Ctrl-D leaves the question open.
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

await run(import.meta, {
  about: "Removes k3s and all its data from SERVER and all AGENTS, after asking.",
  steps: [{ ...uninstall, options: ["SERVER", "PUBLIC_IP", "SERVER_ARGS"] }],
  flags: { yes: "do not ask", force: "also a box of another cluster, and k3s that somebody else has set up" },
  writes: (want, known) => Boolean(known.K3S_URL) && !want.K3S_DATASTORE_ENDPOINT,
  everyBox: "make remove HOST=… removes one",
  work: down,
});

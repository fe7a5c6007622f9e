#!/usr/bin/env -S node --import tsx
/** Restores a server from a backup on a fresh box, at any address; the agents follow it there. */
import { boxAt, boxes, isSame } from "../../lib/boxes.ts";
import { causes } from "../../lib/check/causes.ts";
import { ask } from "../../lib/check/survey.ts";
import { look, lookAndConverge } from "../../lib/converge.ts";
import { readEnv, updateEnv } from "../../lib/env-file.ts";
import { hashOf, shown } from "../../lib/files.ts";
import { attempt, bring, each, learnedFrom, showLater, worst } from "../../lib/fleet.ts";
import { aboutOf, caOf, opened } from "../../lib/k3s/backups.ts";
import { rangesOf } from "../../lib/k3s/config.ts";
import { bringsBack, devicesIn, ENTRY_FOLDER } from "../../lib/k3s/devices.ts";
import { closeLook, firewall } from "../../lib/k3s/firewall/firewall.ts";
import { ALLOWED, brief, nodeNameOf, whoIs } from "../../lib/k3s/identity.ts";
import { scheduled } from "../../lib/k3s/schedule.ts";
import { main } from "../../lib/k3s/script.ts";
import { nameLook } from "../../lib/k3s/unit.ts";
import { watchStep } from "../../lib/k3s/watch.ts";
import { watch } from "../../lib/report.ts";
import type { Box, Run } from "../../lib/script.ts";
import { SettingError } from "../../lib/settings.ts";
import { raw, sh } from "../../lib/sh.ts";
import {
  type Change,
  type Facts,
  Failure,
  planAll,
  prints,
  Refusal,
  type Step,
  step,
} from "../../lib/step.ts";
import { boxNames, splitWords } from "../../lib/text.ts";
import { caIn } from "../../lib/token.ts";
import { agentSteps, prepareAs, proofLook } from "../agent.ts";
import { server } from "../server.ts";
import { up } from "../up.ts";
import { backupsFollow } from "./backup.ts";
import { dropSecrets, forgotten, keepPasswords, provenLook } from "./remove.ts";

const BASE = "/var/lib/rancher/k3s";
const ARRIVED = "/var/lib/.k3s-restore.tar.gz";

/**
 * Shell that fails for an archive with anything but regular files and folders of a backup's names, or with more than
 * the disk has room for: a compromised server could have made it. It uses the same tar that unpacks it later.
 */
export const checked = (
  file: string,
) => sh`no() { echo "The backup is not as make backup writes it: $1"; rm -f ${file} ../names ../members ../odd; exit 1; }
tar -tzf ${file} >../names || no 'it cannot be read'
# An owner's name may have blanks and digits, and would stand where its size is looked for.
tar --numeric-owner -tvzf ${file} >../members
grep -vE '^(about|list|node-password|token|(tls|cred|manifests|db|devices)(/.*)?)$' ../names >../odd || :
grep -E '(^|/)[.][.](/|$)' ../names >>../odd || :
[ ! -s ../odd ] || no "it has $(head -n 1 ../odd)"
awk '$1 !~ /^[-d][r-][w-][x-][r-][w-][x-][r-][w-][x-][.+@]?$/' ../members >../odd
[ ! -s ../odd ] || no "it has what is no plain file: $(head -n 1 ../odd)"
size=$(awk '{ size += $3 } END { printf "%.0f", size / 1024 }' ../members)
[ "$size" -lt "$(df -Pk . | awk 'NR == 2 { print $4 }')" ] || no "it takes $size kB, and there is less room here"
rm -f ../names ../members ../odd`;

/** The hash of the backup that a server was restored from, and what has been done since, a word a line. */
export const restoredLook = prints("restored")(`fact restored; cat ${BASE}/server/restored 2>/dev/null`);
export const hasDone = (facts: Facts<"restored">, what: string): boolean =>
  (facts.restored ?? "").split("\n").includes(what);
/** Shell that remembers it. */
export const remember = (what: string): string => sh`echo ${what} >>${BASE}/server/restored`;

/** Is the backup whole, and is there room for it? Asked before anything goes from the box. */
export const arrives = (file: string): Change => ({
  why: "check the backup on the box, and that there is room for its data",
  push: { file, path: ARRIVED },
  sh: sh`mkdir -p ${BASE}
rm -rf ${BASE}/server.new
mkdir -m 700 ${BASE}/server.new
cd ${BASE}/server.new
${raw(checked(ARRIVED))}
rm -f ${ARRIVED}`,
  seconds: 300,
});

/**
 * Puts the backup's data in place on a box that has none. Its hash is kept, for an interrupted run.
 * @param named what the user calls the file. @param done what else is to be remembered. An agent's password, and an entry for devices of its own, stay.
 */
export const placeData = (file: string, hash: string, named = file, done: readonly string[] = []) =>
  step({
    name: "put",
    options: ["HOST", "PUBLIC_IP", "BACKUP"],

    look: () => [prints("data restored")(`fact data; ls -A ${BASE}/server 2>/dev/null\n${restoredLook}`)],

    plan(_want, facts): Change[] {
      if (facts.restored?.startsWith(hash)) return [];
      if (facts.data?.trim())
        throw new Refusal(
          `This box has a k3s server's data already (${BASE}/server): a backup is restored on a fresh box`,
        );
      return [
        {
          why: `put the data of ${named} in place`,
          push: { file, path: ARRIVED },
          sh: sh`mkdir -p ${BASE} /etc/rancher/node
rm -rf ${BASE}/server.new
mkdir -m 700 ${BASE}/server.new
cd ${BASE}/server.new
${raw(checked(ARRIVED))}
tar -xzof ${ARRIVED}
${raw(done.length ? "[ -s /etc/rancher/node/password ] || " : "")}mv -f node-password /etc/rancher/node/password
rm -f node-password
[ ! -e devices ] || ${raw(done.length ? sh`[ -s ${ENTRY_FOLDER}/peers ] || ` : "")}{ rm -rf ${ENTRY_FOLDER}; mv devices ${ENTRY_FOLDER}; }
printf '%s\n' ${[hash, ...done]} >restored
sync
mv ${BASE}/server.new ${BASE}/server
rm -f ${ARRIVED}`,
          seconds: 300,
        },
      ];
    },
  });

/**
 * Deletes all node passwords but this box's, once: a node that has joined again since the backup has another one, and
 * would be rejected for ever (v1.36.3, seen). Each agent registers its own again when it follows.
 */
export const forgetPasswords = step({
  name: "unproven",
  options: [],
  look: () => [nameLook, ...provenLook, restoredLook],
  plan(want, facts): Change[] {
    if (!facts.restored || hasDone(facts, "passwords")) return [];
    const own = nodeNameOf("server", want, facts);
    const others = (facts.secrets ?? "")
      .split("\n")
      .filter((name) => /^[a-z0-9.-]+$/.test(name) && name !== own);
    return [
      {
        why: "forget the nodes' passwords: nodes that joined again after the backup have new ones",
        sh: sh`${raw(others.length ? dropSecrets(others) : "")}
${raw(keepPasswords("==", own))}
${raw(remember("passwords"))}`,
      },
    ];
  },
});

/** Deletes this box's own password, once, where it has another one than its node in the backup: it joined again since. */
const forgetOwn = step({
  ...forgetPasswords,
  plan(want, facts): Change[] {
    const own = nodeNameOf("server", want, facts);
    const has = [facts.secrets, facts.passwords].some((names) => names?.split("\n").includes(own));
    if (!facts.restored || !has || hasDone(facts, "own")) return [];
    return [
      {
        why: `forget the password of ${own}, which joined again after the backup`,
        sh: sh`${raw(dropSecrets([own]))}
${raw(keepPasswords("!=", own))}
${raw(remember("own"))}`,
      },
    ];
  },
});

/**
 * Updates the rules of an earlier `make firewall`, if FIREWALL does not do that anyway.
 * @param FIREWALL the addresses of all boxes, and -ADDRESS for the old server's.
 */
export const moveFirewall = (FIREWALL: string) =>
  step({
    name: firewall.name,
    options: firewall.options,
    look: (want) => [
      ...firewall.look({ ...want, FIREWALL }),
      prints("firewalled")(`fact firewalled\n${closeLook(rangesOf(want))}`),
    ],
    plan: (want, facts) =>
      facts.firewalled?.trim() && !want.FIREWALL ? firewall.plan({ ...want, FIREWALL }, facts) : [],
  });

async function restore(run: Run): Promise<number> {
  const { settings } = run;
  if (!settings.BACKUP)
    throw new SettingError("BACKUP is not set: expected the file that make backup has written");
  const { file, done } = await opened(settings.BACKUP, run);
  try {
    return await restoreFrom(file, run);
  } finally {
    done();
  }
}

/** What a backup says of the server that it was made of. */
export type About = Awaited<ReturnType<typeof aboutOf>>;

/**
 * @param named what the user calls the file. @param does what is to be done with it.
 * @throws {SettingError} when it is of another release, or of another cluster.
 */
export async function examine(
  { settings, origins, flags }: Run,
  file: string,
  named: string,
  does: string,
): Promise<About> {
  const about = await aboutOf(file, named);
  if (settings.K3S_VERSION !== about.version)
    throw new SettingError(
      `K3S_VERSION is ${settings.K3S_VERSION} (${origins.K3S_VERSION}), the backup of ${about.version}: ${does} with K3S_VERSION=${about.version}, then upgrade`,
    );
  const ca = await caOf(file);
  const asked = caIn(settings.K3S_TOKEN);
  if (asked && asked !== ca && !(does === "restore" && flags.has("force")))
    throw new SettingError(
      `K3S_TOKEN (${origins.K3S_TOKEN}) is of the CA ${brief(asked)}, the backup of ${brief(ca)}, another cluster, whose token would take its place: expected an env file of its own${does === "restore" ? ", or FORCE=1" : ""}`,
    );
  return about;
}

/** A box that becomes the server in place of others, and the agents that follow it. */
export interface Successor {
  /** The settings from now on: this box is the server. */
  next: Run;
  box: Box;
  agents: Box[];
  /** Updates the rules of an earlier `make firewall`. */
  follows: ReturnType<typeof moveFirewall>;
}

const without = (list: string, word: string) =>
  splitWords(list).includes(word)
    ? splitWords(list)
        .filter((other) => other !== word)
        .join(" ")
    : list;

/**
 * Settings of an env file, NAME__BOX, for a box that is none of `left`: every script would refuse them from now on, and
 * which of them are the cluster's, such as its networks, is the user's to say.
 */
export const orphans = (have: Record<string, string>, lost: string, left: readonly string[]): string[] =>
  left.includes(lost) ? [] : Object.keys(have).filter((key) => /^[A-Z0-9_]+?__(.+)$/.exec(key)?.[1] === lost);

/** @param gone addresses of the servers before. */
export function successor(run: Run, place: Box, follow: readonly Box[], gone: readonly string[]): Successor {
  const { settings } = run;
  const { ip, word, name } = place;
  const [lost = ""] = boxNames(settings.SERVER);
  const agents = without(settings.AGENTS, word);
  const { values, lines } = readEnv(run.envFile);
  const own = orphans(values, lost, boxNames(`${word} ${agents}`));
  if (own.length)
    throw new SettingError(
      `${own.map((key) => `${key} (${shown(run.envFile)} line ${lines[key]})`).join(", ")}: ${lost} is lost: expected what is the cluster's, such as its networks, under the name of HOST, …__${name}, and none of ${lost}`,
    );
  const left = gone.filter((other) => other !== ip);
  const members = [ip, ...follow.map((agent) => agent.ip), ...left.map((other) => `-${other}`)];
  const next: Run = {
    ...run,
    settings: {
      ...settings,
      ...{ SERVER: word, AGENTS: agents, HOST: "", PUBLIC_IP: "" },
      ...{ K3S_URL: "", K3S_TOKEN: "" },
    },
    addresses: { servers: [ip], agents: run.addresses.agents.filter((other) => other !== ip) },
    ...(settings.FIREWALL ? { letIn: members } : {}),
  };
  const nextOf = (box: Box) => Object.assign(boxAt(next, box), { line: box.line });
  return { next, box: nextOf(place), agents: follow.map(nextOf), follows: moveFirewall(members.join(" ")) };
}

/** Starts the server, deletes the nodes of those that are gone, and says in the env file who is the server now. */
export async function begin(
  run: Run,
  { next, box, agents }: Successor,
  steps: Step[],
  gone: readonly string[],
  version: string,
): Promise<void> {
  // A new agent cannot prove that it is the node of its name; an unreachable one is reported when it has to follow. The
  // old server would still count as a peer of all others until its silence is noticed.
  const leaving = gone.filter((ip) => ip !== box.ip).map((ip) => whoIs(ip));
  const proof = ask([proofLook]);
  await Promise.all(
    agents.map(async (agent) => {
      const facts = await look(agent, [proof]).catch(() => undefined);
      if (facts && !facts.proof?.trim())
        leaving.push({ ...whoIs(agent.ip, facts, agent.want), boot: "", machine: "" });
    }),
  );
  const now = await bring(run, box, steps).catch(async (error) => {
    // As k3s repeats forever what it says of a rejected password.
    if (!(error instanceof Failure && /cannot go on|node password/i.test(error.output))) throw error;
    const forgets = await look(box, [forgetOwn]).then((facts) => planAll([forgetOwn], box.want, facts));
    if (!forgets.length) throw error;
    await lookAndConverge(box, forgetOwn);
    return await bring(run, box, steps);
  });
  if (!now) return;
  await lookAndConverge(box, ...leaving.map((who) => forgotten(who, undefined)), forgetPasswords);
  const learned = learnedFrom(steps, box, now.facts);
  Object.assign(next.settings, learned);
  const have = readEnv(run.envFile).values;
  const values: Record<string, string> = { ...learned, SERVER: box.word, K3S_VERSION: version };
  if (have.AGENTS) values.AGENTS = without(have.AGENTS, box.word);
  // At once: the next run is to find the old server there, or the new one.
  await updateEnv(
    run.envFile,
    Object.fromEntries(Object.entries(values).filter(([name, value]) => have[name] !== value)),
  );
}

/** In parallel: each waits for those that the datastore still lists as Ready. */
export const agentsFollow = (run: Run, { agents, follows }: Successor): Promise<number[]> =>
  each(
    run,
    agents,
    async (agent) => {
      // It may have to go back to the backup's release, like its server.
      agent.want = { ...agent.want, allowed: new Set([...run.flags, "release"]) };
      await lookAndConverge(agent, follows, ...agentSteps);
    },
    "agent",
  );

/** Lets devices in again. @param was the address at which they look for their entry. */
export const devicesFollow = (run: Run, { box, follows }: Successor, was: string): Promise<number> =>
  attempt(run, box, async () => {
    const devices = devicesIn((await lookAndConverge(box, bringsBack))["peers-file"]).map(({ name }) => name);
    if (!devices.length) return;
    // Whose port is to be opened is known only now.
    await lookAndConverge(box, follows);
    if (was !== box.ip)
      box.line.says(
        `devices look for it at ${was}: make device NAME=… writes their configurations anew (${devices.join(", ")})`,
      );
  });

/** The box in HOST. @throws {SettingError} */
export async function named(run: Run): Promise<Box> {
  if (run.origins.HOST === "default")
    throw new SettingError("HOST is not set: expected the box that becomes the server");
  const [box, ...others] = (await boxes(run, "HOST")) as [Box];
  if (others.length) throw new SettingError(`HOST names ${others.length + 1} boxes: expected one`);
  return box;
}

async function restoreFrom(file: string, run: Run): Promise<number> {
  const { settings, origins } = run;
  if (settings.K3S_DATASTORE_ENDPOINT)
    throw new SettingError(
      `K3S_DATASTORE_ENDPOINT is set (${origins.K3S_DATASTORE_ENDPOINT}): expected it empty, for a backup is of a server's own SQLite`,
    );
  const about = await examine(run, file, settings.BACKUP, "restore");
  const place = await named(run);
  const follow = await boxes(run, "AGENTS");
  if (follow.some((agent) => isSame(place, agent)))
    throw new SettingError(
      `HOST is ${place.host}, which is one of AGENTS: expected a box that is none (make remove HOST=${place.host}, and take it out of AGENTS), or make promote HOST=${place.host}`,
    );
  const gone = [about.ip];
  await watch([place, ...follow]);
  const now = successor(run, place, follow, gone);
  const { box, agents } = now;
  const puts = placeData(file, await hashOf(file), settings.BACKUP);
  const steps = [...prepareAs("server"), puts, now.follows, server];
  const status = await attempt(run, box, () => begin(run, now, steps, gone, about.version));
  if (run.mode !== "apply" && agents.length)
    showLater(run, `${agents.map(({ name }) => name).join(", ")} follow the server: make up, on all boxes`);
  if (status !== 0 || run.mode !== "apply") return status;
  const done = [...(await agentsFollow(run, now)), await devicesFollow(run, now, about.ip)];
  return worst([...done, await goesOn(now)]);
}

/** The new server looks after the cluster, if somebody is to be told, backs itself up, and gets what else `up` does. */
export async function goesOn({ next, box, agents }: Successor): Promise<number> {
  const watched = next.settings.NOTIFY_URL
    ? await attempt(next, box, async () => void (await lookAndConverge(box, watchStep)), "watch")
    : 0;
  return worst([watched, await backupsFollow(next, [box, ...agents]), await up(next)]);
}

await main(import.meta, {
  about:
    "Restores the server in BACKUP on HOST, a box without k3s. Updates SERVER in the env file, and moves the agents.",
  steps: [
    ...prepareAs("server"),
    placeData("", ""),
    server,
    ...agentSteps,
    watchStep,
    scheduled("", "", undefined),
  ],
  replaces: true,
  writes: () => true,
  flags: { force: ALLOWED.force },
  work: restore,
  causes,
});

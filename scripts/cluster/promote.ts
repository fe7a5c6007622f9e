#!/usr/bin/env -S node --import tsx
/** Makes a box the server in place of one that is lost: from the newest backup; agents, devices and kubeconfig follow. */
import { connect } from "node:net";
import { basename } from "node:path";
import { boxes, isSame } from "../../lib/boxes.ts";
import { causes } from "../../lib/check/causes.ts";
import { ask } from "../../lib/check/survey.ts";
import { look, lookAndConverge } from "../../lib/converge.ts";
import { hashOf } from "../../lib/files.ts";
import { attempt, bring, learn, showLater, worst } from "../../lib/fleet.ts";
import { age, caOf, newest, opened } from "../../lib/k3s/backups.ts";
import { CLEAR } from "../../lib/k3s/cleanup.ts";
import { argumentsIn, caLook, mayGo, unitsLook } from "../../lib/k3s/identity.ts";
import { address } from "../../lib/k3s/nodes.ts";
import { scheduled } from "../../lib/k3s/schedule.ts";
import { main } from "../../lib/k3s/script.ts";
import { systemdFirst } from "../../lib/k3s/service.ts";
import { envPath, nameLook, shownLook, unitPath } from "../../lib/k3s/unit.ts";
import { watchStep } from "../../lib/k3s/watch.ts";
import { watch } from "../../lib/report.ts";
import type { Box, Run } from "../../lib/script.ts";
import { SettingError } from "../../lib/settings.ts";
import { raw, sh } from "../../lib/sh.ts";
import { Unreachable } from "../../lib/shell.ts";
import { type Change, type Facts, prints, Refusal, step } from "../../lib/step.ts";
import { parseKeyValues } from "../../lib/text.ts";
import { agentSteps, prepareAs } from "../agent.ts";
import { downloadK3s } from "../download-k3s.ts";
import { installWireguard } from "../install-wireguard.ts";
import { server } from "../server.ts";
import { contextAt, mergeFrom } from "./kubeconfig.ts";
import {
  agentsFollow,
  arrives,
  begin,
  devicesFollow,
  examine,
  goesOn,
  hasDone,
  named,
  placeData,
  remember,
  restoredLook,
  type Successor,
  successor,
} from "./restore.ts";
import { token } from "./token.ts";

const BASE = "/var/lib/rancher/k3s";
/** In `restored`: the box was promoted, not restored by hand. */
const PROMOTED = "promoted";

/** ssh's words where nothing answers at an address. All others are an answer, or no proof of silence. */
const SILENT =
  /^Could not reach (?!.*(banner|identification)).*(timed? ?out|refused|No route|unreachable|resolve|not known)/i;

/** Does a failed login say that nothing is there? */
export const isSilent = (error: unknown): boolean =>
  error instanceof Unreachable && SILENT.test(error.message);

/** Does curl's exit status and time to connect say that somebody has taken the connection? undefined: it did not run. */
export function hasAnswered(said = ""): boolean | undefined {
  const [status = "", connected = ""] = said.trim().split(" ");
  if (!/^\d+$/.test(status)) return undefined;
  return !/^[67]$/.test(status) && !(status === "28" && !Number(connected));
}

const apiLook = (ip: string) =>
  prints("api")(sh`fact api; if command -v curl >/dev/null; then
  connected=$(curl -s --noproxy '*' --connect-timeout 8 --max-time 15 -o /dev/null -w '%{time_connect}' ${`http://${ip}:6443/`}) && status=0 || status=$?
  echo "$status $connected"
fi`);

/** Does anybody take a connection at 6443 of this address, asked from here? */
export const answersHere = (host: string, port = 6443): Promise<boolean> =>
  new Promise((done) => {
    const ends = (answered: boolean) => {
      done(answered);
      asked.destroy();
    };
    const asked = connect({ host, port, timeout: 8000 });
    asked.once("connect", () => ends(true));
    asked.once("timeout", () => ends(false));
    asked.once("error", () => ends(false));
  });

/** By what the old server still answers: its ssh, its API; and could any other box ask that? */
async function answersOf(old: Box, others: readonly Box[]) {
  const ssh = look(old, [ask([])], 40).then(
    () => true,
    (error) => !isSilent(error),
  );
  const asked = others.map(async (box) => {
    const facts = await look(box, [ask([apiLook(old.ip)])], 60).catch(() => undefined);
    return { by: `its API, asked by ${box.name}`, answers: hasAnswered(facts?.api) };
  });
  const here = answersHere(old.ip).then((answers) => ({ by: "its API, asked from here", answers }));
  const login = ssh.then((answers) => ({ by: "its ssh", answers }));
  const heard = await Promise.all(asked);
  return {
    ssh: await ssh,
    by: [await login, await here, ...heard].flatMap(({ by, answers }) => (answers ? [by] : [])),
    couldAsk: heard.some(({ answers }) => answers !== undefined),
  };
}

/** On the old server: k3s is stopped, and does not start with the box. */
export const stopped = (name: string) =>
  step({
    name: "stop",
    options: [],
    look: () => [
      prints("runs")("fact runs; systemctl is-active k3s 2>/dev/null; systemctl is-enabled k3s 2>/dev/null"),
    ],
    plan: (_want, facts): Change[] =>
      /^(active|activating|deactivating|reloading|enabled)$/m.test(facts.runs ?? "")
        ? [
            {
              why: `stop k3s on ${name}, and disable it there`,
              sh: `systemctl disable k3s >/dev/null 2>&1 || :
timeout 60 systemctl stop k3s || systemctl kill -s KILL k3s`,
              seconds: 120,
            },
          ]
        : [],
  });

const AGENT = [unitPath("agent"), envPath("agent")];

/**
 * An agent leaves its box to a server. Its k3s and images stay, its node's password, local volumes of pods, an entry for
 * devices, and the firewall's rules.
 */
export const agentLeaves = (ca: string, file: string) =>
  step({
    name: "leave",
    options: ["HOST", "PUBLIC_IP"],
    look: () => [
      shownLook,
      nameLook,
      caLook,
      unitsLook,
      prints("joined")(
        sh`fact joined; for path in ${AGENT}; do if [ -e "$path" ]; then echo "$path"; fi; done`,
      ),
    ],
    plan(want, facts): Change[] {
      if (!facts.joined?.trim()) return [];
      mayGo(facts, [ca], "agent", false, false);
      const own = argumentsIn(facts["unit-k3s-agent"] ?? "").find((word) =>
        word.startsWith("--node-external-ip="),
      );
      if (own && own !== `--node-external-ip=${want.PUBLIC_IP}`)
        throw new Refusal(
          `This box is the agent at ${own.replace(/.*=/, "")}, not at ${want.PUBLIC_IP}: is HOST right?`,
        );
      return [
        arrives(file),
        {
          why: "stop k3s-agent, clear its pods, interfaces and rules, and remove its unit and data; local volumes of pods stay",
          // The units go last: an interrupted run starts over.
          sh: sh`systemctl disable k3s-agent >/dev/null 2>&1 || :
timeout 60 systemctl stop k3s-agent || systemctl kill -s KILL k3s-agent
${raw(CLEAR)}
for path in ${BASE}/agent/* /var/lib/cni/* /run/flannel/*; do
  case $path in */containerd | */images) continue ;; esac
  rm -rf --one-file-system "$path"
done
systemctl reset-failed k3s-agent 2>/dev/null || :
rm -f ${AGENT}
systemctl daemon-reload`,
          seconds: 180,
        },
      ];
    },
  });

/** Replaces the token, once: the old server, and whoever has its disk, knows the one before. */
export const replacesToken = step({
  name: token.name,
  options: token.options,
  look: (want) => [...token.look(want), restoredLook],
  plan(want, facts): Change[] {
    if (hasDone(facts, "token")) return [];
    const changes = facts.rotates?.trim() ? token.plan(want, facts) : [];
    return changes.length
      ? changes
      : [{ why: "remember that the token was replaced", sh: remember("token") }];
  },
  learn: token.learn as NonNullable<typeof token.learn>,
});

const promotedLook = ask([restoredLook, prints("about")(`fact about; cat ${BASE}/server/about 2>/dev/null`)]);

/** What a promoted box says of the server whose data it has; undefined for one that was not promoted. */
export function promotedIn(facts: Facts<"restored" | "about">): { version: string; ip: string } | undefined {
  const { version = "", ip = "" } = parseKeyValues(facts.about);
  return hasDone(facts, PROMOTED) && address(ip) ? { version, ip } : undefined;
}

async function promote(run: Run): Promise<number> {
  const began = Date.now();
  const { settings, origins } = run;
  if (settings.K3S_DATASTORE_ENDPOINT)
    throw new SettingError(
      `K3S_DATASTORE_ENDPOINT is set (${origins.K3S_DATASTORE_ENDPOINT}): the cluster is in that database, and nothing is to be restored: put another of its servers first in SERVER, make up, then make remove HOST=… FORCE=1`,
    );
  if (!settings.SERVER)
    throw new SettingError("SERVER is not set: expected the server that is lost, in whose place HOST comes");
  const asked = await named(run);
  const agents = await boxes(run, "AGENTS");
  const place = agents.find((agent) => isSame(agent, asked)) ?? asked;
  // FORCE=1 is about the old server alone.
  const plain: Run = { ...run, flags: new Set() };
  const servers = await boxes({ ...run, settings: { ...settings, PUBLIC_IP: "" } }, "SERVER");
  const [old] = servers as [Box];
  if (servers.length > 1)
    throw new SettingError(`SERVER (${origins.SERVER}): expected one, the server that is lost`);
  const follow = agents.filter((agent) => agent !== place);
  await watch([place, ...follow]);
  const { line } = place;
  let now = undefined as Successor | undefined;
  let was = old.ip;
  const status = await attempt(run, place, async () => {
    // An earlier run has come so far that the env file names the box.
    if (isSame(old, place)) {
      const before = promotedIn(await look(place, [promotedLook]));
      if (!before)
        throw new SettingError(
          `HOST is ${place.host}, which is SERVER already (${origins.SERVER}): expected the box that comes in its place`,
        );
      was = before.ip;
      now = successor(plain, place, follow, [was]);
      await begin(run, now, [...prepareAs("server"), now.follows, server], [was], before.version);
      return;
    }
    const path = settings.BACKUP || (await newest(run, [old.name]));
    const { file, done } = await opened(path, run);
    try {
      const about = await examine(run, file, path, "promote");
      line.says(`takes ${basename(path)}, ${age(path)}`);
      was = about.ip;
      const gone = [...new Set([about.ip, old.ip])];
      now = successor(plain, place, follow, gone);
      await silence(run, old, [place, ...follow]);
      // What may fail comes while the agent is still there.
      const first = [systemdFirst, downloadK3s, installWireguard];
      const leaves = await bring(run, now.box, [...first, agentLeaves(await caOf(file), file)]);
      const puts = placeData(file, await hashOf(file), path, [PROMOTED]);
      // A plan for the box while it is an agent would refuse to make it a server.
      if (leaves || place === asked)
        await begin(run, now, [...prepareAs("server"), puts, now.follows, server], gone, about.version);
    } finally {
      done();
    }
  });
  if (status === 0 && run.mode !== "apply") {
    const more = [settings.NOTIFY_URL && ", is watched", settings.BACKUP_EVERY && ", backs itself up"].join(
      "",
    );
    showLater(
      run,
      `${place.name} is the server, with a new token${more}; ${["devices", "kubeconfig", ...follow.map(({ name }) => name)].join(", ")} follow`,
    );
  }
  if (status !== 0 || run.mode !== "apply" || !now) return status;

  const { next, box } = now;
  const renewed = await attempt(run, box, async () => {
    const facts = await lookAndConverge(box, replacesToken);
    if (!facts.rotates?.trim())
      line.says(`k3s ${facts.version?.trim()} cannot replace its token, which ${old.name} still knows`);
    Object.assign(next.settings, await learn(run, [replacesToken], box, facts));
  });
  const joined = await agentsFollow(plain, now);
  if (worst(joined) === 0)
    line.says(`all nodes are Ready, ${Math.round((Date.now() - began) / 1000)} s after the command`);
  const devices = await devicesFollow(run, now, was);
  const access = await attempt(run, box, () => moveAccess(box, [...new Set([was, old.ip])]));
  return worst([renewed, ...joined, devices, access, await goesOn(now)]);
}

/** @throws {Refusal} while the old server answers, unless FORCE=1, which stops its k3s. */
async function silence(run: Run, old: Box, others: readonly [Box, ...Box[]]): Promise<void> {
  const [box] = others;
  box.line.says(`asks whether ${old.name} still answers`);
  const { ssh, by, couldAsk } = await answersOf(old, others);
  const forced = run.flags.has("force");
  // The API may be closed to this machine.
  if (!couldAsk && !by.length && !forced)
    throw new Refusal(
      `Whether ${old.name} still answers its nodes is not known: no box here has curl to ask. Install it on ${box.name}; FORCE=1 takes its silence for granted`,
    );
  if (!by.length) return;
  if (!forced)
    throw new Refusal(
      `${old.name}, the server, still answers (${by.join("; ")}): make check says what is wrong with it. FORCE=1 stops k3s there, if its ssh answers, and promotes ${box.name} all the same; make backup first, for what is newer than the backup is lost`,
    );
  if (!ssh)
    return box.line.says(`${old.name} still answers (${by.join("; ")}), but not its ssh: k3s runs on there`);
  try {
    await bring(run, { ...old, line: box.line }, [stopped(old.name)]);
  } catch (error) {
    box.line.says(
      `k3s on ${old.name} could not be stopped, and may run on there: ${(error as Error).message}`,
    );
  }
}

/** Gives the contexts of old servers in the user's kubeconfig to the new one. */
async function moveAccess(box: Box, gone: readonly string[]): Promise<void> {
  for (const ip of gone) {
    const old = ip !== box.ip && contextAt(ip);
    if (!old) continue;
    const { changed, access, path } = await mergeFrom(box, false, old);
    if (changed) box.line.says(`context ${access.name} in ${path} takes the place of ${old}`);
  }
}

await main(import.meta, {
  about:
    "Makes HOST the server in place of the one in SERVER, which is lost: from the newest backup, with a new token. Agents, devices and kubeconfig follow.",
  steps: [
    ...prepareAs("server"),
    placeData("", ""),
    server,
    token,
    ...agentSteps,
    watchStep,
    scheduled("", "", undefined),
  ],
  replaces: true,
  writes: () => true,
  flags: { force: "although the old server still answers: stop k3s there first" },
  work: promote,
  causes,
});

#!/usr/bin/env -S node --import tsx
/** Restores a server from a backup on a fresh box, at any address; the agents follow it there. */
import { boxAt, boxes, isSame } from "../../lib/boxes.ts";
import { causes } from "../../lib/check/causes.ts";
import { ask } from "../../lib/check/survey.ts";
import { look, lookAndConverge } from "../../lib/converge.ts";
import { readEnv, updateEnv } from "../../lib/env-file.ts";
import { hashOf } from "../../lib/files.ts";
import { attempt, bring, each, learn, showLater, worst } from "../../lib/fleet.ts";
import { aboutOf, caOf, opened } from "../../lib/k3s/backups.ts";
import { rangesOf } from "../../lib/k3s/config.ts";
import { bringsBack, devicesIn, ENTRY_FOLDER } from "../../lib/k3s/devices.ts";
import { closeLook, firewall } from "../../lib/k3s/firewall/firewall.ts";
import { ALLOWED, brief, nodeNameOf, whoIs } from "../../lib/k3s/identity.ts";
import { main } from "../../lib/k3s/script.ts";
import { nameLook } from "../../lib/k3s/unit.ts";
import { watch } from "../../lib/report.ts";
import type { Box, Run } from "../../lib/script.ts";
import { SettingError } from "../../lib/settings.ts";
import { raw, sh } from "../../lib/sh.ts";
import { type Change, prints, Refusal, step } from "../../lib/step.ts";
import { caIn } from "../../lib/token.ts";
import { agentSteps, prepareAs, proofLook } from "../agent.ts";
import { server } from "../server.ts";
import { up } from "../up.ts";
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

const restoredLook = prints("restored")(`fact restored; cat ${BASE}/server/restored 2>/dev/null`);

/** Puts the backup's data in place on a box that has none. Its hash is kept, for an interrupted run. */
export const placeData = (file: string, hash: string, named = file) =>
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
mv -f node-password /etc/rancher/node/password
[ ! -e devices ] || { rm -rf ${ENTRY_FOLDER}; mv devices ${ENTRY_FOLDER}; }
echo ${hash} >restored
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
    if (!facts.restored || /^passwords$/m.test(facts.restored)) return [];
    const own = nodeNameOf("server", want, facts);
    const others = (facts.secrets ?? "")
      .split("\n")
      .filter((name) => /^[a-z0-9.-]+$/.test(name) && name !== own);
    return [
      {
        why: "forget the nodes' passwords: nodes that joined again after the backup have new ones",
        sh: sh`${raw(others.length ? dropSecrets(others) : "")}
${raw(keepPasswords("==", own))}
echo passwords >>${BASE}/server/restored`,
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

async function restoreFrom(file: string, run: Run): Promise<number> {
  const { settings, origins } = run;
  if (origins.HOST === "default")
    throw new SettingError("HOST is not set: expected the box that becomes the server");
  if (settings.K3S_DATASTORE_ENDPOINT)
    throw new SettingError(
      `K3S_DATASTORE_ENDPOINT is set (${origins.K3S_DATASTORE_ENDPOINT}): expected it empty, for a backup is of a server's own SQLite`,
    );
  const about = await aboutOf(file, settings.BACKUP);
  if (settings.K3S_VERSION !== about.version)
    throw new SettingError(
      `K3S_VERSION is ${settings.K3S_VERSION} (${origins.K3S_VERSION}), the backup of ${about.version}: restore with K3S_VERSION=${about.version}, then upgrade`,
    );
  const ca = await caOf(file);
  const asked = caIn(settings.K3S_TOKEN);
  if (asked && asked !== ca && !run.flags.has("force"))
    throw new SettingError(
      `K3S_TOKEN (${origins.K3S_TOKEN}) is of the CA ${brief(asked)}, the backup of ${brief(ca)}, another cluster, whose token would take its place: expected an env file of its own, or FORCE=1`,
    );
  const named = (await boxes(run, "HOST")) as [Box];
  const { host, ip, word } = named[0];
  if (named.length > 1) throw new SettingError(`HOST names ${named.length} boxes: expected one`);
  const follow = await boxes(run, "AGENTS");
  if (follow.some((agent) => isSame(named[0], agent)))
    throw new SettingError(
      `HOST is ${host}, which is one of AGENTS: expected a box that is none (make remove HOST=${host}, and take it out of AGENTS)`,
    );
  const members = [ip, ...follow.map((agent) => agent.ip), ...(about.ip === ip ? [] : [`-${about.ip}`])];
  const follows = moveFirewall(members.join(" "));
  const steps = [
    ...prepareAs("server"),
    placeData(file, await hashOf(file), settings.BACKUP),
    follows,
    server,
  ];
  /** The settings from now on: this box is the server. */
  const next: Run = {
    ...run,
    settings: { ...settings, SERVER: word, HOST: "", PUBLIC_IP: "", K3S_URL: "", K3S_TOKEN: "" },
    addresses: { ...run.addresses, servers: [ip] },
    ...(settings.FIREWALL ? { letIn: members } : {}),
  };
  const box = boxAt(next, named[0]);
  const agents = follow.map((agent) => boxAt(next, agent));
  await watch([box, ...agents]);

  // A new agent cannot prove that it is the node of its name; an unreachable one is reported when it has to follow. The
  // old server would still count as a peer of all others until its silence is noticed.
  const gone = about.ip === ip ? [] : [whoIs(about.ip)];
  const proof = ask([proofLook]);
  await Promise.all(
    agents.map(async (agent) => {
      const facts = await look(agent, [proof]).catch(() => undefined);
      if (facts && !facts.proof?.trim())
        gone.push({ ...whoIs(agent.ip, facts, agent.want), boot: "", machine: "" });
    }),
  );
  const status = await attempt(run, box, async () => {
    const now = await bring(run, box, steps);
    if (!now) return;
    await lookAndConverge(box, ...gone.map((who) => forgotten(who, undefined)), forgetPasswords);
    Object.assign(next.settings, await learn(run, steps, box, now.facts));
    const values = { SERVER: word, K3S_VERSION: about.version };
    const have = readEnv(run.envFile).values;
    for (const [name, value] of Object.entries(values))
      if (have[name] !== value) await updateEnv(run.envFile, { [name]: value });
  });
  if (run.mode !== "apply" && agents.length)
    showLater(run, `${agents.map(({ name }) => name).join(", ")} follow the server: make up, on all boxes`);
  if (status !== 0 || run.mode !== "apply") return status;
  // In parallel: each waits for those that the datastore still lists as Ready.
  const followed = await each(
    run,
    agents,
    async (agent) => {
      // It may have to go back to the backup's release, like its server.
      agent.want = { ...agent.want, allowed: new Set([...run.flags, "release"]) };
      await lookAndConverge(agent, follows, ...agentSteps);
    },
    "agent",
  );
  const admitted = await attempt(run, box, async () => {
    const devices = devicesIn((await lookAndConverge(box, bringsBack))["peers-file"]).map(({ name }) => name);
    if (!devices.length) return;
    // Whose port is to be opened is known only now.
    await lookAndConverge(box, follows);
    if (about.ip !== ip)
      box.line.says(
        `devices look for it at ${about.ip}: make device NAME=… writes their configurations anew (${devices.join(", ")})`,
      );
  });
  return worst([...followed, admitted, await up(next)]);
}

await main(import.meta, {
  about:
    "Restores the server in BACKUP on HOST, a box without k3s. Updates SERVER in the env file, and moves the agents.",
  steps: [...prepareAs("server"), placeData("", ""), server, ...agentSteps],
  writes: () => true,
  flags: { force: ALLOWED.force },
  work: restore,
  causes,
});

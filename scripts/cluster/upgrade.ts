#!/usr/bin/env -S node --import tsx
/**
 * K3S_VERSION on the whole cluster: servers first, then agents, one at a time. Each is drained, gets its new
 * binary and unit, is restarted, and takes pods again once it is seen to run the new version. The first that fails
 * ends it, and gets its old binary and unit back.
 */
import { boxes } from "../../lib/boxes.ts";
import { causes } from "../../lib/check/causes.ts";
import { converge, look, lookAndConverge } from "../../lib/converge.ts";
import { readEnv, updateEnv } from "../../lib/env-file.ts";
import { attempt, each, showPlan, worst } from "../../lib/fleet.ts";
import { CONFIG, REGISTRIES } from "../../lib/k3s/config.ts";
import { drainedOn, uncordonedOn } from "../../lib/k3s/drain.ts";
import { firewall } from "../../lib/k3s/firewall.ts";
import { nodeNameOf, nodeOf, whoIs } from "../../lib/k3s/identity.ts";
import { clusterLook, KUBECTL, nodesOf } from "../../lib/k3s/nodes.ts";
import { compare, pathOf, RELEASE } from "../../lib/k3s/releases.ts";
import { run } from "../../lib/k3s/script.ts";
import { restart } from "../../lib/k3s/service.ts";
import {
  binaryLook,
  envPath,
  type Generation,
  interfaceOf,
  K3S,
  nameLook,
  type Role,
  unitPath,
} from "../../lib/k3s/unit.ts";
import { watch } from "../../lib/report.ts";
import type { Box, Call } from "../../lib/script.ts";
import { givenNow, SettingError } from "../../lib/settings.ts";
import { raw, sh, waitUntil } from "../../lib/sh.ts";
import { Unreachable } from "../../lib/shell.ts";
import {
  type Change,
  type Facts,
  Failure,
  type Printed,
  planAll,
  prints,
  Refusal,
  type Step,
  step,
} from "../../lib/step.ts";
import { splitWords } from "../../lib/text.ts";
import { agentSteps, prepareAs } from "../agent.ts";
import { downloadAhead } from "../download-k3s.ts";
import { server as serverStep, serverSteps } from "../server.ts";
import { up } from "../up.ts";

/** What a node ran before, kept until it is seen to run the new version: its binary, version, and files of settings. */
const KEPT = "/var/lib/rancher/k3s/before";

/** What concerns one box of the cluster and one release. */
export function stepsFor(role: Role, running: string, ip: string) {
  const files = [K3S, unitPath(role), envPath(role), CONFIG, REGISTRIES];
  const look = () => [
    binaryLook,
    nameLook,
    clusterLook,
    prints("kept generation")(
      `fact kept; cat ${KEPT}/version 2>/dev/null\nfact generation; cat ${KEPT}/generation 2>/dev/null`,
    ),
  ];
  const has = (facts: Facts<"interfaces">, generation: Generation) =>
    (facts.interfaces ?? "").split("\n").includes(interfaceOf(generation));
  const nodeIn = (facts: Facts<"nodes">) => nodesOf(facts.nodes).find((node) => node.externalIp === ip);
  const upgradeStep = (name: string, plan: Step<Printed<ReturnType<typeof look>[number]>>["plan"]) =>
    step({ name, options: [], look, plan });

  return {
    keep: upgradeStep("keep", (_want, facts) =>
      // A binary that was put there since its start is not what runs: nothing of it is kept.
      facts.kept?.trim() === running || facts.version?.trim() !== running
        ? []
        : [
            {
              why: `keep ${running} and its unit`,
              sh: sh`rm -rf ${KEPT}.new ${KEPT}
mkdir -m 700 ${KEPT}.new
for file in ${files}; do
  [ ! -e "$file" ] || cp -p "$file" ${KEPT}.new/
done
echo ${running} >${KEPT}.new/version
echo ${has(facts, "old") ? "old" : "modern"} >${KEPT}.new/generation
mv ${KEPT}.new ${KEPT}`,
            },
          ],
    ),
    /** The kubelet's own word on its version: a binary on the disk proves nothing. */
    runs: upgradeStep("runs", (want, facts): Change[] => {
      const node = nodeIn(facts);
      if (!node || node.version === want.K3S_VERSION) return [];
      return [
        {
          why: `wait until node ${node.name} says it runs ${want.K3S_VERSION}, not ${node.version}`,
          sh: `${KUBECTL}\n${waitUntil(
            60,
            sh`kc get node ${node.name} -o json | grep -qF ${`"kubeletVersion": "${want.K3S_VERSION}"`}`,
            sh`kc get node ${node.name}`,
          )}`,
          seconds: 90,
        },
      ];
    }),
    forget: upgradeStep("forget", (_want, facts) =>
      facts.kept?.trim() ? [{ why: "forget the old binary and unit", sh: `rm -rf ${KEPT}` }] : [],
    ),
    putBack: upgradeStep("put back", (want, facts): Change[] => {
      if (!facts.kept?.trim()) return [];
      const name = nodeNameOf(role, want, facts);
      const old = facts.generation?.trim() === "old";
      const clear = has(facts, old ? "modern" : "old");
      const start = restart(role, old ? "old" : "modern", name, want, { verb: "start", clear });
      return [
        {
          ...start,
          why: `put ${running} and its unit back`,
          sh: sh`cd ${KEPT}
same=yes
for file in ${files}; do
  kept=\${file##*/}
  if [ -e "$kept" ]; then
    cmp -s "$kept" "$file" && continue
    cp -p "$kept" "$file.new"
    mv -f "$file.new" "$file"
  else
    [ -e "$file" ] || continue
    rm "$file"
  fi
  same=
done
cd /
if [ -z "$same" ]; then
${raw(start.sh)}
fi
rm -rf ${KEPT}`,
        },
      ];
    }),
  };
}

interface Member {
  box: Box;
  role: Role;
  facts: Facts;
  /** What its kubelet says. */
  version: string;
}

const stepsOf = (role: Role) =>
  (role === "server" ? serverSteps : agentSteps).filter((step) => step !== firewall);

async function upgrade(call: Call): Promise<number> {
  const { settings } = call;
  const to = settings.K3S_VERSION;
  const force = call.flags.has("force");
  const steps = splitWords(settings.STEPS);
  const everywhere = [settings, ...Object.values(call.own)];
  if (steps.length && everywhere.some((of) => of.K3S_BIN || of.K3S_SHA256))
    throw new SettingError("STEPS needs a binary of each release: K3S_BIN and K3S_SHA256 name one");
  if (steps.length && !givenNow(call.origins, "K3S_VERSION"))
    throw new SettingError(
      `STEPS needs K3S_VERSION beside it (make upgrade K3S_VERSION=${to} STEPS="…"): each step writes its own release into the env file`,
    );
  if (everywhere.some((of) => of.K3S_BIN) && call.origins.K3S_VERSION === "default")
    throw new SettingError("K3S_VERSION is not set: expected the release that K3S_BIN is");
  const servers = await boxes(call, "SERVER");
  const all = [...servers, ...(await boxes(call, "AGENTS"))];
  await watch(all);

  const members: Member[] = [];
  const looked = await each(call, all, async (box) => {
    const role = servers.includes(box) ? "server" : "agent";
    box.want = { ...box.want, allowed: new Set([...call.flags, "release"]) };
    const facts = await look(box, [...stepsOf(role), stepsFor(role, "", box.ip).keep]);
    members[all.indexOf(box)] = { box, role, facts, version: "" };
  });
  if (looked.some((status) => status !== 0)) return worst(looked);
  const [first] = members as [Member];
  let path: string[] = [];
  // As `up` does: the others join by what the first server says, whatever the env file has.
  const checked = await attempt(call, first.box, async () => {
    const nodes = nodesOf(first.facts.nodes);
    if (nodes.length === 0) throw new Refusal("The server's API does not answer: run make server");
    const learned = serverStep.learn?.(first.box.want, first.facts);
    for (const member of members) {
      if (member !== first) member.box.want = { ...member.box.want, ...learned };
      const found = nodeOf(nodes, whoIs(member.box.ip, member.facts));
      const node = found?.is === "anew" ? undefined : found?.node;
      if (!node)
        throw new Refusal(
          `${member.box.name} is no node of the cluster: make agent HOST=${member.box.word}, or take it out of AGENTS`,
        );
      if (!RELEASE.test(node.version))
        throw new Refusal(`Node ${node.name} runs "${node.version}", which is no release of k3s`);
      member.version = node.version;
    }
    const running = members.map(({ version }) => version);
    path = pathOf(running, to, steps, force);
    mayUpgrade(members, path);
  });
  if (checked !== 0) return checked;
  if (path.length > 1) first.box.line.says(`by way of ${path.join(", ")}`);
  // Nothing to go through: a run that was cut may have left a node drained.
  for (const release of path.length ? path : [to]) {
    const status = await hop(call, members, release, force);
    if (status !== 0 || call.mode !== "apply") return status;
  }
  // What could not be seen while other nodes were still to come: handshakes with all, endpoints, metrics.
  return await up({ ...call, settings: { ...settings, K3S_VERSION: to } });
}

/** @throws {Refusal} before anything is downloaded or drained, where a box cannot run a release: its cgroups, its kernel. */
export function mayUpgrade(
  members: readonly Pick<Member, "box" | "role" | "facts">[],
  path: readonly string[],
): void {
  for (const { box, role, facts } of members)
    for (const release of path)
      try {
        planAll(prepareAs(role), { ...box.want, K3S_VERSION: release }, facts);
      } catch (error) {
        throw error instanceof Refusal ? new Refusal(`${box.name}: ${error.message}`) : error;
      }
}

/** One release on every box that has not got it. */
async function hop(call: Call, members: Member[], release: string, force: boolean): Promise<number> {
  const due = members.filter(
    (m) => (force && call.settings.K3S_VERSION === release) || compare(m.version, release) <= 0,
  );
  for (const { box } of due) box.want = { ...box.want, K3S_VERSION: release };
  const [first] = members as [Member];
  if (call.mode !== "apply") {
    for (const member of due) await preview(call, member, first, force);
    return 0;
  }
  const boxesDue = due.map(({ box }) => box);
  const ahead = await each(call, boxesDue, async (box) => void (await lookAndConverge(box, downloadAhead)));
  if (ahead.some((status) => status !== 0)) return worst(ahead);
  for (const member of due) {
    const status = await attempt(call, member.box, () => one(member, first.box, force));
    if (status !== 0) return status;
    member.version = release;
    // Else the next `make up` would put the old release back.
    if (member === first && readEnv(call.envFile).values.K3S_VERSION !== release)
      await updateEnv(call.envFile, { K3S_VERSION: release });
  }
  return 0;
}

async function preview(call: Call, { box, role, version }: Member, first: Member, force: boolean) {
  const facts = await look(box, [...stepsOf(role), stepsFor(role, version, box.ip).keep]);
  if (version !== box.want.K3S_VERSION)
    showPlan(call, first.box, [drainedOn(whoIs(box.ip, facts), force)], first.facts);
  showPlan(call, box, stepsOf(role), facts);
}

async function one({ box, role, version }: Member, server: Box, force: boolean): Promise<void> {
  const { keep, runs, forget, putBack } = stepsFor(role, version, box.ip);
  const all = [...stepsOf(role), runs];
  const atServer = { ...server, line: box.line };
  const release = box.want.K3S_VERSION;
  const facts = await look(box, [...all, keep]);
  const drained = drainedOn(whoIs(box.ip, facts), force);
  /** By what the box says last: its new kernel is another boot. */
  const uncordoned = (now: Facts) => uncordonedOn(whoIs(box.ip, now));
  const cluster = role === "server" ? facts : await look(atServer, [drained]);
  if (version === release) {
    // What a run that was cut has left: nothing of it is a reason to put anything back.
    const after = await converge(box, all, facts);
    const left = facts.kept?.trim() || planAll([uncordoned(facts)], box.want, cluster).length;
    if (after === facts && !left) return;
  } else {
    await converge(atServer, [drained], cluster);
    try {
      await converge(box, [keep], facts);
      const after = await converge(box, all, facts);
      const node = nodesOf(after.nodes).find(({ externalIp }) => externalIp === box.ip);
      if (node?.version !== release)
        throw new Failure(`The node runs ${node?.version || "nothing"}, not ${release}`);
    } catch (error) {
      if (error instanceof Unreachable) throw error;
      const { message, change, output } = error as Failure;
      const how = await undo().catch(
        (second: Error) =>
          `putting ${version} back failed too (${second.message}): it is kept in ${KEPT} on the box`,
      );
      throw new Failure(`${message}. The upgrade ends here; ${how}`, change, output);
    }
  }
  await lookAndConverge(atServer, uncordoned(await lookAndConverge(box, forget)));
  box.line.done(false, `runs ${release}`);

  /** Puts the node back to what it ran before; says how that went. */
  async function undo(): Promise<string> {
    const back = { ...box, want: { ...box.want, K3S_VERSION: version } };
    const facts = await look(back, [putBack]);
    const kept = facts.kept?.trim();
    if (kept) await converge(back, [putBack], facts);
    await lookAndConverge(atServer, uncordoned(facts));
    return kept
      ? `${box.name} runs ${version} again`
      : `nothing of ${version} was kept there, so nothing was put back`;
  }
}

await run(import.meta, {
  about:
    "Upgrades the cluster to K3S_VERSION: servers, then agents, one at a time, each drained and seen to run it.",
  steps: [
    ...serverSteps,
    ...agentSteps,
    { name: "upgrade", options: ["STEPS"], look: () => [], plan: () => [] },
  ],
  flags: { force: "go back, or leave minor versions out; delete pods that no controller starts anew" },
  writes: (want, known) => want.K3S_VERSION !== known.K3S_VERSION,
  everyBox: "one at a time, and those that run K3S_VERSION stay as they are",
  work: upgrade,
  causes,
});

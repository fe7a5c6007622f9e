#!/usr/bin/env -S node --import tsx
/**
 * Upgrades the whole cluster to K3S_VERSION: servers first, then agents, one at a time. Each is drained, gets the new
 * binary and unit, is restarted, and is uncordoned once it runs the new version. The first failure ends the upgrade, and
 * that box gets its old binary and unit back.
 */
import { boxes } from "../../lib/boxes.ts";
import { causes } from "../../lib/check/causes.ts";
import { ask } from "../../lib/check/survey.ts";
import { converge, look, lookAndConverge } from "../../lib/converge.ts";
import { readEnv, updateEnv } from "../../lib/env-file.ts";
import { attempt, each, showLater, showPlan, worst } from "../../lib/fleet.ts";
import { CONFIG, REGISTRIES } from "../../lib/k3s/config.ts";
import { drainedOn, serverNodes, startedLook, uncordonedOn } from "../../lib/k3s/drain.ts";
import { firewall } from "../../lib/k3s/firewall/firewall.ts";
import { nodeNameOf, nodeOf, nodesAt, whoIs } from "../../lib/k3s/identity.ts";
import { clusterLook, nodesOf, WATCH } from "../../lib/k3s/nodes.ts";
import { compare, pathOf, RELEASE } from "../../lib/k3s/releases.ts";
import { main } from "../../lib/k3s/script.ts";
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
import type { Box, Run } from "../../lib/script.ts";
import { givenNow, SettingError } from "../../lib/settings.ts";
import { raw, sh, waitUntil } from "../../lib/sh.ts";
import { Unreachable } from "../../lib/shell.ts";
import {
  type Change,
  type Facts,
  type FactsOf,
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

/** What a node ran before (binary, version and configuration files), kept until it runs the new version. */
const KEPT = "/var/lib/rancher/k3s/before";

/** The steps for one box and one release. */
export function stepsFor(role: Role, running: string, ip: string) {
  const files = [K3S, unitPath(role), envPath(role), CONFIG, REGISTRIES];
  const look = () => [
    binaryLook,
    nameLook,
    ...clusterLook,
    prints("kept generation")(
      `fact kept; cat ${KEPT}/version 2>/dev/null\nfact generation; cat ${KEPT}/generation 2>/dev/null`,
    ),
  ];
  const has = (facts: Facts<"interfaces">, generation: Generation) =>
    (facts.interfaces ?? "").split("\n").includes(interfaceOf(generation));
  const nodeIn = (facts: Facts<"nodes">) => nodesAt(nodesOf(facts.nodes), whoIs(ip, facts))[0];
  const upgradeStep = (name: string, plan: Step<Printed<ReturnType<typeof look>[number]>>["plan"]) =>
    step({ name, options: [], look, plan });

  return {
    keep: upgradeStep("keep", (_want, facts) =>
      // A binary that was replaced since k3s's start is not the one that runs: it is not kept.
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
    /** The kubelet reports its version: a binary on the disk proves nothing. */
    runs: upgradeStep("runs", (want, facts): Change[] => {
      const node = nodeIn(facts);
      if (!node || node.version === want.K3S_VERSION) return [];
      return [
        {
          why: `wait until node ${node.name} says it runs ${want.K3S_VERSION}, not ${node.version}`,
          sh: `${WATCH}\n${waitUntil(
            60,
            sh`changed ${node.name} 5; echo "$node" | grep -qF ${` version=${want.K3S_VERSION} `}`,
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

/** A box, as the order of an upgrade sees it. */
export interface Progress {
  /** The version that its kubelet reports. */
  version: string;
  /** The release of its binary, and the one that this run has upgraded it to. */
  ahead?: string;
  done?: string;
  failed?: true;
}

type Next<M> = "finish" | "end" | { does: "download" | "upgrade"; release: string; due: M[] };

/**
 * The next action of an upgrade; called again after each. Release by release, all boxes that are due download the binary
 * in parallel, then are upgraded one after the other. A box is due if it is not past a release: one that runs it may have
 * been left drained by an interrupted run. With `force` all boxes get the last release. The first failure ends it. Pure.
 * @param members servers first.
 */
export function nextHop<M extends Progress>(
  members: readonly M[],
  way: readonly string[],
  force: boolean,
): Next<M> {
  if (members.some(({ failed }) => failed)) return "end";
  for (const release of way) {
    const due = members.filter(
      ({ done, version }) =>
        done !== release && ((force && release === way.at(-1)) || compare(version, release) <= 0),
    );
    if (due.some(({ ahead }) => ahead !== release)) return { does: "download", release, due };
    if (due.length) return { does: "upgrade", release, due: due.slice(0, 1) };
  }
  return "finish";
}

interface Member extends Progress {
  box: Box;
  role: Role;
  facts: FactsOf<ReturnType<typeof stepsOf>[number]>;
}

const stepsOf = (role: Role) =>
  (role === "server" ? serverSteps : agentSteps).filter((step) => step !== firewall);

async function upgrade(run: Run): Promise<number> {
  const { settings } = run;
  const to = settings.K3S_VERSION;
  const force = run.flags.has("force");
  const steps = splitWords(settings.STEPS);
  const everywhere = [settings, ...Object.values(run.own)];
  if (steps.length && everywhere.some((of) => of.K3S_BIN || of.K3S_SHA256))
    throw new SettingError("STEPS needs a binary of each release: K3S_BIN and K3S_SHA256 name one");
  if (steps.length && !givenNow(run.origins, "K3S_VERSION"))
    throw new SettingError(
      `STEPS needs K3S_VERSION beside it (make upgrade K3S_VERSION=${to} STEPS="…"): each step writes its own release into the env file`,
    );
  if (everywhere.some((of) => of.K3S_BIN) && run.origins.K3S_VERSION === "default")
    throw new SettingError("K3S_VERSION is not set: expected the release that K3S_BIN is");
  const servers = await boxes(run, "SERVER");
  const all = [...servers, ...(await boxes(run, "AGENTS"))];
  await watch(all);

  const members: Member[] = [];
  const looked = await each(run, all, async (box) => {
    const role = servers.includes(box) ? "server" : "agent";
    box.want = { ...box.want, allowed: new Set([...run.flags, "release"]) };
    const started = ask(role === "server" ? [startedLook] : []);
    const facts = await look(box, [started, ...stepsOf(role), stepsFor(role, "", box.ip).keep]);
    members[all.indexOf(box)] = { box, role, facts, version: "" };
  });
  if (looked.some((status) => status !== 0)) return worst(looked);
  const [first] = members as [Member];
  let path: string[] = [];
  // As in `up`: the others join with what the first server reports, whatever the env file has.
  const checked = await attempt(run, first.box, async () => {
    const nodes = serverNodes(first.facts);
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
  for (let status = 0; ; ) {
    const todo = nextHop(members, path.length ? path : [to], force);
    if (todo === "end") return status;
    // What could not be verified while other nodes were restarting: handshakes with all, endpoints, metrics.
    if (todo === "finish") return await up({ ...run, settings: { ...settings, K3S_VERSION: to } });
    const { does, release, due } = todo;
    for (const { box } of due) box.want = { ...box.want, K3S_VERSION: release };
    if (run.mode !== "apply") {
      for (const member of due)
        status = worst([status, await attempt(run, member.box, () => preview(run, member, first, force))]);
      const later = path.slice(path.indexOf(release) + 1);
      if (later.length) showLater(run, `the same on all nodes, to ${later.join(", then ")}`);
      return status;
    }
    const boxes = due.map(({ box }) => box);
    const statuses = await each(run, boxes, async (box) => {
      if (does === "download") await lookAndConverge(box, downloadAhead);
      else for (const member of due) await one(member, first.box, force);
    });
    status = worst(statuses);
    for (const [i, member] of due.entries())
      if (statuses[i] !== 0) member.failed = true;
      else if (does === "download") member.ahead = release;
      else member.version = member.done = release;
    // Otherwise the next `make up` would install the old release again.
    if (first.done === release && readEnv(run.envFile).values.K3S_VERSION !== release)
      await updateEnv(run.envFile, { K3S_VERSION: release });
  }
}

/** @throws {Refusal} before anything is downloaded or drained, when a box's cgroups or kernel do not suit a release. */
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

async function preview(run: Run, { box, role, version }: Member, first: Member, force: boolean) {
  const facts = await look(box, [...stepsOf(role), stepsFor(role, version, box.ip).keep]);
  if (version !== box.want.K3S_VERSION)
    showPlan(run, { ...first.box, line: box.line }, [drainedOn(whoIs(box.ip, facts), force)], first.facts);
  showPlan(run, box, stepsOf(role), facts);
}

async function one({ box, role, version }: Member, server: Box, force: boolean): Promise<void> {
  const { keep, runs, forget, putBack } = stepsFor(role, version, box.ip);
  const all = [...stepsOf(role), runs];
  const atServer = { ...server, line: box.line };
  const release = box.want.K3S_VERSION;
  const facts = await look(box, [...all, keep]);
  const drained = drainedOn(whoIs(box.ip, facts), force);
  /** With the box's latest facts: after a kernel upgrade its boot id is another. */
  const uncordoned = (now: Facts) => uncordonedOn(whoIs(box.ip, now));
  const cluster = role === "server" ? facts : await look(atServer, [drained]);
  if (version === release) {
    // Leftovers of an interrupted run: they are no reason for a rollback.
    const after = await converge(box, all, facts);
    const left = facts.kept?.trim() || planAll([uncordoned(facts)], box.want, cluster).length;
    if (after === facts && !left) return;
  } else {
    await converge(atServer, [drained], cluster);
    try {
      await converge(box, [keep], facts);
      const after = await converge(box, all, facts);
      const [node] = nodesAt(nodesOf(after.nodes), whoIs(box.ip, after));
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

  /** Rolls the node back to what it ran before; returns the outcome. */
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

await main(import.meta, {
  about:
    "Upgrades the cluster to K3S_VERSION: one node at a time, servers first; each is drained, and verified afterwards.",
  steps: [
    ...serverSteps,
    ...agentSteps,
    { name: "upgrade", options: ["STEPS"], look: () => [], plan: () => [] },
  ],
  flags: { force: "downgrade, or skip minor versions; delete pods that no controller recreates" },
  writes: (want, known) => want.K3S_VERSION !== known.K3S_VERSION,
  everyBox: "one at a time, skipping those that run K3S_VERSION",
  work: upgrade,
  causes,
});

#!/usr/bin/env -S node --import tsx
/** Removes boxes from the cluster: drains them, uninstalls k3s, and deletes their nodes. */
import { basename } from "node:path";
import { boxes, isSame } from "../../lib/boxes.ts";
import { ask } from "../../lib/check/survey.ts";
import { look } from "../../lib/converge.ts";
import { attempt, bring, worst } from "../../lib/fleet.ts";
import { CLEAR, CLEAR_LOOK } from "../../lib/k3s/cleanup.ts";
import { rangesOf } from "../../lib/k3s/config.ts";
import { devicesIn, ENTRY_FOLDER, ENTRY_UNIT } from "../../lib/k3s/devices.ts";
import { drainedOn, onNodeOf, startedLook } from "../../lib/k3s/drain.ts";
import { closeAgain, closeLook } from "../../lib/k3s/firewall/firewall.ts";
import { neighbours } from "../../lib/k3s/firewall/neighbours.ts";
import { ENTRY_PROGRAM } from "../../lib/k3s/firewall/traffic.ts";
import {
  caLook,
  casOf,
  mayGo,
  nodeNameOf,
  nodeOf,
  place,
  unitsLook,
  type Who,
  whoIs,
} from "../../lib/k3s/identity.ts";
import { KEEPALIVE, KEEPALIVE_BIN } from "../../lib/k3s/keepalive.ts";
import { API, clusterLook, KUBECTL, nodesOf } from "../../lib/k3s/nodes.ts";
import {
  COPIES,
  keepsFor,
  RECEIVER,
  receiverLook,
  receivesNone,
  SCHEDULE_CLEAR,
  SCHEDULE_LEFT,
} from "../../lib/k3s/schedule.ts";
import { main } from "../../lib/k3s/script.ts";
import { nameLook, shownLook, unitPath, WRITTEN_BY } from "../../lib/k3s/unit.ts";
import { WATCH_FILES, WATCH_UNITS } from "../../lib/k3s/watch.ts";
import { watch } from "../../lib/report.ts";
import type { Box, Run } from "../../lib/script.ts";
import { SettingError } from "../../lib/settings.ts";
import { quote, raw, sh, waitUntil } from "../../lib/sh.ts";
import { Unreachable } from "../../lib/shell.ts";
import {
  type Change,
  type Facts,
  Failure,
  type Printed,
  prints,
  Refusal,
  type Step,
  step,
} from "../../lib/step.ts";
import { caIn } from "../../lib/token.ts";

const UNITS = [unitPath("server"), unitPath("agent")];
const FILES = [
  ...["/var/lib/rancher/k3s", "/var/lib/kubelet", "/var/lib/cni", "/run/k3s", "/run/flannel"],
  ...["/var/log/pods", "/var/log/containers", "/etc/rancher/k3s", "/etc/rancher/node"],
  ...["/usr/local/bin/k3s", raw("/usr/local/bin/.k3s*"), "/run/k3s-keepalive", ...WATCH_FILES, ENTRY_FOLDER],
];
/** Units of this project beside k3s's, and their programs. */
const OWN: Record<string, string> = {
  [KEEPALIVE]: KEEPALIVE_BIN,
  [ENTRY_UNIT]: ENTRY_PROGRAM,
  ...WATCH_UNITS,
};
/** What k3s creates in folders that may be links to a user's disk, where other files may be. */
const MADE = {
  "/var/lib/rancher/k3s": "agent data server storage",
  "/var/lib/kubelet":
    "checkpoints device-plugins pki plugins plugins_registry pod-resources pods *_state .lock seccomp",
  "/var/lib/cni": "cache flannel networks results",
  "/run/k3s": "*",
  "/run/flannel": "*",
  "/var/log/pods": "*_*_*",
  "/var/log/containers": "*_*_*.log",
  "/etc/rancher/k3s": "k3s.yaml registries.yaml across-clouds.token config.yaml.d/across-clouds.yaml",
  "/etc/rancher/node": "password",
};
const LINKS = ["kubectl", "crictl", "ctr"].map((name) => `/usr/local/bin/${name}`);

/** Uninstalls k3s from a box, with everything that it created there; packages and the kernel stay. */
export const uninstall = step({
  name: "remove",
  options: ["HOST", "SERVER", "PUBLIC_IP", "SERVER_ARGS", "AGENT_ARGS"],

  look: (want) => [
    shownLook,
    nameLook,
    caLook,
    unitsLook,
    receiverLook,
    prints(
      "left volumes links inner running peers-file copies",
    )(sh`fact peers-file; cat ${ENTRY_FOLDER}/peers 2>/dev/null
fact copies; ls ${COPIES} 2>/dev/null
fact left
${raw(SCHEDULE_LEFT)}
for path in ${Object.entries(OWN).flat()}; do
  if grep -qsxF ${WRITTEN_BY} "$path"; then echo "$path"; fi
done
for path in ${[...UNITS, ...UNITS.map((unit) => `${unit}.env`), ...FILES]}; do
  # An empty folder may be a mount of its own.
  if [ -f "$path" ] || [ -L "$path" ] || [ -n "$(ls -A "$path" 2>/dev/null)" ]; then echo "$path"; fi
done
for path in ${LINKS}; do
  [ "$(readlink "$path")" != k3s ] || echo "$path"
done
${raw(CLEAR_LOOK)}
${raw(closeLook(rangesOf(want)))}
fact volumes; ls -A /var/lib/rancher/k3s/storage 2>/dev/null
fact links; for path in ${Object.keys(MADE)}; do
  [ ! -L "$path" ] || [ ! -d "$path" ] || printf '%s leads to %s\n' "$path" "$(readlink -f "$path")"
done
fact inner; at=$(readlink -f /var/lib/rancher/k3s); for path in "$at"/* "$at"/*/*; do
  if [ ! -L "$path" ] || [ ! -d "$path" ]; then continue; fi
  to=$(readlink -f "$path"); case $to in "$at"/*) ;; *) printf '%s leads to %s\n' "$path" "$to" ;; esac
done
fact running
property "$server_unit" ActiveState; case $value in active) echo k3s ;; esac
property "$agent_unit" ActiveState; case $value in active) echo k3s-agent ;; esac
`),
  ],

  plan(want, facts): Change[] {
    const list = (text = "") => text.split("\n").filter(Boolean);
    const left = [...new Set(list(facts.left))];
    if (left.length === 0 && !facts["receiver-line"]?.trim()) return [];
    const ours = (paths: string[]) => paths.filter((path) => left.includes(path));
    const units = [...ours(Object.keys(OWN)), ...UNITS];
    const files = [...ours(Object.values(OWN)), ...FILES];
    const [volumes, running] = [list(facts.volumes).length, list(facts.running)];
    const devices = devicesIn(facts["peers-file"]).map(({ name }) => name);
    const copies = list(facts.copies).length;
    const keeps = Boolean(facts["receiver-line"]?.trim()) || left.includes(COPIES) || left.includes(RECEIVER);
    const backups = keeps || left.some((path) => path.includes("k3s-backup"));
    const links = [
      ...(devices.length ? [`; ${devices.join(", ")} cannot come in by it any more (make devices)`] : []),
      ...list(facts.links).map((link) => `; ${link}: what k3s has made there goes, the rest stays`),
      ...list(facts.inner).map((link) => `; ${link}, which stays with all that is in it: delete it yourself`),
    ];
    return [
      {
        why: `${running.length ? `stop ${running.join(", ")}, and ` : ""}clear pods, mounts, interfaces and rules of k3s`,
        sh: sh`for unit in ${units}; do
  [ -e "$unit" ] || continue
  name=\${unit##*/}
  systemctl disable "$name" >/dev/null 2>&1 || :
  # A stopped v1.17 ends as failed.
  timeout 60 systemctl stop "$name" || systemctl kill -s KILL "$name"
done
${raw(CLEAR)}`,
        seconds: 180,
      },
      ...(left.includes("firewall")
        ? [
            {
              why: "take the cluster's rules out of the firewall",
              sh: closeAgain(rangesOf(want)),
              seconds: 300,
            },
          ]
        : []),
      ...(backups
        ? [
            {
              why: `remove what makes or keeps backups${copies ? `, with ${copies} copies` : ""}`,
              sh: `${
                keeps
                  ? `${receivesNone
                      .plan(want, { ...facts, receiver: "x" })
                      .map(({ sh }) => sh)
                      .join("\n")}\n`
                  : ""
              }${SCHEDULE_CLEAR}`,
            },
          ]
        : []),
      {
        why: `remove k3s's units, binary and data${volumes ? `, with ${volumes} local volumes of pods` : ""}${links.join("")}`,
        // The units go last: they hold the address on lo, and an interrupted run starts over. Once they are gone nothing
        // is left to do, so systemd must have forgotten the failed unit by then.
        sh: sh`sed -n 's/^ExecStartPre=.*ip addr replace \([0-9.]*\/32\) dev lo.*/\1/p' ${UNITS} 2>/dev/null | while read -r ip; do
  ip addr del "$ip" dev lo 2>/dev/null || :
done
for path in ${LINKS}; do
  [ "$(readlink "$path")" != k3s ] || rm -f "$path"
done
made() { case $1 in ${raw(
          Object.entries(MADE)
            .map(([path, names]) => sh`${path}) echo ${names} ;;`)
            .join(" "),
        )} esac; }
for path in ${files}; do
  if [ -L "$path" ] && [ -d "$path" ]; then
    # shellcheck disable=SC2046
    (cd "$path" && rm -rf --one-file-system $(made "$path"))
    rm -f "$path"
    continue
  fi
  # What is a mount of its own is emptied, and stays; nothing else that is mounted in there is touched.
  rm -rf --one-file-system "$path" 2>/dev/null || [ -z "$(ls -A "$path")" ] || {
    mounted=$(awk -v at="$(readlink -f "$path")/" 'index($2, at) == 1 { print $2 }' /proc/self/mounts | tr '\n' ' ')
    echo "Could not remove $path\${mounted:+: to umount, and to empty by yourself, is $mounted}"
    exit 1
  }
done
rmdir /etc/rancher /var/lib/rancher 2>/dev/null || :
systemctl reset-failed ${units.map((unit) => basename(unit))} 2>/dev/null || :
rm -f ${units.flatMap((unit) => [unit, `${unit}.env`])}
systemctl daemon-reload`,
        seconds: 300,
      },
    ];
  },
});

const PASSWORDS = "/var/lib/rancher/k3s/server/cred/node-passwd";

/** Shell that deletes the node password secrets of these nodes. */
export const dropSecrets = (names: readonly string[]): string => sh`${raw(KUBECTL)}
kc -n kube-system delete secret ${names.map((name) => `${name}.node-password.k3s`)} --ignore-not-found`;

/** Shell that filters the file of node passwords: keeps this node's (==), or all others (!=). */
export const keepPasswords = (which: "==" | "!=", name: string): string => sh`[ ! -e ${PASSWORDS} ] || {
  (umask 077; awk -F, -v name=${name} ${`$2 ${which} name`} ${PASSWORDS} >${PASSWORDS}.new)
  mv -f ${PASSWORDS}.new ${PASSWORDS}
}`;

/** Facts about the cluster's nodes, and the names whose node password a server has. */
export const provenLook = [
  ...clusterLook,
  prints(
    "secrets passwords",
  )(sh`fact secrets; api GET '/api/v1/namespaces/kube-system/secrets?pretty=false' 2>/dev/null |
  grep -o '"metadata":{"name":"[^"]*\.node-password\.k3s"' | sed 's/.*:"//; s/\.node-password.*//'
fact passwords; cut -d, -f2 ${PASSWORDS} 2>/dev/null`),
];

type ProvenFact = Printed<(typeof provenLook)[number]>;

/**
 * On the server: deletes the box's node and its node password.
 * @param own the name under which the box would join, if it answers.
 */
export const forgotten = (box: Who, own: string | undefined): Step<ProvenFact> => ({
  ...onNodeOf<ProvenFact>("forget", box, (found, facts) => {
    const node = found?.node;
    const taken = nodesOf(facts.nodes).some((n) => n.name === own);
    // The password of a deleted node may remain (in a file up to v1.19): a new node of that name would be rejected.
    const name = node?.name ?? (taken ? undefined : own);
    if (!name) return [];
    const has = (fact: "secrets" | "passwords") => (facts[fact] ?? "").split("\n").includes(name);
    return [
      ...(node
        ? [
            {
              why: `delete node ${name}`,
              // k3s has to remove its finalizer. With several servers the leader may be the one that was removed, and its
              // lease lasts 45 s (v1.36.3, seen).
              sh: [
                API,
                sh`kc delete node ${name} --ignore-not-found --wait=false`,
                waitUntil(
                  120,
                  sh`list=$(api GET ${`/api/v1/nodes?fieldSelector=metadata.name%3D${name}&pretty=false`}) && ! printf %s "$list" | grep -qF ${`"metadata":{"name":"${name}"`}`,
                  sh`echo ${"The cluster does not let go of it: kubectl get node -o yaml shows its finalizers"}`,
                ),
              ].join("\n"),
              seconds: 180,
            },
          ]
        : []),
      ...(has("secrets")
        ? [
            {
              why: `delete the password secret of ${name}`,
              sh: dropSecrets([name]),
            },
          ]
        : []),
      ...(has("passwords")
        ? [
            {
              why: `delete the password of ${name}`,
              sh: keepPasswords("!=", name),
            },
          ]
        : []),
    ];
  }),
  look: () => [startedLook, ...provenLook],
});

async function remove(run: Run): Promise<number> {
  const { settings, origins } = run;
  if (origins.HOST === "default")
    throw new SettingError(`HOST is not set: expected the box to remove, some of ${settings.AGENTS}`);
  const leaving = await boxes(run, "HOST");
  const servers = await boxes({ ...run, settings: { ...settings, PUBLIC_IP: "" } }, "SERVER");
  const [server] = servers as [Box];
  if (leaving.some((box) => isSame(server, box)))
    throw new SettingError(
      servers.length > 1
        ? `HOST names the first server, ${server.name}, which agents are told: name another one first in SERVER and "make up", then it can go; "make down" removes a whole cluster`
        : `HOST names the server, ${server.name}: "make down" removes a whole cluster`,
    );
  const keeper = settings.BACKUP_EVERY && leaving.find(keepsFor(settings.BACKUP_TO));
  if (keeper && !run.flags.has("force"))
    throw new SettingError(
      `HOST names ${keeper.host}, which keeps the server's backups (BACKUP_TO, ${origins.BACKUP_TO}): let BACKUP_TO name another and run make backup, or add FORCE=1: its copies go with it`,
    );
  await watch(leaving);
  const statuses: number[] = [];
  // One after the other: pods of the first may move to the second.
  for (const box of leaving) statuses.push(await attempt(run, box, () => one(run, servers, box)));
  const gone = leaving.filter((_, i) => statuses[i] === 0);
  if (settings.FIREWALL && gone.length) {
    run.letIn = gone.map(({ ip }) => `-${ip}`);
    const others = await neighbours.boxes(run, gone);
    await watch(others);
    statuses.push(...(await (await neighbours.follow(run, others, gone[0])).done));
  }
  return worst(statuses);
}

/**
 * Checks that a box that answers belongs to this cluster, and that no other box's node would be deleted.
 * @throws {Refusal}
 */
export function mayRemove(
  facts: Facts,
  cluster: Facts<"nodes">,
  who: Who,
  token: string,
  role: "server" | "agent",
  force: boolean,
  allowing?: string,
): void {
  const ca = casOf(cluster).server;
  const found = nodeOf(nodesOf(cluster.nodes), who);
  mayGo(
    facts,
    ca.length ? ca : [caIn(token) ?? []].flat(),
    role,
    Boolean(found && found.is !== "anew"),
    force,
    allowing,
  );
  if (found?.is === "anew" && casOf(facts).agent.length + casOf(facts).server.length > 0)
    throw new Refusal(
      `Node ${found.node.name}, ${place(who)}, is another box than this one: it has the boot id ${found.node.boot ?? "none"}, this box ${who.boot}, and this one has joined under another name or address. Which box has the address?`,
    );
}

async function one(run: Run, servers: readonly Box[], box: Box): Promise<void> {
  const { line } = box;
  const server = { ...(servers[0] as Box), line };
  const force = run.flags.has("force");
  let facts: Facts | undefined;
  try {
    facts = await look(box, [uninstall]);
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    if (!force)
      throw new Failure(`${error.message}; if the box is gone for good, FORCE=1 removes its node alone`);
    line.says(`${error.message}: its node is removed anyway`);
  }
  const role = servers.some((other) => isSame(other, box)) ? "server" : "agent";
  const name = facts && nodeNameOf(role, box.want, facts);
  const who = whoIs(box.ip, facts, box.want);
  const [drained, forget] = [drainedOn(who, force), forgotten(who, name)];
  const cluster = await look(server, [drained, forget, ask([caLook])]);
  const allowing = `make remove HOST=${quote(box.word)} FORCE=1`;
  if (facts) mayRemove(facts, cluster, who, server.want.K3S_TOKEN, role, force, allowing);
  const parts: [Box, Step, Facts][] = [[server, drained, cluster]];
  if (facts) parts.push([box, uninstall, facts]);
  parts.push([server, forget, cluster]);
  let nothing = true;
  for (const [at, step, found] of parts) {
    const now = await bring(run, at, [step], found);
    nothing &&= Boolean(now?.nothing);
  }
  if (run.mode === "apply") line.done(nothing, nothing ? "the box has no k3s, the cluster no such node" : "");
}

await main(import.meta, {
  about: "Removes the boxes in HOST from the cluster: drains them, uninstalls k3s, and deletes their nodes.",
  steps: [uninstall],
  flags: { force: "delete pods that no controller recreates; delete the node of a box that is gone" },
  work: remove,
});

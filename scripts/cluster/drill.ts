#!/usr/bin/env -S node --import tsx
/**
 * Proves a backup: k3s is started on it alone, on this machine or a spare box, and what it then has is compared with
 * what the backup says of itself. The cluster is not touched, and nothing is left.
 */
import { boxes } from "../../lib/boxes.ts";
import { lookAndConverge } from "../../lib/converge.ts";
import { hashOf } from "../../lib/files.ts";
import { attempt, bring } from "../../lib/fleet.ts";
import { aboutOf, age, type Counts, listOf, newest, opened } from "../../lib/k3s/backups.ts";
import { PROXY_SETTINGS } from "../../lib/k3s/config.ts";
import { main } from "../../lib/k3s/script.ts";
import { binaryLook, K3S } from "../../lib/k3s/unit.ts";
import { watch } from "../../lib/report.ts";
import type { Box, Run } from "../../lib/script.ts";
import { SettingError } from "../../lib/settings.ts";
import { raw, sh } from "../../lib/sh.ts";
import { type Change, Failure, prints, Refusal, step } from "../../lib/step.ts";
import { parseKeyValues, splitWords } from "../../lib/text.ts";
import { binaryIn } from "../download-k3s.ts";
import { checked } from "./restore.ts";

const FOLDER = "/var/lib/k3s-drill";
/** How long k3s may take to be ready, in seconds. */
const STARTED = 300;

const KINDS = {
  nodes: "/api/v1/nodes",
  deployments: "/apis/apps/v1/deployments",
  secrets: "/api/v1/secrets",
} as const;
const NAMES = Object.keys(KINDS) as (keyof typeof KINDS)[];

/**
 * Runs as the first process of namespaces of its own: nothing gets out, and all that it started ends with it. k3s has no
 * kubelet, flannel or containers there (--disable-agent, hidden, v1.17.6 and v1.36.3). Its controllers begin to change
 * things at once, so each list is asked for at the backup's own revision: with a limit the API gives exactly that one
 * (Kubernetes docs, "Semantics for get and list"), and every secret is decrypted for it.
 */
export const inside = (k3s: string, args: readonly string[], revision: number | undefined) => {
  const at = revision ? `&resourceVersion=${revision}` : "";
  return sh`mount --make-rprivate /
# /etc/rancher and /var/lib/rancher are the drill's own: k3s writes there whatever its arguments, and the kubeconfigs in a
# backup of v1.17.6 name files there.
mount --rbind /etc ${FOLDER}/data/etc
for path in /etc/* /etc/.[!.]*; do
  [ "$path" = /etc/rancher ] || ln -s ${`${FOLDER}/data`}"$path" ${FOLDER}/data/own/
done
mount --bind ${FOLDER}/data/own /etc
mount --rbind ${FOLDER} ${FOLDER}/data/lib/k3s-drill
mount --rbind ${FOLDER}/data/lib /var/lib
mount -t tmpfs tmpfs /run
ip link set lo up
# k3s looks for an address and a default route of its own.
ip address add 192.0.2.1/32 dev lo
ip route add default dev lo
# k3s reads the key of encrypted secrets only when it is told to.
encryption=; [ ! -s k3s/server/cred/encryption-config.json ] || encryption=--secrets-encryption
env -i PATH="$PATH" HOME=/run ${k3s} server --data-dir ${FOLDER}/data/k3s --disable-agent --node-ip=192.0.2.1 \
  --write-kubeconfig=${FOLDER}/data/kubeconfig ${args} $encryption >log 2>&1 &
pid=$!
# Standard input ends with the operator's connection: unshare of CentOS 7 has no --kill-child.
exec 3<&0
{ while read -r _; do :; done <&3; kill -9 "$pid"; } >/dev/null 2>&1 &
get() { env -i PATH="$PATH" HOME=/run ${k3s} kubectl --kubeconfig ${FOLDER}/data/kubeconfig get --raw "$1"; }
gave_up() { echo "$1"; grep -E 'level=(fatal|error)|^panic|^F[0-9]{4} ' log | tail -n 5 | grep . || tail -n 3 log; exit 1; }
began=$(date +%s)
# v1.17.6 unpacks itself without a lock: kubectl may not come meanwhile.
until [ -s kubeconfig ] && get /readyz >/dev/null 2>said; do
  grep -qs '^State:[[:space:]]*[^ZX]' /proc/$pid/status || gave_up 'k3s ended on this backup:'
  [ $(($(date +%s) - began)) -lt ${STARTED} ] || gave_up ${`k3s is not ready on this backup after ${STARTED} s: `}"$(grep -sv '^\[+]' said | head -n 3)"
  sleep 1
done
echo "seconds=$(($(date +%s) - began))" >found
${raw(
  NAMES.map(
    (
      name,
    ) => sh`get ${`${KINDS[name]}?pretty=false&limit=1000000${at}`} >list 2>said || gave_up ${`k3s does not give the ${name}: `}"$(tail -n 1 said)"
echo ${`${name}=`}"$(sed 's/},{"metadata":{/},\
{"metadata":{/g' list | grep -cE '^\{"metadata":|"items":\[\{')" >>found`,
  ).join("\n"),
)}
memory=0
for status in /proc/[0-9]*/status; do
  size=$(sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' "$status" 2>/dev/null)
  [ "\${size:-0}" -le "$memory" ] || memory=$size
done
echo "memory=$memory" >>found
mv found ..`;
};

/** Starts k3s on the archive `file`, whose sha256 is `hash`, and leaves what it found. */
export const proof = (file: string, hash: string, about: { version: string }, counts?: Counts) =>
  step({
    name: "drill",
    options: [
      "BACKUP",
      "HOST",
      "K3S_MIRRORS",
      "K3S_BIN",
      "K3S_SHA256",
      "SERVER_ARGS",
      "K3S_CONFIG",
      ...PROXY_SETTINGS,
    ],

    look: () => [
      binaryLook,
      prints("system tools k3s found")(`fact system; uname -s
fact tools; for tool in unshare ip mount; do command -v $tool; done
fact k3s; systemctl is-active k3s k3s-agent 2>/dev/null
fact found; cat ${FOLDER}/found 2>/dev/null`),
    ],

    plan(given, facts): Change[] {
      if (facts.found?.includes(hash)) return [];
      if (facts.system?.trim() !== "Linux")
        throw new Refusal("A drill needs Linux: HOST=… names a spare box");
      if (/^activ/m.test(facts.k3s ?? ""))
        throw new Refusal(
          "k3s runs on this box, and a second one beside it takes half a gigabyte of memory: HOST=… names a spare box",
        );
      const missing = ["unshare", "ip", "mount"].filter(
        (name) => !new RegExp(`/${name}$`, "m").test(facts.tools ?? ""),
      );
      if (missing.length)
        throw new Refusal(`This box has no ${missing.join(" and no ")} (packages util-linux, iproute2)`);
      const { version } = about;
      const K3S_SHA256 = given.K3S_BIN || given.K3S_VERSION === version ? given.K3S_SHA256 : "";
      const want = { ...given, K3S_VERSION: version, K3S_SHA256 };
      const installed = facts.version?.trim() === version && !want.K3S_BIN;
      const k3s = installed ? K3S : `${FOLDER}/k3s`;
      const archive = `${FOLDER}/${hash.slice(0, 12)}.tar.gz`;
      // In place of the box's own, which old releases do not read.
      const config = /^v1\.1[78]\./.test(version) ? [] : [`--config=${FOLDER}/data/config.yaml`];
      return [
        ...(installed ? [] : [binaryIn(FOLDER, want, facts)]),
        {
          why: `start k3s ${version} on the backup alone, in namespaces of its own, and count`,
          push: { file, path: archive },
          sh: sh`umask 077
chmod 700 ${FOLDER}
cd ${FOLDER}
rm -rf data found
trap 'rm -rf ${FOLDER}/data ${archive}' EXIT
trap 'exit 1' TERM INT HUP
[ "$(sha256sum <${archive} | cut -d' ' -f1)" = ${hash} ] || { echo 'The copy of the backup on this box is not the backup'; exit 1; }
mkdir -p data/k3s/server data/lib/k3s-drill data/etc data/own/rancher
ln -s ${FOLDER}/data data/lib/rancher
cd data/k3s/server
${raw(checked(archive))}
tar -xzof ${archive}
cd ${FOLDER}/data
printf '%s\n' "\${K3S_CONFIG:-}" >config.yaml
# shellcheck disable=SC2016 # it is a script
{ while beat >&4 && echo; do sleep 1; done 2>/dev/null | unshare --mount --net --pid --fork --mount-proc sh -euc ${inside(k3s, [...config, ...splitWords(want.SERVER_ARGS)], counts?.revision)}; } 4>&1
echo ${`sha256=${hash}`} >>${FOLDER}/found`,
          ...(want.K3S_CONFIG ? { secrets: ["K3S_CONFIG"] as const } : {}),
          seconds: STARTED + 300,
        },
      ];
    },
  });

const swept = step({
  name: "sweep",
  options: [],
  look: () => [prints("folder")(`fact folder; ls -d ${FOLDER} 2>/dev/null`)],
  plan: (_want, facts) =>
    facts.folder?.trim() ? [{ why: "remove what the drill has left", sh: `rm -rf ${FOLDER}` }] : [],
});

/** What k3s found, in a line. @throws {Failure} where the backup says something else of itself. */
export function resultOf(found: Record<string, string>, counts: Counts | undefined): string {
  const has = (name: keyof typeof KINDS) => Number(found[name]);
  const wrong = NAMES.filter((name) => counts?.[name] !== undefined && counts[name] !== has(name));
  if (wrong.length)
    throw new Failure(
      `The backup is not what it says it is: ${wrong.map((name) => `${has(name)} ${name}, expected ${counts?.[name]}`).join("; ")}`,
    );
  const parts = NAMES.map((name) =>
    counts?.[name] === undefined ? `${has(name)} ${name}` : `${name} ${has(name)} of ${counts[name]}`,
  );
  const told = NAMES.every((name) => counts?.[name] !== undefined)
    ? ""
    : "; the backup says nothing of itself to compare with";
  return `k3s was ready in ${Number(found.seconds)} s with ${Math.round(Number(found.memory) / 1024)} MB: ${parts.join(", ")}${told}`;
}

async function drill(run: Run): Promise<number> {
  const { settings } = run;
  const named = await boxes(run, "HOST");
  if (named.length > 1) throw new SettingError(`HOST names ${named.length} boxes: expected one`);
  const [box] = named as [Box];
  if (!box.host && process.platform !== "linux")
    throw new SettingError("HOST is not set, and this machine is no Linux: expected a spare box that is one");
  const path = settings.BACKUP || (await newest(run));
  const { file, done } = await opened(path, run);
  try {
    const about = await aboutOf(file, path);
    const counts = await listOf(file);
    const hash = await hashOf(file);
    await watch([box]);
    box.line.says(`proves ${path}, ${age(path)}`);
    return await attempt(run, box, async () => {
      try {
        const now = await bring(run, box, [proof(file, hash, about, counts)]);
        if (now) box.line.done(false, resultOf(parseKeyValues(now.facts.found ?? ""), counts));
      } finally {
        if (run.mode === "apply") await lookAndConverge(box, swept).catch(() => {});
      }
    });
  } finally {
    done();
  }
}

await main(import.meta, {
  about:
    "Proves the newest backup, or BACKUP: starts k3s on it alone, on this Linux machine or the spare box in HOST, and counts what it has. The cluster is not touched.",
  steps: [proof("", "", { version: "" })],
  work: drill,
});

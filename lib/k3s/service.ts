/** k3s as a systemd unit: changes that make it run as configured, and the wait until it is healthy. */

import { cardsOf } from "../protocol.ts";
import type { Settings } from "../settings.ts";
import { bare, raw, sh, UPTIME, writeFile } from "../sh.ts";
import { type Change, type Facts, prints, Refusal, step } from "../step.ts";
import { NAT, publicIp, type SettingName } from "../table.ts";
import { filledEnv, parseKeyValues, quoted, rewrite, SECRET, sha256 } from "../text.ts";
import { asNode, CURL_SED, passwordOf } from "../token.ts";
import { CLEAR } from "./cleanup.ts";
import { filesLook, filesPlan, labelsPlan } from "./config.ts";
import { nodeNameOf } from "./identity.ts";
import { HOPELESS } from "./journal.ts";
import { clusterLook, isInside, nodesOf, oldestSh, silence, tunnelIpOf, WATCH } from "./nodes.ts";
import { foldersLook, writable } from "./packages.ts";
import {
  argsOf,
  binaryLook,
  CLEAR_LO,
  cgroupArgs,
  cgroupFault,
  cgroupLook,
  envPath,
  type Generation,
  goesInside,
  interfaceOf,
  K3S,
  NODE_TOKEN,
  nameLook,
  type Role,
  releaseOf,
  shownLook,
  unitOf,
  unitPath,
  unitText,
} from "./unit.ts";

/** Checked before a box is changed: k3s needs systemd (not OpenRC) and suitable cgroups. */
export const systemdFirst = step({
  name: "systemd",
  options: [],
  look: () => [binaryLook, cgroupLook, prints("openrc")("fact openrc; test -d /run/openrc && echo yes")],
  plan(want, facts) {
    if (facts.systemd?.trim()) {
      const { version, generation } = releaseOf(want, facts);
      const fault = cgroupFault(version, facts) ?? tunnelFault(want, version, generation);
      if (fault) throw new Refusal(fault);
      return [];
    }
    const name = /^PRETTY_NAME="?([^"\n]*)/m.exec(facts.os ?? "")?.[1] ?? "This box";
    throw new Refusal(
      `${name} uses ${facts.openrc?.trim() ? "OpenRC" : "another init system"} instead of systemd, which runs k3s here: choose a distribution with systemd. Nothing was installed`,
    );
  },
});

/** Why TUNNEL_KUBELETS cannot be had with this release. */
const tunnelFault = (want: Settings, version: string, generation?: Generation): string | undefined =>
  want.TUNNEL_KUBELETS && generation === "old"
    ? `TUNNEL_KUBELETS=yes has not been tried on k3s of the old WireGuard backend, as ${version} is: remove the setting, or take v1.26 or later`
    : undefined;

type HealthFact = "nodes" | "interfaces" | "service";
type ServiceFact = HealthFact | "other" | "envfile" | "unit" | "written" | "read" | "enabled" | "version";

/** Facts about a role's service, and the cluster's nodes as its box sees them. */
export function serviceLook(role: Role, { PROXY_MODE }: Settings) {
  const [own, other] = role === "server" ? ["$server_unit", "$agent_unit"] : ["$agent_unit", "$server_unit"];
  const service = prints("unit envfile written service enabled other ipvs")(`fact unit; text ${unitPath(role)}
fact envfile; [ ! -e ${envPath(role)} ] || { stat -c %a ${envPath(role)}; digest ${envPath(role)}; }
fact written; [ ! -e ${unitPath(role)} ] || stat -c %Z ${K3S} ${unitPath(role)} ${envPath(role)} 2>/dev/null
fact service; printf '%s\n' "${own}"
fact enabled; property "${own}" UnitFileState; echo "$value"
fact other; property "${other}" ActiveState; echo "$value"
${PROXY_MODE === "ipvs" ? "fact ipvs; { test -d /sys/module/ip_vs || modprobe -n -q ip_vs 2>/dev/null; } && echo yes" : ""}
`);
  return [shownLook, binaryLook, nameLook, cgroupLook, foldersLook, service, filesLook, ...clusterLook];
}

/** When a service's process started, in seconds since 1970; undefined when it is not running. */
export function startedAt(facts: Facts<"service">, shown = facts.service): number | undefined {
  const service = parseKeyValues(shown);
  const since = Number(service.ExecMainStartTimestampMonotonic) / 1e6;
  // A modern agent may be Ready while systemd still has it "activating" (v1.36.3 on a slow box, seen).
  if (!Number(service.MainPID) || !since) return undefined;
  return Number(facts.now) - (Number(facts.uptime) - since);
}

/** Is the public address on a network interface (other than `lo`, where our unit puts it)? */
export function onCard(ip: string, facts: Facts): boolean {
  return cardsOf(facts).some((own) => own.card !== "lo" && own.ip === ip);
}

/**
 * The address inside the tunnel of a box without a public one, with TUNNEL_KUBELETS of every box: by its node's pod
 * network, or as its unit has it while the cluster says nothing, or has given none yet; undefined before it has joined.
 */
function tunnelIpIn(want: Settings, facts: Facts<"nodes" | "unit">, name: string): string | undefined {
  if (!goesInside(want)) return undefined;
  const inside = tunnelIpOf(nodesOf(facts.nodes).find((n) => n.name === name) ?? { podCidr: undefined });
  if (inside) return inside;
  const [, had] = /--node-ip=(\S+)/.exec(facts.unit ?? "") ?? [];
  return had && publicIp(had) ? had : undefined;
}

/** Without ip_vs in the kernel kube-proxy falls back to iptables (v1.17.6, recorded). */
const lacksIpvs = (want: Settings, facts: Facts<"ipvs">): boolean =>
  want.PROXY_MODE === "ipvs" && !facts.ipvs?.trim();

/** The message for a healthy node, with the settings that could not be applied. */
export function healthyMessage(role: Role, want: Settings, facts: Facts): string {
  const name = nodeNameOf(role, want, facts);
  const proxy = lacksIpvs(want, facts) ? "; its kernel has no ip_vs, so kube-proxy uses iptables" : "";
  return `k3s ${releaseOf(want, facts).version} is up to date, node ${name} is Ready${proxy}`;
}

/** Why the node is not healthy yet. systemd's state does not count: a k3s that restarts in a loop is "active" too. */
export function healthProblems(
  name: string,
  ip: string,
  generation: Generation,
  facts: Facts<HealthFact>,
  inside = ip === NAT,
): string[] {
  const node = nodesOf(facts.nodes).find((n) => n.name === name);
  // If the API did not answer in time, the node is unknown, not missing.
  if (!node) return [silence(facts) ? "the API gave no list of nodes" : `node ${name} is not registered`];
  const started = startedAt(facts) ?? Number.POSITIVE_INFINITY;
  return [
    node.ready ? "" : `node ${name} is not Ready`,
    // A node stays Ready for 40 s after its kubelet has died: the heartbeat must be later than this start.
    node.heartbeat >= Math.floor(started) - 1 ? "" : `node ${name} has not reported since its last start`,
    !inside || isInside(node)
      ? ""
      : `InternalIP of ${name} is ${node.internalIp ?? "not set"}, not ${tunnelIpOf(node) ?? "inside the tunnel"}`,
    ip === NAT || node.externalIp === ip
      ? ""
      : `ExternalIP of ${name} is ${node.externalIp ?? "not set"}, not ${ip}`,
    (facts.interfaces ?? "").split("\n").includes(interfaceOf(generation))
      ? ""
      : `no ${interfaceOf(generation)} yet`,
  ].filter(Boolean);
}

/**
 * Changes that make a role's unit run as configured: its two files, then one restart if the process is older than the
 * files (so the next run completes an interrupted one), then a health check.
 *
 * @param env lines of the EnvironmentFile; `@NAME@` is replaced by a secret setting.
 * @param before changes that must be made before the next start.
 * @param note the reason why the environment changes.
 */
export function servicePlan(
  role: Role,
  env: string,
  want: Settings,
  facts: Facts<ServiceFact>,
  before: readonly Change[] = [],
  note = "",
): Change[] {
  const { version, generation } = releaseOf(want, facts);
  if (!generation) return [{ why: "ask the k3s binary for its flags", sh: ":", lookAgain: true }];
  if (/^(active|activating)/.test(facts.other ?? ""))
    throw new Refusal(
      `This box runs ${unitOf(role === "server" ? "agent" : "server")}: it cannot be ${unitOf(role)} as well`,
    );
  const {
    MainPID = "",
    ExecMainStartTimestampMonotonic: since = "",
    NeedDaemonReload,
  } = parseKeyValues(facts.service);
  const told = /^\d+$/.test(MainPID) && (MainPID === "0" || /^\d+$/.test(since));
  if (facts.service?.trim() && !told)
    throw new Refusal(
      `Unexpected output of "systemctl show ${unitOf(role)}": ${quoted(facts.service.trim())}`,
    );
  const fault = tunnelFault(want, version, generation);
  if (fault) throw new Refusal(fault);
  if (want.PROXY_MODE === "nftables" && Number(version.split(".")[1]) < 31)
    throw new Refusal(`PROXY_MODE=nftables needs k3s v1.31 or later, not ${version}`);

  const name = nodeNameOf(role, want, facts);
  const unit = unitOf(role);
  const noIpvs = lacksIpvs(want, facts);
  const mode = noIpvs ? "iptables" : want.PROXY_MODE;
  const tunnelIp = tunnelIpIn(want, facts, name);
  const args = argsOf(role, generation, want, mode, name, cgroupArgs(role, version, want, facts), tunnelIp);
  const absent = want.PUBLIC_IP !== NAT && !onCard(want.PUBLIC_IP, facts) ? [want.PUBLIC_IP] : [];
  const onLo = [...absent, ...(tunnelIp ? [tunnelIp] : [])];
  const text = unitText(role, generation, args, onLo);
  const clearLo = onLo.length === 0 && facts.unit?.includes(CLEAR_LO) ? `\n${CLEAR_LO} || :` : "";
  const { changes: files, gone } = filesPlan(generation, version, want, facts);
  const changes: Change[] = [...before, ...labelsPlan(role, name, args, facts), ...files];
  if (facts.envfile?.trim() !== `600\n${sha256(filledEnv(env, want))}`) {
    const secrets = [...env.matchAll(SECRET)].map((m) => m[1] as SettingName);
    changes.push({
      why: `write ${envPath(role)} (0600)${note && `: ${note}`}`,
      sh: [
        ...secrets.map(
          (name) => sh`case $${name} in *\\*) ${name}=$(printf %s "$${name}" | sed 's/\\/&&/g') ;; esac`,
        ),
        writeFile(envPath(role), env, "600", secrets),
      ].join("\n"),
      ...(secrets.length ? { secrets } : {}),
    });
  }
  if (facts.unit !== text)
    changes.push({
      ...rewrite(
        unitPath(role),
        facts.unit,
        text,
        noIpvs ? "this kernel has no ip_vs: iptables instead" : "",
      ),
      sh: sh`install -d -m 700 /var/lib/rancher/k3s/${role}
${raw(writeFile(unitPath(role), text))}${raw(clearLo)}`,
    });

  if (changes.length) writable(facts, "/etc/systemd/system", "/var/lib/rancher");

  const started = startedAt(facts);
  // ctime has whole seconds: half a second of tolerance for files written just before this start. A time in the future
  // comes from a clock that was set back since.
  const stale = `${facts.written}\n${facts.read}`
    .split("\n")
    .some((s) => Number(s) > Math.floor((started ?? 0) + 0.5) && Number(s) <= Number(facts.now));
  const problems = healthProblems(name, want.PUBLIC_IP, generation, facts, goesInside(want));
  const down = started === undefined || facts.enabled?.trim() !== "enabled";
  const border = (facts.interfaces ?? "")
    .split("\n")
    .includes(interfaceOf(generation === "old" ? "modern" : "old"));
  // The new binary is already in place.
  const newBinary = facts.version?.trim() !== version;
  const nodes = nodesOf(facts.nodes);
  const node = nodes.find((one) => one.name === name);
  // A kubelet whose node was deleted does not register it again before its next start (v1.36.3, seen).
  const forgotten = nodes.length > 0 && !node && !down && Number(facts.now) - started > SETTLES;
  const due =
    changes.length + gone.length > 0 ||
    down ||
    stale ||
    border ||
    newBinary ||
    forgotten ||
    NeedDaemonReload === "yes";
  const other = node?.externalIp;
  if (other && want.PUBLIC_IP === NAT)
    throw new Refusal(
      `Node ${name} has the public address ${other}, which k3s keeps until the node is deleted: make remove HOST=${want.HOST || "…"}=${other} first`,
    );
  if (!due && other && other !== want.PUBLIC_IP && Number(facts.now) - started > SETTLES)
    throw new Refusal(
      `Node ${name} has the public address ${other}, this box ${want.PUBLIC_IP}: another box has the same name`,
    );
  if (due)
    changes.push(
      restart(role, generation, name, want, {
        verb: down ? "start" : "restart",
        gone,
        clear: border,
        tunnelIp,
      }),
    );
  else if (problems.length)
    changes.push({
      why: `wait until node ${name} is healthy: ${problems.join(", ")}`,
      // Of this start, as healthProblems() counts it: a heartbeat of the process before proves nothing.
      sh: sh`unit=${unit}; pid=$(systemctl show ${unit} -p MainPID); pid=\${pid#*=}; since=${Math.floor(started) + 1}; stand=0
${raw(healthSh(name, generation, want, role === "agent" ? 1 : 0, tunnelIp))}`,
      seconds: WAIT + 60,
      ...(silence(facts) ? { unknown: silence(facts) as string } : {}),
    });
  return changes;
}

/** Seconds until a changed ExternalIP is visible: v1.17.6 took up to 60. */
const SETTLES = 120;

/** How long a node may take to become healthy, in seconds: v1.36.3 on two emulated CPUs took 168, starved ones 460. */
const WAIT = 600;

/**
 * The change that (re)starts a unit and waits until its node is healthy. Between the generations (`clear`) the other
 * one's pods and interface are removed first: both of flannel's interfaces listen on 51820.
 */
export function restart(
  role: Role,
  generation: Generation,
  name: string,
  want: Settings,
  {
    verb = "restart",
    gone = [],
    clear = false,
    tunnelIp,
  }: { verb?: string; gone?: readonly string[]; clear?: boolean; tunnelIp?: string | undefined } = {},
): Change {
  const unit = unitOf(role);
  const outside = want.PUBLIC_IP === NAT ? "" : " with its public address";
  const withAddress = tunnelIp ? " with its address inside the tunnel" : outside;
  // One change: a run interrupted in between would leave a running k3s whose files are gone.
  const remove = gone.length ? `${sh`rm -f ${gone}`}\n` : "";
  const cleared = clear
    ? sh`timeout 60 systemctl stop ${unit} || systemctl kill -s KILL ${unit}
${raw(CLEAR)}`
    : "";
  return {
    why: `${gone.map((path) => `remove ${path}, `).join("")}${verb} ${unit} and wait until node ${name} is Ready${withAddress}`,
    // --no-block: with wrong credentials a modern agent stays "activating" for ever (seen with v1.36.3).
    sh: sh`${raw(remove)}unit=${unit}; pid=; since=$(date +%s); stand=0
# v1.36.3 with a wrong backend dies a second after it was up. It makes no interface, but where one is left from
# before, only time tells: k3s has to stand for five seconds.
[ ! -d /sys/class/net/${interfaceOf(generation)} ] || stand=5
# --no-reload: one reload for both.
systemctl --no-reload enable ${unit} >/dev/null 2>&1
systemctl daemon-reload
${raw(cleared)}systemctl restart --no-block ${unit}
${raw(healthSh(name, generation, want, role === "agent" ? 1 : 0, tunnelIp, role === "server" && generation === "modern" && verb === "start" ? DOOR : ""))}`,
    seconds: WAIT + 60,
  };
}

/**
 * Reports the token as soon as the server accepts it, so that agents join while the server's own node becomes Ready.
 * Not on old k3s, which annotate restarts once more.
 */
const DOOR = sh`if [ -z "\${open-}" ] && [ -s ${NODE_TOKEN} ] && { read -r token <${NODE_TOKEN} || [ -n "$token" ]; }; then
    pause=0.5
    door=$(${raw(asNode(`"$(printf %s "${passwordOf("token")}" | sed '${CURL_SED}')"`))}
      curl -s -K - --cacert /var/lib/rancher/k3s/server/tls/server-ca.crt --max-time 5 -o /dev/null -w '%{http_code}' \
        https://127.0.0.1:6443/v1-k3s/client-k3s-controller.crt) || :
    if [ "$door" = 200 ]; then open=yes; early token "$token"; fi
  fi
`;

/**
 * Shell that removes an empty node password file: k3s that could not write it to a full disk uses it forever, and no
 * server accepts it (pkg/agent/config, ensureNodePassword, both generations). A new file may still be filled.
 */
export const withoutEmpty = (password = "/etc/rancher/node/password"): string =>
  sh`[ -s ${password} ] || [ ! -e ${password} ] || [ $(($(date +%s) - $(stat -c %Y ${password}))) -lt 5 ] || rm -f ${password}`;

/** Waits for a healthy node, reports progress, and on failure prints the relevant journal lines. */
function healthSh(
  name: string,
  generation: Generation,
  want: Settings,
  peers: number,
  tunnelIp: string | undefined,
  meanwhile = "",
): string {
  // A box without a public address has none of its own before it has joined.
  const [type, ip] =
    tunnelIp || want.PUBLIC_IP === NAT ? ["InternalIP", tunnelIp ?? ""] : ["ExternalIP", want.PUBLIC_IP];
  return bare(sh`# So apiuser need not ask systemd.
case $unit in k3s) agent_unit=inactive ;; *) agent_unit=active ;; esac
${raw(WATCH)}
began=$(date +%s); starts=0; was=; asked=; due=5
${raw(UPTIME)}
clock; first=$up; at=$up
nap() { sleep "$pause" 2>/dev/null || sleep 1; }
fail() {
  echo "$1"
  echo "journal of $unit since then, what matters of it:"
  # A start of v1.36.3 is some 600 lines; what it says last is why it ended.
  journalctl -u "$unit" -o cat --no-pager --since "@$began" -n 5000 |
    grep -E 'level=(error|fatal|warn)|^[EF][0-9]{4} |Incorrect Usage|not defined|panic:' |
    sed -E 's/^time="[^"]*" //; s/^[EF][0-9]{4} [0-9:.]+ +[0-9]+ //' | tac | awk '!seen[$0]++' | cut -c1-400 | head -n 12 | tac
  exit 1
}
${raw(meanwhile ? "pause=0.2" : "pause=0.5; sleep 1")}
while :; do
  ${raw(withoutEmpty())}
  clock
  ${raw(meanwhile)}if [ "$up" != "$asked" ]; then
    asked=$up
    beat
    if ! { [ "\${pid:-0}" != 0 ] && kill -0 "$pid" 2>/dev/null; }; then
      p=$(systemctl show "$unit" -p MainPID); p=\${p#*=}
      if [ "$p" != "$pid" ]; then pid=$p; since=$(date +%s); at=$up; [ "$p" = 0 ] || starts=$((starts + 1)); fi
    fi
    [ "$starts" -lt 5 ] || fail "$unit starts again and again"
    # A long journal takes more time than all else here.
    if [ $((up - first)) -ge "$due" ]; then
      due=$((up - first + 5))
      [ "$(journalctl -u "$unit" -o cat --no-pager --since "@$began" | grep -cE ${HOPELESS})" -lt 3 ] || fail "$unit cannot go on"
    fi
  fi
  if [ -d /sys/class/net/${interfaceOf(generation)} ]; then
    changed ${name} 2
    case $node in *' Ready'*) shown=Ready ;; '') shown='not registered yet' ;; *) shown='not Ready' ;; esac
  else
    nap
    node=; shown='no ${interfaceOf(generation)} yet'
  fi
  ip=\${node#* ${type === "InternalIP" ? "internal-ip" : "external-ip"}=}; ip=\${ip%% *}; beat=\${node#* beat=}; beat=\${beat%% *}
  [ "$ip" != - ] || ip='not set'
  want=${ip}; [ "$ip" = "\${want:-$ip}" ] || [ -z "$node" ] || shown="$shown, ${raw(type)} $ip"
  if [ "$shown" = Ready ] && [ "$(date -d "$beat" +%s)" -ge $((since - 2)) ]; then
    [ $((up - at)) -lt "$stand" ] || break
  fi
  [ "$shown" = "$was" ] || say "node ${name}: $shown"
  was=$shown
  [ $((up - first)) -lt ${WAIT} ] || fail "node ${name} is not healthy after ${WAIT} s: $shown"
done
# WireGuard needs some seconds more; who is still missing then is the next look's to say.
pause=0.2; clock; end=$((up + 10))
while clock; [ "$up" -lt "$end" ]; do
  ${raw(oldestSh(generation))}
  wg show ${interfaceOf(generation)} dump | awk -v oldest="$oldest" 'NR > 1 && $4 != "(none)" && $5 < oldest { bad = 1 } NR > 1 { n++ } END { exit bad || n < ${peers} }' && break
  nap
done`);
}

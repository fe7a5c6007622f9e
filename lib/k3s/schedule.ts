/**
 * Backups that the server makes by itself: its program and timer, and the receiver on the node that keeps them. What leaves
 * the server is encrypted to the operator's certificate; the receiver takes such files under their names, and does nothing
 * else for the key that calls it.
 */
import type { Settings } from "../settings.ts";
import { quote, raw, sh, writeFile } from "../sh.ts";
import { type Change, type Facts, type Printed, prints, Refusal, step } from "../step.ts";
import { nameOf, parseKeyValues, sha256 } from "../text.ts";
import { PACK } from "./archive.ts";
import { placed } from "./firewall/own.ts";
import { nodeNameOf } from "./identity.ts";
import { type Node, nodesLook, nodesOf, tunnelIpOf } from "./nodes.ts";
import { binaryLook, K3S, nameLook, WRITTEN_BY } from "./unit.ts";

/** On the server: settings, certificate, ssh key and S3 credentials; and what the program remembers. */
export const SCHEDULE_FOLDER = "/etc/rancher/k3s-backup";
export const SCHEDULE_STATE = "/var/lib/k3s-backup";
export const SCHEDULE_PROGRAM = "/usr/local/sbin/k3s-backup";
export const SCHEDULE_UNIT = "/etc/systemd/system/k3s-backup.service";
export const SCHEDULE_TIMER = "/etc/systemd/system/k3s-backup.timer";
/** On the node that keeps copies. */
export const COPIES = "/var/lib/k3s-backups";
export const RECEIVER = "/usr/local/sbin/k3s-backup-receive";

/** BACKUP_EVERY in seconds; 0 if it is empty. */
export const secondsOf = (every: string): number =>
  Number(every.slice(0, -1) || 0) * (every.endsWith("d") ? 86_400 : 3600);

/** Seconds, above twice BACKUP_EVERY, from which the last backup is too old: the timer comes late, and a copy takes time. */
export const GRACE = 3600;

/** How a server is called in the names of its backups. */
export const calledIn = (name: string): string => name.replace(/[^\w.-]/g, "-");

/** Is this the box that BACKUP_TO names? */
export const keepsFor =
  (to: string) =>
  ({ host, name }: { host: string; name: string }): boolean =>
    host === to || name === nameOf(to);

export const isBucket = (to: string): boolean => to.startsWith("https://");

/**
 * The program. Called by the timer it looks whether a backup is due; `now` makes one. Nothing counts before the target has
 * all of it: then the state names it, written like every file under another name first. What a power cut leaves is in `work`,
 * which the next run clears. k3s is not paused before the target has answered.
 */
export const PROGRAM = sh`#!/bin/sh
${raw(WRITTEN_BY)}
set -eu
umask 077
export LC_ALL=C PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
folder=${SCHEDULE_FOLDER} memory=${SCHEDULE_STATE}
every=3600 keep=7 to='' region='' server='' own='' ip='' node='' address='' login='' port=''
# shellcheck disable=SC1091
. "$folder/settings"
${raw(PACK)}
put_state() {
  printf '%s\n' "$@" >"$memory/state.new"
  sync "$memory/state.new" 2>/dev/null || sync
  mv -f "$memory/state.new" "$memory/state"
}
last() { sed -n "s/^made=\([0-9]*\) .*/\1/p" "$memory/state" 2>/dev/null | tail -n 1; }
# The target's address in the tunnel; the last one known where the API is silent.
address() {
  cidr=$(timeout 20 ${K3S} kubectl --kubeconfig /etc/rancher/k3s/k3s.yaml --request-timeout=10s get node "$node" -o json 2>/dev/null |
    sed -n 's/.*"podCIDR": *"\([0-9.]*\)\/.*/\1/p' | head -n 1)
  echo "\${cidr:-$address}"
}
target() {
  timeout 3600 ssh -F /dev/null -T -p "$port" -i "$folder/key" -o BatchMode=yes -o IdentitiesOnly=yes -o IdentityAgent=none \
    -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o StrictHostKeyChecking=yes -o LogLevel=ERROR \
    -o HostKeyAlias=k3s-backup-target -o UserKnownHostsFile="$folder/known_hosts" -o GlobalKnownHostsFile=/dev/null \
    -o UpdateHostKeys=no -o ControlPath=none -o ForwardAgent=no -l "$login" "$at" "$@"
}
# s3 METHOD NAME SHA256 [FILE]: the answer's body is in the file answer, its status in $code.
s3() {
  [ "$#" = 4 ] || set -- "$1" "$2" "$3" ''
  rm -f answer
  code=$(curl -q -sS -K "$folder/s3" --aws-sigv4 "aws:amz:$region:s3" --proto =https -X "$1" -H "x-amz-content-sha256: $3" \
    --connect-timeout 15 --speed-limit 1 --speed-time 60 --max-time 3600 --max-filesize 1000000 \${4:+-T "$4"} -o answer -w '%{http_code}' "$to/$2") || {
    echo "The bucket does not answer"
    exit 1
  }
}
bucket_says() {
  word=$(sed -n 's/.*<Code>\([A-Za-z0-9]*\)<\/Code>.*/\1/p' answer 2>/dev/null | head -n 1)
  echo "The bucket refuses $1: status $code\${word:+, $word}"
  exit 1
}
nothing=e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
# The object k3s-SERVER-latest has a line for each copy, the newest first: its name and sha256. Those without a space are of no use.
put_latest() {
  s3 PUT "k3s-$server-latest" "$(sha256sum <latest | cut -d' ' -f1)" latest
  case $code in 2??) ;; *) bucket_says "k3s-$server-latest" ;; esac
}
ours() { grep -E "^k3s-$(printf %s "$server" | sed 's/[.]/[.]/g')-[0-9]{8}T[0-9]{6}Z[.]tar[.]gz[.]cms [0-9a-f]{64}$" "$1" || :; }
run() {
  rm -rf "$memory/work"
  mkdir "$memory/work"
  cd "$memory/work"
  if [ "$node" ]; then
    at=$(address)
    [ "$(target ready | head -c 1000)" = ready ] || { echo "$node does not answer as the receiver of backups"; exit 1; }
  else
    s3 GET "k3s-$server-latest" "$nothing"
    # Who may not list a bucket is answered 403 for what is not there.
    case $code in 200) ours answer >known ;; 404 | 403) : >known ;; *) bucket_says "k3s-$server-latest" ;; esac
  fi
  version=$(${K3S} --version | sed -n 's/^k3s version \(v[^ ]*\).*/\1/p')
  now=$(date -u +%Y%m%dT%H%M%SZ)
  name=k3s-$server-$now.tar.gz.cms
  pack "$memory/work/pack" archive "version=$version
node=$own
ip=$ip
made=$now"
  archive=$memory/work/pack/archive.tar.gz
  revision=$(tar -xzOf "$archive" list | sed -n 's/^revision=//p')
  openssl cms -encrypt -binary -stream -outform DER -aes256 -in "$archive" -out "$name" "$folder/certificate"
  [ -s "$name" ] || { echo 'openssl has written nothing'; exit 1; }
  rm -rf "$memory/work/pack"
  sum=$(sha256sum <"$name" | cut -d' ' -f1)
  size=$(wc -c <"$name" | tr -d ' ')
  if [ "$node" ]; then
    said=$(target "put $name $sum $size" <"$name" | head -c 1000)
    [ "$said" = "kept $name" ] || { echo "\${said:-$node was lost during the copy}"; exit 1; }
  else
    s3 PUT "$name" "$sum" "$name"
    case $code in 2??) ;; *) bucket_says "$name" ;; esac
    { echo "$name $sum"; grep -vF "$name " known || :; } | head -n 1000 >latest
    put_latest
  fi
  put_state "made=$(date +%s) name=$name revision=\${revision:-unverified}"
  echo "$name is in $to, revision \${revision:-unverified}"
  [ "$node" ] || prune
}
# A bucket may forbid it, which makes the copy no worse.
prune() {
  n=0 gone=
  while read -r old _; do
    n=$((n + 1))
    if [ "$n" -le "$keep" ] || [ "$old" = "$name" ]; then continue; fi
    s3 DELETE "$old" "$nothing" </dev/null
    case $code in 2?? | 404) gone="$gone $old" ;; *) echo "The bucket keeps $old: status $code" ;; esac
  done <latest
  [ "$gone" ] || return 0
  for old in $gone; do
    grep -vF "$old " latest >latest.new
    mv latest.new latest
  done
  put_latest
}
case \${1-} in
run)
  run
  exit
  ;;
now) wait='-w 900' ;;
*) wait=-n ;;
esac
mkdir -p "$memory"
exec 9>"$memory/lock"
# shellcheck disable=SC2086
flock $wait 9 || { [ "$wait" = -n ] || echo 'Another backup still runs'; [ "$wait" = -n ]; exit; }
rm -rf "$memory/work" "$memory/state.new"
made=$(last)
now=$(date +%s)
if [ "\${1-}" != now ] && [ "$made" ] && [ "$made" -le "$now" ] && [ "$((now - made))" -lt "$every" ]; then exit 0; fi
status=0
"$0" run >"$memory/log" 2>&1 9>&- </dev/null || status=$?
cat "$memory/log"
rm -rf "$memory/work"
[ "$status" != 0 ] || exit 0
cause=$(tail -n 2 "$memory/log" | tr '\n' ' ' | tr -d '\000-\037' | cut -c 1-300)
good=$(grep '^made=' "$memory/state" 2>/dev/null | tail -n 1) || :
# It may have been counted before what came after it failed.
[ "$(last)" = "$made" ] || exit 0
put_state \${good:+"$good"} "failed=$now \${cause:-exit status $status}"
exit 1
`;

const UNIT = `${WRITTEN_BY}
[Unit]
Description=A backup of this k3s server, if one is due
After=network-online.target k3s.service

[Service]
Type=oneshot
ExecStart=${SCHEDULE_PROGRAM}
Nice=10
TimeoutStartSec=3h
`;

const TIMER = `${WRITTEN_BY}
[Unit]
Description=Looks whether a backup of this k3s server is due

[Timer]
OnActiveSec=10min
OnUnitInactiveSec=10min
AccuracySec=1min

[Install]
WantedBy=timers.target
`;

/** The receiver: `ready`, or `put NAME SHA256 SIZE` with the file on standard input. */
export const RECEIVES = sh`#!/bin/sh
${raw(WRITTEN_BY)}
# k3s-backup-receive SERVER KEEP WORDS
set -eu
umask 077
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
server=$1 keep=$2
set -f
# shellcheck disable=SC2086 # it is words
set -- $3
fail() { echo "$*"; exit 1; }
ours() {
  rest=\${1#"k3s-$server-"}
  [ "$rest" != "$1" ] && printf '%s\n' "$rest" | grep -qxE '[0-9]{8}T[0-9]{6}Z\.tar\.gz\.cms'
}
mkdir -p ${COPIES}
chmod 700 ${COPIES}
cd ${COPIES}
case \${1-} in
ready) echo ready ;;
put)
  name=\${2-} sum=\${3-} size=\${4-}
  ours "$name" || fail "$name is no name of a backup of $server"
  # It would stay the newest whatever comes after it.
  at=\${name#"k3s-$server-"}
  [ "$(printf %s "$at" | cut -c 1-8)" -le "$(date -u -d "@$(($(date +%s) + 86400))" +%Y%m%d)" ] || fail "$name is of a day to come"
  printf '%s\n' "$sum" | grep -qxE '[0-9a-f]{64}' || fail 'expected a sha256'
  printf '%s\n' "$size" | grep -qxE '[0-9]{1,15}' || fail 'expected a size'
  # What a lost connection or a power cut has left. One that still runs loses its file's name, and then fails.
  find . -maxdepth 1 -name ".part-k3s-$server-*" -type f -exec rm -f {} +
  free=$(df -Pk . | awk 'NR == 2 { print $4 }')
  [ "$free" -gt $((size / 1024 + 65536)) ] || fail "there is too little room on $(uname -n): $free kB are free, and 64 MB have to stay so beside the copy"
  part=.part-$name.$$
  trap 'rm -f "$part"' EXIT
  trap 'exit 1' HUP INT TERM PIPE
  head -c "$((size + 1))" >"$part" || fail "$(uname -n) could not write it"
  [ "$(sha256sum <"$part" 2>/dev/null | cut -d' ' -f1)" = "$sum" ] || fail 'what arrived is not what was sent'
  sync "$part" 2>/dev/null || sync
  mv -f "$part" "$name"
  sync . 2>/dev/null || sync
  n=0
  # shellcheck disable=SC2012 # the names that count are plain
  ls -1 | sort -r | while read -r old; do
    ours "$old" || continue
    n=$((n + 1))
    if [ "$n" -gt "$keep" ] && [ "$old" != "$name" ]; then rm -f "$old"; fi
  done
  echo "kept $name"
  ;;
*) fail 'expected ready or put' ;;
esac
`;

/** Facts about the server's own backups: what is set, what state they are in, and what the target is told. */
export const scheduleLook = prints("schedule schedule-settings schedule-state schedule-key")(
  sh`if [ -e ${SCHEDULE_FOLDER} ] || [ -e ${SCHEDULE_PROGRAM} ] || [ -e ${SCHEDULE_TIMER} ]; then
fact schedule; cat ${SCHEDULE_PROGRAM} ${SCHEDULE_UNIT} ${SCHEDULE_TIMER} 2>/dev/null | sha256sum | cut -d' ' -f1
systemctl show k3s-backup.timer -p ActiveState -p UnitFileState 2>/dev/null | sort
for name in settings certificate known_hosts s3; do
  echo "$name=$(sha256sum <${SCHEDULE_FOLDER}/$name 2>/dev/null | cut -d' ' -f1)"
done
fact schedule-settings; cat ${SCHEDULE_FOLDER}/settings 2>/dev/null
fact schedule-state; cat ${SCHEDULE_STATE}/state 2>/dev/null
fact schedule-key; cat ${SCHEDULE_FOLDER}/key.pub 2>/dev/null
fi
`,
);
type ScheduleFact = Printed<typeof scheduleLook>;

/** Facts about a node that keeps copies, and how its sshd is reached. */
export const receiverLook = prints("receiver receiver-ssh receiver-keys receiver-user receiver-line")(
  sh`fact receiver; sha256sum <${RECEIVER} 2>/dev/null | cut -d' ' -f1
# The port at which the operator has come in: of this shell's parents, those before sudo know it.
pid=$$ port=
while [ "$pid" -gt 1 ] && [ -z "$port" ]; do
  port=$(tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | sed -n 's/^SSH_CONNECTION=.* \([0-9]*\)$/\1/p')
  pid=$(awk '/^PPid:/ { print $2 }' "/proc/$pid/status" 2>/dev/null)
  pid=\${pid:-0}
done
sshd=$(sshd -T 2>/dev/null) || sshd=
fact receiver-ssh; echo "\${port:-$(printf '%s\n' "$sshd" | sed -n 's/^port //p' | head -n 1)}"
fact receiver-keys; { printf '%s\n' "$sshd" | sed -n 's/^hostkey //p'; ls /etc/ssh/ssh_host_*_key 2>/dev/null; } | sort -u | while read -r key; do
  cut -d' ' -f1,2 "$key.pub" 2>/dev/null
done
user=\${SUDO_USER:-$(id -un)}
home=$(getent passwd "$user" | cut -d: -f6)
file=$(printf '%s\n' "$sshd" | sed -n 's/^authorizedkeysfile \([^ ]*\).*/\1/p' | head -n 1 | sed "s,%h,$home,g; s,%u,$user,g")
case \${file:=.ssh/authorized_keys} in /*) ;; none) file= ;; *) file=$home/$file ;; esac
fact receiver-user; printf '%s\n%s\n' "$user" "$file"
fact receiver-line; grep -h 'k3s-backup-receive .* k3s-backup$' "$file" 2>/dev/null
`,
);
type ReceiverFact = Printed<typeof receiverLook>;

/** How the server reaches a node that keeps copies. */
export interface Target {
  login: string;
  port: string;
  keys: string[];
}

/** @throws {Refusal} where the box does not say how its sshd is reached. */
export function targetOf(facts: Facts<ReceiverFact>): Target {
  const [login = "", file] = (facts["receiver-user"] ?? "").split("\n");
  const port = facts["receiver-ssh"]?.trim() || "22";
  const keys = (facts["receiver-keys"] ?? "")
    .split("\n")
    .filter((key) => /^[\w@.-]+ [A-Za-z0-9+/=]+$/.test(key));
  if (!/^[\w][\w.-]*$/.test(login) || !file || !/^\d{1,5}$/.test(port) || !keys.length)
    throw new Refusal("The box that is to keep backups does not say how its sshd is reached (sshd -T)");
  return { login, port, keys };
}

const isKey = (key: string) => /^ssh-ed25519 [A-Za-z0-9+/=]{40,100}$/.test(key);
/** The server's public key, once it has made one. */
export const scheduleKeyOf = (facts: Facts<ScheduleFact>): string | undefined => {
  const key = (facts["schedule-key"] ?? "").trim().split(" ").slice(0, 2).join(" ");
  return isKey(key) ? key : undefined;
};

/** sshd runs this line's command and nothing else; the shell of the user who logs in fills in what was asked for. */
const lineFor = (server: string, keep: string, login: string, key: string) =>
  `restrict,command="${login === "root" ? "" : "sudo -n "}${RECEIVER} ${server} ${keep} \\"$SSH_ORIGINAL_COMMAND\\"" ${key} k3s-backup`;

/** Shell that gives a user's file of keys this line in place of an earlier one, or none. Other lines stay as they are. */
const authorized = (user: string, file: string, line: string) =>
  sh`file=$(readlink -f ${file}) || file=${file}
dir=\${file%/*}
${raw(
  line
    ? sh`group=$(id -gn ${user})
[ -d "$dir" ] || install -d -m 700 -o ${user} -g "$group" "$dir"
[ -e "$file" ] || install -m 600 -o ${user} -g "$group" /dev/null "$file"`
    : `[ -e "$file" ] || file=`,
)}
if [ "$file" ]; then
  cp -p "$file" "$file.k3s-new"
  { grep -v 'k3s-backup-receive .* k3s-backup$' "$file" || :; ${raw(line && sh`printf '%s\n' ${line}`)}; } >"$file.k3s-new"
  sync
  mv -f "$file.k3s-new" "$file"
  ! command -v restorecon >/dev/null || restorecon "$dir" "$file" 2>/dev/null || :
fi`.replace("|| :; ; }", "|| :; }");

/** Has a node take copies of this server, for its key. @param key undefined: not made yet, in a preview. */
export const receives = (server: string, keep: string, key: string | undefined) =>
  step({
    name: "receive",
    options: [],
    look: () => [receiverLook],
    plan(_want, facts): Change[] {
      const { login } = targetOf(facts);
      const [, file = ""] = (facts["receiver-user"] ?? "").split("\n");
      const line = lineFor(server, keep, login, key ?? "");
      const has = facts.receiver?.trim() === sha256(RECEIVES);
      if (has && key && facts["receiver-line"]?.trim() === line) return [];
      return [
        {
          why: `let ${server} put its backups into ${COPIES}, ${keep} of them, by a key that can do nothing else`,
          sh: `# shellcheck disable=SC1003,SC2016 # what is written is a script, and words for one
{
${writeFile(RECEIVER, RECEIVES, "755")}
${authorized(login, file, line)}
}`,
        },
      ];
    },
  });

/** Prints what of both is on a box, and takes it away: those who may log in stay. */
export const SCHEDULE_LEFT = sh`for path in ${[SCHEDULE_FOLDER, SCHEDULE_STATE, COPIES]}; do [ ! -e "$path" ] || echo "$path"; done
for path in ${[SCHEDULE_PROGRAM, SCHEDULE_UNIT, SCHEDULE_TIMER, RECEIVER]}; do
  if grep -qsxF ${WRITTEN_BY} "$path"; then echo "$path"; fi
done`;
export const SCHEDULE_CLEAR = sh`systemctl disable --now k3s-backup.timer >/dev/null 2>&1 || :
systemctl stop k3s-backup.service 2>/dev/null || :
rm -rf ${SCHEDULE_FOLDER} ${SCHEDULE_STATE} ${COPIES}
rm -f ${SCHEDULE_PROGRAM} ${SCHEDULE_UNIT} ${SCHEDULE_TIMER} ${RECEIVER}
systemctl reset-failed k3s-backup.service 2>/dev/null || :`;

/** A node that keeps no copies any more: those that it has stay. */
export const receivesNone = step({
  name: "receive",
  options: [],
  look: () => [receiverLook],
  plan(_want, facts): Change[] {
    if (!facts.receiver?.trim() && !facts["receiver-line"]?.trim()) return [];
    const [user = "", file = ""] = (facts["receiver-user"] ?? "").split("\n");
    return [
      {
        why: `take no more backups: what is in ${COPIES} stays`,
        sh: `${authorized(user, file, "")}\n${sh`rm -f ${RECEIVER}`}`,
      },
    ];
  },
});

/** What the program reads. Each value is one word of shell. */
function settingsText(
  want: Settings,
  facts: Facts<"nodes" | ScheduleFact>,
  server: string,
  own: string,
  target: Target | undefined,
): string {
  const to = want.BACKUP_TO;
  const had = valuesIn(facts["schedule-settings"]);
  const known = had.to === to && had.node ? had : undefined;
  if (target && !facts.nodes?.trim() && !known)
    throw new Refusal(
      `The cluster's API does not answer on this box, and it is to say where ${to} is in the tunnel: make check says what is wrong`,
    );
  const found = target && facts.nodes?.trim() ? nodeOfTarget(to, facts) : undefined;
  const node = !target ? "" : found ? found.name : (known?.node ?? "");
  const address = found ? (tunnelIpOf(found) ?? "") : (known?.address ?? "");
  const lines = {
    every: `${secondsOf(want.BACKUP_EVERY)}`,
    keep: want.BACKUP_KEEP,
    to: to.replace(/\/+$/, ""),
    region: want.S3_REGION,
    server,
    own,
    ip: want.PUBLIC_IP,
    node,
    address: target ? address : "",
    login: target?.login ?? "",
    port: target?.port ?? "",
  };
  return Object.entries(lines)
    .map(([name, value]) => `${name}=${quote(value)}\n`)
    .join("");
}

/** A node goes by its box's name, unless its host is called otherwise: then its address tells. @throws {Refusal} */
function nodeOfTarget(to: string, facts: Facts<"nodes">): Node {
  const name = nameOf(to);
  const nodes = nodesOf(facts.nodes);
  const found =
    nodes.find((node) => node.name === name) ?? nodes.find(({ externalIp }) => externalIp === name);
  if (!found) throw new Refusal(`BACKUP_TO names ${to}, and the cluster has no such node: make check`);
  return found;
}

const valuesIn = (text = ""): Record<string, string> =>
  Object.fromEntries(
    [...text.matchAll(/^(\w+)='?(.*?)'?$/gm)].map(([, name = "", value = ""]) => [name, value]),
  );

const CURL_CONFIG = `user = "@S3_ACCESS_KEY@:@S3_SECRET_KEY@"\n`;
const credentials = (want: Settings) =>
  CURL_CONFIG.replace(/@(S3_\w+)@/g, (_, name: "S3_ACCESS_KEY" | "S3_SECRET_KEY") => want[name]);

const knownHosts = (target: Target) => target.keys.map((key) => `k3s-backup-target ${key}\n`).join("");

/** The server's key for the node that keeps its copies. */
export const scheduleKey = step({
  name: "key",
  options: [],
  look: () => [scheduleLook],
  plan: (_want, facts): Change[] =>
    scheduleKeyOf(facts)
      ? []
      : [
          {
            why: "make a key by which backups are sent",
            sh: sh`command -v ssh-keygen >/dev/null || { echo 'ssh-keygen is missing: install the OpenSSH client'; exit 1; }
install -d -m 700 ${SCHEDULE_FOLDER}
rm -f ${SCHEDULE_FOLDER}/key.new ${SCHEDULE_FOLDER}/key.new.pub
ssh-keygen -q -t ed25519 -N '' -C k3s-backup -f ${SCHEDULE_FOLDER}/key.new
mv -f ${SCHEDULE_FOLDER}/key.new ${SCHEDULE_FOLDER}/key
sync
mv -f ${SCHEDULE_FOLDER}/key.new.pub ${SCHEDULE_FOLDER}/key.pub`,
          },
        ],
});

/**
 * The program, its settings and timer, and the first backup.
 * @param certificate the text of the operator's.
 * @param target undefined: a bucket, or in a preview a node that was not looked at.
 */
export const scheduled = (server: string, certificate: string, target: Target | undefined) =>
  step({
    name: "schedule",
    options: ["BACKUP_EVERY", "BACKUP_TO", "BACKUP_KEEP", "S3_REGION", "S3_ACCESS_KEY", "S3_SECRET_KEY"],
    look: () => [
      binaryLook,
      nameLook,
      nodesLook,
      scheduleLook,
      prints("lacking")(sh`fact lacking; for name in openssl ${target ? "ssh" : "curl"}; do
  command -v "$name" >/dev/null || echo "$name"
done
${raw(target ? "" : "curl -V 2>/dev/null | sed -n 's/^curl \\([0-9.]*\\).*/curl=\\1/p'")}`),
    ],
    plan(want, facts): Change[] {
      const lacking = (facts.lacking ?? "").split("\n").filter(Boolean);
      const [missing] = lacking.filter((word) => !word.includes("="));
      if (missing)
        throw new Refusal(
          `${missing} is missing on this box, which backups need: install ${missing === "ssh" ? "the OpenSSH client" : missing}`,
        );
      const curl = lacking.find((word) => word.startsWith("curl="))?.slice(5);
      if (curl && !signs(curl))
        throw new Refusal(
          `curl on this box is ${curl}, which cannot sign what it sends to an S3 bucket: that needs 7.87; or let BACKUP_TO name a node`,
        );
      const text = settingsText(want, facts, server, nodeNameOf("server", want, facts), target);
      const files: [name: string, text: string, mode?: string][] = [
        ["settings", text],
        ["certificate", certificate],
        target ? ["known_hosts", knownHosts(target)] : ["s3", CURL_CONFIG],
      ];
      const [program, ...rest] = (facts.schedule ?? "").trim().split("\n");
      const has = parseKeyValues(rest.join("\n"));
      const due = (name: string, own: string) => sha256(name === "s3" ? credentials(want) : own);
      const other = files.filter(([name, own]) => has[name] !== due(name, own));
      const runs = has.ActiveState === "active" && has.UnitFileState === "enabled";
      const set = program === sha256(`${PROGRAM}${UNIT}${TIMER}`) && runs && !other.length;
      const { made, failed } = stateIn(facts["schedule-state"]);
      const changes: Change[] = [];
      if (!set)
        changes.push({
          why: `back this server up every ${want.BACKUP_EVERY} to ${want.BACKUP_TO}: write ${SCHEDULE_PROGRAM} and start its timer`,
          secrets: ["S3_ACCESS_KEY", "S3_SECRET_KEY"],
          sh: [
            sh`install -d -m 700 ${SCHEDULE_FOLDER} ${SCHEDULE_STATE}
rm -f ${SCHEDULE_FOLDER}/${raw(target ? "s3" : "known_hosts")}`,
            ...files.map(([name, own]) =>
              writeFile(
                `${SCHEDULE_FOLDER}/${name}`,
                own,
                "600",
                name === "s3" ? ["S3_ACCESS_KEY", "S3_SECRET_KEY"] : [],
              ),
            ),
            placed(SCHEDULE_PROGRAM, PROGRAM, SCHEDULE_UNIT, UNIT),
            writeFile(SCHEDULE_TIMER, TIMER),
            // The first one is made by this run, which shows what becomes of it.
            `systemctl daemon-reload
systemctl enable k3s-backup.timer >/dev/null 2>&1
systemctl restart k3s-backup.timer`,
          ].join("\n"),
        });
      if (!set || !made || failed)
        changes.push({
          why: `make a backup, and send it to ${want.BACKUP_TO}`,
          sh: sh`${SCHEDULE_PROGRAM} now`,
          seconds: 4000,
        });
      return changes;
    },
  });

/** curl sends the payload's own hash to S3 since 7.87.0. */
export function signs(version: string): boolean {
  const [major = 0, minor = 0] = version.split(".").map(Number);
  return major > 7 || (major === 7 && minor >= 87);
}

/** Takes the program and its timer away; what was sent stays where it is. */
export const unscheduled = step({
  name: "schedule",
  options: [],
  look: () => [scheduleLook],
  plan: (_want, facts): Change[] =>
    facts.schedule === undefined
      ? []
      : [
          {
            why: "make no more backups by a timer: BACKUP_EVERY is empty",
            sh: sh`systemctl disable --now k3s-backup.timer >/dev/null 2>&1 || :
systemctl stop k3s-backup.service 2>/dev/null || :
systemctl reset-failed k3s-backup.service 2>/dev/null || :
rm -rf ${SCHEDULE_FOLDER} ${SCHEDULE_STATE}
rm -f ${SCHEDULE_PROGRAM} ${SCHEDULE_UNIT} ${SCHEDULE_TIMER}
systemctl daemon-reload`,
          },
        ],
});

/** The program's state: its last good backup, and a failure since. Times in seconds since 1970. */
export function stateIn(text = "") {
  const [, made, name, revision] = /^made=(\d{1,11}) name=(\S{1,200}) revision=(\S{1,20})$/m.exec(text) ?? [];
  const [, at, cause = ""] = /^failed=(\d{1,11}) (.{0,400})$/m.exec(text) ?? [];
  return {
    ...(made ? { made: { at: Number(made), name: name as string, revision: revision as string } } : {}),
    ...(at ? { failed: { at: Number(at), cause } } : {}),
  };
}

/** What a box says of its automatic backups; undefined if it has none. */
export function scheduleIn(facts: Facts<ScheduleFact>) {
  if (facts.schedule === undefined) return undefined;
  const has = parseKeyValues(facts.schedule);
  const values = valuesIn(facts["schedule-settings"]);
  return {
    ...stateIn(facts["schedule-state"]),
    runs: has.ActiveState === "active" && has.UnitFileState === "enabled",
    every: Number(values.every) || 0,
    keep: values.keep ?? "",
    to: values.to ?? "",
    region: values.region ?? "",
    node: values.node ?? "",
    /** sha256 of the S3 credentials' file. */
    s3: has.s3 || undefined,
  };
}

/** Settings on the server that differ from these. */
export function scheduleDiffers(want: Settings, has: NonNullable<ReturnType<typeof scheduleIn>>): string[] {
  const bucket = isBucket(want.BACKUP_TO);
  const pairs: [name: string, same: boolean][] = [
    ["BACKUP_EVERY", has.every === secondsOf(want.BACKUP_EVERY)],
    ["BACKUP_TO", has.to === want.BACKUP_TO.replace(/\/+$/, "")],
    ["BACKUP_KEEP", has.keep === want.BACKUP_KEEP],
    ["S3_REGION", !bucket || has.region === want.S3_REGION],
    ["S3_ACCESS_KEY or S3_SECRET_KEY", !bucket || has.s3 === sha256(credentials(want))],
  ];
  return pairs.flatMap(([name, same]) => (same ? [] : [name]));
}

/** How long ago, for a message. */
const ago = (seconds: number) =>
  seconds < 7200 ? `${Math.max(0, Math.round(seconds / 60))} min` : `${Math.round(seconds / 3600)} h`;

/** A server's own backups as check and status have them; undefined where none are asked for and none are made. */
export function backupsIn(want: Settings, facts: Facts<ScheduleFact>, nodes: readonly Node[]) {
  const has = scheduleIn(facts);
  const now = Number(facts.now);
  const { BACKUP_EVERY, BACKUP_TO } = want;
  if (!has && (!BACKUP_EVERY || want.K3S_DATASTORE_ENDPOINT)) return undefined;
  const wrong: string[] = [];
  const age = has?.made && now - has.made.at;
  const last = has?.made && age !== undefined ? `${ago(age)} old, ${has.made.name}` : "none yet";
  if (!has) wrong.push(`BACKUP_EVERY is ${BACKUP_EVERY}, and this server makes no backups by itself`);
  else if (!BACKUP_EVERY) wrong.push("it makes backups by itself, and BACKUP_EVERY is empty");
  else {
    const other = scheduleDiffers(want, has);
    if (!has.runs) wrong.push("its k3s-backup.timer does not run: it makes no backups by itself");
    if (other.length) wrong.push(`its backups go by other settings than these: ${other.join(", ")}`);
    else if (has.node && nodes.length && !nodes.some(({ name }) => name === has.node))
      wrong.push(`its backups go to ${has.node}, which is no node of the cluster: BACKUP_TO, ${BACKUP_TO}`);
  }
  const stale = has?.every && (age === undefined ? undefined : age > 2 * has.every + GRACE);
  if (has?.failed)
    wrong.push(
      `its backup failed ${ago(now - has.failed.at)} ago, the last good one is ${last}: ${has.failed.cause}`,
    );
  else if (stale) wrong.push(`its last good backup is ${last}: one is due every ${ago(has?.every ?? 0)}`);
  else if (has && !has.made && has.runs) wrong.push("it has made no backup by itself yet");
  const notes =
    has?.made?.revision === "unverified"
      ? ["its backups are not verified: it has neither sqlite3 nor Python, with SQLite, to read them by"]
      : [];
  return { wrong, notes, last, to: has?.to ?? BACKUP_TO };
}

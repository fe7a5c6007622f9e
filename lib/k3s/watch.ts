/** What looks after the cluster while nobody does: a timer on the server, its program, and what it tells and to whom. */
import type { Settings } from "../settings.ts";
import { raw, sh, writeFile } from "../sh.ts";
import { type Change, type Facts, type Printed, prints, Refusal, type Step, step } from "../step.ts";
import type { NOTIFY_FORMS, SettingName } from "../table.ts";
import { parseKeyValues, sha256 } from "../text.ts";
import { CERTIFICATE_FILES, DYNAMIC, PRESSING } from "./certificates.ts";
import { API, FRESH } from "./nodes.ts";
import { GRACE } from "./schedule.ts";
import { goesInside, nameLook, shownLook, WRITTEN_BY } from "./unit.ts";

type NotifyForm = (typeof NOTIFY_FORMS)[number];

const HOSTS: readonly [RegExp, NotifyForm][] = [
  [/^hooks\.slack(-gov)?\.com$/, "slack"],
  [/^oapi\.dingtalk\.com$/, "dingtalk"],
  [/^qyapi\.weixin\.qq\.com$/, "wecom"],
  [/^api\.telegram\.org$/, "telegram"],
  [/^ntfy\./, "ntfy"],
];

/** NOTIFY_FORM, or what the webhook's host takes. */
export function notifyForm({
  NOTIFY_URL,
  NOTIFY_FORM,
}: Pick<Settings, "NOTIFY_URL" | "NOTIFY_FORM">): string {
  const host = NOTIFY_URL && new URL(NOTIFY_URL).hostname;
  return NOTIFY_FORM || (HOSTS.find(([of]) => of.test(host))?.[1] ?? "json");
}

const PROGRAM = "/usr/local/sbin/k3s-watch";
const FOLDER = "/etc/rancher/k3s-watch";
/** A configuration of curl, 0600: the address holds a token at Slack, DingTalk and Telegram. */
const WEBHOOK = `${FOLDER}/webhook`;
const STATE = "/var/lib/k3s-watch";
const UNIT = (name: string) => `/etc/systemd/system/${name}`;
const [TIMER, SERVICE, SOCKET, ANSWER] = [
  "k3s-watch.timer",
  "k3s-watch.service",
  "k3s-watch-metrics.socket",
  "k3s-watch-metrics@.service",
].map(UNIT) as [string, string, string, string];

/** What `make remove` takes away: units with their program, and what else there is. */
export const WATCH_UNITS: Record<string, string> = {
  [TIMER]: PROGRAM,
  [SERVICE]: PROGRAM,
  [SOCKET]: PROGRAM,
};
export const WATCH_FILES = [FOLDER, STATE, ANSWER, "/run/k3s-watch"];

/** The TCP port of the metrics, at the server's address inside the tunnel alone; beside WireGuard's own, 51820 to 51822. */
const METRICS_PORT = 51823;

/** Percent in use, and MB left, from which the server's disk is reported; percent of its memory that are left. */
const DISK = { percent: 95, left: 500 };
const MEMORY = 5;

/** Functions of awk for times: none has them all on every box. */
const TIMES = `
function days(y, m, d) {
  y += 0; m += 0 # they may be strings
  if (m <= 2) { y--; m += 12 }
  return 365 * y + int(y / 4) - int(y / 100) + int(y / 400) + int((153 * (m - 3) + 2) / 5) + d - 719469
}
function iso(s,   z, era, doe, yoe, doy, mp, d, m, y) {
  z = int(s / 86400) + 719468; era = int(z / 146097); doe = z - era * 146097
  yoe = int((doe - int(doe / 1460) + int(doe / 36524) - int(doe / 146096)) / 365)
  doy = doe - (365 * yoe + int(yoe / 4) - int(yoe / 100)); mp = int((5 * doy + 2) / 153)
  d = doy - int((153 * mp + 2) / 5) + 1; m = mp < 10 ? mp + 3 : mp - 9; y = yoe + era * 400 + (m <= 2)
  return sprintf("%04d-%02d-%02dT%02d:%02d:%02dZ", y, m, d, int(s / 3600) % 24, int(s / 60) % 60, s % 60)
}`;

/**
 * Prints when each certificate ends, as \`C FILE SECONDS\`: a box may have no openssl. In a certificate's DER the two
 * dates are text, within its first 400 bytes.
 */
const ENDS = String.raw`
BEGIN {
  letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
  for (i = 1; i <= 64; i++) value[substr(letters, i, 1)] = i - 1
  for (i = 32; i < 127; i++) char[i] = sprintf("%c", i)
  char[10] = "\n"
}
function byte(n) { return n in char ? char[n] : " " }
function decoded(text, most,   i, n, bits, out) {
  n = length(text); if (n > most) n = most
  for (i = 1; i < n; i += 4) {
    bits = value[substr(text, i, 1)] * 262144 + value[substr(text, i + 1, 1)] * 4096 + value[substr(text, i + 2, 1)] * 64 + value[substr(text, i + 3, 1)]
    out = out byte(int(bits / 65536)) byte(int(bits / 256) % 256) byte(bits % 256)
  }
  return out
}
function ends(text,   run, dates, year) {
  text = decoded(text, 540)
  while (match(text, /[0-9]+Z/)) {
    run = substr(text, RSTART, RLENGTH); text = substr(text, RSTART + RLENGTH)
    if (length(run) != 13 && length(run) != 15 || ++dates < 2) continue
    if (length(run) == 13) run = (substr(run, 1, 2) < 50 ? "20" : "19") run
    return days(substr(run, 1, 4), substr(run, 5, 2), substr(run, 7, 2)) * 86400 + substr(run, 9, 2) * 3600 + substr(run, 11, 2) * 60 + substr(run, 13, 2)
  }
  return 0
}
function said(file, text,   end) { if (end = ends(text)) printf "C\t%s\t%.0f\n", file, end }
FNR == 1 { n = 0 }
/"tls.crt"/ {
  text = $0; sub(/.*"tls.crt": *"/, "", text); sub(/".*/, "", text); text = decoded(text, 4000)
  sub(/^[^\n]*-\n/, "", text); sub(/-.*/, "", text); gsub(/\n/, "", text); said(FILENAME, text)
}
/^-----BEGIN/ { n++; text = ""; next }
/^-----END/ { if (n == 1) said(FILENAME, text); n++ }
n == 1 { text = text $0 }`;

/** Nodes, as the API gives them with ?pretty=false, a line each: \`N NAME READY CIDR INTERNAL EXTERNAL MEMORY DISK PID\`. */
const NODE_LINES = String.raw`
function of(key, value) {
  if (!match($0, "\"" key "\": *\"[^\"]*")) return value
  value = substr($0, RSTART, RLENGTH); sub(/.*"/, "", value); gsub(/[^0-9A-Za-z.:\/+-]/, "?", value)
  return value
}
function done() { if (name != "") print "N", name, ready, cidr, internal, external, is["Memory"], is["Disk"], is["PID"] }
BEGIN { RS = "}"; OFS = "\t" }
/"metadata":."name":/ { done(); name = of("name"); cidr = internal = external = ready = "-"; is["Memory"] = is["Disk"] = is["PID"] = "-" }
{ cidr = of("podCIDR", cidr); type = of("type") }
type == "Ready" { ready = of("status") }
type == "InternalIP" && internal == "-" { internal = of("address") }
type == "ExternalIP" && external == "-" { external = of("address") }
type ~ /Pressure$/ { sub(/Pressure/, "", type); is[type] = of("status") }
END { done() }`;

/** What curl -v says of kubelets: \`K ADDRESS END-OF-ITS-CERTIFICATE\`, for those that answered. */
const KUBELETS = String.raw`
/expire date:/ {
  month = day = year = clock = end = 0
  for (i = 1; i <= NF; i++) {
    if ($i ~ /^[0-9]+:[0-9]+:[0-9]+$/) split($i, clock_of, ":")
    else if ($i ~ /^[0-9][0-9][0-9][0-9]$/) year = $i
    else if ($i ~ /^[0-9]+$/) day = $i
    else if ($i ~ /^[A-Z][a-z][a-z]$/ && index(" JanFebMarAprMayJunJulAugSepOctNovDec", $i)) month = (index("JanFebMarAprMayJunJulAugSepOctNovDec", $i) + 2) / 3
  }
  if (month && day && year) end = days(year, month, day) * 86400 + clock_of[1] * 3600 + clock_of[2] * 60 + clock_of[3]
}
/^> Host: / { sub(/:10250.*/, "", $3); printf "K\t%s\t%.0f\n", $3, end; end = 0 }`;

/**
 * Decides, from what was seen and the state before: what is wrong now, what is to be told, and the metrics. A problem is
 * told when two rounds running have seen it, and so is its end; what cannot be seen, since something else is in the way,
 * stays as it was.
 */
const DECIDE = String.raw`
BEGIN { FS = "\t" }
function clean(text) { gsub(/[^ -~]/, "?", text); return substr(text, 1, 200) }
function number(n) { return sprintf("%.0f", n) }
function span(s) { return s < 5400 ? number(s / 60) " min" : s < 172800 ? number(s / 3600) " h" : number(s / 86400) " days" }
function found(key, text) { if (!(key in words)) order[++found_n] = key; words[key] = clean(text) }
function line(text) { lines = lines "\t" text; print "<5>" text }
function ending(end,   left) {
  left = int((end - now) / 86400)
  return end < now ? "ended on " substr(iso(end), 1, 10) : "end on " substr(iso(end), 1, 10) ", in " left " day" (left == 1 ? "" : "s")
}
function metric(name, type, help) { current = "k3s_watch_" name; printf "# HELP %s %s\n# TYPE %s %s\n", current, help, current, type >prom }
function value(n, label) { print current (label == "" ? "" : "{" label "}") " " n >prom }
function of_node(name) { return "node=\"" name "\"" }
# Can this not be seen now?
function unseen(key,   part) {
  if (key in hidden) return 1
  split(key, part, " ")
  return !up && key != "api" && part[2] != "" && part[2] != node
}
$1 == "T" { now = $2 }
$1 == "A" { up = $2; silence = $3 }
$1 == "N" { names[++nodes] = $2; ready[$2] = $3; cidr[$2] = $4; ip[$2] = inside != "" && $5 != "-" || $6 == "-" ? $5 : $6; memory[$2] = $7; disk[$2] = $8; pids[$2] = $9 }
$1 == "P" { n = split($2, nets, ","); for (i = 1; i <= n; i++) { peer[nets[i]]; shaken[nets[i]] = $3; received[nets[i]] = $4; sent[nets[i]] = $5 } }
$1 == "K" { reached[$2]; if ($3 > 0) kubelet_end[$2] = $3 }
$1 == "C" && $2 ~ /-ca[.]crt$/ { if (!ca_end || $3 < ca_end) ca_end = $3; next }
$1 == "C" { if (!own_end || $3 < own_end) own_end = $3 }
$1 == "D" { mounts[++mounts_n] = $2; size[$2] = $3; used[$2] = $4; left[$2] = $5 }
$1 == "M" { memory_all = $2; memory_left = $3 }
$1 == "B" { made = $2; every = $3; failed = $4; cause = $5 }
$1 == "x" { before[$2] = $3 }
$1 == "p" { key = $2; olds[++olds_n] = key; since[key] = $3; seen[key] = $4; told[key] = $5; missed[key] = $6; text[key] = $7 }
$1 == "m" { waiting[++waiting_n] = $0 }
$1 == "w" { failing = $0 }
END {
  if (own_end && own_end < now) hidden["api"]
  else if (!up) found("api", "the API on " node " does not answer: " silence)
  for (i = 1; i <= nodes; i++) {
    name = names[i]; at = ip[name]; net = cidr[name]; inner = net; sub(/\/.*/, "", inner)
    if (at in kubelet_end) node_end[name] = kubelet_end[at]
    else if (name != node) hidden["certificate " name]
    if (name == node && own_end) node_end[name] = own_end
    stale = name != node && !(net in peer && shaken[net] > now - ${FRESH})
    if (ready[name] != "True") {
      hidden["tunnel " name]; hidden["kubelet " name]; hidden["memory " name]; hidden["disk " name]; hidden["pids " name]
      if (name in node_end && node_end[name] < now) hidden["node " name]
      else found("node " name, "node " name " is not Ready" (ready[name] == "Unknown" ? ": nothing is heard of its kubelet" : ""))
      continue
    }
    if (memory[name] == "True") found("memory " name, "node " name " is short of memory (MemoryPressure)")
    if (disk[name] == "True") found("disk " name, "node " name " is short of disk space (DiskPressure)")
    if (pids[name] == "True") found("pids " name, "node " name " has too many processes (PIDPressure)")
    if (stale)
      found("tunnel " name, "WireGuard has had no handshake with " name (shaken[net] > 0 ? " for " span(now - shaken[net]) : " yet") ": is 51820/udp open at both ends?")
    if (!(at in reached)) {
      # A tunnel that has just been lost shows by what it no longer receives, before its handshake is old.
      if (at == inner && (stale || before[name] == received[net])) hidden["kubelet " name]
      else found("kubelet " name, "the kubelet of " name " does not answer at " at ":10250")
    }
  }
  if (!up && own_end) node_end[node] = own_end
  for (name in node_end)
    if (node_end[name] - now <= ${PRESSING} * 86400)
      found("certificate " name, "the certificates of " name " " ending(node_end[name]) ": make certs")
  if (ca_end && ca_end - now <= ${PRESSING} * 86400) found("ca", "the CA certificates of the cluster " ending(ca_end) ", and no restart renews them")
  for (i = 1; i <= mounts_n; i++) {
    at = mounts[i]; percent = size[at] ? int(100 * used[at] / (used[at] + left[at]) + 0.999) : 0
    if (size[at] && (percent >= ${DISK.percent} || left[at] < ${DISK.left} * 1024))
      found("room " node " " at, "the disk of " node " is full: " at " " percent " % in use, " number(left[at] / 1024) " MB left")
  }
  if (memory_all && memory_left < memory_all * ${MEMORY} / 100)
    found("free " node, node " has " number(100 * memory_left / memory_all) " % of its memory left")
  if (failed) found("backup", "the backup failed at " iso(failed) ": " cause)
  else if (every && made && now - made > 2 * every + ${GRACE}) found("backup", "the last backup is of " iso(made) ", " span(now - made) " ago")

  for (i = 1; i <= found_n; i++) {
    key = order[i]
    if (unseen(key)) continue
    if (!(key in since)) { since[key] = now; seen[key] = 0; told[key] = 0; text[key] = words[key]; olds[++olds_n] = key }
    missed[key] = 0; here[key]; text[key] = words[key]
    if (++seen[key] > 2) seen[key] = 2
    if (seen[key] == 2 && !told[key]) { line("PROBLEM: " words[key]); told[key] = now; event = "problem"; new[key] }
  }
  for (i = 1; i <= olds_n; i++) {
    key = olds[i]
    if (key in here) continue
    if (!told[key]) { delete since[key]; continue }
    if (unseen(key)) continue
    if (++missed[key] < 2) continue
    line("RESOLVED after " span(now - since[key]) ": " text[key])
    if (event == "") event = "resolved"
    delete since[key]
  }
  for (i = 1; i <= olds_n; i++) if (olds[i] in since && told[olds[i]] && now - told[olds[i]] >= 86370 && !waiting_n) daily = 1
  for (i = 1; i <= olds_n && daily; i++) {
    key = olds[i]
    if (!(key in since) || !told[key] || key in new) continue
    line("STILL, after " span(now - since[key]) ": " text[key])
    if (event == "") event = "still"
    told[key] = now
  }

  for (i = 1; i <= olds_n; i++) {
    key = olds[i]
    if (key in since) printf "p\t%s\t%s\t%d\t%s\t%d\t%s\n", key, since[key], seen[key], told[key], missed[key], text[key] >state
  }
  for (i = waiting_n > 100 ? waiting_n - 99 : 1; i <= waiting_n; i++) print waiting[i] >state
  if (event != "") print "m\t" now "\t" event lines >state
  if (failing != "") print failing >state
  printf "" >state
  for (i = 1; i <= nodes; i++) if (cidr[names[i]] in peer) print "x\t" names[i] "\t" received[cidr[names[i]]] >last
  printf "" >last

  metric("last_round_timestamp_seconds", "gauge", "When the watch looked last."); value(now)
  metric("api_up", "gauge", "Whether the API answered."); value(up ? 1 : 0)
  if (nodes) {
    metric("node_ready", "gauge", "Whether the node is Ready.")
    for (i = 1; i <= nodes; i++) value(ready[names[i]] == "True" ? 1 : 0, of_node(names[i]))
    metric("node_pressure", "gauge", "Whether the node is short of memory, disk space or process ids.")
    for (i = 1; i <= nodes; i++) {
      name = names[i]
      value(memory[name] == "True" ? 1 : 0, of_node(name) ",of=\"memory\"")
      value(disk[name] == "True" ? 1 : 0, of_node(name) ",of=\"disk\"")
      value(pids[name] == "True" ? 1 : 0, of_node(name) ",of=\"pids\"")
    }
    metric("kubelet_up", "gauge", "Whether the kubelet answers at its port 10250.")
    for (i = 1; i <= nodes; i++) value(ip[names[i]] in reached ? 1 : 0, of_node(names[i]))
    metric("handshake_timestamp_seconds", "gauge", "When the last WireGuard handshake with the node was; 0: never.")
    for (i = 1; i <= nodes; i++) if (cidr[names[i]] in peer) value(shaken[cidr[names[i]]], of_node(names[i]))
    metric("tunnel_receive_bytes_total", "counter", "Bytes received from the node through WireGuard.")
    for (i = 1; i <= nodes; i++) if (cidr[names[i]] in peer) value(received[cidr[names[i]]], of_node(names[i]))
    metric("tunnel_transmit_bytes_total", "counter", "Bytes sent to the node through WireGuard.")
    for (i = 1; i <= nodes; i++) if (cidr[names[i]] in peer) value(sent[cidr[names[i]]], of_node(names[i]))
  }
  metric("certificate_end_timestamp_seconds", "gauge", "When the first of the certificates of the node ends.")
  for (name in node_end) value(node_end[name], of_node(name))
  if (ca_end) { metric("ca_end_timestamp_seconds", "gauge", "When the first CA certificate of the cluster ends."); value(ca_end) }
  metric("disk_size_bytes", "gauge", "Size of a disk of the server.")
  for (i = 1; i <= mounts_n; i++) value(number(size[mounts[i]] * 1024), "path=\"" mounts[i] "\"")
  metric("disk_available_bytes", "gauge", "What is left of it.")
  for (i = 1; i <= mounts_n; i++) value(number(left[mounts[i]] * 1024), "path=\"" mounts[i] "\"")
  metric("memory_bytes", "gauge", "Memory of the server."); value(number(memory_all * 1024))
  metric("memory_available_bytes", "gauge", "What is left of it."); value(number(memory_left * 1024))
  if (made) { metric("backup_timestamp_seconds", "gauge", "When the last good backup was made."); value(made) }
  if (made || failed) { metric("backup_failed", "gauge", "Whether a backup has failed since."); value(failed ? 1 : 0) }
  metric("messages_waiting", "gauge", "Messages that the webhook has not taken yet."); value(waiting_n + (event != ""))
  metric("problems", "gauge", "Problems that were seen in two rounds running."); n = 0
  for (i = 1; i <= olds_n; i++) if (olds[i] in since && told[olds[i]]) n++
  value(n)
  if (n) {
    metric("problem", "gauge", "One for each of these problems.")
    for (i = 1; i <= olds_n; i++) if (olds[i] in since && told[olds[i]]) value(1, "what=\"" olds[i] "\"")
  }
}`;

/** Shapes a message, \`m TIME EVENT LINE …\`, for the webhook. */
const PAYLOAD = String.raw`
BEGIN { FS = "\t" }
function json(text,   i, c, out) {
  for (i = 1; i <= length(text); i++) {
    c = substr(text, i, 1)
    out = out (c == "\\" ? "\\\\" : c == "\"" ? "\\\"" : c == "\n" ? "\\n" : c)
  }
  return "\"" out "\""
}
function slack(text,   i, c, out) {
  for (i = 1; i <= length(text); i++) {
    c = substr(text, i, 1)
    out = out (c == "&" ? "&" "amp;" : c == "<" ? "&" "lt;" : c == ">" ? "&" "gt;" : c)
  }
  return out
}
{
  title = "k3s on " node
  # WeCom takes 2048 bytes.
  for (i = 4; i <= NF; i++) {
    if (length(body) + length($i) > 1700) { body = body "\n... and " (NF - i + 1) " more"; break }
    body = body (i > 4 ? "\n" : "") $i
    list = list (i > 4 ? "," : "") json($i)
  }
  text = title ":" (NF > 4 ? "\n" : " ") body
  if (form == "ntfy") printf "%s", body
  else if (form == "slack") printf "{\"text\":%s}", json(slack(text))
  else if (form == "telegram") printf "{\"text\":%s}", json(text)
  else if (form == "dingtalk" || form == "wecom") printf "{\"msgtype\":\"text\",\"text\":{\"content\":%s}}", json(text)
  else printf "{\"event\":%s,\"node\":%s,\"time\":%s,\"text\":%s,\"lines\":[%s]}", json($3), json(node), json(iso($2)), json(text), list
}`;

/** What of the settings is in the program. */
interface Watched {
  /** The server's node. */
  node: string;
  /** Kubelets are reached inside the tunnel. */
  inside: boolean;
  /** The beginning of addresses of pods and of nodes inside the tunnel. */
  pods: string;
}

/** The program. Without an argument it is a round; \`test FILE\` sends a message; \`answer\` is a connection for the metrics. */
export const watchText = ({ node, inside, pods }: Watched): string => sh`#!/bin/sh
${raw(WRITTEN_BY)}
export LC_ALL=C PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# A test in a session is to be as a round of the timer's.
unset http_proxy https_proxy all_proxy no_proxy HTTPS_PROXY ALL_PROXY NO_PROXY
node=${node}
run=/run/k3s-watch
tab=$(printf '\t')

if [ "$1" = answer ]; then
  case \${REMOTE_ADDR:-${raw(pods)}} in ${raw(pods)}*) ;; *) exit ;; esac
  [ -n "$2" ] || exec timeout 10 "$0" answer now
  read -r method path _ || exit
  while read -r header && [ -n "\${header%?}" ]; do :; done
  case $method,$path in GET,/metrics | GET,/) status='200 OK'; body=$run/k3s.prom ;; *) status='404 Not Found'; body= ;; esac
  [ -r "$body" ] || body=/dev/null
  printf 'HTTP/1.1 %s\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: %s\r\nConnection: close\r\n\r\n' "$status" "$(($(wc -c <"$body")))"
  exec cat "$body"
fi

webhook=${WEBHOOK}
work=$run/work
[ "$1" != test ] || { webhook=$2; work=$run/test; }
umask 077
rm -rf "$work"
mkdir -p "$work" || exit
chmod 755 $run
trap 'rm -rf "$work"' EXIT

# Sends the message in $1; why not, in $cause.
tell() {
  form=$(sed -n 's/^# form=//p' "$webhook")
  message=$1
  printf '%s\n' "$message" | awk -v node="$node" -v form="$form" ${TIMES + PAYLOAD} >"$work/body"
  set -- -H 'Content-Type: application/json'
  [ "$form" != ntfy ] || case $message in
    *"$tab"problem"$tab"* | *"$tab"still"$tab"*) set -- -H "Title: k3s on $node" -H 'Priority: high' -H 'Tags: warning' ;;
    *) set -- -H "Title: k3s on $node" -H 'Tags: white_check_mark' ;;
  esac
  said=$({ curl -q -s -m 10 -K "$webhook" "$@" -H 'Expect:' --data-binary @"$work/body" -w '\n%{http_code}' 2>/dev/null; echo " $?"; } | head -c 65536)
  code=\${said##*
}
  status=\${code#* }
  code=\${code% *}
  case $status in
    0) ;;
    6) cause='its name is not known (DNS)'; return 1 ;;
    7) cause='it refuses connections'; return 1 ;;
    28) cause='it did not answer in 10 s'; return 1 ;;
    35 | 51 | 60) cause='its TLS certificate or protocol is refused'; return 1 ;;
    [0-9] | [0-9][0-9]) cause="curl ended with $status"; return 1 ;;
    *) cause='its answer is too long'; return 1 ;;
  esac
  case $code in 2??) ;; *) cause="it answers with HTTP $code"; return 1 ;; esac
  case $form in
    dingtalk | wecom)
      error=$(printf %s "$said" | sed -n 's/.*"errcode" *: *\(-\{0,1\}[0-9]*\).*/\1/p')
      [ "$error" = 0 ] || { cause="it answers with errcode \${error:-none}"; return 1; } ;;
    telegram) case $said in *'"ok":true'*) ;; *) cause='its answer is not ok'; return 1 ;; esac ;;
  esac
}

if [ "$1" = test ]; then
  tell "m$tab$(date +%s)\${tab}test\${tab}TEST: problems of this cluster are told here, and when they are resolved" && exit
  echo "The webhook does not take a message: $cause"
  exit 1
fi

${raw(API)}
facts=$work/facts
{
  printf 'T\t%s\n' "$(date +%s)"
  if api GET '/api/v1/nodes?pretty=false' 10 >"$work/list" 2>"$work/silence" && grep -q '"items"' "$work/list"; then
    printf 'A\t1\n'
  else
    printf 'A\t0\t%s; k3s is %s\n' "$(tr '\n\t' '  ' <"$work/silence" | sed 's/ *$//' | tail -c 160)" "$(systemctl is-active k3s 2>/dev/null)"
    : >"$work/list"
  fi
  awk ${NODE_LINES} "$work/list" | tee "$work/nodes"
  for i in flannel.1 flannel-wg; do
    [ ! -e /sys/class/net/$i ] || wg show $i dump 2>/dev/null | awk -F '\t' -v OFS='\t' 'NR > 1 { print "P", $4, $5, $6, $7 }'
  done
  awk -F '\t' -v inside=${inside ? "yes" : ""} -v work="$work" '{
    ip = (inside != "" && $5 != "-" || $6 == "-") ? $5 : $6
    if (ip ~ /^[0-9.]+$/) printf "url = \"https://%s:10250/healthz\"\noutput = \"/dev/null\"\n", ip >(work "/lane" n++ % 8)
  }' "$work/nodes"
  for lane in "$work"/lane?; do
    [ ! -e "$lane" ] || curl -q -k -s -v --noproxy '*' --connect-timeout 3 -m 5 -K "$lane" 2>"$lane.said" &
  done
  wait
  cat "$work"/lane?.said 2>/dev/null | tr -d '\r' | awk ${TIMES + KUBELETS}
  set --
  for file in ${[...CERTIFICATE_FILES.map((file) => `/var/lib/rancher/k3s/${file}`), DYNAMIC]}; do [ ! -s "$file" ] || set -- "$@" "$file"; done
  [ $# = 0 ] || awk ${TIMES + ENDS} "$@"
  df -Pk /var/lib/rancher / 2>/dev/null | awk 'NR > 1 && !seen[$NF]++ { printf "D\t%s\t%s\t%s\t%s\n", NR == 2 ? "/var/lib/rancher" : "/", $(NF - 4), $(NF - 3), $(NF - 2) }'
  awk '{ of[$1] = $2 } END { if ("MemAvailable:" in of) printf "M\t%s\t%s\n", of["MemTotal:"], of["MemAvailable:"] }' /proc/meminfo
  [ ! -e /var/lib/k3s-backup/state ] || awk -v every="$(sed -n 's/^every=//p' /etc/rancher/k3s-backup/settings 2>/dev/null)" '
    sub(/^made=/, "") { made = $1 }
    sub(/^failed=/, "") { failed = $1; sub(/^[^ ]* */, ""); gsub(/\t/, " "); cause = $0 }
    END { printf "B\t%s\t%s\t%s\t%s\n", made, every + 0, failed, cause }' /var/lib/k3s-backup/state
  # What is in memory is newer: a full disk keeps nothing.
  [ -e $run/state ] || { [ -e ${STATE}/state ] && cp ${STATE}/state $run/state; }
  cat $run/state $run/last 2>/dev/null
} >"$facts"
awk -v node="$node" -v inside=${inside ? "yes" : ""} -v state="$work/state" -v last="$work/last" -v prom="$work/prom" ${TIMES + DECIDE} "$facts" >"$work/said" || {
  echo '<4>the round failed'
  exit 1
}
if [ -s "$webhook" ]; then cat "$work/said"; else sed 's/$/ (no NOTIFY_URL)/' "$work/said"; fi

# Keeps the state in $1: in memory, and on disk if it has changed.
keep() {
  if cmp -s "$1" $run/state && [ -e ${STATE}/state ]; then rm -f "$1"; return; fi
  mv -f "$1" $run/state
  { mkdir -p ${STATE} && cp $run/state ${STATE}/state.new && mv -f ${STATE}/state.new ${STATE}/state; } 2>/dev/null || rm -f ${STATE}/state.new
}
mv -f "$work/last" $run/last
chmod 644 "$work/prom"
mv -f "$work/prom" $run/k3s.prom
[ -s "$webhook" ] || { grep -v '^[mw]' "$work/state" >"$work/state.only"; mv -f "$work/state.only" "$work/state"; }
keep "$work/state"
(umask 022; mkdir -p ${STATE}; chmod 755 ${STATE}; cp $run/k3s.prom ${STATE}/k3s.prom.new && mv -f ${STATE}/k3s.prom.new ${STATE}/k3s.prom) 2>/dev/null || rm -f ${STATE}/k3s.prom.new

[ -s "$webhook" ] || exit 0
# DingTalk takes 20 messages a minute.
for _ in 1 2 3 4 5 6 7 8 9 10; do
  message=$(sed -n "/^m$tab/{p;q;}" $run/state)
  [ -n "$message" ] || break
  if tell "$message"; then
    awk -v now="$(date +%s)" '/^w\t/ { next } /^m\t/ && !done { done = 1; next } { print }' $run/state >"$work/state"
    ! grep -q "^w$tab" $run/state || echo '<5>the webhook takes messages again'
    keep "$work/state"
    continue
  fi
  if ! grep -q "^w$tab" $run/state; then
    echo "<4>the webhook does not take a message: $cause; it is kept, and tried each minute"
    { cat $run/state; printf 'w\t%s\t%s\n' "$(date +%s)" "$cause"; } >"$work/state"
    keep "$work/state"
  fi
  break
done
exit 0
`;

const SERVICE_TEXT = `${WRITTEN_BY}
[Unit]
Description=A look after this k3s cluster, each minute

[Service]
Type=oneshot
ExecStart=${PROGRAM}
TimeoutStartSec=150
StartLimitInterval=0
# Without systemd's own lines, eight a minute.
LogLevelMax=notice
`;

const TIMER_TEXT = `${WRITTEN_BY}
[Unit]
Description=A look after this k3s cluster, each minute

[Timer]
OnCalendar=*-*-* *:*:00
AccuracySec=5s

[Install]
WantedBy=timers.target
`;

/** flannel may come up later, so the address need not be there. systemd 219 knows no IPAddressAllow: the program looks too. */
const socketText = (address: string, network: string): string => `${WRITTEN_BY}
[Unit]
Description=Metrics of the watch over this k3s cluster, inside it

[Socket]
ListenStream=${address}:${METRICS_PORT}
FreeBind=yes
Accept=yes
MaxConnections=16
IPAddressDeny=any
IPAddressAllow=${network}

[Install]
WantedBy=sockets.target
`;

const ANSWER_TEXT = `${WRITTEN_BY}
[Unit]
Description=A connection for the metrics of the watch over this k3s cluster

[Service]
ExecStart=-${PROGRAM} answer
User=daemon
StandardInput=socket
StandardError=null
LogLevelMax=notice
`;

/** Each value once with its name, for what is written, and once as it is, for its hash. */
function webhookText(want: Settings, value: (name: SettingName) => string): string {
  const proxy = want.NOTIFY_URL.startsWith("https:") ? "HTTPS_PROXY" : "HTTP_PROXY";
  return [
    `# form=${notifyForm(want)}`,
    "globoff",
    `url = "${value("NOTIFY_URL")}"`,
    ...(want[proxy] ? [`proxy = "${value(proxy)}"`] : []),
    ...(want[proxy] && want.NO_PROXY ? [`noproxy = "${want.NO_PROXY}"`] : []),
    "",
  ].join("\n");
}

const SECRETS = ["NOTIFY_URL", "HTTPS_PROXY", "HTTP_PROXY"] as const;

/** Facts about the watch: its files, never the webhook itself; its units; what it last said. */
export const watchLook = prints("watch watch-webhook watch-units watch-last subnet")(sh`fact watch
cat ${[PROGRAM, SERVICE, TIMER, SOCKET, ANSWER]} 2>/dev/null
fact watch-webhook; sha256sum <${WEBHOOK} 2>/dev/null | cut -d' ' -f1
fact watch-units; [ ! -e ${PROGRAM} ] || systemctl show k3s-watch.timer k3s-watch-metrics.socket k3s-watch.service -p Id -p ActiveState -p UnitFileState -p Result 2>/dev/null
fact watch-last; [ ! -e ${PROGRAM} ] || { sed -n 's/^k3s_watch_last_round_timestamp_seconds /round /p' /run/k3s-watch/k3s.prom
sed -n 's/^w\t/webhook /p' /run/k3s-watch/state; } 2>/dev/null
fact subnet; cat /run/flannel/subnet.env 2>/dev/null
`);

type WatchFact = Printed<typeof watchLook>;

/** The server's address inside the tunnel and the network of pods, as flannel has them. */
function flannelIn(facts: Facts<"subnet">) {
  const [, network] = /^FLANNEL_NETWORK=([\d.]+\/\d+)$/m.exec(facts.subnet ?? "") ?? [];
  const [, subnet] = /^FLANNEL_SUBNET=(\d+\.\d+\.\d+)\.1\/\d+$/m.exec(facts.subnet ?? "") ?? [];
  return network && subnet ? { network, address: `${subnet}.0` } : undefined;
}

/** The files that a watch of these settings has, program first; undefined while flannel has no network. */
function filesOf(want: Settings, facts: Facts<"named" | "subnet">) {
  const flannel = flannelIn(facts);
  if (!flannel) return undefined;
  const [ip = "", bits] = flannel.network.split("/");
  const pods = `${ip
    .split(".")
    .slice(0, Math.floor(Number(bits) / 8))
    .join(".")}.`;
  const node = facts.named?.trim() || (facts.hostname?.trim() ?? "").toLowerCase();
  return [
    [PROGRAM, watchText({ node, inside: goesInside(want), pods })],
    [SERVICE, SERVICE_TEXT],
    [TIMER, TIMER_TEXT],
    [SOCKET, socketText(flannel.address, flannel.network)],
    [ANSWER, ANSWER_TEXT],
  ] as const;
}

/** systemd's properties of the watch's units, by the unit's name. */
const unitsIn = (facts: Facts<"watch-units">): Record<string, Record<string, string>> =>
  Object.fromEntries(
    (facts["watch-units"] ?? "").split(/\n\n+/).map((text) => {
      const of = parseKeyValues(text);
      return [of.Id ?? "", of];
    }),
  );

/** Shell that takes the watch away. */
export const CLEAR_WATCH = sh`systemctl disable --now k3s-watch.timer k3s-watch-metrics.socket >/dev/null 2>&1 || :
systemctl stop k3s-watch.service 2>/dev/null || :
rm -rf ${[PROGRAM, TIMER, SERVICE, SOCKET, ...WATCH_FILES]}
systemctl daemon-reload
systemctl reset-failed k3s-watch.service 2>/dev/null || :`;

const RUNS = ["k3s-watch.timer", "k3s-watch-metrics.socket"];
const running = (facts: Facts<"watch-units">): boolean =>
  RUNS.every((name) => {
    const unit = unitsIn(facts)[name];
    return unit?.ActiveState === "active" && unit.UnitFileState === "enabled";
  });

/** A watch on the server; without, once `allowed` has "remove". */
export const watchStep = step({
  name: "watch",
  options: [
    "SERVER",
    "PUBLIC_IP",
    "NOTIFY_URL",
    "NOTIFY_FORM",
    "TUNNEL_KUBELETS",
    "SERVER_ARGS",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
  ],
  look: () => [shownLook, nameLook, watchLook],
  plan(want, facts): Change[] {
    const had = facts.watch?.trim();
    if (want.allowed?.has("remove"))
      return had || facts["watch-webhook"]?.trim() ? [{ why: "remove the watch", sh: CLEAR_WATCH }] : [];
    if (had && !had.split("\n").slice(0, 2).includes(WRITTEN_BY))
      throw new Refusal(`${PROGRAM} on this box was not written by this project: give it another name`);
    const files =
      /^ActiveState=active$/m.test((facts.processes ?? "").split("\n\n")[0] ?? "") && filesOf(want, facts);
    if (!files) throw new Refusal("No k3s server runs on this box: make check says what is wrong");
    const written = files.map(([, text]) => text).join("");
    const hook = want.NOTIFY_URL ? sha256(webhookText(want, (name) => want[name])) : "";
    const same = (facts["watch-webhook"]?.trim() ?? "") === hook;
    if (facts.watch === written && same && running(facts)) return [];
    const told = !same && hook;
    return [
      {
        why: `${had ? "bring the watch up to date" : "set up the watch, which looks after the cluster each minute"}${told ? `; send a test message (${notifyForm(want)})` : hook || same ? "" : "; it tells nobody any more (NOTIFY_URL is empty)"}`,
        sh: [
          "# shellcheck disable=SC2016 # what is written is a script",
          ...files.map(([path, text]) => `{\n${writeFile(path, text, path === PROGRAM ? "755" : "644")}\n}`),
          sh`install -d -m 700 ${FOLDER}`,
          hook
            ? same
              ? ""
              : sh`${raw(
                  writeFile(
                    `${WEBHOOK}.new`,
                    webhookText(want, (name) => `@${name}@`),
                    "600",
                    SECRETS,
                  ),
                )}
${PROGRAM} test ${`${WEBHOOK}.new`} || { rm -f ${`${WEBHOOK}.new`}; exit 1; }
mv -f ${`${WEBHOOK}.new`} ${WEBHOOK}`
            : sh`rm -f ${WEBHOOK}`,
          sh`systemctl daemon-reload
systemctl enable ${RUNS} >/dev/null 2>&1
systemctl restart ${RUNS}
systemctl start k3s-watch.service || { journalctl -u k3s-watch -o cat --no-pager -n 5; exit 1; }`,
        ]
          .filter(Boolean)
          .join("\n"),
        seconds: 240,
        secrets: told
          ? SECRETS.filter((name) => webhookText(want, (of) => `@${of}@`).includes(`@${name}@`))
          : [],
      },
    ];
  },
} satisfies Step<WatchFact | "processes" | "named">);

/** The watch on a server, as check sees it: what is wrong with it, and else what differs from the settings. */
export interface WatchSeen {
  fault?: string;
  note?: string;
}

/** The watch that a server has, or lacks although NOTIFY_URL is set. */
export function watchIn(want: Settings, facts: Facts<WatchFact | "named">): WatchSeen | undefined {
  if (!facts.watch?.trim())
    return want.NOTIFY_URL ? { note: "NOTIFY_URL is set, but nothing watches: make watch" } : undefined;
  const units = unitsIn(facts);
  const down = RUNS.find(
    (name) => units[name]?.ActiveState !== "active" || units[name]?.UnitFileState !== "enabled",
  );
  const { ActiveState: state, UnitFileState: enabled } = units[down ?? ""] ?? {};
  const result = units["k3s-watch.service"]?.Result ?? "success";
  const last = facts["watch-last"] ?? "";
  const age = Number(facts.now) - Number(/^round (\d+)$/m.exec(last)?.[1] ?? 0);
  const [, since, why] = /^webhook (\d{1,11})\t([ -~]{1,200})$/m.exec(last) ?? [];
  const fault = down
    ? `its watch does not run (systemd: ${down} is ${state || "gone"}, ${enabled || "gone"})`
    : result !== "success"
      ? `the last round of its watch has failed (systemd: ${result}): journalctl -u k3s-watch on it`
      : age > LATE
        ? "its watch has not looked for five minutes: journalctl -u k3s-watch on it"
        : since &&
          `its watch cannot tell the webhook since ${dateTimeOf(Number(since))}: ${why}; its messages wait`;
  if (fault) return { fault };
  const hook = want.NOTIFY_URL ? sha256(webhookText(want, (name) => want[name])) : "";
  if ((facts["watch-webhook"]?.trim() ?? "") !== hook)
    return {
      note: `its watch ${facts["watch-webhook"]?.trim() ? "tells another webhook than" : "does not know"} NOTIFY_URL, NOTIFY_FORM or the proxy of the env file: make watch`,
    };
  const written = filesOf(want, facts)
    ?.map(([, text]) => text)
    .join("");
  return written && facts.watch !== written
    ? { note: "its watch is not as this version and these settings have it: make watch" }
    : {};
}

/** Seconds without a round from which a watch counts as stuck. */
const LATE = 300;
const dateTimeOf = (seconds: number) =>
  new Date(seconds * 1000)
    .toISOString()
    .replace(/:\d+\.\d+Z/, " UTC")
    .replace("T", " ");

/** The shell scripts that are sent to a box, and the parser for their output. */
import { randomBytes } from "node:crypto";
import type { Settings } from "./settings.ts";
import { bare, raw, sh, type Word } from "./sh.ts";
import { type Change, type Facts, Failure, type Step } from "./step.ts";
import type { SettingName } from "./table.ts";

/**
 * Facts that every step may use. uptime is read before now, so that the boot time computed from them is never too
 * early.
 */
const BASE = `
fact uptime; read -r up _ </proc/uptime; echo "$up"
fact now; now=$(date +%s.%N); echo "$now"; now=\${now%.*}
fact boot; text /proc/sys/kernel/random/boot_id
fact machine; text /etc/machine-id
uname=$(uname -nrm)
fact arch; echo "\${uname##* }"; uname=\${uname% *}
fact kernel; echo "\${uname##* }"
fact hostname; echo "\${uname% *}"
fact os; text /etc/os-release
fact systemd; test -d /run/systemd/system && echo yes
fact addresses; ip -o -4 addr show 2>/dev/null
`;

/** A box's IPv4 addresses, each with its interface and the bits of its network, by the fact `addresses` (ip -o -4 addr). */
export const cardsOf = ({ addresses = "" }: Facts<string>): { card: string; ip: string; bits: number }[] =>
  [...addresses.matchAll(/^\d+: +(\S+) +inet ([\d.]+)(?: peer [\d.]+)?(?:\/(\d+))?/gm)].map(
    ([, card = "", ip = "", bits = "32"]) => ({ card, ip, bits: Number(bits) }),
  );

/** The mark is random, so that no file's content can contain it. */
export const newMark = () => `k3s-across-clouds-${randomBytes(8).toString("hex")}`;

/**
 * What looks may use: `fact NAME`; `text FILE` and `digest FILE`, which print a file and its SHA-256. To start a program
 * costs more than most of what a look asks for (1 ms of CPU; issue 14), so what the shell can do itself it does.
 */
export const HELPERS = sh`fact() { printf '\n%s fact %s\n' "$m" "$1"; }
text() { [ ! -f "$1" ] || while IFS= read -r row || [ -n "$row" ]; do printf '%s\n' "$row"; done 2>/dev/null <"$1"; }
digest() { [ ! -s "$1" ] || { row=$(sha256sum <"$1") && echo "\${row%% *}"; }; }
`;

/**
 * The script that prints the facts of all steps in one trip. It never fails; missing facts are left out. sed gathers what
 * would leave as a packet a line.
 */
export function lookScript(steps: readonly Step[], want: Settings, mark: string): string {
  const looks = [...new Set(steps.flatMap((step) => step.look(want)))].join("\n");
  return sh`m=${mark}
${raw(HELPERS)}{ ${raw(BASE)}${raw(bare(looks))}
printf '\n%s end\n' "$m"; } | sed ''`;
}

/** Text for a shell comment: on one line, without control characters. */
const oneLine = (text: string) => text.replace(/[\s\p{C}\p{Zl}\p{Zp}]+/gu, " ");

/** How long an earlier run may continue on a box after its operator was lost, in seconds. */
export const EARLIER_RUN = 900;

/**
 * The script that applies changes. Each runs in its own shell under `timeout`, with both output streams in order; the
 * first failure ends it. A lock keeps out a second operator and an earlier run that lost its connection: after waiting
 * for the lock the plan is out of date, and nothing is applied. It is held until the script ends, so that the look that
 * follows shows this run's changes and not another's. It names the process of this run's subshell: $$ is the shell that
 * it stems from.
 *
 * A package manager must not die of a connection that was cut: `relay` still reads its output then. A wait's it does not.
 */
export function applyScript(
  changes: readonly Change[],
  mark: string,
  secrets: (name: SettingName) => Word,
  reader: "program" | "person" = "program",
): string {
  // An early fact may be a secret, so a person does not get it.
  const asides =
    reader === "person"
      ? "early() { :; }\nbeat() { :; }"
      : sh`early() { printf '%s early %s %s\n' ${mark} "$1" "$2"; }
beat() { printf '%s beat\n' ${mark}; }`;
  const body = changes.map((change, i) => {
    const given = (change.secrets ?? []).map((name) => sh`${name}=${secrets(name)}`);
    return sh`${raw(reader === "person" ? `# ${oneLine(change.why)}\n` : "")}change ${i} ${change.seconds ?? 60} <<'${mark}'
main() {
set -eu
say() { printf '%s say %s\n' ${mark} "$*"; }
${raw(asides)}
${raw([...given, change.sh].join("\n"))}
}
main </dev/null
${mark}`;
  });
  return sh`lock=/run/k3s-across-clouds.lock; waited=
exec 9>>$lock
flock -n 9 || {
  waited=yes
  printf '\n%s say waits for an earlier run, process %s here\n' ${mark} "$(cat $lock)"
  flock -w ${EARLIER_RUN} 9 || { printf '\n%s busy %s\n' ${mark} "$(cat $lock)"; exit 1; }
  printf '\n%s waited\n' ${mark}
}
read -r self _ </proc/self/stat
echo "$self" >$lock
relay() {
  trap '' PIPE
  while IFS= read -r line || [ -n "$line" ]; do
    printf '%s\n' "$line" 2>/dev/null || [ "$line" != ${`${mark} beat`} ] || exit
    line=
  done
}
change() {
  [ -z "$waited" ] || return 0
  printf '\n%s change %s\n' ${mark} "$1"
  { status=$({ { timeout -k 5 "$2" sh -s 2>&1 3>&- 4>&- 9>&-; echo $? >&3; } | relay >&4; } 3>&1); } 4>&1
  [ "$status" != 0 ] || return 0
  printf '\n%s failed %s %s\n' ${mark} "$1" "$status"
  exit 1
}
${raw(body.join("\n"))}`;
}

/** sudo on RHEL drops /usr/local/bin from PATH, and a plain ssh session lacks the sbin folders. */
const PATH = 'PATH="$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"';

/** Wraps a script so that it runs only once it has arrived completely. */
export const wrapInMain = (script: string): string =>
  `main() {\nexport LC_ALL=C ${PATH}\n${script}\n}\nmain </dev/null\n`;

/** A plan as one sh script for a person to run on the box; secrets are read from the environment. */
export function asScript(changes: readonly Change[]): string {
  const names = [...new Set(changes.flatMap((change) => change.secrets ?? []))];
  const needs = names.map(
    (name) => `: "\${${name}:?is a secret: set it before you run this}"; export ${name}`,
  );
  const pushes = changes.flatMap(({ push }) =>
    push ? [`# first copy ${oneLine(push.file)} to ${push.path}`] : [],
  );
  const elsewhere = changes.flatMap(({ onServer, why }) =>
    onServer ? [`# first, on the server: ${oneLine(why)}`] : [],
  );
  const here = changes.filter((change) => !change.onServer);
  const late = `[ -z "$waited" ] || { echo 'Another run has just ended on this box: run the same again'; exit 1; }`;
  const apply = applyScript(here, newMark(), (name) => raw(`"$${name}"`), "person");
  return `#!/bin/sh\n${wrapInMain([...needs, ...pushes, ...elsewhere, apply, late].join("\n"))}`;
}

/** Limit of protocol lines per trip: a two-hour step reports every ten seconds. */
const WORDS = 5000;

/** Parses the output of a box: marked lines, and the text that belongs to each. */
export function reader(
  mark: string,
  on: { change?(i: number): void; say?(text: string): void; early?(fact: Facts<string>): void },
) {
  const facts: Record<string, string> = {};
  const seen = {
    facts,
    ended: false,
    /** Nothing was applied, because an earlier run was still active. */
    waited: false,
    /** The process of an earlier run that did not end. */
    busy: undefined as string | undefined,
    failed: undefined as { i: number; status: number } | undefined,
    output: "",
  };
  let fact: string | undefined;
  let words = 0;
  return {
    seen,
    /** @throws {Failure} for a box that sends too many protocol lines. */
    line(line: string) {
      if (line.startsWith(`${mark} `) && line !== `${mark} beat` && ++words > WORDS)
        throw new Failure(`The box sent more than ${WORDS} protocol lines`);
      if (!line.startsWith(`${mark} `)) {
        if (fact === undefined) seen.output += `${line}\n`;
        else facts[fact] = facts[fact] === undefined ? line : `${facts[fact]}\n${line}`;
        return;
      }
      const [kind, ...rest] = line.slice(mark.length + 1).split(" ");
      if (kind === "fact") {
        fact = rest[0] as string;
        delete facts[fact];
      } else if (kind === "say") on.say?.(rest.join(" "));
      else if (kind === "early") on.early?.({ [rest[0] as string]: rest.slice(1).join(" ") });
      else if (kind === "beat") return;
      else if (kind === "end") seen.ended = true;
      else if (kind === "waited") seen.waited = true;
      else if (kind === "busy") seen.busy = rest[0] ?? "";
      else if (kind === "failed") seen.failed = { i: Number(rest[0]), status: Number(rest[1]) };
      else if (kind === "change") {
        seen.output = "";
        on.change?.(Number(rest[0]));
      }
    },
  };
}

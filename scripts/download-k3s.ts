#!/usr/bin/env -S node --import tsx
/** Step 1 of 7: a verified k3s binary at /usr/local/bin/k3s, and kubectl beside it. */
import { byProxy, IMAGES, PROXY_SETTINGS } from "../lib/k3s/config.ts";
import { foldersLook, install, managersLook, osOf, writable } from "../lib/k3s/packages.ts";
import { main } from "../lib/k3s/script.ts";
import { binaryLook, K3S, releaseOf } from "../lib/k3s/unit.ts";
import type { Settings } from "../lib/settings.ts";
import { bare, raw, sh } from "../lib/sh.ts";
import { type Change, type Facts, prints, Refusal, step } from "../lib/step.ts";
import { splitWords } from "../lib/text.ts";

/** The release's binary for `uname -m`, and the architecture in the names of its checksums and images. */
const RELEASES = new Map<string, [file: string, arch: string]>([
  ["x86_64", ["k3s", "amd64"]],
  ["aarch64", ["k3s-arm64", "arm64"]],
  ["arm64", ["k3s-arm64", "arm64"]],
  ["armv7l", ["k3s-armhf", "arm"]],
  ["armv6l", ["k3s-armhf", "arm"]],
]);

const BIN = K3S.replace(/\/k3s$/, "");

/** The name of a download that is not verified yet, on the same file system, so that mv is atomic. */
const PART = `${BIN}/.k3s`;

/** Records which images are in place: their hash, name, size and time. */
const RECORD = `${IMAGES}.txt`;

export const downloadK3s = step({
  name: "download-k3s",
  options: ["K3S_VERSION", "K3S_MIRRORS", "K3S_SHA256", "K3S_BIN", "AIRGAP", ...PROXY_SETTINGS],

  look: (want) => [
    binaryLook,
    managersLook,
    foldersLook,
    prints("curl kubectl sha256 images")(`fact curl; command -v curl
fact kubectl; command -v kubectl
${want.K3S_SHA256 ? `fact sha256; digest ${K3S}` : ""}
${want.AIRGAP ? `fact images; cat ${RECORD} 2>/dev/null; (cd ${IMAGES} 2>/dev/null && stat -c '%n %s %Y' k3s-airgap-images-* 2>/dev/null)` : ""}`),
  ],

  plan(want, facts) {
    const changes: Change[] = [];
    if (!facts.curl?.trim())
      changes.push(
        byProxy(want, {
          why: "install curl, which downloads and asks the server",
          sh: install(osOf(facts), ["curl", "ca-certificates"]),
          seconds: 600,
          // curl is needed to ask the server before an agent is installed.
          lookAgain: "foreseen",
        }),
      );
    const have = facts.version?.trim() || undefined;
    if (want.K3S_BIN) {
      // filesOf() has put the file's own hash into K3S_SHA256.
      if (facts.sha256?.trim() !== want.K3S_SHA256)
        changes.push({
          why: `put ${want.K3S_BIN} in place${have ? ` of ${have}` : ""}`,
          ...pushed(want.K3S_BIN, want.K3S_SHA256, PART, swap("v1")),
          seconds: 120,
          lookAgain: "foreseen",
          assumes: `${want.K3S_BIN} is k3s ${want.K3S_VERSION}`,
        });
    } else if (have !== want.K3S_VERSION || (want.K3S_SHA256 && facts.sha256?.trim() !== want.K3S_SHA256)) {
      changes.push(
        byProxy(want, {
          why: `download k3s ${want.K3S_VERSION}${have ? ` in place of ${have}` : ""}`,
          sh: fetch(
            binary(want, facts),
            want,
            `${swap(`${want.K3S_VERSION} `)}\nrm -f ${PART}-${want.K3S_VERSION}[.-]*`,
          ),
          seconds: 3600,
        }),
      );
    }
    if (!facts.kubectl?.trim())
      changes.push({ why: "link kubectl to k3s", sh: `ln -sfn k3s ${BIN}/kubectl` });
    if (changes.length) writable(facts, BIN);
    if (want.AIRGAP && !changes.some((change) => change.push)) changes.push(...images(want, facts));
    return changes;
  },
});

/** Puts a verified binary of K3S_VERSION into a folder as k3s, for a run of its own: the box's own stays. */
export function binaryIn(folder: string, want: Settings, facts: Facts): Change {
  const path = `${folder}/k3s`;
  const put = swap(`${want.K3S_VERSION} `, path);
  return want.K3S_BIN
    ? {
        why: `put ${want.K3S_BIN} into ${folder}`,
        ...pushed(want.K3S_BIN, want.K3S_SHA256, path, put),
        seconds: 120,
      }
    : byProxy(want, {
        why: `download k3s ${want.K3S_VERSION} into ${folder}`,
        sh: fetch({ ...binary(want, facts), part: `${path}.part` }, want, put),
        seconds: 3600,
      });
}

/**
 * Downloads the binary and images to every box before the first node is drained, so that a failing mirror does not stop
 * an upgrade half-way.
 */
export const downloadAhead = step({
  name: "download-ahead",
  options: [],
  look: (want) => [
    binaryLook,
    foldersLook,
    prints("ahead images-ahead")(sh`fact ahead; ls ${`${partOf(want)}.good`} 2>/dev/null
fact images-ahead; ls ${`${imagesPartOf(want)}.good`} 2>/dev/null`),
  ],
  plan(want, facts) {
    if (want.K3S_BIN || facts.version?.trim() === want.K3S_VERSION) return [];
    writable(facts, BIN);
    const ahead = (what: File) =>
      byProxy(want, {
        why: `download ${what.file} of k3s ${want.K3S_VERSION} ahead`,
        sh: fetch(what, want, 'echo "$sum" >"$part.good"'),
        seconds: 7200,
      });
    return [
      ...(facts.ahead?.trim() ? [] : [ahead(binary(want, facts))]),
      ...(want.AIRGAP && !facts["images-ahead"]?.trim() ? [ahead(imagesFile(want, facts))] : []),
    ];
  },
});

/** A file of a release, and its path until it is verified. */
interface File {
  file: string;
  arch: string;
  part: string;
  /** Replaces the checksum from another host. */
  sha256?: string;
}

// A file verified by another hash than the wanted one does not count.
const partOf = ({ K3S_VERSION, K3S_SHA256 }: Settings) =>
  `${PART}-${K3S_VERSION}${K3S_SHA256 && `-${K3S_SHA256}`}.part`;
const imagesPartOf = (want: Settings) => `${IMAGES}-${want.K3S_VERSION}.part`;

function binary(want: Settings, facts: Facts): File {
  const [file, arch] = releaseFor(facts);
  return { file, arch, part: partOf(want), sha256: want.K3S_SHA256 };
}

function imagesFile(want: Settings, facts: Facts): File {
  const [, arch] = releaseFor(facts);
  // Old releases have no other file.
  const ext = releaseOf(want, facts).generation === "old" ? "tar" : "tar.zst";
  return { file: `k3s-airgap-images-${arch}.${ext}`, arch, part: imagesPartOf(want) };
}

/** @throws {Refusal} for an architecture that k3s is not built for. */
function releaseFor(facts: Facts): [file: string, arch: string] {
  const machine = facts.arch?.trim() ?? "";
  const release = RELEASES.get(machine);
  if (release) return release;
  throw new Refusal(
    `k3s has no release for ${machine || "an unknown"} architecture: give a K3S_BIN of your own`,
  );
}

/** The images of k3s's own pods, placed where k3s imports them from. */
function images(want: Settings, facts: Facts<"images">): Change[] {
  const [, arch] = releaseFor(facts);
  const { version, generation } = releaseOf(want, facts);
  const [record = "", ...there] = (facts.images ?? "").split("\n");
  const isThere = (id: string, name: string) =>
    there.some((row) => row.startsWith(`${name} `) && record === `${id} ${row}`);
  const put = (id: string, name: string) => sh`mkdir -p ${IMAGES}
rm -f ${IMAGES}/k3s-airgap-images-${arch}.tar* "$part.good"
mv "$part" ${IMAGES}/${name}
(cd ${IMAGES} && echo ${id} "$(stat -c '%n %s %Y' ${name})") >${RECORD}`;

  if (!want.K3S_BIN) {
    const what = imagesFile(want, facts);
    if (isThere(version, what.file)) return [];
    return [
      byProxy(want, {
        why: `download ${what.file} of k3s ${version}`,
        sh: fetch(what, want, put(version, what.file)),
        seconds: 7200,
      }),
    ];
  }
  // filesOf() has looked for them: below the setting a line each, sha256 and path.
  const [asked, ...rows] = want.AIRGAP.split("\n");
  const row = rows.find((line) => line.includes(`k3s-airgap-images-${arch}.`));
  if (!row && !asked) return [];
  if (!row)
    throw new Refusal(`Beside ${want.K3S_BIN} are no airgap images for ${arch}, which this box needs`);
  const [hash, file] = [row.slice(0, 64), row.slice(65)];
  const name = file.slice(file.lastIndexOf("/") + 1);
  if (generation === "old" && !name.endsWith(".tar"))
    throw new Refusal(`k3s ${version} imports no ${name}: unpack it to a .tar beside it, and move it away`);
  if (isThere(hash, name)) return [];
  return [{ why: `put ${name} in place`, ...pushed(file, hash, IMAGES, put(hash, name)), seconds: 300 }];
}

/** Puts a local file beside its place on the box; there it is verified before `put` runs. */
function pushed(file: string, hash: string, beside: string, put: string): Pick<Change, "push" | "sh"> {
  const part = `${beside}-${hash.slice(0, 12)}.part`;
  return {
    push: { file, path: part },
    sh: sh`${raw(TELL)}part=${part}; from=${file}; sum=${hash}
${raw(VERIFY)}
${raw(put)}`,
  };
}

const VERIFY = sh`have=$(sha256sum <"$part"); have=\${have%% *}
if [ "$have" != "$sum" ]; then rm -f "$part"; tell "$from: sha256 is $have, expected $sum"; exit 1; fi`;

/** Reported at once, and again on failure: errors of one mirror matter even if the next one works. */
const TELL = 'tell() { say "$1"; echo "$1"; }\n';

/** The old binary stays until the new one has run and reported the wanted version. */
const swap = (version: string, path = K3S) => sh`chmod 755 "$part"
said=$("$part" --version) || { echo "the new binary does not run here: $said"; exit 1; }
case $said in *${` ${version}`}*) ;; *) echo "the new binary says: $said"; exit 1 ;; esac
mv -f "$part" ${path}
rm -f "$part.good"`;

/** The host of a URL, without port and notation: a host must not verify its own files. */
export function hostOf(base: string): string {
  const host = new URL(base).hostname.replace(/\.$/, "");
  const [, high, low] = /^\[::(?:ffff:)?([\da-f]{1,4}):([\da-f]{1,4})\]$/.exec(host) ?? [];
  if (!high || !low) return host;
  const [a, b] = [Number.parseInt(high, 16), Number.parseInt(low, 16)];
  return [a >> 8, a & 255, b >> 8, b & 255].join(".");
}

/**
 * Tries the mirrors in order. One that does not connect within 10 s or falls below 20 kB/s is left for the next, which
 * resumes the download, as does the next run; the hash decides in the end. A mirror may spell the release with +
 * (GitHub) or - (Rancher's mirror, see k3s's install.sh).
 */
function fetch({ file, arch, part, sha256 = "" }: File, want: Settings, put: string): string {
  const { K3S_VERSION: version } = want;
  const bases = splitWords(want.K3S_MIRRORS);
  const tries = bases.map((base) => {
    const others = bases.filter((other) => hostOf(other) !== hostOf(base));
    return sh`if try ${[base, ...others]}; then put; exit 0; fi`;
  });
  return bare(sh`${raw(TELL)}part=${part}
mkdir -p ${part.replace(/\/[^/]*$/, "")}
get() { # BASE FILE CURL-OPTION…; its last line is the address that answered
  base=$1 name=$2; shift 2
  for release in ${version.replace("+", "%2B")} ${version.replace("+", "-")}; do
    status=0
    curl -fsSL --connect-timeout 10 --speed-limit 20480 --speed-time 15 -w '\n%{url_effective}\n' "$@" "$base/$release/$name" || status=$?
    [ "$status" = 22 ] || return "$status"
  done
  return 22
}
host() { # TEXT: $host is that of the address in its last line
  host=\${1##*
}
  case $host in "\${host%%/*}//"*) host=\${host#*//} ;; esac
  host=\${host%%[/?#]*}; host=\${host##*@}
  case \${host##*:} in *[!0-9]*) ;; *) host=\${host%:*} ;; esac
  host=\${host%.}
  case $host in *[!a-z0-9.:-]*) host=$(echo "$host" | tr '[:upper:]' '[:lower:]') ;; esac
}
word() { # BASE: its checksum, and the host that gave it
  said=$(get "$1" sha256sum-${arch}.txt --max-time 60 2>/dev/null) || return 0
  host "$said"
  echo "$(echo "$said" | awk '$2 == "${file}" { print $1 }') $host"
}
vouch() { # HOST that does not count, BASE…: whose word is taken for the checksum
  not=$1; shift
  for other in "$@"; do
    theirs=$(word "$other")
    sum=\${theirs%% *} by=\${theirs#* }
    [ -z "$sum" ] || [ "$by" = "$not" ] || return 0
  done
  return 1
}
try() { # BASE, then the bases of other hosts
  from=$1; shift
  sum=${sha256} by=''
  [ -n "$sum" ] || vouch "" "$@" || { tell "$from: no other host gave its checksum (has it ${version}?): add a mirror, or set K3S_SHA256"; return 1; }
  say "$from"
  # What is here may have come from who gave the checksum: this host has to say the same.
  own=''; [ -z "$by" ] || [ ! -s "$part" ] || own=$(word "$from")
  if [ -s "$part" ] && { [ -z "$by" ] || { [ "\${own%% *}" = "$sum" ] && [ "\${own#* }" != "$by" ]; }; }; then
    status=0
    get "$from" ${file} -C - -o "$part" >/dev/null || status=$?
    # 22: the server has nothing beyond what is here. Either way the hash decides, and what is wrong, maybe
    # by an earlier mirror's fault, is asked for as a whole. 33: it cannot go on from where a file was cut.
    case $status in 0 | 22) (${raw(VERIFY)}) && return ;; 33) ;; *) stopped; return 1 ;; esac
  fi
  at=$(get "$from" ${file} -o "$part") || { stopped; return 1; }
  host "$at"; at=$host
  [ -z "$by" ] || [ "$at" != "$by" ] || vouch "$at" "$@" || { rm -f "$part"; tell "$from leads to $at, and no other host gave its checksum: add a mirror, or set K3S_SHA256"; return 1; }
  (${raw(VERIFY)})
}
watch() {
  nap=
  trap 'kill $nap 2>/dev/null; exit' TERM
  while :; do
    sleep 10 >/dev/null 2>&1 & nap=$!
    wait "$nap"
    say "$(wc -c 2>/dev/null <"$part" || echo 0) bytes"
  done
}
stopped() { tell "$from: gave up at $(wc -c 2>/dev/null <"$part" || echo 0) bytes"; }
put() {
  ${raw(put)}
}
# What was downloaded ahead needs no mirror any more.
if [ -s "$part.good" ] && [ "$(sha256sum 2>/dev/null <"$part" | cut -d' ' -f1)" = "$(cat "$part.good")" ]; then put; exit 0; fi
watch & watcher=$!
trap 'kill $watcher' EXIT
${raw(tries.join("\n"))}
echo ${`No mirror gave a good ${file === "k3s" ? "binary" : file}. What came is kept: run the same again, or give K3S_BIN.`}
exit 1`);
}

await main(import.meta, {
  about: "Downloads k3s, verifies it by a checksum from another host, and installs it.",
  steps: [downloadK3s],
});

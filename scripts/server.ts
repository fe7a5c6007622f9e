#!/usr/bin/env -S node --import tsx
/** Step 4 of 7: a healthy k3s server on its public address. Includes steps 1 to 3. */
import { causes } from "../lib/check/causes.ts";
import { DATA } from "../lib/k3s/archive.ts";
import { NODE_SETTINGS, PASSWORD, proxyEnv } from "../lib/k3s/config.ts";
import { neighbours } from "../lib/k3s/firewall/neighbours.ts";
import { ALLOWED, brief } from "../lib/k3s/identity.ts";
import { main } from "../lib/k3s/script.ts";
import { healthyMessage, serviceLook, servicePlan } from "../lib/k3s/service.ts";
import { envPath, NODE_TOKEN } from "../lib/k3s/unit.ts";
import type { Box, Run } from "../lib/script.ts";
import { SettingError, type Settings } from "../lib/settings.ts";
import { raw, sh } from "../lib/sh.ts";
import { type Change, type Facts, Failure, prints, Refusal, step } from "../lib/step.ts";
import { boxNames, nameOf, sha256 } from "../lib/text.ts";
import { caIn, PASSWORD_SED, passwordIn, passwordOf } from "../lib/token.ts";
import { prepareAs } from "./agent.ts";
import { annotateAs } from "./annotate.ts";

export const server = step({
  name: "server",
  options: ["SERVER", "PUBLIC_IP", "PROXY_MODE", "SERVER_ARGS", ...NODE_SETTINGS, "K3S_DATASTORE_ENDPOINT"],

  look: (want) => [
    ...serviceLook("server", want),
    passwordLook,
    rotationLook,
    prints("token sqlite external")(`fact token; text ${NODE_TOKEN}
fact sqlite; test -e /var/lib/rancher/k3s/server/db/state.db && echo yes
fact external; grep -qs '^K3S_DATASTORE_ENDPOINT=' ${envPath("server")} && echo yes`),
  ],

  plan(want, facts): Change[] {
    const before = [...password(want, facts), ...undoesRotation(want, facts)];
    return servicePlan("server", environment(want, facts), want, facts, before);
  },

  learn(want, facts) {
    if (joinsExistingDatastore(want)) return {};
    const token = facts.token?.trim();
    if (!token) throw new Failure("The server is healthy but has no node-token");
    // The content of the datastore is known only now.
    const [ca, asked] = [caIn(token), caIn(want.K3S_TOKEN)];
    if (asked && ca !== asked && !want.allowed?.has("force"))
      throw new Refusal(
        `The server's cluster has the CA ${brief(ca)}, but K3S_TOKEN belongs to another cluster (CA ${brief(asked)}), and is not changed. FORCE=1 replaces it with the server's token`,
      );
    return { K3S_URL: urlOf(want), K3S_TOKEN: token };
  },
});

const urlOf = (want: Settings) => `https://${want.PUBLIC_IP}:6443`;

/** Is there already another server of this datastore that agents use? The first of SERVER always takes precedence. */
export function joinsExistingDatastore(want: Settings): boolean {
  const [first] = boxNames(want.SERVER);
  return Boolean(
    want.K3S_DATASTORE_ENDPOINT &&
      want.K3S_URL &&
      want.K3S_URL !== urlOf(want) &&
      !(first && first === nameOf(want.HOST)),
  );
}

/** Lines of the unit's environment. @throws {Refusal} when a change of datastore would abandon the cluster. */
function environment(want: Settings, facts: Facts<"sqlite" | "external">): string {
  const base = `# read by k3s.service\n${proxyEnv(want)}`;
  if (want.K3S_DATASTORE_ENDPOINT) {
    if (facts.sqlite?.trim() && !facts.external?.trim())
      throw new Refusal(
        "This server's cluster is in its own SQLite: with K3S_DATASTORE_ENDPOINT it would start a new, empty one. Take it down first, or remove the setting",
      );
    return `${base}K3S_DATASTORE_ENDPOINT=@K3S_DATASTORE_ENDPOINT@\nK3S_TOKEN_FILE=${PASSWORD}\n`;
  }
  if (facts.external?.trim())
    throw new Refusal(
      "This server's cluster is in an external datastore, and K3S_DATASTORE_ENDPOINT is not set: it would start a new, empty one",
    );
  return base;
}

/**
 * The file with the cluster's password, which servers of one datastore must share before they start: it is the key for
 * the bootstrap data there. v1.17.6 wants the bare password, not K10…::server:PASSWORD; without one it stores its CAs
 * under an empty password, where a second server with a password does not find them (seen).
 */
export function password(want: Settings, facts: Facts<"token" | "password">): Change[] {
  if (!want.K3S_DATASTORE_ENDPOINT) return [];
  const own = joinsExistingDatastore(want) ? "" : facts.token?.trim();
  const known = passwordIn(own || want.K3S_TOKEN);
  const have = facts.password?.trim();
  if (known ? have === `600\n${sha256(known)}` : have?.startsWith("600\n")) return [];
  if (own) return [KEEP_PASSWORD];
  if (known) return [writePassword(passwordOf("K3S_TOKEN"), { secrets: ["K3S_TOKEN"] })];
  const made = writePassword(sh`$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')`);
  return [{ ...made, why: `${made.why}, the password of a new cluster` }];
}

const writePassword = (from: string, more: Partial<Change> = {}): Change => ({
  why: `write ${PASSWORD} (0600)`,
  sh: sh`mkdir -p ${PASSWORD.replace(/\/[^/]*$/, "")}
password=${raw(from)}
(umask 077; printf %s "$password" >${PASSWORD}.new)
mv -f ${PASSWORD}.new ${PASSWORD}`,
  ...more,
});

/** Stores the server's own password as the cluster's. */
export const KEEP_PASSWORD = writePassword(sh`$(sed ${PASSWORD_SED} ${NODE_TOKEN})`);
/** The fact that `password` reads. */
export const passwordLook = prints("password")(
  `fact password; [ ! -e ${PASSWORD} ] || { stat -c %a ${PASSWORD}; digest ${PASSWORD}; }`,
);

/** What a rotation of the token replaces, until k3s has started with the new one. */
export const ROTATION = `${DATA}/rotation`;
/** Says if a rotation has not come to its end. */
export const rotationLook = prints("rotation")(`fact rotation; ls ${ROTATION} 2>/dev/null`);

/** Shell that keeps it. */
export const KEEP_ROTATION = sh`rm -rf ${[ROTATION, `${ROTATION}.new`]}
mkdir -m 700 ${`${ROTATION}.new`}
cp -p ${DATA}/token ${DATA}/cred/passwd ${`${ROTATION}.new`}
sync
mv ${`${ROTATION}.new`} ${ROTATION}`;

/**
 * k3s replaces its passwords and its token first, and then encrypts its data anew (pkg/server/handlers/token.go of v1.36.3):
 * after a power cut between the two it never starts again. It says so itself, and only then the token before is put back.
 */
const undoesRotation = (want: Settings, facts: Facts<"rotation" | "service">): Change[] =>
  want.K3S_DATASTORE_ENDPOINT || !facts.rotation?.trim() || /^ActiveState=active$/m.test(facts.service ?? "")
    ? []
    : [
        {
          why: "start k3s with the token of an interrupted rotation, or else with the one before",
          sh: sh`systemctl cat k3s >/dev/null 2>&1 || exit 0
since=$(date +%s)
systemctl restart --no-block k3s
for _ in $(seq 120); do
  if systemctl is-active -q k3s; then rm -rf ${ROTATION}; exit 0; fi
  if journalctl -u k3s -o cat --no-pager --since "@$since" | grep -q 'bootstrap data already found'; then
    for file in token cred/passwd; do
      cp -p ${ROTATION}/"\${file##*/}" ${DATA}/"$file.new"
      sync
      mv -f ${DATA}/"$file.new" ${DATA}/"$file"
    done
    rm -rf ${ROTATION}
    exit 0
  fi
  sleep 0.5
done`,
          seconds: 90,
        },
      ];

/** @throws {SettingError} when the box would become the server of another cluster. */
function examine({ settings: want }: Run, boxes: readonly Box[]): void {
  const names = boxNames(want.SERVER);
  const other = boxes.find(({ host, name }) => host && names.length && !names.includes(name));
  if (other && !want.K3S_DATASTORE_ENDPOINT)
    throw new SettingError(
      `HOST is ${other.host}, but SERVER is ${want.SERVER}: expected K3S_DATASTORE_ENDPOINT for a second server`,
    );
  const first = boxes.some(({ host, name }) => !host || name === (names[0] ?? name));
  if (want.K3S_DATASTORE_ENDPOINT && !first && !(want.K3S_URL && want.K3S_TOKEN))
    throw new SettingError(
      `K3S_TOKEN is not set: expected what "make server" writes for ${names[0]}, the first server`,
    );
}

/** All steps from an empty box to a server whose node others can reach. */
export const serverSteps = [...prepareAs("server"), server, annotateAs("server")];

await main(import.meta, {
  about: "Makes a box the k3s server: binary, kernel, WireGuard, unit. Waits until its node is Ready.",
  steps: serverSteps,
  host: "SERVER",
  everyServer: true,
  writes: (_want, known) => !known.K3S_URL || !known.K3S_TOKEN,
  flags: ALLOWED,
  examine,
  nothing: (want, facts) => healthyMessage("server", want, facts),
  others: neighbours,
  causes,
});

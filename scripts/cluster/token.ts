#!/usr/bin/env -S node --import tsx
/** Rotates the cluster's token: nobody can join with the old one; nodes that have joined continue to run. */
import { parseArgs } from "../../lib/args.ts";
import { causes } from "../../lib/check/causes.ts";
import { DATA } from "../../lib/k3s/archive.ts";
import { configsLook, foreignArgs } from "../../lib/k3s/foreign.ts";
import { brief, nodeNameOf } from "../../lib/k3s/identity.ts";
import { main } from "../../lib/k3s/script.ts";
import { restart } from "../../lib/k3s/service.ts";
import { binaryLook, generationOf, K3S, NODE_TOKEN, nameLook } from "../../lib/k3s/unit.ts";
import { type Change, prints, Refusal, step } from "../../lib/step.ts";
import { asNode, CURL_SED, caIn, PASSWORD_SED } from "../../lib/token.ts";
import {
  joinsExistingDatastore,
  KEEP_PASSWORD,
  KEEP_ROTATION,
  password,
  passwordLook,
  ROTATION,
  rotationLook,
} from "../server.ts";

export const token = step({
  name: "token",
  options: ["SERVER", "PUBLIC_IP", "K3S_TOKEN", "K3S_DATASTORE_ENDPOINT"],

  look: () => [
    binaryLook,
    nameLook,
    configsLook(),
    passwordLook,
    rotationLook,
    prints("token rotates active opens")(`fact token; cat ${NODE_TOKEN} 2>/dev/null
fact rotates; ${K3S} token --help 2>/dev/null | grep -oE '^ +rotate '
fact active; systemctl is-active k3s 2>/dev/null
fact opens; ${asNode(`"$(sed '${PASSWORD_SED}; ${CURL_SED}' ${NODE_TOKEN} 2>/dev/null)"`)}
  curl -sS --max-time 10 -K - --cacert ${DATA}/tls/server-ca.crt -o /dev/null -w '%{http_code}' https://127.0.0.1:6443/v1-k3s/client-ca.crt 2>/dev/null`),
  ],

  plan(want, facts): Change[] {
    const now = facts.token?.trim();
    if (!now || !/^(de)?activ/.test(facts.active ?? ""))
      throw new Refusal("No k3s server runs on this box: make server");
    const [ca, asked] = [caIn(now), caIn(want.K3S_TOKEN)];
    if (ca !== asked)
      throw new Refusal(
        `This server is another cluster's: it has the CA ${brief(ca)}, K3S_TOKEN names ${brief(asked)}. Is SERVER right?`,
      );
    if (!facts.rotates?.trim())
      throw new Refusal(
        `k3s ${facts.version?.trim()} cannot rotate its token: that came with v1.25.15, v1.26.10, v1.27.7 and v1.28.3. Until it is upgraded, whoever has the token can add a node: close 6443/tcp to all but the nodes`,
      );
    for (const [args, where] of [
      [parseArgs(want.SERVER_ARGS), "SERVER_ARGS gives"],
      [foreignArgs(facts), "A config file of yours in /etc/rancher/k3s gives"],
    ] as const)
      if (args.some(({ flag }) => /^(token|t|token-file)$/.test(flag)))
        throw new Refusal(
          `${where} the server its token, and would bring the old one back: take it out first`,
        );
    const start = restart(
      "server",
      generationOf(facts.version?.trim() ?? "", facts.flags) ?? "modern",
      nodeNameOf("server", want, facts),
      want,
    );
    const ends = { why: "forget the token before", sh: `rm -rf ${ROTATION}` };
    const left = facts.rotation?.trim() ? [ends] : [];
    const given = password(want, facts);
    // The server reads the passwords at its start (v1.36.3, seen): until its restart the old token is valid. Or it is not
    // up yet: an earlier run may still be restarting it.
    if (given.length || facts.opens?.trim() !== "200") return [...given, start, ...left];
    // Another server can read the data that the first one has stored under the new token only with that token (v1.36.3
    // with PostgreSQL, seen).
    if (joinsExistingDatastore(want)) return now === want.K3S_TOKEN ? [] : [start, ...left];
    // Not the env file's token, but a valid one: a run was interrupted before the new token was saved.
    if (now !== want.K3S_TOKEN) return left;
    return [
      {
        why: "rotate the token",
        // Without arguments it reads the old token from its file and generates the new one: none is on a command line.
        // Its warning is coloured. It rewrites its file in place, which a full disk would leave empty; k3s could then not
        // read its own data at the next start (pkg/server/token.go).
        sh: `head -c 65536 /dev/zero >${DATA}/room || { rm -f ${DATA}/room; exit 1; }
rm ${DATA}/room
${KEEP_ROTATION}
${K3S} token rotate >/dev/null`,
      },
      ...(want.K3S_DATASTORE_ENDPOINT ? [KEEP_PASSWORD] : []),
      start,
      ends,
    ];
  },

  learn: (want, facts) => (joinsExistingDatastore(want) ? {} : { K3S_TOKEN: facts.token?.trim() ?? "" }),
});

await main(import.meta, {
  about:
    "Rotates the token for joining the cluster. Nodes keep running; the next `make up` distributes the new token.",
  steps: [token],
  host: "SERVER",
  everyServer: true,
  writes: () => true,
  needs: { K3S_TOKEN: 'what "make server" writes to' },
  nothing: () => "the env file has the server's present token, which the next make up gives to the agents",
  causes,
});

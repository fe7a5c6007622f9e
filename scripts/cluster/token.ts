#!/usr/bin/env -S node --import tsx
/** Rotates the cluster's token: whoever knew the old one can join no more; nodes that have joined go on running. */
import { parseArgs } from "../../lib/args.ts";
import { causes } from "../../lib/check/causes.ts";
import { configsLook, foreignArgs } from "../../lib/k3s/foreign.ts";
import { brief, nodeNameOf } from "../../lib/k3s/identity.ts";
import { run } from "../../lib/k3s/script.ts";
import { restart } from "../../lib/k3s/service.ts";
import { binaryLook, generationOf, K3S, NODE_TOKEN, nameLook } from "../../lib/k3s/unit.ts";
import { type Change, prints, Refusal, step } from "../../lib/step.ts";
import { caIn, PASSWORD_SED } from "../../lib/token.ts";
import { isFurther, KEEP_PASSWORD, password, passwordLook } from "../server.ts";

const SERVER = "/var/lib/rancher/k3s/server";

export const token = step({
  name: "token",
  options: ["SERVER", "PUBLIC_IP", "K3S_TOKEN", "K3S_DATASTORE_ENDPOINT"],

  look: () => [
    binaryLook,
    nameLook,
    configsLook(),
    passwordLook,
    prints("token rotates active opens")(`fact token; cat ${NODE_TOKEN} 2>/dev/null
fact rotates; ${K3S} token --help 2>/dev/null | grep -oE '^ +rotate '
fact active; systemctl is-active k3s 2>/dev/null
fact opens; printf 'user = "node:%s"\n' "$(sed '${PASSWORD_SED}; s/["\\\\]/\\\\&/g' ${NODE_TOKEN} 2>/dev/null)" |
  curl -sS --max-time 10 -K - --cacert ${SERVER}/tls/server-ca.crt -o /dev/null -w '%{http_code}' https://127.0.0.1:6443/v1-k3s/client-ca.crt 2>/dev/null`),
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
    const given = password(want, facts);
    // The server lets nodes in by the passwords that it has read at its start (v1.36.3, seen): until then by the old one.
    // Or it is not up: an earlier run may be at it still.
    if (given.length || facts.opens?.trim() !== "200") return [...given, start];
    // What the first server has put into the datastore under the new token, another one finds by no other (v1.36.3 over
    // PostgreSQL, seen).
    if (isFurther(want)) return now === want.K3S_TOKEN ? [] : [start];
    // Another than the env file's, and the door opens by it: a run was cut before it could be learned.
    if (now !== want.K3S_TOKEN) return [];
    return [
      {
        why: "rotate the token",
        // Without arguments it reads the old token from its file and makes the new one itself: none on a command
        // line. Its warning is in colours. It writes its file in place, which a full disk would leave empty, and the
        // next start then finds its own data under another token (pkg/server/token.go).
        sh: `head -c 65536 /dev/zero >${SERVER}/room || { rm -f ${SERVER}/room; exit 1; }
rm ${SERVER}/room
${K3S} token rotate >/dev/null`,
      },
      ...(want.K3S_DATASTORE_ENDPOINT ? [KEEP_PASSWORD] : []),
      start,
    ];
  },

  learn: (want, facts) => (isFurther(want) ? {} : { K3S_TOKEN: facts.token?.trim() ?? "" }),
});

await run(import.meta, {
  about:
    "Rotates the token that joins boxes to the cluster. Nodes go on running; the next `make up` gives it to them.",
  steps: [token],
  host: "SERVER",
  everyServer: true,
  writes: () => true,
  needs: { K3S_TOKEN: 'what "make server" writes to' },
  nothing: () => "the env file has the server's present token, which the next make up gives to the agents",
  causes,
});

#!/usr/bin/env -S node --import tsx
/** Rotates the cluster's token: whoever knew the old one can join no more; nodes that have joined go on running. */
import { run } from "../lib/cli.ts";
import { binaryLook, K3S } from "../lib/k3s.ts";
import { type Change, Refusal, type Step } from "../lib/step.ts";

const NODE_TOKEN = "/var/lib/rancher/k3s/server/node-token";

export const token: Step = {
  name: "token",
  options: ["SERVER", "K3S_TOKEN"],

  look: () => [
    binaryLook,
    `fact token; cat ${NODE_TOKEN} 2>/dev/null
fact rotates; ${K3S} token --help 2>/dev/null | grep -oE '^ +rotate '
fact running; systemctl is-active k3s 2>/dev/null`,
  ],

  plan(want, facts): Change[] {
    const now = facts.token?.trim();
    if (!now || facts.running?.trim() !== "active")
      throw new Refusal("No k3s server runs on this box: make server");
    if (!facts.rotates?.trim())
      throw new Refusal(
        `k3s ${facts.version?.trim()} cannot rotate its token: that came with v1.25.15, v1.26.10, v1.27.7 and v1.28.3. Until it is upgraded, whoever has the token can add a node: close 6443/tcp to all but the nodes`,
      );
    if (/--token(-file)?\b/.test(want.SERVER_ARGS))
      throw new Refusal(
        "SERVER_ARGS gives the server its token, and would bring the old one back: take it out first",
      );
    // Another than the env file's: a run was cut before it could be learned.
    if (now !== want.K3S_TOKEN) return [];
    return [
      {
        why: "rotate the token",
        // Without arguments it reads the old token from its file and makes the new one itself: none on a command line.
        sh: `${K3S} token rotate
printf 'user = "node:%s"\\n' "$(sed 's/.*://' ${NODE_TOKEN})" |
  curl -sSf -K - --cacert /var/lib/rancher/k3s/server/tls/server-ca.crt -o /dev/null https://127.0.0.1:6443/v1-k3s/client-ca.crt`,
        seconds: 120,
      },
    ];
  },

  learn: (_want, facts) => ({ K3S_TOKEN: facts.token?.trim() ?? "" }),
};

await run(import.meta, {
  about:
    "Rotates the token that joins boxes to the cluster. Nodes go on running; the next `make up` gives it to them.",
  steps: [token],
  host: "SERVER",
  needs: { K3S_TOKEN: 'what "make server" writes to' },
  nothing: () => "the server's token was newer than the one here, and is learned now; once more rotates it",
});

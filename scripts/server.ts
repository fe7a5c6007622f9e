#!/usr/bin/env -S node --import tsx
/** Step 4 of 7: a healthy k3s server on its public address. Brings the box through steps 1 to 3 too. */
import { run } from "../lib/cli.ts";
import { healthySaying, serviceLook, servicePlan } from "../lib/k3s.ts";
import { type Change, Failure, Refusal, type Step } from "../lib/step.ts";
import { annotateAs } from "./annotate.ts";
import { downloadK3s } from "./download-k3s.ts";
import { installWireguard } from "./install-wireguard.ts";
import { upgradeKernel } from "./upgrade-kernel.ts";

export const server: Step = {
  name: "server",
  options: ["SERVER", "PUBLIC_IP", "PROXY_MODE", "SERVER_ARGS"],

  look: () => [
    ...serviceLook("server"),
    "fact token; cat /var/lib/rancher/k3s/server/node-token 2>/dev/null",
  ],

  plan(want, facts): Change[] {
    if (!facts.systemd?.trim())
      throw new Refusal("systemd does not run this box: k3s is started by a systemd unit here");
    return servicePlan("server", "# read by k3s.service\n", want, facts);
  },

  learn(want, facts) {
    const token = facts.token?.trim();
    if (!token) throw new Failure("The server is healthy but has no node-token");
    return { K3S_URL: `https://${want.PUBLIC_IP}:6443`, K3S_TOKEN: token };
  },
};

/** What brings a box from nothing to a server whose node others can reach. */
export const serverSteps = [downloadK3s, upgradeKernel, installWireguard, server, annotateAs("server")];

await run(import.meta, {
  about: "Makes a box the k3s server: binary, kernel, WireGuard, unit, and a node that is Ready.",
  steps: serverSteps,
  host: "SERVER",
  nothing: (want, facts) => healthySaying("server", want, facts),
});

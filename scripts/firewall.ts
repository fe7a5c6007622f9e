#!/usr/bin/env -S node --import tsx
/** The firewall of each box: the nodes reach each other's k3s, the world does not, ssh stays as it is. */
import * as cli from "../lib/cli.ts";
import { firewallLook, firewallPlan } from "../lib/firewall.ts";
import { clusterLook, nodesOf } from "../lib/kube.ts";
import { rangesOf } from "../lib/node.ts";
import { report } from "../lib/report.ts";
import { converge, look, type Step } from "../lib/step.ts";

/**
 * @param known public addresses of the boxes that the settings name; the cluster's own nodes are added.
 * @param gone the address of a node that is about to be deleted.
 */
export const firewallFor = (known: readonly string[], gone?: string): Step => ({
  name: "firewall",
  options: ["SERVER", "AGENTS", "HOST", "PUBLIC_IP", "SERVER_ARGS"],
  look: () => [clusterLook, firewallLook],
  plan(want, facts) {
    const joined = nodesOf(facts.nodes).flatMap(({ externalIp: ip }) => (ip && ip !== gone ? ip : []));
    return firewallPlan(facts, [...new Set([...known, ...joined, want.PUBLIC_IP])].sort(), rangesOf(want));
  },
});

async function everywhere(call: cli.Call): Promise<number> {
  const named = async (setting: "SERVER" | "AGENTS") =>
    call.settings[setting] ? await cli.targets(call, setting) : [];
  const cluster = [...(await named("SERVER")), ...(await named("AGENTS"))];
  const boxes = call.origins.HOST === "default" && cluster.length ? cluster : await cli.targets(call, "HOST");
  const steps = [firewallFor([...cluster, ...boxes].map(({ ip }) => ip))];
  const ui = await report(boxes.map((box) => box.name));
  const done = await Promise.all(
    boxes.map((box) =>
      cli.attempt(call, call.script, box, ui.line(box.name), async (line) => {
        const job = cli.jobFor(call, box, line);
        const facts = await look(job, steps);
        if (call.mode !== "apply") return cli.showPlan(call, box, steps, job, facts);
        const after = await converge(job, steps, facts);
        line.done(facts === after, "the nodes reach k3s here, and nobody else");
      }),
    ),
  );
  return cli.worst(done);
}

await cli.run(import.meta, {
  about:
    "Opens what nodes need of each other in each box's firewall (firewalld, ufw or nft), and closes the rest.",
  steps: [firewallFor([])],
  work: everywhere,
});

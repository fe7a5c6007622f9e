#!/usr/bin/env -S node --import tsx
/** The firewall of each box: the nodes reach each other's k3s, the world does not, ssh stays as it is. */
import { boxes } from "../../lib/boxes.ts";
import { bring, each, worst } from "../../lib/fleet.ts";
import { rangesOf } from "../../lib/k3s/config.ts";
import { admitted, blocked, firewall } from "../../lib/k3s/firewall.ts";
import { run } from "../../lib/k3s/script.ts";
import { watch } from "../../lib/report.ts";
import type { Call } from "../../lib/script.ts";

async function everywhere(call: Call): Promise<number> {
  const cluster = [
    ...(call.settings.SERVER ? await boxes(call, "SERVER") : []),
    ...(await boxes(call, "AGENTS")),
  ];
  const those = call.origins.HOST === "default" && cluster.length ? cluster : await boxes(call, "HOST");
  call.letIn = [...cluster, ...those].map(({ ip }) => ip);
  await watch(those);
  const done = await each(call, those, async (box) => {
    const now = await bring(call, box, [firewall]);
    if (!now) return;
    const doubts = blocked(now.facts, admitted(box.want, now.facts), rangesOf(box.want));
    box.line.done(
      now.nothing,
      `the rules seen here let the nodes reach k3s, and nobody else${doubts.length ? `; but ${doubts.join("; ")}` : ""}`,
    );
  });
  return worst(done);
}

await run(import.meta, {
  about:
    "Opens what nodes need of each other in each box's firewall (firewalld, ufw, iptables or nft), and closes the rest.",
  steps: [{ ...firewall, options: ["SERVER", "AGENTS", "HOST", "PUBLIC_IP", "SERVER_ARGS"] }],
  work: everywhere,
});

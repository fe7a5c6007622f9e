#!/usr/bin/env -S node --import tsx
/** The firewall of each box: opens k3s's ports to the nodes and closes them to the world; ssh is not touched. */
import { boxes } from "../../lib/boxes.ts";
import { bring, each, worst } from "../../lib/fleet.ts";
import { rangesOf } from "../../lib/k3s/config.ts";
import { admitted, blocked, firewall } from "../../lib/k3s/firewall/firewall.ts";
import { main } from "../../lib/k3s/script.ts";
import { watch } from "../../lib/report.ts";
import type { Run } from "../../lib/script.ts";
import { NAT } from "../../lib/table.ts";

async function everywhere(run: Run): Promise<number> {
  const cluster = [
    ...(run.settings.SERVER ? await boxes(run, "SERVER") : []),
    ...(await boxes(run, "AGENTS")),
  ];
  const those = run.origins.HOST === "default" && cluster.length ? cluster : await boxes(run, "HOST");
  run.letIn = [...cluster, ...those].map(({ ip }) => ip);
  await watch(those);
  const done = await each(run, those, async (box) => {
    const now = await bring(run, box, [firewall]);
    if (!now) return;
    const nodes = admitted(box.want, now.facts);
    const doubts = blocked(now.facts, nodes, rangesOf(box.want));
    const others = nodes.includes(NAT) ? "and all others 6443/tcp and 51820/udp alone" : "and nobody else";
    box.line.done(
      now.nothing,
      `the rules seen here let the nodes reach k3s, ${others}${doubts.length ? `; but ${doubts.join("; ")}` : ""}`,
    );
  });
  return worst(done);
}

await main(import.meta, {
  about:
    "Opens k3s's ports to the other nodes in each box's firewall (firewalld, ufw, iptables or nft), and closes them to all others.",
  steps: [
    { ...firewall, options: ["SERVER", "AGENTS", "HOST", "PUBLIC_IP", "SERVER_ARGS", "TUNNEL_KUBELETS"] },
  ],
  work: everywhere,
});

#!/usr/bin/env -S node --import tsx
/** The firewall of each box: the nodes reach each other's k3s, the world does not, ssh stays as it is. */
import { jobFor, targets } from "../../lib/boxes.ts";
import { converge, look } from "../../lib/converge.ts";
import { attempt, showPlan, worst } from "../../lib/fleet.ts";
import { rangesOf } from "../../lib/k3s/config.ts";
import { admitted, blocked, firewall } from "../../lib/k3s/firewall.ts";
import { run } from "../../lib/k3s/script.ts";
import { report } from "../../lib/report.ts";
import type { Call } from "../../lib/script.ts";

async function everywhere(call: Call): Promise<number> {
  const named = async (setting: "SERVER" | "AGENTS") =>
    call.settings[setting] ? await targets(call, setting) : [];
  const cluster = [...(await named("SERVER")), ...(await named("AGENTS"))];
  const boxes = call.origins.HOST === "default" && cluster.length ? cluster : await targets(call, "HOST");
  call.letIn = [...cluster, ...boxes].map(({ ip }) => ip);
  const steps = [firewall];
  const ui = await report(boxes.map((box) => box.name));
  const done = await Promise.all(
    boxes.map((box) =>
      attempt(call, call.script, box, ui.line(box.name), async (line) => {
        const job = jobFor(call, box, line);
        const facts = await look(job, steps);
        if (call.mode !== "apply") return showPlan(call, box, steps, job, facts);
        const after = await converge(job, steps, facts);
        const doubts = blocked(after, admitted(job.want, after), rangesOf(job.want));
        line.done(
          facts === after,
          `the rules seen here let the nodes reach k3s, and nobody else${doubts.length ? `; but ${doubts.join("; ")}` : ""}`,
        );
      }),
    ),
  );
  return worst(done);
}

await run(import.meta, {
  about:
    "Opens what nodes need of each other in each box's firewall (firewalld, ufw, iptables or nft), and closes the rest.",
  steps: [{ ...firewall, options: ["SERVER", "AGENTS", "HOST", "PUBLIC_IP", "SERVER_ARGS"] }],
  work: everywhere,
});

#!/usr/bin/env -S node --import tsx
/** All seven steps on SERVER and all AGENTS, side by side in one process. */
import * as cli from "../lib/cli.ts";
import { report } from "../lib/report.ts";
import type { Settings } from "../lib/settings.ts";
import { converge, type Facts, Failure, type Job, look } from "../lib/step.ts";
import { agentSteps, prepareSteps } from "./agent.ts";
import { fixMetrics } from "./fix-metrics.ts";
import { serverSteps } from "./server.ts";

/** What the server's box is looked at for: fix-metrics comes last, when all nodes are there. */
const allSteps = [...serverSteps, fixMetrics];

/** Agents are prepared while the server starts; they wait only for its token. */
export async function up(call: cli.Call): Promise<number> {
  const [server] = (await cli.targets(call, "SERVER")) as [cli.Target];
  const agents = call.settings.AGENTS ? await cli.targets(call, "AGENTS") : [];
  const ui = await report([server, ...agents].map((box) => box.name));

  let job: Job | undefined;
  let facts: Facts = {};
  let changed = false;
  let learned: Partial<Settings> | undefined;
  const serverUp = cli.attempt(call, "server", server, ui.line(server.name), async (line) => {
    job = cli.jobFor(call, server, line);
    facts = await look(job, allSteps);
    if (call.mode !== "apply")
      return cli.showPlan(call, server, facts.nodes ? allSteps : serverSteps, job, facts);
    const after = await converge(job, serverSteps, facts, allSteps);
    learned = await cli.learn(call, serverSteps, job, after);
    changed ||= after !== facts;
    if (after !== facts && agents.length) line.waits("its agents: the server is up");
    facts = after;
  });

  const agentsUp = agents.map((box) =>
    cli.attempt(call, "agent", box, ui.line(box.name), async (line) => {
      const job = cli.jobFor(call, box, line);
      const first = await look(job, agentSteps);
      if (call.mode !== "apply") {
        const token = call.settings.K3S_TOKEN || "(the server's)";
        job.want = { ...job.want, K3S_URL: `https://${server.ip}:6443`, K3S_TOKEN: token };
        return cli.showPlan(call, box, agentSteps, job, first);
      }
      let facts = await converge(job, prepareSteps, first, agentSteps);
      if (!learned) line.waits("the server's token");
      await serverUp;
      if (!learned) throw new Failure("Not joined: the server is not up");
      // The look above asked the server by what the env file knew: nothing, or perhaps another cluster.
      if (learned.K3S_URL !== job.want.K3S_URL || learned.K3S_TOKEN !== job.want.K3S_TOKEN) {
        job.want = { ...job.want, ...learned };
        facts = await look(job, agentSteps);
      }
      const after = await converge(job, agentSteps, facts);
      changed ||= after !== first;
      line.done(after === first);
    }),
  );

  const statuses = await Promise.all([serverUp, ...agentsUp]);
  if (statuses[0] === 0 && call.mode === "apply")
    statuses.push(
      await cli.attempt(call, fixMetrics.name, server, ui.line(server.name), async (line) => {
        const last = cli.jobFor(call, server, line);
        if (changed) facts = await look(last, allSteps);
        const after = await converge(last, allSteps, facts);
        line.done(!changed && after === facts, "the cluster is as wanted");
      }),
    );
  return cli.worst(statuses);
}

await cli.run(import.meta, {
  about:
    "Brings up the whole cluster. Agents are prepared while the server starts, and wait only for its token.",
  steps: [...allSteps, ...agentSteps],
  work: up,
});

#!/usr/bin/env -S node --import tsx
/** All seven steps on SERVER and all AGENTS, side by side in one process. */
import { run } from "../lib/cli.ts";
import { agentSteps } from "./agent.ts";
import { fixMetrics } from "./fix-metrics.ts";
import { serverSteps } from "./server.ts";

await run(import.meta, {
  about:
    "Brings up the whole cluster. Agents are prepared while the server starts, and wait only for its token.",
  steps: serverSteps,
  agents: { steps: agentSteps, prepare: 3 },
  last: [fixMetrics],
  host: "SERVER",
});

#!/usr/bin/env -S node --import tsx
/** All seven steps on SERVER and all AGENTS, side by side in one process. */
import { boxes } from "../lib/boxes.ts";
import { causes } from "../lib/check/causes.ts";
import { converge, look } from "../lib/converge.ts";
import { attempt, learn, learnedFrom, showPlan, worst } from "../lib/fleet.ts";
import { ALLOWED, casOf } from "../lib/k3s/identity.ts";
import { run } from "../lib/k3s/script.ts";
import { watch } from "../lib/report.ts";
import type { Box, Call } from "../lib/script.ts";
import type { Settings } from "../lib/settings.ts";
import { type Facts, Failure, planAll, type Step } from "../lib/step.ts";
import { agentSteps, prepareAs } from "./agent.ts";
import { fixMetrics } from "./fix-metrics.ts";
import { server as serverStep, serverSteps } from "./server.ts";

/** What the server's box is looked at for: fix-metrics comes last, when all nodes are there. */
const allSteps = [...serverSteps, fixMetrics];

/** What others wait for: it is passed once, by whom they wait for. */
function gate<T>() {
  let pass = (_: T) => {};
  const passed = new Promise<T>((done) => {
    pass = done;
  });
  return { passed, pass };
}

/** Agents and further servers are prepared while the first server starts; they wait only for its token. */
export async function up(call: Call): Promise<number> {
  const [server, ...further] = (await boxes(call, "SERVER")) as [Box, ...Box[]];
  const agents = await boxes(call, "AGENTS");
  await watch([server, ...further, ...agents]);

  let facts: Facts = {};
  let changed = false;
  let learned: Partial<Settings> | undefined;
  /** The server has been looked at, and may go on: it knows the nodes that the others must not be. */
  const looked = gate<void>();
  /** The server has something to do, for which the others then wait. */
  const begun = gate<void>();
  const told = gate<Facts>();
  /** The server lets agents in, though its own node may not be Ready yet. */
  const opened = told.passed.then((fact) => {
    learned = learnedFrom([serverStep], server, fact);
  });
  const serverUp = attempt(
    call,
    server,
    async () => {
      server.early = told.pass;
      facts = await look(server, allSteps);
      if (call.mode !== "apply") return showPlan(call, server, facts.nodes ? allSteps : serverSteps, facts);
      const due = planAll(serverSteps, server.want, facts);
      looked.pass();
      if (due.length) begun.pass();
      const after = await converge(server, serverSteps, facts, allSteps);
      learned = await learn(call, serverSteps, server, after);
      changed ||= after !== facts;
      if (after !== facts && agents.length + further.length)
        server.line.waits("the others: the server is up");
      facts = after;
    },
    "server",
  );

  const join = (box: Box, script: string, steps: readonly Step[]) =>
    attempt(
      call,
      box,
      async () => {
        const { line } = box;
        const said = await look(box, steps);
        const lacks = await Promise.race([looked.passed, serverUp]);
        if (lacks && call.mode === "apply") throw new Failure("Left as it is: the server is not up");
        const first = facts.nodes ? { ...said, registered: facts.nodes } : said;
        if (call.mode !== "apply") {
          await serverUp;
          // A server that has none yet makes a new one, unless a datastore has it.
          const { K3S_TOKEN, K3S_DATASTORE_ENDPOINT } = call.settings;
          const known = facts.boot && !K3S_DATASTORE_ENDPOINT ? "" : K3S_TOKEN;
          const token = facts.token?.trim() || known || "(the server's)";
          box.want = { ...box.want, K3S_URL: `https://${server.ip}:6443`, K3S_TOKEN: token };
          // What it was told by another server, or of another token, counts for nothing.
          const { cacerts, ...rest } = first;
          return showPlan(call, box, steps, token === K3S_TOKEN ? first : rest);
        }
        // Nothing is done to a box of some cluster before it is known which one it is to be in.
        const waits = !box.want.K3S_TOKEN && casOf(first).agent.length > 0;
        const role = steps === serverSteps ? "server" : "agent";
        let own = waits ? first : await converge(box, prepareAs(role), first, steps);
        await Promise.race([opened, begun.passed, serverUp]);
        if (!learned) line.waits("the server's token");
        await Promise.race([opened, serverUp]);
        if (!learned) throw new Failure("Not joined: the server is not up");
        // The look above asked the server by what the env file knew: nothing, or perhaps another cluster; or too early.
        const shut = own.cacerts !== undefined && own.door?.trim() !== "200";
        if (shut || learned.K3S_URL !== box.want.K3S_URL || learned.K3S_TOKEN !== box.want.K3S_TOKEN) {
          box.want = { ...box.want, ...learned };
          own = await look(box, steps);
        }
        const joined = converge(box, steps, own);
        // What still runs on this box then ends with the connection.
        const lost = serverUp.then((status) => {
          if (status) throw new Failure("Not joined: the server did not come up");
          return joined;
        });
        const after = await Promise.race([joined, lost]);
        changed ||= after !== first;
        line.done(after === first);
      },
      script,
    );
  const othersUp = [
    ...further.map((box) => join(box, "server", serverSteps)),
    ...agents.map((box) => join(box, "agent", agentSteps)),
  ];

  opened.catch(() => {}); // where there is nobody else, the server's own part says it
  const statuses = await Promise.all([serverUp, ...othersUp]);
  const failed = [...further, ...agents].filter((_, i) => statuses[i + 1] !== 0).map((box) => box.name);
  const state = failed.length
    ? `up to date, except ${failed.join(", ")} (see above)`
    : "the cluster is up to date";
  if (statuses[0] === 0 && call.mode === "apply")
    statuses.push(
      await attempt(
        call,
        server,
        async () => {
          if (changed) facts = await look(server, allSteps);
          const after = await converge(server, allSteps, facts);
          server.line.done(!changed && after === facts, state);
        },
        fixMetrics.name,
      ),
    );
  return worst(statuses);
}

await run(import.meta, {
  about:
    "Brings up the whole cluster. Agents are prepared while the server starts, and wait only for its token.",
  steps: [...allSteps, ...agentSteps],
  writes: (_want, known) => !known.K3S_URL || !known.K3S_TOKEN,
  flags: ALLOWED,
  everyBox: "make agent HOST=… brings up one",
  work: up,
  causes,
});

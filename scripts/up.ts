#!/usr/bin/env -S node --import tsx
/** All seven steps on SERVER and all AGENTS, in parallel in one process. */
import { boxes } from "../lib/boxes.ts";
import { causes } from "../lib/check/causes.ts";
import { converge, look } from "../lib/converge.ts";
import { attempt, learn, learnedFrom, showLater, showPlan, worst } from "../lib/fleet.ts";
import { ALLOWED, casOf, nodeNameOf } from "../lib/k3s/identity.ts";
import { main } from "../lib/k3s/script.ts";
import type { Role } from "../lib/k3s/unit.ts";
import { watch } from "../lib/report.ts";
import type { Box, Run } from "../lib/script.ts";
import type { Settings } from "../lib/settings.ts";
import { type FactsOf, Failure, planAll, Refusal } from "../lib/step.ts";
import { admission, agentSteps, prepareAs } from "./agent.ts";
import { annotateAs } from "./annotate.ts";
import { fixMetrics } from "./fix-metrics.ts";
import { server as serverStep, serverSteps } from "./server.ts";

/** The steps of the server's box: fix-metrics runs last, when all nodes have joined. */
const allSteps = [...serverSteps, fixMetrics];
/** What is left for the server once all others are up: its handshakes with them, and their figures. */
const lastSteps = [annotateAs("server"), fixMetrics];

type Step = (typeof allSteps)[number] | (typeof agentSteps)[number];
type Facts = FactsOf<Step>;

/** The state of the first server, on which the other boxes depend. */
export interface First {
  /** It was looked at and not refused: the existing nodes, with which the others must not conflict, are known. */
  looked?: true;
  /** It has changes to make, for which the others wait. */
  begun?: boolean;
  /** K3S_URL and K3S_TOKEN, once it accepts other nodes; its own node may not be Ready yet. */
  learned?: Partial<Settings>;
  failed?: true;
}

/** Another box, after its first look. */
export interface Other {
  /** It belongs to some cluster. Without a token it is not known whether to this one: it is not changed until then. */
  ofUnknown: boolean;
  prepared?: true;
  /** Its last look used the K3S_URL and K3S_TOKEN that the server reported. */
  informed?: boolean;
}

type Next = "wait" | "wait for the token" | "prepare" | "look again" | "join" | Failure;

/** What another box does next; called again whenever the first server's state changes. Pure. */
export function next(first: First, other: Other): Next {
  if (first.failed)
    return new Failure(`${other.prepared ? "Not joined" : "Left as it is"}: the server is not up`);
  if (!first.looked) return "wait";
  if (!first.learned) {
    if (!other.prepared && !other.ofUnknown) return "prepare";
    return first.begun ? "wait for the token" : "wait";
  }
  return other.informed ? "join" : "look again";
}

/**
 * Did its look ask the right server with the right token, and was that accepted? The env file may have had no token or
 * another cluster's, or the server was not up yet.
 */
const isInformed = (want: Settings, { cacerts, door }: Facts, learned: Partial<Settings> = {}): boolean =>
  learned.K3S_URL === want.K3S_URL &&
  learned.K3S_TOKEN === want.K3S_TOKEN &&
  (cacerts === undefined || door?.trim() === "200");

/** The cluster's nodes as the first server's look has them: none before it has been a server. Undefined: not known. */
export const nodesIn = ({ K3S_DATASTORE_ENDPOINT }: Settings, facts: Facts): string | undefined =>
  facts.nodes?.trim() ||
  (K3S_DATASTORE_ENDPOINT || facts.sqlite?.trim() || casOf(facts).server.length ? undefined : "");

/**
 * Copies of an image may have one host name. k3s would refuse the second only when it has started, and the server does not
 * know the first one yet.
 */
function alone(names: Map<string, Box>, box: Box, role: Role, facts: Facts): void {
  if (facts.named?.trim()) return;
  const name = nodeNameOf(role, box.want, facts);
  const other = names.get(name);
  if (other)
    throw new Refusal(
      `Its node's name is ${name}, as that of ${other.name}: rename one of them (hostnamectl set-hostname …), or add --node-name to its AGENT_ARGS`,
    );
  names.set(name, box);
}

/** Others are prepared while the first server starts; they wait only for its token. */
export async function up(run: Run): Promise<number> {
  const [server, ...further] = (await boxes(run, "SERVER")) as [Box, ...Box[]];
  const agents = await boxes(run, "AGENTS");
  await watch([server, ...further, ...agents]);

  const first: First = {};
  let notify = () => {};
  let updated = Promise.resolve();
  const update = (more: First) => {
    Object.assign(first, more);
    notify();
    updated = new Promise((done) => {
      notify = done;
    });
  };
  update({});

  /** The server, and new boxes, by the names of their nodes. */
  const names = new Map<string, Box>();
  let facts: Facts = {};
  let changed = false;
  const serverUp = attempt(
    run,
    server,
    async () => {
      server.early = (fact) => update({ learned: learnedFrom([serverStep], server, fact) });
      facts = await look(server, allSteps);
      names.set(nodeNameOf("server", server.want, facts), server);
      if (run.mode !== "apply") return showPlan(run, server, facts.nodes ? allSteps : serverSteps, facts);
      update({ looked: true, begun: planAll(serverSteps, server.want, facts).length > 0 });
      const after = await converge(server, serverSteps, facts, allSteps);
      update({ learned: await learn(run, serverSteps, server, after) });
      changed ||= after !== facts;
      if (after !== facts && agents.length + further.length)
        server.line.waits("the others: the server is up");
      facts = after;
    },
    "server",
  ).then((status) => {
    if (status) update({ failed: true });
    return status;
  });

  const join = async (box: Box, steps: readonly Step[]) => {
    const seen = await look(box, steps);
    if (run.mode !== "apply") await serverUp;
    else while (!first.looked && !first.failed) await updated;
    alone(names, box, steps === agentSteps ? "agent" : "server", seen);
    const begun = facts.nodes ? { ...seen, registered: facts.nodes } : seen;
    if (run.mode !== "apply") return preview(run, box, steps, begun, server, facts);
    let own = begun;
    const other: Other = { ofUnknown: !box.want.K3S_TOKEN && casOf(own).agent.length > 0 };
    for (;;) {
      other.informed ||= isInformed(box.want, own, first.learned);
      const todo = next(first, other);
      if (todo instanceof Failure) throw todo;
      if (todo === "join") break;
      if (todo === "prepare") {
        own = await converge(box, prepareAs(steps === serverSteps ? "server" : "agent"), own, steps);
        other.prepared = true;
      } else if (todo === "look again") {
        box.want = { ...box.want, ...first.learned };
        // Only what the server says is new to an agent; what another one has said no longer counts.
        own =
          steps === agentSteps
            ? await admission(box, own, nodesIn(server.want, facts))
            : await look(box, steps);
        other.informed = true;
      } else {
        if (todo === "wait for the token") box.line.waits("the server's token");
        await updated;
      }
    }
    const joined = converge(box, steps, own);
    // What still runs on this box ends with the connection.
    const lost = serverUp.then((status) => {
      if (status) throw new Failure("Not joined: the server did not come up");
      return joined;
    });
    const after = await Promise.race([joined, lost]);
    changed ||= after !== begun;
    box.line.done(after === begun);
  };
  const othersUp = [
    ...further.map((box) => attempt(run, box, () => join(box, serverSteps), "server")),
    ...agents.map((box) => attempt(run, box, () => join(box, agentSteps), "agent")),
  ];
  const statuses = await Promise.all([serverUp, ...othersUp]);
  const failed = [...further, ...agents].filter((_, i) => statuses[i + 1] !== 0).map((box) => box.name);
  if (statuses[0] === 0 && run.mode !== "apply" && !facts.nodes)
    showLater(
      run,
      `${lastSteps.map(({ name }) => name).join(" and ")} on ${server.name}, once all have joined`,
    );
  const state = failed.length
    ? `up to date, except ${failed.join(", ")} (see above)`
    : "the cluster is up to date";
  if (statuses[0] === 0 && run.mode === "apply")
    statuses.push(
      await attempt(
        run,
        server,
        async () => {
          if (changed) facts = { ...facts, ...(await look(server, lastSteps)) };
          const after = await converge(server, lastSteps, facts);
          server.line.done(!changed && after === facts, state);
        },
        fixMetrics.name,
      ),
    );
  return worst(statuses);
}

/** Shows the plan of a box that would join. */
function preview(run: Run, box: Box, steps: readonly Step[], own: Facts, server: Box, facts: Facts): void {
  // A server without a token generates one, unless its datastore has one already.
  const { K3S_TOKEN, K3S_DATASTORE_ENDPOINT } = run.settings;
  const known = facts.boot && !K3S_DATASTORE_ENDPOINT ? "" : K3S_TOKEN;
  const token = facts.token?.trim() || known || "(the server's)";
  box.want = { ...box.want, K3S_URL: `https://${server.ip}:6443`, K3S_TOKEN: token };
  // The answers of another server, or about another token, are ignored.
  const { cacerts, ...rest } = own;
  showPlan(run, box, steps, token === K3S_TOKEN ? own : rest);
}

await main(import.meta, {
  about:
    "Brings up the whole cluster. Agents are prepared while the server starts, and wait only for its token.",
  steps: [...allSteps, ...agentSteps],
  writes: (_want, known) => !known.K3S_URL || !known.K3S_TOKEN,
  flags: ALLOWED,
  everyBox: "make agent HOST=… brings up one",
  work: up,
  causes,
});

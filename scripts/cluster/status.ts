#!/usr/bin/env -S node --import tsx
/** Shows the cluster in ten lines, from one round trip to the server. Changes nothing. */
import { boxes } from "../../lib/boxes.ts";
import { judge, TESTS } from "../../lib/check/diagnose.ts";
import {
  ask,
  type BoxReport,
  type Cluster,
  clusterOf,
  LOOKS,
  survey,
  TOP_LOOK,
} from "../../lib/check/survey.ts";
import { certificatesLook, DUE, daysTo, ending, firstOf, PRESSING } from "../../lib/k3s/certificates.ts";
import { CURL, FRESH, isHome, type Node, peerOf } from "../../lib/k3s/nodes.ts";
import { scheduleLook } from "../../lib/k3s/schedule.ts";
import { main } from "../../lib/k3s/script.ts";
import { forTerminal } from "../../lib/report.ts";
import type { Box, Run } from "../../lib/script.ts";
import { raw, sh } from "../../lib/sh.ts";
import { prints } from "../../lib/step.ts";

/**
 * In addition to check's look at a server (which defines kc and api): each pod's name, how many of its containers are
 * ready, and its state. With that header the API returns kubectl's own columns (since v1.15).
 */
export const MORE = prints("top topless allpods")(sh`if [ -z "$failed" ]; then
${raw(TOP_LOOK)}
fact allpods
pods=$(${raw(CURL)} -m 20 -H 'Accept: application/json;as=Table;g=meta.k8s.io;v=v1' \
  "\${apiurl:-https://127.0.0.1:6443}/api/v1/pods?includeObject=None&pretty=false" 2>/dev/null |
  grep -oE '"cells":\["[^"]*","[^"]*","[^"]*"' | sed 's/.*\["//; s/","/ /g; s/"$//')
[ -n "$pods" ] || pods=$(kc get pods -A --no-headers 2>/dev/null | awk '{ print $2, $3, $4 }')
printf '%s\n' "$pods"
fi`);

/** A line: its subject, the state, and whether it is healthy. */
export type Row = [what: string, text: string, well: boolean];

/** Ten lines. */
export function statusOf(cluster: Cluster, pods: string | undefined): Row[] {
  const { boxes, nodes } = cluster;
  const server = boxes[0] as BoxReport;
  const names = (list: Node[]) => list.map(({ name }) => name).join(", ");
  const versions = [...new Set(nodes.map(({ version }) => version))];
  const down = nodes.filter(({ ready }) => !ready);
  const homes = nodes.filter(isHome);
  const astray = nodes.filter(
    (node) => !isHome(node) && (!node.externalIp || node.publicIp !== node.externalIp),
  );
  const others = nodes.filter(({ name }) => name !== server.nodeName);
  const age = ({ podCidr }: Node) => server.now - (peerOf(server.peers, podCidr)?.handshake ?? 0);
  const stale = others.filter((node) => !(age(node) < FRESH));
  const oldest = Math.round(Math.max(0, ...others.map(age)));
  const rows = (pods ?? "")
    .split("\n")
    .filter(Boolean)
    .map((row) => row.split(" "));
  const problem = rows.filter(
    ([, ready = "", state]) => state !== "Completed" && (state !== "Running" || !/^(\d+)\/\1$/.test(ready)),
  );
  const { top } = server.tried;
  const early = judge(cluster).early.includes(TESTS.top);
  const { state, runs, restarts } = server.unit;
  const ends = firstOf(server.certificates)?.ends ?? Number.POSITIVE_INFINITY;
  const days = daysTo(ends, server.now);
  const up =
    runs === undefined
      ? "not running"
      : `up ${Math.floor(runs / 3600)} h ${Math.floor((runs % 3600) / 60)} min`;
  const list: Row[] = [
    ["cluster", `${server.name}, https://${server.ip}:6443`, nodes.length > 0],
    ["k3s", versions.join(", ") || server.silence || "the API does not answer", versions.length === 1],
    [
      "nodes",
      down.length
        ? `${down.length} of ${nodes.length} not Ready: ${names(down)}`
        : `${nodes.length}, all Ready`,
      down.length === 0 && nodes.length > 0,
    ],
    [
      "addresses",
      astray.length
        ? `peers have a wrong address of ${names(astray)}`
        : homes.length
          ? `every node is known to its peers; without a public address: ${names(homes)}`
          : "every node is known to its peers by its public address",
      astray.length === 0,
    ],
    [
      "WireGuard",
      `${others.length - stale.length} of ${others.length} peers of ${server.name} are fresh${stale.length ? `, not: ${names(stale)}` : `, the oldest handshake ${oldest} s ago`}`,
      stale.length === 0,
    ],
    [
      "pods",
      problem.length
        ? `${problem.length} of ${rows.length} not healthy: ${problem
            .slice(0, 3)
            .map(([name, , state]) => `${name} ${state}`)
            .join(", ")}${problem.length > 3 ? ", …" : ""}`
        : `${rows.length}, all healthy`,
      // A pod that does not start is its owner's problem, not the cluster's.
      true,
    ],
    [
      "metrics",
      server.metrics
        ? `kubectl top has ${top.length} of ${nodes.length} nodes${early ? ": metrics-server has not collected metrics yet" : ""}`
        : "metrics-server is disabled",
      !server.metrics || early || top.length === nodes.length,
    ],
    [
      "server",
      `k3s ${state}, ${up}${restarts === undefined ? "" : `, ${restarts} restarts`}${days <= DUE ? `; its certificates ${ending(ends, server.now)}: make certs` : ""}`,
      state === "active" && days > PRESSING,
    ],
    ...(server.backups
      ? [
          [
            "backups",
            server.backups.wrong[0] ?? `the last one is ${server.backups.last}, in ${server.backups.to}`,
            server.backups.wrong.length === 0,
          ] as Row,
        ]
      : []),
    [
      "room",
      `disk ${server.disk ?? "?"} %, memory ${server.load.memory ?? "?"} % in use`,
      nodes.every(({ pressure }) => pressure.length === 0),
    ],
  ];
  // The rows that depend on the list of nodes.
  if (nodes.length === 0) for (const row of list.slice(2, 7)) row[1] = "not known";
  const well = list.every(([, , fine]) => fine);
  return [
    ...list,
    [
      "verdict",
      well
        ? "nothing is wrong as the server sees it; make check asks every box"
        : "something is wrong: make check names the cause",
      well,
    ],
  ];
}

async function status(run: Run): Promise<number> {
  const [box] = (await boxes(run, "SERVER")) as [Box];
  const [server] = await survey([{ box, role: "server" }], () => [
    ...LOOKS.server,
    MORE,
    certificatesLook,
    scheduleLook,
  ]);
  if (!server || server.error !== undefined) {
    process.stderr.write(`${box.name}: ${forTerminal(server?.error ?? "")}\n`);
    return 1;
  }
  const rows = statusOf(clusterOf([{ ...server, tried: server.facts }]), server.facts.allpods);
  const colour = process.stdout.isTTY && !process.env.NO_COLOR;
  for (const [what, text, well] of rows)
    process.stdout.write(
      `${what.padEnd(10)} ${colour && !well ? `\x1b[31m${forTerminal(text)}\x1b[0m` : forTerminal(text)}\n`,
    );
  return rows.every(([, , well]) => well) ? 0 : 1;
}

await main(import.meta, {
  about: "Shows a summary of the cluster in ten lines, from one connection to the server. Changes nothing.",
  steps: [ask([], ["SERVER", "PUBLIC_IP", "SERVER_ARGS"])],
  host: "SERVER",
  readOnly: true,
  work: status,
});

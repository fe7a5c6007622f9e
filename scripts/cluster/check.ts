#!/usr/bin/env -S node --import tsx
/** Examines the whole cluster and reports what is wrong with it. Changes nothing. */
import { randomBytes } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { judge, median, TESTS } from "../../lib/check/diagnose.ts";
import { tryPods } from "../../lib/check/pods.ts";
import {
  ask,
  type BoxReport,
  type Cluster,
  clusterOf,
  listed,
  reportsOf,
  surveyAndTry,
} from "../../lib/check/survey.ts";
import { FRESH, isHome, isInside, overload, peerOf, standing } from "../../lib/k3s/nodes.ts";
import { main } from "../../lib/k3s/script.ts";
import { forTerminal, type Problem } from "../../lib/report.ts";
import type { Run } from "../../lib/script.ts";
import { NAT } from "../../lib/table.ts";
import { jsonOf, redacted } from "../../lib/text.ts";
import { accessEnd } from "./kubeconfig.ts";

/** Seconds between two rounds of --watch. */
const PAUSE = 5;

async function check(run: Run): Promise<number> {
  const boxes = await listed(run);
  const watch = run.flags.has("watch");
  for (;;) {
    const members = await surveyAndTry(boxes);
    // Starting test pods takes seconds: not in each round.
    const mark = randomBytes(3).toString("hex");
    const podless = watch ? "not with --watch" : await tryPods(members, reportsOf(members), mark);
    const cluster = { ...clusterOf(members), access: accessEnd(boxes[0]?.box.ip) };
    const { problems, notes } = verdict(cluster, podless);
    const { stdout } = process;
    if (run.flags.has("json")) stdout.write(`${jsonOf(asJson(cluster, problems, notes, podless))}\n`);
    else
      stdout.write(
        `${watch ? `${stdout.isTTY ? "\x1b[H\x1b[J" : "\n"}${new Date().toISOString()}\n\n` : ""}${reportOf(cluster, problems, stdout.isTTY ? stdout : {}, podless, notes)}`,
      );
    if (!watch) return problems.length ? 1 : 0;
    await sleep(PAUSE * 1000);
  }
}

/** The problems, including failed tests whose cause is not known. */
export function verdict(
  cluster: Cluster,
  podless: string | undefined,
): { problems: Problem[]; notes: string[] } {
  const { wrong, notes, early } = judge(cluster);
  if (wrong.length) return { problems: wrong, notes };
  const problems = proofsOf(cluster, podless)
    .filter(({ what, passed, of }) => passed < of && !early.includes(what))
    .map(({ what, passed, of }) => ({
      box: cluster.boxes[0]?.name ?? "",
      cause: `${what}: ${passed} of ${of}, and no cause was found on any box of SERVER and AGENTS`,
      remedy: "add every node to AGENTS, and check again",
    }));
  return { problems, notes };
}

/** A line of the report on a test: how many passed, or why it could not run. */
interface Proof {
  what: string;
  passed: number;
  of: number;
  untested: string[];
}

export function proofsOf({ boxes, nodes }: Cluster, podless: string | undefined): Proof[] {
  const server = boxes.find(({ role }) => role === "server");
  const heard = boxes.filter(({ error }) => error === undefined);
  const sizes = heard.flatMap(({ tried, wireguard }) =>
    Object.values(tried.tunnel).map((size) => size > 0 && size === wireguard?.mtu),
  );
  const without = (tool: string) => {
    const names = heard.filter(({ tried }) => tried.missing.includes(tool)).map(({ name }) => name);
    return names.length ? [`no ${tool} on ${names.join(", ")}`] : [];
  };
  const services = heard.flatMap(({ tried }) => tried.service ?? []);
  const kubelets = Object.values(server?.tried.kubelet ?? {});
  const byPods = (what: string, of: (tried: BoxReport["tried"]) => Record<string, boolean>) => {
    const all = heard.flatMap(({ tried }) => Object.values(of(tried)));
    return { what, passed: all.filter(Boolean).length, of: all.length, untested: [] };
  };
  const one = (name: string) => (tried: BoxReport["tried"]) =>
    tried.services[name] === undefined ? {} : { [name]: tried.services[name] as boolean };
  return [
    {
      what: TESTS.sizes,
      passed: sizes.filter(Boolean).length,
      of: sizes.length,
      untested: without("ping"),
    },
    {
      what: TESTS.kubelets,
      passed: kubelets.filter((how) => how === "open").length,
      of: kubelets.length,
      untested: without("bash"),
    },
    {
      what: TESTS.service,
      passed: services.filter((how) => how === "open").length,
      of: services.length,
      untested: without("kube-proxy"),
    },
    ...(server?.metrics
      ? [{ what: TESTS.top, passed: server.tried.top.length, of: nodes.length, untested: [] }]
      : []),
    byPods(TESTS.pods, ({ pods }) => pods),
    byPods(TESTS.podService, one("kubernetes")),
    byPods(TESTS.dns, one("DNS")),
    byPods(TESTS.logs, ({ logs }) => logs),
    byPods(TESTS.exec, ({ exec }) => exec),
    {
      what: "pods, services, DNS, logs and exec",
      passed: 0,
      of: 0,
      untested: [...(podless ? [podless] : []), ...without("netns")],
    },
  ];
}

/** The JSON output. */
function asJson(
  { boxes, nodes, access }: Cluster,
  problems: Problem[],
  notes: string[],
  podless: string | undefined,
) {
  return {
    ok: problems.length === 0,
    wrong: problems,
    notes,
    proofs: proofsOf({ boxes, nodes }, podless).filter(({ of, untested }) => of || untested.length),
    boxes: boxes.map(({ word: _, said, node, ...box }) => ({
      ...box,
      said: redacted(said),
      node: node?.name,
    })),
    nodes,
    ...(access ? { access } : {}),
  };
}

interface Cell {
  text: string;
  wrong?: boolean;
}
type Row = (Cell | string)[];

/** The output: a terminal has a width; a pipe gets all columns in full, without colour. */
interface Page {
  columns?: number;
  isTTY?: boolean;
}

/** The report as text: tables, tests that passed, and problems. */
export function reportOf(
  cluster: Cluster,
  problems: readonly Problem[],
  page: Page,
  podless?: string,
  notes = judge(cluster).notes,
): string {
  const width = page.columns ?? Number.POSITIVE_INFINITY;
  const colour = page.isTTY && !process.env.NO_COLOR;
  const paint = (code: number, text: string) => (colour ? `\x1b[${code}m${text}\x1b[0m` : text);
  const red = (text: string) => paint(31, text);
  const green = (text: string) => paint(32, text);
  const bold = (text: string) => paint(1, text);
  const tables = [nodeTable(cluster), boxTable(cluster), wireguardTable(cluster, width)]
    .filter((rows) => rows.length > 1)
    .map((rows) => lay(rows, width, red, bold));
  // A test that fails although nothing is wrong is one that is too early; a note says so.
  const failed = problems.length ? red("FAIL ") : "later";
  const proofs = proofsOf(cluster, podless).flatMap(({ what, passed, of, untested }) => [
    ...(of ? [`${passed === of ? green("ok   ") : failed} ${what}: ${passed} of ${of}`] : []),
    ...untested.map((why) => `could not test ${what}: ${shown(why)}`),
  ]);
  const devices = devicesRow(cluster);
  const wrong = merged(problems).flatMap(({ box, cause, remedy }) => [
    red(`${box}: ${shown(cause)}`),
    `    do: ${shown(remedy)}`,
  ]);
  const last = wrong.length ? wrong : [green("Nothing is wrong.")];
  return `${[...tables, [...proofs, ...devices, ...notes.map((text) => `note  ${shown(text)}`)], last].map((lines) => lines.join("\n")).join("\n\n")}\n`;
}

/** How many devices there are, and how many of them are on, in one line. */
function devicesRow({ boxes }: Cluster): string[] {
  const entries = boxes.filter(({ entry }) => entry);
  const seen = entries.flatMap(({ entry, now }) =>
    (entry?.devices ?? []).map(({ name, handshake }) => ({ name, fresh: now - handshake < FRESH })),
  );
  const count = (list: typeof seen) => new Set(list.map(({ name }) => name)).size;
  const fresh = count(seen.filter((device) => device.fresh)) || "none";
  const at = entries.map(({ name }) => name).join(", ");
  return seen.length
    ? [
        `devices  ${count(seen)} at ${at}, ${fresh} of them with a handshake in the last ${FRESH / 60} minutes`,
      ]
    : [];
}

/** A box's message in one line. */
const shown = (text: string) => forTerminal(text).replaceAll(/[\n\t]/g, " ");

/** Merges the same problem of several boxes into one. */
export function merged(problems: readonly Problem[]): Problem[] {
  const one = new Map<string, Problem>();
  for (const { box, cause, remedy } of problems) {
    const before = one.get(`${cause}\n${remedy}`);
    one.set(`${cause}\n${remedy}`, { box: before ? `${before.box}, ${box}` : box, cause, remedy });
  }
  return [...one.values()];
}

/** A table with columns as wide as their longest cell; if the page is too narrow, the widest column is cut. */
function lay(
  rows: Row[],
  width: number,
  red: (text: string) => string,
  bold: (text: string) => string,
): string[] {
  const text = (cell: Cell | string) => shown(typeof cell === "string" ? cell : cell.text);
  const widths = (rows[0] ?? []).map((_, i) => Math.max(...rows.map((row) => text(row[i] ?? "").length)));
  const gap = rows.some((row) => row.length > 12) ? 1 : 2;
  for (;;) {
    const total = widths.reduce((sum, w) => sum + w + gap, -gap);
    const widest = Math.max(...widths);
    if (total <= width || widest <= 4) break;
    widths[widths.indexOf(widest)] = widest - 1;
  }
  return rows.map((row, r) =>
    row
      .map((cell, i) => {
        const [all, w] = [text(cell), widths[i] as number];
        const cut = all.length > w ? `${all.slice(0, w - 1)}…` : i === row.length - 1 ? all : all.padEnd(w);
        if (r === 0) return bold(cut);
        return typeof cell !== "string" && cell.wrong ? red(cut) : cut;
      })
      .join(" ".repeat(gap))
      .trimEnd(),
  );
}

const SHORT = (value: string | number | undefined) => (value === undefined ? "-" : String(value));

/** The nodes of the cluster, and the boxes of the settings that are not nodes. */
function nodeTable({ boxes, nodes }: Cluster): Row[] {
  const others = boxes.filter(({ node }) => !node);
  return [
    ["node", "ready", "internal", "external", "flannel", "MTU wg/cni"],
    ...nodes.map((node): Row => {
      const box = boxes.find(({ nodeName }) => nodeName === node.name);
      const home = isHome(node) || box?.ip === NAT;
      const ip = home ? undefined : (box?.ip ?? node.externalIp);
      return [
        node.name,
        { text: node.ready ? "yes" : "no", wrong: !node.ready },
        { text: SHORT(node.internalIp), wrong: (home && !isHome(node)) || (box?.inside && !isInside(node)) },
        { text: SHORT(node.externalIp), wrong: node.externalIp !== ip },
        // flannel's address of a node without a public one is its address at home: no peer uses it.
        { text: SHORT(node.publicIp), wrong: !home && node.publicIp !== ip },
        `${SHORT(box?.wireguard?.mtu)}/${SHORT(box?.cniMtu)}`,
      ];
    }),
    ...others.map((box): Row => [box.name, { text: "none", wrong: true }, "-", box.ip, "-", "-/-"]),
  ];
}

/** The state of each box of the settings. */
function boxTable({ boxes }: Cluster): Row[] {
  const middle = median(boxes.flatMap(({ clock }) => clock ?? []));
  return [
    ["box", "k3s", "kernel", "unit", "restarts", "up", "clock", "disk", "mem", "load"],
    ...boxes.map((box): Row => {
      const { state, restarts, runs } = box.unit;
      const ahead = box.clock === undefined ? undefined : box.clock - middle;
      // An agent of v1.36.3 may notify systemd minutes after its node is Ready (seen).
      const up = state === "active" || (state === "activating" && box.node?.ready);
      return [
        box.name,
        SHORT(box.node?.version || undefined),
        SHORT(box.kernel),
        { text: box.error === undefined ? state : "unseen", wrong: !up },
        SHORT(restarts),
        runs === undefined ? "-" : span(runs),
        ahead === undefined ? "-" : `${ahead <= -0.05 ? "-" : "+"}${span(Math.abs(ahead), 1)}`,
        box.disk === undefined ? "-" : `${box.disk}%`,
        box.load.memory === undefined ? "-" : `${box.load.memory}%`,
        {
          text: box.load.average === undefined ? "-" : `${box.load.average}/${box.load.cores ?? "?"}`,
          wrong: Boolean(overload(box.load)),
        },
      ];
    }),
  ];
}

/** From each node (a row) to each other: seconds since the last handshake, received and sent, and the endpoint. */
function wireguardTable({ boxes, nodes }: Cluster, width: number): Row[] {
  const shown = boxes.filter(({ error, wireguard }) => error === undefined && wireguard);
  const cell = (from: BoxReport, to: (typeof nodes)[number], short: boolean): Cell | string => {
    if (to.name === from.nodeName) return short ? "·" : "-";
    const peer = peerOf(from.peers, to.podCidr);
    if (!peer) return { text: short ? "x" : "no peer", wrong: true };
    const age = Math.floor(from.now - peer.handshake);
    const stands = standing(peer, to, nodes, from.now - FRESH);
    // Two nodes without a public address may not reach each other: a note says so.
    const far = isHome(to) && nodes.some((node) => node.name === from.nodeName && isHome(node));
    const wrong = !far && (!stands.fresh || stands.wrong !== undefined);
    const text = peer.handshake ? span(age) : short ? "x" : "never";
    return {
      text: short ? text.replace(/s$/, "") : `${text} ${size(peer.received)}/${size(peer.sent)}`,
      wrong,
    };
  };
  const endpoints = (to: (typeof nodes)[number]) => {
    const all = shown.flatMap(({ peers }) => peerOf(peers, to.podCidr)?.endpoint ?? []);
    return [...new Set(all)].join(" ") || "-";
  };
  const full: Row[] = [
    ["WireGuard", ...nodes.map(({ name }) => name), "endpoint"],
    ...nodes.map((to): Row => {
      const from = shown.find(({ nodeName }) => nodeName === to.name);
      return [to.name, ...nodes.map((n) => (from ? cell(from, n, false) : "?")), endpoints(to)];
    }),
  ];
  const wide = full.map((row) =>
    row.reduce((sum, c) => sum + 2 + (typeof c === "string" ? c : c.text).length, -2),
  );
  if (Math.max(...wide) <= width) return full;
  return [
    ["WireGuard", ...nodes.map((_, i) => String(i + 1))],
    ...nodes.map((to, i): Row => {
      const from = shown.find(({ nodeName }) => nodeName === to.name);
      return [`${i + 1} ${to.name}`, ...nodes.map((n) => (from ? cell(from, n, true) : "?"))];
    }),
  ];
}

/** A duration in at most three characters: 59s, 12m, 23h, 40d; below ten with one decimal, if asked for. */
function span(seconds: number, digits = 0): string {
  if (seconds < 99.5) return `${seconds.toFixed(seconds < 9.95 ? digits : 0)}s`;
  if (seconds < 5970) return `${Math.round(seconds / 60)}m`;
  return seconds < 172_800 ? `${Math.round(seconds / 3600)}h` : `${Math.round(seconds / 86_400)}d`;
}

/** Bytes, short: 900, 12K, 3.4M. */
function size(bytes: number): string {
  const [unit, scale] =
    bytes < 1000 ? ["", 1] : bytes < 1e6 ? ["K", 1e3] : bytes < 1e9 ? ["M", 1e6] : ["G", 1e9];
  const value = bytes / (scale as number);
  return `${unit && value < 9.95 ? value.toFixed(1) : Math.round(value)}${unit}`;
}

await main(import.meta, {
  about:
    "Shows the whole cluster, tests the connections between its boxes, and diagnoses problems. Changes nothing.",
  steps: [
    ask(
      [],
      [
        ...(["SERVER", "PUBLIC_IP", "PROXY_MODE", "SERVER_ARGS", "AGENT_ARGS", "TUNNEL_KUBELETS"] as const),
        ...(["NOTIFY_URL", "NOTIFY_FORM"] as const),
      ],
    ),
  ],
  readOnly: true,
  flags: {
    json: "one JSON object, for programs",
    watch: `again every ${PAUSE} s, until it is interrupted`,
  },
  work: check,
});

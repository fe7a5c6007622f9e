#!/usr/bin/env -S node --import tsx
/**
 * A fresh `make -j up` in a slow lab as a timeline: what each box does and what it waits for, moment by moment, and
 * the critical path, from the end back. It is told by the run itself: a module loaded before it notes when ssh is
 * started and ends, when a marked line of a box arrives (lib/protocol.ts) and what is said to the user. When k3s starts
 * and its node is Ready is in the boxes' journals. The picture goes to timeline.svg, or to the file that is named.
 *
 *     BOXES=9 MS=150   how many boxes, and their distance in milliseconds
 */
import { readFileSync, writeFileSync } from "node:fs";
import { loadavg } from "node:os";
import { join } from "node:path";
import { spread } from "../lab/lab.ts";
import { READY, slowLab, when } from "./slow.ts";

const COLOURS = {
  operator: "#8b949e",
  trip: "#388bfd",
  look: "#a371f7",
  change: "#d29922",
  k3s: "#3fb950",
  wait: "#f85149",
  idle: "#30363d",
};
const MEANS: Record<keyof typeof COLOURS, string> = {
  operator: "the operator's own work",
  trip: "round trips: logins, scripts",
  look: "looks",
  change: "changes",
  k3s: "k3s starts, until its node is Ready",
  wait: "until that is seen, handshakes, metrics",
  idle: "waits for another box",
};

/** It goes into the operator's process. Of a fact that comes early, which may be a secret, it notes the name. */
const HOOK = String.raw`
import childProcess from "node:child_process";
import { appendFileSync } from "node:fs";
import { syncBuiltinESMExports } from "node:module";
const note = (...words) =>
  appendFileSync(process.env.TIMELINE, JSON.stringify([performance.timeOrigin + performance.now(), ...words]) + "\n");
const { spawn } = childProcess;
let trips = 0;
childProcess.spawn = (program, argv, ...rest) => {
  const child = spawn(program, argv, ...rest);
  if (program !== "ssh" || argv.includes("-O")) return child;
  let id;
  let text = "";
  const { write } = child.stdin;
  child.stdin.write = (script, ...more) => {
    id = trips++;
    note("ssh", id, argv[argv.indexOf("--") + 1]);
    return write.call(child.stdin, script, ...more);
  };
  const { push } = child.stdout;
  child.stdout.push = (chunk, ...more) => {
    const lines = (text + (chunk ?? "")).split("\n");
    text = lines.pop();
    for (const line of lines) {
      const [mark, kind, what = ""] = line.split(" ");
      if (/^k3s-across-clouds(-[0-9a-f]{16}|:)$/.test(mark) && kind !== "beat") note(kind === "exit" ? "ended" : kind, id, what);
    }
    return push.call(child.stdout, chunk, ...more);
  };
  return child;
};
syncBuiltinESMExports();
const { write } = process.stderr;
process.stderr.write = (text, ...rest) => {
  for (const line of String(text).split("\n").filter(Boolean)) note("said", line);
  return write.call(process.stderr, text, ...rest);
};
`;

interface Part {
  kind: keyof typeof COLOURS;
  what: string;
  from: number;
  to: number;
}

/** When, of what kind, and to whom: a trip's number or a line of text. */
type Event = [number, string, number | string, string];

/** What a box did, without gaps. Times are in seconds since the command's start. */
type Row = { name: string; parts: Part[] /** When it let the others in. */; early?: number };

const boxes = Number(process.env.BOXES || 9);
const lab = await slowLab("timeline", spread(boxes), Number(process.env.MS || 150));
let rows: Row[];
let total: number;
try {
  const hook = join(lab.dir, "home/hook.mjs");
  const log = join(lab.dir, "home/timeline");
  writeFileSync(hook, HOOK);
  writeFileSync(log, "");
  const began = Date.now();
  const { exitCode, stderr } = await lab.op(["sh", "-c", `NODE_OPTIONS="--import ${hook}" exec make -j up`], {
    env: { TIMELINE: log },
  });
  total = (Date.now() - began) / 1000;
  if (exitCode) throw new Error(stderr);
  const since = (ms = Number.NaN) => (ms - began) / 1000;
  const events = readFileSync(log, "utf8")
    .trim()
    .split("\n")
    .map((line) => JSON.parse(line))
    .map(([ms, ...words]) => [since(ms), ...words] as Event);
  const [starts, readies] = [await when(lab, "Starting k3s"), await when(lab, READY)];
  rows = lab.boxes.map(({ name }, i) => rowOf(name, events, since(starts[i]), since(readies[i])));
} finally {
  await lab.down();
}

function rowOf(name: string, events: Event[], start: number, ready: number): Row {
  const row: Row = { name, parts: [] };
  const own = new Set(events.flatMap(([, kind, id, host]) => (kind === "ssh" && host === name ? [id] : [])));
  const said = events.flatMap(([time, kind, text]) =>
    kind === "said" && `${text}`.startsWith(`${name} `)
      ? [{ time, text: `${text}`.slice(name.length).replace(/^ {1,2}/, "") }]
      : [],
  );
  const whys = said.filter(({ text }) => !/^( |waits for|done|nothing to do|FAILED)/.test(text));
  let at = 0;
  let facts: [string, number][] = [];
  const until = (to: number, kind: Part["kind"], what: string) => {
    if (to > at + 0.005) row.parts.push({ kind, what, from: at, to });
    at = Math.max(at, to);
  };
  let now: Pick<Part, "kind" | "what"> = { kind: "operator", what: "make and node start" };
  for (const [time, kind, id, what] of events) {
    if (!own.has(id)) continue;
    if (kind === "fact" || kind === "end") {
      const last = facts.at(-1);
      if (last) last[1] = time - last[1];
      if (kind === "fact") facts.push([what, time]);
    }
    if (kind === "early") row.early = time;
    if (["early", "say", "begin"].includes(kind) || (kind === "fact" && facts.length > 1)) continue;
    if (kind === "ssh") {
      const waits = said.find(
        ({ time: t, text }) => t > at - 0.05 && t < time && text.startsWith("waits for"),
      );
      if (waits) now = { kind: "idle", what: waits.text };
    }
    if (/^(start|restart|wait until node) .* (is Ready|is healthy)/.test(now.what)) {
      if (start > at && start < time) until(start, "change", now.what);
      if (ready > at && ready < time) until(ready, "k3s", `k3s starts until ${name} is Ready`);
      now = { kind: "wait", what: "until Ready is seen, and handshakes" };
    }
    const slow = facts
      .filter(([, took]) => took > 0.1 && took < 1000)
      .map(([fact, took]) => `${fact} ${took.toFixed(1)}`);
    until(time, now.kind, `${now.what}${kind === "end" && slow.length ? ` (${slow.join(", ")})` : ""}`);
    if (kind === "ssh")
      now = { kind: "trip", what: row.parts.some((part) => part.kind === "trip") ? "round trip" : "login" };
    else if (kind === "fact") now = { kind: "look", what: "look" };
    else if (kind === "change") {
      const why = whys.shift()?.text ?? "";
      now = { kind: /kubectl top/.test(why) ? "wait" : "change", what: why };
    } else
      now = { kind: "operator", what: kind === "end" ? "the operator hears of it" : "the operator plans" };
    if (kind === "end") facts = [];
  }
  if (name === lab.boxes[0]?.name) until(total, "operator", "connections are closed");
  return row;
}

/** From the end back: a box that waits for another is followed to what let it go on. */
function critical(): (Part & { box: string })[] {
  const server = rows[0] as Row;
  const path: (Part & { box: string })[] = [];
  let box = server;
  let at = box.parts.at(-1)?.to ?? 0;
  while (at > 0.01) {
    const part = box.parts.findLast(({ from, to }) => from < at - 0.01 && to >= at - 0.01);
    if (!part) break;
    if (part.kind === "idle" && box !== server) {
      box = server;
      path.unshift({
        ...part,
        what: "the token's way through the operator",
        from: box.early ?? part.from,
        to: at,
        box: server.name,
      });
      at = box.early ?? part.from;
    } else if (part.kind === "idle") {
      const last = (row: Row) => row.parts.findLast(({ to }) => to <= at + 0.01)?.to ?? 0;
      box = rows.slice(1).reduce((a, b) => (last(b) > last(a) ? b : a));
      path.unshift({
        ...part,
        what: "the operator hears of the last box",
        from: last(box),
        to: at,
        box: server.name,
      });
      at = last(box);
    } else {
      path.unshift({ ...part, to: at, box: box.name });
      at = part.from;
    }
  }
  return path;
}

const seconds = (value: number) => `${value.toFixed(2).padStart(6)} s`;
const path = critical();
for (const { name, parts } of rows) {
  console.log(`\n${name}`);
  for (const { kind, what, from, to } of parts)
    console.log(`${seconds(from)} ${seconds(to - from)}  ${kind.padEnd(8)} ${what.slice(0, 120)}`);
}
console.log(`\nThe critical path of ${total.toFixed(1)} s (load ${loadavg()[0]?.toFixed(1)}):`);
for (const { kind, what, from, to, box } of path)
  console.log(
    `${seconds(from)} ${seconds(to - from)}  ${box.padEnd(4)} ${kind.padEnd(8)} ${what.slice(0, 120)}`,
  );
for (const kind of Object.keys(COLOURS) as Part["kind"][]) {
  const sum = path.filter((part) => part.kind === kind).reduce((all, { from, to }) => all + to - from, 0);
  console.log(`${seconds(sum)}  ${MEANS[kind]}`);
}
writeFileSync(process.argv[2] ?? join(import.meta.dirname, "timeline.svg"), picture());

function picture(): string {
  const [left, width, high, top] = [40, 960, 22, 10];
  const x = (time: number) => (left + (time / total) * width).toFixed(1);
  const text = (value: string) => value.replace(/[&<>]/g, (c) => `&#${c.charCodeAt(0)};`);
  const bottom = top + rows.length * high;
  const bars = rows.flatMap(({ name, parts }, i) => {
    const y = top + i * high;
    return [
      `<text x="4" y="${y + 15}">${name}</text>`,
      ...parts.map(({ kind, what, from, to }) => {
        const on = path.some((part) => part.box === name && part.from < to - 0.001 && part.to > from + 0.001);
        const line = on ? ' stroke="#e6edf3" stroke-width="2"' : "";
        return `<rect x="${x(from)}" y="${y + 2}" width="${(((to - from) / total) * width).toFixed(1)}" height="${high - 5}" fill="${COLOURS[kind]}"${line}><title>${name}: ${text(what)}, ${(to - from).toFixed(2)} s</title></rect>`;
      }),
    ];
  });
  const ticks = Array.from({ length: Math.floor(total) + 1 }, (_, t) => t).map(
    (t) =>
      `<path d="M${x(t)} ${top}V${bottom + 4}" stroke="#30363d"/><text x="${x(t)}" y="${bottom + 16}" text-anchor="middle">${t}</text>`,
  );
  const legend = (Object.keys(COLOURS) as Part["kind"][]).map((kind, i) => {
    const [lx, ly] = [left + (i % 3) * 320, bottom + 28 + Math.floor(i / 3) * 18];
    return `<rect x="${lx}" y="${ly}" width="12" height="12" fill="${COLOURS[kind]}"/><text x="${lx + 18}" y="${ly + 10}">${MEANS[kind]}</text>`;
  });
  const height = bottom + 28 + 3 * 18;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${left + width + 10} ${height}" font-family="sans-serif" font-size="12" fill="#e6edf3">
<title>make -j up of new boxes, moment by moment</title>
<rect width="100%" height="100%" fill="#0d1117"/>
${[...ticks, ...bars, ...legend].join("\n")}
</svg>
`;
}

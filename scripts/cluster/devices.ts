#!/usr/bin/env -S node --import tsx
/** Lists the devices with access to the cluster, as each entry sees them. Changes nothing. */
import { boxes } from "../../lib/boxes.ts";
import { ask } from "../../lib/check/survey.ts";
import { look } from "../../lib/converge.ts";
import { each, worst } from "../../lib/fleet.ts";
import { entryLook, type Seen, seenBy } from "../../lib/k3s/devices.ts";
import { main } from "../../lib/k3s/script.ts";
import { forTerminal, watch } from "../../lib/report.ts";
import type { Run } from "../../lib/script.ts";
import { NAT } from "../../lib/table.ts";

const HEAD = ["NAME", "ADDRESS", "ENTRY", "HANDSHAKE", "FROM IT", "TO IT", "FOR"];

const amount = (bytes: number) => {
  const step = Math.min(3, Math.floor(Math.log10(bytes || 1) / 3));
  return `${step ? (bytes / 1000 ** step).toFixed(1) : bytes} ${["B", "kB", "MB", "GB"][step]}`;
};
const ago = (seconds: number) =>
  seconds < 120
    ? `${seconds} s ago`
    : seconds < 7200
      ? `${Math.round(seconds / 60)} min ago`
      : `${Math.round(seconds / 3600)} h ago`;

/** A row of the list. @param now the entry's clock, in seconds. */
export const rowOf = (entry: string, now: number, device: Seen): string[] => [
  device.name,
  device.ip,
  entry,
  device.handshake ? ago(Math.max(0, now - device.handshake)) : "never",
  amount(device.received),
  amount(device.sent),
  [device.form, device.only && "services alone", device.lan].filter(Boolean).join(", "),
];

async function devices(run: Run): Promise<number> {
  const all = [...(await boxes(run, "SERVER")), ...(await boxes(run, "AGENTS"))];
  // A home node is no entry, and may be off.
  const cluster = all.filter(({ ip }) => ip !== NAT);
  await watch(cluster);
  const rows: string[][] = [];
  const done = await each(run, cluster, async (box) => {
    const facts = await look(box, [ask([...entryLook])]);
    rows.push(...seenBy(facts).map((seen) => rowOf(box.name, Number.parseInt(facts.now ?? "0", 10), seen)));
  });
  const list = [HEAD, ...rows.toSorted((one, other) => (`${one}` < `${other}` ? -1 : 1))];
  const widths = HEAD.map((_, i) => Math.max(...list.map((row) => (row[i] as string).length)));
  if (rows.length)
    for (const row of list)
      process.stdout.write(
        `${forTerminal(row.map((cell, i) => cell.padEnd(widths[i] as number)).join("  ")).trimEnd()}\n`,
      );
  else if (!worst(done)) process.stdout.write("No device has access: make device NAME=phone gives it\n");
  return worst(done);
}

await main(import.meta, {
  about:
    "Lists the devices with access to the cluster: address, last handshake, traffic and entry. Changes nothing.",
  steps: [ask([], ["SERVER", "AGENTS", "PUBLIC_IP"])],
  everyBox: "it asks them all",
  readOnly: true,
  work: devices,
});

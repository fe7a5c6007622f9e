#!/usr/bin/env -S node --import tsx
/**
 * A binary of 70 MB: to one box over a line of 200 ms that loses one packet in a thousand, cut after 20 MB and after
 * 25 more; then K3S_BIN from the operator, 50 ms away, to three boxes at once, and to where it is already.
 */
import { createHash, randomBytes } from "node:crypto";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { bench, MODERN, mirrored } from "../lab/suite.ts";
import { standIn } from "../stand-in/pack.ts";

const MB = 1e6;
const t = await bench({ name: "download", slow: true, tools: true, hairpin: ["a", "b"] });
try {
  t.settings();
  // What stands behind its last line is never read by sh.
  const text = standIn(MODERN);
  const lines = `exit\n${randomBytes(70 * MB * 0.75).toString("base64")}`;
  const file = text + lines.slice(0, 70 * MB - text.length);
  const { host, pathname } = new URL(t.lab.mirror.plain);
  writeFileSync(mirrored(t.lab, host, join(pathname, MODERN, "k3s")), file);
  writeFileSync(join(t.lab.dir, "home", "k3s"), file);
  const sum = createHash("sha256").update(file).digest("hex");
  const have = async () =>
    Number(await t.box("b1").sh("stat -c %s /usr/local/bin/k3s /usr/local/bin/.k3s-*.part 2>/dev/null || :"));
  const said = (what: string, seconds: number, rest: string) =>
    console.log(`${what.padEnd(44)} ${seconds.toFixed(1).padStart(6)} s  ${rest}`);

  await t.lab.line("b", 200, 0.1);
  const download = `make download-k3s HOST=b1 K3S_MIRRORS=${t.lab.mirror.plain} K3S_SHA256=${sum}`;
  let before = 0;
  for (const bytes of [20 * MB, 25 * MB, 0]) {
    await t.lab.mirror.fault(
      t.lab.mirror.plain,
      bytes ? { mode: "cut", bytes, only: "/k3s" } : { mode: "none" },
    );
    const run = await t.op(download, { timeout: 900 });
    const now = await have();
    said(
      `download, ${bytes ? `cut after ${bytes / MB} MB` : "to its end"}`,
      run.seconds,
      `${((now - before) / MB).toFixed(1)} MB came, status ${run.status}`,
    );
    before = now;
  }
  await t.lab.line("b", 0);

  await t.lab.line("op", 50);
  const sent = async () =>
    JSON.parse(await t.lab.net("op", "ip -s -j link show eth0"))[0].stats64.tx.bytes / MB;
  const push = 'make download-k3s HOST="a1 b1 b2" K3S_BIN=$HOME/k3s';
  for (const what of ["K3S_BIN to three boxes, one of which has it", "K3S_BIN again"]) {
    const bytes = await sent();
    const run = await t.ok(push);
    said(what, run.seconds, `${((await sent()) - bytes).toFixed(1)} MB sent`);
  }
} finally {
  await t.lab.down();
}

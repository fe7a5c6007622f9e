#!/usr/bin/env -S node --import tsx
/**
 * The rehearsal: the real commands on real boxes, in two clouds inside this machine.
 *
 *     rehearse.ts up        build the clouds (or go on with those that run), then `make -j up` in them
 *     rehearse.ts run CMD   any command as the rehearsal's operator
 *     rehearse.ts down      remove every trace
 *
 * K3S_VERSION picks the release, K3S_BIN a real k3s to run in place of the stand-in;
 * another one than before means new boxes.
 */
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { resolve } from "node:path";
import { attach, down, k3sVersion, type Lab, up } from "./lab.ts";

const NAME = "rehearse";
const started = Date.now();
const say = (line: string) =>
  console.error(`[${((Date.now() - started) / 1000).toFixed(1).padStart(5)} s] ${line}`);

async function rehearse() {
  const k3sBin = process.env.K3S_BIN && resolve(process.env.K3S_BIN);
  if (k3sBin && !existsSync(k3sBin)) throw new Error(`K3S_BIN: there is no "${k3sBin}"`);
  const version = k3sBin ? await k3sVersion(k3sBin) : process.env.K3S_VERSION;
  const lab = (await running(k3sBin, version)) ?? (await build(k3sBin, version));

  say(`make -j up, with ${lab.envFile}:`);
  const make = await lab.op(["make", "-j", "up"], { live: true, timeout: 3600 });
  if (make.exitCode) {
    say(
      `make -j up failed; the boxes stay: make in-rehearsal CMD='make -j up' tries again, make rehearse-down ends it`,
    );
    return make.exitCode ?? 1;
  }
  say("done; WireGuard between the boxes, seconds since the last handshake:");
  const whole = await handshakes(lab);
  console.error(
    k3sBin
      ? `\nThis was the real k3s of ${k3sBin}.`
      : "\nThe k3s in this rehearsal is a STAND-IN: a test tool that behaves like k3s as recorded, and runs no pods.\n" +
          "Boxes, NAT, ssh, downloads, systemd and WireGuard are real. For the real k3s: make rehearse K3S_BIN=…",
  );
  console.error(
    "Go on with: make in-rehearsal CMD='make agent HOST=b2'  (or CMD='ssh a1')\nRemove it:  make rehearse-down",
  );
  return whole ? 0 : 1;
}

/** The clouds of an earlier call, unless they were built for another k3s. */
async function running(k3sBin?: string, version?: string) {
  const lab = await attach(NAME);
  if (!lab) return;
  const had = /^K3S_VERSION=(.*)/m.exec(readFileSync(lab.envFile, "utf8"))?.[1];
  if (lab.k3sBin !== k3sBin || (version && version !== had)) return;
  say("the boxes run already (make rehearse-down to start afresh)");
  for (const box of lab.boxes) await box.sh("true").catch(() => box.on());
  return lab;
}

async function build(k3sBin?: string, version?: string) {
  say("building two clouds of the same private network, and three boxes");
  const lab = await up({ name: NAME, ...(k3sBin ? { k3sBin } : {}) }, say);
  for (const { name, privateIp, publicIp } of lab.boxes) say(`${name} is ${privateIp} behind ${publicIp}`);
  writeFileSync(lab.envFile, envFile(lab, version), { mode: 0o600 });
  return lab;
}

const envFile = (
  { boxes, mirror }: Lab,
  version?: string,
) => `# The rehearsal's cluster: a1 in one cloud, b1 and b2 in another.
SERVER=${boxes[0]?.name}
# HOST, or HOST=PUBLIC_IP.
AGENTS="${boxes
  .slice(1)
  .map(({ name, publicIp }, i) => (i ? `${name}=${publicIp}` : name))
  .join(" ")}"
# Each has the checksums for what the other serves.
K3S_MIRRORS="${mirror.plain} ${mirror.github}"
${version ? `K3S_VERSION=${version}\n` : ""}`;

/** Prints a table, a row for each box with what it knows of the others; true when all are fresh. */
async function handshakes({ boxes }: Lab) {
  const rows = await Promise.all(
    boxes.map(async (box) => {
      const text = await box.sh("date +%s; wg show all dump || true").catch(() => "0");
      const [now, ...lines] = text.trim().split("\n");
      const peers = lines.map((line) => line.split("\t")).filter((fields) => fields.length === 9);
      return boxes.map((other) => {
        if (other === box) return "-";
        const times = peers
          .filter((peer) => peer[3]?.startsWith(`${other.publicIp}:`))
          .map((peer) => Number(peer[5]));
        const last = Math.max(0, ...times);
        return !times.length ? "no peer" : last ? `${Number(now) - last}` : "never";
      });
    }),
  );
  const line = (cells: string[]) =>
    console.log(
      cells
        .map((cell) => cell.padEnd(10))
        .join("")
        .trimEnd(),
    );
  line(["from", ...boxes.map((box) => box.name), "public address"]);
  for (const [i, box] of boxes.entries()) line([box.name, ...(rows[i] ?? []), box.publicIp]);
  // WireGuard repeats a handshake every two minutes, and gives a peer up after three.
  return rows.flat().every((cell) => cell === "-" || Number(cell) < 180);
}

async function main([verb, ...words]: string[]): Promise<number> {
  if (verb === "up") return rehearse();
  if (verb === "down") {
    await down(NAME);
    say("no trace of the rehearsal is left");
    return 0;
  }
  if (verb !== "run" || !words.length) {
    console.error(
      readFileSync(import.meta.filename, "utf8")
        .match(/^ \* ?.*$/gm)
        ?.map((line) => line.slice(3))
        .join("\n"),
    );
    return 2;
  }
  const lab = await attach(NAME);
  if (!lab) throw new Error("No rehearsal is running: make rehearse");
  return (await lab.op(words.join(" "), { live: true, timeout: 24 * 3600 })).exitCode ?? 1;
}

try {
  process.exitCode = await main(process.argv.slice(2));
} catch (error) {
  console.error(error instanceof Error ? error.message : error);
  process.exitCode = 1;
}

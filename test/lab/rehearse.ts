#!/usr/bin/env -S node --import tsx
/**
 * The rehearsal: the real commands on real boxes, in two clouds and at home, inside this machine.
 *
 *     rehearse.ts up        build all that (or go on with what runs), then `make -j up` in it
 *     rehearse.ts kernel    clouds of their own, in which a CentOS 7 stand-in gets another kernel, and joins
 *     rehearse.ts run CMD   any command as the rehearsal's operator (the kernel's, if that runs)
 *     rehearse.ts down      remove every trace
 *
 * K3S_VERSION picks the release, K3S_BIN a real k3s to run in place of the stand-in;
 * another one than before means new boxes.
 */
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { resolve } from "node:path";
import { atHome, attach, down, k3sVersion, type Lab, up } from "./lab.ts";
import { addMachine, type Machine, REPOSITORIES } from "./vm.ts";

const NAME = "rehearse";
const KERNEL = "rehearse-kernel";
/** A box that joins no cluster. */
const LAPTOP = "h2";
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
      : "\nThe k3s in this rehearsal is a STAND-IN: a test tool that behaves like k3s as recorded, and runs no pods of yours.\n" +
          "Boxes, NAT, ssh, downloads, systemd and WireGuard are real. For the real k3s: make rehearse K3S_BIN=…",
  );
  console.error(
    `Go on with: make in-rehearsal CMD='make agent HOST=b2'  (or CMD='ssh a1')
A laptop at home, ${LAPTOP}, is no node:
            make in-rehearsal CMD='make device NAME=laptop FOR=linux'
            make in-rehearsal CMD='scp ~/devices/laptop.conf ${LAPTOP}:/etc/wireguard && ssh ${LAPTOP} wg-quick up laptop'
            make in-rehearsal CMD='ssh ${LAPTOP} curl -ks https://kubernetes.default.svc.cluster.local/version'
Remove it:  make rehearse-down`,
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
  say("building two clouds and a home with the same private network, and five boxes");
  const boxes = ["a1", "b1", "b2", "h1", LAPTOP];
  const lab = await up({ name: NAME, boxes, symmetric: ["h"], ...(k3sBin ? { k3sBin } : {}) }, say);
  for (const box of lab.boxes)
    say(`${box.name} is ${box.privateIp} ${atHome(box) ? "at home, " : ""}behind ${box.publicIp}`);
  // Installed on a busy machine, systemd-resolved may start before D-Bus knows its user.
  await lab.box(LAPTOP).sh(`apt-get -qq update
DEBIAN_FRONTEND=noninteractive apt-get -qq install wireguard-tools systemd-resolved >/dev/null 2>&1
mkdir -p /etc/wireguard; systemctl reload dbus; systemctl restart systemd-resolved`);
  writeFileSync(lab.envFile, envFile(lab, version), { mode: 0o600 });
  return lab;
}

/** The cluster's boxes. */
const nodesIn = ({ boxes }: Lab) => boxes.filter(({ name }) => name !== LAPTOP);

/** The article's steps 2 to 5 on a machine with a kernel of its own, in QEMU. */
async function rehearseKernel() {
  say("building two clouds of the same private network, and a server");
  const lab = await up({ name: KERNEL, boxes: ["a1"] }, say);
  writeFileSync(lab.envFile, kernelEnvFile(lab), { mode: 0o600 });
  const server = make(lab, "server");
  const machine = await addMachine(lab, "b3", say);
  say(`b3 is ${machine.privateIp} behind ${machine.publicIp}, ${await kernelOf(machine)}`);
  if (await server) return 1;
  for (const target of ["upgrade-kernel HOST=b3", "upgrade-kernel HOST=b3", "agent HOST=b3"]) {
    if (await make(lab, target)) return 1;
    say(`b3: ${await kernelOf(machine)}`);
  }
  console.log(await machine.sh("ip -o -d link show type wireguard; wg show flannel-wg; lsmod | grep ^ip_vs"));
  console.log(await lab.box("a1").sh("kubectl get nodes -o wide"));
  say(
    "done; CentOS 7 and k3s are stand-ins, kernels, restart and WireGuard real. Go on with: make in-rehearsal CMD='ssh b3'; remove it: make rehearse-down",
  );
  return 0;
}

async function make(lab: Lab, target: string) {
  say(`make ${target}`);
  const { exitCode } = await lab.op(`make ${target}`, { live: true, timeout: 3600 });
  if (exitCode) say(`make ${target} failed; the boxes stay: make in-rehearsal CMD='make ${target}'`);
  return exitCode;
}

const kernelOf = async (machine: Machine) =>
  (await machine.sh("echo kernel $(uname -r), boot $(cat /proc/sys/kernel/random/boot_id)")).trim();

const kernelEnvFile = ({ mirror }: Lab) => `# a1 in one cloud, b3 with its old kernel in another.
SERVER=a1
AGENTS=b3
PROXY_MODE=ipvs
K3S_MIRRORS="${mirror.plain} ${mirror.github}"
# In place of ELRepo's and EPEL's, which have no more packages for CentOS 7.
${Object.entries(REPOSITORIES)
  .map(([key, value]) => `${key}=${value}\n`)
  .join("")}`;

const envFile = (
  lab: Lab,
  version?: string,
) => `# The rehearsal's cluster: a1 in one cloud, b1 and b2 in another, h1 at home.
SERVER=a1
# HOST, HOST=PUBLIC_IP, or HOST=nat if it has no public address.
AGENTS="${nodesIn(lab)
  .slice(1)
  .map((box, i) => (atHome(box) ? `${box.name}=nat` : i ? `${box.name}=${box.publicIp}` : box.name))
  .join(" ")}"
# Each has the checksums for what the other serves.
K3S_MIRRORS="${lab.mirror.plain} ${lab.mirror.github}"
${version ? `K3S_VERSION=${version}\n` : ""}`;

/**
 * Prints a table, a row for each box with what it knows of the others; true when all are fresh. A box at home may be
 * known by any address.
 */
async function handshakes(lab: Lab) {
  const boxes = nodesIn(lab);
  const dumps = await Promise.all(
    boxes.map(async (box) => {
      const text = await box.sh("date +%s; wg show all dump || true").catch(() => "0");
      const [now, ...lines] = text.trim().split("\n");
      const rows = lines.map((line) => line.split("\t"));
      return { now: Number(now), keys: rows.filter((row) => row.length === 5).map((row) => row[2]), rows };
    }),
  );
  const rows = dumps.map(({ now, rows }, i) =>
    boxes.map((other, j) => {
      if (i === j) return "-";
      const peers = rows.filter(
        ({ length, 1: key, 3: endpoint }) =>
          length === 9 &&
          dumps[j]?.keys.includes(key) &&
          (atHome(other) || endpoint?.startsWith(`${other.publicIp}:`)),
      );
      const last = Math.max(0, ...peers.map((peer) => Number(peer[5])));
      return !peers.length ? "no peer" : last ? `${now - last}` : "never";
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
  for (const [i, box] of boxes.entries())
    line([box.name, ...(rows[i] ?? []), atHome(box) ? "none" : box.publicIp]);
  // WireGuard repeats a handshake every two minutes, and gives a peer up after three.
  return rows.flat().every((cell) => cell === "-" || Number(cell) < 180);
}

async function main([verb, ...words]: string[]): Promise<number> {
  if (verb === "up") return rehearse();
  if (verb === "kernel") return rehearseKernel();
  if (verb === "down") {
    for (const name of [NAME, KERNEL]) await down(name);
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
  const lab = (await attach(KERNEL)) ?? (await attach(NAME));
  if (!lab) throw new Error("No rehearsal is running: make rehearse");
  return (await lab.op(words.join(" "), { live: true, timeout: 24 * 3600 })).exitCode ?? 1;
}

try {
  process.exitCode = await main(process.argv.slice(2));
} catch (error) {
  console.error(error instanceof Error ? error.message : error);
  process.exitCode = 1;
}

#!/usr/bin/env -S node --import tsx
/**
 * The kernel's rehearsal: a CentOS 7 stand-in in QEMU, whose kernel has no WireGuard, gets one that has, restarts
 * into it, and joins a server in another cloud.
 *
 *     kernel.ts up        build it (once some minutes), then `make upgrade-kernel` and `make agent`
 *     kernel.ts run CMD   any command as its operator
 *     kernel.ts down      remove every trace
 */
import { writeFileSync } from "node:fs";
import { attach, down, type Lab, up } from "./lab.ts";
import { addMachine, type Machine, REPOSITORIES } from "./vm.ts";

const NAME = process.env.K3S_LAB_NAME || "rehearse-kernel";
const started = Date.now();
const say = (line: string) =>
  console.error(`[${((Date.now() - started) / 1000).toFixed(1).padStart(5)} s] ${line}`);

/** What the machine says of itself in one line. */
const kernelOf = async (machine: Machine) =>
  (await machine.sh("uname -r; cat /proc/sys/kernel/random/boot_id")).trim().replace("\n", ", boot ");

async function rehearse() {
  say("building two clouds of the same private network, and a server");
  const lab = await up({ name: NAME, boxes: ["a1"] }, say);
  writeFileSync(lab.envFile, envFile(lab), { mode: 0o600 });
  const server = make(lab, "server");
  say("starting the machine b3");
  const machine = await addMachine(lab, "b3", say);
  say(`b3 is ${machine.privateIp} behind ${machine.publicIp}, kernel ${await kernelOf(machine)}`);
  if (await server) return 1;
  if (await make(lab, "upgrade-kernel HOST=b3")) return 1;
  say(`b3: kernel ${await kernelOf(machine)}`);
  if (await make(lab, "upgrade-kernel HOST=b3")) return 1;
  if (await make(lab, "agent HOST=b3")) return 1;
  console.log(
    await machine.sh("ip -o -d link show type wireguard; wg show; modprobe ip_vs && lsmod | grep ^ip_vs"),
  );
  console.log(await lab.box("a1").sh("kubectl get nodes -o wide"));
  say("done. Go on with: kernel.ts run 'ssh b3', remove it: kernel.ts down");
  return 0;
}

async function make(lab: Lab, target: string) {
  say(`make ${target}`);
  const { exitCode } = await lab.op(`make ${target}`, { live: true, timeout: 3600 });
  say(`make ${target}: exit status ${exitCode}`);
  return exitCode;
}

const envFile = ({ mirror }: Lab) => `# a1 in one cloud, b3 with its old kernel in another.
SERVER=a1
AGENTS=b3
K3S_MIRRORS="${mirror.plain} ${mirror.github}"
${Object.entries(REPOSITORIES)
  .map(([key, value]) => `${key}=${value}\n`)
  .join("")}`;

async function main([verb, ...words]: string[]): Promise<number> {
  if (verb === "up") return rehearse();
  if (verb === "down") {
    await down(NAME);
    return 0;
  }
  const lab = await attach(NAME);
  if (verb !== "run" || !words.length || !lab) {
    console.error(lab ? "kernel.ts up | run CMD | down" : "It does not run: kernel.ts up");
    return 2;
  }
  return (await lab.op(words.join(" "), { live: true, timeout: 24 * 3600 })).exitCode ?? 1;
}

process.exitCode = await main(process.argv.slice(2));

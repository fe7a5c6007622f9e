/**
 * A machine with a kernel of its own in a lab's cloud, beside the nspawn boxes: QEMU, on a tap of the cloud's
 * LAN. It is a CentOS 7 stand-in, whose kernel has no WireGuard. It may be unplugged and restarted.
 */
import { existsSync } from "node:fs";
import { cp, mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { $ as zx } from "zx";
import { PACKAGES_URL } from "./cache.ts";
import { acquaint, type Box, type Lab, place } from "./lab.ts";
import { type Image, image } from "./vm-image.ts";
import { ELREPO_KERNEL_URL, ELREPO_URL, EPEL_HOST, EPEL_URL } from "./vm-rpms.ts";

const $ = zx({ quiet: true });

export type Machine = Box & { image: Image };

/** Settings under which the lab's repositories stand in for the real ones. */
export const REPOSITORIES = { ELREPO_URL, ELREPO_KERNEL_URL, EPEL_URL };

const MEMORY = 768;
/** Software emulation on a busy machine: seconds from power to ssh, at most. */
const BOOT = 600;

/** Machines that are added side by side are furnished in turn: the operator's files name them all. */
let turn: Promise<unknown> = Promise.resolve();

/** Adds a machine to a running lab, starts it and waits for its ssh. */
export async function addMachine(
  lab: Lab,
  name: string,
  say: (line: string) => void = () => {},
): Promise<Machine> {
  const furnished = turn.then(async () => {
    const made = await image(say);
    await publish(lab, made.repositories);
    await furnish(lab, name, made);
    await acquaint(lab.dir);
    return made;
  });
  turn = furnished.catch(() => {});
  const machine = handle(lab, name, await furnished);
  await machine.on();
  return machine;
}

/** What the lab's mirror serves from now on. */
async function publish(lab: Lab, repositories: string) {
  const site = join(lab.mirror.dir, new URL(PACKAGES_URL).hostname);
  for (const folder of ["elrepo", "elrepo-archive", "pub", "vault"])
    if (!existsSync(join(site, folder)))
      await cp(join(repositories, folder), join(site, folder), { recursive: true });
}

/** A layer over the image's disk, and a second disk: who the machine is, and the k3s stand-in. */
async function furnish(lab: Lab, name: string, { disk }: Image) {
  const home = join(lab.dir, "boxes", name);
  const { privateIp } = place(name);
  const seed = join(home, "seed");
  await mkdir(home);
  await $`cp -a --reflink=auto ${lab.dir}/stand-in ${seed}`;
  const put = async (path: string, text: string, mode = 0o644) => {
    const to = join(seed, ".identity", path);
    await mkdir(join(to, ".."), { recursive: true });
    await writeFile(to, text, { mode });
  };
  const mirror = new URL(PACKAGES_URL).hostname;
  await put("etc/hostname", `${name}\n`);
  await put("etc/hosts", `127.0.0.1 localhost\n127.0.1.1 ${name}\n${mirror} ${EPEL_HOST}\n`);
  await put(
    "etc/systemd/network/10-eth0.network",
    `[Match]
Name=eth0
[Network]
Address=${privateIp}/24
Gateway=192.168.0.1
LinkLocalAddressing=no
IPv6AcceptRA=no
`,
  );
  await put(
    "root/.ssh/authorized_keys",
    await readFile(join(lab.dir, "home/.ssh/id_ed25519.pub"), "utf8"),
    0o600,
  );
  await mkdir(join(seed, ".identity/etc/ssh"));
  const key = join(seed, ".identity/etc/ssh/ssh_host_ed25519_key");
  await $`ssh-keygen -q -t ed25519 -N ${""} -C ${name} -f ${key}`;
  await cp(`${key}.pub`, join(home, "host-key.pub"));
  await $`chmod 700 ${seed}/.identity/root ${seed}/.identity/root/.ssh`;

  const size = Number((await $`du -sm ${seed}`).stdout.split("\t")[0]);
  await $`mke2fs -q -t ext4 -O ${"^has_journal"} -L lab -d ${seed} ${home}/seed.raw ${Math.ceil(size * 1.1) + 16}M`;
  await rm(seed, { recursive: true });
  await $`qemu-img create -q -f qcow2 -b ${disk} -F raw ${home}/disk.qcow2`;
}

function handle(lab: Lab, name: string, made: Image): Machine {
  const { cloud, privateIp, publicIp } = place(name);
  const home = join(lab.dir, "boxes", name);
  const router = `router-${cloud}`;
  const n = publicIp.replace("198.51.", "").split(".").map(Number);
  const mac = ["02:00:c6:33", ...n.map((x) => x.toString(16).padStart(2, "0"))].join(":");
  // A flush by the guest reaches the file: what is lost with the power is what a real disk would lose.
  const words = `qemu-system-x86_64 -name ${lab.name}-${name} -machine pc ${made.accel} -smp 2 -m ${MEMORY}
    -nodefaults -display none -chardev file,id=log,path=${home}/console.log,append=on -serial chardev:log -pidfile ${home}/pid
    -device virtio-rng-pci -drive file=${home}/disk.qcow2,if=virtio,cache=writeback -drive
    file=${home}/seed.raw,if=virtio,format=raw,readonly=on -netdev tap,id=lan,ifname=${name},script=no,downscript=no
    -device virtio-net-pci,netdev=lan,mac=${mac},romfile=`.replace(/\s+/g, " ");

  const alive = async () =>
    (await lab.net(router, `kill -0 $(cat ${home}/pid) 2>/dev/null && echo yes || :`)) !== "";
  const start = async () => {
    await rm(join(home, "pid"), { force: true });
    await lab.net(
      router,
      `ip link show ${name} >/dev/null 2>&1 || { ip tuntap add dev ${name} mode tap; ip link set ${name} master lan up; }
ip address replace ${publicIp}/32 dev wan
nft "add element ip nat dnat4 { ${publicIp} : ${privateIp} }; add element ip nat snat4 { ${privateIp} : ${publicIp} }"
setsid nice -n 5 ${words} </dev/null >${home}/qemu.log 2>&1 &`,
    );
    for (const end = Date.now() + 20_000; !existsSync(join(home, "pid")); await sleep(50))
      if (Date.now() > end)
        throw new Error(`${name}: QEMU did not start:\n${await readFile(join(home, "qemu.log"), "utf8")}`);
  };
  const answers = async (seconds = BOOT) => {
    const end = Date.now() + seconds * 1000;
    while ((await lab.op(`ssh -o ConnectTimeout=3 ${name} true`, { timeout: 20 })).exitCode) {
      const log = await readFile(join(home, "qemu.log"), "utf8");
      if (!(await alive()) || Date.now() > end)
        throw new Error(
          `${name}: no ssh in ${seconds} s. Its console:\n${(await readFile(join(home, "console.log"), "utf8")).slice(-2000)}${log}`,
        );
      await sleep(500);
    }
  };
  const sh = async (script: string) => {
    const { exitCode, stdout, stderr } = await lab.op(["ssh", name, "sh -eu -s"], { input: script });
    if (exitCode) throw new Error(`${name}: exit status ${exitCode}: ${stdout}${stderr}`);
    return stdout;
  };
  const off = async () => {
    if (await alive()) await lab.net(router, `kill -9 $(cat ${home}/pid)`);
    while (await alive()) await sleep(50);
  };

  return {
    name,
    privateIp,
    publicIp,
    image: made,
    sh,
    off,
    answers,
    on: async () => {
      if (!(await alive())) await start();
      await answers();
    },
  };
}

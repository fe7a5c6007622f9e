/** What a kubelet and flannel leave on a box beside their processes: a pod's worth of each (v1.17.6, v1.36.3, recorded). */
import { spawn, spawnSync } from "node:child_process";
import { copyFileSync, existsSync, mkdirSync, readFileSync } from "node:fs";
import { dirname } from "node:path";
import { type Generation, log, run } from "./common.ts";
import { COMPILED, HOME } from "./pack.ts";
import { podAddress, restore } from "./services.ts";

const SHIM = "/var/lib/rancher/k3s/data/stand-in/bin/containerd-shim-runc-v2";
const POD = "00000000-0000-0000-0000-000000000001";
const NETNS = `cni-${POD}`;
const MOUNTS = [
  `/var/lib/kubelet/pods/${POD}/volumes/kubernetes.io~secret/token`,
  `/run/k3s/containerd/io.containerd.grpc.v1.cri/sandboxes/${POD}/shm`,
];

const MASQ = '-m comment --comment "flanneld masq"';
const FWD = '-m comment --comment "flanneld forward"';
/** v1.17's flannel signs none of its rules. */
const flannel = (gen: Generation, subnet: string): string[] =>
  gen === "old"
    ? [
        "*nat",
        "-A POSTROUTING -s 10.42.0.0/16 -d 10.42.0.0/16 -j RETURN",
        "-A POSTROUTING -s 10.42.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully",
        `-A POSTROUTING ! -s 10.42.0.0/16 -d ${subnet} -j RETURN`,
        "-A POSTROUTING ! -s 10.42.0.0/16 -d 10.42.0.0/16 -j MASQUERADE --random-fully",
        "COMMIT",
        "*filter",
        "-A FORWARD -s 10.42.0.0/16 -j ACCEPT",
        "-A FORWARD -d 10.42.0.0/16 -j ACCEPT",
        "COMMIT",
      ]
    : [
        "*nat",
        ":FLANNEL-POSTRTG - [0:0]",
        `-A POSTROUTING ${MASQ} -j FLANNEL-POSTRTG`,
        `-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 ${MASQ} -j RETURN`,
        `-A FLANNEL-POSTRTG -s ${subnet} -d 10.42.0.0/16 ${MASQ} -j RETURN`,
        `-A FLANNEL-POSTRTG -s 10.42.0.0/16 -d ${subnet} ${MASQ} -j RETURN`,
        `-A FLANNEL-POSTRTG ! -s 10.42.0.0/16 -d ${subnet} ${MASQ} -j RETURN`,
        `-A FLANNEL-POSTRTG -s 10.42.0.0/16 ! -d 224.0.0.0/4 ${MASQ} -j MASQUERADE --random-fully`,
        `-A FLANNEL-POSTRTG ! -s 10.42.0.0/16 -d 10.42.0.0/16 ${MASQ} -j MASQUERADE --random-fully`,
        "COMMIT",
        "*filter",
        ":FLANNEL-FWD - [0:0]",
        `-A FORWARD ${FWD} -j FLANNEL-FWD`,
        `-A FLANNEL-FWD -s 10.42.0.0/16 ${FWD} -j ACCEPT`,
        `-A FLANNEL-FWD -d 10.42.0.0/16 ${FWD} -j ACCEPT`,
        "COMMIT",
      ];

/** What flannel's CNI plugin goes by, whoever wrote it: a kubelet starts its pods as soon as it is there. */
export const SUBNET = "/run/flannel/subnet.env";

/** Once a box and boot: k3s that starts again finds its pods, and adopts them. Tried until it works, as a kubelet does. */
export function startPod(gen: Generation, podCidr: string, node: string): void {
  try {
    for (const folder of ["/var/log/pods", "/var/log/containers", "/var/lib/cni"])
      mkdirSync(folder, { recursive: true });
    const mounts = run("cat", "/proc/self/mounts");
    for (const path of MOUNTS.filter((path) => !mounts.includes(path))) {
      mkdirSync(path, { recursive: true });
      run("mount", "-t", "tmpfs", "tmpfs", path);
    }
    if (!existsSync(`/run/netns/${NETNS}`)) run("ip", "netns", "add", NETNS);
    if (!existsSync("/sys/class/net/cni0")) {
      // Modern pods have flannel-wg's MTU; v1.17's the card's (both recorded).
      const mtu = /^FLANNEL_MTU=(\d+)$/m.exec(readFileSync(SUBNET, "utf8"))?.[1] as string;
      const gateway = podCidr.replace(/\.0\/24$/, ".1");
      run("ip", "link", "add", "cni0", "mtu", mtu, "type", "bridge");
      const veth = ["type", "veth", "peer", "name", "eth0", "mtu", mtu, "netns", NETNS];
      run("ip", "link", "add", "veth0000", "mtu", mtu, ...veth);
      run("ip", "link", "set", "veth0000", "master", "cni0", "up");
      run("ip", "addr", "add", `${gateway}/24`, "dev", "cni0");
      run("ip", "link", "set", "cni0", "up");
      run("ip", "-n", NETNS, "link", "set", "lo", "up");
      run("ip", "-n", NETNS, "addr", "add", `${podAddress(podCidr)}/24`, "dev", "eth0");
      run("ip", "-n", NETNS, "link", "set", "eth0", "up");
      run("ip", "-n", NETNS, "route", "add", "default", "via", gateway);
    }
    if (!run("ps", "-e", "-o", "args=").includes(SHIM)) {
      mkdirSync(dirname(SHIM), { recursive: true });
      // A process goes by the path it was started by, so a shell by the name of the shim is one.
      if (!existsSync(SHIM)) copyFileSync("/bin/sh", SHIM);
      spawnSync("chmod", ["755", SHIM]);
      const server = `${process.execPath} --no-warnings ${HOME}/pod.ts ${node}`;
      spawn(SHIM, ["-c", `nsenter --net=/run/netns/${NETNS} ${server} & wait`], {
        cwd: "/",
        detached: true,
        stdio: "ignore",
        env: { PATH: process.env.PATH, ...COMPILED(HOME) },
      }).unref();
    }
    const rules = flannel(gen, podCidr);
    if (!run("iptables-save").includes(rules.find((rule) => rule.startsWith("-A")) as string))
      restore(rules, ["--noflush"]);
  } catch (error) {
    log("error", `stand-in: a pod's traces: ${(error as { stderr?: string }).stderr ?? error}`);
    setTimeout(() => startPod(gen, podCidr, node), 5000);
  }
}

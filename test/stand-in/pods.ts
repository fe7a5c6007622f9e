/** What a kubelet, a kube-proxy and flannel leave on a box beside their processes: a pod's worth of each (v1.17.6, v1.36.3, recorded). */
import { spawn, spawnSync } from "node:child_process";
import { copyFileSync, existsSync, mkdirSync, readFileSync } from "node:fs";
import { dirname } from "node:path";
import { type Generation, log, run } from "./common.ts";

const SHIM = "/var/lib/rancher/k3s/data/stand-in/bin/containerd-shim-runc-v2";
const POD = "00000000-0000-0000-0000-000000000001";
const NETNS = `cni-${POD}`;
const MOUNTS = [
  `/var/lib/kubelet/pods/${POD}/volumes/kubernetes.io~secret/token`,
  `/run/k3s/containerd/io.containerd.grpc.v1.cri/sandboxes/${POD}/shm`,
];

/** v1.17's flannel signs none of its rules. */
const flannel = (gen: Generation, subnet: string): string[] =>
  gen === "old"
    ? [
        "*nat",
        "-A POSTROUTING -s 10.42.0.0/16 -d 10.42.0.0/16 -j RETURN",
        `-A POSTROUTING ! -s 10.42.0.0/16 -d ${subnet} -j RETURN`,
        "COMMIT",
        "*filter",
        "-A FORWARD -s 10.42.0.0/16 -j ACCEPT",
        "-A FORWARD -d 10.42.0.0/16 -j ACCEPT",
        "COMMIT",
      ]
    : [
        "*filter",
        ":FLANNEL-FWD - [0:0]",
        "-A FORWARD -j FLANNEL-FWD",
        "-A FLANNEL-FWD -s 10.42.0.0/16 -j ACCEPT",
        "COMMIT",
      ];
const KUBE = [
  "*nat",
  ":KUBE-SERVICES - [0:0]",
  ":KUBE-POSTROUTING - [0:0]",
  "-A PREROUTING -j KUBE-SERVICES",
  "-A POSTROUTING -j KUBE-POSTROUTING",
  "COMMIT",
  "*filter",
  ":KUBE-FORWARD - [0:0]",
  "-A FORWARD -j KUBE-FORWARD",
  "COMMIT",
];

/** What flannel's CNI plugin goes by, whoever wrote it: a kubelet starts its pods as soon as it is there. */
export const SUBNET = "/run/flannel/subnet.env";

/** Once a box and boot: k3s that starts again finds its pods, and adopts them. Tried until it works, as a kubelet does. */
export function startPod(gen: Generation, podCidr: string, nftables: boolean): void {
  try {
    for (const folder of ["/var/log/pods", "/var/log/containers", "/var/lib/cni"])
      mkdirSync(folder, { recursive: true });
    if (!run("ps", "-e", "-o", "args=").includes(SHIM)) {
      mkdirSync(dirname(SHIM), { recursive: true });
      // A process goes by the path it was started by, so a shell by the name of the shim is one.
      if (!existsSync(SHIM)) copyFileSync("/bin/sh", SHIM);
      spawnSync("chmod", ["755", SHIM]);
      spawn(SHIM, ["-c", "sleep infinity & wait"], {
        detached: true,
        stdio: "ignore",
        env: { PATH: process.env.PATH },
      }).unref();
    }
    const mounts = run("cat", "/proc/self/mounts");
    for (const path of MOUNTS.filter((path) => !mounts.includes(path))) {
      mkdirSync(path, { recursive: true });
      run("mount", "-t", "tmpfs", "tmpfs", path);
    }
    if (!existsSync(`/run/netns/${NETNS}`)) run("ip", "netns", "add", NETNS);
    if (!existsSync("/sys/class/net/cni0")) {
      // Modern pods have flannel-wg's MTU; v1.17's the card's (both recorded).
      const mtu = /^FLANNEL_MTU=(\d+)$/m.exec(readFileSync(SUBNET, "utf8"))?.[1] as string;
      run("ip", "link", "add", "cni0", "mtu", mtu, "type", "bridge");
      const veth = ["type", "veth", "peer", "name", "eth0", "mtu", mtu, "netns", NETNS];
      run("ip", "link", "add", "veth0000", "mtu", mtu, ...veth);
      run("ip", "link", "set", "veth0000", "master", "cni0", "up");
      run("ip", "addr", "add", podCidr.replace(/\.0\/24$/, ".1/24"), "dev", "cni0");
      run("ip", "link", "set", "cni0", "up");
    }
    if (nftables) run("nft", "add", "table", "ip", "kube-proxy");
    for (const rules of [flannel(gen, podCidr), ...(nftables ? [] : [KUBE])])
      if (!run("iptables-save").includes(rules.find((rule) => rule.startsWith("-A")) as string)) {
        const said = spawnSync("iptables-restore", ["--noflush"], {
          input: `${rules.join("\n")}\n`,
          encoding: "utf8",
        });
        if (said.status !== 0) throw new Error(`iptables-restore: ${said.stderr}`);
      }
  } catch (error) {
    log("error", `stand-in: a pod's traces: ${(error as { stderr?: string }).stderr ?? error}`);
    setTimeout(() => startPod(gen, podCidr, nftables), 5000);
  }
}

/** The WireGuard interface, by the real `ip` and `wg`. Where the kernel has no WireGuard, old k3s takes wireguard-go. */
import { spawnSync } from "node:child_process";
import { chmodSync, existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { type Generation, run, sleep } from "./common.ts";
import type { Peer } from "./nodes.ts";
import { noWireguard } from "./words.ts";

export const interfaceName = (gen: Generation): string => (gen === "old" ? "flannel.1" : "flannel-wg");
const exists = (name: string): boolean => existsSync(`/sys/class/net/${name}`);
const POST_START =
  "export SUBNET_IP=$(echo $SUBNET | cut -d'/' -f 1); ip link del flannel.1 2>/dev/null; echo $PATH >&2; wg-add.sh flannel.1 && wg set flannel.1 listen-port 51820 private-key privatekey && ip addr add $SUBNET_IP/32 dev flannel.1 && ip link set flannel.1 up && ip route add $NETWORK dev flannel.1";

/** A new key at every start in the working directory, as readable as the umask lets it (v1.17); one key in /run (modern). */
export function publicKey(gen: Generation): string {
  if (gen === "old") {
    const made = spawnSync("sh", ["-c", "wg genkey | tee privatekey | wg pubkey"], { encoding: "utf8" });
    if (made.status !== 0)
      throw new Error(
        `failed to run command: wg genkey | tee privatekey | wg pubkey Err: exit status ${made.status} Output: ${made.stderr.trim()}`,
      );
    return made.stdout.trim();
  }
  if (spawnSync("wg", ["--version"]).error)
    throw new Error("stand-in: wg not found (modern k3s itself does without)");
  mkdirSync("/run/flannel", { recursive: true, mode: 0o755 });
  const path = "/run/flannel/wgkey";
  if (!existsSync(path)) {
    writeFileSync(path, run("wg", "genkey").trim(), { mode: 0o400 });
    chmodSync(path, 0o400);
  }
  return spawnSync("wg", ["pubkey"], { input: readFileSync(path), encoding: "utf8" }).stdout.trim();
}

/** The interface anew: what stood there, with its peers, goes. */
export async function bringUp(gen: Generation, podCidr: string, network: string): Promise<void> {
  const name = interfaceName(gen);
  const failed = (output: string): Error =>
    new Error(
      gen === "old"
        ? `failed to run command: ${POST_START} Err: exit status 1 Output: ${process.env.PATH}\n${output.trim()}`
        : noWireguard,
    );
  if (exists(name)) {
    run("ip", "link", "del", name);
    // wireguard-go takes its socket away when it ends, late on a busy machine: the next one's must not be it.
    const socket = `/var/run/wireguard/${name}.sock`;
    for (let i = 0; (exists(name) || existsSync(socket)) && i < 100; i++) await sleep(50);
  }
  const kernel = spawnSync("ip", ["link", "add", name, "type", "wireguard"], { encoding: "utf8" });
  if (kernel.status !== 0) {
    if (gen === "modern") throw failed("");
    // A pipe would stay open in the daemon that wireguard-go leaves behind.
    const user = spawnSync("wireguard-go", [name], {
      stdio: "ignore",
      env: { ...process.env, NOTIFY_SOCKET: "" },
    });
    for (let i = 0; !exists(name) && i < 100; i++) await sleep(50);
    if (user.status !== 0 || !exists(name))
      throw failed(
        `${kernel.stderr.trim()}\nwireguard-go: ${user.error?.message ?? `exit status ${user.status}`}`,
      );
  }
  try {
    run(
      "wg",
      "set",
      name,
      "listen-port",
      "51820",
      "private-key",
      gen === "old" ? "privatekey" : "/run/flannel/wgkey",
    );
    run("ip", "addr", "add", `${podCidr.split("/")[0]}/32`, "dev", name);
    run("ip", "link", "set", name, "mtu", "1420", "up");
    run("ip", "route", "add", network, "dev", name, "scope", "link");
  } catch (error) {
    throw gen === "old" ? failed(String((error as { stderr?: string }).stderr ?? error)) : error;
  }
  mkdirSync("/run/flannel", { recursive: true, mode: 0o755 });
  const subnet = podCidr.replace(/\.0\/24$/, ".1/24");
  writeFileSync(
    "/run/flannel/subnet.env",
    `FLANNEL_NETWORK=${network}\nFLANNEL_SUBNET=${subnet}\nFLANNEL_MTU=${gen === "old" ? 1500 : 1420}\nFLANNEL_IPMASQ=true\n`,
  );
}

export const setPeer = (gen: Generation, p: Peer): string =>
  run(
    "wg",
    "set",
    interfaceName(gen),
    "peer",
    p.key,
    "endpoint",
    p.endpoint,
    "persistent-keepalive",
    "25",
    "allowed-ips",
    p.allowed,
  );

export const removePeer = (gen: Generation, key: string): string =>
  run("wg", "set", interfaceName(gen), "peer", key, "remove");

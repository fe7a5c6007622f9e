/** What k3s says when something is wrong, word for word. */
import type { Generation } from "./common.ts";

export const NO_ROUTE = `no default routes found in "/proc/net/route" or "/proc/net/ipv6_route"`;
export const FORMAT: Record<Generation, string> = {
  old: "token credentials are the wrong format",
  modern: "invalid token format",
};

export const scheme = (url: string): string => `only https:// URLs are supported, invalid scheme: ${url}`;
export const reset = (port: number, host: string): string =>
  `read tcp 127.0.0.1:${port}->${host}: read: connection reset by peer`;
export const got = (url: string, why: string): string => `Get ${JSON.stringify(url)}: ${why}`;

/** Before an agent trusts the server. `url` is its own load balancer's, `server` the one it was given. */
export const connecting = (gen: Generation, server: string, why: string): string =>
  gen === "old" ? why : `Failed to validate connection to cluster at ${server}: ${why}`;
export const noCa = (gen: Generation, url: string, why: string): string =>
  gen === "old" ? `failed to get CA certs at ${url}: ${why}` : `failed to get CA certs: ${why}`;
export const wrongCa = (gen: Generation, have: string, is: string): string =>
  gen === "old"
    ? `token does not match the server ${have} != ${is}`
    : `token CA hash does not match the Cluster CA certificate hash: ${have} != ${is}`;
export const unauthorized = (url: string): string => `token is not valid: ${url}/apis: 401 Unauthorized`;

/** After that, until it has its configuration. */
export const waiting = (gen: Generation, why: string): string =>
  gen === "old" ? why : `Waiting to retrieve agent configuration; server is not ready: ${why}`;
export const noConfig = (why: string): string => `failed to retrieve configuration from server: ${why}`;
export const rejected = (gen: Generation, certificate: string): string =>
  `${gen === "old" ? "" : `${certificate}: `}Node password rejected, duplicate hostname or contents of '/etc/rancher/node/password' may not match server node-passwd entry, try enabling a unique node name with the --with-node-id flag`;

/** Reasons to end. */
export const ending = (gen: Generation, why: string): string => (gen === "old" ? why : `Error: ${why}`);
export const asksShutdown = (why: string): string => `Shutdown request received: ${JSON.stringify(why)}`;
export const portTaken = (gen: Generation, address: string, why: string): string =>
  `${gen === "old" ? "starting kubernetes: preparing server: start cluster and https" : "preparing server: failed to start supervisor listener"}: listen tcp ${address}: bind: ${why}`;
export const otherToken =
  "preparing server: failed to bootstrap cluster data: bootstrap data already found and encrypted with different token";
export const unknownBackend = (gen: Generation, backend: string): string =>
  `${gen === "old" ? "" : "failed to start networking: "}Cannot configure unknown flannel backend '${backend}'`;
/** The kubelet's own (cmd/kubelet/app/server.go, pkg/kubelet/apis/config/validation), from v1.35 on. */
export const noCgroup1 =
  "kubelet exited: failed to validate kubelet configuration, error: kubelet is configured to not run on a host using cgroup v1. cgroup v1 support is unsupported and will be removed in a future release, path: &TypeMeta{Kind:,APIVersion:,}";
export const unknownKubeletFlag = (flag: string): string =>
  `kubelet exited: failed to parse kubelet flag: unknown flag: --${flag}`;
/** k3s's own (pkg/agent/run.go): what it asked for before it knew cgroup v2, and since. */
export const noMemory =
  'failed to find memory cgroup, you may need to add "cgroup_memory=1 cgroup_enable=memory" to your linux cmdline (/boot/cmdline.txt on a Raspberry Pi)';
export const noController = (name: string): string => `failed to find ${name} cgroup (v2)`;
export const noWireguard =
  "failed to register flannel network: could not create wireguard interface: operation not supported";

/** The two generations of k3s, its arguments, and its systemd unit. */

import { lastOf, parseArgs } from "../args.ts";
import type { Settings } from "../settings.ts";
import { sh } from "../sh.ts";
import { type Facts, prints } from "../step.ts";
import { NAT } from "../table.ts";
import { splitWords } from "../text.ts";
import { configArgs } from "./args.ts";
import { compare } from "./releases.ts";

export const K3S = "/usr/local/bin/k3s";

/** k3s has two ways of using WireGuard. */
export type Generation = "old" | "modern";
export type Role = "server" | "agent";

/** The interface that flannel makes: `flannel.1` by the old extension backend, `flannel-wg` since wireguard-native. */
export const interfaceOf = (generation: Generation): string =>
  generation === "old" ? "flannel.1" : "flannel-wg";

/** flannel's backend in a node's annotation: nodes with the other backend are not peers. */
export const backendOf = (generation: Generation): string =>
  generation === "old" ? "extension" : "wireguard";

/**
 * The generation of a k3s release. From v1.23 to v1.25 both backends' names exist, so the binary's help decides:
 * `flags` has its lines about the modern one; without it the generation is not known yet.
 */
export function generationOf(version: string, flags?: string): Generation | undefined {
  const minor = Number(/^v1\.(\d+)\./.exec(version)?.[1]);
  if (minor < 23) return "old";
  if (minor > 25) return "modern";
  if (!minor || flags === undefined) return undefined;
  return flags.includes("--flannel-external-ip") && flags.includes("wireguard-native") ? "modern" : "old";
}

/** Facts about the binary: its version, and for v1.23 to v1.25 the lines of its help about the modern backend. */
export const binaryLook = prints("version flags")(sh`said=$(${K3S} --version 2>/dev/null)
fact version; case $said in *'k3s version v'*) said=\${said#*'k3s version '}; echo "\${said%%[ 
]*}" ;; esac
fact flags; case $said in v1.2[345].*) ${K3S} server --help | grep -oE -- '--flannel-(backend|external-ip)|wireguard-native' ;; esac
`);

/**
 * The fact `processes`: what systemd knows about the server's unit, an empty line, the agent's. Asked for once a look,
 * since a systemctl takes as long as ten small programs: the looks behind it read $server_unit and $agent_unit by
 * `property UNIT NAME`, which sets $value.
 */
export const shownLook = prints("processes")(sh`show() {
  systemctl show "$@" -p ActiveState -p MainPID -p ExecMainStartTimestampMonotonic -p NeedDaemonReload \
    -p NRestarts -p UnitFileState -p FragmentPath -p DropInPaths 2>/dev/null
}
units=$(show k3s k3s-agent)
server_unit=\${units%%

*}
agent_unit=\${units#"$server_unit"}
agent_unit=\${agent_unit#

}
property() {
  value=\${1#*"$2="}
  if [ "$value" = "$1" ]; then value=; else value=\${value%%
*}; fi
}
fact processes; printf '%s\n\n%s\n' "$server_unit" "$agent_unit"
`);

/** The fact `named`: what the box's unit says its node is called. */
export const nameLook = prints("named")(
  sh`fact named; for f in /etc/systemd/system/k3s.service /etc/systemd/system/k3s-agent.service; do [ ! -s $f ] || sed -n 's/.*[[:space:]]--node-name=\([a-z0-9.-]*\).*/\1/p' $f; done`,
);

/** The release that the box will run: K3S_VERSION, or what a pushed K3S_BIN reported. */
export function releaseOf(
  want: Settings,
  facts: Facts<"version" | "flags" | "sha256">,
): { version: string; generation?: Generation } {
  const installed = facts.version?.trim();
  const there = facts.sha256 === undefined || facts.sha256.trim() === want.K3S_SHA256;
  const version = want.K3S_BIN && there ? (installed ?? "") : want.K3S_VERSION;
  // Every release's help has --flannel-backend: otherwise it is not the help.
  const asked = installed === version && facts.flags?.includes("--flannel-backend");
  const generation = generationOf(version, asked ? facts.flags : undefined);
  return generation ? { version, generation } : { version };
}

/** Facts about cgroups: v2's controllers, which only its root has, or v1 (both with the controllers in v1 count as v1). */
export const cgroupLook = prints(
  "cgroup",
)(`fact cgroup; if [ -f /sys/fs/cgroup/cgroup.controllers ]; then echo cgroup2fs; text /sys/fs/cgroup/cgroup.controllers
elif [ -d /sys/fs/cgroup ]; then echo tmpfs; fi
`);

/** The cgroup version, and v2's controllers; undefined if not known. */
function cgroupOf(facts: Facts<"cgroup">): { version: 1 | 2; controllers: string[] } | undefined {
  const [type = "", controllers = ""] = facts.cgroup?.trim().split("\n") ?? [];
  if (!type) return undefined;
  return { version: type === "cgroup2fs" ? 2 : 1, controllers: splitWords(controllers) };
}

/** Why a release of k3s cannot run with a box's cgroups, and the remedy. */
export function cgroupFault(release: string, facts: Facts): string | undefined {
  const cgroup = cgroupOf(facts);
  if (!release || cgroup?.version !== 2) return undefined;
  if (compare(release, "v1.20.4+k3s1") < 0)
    return `k3s ${release} runs on cgroup v1 only, and this box has cgroup v2: take v1.20.4+k3s1 or later, or restart it with systemd.unified_cgroup_hierarchy=0 on its kernel's command line (systemd 256 and later have given that up)`;
  const missing = ["cpu", "cpuset", "memory"].filter((name) => !cgroup.controllers.includes(name));
  if (missing.length === 0) return undefined;
  const how = missing.includes("memory")
    ? "cgroup_enable=memory on its kernel's command line gives it (Raspberry Pi: /boot/firmware/cmdline.txt)"
    : "another program may have mounted them as cgroup v1 (grep cgroup /proc/mounts)";
  return `This box's cgroup v2 has no ${missing.join(", ")} controller, which k3s needs: ${how}; then restart it`;
}

/** Since v1.35 the kubelet exits on cgroup v1 unless failCgroupV1 is false (KubeletConfiguration). */
export function cgroupArgs(role: Role, release: string, want: Settings, facts: Facts): string[] {
  if (cgroupOf(facts)?.version !== 1 || Number(release.split(".")[1]) < 35) return [];
  const own = [
    ...parseArgs(role === "server" ? want.SERVER_ARGS : want.AGENT_ARGS),
    ...configArgs(want.K3S_CONFIG),
  ];
  const told = own.some(({ flag, value }) => flag === "kubelet-arg" && value?.includes("fail-cgroupv1"));
  return told ? [] : ["--kubelet-arg=fail-cgroupv1=false"];
}

/** `--node-name` out of a role's arguments. */
export const nodeNameIn = (args: string): string | undefined =>
  lastOf(parseArgs(args), "node-name")?.toLowerCase();

/**
 * The article's `--node-ip <public_ip>` for both generations, with the public address put on `lo` first where no
 * network card has it. It gives every node a unique InternalIP even when two clouds use the same private address, and
 * lets a box reach its own public address without hairpin NAT. Without the address on `lo`, v1.17.6 dies with "host IP
 * unknown" until its node has addresses by luck.
 *
 * A box without a public address has its address inside the tunnel instead, once it has a pod network; with
 * TUNNEL_KUBELETS every box, which then keeps its public one as --node-external-ip.
 *
 * @param name of the node, which stays when the box gets another host name.
 * @param more arguments that the box needs; the user's own come last.
 */
export function argsOf(
  role: Role,
  generation: Generation,
  want: Settings,
  proxyMode: string,
  name: string,
  more: readonly string[] = [],
  tunnelIp?: string,
): string[] {
  const ip = want.PUBLIC_IP;
  const own = tunnelIp ?? (ip === NAT ? undefined : ip);
  const shared = own ? [`--node-ip=${own}`] : [];
  if (ip !== NAT) shared.push(`--node-external-ip=${ip}`);
  if (!nodeNameIn(role === "server" ? want.SERVER_ARGS : want.AGENT_ARGS)) shared.push(`--node-name=${name}`);
  // One flag an argument: of the article's `--kube-proxy-arg "a" "b"` k3s drops "b" as a positional.
  if (proxyMode !== "iptables") shared.push(`--kube-proxy-arg=proxy-mode=${proxyMode}`);
  shared.push(...labelArgs(want), ...more);
  if (role === "agent") return [...shared, ...splitWords(want.AGENT_ARGS)];
  const flannel =
    generation === "old"
      ? ["--flannel-backend=wireguard"]
      : // Without --flannel-external-ip a modern k3s deletes public-ip-overwrite at every start.
        ["--flannel-backend=wireguard-native", "--flannel-external-ip"];
  return [`--tls-san=${ip}`, ...shared, "--disable=servicelb", ...flannel, ...splitWords(want.SERVER_ARGS)];
}

const labelArgs = (want: Settings): string[] => [
  ...splitWords(want.NODE_LABELS).map((label) => `--node-label=${label}`),
  ...splitWords(want.NODE_TAINTS).map((taint) => `--node-taint=${taint}`),
];

export const unitOf = (role: Role) => (role === "server" ? "k3s" : "k3s-agent");
export const unitPath = (role: Role): string => `/etc/systemd/system/${unitOf(role)}.service`;
export const envPath = (role: Role): string => `${unitPath(role)}.env`;

/** Takes what a unit has put on `lo` away. */
export const CLEAR_LO = "ip addr flush dev lo label lo:k3s";

/**
 * Is a node's InternalIP to be inside the tunnel, where its kubelet is reached? That of a box without a public address
 * always is.
 */
export const goesInside = (want: Pick<Settings, "PUBLIC_IP" | "TUNNEL_KUBELETS">): boolean =>
  want.PUBLIC_IP === NAT || want.TUNNEL_KUBELETS === "yes";

/** The first line of the units that this project writes. */
export const WRITTEN_BY = "# Written by k3s-across-clouds.";

/**
 * The systemd unit of the article's steps 4 and 5, with its limits.
 * @param onLo the addresses to put on `lo`.
 */
export function unitText(
  role: Role,
  generation: Generation,
  args: readonly string[],
  onLo: readonly string[],
): string {
  // v1.17.6 writes the node's WireGuard private key, 0644, into its working directory: / for an agent.
  // A file that is there already keeps its mode, and both folders are 0700.
  const folder = `/var/lib/rancher/k3s/${role}`;
  const key = `ExecStartPre=/usr/bin/install -m 600 /dev/null ${folder}/privatekey`;
  const before = [
    ...["br_netfilter", "overlay", "wireguard"].map((name) => `ExecStartPre=-/sbin/modprobe ${name}`),
    ...(args.some((a) => a.endsWith("proxy-mode=ipvs"))
      ? ["ExecStartPre=-/sbin/modprobe -a ip_vs ip_vs_rr"]
      : []),
    // The label finds an address that is no longer this box's, to remove it.
    ...onLo.map(
      (ip, i) =>
        `ExecStartPre=/bin/sh -c '${i ? "" : `${CLEAR_LO}; `}ip addr replace ${ip}/32 dev lo label lo:k3s'`,
    ),
    ...(generation === "old" ? [key] : []),
  ];
  // A modern agent tells systemd when it has joined; the old one never does. Type=exec is unknown to the
  // systemd of CentOS 7, which then takes the unit as Type=simple: as good.
  const type = role === "server" || generation === "modern" ? "notify" : "exec";
  return `${WRITTEN_BY}
[Unit]
Description=Lightweight Kubernetes
Documentation=https://k3s.io
Wants=network-online.target
After=network-online.target

[Install]
WantedBy=multi-user.target

[Service]
Type=${type}
EnvironmentFile=${envPath(role)}
${generation === "old" ? `WorkingDirectory=${folder}\n` : ""}KillMode=process
Delegate=yes
# Limits other than infinity cost performance: the kernel would have to count.
LimitNOFILE=${role === "server" ? "1048576" : "infinity"}
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
TimeoutStartSec=0
Restart=always
RestartSec=5s
${before.join("\n")}
ExecStart=${K3S} ${[role, ...args.map(unitWord)].join(" \\\n    ")}
`;
}

/** One word of ExecStart=: systemd expands % and $ in it. @see systemd.service(5), COMMAND LINES */
const unitWord = (word: string) => word.replaceAll("%", "%%").replaceAll("$", "$$$$");

/** Where a server has the token by which nodes join it. */
export const NODE_TOKEN = "/var/lib/rancher/k3s/server/node-token";

/** A node's name as the API server itself would have it. */
export const NAME = /^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$/;

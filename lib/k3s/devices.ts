/**
 * Devices that reach the cluster's pods, services and names: a WireGuard interface of our own on a node, their entry. Packets
 * to pods of other nodes are masqueraded by flannel, those to services by kube-proxy, so that a device reaches the whole
 * cluster by each entry alike; pods of the entry see its own address (v1.36.3, seen).
 */
import { parseArgs } from "../args.ts";
import { cardsOf } from "../protocol.ts";
import type { Settings } from "../settings.ts";
import { raw, sh, writeFile } from "../sh.ts";
import {
  type Change,
  type Facts,
  type Look,
  type Printed,
  prints,
  Refusal,
  type Step,
  step,
} from "../step.ts";
import { domainIn, FORMS, hostIn, liesIn } from "../table.ts";
import { quoted, sha256 } from "../text.ts";
import { rangesOf } from "./config.ts";
import { loadingUnit, placed } from "./firewall/own.ts";
import { ENTRY, ENTRY_PROGRAM, ipv4Of } from "./firewall/traffic.ts";
import { API, peersOf } from "./nodes.ts";
import { WRITTEN_BY } from "./unit.ts";

/** The interface's key and its peers, 0600. */
export const ENTRY_FOLDER = "/etc/rancher/k3s-devices";
export const ENTRY_UNIT = "/etc/systemd/system/k3s-devices.service";
/** At both ends: every path carries it with WireGuard's 80 bytes but IPv6's own least, and mobile networks have little more. */
export const MTU = 1280;

export type Form = (typeof FORMS)[number];

export interface Device {
  name: string;
  ip: string;
  /** Its WireGuard public key. */
  key: string;
  /** What its configuration is written for. */
  form: Form;
  /** It reaches services alone. */
  only?: "services";
  /** The home's network that it carries. */
  lan?: string;
}

/** The file of peers, for `wg syncconf`. What else is known of a device is in the comment before its section. */
export const peersText = (devices: readonly Device[]): string =>
  devices
    .map(
      ({ name, ip, key, form, only, lan }) => `# ${[name, form, only, lan].filter(Boolean).join(" ")}
[Peer]
PublicKey = ${key}
AllowedIPs = ${ip}/32
`,
    )
    .join("");

const KEY = "[A-Za-z0-9+/]{43}=";
const DEVICE = new RegExp(
  `^# ([a-z0-9-]{1,12}) (${FORMS.join("|")})( services)?(?: ([\\d.]{7,15}/\\d{1,2}))?\n\\[Peer\\]\nPublicKey = (${KEY})\nAllowedIPs = ([\\d.]{7,15})/32$`,
  "gm",
);

/** The devices in a file of peers. What no run has written is none: parts of it go into configurations and commands. */
export const devicesIn = (text = ""): Device[] =>
  [...text.matchAll(DEVICE)].map(([, name = "", form, only, lan, key = "", ip = ""]) => ({
    ...{ name, ip, key, form: form as Form },
    ...(only ? { only: "services" as const } : {}),
    ...(lan ? { lan } : {}),
  }));

/** Where an entry's interface is, and which networks it leads to. */
interface Networks {
  port: string;
  devices: string;
  pods: string;
  services: string;
}

/**
 * The program that the unit runs. The rule stands before DNAT, where a packet to a service still has the service's address.
 * It comes before the interface is up, and the key is on standard input alone.
 */
const programText = ({ port, devices, pods, services }: Networks): string => sh`#!/bin/sh
${raw(WRITTEN_BY)}
set -eu
port=${port}
clear_rules() {
  ! command -v nft >/dev/null || nft 'table inet k3s_devices; delete table inet k3s_devices' 2>/dev/null || :
  iptables -w -t raw -D PREROUTING -i ${ENTRY} -j K3S-DEVICES 2>/dev/null || return 0
  iptables -w -t raw -F K3S-DEVICES
  iptables -w -t raw -X K3S-DEVICES
}
if [ "$1" = stop ]; then
  ip link delete ${ENTRY} 2>/dev/null || :
  clear_rules
  exit 0
fi
limited=$(awk '/^# / { only = $4 == "services" } /^AllowedIPs/ && only { print $3 }' ${ENTRY_FOLDER}/peers)
if command -v nft >/dev/null; then
  nft -f - <<NFT
table inet k3s_devices
delete table inet k3s_devices
table inet k3s_devices {
	chain prerouting {
		type filter hook prerouting priority -300; policy accept;
		iifname != "${raw(ENTRY)}" accept
		ip daddr ${services} accept
$(for ip in $limited; do echo "		ip saddr $ip drop"; done)
		ip daddr { ${raw(pods)}, ${raw(devices)} } accept
		drop
	}
}
NFT
else
  command -v iptables >/dev/null || { echo 'Neither nft nor iptables is here, which keep devices to the cluster: install nftables'; exit 1; }
  iptables-restore -w --noflush <<IPTABLES
*raw
:K3S-DEVICES - [0:0]
-A K3S-DEVICES -d ${services} -j ACCEPT
$(for ip in $limited; do echo "-A K3S-DEVICES -s $ip -j DROP"; done)
-A K3S-DEVICES -d ${pods} -j ACCEPT
-A K3S-DEVICES -d ${devices} -j ACCEPT
-A K3S-DEVICES -j DROP
COMMIT
IPTABLES
  iptables -w -t raw -C PREROUTING -i ${ENTRY} -j K3S-DEVICES 2>/dev/null || iptables -w -t raw -I PREROUTING -i ${ENTRY} -j K3S-DEVICES
fi
[ -e /sys/class/net/${ENTRY} ] || ip link add ${ENTRY} type wireguard || wireguard-go ${ENTRY}
{
  printf '[Interface]\nListenPort = %s\nPrivateKey = %s\n' "$port" "$(cat ${ENTRY_FOLDER}/key)"
  cat ${ENTRY_FOLDER}/peers
} | wg syncconf ${ENTRY} /dev/stdin
ip addr replace ${`${hostIn(devices, 1)}/${devices.split("/")[1]}`} dev ${ENTRY}
ip link set ${ENTRY} mtu ${MTU} up
`;

const UNIT = `${WRITTEN_BY}
${loadingUnit("Devices that reach this k3s cluster's pods and services", ENTRY_PROGRAM)}`;

/**
 * Facts about an entry: its files, public key, rules, peers and their traffic. What is none says nothing, for two tests.
 * The first line of the dump has the private key.
 */
export const entryLook = [
  prints("entry peers-file entry-key entry-state entry-rules entry-dump")(
    sh`if [ -e ${ENTRY_FOLDER} ] || [ -e ${ENTRY_PROGRAM} ]; then
fact entry; cat ${ENTRY_PROGRAM} ${ENTRY_UNIT} 2>/dev/null
fact peers-file; cat ${ENTRY_FOLDER}/peers 2>/dev/null
fact entry-key; [ ! -e ${ENTRY_FOLDER}/key ] || wg pubkey <${ENTRY_FOLDER}/key 2>/dev/null
fact entry-state; systemctl show ${ENTRY} -p ActiveState -p UnitFileState 2>/dev/null |
  awk -F= '{ is[$1] = $2 } END { print is["ActiveState"]; print is["UnitFileState"] }'
wg show ${ENTRY} public-key 2>/dev/null; wg show ${ENTRY} listen-port 2>/dev/null
fact entry-rules; if command -v nft >/dev/null; then nft list table inet k3s_devices 2>/dev/null
else iptables -w -t raw -S 2>/dev/null | grep -F K3S-DEVICES; fi
fact entry-dump; wg show ${ENTRY} dump 2>/dev/null | sed 1d
fi
`,
  ),
] as const;

/** Facts about the networks that it leads to. */
const clusterNetworksLook = prints("pod-network api-service dns-service")(sh`${raw(API)}
cluster_ip() { api GET "/api/v1/namespaces/$1/services/$2?pretty=false" 10 2>/dev/null | sed -n 's/.*"clusterIP":"\([0-9.]*\)".*/\1/p'; }
fact pod-network; sed -n 's/^FLANNEL_NETWORK=//p' /run/flannel/subnet.env 2>/dev/null
fact api-service; cluster_ip default kubernetes
fact dns-service; cluster_ip kube-system kube-dns
`);

type SeenFact = Printed<(typeof entryLook)[number]>;
type EntryFact = SeenFact | Printed<typeof clusterNetworksLook>;

/**
 * The networks that devices reach by this entry: the settings', held against what the cluster has.
 * @throws {Refusal} where the cluster is silent, has others, or an address of the box is in the devices' network.
 */
export function networksOf(want: Settings, facts: Facts<EntryFact>): Networks {
  const { DEVICE_CIDR: devices, DEVICE_PORT: port } = want;
  const [pods, services] = rangesOf(want).map((range) => ipv4Of([range])) as [string, string];
  const [has, api] = [facts["pod-network"]?.trim(), facts["api-service"]?.trim()];
  const names = namesOf(want, facts);
  if (!has || !api)
    throw new Refusal(
      `${has ? "The cluster's API does not answer here" : "No k3s node runs on this box"}: make check says what is wrong`,
    );
  if (has !== pods)
    throw new Refusal(`Pods are in ${has} here, not ${pods}: SERVER_ARGS has to say so (--cluster-cidr)`);
  if (!liesIn(api, services))
    throw new Refusal(
      `The API's service is ${api} here, outside of ${services}: SERVER_ARGS has to say which network services have (--service-cidr)`,
    );
  if (names && !(/^[\d.]+$/.test(names.server) && liesIn(names.server, services)))
    throw new Refusal(
      `Unexpected answer from the box: CoreDNS's service is ${quoted(names.server)}, outside of ${services}`,
    );
  const taken = takenIn(devices, facts);
  if (taken)
    throw new Refusal(
      `This box has the address ${taken}, within DEVICE_CIDR ${devices}: give devices another network`,
    );
  return { port, devices, pods, services };
}

/** A box's own address in the devices' network, and its interface. */
function takenIn(devices: string, facts: Facts): string | undefined {
  const taken = cardsOf(facts).find(({ card, ip }) => card !== ENTRY && liesIn(ip, devices));
  return taken && `${taken.ip} (${taken.card})`;
}

/** CoreDNS, and the domain that it answers for; undefined if the cluster has none. */
export const namesOf = (want: Settings, facts: Facts<EntryFact>) => {
  const server = facts["dns-service"]?.trim();
  return server ? { server, domain: domainIn(parseArgs(want.SERVER_ARGS)) } : undefined;
};

/** The entry's public key; undefined if the box has none. */
export const entryKeyOf = (facts: Facts<"entry-key">): string | undefined =>
  new RegExp(`^${KEY}$`).exec(facts["entry-key"]?.trim() ?? "")?.[0];

const stateOf = (facts: Facts<SeenFact>) => {
  const [active, enabled, key, port] = (facts["entry-state"] ?? "").split("\n");
  const own = entryKeyOf(facts);
  return {
    active,
    enabled,
    key,
    port,
    own,
    runs: active === "active" && enabled === "enabled" && key === own,
  };
};

/** The UDP port at which an entry takes its devices now; undefined while its interface is down. */
export const entryPortOf = (facts: Facts<SeenFact>): string | undefined =>
  /^\d{1,5}$/.exec(stateOf(facts).port ?? "")?.[0];

/** Do the rules keep devices to the cluster, and those of ONLY=services to services? */
function confines(rules: string, devices: readonly Device[]): boolean {
  const lines = new Set(rules.split("\n").map((line) => line.trim()));
  const limited = devices.flatMap(({ ip, only }) => (only ? [ip] : []));
  return [
    ["drop", ...limited.map((ip) => `ip saddr ${ip} drop`)],
    [
      `-A PREROUTING -i ${ENTRY} -j K3S-DEVICES`,
      "-A K3S-DEVICES -j DROP",
      ...limited.map((ip) => `-A K3S-DEVICES -s ${ip}/32 -j DROP`),
    ],
  ].some((due) => due.every((line) => lines.has(line)));
}

/** What is wrong with an entry, and what mends it on the box itself, if anything does. */
export interface Fault {
  cause: string;
  mends?: string;
}

/** The interface's peers. */
const loadedIn = (facts: Facts<"entry-dump">) =>
  peersOf((facts["entry-dump"] ?? "").replace(/^(?=.)/gm, `${ENTRY}\t`));

/** Why an entry is not as its files have it: the first cause that holds. @param due its port. */
function faultOf(facts: Facts<SeenFact>, due: string | undefined): Fault | undefined {
  const { active, enabled, key, port, own } = stateOf(facts);
  const devices = devicesIn(facts["peers-file"]);
  const loaded = new Set(loadedIn(facts).map(({ key, allowedIps }) => `${key} ${allowedIps}`));
  const missing = devices.filter(({ key, ip }) => !loaded.has(`${key} ${ip}/32`));
  const more = loaded.size + missing.length - devices.length;
  const mends = `systemctl restart ${ENTRY}`;
  const faults: (Fault | false | "" | undefined)[] = [
    !due && { cause: `${ENTRY_PROGRAM} is gone` },
    !own && { cause: `the key of ${ENTRY} is gone (${ENTRY_FOLDER}/key)` },
    key &&
      !confines(facts["entry-rules"] ?? "", devices) && {
        cause: `the rules that keep its devices to the cluster's networks are gone: what they send is forwarded anywhere`,
        mends,
      },
    active !== "active" && {
      cause: `${ENTRY} does not run on it (systemd: ${active || "unknown"}): devices reach nothing by it`,
      mends,
    },
    !key && { cause: `its interface ${ENTRY} is gone, although the unit is active`, mends },
    key !== own && { cause: `its interface ${ENTRY} has another key than ${ENTRY_FOLDER}/key`, mends },
    port !== due && { cause: `its interface ${ENTRY} is at port ${port}, not ${due}`, mends },
    (missing.length > 0 || more > 0) && {
      cause: `its interface ${ENTRY} has other peers than ${ENTRY_FOLDER}/peers: ${[...missing.map(({ name }) => `without ${name}`), ...(more ? [`${more} more`] : [])].join(", ")}`,
      mends,
    },
    enabled !== "enabled" && {
      cause: `${ENTRY} does not start at boot (systemd: ${enabled || "unknown"})`,
      mends: `systemctl enable ${ENTRY}`,
    },
  ];
  return faults.find((fault) => !!fault) || undefined;
}

/** Two operators may change devices at once: neither writes over what it has not seen. */
const unchanged = (had = ""): string =>
  sh`# shellcheck disable=SC2002 # it may not be there
[ "$(cat ${ENTRY_FOLDER}/peers 2>/dev/null | sha256sum | cut -d' ' -f1)" = ${sha256(had)} ] || { echo 'Another run has changed the devices meanwhile: run this again'; exit 1; }`;

/** Changes that give an entry these devices. @throws {Refusal} */
function entryPlan(
  want: Settings,
  facts: Facts<EntryFact>,
  devices: readonly Device[],
  why: string,
): Change[] {
  if (facts.entry?.trim() && !facts.entry.split("\n").includes(WRITTEN_BY))
    throw new Refusal(
      `${ENTRY_UNIT} or ${ENTRY_PROGRAM} on this box was not written by this project: give it another name`,
    );
  const networks = networksOf(want, facts);
  const far = devices.find(({ ip }) => !liesIn(ip, networks.devices));
  if (far)
    throw new Refusal(
      `Device ${far.name} has ${far.ip}, outside of DEVICE_CIDR ${networks.devices}: set that back, or remove it first (make device NAME=${far.name} REMOVE=1)`,
    );
  const [peers, program] = [peersText(devices), programText(networks)];
  const files = facts.entry === `${program}${UNIT}`;
  if (files && facts["peers-file"] === peers && !faultOf(facts, networks.port)) return [];
  return [
    {
      why,
      sh: [
        unchanged(facts["peers-file"]),
        sh`install -d -m 700 ${ENTRY_FOLDER}
wg pubkey <${ENTRY_FOLDER}/key >/dev/null 2>&1 || {
  (umask 077; wg genkey >${ENTRY_FOLDER}/key.new)
  sync
  mv -f ${ENTRY_FOLDER}/key.new ${ENTRY_FOLDER}/key
}`,
        ...(files ? [] : [placed(ENTRY_PROGRAM, program, ENTRY_UNIT, UNIT)]),
        writeFile(`${ENTRY_FOLDER}/peers`, peers, "600"),
        files && stateOf(facts).runs
          ? `systemctl reload ${ENTRY}`
          : sh`systemctl daemon-reload
systemctl enable ${ENTRY} >/dev/null 2>&1
systemctl restart ${ENTRY} || { journalctl -u ${ENTRY} -o cat --no-pager -n 5; exit 1; }`,
      ].join("\n"),
    },
  ];
}

const entryStep = <F extends string = never>(
  plan: (want: Settings, facts: Facts<EntryFact | F>) => Change[],
  ...more: Look<F>[]
): Step<EntryFact | F> =>
  step({
    name: "device",
    options: ["SERVER", "PUBLIC_IP", "SERVER_ARGS", "DEVICE_CIDR", "DEVICE_PORT"],
    look: () => [...entryLook, clusterNetworksLook, ...more],
    plan,
  });

/** An entry that has this device, and all its others. */
export const admits = (device: Device): Step<EntryFact> =>
  entryStep((want, facts) => {
    const known = devicesIn(facts["peers-file"]);
    const others = known.filter(({ name }) => name !== device.name);
    const held = known.find(({ name }) => name === device.name);
    if (device.key === entryKeyOf(facts))
      throw new Refusal(`PUBLIC_KEY is the entry's own, ${device.key}: expected the device's`);
    const twin = others.find(({ ip }) => ip === device.ip);
    if (twin)
      throw new Refusal(`Device ${twin.name} got ${device.ip} by another run meanwhile: run this again`);
    const all = [...others, device].sort((one, other) => (one.name < other.name ? -1 : 1));
    const what = `${device.ip}${device.only ? ", services alone" : ""}`;
    const why = !held
      ? `let in device ${device.name}: ${what}`
      : peersText([held]) === peersText([device])
        ? `repair the interface of device ${device.name}`
        : `change device ${device.name}: ${what}`;
    return entryPlan(want, facts, all, why);
  });

/** An entry without the device of this name, also while the cluster is silent. It goes with its last device. */
export const shutsOut = (name: string): Step<EntryFact> =>
  entryStep((_want, facts) => {
    const devices = devicesIn(facts["peers-file"]);
    const others = devices.filter((device) => device.name !== name);
    if (others.length === devices.length) return [];
    const [why, how] = others.length
      ? [
          "",
          sh`${raw(writeFile(`${ENTRY_FOLDER}/peers`, peersText(others), "600"))}
! systemctl is-active -q ${ENTRY} || systemctl reload ${ENTRY}`,
        ]
      : [`, and ${ENTRY}, which has no other`, CLEAR_ENTRY];
    return [{ why: `remove device ${name}${why}`, sh: `${unchanged(facts["peers-file"])}\n${how}` }];
  });

/** The lost server's entry on a box that is one itself, and keeps its own key. */
const BROUGHT = "/var/lib/rancher/k3s/server/devices";
const broughtLook = prints("brought")(sh`fact brought; cat ${BROUGHT}/peers 2>/dev/null`);

/** An entry as it was, on a box that has its folder from a backup. */
export const bringsBack = entryStep((want, facts) => {
  const own = devicesIn(facts["peers-file"]);
  const others = devicesIn(facts.brought).filter(
    (one) => !own.some(({ name, ip, key }) => name === one.name || ip === one.ip || key === one.key),
  );
  const devices = [...own, ...others];
  if (!devices.length) return [];
  const names = (others.length ? others : own).map(({ name }) => name).join(", ");
  return entryPlan(want, facts, devices, `let devices in again: ${names}`).map((change) => ({
    ...change,
    sh: `${change.sh}\n${sh`rm -rf ${BROUGHT}`}`,
  }));
}, broughtLook);

/** Shell that takes an entry away. */
export const CLEAR_ENTRY = sh`systemctl disable --now ${ENTRY} >/dev/null 2>&1 || :
[ ! -x ${ENTRY_PROGRAM} ] || ${ENTRY_PROGRAM} stop
rm -rf ${ENTRY_UNIT} ${ENTRY_PROGRAM} ${ENTRY_FOLDER}
systemctl daemon-reload`;

/** How an entry sees a device. */
export interface Seen extends Device {
  /** Seconds since 1970; 0: never. */
  handshake: number;
  received: number;
  sent: number;
}

/** The devices of an entry, as it sees them. */
export function seenBy(facts: Facts<"peers-file" | "entry-dump">): Seen[] {
  const loaded = new Map(loadedIn(facts).map((peer) => [peer.key, peer]));
  return devicesIn(facts["peers-file"]).map((device) => {
    const { handshake = 0, received = 0, sent = 0 } = loaded.get(device.key) ?? {};
    return { ...device, handshake, received, sent };
  });
}

/** An entry, as check sees it. */
export interface Entry {
  port: string | undefined;
  /** The devices' network. */
  network: string | undefined;
  devices: Seen[];
  fault: Fault | undefined;
  /** The box's own address in the devices' network. */
  taken: string | undefined;
}

/** The entry that a box is; undefined for one that lets nobody in. */
export function entryIn(facts: Facts<SeenFact>): Entry | undefined {
  const devices = seenBy(facts);
  if (!devices.length && !facts["entry-dump"]?.trim()) return undefined;
  const { entry = "" } = facts;
  const [, port] = /^port=(\d+)$/m.exec(entry) ?? [];
  const [, ip, bits] = /^ip addr replace ([\d.]+)\/(\d+) /m.exec(entry) ?? [];
  const network = ip && `${hostIn(ip, -1)}/${bits}`;
  return {
    ...{ port, network, devices, fault: faultOf(facts, port) },
    taken: network && takenIn(network, facts),
  };
}

#!/usr/bin/env -S node --import tsx
/** Lets a device, or a whole home, reach the cluster's pods, services and names, and writes its WireGuard configuration here. */
import { createPrivateKey, createPublicKey, generateKeyPairSync } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { renderUnicodeCompact } from "uqr";
import { boxes } from "../../lib/boxes.ts";
import { look } from "../../lib/converge.ts";
import { replaceFile, shown } from "../../lib/files.ts";
import { bring, each, worst } from "../../lib/fleet.ts";
import { rangesOf } from "../../lib/k3s/config.ts";
import {
  admits,
  type Device,
  devicesIn,
  ENTRY,
  type Form,
  MTU,
  namesOf,
  networksOf,
  shutsOut,
} from "../../lib/k3s/devices.ts";
import { firewall } from "../../lib/k3s/firewall/firewall.ts";
import { eachOf } from "../../lib/k3s/firewall/traffic.ts";
import { main } from "../../lib/k3s/script.ts";
import { watch } from "../../lib/report.ts";
import type { Box, Run } from "../../lib/script.ts";
import { type Origins, SettingError, type Settings } from "../../lib/settings.ts";
import { type FactsOf, Refusal } from "../../lib/step.ts";
import { hostIn, liesIn, NAT, overlap, sizeOf } from "../../lib/table.ts";
import { splitWords } from "../../lib/text.ts";

type EntryFacts = FactsOf<ReturnType<typeof admits>>;

/** What a configuration says of the entry. */
export interface EntryPeer {
  /** The entry's public address and port. */
  endpoint: string;
  /** Its WireGuard public key. */
  key: string;
  /** Where the device is to send by it. */
  networks: string[];
  /** CoreDNS, and the domain that it answers for. */
  names?: { server: string; domain: string } | undefined;
}

/** What a device's user has to do or to know for names and the way back, a line each; it stands in the file as comments. */
export function advice({ form, lan = "" }: Device, { names, networks }: EntryPeer): string[] {
  const { server, domain } = names ?? {};
  const routes = networks.map((network) => `  ip route add ${network} via THIS-BOX`);
  const texts: Record<Form, string[]> = {
    phone: server
      ? [
          `All names are asked of the cluster's CoreDNS (${server}) while the tunnel is on, and none is found while the entry is down: split DNS is what phones do not have.`,
        ]
      : [],
    linux: server ? [`Start it with "wg-quick up FILE". Names of ${domain} go by systemd-resolved.`] : [],
    macos: server
      ? [
          `Names of ${domain} are asked of the cluster after this, once:`,
          `  sudo mkdir -p /etc/resolver && echo 'nameserver ${server}' | sudo tee /etc/resolver/${domain}`,
        ]
      : [],
    windows: server
      ? [
          `Names of ${domain} are asked of the cluster after this, once, in PowerShell as administrator:`,
          `  Add-DnsClientNrptRule -Namespace '.${domain}' -NameServers '${server}'`,
        ]
      : [],
    router: [
      `For a Linux machine in ${lan}: "wg-quick up FILE". If it is not the LAN's router, the router needs a route to it:`,
      ...routes,
      ...(server
        ? [
            "Names: where dnsmasq answers for the LAN (on OpenWrt: uci add_list dhcp.@dnsmasq[0].server=…, and rebind_domain=…):",
            `  server=/${domain}/${server}`,
            `  rebind-domain-ok=/${domain}/`,
          ]
        : []),
    ],
  };
  return texts[form];
}

/** Lines of [Interface] that wg-quick alone understands: the apps refuse them. */
function hooks({ form, lan = "" }: Device, { names }: EntryPeer): string[] {
  if (form === "linux" && names)
    return [
      `PostUp = { resolvectl dns %i ${names.server} && resolvectl domain %i '~${names.domain}'; } || echo 'systemd-resolved does not run here: names of ${names.domain} are not found'`,
    ];
  if (form !== "router") return [];
  const rules = [
    `-t nat POSTROUTING -s ${lan} -o %i -j MASQUERADE`,
    `FORWARD -s ${lan} -o %i -j ACCEPT`,
    `FORWARD -i %i -d ${lan} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT`,
    `-t mangle FORWARD -o %i -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu`,
  ];
  const put = (how: string) =>
    rules.map((rule) => `iptables ${rule.replace(/(POSTROUTING|FORWARD)/, `${how} $1`)}`).join("; ");
  return [`PostUp = sysctl -q -w net.ipv4.ip_forward=1; ${put("-I")}`, `PostDown = ${put("-D")}`];
}

/** A device's wg-quick configuration. The phone's has nothing that the apps do not read: it is its QR code too. */
export function configOf(device: Device, peer: EntryPeer, privateKey: string): string {
  const { ip, form } = device;
  const comments = form === "phone" ? [] : advice(device, peer).map((line) => `# ${line}\n`);
  const dns = form === "phone" && peer.names ? [`DNS = ${peer.names.server}`] : [];
  return `${comments.join("")}[Interface]
${[`PrivateKey = ${privateKey}`, `Address = ${ip}/32`, ...dns, `MTU = ${MTU}`, ...hooks(device, peer)].join("\n")}

[Peer]
PublicKey = ${peer.key}
Endpoint = ${peer.endpoint}
AllowedIPs = ${peer.networks.join(", ")}
PersistentKeepalive = 25
`;
}

/** The device's own key and address in a configuration. */
export function ownIn(config: string): { privateKey: string; ip: string } | undefined {
  const [, privateKey] = /^PrivateKey = ([A-Za-z0-9+/]{43}=)$/m.exec(config) ?? [];
  const [, ip] = /^Address = ([\d.]+)\/32$/m.exec(config) ?? [];
  return privateKey && ip ? { privateKey, ip } : undefined;
}

/** X25519 keys have these headers in their DER forms (RFC 8410), and 32 bytes follow, which is WireGuard's key. */
const PKCS8 = Buffer.from("302e020100300506032b656e04220420", "hex");

export const newPrivateKey = (): string =>
  generateKeyPairSync("x25519")
    .privateKey.export({ type: "pkcs8", format: "der" })
    .subarray(PKCS8.length)
    .toString("base64");

export function publicKeyOf(privateKey: string): string {
  const der = Buffer.concat([PKCS8, Buffer.from(privateKey, "base64")]);
  const key = createPublicKey(createPrivateKey({ key: der, format: "der", type: "pkcs8" }));
  return key.export({ type: "spki", format: "der" }).subarray(-32).toString("base64");
}

/**
 * The device as it is to be. What is not given stays as the entries have it.
 *
 * @param known the devices of all entries. @param mine its key and address in the files here.
 * @throws {Refusal} where its name or key is another device's.
 */
export function deviceFor(
  want: Settings,
  origins: Pick<Origins, "FOR" | "ONLY" | "LAN">,
  known: readonly Device[],
  mine: { key: string; ip?: string },
): Device {
  const { NAME: name, DEVICE_CIDR: network } = want;
  const held = known.find((device) => device.name === name);
  const again = `make device NAME=${name} REMOVE=1`;
  if (held && held.key !== mine.key)
    throw new Refusal(
      want.PUBLIC_KEY
        ? `Device ${name} has another key, ${held.key}: ${again} takes it away first`
        : `Device ${name} is there, and its configuration is not on this machine: ${again} takes it away, then it can be made anew`,
    );
  const twin = known.find((device) => device.key === mine.key && device.name !== name);
  if (twin) throw new Refusal(`Device ${twin.name} has that key already: each needs one of its own`);
  const others = known.filter((device) => device.name !== name).map(({ ip }) => ip);
  // The first is the entry's, the last is for broadcasts.
  const hosts = Array.from({ length: Math.max(0, sizeOf(network) - 3) }, (_, i) => hostIn(network, i + 2));
  const kept = [held?.ip, mine.ip].find((ip) => ip && liesIn(ip, network) && !others.includes(ip));
  const ip = kept ?? hosts.find((host) => !others.includes(host));
  if (!ip) throw new Refusal(`DEVICE_CIDR ${network} has no address left: remove a device (make devices)`);
  const given = (setting: "FOR" | "ONLY" | "LAN") => origins[setting] !== "default";
  const form = given("FOR") || !held ? (want.FOR as Form) : held.form;
  const only = given("ONLY") || !held ? want.ONLY : held.only;
  const lan = given("LAN") || !held ? want.LAN : held.lan;
  return {
    ...{ name, ip, key: mine.key, form },
    ...(only ? { only: "services" as const } : {}),
    ...(lan ? { lan } : {}),
  };
}

/** The networks of the settings must have no address in common. @throws {SettingError} */
export function apart(settings: Settings, origins: Origins): void {
  const { DEVICE_CIDR, LAN } = settings;
  const cluster = eachOf(rangesOf(settings)).filter((range) => range.includes("."));
  for (const [name, network, others] of [
    ["DEVICE_CIDR", DEVICE_CIDR, cluster],
    ["LAN", LAN, [...cluster, DEVICE_CIDR]],
  ] as const) {
    const other = network && others.find((range) => overlap(network, range));
    if (other)
      throw new SettingError(
        `${name} is ${network} (${origins[name]}): expected a network apart from ${other}, which ${other === DEVICE_CIDR ? "devices" : "the cluster"} has${name === "LAN" ? ": give the home's LAN another one" : ""}`,
      );
  }
}

/** The boxes that VIA names; the first server without. @throws {SettingError} */
export function entriesOf(
  cluster: readonly Box[],
  { VIA }: Settings,
  { VIA: origin }: Pick<Origins, "VIA">,
): Box[] {
  const entries = (VIA ? splitWords(VIA) : [cluster[0]?.word as string]).map((word) => {
    const box = cluster.find(({ name, host, word: of }) => [name, host, of].includes(word));
    if (!box)
      throw new SettingError(
        `VIA names ${word} (${origin}): expected some of ${cluster.map(({ name }) => name).join(", ")}`,
      );
    if (box.ip === NAT)
      throw new SettingError(
        `VIA names ${word} (${origin}): expected a box with a public address, at which devices find it`,
      );
    return box;
  });
  return [...new Set(entries)];
}

/** The files of a device: NAME.conf, and NAME-2.conf for its second entry. */
const fileIn = (folder: string, name: string, i: number) =>
  join(folder, `${name}${i ? `-${i + 1}` : ""}.conf`);
const filesOf = (folder: string, name: string): string[] =>
  (existsSync(folder) ? readdirSync(folder) : [])
    .filter((file) => file.startsWith(name) && /^(-[2-9]\d*)?\.conf$/.test(file.slice(name.length)))
    .map((file) => join(folder, file));

async function device(run: Run): Promise<number> {
  const { settings, origins, mode } = run;
  const { NAME, PUBLIC_KEY, LAN } = settings;
  if (!NAME) throw new SettingError("NAME is not set: expected a name for the device, such as NAME=phone");
  apart(settings, origins);
  const cluster = [...(await boxes(run, "SERVER")), ...(await boxes(run, "AGENTS"))];
  if (settings.FIREWALL) run.letIn = cluster.map(({ ip }) => ip);
  const folder = join(dirname(run.envFile), "devices");
  if (run.flags.has("remove")) return await remove(run, cluster, folder);
  if (settings.FOR === "router" && !LAN)
    throw new SettingError(
      "LAN is not set: expected the network that the router carries, such as LAN=192.168.1.0/24",
    );
  const entries = entriesOf(cluster, settings, origins);
  const before = filesOf(folder, NAME).map((file) => ownIn(readFileSync(file, "utf8")));
  const own = PUBLIC_KEY ? undefined : before.find((one) => one);
  if (!own && !PUBLIC_KEY && mode === "print")
    throw new SettingError("PUBLIC_KEY is not set: PRINT=1 makes no key, so expected the device's");
  const privateKey = own?.privateKey ?? newPrivateKey();
  const mine = { key: PUBLIC_KEY || publicKeyOf(privateKey), ...(own ? { ip: own.ip } : {}) };

  await watch(entries);
  const found = new Map<Box, EntryFacts>();
  const looked = await each(run, entries, async (box) => {
    const facts = await look(box, [shutsOut(NAME)]);
    networksOf(box.want, facts);
    found.set(box, facts);
  });
  if (worst(looked)) return worst(looked);
  const known = [...found.values()].flatMap((facts) => devicesIn(facts["peers-file"]));
  let made: Device | undefined;
  const decided = await each(run, entries.slice(0, 1), async () => {
    made = deviceFor(settings, origins, known, mine);
  });
  if (!made) return worst(decided);
  const it = made;
  const interfaceLines = `[Interface]\nPrivateKey = ${PUBLIC_KEY ? "THE-DEVICE'S-OWN" : privateKey}\nAddress = ${it.ip}/32\n`;
  if (mode === "apply" && !own && !PUBLIC_KEY) {
    // Before the entries know it: an interrupted run is finished by the next one, with this key.
    mkdirSync(folder, { recursive: true, mode: 0o700 });
    replaceFile(fileIn(folder, NAME, 0), interfaceLines);
  }
  const files: string[] = [];
  const done = await each(run, entries, async (box) => {
    const facts = found.get(box) as EntryFacts;
    const now = await bring(run, box, [admits(it)], facts);
    if (!now) return;
    const admitted = settings.FIREWALL ? await bring(run, box, [firewall]) : undefined;
    const { pods, services, devices, port } = networksOf(box.want, now.facts);
    const peer: EntryPeer = {
      endpoint: `${box.ip}:${port}`,
      key: now.facts["entry-key"]?.trim() ?? "",
      networks: it.only ? [services] : [pods, services, devices],
      names: namesOf(box.want, now.facts),
    };
    const file = fileIn(folder, NAME, entries.indexOf(box));
    const text = configOf(it, peer, PUBLIC_KEY ? "THE-DEVICE'S-OWN" : privateKey);
    mkdirSync(folder, { recursive: true, mode: 0o700 });
    const same = existsSync(file) && readFileSync(file, "utf8") === text;
    if (!same) replaceFile(file, text);
    files[entries.indexOf(box)] = file;
    box.line.done(
      now.nothing && same && admitted?.nothing !== false,
      `${it.ip}; its configuration is ${shown(file)}; ${port}/udp has to be open to all at ${box.name}'s vendor`,
    );
    if (box === entries[0]) for (const line of advice(it, peer)) process.stderr.write(`  ${line}\n`);
  });
  for (const file of files.filter(Boolean)) {
    process.stdout.write(`${file}\n`);
    if (it.form === "phone" && !PUBLIC_KEY && process.stdout.isTTY)
      process.stdout.write(`${qrOf(readFileSync(file, "utf8"), !process.env.NO_COLOR)}\n`);
  }
  return worst(done);
}

/** A text as a QR code for a terminal, of half blocks; `coloured`: right on a light background too. */
export function qrOf(text: string, coloured: boolean): string {
  const lines = renderUnicodeCompact(text, { ecc: "L", border: 2 }).split("\n");
  return lines.map((line) => (coloured ? `\x1b[97;40m${line}\x1b[0m` : line)).join("\n");
}

/** From every box of the cluster: which are its entries is theirs to know. Its files go last. */
async function remove(run: Run, cluster: readonly Box[], folder: string): Promise<number> {
  const { NAME } = run.settings;
  await watch(cluster);
  const done = await each(run, cluster, async (box) => {
    const now = await bring(run, box, [shutsOut(NAME)]);
    if (now && !now.nothing && run.settings.FIREWALL) await bring(run, box, [firewall]);
    if (now) box.line.done(now.nothing, `it has no device ${NAME}`);
  });
  if (worst(done) === 0 && run.mode === "apply") for (const file of filesOf(folder, NAME)) rmSync(file);
  return worst(done);
}

await main(import.meta, {
  about: `Gives a device access to the cluster by WireGuard (interface ${ENTRY} on the boxes in VIA), and writes its configuration to devices/NAME.conf; for a phone as a QR code too.`,
  steps: [
    {
      ...shutsOut(""),
      options: [
        ...(["NAME", "FOR", "VIA", "LAN", "ONLY", "PUBLIC_KEY", "DEVICE_CIDR", "DEVICE_PORT"] as const),
        ...(["SERVER", "AGENTS", "PUBLIC_IP", "SERVER_ARGS", "FIREWALL"] as const),
      ],
    },
  ],
  flags: { remove: "take the device away from every entry, and delete its files" },
  everyBox: "VIA names the boxes that are a device's entries",
  work: device,
});

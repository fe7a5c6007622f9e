#!/usr/bin/env -S node --import tsx
/** Lets a device, or a whole home, reach the cluster's pods, services and names, and writes its WireGuard configuration here. */
import { createPrivateKey, createPublicKey, generateKeyPairSync } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { renderUnicodeCompact } from "uqr";
import { boxes } from "../../lib/boxes.ts";
import { look } from "../../lib/converge.ts";
import { noFile, replaceFile, shown, unwritten } from "../../lib/files.ts";
import { attempt, bring, each, worst } from "../../lib/fleet.ts";
import { rangesOf } from "../../lib/k3s/config.ts";
import {
  admits,
  type Device,
  devicesIn,
  entryKeyOf,
  entryPortOf,
  type Form,
  MTU,
  namesOf,
  networksOf,
  shutsOut,
} from "../../lib/k3s/devices.ts";
import { firewall } from "../../lib/k3s/firewall/firewall.ts";
import { ENTRY, eachOf } from "../../lib/k3s/firewall/traffic.ts";
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
  const named = known.filter((device) => device.name === name);
  const same = named.filter((device) => device.key === mine.key);
  const held = same[0] ?? named[0];
  const again = `make device NAME=${name} REMOVE=1`;
  if (held && held.key !== mine.key)
    throw new Refusal(
      want.PUBLIC_KEY
        ? `Device ${name} has another key, ${held.key}: ${again} takes it away first`
        : `Device ${name} is there, and its configuration is not on this machine: ${again} takes it away, then it can be made anew`,
    );
  const twin = known.find((device) => device.key === mine.key && device.name !== name);
  if (twin) throw new Refusal(`Device ${twin.name} has that key already: each needs one of its own`);
  const others = new Set(known.filter((device) => device.name !== name).map(({ ip }) => ip));
  // The first is the entry's, the last is for broadcasts.
  const hosts = Array.from({ length: Math.max(0, sizeOf(network) - 3) }, (_, i) => hostIn(network, i + 2));
  const kept = [held?.ip, mine.ip].find((ip) => ip && liesIn(ip, network) && !others.has(ip));
  const ip = kept ?? hosts.find((host) => !others.has(host));
  if (!ip) throw new Refusal(`DEVICE_CIDR ${network} has no address left: remove a device (make devices)`);
  const given = (setting: "FOR" | "ONLY" | "LAN") => origins[setting] !== "default";
  const form = given("FOR") || !held ? (want.FOR as Form) : held.form;
  // An entry that was off when the device was limited does not lift that.
  const only = given("ONLY") || !held ? want.ONLY : same.some((device) => device.only);
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

/**
 * The boxes that VIA names, in the cluster's order; without, those that have the device, or the first server.
 * @throws {SettingError}
 */
export function entriesOf(
  cluster: readonly Box[],
  { VIA }: Pick<Settings, "VIA">,
  { VIA: origin }: Pick<Origins, "VIA">,
  holders: readonly Box[],
): readonly Box[] {
  if (!VIA) return holders.length ? holders : cluster.slice(0, 1);
  const words = splitWords(VIA);
  const named = (box: Box) => words.some((word) => [box.name, box.host, box.word].includes(word));
  for (const word of words) {
    const box = cluster.find(({ name, host, word: of }) => [name, host, of].includes(word));
    if (!box)
      throw new SettingError(
        `VIA names ${word} (${origin}): expected some of ${cluster.map(({ name }) => name).join(", ")}`,
      );
    if (box.ip === NAT)
      throw new SettingError(
        `VIA names ${word} (${origin}): expected a box with a public address, at which devices find it`,
      );
  }
  return cluster.filter(named);
}

/** The files of a device: NAME.conf, and NAME-2.conf for its second entry. */
const fileIn = (folder: string, name: string, i: number) =>
  join(folder, `${name}${i ? `-${i + 1}` : ""}.conf`);
const filesOf = (folder: string, name: string): string[] =>
  (existsSync(folder) ? readdirSync(folder) : [])
    .filter((file) => file.startsWith(name) && /^(-\d+)?\.conf$/.test(file.slice(name.length)))
    .map((file) => join(folder, file));

/** The texts of these files. @throws {SettingError} when they cannot be read. */
export function textsIn(folder: string, name: string): { file: string; text: string }[] {
  let path = folder;
  try {
    return filesOf(folder, name).map((file) => {
      path = file;
      const wrong = noFile(file);
      if (wrong) throw new Error(`it is ${wrong}`);
      return { file, text: readFileSync(file, "utf8") };
    });
  } catch (error) {
    throw new SettingError(`${shown(path)} cannot be read: ${(error as Error).message}`);
  }
}

/** Writes a configuration, 0600; one that is so is left alone. Was it so? */
export function keep(file: string, text: string): boolean {
  try {
    const stat = statSync(file, { throwIfNoEntry: false });
    if (stat && !(stat.mode & 0o77) && readFileSync(file, "utf8") === text) return true;
    mkdirSync(dirname(file), { recursive: true, mode: 0o700 });
  } catch (error) {
    throw unwritten(file, error);
  }
  replaceFile(file, text);
  return false;
}

/** In a configuration of a device that has made its own key. */
const ITS_OWN = "THE-DEVICE'S-OWN";

/** @throws {Unwritten} */
function discard(file: string): void {
  try {
    rmSync(file);
  } catch (error) {
    throw unwritten(file, error);
  }
}

/** The device's key: the one given, or that of its files here, or a new one. @throws {SettingError} */
function keyOf({ settings: { PUBLIC_KEY }, flags, mode }: Run, texts: readonly string[]) {
  // A device that is this machine may have put its own key into the file.
  const own = texts
    .map(ownIn)
    .find((one) => one && (!PUBLIC_KEY || publicKeyOf(one.privateKey) === PUBLIC_KEY));
  if (!own && !PUBLIC_KEY && mode === "print" && !flags.has("remove"))
    throw new SettingError("PUBLIC_KEY is not set: PRINT=1 makes no key, so expected the device's");
  const privateKey = own?.privateKey ?? (PUBLIC_KEY ? ITS_OWN : newPrivateKey());
  return { privateKey, key: PUBLIC_KEY || publicKeyOf(privateKey), ip: own?.ip };
}

async function device(run: Run): Promise<number> {
  const { settings, origins, mode } = run;
  const { NAME, PUBLIC_KEY } = settings;
  const leaves = run.flags.has("remove");
  if (!NAME) throw new SettingError("NAME is not set: expected a name for the device, such as NAME=phone");
  if (settings.FOR === "router" && !settings.LAN && !leaves)
    throw new SettingError(
      "LAN is not set: expected the network that the router carries, such as LAN=192.168.1.0/24",
    );
  apart(settings, origins);
  const cluster = [...(await boxes(run, "SERVER")), ...(await boxes(run, "AGENTS"))];
  entriesOf(cluster, settings, origins, []);
  if (settings.FIREWALL) run.letIn = cluster.map(({ ip }) => ip);
  const folder = join(dirname(run.envFile), "devices");
  const before = textsIn(folder, NAME);
  const { privateKey, key, ip } = keyOf(
    run,
    before.map(({ text }) => text),
  );

  // Every box that may be an entry: which have the device is theirs to know.
  const reached = cluster.filter(({ ip }) => ip !== NAT);
  await watch(reached);
  const found = new Map<Box, EntryFacts>();
  const statuses = await each(run, reached, async (box) => {
    found.set(box, await look(box, [shutsOut(NAME)]));
  });
  const devicesAt = (box: Box) => devicesIn(found.get(box)?.["peers-file"]);
  const has = (box: Box) => devicesAt(box).some(({ name }) => name === NAME);
  // One that was off when the device got another key still has the old one, and is no entry of it now.
  const holders = reached.filter((box) =>
    devicesAt(box).some((one) => one.name === NAME && (leaves || one.key === key)),
  );
  const entries = leaves ? [] : entriesOf(cluster, settings, origins, holders);
  if (entries.some((box) => !found.has(box))) return worst(statuses);

  let it: Device | undefined;
  if (entries.length)
    statuses.push(
      await attempt(run, entries[0] as Box, async () => {
        const known = reached.flatMap(devicesAt);
        const decided = deviceFor(settings, origins, known, { key, ...(ip ? { ip } : {}) });
        // Before the entries know it: an interrupted run is finished by the next one, with this key.
        if (mode === "apply" && !ip && !PUBLIC_KEY)
          keep(
            fileIn(folder, NAME, 0),
            `[Interface]\nPrivateKey = ${privateKey}\nAddress = ${decided.ip}/32\n`,
          );
        it = decided;
      }),
    );
  if (entries.length && !it) return worst(statuses);

  const files: string[] = [];
  const bringTo = async (box: Box) => {
    const i = entries.indexOf(box);
    const now = await bring(run, box, [it && i >= 0 ? admits(it) : shutsOut(NAME)], found.get(box));
    if (!now) return;
    const doors = settings.FIREWALL && (i >= 0 || has(box)) ? await bring(run, box, [firewall]) : undefined;
    const nothing = now.nothing && doors?.nothing !== false;
    if (!it || i < 0) {
      if (has(box)) box.line.done(nothing);
      return;
    }
    const peer = peerFor(it, box, now.facts);
    const file = fileIn(folder, NAME, i);
    const same = keep(file, configOf(it, peer, privateKey));
    files[i] = file;
    const port = entryPortOf(found.get(box) ?? {});
    const others = devicesAt(box).filter(({ name }) => name !== NAME);
    if (port && port !== settings.DEVICE_PORT && others.length)
      box.line.says(
        `its port was ${port}: make device NAME=… writes the other configurations anew (${others.map(({ name }) => name).join(", ")})`,
      );
    const limits = it.only ? ", services alone (ONLY= lifts that)" : "";
    if (!holders.includes(box))
      box.line.says(`${settings.DEVICE_PORT}/udp has to be open to all at its vendor`);
    if (privateKey === ITS_OWN && i === 0)
      box.line.says(`put the device's private key in place of ${ITS_OWN}`);
    if (i === 0) for (const line of advice(it, peer)) box.line.says(line);
    box.line.done(nothing && same, `${it.ip}${limits}, ${shown(file)}`);
  };
  const done = await each(run, entries, bringTo);
  // Until its entries let it in, the device keeps the others.
  const others = [...found.keys()].filter((box) => !entries.includes(box));
  if (worst(done) === 0) done.push(...(await each(run, others, bringTo)));
  statuses.push(...done);
  if (leaves && !holders.length)
    process.stderr.write(`No entry has a device ${NAME}: make devices lists them\n`);
  if (mode === "apply" && worst(statuses) === 0)
    for (const { file } of before) if (!files.includes(file)) discard(file);
  for (const file of files.filter(Boolean)) show(file, it?.form === "phone" && !PUBLIC_KEY);
  return worst(statuses);
}

/** What a device's configuration says of this entry. */
function peerFor({ only }: Device, { ip, want }: Box, facts: EntryFacts): EntryPeer {
  const { pods, services, devices, port } = networksOf(want, facts);
  return {
    endpoint: `${ip}:${port}`,
    key: entryKeyOf(facts) ?? "",
    networks: only ? [services] : [pods, services, devices],
    names: namesOf(want, facts),
  };
}

/** Says where a configuration is; shows it as a QR code only to somebody who sees it. */
function show(file: string, asCode: boolean): void {
  process.stdout.write(`${file}\n`);
  if (asCode && process.stdout.isTTY)
    process.stdout.write(`${qrOf(readFileSync(file, "utf8"), !process.env.NO_COLOR)}\n`);
  else if (asCode) process.stderr.write("On a terminal this shows its QR code\n");
}

/** A text as a QR code for a terminal, of half blocks; `coloured`: right on a light background too. */
export function qrOf(text: string, coloured: boolean): string {
  const lines = renderUnicodeCompact(text, { ecc: "L", border: 2 }).split("\n");
  return lines.map((line) => (coloured ? `\x1b[97;40m${line}\x1b[0m` : line)).join("\n");
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

/** Resolves settings to the boxes of a run: their names, addresses and own settings. */

import { existsSync } from "node:fs";
import { hostname } from "node:os";
import { readExample } from "./env-file.ts";
import { shown } from "./files.ts";
import { silent } from "./report.ts";
import type { Box, Run } from "./script.ts";
import { NAMES, type Origins, SettingError, type Settings } from "./settings.ts";
import { addressOf, open } from "./shell.ts";
import type { Want } from "./step.ts";
import { NAT, publicIp, SETTINGS, type SettingName } from "./table.ts";
import { nameOf, splitWords } from "./text.ts";

const addressesIn = (text: string): string[] => text.match(/\d+(\.\d+){3}/g) ?? [];
const DOCUMENTATION = /^(198\.51\.100|203\.0\.113)\./;
/**
 * Does a word contain an address of env.example, which would only time out? The file is read only if the address is in a
 * range for documentation: a user may have put real addresses into it.
 */
const isExample = (word: string): boolean => {
  const suspect = addressesIn(word).filter((ip) => DOCUMENTATION.test(ip));
  if (!suspect.length) return false;
  const { SERVER, AGENTS } = readExample();
  const given = addressesIn(`${SERVER?.example} ${AGENTS?.example}`);
  return suspect.some((ip) => given.includes(ip));
};

/** The message for a new user: no setting names a box yet. */
export function unnamed(settings: Settings, origins: Origins, envFile: string): string | undefined {
  const { SERVER, AGENTS, PUBLIC_IP } = settings;
  const begun = NAMES.some((name) => "learned" in SETTINGS[name] && settings[name]);
  if (SERVER || AGENTS || PUBLIC_IP || begun || origins.HOST !== "default") return undefined;
  const copy = existsSync(envFile) ? "" : `cp env.example ${shown(envFile)}, and `;
  return `No servers are named yet: ${copy}say which in SERVER and AGENTS; or try make rehearse. On the box itself: PUBLIC_IP=…, its address for other clouds`;
}

/** Boxes may not share one. */
const isAddress = (ip: string): boolean => ip !== "" && ip !== NAT;

/** A box's destination, address and name. */
type Place = Pick<Box, "host" | "ip" | "word" | "name">;

/** Are these one box? One without a public address may be named with another user. */
export const isSame = (one: Place, other: Place): boolean =>
  one.host === other.host ||
  (isAddress(one.ip) ? one.ip === other.ip : one.ip === NAT && one.name === other.name);

/**
 * The boxes of a setting, each with the address at which other clouds reach it. An empty HOST or SERVER means this
 * machine.
 * @throws {SettingError}
 */
export async function boxes(run: Run, setting: "HOST" | "SERVER" | "AGENTS"): Promise<Box[]> {
  const { settings, origins } = run;
  if (setting === "AGENTS" && !settings.AGENTS) return [];
  const list = splitWords(settings[setting]);
  if (setting !== "HOST" && list.some(isExample))
    throw new SettingError(
      `${setting} is "${settings[setting]}" (${origins[setting]}): that is the example from env.example; edit SERVER and AGENTS first`,
    );
  const known = splitWords(`${settings.SERVER} ${settings.AGENTS}`).map((word) => word.split("="));
  const needsIp = run.script.steps.some((step) => step.options.includes("PUBLIC_IP"));
  if (settings.PUBLIC_IP && setting !== "AGENTS" && list.length > 1)
    throw new SettingError(
      `PUBLIC_IP (${origins.PUBLIC_IP}): expected one box, not ${list.join(", ")}; write HOST=PUBLIC_IP for each`,
    );
  const found: Place[] = await Promise.all(
    (list.length ? list : [""]).map(async (word) => {
      const [host = "", own] = word.split("=");
      const name = nameOf(host);
      const given =
        own ??
        ((setting !== "AGENTS" && settings.PUBLIC_IP) ||
          known.find(([h = "", ip]) => nameOf(h) === name && host && ip)?.[1]);
      if (given || !needsIp) return { host, ip: given ?? "", word, name };
      const late = run.script.asksLate && { host, ip: "", word, name };
      if (!host && late) return late;
      if (!host)
        throw new SettingError(
          unnamed(settings, origins, run.envFile) ??
            "PUBLIC_IP is not set: expected the address at which other clouds reach this machine",
        );
      const ip = await addressOf(host).catch((error) => {
        throw new SettingError(`${setting} names ${host} (${origins[setting]}): ${error.message}`);
      });
      const right = publicIp(ip);
      if (right && late) return late;
      if (right)
        throw new SettingError(
          `${host} (${origins[setting]}) resolves to ${ip}: expected ${right}; write ${host}=PUBLIC_IP${setting === "SERVER" ? "" : `, or ${host}=${NAT} if it has none`}`,
        );
      return { host, ip, word, name };
    }),
  );
  const isServer = setting === "SERVER" || run.script.host === "SERVER" || run.script.replaces;
  const home = isServer && setting !== "AGENTS" && found.find(({ ip }) => ip === NAT);
  if (home)
    throw new SettingError(
      `${home.word.includes("=") || !settings.PUBLIC_IP ? `${setting} (${origins[setting]})` : `PUBLIC_IP (${origins.PUBLIC_IP})`}: expected a server's public address, not ${NAT}: all nodes call it there`,
    );
  for (const [i, box] of found.entries()) {
    const twin = found.slice(0, i).find((other) => isSame(other, box));
    if (twin)
      throw new SettingError(
        `${setting} (${origins[setting]}): expected each box once, but ${twin.host} and ${box.host} are the same`,
      );
  }
  if (needsIp) await ownAddresses(run, setting, found);
  return found.map((place) => boxAt(run, place));
}

/**
 * Each node needs its own public address: SERVER, AGENTS and HOST are compared with each other.
 * @throws {SettingError}
 */
async function ownAddresses(run: Run, setting: string, found: readonly Place[]): Promise<void> {
  const { settings, origins, script } = run;
  // It may have the old server's address.
  const lists = script.replaces ? settings.AGENTS : `${settings.SERVER} ${settings.AGENTS}`;
  const others = await Promise.all(
    splitWords(lists).map(async (word) => {
      const [host = "", own] = word.split("=");
      // A name that does not resolve is reported where that box is used.
      return { name: nameOf(host), ip: own ?? (await addressOf(host).catch(() => "")) };
    }),
  );
  if (setting === "AGENTS" && !settings.SERVER && settings.PUBLIC_IP)
    others.push({ name: hostname(), ip: settings.PUBLIC_IP });
  const elsewhere = setting === "SERVER" ? [] : (script.elsewhere?.(settings) ?? []);
  for (const box of found) {
    const other = [...others, ...elsewhere].find(
      ({ name, ip }) => name !== box.name && isAddress(ip) && ip === box.ip,
    );
    // A box may have two names, unless its address is given.
    const said = box.word.includes("=") || (box.host && settings.PUBLIC_IP);
    if (!other) continue;
    const named = setting === "HOST" && !said && others.includes(other);
    // The env file's settings for one box use its name in SERVER or AGENTS.
    if (named && box.host) box.name = other.name;
    if (!named)
      throw new SettingError(
        `${setting} (${origins[setting as SettingName]}): every node needs a public address of its own, but ${other.name} and ${box.name} have ${box.ip}`,
      );
  }
}

/** The box at a place, with its settings in this run. */
export function boxAt(run: Run, { host, ip, word, name }: Place): Box {
  const { settings, own } = run;
  const all = () => ({ ...run.settings, ...(own[name] ?? own[""]) });
  const server = (splitWords(all().SERVER)[0] ?? "").split("=")[0] as string;
  let given: Want | undefined;
  return {
    ...{ host, ip, word, name },
    // Computed when it is read: the addresses to let in, and what the first server reports, are known late.
    get want() {
      if (given) return given;
      const want = { ...all(), HOST: host, PUBLIC_IP: ip, allowed: run.flags };
      return run.script.wantOnBox?.(run, name, want) ?? want;
    },
    set want(want) {
      given = want;
    },
    shell: open(host, all().HOST_KEY),
    server: open(server, own[nameOf(server)]?.HOST_KEY ?? settings.HOST_KEY),
    line: silent,
    mayReboot: Boolean(host) || run.reboot,
  };
}

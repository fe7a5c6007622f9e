/** What the engine is told about k3s: files that settings name, and how boxes depend on each other. */
import { isUtf8 } from "node:buffer";
import { existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { boxes } from "../boxes.ts";
import { runScript } from "../cli.ts";
import { hashOf } from "../files.ts";
import type { Run, Script } from "../script.ts";
import { aFile, SettingError, type Settings } from "../settings.ts";
import type { Want } from "../step.ts";
import { boxNames, splitWords } from "../text.ts";
import { configArgs, wrongIn } from "./args.ts";
import { noProxy } from "./config.ts";
import { firewall } from "./firewall/firewall.ts";

/** Runs a script when it is the program itself, not an import. */
export const main = (meta: ImportMeta, script: Script): Promise<void> =>
  runScript(meta, { ...script, filesOf, prepare, wantOnBox });

/** Addresses of all boxes, for the firewall and NO_PROXY. */
async function prepare(run: Run): Promise<void> {
  const { script, settings, own } = run;
  const declared = settings.FIREWALL && script.steps.includes(firewall);
  if (declared || [settings, ...Object.values(own)].some((of) => of.HTTPS_PROXY || of.HTTP_PROXY))
    run.addresses = {
      servers: settings.SERVER
        ? await addressesOf(run, "SERVER")
        : script.work
          ? splitWords(settings.PUBLIC_IP)
          : [],
      agents: await addressesOf(run, "AGENTS"),
    };
  if (declared) run.letIn = [...run.addresses.servers, ...run.addresses.agents];
}

/** @throws {SettingError} for a box without a known public address. */
async function addressesOf(run: Run, setting: "SERVER" | "AGENTS"): Promise<string[]> {
  return (await boxes(run, setting)).map(({ ip }) => ip).sort();
}

/** A box's settings, as far as they depend on the other boxes. */
export function wantOnBox(run: Run, name: string, want: Want): Want {
  const { settings, addresses } = run;
  const servers = boxNames(settings.SERVER);
  const isServer = run.script.host === "SERVER" || servers.includes(name);
  const own = run.own[name] ?? run.own[""];
  // The server's arguments define the networks of pods and services for all boxes.
  const theirs = isServer ? undefined : run.own[servers[0] as string]?.SERVER_ARGS;
  const result = {
    ...want,
    SERVER_ARGS: own?.SERVER_ARGS ?? theirs ?? settings.SERVER_ARGS,
    FIREWALL: run.letIn?.join(" ") ?? "",
  };
  if (want.HTTPS_PROXY || want.HTTP_PROXY) {
    const url = /^https:\/\/([\w.-]+)/.exec(want.K3S_URL)?.[1] ?? "";
    // Agents reach each other only through WireGuard.
    const nodes = [...addresses.servers, ...(isServer ? addresses.agents : []), url, want.PUBLIC_IP];
    result.NO_PROXY = noProxy(result, nodes);
  }
  return result;
}

/** Reads the files that settings name: the hash of K3S_BIN, the text of K3S_CONFIG. @throws {SettingError} */
async function filesOf(want: Settings): Promise<Partial<Settings>> {
  return {
    ...(want.K3S_BIN ? { K3S_SHA256: await binaryHash(want), AIRGAP: await imagesBeside(want) } : {}),
    ...(want.K3S_CONFIG ? { K3S_CONFIG: configIn(want) } : {}),
  };
}

/**
 * @throws {SettingError} when the file cannot be read, k3s could not parse it, or it contains what has to be a setting.
 */
function configIn({ K3S_CONFIG }: Settings): string {
  aFile("K3S_CONFIG", K3S_CONFIG);
  try {
    const bytes = readFileSync(K3S_CONFIG);
    if (!isUtf8(bytes) || bytes.includes(0)) throw new Error("expected text in UTF-8");
    const text = bytes.toString().trimEnd();
    const wrong = wrongIn(undefined, configArgs(text));
    if (wrong) throw new Error(`it has ${wrong}`);
    return text;
  } catch (error) {
    throw new SettingError(`K3S_CONFIG is "${K3S_CONFIG}": ${(error as Error).message}`);
  }
}

/** @throws {SettingError} when the file cannot be read or is not the one K3S_SHA256 names. */
async function binaryHash({ K3S_BIN, K3S_SHA256 }: Settings): Promise<string> {
  aFile("K3S_BIN", K3S_BIN);
  const have = await sha256Of(K3S_BIN).catch((error) => {
    throw new SettingError(`K3S_BIN is "${K3S_BIN}": ${error.message}`);
  });
  if (K3S_SHA256 && K3S_SHA256 !== have)
    throw new SettingError(`K3S_SHA256 is ${K3S_SHA256}, but "${K3S_BIN}" (K3S_BIN) has ${have}`);
  return have;
}

const hashes = new Map<string, Promise<string>>();
/** Several boxes may name one file, and it may be large. */
function sha256Of(path: string): Promise<string> {
  const known = hashes.get(path) ?? hashOf(path);
  hashes.set(path, known);
  return known;
}

/**
 * AIRGAP, and below it the airgap images beside K3S_BIN, a line each: sha256 and path; the smallest file of each
 * architecture.
 *
 * @throws {SettingError} when there are none and AIRGAP requires them.
 */
async function imagesBeside({ K3S_BIN, AIRGAP }: Settings): Promise<string> {
  const folder = dirname(K3S_BIN);
  const found = ["amd64", "arm64", "arm"].flatMap(
    (arch) =>
      ["tar.zst", "tar.gz", "tar"]
        .map((ext) => join(folder, `k3s-airgap-images-${arch}.${ext}`))
        .find((path) => existsSync(path)) ?? [],
  );
  if (AIRGAP && found.length === 0)
    throw new SettingError(
      `AIRGAP is yes: expected k3s-airgap-images-ARCH.tar.zst beside K3S_BIN, in ${folder}`,
    );
  const lines = await Promise.all(found.map(async (path) => `${await sha256Of(path)} ${path}`));
  return lines.length ? [AIRGAP, ...lines].join("\n") : "";
}

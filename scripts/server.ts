#!/usr/bin/env -S node --import tsx
/** Step 4 of 7: a healthy k3s server on its public address. Brings the box through steps 1 to 3 too. */
import { type Call, run, type Target } from "../lib/cli.ts";
import { envPath, healthySaying, serviceLook, servicePlan, systemdFirst } from "../lib/k3s.ts";
import { NODE_SETTINGS, proxyEnv } from "../lib/node.ts";
import { nameOf, SettingError, type Settings, words } from "../lib/settings.ts";
import { type Change, type Facts, Failure, Refusal, type Step } from "../lib/step.ts";
import { annotateAs } from "./annotate.ts";
import { downloadK3s } from "./download-k3s.ts";
import { installWireguard } from "./install-wireguard.ts";
import { upgradeKernel } from "./upgrade-kernel.ts";

export const server: Step = {
  name: "server",
  options: ["SERVER", "PUBLIC_IP", "PROXY_MODE", "SERVER_ARGS", ...NODE_SETTINGS, "K3S_DATASTORE_ENDPOINT"],

  look: () => [
    ...serviceLook("server"),
    `fact token; cat /var/lib/rancher/k3s/server/node-token 2>/dev/null
fact sqlite; test -e /var/lib/rancher/k3s/server/db/state.db && echo yes
fact external; grep -qs '^K3S_DATASTORE_ENDPOINT=' ${envPath("server")} && echo yes`,
  ],

  plan(want, facts): Change[] {
    return servicePlan("server", environments(want, facts), want, facts);
  },

  learn(want, facts) {
    if (isFurther(want)) return {};
    const token = facts.token?.trim();
    if (!token) throw new Failure("The server is healthy but has no node-token");
    return { K3S_URL: urlOf(want), K3S_TOKEN: token };
  },
};

const urlOf = (want: Settings) => `https://${want.PUBLIC_IP}:6443`;

/** Is there a server of this datastore already, another one, that agents are told? */
const isFurther = (want: Settings) =>
  Boolean(want.K3S_DATASTORE_ENDPOINT && want.K3S_URL && want.K3S_URL !== urlOf(want));

/**
 * What the unit's environment may be. With a datastore of its own a server needs nothing. What the first server
 * of a shared one keeps there is encrypted by its token, so a further one must be given it; and so must the first
 * when it is set up anew, though not once it has it by itself.
 *
 * @throws {Refusal} where another datastore would leave the cluster behind.
 */
function environments(want: Settings, facts: Facts): [string, ...string[]] {
  const base = `# read by k3s.service\n${proxyEnv(want)}`;
  if (!want.K3S_DATASTORE_ENDPOINT) {
    if (!facts.external?.trim()) return [base];
    throw new Refusal(
      "This server's cluster is in an external datastore, and K3S_DATASTORE_ENDPOINT is not set: it would begin an empty one",
    );
  }
  if (facts.sqlite?.trim() && !facts.external?.trim())
    throw new Refusal(
      "This server's cluster is in its own SQLite: with K3S_DATASTORE_ENDPOINT it would begin an empty one. Take it down first, or leave the setting out",
    );
  const shared = `${base}K3S_DATASTORE_ENDPOINT=@K3S_DATASTORE_ENDPOINT@\n`;
  const joining = `${shared}K3S_TOKEN=@K3S_TOKEN@\n`;
  if (isFurther(want)) return [joining];
  return want.K3S_TOKEN && !facts.token?.trim() ? [joining] : [shared, joining];
}

/** @throws {SettingError} for a box that would become the server of another cluster. */
function examine({ settings: want }: Call, boxes: readonly Target[]): void {
  const names = words(want.SERVER).map((word) => nameOf(word.split("=")[0] as string));
  const other = boxes.find(({ host, name }) => host && names.length && !names.includes(name));
  if (other && !want.K3S_DATASTORE_ENDPOINT)
    throw new SettingError(
      `HOST is ${other.host}, but SERVER is ${want.SERVER}: expected K3S_DATASTORE_ENDPOINT for a second server`,
    );
  const first = boxes.some(({ host, name }) => !host || name === (names[0] ?? name));
  if (want.K3S_DATASTORE_ENDPOINT && !first && !(want.K3S_URL && want.K3S_TOKEN))
    throw new SettingError(
      `K3S_TOKEN is not set: expected what "make server" writes for ${names[0]}, the first server`,
    );
}

/** What brings a box from nothing to a server whose node others can reach. */
export const serverSteps = [
  systemdFirst,
  downloadK3s,
  upgradeKernel,
  installWireguard,
  server,
  annotateAs("server"),
];

await run(import.meta, {
  about: "Makes a box the k3s server: binary, kernel, WireGuard, unit, and a node that is Ready.",
  steps: serverSteps,
  host: "SERVER",
  examine,
  nothing: (want, facts) => healthySaying("server", want, facts),
});

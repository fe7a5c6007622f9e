/** k3s's config file, as the arguments that k3s makes of it (pkg/configfilearg). */
import type { Arg } from "../args.ts";
import { refusedIn } from "../table.ts";
import { yamlIn } from "../yaml.ts";

/**
 * The arguments in a k3s config file (YAML 1.1 with merge keys): a list gives one flag per value, and `key+` appends to
 * other files.
 *
 * @throws {Error} with a one-line message, unless it is one YAML mapping (of several documents k3s reads only the
 * first).
 */
export function configArgs(text: string): Arg[] {
  const map = yamlIn(text).data;
  if (map === null) return [];
  if (typeof map !== "object" || Array.isArray(map))
    throw new Error("it is no mapping, key: value on each line");
  return Object.entries(map).flatMap(([key, value]) =>
    (Array.isArray(value) ? value : [value]).map((one) => ({
      flag: key.replace(/\+$/, ""),
      value: one === null ? "" : typeof one === "object" ? JSON.stringify(one) : String(one),
    })),
  );
}

const RANGE = "SERVER_ARGS: boxes and their firewalls go by it";
/** Config file keys that have to be settings here, and which. As arguments they are honoured. */
const ELSEWHERE: Record<string, string> = {
  "node-name": "SERVER_ARGS or AGENT_ARGS: --node-name=…",
  "node-label": "NODE_LABELS",
  "node-taint": "NODE_TAINTS",
  token: "K3S_TOKEN",
  t: "K3S_TOKEN",
  "cluster-secret": "K3S_TOKEN",
  "datastore-endpoint": "K3S_DATASTORE_ENDPOINT",
  "cluster-init": "no file: several servers go by K3S_DATASTORE_ENDPOINT",
  server: "K3S_URL",
  s: "K3S_URL",
  "cluster-cidr": RANGE,
  "service-cidr": RANGE,
  "cluster-domain": RANGE,
};

/**
 * The first key that is refused in a role's config file, with the reason or the setting to use; undefined if there is
 * none.
 */
export function wrongIn(role: "server" | "agent" | undefined, args: readonly Arg[]): string | undefined {
  const key = args.find(({ flag }) => Object.hasOwn(ELSEWHERE, flag))?.flag;
  if (key) return `${key}, expected it in ${ELSEWHERE[key]}`;
  return refusedIn(role, args)?.join(": ");
}

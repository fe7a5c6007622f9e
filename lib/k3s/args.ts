/** k3s's config file, as the arguments that k3s makes of it (pkg/configfilearg). */
import type { Arg } from "../args.ts";
import { refusedIn } from "../table.ts";
import { yamlIn } from "../yaml.ts";

/**
 * What k3s takes out of its config file, by YAML 1.1 with merge keys: a list is a flag for each of its values, and
 * `key+` adds to what other files say.
 *
 * @throws {Error} in one line, for what is no mapping of YAML, or is several documents (k3s reads the first alone).
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
/** Keys of k3s's config file that this project has to know of, and where they belong; as arguments they are followed. */
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

/** The first key that a role's k3s must not have in a config file, with where it belongs or why; nothing: all are well. */
export function wrongIn(role: "server" | "agent" | undefined, args: readonly Arg[]): string | undefined {
  const key = args.find(({ flag }) => Object.hasOwn(ELSEWHERE, flag))?.flag;
  if (key) return `${key}, expected it in ${ELSEWHERE[key]}`;
  return refusedIn(role, args)?.join(": ");
}

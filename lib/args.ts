/** k3s's arguments, and its config file as the arguments that it makes of it (pkg/configfilearg). */
import { YAML } from "zx";

/** A flag by its name without dashes; its value, unless the next word is a flag or there is none. */
export interface Arg {
  flag: string;
  value: string | undefined;
}

/**
 * Splits arguments as urfave/cli does, on Go's flags: one dash or two, the value behind = or in the next word. Which
 * flags take no value only the release knows: the word behind one of those is taken for its value.
 */
export function parseArgs(args: string): Arg[] {
  const list = args.trim().split(/[ \t]+/);
  return list.flatMap((word, i) => {
    const [, flag, value] = /^-+([^=]*)(?:=(.*))?$/s.exec(word) ?? [];
    if (!flag) return [];
    const next = list[i + 1];
    return [{ flag, value: value ?? (next?.startsWith("-") ? undefined : next) }];
  });
}

/**
 * What k3s takes out of its config file, by YAML 1.1 with merge keys: a list is a flag for each of its values, and
 * `key+` adds to what other files say.
 *
 * @throws {Error} in one line, for what is no mapping of YAML, or is several documents (k3s reads the first alone).
 */
export function configArgs(text: string): Arg[] {
  const documents = YAML.parseAllDocuments(text, { version: "1.1", merge: true });
  if (documents.length > 1) throw new Error("it has several documents, of which k3s reads one");
  const [document] = documents;
  if (!document) return [];
  const [wrong] = document.errors;
  if (wrong) throw new Error(wrong.message.split("\n")[0].replace(/:$/, ""));
  // Aliases are followed here: it throws for those that lead nowhere, or to too much.
  const map: unknown = document.toJS();
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

/** The value that counts: k3s takes the last. */
export const lastOf = (args: readonly Arg[], ...flags: string[]): string | undefined =>
  args.findLast(({ flag }) => flags.includes(flag))?.value;

const SECRET =
  /^(token|t|agent-token|cluster-secret|datastore-endpoint|vpn-auth|etcd-s3-(access-key|secret-key|session-token))$/;

/** The first flag that gives k3s a secret, by its name or by a password or token in its value. */
export const secretIn = (args: readonly Arg[]): string | undefined =>
  args.find(
    ({ flag, value = "" }) =>
      SECRET.test(flag.toLowerCase().replaceAll("_", "-")) ||
      /:\/\/[^\s/]*@|[?&;](password|secret|token)=|joinkey=|K10[0-9a-f]{64}::/i.test(value),
  )?.flag;

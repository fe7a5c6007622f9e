/** Command line arguments, parsed as urfave/cli (Go's flag package) parses them. */

import { hasToken } from "./token.ts";

/** A flag: its name without dashes, and its value unless it has none. */
export interface Arg {
  flag: string;
  value: string | undefined;
}

/**
 * Splits arguments as urfave/cli does: one dash or two, the value after = or in the next word. Which flags
 * take no value is known to the program alone, so the word after such a flag is read as its value.
 */
export function parseArgs(args: string): Arg[] {
  const list = args.trim().split(/[ \t]+/);
  return list.flatMap((word, i) => {
    const [, flag, value] = /^-+([^=]*)(?:=(.*))?$/s.exec(word) ?? [];
    if (!flag) return [];
    const next = list[i + 1];
    // A value that is meant for another program may begin with a dash too.
    const none = next?.startsWith("-") && !flag.endsWith("-arg");
    return [{ flag, value: value ?? (none ? undefined : next) }];
  });
}

/** The value that counts is the last one. */
export const lastOf = (args: readonly Arg[], ...flags: string[]): string | undefined =>
  args.findLast(({ flag }) => flags.includes(flag))?.value;

const SECRET =
  /^(token|t|agent-token|cluster-secret|datastore-endpoint|vpn-auth|etcd-s3-(access-key|secret-key|session-token))$/;

/** The first flag that exposes a secret: by its name, or by a password or token in its value. */
export const secretIn = (args: readonly Arg[]): string | undefined =>
  args.find(
    ({ flag, value = "" }) =>
      SECRET.test(flag.toLowerCase().replaceAll("_", "-")) ||
      /:\/\/[^\s/]*@|[?&;](password|secret|token)=|joinkey=/i.test(value) ||
      hasToken(value),
  )?.flag;

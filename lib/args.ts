/** Arguments on one line, as programs read them that use urfave/cli, on Go's flags. */

import { hasToken } from "./token.ts";

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
    // What is for another program may begin with a dash as well.
    const none = next?.startsWith("-") && !flag.endsWith("-arg");
    return [{ flag, value: value ?? (none ? undefined : next) }];
  });
}

/** The value that counts is the last one. */
export const lastOf = (args: readonly Arg[], ...flags: string[]): string | undefined =>
  args.findLast(({ flag }) => flags.includes(flag))?.value;

const SECRET =
  /^(token|t|agent-token|cluster-secret|datastore-endpoint|vpn-auth|etcd-s3-(access-key|secret-key|session-token))$/;

/** The first flag that gives away a secret, by its name or by a password or token in its value. */
export const secretIn = (args: readonly Arg[]): string | undefined =>
  args.find(
    ({ flag, value = "" }) =>
      SECRET.test(flag.toLowerCase().replaceAll("_", "-")) ||
      /:\/\/[^\s/]*@|[?&;](password|secret|token)=|joinkey=/i.test(value) ||
      hasToken(value),
  )?.flag;

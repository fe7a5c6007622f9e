/**
 * The token by which boxes join, as every release writes it (pkg/clientaccess): K10, the hash of the cluster's CA, ::USER:
 * and a password, in which colons may be.
 */

const HEAD = "K10[0-9a-f]{64}::";

/** What would be right, in words. */
export const TOKEN_FORM =
  "K10, the hash of the cluster's CA, ::server: and a password, as server/node-token has it";

export const isToken = (text: string): boolean =>
  new RegExp(`^${HEAD}[\\w-]+:[^\\p{Cc}]*[^\\p{Cc}\\s]$`, "u").test(text);

/** Where a text has one, to the end of the word; or the password of one whose beginning was cut off. */
export const TOKENS = new RegExp(`${HEAD}\\S{1,512}|(?<=::(?:server|node):)\\S{1,512}`, "g");

/** Does a text begin to say one? */
export const hasToken = (text: string): boolean => new RegExp(HEAD, "i").test(text);

/** The hash of the CA that a token names. */
export const caIn = (token: string): string | undefined =>
  new RegExp(`^${HEAD}`).test(token) ? token.slice(3, 67) : undefined;

/** For sed -n: of a line that has `before` and a token, `after` and the hash. */
export const caSed = (before: string, after = ""): string =>
  `s/^${before}K10\\([0-9a-f]*\\)::.*/${after}\\1/p`;

/** A token's password, or all of what has no such form. */
export const passwordIn = (token: string): string => token.replace(/^[^:]*::[^:]*:/, "");
/** The same for sed, and for sh of the token in a variable. */
export const PASSWORD_SED = "s/^[^:]*::[^:]*://";
export const passwordOf = (variable: string): string => `\${${variable}#*::*:}`;

/** Shell that gives curl's -K - a password of nodes: a word of shell, escaped for curl's quotes by CURL_SED. */
export const asNode = (password: string): string => `printf 'user = "node:%s"\\n' ${password} |`;
export const CURL_SED = String.raw`s/["\\]/\\&/g`;

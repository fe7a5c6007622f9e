/** Text functions: splitting into words, redaction of secrets, diffs. */
import { createHash } from "node:crypto";
import { hostname } from "node:os";
import { TOKENS } from "./token.ts";

/** JSON that is safe for a terminal: control, bidirectional and other invisible characters are escaped. */
export const jsonOf = (value: unknown): string =>
  JSON.stringify(value).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (character) =>
    character
      .split("")
      .map((unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`)
      .join(""),
  );

const HIDDEN = "********";
const NAMES =
  "token|secret|passw(?:or)?d|passphrase|datastore[-_]endpoint|vpn[-_]auth|joinkey|access[-_]key(?:[-_]id)?|secret[-_]key|private[-_]?key|api[-_]?key|credentials?";
/** Prose about a secret continues with one of these words. */
const WORDS = "(?:is|are|was|out|or|and|in|into|of|to|from|for|as|must|may|value)\\b";
// Quoted text, up to the closing quote or the end of a truncated line.
const QUOTED = "(?:(?!\\k<quote>)(?:\\\\.|[^\\n\\\\])){1,4096}";
// References to shell variables are not hidden.
const VALUE = `(?!["']?\\$[({])(?:(?<quote>\\\\?["'])${QUOTED}(?:\\k<quote>|(?!.))|(?:\\\\(?:x[\\da-f]{2}|[ \\t](?=\\S))|[^\\s"',;&}\\\\]){1,4096})`;
/** All repetitions are bounded, since a box may send lines on which the time would grow quadratically. */
const SECRETS: readonly [RegExp, string][] = [
  [/-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[\sA-Za-z0-9+/=:,-]{0,10000}/g, HIDDEN],
  [/LS0tLS1CRUdJTi[\w+/]{20,}={0,2}/g, HIDDEN],
  [/\beyJ[\w-]{10,2000}\.[\w-]{10,4000}\.[\w-]{10,2000}/g, HIDDEN],
  [/(?<=\w:\/\/[^\s:/@]{0,256}:)\S{1,512}(?=@)/g, HIDDEN],
  // With blanks in it, and no port.
  [/(?<=\w:\/\/[^\s:/@]{0,256}:)(?!\d{1,5}[\s/])[^\n/"'@]{1,512}(?=@)/g, HIDDEN],
  [/(?<=\bhttps?:\/\/)[^\s:/@]{1,256}(?=@)/g, HIDDEN],
  [
    /(\bcurl\b[^\n]{0,1000}?\s(?:-u|--user|-U|--proxy-user)(?:=|\s{0,3}))(?:(["'])[^"'\n:]{1,256}:[^"'\n]{1,512}|[^\s"':]{1,256}:[^\s"']{1,512})/g,
    `$1$2${HIDDEN}`,
  ],
  [/(?<=[\w.-]:)[^\n:@]{1,256}(?=@(?:tcp|unix)\()/g, HIDDEN],
  [TOKENS, HIDDEN],
  [/(?<=\b(?:Basic|Bearer) {1,3})[\w+/=.~-]{12,4096}/gi, HIDDEN],
  // The quotes may enclose the name too, and an environment file may have none.
  [new RegExp(`((?<quote>\\\\?["'])[\\w.-]{0,40}(?:${NAMES})=)(?!\\$[({])${QUOTED}`, "gi"), `$1${HIDDEN}`],
  [new RegExp(`^([+-]? ?(?:export )?\\w{0,40}(?:${NAMES})=)(?!["']?\\$[({]).+`, "gim"), `$1${HIDDEN}`],
  [new RegExp(`((?:${NAMES})["']?\\s{0,3}=\\s{0,3})${VALUE}`, "gi"), `$1${HIDDEN}`],
  [
    new RegExp(
      `(--?(?:[a-z\\d]{1,20}[-_]){0,3}(?:${NAMES})["']?[\\s\\\\]{1,20})(?!["']?(?:-|${WORDS}))${VALUE}`,
      "gi",
    ),
    `$1${HIDDEN}`,
  ],
  // On the next line, which is no key of its own.
  [
    new RegExp(
      `^([ \\t]{0,40}(?:- )?["']?[\\w.-]{0,40}(?:${NAMES}|key-data|auth)["']?:[ \\t]{0,20}[|>]?[-+]?\\n[ \\t]{1,40})(?!(?:- )?["']?[\\w.-]{1,60}["']?:(?:\\s|$))\\S.*`,
      "gim",
    ),
    `$1${HIDDEN}`,
  ],
  [
    new RegExp(
      `^([ \\t]{0,40}(?:- )?["']?[\\w.-]{0,40}(?:${NAMES}|key-data|auth)["']?:[ \\t]{1,20})(?!${WORDS})(?!["']?\\$[({])\\S.*`,
      "gim",
    ),
    `$1${HIDDEN}`,
  ],
  [new RegExp(`("[\\w.-]{0,40}(?:${NAMES}|key-data|auth)"\\s?:\\s?)"[^"\\n]{1,4096}"`, "gi"), `$1${HIDDEN}`],
];

/** Known secret values, longest first. */
let known: string[] = [];

/** From now on redacted() hides the secrets in these values: tokens, passwords in URLs, and the paths of webhooks. */
export function hide(values: readonly string[]): void {
  const parts = values.flatMap((value) => [
    ...(value.includes("://") ? [] : [value, value.slice(value.lastIndexOf(":") + 1)]),
    ...[...value.matchAll(/:\/\/[^:@/\s]*:(.*)@|[?&]password=([^&]*)/g)].map((m) => m[1] ?? m[2] ?? ""),
    /^https?:\/\/[^/?#]*[/?](.+)$/.exec(value)?.[1] ?? "",
  ]);
  const decoded = parts.map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  // A short value would match within many other words.
  const all = new Set([...known, ...parts, ...decoded].filter((part) => part.length >= 6));
  known = [...all].sort((a, b) => b.length - a.length);
}

/** A text with its secrets hidden: known values, secret-looking values, and values of secret-looking names. */
export function redacted(text: string): string {
  const without = known.reduce((rest, value) => rest.replaceAll(value, HIDDEN), text);
  return SECRETS.reduce((rest, [pattern, hidden]) => rest.replace(pattern, hidden), without);
}

/** The same for a unit that this project did not write: its environment is hidden too. */
const foreign = (unit: string): string =>
  redacted(
    unit
      .replace(/^([ \t]*(?:Environment|SetCredential\w*)[ \t]*=)(?:.*\\\n)*.*$/gm, `$1${HIDDEN}`)
      .replace(new RegExp(`((?<quote>["'])-t=)${QUOTED}`, "g"), `$1${HIDDEN}`)
      .replace(
        new RegExp(`(^|[\\s"'])(-t["']?(?:=|[\\s\\\\]{1,20}))(?!["']?-)${VALUE}`, "gm"),
        `$1$2${HIDDEN}`,
      ),
  );

/** A value for a message: quoted, redacted and cut short; the patterns of secrets end at 4096 characters. */
export const quoted = (value: string): string => jsonOf(redacted(value.slice(0, 4096)).slice(0, 80));

/** Splits at blanks. */
export const splitWords = (value: string): string[] => value.split(/[ \t]+/).filter(Boolean);

/** A box's name in the output: its ssh destination without the user, or this machine's host name. */
export const nameOf = (host: string): string => host.replace(/^(ssh:\/\/)?([^@]*@)?/, "") || hostname();

/** Names of the boxes of a list such as SERVER's: HOST or HOST=PUBLIC_IP each. */
export const boxNames = (list: string): string[] =>
  splitWords(list).map((word) => nameOf(word.split("=")[0] as string));

/** `systemctl show` and other KEY=value lines. */
export function parseKeyValues(text = ""): Record<string, string> {
  return Object.fromEntries(
    text.split("\n").flatMap((line) => {
      const at = line.indexOf("=");
      return at < 0 ? [] : [[line.slice(0, at), line.slice(at + 1)]];
    }),
  );
}

/** `@NAME@`: a setting that is secret, in a text that shows. */
export const SECRET = /@([A-Z0-9_]+)@/g;

/** Fills secrets into the text of systemd's EnvironmentFile, where a backslash escapes the next character. */
export const filledEnv = (text: string, want: Readonly<Record<string, string>>): string =>
  text.replace(SECRET, (_, name) => (want[name] as string).replaceAll("\\", "\\\\"));

/** In hex. */
export const sha256 = (text: string) => createHash("sha256").update(text).digest("hex");

/** A line diff: `- ` removed, `+ ` added, in the order of the new text. */
export function diff(have: string, text: string): string[] {
  // The trailing \ of a continued line is ignored: the last argument has none.
  const [a, b] = [have, text].map((t) => t.split("\n").map((line) => line.replace(/ \\$/, "").trim()));
  const [from, to] = [a as string[], b as string[]];
  // The longest common subsequence of what follows line i of one and line j of the other.
  const common = Array.from({ length: from.length + 1 }, () => new Array<number>(to.length + 1).fill(0));
  const at = (i: number, j: number) => common[i]?.[j] ?? 0;
  for (let i = from.length - 1; i >= 0; i--)
    for (let j = to.length - 1; j >= 0; j--)
      (common[i] as number[])[j] =
        from[i] === to[j] ? at(i + 1, j + 1) + 1 : Math.max(at(i + 1, j), at(i, j + 1));
  const lines: string[] = [];
  for (let i = 0, j = 0; i < from.length || j < to.length; )
    if (i < from.length && j < to.length && from[i] === to[j]) {
      i++;
      j++;
    } else if (i < from.length && (j === to.length || at(i + 1, j) >= at(i, j + 1)))
      lines.push(`- ${from[i++]}`);
    else lines.push(`+ ${to[j++]}`);
  return lines;
}

/**
 * The description of a change that rewrites a file: its diff for the dry run, the first differences in one line, and a
 * note.
 */
export function rewrite(
  path: string,
  have: string | undefined,
  text: string,
  note = "",
): { why: string; detail?: string[] } {
  const more = note && `; ${note}`;
  if (!have) return { why: `write ${path}: it is not there${more}` };
  // This project's files have about forty lines: a far longer one is a different text, and not diffed.
  const lines = have.split("\n").length;
  if (lines > 1000)
    return { why: `write ${path}: the present file is a different one, of ${lines} lines${more}` };
  const detail = diff(foreign(have), text);
  if (detail.length === 0) return { why: `write ${path}: only whitespace differs${more}` };
  const rest = detail.length > 6 ? `, and ${detail.length - 6} lines more` : "";
  return {
    why: `write ${path}: ${detail.slice(0, 6).join(", ")}${rest}${more}`,
    detail: note ? [...detail, note] : detail,
  };
}

/** Texts that are read from a box or written there. */
import { createHash } from "node:crypto";
import type { SettingName, Settings } from "./settings.ts";
import type { Change } from "./step.ts";

/** JSON for a terminal: what that would not show, or would go by, is written out; C1, bidi and other marks too. */
export const jsonOf = (value: unknown): string =>
  JSON.stringify(value).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (character) =>
    character
      .split("")
      .map((unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`)
      .join(""),
  );

/** `systemctl show` and other KEY=value lines. */
export function pairs(text = ""): Record<string, string> {
  return Object.fromEntries(
    text.split("\n").flatMap((line) => {
      const at = line.indexOf("=");
      return at < 0 ? [] : [[line.slice(0, at), line.slice(at + 1)]];
    }),
  );
}

/** `@NAME@`: a setting that is secret, in a text that shows. */
export const SECRET = /@([A-Z0-9_]+)@/g;

/** systemd's EnvironmentFile with its secrets in their places; a backslash in it stands for the character behind it. */
export const filledEnv = (text: string, want: Settings): string =>
  text.replace(SECRET, (_, name) => want[name as SettingName].replaceAll("\\", "\\\\"));

/** In hex. */
export const sha256 = (text: string) => createHash("sha256").update(text).digest("hex");

/** How two texts differ, line by line: `- ` what goes and `+ ` what comes, in the order of the new text. */
export function diff(have: string, text: string): string[] {
  // A line's continuation is no part of what it says: the last argument has none.
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

/** A file that is written anew: its differences for the dry run, and the first of them in one line; and a note. */
export function rewrite(
  path: string,
  have: string | undefined,
  text: string,
  note = "",
): Pick<Change, "why" | "detail"> {
  const more = note && `; ${note}`;
  if (!have) return { why: `write ${path}: it is not there${more}` };
  // Our own files have some forty lines: what is far longer is another text, and not compared line by line.
  const lines = have.split("\n").length;
  if (lines > 1000) return { why: `write ${path}: it is another text, of ${lines} lines${more}` };
  const detail = diff(have, text);
  if (detail.length === 0) return { why: `write ${path}: its blanks differ${more}` };
  const rest = detail.length > 6 ? `, and ${detail.length - 6} lines more` : "";
  return {
    why: `write ${path}: ${detail.slice(0, 6).join(", ")}${rest}${more}`,
    detail: note ? [...detail, note] : detail,
  };
}

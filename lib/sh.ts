/** Quoting for POSIX sh, and the shell that waits and that writes a file. */

/** Control characters as octal escapes for printf, so that a script can be shown on a terminal. */
const octal = (text: string) =>
  `'"$(printf '${[...Buffer.from(text)].map((byte) => `\\${byte.toString(8).padStart(3, "0")}`).join("")}')"'`;

/**
 * Quotes one word for any POSIX shell, so that it reaches the command byte for byte.
 * zx's own `quote` writes bash's `$'…'`, which dash and busybox sh take literally.
 *
 * @throws {RangeError} for a NUL, which no shell can carry.
 * @see POSIX.1-2024, Shell Command Language, 2.2.2 Single-Quotes
 */
export function quote(word: string): string {
  if (word.includes("\0")) throw new RangeError("A shell word cannot hold a NUL");
  return /^[\w@%+=:,./-]+$/.test(word)
    ? word
    : `'${word.replaceAll("'", `'\\''`).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => (c === "\n" || c === "\t" ? c : octal(c)))}'`;
}

/** What goes into a template of `sh` as it is, because it is shell already. */
export const raw = (shell: string) => ({ shell });

export type Word = string | number | ReturnType<typeof raw>;

/**
 * Shell as a template: each interpolation is quoted as one word, an array as words, and only `raw()` goes in as it is.
 * An interpolation stands outside of quotes; where a longer text holds it, that text is the interpolation.
 * Backslashes stay as they are typed; but `\${` and a backslash before a backtick stand for what a template cannot hold.
 */
export const sh = (parts: TemplateStringsArray, ...words: readonly (Word | readonly Word[])[]): string =>
  String.raw(
    { raw: parts.raw.map((part) => part.replace(/\\(`|\$\{)/g, "$1")) },
    ...words.map((word) => [word].flat().map(shellOf).join(" ")),
  );

const shellOf = (word: Word) => (typeof word === "object" ? word.shell : quote(`${word}`));

/**
 * Shell without its comments, since each box would be sent them (issue 14). Not for shell with a text of several lines.
 */
export const bare = (shell: string): string => shell.replaceAll(/^ *# (?!shellcheck ).*\n/gm, "");

/**
 * The shell function `clock`: $up is for how many seconds the box has been up. It starts no program, and a wait does not
 * end when the time is set.
 */
export const UPTIME = sh`clock() { read -r up _ </proc/uptime; up=\${up%.*}; }`;

/** Shell that waits for `condition` and runs `each` meanwhile; after `seconds` it runs `otherwise` and fails. */
export const waitUntil = (seconds: number, condition: string, otherwise: string, each = ""): string =>
  sh`${raw(UPTIME)}
clock; end=$((up + ${seconds}))
until ${raw(condition)}; do
  ${raw(each && `${each}\n  `)}clock; [ "$up" -lt "$end" ] || { ${raw(otherwise)}; exit 1; }
  sleep 1
done`;

/**
 * Shell that writes `text` to `path` atomically: a reader, or a crash, sees the old file or the new one.
 * `text` may name `secrets`: words `@NAME@` in it become the shell variable NAME, which apply() sets.
 */
export function writeFile(path: string, text: string, mode = "644", secrets: readonly string[] = []): string {
  const parts = text.split(new RegExp(`(${secrets.map((s) => `@${s}@`).join("|") || "(?!)"})`));
  const body = parts.map((p, i) => (i % 2 ? `"$${p.slice(1, -1)}"` : quote(p))).join("");
  const folder = path.slice(0, path.lastIndexOf("/")) || "/";
  return sh`[ -d ${folder} ] || mkdir -p ${folder}
new=${path}.new
(umask 077; printf %s ${raw(body)} >"$new")
chmod ${mode} "$new"
sync "$new" 2>/dev/null || sync
mv -f "$new" ${path}`;
}

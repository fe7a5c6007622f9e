/** Quoting for POSIX sh, and the shell that writes a file. */

/** What a terminal would go by in a script that is shown; as printf writes it, and between quotes. */
const octal = (text: string) =>
  `'"$(printf '${[...Buffer.from(text)].map((byte) => `\\${byte.toString(8).padStart(3, "0")}`).join("")}')"'`;

/**
 * Quotes one word for any POSIX shell, so that it reaches the command byte for byte.
 * zx's own `quote` writes bash's `$'…'`, which dash and busybox sh take literally.
 *
 * @throws {RangeError} for a NUL, which no shell can carry.
 * @see POSIX.1-2024, Shell Command Language, 2.2.2 Single-Quotes
 */
export function sh(word: string): string {
  if (word.includes("\0")) throw new RangeError("A shell word cannot hold a NUL");
  return /^[\w@%+=:,./-]+$/.test(word)
    ? word
    : `'${word.replaceAll("'", `'\\''`).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => (c === "\n" || c === "\t" ? c : octal(c)))}'`;
}

/**
 * Shell that writes `text` to `path` atomically: a reader, or a crash, sees the old file or the new one.
 * `text` may name `secrets`: words `@NAME@` in it become the shell variable NAME, which apply() sets.
 */
export function writeFile(path: string, text: string, mode = "644", secrets: readonly string[] = []): string {
  const parts = text.split(new RegExp(`(${secrets.map((s) => `@${s}@`).join("|") || "(?!)"})`));
  const body = parts.map((p, i) => (i % 2 ? `"$${p.slice(1, -1)}"` : sh(p))).join("");
  return [
    `mkdir -p ${sh(path.slice(0, path.lastIndexOf("/")) || "/")}`,
    `new=${sh(path)}.new`,
    `(umask 077; printf %s ${body} >"$new")`,
    `chmod ${mode} "$new"`,
    `sync "$new" 2>/dev/null || sync`,
    `mv -f "$new" ${sh(path)}`,
  ].join("\n");
}

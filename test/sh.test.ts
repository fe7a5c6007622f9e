import assert from "node:assert/strict";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { sh, writeFile } from "../lib/sh.ts";
import { lacks, shell, temporary } from "./helpers.ts";

/** sync is left out where many files are written: the disk's time is not what is tested. */
const QUICK = "set -eu; sync() { :; }";

const SHELLS = [["dash"], ["busybox", "sh"], ["bash"]];

const HARD = [
  "",
  " ",
  "a b",
  "  leading and trailing  ",
  "it's",
  "''",
  "'\\''",
  '"double"',
  "`id`",
  "$(id)",
  "$HOME ${HOME}",
  "\\",
  "\\\\n \\t",
  "a\nb\n",
  "\n\n\n",
  "tab\there",
  "*?[a-z]{1,2}",
  "~root",
  "!history !!",
  "#comment",
  "a;b|c&d>e<f",
  "-n",
  "--",
  "%s %d %%",
  "=x",
  "\u0001\u001b[31m\u007f",
  "\r\n",
  "\u009b31m\u202ea\u2028'\u200b\u001b",
  "汉字 ☃ 😀 é",
  "$'a\\nb'",
  "EOF\n.\n",
  "x".repeat(100_000),
];

test("a quoted word has nothing that a terminal would go by", () => {
  for (const word of [...HARD, "\u009b31m", "\u202e", "\u2028", "\u200b", "\ufeff"])
    assert.doesNotMatch(sh(word), /(?![\n\t])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/u);
});

for (const argv of SHELLS) {
  const skip = lacks(argv[0] as string);
  describe(`in ${argv.join(" ")}`, { skip }, () => {
    test(`${HARD.length} hard words reach a command byte for byte`, () => {
      const { status, bytes } = shell(`printf '%s\\0' ${HARD.map(sh).join(" ")}`, [...argv, "-s"]);
      assert.equal(status, 0);
      assert.deepEqual(bytes, Buffer.from(HARD.map((word) => `${word}\0`).join("")));
    });

    test("written files hold their texts byte for byte, with their mode, and nothing is left beside them", () => {
      const folder = join(temporary(), "a new folder");
      const paths = HARD.map((_, i) => join(folder, `it's ${i}`));
      const script = HARD.map((text, i) => writeFile(paths[i] as string, text, "640")).join("\n");
      const { status, stderr } = shell(`${QUICK}\n${script}`, [...argv, "-s"]);
      assert.equal(status, 0, stderr);
      for (const [i, text] of HARD.entries()) {
        assert.equal(readFileSync(paths[i] as string, "utf8"), text);
        assert.equal(statSync(paths[i] as string).mode & 0o777, 0o640);
      }
      assert.equal(readdirSync(folder).length, HARD.length);
    });

    test("a secret stands in a written file as it is, whatever it holds", () => {
      const folder = temporary();
      const write = (i: number) =>
        writeFile(`${folder}/${i}`, "URL=u\nTOKEN=@K3S_TOKEN@\n@OTHER@\n", "600", ["K3S_TOKEN"]);
      const script = HARD.map((secret, i) => `K3S_TOKEN=${sh(secret)}\n${write(i)}`).join("\n");
      const { status, stderr } = shell(`${QUICK}\n${script}`, [...argv, "-s"]);
      assert.equal(status, 0, stderr);
      for (const [i, secret] of HARD.entries()) {
        assert.equal(readFileSync(`${folder}/${i}`, "utf8"), `URL=u\nTOKEN=${secret}\n@OTHER@\n`);
        assert.equal(statSync(`${folder}/${i}`).mode & 0o777, 0o600);
      }
    });
  });
}

test("a plain word stays as it is, to be read by people", () => {
  for (const word of ["k3s", "--a=b", "/usr/local/bin/k3s", "root@203.0.113.10:22", "1%+_,."])
    assert.equal(sh(word), word);
});

test("a word with a NUL is refused: no shell can carry it", () => {
  assert.throws(() => sh("a\0b"), RangeError);
});

test("a file that cannot be written leaves the old one", () => {
  const folder = temporary();
  const path = join(folder, "file");
  writeFileSync(path, "old");
  mkdirSync(`${path}.new`);
  assert.notEqual(shell(`set -eu\n${writeFile(path, "new")}`).status, 0);
  assert.equal(readFileSync(path, "utf8"), "old");
});

test("a file is never seen half-written: it is complete under another name first", () => {
  const path = join(temporary(), "file");
  const steps = writeFile(path, "text").split("\n");
  const moved = steps.findIndex((line) => line.startsWith("mv "));
  assert.equal(shell(`set -eu\n${steps.slice(0, moved).join("\n")}`).status, 0);
  assert.equal(existsSync(path), false);
  assert.equal(readFileSync(`${path}.new`, "utf8"), "text");
});

import assert from "node:assert/strict";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import fc from "fast-check";
import { bare, quote, raw, sh, waitUntil, writeFile } from "../lib/sh.ts";
import { lacks, shell, temporary } from "./helpers.ts";

/** Without sync where many files are written, because the disk's speed is not tested. */
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

test("a quoted word contains no control characters", () => {
  for (const word of [...HARD, "\u009b31m", "\u202e", "\u2028", "\u200b", "\ufeff"])
    assert.doesNotMatch(quote(word), /(?![\n\t])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/u);
});

for (const argv of SHELLS) {
  const skip = lacks(argv[0] as string);
  describe(`in ${argv.join(" ")}`, { skip }, () => {
    test(`${HARD.length} words with special characters reach a command byte for byte`, () => {
      const { status, bytes } = shell(`printf '%s\\0' ${HARD.map(quote).join(" ")}`, [...argv, "-s"]);
      assert.equal(status, 0);
      assert.deepEqual(bytes, Buffer.from(HARD.map((word) => `${word}\0`).join("")));
    });

    test("a value in a template reaches a command as one word, and an array as several words or none", () => {
      const word = fc.string({ unit: "binary", maxLength: 9 }).filter((text) => !text.includes("\0"));
      const one = fc.oneof(word, fc.constantFrom(...HARD.slice(0, -1)));
      fc.assert(
        fc.property(one, fc.array(one, { maxLength: 3 }), fc.integer(), (x, some, n) => {
          const script = sh`printf '%s\0' ${x} --x=${x}:${n} ${some} "${raw("$n")}" ${raw("$(echo a b)")} $\{`;
          const { bytes } = shell(`n='1  2'\n${script}`, [...argv, "-s"]);
          const sent = [x, `--x=${x}:${n}`, ...some, "1  2", "a", "b", "${"];
          assert.deepEqual(bytes, Buffer.from(sent.map((text) => `${text}\0`).join("")));
        }),
        { numRuns: 60 },
      );
    });

    test("a wait ends as soon as its condition is true, or fails with a message at its time limit", () => {
      // sleep advances the clock, so that the test does not wait.
      const file = join(temporary(), "uptime");
      const clock = `set -eu; now=100; sleep() { now=$((now + $1)); echo "$now.50 0" >${file}; }; sleep 0; beat() { printf .; }`;
      const waits = (condition: string, each?: string) => {
        const wait = waitUntil(60, condition, sh`echo ${"It's not there"}`, each).replaceAll(
          "/proc/uptime",
          file,
        );
        const { status, stdout } = shell(`${clock}\n${wait}\necho "after $((now - 100)) s"`, [...argv, "-s"]);
        return [status, stdout];
      };
      assert.deepEqual(waits("true"), [0, "after 0 s\n"]);
      assert.deepEqual(waits("[ $now -ge 103 ]", "beat"), [0, "...after 3 s\n"]);
      assert.deepEqual(waits("[ $now -ge 160 ]"), [0, "after 60 s\n"]);
      assert.deepEqual(waits("[ $now -ge 161 ]"), [1, "It's not there\n"]);
    });

    test("a file is written byte for byte, with its mode, and no temporary file is left", () => {
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

    test("a secret is written to a file unchanged, whatever it contains", () => {
      const folder = temporary();
      const write = (i: number) =>
        writeFile(`${folder}/${i}`, "URL=u\nTOKEN=@K3S_TOKEN@\n@OTHER@\n", "600", ["K3S_TOKEN"]);
      const script = HARD.map((secret, i) => `K3S_TOKEN=${quote(secret)}\n${write(i)}`).join("\n");
      const { status, stderr } = shell(`${QUICK}\n${script}`, [...argv, "-s"]);
      assert.equal(status, 0, stderr);
      for (const [i, secret] of HARD.entries()) {
        assert.equal(readFileSync(`${folder}/${i}`, "utf8"), `URL=u\nTOKEN=${secret}\n@OTHER@\n`);
        assert.equal(statSync(`${folder}/${i}`).mode & 0o777, 0o600);
      }
    });
  });
}

test("shell that is sent loses the lines that are comments, and no other", () => {
  const text = "# why\na # not a line\n  # why\n  # shellcheck disable=SC1\nprintf '#x' #\n#!/bin/sh\n";
  assert.equal(bare(text), "a # not a line\n  # shellcheck disable=SC1\nprintf '#x' #\n#!/bin/sh\n");
});

test("a plain word is not quoted, so that it is readable", () => {
  for (const word of ["k3s", "--a=b", "/usr/local/bin/k3s", "root@203.0.113.10:22", "1%+_,."])
    assert.equal(quote(word), word);
});

test("a word with a NUL is refused, because no shell can pass it", () => {
  assert.throws(() => quote("a\0b"), RangeError);
  assert.throws(() => sh`echo ${"a\0b"}`, RangeError);
  assert.throws(() => sh`echo ${["a", "\0"]}`, RangeError);
});

const TEMPLATES: Record<string, [written: string, sent: string]> = {
  "a plain word and a number": [sh`kc drain ${"hk-1"} --timeout=${300}s`, "kc drain hk-1 --timeout=300s"],
  "an odd word": [sh`kc get node ${"a b"}`, "kc get node 'a b'"],
  "an empty word": [sh`x=${""}`, "x=''"],
  "a word of several parts": [sh`-w ${`${"a"}=${"it's"}`}`, String.raw`-w 'a=it'\''s'`],
  "a newline": [sh`echo ${"a\nb"}`, "echo 'a\nb'"],
  "an array": [sh`for x in ${["a", "b c", 3]}; do`, "for x in a 'b c' 3; do"],
  "an empty array": [sh`for x in ${[]}; do`, "for x in ; do"],
  "raw shell code": [sh`${raw("x=$(id)")}; echo $x`, "x=$(id); echo $x"],
  "raw shell code among words": [sh`echo ${["a b", raw('"$x"')]}`, `echo 'a b' "$x"`],
  "another template, without raw()": [sh`sh -c ${sh`echo ${"a b"}`}`, String.raw`sh -c 'echo '\''a b'\'''`],
  backslashes: [sh`'\\\1' \"\$x \x \u \0 \n`, "'\\\\\\1' \\\"\\$x \\x \\u \\0 \\n"],
  "a brace of the shell": [sh`echo "\${x##*/}" \\\${x}`, 'echo "${x##*/}" \\\\${x}'],
  "a backtick": [sh`echo \`id\``, "echo `id`"],
};

for (const [what, [written, sent]] of Object.entries(TEMPLATES))
  test(`a template becomes the expected shell code: ${what}`, () => assert.equal(written, sent));

test("a value that may be undefined does not compile in a template", () => {
  const facts: Record<string, string | undefined> = {};
  // @ts-expect-error
  assert.equal(sh`echo ${facts.name}`, "echo undefined");
  // @ts-expect-error
  assert.equal(sh`echo ${["a", facts.name]}`, "echo a undefined");
});

test("a failed write leaves the old file unchanged", () => {
  const folder = temporary();
  const path = join(folder, "file");
  writeFileSync(path, "old");
  mkdirSync(`${path}.new`);
  assert.notEqual(shell(`set -eu\n${writeFile(path, "new")}`).status, 0);
  assert.equal(readFileSync(path, "utf8"), "old");
});

test("a file is never partially written, because it is completed under another name first", () => {
  const path = join(temporary(), "file");
  const steps = writeFile(path, "text").split("\n");
  const moved = steps.findIndex((line) => line.startsWith("mv "));
  assert.equal(shell(`set -eu\n${steps.slice(0, moved).join("\n")}`).status, 0);
  assert.equal(existsSync(path), false);
  assert.equal(readFileSync(`${path}.new`, "utf8"), "text");
});

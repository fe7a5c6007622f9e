import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { pathToFileURL } from "node:url";
import { parse } from "dotenv";
import { readEnv, readExample, updateEnv, withValues } from "../lib/env-file.ts";
import { program, ROOT, TOKEN, temporary } from "./helpers.ts";

const HOSTILE: Record<string, string> = {
  empty: "",
  token: TOKEN,
  "single quotes": "it's 'so'",
  "double quotes": 'say "so"',
  backticks: "`id`",
  "two kinds of quotes": `it's "so"`,
  "two other kinds of quotes": "it's `so`",
  hash: "a#b",
  "hash after a space": "a #b",
  "only a hash": "#",
  dollar: "$HOME ${HOME} $$",
  equals: "a=b==",
  backslash: "\\",
  "backslash at the end": "a\\",
  "backslash and letters": "a\\nb\\tc\\\\",
  "backslash and quote": "a\\'b",
  newline: "a\nb\n",
  "only newlines": "\n\n",
  "leading spaces": "  a",
  "trailing spaces": "a  ",
  tab: "\ta\t",
  "an assignment": "A=1\nB=2",
  "an export": "export A=1",
  colon: "a: b",
  unicode: "汉字 ☃ 😀 \u00a0 \u2028",
  "control characters": "\u0001\u001b[0m\u007f",
  "quotes on both ends": "'a'",
  "one quote": "'",
  "one double quote": '"',
  "100 kB": "x y#'".repeat(20_000),
};

/** dotenv has no escapes, and its lines end at the first quote of their own kind. */
const IMPOSSIBLE = "a'b\"c`d\nsecret";

const FILE = `# my cluster
SERVER=root@203.0.113.10   # Hong Kong
export AGENTS='a b'
EMPTY=
  PROXY_MODE: ipvs

this line is nobody's
K3S_TOKEN="old" # learned
# K3S_URL=https://203.0.113.1:6443
TEXT="several
lines # no comment"
LAST=1`;

describe("a value", () => {
  for (const [name, value] of Object.entries(HOSTILE)) {
    test(`is read by dotenv exactly as it was written: ${name}`, () => {
      const text = withValues(FILE, { K3S_TOKEN: value });
      assert.deepEqual(parse(text), { ...parse(FILE), K3S_TOKEN: value });
      assert.deepEqual(parse(withValues("", { NEW: value })), { NEW: value });
      assert.deepEqual(parse(withValues(FILE, { NEW: value })), { ...parse(FILE), NEW: value });
    });
    test(`does not change the file if it is written again: ${name}`, () => {
      const text = withValues(FILE, { K3S_TOKEN: value });
      assert.equal(withValues(text, { K3S_TOKEN: value }), text);
    });
  }

  test("with a carriage return is refused, because dotenv turns it into a newline", () => {
    assert.throws(() => withValues(FILE, { K3S_TOKEN: "a\rb" }), RangeError);
  });

  test("that cannot be written for dotenv is refused, with an error that contains only its key", () => {
    assert.throws(
      () => withValues(FILE, { K3S_TOKEN: IMPOSSIBLE }),
      (error: Error) => {
        assert.ok(error instanceof RangeError);
        assert.match(error.message, /K3S_TOKEN/);
        assert.doesNotMatch(error.message, /secret/);
        return true;
      },
    );
  });
});

describe("an env file", () => {
  test("keeps its comments, order, spaces, and lines that are not assignments", () => {
    const text = withValues(FILE, { K3S_TOKEN: "new", K3S_URL: "https://b:6443", SERVER: "b" });
    const expected = FILE.replace('"old"', "new")
      .replace("SERVER=root@203.0.113.10   #", "SERVER=b #")
      .concat("\nK3S_URL=https://b:6443\n");
    assert.equal(text, expected);
  });

  test("keeps its CRLF line endings", () => {
    const text = withValues("A=1\r\n# c\r\nB=2\r\nC=3\r\n", { B: "x" });
    assert.match(text, /^A=1\r\n# c\r\nB=x\r?\nC=3\r\n$/);
    assert.deepEqual(parse(text), { A: "1", B: "x", C: "3" });
  });

  test("keeps its other lines, and comments after removed keys, in any notation", () => {
    const gone = {
      K3S_TOKEN: undefined,
      TEXT: undefined,
      PROXY_MODE: undefined,
      LAST: undefined,
      NONE: undefined,
    };
    assert.equal(
      withValues(FILE, gone),
      FILE.replace('K3S_TOKEN="old" # learned', "# learned")
        .replace("  PROXY_MODE: ipvs\n", "")
        .replace('TEXT="several\nlines # no comment"\n', "")
        .replace("LAST=1", ""),
    );
    for (const [text, left] of [
      ["A=1\r\nB=2\r\nC=3\r\n", "A=1\r\nC=3\r\n"],
      ["B=1\nA=1\nexport B='2'\t# c\nB=", "A=1\n# c\n"],
      ["\uFEFFB=1\nA=1\n", "\uFEFFA=1\n"],
      ["BB=1\nB_B=2\n#B=3\n", "BB=1\nB_B=2\n#B=3\n"],
      ["B=\n\nA=1", "\nA=1"],
    ] as const)
      assert.equal(withValues(text, { B: undefined }), left, JSON.stringify(text));
    assert.equal(withValues("B=1\nA=1\n", { B: undefined, A: "2" }), "A=2\n");
  });

  test("keeps keys with similar names", () => {
    const text = withValues("XK3S_URL=1\nK3S_URL_X=2\n#K3S_URL=3\n", { K3S_URL: "new" });
    assert.equal(text, "XK3S_URL=1\nK3S_URL_X=2\n#K3S_URL=3\nK3S_URL=new\n");
  });

  test("is read with the line number of each key, and with the last value of a duplicate key", () => {
    const path = join(temporary(), ".env");
    writeFileSync(path, `${FILE}\nLAST=2\n`);
    const { values, lines } = readEnv(path);
    assert.deepEqual(values, parse(`${FILE}\nLAST=2\n`));
    assert.deepEqual(lines, {
      SERVER: 2,
      AGENTS: 3,
      EMPTY: 4,
      PROXY_MODE: 5,
      K3S_TOKEN: 8,
      TEXT: 10,
      LAST: 13,
    });
    assert.equal(parse(withValues(`${FILE}\nLAST=2\n`, { LAST: "3" })).LAST, "3");
  });

  test("may begin with a byte order mark, and keeps it", () => {
    const path = join(temporary(), ".env");
    writeFileSync(path, "\ufeffA=1\nB=2\n");
    assert.deepEqual(readEnv(path), { values: { A: "1", B: "2" }, lines: { A: 1, B: 2 } });
    assert.equal(withValues("\ufeffA=1\n", { A: "2" }), "\ufeffA=2\n");
  });

  test("in another encoding than UTF-8 is neither read nor overwritten, even if only a comment is affected", async () => {
    const path = join(temporary(), ".env");
    const bytes = Buffer.from("A=1\n# caf\xe9\n", "latin1");
    writeFileSync(path, bytes);
    assert.throws(() => readEnv(path), /line 2: expected UTF-8/);
    await assert.rejects(updateEnv(path, { A: "2" }), /line 2: expected UTF-8/);
    assert.deepEqual(readFileSync(path), bytes);
  });

  test("that does not exist has no values", () => {
    assert.deepEqual(readEnv(join(temporary(), "none")), { values: {}, lines: {} });
  });
});

describe("env.example", () => {
  test("has the description of a setting right above it, and its example", () => {
    const path = join(temporary(), "env.example");
    writeFileSync(
      path,
      '# One.\n\n## Boxes\n\n# Two,\n# with more.\nSERVER="a b"\n# NAMES__b=x\n\n# Three.\n# K3S_URL=y\n',
    );
    assert.deepEqual(readExample(path), {
      SERVER: { help: "Two, with more.", example: "a b" },
      K3S_URL: { help: "Three.", example: "y" },
    });
  });

  test("may be missing, and then describes nothing", () => {
    assert.deepEqual(readExample(join(temporary(), "env.example")), {});
  });
});

describe("the env file on disk", () => {
  test("is readable by its owner only, even if it was readable by all before", async () => {
    const path = join(temporary(), ".env");
    await updateEnv(path, { A: "1" });
    assert.equal(statSync(path).mode & 0o777, 0o600);
    writeFileSync(path, "A=1\n");
    spawnSync("chmod", ["644", path]);
    await updateEnv(path, { A: "2" });
    assert.equal(statSync(path).mode & 0o777, 0o600);
  });

  test("may be a symlink, which is kept", async () => {
    const folder = temporary();
    mkdirSync(`${folder}/real`);
    writeFileSync(`${folder}/real/env`, "# c\nA=1\n");
    symlinkSync("real/env", `${folder}/.env`);
    await updateEnv(`${folder}/.env`, { A: "2" });
    assert.equal(readFileSync(`${folder}/real/env`, "utf8"), "# c\nA=2\n");
    assert.deepEqual(
      readdirSync(folder, { withFileTypes: true })
        .filter((f) => f.isSymbolicLink())
        .map((f) => f.name),
      [".env"],
    );
    assert.deepEqual(readdirSync(`${folder}/real`), ["env"]);
  });

  test("is not written if nothing changes", async () => {
    const path = join(temporary(), ".env");
    writeFileSync(path, "A=1\n", { mode: 0o600 });
    utimesSync(path, 1, 1);
    const { ino } = statSync(path);
    await updateEnv(path, { A: "1" });
    assert.deepEqual([statSync(path).ino, statSync(path).mtimeMs], [ino, 1000]);
  });

  test("has no lock and no temporary file beside it afterwards", async () => {
    const folder = temporary();
    await updateEnv(`${folder}/.env`, { A: "1" });
    assert.deepEqual(readdirSync(folder), [".env"]);
    await assert.rejects(updateEnv(`${folder}/.env`, { A: IMPOSSIBLE }), RangeError);
    assert.deepEqual(readdirSync(folder), [".env"]);
  });
});

describe("the lock", () => {
  test("of a process that has died is taken over", async () => {
    const path = join(temporary(), ".env");
    writeFileSync(`${path}.lock`, String(spawnSync("true").pid));
    await updateEnv(path, { A: "1" }, 1);
    assert.deepEqual(readEnv(path).values, { A: "1" });
  });

  test("that is empty, because its owner died early, is taken over only if it is old", async () => {
    const path = join(temporary(), ".env");
    writeFileSync(`${path}.lock`, "");
    await assert.rejects(updateEnv(path, { A: "1" }, 0.3), /is held/);
    utimesSync(`${path}.lock`, 1, 1);
    await updateEnv(path, { A: "1" }, 1);
    assert.deepEqual(readEnv(path).values, { A: "1" });
  });

  test("of a running process is waited for, and that process is named after a timeout", async () => {
    const path = join(temporary(), ".env");
    writeFileSync(`${path}.lock`, String(process.ppid));
    await assert.rejects(updateEnv(path, { A: "1" }, 0.3), (error: Error) => {
      assert.match(error.message, new RegExp(`"${path}.lock" is held by process ${process.ppid}: try again`));
      return true;
    });
    assert.deepEqual(readEnv(path).values, {});
    assert.equal(readFileSync(`${path}.lock`, "utf8"), String(process.ppid), "the lock is kept");
  });

  test("of a process that had this one's process ID, as in a container, is taken over", async () => {
    const path = join(temporary(), ".env");
    writeFileSync(`${path}.lock`, String(process.pid));
    await updateEnv(path, { A: "1" }, 1);
    assert.deepEqual(readEnv(path).values, { A: "1" });
  });
});

/** A program in `folder`: `updateEnv` and its arguments are defined, and `text` is its code. */
function writer(folder: string, text: string): string {
  const file = join(folder, "writer.mts");
  const lib = pathToFileURL(join(ROOT, "lib/env-file.ts")).href;
  writeFileSync(
    file,
    `const [path, name] = process.argv.slice(2) as [string, string];
const { updateEnv } = await import(${JSON.stringify(lib)});
${text}`,
  );
  return file;
}

test("four processes that write to an env file at the same time, fifty times each, lose nothing", async () => {
  const folder = temporary();
  const path = join(folder, ".env");
  writeFileSync(path, "# kept\nA=1\n");
  const names = ["P", "Q", "R", "S"];
  const file = writer(
    folder,
    `for (let i = 0; i < 50; i++) await updateEnv(path, { [\`\${name}_\${i}\`]: "'".repeat(i), LAST: String(i) }, 50);`,
  );
  const ends = await Promise.all(names.map((name) => program([file, path, name])));
  for (const end of ends) assert.equal(end.status, 0, end.stderr);
  const { values } = readEnv(path);
  for (const name of names)
    for (let i = 0; i < 50; i++) assert.equal(values[`${name}_${i}`], "'".repeat(i), `${name}_${i}`);
  assert.equal(Object.keys(values).length, 202);
  assert.ok(readFileSync(path, "utf8").startsWith("# kept\nA=1\n"));
  assert.deepEqual(readdirSync(folder).sort(), [".env", "writer.mts"]);
});

describe("a killed process", () => {
  const OLD = `# mine\nA=old\n${"B=".padEnd(50_000, "x")}\n`;
  const NEW = OLD.replace("old", "new");

  test("leaves either the old file or the new one", async () => {
    const folder = temporary();
    const file = writer(
      folder,
      `console.log("begins"); for (let i = 0; ; i++) await updateEnv(path, { A: i % 2 ? "old" : "new" });`,
    );
    const kills = Array.from({ length: 8 }, async (_, i) => {
      const path = join(folder, `${i}.env`);
      writeFileSync(path, OLD);
      const { stdout } = await program([file, path], {}, Math.random() * 0.2);
      assert.match(stdout, /begins/);
      const text = readFileSync(path, "utf8");
      assert.ok(text === OLD || text === NEW);
    });
    await Promise.all(kills);
  });
});

import assert from "node:assert/strict";
import { execFileSync, spawnSync } from "node:child_process";
import { readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { forMake } from "../lib/fleet.ts";
import { NAMES } from "../lib/settings.ts";
import { fileOf, programs, ROOT, SCRIPT_FILES, temporary } from "./helpers.ts";

const MAKE = execFileSync("sh", ["-c", "command -v make"], { encoding: "utf8" }).trim();

/** The command with which make would run a script if PATH has only these programs. */
function runs(has: Record<string, string>, ...words: string[]): string {
  const folder = join(temporary(), "bin");
  programs(folder, has);
  const said = execFileSync(MAKE, ["-n", ...words], { cwd: ROOT, encoding: "utf8", env: { PATH: folder } });
  return (said.trim().split("\n").at(-1) as string).replace(/ +/g, " ");
}

describe("make runs the scripts", () => {
  test("with a Node.js that strips types", () => {
    assert.equal(
      runs({ node: "echo strip", deno: "" }, "status"),
      "node --disable-warning=ExperimentalWarning scripts/cluster/status.ts",
    );
  });

  test("with tsx on an older Node.js", () => {
    assert.equal(runs({ node: "echo", deno: "" }, "status"), "node --import tsx scripts/cluster/status.ts");
  });

  test("with Deno if there is no Node.js, without npm", () => {
    assert.equal(runs({ deno: "" }, "up"), "deno run -A scripts/up.ts");
  });

  test("with the flags of its variables", () => {
    for (const [words, command] of [
      ["remove HOST=b1 DRY=1 FORCE=1", "cluster/remove.ts --dry-run --force"],
      ["agent HOST=b1 DRY=1 JSON=1", "agent.ts --dry-run --json"],
      ["plan JSON=1 FORCE=1", "up.ts --json --force --dry-run"],
      ["plan DRY=1", "up.ts --dry-run"],
    ] as const)
      assert.equal(runs({ deno: "" }, ...words.split(" ")), `deno run -A scripts/${command}`);
  });
});

/** make's output and exit status, if PATH has these programs and the environment these variables. */
function make(words: string[], env: Record<string, string> = {}, has: Record<string, string> = { deno: "" }) {
  const folder = join(temporary(), "bin");
  programs(folder, has);
  const { status, stdout, stderr } = spawnSync(MAKE, words, {
    cwd: ROOT,
    encoding: "utf8",
    env: { PATH: folder, ...env },
  });
  return { status, stdout: stdout.replace(/ +/g, " ").trim(), stderr };
}

test("make help lists every script once, first the seven steps in their order, with the plan of them all, then those for operating a cluster", () => {
  const groups = execFileSync(MAKE, ["help"], { cwd: ROOT, encoding: "utf8" }).trim().split("\n\n").slice(1);
  const listed = groups.map((group) => group.split("\n").map((line) => line.trim().split(/ {2,}/)));
  assert.deepEqual(
    listed.map(([heading]) => heading?.[0]),
    ["The seven steps, in their order", "Operating a cluster", "Rehearsal", "Development"],
  );
  const [steps, life] = listed.map((group) => group.slice(1).map(([target]) => target));
  const SEVEN = "download-k3s upgrade-kernel install-wireguard server agent annotate fix-metrics up plan";
  assert.deepEqual(steps, SEVEN.split(" "));
  assert.deepEqual([...steps, ...(life ?? [])].sort(), [...Object.keys(SCRIPT_FILES), "plan"].sort());
});

const USUAL = { PATH: process.env.PATH as string };

describe("a variable on make's command line", () => {
  for (const word of ["DRYRUN=1", "DRY_RUN=1", "dry=1", "SERVR=b1", "FORCED=yes"])
    test(`that is unknown is refused: ${word}`, () => {
      const { status, stdout, stderr } = make(["-n", "down", "YES=1", word], USUAL);
      assert.deepEqual([status, stdout], [2, ""]);
      assert.match(stderr, new RegExp(`${word.split("=")[0]} \\(make's command line\\): expected a setting`));
    });

  test("can be any setting", () => {
    for (const name of NAMES) {
      const { status, stderr } = make(["-n", "agent", `${name}=x`], USUAL);
      assert.deepEqual([status, stderr], [0, ""], name);
    }
  });

  test("that is unknown is accepted in the environment", () => {
    assert.equal(make(["-n", "down"], { ...USUAL, DRYRUN: "1", SERVR: "b1" }).status, 0);
  });
});

describe("a switch", () => {
  const SWITCHES: Record<string, [target: string, flag: string]> = {
    DRY: ["up", "--dry-run"],
    PRINT: ["agent", "--print"],
    REBOOT: ["upgrade-kernel", "--reboot"],
    FORCE: ["remove", "--force"],
    YES: ["down", "--yes"],
    JSON: ["check", "--json"],
    WATCH: ["check", "--watch"],
    USE: ["kubeconfig", "--use"],
  };
  for (const [name, [target, flag]] of Object.entries(SWITCHES)) {
    const plain = `deno run -A ${fileOf(target)}`;
    test(`accepts 1 and yes, and refuses all other values before anything runs: ${name}`, () => {
      for (const word of ["1", "yes"])
        assert.equal(make(["-n", target, `${name}=${word}`]).stdout, `${plain} ${flag}`);
      assert.equal(make(["-n", target, `${name}=`]).stdout, plain);
      for (const word of ["no", "0", "false", "off", "n", "true", "Yes", "1 no", "x"]) {
        const { status, stdout, stderr } = make([target, `${name}=${word}`], {}, { deno: "echo ran" });
        assert.deepEqual([status, stdout], [2, ""], word);
        assert.match(stderr, new RegExp(`${name} is "${word}": expected 1 or yes`));
      }
    });
    const holds = name === "DRY" || name === "PRINT";
    test(`in the environment ${holds ? "is effective, because it only prevents changes" : "is ignored"}: ${name}`, () => {
      for (const more of [[], ["-e"]])
        assert.equal(
          make(["-n", ...more, target], { [name]: "1" }).stdout,
          holds ? `${plain} ${flag}` : plain,
        );
      const { status } = make(["-n", target], { [name]: "0" });
      assert.equal(status, holds ? 2 : 0);
    });
  }

  test("DRY is passed to kubeconfig too, which refuses it", () =>
    assert.equal(
      make(["-n", "kubeconfig", "DRY=1"]).stdout,
      "deno run -A scripts/cluster/kubeconfig.ts --dry-run",
    ));
});

const HARD = [
  "a$b",
  "$HOME",
  "$(shell id)",
  "$$",
  "it's",
  'say "so"',
  "a b",
  "`id`",
  "a\\b",
  "a\\",
  "a#b",
  "~/x",
  "汉",
  "a;b|c&",
  "%.c",
];

test("a value in the command that retries a failed run passes unchanged through the shell and make", () => {
  for (const value of HARD) {
    const line = `${MAKE} status BACKUP=${forMake(value)}`;
    const folder = join(temporary(), "bin");
    programs(folder, { deno: 'printf "[%s]" "$BACKUP"' });
    const { stdout } = spawnSync("/bin/sh", ["-c", line], {
      cwd: ROOT,
      encoding: "utf8",
      env: { PATH: folder },
    });
    assert.equal(stdout, `[${value}]`);
  }
});

test("make in-rehearsal passes its command unchanged, from make's command line and from the environment", () => {
  for (const value of HARD) {
    const says = { deno: 'for word; do :; done; printf "[%s]" "$word"' };
    assert.equal(make(["in-rehearsal", `CMD=${value}`], {}, says).stdout, `[${value}]`);
    assert.equal(make(["in-rehearsal"], { CMD: value }, says).stdout, `[${value}]`);
  }
});

describe("for developers,", () => {
  const BUILT = ["-o", "node_modules/fast-check"];
  const files = readdirSync(join(ROOT, "test")).filter((name) => name.endsWith(".test.ts"));

  test("make test runs every unit test, or those of ONLY", () => {
    const said = (...words: string[]) => make(["-n", ...BUILT, "test", ...words], {}, { node: "" }).stdout;
    assert.deepEqual(said().match(/\S+\.test\.ts/g), files.map((name) => `test/${name}`).sort());
    assert.match(said("ONLY=sh annotate"), /=4 test\/sh\.test\.ts test\/annotate\.test\.ts$/);
  });

  test("make test refuses a name in ONLY that is not a test file, and lists the names", () => {
    for (const only of ["anotate", "sh anotate", "%", "*", "sh.test.ts"]) {
      const { status, stdout, stderr } = make([...BUILT, "test", `ONLY=${only}`], {}, { node: "echo ran" });
      assert.deepEqual([status, stdout], [2, ""], only);
      assert.ok(stderr.includes(`ONLY is "${only}": expected some of agent annotate args`), stderr);
    }
  });

  test("make lint runs shellcheck, reports if it is not installed, and fails without it in CI", () => {
    const lint = (env: Record<string, string>, has: Record<string, string>) =>
      make([...BUILT, "lint"], env, { node: "", npm: "", ...has });
    const shellcheck = { shellcheck: 'echo "checks $*"' };
    assert.equal(lint({}, shellcheck).stdout, "checks .ci/run .ci/hooks/pre-push test/lab/inside.sh");
    assert.equal(lint({}, { shellcheck: "exit 1" }).status, 2);
    assert.notEqual(lint({}, { ...shellcheck, npm: "exit 1" }).status, 0);
    for (const CI of ["", "true"]) {
      const { status, stderr } = lint({ CI }, {});
      assert.equal(status, CI ? 2 : 0);
      assert.match(stderr, /^shellcheck is not installed: not checked: \.ci\/run .*\n/);
    }
  });

  test("make hooks makes git run make lint test before a push", () => {
    const { stdout } = make(["hooks"], {}, { git: 'echo "$*"' });
    const [, folder = ""] = /^config core\.hooksPath (.*)$/.exec(stdout) ?? [];
    const hook = join(ROOT, folder, "pre-push");
    assert.ok(statSync(hook).mode & 0o100);
    assert.match(readFileSync(hook, "utf8"), /^exec make lint test$/m);
  });

  test(".editorconfig has the indentation and line length of biome", () => {
    const { formatter } = JSON.parse(readFileSync(join(ROOT, "biome.json"), "utf8"));
    const all = readFileSync(join(ROOT, ".editorconfig"), "utf8").split(/^\[/m)[1] ?? "";
    assert.match(all, new RegExp(`^indent_style = ${formatter.indentStyle}$`, "m"));
    assert.match(all, new RegExp(`^max_line_length = ${formatter.lineWidth}$`, "m"));
  });
});

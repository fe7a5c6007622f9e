import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { join } from "node:path";
import { describe, test } from "node:test";
import { programs, ROOT, temporary } from "./helpers.ts";

const MAKE = execFileSync("sh", ["-c", "command -v make"], { encoding: "utf8" }).trim();

/** The command by which make would run a script where PATH has these programs alone. */
function runs(has: Record<string, string>, ...words: string[]): string {
  const folder = join(temporary(), "bin");
  programs(folder, has);
  const said = execFileSync(MAKE, ["-n", ...words], { cwd: ROOT, encoding: "utf8", env: { PATH: folder } });
  return (said.trim().split("\n").at(-1) as string).replace(/ +/g, " ");
}

describe("make runs the scripts", () => {
  test("by a node that strips types", () => {
    assert.equal(
      runs({ node: "echo strip", deno: "" }, "status"),
      "node --disable-warning=ExperimentalWarning scripts/status.ts",
    );
  });

  test("by an older node with tsx", () => {
    assert.equal(runs({ node: "echo", deno: "" }, "status"), "node --import tsx scripts/status.ts");
  });

  test("by Deno where there is no node, and then asks npm for nothing", () => {
    assert.equal(runs({ deno: "" }, "up"), "deno run -A scripts/up.ts");
  });

  test("with the flags that its variables stand for", () => {
    assert.equal(
      runs({ deno: "" }, "remove", "HOST=b1", "DRY=1", "FORCE=1"),
      "deno run -A scripts/remove.ts --dry-run --force",
    );
  });
});

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join, normalize } from "node:path";
import { test } from "node:test";
import { ROOT } from "./helpers.ts";

const files = ["lib", "scripts"].flatMap((folder) =>
  (readdirSync(join(ROOT, folder), { recursive: true }) as string[])
    .filter((name) => name.endsWith(".ts"))
    .map((name) => `${folder}/${name}`),
);
const text = Object.fromEntries(files.map((file) => [file, readFileSync(join(ROOT, file), "utf8")]));
const each = <T>(of: (file: string, text: string) => T): [string, T][] =>
  Object.entries(text).map(([file, text]) => [file, of(file, text)]);

/** What a file imports of these; imports of types and those at run time are imports too. */
const imports = new Map(
  each((file, text) =>
    [...text.matchAll(/\b(?:from|import)\s*\(?\s*"(\.[^"]+)"/g)].map((m) =>
      normalize(join(file, "..", m[1] as string)),
    ),
  ),
);

test("the layers are lib/*.ts, lib/k3s, lib/check and scripts, and none imports a later one", () => {
  const layers = [/^lib\/[^/]+$/, /^lib\/k3s\//, /^lib\/check\//, /^scripts\//];
  const layer = (file: string) => layers.findIndex((pattern) => pattern.test(file));
  const upward = [...imports].flatMap(([file, targets]) => {
    assert.ok(layer(file) >= 0, `${file} is in no layer`);
    return targets
      .filter((target) => !(layer(target) <= layer(file)))
      .map((target) => `${file} -> ${target}`);
  });
  assert.deepEqual(upward, []);
});

test("there are no circular imports, neither of types nor at run time", () => {
  const reached = (file: string, seen = new Set<string>()): Set<string> => {
    for (const target of imports.get(file) ?? []) if (!seen.has(target)) reached(target, seen.add(target));
    return seen;
  };
  const found = [...imports].flatMap(([file, targets]) =>
    targets.filter((target) => reached(target).has(file)).map((target) => `${file} -> ${target}`),
  );
  assert.deepEqual(found, []);
});

test("no two files of lib and scripts export the same name", () => {
  const names = each((_, text) =>
    [...text.matchAll(/^export (?:async )?(?:function\*?|const|let|class|interface|type) (\w+)/gm)].map(
      (m) => m[1] as string,
    ),
  ).flatMap(([, names]) => names);
  const twice = names.filter((name, i) => names.indexOf(name) !== i);
  assert.deepEqual(twice, []);
});

test("lib/*.ts does not mention k3s, flannel or WireGuard outside the table of settings", () => {
  const found = each((_, text) =>
    text
      // The name of this project is not a mention of k3s.
      .replaceAll("k3s-across-clouds", "")
      .split("\n")
      .filter((line) => /k3s|flannel|wireguard/i.test(line)),
  ).filter(([file, lines]) => lines.length && /^lib\/[^/]+$/.test(file) && file !== "lib/table.ts");
  assert.deepEqual(found, []);
});

test("the format of a token is known in only one file", () => {
  const found = each((_, text) => /K10|::(server|node|\*):/.test(text.replace(/^ *(\/\/|\/?\*).*$/gm, "")))
    .filter(([, has]) => has)
    .map(([file]) => file);
  assert.deepEqual(found, ["lib/token.ts"]);
});

test("every file of lib and scripts begins with a comment that describes it", () => {
  // A comment directly above a declaration describes only that.
  const opening = /^(#![^\n]*\n)?\/\*\*\s(?:(?!\*\/).)*[.:]\s*\*\/\n(\n|import )/s;
  const without = each((_, text) => opening.test(text)).filter(([, has]) => !has);
  assert.deepEqual(without, []);
});

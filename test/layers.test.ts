import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join, normalize } from "node:path";
import { test } from "node:test";
import { ROOT } from "./helpers.ts";

// What does not hold yet. These lists may only shrink, and have to: an exception that is not needed fails too.

/** How many lines of these name k3s, flannel or WireGuard all the same. */
const NAMING = [
  "lib/boxes.ts: 4 lines",
  "lib/cli.ts: 2 lines",
  "lib/files.ts: 2 lines",
  "lib/settings.ts: 2 lines",
  "lib/fleet.ts: 1 lines",
  "lib/protocol.ts: 1 lines",
];

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

/** Holds what was found against its exceptions, both ways. */
function only(found: string[], exceptions: string[], rule: string) {
  const more = found.filter((one) => !exceptions.includes(one));
  assert.deepEqual(more, [], rule);
  const fewer = exceptions.filter((one) => !found.includes(one));
  assert.deepEqual(fewer, [], "Better than before: take these from the exceptions in test/layers.test.ts");
}

test("lib is layered: lib/*.ts, then lib/k3s, then lib/check, then scripts; none imports one above it", () => {
  const layers = [/^lib\/[^/]+$/, /^lib\/k3s\//, /^lib\/check\//, /^scripts\//];
  const layer = (file: string) => layers.findIndex((pattern) => pattern.test(file));
  const upward = [...imports].flatMap(([file, targets]) => {
    assert.ok(layer(file) >= 0, `${file} is in no layer`);
    return targets
      .filter((target) => !(layer(target) <= layer(file)))
      .map((target) => `${file} -> ${target}`);
  });
  only([...new Set(upward)], [], "These import a layer above");
});

test("no import is part of a circle, be it of a type or at run time", () => {
  const reached = (file: string, seen = new Set<string>()): Set<string> => {
    for (const target of imports.get(file) ?? []) if (!seen.has(target)) reached(target, seen.add(target));
    return seen;
  };
  const found = [...imports].flatMap(([file, targets]) =>
    targets.filter((target) => reached(target).has(file)).map((target) => `${file} -> ${target}`),
  );
  only([...new Set(found)], [], "These imports close a circle");
});

test("no two files of lib and scripts export the same name", () => {
  const names = each((_, text) =>
    [...text.matchAll(/^export (?:async )?(?:function\*?|const|let|class|interface|type) (\w+)/gm)].map(
      (m) => m[1] as string,
    ),
  ).flatMap(([, names]) => names);
  const twice = names.filter((name, i) => names.indexOf(name) !== i);
  only([...new Set(twice)], [], "These names are exported by several files");
});

test("lib/*.ts names nothing of k3s, flannel or WireGuard outside the table of settings", () => {
  const found = each(
    (_, text) =>
      text
        // The name of this project is no word about k3s.
        .replaceAll("k3s-across-clouds", "")
        .split("\n")
        .filter((line) => /k3s|flannel|wireguard/i.test(line)).length,
  )
    .filter(([file, lines]) => lines && /^lib\/[^/]+$/.test(file) && file !== "lib/table.ts")
    .map(([file, lines]) => `${file}: ${lines} lines`);
  only(found, NAMING, "This belongs into a file about k3s; where lines became fewer, lower the number");
});

test("every file of lib and scripts opens with a comment that says what it is", () => {
  // One that stands right above a declaration is about that.
  const opening = /^(#![^\n]*\n)?\/\*\*\s(?:(?!\*\/).)*[.:]\s*\*\/\n(\n|import )/s;
  const without = each((_, text) => opening.test(text)).filter(([, has]) => !has);
  assert.deepEqual(without, []);
});

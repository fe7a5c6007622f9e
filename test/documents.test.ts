import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { test } from "node:test";
import { ROOT } from "./helpers.ts";

const documents = ["", ".ci", "lib", "scripts", "test"].flatMap((folder) =>
  (readdirSync(join(ROOT, folder), { recursive: folder !== "" }) as string[])
    .filter((name) => name.endsWith(".md"))
    .map((name) => join(folder, name)),
);
const isThere = (path: string) => existsSync(join(ROOT, path));
const text = (document: string) => readFileSync(join(ROOT, document), "utf8");

test("every file that a document mentions exists", () => {
  for (const document of documents)
    for (const [path] of text(document).matchAll(/(?<![\w/.-])(lib|scripts|test|\.ci)\/[\w./-]*\w/g))
      assert.ok(isThere(path), `${document} names ${path}`);
});

/** The anchors that GitHub makes of a document's headings. */
const anchors = (document: string) =>
  [...text(document).matchAll(/^#+ (.*)$/gm)].map(([, heading]) =>
    (heading as string)
      .toLowerCase()
      .replace(/[^\p{L}\p{N} _-]/gu, "")
      .replaceAll(" ", "-"),
  );

test("every link in a document points to an existing file and heading", () => {
  for (const document of documents)
    for (const [, to = "", anchor] of text(document).matchAll(/\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)/g)) {
      const target = to ? join(dirname(document), to) : document;
      assert.ok(isThere(target), `${document} links to ${to}`);
      if (anchor !== undefined)
        assert.ok(anchors(target).includes(anchor), `${document} links to ${to}#${anchor}`);
    }
});

test("every make command in a document is a target of the Makefile", () => {
  const targets = [...text("Makefile").matchAll(/^([a-z0-9-]+):/gm)].map(([, target]) => target);
  for (const document of documents)
    for (const [, target] of text(document).matchAll(
      /(?:`|^ {4,}|'|&& |sudo )make (?:-\S+ )*([a-z][\w-]*)/gm,
    ))
      assert.ok(targets.includes(target), `${document} has "make ${target}"`);
});

test("every message that the manual quotes is in the scripts, apart from its ellipses", () => {
  const code = ["lib", "scripts"].flatMap((folder) =>
    (readdirSync(join(ROOT, folder), { recursive: true }) as string[])
      .filter((name) => name.endsWith(".ts"))
      .map((name) => text(join(folder, name))),
  );
  for (const document of ["scripts/cluster/README.md", "scripts/cluster/README.zh.md"])
    for (const [, quoted = ""] of text(document).matchAll(/(?<!\*)\*([^*\s][^*]*)\*(?!\*)/g))
      for (const part of quoted.split("…").map((part) => part.trim().replace(/\.$/, "").replace(/\s+/g, " ")))
        assert.ok(
          code.some((file) => file.includes(part)),
          `${document} quotes "${part}"`,
        );
});

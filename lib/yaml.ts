/** YAML as programs in Go read it: version 1.1, with merge keys. */
import { createRequire } from "node:module";
import type { YAML as Yaml } from "zx";

/** Loaded when it is needed: the whole of zx takes 0.1 s. */
const yaml = (): typeof Yaml => createRequire(import.meta.url)("zx").YAML;

const AS_GO = { version: "1.1", merge: true } as const;

/**
 * One document: its nodes, which know where they stand in the text, and what they say.
 *
 * @throws {Error} in one line, for what is no YAML, or is several documents; for aliases that lead nowhere or to too much.
 */
export function yamlIn(text: string): { document: ReturnType<typeof Yaml.parseDocument>; data: unknown } {
  const document = yaml().parseDocument(text, AS_GO);
  const [wrong] = document.errors;
  if (wrong?.code === "MULTIPLE_DOCS")
    throw new Error("it has several documents, of which the first alone is read");
  if (wrong) throw new Error(wrong.message.split("\n")[0].replace(/:$/, ""));
  return { document, data: document.toJS() };
}

/** A value in lines of block style. */
export const yamlLines = (value: unknown): string[] =>
  new (yaml().Document)(value, AS_GO).toString({ lineWidth: 0 }).trimEnd().split("\n");

/** YAML as programs in Go read it: version 1.1, with merge keys. */
import { YAML } from "zx";

const AS_GO = { version: "1.1", merge: true } as const;

/**
 * One document: its nodes, which know where they stand in the text, and what they say.
 *
 * @throws {Error} in one line, for what is no YAML, or is several documents; for aliases that lead nowhere or to too much.
 */
export function yamlIn(text: string): { document: ReturnType<typeof YAML.parseDocument>; data: unknown } {
  const document = YAML.parseDocument(text, AS_GO);
  const [wrong] = document.errors;
  if (wrong?.code === "MULTIPLE_DOCS")
    throw new Error("it has several documents, of which the first alone is read");
  if (wrong) throw new Error(wrong.message.split("\n")[0].replace(/:$/, ""));
  return { document, data: document.toJS() };
}

/** A value in lines of block style. */
export const yamlLines = (value: unknown): string[] =>
  new YAML.Document(value, AS_GO).toString({ lineWidth: 0 }).trimEnd().split("\n");

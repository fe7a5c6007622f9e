/**
 * The stand-in for a release's `k3s` binary. It is not k3s: its pods are processes of its own. It answers as k3s was recorded to answer.
 * A box needs `boxFiles` in place and a node binary (24 or later) at /opt/k3s-stand-in/node.
 */

import { createHash } from "node:crypto";
import { readdirSync } from "node:fs";
import { basename, join } from "node:path";
import { versionText } from "./common.ts";

export const HOME = "/opt/k3s-stand-in";
const SIZE = 3 * 1024 * 1024;

/** Where node keeps what it has compiled: each call would spend 170 ms of CPU on it, instead of 40. */
export const COMPILED = (home: string) => ({
  NODE_COMPILE_CACHE: `${home}/compiled`,
  NODE_COMPILE_CACHE_PORTABLE: "1",
});

/**
 * The text served as the release's `k3s` file: large enough that a download can be cut, slowed and resumed. It says its
 * version without node, whose start takes 150 ms of CPU; k3s itself takes 11.
 */
export function standIn(version: string): string {
  const env = Object.entries(COMPILED(HOME)).map(([key, value]) => `${key}=${value}`);
  const launcher = `#!/bin/sh
case \${0##*/}:$* in kubectl:*) ;; *:--version) printf %s '${versionText(version)}'; exit ;; esac
exec env ${env.join(" ")} ${HOME}/node --no-warnings ${HOME}/k3s.ts '${version}' "$0" "$@"
exit 126
`;
  let seed = version;
  const lines: string[] = [];
  for (let size = launcher.length; size < SIZE; size += 66) {
    seed = createHash("sha256").update(seed).digest("hex");
    lines.push(`#${seed}\n`);
  }
  return launcher + lines.join("");
}

/** What a box needs beside the node binary: where it lies here, and where it goes. */
export function boxFiles(): { from: string; to: string }[] {
  const fixtures = join(import.meta.dirname, "..", "fixtures");
  return [
    ...readdirSync(import.meta.dirname)
      .filter((f) => f.endsWith(".ts"))
      .map((f) => ({ from: join(import.meta.dirname, f), to: `${HOME}/${f}` })),
    ...readdirSync(fixtures)
      .filter((f) => f.startsWith("k3s-"))
      .map((f) => ({ from: join(fixtures, f), to: `${HOME}/fixtures/${basename(f)}` })),
  ];
}

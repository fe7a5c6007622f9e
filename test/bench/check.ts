#!/usr/bin/env -S node --import tsx
/**
 * How long `make check` takes with 3 boxes and with 20, in one run (root; some minutes). First in a lab whose
 * boxes all share this machine's cores, then with an ssh that answers as those boxes did, each after 150 ms: what
 * is left there is the script's own, as where every box has cores of its own.
 */
import { chmodSync, mkdirSync, writeFileSync } from "node:fs";
import { cpus } from "node:os";
import { join } from "node:path";
import { type Lab, up } from "../lab/lab.ts";

const CHECK = "node --import tsx scripts/cluster/check.ts --json";
const FEW = ["a1", "b1", "b2"];
// Not a10: its address is that of env.example, which counts as not edited.
const MANY = [9, 11].flatMap((boxes, of) => Array.from({ length: boxes }, (_, i) => `${"ab"[of]}${i + 1}`));
const ROUNDS = 3;
const DELAY = 0.15;

/** Boxes as an env file has them: with the address behind the name, for which ssh is not asked. */
const placesOf = (lab: Lab, names: string[]) =>
  names.map((name) => `${name}=${lab.boxes.find((box) => box.name === name)?.publicIp}`);

/** Wall seconds of each of several runs, and the script's own CPU seconds of the last. */
async function measure(lab: Lab, names: string[], what: string, env: Record<string, string> = {}) {
  const agents = placesOf(lab, names).slice(1).join(" ");
  const walls: string[] = [];
  let own = "";
  for (let round = 0; round < ROUNDS; round++) {
    const began = performance.now();
    const { exitCode, stdout, stderr } = await lab.op(
      ["bash", "-c", `TIMEFORMAT='own %U+%S'; time ${CHECK}`],
      {
        env: { AGENTS: agents, ...env },
      },
    );
    walls.push(((performance.now() - began) / 1000).toFixed(2));
    own = /own \S+/.exec(stderr)?.[0] ?? "";
    const said = JSON.parse(stdout);
    if (said.boxes.length !== names.length || said.nodes.length < names.length)
      throw new Error(`${what}: ${said.boxes.length} boxes, ${said.nodes.length} nodes, not ${names.length}`);
    if (exitCode) console.log(`  (${said.wrong.map((ill: { cause: string }) => ill.cause).join("; ")})`);
  }
  console.log(
    `${what.padEnd(34)} ${String(names.length).padStart(2)} boxes  wall ${walls.join(" ")} s  ${own} s CPU`,
  );
}

/** An ssh that lets the real one answer, and remembers; or answers so after a while. */
function shim(lab: Lab) {
  const folder = join(lab.dir, "home/shim");
  mkdirSync(join(folder, "kept"), { recursive: true });
  const text = `#!/bin/sh
for word; do case $word in -G|-O) exec /usr/bin/ssh "$@" ;; esac; done
host=; past=; for word; do [ -n "$past" ] && { host=$word; break; }; [ "$word" != -- ] || past=yes; done
while script=$(sed "/ exit ' >&2$/q"); [ -n "$script" ]; do
  mark=$(printf '%s\\n' "$script" | sed -n 's/^m=//p')
  end=$(printf '%s\\n' "$script" | sed -n "\\$s/.*'\\(.*\\) exit '.*/\\1/p")
  case $script in *'fact named'*) part=look ;; *'fact tries'*) part=tries ;; *) part=pods ;; esac
  kept=${folder}/kept/$host.$part
  if [ -n "$RECORD" ]; then
    printf '%s\\n' "$script" | /usr/bin/ssh "$@" | sed "s/$mark/MARK/g; s/$end/END/" | tee "$kept" | sed "s/MARK/$mark/g; s/END/$end/"
  else
    sleep ${DELAY}
    now=$(date +%s)
    sed "s/MARK/$mark/g; s/END/$end/; s/ say [0-9.]*/ say $now/" "$kept"
    echo "$end exit " >&2
  fi
done
`;
  writeFileSync(join(folder, "ssh"), text);
  chmodSync(join(folder, "ssh"), 0o755);
  return folder;
}

const lab = await up({ name: "t-check-bench", boxes: FEW, hairpin: ["a", "b"] }, console.error);
try {
  const mirrors = `${lab.mirror.plain} ${lab.mirror.github}`;
  writeFileSync(
    lab.envFile,
    `SERVER=${placesOf(lab, ["a1"])}\nAGENTS="${placesOf(lab, FEW.slice(1)).join(" ")}"\nK3S_MIRRORS="${mirrors}"\n`,
    { mode: 0o600 },
  );
  const make = async (command: string) => {
    const { exitCode, stderr } = await lab.op(command);
    if (exitCode) throw new Error(`${command}: ${stderr.slice(-2000)}`);
  };
  console.log(`${cpus().length} cores, node ${process.version}`);
  await make("make -j up");
  await measure(lab, FEW, "boxes share this machine");
  const more = MANY.filter((name) => !FEW.includes(name));
  for (const name of more) await lab.add(name);
  await make(`make agent HOST="${placesOf(lab, more).join(" ")}"`);
  await measure(lab, MANY, "boxes share this machine");

  const folder = shim(lab);
  const PATH = `${folder}:${process.env.PATH}`;
  const recorded = await lab.op(CHECK, {
    env: { PATH, RECORD: "yes", AGENTS: placesOf(lab, MANY).slice(1).join(" ") },
  });
  if (!recorded.stdout) throw new Error(recorded.stderr);
  await measure(lab, FEW, `answers of theirs after ${DELAY} s`, { PATH });
  await measure(lab, MANY, `answers of theirs after ${DELAY} s`, { PATH });
} finally {
  await lab.down();
}

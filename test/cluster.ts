/** A cluster of a1, b1 and b2 for whole scripts, with an ssh that returns facts in place of boxes. */
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { planAll, type Step } from "../lib/step.ts";
import { agent, agentSteps } from "../scripts/agent.ts";
import { fixMetrics } from "../scripts/fix-metrics.ts";
import { server, serverSteps } from "../scripts/server.ts";
import {
  A1,
  B1,
  B2,
  box,
  type Facts,
  figures,
  fileOf,
  filesAfter,
  fixture,
  healthy,
  IP,
  MODERN,
  NOW,
  type NodeSpec,
  peer,
  prepared,
  program,
  programs,
  service,
  TOKEN,
  temporary,
  unitsOf,
  wanted,
} from "./helpers.ts";

/** A box without facts cannot be reached; `BOX.after` has the facts after its changes. */
const SSH = `[ "$1" = -G ] && { echo "hostname $3"; exit; }
case "$*" in *' -O '*) exit ;; esac
while [ "$1" != -- ]; do shift; done
[ -e "$BOXES/$2" ] || { echo "connect to host $2 port 22: No route to host" >&2; exit 255; }
while script=$(sed "/ exit ' >&2$/q"); [ -n "$script" ]; do
  echo 'k3s-across-clouds: begin'
  [ ! -e "$BOXES/$2.slow" ] || sleep 3
  mark=$(printf '%s\\n' "$script" | sed -n 's/^m=\\(k3s-across-clouds-[0-9a-f]*\\)$/\\1/p')
  case $script in
  *'change 0 '*)
    printf '\\n%s change 0\\n' "$mark"
    [ ! -e "$BOXES/$2.after" ] || cp "$BOXES/$2.after" "$BOXES/$2"
    ;;
  esac
  sed "s/^@MARK /$mark /" "$BOXES/$2"
  printf '\\n%s end\\n' "$mark"
  end=$(printf '%s\\n' "$script" | sed -n "\\$s/.*'\\(.*\\)'.*/\\1/p")
  echo "$end"0
  echo "$end" >&2
done`;

const file = (facts: Facts) =>
  Object.entries(facts)
    .map(([name, text]) => `\n@MARK fact ${name}\n${text.replace(/\n$/, "")}\n`)
    .join("");

export const ENV = `# mine\nSERVER=a1=${A1.ip}\nAGENTS="b1=${B1.ip} b2=${B2.ip}"\n`;
export const JOINED = `K3S_URL=https://${IP}:6443\nK3S_TOKEN=${TOKEN} # learned\n`;

/** Runs a script on such boxes. */
export async function run(script: string, args: string[], envFile: string, boxes: Record<string, Facts>) {
  const folder = temporary();
  const PATH = programs(join(folder, "bin"), { ssh: SSH });
  for (const [name, facts] of Object.entries(boxes)) writeFileSync(join(folder, name), file(facts));
  const ENV_FILE = join(folder, ".env");
  writeFileSync(ENV_FILE, envFile);
  const ended = await program([fileOf(script), ...args], { PATH, ENV_FILE, BOXES: folder });
  return { ...ended, env: readFileSync(ENV_FILE, "utf8") };
}

/** The facts of a healthy member of a1, b1 and b2, and that there is nothing to do on it. */
function member(spec: NodeSpec, steps: readonly Step[], own: Step, over: Facts = {}): Facts {
  const want = wanted({ PUBLIC_IP: spec.ip, K3S_VERSION: MODERN, SERVER: `a1=${A1.ip}` });
  const of = prepared(MODERN, box(spec));
  const running = service(NOW - 1800);
  const peers = [A1, B1, B2].filter((other) => other.name !== spec.name);
  const { unit = "", envfile = "" } = filesAfter(own, want, own.plan(want, of));
  const facts = healthy(
    MODERN,
    { unit, envfile },
    {
      ...box(spec),
      peers: peers.map((other) => peer(MODERN, other, other.ip, 30)).join("\n"),
      processes: own === server ? unitsOf(running) : unitsOf(undefined, running),
      ...over,
    },
  );
  assert.deepEqual(
    planAll(steps, want, facts).map(({ why }) => why),
    [],
    spec.name,
  );
  return facts;
}

const metrics = {
  cas: `server ${TOKEN.slice(3, 67)}\n`,
  token: TOKEN,
  packaged: fixture("metrics-server-v1.36.3.yaml"),
  top: figures("a1", "b1", "b2"),
};
export const a1 = () => member(A1, [...serverSteps, fixMetrics], server, metrics);
export const [b1, b2] = [B1, B2].map((spec) => () => member(spec, agentSteps, agent)) as [
  () => Facts,
  () => Facts,
];
export const fresh = (name: string, over: Facts = {}) =>
  prepared(MODERN, { hostname: `${name}\n`, version: "", kubectl: "", ...over });

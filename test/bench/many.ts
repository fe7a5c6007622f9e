#!/usr/bin/env -S node --import tsx
/**
 * What many boxes cost their operator when there is nothing to do: `make -j up`, `make status` and `make check` for 10 to
 * 300 boxes, with real ssh. Three real boxes are brought up first, and what they answer is recorded. Then one sshd with an
 * address for each box answers like them: an agent as b77, and each line about a88 stands for all other agents. So a box
 * costs a login and a file, and as on rented servers the operator's machine is what is busy. Root, some minutes.
 *
 *     BOXES="10 30 100 300" MS=50   sizes, and the boxes' distance in milliseconds
 */
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { loadavg } from "node:os";
import { join } from "node:path";
import type { Lab } from "../lab/lab.ts";
import { slowLab } from "./slow.ts";

const ROUNDS = { "up again": "make -j up", status: "make status", check: "make check" };
/** What a look takes on a box that has its cores for itself, in seconds. */
const LOOK = 0.2;
const [SERVER, SELF, OTHER] = ["a1", "b77", "a88"] as const;

/** It goes into the operator's process, and keeps what each script brought. */
const HOOK = String.raw`
import childProcess from "node:child_process";
import { appendFileSync } from "node:fs";
import { syncBuiltinESMExports } from "node:module";
const { spawn } = childProcess;
childProcess.spawn = (program, argv, ...rest) => {
  const child = spawn(program, argv, ...rest);
  if (program !== "ssh" || argv.includes("-O")) return child;
  let text = "";
  const { push } = child.stdout;
  child.stdout.push = (chunk, ...more) => {
    text += chunk ?? "";
    for (let end; (end = /^k3s-across-clouds-[0-9a-f]{16} exit \d+\n/m.exec(text)); ) {
      const answer = [argv[argv.indexOf("--") + 1], text.slice(0, end.index)];
      appendFileSync(process.env.RECORD, JSON.stringify(answer) + "\n");
      text = text.slice(end.index + end[0].length);
    }
    return push.call(child.stdout, chunk, ...more);
  };
  return child;
};
syncBuiltinESMExports();
`;

/** What the answers of one box, or about it, have of it: its name, addresses, keys and ids. */
type Entity = string[];

async function entityOf(lab: Lab, name: string): Promise<Entity> {
  const said = await lab
    .box(name)
    .sh(
      "wg show flannel-wg public-key; cat /etc/machine-id; sed -n 's/^FLANNEL_SUBNET=\\(.*\\)1\\/24/\\1/p' /run/flannel/subnet.env",
    );
  return said.trim().split("\n");
}

/** The nth of the many agents. */
function agent(n: number): Entity {
  const hex = n.toString(16).padStart(4, "0");
  return [
    `n${n}`,
    `198.51.${102 + Math.floor(n / 250)}.${1 + (n % 250)}`,
    `${Buffer.from(`key ${hex}`.padEnd(32, "k")).toString("base64")}`,
    `${"c".repeat(28)}${hex}`,
    `10.${100 + Math.floor(n / 250)}.${n % 250}.`,
  ];
}

const has = (line: string, of: Entity) => of.some((value) => line.includes(value));
const put = (line: string, was: Entity, is: Entity) =>
  was.reduce((text, value, i) => text.replaceAll(value, is[i] as string), line);

/** The answer of one of many boxes, from one of three. */
const multiplied = (answer: string, self: Entity, other: Entity, me: Entity, others: Entity[]) =>
  answer
    .replaceAll('},{"metadata":{', '},\n{"metadata":{')
    .split("\n")
    .flatMap((line) => {
      const mine = put(line, self, me);
      return has(line, other) ? others.map((one) => put(mine, other, one)) : [mine];
    })
    .join("\n");

/** From now on sshd answers at each of these addresses, by this folder's files. */
async function serve(lab: Lab, crowd: string, addresses: string[]) {
  await Promise.all(lab.boxes.map((box) => box.off()));
  const root = join(lab.dir, "boxes", SELF, "root");
  await lab.net(
    "op",
    `ip netns add crowd
ip -n inet link add crowd type veth peer name eth0 netns crowd
ip -n inet link set crowd master br0 up
ip -n crowd link set eth0 up
printf 'address add %s/22 dev eth0\n' ${addresses.join(" ")} | ip -n crowd -b -
ip -n crowd route add 203.0.113.0/24 dev eth0
ip route add 198.51.102.0/23 dev eth0
mount --bind /dev ${root}/dev
mkdir -p ${root}/run/sshd ${root}/crowd
mount --bind ${crowd} ${root}/crowd
printf '%s\n' 'MaxStartups 1000' 'UsePAM no' 'UseDNS no' 'ForceCommand /crowd/answer' >${root}/etc/ssh/sshd_config.d/crowd.conf
ip netns exec crowd chroot ${root} /usr/sbin/sshd </dev/null >/dev/null 2>&1`,
  );
}

/** The nth script to an address is answered by the file ADDRESS/n of the round. */
const ANSWER = `#!/bin/sh
set -- $SSH_CONNECTION
cd "/crowd/now/$3"
while script=$(sed "/ exit ' >&2$/q"); [ -n "$script" ]; do
  echo "k3s-across-clouds: begin"
  mark=$(printf '%s\\n' "$script" | sed -n 's/^m=//p')
  end=$(printf '%s\\n' "$script" | sed -n "\\$s/.*'\\(.*\\) exit '.*/\\1/p")
  n=$(($(cat count) + 1))
  echo $n >count
  sleep ${LOOK}
  sed "s/@MARK@/$mark/g" $n
  echo "$end exit 0"
  echo "$end exit " >&2
done
`;

const row = (...cells: (string | number)[]) =>
  console.log(cells.map((cell) => `${cell}`.padStart(10)).join(""));

const lab = await slowLab("many", [SERVER, SELF, OTHER], Number(process.env.MS || 50));
try {
  const home = join(lab.dir, "home");
  const crowd = join(lab.dir, "crowd");
  const record = join(home, "record");
  mkdirSync(crowd);
  writeFileSync(join(crowd, "answer"), ANSWER, { mode: 0o755 });
  writeFileSync(join(home, "hook.mjs"), HOOK);
  const named = (agents: Entity[]) => agents.map(([name, ip]) => `${name}=${ip}`).join(" ");
  const [server = [], self = [], other = []] = [SERVER, SELF, OTHER].map((name) => [
    name,
    lab.box(name).publicIp,
  ]);
  const ran = await lab.op("make -j up");
  if (ran.exitCode) throw new Error(ran.stderr);
  for (const entity of [self, other]) entity.push(...(await entityOf(lab, entity[0] as string)));
  /** By round and box, in their order. */
  const answers = new Map<string, string[]>();
  for (const [what, command] of Object.entries(ROUNDS)) {
    writeFileSync(record, "");
    const { exitCode, stdout, stderr } = await lab.op(`NODE_OPTIONS="--import ${home}/hook.mjs" ${command}`, {
      env: { RECORD: record },
    });
    if (exitCode)
      console.error(`${what} of three boxes ended with ${exitCode}: ${stdout}${stderr}`.slice(-2000));
    for (const line of readFileSync(record, "utf8").trim().split("\n")) {
      const [host, text] = JSON.parse(line) as [string, string];
      const key = `${what} ${host}`;
      const mark = /^(k3s-across-clouds-[0-9a-f]{16}) /m.exec(text)?.[1] ?? "";
      const answer = text.slice(text.indexOf("\n") + 1).replaceAll(mark, "@MARK@");
      answers.set(key, [...(answers.get(key) ?? []), answer]);
    }
  }

  const sizes = (process.env.BOXES || "10 30 100 300").split(" ").map(Number);
  const addressOf = (n: number) => (n ? (agent(n)[1] as string) : "198.51.103.254");
  await serve(
    lab,
    crowd,
    Array.from({ length: Math.max(...sizes) }, (_, n) => addressOf(n)),
  );
  const hostKey = readFileSync(join(lab.dir, "boxes", SELF, "host-key.pub"), "utf8");
  const settings = readFileSync(lab.envFile, "utf8");
  const traffic = async () => {
    const [{ stats64 }] = JSON.parse(await lab.net("op", "ip -s -j link show eth0"));
    return [stats64.tx.bytes, stats64.rx.bytes] as [number, number];
  };

  row("boxes", "what", "wall s", "CPU s", "MB", "processes", "files", "kB sent", "kB got", "load");
  for (const boxes of sizes) {
    const agents = Array.from({ length: boxes - 1 }, (_, i) => agent(i + 1));
    const all = [server, ...agents];
    const hosts = all.map(([name], n) => ({ name, address: addressOf(n) }));
    const config = hosts.map(({ name, address }) => `Host ${name}\n  HostName ${address}\n  User root\n`);
    writeFileSync(join(home, ".ssh/config"), config.join(""));
    writeFileSync(
      join(home, ".ssh/known_hosts"),
      hosts.map(({ address }) => `${address} ${hostKey}`).join(""),
    );
    writeFileSync(lab.envFile, settings.replace(/^AGENTS=.*$/m, `AGENTS="${named(agents)}"`));
    for (const [what, command] of Object.entries(ROUNDS)) {
      const now = join(crowd, "now");
      rmSync(now, { recursive: true, force: true });
      for (const [n, me] of all.entries()) {
        const folder = join(now, addressOf(n));
        mkdirSync(folder, { recursive: true });
        writeFileSync(join(folder, "count"), "0");
        for (const [i, answer] of (answers.get(`${what} ${n ? SELF : SERVER}`) ?? []).entries()) {
          // In what the server says, the recorded agent is the first of the many.
          const others = agents.filter((one) => one !== me && (n || one !== agents[0]));
          const text = multiplied(answer, self, other, n ? me : (agents[0] as Entity), others);
          writeFileSync(join(folder, `${i + 1}`), text);
        }
      }
      const [sent, got] = await traffic();
      const began = performance.now();
      const { ran, cpu, memory, processes, files } = await lab.metered(["sh", "-c", command], {
        timeout: 900,
      });
      const wall = (performance.now() - began) / 1000;
      const [sentNow, gotNow] = await traffic();
      const kB = (bytes: number) => (bytes / 1000).toFixed(0);
      const figures = [wall.toFixed(1), cpu.toFixed(1), (memory / 1e6).toFixed(0), processes, files];
      row(
        boxes,
        what,
        ...figures,
        kB(sentNow - sent),
        kB(gotNow - got),

        loadavg()[0]?.toFixed(1) ?? "",
      );
      if (ran.exitCode)
        console.error(`${what} ended with ${ran.exitCode}: ${ran.stdout}${ran.stderr}`.slice(0, 1500));
    }
  }
} finally {
  await lab.down();
}

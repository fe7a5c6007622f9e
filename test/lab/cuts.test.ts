/**
 * Runs that are interrupted before and inside each change of each script, by everything that can happen to an operator,
 * a connection or a box. The next run leads to the result of an uninterrupted one, and a third has nothing to do.
 *
 * Pairs of boxes work in parallel, each with its own cluster, and are restored from a saved disk for each case.
 * `make faults` tries every case (ONLY="agent remove" those of some scripts), `make test-lab` the same few each time.
 */
import assert from "node:assert/strict";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { after, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { parse } from "dotenv";
import { quote } from "../../lib/sh.ts";
import { fileOf } from "../helpers.ts";
import type { Box, Light } from "./lab.ts";
import { bench, connected, hangUp, MODERN, nodes, OLD, release, soon } from "./suite.ts";

const ALL = Boolean(process.env.ALL);
const ONLY = (process.env.ONLY ?? "").split(" ").filter(Boolean);
const NUMBERS = [1, 2, 3, 4, 5, 6];
/** What `upgrade` goes to. */
const NEXT: Record<string, string> = { [OLD]: "v1.17.17+k3s1", [MODERN]: "v1.36.3+k3s1" };

const t = await bench({
  name: "cuts",
  boxes: NUMBERS.flatMap((n) => [`a${n}`, `b${n}`]),
  hairpin: ["a", "b"],
  disk: 64,
});
after(() => t.lab.down());
t.settings();
await Promise.all(Object.values(NEXT).map((version) => release(t.lab, version)));

/** b is interrupted; a is the server that it joins, if the script needs one. */
interface Pair {
  a: Light;
  b: Light;
  envFile: string;
  /** The names of its saved disks. */
  saved: Set<string>;
}

const pairs: Pair[] = NUMBERS.map((n) => ({
  a: t.box(`a${n}`),
  b: t.box(`b${n}`),
  envFile: join(dirname(t.lab.envFile), `b${n}.env`),
  saved: new Set(),
}));

interface Group {
  script: string;
  version: string;
  /** It has a server at a. */
  joins?: true;
  /** What runs on b first. */
  before: string[];
  /** What is then broken or otherwise changed. */
  spoil?(pair: Pair): Promise<unknown>;
  /** Of the whole cluster, not of b alone. */
  whole?: true;
}

const TOOLS = ["download-k3s", "install-wireguard"];

const groups: Group[] = [OLD, MODERN]
  .flatMap((version): Group[] => [
    { script: "server", version, before: TOOLS },
    { script: "agent", version, joins: true, before: TOOLS },
    { script: "download-k3s", version, before: [] },
    { script: "remove", version, joins: true, before: [...TOOLS, "agent"] },
    {
      script: "upgrade",
      version,
      joins: true,
      whole: true,
      before: [...TOOLS, "agent"],
      // The server has it already: b's part is left.
      spoil: async (pair) => {
        const agents = `AGENTS="${pair.b.name}"`;
        const change = (from: string, to: string) =>
          writeFileSync(pair.envFile, readFileSync(pair.envFile, "utf8").replace(from, to));
        change(agents, 'AGENTS=""');
        change(version, NEXT[version] as string);
        await t.ok(script("upgrade"), { env: operator(pair) });
        change('AGENTS=""', agents);
      },
    },
  ])
  .concat([
    // One generation has nothing to do in these, or does the same.
    { script: "install-wireguard", version: MODERN, before: [] },
    {
      script: "annotate",
      version: OLD,
      joins: true,
      before: [...TOOLS, "agent"],
      spoil: ({ a, b }) =>
        a.sh(
          `kubectl annotate --overwrite node ${b.name} flannel.alpha.coreos.com/public-ip-overwrite=${b.privateIp}`,
        ),
    },
    { script: "fix-metrics", version: OLD, before: [...TOOLS, "server"] },
    { script: "token", version: MODERN, before: [...TOOLS, "server"] },
    { script: "firewall", version: MODERN, joins: true, before: [...TOOLS, "agent"] },
  ]);

/** Where a change is interrupted, by what it does: at this command, or half-way through its only one. */
const INSIDE: [RegExp, string[]][] = [
  [/^download /, ["transfer"]],
  [/^install /, ["unpacked"]],
  [/^prove /, ["wg show"]],
  [/^(write|deploy) /, ["mv"]],
  [/^keep /, ["echo"]],
  [/^nft: /, ["systemctl daemon-reload"]],
  [/^(re)?start /, ["systemctl restart", "beat"]],
  // It may have nothing to sleep for.
  [/^wait /, ["end="]],
  [/^(stop|clear) /, ["network="]],
  [/^remove k3s's/, ["systemctl daemon-reload"]],
];

/**
 * Holds a change on its box. apply() runs each with `timeout … sh -s`; bash traps each command before it
 * runs; a download is stopped half-way, and dpkg after unpacking.
 */
const TOOL = Object.entries({
  held: `#!/bin/sh
# held PLACE: waits here, once, if the run is to be interrupted at this place
[ "$(cat /run/cut/place 2>/dev/null)" = "$1" ] && mkdir /run/cut/at 2>/dev/null || exit 0
until [ -e /run/cut/go ]; do sleep 0.05; done
`,
  timeout: `#!/bin/bash
case "$*" in *'sh -s') ;; *) exec /usr/bin/timeout "$@" ;; esac
[ -e /run/cut/place ] || exec /usr/bin/timeout "$@"
k=$(($(cat /run/cut/count) + 1))
echo $k >/run/cut/count
held "before $k"
case $(cat /run/cut/place) in
"inside $k: "*) export k; exec /usr/bin/timeout "\${@:1:3}" bash --posix -c '
  at() { case $BASH_COMMAND in "$1"*) held "inside $k: $1" ;; esac; }
  set -T
  at=$(sed "s/[^:]*: //" /run/cut/place)
  trap "at \\"$at\\"" DEBUG
  . /dev/stdin' ;;
*) exec /usr/bin/timeout "$@" ;;
esac
`,
  curl: `#!/bin/sh
case "$(cat /run/cut/place 2>/dev/null) $*" in *": transfer "*" -o "*) ;; *) exec /usr/bin/curl "$@" ;; esac
/usr/bin/curl --limit-rate 2M "$@" & pid=$!
sleep 0.7
kill -STOP $pid
held "$(cat /run/cut/place)"
kill -CONT $pid
wait $pid
`,
})
  .map(
    ([name, text]) => `printf %s ${quote(text)} >/usr/local/sbin/${name}; chmod 755 /usr/local/sbin/${name}`,
  )
  .concat(
    `echo ${quote(`post-invoke=case "$(cat /run/cut/place 2>/dev/null)" in *": unpacked") /usr/local/sbin/held "$(cat /run/cut/place)" ;; esac`)} >/etc/dpkg/dpkg.cfg.d/cut`,
    // Names, so that there is something to be lost with DNS.
    `printf '%s\\n' '203.0.113.80 github.lab' '203.0.113.81 plain.lab' '203.0.113.82 packages.lab' >>/etc/hosts
echo 'deb [trusted=yes] http://packages.lab ./' >/etc/apt/sources.list
: >/etc/resolv.conf`,
  )
  .join("\n");

interface Fault {
  /** Returns a function that repairs it. */
  strike(
    pair: Pair,
    signal: (name: string) => Promise<unknown>,
  ): Promise<(() => Promise<unknown>) | undefined>;
  /** How long it lasts, in seconds, unless the run ends before. */
  seconds?: number;
  /** How the run ends: its status and output. Otherwise it succeeds, or fails with its name. */
  ends?: [status: number, says: RegExp];
}

const LOST: Fault["ends"] = [1, /FAILED after .*\n(.*\n)*.* again: make /];
const SHUT = "/etc /usr /var /root /home /tmp";
const FAULTS: Record<string, Fault> = {
  "connection dropped": {
    strike: async ({ b }) => void (await hangUp(b, "sshd")),
    ends: LOST,
  },
  "session killed": { strike: async ({ b }) => void (await hangUp(b)), ends: LOST },
  "box reset": {
    strike: async ({ b }) => {
      await b.off();
      return void (await b.on());
    },
    ends: LOST,
  },
  "operator killed": { strike: async (_, signal) => void (await signal("KILL")), ends: [137, /^/] },
  "Ctrl-C": {
    strike: async (_, signal) => void (await signal("INT")),
    ends: [130, /Interrupted\. .*run the same again to finish\./],
  },
  "disk full": {
    strike: async ({ b }) => {
      await b.sh("dd if=/dev/zero of=/var/full bs=4k 2>/dev/null || :");
      return () => b.sh("rm /var/full");
    },
    seconds: 10,
  },
  "disk read-only": {
    strike: async ({ b }) => {
      await b.sh(`for at in ${SHUT}; do mount --bind $at $at; mount -o remount,bind,ro $at; done`);
      return () => b.sh(`for at in ${SHUT}; do mount -o remount,bind,rw $at; umount -l $at; done`);
    },
    seconds: 10,
  },
  "network down for 30 s": {
    strike: async ({ b }) => {
      await t.lab.net("router-b", `ip link set ${b.name} down`);
      return () => t.lab.net("router-b", `ip link set ${b.name} up`);
    },
    seconds: 30,
  },
  "DNS down": {
    strike: async ({ b }) => {
      await b.sh(
        "cp /etc/hosts /run/hosts; sed -i /lab$/d /etc/hosts; echo nameserver 203.0.113.99 >/etc/resolv.conf",
      );
      return () => b.sh("cat /run/hosts >/etc/hosts; : >/etc/resolv.conf");
    },
    seconds: 10,
  },
};

const operator = (pair: Pair) => ({
  ENV_FILE: pair.envFile,
  // A killed ssh leaves a socket behind: in the lab, not on this machine.
  TMPDIR: "/run",
});
/** With the lab's Node.js, which strips types itself, because there are hundreds of runs. */
const script = (name: string, box?: Box) =>
  `${t.lab.dir}/stand-in/node --no-warnings ${fileOf(name)}${box ? ` --host ${box.name}` : ""}`;
const commandOf = (group: Group, { b }: Pair) => script(group.script, group.whole ? undefined : b);

/** Starts a script as a person at a terminal would, so that it has signals for itself. */
function begin(pair: Pair, command: string) {
  const log = `$HOME/${pair.b.name}.log`;
  // A shell without job control would have its children ignore SIGINT.
  const ended = t.op(
    [
      "bash",
      "-c",
      `set -m
${command} </dev/null >${log} 2>&1 & echo $! >${log}.pid
wait $! 2>/dev/null
echo "ended with $?"
cat ${log}`,
    ],
    { env: operator(pair), timeout: 200 },
  );
  const signal = (name: string) => t.ok(`kill -s ${name} -- -$(cat ${log}.pid)`);
  const left = async () => (await t.op(`pgrep -ag $(cat ${log}.pid)`)).out;
  return { ended, signal, left };
}

/** What differs on a disk from one uninterrupted run to the next. */
const NOISE =
  "^./(var/(log|cache|tmp)/|var/lib/(systemd|apt)/|tmp/systemd-private|etc/resolv.conf|var/lib/dpkg/(lock|.*-old))";
const OWN = "^./(var/lib/rancher|etc/rancher)/";

/** All that a run leaves: on b's disk and in its memory, in the cluster, and with the operator. */
async function result({ a, b, envFile }: Pair, { joins, script }: Group) {
  // A change that a lost operator has begun may still be running if the next run found nothing to do.
  const memory = await b.sh(`flock -w 60 /run/k3s-across-clouds.lock true || echo locked
systemctl is-active k3s k3s-agent || :
systemctl is-enabled k3s k3s-agent 2>&1 || :
ls -A /sys/class/net
nft list tables | grep k3s || :
ls -A /run | grep -e k3s -e '^tmp' | grep -v lock || :
ps -e -o comm= | grep -vE '^(sshd|sh|ps|grep|sort|uniq|\\(sd-pam\\)|systemd.*|dbus-.*|agetty|sftp-server|wg|ip|iptables.*)$' | sort | uniq -c`);
  const disk = await t.lab.net(
    "op",
    `cd ${t.lab.dir}/boxes/${b.name}/disk/upper
find . ! -type d -printf '%p %y %m %U %l\\n' | grep -vE '${NOISE}' | sort
find . -type d -printf '%p %y %m %U\\n' | grep -E '${OWN}|^./(usr/local|etc/systemd)' | sort
find . -type f | grep -vE '${NOISE}|${OWN}' | sort | xargs -d '\\n' sha256sum`,
  );
  const values = parse(readFileSync(envFile, "utf8"));
  const kept = readdirSync(dirname(envFile)).filter((name) => name.startsWith(basename(envFile)));
  const server = joins ? a : values.K3S_TOKEN ? b : undefined;
  const cluster = server && (await nodes(server));
  if (server) {
    assert.equal(values.K3S_TOKEN, (await server.sh("cat /var/lib/rancher/k3s/server/node-token")).trim());
    const boxes = joins && script !== "remove" ? [a, b] : [server];
    await soon(() => connected(boxes));
    // A box has one key, and it is the one that its peers have.
    for (const [own, other] of [boxes, boxes.toReversed()] as [Light, Light | undefined][])
      if (other)
        assert.equal(
          (await own.sh("wg show all public-key | cut -f2")).trim(),
          (await other.sh("wg show all dump | awk -F'\t' 'NF == 9 && $5 != \"(none)\" { print $2 }'")).trim(),
          `${own.name} has another key than ${other.name} knows`,
        );
  }
  return { disk: disk.split("\n"), memory: memory.split("\n"), cluster, settings: Object.keys(values), kept };
}

type Result = Awaited<ReturnType<typeof result>>;

interface Prepared {
  env: string;
  /** The changes of an uninterrupted run on b, as it prints them. */
  changes: string[];
  uncut: Result;
}

/** Waits until k3s runs where it ran when the disks were saved. */
async function settled({ a, b }: Pair, { joins, before }: Group) {
  const until = (box: Box, what: string) =>
    box.sh(`for _ in $(seq 150); do ! { ${what}; } >/dev/null 2>&1 || exit 0; sleep 0.2; done; exit 1`);
  const runs = "ls -d /sys/class/net/flannel*";
  await Promise.all([
    joins && until(a, `${runs} && kubectl get nodes`),
    before.includes("server") && until(b, `${runs} && kubectl get nodes`),
    before.includes("agent") && until(b, runs),
  ]);
}

/** Prepares a pair for the script, saves its disks, and runs the script without an interruption. */
async function prepare(pair: Pair, group: Group): Promise<Prepared> {
  const { a, b, envFile, saved } = pair;
  const run = (name: string, box: Box) => t.ok(script(name, box), { env: operator(pair) });
  if (!saved.size) {
    await b.sh(TOOL);
    await Promise.all([b.save("fresh"), a.sh(TOOL).then(() => a.save("fresh"))]);
    saved.add("fresh");
  } else await Promise.all([b.restore("fresh"), group.joins && a.restore("fresh")]);
  const server = group.joins ? a : b;
  const settings = {
    SERVER: server.name,
    AGENTS: group.joins ? b.name : "",
    K3S_VERSION: group.version,
    K3S_MIRRORS: t.mirrors.replace("203.0.113.80", "github.lab").replace("203.0.113.81", "plain.lab"),
  };
  const lines = Object.entries(settings).map(([key, value]) => `${key}="${value}"\n`);
  writeFileSync(envFile, lines.join(""), { mode: 0o600 });
  await Promise.all([
    (async () => {
      for (const name of group.before.filter((name) => name !== "agent")) await run(name, b);
    })(),
    group.joins && run("server", a),
  ]);
  if (group.before.includes("agent")) await run("agent", b);
  await group.spoil?.(pair);
  const env = readFileSync(envFile, "utf8");
  t.secret(parse(env).K3S_TOKEN ?? "none yet");
  await Promise.all([b.save("begun"), group.joins && a.save("begun")]);
  await settled(pair, group);

  await b.sh("mkdir /run/cut; echo 0 >/run/cut/count; echo none >/run/cut/place");
  const said = await t.ok(commandOf(group, pair), { env: operator(pair) });
  const count = Number(await b.sh("cat /run/cut/count; rm -r /run/cut"));
  const changes = [...said.text.matchAll(new RegExp(`^${b.name} {2}(?! |done|waits|nothing)(.*)$`, "gm"))]
    .map((m) => m[1] as string)
    // The server makes these.
    .filter((why) => !/^(drain|let|delete|forget the node|uncordon) /.test(why));
  assert.equal(changes.length, count, said.text);
  return { env, changes, uncut: await result(pair, group) };
}

interface Case {
  fault: string;
  /** before K, or inside K: COMMAND. */
  place: string;
  why: string;
}

const casesOf = ({ changes }: Prepared): Case[] =>
  changes.flatMap((why, i) =>
    [
      `before ${i + 1}`,
      ...(INSIDE.find(([what]) => what.test(why))?.[1] ?? []).map((command) => `inside ${i + 1}: ${command}`),
    ].flatMap((place) => Object.keys(FAULTS).map((fault) => ({ fault, place, why }))),
  );

/** False if it could not be interrupted there. */
async function tryCase(pair: Pair, group: Group, { env, uncut }: Prepared, { fault, place, why }: Case) {
  const { a, b, envFile } = pair;
  const command = commandOf(group, pair);
  const options = { env: operator(pair) };
  await Promise.all([b.restore("begun"), group.joins && a.restore("begun")]);
  writeFileSync(envFile, env, { mode: 0o600 });
  await settled(pair, group);
  await b.sh(`mkdir /run/cut; echo 0 >/run/cut/count; echo ${quote(place)} >/run/cut/place`);

  // All processes of make end with it.
  const run = begin(
    pair,
    fault === "Ctrl-C" ? `make ${group.script}${group.whole ? "" : ` HOST=${b.name}`}` : command,
  );
  let over = false;
  void run.ended.finally(() => {
    over = true;
  });
  let reached = false;
  while (!over && !reached)
    reached =
      (await b.sh(
        "for _ in $(seq 20); do [ ! -e /run/cut/at ] || { echo yes; break; }; sleep 0.05; done",
      )) !== "";
  if (!reached) {
    const { text } = await run.ended;
    // If there are handshakes already, there is nothing to wait for, and nothing to interrupt.
    if (why.startsWith("wait ") && text.startsWith("ended with 0\n")) return false;
    assert.fail(`"${why}" was not begun:\n${text}`);
  }

  const { strike, seconds, ends } = FAULTS[fault] as Fault;
  const mend = await strike(pair, run.signal);
  await b.sh("mkdir -p /run/cut; : >/run/cut/go");
  if (seconds) await Promise.race([run.ended, sleep(seconds * 1000)]);
  await mend?.();
  const { text } = await run.ended;
  const status = Number(/^ended with (\d+)$/m.exec(text)?.[1]);
  if (Number.isNaN(status)) assert.fail(`It has no end:\n${(await t.op(`cat $HOME/${b.name}.log`)).text}`);
  if (ends) assert.equal(status, ends[0], text);
  if (status) assert.match(text, ends?.[1] ?? (LOST?.[1] as RegExp));
  assert(status < 2 || ends, text);
  if (fault === "Ctrl-C") assert.equal(await run.left(), "");

  await t.ok(command, options);
  // A token is rotated in every run.
  if (group.script !== "token") await t.says(command, 0, ["nothing to do"], options);
  const { K3S_TOKEN } = parse(readFileSync(envFile, "utf8"));
  if (K3S_TOKEN) t.secret(K3S_TOKEN);
  // Pods may start a little later.
  await soon(async () => assert.deepEqual(await result(pair, group), uncut));
  return true;
}

/** The same sample of the cases each time: with one in 41, each fault and each place occurs. */
const sampled = (cases: Case[], group: Group) =>
  cases.filter((_, i) => (i + 7 * groups.indexOf(group)) % 41 === 0);

const counts = new Map<string, { cases: number; survived: number }>();

test("after any interruption, the next run leads to the result of an uninterrupted run", {
  concurrency: pairs.length,
}, async (test) => {
  const asked = groups.filter(({ script }) => !ONLY.length || ONLY.includes(script));
  const parts = asked.flatMap((group) => {
    const of = ALL ? (/server|agent/.test(group.script) ? 6 : 2) : 1;
    return Array.from({ length: of }, (_, part) => ({ group, part, of }));
  });
  await Promise.all(
    pairs.map(async (pair) => {
      for (let next = parts.shift(); next; next = parts.shift()) {
        const { group, part, of } = next;
        const name = `${group.script} ${group.version}`;
        let uncut: Prepared | undefined;
        await test.test(`${name}: uninterrupted`, async () => {
          uncut = await prepare(pair, group);
        });
        if (!uncut) continue;
        const prepared = uncut;
        const all = casesOf(prepared);
        const mine = (ALL ? all : sampled(all, group)).filter((_, i) => i % of === part);
        for (const one of mine) {
          const key = `${group.script} | ${one.fault}`;
          const count = counts.get(key) ?? { cases: 0, survived: 0 };
          counts.set(key, count);
          count.cases++;
          await test.test(`${name}: ${one.fault} ${one.place} (${one.why.slice(0, 60)})`, async () => {
            if (await tryCase(pair, group, prepared, one)) count.survived++;
            else count.cases--;
          });
        }
      }
    }),
  );
});

after(() => {
  const sum = (of: (key: string) => boolean) => {
    const some = [...counts].filter(([key]) => of(key)).map(([, count]) => count);
    const total = (what: "cases" | "survived") => some.reduce((n, count) => n + count[what], 0);
    return total("cases") ? `${total("survived")} of ${total("cases")}` : "";
  };
  const scripts = [...new Set(groups.map(({ script }) => script))];
  const row = (cells: string[]) =>
    cells
      .map((cell, i) => cell.padEnd(i ? 12 : 24))
      .join("")
      .trimEnd();
  console.log(
    [
      row(["survived", ...scripts.map((name) => name.slice(0, 11)), "all"]),
      ...Object.keys(FAULTS).map((fault) =>
        row([
          fault,
          ...scripts.map((script) => sum((key) => key === `${script} | ${fault}`)),
          sum((key) => key.endsWith(` | ${fault}`)),
        ]),
      ),
      row(["all", ...scripts.map((script) => sum((key) => key.startsWith(`${script} | `))), sum(() => true)]),
    ].join("\n"),
  );
});

/** What the lab's tests share: a lab a file, commands whose output is searched for secrets, and looks at boxes. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync, statSync, writeFileSync } from "node:fs";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { parse } from "dotenv";
import { quote } from "../../lib/sh.ts";
import { fileOf } from "../helpers.ts";
import { standIn } from "../stand-in/pack.ts";
import { type Box, type Cloud, down, type Home, type Lab, type LabSpec, type Run, up } from "./lab.ts";

export const OLD = "v1.17.6+k3s1";
export const MODERN = "v1.36.2+k3s1";
export const SCRIPTS = [
  "download-k3s",
  "upgrade-kernel",
  "install-wireguard",
  "server",
  "agent",
  "annotate",
  "fix-metrics",
] as const;

export interface Said {
  status: number | null;
  out: string;
  /** Both streams. */
  text: string;
  seconds: number;
}

export type Bench = Awaited<ReturnType<typeof bench>>;

/** Of this checkout: suites of two of them leave each other's labs alone. */
const MARK = createHash("sha256")
  .update(import.meta.dirname)
  .digest("hex")
  .slice(0, 3);

/**
 * A lab of this file's own. Every command given to it is held to two rules:
 * no token shows, and no escape sequence comes down a pipe.
 */
export async function bench(spec: LabSpec) {
  const name = `t${MARK}-${spec.name}`;
  return over(
    await up({ ...spec, name }).catch(async (error) => {
      await down(name);
      throw error;
    }),
  );
}

function over(lab: Lab) {
  const secrets = new Set<string>();
  const env = (): Record<string, string> => parse(readFileSync(lab.envFile, "utf8"));
  const mirrors = `${lab.mirror.plain} ${lab.mirror.github}`;

  async function op(command: string | string[], options: Run = {}): Promise<Said> {
    const began = Date.now();
    const { exitCode: status, stdout: out, stderr } = await lab.op(command, { timeout: 900, ...options });
    const text = `${out}${stderr}`;
    for (const token of [env().K3S_TOKEN, options.env?.K3S_TOKEN])
      if (token) secrets.add(token).add(token.split(":").at(-1) as string);
    for (const secret of secrets) assert(!text.includes(secret), `"${command}" shows the token:\n${text}`);
    // biome-ignore lint/suspicious/noControlCharactersInRegex: that is what is looked for
    assert.doesNotMatch(text, /[\x1b\r]/, `"${command}" writes escape sequences to a pipe`);
    return { status, out, text, seconds: (Date.now() - began) / 1000 };
  }

  /** The command must end with this status and say all of these. */
  async function says(command: string, status: number, texts: (string | RegExp)[] = [], options?: Run) {
    const said = await op(command, options);
    assert.equal(said.status, status, `"${command}" ended with ${said.status}, not ${status}:\n${said.text}`);
    for (const text of texts)
      if (typeof text === "string")
        assert(said.text.includes(text), `"${command}" does not say "${text}":\n${said.text}`);
      else assert.match(said.text, text, `"${command}"`);
    return said;
  }

  /**
   * Starts the command as a person at a terminal would, and sends the signal to all of it once its output
   * matches. Answers its status and whether it came so far.
   */
  async function cut(command: string, pattern: RegExp, signal: "KILL" | "INT" | "TERM" | "HUP") {
    // A shell without job control would have its children ignore SIGINT.
    const { text } = await op(
      [
        "bash",
        "-c",
        `set -m
log=$HOME/cut.log; : >"$log"
${command} </dev/null >"$log" 2>&1 & pid=$!
reached=no
until grep -qE ${quote(pattern.source)} "$log" && reached=yes || ! kill -0 $pid 2>/dev/null; do sleep 0.02; done
kill -${signal} -- -$pid 2>/dev/null
wait $pid 2>/dev/null
echo "ended with $? reached $reached"
cat "$log"`,
      ],
      // Of a killed ssh a socket stays behind: in the lab, not on this machine.
      { env: { TMPDIR: "/run" } },
    );
    const [, status, reached] = /^ended with (\d+) reached (yes|no)$/m.exec(text) ?? [];
    return { status: Number(status), reached: reached === "yes", text };
  }

  /** The command's first run is killed at this point; a second one finishes it, and a third has nothing to do. */
  async function cutThenDone(command: string, at: RegExp) {
    const run = await cut(command, at, "KILL");
    assert(run.reached, `${command} did not come to ${at}:\n${run.text}`);
    const { text } = await says(command, 0);
    await says(command, 0, ["nothing to do"]);
    return text;
  }

  return {
    lab,
    mirrors,
    cut,
    cutThenDone,
    env,
    op,
    says,
    ok: (command: string, options?: Run) => says(command, 0, [], options),
    box: (name: string) => lab.box(name),
    secret: (word: string) => void secrets.add(word),
    /** Writes the operator's env file: SERVER, AGENTS and the mirrors, and what else is given. */
    settings(more: Record<string, string> = {}, { server = "a1", agents = "b1 b2" } = {}) {
      const all = { SERVER: server, AGENTS: agents, K3S_MIRRORS: mirrors, ...more };
      const text = Object.entries(all).map(([key, value]) => `${key}="${value}"\n`);
      writeFileSync(lab.envFile, text.join(""), { mode: 0o600 });
    },
    envMode: () => (statSync(lab.envFile).mode & 0o777).toString(8),
    /** Requests that the mirror got while `part` ran, a line each: address, method, path, range, status. */
    async requests(part: () => Promise<unknown>) {
      const before = readFileSync(lab.mirror.log, "utf8").length;
      await part();
      return readFileSync(lab.mirror.log, "utf8").slice(before).trim().split("\n").filter(Boolean);
    },
    trips: (names: string[], part: () => Promise<unknown>) =>
      trips(
        names.map((name) => lab.box(name)),
        part,
      ),
  };
}

/** The script as a program, for its exit status: make answers 2 whatever went wrong. */
export const script = (name: string, flags = "") =>
  `node ${process.env.K3S_LAB_NODE ? "--no-warnings" : "--import tsx"} ${fileOf(name)} ${flags}`;

/** Scripts and other remote commands that boxes were sent over ssh while `part` ran, and logins, by box. */
export async function trips(boxes: Box[], part: () => Promise<unknown>) {
  await Promise.all(boxes.map(listen));
  const count = async () => Promise.all(boxes.map(async (box) => JSON.parse(await box.sh(TRIPS))));
  const before = await count();
  await part();
  const now = await count();
  return Object.fromEntries(
    boxes.map(({ name }, i) => [
      name,
      { commands: now[i].commands - before[i].commands, logins: now[i].logins - before[i].logins },
    ]),
  );
}

/** Has sshd write down what it is sent: a command may be a shell that is sent many scripts, which all begin with a line of ours. */
async function listen(box: Box) {
  await box.sh(`conf=/etc/ssh/sshd_config.d/verbose.conf
[ -e $conf ] && exit
mkdir -m 1777 /var/tmp/trips
cat >/var/tmp/trip <<'END'
#!/bin/sh
case $SSH_ORIGINAL_COMMAND in *begin*) echo >/var/tmp/trips/$$; exec sh -c "$SSH_ORIGINAL_COMMAND" ;; esac
(umask 077; exec tee /var/tmp/trips/$$) | sh -c "$SSH_ORIGINAL_COMMAND"
END
chmod 755 /var/tmp/trip
printf 'LogLevel VERBOSE\nForceCommand /var/tmp/trip\n' >$conf
systemctl reload ssh; sleep 0.3`);
}

const TRIPS = `commands=0
for trip in /var/tmp/trips/*; do
  [ -e "$trip" ] || continue
  scripts=$(grep -ac "^echo 'k3s-across-clouds: begin'$" "$trip" || :)
  commands=$((commands + (scripts > 1 ? scripts : 1)))
done
echo "{ \\"commands\\": $commands, \\"logins\\": $(journalctl -u ssh -o cat --no-pager | grep -c '^Accepted publickey') }"`;

/**
 * All that a box is told by: files of /etc, /usr/local, the homes and /boot with their hashes, modes and times,
 * k3s's manifests, packages, what lies in /tmp and k3s's folders, k3s's units with the time they started, and what runs.
 */
export const state = (box: Box) =>
  box.sh(`find /etc /usr/local /root /home /boot -xdev -printf '%p %y %m %u %s %T@ %l\\n' | sort
find /etc /usr/local /root /home /boot -xdev -type f -exec sha256sum {} + | sort
sha256sum /var/lib/dpkg/status
find /var/lib/rancher/k3s/server/manifests -type f -exec sha256sum {} + 2>/dev/null | sort
ls -A /tmp /run/k3s-across-clouds.lock /var/lib/rancher /etc/rancher 2>&1 | grep -v '^systemd-private'
ls /sys/class/net
${STARTS}
ps -e -o comm= | grep -vE '^(sshd|sh|ps|grep|sort|uniq|sudo|\\(sd-pam\\)|systemd.*|dbus-.*|agetty|sftp-server)$' | sort | uniq -c`);

/**
 * Fails with the lines that differ from `before`, what `state` said of each box. What was started by an ssh
 * session may outlive it by a moment: the boxes have ten seconds to be as they were.
 */
export async function untouched(boxes: Box[], before: string[]) {
  for (const end = Date.now() + 10_000; ; await sleep(500)) {
    const now = await Promise.all(boxes.map(state));
    const changes = boxes.flatMap(({ name }, i) => {
      const was = (before[i] as string).split("\n");
      const is = (now[i] as string).split("\n");
      return [
        ...was.filter((line) => !is.includes(line)).map((line) => `${name} - ${line}`),
        ...is.filter((line) => !was.includes(line)).map((line) => `${name} + ${line}`),
      ];
    });
    if (!changes.length) return;
    if (Date.now() > end) assert.fail(["A box has changed:", ...changes].join("\n"));
  }
}

const STARTS =
  "systemctl show k3s k3s-agent -p Id -p MainPID -p ExecMainStartTimestampMonotonic -p NRestarts";

/**
 * Ends whatever an operator started on the box: all of sshd's processes but itself, and but the test's own.
 * Of those only with this name: "sshd" cuts the connections, and what they started goes on.
 */
export const hangUp = (box: Box, name = ".") =>
  box.sh(`main=$(systemctl show ssh -p MainPID | cut -d= -f2)
pids=$(ps -e -o pid=,comm=,cgroup= | awk -v not=" $main $$ $PPID " \\
  '/ssh.service/ && $2 ~ /${name}/ && !index(not, " " $1 " ") { print $1 }')
[ -n "$pids" ]
kill -9 $pids 2>/dev/null || : # some may have ended by themselves`);

/** A rule in front of what a cloud's router passes on, until the function that is answered is called. */
export async function routerRule(lab: Lab, cloud: Cloud | Home, chain: "forward" | "ports", rule: string) {
  const router = `router-${cloud}`;
  const said = await lab.net(router, `nft -e -a 'insert rule ip filter ${chain} ${rule}'`);
  const handle = /# handle (\d+)/.exec(said)?.[1];
  return () => lab.net(router, `nft delete rule ip filter ${chain} handle ${handle}`);
}

/** Holds back every restart that `systemctl` is asked for, until /usr/local/sbin/systemctl is removed. */
export const holdRestarts = (box: Box) =>
  box.sh(`cat >/usr/local/sbin/systemctl <<'SH'
#!/bin/sh
case "$*" in *restart*) while [ -e /usr/local/sbin/systemctl ]; do sleep 0.1; done ;; esac
exec /usr/bin/systemctl "$@"
SH
chmod 755 /usr/local/sbin/systemctl`);

/** Waits until one is held. */
export async function held(box: Box) {
  for (let i = 0; i < 300; i++, await sleep(100))
    if ((await box.sh("pgrep -f 'sbin/systemctl restart --no-block k3s-agen[t]' || :")).trim()) return;
  assert.fail(`no restart is held on ${box.name}`);
}

/** How often systemd has started k3s on the box since it booted. */
export const starts = async (box: Box): Promise<number> =>
  Number(
    await box.sh(
      "journalctl -b -u k3s -u k3s-agent --no-pager | grep -cE 'systemd\\[1\\]: Starting k3s(-agent)?\\.service' || true",
    ),
  );

/** How a server answers, on its own box, who comes by this token. */
export const door = (server: Box, token: string): Promise<string> =>
  server.sh(
    `curl -sk -u node:${token.split(":").at(-1)} -o /dev/null -w '%{http_code}' https://127.0.0.1:6443/v1-k3s/config`,
  );

export interface NodeSeen {
  ready: boolean;
  internal: string | undefined;
  external: string | undefined;
}

interface NodeJson {
  metadata: { name: string };
  status: {
    addresses: { type: string; address: string }[];
    conditions: { type: string; status: string }[];
  };
}

/** The cluster's nodes by name, as kubectl on the server has them. */
export async function nodes(server: Box): Promise<Record<string, NodeSeen>> {
  const { items } = JSON.parse(await server.sh("k3s kubectl get nodes -o json")) as { items: NodeJson[] };
  return Object.fromEntries(
    items.map(({ metadata, status }) => {
      const address = (type: string) => status.addresses.find((a) => a.type === type)?.address;
      const ready = status.conditions.find((c) => c.type === "Ready")?.status === "True";
      return [metadata.name, { ready, internal: address("InternalIP"), external: address("ExternalIP") }];
    }),
  );
}

/** Seconds since the last handshake by the peer's endpoint, as `wg` on the box says; peers in use only. */
export async function handshakes(box: Box): Promise<Record<string, number>> {
  const [now, ...lines] = (await box.sh("date +%s; wg show all dump")).trim().split("\n");
  return Object.fromEntries(
    lines
      .map((line) => line.split("\t"))
      .filter((fields) => fields.length === 9 && fields[4] !== "(none)")
      .map((fields) => [
        fields[3],
        fields[5] === "0" ? Number.POSITIVE_INFINITY : Number(now) - Number(fields[5]),
      ]),
  );
}

/** Restarts k3s, until its interface is a new one: of a server, systemctl is back while the old one stands. */
export async function restarted(
  server: Box,
  restart: () => Promise<unknown> = () => server.sh("systemctl restart k3s"),
) {
  const interfaces = "cat /sys/class/net/flannel-wg/ifindex";
  const was = (await server.sh(interfaces)).trim();
  await restart();
  await server.sh(
    `for _ in $(seq 300); do now=$(${interfaces} 2>/dev/null) || :; case $now in '' | ${was}) sleep 0.2 ;; *) exit 0 ;; esac; done; exit 1`,
  );
}

/** What a part answers as soon as it does not throw, within 30 s. */
export async function soon<T>(part: () => Promise<T>): Promise<T> {
  for (let left = 60; left; left--)
    try {
      return await part();
    } catch {
      await sleep(500);
    }
  return await part();
}

/** Every box has a fresh handshake with every other, at its public address, and with nobody else. */
export async function connected(boxes: Box[]) {
  for (const box of boxes) {
    const seen = await handshakes(box);
    const others = boxes.filter((other) => other.name !== box.name).map((other) => `${other.publicIp}:51820`);
    assert.deepEqual(Object.keys(seen).sort(), others.sort(), `peers of ${box.name}`);
    for (const [endpoint, age] of Object.entries(seen))
      assert(age < 180, `${box.name}: last handshake with ${endpoint} ${age} s ago`);
  }
}

/** Puts the project on the box, to be run there by the box's own node. */
export async function install(t: Bench, name: string) {
  const what = "Makefile package.json package-lock.json lib scripts node_modules";
  const not = ["@biomejs", "@typescript", "typescript", "@types", "@esbuild", "esbuild", "tsx"];
  const leave = not.map((folder) => `--exclude=node_modules/${folder}`).join(" ");
  await t.ok(`tar -c ${leave} ${what} | ssh ${name} 'mkdir -p ${PLACE} && tar -x -C ${PLACE}'`);
}

const PLACE = "/root/k3s-across-clouds";

/** A script run on the box itself. */
export const onBox = (name: string, words: string) =>
  `ssh ${name} 'cd ${PLACE} && PATH=/opt/k3s-stand-in:$PATH && node --no-warnings ${words}'`;

/** An env file beside the Makefile of the project on the box. */
export const envOnBox = (t: Bench, name: string, values: Record<string, string>) =>
  t.ok(`ssh ${name} 'umask 077; cat >${PLACE}/.env'`, {
    input: Object.entries(values)
      .map(([key, value]) => `${key}="${value}"\n`)
      .join(""),
  });

/** A file in the lab's mirror, at all of its addresses or at one. */
export const mirrored = (lab: Lab, address: string, path: string) => join(lab.mirror.dir, address, path);

/** One more release on both mirrors. */
export async function release(lab: Lab, version: string) {
  const text = standIn(version);
  const sum = createHash("sha256").update(text).digest("hex");
  for (const base of [lab.mirror.github, lab.mirror.plain]) {
    const { hostname, pathname } = new URL(base);
    const folder = mirrored(lab, hostname, join(pathname, version));
    await mkdir(folder, { recursive: true });
    for (const [arch, file] of Object.entries({ amd64: "k3s", arm64: "k3s-arm64", arm: "k3s-armhf" })) {
      await writeFile(join(folder, file), text);
      await writeFile(join(folder, `sha256sum-${arch}.txt`), `${sum}  ${file}\n`);
    }
  }
}

/** Secrets in files, process lists and output; open ports; host keys; two operators at the same time. */
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { quote } from "../../lib/sh.ts";
import { SCRIPT_FILES } from "../helpers.ts";
import type { Box } from "./lab.ts";
import { bench, hangUp, held, holdRestarts, MODERN, OLD, routerRule, script } from "./suite.ts";

const t = await bench({ name: "trust", boxes: ["a1", "b1"] });
after(() => t.lab.down());
const [a1, b1] = [t.box("a1"), t.box("b1")];
const home = join(t.lab.dir, "home");
/** Passwords of a proxy and in a config file, which only root and k3s may read. */
const [PROXY, CONFIG] = ["hunter2-proxy", "hunter2-config"];
for (const password of [PROXY, CONFIG]) t.secret(password);

const settings = (version: string, more: Record<string, string> = {}) => {
  const { K3S_URL = "", K3S_TOKEN = "" } = t.env();
  t.settings(
    {
      K3S_VERSION: version,
      // The lab's downloads are http://, and do not use it.
      HTTPS_PROXY: `http://k3s:${PROXY}@203.0.113.82:3128`,
      ...(version === MODERN ? { K3S_CONFIG: join(home, "config.yaml") } : {}),
      ...(K3S_TOKEN ? { K3S_URL, K3S_TOKEN } : {}),
      ...more,
    },
    { agents: "b1" },
  );
};

/** What any user sees of all processes of the operator and the boxes while `part` runs: one argument or variable per line. */
async function watched(part: () => Promise<unknown>): Promise<Set<string>> {
  const loop = (files: string) =>
    quote(`while :; do cat ${files} 2>/dev/null | tr '\\0' '\\n'; sleep 0.03; done`);
  const nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups";
  const watching = t.lab.op(`rm -f $HOME/stop
{
  sh -c ${loop("/proc/[0-9]*/cmdline")} & root=$!
  ${nobody} sh -c ${loop("/proc/[0-9]*/cmdline /proc/[0-9]*/environ")} & nobody=$!
  until [ -e $HOME/stop ]; do sleep 0.1; done
  kill $root $nobody
} >$HOME/seen`);
  await part();
  writeFileSync(join(home, "stop"), "");
  await watching;
  return new Set(readFileSync(join(home, "seen"), "utf8").split("\n"));
}

/** Files of a box that contain a secret: all of them, and those that an unprivileged user can read. */
async function holders(box: Box) {
  const find = "grep -rslaF -D skip --exclude-dir=proc --exclude-dir=sys --exclude-dir=dev -f -";
  const said = await box.sh(`umask 077
keys=$(wg show all private-key | awk '{ print $2 }')
token=$(cat /var/lib/rancher/k3s/server/node-token /etc/systemd/system/k3s-agent.service.env 2>/dev/null | sed -n 's/.*::[a-z]*://p' | head -n 1)
[ -n "$keys" ] && [ -n "$token" ]
printf '%s\\n' "$keys" "$token" ${PROXY} ${CONFIG} >/run/patterns
printf %s "$token" >/tmp/open; chmod 644 /tmp/open
${find} / </run/patterns | sort; echo; runuser -u plain -- ${find} / </run/patterns || :
rm /run/patterns /tmp/open`);
  const [root = [], plain = []] = said
    .trim()
    .split("\n\n")
    .map((list) => list.split("\n"));
  return { root, plain };
}

/** Opens both clouds' security groups while \`part\` runs. */
async function open<T>(part: () => Promise<T>): Promise<T> {
  const clouds = ["a", "b"] as const;
  const shut = await Promise.all(clouds.map((cloud) => routerRule(t.lab, cloud, "ports", "accept")));
  try {
    return await part();
  } finally {
    await Promise.all(shut.map((again) => again()));
  }
}

/** Prints TCP ports of an address that take a connection, and of some UDP ports those that no ICMP message closes. */
const SCAN = `const [ip, ...ports] = process.argv.slice(1);
const list = ports.length ? ports.map(Number) : Array.from({ length: 65535 }, (_, i) => i + 1);
const next = () => new Promise((done) => {
  const port = list.pop();
  if (!port) return done();
  const socket = require("net").connect({ host: ip, port });
  const end = (open) => { socket.destroy(); if (open) console.log(port + "/tcp"); next().then(done); };
  socket.setTimeout(1500, () => end(false)).on("connect", () => end(true)).on("error", () => end(false));
});
for (let i = 0; i < 500; i++) next();
for (const port of [51819, 51820, 51821]) {
  const socket = require("dgram").createSocket("udp4");
  const silent = setTimeout(() => { console.log(port + "/udp"); socket.close(); }, 1500);
  socket.on("error", () => { clearTimeout(silent); socket.close(); });
  socket.connect(port, ip, () => socket.send("x"));
}`;
const answering = async (box: Box, ports: string[] = []) => {
  const { out } = await t.ok(`node -e ${quote(SCAN)} ${[box.publicIp, ...ports].join(" ")}`);
  return out.trim().split("\n").filter(Boolean).sort();
};

/** SECURITY.md's table: ports of a box's role in a release, and those among them that are for more than the nodes. */
function promised(role: "servers" | "agents", version: string) {
  const [, table = ""] =
    /^\| port \| on \| from \| why \|\n\|[-|]+\n((?:\|.*\n)+)/m.exec(readFileSync("SECURITY.md", "utf8")) ??
    [];
  const rows = table
    .trim()
    .split("\n")
    .map((row) => row.split("|").map((cell) => cell.trim()));
  const here = rows.filter(([, , on = ""]) => {
    const [who, only] = on.split(", ");
    return (who === "all" || who === role) && (!only || version.startsWith(only));
  });
  const ports = (list: string[][]) => list.map(([, port]) => port as string).sort();
  return { all: ports(here), you: ports(here.filter(([, , , from]) => from === "you")) };
}

for (const version of [OLD, MODERN])
  describe(`a deployment of k3s ${version}`, { concurrency: 1 }, () => {
    before(async () => {
      writeFileSync(join(home, "config.yaml"), `# ${CONFIG}\ndebug: true\n`, {
        mode: 0o600,
      });
      if (version === OLD) writeFileSync(t.lab.envFile, "");
      else await t.ok("make down YES=1");
      settings(version);
    });

    test("shows no secret in the list of processes", async () => {
      const seen = await watched(async () => {
        await t.ok("make -j up");
        await t.ok("ssh b1 'sh -c \"sleep 1; :\" a-word-to-see'");
      });
      assert(seen.has("a-word-to-see"), "the boxes' processes are seen");
      const secrets = [(t.env().K3S_TOKEN as string).split(":").at(-1) as string, PROXY, CONFIG];
      for (const line of seen) for (const secret of secrets) assert(!line.includes(secret), line);
    });

    test("has its secrets in no file that others can read, on a box or on the operator's machine", async () => {
      const units = "/etc/systemd/system";
      for (const [box, file] of [
        [a1, `${units}/k3s.service.env`],
        [b1, `${units}/k3s-agent.service.env`],
      ] as const) {
        const { root, plain } = await holders(box);
        assert(root.includes(file), root.join());
        assert.deepEqual(plain, ["/tmp/open"], box.name);
      }
      await t.ok("make kubeconfig");
      const token = (t.env().K3S_TOKEN as string).split(":").at(-1) as string;
      writeFileSync(join(home, "patterns"), `${token}\n${PROXY}\n${CONFIG}\nclient-key-data\npassword:\n`, {
        mode: 0o600,
      });
      const { out } = await t.ok(
        "grep -rslaFf $HOME/patterns $HOME | xargs stat -c '%a %n' | sed \"s|$HOME/||\" | sort; rm $HOME/patterns",
      );
      assert.deepEqual(
        out
          .trim()
          .split("\n")
          .filter((line) => !line.startsWith("600 ")),
        [],
      );
      for (const file of [".env", ".kube/config"]) assert(out.includes(`600 ${file}\n`), out);
    });

    test("answers at the ports in the table of SECURITY.md, and after make firewall only at ssh for others than the nodes", async () => {
      await open(async () => {
        const before = await Promise.all([a1, b1].map((box) => answering(box)));
        const [server, agent] = [promised("servers", version), promised("agents", version)];
        assert.deepEqual(before, [server.all, agent.all]);
        await t.ok("make firewall");
        const known = server.all.flatMap((port) => /^(\d+)\/tcp/.exec(port)?.[1] ?? []);
        const now = await Promise.all([a1, b1].map((box) => answering(box, known)));
        // A dropped packet and one that WireGuard ignores look the same from here.
        const tcp = now.map((ports) => ports.filter((port) => port.endsWith("/tcp")));
        assert.deepEqual(tcp, [server.you, agent.you]);
      });
    });
  });

test("no script prints a secret in any of its modes, or when it fails", async () => {
  await t.ok(script("backup", "--backup $HOME/k3s.tar.gz"));
  const own: Record<string, string> = { restore: "--backup $HOME/k3s.tar.gz", down: "", kubeconfig: "" };
  const whole = [
    "backup",
    "check",
    "down",
    "firewall",
    "fix-metrics",
    "kubeconfig",
    "server",
    "status",
    "token",
    "up",
    "upgrade",
  ];
  const names = Object.keys(SCRIPT_FILES);
  settings(MODERN, {
    AGENT_ARGS: "--node-label=mode=yes",
    HTTPS_PROXY: "http://k3s:hunter2-other@203.0.113.82:3128",
  });
  t.secret("hunter2-other");
  const calls = names.flatMap((name): [name: string, words: string][] => {
    const host = whole.includes(name) ? "" : "--host b1";
    const gone = whole.includes(name)
      ? "--server ssh://root@127.0.0.1:1=198.51.100.11 --agents="
      : "--host ssh://root@127.0.0.1:1=198.51.101.11";
    const modes = ["check", "kubeconfig", "status"].includes(name) ? [""] : ["--dry-run", "--print"];
    return [
      ...modes.map((mode): [string, string] => [name, `${mode} ${host} ${own[name] ?? ""}`]),
      [name, "--help"],
      [name, `${gone} ${own[name] ?? ""}${name === "down" ? " --yes" : ""}`],
    ];
  });
  const work = async () => {
    for (let call = calls.pop(); call; call = calls.pop()) {
      const { status, text } = await t.op(script(...call));
      assert(text.trim() && status !== null, `${call}: ${text}`);
      if (call[1].includes("127.0.0.1:1")) assert.notEqual(status, 0, `${call}`);
      else if (call[1] === "--help") assert.equal(status, 0);
    }
  };
  await Promise.all([1, 2, 3].map(work));
  await t.says(script("up", "--dry-run"), 0, [
    /write .*k3s-agent\.service\.env \(0600\)/,
    /write .*k3s\.service\.env/,
  ]);
  await b1.sh(`printf '#!/bin/sh\\ncase $* in *restart*) cat /etc/systemd/system/k3s-agent.service.env; exit 1 ;; esac\\nexec /usr/bin/systemctl "$@"\\n' >/usr/local/sbin/systemctl
chmod 755 /usr/local/sbin/systemctl`);
  await t.says(script("agent", "--host b1"), 1, [
    /\| K3S_TOKEN=\*{8}$/m,
    /\| HTTPS_PROXY=http:\/\/k3s:\*{8}@203/,
  ]);
  await b1.sh("rm /usr/local/sbin/systemctl");
  await t.ok("make agent HOST=b1");
});

const release = () => b1.sh("rm /usr/local/sbin/systemctl");
const labelled = (value: string) => `make agent HOST=b1 AGENT_ARGS=--node-label=operator=${value}`;

test("the second of two operators who change one box at the same time waits for the first, and reports this", async () => {
  await holdRestarts(b1);
  const first = t.op(labelled("one"));
  await held(b1);
  const second = t.op(labelled("two"));
  await sleep(2500);
  await release();
  const [one, two] = await Promise.all([first, second]);
  assert.deepEqual([one.status, two.status], [0, 0], one.text + two.text);
  assert.doesNotMatch(one.text, /waits for an earlier run/);
  assert.match(two.text, /b1 +\| waits for an earlier run, process \d+ here/);
  assert.match(await b1.sh("cat /etc/systemd/system/k3s-agent.service"), /operator=two/);
  await t.says(labelled("two"), 0, ["nothing to do"]);
});

test("the lock of a run that was killed is taken over immediately", async () => {
  await holdRestarts(b1);
  const run = await t.cut(labelled("three"), /restart k3s-agent and wait/, "KILL");
  assert(run.reached, run.text);
  await held(b1);
  await hangUp(b1);
  await release();
  assert.match(await b1.sh("cat /run/k3s-across-clouds.lock"), /^\d+$/m);
  const { text } = await t.ok(labelled("three"));
  assert.doesNotMatch(text, /waits for an earlier run/);
});

test("HOST_KEY accepts a box with this key that is not in known_hosts, and refuses only a box with another key", async () => {
  const key = async (name: string) =>
    (await t.ok(`ssh-keygen -lf ${join(t.lab.dir, "boxes", name, "host-key.pub")}`)).out.split(
      " ",
    )[1] as string;
  const [a, b] = [await key("a1"), await key("b1")];
  const known = join(home, ".ssh/known_hosts");
  const text = readFileSync(known, "utf8");
  writeFileSync(known, "");
  try {
    const both = script("install-wireguard", '--host "a1 b1"');
    settings(MODERN, { HOST_KEY__a1: a, HOST_KEY__b1: a });
    await t.says(both, 1, [
      /^a1 +nothing to do/m,
      `The host key of b1 is ${b}, which HOST_KEY does not name: compare its fingerprint with what "ssh-keygen -lf`,
    ]);
    settings(MODERN, { HOST_KEY__a1: a });
    await t.says(both, 1, [
      /^a1 +nothing to do/m,
      'The host key of b1 is not known here: connect once with "ssh b1" and compare',
    ]);
    settings(MODERN, { HOST_KEY__a1: a, HOST_KEY__b1: b });
    await t.says(both, 0, [/^b1 +nothing to do/m]);
    assert.equal(readFileSync(known, "utf8"), "");
  } finally {
    writeFileSync(known, text);
  }
});

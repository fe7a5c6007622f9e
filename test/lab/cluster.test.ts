/** `make -j up` in two clouds, with both generations of k3s: its result, and that a second run changes nothing. */
import assert from "node:assert/strict";
import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import {
  type Bench,
  bench,
  connected,
  MODERN,
  nodes,
  OLD,
  SCRIPTS,
  starts,
  state,
  untouched,
} from "./suite.ts";

const GENERATIONS = [
  { name: "old", version: OLD, next: "v1.17.9+k3s1", interface: "flannel.1" },
  { name: "modern", version: MODERN, next: "v1.36.3+k3s1", interface: "flannel-wg" },
];

describe("after make -j up", { concurrency: true }, () => {
  for (const generation of GENERATIONS) {
    const { name, version } = generation;
    describe(`with k3s ${version}`, { concurrency: 1 }, () => {
      let t: Bench;
      const every = () => t.lab.boxes;

      before(async () => {
        t = await bench({ name: `up-${name}` });
        writeFileSync(
          t.lab.envFile,
          `# Two clouds.\nSERVER=a1\n\nAGENTS="b1 b2=198.51.101.12" # both in cloud b\nK3S_VERSION=${version}\n# mirrors\nK3S_MIRRORS="${t.mirrors}"\n`,
          { mode: 0o644 },
        );
      });

      after(() => t?.lab.down());

      test("new boxes are a server and two agents", async () => {
        const seen = await commandLines(t, async () => {
          const trips = await t.trips(["a1", "b1", "b2"], () => t.ok("make -j up"));
          for (const { commands, logins } of Object.values(trips))
            assert(commands <= 4 && logins === 1, JSON.stringify(trips));
        });
        const { K3S_TOKEN = "" } = t.env();
        assert.match(K3S_TOKEN, /^K10[0-9a-f]{64}::server:[0-9a-f]{32}$/);
        for (const shown of ["scripts/up.ts", "k3s server", "k3s agent", "systemctl"])
          assert(seen.includes(shown), `the recorded command lines do not contain ${shown}`);
        assert(!seen.includes(K3S_TOKEN.slice(-32)), "the token was on a command line");
      });

      test("every node is Ready with its public address", async () => {
        const seen = await nodes(t.box("a1"));
        const expected = every().map(({ name, publicIp }) => [
          name,
          { ready: true, internal: publicIp, external: publicIp },
        ]);
        assert.deepEqual(seen, Object.fromEntries(expected));
      });

      test("every pair of boxes has a recent WireGuard handshake at public addresses", async () => {
        await connected(every());
        for (const box of every())
          assert.equal((await box.sh("wg show interfaces")).trim(), generation.interface, box.name);
      });

      test("kubectl top nodes lists every node", async () => {
        const lines = (await t.box("a1").sh("kubectl top nodes --no-headers")).trim().split("\n");
        assert.deepEqual(lines.map((line) => line.split(/\s+/)[0]).sort(), ["a1", "b1", "b2"]);
        for (const line of lines) assert.match(line, /^\w+ +\d+m +\d+% +\d+Mi/);
      });

      test("the env file contains the URL and token, has mode 0600, and keeps its comments and order", async () => {
        const token = (await t.box("a1").sh("cat /var/lib/rancher/k3s/server/node-token")).trim();
        assert.equal(
          readFileSync(t.lab.envFile, "utf8"),
          `# Two clouds.\nSERVER=a1\n\nAGENTS="b1 b2=198.51.101.12" # both in cloud b\nK3S_VERSION=${version}\n# mirrors\nK3S_MIRRORS="${t.mirrors}"\nK3S_URL=https://198.51.100.11:6443\nK3S_TOKEN=${token}\n`,
        );
        assert.equal(t.envMode(), "600");
      });

      test("no user of a box can read the token or a WireGuard key", async () => {
        for (const box of every()) {
          const unit = `/etc/systemd/system/${box.name === "a1" ? "k3s" : "k3s-agent"}.service.env`;
          assert.equal((await box.sh(`stat -c '%a %U' ${unit}`)).trim(), "600 root");
          assert.equal(await box.sh(READABLE), "", box.name);
          // The search itself must find a readable secret.
          await box.sh("umask 022; mkdir /run/open; wg show all private-key | cut -f2 >/run/open/file");
          assert.equal(await box.sh(READABLE), "/run/open/file\n");
          await box.sh("rm -r /run/open");
        }
      });

      test("a second run changes nothing, with one connection and one command per box", async () => {
        const all = async () => Promise.all(every().map(state));
        await t.trips(["a1"], async () => {});
        const file = readFileSync(t.lab.envFile, "utf8");
        let before: string[] = [];
        const trips = await t.trips(["a1", "b1", "b2"], async () => {
          before = await all();
          const { text } = await t.ok("make -j up");
          for (const box of ["a1", "b1", "b2"]) assert.match(text, new RegExp(`^${box} +nothing to do`, "m"));
        });
        await untouched(every(), before);
        assert.equal(readFileSync(t.lab.envFile, "utf8"), file);
        const one = { commands: 1, logins: 1 };
        assert.deepEqual(trips, { a1: one, b1: one, b2: one });
      });

      test("each script, run again, needs one command per box and changes nothing", async () => {
        const before = await Promise.all(every().map(state));
        for (const name of SCRIPTS) {
          const hosts =
            name === "server" || name === "fix-metrics"
              ? ["a1"]
              : name === "agent"
                ? ["b1", "b2"]
                : ["a1", "b1"];
          const trips = await t.trips(hosts, async () => {
            const { text } = await t.ok(`make ${name} HOST="${hosts.join(" ")}"`);
            assert.equal(text.match(/nothing to do/g)?.length, hosts.length, `${name}: ${text}`);
          });
          for (const trip of Object.values(trips)) assert.deepEqual(trip, { commands: 1, logins: 1 }, name);
        }
        await untouched(every(), before);
      });

      test("a new box joins with at most four commands, and every other box reaches it", async () => {
        const before = await Promise.all([t.box("a1"), t.box("b1"), t.box("b2")].map(starts));
        await t.lab.add("b3");
        const { b3 } = await t.trips(["b3"], () => t.ok("make agent HOST=b3"));
        assert(b3 && b3.commands <= 4, `${b3?.commands} commands`);
        assert.equal(b3.logins, 1);
        assert.match((await t.ok("make agent HOST=b3")).text, /nothing to do/);
        await connected(every());
        assert.deepEqual(await Promise.all([t.box("a1"), t.box("b1"), t.box("b2")].map(starts)), before);
      });

      test("a changed SERVER_ARGS restarts only the server's k3s, once", async () => {
        await restartsOnly(t, { a1: 1 }, () => t.ok("make -j up SERVER_ARGS=--disable=traefik"));
        assert.match(
          await t.box("a1").sh("cat /etc/systemd/system/k3s.service"),
          /^ +--disable=traefik( \\)?$/m,
        );
        await connected(every());
      });

      test("a setting that is changed for an agent restarts only that agent's k3s, once", async () => {
        const { next } = generation;
        const proxy = "make agent HOST=b2 PROXY_MODE=nftables";
        await restartsOnly(t, name === "modern" ? { b1: 1, b2: 1 } : { b1: 1 }, () =>
          Promise.all([
            t.ok("make agent HOST=b1 AGENT_ARGS=--node-label=shelf=left"),
            name === "modern"
              ? t.ok(proxy)
              : t.says(proxy, 2, ["PROXY_MODE=nftables needs k3s v1.31 or later, not v1.17.6+k3s1"]),
            t.says(`make agent HOST=b3 K3S_VERSION=${next}`, 2, [`make upgrade K3S_VERSION=${next} `]),
          ]),
        );
        const kubectl = (node: string) => t.box("a1").sh(`kubectl get node ${node} -o json`);
        assert.match(await kubectl("b1"), /"shelf": "left"/);
        assert((await kubectl("b3")).includes(`"kubeletVersion": "${version}"`));
        const pid = "systemctl show k3s-agent -p MainPID --value";
        const running = await t.box("b2").sh(`tr '\\0' ' ' </proc/$(${pid})/cmdline`);
        assert.equal(running.includes("proxy-mode=nftables"), name === "modern", running);
      });

      test("a box that reboots rejoins the cluster automatically", async () => {
        const box = t.box("b2");
        await box.off();
        await box.on();
        await t.ok("make agent HOST=b2");
        await connected(every());
      });
    });
  }
});

/** Every command line in the lab, the operator's and the boxes', while `part` runs. */
async function commandLines(t: Bench, part: () => Promise<unknown>): Promise<string> {
  const flag = join(t.lab.dir, "watch");
  writeFileSync(flag, "");
  const watch = t.lab.op(
    `while [ -e ${flag} ]; do cat /proc/[0-9]*/cmdline 2>/dev/null; echo; sleep 0.1; done >${flag}.log`,
  );
  await part().finally(() => rmSync(flag));
  await watch;
  return readFileSync(`${flag}.log`, "utf8").replaceAll("\0", " ");
}

/** Files that contain the token's password or a WireGuard key and that an unprivileged user can read. */
const READABLE = `cd /var/lib/rancher/k3s
password=$(cat server/token /etc/systemd/system/k3s-agent.service.env 2>/dev/null | sed -n 's/.*::server://p')
keys=$(wg show all private-key | cut -f2)
[ "\${#password}" = 32 ] && [ "\${#keys}" -ge 44 ]
printf '%s\\n' "$keys" "$password" | runuser -u plain -- grep -rslaF -D skip -f - \
  /etc /home /privatekey /root /run /tmp /var/lib/rancher /var/log /var/tmp /usr/local /proc/[0-9]*/cmdline || true`;

/** While `part` runs, k3s must be started this many times on these boxes, and not on the others. */
async function restartsOnly(t: Bench, expected: Record<string, number>, part: () => Promise<unknown>) {
  const count = async () => Promise.all(t.lab.boxes.map(starts));
  const before = await count();
  await part();
  const now = await count();
  const restarted = t.lab.boxes.flatMap(({ name }, i) =>
    now[i] === before[i] ? [] : [[name, (now[i] ?? 0) - (before[i] ?? 0)]],
  );
  assert.deepEqual(Object.fromEntries(restarted), expected, "restarts");
}

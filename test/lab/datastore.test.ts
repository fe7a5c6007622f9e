/** Two servers in two clouds with a shared datastore, and an agent that keeps running while the first one is off. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { quote } from "../../lib/sh.ts";
import {
  type Bench,
  bench,
  connected,
  door,
  MODERN,
  nodes,
  OLD,
  release,
  starts,
  state,
  untouched,
} from "./suite.ts";

const ENDPOINT = "http://k3s:hunter2@203.0.113.254:2379";

describe("several servers", { concurrency: true }, () => {
  for (const [generation, version] of Object.entries({ old: OLD, modern: MODERN }))
    describe(`with k3s ${version}`, { concurrency: 1 }, () => {
      let t: Bench;
      const env = (more: Record<string, string> = {}, server = "a1 b1") =>
        t.settings({ K3S_VERSION: version, ...more }, { server, agents: "b2" });
      before(async () => {
        t = await bench({ name: `settings-db-${generation}` });
        t.secret("hunter2");
        env({ K3S_DATASTORE_ENDPOINT: ENDPOINT });
        await t.ok(`node -e ${quote(STORE)} >/dev/null 2>$HOME/store.log & sleep 0.5`);
      });
      after(() => t?.lab.down());

      test("are refused without a datastore, and nothing is changed", async () => {
        const before = await Promise.all(t.lab.boxes.map(state));
        env();
        await t.says("make up", 2, [/SERVER \(.*\): expected one of a1, b1, or a K3S_DATASTORE_ENDPOINT/]);
        env({}, "a1");
        await t.says("make server HOST=b1", 2, [
          "HOST is b1, but SERVER is a1: expected K3S_DATASTORE_ENDPOINT for a second server",
        ]);
        await t.says("make server SERVER_ARGS=--cluster-init", 2, [
          /embedded etcd needs its members' private/,
        ]);
        await untouched(t.lab.boxes, before);
      });

      test("must be set up in their order, and a second one is refused before the first", async () => {
        env({ K3S_DATASTORE_ENDPOINT: ENDPOINT });
        await t.says("make server HOST=b1", 2, [/K3S_TOKEN is not set: .* for a1, the first server/]);
      });

      test("are brought up with their agent, which joins the first one", async () => {
        await t.ok("make -j up");
        assert.equal(t.env().K3S_URL, "https://198.51.100.11:6443");
        const seen = await nodes(t.box("a1"));
        assert.deepEqual(await nodes(t.box("b1")), seen);
        assert.deepEqual(
          Object.entries(seen).map(([name, node]) => [name, node.ready, node.external]),
          t.lab.boxes.map(({ name, publicIp }) => [name, true, publicIp]),
        );
        await connected(t.lab.boxes);
      });

      test("have the endpoint in a file that only root can read, and on no command line", async () => {
        for (const name of ["a1", "b1"]) {
          const said = await t.box(name).sh(`stat -c '%a %U' /etc/systemd/system/k3s.service.env
grep -c ^K3S_DATASTORE_ENDPOINT= /etc/systemd/system/k3s.service.env
cat /proc/[0-9]*/cmdline | grep -ac 'hunte[r]2' || true
runuser -u plain -- grep -rsl -D skip 'hunte[r]2' /etc /home /root /run /tmp /var/lib/rancher /var/log || true`);
          assert.equal(said, "600 root\n1\n0\n");
        }
      });

      test("are not changed by a second run, on all or on one", async () => {
        const before = await Promise.all(t.lab.boxes.map(state));
        assert.equal((await t.ok("make -j up")).text.match(/nothing to do/g)?.length, 3);
        await t.says("make server HOST=b1", 0, ["nothing to do"]);
        await t.says("make server", 0, [/^a1 +nothing to do/m, /^b1 +nothing to do/m]);
        assert.equal(t.env().K3S_URL, "https://198.51.100.11:6443");
        await untouched(t.lab.boxes, before);
      });

      test("are completed by the next run if one was interrupted during the second server's changes", async () => {
        const { K3S_URL = "", K3S_TOKEN = "" } = t.env();
        env({ K3S_DATASTORE_ENDPOINT: ENDPOINT, K3S_URL, K3S_TOKEN, SERVER_ARGS__b1: "--disable=traefik" });
        const before = await starts(t.box("a1"));
        const run = await t.cut("make server", /restart k3s and wait/, "KILL");
        assert(run.reached, run.text);
        await t.ok("make server");
        await t.says("make server", 0, [/^a1 +nothing to do/m, /^b1 +nothing to do/m]);
        assert.equal(await starts(t.box("a1")), before);
        assert.match(await t.box("b1").sh("cat /etc/systemd/system/k3s.service"), /--disable=traefik$/m);
      });

      test("allow the agent to restart with the second one while the first is off", async () => {
        await t.box("a1").off();
        await t.box("b2").sh("systemctl restart --no-block k3s-agent");
        const since = Date.now() / 1000;
        const heartbeat = async () => {
          const { items } = JSON.parse(await t.box("b1").sh("kubectl get nodes -o json"));
          const { status } = items.find(
            (item: { metadata: { name: string } }) => item.metadata.name === "b2",
          );
          return status.conditions.find((c: { type: string }) => c.type === "Ready");
        };
        for (const end = Date.now() + 90_000; ; ) {
          const { status, lastHeartbeatTime } = await heartbeat();
          if (status === "True" && Date.parse(lastHeartbeatTime) / 1000 > since + 3) break;
          assert(Date.now() < end, `b2 is ${status} since ${lastHeartbeatTime}`);
        }
        await t.box("a1").on();
        await t.ok("make -j up");
        await connected(t.lab.boxes);
      });

      test("are refused if one would leave its datastore for an empty one", async () => {
        const { K3S_URL = "", K3S_TOKEN = "" } = t.env();
        env({ K3S_URL, K3S_TOKEN }, "a1");
        await t.says("make server", 2, [
          "K3S_DATASTORE_ENDPOINT is not set: it would start a new, empty one",
        ]);
      });

      test("can be reordered, after which agents follow the new first one, and the old one can be removed and join again", async () => {
        const { K3S_URL = "", K3S_TOKEN = "" } = t.env();
        env({ K3S_DATASTORE_ENDPOINT: ENDPOINT, K3S_URL, K3S_TOKEN }, "b1 a1");
        await t.says("make remove HOST=b1", 2, ["HOST names the first server, b1, which agents are told"]);
        await t.ok("make -j up");
        assert.equal(t.env().K3S_URL, "https://198.51.101.11:6443");
        assert.match(
          await t.box("b2").sh("cat /etc/systemd/system/k3s-agent.service.env"),
          /^K3S_URL=https:\/\/198\.51\.101\.11:6443$/m,
        );
        await t.cutThenDone("make remove HOST=a1", /a1 +stop k3s, and clear/);
        assert.equal(await t.box("a1").sh(LEFT), "");
        assert.deepEqual(Object.keys(await nodes(t.box("b1"))), ["b1", "b2"]);
        await t.ok("make -j up");
        await connected(t.lab.boxes);
      });

      test("have one token, which is rotated on all of them while agents keep running", async () => {
        if (generation === "old") return void (await t.says("make token", 2, ["cannot rotate its token"]));
        const before = t.env().K3S_TOKEN as string;
        const started = await starts(t.box("b2"));
        const run = await t.cut("make token", /a1 +write .*across-clouds\.token/, "KILL");
        assert(run.reached, run.text);
        await t.ok("make token");
        const now = t.env().K3S_TOKEN as string;
        for (const name of ["a1", "b1"])
          for (const [token, answer] of Object.entries({ [before]: "401", [now]: "200" }))
            assert.equal(await door(t.box(name), token), answer, `${name} ${answer}`);
        assert.equal(await starts(t.box("b2")), started);
      });

      test("are upgraded one at a time, then the agent, even to the other generation and after an interruption", async () => {
        const to = "v1.36.3+k3s1";
        await release(t.lab, to);
        await t.box("a1").sh("touch /run/stand-in-slow");
        const text = await t.cutThenDone(
          `make upgrade K3S_VERSION=${to} ${generation === "old" ? "FORCE=1" : ""}`,
          /a1 +restart k3s and wait/,
        );
        assert.match(text, /a1 +done in .*: runs .*\n(.*\n)*b2 +done in .*: runs/);
        const versions = await t.box("a1").sh("kubectl get nodes --no-headers | awk '{ print $1, $2, $NF }'");
        assert.equal(versions, ["a1", "b1", "b2"].map((name) => `${name} Ready ${to}\n`).join(""));
        await connected(t.lab.boxes);
        // The agent has also received the servers' new token.
        assert.equal((await t.ok("make -j up")).text.match(/nothing to do/g)?.length, 3);
      });

      test("are all removed by make down, even after an interruption", async () => {
        await t.cutThenDone("make down YES=1", /a1 +stop k3s, and clear/);
        for (const box of t.lab.boxes) assert.equal(await box.sh(LEFT), "", box.name);
      });
    });
});

/** What k3s has left on a box. */
const LEFT = `find /etc /usr/local /var/lib -xdev -name '*k3s*' -o -xdev -name '*rancher*' | grep -v ^/var/lib/systemd || true
ls /sys/class/net | grep -E 'flannel|cni' || true
ps -e -o args= | grep '[k]3s server' || true`;

/** The part of etcd's JSON gateway that the stand-in uses, with a password. */
const STORE = `const store = new Map();
const text = (base64) => Buffer.from(base64, "base64").toString();
require("node:http").createServer((asked, answer) => {
  if (asked.headers.authorization !== "Basic " + btoa("k3s:hunter2")) return answer.writeHead(401).end();
  let body = "";
  asked.on("data", (part) => (body += part)).on("end", () => {
    const { key = "", value, range_end, compare, success } = JSON.parse(body);
    if (compare) {
      const succeeded = store.get(text(compare[0].key)) === compare[0].value;
      if (succeeded) store.set(text(success[0].requestPut.key), success[0].requestPut.value);
      return answer.end(JSON.stringify({ succeeded }));
    }
    const from = text(key), to = range_end ? text(range_end) : from + "\\0";
    const found = [...store.keys()].filter((k) => k >= from && k < to).sort();
    if (asked.url === "/v3/kv/put") store.set(from, value);
    if (asked.url === "/v3/kv/deleterange") for (const k of found) store.delete(k);
    answer.end(JSON.stringify({ kvs: found.map((k) => ({ key: btoa(k), value: store.get(k) })) }));
  });
}).listen(2379);`;

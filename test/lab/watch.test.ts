/** What looks after the cluster while nobody does (`make watch`): a message for each problem, and one when it is over. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { bench, MODERN, nodes, restarted, routerRule } from "./suite.ts";

const t = await bench({ name: "watch", boxes: ["a1", "a2", "b1", "b2", "h1"], tools: true });
after(() => t.lab.down());
const [a1, b1, h1] = [t.box("a1"), t.box("b1"), t.box("h1")];
/** In the LAN of the server, and no node; and the webhook. */
const [neighbour, hook] = [t.box("a2"), t.box("b2")];
const SECRET = "of-the-webhook-0123456789";
const URL = `http://${hook.publicIp}/services/${SECRET}`;
const METRICS = "http://10.42.0.0:51823/metrics";

/** A webhook that keeps what it gets, and answers with the status in a file, after the seconds in another. */
const HOOK = `const { appendFileSync, readFileSync } = require("node:fs");
const read = (file, other) => { try { return readFileSync(file, "utf8").trim(); } catch { return other; } };
require("node:http").createServer((request, response) => {
  let body = "";
  request.on("data", (part) => (body += part)).on("end", () => setTimeout(() => {
    const status = Number(read("/run/hook-status", "200"));
    if (status === 200) appendFileSync("/run/hook-told", body + "\\n");
    response.writeHead(status).end("ok");
  }, 1000 * read("/run/hook-slow", "0")));
}).listen(80);`;
const start = () =>
  hook.sh(`cat >/run/hook.js <<'END'
${HOOK}
END
systemd-run -q --unit=hook --collect /opt/k3s-stand-in/node /run/hook.js
until curl -s -o /dev/null http://127.0.0.1/; do sleep 0.1; done; rm -f /run/hook-told`);

/** What it was told since it was last asked. */
async function told(): Promise<{ event: string; node: string; text: string; lines: string[] }[]> {
  const text = await hook.sh("[ ! -e /run/hook-told ] || cat /run/hook-told; rm -f /run/hook-told");
  return text
    .split("\n")
    .filter(Boolean)
    .map((line) => JSON.parse(line));
}
/** So many rounds, by hand; the lines that the webhook was told. */
async function rounds(many = 1) {
  await a1.sh(`for _ in $(seq ${many}); do systemctl start k3s-watch.service; done`);
  return (await told()).flatMap(({ lines }) => lines);
}
async function until(what: () => Promise<boolean>, seconds = 90) {
  // An API that is just starting refuses.
  for (const end = Date.now() + seconds * 1000; !(await what().catch(() => false)); await sleep(1000))
    if (Date.now() > end) assert.fail(`${what}: not within ${seconds} s`);
}
const ready = (name: string, is: boolean) => until(async () => (await nodes(a1))[name]?.ready === is);
/** The server has a handshake with the key that each of these has now; a restarted box may have another. */
const shaken = (...boxes: (typeof a1)[]) =>
  until(async () => {
    const [rows, ...keys] = await Promise.all([
      a1.sh("wg show flannel-wg latest-handshakes"),
      ...boxes.map((box) => box.sh("wg show flannel-wg public-key")),
    ]);
    return keys.every((key) =>
      rows.split("\n").some((row) => row.startsWith(key.trim()) && !row.endsWith("\t0")),
    );
  });
/** It is told of a problem once, and once of its end. */
async function toldOnce(problem: RegExp, mend: () => Promise<unknown>) {
  const lines = await rounds(4);
  assert.equal(lines.length, 1, lines.join("\n"));
  assert.match(lines[0] ?? "", problem);
  await mend();
  const end = await rounds(4);
  assert.equal(end.length, 1, end.join("\n"));
  assert.match(end[0] ?? "", /^RESOLVED after \d+ min: /);
}

before(async () => {
  t.secret(SECRET);
  t.settings({ K3S_VERSION: MODERN, NOTIFY_URL: URL }, { agents: "b1 h1=nat" });
  await a1.sh("mkdir -p /var/lib/rancher; mount -t tmpfs -o size=520m disk /var/lib/rancher");
  await Promise.all([t.ok("make -j up"), start()]);
});

describe("make watch", () => {
  test("fails when the webhook refuses its test message, and starts nothing", async () => {
    await hook.sh("echo 404 >/run/hook-status");
    await t.says("make watch", 2, ["The webhook does not take a message: it answers with HTTP 404"]);
    assert.match(await a1.sh("systemctl is-enabled k3s-watch.timer 2>&1 || :"), /disabled|not-found|Failed/);
    await hook.sh("rm /run/hook-status");
  });

  test("sends a test message, runs each minute, and has nothing to do again", async () => {
    const { out } = await t.ok("make watch DRY=1");
    assert.match(out, /send a test message \(json\)/);
    await t.ok("make watch");
    const [message, ...more] = await told();
    assert.deepEqual([message?.event, message?.node, more.length], ["test", "a1", 0]);
    await t.says("make watch", 0, [/^a1 +nothing to do/m]);
    assert.equal((await told()).length, 0);
    await t.says("make check", 0, ["Nothing is wrong."]);
    const next = await a1.sh(
      "systemctl list-timers k3s-watch.timer --no-pager; systemctl is-active k3s-watch.timer",
    );
    assert.match(next, /\nactive\n$/);
    assert.equal(
      (await a1.sh("stat -c %a /etc/rancher/k3s-watch /etc/rancher/k3s-watch/webhook")).trim(),
      "700\n600",
    );
    // From now on each round is by hand.
    await a1.sh("systemctl stop k3s-watch.timer");
  });

  test("tells nothing while all is well, nor of a restart of k3s", async () => {
    assert.deepEqual(await rounds(3), []);
    await restarted(a1, async () => {
      await a1.sh("systemctl restart --no-block k3s; sleep 0.5");
      assert.deepEqual(await rounds(1), []);
    });
    await ready("b1", true);
    await shaken(b1, h1);
    assert.deepEqual(await rounds(3), []);
  });

  test("tells of a tunnel whose port is shut", async () => {
    const open = await routerRule(t.lab, "b", "forward", "udp dport 51820 drop");
    try {
      // With another key there is no handshake until the port is open.
      await restarted(a1, () => a1.sh("rm -f /run/flannel/wgkey; systemctl restart k3s"));
      await ready("b1", true);
      await shaken(h1);
      await toldOnce(
        /^PROBLEM: WireGuard has had no handshake with b1 yet: is 51820\/udp open at both ends\?$/,
        async () => {
          await open();
          await shaken(b1);
        },
      );
    } finally {
      await open().catch(() => {});
    }
  });

  test("tells of a full disk, and keeps what it has to tell while the webhook is off", async () => {
    const off = h1.off();
    await hook.sh("systemctl stop hook");
    await a1.sh("fallocate -l 100M /var/lib/rancher/full");
    assert.deepEqual(await rounds(3), []);
    await a1.sh("systemctl start k3s-watch.timer");
    await t.says("make check", 2, [
      /^a1: its watch cannot tell the webhook since .*: it refuses connections; its messages wait$/m,
    ]);
    await a1.sh("systemctl stop k3s-watch.timer; rm /var/lib/rancher/full");
    await rounds(3);
    await off;
    await start();
    await rounds(1);
    await ready("h1", false);
  });

  test("tells of a node that is off", async () => {
    const lines = await rounds(4);
    assert.deepEqual(
      lines.filter((line) => !/h1/.test(line)),
      [],
    );
    await h1.on();
    await ready("h1", true);
    await shaken(h1);
    assert.match((await rounds(3)).join("\n"), /^RESOLVED after \d+ min: node h1 is not Ready/);
  });

  for (const [when, days, words] of [
    ["in 20 days", 20, /^PROBLEM: the certificates of b1 end on \S+, in (19|20) days: make certs$/],
    ["yesterday", -1, /^PROBLEM: the certificates of b1 ended on \S+: make certs$/],
  ] as const)
    test(`tells of a node whose certificates end ${when}`, async () => {
      await a1.sh(`echo ${days} >/run/stand-in-certificate-days`);
      // With certificates of yesterday it does not get as far as to be active.
      await b1.sh(`file=/var/lib/rancher/k3s/agent/serving-kubelet.crt; was=$(sha256sum <$file)
systemctl restart ${days < 0 ? "--no-block" : ""} k3s-agent; until [ "$(sha256sum <$file)" != "$was" ]; do sleep 0.2; done`);
      await until(async () => (await a1.sh(`curl -sk https://${b1.publicIp}:10250/healthz || :`)) !== "", 20);
      await a1.sh("rm /run/stand-in-certificate-days");
      await toldOnce(words, async () => {
        await b1.sh("systemctl restart k3s-agent");
        await ready("b1", true);
        await shaken(b1);
      });
    });

  test("shows the webhook's address to nobody", async () => {
    await hook.sh("echo 2 >/run/hook-slow");
    const found = await a1.sh(`fallocate -l 100M /var/lib/rancher/full
systemctl start k3s-watch.service
systemctl start --no-block k3s-watch.service; sleep 0.7
for _ in 1 2 3 4 5 6 7 8; do cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' ' '; sleep 0.2; done >/run/seen
rm /var/lib/rancher/full
grep -c 'data-binary' /run/seen
cat /run/seen - <<END | grep -c '${SECRET.slice(0, -1)}[${SECRET.slice(-1)}]' || :
$(journalctl --no-pager)
$(cat /run/k3s-watch/state /var/lib/k3s-watch/* /usr/local/sbin/k3s-watch /etc/systemd/system/k3s-watch*)
END
rm /run/seen`);
    assert.match(found, /^[1-9]\d*\n0\n$/);
    await hook.sh("rm /run/hook-slow");
    const messages = await told();
    assert(messages.length === 1 && !JSON.stringify(messages).includes(SECRET));
    await rounds(4);
  });

  test("writes to the journal only when something changes", async () => {
    const since = (await a1.sh("sleep 1; date +%s")).trim();
    await rounds(3);
    const said = await a1.sh(`journalctl -u 'k3s-watch*' --since @${since} -o cat --no-pager -q`);
    assert.equal(said.trim(), "");
  });

  test("answers Prometheus inside the cluster, and nobody outside", async () => {
    for (const box of [a1, b1, h1])
      assert.match(await box.sh(`curl -sf -m 5 ${METRICS}`), /^k3s_watch_node_ready\{node="b1"\} 1$/m);
    const outside = (box: typeof a1, ip: string) => box.sh(`curl -s -m 3 http://${ip}:51823/metrics || :`);
    assert.equal(await outside(hook, a1.publicIp), "");
    assert.equal(await outside(neighbour, a1.privateIp), "");
    await neighbour.sh(`ip route add 10.42.0.0/32 via ${a1.privateIp}`);
    assert.equal(await outside(neighbour, "10.42.0.0"), "");
    assert.equal(
      await t.lab.net(
        "inet",
        `ip route add 10.42.0.0/32 via ${a1.publicIp} 2>/dev/null; curl -s -m 3 ${METRICS} || :`,
      ),
      "",
    );
  });

  test("takes less than 1 % of a core", async (context) => {
    const said = await a1.sh(
      `bash -c 'TIMEFORMAT="%U %S"; time for _ in $(seq 10); do /usr/local/sbin/k3s-watch; done' 2>&1 | tail -n 1`,
    );
    const seconds =
      said
        .trim()
        .split(" ")
        .reduce((sum, word) => sum + Number(word), 0) / 10;
    context.diagnostic(`a round takes ${seconds.toFixed(3)} s of CPU`);
    assert(seconds < 0.6, said);
  });

  test("is named by check when it does not run, and when the env file has something else", async () => {
    await t.says("make check", 2, [
      /^a1: its watch does not run \(systemd: k3s-watch\.timer is inactive, enabled\)\n +do: make watch$/m,
    ]);
    await t.says("make watch", 0);
    assert.equal((await told()).length, 0);
    await t.says("make check NOTIFY_FORM=slack", 0, [
      /^note +a1: its watch tells another webhook than NOTIFY_URL/m,
    ]);
    await t.says("make watch NOTIFY_FORM=slack", 0);
    const [body] = (await hook.sh("cat /run/hook-told")).split("\n");
    assert.deepEqual(Object.keys(JSON.parse(body ?? "")), ["text"]);
  });

  test("leaves nothing behind, and goes with k3s", async () => {
    await t.says("make watch REMOVE=1", 0);
    await t.says("make watch REMOVE=1", 0, [/^a1 +nothing to do/m]);
    await a1.sh(
      "[ ! -e /run/k3s-watch ] && [ ! -e /var/lib/k3s-watch ]; ! systemctl list-units --all | grep -v slice | grep k3s-watch",
    );
    await t.ok("make watch");
    await t.ok("make down YES=1");
    const left = await a1.sh(
      "find /etc /usr/local /var/lib /run -xdev -name '*k3s-watch*'; systemctl list-units --all --no-legend 'k3s-watch*'",
    );
    assert.equal(left, "");
  });
});

/** The cost of a deployment in connections, remote commands and bytes. `make bench` measures times. */
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, test } from "node:test";
import { standIn } from "../stand-in/pack.ts";
import { bench, connected, MODERN, routerRule, state, untouched } from "./suite.ts";

const NAMES = ["a1", "a2", "b1", "b2", "b3"];
/** What the operator has sent and received, in bytes. */
const traffic = async () => {
  const [{ stats64 }] = JSON.parse(await t.lab.net("op", "ip -s -j link show eth0"));
  return { sent: stats64.tx.bytes as number, received: stats64.rx.bytes as number };
};
/** How many processes a box has started until now. */
const started = async (box: string) => Number(await t.box(box).sh("sh -c 'echo $$'"));
const t = await bench({ name: "fast", boxes: NAMES, hairpin: ["a", "b"], slow: true });
after(() => t.lab.down());
t.settings({}, { agents: NAMES.slice(1).join(" ") });

test("five new boxes need one connection, at most five commands, 26 kB and 500 processes each", async () => {
  await t.lab.line("op", 50);
  const before = await traffic();
  const agents = NAMES.slice(1);
  const had = await Promise.all(agents.map(started));
  const seen = await t.trips(NAMES, () => t.ok("make -j up"));
  const { sent, received } = await traffic();
  const more = (await Promise.all(agents.map(started))).map((now, i) => now - (had[i] as number));
  // A login alone sends 5.3 kB; waiting for another box, and progress messages, send more on a busy machine.
  assert((sent - before.sent) / NAMES.length < 26_000, `${sent - before.sent} bytes sent`);
  // Threads count too, and the stand-in's own: it and a login are about half.
  for (const processes of more) assert(processes < 500, `${processes} processes on an agent`);
  assert(
    (received - before.received) / NAMES.length < 30_000,
    `${received - before.received} bytes received`,
  );
  for (const [box, { commands, logins }] of Object.entries(seen)) {
    assert.equal(logins, 1, box);
    // Four for a box that joins alone (cluster.test.ts), and one more if a node that joined just before has no handshake yet.
    assert(commands <= 5, `${box}: ${commands} commands`);
  }
  await connected(t.lab.boxes);
});

test("with nothing to do, `make up`, `make agent` and `make server` need one command, 14 kB and 100 processes per box, and agents start hardly any process on the server", async () => {
  const agents = NAMES.slice(1);
  for (const [command, names] of [
    ["make -j up", NAMES],
    [`make agent HOST="${agents.join(" ")}"`, agents],
    ["make server", ["a1"]],
  ] as const) {
    const [before, processes, had] = [await traffic(), await started("a1"), await started("b1")];
    const seen = await t.trips([...names], () => t.ok(command));
    const { sent, received } = await traffic();
    assert((sent - before.sent) / names.length < 14_000, `${command}: ${sent - before.sent} bytes sent`);
    const got = (received - before.received) / names.length;
    assert(got < 13_000, `${command}: ${got} bytes of a box`);
    // The server is queried once, however many agents there are.
    const more = (await started("a1")) - processes;
    assert(more < (names.includes("a1") ? 130 : 50), `${command}: ${more} processes on the server`);
    const here = (await started("b1")) - had;
    assert(here < 100, `${command}: ${here} processes on an agent`);
    for (const [box, trip] of Object.entries(seen))
      assert.deepEqual(trip, { commands: 1, logins: 1 }, `${command}: ${box}`);
  }
});

test("DRY=1 JSON=1 prints the plan of up, agent, upgrade and remove as JSON, with nothing and with something to do, and changes nothing", async () => {
  const boxes = [...t.lab.boxes];
  const before = await Promise.all(boxes.map(state));
  const planOf = async (command: string, status: number) => {
    const { out } = await t.says(`make -s ${command} JSON=1`, status);
    return JSON.parse(out);
  };
  const b1 = NAMES.filter((name) => name === "b1");
  for (const [command, script, names] of [
    ["plan", "up", NAMES],
    ["agent HOST=b1 DRY=1", "agent", b1],
    [`upgrade K3S_VERSION=${MODERN} DRY=1`, "upgrade", NAMES],
  ] as const) {
    const { boxes: parts, ...rest } = await planOf(command, 0);
    assert.deepEqual(rest, { script, todo: 0, failed: 0, later: [] });
    assert.deepEqual(
      parts.map(({ name }: { name: string }) => name),
      names,
    );
  }
  const labelled = await planOf("plan NODE_LABELS=disk=ssd", 2);
  for (const { changes } of labelled.boxes) assert(changes[0].detail.includes("+ --node-label=disk=ssd"));
  const removed = await planOf("remove HOST=b1 DRY=1", 2);
  assert.deepEqual(
    removed.boxes.map(({ name }: { name: string }) => name),
    ["a1", "b1", "a1"],
  );
  const newer = await planOf("upgrade K3S_VERSION=v1.36.3+k3s1 DRY=1", 2);
  assert.match(newer.boxes[0].changes[0].why, /^drain node a1/);
  await untouched(boxes, before);
});

/** Limits a box's download rate from the mirrors, until the returned function is called. */
const narrow = (box: "b1" | "b2" | "b3", rate: string) =>
  routerRule(
    t.lab,
    "b",
    "forward",
    `ip daddr ${t.box(box).privateIp} tcp sport 80 limit rate over ${rate} burst 20 kbytes drop`,
  );

const away = "rm -f /usr/local/bin/k3s /usr/local/bin/.k3s*";
const done = (text: string) => [...text.matchAll(/^(\w+) +done in/gm)].map((match) => match[1]);

test("a box with a slow download does not delay the others", async () => {
  await Promise.all(["b1", "b2", "b3"].map((name) => t.box(name).sh(away)));
  const mend = await narrow("b2", "300 kbytes/second");
  const { text } = await t.ok('make download-k3s HOST="b2 b1 b3"');
  await mend();
  assert.deepEqual(done(text).toSorted(), ["b1", "b2", "b3"], text);
  assert.equal(done(text).at(-1), "b2", text);
});

test("a download that is interrupted twice, over a slow line that loses packets, fetches no byte again", async () => {
  await t.box("b1").sh(away);
  await t.lab.line("b", 200, 0.3);
  const cut = (bytes: number) => t.lab.mirror.fault(t.lab.mirror.plain, { mode: "cut", bytes, only: "/k3s" });
  const size = standIn(MODERN).length;
  const alone = `make download-k3s HOST=b1 K3S_MIRRORS=${t.lab.mirror.plain} K3S_SHA256=${await t.box("a1").sh("sha256sum </usr/local/bin/k3s | cut -c1-64")}`;
  // An interruption loses bytes in transit: only those that arrived count.
  const arrived: number[] = [];
  const requests = await t.requests(async () => {
    for (const bytes of [700_000, 900_000]) {
      await cut(bytes);
      await t.says(alone, 2, ["What came is kept: run the same again"]);
      arrived.push(Number(await t.box("b1").sh("stat -c %s /usr/local/bin/.k3s-*.part")));
    }
    await t.lab.mirror.fault(t.lab.mirror.plain, { mode: "none" });
    await t.ok(alone);
  });
  await t.lab.line("b", 0);
  assert.deepEqual(
    requests.map((line) => line.split(" ").slice(3).join(" ")),
    ["- 200", ...arrived.map((bytes) => `bytes=${bytes}- 206`)],
  );
  assert(0 < (arrived[0] as number) && (arrived[0] as number) < (arrived[1] as number), `${arrived}`);
  assert.equal((await t.box("b1").sh("stat -c %s /usr/local/bin/k3s")).trim(), `${size}`);
});

test("K3S_BIN is pushed to all boxes at the same time, compressed, and to none that has it", async () => {
  await Promise.all(["b1", "b2"].map((name) => t.box(name).sh(away)));
  // Half of it compresses away.
  writeFileSync(join(t.lab.dir, "home", "k3s"), `${standIn(MODERN)}${"#\n".repeat(1_500_000)}`);
  const sent = async () => JSON.parse(await t.lab.net("op", "ip -s -j link show eth0"))[0].stats64.tx.bytes;
  const push = 'make download-k3s HOST="b1 b2" K3S_BIN=$HOME/k3s';
  const before = await sent();
  const { text } = await t.ok(push);
  const bytes = (await sent()) - before;
  assert(bytes < 2 * 3_500_000, `${bytes} bytes were sent`);
  assert(text.lastIndexOf("copies") < text.indexOf("done in"), `one after the other:\n${text}`);
  const again = await sent();
  assert.equal((await t.ok(push)).text.match(/nothing to do/g)?.length, 2);
  assert((await sent()) - again < 100_000);
});

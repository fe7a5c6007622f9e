/**
 * Many boxes at once, three of which fail: one is off, one refuses the key, one hangs inside a change. `make faults` has
 * thirty, `make test-lab` ten.
 */
import assert from "node:assert/strict";
import { after, test } from "node:test";
import { spread } from "./lab.ts";
import { bench, connected, script, starts } from "./suite.ts";

const COUNT = process.env.ALL ? 30 : 10;
const names = spread(COUNT);
const t = await bench({ name: "load", boxes: names, hairpin: ["a", "b"], tools: true });
after(() => t.lab.down());

const [dead, refusing, hanging] = [t.box("b1"), t.box("a2"), t.box("b2")];
const ill = [dead, refusing, hanging].map(({ name }) => name);
const well = names.filter((name) => !ill.includes(name));
const linesOf = (text: string, pattern: RegExp) =>
  text.split("\n").flatMap((line, i) => {
    const name = pattern.exec(line)?.[1];
    return name ? [{ name, i }] : [];
  });

test("three of many boxes that fail are reported with their causes, and do not delay the others", async () => {
  t.settings({}, { agents: names.slice(1).join(" ") });
  await dead.off();
  await refusing.sh("mv /root/.ssh/authorized_keys /root/.ssh/keys");
  // A disk that does not complete a sync: the change has 60 s.
  await hanging.sh(
    "printf '#!/bin/sh\\nexec sleep 600\\n' >/usr/local/sbin/sync; chmod 755 /usr/local/sbin/sync",
  );
  const { text, seconds } = await t.says("make -j up", 2, [
    /^b1 +FAILED after [\d.]+ s: Could not reach b1: /m,
    /^a2 +FAILED after [\d.]+ s: a2 refused the login \(.*Permission denied.*\): check the user and the key$/m,
    /^b2 +FAILED after [\d.]+ s: write .* \(timed out after 60 s\)$/m,
    /up\] Error 1$/m,
    ...ill.map((name) => new RegExp(`^${name} +again: make agent HOST=${name}( |$)`, "m")),
  ]);
  console.log(`${COUNT} boxes, three of which fail: ${seconds.toFixed(0)} s`);
  const failed = linesOf(text, /^(\w+) +FAILED/);
  assert.deepEqual(failed.map(({ name }) => name).toSorted(), ill.toSorted());
  const done = linesOf(text, /^(\w+) +done in/).filter(({ name }) => name !== "a1");
  assert.deepEqual(done.map(({ name }) => name).toSorted(), well.slice(1).toSorted());
  const givenUp = failed.find(({ name }) => name === hanging.name)?.i as number;
  for (const { name, i } of done) assert(i < givenUp, `${name} was delayed:\n${text}`);
  await connected(well.map((name) => t.box(name)));
});

test("after their repair, a second run changes only those three", async () => {
  await dead.on();
  await refusing.sh("mv /root/.ssh/keys /root/.ssh/authorized_keys");
  await hanging.sh("rm /usr/local/sbin/sync");
  const agents = well.slice(1);
  const started = () => Promise.all(well.map((name) => starts(t.box(name))));
  const before = await started();
  let seconds = 0;
  const seen = await t.trips(agents, async () => {
    ({ seconds } = await t.ok("make -j up"));
  });
  console.log(`second run, after their repair: ${seconds.toFixed(0)} s`);
  assert.deepEqual(await started(), before);
  for (const [name, { commands }] of Object.entries(seen)) assert.equal(commands, 1, name);
  await connected(t.lab.boxes);
  await t.says(script("up"), 0, [/^b1 +nothing to do/m, /^a2 +nothing to do/m, /^b2 +nothing to do/m]);
});

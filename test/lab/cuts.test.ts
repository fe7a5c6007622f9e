/** Runs that are cut off: the operator's machine dies, the connection goes, somebody presses Ctrl-C. The next run finishes. */
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import type { Box } from "./lab.ts";
import { bench, connected, hangUp, holdRestarts, script, starts } from "./suite.ts";

const t = await bench({ name: "cut" });
after(() => t.lab.down());
const [b1, b2] = [t.box("b1"), t.box("b2")];

before(async () => {
  t.settings();
  await t.ok("make server");
  await t.ok("make agent HOST=b2");
});

/** What a run leaves on a box, less what is the box's own: its address, its key and its clock. */
const result = async ({ sh, publicIp }: Box) =>
  (
    await sh(`find /etc/systemd /usr/local /var/lib/rancher /etc/rancher -printf '%p %y %m %U %l\\n' | sort
cat /etc/systemd/system/k3s-agent.service
sha256sum /usr/local/bin/k3s /etc/systemd/system/k3s-agent.service.env
dpkg -l wireguard-tools | tail -n 1
systemctl is-active k3s-agent; systemctl is-enabled k3s-agent
ls -A /tmp /run | grep -e k3s -e '^tmp'`)
  ).replaceAll(publicIp, "PUBLIC_IP");

/** Lets one change through, and holds the second one back: what `timeout` is to run, apply() runs by it. */
const HOLD = `cat >/usr/local/sbin/timeout <<'SH'
#!/bin/sh
case "$*" in *'sh -s') [ -e /run/one-done ] && exec sleep 600; : >/run/one-done ;; esac
exec /usr/bin/timeout "$@"
SH
chmod 755 /usr/local/sbin/timeout`;

test("killed at each change, the next run goes on from there, and ends where an uncut run ends", async () => {
  const planned = async () =>
    [...(await t.ok("make agent HOST=b1 DRY=1")).out.matchAll(/^ {2}\d+\. (.*)$/gm)].map(
      (m) => m[1] as string,
    );
  const began = await planned();
  const cuts = [];
  for (let plan = began; plan.length > 1; plan = await planned()) {
    const next = plan[1] as string;
    await b1.sh(HOLD);
    const run = await t.cut(
      "make agent HOST=b1",
      new RegExp(next.slice(0, 30).replace(/[^\w ]/g, ".")),
      "KILL",
    );
    assert(run.reached, `"${next}" was not begun:\n${run.text}`);
    assert.equal(run.status, 137);
    await hangUp(b1);
    await b1.sh("rm -f /usr/local/sbin/timeout /run/one-done");
    cuts.push(next);
  }
  assert(cuts.length >= 5, `${cuts}`);
  await t.ok("make agent HOST=b1");
  await connected(t.lab.boxes);
  await t.says("make agent HOST=b1", 0, ["nothing to do"]);
  assert.equal(await result(b1), await result(b2));
});

test("killed while the box goes on alone, the next run waits for it and finishes", async () => {
  const command = "make agent HOST=b1 AGENT_ARGS=--node-label=alone=yes";
  const run = await t.cut(command, /restart k3s-agent and wait/, "KILL");
  assert(run.reached, run.text);
  await t.ok(command);
  await t.says(command, 0, ["nothing to do"]);
  await connected(t.lab.boxes);
});

test("cut between the unit's new text and its restart, the next run does that one restart", async () => {
  const before = await starts(b1);
  const command = "make agent HOST=b1 AGENT_ARGS=--node-label=cut=yes";
  await holdRestarts(b1);
  const run = await t.cut(command, /restart k3s-agent and wait/, "KILL");
  assert(run.reached, run.text);
  await hangUp(b1);
  await b1.sh("rm /usr/local/sbin/systemctl");
  assert.match(await b1.sh("cat /etc/systemd/system/k3s-agent.service"), /cut=yes/);
  assert.equal(await starts(b1), before);

  const { text } = await t.ok(command);
  assert.equal(await starts(b1), before + 1);
  assert.doesNotMatch(text, /write /);
  await t.says(command, 0, ["nothing to do"]);
});

test("Ctrl-C ends a script with 130 and says how to go on; the next run finishes", async () => {
  const command = script("agent", "--host b1 --agent-args=--node-label=cut=no");
  const run = await t.cut(command, /restart k3s-agent/, "INT");
  assert(run.reached, run.text);
  assert.equal(run.status, 130, run.text);
  assert.match(run.text, /Interrupted\. .*run the same again to finish\./);
  await t.ok(command);
  await t.says(command, 0, ["nothing to do"]);
});

test("Ctrl-C ends make as well, with all that it started", async () => {
  const run = await t.cut("make agent HOST=b1", /restart k3s-agent/, "INT");
  assert(run.reached, run.text);
  assert.equal(run.status, 130, run.text);
  assert.equal((await t.op("pgrep -af '[s]cripts/agent.ts'")).out, "");
  await t.ok("make agent HOST=b1");
  await connected(t.lab.boxes);
});

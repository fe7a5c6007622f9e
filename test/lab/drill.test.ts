/** A backup is proved by starting k3s on it alone: on the operator's machine, or on a spare box. */
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { bench, MODERN, OLD } from "./suite.ts";

const t = await bench({ name: "drill", boxes: ["a1", "b1", "a3"], tools: true });
after(() => t.lab.down());
const spare = t.box("a3");
const home = join(t.lab.dir, "home");

/** What a drill could leave on the box, or send to the cluster's nodes. */
const traces = () =>
  spare.sh(`ls -d /var/lib/k3s-drill /var/lib/rancher /etc/rancher /run/k3s 2>/dev/null || :
ps -e -o args= | grep -E 'k3s|unshare' | grep -v grep || :
grep k3s-drill /proc/mounts || :
ls /sys/class/net; ls /usr/local/bin`);
let clean = "";

/** Unpacks a backup, changes it by a script that is run in its folder, and packs it under another name. */
async function spoilt(file: string, script: string, name: string) {
  const to = join(home, name);
  await t.ok(
    `set -e; rm -rf $HOME/spoilt; mkdir $HOME/spoilt; cd $HOME/spoilt; tar -xzf ${file}; ${script}; tar -czf ${to} about list node-password token tls cred manifests db; rm -rf $HOME/spoilt`,
  );
  return to;
}

for (const version of [MODERN, OLD])
  describe(`drills of a backup of ${version}`, () => {
    let file = "";
    before(async () => {
      t.settings({ K3S_VERSION: version }, { agents: "b1" });
      await t.ok("make -j up");
      t.secret(t.env().K3S_TOKEN as string);
      const { out } = await t.ok("make backup");
      file = out.trim();
      clean = await traces();
    });
    after(() => t.ok("make down YES=1 FORCE=1"));

    test("find in it the nodes, deployments and secrets that it says it has, and leave nothing on the box", async () => {
      // The cluster goes on: what comes after the backup is not asked for.
      await t.box("a1").sh("k3s kubectl annotate node b1 later=yes");
      const { text } = await t.says("make drill HOST=a3", 0, [
        `proves ${file}, made `,
        /^a3 +download k3s /m,
        /^a3 +done in .*k3s was ready in \d+ s with \d+ MB: nodes 2 of 2, deployments 1 of 1, secrets \d+ of \d+$/m,
      ]);
      if (version === MODERN) assert.match(text, /secrets 2 of 2$/m);
      assert.equal(await traces(), clean);
    });

    test("send nothing to the cluster's nodes", async () => {
      const names = ["a1", "b1"];
      for (const name of names)
        await t
          .box(name)
          .sh(`nft 'add table inet drill; add chain inet drill in { type filter hook input priority -300; }
add rule inet drill in ip saddr { ${spare.publicIp}, ${spare.privateIp} } counter'`);
      const packets = () =>
        Promise.all(
          names.map(async (name) =>
            Number(/packets (\d+)/.exec(await t.box(name).sh("nft list table inet drill"))?.[1]),
          ),
        );
      await t.ok(`make drill HOST=a3 BACKUP=${file}`);
      assert.deepEqual(await packets(), [0, 0]);
      await spare.sh(`ping -c 1 ${t.box("b1").publicIp}`);
      assert.deepEqual(await packets(), [0, 1]);
      for (const name of names) await t.box(name).sh("nft delete table inet drill");
    });

    if (version === OLD) return;

    test("say what they would do with DRY=1, and do nothing", async () => {
      await t.says("make drill HOST=a3 DRY=1", 0, [/start k3s .* on the backup alone/]);
      assert.equal(await traces(), clean);
    });

    test("fail on a backup whose datastore is damaged, whose list is another's, or that was cut off", async () => {
      const pages = await spoilt(
        file,
        `${t.lab.dir}/stand-in/node --no-warnings -e 'new (require("node:sqlite").DatabaseSync)("db/state.db").exec("PRAGMA wal_checkpoint(TRUNCATE)")'; rm -f db/state.db-*; dd if=/dev/urandom of=db/state.db bs=4096 seek=1 count=3 conv=notrunc 2>/dev/null`,
        "pages.tar.gz",
      );
      await t.says(`make drill HOST=a3 BACKUP=${pages}`, 2, [
        /a3 +FAILED .*start k3s/,
        /malformed|not a database|corrupt/,
      ]);
      const list = await spoilt(file, "sed -i s/nodes=2/nodes=3/ list", "list.tar.gz");
      await t.says(`make drill HOST=a3 BACKUP=${list}`, 2, [
        /^a3 +FAILED .*The backup is not what it says it is: 2 nodes, expected 3$/m,
        /^a3 +again: make drill HOST=a3 BACKUP=/m,
      ]);
      const cut = join(home, "cut.tar.gz");
      writeFileSync(cut, readFileSync(file).subarray(0, -2000));
      await t.says(`make drill HOST=a3 BACKUP=${cut}`, 2, [`BACKUP is "${cut}": `]);
      assert.equal(await traces(), clean);
    });

    test("that were killed leave nothing that runs, and the next one removes their files", async () => {
      const run = await t.cut("make drill HOST=a3", /start k3s/, "KILL");
      assert(run.reached, run.text);
      for (const end = Date.now() + 60_000; /unshare/.test(await traces()); await sleep(500))
        assert(Date.now() < end, "it still runs");
      await t.ok("make drill HOST=a3");
      assert.equal(await traces(), clean);
    });

    test("are refused on a node of the cluster", async () => {
      await t.says("make drill HOST=b1", 2, [/^b1 +FAILED .*k3s runs on this box, and a second one/m]);
    });

    test("run on the operator's own Linux machine too", async () => {
      // The stand-in is started from there; a real k3s needs nothing.
      await t.ok(
        `mount -t tmpfs tmpfs /opt; mkdir /opt/k3s-stand-in; mount --bind ${t.lab.dir}/stand-in /opt/k3s-stand-in`,
      );
      await t.says("make drill HOST=", 0, [/nodes 2 of 2, deployments 1 of 1, secrets 2 of 2$/m]);
      await t.says("ls -d /var/lib/k3s-drill", 2);
      await t.ok("umount /opt/k3s-stand-in /opt");
    });
  });

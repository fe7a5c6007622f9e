/** Backups that a server makes by itself: to a node of the cluster, to a bucket, and back from there. */
import assert from "node:assert/strict";
import { mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import type { Box } from "./lab.ts";
import { bench, hangUp, MODERN, nodes, restarted } from "./suite.ts";

const t = await bench({ name: "backups", boxes: ["a1", "a3", "b1", "h1"], tools: true });
after(() => t.lab.down());
const [a1, a3, b1, h1] = [t.box("a1"), t.box("a3"), t.box("b1"), t.box("h1")];
const home = join(t.lab.dir, "home");
const settings = (more: Record<string, string>) =>
  t.settings({ ...t.env(), K3S_VERSION: MODERN, BACKUP_EVERY: "1h", ...more }, { agents: "b1 h1=nat" });

const state = () => a1.sh("cat /var/lib/k3s-backup/state");
/** Copies that count, the oldest first; and all else that lies there. */
const copies = async (box: Box) =>
  (await box.sh("ls -A1 /var/lib/k3s-backups 2>/dev/null || :")).split("\n").filter(Boolean).sort();
/** What the timer starts, when a backup is due. */
const due = (status = 0) =>
  a1.sh(`sed -i 's/^made=[0-9]*/made=1/' /var/lib/k3s-backup/state
status=0; systemctl reset-failed k3s-backup 2>/dev/null || :; systemctl start k3s-backup 2>/dev/null || status=$?
[ "$status" = ${status} ] || { cat /var/lib/k3s-backup/log /var/lib/k3s-backup/state; exit 1; }`);
const clean = async () =>
  assert.equal(await a1.sh("ls -A /var/lib/k3s-backup | grep -vxE 'lock|log|state' || :"), "");

before(async () => {
  t.settings({ K3S_VERSION: MODERN }, { agents: "b1 h1=nat" });
  await t.ok("make -j up");
});

describe("a server's own backups", () => {
  test("go to another node over the tunnel, encrypted", async () => {
    settings({ BACKUP_TO: "b1" });
    await t.says("make backup", 0, [/backup\.key opens the backups/]);
    const [name = "", ...more] = await copies(b1);
    assert.match(name, /^k3s-a1-\d{8}T\d{6}Z\.tar\.gz\.cms$/);
    assert.deepEqual(more, []);
    assert.match(await state(), new RegExp(`^made=\\d+ name=${name} revision=\\d+\\n$`));
    assert.equal(
      await b1.sh(`stat -c '%a %U' /var/lib/k3s-backups /var/lib/k3s-backups/${name}`),
      "700 root\n600 root\n",
    );
    assert.equal(
      await a1.sh("systemctl is-active k3s-backup.timer; systemctl is-enabled k3s-backup.timer"),
      "active\nenabled\n",
    );
    assert.equal(
      await a1.sh(
        "stat -c %a /etc/rancher/k3s-backup /etc/rancher/k3s-backup/* /var/lib/k3s-backup | sort -u",
      ),
      "600\n644\n700\n",
    );
    assert.equal((statSync(join(home, "backup.key")).mode & 0o777).toString(8), "600");
    // Nothing of the datastore is readable in it, and the server has nothing that opens it.
    assert.equal(await b1.sh(`grep -c -a 'registry/minions' /var/lib/k3s-backups/${name} || :`), "0\n");
    await clean();
  });

  test("are set up once, and made when they are due", async () => {
    const before = await copies(b1);
    const { text } = await t.says("make backup DRY=1", 0);
    assert.doesNotMatch(text, /let a1 put|write \/usr\/local\/sbin/);
    await a1.sh("systemctl start k3s-backup");
    assert.deepEqual(await copies(b1), before);
    await due();
    assert.equal((await copies(b1)).length, before.length + 1);
  });

  test("are opened by the operator's key alone", async () => {
    await t.ok(
      "mv backup.key own.key; openssl genrsa -out backup.key 2048 2>/dev/null".replaceAll(
        /\b(\w+)\.key/g,
        `${home}/$1.key`,
      ),
    );
    const name = (await copies(b1)).at(-1);
    await t.ok(`scp -q b1:/var/lib/k3s-backups/${name} ${home}/`);
    await t.says(`make restore BACKUP=${home}/${name} HOST=a3`, 2, [
      /cannot be opened: .*backup\.key is not the key/,
    ]);
    await t.ok(`rm ${home}/backup.key`);
    await t.says(`make restore BACKUP=${home}/${name} HOST=a3`, 2, [
      /cannot be opened: expected the operator's key/,
    ]);
    await t.ok(
      `mv ${home}/own.key ${home}/backup.key; head -c 5000 ${home}/${name} >${home}/half.tar.gz.cms`,
    );
    await t.says(`make restore BACKUP=${home}/half.tar.gz.cms HOST=a3`, 2, [
      /cannot be opened: it is damaged, or cut off/,
    ]);
    await t.ok(`rm ${home}/half.tar.gz.cms ${home}/${name}`);
  });

  test("are what make drill proves, if no newer one is with the operator", async () => {
    const name = (await copies(b1)).at(-1);
    await t.ok(`rm ${home}/k3s-a1-*.tar.gz`);
    await t.says("make drill HOST=a3", 0, [
      new RegExp(`proves .*/${name}, made `),
      /nodes 3 of 3, deployments 1 of 1, secrets 3 of 3/,
    ]);
    await t.ok(`rm ${home}/${name}`);
  });

  test("go by a key that can do nothing else there", async () => {
    const by =
      "ssh -F /dev/null -i /etc/rancher/k3s-backup/key -o BatchMode=yes -o HostKeyAlias=k3s-backup-target -o UserKnownHostsFile=/etc/rancher/k3s-backup/known_hosts";
    const at = `$(sed -n 's/^address=//p' /etc/rancher/k3s-backup/settings)`;
    const said = (words: string) => a1.sh(`${by} ${at} ${words} 2>&1 </dev/null || :`);
    assert.equal(await said("id"), "expected ready or put\n");
    assert.equal(await said("'put ../../../etc/x 0 0'"), "../../../etc/x is no name of a backup of a1\n");
    assert.equal(await said("'ready; id >/root/x'"), "expected ready or put\n");
    assert.match(
      await said("-N -R 8080:127.0.0.1:22 -o ExitOnForwardFailure=yes"),
      /forwarding failed|administratively/,
    );
    assert.equal(
      await b1.sh("ls /root/x 2>&1 || :"),
      "ls: cannot access '/root/x': No such file or directory\n",
    );
  });

  test("that are cut in their middle do not count, and the next run mends it", async () => {
    const before = await copies(b1);
    await a1.sh("head -c 90000000 /dev/urandom >/var/lib/rancher/k3s/server/cred/padding");
    const failed = due(1);
    for (;;) {
      const part = await b1.sh("find /var/lib/k3s-backups -name '.part-*' -size +1000k");
      if (part) break;
      await sleep(50);
    }
    await hangUp(b1);
    await failed;
    assert.deepEqual(
      (await copies(b1)).filter((name) => name.startsWith("k3s-")),
      before,
    );
    assert.match(await state(), /^made=1 .*\nfailed=\d+ .+\n$/);
    await clean();
    await a1.sh("rm /var/lib/rancher/k3s/server/cred/padding");
    await due();
    assert.equal((await copies(b1)).length, before.length + 1);
    assert.doesNotMatch(await state(), /failed/);
  });

  test("do not fill the disk of the node that keeps them", async () => {
    await b1.sh("mount -t tmpfs -o size=60m tmpfs /var/lib/k3s-backups");
    await due(1);
    assert.match(await state(), /failed=\d+ .*there is too little room on b1/);
    assert.deepEqual(await copies(b1), []);
    await b1.sh("umount /var/lib/k3s-backups");
    await due();
  });

  test("are none of a damaged datastore", async () => {
    const before = await copies(b1);
    await a1.sh(`systemctl stop k3s; cd /var/lib/rancher/k3s/server/db
sqlite3 state.db 'pragma wal_checkpoint(truncate)' >/dev/null; cp state.db ../good
size=$(stat -c %s state.db)
dd if=/dev/urandom of=state.db bs=1 seek=$((size / 2)) count=$((size / 4)) conv=notrunc 2>/dev/null`);
    await due(1);
    assert.match(await state(), /failed=\d+ The datastore is damaged: /);
    assert.deepEqual(await copies(b1), before);
    await restarted(a1, () =>
      a1.sh("cd /var/lib/rancher/k3s/server/db; mv ../good state.db; systemctl start k3s"),
    );
    await a1.sh(`. /etc/rancher/k3s-backup/settings
n=0; until ping -c 1 -W 1 "$address" >/dev/null 2>&1; do n=$((n + 1)); [ $n -lt 60 ]; sleep 1; done`);
    await due();
  });

  test("are kept as many as BACKUP_KEEP says, and a failed one prunes nothing", async () => {
    settings({ BACKUP_TO: "b1", BACKUP_KEEP: "2" });
    await b1.sh("touch /var/lib/k3s-backups/mine /var/lib/k3s-backups/k3s-other-20200101T000000Z.tar.gz.cms");
    await t.ok("make backup");
    const kept = await copies(b1);
    assert.deepEqual(kept.length, 4, kept.join());
    assert(kept.includes("mine") && kept.includes("k3s-other-20200101T000000Z.tar.gz.cms"));
    await b1.sh("rm /var/lib/k3s-backups/mine /var/lib/k3s-backups/k3s-other*");
  });

  test("go to a node at home, whose sshd has another port, and no more to the one before", async () => {
    await h1.sh(`nft -f - <<'END'
table ip moved {
  chain in {
    type nat hook prerouting priority -100
    iifname eth0 tcp dport 22 redirect to :2222
  }
}
END
echo 'Port 2222' >/etc/ssh/sshd_config.d/port.conf; systemctl reload ssh || systemctl restart ssh; sleep 1`);
    settings({ BACKUP_TO: "h1" });
    await t.ok("make backup");
    assert.equal((await copies(h1)).length, 1);
    assert.equal(await a1.sh("sed -n 's/^port=//p' /etc/rancher/k3s-backup/settings"), "2222\n");
    assert.equal(
      await b1.sh("grep -c k3s-backup /root/.ssh/authorized_keys || :; ls /usr/local/sbin"),
      "0\n",
    );
    await t.says("make remove HOST=h1=nat", 2, [/h1, which keeps the server's backups \(BACKUP_TO/]);
  });

  test("are a problem in check and status when they fail, are stale, or are set up otherwise", async () => {
    await t.says("make status", 0, [/^backups +the last one is 0 min old, k3s-a1-/m]);
    await a1.sh("sed -i 's/^made=[0-9]*/made=1/' /var/lib/k3s-backup/state");
    await t.says("make status", 2, [/^backups +its last good backup is \d+ h old/m]);
    await t.says("make check BACKUP_KEEP=9", 2, [
      /a1: its last good backup is \d+ h old, k3s-a1-.*: one is due every 60 min/,
      /a1: its backups go by other settings than these: BACKUP_KEEP/,
      /do: make backup/,
    ]);
    await a1.sh("echo 'failed=1 no reason' >>/var/lib/k3s-backup/state");
    await t.says("make status", 2, [/^backups +its backup failed .*: no reason/m]);
    await due();
    await t.says("make check", 0);
  });
});

describe("a server's own backups in a bucket", () => {
  const folder = join(home, "bucket");
  const spec = {
    bucket: "copies",
    host: "s3.example",
    region: "eu-lab-1",
    id: "AKIALABLABLAB",
    secret: "lab/secret+of40characters==",
  };
  const is = (more: object = {}) =>
    writeFileSync(join(folder, "spec.json"), JSON.stringify({ ...spec, ...more }));
  const access = { S3_REGION: spec.region, S3_ACCESS_KEY: spec.id, S3_SECRET_KEY: spec.secret };
  const objects = (path: string) => readdirSync(join(folder, "objects", path)).sort();

  before(async () => {
    mkdirSync(folder);
    is();
    t.secret(spec.secret);
    await t.ok(
      `cd ${folder} && openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=lab -addext 'subjectAltName=DNS:s3.example,DNS:copies.s3.example' -keyout key.pem -out certificate.pem 2>/dev/null`,
    );
    await t.ok(
      `node --import tsx test/lab/bucket.ts ${folder} 203.0.113.254 443 >${folder}/log 2>&1 & sleep 2; cat ${folder}/log`,
    );
    const certificate = readFileSync(join(folder, "certificate.pem"), "utf8");
    for (const box of [a1, a3])
      await box.sh(`echo '203.0.113.254 s3.example copies.s3.example' >>/etc/hosts
cat >/usr/local/share/ca-certificates/lab.crt <<'END'
${certificate}END
update-ca-certificates >/dev/null 2>&1`);
  });

  test("are signed, and read by who has the credentials", async () => {
    settings({ BACKUP_TO: "https://s3.example/copies/k3s/a/", BACKUP_KEEP: "2", ...access });
    await t.ok("make backup");
    const [name, latest, ...more] = objects("k3s/a");
    assert.deepEqual(more, []);
    assert.equal(latest, "k3s-a1-latest");
    assert.match(name ?? "", /^k3s-a1-\d{8}T\d{6}Z\.tar\.gz\.cms$/);
    assert.match(await state(), new RegExp(`name=${name} `));
    assert.equal(await h1.sh("grep -c k3s-backup /root/.ssh/authorized_keys || :"), "0\n");
    assert.equal(await a1.sh("stat -c %a /etc/rancher/k3s-backup/s3"), "600\n");
    await a1.sh(`! grep -rl '${spec.secret}' /etc/systemd /usr/local /var/log /var/lib/k3s-backup`);
  });

  test("are as many as BACKUP_KEEP says, by a virtual host as well", async () => {
    settings({ BACKUP_TO: "https://copies.s3.example/k3s/a", BACKUP_KEEP: "2", ...access });
    const had = objects("k3s/a");
    await t.ok("make backup");
    await due();
    const now = objects("k3s/a");
    assert.equal(now.length, 3, now.join());
    assert(
      !now.includes(had[0] as string),
      `${had} ${now} ${await state()} ${readFileSync(join(folder, "log"), "utf8")}`,
    );
  });

  test("are brought from there by make drill", async () => {
    await t.ok(`rm -f ${home}/k3s-a1-*; echo '203.0.113.254 copies.s3.example' >>/etc/hosts`);
    const newest = objects("k3s/a").at(-2);
    await t.says("make drill HOST=a3", 0, [new RegExp(`proves .*/${newest}, made `), /nodes 3 of 3/], {
      env: { NODE_EXTRA_CA_CERTS: join(folder, "certificate.pem") },
    });
  });

  test("do not count when the bucket is full, forbidden, or does not know the key, and prune nothing", async () => {
    const had = objects("k3s/a");
    for (const [more, said] of [
      [{ room: 100 }, "status 403, QuotaExceeded"],
      [{ forbidden: ["PUT"] }, "status 403, AccessDenied"],
      [{ secret: "another" }, "status 403, SignatureDoesNotMatch"],
      [{ region: "us-east-1" }, "status 400, AuthorizationHeaderMalformed"],
    ] as const) {
      is(more);
      await due(1);
      const now = await state();
      assert(now.includes("failed=") && now.includes(said), now);
      await clean();
    }
    assert.deepEqual(objects("k3s/a"), had);
    is({ forbidden: ["DELETE"] });
    await due();
    assert.equal(objects("k3s/a").length, had.length + 1);
    is();
    await due();
    assert.equal(objects("k3s/a").length, had.length);
    assert.match(await state(), /^made=\d{10} [^\n]*\n$/);
  });

  test("are what a new server is restored from", async () => {
    const names = objects("k3s/a");
    await t.ok(
      `cp ${folder}/objects/k3s/a/${names.at(-2)} ${home}/; make restore BACKUP=${home}/${names.at(-2)} HOST=a3`,
    );
    await a1.off();
    assert.equal((await nodes(a3)).a3?.ready, true);
    assert.equal(await a3.sh("systemctl is-active k3s-backup.timer"), "active\n");
    await t.says("make check", 0, [/Nothing is wrong/]);
  });

  test("go with the cluster, from every box", async () => {
    await a1.on();
    settings({ BACKUP_TO: "b1", SERVER: "a3" });
    await t.ok("make backup");
    assert.equal((await copies(b1)).filter((name) => name.startsWith("k3s-a3-")).length, 1);
    await t.ok("make down YES=1");
    t.settings({ K3S_VERSION: MODERN }, { server: "a1", agents: "" });
    await t.ok("make down YES=1");
    for (const box of [a1, a3, b1, h1])
      assert.equal(
        await box.sh(
          "ls /etc/rancher /usr/local/sbin /etc/systemd/system /var/lib | grep k3s || :; grep -h k3s-backup /root/.ssh/authorized_keys || :",
        ),
        "",
        box.name,
      );
  });
});

import assert from "node:assert/strict";
import { existsSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { listOf } from "../lib/k3s/backups.ts";
import { Refusal } from "../lib/step.ts";
import { archive } from "../scripts/cluster/backup.ts";
import { forgetPasswords, moveFirewall, placeData } from "../scripts/cluster/restore.ts";
import {
  A1,
  B1,
  B2,
  database,
  lacks,
  MODERN,
  nodes,
  noSqlite,
  prepared,
  programs,
  shell,
  temporary,
  wanted,
} from "./helpers.ts";

const facts = prepared(MODERN, { database: "/var/lib/rancher/k3s/server/db/state.db\n" });

/** The script with a box's folders under `root`. */
const under = (root: string, text = "") =>
  text.replace(/(?<![\w/])\/(var\/lib|etc\/rancher)/g, (path) => root + path);

const skip = noSqlite;

/** A server's data, and a process that stands for k3s. */
function server() {
  const root = temporary();
  const data = join(root, "var/lib/rancher/k3s/server");
  for (const folder of ["db", "tls", "cred", "manifests"]) mkdirSync(join(data, folder), { recursive: true });
  mkdirSync(join(root, "etc/rancher/node"), { recursive: true });
  for (const [path, text] of Object.entries({
    token: "a token",
    "db/state.db": "",
    "db/state.db-wal": "",
    "db/state.db-shm": "nothing that lasts",
    "tls/server-ca.key": "a key",
    "manifests/own.yaml": "a manifest",
  }))
    writeFileSync(join(data, path), text);
  writeFileSync(join(root, "etc/rancher/node/password"), "a password");
  database(join(data, "db"));
  return { root, data };
}

describe("a backup", () => {
  const want = wanted({ K3S_VERSION: MODERN });

  test("is refused if there is no SQLite datastore", () =>
    assert.throws(() => archive("x").plan(want, { ...facts, database: "" }), Refusal));

  test("is refused if the cluster is in an external database, with the advice to keep K3S_TOKEN", () =>
    assert.throws(
      () => archive("x").plan({ ...want, K3S_DATASTORE_ENDPOINT: "postgres://u:p@h/k3s" }, facts),
      (error) => error instanceof Refusal && /keep K3S_TOKEN with it/.test(error.message),
    ));

  for (const runs of [true, false])
    test(`${runs ? "suspends a running server while it copies" : "works while the server is down"}, contains all that a restore needs, and is readable by root only`, () => {
      const { root } = server();
      // The process that stands for k3s must be running again afterwards, not stopped.
      const sh = under(root, archive("x").plan(want, facts)[0]?.sh);
      const PATH = programs(join(root, "bin"), { systemctl: `echo MainPID=$PID` });
      const { status, stdout, stderr } = shell(
        `${runs ? "sleep 30 & PID=$!" : "PID=0"}; export PID
(set -eu
${sh}) || exit 1
[ $PID = 0 ] || { sed -n 's/^State:.//p' /proc/$PID/status; kill $PID; }`,
        ["sh", "-s"],
        { PATH },
      );
      assert.equal(status, 0, stderr);
      if (runs) assert.match(stdout, /sleeping/);
      const file = join(root, "var/lib/rancher/k3s/backup/x.tar.gz");
      const list = shell(`tar -tzf ${file}; stat -c %a ${file}; tar -xzOf ${file} about`).stdout;
      for (const name of ["about", "node-password", "token", "tls/server-ca.key", "manifests/own.yaml"])
        assert.match(list, new RegExp(`^${name}$`, "m"));
      assert.match(list, /^db\/state\.db\n?(db\/)?/m);
      assert.match(list, /^db\/state\.db-wal$/m);
      assert.doesNotMatch(list, /shm/);
      assert.match(
        list,
        new RegExp(`^600$\nversion=${MODERN.replace("+", "\\+")}\nnode=a1\nip=198\\.51\\.100\\.11`, "m"),
      );
    });
});

test("a backup that begins right after another one, or beside it, is whole as well", () => {
  const { root } = server();
  const want = wanted({ K3S_VERSION: MODERN });
  const made = (id: string) =>
    under(root, archive(id).plan(want, facts)[0]?.sh).replaceAll("k3s/backup", `k3s/backup-${id}`);
  const PATH = programs(join(root, "bin"), {
    systemctl: "echo MainPID=$PID",
    cp: `case "$*" in *"/state.db db/") sleep 1.3 ;; esac; exec ${shell("command -v cp").stdout.trim()} "$@"`,
  });
  const script = `sleep 60 & PID=$!; export PID
one() { sh -c "$1"; }
one "$A" & first=$!
one "$B" && one "$C" && wait $first
status=$?
sed -n 's/^State:.//p' /proc/$PID/status
kill $PID
exit $status`;
  const [A, B, C] = ["a", "b", "c"].map((id) => `set -eu\n${made(id)}`) as [string, string, string];
  const { status, stdout, stderr } = shell(script, ["sh", "-s"], { PATH, A, B, C });
  assert.equal(status, 0, stdout + stderr);
  assert.match(stdout, /sleeping/);
});

describe("what a backup says of its datastore", () => {
  const want = wanted({ K3S_VERSION: MODERN });
  const archived = (root: string, path = "") => {
    const PATH = programs(join(root, "bin"), { systemctl: "echo MainPID=0" });
    const made = shell(`set -eu\n${under(root, archive("x").plan(want, facts)[0]?.sh)}`, ["sh", "-s"], {
      PATH: path ? `${path}:${join(root, "bin")}` : PATH,
    });
    return { ...made, file: join(root, "var/lib/rancher/k3s/backup/x.tar.gz") };
  };

  test("is its newest revision and what it has, with what is in its log alone", { skip }, async () => {
    const { file, status, stderr } = archived(server().root);
    assert.equal(status, 0, stderr);
    assert.deepEqual(await listOf(file), {
      verified: true,
      revision: 9,
      nodes: 2,
      deployments: 1,
      secrets: 3,
    });
    const { stdout } = shell(`tar -tzf ${file}`);
    assert.match(stdout, /^about\nlist\n/);
  });

  test("is the same by python", { skip: skip || lacks("python3") }, async () => {
    const { root } = server();
    // Without sqlite3: the rest of what the shell calls.
    const bin = join(temporary(), "bin");
    mkdirSync(bin);
    const names =
      "sh cat tar flock gzip df ls awk mkdir printf cp rm mv sync chmod sed grep cut sha256sum tail head";
    shell(`for name in ${names}; do ln -s "$(command -v $name)" ${bin}/; done
ln -s "$(python3 -c 'import sys; print(sys.executable)')" ${bin}/python3`);
    const { file, status, stderr, stdout } = archived(root, bin);
    assert.equal(status, 0, stderr + stdout);
    assert.deepEqual(await listOf(file), {
      verified: true,
      revision: 9,
      nodes: 2,
      deployments: 1,
      secrets: 3,
    });
    rmSync(join(bin, "python3"));
    assert.equal(archived(root, bin).status, 0);
    assert.deepEqual(await listOf(file), { verified: false });
  });

  test("is nothing where bytes in its middle were overwritten: there is no backup", { skip }, () => {
    const { root, data } = server();
    database(join(data, "db"), 2000);
    const file = join(data, "db/state.db");
    const size = statSync(file).size;
    shell(`dd if=/dev/urandom of=${file} bs=1 seek=${Math.floor(size / 2)} count=6000 conv=notrunc 2>&1`);
    const { status, stderr, stdout, file: made } = archived(root);
    assert.notEqual(status, 0);
    assert.match(stdout + stderr, /^The datastore is damaged: /m);
    assert.ok(!existsSync(made));
  });

  test("is nothing where it is empty", { skip }, () => {
    const { root, data } = server();
    for (const name of ["state.db", "state.db-wal"]) writeFileSync(join(data, "db", name), "");
    const { status, stdout } = archived(root);
    assert.notEqual(status, 0);
    assert.match(stdout, /^The datastore is damaged: .*no such table/m);
  });
});

describe("a restore", () => {
  const data = placeData("./backup.tar.gz", "abc");
  const want = wanted();

  test("places a backup on a box without server data, and not a second time", () => {
    const [change] = data.plan(want, { data: "", restored: "" });
    assert.deepEqual(change?.push, { file: "./backup.tar.gz", path: "/var/lib/.k3s-restore.tar.gz" });
    assert.deepEqual(data.plan(want, { data: "db\nrestored\n", restored: "abc\n" }), []);
  });

  test("never overwrites another server's data", () =>
    assert.throws(() => data.plan(want, { data: "db\ntoken\n", restored: "" }), Refusal));

  test("places the backup's files on the box, with the devices that the server lets in", () => {
    const { root } = server();
    mkdirSync(join(root, "etc/rancher/k3s-devices"), { mode: 0o700 });
    writeFileSync(join(root, "etc/rancher/k3s-devices/key"), "the entry's key", { mode: 0o600 });
    const made = under(root, archive("x").plan(want, facts)[0]?.sh);
    const PATH = programs(join(root, "bin"), { systemctl: "echo MainPID=0" });
    assert.equal(shell(`set -eu\n${made}`, ["sh", "-s"], { PATH }).status, 0);
    const fresh = temporary();
    mkdirSync(join(fresh, "var/lib"), { recursive: true });
    shell(`cp ${root}/var/lib/rancher/k3s/backup/x.tar.gz ${fresh}/var/lib/.k3s-restore.tar.gz`);
    const { status, stderr } = shell(`set -eu\n${under(fresh, data.plan(want, {})[0]?.sh)}`);
    assert.equal(status, 0, stderr);
    const file = (path: string) => readFileSync(join(fresh, path), "utf8");
    const log = "var/lib/rancher/k3s/server/db/state.db-wal";
    assert.equal(file(log), readFileSync(join(root, log), "utf8"));
    assert.equal(file("var/lib/rancher/k3s/server/tls/server-ca.key"), "a key");
    assert.equal(file("var/lib/rancher/k3s/server/restored"), "abc\n");
    assert.equal(file("etc/rancher/node/password"), "a password");
    assert.equal(file("etc/rancher/k3s-devices/key"), "the entry's key");
    assert.equal(
      shell(`cd ${fresh}/etc/rancher; stat -c %a k3s-devices k3s-devices/key`).stdout,
      "700\n600\n",
    );
    assert.ok(!existsSync(join(fresh, "var/lib/rancher/k3s/server/devices")));
    assert.ok(!existsSync(join(fresh, "var/lib/.k3s-restore.tar.gz")));
    rmSync(fresh, { recursive: true });
  });

  const about = "mkdir -p db tls; echo x >token; echo y >node-password; echo z >about; ";
  const names = "about node-password token db tls";
  const bad: [name: string, made: string, said: RegExp][] = [
    [
      "a symlink in place of a file that restore writes",
      `ln -s VICTIM restored; tar -czf A ${names} restored`,
      /it has restored/,
    ],
    [
      "a symlink with an expected name",
      `rm token; ln -s VICTIM token; tar -czf A ${names}`,
      /no plain file: lrwx/,
    ],
    ["a hard link", `ln token db/x; tar -czf A ${names}`, /no plain file: hrw/],
    ["a symlink to a folder", `ln -s VICTIM.d tls/x; tar -czf A ${names}`, /no plain file: lrwx/],
    ["a named pipe", `mkfifo db/x; tar -czf A ${names}`, /no plain file: prw/],
    ["a device", `tar -czf A ${names} -C /dev --transform 's,^null,db/null,' null`, /no plain file: crw/],
    ["a setuid file", `chmod 4755 token; tar -czf A ${names}`, /no plain file: -rws/],
    [
      "a path that leaves its folder",
      `tar -czPf A --transform 's,^token,db/../../../token,' ${names}`,
      /it has db\/\.\.\/\.\.\/\.\.\/token/,
    ],
    ["an absolute path", `tar -czPf A --transform 's,^token,/token,' ${names}`, /it has \/token/],
    [
      "a file with an unexpected name",
      `mkdir -p agent; echo x >agent/x; tar -czf A ${names} agent`,
      /it has agent\//,
    ],
    [
      "more data than there is disk space for",
      `truncate -s 8T db/x; tar -cSzf A ${names}`,
      /there is less room here/,
    ],
    ...["x 1", "x 0 0", "0/0 0", "x -9 9"].map((owner): (typeof bad)[number] => [
      `more data than there is disk space for, disguised by the owner "${owner}"`,
      `truncate -s 8T db/x; tar --owner="${owner}:0" -cSzf A ${names}`,
      /there is less room here/,
    ]),
    [
      "more data than there is disk space for, disguised by a pax header",
      `truncate -s 8T db/x; tar -H posix --owner="x 1:0" --group="y 2:0" -cSzf A ${names}`,
      /there is less room here/,
    ],
    ["no archive format", "echo x >A", /cannot be read/],
    [
      "a missing end",
      `head -c 100000 /dev/urandom >db/x; tar -czf B ${names}; head -c 50000 B >A`,
      /cannot be read/,
    ],
  ];
  for (const [name, made, said] of bad)
    test(`unpacks nothing from an archive that has ${name}`, () => {
      const [fresh, from] = [temporary(), temporary()];
      const victim = join(fresh, "victim");
      mkdirSync(join(fresh, "var/lib"), { recursive: true });
      writeFileSync(victim, "as it was");
      const archive = join(fresh, "var/lib/.k3s-restore.tar.gz");
      const sh = `cd ${from}; ${about}${made.replaceAll("VICTIM", victim).replace(" A", ` ${archive}`).replace(">A", `>${archive}`)}`;
      assert.equal(shell(`set -eu; ${sh}`).status, 0);
      const { status, stdout } = shell(`set -eu\n${under(fresh, data.plan(want, {})[0]?.sh)}`);
      assert.notEqual(status, 0);
      assert.match(stdout, said);
      assert.equal(readFileSync(victim, "utf8"), "as it was");
      const left = shell(`cd ${fresh}; find . ! -type d | sort`).stdout;
      assert.equal(left, "./victim\n");
    });

  test("deletes the passwords of the other nodes once, because they may have rejoined since the backup", () => {
    const facts = prepared(MODERN, {
      restored: "abc\n",
      secrets: "a1\nb1\n",
    });
    const [change] = forgetPasswords.plan(want, facts);
    assert.match(change?.sh ?? "", /delete secret b1\.node-password\.k3s /);
    assert.doesNotMatch(change?.sh ?? "", /delete secret a1/);
    assert.deepEqual(forgetPasswords.plan(want, { ...facts, restored: "abc\npasswords\n" }), []);
    assert.deepEqual(data.plan(want, { data: "x", restored: "abc\npasswords\n" }), []);
    assert.deepEqual(
      forgetPasswords.plan(want, { ...facts, restored: "" }),
      [],
      "a server that was never restored",
    );
  });

  test("adds the server's new address to the rules of make firewall, if there are any, and removes the old one", () => {
    const firewall = moveFirewall(`198.51.100.12 ${B1.ip} -${A1.ip}`);
    const seen = { nodes: nodes(A1, B1, B2), nft: "/usr/sbin/nft\n" };
    const want = wanted({ PUBLIC_IP: B1.ip });
    assert.deepEqual(firewall.plan(want, { ...seen, firewalled: "\n" }), [], "no rules of ours");
    const [{ sh } = { sh: "" }] = firewall.plan(want, { ...seen, firewalled: "firewall\n" });
    assert.match(sh, new RegExp(`elements = \\{ 198\\.51\\.100\\.12, ${B1.ip}, ${B2.ip} \\}`));
  });
});

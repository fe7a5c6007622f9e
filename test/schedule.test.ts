import assert from "node:assert/strict";
import { once } from "node:events";
import { statSync } from "node:fs";
import { createServer } from "node:http";
import { join } from "node:path";
import { describe, test } from "node:test";
import { madeAt } from "../lib/k3s/backups.ts";
import { fetchFrom, signedHeaders } from "../lib/k3s/bucket.ts";
import { nodesOf } from "../lib/k3s/nodes.ts";
import { backupsIn, RECEIVES, receives, secondsOf, signs, stateIn, targetOf } from "../lib/k3s/schedule.ts";
import { sha256 } from "../lib/text.ts";
import { A1, B1, type Facts, NOW, nodes, shell, temporary, wanted } from "./helpers.ts";
import { keyIn, wrongIn } from "./lab/bucket.ts";

describe("what check says of a server's own backups", () => {
  const want = wanted({ BACKUP_EVERY: "6h", BACKUP_TO: "b1" });
  const list = nodesOf(nodes(A1, B1));
  const made = (hours: number, revision = "9") =>
    `made=${NOW - hours * 3600} name=k3s-a1-20261123T000000Z.tar.gz.cms revision=${revision}\n`;
  const facts = (state: string, more: Facts = {}): Facts => ({
    now: `${NOW}`,
    schedule: "abc\nActiveState=active\nUnitFileState=enabled\ns3=\n",
    "schedule-settings": "every=21600\nkeep=7\nto=b1\nregion=''\nnode=b1\n",
    "schedule-state": state,
    ...more,
  });
  const cases: [what: string, facts: Facts, said: RegExp | undefined, over?: Facts][] = [
    ["nothing, where the last one is young enough", facts(made(13)), undefined],
    ["that it is stale, from twice BACKUP_EVERY and an hour on", facts(made(13.1)), /is 13 h old/],
    ["that there is none yet", facts(""), /no backup by itself yet/],
    [
      "why one failed",
      facts(`${made(1)}failed=${NOW - 60} the disk is full\n`),
      /failed 1 min ago.*: the disk is full/,
    ],
    ["that no timer runs", facts(made(1), { schedule: "abc\nActiveState=inactive\n" }), /timer does not run/],
    ["that settings differ", facts(made(1)), /other settings than these: BACKUP_KEEP/, { BACKUP_KEEP: "3" }],
    ["that there is no timer", { now: `${NOW}` }, /makes no backups by itself/],
    ["that there is one too many", facts(made(1)), /BACKUP_EVERY is empty/, { BACKUP_EVERY: "" }],
    [
      "that the target is no node any more",
      facts(made(1), { "schedule-settings": "every=21600\nkeep=7\nto=b1\nnode=b9\n" }),
      /b9, which is no node/,
    ],
  ];
  for (const [what, of, said, over = {}] of cases)
    test(`is ${what}`, () => {
      const { wrong = [] } = backupsIn({ ...want, ...over }, of, list) ?? {};
      if (said) assert.match(wrong.join("\n"), said);
      else assert.deepEqual(wrong, []);
    });

  test("is a note where they are not verified", () =>
    assert.match(backupsIn(want, facts(made(1, "unverified")), list)?.notes.join() ?? "", /not verified/));

  test("is nothing where none are asked for and none are made", () =>
    assert.equal(backupsIn(wanted(), { now: `${NOW}` } as Facts, list), undefined));

  test("does not end it, whatever the box says", () =>
    assert.deepEqual(stateIn(`made=${"9".repeat(20)} name=x revision=1\nfailed=${"9".repeat(20)} y`), {}));
});

test("BACKUP_EVERY is hours or days", () =>
  assert.deepEqual(["", "1h", "36h", "2d"].map(secondsOf), [0, 3600, 129_600, 172_800]));

test("curl signs what is sent to a bucket from 7.87 on", () =>
  assert.deepEqual(["7.29.0", "7.76.1", "7.86.0", "7.87.0", "8.5.0"].filter(signs), ["7.87.0", "8.5.0"]));

test("a name from elsewhere counts only as a whole", () => {
  assert.equal(madeAt("k3s-a1-20261128T041500Z.tar.gz.cms"), "20261128T041500Z");
  for (const name of [
    "k3s-a/../../x/k3s-b-20261128T041500Z.tar.gz",
    "../k3s-a1-20261128T041500Z.tar.gz",
    "k3s-a1-20261128T041500Z.tar.gz.cms.part",
    "k3s-a1 2-20261128T041500Z.tar.gz",
  ])
    assert.equal(madeAt(name), "", name);
});

describe("the node that keeps backups", () => {
  const facts: Facts = {
    "receiver-user": "debian\n/home/debian/.ssh/authorized_keys\n",
    "receiver-keys": "ssh-ed25519 AAAA\nnot a key\n",
    "receiver-ssh": "2222\n",
  };
  test("says how its sshd is reached", () =>
    assert.deepEqual(targetOf(facts), { login: "debian", port: "2222", keys: ["ssh-ed25519 AAAA"] }));

  test("has nothing to be done where it has receiver and key", () => {
    const key = "ssh-ed25519 BBBB";
    const line = `restrict,command="sudo -n /usr/local/sbin/k3s-backup-receive a1 7 \\"$SSH_ORIGINAL_COMMAND\\"" ${key} k3s-backup\n`;
    const done = { ...facts, receiver: `${sha256(RECEIVES)}\n`, "receiver-line": line };
    assert.deepEqual(receives("a1", "7", key).plan(wanted(), done), []);
    assert.equal(receives("a1", "8", key).plan(wanted(), done).length, 1);
    assert.equal(receives("a1", "7", "ssh-ed25519 CCCC").plan(wanted(), done).length, 1);
  });

  test("takes files with this server's names, of no day to come, whose hash fits, and keeps the newest", () => {
    const root = temporary();
    const program = RECEIVES.replaceAll("/var/lib/k3s-backups", `${root}/copies`);
    const asked = (words: string, content = "") =>
      shell(
        program,
        ["sh", "-c", `cat >${root}/program; printf %s "$CONTENT" | sh ${root}/program a1 2 "$WORDS"`],
        {
          WORDS: words,
          CONTENT: content,
        },
      ).stdout;
    const name = (day: string) => `k3s-a1-${day}T000000Z.tar.gz.cms`;
    const put = (day: string, content: string) =>
      asked(`put ${name(day)} ${sha256(content)} ${content.length}`, content);
    assert.equal(asked("ready"), "ready\n");
    for (const day of ["20260101", "20260102", "20260103"])
      assert.equal(put(day, day), `kept ${name(day)}\n`);
    assert.match(asked(`put ${name("20260104")} ${sha256("x")} 1`, "cut"), /is not what was sent/);
    assert.match(put("29990101", "x"), /is of a day to come/);
    assert.match(asked("put k3s-b1-20260101T000000Z.tar.gz.cms x 1"), /is no name of a backup of a1/);
    assert.match(asked("rm -rf /"), /expected ready or put/);
    // The clock of the server went back: what has just come stays.
    assert.equal(put("20250101", "old"), `kept ${name("20250101")}\n`);
    const { stdout } = shell(`ls -A ${root}/copies`);
    assert.deepEqual(stdout.trim().split("\n"), [name("20250101"), name("20260102"), name("20260103")]);
  });
});

describe("the signature of a request to a bucket", () => {
  // The example of Amazon's documentation of Signature Version 4 for S3.
  const spec = {
    bucket: "examplebucket",
    host: "s3.amazonaws.com",
    region: "us-east-1",
    id: "AKIAIOSFODNN7EXAMPLE",
    secret: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
  };
  const now = new Date("2013-05-24T00:00:00Z");
  const headers: Record<string, string> = {
    host: "examplebucket.s3.amazonaws.com",
    range: "bytes=0-9",
    "x-amz-content-sha256": sha256(""),
    "x-amz-date": "20130524T000000Z",
    authorization:
      "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
  };
  const body = Buffer.from("");
  const wrong = (more: Record<string, string> = {}, method = "GET", late = 0) =>
    wrongIn(
      spec,
      { method, url: "/test.txt", headers: { ...headers, ...more }, body },
      now.getTime() + late,
    )?.[1];

  test("is taken by the lab's bucket as Amazon computes it, and no other is", () => {
    assert.equal(wrong(), undefined);
    assert.equal(wrong({}, "PUT"), "SignatureDoesNotMatch");
    assert.equal(wrong({ range: "bytes=0-8" }), "SignatureDoesNotMatch");
    assert.equal(wrong({ "x-amz-acl": "public-read" }), "AccessDenied");
    assert.equal(wrong({}, "GET", 1_000_000), "RequestTimeTooSkewed");
    assert.equal(wrong({ authorization: "" }), "AccessDenied");
  });

  test("is what make computes for reading an object", () => {
    const url = new URL("https://examplebucket.s3.amazonaws.com/test.txt");
    const access = { S3_REGION: spec.region, S3_ACCESS_KEY: spec.id, S3_SECRET_KEY: spec.secret };
    const signed = { host: url.host, ...signedHeaders(url, access, now) };
    const request = { method: "GET", url: url.pathname, headers: signed, body };
    assert.equal(wrongIn(spec, request, now.getTime()), undefined);
  });

  test("is for a bucket by its path or by its host", () => {
    assert.equal(keyIn(spec, "s3.amazonaws.com", "/examplebucket/a/b"), "a/b");
    assert.equal(keyIn(spec, "examplebucket.s3.amazonaws.com", "/a/b"), "a/b");
    assert.deepEqual(keyIn(spec, "other.s3.amazonaws.com", "/a/b"), [404, "NoSuchBucket"]);
  });
});

test("a copy from a bucket that is larger than it may be is refused before the disk is full", async () => {
  const server = createServer((_, answer) => answer.end(Buffer.alloc(5000))).listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as { port: number };
  const folder = temporary();
  const fetched = (file: string, most: number) =>
    fetchFrom(`http://127.0.0.1:${port}/copies`, "k3s-a1", wanted(), join(folder, file), most);
  await fetched("whole", 5000);
  assert.equal(statSync(join(folder, "whole")).size, 5000);
  await assert.rejects(fetched("more", 4999), /sends more than 4999 bytes for k3s-a1/);
  server.close();
});

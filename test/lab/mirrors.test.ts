/** download-k3s with mirrors that fail like slow networks. The old k3s is kept until the new one is verified. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { cp, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { after, beforeEach, test } from "node:test";
import { standIn } from "../stand-in/pack.ts";
import { bench, MODERN, mirrored, OLD, script, state, untouched } from "./suite.ts";

const t = await bench({ name: "mirrors", boxes: ["a1"] });
after(() => t.lab.down());
const a1 = t.box("a1");
const { github, plain } = t.lab.mirror;
const third = plain.replace("203.0.113.81", "203.0.113.82");
const FILE = `/k3s-io/k3s/releases/download/${MODERN}/k3s`;
const SUMS = FILE.replace(/k3s$/, "sha256sum-amd64.txt");
const sha256 = (text: string) => createHash("sha256").update(text).digest("hex");
const GOOD = sha256(standIn(MODERN));
const download = script("download-k3s", "--host a1");

/** The files in /usr/local/bin, and the version of the k3s there. */
const inPlace = async () => ({
  files: (await a1.sh("ls -A /usr/local/bin")).trim().split("\n"),
  version: (await a1.sh("k3s --version")).split(" ")[2]?.trim(),
});
const NEW = { files: ["k3s", "kubectl"], version: MODERN };

/** A complete line of the mirror's log. */
const line = (base: string, path: string, range: string, status: number) =>
  `${new URL(base).hostname} GET ${path} ${range} ${status}`;

beforeEach(async () => {
  for (const base of [plain, github]) await t.lab.mirror.fault(base, { mode: "none" });
  await a1.sh("rm -rf /usr/local/bin/* /usr/local/bin/.k3s*");
  t.settings({}, { agents: "" });
});

/** An older k3s, as an earlier run left it. */
async function older() {
  const file = join(t.lab.dir, "home", "older");
  await writeFile(file, standIn(OLD));
  await t.ok("ssh a1 'cat >/usr/local/bin/k3s && chmod 755 /usr/local/bin/k3s' <$HOME/older");
  await a1.sh("ln -s k3s /usr/local/bin/kubectl");
}

test("the binary comes from the first mirror, its checksum from the other", async () => {
  const requests = await t.requests(() => t.ok(download));
  assert.deepEqual(requests, [line(github, SUMS, "-", 200), line(plain, FILE, "-", 200)]);
  assert.deepEqual(await inPlace(), NEW);
  assert.equal(
    (await a1.sh("stat -c '%a %U' /usr/local/bin/k3s; readlink /usr/local/bin/kubectl")).trim(),
    "755 root\nk3s",
  );
});

test("the next mirror is used if one is down", async () => {
  await t.lab.mirror.fault(plain, { mode: "down" });
  // The other one cannot verify itself: a third host must.
  await cp(mirrored(t.lab, "203.0.113.81", "."), mirrored(t.lab, "203.0.113.82", "."), { recursive: true });
  const { seconds } = await t.ok(`${download} --k3s-mirrors "${t.mirrors} ${third}"`);
  assert(seconds < 30, `${seconds} s`);
  assert.deepEqual(await inPlace(), NEW);
});

test("the next mirror is used if one answers with an error", async () => {
  await t.lab.mirror.fault(plain, { mode: "status", bytes: 503, only: "/k3s" });
  await t.says(download, 0, [`${plain}: gave up at 0 bytes`]);
  assert.deepEqual(await inPlace(), NEW);
});

test("mirrors that hang or are very slow are abandoned after a time limit, and the next one resumes", async () => {
  await t.lab.mirror.fault(plain, { mode: "hang", only: "/k3s" });
  await t.lab.mirror.fault(github, { mode: "slow", bytes: 8192, only: "/k3s" });
  let took = 0;
  const requests = await t.requests(async () => {
    const said = await t.says(`${download} --k3s-mirrors "${t.mirrors} ${third}"`, 0, [
      `${plain}: gave up at 0 bytes`,
      /203\.0\.113\.80.*: gave up at [1-9]\d+ bytes/,
    ]);
    took = said.seconds;
  });
  // Fifteen seconds each, within which a mirror must become faster.
  assert(took > 25 && took < 75, `${took} s`);
  const resumed = requests.at(-1) as string;
  assert.match(resumed, /^203\.0\.113\.82 GET \S+\/k3s bytes=[1-9]\d+- 206$/);
  assert.deepEqual(await inPlace(), NEW);
});

test("the next mirror resumes an interrupted download", async () => {
  await t.lab.mirror.fault(plain, { mode: "cut", bytes: 1_000_000, only: "/k3s" });
  const requests = await t.requests(() => t.says(download, 0, [`${plain}: gave up at 1000000 bytes`]));
  assert(requests.includes(line(github, FILE, "bytes=1000000-", 206)), requests.join("\n"));
  assert.deepEqual(await inPlace(), NEW);
});

test("a download that all mirrors interrupt fails and keeps the old k3s, and the next run resumes it", async () => {
  await older();
  for (const base of [plain, github])
    await t.lab.mirror.fault(base, { mode: "cut", bytes: 700_000, only: "/k3s" });
  await t.says(download, 1, [
    `a1  FAILED after`,
    `download k3s ${MODERN} in place of ${OLD}`,
    "No mirror gave a good binary. What came is kept: run the same again, or give K3S_BIN.",
    "again: make download-k3s HOST=a1",
  ]);
  assert.equal((await inPlace()).version, OLD);
  for (const base of [plain, github]) await t.lab.mirror.fault(base, { mode: "none" });
  const requests = await t.requests(() => t.ok(download));
  assert(requests.includes(line(plain, FILE, "bytes=1400000-", 206)), requests.join("\n"));
  assert.deepEqual(await inPlace(), NEW);
});

test("a corrupt download is reported with both hashes, and the next mirror is used", async () => {
  await t.lab.mirror.fault(plain, { mode: "corrupt", bytes: 2_000_000, only: "/k3s" });
  const { text } = await t.ok(`${download} --k3s-mirrors "${t.mirrors}"`);
  assert.deepEqual(await inPlace(), NEW);
  assert.equal((await a1.sh("sha256sum </usr/local/bin/k3s")).slice(0, 64), GOOD);
  assert.match(text, new RegExp(`^a1 .*203\\.0\\.113\\.81.*: sha256 is [0-9a-f]{64}, expected ${GOOD}`, "m"));
});

test("a download that is corrupt at all mirrors fails with both hashes, and the old k3s is kept", async () => {
  await older();
  const before = await a1.sh("sha256sum /usr/local/bin/k3s; stat -c %Y /usr/local/bin/k3s");
  for (const base of [plain, github])
    await t.lab.mirror.fault(base, { mode: "corrupt", bytes: 5000, only: "/k3s" });
  const bad = Buffer.from(standIn(MODERN));
  bad[5000] = (bad[5000] as number) ^ 0xff;
  const hash = createHash("sha256").update(bad).digest("hex");
  await t.says(download, 1, [
    `${plain}: sha256 is ${hash}, expected ${GOOD}`,
    `${github}: sha256 is ${hash}, expected ${GOOD}`,
    "again: make download-k3s HOST=a1",
  ]);
  assert.deepEqual(await inPlace(), { files: ["k3s", "kubectl"], version: OLD });
  assert.equal(await a1.sh("sha256sum /usr/local/bin/k3s; stat -c %Y /usr/local/bin/k3s"), before);
});

test("a binary with the right hash that does not run is not installed", async () => {
  await older();
  const broken = join(t.lab.dir, "home", "broken");
  await writeFile(broken, "#!/bin/sh\necho 'no such instruction' >&2\nexit 132\n");
  await t.says(`${download} --k3s-bin $HOME/broken`, 1, ["the new binary does not run here"]);
  assert.equal((await inPlace()).version, OLD);
});

test("with a single mirror the binary is refused, unless K3S_SHA256 verifies it", async () => {
  const alone = `${download} --k3s-mirrors ${plain}`;
  await t.says(alone, 1, [`${plain}: no other host gave its checksum`, "set K3S_SHA256"]);
  assert.equal(await a1.sh("ls -A /usr/local/bin"), "");
  const wrong = sha256("something else");
  await t.says(`${alone} --k3s-sha256 ${wrong}`, 1, [`sha256 is ${GOOD}, expected ${wrong}`]);
  assert.equal(await a1.sh("ls -A /usr/local/bin"), "");
  const requests = await t.requests(() => t.ok(`${alone} --k3s-sha256 ${GOOD}`));
  assert.deepEqual(requests, [line(plain, FILE, "-", 200)]);
  assert.deepEqual(await inPlace(), NEW);
});

test("two addresses of one host do not verify each other", async () => {
  const same = `${plain} ${plain.replace("http://203.0.113.81/", "http://203.0.113.81:80/")}`;
  await t.says(`${download} --k3s-mirrors "${same}"`, 1, ["no other host gave its checksum"]);
});

test("a mirror with an untrusted certificate receives no request", async () => {
  const key = join(t.lab.dir, "home", "tls");
  await t.lab.net(
    "inet",
    `openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=203.0.113.81 -addext subjectAltName=IP:203.0.113.81 \
  -keyout ${key}.key -out ${key}.crt 2>/dev/null
cd ${mirrored(t.lab, "203.0.113.81", ".")}
openssl s_server -accept 203.0.113.81:443 -cert ${key}.crt -key ${key}.key -WWW </dev/null >${key}.log 2>&1 &`,
  );
  const https = plain.replace("http:", "https:");
  await t.says(`${download} --k3s-mirrors ${https} --k3s-sha256 ${GOOD}`, 1, ["SSL certificate problem"]);
  assert.equal(await a1.sh("ls -A /usr/local/bin"), "");
  assert.doesNotMatch(readFileSync(`${key}.log`, "utf8"), /FILE:/);
  // It would have served a client that does not verify the certificate.
  await writeFile(mirrored(t.lab, "203.0.113.81", "here.txt"), "here");
  assert.match(await a1.sh("curl -sk https://203.0.113.81/here.txt || :"), /here/);
});

test("K3S_BIN is pushed without any mirror, and not again if it is installed", async () => {
  await writeFile(join(t.lab.dir, "home", "k3s"), standIn(MODERN));
  const requests = await t.requests(() => t.ok("make download-k3s HOST=a1 K3S_BIN=$HOME/k3s"));
  assert.deepEqual(requests, []);
  assert.deepEqual(await inPlace(), NEW);
  let before = "";
  const trips = await t.trips(["a1"], async () => {
    before = await state(a1);
    await t.says("make download-k3s HOST=a1 K3S_BIN=$HOME/k3s", 0, [/^a1 +nothing to do$/m]);
  });
  await untouched([a1], [before]);
  assert.deepEqual(trips, { a1: { commands: 1, logins: 1 } });
});

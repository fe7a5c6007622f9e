/**
 * The server is lost while nobody looks: it has backed itself up and looked after the cluster, and another box takes its
 * place, with the newest copy (`make promote`).
 */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import type { Box } from "./lab.ts";
import { bench, door, MODERN, nodes, routerRule } from "./suite.ts";

const t = await bench({ name: "promote", boxes: ["a1", "b1", "b2", "h1", "h2"], tools: true });
after(() => t.lab.down());
const [a1, b1, b2, h1, phone] = [t.box("a1"), t.box("b1"), t.box("b2"), t.box("h1"), t.box("h2")];
const CLUSTER = ["b1", "b2", "h1"];
const AGENTS = "b1 b2 h1=nat";

const ready = async (server: Box) =>
  Object.entries(await nodes(server)).map(([name, { ready }]) => `${name} ${ready}`);

/** Gives the device its configuration anew. It asks a pod of each node by the service. */
async function turnOn() {
  const text = readFileSync(join(t.lab.dir, "home/devices/phone.conf"), "utf8");
  t.secret(/^PrivateKey = (\S+)$/m.exec(text)?.[1] as string);
  await phone.sh(`umask 077; mkdir -p /etc/wireguard; wg-quick down phone 2>/dev/null || :
cat >/etc/wireguard/phone.conf <<'END'
${text.replace(/^(DNS|PostUp|PostDown) = .*\n/gm, "")}
END
wg-quick up phone 2>&1`);
  for (const end = Date.now() + 30_000; ; await sleep(500)) {
    const said = (await phone.sh("curl -s --max-time 2 http://10.43.0.80 || :")).trim();
    if (/^(a1|b1|b2|h1)$/.test(said)) return;
    assert(Date.now() < end, `the device is answered "${said}"`);
  }
}

/** Nothing of the cluster has changed: k3s runs on, and is enabled, where it did. */
const units = async () =>
  Promise.all(
    [b1, b2, h1].map((box) =>
      box.sh("systemctl show k3s k3s-agent -p MainPID -p UnitFileState; ls /var/lib/rancher/k3s"),
    ),
  );

let told = "";
before(async () => {
  await b2.sh(
    `systemd-run -q --unit=hook /opt/k3s-stand-in/node -e 'require("node:http").createServer((request, response) => response.end("ok")).listen(80)'`,
  );
  const own = { BACKUP_EVERY: "1h", BACKUP_TO: "b2", NOTIFY_URL: `http://${b2.publicIp}/told` };
  t.settings({ K3S_VERSION: MODERN, ...own }, { agents: AGENTS });
  await t.ok("make -j up");
  await t.ok("make watch");
  await t.ok("make device NAME=phone");
  await t.ok("make kubeconfig USE=1");
  await turnOn();
  await t.ok("make backup");
  // What is left is the copy that the server has sent to b2.
  await t.ok("rm ~/k3s-a1-*.tar.gz");
  told = t.env().K3S_TOKEN as string;
});

describe("a promotion", () => {
  test("is refused while the old server answers, by its ssh or its API, with nothing touched", async () => {
    const before = await units();
    const refused = async (...by: RegExp[]) =>
      await t.says("make promote HOST=b1", 2, [/^b1 +FAILED .*a1, the server, still answers/m, ...by]);
    await refused(
      /its ssh;.*its API, asked from here;.*asked by b1;.*asked by b2/,
      /FORCE=1 stops k3s there/,
    );
    await a1.sh("systemctl stop ssh.socket ssh");
    const open = await routerRule(t.lab, "a", "forward", "ip saddr 203.0.113.254 drop");
    const { text } = await refused(/answers \(its API, asked by b1;/);
    assert.doesNotMatch(text, /its ssh;|from here/);
    await open();
    await a1.sh("systemctl start ssh");
    await t.says("make promote HOST=h1", 2, [/expected a server's public address, not nat/]);
    await t.says("make promote HOST=a1", 2, [/HOST is a1, which is SERVER already/]);
    await t.says("make promote HOST=b1 K3S_DATASTORE_ENDPOINT=postgres://u:p@203.0.113.9/k3s", 2, [
      /put another of its servers first in SERVER/,
    ]);
    assert.deepEqual(await units(), before);
  });

  test("is refused while the env file has settings for the lost server alone, which it names", async () => {
    const before = await units();
    const { K3S_TOKEN, SERVER, AGENTS: agents, ...rest } = t.env();
    const with_ = (more: Record<string, string>) =>
      t.settings({ ...rest, K3S_TOKEN: K3S_TOKEN as string, ...more }, { server: SERVER, agents });
    with_({ SERVER_ARGS__a1: "--disable=traefik" });
    await t.says("make promote HOST=b1", 2, [
      /SERVER_ARGS__a1 \(\S+\.env line \d+\): a1 is lost: expected .*…__b1/,
    ]);
    with_({});
    assert.deepEqual(await units(), before);
  });

  test("shows what it would do", async () => {
    await a1.off();
    const before = await units();
    await t.says("make promote HOST=b1 DRY=1", 0, [
      /^b1 +takes k3s-a1-\S+\.tar\.gz\.cms, made /m,
      /^b1: 2 to do\n.*check the backup on the box.*\n.*stop k3s-agent/m,
      /then: b1 is the server, with a new token, is watched, backs itself up; devices, /,
    ]);
    assert.deepEqual(await units(), before);
  });

  test("begins when the box is there again, and is completed after a power cut of it, and of the operator", async () => {
    const before = await units();
    await b1.off();
    await t.says("make promote HOST=b1", 2, [/^b1 +FAILED .*Could not reach b1/m]);
    await b1.on();
    assert.deepEqual(
      (await units()).map((text) => text.replace(/MainPID=\d+/g, "")),
      before.map((text) => text.replace(/MainPID=\d+/g, "")),
    );
    // As if it had been removed and had joined again since the backup.
    await b1.sh("openssl rand -hex 16 >/etc/rancher/node/password");
    await b1.sh(
      "mkdir -p /var/lib/rancher/k3s/storage/pvc-1; echo mine >/var/lib/rancher/k3s/storage/pvc-1/file",
    );

    for (const at of [/b1 +stop k3s-agent/, /b1 +start k3s and wait/, /b1 +rotate the token/]) {
      const run = await t.cut("make promote HOST=b1", at, "KILL");
      assert(run.reached, run.text);
      await b1.off();
      await b1.on();
    }
    assert.equal(t.env().SERVER, "b1");
    await t.says("make promote HOST=b1", 0, [/all nodes are Ready, \d+ s after the command/]);
  });

  test("brings agents, home nodes, devices and the kubeconfig along, and leaves pods their local volumes", async () => {
    assert.deepEqual(
      await ready(b1),
      CLUSTER.map((name) => `${name} true`),
    );
    const { SERVER, AGENTS: agents, K3S_URL, K3S_TOKEN = "" } = t.env();
    assert.deepEqual([SERVER, agents, K3S_URL], ["b1", "b2 h1=nat", "https://198.51.101.11:6443"]);
    assert.notEqual(K3S_TOKEN, told);
    assert.deepEqual([await door(b1, told), await door(b1, K3S_TOKEN)], ["401", "200"]);
    assert.equal(await b1.sh("cat /var/lib/rancher/k3s/storage/pvc-1/file"), "mine\n");
    await t.says(
      "make -j up",
      0,
      CLUSTER.map((name) => new RegExp(`^${name} +nothing to do`, "m")),
    );
    assert.equal(await b1.sh("systemctl is-active k3s-watch.timer"), "active\n");
    assert.match(
      await b2.sh("ls /var/lib/k3s-backups; ! grep -h k3s-backup /root/.ssh/authorized_keys | grep a1"),
      /^k3s-b1-/m,
    );
    await t.says("make check", 0, [/Nothing is wrong/]);
    const config = (await t.op("cat ~/.kube/config")).out;
    assert.match(config, /^current-context: k3s-198\.51\.101\.11$/m);
    assert.doesNotMatch(config, /198\.51\.100\.11/);
    await t.ok("make device NAME=phone");
    await turnOn();
    await t.says("make promote HOST=b1", 0, [/the cluster is up to date/]);
  });

  test("leaves a server whose own copies a drill proves, and whose agents' certificates are renewed before they end", async () => {
    await t.ok(
      `mount -t tmpfs tmpfs /opt; mkdir /opt/k3s-stand-in; mount --bind ${t.lab.dir}/stand-in /opt/k3s-stand-in`,
    );
    await t.says("make drill HOST=", 0, [
      /proves .*k3s-b1-/,
      /nodes (\d+) of \1, deployments (\d+) of \2, secrets (\d+) of \3$/m,
    ]);
    await t.ok("umount /opt/k3s-stand-in /opt");
    await b1.sh("echo 20 >/run/stand-in-certificate-days");
    await b2.sh(`systemctl restart k3s-agent
while openssl x509 -in /var/lib/rancher/k3s/agent/client-kubelet.crt -noout -checkend ${30 * 86_400} >/dev/null; do sleep 0.2; done`);
    await b1.sh("rm /run/stand-in-certificate-days");
    await t.says("make check", 2, [/^b2: its certificates end on .*\n +do: make certs$/m]);
    await t.says("make certs", 0, [/^b1 +nothing to do/m, /^b2 +restart k3s-agent/m]);
    await t.says("make check", 0, [/Nothing is wrong/]);
  });

  test("fences the old server: when it is back, nobody follows it, and it joins nothing", async () => {
    const before = (await units()).join();
    await a1.on();
    for (const end = Date.now() + 30_000; Date.now() < end; await sleep(1000))
      if ((await a1.sh("k3s kubectl get nodes 2>/dev/null || :")).includes("b2")) break;
    for (let i = 0; i < 10; i++, await sleep(1000))
      assert.deepEqual(
        await ready(b1),
        CLUSTER.map((name) => `${name} true`),
      );
    assert.equal((await units()).join(), before, "no k3s was started again");
    for (const box of [b2, h1])
      assert.equal(
        await box.sh("ss -Htn dst 198.51.100.11; wg show flannel-wg endpoints | grep 198.51.100.11 || :"),
        "",
      );
    const refusal = /This box runs k3s, or is set up to: it cannot be k3s-agent as well; make remove/;
    await t.says("make agent HOST=a1", 2, [refusal]);
    await t.says(`make -j up AGENTS="${t.env().AGENTS} a1"`, 2, [refusal, /up to date, except a1/]);
    await t.says("make check", 0, [/Nothing is wrong/]);
    await t.says("make remove HOST=a1", 2, ["FORCE=1 removes it"]);
    await t.ok("make remove HOST=a1 FORCE=1");
    await t.ok("make agent HOST=a1");
    assert.deepEqual(
      await ready(b1),
      ["a1", ...CLUSTER].map((name) => `${name} true`),
    );
  });

  test("of a box without k3s stops the old server first with FORCE=1", async () => {
    await t.ok("make remove HOST=a1");
    await t.ok("make backup");
    await t.says("make promote HOST=a1 FORCE=1", 0, [/^a1 +stop k3s on b1, and disable it there/m]);
    assert.deepEqual(await ready(a1), ["a1 true", "b2 true", "h1 true"]);
    assert.match(
      await b1.sh("systemctl is-active k3s || :; systemctl is-enabled k3s || :"),
      /inactive\ndisabled/,
    );
    assert.deepEqual([t.env().SERVER, t.env().AGENTS], ["a1", "b2 h1=nat"]);
  });
});

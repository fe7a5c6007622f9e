/** The operation of a cluster: what each command does, that a second run changes nothing, and that an interrupted one is completed. */
import assert from "node:assert/strict";
import { statSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import type { Box } from "./lab.ts";
import { bench, connected, door, MODERN, nodes, OLD, release, routerRule, soon, starts } from "./suite.ts";

const t = await bench({ name: "living", boxes: ["a1", "a2", "b1", "b2"], tools: true });
after(() => t.lab.down());
const [a1, a2, b1, b2] = [t.box("a1"), t.box("a2"), t.box("b1"), t.box("b2")];

/** What must be the same at the end as at the beginning. iptables-nft keeps empty tables. */
const traces = async ({ sh }: Box) =>
  (
    await sh(`find /etc /usr/local /var/lib /var/log -xdev -printf '%p %y %m %u %l\\n' |
  grep -vE '^/var/(lib/systemd|log/journal|log/[bw]tmp|log/lastlog)'
find /etc /usr/local -xdev -type f -exec sha256sum {} +
ip -4 -o addr | sed 's/^[0-9]*: //'
ls /sys/class/net
for family in iptables ip6tables; do $family-save | grep -E '^-|^:[^ ]+ (-|DROP)' || true; done
nft list tables | grep -vE '^table ip6? (filter|nat|mangle)$' || true
for folder in /run/netns /run/k3s /run/flannel; do ls -A $folder 2>/dev/null || true; done
cut -d' ' -f2 /proc/self/mounts | grep -v '^/run/netns$'
ps -e -o comm= | grep -vE '^(sshd|sh|ps|grep|sort|sed|systemd.*|dbus-.*|agetty|\\(sd-pam\\))$' || true
systemctl list-unit-files --no-legend | grep k3s || true
systemctl --failed --no-legend --plain`)
  )
    .split("\n")
    .sort();

function same(now: string[], then: string[], what: string) {
  const more = now.filter((line) => !then.includes(line)).map((line) => `+ ${line}`);
  const less = then.filter((line) => !now.includes(line)).map((line) => `- ${line}`);
  assert.equal([...more, ...less].join("\n"), "", what);
}

const NEXT = "v1.18.20+k3s1";
let beginning: string[][];
/** Every box is as it was at the beginning. */
const clean = async (boxes: Box[]) => {
  for (const box of boxes)
    same(
      await traces(box),
      beginning[t.lab.boxes.findIndex((b) => b.name === box.name)] as string[],
      box.name,
    );
};

const versions = async (server: Box) =>
  (await server.sh("kubectl get nodes --no-headers | awk '{ print $1, $2, $NF }'")).trim().split("\n");

before(async () => {
  t.settings({ K3S_VERSION: OLD });
  // The user's own rules and interfaces are kept.
  await b2.sh(`iptables -A INPUT -p tcp --dport 9999 -j ACCEPT; iptables -t nat -N MINE
nft add table inet mine; nft add chain inet mine in '{ type filter hook input priority 0; policy accept; }'
ip link add mine0 type bridge`);
  beginning = await Promise.all(t.lab.boxes.map(traces));
  await release(t.lab, NEXT);
  await t.ok("make -j up");
});

test("check reports no problem in a new cluster", async () => {
  await t.says("make check", 0, ["Nothing is wrong."]);
});

test("make token refuses old k3s, which cannot rotate its token, with the reason", async () => {
  await t.says("make token", 2, ["k3s v1.17.6+k3s1 cannot rotate its token: that came with v1.25.15"]);
});

const early = join(t.lab.dir, "home/early.tar.gz");
test("make backup works with old k3s", async () => {
  assert.equal((await t.ok(`make backup BACKUP=${early}`)).out.trim(), early);
});

describe("make certs", () => {
  /** What a1 signs meanwhile ends in 20 days. */
  const short = async (work: () => Promise<unknown>) => {
    await a1.sh("echo 20 >/run/stand-in-certificate-days");
    await work();
    await a1.sh("rm /run/stand-in-certificate-days");
  };
  const ends = (file: string) =>
    `! openssl x509 -in /var/lib/rancher/k3s/${file} -noout -checkend ${30 * 86_400} >/dev/null`;

  test("renews an agent's certificates, which check names, and restarts no other node", async () => {
    await short(() =>
      b1.sh(
        `systemctl restart k3s-agent; until ${ends("agent/serving-kubelet.crt")} && ${ends("agent/client-kubelet.crt")}; do sleep 0.2; done`,
      ),
    );
    await t.says("make check", 2, [
      /^b1: its certificates end on \S+, in (19|20) days.*\n +do: make certs$/m,
    ]);
    const before = await Promise.all([a1, b2].map(starts));
    await t.says("make certs", 0, [
      /^a1 +nothing to do: its certificates end on/m,
      /^b1 +restart k3s-agent and wait until node b1 is Ready .*certificates end on/m,
      /^b2 +nothing to do/m,
    ]);
    assert.deepEqual(await Promise.all([a1, b2].map(starts)), before);
    await t.says("make certs", 0, [/^b1 +nothing to do/m]);
    await t.says("make check", 0, ["Nothing is wrong."]);
  });

  test("renews the certificate of 6443, which a restart of old k3s does not, even after an interruption", async () => {
    await short(() =>
      a1.sh(`kubectl -n kube-system delete secret k3s-serving
rm /var/lib/rancher/k3s/server/tls/dynamic-cert.json
systemctl restart k3s; until kubectl get nodes >/dev/null 2>&1; do sleep 0.5; done`),
    );
    const end = () =>
      a1.sh(
        "echo | openssl s_client -connect 127.0.0.1:6443 2>/dev/null | openssl x509 -noout -checkend 2592000 || true",
      );
    assert.match(await end(), /will expire/);
    await a1.sh("systemctl restart k3s; until kubectl get nodes >/dev/null 2>&1; do sleep 0.5; done");
    assert.match(await end(), /will expire/);
    await t.says("make status", 2, [/^server +.*its certificates end on \S+, in (19|20) days: make certs$/m]);
    await t.cutThenDone("make certs", /a1 +delete the secret k3s-serving/);
    assert.match(await end(), /will not expire/);
    // The run that was cut would have waited for the handshakes.
    await soon(() => connected([a1, b1, b2]));
  });
});

describe("make upgrade", () => {
  test("refuses a jump, with the intermediate releases, and its dry run shows the removed and added lines of a unit", async () => {
    await t.says(`make upgrade K3S_VERSION=${MODERN}`, 2, [
      /STEPS="v1\.18\.20\+k3s1 v1\.19\.\S+ .* v1\.35\.\S+"/,
    ]);
    const { out } = await t.ok(`make upgrade K3S_VERSION=${MODERN} FORCE=1 DRY=1`);
    assert.match(out, /^a1: 1 to do\n {2}1\. drain node b1/m);
    assert.match(out, /^ {7}- --flannel-backend=wireguard\n {7}\+ --flannel-backend=wireguard-native$/m);
    assert.deepEqual(await versions(a1), [`a1 Ready ${OLD}`, `b1 Ready ${OLD}`, `b2 Ready ${OLD}`]);
  });

  test("stops at the first node that fails, which then runs its previous release again", async () => {
    await t.says(`make upgrade K3S_VERSION=${NEXT} AGENT_ARGS=--nonsense`, 2, [
      /^a1 +done in .*: runs v1\.18\.20\+k3s1$/m,
      /^b1 +FAILED after .*The upgrade ends here; b1 runs v1\.17\.6\+k3s1 again$/m,
      /^b1 +cause: b1: SERVER_ARGS or AGENT_ARGS has --nonsense/m,
      /^b1 +again: make upgrade K3S_VERSION=\S+ AGENT_ARGS=--nonsense/m,
    ]);
    assert.deepEqual(await versions(a1), [`a1 Ready ${NEXT}`, `b1 Ready ${OLD}`, `b2 Ready ${OLD}`]);
    assert.equal(t.env().K3S_VERSION, NEXT);
    assert.doesNotMatch(await b1.sh("cat /etc/systemd/system/k3s-agent.service"), /nonsense/);
  });

  test("upgrades through STEPS to the other generation, even after an interruption, and verifies the tunnels", async () => {
    const command = `make upgrade K3S_VERSION=${MODERN} STEPS=${NEXT} FORCE=1`;
    const text = await t.cutThenDone(command, /b1 +restart k3s-agent and wait/);
    assert.match(text, /^b2 +done in .*: runs v1\.18\.20\+k3s1\n(.*\n)*a1 +drain node a1/m);
    assert.deepEqual(
      await versions(a1),
      ["a1", "b1", "b2"].map((name) => `${name} Ready ${MODERN}`),
    );
    assert.equal(t.env().K3S_VERSION, MODERN);
    await t.says("make check", 0, ["Nothing is wrong."]);
    // What only old k3s needed is removed: metrics without TLS, and bridges with a larger MTU than the tunnel.
    assert.doesNotMatch(await a1.sh("kubectl -n kube-system get pods -o json"), /--kubelet-insecure-tls/);
    assert.equal(
      (
        await a1.sh(`cd /var/lib/rancher/k3s/server/manifests && find . -name '*across*' -o -name '*.skip'`)
      ).trim(),
      "",
    );
    assert.match(await a1.sh("kubectl top nodes --no-headers"), /^a1 .*\nb1 .*\nb2 .*\n$/);
    for (const box of [a1, b1, b2]) {
      assert.equal((await box.sh("wg show interfaces")).trim(), "flannel-wg", box.name);
      assert.equal(
        await box.sh("cat /sys/class/net/cni0/mtu"),
        await box.sh("cat /sys/class/net/flannel-wg/mtu"),
      );
      assert.equal(
        await box.sh("ls -A /var/lib/rancher/k3s/before /usr/local/bin/.k3s* 2>/dev/null || true"),
        "",
      );
    }
    await connected([a1, b1, b2]);
    await t.says(`make upgrade K3S_VERSION=v1.36.1+k3s1`, 2, ["a way back to v1.36.1+k3s1 is not safe"]);
  });
});

describe("make remove", () => {
  test("restores a box to its state before k3s and deletes its node, and the box can join again with a new name", async () => {
    await t.says("make remove HOST=a1", 2, ['"make down" removes a whole cluster']);
    await t.ok("make firewall HOST=b2");
    await t.cutThenDone("make remove HOST=b2", /b2 +stop k3s-agent, and clear/);
    await clean([b2]);
    assert.deepEqual(Object.keys(await nodes(a1)), ["a1", "b1"]);
    assert.doesNotMatch(await a1.sh("kubectl -n kube-system get secrets -o name"), /b2/);
    await b2.sh("hostname b9");
    await t.ok("make agent HOST=b2");
    assert.deepEqual(Object.keys(await nodes(a1)), ["a1", "b1", "b9"]);
    await connected([a1, b1, b2]);
  });

  test("deletes the node of a box that was reinstalled, which can then join with its old name", async () => {
    await b2.sh(
      `systemctl disable --now k3s-agent; rm -rf /etc/systemd/system/k3s-agent.service* /etc/rancher`,
    );
    await t.says("make agent HOST=b2", 2, ['reinstalled, run "make remove HOST=b2" first']);
    await t.ok("make remove HOST=b2");
    await b2.sh("hostname b2");
    await t.ok("make agent HOST=b2");
    await connected([a1, b1, b2]);
  });

  test("deletes the node of a box that is gone with FORCE=1", async () => {
    const mend = await routerRule(
      t.lab,
      "b",
      "ports",
      "ip daddr 192.168.0.12 tcp dport 22 reject with tcp reset",
    );
    await t.says("make remove HOST=b2", 2, ["Could not reach b2", "FORCE=1 removes its node alone"]);
    await t.ok("make remove HOST=b2 FORCE=1");
    await mend();
    assert.deepEqual(Object.keys(await nodes(a1)), ["a1", "b1"]);
    await t.ok("make remove HOST=b2");
    await clean([b2]);
    await t.ok("make agent HOST=b2");
  });
});

test("make token keeps nodes running, invalidates the old token, and reads the token of an interrupted rotation", async () => {
  const before = t.env().K3S_TOKEN as string;
  const started = await Promise.all([a1, b1, b2].map(starts));
  const run = await t.cut("make token", /rotate the token/, "KILL");
  assert(run.reached, run.text);
  await t.says("make token", 0, ["the env file has the server's present token"]);
  const between = t.env().K3S_TOKEN as string;
  assert.notEqual(between, before);
  await t.ok("make token");
  const now = t.env().K3S_TOKEN as string;
  assert.notEqual(now, between);
  assert.equal(now, (await a1.sh("cat /var/lib/rancher/k3s/server/node-token")).trim());
  const doors = await Promise.all([before, between, now].map((token) => door(a1, token)));
  assert.deepEqual(doors, ["401", "401", "200"]);
  // Each rotation restarts the server, which reads its passwords at its start, but not the agents.
  const [server = 0, ...agents] = started;
  assert.deepEqual(await Promise.all([a1, b1, b2].map(starts)), [server + 2, ...agents]);
  await connected([a1, b1, b2]);
  await t.ok("make -j up");
  await t.says("make -j up", 0, [/^b1 +nothing to do/m, /^b2 +nothing to do/m]);
});

test("make server undoes a rotation of the token that a power cut has torn apart", async () => {
  const before = t.env().K3S_TOKEN as string;
  await a1.sh("touch /run/stand-in-dies-rotating");
  await t.says("make token", 2, [/^a1 +FAILED .*rotate the token/m]);
  await a1.sh("rm /run/stand-in-dies-rotating");
  await t.says("make token", 2, [/encrypted with different token/, /do: .*"make server", which undoes/]);
  await t.says("make server", 0, [/^a1 +start k3s with the token of an interrupted rotation/m]);
  assert.deepEqual([t.env().K3S_TOKEN, await door(a1, before)], [before, "200"]);
  await t.ok("make token");
  assert.equal(await a1.sh("ls /var/lib/rancher/k3s/server | grep rotation || :"), "");
  await t.ok("make -j up");
});

describe("with backup and restore,", () => {
  const file = () => join(t.lab.dir, "home/backup.tar.gz");

  test("a backup of a busy server is complete, readable by its owner only, and does not stop k3s", async () => {
    const started = await starts(a1);
    const writer = a1.sh(`for n in $(seq 1 200); do
  [ -e /run/enough ] && exit; kubectl annotate --overwrite node a1 written=$n >/dev/null; echo $n >/run/written; done`);
    const run = await t.cut(`make backup BACKUP=${file()}`, /copy the datastore/, "KILL");
    assert(run.reached, run.text);
    const { out } = await t.ok(`make backup BACKUP=${file()}`);
    await a1.sh(": >/run/enough");
    await writer;
    assert.equal(out.trim(), file());
    assert.equal(statSync(file()).mode & 0o777, 0o600);
    assert.equal(await starts(a1), started);
    assert.match(
      await a1.sh("sed -n 's/^State:.//p' /proc/$(systemctl show k3s -p MainPID --value)/status"),
      /^[SR]/,
    );
    assert.equal(await a1.sh("ls /var/lib/rancher/k3s | grep backup || true"), "");
  });

  test("a restore makes a new box the server, moves the agents to it, and deletes the old server's node", async () => {
    // As if it had been removed and had joined again since: its password differs from the backup's.
    await b2.sh("openssl rand -hex 16 >/etc/rancher/node/password");
    // The agents' firewalls allow only the old server, and the new server's does not allow all agents.
    await t.ok('make firewall HOST="b1 b2"');
    await t.ok("make firewall HOST=a2 AGENTS=b1");
    await a1.off();
    await t.says(`make restore BACKUP=${file()} HOST=b1`, 2, ["HOST is b1, which is one of AGENTS"]);
    await t.says(`make restore BACKUP=${file()} HOST=b1 AGENTS=b2`, 2, ["This box runs k3s-agent"]);
    await t.cutThenDone(`make restore BACKUP=${file()} HOST=a2`, /a2 +start k3s and wait/);
    assert.deepEqual(Object.keys(await nodes(a2)), ["a2", "b1", "b2"]);
    await connected([a2, b1, b2]);
    assert.equal(t.env().SERVER, "a2");
    assert.equal(t.env().K3S_URL, "https://198.51.100.12:6443");
    await t.says("make -j up", 0, [/^a2 +nothing to do/m]);
    for (const box of [a2, b1, b2])
      assert.match(
        await box.sh("nft list set inet k3s_across_clouds nodes | tr -d '\\n\\t'"),
        /elements = \{ 198\.51\.100\.12, 198\.51\.101\.11, *198\.51\.101\.12 \}/,
        box.name,
      );
    const written = await a2.sh("kubectl get nodes -o json | grep -c written || true");
    assert.equal(written.trim(), "0", "the old server's node is gone, with what was written to it");
  });

  test("the box of the old server can be removed with FORCE=1 when it is back", async () => {
    await a1.on();
    await t.says("make remove HOST=a1", 2, ["a server's data, with the same CA", "FORCE=1 removes it"]);
    await t.ok("make remove HOST=a1 FORCE=1");
    await clean([a1]);
    await connected([a2, b1, b2]);
  });
});

test("make down asks first, and restores every box to its initial state", async () => {
  await t.says("make down", 2, ["This removes a whole cluster, and asks first"]);
  await t.cutThenDone("make down YES=1", /b2 +stop k3s-agent, and clear/);
  await clean(t.lab.boxes);
});

test("a backup of old k3s can be restored to a cluster on new boxes", async () => {
  await t.ok(`make restore BACKUP=${early} HOST=a2 K3S_VERSION=${OLD}`);
  assert.deepEqual(
    await versions(a2),
    ["a2", "b1", "b2"].map((name) => `${name} Ready ${OLD}`),
  );
  await connected([a2, b1, b2]);
  await t.says("make -j up", 0, [/^a2 +nothing to do/m]);
  await t.ok("make down YES=1");
  await clean(t.lab.boxes);
});

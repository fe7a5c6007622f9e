/** Boxes without a public address, behind routers that let nothing in, as nodes of a cluster in two clouds. */
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import type { Box } from "./lab.ts";
import { bench, envOnBox, install, MODERN, nodes, OLD, onBox, release, routerRule } from "./suite.ts";

const t = await bench({ name: "home", boxes: ["a1", "a2", "b1", "h1", "h2", "i1"], tools: true });
after(() => t.lab.down());
const a1 = t.box("a1");
const [a2, b1, h1, h2] = [t.box("a2"), t.box("b1"), t.box("h1"), t.box("h2")];
const NEXT = "v1.36.9+k3s1";
const AGENTS = "b1 h1=nat h2=nat i1=nat";
const homes = ["h1", "h2", "i1"];

/** A node's address inside the tunnel. */
const inside = async (name: string, server = a1) => (await nodes(server))[name]?.internal as string;
/** Seconds until a box gets an answer from this address. */
async function reached(from: Box, ip: string, limit: number): Promise<number> {
  const began = Date.now();
  const seconds = () => (Date.now() - began) / 1000;
  while (seconds() < limit)
    if ((await from.sh(`ping -c 1 -W 1 ${ip} >/dev/null && echo yes || sleep 0.2`)).trim() === "yes")
      return seconds();
  return assert.fail(`${from.name} does not reach ${ip} within ${limit} s`);
}

before(async () => {
  t.settings({ K3S_VERSION: MODERN }, { agents: AGENTS });
});

describe("boxes without a public address", () => {
  test("join with make up, and a second run has nothing to do", async () => {
    await t.says("make -j up", 0, [
      /^h1 +write .*k3s-keepalive\.service and start it/m,
      /^h1 +restart k3s-agent and wait until node h1 is Ready with its address inside the tunnel/m,
    ]);
    await t.says("make -j up", 0, [/^h1 +nothing to do/m, /^i1 +nothing to do/m, /^a1 +nothing to do/m]);
  });

  test("have one address, inside the tunnel", async () => {
    const seen = await nodes(a1);
    for (const name of homes) {
      assert.match(seen[name]?.internal ?? "", /^10\.42\.\d+\.0$/);
      assert.equal(seen[name]?.external, undefined);
    }
  });

  test("are reached by every node with a public address, kubelet included, and are in kubectl top", async () => {
    for (const from of [a1, b1])
      for (const name of homes) {
        await reached(from, await inside(name), 30);
        assert.match(
          await from.sh(
            `curl -sk -o /dev/null -w '%{http_code}' --max-time 5 https://${await inside(name)}:10250/healthz`,
          ),
          /^(401|200|403)/,
        );
      }
    const top = await a1.sh("kubectl top nodes --no-headers");
    for (const name of homes) assert.match(top, new RegExp(`^${name} `, "m"));
  });

  test("reach each other, directly in one LAN and else by a node with a public address, and again after flannel's next event", async () => {
    const [one, two, far] = (await Promise.all(homes.map((name) => inside(name)))) as [
      string,
      string,
      string,
    ];
    await reached(h1, two, 30);
    await reached(h1, far, 30);
    await reached(t.box("i1"), one, 30);
    const nets = async () => (await h1.sh("wg show flannel-wg dump | cut -f3,4")).trim().split("\n").sort();
    const before = await nets();
    assert(
      before.some((row) => row.startsWith("198.51.100.11:51820") && row.includes(`,`) && row.includes(far)),
      `${before}`,
    );
    assert(
      before.some((row) => row === `192.168.0.12:51820\t${two}/24`),
      `${before}`,
    );
    const peer = (await h1.sh("wg show flannel-wg allowed-ips | sed -n 's/\t(none)$//p'")).trim();
    await h1.sh(`wg set flannel-wg peer ${peer} allowed-ips ${far}/24`);
    await reached(h1, far, 30);
    assert.deepEqual(await nets(), before);
  });

  test("are healthy for make check and make status", async () => {
    await t.says("make check", 0, [
      /Nothing is wrong/,
      /^ok +full-size packets through the tunnels: 20 of 20/m,
      /^ok +kubelets at 10250 from the server: 5 of 5/m,
    ]);
    await t.says("make status", 0, [/without a public address: h1, h2, i1/]);
  });

  test("can be set up by an operator elsewhere, through a node with a public address as jump host", async () => {
    const config = join(t.lab.dir, "home/.ssh/config");
    const before = readFileSync(config, "utf8");
    const far = `Host far\n  HostName ${await inside("h1")}\n  User root\n  ProxyJump a1\n  HostKeyAlias h1\n`;
    writeFileSync(config, before + far);
    await t.says("make agent HOST=far=nat", 0, [/^far +nothing to do/m]);
    await h1.sh("systemctl stop k3s-keepalive");
    await t.says("make agent HOST=far=nat", 0, [/^far +write .*k3s-keepalive\.service and start it/m]);
    writeFileSync(config, before);
  });

  test("get the new token by the next make up after make token, and have no part in make kubeconfig", async () => {
    await t.says("make token", 0);
    await t.says("make -j up", 0);
    await t.says(
      "make -j up",
      0,
      homes.map((name) => new RegExp(`^${name} +nothing to do$`, "m")),
    );
    await t.says("make kubeconfig", 0);
    assert.match((await t.op("cat ~/.kube/config")).out, /server: https:\/\/198\.51\.100\.11:6443/);
    await Promise.all(homes.map(async (name) => reached(a1, await inside(name), 30)));
  });

  test("are reached again soon after k3s of a node with a public address was started anew, without the two minutes of WireGuard", async () => {
    const ips = await Promise.all(homes.map((name) => inside(name)));
    await a1.sh("systemctl stop k3s; ip link delete flannel-wg; systemctl start k3s");
    const seconds = await Promise.all(ips.map((ip) => reached(a1, ip, 60)));
    // 8 to 19 s on a quiet machine; without datagrams 83 to 145 s.
    assert(Math.max(...seconds) < 45, `${seconds}`);
  });

  test("keep their connections when their router gets another address, with a pause of less than 30 seconds", async () => {
    const ip = await inside("h1");
    // Five lines a second, from a port of the box.
    await h1.sh(`perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(Listen => 1, LocalPort => 7777);
$c = $s->accept; $c->autoflush(1); for (1 .. 150) { print $c "line\n"; select undef, undef, undef, 0.2 }' >/dev/null 2>&1 &`);
    const download =
      b1.sh(`bash -c 'until { exec 3<>/dev/tcp/${ip}/7777; } 2>/dev/null || [ $SECONDS -gt 30 ]; do sleep 0.2; done; SECONDS=0; most=0; lines=0
while read -r -t 60 line <&3; do lines=$((lines + 1)); [ $SECONDS -le $most ] || most=$SECONDS; SECONDS=0; done
echo "$lines $most"'`);
    await sleep(3000);
    await t.lab.dial("h", "198.51.102.77");
    const [lines, pause] = (await download).trim().split(" ").map(Number) as [number, number];
    assert.equal(lines, 150);
    assert(pause < 30, `${pause}`);
    await t.lab.dial("h", "198.51.102.1");
    await reached(b1, ip, 30);
  });

  test("are named by make check when their provider drops WireGuard's packets, or when nothing keeps them reachable", async () => {
    await h1.sh("systemctl stop k3s-keepalive");
    await t.says("make check", 2, [/h1: k3s-keepalive does not run on it/, /do: make agent HOST=h1=nat/]);
    await t.says("make agent HOST=h1", 0, [/write .*k3s-keepalive\.service and start it/]);
    const open = await routerRule(t.lab, "i", "forward", "udp dport 51820 drop");
    const { text } = await t.says("make check", 2, [
      /^i1: its WireGuard reaches no other node: its router or its provider drops UDP/m,
    ]);
    assert.doesNotMatch(text, /i1: UDP 51820 is closed|hairpin|security group of i1/);
    await open();
    await reached(a1, await inside("i1"), 60);
  });

  test("are upgraded like others", async () => {
    await release(t.lab, NEXT);
    await t.ok(`make upgrade K3S_VERSION=${NEXT}`);
    await t.says("make -j up", 0, [/^h1 +nothing to do$/m]);
    for (const name of homes) await reached(b1, await inside(name), 30);
  });

  /** Deletes the nodes of h1 and h2. The lowest free network is the next node's: whoever joins first gets the lower one. */
  async function forget() {
    const all = [h1, h2];
    const ips = await Promise.all(all.map(({ name }) => inside(name)));
    for (const { name, sh } of all) {
      await sh("systemctl stop k3s-agent");
      await a1.sh(
        `kubectl delete node ${name}; kubectl -n kube-system delete secret ${name}.node-password.k3s --ignore-not-found`,
      );
    }
    const [low, high] = (ips[0] as string) < (ips[1] as string) ? all : all.toReversed();
    return { low: low as Box, high: high as Box, ips: ips.toSorted() };
  }

  /** The two have changed places. */
  async function exchanged({ low, high, ips }: Awaited<ReturnType<typeof forget>>) {
    const [first, second] = ips as [string, string];
    assert.deepEqual([await inside(high.name), await inside(low.name)], [first, second]);
    for (const ip of ips) await reached(a1, ip, 30);
    const lo = await high.sh("ip -4 -o addr show dev lo");
    assert(lo.includes(`inet ${first}/32`) && !lo.includes(second), lo);
  }

  test("follow to another pod network when their node was deleted, even if that run is interrupted", async () => {
    const both = await forget();
    const at = new RegExp(
      `restart k3s-agent and wait until node ${both.high.name} is Ready with its address`,
    );
    await t.cutThenDone(`make agent HOST=${both.high.name}`, at);
    await t.ok(`make agent HOST=${both.low.name}`);
    await exchanged(both);
  });

  test("follow there by themselves when nobody runs anything", async () => {
    const both = await forget();
    for (const { name, sh } of [both.high, both.low]) {
      await sh("systemctl start k3s-agent");
      while (!(await nodes(a1))[name]?.ready) await sleep(500);
    }
    const end = Date.now() + 120_000;
    while ((await inside(both.high.name)) !== both.ips[0] && Date.now() < end) await sleep(2000);
    while ((await inside(both.low.name)) !== both.ips[1] && Date.now() < end) await sleep(2000);
    await exchanged(both);
    await t.says("make -j up", 0, [/^h1 +nothing to do/m, /^h2 +nothing to do/m]);
  });

  test("can be removed, also when the box is gone, and can join again", async () => {
    await t.ok("make remove HOST=h1");
    const left =
      "ls /etc/systemd/system | grep k3s; ip -4 -o addr show dev lo | grep 10.42; ps -e | grep k3s";
    assert.equal((await h1.sh(`{ ${left}; } || true`)).trim(), "");
    await t.says("make remove HOST=h1", 0, ["nothing to do"]);
    await t.ok("make agent HOST=h1");
    const i1 = t.box("i1");
    await i1.off();
    await t.ok("make remove HOST=i1 FORCE=1");
    assert.deepEqual(Object.keys(await nodes(a1)), ["a1", "b1", "h1", "h2"]);
    await i1.on();
    await t.ok("make agent HOST=i1");
    await t.says("make -j up", 0, [/^i1 +nothing to do/m]);
  });

  test("can be brought up by the script on the box itself", async () => {
    await t.ok("make remove HOST=h2");
    await install(t, "h2");
    const { K3S_URL = "", K3S_TOKEN = "" } = t.env();
    const more = { K3S_VERSION: NEXT, K3S_MIRRORS: t.mirrors };
    await envOnBox(t, "h2", { PUBLIC_IP: "nat", K3S_URL, K3S_TOKEN, ...more });
    await t.says(onBox("h2", "scripts/agent.ts"), 0, [/write .*k3s-keepalive\.service and start it/]);
    await t.says(onBox("h2", "scripts/agent.ts"), 0, ["nothing to do"]);
    await reached(a1, await inside("h2"), 30);
    await t.says("make -j up", 0, [/^h2 +nothing to do/m]);
  });

  test("follow a server that is restored on another box", async () => {
    const file = join(t.lab.dir, "home/backup.tar.gz");
    await t.ok(`make backup BACKUP=${file}`);
    await a1.off();
    await t.ok(`make restore BACKUP=${file} HOST=a2`);
    for (const name of homes) await reached(a2, await inside(name, a2), 60);
    await t.says("make check", 0, [/Nothing is wrong/]);
  });

  test("are not made of boxes whose node has a public address before that node is removed", async () => {
    await t.says("make agent HOST=b1=nat AGENTS=", 2, [
      /Node b1 has the public address 198\.51\.101\.11, which k3s keeps/,
    ]);
  });

  test("are named by make check where no node relays between them", async () => {
    await h1.sh("systemctl stop k3s-keepalive");
    const peer = (await h1.sh("wg show flannel-wg allowed-ips | sed -n 's/\t(none)$//p'")).trim();
    await h1.sh(`wg set flannel-wg peer ${peer} allowed-ips ${await inside("i1", a2)}/24`);
    await t.says("make check", 2, [
      /note .*h1: i1 and it are behind NATs that let nothing in/,
      /k3s-keepalive does not run/,
    ]);
    await t.ok("make agent HOST=h1");
  });

  test("are cleared by make down", async () => {
    await t.ok("make down YES=1");
    assert.equal((await h1.sh("ls /etc/systemd/system | grep k3s || true")).trim(), "");
  });

  test("join a cluster of old k3s in the same way", async () => {
    t.settings({ K3S_VERSION: OLD }, { server: "a2", agents: AGENTS });
    await t.ok("make -j up");
    await t.says("make -j up", 0, [/^h1 +nothing to do/m, /^a2 +nothing to do/m]);
    for (const name of homes) await reached(b1, await inside(name, a2), 30);
    await t.says("make check", 0, [/Nothing is wrong/]);
  });
});

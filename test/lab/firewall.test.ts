/** make firewall on boxes with firewalld, with ufw and with nft rules that drop: nodes are allowed, others are not, ssh is unchanged. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { closeAgain } from "../../lib/k3s/firewall/firewall.ts";
import type { Box } from "./lab.ts";
import { type Backend, compared, dice, iptablesText, nftText, SET_UP, tried } from "./packets.ts";
import { type Bench, bench, connected, state, untouched } from "./suite.ts";

describe("make firewall", { concurrency: 1 }, () => {
  let t: Bench;
  let [a1, b1, b2] = [] as unknown as [Box, Box, Box];
  after(() => t?.lab.down());
  /** Is a TCP port of `to` open to the operator, and to a box? */
  const OPEN = (ip: string, port: number) =>
    `timeout 3 bash -c ': </dev/tcp/${ip}/${port}' 2>/dev/null && echo open || echo closed`;
  const toWorld = async (to: Box, port: number) => (await t.lab.net("op", OPEN(to.publicIp, port))).trim();
  const toBox = async (from: Box, to: Box, port: number) => (await from.sh(OPEN(to.publicIp, port))).trim();
  const doors = async () => ({
    api: await Promise.all([toBox(b1, a1, 6443), toBox(b2, a1, 6443), toWorld(a1, 6443)]),
    kubelets: await Promise.all([
      toBox(a1, b1, 10250),
      toBox(a1, b2, 10250),
      toBox(b1, a1, 10250),
      toWorld(a1, 10250),
      toWorld(b1, 10250),
      toWorld(b2, 10250),
    ]),
    ssh: await Promise.all([a1, b1, b2].map((box) => toWorld(box, 22))),
  });
  const SHUT = {
    api: ["open", "open", "closed"],
    kubelets: ["open", "open", "open", "closed", "closed", "closed"],
    ssh: ["open", "open", "open"],
  };

  /** Does a packet of a stranger to a UDP port pass all rules of a box? */
  const passed = async (box: Box, port: number) => {
    await box.sh(
      `nft 'add table ip seen; add chain ip seen input { type filter hook input priority 300; }; add rule ip seen input ip saddr 203.0.113.254 udp dport ${port} counter'`,
    );
    await t.lab.net(
      "op",
      `bash -c 'for i in 1 2 3; do echo >/dev/udp/${box.publicIp}/${port}; sleep 0.1; done'`,
    );
    const seen = await box.sh("nft list table ip seen; nft delete table ip seen");
    return Number(/packets (\d+)/.exec(seen)?.[1]) > 0;
  };
  /** Do packets of a device pass all rules of a box, to itself and to a pod? */
  const passedInside = async (box: Box) => {
    const seen = await box.sh(`ip netns add phone
ip link add k3s-devices type veth peer name eth0 netns phone
ip addr add 10.44.0.1/24 dev k3s-devices; ip link set k3s-devices up
ip -n phone addr add 10.44.0.2/24 dev eth0; ip -n phone link set eth0 up; ip -n phone route add default via 10.44.0.1
until ip link show k3s-devices | grep -q 'state UP' && ip -n phone link show eth0 | grep -q 'state UP'; do sleep 0.1; done
for hook in input forward; do
  nft "add table ip seen; add chain ip seen $hook { type filter hook $hook priority 300; }; add rule ip seen $hook iifname k3s-devices udp dport 53 counter"
done
ip netns exec phone bash -c 'for ip in 10.44.0.1 10.42.1.9; do for i in 1 2 3; do echo >/dev/udp/$ip/53; sleep 0.1; done; done' || true
nft list table ip seen; nft delete table ip seen; ip netns del phone; ip link del k3s-devices 2>/dev/null || true`);
    return [...seen.matchAll(/packets (\d+)/g)].map(([, packets]) => Number(packets) > 0);
  };

  before(async () => {
    t = await bench({ name: "settings-fw", hairpin: ["a", "b"] });
    [a1, b1, b2] = [t.box("a1"), t.box("b1"), t.box("b2")];
    t.settings();
    await t.ok("make -j up");
  });

  test("evaluates rules as the kernel does", async () => {
    await b2.sh(SET_UP);
    let certain = 0;
    for (const backend of ["nft", "iptables-nft", "iptables-legacy"] as Backend[])
      for (let seed = 1; seed <= 8; seed++) {
        const rules = (backend === "nft" ? nftText : iptablesText)(dice(seed * 7919 + backend.length));
        const found = async (seconds: number) => compared(rules, await b2.sh(tried(rules, backend, seconds)));
        // On a busy machine a packet may be sent later.
        certain += await found(0.15).catch(() => found(3));
      }
    assert(certain > 200, `${certain}`);
    await b2.sh("for n in judged sender pods; do ip netns del $n; done");
  });

  test("closes open ports with its own table if there is no firewall, and the table is restored after a reboot", async () => {
    assert.deepEqual((await doors()).kubelets, Array(6).fill("open"));
    const fresh = await Promise.all(t.lab.boxes.map(state));
    const { out } = await t.ok("make firewall DRY=1");
    assert.match(
      out,
      /b2: 1 to do\n {2}1\. nft: open 6443\/tcp, 10250\/tcp and 51820\/udp to 198\.51\.100\.11, /,
    );
    await untouched(t.lab.boxes, fresh);
    await t.cutThenDone("make firewall", /b2 +nft: open/);
    assert.deepEqual(await doors(), SHUT);
    const done = await Promise.all(t.lab.boxes.map(state));
    await t.says("make firewall", 0, [/^a1 +nothing to do/m, /^b1 +nothing to do/m, /^b2 +nothing to do/m]);
    await untouched(t.lab.boxes, done);
    await b2.off();
    await b2.on();
    await t.ok("make agent HOST=b2");
    await connected(t.lab.boxes);
    assert.deepEqual(await doors(), SHUT);
    await t.says("make firewall", 0, [/^b2 +nothing to do/m]);
  });

  test("opens nft rules that drop, ufw and firewalld for the cluster", async () => {
    await Promise.all([
      a1.sh(`systemctl disable -q --now k3s-firewall
cat >/etc/nftables.conf <<'NFT'
#!/usr/sbin/nft -f
table inet mine
delete table inet mine
table inet mine {
  chain input { type filter hook input priority 0; policy drop; ct state established,related accept; iif lo accept; tcp dport 22 accept; }
  chain forward { type filter hook forward priority 0; policy drop; }
}
NFT
systemctl enable -q --now nftables`),
      b1.sh(`systemctl disable -q --now k3s-firewall
apt-get -q update && apt-get -q -y --no-install-recommends install ufw
ufw allow 22/tcp; ufw allow 10250/tcp; ufw --force enable`),
      b2.sh(`systemctl disable -q --now k3s-firewall
apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install firewalld
firewall-cmd --permanent --add-port=10250/tcp; firewall-cmd --add-port=10250/tcp`),
    ]);
    assert.deepEqual((await doors()).api, ["closed", "closed", "closed"]);
    // Existing flows continue for a while: that is a note, not a fault.
    await t.says("make check", 2, [
      /^a1: nft inet mine input drops 6443\/tcp/m,
      "do: make firewall HOST=a1",
      /^(note {2})?b1: .*ufw drops .*51820\/udp from /m,
      /^(note {2})?b2: .*firewalld drops .*51820\/udp from /m,
    ]);
    await t.says("make firewall", 0, [/^a1 +nft: open /m, /^b1 +ufw: open /m, /^b2 +firewalld: open /m]);
    assert.deepEqual(await doors(), SHUT);
    const done = await Promise.all(t.lab.boxes.map(state));
    await t.says("make firewall", 0, [/^a1 +nothing to do/m, /^b1 +nothing to do/m, /^b2 +nothing to do/m]);
    await untouched(t.lab.boxes, done);
    await Promise.all(
      t.lab.boxes.map(({ sh }) => sh("systemctl restart 'k3s*.service' --state=active; sleep 3")),
    );
    await t.ok("make -j up");
    await connected(t.lab.boxes);
  });

  test("makes rules that survive a reboot and a restart of nftables.service", async () => {
    await Promise.all([b1, b2].map((box) => box.off()));
    await Promise.all([b1, b2].map((box) => box.on()));
    await a1.sh("systemctl restart nftables");
    await t.ok("make -j up");
    assert.deepEqual(await doors(), SHUT);
    await t.says("make firewall", 0, [/^a1 +nothing to do/m, /^b1 +nothing to do/m, /^b2 +nothing to do/m]);
  });

  test("allows a box that is added to AGENTS, and no longer one that is removed from it", async () => {
    const rules = async () =>
      Promise.all([
        a1.sh("nft list ruleset | grep -c 198.51.101.13 || true"),
        b1.sh("ufw status | grep -c 198.51.101.13 || true"),
        b2.sh("firewall-cmd --list-rich-rules | grep -c 198.51.101.13 || true"),
      ]);
    t.settings({ ...learned() }, { agents: "b1 b2 b3=198.51.101.13" });
    await t.ok('make firewall HOST="a1 b1 b2"');
    assert.deepEqual(
      (await rules()).map(Number).every((n) => n >= 3 || n === 3),
      true,
      `${await rules()}`,
    );
    t.settings({ ...learned() });
    await t.ok("make firewall");
    assert.deepEqual((await rules()).map(Number), [0, 0, 0]);
  });

  test("opens 6443/tcp and 51820/udp to everybody while a home node is in AGENTS, and never 10250/tcp", async () => {
    const udp = async () => await Promise.all(t.lab.boxes.map((box) => passed(box, 51820)));
    const nothing = [/^a1 +nothing to do/m, /^b1 +nothing to do/m, /^b2 +nothing to do/m];
    assert.deepEqual(await udp(), [false, false, false]);
    t.settings({ ...learned() }, { agents: "b1 b2 nas=nat" });
    const opens =
      "open 6443/tcp and 51820/udp to all, since home nodes have no fixed address, 10250/tcp to 198";
    await t.says('make firewall HOST="a1 b1 b2"', 0, [
      `nft: ${opens}`,
      `ufw: ${opens}`,
      `firewalld: ${opens}`,
    ]);
    assert.deepEqual(await doors(), { ...SHUT, api: ["open", "open", "open"] });
    assert.deepEqual(await udp(), [true, true, true]);
    await t.says('make firewall HOST="a1 b1 b2"', 0, nothing);
    t.settings({ ...learned() });
    await t.says("make firewall", 0, [/^a1 +nft: /m, /^b1 +ufw: /m, /^b2 +firewalld: /m]);
    assert.deepEqual(await doors(), SHUT);
    assert.deepEqual(await udp(), [false, false, false]);
    await t.says("make firewall", 0, nothing);
  });

  test("opens 51822/udp to everybody, and all to what comes in by k3s-devices, on an entry for devices alone", async () => {
    const entries = async (...those: Box[]) => {
      await Promise.all(t.lab.boxes.map(({ sh }) => sh("rm -f /usr/local/sbin/k3s-devices")));
      await Promise.all(
        those.map(({ sh }) => sh("printf '#!/bin/sh\\nport=51822\\n' >/usr/local/sbin/k3s-devices")),
      );
      await t.ok("make firewall");
      const nothing = t.lab.boxes.map(({ name }) => new RegExp(`^${name} +nothing to do`, "m"));
      await t.says("make firewall", 0, nothing);
      assert.deepEqual(await Promise.all(those.map(passedInside)), Array(those.length).fill([true, true]));
      return await Promise.all(t.lab.boxes.map((box) => passed(box, 51822)));
    };
    assert.deepEqual(await entries(a1, b2), [true, false, true]);
    assert.deepEqual(await entries(b1), [false, true, false]);
    assert.deepEqual(await entries(), [false, false, false]);
    assert.deepEqual(await entries(a1, b1, b2), [true, true, true]);
    assert.deepEqual(await doors(), SHUT);
  });

  test("is part of a join and a removal with FIREWALL=yes, in the same run", async () => {
    const FIREWALL = "yes";
    t.settings({ ...learned(), FIREWALL });
    await t.says("make -j up", 0, [/^a1 +nothing to do/m, /^b1 +nothing to do/m, /^b2 +nothing to do/m]);
    const knows = async (ip: string) =>
      (
        await Promise.all([
          a1.sh(`grep -c ${ip} /usr/local/sbin/k3s-firewall || true`),
          b1.sh(`ufw status | grep -c ${ip} || true`),
        ])
      ).map((n) => Number(n) > 0);
    assert.deepEqual(await knows(b2.publicIp), [true, true]);
    const { out } = await t.ok("make remove HOST=b2 DRY=1");
    assert.match(out, /^b1: 2 to do\n {2}1\. ufw: open .*\n {2}2\. nft: open /m);
    await t.says("make remove HOST=b2", 0, [/^a1 +nft: open/m, /^b1 +ufw: open/m]);
    assert.deepEqual(await knows(b2.publicIp), [false, false]);
    t.settings({ ...learned(), FIREWALL }, { agents: "b1" });
    await t.says("make agent HOST=b2", 0, [/^a1 +nft: open/m, /^b1 +ufw: open/m, /^b2 +firewalld: open/m]);
    assert.deepEqual(await knows(b2.publicIp), [true, true]);
    await connected(t.lab.boxes);
    assert.deepEqual(await doors(), SHUT);
    // One that cannot be reached does not allow it, which is reported.
    t.settings({ ...learned(), FIREWALL }, { agents: "b1 b9=198.51.101.13" });
    await t.says("make agent HOST=b2", 2, [
      /^b9 .*the new node is not allowed there yet/m,
      "make firewall HOST=b9=198.51.101.13",
      /^b2 +done in /m,
    ]);
    // A rule that precedes all of ours is reported before any change.
    await a1.sh(
      "nft add table ip raw; nft add chain ip raw pre '{ type filter hook prerouting priority -300; }'; nft add rule ip raw pre udp dport 51820 drop",
    );
    t.settings({ ...learned(), FIREWALL }, { agents: "b1" });
    await t.says("make agent HOST=b2", 2, [/^a1 .*nft ip raw pre drops 51820\/udp/m]);
    await a1.sh("nft delete table ip raw");
  });

  test("makes rules that can be removed without affecting others", async () => {
    await Promise.all(t.lab.boxes.map(({ sh }) => sh(closeAgain(["10.42.0.0/16", "10.43.0.0/16"]))));
    const [nft, ufw, firewalld] = await Promise.all([
      a1.sh(
        "nft list ruleset | grep -e k3s.across -e 'chain input'; ls /usr/local/sbin /etc/systemd/system | grep firewall || true",
      ),
      b1.sh("ufw show added"),
      b2.sh(
        "firewall-cmd --list-rich-rules; firewall-cmd --permanent --list-rich-rules; firewall-cmd --zone=trusted --list-sources; firewall-cmd --permanent --zone=trusted --list-interfaces",
      ),
    ]);
    assert.deepEqual(
      [nft.trim(), ufw.trim().split("\n").slice(1), firewalld.trim()],
      ["chain input {", ["ufw allow 22/tcp", "ufw allow 10250/tcp"], ""],
    );
    assert.deepEqual((await doors()).ssh, SHUT.ssh);
  });

  const learned = () => {
    const { K3S_URL = "", K3S_TOKEN = "" } = t.env();
    return { K3S_URL, K3S_TOKEN };
  };
});

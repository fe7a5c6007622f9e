/** Devices at home that join no cluster: they reach its pods, services and names by way of a node (`make device`). */
import assert from "node:assert/strict";
import { readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import type { Box } from "./lab.ts";
import { bench, MODERN, OLD, routerRule } from "./suite.ts";

const t = await bench({
  name: "device",
  boxes: ["a1", "a3", "b1", "h1", "h2", "h3", "h4", "i2"],
  tools: true,
});
after(() => t.lab.down());
const a1 = t.box("a1");
const [laptop, tv, gateway, phone] = [t.box("h2"), t.box("h3"), t.box("h4"), t.box("i2")];
/** In the LAN of the entry, and no node. */
const neighbour = t.box("a3");
const CLUSTER = ["a1", "b1", "h1"];
const SERVICE = "10.43.0.80";
const NAME = "hello.default.svc.cluster.local";

const fileOf = (name: string) => join(t.lab.dir, "home/devices", `${name}.conf`);
/** A configuration as written, and the device's key kept from all output that follows. */
function configuration(name: string) {
  const text = readFileSync(fileOf(name), "utf8");
  assert.equal((statSync(fileOf(name)).mode & 0o777).toString(8), "600");
  t.secret(/^PrivateKey = (\S+)$/m.exec(text)?.[1] as string);
  return text;
}

/**
 * Gives the device its configuration, and turns it on there. What sets names up on it needs systemd-resolved, which the
 * laptop has; the others ask the cluster for all names, as phones do.
 */
async function turnOn(box: Box, name: string, text = configuration(name)) {
  if (box.name === phone.name) {
    text = text.replace(/^(DNS|PostUp|PostDown) = .*\n/gm, "");
    await box.sh("echo nameserver 10.43.0.10 >/etc/resolv.conf");
  }
  await box.sh(`umask 077; mkdir -p /etc/wireguard; cat >/etc/wireguard/${name}.conf <<'END'
${text}
END
wg-quick up ${name} 2>&1`);
}
const turnOff = (box: Box, name: string) => box.sh(`wg-quick down ${name} 2>&1`);

/** What answers at these addresses, at once: a line each, "" for nothing. */
async function ask(box: Box, addresses: string[], seconds = 2) {
  const said = await box.sh(`work=$(mktemp -d)
for url in ${addresses.join(" ")}; do curl -s --max-time ${seconds} "http://$url" >"$work/$url" & done
wait
for url in ${addresses.join(" ")}; do echo "$(cat "$work/$url")"; done`);
  return said.split("\n").slice(0, addresses.length);
}

/** Which of these TCP ports, `ADDRESS/PORT`, take a connection. */
const open = (box: Box, ports: string[]) =>
  box.sh(`for port in ${ports.join(" ")}; do
  timeout 2 bash -c ": </dev/tcp/$port" 2>/dev/null && echo "$port" &
done
wait`);

/** Addresses of pods by node. */
async function podsOf(server: Box) {
  const { items } = JSON.parse(await server.sh("k3s kubectl get nodes -o json")) as {
    items: { metadata: { name: string }; spec: { podCIDR: string } }[];
  };
  return Object.fromEntries(
    items.map(({ metadata, spec }) => [metadata.name, spec.podCIDR.replace(/\.0\/24$/, ".2:8080")]),
  );
}
let pods: Record<string, string> = {};

/** A pod on each node, the service, and the service by name, within so many seconds. */
async function reachesAll(box: Box, seconds = 20) {
  const names = Object.keys(pods);
  const addresses = [...Object.values(pods), SERVICE, NAME];
  for (const end = Date.now() + seconds * 1000; ; await sleep(500)) {
    const said = await ask(box, addresses);
    const right = said.every((word, i) => (i < names.length ? word === names[i] : names.includes(word)));
    if (right) return;
    if (Date.now() > end) assert.fail(`${box.name} is answered ${JSON.stringify(said)} by ${addresses}`);
  }
}

/** Nothing of the cluster answers. */
async function reachesNothing(box: Box) {
  const addresses = [...Object.values(pods), SERVICE, NAME];
  assert.deepEqual(
    await ask(box, addresses),
    addresses.map(() => ""),
  );
}

before(async () => {
  t.settings({ K3S_VERSION: MODERN }, { agents: "b1 h1=nat" });
  const get = (packages: string) =>
    `apt-get -qq update; DEBIAN_FRONTEND=noninteractive apt-get -qq install ${packages} 2>&1`;
  await Promise.all([
    t.ok("make -j up"),
    // Installed on a busy machine, it may start before D-Bus knows its user.
    laptop.sh(`${get("systemd-resolved")}; systemctl reload dbus; systemctl restart systemd-resolved`),
    gateway.sh(get("dnsmasq-base")),
  ]);
  pods = await podsOf(a1);
});

describe("a device at home", () => {
  test("reaches pods on each node, services, and services by name", async () => {
    await reachesNothing(laptop);
    await t.says("make device NAME=laptop FOR=linux", 0);
    await turnOn(laptop, "laptop");
    await reachesAll(laptop);
    const api = await laptop.sh("curl -sk --max-time 5 https://kubernetes.default.svc.cluster.local/ping");
    assert.equal(api, "pong");
  });

  test("has nothing to be done for it again", async () => {
    const before = configuration("laptop");
    await t.says("make device NAME=laptop FOR=linux", 0, ["nothing to do"]);
    assert.equal(configuration("laptop"), before);
    await t.says("make -j up", 0, [/^a1 +nothing to do/m]);
  });

  test("may be one of several at once, from behind several NATs", async () => {
    await t.says("make device NAME=phone", 0);
    assert.match(configuration("phone"), /^DNS = 10\.43\.0\.10$/m);
    await turnOn(phone, "phone");
    await Promise.all([reachesAll(laptop), reachesAll(phone)]);
  });

  test("may be the router of a home: a television reaches it all with nothing installed", async () => {
    await t.says("make device NAME=home FOR=router LAN=192.168.0.0/24", 0);
    const text = configuration("home");
    await turnOn(gateway, "home", text);
    const names = /server=\/cluster\.local\/10\.43\.0\.10/.exec(text)?.[0];
    assert(names, text);
    await gateway.sh(`dnsmasq --${names} --no-resolv --no-hosts --pid-file=/run/dnsmasq.pid`);
    await reachesNothing(tv);
    for (const network of ["10.42.0.0/16", "10.43.0.0/16"])
      await t.lab.net("router-h", `ip route add ${network} via ${gateway.privateIp}`);
    await tv.sh(`echo nameserver ${gateway.privateIp} >/etc/resolv.conf`);
    await Promise.all([reachesAll(tv), reachesAll(laptop)]);
  });

  test("is listed with its address, handshake, traffic and entry", async () => {
    const { out } = await t.says("make devices", 0);
    const rows = ["laptop", "phone", "home"].map((name) =>
      out.split("\n").find((row) => row.startsWith(name)),
    );
    for (const row of rows) assert.match(row ?? "", /10\.44\.0\.\d+ .*\ba1\b/, out);
    assert.equal(new Set(rows.map((row) => /10\.44\.0\.\d+/.exec(row ?? "")?.[0])).size, 3, out);
  });

  /** A client that sends what it likes into its tunnel. */
  async function wide(box: Box, name: string, addresses: string[]) {
    const peer = (await box.sh(`wg show ${name} peers`)).trim();
    await box.sh(`wg set ${name} peer ${peer} allowed-ips 0.0.0.0/0
for address in ${addresses.join(" ")}; do ip route replace "$address" dev ${name}; done`);
  }

  test("reaches nothing but the cluster's networks, whatever its own AllowedIPs say", async () => {
    const others = ["192.168.0.1", neighbour.privateIp, a1.privateIp, "198.51.101.11", "203.0.113.81"];
    // Without a rule, a box that masquerades for anyone would do so for a device.
    await a1.sh("iptables -t nat -A POSTROUTING -s 10.44.0.0/24 -o eth0 -j MASQUERADE");
    const before = await phone.sh("ip route");
    await wide(phone, "phone", others);
    const ports = ["198.51.101.11/22", "203.0.113.81/80"].concat(
      `${neighbour.privateIp}/22`,
      `${a1.privateIp}/22`,
    );
    const pings = () =>
      phone.sh(`for ip in 192.168.0.1 ${neighbour.privateIp}; do
  ! ping -c 1 -W 1 $ip >/dev/null || echo $ip
done`);
    assert.equal(await open(phone, ports), "");
    assert.equal(await pings(), "");
    await reachesAll(phone);
    // It is the rule that holds them back.
    await a1.sh("nft delete table inet k3s_devices");
    assert.equal(await pings(), `192.168.0.1\n${neighbour.privateIp}\n`);
    await a1.sh("systemctl reload k3s-devices");
    assert.equal(await pings(), "");
    await reachesAll(phone);
    for (const address of others) await phone.sh(`ip route delete ${address} dev phone`);
    assert.equal(await phone.sh("ip route"), before);
  });

  test("goes on after a restart of k3s on its entry, and of the box", async () => {
    await a1.sh("systemctl restart k3s");
    await reachesAll(laptop, 60);
    await a1.off();
    await a1.on();
    await Promise.all([reachesAll(laptop, 90), reachesAll(phone, 90), reachesAll(tv, 90)]);
  });

  test("can be limited to services", async () => {
    await t.says("make device NAME=guest FOR=linux ONLY=services", 0);
    await turnOff(phone, "phone");
    await turnOn(phone, "guest");
    const allowed = async () => {
      const [service, name] = await ask(phone, [SERVICE, NAME]);
      assert(CLUSTER.includes(service as string) && CLUSTER.includes(name as string), `${service} ${name}`);
      assert.equal(await phone.sh("curl -sk --max-time 5 https://10.43.0.1/ping"), "pong");
    };
    await allowed();
    await wide(phone, "guest", ["10.42.0.0/16", "10.44.0.0/24", "198.51.101.11"]);
    const forbidden = Object.values(pods);
    assert.deepEqual(
      await ask(phone, forbidden),
      forbidden.map(() => ""),
    );
    const hosts = ["10.42.0.0", "10.42.0.1", "10.42.1.0", "10.44.0.1", "198.51.101.11"];
    assert.equal(await open(phone, hosts.flatMap((ip) => [`${ip}/22`, `${ip}/10250`, `${ip}/6443`])), ""); // biome-ignore format: a list
    await allowed();
    await reachesAll(laptop);
    await turnOff(phone, "guest");
  });

  test("may have a second entry, which does when the first is out of reach", async () => {
    await t.says('make device NAME=laptop FOR=linux VIA="a1 b1"', 0);
    await t.says('make device NAME=laptop FOR=linux VIA="a1 b1"', 0, ["nothing to do"]);
    await turnOff(laptop, "laptop");
    const shut = await routerRule(t.lab, "a", "ports", "udp dport 51822 drop");
    await turnOn(laptop, "laptop");
    await reachesNothing(laptop);
    await turnOff(laptop, "laptop");
    await turnOn(laptop, "laptop-2");
    await reachesAll(laptop);
    const limited = (name: string) => new RegExp(`^laptop .*\\b${name}\\b.*services alone`, "m");
    await t.ok("make device NAME=laptop ONLY=services");
    await t.says("make devices", 0, [limited("a1"), limited("b1")]);
    const [pod, service] = await ask(laptop, [pods.h1 as string, SERVICE]);
    assert(pod === "" && CLUSTER.includes(service as string), `${pod} ${service}`);
    await t.ok("make device NAME=laptop ONLY=");
    await reachesAll(laptop);
    await t.says("make device NAME=laptop DEVICE_PORT=51830", 0, [
      /^a1 +its port was 51822: make device NAME=… writes the other configurations anew \(.*phone\)$/m,
    ]);
    await t.ok("make device NAME=laptop");
    await reachesAll(laptop);
    await shut();
    await turnOff(laptop, "laptop-2");
    await turnOn(laptop, "laptop");
    await reachesAll(laptop);
  });

  test("reaches nothing from the moment it is removed, and others go on", async () => {
    await turnOn(phone, "phone");
    await reachesAll(phone);
    await t.says("make device NAME=laptop REMOVE=1", 0);
    await reachesNothing(laptop);
    await reachesAll(phone);
    await turnOff(laptop, "laptop");
    await laptop.sh("wg-quick up laptop-2 2>&1");
    await reachesNothing(laptop);
    await turnOff(laptop, "laptop-2");
    const { out } = await t.says("make devices", 0, [/^phone /m]);
    assert.doesNotMatch(out, /^laptop /m);
    await t.says("make device NAME=laptop REMOVE=1", 0, ["No entry has a device laptop"]);
  });

  test("may keep its key to itself", async () => {
    await turnOff(phone, "phone");
    const key = (await phone.sh("umask 077; wg genkey | tee /root/key | wg pubkey")).trim();
    await t.cutThenDone(`make device NAME=tablet PUBLIC_KEY=${key}`, /let in device tablet/);
    const text = readFileSync(fileOf("tablet"), "utf8");
    const own = (await phone.sh("cat /root/key")).trim();
    await turnOn(phone, "tablet", text.replace(/^PrivateKey = .*$/m, `PrivateKey = ${own}`));
    await reachesAll(phone);
    await turnOff(phone, "tablet");
  });

  test("comes in again when its entry was restored on another box", async () => {
    const file = join(t.lab.dir, "home/backup.tar.gz");
    await t.ok(`make backup BACKUP=${file}`);
    await a1.off();
    await t.says(`make restore BACKUP=${file} HOST=a3 DEVICE_CIDR=10.45.0.0/24`, 2, [
      /^a3 +FAILED .*DEVICE_CIDR/m,
      /^a3 +again: make restore HOST=a3 .*DEVICE_CIDR=/m,
      /^b1 +nothing to do/m,
    ]);
    assert.deepEqual(Object.keys(await podsOf(neighbour)), ["a3", "b1", "h1"]);
    await t.says(`make restore BACKUP=${file} HOST=a3`, 0, [/make device NAME=/]);
    await t.ok("make device NAME=phone");
    pods = await podsOf(neighbour);
    assert.deepEqual(Object.keys(pods), ["a3", "b1", "h1"]);
    await turnOn(phone, "phone");
    await reachesAll(phone, 60);
  });

  test("goes with the cluster", async () => {
    await t.ok("make down YES=1");
    for (const box of [neighbour, t.box("b1")])
      assert.equal(
        await box.sh(
          "ls /etc/rancher /usr/local/sbin /etc/systemd/system /sys/class/net | grep -E 'k3s|device' || :; nft list tables | grep k3s || :",
        ),
        "",
      );
  });

  test("works with old k3s in the same way", async () => {
    t.settings({ K3S_VERSION: OLD }, { server: "a3", agents: "b1 h1=nat" });
    await t.ok("make -j up");
    pods = await podsOf(neighbour);
    await t.says("make device NAME=laptop FOR=linux", 0);
    await turnOn(laptop, "laptop");
    await reachesAll(laptop);
  });
});

/** Living with a cluster, by one story: what each verb does, that doing it again is nothing, and that a cut one is finished. */
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import type { Box } from "./lab.ts";
import { bench, connected, MODERN, nodes, OLD, release } from "./suite.ts";

const t = await bench({ name: "living", boxes: ["a1", "a2", "b1", "b2"], tools: true });
after(() => t.lab.down());
const [a1, a2, b1, b2] = [t.box("a1"), t.box("a2"), t.box("b1"), t.box("b2")];

/** What must be at the end as it was at the beginning. iptables-nft keeps its tables when they are empty. */
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

before(async () => {
  t.settings({ K3S_VERSION: OLD });
  beginning = await Promise.all(t.lab.boxes.map(traces));
  await t.ok("make -j up");
});

test("make upgrade", async () => {
  await t.says("make upgrade K3S_VERSION=v1.36.2+k3s1", 2, ["STEPS="]);
  await release(t.lab, NEXT);
  console.log((await t.ok(`make upgrade K3S_VERSION=${NEXT} DRY=1`)).text);
  console.log((await t.ok(`make upgrade K3S_VERSION=${NEXT}`)).text);
  console.log((await t.ok(`make upgrade`)).text);
  console.log((await t.ok(`make upgrade FORCE=1 K3S_VERSION=${MODERN} DRY=1`)).text);
  console.log((await t.ok(`make upgrade FORCE=1 K3S_VERSION=${MODERN}`)).text);
  await connected([a1, b1, b2]);
  console.log((await t.ok(`make upgrade`)).text);
  console.log(await a1.sh("kubectl get nodes"));
  await t.says("make upgrade K3S_VERSION=v1.22.17+k3s1", 2, ["a way back"]);
});
test("make remove", async () => {
  const before = beginning[3] as string[];
  const left = (await traces(b2)).filter((line) => !before.includes(line));
  console.log(left.join("\n"));
  console.log((await t.ok("make remove HOST=b2")).text);
  assert.deepEqual(Object.keys(await nodes(a1)), ["a1", "b1"]);
  await clean([b2]);
  console.log((await t.says("make remove HOST=b2", 0, ["nothing to do"])).text);
  await t.ok("make agent HOST=b2");
  await connected([a1, b1, b2]);
  await t.says("make down", 2, ["asks first"]);
  console.log((await t.ok("make down YES=1")).text);
  await t.says("make down YES=1", 0, ["nothing to do"]);
  await clean(t.lab.boxes);
  void a2;
});

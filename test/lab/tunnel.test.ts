/** TUNNEL_KUBELETS: every kubelet is reached inside the tunnel, and 10250/tcp is closed everywhere else. */
import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import { bench, MODERN, nodes, OLD, restarted, routerRule } from "./suite.ts";

const t = await bench({ name: "tunnel", boxes: ["a1", "b1", "h1"], tools: true });
after(() => t.lab.down());
const [a1, b1] = [t.box("a1"), t.box("b1")];
const set = (more: Record<string, string>) =>
  t.settings({ K3S_VERSION: MODERN, FIREWALL: "yes", ...more }, { agents: "b1 h1=nat" });
const top = async () => (await a1.sh("kubectl top nodes --no-headers")).match(/^\w+(?= +\d)/gm)?.sort() ?? [];
const internal = async () =>
  Object.fromEntries(Object.entries(await nodes(a1)).map(([name, node]) => [name, node.internal]));
const PODS = "/api/v1/namespaces/kube-system/pods?labelSelector=k8s-app%3Dmetrics-server";
const types = () => a1.sh(`kubectl get --raw '${PODS}' | grep -o 'address-types=[A-Za-z]*'`);
/** Is 10250/tcp of a box open to this one at its public address? */
const door = async (from: typeof a1, to: typeof a1) =>
  (
    await from.sh(
      `timeout 3 bash -c ': </dev/tcp/${to.publicIp}/10250' 2>/dev/null && echo open || echo closed`,
    )
  ).trim();

describe("TUNNEL_KUBELETS", () => {
  test("is refused on k3s of the old backend, and nothing is changed", async () => {
    set({ K3S_VERSION: OLD, TUNNEL_KUBELETS: "yes" });
    await t.says("make -j up", 2, [/^a1 .*TUNNEL_KUBELETS=yes has not been tried on k3s of the old/m]);
    assert.equal((await a1.sh("ls /usr/local/bin /etc/systemd/system | grep k3s || :")).trim(), "");
  });

  test("moves the kubelets of a running cluster into the tunnel, once", async () => {
    set({});
    await t.ok("make -j up");
    assert.equal(await door(a1, b1), "open");
    set({ TUNNEL_KUBELETS: "yes" });
    await t.says("make -j up", 0, [
      /^b1 +restart k3s-agent and wait until node b1 is Ready with its address inside the tunnel/m,
      /^a1 +nft: open 6443\/tcp and 51820\/udp to all, .*: kubelets are reached inside the tunnel/m,
      /^a1 +deploy metrics-server with InternalIP first, in place of the packaged one/m,
    ]);
    await t.says("make -j up", 0, [/^a1 +nothing to do/m, /^b1 +nothing to do/m, /^h1 +nothing to do/m]);
    const seen = await nodes(a1);
    for (const name of ["a1", "b1", "h1"]) assert.match(seen[name]?.internal ?? "", /^10\.42\.\d+\.0$/);
    assert.deepEqual([seen.a1?.external, seen.b1?.external], [a1.publicIp, b1.publicIp]);
  });

  test("leaves kubectl top and make check as they were while 10250/tcp is closed on the boxes and dropped by both routers", async () => {
    assert.deepEqual([await door(a1, b1), await door(b1, a1)], ["closed", "closed"]);
    const open = await Promise.all(
      (["a", "b"] as const).map((cloud) => routerRule(t.lab, cloud, "forward", "tcp dport 10250 drop")),
    );
    try {
      await restarted(a1);
      // The home has to begin, and notices after 15 s.
      await a1.sh(
        "for _ in $(seq 60); do wg show flannel-wg latest-handshakes | grep -q '[[:blank:]]0$' || exit 0; sleep 1; done; exit 1",
      );
      await t.ok("make fix-metrics");
      assert.match(await types(), /^address-types=InternalIP$/m);
      assert.deepEqual(await top(), ["a1", "b1", "h1"]);
      await t.says("make check", 0, [
        /Nothing is wrong/,
        /^ok +kubelets at 10250 from the server: 3 of 3/m,
        /^ok +nodes in kubectl top: 3 of 3/m,
      ]);
    } finally {
      for (const close of open) await close();
    }
  });

  test("is named by make check, and no open port asked for, where a box drops what comes out of the tunnel", async () => {
    await b1.sh(
      "nft 'add table ip mine; add chain ip mine in { type filter hook input priority 0; }; add rule ip mine in iifname flannel-wg tcp dport 10250 drop'",
    );
    const { text } = await t.says("make check", 2, [/^b1: .*10250/m, /^ +do: .*make firewall HOST=b1/m]);
    assert.doesNotMatch(text, /security group/);
    await b1.sh("nft delete table ip mine");
  });

  test("leaves nothing behind on a box that is removed, and holds for it when it joins again", async () => {
    await t.ok("make remove HOST=b1");
    assert.doesNotMatch(await b1.sh("ip -4 -o addr show dev lo"), /10\.42\.|198\.51\./);
    await t.ok("make agent HOST=b1");
    assert.match((await internal()).b1 ?? "", /^10\.42\.\d+\.0$/);
  });

  test("gives everything back once it is removed", async () => {
    set({});
    await t.says("make -j up", 0, [
      /^a1 +restart k3s and wait until node a1 is Ready with its public address/m,
      /^a1 +give k3s's own metrics-server back/m,
    ]);
    await t.says("make -j up", 0, [/^a1 +nothing to do/m, /^b1 +nothing to do/m]);
    assert.equal(await door(a1, b1), "open");
    assert.match(await types(), /^address-types=ExternalIP$/m);
    for (const box of [a1, b1]) assert.doesNotMatch(await box.sh("ip -4 -o addr show dev lo"), /10\.42\./);
    for (const end = Date.now() + 70_000; (await internal()).b1 !== b1.publicIp; )
      assert(Date.now() < end, JSON.stringify(await internal()));
    await t.says("make check", 0, [/Nothing is wrong/, /^ok +kubelets at 10250 from the server: 3 of 3/m]);
    assert.deepEqual(await top(), ["a1", "b1", "h1"]);
  });
});

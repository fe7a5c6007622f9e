import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { type Facts, Refusal } from "../lib/step.ts";
import { forgotten, uninstall } from "../scripts/remove.ts";
import { A1, B1, B2, MODERN, nodes, wanted } from "./helpers.ts";

const whys = (changes: readonly { why: string }[]) => changes.map(({ why }) => why);
const want = wanted();

describe("what goes from a box", () => {
  test("nothing is left: nothing to do", () => assert.deepEqual(uninstall.plan(want, { left: "\n" }), []));

  test("what runs is stopped before its files go, and the units go last", () => {
    const changes = uninstall.plan(want, {
      left: "/etc/systemd/system/k3s-agent.service\n/usr/local/bin/k3s\nflannel-wg\n",
      running: "k3s-agent\n",
      volumes: "pvc-1\npvc-2\n",
    });
    assert.deepEqual(whys(changes), [
      "stop k3s-agent, and clear pods, mounts, interfaces and rules of k3s",
      "remove k3s's units, binary and data, with 2 local volumes of pods",
    ]);
    const files = changes[1]?.sh ?? "";
    assert.ok(files.indexOf("rm -rf") < files.indexOf("rm -f /etc/systemd/system/k3s.service"));
  });

  test("the firewall's rules go before the files, and only where there are some", () => {
    const changes = uninstall.plan(want, { left: "/usr/local/bin/k3s\nfirewall\n" });
    assert.equal(whys(changes)[1], "take the cluster's rules out of the firewall");
    assert.equal(uninstall.plan(want, { left: "/usr/local/bin/k3s\n" }).length, 2);
  });

  test("an interface alone is cleared too, as after a run that was cut", () =>
    assert.match(whys(uninstall.plan(want, { left: "flannel.1\n" }))[0] ?? "", /^clear pods, mounts/));
});

describe("the cluster forgets", () => {
  const facts: Facts = { nodes: nodes(A1, B1, B2), version: MODERN };
  const forgets = (ip: string, own: string | undefined, over: Facts = {}) =>
    whys(forgotten({ ip }, own).plan(want, { ...facts, ...over }));

  test("the node at the box's address, and its password: a secret", () =>
    assert.deepEqual(forgets(B1.ip, "b1", { secrets: "a1\nb1\nb2\n" }), [
      "delete node b1",
      "delete the password secret of b1",
    ]));
  test("or a line of a file", () =>
    assert.deepEqual(forgets(B1.ip, "b1", { passwords: "a1\nb1\nb2\n" }), [
      "delete node b1",
      "delete the password of b1",
    ]));
  test("a box that does not answer any more", () =>
    assert.deepEqual(forgets(B1.ip, undefined), ["delete node b1"]));
  test("the password of a node that is gone: who comes by its name would be rejected", () =>
    assert.deepEqual(forgets("198.51.101.99", "b9", { passwords: "a1\nb9\n" }), [
      "delete the password of b9",
    ]));
  test("never another box's node that has the same name", () =>
    assert.deepEqual(forgets("198.51.101.99", "b2", { secrets: "b2\n", passwords: "b2\n" }), []));
  test("nothing, where the API does not answer", () =>
    assert.throws(() => forgets(B1.ip, "b1", { nodes: "" }), Refusal));
});

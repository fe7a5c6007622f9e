import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { Failure, Refusal } from "../lib/step.ts";
import { proof, resultOf } from "../scripts/cluster/drill.ts";
import { type Facts, wanted } from "./helpers.ts";

const HASH = "a".repeat(64);
const COUNTS = { verified: true, revision: 426, nodes: 3, deployments: 4, secrets: 6 };
const FOUND = { seconds: "9", nodes: "3", deployments: "4", secrets: "6", memory: "409600" };
const BOX: Facts = {
  arch: "x86_64",
  system: "Linux",
  tools: "/usr/bin/unshare\n/usr/sbin/ip\n/usr/bin/mount",
  k3s: "inactive\ninactive",
};
const planned = (
  facts: Facts,
  settings = {},
  version = "v1.36.3+k3s1",
  counts: typeof COUNTS | undefined = COUNTS,
) => proof("k3s.tar.gz", HASH, { version }, counts).plan(wanted(settings), { ...BOX, ...facts });

describe("a drill of a backup", () => {
  test("is good if k3s finds as many nodes, deployments and secrets as the backup says", () => {
    assert.equal(
      resultOf(FOUND, COUNTS),
      "k3s was ready in 9 s with 400 MB: nodes 3 of 3, deployments 4 of 4, secrets 6 of 6",
    );
  });

  test("fails if one number differs, in either direction", () => {
    for (const [other, says] of [
      [{ nodes: "2" }, "2 nodes, expected 3"],
      [{ secrets: "7" }, "7 secrets, expected 6"],
      [{ deployments: "0" }, "0 deployments, expected 4"],
    ] as const)
      assert.throws(
        () => resultOf({ ...FOUND, ...other }, COUNTS),
        (error) => error instanceof Failure && error.message.includes(says),
      );
  });

  test("says so if the backup has no numbers of its own", () => {
    for (const counts of [undefined, { verified: false }])
      assert.match(
        resultOf(FOUND, counts),
        /: 3 nodes, 4 deployments, 6 secrets; the backup says nothing of itself/,
      );
  });

  test("takes k3s of the backup's release, not of the settings, and does not install it", () => {
    const [download, start, ...rest] = planned({ version: "v1.36.2+k3s1" });
    assert.equal(rest.length, 0);
    assert.equal(download?.why, "download k3s v1.36.3+k3s1 into /var/lib/k3s-drill");
    assert.doesNotMatch(download?.sh ?? "", /\/usr\/local\/bin/);
    assert.match(start?.sh ?? "", /\/var\/lib\/k3s-drill\/k3s server /);
  });

  test("takes the box's k3s if it is of that release", () => {
    const plan = planned({ version: "v1.36.3+k3s1" });
    assert.deepEqual(
      plan.map(({ why }) => why.split(" ")[0]),
      ["start"],
    );
    assert.match(plan[0]?.sh ?? "", /\/usr\/local\/bin\/k3s server /);
  });

  test("takes no checksum that is of another release", () => {
    const sha = "b".repeat(64);
    assert.doesNotMatch(
      planned({}, { K3S_SHA256: sha, K3S_VERSION: "v1.36.2+k3s1" })[0]?.sh ?? "",
      new RegExp(sha),
    );
    assert.match(planned({}, { K3S_SHA256: sha, K3S_VERSION: "v1.36.3+k3s1" })[0]?.sh ?? "", new RegExp(sha));
  });

  test("asks for the state at the backup's revision, or for the last one if that is not known", () => {
    assert.match(planned({})[1]?.sh ?? "", /limit=1000000&resourceVersion=426/);
    assert.doesNotMatch(
      planned({}, {}, "v1.36.3+k3s1", { verified: false } as never)[1]?.sh ?? "",
      /resourceVersion/,
    );
  });

  test("reads no configuration of the box's own k3s, and gives old releases no flag that they do not know", () => {
    assert.match(planned({})[1]?.sh ?? "", /--config=\/var\/lib\/k3s-drill\/data\/config\.yaml/);
    assert.doesNotMatch(planned({}, {}, "v1.17.6+k3s1")[1]?.sh ?? "", /--config=/);
  });

  test("has nothing left to do once it has found something in this archive", () => {
    assert.equal(planned({ found: `seconds=3\nsha256=${HASH}` }).length, 0);
    assert.equal(planned({ found: `seconds=3\nsha256=${"c".repeat(64)}` }).length, 2);
  });

  test("is refused where k3s runs, without Linux, and without the tools for namespaces", () => {
    const cases: [Facts, RegExp][] = [
      [{ k3s: "inactive\nactive" }, /k3s runs on this box/],
      [{ k3s: "activating\ninactive" }, /k3s runs on this box/],
      [{ system: "Darwin" }, /needs Linux/],
      [{ tools: "/usr/bin/mount\n/sbin/ip" }, /no unshare \(packages/],
    ];
    for (const [facts, says] of cases)
      assert.throws(
        () => planned(facts),
        (error) => error instanceof Refusal && says.test(error.message),
      );
  });
});

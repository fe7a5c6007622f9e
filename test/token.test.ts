import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { describe, test } from "node:test";
import type { Settings } from "../lib/settings.ts";
import { Refusal } from "../lib/step.ts";
import { token } from "../scripts/cluster/token.ts";
import { server } from "../scripts/server.ts";
import { B1, type Facts, healthy, MODERN, OLD, prepared, TOKEN, wanted } from "./helpers.ts";

const facts: Facts = {
  ...prepared(MODERN),
  opens: "200",
  token: `${TOKEN}\n`,
  rotates: "   rotate \n",
  active: "active\n",
  version: `${MODERN}\n`,
};
const other = TOKEN.replace(/.{8}$/, "ffffffff");

describe("the token", () => {
  test("is rotated by k3s, without a secret on a command line or in the script", () => {
    const changes = token.plan(wanted(), facts);
    assert.deepEqual(
      changes.map(({ why }) => why.slice(0, 16)),
      ["rotate the token", "restart k3s and ", "forget the token"],
    );
    assert.match(changes[0]?.sh ?? "", /^\/usr\/local\/bin\/k3s token rotate >\/dev\/null$/m);
    for (const { sh } of changes) assert.ok(!sh.includes(TOKEN.slice(-32)));
  });

  test("leads to a restart of the server if a run was interrupted between the rotation and the restart", () =>
    assert.deepEqual(
      token
        .plan(wanted(), { ...facts, token: `${other}\n`, opens: "401" })
        .map(({ why }) => why.slice(0, 11)),
      ["restart k3s"],
    ));

  test("is only written to the env file if a run was interrupted after the restart", () => {
    assert.deepEqual(token.plan(wanted(), { ...facts, token: `${other}\n` }), []);
    assert.deepEqual(token.learn?.(wanted(), { ...facts, token: `${other}\n` }), { K3S_TOKEN: other });
  });

  test("before is kept until k3s has started with the new one", () => {
    const whys = (over: Facts) =>
      token
        .plan(wanted(), { ...facts, rotation: "passwd\ntoken\n", ...over })
        .map(({ why }) => why.slice(0, 16));
    assert.deepEqual(whys({ token: `${other}\n`, opens: "401" }), ["restart k3s and ", "forget the token"]);
    assert.deepEqual(whys({ token: `${other}\n` }), ["forget the token"]);
  });

  test("before is put back where a rotation was torn apart and k3s does not run, on no guess", () => {
    const whys = (over: Facts, want = wanted()) =>
      server
        .plan(want, { ...healthy(MODERN, {}), rotation: "passwd\ntoken\n", ...over })
        .map(({ why }) => why.slice(0, 30));
    const service = "ActiveState=activating\nMainPID=0\nExecMainStartTimestampMonotonic=0\n";
    assert.equal(whys({ service })[0], "start k3s with the token of an");
    for (const over of [{}, { service, rotation: "" }] as Facts[])
      assert.ok(!whys(over).some((why) => why.includes("token")));
  });

  describe("of several servers", () => {
    const sum = (token: string) =>
      `600\n${createHash("sha256")
        .update(token.split(":").at(-1) as string)
        .digest("hex")}\n`;
    const first = wanted({ K3S_DATASTORE_ENDPOINT: "postgres://u:p@h/k3s", SERVER: "a1 b1", HOST: "a1" });
    const second = { ...first, HOST: "b1", PUBLIC_IP: B1.ip };
    const whys = (want: Settings, over: Facts) =>
      token.plan(want, { ...facts, password: sum(TOKEN), ...over }).map(({ why }) => why.slice(0, 23));

    test("is rotated on the first one, which stores it for its next start", () =>
      assert.deepEqual(whys(first, {}), [
        "rotate the token",
        "write /etc/rancher/k3s/",
        "restart k3s and wait un",
        "forget the token before",
      ]));
    test("is stored on the first one even after an interrupted run", () =>
      assert.deepEqual(whys(first, { token: `${other}\n` }), [
        "write /etc/rancher/k3s/",
        "restart k3s and wait un",
      ]));
    test("is stored on the others once, which are restarted, even after an interrupted run", () => {
      const told = { ...second, K3S_TOKEN: other };
      assert.deepEqual(whys(told, {}), ["write /etc/rancher/k3s/", "restart k3s and wait un"]);
      assert.deepEqual(whys(told, { password: sum(other) }), ["restart k3s and wait un"]);
      assert.deepEqual(whys(told, { password: sum(other), token: `${other}\n` }), []);
      assert.deepEqual(token.learn?.(told, facts), {});
      assert.ok(token.plan(told, facts)[0]?.secrets?.includes("K3S_TOKEN"));
    });
  });

  const refused: [string, Facts, Parameters<typeof wanted>[0], RegExp][] = [
    [
      "by a k3s that cannot rotate it, with the reason",
      { rotates: "", version: `${OLD}\n` },
      {},
      /^k3s v1\.17\.6\+k3s1 cannot rotate its token: that came with v1\.25\.15, .* v1\.28\.3/,
    ],
    ["if no server runs", { active: "failed\n" }, {}, /No k3s server runs/],
    ["if there is none", { token: "" }, {}, /No k3s server runs/],
    [
      "if an argument would restore the old one",
      {},
      { SERVER_ARGS: "--token=abc" },
      /SERVER_ARGS gives the server its token/,
    ],
    [
      "if a config file of the user would restore the old one",
      { configs: `${Buffer.from("token: abc").toString("base64")} /etc/rancher/k3s/config.yaml` },
      {},
      /^A config file of yours in \/etc\/rancher\/k3s gives the server its token/,
    ],
  ];
  for (const [name, over, settings, says] of refused)
    test(`is not rotated ${name}`, () =>
      assert.throws(
        () => token.plan(wanted(settings), { ...facts, ...over }),
        (error) => error instanceof Refusal && says.test(error.message),
      ));
});

import assert from "node:assert/strict";
import { createServer } from "node:net";
import { describe, test } from "node:test";
import { age } from "../lib/k3s/backups.ts";
import { Unreachable } from "../lib/shell.ts";
import { Refusal } from "../lib/step.ts";
import { withMoved } from "../scripts/cluster/kubeconfig.ts";
import {
  agentLeaves,
  answersHere,
  hasAnswered,
  isSilent,
  promotedIn,
  replacesToken,
  stopped,
} from "../scripts/cluster/promote.ts";
import { orphans } from "../scripts/cluster/restore.ts";
import { B1, MODERN, OLD, prepared, TOKEN, wanted } from "./helpers.ts";

const CA = "ab".repeat(32);

test("Settings for the lost server alone are named, since no script would take the env file any more", () => {
  const have = {
    SERVER: "a1",
    SERVER_ARGS__a1: "--cluster-cidr=10.52.0.0/16",
    HOST_KEY__a1: "k",
    NODE_LABELS__b1: "x",
  };
  assert.deepEqual(orphans(have, "a1", ["b1", "b2"]), ["SERVER_ARGS__a1", "HOST_KEY__a1"]);
  assert.deepEqual(orphans(have, "a1", ["a1", "b2"]), []);
  assert.deepEqual(orphans({ HOST_KEY__x__a1: "k" }, "a1", ["x__a1"]), []);
});

describe("an old server answers", () => {
  const words: [said: string, silent: boolean][] = [
    ["Could not reach a1: ssh: connect to host 198.51.100.11 port 22: Connection timed out", true],
    ["Could not reach a1: ssh: connect to host 198.51.100.11 port 22: Connection refused", true],
    ["Could not reach a1: ssh: connect to host 198.51.100.11 port 22: No route to host", true],
    ["Could not reach a1: ssh: Could not resolve hostname a1: Name or service not known", true],
    ["Could not reach a1: Connection timed out during banner exchange", false],
    ["Could not reach a1: kex_exchange_identification: Connection closed by remote host", false],
    ["a1 refused the login (Permission denied): check the user and the key", false],
    ["The host key of a1 has changed: compare its fingerprint", false],
    ["Timed out after 40 s: the box, or a command on it, hangs", false],
  ];
  for (const [said, silent] of words)
    test(`${silent ? "no more" : "still"}, where ssh says "${said.slice(0, 90)}"`, () =>
      assert.equal(isSilent(new Unreachable(said)), silent));

  test("only if another error than ssh's is none of its silence", () =>
    assert.equal(isSilent(new Error("Could not reach a1: Connection timed out")), false));

  const statuses: [said: string | undefined, answered: boolean | undefined][] = [
    ["0 0.012\n", true],
    ["35 0.012000\n", true],
    ["28 0.012\n", true],
    ["28 0.000\n", false],
    ["28 0.000000\n", false],
    ["7 0.000\n", false],
    ["6 0.000\n", false],
    ["", undefined],
    [undefined, undefined],
  ];
  for (const [said, answered] of statuses)
    test(`${answered === undefined ? "or not, nobody knows" : answered ? "still" : "no more"}, where curl ends with "${said?.trim() ?? "nothing"}"`, () =>
      assert.equal(hasAnswered(said), answered));

  test("if something takes the connection, whatever it says, and not if nothing listens", async () => {
    const port = await new Promise<number>((done) => {
      const listener = createServer((socket) => void socket.on("error", () => {})).listen(
        0,
        "127.0.0.1",
        () => done((listener.address() as { port: number }).port),
      );
      listener.unref();
    });
    assert.equal(await answersHere("127.0.0.1", port), true);
    assert.equal(await answersHere("127.0.0.1", 1), false);
  });
});

describe("the old server's k3s", () => {
  const step = stopped("a1");
  test("is stopped and disabled, and not a second time", () => {
    for (const runs of ["active\nenabled\n", "inactive\nenabled\n", "activating\ndisabled\n"])
      assert.equal(step.plan(wanted(), { runs }).length, 1, runs);
    for (const runs of ["inactive\ndisabled\n", "failed\ndisabled\n", "inactive\n", ""])
      assert.equal(step.plan(wanted(), { runs }).length, 0, runs);
  });
});

describe("an agent that becomes the server", () => {
  const want = wanted({ PUBLIC_IP: B1.ip });
  const joined = "/etc/systemd/system/k3s-agent.service\n";
  const unit = (ip: string) =>
    `# Written by k3s-across-clouds\nEnvironmentFile=/etc/systemd/system/k3s-agent.service.env\n# Limits other than infinity cost performance: the kernel would have to count.\nExecStart=/usr/local/bin/k3s agent --node-external-ip=${ip}\n`;
  const facts = { joined, cas: `agent ${CA}\n`, "unit-k3s-agent": unit(B1.ip) };
  const plan = (more: Record<string, string> = {}, ca = CA) =>
    agentLeaves(ca, "./x.tar.gz").plan(want, prepared(MODERN, { ...facts, ...more }));

  test("leaves once the backup is found whole; volumes, images, password and binary stay", () => {
    const [checks, change, ...others] = plan();
    assert.equal(others.length, 0);
    assert.equal(checks?.push?.file, "./x.tar.gz");
    assert.doesNotMatch(
      change?.sh ?? "",
      /storage|usr\/local\/bin\/k3s|etc\/rancher|rm -rf \/var\/lib\/rancher\/k3s/,
    );
    assert.match(change?.sh ?? "", /containerd \| \*\/images\) continue/);
  });
  test("has nothing to leave where no agent is", () => assert.deepEqual(plan({ joined: "" }), []));
  test("is not taken from another cluster", () =>
    assert.throws(() => plan({}, "cd".repeat(32)), /an agent of another cluster/));
  test("has the address that HOST names", () =>
    assert.throws(
      () => plan({ "unit-k3s-agent": unit("198.51.101.99") }),
      (error) => error instanceof Refusal && /agent at 198\.51\.101\.99, not at/.test(error.message),
    ));
  test("is not one that this project did not set up", () =>
    assert.throws(() => plan({ "unit-k3s-agent": "[Service]\nExecStart=k3s agent\n" }), Refusal));
});

describe("the token", () => {
  const facts = prepared(MODERN, {
    token: `${TOKEN}\n`,
    rotates: "  rotate \n",
    active: "active\n",
    opens: "200",
    restored: "abc\npromoted\n",
  });
  const want = wanted({ K3S_TOKEN: TOKEN });
  const whys = (more: Record<string, string>) =>
    replacesToken.plan(want, { ...facts, ...more }).map(({ why }) => why);

  test("is replaced once, then that is remembered", () => {
    assert.equal(whys({})[0], "rotate the token");
    assert.deepEqual(whys({ token: `${TOKEN}x\n` }), ["remember that the token was replaced"]);
    assert.deepEqual(whys({ restored: "abc\npromoted\ntoken\n" }), []);
  });
  test("stays where k3s cannot replace it", () =>
    assert.deepEqual(
      replacesToken.plan(want, prepared(OLD, { ...facts, rotates: "" })).map(({ why }) => why),
      ["remember that the token was replaced"],
    ));
});

test("a promotion that was interrupted finds the old server's address on the new one", () => {
  const about = `version=${MODERN}\nnode=a1\nip=198.51.100.11\n`;
  assert.deepEqual(promotedIn({ restored: "abc\npromoted\n", about }), {
    version: MODERN,
    ip: "198.51.100.11",
  });
  assert.equal(promotedIn({ restored: "abc\npasswords\n", about }), undefined, "restored by hand");
  assert.equal(promotedIn({ restored: "", about: "" }), undefined);
});

test("the age of a backup is by its name, in this machine's time", () => {
  const at = Date.parse("2026-11-28T04:15:00Z");
  const cases: [seconds: number, said: string][] = [
    [20, "made less than a minute ago (2026-11-28T04:15:00Z)"],
    [3 * 3600 + 1200, "made 3 h 20 min ago (2026-11-28T04:15:00Z)"],
    [2 * 86_400 + 3600, "made 2 d 1 h ago (2026-11-28T04:15:00Z)"],
    [-500, "made less than a minute ago (2026-11-28T04:15:00Z)"],
  ];
  for (const [seconds, said] of cases)
    assert.equal(age("/home/me/k3s-a1-20261128T041500Z.tar.gz", at + seconds * 1000), said);
  assert.equal(age("mine.tar.gz"), "of unknown age");
});

describe("the user's kubeconfig", () => {
  const ca = "Q0E=";
  const cluster = (name: string, server: string, data = ca) =>
    `- cluster:\n    certificate-authority-data: ${data}\n    server: https://${server}:6443\n  name: ${name}\n`;
  const context = (name: string, more = "") =>
    `- context:\n    cluster: ${name}\n${more}    user: ${name}\n  name: ${name}\n`;
  const user = (name: string) => `- name: ${name}\n  user:\n    token: x\n`;
  const [OLD_NAME, NEW] = ["k3s-198.51.100.11", "k3s-198.51.101.11"];
  const config = (data = ca, current = OLD_NAME) =>
    `apiVersion: v1\nkind: Config\nclusters:\n${cluster("mine", "203.0.113.1")}${cluster(OLD_NAME, "198.51.100.11", data)}contexts:\n${context(OLD_NAME, "    namespace: shop\n")}# a comment\n${context("mine")}current-context: ${current}\nusers:\n${user(OLD_NAME)}${user("mine")}`;
  const access = {
    name: NEW,
    cluster: { "certificate-authority-data": ca, server: "https://198.51.101.11:6443" },
    user: { username: "admin", password: "x" },
  };

  test("gets the new server's context in place of the old one's, with its namespace, and the rest as it was", () => {
    const moved = withMoved(config(), access, OLD_NAME);
    assert.doesNotMatch(moved, /198\.51\.100\.11/);
    assert.match(moved, new RegExp(`^current-context: ${NEW}$`, "m"));
    assert.match(moved, /namespace: shop/);
    for (const kept of [cluster("mine", "203.0.113.1"), context("mine"), user("mine")])
      assert(moved.includes(kept), moved);
    assert.equal(withMoved(moved, access, OLD_NAME), moved);
  });
  test("has its current context left alone where that is another one", () =>
    assert.match(withMoved(config(ca, "mine"), access, OLD_NAME), /^current-context: mine$/m));
  test("keeps a context of that name of another cluster", () =>
    assert.match(withMoved(config("T1RIRVI="), access, OLD_NAME), /198\.51\.100\.11/));
});

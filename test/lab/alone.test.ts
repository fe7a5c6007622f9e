/**
 * Each script alone, with both generations of k3s: over ssh on a1, on the box itself on b1, and on b2 as a user
 * with sudo, the last step by hand with the output of --print. Dry runs and --print come first, and change nothing.
 */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { fileOf } from "../helpers.ts";
import {
  type Bench,
  bench,
  connected,
  envOnBox,
  install,
  MODERN,
  nodes,
  OLD,
  onBox,
  script,
  starts,
  state,
  untouched,
} from "./suite.ts";

const ON_A1 = ["download-k3s", "upgrade-kernel", "install-wireguard", "server", "annotate", "fix-metrics"];
const ON_B1 = ["download-k3s", "upgrade-kernel", "install-wireguard", "agent", "annotate"];
/** What the step reports once there is nothing to do. */
const NOTHING: Record<string, string | RegExp> = {
  "download-k3s": "nothing to do",
  "upgrade-kernel":
    /nothing to do: (wireguard-go is here, WireGuard outside the kernel|WireGuard is in kernel \S+)/,
  "install-wireguard": "nothing to do",
  server: /nothing to do: k3s v1\.\S+ is up to date, node a1 is Ready/,
  agent: /nothing to do: k3s v1\.\S+ is up to date, node b\d is Ready/,
  annotate: /nothing to do: every handshake is fresh, at public addresses/,
  "fix-metrics": "nothing to do: `kubectl top nodes` answers for every node",
};

describe("each script works alone", { concurrency: true }, () => {
  for (const [name, version] of Object.entries({ old: OLD, modern: MODERN }))
    describe(`with k3s ${version}`, { concurrency: 1 }, () => {
      let t: Bench;
      before(async () => {
        t = await bench({ name: `alone-${name}` });
        t.settings({ K3S_VERSION: version }, { agents: "" });
        await install(t, "b1");
      });
      after(() => t?.lab.down());

      /** Dry run, print, the step itself, and a second run: only the third changes the box. */
      async function step(box: string, script: string, run: (flags: string) => string) {
        const fresh = await state(t.box(box));
        const dry = (await t.ok(run("--dry-run"))).out;
        const print = (await t.ok(run("--print"))).out;
        await untouched([t.box(box)], [fresh]);
        const planned = [...dry.matchAll(/^ {2}\d+\. (.*)$/gm)].map((m) => m[1] as string);
        if (planned.length) assert(dry.startsWith(`${box}: ${planned.length} to do\n`), dry);
        else assert.equal(dry, `${box}: nothing to do\n`);
        assert.deepEqual(
          [...print.matchAll(/^# (?!on )(.*)$/gm)]
            .map((m) => m[1])
            .filter((why) => planned.includes(why as string)),
          planned,
          "the printed plan is the one of the dry run",
        );
        const said = (await t.ok(run(""))).text;
        for (const why of planned) assert(said.includes(why), `${script} planned "${why}" and did not do it`);
        const done = await state(t.box(box));
        assert.equal(planned.length > 0, done !== fresh, `${script}: planned ${planned}`);
        await t.says(run(""), 0, [NOTHING[script] as string]);
        await untouched([t.box(box)], [done]);
        return planned;
      }

      test("over ssh, on the server's box", async () => {
        const planned: Record<string, string[]> = {};
        for (const name of ON_A1)
          planned[name] = await step("a1", name, (flags) => script(name, `--host a1 ${flags}`));
        assert.deepEqual(planned["upgrade-kernel"], []);
        assert.deepEqual(planned["download-k3s"], [`download k3s ${version}`, "link kubectl to k3s"]);
        assert.match(
          `${planned["install-wireguard"]}`,
          /^install wireguard-tools \(Debian.*, apt\),prove that a/,
        );
        assert.deepEqual(planned.annotate, [], "server annotates its own node");
        // If metrics-server already answers for this one node, there is nothing to wait for.
        if (name === "old") assert.match(planned["fix-metrics"]?.[0] ?? "", /^deploy metrics-server/);
        else assert.deepEqual(planned["fix-metrics"], []);
      });

      test("on an agent's own box, without ssh", async () => {
        const { K3S_URL = "", K3S_TOKEN = "" } = t.env();
        await envOnBox(t, "b1", { K3S_VERSION: version, K3S_MIRRORS: t.mirrors, K3S_URL, K3S_TOKEN });
        const ip = t.box("b1").publicIp;
        for (const name of ON_B1)
          await step("b1", name, (flags) => {
            const own = /agent|annotate/.test(name) ? `--public-ip ${ip}` : "";
            return onBox("b1", `${fileOf(name)} ${own} ${flags}`);
          });
        await connected([t.box("a1"), t.box("b1")]);
      });

      test("on the server's own box, without ssh", async () => {
        await install(t, "a1");
        await envOnBox(t, "a1", { K3S_VERSION: version, K3S_MIRRORS: t.mirrors });
        const before = await state(t.box("a1"));
        for (const name of ON_A1) {
          const own = /server|annotate/.test(name) ? "--public-ip 198.51.100.11" : "";
          await t.says(onBox("a1", `${fileOf(name)} ${own}`), 0, [NOTHING[name] as string]);
        }
        // server has written the URL and token to the box's own env file.
        const lines = (text: string) => text.split("\n").filter((line) => !/k3s-across-clouds/.test(line));
        assert.deepEqual(lines(await state(t.box("a1"))), lines(before));
        const env = await t.box("a1").sh("cd /root/k3s-across-clouds; stat -c %a .env; cat .env");
        assert(
          env.startsWith("600\n") && env.includes("\nK3S_URL=https://198.51.100.11:6443\nK3S_TOKEN=K10"),
        );
      });

      test("for a user who is not root but has sudo", async () => {
        const host = "--host debian@b2";
        for (const name of ["download-k3s", "install-wireguard"])
          await step("b2", name, (flags) => script(name, `${host} ${flags}`));
        const other = script("server", "--host debian@a1 --server-args=--disable=traefik");
        await t.says(other, 0, ["restart k3s"]);
        await t.says(other, 0, [NOTHING.server as string]);
        await t.says(script("server", "--host debian@a1"), 0, ["restart k3s"]);
      });

      test("by hand, as the output of --print that sh runs on the box with the secrets in the environment", async () => {
        const { K3S_TOKEN = "" } = t.env();
        const plan = (await t.ok(script("agent", "--host debian@b2 --print"))).out;
        assert.match(plan, /^# on b2\n#!\/bin\/sh\n/);
        await t.ok("ssh b2 'cat >plan.sh'", { input: plan });
        await t.says("ssh b2 sh plan.sh", 2, [/K3S_TOKEN: is a secret: set it before you run this/]);
        await t.ok("ssh b2 sh -s", { input: `K3S_TOKEN=${K3S_TOKEN} sh plan.sh\nrm plan.sh\n` });
        await connected(t.lab.boxes);
        const before = await state(t.box("b2"));
        await t.says(script("agent", "--host debian@b2"), 0, [NOTHING.agent as string]);
        await untouched([t.box("b2")], [before]);
        assert.deepEqual(Object.keys(await nodes(t.box("a1"))), ["a1", "b1", "b2"]);
      });

      if (name === "old")
        test("and annotate corrects a wrong public address with one restart", async () => {
          const key = "flannel.alpha.coreos.com/public-ip-overwrite";
          await t.box("a1").sh(`kubectl annotate --overwrite node b2 ${key}=192.168.0.12`);
          await t.box("b2").sh("systemctl restart k3s-agent; sleep 3");
          const before = await Promise.all(t.lab.boxes.map(starts));
          await t.says("make annotate HOST=debian@b2", 0, [
            "annotate node b2: public-ip-overwrite 192.168.0.12 -> 198.51.101.12",
          ]);
          await connected(t.lab.boxes);
          const [a1, b1, b2] = await Promise.all(t.lab.boxes.map(starts));
          assert.deepEqual([a1, b1, b2], [before[0], before[1], (before[2] ?? 0) + 1]);
        });

      test("and fix-metrics stays effective after a restart of k3s", async () => {
        await t.box("a1").sh("systemctl restart k3s");
        await t.ok("make server");
        await t.says("make fix-metrics", 0);
        const top = await t.box("a1").sh("kubectl top nodes --no-headers");
        assert.deepEqual([...top.matchAll(/^\w+/gm)].map(String), ["a1", "b1", "b2"]);
        await t.says("make fix-metrics", 0, [NOTHING["fix-metrics"] as string]);
      });
    });
});

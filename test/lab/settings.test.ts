/** Settings of boxes and nodes: a changed setting affects only what depends on it. With both generations of k3s. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { appendFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { quote } from "../../lib/sh.ts";
import { standIn } from "../stand-in/pack.ts";
import {
  type Bench,
  bench,
  connected,
  hangUp,
  held,
  holdRestarts,
  MODERN,
  mirrored,
  OLD,
  starts,
  state,
  untouched,
} from "./suite.ts";

describe("settings", { concurrency: true }, () => {
  for (const [generation, version] of Object.entries({ old: OLD, modern: MODERN }))
    describe(`with k3s ${version}`, { concurrency: 1 }, () => {
      let t: Bench;
      before(async () => {
        t = await bench({ name: `settings-${generation}`, boxes: ["a1", "b1", "b2"] });
        // The server has a token of the user, which may be any that k3s accepts.
        await t.box("a1").sh(`printf '%s\\n' ${quote(ODD)} >/root/token`);
        env({ SERVER_ARGS: "--token-file=/root/token" });
        await t.ok("make -j up");
        assert.equal(t.env().K3S_TOKEN?.replace(/^.*?::server:/, ""), ODD);
        env();
        await t.ok("make -j up");
      });
      after(() => t?.lab.down());

      /** Rewrites the operator's env file, but keeps the URL and token. */
      let learned: Record<string, string> = {};
      function env(more: Record<string, string> = {}) {
        try {
          const { K3S_URL, K3S_TOKEN } = t.env();
          if (K3S_URL && K3S_TOKEN) learned = { K3S_URL, K3S_TOKEN };
        } catch {}
        t.settings({ K3S_VERSION: version, ...learned, ...more });
      }

      /** While `part` runs, k3s is started this often on a1, b1 and b2; afterwards there is nothing to do. */
      async function restarts(expected: [number, number, number], part: () => Promise<unknown>) {
        const before = await Promise.all(t.lab.boxes.map(starts));
        await part();
        const now = await Promise.all(t.lab.boxes.map(starts));
        assert.deepEqual(
          now.map((n, i) => n - (before[i] as number)),
          expected,
          "starts of k3s",
        );
        const done = await Promise.all(t.lab.boxes.map(state));
        const { text } = await t.ok("make -j up");
        assert.equal(text.match(/nothing to do/g)?.length, 3, text);
        await untouched(t.lab.boxes, done);
      }

      const node = async (name: string) =>
        JSON.parse(await t.box("a1").sh(`kubectl get node ${name} -o json`));

      test("are shown by a dry run as changed lines of the unit, and nothing is changed", async () => {
        env({
          SERVER_ARGS: "--disable=traefik --write-kubeconfig-mode=640",
          AGENT_ARGS__b2: "--kubelet-arg=v=2",
        });
        const before = await Promise.all(t.lab.boxes.map(state));
        const { out } = await t.ok("make up DRY=1");
        assert.match(
          out,
          /a1: 2 to do\n {2}1\. write \/etc\/systemd\/system\/k3s\.service:\n {7}\+ --disable=traefik\n {7}\+ --write-kubeconfig-mode=640\n {2}2\. restart k3s and/,
        );
        assert.match(out, /b1: nothing to do/);
        assert.match(
          out,
          /b2: 2 to do\n {2}1\. write \/etc\/systemd\/system\/k3s-agent\.service:\n {7}\+ --kubelet-arg=v=2\n/,
        );
        await untouched(t.lab.boxes, before);
      });

      test("for labels and taints of a box apply only to its node, with one restart", async () => {
        env({
          NODE_LABELS__b1: "disk=ssd shelf=left",
          NODE_LABELS__a1: "disk=hdd",
          NODE_TAINTS__a1: "control=plane:NoSchedule",
        });
        await restarts([1, 1, 0], () => t.ok("make -j up"));
        assert.equal((await node("b1")).metadata.labels.disk, "ssd");
        assert.equal((await node("a1")).metadata.labels.disk, "hdd");
        assert.equal((await node("b2")).metadata.labels.disk, undefined);
        assert.deepEqual((await node("a1")).spec.taints, [
          { key: "control", value: "plane", effect: "NoSchedule" },
        ]);
      });

      test("are completed by the next run if one was interrupted between removing a label and changing the unit", async () => {
        env({ NODE_LABELS__b1: "shelf=right" });
        await holdRestarts(t.box("b1"));
        const run = await t.cut("make agent HOST=b1", /restart k3s-agent and wait/, "KILL");
        assert(run.reached, run.text);
        await held(t.box("b1"));
        await hangUp(t.box("b1"));
        await t.box("b1").sh("rm /usr/local/sbin/systemctl");
        assert.deepEqual((await node("b1")).metadata.labels.disk, undefined);
        await restarts([1, 1, 0], () => t.ok("make -j up"));
        const { labels } = (await node("b1")).metadata;
        assert.deepEqual([labels.disk, labels.shelf], [undefined, "right"]);
        assert.equal((await node("a1")).spec.taints, undefined);
      });

      test("in K3S_CONFIG are used by modern k3s, and refused for old k3s and if an agent does not accept them", async () => {
        const file = join(t.lab.dir, "home", "config.yaml");
        writeFileSync(file, "# of b2 alone\nkubelet-arg:\n  - max-pods=50\ndebug: true\n");
        env({ K3S_CONFIG__b2: file });
        if (generation === "old") {
          await t.says("make agent HOST=b2", 2, ["K3S_CONFIG needs k3s v1.26 or later, not v1.17.6+k3s1"]);
          return;
        }
        // b1 loses its labels.
        await restarts([0, 1, 1], () => t.ok("make -j up"));
        const path = "/etc/rancher/k3s/config.yaml.d/across-clouds.yaml";
        assert.equal((await t.box("b2").sh(`stat -c '%a %U' ${path}`)).trim(), "600 root");
        const args = (await node("b2")).metadata.annotations["k3s.io/node-args"];
        assert.match(args, /"--kubelet-arg","max-pods=50","--debug","true"/);
        assert.equal((await t.box("b1").sh("ls -A /etc/rancher")).trim(), "node");
        // How an agent reacts to such a key, and how a file of the user with one is refused.
        const ended = await t
          .box("b2")
          .sh("cd /etc/rancher/k3s; echo 'disable: traefik' >config.yaml; k3s agent 2>&1 || echo ended $?");
        assert.match(ended, /flag provided but not defined: -disable.*ended 1\n/s);
        await t.says("make agent HOST=b2", 2, [
          /\/etc\/rancher\/k3s\/config\.yaml on this box.* has disable: only/,
        ]);
        await t.box("b2").sh("rm /etc/rancher/k3s/config.yaml");
        writeFileSync(file, "disable: traefik\n");
        await t.says("make agent HOST=b2", 2, [/K3S_CONFIG of this box has disable: only servers know it/]);
        writeFileSync(file, "token: x\n");
        await t.says("make agent HOST=b2", 2, [/it has token, expected it in K3S_TOKEN/]);
      });

      test("for registry mirrors and a proxy apply to each box with a single restart, and their files are removed with them", async () => {
        const proxy = "http://someone:hunter2@203.0.113.254:3128";
        t.secret("hunter2");
        env({
          REGISTRY_MIRRORS: "docker.io=https://one.example docker.io=https://two.example:5000",
          REGISTRY_MIRRORS__b2: "",
          HTTPS_PROXY__b1: proxy,
          NO_PROXY: "mine.example",
        });
        // b2 loses its K3S_CONFIG.
        await restarts([1, 1, generation === "old" ? 0 : 1], () => t.ok("make -j up"));
        assert.equal(await t.box("b2").sh("find /etc/rancher -name 'across*'"), "");
        const file = await t.box("b1").sh("cat /etc/rancher/k3s/registries.yaml");
        assert.match(
          file,
          /\n {2}"docker\.io":\n {4}endpoint:\n {6}- "https:\/\/one\.example"\n {6}- "https:\/\/two/,
        );
        const environment = await t
          .box("b1")
          .sh(
            "stat -c %a /etc/systemd/system/k3s-agent.service.env; tr '\\0' '\\n' </proc/$(systemctl show k3s-agent -p MainPID --value)/environ",
          );
        assert(
          environment.startsWith("600\n") && environment.includes(`\nHTTPS_PROXY=${proxy}\n`),
          environment,
        );
        assert.match(
          environment,
          /^NO_PROXY=mine\.example,localhost,127\.0\.0\.0\/8,10\.42\.0\.0\/16,10\.43\.0\.0\/16,\.svc,\.cluster\.local,198\.51\.100\.11,198\.51\.101\.11$/m,
        );
        env();
        await restarts([1, 1, 0], () => t.ok("make -j up"));
        assert.equal(await t.box("b1").sh("ls /etc/rancher/k3s 2>/dev/null || true"), "");
      });

      test("for a proxy apply to downloads too, including packages", async () => {
        const log = join(t.lab.dir, "home/proxy.log");
        await t.ok(
          `node -e ${quote(PROXY)} 3128 ${log} >/dev/null 2>&1 & until grep -q listens ${log} 2>/dev/null; do sleep 0.1; done`,
        );
        await t.box("b2").sh("rm /usr/local/bin/k3s; dpkg -r wireguard-tools");
        env({ HTTP_PROXY__b2: "http://203.0.113.254:3128" });
        await t.ok("make download-k3s HOST=b2");
        await t.ok("make install-wireguard HOST=b2");
        const asked = readFileSync(log, "utf8");
        // apt still has the package itself.
        assert.match(asked, /^198\.51\.101\.12 GET http:\/\/203\.0\.113\.82\/\.\/Release$/m);
        assert.match(asked, /^198\.51\.101\.12 GET http:\/\/203\.0\.113\.81\/k3s-io\/.*\/k3s$/m);
        assert.match(
          asked,
          /^198\.51\.101\.12 GET http:\/\/203\.0\.113\.80\/k3s-io\/.*sha256sum-amd64\.txt$/m,
        );
        env();
        await t.ok("make agent HOST=b2");
      });

      const images = `k3s-airgap-images-amd64.${generation === "old" ? "tar" : "tar.zst"}`;
      const folder = "/var/lib/rancher/k3s/agent/images";
      const SIZE = 900_000_000;

      test("with AIRGAP download images from one mirror and their checksum from another, and then restart k3s", async () => {
        const text = "images\n".repeat(100_000);
        for (const address of ["203.0.113.80", "203.0.113.81"]) {
          const path = mirrored(t.lab, address, `k3s-io/k3s/releases/download/${version}`);
          writeFileSync(join(path, images), text);
          appendFileSync(
            join(path, "sha256sum-amd64.txt"),
            `${createHash("sha256").update(text).digest("hex")}  ${images}\n`,
          );
        }
        env({ AIRGAP__b1: "yes" });
        const asked = await t.requests(() => restarts([0, 1, 0], () => t.ok("make -j up")));
        assert.equal(asked.length, 2, asked.join("\n"));
        assert.equal(
          (await t.box("b1").sh(`ls ${folder}; wc -c <${folder}/${images}`)).trim(),
          `${images}\n700000`,
        );
      });

      test("with AIRGAP and K3S_BIN push images once, and the next run resumes an interrupted push", async () => {
        const home = join(t.lab.dir, "home/airgap");
        mkdirSync(home);
        writeFileSync(join(home, "k3s"), standIn(version));
        writeFileSync(join(home, images), Buffer.alloc(SIZE));
        env({ AIRGAP__b1: "yes", K3S_BIN__b2: join(home, "k3s") });
        const { text } = await t.op(
          [
            "bash",
            "-c",
            `set -m
make agent HOST=b2 & pid=$!
while kill -0 $pid 2>/dev/null && [ "$(ssh b2 'cat ${folder}-*.part 2>/dev/null | head -c 2000000 | wc -c')" -lt 2000000 ]; do :; done
kill -KILL -- -$pid && echo cut`,
          ],
          { env: { TMPDIR: "/run" } },
        );
        assert.match(text, /^cut$/m);
        await t.box("b2").sh("sleep 1");
        const part = await t
          .box("b2")
          .sh(`cd ${folder}/..; stat -c '%s' images-*.part; ls images 2>/dev/null || true`);
        assert(Number(part) > 0 && Number(part) < SIZE, part);
        await restarts([0, 0, 1], () => t.ok("make -j up"));
        const there = await t.box("b2").sh(`cd ${folder}; stat -c '%n %a' *`);
        assert.equal(there, `${images} 600\n`);
        assert.equal(await t.box("b2").sh(`ls ${folder}/.. | grep part || true`), "");
      });

      test("for an agent's taints apply when it joins, and later ones are refused with the command that sets them", async () => {
        await t.lab.add("b3");
        await t
          .box("b3")
          .sh(
            "systemd-run -q -u other systemd-socket-activate -l 10250 cat; until ss -ltn | grep -q :10250; do :; done",
          );
        const fresh = await state(t.box("b3"));
        await t.says("make agent HOST=b3", 2, [
          /10250\/tcp on this box, which k3s needs, is taken by systemd-socket\S* \(process \d+\): stop it/,
        ]);
        await untouched([t.box("b3")], [fresh]);
        await t.box("b3").sh("systemctl stop other");
        env({ NODE_TAINTS__b3: "spot=yes:NoSchedule" });
        await t.ok("make agent HOST=b3");
        assert.deepEqual((await node("b3")).spec.taints, [
          { key: "spot", value: "yes", effect: "NoSchedule" },
        ]);
        env({ NODE_TAINTS__b3: "spot=no:NoSchedule" });
        const said = await t.says("make agent HOST=b3", 2, [
          /no agent change its own: on the server run "kubectl taint/,
        ]);
        const [, line = ""] = /run "(kubectl taint [^"]*)"/.exec(said.text) ?? [];
        await t.box("a1").sh(line);
        await t.ok("make agent HOST=b3");
        await t.says("make agent HOST=b3", 0, ["nothing to do"]);
        assert.deepEqual((await node("b3")).spec.taints, [
          { key: "spot", value: "no", effect: "NoSchedule" },
        ]);
      });

      test("leave a cluster in which all boxes reach each other", () => connected(t.lab.boxes));
    });
});

/** With characters that shells, sed, curl, dotenv and systemd interpret. */
const ODD = "change::me:! '$(id)\\\\&/#";

/** A proxy for plain http that records the requests. */
const PROXY = `const { appendFileSync } = require("node:fs"), http = require("node:http");
const [port, log] = process.argv.slice(1);
http.createServer((asked, answer) => {
  appendFileSync(log, asked.socket.remoteAddress.replace("::ffff:", "") + " " + asked.method + " " + asked.url + "\\n");
  const { method, headers } = asked;
  asked.pipe(http.request(asked.url, { method, headers }, (got) => {
    answer.writeHead(got.statusCode, got.headers);
    got.pipe(answer);
  }).on("error", () => answer.destroy()));
}).listen(port, () => appendFileSync(log, "listens\\n"));`;

import assert from "node:assert/strict";
import { mkdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { describe, test } from "node:test";
import { WRITTEN_BY } from "../lib/k3s/unit.ts";
import { Refusal } from "../lib/step.ts";
import { forgotten, uninstall } from "../scripts/cluster/remove.ts";
import { A1, B1, B2, type Facts, MODERN, nodes, programs, shell, temporary, wanted } from "./helpers.ts";

const whys = (changes: readonly { why: string }[]) => changes.map(({ why }) => why);
const want = wanted();

describe("make remove on a box", () => {
  test("changes nothing if nothing of k3s is left", () =>
    assert.deepEqual(uninstall.plan(want, { left: "\n" }), []));

  test("stops k3s before it removes its files, and removes the units last", () => {
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

  test("removes k3s-keepalive.service too, but not one that somebody else has written", () => {
    const folder = temporary();
    const ours = [join(folder, "k3s-keepalive.service"), join(folder, "k3s-keepalive")];
    const look = `fact() { :; }\n${uninstall.look(want).at(-1)}`;
    const left = () =>
      shell(look.replaceAll(/\/etc\/systemd\/system|\/usr\/local\/bin/g, folder)).stdout.match(
        /.*keepalive.*/g,
      ) ?? [];
    for (const file of ours) writeFileSync(file, "[Service]\n");
    assert.deepEqual(left(), []);
    for (const file of ours) writeFileSync(file, `#!/bin/bash\n${WRITTEN_BY}\n`);
    assert.deepEqual(left(), ours);
    const named = (left: string) =>
      uninstall
        .plan(want, { left })
        .flatMap(({ sh }) => sh.match(/\S+\/(bin\/k3s-keepalive|k3s-keepalive\.service)/g) ?? []);
    assert.deepEqual(named("/usr/local/bin/k3s\n"), []);
    const [unit, program] = ["/etc/systemd/system/k3s-keepalive.service", "/usr/local/bin/k3s-keepalive"];
    assert.deepEqual(named(`${unit}\n${program}\n`), [unit, program, unit, unit]);
  });

  test("takes away an entry of devices, and names the devices that lose it", () => {
    const [unit, program] = ["/etc/systemd/system/k3s-devices.service", "/usr/local/sbin/k3s-devices"];
    const changes = uninstall.plan(want, {
      left: `${unit}\n${program}\n/etc/rancher/k3s-devices\n/usr/local/bin/k3s\n`,
      "peers-file": `# phone phone\n[Peer]\nPublicKey = ${"P".repeat(42)}A=\nAllowedIPs = 10.44.0.2/32\n`,
    });
    assert.match(whys(changes).at(-1) ?? "", /; phone cannot come in by it any more \(make devices\)$/);
    assert.match(changes[0]?.sh ?? "", new RegExp(`for unit in ${unit} `));
    assert.match(changes[1]?.sh ?? "", new RegExp(`for path in ${program} .* /etc/rancher/k3s-devices;`));
    assert.doesNotMatch(uninstall.plan(want, { left: "/usr/local/bin/k3s\n" })[1]?.sh ?? "", /sbin/);
  });

  test("removes the firewall's rules before the files, if there are any", () => {
    const changes = uninstall.plan(want, { left: "/usr/local/bin/k3s\nfirewall\n" });
    assert.equal(whys(changes)[1], "take the cluster's rules out of the firewall");
    assert.equal(uninstall.plan(want, { left: "/usr/local/bin/k3s\n" }).length, 2);
  });

  test("takes every address from lo that the unit has put there", () => {
    const dir = temporary();
    const PATH = programs(join(dir, "bin"), { ip: `echo "$*" >>${dir}/log` });
    writeFileSync(
      join(dir, "k3s.service"),
      ["flush dev lo label lo:k3s; ip addr replace 198.51.100.11", "replace 10.42.0.0"]
        .map((ip) => `ExecStartPre=/bin/sh -c 'ip addr ${ip}/32 dev lo label lo:k3s'\n`)
        .join(""),
    );
    const [first = ""] = (uninstall.plan(want, { left: "/usr/local/bin/k3s\n" }).at(-1)?.sh ?? "").split(
      "for path",
    );
    assert.equal(
      shell(`set -eu\n${first.replaceAll("/etc/systemd/system", dir)}`, undefined, { PATH }).status,
      0,
    );
    assert.equal(
      readFileSync(join(dir, "log"), "utf8"),
      "addr del 198.51.100.11/32 dev lo\naddr del 10.42.0.0/32 dev lo\n",
    );
  });

  test("removes a leftover interface too, as after an interrupted run", () =>
    assert.match(whys(uninstall.plan(want, { left: "flannel.1\n" }))[0] ?? "", /^clear pods, mounts/));
});

describe("a folder of k3s that is a symlink to a disk of the user", () => {
  /** A box's files, with such links, and what a shell says and leaves of them. */
  function box(links: Record<string, string>, files: string[]) {
    const dir = temporary();
    const PATH = programs(join(dir, "bin"), {
      systemctl: "exit 0",
      ip: "exit 1",
      ss: "exit 1",
      nft: "exit 1",
    });
    const inDir = (script: string) => script.replaceAll(/(?<![\w.$}])\/(var|run|etc|usr)\//g, `${dir}/$1/`);
    for (const path of [...files, ...Object.keys(links)])
      mkdirSync(join(dir, dirname(path)), { recursive: true });
    for (const [path, to] of Object.entries(links)) {
      mkdirSync(join(dir, to), { recursive: true });
      symlinkSync(join(dir, to), join(dir, path));
    }
    for (const path of files) {
      mkdirSync(join(dir, dirname(path)), { recursive: true });
      writeFileSync(join(dir, path), "x");
    }
    const look = () => {
      const { stdout } = shell(
        `PATH=${PATH}\nfact() { printf '=%s\\n' "$1"; }\n${inDir(uninstall.look(want).join("\n"))}`,
      );
      const facts = Object.fromEntries(
        stdout.split(/^=/m).map((text) => [text.split("\n")[0], text.replace(/^.*\n/, "")]),
      );
      return { left: "/usr/local/bin/k3s\n", links: facts.links, inner: facts.inner };
    };
    const facts = look();
    const change = uninstall.plan(want, facts).at(-1);
    const { status, stdout, stderr } = shell(`PATH=${PATH}\nset -eu\n${inDir(change?.sh ?? "")}`);
    assert.equal(status, 0, stdout + stderr);
    const left = shell(`cd ${dir}; find . ! -type d ! -path './bin/*' | sort`).stdout;
    return {
      why: change?.why.replaceAll(dir, ""),
      left: left.replaceAll("./", "").trim().split("\n").filter(Boolean),
    };
  }

  test("loses the files of k3s, and keeps all others", () => {
    const { why, left } = box(
      {
        "var/lib/rancher/k3s": "mnt/disk",
        "var/lib/kubelet": "mnt/a disk/kubelet",
        "var/log/pods": "mnt/logs",
        "etc/rancher/k3s": "mnt/etc",
      },
      [
        ...[
          "server/tls/server-ca.key",
          "server/token",
          "agent/x",
          "data/.lock",
          "storage/pvc-1/x",
          "photos/1.jpg",
        ].map((name) => `mnt/disk/${name}`),
        "mnt/a disk/kubelet/pods/1/x",
        "mnt/a disk/kubelet/cpu_manager_state",
        "mnt/a disk/kubelet/mine",
        "mnt/logs/kube-system_x_1/0.log",
        "mnt/logs/nginx.log",
        "mnt/etc/k3s.yaml",
        "mnt/etc/config.yaml",
        "usr/local/bin/k3s",
      ],
    );
    assert.match(
      why ?? "",
      /\/var\/lib\/rancher\/k3s leads to \/mnt\/disk: what k3s has made there goes, the rest stays; \/var\/lib\/kubelet leads to/,
    );
    assert.deepEqual(left, [
      "mnt/a disk/kubelet/mine",
      "mnt/disk/photos/1.jpg",
      "mnt/etc/config.yaml",
      "mnt/logs/nginx.log",
    ]);
  });

  test("within another folder of k3s is listed, and its target is kept", () => {
    const { why, left } = box(
      { "var/lib/rancher/k3s/server": "mnt/server", "var/lib/rancher/k3s/agent/containerd": "mnt/images" },
      ["mnt/server/tls/server-ca.key", "mnt/images/x", "var/lib/rancher/k3s/agent/x"],
    );
    assert.match(
      why ?? "",
      /\/var\/lib\/rancher\/k3s\/server leads to \/mnt\/server, which stays with all that is in it/,
    );
    assert.match(why ?? "", /agent\/containerd leads to \/mnt\/images, which stays/);
    assert.deepEqual(left, ["mnt/images/x", "mnt/server/tls/server-ca.key"]);
  });

  test("is not listed if it is a symlink of k3s itself", () => {
    const { why, left } = box({ "var/lib/rancher/k3s/data/current": "var/lib/rancher/k3s/data/abc" }, [
      "var/lib/rancher/k3s/x",
    ]);
    assert.equal(why, "remove k3s's units, binary and data");
    assert.deepEqual(left, []);
  });
});

describe("make remove deletes from the cluster", () => {
  const facts: Facts = { nodes: nodes(A1, B1, B2), version: MODERN };
  const forgets = (ip: string, own: string | undefined, over: Facts = {}) =>
    whys(forgotten({ ip }, own).plan(want, { ...facts, ...over }));

  test("the node at the box's address, and its password in a secret", () =>
    assert.deepEqual(forgets(B1.ip, "b1", { secrets: "a1\nb1\nb2\n" }), [
      "delete node b1",
      "delete the password secret of b1",
    ]));
  test("the node at the box's address, and its password in a file", () =>
    assert.deepEqual(forgets(B1.ip, "b1", { passwords: "a1\nb1\nb2\n" }), [
      "delete node b1",
      "delete the password of b1",
    ]));
  test("the node of a box that no longer answers", () =>
    assert.deepEqual(forgets(B1.ip, undefined), ["delete node b1"]));
  test("the password of a node that no longer exists, because it would prevent a join with that name", () =>
    assert.deepEqual(forgets("198.51.101.99", "b9", { passwords: "a1\nb9\n" }), [
      "delete the password of b9",
    ]));
  test("no node of another box that has the same name", () =>
    assert.deepEqual(forgets("198.51.101.99", "b2", { secrets: "b2\n", passwords: "b2\n" }), []));
  test("nothing if the API does not answer, which is an error", () =>
    assert.throws(() => forgets(B1.ip, "b1", { nodes: "" }), Refusal));
});

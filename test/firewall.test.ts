import assert from "node:assert/strict";
import { describe, test } from "node:test";
import * as firewall from "../lib/firewall.ts";
import { type Facts, Refusal } from "../lib/step.ts";
import { look, programs, shell, temporary, wanted } from "./helpers.ts";

const [A, B] = ["198.51.100.11", "198.51.101.11"];
const NODES = [A, B];
const RANGES = ["10.42.0.0/16", "10.43.0.0/16"] as const;
const blocked = (facts: Facts, nodes: string[]) => firewall.blocked(facts, nodes, RANGES);
const firewallPlan = (facts: Facts, nodes: string[]) => firewall.firewallPlan(facts, nodes, RANGES);
const scriptText = (nodes: string[]) => firewall.scriptText(nodes, RANGES[0]);
const shOf = (facts: Facts, nodes = NODES) =>
  firewallPlan(facts, nodes)
    .map(({ sh }) => sh)
    .join("\n")
    .split("\n");

describe("firewalld", () => {
  const rule = (ip: string, port: string, protocol: string) =>
    `rule family="ipv4" source address="${ip}" port port="${port}" protocol="${protocol}" accept`;
  const all = NODES.flatMap((ip) => [
    rule(ip, "6443", "tcp"),
    rule(ip, "10250", "tcp"),
    rule(ip, "51820", "udp"),
  ]);
  /** As a box has it, the same at runtime and for good. */
  const zone = (ports: string, rules: string[], sources: string): Facts => ({
    firewalld: "running\n",
    zone: "public\n",
    target: "default\n",
    ...Object.fromEntries(
      ["", "--permanent"].flatMap((when) => [
        [`ports${when}`, ports],
        [`rules${when}`, rules.join("\n")],
        [`sources${when}`, sources],
      ]),
    ),
  });
  const well = zone("80/tcp", [...all, 'rule service name="dns" accept'], "10.42.0.0/16 10.43.0.0/16");

  test("as it comes blocks the nodes and the pods, and says so", () => {
    const fresh = zone("", [], "");
    assert.deepEqual(blocked(fresh, NODES), [
      `firewalld (zone public) drops 6443/tcp from ${A}, ${B}`,
      `firewalld (zone public) drops 10250/tcp from ${A}, ${B}`,
      `firewalld (zone public) drops 51820/udp from ${A}, ${B}`,
      "firewalld (zone public) drops everything from 10.42.0.0/16",
      "firewalld (zone public) drops everything from 10.43.0.0/16",
    ]);
    const commands = shOf(fresh);
    assert.equal(commands.length, 2 * (6 + 2));
    for (const command of commands)
      assert.match(
        command,
        /^firewall-cmd -q (--permanent )?--zone=(public --add-rich-rule|trusted --add-source)=/,
      );
  });
  test("with all of it is left alone", () => {
    assert.deepEqual(blocked(well, NODES), []);
    assert.deepEqual(firewallPlan(well, NODES), []);
  });
  test("that only forgets at the next start is put right", () => {
    const commands = shOf({ ...well, "rules--permanent": "" });
    assert.equal(commands.length, 6);
    for (const command of commands)
      assert.match(command, /^firewall-cmd -q --permanent --zone=public --add-rich-rule=/);
  });
  test("loses a node that has left, and keeps rules that are not ours", () =>
    assert.deepEqual(
      shOf(well, [A]),
      ["", "--permanent "].flatMap((when) =>
        all.slice(3).map((r) => `firewall-cmd -q ${when}--zone=public --remove-rich-rule='${r}'`),
      ),
    ));
  test("loses k3s's ports that are open to everybody, and keeps the others", () => {
    const commands = shOf(
      zone(
        "22/tcp 10250/tcp 6443/tcp 30000-32767/tcp 10255-10256/tcp 51820/udp 443/udp",
        all,
        "10.42.0.0/16 10.43.0.0/16",
      ),
    );
    assert.deepEqual(
      commands.filter((c) => !c.includes("--permanent")).map((c) => c.split("=").at(-1)),
      ["10250/tcp", "6443/tcp", "10255-10256/tcp", "51820/udp"],
    );
  });
  test("with a port open to everybody does not block it", () =>
    assert.deepEqual(
      blocked(zone("6443/tcp 10250/tcp 51800-51900/udp", [], "10.42.0.0/16 10.43.0.0/16"), NODES),
      [],
    ));
  test("in a zone that accepts everything is refused: nothing there can be closed", () => {
    assert.throws(() => firewallPlan({ ...well, target: "ACCEPT\n" }, NODES), Refusal);
    assert.deepEqual(blocked({ ...zone("", [], ""), target: "ACCEPT\n" }, NODES), []);
  });
});

describe("ufw", () => {
  const status =
    "Status: active\nLogging: on (low)\nDefault: deny (incoming), allow (outgoing), disabled (routed)\n";
  const ours = [
    ...NODES.flatMap((ip) => [
      `allow from ${ip} to any port 6443 proto tcp`,
      `allow from ${ip} to any port 10250 proto tcp`,
      `allow from ${ip} to any port 51820 proto udp`,
    ]),
    "allow from 10.42.0.0/16",
    "allow from 10.43.0.0/16",
  ];
  const added = (rules: string[]) =>
    `Added user rules (see 'ufw status' for running firewall):\n${rules.map((rule) => `ufw ${rule}\n`).join("")}`;
  const marked = ours.map((rule) => `${rule} comment 'k3s-across-clouds'`);

  test("as it comes blocks the nodes and the pods, and says so", () => {
    const facts = { ufw: status, added: added(["allow 22/tcp"]) };
    assert.equal(blocked(facts, NODES).length, 5);
    assert.match(blocked(facts, NODES)[2] ?? "", /^ufw drops 51820\/udp from /);
    assert.deepEqual(
      shOf(facts),
      ours.map((rule) => `ufw ${rule} comment k3s-across-clouds`),
    );
  });
  test("with all of it is left alone", () => {
    const facts = { ufw: status, added: added(["allow 22/tcp", ...marked]) };
    assert.deepEqual(blocked(facts, NODES), []);
    assert.deepEqual(firewallPlan(facts, NODES), []);
  });
  test("loses what is open to everybody and who has left, and keeps the rest", () =>
    assert.deepEqual(
      shOf(
        {
          ufw: status,
          added: added([
            "allow 22/tcp",
            "allow 10250/tcp",
            "allow 6443",
            "allow 80 comment 'web'",
            ...marked,
          ]),
        },
        [A],
      ),
      [
        ...ours.slice(3, 6).map((rule) => `ufw --force delete ${rule}`),
        "ufw --force delete allow 10250/tcp",
        "ufw --force delete allow 6443",
      ],
    ));
  test("that lets everything in is refused", () =>
    assert.throws(
      () => firewallPlan({ ufw: status.replace("deny (incoming)", "allow (incoming)") }, NODES),
      /ufw default deny incoming/,
    ));
  test("that is not active is not asked", () =>
    assert.match(
      firewallPlan({ ufw: "Status: inactive\n", nft: "/sbin/nft\n" }, NODES)[0]?.why ?? "",
      /^nft: /,
    ));
});

describe("nft", () => {
  const chain = (name: string, hook: string, policy: string, ...rules: string[]) =>
    `table inet mine {\n\tchain ${name} {\n\t\ttype filter hook ${hook} priority filter; policy ${policy};\n${rules.map((r) => `\t\t${r}\n`).join("")}\t}\n}`;
  const OURS = `table inet k3s_across_clouds {\n\tchain input {\n\t\ttype filter hook input priority -5; policy accept;\n\t\ttcp dport 6443 drop\n\t}\n}`;
  const cases: [name: string, ruleset: string, sentences: number][] = [
    ["nothing at all", "", 0],
    ["a chain that accepts", chain("in", "input", "accept", "tcp dport 22 accept"), 0],
    ["a policy that drops", chain("in", "input", "drop", "tcp dport 22 accept"), 1],
    ["a last rule that drops", chain("in", "input", "accept", "tcp dport 22 accept", "drop"), 1],
    [
      "a last rule that rejects and counts",
      chain("in", "input", "accept", "counter packets 3 bytes 180 reject with icmpx admin-prohibited"),
      1,
    ],
    ["a drop of something", chain("in", "input", "accept", "ip saddr 192.0.2.1 drop"), 0],
    ["input and forward that drop", `${chain("in", "input", "drop")}\n${chain("fwd", "forward", "drop")}`, 2],
    ["output that drops", chain("out", "output", "drop"), 0],
    ["a chain that names WireGuard's port", chain("in", "input", "drop", "udp dport 51820 accept"), 0],
    [
      "a chain that we have been in",
      chain(
        "in",
        "input",
        "drop",
        'ip saddr 198.51.100.11 udp dport 51820 accept comment "k3s-across-clouds"',
      ),
      0,
    ],
    ["our own table", OURS, 0],
  ];
  for (const [name, ruleset, sentences] of cases)
    test(`: ${name} ${sentences ? "blocks" : "blocks nothing"}`, () =>
      assert.equal(blocked({ ruleset }, NODES).length, sentences, blocked({ ruleset }, NODES).join()));

  test("is looked at by its chains at a hook: kube-proxy's thousands of rules do not travel", () => {
    const services = "\tchain KUBE-SVC-X {\n\t\tip daddr 10.43.0.1 jump KUBE-SEP-Y\n\t}";
    const [mine, other] = [
      chain("in", "input", "drop", "tcp dport 22 accept"),
      "table ip nat {\n\tset s {\n\t\ttype ipv4_addr\n\t}\n\n",
    ];
    const PATH = programs(temporary(), { nft: `cat <<'X'\n${other}${services}\n}\n${mine}\nX` });
    const { ruleset } = look([{ look: () => [firewall.firewallLook] }], wanted(), { PATH });
    assert.equal(ruleset, `table ip nat {\n${mine.replace(/\n}\n*$/, "")}\n`);
    assert.equal(blocked({ ruleset }, NODES).length, 1);
  });

  const written = (): Facts => ({
    nft: "/sbin/nft\n",
    script: scriptText(NODES),
    start: firewall.UNIT_TEXT,
    booted: "enabled\nactive\n",
    ruleset: OURS,
  });
  test("with the script, its unit and its table is left alone", () =>
    assert.deepEqual(firewallPlan(written(), NODES), []));
  const changed: [name: string, over: Facts][] = [
    ["the table is gone", { ruleset: "" }],
    ["the unit is not enabled", { booted: "disabled\nactive\n" }],
    ["the script is of other nodes", { script: scriptText([A]) }],
    ["somebody's chain drops", { ruleset: `${OURS}\n${chain("in", "input", "drop")}` }],
  ];
  for (const [name, over] of changed)
    test(`is set up again where ${name}`, () =>
      assert.equal(firewallPlan({ ...written(), ...over }, NODES).length, 1));

  test("is refused where iptables' own chain drops, or nft is missing", () => {
    assert.throws(
      () =>
        firewallPlan(
          { nft: "/sbin/nft\n", ruleset: chain("INPUT", "input", "drop").replace("inet mine", "ip filter") },
          NODES,
        ),
      /iptables' own INPUT drops/,
    );
    assert.throws(() => firewallPlan({}, NODES), /install nftables/);
  });
});

describe("what is left of it", () => {
  const zones = (rules: string, sources: string) =>
    `printf 'public (active)\\n  sources: 192.0.2.0/24\\n  rich rules: \\n\\t${rules}\\n\\ntrusted\\n  sources: ${sources}\\n'`;
  const firewalld = (rules: string, sources = "") =>
    `case $* in *--state) echo running ;; *) ${zones(rules, sources)} ;; esac`;
  const ours = (port: number) =>
    `rule family="ipv4" source address="198.51.100.11" port port="${port}" protocol="tcp" accept`;
  const cases: [name: string, programs: Record<string, string>, left: boolean][] = [
    ["a rule of firewalld's is seen", { "firewall-cmd": firewalld(ours(6443)) }, true],
    ["and a source that it trusts", { "firewall-cmd": firewalld("", "192.0.2.7 10.43.0.0/16") }, true],
    ["but nobody else's rules", { "firewall-cmd": firewalld(ours(22), "10.42.0.0/24") }, false],
    [
      "a rule of ufw's is seen",
      { ufw: `echo "ufw allow from 10.42.0.0/16 comment 'k3s-across-clouds'"` },
      true,
    ],
    ["but nobody else's", { ufw: `echo "ufw allow 22/tcp comment 'ssh'"` }, false],
  ];
  for (const [name, own, left] of cases)
    test(name, () => {
      const none = { "firewall-cmd": "exit 252", ufw: "exit 1" };
      const PATH = programs(temporary(), { ...none, ...own });
      const { stdout } = shell(firewall.closeLook(RANGES), ["sh", "-s"], { PATH });
      assert.equal([...new Set(stdout.trim().split("\n"))].join(), left ? "firewall" : "");
    });
});

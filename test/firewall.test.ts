import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { describe, test } from "node:test";
import { type Chain, drops, ends, type Packet } from "../lib/k3s/firewall/chains.ts";
import * as firewall from "../lib/k3s/firewall/firewall.ts";
import { neighbours } from "../lib/k3s/firewall/neighbours.ts";
import * as own from "../lib/k3s/firewall/own.ts";
import { iptables, nft } from "../lib/k3s/firewall/rules.ts";
import type { Run } from "../lib/script.ts";
import { Refusal } from "../lib/step.ts";
import {
  A1,
  boxOf,
  type Facts,
  fixture,
  look,
  node,
  nodes,
  programs,
  shell,
  temporary,
  wanted,
} from "./helpers.ts";

const [A, B] = ["198.51.100.11", "198.51.101.11"];
const NODES = [A, B];
const RANGES = ["10.42.0.0/16", "10.43.0.0/16"] as const;
const blocked = (facts: Facts, nodes = NODES) => firewall.blocked(facts, nodes, RANGES);
const firewallPlan = (facts: Facts, nodes = NODES) => firewall.firewallPlan(facts, nodes, RANGES);
const scriptText = (nodes: string[]) => own.scriptText(nodes, RANGES[0]);
const shOf = (facts: Facts, nodes = NODES) =>
  firewallPlan(facts, nodes)
    .map(({ sh }) => sh)
    .join("\n")
    .split("\n");
const whys = (facts: Facts) => firewallPlan(facts).map(({ why }) => why.split(":")[0]);

/** What a box printed, as recorded with Debian 12's ufw 0.36.2, firewalld 1.3.3, nft 1.0.6 and iptables 1.8.9. */
const recorded = (name: string): Facts => JSON.parse(fixture(`firewall/${name}.json`));
const BOX = {
  nft: "/usr/sbin/nft\n",
  card: "eth0\n",
  addresses: "1: lo    inet 127.0.0.1/8 scope host lo\n2: eth0    inet 192.168.0.12/24 scope global eth0",
};
const filter = (input: string, ...rules: string[]) =>
  `*filter\n:INPUT ${input} [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:mine - [0:0]\n${rules.map((rule) => `-A ${rule}\n`).join("")}COMMIT\n`;
const chain = (name: string, hook: string, policy: string, ...rules: string[]) =>
  `table inet mine {\n\tset ours {\n\t\ttype ipv4_addr\n\t\tflags interval\n\t\telements = { 198.51.100.0/23,\n\t\t\t     203.0.113.7 }\n\t}\n\n\tchain mine {\n\t\tip saddr @ours accept\n\t\treject\n\t}\n\n\tchain ${name} {\n\t\ttype filter hook ${hook} priority filter; policy ${policy};\n${rules.map((r) => `\t\t${r}\n`).join("")}\t}\n}`;

describe("the analysis of a box's rules", () => {
  const REJECT = "INPUT -j REJECT --reject-with icmp-host-prohibited";
  const OPEN = [
    "INPUT -p tcp -m multiport --dports 6443,10250 -j ACCEPT",
    "INPUT -p udp -m udp --dport 51820 -j ACCEPT",
  ];
  const PODS = "INPUT -s 10.42.0.0/16 -j ACCEPT";
  type Case = [name: string, facts: Facts, says: RegExp[], mended?: RegExp];
  const iptables: [name: string, text: string, says: RegExp[], mended?: RegExp][] = [
    [
      "reports the final REJECT of Oracle Cloud's images",
      filter("ACCEPT", "INPUT -p tcp -m state --state NEW -m tcp --dport 22 -j ACCEPT", REJECT),
      [
        /^iptables INPUT drops 6443\/tcp, 10250\/tcp, 51820\/udp from .*, and everything from 10\.42\.0\.0\/16 \(-A INPUT -j REJECT/,
      ],
    ],
    [
      "reports a REJECT before the rules that accept",
      filter("ACCEPT", REJECT, ...OPEN, PODS),
      [/drops 6443\/tcp, 10250\/tcp, 51820\/udp/],
    ],
    ["accepts rules that accept before a REJECT", filter("ACCEPT", ...OPEN, PODS, REJECT), []],
    [
      "reports a policy that drops all but established connections",
      filter("DROP", "INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"),
      [/\(policy drop\)/],
    ],
    [
      "reports a REJECT at the end of another chain",
      filter("ACCEPT", "INPUT -j mine", ...OPEN, "mine -p tcp -m tcp --dport 22 -j RETURN", "mine -j REJECT"),
      [/\(-A mine -j REJECT\)/],
    ],
    [
      "follows a chain that returns",
      filter("DROP", "INPUT -j mine", ...OPEN, PODS, "mine -p tcp -j RETURN", "mine -p udp -j RETURN"),
      [],
    ],
    [
      "reports a DROP of WireGuard's port",
      filter("ACCEPT", "INPUT -p udp -m udp --dport 51820 -j DROP"),
      [/drops 51820\/udp from 198\.51\.100\.11, 198\.51\.101\.11 \(-A/],
    ],
    [
      "ignores a DROP on another card, from another address or to another address",
      filter(
        "ACCEPT",
        "INPUT -i eth1 -j DROP",
        "INPUT -s 203.0.113.0/24 -j DROP",
        "INPUT -d 192.168.0.99/32 -j DROP",
      ),
      [],
    ],
    [
      "reports a DROP with a negated address",
      filter("ACCEPT", `INPUT ! -s ${A}/32 -p tcp -m tcp --dport 6443 -j DROP`),
      [/^iptables INPUT drops 6443\/tcp from 198\.51\.101\.11, and everything from/],
    ],
    [
      "does not interpret comments",
      filter("DROP", 'INPUT -m comment --comment "let it -j ACCEPT" -j DROP'),
      [/-j DROP\)$/],
    ],
    [
      "does not rely on an ACCEPT with a limit",
      filter("DROP", "INPUT -m limit --limit 9/sec -j ACCEPT"),
      [/^iptables INPUT may drop /],
    ],
    [
      "reports a DROP of an ipset whose content is unknown",
      filter("ACCEPT", "INPUT -m set --match-set crowdsec src -j DROP"),
      [/^iptables INPUT may drop .*crowdsec/],
    ],
    ["ignores fail2ban for ssh", filter("ACCEPT", "INPUT -p tcp -m multiport --dports 22 -j f2b-sshd"), []],
    [
      "ignores k3s's own chains",
      filter("ACCEPT", 'INPUT -m comment --comment "kubernetes" -j KUBE-FIREWALL', "FORWARD -j CNI-X"),
      [],
    ],
    [
      "reports a DROP before which no rule can be placed",
      "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p udp -m udp --dport 51820 -j DROP\nCOMMIT\n",
      [/^iptables raw PREROUTING drops 51820\/udp/],
      /no rule can be placed before that one/,
    ],
  ];
  const nft: [name: string, ruleset: string, says: RegExp[], mended?: RegExp][] = [
    ["accepts a box without rules", "", []],
    [
      "reports an nft policy that drops",
      chain("in", "input", "drop", "tcp dport 22 accept"),
      [/^nft inet mine in drops 6443\/tcp, 10250\/tcp, 51820\/udp .*\(policy drop\)$/],
    ],
    [
      "reports a final rule that counts and rejects",
      chain("in", "input", "accept", "counter packets 3 bytes 180 reject with icmpx admin-prohibited"),
      [/\(reject with icmpx admin-prohibited\)$/],
    ],
    [
      "reports a forward chain that drops",
      chain("fwd", "forward", "drop"),
      [/^nft inet mine fwd drops what is forwarded for 10\.42\.0\.0\/16/],
    ],
    ["ignores an output chain that drops", chain("out", "output", "drop"), []],
    [
      "ignores a drop of one address or of another card",
      chain("in", "input", "accept", "ip saddr 192.0.2.1 drop", 'iifname "eth1" drop'),
      [],
    ],
    [
      "evaluates sets, ranges and negations",
      chain(
        "in",
        "input",
        "drop",
        "ip saddr @ours tcp dport { 6443, 10000-10250 } accept",
        "udp dport != 51820 drop",
        "ip saddr 198.51.100.0-198.51.101.255 accept",
        'iifname { "cni0", "flannel-wg" } accept',
      ),
      [],
    ],
    [
      "evaluates verdict maps",
      chain(
        "in",
        "input",
        "drop",
        "ct state vmap { established : accept, related : accept, invalid : drop }",
        "tcp dport vmap { 22 : drop, 6443 : jump mine, 10250 : accept }",
        'iifname . udp dport { "eth0" . 51820 } accept',
        'iifname vmap { "cni0" : accept, "flannel-wg" : accept }',
      ),
      [/drops everything from 10\.42/],
    ],
    [
      "ignores a drop of new packets without SYN",
      chain("in", "input", "accept", "tcp flags & (fin | syn | rst | ack) != syn ct state new drop"),
      [],
    ],
    [
      "reports a drop of packets that open a connection",
      chain("in", "input", "accept", "tcp flags & (fin | syn | rst | ack) == syn ip saddr @ours drop"),
      [/drops 6443\/tcp, 10250\/tcp from 198\.51\.100\.11, 198\.51\.101\.11 \(tcp flags/],
    ],
    [
      "reports a drop with an unknown match",
      chain("in", "input", "accept", 'osf name "Linux" drop'),
      [/^nft inet mine in may drop/],
    ],
    [
      "evaluates a map's default verdict last, wherever it is",
      chain("in", "input", "accept", "tcp dport vmap { * : accept, 10250 : drop }"),
      [/drops 10250\/tcp from .*, and everything from 10\.42/],
    ],
    ...["", " with tcp reset", " with icmp host-prohibited", " with icmp type host-prohibited"].map(
      (how): [string, string, RegExp[]] => [
        `reports a reject, whatever its answer: reject${how}`,
        chain("in", "input", "accept", `meta l4proto tcp tcp dport 10250 reject${how}`),
        [/drops 10250\/tcp from/],
      ],
    ),
    ["ignores a dormant table", chain("in", "input", "drop").replace("{\n", "{\n\tflags dormant\n"), []],
    [
      "reports a map whose content is unknown",
      chain("in", "input", "accept", "tcp dport vmap @gone"),
      [/may drop 6443/],
    ],
    ["ignores a chain of another family", chain("in", "input", "drop").replace("inet", "ip6"), []],
    [
      "requires that each of two tables accepts a packet",
      `${chain("in", "input", "accept", "accept")}\n${chain("in", "input", "drop").replace("inet mine", "ip later")}`,
      [/^nft ip later in drops/],
    ],
    [
      "reports a drop at the card's ingress hook",
      'table netdev n {\n\tchain i {\n\t\ttype filter hook ingress device "eth0" priority 0; policy accept;\n\t\tudp dport 51820 drop\n\t}\n}',
      [/^nft netdev n i drops 51820\/udp/],
      /remove it/,
    ],
  ];
  const cases: Case[] = [
    ...iptables.map(([name, text, ...rest]): Case => [name, { ...BOX, iptables: text }, ...rest]),
    ...nft.map(([name, ruleset, ...rest]): Case => [name, { ...BOX, ruleset }, ...rest]),
    [
      "reports rules of iptables-legacy, which nft does not list",
      { ...BOX, "iptables-legacy": filter("ACCEPT", REJECT), iploaded: "filter\n" },
      [/^iptables-legacy INPUT drops/],
    ],
    [
      "reports a chain that nft has added to a table of iptables, which iptables 1.8.9 does not list",
      {
        ...BOX,
        iptables: "*raw\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n",
        ruleset:
          "table ip raw {\n\tchain pre {\n\t\ttype filter hook prerouting priority raw; policy accept;\n\t\tudp dport 51820 drop\n\t}\n}",
      },
      [/^nft ip raw pre drops 51820\/udp/],
      /no rule can be placed before that one/,
    ],
    [
      "reports legacy tables that no installed program lists",
      { ...BOX, iploaded: "filter\n" },
      [/^iptables-legacy has rules here that nothing shows: install iptables$/],
    ],
    [
      "reports that there are too many rules to read",
      { ...BOX, ruleset: " ".repeat(300_000) },
      [/more rules here than are read/],
    ],
  ];
  for (const [name, facts, says, refused] of cases)
    test(name, () => {
      const said = blocked(facts);
      assert.equal(said.length, says.length, said.join("\n"));
      for (const one of says)
        assert(
          said.some((text) => one.test(text)),
          said.join("\n"),
        );
      // What check advises is what make firewall does.
      const remedy = firewall.remedy(facts, NODES, RANGES, "b1");
      if (refused) {
        assert.throws(() => firewallPlan(facts), refused);
        assert.match(remedy, refused);
      } else {
        assert.equal(remedy, "make firewall HOST=b1");
        assert.deepEqual(whys(facts), ["nft"]);
      }
    });
});

describe("the verdict of a rule for a packet", () => {
  /** From node A to port 6443 of a box whose card is eth0; a stranger's has no address. */
  const node: Packet = {
    ...{ hook: "input", family: "ip", iif: "eth0", oif: "", from: A },
    ...{ to: ["192.168.0.12"], protocol: "tcp", port: 6443 },
  };
  const others: Record<string, Partial<Packet>> = {
    node: {},
    stranger: { from: "" },
    udp: { protocol: "udp", port: 51820 },
    pod: { hook: "forward", iif: "cni0", oif: "flannel-wg", from: "10.42.0.5", to: ["10.42.1.6"], port: 80 },
    v6: { family: "ip6", from: "", to: [] },
    "several addresses": { to: ["192.168.0.12", "192.168.1.12"] },
    "unknown card": { iif: "" },
  };
  const judged = (chains: Chain[], whose: string) => {
    const met = ends(chains, { ...node, ...others[whose] });
    return met.some(drops)
      ? "drops"
      : met.flat().every(({ verdict }) => verdict === "accept")
        ? "accepts"
        : "may drop";
  };
  const iptablesCases: [rule: string, says: string][] = [
    ["-o eth0", "accepts node, accepts pod"],
    ["-o flannel-wg", "accepts node, drops pod"],
    ["-p tcp -m multiport --ports 22,443", "may drop node, accepts udp"],
    ["-m conntrack --ctstatus DNAT", "accepts node"],
    ["-m conntrack --ctstatus CONFIRMED", "may drop node"],
    ["-m addrtype --src-type UNICAST", "drops node"],
    ["-m addrtype --dst-type LOCAL", "drops node, accepts pod"],
    ["-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", "drops node, accepts udp"],
    ["-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK NONE", "accepts node"],
    ["-p tcp -m tcp ! --syn", "accepts node"],
    ["-m iprange --src-range 198.51.100.1-198.51.100.20", "drops node, accepts stranger"],
    ["-s 198.51.100.0/255.255.255.0", "drops node, accepts stranger"],
    ["-s 196.0.0.0/6", "drops node, may drop stranger"],
    ["-s 0.0.0.0/0", "drops node, drops stranger"],
    ["-d 192.168.0.0/24", "drops node, may drop several addresses"],
    ["-d 192.168.0.0/16", "drops several addresses"],
    ["-p tcp -m tcp --sport 1024:65535", "drops node, drops stranger"],
    ["-p tcp -m tcp --sport 1:1023", "accepts node, may drop stranger"],
    ["-p tcp -m tcp --sport 1024:", "drops node"],
    ["-p tcp -m tcp --dport 6000:", "drops node"],
    ["-p tcp -m tcp --dport what", "may drop node"],
    ["-i eth1", "accepts node, may drop unknown card"],
    ["-i cni+", "accepts node, drops pod, accepts unknown card"],
  ];
  const each = (says: string) =>
    says.split(", ").map((one) => {
      const [, verdict = "", whose = ""] = /^(drops|accepts|may drop) (.*)$/.exec(one) ?? [];
      return { one, verdict, whose };
    });
  for (const [rule, says] of iptablesCases)
    for (const { one, verdict, whose } of each(says))
      test(`is known for each match of iptables: -A INPUT ${rule} -j DROP ${one}`, () => {
        const text = filter("ACCEPT", ...["INPUT", "FORWARD"].map((name) => `${name} ${rule} -j DROP`));
        assert.equal(judged(iptables(text, "iptables"), whose), verdict);
      });
  const nftCases: [rule: string, says: string][] = [
    ["ip6 saddr fd00::/8", "accepts node, accepts v6"],
    ["ip6 saddr ::/0", "accepts node, drops v6"],
    ["ip6 daddr fd00::1", "accepts node, may drop v6"],
    ["ip protocol tcp", "drops node, accepts udp, accepts v6"],
    ["ip6 nexthdr tcp", "accepts node, drops v6"],
    ["meta protocol ip6", "accepts node, drops v6"],
    ["meta pkttype broadcast", "accepts node"],
    ["meta pkttype host", "drops node"],
    ['oifname "flannel-wg"', "accepts node, drops pod"],
    ["th dport 6443", "drops node, accepts udp"],
    ["tcp sport 1024-65535", "drops node, accepts udp"],
    ["udp sport 53", "accepts node, accepts udp"],
    ["tcp flags syn", "drops node, accepts udp"],
    ["tcp flags syn / fin,syn,rst,ack", "drops node, accepts udp"],
    ["tcp flags != syn / fin,syn,rst,ack", "accepts node"],
    ["ct status dnat", "accepts node"],
    ["ct status confirmed", "may drop node"],
    ["ct direction original", "drops node"],
    ["ct state established,new", "drops node"],
    ["ip saddr & 255.0.0.0 == 198.0.0.0", "may drop node"],
    ["ip saddr 198.51.100.0 / 24", "may drop node"],
    ["ip saddr $nodes", "may drop node"],
    ["update @seen { ip saddr timeout 5m }", "may drop node"],
    ["ct mark set 0x1", "drops node"],
    ["tcp dport vmap { 6443 : continue }", "drops node"],
    ["queue num 1", "may drop node"],
  ];
  for (const [rule, says] of nftCases)
    for (const { one, verdict, whose } of each(says))
      test(`is known for each match of nft: ${rule} drop ${one}`, () => {
        const text = ["input", "forward"]
          .map((hook) => chain(hook, hook, "accept", `${rule} drop`))
          .join("\n");
        assert.equal(judged(nft(text), whose), verdict);
      });
});

test("every firewall allows IPv4 and IPv6 networks in separate rules", () => {
  const ranges = ["10.42.0.0/16,fd42::/56", "10.43.0.0/16,fd43::/112"] as const;
  for (const facts of [recorded("firewalld-fresh"), recorded("ufw-fresh"), { ...BOX, ruleset: "" }]) {
    const plan = firewall
      .firewallPlan(facts, NODES, ranges)
      .map(({ sh }) => sh)
      .join("\n");
    assert.ok(plan.includes("10.42.0.0/16"));
    assert.doesNotMatch(plan, /0\/16,fd4/);
  }
  assert.doesNotMatch(firewall.closeLook(ranges) + firewall.closeAgain(ranges), /0\/16,fd4/);
});

describe("firewalld", () => {
  const fresh = recorded("firewalld-fresh");
  const done = recorded("firewalld-fresh-done");
  test("in its default configuration is reported to block nodes and pods, and is opened for them", () => {
    assert.match(
      blocked(fresh)[0] ?? "",
      /^firewalld drops 6443\/tcp, 10250\/tcp, 51820\/udp from .*, and everything from 10\.42\.0\.0\/16 \(reject/,
    );
    const commands = shOf(fresh);
    const six = `( '--add-rich-rule=rule priority="-1000" family="ipv4" source [^']* accept'){6}`;
    const kinds = ["", "--permanent "].flatMap((when) => [
      new RegExp(`^firewall-cmd -q ${when}--zone=public${six}$`),
      new RegExp(`^firewall-cmd -q ${when}--zone=trusted( --add-source=[0-9./]+){2}$`),
    ]);
    assert.equal(commands.length, kinds.length);
    for (const [i, kind] of kinds.entries()) assert.match(commands[i] ?? "", kind);
  });
  test("with all rules needs no change", () => {
    assert.deepEqual(blocked(done), []);
    assert.deepEqual(firewallPlan(done), []);
  });
  test("whose permanent rules are missing gets them", () => {
    const commands = shOf({ ...done, "rules--permanent": "" });
    assert.equal(commands.length, 1);
    assert.match(
      commands[0] ?? "",
      /^firewall-cmd -q --permanent --zone=public( '--add-rich-rule=rule [^']*'){6}$/,
    );
  });
  test("loses the rules of a removed node, and keeps rules of others", () => {
    const commands = shOf({ ...done, rules: `${done.rules}public rule service name="dns" accept\n` }, [A]);
    assert.equal(commands.length, 2);
    for (const command of commands)
      assert.match(command, new RegExp(`--zone=public( '--remove-rich-rule=rule [^']*"${B}"[^']*'){3}$`));
  });
  test("gets our rules before those that deny, and in each zone, and closes ports that a service or a range opens to everybody", () => {
    const many = recorded("firewalld-many");
    assert.match(blocked(many).join("\n"), /firewalld drops .*\(meta nfproto ipv4 tcp dport 10250 drop\)/);
    const commands = shOf(many);
    assert.ok(commands.some((command) => command.includes("--zone=work '--add-rich-rule=")));
    assert.deepEqual(whys(many), ["firewalld", "nft"]);
    const after = recorded("firewalld-many-done");
    assert.deepEqual(blocked(after), []);
    assert.deepEqual(firewallPlan(after), []);
    const without = { ...many, nft: "" };
    assert.throws(
      () => firewallPlan(without),
      /open to everybody: .*by firewalld: tcp dport 6443 accept.* install nftables/,
    );
  });
  test("before 0.7 gets rules without a priority", () =>
    assert.match(shOf({ ...fresh, "firewalld-version": "0.6.3\n" })[0] ?? "", /-rule=rule family=/));
});

describe("ufw", () => {
  const many = recorded("ufw-many");
  const rules = (facts: Facts) => shOf(facts).filter((line) => line.includes("ufw"));
  test("in its default configuration is reported to block nodes and pods, and is opened for them", () => {
    const fresh = recorded("ufw-fresh");
    assert.match(
      blocked(fresh)[0] ?? "",
      /^ufw drops 6443\/tcp, .*, and everything from 10\.42\.0\.0\/16 \(policy drop\)$/,
    );
    assert.equal(rules(fresh).length, 6 + 2 + 2);
    assert.equal(
      rules(fresh)[0],
      `ufw insert 1 allow from ${A} to any port 6443 proto tcp comment k3s-across-clouds 2>/dev/null || ufw allow from ${A} to any port 6443 proto tcp comment k3s-across-clouds`,
    );
    assert.deepEqual(whys(fresh), ["ufw"]);
  });
  test("with all rules needs no change", () => {
    const done = recorded("ufw-fresh-done");
    assert.deepEqual(blocked(done), []);
    assert.deepEqual(firewallPlan(done), []);
  });
  test("that opens a port to everybody, in any notation, has it closed without deleting a rule of the user", () => {
    assert.deepEqual(whys(many), ["ufw", "nft"]);
    assert.doesNotMatch(rules(many).join("\n"), /delete/);
    assert.deepEqual(blocked(recorded("ufw-many-done")), []);
    assert.deepEqual(firewallPlan(recorded("ufw-many-done")), []);
    assert.throws(
      () => firewallPlan({ ...many, nft: "" }),
      (error: Error) => {
        assert(error instanceof Refusal);
        assert.match(
          error.message,
          /10250\/tcp by ufw: -A ufw-user-input -p tcp -m multiport --dports 6443,10250 -j ACCEPT/,
        );
        assert.match(error.message, /10255\/tcp by ufw: /);
        assert.match(error.message, /51820\/udp by ufw: -A ufw-user-input -i eth0 /);
        return true;
      },
    );
  });
  test("with a deny rule before ours has ours moved to the front", () => {
    const done = recorded("ufw-fresh-done");
    const facts = {
      ...done,
      iptables:
        done.iptables?.replace(
          "-A ufw-user-input",
          "-A ufw-user-input -p tcp -m tcp --dport 6443 -j DROP\n-A ufw-user-input",
        ) ?? "",
    };
    assert.match(blocked(facts)[0] ?? "", /^ufw drops 6443\/tcp/);
    assert.match(rules(facts).join("\n"), /^ufw --force delete allow from [\s\S]*^ufw insert 1 allow from /m);
    assert.equal(rules(facts).length, 20);
  });
  test("with a drop in before.rules is refused, because no rule can be placed before it", () => {
    const facts = {
      ...many,
      iptables:
        many.iptables?.replace(
          "-A ufw-before-input -j ufw-user-input",
          "-A ufw-before-input -p udp -j DROP\n-A ufw-before-input -j ufw-user-input",
        ) ?? "",
    };
    assert.throws(
      () => firewallPlan(facts),
      /ufw drops 51820\/udp from .*\(-A ufw-before-input -p udp -j DROP\), and no rule can be placed/,
    );
  });
  test("loses the rules of a removed node", () =>
    assert.equal(
      rules(recorded("ufw-fresh-done")).length +
        shOf(recorded("ufw-fresh-done"), [A]).filter((line) =>
          line.startsWith(`ufw --force delete allow from ${B}`),
        ).length,
      3,
    ));
  test("that is not active is not changed", () =>
    assert.deepEqual(whys({ ...BOX, ufw: "Status: inactive\n" }), ["nft"]));
});

describe("nft", () => {
  const OURS = `table inet k3s_across_clouds {\n\tset nodes {\n\t\ttype ipv4_addr\n\t\telements = { ${A}, ${B} }\n\t}\n\n\tchain input {\n\t\ttype filter hook input priority -5; policy accept;\n\t\tiifname { "lo", "cni0", "flannel.1", "flannel-wg" } accept\n\t\tip saddr @nodes tcp dport { 6443, 10250 } accept\n\t\tip saddr @nodes udp dport 51820 accept\n\t\ttcp dport { 6443, 10248-10259 } drop\n\t\tudp dport { 8472, 51820-51821 } drop\n\t}\n}`;

  test("is read without nat and k3s's own chains, so that kube-proxy's thousands of rules are not transferred", () => {
    const services = "\tchain KUBE-SVC-X {\n\t\tip daddr 10.43.0.1 jump KUBE-SEP-Y\n\t}\n";
    const mine = chain("in", "input", "drop", "tcp dport 22 accept");
    const other = `table ip nat {\n\tchain x {\n\t\tjump KUBE-SERVICES\n\t}\n}\ntable ip filter {\n${services}\tchain INPUT {\n\t\tjump KUBE-SVC-X\n\t}\n${services}}\ntable ip kube-proxy {\n\tchain y {\n\t}\n}\n`;
    const PATH = programs(temporary(), {
      nft: `cat <<'X'\n${other}${mine}\nX`,
      "iptables-nft-save":
        "printf '*nat\\n:KUBE-SVC-X - [0:0]\\n-A KUBE-SVC-X -j KUBE-SEP-Y\\n*filter\\n:INPUT ACCEPT [0:0]\\n:KUBE-FW - [0:0]\\n-A INPUT -j DROP\\n-A KUBE-FW -j DROP\\n'",
    });
    const facts = look([{ look: () => firewall.firewallLooks }], wanted(), { PATH });
    assert.equal(
      facts.ruleset?.trim(),
      `table ip filter {\n\tchain INPUT {\n\t\tjump KUBE-SVC-X\n\t}\n}\n${mine}`,
    );
    assert.equal(facts.iptables?.trim(), "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -j DROP");
    assert.match(blocked(facts).join(), /^iptables INPUT drops /);
  });

  const written = (): Facts => ({
    ...BOX,
    script: scriptText(NODES),
    start: own.UNIT_TEXT,
    booted: "enabled\nactive\n",
    ruleset: OURS,
  });
  test("with the script, its unit and its table needs no change", () => {
    assert.deepEqual(blocked(written()), []);
    assert.deepEqual(firewallPlan(written()), []);
  });
  const changed: [name: string, over: Facts][] = [
    ["the table is gone", { ruleset: "" }],
    ["the unit is not enabled", { booted: "disabled\nactive\n" }],
    ["the script allows other nodes", { script: scriptText([A]) }],
    ["another chain drops packets", { ruleset: `${OURS}\n${chain("in", "input", "drop")}` }],
    ["another REJECT was added before our rules", { iptables: filter("ACCEPT", "INPUT -j REJECT") }],
  ];
  for (const [name, over] of changed)
    test(`is set up again if ${name}`, () => assert.equal(firewallPlan({ ...written(), ...over }).length, 1));

  test("is refused if nft is not installed", () => assert.throws(() => firewallPlan({}), /install nftables/));
});

describe("FIREWALL", () => {
  const facts = { nodes: "", ...BOX };
  test("changes nothing if it is not set, and then the firewall is not even examined", () => {
    assert.deepEqual(firewall.firewall.look(wanted()), []);
    assert.deepEqual(firewall.firewall.plan(wanted(), facts), []);
  });
  test("allows the addresses in it, this box and the cluster's nodes, except removed ones", () => {
    const nodes = JSON.stringify({
      kind: "List",
      items: [A, "203.0.113.9"].map((address) => ({
        kind: "Node",
        metadata: { name: `n${address}`, annotations: {} },
        status: { addresses: [{ type: "ExternalIP", address }], conditions: [] },
        spec: {},
      })),
    });
    const want = wanted({ FIREWALL: `${B} -203.0.113.9`, PUBLIC_IP: "192.0.2.5" });
    assert.deepEqual(firewall.admitted(want, { nodes }), ["192.0.2.5", A, B]);
  });
});

describe("a home node, whose address is nat,", () => {
  const HOME = [...NODES, "nat"];
  const ufwDone = recorded("ufw-fresh-done");
  const firewalldDone = recorded("firewalld-fresh-done");
  const open = [
    ["tcp", 6443],
    ["udp", 51820],
  ] as const;
  const before = (text: string | undefined, mark: string, line: (protocol: string, port: number) => string) =>
    text?.replace(mark, (found) => open.map(([protocol, port]) => line(protocol, port)).join("") + found) ??
    "";
  const rich = (protocol: string, port: number) =>
    `public rule priority="-1000" family="ipv4" source address="0.0.0.0/0" port port="${port}" protocol="${protocol}" accept\n`;
  /** The table of the script, as nft lists it. */
  const table = (nodes: string[]) => /^table [\s\S]*?^}/m.exec(scriptText(nodes))?.[0] ?? "";
  /** Each firewall before a home node, and with the rules for one. */
  const firewalls: [name: string, facts: Facts, withHome: Facts][] = [
    [
      "nft",
      BOX,
      {
        ...{ ...BOX, script: scriptText(HOME), start: own.UNIT_TEXT, booted: "enabled\nactive\n" },
        ruleset: table(HOME),
      },
    ],
    [
      "ufw",
      ufwDone,
      {
        ...ufwDone,
        added: before(
          ufwDone.added,
          "ufw allow 22",
          (of, port) => `ufw allow ${port}/${of} comment 'k3s-across-clouds'\n`,
        ),
        iptables: before(
          ufwDone.iptables,
          "-A ufw-user-input",
          (of, port) => `-A ufw-user-input -p ${of} -m ${of} --dport ${port} -j ACCEPT\n`,
        ),
      },
    ],
    [
      "firewalld",
      firewalldDone,
      {
        ...firewalldDone,
        rules: before(firewalldDone.rules, "public", rich),
        "rules--permanent": before(firewalldDone["rules--permanent"], "public", rich),
        ruleset: before(
          firewalldDone.ruleset,
          `\t\tip saddr ${A} tcp dport 6443`,
          (of, port) => `\t\tip saddr 0.0.0.0/0 ${of} dport ${port} accept\n`,
        ),
      },
    ],
  ];
  for (const [name, facts, withHome] of firewalls) {
    test(`has ${name} open 6443/tcp and 51820/udp to everybody and 10250/tcp to the known addresses alone, and is no address in a rule`, () => {
      const [change, ...more] = firewallPlan(facts, HOME);
      assert.deepEqual(more, []);
      assert.equal(
        change?.why,
        `${name}: open 6443/tcp and 51820/udp to all, since home nodes have no fixed address, 10250/tcp to ${A}, ${B}, and close k3s's other ports`,
      );
      assert.doesNotMatch(change?.sh ?? "", /\bnat\b|0\.0\.0\.0\/0[^*\n]{1,20}10250/);
    });
    test(`has nothing more to do with ${name} once it has these rules, and they are not taken for the user's`, () => {
      assert.deepEqual(blocked(withHome, HOME), []);
      assert.deepEqual(firewallPlan(withHome, HOME), []);
    });
    test(`has ${name} close both ports again when it is gone, with nothing else changed`, () => {
      const [change, ...more] = firewallPlan(withHome);
      assert.deepEqual(more, []);
      assert.match(
        change?.why ?? "",
        new RegExp(`^${name}: open 6443/tcp, 10250/tcp and 51820/udp to ${A}, ${B}, and`),
      );
      if (name !== "nft")
        assert.match(
          change?.sh ?? "",
          /(delete|remove).*0\.0\.0\.0\/0.*6443.*(\n.*)?(delete|remove)-?.*51820/,
        );
      assert.doesNotMatch(change?.sh ?? "", /insert 1|add-rich-rule|saddr 0\.0\.0\.0/);
    });
  }

  test("is let in by the table, at two ports and over IPv4 alone", () => {
    const from = (from: string, port: number, family: "ip" | "ip6" = "ip") => {
      const protocol = port > 51_000 ? "udp" : "tcp";
      const packet: Packet = { hook: "input", family, iif: "eth0", oif: "", from, to: [], protocol, port };
      return !ends(nft(table(HOME)), packet).some(drops);
    };
    assert.deepEqual(
      [6443, 51820, 10250, 51821].map((port) => from("", port)),
      [true, true, false, false],
    );
    assert.deepEqual(
      [6443, 51820].map((port) => from("", port, "ip6")),
      [false, false],
    );
    assert.deepEqual(
      [6443, 51820, 10250].map((port) => from(A, port)),
      [true, true, true],
    );
  });
  test("is let in by other chains that drop, at two ports", () => {
    const folder = temporary();
    const other = chain("in", "input", "drop");
    const PATH = programs(folder, {
      nft: `case $* in list*) cat <<'X'\n${other}\nX\n;; -*) ;; *) echo "$*" >>${folder}/log ;; esac`,
      "iptables-nft": `case $* in --version) echo nf_tables ;; '-S INPUT') echo '-A INPUT -j DROP' ;; *-I*) echo "$*" >>${folder}/log ;; esac`,
      "iptables-legacy": "echo legacy",
    });
    shell(scriptText(HOME), ["sh", "-s", "start"], { PATH });
    const put = (text: RegExp) => readFileSync(`${folder}/log`, "utf8").match(text)?.length ?? 0;
    assert.deepEqual([put(/10250/g), put(/6443/g), put(/51820/g)], [2 * 2, 2 * 3, 2 * 3]);
    assert.deepEqual(
      [put(/saddr 0\.0\.0\.0\/0 (tcp|udp) dport (6443|51820) /g), put(/-s 0\.0\.0\.0\/0 -p .*/g)],
      [2, 2],
    );
  });
  test("may be the only node that is known so far", () => {
    assert.doesNotMatch(scriptText(["nat"]), /elements/);
    assert.match(
      firewallPlan(BOX, ["nat"])[0]?.why ?? "",
      /to all, since home nodes have no fixed address, and close k3s's other ports$/,
    );
  });
  test("is named where rules drop its packets, with the command that opens them, or what to let through", () => {
    const drop = chain("in", "input", "accept", "ip saddr != @ours tcp dport { 6443, 10250 } drop");
    assert.deepEqual(
      blocked({ ...BOX, ruleset: drop }, NODES).filter((one) => !/everything/.test(one)),
      [],
    );
    assert.match(
      blocked({ ...BOX, ruleset: drop }, HOME).join(),
      /^nft inet mine in drops 6443\/tcp from home nodes, and everything/,
    );
    assert.equal(firewall.remedy({ ...BOX, ruleset: drop }, HOME, RANGES, "b1"), "make firewall HOST=b1");
    const early =
      "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p udp -m udp --dport 51820 -j DROP\nCOMMIT\n";
    assert.throws(
      () => firewallPlan({ ...BOX, iptables: early }, HOME),
      /let 6443\/tcp and 51820\/udp from all, since home nodes have no fixed address, 10250\/tcp from 198/,
    );
  });
  test("leaves a port closed over IPv6, and the kubelet's, where the user's own rules open them to everybody", () => {
    const many = recorded("ufw-many");
    assert.throws(
      () => firewallPlan({ ...many, nft: "" }, HOME),
      / 10250\/tcp by ufw: .* 51820\/udp by ip6tables/,
    );
  });
  test("does not make a rule of the user's in ufw ours, which would go with it", () => {
    const added = `${ufwDone.added}ufw allow 6443/tcp\n`;
    const commands = firewallPlan({ ...ufwDone, added }, HOME)[0]?.sh ?? "";
    assert.doesNotMatch(commands, /6443/);
    assert.match(commands, /^ufw insert 1 allow from 0\.0\.0\.0\/0 to any port 51820 proto udp comment/);
  });
  test("counts as one if the settings say so, or the cluster has a node without a public address, not while a node joins", () => {
    const with_ = (FIREWALL: string, json = "", PUBLIC_IP = B) =>
      firewall.admitted(wanted({ FIREWALL, PUBLIC_IP }), { nodes: json });
    const home = node({ ...A1, name: "nas", n: 3, ip: "10.42.3.0", external: "" });
    const list = (one: object) => JSON.stringify({ items: [node(A1), one] });
    assert.deepEqual(with_(`${A} nat`), HOME);
    assert.deepEqual(with_(A, "", "nat"), [A, "nat"]);
    assert.deepEqual(with_(A, list(home)), HOME);
    const off = node({ ...A1, name: "nas", n: 3, ip: "10.42.3.0", external: "", ready: false });
    assert.deepEqual(with_(A, list(off)), HOME);
    const joins = node({ ...A1, name: "b1", n: 1, ip: "192.168.0.11", external: "" });
    assert.deepEqual(with_(A, list(joins)), NODES);
    assert.deepEqual(with_(A, nodes(A1)), NODES);
    // Another one may stay when one leaves.
    assert.deepEqual(with_(`-nat ${A} nat`), HOME);
    assert.deepEqual(with_(`-nat ${A}`), NODES);
  });
});

describe("on an entry for devices", () => {
  const ENTRY = [...NODES, "51822/udp"];
  const ufwDone = recorded("ufw-fresh-done");
  const firewalldDone = recorded("firewalld-fresh-done");
  const put = (text: string | undefined, mark: string, line: string) =>
    text?.replaceAll(mark, line + mark) ?? "";
  const rich =
    'public rule priority="-1000" family="ipv4" source address="0.0.0.0/0" port port="51822-51822" protocol="udp" accept\n';
  const table = (nodes: string[]) => /^table [\s\S]*?^}/m.exec(scriptText(nodes))?.[0] ?? "";
  const script = (nodes: string[]): Facts => ({
    ...{ ...BOX, script: scriptText(nodes), start: own.UNIT_TEXT, booted: "enabled\nactive\n" },
    ruleset: table(nodes),
  });
  const trusted = "10.42.0.0/16 10.43.0.0/16\nk3s-devices\n";
  const mine = "comment 'k3s-across-clouds'\n";
  /** Each firewall of a box that is no entry, with the rules for one, and what these are. */
  const firewalls: [name: string, facts: Facts, withEntry: Facts, opens: RegExp[], closes: RegExp[]][] = [
    [
      "nft",
      script(NODES),
      script(ENTRY),
      [/"flannel-wg", "k3s-devices" } accept\n/, /^\t\tudp dport 51822 accept$/m],
      [/"flannel-wg" } accept\n/],
    ],
    [
      "ufw",
      ufwDone,
      {
        ...ufwDone,
        added: put(
          ufwDone.added,
          "ufw allow 22",
          `ufw route allow in on k3s-devices ${mine}ufw allow in on k3s-devices ${mine}ufw allow 51822/udp ${mine}`,
        ),
        iptables: put(
          ufwDone.iptables,
          "-A ufw-user-limit -m",
          "-A ufw-user-forward -i k3s-devices -j ACCEPT\n-A ufw-user-input -i k3s-devices -j ACCEPT\n-A ufw-user-input -p udp -m udp --dport 51822 -j ACCEPT\n",
        ),
      },
      [
        /^ufw insert 1 allow from 0\.0\.0\.0\/0 to any port 51822 proto udp comment k3s-across-clouds /m,
        /^ufw insert 1 allow in on k3s-devices comment k3s-across-clouds /m,
        /^ufw route insert 1 allow in on k3s-devices comment k3s-across-clouds /m,
      ],
      [
        /^ufw route delete allow in on k3s-devices$/m,
        /^ufw --force delete allow in on k3s-devices$/m,
        /^ufw --force delete allow from 0\.0\.0\.0\/0 to any port 51822 proto udp$/m,
      ],
    ],
    [
      "firewalld",
      firewalldDone,
      {
        ...firewalldDone,
        ...{ rules: `${rich}${firewalldDone.rules}`, sources: trusted },
        ...{
          "rules--permanent": `${rich}${firewalldDone["rules--permanent"]}`,
          "sources--permanent": trusted,
        },
        ruleset: ["IN", "FWD"].reduce(
          (text, of) =>
            put(
              text,
              `\t\tgoto filter_${of}_public`,
              `\t\tiifname "k3s-devices" goto filter_${of}_trusted\n`,
            ),
          put(
            firewalldDone.ruleset,
            `\t\tip saddr ${A} tcp dport 6443`,
            "\t\tip saddr 0.0.0.0/0 udp dport 51822 accept\n",
          ),
        ),
      },
      ["", "--permanent "].flatMap((when) => [
        new RegExp(`^firewall-cmd -q ${when}--zone=public '--add-rich-rule=${rich.slice(7, -1)}'$`, "m"),
        new RegExp(`^firewall-cmd -q ${when}--zone=trusted --add-interface=k3s-devices$`, "m"),
      ]),
      ["", "--permanent "].flatMap((when) => [
        new RegExp(`^firewall-cmd -q ${when}--zone=public '--remove-rich-rule=${rich.slice(7, -1)}'$`, "m"),
        new RegExp(`^firewall-cmd -q ${when}--zone=trusted --remove-interface=k3s-devices$`, "m"),
      ]),
    ],
  ];
  for (const [name, facts, withEntry, opens, closes] of firewalls) {
    test(`${name} opens its port to everybody, and lets in what comes by its interface`, () => {
      const [change, ...more] = firewallPlan(facts, ENTRY);
      assert.deepEqual(more, []);
      assert.equal(
        change?.why,
        `${name}: open 6443/tcp, 10250/tcp and 51820/udp to ${A}, ${B}, 51822/udp to devices, and close k3s's ports to all others`,
      );
      for (const one of opens) assert.match(change?.sh ?? "", one);
      if (name !== "nft") assert.equal(change?.sh.split("\n").length, opens.length);
    });
    test(`${name} has nothing more to do once it has these rules`, () => {
      assert.deepEqual(blocked(withEntry, ENTRY), []);
      assert.deepEqual(firewallPlan(withEntry, ENTRY), []);
    });
    test(`${name} closes the port again once it is none any more, with nothing else changed`, () => {
      const [change, ...more] = firewallPlan(withEntry);
      assert.deepEqual(more, []);
      for (const one of closes) assert.match(change?.sh ?? "", one);
      if (name !== "nft") assert.equal(change?.sh.split("\n").length, closes.length);
      else assert.doesNotMatch(change?.sh ?? "", /51822|k3s-devices/);
    });
    if (name !== "nft")
      test(`a port that ${name} keeps closed is named`, () => {
        assert.match(
          firewall.blocked(facts, ["51822/udp"], []).join(),
          new RegExp(`^${name} drops 51822/udp from devices \\(`),
        );
        assert.match(blocked(facts, ENTRY).join(), /51822\/udp, everything from devices/);
      });
  }

  test("other chains that drop get a rule for its port, and for its interface in both directions", () => {
    const folder = temporary();
    const other = ["input", "forward"].map((hook) => chain(hook, hook, "drop")).join("\n");
    const PATH = programs(folder, {
      nft: `case $* in list*) cat <<'X'\n${other}\nX\n;; -*) ;; *) echo "$*" >>${folder}/log ;; esac`,
      "iptables-nft": `case $* in --version) echo nf_tables ;; '-S '*) echo "-A $2 -j DROP" ;; *-I*) echo "$*" >>${folder}/log ;; esac`,
      "iptables-legacy": "echo legacy",
    });
    const logged = (nodes: string[]) => {
      shell(scriptText(nodes), ["sh", "-s", "start"], { PATH });
      const rules = readFileSync(`${folder}/log`, "utf8").trim().split("\n");
      writeFileSync(`${folder}/log`, "");
      return rules;
    };
    const before = logged(NODES);
    assert.deepEqual(
      logged(ENTRY).filter((rule) => !before.includes(rule)),
      [
        ...["input iifname k3s-devices", "input udp dport 51822", "forward iifname k3s-devices"].map(
          (rule) => `insert rule inet mine ${rule} accept comment "k3s-across-clouds"`,
        ),
        ...["INPUT -i k3s-devices", "INPUT -p udp --dport 51822", "FORWARD -i k3s-devices"].map(
          (rule) => `-w -I ${rule} -m comment --comment k3s-across-clouds -j ACCEPT`,
        ),
      ],
    );
  });
  test("a home node's ports are open besides, and neither opens the other's", () => {
    const from = (nodes: string[], port: number) => {
      const protocol = port > 51_000 ? "udp" : "tcp";
      const packet: Packet = {
        hook: "input",
        family: "ip",
        iif: "eth0",
        oif: "",
        from: "",
        to: [],
        protocol,
        port,
      };
      return !ends(nft(`${table(nodes)}\n`), packet).some(drops);
    };
    const ports = [6443, 51820, 10250];
    assert.deepEqual(
      ports.map((port) => from(ENTRY, port)),
      [false, false, false],
    );
    assert.deepEqual(
      ports.map((port) => from([...ENTRY, "nat"], port)),
      [true, true, false],
    );
    assert.match(
      firewallPlan(BOX, [...ENTRY, "nat"])[0]?.why ?? "",
      /: open 6443\/tcp and 51820\/udp to all, since home nodes have no fixed address, 10250\/tcp to [\d., ]+, 51822\/udp to devices, and/,
    );
  });
  test("a port of k3s's that the user's own rule opens to everybody is closed as on any other box", () => {
    const [, facts, withEntry] = firewalls[1] as (typeof firewalls)[number];
    const open = (box: Facts) => ({
      ...box,
      iptables: put(
        box.iptables,
        "-A ufw-user-limit -m",
        "-A ufw-user-input -p tcp -m tcp --dport 6443 -j ACCEPT\n",
      ),
    });
    assert.deepEqual(whys(open(facts)), ["nft"]);
    assert.deepEqual(
      firewallPlan(open(withEntry), ENTRY).map(({ why }) => why.split(":")[0]),
      ["nft"],
    );
  });
  test("the chain that keeps devices to the cluster's networks is no obstacle to them", () => {
    const entry = `table inet k3s_devices {
\tchain prerouting {
\t\ttype filter hook prerouting priority raw; policy accept;
\t\tiifname != "k3s-devices" accept
\t\tip daddr 10.43.0.0/16 accept
\t\tip saddr 10.44.0.3 drop
\t\tip daddr { 10.42.0.0/16, 10.44.0.0/24 } accept
\t\tdrop
\t}
}`;
    assert.deepEqual(blocked({ ...BOX, ruleset: entry }, ENTRY), []);
    const { ruleset = "" } = script(ENTRY);
    assert.deepEqual(firewallPlan({ ...script(ENTRY), ruleset: `${ruleset}\n${entry}` }, ENTRY), []);
  });
  test("its port is read from the program that sets up the interface; no other word counts", () => {
    const want = wanted({ FIREWALL: A, PUBLIC_IP: B });
    const admitted = (port: string) => firewall.admitted(want, { nodes: "", "device-port": port });
    assert.deepEqual(admitted("51822\n"), [A, B, "51822/udp"]);
    for (const entry of ["", "\n", "51822; reboot\n", "51822\n51823\n"])
      assert.deepEqual(admitted(entry), NODES);
  });
});

describe("the boxes beside those of a run", () => {
  const place = (word: string) => {
    const [host = "", ip = ""] = word.split("=");
    return boxOf({ host, ip, word, name: host.replace(/.*@/, "") });
  };
  /** Whom the other boxes are to let in, and who they are. */
  async function beside(letIn: string[], ...those: string[]) {
    const settings = wanted({
      SERVER: "a1=198.51.100.11",
      AGENTS: "b1=198.51.101.11 nas=nat nuc=nat",
      PUBLIC_IP: "",
    });
    const run = {
      ...{ name: "remove", script: { about: "", steps: [firewall.firewall] }, settings },
      ...{ origins: {}, own: {}, addresses: { servers: [], agents: [] }, letIn, envFile: "" },
      ...{ mode: "apply", reboot: false, flags: new Set() },
    } as unknown as Run;
    const names = (await neighbours.boxes(run, those.map(place))).map(({ name }) => name);
    return { names, letIn: [...new Set(run.letIn)].sort() };
  }

  test("do not include a box without a public address that is named with another user", async () =>
    assert.deepEqual(await beside([], "root@nas=nat"), {
      names: ["a1", "b1", "nuc"],
      letIn: ["198.51.100.11", "198.51.101.11", "nat"],
    }));

  test("let nobody else in once the last box without a public address leaves", async () => {
    const closed = ["-nat", "198.51.100.11", "198.51.101.11"];
    assert.deepEqual((await beside(["-nat"], "nas=nat", "root@nuc=nat")).letIn, closed);
    assert.deepEqual((await beside(["-nat"], "nas=nat")).letIn, [...closed, "nat"]);
  });
});

describe("a look for remaining firewall rules", () => {
  const zones = (rules: string, sources: string) =>
    `printf 'public (active)\\n  sources: 192.0.2.0/24\\n  rich rules: \\n\\t${rules}\\n\\ntrusted\\n  sources: ${sources}\\n'`;
  const firewalld = (rules: string, sources = "") =>
    `case $* in *--state) echo running ;; *) ${zones(rules, sources)} ;; esac`;
  const ours = (port: number, priority = "") =>
    `rule ${priority}family="ipv4" source address="198.51.100.11" port port="${port}" protocol="tcp" accept`;
  const cases: [name: string, programs: Record<string, string>, left: boolean][] = [
    [
      "finds a rule of ours in firewalld",
      { "firewall-cmd": firewalld(ours(6443, 'priority="-1000" ')) },
      true,
    ],
    ["finds a rule of an earlier version in firewalld", { "firewall-cmd": firewalld(ours(6443)) }, true],
    [
      "finds a trusted source of ours in firewalld",
      { "firewall-cmd": firewalld("", "192.0.2.7 10.43.0.0/16") },
      true,
    ],
    [
      "finds the port and the interface of devices in firewalld",
      {
        "firewall-cmd": firewalld(
          'rule family="ipv4" source address="0.0.0.0/0" port port="51822-51822" protocol="udp" accept',
          "\\n  interfaces: k3s-devices",
        ),
      },
      true,
    ],
    [
      "ignores another rule for everybody in firewalld",
      {
        "firewall-cmd": firewalld(
          'rule family="ipv4" source address="0.0.0.0/0" port port="1194" protocol="udp" accept',
        ),
      },
      false,
    ],
    ["ignores other rules in firewalld", { "firewall-cmd": firewalld(ours(22), "10.42.0.0/24") }, false],
    [
      "finds a rule of ours in ufw",
      { ufw: `echo "ufw allow from 10.42.0.0/16 comment 'k3s-across-clouds'"` },
      true,
    ],
    ["ignores other rules in ufw", { ufw: `echo "ufw allow 22/tcp comment 'ssh'"` }, false],
  ];
  for (const [name, own, left] of cases)
    test(name, () => {
      const none = { "firewall-cmd": "exit 252", ufw: "exit 1" };
      const PATH = programs(temporary(), { ...none, ...own });
      const { stdout } = shell(firewall.closeLook(RANGES), ["sh", "-s"], { PATH });
      assert.equal([...new Set(stdout.trim().split("\n"))].join(), left ? "firewall" : "");
    });
});

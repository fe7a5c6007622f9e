import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { describe, test } from "node:test";
import { SettingError } from "../lib/settings.ts";
import { Refusal } from "../lib/step.ts";
import { agent } from "../scripts/agent.ts";
import { type Facts, fixture, look, MODERN, node, prepared, programs, temporary, wanted } from "./helpers.ts";

const CA = fixture("cacerts-v1.17.6.pem");
const HASH = createHash("sha256").update(CA).digest("hex");
const want = wanted({
  K3S_URL: "https://198.51.100.10:6443",
  K3S_TOKEN: `K10${HASH}::server:${"0".repeat(32)}`,
});
/** The server lets the box in, and knows no node of its name. */
const welcome: Facts = {
  cacerts: CA,
  error: "",
  date: "Mon, 23 Nov 2026 15:20:00 GMT\n",
  door: "200",
  taken: '{"kind":"Status","status":"Failure","reason":"NotFound","code":404}',
  proof: "",
};
const other = JSON.stringify(node({ name: "a1", ip: "198.51.100.66", n: 3 }));

test("the recorded CA has the hash that the recorded token names", () => {
  assert.equal(HASH.slice(0, 12), "ecf69351c0d9");
});

describe("an agent is set up", () => {
  const cases: [name: string, over: Facts][] = [
    ["where the server answers, lets the box in, and has no node of its name", {}],
    ["where the box is in the cluster already and joins it again", { taken: other, proof: "yes\n" }],
    [
      "where the server has not been asked: the box has joined with these very credentials",
      { cacerts: undefined as unknown as string },
    ],
  ];
  for (const [name, over] of cases)
    test(name, () => {
      assert.match(
        agent.plan(want, prepared(MODERN, { ...welcome, ...over })).at(-1)?.why ?? "",
        /^start k3s-agent/,
      );
    });
});

describe("an agent is not set up, and nothing is touched", () => {
  const curl = "curl: (7) Failed to connect to 198.51.100.10 port 6443:";
  const cases: [name: string, kind: typeof Refusal | typeof SettingError, over: Facts, message: RegExp][] = [
    [
      "where nothing listens",
      Refusal,
      { cacerts: "", error: `${curl} Connection refused` },
      /does not answer this box at https:\/\/198\.51\.100\.10:6443\/cacerts: nothing listens there.*refused/,
    ],
    [
      "where a firewall rejects, as firewalld does",
      Refusal,
      { cacerts: "", error: `${curl.replace(":6443", "")} after 3 ms: No route to host` },
      /a firewall rejects it: open 6443\/tcp/,
    ],
    [
      "where packets are dropped",
      Refusal,
      { cacerts: "", error: "curl: (28) Connection timed out after 8001 milliseconds" },
      /packets are dropped: open 6443\/tcp/,
    ],
    [
      "where packets are dropped, in newer curl's words",
      Refusal,
      { cacerts: "", error: `${curl} Timeout was reached` },
      /packets are dropped: open 6443\/tcp/,
    ],
    [
      "where the name does not resolve",
      Refusal,
      { cacerts: "", error: "curl: (6) Could not resolve host: k3s.example" },
      /cannot resolve the name/,
    ],
    [
      "where something else answers",
      Refusal,
      { cacerts: "<html>404</html>", error: "" },
      /is it a k3s server\?/,
    ],
    [
      "where the token is of another CA",
      SettingError,
      { cacerts: CA.replace("MIIB", "MIIC") },
      /K3S_TOKEN belongs to another cluster: it names the CA ecf69351c0d9…, .* has [0-9a-f]{12}…/,
    ],
    [
      "where the clock is before the CA's beginning",
      Refusal,
      { now: String(Date.parse("2026-11-23T15:00:00Z") / 1000) },
      /clock says 2026-11-23T15:00:00\.000Z, the server's Mon, 23 Nov 2026 15:20:00 GMT.*correct the wrong clock/,
    ],
    [
      "where the clock is after the CA's end",
      Refusal,
      { now: String(Date.parse("2040-01-01T00:00:00Z") / 1000) },
      /clock says 2040/,
    ],
    [
      "where the token is not valid",
      SettingError,
      { door: "401" },
      /^K3S_TOKEN is not valid: .* answers 401/,
    ],
    ["where the token may not come in", SettingError, { door: "403" }, /^K3S_TOKEN is not valid/],
    ["where the server is not well", Refusal, { door: "503" }, /it answers 503; try again/],
    [
      "where the connection broke",
      Refusal,
      { door: "000", shut: "curl: (60) SSL certificate problem: certificate has expired\n" },
      /it answers 000.*\(curl: \(60\) SSL certificate problem: certificate has expired\)$/,
    ],
    [
      "where the clock is two days ahead",
      Refusal,
      { now: String(Date.parse("2026-11-25T15:20:00Z") / 1000) },
      /clock says 2026-11-25T15:20:00\.000Z, the server's Mon, 23 Nov 2026 15:20:00 GMT/,
    ],
    [
      "where the clock is two years ahead, past what the server's certificate holds",
      Refusal,
      { now: String(Date.parse("2028-11-23T15:20:00Z") / 1000), door: "000" },
      /clock says 2028.*correct the wrong clock/,
    ],
    [
      "where the box's name is another node's",
      Refusal,
      { taken: other },
      /The name a1 is taken by a node of the cluster \(198\.51\.100\.66\): rename this box.*--node-name.*make remove HOST=…/,
    ],
  ];
  for (const [name, kind, over, message] of cases)
    test(name, () => {
      assert.throws(
        () => agent.plan(want, prepared(MODERN, { ...welcome, ...over })),
        (error: Error) => {
          assert.ok(error instanceof kind, error.stack);
          assert.match(error.message, message);
          assert.ok(!error.message.includes(want.K3S_TOKEN) && !error.message.includes("0".repeat(32)));
          return true;
        },
      );
    });
});

describe("the server is asked from the box", () => {
  const pem = createHash("sha256").update("pem\n").digest("hex");
  const known = { ...want, K3S_TOKEN: want.K3S_TOKEN.replace(HASH, pem) };
  /** The look with a curl that writes down its arguments and what it reads. */
  function asked(settings = known) {
    const folder = temporary();
    const curl = `printf '%s\\n' "$*" >>${folder}/args
case $* in *-K*) cat >>${folder}/stdin; printf 200 ;; */cacerts) printf 'pem\\n' ;; */nodes/*)
  for word; do
    case $before$word in -o*/taken) echo "{}" >"$word" ;; -o*/nodes) echo '{"all":1}' >"$word" ;; esac
    before=$word
  done ;;
esac`;
    const facts = look([agent], settings, { PATH: programs(folder, { curl }) });
    const read = (name: string) =>
      look([{ look: () => [`fact x; cat ${folder}/${name} 2>/dev/null`] }], want).x ?? "";
    return { facts, args: read("args"), stdin: read("stdin") };
  }

  test("for its CA, for the token's word, for a node of this name, and for all, in bounded time", () => {
    const { facts, args, stdin } = asked();
    assert.deepEqual([facts.cacerts, facts.door], ["pem\n", "200"]);
    assert.deepEqual([facts.taken, facts.registered], ["{}\n", '{"all":1}\n']);
    assert.equal(args.trim().split("\n").length, 3);
    for (const line of args.trim().split("\n")) assert.match(line, /--connect-timeout \d+ --max-time \d+/);
    assert.match(args, /\/v1-k3s\/client-k3s-controller\.crt/);
    assert.equal(stdin, `user = "node:${"0".repeat(32)}"\n`);
    assert.ok(!args.includes("0".repeat(32)), "the password stands on no argument list");
  });

  test("with whatever password, as curl reads it", () => {
    for (const [password, read] of Object.entries({
      "changeme!": "changeme!",
      "a:b::c": "a:b::c",
      "it's $(id)": "it's $(id)",
      'a"b\\c': 'a\\"b\\\\c',
    })) {
      const { stdin } = asked({
        ...known,
        K3S_TOKEN: known.K3S_TOKEN.replace("0".repeat(32), () => password),
      });
      assert.equal(stdin, `user = "node:${read}"\n`);
    }
  });

  test("for the name that --node-name gives", () => {
    assert.match(asked({ ...known, AGENT_ARGS: "--node-name=cloud-b" }).args, /\/nodes\/cloud-b /m);
  });

  test("not at all without a URL or a token", () => {
    for (const none of [{ K3S_URL: "" }, { K3S_TOKEN: "" }])
      assert.equal(asked({ ...want, ...none }).args, "");
  });

  test("for its CA only, where that is not the one the token names: nobody else gets the password", () => {
    const { facts, args, stdin } = asked(want);
    assert.deepEqual([facts.cacerts, facts.door, stdin], ["pem\n", undefined, ""]);
    assert.equal(args.trim().split("\n").length, 1);
  });
});

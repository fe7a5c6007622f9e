import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { describe, test } from "node:test";
import { SettingError } from "../lib/settings.ts";
import { Refusal } from "../lib/step.ts";
import { admission, agent } from "../scripts/agent.ts";
import {
  answering,
  boxOf,
  type Facts,
  fixture,
  look,
  MODERN,
  node,
  prepared,
  programs,
  temporary,
  wanted,
} from "./helpers.ts";

const CA = fixture("cacerts-v1.17.6.pem");
const HASH = createHash("sha256").update(CA).digest("hex");
const want = wanted({
  K3S_URL: "https://198.51.100.10:6443",
  K3S_TOKEN: `K10${HASH}::server:${"0".repeat(32)}`,
});
/** The server accepts the token, and has no node of this name. */
const welcome: Facts = {
  cacerts: CA,
  error: "",
  date: "Mon, 23 Nov 2026 15:20:00 GMT\n",
  door: "200",
  taken: '{"kind":"Status","status":"Failure","reason":"NotFound","code":404}',
  proof: "",
};
const other = JSON.stringify(node({ name: "a1", ip: "198.51.100.66", n: 3 }));

test("the recorded CA has the hash that is in the recorded token", () => {
  assert.equal(HASH.slice(0, 12), "ecf69351c0d9");
});

describe("an agent is set up", () => {
  const cases: [name: string, over: Facts][] = [
    ["if the server answers, accepts the token, and has no node of this name", {}],
    ["if the box is already in the cluster and joins again", { taken: other, proof: "yes\n" }],
    [
      "if the server was not queried because the box has already joined with the same credentials",
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

describe("make agent refuses, and changes nothing,", () => {
  const curl = "curl: (7) Failed to connect to 198.51.100.10 port 6443:";
  const cases: [name: string, kind: typeof Refusal | typeof SettingError, over: Facts, message: RegExp][] = [
    [
      "if nothing listens at K3S_URL",
      Refusal,
      { cacerts: "", error: `${curl} Connection refused` },
      /does not answer this box at https:\/\/198\.51\.100\.10:6443\/cacerts: nothing listens there.*refused/,
    ],
    [
      "if a firewall rejects the connection, as firewalld does",
      Refusal,
      { cacerts: "", error: `${curl.replace(":6443", "")} after 3 ms: No route to host` },
      /a firewall rejects it: open 6443\/tcp/,
    ],
    [
      "if packets are dropped",
      Refusal,
      { cacerts: "", error: "curl: (28) Connection timed out after 8001 milliseconds" },
      /packets are dropped: open 6443\/tcp/,
    ],
    [
      "if packets are dropped, as newer releases of curl report it",
      Refusal,
      { cacerts: "", error: `${curl} Timeout was reached` },
      /packets are dropped: open 6443\/tcp/,
    ],
    [
      "if the server's name cannot be resolved",
      Refusal,
      { cacerts: "", error: "curl: (6) Could not resolve host: k3s.example" },
      /cannot resolve the name/,
    ],
    [
      "if something other than k3s answers",
      Refusal,
      { cacerts: "<html>404</html>", error: "" },
      /is it a k3s server\?/,
    ],
    [
      "if the token belongs to another CA",
      SettingError,
      { cacerts: CA.replace("MIIB", "MIIC") },
      /K3S_TOKEN belongs to another cluster: it names the CA ecf69351c0d9…, .* has [0-9a-f]{12}…/,
    ],
    [
      "if the clock is before the start of the CA's validity",
      Refusal,
      { now: String(Date.parse("2026-11-23T15:00:00Z") / 1000) },
      /clock says 2026-11-23T15:00:00\.000Z, the server's Mon, 23 Nov 2026 15:20:00 GMT.*correct the wrong clock/,
    ],
    [
      "if the clock is after the end of the CA's validity",
      Refusal,
      { now: String(Date.parse("2040-01-01T00:00:00Z") / 1000) },
      /clock says 2040/,
    ],
    [
      "if the server answers 401 to the token",
      SettingError,
      { door: "401" },
      /^K3S_TOKEN is not valid: .* answers 401/,
    ],
    ["if the server answers 403 to the token", SettingError, { door: "403" }, /^K3S_TOKEN is not valid/],
    ["if the server answers 503", Refusal, { door: "503" }, /it answers 503; try again/],
    [
      "if the connection fails, with curl's error message",
      Refusal,
      { door: "000", shut: "curl: (60) SSL certificate problem: certificate has expired\n" },
      /it answers 000.*\(curl: \(60\) SSL certificate problem: certificate has expired\)$/,
    ],
    [
      "if the clock is two days ahead",
      Refusal,
      { now: String(Date.parse("2026-11-25T15:20:00Z") / 1000) },
      /clock says 2026-11-25T15:20:00\.000Z, the server's Mon, 23 Nov 2026 15:20:00 GMT/,
    ],
    [
      "if the clock is two years ahead, after the server's certificate has expired",
      Refusal,
      { now: String(Date.parse("2028-11-23T15:20:00Z") / 1000), door: "000" },
      /clock says 2028.*correct the wrong clock/,
    ],
    [
      "if another node has the box's name",
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

describe("the server is queried from the box", () => {
  const pem = createHash("sha256").update("pem\n").digest("hex");
  const known = { ...want, K3S_TOKEN: want.K3S_TOKEN.replace(HASH, pem) };
  /** The look with a curl that records its arguments and its input. */
  function asked(settings = known, ca = "echo pem") {
    const folder = temporary();
    const curl = `printf '%s\\n' "$*" >>${folder}/args
case $* in *-K*) cat >>${folder}/stdin; printf 200 ;; *)
  for word; do
    case $before$word in -o*/ca) ${ca} >"$word" ;; -o*/taken) echo "{}" >"$word" ;; -o*/nodes) echo '{"all":1}' >"$word" ;; esac
    before=$word
  done ;;
esac`;
    const facts = look([agent], settings, { PATH: programs(folder, { curl }) });
    const read = (name: string) =>
      look([{ look: () => [`fact x; cat ${folder}/${name} 2>/dev/null`] }], want).x ?? "";
    return { facts, args: read("args"), stdin: read("stdin") };
  }

  test("for its CA, for access with the token, for a node of this name and for all nodes, each with a time limit", () => {
    const { facts, args, stdin } = asked();
    assert.deepEqual([facts.cacerts, facts.door], ["pem\n", "200"]);
    assert.deepEqual([facts.taken, facts.registered], ["{}\n", '{"all":1}\n']);
    assert.equal(args.trim().split("\n").length, 3);
    for (const line of args.trim().split("\n")) assert.match(line, /--connect-timeout \d+ --max-time \d+/);
    assert.match(args, /\/v1-k3s\/client-k3s-controller\.crt/);
    assert.equal(stdin, `user = "node:${"0".repeat(32)}"\n`);
    assert.ok(!args.includes("0".repeat(32)), "the password is in no argument list");
  });

  test("with any password, quoted for curl's config file", () => {
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

  test("for a node of the name given by --node-name", () => {
    assert.match(asked({ ...known, AGENT_ARGS: "--node-name=cloud-b" }).args, /\/nodes\/cloud-b /m);
  });

  test("for its CA byte for byte, because its hash is in the token", () => {
    const bare = {
      ...want,
      K3S_TOKEN: want.K3S_TOKEN.replace(HASH, createHash("sha256").update("pem").digest("hex")),
    };
    const { facts } = asked(bare, "printf pem");
    assert.deepEqual([facts.cacerts, facts.door], ["pem", "200"]);
  });

  test("not at all without a URL or a token", () => {
    for (const none of [{ K3S_URL: "" }, { K3S_TOKEN: "" }])
      assert.equal(asked({ ...want, ...none }).args, "");
  });

  test("only for its CA if that is not the CA in the token, so that nobody else receives the password", () => {
    const { facts, args, stdin } = asked(want);
    assert.deepEqual([facts.cacerts, facts.door, stdin], ["pem\n", undefined, ""]);
    assert.equal(args.trim().split("\n").length, 1);
  });
});

describe("an agent of make up asks the server, of which the operator has the token,", () => {
  /** Did it ask for everything? And the facts that it has then. */
  const again = async (own: Facts, nodes: string | undefined) => {
    const sent: string[] = [];
    const box = boxOf({ want, shell: answering({ cacerts: CA, proof: "" }, sent) });
    const facts = (await admission(box, own, nodes)) as Facts;
    assert.ok(box.want.allowed?.has("join"), "it is not asked again");
    return { all: /client-k3s-controller/.test(sent.join()), facts };
  };

  test("only whether it is reached, if the operator has its nodes as well", async () => {
    const { all, facts } = await again({ hostname: "b1\n" }, "list");
    assert.equal(all, false);
    assert.deepEqual([facts.door, facts.registered, facts.hostname], ["200", "list", "b1\n"]);
  });

  test("for everything if the operator does not have its nodes, or if the server has refused the box before", async () => {
    for (const [own, nodes] of [
      [{}, undefined],
      [{ cacerts: CA, door: "401\n" }, "list"],
    ] as const) {
      const { all, facts } = await again(own, nodes);
      assert.deepEqual([all, facts.door, facts.registered], [true, undefined, undefined]);
    }
  });

  test("and forgets what another server has said", async () => {
    const { facts } = await again({ taken: other, shut: "x", registered: "old", error: "x" }, "");
    assert.deepEqual(
      [facts.taken, facts.shut, facts.registered, facts.error],
      [undefined, undefined, "", undefined],
    );
  });
});

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import { readExample } from "../lib/env-file.ts";
import { check, flagOf, NAMES, SettingError, settle } from "../lib/settings.ts";
import { publicIp, SETTINGS, type SettingName } from "../lib/table.ts";
import { ROOT, TOKEN, temporary } from "./helpers.ts";

const refusal = (name: SettingName, value: string, origin = "variable X"): string => {
  try {
    check(name, value, origin);
  } catch (error) {
    assert.ok(error instanceof SettingError);
    return error.message;
  }
  return "";
};

describe("every setting", () => {
  const words = readExample();
  for (const name of NAMES) {
    test(`has a valid example, a valid default and a description in env.example: ${name}`, () => {
      check(name, words[name]?.example as string, "example");
      const { value } = SETTINGS[name];
      if (value) check(name, value, "default");
      assert.match(words[name]?.help as string, /^\S.{20,}\.$/);
      assert.ok(words[name]?.help.includes(value), "its default is not what env.example says");
    });
  }

  test("is in env.example exactly once, and nothing else is", () => {
    const text = readFileSync(join(ROOT, "env.example"), "utf8");
    const keys = text.split("\n").flatMap((line) => /^(?:# )?([A-Z][A-Z0-9_]*)=/.exec(line)?.[1] ?? []);
    assert.deepEqual(keys.toSorted(), NAMES.toSorted());
  });
});

const CA = `K10${"ab".repeat(32)}::`;
/** Values that no setting accepts, or that one of them does not. */
const WRONG: Partial<Record<SettingName, string[]>> = {
  BACKUP_EVERY: ["6", "0h", "31d", "721h", "90m", "1w", "-1h"],
  BACKUP_TO: [
    "b1=198.51.100.20",
    "b1 b2",
    "http://s3.example/x",
    "https://id:key@s3.example/x",
    "https://s3.example/a b",
    "https://s3.example/x?y",
    "$(id)",
  ],
  BACKUP_KEEP: ["0", "-1", "1001", "x"],
  S3_REGION: ["EU", "a b", "a/b"],
  SERVER: [
    "-oProxyCommand=id",
    "ok -oProxyCommand=id",
    "a\nb",
    "$(id)",
    "`id`",
    "a;b",
    "a'b",
    "root@203.0.113.10=10.0.0.1",
    "root@-oProxyCommand",
    "ssh://-x",
    "a=1.2.3",
    "a=b=c",
    "root:pw@203.0.113.10",
  ],
  AGENTS: ["ok -oProxyCommand=id", "ok a\nb", "ok $(id)", "ok,b", "a=192.168.1.1", "=203.0.113.1"],
  TUNNEL_KUBELETS: ["no", "true", "YES"],
  NOTIFY_URL: [
    "hooks.slack.com/services/x",
    "ftp://a/b",
    'https://a/"b',
    "https://a/b c",
    "https://a/\\b",
    "https://a/b\nurl = c",
    "https://api.telegram.org/bot1:x/sendMessage",
    "https://api.telegram.org/bot1:x/getMe?chat_id=1",
  ],
  NOTIFY_FORM: ["Slack", "feishu", "json "],
  HOST: ["-v", "--", "a\rb", "${HOME}", "a&b", "a|b", "a>b", "\u0000", "a\tb=x", "汉字"],
  K3S_VERSION: [
    "latest",
    "1.36.2",
    "v1.36.2",
    "v1.16.1+k3s1",
    "v1.36.2+k3s1; id",
    "v1.36.2+k3s1\n",
    "v2.0.0+k3s1",
  ],
  K3S_MIRRORS: [
    "https://]",
    "https://a:b:c",
    "https://a:999999",
    "ftp://a/b",
    "https://a b",
    "https://a/$(id)",
    "https://a/'",
    "file:///etc",
    "//a",
  ],
  K3S_SHA256: ["abc", "A".repeat(64), "a".repeat(65), `${"a".repeat(63)}\n`],
  HOST_KEY: ["SHA256:x", "MD5:aa:bb", `SHA256:${"a".repeat(43)},`, `SHA256:${"$".repeat(43)}`],
  K3S_BIN: ["a\nb", "a\u0000b", "a\u001b[2J", "a\u009bb"],
  PROXY_MODE: ["IPVS", "ipvs ", "userspace", "ipvs\n"],
  SERVER_ARGS: [
    "--x='a'",
    '--x="a"',
    "--x\n--y",
    "--x\\",
    "`id`",
    "--x\r",
    "--x \u0001",
    // They are at the beginning of a line in the unit.
    "#x --y",
    "--x ; /bin/y",
    // They go into rules of firewalls, and into the path of a request.
    "--cluster-cidr=$(id)",
    "--a -service-cidr 10.43.0.0/16;id",
    "--cluster-domain=a/b",
    "--cluster-cidr=999.1.1.1/16",
    "--cluster-cidr=10.42.0.0/33",
    "--service-cidr 10.42.0/16",
    "--cluster-cidr=10.42.0.0/16,fd42::/129",
    "--cluster-cidr=0.0.0.0/0",
    "--cluster-cidr=10.43.0.0/16",
    "--service-cidr=10.42.128.0/20",
    "--cluster-cidr=10.0.0.0/8",
    "--cluster-cidr=10.9.0.0/16 --service-cidr=10.9.0.0/16",
    "--cluster-cidr=10.42.0.0/16,fd42::/56 --service-cidr=10.43.0.0/16,fd42::1:0/112",
    "--node-name=../x",
    "--cluster-init",
    "-cluster-init=true",
    "--a --server=https://203.0.113.1:6443",
    "-s https://203.0.113.1:6443",
    "--cluster-reset-restore-path=/x",
    // k3s would stop to read flags there.
    "server --disable=traefik",
    "--disable=traefik x --tls-san=a",
    "--node-label a=b c=d",
    "--secrets-encryption true --tls-san=a",
    "--cluster-cidr=10.42.0.0/16 --cluster-cidr=fd42::/56",
    // The kubelet exits because of them.
    "--node-label=node-role.kubernetes.io/worker=true",
    "--node-label a=b,c",
    "--node-taint=a=b:Never",
    "--kube-apiserver-arg --secure-port=7443",
    "--kube-proxy-arg --proxy-mode=ipvs",
  ],
  AGENT_ARGS: ["it's", "a\nb"],
  NODE_LABELS: [
    "a",
    "a=b c",
    "=b",
    "a=b,c=d",
    "-a=b",
    "a=$(id)",
    "node-role.kubernetes.io/worker=true",
    "x.k8s.io/a=b",
    "topology.kubernetes.io/rack=r1",
  ],
  NODE_TAINTS: [
    "a=b",
    "a:Never",
    "a=b:noschedule",
    "a=b:NoSchedule,c=d:NoSchedule",
    ":NoSchedule",
    "a='b':NoExecute",
    "a=b:NoSchedule x:NoExecute a=c:NoSchedule",
  ],
  K3S_CONFIG: ["a\nb"],
  AIRGAP: ["no", "YES", "true"],
  REGISTRY_MIRRORS: [
    "docker.io",
    "https://x",
    "docker.io=x",
    "docker.io=https://a'b",
    "a b=https://x",
    '"x"=https://x',
    "=https://x",
  ],
  HTTPS_PROXY: [
    "proxy:3128",
    "http://",
    "http://a b",
    "ftp://x",
    "http://u:p'@x",
    "http://x/y",
    "http://$(id)@x",
  ],
  HTTP_PROXY: ["proxy"],
  NO_PROXY: ["a b", "a;b", "$(id)"],
  ELREPO_URL: ["https://x/ y", "rsync://x", "https://x/'"],
  ELREPO_KERNEL_URL: ["https://x/|sh", "x"],
  EPEL_URL: ["https://x/$y", "https://"],
  K3S_DATASTORE_ENDPOINT: [
    "sqlite:///x",
    "postgres://a b",
    "postgres://a'b",
    "etcd",
    "postgres://",
    "mysql://a\nb",
    "mysql://a\u0000b",
  ],
  K3S_URL: [
    "http://203.0.113.10:6443",
    "https://203.0.113.10:6443/x",
    "203.0.113.10",
    "https://a b",
    "https://a:6443\n",
  ],
  K3S_TOKEN: [
    "secret",
    `${TOKEN} `,
    `${TOKEN}\n`,
    TOKEN.slice(3),
    `K10xyz::server:1`,
    `${CA}server:`,
    `${CA}:x`,
    `${CA}abcdef.0123456789abcdef`,
    `${CA}server:a\u0007b`,
    `${CA}server:#'"\``,
  ],
};

describe("a setting may be", () => {
  const RIGHT: [what: string, name: "HOST_KEY" | "SERVER_ARGS", value: string][] = [
    ["two fingerprints", "HOST_KEY", `SHA256:${"a".repeat(43)} SHA256:${"b".repeat(43)}`],
    [
      "a taint with a value, and one without",
      "SERVER_ARGS",
      "--node-taint=a=b:NoSchedule --node-taint x/y:NoExecute",
    ],
  ];
  for (const [what, name, value] of RIGHT)
    test(what, () => assert.doesNotThrow(() => check(name, value, "a flag")));
});

/** Not IPv4 addresses in their usual notation, and ones that other clouds cannot reach, with the reason. */
const NOT_ADDRESSES = [
  "0x7f.1",
  "1.2.3",
  "01.2.3.4",
  "1.2.3.04",
  "1.2.3.256",
  "1.2.3.4.5",
  "203.0.113.1/24",
  "203.0.113.1 ",
  "203.0.113.1\n",
  "3405803777",
  "fe80::1%eth0",
  "2001:db8::1",
  "::ffff:203.0.113.1",
  "$(id)",
  "-1.2.3.4",
  "host",
  "１.2.3.4",
];
const UNREACHABLE: [address: string, reason: RegExp][] = [
  ["0.0.0.0", /the box itself/],
  ["127.0.0.1", /the box itself/],
  ["10.0.0.1", /is private/],
  ["172.16.0.1", /is private/],
  ["172.31.255.255", /is private/],
  ["192.168.0.11", /is private/],
  ["100.64.0.1", /provider's own/],
  ["100.127.255.255", /provider's own/],
  ["169.254.169.254", /link-local/],
  ["192.0.0.8", /protocols alone/],
  ["192.0.2.1", /documents/],
  ["192.88.99.1", /protocols alone/],
  ["198.18.0.1", /for tests/],
  ["198.19.255.255", /for tests/],
  ["224.0.0.1", /not a host's address/],
  ["255.255.255.255", /not a host's address/],
];
const REACHABLE = [
  "203.0.113.10",
  "1.1.1.1",
  "9.255.255.255",
  "11.0.0.1",
  "100.63.255.255",
  "100.128.0.1",
  "172.15.0.1",
  "172.32.0.1",
  "192.0.1.1",
  "192.0.3.1",
  "192.88.98.1",
  "198.17.255.255",
  "198.20.0.1",
  "198.51.100.11",
  "198.51.101.11",
  "192.167.1.1",
  "192.169.1.1",
  "223.255.255.255",
];

describe("a wrong value", () => {
  for (const [name, values] of Object.entries({
    ...WRONG,
    PUBLIC_IP: [...NOT_ADDRESSES, ...UNREACHABLE.map(([ip]) => ip)],
  }))
    test(`of ${name} is refused with its name, its origin, and what is expected`, () => {
      for (const value of values) {
        const message = refusal(name as SettingName, value);
        assert.ok(message.startsWith(`${name} `), JSON.stringify(value));
        assert.match(message, /\(variable X\): expected \S+/);
        assert.ok(!message.includes("\n"), "one line");
      }
    });

  test("is quoted as it was read, so that whitespace is visible", () => {
    assert.match(refusal("PROXY_MODE", "ipvs\n"), /^PROXY_MODE is "ipvs\\n" \(/);
  });

  test("of a secret is not repeated", () => {
    for (const value of ["hunter2", `${TOKEN}x y`])
      for (const name of ["K3S_TOKEN", "K3S_DATASTORE_ENDPOINT", "HTTPS_PROXY"] as const)
        assert.ok(!refusal(name, value).includes(value.slice(0, 6)));
  });

  test("does not include a token with any password that k3s accepts", () => {
    for (const password of [
      "changeme!",
      "a:b::c",
      "$(id)",
      "it's",
      'a"b',
      "back\\slash",
      "#x;y",
      "a b",
      "ä%€",
      "K10",
    ])
      assert.equal(refusal("K3S_TOKEN", `${CA}server:${password}`), "", password);
  });

  test("of arguments that contains a secret is not repeated", () => {
    for (const value of [
      "--token=hunter2",
      "-t hunter2",
      "--token\thunter2",
      "--vpn-auth=name=tailscale,joinKey=hunter2",
      "--etcd-s3-secret-key=hunter2",
      "--x --datastore-endpoint=postgres://a:hunter2@b/c",
    ])
      for (const name of ["SERVER_ARGS", "AGENT_ARGS"] as const) {
        assert.match(refusal(name, value), /expected no secret among arguments/);
        assert.ok(!refusal(name, value).includes("hunter2"));
      }
    assert.equal(refusal("SERVER_ARGS", "--token-file=/root/token --tls-san=x"), "");
  });

  test("of networks is refused if they overlap, and only then", () => {
    for (const right of [
      "--cluster-cidr=10.1.0.0/16 --service-cidr=10.2.0.0/16",
      "--cluster-cidr=10.42.0.0/16,fd42::/56 --service-cidr=10.43.0.0/16,fd43::/112",
      "--cluster-cidr=10.43.0.0/16 --service-cidr=10.42.0.0/16",
    ])
      assert.equal(refusal("SERVER_ARGS", right), "", right);
    assert.match(
      refusal("SERVER_ARGS", "--cluster-cidr=10.43.0.0/16"),
      /expected networks of their own .*: 10\.43\.0\.0\/16 and 10\.43\.0\.0\/16 overlap$/,
    );
  });

  test("of a destination that contains a password is not repeated", () => {
    for (const value of [
      "root:hunter2@b1",
      "b2 root:hunt/=er2@b1",
      "ssh://root:hunter2@b1:22",
      "a:hunter2@x@b1=1.2.3.4",
    ])
      for (const name of ["SERVER", "AGENTS", "HOST"] as const) {
        assert.match(refusal(name, value), /^\w+ \(variable X\): expected no password in it/, value);
        assert.ok(!refusal(name, value).includes("er2"));
      }
    for (const value of ["ssh://root@b1:2222", "user@dom.example@b1", "root@[2001:db8::1]", "[2001:db8::1]"])
      assert.equal(refusal("HOST", value), "", value);
  });

  test("of arguments that this project sets, or that only servers accept, is refused with the argument's name", () => {
    assert.match(
      refusal("SERVER_ARGS", "--disable=traefik --data-dir /data"),
      /^SERVER_ARGS is "--disable=traefik --data-dir \/data" \(.*\): expected no --data-dir: k3s's data are/,
    );
    assert.match(refusal("AGENT_ARGS", "--node-ip=10.0.0.1"), /expected no --node-ip: PUBLIC_IP/);
    assert.match(refusal("AGENT_ARGS", "--disable=traefik"), /expected no --disable: only servers know it/);
    assert.match(refusal("AGENT_ARGS", "--server=https://x:6443"), /expected no --server: K3S_URL has it/);
  });

  test("of SERVER_ARGS that starts an embedded etcd is refused with the reason and the alternative", () =>
    assert.match(refusal("SERVER_ARGS", "--cluster-init"), /K3S_DATASTORE_ENDPOINT.*private addresses/));

  test("that is long is truncated in the error", () => {
    assert.ok(refusal("PROXY_MODE", "x".repeat(100_000)).length < 300);
    assert.match(refusal("SERVER_ARGS", "x".repeat(5000)), /at most 4096 characters/);
    const boxes = (n: number) =>
      Array.from({ length: n }, (_, i) => `box${i}=198.51.100.${i % 250}`).join(" ");
    check("AGENTS", boxes(500), "here");
    assert.match(refusal("AGENTS", boxes(900)), /at most 16384 characters/);
    for (const long of [`h1 password="${"Zq ".repeat(1500)}"`, `h1 token=${"Zq".repeat(6000)}`])
      assert.doesNotMatch(refusal("AGENTS", long), /Zq/);
  });
});

describe("a public address", () => {
  for (const [address, reason] of UNREACHABLE)
    test(`is not ${address}`, () => assert.match(publicIp(address) ?? "", reason));
  test("can be any other IPv4 address", () => {
    for (const address of REACHABLE) assert.equal(publicIp(address), undefined, address);
  });
});

test("a destination can be anything that ssh accepts, such as an alias or a URL with a port, and can have a public address", () => {
  for (const value of [
    "b1",
    "root@b1",
    "deploy@cloud-b.example",
    "ssh://root@b1:2222",
    "b1=203.0.113.9",
    "root@203.0.113.9",
    "[2001:db8::1]",
    "_alias",
  ])
    assert.equal(refusal("HOST", value), "", value);
});

describe("settings", () => {
  const path = join(temporary(), ".env");
  writeFileSync(
    path,
    "# mine\nPROXY_MODE=ipvs\n\nSERVER='root@203.0.113.10'\nAGENTS=\nK3S_VERSION=v1.17.6+k3s1\n",
  );

  test("come from flags, or else the environment, or else the env file, or else the defaults", () => {
    const { settings, origins } = settle(
      { "k3s-version": "v1.30.1+k3s1" },
      { K3S_VERSION: "v1.31.1+k3s1", PROXY_MODE: "nftables" },
      path,
    );
    assert.deepEqual(
      [settings.K3S_VERSION, settings.PROXY_MODE, settings.SERVER, settings.EPEL_URL],
      ["v1.30.1+k3s1", "nftables", "root@203.0.113.10", SETTINGS.EPEL_URL.value],
    );
    assert.deepEqual(
      [origins.K3S_VERSION, origins.PROXY_MODE, origins.SERVER, origins.EPEL_URL],
      ["flag --k3s-version", "variable PROXY_MODE", `${path} line 4`, "default"],
    );
  });

  test("can be set to an empty value, such as HOST= for this machine", () => {
    const { settings, origins } = settle({}, { HOST: "", K3S_VERSION: undefined, PROXY_MODE: "" }, path);
    assert.deepEqual([settings.HOST, origins.HOST, settings.PROXY_MODE], ["", "variable HOST", ""]);
    assert.deepEqual([settings.AGENTS, origins.AGENTS], ["", `${path} line 5`]);
  });

  test("have their defaults if there is no env file", () => {
    const { settings } = settle({}, {}, join(temporary(), "none"));
    for (const name of NAMES) assert.equal(settings[name], SETTINGS[name].value);
  });

  const wrong: [
    name: string,
    flags: Record<string, string>,
    env: Record<string, string>,
    line: string,
    origin: string,
  ][] = [
    ["a flag", { "proxy-mode": "x" }, {}, "", "flag --proxy-mode"],
    ["a variable", {}, { PROXY_MODE: "x" }, "", "variable PROXY_MODE"],
    ["a line of the env file", {}, {}, "PROXY_MODE=x", "line 3"],
  ];
  for (const [name, flags, env, line, origin] of wrong)
    test(`are refused with the origin of a wrong value: ${name}`, () => {
      const own = join(temporary(), ".env");
      writeFileSync(own, `# one\n\n${line}\n`);
      assert.throws(
        () => settle(flags, env, own),
        (error: Error) => error instanceof SettingError && error.message.includes(origin),
      );
    });

  test("for proxies are not read from environment variables, but from make's command line, flags and the env file", () => {
    const own = join(temporary(), ".env");
    writeFileSync(own, "HTTPS_PROXY=http://boxes:1\n");
    const env = { HTTPS_PROXY: "http://here:2", NO_PROXY: "here" };
    assert.equal(settle({}, env, own).settings.HTTPS_PROXY, "http://boxes:1");
    assert.equal(settle({}, env, own).settings.NO_PROXY, "");
    const made = { ...env, MAKEFLAGS: "s -- DRY=1 HTTPS_PROXY=http://here:2" };
    assert.equal(settle({}, made, own).settings.HTTPS_PROXY, "http://here:2");
    assert.equal(settle({}, made, own).settings.NO_PROXY, "");
    assert.equal(settle({ "https-proxy": "http://flag:3" }, env, own).settings.HTTPS_PROXY, "http://flag:3");
  });

  const given: Record<string, [makeflags: string, value: string, isTaken: boolean]> = {
    "a $ that make has expanded with the next letter": [" -- BACKUP=a$$bc", "ac", true],
    "a command that make ran": [" -- BACKUP=$$(shell\\ id)", "uid=0", true],
    "a $ that leaves nothing of the value": [" -- BACKUP=$$b", "", true],
    "a $ in the last of two values": [" -- BACKUP=x BACKUP=a$$b", "a", true],
    "a $ among other variables, spaces and backslashes": [
      "s -j2 -- SERVER=a1 BACKUP=it's\\ a$$b\\\\c DRY=1",
      "it's a\\c",
      true,
    ],
    "a $ after :=": [" -- BACKUP:=a$$b", "a", true],
    "two $ that stand for one": [" -- BACKUP=a$$$$b", "a$b", false],
    "no $": [" -- BACKUP=a\\ b", "a b", false],
    "a $ only in another variable": [" -- AGENTS=a$$b BACKUP=ab", "ab", false],
    "a $ in the text of another variable": [" -- AGENTS=x\\ BACKUP=a$$b", "a", false],
    "a $ from the environment": ["", "a$b", false],
  };
  for (const [name, [MAKEFLAGS, BACKUP, isTaken]] of Object.entries(given))
    test(`that make passes with ${name} are ${isTaken ? "refused, because they belong into the env file" : "accepted"}`, () => {
      const call = () => settle({}, { MAKEFLAGS, BACKUP }, "/no/.env").settings.BACKUP;
      if (isTaken) assert.throws(call, /^SettingError|BACKUP \(make's command line\): it has a \$/);
      else assert.equal(call(), BACKUP);
    });

  test("each have a separate flag", () => {
    assert.equal(new Set(NAMES.map(flagOf)).size, NAMES.length);
    assert.equal(flagOf("K3S_BIN"), "k3s-bin");
  });
});

test("several servers are refused without a shared datastore, with the reason", () => {
  const path = join(temporary(), ".env");
  writeFileSync(path, 'SERVER="a1 b1"\n');
  assert.throws(
    () => settle({}, {}, path),
    /SERVER \(.*line 1\): expected one of a1, b1, or a K3S_DATASTORE_ENDPOINT.*embedded etcd/,
  );
  const url = "mysql://k3s:x@tcp(db.example.org:3306)/k3s";
  assert.equal(settle({}, { K3S_DATASTORE_ENDPOINT: url }, path).settings.SERVER, "a1 b1");
});

describe("a line of the env file that dotenv would not read completely", () => {
  const AGENTS = "AGENTS=a=203.0.114.11";
  const cases: [text: string, line: number][] = [
    [`${AGENTS}\n  b=203.0.114.12 c=203.0.114.13\n  root@d`, 3],
    ["SERVER root@a1", 1],
    ["SERVER:root@a1", 1],
    ["SERVER := root@a1", 1],
    ["SERVER+=b", 1],
    [`# one\n\n- ${AGENTS}`, 3],
    ["set SERVER=a1", 1],
    ["K3S_TOKEN='a\nb'\nAGENTS", 3],
    ["K3S_DATASTORE_ENDPOINT=postgres://k3s:hunter2#hunter2@db/k3s", 1],
    ["SERVER=a1#b1 # c", 1],
  ];
  for (const [text, line] of cases)
    test(`is refused with its number, and not repeated: ${JSON.stringify(text)}`, () => {
      const path = join(temporary(), ".env");
      writeFileSync(path, `${text}\n`);
      assert.throws(
        () => settle({}, {}, path),
        ({ message }: Error) =>
          message.startsWith(`${path} line ${line}: expected `) && !/hunter|root/.test(message),
      );
    });

  test("does not include comments, quotes, spaces and line endings that dotenv accepts", () => {
    const path = join(temporary(), ".env");
    const text =
      "\ufeff# c\r\n\r\n export SERVER = a1 # first\r\nAGENTS='b1 b2'#c\r\nHOST=# none\r\n\t# d\r\nAIRGAP: yes\r\nK3S_BIN=\"./a #b\"\r\n";
    writeFileSync(path, text);
    const { SERVER, AGENTS, HOST, AIRGAP, K3S_BIN } = settle({}, {}, path).settings;
    assert.deepEqual([SERVER, AGENTS, HOST, AIRGAP, K3S_BIN], ["a1", "b1 b2", "", "yes", "./a #b"]);
  });
});

describe("a line of the env file for one box", () => {
  const written = (text: string) => {
    const path = join(temporary(), ".env");
    writeFileSync(path, text);
    return path;
  };
  const base = 'SERVER=root@a1\nAGENTS="b1 debian@cloud-b=198.51.101.12 203.0.113.9"\nAGENT_ARGS=--all\n';

  test("applies to that box, by its name without the user and the address", () => {
    const { settings, own } = settle(
      {},
      {},
      written(
        `${base}AGENT_ARGS__cloud-b="--one --two"\nAGENT_ARGS__203.0.113.9=\nSERVER_ARGS__a1=--disable=traefik\nPROXY_MODE__cloud-b=nftables\n`,
      ),
    );
    assert.equal(settings.AGENT_ARGS, "--all");
    assert.deepEqual(
      { ...own },
      {
        "cloud-b": { AGENT_ARGS: "--one --two", PROXY_MODE: "nftables" },
        "203.0.113.9": { AGENT_ARGS: "" },
        a1: { SERVER_ARGS: "--disable=traefik" },
      },
    );
  });

  test("is overridden by a flag or a variable", () => {
    const path = written(`${base}AGENT_ARGS__b1=--one\n`);
    assert.deepEqual({ ...settle({}, { AGENT_ARGS: "--x" }, path).own }, {});
    assert.deepEqual({ ...settle({ "agent-args": "--x" }, {}, path).own }, {});
  });

  test("can be for a box that is only in HOST, and for this machine", () => {
    const path = written(`SERVER=\nAGENT_ARGS__b9=--nine\nSERVER_ARGS__${hostname()}=--here\n`);
    assert.deepEqual(
      { ...settle({ host: "root@b9" }, {}, path).own },
      {
        b9: { AGENT_ARGS: "--nine" },
        [hostname()]: { SERVER_ARGS: "--here" },
      },
    );
  });

  const wrong: [name: string, line: string, message: RegExp][] = [
    [
      "an unknown box",
      "AGENT_ARGS__b7=--x",
      /AGENT_ARGS__b7 \(.*line 4\): expected a box .*: a1, b1, cloud-b, 203/,
    ],
    ["an unknown setting", "AGENT_ARG__b1=--x", /AGENT_ARG__b1 \(.*line 4\): expected a setting: SERVER, /],
    [
      "a setting that is the same for all boxes",
      "K3S_VERSION__b1=v1.17.6+k3s1",
      /expected K3S_VERSION, which is one for all boxes/,
    ],
    ["a secret of the cluster", "K3S_TOKEN__b1=x", /expected K3S_TOKEN, which is one for all boxes/],
    ["a wrong value", "PROXY_MODE__b1=ipv", /PROXY_MODE is "ipv" \(.*line 4\): expected iptables/],
    ["another notation", "AGENT_ARGS_b1=--x", /AGENT_ARGS_b1 .*expected a setting/],
  ];
  for (const [name, line, message] of wrong)
    test(`is refused if it has ${name}`, () =>
      assert.throws(
        () => settle({}, {}, written(`${base}${line}\n`)),
        (error: Error) => error instanceof SettingError && message.test(error.message),
      ));
});

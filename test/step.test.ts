import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { converge, look as lookAt } from "../lib/converge.ts";
import { applyScript, asScript, HELPERS, reader, wrapInMain } from "../lib/protocol.ts";
import { silent } from "../lib/report.ts";
import { quote } from "../lib/sh.ts";
import { type Shell, Unreachable } from "../lib/shell.ts";
import { type Change, Failure, planAll, prints, Refusal, type Step } from "../lib/step.ts";
import { boxOf, type Facts, has, lacks, look, shell, TOKEN, temporary, wanted } from "./helpers.ts";

const SHELLS = [["sh"], ["dash"], ["bash"], ["busybox", "sh"]].filter(([name]) => has(name as string));
const skip = lacks("flock", "timeout");
const LOCK = "/run/k3s-across-clouds.lock";

/** Applies changes with this machine's sh, and a separate lock. */
function apply(changes: Change[], lock = join(temporary(), "lock")) {
  const script = applyScript(changes, "mark", () => TOKEN);
  assert.ok(script.includes(LOCK));
  const events: string[] = [];
  const stream = reader("mark", {
    change: (i) => events.push(`change ${i}`),
    say: (text) => events.push(text),
    early: (fact) => events.push(JSON.stringify(fact)),
  });
  const { status, stdout } = shell(wrapInMain(script.replaceAll(LOCK, lock)));
  for (const line of stdout.split("\n")) stream.line(line);
  return { status, events, stdout, ...stream.seen };
}
const change = (text: string, more: Partial<Change> = {}): Change => ({ why: "a test", sh: text, ...more });

describe("apply", { skip }, () => {
  test("makes the changes in their order and reports each as it starts", () => {
    const file = join(temporary(), "file");
    const { status, events, failed } = apply(
      [1, 2, 3].map((n) => change(`echo ${n} >>${file}; say did ${n}`)),
    );
    assert.equal(status, 0);
    assert.equal(failed, undefined);
    assert.equal(readFileSync(file, "utf8"), "1\n2\n3\n");
    assert.deepEqual(events, ["change 0", "did 1", "change 1", "did 2", "change 2", "did 3"]);
  });

  test("stops at the first failure, and reports its number, its status, and the output of both streams in order", () => {
    const file = join(temporary(), "file");
    const { status, failed, output } = apply([
      change("echo earlier"),
      change("echo one; echo two >&2; echo three; exit 3"),
      change(`touch ${file}`),
    ]);
    assert.equal(status, 1);
    assert.deepEqual(failed, { i: 1, status: 3 });
    assert.equal(output.trim(), "one\ntwo\nthree");
    assert.equal(existsSync(file), false);
  });

  test("stops a change if one of its commands fails or a variable is not set", () => {
    for (const text of ["false; echo went on", 'echo "$not_set"; echo went on']) {
      const { failed, output } = apply([change(text)]);
      assert.equal(failed?.i, 0);
      assert.doesNotMatch(output, /went on/);
    }
  });

  test("stops a change at its time limit, with status 124", () => {
    const began = Date.now();
    const { failed } = apply([change("sleep 20", { seconds: 1 })]);
    assert.deepEqual(failed, { i: 0, status: 124 });
    assert.ok(Date.now() - began < 10_000);
  });

  test("passes secrets to a change as variables, but not in an argument list or the environment", {
    skip: !existsSync("/proc/self") && "needs /proc",
  }, () => {
    // The brackets keep grep from finding its own pattern.
    const spy = `printf 'token %s\\n' "$K3S_TOKEN" | cksum
cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -c '[b]::server:0123' || true
env | grep -c '[b]::server:0123' || true`;
    const { output } = apply([change(spy, { secrets: ["K3S_TOKEN"] })]);
    const sum = shell(`printf 'token %s\\n' ${quote(TOKEN)} | cksum`).stdout.trim();
    assert.deepEqual(output.trim().split("\n"), [sum, "0", "0"]);
  });

  test("reports a fact before the change has ended, and not in its output", () => {
    const { events, output } = apply([change(`early token ${TOKEN}; beat; say waits; echo done`)]);
    assert.deepEqual(events, ["change 0", JSON.stringify({ token: TOKEN }), "waits"]);
    assert.equal(output.trim(), "done");
  });

  test("stops a wait when its output is closed", () => {
    const file = join(temporary(), "file");
    const wait = `i=0; while [ $i -lt 50 ]; do beat; i=$((i + 1)); sleep 0.1; done; touch ${file}`;
    shell(`sh -s <<'SCRIPT' | head -n 3 >/dev/null
${wrapInMain(applyScript([change(wait)], "mark", () => "").replaceAll(LOCK, join(temporary(), "lock")))}
SCRIPT`);
    assert.equal(existsSync(file), false);
  });

  test("passes a secret only to the change that declares it", () => {
    const { output } = apply([change(":", { secrets: ["K3S_TOKEN"] }), change('echo "${K3S_TOKEN-none}"')]);
    assert.match(output, /^none$/m);
  });

  test("does not wait for input", () => {
    assert.match(apply([change("read -r line || echo nothing to read")]).output, /nothing to read/);
  });

  test("is not confused by a change that prints similar markers", () => {
    const { failed, events } = apply([
      change("echo 'k3s-across-clouds failed 0 1'; echo 'mork failed 0 1'; echo ' mark failed 0 1'"),
    ]);
    assert.equal(failed, undefined);
    assert.deepEqual(events, ["change 0"]);
  });

  /** A run of `echo second` while another holds the lock for this many seconds; it waits for at most one. */
  const late = (seconds: number) => {
    const lock = join(temporary(), "lock");
    const script = applyScript([change("echo second")], "mark", () => "").replaceAll(LOCK, lock);
    const held = `flock ${lock} sh -c 'echo 4711 >${lock}; sleep ${seconds}' & sleep 0.3`;
    const { stdout, status } = shell(
      `${held}\nsh -s <<'END'\n${script.replace(/flock -w \d+/, "flock -w 1")}\nEND\nkill $! 2>/dev/null`,
    );
    return { stdout, status };
  };

  test("refuses a second run while another one holds the lock, and names its process", () => {
    const { stdout } = late(3);
    assert.match(stdout, /^mark say waits for an earlier run, process 4711 here$/m);
    assert.match(stdout, /^mark busy 4711$/m);
    assert.doesNotMatch(stdout, /second/);
  });

  test("applies no plan that had to wait for the lock, because it is out of date", () => {
    const { stdout } = late(0.8);
    assert.match(stdout, /^mark waited$/m);
    assert.doesNotMatch(stdout, /busy|second/);
  });

  test("completes the current change if the connection is lost, whatever it prints, and begins no other", () => {
    for (const argv of SHELLS) {
      const folder = temporary();
      const text = `i=0; while [ $i -lt 2000 ]; do echo "package $i of many, each with a line of its own"; i=$((i + 1)); done`;
      const changes = [change(`${text}\ntouch ${folder}/ended`), change(`touch ${folder}/begun`)];
      const script = wrapInMain(applyScript(changes, "mark", () => "").replaceAll(LOCK, `${folder}/lock`));
      writeFileSync(`${folder}/script`, script);
      shell(`${argv.join(" ")} <${folder}/script 2>/dev/null | head -n 2; flock ${folder}/lock true`);
      assert.equal(existsSync(`${folder}/ended`), true, `the change ends, in ${argv}`);
      assert.equal(existsSync(`${folder}/begun`), false, `no other begins, in ${argv}`);
    }
  });

  test("names in its lock a process whose end is the end of its run alone, not of the shell that stays open", () => {
    const lock = join(temporary(), "lock");
    const script = applyScript([change(`kill "$(cat ${lock})"`), change("echo second")], "mark", () => "");
    const { stdout } = shell(`(
${wrapInMain(script.replaceAll(LOCK, lock))}
)
echo "ended with $?"`);
    assert.match(stdout, /^ended with 143$/m);
    assert.doesNotMatch(stdout, /second/);
  });

  test("keeps out a second operator until the look that confirms its changes has ended", () => {
    const lock = join(temporary(), "lock");
    const script = `${applyScript([change("true")], "mark", () => "")}\nflock -n ${lock} true || echo locked`;
    assert.match(shell(wrapInMain(script.replaceAll(LOCK, lock))).stdout, /^locked$/m);
  });

  test("does not pass its lock to a process that a change starts in the background", () => {
    const lock = join(temporary(), "lock");
    apply([change("sleep 3 >/dev/null 2>&1 &")], lock);
    assert.equal(shell(`flock -n ${lock} true`).status, 0);
  });
});

test("a truncated script runs nothing", () => {
  const folder = temporary();
  const changes = [1, 2, 3].map((n) => change(`touch ${folder}/change-${n}`));
  const script = wrapInMain(`touch ${folder}/began\n${applyScript(changes, "mark", () => "")}\n`).replaceAll(
    LOCK,
    `${folder}/lock`,
  );
  const last = script.lastIndexOf("\nmain ");
  for (let cut = 1; cut <= 20; cut++) {
    shell(script.slice(0, Math.floor((last * cut) / 20)));
    assert.deepEqual(shell(`ls ${folder}`).stdout, "", `cut at ${cut} of 20`);
  }
  if (!skip) {
    shell(script);
    assert.equal(shell(`ls ${folder}`).stdout, "began\nchange-1\nchange-2\nchange-3\nlock\n");
  }
});

describe("facts", () => {
  const hostile: Record<string, string> = {
    "no text": "",
    "no newline at the end": "a\nb",
    "blank lines": "\n\na\n\n",
    "lines like markers": "fact x\nmork fact x\n mark fact x\nmark\nk3s-across-clouds-0123 end\n",
    "shell code": "$(touch /x) `id` 'a' \"b\" \\n %s\n",
    "control characters": "\u0001\t\u001b[0m\r\nx\u007f\u0000y\r",
    unicode: "汉字 ☃ 😀\n",
    "a megabyte": `${"0123456789abcdef汉字\n".repeat(45_000)}end`,
  };
  for (const [name, text] of Object.entries(hostile))
    test(`with ${name} are returned unchanged`, () => {
      const file = join(temporary(), "file");
      writeFileSync(file, text);
      const facts = look([{ look: () => [`fact hostile; cat ${file}`, "fact after; echo yes"] }], wanted());
      assert.equal(facts.hostile, text);
      assert.equal(facts.after, "yes\n");
    });

  test("about the box itself are part of every look", () => {
    const facts = look([], wanted());
    assert.equal(facts.hostname, shell("uname -n").stdout);
    assert.ok(Number(facts.now) > 1.7e9);
  });

  test("that several steps read are read only once", () => {
    const counted = { look: () => [`echo x >>${file}\nfact same; cat ${file}`] };
    const file = join(temporary(), "file");
    assert.equal(look([counted, { ...counted }], wanted()).same, "x\n");
  });
});

describe("a printed plan", () => {
  test("prints nothing that is only for the program", () => {
    const lock = join(temporary(), "lock");
    const text = asScript([change(`early token ${TOKEN}; beat; echo done`)]).replaceAll(LOCK, lock);
    const { stdout } = shell(text);
    assert.equal(stdout.includes(TOKEN), false);
    assert.match(stdout, /^done$/m);
  });

  test("names its secrets and contains none", () => {
    const text = asScript([change('printf %s "$K3S_TOKEN"', { secrets: ["K3S_TOKEN"] })]);
    assert.match(text, /^#!\/bin\/sh\n/);
    assert.doesNotMatch(text, /K10/);
    const { status, stderr } = shell(text);
    assert.notEqual(status, 0);
    assert.match(stderr, /K3S_TOKEN.*is a secret: set it/);
  });

  test("has the same effect on the box as apply", { skip }, () => {
    const folder = temporary();
    const text = asScript([change(`printf %s "$K3S_TOKEN" >${folder}/file`, { secrets: ["K3S_TOKEN"] })]);
    const { status, stderr } = shell(text.replaceAll(LOCK, `${folder}/lock`), ["sh", "-s"], {
      K3S_TOKEN: TOKEN,
    });
    assert.equal(status, 0, stderr);
    assert.equal(readFileSync(`${folder}/file`, "utf8"), TOKEN);
  });

  test("lists what must be copied first", () => {
    assert.match(
      asScript([change(":", { push: { file: "./k3s", path: "/tmp/k3s" } })]),
      /# first copy \.\/k3s to \/tmp\/k3s/,
    );
  });
});

/** A box whose scripts run here, and what was sent to it. */
function fakeBox(folder: string) {
  const scripts: string[] = [];
  const pushed: string[] = [];
  const own: Shell = {
    host: "b1",
    run: async (script, _seconds, onLine) => {
      scripts.push(script);
      const { status, stdout, stderr } = shell(script.replaceAll(LOCK, `${folder}/lock`));
      for (const line of stdout.replace(/\n$/, "").split("\n")) onLine(line);
      return { status: status ?? 1, stderr };
    },
    push: async (file, path) => void pushed.push(`${file} ${path}`),
    pull: async () => {},
    close: async () => {},
  };
  const starts: string[] = [];
  const box = (mayReboot = true) =>
    boxOf({ shell: own, server: own, line: { ...silent, starts: (why) => starts.push(why) }, mayReboot });
  return { scripts, pushed, starts, box };
}

/** A step that wants a file with this text. */
const wants = (file: string, text: string, more: Partial<Change> = {}): Step => ({
  name: "file",
  options: [],
  look: () => [`fact ${file.split("/").at(-1)}; cat ${file} 2>/dev/null`],
  plan: (_, facts) =>
    facts[file.split("/").at(-1) as string] === text
      ? []
      : [change(`printf %s ${quote(text)} >${file}`, { why: `write ${file}`, ...more })],
});

describe("converge", { skip }, () => {
  test("needs one script if there is nothing to do, and two otherwise", async () => {
    const folder = temporary();
    const { scripts, box, starts } = fakeBox(folder);
    const steps = [wants(`${folder}/a`, "1"), wants(`${folder}/b`, "2")];
    const after = await converge(box(), steps, await lookAt(box(), steps));
    assert.equal(scripts.length, 2, "a look, and one script that applies and looks again");
    assert.deepEqual([after.a, after.b], ["1", "2"]);
    assert.deepEqual(starts, [`write ${folder}/a`, `write ${folder}/b`]);
    scripts.length = 0;
    const facts = await lookAt(box(), steps);
    assert.equal(await converge(box(), steps, facts), facts);
    assert.equal(scripts.length, 1);
  });

  test("fails with what is still needed if a change had no effect", async () => {
    const folder = temporary();
    const { box } = fakeBox(folder);
    const steps = [{ ...wants(`${folder}/a`, "1"), plan: () => [change(":", { why: "do nothing" })] }];
    await assert.rejects(converge(box(), steps, {}), /Applied, but still needed: do nothing/);
  });

  test("fails with the reason if the result cannot be verified because the API does not answer", async () => {
    const { box } = fakeBox(temporary());
    let took = 20;
    const plan = () => [change(":", { unknown: `the API did not answer in ${took++} s` })];
    await assert.rejects(
      converge(box(), [{ ...wants("/x", ""), plan }], {}),
      /^Error: Applied, but the result could not be verified: the API did not answer in 21 s$/,
    );
  });

  test("fails with the change that failed, its status and its output", async () => {
    const { box } = fakeBox(temporary());
    const step = (text: string, seconds?: number): Step => ({
      ...wants("/x", ""),
      plan: () => [change(text, { why: "break it", ...(seconds ? { seconds } : {}) })],
    });
    await assert.rejects(converge(box(), [step("echo why; exit 4")], {}), (error: Failure) => {
      assert.ok(error instanceof Failure);
      assert.equal(error.message, "break it (exit status 4)");
      assert.equal(error.output.trim(), "why");
      assert.equal(error.change?.why, "break it");
      return true;
    });
    await assert.rejects(converge(box(), [step("sleep 9", 1)], {}), /break it \(timed out after 1 s\)/);
  });

  test("reports a lost connection if a look does not end", async () => {
    const { box } = fakeBox(temporary());
    await assert.rejects(
      lookAt(box(), [{ ...wants("/x", ""), look: () => ["exit 7"] }]),
      /connection was lost/,
    );
  });

  test("pushes a file just before the change that uses it", async () => {
    const folder = temporary();
    const { box, pushed, scripts } = fakeBox(folder);
    const push = { file: "./k3s", path: `${folder}/part` };
    const steps = [wants(`${folder}/a`, "1"), wants(`${folder}/b`, "2", { push })];
    await converge(box(), steps, {});
    assert.deepEqual(pushed, [`./k3s ${folder}/part`]);
    assert.equal(scripts.length, 2);
    assert.ok(scripts[0]?.includes(`>${folder}/a`) && !scripts[0].includes(`>${folder}/b`));
  });

  test("does not reboot this machine unless that was requested", async () => {
    const folder = temporary();
    const { box } = fakeBox(folder);
    const reboot = change(`touch ${folder}/restarted`, { why: "restart into the kernel", reboot: true });
    const steps = [{ ...wants(`${folder}/a`, "1"), plan: () => [change(`touch ${folder}/before`), reboot] }];
    await assert.rejects(converge(box(false), steps, {}), (error: Error) => {
      assert.ok(error instanceof Refusal);
      assert.match(error.message, /restart this machine \(or add --reboot\)/);
      return true;
    });
    assert.deepEqual([existsSync(`${folder}/before`), existsSync(`${folder}/restarted`)], [true, false]);
  });
});

describe("what looks print without a program of their own", () => {
  const files: [what: string, text: string, printed: string][] = [
    ["a line", "one\n", "one\n"],
    ["a text without its last newline", "one\ntwo", "one\ntwo\n"],
    ["blanks, backslashes and wildcards", "  a\\n\t* $(id) `id`  \n\n-n\n", "  a\\n\t* $(id) `id`  \n\n-n\n"],
    ["a long line", `${"x".repeat(20_000)}\n`, `${"x".repeat(20_000)}\n`],
    ["nothing", "", ""],
  ];
  for (const argv of SHELLS)
    test(`is a file as it is, its SHA-256, and nothing of one that is missing (${argv.join(" ")})`, () => {
      const folder = temporary();
      const run = (words: string) =>
        shell(`set -eu\n${HELPERS}\n${words}\necho done`, [...argv, "-s"]).stdout;
      for (const [what, text, printed] of files) {
        writeFileSync(`${folder}/file`, text);
        assert.equal(run(`text ${folder}/file`), `${printed}done\n`, what);
        const sum = text && `${createHash("sha256").update(text).digest("hex")}\n`;
        assert.equal(run(`digest ${folder}/file`), `${sum}done\n`, what);
      }
      assert.equal(run(`text ${folder}/none; digest ${folder}/none; text ${folder}`), "done\n");
    });
});

describe("a reboot", { skip }, () => {
  /** A box that does not answer after the reboot was ordered, or answers with these boot IDs. */
  const restart = (seconds: number, ...boots: string[]) => {
    const folder = temporary();
    const { box } = fakeBox(folder);
    const first = box();
    const run: Shell["run"] = async (script, limit, onLine) => {
      if (!existsSync(`${folder}/restarted`)) return await first.shell.run(script, limit, onLine);
      const boot = boots.length > 1 ? boots.shift() : boots[0];
      if (boot === undefined) throw new Unreachable("Could not reach b1: Connection timed out");
      return await first.shell.run(
        script.replaceAll("text /proc/sys/kernel/random/boot_id", `echo ${boot}`),
        limit,
        onLine,
      );
    };
    const reboot = change(`touch ${folder}/restarted`, { why: "restart it", reboot: true, seconds });
    const plan = () => (existsSync(`${folder}/restarted`) ? [] : [reboot]);
    const facts = { boot: "old\n", kernel: "3.10\n" };
    return converge({ ...first, shell: { ...first.shell, run } }, [{ ...wants("/x", ""), plan }], facts);
  };

  test("is complete when the box answers with another boot ID", async () => {
    assert.equal((await restart(20, "old", "new")).boot, "new\n");
  });

  test("after which a box does not come back is reported with its last known state", async () => {
    await assert.rejects(
      restart(2),
      /did not come back within 2 s of its restart. Last seen 0 s after the restart was ordered, still with kernel 3.10, boot old; since then: Could not reach b1: Connection timed out. Look at its console/,
    );
  });

  test("that does not happen is reported as such", async () => {
    await assert.rejects(
      restart(2, "old"),
      /did not restart within 2 s: \d+ s after the restart was ordered it still answered.*list-jobs/,
    );
  });
});

describe("a node that must be drained", { skip }, () => {
  /** Boxes that drain, restart (simulated), and are done; a log shows what ran where. */
  const boxes = (folder: string, ...names: string[]) =>
    names.map((name) => {
      const { box } = fakeBox(folder);
      const log = (what: string) => `echo '${name} ${what}' >>${folder}/log`;
      const drained = `${folder}/${name}.drained`;
      const drains: Step = {
        ...wants("/x", ""),
        look: () => [`fact drained; cat ${drained} 2>/dev/null`],
        plan: (_want, facts) => (facts.drained ? [] : [change(`${log("drains")}; echo yes >${drained}`)]),
      };
      const plan = (): Change[] =>
        existsSync(`${folder}/${name}`)
          ? []
          : [
              change(":", { onServer: drains, alone: true }),
              change(
                `${log("works")}; sleep 0.3; [ ${name} != bad ] || exit 1; touch ${folder}/${name}; ${log("is back")}`,
              ),
            ];
      const own = box();
      const server = {
        ...own.shell,
        run: (async (script, ...rest) =>
          own.shell.run(script.replaceAll(" drains", " drains on the server"), ...rest)) as Shell["run"],
      };
      return converge({ ...own, server }, [{ ...wants("/x", ""), plan }], {});
    });
  const log = (folder: string) => readFileSync(`${folder}/log`, "utf8").trim().split("\n");

  test("is drained from the server, and no other one is until it is back", async () => {
    const folder = temporary();
    await Promise.all(boxes(folder, "b1", "b2"));
    assert.deepEqual(
      log(folder),
      ["b1", "b2"].flatMap((b) => [`${b} drains on the server`, `${b} works`, `${b} is back`]),
    );
  });

  test("is not drained if another one has failed before", async () => {
    const folder = temporary();
    const [bad, next] = await Promise.allSettled(boxes(folder, "bad", "b3"));
    assert.match(String((bad as PromiseRejectedResult).reason), /exit status 1/);
    assert.match(
      String((next as PromiseRejectedResult).reason),
      /Not restarted, because another node of this run has failed/,
    );
    assert.deepEqual(log(folder), ["bad drains on the server", "bad works"]);
  });
});

test("a printed plan lists what must be done on the server, and does not do it here", () => {
  const text = asScript([change("", { onServer: wants("/x", ""), why: "drain it" }), change("echo here")]);
  assert.match(text, /^# first, on the server: drain it$/m);
  assert.match(text, /^echo here$/m);
});

test("a plan ends at a reboot, and at a change after which the look must be repeated", () => {
  const step = (more: Partial<Change>): Step => ({ ...wants("/x", ""), plan: () => [change(":", more)] });
  const count = (...steps: Step[]) => planAll(steps, wanted(), {} as Facts).length;
  assert.equal(count(step({}), step({}), step({})), 3);
  assert.equal(count(step({}), step({ reboot: true }), step({})), 2);
  assert.equal(count(step({ lookAgain: true }), step({})), 1);
});

test("a printed plan contains no control characters, and no end marker that a box could guess", () => {
  const said = "x\u001b[2J\u202e\nk3s-across-clouds\necho canary";
  const plan = () => asScript([change(`printf %s ${quote(said)}`, { why: `write ${said}` })]);
  assert.doesNotMatch(plan(), /(?!\n)[\p{Cc}\p{Cf}]/u);
  const { status, stdout } = shell(plan().replaceAll(LOCK, join(temporary(), "lock")));
  assert.equal(status, 0);
  assert.ok(stdout.includes(said), stdout);
  assert.notEqual(plan(), plan());
});

test("a look that prints a fact which it does not declare is an error as soon as the script starts", () => {
  assert.equal(prints("os arch")("fact os; cat x\nfact arch; y"), "fact os; cat x\nfact arch; y");
  assert.throws(
    () => prints("os")("fact os; cat x\nfact arch; y"),
    /prints\("os"\) does not name the fact arch/,
  );
});

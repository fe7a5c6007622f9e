/**
 * The files on the operator's machine: each function that writes one, with each fault. Afterwards the old file or the
 * new one is complete, and a second run finishes and removes what the first has left behind.
 */
import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import fs, {
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { syncBuiltinESMExports } from "node:module";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import { pathToFileURL } from "node:url";
import { updateEnv } from "../lib/env-file.ts";
import { temporary as nameIn, noFile, putNew, remove, replaceFile, Unwritten } from "../lib/files.ts";
import { SettingError } from "../lib/settings.ts";
import { accessOf, merge } from "../scripts/cluster/kubeconfig.ts";
import { database, fileOf, fixture, lacks, programs, ROOT, RUNTIME, temporary } from "./helpers.ts";

const OLD = `# mine\nA=old\n${"B=".padEnd(4937, "x")}\n`;
const NEW = OLD.replace("old", "new");
const KUBECONFIG =
  "apiVersion: v1\nkind: Config\nclusters:\n- cluster:\n    server: https://work\n  name: work\n";
const YAML = fixture("k3s-yaml-v1.36.3.yaml");
const ACCESS = accessOf(YAML, "203.0.113.77", "");
const COPY = "config.before-k3s-across-clouds";

/** A function that writes files: their texts before and after it. No text: no file. */
interface Place {
  before: Record<string, string>;
  after: Record<string, string>;
  write(folder: string): unknown;
}
const PLACES: Record<string, Place> = {
  "env file": {
    before: { ".env": OLD },
    after: { ".env": NEW },
    write: (folder) => updateEnv(join(folder, ".env"), { A: "new" }),
  },
  "new env file": {
    before: {},
    after: { ".env": "A=new\n" },
    write: (folder) => updateEnv(join(folder, ".env"), { A: "new" }),
  },
  "tested env file": {
    before: { ".env": OLD },
    after: { ".env": OLD },
    write: (folder) => updateEnv(join(folder, ".env"), undefined),
  },
  "kubeconfig and its copy": {
    before: { config: KUBECONFIG },
    after: { config: merged(KUBECONFIG), [COPY]: KUBECONFIG } as Record<string, string>,
    write: (folder) => merge(join(folder, "config"), ACCESS, false),
  },
  "new kubeconfig": {
    before: {},
    after: { config: merged("") },
    write: (folder) => merge(join(folder, "config"), ACCESS, false),
  },
  backup: {
    before: {},
    after: { "backup.tar.gz": OLD },
    write(folder) {
      if (existsSync(join(folder, "backup.tar.gz"))) return;
      const half = nameIn(folder);
      try {
        pulled(half);
        putNew(half, join(folder, "backup.tar.gz"));
      } finally {
        remove(half);
      }
    },
  },
};

function pulled(half: string): void {
  try {
    writeFileSync(half, OLD, { mode: 0o600 });
  } catch (error) {
    throw new Unwritten(String(error));
  }
}

function merged(text: string): string {
  const file = join(temporary(), "config");
  writeFileSync(file, text);
  merge(file, ACCESS, false);
  return readFileSync(file, "utf8");
}

/** Cases tried, by place and fault. */
const counts: Record<string, Record<string, number>> = {};
function count(place: string, fault: string): void {
  counts[place] ??= {};
  (counts[place] as Record<string, number>)[fault] = (counts[place]?.[fault] ?? 0) + 1;
}

const textsIn = (folder: string) =>
  Object.fromEntries(
    readdirSync(folder)
      .sort()
      .map((name) => [name, readFileSync(join(folder, name), "utf8")]),
  );

function fresh(place: Place): string {
  const folder = temporary();
  for (const [name, text] of Object.entries(place.before)) writeFileSync(join(folder, name), text);
  return folder;
}

/** Each file is the old one or the new one; after a second run there are all new ones, and nothing else. */
async function finishes(name: string, place: Place, folder: string, what: string) {
  for (const [file, text] of Object.entries(place.after)) {
    const have = existsSync(join(folder, file)) ? readFileSync(join(folder, file), "utf8") : undefined;
    assert.ok(
      have === place.before[file] || have === text,
      `${name}, ${what}: ${file} is neither old nor new`,
    );
  }
  await place.write(folder);
  assert.deepEqual(textsIn(folder), place.after, `${name}, ${what}: after a second run`);
  for (const file of Object.keys(place.after))
    assert.equal(statSync(join(folder, file)).mode & 0o777, 0o600, file);
}

type Call = (...given: unknown[]) => unknown;
const CALLS =
  "openSync writeSync fsyncSync fstatSync closeSync renameSync linkSync copyFileSync rmSync writeFileSync";
const real = Object.fromEntries(
  CALLS.split(" ").map((name) => [name, fs[name as "openSync"] as unknown as Call]),
);

/** Runs it with `by` in place of each call of the file system. Returns its error. */
async function faulty(
  place: Place,
  folder: string,
  by: (name: string, call: Call, given: unknown[]) => unknown,
) {
  for (const [name, call] of Object.entries(real))
    Object.assign(fs, { [name]: (...given: unknown[]) => by(name, call, given) });
  syncBuiltinESMExports();
  try {
    await place.write(folder);
    return undefined;
  } catch (error) {
    return error;
  } finally {
    Object.assign(fs, real);
    syncBuiltinESMExports();
  }
}

const errno = (code: string) => Object.assign(new Error(`${code}: what it says, write`), { code });
const isPlain = (error: unknown) => error instanceof Unwritten || error instanceof SettingError;

// Deno's named imports of node:fs do not change with it.
describe("a write", { skip: "Deno" in globalThis && "needs node:fs to be changeable" }, () => {
  for (const [name, place] of Object.entries(PLACES)) {
    test(`of the ${name} that was interrupted at any step is completed by the next run`, async () => {
      for (let n = 0; ; n++) {
        const folder = fresh(place);
        let left = n;
        const error = await faulty(place, folder, (_, call, given) => {
          if (left-- <= 0) throw new Error("ended");
          return call(...given);
        });
        if (left > 0) break;
        assert.ok(n < 99);
        count(name, "process ended");
        await finishes(name, place, folder, `ended after ${n} steps (${error})`);
      }
    });

    for (const code of ["EIO", "EROFS", "EACCES"])
      test(`of the ${name} in which any step fails with ${code} reports an error, and leaves nothing behind`, async () => {
        for (let n = 0; ; n++) {
          const folder = fresh(place);
          let left = n;
          let failed = "";
          const error = await faulty(place, folder, (call, real, given) => {
            if (left-- !== 0) return real(...given);
            failed = call;
            throw errno(code);
          });
          if (left >= 0) break;
          count(name, "a step fails");
          // Harmless failures are not reported: a folder that cannot be synced, a temporary file that cannot be removed.
          assert.ok(
            error === undefined || isPlain(error) || failed === "writeFileSync",
            `${failed}: ${error}`,
          );
          if (failed !== "rmSync")
            for (const file of readdirSync(folder)) assert.ok(file in place.after, `${failed} left ${file}`);
          await finishes(name, place, folder, `${failed} failed`);
        }
      });

    test(`of the ${name} to a disk that becomes full is complete, or changes nothing`, async () => {
      const size = Math.max(...Object.values(place.after).map((text) => text.length));
      for (const room of [0, 1, 5, 100, 4096, 4937, size - 1, size, size + 4, 2 * size, 2 * size + 3]) {
        const folder = fresh(place);
        let left = room;
        const error = await faulty(place, folder, (call, real, given) => {
          // Like write(2): writes what there is space for, and only the next call fails.
          if (call === "writeSync") {
            const [handle, bytes, at = 0] = given as [number, Buffer, number];
            const n = Math.min(left, bytes.length - at);
            if (n === 0) throw errno("ENOSPC");
            left -= n;
            return real(handle, bytes, at, n);
          }
          if (call === "writeFileSync" && left < (given[1] as string).length) throw errno("ENOSPC");
          return real(...given);
        });
        count(name, "disk full");
        assert.ok(error === undefined || isPlain(error), String(error));
        for (const file of readdirSync(folder)) assert.ok(file in place.after, `${file} was left`);
        if (error) assert.deepEqual({ ...textsIn(folder), [COPY]: 0 }, { ...place.before, [COPY]: 0 });
        await finishes(name, place, folder, `room for ${room} bytes`);
      }
    });

    test(`of the ${name} to a file system that loses a part without an error is detected`, async () => {
      const folder = fresh(place);
      const error = await faulty(place, folder, (call, real, given) => {
        if (call === "fstatSync") return { ...(real(...given) as object), size: 1 };
        return real(...given);
      });
      count(name, "disk full");
      if (name !== "backup") assert.match(String(error), /the file system has not kept all of it/);
      await finishes(name, place, folder, "lost");
    });
  }
});

/** What a path may be other than a file, and how an error describes it. */
const ODD: Record<string, [make: (path: string) => unknown, says: string]> = {
  "a folder": [(path) => mkdirSync(path), "a folder"],
  "a pipe": [(path) => spawnSync("mkfifo", [path]), "a pipe"],
  "a link to a device": [(path) => symlinkSync("/dev/null", path), "a device or a socket"],
  "a link that leads nowhere": [(path) => symlinkSync("nowhere", path), "a link that leads nowhere"],
  "a link that leads to itself": [(path) => symlinkSync(path, path), "a link that leads to itself"],
};

describe("a path that is not a file", () => {
  for (const [name, [make, says]] of Object.entries(ODD)) {
    test(`is recognized and not overwritten: ${name}`, () => {
      const path = join(temporary(), "x");
      make(path);
      assert.equal(noFile(path), says);
      assert.throws(() => replaceFile(path, "x"), Unwritten);
      assert.notEqual(noFile(path), undefined, "it is not replaced");
    });

    test(`is refused for the copy of a kubeconfig: ${name}`, () => {
      const folder = temporary();
      writeFileSync(join(folder, "config"), KUBECONFIG);
      make(join(folder, COPY));
      count("kubeconfig and its copy", "no file");
      assert.throws(() => merge(join(folder, "config"), ACCESS, false), Unwritten);
      assert.equal(readFileSync(join(folder, "config"), "utf8"), KUBECONFIG);
      assert.deepEqual(readdirSync(folder).sort(), ["config", COPY]);
    });

    test(`is refused as a lock, and not waited for: ${name}`, async () => {
      const path = join(temporary(), ".env");
      make(`${path}.lock`);
      count("env file", "no file");
      await assert.rejects(updateEnv(path, { A: "1" }, 0.2), Unwritten);
      assert.ok(!existsSync(path));
    });
  }

  test("does not include a symlink to a file, even on another disk, which is followed", () => {
    const folder = temporary();
    const other = statSync("/dev/shm", { throwIfNoEntry: false })
      ? nameIn("/dev/shm", "")
      : join(folder, "far");
    writeFileSync(other, "old");
    symlinkSync(other, join(folder, "near"));
    symlinkSync("near", join(folder, "link"));
    assert.equal(noFile(join(folder, "link")), undefined);
    replaceFile(join(folder, "link"), "new");
    assert.equal(readFileSync(other, "utf8"), "new");
    assert.ok(lstatSync(join(folder, "link")).isSymbolicLink());
    assert.deepEqual(
      readdirSync(folder).filter((name) => name.startsWith(".")),
      [],
    );
    remove(other);
    assert.equal(noFile(join(folder, "none")), undefined, "a path that does not exist may become a file");
  });
});

test("a file that root writes keeps its owner", {
  skip: process.getuid?.() !== 0 && "needs root",
}, async () => {
  const file = join(temporary(), ".env");
  writeFileSync(file, OLD);
  fs.chownSync(file, 1234, 1235);
  await updateEnv(file, { A: "new" });
  assert.deepEqual([statSync(file).uid, statSync(file).gid], [1234, 1235]);
});

describe("a temporary file", () => {
  test("of a process that was killed is removed by the next write, but not that of a running process", async () => {
    const folder = temporary();
    const dead = spawnSync("true").pid;
    const mine = nameIn(folder).split("/").at(-1) as string;
    const name = (pid: number) => mine.replace(String(process.pid), String(pid));
    const files = [
      name(dead),
      name(process.pid).replace(/.{8}$/, "00000000"),
      name(process.ppid),
      ".clouds-1-x",
      "k3s",
    ];
    for (const file of files) writeFileSync(join(folder, file), "a secret");
    await updateEnv(join(folder, ".env"), { A: "1" });
    assert.deepEqual(readdirSync(folder).sort(), [name(process.ppid), ".clouds-1-x", "k3s", ".env"].sort());
  });
});

/** ssh to a box that is this machine, with its files under $BOX; it hangs at the script, or in the file, that is $HOLD. */
const SSH = `case $1 in -G) echo hostname 203.0.113.77; exit ;; esac
while [ "$1" != -- ]; do
  case $1 in
  -O) echo exit >>"$BOX/log"; exit ;;
  # What ssh would expand, has no folder, or is longer than a socket's path may be, with %C expanded.
  ControlPath=*[!A-Za-z0-9/._%+=-]*) exit 255 ;;
  ControlPath=*) path=\${1#*=}; [ -d "\${path%/*}" ] && [ \${#path} -le $((104 - 1 - 38 - 17)) ] || exit 255 ;;
  esac
  shift
done
echo $$ >>"$BOX/calls"
moved() { sed -u "s,/var/lib/rancher,$BOX/var,g; s,/etc/rancher,$BOX/etc,g; s,/run/k3s-a,$BOX/k3s-a,g"; }
command=$(printf '%s\\n' "$3" | moved)
case $HOLD$command in file*cat*) sh -c "$command" | head -c 100; : >"$BOX/held"; exec sleep 60 ;; esac
n=0
while IFS= read -r line; do
  case $line in
  *': begin'*)
    n=$((n + 1))
    [ "$HOLD" != $n ] || { : >"$BOX/held"; exec sleep 60; } ;;
  esac
  printf '%s\\n' "$line"
done | moved | sh -c "$command"`;

/** The operator's folder, a box's, and what is needed to run a script there. */
function cluster() {
  const box = temporary();
  const home = temporary();
  for (const folder of ["var/k3s/server/db", "etc/node", "etc/k3s"])
    mkdirSync(join(box, folder), { recursive: true });
  for (const folder of ["tls", "cred", "manifests"]) mkdirSync(join(box, "var/k3s/server", folder));
  for (const file of ["var/k3s/server/db/state.db", "var/k3s/server/token", "etc/node/password"])
    writeFileSync(join(box, file), `${"x".repeat(99)}\n`.repeat(99));
  database(join(box, "var/k3s/server/db"));
  writeFileSync(join(box, "etc/k3s/k3s.yaml"), YAML);
  writeFileSync(join(box, "calls"), "");
  writeFileSync(join(home, ".env"), "SERVER=root@a1=203.0.113.77\n", { mode: 0o600 });
  mkdirSync(join(home, "tmp"));
  const { DENO_DIR, XDG_CACHE_HOME, HOME = "" } = process.env;
  const env: Record<string, string> = {
    PATH: programs(join(box, "bin"), { ssh: SSH, id: "echo 0", systemctl: "echo MainPID=0" }),
    HOME: home,
    ENV_FILE: join(home, ".env"),
    TMPDIR: join(home, "tmp"),
    BOX: box,
    // Deno's packages are in HOME too, by default.
    DENO_DIR: DENO_DIR ?? join(XDG_CACHE_HOME ?? join(HOME, ".cache"), "deno"),
  };
  return { box, home, env };
}

/**
 * Starts a script; `limit`: the shell's maximum size of a file, in units of 512 or 1024 bytes. Node ignores the signal
 * that is sent at that size, Deno does not.
 */
function start(args: string[], env: Record<string, string>, limit = "unlimited") {
  const child = spawn(
    "sh",
    ["-c", `trap "" XFSZ; ulimit -f ${limit}; exec "$@"`, "-", process.execPath, ...RUNTIME, ...args],
    {
      cwd: ROOT,
      env,
      stdio: ["ignore", "pipe", "pipe"],
    },
  );
  const said = { text: "" };
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (chunk) => (said.text += chunk));
  const ended = new Promise<{ status: number | null; text: string }>((done) =>
    child.on("close", (status) => done({ status, text: said.text })),
  );
  return { child, ended };
}

/** Waits until it holds; three minutes at most. */
async function until(what: () => boolean) {
  for (let n = 0; !what(); n++) {
    assert.ok(n < 3600, "this did not happen in time");
    await new Promise((done) => setTimeout(done, 50));
  }
}

const lives = (pid: number) => {
  try {
    return process.kill(pid, 0);
  } catch {
    return false;
  }
};

const isLinux = process.platform === "linux";
const NUMBERS = { SIGINT: 2, SIGTERM: 15, SIGHUP: 1, SIGKILL: 9 };
const SCRIPTS: Record<string, [place: string, holds: Record<string, string>]> = {
  backup: ["backup", { "before the file": "1", "within the file": "file", "after the file": "4" }],
  kubeconfig: ["kubeconfig and its copy", { "before the file": "1" }],
};

/** The ssh that hangs: the session, which is the first, or the one that copies a file. */
const heldBy = (box: string, hold: string) =>
  Number(
    readFileSync(join(box, "calls"), "utf8")
      .trim()
      .split("\n")
      .at(hold === "file" ? -1 : 0),
  );

describe("an interrupted script", { concurrency: 4, skip: !isLinux || lacks("flock", "timeout") }, () => {
  for (const [script, [place, holds]] of Object.entries(SCRIPTS))
    for (const [when, hold] of Object.entries(holds))
      for (const [signal, number] of Object.entries(NUMBERS))
        test(`closes its connections and leaves no partial files, and the next run completes it: ${script}, ${signal} ${when}`, async () => {
          const { box, home, env } = cluster();
          mkdirSync(join(home, ".kube"));
          const config = join(home, ".kube/config");
          writeFileSync(config, KUBECONFIG);
          const file = join(home, "backup.tar.gz");
          const words = [fileOf(script), ...(script === "backup" ? ["--backup", file] : [])];
          const { child, ended } = start(words, { ...env, HOLD: hold });
          await until(() => existsSync(join(box, "held")));
          const ssh = heldBy(box, hold);
          // With child.kill() Deno reports the signal in place of the exit status.
          process.kill(child.pid as number, signal);
          const { status, text } = await ended;
          count(place, `process ended`);
          if (signal !== "SIGKILL") {
            assert.equal(status, 128 + number, text);
            assert.match(
              text,
              /Interrupted\. A change that was begun ends on its box; run the same again to finish\./,
            );
            assert.deepEqual(
              readdirSync(join(home, "tmp")).filter((name) => name.startsWith("clouds-")),
              [],
            );
            assert.equal(readFileSync(join(box, "log"), "utf8"), "exit\n");
            await until(() => !lives(ssh));
            assert.deepEqual(
              readdirSync(home).filter((name) => name.startsWith(".clouds-")),
              [],
            );
          } else if (lives(ssh)) process.kill(ssh);
          assert.equal(existsSync(file), script === "backup" && when === "after the file");
          assert.equal(readFileSync(config, "utf8"), KUBECONFIG);

          if (when === "after the file") words.splice(-1, 1, `${file}.2`);
          const second = await start(words, env).ended;
          assert.equal(second.status, 0, second.text);
          if (script === "backup") assert.equal(spawnSync("tar", ["-tzf", words.at(-1) as string]).status, 0);
          else assert.match(readFileSync(config, "utf8"), /name: k3s-203\.0\.113\.77/);
          for (const folder of [home, join(home, "tmp"), join(home, ".kube")])
            assert.deepEqual(
              readdirSync(folder).filter((name) => /^\.?clouds-|\.lock$/.test(name)),
              [],
              folder,
            );
          assert.ok(!existsSync(join(box, "var/k3s/backup")), "nothing is left on the box");
        });

  for (const [signal, number] of Object.entries(NUMBERS))
    test(`does not change the env file if ${signal} ends it while another process holds the lock`, async () => {
      const { home, env } = cluster();
      const driver = join(home, "driver.ts");
      const lib = (name: string) => JSON.stringify(pathToFileURL(join(ROOT, "lib", name)).href);
      writeFileSync(
        driver,
        `const { main } = await import(${lib("k3s/script.ts")});
const { updateEnv } = await import(${lib("env-file.ts")});
await main(import.meta, { about: "", steps: [], work: async (run) => {
  console.log("begins");
  await updateEnv(run.envFile, { K3S_VERSION: "v1.36.2+k3s1" }, 50);
  return 0;
} });`,
      );
      writeFileSync(join(home, "package.json"), '{ "type": "module" }');
      writeFileSync(join(home, ".env.lock"), String(process.pid));
      const before = textsIn2(home);
      const { child, ended } = start([driver], env);
      await Promise.race([ended, new Promise((begun) => child.stdout.once("data", begun))]);
      process.kill(child.pid as number, signal);
      const { status, text } = await ended;
      count("env file", "process ended");
      assert.equal(status, signal === "SIGKILL" ? null : 128 + number, text);
      const { [signal === "SIGKILL" ? halfIn(home) : ""]: _, ...left } = textsIn2(home);
      assert.deepEqual(left, before);
      fs.rmSync(join(home, ".env.lock"));
      assert.equal((await start([driver], env).ended).status, 0);
      assert.equal(halfIn(home), "");
      assert.match(readFileSync(join(home, ".env"), "utf8"), /^K3S_VERSION=v1\.36\.2\+k3s1$/m);
    });

  test("prints no error, and closes its connections, if the reader of its output has ended", async () => {
    const { box, home, env } = cluster();
    const { child, ended } = start(["scripts/cluster/kubeconfig.ts", "--help"], env);
    child.stdout.destroy();
    const { status, text } = await ended;
    assert.ok(status === 141 || status === 0, `${status}: ${text}`);
    assert.equal(text, "");
    const run = start(["scripts/cluster/backup.ts"], { ...env, HOLD: "3" });
    await until(() => existsSync(join(box, "held")));
    run.child.stdout.destroy();
    run.child.stderr.destroy();
    process.kill(heldBy(box, "3"));
    assert.equal((await run.ended).status, 141);
    assert.deepEqual(
      readdirSync(join(home, "tmp")).filter((name) => name.startsWith("clouds-")),
      [],
    );
  });
});

/** The error for a write past the limit, of Node.js and of Deno. */
const TOO_LARGE = "(EFBIG: file too large|File too large \\(os error 27\\))";

/** A temporary file that only the next run can remove. */
const halfIn = (folder: string) => readdirSync(folder).find((name) => name.startsWith(".clouds-")) ?? "";

/** Texts of the files directly in a folder, except the driver. */
const textsIn2 = (folder: string) =>
  Object.fromEntries(
    readdirSync(folder, { withFileTypes: true })
      .filter((entry) => entry.isFile() && entry.name !== "driver.ts")
      .map(({ name }) => [name, readFileSync(join(folder, name), "utf8")]),
  );

describe("a script", { concurrency: 4, skip: !isLinux || lacks("flock", "timeout") }, () => {
  test("that cannot write its file reports this before it contacts a box, and changes nothing", async () => {
    const calls: [script: string, place: string][] = [
      ["server", "tested env file"],
      ["up", "tested env file"],
      ["token", "tested env file"],
      ["upgrade", "tested env file"],
      ["restore", "tested env file"],
      ["promote", "tested env file"],
      ["down", "tested env file"],
      ["kubeconfig", "new kubeconfig"],
      ["backup", "backup"],
    ];
    for (const [script, place] of calls) {
      const { box, home, env } = cluster();
      if (script === "token" || script === "down")
        fs.appendFileSync(
          join(home, ".env"),
          `K3S_URL=https://203.0.113.77:6443\nK3S_TOKEN=K10${"0".repeat(64)}::server:x\n`,
        );
      const before = textsIn2(home);
      const { status, text } = await start([fileOf(script)], env, "0").ended;
      count(place, "disk full");
      assert.equal(status, 2, `${script}: ${text}`);
      assert.match(text, new RegExp(`: ${TOO_LARGE}\n$`), script);
      assert.equal(readFileSync(join(box, "calls"), "utf8"), "", script);
      assert.deepEqual(textsIn2(home), before);
    }
  });

  test("whose disk becomes full leaves the old file complete, and reports this in one line", async () => {
    const { home, env } = cluster();
    mkdirSync(join(home, ".kube"));
    const config = join(home, ".kube/config");
    const text = `${KUBECONFIG}${"# mine\n".repeat(1000)}`;
    writeFileSync(config, text);
    const merging = await start(["scripts/cluster/kubeconfig.ts"], env, "4").ended;
    count("kubeconfig and its copy", "disk full");
    assert.equal(merging.status, 1, merging.text);
    assert.match(
      merging.text,
      new RegExp(`FAILED after .*/\\.kube/config\\S* could not be written, and is unchanged: ${TOO_LARGE}\n`),
    );
    assert.deepEqual(textsIn(join(home, ".kube")), { config: text });
    const backup = await start(
      ["scripts/cluster/backup.ts", "--backup", join(home, "b.tar.gz")],
      { ...env },
      "1",
    ).ended;
    count("backup", "disk full");
    assert.notEqual(backup.status, 0, backup.text);
    assert.ok(!readdirSync(home).some((name) => name === "b.tar.gz" || name.startsWith(".clouds-")));
  });

  for (const [name, [make, says]] of Object.entries({
    "a pipe": ODD["a pipe"],
    "a link that leads nowhere": ODD["a link that leads nowhere"],
    "an existing file": [(path: string) => writeFileSync(path, "mine"), "that is there already"],
  } as typeof ODD))
    test(`writes no backup, kubeconfig or env file to ${name}, and contacts no box`, async () => {
      const cases: [place: string, script: string, env: (path: string) => Record<string, string>][] = [
        ["backup", "backup", (path) => ({ BACKUP: path })],
        ["new kubeconfig", "kubeconfig", (path) => ({ KUBECONFIG: path })],
        ["env file", "server", (path) => ({ ENV_FILE: path })],
      ];
      for (const [place, script, given] of cases) {
        if (name === "an existing file" && place !== "backup") continue;
        const { box, home, env } = cluster();
        const path = join(home, "odd");
        make(path);
        const { mode, ino } = lstatSync(path);
        const { status, text } = await start([fileOf(script)], { ...env, ...given(path) }).ended;
        count(place, "no file");
        assert.equal(status, 2, text);
        assert.match(text, place === "backup" ? /that is there already/ : new RegExp(` is ${says}`));
        assert.equal(readFileSync(join(box, "calls"), "utf8"), "");
        assert.deepEqual([lstatSync(path).mode, lstatSync(path).ino], [mode, ino]);
      }
    });

  test("reads no backup, configuration or binary from a pipe, on which it would block", async () => {
    const cases = {
      restore: ["--backup", "PIPE", "--host", "root@b1=203.0.113.78"],
      server: ["--k3s-config", "PIPE"],
      up: ["--k3s-bin", "PIPE"],
    };
    for (const [script, words] of Object.entries(cases)) {
      const { box, home, env } = cluster();
      const pipe = join(home, "odd");
      spawnSync("mkfifo", [pipe]);
      const given = words.map((word) => word.replace("PIPE", pipe));
      const { status, text } = await start([fileOf(script), ...given], env).ended;
      count("(what is read)", "no file");
      assert.equal(status, 2, text);
      assert.match(text, /^(BACKUP|K3S_CONFIG|K3S_BIN) is ".*odd", which is a pipe: expected a file\n$/);
      assert.equal(readFileSync(join(box, "calls"), "utf8"), "");
    }
  });

  test("whose output goes to a full disk reports this", async () => {
    const { env } = cluster();
    const words = [
      "-c",
      'exec "$@" >/dev/full',
      "-",
      process.execPath,
      ...RUNTIME,
      "scripts/up.ts",
      "--help",
    ];
    const { status, stderr } = spawnSync("sh", words, { cwd: ROOT, env, encoding: "utf8" });
    assert.equal(status, 1);
    assert.match(stderr, /^Standard output: (ENOSPC: no|No) space left on device.*\n$/);
  });

  for (const [name, folder] of Object.entries({
    "a name with spaces": "t m p",
    "a name with a quote, a % and a $": "t'%h${X}\"",
    "a name of 120 bytes": "t".repeat(120),
    "a folder that does not exist": "none/at/all",
  }))
    test(`connects to its box if TMPDIR is ${name}`, async () => {
      const { home, env } = cluster();
      const path = join(home, folder);
      if (!folder.includes("/")) mkdirSync(path);
      const { status, text } = await start(["scripts/cluster/kubeconfig.ts"], { ...env, TMPDIR: path }).ended;
      assert.equal(status, 0, text);
      assert.doesNotMatch(text, /FAILED/);
    });
});

after(() => {
  const faults = ["process ended", "a step fails", "disk full", "no file"];
  const row = (cells: (string | number)[]) =>
    cells.map((cell, i) => (i ? String(cell).padStart(15) : String(cell).padEnd(25))).join("");
  const rows = Object.entries(counts).map(([place, of]) =>
    row([place, ...faults.map((fault) => of[fault] ?? 0)]),
  );
  const sum = (fault: string) => Object.values(counts).reduce((sum, of) => sum + (of[fault] ?? 0), 0);
  for (const line of [row(["what is written", ...faults]), ...rows, row(["all", ...faults.map(sum)])])
    console.log(`# ${line}`);
});

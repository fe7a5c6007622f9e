/** Common faults of the environment: each has its message and exit status, and leaves the box unchanged. */
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { bench, connected, routerRule, script, starts, state, untouched } from "./suite.ts";

const t = await bench({ name: "faults" });
after(() => t.lab.down());
const [a1, b1, b2] = [t.box("a1"), t.box("b1"), t.box("b2")];
const API = "https://198.51.100.11:6443";
const agent = script("agent", "--host b1");

const drop = (cloud: "a" | "b", what: string) => routerRule(t.lab, cloud, "ports", `${what} drop`);

/** The command fails with this and leaves b1 unchanged; `fault` may break something, and returns a function that repairs it. */
async function refused(
  command: string,
  status: number,
  texts: (string | RegExp)[],
  { env = {}, fault }: { env?: Record<string, string>; fault?: () => Promise<() => unknown> } = {},
) {
  const before = await state(b1);
  const mend = await fault?.();
  try {
    const said = await t.says(command, status, texts, { env });
    assert(said.seconds < 60, `it took ${said.seconds} s`);
  } finally {
    await mend?.();
  }
  await untouched([b1], [before]);
}

describe("a box that cannot join is refused with the reason, and is not changed, because of", () => {
  before(async () => {
    t.settings();
    await t.ok("make server");
  });

  test("a token with a wrong password", () =>
    refused(agent, 2, [`K3S_TOKEN is not valid: ${API} answers 401`, "again: make agent HOST=b1"], {
      env: { K3S_TOKEN: `${t.env().K3S_TOKEN?.slice(0, -32)}${"0".repeat(32)}` },
    }));

  test("a token of another cluster", () =>
    refused(agent, 2, ["K3S_TOKEN belongs to another cluster", '"make server" writes the current token'], {
      env: { K3S_TOKEN: `K10${"0".repeat(64)}::server:${"0".repeat(32)}` },
    }));

  test("a server that refuses the connection", () =>
    refused(`${agent} --k3s-url https://198.51.101.12:6443`, 1, [
      "The server does not answer this box at https://198.51.101.12:6443/cacerts: nothing listens there",
    ]));

  test("a firewall that drops packets to the server", () =>
    refused(agent, 1, [`${API}/cacerts: packets are dropped: open 6443/tcp`], {
      fault: () => drop("a", "tcp dport 6443"),
    }));

  test("a name that another node has", () =>
    refused(agent, 1, ["The name a1 is taken by a node of the cluster (198.51.100.11)", "hostnamectl"], {
      fault: async () => {
        await b1.sh("hostname a1");
        return () => b1.sh("hostname b1");
      },
    }));

  test("a folder of k3s that not even root can write", () =>
    refused(agent, 1, ["/usr/local/bin cannot be written, and k3s needs it", "Nothing was installed"], {
      fault: async () => {
        await b1.sh("cd /usr/local/bin; mount --bind . . && mount -o remount,bind,ro /usr/local/bin");
        return () => b1.sh("umount /usr/local/bin");
      },
    }));

  test("a kernel without WireGuard, which wireguard-go does not replace", () =>
    refused(
      agent,
      1,
      [/has no WireGuard.*wireguard-go is here, but k3s v1\.36\.2\+k3s1 asks the kernel alone/],
      {
        fault: async () => {
          // The box's own modprobe, which reports this machine's kernel.
          await b1.sh('mount --bind /usr/lib/lab/modprobe "$(command -v modprobe)"');
          return () => b1.sh('umount "$(command -v modprobe)"');
        },
      },
    ));

  test("cgroup v2, which old k3s does not support", () =>
    refused(`${agent} --k3s-version v1.17.6+k3s1`, 1, ["k3s v1.17.6+k3s1 runs on cgroup v1 only"], {
      fault: async () => {
        await b1.sh("mount -t cgroup2 lab /sys/fs/cgroup");
        return () => b1.sh("umount /sys/fs/cgroup");
      },
    }));

  test("a user who may not become root", () =>
    refused(script("agent", "--host plain@b1"), 1, [
      /sudo asks for a password on plain@b1: log in as root, or/,
    ]));

  test("a host key that is not known", () =>
    refused(agent, 1, ['The host key of b1 is not known here: connect once with "ssh b1"'], {
      fault: () => knownHosts(() => ""),
    }));

  test("a host key that has changed", () =>
    refused(agent, 1, ["The host key of b1 has changed"], {
      fault: () =>
        knownHosts((text) => {
          const key = (name: string) =>
            text
              .split("\n")
              .find((line) => line.startsWith(name))
              ?.split(" ")
              .slice(1)
              .join(" ");
          return text.replace(key("b1,") as string, key("b2,") as string);
        }),
    }));

  test("a box that does not answer ssh, within ssh's time limit", () =>
    refused(agent, 1, [/Could not reach b1: .*timed out/, "again: make agent HOST=b1"], {
      fault: () => drop("b", "ip daddr 192.168.0.11 tcp dport 22"),
    }));

  test("a private address as the public one", () =>
    refused(`${agent} --public-ip 192.168.0.11`, 2, ["192.168.0.11 is private"]));

  test("a server as its own agent", async () => {
    const before = await state(a1);
    await t.says(script("agent", "--host a1"), 2, ["every node needs a public address of its own"]);
    await untouched([a1], [before]);
  });
});

/** Replaces known_hosts until the returned function is called. */
async function knownHosts(change: (text: string) => string) {
  const file = join(t.lab.dir, "home/.ssh/known_hosts");
  const text = readFileSync(file, "utf8");
  writeFileSync(file, change(text));
  return () => writeFileSync(file, text);
}

test("a command that fails is reported with its box, its change, its output, its text, and the command that retries it", async () => {
  const packages = "http://203.0.113.82/";
  await t.lab.mirror.fault(packages, { mode: "down" });
  const { text } = await t.says(script("install-wireguard", "--host b1"), 1, [
    /^b1 +FAILED after [\d.]+ s: install wireguard-tools \(Debian.*, apt\) \(exit status 100\)$/m,
    /^b1 +\| .*203\.0\.113\.82.*$/m,
    /^b1 +command:\nb1 +\$ export DEBIAN_FRONTEND=noninteractive$/m,
    /^b1 +again: make install-wireguard HOST=b1 ENV_FILE=\S+$/m,
  ]);
  await t.lab.mirror.fault(packages, { mode: "none" });
  await t.ok(again(text, "b1"));
  assert.match(await b1.sh("wg --version"), /^wireguard-tools /);
});

test("one of three boxes that fails does not stop the others, and the command that retries it works after the repair", async () => {
  await t.lab.add("b3");
  const mend = await drop("b", "ip daddr 192.168.0.12 tcp dport 22");
  const { text } = await t.says(script("agent", '--host "b1 b2 b3"'), 1, [
    /^b1 +done in/m,
    /^b2 +FAILED after .*Could not reach b2/m,
    /^b3 +done in/m,
  ]);
  await mend();
  await connected([a1, b1, t.box("b3")]);
  assert.equal(text.match(/again: /g)?.length, 1);
  await t.ok(again(text, "b2"));
  await connected(t.lab.boxes);
});

/** The command that a failed box's lines end with. */
function again(text: string, box: string): string {
  const command = new RegExp(`^${box} +again: (.*)$`, "m").exec(text)?.[1];
  assert(command, text);
  return command;
}

test("a k3s that does not start is reported with the relevant lines of its journal, and the next run repairs it", async () => {
  const { seconds } = await t.says(script("agent", "--host b2 --agent-args=--nonsense"), 1, [
    /^b2 +FAILED after .*restart k3s-agent and wait until node b2 is Ready/m,
    /^b2 +\| .*flag provided but not defined: -nonsense/m,
    "again: make agent HOST=b2 AGENT_ARGS=--nonsense",
  ]);
  assert(seconds < 90, `${seconds} s`);
  await t.ok("make agent HOST=b2");
  await connected(t.lab.boxes);
  const before = await starts(b2);
  await t.says("make agent HOST=b2", 0, ["nothing to do"]);
  assert.equal(await starts(b2), before);
});

describe("on the operator's machine,", () => {
  const tiny = "/run/tiny";
  const file = `${tiny}/.env`;
  const now = async () => (await a1.sh("cat /var/lib/rancher/k3s/server/node-token")).trim();

  before(async () => {
    // Three pages, two of which the file needs.
    await t.ok(`mkdir -p ${tiny} && mount -t tmpfs -o size=12k tiny ${tiny} && cp "$ENV_FILE" ${file}`);
    await t.ok(`{ echo; printf '# %4900s' mine; } >>${file}; chmod 600 ${file}`);
  });
  after(() => t.ok(`umount ${tiny}`));

  test("a disk without space for the env file is detected before a token is rotated", async () => {
    const [before, text] = [await now(), (await t.ok(`sha256sum ${file}`)).out];
    await t.says(
      script("token"),
      2,
      [/^The env file is to be written by this: .*\.env could not be written.*ENOSPC/],
      {
        env: { ENV_FILE: file },
      },
    );
    assert.equal(await now(), before);
    assert.equal((await t.ok(`sha256sum ${file}; ls -A ${tiny}`)).out, `${text}.env\n`);
  });

  test("a disk that becomes full during a run leaves the env file unchanged, and the next run writes the new token", async () => {
    await t.ok(`mount -o remount,size=20k ${tiny}`);
    const text = (await t.ok(`sha256sum ${file}`)).out;
    const fills = `log=$(mktemp); { ${script("token")} >$log 2>&1; echo "ended with $?" >>$log; } &
until grep -q 'rotate the token' $log; do sleep 0.05; done; dd if=/dev/zero of=${tiny}/full 2>/dev/null; wait; cat $log; rm $log`;
    const { text: said } = await t.op(fills, { env: { ENV_FILE: file } });
    assert.match(said, /FAILED after .*\.env(\.lock)? could not be written, and is unchanged: ENOSPC/);
    assert.match(said, /ended with 1$/m);
    assert.doesNotMatch(said, /\.ts:\d/, "no stack trace");
    assert.equal((await t.ok(`sha256sum ${file}; ls -A ${tiny}`)).out, `${text}.env\nfull\n`);
    await t.ok(`rm ${tiny}/full`);
    await t.says(script("token"), 0, ["the env file has the server's present token"], {
      env: { ENV_FILE: file },
    });
    assert.equal(
      (await t.ok(`grep -c "K3S_TOKEN=$(ssh a1 cat /var/lib/rancher/k3s/server/node-token)" ${file}`)).out,
      "1\n",
    );
    await t.ok(`sed '$d' ${file} >"$ENV_FILE"; make -j up`);
  });

  test("a TMPDIR that has spaces, or is too long for a socket's path, is no problem for ssh", async () => {
    for (const folder of ["/run/t m p", `/run/${"t".repeat(100)}`]) {
      await t.ok(`mkdir "${folder}"`);
      await t.ok("make status", { env: { TMPDIR: folder } });
      await t.ok(`rm -r "${folder}"`);
    }
  });

  for (const [signal, status] of [
    ["TERM", 143],
    ["HUP", 129],
  ] as const)
    test(`SIG${signal} closes every connection, and the next run completes the change`, async () => {
      // The node's last heartbeat has to be older than the start by more than clocks are compared to, two seconds.
      await b1.sh("systemctl stop k3s-agent; rm /etc/systemd/system/k3s-agent.service; sleep 3");
      const open = async () =>
        (await t.op("ls -d /run/k3s-* 2>/dev/null; ps -e -o args= | grep '[s]sh: .*mux' || true")).out.split(
          "\n",
        );
      const others = await open();
      const run = await t.cut("make agent HOST=b1", /start k3s-agent and wait/, signal);
      assert(run.reached, run.text);
      assert.equal(run.status, status, run.text);
      assert.match(run.text, /Interrupted\. .*run the same again to finish\./);
      // Those of an earlier run that was killed remain for a minute.
      assert.deepEqual(
        (await open()).filter((line) => !others.includes(line)),
        [],
      );
      await t.ok("make agent HOST=b1");
      await connected(t.lab.boxes);
    });
});

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { existsSync, readFileSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { healthyMessage, systemdFirst, withoutEmpty } from "../lib/k3s/service.ts";
import { type Role, unitOf, unitPath } from "../lib/k3s/unit.ts";
import type { Settings } from "../lib/settings.ts";
import { quote } from "../lib/sh.ts";
import { type Change, planAll, Refusal, type Step } from "../lib/step.ts";
import { agent, agentSteps, prepareAs } from "../scripts/agent.ts";
import { server, serverSteps } from "../scripts/server.ts";
import {
  A1,
  B1,
  type Facts,
  filesAfter,
  fixture,
  healthy,
  IP,
  look,
  MODERN,
  NOW,
  nodes,
  OLD,
  prepared,
  service,
  shell,
  TOKEN,
  temporary,
  wanted,
} from "./helpers.ts";

/** A plan as its verbs: what is written, started, waited for. */
const verbs = (changes: Change[]) => changes.map(({ why }) => why.split(" ").slice(0, 2).join(" "));
const refusal = (step: Step, want: Settings, facts: Facts): Error => {
  try {
    step.plan(want, facts);
  } catch (error) {
    return error as Error;
  }
  return assert.fail("the plan was not refused");
};

for (const step of [server, agent] as const)
  for (const version of [OLD, MODERN]) {
    const unit = unitOf(step.name as "server");
    const want = wanted({ K3S_VERSION: version });
    const fresh = prepared(version);
    const written = filesAfter(step, want, step.plan(want, fresh));
    const { unit: text, envfile } = written;
    const files = { unit: text, envfile } as Facts;
    const well = (over: Facts = {}) => healthy(version, files, over);

    describe(`${unit} of ${version}`, () => {
      test("is written, started and waited for on a fresh box", () => {
        const plan = step.plan(want, fresh);
        assert.deepEqual(verbs(plan), [
          `write /etc/systemd/system/${unit}.service.env`,
          `write /etc/systemd/system/${unit}.service:`,
          `start ${unit}`,
        ]);
        assert.ok(
          plan.every(({ seconds }) => (seconds ?? 60) <= 660),
          "each in bounded time",
        );
      });

      test("needs no change once it is started and the node is healthy", () => {
        assert.deepEqual(step.plan(want, well()), []);
      });

      test("has an environment file that is readable by root only", () => {
        assert.match(text ?? "", new RegExp(`\\nEnvironmentFile=/etc/systemd/system/${unit}.service.env\\n`));
        assert.match(envfile ?? "", /^600\n[0-9a-f]{64}\n?$/);
      });

      const restarts: [name: string, over: Facts][] = [
        [
          "if a file is newer than the process, as after a run that was interrupted before the restart",
          { written: `${NOW - 60}\n${NOW - 4000}` },
        ],
        [
          "if the binary was replaced after the process was started",
          { written: `${NOW - 4000}\n${NOW - 1700}` },
        ],
        ["if systemd has loaded an older unit", { service: service(NOW - 1800, "NeedDaemonReload=yes") }],
        ["if it is not enabled", { enabled: "disabled\n" }],
        [
          "if it does not run",
          {
            service:
              "ActiveState=failed\nMainPID=0\nExecMainStartTimestampMonotonic=99000000\nNeedDaemonReload=no\n",
          },
        ],
        [
          "if it is still starting",
          {
            service:
              "ActiveState=activating\nMainPID=9\nExecMainStartTimestampMonotonic=99000000\nNeedDaemonReload=no\n",
          },
        ],
      ];
      for (const [name, over] of restarts)
        test(`is restarted, without a change of a file, ${name}`, () => {
          const plan = step.plan(want, well(over));
          assert.equal(plan.length, 1, verbs(plan).join());
          assert.match(plan[0]?.why ?? "", new RegExp(`^(re)?start ${unit} and wait until node a1 is Ready`));
        });

      const waits: [name: string, over: Facts, why: RegExp][] = [
        ["is not Ready", { nodes: nodes({ ...A1, ready: false }, B1) }, /not Ready/],
        [
          "is Ready but has not reported since the start",
          { nodes: nodes({ ...A1, beat: NOW - 1900 }, B1) },
          /has not reported/,
        ],
        [
          "has no ExternalIP yet",
          { nodes: nodes({ ...A1, external: "" }, B1) },
          /ExternalIP of a1 is not set/,
        ],
        ["has no WireGuard interface yet", { interfaces: "lo\neth0\n" }, /no flannel/],
        ["is unknown because the API does not answer", { nodes: "" }, /a1 is not registered/],
      ];
      for (const [name, over, why] of waits)
        test(`is waited for, not restarted, while its node ${name}`, () => {
          const plan = step.plan(want, well(over));
          assert.deepEqual(verbs(plan), ["wait until"]);
          assert.match(plan[0]?.why ?? "", why);
          assert.doesNotMatch(plan[0]?.sh ?? "", /systemctl (re)?start/);
          // The wait accepts no heartbeat that the next look would reject.
          assert.match(plan[0]?.sh ?? "", new RegExp(`; since=${NOW - 1800 + 1};`));
        });

      test("is waited for while its node is not registered yet, and restarted when it runs for long without one", () => {
        const plan = (started: number) =>
          step.plan(want, well({ nodes: nodes(B1), service: service(started), written: `${started - 1}` }));
        assert.match(plan(NOW - 60)[0]?.why ?? "", /wait until .*: node a1 is not registered/);
        assert.match(plan(NOW - 1800)[0]?.why ?? "", /^restart /);
      });

      test("is refused on a box whose name another box's node has", () => {
        assert.match(
          refusal(step, want, well({ nodes: nodes({ ...A1, external: "198.51.100.99" }) })).message,
          /198\.51\.100\.99/,
        );
      });

      test("is restarted by the next run, and then waited for, if a change of the public address was interrupted", () => {
        const was = nodes({ ...A1, external: "198.51.100.99" }, B1);
        const cut: Facts[] = [
          { written: `${NOW - 60}` },
          { service: service(NOW - 1800, "NeedDaemonReload=yes") },
          { service: "MainPID=0\n" },
        ];
        for (const over of cut)
          assert.match(step.plan(want, well({ nodes: was, ...over }))[0]?.why ?? "", /^(re)?start /);
        const young = { service: service(NOW - 60), written: `${NOW - 61}` };
        assert.deepEqual(verbs(step.plan(want, well({ nodes: was, ...young }))), ["wait until"]);
      });

      test("is not restarted in every run if the clock was set back and its files are in the future", () =>
        assert.deepEqual(step.plan(want, well({ written: `${NOW + 90_000}` })), []));

      test("is rewritten and restarted if a setting for its arguments changes, but its environment file is not rewritten", () => {
        const args = wanted({ ...want, SERVER_ARGS: "--disable=traefik", AGENT_ARGS: "--docker" });
        const plan = step.plan(args, well());
        assert.deepEqual(verbs(plan), [`write /etc/systemd/system/${unit}.service:`, `restart ${unit}`]);
        assert.match(plan[0]?.why ?? "", /\+ ?--(disable=traefik|docker)/, "with the changed line");
      });

      test("is restarted even if only the mode of its environment file is wrong", () => {
        const plan = step.plan(want, well({ envfile: (envfile ?? "").replace("600", "644") }));
        assert.deepEqual(verbs(plan), [`write /etc/systemd/system/${unit}.service.env`, `restart ${unit}`]);
      });

      test("does not depend on the settings of other steps", () => {
        const other = {
          ELREPO_URL: "https://x.example",
          EPEL_URL: "https://y.example",
          K3S_MIRRORS: "https://z.example",
          SERVER: "x",
          AGENTS: "y",
        };
        assert.deepEqual(step.plan(wanted({ ...want, ...other }), well()), []);
      });

      test("adds the public address to lo only if no card has it", () => {
        const onCard = { addresses: `2: eth0    inet ${IP}/24 scope global eth0` };
        const [, change] = step.plan(want, { ...fresh, ...onCard });
        assert.doesNotMatch(change?.sh ?? "", /ip addr replace/);
        assert.match(step.plan(want, fresh)[1]?.sh ?? "", /ip addr replace 198\.51\.100\.11\/32 dev lo/);
        assert.deepEqual(
          verbs(step.plan(want, well(onCard))).length,
          2,
          "a card that gets it later is a change",
        );
      });

      test("uses ipvs if the kernel has it, and iptables otherwise", () => {
        const ipvs = wanted({ ...want, PROXY_MODE: "ipvs" });
        assert.match(
          step.plan(ipvs, { ...fresh, ipvs: "yes\n" })[1]?.sh ?? "",
          /--kube-proxy-arg=proxy-mode=ipvs/,
        );
        assert.doesNotMatch(step.plan(ipvs, fresh)[1]?.sh ?? "", /proxy-mode/);
        assert.match(step.plan(ipvs, fresh)[1]?.why ?? "", /this kernel has no ip_vs: iptables instead$/);
        assert.match(
          healthyMessage(step.name as Role, ipvs, fresh),
          /no ip_vs, so kube-proxy uses iptables$/,
        );
        assert.deepEqual(step.plan(ipvs, well()), [], "so there nothing changes");
      });

      test("uses nftables, or is refused if the release is too old for it", () => {
        const nft = wanted({ ...want, PROXY_MODE: "nftables" });
        if (version === OLD)
          assert.match(
            refusal(step, nft, fresh).message,
            /nftables needs k3s v1\.31 or later, not v1\.17\.6/,
          );
        else assert.match(step.plan(nft, fresh)[1]?.sh ?? "", /proxy-mode=nftables/);
      });

      test("is refused on a box of the other role", () => {
        assert.ok(refusal(step, want, { ...fresh, other: "active\n" }) instanceof Refusal);
        assert.match(refusal(step, want, { ...fresh, other: "active\n" }).message, /it cannot be/);
      });

      test("has its token in no displayed plan", () => {
        for (const facts of [fresh, well({ enabled: "" }), well({ envfile: "644\nx" })])
          assert.doesNotMatch(JSON.stringify(step.plan(want, facts)), /K10|0123456789abcdef/);
      });
    });
  }

test("a box without systemd is refused before anything is installed, and OpenRC is named on Alpine", () => {
  for (const [os, openrc, text] of [
    ["alpine-3.20", "yes\n", /Alpine Linux v3\.20 uses OpenRC instead of systemd.*Nothing was installed/],
    ["debian-12", "", /Debian GNU\/Linux 12 \(bookworm\) uses another init system instead of systemd/],
  ] as const)
    for (const steps of [serverSteps, agentSteps, prepareAs("agent")]) {
      const facts = prepared(OLD, {
        os: fixture(`os-release/${os}`),
        openrc,
        systemd: "",
        curl: "",
        tool: "",
      });
      assert.throws(
        () => planAll(steps, wanted(), facts),
        (e: Error) => e instanceof Refusal && text.test(e.message),
      );
    }
});

describe("cgroups", () => {
  const V1 = "tmpfs\n";
  const V2 = "cgroup2fs\ncpuset cpu io memory hugetlb pids rdma misc\n";
  const FLAG = "--kubelet-arg=fail-cgroupv1=false";
  const unit = (step: Step, version: string, cgroup: string | undefined, over: Partial<Settings> = {}) =>
    step
      .plan(
        wanted({ K3S_VERSION: version, ...over }),
        prepared(version, cgroup === undefined ? {} : { cgroup }),
      )
      .map(({ sh }) => sh)
      .join("\n");

  const flags: [version: string, cgroup: string | undefined, given: boolean][] = [
    [MODERN, V1, true],
    ["v1.35.0+k3s1", V1, true],
    ["v1.35.0-rc1+k3s1", V1, true],
    ["v1.40.1+k3s1", V1, true],
    ["v1.34.2+k3s1", V1, false],
    ["v1.31.14+k3s1", V1, false],
    [OLD, V1, false],
    [MODERN, V2, false],
    [MODERN, "", false],
    [MODERN, undefined, false],
  ];
  for (const [version, cgroup, given] of flags)
    for (const step of [server, agent])
      test(`${given ? "require" : "do not require"} fail-cgroupv1=false for the ${step.name} of ${version} if they are ${JSON.stringify(cgroup)}`, () =>
        assert.equal(unit(step, version, cgroup).includes(FLAG), given));

  const own: [name: string, step: Step, over: Partial<Settings>][] = [
    ["SERVER_ARGS", server, { SERVER_ARGS: "--kubelet-arg=fail-cgroupv1=true" }],
    ["AGENT_ARGS", agent, { AGENT_ARGS: "--debug --kubelet-arg fail-cgroupv1=false" }],
    ["K3S_CONFIG", agent, { K3S_CONFIG: "kubelet-arg:\n  - max-pods=50\n  - fail-cgroupv1=false" }],
    ["K3S_CONFIG with a plus sign", server, { K3S_CONFIG: "kubelet-arg+: fail-cgroupv1=true" }],
  ];
  for (const [name, step, over] of own)
    test(`do not change an argument for them that is in ${name}`, () =>
      assert.equal(
        unit(step, MODERN, V1, over).split("fail-cgroupv1").length,
        unit(step, MODERN, V2, over).split("fail-cgroupv1").length,
      ));
  test("require the argument in spite of other arguments of the kubelet, or of the other role", () => {
    for (const over of [
      { AGENT_ARGS: "--kubelet-arg=max-pods=50" },
      { SERVER_ARGS: FLAG },
      { K3S_CONFIG: "node-label: fail-cgroupv1=false" },
    ])
      assert.ok(unit(agent, MODERN, V1, over).includes(FLAG), JSON.stringify(over));
  });

  test("require an argument before the user's, which are the last in the unit", () => {
    const last = "--kubelet-arg=max-pods=50";
    for (const step of [server, agent])
      assert.match(
        unit(step, MODERN, V1, { SERVER_ARGS: last, AGENT_ARGS: last }),
        new RegExp(`${FLAG} [^]*\\n +${last}\\n`),
      );
  });

  test("of v1 lead to a single restart in an upgrade to a release that needs the argument, and in a downgrade", () => {
    const before = wanted({ K3S_VERSION: "v1.34.2+k3s1" });
    for (const step of [server, agent]) {
      const files = (want: Settings, version: string) =>
        filesAfter(step, want, step.plan(want, prepared(version, { cgroup: V1 })));
      const change = (want: Settings, facts: Facts) => {
        const plan = step.plan(want, facts);
        assert.deepEqual(verbs(plan), [
          `write ${unitPath(step.name as Role)}:`,
          `restart ${unitOf(step.name as Role)}`,
        ]);
        return plan[0]?.detail;
      };
      const up = healthy("v1.34.2+k3s1", files(before, "v1.34.2+k3s1"), {
        cgroup: V1,
        hostname: "a1\n",
        version: `${MODERN}\n`,
      });
      assert.deepEqual(change(wanted(), up), [`+ ${FLAG}`]);
      const back = healthy(MODERN, files(wanted(), MODERN), {
        cgroup: V1,
        hostname: "a1\n",
        version: "v1.34.2+k3s1\n",
      });
      assert.deepEqual(change(before, back), [`- ${FLAG}`]);
    }
  });

  const faults: [version: string, cgroup: string, pattern: RegExp | undefined][] = [
    [
      OLD,
      V2,
      /k3s v1\.17\.6\+k3s1 runs on cgroup v1 only.*v1\.20\.4\+k3s1 or later.*systemd\.unified_cgroup_hierarchy=0/,
    ],
    ["v1.18.20+k3s1", V2, /cgroup v1 only/],
    ["v1.19.16+k3s1", V2, /cgroup v1 only/],
    ["v1.20.2+k3s1", V2, /cgroup v1 only/],
    ["v1.20.4+k3s1", V2, undefined],
    ["v1.21.14+k3s1", V2, undefined],
    [MODERN, V2, undefined],
    [OLD, V1, undefined],
    [MODERN, V1, undefined],
    [MODERN, "cgroup2fs\ncpuset cpu io pids\n", /no memory controller.*cgroup_enable=memory.*cmdline\.txt/],
    [MODERN, "cgroup2fs\nio memory pids\n", /no cpu, cpuset controller.*grep cgroup \/proc\/mounts/],
    [MODERN, "cgroup2fs\n", /no cpu, cpuset, memory controller/],
    [OLD, "", undefined],
  ];
  for (const [version, cgroup, pattern] of faults)
    test(`are ${pattern ? "refused" : "accepted"} for ${version}, before anything is downloaded, if they are ${JSON.stringify(cgroup)}`, () => {
      for (const steps of [serverSteps, agentSteps, prepareAs("agent")]) {
        const facts = prepared(version, { cgroup, version: "", curl: "" });
        const plan = () => planAll(steps, wanted({ K3S_VERSION: version, K3S_TOKEN: "" }), facts);
        if (pattern) assert.throws(plan, (e: Error) => e instanceof Refusal && pattern.test(e.message));
        else assert.ok(plan().length > 0);
      }
    });

  test("of this machine are read", { skip: process.platform !== "linux" }, () => {
    const { cgroup = "" } = look([systemdFirst], wanted());
    assert.match(cgroup, /^(tmpfs|cgroup2fs\n.*|UNKNOWN.*)$/m);
    assert.equal(/^cgroup2fs/.test(cgroup), existsSync("/sys/fs/cgroup/cgroup.controllers"));
  });
});

describe("a folder that cannot be written", () => {
  test("is reported before a unit is written into it", () => {
    for (const [step, folder] of [
      [server, "/etc/systemd/system"],
      [agent, "/var/lib/rancher"],
    ] as const)
      assert.match(
        refusal(step, wanted(), prepared(MODERN, { readonly: `${folder}\n` })).message,
        new RegExp(`${folder} cannot be written`),
      );
  });
});

describe("releases that may have either backend", () => {
  const middle = "v1.24.17+k3s1";
  const want = wanted({ K3S_VERSION: middle });

  test("are examined for their flags before anything is written", () => {
    for (const step of [server, agent]) {
      const plan = step.plan(want, prepared(OLD));
      assert.equal(plan.length, 1);
      assert.equal(plan[0]?.lookAgain, true);
      assert.equal(plan[0]?.sh.trim(), ":");
    }
  });

  test("get the flags of the backend that is in their help", () => {
    const unit = (flags: string) => server.plan(want, prepared(middle, { flags }))[1]?.sh ?? "";
    assert.match(
      unit("--flannel-backend\n--flannel-external-ip\nwireguard-native\n"),
      /--flannel-backend=wireguard-native/,
    );
    assert.doesNotMatch(
      unit("--flannel-backend\nwireguard-native\n"),
      /wireguard-native|flannel-external-ip/,
    );
  });
});

test("a K3S_BIN gets the flags of its own release, whatever K3S_VERSION is", () => {
  const want = wanted({ K3S_BIN: "./k3s", K3S_VERSION: MODERN });
  assert.match(server.plan(want, prepared(OLD))[1]?.sh ?? "", /--flannel-backend=wireguard(?!-native)/);
});

test("a new version restarts the service with that generation's unit", () => {
  const old = wanted({ K3S_VERSION: OLD });
  const { unit, envfile } = filesAfter(server, old, server.plan(old, prepared(OLD)));
  const facts = healthy(OLD, { unit, envfile } as Facts, { version: `${MODERN}\n` });
  const plan = server.plan(wanted({ K3S_VERSION: MODERN }), facts);
  assert.deepEqual(verbs(plan), ["write /etc/systemd/system/k3s.service:", "restart k3s"]);
});

test("a new token or URL is written only to the agent's environment file, and the agent is restarted", () => {
  const want = wanted();
  const { unit, envfile } = filesAfter(agent, want, agent.plan(want, prepared(MODERN)));
  const facts = healthy(MODERN, { unit, envfile } as Facts);
  const other = wanted({ K3S_TOKEN: TOKEN.replace("0123", "4567") });
  assert.deepEqual(verbs(agent.plan(other, facts)), [
    "write /etc/systemd/system/k3s-agent.service.env",
    "restart k3s-agent",
  ]);
  assert.deepEqual(verbs(agent.plan(wanted({ K3S_URL: "https://203.0.113.77:6443" }), facts)), [
    "write /etc/systemd/system/k3s-agent.service.env",
    "restart k3s-agent",
  ]);
});

describe("what make server writes to the env file", () => {
  test("is its URL at the public address, and its token", () => {
    assert.deepEqual(server.learn?.(wanted(), prepared(MODERN, { token: `${TOKEN}\n` })), {
      K3S_URL: `https://${IP}:6443`,
      K3S_TOKEN: TOKEN,
    });
  });
  test("always includes a token, and a server without one is an error", () => {
    assert.throws(() => server.learn?.(wanted(), prepared(MODERN, { token: "" })), /no node-token/);
  });
});

describe("a server with K3S_DATASTORE_ENDPOINT", () => {
  const own = {
    K3S_DATASTORE_ENDPOINT: "postgres://k3s:hunter2@203.0.113.5:5432/k3s",
    K3S_URL: "",
    K3S_TOKEN: "",
  };
  const want = wanted(own);
  const taught = { ...want, K3S_URL: `https://${IP}:6443`, K3S_TOKEN: TOKEN };
  const other = { ...want, K3S_URL: "https://198.51.101.99:6443", K3S_TOKEN: TOKEN };
  const fresh = prepared(MODERN);
  const hash = (text: string) => `600\n${createHash("sha256").update(text).digest("hex")}`;
  const files = (of: Settings, facts: Facts) => {
    const { unit, envfile, password } = filesAfter(server, of, server.plan(of, facts));
    return { unit, envfile, password } as Facts;
  };
  const first = files(want, fresh);
  const password = TOKEN.split(":").at(-1) as string;
  /** A password that k3s accepts, with colons and characters that shells, sed, curl and systemd interpret. */
  const ODD = "a::b:c!'\"$(id)\\&/#";
  const up = (written: Facts, over: Facts = {}) =>
    healthy(MODERN, written, { external: "yes\n", token: `${TOKEN}\n`, ...over });

  test("accepts any password of the cluster, byte for byte", () => {
    const odd = { ...want, K3S_TOKEN: TOKEN.replace(password, () => ODD) };
    for (const settings of [{ ...odd, K3S_URL: other.K3S_URL }, odd])
      assert.equal((files(settings, fresh).password ?? "").trim(), hash(ODD));
    const joins = wanted({ K3S_VERSION: MODERN, K3S_TOKEN: odd.K3S_TOKEN });
    const plan = agent.plan(joins, fresh);
    const again = agent.plan(joins, healthy(MODERN, filesAfter(agent, joins, plan)));
    assert.doesNotMatch(JSON.stringify(verbs(again)), /service\.env/);
    const env = plan.find(({ why }) => why.includes("service.env"));
    const file = join(temporary(), "env");
    const { status } = shell(
      `K3S_TOKEN=${quote(odd.K3S_TOKEN)}\n${(env?.sh ?? "").replaceAll("/etc/systemd/system/k3s-agent.service.env", file)}`,
    );
    assert.equal(status, 0);
    // As systemd reads it if the first character is not a quote (v219 to v257): a backslash escapes the next one.
    const [, value = ""] = /^K3S_TOKEN=(.*)$/m.exec(readFileSync(file, "utf8")) ?? [];
    assert.equal(value.replaceAll(/\\(.)/g, "$1"), odd.K3S_TOKEN);
  });

  test("has the endpoint only in its environment file, and in no plan", () => {
    const plan = server.plan(want, fresh);
    assert.deepEqual(plan[1]?.secrets, ["K3S_DATASTORE_ENDPOINT"]);
    assert.doesNotMatch(JSON.stringify(plan), /hunter2|203\.0\.113\.5/);
    assert.doesNotMatch(first.unit ?? "", /hunter2|datastore/);
  });

  test("that is the first one generates the cluster's password, once", () => {
    assert.match(
      server.plan(want, fresh)[0]?.why ?? "",
      /^write .*across-clouds\.token .*, the password of a new cluster$/,
    );
    assert.match(first.password ?? "", /^600\n[0-9a-f]{64}\n?$/);
    assert.notEqual(files(want, fresh).password, first.password, "another cluster has another");
    assert.deepEqual(verbs(server.plan(want, { ...fresh, password: first.password as string })).slice(0, 1), [
      "write /etc/systemd/system/k3s.service.env",
    ]);
  });

  test("that is the first one needs no change when its token is in the env file", () => {
    const facts = up({ ...first, password: hash(password) });
    assert.deepEqual(server.plan(want, facts), []);
    assert.deepEqual(server.plan(taught, facts), []);
    assert.deepEqual(server.learn?.(taught, facts), { K3S_URL: `https://${IP}:6443`, K3S_TOKEN: TOKEN });
  });

  test("that is the first one and is set up again gets the cluster's password", () =>
    assert.equal(files(taught, fresh).password?.trim(), hash(password)));

  test("that is a further one gets the cluster's password, changes nothing in the env file, and is restarted for a new password", () => {
    const written = files(other, fresh);
    assert.equal(written.password?.trim(), hash(password));
    assert.deepEqual(server.plan(other, fresh)[0]?.secrets, ["K3S_TOKEN"]);
    assert.deepEqual(server.plan(other, up(written)), []);
    assert.deepEqual(server.learn?.(other, up(written)), {});
    assert.deepEqual(
      verbs(server.plan({ ...other, K3S_TOKEN: TOKEN.replace("0123", "4567") }, up(written))),
      ["write /etc/rancher/k3s/across-clouds.token", "restart k3s"],
    );
  });

  test("that is named first in SERVER becomes K3S_URL, so that agents move to it", () => {
    const now = { ...other, SERVER: "root@b1 a1", HOST: "b1" };
    const facts = up({ ...files(other, fresh), password: hash(password) });
    assert.equal(server.learn?.(now, facts).K3S_URL, `https://${IP}:6443`);
    assert.deepEqual(server.plan(now, facts), []);
    assert.deepEqual(server.learn?.({ ...now, HOST: "a1" }, facts), {});
  });

  test("is refused if its cluster is in SQLite, and one without the setting if its cluster is in a datastore", () => {
    assert.match(
      refusal(server, want, { ...fresh, sqlite: "yes\n" }).message,
      /own SQLite.*start a new, empty one/,
    );
    assert.deepEqual(server.plan(want, up({ ...first, password: hash(password) }, { sqlite: "yes\n" })), []);
    assert.match(refusal(server, wanted(), { ...fresh, external: "yes\n" }).message, /external datastore/);
  });
});

describe("a node's password", () => {
  const stays = (text: string, seconds: number) => {
    const path = join(temporary(), "password");
    writeFileSync(path, text);
    utimesSync(path, Date.now() / 1000, Date.now() / 1000 - seconds);
    assert.equal(shell(`set -eu\n${withoutEmpty(path)}`).status, 0);
    return existsSync(path);
  };

  test("that a full disk has left empty is removed, so that k3s generates another", () =>
    assert(!stays("", 60)));
  test("that is being written is kept", () => assert(stays("", 0)));
  test("is kept, and a missing one is not an error", () => {
    assert(stays("0123\n", 60));
    assert.equal(shell(`set -eu\n${withoutEmpty(join(temporary(), "password"))}`).status, 0);
  });
});

/** `make check` on running clusters: a healthy one, and each fault, which is injected, diagnosed and repaired in turn. */
import assert from "node:assert/strict";
import { readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { type Bench, bench, MODERN, OLD, routerRule, script, state, untouched } from "./suite.ts";

const check = script("check");

interface Fault {
  name: string;
  /** Breaks the cluster, and returns a function that repairs it. */
  make(t: Bench): Promise<() => unknown>;
  /** What is wrong and what to do, as check prints it. */
  says: RegExp[];
  env?: Record<string, string>;
}

const rule = (t: Bench, cloud: "a" | "b", chain: "forward" | "ports", text: string) =>
  routerRule(t.lab, cloud, chain, `${text} drop`);

/** Shell code for a box, and the code that undoes it. */
const onBox = (box: string, sh: string, undo: string) => async (t: Bench) => {
  await t.box(box).sh(sh);
  return () => t.box(box).sh(undo);
};

/** Shell code for a box, and the make command that repairs it. */
const mendedBy =
  (box: string, sh: string, command: string, undo = "") =>
  async (t: Bench) => {
    await t.box(box).sh(sh);
    return async () => {
      if (undo) await t.box(box).sh(undo);
      await t.ok(command);
    };
  };

const ENV = "/etc/systemd/system/k3s-agent.service.env";
/** On a busy machine wireguard-go may start too late; systemd then restarts k3s. */
const ANEW = "systemctl restart k3s-agent || sleep 8; sleep 3";
const RESTART = "systemctl restart --no-block k3s-agent; sleep 4";

/** Faults of the network and the boxes: of either generation. */
const COMMON: Fault[] = [
  {
    name: "UDP 51820 closed in a box's security group",
    make: (t) => rule(t, "b", "forward", "ip daddr 192.168.0.11 udp dport 51820"),
    says: [
      /^b1: UDP 51820 is closed before it: its peers' packets do not reach its network card$/m,
      /^ +do: open 51820\/udp in the security group of b1$/m,
    ],
  },
  {
    name: "UDP 51820 closed in a box's own firewall",
    make: onBox(
      "b1",
      "iptables -I INPUT -p udp --dport 51820 -j DROP",
      "iptables -D INPUT -p udp --dport 51820 -j DROP",
    ),
    says: [
      /^b1: iptables INPUT drops 51820\/udp from .*--dport 51820 -j DROP\)/m,
      /^ +do: make firewall HOST=b1$/m,
    ],
  },
  {
    name: "packets of full size lost between the clouds",
    make: (t) => rule(t, "a", "forward", "udp dport 51820 ip length > 1440"),
    says: [
      /^a1: the MTU 1420 of flannel\S+ is too large between it and its peers: packets larger than 1372 are lost$/m,
    ],
  },
  {
    name: "a kubelet that cannot be reached at 10250/tcp",
    make: (t) => rule(t, "b", "ports", "ip daddr 192.168.0.12 tcp dport 10250"),
    says: [
      /^b2: its kubelet cannot be reached at 198\.51\.101\.12:10250 \(dropped\): no metrics of it/m,
      /^ +do: open 10250\/tcp/m,
    ],
  },
  {
    name: "a server that cannot be reached at 6443/tcp",
    make: (t) => rule(t, "a", "ports", "tcp dport 6443"),
    says: [
      /^b1, b2: it does not reach the server's 6443\/tcp: packets are dropped$/m,
      /^ +do: open 6443\/tcp/m,
    ],
  },
  {
    name: "a DNS upstream at a private address of another cloud",
    make: onBox("b2", "echo nameserver 192.168.0.254 >/etc/resolv.conf", ": >/etc/resolv.conf"),
    says: [/^b2: its DNS upstream 192\.168\.0\.254 is a private address that does not answer/m],
  },
  {
    name: "a clock that is behind",
    // The boxes share the machine's clock, so a box gets another `date`.
    make: onBox(
      "b2",
      `printf '#!/bin/sh\\nexec /usr/bin/date -d "-1 hour" "$@"' >/usr/local/bin/date; chmod +x /usr/local/bin/date`,
      "rm /usr/local/bin/date",
    ),
    says: [/^b2: its clock is 3600 s behind the others'$/m, /^ +do: run timedatectl set-ntp true on it$/m],
  },
  {
    name: "PROXY_MODE=ipvs on a kernel without ip_vs",
    make: async () => () => {},
    env: { PROXY_MODE: "ipvs" },
    says: [/^a1, b1, b2: ipvs is configured, but its kernel \S+ has no ip_vs: kube-proxy uses iptables$/m],
  },
  {
    name: "a token of another cluster",
    make: mendedBy("b2", `sed -i 's/K10......../K1000000000/' ${ENV}; ${RESTART}`, "make agent HOST=b2"),
    says: [
      /^b2: its K3S_TOKEN belongs to another cluster: it names the CA 00000000\S+, the server has/m,
      /^ +do: make server, then make agent HOST=b2$/m,
    ],
  },
  {
    name: "k3s that is stopped",
    make: mendedBy("b1", "systemctl stop k3s-agent", "make agent HOST=b1"),
    says: [/^b1: k3s-agent does not run \(systemd: (inactive|failed)\)$/m, /^ +do: make agent HOST=b1$/m],
  },
  {
    name: "a box that is off",
    make: async (t) => {
      await t.box("b2").off();
      return async () => {
        await t.box("b2").on();
        await t.ok("make agent HOST=b2");
      };
    },
    says: [/^b2: Could not reach b2: /m],
  },
];

const GENERATIONS: { version: string; faults: Fault[] }[] = [
  {
    version: MODERN,
    faults: [
      ...COMMON,
      {
        name: "the annotation deleted by k3s without --flannel-external-ip",
        make: async (t) => {
          await t
            .box("a1")
            .sh(
              "cd /etc/systemd/system; sed -i '/--flannel-external-ip/d' k3s.service; sed -i '$s/ *\\\\$//' k3s.service; systemctl daemon-reload; systemctl restart k3s",
            );
          await t.box("b1").sh(ANEW);
          return () =>
            t.ok("make server && ssh b1 systemctl restart --no-block k3s-agent && make agent HOST=b1");
        },
        says: [
          /^a1, b1: flannel's address for it is 192\.168\.0\.11, a private address: without --flannel-external-ip k3s v1\.36\.2\+k3s1 deletes/m,
          /^ +do: make server, then systemctl restart k3s-agent on the agents$/m,
        ],
      },
      {
        name: "two boxes with the same WireGuard key",
        make: async (t) => {
          const key = (await t.box("b1").sh("cat /run/flannel/wgkey")).trim();
          await t.box("b2").sh(`echo '${key}' >/run/flannel/wgkey; ${ANEW}`);
          return async () => {
            await t.box("b2").sh(`rm -f /run/flannel/wgkey; ${ANEW}`);
            for (const [box, unit] of [
              ["b1", "k3s-agent"],
              ["a1", "k3s"],
            ] as const)
              await t.box(box).sh(`systemctl restart --no-block ${unit}`);
            await t.ok("make -j up");
          };
        },
        says: [
          /^b2: it has the same WireGuard key as b1: one was cloned from the other$/m,
          /^ +do: on b2: rm -f \/run\/flannel\/wgkey && systemctl restart k3s-agent; then restart k3s on the others$/m,
        ],
      },
    ],
  },
  {
    version: OLD,
    faults: [
      {
        name: "an endpoint that is a private address",
        make: async (t) => {
          await t.box("a1").sh("kubectl annotate node b1 flannel.alpha.coreos.com/public-ip-overwrite-");
          await t.box("b1").sh(ANEW);
          return () => t.ok("make annotate HOST=b1");
        },
        says: [
          /^b1: flannel's address for it is 192\.168\.0\.11, a private address: it is not annotated with its public address$/m,
          /^ +do: make annotate HOST=b1$/m,
        ],
      },
      ...COMMON.filter(({ name }) => /own firewall|full size|token of|name that/.test(name)),
    ],
  },
];

describe("make check", { concurrency: true }, () => {
  for (const { version, faults } of GENERATIONS)
    describe(`with k3s ${version}`, { concurrency: 1 }, () => {
      let t: Bench;
      before(async () => {
        t = await bench({ name: version === OLD ? "check-old" : "check" });
        t.settings({ K3S_VERSION: version });
        await t.ok("make -j up");
      });
      after(() => t?.lab.down());

      test("reports no problem in a healthy cluster, and changes nothing", async () => {
        const before = await Promise.all(t.lab.boxes.map(state));
        const { out, text } = await t.says(`bash -c 'time -p ${check}'`, 0, ["Nothing is wrong."]);
        for (const row of [/^b1 +\d+s \S+\/\S+ +- /m, /^b2 +yes +198\.51\.101\.12 +198\.51\.101\.12 /m])
          assert.match(out, row);
        assert.match(out, /^ok +full-size packets through the tunnels: 6 of 6$/m);
        await untouched(t.lab.boxes, before);
        // Only the script's own CPU time, without that of boxes, ssh and a busy machine.
        const own = [...text.matchAll(/^(?:user|sys) ([\d.]+)$/gm)].reduce((sum, m) => sum + Number(m[1]), 0);
        assert(own > 0 && own < 3, `${own} s of its own`);
      });

      test("needs one login and one script per box, and a second one on the server for pods", async () => {
        const trips = await t.trips(["a1", "b1", "b2"], () => t.ok("make check"));
        assert.deepEqual(trips, {
          a1: { commands: 2, logins: 1 },
          b1: { commands: 1, logins: 1 },
          b2: { commands: 1, logins: 1 },
        });
      });

      test("reports the same verdict as JSON", async () => {
        const said = JSON.parse((await t.ok(`${check} --json`)).out);
        assert.deepEqual([said.ok, said.wrong, said.boxes.length, said.nodes.length], [true, [], 3, 3]);
      });

      if (version === MODERN)
        test("with WATCH=1 is repeated every few seconds until it is interrupted", async () => {
          const { text } = await t.op("timeout -s INT 20 make check WATCH=1");
          const times = text.match(/^Nothing is wrong\.$/gm)?.length ?? 0;
          assert(times > 1, text);
        });

      test("reports no problem on a box that was renamed, whose node keeps its name", async () => {
        await t.box("b2").sh(`hostname a1; ${RESTART}`);
        await t.ok("make agent HOST=b2");
        await t.says(check, 0, ["Nothing is wrong."]);
        await t.box("b2").sh("hostname b2");
      });

      test("has a summary, make status, which prints ten lines with one script on the server", async () => {
        let out = "";
        const trips = await t.trips(["a1", "b1"], async () => {
          ({ out } = await t.ok("make status"));
        });
        assert.deepEqual(trips, { a1: { commands: 1, logins: 1 }, b1: { commands: 0, logins: 0 } });
        assert.equal(out.trim().split("\n").length, 10, out);
        for (const row of [
          /^nodes +3, all Ready$/m,
          /^WireGuard +2 of 2 peers of a1/m,
          /^verdict +nothing is wrong/m,
        ])
          assert.match(out, row);
      });

      test("is complemented by make kubeconfig, which adds an access that works from the operator's machine", async () => {
        const path = join(t.lab.dir, "home/.kube/config");
        await t.ok("make kubeconfig");
        const text = readFileSync(path, "utf8");
        assert.equal((statSync(path).mode & 0o777).toString(8), "600");
        assert.match(text, /^current-context: ""$/m);
        await t.says("make kubeconfig", 0, ["nothing to do: context k3s-198.51.100.11 in "]);
        await t.ok("make kubeconfig USE=1");
        assert.match(readFileSync(path, "utf8"), /^current-context: k3s-198\.51\.100\.11$/m);
        // The stand-in's kubectl on the operator's machine.
        const { dir } = t.lab;
        const k3s = `${dir}/stand-in/node --no-warnings ${dir}/stand-in/k3s.ts ${version} k3s`;
        await t.says(`${k3s} kubectl --kubeconfig ${path} get nodes --no-headers`, 0, [/^b2 +Ready/m]);
      });

      for (const { name, make, says, env } of faults)
        test(`reports the cause and the remedy of ${name}`, async () => {
          const mend = await make(t);
          try {
            const { text } = await t.says(check, 1, says, env ? { env } : {});
            const lines = text.match(/^ {4}do: /gm) ?? [];
            assert.equal(lines.length, 1, `one cause, one line:\n${text}`);
          } finally {
            await mend();
          }
          await healthy(t);
        });

      if (version === MODERN)
        test("reports no problem after make firewall has closed the other ports", async () => {
          await t.ok("make firewall");
          await healthy(t);
        });

      test("provides the cause that is printed when a script fails", async () => {
        await t.says("make agent HOST=b2 AGENT_ARGS=--nonsense", 2, [
          /^b2 +cause: b2: SERVER_ARGS or AGENT_ARGS has --nonsense, which this release of k3s does not know$/m,
          /^b2 +do: correct it, then "?make agent HOST=b2/m,
        ]);
        await t.ok("make agent HOST=b2");
      });
    });
});

/** There is no problem any more; handshakes and the API may need some seconds. */
async function healthy(t: Bench) {
  for (let tries = 6; ; tries--) {
    const said = await t.op(check);
    if (said.status === 0) return;
    assert(tries, `still wrong after the repair:\n${said.text}`);
    await new Promise((done) => setTimeout(done, 2000));
  }
}

import assert from "node:assert/strict";
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { describe, test } from "node:test";
import { judge } from "../lib/check/diagnose.ts";
import { clusterOf, LOOKS } from "../lib/check/survey.ts";
import { certificatesIn, certificatesLook, ending, firstOf } from "../lib/k3s/certificates.ts";
import { Refusal } from "../lib/step.ts";
import { certsAs } from "../scripts/cluster/certs.ts";
import { accessEnd } from "../scripts/cluster/kubeconfig.ts";
import { statusOf } from "../scripts/cluster/status.ts";
import {
  A1,
  B1,
  B2,
  certificate,
  certificates,
  type Facts,
  fixture,
  healthy,
  IP,
  MODERN,
  member,
  NOW,
  OLD,
  shell,
  temporary,
  wanted,
} from "./helpers.ts";

const DAY = 86_400;
const inDays = (days: number) => NOW + 0.5 + days * DAY;
const SERVER = { "server/tls/client-admin.crt": inDays(300), "dynamic-cert.json": inDays(300) };
const AGENT = { "agent/client-kubelet.crt": inDays(300), "agent/serving-kubelet.crt": inDays(300) };

describe("certificates of a box", () => {
  const data = (files: Record<string, string>) => {
    const folder = temporary();
    for (const [file, text] of Object.entries(files)) {
      mkdirSync(dirname(join(folder, file)), { recursive: true });
      writeFileSync(join(folder, file), text);
    }
    const look = certificatesLook.replaceAll("/var/lib/rancher/k3s", folder);
    return shell(`fact() { :; }\n${look}`).stdout;
  };
  const PEM = fixture("cacerts-v1.17.6.pem");
  const other = `-----BEGIN CERTIFICATE-----\n${certificate(inDays(5))}\n-----END CERTIFICATE-----\n`;

  test("are sent one a line, the first of each file, without the CA behind it and without a key", () => {
    const said = data({
      "server/tls/client-admin.crt": other + PEM,
      "server/tls/server-ca.crt": PEM,
      "server/tls/client-cloud-controller.crt": other,
      "server/tls/client-kube-proxy.crt": other,
      "agent/serving-kubelet.crt": other + PEM,
      "agent/server-ca.crt": PEM,
      "server/tls/dynamic-cert.json": JSON.stringify({
        data: { "tls.crt": Buffer.from(other + PEM).toString("base64"), "tls.key": "SECRET" },
      }),
    });
    assert.doesNotMatch(said, /SECRET/);
    const { own, cas } = certificatesIn({ certificates: said });
    assert.deepEqual(
      own.map(({ file }) => file),
      ["server/tls/client-admin.crt", "agent/serving-kubelet.crt", "dynamic-cert.json"],
    );
    assert.deepEqual([...new Set(own.map(({ ends }) => ends))], [Math.floor(inDays(5))]);
    assert.deepEqual(cas, [
      { file: "server/tls/server-ca.crt", ends: Date.parse("2036-11-20T15:08:05Z") / 1000 },
    ]);
  });

  test("are none on a box without k3s, and what is no certificate is left out", () => {
    assert.equal(data({}), "");
    const said = data({ "agent/client-kubelet.crt": "nonsense\n", "server/tls/dynamic-cert.json": "{" });
    assert.deepEqual(certificatesIn({ certificates: `${said}\nx y\n` }), { own: [], cas: [] });
  });

  test("are asked for by check and status, not by the scripts that set up a box", () => {
    for (const look of [...LOOKS.server, ...LOOKS.agent]) assert.doesNotMatch(look, /certificates/);
  });

  test("are named by the day on which the first of them ends", () => {
    const { own } = certificatesIn({ certificates: certificates({ ...SERVER, ...AGENT, a: inDays(20) }) });
    assert.match(ending(firstOf(own)?.ends ?? 0, NOW), /^end on 2026-12-13, in 20 days$/);
    assert.match(ending(NOW - DAY, NOW), /^ended on 2026-11-22$/);
    assert.match(ending(NOW + DAY + 1, NOW, "s"), /^ends on 2026-11-24, in 1 day$/);
  });
});

describe("check", () => {
  const judged = (b1: Record<string, number>, a1: Record<string, number> = SERVER, access?: number) =>
    judge({
      ...clusterOf([
        member(MODERN, A1, { certificates: certificates(a1) }),
        member(MODERN, B1, { certificates: certificates(b1) }),
        member(MODERN, B2, { certificates: certificates(AGENT) }),
      ]),
      access: access ? { context: `k3s-${IP}`, ends: access } : undefined,
    });
  const lines = (result: ReturnType<typeof judged>) =>
    result.wrong.map(({ box, cause, remedy }) => `${box}: ${cause}: ${remedy}`);

  test("reports nothing as long as certificates last", () => {
    const { wrong, notes } = judged(AGENT, SERVER, inDays(300));
    assert.deepEqual([wrong, notes], [[], []]);
  });

  test("reports certificates that end within 30 days as a problem, with make certs", () => {
    assert.deepEqual(lines(judged({ ...AGENT, "agent/client-kubelet.crt": inDays(20.1) })), [
      "b1: its certificates end on 2026-12-13, in 20 days: k3s renews them only when it starts: make certs",
    ]);
  });

  test("notes those that end within 90 days, and from when on a restart renews them", () => {
    const { wrong, notes } = judged({ ...AGENT, "agent/client-kubelet.crt": inDays(60.1) });
    assert.deepEqual(wrong, []);
    assert.equal(notes.length, 1);
    assert.match(
      notes[0] as string,
      /^b1: .* end on 2027-01-22, in 60 days: any restart .* from 120 days before, and make certs/,
    );
  });

  test("reports certificates that have ended as the cause, not that the node is not Ready", () => {
    const result = judge(
      clusterOf([
        member(MODERN, A1, { certificates: certificates(SERVER) }),
        member(MODERN, B1, {
          certificates: certificates({ "agent/client-kubelet.crt": inDays(-1) }),
          units: "Id=k3s-agent.service\nActiveState=failed\nMainPID=0",
        }),
      ]),
    );
    assert.deepEqual(
      result.wrong.map(({ box, cause, remedy }) => [box, cause.slice(0, 49), remedy]),
      [["b1", "its certificates ended on 2026-11-22: k3s renews ", "make certs"]],
    );
  });

  test("reports a server's certificates that have ended, not that the clocks of its agents are wrong", () => {
    const said = "x509: certificate has expired or is not yet valid";
    const units = "Id=k3s-agent.service\nActiveState=failed\nMainPID=0";
    const result = judge(
      clusterOf([
        member(MODERN, A1, { certificates: certificates({ ...SERVER, "dynamic-cert.json": inDays(-1) }) }),
        member(MODERN, B1, { certificates: certificates(AGENT), units, said }),
      ]),
    );
    assert.deepEqual(
      result.wrong.map(({ box, remedy }) => [box, remedy]),
      [["a1", "make certs"]],
    );
  });

  test("reports a CA that ends, which no restart renews", () => {
    const soon = judged(AGENT, { ...SERVER, "server/tls/client-ca.crt": inDays(10) });
    assert.match(lines(soon).join(), /^a1: the cluster's CA certificates end .*: k3s certificate rotate-ca/);
    const later = judged(AGENT, { ...SERVER, "server/tls/client-ca.crt": inDays(80) });
    assert.match(later.notes.join(), /^a1: the cluster's CA certificates end on .* no restart renews them$/);
  });

  test("reports the user's kubeconfig with make kubeconfig, unless the server's own certificates end too", () => {
    assert.deepEqual(lines(judged(AGENT, SERVER, inDays(20.1))), [
      `kubeconfig: the certificate of its context k3s-${IP} ends on 2026-12-13, in 20 days: make kubeconfig`,
    ]);
    const both = judged(AGENT, { ...SERVER, "server/tls/client-admin.crt": inDays(20.1) }, inDays(20.1));
    assert.deepEqual(
      both.wrong.map(({ remedy }) => remedy),
      ["make certs"],
    );
  });
});

describe("status", () => {
  const server = (days: number) =>
    statusOf(
      clusterOf([member(MODERN, A1, { certificates: certificates({ "dynamic-cert.json": inDays(days) }) })]),
      "",
    ).find(([what]) => what === "server");

  test("has a word about certificates only when they are due, and is red from 30 days on", () => {
    assert.doesNotMatch(server(100)?.[1] ?? "", /certificates/);
    assert.deepEqual([/make certs$/.test(server(80.1)?.[1] ?? ""), server(80.1)?.[2]], [true, true]);
    assert.equal(server(20)?.[2], false);
  });
});

describe("make certs", () => {
  const plan = (role: "server" | "agent", version: string, ends: Record<string, number>, over: Facts = {}) =>
    certsAs(role).plan(wanted({ HOST: "b1" }), {
      ...healthy(version, {}),
      now: `${NOW}.5`,
      active: "active\n",
      certificates: certificates(ends),
      ...over,
    });
  const whys = (...args: Parameters<typeof plan>) => plan(...args).map(({ why }) => why);

  test("has nothing to do as long as certificates last for 90 days, as k3s renews none at a start before", () => {
    assert.deepEqual(whys("server", MODERN, { ...SERVER, "server/tls/client-admin.crt": inDays(91) }), []);
    assert.deepEqual(whys("agent", OLD, AGENT), []);
  });

  for (const version of [OLD, MODERN])
    test(`restarts k3s and waits until its node is Ready when one ends, or has ended, ${version}`, () => {
      for (const days of [89, 20, -1]) {
        const due = { ...SERVER, "server/tls/client-admin.crt": inDays(days) };
        const [why, ...more] = whys("server", version, due);
        assert.match(why as string, /^restart k3s and wait until node .* is Ready .*: its certificates end/);
        assert.deepEqual(more, []);
      }
      const [why] = whys("agent", version, { ...AGENT, "agent/client-kubelet.crt": inDays(20) });
      assert.match(why as string, /^restart k3s-agent and wait/);
    });

  test("removes what old k3s would take the certificate of 6443 from again, and waits for it on modern k3s", () => {
    const due = { ...SERVER, "dynamic-cert.json": inDays(20) };
    const [forget, restart] = plan("server", OLD, due);
    assert.match(forget?.why ?? "", /^delete the secret k3s-serving/);
    assert.match(restart?.why ?? "", /^remove \/\S*\/dynamic-cert\.json, restart k3s/);
    const [only, ...more] = plan("server", MODERN, due);
    assert.deepEqual(more, []);
    assert.match(only?.sh ?? "", /has not renewed the certificate of 6443/);
    assert.doesNotMatch(only?.sh ?? "", /rm -f \S*dynamic-cert/);
  });

  test("restarts a server whose file for 6443 an interrupted run has removed", () => {
    assert.match(whys("server", OLD, { "server/tls/client-admin.crt": inDays(300) }).join(), /^restart k3s/);
  });

  test("refuses a box on which no k3s runs, with the command that sets it up", () => {
    for (const over of [{ active: "failed\n" }, { certificates: "" }] as Facts[])
      assert.throws(
        () => plan("agent", MODERN, AGENT, over),
        (error) => error instanceof Refusal && /make agent HOST=b1/.test(error.message),
      );
  });
});

describe("the user's kubeconfig", () => {
  const end = (user: object, name = `k3s-${IP}`) => {
    const path = join(temporary(), "config");
    writeFileSync(path, JSON.stringify({ kind: "Config", users: [{ name, user }] }));
    const before = process.env.KUBECONFIG;
    process.env.KUBECONFIG = path;
    try {
      return accessEnd(IP);
    } finally {
      if (before === undefined) delete process.env.KUBECONFIG;
      else process.env.KUBECONFIG = before;
    }
  };
  const pem = `-----BEGIN CERTIFICATE-----\n${certificate(NOW)}\n-----END CERTIFICATE-----\n`;
  const user = { "client-certificate-data": Buffer.from(pem).toString("base64") };

  test("tells when the certificate of the cluster's context ends", () =>
    assert.deepEqual(end(user), { context: `k3s-${IP}`, ends: NOW }));

  test("tells nothing without that context, or with a password, as old k3s gives one", () => {
    assert.equal(end(user, "another"), undefined);
    assert.equal(end({ username: "admin", password: "x" }), undefined);
    assert.equal(end({ "client-certificate-data": "eA==" }), undefined);
  });
});

import assert from "node:assert/strict";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";
import { describe, test } from "node:test";
import { compare, pathOf } from "../lib/k3s/releases.ts";
import { SettingError } from "../lib/settings.ts";
import { Refusal } from "../lib/step.ts";
import { mayUpgrade, stepsFor } from "../scripts/cluster/upgrade.ts";
import {
  B1,
  boxOf,
  type Facts,
  healthy,
  MODERN,
  OLD,
  prepared,
  programs,
  shell,
  temporary,
  wanted,
} from "./helpers.ts";

test("releases are in the order in which they were made", () => {
  const order = ["v1.17.6+k3s1", "v1.17.17+k3s1", "v1.18.2-rc1+k3s1", "v1.18.2-rc2+k3s1", "v1.18.2+k3s1"];
  order.push("v1.18.2+k3s2", "v1.9999.0+k3s1");
  for (const [i, a] of order.entries())
    for (const [j, b] of order.entries())
      assert.equal(Math.sign(compare(a, b)), Math.sign(i - j), `${a} ${b}`);
});

describe("before anything is downloaded or drained an upgrade", () => {
  const member = (facts: Facts) => ({
    box: boxOf({ host: "b2", ip: "198.51.101.12", word: "b2", name: "b2" }),
    role: "agent" as const,
    facts: prepared(OLD, facts),
  });
  const fine = member({ cgroup: "tmpfs\n" });
  const cases: [name: string, box: Facts, path: string[], pattern: RegExp][] = [
    [
      "back to a release that knows no cgroup v2",
      { cgroup: "cgroup2fs\ncpu cpuset memory\n" },
      [OLD],
      /b2: k3s v1\.17\.6\+k3s1 runs on cgroup v1 only/,
    ],
    [
      "to a release that wants WireGuard in the kernel",
      { module: "", userspace: "/usr/bin/wireguard-go\n" },
      [OLD, MODERN],
      /b2: .*wireguard-go is here, but k3s v1\.36/,
    ],
    [
      "to any, where the binary cannot be put in place",
      { readonly: "/usr/local/bin\n" },
      [MODERN],
      /b2: \/usr\/local\/bin cannot be written/,
    ],
  ];
  for (const [name, facts, path, pattern] of cases)
    test(`${name} is refused, with the box`, () =>
      assert.throws(
        () => mayUpgrade([fine, member(facts)], path),
        (e: Error) => e instanceof Refusal && pattern.test(e.message),
      ));
  test("goes on where every box can run every release of its way", () =>
    mayUpgrade([fine, member({ cgroup: "tmpfs\n" })], ["v1.18.20+k3s1", "v1.34.2+k3s1", MODERN]));
});

describe("the way of an upgrade", () => {
  const cases: { name: string; running: string[]; to: string; steps?: string; force?: true; path: string }[] =
    [
      { name: "is none where all run it", running: [OLD, OLD], to: OLD, path: "" },
      {
        name: "is one step within a minor version",
        running: [OLD],
        to: "v1.17.17+k3s1",
        path: "v1.17.17+k3s1",
      },
      {
        name: "is one step to the next one",
        running: ["v1.35.4+k3s1"],
        to: "v1.36.2+k3s1",
        path: "v1.36.2+k3s1",
      },
      {
        name: "leads through what was told",
        running: [OLD],
        to: "v1.20.15+k3s1",
        steps: "v1.18.20+k3s1 v1.19.16+k3s1",
        path: "v1.18.20+k3s1 v1.19.16+k3s1 v1.20.15+k3s1",
      },
      {
        name: "may be told with its end",
        running: [OLD],
        to: "v1.18.20+k3s1",
        steps: "v1.17.17+k3s1 v1.18.20+k3s1",
        path: "v1.17.17+k3s1 v1.18.20+k3s1",
      },
      {
        name: "goes on where it was cut: what every node has is left out",
        running: ["v1.19.16+k3s1", "v1.18.20+k3s1", "v1.18.20+k3s1"],
        to: "v1.20.15+k3s1",
        steps: "v1.18.20+k3s1 v1.19.16+k3s1",
        path: "v1.19.16+k3s1 v1.20.15+k3s1",
      },
      { name: "jumps where forced", running: [OLD], to: "v1.36.2+k3s1", force: true, path: "v1.36.2+k3s1" },
      { name: "leads back where forced", running: ["v1.18.20+k3s1"], to: OLD, force: true, path: OLD },
    ];
  for (const { name, running, to, steps = "", force = false, path } of cases)
    test(name, () =>
      assert.equal(pathOf(running, to, steps.split(" ").filter(Boolean), force).join(" "), path),
    );

  const refused: { name: string; running: string[]; to: string; steps?: string; says: RegExp }[] = [
    {
      name: "a jump, with the releases to pass through",
      running: ["v1.17.6+k3s1"],
      to: "v1.20.15+k3s1",
      says: /left out, .*STEPS="v1\.18\.20\+k3s1 v1\.19\.16\+k3s1"; FORCE=1 jumps/,
    },
    {
      name: "a jump of a step, with what was told and what is missing",
      running: ["v1.17.6+k3s1"],
      to: "v1.23.17+k3s1",
      steps: "v1.18.1+k3s1 v1.21.14+k3s1",
      says: /STEPS="v1\.18\.1\+k3s1 v1\.19\.16\+k3s1 v1\.20\.15\+k3s1 v1\.21\.14\+k3s1 v1\.22\.17\+k3s1"/,
    },
    {
      name: "the whole way to today, each minor version once",
      running: ["v1.17.6+k3s1"],
      to: "v1.36.2+k3s1",
      says: /STEPS="v1\.18\.\S+( v1\.\d+\.\S+){16} v1\.35\.\S+"/,
    },
    {
      name: "a way back",
      running: ["v1.36.3+k3s1"],
      to: "v1.36.2+k3s1",
      says: /runs v1\.36\.3\+k3s1, and a way back to v1\.36\.2\+k3s1 is not safe/,
    },
    {
      name: "a way back for one node of several",
      running: ["v1.36.1+k3s1", "v1.36.3+k3s1"],
      to: "v1.36.2+k3s1",
      says: /a way back/,
    },
  ];
  for (const { name, running, to, steps = "", says } of refused)
    test(`is refused for ${name}`, () =>
      assert.throws(
        () => pathOf(running, to, steps.split(" ").filter(Boolean), false),
        (error) => error instanceof Refusal && says.test(error.message),
      ));

  for (const steps of ["v1.19.16+k3s1 v1.18.20+k3s1", "v1.21.14+k3s1", "v1.18.20+k3s1 v1.18.20+k3s1"])
    test(`is a wrong setting for steps that do not lead up to it: ${steps}`, () =>
      assert.throws(() => pathOf([OLD], "v1.20.15+k3s1", steps.split(" "), true), SettingError));
});

test("what a node ran is put back as it was: binary, unit, and the files of settings, also those that were not there", () => {
  const root = temporary();
  const at = (path: string) => `${root}${path}`;
  const put = (path: string, text: string) => {
    mkdirSync(dirname(at(path)), { recursive: true });
    writeFileSync(at(path), text);
  };
  const [binary, unit] = ["/usr/local/bin/k3s", "/etc/systemd/system/k3s-agent.service"];
  const [config, mirrors] = [
    "/etc/rancher/k3s/config.yaml.d/across-clouds.yaml",
    "/etc/rancher/k3s/registries.yaml",
  ];
  const steps = stepsFor("agent", MODERN, B1.ip);
  const facts = healthy(MODERN, {}, { version: `${MODERN}\n`, hostname: "b1\n" });
  const run = (text = "") => {
    const own = text
      .replace(/unit=k3s-agent;[\s\S]*\n(?=fi\nrm -rf)/, "echo started\n")
      .replaceAll(/\/(var\/lib|usr\/local|etc)\//g, `${root}/$1/`);
    const { status, stdout } = shell(`set -eu\n${own}`, ["sh", "-s"], { PATH: programs(root, {}) });
    assert.equal(status, 0, stdout);
    return stdout;
  };

  for (const path of [binary, unit, config]) put(path, `old ${path}`);
  put("/var/lib/rancher/k3s/x", "");
  run(steps.keep.plan(wanted(), facts)[0]?.sh);
  for (const path of [binary, config, mirrors]) put(path, "new");
  rmSync(at(unit));
  const back = steps.putBack.plan(wanted(), { ...facts, kept: MODERN, generation: "modern" })[0]?.sh;
  assert.match(run(back), /started/);
  for (const path of [binary, unit, config]) assert.equal(readFileSync(at(path), "utf8"), `old ${path}`);
  assert.equal(existsSync(at(mirrors)), false);
  assert.equal(existsSync(at("/var/lib/rancher/k3s/before")), false);
});

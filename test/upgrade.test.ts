import assert from "node:assert/strict";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";
import { describe, test } from "node:test";
import { compare, pathOf } from "../lib/k3s/releases.ts";
import { SettingError } from "../lib/settings.ts";
import { Refusal } from "../lib/step.ts";
import { mayUpgrade, nextHop, type Progress, stepsFor } from "../scripts/cluster/upgrade.ts";
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

test("releases are compared by their order of publication", () => {
  const order = ["v1.17.6+k3s1", "v1.17.17+k3s1", "v1.18.2-rc1+k3s1", "v1.18.2-rc2+k3s1", "v1.18.2+k3s1"];
  order.push("v1.18.2+k3s2", "v1.9999.0+k3s1");
  for (const [i, a] of order.entries())
    for (const [j, b] of order.entries())
      assert.equal(Math.sign(compare(a, b)), Math.sign(i - j), `${a} ${b}`);
});

describe("before anything is downloaded or drained, an upgrade", () => {
  const member = (facts: Facts) => ({
    box: boxOf({ host: "b2", ip: "198.51.101.12", word: "b2", name: "b2" }),
    role: "agent" as const,
    facts: prepared(OLD, facts),
  });
  const fine = member({ cgroup: "tmpfs\n" });
  const cases: [name: string, box: Facts, path: string[], pattern: RegExp][] = [
    [
      "to an older release without support for cgroup v2",
      { cgroup: "cgroup2fs\ncpu cpuset memory\n" },
      [OLD],
      /b2: k3s v1\.17\.6\+k3s1 runs on cgroup v1 only/,
    ],
    [
      "to a release that needs WireGuard in the kernel",
      { module: "", userspace: "/usr/bin/wireguard-go\n" },
      [OLD, MODERN],
      /b2: .*wireguard-go is here, but k3s v1\.36/,
    ],
    [
      "to any release, if the binary cannot be installed,",
      { readonly: "/usr/local/bin\n" },
      [MODERN],
      /b2: \/usr\/local\/bin cannot be written/,
    ],
  ];
  for (const [name, facts, path, pattern] of cases)
    test(`${name} is refused with the name of the box`, () =>
      assert.throws(
        () => mayUpgrade([fine, member(facts)], path),
        (e: Error) => e instanceof Refusal && pattern.test(e.message),
      ));
  test("is accepted if every box can run every release of its path", () =>
    mayUpgrade([fine, member({ cgroup: "tmpfs\n" })], ["v1.18.20+k3s1", "v1.34.2+k3s1", MODERN]));
});

describe("an upgrade", () => {
  const [V1, V2, V3] = ["v1.34.1+k3s1", "v1.35.1+k3s1", "v1.36.1+k3s1"];
  interface Case {
    name: string;
    /** What each box runs; servers first. */
    running: string[];
    way: string[];
    force?: boolean;
    /** What goes wrong: the action and the box. */
    fails?: string;
    does: string;
  }
  /** All that it does, to its end: d of a download and u of an upgrade, the boxes, and the release's minor version. */
  const run = ({ running, way, force = false, fails = "" }: Case) => {
    const boxes = running.map((version, i): Progress & { name: string } => ({ name: `${i}`, version }));
    for (const said: string[] = []; said.length < 20; ) {
      const todo = nextHop(boxes, way, force);
      if (typeof todo === "string") return [...said, todo].join(" ");
      const { does, release, due } = todo;
      said.push(`${does[0]}${due.map(({ name }) => name).join("")}:${release.slice(3, 5)}`);
      for (const box of due)
        if (fails === `${does[0]}${box.name}:${release.slice(3, 5)}`) box.failed = true;
        else if (does === "download") box.ahead = release;
        else box.version = box.done = release;
    }
    return "endless";
  };
  const cases: Case[] = [
    { name: "downloads for all boxes, then upgrades one after the other, servers first", running: [V2, V2, V2], way: [V3], does: "d012:36 u0:36 u1:36 u2:36 finish" },
    { name: "completes each release on all boxes before it begins the next one", running: [V1, V1], way: [V2, V3], does: "d01:35 u0:35 u1:35 d01:36 u0:36 u1:36 finish" },
    { name: "resumes after an interruption, and examines boxes that run the release again, because they may still be drained", running: [V3, V2], way: [V3], does: "d01:36 u0:36 u1:36 finish" },
    { name: "skips a box that already runs a later release of the path", running: [V2, V1, V3], way: [V2, V3], does: "d01:35 u0:35 u1:35 d012:36 u0:36 u1:36 u2:36 finish" },
    { name: "examines every box if all run the release", running: [V3, V3], way: [V3], does: "d01:36 u0:36 u1:36 finish" },
    { name: "downgrades no box", running: [V3, V2], way: [V2], does: "d1:35 u1:35 finish" },
    { name: "downgrades all boxes with FORCE=1", running: [V3, V2, V3], way: [V2], force: true, does: "d012:35 u0:35 u1:35 u2:35 finish" },
    { name: "downgrades with FORCE=1 only to the final release, not to one of the path", running: [V1, V3], way: [V1, V2], force: true, does: "d0:34 u0:34 d01:35 u0:35 u1:35 finish" },
    { name: "drains no box if a download fails", running: [V2, V2, V2], way: [V3], fails: "d1:36", does: "d012:36 end" },
    { name: "stops at the first box that fails", running: [V2, V2, V2], way: [V3], fails: "u1:36", does: "d012:36 u0:36 u1:36 end" },
    { name: "stops at a box that fails at an intermediate release, before the next one", running: [V1, V1], way: [V2, V3], fails: "u1:35", does: "d01:35 u0:35 u1:35 end" },
    { name: "finishes immediately if no box needs it", running: [V3], way: [V2], does: "finish" },
  ]; // biome-ignore format: a table
  for (const it of cases) test(it.name, () => assert.equal(run(it), it.does));
});

describe("the path of an upgrade", () => {
  const cases: { name: string; running: string[]; to: string; steps?: string; force?: true; path: string }[] =
    [
      { name: "is empty if all nodes run the release", running: [OLD, OLD], to: OLD, path: "" },
      {
        name: "is one step within a minor version",
        running: [OLD],
        to: "v1.17.17+k3s1",
        path: "v1.17.17+k3s1",
      },
      {
        name: "is one step to the next minor version",
        running: ["v1.35.4+k3s1"],
        to: "v1.36.2+k3s1",
        path: "v1.36.2+k3s1",
      },
      {
        name: "leads through STEPS",
        running: [OLD],
        to: "v1.20.15+k3s1",
        steps: "v1.18.20+k3s1 v1.19.16+k3s1",
        path: "v1.18.20+k3s1 v1.19.16+k3s1 v1.20.15+k3s1",
      },
      {
        name: "may have its final release in STEPS",
        running: [OLD],
        to: "v1.18.20+k3s1",
        steps: "v1.17.17+k3s1 v1.18.20+k3s1",
        path: "v1.17.17+k3s1 v1.18.20+k3s1",
      },
      {
        name: "leaves out what every node already runs, after an interruption",
        running: ["v1.19.16+k3s1", "v1.18.20+k3s1", "v1.18.20+k3s1"],
        to: "v1.20.15+k3s1",
        steps: "v1.18.20+k3s1 v1.19.16+k3s1",
        path: "v1.19.16+k3s1 v1.20.15+k3s1",
      },
      {
        name: "may skip releases with FORCE=1",
        running: [OLD],
        to: "v1.36.2+k3s1",
        force: true,
        path: "v1.36.2+k3s1",
      },
      {
        name: "may be a downgrade with FORCE=1",
        running: ["v1.18.20+k3s1"],
        to: OLD,
        force: true,
        path: OLD,
      },
    ];
  for (const { name, running, to, steps = "", force = false, path } of cases)
    test(name, () =>
      assert.equal(pathOf(running, to, steps.split(" ").filter(Boolean), force).join(" "), path),
    );

  const refused: { name: string; running: string[]; to: string; steps?: string; says: RegExp }[] = [
    {
      name: "a jump, with the intermediate releases",
      running: ["v1.17.6+k3s1"],
      to: "v1.20.15+k3s1",
      says: /left out, .*STEPS="v1\.18\.20\+k3s1 v1\.19\.16\+k3s1"; FORCE=1 jumps/,
    },
    {
      name: "a jump within STEPS, with the missing releases",
      running: ["v1.17.6+k3s1"],
      to: "v1.23.17+k3s1",
      steps: "v1.18.1+k3s1 v1.21.14+k3s1",
      says: /STEPS="v1\.18\.1\+k3s1 v1\.19\.16\+k3s1 v1\.20\.15\+k3s1 v1\.21\.14\+k3s1 v1\.22\.17\+k3s1"/,
    },
    {
      name: "a jump over many minor versions, with one release of each",
      running: ["v1.17.6+k3s1"],
      to: "v1.36.2+k3s1",
      says: /STEPS="v1\.18\.\S+( v1\.\d+\.\S+){16} v1\.35\.\S+"/,
    },
    {
      name: "a downgrade",
      running: ["v1.36.3+k3s1"],
      to: "v1.36.2+k3s1",
      says: /runs v1\.36\.3\+k3s1, and a way back to v1\.36\.2\+k3s1 is not safe/,
    },
    {
      name: "a downgrade of one node of several",
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
    test(`is a setting error if STEPS do not ascend to it: ${steps}`, () =>
      assert.throws(() => pathOf([OLD], "v1.20.15+k3s1", steps.split(" "), true), SettingError));
});

test("an upgrade that failed restores the binary, the unit and the config files of a node, and removes new ones", () => {
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

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { Refusal } from "../lib/step.ts";
import { caIn } from "../lib/token.ts";
import { decide, outdated } from "../scripts/cluster/down.ts";
import { A1, B1, B2, boxOf, type Facts, TOKEN } from "./helpers.ts";

const OWN = caIn(TOKEN) as string;
const OTHER = "cd".repeat(32);
const URL = `https://${A1.ip}:6443`;
const SERVER: Facts = { cas: `server ${OWN}\nagent ${OWN}\n`, left: "/usr/local/bin/k3s\n" };
const AGENT: Facts = { cas: `agent ${OWN}\n`, left: "/usr/local/bin/k3s\n" };
const EMPTY: Facts = { left: "\n" };
const SOMEBODYS: Facts = { ...SERVER, "unit-k3s": "[Service]\nExecStart=/usr/local/bin/k3s server\n" };
const BOTH = { K3S_URL: URL, K3S_TOKEN: TOKEN };

/** Boxes of a cluster, a1 its server; undefined is a box that does not answer. */
interface Case {
  name: string;
  facts?: (Facts | undefined)[];
  token?: string;
  datastore?: string;
  force?: true;
  servers?: number;
  env?: Record<string, string>;
  /** Boxes from which k3s was removed. */
  gone?: string;
  refused?: Record<string, RegExp>;
  full?: string;
  forgotten?: string;
}

const of = ({ facts = [SERVER, AGENT, AGENT], token = TOKEN, datastore = "", ...given }: Case) => {
  const boxes = [A1, B1, B2].map(({ name, ip }) => boxOf({ host: name, ip, word: name, name }));
  const leaving = boxes.map((box, i) => {
    const role = i < (given.servers ?? 1) ? ("server" as const) : ("agent" as const);
    return { box, role, facts: facts[i] };
  });
  const gone = boxes.filter(({ name }) => given.gone?.split(" ").includes(name));
  const settings = { K3S_TOKEN: token, K3S_DATASTORE_ENDPOINT: datastore };
  return {
    ...decide(leaving, settings, given.force ?? false),
    forgotten: outdated(leaving, settings, given.env ?? {}, gone),
  };
};

const table = (cases: Case[]) => {
  for (const it of cases)
    test(it.name, () => {
      const { refused, full, forgotten } = of(it);
      const names = [...refused.keys()].map(({ name }) => name);
      assert.deepEqual(names, Object.keys(it.refused ?? {}));
      for (const [box, why] of refused) {
        assert.ok(why instanceof Refusal);
        assert.match(why.message, it.refused?.[box.name] as RegExp);
      }
      if (it.full !== undefined) assert.equal(full.map(({ name }) => name).join(" "), it.full);
      if (it.forgotten !== undefined) assert.equal(forgotten.join(" "), it.forgotten);
    });
};

describe("make down asks about", () => {
  table([
    { name: "every box with remains of k3s, servers first", full: "a1 b1 b2" },
    { name: "no box without remains of k3s", facts: [SERVER, EMPTY, AGENT], full: "a1 b2" },
    { name: "nothing if an earlier run has removed everything", facts: [EMPTY, EMPTY, EMPTY], full: "" },
    {
      name: "an interface that is left over from an interrupted run",
      facts: [EMPTY, { left: "flannel-wg\n" }, EMPTY],
      full: "b1",
    },
    { name: "no box that does not answer", facts: [SERVER, undefined, AGENT], full: "a1 b2" },
  ]);
});

describe("make down refuses to remove k3s from", () => {
  table([
    { name: "no box of the cluster of K3S_TOKEN", refused: {} },
    { name: "no box of the server's own cluster, if no token is known", token: "", refused: {} },
    {
      name: "a server of another cluster than that of K3S_TOKEN",
      facts: [{ ...SERVER, cas: `server ${OTHER}\n` }, AGENT, AGENT],
      refused: { a1: /a server of another cluster .*make down with that cluster's env file/ },
    },
    {
      name: "every agent of another cluster",
      facts: [SERVER, { cas: `agent ${OTHER}\n` }, { cas: `agent ${OTHER}\n` }],
      refused: { b1: /an agent of another cluster/, b2: /an agent of another cluster/ },
    },
    {
      name: "an agent of another cluster than the server's, if no token is known",
      facts: [SERVER, { cas: `agent ${OTHER}\n` }, AGENT],
      token: "",
      refused: { b1: /an agent of another cluster/ },
    },
    {
      name: "agents of an unknown cluster, if the server does not answer and no token is known",
      facts: [undefined, AGENT, EMPTY],
      token: "",
      refused: { b1: /FORCE=1 removes k3s anyway/ },
    },
    {
      name: "no agent of the cluster of K3S_TOKEN, even if the server does not answer",
      facts: [undefined, AGENT, AGENT],
      refused: {},
    },
    {
      name: "a server that is listed as an agent",
      facts: [SERVER, SERVER, AGENT],
      refused: { b1: /a server's data, with the same CA.*FORCE=1/ },
    },
    {
      name: "no further server that is listed as a server",
      facts: [SERVER, SERVER, AGENT],
      servers: 2,
      refused: {},
    },
    {
      name: "a box whose k3s was not set up by this project",
      facts: [SOMEBODYS, AGENT, AGENT],
      refused: { a1: /was not written by this project: FORCE=1/ },
    },
    {
      name: "no such box with FORCE=1",
      facts: [SOMEBODYS, { cas: `agent ${OTHER}\n` }, SERVER],
      force: true,
      refused: {},
    },
    {
      name: "a box whose data are elsewhere, even with FORCE=1",
      facts: [{ ...SERVER, told: "data-dir /mnt/k3s\n" }, AGENT, AGENT],
      force: true,
      refused: { a1: /has its data in \/mnt\/k3s/ },
    },
  ]);
});

describe("after make down, the env file", () => {
  const gone = "a1 b1 b2";
  table([
    {
      name: "no longer has the URL and token of a removed cluster",
      gone,
      env: BOTH,
      forgotten: "K3S_URL K3S_TOKEN",
    },
    {
      name: "no longer has the URL of a removed cluster without a token",
      gone,
      env: { K3S_URL: URL },
      forgotten: "K3S_URL",
    },
    {
      name: "no longer has the URL of a removed cluster with spaces around it",
      gone,
      env: { K3S_URL: ` ${URL} ` },
      forgotten: "K3S_URL",
    },
    { name: "keeps both if no box was removed", env: BOTH, forgotten: "" },
    { name: "keeps both as long as one agent is not removed", gone: "a1 b1", env: BOTH, forgotten: "" },
    { name: "keeps both if the server was not removed", gone: "b1 b2", env: BOTH, forgotten: "" },
    {
      name: "keeps both as long as a box does not answer",
      facts: [SERVER, undefined, AGENT],
      gone: "a1 b2",
      env: BOTH,
      forgotten: "",
    },
    {
      name: "keeps the URL and token of another server",
      gone,
      env: { ...BOTH, K3S_URL: "https://198.51.100.99:6443" },
      forgotten: "",
    },
    {
      name: "keeps a URL with the address of an agent",
      gone,
      env: { ...BOTH, K3S_URL: `https://${B1.ip}:6443` },
      forgotten: "",
    },
    {
      name: "no longer has the URL of a removed further server",
      servers: 2,
      facts: [SERVER, SERVER, AGENT],
      gone,
      env: { ...BOTH, K3S_URL: `https://${B1.ip}:6443` },
      forgotten: "K3S_URL K3S_TOKEN",
    },
    { name: "keeps a token without a URL", gone, env: { K3S_TOKEN: TOKEN }, forgotten: "" },
    {
      name: "keeps both if the cluster remains in a shared datastore",
      gone,
      datastore: "postgres://db/k3s",
      env: BOTH,
      forgotten: "",
    },
  ]);
});

#!/usr/bin/env -S node --import tsx
/** Step 5 of 7: a healthy k3s agent that has joined the server. Includes steps 1 to 3. */
import { createHash, X509Certificate } from "node:crypto";
import { causes } from "../lib/check/causes.ts";
import { look as lookAt } from "../lib/converge.ts";
import { NODE_SETTINGS, proxyEnv } from "../lib/k3s/config.ts";
import { firewall } from "../lib/k3s/firewall/firewall.ts";
import { neighbours } from "../lib/k3s/firewall/neighbours.ts";
import { foreignFirst } from "../lib/k3s/foreign.ts";
import { ALLOWED, caLook, identityAs, moving, nodeNameOf } from "../lib/k3s/identity.ts";
import { CONCERNS, nodesOf, SHAPE } from "../lib/k3s/nodes.ts";
import { main } from "../lib/k3s/script.ts";
import { healthyMessage, serviceLook, servicePlan, systemdFirst } from "../lib/k3s/service.ts";
import { envPath, nodeNameIn, type Role } from "../lib/k3s/unit.ts";
import type { Box } from "../lib/script.ts";
import { SettingError, type Settings } from "../lib/settings.ts";
import { quote, raw, sh } from "../lib/sh.ts";
import { type Change, type Facts, type Printed, prints, Refusal, step } from "../lib/step.ts";
import { filledEnv } from "../lib/text.ts";
import { asNode, caIn, passwordIn } from "../lib/token.ts";
import { annotateAs } from "./annotate.ts";
import { downloadK3s } from "./download-k3s.ts";
import { installWireguard } from "./install-wireguard.ts";
import { upgradeKernel } from "./upgrade-kernel.ts";

const ENV = (want: Settings) => `K3S_URL=${want.K3S_URL}\nK3S_TOKEN=@K3S_TOKEN@\n${proxyEnv(want)}`;

export const agent = step({
  name: "agent",
  options: ["PUBLIC_IP", "PROXY_MODE", "AGENT_ARGS", ...NODE_SETTINGS, "K3S_URL", "K3S_TOKEN"],

  look: (want) => [
    ...serviceLook("agent", want),
    caLook,
    ...(want.K3S_URL && want.K3S_TOKEN && !want.allowed?.has("join") ? [serverLook(want)] : []),
  ],

  plan(want, facts): Change[] {
    examine(want, facts);
    return servicePlan("agent", ENV(want), want, facts, [], moving(want, facts));
  },
});

/** What the server has said. */
const SAID = "cacerts error date door shut taken registered";

/**
 * Queries the server before this box joins: /cacerts, the date, and whether it accepts the token. For a valid token k3s
 * issues k3s-controller's certificate (to any agent, both generations), which allows to read the box's own node, or on
 * modern k3s all nodes: a name or address that is taken is found without registering anything. Skipped once the box has
 * joined with the same credentials.
 *
 * @param all ask more than whether the server is reached from here.
 */
function serverLook(want: Settings, all = true) {
  // An agent is the user "node" whatever the token says (pkg/clientaccess, both generations).
  const password = passwordIn(want.K3S_TOKEN).replace(/["\\]/g, "\\$&");
  const ca = caIn(want.K3S_TOKEN) ?? "";
  const joined = createHash("sha256")
    .update(filledEnv(ENV(want), want))
    .digest("hex");
  const name = nodeNameIn(want.AGENT_ARGS);
  const more = sh`# The password is only for the CA that the token names.
  if [ "$(digest "$dir/ca")" = ${ca} ]; then
    fact door; ${raw(asNode(quote(password)))}
      ask -K - --cacert "$dir/ca" -o "$dir/pem" -w '%{http_code}' "$url/v1-k3s/client-k3s-controller.crt"
    fact shut; text "$dir/error"
    node=${name || raw('$(tr "[:upper:]" "[:lower:]" </proc/sys/kernel/hostname)')}
    ask --cacert "$dir/ca" --cert "$dir/pem" "$url/api/v1/nodes/$node" -o "$dir/taken" \
      "$url/api/v1/nodes?pretty=false" -o "$dir/nodes"
    fact taken; [ ! -f "$dir/taken" ] || cat "$dir/taken"
    fact registered; { ${raw(SHAPE)}; } <"$dir/nodes" | concerns '' joining ${want.PUBLIC_IP}
  fi`;
  return prints(`${SAID} proof` as const)(sh`
if [ "$(digest ${envPath("agent")})" != ${joined} ] && command -v curl >/dev/null; then (
  dir=$(mktemp -d)
  trap 'rm -rf "$dir"' EXIT
  ask() { curl -sS --connect-timeout 8 --max-time 20 "$@" 2>"$dir/error"; }
  url=${want.K3S_URL}
  ask -k -D "$dir/head" -o "$dir/ca" "$url/cacerts"
  # Byte for byte: its hash is compared.
  fact cacerts; [ ! -f "$dir/ca" ] || cat "$dir/ca"
  fact error; text "$dir/error"
  fact date; [ ! -f "$dir/head" ] || while read -r key row; do case $key in [Dd]ate:) echo "$row" ;; esac; done <"$dir/head"
  ${raw(all ? more : "")}
  ${raw(proofLook)}
) fi`);
}

/**
 * A box's facts, with the server asked once more: now by what it has taught the operator. If the operator has its nodes from
 * itself, as well as the token, the box asks only whether the server is reached: more would grow with the cluster, and
 * keep the server from starting (issue 14). A box that has been refused asks for everything.
 *
 * @param nodes the server's list.
 */
export async function admission<F extends string>(
  box: Box,
  own: Facts<F>,
  nodes: string | undefined,
): Promise<Facts<F | ServerFact>> {
  const known = Object.fromEntries(Object.entries(own).filter(([fact]) => !SAID.split(" ").includes(fact)));
  const all = nodes === undefined || "door" in own;
  const look = (want: Settings) => [...(all ? [CONCERNS] : []), serverLook(want, all)];
  const facts = await lookAt(box, [step({ name: "agent", options: [], look, plan: () => [] })]);
  box.want = { ...box.want, allowed: new Set(box.want.allowed).add("join") };
  return { ...known, ...facts, ...(all ? {} : { door: "200", registered: nodes }) };
}

type ServerFact = Printed<ReturnType<typeof serverLook>>;

/** Does the box have its node password, with which a node of its name authenticates? */
export const proofLook = prints("proof")("fact proof; test -s /etc/rancher/node/password && echo yes");

/** Clocks that differ by more than this, in seconds, are wrong even if certificates are still valid. */
const CLOCKS = 86_400;

/** @throws {Refusal} or {SettingError} when this box cannot join; nothing was touched. */
function examine(want: Settings, facts: Facts<ServerFact>): void {
  if (facts.cacerts === undefined) return;
  const [ca, url] = [facts.cacerts, want.K3S_URL];
  if (!ca.includes("BEGIN CERTIFICATE")) throw new Refusal(unreachable(url, facts.error ?? ""));
  const hash = createHash("sha256").update(ca).digest("hex");
  if (want.K3S_TOKEN.slice(3, 67) !== hash)
    throw new SettingError(
      `K3S_TOKEN belongs to another cluster: it names the CA ${want.K3S_TOKEN.slice(3, 15)}…, ${url} has ${hash.slice(0, 12)}…; if the server was reinstalled, "make server" writes the current token`,
    );
  // The CA is valid from when the server was set up: TLS fails on an earlier clock. The certificates that it signs
  // expire after a year.
  const { validFrom, validTo } = certificate(ca, url);
  const now = Number(facts.now) * 1000;
  const apart = Math.abs(now - Date.parse(facts.date ?? "")) / 1000;
  if (now < Date.parse(validFrom) || now > Date.parse(validTo) || apart > CLOCKS)
    throw new Refusal(
      `This box's clock says ${new Date(now).toISOString()}, the server's ${facts.date?.trim()}; its certificates are valid from ${validFrom} to ${validTo}: correct the wrong clock (timedatectl set-ntp true)`,
    );
  const door = facts.door?.trim();
  if (door === "401" || door === "403")
    throw new SettingError(
      `K3S_TOKEN is not valid: ${url} answers ${door}; "make server" writes the current token`,
    );
  if (door !== "200")
    throw new Refusal(
      `${url} does not accept this box: it answers ${door}; try again when it is healthy${facts.shut?.trim() ? ` (${facts.shut.trim()})` : ""}`,
    );
  const name = nodeNameOf("agent", want, facts);
  const [node] = [
    ...nodesOf(facts.taken),
    ...nodesOf(facts.registered).filter((other) => other.name === name),
  ];
  if (!node || facts.proof?.trim()) return;
  throw new Refusal(
    `The name ${name} is taken by a node of the cluster (${node.externalIp ?? "no public address"}): rename this box (hostnamectl set-hostname …), or add --node-name to AGENT_ARGS; if it is this box before it was reinstalled, run "make remove HOST=${want.HOST || "…"}" first`,
  );
}

/** @throws {Refusal} for a text with the right hash that is not a certificate. */
function certificate(text: string, url: string): X509Certificate {
  try {
    return new X509Certificate(text);
  } catch (error) {
    throw new Refusal(`${url}/cacerts is not a valid certificate: ${(error as Error).message}`);
  }
}

/** curl's errors for a port that does not answer, and where to look. */
function unreachable(url: string, error: string): string {
  const said = error.trim() || "no certificate received";
  const what = /No route to host|prohibited/i.test(error)
    ? "a firewall rejects it: open 6443/tcp in the server's firewall (make firewall) and security group"
    : /refused|Failed to connect.*(after|Couldn't)/.test(error) && !/timed? ?out/i.test(error)
      ? "nothing listens there: is k3s up on the server?"
      : /timed? ?out/i.test(error)
        ? "packets are dropped: open 6443/tcp in the server's security group and firewall"
        : /resolve/.test(error)
          ? "this box cannot resolve the name"
          : "is it a k3s server?";
  return `The server does not answer this box at ${url}/cacerts: ${what} (${said})`;
}

/** What a box needs before there is a server to join. */
export const prepareAs = (role: Role) => [
  systemdFirst,
  identityAs(role),
  foreignFirst(role),
  firewall,
  downloadK3s,
  upgradeKernel,
  installWireguard,
];

/** All steps from an empty box to an agent that every node can reach. */
export const agentSteps = [...prepareAs("agent"), agent, annotateAs("agent")];

const FROM_SERVER = 'what "make server" writes; run it first, or copy both lines into';

await main(import.meta, {
  about: "Makes a box a k3s agent: binary, kernel, WireGuard, unit. Waits until its node is Ready.",
  steps: agentSteps,
  flags: ALLOWED,
  needs: { K3S_URL: FROM_SERVER, K3S_TOKEN: FROM_SERVER },
  nothing: (want, facts) => healthyMessage("agent", want, facts),
  elsewhere: ({ K3S_URL }) => [
    { name: "the server (K3S_URL)", ip: /^https:\/\/([\w.-]+)/.exec(K3S_URL)?.[1] ?? "" },
  ],
  others: neighbours,
  causes,
});

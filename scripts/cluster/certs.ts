#!/usr/bin/env -S node --import tsx
/**
 * Renews the certificates of k3s where they end within 90 days, by a restart of k3s: one node at a time, servers first,
 * since in old k3s agents get copies of some of the server's. The first failure ends it.
 */
import { boxes } from "../../lib/boxes.ts";
import { causes } from "../../lib/check/causes.ts";
import { look } from "../../lib/converge.ts";
import { attempt, bring, each, showLater, worst } from "../../lib/fleet.ts";
import {
  type Certificate,
  certificatesIn,
  certificatesLook,
  DUE,
  DYNAMIC,
  dateOf,
  daysTo,
  ending,
  endingIn,
  firstOf,
} from "../../lib/k3s/certificates.ts";
import { nodeNameOf } from "../../lib/k3s/identity.ts";
import { clusterLook } from "../../lib/k3s/nodes.ts";
import { compare } from "../../lib/k3s/releases.ts";
import { main } from "../../lib/k3s/script.ts";
import { restart } from "../../lib/k3s/service.ts";
import { binaryLook, generationOf, K3S, nameLook, type Role, unitOf } from "../../lib/k3s/unit.ts";
import { watch } from "../../lib/report.ts";
import type { Box, Run } from "../../lib/script.ts";
import { raw, sh, waitUntil } from "../../lib/sh.ts";
import { type Change, type Facts, prints, Refusal, step } from "../../lib/step.ts";
import { annotateAs } from "../annotate.ts";
import { accessEnd, mergeFrom } from "./kubeconfig.ts";

const isDynamic = ({ file }: Certificate) => DYNAMIC.endsWith(file);

/** The first release whose start renews the certificate of 6443: dynamiclistener v0.2.1. */
const RENEWS_ALL = "v1.19.1+k3s1";

/** Renews what is due on a box of this role. */
export const certsAs = (role: Role) =>
  step({
    name: "certs",
    options: ["SERVER", "PUBLIC_IP"],

    look: () => [
      binaryLook,
      nameLook,
      ...clusterLook,
      certificatesLook,
      prints("active")(sh`fact active; systemctl is-active ${unitOf(role)} 2>/dev/null`),
    ],

    plan(want, facts): Change[] {
      const { own } = certificatesIn(facts);
      if (!own.length || !/^activ/.test(facts.active ?? ""))
        throw new Refusal(
          `No k3s ${role} runs on this box: make ${role === "server" ? role : `agent HOST=${want.HOST || "…"}`}`,
        );
      const now = Number(facts.now);
      const due = endingIn(DUE, own, now);
      // Removed by an interrupted run, or by hand: k3s serves what it has in memory until its next start.
      const lost = role === "server" && !own.some(isDynamic);
      if (!due.length && !lost) return [];
      const version = facts.version?.trim() ?? "";
      const name = nodeNameOf(role, want, facts);
      const generation = generationOf(version, facts.flags) ?? "modern";
      const dynamic = due.some(isDynamic);
      const kept = dynamic && compare(version, RENEWS_ALL) < 0;
      const start = restart(role, generation, name, want, kept ? { gone: [DYNAMIC] } : {});
      const ends = firstOf(due)?.ends;
      return [
        ...(kept ? [FORGET] : []),
        {
          ...start,
          why: `${start.why}${ends ? `: its certificates ${ending(ends, now)}` : ""}`,
          // Renewed in the background, by v1.19 half a minute after its start.
          sh:
            dynamic && !kept
              ? sh`was=$(sha256sum <${DYNAMIC})
${raw(start.sh)}
${raw(
  waitUntil(
    90,
    sh`[ "$(sha256sum <${DYNAMIC})" != "$was" ]`,
    "echo 'k3s has not renewed the certificate of 6443'",
  ),
)}`
              : start.sh,
          seconds: (start.seconds ?? 0) + 90,
        },
      ];
    },
  });

/**
 * Up to v1.18 a start takes the certificate of 6443 from the secret k3s-serving, whatever its end: deleted before the
 * start, it is made anew. Once it has ended kubectl needs the other way in, 6444, whose certificate a start renews.
 */
const FORGET: Change = {
  why: "delete the secret k3s-serving, from which this release would take the certificate of 6443 again",
  sh: sh`forget() {
  timeout 20 ${K3S} kubectl --kubeconfig /var/lib/rancher/k3s/server/cred/admin.kubeconfig --request-timeout=10s \
    -n kube-system delete secret k3s-serving --ignore-not-found
}
forget 2>/dev/null || {
  systemctl restart --no-block k3s
  ${raw(waitUntil(120, "forget 2>/dev/null", "forget"))}
}`,
  seconds: 180,
};

/** When the box's certificates end, and from when on they are due. */
function nextOf(facts: Facts<"certificates">): string {
  const ends = firstOf(certificatesIn(facts).own)?.ends ?? 0;
  return `its certificates end on ${dateOf(ends)}; make certs renews them from ${dateOf(ends - DUE * 86_400)} on`;
}

async function certs(run: Run): Promise<number> {
  const servers = await boxes(run, "SERVER");
  const all = [...servers, ...(await boxes(run, "AGENTS"))];
  const roleOf = (box: Box): Role => (servers.includes(box) ? "server" : "agent");
  await watch(all);
  // A box that is off keeps none of the others from being renewed.
  const looked = await each(run, all, async (box) => {
    await look(box, [certsAs(roleOf(box))]);
  });
  for (const box of all.filter((_, i) => looked[i] === 0)) {
    const status = await attempt(run, box, async () => {
      const steps = [certsAs(roleOf(box)), annotateAs(roleOf(box))];
      const now = await bring(run, box, steps);
      if (now) box.line.done(now.nothing, nextOf(now.facts));
    });
    if (status !== 0) return status;
  }
  const [server] = servers as [Box];
  const access = accessEnd(server.ip);
  const due = access && daysTo(access.ends, Date.now() / 1000) <= DUE;
  if (!due || looked[0] !== 0) return worst(looked);
  if (run.mode !== "apply") {
    showLater(run, `make kubeconfig, for its context ${access.context}`);
    return worst(looked);
  }
  const merged = await attempt(run, server, async () => {
    const { path } = await mergeFrom(server);
    server.line.says(`context ${access.context} in ${path} has the renewed certificate`);
  });
  return worst([...looked, merged]);
}

await main(import.meta, {
  about:
    "Renews k3s's certificates that end within 90 days: restarts k3s on one node at a time, servers first, and verifies it. Nothing to do otherwise.",
  steps: [certsAs("server"), annotateAs("server")],
  everyBox: "one at a time, skipping those whose certificates last",
  work: certs,
  causes,
});

#!/usr/bin/env -S node --import tsx
/** Takes boxes out of the cluster: pods go elsewhere, k3s goes from the box, and the cluster forgets its node. */
import { Unreachable } from "../lib/box.ts";
import * as cli from "../lib/cli.ts";
import { drain } from "../lib/drain.ts";
import { closeAgain, closeLook } from "../lib/firewall.ts";
import { binaryLook, clusterLook, KUBECTL, type Node, nodeNameOf, nodesOf, unitPath } from "../lib/k3s.ts";
import { CLEAR, CLEAR_LOOK } from "../lib/leftovers.ts";
import { rangesOf } from "../lib/node.ts";
import { report } from "../lib/report.ts";
import { SettingError } from "../lib/settings.ts";
import { sh } from "../lib/sh.ts";
import {
  type Change,
  converge,
  type Facts,
  Failure,
  type Job,
  look,
  Refusal,
  type Step,
} from "../lib/step.ts";

const UNITS = [unitPath("server"), unitPath("agent")];
const FILES = [
  ...["/var/lib/rancher/k3s", "/var/lib/kubelet", "/var/lib/cni", "/run/k3s", "/run/flannel"],
  ...["/var/log/pods", "/var/log/containers", "/etc/rancher/k3s", "/etc/rancher/node"],
  ...["/usr/local/bin/k3s", "/usr/local/bin/.k3s*"],
];
const LINKS = ["kubectl", "crictl", "ctr"].map((name) => `/usr/local/bin/${name}`);

/** k3s goes from a box, with all that it made there; packages and the kernel stay. */
export const uninstall: Step = {
  name: "remove",
  options: ["HOST", "SERVER", "PUBLIC_IP", "SERVER_ARGS"],

  look: (want) => [
    `fact left
for path in ${[...UNITS, ...UNITS.map((unit) => `${unit}.env`), ...FILES].join(" ")}; do
  # An empty folder may be a mount of its own.
  if [ -f "$path" ] || [ -L "$path" ] || [ -n "$(ls -A "$path" 2>/dev/null)" ]; then echo "$path"; fi
done
for path in ${LINKS.join(" ")}; do
  [ "$(readlink "$path")" != k3s ] || echo "$path"
done
${CLEAR_LOOK}
${closeLook(rangesOf(want))}
fact volumes; ls -A /var/lib/rancher/k3s/storage 2>/dev/null
fact running; for unit in k3s k3s-agent; do systemctl is-active -q $unit 2>/dev/null && echo $unit; done`,
  ],

  plan(want, facts): Change[] {
    const left = [...new Set((facts.left ?? "").split("\n").filter(Boolean))];
    if (left.length === 0) return [];
    const volumes = (facts.volumes ?? "").split("\n").filter(Boolean).length;
    const running = (facts.running ?? "").split("\n").filter(Boolean);
    return [
      {
        why: `${running.length ? `stop ${running.join(", ")}, and ` : ""}clear pods, mounts, interfaces and rules of k3s`,
        sh: `for unit in ${UNITS.join(" ")}; do
  [ -e "$unit" ] || continue
  name=\${unit##*/}
  systemctl disable "$name" >/dev/null 2>&1 || :
  # A stopped v1.17 ends as failed.
  timeout 60 systemctl stop "$name" || systemctl kill -s KILL "$name"
done
${CLEAR}`,
        seconds: 180,
      },
      ...(left.includes("firewall")
        ? [
            {
              why: "take the cluster's rules out of the firewall",
              sh: closeAgain(rangesOf(want)),
              seconds: 300,
            },
          ]
        : []),
      {
        why: `remove k3s's units, binary and data${volumes ? `, with ${volumes} local volumes of pods` : ""}`,
        // The units go last: what is cut before is begun anew, and they know which address is theirs on lo. One that has
        // gone is nothing to do: systemd must not remember it as failed by then.
        sh: `ip=$(sed -n 's/^ExecStartPre=.*ip addr replace \\([0-9.]*\\/32\\) dev lo.*/\\1/p' ${UNITS.join(" ")} 2>/dev/null || :)
[ -z "$ip" ] || ip addr del "$ip" dev lo 2>/dev/null || :
for path in ${LINKS.join(" ")}; do
  [ "$(readlink "$path")" != k3s ] || rm -f "$path"
done
for path in ${FILES.join(" ")}; do
  # What is a mount of its own is emptied, and stays; nothing else that is mounted in there is touched.
  rm -rf --one-file-system "$path" 2>/dev/null || [ -z "$(ls -A "$path")" ] || { echo "Could not remove $path"; exit 1; }
done
rmdir /etc/rancher /var/lib/rancher 2>/dev/null || :
systemctl reset-failed k3s k3s-agent 2>/dev/null || :
rm -f ${UNITS.map((unit) => `${unit} ${unit}.env`).join(" ")}
systemctl daemon-reload`,
        seconds: 300,
      },
    ];
  },
};

/** The cluster's node of a box, by its public address: another box may have its name. */
const nodeAt = (ip: string, facts: Facts): Node | undefined =>
  nodesOf(facts.nodes).find((n) => n.externalIp === ip || n.internalIp === ip);

/** What the server is asked and does about a box that goes; `own` is the name it would join by, where it answers. */
export function atServer(ip: string, own: string | undefined, force: boolean) {
  const passwords = "/var/lib/rancher/k3s/server/cred/node-passwd";
  const looks = () => [
    binaryLook,
    clusterLook,
    `fact secrets; kc -n kube-system get secrets -o name 2>/dev/null | sed -n 's/^secret\\/\\(.*\\)\\.node-password\\.k3s$/\\1/p'
fact passwords; cut -d, -f2 ${passwords} 2>/dev/null`,
  ];
  const lines = (text = "") => text.split("\n").filter(Boolean);
  /** An API that does not answer has no nodes: nothing must be concluded from that. */
  const answered = (facts: Facts) => {
    if (nodesOf(facts.nodes).length === 0)
      throw new Refusal("The server's API does not answer: make server mends it");
  };
  const drained: Step = {
    name: "drain",
    options: [],
    look: looks,
    plan(_want, facts) {
      answered(facts);
      const node = nodeAt(ip, facts);
      return node ? drain(node, facts, force) : [];
    },
  };
  const forgotten: Step = {
    name: "forget",
    options: [],
    look: looks,
    plan(_want, facts): Change[] {
      answered(facts);
      const node = nodeAt(ip, facts);
      const taken = nodesOf(facts.nodes).some((n) => n.name === own);
      // Of a node that is gone its password may be left, in a file up to v1.19: whoever comes by its name is rejected.
      const name = node?.name ?? (taken ? undefined : own);
      if (!name) return [];
      return [
        ...(node
          ? [
              {
                why: `delete node ${name}`,
                sh: `${KUBECTL}\nkc delete node ${sh(name)} --ignore-not-found`,
              },
            ]
          : []),
        ...(lines(facts.secrets).includes(name)
          ? [
              {
                why: `delete the password secret of ${name}`,
                sh: `${KUBECTL}\nkc -n kube-system delete secret ${sh(`${name}.node-password.k3s`)} --ignore-not-found`,
              },
            ]
          : []),
        ...(lines(facts.passwords).includes(name)
          ? [
              {
                why: `delete the password of ${name}`,
                sh: `(umask 077; awk -F, -v name=${sh(name)} '$2 != name' ${passwords} >${passwords}.new)
mv -f ${passwords}.new ${passwords}`,
              },
            ]
          : []),
      ];
    },
  };
  return { drained, forgotten };
}

async function remove(call: cli.Call): Promise<number> {
  const { settings, origins } = call;
  if (origins.HOST === "default")
    throw new SettingError(`HOST is not set: expected the box to remove, some of ${settings.AGENTS}`);
  const boxes = await cli.targets(call, "HOST");
  const servers = await cli.targets({ ...call, settings: { ...settings, PUBLIC_IP: "" } }, "SERVER");
  const [server] = servers as [cli.Target];
  if (boxes.some((box) => box.host === server.host || box.ip === server.ip))
    throw new SettingError(
      `HOST names the ${servers.length > 1 ? "first " : ""}server, ${server.name}: "make down" removes a whole cluster`,
    );
  const ui = await report(boxes.map((box) => box.name));
  const statuses = [];
  // One after the other: pods of the first may go to the second.
  for (const box of boxes)
    statuses.push(
      await cli.attempt(call, call.script, box, ui.line(box.name), (line) => one(call, servers, box, line)),
    );
  return cli.worst(statuses);
}

async function one(
  call: cli.Call,
  servers: readonly cli.Target[],
  box: cli.Target,
  line: Parameters<typeof cli.jobFor>[2],
) {
  const [server] = servers as [cli.Target];
  const job = cli.jobFor(call, box, line);
  const atTheServer = cli.jobFor(call, server, line);
  const force = call.flags.has("force");
  let facts: Facts | undefined;
  try {
    facts = await look(job, [uninstall]);
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    if (!force)
      throw new Failure(`${error.message}; if the box is gone for good, FORCE=1 removes its node alone`);
    line.says(`${error.message}: its node is removed all the same`);
  }
  const { SERVER_ARGS, AGENT_ARGS } = job.want;
  const isServer = servers.some((other) => other.host === box.host);
  const name = facts && nodeNameOf(isServer ? SERVER_ARGS : AGENT_ARGS, facts);
  const { drained, forgotten } = atServer(box.ip, name, force);
  const parts: [cli.Target, Job, Step, Facts][] = [];
  const cluster = await look(atTheServer, [drained]);
  parts.push([server, atTheServer, drained, cluster]);
  if (facts) parts.push([box, job, uninstall, facts]);
  parts.push([server, atTheServer, forgotten, cluster]);
  let nothing = true;
  for (const [target, job, step, facts] of parts) {
    if (call.mode !== "apply") cli.showPlan(call, target, [step], job, facts);
    else nothing = (await converge(job, [step], facts)) === facts && nothing;
  }
  if (call.mode === "apply")
    line.done(nothing, nothing ? "the box has no k3s, the cluster no such node" : "");
}

await cli.run(import.meta, {
  about:
    "Removes boxes from the cluster: drains, uninstalls, and has the cluster forget them. HOST says which.",
  steps: [uninstall],
  flags: { force: "delete pods that no controller starts anew; remove the node of a box that is gone" },
  work: remove,
});

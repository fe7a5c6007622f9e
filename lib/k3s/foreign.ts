/** Obstacles for k3s on a box: ports used by other programs, and config files that this project did not write. */

import { check, SettingError, type Settings } from "../settings.ts";
import { sh } from "../sh.ts";
import { type Facts, type Look, prints, Refusal, type Step } from "../step.ts";
import { boxNames } from "../text.ts";
import { configArgs, wrongIn } from "./args.ts";
import { CONFIG, rangesOf } from "./config.ts";
import { nodeNameOf } from "./identity.ts";
import { nameLook, type Role, releaseOf, shownLook } from "./unit.ts";

const FOLDER = "/etc/rancher/k3s";

/** Checked before anything is changed: k3s would exit, or follow config files of others. */
export const foreignFirst = (role: Role): Step<"ports" | "configs" | "token"> => ({
  name: "foreign",
  options: [],
  look: () => [shownLook, nameLook, portsLook, configsLook()],
  plan(want, facts) {
    portsFree(role, want, facts);
    // A server that exists already has had its token from the start.
    const token = role === "server" && facts.token?.replace(/\n+$/, "");
    if (token) check("K3S_TOKEN", token, "this server's own");
    const wrong = wrongIn(role, configIn("K3S_CONFIG", want.K3S_CONFIG));
    if (wrong)
      throw new SettingError(
        `K3S_CONFIG of this box has ${wrong}; give the file to servers alone, K3S_CONFIG__${boxNames(want.SERVER)[0] ?? "BOX"}=…, or leave the key out`,
      );
    // Read since v1.19 (k3s-io/k3s#1505).
    if (Number(releaseOf(want, facts).version.split(".")[1]) < 19) return [];
    for (const [path, text] of configsIn(facts)) {
      const own = configIn(`${path} on this box`, text).filter(
        ({ flag, value }) =>
          !/^node-(label|taint)$/.test(flag) &&
          !(flag === "node-name" && value?.toLowerCase() === nodeNameOf(role, want, facts)) &&
          !(role === "server" && /^(token|t)$/.test(flag)),
      );
      const key = wrongIn(role, own);
      if (key)
        throw new Refusal(
          `${path} on this box, which k3s reads too, has ${key}; take the key out, or move the file away`,
        );
    }
    return [];
  },
});

/** @throws {Refusal} for a file that k3s could not read either. */
function configIn(path: string, text: string): ReturnType<typeof configArgs> {
  try {
    return configArgs(text);
  } catch (error) {
    throw new Refusal(
      `${path} is no config file that k3s can read: ${(error as Error).message}; mend it, or move it away`,
    );
  }
}

/** Config files of others, in base64: they may contain secrets, or anything else. */
export const configsLook = (folder = FOLDER): Look<"configs"> =>
  prints("configs")(sh`fact configs; for f in ${folder}/config.yaml ${folder}/config.yaml.d/*; do
  case $f in ${CONFIG.replace(FOLDER, folder)}) continue ;; *.[yY][mM][lL] | *.[yY][aA][mM][lL]) ;; *) continue ;; esac
  [ ! -f "$f" ] || printf '%s %s\n' "$(head -c 65536 "$f" | base64 | tr -d '\n')" "$f"
done
`);

const configsIn = (facts: Facts<"configs">): [path: string, text: string][] =>
  (facts.configs ?? "").split("\n").flatMap((line) => {
    const [, text = "", path = ""] = /^(\S*) (\/.*)$/.exec(line) ?? [];
    return path ? [[path, Buffer.from(text, "base64").toString()]] : [];
  });

/** The arguments in them. @throws {Refusal} for a file that k3s could not read. */
export const foreignArgs = (facts: Facts): ReturnType<typeof configArgs> =>
  configsIn(facts).flatMap(([path, text]) => configIn(`${path} on this box`, text));

/**
 * Who uses k3s's ports, one per line: protocol, port, and an interface or a process with its name; without k3s's own
 * processes and WireGuard interfaces. A k3s that ends while it is looked at, as its unit starts it again, may pass for
 * another program (ss reads sockets first, then processes), so what is found has to be found again a second later.
 */
export const portsLook = prints(
  "ports",
)(sh`port_users() { ss -lntup 2>/dev/null | awk '$5 ~ /:(51820|51821|6443|10250)$/ {
  port = $5; sub(/.*:/, "", port); name = pid = ""
  if (match($0, /users:\(\("[^"]*",/)) name = substr($0, RSTART + 9, RLENGTH - 11)
  if (match($0, /pid=[0-9]+/)) pid = substr($0, RSTART + 4, RLENGTH - 4)
  print $1, port, pid ? pid : "-", name
}' | sort -u | while read -r protocol port pid name; do
  ! grep -qsE '/k3s(-agent)?\.service' "/proc/$pid/cgroup" || continue
  if [ "$protocol" = udp ]; then
    link=$(wg show all listen-port 2>/dev/null | awk -v port="$port" '$2 == port { print $1 }' | head -n 1)
    # Without wg: the kernel's own socket is of one of its WireGuard interfaces.
    [ -n "$link" ] || [ "$pid" != - ] || link=$(ip -o link show type wireguard 2>/dev/null | awk -F': ' '{ print $2 }' | sort | head -n 1)
    case $link in flannel*) continue ;; ?*) pid=- name=$link ;; esac
  fi
  echo "$protocol $port $pid $name"
done; }
# Of a k3s that is up they are its own. One that cannot have them is up as well for some seconds, and is started again
# and again (systemd 235 and later count that).
used=
for of in "$server_unit" "$agent_unit"; do
  property "$of" NRestarts; case "$value $of" in '0 '*ActiveState=active*) used=own ;; esac
done
[ -n "$used" ] || used=$(port_users)
fact ports; [ -z "$used" ] || [ "$used" = own ] || { sleep 1; port_users | grep -Fx "$used"; }
`);

/** @throws {Refusal} naming the program that uses a port which this role needs. */
function portsFree(role: Role, want: Settings, facts: Facts<"ports">): void {
  const needed = ["udp 51820", "tcp 10250"];
  if (role === "server") needed.push("tcp 6443");
  if (rangesOf(want)[0].includes(":")) needed.push("udp 51821");
  for (const line of (facts.ports ?? "").split("\n")) {
    const [, protocol, port, pid, said = ""] = /^(udp|tcp) (\d+) (-|\d+) ?(.*)$/.exec(line) ?? [];
    if (!needed.includes(`${protocol} ${port}`)) continue;
    const name = /^[\w.:@+-]{1,40}$/.test(said) ? said : "";
    const [who, way] =
      pid !== "-"
        ? [`${name || "a program"} (process ${pid})`, "stop it for good, or give it another port"]
        : protocol === "udp" && name
          ? [
              `its interface ${name}`,
              `take that down, or give it another port: wg set ${name} listen-port 51830, and the same in its configuration`,
            ]
          : ["something that does not show (ss -lntup)", "stop it for good, or give it another port"];
    throw new Refusal(
      `${port}/${protocol} on this box, which k3s needs${protocol === "udp" ? " for WireGuard" : ""}, is taken by ${who}: ${way}`,
    );
  }
}

/** What keeps a node without a public address in touch with the others: a unit of its own on the box. */
import { raw, sh, writeFile } from "../sh.ts";
import { type Change, type Facts, prints, Refusal } from "../step.ts";
import { PRIVATE_RANGES } from "../table.ts";
import { FRESH } from "./nodes.ts";
import { shownLook, unitPath, WRITTEN_BY } from "./unit.ts";

export const KEEPALIVE = "/etc/systemd/system/k3s-keepalive.service";
export const KEEPALIVE_BIN = "/usr/local/bin/k3s-keepalive";

/**
 * The program: every three seconds it sends each node a datagram, and routes the pod networks of nodes that it cannot
 * reach, since they are behind another NAT, by way of a node with a public address.
 *
 * The datagrams: when a node has lost its WireGuard session, as by a restart of k3s, or a router its mapping, only data
 * without an answer make this side shake hands anew, after 15 s. flannel's keepalives do not: 83 to 114 s without
 * (v1.36.3). bash sends them without starting a program.
 *
 * The relay: both ends have to choose the same node, so it is the one with the lowest pod network of those with a fresh
 * handshake. WireGuard has a network at one peer only: `wg set` takes it from the peer whose it is, which keeps its
 * keepalive and so still shakes hands once it can. flannel gives it back at that node's next event, and this takes it
 * again. Whose network is where is kept in /run.
 *
 * The address: a node that was deleted joins anew at the next start of k3s, with another pod network, and k3s accepts the
 * unit's old address without a word (both generations, seen). After half a minute of that the unit gets the new one, once.
 */
export const keepaliveText = (name: string, memory = "/run/k3s-keepalive"): string => sh`#!/bin/bash
${raw(WRITTEN_BY)}
export LC_ALL=C
wrong=0; tried=
while sleep 3; do
  FLANNEL_SUBNET=
  # shellcheck disable=SC1091
  . /run/flannel/subnet.env
  ip=\${FLANNEL_SUBNET%/*}; ip=\${ip%.*}.$((\${ip##*.} - 1))
  if [[ $FLANNEL_SUBNET && $(<${unitPath("agent")}) =~ --node-ip=([0-9.]+) && \${BASH_REMATCH[1]} != "$ip" && $tried != "$ip" ]]; then
    wrong=$((wrong + 1))
  else
    wrong=0
  fi
  if [ "$wrong" = 10 ]; then
    tried=$ip
    sed -i "s/--node-ip=\${BASH_REMATCH[1]} /--node-ip=$ip /; s/ \${BASH_REMATCH[1]}\/32 / $ip\/32 /" ${unitPath("agent")}
    systemctl daemon-reload
    systemctl restart --no-block k3s-agent
  fi
  wg show ${name} dump 2>/dev/null | awk -F '\t' -v now="$(date +%s)" -v memory=${memory} '
    BEGIN { while ((getline line <memory) > 0) { split(line, of, " "); moved[of[1]] = of[2]; taken[of[2]] }; close(memory) }
    NR > 1 {
      peers[++n] = key = $1; at[key] = $4; fresh[key] = $5 > now - ${FRESH}
      hidden[key] = $3 !~ /^[0-9]/ || $3 ~ /${raw(PRIVATE_RANGES)}/
      if ($4 != "(none)" && $4 !~ /,/) { own[key] = $4; held[$4] }
    }
    END {
      for (i = 1; i <= n; i++) {
        key = peers[i]; free = 0
        if (at[key] == "(none)" && key in moved && !(moved[key] in held)) own[key] = moved[key]
        if (at[key] ~ /,/) {
          for (j = split(at[key], net, ","); j; j--) if (!(net[j] in taken)) { free++; own[key] = net[j] }
          # Not known which is its own: it is left alone.
          if (free != 1) delete own[key]
        }
        if (key in own && !hidden[key] && fresh[key] && (relay == "" || own[key] < own[relay])) relay = key
      }
      printf "" >memory
      list = own[relay]; nets = 1
      for (i = 1; i <= n; i++) {
        key = peers[i]
        if (!(key in own)) continue
        to = own[key]; sub(/\/.*/, "", to); print "send", to
        if (!hidden[key]) continue
        if (fresh[key]) { if (at[key] == "(none)") print "set", key, own[key] }
        else {
          print key, own[key] >memory
          list = list "," own[key]; nets++
          if (!index("," at[relay] ",", "," own[key] ",")) new = 1
        }
      }
      if (relay != "" && (new || split(at[relay], net, ",") != nets)) print "set", relay, list
    }' | while read -r what to nets; do
    case $what in
      set) wg set ${name} peer "$to" allowed-ips "$nets" ;;
      send) echo >"/dev/udp/$to/9" ;;
    esac
  done
done 2>/dev/null
`;

/** Without After=k3s-agent.service: the start of that may never end, and this one would wait for it. */
const UNIT = `${WRITTEN_BY}
[Unit]
Description=What keeps this k3s node, which has no public address, in touch with the others

[Service]
ExecStart=${KEEPALIVE_BIN}
Restart=always

[Install]
WantedBy=multi-user.target
`;

/** The fact `keepalive`: the program, the unit and its state. */
export const keepaliveLook = [
  shownLook,
  prints("keepalive")(sh`fact keepalive; if [ -e ${KEEPALIVE} ]; then
  cat ${KEEPALIVE_BIN} ${KEEPALIVE} 2>/dev/null; property "$(show k3s-keepalive)" ActiveState; echo "$value"
fi`),
] as const;

/** The change that has it run for flannel's interface of this name, or removes it. */
export function keptAlive(name: string | undefined, facts: Facts<"keepalive">): Change[] {
  const text = name && keepaliveText(name);
  const had = facts.keepalive?.trim() ?? "";
  if (had === (text ? `${text}${UNIT}active` : "")) return [];
  const foreign = had && !had.split("\n").includes(WRITTEN_BY);
  if (foreign && text)
    throw new Refusal(`${KEEPALIVE} on this box was not written by this project: give it another name`);
  if (foreign) return [];
  if (!text)
    return [
      {
        why: `remove ${KEEPALIVE}: this node has a public address`,
        sh: sh`systemctl disable --now k3s-keepalive >/dev/null 2>&1 || :
rm -f ${KEEPALIVE} ${KEEPALIVE_BIN}
systemctl daemon-reload`,
      },
    ];
  return [
    {
      why: `write ${KEEPALIVE} and start it: this node sends to the others, which know no address of it`,
      sh: sh`[ -x /bin/bash ] || { echo '/bin/bash is missing, by which it sends: install bash'; exit 1; }
${raw(writeFile(KEEPALIVE_BIN, text, "755"))}
${raw(writeFile(KEEPALIVE, UNIT))}
systemctl daemon-reload
systemctl enable k3s-keepalive >/dev/null 2>&1
systemctl restart k3s-keepalive`,
    },
  ];
}

#!/bin/bash
# The article by hand: one ssh a command, a box after the other, and nothing left out on a second run.
#
#   by-hand.sh DOWNLOAD-BASE VERSION SERVER=IP AGENT=IP…
set -eu
base=$1 version=$2 server=${3%%=*} server_ip=${3#*=}
shift 3
# shellcheck source=test/bench/box.sh
. "$(dirname "$0")/box.sh"

prepare() { # BOX
	ssh "$1" "$(download "$base" "$version")"
	ssh "$1" 'ln -sfn k3s /usr/local/bin/kubectl'
	ssh "$1" 'uname -r' >/dev/null
	ssh "$1" 'wg --version' >/dev/null
}

prepare "$server"
ssh "$server" "$(server_unit "$server_ip")"
ssh "$server" 'systemctl enable -q --now k3s'
ssh "$server" "$READY" >/dev/null
token=$(ssh "$server" "$TOKEN")
for agent; do
	box=${agent%%=*}
	prepare "$box"
	ssh "$box" "$(agent_unit "${agent#*=}")"
	ssh "$box" "$(agent_env "$server_ip" "$token")"
	ssh "$box" 'systemctl enable -q --now k3s-agent'
	ssh "$server" 'kubectl get nodes' >/dev/null
	ssh "$box" 'wg show flannel-wg' >/dev/null
done
ssh "$server" "$ANSWERED $(($# + 1)) ]; do sleep 1; done" >/dev/null

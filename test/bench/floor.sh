#!/bin/bash
# The floor: one connection a box, three remote commands, all boxes at once; it ends when `kubectl top` answers for
# every node. Nothing is checked, nothing explained, and nothing would be mended.
#
#   floor.sh DOWNLOAD-BASE VERSION SERVER=IP AGENT=IP…
set -eu
base=$1 version=$2 server=${3%%=*} server_ip=${3#*=}
shift 3
# shellcheck source=test/bench/box.sh
. "$(dirname "$0")/box.sh"
dir=$(mktemp -d)
boxes=$(($# + 1))

on() { # BOX COMMANDS
	ssh -o ControlMaster=auto -o ControlPath="$dir/%C" -o ControlPersist=60 "$1" "set -eu; $2"
}

serve() {
	on "$server" "$(download "$base" "$version")"
	on "$server" "$(start_server "$server_ip")
$TOKEN" >"$dir/token.new"
	mv "$dir/token.new" "$dir/token"
	on "$server" "$ANSWERED $boxes ]; do sleep 1; done" >/dev/null
}

join() { # AGENT IP
	on "$1" "$(download "$base" "$version")"
	until [ -e "$dir/token" ]; do sleep 0.05; done
	on "$1" "$(start_agent "$2" "$server_ip" "$(cat "$dir/token")")"
	on "$1" 'wg show flannel-wg' >/dev/null
}

serve &
jobs=$!
for agent; do
	join "${agent%%=*}" "${agent#*=}" &
	jobs="$jobs $!"
done
status=0
for job in $jobs; do wait "$job" || status=$?; done
for box in "$server" "${@%%=*}"; do ssh -o ControlPath="$dir/%C" -O exit "$box" 2>/dev/null || :; done
rm -rf "$dir"
exit $status

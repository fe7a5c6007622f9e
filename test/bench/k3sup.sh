#!/bin/bash
# k3sup, as its users call it, with some joins at once; with 0 as `k3sup plan --background` has it: all at once, by a
# token that was asked for before. K3SUP is its binary.
#
#   k3sup.sh AT-ONCE DOWNLOAD-BASE VERSION SERVER=IP AGENT=IP…
set -eu
at_once=$1 version=$3 server_ip=${4#*=}
shift 4
# As in box.sh.
v1=--kubelet-arg=fail-cgroupv1=false
login="--user root --ssh-key $HOME/.ssh/id_ed25519"
common="$login --k3s-version $version"
# shellcheck disable=SC2086
"$K3SUP" install $common --ip "$server_ip" --local-path /run/kubeconfig --k3s-extra-args \
	"--node-ip=$server_ip --node-external-ip=$server_ip --disable=servicelb --flannel-backend=wireguard-native --flannel-external-ip $v1"
token=
# shellcheck disable=SC2086
[ "$at_once" != 0 ] || token="--node-token $("$K3SUP" node-token $login --ip "$server_ip")"
for agent; do echo "${agent#*=}"; done | xargs -P "$at_once" -I IP sh -c \
	"exec '$K3SUP' join $common --ip IP --server-ip $server_ip $token --k3s-extra-args '--node-ip=IP --node-external-ip=IP $v1'"

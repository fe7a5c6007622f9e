# What floor.sh and by-hand.sh have run on a box: the article's commands, as a modern k3s wants them.
# shellcheck shell=bash disable=SC2034

TOKEN='cat /var/lib/rancher/k3s/server/node-token'
READY='until k3s kubectl get node "$(uname -n)" 2>/dev/null | grep " Ready "; do sleep 1; done'
# With the number of nodes and the rest of the loop behind it.
ANSWERED='until [ "$(k3s kubectl top nodes --no-headers 2>/dev/null | grep -c %)" -ge'

download() { # BASE VERSION
	echo "[ -x /usr/local/bin/k3s ] || { curl -fsS -o /usr/local/bin/k3s '$1/$2/k3s' && chmod 755 /usr/local/bin/k3s; }"
}

unit() { # NAME ADDRESS ARGUMENT…
	local name=$1 address=$2
	shift 2
	# From v1.35 on the kubelet refuses cgroup v1 otherwise, which this machine may have.
	set -- "$@" --kubelet-arg=fail-cgroupv1=false
	echo "cat >/etc/systemd/system/$name.service <<'UNIT'
[Unit]
Description=Lightweight Kubernetes
Wants=network-online.target
[Install]
WantedBy=multi-user.target
[Service]
Type=notify
EnvironmentFile=-/etc/systemd/system/$name.service.env
KillMode=process
Delegate=yes
TimeoutStartSec=0
Restart=always
RestartSec=5s
ExecStartPre=/bin/sh -c 'ip addr replace $address/32 dev lo'
ExecStart=/usr/local/bin/k3s $*
UNIT"
}

server_unit() { # ADDRESS
	unit k3s "$1" server "--tls-san=$1" "--node-ip=$1" "--node-external-ip=$1" --disable=servicelb \
		--flannel-backend=wireguard-native --flannel-external-ip
}

agent_unit() { # ADDRESS
	unit k3s-agent "$1" agent "--node-ip=$1" "--node-external-ip=$1"
}

agent_env() { # SERVER-ADDRESS TOKEN
	echo "printf 'K3S_URL=https://%s:6443\nK3S_TOKEN=%s\n' '$1' '$2' >/etc/systemd/system/k3s-agent.service.env"
}

start_server() { # ADDRESS
	server_unit "$1"
	echo 'systemctl enable -q --now k3s'
}

start_agent() { # ADDRESS SERVER-ADDRESS TOKEN
	agent_unit "$1"
	agent_env "$2" "$3"
	echo 'systemctl enable -q --now k3s-agent'
}

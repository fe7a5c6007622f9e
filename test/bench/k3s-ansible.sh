#!/bin/bash
# k3s-ansible's site.yml as its README has it, with a fork a box. K3S_ANSIBLE is a clone of it, of which a copy gets
# k3s's installation script from the mirror.
#
#   k3s-ansible.sh DOWNLOAD-BASE VERSION SERVER=IP AGENT=IP…
set -eu
base=$1 version=$2 server=${3%%=*} server_ip=${3#*=}
shift 3
copy=$HOME/k3s-ansible
if ! [ -e "$copy" ]; then
	cp -r "$K3S_ANSIBLE" "$copy"
	mirror=${base#*://}
	grep -rl 'https://get.k3s.io/' "$copy/roles" | xargs sed -i "s#https://get.k3s.io/#http://${mirror%%/*}/install.sh#"
fi
host() { # NAME IP
	echo "        $1: { ansible_host: $2, extra_args: '--node-ip=$2 --node-external-ip=$2 --kubelet-arg=fail-cgroupv1=false' }"
}
{
	printf 'k3s_cluster:\n  children:\n    server:\n      hosts:\n'
	host "$server" "$server_ip"
	printf '    agent:\n      hosts:\n'
	for agent; do host "${agent%%=*}" "${agent#*=}"; done
	cat <<-YAML
		  vars:
		    ansible_user: root
		    ansible_ssh_private_key_file: $HOME/.ssh/id_ed25519
		    ansible_python_interpreter: /usr/bin/python3
		    k3s_version: $version
		    token: "0123456789abcdef0123456789abcdef"
		    api_endpoint: $server_ip
		    extra_server_args: "{{ extra_args }} --disable=servicelb --flannel-backend=wireguard-native --flannel-external-ip"
		    extra_agent_args: "{{ extra_args }}"
	YAML
} >"$HOME/inventory.yml"
cd "$copy"
exec ansible-playbook --forks "$(($# + 1))" -i "$HOME/inventory.yml" playbooks/site.yml

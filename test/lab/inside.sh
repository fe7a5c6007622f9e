#!/bin/sh
# The shell side of the lab. Everything here but `hold` and `root` runs inside the namespaces that
# `hold` makes, so that ending that one process ends boxes, networks and mounts alike.
#
#   inside.sh COMMAND LAB DIR [ARGUMENT...]
#
# LAB is the lab's name and DIR its folder.
set -eu
command=$1 lab=$2 dir=$3
shift 3
here=$(cd "$(dirname "$0")" && pwd)

# --- namespaces -------------------------------------------------------------------------------

# A process is known by its id, its start time and the boot it belongs to: an id alone may have
# been given to a stranger by the time someone reads the file.
hold() {
	started=$(sed 's/.*) //' /proc/$$/stat | cut -d ' ' -f 20)
	echo "$$ $started $(cat /proc/sys/kernel/random/boot_id)" >"$dir/holder"
	exec unshare --mount --net --pid --uts --fork --kill-child --mount-proc \
		sh "$here/inside.sh" keep "$lab" "$dir" "$@"
}

keep() {
	# Resolvers and daemons of this machine listen on sockets in /run: out of sight, out of reach.
	resolv=$(readlink -f /etc/resolv.conf || echo /etc/resolv.conf)
	mount -t tmpfs -o mode=755 lab /run
	mkdir -p "$(dirname "$resolv")" /run/netns /run/lock /run/sshd
	[ -e "$resolv" ] || : >"$resolv"
	mount --bind "$dir/etc/resolv.conf" "$resolv"
	mount --bind "$dir/etc/hosts" /etc/hosts
	# ssh looks for the home of root in passwd, whatever HOME says.
	mount --bind "$dir/etc/passwd" /etc/passwd
	hostname operator

	ip link set lo up
	ip netns attach op $$
	ip netns add inet
	ip -n inet link set lo up
	ip -n inet link add br0 address 02:00:cb:00:71:00 type bridge
	ip -n inet link set br0 up
	for address in 80 81 82; do ip -n inet address add "203.0.113.$address/24" dev br0; done
	ip -n inet route add 198.51.100.0/22 dev br0
	[ "${1-}" != slow ] || slow_ports
	wire op eth0 op
	ip address add 203.0.113.254/24 dev eth0
	ip link set eth0 up
	ip route add 198.51.100.0/22 dev eth0
	cloud a 203.0.113.11
	cloud b 203.0.113.12

	: >"$dir/ready"
	# The first process of a PID namespace inherits the orphans: wait reaps them.
	while :; do
		sleep 3600 &
		wait
	done
}

# --- networks ---------------------------------------------------------------------------------

# wire NAMESPACE DEVICE PORT: a line into the internet. A port that is there already is a TAP of the switch.
wire() {
	if ip -n inet link show "$3" >/dev/null 2>&1; then
		ip -n inet link set "$3" netns "$1" name "$2"
	else
		ip -n "$1" link add "$2" type veth peer name "$3" netns inet
		ip -n inet link set "$3" master br0 up
	fi
}

# Where the kernel has no netem, the lines come from a switch of our own.
slow_ports() {
	! ip netns exec inet tc qdisc add dev lo root netem delay 0ms 2>/dev/null || return 0
	mkdir "$dir/lines"
	for port in op wan-a wan-b internet; do echo 0 0 >"$dir/lines/$port"; done
	# Its delays have to be right however busy the boxes are.
	nice -n -20 ip netns exec inet python3 "$here/switch.py" "$dir/lines" op wan-a wan-b internet &
	until ip -n inet link set internet master br0 up 2>/dev/null; do sleep 0.02; done
}

# inside.sh line LAB DIR a|b|op MS LOSS: how many milliseconds a packet takes on that line, either way, and
# the percentage of packets that it loses.
line() {
	case $1 in
	op) namespace=op device=eth0 port=op ;;
	*) namespace=router-$1 device=wan port=wan-$1 ;;
	esac
	if [ -d "$dir/lines" ]; then
		echo "$2 $3" >"$dir/lines/.$port"
		mv "$dir/lines/.$port" "$dir/lines/$port"
	else
		tc -n inet qdisc replace dev "$port" root netem delay "$2ms" loss "$3%" limit 10000
		tc -n "$namespace" qdisc replace dev "$device" root netem delay "$2ms" loss "$3%" limit 10000
	fi
}

# Between the internet and a LAN; its firewall on standard input.
router() {
	router=router-$1
	ip netns add "$router"
	ip -n "$router" link set lo up
	wire "$router" wan "wan-$1"
	# Its address must not follow its ports, or boxes would look for the old one until they ask again, for 8 s or more.
	ip -n "$router" link add lan address 02:00:c0:a8:00:01 type bridge
	ip -n "$router" address add 192.168.0.1/24 dev lan
	ip -n "$router" link set lan up
	# shellcheck disable=SC2016
	ip netns exec "$router" sh -c '
		echo 1 >/proc/sys/net/ipv4/ip_forward
		# Frames within the lan must not pass the firewall; without br_netfilter they never do.
		bridge=/proc/sys/net/bridge/bridge-nf-call-iptables
		[ ! -e $bridge ] || echo 0 >$bridge
		nft -f -'
}

cloud() {
	router "$1" <<-'NFT'
			table ip nat {
				map dnat4 { type ipv4_addr : ipv4_addr; }
				map snat4 { type ipv4_addr : ipv4_addr; }
				chain prerouting {
					type nat hook prerouting priority dstnat;
					dnat to ip daddr map @dnat4
				}
				chain postrouting {
					type nat hook postrouting priority srcnat;
					iifname "lan" oifname "lan" ct status dnat snat to ip saddr map @snat4
					oifname "wan" snat to ip saddr map @snat4
					oifname "wan" masquerade
				}
			}
			table ip filter {
				chain hairpin { }
				chain ports {
					icmp type echo-request accept
					tcp dport { 22, 80, 443, 6443, 10250 } accept
					udp dport 51820-51822 accept
				}
				chain forward {
					type filter hook forward priority filter; policy drop;
					ct state established,related accept
					iifname "lan" oifname "lan" jump hairpin
					iifname "lan" accept
					jump ports
				}
			}
		NFT
	ip -n "router-$1" address add "$2/24" dev wan
	ip -n "router-$1" link set wan up
	ip -n "router-$1" route add 198.51.100.0/22 dev wan
}

# inside.sh home LAB DIR HOME ADDRESS SYMMETRIC: a router as people have it at home. Only what was asked for from inside
# comes in, and ssh, for which each box has a port.
home() {
	router "$1" <<-'NFT'
			table ip nat {
				map ssh { type inet_service : ipv4_addr; }
				chain prerouting {
					type nat hook prerouting priority dstnat;
					iifname "wan" dnat to tcp dport map @ssh : 22
				}
				chain ports { }
				chain postrouting {
					type nat hook postrouting priority srcnat;
					oifname "wan" jump ports
				}
			}
			table ip filter {
				chain input {
					type filter hook input priority filter;
					iifname "wan" ct state new drop
				}
				chain forward {
					type filter hook forward priority filter; policy drop;
					tcp flags syn tcp option maxseg size set rt mtu
					ct state established,related accept
					ct status dnat accept
					iifname "lan" accept
				}
			}
		NFT
	symmetric "$1" "$3"
	dial "$1" "$2" 1500
}

# inside.sh symmetric LAB DIR HOME on|off: whether what a box sends to each peer gets a port of its own outside, or, as
# far as it is free, the one that the box sends from.
symmetric() {
	random=
	[ "$2" = off ] || random=random
	ip netns exec "router-$1" nft "flush chain ip nat ports; add rule ip nat ports masquerade $random"
}

# inside.sh dial LAB DIR HOME ADDRESS MTU: a home gets its address from the provider. With the one before go its flows.
dial() {
	ip -n "router-$1" link set wan down
	ip -n "router-$1" address flush dev wan
	ip -n "router-$1" address add "$2/32" dev wan
	ip -n "router-$1" link set wan mtu "$3" up
	for network in 203.0.113.0/24 198.51.100.0/22; do ip -n "router-$1" route add "$network" dev wan; done
	echo "$2" >"$dir/home-$1"
}

# Whether boxes of a cloud reach each other, and themselves, by public addresses.
hairpin() {
	verdict=drop
	[ "$2" = off ] || verdict=accept
	ip netns exec "router-$1" nft "flush chain ip filter hairpin; add rule ip filter hairpin $verdict"
}

# Each start of a box gets a new network namespace, as a machine that boots has empty tables.
# Outside, a box of a cloud is known by an address, and one at home by a port of its router.
plug() {
	box=$1 router=router-$2 private=$3 outside=$4
	ip netns delete "$box" 2>/dev/null || :
	ip -n "$router" link delete "$box" 2>/dev/null || :
	ip netns add "$box"
	ip -n "$box" link set lo up
	# The card keeps its address over reboots, or the router would look for the old one.
	mac=$(printf '02:00:c6:33:%02x:%02x' "'$2" "${private##*.}")
	ip -n "$router" link add "$box" type veth peer name eth0 netns "$box" address "$mac"
	ip -n "$router" link set "$box" master lan up
	ip -n "$box" address add "$private/24" dev eth0
	ip -n "$box" link set eth0 up
	ip -n "$box" route add default via 192.168.0.1
	case $outside in
	*.*)
		ip -n "$router" address replace "$outside/32" dev wan
		ip netns exec "$router" nft "add element ip nat dnat4 { $outside : $private };
			add element ip nat snat4 { $private : $outside }"
		;;
	*) ip netns exec "$router" nft "add element ip nat ssh { $outside : $private }" ;;
	esac
}

# --- boxes ------------------------------------------------------------------------------------

# cgroups of a box: one folder in each v1 hierarchy, or one in the v2 tree.
enter_cgroup() {
	for top in /sys/fs/cgroup /sys/fs/cgroup/*/; do
		top=${top%/}
		if [ ! -w "$top/cgroup.procs" ] || [ -L "$top" ]; then continue; fi
		if [ "$top" != /sys/fs/cgroup ] && [ -e /sys/fs/cgroup/cgroup.procs ]; then continue; fi
		# A kubelet wants controllers that systemd does not always hand down.
		if [ "${2-}" = all ] && [ -e "$top/cgroup.subtree_control" ]; then
			for controller in cpu cpuset memory pids io; do
				echo "+$controller" 2>/dev/null >"$top/cgroup.subtree_control" || :
			done
		fi
		group=$top/k3s-lab-$lab-$1
		mkdir -p "$group"
		for setting in cpuset.cpus cpuset.mems; do
			[ ! -e "$top/$setting" ] || [ ! -e "$group/tasks" ] || cat "$top/$setting" >"$group/$setting"
		done
		echo $$ >"$group/cgroup.procs"
	done
}

# inside.sh furnish LAB DIR BOX ROOT KIND [SECONDS [MEGABYTES]]: the box's own file system over the shared ROOT.
furnish() {
	box=$1 lower=$2 home=$dir/boxes/$1
	root=$home/root
	mkdir -p "$root" "$home/disk"
	[ -z "${5-}" ] || empty_disk "$home" "$5"
	mkdir "$home/disk/upper" "$home/disk/work"
	# Overlays do not stack: where this machine's own disk is one, a copy has to do.
	overlay "$1" "$2" || cp -a --reflink=auto "$lower/." "$root"
	echo "$box" >"$root/etc/hostname"
	printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$box" >"$root/etc/hosts"
	tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
	rm -f "$root"/etc/ssh/ssh_host_*
	ssh-keygen -q -t ed25519 -N '' -C "$box" -f "$root/etc/ssh/ssh_host_ed25519_key"
	cp "$root/etc/ssh/ssh_host_ed25519_key.pub" "$home/host-key.pub"
	for user in root home/debian home/plain; do
		install -d -m 700 "$root/$user/.ssh"
		install -m 600 "$dir/home/.ssh/id_ed25519.pub" "$root/$user/.ssh/authorized_keys"
		chown -R --reference="$root/$user" "$root/$user/.ssh"
	done
	if [ "${4-}" ]; then
		mkdir -p "$root/etc/systemd/system.conf.d"
		printf '[Manager]\nDefaultEnvironment=STAND_IN_START_SECONDS=%s\n' "$4" >"$root/etc/systemd/system.conf.d/stand-in.conf"
	fi
	[ "$3" != real ] || furnish_real "$root"
}

empty_disk() {
	mount -t tmpfs -o "mode=755,size=$2M" disk "$1/disk"
}

overlay() {
	mount -t overlay -o "lowerdir=$2,upperdir=$dir/boxes/$1/disk/upper,workdir=$dir/boxes/$1/disk/work" \
		"$1" "$dir/boxes/$1/root" 2>/dev/null
}

# inside.sh save LAB DIR BOX NAME: what the disk of a box that is off has beside the shared root.
save() {
	rm -rf "$dir/boxes/$1/saved-$2"
	cp -a "$dir/boxes/$1/disk/upper" "$dir/boxes/$1/saved-$2"
}

# inside.sh restore LAB DIR BOX ROOT MEGABYTES NAME
restore() {
	home=$dir/boxes/$1
	# nspawn may still be clearing up.
	exec 9>"$home/lock"
	flock 9
	umount "$home/root"
	# A box that is just starting has a copy of all mounts and, with it, of all that would be removed here.
	umount -l "$home/disk"
	empty_disk "$home" "$3"
	cp -a "$home/saved-$4" "$home/disk/upper"
	mkdir "$home/disk/work"
	overlay "$1" "$2"
}

# A real k3s writes where a box may not: the box gets files of its own there, bound at boot.
furnish_real() {
	cat >"$1/usr/local/sbin/lab-real" <<-'SH'
		#!/bin/sh
		set -eu
		mount --make-rshared /
		mount -o remount,rw /sys
		for cgroup in /sys/fs/cgroup /sys/fs/cgroup/*/; do
			! mountpoint -q "$cgroup" || mount -o remount,bind,rw "$cgroup" || :
		done
		hashsize=/sys/module/nf_conntrack/parameters/hashsize
		[ -e $hashsize ] || { mkdir -p ${hashsize%/*} && echo 16384 >$hashsize; } || :
		for file in $hashsize /proc/sys/net/netfilter/nf_conntrack_max /proc/sys/vm/panic_on_oom \
			/proc/sys/vm/overcommit_memory /proc/sys/kernel/panic /proc/sys/kernel/panic_on_oops \
			/proc/sys/kernel/keys/root_maxkeys /proc/sys/kernel/keys/root_maxbytes; do
			[ -e "$file" ] || continue
			mkdir -p "/run/lab-real${file%/*}"
			cat "$file" >"/run/lab-real$file"
			mount --bind "/run/lab-real$file" "$file"
		done
	SH
	chmod 755 "$1/usr/local/sbin/lab-real"
	cat >"$1/etc/systemd/system/lab-real.service" <<-'UNIT'
		[Unit]
		DefaultDependencies=no
		After=local-fs.target
		Before=basic.target
		[Service]
		Type=oneshot
		ExecStart=/usr/local/sbin/lab-real
	UNIT
	mkdir -p "$1/etc/systemd/system/basic.target.wants"
	ln -s ../lab-real.service "$1/etc/systemd/system/basic.target.wants/"
}

# inside.sh meter LAB DIR NAME COMMAND...: in cgroups of its own, which tell afterwards what it took. It goes before the
# boxes, as on a machine of its own.
meter() {
	enter_cgroup "$1" all
	for share in /sys/fs/cgroup/*/"k3s-lab-$lab-$1"/cpu.shares /sys/fs/cgroup/"k3s-lab-$lab-$1"/cpu.weight; do
		[ ! -w "$share" ] || echo 10000 >"$share"
	done
	shift
	exec "$@"
}

# inside.sh run LAB DIR BOX CLOUD PRIVATE OUTSIDE KIND [NSPAWN-OPTION...]: until the box is off.
run() {
	box=$1
	# After a hard power-off the one before may still be clearing up.
	exec 9>"$dir/boxes/$box/lock"
	flock 9
	if [ "$5" = real ]; then enter_cgroup "$box" all; else enter_cgroup "$box"; fi
	# Old k3s runs on cgroup v1 only. Of a machine with v2 a box can have v1 in name, which the stand-in goes by.
	if [ "$5" != real ] && [ -e /sys/fs/cgroup/cgroup.controllers ]; then export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=0; fi
	while :; do
		plug "$1" "$2" "$3" "$4"
		status=0
		(
			shift 5
			# A box that starts has been up for no time, as a machine would; its clocks begin with it.
			since=$(cut -d. -f1 /proc/uptime)
			SYSTEMD_NSPAWN_API_VFS_WRITABLE=network exec unshare --time --boottime "-$since" --monotonic "-$since" systemd-nspawn -q --boot -D "$dir/boxes/$box/root" -M "$box" \
				--register=no --keep-unit --network-namespace-path="/run/netns/$box" --capability=all \
				--system-call-filter=@known --bind=/dev/net/tun --bind=/dev/kmsg --resolv-conf=off \
				--link-journal=no --console=pipe "$@"
		) </dev/null 9>&- || status=$?
		# 133 is nspawn's word for a reboot asked for inside.
		[ "$status" = 133 ] || break
	done
	ip netns delete "$box" 2>/dev/null || :
}

# The first process of a box: the youngest namespace's 1, started by this box's nspawn.
leader() {
	for nspawn in $(pgrep -x systemd-nspawn); do
		tr '\0' '\n' <"/proc/$nspawn/cmdline" | grep -qx -- "$dir/boxes/$1/root" || continue
		for child in $(pgrep -P "$nspawn"); do
			if grep -q '^NSpid:.*[[:space:]]1$' "/proc/$child/status"; then
				echo "$child"
				return
			fi
		done
	done
	echo "Box $1 is off" >&2
	return 1
}

# inside.sh enter LAB DIR BOX SCRIPT: as root in the box, without ssh.
enter() {
	pid=$(leader "$1")
	exec nsenter -t "$pid" -m -u -i -n -p -T -r -w -- env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
		HOME=/root LANG=C.UTF-8 sh -euc "$2"
}

off() {
	kill -9 "$(leader "$1")"
	while leader "$1" >/dev/null 2>&1; do sleep 0.05; done
}

# inside.sh await LAB DIR SECONDS ADDRESS PORT: until it answers there.
await() {
	end=$(($(date +%s) + $1))
	# shellcheck disable=SC2016
	until timeout 0.3 bash -c ': </dev/tcp/$1/$2' - "$2" "$3" 2>/dev/null; do
		if [ "$(date +%s)" -ge "$end" ]; then
			echo "No ssh at $2:$3" >&2
			return 1
		fi
		sleep 0.1
	done
}

"$command" "$@"

/** Cleans up what a stopped k3s leaves on a box. */

/**
 * Shell that removes what a stopped k3s leaves running: shims with their pods, mounts, network namespaces, interfaces,
 * iptables and nft rules. It does what k3s-killall.sh does (v1.36.3), and also removes what that misses: the unnamed
 * iptables rules of v1.17's flannel, nftables tables and kube-router's ipsets.
 */
export const CLEAR = `for bin in /var/lib/rancher/k3s/data/*/bin; do PATH=$PATH:$bin:$bin/aux; done
ps -e -o pid= -o ppid= -o args= | awk '
  { parent[$1] = $2; if ($3 ~ "^/var/lib/rancher/k3s/data/[^/]+/bin/containerd-shim") pod[$1] = 1 }
  END {
    do { more = 0; for (p in parent) if (!(p in pod) && parent[p] in pod) { pod[p] = 1; more = 1 } } while (more)
    for (p in pod) print p
  }' | while read -r pid; do kill -9 "$pid" 2>/dev/null || :; done
awk -v kubelet="$(readlink -f /var/lib/kubelet)" '$2 ~ "^/run/k3s/|^" kubelet "/(pods|plugins)/|^/run/netns/cni-" { print $2 }' /proc/self/mounts | sort -r |
  while read -r path; do
    path=$(printf '%b' "$path")
    umount -f "$path" 2>/dev/null || umount -l "$path" 2>/dev/null || :
  done
ip netns list 2>/dev/null | awk '/^cni-/ { print $1 }' | while read -r name; do ip netns delete "$name" || :; done
rm -f /run/netns/cni-*
# The kernel itself deletes those of pods whose namespaces went, in its own time.
ip -o link show master cni0 2>/dev/null | awk -F': ' '{ sub(/@.*/, "", $2); print $2 }' |
  while read -r name; do ip link delete "$name" 2>/dev/null || [ ! -e "/sys/class/net/$name" ]; done
for name in cni0 flannel.1 flannel-v6.1 flannel-wg flannel-wg-v6 kube-ipvs0; do
  [ ! -e "/sys/class/net/$name" ] || ip link delete "$name" || [ ! -e "/sys/class/net/$name" ]
done
network=$(sed -n 's/^FLANNEL_NETWORK=//p' /run/flannel/subnet.env 2>/dev/null) || :
for name in iptables ip6tables iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
  saved=$("$name-save" 2>/dev/null | grep -v '^#') || continue
  kept=$(echo "$saved" | grep -vE 'KUBE-|CNI-|[Ff][Ll][Aa][Nn][Nn][Ee][Ll]' | grep -vF -- "\${network:-KUBE-}")
  [ "$kept" = "$saved" ] || echo "$kept" | "$name-restore"
done
for table in 'ip kube-proxy' 'ip6 kube-proxy' 'ip flannel-ipv4' 'ip6 flannel-ipv6'; do
  # shellcheck disable=SC2086
  nft delete table $table 2>/dev/null || :
done
ipset list -n 2>/dev/null | grep -E '^(inet6:)?KUBE-' | while read -r name; do ipset destroy "$name" || :; done
# Else the next k3s makes cni0 by it before its own flannel has written one: v1.17's says an MTU of 1500.
rm -f /run/flannel/subnet.env
`;

/** Prints what of that exists, one per line. */
export const CLEAR_LOOK = `ps -e -o args= | awk '$1 ~ "^/var/lib/rancher/k3s/data/[^/]+/bin/containerd-shim" { print "pods" }'
awk -v kubelet="$(readlink -f /var/lib/kubelet)" '$2 ~ "^/run/k3s/|^" kubelet "/(pods|plugins)/|^/run/netns/cni-" { print "mounts" }' /proc/self/mounts
for name in cni0 flannel.1 flannel-v6.1 flannel-wg flannel-wg-v6 kube-ipvs0; do
  [ ! -e "/sys/class/net/$name" ] || echo "$name"
done
for name in iptables ip6tables iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
  "$name-save" 2>/dev/null | grep -qE 'KUBE-|CNI-|FLANNEL|flanneld' && echo "$name rules"
done
nft list tables 2>/dev/null | grep -oE '(kube-proxy|flannel-ipv[46])$' | sed 's/$/ tables/'`;

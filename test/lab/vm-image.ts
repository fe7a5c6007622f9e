/**
 * The image of a machine with a kernel of its own: Debian's userland in CentOS 7's clothes. Its running kernel
 * is Debian's cloud kernel less WireGuard; the repositories that go with it carry another, as ELRepo's kernel-ml.
 *
 *     disk.raw      MBR, GRUB, /boot (vda1) and / (vda2): the same for all machines
 *     repositories  what the lab's mirror serves: elrepo, elrepo-archive, pub (EPEL) and vault (CentOS)
 */
import { existsSync } from "node:fs";
import { mkdir, readdir, readFile, rename, rm, truncate, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { $ as zx } from "zx";
import { aptOptions, aptSources, caches, kept } from "./cache.ts";
import { type Kernel, repositories, title, VAULT_URL } from "./vm-rpms.ts";

const $ = zx({ quiet: true });

/** `old` and `next` are what `uname -r` says before and after. `accel`: QEMU's words for the fastest way there is. */
export type Image = { disk: string; repositories: string; old: string; next: string; accel: string };

/** command: the Debian package that has it. */
const NEEDS = {
  "qemu-system-x86_64": "qemu-system-x86",
  "qemu-img": "qemu-utils",
  mke2fs: "e2fsprogs",
  debugfs: "e2fsprogs",
  rpmbuild: "rpm",
  createrepo_c: "createrepo-c",
  depmod: "kmod",
  gpg: "gpg",
  "gpg-agent": "gpg-agent",
};

const PACKAGES = [
  "systemd systemd-sysv dbus udev kmod procps sudo",
  "openssh-server openssl curl ca-certificates",
  "iproute2 iptables nftables ipset conntrack",
  "grub-pc-bin grub-common grub2-common rpm dnf",
  "linux-image-cloud-amd64 linux-image-rt-amd64 initramfs-tools zstd",
].join(" ");

/** What is loaded at need in a machine: the new kernel comes with these and what they need, and no more. */
const MODULES =
  "virtio_pci virtio_blk virtio_net virtio_rng ext4 overlay bridge br_netfilter veth dummy tun vxlan wireguard " +
  "ip_vs ip_vs_rr ip_vs_wrr ip_vs_sh nf_conntrack nf_conntrack_netlink nf_nat nf_tables nft_compat nft_chain_nat nft_ct nft_nat " +
  "nft_masq nft_limit nft_log nft_reject_inet nft_fib_inet iptable_nat iptable_filter iptable_mangle ip_set ip_set_hash_ip " +
  "ip_set_hash_net ip_set_hash_ipport ip_set_bitmap_port xt_conntrack xt_comment xt_mark xt_nat xt_MASQUERADE xt_addrtype " +
  "xt_multiport xt_statistic xt_tcpudp xt_set xt_physdev xt_recent xt_REDIRECT crc32c_generic crc32c_intel";

const INITRAMFS = `mkdir -p "$1/etc/initramfs-tools/conf.d"
printf 'MODULES=list\\nCOMPRESS=zstd\\n' >"$1/etc/initramfs-tools/conf.d/lab"
printf 'virtio_pci\\nvirtio_blk\\next4\\n' >"$1/etc/initramfs-tools/modules"`;

/** MiB: /boot from 1 on, / after it. */
const BOOT = 200;
const ROOT = 3072;

export async function image(say: (line: string) => void): Promise<Image> {
  await requirements(say);
  const { codename, sources } = await aptSources();
  if (codename !== "bookworm") say(`machines were tried with Debian bookworm, this is ${codename}`);
  const root = await kept("machine-root", [codename, sources, PACKAGES, INITRAMFS], async (folder) => {
    say(`building the machines' ${codename} with two kernels (once, a minute or two)`);
    const keyrings = ["/usr/share/keyrings", "/etc/apt/trusted.gpg.d"].filter((name) => existsSync(name));
    const options = [...(await aptOptions()), ...keyrings.map((name) => `--keyring=${name}`)];
    await $({
      input: sources.join("\n"),
    })`mmdebstrap --quiet --mode=root --variant=minbase --include=${PACKAGES.replaceAll(" ", ",")} ${options} \
      --essential-hook=${INITRAMFS} ${codename} ${folder}/root -`;
  });
  const { packages } = await caches(false, say);
  const parts = [root, packages, await sourceOf(["vm-image.ts", "vm-rpms.ts"])];
  const folder = await kept("machine", parts, (folder) => build(folder, join(root, "root"), packages, say));
  const { old, next } = JSON.parse(await readFile(join(folder, "kernels.json"), "utf8"));
  const disk = join(folder, "disk.raw");
  return {
    disk,
    repositories: join(folder, "repositories"),
    old,
    next,
    accel: await acceleration(disk, say),
  };
}

/** Emulation is quicker with a plain processor than with all that QEMU can imitate: 18 s instead of 21 to boot. */
const TCG = "-accel tcg,thread=multi,tb-size=256 -cpu qemu64";
const KVM = "-accel kvm -cpu host";

/** There are machines that have /dev/kvm and cannot run a kernel in it, or only slowly: it is used where a boot takes seconds. */
async function acceleration(disk: string, say: (line: string) => void) {
  if (!existsSync("/dev/kvm")) return TCG;
  const folder = await kept("machine-kvm", [(await $`uname -a`).stdout], async (folder) => {
    say("trying KVM (once, half a minute)");
    const options = `${KVM} -m 512 -nodefaults -display none -snapshot -serial file:${folder}/console`.split(
      " ",
    );
    await $({
      nothrow: true,
    })`timeout -k 1 30 qemu-system-x86_64 ${options} -drive file=${disk},format=raw,if=virtio`;
  });
  const console = await readFile(join(folder, "console"), "utf8").catch(() => "");
  return console.includes("login:") ? KVM : TCG;
}

const sourceOf = (files: string[]) =>
  Promise.all(files.map((file) => readFile(join(import.meta.dirname, file), "utf8")));

async function requirements(say: (line: string) => void) {
  const missing = new Set<string>();
  for (const [command, name] of Object.entries(NEEDS))
    if ((await $({ nothrow: true })`command -v ${command}`).exitCode) missing.add(name);
  if (!missing.size) return;
  const install = `apt-get install -q -y --no-install-recommends ${[...missing].join(" ")}`;
  say(install);
  await $`apt-get -q update && DEBIAN_FRONTEND=noninteractive sh -c ${install}`;
}

async function build(folder: string, lower: string, packages: string, say: (line: string) => void) {
  say("building the CentOS 7 stand-in and its repositories (once, half a minute)");
  const root = join(folder, "root");
  await $`cp -a --reflink=auto ${lower} ${root}`;
  const names = (await readdir(join(root, "lib/modules"))).sort();
  const named = (flavour: string) => names.find((name) => name.includes(`-${flavour}-`)) as string;
  const old = named("cloud");
  const next = await takeKernel(root, named("rt"), join(folder, "kernel-ml"));
  await $`rm ${root}/lib/modules/${old}/kernel/drivers/net/wireguard/wireguard.ko`;
  await $`depmod -b ${root} ${old}`;
  const wireguard = (await readdir(packages)).find((name) =>
    /^wireguard-tools_.*\.deb$/.test(name),
  ) as string;
  const { installed } = await repositories(
    join(folder, "repositories"),
    join(folder, "kernel-ml"),
    next,
    menuEntry(title(next), next.release),
    join(packages, wireguard),
  );
  await dress(root, old, installed);
  await pack(root, join(folder, "disk.raw"));
  await writeFile(join(folder, "kernels.json"), JSON.stringify({ old, next: next.release }));
  for (const name of ["root", "kernel-ml"]) await rm(join(folder, name), { recursive: true });
}

/** Moves a kernel out of the root: its image, its initramfs, and of its modules those that machines use. */
async function takeKernel(root: string, release: string, to: string): Promise<Kernel> {
  const modules = join("lib/modules", release);
  await mkdir(join(to, modules), { recursive: true });
  const wanted = await $`for name in ${MODULES.split(" ")}; do
    modprobe -S ${release} -d ${root} --show-depends "$name" || echo "builtin $name"
  done | sed -n 's/^insmod //p' | sort -u`;
  for (const line of wanted.stdout.trim().split("\n")) {
    const path = line.split(" ")[0]?.slice(root.length + 1) ?? "";
    await $`install -D -m 644 ${root}/${path} ${to}/${path}`;
  }
  for (const list of ["modules.order", "modules.builtin", "modules.builtin.modinfo"])
    await $`cp ${root}/${modules}/${list} ${to}/${modules}/`;
  await $`depmod -b ${to} ${release}`;
  await $`mv ${root}/boot/vmlinuz-${release} ${to}/vmlinuz && mv ${root}/boot/initrd.img-${release} ${to}/initramfs`;
  await $`rm -r ${root}/${modules} && rm -f ${root}/boot/System.map-${release} ${root}/boot/config-${release}`;
  // 6.1.0-56-rt-amd64 is version 6.1.0, release 56.rt.
  const [version = "", abi = "", flavour = ""] = release.split("-");
  return { release, rpm: [version, `${abi}.${flavour}`] };
}

/** CentOS 7's texts, files and habits. `installed`: packages that it has. */
async function dress(root: string, kernel: string, installed: string[]) {
  const put = async (path: string, text: string, mode = "644") => {
    await $`mkdir -p ${join(root, path, "..")}`;
    await $`rm -f ${root}/${path}`;
    await writeFile(join(root, path), text);
    await $`chmod ${mode} ${root}/${path}`;
  };
  await $`rm -f ${root}/etc/debian_version ${root}/etc/os-release ${root}/usr/lib/os-release`;
  await put(
    "etc/os-release",
    await readFile(join(import.meta.dirname, "../fixtures/os-release/centos-7"), "utf8"),
  );
  await put("etc/centos-release", "CentOS Linux release 7.9.2009 (Core)\n");
  await $`ln -s centos-release ${root}/etc/redhat-release && ln -s centos-release ${root}/etc/system-release`;

  // What a box installs packages by is told by what it has.
  await $`rm ${root}/usr/bin/dnf ${root}/var/lib/dpkg/status && ln -sf dnf-3 ${root}/usr/bin/yum`;
  await put("etc/rpm/macros.lab", "%_dbpath /var/lib/rpm\n");
  await put(
    "etc/yum.repos.d/CentOS-Base.repo",
    `[base]
name=CentOS-7 - Base
#mirrorlist=http://mirrorlist.centos.org/?release=$releasever&arch=$basearch&repo=os
baseurl=${VAULT_URL}
gpgcheck=0
`,
  );
  await $`mkdir -p ${root}/var/lib/rpm ${root}/tmp/rpms && cp ${installed} ${root}/tmp/rpms/`;
  await $`chroot ${root} sh -c ${"rpm -i --nosignature /tmp/rpms/*.rpm && rm -r /tmp/rpms"}`;

  await $`mkdir -p ${root}/boot/grub && ln -s grub ${root}/boot/grub2`;
  await $`mv ${root}/boot/initrd.img-${kernel} ${root}/boot/initramfs-${kernel}.img`;
  const rescue = "0-rescue-96820b9851c24560b5f942f2496b9aeb";
  await put(
    "boot/grub/grub.cfg",
    grubConfig(...[kernel, rescue].map((name) => menuEntry(`CentOS Linux (${name}) 7 (Core)`, kernel))),
  );
  await $`chroot ${root} grub-editenv /boot/grub/grubenv create`;
  await $`chroot ${root} grub-editenv /boot/grub/grubenv set ${`saved_entry=CentOS Linux (${kernel}) 7 (Core)`}`;
  for (const [name, command] of [
    ["grub2-editenv", "grub-editenv"],
    ["grub2-set-default", "grub-set-default"],
    ["grub2-reboot", "grub-reboot"],
  ])
    await $`ln -s $(chroot ${root} sh -c ${`command -v ${command}`}) ${root}/usr/sbin/${name}`;

  await put(
    "etc/fstab",
    "/dev/vda2 / ext4 rw,noatime 0 0\n/dev/vda1 /boot ext4 rw,noatime 0 0\nLABEL=lab /opt/k3s-stand-in ext4 ro 0 0\n",
  );
  await $`mkdir -p ${root}/opt/k3s-stand-in`;
  await put("etc/machine-id", "96820b9851c24560b5f942f2496b9aeb\n");
  await put("etc/resolv.conf", "");
  await put(
    "usr/local/sbin/lab-identity",
    "#!/bin/sh\nset -eu\ncp -a /opt/k3s-stand-in/.identity/. /\nhostname -F /etc/hostname\n",
    "755",
  );
  await put(
    "etc/systemd/system/lab-identity.service",
    `[Unit]
DefaultDependencies=no
RequiresMountsFor=/opt/k3s-stand-in
Before=systemd-networkd.service ssh.service sysinit.target
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/lab-identity
[Install]
WantedBy=sysinit.target
`,
  );
  await put("etc/systemd/system.conf.d/lab.conf", "[Manager]\nDefaultTimeoutStopSec=20s\n");
  await put("etc/ssh/sshd_config.d/lab.conf", "UseDNS no\n");
  await $`chroot ${root} sh -c ${`systemctl -q enable systemd-networkd ssh lab-identity
systemctl -q mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \\
  fstrim.timer dnf-makecache.timer grub-common.service grub-initrd-fallback.service getty@tty1.service \\
  systemd-timesyncd.service systemd-networkd-wait-online.service systemd-logind.service dev-hugepages.mount \\
  dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount modprobe@.service systemd-pcrphase.service \\
  systemd-pcrphase-sysinit.service systemd-random-seed.service systemd-update-utmp.service`}`;
  await $`rm -rf ${root}/usr/share/doc ${root}/usr/share/man ${root}/usr/share/locale ${root}/usr/share/info \
    ${root}/var/lib/apt/lists ${root}/var/cache/apt ${root}/vmlinuz ${root}/vmlinuz.old ${root}/initrd.img ${root}/initrd.img.old`;
  await $`rm -f ${root}/etc/ssh/ssh_host_*`;
}

/** As grub2-mkconfig of CentOS 7 writes it, less the modules it loads. */
const grubConfig = (...entries: string[]) => `serial --unit=0 --speed=115200
terminal_output serial
set timeout=0
load_env
if [ "\${next_entry}" ] ; then
   set default="\${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="\${saved_entry}"
fi

### BEGIN /etc/grub.d/10_linux ###
${entries.join("")}### END /etc/grub.d/10_linux ###
`;

/** CentOS 7's systemd 219 knows cgroup v1 alone: neither v2 nor both. */
const CGROUP1 = "systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=1";

/** The menuentry of a kernel, as grubby and grub2-mkconfig write it. */
export const menuEntry = (
  title: string,
  kernel: string,
) => `menuentry '${title}' --class centos --class gnu-linux --unrestricted {
\tset root='hd0,msdos1'
\tlinux16 /vmlinuz-${kernel} root=/dev/vda2 ro console=ttyS0 net.ifnames=0 mitigations=off ${CGROUP1} quiet
\tinitrd16 /initramfs-${kernel}.img
}
`;

/** Two file systems, an MBR that names them, and GRUB before the first; without a loop device or a mount. */
async function pack(root: string, disk: string) {
  const core = join(root, "tmp/core.img");
  await $`chroot ${root} grub-mkimage -O i386-pc -o /tmp/core.img -p ${"(hd0,msdos1)/grub"} \
    biosdisk part_msdos ext2 linux linux16 normal loadenv test echo serial terminal search configfile reboot ls cat`;
  const boot = await readFile(join(root, "usr/lib/grub/i386-pc/boot.img"));
  const grub = await readFile(core);
  await rm(core);
  await rename(join(root, "boot"), `${root}.boot`);
  await mkdir(join(root, "boot"));
  await writeFile(disk, "");
  await truncate(disk, (1 + BOOT + ROOT) * 2 ** 20);
  // GRUB reads a block at a time, through an emulated BIOS: small ones would cost seconds at each boot.
  const ext4 = ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-O", "^metadata_csum,^64bit", "-E"];
  await $`${ext4} offset=${2 ** 20} -L boot -d ${root}.boot ${disk} ${BOOT}M`;
  await $`${ext4} offset=${(1 + BOOT) * 2 ** 20} -L root -d ${root} ${disk} ${ROOT}M`;
  await rm(`${root}.boot`, { recursive: true });

  const sector = (mib: number) => mib * 2048;
  const mbr = Buffer.alloc(512);
  boot.copy(mbr, 0, 0, 440);
  for (const [i, [start, size, active]] of [
    [1, BOOT, 0x80],
    [1 + BOOT, ROOT, 0],
  ].entries()) {
    const at = 446 + 16 * i;
    mbr.set([active as number, 0xfe, 0xff, 0xff, 0x83, 0xfe, 0xff, 0xff], at);
    mbr.writeUInt32LE(sector(start as number), at + 8);
    mbr.writeUInt32LE(sector(size as number), at + 12);
  }
  mbr.writeUInt16LE(0xaa55, 510);
  const { open } = await import("node:fs/promises");
  const file = await open(disk, "r+");
  await file.write(mbr, 0, 512, 0);
  await file.write(grub, 0, grub.length, 512);
  await file.close();
}

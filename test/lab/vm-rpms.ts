/**
 * The repositories of a CentOS 7 stand-in, as the real ones are laid out: ELRepo's key and release package, whose
 * own lists are as dead as they are today; an archive with kernel-ml; EPEL with wireguard-tools; CentOS's vault.
 */
import { mkdir, mkdtemp, readdir, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { $ as zx } from "zx";
import { PACKAGES_URL } from "./cache.ts";

const $ = zx({ quiet: true });

/** release: what `uname -r` says. rpm: the package's version and release. */
export type Kernel = { release: string; rpm: [string, string] };

export const VAULT_URL = `${PACKAGES_URL}/vault/7.9.2009/os/x86_64`;
export const ELREPO_URL = `${PACKAGES_URL}/elrepo`;
export const ELREPO_KERNEL_URL = `${PACKAGES_URL}/elrepo-archive/kernel/el7/x86_64`;
export const EPEL_URL = `${PACKAGES_URL}/pub/epel`;
/** A name for the address of the lab's packages, as machines know it: that of Fedora's mirrors. */
export const EPEL_HOST = "download.fedoraproject.org";

type Package = {
  name: string;
  version?: string;
  release?: string;
  arch?: "noarch";
  /** More lines of the spec's head, such as Requires. */
  head?: string[];
  /** A folder whose files the package has. */
  files?: string;
  posttrans?: string;
};

export const title = ({ rpm: [version, release] }: Kernel) =>
  `CentOS Linux (${version}-${release}.x86_64) 7 (Core)`;

/** @returns packages that the machine has from the start. */
export async function repositories(
  to: string,
  kernelFiles: string,
  next: Kernel,
  entry: string,
  wireguard: string,
) {
  const work = await mkdtemp(join(tmpdir(), "k3s-lab-rpm-"));
  try {
    return await build(to, kernelFiles, next, entry, wireguard, work);
  } finally {
    await $({
      nothrow: true,
      env: { ...process.env, GNUPGHOME: join(work, "gpg") },
    })`gpgconf --kill gpg-agent`;
    await rm(work, { recursive: true });
  }
}

async function build(
  to: string,
  kernelFiles: string,
  next: Kernel,
  entry: string,
  wireguard: string,
  work: string,
) {
  const place = async (path: string) => {
    await mkdir(join(to, path), { recursive: true });
    return join(to, path);
  };
  const tree = async (name: string, files: Record<string, string>) => {
    for (const [path, text] of Object.entries(files)) {
      await mkdir(dirname(join(work, name, path)), { recursive: true });
      await writeFile(join(work, name, path), text);
    }
    return join(work, name);
  };
  const elrepo = await key(work, "elrepo.org (stand-in) <secure@elrepo.org>");
  const fedora = await key(work, "Fedora EPEL (7) (stand-in) <epel@fedoraproject.org>");
  const old = { version: "3.10.0", release: "1160.el7" };
  const [version, release] = next.rpm;
  const now = { version, release };

  const vault = await place("vault/7.9.2009/os/x86_64");
  await rpm(work, vault, {
    name: "centos-logos",
    version: "70.0.6",
    release: "3.el7.centos",
    arch: "noarch",
  });
  const installed = join(work, "installed");
  await mkdir(installed);
  const provides = [
    "system-release = 7",
    "redhat-release = 7",
    "/bin/sh",
    "bash",
    "coreutils",
    "grub2-tools",
  ];
  await rpm(work, installed, {
    name: "centos-release",
    version: "7",
    release: "9.2009.1.el7.centos",
    head: provides.map((what) => `Provides: ${what}`),
  });
  await rpm(work, installed, { name: "kernel-tools", ...old, head: ["Requires: kernel-tools-libs"] });
  await rpm(work, installed, { name: "kernel-tools-libs", ...old });

  const site = await place("elrepo");
  await writeFile(join(site, "RPM-GPG-KEY-elrepo.org"), elrepo.text);
  await rpm(work, site, {
    name: "elrepo-release",
    version: "7.0",
    release: "6.el7.elrepo",
    arch: "noarch",
    head: ["Requires: system-release >= 7"],
    files: await tree("elrepo-release", {
      "etc/yum.repos.d/elrepo.repo": ["elrepo", "elrepo-testing", "elrepo-kernel", "elrepo-extras"]
        .map(dead)
        .join("\n"),
      "etc/pki/rpm-gpg/RPM-GPG-KEY-elrepo.org": elrepo.text,
    }),
  });
  await $`mv ${site}/elrepo-release-7.0-6.el7.elrepo.noarch.rpm ${site}/elrepo-release-7.el7.elrepo.noarch.rpm`;

  const archive = await place("elrepo-archive/kernel/el7/x86_64");
  await rpm(work, archive, {
    name: "kernel-ml",
    ...now,
    head: ["Provides: kernel = %{version}-%{release}", "Requires: coreutils"],
    files: await kernelTree(kernelFiles, next, join(work, "kernel-ml"), entry),
    posttrans: `/usr/share/kernel-ml/install-${next.release}`,
  });
  for (const [name, ...head] of [
    ["kernel-ml-tools", "Requires: kernel-ml-tools-libs", "Conflicts: kernel-tools"],
    ["kernel-ml-tools-libs", "Conflicts: kernel-tools-libs"],
    ["kernel-ml-devel", "Provides: kernel-devel = %{version}-%{release}"],
    ["kernel-ml-headers", "Obsoletes: kernel-headers", "Provides: kernel-headers = %{version}-%{release}"],
  ])
    await rpm(work, archive, { name: name as string, ...now, head });

  const epel = await place("pub/epel/7/x86_64");
  const latest = join(to, "pub/epel");
  await rpm(work, latest, {
    name: "epel-release",
    version: "7",
    release: "14",
    arch: "noarch",
    head: ["Requires: redhat-release >= 7"],
    files: await tree("epel-release", {
      "etc/yum.repos.d/epel.repo": `[epel]
name=Extra Packages for Enterprise Linux 7 - $basearch
baseurl=http://${EPEL_HOST}/pub/epel/7/$basearch
failovermethod=priority
enabled=1
gpgcheck=1
gpgkey=file:///etc/pki/rpm-gpg/RPM-GPG-KEY-EPEL-7
`,
      "etc/pki/rpm-gpg/RPM-GPG-KEY-EPEL-7": fedora.text,
    }),
  });
  await $`mv ${latest}/epel-release-7-14.noarch.rpm ${latest}/epel-release-latest-7.noarch.rpm`;
  const tools = join(work, "wireguard-tools");
  await $`dpkg-deb -x ${wireguard} ${tools}.all && mkdir -p ${tools}/usr/bin && cp -a ${tools}.all/usr/bin/. ${tools}/usr/bin/`;
  await rpm(work, epel, { name: "wireguard-tools", version: "1.0.20210914", release: "1.el7", files: tools });

  const rpms = async (...folders: string[]) =>
    (
      await Promise.all(
        folders.map(async (f) => (await readdir(f)).filter((n) => n.endsWith(".rpm")).map((n) => join(f, n))),
      )
    ).flat();
  await sign(elrepo, await rpms(site, archive));
  await sign(fedora, await rpms(latest, epel));
  for (const folder of [vault, archive, epel])
    await $`createrepo_c -q --no-database --simple-md-filenames ${folder}`;
  const packages = await place("installed");
  await $`cp ${await rpms(installed)} ${packages}/`;
  return { installed: await rpms(packages) };
}

/** A section of elrepo.repo as the release package of el7 has it; none of its hosts answers. */
const dead = (name: string) => {
  const path = name.replace(/^elrepo-/, "");
  return `[${name}]
name=ELRepo.org Community Enterprise Linux ${path} Repository - el7
baseurl=http://elrepo.org/linux/${path}/el7/$basearch/
	http://mirrors.coreix.net/elrepo/${path}/el7/$basearch/
	http://mirror.rackspace.com/elrepo/${path}/el7/$basearch/
	http://linux-mirrors.fnal.gov/linux/elrepo/${path}/el7/$basearch/
mirrorlist=http://mirrors.elrepo.org/mirrors-${name}.el7
enabled=${name === "elrepo" ? 1 : 0}
gpgcheck=1
gpgkey=file:///etc/pki/rpm-gpg/RPM-GPG-KEY-elrepo.org
protect=0
`;
};

/** What kernel-ml has on a disk, and the last step of its installation: dracut's and grubby's part. */
async function kernelTree(files: string, { release }: Kernel, to: string, entry: string) {
  await $`mkdir -p ${to}/boot ${to}/usr/share/kernel-ml && cp -a ${files}/lib ${to}/`;
  await $`cp ${files}/vmlinuz ${to}/boot/vmlinuz-${release}`;
  await $`cp ${files}/initramfs ${to}/usr/share/kernel-ml/initramfs-${release}.img`;
  const script = join(to, `usr/share/kernel-ml/install-${release}`);
  await writeFile(
    script,
    `#!/bin/sh
# grubby puts a new kernel before the others, and leaves the default to its owner.
set -eu
cp /usr/share/kernel-ml/initramfs-${release}.img /boot/initramfs-${release}.img
cfg=/boot/grub2/grub.cfg
! grep -q '/vmlinuz-${release} ' $cfg || exit 0
cat >/run/kernel-ml.entry <<'ENTRY'
${entry}ENTRY
sed '/^### BEGIN .*10_linux/r /run/kernel-ml.entry' $cfg >$cfg.new
mv $cfg.new $cfg
`,
    { mode: 0o755 },
  );
  return to;
}

async function rpm(work: string, to: string, spec: Package) {
  const { name, version = "1", release = "1", arch = "x86_64", head = [], files, posttrans } = spec;
  const top = join(work, "build");
  const list = files ? (await $`find ${files} ! -type d -printf ${"/%P\\n"}`).stdout : "";
  await mkdir(top, { recursive: true });
  await writeFile(
    join(top, `${name}.spec`),
    `Name: ${name}
Version: ${version}
Release: ${release}
Summary: A stand-in for ${name}
License: MIT
AutoReqProv: no
${arch === "noarch" ? "BuildArch: noarch\n" : ""}${head.join("\n")}
%description
A stand-in for tests.
%install
mkdir -p %{buildroot}
${files ? `cp -a ${files}/. %{buildroot}/` : ""}
${posttrans ? `%posttrans\n${posttrans}\n` : ""}%files
${list}`,
  );
  const define = {
    _topdir: top,
    _rpmdir: to,
    _build_name_fmt: "%%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm",
    _binary_payload: "w1.zstdio",
    debug_package: "%{nil}",
    __os_install_post: "%{nil}",
    _build_id_links: "none",
    _dbpath: join(work, "db"),
  };
  const words = Object.entries(define).flatMap(([key, value]) => ["--define", `${key} ${value}`]);
  await $`rpmbuild --quiet -bb --target x86_64 ${words} ${top}/${name}.spec`;
}

type Key = { home: string; name: string; text: string };

async function key(work: string, name: string): Promise<Key> {
  const home = join(work, "gpg");
  await mkdir(home, { recursive: true, mode: 0o700 });
  const gpg = ["gpg", "--homedir", home, "--batch", "--quiet"];
  await $`${gpg} --passphrase ${""} --quick-generate-key ${name} rsa2048 sign never`;
  return { home, name, text: (await $`${gpg} --armor --export ${name}`).stdout };
}

async function sign({ home, name }: Key, files: string[]) {
  const define = [
    "--define",
    `_gpg_name ${name}`,
    "--define",
    `_gpg_path ${home}`,
    "--define",
    "__gpg /usr/bin/gpg",
  ];
  await $`rpmsign --addsign ${define} ${files}`;
}

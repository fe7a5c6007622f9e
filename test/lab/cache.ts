/**
 * What takes time and is the same for every lab: the boxes' root file system, the packages that
 * boxes install, and the node that runs the k3s stand-in. Built once, kept outside the work tree.
 */
import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdir, readdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { $ as zx } from "zx";

export const PACKAGES_URL = "http://203.0.113.82";
const CACHE = process.env.K3S_LAB_CACHE || "/var/cache/k3s-across-clouds";
const $ = zx({ quiet: true });
const NODE = `node-linux-${process.arch}`;

const IN_BOXES = [
  "systemd systemd-sysv dbus udev kmod procps sudo",
  "openssh-server openssl curl ca-certificates sqlite3",
  "iproute2 iptables iputils-ping nftables wireguard-go",
].join(" ");
/** Not in the root, but served to the boxes by the lab's own apt repository. */
const FOR_BOXES = ["wireguard-tools", "ufw", "firewalld", "systemd-resolved", "dnsmasq-base"];

/**
 * Modern k3s wants WireGuard in the kernel, of which a box has this machine's. Where that has none, a box's own modprobe
 * and ip act as if it had, by wireguard-go: so what is tried on boxes needs no exception for them.
 */
const KERNEL = `mkdir /usr/lib/lab
ip=$(readlink -f "$(command -v ip)") modprobe=$(command -v modprobe)
mv "$ip" /usr/lib/lab/ip
ln -s "$(readlink -f "$modprobe")" /usr/lib/lab/modprobe
rm "$modprobe"
cat >"$ip" <<'END'
#!/bin/sh
case "\${1-} \${2-} \${4-} \${5-}" in 'link add type wireguard')
  if /usr/lib/lab/ip "$@" 2>/dev/null; then exit 0; fi
  if env -u NOTIFY_SOCKET wireguard-go "$3" </dev/null >/dev/null 2>&1; then
    until [ -e "/sys/class/net/$3" ]; do sleep 0.05; done
    exec modprobe wireguard
  fi ;;
esac
exec /usr/lib/lab/ip "$@"
END
cat >"$modprobe" <<'END'
#!/bin/sh
for name; do :; done
if [ "\${name-}" = wireguard ] && ! /usr/lib/lab/modprobe "$@" 2>/dev/null && command -v wireguard-go >/dev/null; then
  case " $* " in *' -n '*) exit 0 ;; esac
  loaded=/sys/module/wireguard
  mkdir -p $loaded 2>/dev/null || { mount -o remount,rw /sys && mkdir -p $loaded; mount -o remount,ro /sys; }
  exit 0
fi
exec /usr/lib/lab/modprobe "$@"
END
chmod 755 "$ip" "$modprobe"
`;

/** Runs in the new root, as mmdebstrap's last word. */
const FURNISH = `set -eu
${KERNEL}useradd -m -s /bin/bash debian
useradd -m -s /bin/bash plain
# As on RHEL and its family: sudo there does not look into /usr/local.
printf '%s\\n' 'debian ALL=(ALL) NOPASSWD: ALL' 'Defaults:debian secure_path=/sbin:/bin:/usr/sbin:/usr/bin' \\
  >/etc/sudoers.d/debian
chmod 440 /etc/sudoers.d/debian
rm -rf /etc/apt/sources.list.d/* /etc/apt/apt.conf.d/99mmdebstrap
echo 'deb [trusted=yes] ${PACKAGES_URL} ./' >/etc/apt/sources.list
: >/etc/resolv.conf
rm -f /etc/machine-id /etc/ssh/ssh_host_*
# A box is new for minutes only: apt's own timers would hold the lock just then.
systemctl mask -q apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \\
  console-getty.service systemd-timesyncd.service`;

/** This machine's own apt sources for its own release: whatever mirror works here works for boxes. */
export async function aptSources() {
  const list = () =>
    $`apt-get indextargets --format ${"$(CODENAME) $(ORIGIN) $(SITE) $(RELEASE) $(COMPONENT)"} ${"Created-By: Packages"}`;
  const codename = (await $`. /etc/os-release; echo "$VERSION_CODENAME"`).stdout.trim();
  const read = async () =>
    (await list()).stdout
      .split("\n")
      .map((line) => line.split(" "))
      .filter(
        ([name, origin]) => name?.startsWith(codename) && /^(Debian|Ubuntu|Raspbian)$/.test(origin ?? ""),
      )
      .filter(([name]) => !/-(backports|proposed)/.test(name ?? ""))
      .map(([, , site, suite, component]) => `deb ${site} ${suite} ${component}`);
  let sources = await read();
  if (!sources.length) {
    await $`apt-get -q update`;
    sources = await read();
  }
  if (!sources.length) throw new Error(`apt knows no packages of "${codename}": boxes are made from them`);
  return { codename, sources: [...new Set(sources)].sort() };
}

/** Proxies and certificates that this machine's apt needs, in mmdebstrap's words. */
export async function aptOptions() {
  const lines = (await $`apt-config dump`).stdout.split("\n");
  return lines.filter((line) => /^Acquire::https?::.* "..*";$/.test(line)).map((line) => `--aptopt=${line}`);
}

const underWay = new Map<string, Promise<string>>();

/**
 * Builds into a folder of its own, and renames it when whole: what is in place is complete. Labs that start
 * side by side in one process wait for one build.
 */
export async function kept(name: string, parts: unknown, build: (folder: string) => Promise<void>) {
  const hash = createHash("sha256").update(JSON.stringify(parts)).digest("hex").slice(0, 12);
  const folder = join(CACHE, `${name}-${hash}`);
  if (existsSync(folder)) return folder;
  const made = underWay.get(folder) ?? make(folder, build).finally(() => underWay.delete(folder));
  underWay.set(folder, made);
  return await made;
}

async function make(folder: string, build: (folder: string) => Promise<void>) {
  await mkdir(CACHE, { recursive: true });
  const building = `${folder}.${process.pid}`;
  await rm(building, { recursive: true, force: true });
  try {
    await mkdir(building);
    await build(building);
    // Of two labs that build at once the first wins, and both go on with its folder.
    await rename(building, folder).catch((error) => {
      if (!existsSync(folder)) throw error;
    });
  } finally {
    await rm(building, { recursive: true, force: true });
  }
  return folder;
}

/** Half-built folders whose builder is gone. */
async function sweep() {
  for (const name of existsSync(CACHE) ? await readdir(CACHE) : []) {
    const builder = /\.(\d+)$/.exec(name)?.[1];
    if (builder && !existsSync(`/proc/${builder}`))
      await rm(join(CACHE, name), { recursive: true, force: true });
  }
}

/** What `apt-get update` wants to read, from the packages themselves. */
async function indexPackages(folder: string) {
  let index = "";
  for (const name of (await readdir(folder)).filter((name) => name.endsWith(".deb"))) {
    const file = await readFile(join(folder, name));
    const fields = (await $`dpkg-deb --field ${join(folder, name)}`).stdout.trim();
    const hash = createHash("sha256").update(file).digest("hex");
    index += `${fields}\nFilename: ./${name}\nSize: ${file.length}\nSHA256: ${hash}\n\n`;
  }
  await writeFile(join(folder, "Packages"), index);
}

/**
 * @returns root: a root file system that several boxes may share read-only; `withTools` for one that
 * has wireguard-tools already. packages: a folder that is an apt repository. node: a node binary.
 */
export async function caches(withTools: boolean, say: (line: string) => void) {
  const { codename, sources } = await aptSources();
  await sweep();
  const system = await kept("boxes", [codename, sources, IN_BOXES, FOR_BOXES, FURNISH], async (folder) => {
    say(`building the boxes' ${codename} (once, a minute or two)`);
    await mkdir(join(folder, "packages"));
    const include = IN_BOXES.replaceAll(" ", ",");
    // Into a folder of their own: the usual one holds all that went into the root.
    const download = [
      'mkdir -p "$1/tmp/lab/partial"',
      `chroot "$1" apt-get install -q -y --no-install-recommends --download-only -o Dir::Cache::archives=/tmp/lab ${FOR_BOXES.join(" ")}`,
      `mv "$1"/tmp/lab/*.deb ${folder}/packages/`,
      'rm -r "$1/tmp/lab"',
    ].join(" && ");
    const keyrings = ["/usr/share/keyrings", "/etc/apt/trusted.gpg.d"].filter((name) => existsSync(name));
    const options = [...(await aptOptions()), ...keyrings.map((name) => `--keyring=${name}`)];
    await $({
      input: sources.join("\n"),
    })`mmdebstrap --quiet --mode=root --variant=minbase --include=${include} ${options} \
      --customize-hook=${download} --customize-hook=${`chroot "$1" sh -c ${quote(FURNISH)}`} \
      ${codename} ${join(folder, "root")} -`;
    await indexPackages(join(folder, "packages"));
  });
  const packages = join(system, "packages");
  const root = join(system, "root");
  const tooled = () =>
    kept("boxes-with-tools", [system], async (folder) => {
      await $`cp -a --reflink=auto ${root} ${folder}/root && find ${packages} -name ${"wireguard-tools_*.deb"} -exec cp -t ${folder}/root/tmp {} +`;
      await $`chroot ${folder}/root sh -c ${"dpkg -i /tmp/*.deb && rm /tmp/*.deb"}`;
    });
  const node = await kept("node", [NODE, 24], async (folder) => {
    say("fetching the node that runs the k3s stand-in (once)");
    await $`npm install --silent --no-audit --no-fund --prefix ${folder} ${NODE}@24`;
  });
  return {
    root: withTools ? join(await tooled(), "root") : root,
    packages,
    node: join(node, "node_modules", NODE, "bin/node"),
  };
}

const quote = (word: string) => `'${word.replaceAll("'", "'\\''")}'`;

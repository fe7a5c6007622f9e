/** What k3s's journal and metrics-server's log say, what it means, and what to do about it. */

interface Word {
  /** An extended regular expression, for grep on the box and for RegExp here. */
  said: string;
  cause: string;
  /** AGAIN stands for the command to retry. */
  remedy: string;
  /** k3s retries forever. */
  forever?: true;
}

/** metrics-server's errors about a node, in v0.3.6 and in v0.5 and later (pkg/scraper). */
const SCRAPE = "(Failed to scrape node|unable to fully (scrape|collect) metrics)";

const NEW_TOKEN = '"make server" writes the current token, then AGAIN';

/**
 * Messages of k3s's journal and metrics-server's log, and what they mean (v1.17.6 and v1.36.3, recorded). The first
 * match of a line counts.
 */
const WORDS: readonly Word[] = [
  {
    said: `${SCRAPE}.*x509`,
    cause:
      "the kubelet's certificate of node NODE does not hold for the address at which metrics-server asks it",
    remedy: "systemctl restart k3s-agent there makes it anew (on a server: k3s), then AGAIN",
  },
  {
    said: `${SCRAPE}.*//10\\.[0-9.]+:10250.*(dial tcp|deadline exceeded|timeout|EOF|reset)`,
    cause: "metrics-server does not reach the kubelet of node NODE inside the tunnel",
    remedy:
      "trust the pods' network in its firewall (make firewall), then AGAIN; make check tries the tunnel",
  },
  {
    said: `${SCRAPE}.*(dial tcp|deadline exceeded|timeout|EOF|reset)`,
    cause: "metrics-server does not reach the kubelet of node NODE",
    remedy: "open 10250/tcp there for the nodes' addresses (make firewall, security group), then AGAIN",
  },
  {
    said: "ErrImagePull|ImagePullBackOff",
    cause: "an image cannot be pulled from here",
    remedy: "REGISTRY_MIRRORS or AIRGAP (env.example), then AGAIN",
  },
  {
    said: "Node password rejected",
    cause: "another node has this box's name, or had it before this box was reinstalled",
    remedy:
      "hostnamectl set-hostname another name there; if that node is this box before it was reinstalled: kubectl delete node (v1.17.6: and its line in server/cred/node-passwd); then AGAIN",
    forever: true,
  },
  {
    said: "token (CA hash )?does not match",
    cause: "its K3S_TOKEN belongs to another cluster, or the server was reinstalled",
    remedy: NEW_TOKEN,
    forever: true,
  },
  {
    said: "token is not valid|server is not ready: .*not authorized",
    cause: "the password in its K3S_TOKEN is wrong",
    remedy: NEW_TOKEN,
    forever: true,
  },
  {
    said: "invalid token format|token credentials are the wrong format",
    cause: "its K3S_TOKEN is not a k3s token",
    remedy: NEW_TOKEN,
    forever: true,
  },
  {
    said: "only https:// URLs are supported",
    cause: "its K3S_URL is not an https:// address",
    remedy: '"make server" writes the right one, then AGAIN',
    forever: true,
  },
  {
    said: "x509: certificate has expired or is not yet valid",
    cause: "its clock is outside the time for which the cluster's certificates hold",
    remedy: "timedatectl set-ntp true there, then AGAIN",
  },
  {
    said: "x509: certificate signed by unknown authority|is not trusted",
    cause: "the server at its K3S_URL is another one, or was reinstalled",
    remedy: NEW_TOKEN,
  },
  {
    said: "failed to get CA certs",
    cause: "it does not reach the server's 6443/tcp",
    remedy: "open 6443/tcp in the server's security group and firewall, and see that k3s runs there",
  },
  {
    said: "flag provided but not defined",
    cause: "SERVER_ARGS or AGENT_ARGS has a flag that this release of k3s does not know",
    remedy: "correct it, then AGAIN",
    forever: true,
  },
  {
    said: "Cannot configure unknown flannel backend",
    cause: "SERVER_ARGS on the server names a flannel backend that this release of k3s does not have",
    remedy: 'correct it, then "make server"',
  },
  {
    said: "host IP unknown|not found in the host's network interfaces",
    cause: "--node-ip is the public address, and no interface of the box has it",
    remedy: "AGAIN: its unit puts the address on lo",
    forever: true,
  },
  {
    said: "bootstrap data already found",
    cause: "the server was given another token than the one its data are encrypted with",
    remedy:
      'take any --token out of SERVER_ARGS, and "make server", which undoes an interrupted make token; then AGAIN',
    forever: true,
  },
  {
    said: "configured to not run on a host using cgroup v1",
    cause: "the box has cgroup v1, on which k3s v1.35 and later run only with fail-cgroupv1=false",
    remedy:
      "AGAIN: its unit tells the kubelet so, unless SERVER_ARGS, AGENT_ARGS or K3S_CONFIG say otherwise",
    forever: true,
  },
  {
    said: "ailed to find [a-z]+ cgroup",
    cause:
      "its kernel does not give k3s the cgroups that it needs: v1 before k3s v1.20.4, else the controllers cpu, cpuset and memory",
    remedy:
      "a later K3S_VERSION on cgroup v2, or what is missing on the kernel's command line (cgroup_enable=memory) and a restart; then AGAIN",
    forever: true,
  },
  {
    said: "could not create wireguard interface|wg: not found|wg-add.sh|operation not supported",
    cause: "the box has no WireGuard, in its kernel or at all",
    remedy: '"make upgrade-kernel" and "make install-wireguard" on it, then AGAIN',
  },
  {
    said: "flannel exited",
    cause: "flannel does not start",
    remedy: "journalctl -u k3s -u k3s-agent there shows the reason",
    forever: true,
  },
  {
    said: "bind: address already in use",
    cause: "another program has one of k3s's ports, or an earlier k3s still runs",
    remedy: "ss -ltnp on it names the program; end it, then AGAIN",
  },
  {
    said: "no default routes found",
    cause: "the box has no default route",
    remedy: "give it one (ip route), then AGAIN",
  },
  {
    said: "--token is required",
    cause: "its unit has lost the token",
    remedy: "AGAIN",
  },
];

/** For grep -E on the box, in single quotes and not to be taken for an option. */
const pattern = (words: readonly Word[]): string =>
  words.map(({ said }) => said.replaceAll("'", ".").replace(/^-/, "[-]")).join("|");

/** The known messages. */
export const MEANT = pattern(WORDS);
/** Messages that k3s repeats forever, at which waiting ends. */
export const HOPELESS = pattern(WORDS.filter(({ forever }) => forever));

/** The meaning of journal lines: the last known one counts. `again` is the command to retry. */
export function meaningOf(text: string, again: string): { cause: string; remedy: string } | undefined {
  for (const line of text.split("\n").reverse()) {
    const word = WORDS.find(({ said }) => new RegExp(said).test(line));
    if (!word) continue;
    const flag = /flag provided but not defined: -*([\w-]+)/.exec(line)?.[1];
    const node = /node="([\w.-]+)"|kubelet_summary:([\w.-]+)|from node ([\w.-]+)/
      .exec(line)
      ?.slice(1)
      .find(Boolean);
    return {
      cause: flag
        ? word.cause.replace("a flag that", `--${flag}, which`)
        : word.cause.replace("node NODE", node ? `node ${node}` : "a node"),
      remedy: word.remedy.replace("AGAIN", `"${again}"`),
    };
  }
  return undefined;
}

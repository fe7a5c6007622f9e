/**
 * The stand-in's command line: `k3s.ts VERSION NAME ARGS…`, where NAME is the file it was called by.
 * A test tool, not k3s. Where it cannot do what k3s does, it says so and fails.
 */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { runAgent } from "./agent.ts";
import { call } from "./client.ts";
import {
  build,
  fatal,
  fixture,
  type Generation,
  generation,
  log,
  logLine,
  useNanoseconds,
  versionText,
} from "./common.ts";
import { flagTable, helpText, incorrectUsage, one, parseFlags } from "./flags.ts";
import { kubectl } from "./kubectl.ts";
import { passwordOf, runServer } from "./server.ts";

const HELP_OLD = `COMMANDS:
   server        Run management server
   agent         Run node agent
   kubectl       Run kubectl
   crictl        Run crictl
   ctr           Run ctr
   check-config  Run config check
   help, h       Shows a list of commands or help for one command`;
const HELP_MODERN = `COMMANDS:
   server           Run management server
   agent            Run node agent
   kubectl          Run kubectl
   crictl           Run crictl
   ctr              Run ctr
   check-config     Run config check
   token            Manage tokens
   etcd-snapshot    Manage etcd snapshots
   secrets-encrypt  Control secrets encryption and keys rotation
   certificate      Manage K3s certificates
   completion       Install shell completion script
   help, h          Shows a list of commands or help for one command`;

function finish(text: string, status = 0): never {
  process.stdout.write(text);
  process.exit(status);
}

/** config.yaml and config.yaml.d as arguments: `key: value`, and lists of `- value`. Any other YAML is not imitated. */
function configured(gen: Generation, command: string, config: string): string[] {
  const folder = `${config}.d`;
  const dropIns = existsSync(folder) ? readdirSync(folder).sort() : [];
  const known = flagTable(gen, command).flatMap(({ names }) => names);
  const flags: string[] = [];
  for (const file of [config, ...dropIns.map((name) => join(folder, name))]) {
    if (!/\.ya?ml$/.test(file) || !existsSync(file)) continue;
    let key = "";
    for (const line of readFileSync(file, "utf8").split("\n")) {
      if (/^\s*(#.*)?$/.test(line)) continue;
      const [, own, rest = "", item] = /^(?:"?([\w-]+)\+?"?:(?:\s+(.*))?|\s+-\s+(.+))$/.exec(line) ?? [];
      if (own) key = own;
      const value = (item ?? rest).trim().replace(/^(["'])(.*)\1$/, "$2");
      if (!key || (!own && !item) || /^[[{&*|>]/.test(value))
        fatal(gen, `yaml: unmarshal errors (stand-in: ${file} has ${JSON.stringify(line)})`);
      if (own && !value) continue;
      // Only a server drops what it does not know (pkg/configfilearg, ValidFlags); an agent ends at it.
      if (command === "agent" || known.includes(key)) flags.push(`--${key}=${value}`);
      else log("warning", `Unknown flag --${key} found in config.yaml, skipping\n`);
    }
  }
  return flags;
}

/** `k3s token`: of its subcommands only rotate, with what the server's own file and random numbers give. */
async function token(args: string[]): Promise<void> {
  if (["--help", "-h", "help"].includes(args[0] ?? "--help")) finish(fixture("k3s-token-help-v1.36.3.txt"));
  if (args.join(" ") !== "rotate") {
    process.stderr.write(`k3s stand-in: token ${args.join(" ")} is not imitated\n`);
    process.exit(1);
  }
  process.stdout.write(
    "\u001b[33mWARNING\u001b[0m: Recommended to keep a record of the old token. If restoring from a snapshot, you must use the token associated with that snapshot.\n",
  );
  const dir = "/var/lib/rancher/k3s/server";
  const { status, statusText } = await call("https://127.0.0.1:6443/v1-k3s/token", {
    method: "PUT",
    ca: readFileSync(`${dir}/tls/server-ca.crt`, "utf8"),
    auth: `server:${passwordOf(readFileSync(`${dir}/token`, "utf8"))}`,
    body: { newToken: "" },
  });
  if (status !== 200) fatal("modern", `https://127.0.0.1:6443/v1-k3s/token: ${status} ${statusText}`);
  process.stdout.write("Token rotated, restart k3s nodes with new token\n");
}

async function main([version, name, ...args]: [string, string, ...string[]]): Promise<void> {
  const gen = generation(version);
  const [command, ...rest] = basename(name) === "kubectl" ? ["kubectl", ...args] : args;
  if (command === "--version" || command === "-v") finish(versionText(version));
  if (!command || ["--help", "-h", "help", "h"].includes(command)) {
    finish(
      `NAME:\n   k3s - Kubernetes, but small and simple\n\nUSAGE:\n   k3s [global options] command [command options]${gen === "old" ? " [arguments...]" : ""}\n\nVERSION:\n   ${build(version)}\n\n${gen === "old" ? HELP_OLD : HELP_MODERN}\n`,
    );
  }
  if (command === "kubectl") return kubectl(version, rest);
  if (command === "token" && gen === "modern") return token(rest);
  if (command !== "server" && command !== "agent") {
    if (`${HELP_OLD}${HELP_MODERN}`.includes(`   ${command} `)) {
      process.stderr.write(`k3s stand-in: ${command} is not imitated\n`);
      process.exit(1);
    }
    process.stderr.write(`No help topic for '${command}'\n`);
    process.exit(3);
  }

  const config = "/etc/rancher/k3s/config.yaml";
  // What the files have comes before the arguments, which so count more, or are added to a list.
  const argv = gen === "modern" ? [...configured(gen, command, config), ...rest] : rest;
  const parsed = parseFlags(gen, command, argv, process.env);
  if ("error" in parsed) {
    process.stdout.write(incorrectUsage(gen, command, parsed.error));
    fatal(gen, parsed.error);
  }
  if (parsed.help) finish(helpText(gen, command));
  if (gen === "old") useNanoseconds();
  const { values } = parsed;
  for (const flag of [
    "with-node-id",
    "rootless",
    "docker",
    "cluster-init",
    "disable-cloud-controller",
    "cluster-cidr",
    "service-cidr",
  ]) {
    if (one(values, flag)) fatal(gen, `stand-in: --${flag} is not imitated`);
  }
  if (one(values, "datastore-endpoint") && !/^https?:/.test(one(values, "datastore-endpoint") ?? ""))
    fatal(gen, "stand-in: of datastores only etcd is imitated");
  const notify = process.env.NOTIFY_SOCKET;
  delete process.env.NOTIFY_SOCKET;
  // v1.17's unit ends as failed when it is stopped.
  for (const signal of ["SIGTERM", "SIGINT"])
    process.on(signal, () => (gen === "old" ? fatal(gen, "context canceled") : process.exit(0)));
  log("info", `k3s stand-in: this is a test tool, not k3s ${version}`);
  if (command === "server") return runServer({ gen, version, values, argv: [command, ...argv], notify });
  if (!one(values, "token") && !one(values, "token-file") && !one(values, "cluster-secret"))
    fatal(gen, "--token is required");
  if (!one(values, "server")) fatal(gen, "--server is required");
  return runAgent({ gen, version, values, argv: [command, ...argv], notify });
}

main(process.argv.slice(2) as [string, string, ...string[]]).catch((error: Error) => {
  process.stderr.write(logLine("fatal", `stand-in: ${error.stack ?? error}`));
  process.exit(1);
});

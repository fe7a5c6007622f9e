/** k3s's command line: the flags from its recorded help, read as urfave/cli v1 (to v1.22) and v2 (modern) read them. */
import { fixture, type Generation } from "./common.ts";

export type Flag = { names: string[]; takesValue: boolean; env?: string };
export type Values = Record<string, string[]>;
export type Parsed = { values: Values; positional: string[]; help?: boolean } | { error: string };

const HIDDEN: Record<Generation, Record<string, string[]>> = {
  old: {
    server: [
      "disable-agent",
      "cluster-init",
      "cluster-reset",
      "kube-controller-arg=",
      "kube-cloud-controller-arg=",
    ],
    agent: ["disable-selinux"],
  },
  modern: {
    server: [
      "disable-agent",
      "supervisor-port=",
      "apiserver-port=",
      "apiserver-bind-address=",
      "kine-tls",
      "disable-apiserver",
      "disable-controller-manager",
      "disable-etcd",
      "kube-controller-arg=",
      "kube-cloud-controller-arg=",
      "airgap-extra-registry=",
    ],
    agent: ["airgap-extra-registry="],
  },
};
const HELP: Record<Generation, string> = { old: "v1.17.6", modern: "v1.36.3" };

export const helpText = (gen: Generation, command: string): string =>
  fixture(`k3s-${command}-help-${HELP[gen]}.txt`);

/** What a wrong flag prints on stdout. Modern k3s then shows its help with one section more. */
export function incorrectUsage(gen: Generation, command: string, error: string): string {
  const help = helpText(gen, command);
  const section = "COMMANDS:\n   help, h  Shows a list of commands or help for one command\n\nOPTIONS:";
  return `Incorrect Usage: ${error}\n\n${gen === "modern" ? help.replace("OPTIONS:", section) : help}`;
}

/** Reads `   --name value, -n value   (group) text [$ENV]` lines. */
export function flagTable(gen: Generation, command: string): Flag[] {
  const flags = helpText(gen, command)
    .split("\n")
    .filter((l) => /^ {3}-/.test(l))
    .map((line): Flag => {
      const usage = /^ {3}(.*?)( {2}|$)/.exec(line)![1]!.replace(/ \[.*/, "");
      const parts = usage.split(", ");
      return {
        names: parts.map((p) => p.split(" ")[0]!.replace(/^-+/, "")),
        takesValue: parts[0]!.includes(" "),
        env: /\[\$(\w+)\]$/.exec(line)?.[1],
      };
    });
  const hidden = HIDDEN[gen][command]!.map(
    (n): Flag => ({ names: [n.replace("=", "")], takesValue: n.endsWith("=") }),
  );
  return [...flags, ...hidden, { names: ["help", "h"], takesValue: false }];
}

const find = (table: Flag[], name: string): Flag | undefined => table.find((f) => f.names.includes(name));

/** urfave/cli v1 moves flags, and what looks like their values, before the rest. */
export function reorder(table: Flag[], args: string[]): string[] {
  const first: string[] = [],
    rest: string[] = [];
  let valueMayFollow = false;
  for (const [i, arg] of args.entries()) {
    if (arg === "--") {
      rest.push(...args.slice(i));
      break;
    }
    if (valueMayFollow && !arg.startsWith("-")) {
      valueMayFollow = false;
      first.push(arg);
    } else if (/^-./.test(arg) && find(table, arg.replace(/^--?/, "").split("=")[0]!)) {
      first.push(arg);
      valueMayFollow = !arg.includes("=");
    } else rest.push(arg);
  }
  return [...first, ...rest];
}

/**
 * Go's flag package: one dash or two, values by `=` or as the next word, an end at the first word that is no flag.
 * In modern k3s that end hides every flag after a stray word; in v1.17 only the stray words are lost.
 */
export function parseFlags(
  gen: Generation,
  command: string,
  argv: string[],
  env: Record<string, string | undefined> = {},
): Parsed {
  const table = flagTable(gen, command);
  const args = gen === "old" ? reorder(table, argv) : argv;
  const values: Values = {};
  let i = 0;
  for (; i < args.length; i++) {
    const arg = args[i]!;
    if (!/^-./.test(arg)) break;
    if (arg === "--") {
      i++;
      break;
    }
    const [, name, , inline] = /^--?([^=]*)(=([\s\S]*))?$/.exec(arg)!;
    if (!name || name.startsWith("-")) return { error: `bad flag syntax: ${arg}` };
    const flag = find(table, name);
    if (!flag) return { error: `flag provided but not defined: -${name}` };
    const canonical = flag.names[0]!;
    if (canonical === "help") return { values, positional: [], help: true };
    let value = inline;
    if (flag.takesValue) {
      if (value === undefined && ++i >= args.length) return { error: `flag needs an argument: -${name}` };
      value ??= args[i]!;
    } else {
      value ??= "true";
      if (!/^(1|0|t|f|true|false|TRUE|FALSE|True|False|T|F)$/.test(value))
        return { error: `invalid boolean value ${JSON.stringify(value)} for -${name}: parse error` };
      value = /^[1tT]/.test(value) ? "true" : "";
    }
    values[canonical] ??= [];
    values[canonical].push(value);
  }
  for (const flag of table) {
    const value = flag.env && env[flag.env];
    if (value) values[flag.names[0]!] ??= [value];
  }
  const positional = args.slice(i);
  if (gen === "modern" && ["help", "h"].includes(positional[0]!)) return { values, positional, help: true };
  return { values, positional };
}

/** The flag's last value, as a flag that is not a list has it. */
export const one = (values: Values, name: string): string | undefined => values[name]?.at(-1) || undefined;
/** All values, those of one flag split at commas. */
export const list = (values: Values, name: string): string[] =>
  (values[name] ?? [])
    .flatMap((v) => v.split(","))
    .map((v) => v.trim())
    .filter(Boolean);

const SECRET = /^(--?(token|t|agent-token|cluster-secret)|K3S_(TOKEN|AGENT_TOKEN|CLUSTER_SECRET))$/;

/** The annotation k3s.io/node-args: what k3s was called with, cut at `=`, secrets masked. */
export function nodeArgs(argv: string[]): string {
  const words = argv.flatMap((a) =>
    a.includes("=") ? [a.slice(0, a.indexOf("=")), a.slice(a.indexOf("=") + 1)] : [a],
  );
  return JSON.stringify(words.map((w, i) => (SECRET.test(words[i - 1] ?? "") ? "********" : w)));
}

export function nodeEnv(env: Record<string, string | undefined>): string {
  const names = Object.keys(env)
    .filter((n) => n.startsWith("K3S_"))
    .sort();
  return JSON.stringify(Object.fromEntries(names.map((n) => [n, SECRET.test(n) ? "********" : env[n]])));
}

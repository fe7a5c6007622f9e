/** A step: what it looks at, and what it then plans to change. */
import type { Settings } from "./settings.ts";
import type { SettingName } from "./table.ts";

/** Facts that every look prints, before those of its steps. */
type BaseFact =
  | "uptime"
  | "now"
  | "boot"
  | "machine"
  | "hostname"
  | "arch"
  | "kernel"
  | "os"
  | "systemd"
  | "addresses";

/** What a box reported: text by fact name. Facts that it lacks, or was not asked for, are undefined. */
export type Facts<F extends string = never> = { readonly [K in F | BaseFact]?: string };

/** A piece of shell that prints these facts. */
export type Look<F extends string = never> = string & { prints(fact: F): void };

/** The facts that a look prints. */
export type Printed<L extends string> = L extends Look<infer F> ? F : never;

type Words<S extends string> = S extends `${infer First} ${infer Rest}` ? First | Words<Rest> : S;

/**
 * Declares the facts that a piece of shell prints (`fact NAME`, then its text): a plan can read only declared ones.
 * @throws {Error} when the text prints another one too.
 */
export const prints =
  <S extends string>(facts: S) =>
  (text: string): Look<Words<S>> => {
    const named = facts.split(" ");
    const unnamed = [...text.matchAll(/\bfact ([a-z][\w-]*)/g)].find(
      ([, name]) => !named.includes(name as string),
    );
    if (unnamed) throw new Error(`prints("${facts}") does not name the ${unnamed[0]}`);
    return text as Look<Words<S>>;
  };

export interface Change {
  /** What will be done and why, in one line shown to the user; never contains a secret. */
  why: string;
  /** Lines that a dry run shows below it: the diff of a file. Never contains a secret. */
  detail?: string[];
  /**
   * The shell that does it, as root, under `set -eu`. `say TEXT` reports progress, `early FACT TEXT` a fact that
   * others wait for; `beat`, called regularly in a long wait, ends it when the operator's connection is lost.
   */
  sh: string;
  /** Time limit in seconds; default 60. */
  seconds?: number;
  /** Settings that `sh` reads as shell variables; they are sent over stdin and never shown. */
  secrets?: readonly SettingName[];
  /** A local file that is copied to the box before `sh` runs. */
  push?: { file: string; path: string };
  /** The box restarts after this change: wait for its new boot id, then look again. */
  reboot?: true;
  /**
   * A step that runs on the cluster's server instead of `sh`, for what an agent's credentials do not allow. It is planned
   * from what the server itself knows about this box.
   */
  onServer?: Step;
  /** It takes a node out of service: done on one box at a time, and on none after a failure. */
  alone?: true;
  /** Why it could not be determined whether this is still needed. */
  unknown?: string;
  /** The rest of the plan depends on its result: look again first. "foreseen": a preview need not stop here. */
  lookAgain?: true | "foreseen";
  /** What a preview assumes about its result. */
  assumes?: string;
}

/**
 * Settings, and what this run may do: `force` and `take-over` by its switches, `release` and `join` (the server has been
 * asked) by the script itself.
 */
export type Want = Settings & { allowed?: ReadonlySet<string> };

/** One step of the deployment. `look` prints facts and changes nothing; `plan` is pure. */
export interface Step<F extends string = string> {
  /** The script's name, and the make target that runs it. */
  name: string;
  /** Settings it reads, for its flags and --help. */
  options: readonly SettingName[];
  /** Identical pieces of several steps are sent once. */
  look(want: Want): (Look<F> | string)[];
  /** @throws {Refusal} when the facts forbid any change. */
  plan(want: Want, facts: Facts<F>): Change[];
  /** What the operator's env file should remember once the plan is empty. */
  learn?(want: Want, facts: Facts<F>): Partial<Settings>;
}

/** The facts of steps: `FactsOf<(typeof steps)[number]>`. */
export type FactsOf<S> = Facts<S extends Step<infer F> ? F : never>;

/** A step whose plan has the facts that its look prints. */
export const step = <F extends string>(own: Step<F>): Step<F> => own;

/** A step refuses to continue because of the state of the box or the cluster. Nothing was touched. Exit status 1. */
export class Refusal extends Error {}

/** A change failed on a box, or had no effect. */
export class Failure extends Error {
  readonly change: Change | undefined;
  readonly output: string;
  constructor(message: string, change?: Change, output = "") {
    super(message);
    this.change = change;
    this.output = output;
  }
}

/** Is the rest of the plan unknown until this change is made? */
export const unforeseen = ({ reboot, lookAgain }: Change): boolean => Boolean(reboot) || lookAgain === true;

/**
 * The combined plan of several steps, up to a change after which the box has to be looked at again; a preview may go
 * further.
 */
export function planAll<F extends string>(
  steps: readonly Step<F>[],
  want: Want,
  facts: Facts<F>,
  preview = false,
): Change[] {
  const changes: Change[] = [];
  for (const step of steps) {
    changes.push(...step.plan(want, facts));
    if (changes.some((change) => unforeseen(change) || (change.lookAgain && !preview))) break;
  }
  return changes;
}

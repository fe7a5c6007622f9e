/** What a script declares, one run of it, and the boxes that it is for. */
import type { Plan } from "./plan.ts";
import type { Line, Problem } from "./report.ts";
import type { Origins, Settings } from "./settings.ts";
import type { Shell } from "./shell.ts";
import type { Facts, Step, Want } from "./step.ts";
import type { SettingName } from "./table.ts";

/** A script: its steps in order, and what the engine has to know about them. */
export interface Script {
  about: string;
  steps: readonly Step[];
  /** Settings that must not be empty, and where they come from. */
  needs?: Partial<Record<SettingName, string>>;
  /** The setting that names the box when HOST does not. */
  host?: "SERVER";
  /** With `host`: runs on all servers, the first one before the others. */
  everyServer?: true;
  /** Runs on all boxes, so HOST is refused. The text names the command for a single box. */
  everyBox?: string;
  /** HOST becomes the server, in place of the one in SERVER. */
  replaces?: true;
  /** A box's address may be unknown: the step asks for PUBLIC_IP when it needs it. */
  asksLate?: true;
  /** With `host`: checks the boxes against each other. @throws {SettingError} */
  examine?(run: Run, boxes: readonly Box[]): void;
  /** Nodes that it knows of beside those of SERVER and AGENTS. */
  elsewhere?(settings: Settings): { name: string; ip: string }[];
  nothing?(want: Settings, facts: Facts<string>): string;
  /** Replaces the default (the steps on each box). Returns the exit status. */
  work?(run: Run): Promise<number>;
  /** Switches of its own and their help. */
  flags?: Record<string, string>;
  /** May this run write the env file? */
  writes?(want: Settings, known: Record<string, string>): boolean;
  /** It never changes a box, so it has no --dry-run, --json, --print and --reboot. */
  readOnly?: true;
  /** Other boxes that have to be updated along with those of the run, and how. */
  others?: {
    boxes(run: Run, boxes: readonly Box[]): Promise<Box[]>;
    follow(run: Run, others: readonly Box[]): Promise<{ refused: boolean; done: Promise<number[]> }>;
  };
  /** Looks for the cause of a failed change elsewhere in the cluster; `output` is what the change printed. */
  causes?(run: Run, script: string, box: Box, output: string, retry: string): Promise<Problem[]>;
  /** Replaces settings that name local files by the content of those files. @throws {SettingError} */
  filesOf?(want: Settings): Promise<Partial<Settings>>;
  /** Collects what has to be known about all boxes before any is changed. @throws {SettingError} */
  prepare?(run: Run): Promise<void>;
  /** A box's settings for its steps, as far as they depend on other boxes. */
  wantOnBox?(run: Run, name: string, want: Want): Want;
}

/** A machine of this run, with all that concerns it. Made once, by boxes(); then it travels. */
export interface Box {
  /** Its ssh destination; empty for this machine. */
  host: string;
  /** The public address at which other clouds reach it. */
  ip: string;
  /** Its entry in SERVER, AGENTS or HOST: HOST or HOST=PUBLIC_IP. */
  word: string;
  /** Its name in the output: the host without the user, or this machine's host name. */
  name: string;
  /** Its settings: those of all or its own, and what follows from what it is to the others. */
  want: Want;
  shell: Shell;
  /** The shell of the cluster's server. */
  server: Shell;
  /** What the user sees of it; nothing, as long as nobody has given it one. */
  line: Line;
  /** A fact that a change reports before it has ended. */
  early?(fact: Facts<string>): void;
  /** Restart it where a change needs it (over ssh: yes; this machine: only with --reboot). */
  mayReboot: boolean;
}

type Mode = "apply" | "dry-run" | "print";

export interface Run {
  /** The script's name. */
  name: string;
  script: Script;
  settings: Settings;
  origins: Origins;
  /**
   * Settings of single boxes by the box's name ("": all others): NAME__BOX of the env file, and the contents of files
   * that settings name.
   */
  own: Record<string, Partial<Settings>>;
  /** Public addresses of SERVER and AGENTS, which have to bypass the boxes' proxy. */
  addresses: { servers: string[]; agents: string[] };
  /** With FIREWALL: addresses to let in, and as -ADDRESS those to shut out. */
  letIn?: string[];
  envFile: string;
  mode: Mode;
  /** Collects what a dry run with --json shows. */
  plan?: Plan;
  reboot: boolean;
  /** The script's own switches that were given. */
  flags: ReadonlySet<string>;
}

/** A switch as make has it. */
export const switchOf = (flag: string) => flag.toUpperCase().replaceAll("-", "_");

/** What a script declares, one call of it, and the boxes that it is for. */
import type { Line, Problem } from "./report.ts";
import type { Origins, Settings } from "./settings.ts";
import type { Shell } from "./shell.ts";
import type { Facts, Step, Want } from "./step.ts";
import type { SettingName } from "./table.ts";

/** What a script is: its steps in order, and what to say when there is nothing to do. */
export interface Recipe {
  about: string;
  steps: readonly Step[];
  /** Settings that must not be empty, and where they come from. */
  needs?: Partial<Record<SettingName, string>>;
  /** The setting that names the box when HOST does not. */
  host?: "SERVER";
  /** With `host`: it is for all servers, and the first one goes before the others. */
  everyServer?: true;
  /** It goes to all boxes, whatever HOST says: what there is for one of them. A HOST of the call is refused. */
  everyBox?: string;
  /** A box's address may be unknown: a step asks for PUBLIC_IP where it needs it. */
  asksLate?: true;
  /** With `host`: how the boxes must be together. @throws {SettingError} */
  examine?(call: Call, boxes: readonly Box[]): void;
  /** Nodes that it knows of beside those of SERVER and AGENTS. */
  elsewhere?(settings: Settings): { name: string; ip: string }[];
  nothing?(want: Settings, facts: Facts): string;
  /** Where more is to be done than these steps on each box. Answers the exit status. */
  work?(call: Call): Promise<number>;
  /** Switches of its own and their help. */
  flags?: Record<string, string>;
  /** Will it have to write the env file, as far as that can be known before? */
  writes?(want: Settings, known: Record<string, string>): boolean;
  /** It changes nothing on a box: it has no --dry-run, --print and --reboot. */
  readOnly?: true;
  /** Boxes beside those of the call that have to follow before anything is done, and how they do. */
  others?: {
    boxes(call: Call, boxes: readonly Box[]): Promise<Box[]>;
    follow(call: Call, others: readonly Box[]): Promise<{ refused: boolean; done: Promise<number[]> }>;
  };
  /** Why a change failed, as far as the cause is elsewhere than where it shows; `output` is what it said. */
  causes?(call: Call, script: string, box: Box, output: string, retry: string): Promise<Problem[]>;
  /** What the files that settings name hold, in their settings' places. @throws {SettingError} */
  filesOf?(want: Settings): Promise<Partial<Settings>>;
  /** What has to be known of all boxes before anything is done. @throws {SettingError} */
  prepare?(call: Call): Promise<void>;
  /** A box's settings as its steps read them, where they depend on other boxes too. */
  wantOnBox?(call: Call, name: string, want: Want): Want;
}

/** A machine of this call, with all that concerns it. Made once, by boxes(); then it travels. */
export interface Box {
  /** Its ssh destination; empty for this machine. */
  host: string;
  /** The public address at which other clouds reach it. */
  ip: string;
  /** The word that names it in its setting: HOST or HOST=PUBLIC_IP. */
  word: string;
  /** As the user reads it: the host without its user, or this machine's name. */
  name: string;
  /** Its settings: those of all or its own, and what follows from what it is to the others. */
  want: Want;
  shell: Shell;
  /** The shell of the cluster's server. */
  server: Shell;
  /** What the user sees of it; nothing, as long as nobody has given it one. */
  line: Line;
  /** A fact that a change reports before it has ended. */
  early?(fact: Facts): void;
  /** Restart it where a change needs it (over ssh: yes; this machine: only with --reboot). */
  mayReboot: boolean;
}

type Mode = "apply" | "dry-run" | "print";

export interface Call {
  script: string;
  recipe: Recipe;
  settings: Settings;
  origins: Origins;
  /**
   * By a box's name ("" for one that has none here) what it has in place of those: its own lines of the env file,
   * and what is in the files that are named.
   */
  own: Record<string, Partial<Settings>>;
  /** Public addresses of SERVER and AGENTS, where the boxes have a proxy that must not come between them. */
  addresses: { servers: string[]; agents: string[] };
  /** With FIREWALL: whom each box lets in, and as -ADDRESS whom no longer. */
  letIn?: string[];
  envFile: string;
  mode: Mode;
  reboot: boolean;
  /** The recipe's own switches that were given. */
  flags: ReadonlySet<string>;
}

/** A switch as make has it. */
export const switchOf = (flag: string) => flag.toUpperCase().replaceAll("-", "_");

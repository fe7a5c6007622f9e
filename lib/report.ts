/** Progress output on standard error: one line per event, or a spinner for a single box on a terminal. */
import type { Ora } from "ora";
import type { Change } from "./step.ts";
import { redacted } from "./text.ts";

/** A problem: its cause and its remedy, one line each. */
export interface Problem {
  /** The box to fix, as the user names it. */
  box: string;
  cause: string;
  remedy: string;
}

/** Output about one box, on standard error. */
export interface Line {
  /** Its place among all of the run. */
  readonly row: number;
  starts(what: string): void;
  /** `box`: the text comes from the box, and is marked so. */
  says(text: string, box?: true): void;
  waits(what: string): void;
  done(nothing: boolean, why?: string): void;
  failed(
    message: string,
    change: Change | undefined,
    output: string | undefined,
    again: string,
    problems?: readonly Problem[],
  ): void;
}

/** Shows nothing. */
export const silent: Line = { row: 0, starts() {}, says() {}, waits() {}, done() {}, failed() {} };

/** Text from a box, made safe for a terminal: without secrets, control and bidirectional characters. */
export const forTerminal = (text: string): string =>
  redacted(text).replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (c) => (c === "\n" || c === "\t" ? c : " "));

/** Longer texts are cut to this many characters, since redaction takes time. */
const MUCH = 100_000;

/** Longer lines are cut to this many characters. */
const LINE = 2000;

/**
 * Can a spinner be shown: on a terminal with a known width (ora divides by it), without NO_COLOR? @see
 * https://no-color.org
 */
export const canSpin = (
  { isTTY, columns }: { isTTY?: boolean; columns?: number },
  env: Record<string, string | undefined>,
): boolean => Boolean(isTTY && columns && !env.NO_COLOR && env.TERM !== "dumb");

/** Gives each box its line. */
export async function watch(boxes: readonly { name: string; line: Line }[]): Promise<void> {
  const ui = await report(boxes.map(({ name }) => name));
  for (const box of boxes) box.line = ui.line(box.name);
}

/** When the run began to report: it may have parts with reports of their own. */
let began: number | undefined;
let rows = 0;

/** A spinner for a single box on a terminal; otherwise plain lines, each with its box's name. */
export async function report(names: readonly string[]): Promise<{ line(name: string): Line }> {
  const width = Math.max(...names.map((name) => name.length));
  began ??= Date.now();
  const start = began;
  const seconds = () => `${((Date.now() - start) / 1000).toFixed(1)} s`;
  const alone = names.length === 1 && canSpin(process.stderr, process.env);
  const ora = alone ? (await import("ora")).default : undefined;
  const write = (name: string, text: string) => {
    // Continuation lines come from the box, and must not look like ours.
    for (const [i, row] of forTerminal(text.slice(0, MUCH)).split("\n").entries())
      process.stderr.write(
        `${name.padEnd(width)}  ${i ? "  | " : ""}${row.length > LINE ? `${row.slice(0, LINE)}…` : row}\n`,
      );
  };

  return {
    line(name) {
      let spinner: Ora | undefined;
      let last = "";
      const show = (text: string) => {
        if (!ora) return write(name, text);
        last = text;
        spinner ??= ora({ stream: process.stderr }).start();
        spinner.text = forTerminal(`${name}: ${text}`).replaceAll("\n", " ");
      };
      const finish = () => {
        if (spinner && last) spinner.succeed();
        spinner = undefined;
      };
      return {
        row: ++rows,
        starts(what) {
          finish();
          show(what);
        },
        says(text, box) {
          if (spinner) spinner.text = forTerminal(`${name}: ${last} (${text})`).replaceAll("\n", " ");
          else write(name, `  ${box ? "| " : ""}${text}`);
        },
        waits: (what) => show(`waits for ${what}`),
        done(nothing, why) {
          finish();
          write(name, `${nothing ? "nothing to do" : `done in ${seconds()}`}${why ? `: ${why}` : ""}`);
        },
        failed(message, change, output, again, problems = []) {
          spinner?.fail();
          spinner = undefined;
          write(name, `FAILED after ${seconds()}: ${message}`);
          const rows = redacted(output ?? "")
            .trim()
            .split("\n")
            .filter(Boolean);
          // Of a line that was overwritten (dpkg's progress) the last text.
          for (const row of rows.slice(-30)) write(name, `  | ${row.trimEnd().split("\r").at(-1)}`);
          if (change) {
            const command = change.sh.trim().split("\n");
            write(name, "  command:");
            for (const row of command.slice(0, 8)) write(name, `  $ ${row}`);
            if (command.length > 8)
              write(name, `  $ … (${command.length - 8} lines more: PRINT=1 shows them)`);
          }
          for (const { box, cause, remedy } of problems) {
            write(name, `  cause: ${box}: ${cause}`);
            write(name, `     do: ${remedy}`);
          }
          write(name, `  again: ${again}`);
        },
      };
    },
  };
}

#!/usr/bin/env -S node --import tsx
/**
 * The pictures of README.md, from a real run: `make -j up` and `make check` in a lab of three boxes, on a terminal.
 * K3S_BIN names a real k3s to run in place of the stand-in.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { availableParallelism, loadavg } from "node:os";
import { join, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { parse } from "dotenv";
import { down, k3sVersion, type Lab, up } from "./lab/lab.ts";

const COLUMNS = 100;
/** By the number that a terminal is given for them. */
const COLOURS: Record<number, string> = {
  31: "#ff7b72",
  32: "#7ee787",
  36: "#76e3ea",
  39: "#e6edf3",
  90: "#8b949e",
};

export interface Span {
  text: string;
  /** A key of COLOURS; 39 is the usual one. */
  colour: number;
  bold: boolean;
}

/** What stands on a terminal after this was written to it, line by line. What it does not know is refused. */
export function screen(written: string, columns = COLUMNS): Span[][] {
  const rows: Span[][] = [[]];
  let [x, y, colour, bold] = [0, 0, 39, false];
  const row = (n: number) => {
    while (rows.length <= n) rows.push([]);
    return rows[n] as Span[];
  };
  // biome-ignore lint/suspicious/noControlCharactersInRegex: that is what is read
  for (const [all, words = "", verb] of written.matchAll(/\x1b\[([\d;?]*)([A-Za-z])|./gsu)) {
    const unknown = () => new Error(`The terminal was sent ${JSON.stringify(all)}, which is not known here`);
    const n = Number(words || 1);
    if (verb === "m")
      for (const code of words.split(";").map(Number))
        if (code === 0) [colour, bold] = [39, false];
        else if (code === 1 || code === 22) bold = code === 1;
        else if (COLOURS[code]) colour = code;
        else throw unknown();
    else if (verb === "A" && n) y = Math.max(0, y - n);
    else if (verb === "G" && n) x = n - 1;
    else if (verb === "K" && /^[02]?$/.test(words)) row(y).splice(words === "2" ? 0 : x);
    // Cursor hidden or shown, output held back or not.
    else if (/[hl]/.test(verb ?? "") && /^\?(25|2026)$/.test(words)) continue;
    else if (all === "\r") x = 0;
    else if (all === "\n") row(++y);
    else if (/^\P{C}$/u.test(all)) {
      if (x === columns) [x, y] = [0, y + 1];
      while (row(y).length < x) row(y).push({ text: " ", colour: 39, bold: false });
      row(y)[x++] = { text: all, colour, bold };
    } else throw unknown();
  }
  if (!rows.at(-1)?.length) rows.pop();
  return rows.map(joined);
}

/** Neighbours that look alike, as one. */
function joined(cells: Span[]): Span[] {
  const spans: Span[] = [];
  for (const cell of cells) {
    const last = spans.at(-1);
    if (last?.colour === cell.colour && last.bold === cell.bold) last.text += cell.text;
    else spans.push({ ...cell });
  }
  return spans;
}

/** An SVG of these lines below the command, readable on a light page and on a dark one. */
export function picture(command: string, lines: Span[][]): string {
  const prompt: Span[] = [
    { text: "$ ", colour: 90, bold: false },
    { text: command, colour: 39, bold: true },
  ];
  const rows = [prompt, ...lines];
  const lengths = rows.map((spans) => spans.reduce((sum, { text }) => sum + text.length, 0));
  // The advance of most monospaced fonts is 0.6 em; none is much wider.
  const width = Math.ceil(Math.max(...lengths) * 13 * 0.61) + 40;
  const height = rows.length * 19 + 34;
  const escaped = (text: string) =>
    text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const tspan = ({ text, colour, bold }: Span) =>
    colour === 39 && !bold
      ? escaped(text)
      : `<tspan fill="${COLOURS[colour]}"${bold ? ' font-weight="bold"' : ""}>${escaped(text)}</tspan>`;
  const texts = rows.map((spans, i) =>
    spans.length
      ? `<text x="20" y="${i * 19 + 30}" xml:space="preserve">${spans.map(tspan).join("")}</text>\n`
      : "",
  );
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" role="img" font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace" font-size="13" fill="${COLOURS[39]}">
<title>${escaped(command)}</title>
<rect x="0.5" y="0.5" width="${width - 1}" height="${height - 1}" rx="8" fill="#161b22" stroke="#30363d"/>
${texts.join("")}</svg>
`;
}

/** The command as the lab's operator ran it on a terminal. */
async function taken(lab: Lab, command: string): Promise<string> {
  const run = ["script", "-qec", `stty cols ${COLUMNS} && exec ${command}`, "/dev/null"];
  const { exitCode, stdout } = await lab.op(run, { env: { TERM: "xterm-256color" }, timeout: 1800 });
  console.error(stdout);
  if (exitCode) throw new Error(`${command} ended with ${exitCode}: no picture of that`);
  const svg = picture(command, screen(stdout));
  const secret = parse(readFileSync(lab.envFile)).K3S_TOKEN?.split(":").at(-1);
  for (const word of [secret, lab.dir, join(import.meta.dirname, "..")])
    if (word && svg.includes(word)) throw new Error(`${command} shows the token, or a path of this machine`);
  return svg;
}

async function main() {
  const k3sBin = process.env.K3S_BIN && resolve(process.env.K3S_BIN);
  const version = k3sBin && `K3S_VERSION=${await k3sVersion(k3sBin)}\n`;
  const name = "pictures";
  try {
    const lab = await up({ name, ...(k3sBin ? { k3sBin } : {}) }, console.error);
    const { plain, github } = lab.mirror;
    const settings = `SERVER=a1\nAGENTS="b1 b2"\nK3S_MIRRORS="${plain} ${github}"\n${version ?? ""}`;
    writeFileSync(lab.envFile, settings, { mode: 0o600 });
    const upSvg = await taken(lab, "make -j up");
    // The boxes show this machine's load as theirs, in red where it is high: as it is after `make -j up`.
    for (let n = 0; n < 120 && (loadavg()[0] ?? 0) > availableParallelism() * 1.5; n++) await sleep(5000);
    const checkSvg = await taken(lab, "make check");
    writeFileSync(join(import.meta.dirname, "pictures/up.svg"), upSvg);
    writeFileSync(join(import.meta.dirname, "pictures/check.svg"), checkSvg);
  } finally {
    await down(name);
  }
}

if (process.argv[1] === import.meta.filename) await main();

import assert from "node:assert/strict";
import { test } from "node:test";
import { picture, type Span, screen } from "./pictures.ts";

/** A line's text; what is coloured is in brackets behind its number, what is bold behind a *. */
const shown = (spans: Span[]) =>
  spans
    .map(({ text, colour, bold }) => (colour === 39 && !bold ? text : `${bold ? "*" : ""}${colour}[${text}]`))
    .join("");

const CASES: [what: string, written: string, lines: string[]][] = [
  ["plain lines", "a\r\n\r\nb\r\n", ["a", "", "b"]],
  ["a last line without a newline", "a\r\nb", ["a", "b"]],
  [
    "colours and bold",
    "\x1b[31mred\x1b[0m \x1b[1mbold\x1b[22m \x1b[1;32mboth\x1b[39m",
    ["31[red] *39[bold] *32[both]"],
  ],
  ["a line that is overwritten", "12345\rab", ["ab345"]],
  ["a line that is erased after the cursor", "12345\rab\x1b[K", ["ab"]],
  [
    "a spinner that ends with its mark",
    "\x1b[?25l\x1b[36m⠋\x1b[39m a1: waits\x1b[1G\x1b[2K\x1b[32m✔\x1b[39m a1\r\n\x1b[?25h",
    ["32[✔] a1"],
  ],
  ["a spinner of two lines", "one\r\ntwo\x1b[1G\x1b[2K\x1b[1A\x1b[2Kdone\r\n", ["done"]],
  ["a line longer than the terminal is wide", "12345678901234567", ["123456789012345", "67"]],
  ["a line as long as the terminal is wide", "123456789012345\r\na", ["123456789012345", "a"]],
];
for (const [what, written, lines] of CASES)
  test(`a picture shows the final content of the terminal: ${what}`, () =>
    assert.deepEqual(screen(written, 15).map(shown), lines));

test("a picture with an unsupported escape sequence is refused, and the sequence is named", () => {
  for (const unknown of [
    "\x1b[4m",
    "\x1b[2J",
    "\x1b[1K",
    "\x1b[3;4H",
    "\x1b]0;title\x07",
    "\x07",
    "\t",
    "\x1b[?1049h",
    "\x1b",
  ])
    assert.throws(
      () => screen(`a${unknown}b`, 10),
      /The terminal was sent ".+", which is not known here/,
      JSON.stringify(unknown),
    );
});

test("a picture begins with the command, keeps spaces, and escapes markup", () => {
  const svg = picture("make <x>", screen("a  b & \x1b[1;31m<c>\x1b[0m\r\n\r\nd"));
  assert.match(svg, /<title>make &lt;x&gt;<\/title>/);
  assert.deepEqual(svg.match(/(?<=<text [^>]*xml:space="preserve">).*(?=<\/text>)/g), [
    '<tspan fill="#8b949e">$ </tspan><tspan fill="#e6edf3" font-weight="bold">make &lt;x&gt;</tspan>',
    'a  b &amp; <tspan fill="#ff7b72" font-weight="bold">&lt;c&gt;</tspan>',
    "d",
  ]);
});

test("a picture is as wide as its longest line, and as high as it has lines", () => {
  const size = (text: string) =>
    /width="(\d+)" height="(\d+)"/
      .exec(picture("x", screen(text)))
      ?.slice(1)
      .map(Number);
  const [width, height] = size("1234567890") as [number, number];
  assert.deepEqual(size("1234567890\r\n\r\n123"), [width, height + 38]);
  assert.ok((size("12345678901234567890") as [number, number])[0] > width + 60);
});

/** The little of Markdown that briefs and tasks use, as elements; everything else stays the text that it is. */
import { h } from "./dom.js";

const MOST = 60_000; // characters
const FENCE = /^\s*(```|~~~)/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const LISTED = /^\s*(?:[-*+]|\d+[.)])\s+/;
const INDENTED = /^(?: {4}|\t)/;
const TABLE = /^\|/;

/** Kinds of blocks, the first that fits a line takes it: the lines that belong to it, and what becomes of them. */
const BLOCKS = [
  { begins: FENCE, take: (lines) => 1 + until(lines.slice(1), FENCE) + 1, show: (lines) => code(inside(lines)) },
  { begins: HEADING, take: () => 1, show: ([line]) => heading(line) },
  { begins: LISTED, take: (lines) => whileIts(lines, LISTED), show: list },
  { begins: TABLE, take: (lines) => whileIts(lines, TABLE), show: code },
  { begins: INDENTED, take: (lines) => whileIts(lines, INDENTED), show: code },
  { begins: /\S/, take: paragraph, show: (lines) => h("p", null, inline(lines.join("\n"))) },
];

/** @param {string} text */
export function markdown(text) {
  const blocks = [];
  let lines = text.slice(0, MOST).split(/\r?\n/);
  while (lines.length) {
    const block = BLOCKS.find(({ begins }) => begins.test(lines[0]));
    const number = block?.take(lines) ?? 1;
    if (block) blocks.push(block.show(lines.slice(0, number)));
    lines = lines.slice(number);
  }
  return h("div.prose", { dir: "auto" }, blocks);
}

function until(lines, form) {
  const found = lines.findIndex((line) => form.test(line));
  return found < 0 ? lines.length : found;
}

const whileIts = (lines, form) => until(lines, { test: (line) => !form.test(line) });

function paragraph(lines) {
  const other = (line) => !line.trim() || BLOCKS.slice(0, 4).some(({ begins }) => begins.test(line));
  return Math.max(1, until(lines, { test: other }));
}

const inside = (lines) => lines.slice(1, FENCE.test(lines.at(-1)) && lines.length > 1 ? -1 : undefined);
function code(lines) {
  return h("pre.text", { tabindex: "0" }, lines.map((line) => line.replace(INDENTED, "")).join("\n"));
}

function list(lines) {
  const items = lines.map((line) => h("li", null, inline(line.replace(LISTED, ""))));
  return h("ul.bullets", null, items);
}

function heading(line) {
  const [, signs, words] = HEADING.exec(line);
  return h(signs.length < 3 ? "h2" : "h3", null, inline(words));
}

const inline = (text) =>
  text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((part, number) => {
    if (number % 2 === 0) return part;
    return part.startsWith("`") ? h("code", null, part.slice(1, -1)) : h("strong", null, part.slice(2, -2));
  });

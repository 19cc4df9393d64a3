/** Terminal output as text and safe colours: of escape codes only those that colour are kept, as classes. */
import { visible } from "./format.js";

const CONTROL = /\x1b\[([0-9;:?<=>!]*)[ -/]*([@-~])|\x9b[0-9;?]*[@-~]/; // colours are among these
const STRING = /\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[PX^_][^\x1b]*(?:\x1b\\)?/; // titles, links
const OTHER = /\x1b[ -/]*[0-~]?/;
const CODES = new RegExp([CONTROL, STRING, OTHER].map((form) => form.source).join("|"), "g");
const NAMES = { 1: "bold", 2: "dim", 3: "italic", 4: "underlined" };
const COLOURS = ["black", "red", "green", "yellow", "blue", "magenta", "cyan", "white"];

/** Without any escape code. */
export const plain = (text) => text.replace(CODES, "");

/** What a terminal shows of a line that is written over: what follows the last carriage return. */
export function overwritten(line) {
  const text = line.endsWith("\r") ? line.slice(0, -1) : line;
  return text.slice(text.lastIndexOf("\r") + 1);
}

/**
 * The pieces of a text with the classes of each. `style` is what held before it, and is changed to what holds after.
 * @param {string} text @param {{colour: string, marks: Set<string>}} style
 * @returns {Array<[string, string]>}
 */
export function pieces(text, style) {
  const found = [];
  let from = 0;
  for (const code of text.matchAll(CODES)) {
    if (code.index > from) found.push([visible(text.slice(from, code.index)), classes(style)]);
    from = code.index + code[0].length;
    if (code[2] === "m") apply(code[1], style);
  }
  if (from < text.length) found.push([visible(text.slice(from)), classes(style)]);
  return found;
}

export const fresh = () => ({ colour: "", marks: new Set() });

const classes = ({ colour, marks }) => [colour, ...marks].filter(Boolean).join(" ");

function apply(parameters, style) {
  const numbers = parameters.split(/[;:]/).map(Number);
  for (let place = 0; place < numbers.length; place++) {
    const number = numbers[place];
    if (number === 0) Object.assign(style, fresh());
    else if (number === 38 || number === 48)
      place += numbers[place + 1] === 5 ? 2 : 4; // one of 256, or of all
    else if (number === 39) style.colour = "";
    else if (number === 22) ["bold", "dim"].forEach((name) => style.marks.delete(name));
    else if (number === 23 || number === 24) style.marks.delete(NAMES[number - 20]);
    else if (NAMES[number]) style.marks.add(NAMES[number]);
    else if ((number >= 30 && number <= 37) || (number >= 90 && number <= 97))
      style.colour = `ansi-${COLOURS[number % 10]}`;
  }
}

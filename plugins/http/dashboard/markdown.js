/** The little of Markdown that briefs and tasks use, as elements; everything else stays the text that it is. */
import { h } from "./dom.js";

const MOST = 60_000; // characters

/** @param {string} text */
export function markdown(text) {
  const blocks = [];
  const lines = text.slice(0, MOST).split(/\r?\n/);
  for (let number = 0; number < lines.length;) {
    const take = (fits) => {
      const from = number;
      while (number < lines.length && fits(lines[number])) number++;
      return lines.slice(from, number);
    };
    const line = lines[number];
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    if (/^\s*(```|~~~)/.test(line))
      blocks.push(
        fenced(
          () => lines[++number],
          () => number++,
        ),
      );
    else if (heading) (blocks.push(h(heading[1].length < 3 ? "h2" : "h3", null, inline(heading[2]))), number++);
    else if (!line.trim()) number++;
    else if (LISTED.test(line))
      blocks.push(
        h(
          "ul.bullets",
          null,
          take((next) => LISTED.test(next)).map((item) => h("li", null, inline(item.replace(LISTED, "")))),
        ),
      );
    else if (line.startsWith("|"))
      blocks.push(h("pre.text", { tabindex: "0" }, take((next) => next.startsWith("|")).join("\n")));
    else
      blocks.push(
        h("p", null, inline(take((next) => next.trim() && !BREAKS.test(next)).join("\n") || lines[number++])),
      );
  }
  return h("div.prose", { dir: "auto" }, blocks);
}

const LISTED = /^\s*(?:[-*+]|\d+[.)])\s+/;
const BREAKS = /^\s*(?:[-*+]|\d+[.)])\s+|^#{1,6}\s|^\s*(```|~~~)|^\|/;

function fenced(next, close) {
  const kept = [];
  for (let line = next(); line !== undefined && !/^\s*(```|~~~)/.test(line); line = next()) kept.push(line);
  close();
  return h("pre.text", { tabindex: "0" }, kept.join("\n"));
}

const inline = (text) =>
  text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((part, number) => {
    if (number % 2 === 0) return part;
    return part.startsWith("`") ? h("code", null, part.slice(1, -1)) : h("strong", null, part.slice(2, -2));
  });

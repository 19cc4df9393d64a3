/** Data of others as indented text. Keys such as `__proto__` are keys like any other. */
import { h } from "./dom.js";
import { ExactNumber } from "./api.js";
import { bytes } from "./format.js";

const SHOWN = 20_000; // characters before one has to ask for more

/** @param {any} value @returns {string} */
export function written(value, indent = "") {
  if (value instanceof ExactNumber) return value.source;
  if (value === null || typeof value !== "object") return JSON.stringify(value) ?? "null";
  const deeper = `${indent}  `;
  const rows = Array.isArray(value)
    ? value.map((item) => written(item, deeper))
    : Object.keys(value).map((key) => `${JSON.stringify(key)}: ${written(value[key], deeper)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return rows.length ? `${open}\n${rows.map((row) => deeper + row).join(",\n")}\n${indent}${close}` : open + close;
}

/** Text in a frame: its beginning, and all of it on demand. */
export function longText(text, name = "pre.text") {
  const frame = h(name, { tabindex: "0", dir: "auto" }, text.slice(0, SHOWN));
  if (text.length <= SHOWN) return frame;
  const more = h("button.more", { type: "button" }, `Show all ${bytes(text.length)}`);
  const box = h("div.long", null, frame, more);
  more.addEventListener("click", () => {
    frame.textContent = "";
    frame.append(...h("div", null, text).childNodes);
    more.remove();
    frame.focus();
  });
  return Object.assign(box, { $own: true, $source: text });
}

export const json = (value) => longText(written(value), "pre.json");

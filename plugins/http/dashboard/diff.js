/** Git's difference, file by file, as text nodes with a class a line. A file is drawn when it is unfolded. */
import { h, owned } from "./dom.js";
import { count } from "./format.js";

const OPEN_LINES = 400; // of files that are unfolded at first, together
const LINE = 2000;

/**
 * An element that lives on by itself.
 * @param {{diff: string, truncated: boolean, base?: string, reason?: string | null}} answer
 */
export function diffView({ diff, truncated, base, reason }) {
  const files = split(diff ?? "");
  let room = OPEN_LINES;
  return owned(
    h(
      "div.diff",
      null,
      base && h("p.faint", null, base),
      reason && h("p.faint", null, reason),
      files.map((file) => {
        room -= file.lines.length;
        return fileView(file, room >= 0);
      }),
      truncated && h("p.faint", null, "It is longer than what is shown: see git diff."),
    ),
  );
}

/** @returns {Array<{path: string, lines: string[], added: number, removed: number}>} */
export function split(diff) {
  const files = [];
  for (const line of diff.split("\n")) {
    if (line.startsWith("diff --git ") || !files.length)
      files.push({ path: "", lines: [], added: 0, removed: 0, inHunk: false });
    const file = files.at(-1);
    if (line.startsWith("@@")) file.inHunk = true;
    if (file.inHunk) {
      file.lines.push(line);
      if (line.startsWith("+")) file.added++;
      if (line.startsWith("-")) file.removed++;
    } else {
      take(file, line);
    }
  }
  return files.filter((file) => file.path);
}

function take(file, line) {
  const named = /^(?:\+\+\+ (?:"?b\/)|--- (?:"?a\/)|rename to )(.*?)"?\t?$/.exec(line);
  const first = /^diff --git "?a\/.*? "?b\/(.*?)"?$/.exec(line);
  if (named ?? first) file.path = (named ?? first)[1];
  if (/^(new file|deleted file|rename|similarity|Binary|GIT binary|old mode|new mode)/.test(line))
    file.lines.push(line);
}

function fileView(file, open) {
  const body = h("pre", { tabindex: "0" });
  const draw = () => body.childElementCount || body.append(...file.lines.map(lineView));
  if (open) draw();
  const ontoggle = (event) => event.currentTarget.open && draw();
  return h(
    "details.diff-file",
    { open, ontoggle },
    h(
      "summary",
      null,
      h("code", { dir: "auto" }, file.path),
      h("span.added", null, `+${count(file.added)}`),
      h("span.removed", null, `−${count(file.removed)}`),
    ),
    body,
  );
}

function lineView(line) {
  const kind = line.startsWith("@@") ? "hunk" : line.startsWith("+") ? "add" : line.startsWith("-") ? "del" : "same";
  return h(
    `span.${kind}`,
    null,
    line.length > LINE ? `${line.slice(0, LINE)} … ${count(line.length - LINE)} characters more` : line || " ",
  );
}

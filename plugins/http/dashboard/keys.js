/** Keys: one listener, which leaves alone what is typed into fields and dialogs. */
import { can, publish, spawn } from "./actions.js";
import { sheet } from "./dialogs.js";
import { h } from "./dom.js";

const GO = { i: "issues", a: "agents", r: "results", e: "events", p: "approvals", h: "health" };
const HELP = [
  ["g then i, a, r, e, p, h", "Issues, agents, results, events, approvals, health"],
  ["j, k or arrows", "Next and previous row"],
  ["Enter", "Open the row, or unfold it"],
  ["Escape", "Close; back to the list"],
  ["/", "Filter; Escape leads back to the rows"],
  ["n", "Spawn an agent"],
  ["e", "Publish an event"],
  ["a, d", "Approve or deny the request in focus"],
  ["1 to 9", "Answer a question by its choice"],
  ["f", "Follow the log, or pause it"],
  ["?", "These keys"],
];
const SEQUENCE_MS = 1500;

let waiting = 0; // until when `g` waits for its second key

export const help = () =>
  sheet(
    "Keys",
    h(
      "dl.keys",
      null,
      HELP.map(([keys, what]) =>
        h(
          "div",
          null,
          h(
            "dt",
            null,
            keys.split(/( then | to | or |, )/).map((part, number) => (number % 2 ? part : h("kbd", null, part))),
          ),
          h("dd", null, what),
        ),
      ),
    ),
  );

/** @param {() => any} current  the view */
export function listenToKeys(current) {
  document.addEventListener("keydown", (event) => {
    if (
      event.ctrlKey ||
      event.metaKey ||
      event.altKey ||
      event.defaultPrevented ||
      document.querySelector("dialog[open]")
    )
      return;
    if (typing(event)) return;
    const act = deed(event.key, current());
    if (!act) return;
    event.preventDefault();
    act();
  });
}

function typing(event) {
  if (!event.target.matches?.("input, textarea, select")) return false;
  if (event.key === "Escape") {
    event.preventDefault(); // or the browser empties a filter that still holds
    event.target.blur();
  }
  return true;
}

function deed(key, view) {
  if (Date.now() < waiting) {
    waiting = 0;
    if (key in GO) return () => (location.hash = `#/${GO[key]}`);
  }
  if (view?.keys?.[key]) return view.keys[key];
  if (view?.list && (key === "j" || key === "k")) return () => view.list.move(key === "j" ? 1 : -1);
  return {
    g: () => (waiting = Date.now() + SEQUENCE_MS),
    "?": help,
    "/": focusFilter,
    n: can.spawn() && (() => spawn()),
    e: can.publish() && (() => publish()),
    Escape: back,
  }[key];
}

function focusFilter() {
  const field = document.querySelector("[data-filter]");
  field?.focus();
  field?.select();
}

function back() {
  const [, list, id] = location.hash.split("/");
  if (id) location.hash = `#/${list}`;
}

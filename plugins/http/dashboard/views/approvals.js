/** The inbox: what agents ask of a person, in full, and what was answered. */
import { answer } from "../actions.js";
import { confirm, say } from "../dialogs.js";
import { h } from "../dom.js";
import { exact, plural, relative, shortId } from "../format.js";
import { json, longText } from "../json.js";
import { agentLink, at, awaited, badge, empty, foreign, head, issueLink } from "../parts.js";
import { openApprovals, store } from "../store.js";

const WORDS = { approve: "Approve", deny: "Deny" };
const SHOWN = 100; // of those that are over
const FRONT_MS = 500;

// Another page could have somebody click twice at a place, and put this page there before the second click.
let front = performance.now();
addEventListener("focus", () => (front = performance.now()));
const justCame = () => performance.now() - front < FRONT_MS;
const SETTLE_MS = 800; // of which a click may have been meant for what stood there before
let order;
let movedAt;

export function view() {
  [order, movedAt] = ["", -SETTLE_MS];
  const list = { move: step };
  const keys = { a: () => decide("approve"), d: () => decide("deny") };
  for (let number = 1; number <= 9; number++) keys[number] = () => choose(number);
  return { title: "Approvals", list, keys, render };
}

function render() {
  const open = openApprovals();
  watchOrder(open);
  const over = [...store.approvals.values()].filter((approval) => approval.state !== "open").toReversed();
  return [
    head("Approvals", {
      below: open.length > 0 && [
        "No answer in time means no. ",
        h("span.hint-keys", null, "Keys: j and k choose, a approves, d denies, 1 to 9 choose an answer."),
      ],
    }),
    !store.loaded.has("approvals") && awaited("approvals"),
    store.missing.has("approvals") &&
      empty("This service has no approvals", "The plugin approvals is not loaded.", "cco plugins"),
    store.loaded.has("approvals") &&
      !store.missing.has("approvals") &&
      !open.length &&
      empty(
        "Nobody waits for you",
        "What an agent may not do by itself, it asks here, where the service was started so:",
        "cco --agent-approvals ask",
      ),
    h(
      "div.cards",
      { key: "open" },
      open.map((approval) => card(approval)),
    ),
    over.length > 0 &&
      h(
        "section.over",
        { key: "over" },
        h("h2", null, "Answered and over"),
        h("ul.rows", null, over.slice(0, SHOWN).map(past)),
      ),
  ];
}

/** Requests move up when one above them is over. What comes below the others moves none. */
function watchOrder(open) {
  const next = open.map((approval) => approval.approval_id).join(" ");
  if (!next.startsWith(order)) movedAt = performance.now();
  order = next;
}

/** What is asked, in full, with the answers that there are. */
export function card(approval) {
  const { approval_id, kind, text, command, choices, details, until } = approval;
  const id = `asks-${approval_id}`;
  return h(
    "article.card.ask",
    { key: approval_id, tabindex: "0", "data-focus": true, "data-approval": approval_id, "aria-labelledby": id },
    h(
      "p.row-sub",
      null,
      badge("waiting", kind === "question" ? "asks" : "wants approval"),
      agentLink(approval.agent_id),
      approval.issue_id && issueLink(approval.issue_id),
      h("span.faint", null, "asked ", at(approval.asked_at)),
      h("span.faint", { title: exact(until) }, `expires ${relative(until)}`),
    ),
    h("h2", { id, dir: "auto" }, text.length > 600 ? `${text.slice(0, 600)}…` : text),
    text.length > 600 && longText(text),
    command &&
      command !== text &&
      h("div", null, h("p.faint", null, `The command, in full (${extent(command)}):`), longText(command)),
    Object.keys(details ?? {}).length > 0 &&
      h(
        "details.artifact",
        { key: "details", open: true },
        h("summary", null, "What the program says of it"),
        json(details),
      ),
    answers(approval, choices),
  );
}

/** How much there is to read, where all of it is not in sight at once. */
const extent = (text) => `${plural(text.split("\n").length, "line")}, ${plural(text.length, "character")}`;

function answers(approval, options) {
  const send = (text) => (event) => {
    if (justCame()) return say("The page has only just come to the front: look at what is asked, then answer");
    if (event.detail > 0 && performance.now() - movedAt < SETTLE_MS)
      return say("The requests had just moved, so this click answered none: look again, then answer");
    if (event.detail > 1) return; // of a double click the first one counts
    const field = event.currentTarget.closest("article").querySelector("[name=message]");
    answer(approval, text, field?.value);
  };
  if (!options.length) return freeAnswer(approval);
  return h(
    "div.answers",
    null,
    options.map((option, number) =>
      h(
        "button.button",
        {
          type: "button",
          key: option,
          class: option === "approve" ? "primary" : null,
          onclick: send(option),
          "data-answer": option,
        },
        foreign((approval.kind === "approval" && WORDS[option]) || option),
        h("kbd", { "aria-hidden": "true" }, { approve: "a", deny: "d" }[option] ?? (number < 9 ? number + 1 : "")),
      ),
    ),
    h("input.answer-field", {
      name: "message",
      placeholder: "A word to the agent (optional)",
      "aria-label": "A word to the agent",
      autocomplete: "off",
      maxlength: "4000",
    }),
  );
}

function freeAnswer(approval) {
  const onsubmit = (event) => {
    event.preventDefault();
    if (justCame()) return;
    answer(approval, new FormData(event.target).get("answer"));
  };
  return h(
    "form.answers",
    { onsubmit },
    h("input.answer-field", {
      name: "answer",
      required: true,
      placeholder: "Your answer",
      "aria-label": "Your answer",
      autocomplete: "off",
      maxlength: "4000",
    }),
    h("button.button.primary", { type: "submit" }, "Answer"),
  );
}

const past = (approval) =>
  h(
    "li.row.past",
    { key: approval.approval_id },
    h(
      "div.row-state",
      null,
      badge(
        approval.answer === "deny" ? "deny" : approval.state,
        approval.answer && approval.kind === "approval"
          ? { approve: "approved", deny: approval.state === "answered" ? "denied" : approval.state }[approval.answer]
          : approval.state,
      ),
    ),
    h(
      "div.row-main",
      null,
      h("p.past-text", null, foreign((approval.command ?? approval.text).slice(0, 400))),
      h(
        "p.row-sub",
        null,
        agentLink(approval.agent_id),
        approval.issue_id && issueLink(approval.issue_id),
        approval.kind === "question" && approval.answer && h("span", null, "answer: ", foreign(approval.answer)),
        approval.message && h("span.faint", null, foreign(approval.message)),
      ),
    ),
    h("div.row-figures", null, approval.answered_by && h("span", null, "by ", foreign(shortId(approval.answered_by)))),
    h("div.row-when", null, at(approval.answered_at ?? approval.asked_at)),
  );

// -- keys

const cards = () => [...document.querySelectorAll("[data-approval]")];
const focused = () => document.activeElement?.closest("[data-approval]") ?? (cards().length === 1 ? cards()[0] : null);

function step(by) {
  const all = cards();
  const from = all.indexOf(document.activeElement?.closest("[data-approval]"));
  const next = all[Math.max(0, Math.min(all.length - 1, from + by))];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

function chosen() {
  const it = focused() ?? cards()[0];
  if (it && it !== focused()) it.focus();
  return it && store.approvals.get(it.dataset.approval);
}

/** A key is hit by mistake more easily than a button: it asks. */
async function decide(word) {
  const approval = chosen();
  if (!approval?.choices.includes(word)) return;
  const sure = await confirm({
    title: word === "approve" ? "Approve this?" : "Deny this?",
    text: approval.command ?? approval.text,
    action: word === "approve" ? "Approve" : "Deny",
    kind: word === "approve" ? "primary" : "danger",
  });
  if (sure) await answer(approval, word);
}

async function choose(number) {
  const approval = chosen();
  const option = approval?.choices[number - 1];
  if (!option) return;
  const text = `${approval.text}\n\n${option}`;
  if (await confirm({ title: "Send this answer?", text, action: "Send", kind: "primary" }))
    await answer(approval, option);
}

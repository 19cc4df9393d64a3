/** The small things that every view is made of. */
import { h } from "./dom.js";
import { exact, relative, shortId, time } from "./format.js";
import { icon } from "./icons.js";
import { to } from "./router.js";
import { store } from "./store.js";

const TONES = {
  working: "run",
  running: "run",
  starting: "run",
  waiting: "wait",
  open: "off",
  failed: "bad",
  timeout: "bad",
  lost: "bad",
  error: "bad",
  killed: "off",
  stopped: "off",
  done: "good",
  completed: "good",
  success: "good",
  partial: "wait",
  idle: "off",
  expired: "off",
  withdrawn: "off",
  answered: "good",
  approve: "good",
  deny: "bad",
  healthy: "good",
  unhealthy: "bad",
  high: "wait",
  critical: "bad",
  medium: "off",
  low: "off",
  normal: "off",
};
const SIGNS = { run: "●", wait: "◐", bad: "✕", good: "✓", off: "○" };

const SPAWNED = /-[0-9a-f]{12}$/; // how the ids of agents end that the service started

export const tone = (state) => TONES[state] ?? "off";

/** A state as a word, a sign and a colour. */
export const badge = (state, text = state) =>
  h(`span.badge.${tone(state)}`, null, h("span.sign", { "aria-hidden": "true" }, SIGNS[tone(state)]), text);

/** A moment, relative to now; the exact one is its title. */
export const when = (moment) =>
  moment ? h("time", { datetime: moment, title: exact(moment) }, relative(moment)) : h("span.faint", null, "–");

/** A moment as the time of the day. */
export const at = (moment) =>
  h("time.at", { datetime: moment, title: `${exact(moment)} (${relative(moment)})` }, time(moment));

/** Text of others, kept apart from what stands around it. */
export const foreign = (text, name = "bdi") => h(name, { dir: "auto" }, text);

/** Who did it: a link, where that is an agent with a page of its own and not a person, a run or a session. */
export const agentLink = (id, name = shortId(id)) =>
  store.agents.has(id) || SPAWNED.test(id)
    ? h("a.agent-name", { href: to("agents", id), title: id }, foreign(name))
    : h("span.agent-name", { title: id }, foreign(name));
export const issueLink = (id, name = id) => h("a.issue-name", { href: to("issues", id) }, foreign(name));

/** A button with an icon. */
export const button = (text, image, onclick, more = {}) =>
  h("button.button", { type: "button", onclick, ...more }, image && icon(image), h("span", null, text));

/** The head of a view. */
export function head(title, { above, below, state, actions = [] } = {}) {
  return h(
    "header.head",
    { key: "head" },
    h(
      "div.head-words",
      null,
      above && h("p.above", null, above),
      h("h1", { tabindex: "-1" }, foreign(title), state && " ", state && badge(state)),
      below && h("p.below", null, below),
    ),
    h("div.actions", null, actions),
  );
}

/** What is said where there is nothing: what to do next, with the command to type. */
export const empty = (title, text, command) =>
  h(
    "div.empty",
    { key: "empty" },
    h("h2", null, title),
    h("p", null, text),
    command && h("pre.command", { tabindex: "0" }, command),
  );

/** What failed, and how to go on. */
export const problem = (error, again) =>
  h(
    "div.problem",
    { key: "problem", role: "alert" },
    h("strong", null, error.message),
    h("p.faint", null, [error.code, error.requestId].filter(Boolean).join(" · ")),
    again && button("Try again", null, again),
  );

/** What stands in the place of a list that was not read yet: that it comes, or why it does not. */
export const awaited = (name) => (store.failed.has(name) ? problem(store.failed.get(name)) : loading(name));

export const loading = (what) => h("p.loading", { key: "loading" }, `Loading ${what}…`);

/** A filled bar, with its figures beside it. */
export function meter(label, value, limit, show) {
  const share = limit ? Math.min(1, value / limit) : 0;
  const state = share >= 0.95 ? "bad" : share >= 0.8 ? "wait" : "fine";
  const text = limit ? `${show(value)} of ${show(limit)}` : `${show(value)}, no limit`;
  return h(
    "div.meter",
    { key: label },
    h("div.meter-words", null, h("span", null, label), h("span.figures", null, text)),
    h(`progress.${state}`, { value: share, max: 1, "aria-label": label, "aria-valuetext": text }),
  );
}

/** Names and values. Values that are null are left out. */
export const facts = (rows) =>
  h(
    "dl.facts",
    null,
    rows
      .filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== false)
      .map(([name, value]) => h("div", { key: name }, h("dt", null, name), h("dd", null, value))),
  );

/** A field that narrows a list. */
export const filterField = (value, oninput, label) =>
  h("input.filter", {
    type: "search",
    value,
    placeholder: "Filter",
    "aria-label": label,
    "data-filter": true,
    oninput: (event) => oninput(event.target.value),
    spellcheck: "false",
    autocomplete: "off",
  });

/** Choices of which one holds. */
export const choices = (label, options, chosen, choose) =>
  h(
    "div.choices",
    { role: "group", "aria-label": label },
    options.map(([value, text, number]) =>
      h(
        "button",
        { type: "button", key: value, "aria-pressed": String(value === chosen), onclick: () => choose(value) },
        text,
        number !== undefined && h("span.number", null, number),
      ),
    ),
  );

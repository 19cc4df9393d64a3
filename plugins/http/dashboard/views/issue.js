/** An issue: its state, who works on it, and its story. */
import { can, exportIssue, publish, run, spawn, stopRun } from "../actions.js";
import { ApiError, get, part } from "../api.js";
import { plain } from "../ansi.js";
import { h, slot } from "../dom.js";
import { compact, cost, count, plural, shortId } from "../format.js";
import { icon } from "../icons.js";
import { longText, written } from "../json.js";
import { lanes } from "../lanes.js";
import { VirtualList } from "../list.js";
import { markdown } from "../markdown.js";
import {
  agentLink,
  badge,
  button,
  choices,
  empty,
  filterField,
  foreign,
  head,
  loading,
  problem,
  when,
} from "../parts.js";
import { to } from "../router.js";
import { lacks, store } from "../store.js";
import { storyRow } from "./story.js";

const PAGE = 1000;
const PAGES = 20; // that are read at once; what follows them comes with the next change
const SETTLE_MS = 300; // changes that come together are read once
const LABELS = {
  spawned: "starts",
  event: "events",
  result: "results",
  routing: "routing",
  approval: "approvals",
  ended: "ends",
};

let latestFirst = false; // as it was left, for every issue

export function view(id, { draw }) {
  const now = { issue: null, entries: [], open: new Set(), filter: "", kind: "", loaded: false };
  const toggle = (entry) => {
    now.open[now.open.has(entry) ? "delete" : "add"](entry);
    draw();
  };
  const list = new VirtualList({
    label: "Timeline",
    key: ({ entry }) => entry.id,
    estimate: 58,
    row: ({ entry, beside, columns }) => storyRow(entry, beside, columns, now.open.has(entry.id), toggle),
  });
  const look = () => read(id, now).then(draw);
  const soon = () =>
    (now.timer ||= setTimeout(() => {
      now.timer = 0;
      look();
    }, SETTLE_MS));
  const set = (change) => {
    Object.assign(now, change);
    draw();
  };
  return {
    title: id,
    list,
    attach: look,
    stop: () => {
      clearTimeout(now.timer);
      list.detach();
    },
    heard: (names) => {
      const signs = signsOf(id);
      if (signs !== now.signs || (now.run?.state === "running" && names.has("agents"))) soon();
      now.signs = signs;
    },
    drawn: () => list.set(rows(now)),
    render: () => [top(id, now), task(now), runCard(now), body(id, now, list, set, look)],
  };
}

/** What changes when something happens on an issue. */
function signsOf(id) {
  const { state, waiting_for_people, run, last_at } = store.issues.get(id) ?? {};
  const agents = [...store.agents.values()].filter((agent) => agent.issue_id === id);
  return JSON.stringify([
    store.latest.get(id),
    [state, waiting_for_people, run, last_at],
    agents.map((agent) => [agent.agent_id, agent.state]),
  ]);
}

/** The issue and its timeline: what is new of it, or all, as far as one page goes. */
async function read(id, now) {
  try {
    if (lacks("GET /api/issues/{issue_id}/timeline"))
      throw new ApiError(404, {
        message: "This service tells no stories of issues: the plugin that makes them is not loaded (cco plugins)",
      });
    now.issue = await get(`/api/issues/${part(id)}`);
    let since = now.entries.length >= PAGE ? now.cursor : "earliest"; // what is short is read whole, as entries change
    const found = new Map(since === "earliest" ? [] : now.entries.map((entry) => [entry.id, entry]));
    for (let pages = 0, more = true; more && pages < PAGES; pages++) {
      const answer = await get(`/api/issues/${part(id)}/timeline`, { since, limit: PAGE });
      for (const entry of answer.entries) {
        const name = `${entry.kind} ${entry.id}`;
        found.set(name, { ...entry, id: name, issue_id: id });
      }
      more = answer.has_more;
      since = now.cursor = answer.next_cursor;
    }
    now.entries = [...found.values()];
    if (now.issue.run && can.run()) now.run = await get(`/api/runs/${part(now.issue.run.run_id)}`);
    now.failed = null;
  } catch (error) {
    now.failed = error;
  }
  now.loaded = true;
}

function top(id, now) {
  const issue = now.issue ?? store.issues.get(id) ?? { issue_id: id };
  const running = issue.run?.state === "running" && issue.run;
  return head(issue.title || id, {
    above: [
      h("a", { href: to("issues") }, "Issues"),
      issue.title && [" / ", h("span.id", null, foreign(id))],
      issue.source && ` · ${issue.source}`,
    ],
    below: figures(issue),
    actions: [
      can.run() &&
        (running
          ? button("Stop run", "stop", () => stopRun({ ...running, issue_id: id }), { class: "danger" })
          : button("Run", "play", () => run(issue), { disabled: !now.loaded })),
      can.publish() && button("Publish", "send", () => publish(id)),
      !lacks("GET /api/issues/{issue_id}/export") && exportMenu(id),
      can.spawn() && button("Spawn agent", "plus", () => spawn(id), { class: "primary" }),
    ],
  });
}

function figures(issue) {
  const parts = [
    issue.state && badge(issue.state),
    issue.working?.map((agent) =>
      h("span.chip.run", { key: agent.agent_id }, agentLink(agent.agent_id, agent.agent_type)),
    ),
    issue.waiting_for_people > 0 &&
      h(
        "a.asks",
        { href: to("approvals") },
        `${plural(issue.waiting_for_people, "request waits", "requests wait")} for you`,
      ),
    issue.last_at && h("span", null, "last activity ", when(issue.last_at)),
    (issue.cost_usd ?? null) !== null && h("span", null, cost(issue.cost_usd)),
    issue.tokens > 0 && h("span", null, `${compact(issue.tokens)} tokens`),
  ];
  return h("span.row-sub", null, parts);
}

function exportMenu(id) {
  const item = (text, format) =>
    h(
      "button",
      {
        type: "button",
        onclick: (event) => {
          event.currentTarget.closest("details").open = false;
          exportIssue(id, format);
        },
      },
      text,
    );
  return h(
    "details.menu",
    { key: "export", onkeydown: (event) => event.key === "Escape" && (event.currentTarget.open = false) },
    h("summary.button", null, icon("export"), "Export"),
    h("div.menu-items", null, item("Markdown, to read", "markdown"), item("JSON, whole", "json")),
  );
}

const task = (now) =>
  now.issue?.body &&
  h("details.card.task", { key: "task" }, h("summary", null, h("strong", null, "Task")), markdown(now.issue.body));

/** What the latest run of the pipeline has printed. */
const runCard = ({ run }) =>
  run &&
  h(
    "details.card.task",
    { key: "run" },
    h(
      "summary",
      null,
      h("strong", null, "Run "),
      badge(run.state),
      " ",
      h("span.faint", null, foreign(run.reason ?? "")),
    ),
    longText(run.lines.map(plain).join("\n") || "It has printed nothing yet."),
  );

function body(id, now, list, set, look) {
  if (now.failed?.status === 404 && now.failed.code === "REQ_002" && !now.entries.length) {
    return [
      empty(
        "Nothing is known of this issue here",
        "Spawn an agent on it, or let the pipeline work on it:",
        `cco run --issue ${/^[\w.-]+$/.test(id) ? id : "ISSUE"} --task 'what is to be done'`,
      ),
    ];
  }
  if (now.failed && !now.entries.length) return problem(now.failed, look);
  if (!now.loaded) return loading("the story");
  if (!now.entries.length)
    return empty(
      "Nothing has happened yet",
      "Spawn an agent, or let the pipeline work on it:",
      `cco run --issue ${id} --task 'what is to be done'`,
    );
  const shown = rows(now).length;
  return [
    h(
      "div.tools",
      { key: "tools" },
      filterField(now.filter, (filter) => set({ filter }), "Filter the timeline"),
      kinds(now, set),
      h(
        "button.button.order",
        {
          type: "button",
          onclick: () => {
            latestFirst = !latestFirst;
            set({});
          },
          "aria-pressed": String(latestFirst),
        },
        "Latest first",
      ),
    ),
    shown
      ? h("div.rows.story", { key: "rows" }, slot(list.element))
      : empty("None fits", "No entry has these words and this kind."),
  ];
}

function kinds(now, set) {
  const numbers = Map.groupBy(now.entries, (entry) => entry.kind);
  const options = Object.keys(LABELS)
    .filter((kind) => numbers.has(kind))
    .map((kind) => [kind, LABELS[kind], count(numbers.get(kind).length)]);
  return choices("Kind", [["", "all", count(now.entries.length)], ...options], now.kind, (kind) => set({ kind }));
}

function rows(now) {
  const words = now.filter.toLowerCase();
  const fits = (entry) =>
    (!now.kind || entry.kind === now.kind) &&
    (!words ||
      [
        entry.title,
        entry.event_type,
        entry.agent_id,
        shortId(entry.agent_id ?? ""),
        entry.text,
        entry.task,
        written(entry.data ?? ""),
        ...(entry.decisions ?? []),
        ...(entry.next_agents ?? []).map((next) => next.agent_type),
      ]
        .join(" ")
        .toLowerCase()
        .includes(words));
  const entries = withFollowers(now.entries).filter(fits);
  const beside = lanes(entries, new Set(now.issue?.working?.map((agent) => agent.agent_id)));
  const found = entries.map((entry, number) => ({ entry, beside: beside.rows[number], columns: beside.columns }));
  return latestFirst ? found.map(flipped).reverse() : found;
}

/** Entries, of which those that propose agents know which of them were started since. */
function withFollowers(entries) {
  const started = new Set();
  return entries
    .toReversed()
    .map((entry) => {
      if (entry.kind === "spawned") started.add(entry.agent_type);
      return entry.kind === "routing" ? { ...entry, started: new Set(started) } : entry;
    })
    .reverse();
}

const flipped = (item) => ({
  ...item,
  beside: {
    ...item.beside,
    lanes: item.beside.lanes.map((lane) => ({ ...lane, above: lane.below, below: lane.above })),
  },
});

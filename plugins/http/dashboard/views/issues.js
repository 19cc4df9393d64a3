/** Issues: what is worked on, who waits for a person, what went wrong, what it cost. */
import { can, publish, spawn } from "../actions.js";
import { h } from "../dom.js";
import { compact, cost, count, plural } from "../format.js";
import { agentLink, badge, button, choices, empty, foreign, head, when } from "../parts.js";
import { to } from "../router.js";
import { activeAgents, openApprovals, store } from "../store.js";
import { listBody, listView } from "./listing.js";

const STATES = ["waiting", "working", "failed", "open", "idle", "done"];

export const view = (_id, { draw }) =>
  listView({
    title: "Issues",
    name: "issues",
    draw,
    now: { filter: "", state: "" },
    key: (issue) => issue.issue_id,
    row,
    chosen,
    top: (now, set) => [
      head("Issues", { actions: actions() }),
      glance((state) => set({ state: now.state === state ? "" : state }), now.state),
    ],
    choice: stateChoices,
    body,
  });

const actions = () => [
  can.publish() && button("Publish", "send", () => publish()),
  can.spawn() && button("Spawn agent", "plus", () => spawn(), { class: "primary" }),
];

function chosen({ filter, state }) {
  const words = filter.toLowerCase();
  const fits = (issue) =>
    (!state || issue.state === state) &&
    (!words || `${issue.issue_id} ${issue.title ?? ""} ${issue.state}`.toLowerCase().includes(words));
  const activity = (issue) => issue.last_at ?? "";
  return [...store.issues.values()].filter(fits).sort((one, other) => (activity(one) < activity(other) ? 1 : -1));
}

function stateChoices({ state }, set) {
  const numbers = Map.groupBy(store.issues.values(), (issue) => issue.state);
  const options = STATES.filter((name) => numbers.has(name) || name === state).map((name) => [
    name,
    name,
    numbers.get(name)?.length ?? 0,
  ]);
  return choices("State", [["", "all", store.issues.size], ...options], state, (chosen) => set({ state: chosen }));
}

/** The four questions that a person comes with, answered in one line. */
function glance(choose, state) {
  const issues = [...store.issues.values()];
  const failed = issues.filter((issue) => issue.state === "failed").length;
  const worked = issues.filter((issue) => issue.working?.length).length;
  const sum = (name) => issues.reduce((total, issue) => total + (issue[name] ?? 0), 0);
  const [usd, tokens, waiting] = [sum("cost_usd"), sum("tokens"), openApprovals().length];
  const button = (name) => ({
    name: "button",
    type: "button",
    "aria-pressed": String(state === name),
    onclick: () => choose(name),
  });
  const link = (place) => ({ name: "a", href: to(place) });
  return h(
    "div.glance",
    { key: "glance" },
    tile("run", button("working"), count(activeAgents().length), "at work", `on ${plural(worked, "issue")}`),
    tile("wait", link("approvals"), count(waiting), "wait for you", waiting ? "answer now" : "nobody asks"),
    tile("bad", button("failed"), count(failed), "failed", failed ? "see why" : "none"),
    tile(
      "plain",
      link("health"),
      usd ? cost(usd) : compact(tokens || null),
      "spent",
      usd || tokens ? `${compact(tokens)} tokens` : "not reported",
    ),
  );
}

const tile = (kind, { name, ...how }, figure, label, detail) =>
  h(
    `${name}.tile.${kind}`,
    { key: kind, ...how },
    h("span.figure", null, figure),
    h("span.tile-words", null, h("strong", null, label), h("span.faint", null, detail)),
  );

const body = (list, issues) =>
  listBody({
    name: "issues",
    list,
    items: issues,
    kind: ".issues",
    none: "No issue has these words and this state.",
    nothing: () =>
      store.missing.has("issues")
        ? empty(
            "This service has no list of issues",
            "The plugin that makes it is not loaded. Agents, results and events are there.",
            "cco plugins",
          )
        : empty(
            "No issue yet",
            "Spawn an agent on one, which begins it, or let the pipeline work on one:",
            "cco run --issue issue-1 --task 'what is to be done'",
          ),
  });

function row(issue) {
  const agents = issue.agents?.active + issue.agents?.ended;
  return h(
    "div.row.issue",
    null,
    h("div.row-state", null, badge(issue.state)),
    h(
      "div.row-main",
      null,
      h(
        "a.row-link",
        { href: to("issues", issue.issue_id), "data-focus": true },
        foreign(issue.title || issue.issue_id),
      ),
      h(
        "p.row-sub",
        null,
        h("span.id", null, foreign(issue.issue_id)),
        issue.source && h("span.faint", null, issue.source),
        issue.run && issue.run.state === "running" && badge("running", "run"),
        working(issue),
        latest(issue),
      ),
    ),
    h(
      "div.row-figures",
      null,
      agents > 0 && h("span", null, plural(agents, "agent")),
      issue.results > 0 && h("span", null, plural(issue.results, "result")),
      (issue.cost_usd ?? null) !== null
        ? h("span", null, cost(issue.cost_usd))
        : issue.tokens > 0 && h("span", null, `${compact(issue.tokens)} tokens`),
    ),
    h("div.row-when", null, when(issue.last_at)),
  );
}

const working = (issue) =>
  issue.working
    ?.slice(0, 4)
    .map((agent) => h("span.chip.run", { key: agent.agent_id }, agentLink(agent.agent_id, agent.agent_type)));

function latest(issue) {
  if (issue.waiting_for_people)
    return h(
      "span.asks",
      { key: "asks" },
      `${plural(issue.waiting_for_people, "request waits", "requests wait")} for you`,
    );
  if (issue.working?.length) return null;
  const result = issue.latest_result;
  const agent = !result && [...store.agents.values()].findLast((one) => one.issue_id === issue.issue_id);
  const [type, state] = result ? [result.agent_type, result.status] : [agent?.agent_type, agent?.state];
  return type && h("span.faint", { key: "latest" }, "last: ", foreign(type, "span"), ` ${state}`);
}

/** Agents: who lives, what each uses and costs, and who has ended how. */
import { can, spawn } from "../actions.js";
import { plain } from "../ansi.js";
import { h } from "../dom.js";
import { between, bytes, compact, cost, duration, shortId } from "../format.js";
import { badge, button, choices, empty, foreign, head, issueLink, when } from "../parts.js";
import { to } from "../router.js";
import { store } from "../store.js";
import { listBody, listView } from "./listing.js";

const GROUPS = {
  active: ["starting", "running"],
  completed: ["completed"],
  failed: ["failed", "timeout", "lost"],
  ended: ["killed"],
};

export const view = (_id, { draw, query }) =>
  listView({
    title: "Agents",
    name: "agents",
    draw,
    now: { filter: query.get("filter") ?? "", group: "" },
    key: (agent) => agent.agent_id,
    row,
    chosen,
    top: () => [
      head("Agents", { actions: [can.spawn() && button("Spawn agent", "plus", () => spawn(), { class: "primary" })] }),
    ],
    choice: (now, set) => choices("State", groups(), now.group, (group) => set({ group })),
    body,
  });

function groups() {
  const all = [...store.agents.values()];
  const number = (states) => all.filter((agent) => states.includes(agent.state)).length;
  const present = Object.entries(GROUPS).map(([name, states]) => [name, name, number(states)]);
  return [["", "all", all.length], ...present.filter(([name, , size]) => size || name === "active")];
}

function chosen({ filter, group }) {
  const words = filter.toLowerCase();
  const fits = (agent) =>
    (!group || GROUPS[group].includes(agent.state)) &&
    (!words ||
      `${agent.agent_id} ${agent.issue_id} ${agent.state} ${agent.task} ${agent.model ?? ""}`
        .toLowerCase()
        .includes(words));
  const rank = (agent) => (GROUPS.active.includes(agent.state) ? "1" : "0") + agent.started_at;
  return [...store.agents.values()].filter(fits).sort((one, other) => (rank(one) < rank(other) ? 1 : -1));
}

const body = (list, agents) =>
  listBody({
    name: "agents",
    list,
    items: agents,
    none: "No agent has these words and this state.",
    nothing: () =>
      empty(
        "No agent yet",
        "Spawn one here (n), or by the command line:",
        "cco agent spawn --type python-specialist --issue issue-1 --task 'what is to be done'",
      ),
  });

function row(agent) {
  const living = !agent.ended_at;
  return h(
    "div.row.agent",
    null,
    h("div.row-state", null, badge(agent.state)),
    h(
      "div.row-main",
      null,
      h(
        "a.row-link",
        { href: to("agents", agent.agent_id), "data-focus": true, title: agent.agent_id },
        foreign(shortId(agent.agent_id)),
      ),
      h("p.row-sub", null, issueLink(agent.issue_id), saying(agent)),
    ),
    h(
      "div.row-figures",
      null,
      agent.usage &&
        living &&
        h(
          "span",
          { title: "processor time and memory of all its processes" },
          `${duration(agent.usage.cpu_seconds)} · ${bytes(agent.usage.memory_bytes)}`,
        ),
      agent.cost_usd !== null && agent.cost_usd !== undefined
        ? h("span", null, cost(agent.cost_usd))
        : agent.input_tokens > 0 &&
            h("span", null, `${compact(agent.input_tokens + (agent.output_tokens ?? 0))} tokens`),
      h("span", { title: living ? "at work for" : "worked for" }, duration(between(agent.started_at, agent.ended_at))),
    ),
    h("div.row-when", null, when(agent.ended_at ?? agent.started_at)),
  );
}

/** What an agent said last, or why it failed. */
function saying(agent) {
  const text = agent.reason ?? agent.output_tail?.at(-1) ?? agent.task;
  return text && h("span.last-line", null, foreign(plain(text.slice(0, 600))));
}

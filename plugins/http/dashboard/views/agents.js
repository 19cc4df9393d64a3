/** Agents: who lives, what each uses and costs, and who has ended how. */
import { can, spawn } from "../actions.js";
import { plain } from "../ansi.js";
import { h, slot } from "../dom.js";
import { between, bytes, compact, cost, duration, shortId } from "../format.js";
import { VirtualList } from "../list.js";
import { awaited, badge, button, choices, empty, filterField, foreign, head, issueLink, when } from "../parts.js";
import { to } from "../router.js";
import { loadWhole, store } from "../store.js";

const GROUPS = {
  active: ["starting", "running"],
  completed: ["completed"],
  failed: ["failed", "timeout", "lost"],
  ended: ["killed"],
};

export function view(_id, { draw, query }) {
  const list = new VirtualList({
    label: "Agents",
    key: (agent) => agent.agent_id,
    row,
    estimate: 74,
    atEnd: () => loadWhole("agents").catch(() => {}),
  });
  const now = { filter: query.get("filter") ?? "", group: "" };
  const set = (change) => {
    Object.assign(now, change);
    draw();
  };
  return {
    title: "Agents",
    list,
    stop: () => list.detach(),
    drawn: () => list.set(chosen(now)),
    render: () => [
      head("Agents", { actions: [can.spawn() && button("Spawn agent", "plus", () => spawn(), { class: "primary" })] }),
      h(
        "div.tools",
        { key: "tools" },
        filterField(now.filter, (filter) => set({ filter }), "Filter agents"),
        choices("State", groups(), now.group, (group) => set({ group })),
      ),
      body(list, chosen(now)),
    ],
  };
}

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

function body(list, agents) {
  if (store.agents.size === 0) {
    if (!store.loaded.has("agents")) return awaited("agents");
    return empty(
      "No agent yet",
      "Spawn one here (n), or by the command line:",
      "cco agent spawn --type python-specialist --issue issue-1 --task 'what is to be done'",
    );
  }
  if (!agents.length) return empty("None fits", "No agent has these words and this state.");
  return h("div.rows", { key: "rows" }, slot(list.element));
}

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

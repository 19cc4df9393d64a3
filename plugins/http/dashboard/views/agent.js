/** An agent: what it does, says, uses and costs, and what it was told. */
import { can, end } from "../actions.js";
import { get, part, send } from "../api.js";
import { h, slot } from "../dom.js";
import { between, bytes, compact, cost, count, duration, exact, relative, shortId, signalName } from "../format.js";
import { Log } from "../log.js";
import { markdown } from "../markdown.js";
import { agentLink, at, badge, button, choices, facts, head, issueLink, loading, problem } from "../parts.js";
import { to } from "../router.js";
import { lacks, loadAgent, store } from "../store.js";

export function view(id, { draw }) {
  const now = { tab: "log", brief: null, failed: null };
  const log = new Log(id, () => Boolean(store.agents.get(id)?.ended_at));
  const look = () =>
    get(`/api/agents/${part(id)}/status`)
      .then(
        (agent) => store.agents.set(id, agent),
        (error) => (now.failed = error),
      )
      .then(draw);
  const choose = (tab) => {
    now.tab = tab;
    if (tab === "brief" && !now.brief) readBrief(id, now).then(draw);
    draw();
  };
  return {
    title: shortId(id),
    attach: () => {
      look();
      log.start();
    },
    stop: () => log.stop(),
    keys: { f: () => log.toggle() },
    heard: (names) => names.has("live") && loadAgent(id).catch(() => {}),
    render: () => {
      const agent = store.agents.get(id);
      if (!agent) return [head(id, { above: back() }), now.failed ? problem(now.failed, look) : loading("the agent")];
      return [
        top(agent),
        h("div.two", { key: "two" }, h("div.wide", null, tabs(now, choose), page(agent, now, log)), aside(agent)),
      ];
    },
  };
}

const back = () => h("a", { href: to("agents") }, "Agents");

function top(agent) {
  const living = agent.state === "running" || agent.state === "starting";
  return head(shortId(agent.agent_id), {
    above: [back(), " / ", issueLink(agent.issue_id)],
    state: agent.state,
    below: agent.reason ?? h("span.id", null, agent.agent_id),
    actions: [living && can.spawn() && button("End agent", "stop", () => end(agent), { class: "danger" })],
  });
}

const tabs = (now, choose) =>
  choices(
    "What is shown",
    [["log", "Output"], ...(lacks("GET /api/agents/{agent_id}/brief") ? [] : [["brief", "Brief"]]), ["task", "Task"]],
    now.tab,
    choose,
  );

function page(agent, now, log) {
  if (now.tab === "log") return h("div", { key: "log" }, slot(log.element));
  if (now.tab === "task")
    return h(
      "div.card",
      { key: "task" },
      agent.task
        ? markdown(agent.task)
        : h("p.faint", null, "It was given no task of its own: what is known of the issue stands in its brief."),
    );
  if (!now.brief) return loading("the brief");
  return h("div.card", { key: "brief" }, now.brief.text === undefined ? problem(now.brief) : markdown(now.brief.text));
}

async function readBrief(id, now) {
  try {
    const answer = await send("GET", `/api/agents/${part(id)}/brief`, { headers: { Accept: "text/markdown" } });
    now.brief = { text: await answer.text() };
  } catch (error) {
    now.brief = error;
  }
}

const aside = (agent) =>
  h(
    "aside.card.side",
    { "aria-label": "Facts" },
    h("h2", null, "At a glance"),
    facts(life(agent)),
    h("h2", null, "Spent"),
    facts(spent(agent)),
  );

function life(agent) {
  const { result_id, result_status, last_call: call, parent, pid } = agent;
  const usage = agent.ended_at ? null : agent.usage;
  return [
    ["Type", agent.agent_type],
    ["Started", at(agent.started_at)],
    [agent.ended_at ? "Worked" : "Works for", duration(between(agent.started_at, agent.ended_at))],
    ["Ended", agent.ended_at && at(agent.ended_at)],
    ["Exit code", agent.signal ? null : agent.exit_code],
    ["Signal", signalName(agent.signal)],
    ["Result", result_id && h("a", { href: to("results", result_id) }, badge(result_status ?? "success"))],
    ["Processor", usage && duration(usage.cpu_seconds)],
    ["Memory", usage && `${bytes(usage.memory_bytes)} (peak ${bytes(usage.peak_memory_bytes)})`],
    ["Processes", usage && `${count(usage.processes)}${pid ? `, first ${pid}` : ""}`],
    ["Last output", agent.last_output_at && moment(agent.last_output_at)],
    ["Last request", call && h("span", { title: exact(call.at) }, `${call.method} ${call.path}, ${relative(call.at)}`)],
    ["Spawned by", parent && agentLink(parent)],
  ];
}

function spent(agent) {
  const known = (value) => value !== null && value !== undefined;
  const tokens = known(agent.input_tokens) || known(agent.output_tokens);
  return [
    ["Model", agent.model ?? "not told"],
    ["Cost", cost(agent.cost_usd)],
    ["Tokens", tokens ? `${compact(agent.input_tokens)} in, ${compact(agent.output_tokens)} out` : "–"],
    ["From cache", known(agent.cached_tokens) && compact(agent.cached_tokens)],
    ["Requests", agent.requests],
    ["Refused tools", agent.denials],
  ];
}

const moment = (value) => h("time", { datetime: value, title: exact(value) }, relative(value));

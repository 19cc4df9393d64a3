/** Health: whether the service works, what it measures, and how near it is to its limits. */
import { get } from "../api.js";
import { h } from "../dom.js";
import { bytes, compact, cost, count, duration } from "../format.js";
import { switchTheme } from "../nav.js";
import { at, badge, button, facts, head, issueLink, loading, meter, problem } from "../parts.js";
import { store } from "../store.js";

const EVERY_MS = 5000;
const MB = 1_000_000;

export function view(_id, { draw }) {
  const now = { health: null, status: null, failed: null, timer: 0, over: false };
  const look = async () => {
    try {
      if (!document.hidden || !now.health)
        [now.health, now.status] = await Promise.all([get("/health"), get("/status")]);
      now.failed = null;
    } catch (error) {
      now.failed = error;
    }
    if (now.over) return;
    now.timer = setTimeout(look, EVERY_MS);
    draw();
  };
  return {
    title: "Health",
    attach: look,
    stop: () => {
      now.over = true;
      clearTimeout(now.timer);
    },
    render: () => {
      if (!now.status) return [head("Health"), now.failed ? problem(now.failed) : loading("the service's figures")];
      return [
        top(now.health),
        h(
          "div.grid",
          { key: "grid" },
          limits(now.status, now.health),
          checks(now.health),
          work(now.status),
          speed(now.status),
        ),
        spent(now.status),
      ];
    },
  };
}

const top = (health) =>
  head("Health", {
    actions: [button("Light or dark", "theme", switchTheme)],
    state: health.status,
    below: ["Version ", health.version, ", up for ", duration(health.uptime_seconds)],
  });

function limits({ agents, storage, spent: all }, { checks: now }) {
  const bounds = store.info?.limits ?? {};
  const today = new Date().toISOString().slice(0, 10);
  const day = all?.by_day?.[today];
  const { usd = {}, tokens = {} } = bounds.budgets ?? {};
  const used = (row) => (row ? (row.input_tokens ?? 0) + (row.output_tokens ?? 0) - (row.cached_tokens ?? 0) : 0);
  return h(
    "section.card",
    { key: "limits" },
    h("h2", null, "Limits and budgets"),
    meter("Agents at work", agents.active, bounds.max_agents, count),
    meter("Storage", storage.total_size_mb * MB, (storage.limit_mb ?? bounds.storage_limit_mb) * MB || null, bytes),
    !store.more.events &&
      bounds.event_limit &&
      meter("Events kept", Math.min(all ? store.events.length : 0, bounds.event_limit), bounds.event_limit, count),
    (usd.day || day?.cost_usd != null) && meter("Money today", day?.cost_usd ?? 0, usd.day, cost),
    (tokens.day || day) && meter("Tokens today", used(day), tokens.day, compact),
    facts([
      ["Money of an issue", usd.issue && cost(usd.issue)],
      ["Tokens of an issue", tokens.issue && compact(tokens.issue)],
      ["Time of an agent", bounds.agent_timeout_seconds && duration(bounds.agent_timeout_seconds)],
      ["Agents of an issue", bounds.max_agents_per_issue || null],
      ["Free on the disk", bytes(now.disk_space_available_mb * MB)],
    ]),
  );
}

const checks = ({ checks: now, project_id, instance_id }) =>
  h(
    "section.card",
    { key: "checks" },
    h("h2", null, "Checks"),
    facts([
      ["Storage", badge(now.storage)],
      ["Event bus", badge(now.event_bus)],
      ["Project", project_id],
      ["Repository", store.info?.root_name],
      ["Watching", now.watching],
      ["Memory", bytes(now.memory_usage_mb * MB)],
      ["Processor", `${Math.round(now.cpu_usage_percent)} %`],
      ["Instance", h("span.id", null, instance_id)],
      ["Not loaded", store.info?.routes_missing?.length ? store.info.routes_missing.join(", ") : null],
    ]),
  );

const work = ({ agents, storage, events }) =>
  h(
    "section.card",
    { key: "work" },
    h("h2", null, "Work"),
    facts([
      ["Agents spawned", count(agents.spawned_total)],
      ["Completed", count(agents.completed)],
      ["Failed", count(agents.failed)],
      ["Ended by hand", count(agents.killed)],
      ["Mean time of an agent", duration(agents.avg_execution_time_ms / 1000)],
      ["Results stored", count(storage.results_stored)],
      ["Events published", count(events.total_published)],
      ["Events delivered", count(events.total_delivered)],
      ["Who waits now", count(events.active_subscriptions)],
      ["Dead letters", count(events.dead_letter_queue_size)],
    ]),
  );

const speed = ({ performance: figures, storage }) =>
  h(
    "section.card",
    { key: "speed" },
    h("h2", null, "In the last minute"),
    facts([
      ["Requests a second", figures.requests_per_second.toFixed(1)],
      ["Mean answer", `${figures.avg_response_time_ms.toFixed(1)} ms`],
      ["95 of 100 within", `${figures.p95_response_time_ms.toFixed(1)} ms`],
      ["99 of 100 within", `${figures.p99_response_time_ms.toFixed(1)} ms`],
      ["Errors a minute", figures.errors_per_minute.toFixed(1)],
      ["Contexts from the cache", `${Math.round(storage.cache_hit_rate * 100)} %`],
      ["Contexts kept", count(storage.context_cache_entries)],
    ]),
  );

function spent({ spent: all, timestamp }) {
  const rows = Object.entries(all?.by_issue ?? {}).toReversed();
  const none = "No program has reported what it spends. Of the known ones claude, codex, gemini and qwen do.";
  return h(
    "section.card",
    { key: "spent" },
    h("h2", null, "Spent, by issue"),
    rows.length
      ? h("div.table", { tabindex: "0", role: "group", "aria-label": "Spent, by issue" }, table(rows))
      : h("p.faint", null, none),
    h("p.faint", null, "Measured ", at(timestamp)),
  );
}

function table(rows) {
  const names = ["Issue", "Cost", "Tokens in", "Tokens out", "Requests"];
  const heads = names.map((name) => h("th", { scope: "col" }, name));
  const cells = (issue, row) => [
    issueLink(issue),
    cost(row.cost_usd),
    compact(row.input_tokens),
    compact(row.output_tokens),
    count(row.requests),
  ];
  const line = ([issue, row]) =>
    h(
      "tr",
      { key: issue },
      cells(issue, row).map((cell) => h("td", null, cell)),
    );
  return h("table", null, h("thead", null, h("tr", null, heads)), h("tbody", null, rows.map(line)));
}

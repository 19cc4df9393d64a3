/**
 * What is known of the service, kept current by its events. Views read it and are told of changes by name: `issues`,
 * `agents`, `results`, `events`, `approvals`, `info`, `live`, `runs`.
 */
import { get, part } from "./api.js";

const EVENTS_KEPT = 100_000; // as many as the service keeps
const PAGE = 1000;
const AGAIN_MS = 5000; // after a refusal
const TICK_MS = 4000; // a spawn is no event: who works is asked for

export const store = {
  info: null,
  /** @type {Map<string, any>} */ issues: new Map(),
  /** @type {Map<string, any>} */ agents: new Map(),
  /** @type {Map<string, any>} newest last */ results: new Map(),
  /** @type {any[]} by their sequence, newest last */ events: [],
  /** @type {Map<string, any>} */ approvals: new Map(),
  /** @type {Map<string, any>} */ runs: new Map(),
  /** @type {Map<string, string>} the newest event's id, by issue */ latest: new Map(),
  more: { issues: false, agents: false, results: false, events: false },
  missing: new Set(),
  loaded: new Set(),
  /** @type {Map<string, Error>} why a list could not be read last */ failed: new Map(),
};

const known = new Set(); // ids of events
const listeners = new Set();
const pending = new Set();
let telling = 0;
let ticking = 0;
let newestAgent = "earliest";
const due = new Map();
const loading = new Set();

/** @param {(names: Set<string>) => void} listener @returns {() => void} ends it */
export function watch(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

export function changed(...names) {
  for (const name of names) pending.add(name);
  telling ||= setTimeout(tell, 40);
}

function tell() {
  telling = 0;
  const names = new Set(pending);
  pending.clear();
  for (const listener of [...listeners]) listener(names);
}

const LOADS = {
  issues: loadIssues,
  agents: loadAgents,
  results: loadResults,
  approvals: loadApprovals,
  runs: loadRuns,
  events: loadEvents,
};

/**
 * Everything anew, the events excepted that are known. What the service refuses is asked for again later. Raises
 * ApiError where it cannot be reached, or refuses the token.
 */
export async function loadAll() {
  await loadInfo();
  await Promise.all(Object.keys(LOADS).map(loadOrLater));
  clearTimeout(ticking);
  ticking = setTimeout(tick, TICK_MS);
}

async function loadOrLater(name) {
  try {
    await LOADS[name]();
  } catch (error) {
    if (error.status === 0 || error.status === 401) throw error;
    soon(`${name} again`, () => loadOrLater(name), AGAIN_MS);
  }
}

/** Whether this service has no such route, as a plugin is not loaded. */
export const lacks = (route) => store.info?.routes_missing.includes(route) ?? false;

/** A list of the service, or null where it has none such, as the plugin is not loaded. */
async function listed(name, path, query) {
  const missing = lacks(`GET ${path}`);
  store.missing[missing ? "add" : "delete"](name);
  try {
    const answer = missing ? null : await get(path, query);
    store.loaded.add(name);
    store.failed.delete(name);
    return answer;
  } catch (error) {
    store.failed.set(name, error);
    throw error;
  } finally {
    changed(name);
  }
}

export async function loadInfo() {
  const before = store.info?.project_id;
  store.info = await get("/api/dashboard");
  if (before && before !== store.info.project_id) location.reload(); // another project's service has taken the port
}

export async function loadIssues() {
  const answer = await listed("issues", "/api/issues", { limit: PAGE });
  if (!answer) return;
  const whole = store.issues.size > PAGE && !store.more.issues; // older ones were read, and have not changed
  const fresh = answer.issues.map((issue) => [issue.issue_id, issue]);
  store.issues = new Map([...(whole ? store.issues : []), ...fresh]);
  store.more.issues = answer.has_more && !whole;
}

async function loadAgents() {
  const answer = await listed("agents", "/api/agents", { limit: PAGE });
  if (!answer) return;
  store.agents = new Map(answer.agents.map((agent) => [agent.agent_id, agent]));
  store.more.agents = answer.has_more;
  newestAgent = answer.next_cursor ?? "earliest";
}

/** Agents that were spawned since the last look, those that have ended already included. */
async function loadNewAgents() {
  const answer = await listed("agents", "/api/agents", { since: newestAgent, limit: PAGE });
  if (!answer?.agents.length) return;
  for (const agent of answer.agents) store.agents.set(agent.agent_id, agent);
  newestAgent = answer.next_cursor;
  changed("agents");
  soon("issues", loadIssues);
  if (answer.has_more) await loadNewAgents();
}

async function loadResults() {
  const last = [...store.results.keys()].at(-1);
  const answer = await listed("results", "/api/results", { limit: last ? PAGE : 200, since: last });
  if (!answer) return;
  for (const result of answer.results) store.results.set(result.id, result);
  if (!last) store.more.results = answer.has_more;
  else if (answer.has_more) await loadResults();
}

const LISTS = { issues: "issue_id", agents: "agent_id", results: "id" };

/** What a list has before its newest page, all of it. @param {"issues" | "agents" | "results"} name */
async function loadWhole(name) {
  const found = new Map();
  for (let since = "earliest"; since;) {
    const answer = await get(`/api/${name}`, { since, limit: PAGE });
    for (const item of answer[name]) found.set(item[LISTS[name]], item);
    since = answer.has_more ? answer.next_cursor : null;
  }
  store[name] = new Map([...found, ...store[name]]);
  store.more[name] = false;
  changed(name);
}

export async function loadApprovals() {
  const answer = await listed("approvals", "/api/approvals", { limit: 200 });
  if (answer) store.approvals = new Map(answer.approvals.map((approval) => [approval.approval_id, approval]));
}

export async function loadRuns() {
  const answer = await listed("runs", "/api/runs", {});
  if (answer) store.runs = new Map(answer.runs.map((run) => [run.run_id, run]));
}

async function loadEvents() {
  const answer = await listed("events", "/api/events", { limit: PAGE });
  if (!answer) return;
  const last = store.events.at(-1)?.event_id;
  const meets = last && answer.events.some((event) => event.event_id <= last);
  if (!meets) {
    store.events = []; // more happened than one page holds: what is older is read on demand
    known.clear();
    store.more.events = answer.has_more;
  }
  addEvents(answer.events);
}

/**
 * What a list calls while its end is in sight: loads what is older, where there is more, and `then` is called. It is
 * tried again a while after a failure.
 * @param {"issues" | "agents" | "results" | "events"} name @param {() => void} [then]
 */
export function older(name, then = () => {}) {
  let going = false;
  return async () => {
    if (going || !store.more[name]) return;
    going = true;
    try {
      await (name === "events" ? loadOlderEvents() : loadWhole(name));
    } catch {
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
    }
    going = false;
    then();
  };
}

/** The page of events before those that are known. */
async function loadOlderEvents() {
  const [, before, number] = /^(.*-)(\d{12,})$/.exec(store.events[0]?.event_id ?? "") ?? [];
  if (!number || !store.more.events) return;
  const seq = Number(number);
  const since = seq > PAGE + 1 ? before + String(seq - PAGE - 1).padStart(12, "0") : "earliest";
  let answer;
  try {
    answer = await get("/api/events", { since, limit: PAGE });
  } catch (error) {
    if (error.status !== 410) throw error;
    answer = await get("/api/events", { since: "earliest", limit: PAGE });
    answer.atEnd = true;
  }
  const first = answer.events[0]?.event_id;
  store.more.events = Boolean(first) && first < store.events[0].event_id && since !== "earliest" && !answer.atEnd;
  addEvents(answer.events);
}

/** Adds each event once, in the order of the log. */
export function addEvents(events) {
  const fresh = events.filter((event) => !known.has(event.event_id));
  if (!fresh.length) return;
  for (const { event_id, data } of fresh) {
    known.add(event_id);
    if (event_id > (store.latest.get(data.issue_id) ?? "")) store.latest.set(data.issue_id, event_id);
  }
  const later = (store.events.at(-1)?.event_id ?? "") < fresh[0].event_id;
  store.events = [...store.events, ...fresh];
  if (!later) store.events.sort((one, other) => (one.event_id < other.event_id ? -1 : 1));
  for (const event of store.events.splice(0, Math.max(0, store.events.length - EVENTS_KEPT)))
    known.delete(event.event_id);
  changed("events");
}

/** What follows from events that have just come. */
export function takeEvents(events) {
  addEvents(events);
  const types = new Set(events.map((event) => event.event_type));
  const touched = new Set(events.map((event) => event.data?.agent_id).filter((id) => store.agents.has(id)));
  soon("issues", loadIssues, 600);
  if (types.has("agent_completed")) soon("results", loadResults);
  if ([...types].some((type) => /^(approval|question)_/.test(type))) soon("approvals", loadApprovals);
  if ([...types].some((type) => type.startsWith("pipeline_"))) soon("runs", loadRuns);
  soon("new agents", loadNewAgents);
  if (touched.size > 20) soon("agents", loadAgents);
  else for (const id of touched) soon(`agent ${id}`, () => loadAgent(id));
}

/** Loads once for many changes that come together. */
function soon(name, load, wait = 200) {
  if (due.has(name)) return;
  due.set(
    name,
    setTimeout(() => {
      due.delete(name);
      if (loading.has(name)) return soon(name, load, wait); // an older answer must not come after a newer one
      loading.add(name);
      load()
        .catch(() => {}) // the poll notices a service that is lost, and loads all of it then
        .finally(() => loading.delete(name));
    }, wait),
  );
}

export async function loadAgent(id) {
  store.agents.set(id, await get(`/api/agents/${part(id)}/status`));
  changed("agents");
}

const active = (agent) => agent.state === "running" || agent.state === "starting";

async function tick() {
  try {
    if (!document.hidden) await lookAtAgents();
  } catch {
    // the poll notices a service that is lost
  } finally {
    clearTimeout(ticking); // all may have been loaded meanwhile, which begins a round of its own
    ticking = setTimeout(tick, TICK_MS);
  }
}

async function lookAtAgents() {
  const { agents } = await get("/api/agents", { status: "active", limit: PAGE });
  const working = new Set(agents.map((agent) => agent.agent_id));
  const gone = [...store.agents.values()].filter((agent) => active(agent) && !working.has(agent.agent_id));
  if (agents.some((agent) => !store.agents.has(agent.agent_id))) await loadNewAgents();
  for (const agent of agents) store.agents.set(agent.agent_id, agent);
  for (const agent of gone.slice(0, 20)) await loadAgent(agent.agent_id);
  if (agents.length || gone.length) changed("agents");
  const runs = [...store.issues.values()].some((issue) => issue.run?.state === "running");
  if (gone.length || runs) soon("issues", loadIssues); // a run ends after its last event
}

/** Ask again at once: somebody has just changed something by this page. */
export function refresh(...names) {
  const loads = {
    issues: loadIssues,
    agents: lookAtAgents,
    approvals: loadApprovals,
    runs: loadRuns,
    results: loadResults,
  };
  for (const name of names) soon(name, loads[name], 0);
}

export const openApprovals = () => [...store.approvals.values()].filter((approval) => approval.state === "open");
export const activeAgents = () => [...store.agents.values()].filter(active);

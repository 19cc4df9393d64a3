/** What a person can have done: spawn, end, publish, run, stop, answer, export. */
import * as api from "./api.js";
import { confirm, form, say } from "./dialogs.js";
import { h } from "./dom.js";
import { cut } from "./format.js";
import { to } from "./router.js";
import { lacks, refresh, store } from "./store.js";

const PRIORITIES = ["low", "normal", "high", "critical"];

const types = () => (store.info?.agent_types ?? []).map((type) => type.name);
const NAME = "(?!.*\\.\\.)[A-Za-z0-9][A-Za-z0-9._\\-]{0,127}";
const NAMED = "Letters, digits, . _ and -, without spaces";
const issues = () => [...store.issues.keys()];
const may = (permission) => store.info?.permissions?.includes(permission) ?? true;

export const can = {
  spawn: () => may("spawn_agents"),
  publish: () => may("publish_events"),
  run: () => may("spawn_agents") && !lacks("POST /api/runs"),
};

export function spawn(issueId = "", agentType = "") {
  form({
    title: "Spawn an agent",
    action: "Spawn",
    fields: [
      {
        name: "agent_type",
        label: "Agent type",
        value: agentType,
        options: types(),
        required: true,
        more: { pattern: NAME, title: NAMED },
        hint: "python-specialist, test-engineer, security-auditor and their like",
      },
      {
        name: "issue_id",
        label: "Issue",
        value: issueId,
        options: issues(),
        required: true,
        more: { pattern: NAME, title: NAMED },
        hint: "One that is there, or a new one such as fix-login: no spaces",
      },
      { name: "task", label: "Task", kind: "textarea", hint: "Empty: what is known of the issue" },
      {
        name: "priority",
        label: "Priority",
        kind: "select",
        options: PRIORITIES,
        value: "normal",
      },
    ],
    submit: async (values, once) => {
      const spawned = await api.post("/api/agents/spawn", values, once);
      refresh("agents", "issues");
      say(`Spawned ${spawned.agent_id}`);
      location.hash = to("agents", spawned.agent_id);
    },
  });
}

export async function end(agent) {
  const sure = await confirm({
    title: "End this agent?",
    text: `${agent.agent_id} and every process that it started are ended. What it has not stored is lost.`,
    action: "End agent",
  });
  if (!sure) return;
  await doing(async () => {
    await api.remove(`/api/agents/${api.part(agent.agent_id)}`);
    refresh("agents", "issues");
    say(`${agent.agent_id} is being ended`);
  });
}

export function publish(issueId = "") {
  form({ title: "Publish an event", action: "Publish", fields: publishFields(issueId), submit: sendEvent });
}

const publishFields = (issueId) => [
  {
    name: "event_type",
    label: "Type",
    required: true,
    more: { pattern: "[a-z][a-z0-9_.\\-]{0,63}" },
    hint: "small letters, digits, _ . and -, such as design_approved",
  },
  { name: "topic", label: "Topic", value: "coordination", required: true },
  {
    name: "issue_id",
    label: "Issue",
    value: issueId,
    options: issues(),
    more: { pattern: NAME, title: NAMED },
    hint: "Empty: for agents of every issue",
  },
  { name: "data", label: "Data", kind: "textarea", hint: "A JSON object, or plain text, which becomes its message" },
  { name: "priority", label: "Priority", kind: "select", options: PRIORITIES, value: "normal" },
];

async function sendEvent({ event_type, topic, issue_id, data, priority }, once) {
  const body = { publisher: "operator", topic, priority, data: { ...asObject(data), ...(issue_id && { issue_id }) } };
  const published = await api.post(`/api/events/${api.part(event_type)}`, body, once);
  // Pages like this one wait for every event, which is nothing to tell.
  const woken = published.subscribers_notified.filter((subject) => !subject.startsWith("operator-"));
  say(
    `Published; ${woken.length ? `it woke ${woken.slice(0, 3).join(", ")}${woken.length > 3 ? " and others" : ""}` : "no agent waits for it now"}`,
  );
}

function asObject(text) {
  if (!text.trim()) return {};
  if (!text.trim().startsWith("{")) return { message: text };
  return JSON.parse(text);
}

export function run(issue) {
  form({
    title: `Run the pipeline on ${issue.issue_id}`,
    action: "Run",
    intro: h(
      "p.faint",
      null,
      "Agents one after the other, as routing proposes them, from the architect to the documentation.",
      " It goes on where the last run ended.",
    ),
    fields: [
      {
        name: "task",
        label: "Task",
        kind: "textarea",
        value: issue.run || issue.source ? "" : (issue.body ?? ""),
        hint: "Empty: what is known of the issue. An issue keeps the task of its first run.",
      },
      {
        name: "until",
        label: "Until",
        options: types(),
        hint: "An agent type to stop after; empty: until routing is done",
      },
      { name: "rounds", label: "Agents at most", kind: "number", more: { min: "1", max: "100" }, hint: "Empty: 12" },
    ],
    submit: async ({ task, until, rounds }) => {
      const body = {
        issue_id: issue.issue_id,
        ...(task && { task }),
        ...(until && { until }),
        ...(rounds && { rounds: Number(rounds) }),
      };
      const started = await api.post("/api/runs", body);
      refresh("runs", "issues", "agents");
      say(`The run ${started.run_id} has begun`);
    },
  });
}

export async function stopRun(run) {
  const sure = await confirm({
    title: "Stop this run?",
    text: `The run on ${run.issue_id} and the agents that it started are ended. A later run goes on from there.`,
    action: "Stop run",
  });
  if (!sure) return;
  await doing(async () => {
    await api.remove(`/api/runs/${api.part(run.run_id)}`);
    refresh("runs", "issues", "agents");
    say("The run is being stopped");
  });
}

export const answer = (approval, text, message) =>
  doing(
    async () => {
      await api.post(`/api/approvals/${api.part(approval.approval_id)}/answer`, {
        answer: text,
        ...(message && { message }),
      });
      refresh("approvals", "issues");
      say(`Answered: ${cut(text, 80)}`);
    },
    () => refresh("approvals"),
  );

export const exportIssue = (id, format) =>
  doing(async () => {
    const answer = await api.send("GET", `/api/issues/${api.part(id)}/export?format=${format}`);
    const address = URL.createObjectURL(await answer.blob());
    h("a", { href: address, download: `${id}.${format === "json" ? "json" : "md"}` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
    say(`Exported ${id}.${format === "json" ? "json" : "md"}`);
  });

async function doing(work, after = () => {}) {
  try {
    await work();
  } catch (error) {
    say(error.message);
    after();
  }
}

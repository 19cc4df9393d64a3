// The whole workflow of an agent (the one in the API reference), with a client generated from the OpenAPI document.
// Nothing here tells the compiler what it could not see by itself: test_openapi.py looks for it.

import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

type Schemas = components["schemas"];
type Answer<Data> =
  | { data: Data; error?: never; response: Response }
  | { data?: never; error: Schemas["ErrorAnswer"]; response: Response };

const [url, agentToken, listenerToken, architectToken, issue] = process.argv.slice(2);
if (!url || !agentToken || !listenerToken || !architectToken || !issue)
  throw new Error("usage: workflow URL AGENT LISTENER ARCHITECT ISSUE");

function clientOf(baseUrl: string, token: string) {
  return createClient<paths, "application/json">({ baseUrl, headers: { Authorization: `Bearer ${token}` } });
}

function good<Data>(answer: Answer<Data>): Data {
  if (answer.error) throw new Error(`${answer.response.status} ${answer.error.code}: ${answer.error.message}`);
  return answer.data;
}

function check(holds: boolean, what: string): void {
  if (!holds) throw new Error(`not so: ${what}`);
}

function nameOf(file: string | Schemas["FileEntry"]): string {
  return typeof file === "string" ? file : file.path;
}

const agent = clientOf(url, agentToken);
const listener = clientOf(url, listenerToken);
const architect = clientOf(url, architectToken);
const agentType = "python-specialist";
const identity = {
  agent_id: "python-specialist-uuid",
  agent_type: agentType,
  issue_id: issue,
  project_id: "project-abc",
};

// 1. Get the context, and again only if it has changed

const asked = {
  path: { issue_id: issue, agent_type: agentType },
  query: { task: "Greet in the session store", max_files: 5 },
};
const first = await agent.GET("/api/context/{issue_id}/{agent_type}", { params: asked });
const context = good(first);
const files = context.context.relevant_files.map(
  (file) => `${file.path} ${file.language} ${file.size} ${(file.reasons ?? []).length}`,
);
check(files.length > 0 && files.length === context.file_count, "files are given");
const branch: string | null = context.context.git_context.branch;
const more: unknown = context.context["house_rules"]; // a section of a plugin
const etag = first.response.headers.get("ETag");
if (etag) {
  const again = await agent.GET("/api/context/{issue_id}/{agent_type}", {
    params: { ...asked, header: { "If-None-Match": etag } },
  });
  check(again.response.status === 304, "the context has not changed");
}

// 2. Subscribe to events, in the background

const query = { timeout: 60000, filter: `issue_id:${issue}` };
const subscription = listener.GET("/api/events/wait/{event_type}", {
  params: { path: { event_type: "implementation_complete" }, query },
});

// 3. Work. 4. Store the results: the short form of a result and the full one

const short = good(
  await agent.POST("/api/results", {
    body: {
      ...identity,
      result: {
        status: "success",
        files_created: ["src/api.py", "tests/test_api.py"],
        decisions: ["Implemented REST API with FastAPI"],
        metrics: { execution_time_ms: 5000, test_coverage: 95.0 },
      },
    },
  }),
);
const proposed = short.next_agents.map((next) => `${next.agent_type} ${next.priority}`);

const full: Schemas["ResultSubmission"] = {
  ...identity,
  result: {
    status: "partial",
    files_created: [{ path: "src/api.py", size: 4096, language: "python", checksum: "sha256:abc123", mode: "0644" }],
    files_modified: [{ path: "requirements.txt", diff: "+1 -0", changes: ["Added fastapi==0.104.0"] }],
    files_deleted: [],
    decisions: ["Used Pydantic models for validation"],
    rationale: "They validate",
    metrics: { tokens_used: 15000, branches: 3 },
    artifacts: { test_report: "All tests passing (15/15)", timings: { slowest_ms: 50 } },
    errors: [],
    warnings: ["Consider adding rate limiting to endpoints"],
    next_steps: ["Security audit required"],
    reviewed_by: "nobody yet",
  },
  timestamp: "2025-11-18T10:05:00Z",
  branch: "main",
};
const key = { header: { "Idempotency-Key": `full-${issue}` } };
const stored = await agent.POST("/api/results", { params: key, body: full });
const repeated = await agent.POST("/api/results", { params: key, body: full });
check(good(stored).id === good(repeated).id, "a repeat is not stored again");
check(repeated.response.headers.get("Idempotent-Replay") === "true", "and says so");

// 5. Publish the completion; whoever waits for it gets it

const published = good(
  await agent.POST("/api/events/{event_type}", {
    params: { path: { event_type: "implementation_complete" } },
    body: {
      event_type: "implementation_complete",
      publisher: "python-specialist-uuid",
      topic: "implementation",
      data: { issue_id: issue, status: "success", files_changed: 2, custom_metadata: { api_version: "v1" } },
      phase: "testing",
    },
  }),
);
const heard = good(await subscription);
check(!heard.timeout, "the event arrived in time");
const [event] = heard.events;
check(
  event?.event_id === published.event_id && event.priority === "normal" && event["phase"] === "testing",
  "it is the event that was published",
);
const changed: unknown = event?.data["files_changed"];

const everything = good(
  await listener.GET("/api/events/wait/{event_type}", {
    params: { path: { event_type: "*" }, query: { timeout: 0, filter: query.filter } },
  }),
);
const kinds = everything.events.map((each) => each.event_type);
const later = good(
  await listener.GET("/api/events/wait/{event_type}", {
    params: { path: { event_type: "*" }, query: { timeout: 0, since: everything.scanned_to, filter: "issue_id:no-such" } },
  }),
);
check(later.timeout === true && later.events.length === 0, "and nothing else");

// 6. Spawn an agent, wait for its end, read what it wrote, end one that goes on

const spawned = good(
  await architect.POST("/api/agents/spawn", {
    body: {
      agent_type: agentType,
      issue_id: issue,
      task: "Implement user authentication",
      context_requirements: ["project_structure", "previous_decisions", "security_policies"],
      environment: { PYTHON_VERSION: "3.11", TEST_SECONDS: "0" },
      priority: "high",
    },
  }),
);
const one = { path: { agent_id: spawned.agent_id } };
const exits = {
  path: { event_type: "agent_exited" },
  query: { timeout: 60000, since: "earliest", filter: `agent_id:${spawned.agent_id}` },
};
check(
  good(await architect.GET("/api/events/wait/{event_type}", { params: exits })).events.length === 1,
  "the agent has ended",
);
const status = good(await architect.GET("/api/agents/{agent_id}/status", { params: one }));
const state: "starting" | "running" | "completed" | "failed" | "killed" | "timeout" | "lost" = status.state;
const logs = good(
  await architect.GET("/api/agents/{agent_id}/logs", {
    params: { ...one, query: { tail: 10, since: "0", timestamps: false } },
  }),
);

const lasting = good(
  await architect.POST("/api/agents/spawn", {
    body: { agent_type: agentType, issue_id: issue, environment: { TEST_SECONDS: "60" } },
  }),
);
const ending = good(
  await architect.DELETE("/api/agents/{agent_id}", { params: { path: { agent_id: lasting.agent_id } } }),
);

// 7. Lists

const results = good(
  await architect.GET("/api/results", { params: { query: { issue_id: issue, agent_type: agentType, limit: 10 } } }),
);
const created = results.results.flatMap((each) => (each.result.files_created ?? []).map(nameOf));
const whole = good(
  await architect.GET("/api/results/{result_id}", { params: { path: { result_id: good(stored).id } } }),
);
const events = good(
  await architect.GET("/api/events", {
    params: { query: { type: "implementation_complete", topic: "implementation", limit: 5, dead: false } },
  }),
);
const agents = good(await architect.GET("/api/agents", { params: { query: { issue_id: issue, state: "completed" } } }));

// 8. Clear the cache; the second time there is nothing to clear

const cleared = good(
  await architect.DELETE("/api/cache/context/{issue_id}", { params: { path: { issue_id: issue } } }),
);
const refused = await architect.DELETE("/api/cache/context/{issue_id}", { params: { path: { issue_id: issue } } });
check(refused.error?.code === "REQ_002" && refused.data === undefined, "there is nothing left");
good(await architect.DELETE("/api/cache/all"));

// 9. How the service is; another token

const seen = good(await architect.GET("/status"));
const health = await architect.GET("/health");
check(health.data?.status === "healthy", "the service is well");
if (health.error) {
  const reason: string = "checks" in health.error ? health.error.checks.storage : health.error.message;
  throw new Error(reason);
}
const refreshed = good(await agent.POST("/api/auth/refresh"));
const described: Record<string, unknown> = good(await architect.GET("/openapi.json"));

// A refusal says what was wrong, and how long to wait

const wrong = await clientOf(url, "nonsense").GET("/status");
const code: Schemas["ErrorAnswer"]["code"] | undefined = wrong.error?.code;
const patience: number | undefined = wrong.error?.retry_after_seconds;

console.log(
  JSON.stringify({
    files,
    branch,
    more: more === undefined,
    proposed,
    changed,
    kinds,
    spawned: spawned.process_id > 0,
    state,
    logs: logs.text,
    ending: ending.ending,
    results: results.results.length,
    created,
    whole: whole.result.status,
    extra: [whole["branch"], whole.result["reviewed_by"]],
    events: events.events.length,
    agents: agents.agents.map((each) => each.exit_code),
    cleared: cleared.entries_removed,
    active: seen.agents.by_type[agentType] ?? 0,
    refreshed: refreshed.token.length > 0,
    openapi: described["openapi"],
    code,
    patience: patience ?? 0,
  }),
);

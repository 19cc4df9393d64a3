"""What the endpoints answer, as types: the OpenAPI document and the JSON Schemas are made from them.

An endpoint of a plugin has them in ``answers``, by status, and the statuses of its own refusals in ``problems``; CORE
has those of the core's endpoints. Answers are built as plain dicts; the core never needs this file. The tests
hold every answer to the document.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from cco_sidecar import (
    AgentEndpoint,
    AgentState,
    ClearCache,
    Endpoint,
    GetAgentStatus,
    GetContext,
    GetHealth,
    GetStatus,
    NextAgent,
    PublishEvent,
    ResultBody,
    SpawnAgent,
    StoreResult,
    WaitForEvents,
)
from cco_sidecar_plugins._hooks import LoadedPlugin
from cco_sidecar_plugins.context._sections import GitState, ProjectStructure, RelevantFile


class ResultStored(Struct):
    """Answer of POST /api/results."""

    id: str
    stored: bool
    storage_path: str
    next_agents: list[NextAgent]
    event_published: bool
    event_id: str
    timestamp: str


class StoredResult(Struct):
    """A stored result: the body that was posted, with its id and time."""

    id: str
    stored_at: str
    agent_id: str
    agent_type: str
    issue_id: str
    project_id: str
    result: ResultBody
    timestamp: str | UnsetType | None = UNSET


class ResultList(Struct):
    """Stored results, newest last."""

    results: list[StoredResult]
    next_cursor: str | None
    has_more: bool


class EventPublished(Struct):
    """Answer of POST /api/events/{event_type}; the subjects are those of the waiters that this event woke."""

    event_id: str
    published: bool
    subscribers_notified: list[str]
    subscriber_count: int
    timestamp: str
    topic: str
    ttl_seconds: float


class Event(Struct):
    """An event as readers get it."""

    event_id: str
    event_type: str
    publisher: str
    topic: str
    data: dict[str, Any]
    timestamp: str
    correlation_id: str | None
    priority: str
    ttl_seconds: float


class MissedEvents(Struct):
    """Told once to a reader whose remembered position retention has passed."""

    position: str
    floor: str


class WaitAnswer(Struct, omit_defaults=True):
    """Answer of a long poll. ``timeout`` is there, and true, only when nothing arrived."""

    events: list[Event]
    more_available: bool
    next_cursor: str | None
    scanned_to: str
    timestamp: str
    timeout: bool | UnsetType = UNSET
    missed: MissedEvents | UnsetType = UNSET


class EventList(Struct):
    """Retained events (or dead letters), newest last."""

    events: list[Event]
    next_cursor: str | None
    has_more: bool


class ErrorAnswer(Struct, omit_defaults=True):
    """Every error."""

    error: str
    message: str
    code: str
    timestamp: str
    request_id: str
    details: dict[str, Any] | UnsetType = UNSET
    retry_after_seconds: int | UnsetType = UNSET
    limit: int | UnsetType = UNSET


class PluginList(Struct):
    plugins: list[LoadedPlugin]


class PreviousOutput(Struct):
    """A result that an earlier agent stored on the issue."""

    agent: str
    agent_type: str
    timestamp: str
    decision: str
    rationale: str
    files_affected: list[str]
    status: str
    result_id: str


TASK_MATCHED = "Whether any word of the task occurs; false: the files are in the order without a task. Null: no task."

PLUGINS_FAILED = (
    "Plugins whose part is missing, as they failed or took too long; such a context is made anew next time."
)


class ProjectMetadata(Struct):
    """What the project's manifests and report files say; null where they say nothing."""

    project_type: str
    dependencies: list[str]
    dependency_versions: dict[str, str]
    python_version: str | None
    test_coverage: float | None
    last_build_status: str | None
    last_build_time: str | None
    security_scan_status: str | None
    redactions: int
    index: Literal["ready", "building"]
    task_matched: Annotated[bool | None, Meta(description=TASK_MATCHED)]
    plugins_failed: Annotated[list[str] | UnsetType, Meta(description=PLUGINS_FAILED)] = UNSET


class ContextSections(Struct):
    """The five sections of a context; plugins may add more."""

    project_structure: ProjectStructure
    relevant_files: list[RelevantFile]
    git_context: GitState
    previous_agent_outputs: list[PreviousOutput]
    metadata: ProjectMetadata


class Context(Struct):
    """Answer of GET /api/context/{issue_id}/{agent_type}. The last three fields are those of a request with ``since``,
    which gives only the files that changed; ``since`` is null where that answer is not known any more.
    """

    issue_id: str
    agent_type: str
    context: ContextSections
    truncated: bool
    truncation_strategy: Literal["none", "smart", "file_sampling", "semantic_chunking"]
    total_size_bytes: int
    estimated_tokens: int
    file_count: int
    timestamp: str
    cache_hit: bool
    since: str | UnsetType | None = UNSET
    unchanged_files: int | UnsetType = UNSET
    removed_files: list[str] | UnsetType = UNSET


class CacheCleared(Struct):
    """Answer of the cache deletions."""

    cleared: bool
    entries_removed: int
    bytes_freed: int
    timestamp: str


class Refreshed(Struct):
    """Answer of POST /api/auth/refresh."""

    token: str
    expires_at: str


class HealthChecks(Struct):
    """``storage`` is a real write, ``event_bus`` a real round trip, the rest is measured."""

    storage: str
    event_bus: str
    memory_usage_mb: float
    cpu_usage_percent: float
    active_agents: int
    event_queue_size: int
    disk_space_available_mb: float
    watching: str | UnsetType = UNSET


class Health(Struct):
    """Answer of GET /health."""

    status: Literal["healthy", "unhealthy"]
    service: str
    version: str
    uptime_seconds: float
    project_id: str
    instance_id: str
    checks: HealthChecks
    timestamp: str


class Spawned(Struct):
    """Answer of POST /api/agents/spawn. A repeat for an agent that has ended has its ``state`` and no token."""

    agent_id: str
    spawned: bool
    process_id: int
    context_injected: bool
    jwt_token: str
    webhook_url: str
    environment_ignored: list[str]
    timestamp: str
    state: AgentState = "running"


class AgentUsage(Struct):
    """What an agent's living processes use: processor time of all of them so far, memory (resident) of the moment of
    the measurement.
    """

    cpu_seconds: float
    memory_bytes: int
    peak_memory_bytes: int
    processes: int
    measured_at: str
    age_seconds: float


class AgentCall(Struct):
    """The last request that was made with an agent's token."""

    method: str
    path: str
    at: str
    age_seconds: float


class AgentStatus(Struct):
    """What is known of an agent. Times are ISO 8601, null where the thing has not happened; an age is that of the fact
    before it. ``reason`` says why it could not work, where that is known. What has a default is told by plugins.
    """

    agent_id: str
    agent_type: str
    issue_id: str
    state: AgentState
    exit_code: int | None
    signal: int | None
    pid: int | None
    started_at: str
    ended_at: str | None
    reason: str | None
    output_tail: list[str] | UnsetType = UNSET
    result_id: str | UnsetType | None = UNSET
    task: str | UnsetType = UNSET
    parent: str | UnsetType | None = UNSET
    result_status: Literal["success", "failed", "partial"] | UnsetType | None = UNSET
    depth: int | UnsetType = UNSET
    state_age_seconds: float | UnsetType = UNSET
    run_seconds: float | UnsetType = UNSET
    usage: AgentUsage | UnsetType | None = UNSET
    last_output_at: str | UnsetType | None = UNSET
    last_output_age_seconds: float | UnsetType | None = UNSET
    last_call: AgentCall | UnsetType | None = UNSET
    model: str | UnsetType | None = UNSET
    requests: int | UnsetType | None = UNSET
    input_tokens: int | UnsetType | None = UNSET
    output_tokens: int | UnsetType | None = UNSET
    cached_tokens: int | UnsetType | None = UNSET
    cost_usd: float | UnsetType | None = UNSET
    denials: int | UnsetType | None = UNSET


class AgentList(Struct):
    """Agents, newest last."""

    agents: list[AgentStatus]
    next_cursor: str | None
    has_more: bool


class AgentLogs(Struct):
    """What an agent wrote to stdout and stderr; ``next_offset`` goes on from here.

    ``offset`` is where the text begins: later than what was asked for where older output has been rotated away.
    """

    agent_id: str
    text: str
    next_offset: int
    offset: int


class AgentEnding(Struct):
    """Answer of DELETE /api/agents/{id}: the end has been ordered and follows."""

    agent_id: str
    ending: bool
    state: AgentState
    timestamp: str


class AgentStatistics(Struct):
    active: int
    completed: int
    failed: int
    killed: int
    spawned_total: int
    by_type: dict[str, int]
    avg_execution_time_ms: float


class ClusterPeer(Struct):
    """Another sidecar that was heard of in the last seconds."""

    node: str
    url: str
    applied: int


class ClusterStatistics(Struct):
    """How a sidecar with ``--backend`` stands to the log that it shares with others."""

    backend: str
    servers: list[str]
    connected_to: str | None
    away: list[str]  # names of the log's servers that are, or that are not up to date, as their leader says
    problem: str | None  # why nothing can be written; null where nothing is known to be in the way
    stream: str
    replicas: int
    synced: bool  # what ``--nats-synced`` says
    applied: int  # the log's last entry that is in this sidecar's replica
    lag: int
    node: str
    peers: list[ClusterPeer]
    differs: list[str]  # from a sidecar alone


class StorageStatistics(Struct):
    context_cache_entries: int
    context_cache_bytes: int
    results_stored: int
    total_size_mb: float
    cache_hit_rate: float
    storage_path: str
    watching: str | UnsetType = UNSET
    limit_mb: int | UnsetType = UNSET
    full: bool | UnsetType = UNSET  # the last body to be stored was refused
    cluster: ClusterStatistics | UnsetType = UNSET


class EventStatistics(Struct):
    total_published: int
    total_delivered: int
    active_subscriptions: int
    queue_depth: int
    avg_delivery_time_ms: float
    dead_letter_queue_size: int


class PerformanceStatistics(Struct):
    """Over the last minute; a long poll counts from its wake-up."""

    avg_response_time_ms: float
    p95_response_time_ms: float
    p99_response_time_ms: float
    requests_per_second: float
    errors_per_minute: float
    protocols: str  # and which server speaks them: "fast HTTP/1.1 and HTTP/2"
    unsent_bytes: int | UnsetType = UNSET  # of answers that wait for their clients


class Spent(Struct):
    """What agents spent on their models, as far as their programs report it: null where none does."""

    requests: int
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    cost_usd: float | None
    denials: int | None


class SpentStatistics(Struct):
    """What was spent on each issue and each day (UTC), the latest 100 of them."""

    by_issue: dict[str, Spent]
    by_day: dict[str, Spent]


class Status(Struct):
    """Answer of GET /status: everything is counted or timed."""

    agents: AgentStatistics
    storage: StorageStatistics
    events: EventStatistics
    performance: PerformanceStatistics
    timestamp: str
    spent: SpentStatistics | UnsetType = UNSET


# -- of the core's endpoints: the types of answers by status, and the statuses beyond those that every endpoint has

CORE: dict[type[Endpoint], tuple[dict[int, Any], tuple[int, ...]]] = {
    GetContext: ({200: Context}, (304, 404)),
    StoreResult: ({201: ResultStored}, ()),
    PublishEvent: ({202: EventPublished}, ()),
    WaitForEvents: ({200: WaitAnswer}, (410,)),
    SpawnAgent: ({201: Spawned}, ()),
    AgentEndpoint: ({}, (404,)),
    GetAgentStatus: ({200: AgentStatus}, (404,)),
    ClearCache: ({200: CacheCleared}, (404,)),
    GetHealth: ({200: Health, 503: Health}, ()),
    GetStatus: ({200: Status}, ()),
}


def answers_of(endpoint: type[Endpoint]) -> dict[int, Any]:
    """The types of an endpoint's answers by status, the successful one first; a text names a type of this file."""
    rows = (vars(kind).get("answers") or CORE.get(kind, ({}, ()))[0] for kind in endpoint.__mro__)
    found: dict[int, Any] = next(filter(None, rows), {200: dict})
    return {status: globals()[shape] if isinstance(shape, str) else shape for status, shape in found.items()}


def problems_of(endpoint: type[Endpoint]) -> tuple[int, ...]:
    """The statuses of an endpoint's own refusals, and 304 where it may answer so."""
    rows = (vars(kind).get("problems") or CORE.get(kind, ({}, ()))[1] for kind in endpoint.__mro__)
    return next(filter(None, rows), ())

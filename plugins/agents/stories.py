"""Issues as people see them: a list with the state of each, one timeline of all that happened, and the whole as a file.

``GET /api/issues``, ``/api/issues/{issue_id}``, its ``timeline`` and its ``export``. All is made from the log, the
results and the ledger, off the loop; nothing is stored for it.
"""

from __future__ import annotations

import re
import time
import typing
import weakref
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from cco_sidecar import (
    IDENTIFIER,
    READ,
    AgentState,
    ApiError,
    Claims,
    Endpoint,
    Identifier,
    IssueNotFound,
    Limit,
    Records,
    Route,
    Sidecar,
    agent_row,
    hookimpl,
    iso,
    redact,
)
from cco_sidecar_plugins._turns import Shared
from cco_sidecar_plugins.agents import _story_export as story_export
from cco_sidecar_plugins.agents._story_issues import (
    POOL,
    Activity,
    IssueState,
    Surroundings,
    activities,
    ask,
    items,
)
from cco_sidecar_plugins.agents._story_timeline import Timeline, TimelineEntry
from cco_sidecar_plugins.agents.approvals import Approval, ApprovalListQuery, approvals_of
from cco_sidecar_plugins.agents.details import DetailedAgents
from cco_sidecar_plugins.agents.meter import SpendMeter, meter_of
from cco_sidecar_plugins.agents.runs import RunState, runs_of
from cco_sidecar_plugins.commands._pipeline_plan import whole_task
from cco_sidecar_plugins.context.brief import prefers_markdown
from cco_sidecar_plugins.context.issue_files import Written, written_issues
from cco_sidecar_plugins.http._answers import AgentStatus, StoredResult
from cco_sidecar_plugins.results.result_list import ResultQuery
from cco_sidecar_plugins.storage._pages import page

AT_ONCE = 200  # issues whose state is looked at together
ALL = 1000
HEADING = re.compile(r"^#{1,6}[ \t]+")  # how a task in Markdown may begin


@hookimpl
def register_routes() -> list[Route]:
    return [
        Route("GET", "/api/issues", ListIssues),
        Route("GET", "/api/issues/{issue_id}", GetIssue),
        Route("GET", "/api/issues/{issue_id}/timeline", GetTimeline),
        Route("GET", "/api/issues/{issue_id}/export", ExportIssue),
    ]


# -- the wire


class AgentCounts(Struct):
    """How many agents work on an issue, and how many did."""

    active: int
    ended: int


class WorkingAgent(Struct):
    """An agent that works on an issue now."""

    agent_id: str
    agent_type: str
    state: AgentState


class LatestResult(Struct):
    """The latest result on an issue."""

    agent_type: str
    status: Literal["success", "failed", "partial"]
    stored_at: str


class IssueRun(Struct):
    """The latest run of the pipeline that the service has started on an issue."""

    run_id: str
    state: RunState


class IssueFacts(Struct):
    """What all answers about an issue have. ``source`` is where it is written down; ``tokens`` are counted as budgets
    count them; times are those of its first and last event, agent or result.
    """

    issue_id: str
    title: str | None
    source: str | None
    state: IssueState
    working: list[WorkingAgent]
    latest_result: LatestResult | None
    waiting_for_people: int
    run: IssueRun | None
    cost_usd: float | None
    tokens: int | None
    first_at: str
    last_at: str


class IssueItem(IssueFacts):
    """An issue in a list."""

    agents: AgentCounts
    results: int


class IssueList(Struct):
    """Issues, those that something happened on last at the end."""

    issues: list[IssueItem]
    next_cursor: str | None
    has_more: bool


class Issue(IssueFacts):
    """An issue with its task text, and its newest agents and results, newest last."""

    body: str | None
    agents: list[AgentStatus]
    results: list[StoredResult]


class TimelinePage(Struct):
    """What happened on an issue, oldest first."""

    entries: list[TimelineEntry]
    next_cursor: str
    has_more: bool


class IssueQuery(Struct):
    state: IssueState | None = None
    issue_id: Identifier | None = None
    since: Annotated[str, Meta(max_length=256)] = ""
    limit: Limit = 100


class TimelineQuery(Struct):
    since: Annotated[str, Meta(max_length=200)] = ""
    limit: Limit = 100


class ExportQuery(Struct):
    format: Literal["json", "markdown"] | None = None


# -- the endpoints


class ListIssues(Endpoint):
    """Issues that agents, results or events name, or that are written down; newest activity last."""

    permission = READ
    query_type = IssueQuery
    answers = {200: IssueList}

    async def respond(self) -> dict[str, Any]:
        beside = await surroundings(self.sidecar, self.claims)
        written = await stories_of(self.sidecar).written()
        listed = await ask(self.sidecar, list_issues, self.query, beside, written, meter_of(self.sidecar.agents))
        for item in listed["issues"]:
            del item["task"]
        return listed


class IssueEndpoint(Endpoint):
    """The base of the endpoints about one issue."""

    permission = READ
    problems = (404,)

    async def found(self, issue_id: str) -> dict[str, Any]:
        """The issue's item; raises REQ_002."""
        query, stories = IssueQuery(issue_id=issue_id, limit=1), stories_of(self.sidecar)
        beside, title, body = await surroundings(self.sidecar, self.claims), None, None
        told = await self.sidecar.hooks.pool.run(stories.resolve, issue_id)
        if told:
            title, body = told.get("title"), told.get("body")
        row = (await stories.written()).get(issue_id.lower())
        row = row or (Written(issue_id, title or "", "", stories.began) if told else None)
        written = {issue_id.lower(): row._replace(issue_id=issue_id)} if row else {}
        listed = await ask(self.sidecar, list_issues, query, beside, written, meter_of(self.sidecar.agents))
        if not listed["issues"]:
            raise ApiError("REQ_002", f"Nothing is known of the issue {issue_id}")
        (item,) = listed["issues"]
        return item | {"title": title or item["title"], "body": body or item["task"]}

    async def whole(self, issue_id: str, limit: int) -> dict[str, Any]:
        """The issue with its newest agents and results."""
        item, agents = await self.found(issue_id), typing.cast(DetailedAgents, self.sidecar.agents)
        rows, results = await ask(self.sidecar, agents_and_results, issue_id, limit)
        rows = [agents.whole(row) for row in rows]
        described = await agents.disk.run(lambda: [agents.describe(row) for row in rows])
        return item | {"agents": described, "results": results}


class GetIssue(IssueEndpoint):
    """An issue with its task, its agents and its results."""

    answers = {200: Issue}

    async def respond(self, issue_id: str) -> dict[str, Any]:
        found = await self.whole(issue_id, 100)
        del found["task"]
        return found


class GetTimeline(IssueEndpoint):
    """What happened on an issue, oldest first: starts, events, results, routing, approvals and ends of agents."""

    query_type = TimelineQuery
    answers = {200: TimelinePage}

    async def respond(self, issue_id: str) -> dict[str, Any]:
        answer = await self.read(issue_id, self.query.since, self.query.limit)
        if not answer["entries"] and self.query.since in ("", "earliest"):
            await self.found(issue_id)
        return answer

    async def read(self, issue_id: str, since: str, limit: int) -> dict[str, Any]:
        return await ask(self.sidecar, timeline_page, *timeline_facts(self, issue_id), since, limit)


class ExportIssue(IssueEndpoint):
    """An issue's whole story as one file: JSON, or Markdown where ``format`` or Accept says so."""

    query_type = ExportQuery
    answers = {200: dict[str, Any]}

    async def respond(self, issue_id: str) -> bytes:
        wanted = self.query.format
        if wanted is None:
            self.add_header("Vary", "Accept")
            accept = ", ".join(self.request.headers.get_list("Accept"))
            wanted = "markdown" if prefers_markdown(accept) else "json"
        item, agents = await self.whole(issue_id, ALL), self.sidecar.agents
        folders = {
            row["agent_id"]: self.sidecar.settings.storage / "agents" / row["agent_id"] for row in item["agents"]
        }
        briefs = await agents.disk.run(story_export.read_briefs, folders)
        asked = [row for row in known_approvals(self.sidecar, self.claims).values() if row.issue_id == issue_id]
        facts = {"exported_at": iso(), "project_id": self.claims.project_id, "version": self.sidecar.info.version}
        story = facts | item | {"approvals": msgspec.to_builtins(asked), "briefs": briefs}
        content: bytes = await ask(
            self.sidecar, story_export.whole_story, story, *timeline_facts(self, issue_id), wanted,
            pool=story_export.EXPORTS,
        )  # fmt: skip
        ending = "md" if wanted == "markdown" else "json"
        self.content_type = "text/markdown; charset=utf-8" if wanted == "markdown" else "application/json"
        self.set_header("Content-Disposition", f'attachment; filename="{issue_id}.{ending}"')
        return content


def timeline_facts(endpoint: Endpoint, issue_id: str) -> tuple[Any, ...]:
    """What a Timeline is made with."""
    sidecar = endpoint.sidecar
    return sidecar.settings, issue_id, known_approvals(sidecar, endpoint.claims), sidecar.bus.event_id


def timeline_page(read: Records, _: str, *facts: Any) -> dict[str, Any]:
    *made_with, since, limit = facts
    return Timeline(read, *made_with).page(since, limit)


# -- what is not in the database


class Stories:
    """The issues that are written down, looked at again after a while, and what plugins say of one."""

    SECONDS = 2.0

    def __init__(self, sidecar: Sidecar) -> None:
        self._settings, self._hooks = sidecar.settings, sidecar.hooks
        self.began = time.time() - (time.monotonic() - sidecar.metrics.began)
        self._written = Shared[dict[str, Written]](self.SECONDS)

    async def written(self) -> dict[str, Written]:
        """By id in small letters; the first place that has one tells it."""
        return await self._written.get(lambda: POOL.run(self._read))

    def _read(self) -> dict[str, Written]:
        """Nothing where the plugin's options are not there. Blocks."""
        found: dict[str, Written] = {}
        for row in written_issues(self._settings):  # type: ignore[arg-type]
            found.setdefault(row.issue_id.lower(), row)
        return found

    def resolve(self, issue_id: str) -> dict[str, Any] | None:
        """Title and body of an issue, None where no plugin knows it. Blocks."""
        try:
            told: dict[str, Any] | None = self._hooks.first("resolve_issue", issue_id=issue_id, settings=self._settings)
        except IssueNotFound:
            return None
        return told


PARTS: weakref.WeakKeyDictionary[Sidecar, Stories] = weakref.WeakKeyDictionary()


def stories_of(sidecar: Sidecar) -> Stories:
    if sidecar not in PARTS:
        PARTS[sidecar] = Stories(sidecar)
    return PARTS[sidecar]


def known_approvals(sidecar: Sidecar, claims: Claims) -> dict[str, Approval]:
    """What was asked of late, by id."""
    listed = approvals_of(sidecar).page(ApprovalListQuery(issue_id=claims.issue_id, limit=2 * ALL)).approvals
    return {row.approval_id: row for row in listed}


async def surroundings(sidecar: Sidecar, claims: Claims) -> Surroundings:
    waiting: dict[str, int] = {}
    for row in known_approvals(sidecar, claims).values():
        if row.state == "open" and row.issue_id:
            waiting[row.issue_id] = waiting.get(row.issue_id, 0) + 1
    runs = {run.issue_id: {"run_id": run.run_id, "state": run.state} for run in (await runs_of(sidecar)).known.values()}
    return Surroundings(waiting, runs)


# -- questions of the database, each asked in a thread


def list_issues(
    read: Records, project: str, query: IssueQuery, beside: Surroundings, written: dict[str, Written], meter: Any
) -> dict[str, Any]:
    """A page of issues: behind the cursor ``since``, from the beginning where that is "earliest", else the newest."""
    found = activities(read, project, query.issue_id)
    names = {name.lower() for name in found}
    rows = [(1, round(on.last_at, 6), name, on) for name, on in found.items()]
    for name, row in written.items():
        if name not in names and query.issue_id in (None, row.issue_id):
            moment = round(min(max(row.changed, 0.0), 1e11), 6)  # a file may claim to be of any time
            rows.append((0, moment, row.issue_id, Activity(row.issue_id, first_at=moment, last_at=moment)))
    newest, after = not query.since, cursor_of(query.since)
    rows = sorted((row for row in rows if row[:3] > after), key=lambda row: row[:3], reverse=newest)
    spent = meter.of_issues(found) if isinstance(meter, SpendMeter) else {}
    kept = []
    for item in shown(read, project, rows, beside):
        if query.state in (None, item["state"]):
            kept.append(finished(item, written.get(item["issue_id"].lower()), spent))
            if len(kept) > query.limit:
                break
    more, kept = len(kept) > query.limit, kept[: query.limit]
    kept = kept[::-1] if newest else kept
    cursors = [item.pop("cursor") for item in kept]
    return {"issues": kept, "next_cursor": cursors[-1] if kept else None, "has_more": more}


def cursor_of(text: str) -> tuple[int, float, str]:
    """What comes after the place that a cursor names. Raises REQ_001."""
    if text in ("", "earliest"):
        return (-1, 0.0, "")
    found = re.fullmatch(rf"([01])-(\d{{1,12}}\.\d{{6}})-({IDENTIFIER})", text, re.ASCII)
    if not found:
        problem = "since must be a next_cursor of this list, or earliest"
        raise ApiError("REQ_001", problem, details={"path": "since"})
    return (int(found[1]), float(found[2]), found[3])


def shown(
    read: Records, project: str, rows: Sequence[tuple[int, float, str, Activity]], beside: Surroundings
) -> Iterator[dict[str, Any]]:
    """The rows' issues with their states, AT_ONCE looked at together; each with its cursor."""
    for begin in range(0, len(rows), AT_ONCE):
        chosen = rows[begin : begin + AT_ONCE]
        described = items(read, project, [row[3] for row in chosen], beside)
        for (worked, at, name, _), item in zip(chosen, described, strict=True):
            state = item["state"] if worked or item["state"] != "idle" else "open"
            yield item | {"state": state, "cursor": f"{worked}-{at:.6f}-{name}"}


def finished(item: dict[str, Any], written: Written | None, spent: dict[str, Any]) -> dict[str, Any]:
    """An item as readers get it, with its cursor and task beside it."""
    result, task = item.pop("result"), redact(whole_task(item.pop("task")))[0]
    usd, tokens = spent.get(item["issue_id"], (None, None))
    latest = result and {name: result[name] for name in ("agent_type", "status")} | {"stored_at": iso(result["stored"])}
    first_line = HEADING.sub("", next((line.strip() for line in task.splitlines() if line.strip()), ""))
    title, source = (written.title, written.source) if written else (first_line[:200], "")
    return item | {
        "title": title or None, "source": source or None, "latest_result": latest, "cost_usd": usd, "tokens": tokens,
        "first_at": iso(item["first_at"]), "last_at": iso(item["last_at"]), "task": task or None,
    }  # fmt: skip


def agents_and_results(
    read: Records, project: str, issue_id: str, limit: int
) -> tuple[list[dict[str, Any]], list[Raw]]:
    """The issue's newest agents and results, newest last."""
    query = ResultQuery(issue_id=issue_id, limit=limit)
    results, _ = page(read, "result", "select id, body from result", project, query, {"issue": issue_id})
    agents, _ = page(read, "agent", read.AGENTS, project, query, {"issue": issue_id})
    return [agent_row(row) for row in agents], [Raw(row["body"]) for row in results]

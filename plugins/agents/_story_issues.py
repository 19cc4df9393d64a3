"""What the database says of issues: who worked on each and when, how it stands. Each question is asked in a thread."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from msgspec import Struct

from cco_sidecar import ANY_ISSUE, FAILED_STATES, Pool, Records, Sidecar, connect_database, is_identifier
from cco_sidecar_plugins.results._latest import latest_result
from cco_sidecar_plugins.storage._pages import rows_by_number

Answer = TypeVar("Answer")
IssueState = Literal["open", "working", "waiting", "failed", "done", "idle"]
HISTORY = 200  # results of an issue from which follows whom routing proposes still
POOL = Pool("stories", 4, 60)


async def ask(sidecar: Sidecar, question: Callable[..., Answer], *facts: Any, pool: Pool = POOL) -> Answer:
    """The answer to a question of the database, which it asks by a connection of its own, off the loop."""

    def answer() -> Answer:
        with contextlib.closing(Records(connect_database(sidecar.storage.path, read_only=True))) as read:
            return question(read, sidecar.settings.project, *facts)

    return await pool.run(answer)


class Activity(Struct):
    """What there is on an issue: numbers, and the sequence numbers of the first and the last of each kind."""

    issue: str
    agents: int = 0
    active: int = 0
    results: int = 0
    first_agent: int | None = None
    last_agent: int | None = None
    last_result: int | None = None
    first_at: float = 0.0
    last_at: float = 0.0

    def cover(self, *moments: float) -> None:
        self.first_at = min(self.first_at or moments[0], *moments)
        self.last_at = max(self.last_at, *moments)


def activities(read: Records, project: str, issue: str | None = None) -> dict[str, Activity]:
    """What there is on each issue, or on one, that an agent, a result or an event names."""
    found: dict[str, Activity] = {}
    own, values = ("and issue = ?", (project, issue)) if issue is not None else ("", (project,))

    def of(name: str) -> Activity:
        return found.setdefault(name, Activity(name))

    for row in read.rows(
        "select issue, count(*) as number, sum(ended is null) as active, min(seq) as first, max(seq) as last,"
        f" min(started) as began, max(coalesce(ended, started)) as moved from agent where project = ? {own}"
        " group by issue", *values,
    ):  # fmt: skip
        on = of(row["issue"])
        on.agents, on.active, on.first_agent, on.last_agent = row["number"], row["active"], row["first"], row["last"]
        on.cover(row["began"], row["moved"])
    grouped = f"count(*) as number, min(seq) as first, max(seq) as last from result where project = ? {own}"
    results = read.rows(f"select issue, {grouped} group by issue", *values)
    stored = by_number(read, "select seq, stored as at from result", both_ends(results))
    for row in results:
        on = of(row["issue"])
        on.results, on.last_result = row["number"], row["last"]
        on.cover(stored[row["first"]]["at"], stored[row["last"]]["at"])
    events = read.rows(
        "select issue, min(seq) as first, max(seq) as last from event indexed by event_by_issue"
        f" where project = ? {own} and issue is not null group by issue", *values,
    )  # fmt: skip
    created = by_number(read, "select seq, created as at from event", both_ends(events))
    for row in events:
        if row["issue"] != ANY_ISSUE and is_identifier(row["issue"]):  # an event may call anything an issue
            of(row["issue"]).cover(created[row["first"]]["at"], created[row["last"]]["at"])
    return found


def both_ends(rows: Iterable[Any]) -> list[int]:
    return [row[name] for row in rows for name in ("first", "last")]


def by_number(read: Records, select: str, seqs: Iterable[int | None]) -> dict[int, Any]:
    """Rows by their sequence numbers."""
    return {row["seq"]: row for row in rows_by_number(read, select, [seq for seq in seqs if seq is not None])}


# -- how an issue stands


class Surroundings(Struct):
    """What is not in the database: by issue the number of questions to people, and the latest run."""

    waiting: dict[str, int]
    runs: dict[str, dict[str, Any]]


def items(read: Records, project: str, chosen: Sequence[Activity], beside: Surroundings) -> Iterator[dict[str, Any]]:
    """The facts and the state of each of these issues."""
    working: dict[str, list[dict[str, Any]]] = {}
    living = "select id, type, state, issue from agent where project = ? and state in ('starting', 'running')"
    for row in read.rows(f"{living} order by seq", project):
        who = {"agent_id": row["id"], "agent_type": row["type"], "state": row["state"]}
        working.setdefault(row["issue"], []).append(who)
    latest = by_number(read, "select seq, agent_type, status, stored from result", (on.last_result for on in chosen))
    agents = "select seq, id, state, task from agent"
    last, first = (by_number(read, agents, seqs) for seqs in (
        (on.last_agent for on in chosen), (on.first_agent for on in chosen),
    ))  # fmt: skip
    for on in chosen:
        result = latest.get(on.last_result or 0)
        item = {
            "issue_id": on.issue, "working": working.get(on.issue, []), "results": on.results, "result": result,
            "agents": {"active": on.active, "ended": on.agents - on.active},
            "task": first[on.first_agent]["task"] if on.first_agent else "",
            "waiting_for_people": beside.waiting.get(on.issue, 0), "run": beside.runs.get(on.issue),
            "first_at": on.first_at, "last_at": on.last_at,
        }  # fmt: skip
        yield item | {"state": state_of(read, project, item, last.get(on.last_agent or 0))}


def state_of(read: Records, project: str, item: dict[str, Any], last_agent: Any) -> IssueState:
    """How an issue stands; a question to a person comes first."""
    result, run = item["result"], item["run"]
    if item["waiting_for_people"]:
        return "waiting"
    if item["working"] or (run and run["state"] == "running"):
        return "working"
    silent = last_agent and last_agent["state"] in FAILED_STATES
    if silent and latest_result(read, project, last_agent["id"])["result_id"] is None:
        return "failed"
    if not result or result["status"] != "success":
        has_failed = bool(result and result["status"] == "failed") or bool(run and run["state"] == "failed")
        return "failed" if has_failed else "idle"
    return "idle" if still_proposed(read, project, item["issue_id"]) else "done"


def still_proposed(read: Records, project: str, issue: str) -> set[str]:
    """The types that routing has proposed and that have stored no result since, as ``cco run`` counts them."""
    pending: set[str] = set()
    for row in reversed(read.issue_facts(project, issue, HISTORY)):
        proposed = json.loads(row["proposed"])
        pending.discard(row["agent_type"])
        pending |= set(proposed or ([] if row["status"] == "success" else [row["agent_type"]]))
    return pending

"""An issue's timeline: its agents, results and events as one list, the oldest first, made from what is stored.

Six sources, each in an order of its own, are merged by time; a cursor says how far each was read. So a page costs what
it holds, however long the story is, and nothing that comes later is missed. What retention has removed from the log,
ends and proposals, is told by the ledger and the results, in fewer words.
"""

from __future__ import annotations

import heapq
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from cco_sidecar import (
    ANY_ISSUE,
    PAGE_BYTES,
    ApiError,
    NextAgent,
    Records,
    agent_facts,
    agent_row,
    harmless,
    iso,
    issues_named,
    redact,
)
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.commands._pipeline_plan import short_decision
from cco_sidecar_plugins.results._latest import latest_result
from cco_sidecar_plugins.storage._pages import created_from, events_with, read_moment

ASKED = ("approval_wanted", "question_asked")
ANSWERED = {"approval_answered": "approval_wanted", "question_answered": "question_asked"}
STEP = 100  # rows that are read at once
DECISIONS, WORDS = 50, 2000  # of a result: how many are shown, and how many characters of each
LIFE = 86_400.0  # seconds that the service's own events are kept at most
TICKS = 2**22  # of a second: a float of seconds is a whole number of them from 2004 to 2038
NUMBERS = 2**32  # of rows
SOURCES = "eapnsx"  # events, those of several issues, results, proposals, starts, ends


class FileCounts(Struct):
    """How many files a result names."""

    created: int
    modified: int
    deleted: int


class TimelineEntry(Struct, omit_defaults=True):
    """Something that happened on an issue. Its ``kind`` says which fields there are beside the first six."""

    at: str
    kind: Literal["spawned", "event", "result", "routing", "approval", "ended"]
    id: str
    agent_id: str | None
    agent_type: str | None
    title: str
    task: str | UnsetType = UNSET
    depth: int | UnsetType = UNSET
    parent: str | UnsetType | None = UNSET
    permissions: list[str] | UnsetType = UNSET
    event_type: str | UnsetType = UNSET
    topic: str | UnsetType = UNSET
    publisher: str | UnsetType = UNSET
    data: dict[str, Any] | UnsetType = UNSET
    result_id: str | UnsetType | None = UNSET
    status: str | UnsetType = UNSET
    decisions: list[str] | UnsetType = UNSET
    files: FileCounts | UnsetType = UNSET
    next_agents: list[dict[str, Any]] | UnsetType = UNSET
    approval_id: str | UnsetType = UNSET
    approval_kind: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    command: str | UnsetType | None = UNSET
    state: str | UnsetType | None = UNSET
    answer: str | UnsetType | None = UNSET
    answered_by: str | UnsetType | None = UNSET
    answered_at: str | UnsetType | None = UNSET
    exit_code: int | UnsetType | None = UNSET
    signal: int | UnsetType | None = UNSET
    reason: str | UnsetType | None = UNSET
    duration_seconds: float | UnsetType | None = UNSET
    cpu_seconds: float | UnsetType | None = UNSET
    peak_memory_bytes: int | UnsetType | None = UNSET
    input_tokens: int | UnsetType | None = UNSET
    output_tokens: int | UnsetType | None = UNSET
    cost_usd: float | UnsetType | None = UNSET
    output_tail: list[str] | UnsetType = UNSET


class Envelope(Struct):
    """An event as it is stored; its ``data`` is not looked into, whatever numbers it holds."""

    event_type: str
    publisher: str
    topic: str
    data: Raw
    correlation_id: str | None = None


class CompletedData(Struct):
    """What the service itself says in an agent_completed event."""

    result_id: str
    agent_type: str
    next_agents: list[NextAgent]


class ResultPart(Struct):
    status: str
    decisions: list[str] = []
    errors: list[Any] = []
    files_created: list[Raw] = []
    files_modified: list[Raw] = []
    files_deleted: list[Raw] = []


class ResultView(Struct):
    """What a timeline tells of a stored result."""

    result: ResultPart


Entry = dict[str, Any]
Happening = tuple[float, str, int, Entry | None]  # when, which source, its number there, what is told of it


def end_number(ended: float, seq: int) -> int:
    """Where an agent's end stands among the ends: those of one moment are in the order of the starts."""
    return int(ended * TICKS) * NUMBERS + seq


CURSOR = r"\.".join(rf"{name}(\d{{1,{26 if name == 'x' else 18}}})" for name in SOURCES)


def read_cursor(text: str) -> dict[str, int]:
    """How far each source was read. Raises REQ_001."""
    if text in ("", "earliest"):
        return dict.fromkeys(SOURCES, 0)
    found = re.fullmatch(CURSOR, text, re.ASCII)
    if not found:
        raise ApiError(
            "REQ_001", "since must be a next_cursor of this timeline, or earliest", details={"path": "since"}
        )
    return dict(zip(SOURCES, map(int, found.groups()), strict=True))


class Timeline:
    """One page of an issue's timeline. ``approvals`` are those that are known on the loop, by id; ``event_id`` makes an
    event's id from its number.
    """

    def __init__(
        self,
        read: Records,
        settings: PluginSettings,
        issue: str,
        approvals: dict[str, Any],
        event_id: Callable[[int], str],
    ) -> None:
        self._read, self._project, self._issue = read, settings.project, issue
        self._approvals, self._event_id, self._now = approvals, event_id, time.time()
        floor = read.number("floor")
        oldest = created_from(read, floor + 1) if floor else 0.0
        # What is older than this is no longer in the log for certain, what is younger is.
        self._retained = max(oldest, self._now - min(LIFE, settings.event_retention))
        types = "select id, type from agent where project = ? and issue = ?"
        self._types = {row["id"]: row["type"] for row in read.rows(types, self._project, issue)}

    def page(self, since: str, limit: int) -> dict[str, Any]:
        """Entries after ``since``, the oldest first. Raises REQ_001."""
        reached, entries, size, more = read_cursor(since), list[Entry](), 0, False
        for at, source, number, entry in self._merged(reached):
            if entry is not None:
                size += len(msgspec.json.encode(entry))
                if len(entries) == limit or (entries and size > PAGE_BYTES):
                    more = True
                    break
                entries.append(entry)
            reached[source] = number
            if source == "n" and at >= self._retained:  # the log has told whom routing proposed
                reached["p"] = max(reached["p"], number)
        cursor = ".".join(f"{name}{reached[name]}" for name in SOURCES)
        return {"entries": entries, "next_cursor": cursor, "has_more": more}

    def _merged(self, reached: dict[str, int]) -> Iterator[Happening]:
        tells = {
            "e": self._events(self._issue, "e", reached["e"]), "a": self._events(ANY_ISSUE, "a", reached["a"]),
            "p": self._proposals(reached["p"]), "n": self._results(reached["n"]), "s": self._starts(reached["s"]),
            "x": self._ends(reached["x"]),
        }  # fmt: skip
        return heapq.merge(*tells.values(), key=lambda happening: happening[0])

    def _rows(self, select: str, clauses: str, after: int, *values: Any, whose: str = "") -> Iterator[Any]:
        """Rows in the order of ``seq``, STEP at a time."""
        while True:
            sql = f"{select} where project = ? and issue = ? and {clauses} seq > ? order by seq limit {STEP}"
            rows = self._read.rows(sql, self._project, whose or self._issue, *values, after)
            yield from rows
            if len(rows) < STEP:
                return
            after = rows[-1]["seq"]

    def _body(self, table: str, seq: int) -> bytes | None:
        """A row's body; None where it was removed just now. Those of a list's rows are not read all at once."""
        body = self._read.one(f"select body from {table} where seq = ?", seq)
        return None if body is None else bytes(body)

    # -- agents

    def _starts(self, after: int) -> Iterator[Happening]:
        columns = "select seq, id, type, task, parent, started, depth, permissions from agent"
        joined = f"{columns} left join agent_evidence on agent_evidence.agent = agent.id"
        for row in self._rows(joined, "", after):
            entry = told(row["started"], "spawned", f"spawned-{row['id']}", row["id"], row["type"], "started")
            entry |= {"task": redact(row["task"])[0], "depth": row["depth"] or 1, "parent": row["parent"]}
            yield row["started"], "s", row["seq"], entry | {"permissions": json.loads(row["permissions"] or "[]")}

    def _ends(self, after: int) -> Iterator[Happening]:
        """Ends of which no event tells: the log has it no longer, or there never was a process. In the order in which
        they came, which is not that of the starts. Who pages on when the log has forgotten an end hears of it twice: an
        end that was recorded late would else be missed.
        """
        gone = "(ended < ? or pid is null) and (ended, agent.seq) > (?, ?)"
        sql = f"{self._read.AGENTS} where project = ? and issue = ? and {gone} order by ended, agent.seq limit {STEP}"
        last = after // NUMBERS / TICKS, after % NUMBERS
        while rows := self._read.rows(sql, self._project, self._issue, self._retained, *last):
            for row in rows:
                agent, result = agent_row(row), latest_result(self._read, self._project, row["id"])["result_id"]
                measured = {"cpu_seconds": agent.get("cpu"), "peak_memory_bytes": agent.get("peak_memory")}
                data = agent_facts(agent) | measured | {"result_id": result}
                yield row["ended"], "x", end_number(row["ended"], row["seq"]), ended_entry(row["ended"], data)
            last = row["ended"], row["seq"]

    # -- results

    def _results(self, after: int) -> Iterator[Happening]:
        for row in self._rows("select seq, id, agent_id, agent_type, status, stored from result", "", after):
            if (body := self._body("result", row["seq"])) is None:
                continue
            result = msgspec.json.decode(body, type=ResultView).result
            counts = FileCounts(*map(len, (result.files_created, result.files_modified, result.files_deleted)))
            entry = told(row["stored"], "result", row["id"], row["agent_id"], row["agent_type"], result.status)
            shown = [decision[:WORDS] for decision in result.decisions[:DECISIONS]]
            entry |= {"result_id": row["id"], "status": result.status, "decisions": shown}
            if result.status != "success" and result.errors:
                entry["reason"] = short_decision(msgspec.to_builtins(result))[:WORDS]
            yield row["stored"], "n", row["seq"], entry | {"files": msgspec.to_builtins(counts)}

    def _proposals(self, after: int) -> Iterator[Happening]:
        """Whom routing proposed after results whose events are gone: the types are known, the reasons are not."""
        columns = "select seq, id, agent_id, agent_type, stored, proposed from result"
        for row in self._rows(columns, "stored < ? and", after, self._retained):
            types = [{"agent_type": name, "priority": None, "reason": None} for name in json.loads(row["proposed"])]
            entry = routing_entry(row["stored"], row["agent_id"], row["agent_type"], row["id"], types)
            yield row["stored"] + 1e-6, "p", row["seq"], entry  # behind the result itself

    # -- events

    def _events(self, whose: str, source: str, after: int) -> Iterator[Happening]:
        select = "select seq, type, created from event indexed by event_by_issue"
        for row in self._rows(select, "issue is not null and expires > ? and", after, self._now, whose=whose):
            if row["type"] != "agent_failed" and (body := self._body("event", row["seq"])) is not None:
                event = msgspec.json.decode(body, type=Envelope)
                if whose == self._issue or self._issue in issues_named(msgspec.json.decode(body)):
                    yield row["created"], source, row["seq"], self._event(row, event)

    def _event(self, row: Any, event: Envelope) -> Entry | None:
        """What is told of an event; None where another entry tells it."""
        at, event_id = row["created"], self._event_id(row["seq"])
        if event.event_type == "agent_exited":
            return ended_entry(at, msgspec.json.decode(event.data))
        if event.event_type in (*ASKED, *ANSWERED):
            return self._approval(at, event_id, row["seq"], event)
        if event.event_type == "agent_completed":  # with tokens that could cause it anyhow clients publish it, too
            try:
                data = msgspec.json.decode(event.data, type=CompletedData)
                types = msgspec.to_builtins(data.next_agents)
                return routing_entry(at, event.publisher, data.agent_type, data.result_id, types)
            except msgspec.ValidationError:
                pass
        agent_type = self._types.get(event.publisher)
        entry = told(at, "event", event_id, event.publisher if agent_type else None, agent_type, event.event_type)
        entry |= {"event_type": event.event_type, "topic": event.topic, "publisher": event.publisher}
        return entry | {"data": event.data}

    def _approval(self, at: float, event_id: str, seq: int, event: Envelope) -> Entry | None:
        """What an agent asked, with what became of it; an answer tells only what the log has no question for."""
        data: dict[str, Any] = msgspec.json.decode(event.data)
        if event.event_type in ANSWERED and data.get("approval_id"):
            asked = int(data["approval_id"].rpartition("-")[2])
            if self._read.one("select 1 from event where seq = ? and expires > ?", asked, self._now):
                return None
        if event.event_type in ASKED:
            known = self._approvals.get(event_id)
            data |= msgspec.to_builtins(known) if known else self._answer_to(event_id, seq, event.event_type)
        else:
            data.setdefault("answered_at", iso(at))
        kind = "question" if "question" in event.event_type else "approval"
        title = f"{'asks' if kind == 'question' else 'wants approval'}: {data.get('command') or data.get('text')}"
        entry = told(
            at, "approval", data.get("approval_id") or event_id, data.get("agent_id"), data.get("agent_type"), title
        )
        names = ("text", "command", "state", "answer", "answered_by", "answered_at")
        facts = {name: data.get(name) for name in names} | {"approval_kind": kind}
        return entry | facts | {"approval_id": entry["id"]}

    def _answer_to(self, approval_id: str, seq: int, asked: str) -> dict[str, Any]:
        """What became of a question that the loop has forgotten."""
        answered = next(name for name, its in ANSWERED.items() if its == asked)
        read, named = self._read, approval_id.encode()
        for row in events_with(read, named, self._project, seq, read.head(), 1, answered):
            return msgspec.json.decode(row["body"])["data"] | {"answered_at": iso(row["created"])}
        return {"state": None}


def told(at: float, kind: str, name: str, agent_id: str | None, agent_type: str | None, title: str) -> Entry:
    """What every entry has."""
    words = harmless(title)[:200]
    return {"at": iso(at), "kind": kind, "id": name, "agent_id": agent_id, "agent_type": agent_type, "title": words}


def routing_entry(at: float, agent_id: str, agent_type: str, result_id: str, types: list[dict[str, Any]]) -> Entry:
    names = ", ".join(str(item["agent_type"]) for item in types)
    title = f"proposes {names}" if types else "proposes nobody more"
    entry = told(at, "routing", f"routing-{result_id}", agent_id, agent_type, title)
    return entry | {"next_agents": types, "result_id": result_id}


def ended_entry(at: float, data: dict[str, Any]) -> Entry:
    """An agent's end by the facts of its agent_exited event."""
    began, over = (read_moment(data.get(name) or "") for name in ("started_at", "ended_at"))
    duration = None if began is None or over is None else round(over - began, 3)
    entry = told(at, "ended", f"ended-{data['agent_id']}", data["agent_id"], data["agent_type"], data["state"])
    names = (
        "state", "exit_code", "signal", "reason", "result_id", "cpu_seconds", "peak_memory_bytes", "input_tokens",
        "output_tokens", "cost_usd",
    )  # fmt: skip
    facts = {name: data.get(name) for name in names}
    return entry | facts | {"duration_seconds": duration, "output_tail": data.get("output_tail") or []}

"""Retained events and dead letters for people and tools: ``GET /api/events``. Polls, too, may begin at a time."""

from __future__ import annotations

import asyncio
import bisect
import functools
import time
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from cco_sidecar import (
    PAGE_BYTES,
    SPAWN,
    ApiError,
    Claims,
    Endpoint,
    EventBus,
    EventType,
    KnownEvent,
    Limit,
    Records,
    Route,
    Row,
    Sidecar,
    Since,
    hookimpl,
)
from cco_sidecar_plugins.storage._pages import ORDER, created_from, cut_page, read_moment


@hookimpl
def register_routes() -> list[Route]:
    return [Route("GET", "/api/events", ListEvents)]


@hookimpl
def part_class(base: type) -> type | None:
    return type("TimedBus", (TimedBus, base), {}) if issubclass(base, EventBus) else None


class TimedBus(EventBus):
    """Finds where a reader begins who gives a time."""

    def parse_cursor(self, text: str, floor: int) -> int:
        moment = read_moment(text) if text[:1].isdecimal() else None  # a cursor would be read in vain at each poll
        if moment is None:
            try:
                return super().parse_cursor(text, floor)
            except ApiError as error:
                if error.code == "REQ_001":
                    raise ApiError("REQ_001", SINCE_IN_WORDS, details=error.details) from None
                raise
        numbers = range(floor + 1, self._storage.head + 1)
        return floor + bisect.bisect_left(numbers, moment, key=functools.partial(created_from, self._storage.read))


SINCE_IN_WORDS = "since must be an event id, a cursor, earliest, latest or a time, such as 2026-01-31T12:00:00Z"


TURN_SECONDS = 0.01  # after which others get their turn on the loop


class EventQuery(Struct):
    type: EventType | None = None
    topic: str | None = None
    filter: Annotated[str, Meta(max_length=4096)] = ""
    since: Since = ""
    limit: Limit = 100
    dead: bool = False


class ListEvents(Endpoint):
    """Retained events for people and tools; reading here is not delivery. ``dead=true`` needs spawn_agents."""

    query_type = EventQuery
    answers = {200: "EventList"}
    problems = (410,)
    failure = "EVT_001"

    async def respond(self) -> dict[str, Any]:
        self.sidecar.tokens.check_permission(self.claims, SPAWN if self.query.dead else None)
        return await page(self.sidecar, self.claims, self.query)


async def page(sidecar: Sidecar, claims: Claims, query: EventQuery) -> dict[str, Any]:
    """Retained events, or dead letters, after ``since``, or the newest ones; newest last."""
    bus, read, newest, project = sidecar.bus, sidecar.storage.read, not query.since, claims.project_id
    filter = bus.parse(query.filter).within(claims.issue_id)
    found: list[Row] = []
    floor = 0 if query.dead else sidecar.storage.floor  # retention is what makes dead letters
    after, upto = floor if newest else bus.parse_cursor(query.since, floor), read.head()
    while len(found) <= query.limit and sum(len(row["body"]) for row in found) <= PAGE_BYTES:
        rows = step(read, project, query, after, upto, bus.STEP)
        asked = [row for row in rows if query.topic in (None, row["topic"])]
        turn = time.monotonic() + TURN_SECONDS
        for row in asked:
            if time.monotonic() > turn:
                await asyncio.sleep(0)
                turn = time.monotonic() + TURN_SECONDS
            if not filter.text or filter.matches(KnownEvent(msgspec.json.decode(row["body"]))):
                found.append(row)
        if len(rows) < bus.STEP and sum(len(row["body"]) for row in rows) <= PAGE_BYTES:
            break  # at once: while others get their turn, what was read takes memory
        after, upto = (after, rows[-1]["seq"] - 1) if newest else (rows[-1]["seq"], upto)
        await asyncio.sleep(0)
    shown, more = cut_page(found, query.limit, newest=newest)
    cursor = bus.event_id(shown[-1]["seq"]) if shown else None
    return {"events": [Raw(bus.envelope(row)) for row in shown], "next_cursor": cursor, "has_more": more}


def step(read: Records, project: str, query: EventQuery, after: int, upto: int, limit: int) -> list[Row]:
    """Events, or dead letters, with after < seq <= upto: without ``query.since`` from the newest back."""
    table = "dead_letter" if query.dead else "event" if query.type else "event not indexed"  # else SQLite would sort
    clauses: dict[str, Any] = {"project = ?": project, "seq > ?": after, "seq <= ?": upto}
    clauses |= {} if query.dead else {"expires > ?": time.time()}
    clauses |= {"type = ?": query.type} if query.type else {}
    order = ORDER[not query.since]
    sql = f"select seq, topic, body from {table} where {' and '.join(clauses)} order by {order} limit ?"
    return read.portion(sql, *clauses.values(), limit)

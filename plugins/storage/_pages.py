"""Lists out of the database, by its own SQL: the newest rows, or with ``since`` those that come after it; and events by
what their bodies hold.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from datetime import UTC, datetime
from typing import Annotated, Any

from msgspec import Meta

from cco_sidecar import PAGE_BYTES, ApiError, Records, Row

MADE = {"result": "stored", "agent": "started"}  # the columns that hold when
ORDER = {False: "seq", True: "seq desc"}  # of a list's rows, and with ``newest``

PartOfId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,128}\Z")]


def page(
    read: Records,
    table: str,
    select: str,
    project: str,
    query: Any,
    equal: dict[str, str | list[str] | None],
    part: str | None = None,
) -> tuple[list[Row], bool]:
    """A list's rows, newest last, and whether there are more: what comes after the row with the id ``query.since``, or
    since that time, from the beginning where that is "earliest", else the newest. Each column in ``equal`` has one of
    the values, where some are given, and the id holds ``part``. Raises REQ_001 for an id that is not there.
    """
    after, moment = 0, read_moment(query.since)
    if moment is not None:
        # The plus keeps SQLite from an index by which all of the project's rows would have to be sorted.
        older = f"select seq from {table} where +project = ? and {MADE[table]} < ? order by seq desc limit 1"
        after = read.one(older, project, moment) or 0
    elif query.since not in ("", "earliest"):
        found = read.rows(f"select seq from {table} where project = ? and id = ?", project, query.since)
        if not found:
            problem = (
                f"since must be the id of one that the list has, earliest or a time; there is no {table}"
                f" {query.since[:128]}"
            )
            raise ApiError("REQ_001", problem, details={"path": "since"})
        after = found[0]["seq"]
    given = {name: [value] if isinstance(value, str) else value for name, value in equal.items() if value is not None}
    # A plus keeps SQLite from using a column's index: only the first column's is to be used, and for the project
    # alone the table itself, as these are in the order of seq.
    clauses = "".join(
        f" and {'+' if number else ''}{name} in ({', '.join('?' * len(values))})"
        for number, (name, values) in enumerate(given.items())
    )
    parts = () if part is None else (part,)
    clauses += f" and seq in (select seq from {table} where instr(id, ?))" if parts else ""  # by the ids' own index
    mine = "project" if given else "+project"
    # Their sizes first: a body may have many megabytes, and a page holds few of those.
    size = "length(body)" if "body" in select else "0"
    sql = f"select seq, {size} as size from {table} where {mine} = ? and seq > ?{clauses}"
    sql += f" order by {ORDER[not query.since]} limit ?"
    rows = read.rows(sql, project, after, *itertools.chain.from_iterable(given.values()), *parts, query.limit + 1)
    kept = rows[: fitting([row["size"] for row in rows], query.limit)]
    return rows_by_number(read, select, [row["seq"] for row in kept]), len(kept) < len(rows)


def read_moment(text: str) -> float | None:
    """Epoch seconds of an ISO 8601 time, in UTC where it names no zone; None for other texts."""
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def rows_by_number(read: Records, select: str, seqs: list[int]) -> list[Row]:
    """The rows with these sequence numbers, in their order."""
    return read.rows(f"{select} where seq in (select value from json_each(?)) order by seq", json.dumps(seqs))


def events_with(
    read: Records, content: bytes, project: str, after: int, upto: int, limit: int, type: str
) -> list[Row]:  # fmt: skip
    """As ``Records.events``, of those alone whose body has some bytes."""
    columns = "seq, type, topic, created, delivered, body"
    source, of_type = ("event", "type = ?") if type != "*" else ("event not indexed", "? = '*'")
    sql = f"select {columns} from {source} where {of_type} and project = ? and seq > ? and seq <= ? and expires > ?"
    sql += " and instr(body, ?) order by seq limit ?"
    return read.portion(sql, type, project, after, upto, time.time(), content, limit)


def created_from(read: Records, seq: int) -> float:
    """When the first event that has this number or a later one was made; infinite where there is none."""
    moment = read.one("select created from event where seq >= ? order by seq limit 1", seq)
    return math.inf if moment is None else float(moment)


def cut_page(rows: list[Row], limit: int, *, newest: bool) -> tuple[list[Row], bool]:
    """A list's rows, newest last, and whether there are more: the first ``limit`` of ``rows``, and one at least, whose
    bodies fit into PAGE_BYTES.
    """
    kept = rows[: fitting([len(row["body"]) for row in rows], limit)]
    return kept[::-1] if newest else kept, len(kept) < len(rows)


def fitting(sizes: list[int], limit: int) -> int:
    """How many of the first bodies, and one at least, fit into PAGE_BYTES and the limit."""
    return min(limit, max(1, sum(total <= PAGE_BYTES for total in itertools.accumulate(sizes))))

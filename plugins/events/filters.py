"""Filters of events that say more than ``field:value``: one of several values, not, a prefix, present, quoted texts."""

from __future__ import annotations

import functools
import re
from typing import Any

from msgspec import UNSET, Struct

from cco_sidecar import ApiError, Channel, EventBus, Filter, Row, find_field, hookimpl, texts_of
from cco_sidecar_plugins.storage._pages import events_with


@hookimpl
def part_class(base: type) -> type | None:
    return type("FilteringBus", (FilteringBus, base), {}) if issubclass(base, EventBus) else None


class FilteringBus(EventBus):
    WINDOW = 5_000  # sequence numbers that SQLite searches for some bytes in one turn

    def parse(self, expression: str) -> Filter:
        return parse(expression)

    def step(self, channel: Channel, filter: Filter, after: int) -> tuple[list[Row], int]:
        """SQLite looks for the bytes that the filter requires: of what does not match little is decoded."""
        content = filter.required_bytes if isinstance(filter, FullFilter) else None
        if content is None or filter.issue is not None:
            return super().step(channel, filter, after)
        project, event_type = channel
        upto = max(after, min(self._storage.head, after + self.WINDOW))
        rows = events_with(self._storage.read, content, project, after, upto, self.STEP, event_type)
        return rows, rows[-1]["seq"] if len(rows) == self.STEP else upto


class FullFilter(Filter, frozen=True):
    required_bytes: bytes | None = None  # what the JSON of every matching event holds, where that is known


PLAIN = r"[A-Za-z0-9_.-]+"  # what JSON writes as it is


@functools.lru_cache(4096)
def parse(text: str) -> FullFilter:
    """Raises ApiError EVT_002 that says what is wrong at which character (counted from 1)."""
    terms = parse_terms(text)
    single = [(term.field, *term.values[0]) for term in terms if not term.negated and len(term.values) == 1]
    issue = next((text for field, text, prefix in single if field == "issue_id" and not prefix), None)
    required = (text for field, text, _ in single if field != "event_id" and re.fullmatch(PLAIN, text))
    return FullFilter(text, terms, issue, required_bytes=next(required, "").encode() or None)


class FilterTerm(Struct, frozen=True):
    """``field:value|value`` or ``field:!value|value``; a value is (text, whether it is a prefix), as ``abc*`` is."""

    field: str
    values: tuple[tuple[str, bool], ...]
    negated: bool

    def __call__(self, event: dict[str, Any]) -> bool:
        if ("", True) in self.values:  # a lone * means present, objects included
            found = find_field(event, self.field) is not UNSET
        else:
            texts = texts_of(find_field(event, self.field))
            found = any(
                text.startswith(value) if prefix else text == value for text in texts for value, prefix in self.values
            )
        return found is not self.negated


FIELD = r"[A-Za-z_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*"
VALUE = r'(?:"(?P<quoted>(?:\\"|[^"])*)"|(?P<bare>[^!,:|"*][^,:|"*]*))(?P<prefix>\*?)|(?P<present>\*)'
VALUE_PROBLEMS = {
    '"': "this quote is never closed",
    "!": "'!' may only stand before the first value; quote it to mean it",
}
NOTHING = "(?!)"
MAX_TERMS = 32


def parse_terms(text: str) -> tuple[FilterTerm, ...]:
    """The terms of ``filter = [ term { "," term } ]``, where ``term = field ":" [ "!" ] value { "|" value }``,
    ``value = ( quoted | bare ) [ "*" ] | "*"``, ``quoted = '"' { any | '\\"' } '"'``, ``bare`` is anything but
    , : | " * and begins with no !. Raises EVT_002.
    """
    terms: list[FilterTerm] = []
    at = 0

    def take(pattern: str, problem: str) -> re.Match[str]:
        nonlocal at
        match = re.compile(pattern).match(text, at)
        if not match:
            problem = f"Invalid filter: {problem} at character {at + 1}"
            raise ApiError("EVT_002", problem, details={"character": at + 1, "path": "filter"})
        at = match.end()
        return match

    while text and (not terms or at < len(text)):
        if terms:
            take(",", "expected ',' or '|' or the end")
        more = len(terms) < MAX_TERMS
        field = take(FIELD if more else NOTHING, "expected a field name" if more else f"more than {MAX_TERMS} terms")[0]
        negated = take(":(!?)", f"expected ':' after the field {field}")[1]
        values: list[tuple[str, bool]] = []
        while not values or text[at : at + 1] == "|":
            at += bool(values)
            value = take(VALUE, VALUE_PROBLEMS.get(text[at : at + 1], "expected a value"))
            plain = (value["quoted"] or value["bare"] or "").replace('\\"', '"')
            values.append((plain, bool(value["prefix"] or value["present"])))
        terms.append(FilterTerm(field, tuple(values), bool(negated)))
    return tuple(terms)

"""Filters of events that say more than ``field:value``: one of several values, not, a prefix, present, quoted texts."""

from __future__ import annotations

import bisect
import functools
import itertools
import re

from msgspec import UNSET, Struct

from cco_sidecar import ApiError, Channel, EventBus, Filter, KnownEvent, Row, find_field, hookimpl
from cco_sidecar_plugins.storage._pages import events_with


@hookimpl
def part_class(base: type) -> type | None:
    return type("FilteringBus", (FilteringBus, base), {}) if issubclass(base, EventBus) else None


class FilteringBus(EventBus):
    WINDOW = 5_000  # sequence numbers that SQLite searches for some bytes in one turn
    STEP_BYTES = 256 * 1024

    def parse(self, expression: str) -> Filter:
        return parse(expression)

    def step(self, channel: Channel, filter: Filter, after: int) -> tuple[list[Row], int]:
        """No more than STEP_BYTES, and one event more, are decoded in one turn."""
        rows, upto = self._found(channel, filter, after)
        sizes = itertools.accumulate(len(row["body"]) for row in rows)
        fit = sum(size <= self.STEP_BYTES for size in sizes) + 1 if filter.text else len(rows)
        return (rows[:fit], rows[fit - 1]["seq"]) if fit < len(rows) else (rows, upto)

    def _found(self, channel: Channel, filter: Filter, after: int) -> tuple[list[Row], int]:
        """SQLite looks for the bytes that the filter requires: of what does not match little is decoded."""
        content = filter.required_bytes if isinstance(filter, FullFilter) else None
        if content is None or filter.issue is not None:
            return super().step(channel, filter, after)
        project, event_type = channel
        upto = max(after, min(self._storage.head, after + self.WINDOW))
        rows = events_with(self._storage.read, content, project, after, upto, self.STEP, event_type)
        return rows, rows[-1]["seq"] if rows else upto


class FullFilter(Filter, frozen=True):
    required_bytes: bytes | None = None  # what the JSON of every matching event holds, where that is known


PLAIN = r"[A-Za-z0-9_.-]+"  # what JSON writes as it is


@functools.lru_cache(128)  # one may take 300 kB
def parse(text: str) -> FullFilter:
    """Raises ApiError EVT_002 that says what is wrong at which character (counted from 1)."""
    terms = parse_terms(text)
    single = [term for term in terms if not term.negated and len(term.exact) + len(term.prefixes) == 1]
    issue = next((value for term in single if term.field == "issue_id" for value in term.exact), None)
    values = (value for term in single if term.field != "event_id" for value in (*term.exact, *term.prefixes))
    required = (value for value in values if re.fullmatch(PLAIN, value))
    return FullFilter(text, terms, issue, required_bytes=next(required, "").encode() or None)


class FilterTerm(Struct, frozen=True):
    """``field:value|value`` or ``field:!value|value``; ``abc*`` is the prefix ``abc``."""

    field: str
    exact: frozenset[str]
    prefixes: tuple[str, ...]
    negated: bool

    def __call__(self, event: KnownEvent) -> bool:
        if "" in self.prefixes:  # a lone * means present, objects included
            return (find_field(event, self.field) is not UNSET) is not self.negated
        found = not event.texts(self.field).keys().isdisjoint(self.exact) or (self.prefixes and self._begins(event))
        return bool(found) is not self.negated

    def _begins(self, event: KnownEvent) -> bool:
        """Whether a text begins with a prefix: a thousand prefixes may be looked for in 100,000 texts."""
        key = f"{self.field}*"  # no field's name has a star
        ordered = event.made[key] = event.made.get(key) or sorted(event.texts(self.field))
        places = ((prefix, bisect.bisect_left(ordered, prefix)) for prefix in self.prefixes)
        return any(ordered[at : at + 1] and ordered[at].startswith(prefix) for prefix, at in places)


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
        exact, prefixes = set[str](), dict[str, None]()
        while not (exact or prefixes) or text[at : at + 1] == "|":
            at += bool(exact or prefixes)
            value = take(VALUE, VALUE_PROBLEMS.get(text[at : at + 1], "expected a value"))
            plain = (value["quoted"] or value["bare"] or "").replace('\\"', '"')
            if value["prefix"] or value["present"]:
                prefixes[plain] = None
            else:
                exact.add(plain)
        terms.append(FilterTerm(field, frozenset(exact), tuple(prefixes), bool(negated)))
    return tuple(terms)

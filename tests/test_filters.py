"""The filter grammar: a table of what matches, a table of what is refused and where, and a fuzz against a plain
model.
"""

from __future__ import annotations

import asyncio
import json
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from conftest import plugin
from hypothesis import given, settings
from hypothesis import strategies as st

from cco_sidecar import ApiError, EventBus, Filter, HangUp, Hooks, KnownEvent, issues_named, new_event

parse = plugin("filters").parse

EVENT: dict[str, Any] = {
    "event_id": "evt-00000000-000000000001", "event_type": "done", "publisher": "me", "topic": "implementation", "correlation_id": None,
    "priority": "normal", "ttl_seconds": 60,
    "data": {
        "issue_id": "issue-123", "status": "success", "count": 5, "ratio": 2.5, "ok": True, "nothing": None, "files": ["a.py", "b.py"],
        "nested": {"version": "v1", "deep": {"er": "x"}}, "odd": 'a,b:c|d"e*', "topic": "hidden", "empty": "", "bang": "!x",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True), ("issue_id:issue-123", True), ("issue_id:issue-12", False), ("issue_id:issue-12*", True), ("issue_id:*", True),
        ("status:failed|success", True), ("status:failed|partial", False), ("status:!failed", True), ("status:!failed|success", False),
        ("status:!fail*", True), ("status:success,count:5", True), ("status:success,count:6", False), ("missing:!x", True), ("missing:x", False),
        ("missing:*", False), ("missing:!*", True), ("nothing:null", True), ("nothing:*", True), ("ok:true", True), ("ok:True", False),
        ("ratio:2.5", True), ("count:5.0", False), ("files:a.py", True), ("files:c.py", False), ("files:!c.py", True), ("files:!a.py", False),
        ("files:b*", True), ("nested.version:v1", True), ("nested.deep.er:x", True), ("nested:*", True), ("nested:v1", False),
        ("topic:implementation", True),
        ("topic:hidden", False), ("data.topic:hidden", True), ("data.issue_id:issue-123", True), ("publisher:me", True), ("event_type:done", True),
        ('odd:"a,b:c|d\\"e*"', True), ('odd:"a,b"*', True), ('odd:"a,b:c|d\\"e"', False), ('empty:""', True), ('status:""', False),
        ('bang:"!x"', True), ('status:"succ"*|other', True), ("correlation_id:*", False), ("correlation_id:!abc", True), ("ttl_seconds:60", True),
        ("priority:low|normal|high", True), ("event_id:evt-00000000-000000000001", True),
    ],
)  # fmt: skip
def test_what_a_filter_matches(text: str, expected: bool) -> None:
    assert parse(text).matches(KnownEvent(EVENT)) is expected


@pytest.mark.parametrize(
    ("text", "character", "problem"),
    [
        ("a==b", 2, "expected ':'"), ("a", 2, "expected ':'"), (":b", 1, "field name"), ("a:", 3, "expected a value"), ("a:b,", 5, "field name"),
        (",a:b", 1, "field name"), ("a:b c:d", 6, "expected ','"), ("a:b:c", 4, "expected ','"), ("a:|b", 3, "expected a value"),
        ("a:b||c", 5, "expected a value"), ("a:b|", 5, "expected a value"), ('a:"b', 3, "never closed"), ('a:b"c"', 4, "expected ','"),
        ("a:b*c", 5, "expected ','"), ("a:!!b", 4, "'!'"), ("a:b|!c", 5, "'!'"), (" a:b", 1, "field name"), ("a.:b", 2, "expected ':'"),
        (",".join(["a:b"] * 33), 129, "more than 32"), ("1a:b", 1, "field name"), ("a:**", 4, "expected ','"),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_and_where(text: str, character: int, problem: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(text)
    assert refused.value.code == "EVT_002"
    assert problem in refused.value.message and f"character {character}" in refused.value.message
    assert refused.value.details == {"character": character, "path": "filter"}


@settings(max_examples=500)
@given(st.text(alphabet="ab:,é._1 ", max_size=30) | st.text(max_size=20))
def test_alone_a_filter_means_the_same_or_is_refused(text: str) -> None:
    try:
        alone = EventBus.parse(None, text)  # type: ignore[arg-type]
    except ApiError as error:
        assert error.code == "EVT_002" and error.details == {"path": "filter"}
    else:
        whole = parse(text)
        assert (alone.text, alone.issue) == (whole.text, whole.issue)
        for event in (EVENT, {"data": {"a": "b", "b": ["a", 1]}}):
            assert alone.matches(KnownEvent(event)) == whole.matches(KnownEvent(event))


@settings(max_examples=500)
@given(st.text(alphabet='ab:,|!*"\\ .é\n1', max_size=30) | st.text(max_size=40))
def test_any_text_is_a_filter_or_a_clear_error(text: str) -> None:
    try:
        assert parse(text).matches(KnownEvent(EVENT)) in (True, False)
    except ApiError as error:
        assert error.code == "EVT_002" and error.details and 1 <= error.details["character"] <= len(text) + 1


VALUES = st.sampled_from(["x", "xy", "y", "!z", "a b", 'q"q', "p,q", "5", "true", "null", ""])
TERMS = st.tuples(
    st.sampled_from(["one", "two", "three.four"]),
    st.booleans(),
    st.lists(st.tuples(VALUES, st.booleans()), min_size=1, max_size=3),
)
DATA = st.fixed_dictionaries(
    {},
    optional={
        "one": VALUES | st.just(5) | st.just(True),
        "two": st.lists(VALUES, max_size=2),
        "three": st.fixed_dictionaries({"four": VALUES}),
    },
)


def quoted(value: str) -> str:
    return '"' + value.replace('"', '\\"') + '"'


def model(terms: list[Any], data: dict[str, Any]) -> bool:
    """The contract in plain words: every term, any value, prefix where starred, negation of the whole list."""
    for field, negated, values in terms:
        found: Any = data
        for name in field.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        items = [] if found is None else found if isinstance(found, list) else [found]
        texts = [item if isinstance(item, str) else json.dumps(item) for item in items]
        hit = any(text.startswith(value) if prefix else text == value for text in texts for value, prefix in values)
        hit = hit or (any(prefix and not value for value, prefix in values) and found is not None)
        if hit is negated:
            return False
    return True


@settings(max_examples=500)
@given(st.lists(TERMS, min_size=1, max_size=3), DATA)
def test_filters_agree_with_the_model_and_the_index_finds_exactly_the_matching(
    terms: list[Any], data: dict[str, Any]
) -> None:
    text = ",".join(
        f"{field}:{'!' if negated else ''}"
        + "|".join(quoted(value) + ("*" if prefix else "") for value, prefix in values)
        for field, negated, values in terms
    )
    event = {"publisher": "me", "topic": "t", "data": data}
    filter = parse(text)
    assert filter.matches(KnownEvent(event)) is model(terms, data), text
    assert asyncio.run(wakes(filter, event)) is model(terms, data)


async def wakes(filter: Filter, submission: dict[str, Any]) -> bool:
    """Whether an event wakes who waits with a filter, and one of another project or type does not."""
    bus = EventBus(types.SimpleNamespace(epoch="0" * 8), None, Hooks([]))  # type: ignore[arg-type]
    parked = asyncio.ensure_future(bus.park(("p", "kind"), ("me", filter, 0), 60, HangUp()))
    await asyncio.sleep(0)

    def woken(project: str, event_type: str, seq: int) -> list[str]:
        event = new_event(project, event_type, submission)
        bus.wake_waiters(event, seq)
        return list(event.woken)

    assert not woken("other", "kind", 1) and not woken("p", "other", 1)
    first = woken("p", "kind", 1)
    bus.close()
    assert await parked == (1 if first else None) and not woken("p", "kind", 2)
    return first == ["me"]


@settings(max_examples=300)
@given(DATA, VALUES)
def test_bytes_that_a_filter_requires_are_in_every_matching_event(data: dict[str, Any], value: str) -> None:
    filter = parse(f"one:{quoted(value)}")
    event = {"publisher": "me", "topic": "t", "data": data}
    if filter.required_bytes is not None and filter.matches(KnownEvent(event)):
        assert filter.required_bytes in json.dumps(event).encode()


def calls(work: Callable[[], Any]) -> int:
    """How many functions are called, those of C too."""
    number = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return number


PAIRS = [f"{one}{other}" for one in "abcdefghijklmnopqrstuvwxyz" for other in "abcdefghijklmnopqrstuvwxyz"]


class Text(str):
    """A text whose comparisons are counted."""

    __slots__ = ()

    def __lt__(self, other: str) -> bool:
        return str.__lt__(self, other)

    def startswith(self, prefixes: Any, *place: Any) -> bool:
        return any(str.startswith(self, each) for each in (prefixes if isinstance(prefixes, tuple) else (prefixes,)))


MANY = {"data": {"x": [Text(number) for number in range(10_000)]}}
LONG = {"publisher": "me", "topic": "t", "data": {"x": [7] * 100_000, "issue_id": [7] * 100_000}}


@pytest.mark.parametrize(
    "work",
    [
        lambda: parse("x:" + "|".join(PAIRS)).matches(KnownEvent(LONG)),
        lambda: parse("x:!" + "|".join(f"{pair}*" for pair in PAIRS)).matches(KnownEvent(LONG)),
        lambda: parse(",".join(["x:7"] * 32)).matches(KnownEvent(LONG)),
        lambda: EventBus.parse(None, ",".join(["x:7"] * 32)).matches(KnownEvent(LONG)),  # type: ignore[arg-type]
        lambda: parse(",".join(f"x:{'|'.join(f'{pair}*' for pair in PAIRS[at::31])}" for at in range(31))).matches(
            KnownEvent(MANY)
        ),
        lambda: parse("x:!" + "|".join(f"{pair}*" for pair in PAIRS)).matches(KnownEvent(MANY)),
        lambda: parse("").within("i").matches(KnownEvent({"issue_id": [7] * 1000, "data": {}})),  # more are refused
        lambda: issues_named(LONG, 1001),
        lambda: issues_named({"issue_id": [[7] * 1000] * 1000}, 1001),
        lambda: new_event("p", "kind", LONG),
    ],
    ids=[
        "values",
        "prefixes",
        "terms",
        "terms alone",
        "prefixes of many",
        "prefixes of many not",
        "a token's issue",
        "issues",
        "nested issues",
        "event",
    ],
)
def test_neither_a_long_array_nor_a_long_filter_holds_the_loop(work: Callable[[], Any]) -> None:
    assert calls(work) < 500_000  # a few for each of 100,000 items, whatever the number of terms and values


def test_alone_a_filter_has_as_many_terms_as_with_plugins() -> None:
    text = ",".join(["x:7"] * 33)
    for refusing in (parse, lambda text: EventBus.parse(None, text)):  # type: ignore[arg-type]
        with pytest.raises(ApiError, match="Invalid filter"):
            refusing(text)

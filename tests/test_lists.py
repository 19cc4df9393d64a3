"""Lists over HTTP: the newest items first come, forward from a cursor, and whether there are more."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from conftest import Client, Service, end_stragglers, make_repository, plugin, until

NUMBER = 152  # of each kind: more than the default limit of 100
AGENT = ["/bin/sh", "-c", "case $TASK in stay) exec sleep 600;; fail) exit 3;; esac"]
KINDS = {
    "results": ("/api/results", "id"),
    "events": ("/api/events", "event_id"),
    "agents": ("/api/agents", "agent_id"),
}
# For each kind: a filter, and which of the numbered items it lets through.
FILTERS: dict[str, list[tuple[dict[str, str], Any]]] = {
    "results": [
        ({"agent_type": "test-engineer"}, lambda n: n % 4 == 1), ({"status": "failed"}, lambda n: n % 3 == 0),
        ({"issue_id": "issue-0", "status": "success"}, lambda n: n % 2 == 0 and n % 3),
    ],
    "events": [
        ({"type": "odd"}, lambda n: n % 2), ({"topic": "third"}, lambda n: n % 3 == 0),
        ({"type": "even", "topic": "other"}, lambda n: n % 2 == 0 and n % 3), ({"filter": "issue_id:noted-1"}, lambda n: n % 2),
        ({"filter": "issue_id:noted-0", "topic": "third"}, lambda n: n % 6 == 0),
    ],
    "agents": [
        ({"issue_id": "issue-1"}, lambda n: n % 2), ({"state": "completed"}, lambda n: n % 10 and n % 7),
        ({"state": "running"}, lambda n: n % 10 == 0), ({"status": "active"}, lambda n: n % 10 == 0),
        ({"status": "failed"}, lambda n: n % 10 and n % 7 == 0), ({"status": "failed", "state": "failed"}, lambda n: n % 10 and n % 7 == 0),
        ({"agent_type": "test-engineer"}, lambda n: n % 5 == 1),
        ({"agent_type": "python-specialist", "status": "completed", "issue_id": "issue-1"}, lambda n: n % 2 and n % 5 != 1 and n % 10 and n % 7),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, dict[str, list[str]]]]:
    """A service with NUMBER results, events and agents, every tenth of which lives; and the ids of all, in order."""
    folder = tmp_path_factory.mktemp("lists")
    limits = ("--max-agents", "500", "--max-agents-per-issue", "500", "--stop-agents", "--no-synthesis")
    options = ("--agent-command", json.dumps(AGENT), *limits)
    service = Service(make_repository(folder / "repository"), folder / "storage", *options).start()
    client = service.client()
    results = [
        client.store(
            "test-engineer" if n % 4 == 1 else "python-specialist", "success" if n % 3 else "failed", f"issue-{n % 2}"
        )["id"]
        for n in range(NUMBER)
    ]
    tasks = ["stay" if n % 10 == 0 else "fail" if n % 7 == 0 else "go" for n in range(NUMBER)]
    agents = [
        spawn(client, f"issue-{n % 2}", task, "test-engineer" if n % 5 == 1 else "python-specialist")
        for n, task in enumerate(tasks)
    ]
    alive = sum(n % 10 == 0 for n in range(NUMBER))
    until(lambda: client.get("/status").json()["agents"]["active"] == alive, 30)
    events = [
        client.publish("odd" if n % 2 else "even", {"issue_id": f"noted-{n % 2}"}, topic="other" if n % 3 else "third")
        for n in range(NUMBER)
    ]
    yield service, {"results": results, "agents": agents, "events": [event["event_id"] for event in events]}
    assert service.stop() == 0, service.log
    end_stragglers()


def spawn(client: Client, issue: str, task: str, agent_type: str = "python-specialist") -> str:
    return str(client.spawn(issue, agent_type, task=task)["agent_id"])


@pytest.fixture
def client(listed: tuple[Service, dict[str, list[str]]]) -> Client:
    return listed[0].client()


def asked(client: Client, kind: str, **query: Any) -> tuple[list[str], bool]:
    """The ids of a list and its has_more; next_cursor is checked on the way."""
    path, name = KINDS[kind]
    answer = client.get(path, **query)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    ids = [item[name] for item in body[kind]]
    assert set(body) == {kind, "next_cursor", "has_more"} and body["next_cursor"] == (ids[-1] if ids else None)
    return ids, body["has_more"]


def forward(client: Client, kind: str, limit: int, **query: Any) -> list[str]:
    """Everything from the earliest on, in pages of ``limit``."""
    found, cursor, more = [], "earliest", True
    while more:
        page, more = asked(client, kind, since=cursor, limit=limit, **query)
        assert len(page) == limit or not more
        found += page
        cursor = page[-1] if page else cursor
    assert asked(client, kind, since=found[-1], **query) == ([], False)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_without_since_holds_the_newest_items_newest_last_and_says_whether_there_are_more(
    client: Client, listed: tuple[Service, dict[str, list[str]]], kind: str
) -> None:
    everything = forward(client, kind, 1000)
    assert [found for found in everything if found in set(listed[1][kind])] == listed[1][kind]
    assert asked(client, kind) == (everything[-100:], True)
    for limit in (1, 7, 100, len(everything) - 1):
        assert asked(client, kind, limit=limit) == (everything[-limit:], True)
    for limit in (len(everything), len(everything) + 1, 1000):
        assert asked(client, kind, limit=limit) == (everything, False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 40, 152, 1000])
def test_a_list_goes_forward_from_a_cursor_and_neither_repeats_nor_skips(client: Client, kind: str, limit: int) -> None:
    everything = forward(client, kind, 1000)
    assert len(set(everything)) == len(everything)
    assert forward(client, kind, limit) == everything
    middle = len(everything) // 2
    assert asked(client, kind, since=everything[middle], limit=3) == (everything[middle + 1 : middle + 4], True)


@pytest.mark.parametrize(("kind", "query", "passes"), [(kind, *row) for kind, rows in FILTERS.items() for row in rows])
def test_what_a_filter_hides_counts_for_nothing(
    client: Client, listed: tuple[Service, dict[str, list[str]]], kind: str, query: dict[str, str], passes: Any
) -> None:
    wanted = [found for number, found in enumerate(listed[1][kind]) if passes(number)]
    assert asked(client, kind, limit=1000, **query) == (wanted, False)
    assert asked(client, kind, limit=len(wanted), **query) == (wanted, False)
    assert asked(client, kind, limit=5, **query) == (wanted[-5:], True)
    assert forward(client, kind, 9, **query) == wanted


def test_the_agent_that_was_just_spawned_is_the_last_of_the_list_alive_and_ended(client: Client) -> None:
    for task, state in (("stay", "running"), ("go", "completed")):
        agent_id = spawn(client, "issue-new", task)
        assert asked(client, "agents")[0][-1] == agent_id
        until(
            lambda agent_id=agent_id, state=state: client.get(f"/api/agents/{agent_id}/status").json()["state"] == state
        )
        assert asked(client, "agents")[0][-1] == agent_id == asked(client, "agents", state=state, limit=1)[0][0]


def test_dead_letters_are_listed_like_everything_else(tmp_path: Path) -> None:
    service = Service(make_repository(tmp_path / "repository"), tmp_path / "storage", "--event-limit", "100").start()
    client = service.client()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: client.publish("mortal", topic="even" if n % 2 == 0 else "odd"), range(350)))
    until(lambda: len(asked(client, "events", dead="true", limit=1000)[0]) >= 250)
    everything = forward(client, "events", 1000, dead="true")
    assert everything == sorted(everything) and asked(client, "events", dead="true") == (everything[-100:], True)
    assert forward(client, "events", 60, dead="true") == everything
    assert asked(client, "events", dead="true", topic="odd", limit=3)[1] is True
    assert service.stop() == 0


def test_states_that_are_not_of_a_status_are_none(client: Client) -> None:
    assert asked(client, "agents", status="failed", state="running") == ([], False)


def test_events_are_listed_and_awaited_from_a_moment_on(tmp_path: Path) -> None:
    service = Service(make_repository(tmp_path / "repository"), tmp_path / "storage", "--event-limit", "12").start()
    client = service.client()

    def publish(number: int) -> list[tuple[str, str]]:
        """(id, time) of each; the next ones are of another second."""
        ids = [client.publish("timed")["event_id"] for _ in range(number)]
        events = client.get("/api/events", type="timed", limit=number).json()["events"]
        assert [event["event_id"] for event in events] == ids
        second = time.time()
        until(lambda: int(time.time()) > int(second))
        return [(event["event_id"], event["timestamp"]) for event in events]

    first, second, third = publish(8), publish(3), publish(4)
    published = first + second + third
    until(lambda: len(asked(client, "events")[0]) == 12)  # retention has moved the floor
    kept = published[-12:]
    for _, moment in (first[-1], second[0], third[-1]):
        wanted = [found for found, told in kept if told >= moment]
        there = datetime.fromisoformat(moment)
        elsewhere = there.astimezone(timezone(timedelta(hours=5, minutes=30))).isoformat()
        for text in (moment, moment.removesuffix("Z"), elsewhere, f"{there:%Y%m%dT%H%M%SZ}"):
            assert asked(client, "events", since=text) == (wanted, False)
            assert [event["event_id"] for event in client.wait("timed", since=text, timeout=0)["events"]] == wanted
    assert asked(client, "events", since="2001-01-01")[0] == [found for found, _ in kept]
    assert asked(client, "events", since="2999-12-31T23:59:59Z") == ([], False)
    for wrong in ("2026-13-01", "2026-02-30T00:00:00Z", "25:00", "now"):
        assert client.get("/api/events", since=wrong).status_code == 400, wrong
    assert service.stop() == 0


@pytest.mark.parametrize(
    ("kind", "made"), [("results", "stored_at"), ("agents", "started_at"), ("events", "timestamp")]
)
def test_every_list_begins_at_a_time(client: Client, kind: str, made: str) -> None:
    path, name = KINDS[kind]
    rows = client.get(path, limit=1000).json()[kind]
    for moment in (rows[0][made], rows[len(rows) // 2][made], rows[-1][made]):
        older = [number for number, row in enumerate(rows) if row[made] < moment]
        wanted = [row[name] for row in rows[older[-1] + 1 if older else 0 :]]
        assert wanted and asked(client, kind, since=moment, limit=1000) == (wanted, False)
    assert asked(client, kind, since="2999-12-31T23:59:59Z") == ([], False)


def test_a_time_may_be_so_long_ago() -> None:
    time_ago = plugin("_table").time_ago
    for text, seconds in (("90s", 90), ("30m", 1800), ("1h", 3600), ("2d", 172_800)):
        before = time.time()
        told = datetime.fromisoformat(time_ago(text)).timestamp()
        assert int(before) <= told + seconds <= time.time(), text
    for text in ("latest", "earliest", "2026-01-31T12:00:00Z", "evt-1", "12", "h", "1w", "-1h", "1h30m"):
        assert time_ago(text) == text


@pytest.mark.parametrize(
    ("kind", "since"),
    [
        ("results", "nothing"),
        ("results", "result-" + "0" * 36),
        ("agents", "latest"),
        ("events", "evt-1"),
        ("events", "yesterday"),
        ("logs", "yesterday"),
        ("logs", "-5"),
    ],
)
def test_a_cursor_that_names_nothing_is_refused_with_what_one_is(
    client: Client, listed: tuple[Service, dict[str, list[str]]], kind: str, since: str
) -> None:
    path = f"/api/agents/{listed[1]['agents'][0]}/logs" if kind == "logs" else KINDS[kind][0]
    answer = client.get(path, since=since)
    forms = {"events": "an event id, a cursor, earliest, latest or a time, such as 2026-01-31T12:00:00Z",
             "logs": "an offset, such as a next_offset, or a time, such as 2026-01-31T12:00:00Z"}  # fmt: skip
    message = answer.json()["message"]
    assert answer.status_code == 400 and f"must be {forms.get(kind, 'the id of one that the list has')}" in message

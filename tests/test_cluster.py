"""Several sidecars on one project behave as one: their events, results and agents lie on NATS (plugin cluster/nats)."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import typing
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from cluster import SECRET, Relay, Servers, Team, append, last_entry, servers, write, write_headers
from conftest import (
    MODULE,
    PROJECT,
    Client,
    Service,
    body_of,
    clean_environment,
    end_stragglers,
    make_repository,
    plugin,
    until,
)
from nats import connect
from nats.errors import OutboundBufferLimitError
from nats.js import JetStreamContext
from test_tls import make_pair

import cco_sidecar

PASSWORD = "not-to-be-told"
ReplicatedStorage: Any = plugin("_replicated").ReplicatedStorage
LogAway: Any = plugin("_nats_large").LogAway


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One server, which asks for a password."""
    login = f"authorization {{ user: sidecar, password: {PASSWORD} }}"
    with servers(tmp_path_factory.mktemp("nats"), more=login, login=f"sidecar:{PASSWORD}@") as running:
        yield running


@pytest.fixture(scope="module")
def team(nats: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Three sidecars on one project. The tests keep apart by issues and subjects."""
    folder = tmp_path_factory.mktemp("team")
    made = Team(folder, make_repository(folder / "repository"), nats.url, "--agent-command", "sleep 60")
    made.start(3)
    yield made
    codes = made.stop()
    for sidecar in made.sidecars:
        assert "Traceback" not in sidecar.log, sidecar.log
    assert codes == [0, 0, 0]
    end_stragglers()


@pytest.fixture
def make_team(tmp_path: Path, repository: Path) -> Iterator[Callable[..., Team]]:
    """A factory of teams for one test."""
    made: list[Team] = []

    def make(backend: str, *options: str) -> Team:
        made.append(Team(tmp_path / f"team-{len(made)}", repository, backend, *options))
        return made[-1]

    yield make
    for one in made:
        one.stop()
    end_stragglers()


@pytest.mark.parametrize("failing", ["t.alive by subscribe", "t.ask.one by subscribe", "t.alive by publish"])
def test_a_greeting_that_fails_once_leaves_no_sidecar_unseen(
    nats: Servers, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, log = plugin("_peers"), plugin("_nats_log")
    failures = [failing]
    monkeypatch.setattr(peers.Peers, "ALIVE", 0.05)

    class Failing(log.ReadingClient):  # type: ignore[misc]
        async def subscribe(self, subject: str, **more: Any) -> Any:
            self._fail(f"{subject} by subscribe")
            return await super().subscribe(subject, **more)

        async def publish(self, subject: str, *more: Any, **named: Any) -> None:
            self._fail(f"{subject} by publish")
            await super().publish(subject, *more, **named)

        def _fail(self, call: str) -> None:
            if call in failures:
                failures.remove(call)
                raise OutboundBufferLimitError

    async def act() -> None:
        client, seal = Failing(), plugin("_seal").Seal(SECRET.encode())
        await client.connect(nats.url)
        part = peers.Peers(
            SimpleNamespace(options=SimpleNamespace(subject="t")), "one", lambda: b'{"node": "one"}', seal
        )

        async def answer(question: bytes) -> bytes:
            return question.upper()

        part.answer = answer
        meeting = asyncio.create_task(part.meet(client))
        async with asyncio.timeout(30):
            while not part.is_seen("one"):
                await asyncio.sleep(0.01)
        answered = await client.request("t.ask.one", seal.wrap("ask one", b"well?"), timeout=30)
        assert seal.unwrap("answer well?", answered.data) == b"WELL?" and not failures and not meeting.done()
        meeting.cancel()
        await client.close()

    asyncio.run(act())


def ids(answer: Any) -> list[str]:
    return [event["event_id"] for event in answer["events"]]


def at_once(call: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """What ``call`` gives for each of the items, all asked at the same time."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(call, items))


def all_of(sidecar: Service, kind: str, filter: str, number: int) -> list[Any]:
    """So many events, read from the beginning of the log by a cursor."""
    found, query = [], {"filter": filter, "timeout": 5000, "limit": 1000}
    cursor, client = "earliest", sidecar.client()
    while len(found) < number:
        page = client.wait(kind, since=cursor, **query)
        assert page["events"], f"no more than {len(found)} events came"
        found += page["events"]
        cursor = page["next_cursor"]
    assert client.wait(kind, since=cursor, **query | {"timeout": 0})["events"] == []
    return found


def parked(sidecar: Service, number: int) -> None:
    until(lambda: sidecar.client().get("/status").json()["events"]["active_subscriptions"] == number)


def keyed(client: Client, path: str, body: dict[str, Any], key: str) -> Any:
    return client.request("POST", path, json=body, headers={"Idempotency-Key": key})


def listed(sidecar: Service, issue: str) -> list[str]:
    """The ids of the issue's results that a sidecar knows."""
    return [record["id"] for record in sidecar.client().get("/api/results", issue_id=issue).json()["results"]]


def outputs(sidecar: Service, issue: str) -> list[str]:
    """The results that its contexts tell of."""
    answer = sidecar.client("test-engineer").get(f"/api/context/{issue}/test-engineer")
    return [output["result_id"] for output in answer.json()["context"]["previous_agent_outputs"]]


# -- events


def test_an_event_published_on_one_wakes_waiters_on_the_others_and_has_one_id(team: Team, issue: str) -> None:
    publisher, *others = team.sidecars
    with ThreadPoolExecutor() as pool:
        answers = [
            pool.submit(sidecar.client().wait, "woken", filter=f"issue_id:{issue}", timeout=20_000)
            for sidecar in others
        ]
        for sidecar in others:
            parked(sidecar, 1)
        published = publisher.client().publish("woken", {"issue_id": issue})
        assert [ids(answer.result()) for answer in answers] == [[published["event_id"]]] * 2
    assert published["subscribers_notified"] == [], "those whom this machine woke"


def test_all_tell_the_same_events_in_the_same_order_and_a_cursor_is_good_on_any(team: Team, issue: str) -> None:
    def publish(sidecar: Service) -> list[str]:
        client = sidecar.client()
        return [client.publish("many", {"issue_id": issue, "count": count})["event_id"] for count in range(15)]

    told = at_once(publish, team.sidecars * 2)
    confirmed = sorted(event for events in told for event in events)
    assert len(set(confirmed)) == 90 and all(events == sorted(events) for events in told)
    query = {"filter": f"issue_id:{issue}", "timeout": 5000}
    cursor, found = "earliest", []
    for sidecar in itertools.cycle(team.sidecars):  # each page on another machine
        page = sidecar.client().wait("many", since=cursor, limit=10, **query)
        found += ids(page)
        cursor = page["next_cursor"]
        if len(found) >= 90 or not page["events"]:
            break
    assert found == confirmed
    for sidecar in team.sidecars:
        assert [event["event_id"] for event in all_of(sidecar, "many", f"issue_id:{issue}", 90)] == confirmed


def test_a_readers_position_is_known_on_all(team: Team, issue: str) -> None:
    a, b, _ = team.sidecars
    on_a = a.client(sub=f"reader-of-{issue}")
    on_b = Client(b.url, on_a.token)
    events = [on_a.publish("placed", {"issue_id": issue})["event_id"] for _ in range(3)]
    asked = {"filter": f"issue_id:{issue}", "timeout": 5000}
    assert ids(on_a.wait("placed", limit=2, **asked)) == events[:2]
    on_a.publish("behind", {"issue_id": issue})
    b.client().wait("behind", since=events[-1], timeout=5000)  # what was written on A before it is known on B now
    assert ids(on_b.wait("placed", **asked)) == events[2:]


def test_a_cursor_is_good_on_another_machine_at_once(team: Team, issue: str) -> None:
    a, b, _ = team.sidecars
    on_a, on_b = a.client(), b.client()
    for _ in range(30):
        cursor = on_a.publish("fresh", {"issue_id": issue})["event_id"]
        assert on_b.wait("fresh", since=cursor, filter=f"issue_id:{issue}", timeout=0)["events"] == []


IN_BETWEEN = """
import asyncio, typing
from cco_sidecar import ApiError, Endpoint, Storage, hookimpl

@hookimpl(trylast=True)
def part_class(base):
    if not issubclass(base, Endpoint):
        return None

    class Between(base):
        async def work(self, path):
            storage = self.sidecar.storage
            kept = vars(storage).setdefault("_wake", lambda: None)  # nothing is applied until something is refused
            try:
                return await super().work(path)
            except ApiError as error:
                if self.body is None and error.status in (404, 410):
                    vars(storage).pop("_wake", None)
                    storage._wake()
                    last = await asyncio.wrap_future(storage.log.call(storage.log.last()))
                    while storage.follower.applied < last:
                        await asyncio.sleep(0.001)
                    self.set_header("X-Refused-First", "yes")
                raise

    return Between
"""


def test_what_comes_between_the_first_look_and_the_question_is_found(
    nats: Servers, tmp_path: Path, make_team: Callable[..., Team]
) -> None:
    (tmp_path / "between").mkdir()
    (tmp_path / "between" / "between.py").write_text(IN_BETWEEN)
    team = make_team(nats.url, "--nats-prefix", f"between-{uuid.uuid4().hex[:8]}", "--agent-command", "sleep 60")
    a, b = team.sidecar().start(), team.sidecar("--plugins", str(tmp_path / "between")).start()
    on_a, on_b = a.client(), b.client()

    def by_cursor() -> str:
        return f"/api/events/wait/fresh?timeout=0&since={on_a.publish('fresh')['event_id']}"

    def by_result() -> str:
        return f"/api/results/{on_a.store()['id']}"

    def by_agent() -> str:
        return f"/api/agents/{on_a.spawn()['agent_id']}/status"

    for written in (by_cursor, by_result, by_agent):
        refused = 0
        while not refused:  # what the service itself writes now and then applies everything, too
            answer = on_b.get(written())
            assert answer.status_code == 200, answer.text
            refused = "X-Refused-First" in answer.headers


def test_odd_names_mean_themselves_alone(team: Team, issue: str) -> None:
    a, b, _ = team.sidecars
    texts = ["*", ">", "a.>", "x.*.y", ":", " ", "$JS.API.>", "grün/\n", "\0", "x" * 256]
    kinds = ["a.b", "a", "a-b.c_d", "x" * 64]
    for text in texts:
        body = {"publisher": text, "topic": text, "data": {"issue_id": text, "mark": issue}, "correlation_id": text}
        for kind in kinds:
            answer = a.client().post(f"/api/events/{kind}", body)
            assert answer.status_code == 202, (kind, text, answer.text)
    for kind in kinds:
        told = all_of(b, kind, f"mark:{issue}", len(texts))
        seen = [(event["event_type"], event["topic"], event["publisher"], event["data"]["issue_id"]) for event in told]
        assert seen == [(kind, text, text, text) for text in texts]


# -- results


def test_a_result_stored_on_one_is_in_the_others_lists_contexts_and_files(team: Team, issue: str) -> None:
    a, *others = team.sidecars
    for sidecar in others:
        assert outputs(sidecar, issue) == [], "and this is in its cache now"
    stored = a.client().store(issue=issue, decisions=["Use a lock"])
    for sidecar in others:
        until(lambda sidecar=sidecar: listed(sidecar, issue) == outputs(sidecar, issue) == [stored["id"]])
        record = sidecar.client().get(f"/api/results/{stored['id']}").json()
        assert record == a.client().get(f"/api/results/{stored['id']}").json()
        path = sidecar.storage / "results" / PROJECT / issue / "python-specialist.json"
        until(lambda path=path, record=record: path.exists() and json.loads(path.read_text()) == record)
        (event,) = sidecar.client().wait("agent_completed", since="earliest", filter=f"issue_id:{issue}", timeout=0)[
            "events"
        ]
        assert event["event_id"] == stored["event_id"] and event["data"]["result_id"] == stored["id"]


def test_results_at_once_on_different_machines_route_as_if_one_came_after_the_other(team: Team, issue: str) -> None:
    clients = [sidecar.client() for sidecar in team.sidecars * 2]
    stored = at_once(lambda client: client.store(issue=issue, status="failed"), clients)
    proposed = {item["id"]: [agent["agent_type"] for agent in item["next_agents"]] for item in stored}
    until(lambda: all(len(listed(sidecar, issue)) == 6 for sidecar in team.sidecars))
    (order,) = {tuple(listed(sidecar, issue)) for sidecar in team.sidecars}
    again, escalated = ["python-specialist"], ["chief-architect"]
    assert [proposed[result_id] for result_id in order] == [again, again, escalated, again, again, escalated]


def test_a_result_whose_file_cannot_be_written_is_refused_alone(team: Team, issue: str) -> None:
    sidecar = team.sidecars[1]
    place = sidecar.storage / "results" / PROJECT / issue / "python-specialist.json"
    place.mkdir(parents=True)
    client = sidecar.client()
    event = {"publisher": "tester", "topic": "test", "data": {"issue_id": issue}}
    good = [("/api/results", body_of(f"{issue}-{number}")) for number in range(4)]
    good += [("/api/events/beside", event)] * 8
    for _ in range(5):
        bad, *others = at_once(lambda asked: client.post(*asked), [("/api/results", body_of(issue)), *good])
        assert bad.status_code == 500 and "python-specialist.json" in bad.text, bad.text
        assert [answer.status_code for answer in others] == [201] * 4 + [202] * 8, [answer.text for answer in others]
    assert listed(sidecar, issue) == [], "nothing of it is stored"
    place.rmdir()
    stored = client.store(issue=issue)["id"]
    for other in team.sidecars:
        until(lambda other=other: listed(other, issue) == [stored])


def test_what_is_larger_than_a_message_of_the_server_is_kept_whole(team: Team, issue: str) -> None:
    a, b, c = team.sidecars
    text = "".join(str(uuid.uuid4()) for _ in range(100_000))  # 3.6 MB that compress badly
    result = a.client().store(issue=issue, rationale=text)
    event = a.client().publish("large", {"mark": issue, "text": text[:1_000_000]})
    several = at_once(
        lambda number: a.client().store(issue=f"{issue}-{number}", rationale=text[:400_000]), list(range(8))
    )  # in one batch, which is larger than a message as well
    for sidecar in (b, c):
        (found,) = sidecar.client().wait("large", since="earliest", filter=f"mark:{issue}", timeout=20_000)["events"]
        assert found["event_id"] == event["event_id"] and found["data"]["text"] == text[:1_000_000]
        assert sidecar.client().get(f"/api/results/{result['id']}").json()["result"]["rationale"] == text
        until(lambda sidecar=sidecar: sidecar.client().get(f"/api/results/{several[-1]['id']}").status_code == 200)
        for stored in several:
            record = sidecar.client().get(f"/api/results/{stored['id']}").json()
            assert record["result"]["rationale"] == text[:400_000]


# -- idempotency keys


def test_a_key_used_on_one_is_known_on_the_others(team: Team, issue: str) -> None:
    a, b, c = team.sidecars
    on_a = a.client()
    first = keyed(on_a, "/api/results", body_of(issue), issue)
    assert first.status_code == 201
    until(lambda: listed(b, issue) == listed(c, issue) == [first.json()["id"]])
    again = keyed(Client(b.url, on_a.token), "/api/results", body_of(issue), issue)
    assert again.headers["Idempotent-Replay"] == "true" and again.json() == first.json()
    other = keyed(Client(c.url, on_a.token), "/api/results", body_of(issue, status="failed"), issue)
    assert (other.status_code, other.json()["code"]) == (422, "REQ_006")


def test_a_key_used_on_all_at_the_same_time_is_used_once(team: Team, issue: str) -> None:
    token = team.sidecars[0].token()
    clients = [Client(sidecar.url, token) for sidecar in team.sidecars]
    event = {"publisher": "tester", "topic": "test", "data": {"issue_id": issue}}
    for number in range(10):
        for path, body, code in (("/api/results", body_of(issue), 201), ("/api/events/keyed", event, 202)):
            answers = at_once(functools.partial(keyed, path=path, body=body, key=f"{issue}-{number}"), clients)
            assert {answer.status_code for answer in answers} == {code}, [answer.text for answer in answers]
            told = [(answer.headers.get("Idempotent-Replay", ""), answer.json()) for answer in answers]
            assert sorted(replay for replay, _ in told) == ["", "true", "true"], told
            assert all(answer == told[0][1] for _, answer in told), told
    for sidecar in team.sidecars:
        until(lambda sidecar=sidecar: len(listed(sidecar, issue)) == 10)
        query = {"filter": f"issue_id:{issue}", "since": "earliest", "timeout": 0}
        assert len(sidecar.client().wait("keyed", **query)["events"]) == 10


# -- agents


def state(sidecar: Service, agent_id: str) -> str | None:
    answer = sidecar.client().get(f"/api/agents/{agent_id}/status")
    return answer.json()["state"] if answer.status_code == 200 else None


def exited(sidecar: Service, issue: str) -> list[Any]:
    query = {"filter": f"issue_id:{issue}", "since": "earliest", "timeout": 0}
    return sidecar.client().wait("agent_exited", **query)["events"]


def test_agents_of_all_machines_are_seen_everywhere_and_ended_through_the_one_that_owns_them(
    team: Team, issue: str
) -> None:
    a, b, c = team.sidecars
    spawned = at_once(lambda sidecar: sidecar.client().spawn(issue), team.sidecars)
    agents = [agent["agent_id"] for agent in spawned]
    assert len(set(agents)) == 3
    for sidecar in team.sidecars:
        for agent in agents:
            until(lambda sidecar=sidecar, agent=agent: state(sidecar, agent) == "running")
        found = sidecar.client().get("/api/agents", issue_id=issue, limit=1000).json()["agents"]
        assert set(agents) <= {row["agent_id"] for row in found}
    until(lambda: a.url in b.client().get(f"/api/agents/{agents[0]}/logs").json().get("message", ""))
    on_b = Client(b.url, spawned[0]["jwt_token"])
    assert on_b.get("/status").status_code == 200, "an agent's token is good on every machine"

    for asked, agent in ((b, agents[0]), (c, agents[1]), (a, agents[2])):  # none of its own
        assert asked.client().delete(f"/api/agents/{agent}").status_code == 202
    for sidecar in team.sidecars:
        for agent in agents:
            until(lambda sidecar=sidecar, agent=agent: state(sidecar, agent) == "killed")
        until(lambda sidecar=sidecar: len(exited(sidecar, issue)) == 3)
    for asked, owner, agent in ((b, a, agents[0]), (c, b, agents[1]), (a, c, agents[2])):
        for what in ("logs", "brief"):
            answer = asked.client().get(f"/api/agents/{agent}/{what}")
            assert answer.status_code == 404 and owner.url in answer.json()["message"], answer.text
            assert owner.client().get(f"/api/agents/{agent}/{what}").status_code == 200
    until(lambda: on_b.get("/status").status_code == 401)
    answer = a.client().delete("/api/agents/agent-unknown")
    assert answer.status_code == 404


def test_an_agent_whose_machine_is_away_is_not_ended_and_its_machine_is_named(team: Team, issue: str) -> None:
    away = team.sidecar().start()
    agent = away.client().spawn(issue)["agent_id"]
    a = team.sidecars[0]
    until(lambda: state(a, agent) == "running")
    away.kill()
    answer = a.client().delete(f"/api/agents/{agent}")
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1, answer.text
    away.start()  # it adopts its own
    until(lambda: state(a, agent) == "running")
    until(lambda: a.client().delete(f"/api/agents/{agent}").status_code == 202)
    until(lambda: state(a, agent) == "killed")
    assert away.stop() == 0
    team.sidecars.remove(away)


# -- a project's own log


@pytest.mark.parametrize("name", ["a", "A", "a.b", "a_b", "a-b", "a_2Eb", "a_2eb", "a.B"])
def test_no_two_projects_have_one_log(name: str) -> None:
    token = plugin("_options").token
    assert re.fullmatch("[A-Za-z0-9_-]+", token(name)), "as it may stand in a subject, and in a stream's name"
    assert [
        other for other in ("a", "A", "a.b", "a_b", "a-b", "a_2Eb", "a_2eb", "a.B") if token(other) == token(name)
    ] == [name]


def test_a_snapshot_takes_the_place_of_old_entries_and_nobody_misses_any(
    nats: Servers, make_team: Callable[..., Team]
) -> None:
    prefix = f"cut-{uuid.uuid4().hex[:8]}"
    (server,), one = nats.nodes, make_team(nats.url, "--nats-prefix", prefix, "--nats-snapshot-entries", "20")
    a, b = one.start(2)
    names = ("index.x", "index.99999999", "index.99999998", "entry.x.y", "snapshot", "odd.1")  # no sidecar's
    write(nats.url, [(f"{prefix}.{PROJECT}.large.{name}", b"x", {}) for name in names])
    text = "x" * 2_000_000  # which is larger than a message, and so not in the log itself
    stored = [a.client().store(issue="issue-1", rationale=text)["id"]]
    reader = a.client(sub="reader")
    events = [reader.publish("cut")["event_id"]]
    assert ids(reader.wait("cut")) == events
    b.kill()

    def states() -> tuple[int, int]:
        """(first entry of the log that is kept, bytes of what is large)"""
        found = server.streams()
        log, large = (found[f"{prefix}-{PROJECT}{end}"]["state"] for end in ("", "-large"))
        return log["first_seq"], large["bytes"]

    assert states()[1] > 1_900_000
    while states()[0] < 30:
        events += [a.client().publish("cut")["event_id"] for _ in range(10)]
        stored.append(a.client().store(issue="issue-1")["id"])
        time.sleep(0.2)  # a look every second or so
    until(lambda: states()[1] < 1_000_000)
    b.start()
    new = one.sidecar().start()
    for sidecar in (b, new):
        assert [event["event_id"] for event in all_of(sidecar, "cut", "", len(events))] == events, "all, and each once"
        until(lambda sidecar=sidecar: listed(sidecar, "issue-1") == stored)
        assert sidecar.client().get(f"/api/results/{stored[0]}").json()["result"]["rationale"] == text
    assert ids(Client(new.url, reader.token).wait("cut", limit=1000)) == events[1:], "positions are in a snapshot too"
    late = new.client().publish("late")["event_id"]
    for sidecar in (a, b):
        assert ids(sidecar.client().wait("late", since=events[-1], timeout=20_000)) == [late]


def test_a_snapshot_that_a_newer_version_made_is_not_taken_and_one_line_says_why(
    make_team: Callable[..., Team], tmp_path: Path
) -> None:
    said = "a newer version of this program made the snapshot that is needed: update this one"
    with servers(tmp_path / "nats") as own:
        team = make_team(own.url, "--nats-snapshot-entries", "1")
        newer, away = team.start(2)
        known = [newer.client().publish("before")["event_id"]]
        assert ids(away.client(sub="reader").wait("before")) == known
        away.kill()
        with contextlib.closing(sqlite3.connect(newer.storage / "replica.db")) as replica:
            replica.execute(f"pragma user_version = {cco_sidecar.SCHEMA_VERSION + 1}")

        def log_is_cut() -> bool:
            newer.client().publish()
            return int(own.nodes[0].streams()[f"cco-{PROJECT}"]["state"]["first_seq"]) > 10

        until(log_is_cut, 60)
        for sidecar in (away, team.sidecar()):
            assert said in not_started(sidecar)
        newer.kill()
        own.nodes[0].kill()
        away.start()
        own.start()

        def refused() -> bool:
            health = away.client().get("/health")
            return health.status_code == 503 and said in health.text

        until(refused, 60)
        time.sleep(3 * ReplicatedStorage.LOOK_SECONDS)  # it looks again
        assert refused() and away.log.count(said) == 1 and away.log.count("is there again") == 1
        assert ids(away.client(sub="another").wait("before", since="earliest")) == known, "what it has"
        with contextlib.closing(sqlite3.connect(away.storage / "replica.db")) as replica:
            assert replica.execute("pragma user_version").fetchone() == (cco_sidecar.SCHEMA_VERSION,)


def test_a_snapshot_of_an_earlier_version_gets_what_this_one_has_added(
    make_team: Callable[..., Team], tmp_path: Path
) -> None:
    added = "drop table agent_outcome; drop table idempotency; drop index position_by_age; drop trigger event_stored;"
    with servers(tmp_path / "nats") as own:
        team = make_team(own.url, "--nats-snapshot-entries", "1", "--agent-command", "sleep 60")
        (earlier,) = team.start(1)
        event = earlier.client().publish("before")["event_id"]
        with contextlib.closing(sqlite3.connect(earlier.storage / "replica.db")) as replica:
            replica.executescript(f"{added} pragma user_version = {cco_sidecar.SCHEMA_VERSION - 1};")

        def log_is_cut() -> bool:
            earlier.client().publish()
            return int(own.nodes[0].streams()[f"cco-{PROJECT}"]["state"]["first_seq"]) > 10

        until(log_is_cut, 60)
        earlier.kill()
        (later,) = team.start(1)
        client = later.client()
        assert ids(client.wait("before", since="earliest")) == [event]
        agent = client.spawn("issue-1")["agent_id"]
        until(lambda: state(later, agent) == "running")
        first, again = (keyed(client, "/api/results", body_of("issue-1"), "key") for _ in range(2))
        assert again.headers["Idempotent-Replay"] == "true" and again.json()["id"] == first.json()["id"]
        with contextlib.closing(sqlite3.connect(later.storage / "replica.db")) as replica:
            names = {name for (name,) in replica.execute("select name from sqlite_master")}
            assert {"position_by_age", "event_stored"} <= names
            assert replica.execute("pragma user_version").fetchone() == (cco_sidecar.SCHEMA_VERSION,)


@pytest.mark.parametrize("fails", ["", ".1", ".index.7"])
def test_a_snapshot_is_whole_though_another_sidecar_stores_the_same_one(nats: Servers, fails: str) -> None:
    """It may also end before it has stored all."""
    large, seal = plugin("_nats_large"), plugin("_seal").Seal(SECRET.encode())
    name = f"whole-{uuid.uuid4().hex[:8]}"

    class Failing(JetStreamContext):
        async def publish(self, subject: str, *more: Any, **named: Any) -> Any:
            if fails and subject.endswith(fails):
                raise TimeoutError
            return await super().publish(subject, *more, **named)

    async def act() -> None:
        client = await connect(nats.url)
        await client.jetstream().add_stream(name=f"{name}-large", subjects=[f"{name}.large.>"], allow_direct=True)
        one, other = (
            large.Large(lambda js=js: (client, js), name, name, seal, lambda: "epoch")
            for js in (client.jetstream(), Failing(client))
        )
        first, second = (bytes([number]) * 3 * large.Large.PIECE for number in (1, 2))
        await one.put_whole("7", first)
        if fails:
            with pytest.raises(TimeoutError):
                await other.put_whole("7", second)
        else:
            await asyncio.gather(other.put_whole("7", second), one.put_whole("7", first))
        assert await one.whole() == [7] and await one.get_whole("7") in ((first,) if fails else (first, second))
        await one.put_whole("8", second)
        await client.jetstream().add_stream(name=name, subjects=[f"{name}.log"])
        await one.cut(8)
        kept = (await client.jetstream().stream_info(f"{name}-large", ">")).state
        assert kept.messages == 4 and await one.get_whole("8") == second, "nothing of the earlier one is left"
        await client.close()

    asyncio.run(act())


@pytest.mark.parametrize("gone", [[1], [3], [2, 3, 5]])
def test_where_entries_are_gone_from_the_middle_of_the_log_the_snapshot_that_has_them_is_taken(
    nats: Servers, make_team: Callable[..., Team], gone: list[int]
) -> None:
    prefix = f"middle-{uuid.uuid4().hex[:8]}"
    stream = f"{prefix}-{PROJECT}"
    a, b = make_team(nats.url, "--nats-prefix", prefix, "--nats-snapshot-entries", "20").start(2)
    events = [a.client().publish("middle")["event_id"]]
    until(lambda: ids(b.client().wait("middle", since="earliest", timeout=0)) == events)
    b.kill()
    last = last_entry(nats.url, stream).seq
    while "a snapshot of entries" not in a.log:
        events += [a.client().publish("middle")["event_id"] for _ in range(5)]
    events.append(a.client().publish("middle")["event_id"])

    async def remove() -> None:
        client = await connect(nats.url)
        for number in gone:
            await client.jetstream().delete_msg(stream, last + number)
        await client.close()

    asyncio.run(remove())
    assert nats.nodes[0].streams()[stream]["state"]["first_seq"] <= last
    b.start()
    events.append(b.client().publish("middle")["event_id"])
    for sidecar in (a, b):
        assert [event["event_id"] for event in all_of(sidecar, "middle", "", len(events))] == events


def test_a_results_file_that_cannot_be_written_is_not_placed_with_the_next_one(
    make_team: Callable[..., Team], tmp_path: Path
) -> None:
    """A disk that is full would leave a part of it."""
    with servers(tmp_path / "nats") as own:
        relay = Relay(own.nodes[0], f"cco-{PROJECT}")
        try:
            (a,), (b,) = make_team(own.url).start(1), make_team(relay.url).start(1)
            new = b.storage / "results" / ".new"
            first = a.client().store(issue="issue-0")["id"]
            until(lambda: listed(b, "issue-0") == [first])
            relay.away = True
            relay.cut()
            stored = [a.client().store(issue=f"issue-{number}")["id"] for number in (1, 2, 3, 4)]
            (new / stored[0]).mkdir()
            os.mkfifo(new / stored[1])
            (new / stored[2]).symlink_to(tmp_path / "elsewhere")
            relay.away = False
            files = [b.storage / f"results/{PROJECT}/issue-{number}/python-specialist.json" for number in (1, 2, 3, 4)]
            until(lambda: os.path.lexists(files[3]), 30)
            assert json.loads(files[3].read_bytes())["id"] == stored[3]
            assert not any(map(os.path.lexists, files[:3])) and not (tmp_path / "elsewhere").exists()
            assert all(f"the file of {name} cannot be written" in b.log for name in stored[:3])
            assert b.stop() == 0
            (new / stored[0]).rmdir()
            for name in stored[:3]:
                (new / name).unlink(missing_ok=True)
                (new / name).write_bytes(b"{")  # as a full disk leaves it
            b.start()
            assert [json.loads(file.read_bytes())["id"] for file in files] == stored, "the next start tries again"
            assert not list(new.iterdir())
        finally:
            relay.stop()


def test_copies_of_the_database_that_a_killed_sidecar_has_left_are_removed_at_its_start(
    nats: Servers, make_team: Callable[..., Team]
) -> None:
    (one,) = make_team(nats.url).start(1)
    one.kill()
    beside = [one.storage / "snapshot-mine", one.storage / ".other"]
    left = {
        ".snapshot-whole": ["snapshot.db"],
        ".snapshot-cut": ["snapshot.db", "snapshot.db-journal"],
        ".snapshot-": [],
    }
    for folder in (*beside, *(one.storage / name for name in left)):
        folder.mkdir()
        for name in left.get(folder.name, []):
            (folder / name).write_bytes(b"x" * 4096)
    one.start()
    assert not list(one.storage.glob(".snapshot-*")) and all(folder.is_dir() for folder in beside)


def test_what_the_retention_of_one_has_removed_is_gone_on_all(nats: Servers, make_team: Callable[..., Team]) -> None:
    made = make_team(nats.url, "--nats-prefix", f"floor-{uuid.uuid4().hex[:8]}")
    (short,), (other,) = made.start(1, "--event-limit", "3"), made.start(1)
    reader = other.client(sub="reader")
    events = [reader.publish("kept")["event_id"]]
    assert ids(reader.wait("kept")) == events
    events += [short.client().publish("kept")["event_id"] for _ in range(6)]
    gone = {"since": events[0], "timeout": 0}

    def refusal(sidecar: Service) -> Any:
        answer = sidecar.client().get("/api/events/wait/kept", **gone)
        return answer.json()["details"] if answer.status_code == 410 else None

    expected = {"reason": "retention", "floor": events[-4], "head": events[-1]}
    for sidecar in (short, other):
        until(lambda sidecar=sidecar: refusal(sidecar) == expected)
        assert ids(sidecar.client().wait("kept", since="earliest")) == events[-3:]
    other.kill()
    assert refusal(other.start()) == expected
    late = Client(other.url, reader.token).wait("kept")
    assert (ids(late), late["missed"]) == (events[-3:], {"position": events[0], "floor": events[-4]})


def test_a_context_shows_results_of_a_snapshot_whose_events_have_expired(
    make_team: Callable[..., Team], tmp_path: Path
) -> None:
    with servers(tmp_path / "nats") as own:
        a, b = make_team(own.url, "--nats-snapshot-entries", "1", "--event-retention", "1").start(2)

        def log_of(fact: str) -> int:
            return int(own.nodes[0].streams()[f"cco-{PROJECT}"]["state"][fact])

        stored = [a.client().store(issue="issue-1")["id"]]
        until(lambda: outputs(b, "issue-1") == stored)
        b.kill()
        known = log_of("last_seq")
        stored += [a.client().store(name, issue="issue-1")["id"] for name in ("test-engineer", "security-auditor")]

        def log_is_cut() -> bool:  # up to the last snapshot but one, which takes entries after the last one
            a.client().publish()
            return log_of("first_seq") > known + 1

        until(log_is_cut, 60)
        until(lambda: not a.client().get("/api/events").json()["events"], 60)
        until(lambda: f"a snapshot of entries up to {log_of('last_seq')} was made" in a.log, 60)
        a.kill()
        own.nodes[0].kill()
        b.start()
        assert outputs(b, "issue-1") == stored[:1], "what it has, while the log is away"
        own.start()
        until(lambda: sorted(outputs(b, "issue-1")) == sorted(stored), 30)


# -- others who may write to the same servers


def test_what_no_sidecar_of_the_project_wrote_is_passed_over(team: Team, nats: Servers, issue: str) -> None:
    subject, stream = f"cco.{PROJECT}", f"cco-{PROJECT}"
    a, b, c = team.sidecars
    agent = a.client().spawn(issue)["agent_id"]
    until(lambda: state(b, agent) == "running")
    known = [a.client().publish("sealed", {"issue_id": issue})["event_id"]]
    ours = last_entry(nats.url, stream)
    append(nats.url, stream, f"{subject}.log", [
        (ours.data, {}), (ours.data, {"Cco-Seal": ours.headers["Cco-Seal"], "Nats-Msg-Id": "again"}),
        (b"garbage", {}), (b"", {}), (b"\xc1" * 900_000, {}), (b"", {"Cco-Large": "x"}),
        (b"", {"Cco-Large": "x 1000000000 1 x"}), (b"x", {"Status": "100"}), (b"", {"Status": "409"}),
        (b"x", {"Cco-Seal": "\u00e4" * 99}),
    ])  # fmt: skip
    blocks = (
        b"",
        b"\r\n",
        b" \xff\xff\xff\r\n\r\n",
        b" 100 \xff\r\nX: y\r\n\r\n",
        b"\r\n\xff: \xff\r\n : y\r\nz\r\n\r\n",
    )
    write_headers(nats.url, f"{subject}.log", [b"NATS/1.0" + block for block in blocks])
    write_headers(nats.url, f"{subject}.alive", [b"NATS/1.0" + block for block in blocks])
    node, end = (a.storage / "node").read_text(), b'{"end": "%b", "force": true}' % agent.encode()
    greetings = (b"", b"[]", b'{"node": "forged"}', b"\xff" * 99)
    write(nats.url, [(f"{subject}.ask.{node}", end, {}), *((f"{subject}.alive", said, {}) for said in greetings)])
    for sidecar in (b, c, a):
        known.append(sidecar.client().publish("sealed", {"issue_id": issue})["event_id"])
    for sidecar in (a, b, c):
        assert [event["event_id"] for event in all_of(sidecar, "sealed", f"issue_id:{issue}", 4)] == known
        told = until(lambda sidecar=sidecar: cluster_of(sidecar, {x.url for x in (a, b, c) if x is not sidecar}), 20)
        assert told["problem"] is None
    assert state(b, agent) == "running"


# -- starting, and a server that is away


def not_started(sidecar: Service) -> str:
    """The line with which it does not start."""
    environment = clean_environment(**sidecar.env)
    ended = subprocess.run(
        sidecar.command, env=environment, cwd=sidecar.root, capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 2 and ended.stdout == "", ended.stdout + ended.stderr
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("cco: "), ended.stderr
    return ended.stderr


def test_what_cannot_work_is_said_in_one_line(
    team: Team, nats: Servers, make_team: Callable[..., Team], tmp_path: Path
) -> None:
    host = nats.url.partition("@")[2]
    (tmp_path / "without/nats").mkdir(parents=True)
    (tmp_path / "without/nats/__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'nats'\", name='nats')"
    )
    cases: list[tuple[tuple[str, ...], str, dict[str, Any]]] = [
        (("--backend", f"nats://sidecar:wrong-secret@{host}"), "refuses", {}),
        ((), "secret", {"secret": "another secret than the team has, long enough"}),
        ((), "pip install '.[cluster]'", {"env": {"PYTHONPATH": str(tmp_path / "without")}}),
    ]

    others = make_team(team.options[1])  # who would join the team's project
    for options, _, more in cases:
        others.sidecar(*options, secret=more.get("secret", SECRET)).env = more.get("env", {})
    for case, said in zip(cases, at_once(not_started, others.sidecars), strict=True):
        assert case[1] in said, (case, said)
        assert PASSWORD not in said and "wrong-secret" not in said, said


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("nats://a", "nats://a:4222"),
        ("nats://a:1,b:2,c", "nats://a:1 nats://b:2 nats://c:4222"),
        ("tls://u:p@a,tls://b", "tls://u:p@a:4222 tls://u:p@b:4222"),
        ("nats://token@[::1]:5", "nats://token@[::1]:5"),
        ("nats://", ""), ("http://a", ""), ("a:4222", ""), ("nats://a:99999", ""), ("nats://a:0", ""), ("nats://a:x", ""),
        ("nats://a b", ""), ("nats://a/path", ""), ("nats://a,,b", ""), ("nats://a,http://b", ""), ("nats://u:p@", ""),
    ],
)  # fmt: skip
def test_addresses_of_servers(text: str, servers: str) -> None:
    assert plugin("_options").server_urls(text) == tuple(servers.split())


@pytest.mark.parametrize("late", [False, True])
def test_a_connection_that_is_refused_while_the_log_is_closed_ends_silently(late: bool) -> None:
    lost: list[dict[str, Any]] = []

    async def refused(refuse: asyncio.Event) -> None:
        try:
            await refuse.wait()
        finally:  # also where it is cancelled first
            raise ConnectionRefusedError

    async def cancelled() -> bool:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
        refuse = asyncio.Event()
        session = asyncio.create_task(plugin("_nats_log").within(9, refused(refuse)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if late:  # it is over already, of which the session was not told yet
            refuse.set()
            await asyncio.sleep(0)
        session.cancel()
        await asyncio.wait([session])
        return session.cancelled()

    assert asyncio.run(cancelled())
    gc.collect()
    assert lost == []


def test_a_server_that_is_away_at_the_start_and_later_stops_writing_alone(
    make_team: Callable[..., Team], tmp_path: Path
) -> None:
    away = Servers(tmp_path / "nats")
    try:
        sidecar = make_team(away.url, "--nats-timeout", "2").sidecar().start()
        events: list[str] = []
        for waits in (503, 200):  # before it has ever seen the log it knows no cursors
            refuses_to_write_and_reads(sidecar, waits)
            away.start()
            began = time.monotonic()
            events.append(until(lambda: published(sidecar), 30))
            print(f"writing again after {time.monotonic() - began:.1f} s")
            until(lambda: Client(sidecar.url, None).get("/health").json()["status"] == "healthy")
            assert ids(sidecar.client().wait("away", since="earliest", timeout=0)) == events
            away.nodes[0].kill()
        shutil.rmtree(away.nodes[0].folder / "store")
        away.start()
        until(lambda: away.nodes[0].monitor("varz")["total_connections"])  # it leaves a server that has lost the log
        answer = sidecar.client().post("/api/events/away", {"publisher": "tester", "topic": "test", "data": {}})
        assert answer.status_code == 503 and away.nodes[0].streams() == {}, "a log that was lost is not begun anew"
        assert ids(sidecar.client().wait("away", since="earliest", timeout=0)) == events
        assert sidecar.stop() == 0
    finally:
        away.stop()


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        ({"max_msgs": 2}, "maximum messages"),
        ({"max_bytes": 900}, "maximum bytes"),
        ({"max_msg_size": 9}, "message size"),
    ],
)
def test_why_the_log_takes_nothing_is_said_for_as_long_as_it_does(
    nats: Servers, make_team: Callable[..., Team], bound: dict[str, int], said: str
) -> None:
    prefix = f"bound-{uuid.uuid4().hex[:8]}"
    (sidecar,) = make_team(nats.url, "--nats-prefix", prefix, "--nats-timeout", "2").start(1)
    assert published(sidecar) and published(sidecar)

    async def bind(**values: int) -> None:
        client = await connect(nats.url)
        told = json.loads((await client.request(f"$JS.API.STREAM.INFO.{prefix}-{PROJECT}")).data)
        wanted = json.dumps(told["config"] | values).encode()
        answer = json.loads((await client.request(f"$JS.API.STREAM.UPDATE.{prefix}-{PROJECT}", wanted)).data)
        assert "error" not in answer, answer
        await client.close()

    asyncio.run(bind(**bound))
    for _ in range(3):
        answer = sidecar.client().post("/api/results", body_of("issue-1"))
        health = Client(sidecar.url, None).get("/health")
        assert (answer.status_code, health.status_code) == (503, 503)
        assert said in answer.text and said in health.text and "started again" in health.text, answer.text + health.text
    asyncio.run(bind(**dict.fromkeys(bound, -1)))
    until(lambda: published(sidecar), 30)
    until(lambda: Client(sidecar.url, None).get("/health").status_code == 200)


def refuses_to_write_and_reads(sidecar: Service, waits: int) -> None:
    client = sidecar.client()
    event = client.post("/api/events/away", {"publisher": "tester", "topic": "test", "data": {}})
    result = client.post("/api/results", body_of("issue-1"))
    for answer in (event, result):
        assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1, answer.text
    for path in ("/status", "/api/results", "/api/context/issue-1/chief-architect"):
        assert client.get(path).status_code == 200, path
    assert client.get("/api/events/wait/away", timeout=0).status_code == waits
    health = Client(sidecar.url, None).get("/health").json()
    assert health["status"] == "unhealthy" and "no server answers" in health["checks"]["storage"], health


def published(sidecar: Service) -> str | None:
    body = {"publisher": "tester", "topic": "test", "data": {}}
    answer = sidecar.client().post("/api/events/away", body)
    return answer.json()["event_id"] if answer.status_code == 202 else None


def test_tls_and_a_clients_certificate(make_team: Callable[..., Team], tmp_path: Path) -> None:
    make_pair(tmp_path, "localhost")
    pair = [str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")]
    tls = f'tls {{ cert_file: "{pair[0]}", key_file: "{pair[1]}", ca_file: "{pair[0]}", verify: true }}'
    with servers(tmp_path / "nats", more=tls, scheme="tls") as running:
        team = make_team(running.url, "--nats-tls-ca", pair[0])
        name = "a.B_c"  # of a project
        options = ["--nats-tls-cert", pair[0], "--nats-tls-key", pair[1], "--project", name]
        with_certificate = team.sidecar(*options).start().client(project_id=name)
        event = with_certificate.publish("sealed")["event_id"]
        assert ids(with_certificate.wait("sealed", timeout=0)) == [event]
        assert "refuses" in not_started(team.sidecar())


@pytest.mark.parametrize("words", ["Authorization Violation", "Authentication Timeout", ""])
def test_that_a_server_ends_an_encrypted_connection_is_told_in_our_words_alone(
    make_team: Callable[..., Team], tmp_path: Path, words: str
) -> None:
    make_pair(tmp_path, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    listener, lines = socket.create_server(("127.0.0.1", 0)), list[socket.socket]()

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener is closed at the end
            while True:
                plain, _ = listener.accept()
                plain.sendall(b'INFO {"server_id": "x", "version": "2.10.0", "tls_required": true, "proto": 1}\r\n')
                lines.append(line := context.wrap_socket(plain, server_side=True))
                heard = b""
                while b"PING" not in heard:
                    heard += line.recv(4096)
                line.sendall(f"-ERR '{words}'\r\n".encode() if words else b"")
                line.setblocking(False)
                with contextlib.suppress(ssl.SSLError):  # the client has not answered yet
                    line.unwrap()

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        url = f"tls://localhost:{listener.getsockname()[1]}"
        sidecar = make_team(url, "--nats-tls-ca", str(tmp_path / "cert.pem")).sidecar()
        told = not_started(sidecar) if words else sidecar.start().log
        assert "eof_received" not in told and lines
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        serving.join()
        for line in lines:
            line.close()


def test_the_password_is_told_nowhere(team: Team) -> None:
    sidecar = team.sidecars[0]
    for path in ("/status", "/health", "/api/plugins"):
        assert PASSWORD not in sidecar.client().get(path).text
    for file in team.folder.rglob("*"):
        if file.is_file() and file.parent.name != "objects":
            assert PASSWORD.encode() not in file.read_bytes(), file
    listed = subprocess.run(
        [sys.executable, str(MODULE), "plugins", "--root", str(team.root), "--storage", str(sidecar.storage)],
        env=clean_environment(CCO_SIDECAR_BACKEND=team.options[1]), capture_output=True, text=True,
    )  # fmt: skip
    assert PASSWORD not in listed.stdout + listed.stderr


def test_what_is_promised_and_what_differs_is_said(team: Team) -> None:
    team.sidecars[0].client().publish("counted")
    for sidecar in team.sidecars:
        assert "sync_interval" in sidecar.log and "1 of 3 servers" in sidecar.log
        others = {other.url for other in team.sidecars if other is not sidecar}
        told = until(lambda sidecar=sidecar, others=others: cluster_of(sidecar, others), 20)
        assert told["backend"] == "nats" and told["replicas"] == 1 and told["synced"] is False
        assert told["problem"] is None and told["applied"] > 0 and len(told["differs"]) > 1


def test_doctor_knows_the_replica_and_how_it_is_mended(team: Team, tmp_path: Path) -> None:
    def told(storage: Path, *words: str) -> tuple[str, str]:
        command = [sys.executable, str(MODULE), "doctor", "--format", "json", "--storage", str(storage), *words]
        ended = subprocess.run(command, cwd=team.root, env=clean_environment(), capture_output=True, text=True)
        if "--salvage" in words:
            return str(ended.returncode), ended.stderr
        (row,) = [row for row in json.loads(ended.stdout)["checks"] if row["check"] == "storage"]
        return row["verdict"], row["finding"]

    running, stopped = team.sidecars[0].storage, tmp_path / "stopped"
    stopped.mkdir(mode=0o700)
    for file in running.glob("replica.db*"):
        shutil.copy(file, stopped)
    for storage in (running, stopped):
        verdict, finding = told(storage)
        assert verdict == "good" and "replica of the log sound" in finding, finding
    assert "is made anew of the log where it is moved away" in told(stopped, "--salvage")[1]
    for file in stopped.glob("replica.db-*"):
        file.unlink()
    (stopped / "replica.db").write_bytes(b"no database" * 1000)
    verdict, finding = told(stopped)
    assert verdict == "bad" and "makes it anew of the log" in finding and "--salvage" not in finding, finding
    (stopped / "replica.db").unlink()
    verdict, finding = told(stopped, "--backend", "nats://127.0.0.1:4222")
    assert verdict == "note" and "the next start makes it of the log" in finding, finding


def cluster_of(sidecar: Service, others: set[str]) -> Any:
    """What it tells of the log and the others, once it has heard of these and applied all that it heard."""
    told = sidecar.client().get("/status").json()["storage"]["cluster"]
    return told if {peer["url"] for peer in told["peers"]} == others and told["lag"] == 0 else None


# -- the harness


def test_servers_end_with_the_test_that_started_them(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from cluster import Servers\n"
        "print(Servers(Path(sys.argv[2]) / 'nats').start().nodes[0].process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    killed = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    until(lambda: not psutil.pid_exists(int(killed.stdout)))


def test_a_look_that_goes_wrong_in_whatever_way_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    """A snapshot may find the disk full, which SQLite says in its own words."""
    errors: list[Exception] = [sqlite3.OperationalError("database or disk is full"), KeyError("log"), TimeoutError()]
    looks = asyncio.Event()

    def waiting() -> bool:
        if errors:
            raise errors.pop(0)
        looks.set()
        return False

    async def last() -> int:
        raise LogAway("away")

    class Looking(ReplicatedStorage):
        LOOK_SECONDS = 0.0

        def problem(self) -> str | None:
            return "away"

    async def act() -> None:
        storage = Looking.__new__(Looking)
        storage.follower = typing.cast(Any, SimpleNamespace(waiting=waiting, fault=None))
        loop = asyncio.get_running_loop()
        call = functools.partial(asyncio.run_coroutine_threadsafe, loop=loop)
        storage.log = typing.cast(Any, SimpleNamespace(call=call, last=last))
        looking = asyncio.create_task(storage._look_for_ever())
        async with asyncio.timeout(30):
            await looks.wait()
        looking.cancel()

    asyncio.run(act())
    told = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert told == ["database or disk is full", "'log'", "TimeoutError"]

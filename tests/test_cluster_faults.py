"""Three NATS servers that replicate, three sidecars, load all the time: what nodes and sidecars that are killed or paused
leave behind. No confirmed event or result is lost, none comes twice, all tell the same order, and all recovers by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from cluster import Node, Relay, Servers, Team, servers
from conftest import PROJECT, Client, Service, clean_environment, end_stragglers, make_repository, plugin, until

LONG = 45.0  # a machine under load; what it took is printed
FAILED = requests.RequestException


class Reader(threading.Thread):
    """Follows the log on one sidecar by a cursor, also over faults and restarts of it."""

    def __init__(self, sidecar: Service, running: threading.Event) -> None:
        super().__init__(daemon=True)
        self.sidecar, self.running = sidecar, running
        self.seen: list[dict[str, Any]] = []
        self.ids: set[str] = set()
        self.refused: list[str] = []

    def run(self) -> None:
        cursor = "earliest"
        while self.running.is_set():
            try:
                answer = self.sidecar.client(sub="reader").get(
                    "/api/events/wait/*", since=cursor, timeout=1000, limit=1000, filter="topic:load"
                )
                if answer.status_code == 200:
                    page = answer.json()
                    self.seen += page["events"]
                    self.ids |= {event["event_id"] for event in page["events"]}
                    cursor = page["scanned_to"]
                    continue
                if answer.status_code != 503:
                    self.refused.append(answer.text)
            except FAILED:
                pass
            time.sleep(0.1)


class Writer(threading.Thread):
    """Publishes events, or stores results, each with a key of its own: on its own sidecar, and where that does not
    confirm it on the next one, until one does.
    """

    def __init__(self, number: int, team: Team, running: threading.Event, results: bool) -> None:
        super().__init__(daemon=True)
        self.number, self.team, self.running, self.results = number, team, running, results
        self.confirmed: dict[str, str] = {}  # key: id of the event, or the result
        self.refused: list[str] = []

    def run(self) -> None:
        for count in itertools.count():
            key = f"{self.number}-{count}"
            for sidecar in itertools.islice(itertools.cycle(self.team.sidecars), self.number, None):
                if not self.running.is_set():
                    return
                if self._confirmed(sidecar, key):
                    break
            time.sleep(0.03)

    def _confirmed(self, sidecar: Service, key: str) -> bool:
        agent = {"agent_id": "writer", "agent_type": "python-specialist", "issue_id": key, "project_id": PROJECT}
        event = {"publisher": "writer", "topic": "load", "data": {"key": key}}
        path, body = (
            ("/api/results", agent | {"result": {"status": "success"}}) if self.results else ("/api/events/load", event)
        )
        try:
            client = sidecar.client(sub=f"writer-{self.number}")
            answer = client.request("POST", path, json=body, headers={"Idempotency-Key": key})
        except FAILED:
            time.sleep(0.05)
            return False
        if answer.status_code in (201, 202):
            self.confirmed[key] = answer.json()["id" if self.results else "event_id"]
            return True
        if answer.status_code != 503:
            self.refused.append(answer.text)
        return False


class Load:
    """Writers and a reader on each of a team's sidecars, and what must be true of what they saw."""

    def __init__(self, team: Team) -> None:
        self.team, self.running = team, threading.Event()
        self.running.set()
        self.readers = [Reader(sidecar, self.running) for sidecar in team.sidecars]
        self.writers = [Writer(number, team, self.running, number == 3) for number in range(4)]
        for thread in (*self.readers, *self.writers):
            thread.start()

    def recovered(self, what: str, began: float = 0.0) -> None:
        """Wait until each sidecar confirms an event, and all readers have seen it; prints how long that took."""
        began, last = began or time.monotonic(), ""
        for sidecar in self.team.sidecars:
            last = until(lambda sidecar=sidecar: published(sidecar), LONG)
        wrote = time.monotonic() - began
        until(lambda: all(last in reader.ids for reader in self.readers), LONG)
        print(
            f"{what}: every sidecar writes again after {wrote:.1f} s, every reader hears after {time.monotonic() - began:.1f} s"
        )

    def check(self) -> None:
        """Look at all that was written until now."""
        confirmed = [dict(writer.confirmed) for writer in self.writers]
        last = until(lambda: published(self.team.sidecars[0]), LONG)
        until(lambda: all(last in reader.ids for reader in self.readers), LONG)
        histories = [self._until(reader, last) for reader in self.readers]
        order = [event["event_id"] for event in histories[0]]
        assert all([event["event_id"] for event in history] == order for history in histories), "sidecars disagree"
        assert order == sorted(set(order)), "an event came twice, or out of order"
        by_key = {event["data"]["key"]: event["event_id"] for event in histories[0] if "key" in event["data"]}
        assert len(by_key) == sum("key" in event["data"] for event in histories[0]), "one key, two events"
        for writer, known in zip(self.writers[:3], confirmed, strict=False):
            lost = {key: event_id for key, event_id in known.items() if by_key.get(key) != event_id}
            assert not lost, f"writer {writer.number} had these confirmed: {lost}"
        for sidecar in self.team.sidecars:
            stored = all_results(sidecar)
            assert len(set(stored.values())) == len(stored), "one key, two results"
            assert set(confirmed[3].values()) <= set(stored)
        assert not [thread.refused for thread in (*self.writers, *self.readers) if thread.refused]

    def _until(self, reader: Reader, last: str) -> list[dict[str, Any]]:
        return list(itertools.takewhile(lambda event: event["event_id"] <= last, list(reader.seen)))

    def stop(self) -> None:
        self.running.clear()
        for thread in (*self.readers, *self.writers):
            thread.join(60)


def published(sidecar: Service) -> str | None:
    """The id of an event that the sidecar has confirmed."""
    try:
        answer = sidecar.client().post("/api/events/load", {"publisher": "probe", "topic": "load", "data": {}})
    except FAILED:
        return None
    return answer.json()["event_id"] if answer.status_code == 202 else None


def all_results(sidecar: Service) -> dict[str, str]:
    """Issue of each result by its id."""
    found, cursor = {}, "earliest"
    while page := sidecar.client().get("/api/results", since=cursor, limit=1000).json()["results"]:
        found |= {record["id"]: record["issue_id"] for record in page}
        cursor = page[-1]["id"]
    return found


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with servers(tmp_path_factory.mktemp("nats"), 3) as running:
        yield running


@pytest.fixture(scope="module")
def load(nats: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    folder = tmp_path_factory.mktemp("team")
    team = Team(folder, make_repository(folder / "repository"), nats.url)
    try:
        team.start(3)
        running = Load(team)
        running.recovered("at the start")
        yield running
        running.stop()
        assert not any(thread.is_alive() for thread in (*running.readers, *running.writers))
    finally:
        team.stop()
    for sidecar in team.sidecars:
        assert "Traceback" not in sidecar.log, sidecar.log
    end_stragglers()


def other_node(nats: Servers) -> Node:
    leader = nats.leader(PROJECT)
    return next(node for node in nats.nodes if node is not leader)


@pytest.mark.parametrize(
    ("which", "choose"), [("the leader", lambda nats: nats.leader(PROJECT)), ("another node", other_node)]
)
def test_a_node_is_killed(nats: Servers, load: Load, which: str, choose: Callable[[Servers], Node]) -> None:
    node = choose(nats)
    node.kill()
    load.recovered(f"{which} killed")
    for sidecar in load.team.sidecars:
        until(lambda sidecar=sidecar: cluster_of(sidecar)["away"] == [node.name], LONG)
    verdict, finding = found_by_doctor(load.team)
    assert verdict == "note" and f"not up to date: {node.name};" in finding, finding
    nats.start()
    until(lambda: found_by_doctor(load.team)[0] == "good", LONG)
    load.check()


def cluster_of(sidecar: Service) -> Any:
    return sidecar.client().get("/status").json()["storage"]["cluster"]


def found_by_doctor(team: Team) -> tuple[str, str]:
    """(verdict, finding) about the log of the first sidecar."""
    found = plugin("doctor").examine_log(
        argparse.Namespace(root=str(team.root), storage=str(team.sidecars[0].storage), project=PROJECT)
    )
    return found["log"]  # type: ignore[no-any-return]


def test_without_a_majority_writing_is_refused_in_time_and_reading_goes_on(nats: Servers, load: Load) -> None:
    killed = [nats.leader(PROJECT), other_node(nats)]
    for node in killed:
        node.kill()
    for sidecar in load.team.sidecars:
        answer = sidecar.client().post("/api/events/load", {"publisher": "probe", "topic": "load", "data": {}})
        assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1, answer.text
        client = sidecar.client()
        for path in (
            "/api/events?limit=5",
            "/api/results?limit=5",
            "/api/events/wait/load?since=latest&timeout=0",
            "/status",
        ):
            assert client.get(path).status_code == 200, path
        context = client.get("/api/context/0-0/chief-architect")
        assert context.status_code == 200, context.text
        health = Client(sidecar.url, None).get("/health")
        assert health.json()["status"] != "healthy" and "unhealthy: nats: " in health.json()["checks"]["storage"]
    began = time.monotonic()
    nats.start()
    load.recovered("two nodes killed and started again", began)
    for sidecar in load.team.sidecars:
        until(lambda sidecar=sidecar: Client(sidecar.url, None).get("/health").json()["status"] == "healthy")
    load.check()


def test_a_sidecar_is_killed_and_another_one_paused(nats: Servers, load: Load) -> None:
    a, b, c = load.team.sidecars
    a.kill()
    assert b.process
    b.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    until(lambda: published(c), LONG)
    print(f"the third sidecar went on writing after {time.monotonic() - began:.1f} s")
    a.start()
    until(lambda: published(a), LONG)
    b.process.send_signal(signal.SIGCONT)
    load.recovered("one sidecar killed and started again, one paused")
    load.check()


def test_the_leader_is_paused(nats: Servers, load: Load) -> None:
    leader = nats.leader(PROJECT)
    leader.pause()
    load.recovered("the leader paused")
    leader.resume()
    until(nats.ready, LONG)
    load.recovered("it goes on")
    load.check()


LOST = "move that file away"


@pytest.fixture
def far(nats: Servers, tmp_path: Path) -> Iterator[Callable[..., tuple[Service, Relay]]]:
    """One sidecar, which has published, and the relay by which it reaches one of the three servers."""
    with contextlib.ExitStack() as ends:

        def start(*options: str) -> tuple[Service, Relay]:
            relay = Relay(nats.nodes[0], f"{tmp_path.name}-{PROJECT}")
            ends.callback(relay.stop)
            team = Team(tmp_path / "team", make_repository(tmp_path / "repository"), relay.url)
            ends.callback(team.stop)
            (sidecar,) = team.start(1, "--nats-prefix", tmp_path.name, *options)
            until(lambda: published(sidecar), LONG)
            return sidecar, relay

        yield start


def test_a_write_waits_while_the_server_that_answers_is_not_up_to_date(far: Callable[..., Any]) -> None:
    sidecar, relay = far("--nats-timeout", "60")
    relay.behind = math.inf
    relay.cut()
    until(lambda: relay.told > 2, LONG)
    with ThreadPoolExecutor(1) as pool:
        waiting, before = pool.submit(published, sidecar), relay.told
        until(lambda: waiting.done() or relay.told > before + 4, LONG)
        assert not waiting.done(), "refused"
        relay.behind = 0
        assert waiting.result(60)
    assert LOST not in sidecar.log


def test_what_was_written_while_the_log_was_found_again_is_no_entry_that_it_lacks(far: Callable[..., Any]) -> None:
    """The server that answers next tells of the log as it was before the write that was on its way."""
    sidecar, relay = far("--nats-timeout", "60")
    for _ in range(3):
        relay.cuts = 1
        assert published(sidecar) and relay.cuts == 0
        answer = sidecar.client().post("/api/events/load", {"publisher": "probe", "topic": "load", "data": {}})
        assert answer.status_code == 202, answer.text
    assert LOST not in sidecar.log


@pytest.mark.parametrize("silent", [0, 1, 4])
def test_what_stays_behind_for_longer_than_a_write_waits_has_lost_entries(far: Callable[..., Any], silent: int) -> None:
    """Also where no server answers now and then."""
    sidecar, relay = far("--nats-timeout", "1")
    relay.silent, relay.behind = silent, math.inf
    relay.cut()
    until(lambda: LOST in Client(sidecar.url, None).get("/health").text, LONG)
    assert published(sidecar) is None
    relay.behind = 0
    until(lambda: published(sidecar), LONG)
    assert sidecar.log.count("the log at NATS: the log ends before") == 1


def test_servers_that_did_not_answer_meanwhile_have_not_stayed_behind(far: Callable[..., Any]) -> None:
    seconds = 5
    sidecar, relay = far("--nats-timeout", str(seconds))
    relay.behind = math.inf
    relay.cut()
    until(lambda: relay.told, LONG)
    relay.away = True
    relay.cut()
    over = time.monotonic() + seconds
    until(lambda: relay.refused > 1 and time.monotonic() > over, LONG)
    relay.behind, told, relay.away = 1, relay.told, False
    until(lambda: published(sidecar), LONG)
    assert relay.told == told + 1 and LOST not in sidecar.log


def test_a_start_is_refused_where_the_servers_stay_behind(far: Callable[..., Any]) -> None:
    """And is not where one of them is up to date again soon."""
    sidecar, relay = far("--nats-timeout", "60")
    assert sidecar.stop() == 0
    relay.behind = 1
    assert published(sidecar.start()) and relay.behind == 0
    assert sidecar.stop() == 0
    relay.behind = math.inf
    ended = subprocess.run(sidecar.command, cwd=sidecar.root, env=clean_environment(), capture_output=True, timeout=120)
    assert ended.returncode and LOST in ended.stderr.decode(), ended

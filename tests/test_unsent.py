"""Answers that clients do not read: what waits is bounded, kept once, and gone when they are."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from conftest import Client, Service, plugin, serving, until

from cco_sidecar import MB, ApiError

UNSENT = plugin("unsent")
Unsent = UNSENT.Unsent
LONG = UNSENT.SHORT + 1


# -- the rule


class Waiting(SimpleNamespace):
    """An endpoint whose answer waits."""

    def __init__(self, sub: str = "reader") -> None:
        super().__init__(claims=SimpleNamespace(sub=sub), public=not sub, closed=False, compression=None)

    __hash__ = object.__hash__

    def close(self) -> None:
        self.closed = True


def refused(unsent: Any, endpoint: Any, size: int) -> str:
    """The code of the refusal, or nothing."""
    try:
        unsent.add(endpoint, bytes(size))
    except ApiError as error:
        assert error.retry_after
        return f"{error.status} {error.code}"
    return ""


@pytest.mark.parametrize(
    ("waiting", "asked", "said"),
    [
        ([], ("one", 9 * MB), ""),  # the only one always fits
        ([("one", MB)], ("one", MB), "429 RATE_001"),
        ([("one", MB)], ("two", MB), ""),
        ([("one", MB // 2)], ("one", MB // 2), ""),
        ([("one", MB), ("two", MB), ("three", MB), ("four", MB)], ("five", LONG), "503 REQ_009"),
        ([("", MB)], ("", LONG), "503 REQ_009"),  # nobody's token
    ],
)
def test_a_long_answer_is_refused_where_too_much_waits(
    waiting: list[tuple[str, int]], asked: tuple[str, int], said: str
) -> None:
    unsent = Unsent(4 * MB, refuses=True)
    for sub, size in waiting:
        unsent.add(Waiting(sub), bytes(size))
    assert refused(unsent, Waiting(asked[0]), asked[1]) == said


def test_an_answer_that_many_wait_for_counts_once_until_the_last_has_it() -> None:
    unsent, content = Unsent(4 * MB, refuses=True), bytes(MB)
    waiting = [Waiting(f"reader-{number % 9}") for number in range(90)]
    for endpoint in waiting:
        unsent.add(endpoint, content)
    assert unsent.bytes[None] == unsent.bytes["reader-3"] == MB
    for endpoint in waiting[:-1]:
        unsent.remove(endpoint)
    assert (unsent.bytes[None], unsent.bytes["reader-3"]) == (MB, 0)
    unsent.remove(waiting[-1])
    assert not unsent.bytes and not unsent._holders and not unsent._waiting


def test_an_answer_counts_once_for_each_who_waits_where_each_is_sent_a_copy() -> None:
    unsent, content = Unsent(16 * MB, refuses=True), bytes(MB)
    for name in ("one", "two", "three"):
        waiting = Waiting(name)
        del waiting.compression
        unsent.add(waiting, content)
    assert unsent.bytes[None] == 3 * MB


@pytest.mark.parametrize("size", [6_000, 60_000, 600_000])
def test_of_short_answers_and_polls_those_are_given_up_that_have_waited_longest(size: int) -> None:
    unsent, first, second, other = Unsent(4 * MB, refuses=False), Waiting(), Waiting(), Waiting("other")
    for endpoint in (other, first, second):
        unsent.add(endpoint, bytes(MB // 2))
    newest = [Waiting() for _ in range(200)]
    for endpoint in newest:
        unsent.add(endpoint, bytes(size))
        assert unsent.bytes["reader"] <= MB
    assert first.closed and second.closed and not other.closed and not newest[-1].closed


# -- the service

PATHS = {
    "context": "/api/context/issue-1/chief-architect",
    "results": "/api/results?limit=1000",
    "result": "/api/results/{result_id}",
    "events": "/api/events?limit=1000",
    "since": "/api/context/issue-1/chief-architect?since=nothing",
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, dict[str, str]]]:
    """A service with some megabytes to ask for, and 24 MB for long ones that wait, six of them for a token."""
    from conftest import make_repository

    folder = tmp_path_factory.mktemp("full")
    repository = make_repository(folder / "repository")
    for number in range(8):
        lines = (f"value_{n} = {n * 7919 + number}  # a line of this file that nobody needs\n" for n in range(13_000))
        (repository / f"src/module_{number}.py").write_text("".join(lines))
    with serving(folder, "--no-watch", "--max-unsent-mb", "48", root=repository) as running:
        client = running.client()
        for _ in range(9):
            client.publish("heavy", {"load": "x" * 900_000})
        for _ in range(2):
            stored = client.store(rationale="y" * 6 * MB, issue="issue-2")
        paths = {name: path.format(result_id=stored["id"]) for name, path in PATHS.items()}
        for path in paths.values():  # what is built once is built
            assert len(client.get(path).content) > 3 * MB, path
        yield running, paths
    assert "unexpected" not in running.log, running.log


@contextmanager
def mute(service: Service, client: Client, path: str, number: int) -> Iterator[list[socket.socket]]:
    """Connections that ask and do not read."""
    address = urlsplit(service.url)
    with ExitStack() as open_ones:
        lines = []
        for _ in range(number):
            line = open_ones.enter_context(socket.socket())
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.connect((address.hostname, address.port))
            line.sendall(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {client.token}\r\n\r\n".encode()
            )
            lines.append(line)
        for line in lines:  # each has been answered, or begun to be
            line.settimeout(60)
            assert line.recv(9, socket.MSG_PEEK)
        yield lines


def memory(service: Service) -> float:
    assert service.process
    return psutil.Process(service.process.pid).memory_info().rss / MB


def unsent(client: Client) -> int:
    return int(client.get("/status").json()["performance"]["unsent_bytes"])


@pytest.mark.parametrize("name", PATHS)
def test_what_one_token_does_not_read_stays_within_bounds(full: tuple[Service, dict[str, str]], name: str) -> None:
    service, paths = full
    client, other, before = service.client(), service.client(), memory(service)
    with mute(service, client, paths[name], 60) as lines:
        assert memory(service) - before < 150  # 60 of them have 240 MB or more
        assert 0 < unsent(other) <= 24 * MB
        answer = other.get(paths[name])
        assert answer.status_code == 200 and len(answer.content) > 3 * MB  # others are served
        assert client.get("/health").status_code == client.get("/api/agents").status_code == 200
        heads = [line.recv(12, socket.MSG_PEEK) for line in lines]
        assert heads.count(b"HTTP/1.1 200") >= 1 and set(heads) <= {b"HTTP/1.1 200", b"HTTP/1.1 429"}
        if name != "context":  # which all share
            assert b"HTTP/1.1 429" in heads
            refused = lines[heads.index(b"HTTP/1.1 429")].recv(65536)
            head, _, body = refused.partition(b"\r\n\r\n")
            assert b"Retry-After: 5" in head and b"ETag" not in head and b"Content-Encoding" not in head
            assert json.loads(body)["code"] == "RATE_001"
    until(lambda: unsent(other) == 0)
    assert client.get(paths[name]).status_code == 200


def test_polls_are_answered_beside_what_is_not_read(full: tuple[Service, dict[str, str]]) -> None:
    service, paths = full
    client = service.client()
    with mute(service, client, paths["results"], 20):
        assert len(client.wait("heavy", since="earliest", timeout=0)["events"]) == 9
        mark = client.publish("light")["event_id"]
        assert [event["event_id"] for event in client.wait("light", since="earliest", timeout=0)["events"]] == [mark]
        assert client.store(issue="issue-3")["stored"]


def test_polls_that_are_not_read_are_bounded_too(full: tuple[Service, dict[str, str]]) -> None:
    service, _ = full
    client, other, before = service.client(), service.client(), memory(service)
    # Each filter makes an answer of its own.
    with ExitStack() as held:
        for number in range(30):
            path = f"/api/events/wait/heavy?since=earliest&timeout=0&filter=number%3A!{number}"
            held.enter_context(mute(service, client, path, 1))
        assert memory(service) - before < 150 and unsent(other) <= 24 * MB
        assert len(client.wait("heavy", since="earliest", timeout=0)["events"]) == 9
    until(lambda: unsent(other) == 0)


def test_an_answer_is_whole_for_who_reads_slowly(full: tuple[Service, dict[str, str]]) -> None:
    service, paths = full
    client = service.client()
    with mute(service, client, paths["result"], 1) as (line,):
        content = bytearray()
        while b"\r\n\r\n" not in content or len(content.partition(b"\r\n\r\n")[2]) < length(content):
            content += line.recv(30_000)
            time.sleep(0.001)
        assert json.loads(content.partition(b"\r\n\r\n")[2])["result"]["rationale"] == "y" * 6 * MB
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert line.recv(15) == b"HTTP/1.1 200 OK"


def length(content: bytearray) -> int:
    head = bytes(content).partition(b"\r\n\r\n")[0].lower()
    return int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])


def test_http2_streams_without_a_window_cost_what_they_share(make_service: Callable[..., Service]) -> None:
    pytest.importorskip("h2")
    from test_http2 import Address, HeadersFrame, SettingsFrame, Wire

    service = make_service("--max-unsent-mb", "48")
    client, other = service.client(), service.client()
    for _ in range(2):
        stored = client.store(rationale="y" * 3 * MB)
    before = memory(service)
    closed = {SettingsFrame.INITIAL_WINDOW_SIZE: 0}
    token = [("authorization", f"Bearer {client.token}")]
    with ExitStack() as held:
        for path in ("/api/results", f"/api/results/{stored['id']}"):
            wire = held.enter_context(Wire(Address(service), settings=closed))
            wire.send(*[wire.head(stream, path, fields=token) for stream in range(1, 121, 2)])
            assert wire.hear(lambda wire=wire: len({f.stream_id for f in wire.of(HeadersFrame)}) == 60)
            statuses = [wire.heads[stream][-1][":status"] for stream in range(1, 121, 2)]
            assert set(statuses) <= {"200", "429"} and "429" in statuses
        assert memory(service) - before < 150
        assert 0 < unsent(other) <= 24 * MB
    until(lambda: unsent(other) == 0)
    until(lambda: memory(service) - before < 60)

"""How often a subject may ask, what it is told about it, and that being refused costs the service nothing."""

import json
import random
import re
import select
import socket
import threading
import time
import tracemalloc
import types
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import requests
from conftest import ALL, PROJECT, Client, Service, body_of, plugin, until

import cco_sidecar
from cco_sidecar import ApiError, Claims, RateLimits

EXAMPLES = {"architect": "chief-architect", "coding": "python-specialist", "qa": "test-engineer", "security": "security-auditor",
            "documentation": "documentation-expert", "support": "technical-researcher"}  # fmt: skip
ROWS = {
    "architect": (None, None),
    "coding": (60, 10),
    "qa": (60, 10),
    "security": (60, 10),
    "documentation": (30, 5),
    "support": (30, 5),
    "operator": (None, None),
}
AGENT_TYPES = types.SimpleNamespace(categories={name: category for category, name in EXAMPLES.items()})
LIMITED = [(name, *row) for name, row in ROWS.items() if row[0]]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Subject:
    """One subject of a category under fresh limits and a clock of its own."""

    def __init__(
        self, category: str, limits: RateLimits | None = None, clock: Clock | None = None, sub: str = "agent-1"
    ) -> None:
        self.clock = clock or Clock()
        self.limits = limits or RateLimits(AGENT_TYPES, self.clock)  # type: ignore[arg-type]
        self.claims = Claims(sub=sub, agent_type=EXAMPLES[category], project_id=PROJECT, permissions=ALL, exp=0, iat=0)

    def ask(self) -> Any:
        """The allowance that is left, or the refusal."""
        try:
            return self.limits.spend(self.claims)
        except ApiError as error:
            return error

    def ask_all(self) -> int:
        """How many requests in a row are allowed."""
        for number in range(10_000):
            if isinstance(self.ask(), ApiError):
                return number
        raise AssertionError("without end")


# -- the rules, without a server


def test_the_rows_are_those_of_the_reference() -> None:
    assert {name: (row.per_minute, row.burst) for name, row in cco_sidecar.CATEGORIES.items()} == ROWS


@pytest.mark.parametrize(("category", "limit", "burst"), LIMITED)
def test_at_most_the_burst_at_once(category: str, limit: int, burst: int) -> None:
    assert Subject(category).ask_all() == burst


@pytest.mark.parametrize(("category", "limit", "burst"), LIMITED)
def test_the_burst_refills_at_the_limits_pace(category: str, limit: int, burst: int) -> None:
    subject = Subject(category)
    subject.ask_all()
    for step in (1, 2, 3):
        subject.clock.now += step * 60 / limit
        assert subject.ask_all() == step
    subject.clock.now += 60
    assert subject.ask_all() == burst, "and never holds more than the burst"


@pytest.mark.parametrize(("category", "limit", "burst"), LIMITED)
def test_at_most_the_limit_in_a_minute_although_the_bucket_would_allow_more(
    category: str, limit: int, burst: int
) -> None:
    subject = Subject(category)
    began, allowed = subject.clock.now, subject.ask_all()
    while subject.clock.now + 60 / limit < began + 60:
        subject.clock.now += 60 / limit
        allowed += subject.ask_all()
    assert allowed == limit
    refusal = subject.ask()
    assert began + 60 <= subject.clock.now + refusal.retry_after < began + 61 + 60 / limit


def test_an_architect_has_no_limit() -> None:
    subject = Subject("architect")
    assert [subject.ask() for _ in range(1000)] == [{}] * 1000
    assert len(subject.limits._recent) == 0


@pytest.mark.parametrize(("category", "limit", "burst"), LIMITED)
@pytest.mark.parametrize("seed", range(5))
def test_both_limits_hold_in_every_window_and_the_waiting_time_is_honest(
    category: str, limit: int, burst: int, seed: int
) -> None:
    subject, chance = Subject(category), random.Random(seed)
    allowed: list[float] = []
    for _ in range(1500):
        subject.clock.now += chance.choice([0, 0, 0, chance.random(), chance.random() * 3])
        answer = subject.ask()
        if isinstance(answer, ApiError) and chance.random() < 0.3:
            assert answer.retry_after is not None and answer.retry_after >= 1
            subject.clock.now += answer.retry_after - 1
            assert isinstance(subject.ask(), ApiError), "a second less is too early"
            subject.clock.now += 1
            answer = subject.ask()
            assert not isinstance(answer, ApiError), "exactly the time that was told is enough"
        if not isinstance(answer, ApiError):
            allowed.append(subject.clock.now)
    assert len(allowed) > limit
    for last in range(len(allowed)):
        for first in range(max(0, last - limit), last + 1):
            span, number = allowed[last] - allowed[first], last - first + 1
            assert number <= burst + span * limit / 60 + 1e-6
            assert number <= limit or span >= 60 - 1e-6


@pytest.mark.parametrize(("category", "limit", "burst"), LIMITED)
def test_what_remains_is_what_can_be_asked_at_once(category: str, limit: int, burst: int) -> None:
    subject, chance = Subject(category), random.Random(1)
    for _ in range(50):
        subject.clock.now += chance.random() * 10
        answer = subject.ask()
        if not isinstance(answer, ApiError):
            assert answer["X-RateLimit-Limit"] == str(limit)
            assert subject.ask_all() == int(answer["X-RateLimit-Remaining"])
    refusal = subject.ask()
    assert refusal.allowance.items() >= {"X-RateLimit-Limit": str(limit), "X-RateLimit-Remaining": "0"}.items()


@pytest.mark.parametrize(("category", "limit", "burst"), LIMITED)
@pytest.mark.parametrize("used", [1, 3, "all", "the minute"])
def test_at_the_reset_everything_is_there_again(category: str, limit: int, burst: int, used: Any) -> None:
    subject = Subject(category)
    if used == "the minute":
        for _ in range(3 * limit):
            subject.ask()
            subject.clock.now += 20 / limit
    for _ in range(used if isinstance(used, int) else burst + 1):
        answer = subject.ask()
    allowance = answer.allowance if isinstance(answer, ApiError) else answer
    subject.clock.now += (
        int(allowance["X-RateLimit-Reset"]) - time.time() + 0.1
    )  # the reset is told in the clock on the wall
    assert subject.ask_all() == burst


def test_a_refused_request_costs_nothing() -> None:
    subject = Subject("coding")
    subject.ask_all()
    for _ in range(100):
        assert subject.ask().retry_after == 1
    subject.clock.now += 1
    assert subject.ask_all() == 1


def test_a_refusal_says_what_the_reference_says() -> None:
    subject = Subject("documentation")
    subject.ask_all()
    refusal = subject.ask()
    assert (refusal.code, refusal.status, refusal.error, refusal.retry_after) == (
        "RATE_001",
        429,
        "rate_limit_exceeded",
        2,
    )
    assert refusal.message == "Too many requests. Please wait 2 seconds."


def test_subjects_and_projects_do_not_share() -> None:
    first = Subject("coding")
    second = Subject("coding", first.limits, first.clock, "agent-2")
    third = Subject("coding", first.limits, first.clock)
    third.claims = Claims(
        sub="agent-1", agent_type="python-specialist", project_id="project-xyz", permissions=[], exp=0, iat=0
    )
    assert [subject.ask_all() for subject in (first, second, third, first)] == [10, 10, 10, 0]


def test_a_hundred_thousand_subjects_are_forgotten_when_they_are_idle() -> None:
    clock = Clock()
    limits = Subject("coding", clock=clock).limits
    subjects = [Subject("coding", limits, clock, f"agent-{number}") for number in range(100_000)]
    busy = subjects[0]
    assert busy.ask_all() == 10
    for subject in subjects[1:]:
        subject.ask()
    assert len(limits._recent) == 100_000
    clock.now += 59
    busy.ask()
    assert len(limits._recent) == 100_000, "within the minute each still counts"
    clock.now += 2
    busy.ask()
    assert len(limits._recent) == 1
    for number in range(20_000):  # two hundred new ones a second never hold more than a minute's worth
        clock.now += 0.005
        Subject("coding", limits, clock, f"passer-by-{number}").ask()
    assert len(limits._recent) <= 12_002


def test_being_forgotten_gives_nobody_more() -> None:
    first = Subject("coding")
    other = Subject("coding", first.limits, first.clock, "agent-2")
    for _ in range(60):
        first.ask()
        first.clock.now += 1
        other.ask()
    assert first.ask_all() <= 1


# -- over HTTP


def use_up(
    client: Client, method: str = "GET", path: str = "/status", body: Any = None
) -> tuple[int, requests.Response]:
    """How many requests were let through before the first refusal, and that."""
    for number in range(100):
        answer = client.request(method, path, json=body)
        if answer.status_code == 429:
            return number, answer
    raise AssertionError("a hundred requests were let through")


@pytest.mark.parametrize(("category", "limit", "burst"), LIMITED)
def test_answers_tell_the_limit_and_what_is_left_of_it(service: Service, category: str, limit: int, burst: int) -> None:
    client = service.client(EXAMPLES[category])
    began, remaining, resets = time.monotonic(), [], []
    for _ in range(3):
        answer = client.get("/status")
        assert answer.status_code == 200
        assert answer.headers["X-RateLimit-Limit"] == str(limit)
        remaining.append(int(answer.headers["X-RateLimit-Remaining"]))
        resets.append(int(answer.headers["X-RateLimit-Reset"]))
    refilled = int((time.monotonic() - began) * limit / 60) + 1
    assert remaining[0] == burst - 1
    assert burst - 3 <= remaining[-1] <= burst - 3 + refilled
    assert time.time() - 1 <= resets[0] <= resets[-1] <= time.time() + 60


@pytest.mark.parametrize(("category", "limit", "burst"), LIMITED)
def test_more_than_the_burst_is_refused_as_documented(service: Service, category: str, limit: int, burst: int) -> None:
    client = service.client(EXAMPLES[category])
    began, allowed = time.monotonic(), 0
    while (answer := client.get("/status")).status_code == 200:
        allowed += 1
    assert burst <= allowed <= burst + (time.monotonic() - began) * limit / 60 + 1
    assert answer.status_code == 429
    body = answer.json()
    seconds = body["retry_after_seconds"]
    assert isinstance(seconds, int) and 1 <= seconds <= 60 / limit + 1
    assert (body["error"], body["code"], body["limit"]) == ("rate_limit_exceeded", "RATE_001", limit)
    assert body["message"] == f"Too many requests. Please wait {seconds} seconds."
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", body["timestamp"])
    assert body["request_id"] == answer.headers["X-Request-ID"]
    assert answer.headers["Retry-After"] == str(seconds)
    assert answer.headers["X-RateLimit-Limit"] == str(limit)
    assert answer.headers["X-RateLimit-Remaining"] == "0"
    assert int(answer.headers["X-RateLimit-Reset"]) >= time.time()


def test_who_waits_as_long_as_told_is_answered(service: Service) -> None:
    client = service.client("python-specialist")
    _, refusal = use_up(client)
    time.sleep(int(refusal.headers["Retry-After"]))
    assert client.get("/status").status_code == 200


def test_an_architect_is_unlimited_and_sees_no_limits(architect: Client) -> None:
    for _ in range(100):
        answer = architect.get("/status")
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.lower().startswith("x-ratelimit")]


def test_public_endpoints_and_bad_tokens_are_not_counted(service: Service) -> None:
    client = service.client("documentation-expert")
    for _ in range(10):
        assert client.get("/health").status_code == 200
        assert Client(service.url, f"{client.token}x").get("/status").status_code == 401
    assert client.get("/status").headers["X-RateLimit-Remaining"] == "4"


def test_two_tokens_of_one_subject_share_its_allowance(service: Service) -> None:
    began = time.monotonic()
    first, _ = use_up(service.client("documentation-expert", sub="sharer"))
    second, _ = use_up(service.client("documentation-expert", sub="sharer", exp=int(time.time()) + 1000))
    assert 5 <= first + second <= 5 + (time.monotonic() - began) / 2 + 1
    assert use_up(service.client("documentation-expert", sub="no sharer"))[0] >= 5


def test_refusals_and_mistakes_cost_a_request_too(service: Service) -> None:
    client, began = service.client("documentation-expert"), time.monotonic()
    assert client.post("/api/results", {}).status_code == 403
    assert client.get("/api/events/wait/ping", limit=0).status_code == 400
    assert client.get("/api/agents/a/status").status_code == 404
    assert int(client.get("/status").headers["X-RateLimit-Remaining"]) <= 1 + (time.monotonic() - began) / 2


def test_a_long_poll_costs_one_request(service: Service) -> None:
    client = service.client("python-specialist")
    answer = client.get("/api/events/wait/never", timeout=1500)
    assert answer.json()["timeout"] is True
    assert answer.headers["X-RateLimit-Remaining"] == "9"
    assert int(client.get("/status").headers["X-RateLimit-Remaining"]) >= 8


def test_a_refused_request_does_no_work(service: Service, issue: str) -> None:
    client, architect = service.client("python-specialist"), service.client()
    event = {"publisher": "tester", "topic": "test", "data": {"issue_id": issue}}
    stored, _ = use_up(client, "POST", "/api/results", body_of(issue))
    published, _ = use_up(client, "POST", "/api/events/ping", event)
    stored += use_up(client, "POST", "/api/results", body_of(issue))[0]
    context = architect.get(f"/api/context/{issue}/test-engineer").json()["context"]
    assert len(context["previous_agent_outputs"]) == stored
    assert len(architect.wait("ping", filter=f"issue_id:{issue}", timeout=0)["events"]) == published


def test_a_refused_request_is_not_even_read(service: Service) -> None:
    client = service.client("documentation-expert")
    for method, path, body in [
        ("POST", "/api/results", {}),
        ("POST", "/api/agents/spawn", {}),
        ("GET", "/api/context/i/no-such-type", None),
    ]:
        _, refusal = use_up(client, method, path, body)
        assert refusal.json()["code"] == "RATE_001", "neither the permission nor the body was looked at"


def test_a_swarm_at_once_gets_no_more_than_the_burst(service: Service) -> None:
    token, statuses = service.token("python-specialist"), []
    started = threading.Barrier(30)

    def ask() -> None:
        client = Client(service.url, token)
        client.get("/health")
        started.wait(30)
        statuses.append(client.get("/status").status_code)

    threads = [threading.Thread(target=ask) for _ in range(30)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(statuses) == 30
    assert 10 <= statuses.count(200) <= 10 + (time.monotonic() - began) + 1
    assert set(statuses) == {200, 429}


def test_subjects_take_bounded_memory() -> None:
    clock, number = Clock(), 20_000
    limits = RateLimits(AGENT_TYPES, clock)  # type: ignore[arg-type]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for each in range(number):
        Subject("coding", limits, clock, sub=f"agent-{each}").ask()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(limits._recent) == number and grown < number * 600, f"{grown / number:.0f} bytes a subject"


def test_subjects_that_come_and_go_leave_nothing_behind() -> None:
    clock, largest = Clock(), 0
    limits = RateLimits(AGENT_TYPES, clock)  # type: ignore[arg-type]
    for number in range(100_000):
        clock.now += 0.1
        Subject("support", limits, clock, sub=f"agent-{number}").ask()
        largest = max(largest, len(limits._recent))
    assert largest <= 602, "as many as ask within a minute"


def test_refused_subjects_cost_no_more_than_others() -> None:
    subject = Subject("coding")
    for _ in range(10_000):
        subject.ask()
    ((_, _, times),) = subject.limits._recent.values()
    assert len(times) == 10


# -- a task in the URL

LONG_TASKS = {  # the longest that there may be; each character is up to twelve bytes there
    "four bytes each": "😀" * 30_000,
    "three bytes each": "日" * 30_000,
    "two bytes each": "é" * 30_000,
    "words": "greet " * 5_000,
    "blanks and signs": "% &=?#+/" * 3_750,
}


def long_target(task: str) -> str:
    return f"/api/context/issue-1/python-specialist?task={quote(task, safe='')}"


@pytest.mark.parametrize("kind", LONG_TASKS)
def test_a_task_of_the_documented_length_fits_into_the_url(architect: Client, kind: str) -> None:
    task = LONG_TASKS[kind]
    answer = architect.get(long_target(task))
    assert answer.status_code == 200, answer.text[:300]
    assert answer.json()["context"]["metadata"]["task_matched"] is (kind == "words")
    refused = architect.get(long_target(task + "x"))
    assert (refused.status_code, refused.json()["code"]) == (400, "REQ_001") and "30000" in refused.json()["message"]


@pytest.mark.parametrize("place", ["/api/context/i/python-specialist", "/api/events/wait/x", "/health", "/status"])
def test_a_url_that_is_longer_than_any_right_one_is_414(architect: Client, place: str) -> None:
    size = 380_000 if "context" in place else 9_000
    answer = architect.get(f"{place}?task={'x' * size}")
    assert (answer.status_code, answer.json()["code"]) == (414, "REQ_004"), answer.text[:300]


def huffman(text: bytes) -> bytes:
    """As hpack encodes it, whose way takes a time that grows with the square of the length: seconds for a long task."""
    from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

    bits = "".join(f"{REQUEST_CODES[byte]:0{REQUEST_CODES_LENGTH[byte]}b}" for byte in text)
    bits += "1" * (-len(bits) % 8)
    return int(bits or "0", 2).to_bytes(len(bits) // 8, "big")


def over_http2(url: str, token: str, target: str, *fields: tuple[str, str]) -> tuple[int, bytes]:
    """Status and body of a GET by prior knowledge. curl itself sends no head of more than 64 kB."""
    h2_connection = pytest.importorskip("h2.connection")
    events = pytest.importorskip("h2.events")
    place = urlsplit(url)
    connection, status, body = h2_connection.H2Connection(), 0, b""
    connection.encoder.huffman_coder.encode = huffman
    connection.initiate_connection()
    head = [(":method", "GET"), (":path", target), (":scheme", "http"), (":authority", place.netloc)]
    connection.send_headers(1, [*head, ("authorization", f"Bearer {token}"), *fields], end_stream=True)
    with socket.create_connection((str(place.hostname), int(place.port or 0)), timeout=30) as line:
        line.sendall(connection.data_to_send())
        while data := line.recv(65_536):
            for event in connection.receive_data(data):
                if isinstance(event, events.ResponseReceived):
                    status = int(dict(event.headers)[b":status"])
                elif isinstance(event, events.DataReceived):
                    body += event.data
                    connection.acknowledge_received_data(event.flow_controlled_length, 1)
                elif isinstance(event, events.StreamEnded):
                    return status, body
                assert not isinstance(event, (events.ConnectionTerminated, events.StreamReset)), event
            line.sendall(connection.data_to_send())
    raise AssertionError("the connection was closed")


@pytest.mark.needs_plugin("http/http2 speaks HTTP/2")
def test_a_long_task_fits_over_http2_too_and_nothing_else_that_is_long(service: Service) -> None:
    token = service.token()
    for task in LONG_TASKS.values():
        status, body = over_http2(service.url, token, long_target(task))
        assert status == 200 and json.loads(body)["context"], body[:300]
        assert over_http2(service.url, token, long_target(task + "x"))[0] == 400
    for target in (f"/api/events/wait/x?filter={'x' * 9_000}", f"/health?x={'y' * 100_000}"):
        status, body = over_http2(service.url, token, target)
        assert (status, json.loads(body)["code"]) == (414, "REQ_004")
    assert over_http2(service.url, token, "/health", ("x-long", "x" * 70_000))[0] == 400
    assert over_http2(service.url, token, "/health")[0] == 200


@pytest.mark.needs_plugin("http/strict reads the heads")
def test_long_lines_are_read_for_contexts_only_and_not_too_many_at_once(service: Service) -> None:
    place = (urlsplit(service.url).hostname, urlsplit(service.url).port)
    lines = []
    try:
        for _ in range(110):  # ten more than are read: whichever comes first, who asks below is one too many
            lines.append(socket.create_connection(place, timeout=30))
            lines[-1].sendall(b"GET /api/context/i/python-specialist?task=" + b"x" * 10_000)
        until(lambda: len(select.select(lines, [], [], 0)[0]) >= 10)

        def answer(start: bytes) -> bytes:
            with socket.create_connection(place, timeout=30) as line:
                line.sendall(start + b"x" * 10_000)
                return line.recv(65_536)

        assert b"REQ_009" in answer(b"GET /api/context/i/python-specialist?task=")
        assert b" 414 " in answer(b"GET /api/results?x=") and b" 414 " in answer(b"POST /api/context/i/x?task=")
        assert service.client().get("/health").status_code == 200
    finally:
        for line in lines:
            line.close()
    until(lambda: service.client().get(long_target(LONG_TASKS["two bytes each"])).status_code == 200)


framing = plugin("_framing")
LARGEST: dict[str, Callable[[str], Any]] = {  # what a request may have of each at most, with a number of four digits
    "names of fields": lambda n: framing.parse_head(
        f"GET / HTTP/1.1\r\nHost: x\r\n{n}{'a' * 60_000}: 1\r\n\r\n".encode()
    ),
    "names looked for": lambda n: framing.Fields().get(n + "a" * 60_000),
    "heads": lambda n: framing.parse_head(f"GET /{n}{'a' * 900} HTTP/1.1\r\nHost: x\r\nX{n}: 1\r\n\r\n".encode()),
    "hosts": lambda n: cco_sidecar.host_allowed(n + "a" * (cco_sidecar.MAX_FIELDS - 4), frozenset()),
    "filters": lambda n: plugin("filters").parse(f"a:{n}|" + "|".join(map(str, range(1_800)))),
    "queries": lambda n: cco_sidecar.read_query(
        cco_sidecar.GetContext.query_type, ("task", n + "\u20ac" * (cco_sidecar.TASK_LENGTH - 4))
    ),
}


@pytest.mark.parametrize("kind", LARGEST)
def test_what_is_remembered_of_requests_takes_bounded_memory(kind: str) -> None:
    tracemalloc.start()
    try:
        for number in range(1_000, 1_200 if kind == "filters" else 2_500):
            LARGEST[kind](str(number))
        assert tracemalloc.get_traced_memory()[0] < 48 * cco_sidecar.MB
    finally:
        tracemalloc.stop()

"""Events: durable, in order, delivered to whom they concern, and nobody misses one."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import requests
from conftest import Client, Service, body_of, until


def in_background(call: Callable[[], Any]) -> Callable[[], Any]:
    """Start ``call`` in a thread; calling the result joins it and gives what it returned."""
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(call()), daemon=True)
    thread.start()

    def join() -> Any:
        thread.join(40)
        assert outcome, "the call did not come back"
        return outcome[0]

    return join


def parked(client: Client, number: int) -> None:
    until(lambda: client.get("/status").json()["events"]["active_subscriptions"] == number)


def ids(answer: Any) -> list[str]:
    return [event["event_id"] for event in answer["events"]]


# -- waiting and waking


@pytest.mark.any_storage
def test_a_parked_waiter_wakes_with_the_event_and_the_publisher_learns_who(
    service: Service, architect: Client, issue: str
) -> None:
    waiter = service.client("test-engineer")
    answer = in_background(lambda: waiter.wait("woken", filter=f"issue_id:{issue}", timeout=20_000))
    parked(architect, 1)
    published = architect.publish("woken", {"issue_id": issue})
    woken = answer()
    assert ids(woken) == [published["event_id"]]
    assert published["subscriber_count"] == 1
    assert published["subscribers_notified"] == [jwt_subject(waiter)]
    assert woken["more_available"] is False and woken["next_cursor"] == woken["scanned_to"] == published["event_id"]
    assert "timeout" not in woken


def jwt_subject(client: Client) -> str:
    import jwt

    return str(jwt.decode(client.token or "", options={"verify_signature": False})["sub"])


def test_only_matching_waiters_wake(setup: str, service: Service, architect: Client, issue: str) -> None:
    calls = {
        "same type and filter": ("precise", f"issue_id:{issue}"),
        "any type": ("*", f"issue_id:{issue}"),
        "other field": ("precise", "marker:x"),
        "other issue": ("precise", "issue_id:other"),
        "other type": ("imprecise", f"issue_id:{issue}"),
    }
    woken = {"same type and filter", "any type", "other field"}
    if setup == "with plugins":
        calls["prefix filter"] = ("precise", f"issue_id:{issue[:-1]}*")
        calls["negated"] = ("precise", f"issue_id:!{issue},marker:x")
        woken |= {"prefix filter"}
    clients = {name: service.client("chief-architect", sub=name.replace(" ", "-")) for name in calls}
    answers = {
        name: in_background(
            lambda client=clients[name], type=type, filter=filter: client.wait(type, filter=filter, timeout=25_000)
        )
        for name, (type, filter) in calls.items()
    }
    parked(architect, len(calls))
    published = architect.publish("precise", {"issue_id": issue, "marker": "x"})
    assert set(published["subscribers_notified"]) == {name.replace(" ", "-") for name in woken}
    for name in woken:
        assert ids(answers[name]()) == [published["event_id"]], name
    parked(architect, len(calls) - len(woken))
    others = [
        architect.publish("precise", {"issue_id": "other", "marker": "x"}),
        architect.publish("imprecise", {"issue_id": issue}),
    ]
    for name in calls.keys() - woken:
        assert ids(answers[name]()) == [others[name == "other type"]["event_id"]], name
    parked(architect, 0)


@pytest.mark.any_storage
def test_a_reader_of_one_issue_gets_the_events_that_name_several_in_order_and_misses_none(
    architect: Client, issue: str
) -> None:
    """More of both kinds than one look into the log takes."""
    named = [issue, [issue, "another"], ["another"]]
    events = [architect.publish("shared", {"issue_id": named[number % 3]})["event_id"] for number in range(200)]
    found = ids(architect.wait("shared", filter=f"issue_id:{issue}", timeout=0, limit=1000))
    assert found == [event for number, event in enumerate(events) if number % 3 < 2]


NAMING: list[tuple[bool, dict[str, Any]]] = [  # whether a token for the issue HERE hears of such an event
    (True, {"data": {"issue_id": "HERE"}}),
    (True, {"data": {"issue_id": ["HERE-9", "HERE"]}}),
    (True, {"issue_id": "HERE", "data": {}}),
    (True, {"issue_id": "HERE-9", "data": {"issue_id": "HERE"}}),
    (True, {"data": {"note": "HERE-9"}}),
    (True, {"data": {"issue_id": None}}),
    (False, {"data": {"issue_id": "HERE-9"}}),
    (False, {"data": {"issue_id": ["HERE-9", "issue-0"]}}),
    (False, {"issue_id": "HERE-9", "data": {}}),
    (False, {"data": {"issue_id": {"id": "HERE"}}}),
    (False, {"data": {"issue_id": "here"}}),
    (False, {"data": {"issue_id": " HERE"}}),
]


def naming(issue: str) -> list[tuple[bool, dict[str, Any]]]:
    here, small = issue.upper(), issue.lower()
    text = json.dumps(NAMING).replace("HERE", here).replace("here", small)
    return [(mine, body) for mine, body in json.loads(text)]


def test_an_event_of_another_issue_does_not_wake_a_token_for_one(
    service: Service, architect: Client, issue: str
) -> None:
    narrow = service.client("chief-architect", issue_id=issue.upper())
    for event_type in ("*", "named"):
        for mine, body in naming(issue):
            answer = in_background(lambda kind=event_type: narrow.wait(kind, timeout=20_000, since="latest"))
            parked(architect, 1)
            first = architect.publish("named", **body)
            assert first["subscribers_notified"] == [jwt_subject(narrow)] * mine, body
            published = first if mine else architect.publish("named")
            assert ids(answer()) == [published["event_id"]], body


WITH_PLUGIN = pytest.mark.needs_plugin("events/filters knows them")
SEVERAL = ["issue_id:!x", "issue_id:*", "issue_id:HERE|HERE-9"]


@pytest.mark.parametrize("filter", ["", "topic:test", *(pytest.param(filter, marks=WITH_PLUGIN) for filter in SEVERAL)])
def test_a_token_for_one_issue_finds_the_events_of_that_issue_and_of_none(
    setup: str, service: Service, architect: Client, issue: str, filter: str
) -> None:
    asked = {"since": architect.wait("*", since="latest", timeout=0)["scanned_to"], "limit": 1000}
    sent = [(mine, architect.publish("named", **body)["event_id"]) for mine, body in naming(issue)]
    wide, narrow = (service.client("chief-architect", issue_id=one) for one in (None, issue.upper()))
    filter = filter.replace("HERE", issue.upper())
    for event_type in ("*", "named"):
        seen = ids(wide.wait(event_type, timeout=0, filter=filter, **asked))
        assert len(seen) > 3
        found = ids(narrow.wait(event_type, timeout=0, filter=filter, **asked))
        assert found == [event for mine, event in sent if mine and event in seen]


@pytest.mark.needs_plugin("events/event_list lists them")
def test_a_token_for_one_issue_lists_the_events_of_that_issue_and_of_none(
    service: Service, architect: Client, issue: str
) -> None:
    asked = {"since": architect.wait("*", since="latest", timeout=0)["scanned_to"], "limit": 1000}
    sent = [(mine, architect.publish("named", **body)["event_id"]) for mine, body in naming(issue)]
    narrow = service.client("chief-architect", issue_id=issue.upper())
    for query in (asked, {"limit": 1000}, asked | {"type": "named"}, {"topic": "test", "limit": 1000}):
        listed = ids(narrow.get("/api/events", **query).json())
        assert [event for _, event in sent if event in listed] == [event for mine, event in sent if mine]


def test_tokens_of_one_subject_for_one_issue_and_for_all_have_positions_of_their_own(
    service: Service, architect: Client, issue: str
) -> None:
    clients = {one: service.client(sub=f"reader-{issue}", issue_id=one) for one in (None, issue, f"{issue}-9")}
    for client in clients.values():
        client.wait("shared", limit=1000, timeout=0)
    published = {one: architect.publish("shared", {"issue_id": one})["event_id"] for one in clients if one}
    for one in (issue, f"{issue}-9", None):
        found = ids(clients[one].wait("shared", timeout=0))
        assert found == [event for name, event in published.items() if one in (None, name)]
        assert ids(clients[one].wait("shared", timeout=0)) == []


def test_an_empty_wait_has_the_timeout_shape(architect: Client, issue: str) -> None:
    answer = architect.wait("silence", filter=f"issue_id:{issue}", timeout=50)
    assert (answer["events"], answer["more_available"], answer["next_cursor"], answer["timeout"]) == (
        [],
        False,
        None,
        True,
    )
    assert re.fullmatch(r"evt-[0-9a-f]{8}-\d{12}", answer["scanned_to"])


def test_a_hang_up_frees_its_waiter_and_loses_nothing(service: Service, architect: Client, issue: str) -> None:
    token = service.token("test-engineer")
    host, port = service.url.removeprefix("http://").split(":")
    lines = [
        f"GET /api/events/wait/dropped?timeout=60000&filter=issue_id:{issue} HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {token}",
    ]
    with socket.create_connection((host, int(port))) as line:
        line.sendall("\r\n".join([*lines, "", ""]).encode())
        parked(architect, 1)
    parked(architect, 0)
    published = architect.publish("dropped", {"issue_id": issue})
    assert published["subscriber_count"] == 0
    assert ids(Client(service.url, token).wait("dropped", filter=f"issue_id:{issue}", timeout=0)) == [
        published["event_id"]
    ]


def test_a_thousand_hang_ups_at_once_leave_nobody_behind(service: Service, architect: Client) -> None:
    token = service.token("chief-architect")
    host, port = service.url.removeprefix("http://").split(":")
    request = f"GET /api/events/wait/never?timeout=60000 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    lines = [socket.create_connection((host, int(port))) for _ in range(1000)]
    for line in lines:
        line.sendall(request)
    parked(architect, 1000)
    for line in lines:
        line.close()
    parked(architect, 0)
    assert "Traceback" not in service.log


# -- positions


@pytest.mark.any_storage
def test_events_published_before_the_first_wait_are_delivered(service: Service, architect: Client, issue: str) -> None:
    early = [architect.publish("early", {"issue_id": issue})["event_id"] for _ in range(3)]
    assert ids(service.client("test-engineer").wait("early", filter=f"issue_id:{issue}", timeout=0)) == early


@pytest.mark.any_storage
def test_each_wait_goes_on_where_the_last_answer_ended(architect: Client, service: Service, issue: str) -> None:
    reader, where = service.client("test-engineer"), f"issue_id:{issue}"
    first = architect.publish("steps", {"issue_id": issue})["event_id"]
    assert ids(reader.wait("steps", filter=where, timeout=0)) == [first]
    assert ids(reader.wait("steps", filter=where, timeout=0)) == []
    between = [architect.publish("steps", {"issue_id": issue})["event_id"] for _ in range(2)]
    assert ids(reader.wait("steps", filter=where, timeout=0)) == between


@pytest.mark.any_storage
def test_positions_are_kept_apart_by_subject_type_and_filter(service: Service, architect: Client, issue: str) -> None:
    event = architect.publish("apart", {"issue_id": issue})["event_id"]
    one, other = service.client("test-engineer"), service.client("test-engineer")
    for client in (one, other):
        assert ids(client.wait("apart", filter=f"issue_id:{issue}", timeout=0)) == [event]
        assert ids(client.wait("*", filter=f"issue_id:{issue}", timeout=0)) == [event]
        assert ids(client.wait("apart", filter=f"issue_id:{issue},topic:test", timeout=0)) == [event]
        assert ids(client.wait("apart", filter=f"issue_id:{issue}", timeout=0)) == []


@pytest.mark.any_storage
def test_two_waits_on_one_position_are_answered_with_the_same_events(
    service: Service, architect: Client, issue: str
) -> None:
    token = service.token("chief-architect")
    answers = [
        in_background(lambda: Client(service.url, token).wait("twin", filter=f"issue_id:{issue}", timeout=20_000))
        for _ in range(2)
    ]
    parked(architect, 2)
    published = architect.publish("twin", {"issue_id": issue})
    assert published["subscriber_count"] == 1
    assert [ids(answer()) for answer in answers] == [[published["event_id"]]] * 2


@pytest.mark.any_storage
def test_positions_survive_a_restart_and_a_kill(make_service: Callable[..., Service]) -> None:
    service = make_service()
    token = service.token("chief-architect", sub="reader")
    for end in (service.stop, service.kill):
        seen = Client(service.url, token).publish("lasting")["event_id"]
        assert seen in ids(Client(service.url, token).wait("lasting", timeout=0))
        # A position is written after its answer: the next thing to be stored goes after it.
        missed = Client(service.url, token).publish("lasting")["event_id"]
        end()
        service.start()
        assert ids(Client(service.url, token).wait("lasting", timeout=0)) == [missed]


# -- cursors


@pytest.mark.any_storage
def test_since_is_exclusive_and_moves_no_position(service: Service, architect: Client, issue: str) -> None:
    events = [architect.publish("cursor", {"issue_id": issue})["event_id"] for _ in range(4)]
    reader, where = service.client("chief-architect"), f"issue_id:{issue}"
    assert ids(reader.wait("cursor", filter=where, since=events[1], timeout=0)) == events[2:]
    assert ids(reader.wait("cursor", filter=where, since="earliest", timeout=0)) == events
    assert ids(reader.wait("cursor", filter=where, since="latest", timeout=0)) == []
    assert ids(reader.wait("cursor", filter=where, timeout=0)) == events


@pytest.mark.needs_plugin("events/event_list reads times")
def test_a_wait_may_begin_at_a_time(architect: Client, issue: str) -> None:
    event = architect.publish("timed", {"issue_id": issue})["event_id"]
    for since, found in (("2000-01-01", [event]), ("2999-12-31T23:59:59Z", [])):
        assert ids(architect.wait("timed", filter=f"issue_id:{issue}", since=since, timeout=0)) == found


@pytest.mark.any_storage
def test_pages_are_exact(architect: Client, issue: str) -> None:
    events = [architect.publish("pages", {"issue_id": issue, "number": number})["event_id"] for number in range(5)]
    where = f"issue_id:{issue}"
    first = architect.wait("pages", filter=where, since="earliest", limit=3, timeout=0)
    assert (ids(first), first["more_available"]) == (events[:3], True)
    second = architect.wait("pages", filter=where, since=first["next_cursor"], limit=2, timeout=0)
    assert (ids(second), second["more_available"]) == (events[3:], False)
    exact = architect.wait("pages", filter=where, since="earliest", limit=5, timeout=0)
    assert (ids(exact), exact["more_available"]) == (events, False)


@pytest.mark.any_storage
def test_scanned_to_is_a_cursor_past_what_did_not_match(architect: Client, issue: str) -> None:
    architect.publish("scanned", {"issue_id": "another"})
    empty = architect.wait("scanned", filter=f"issue_id:{issue}", since="earliest", timeout=0)
    assert empty["next_cursor"] is None
    wanted = architect.publish("scanned", {"issue_id": issue})["event_id"]
    assert ids(architect.wait("scanned", filter=f"issue_id:{issue}", since=empty["scanned_to"], timeout=0)) == [wanted]


@pytest.mark.any_storage
def test_a_cursor_from_elsewhere_is_gone_and_says_where_the_log_is(architect: Client) -> None:
    head = architect.publish("gone")["event_id"]
    epoch, number = head.split("-")[1:]
    for cursor, reason in (
        (f"evt-{'0' * 8}-{number}", "another store"),
        (f"evt-{epoch}-{int(number) + 10_000:012d}", "beyond the head"),
    ):
        answer = architect.get("/api/events/wait/x", since=cursor, timeout=0)
        error = answer.json()
        assert (answer.status_code, error["code"], error["details"]["reason"]) == (410, "EVT_003", reason)
        assert error["details"]["head"] >= head and error["details"]["floor"] <= head


@pytest.mark.any_storage
def test_an_events_own_expiry_does_not_invalidate_its_cursor(architect: Client, issue: str) -> None:
    expired = architect.publish("brief", {"issue_id": issue}, ttl_seconds=1)["event_id"]
    until(lambda: not ids(architect.wait("brief", filter=f"issue_id:{issue}", since="earliest", timeout=0)))
    later = architect.publish("brief", {"issue_id": issue})["event_id"]
    assert ids(architect.wait("brief", filter=f"issue_id:{issue}", since=expired, timeout=0)) == [later]


# -- order


@pytest.mark.any_storage
def test_every_consumer_sees_the_same_order_however_many_publish(
    service: Service, architect: Client, issue: str
) -> None:
    def publish(number: int) -> None:
        client = service.client("chief-architect")
        for count in range(25):
            client.publish("ordered", {"issue_id": issue, "from": number, "count": count})

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    seen: list[list[str]] = [[], []]
    cursor: str | None = "earliest"
    follower = service.client("chief-architect")
    while len(seen[0]) < 150 or len(seen[1]) < 150:
        answer = follower.wait("ordered", filter=f"issue_id:{issue}", since=cursor, timeout=5000)
        seen[0] += ids(answer)
        cursor = answer["scanned_to"]
        seen[1] += ids(architect.wait("ordered", filter=f"issue_id:{issue}", timeout=5000 if len(seen[1]) < 150 else 0))
    for thread in threads:
        thread.join()
    assert seen[0] == seen[1] == sorted(set(seen[0]))


# -- publishing


@pytest.mark.any_storage
def test_unknown_fields_are_kept_and_never_replace_ours(architect: Client, issue: str) -> None:
    architect.publish("extra", {"issue_id": issue}, event_id="evt-mine", timestamp="never", colour="blue")
    event = architect.wait("extra", filter=f"issue_id:{issue}", timeout=0)["events"][0]
    assert event["colour"] == "blue"
    assert event["event_id"] != "evt-mine" and event["timestamp"] != "never"


# -- expiry, retention, dead letters


@pytest.mark.any_storage
@pytest.mark.needs_plugin("events/event_list lists them")
def test_an_event_that_expires_undelivered_becomes_a_dead_letter(
    service: Service, architect: Client, issue: str
) -> None:
    read = architect.publish("mortal", {"issue_id": issue, "read": True}, ttl_seconds=1)["event_id"]
    assert ids(architect.wait("mortal", filter=f"issue_id:{issue}", timeout=0)) == [read]
    unread = architect.publish("mortal", {"issue_id": issue}, ttl_seconds=1)["event_id"]

    def dead() -> list[str]:
        return ids(architect.get("/api/events", dead="true", type="mortal", limit=1000).json())

    until(lambda: unread in dead())
    assert read not in dead()
    assert architect.get("/status").json()["events"]["dead_letter_queue_size"] >= 1
    assert service.client("test-engineer").get("/api/events", dead="true").status_code == 403


@pytest.mark.any_storage
@pytest.mark.needs_plugin("storage/guard removes what is older or more")
def test_retention_moves_the_floor_and_says_so(make_service: Callable[..., Service]) -> None:
    service = make_service("--event-limit", "50")
    client = service.client("chief-architect")
    slow = service.client("chief-architect")
    first = client.publish("many")["event_id"]
    assert ids(slow.wait("many", timeout=0)) == [first]
    events = [client.publish("many", {"number": number})["event_id"] for number in range(200)]

    def floor() -> str:
        return str(client.wait("many", limit=1, since="earliest", timeout=0)["events"][0]["event_id"])

    until(lambda: floor() == events[150])
    gone = client.get("/api/events/wait/many", since=first, timeout=0)
    assert (gone.status_code, gone.json()["code"], gone.json()["details"]["reason"]) == (410, "EVT_003", "retention")
    assert gone.json()["details"]["floor"] == events[149]
    assert ids(client.wait("many", since=events[149], timeout=0)) == events[150:]
    late = slow.wait("many", timeout=0)
    assert ids(late) == events[150:]
    assert late["missed"] == {"position": first, "floor": events[149]}
    assert "missed" not in slow.wait("many", timeout=0)


@pytest.mark.any_storage
@pytest.mark.needs_plugin("storage/guard removes what is older or more")
def test_retention_by_age(make_service: Callable[..., Service]) -> None:
    client = make_service("--event-retention", "1").client("chief-architect")
    old = client.publish("aged")["event_id"]
    until(
        lambda: (
            client.get(
                "/api/events/wait/aged", since="evt-" + old.split("-")[1] + "-000000000000", timeout=0
            ).status_code
            == 410
        )
    )
    assert ids(client.wait("aged", since=old, timeout=0)) == []


# -- listing


@pytest.mark.any_storage
@pytest.mark.needs_plugin("events/event_list lists them")
def test_listing_is_not_delivery(architect: Client, issue: str) -> None:
    depth = architect.get("/status").json()["events"]["queue_depth"]
    topic = f"topic-{issue}"
    listed = [architect.publish("listed", {"issue_id": issue}, topic=topic)["event_id"] for _ in range(3)]
    first = architect.get("/api/events", type="listed", topic=topic, limit=2, since="earliest").json()
    assert ids(first) == listed[:2]
    assert (
        ids(architect.get("/api/events", type="listed", topic=topic, since=first["next_cursor"]).json()) == listed[2:]
    )
    assert architect.get("/status").json()["events"]["queue_depth"] == depth + 3


# -- a disk that does not take it


def test_a_full_disk_is_told_and_recovered_from(make_service: Callable[..., Service]) -> None:
    service = make_service(env={"PYTHONDONTWRITEBYTECODE": "1"})  # Python would leave half a file of it to other tests
    client = service.client("chief-architect")
    kept = client.publish("kept")["event_id"]
    assert service.process
    process = psutil.Process(service.process.pid)
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (4096, before[1]))  # a real limit: the kernel refuses every write beyond it
    try:
        refused = client.post("/api/events/lost", {"publisher": "x", "topic": "t", "data": {}})
        assert (refused.status_code, refused.json()["code"]) == (500, "EVT_001")
        refused = client.post("/api/results", body_of())
        assert (refused.status_code, refused.json()["code"]) == (500, "STR_001")
        health = client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "unhealthy"
        assert health.json()["checks"]["storage"].startswith("unhealthy: ")
        assert ids(client.wait("kept", since="earliest", timeout=0)) == [kept]
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, before)
    until(lambda: client.get("/health").status_code == 200)
    after = client.publish("kept")["event_id"]
    assert ids(client.wait("kept", since="earliest", timeout=0)) == [kept, after]
    assert ids(client.wait("lost", since="earliest", timeout=0)) == []
    assert client.get("/status").json()["storage"]["results_stored"] == 0


@pytest.mark.needs_plugin("storage/guard tries whether files can grow by a whole result")
@pytest.mark.parametrize("room", [6_000, 20_000, 40_000])
def test_a_service_whose_files_can_grow_by_less_than_a_result_takes_is_unhealthy(
    make_service: Callable[..., Service], room: int
) -> None:
    service = make_service(env={"PYTHONDONTWRITEBYTECODE": "1"})
    client = service.client("chief-architect")
    client.store()
    assert service.process
    process, log = psutil.Process(service.process.pid), service.storage / "sidecar.db-wal"
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    held = len(log.read_bytes().rstrip(b"\0"))  # zeros follow, over which it is written
    process.rlimit(psutil.RLIMIT_FSIZE, (held + room, before[1]))
    try:
        refused = client.post("/api/results", body_of("other"))
        assert (refused.status_code, refused.json()["code"]) == (500, "STR_001")
        assert client.get("/health").status_code == 503
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, before)
    until(lambda: client.get("/health").status_code == 200)
    client.store(issue="other")
    assert not list(service.storage.glob("results/.new/*"))


# -- slow and hostile readers


def test_a_reader_that_never_reads_does_not_hold_up_the_others(service: Service, architect: Client, issue: str) -> None:
    for _ in range(20):
        architect.publish("heavy", {"issue_id": issue, "load": "x" * 500_000})
    host, port = service.url.removeprefix("http://").split(":")
    lines = []
    for _ in range(3):
        token = service.token("chief-architect")
        line = socket.create_connection((host, int(port)))
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.sendall(
            f"GET /api/events/wait/heavy?timeout=0 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        )
        lines.append(line)
    assert architect.publish("light", {"issue_id": issue})["published"]
    pages = [architect.wait("heavy", filter=f"issue_id:{issue}", timeout=0) for _ in range(2)]
    assert sum(len(ids(page)) for page in pages) == 20
    assert [page["more_available"] for page in pages] == [True, False]  # an answer ends before it gets larger than 8 MB
    for line in lines:
        line.close()


def test_health_answers_while_a_large_log_is_searched(service: Service, architect: Client) -> None:
    with requests.Session() as session:
        session.trust_env = False
        scan = in_background(lambda: architect.wait("*", since="earliest", filter="nothing.matches:this", timeout=0))
        assert session.get(service.url + "/health", timeout=5).status_code == 200
        assert scan()["events"] == []


# -- what wakes and what is found are one comparison


@pytest.mark.parametrize(
    ("value", "text", "other"),
    [
        (1e-7, "1e-7", "1e-07"),
        (1e22, "1e22", "1e+22"),
        (0.1 + 0.2, "0.30000000000000004", "0.3"),
        (-0.0, "-0.0", "0"),
        (True, "true", "True"),
    ],
)
def test_a_waiter_that_an_event_is_said_to_wake_gets_it(
    service: Service, architect: Client, issue: str, value: Any, text: str, other: str
) -> None:
    def wait(written: str) -> Any:
        waiter = service.client("chief-architect", sub=f"{issue}-{written}".replace("+", "p"))
        return waiter.wait("measured", filter=f"issue_id:{issue},x:{written}", timeout=20_000)

    def parked() -> int:
        return int(architect.get("/status").json()["events"]["active_subscriptions"])

    before = parked()
    with ThreadPoolExecutor(2) as pool:
        waiting = {written: pool.submit(wait, written) for written in (text, other)}
        until(lambda: parked() == before + 2)
        first = architect.publish("measured", {"issue_id": issue, "x": value})
        architect.publish("measured", {"issue_id": issue, "x": other})  # the text, which ends the other wait
        got = [written for written, answer in waiting.items() if first["event_id"] in ids(answer.result())]
    assert got == [text]
    assert first["subscribers_notified"] == [f"{issue}-{text}".replace("+", "p")]

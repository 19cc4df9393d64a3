"""What is stored stays within --storage-limit-mb: refused in time, pruned first, and taken again when there is room."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Client, Service, body_of, until

from cco_sidecar import MB

LIMIT = 24


@pytest.fixture
def small(make_service: Callable[..., Service]) -> Service:
    return make_service("--storage-limit-mb", str(LIMIT), "--agent-command", "true")


def on_disk(storage: Path) -> int:
    """Bytes of all files in the storage."""
    total = 0
    for path in storage.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def result(size: int, issue: str = "issue-1") -> dict[str, Any]:
    return body_of(issue, rationale="x" * size)


def event(size: int) -> dict[str, Any]:
    return {"publisher": "tester", "topic": "test", "data": {"load": "x" * size}}


KINDS: dict[str, tuple[str, Callable[[int], dict[str, Any]], int]] = {
    "large results": ("/api/results", result, 4 * MB),
    "results": ("/api/results", lambda size: result(size, f"issue-{time.monotonic_ns()}"), 300_000),
    "events": ("/api/events/heavy", event, 900_000),
    "keys": ("/api/events/heavy", event, 500_000),
}


def fill(client: Client, kind: str) -> Any:
    """Store until it is refused; the refusal."""
    path, body, size = KINDS[kind]
    for number in range(400):
        headers = {"Idempotency-Key": f"key-{number}"} if kind == "keys" else {}
        answer = client.post(path, body(size), headers=headers)
        if not answer.ok:
            return answer
    raise AssertionError("never refused")


@pytest.mark.parametrize("kind", KINDS)
def test_beyond_the_limit_is_refused_and_the_rest_goes_on(small: Service, kind: str) -> None:
    client = small.client()
    first = client.post("/api/results", result(10), headers={"Idempotency-Key": "first"})
    refused = fill(client, kind)
    assert (refused.status_code, refused.json()["code"]) == (500, "STR_001") and "limit" in refused.json()["message"]
    assert LIMIT * MB / 4 < on_disk(small.storage) <= LIMIT * MB
    path, body, size = KINDS[kind]
    for _ in range(5):
        assert client.post(path, body(8 * size)).json()["code"] in ("STR_001", "REQ_004")
    assert on_disk(small.storage) <= LIMIT * MB
    # Reading, health, what is already known and what the service does itself.
    assert client.get("/health").status_code == 200
    assert client.get("/api/results", limit=1).json()["results"]
    assert client.get("/api/context/issue-1/python-specialist").status_code == 200
    assert client.post("/api/results", result(10), headers={"Idempotency-Key": "first"}).json() == first.json()
    storage = client.get("/status").json()["storage"]
    assert storage["full"] is True and storage["limit_mb"] == LIMIT
    assert LIMIT / 4 < storage["total_size_mb"] <= LIMIT


def test_many_at_once_do_not_pass_together(small: Service) -> None:
    clients = [small.client() for _ in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda client: client.post("/api/results", result(4 * MB)).status_code, clients))
    assert set(answers) == {201, 500}
    assert on_disk(small.storage) <= LIMIT * MB


def test_agents_end_at_the_limit(make_service: Callable[..., Service]) -> None:
    service = make_service("--storage-limit-mb", str(LIMIT), "--agent-command", "sleep 300")
    client = service.client()
    spawn = {"agent_type": "python-specialist", "issue_id": "issue-1"}
    agent = client.post("/api/agents/spawn", spawn).json()["agent_id"]
    fill(client, "large results")
    big = spawn | {"environment": {f"NAME_{n}": "x" * 30_000 for n in range(30)}}
    until(lambda: fill(client, "events").ok is False and client.post("/api/agents/spawn", big).status_code == 500)
    assert client.delete(f"/api/agents/{agent}").status_code == 202
    until(lambda: client.get(f"/api/agents/{agent}/status").json()["state"] == "killed")
    ends = client.get("/api/events", type="agent_exited").json()["events"]
    assert [end["data"]["agent_id"] for end in ends] == [agent]


def test_a_raised_limit_makes_room(small: Service) -> None:
    fill(small.client(), "large results")
    assert small.stop() == 0
    small.arguments = (*small.arguments, "--storage-limit-mb", "100")
    small.start()
    assert small.client().post("/api/results", result(4 * MB)).status_code == 201


def test_a_full_storage_is_full_from_the_start(small: Service) -> None:
    fill(small.client(), "large results")
    assert small.stop() == 0
    small.start()
    assert small.client().post("/api/results", result(4 * MB)).json()["code"] == "STR_001"


def test_health_says_so_where_not_even_a_small_result_is_taken(small: Service) -> None:
    client = small.client()
    fill(client, "large results")
    assert client.get("/health").status_code == 200
    for size in (300_000, 20_000, 1_000, 10):
        while client.post("/api/results", result(size)).ok:
            pass
    until(lambda: client.get("/health").status_code == 503)
    health = client.get("/health").json()
    assert health["status"] == "unhealthy"
    assert f"full (--storage-limit-mb is {LIMIT})" in health["checks"]["storage"]


@pytest.mark.parametrize("more", [["--event-retention", "4"], ["--event-limit", "3"]])
def test_what_retention_removes_makes_room(make_service: Callable[..., Service], more: list[str]) -> None:
    service = make_service("--storage-limit-mb", str(LIMIT), *more)
    client = service.client()
    for _ in range(60):  # more than twice what fits, of what a reader has had
        until(lambda: client.post("/api/events/heavy", event(900_000)).status_code == 202, 40)
        client.get("/api/events/wait/heavy", since="earliest", timeout=0, limit=1000)
    assert on_disk(service.storage) <= LIMIT * MB


def test_files_that_others_write_count_too(small: Service) -> None:
    small.stop()
    (small.storage / "left").write_bytes(bytes(LIMIT * MB))
    (small.storage / "left").chmod(0o600)
    client = small.start().client()
    assert client.post("/api/results", result(2 * MB)).status_code == 500
    (small.storage / "left").unlink()
    until(lambda: client.post("/api/results", result(2 * MB)).status_code == 201)
    assert client.get("/status").json()["storage"]["full"] is False
    assert json.loads((small.storage / "sidecar.json").read_text())["pid"]

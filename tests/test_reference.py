"""Every request of the reference, with its own bodies, answered in the documented shapes."""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests
from conftest import ALL, DOCUMENTED_RESULT, PROJECT, Client, Service, serving, until

ISSUE = "issue-123"
TIME = "2025-11-18T10:00:00Z"

# -- the documented answers: what counts is each field's presence and JSON type

CONTEXT = {
    "issue_id": ISSUE,
    "agent_type": "python-specialist",
    "context": {
        "project_structure": {
            "root": "/Users/project",
            "files": ["src/main.py", "tests/test_main.py"],
            "directories": ["src", "tests", "docs"],
            "total_files": 42,
            "total_size_bytes": 512000,
        },
        "relevant_files": [
            {
                "path": "src/main.py",
                "content": "def main():\n    pass",
                "last_modified": TIME,
                "size": 1024,
                "language": "python",
                "checksum": "sha256:abc123...",
            }
        ],
        "git_context": {
            "branch": "main",
            "recent_commits": [
                {
                    "hash": "abc123",
                    "message": "Initial commit",
                    "author": "developer",
                    "timestamp": TIME,
                    "files_changed": ["src/main.py"],
                }
            ],
            "uncommitted_changes": [{"path": "src/api.py", "status": "modified", "diff": "+10 -5"}],
            "remote": "origin",
            "remote_url": "https://github.com/org/project",
        },
        "previous_agent_outputs": [
            {
                "agent": "chief-architect",
                "agent_type": "chief-architect",
                "timestamp": TIME,
                "decision": "Use FastAPI for the backend",
                "rationale": "Best performance for async endpoints",
                "files_affected": ["requirements.txt"],
            }
        ],
        "metadata": {
            "project_type": "python",
            "dependencies": ["fastapi", "pytest", "pydantic"],
            "python_version": "3.11",
            "test_coverage": 85.5,
            "last_build_status": "success",
            "last_build_time": TIME,
            "security_scan_status": "passed",
        },
    },
    "truncated": False,
    "truncation_strategy": "none",
    "total_size_bytes": 102400,
    "file_count": 12,
    "timestamp": TIME,
    "cache_hit": True,
}
UNMEASURED = {
    f"$.context.metadata.{name}"
    for name in ("test_coverage", "last_build_status", "last_build_time", "security_scan_status")
}

STORED = {
    "id": "result-uuid-456",
    "stored": True,
    "storage_path": "/tmp/cco-sidecar/results/project-abc/issue-123/python-specialist.json",
    "next_agents": [{"agent_type": "test-engineer", "priority": "high", "reason": "Validation of implemented API"}],
    "event_published": True,
    "event_id": "evt-789",
    "timestamp": TIME,
}
PUBLISHED = {
    "event_id": "evt-uuid-789",
    "published": True,
    "subscribers_notified": ["test-engineer-uuid", "qa-engineer-uuid"],
    "subscriber_count": 2,
    "timestamp": TIME,
    "topic": "implementation",
    "ttl_seconds": 86400,
}
ARRIVED = {
    "events": [
        {
            "event_id": "evt-uuid-789",
            "event_type": "agent_completed",
            "publisher": "python-specialist-uuid",
            "topic": "implementation",
            "data": {"issue_id": ISSUE, "status": "success"},
            "timestamp": TIME,
            "correlation_id": "session-789",
        }
    ],
    "more_available": False,
    "next_cursor": "evt-uuid-790",
    "timestamp": TIME,
}
TIMED_OUT = {"events": [], "more_available": False, "next_cursor": None, "timeout": True, "timestamp": TIME}
SPAWNED = {
    "agent_id": "python-specialist-uuid-new",
    "spawned": True,
    "process_id": 12345,
    "context_injected": True,
    "jwt_token": "eyJhbGciOiJIUzI1NiIs...",
    "webhook_url": "/api/agents/python-specialist-uuid-new/status",
    "timestamp": TIME,
}
CLEARED = {"cleared": True, "entries_removed": 3, "bytes_freed": 102400, "timestamp": TIME}
HEALTH = {
    "status": "healthy",
    "service": "orchestration-sidecar",
    "version": "1.0.0",
    "uptime_seconds": 3600,
    "checks": {
        "storage": "healthy",
        "event_bus": "healthy",
        "memory_usage_mb": 150,
        "cpu_usage_percent": 25.5,
        "active_agents": 5,
        "event_queue_size": 12,
        "disk_space_available_mb": 50000,
    },
    "timestamp": TIME,
}
STATUS = {
    "agents": {
        "active": 5,
        "completed": 12,
        "failed": 0,
        "spawned_total": 17,
        "by_type": {"python-specialist": 2},
        "avg_execution_time_ms": 4500,
    },
    "storage": {
        "context_cache_entries": 45,
        "results_stored": 12,
        "total_size_mb": 25.5,
        "cache_hit_rate": 0.85,
        "storage_path": "/tmp/cco-sidecar",
    },
    "events": {
        "total_published": 156,
        "total_delivered": 312,
        "active_subscriptions": 8,
        "queue_depth": 3,
        "avg_delivery_time_ms": 15,
        "dead_letter_queue_size": 0,
    },
    "performance": {
        "avg_response_time_ms": 45,
        "p95_response_time_ms": 89,
        "p99_response_time_ms": 120,
        "requests_per_second": 15.5,
        "errors_per_minute": 0.2,
    },
    "timestamp": TIME,
}
ERROR = {
    "error": "unauthorized",
    "message": "Invalid or expired JWT token",
    "code": "AUTH_001",
    "details": {"token_expired": True, "expiry_time": TIME},
    "timestamp": TIME,
    "request_id": "req-uuid-123",
}

# -- the documented request bodies

WHO = {
    "agent_id": "python-specialist-uuid",
    "agent_type": "python-specialist",
    "issue_id": ISSUE,
    "project_id": PROJECT,
}
FULL_RESULT = {
    **WHO,
    "result": DOCUMENTED_RESULT,
    "timestamp": "2025-11-18T10:05:00Z",
}
SHORT_RESULT = {
    **WHO,
    "result": {"status": "success", "files_created": ["src/api.py"], "decisions": ["Implemented REST API"]},
}
WORKFLOW_RESULT = {
    **WHO,
    "result": {
        "status": "success",
        "files_created": ["src/api.py", "tests/test_api.py"],
        "decisions": ["Implemented REST API with FastAPI"],
        "metrics": {"execution_time_ms": 5000, "test_coverage": 95.0},
    },
}
RUST_RESULT = {
    "agent_id": "rust-specialist-uuid",
    "agent_type": "rust-specialist",
    "issue_id": ISSUE,
    "project_id": PROJECT,
    "result": {
        "status": "success",
        "files_created": ["src/main.rs"],
        "decisions": ["Implemented high-performance API"],
    },
}
FULL_EVENT = {
    "event_type": "agent_completed",
    "publisher": "python-specialist-uuid",
    "topic": "implementation",
    "data": {
        "issue_id": ISSUE,
        "status": "success",
        "next_phase": "testing",
        "files_changed": ["src/api.py", "tests/test_api.py"],
        "custom_metadata": {"api_version": "v1", "endpoints_added": 5},
    },
    "correlation_id": "session-789",
    "ttl_seconds": 86400,
    "priority": "normal",
}
SHORT_EVENT = {
    "event_type": "agent_completed",
    "publisher": "python-specialist-uuid",
    "topic": "implementation",
    "data": {"status": "success"},
}
WORKFLOW_EVENT = {
    "event_type": "implementation_complete",
    "publisher": "python-specialist-uuid",
    "topic": "implementation",
    "data": {"issue_id": ISSUE, "status": "success", "files_changed": 2},
}
SPAWN = {
    "agent_type": "python-specialist",
    "issue_id": "issue-124",
    "task": "Implement user authentication",
    "context_requirements": ["project_structure", "previous_decisions", "security_policies"],
    "environment": {
        "PYTHON_VERSION": "3.11",
        "PROJECT_ROOT": "/Users/project",
        "API_BASE_URL": "http://localhost:8000",
    },
    "priority": "high",
}


def json_type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    return "number" if isinstance(value, (int, float)) else {str: "string", list: "array", dict: "object"}[type(value)]


def differences(documented: Any, answer: Any, nullable: set[str], path: str = "$") -> Iterator[str]:
    """What ``answer`` lacks or has with another JSON type; an array's items are each held against the first documented
    one.
    """
    if answer is None and path in nullable:
        return
    if json_type(documented) != json_type(answer):
        yield f"{path} is {json_type(answer)}, documented is {json_type(documented)}"
    elif isinstance(documented, dict):
        for name, value in documented.items():
            if name in answer:
                yield from differences(value, answer[name], nullable, f"{path}.{name}")
            else:
                yield f"{path}.{name} is missing"
    elif isinstance(documented, list) and documented:
        for item in answer:
            yield from differences(documented[0], item, nullable, f"{path}[]")


def same_shape(documented: Any, answer: Any, nullable: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    assert list(differences(documented, answer, nullable)) == []


@pytest.mark.parametrize(
    ("documented", "answer", "nullable", "found"),
    [
        ({"a": 1}, {"a": 2.5, "more": True}, set(), []),
        ({"a": 1}, {}, set(), ["$.a is missing"]),
        ({"a": 1}, {"a": True}, set(), ["$.a is boolean, documented is number"]),
        ({"a": 1}, {"a": None}, set(), ["$.a is null, documented is number"]),
        ({"a": 1}, {"a": None}, {"$.a"}, []),
        ({"a": [{"b": "x"}]}, {"a": [{"b": "y"}, {"b": 1}]}, set(), ["$.a[].b is number, documented is string"]),
        ({"a": None}, {"a": "x"}, set(), ["$.a is string, documented is null"]),
    ],
)
def test_the_comparison_of_shapes_finds_what_differs(
    documented: Any, answer: Any, nullable: set[str], found: list[str]
) -> None:
    assert list(differences(documented, answer, nullable)) == found


@pytest.fixture
def coder(service: Service) -> Client:
    """The reference's agent: a coding specialist with three permissions, its allowance untouched."""
    return service.client("python-specialist", permissions=ALL[:3])


@pytest.fixture(scope="module")
def spawner(setup: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose agents end at once."""
    with serving(tmp_path_factory.mktemp("spawner"), "--agent-command", f"{sys.executable} -c pass") as running:
        yield running


# -- context


def test_a_context_has_every_documented_field(service: Service, architect: Client, coder: Client, setup: str) -> None:
    (service.root / "src/greeting.py").write_text("def greet(name):\n    return f'Hi, {name}!'\n")
    decided = {
        "status": "success",
        "decisions": ["Use FastAPI for the backend"],
        "rationale": "Best performance for async endpoints",
    }
    body = {"agent_id": "chief-architect", "agent_type": "chief-architect", "issue_id": ISSUE, "project_id": PROJECT}
    assert (
        architect.post(
            "/api/results", body | {"result": decided | {"files_modified": ["requirements.txt"]}}
        ).status_code
        == 201
    )
    answer = coder.get("/api/context/issue-123/python-specialist")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    context = answer.json()
    unread = {"$.context.metadata.python_version"} if setup == "alone" else set()  # manifests are read by a plugin
    same_shape(CONTEXT, context, UNMEASURED | unread)
    sections = context["context"]
    filled = [
        sections["project_structure"]["files"],
        sections["project_structure"]["directories"],
        sections["relevant_files"],
    ]
    filled += [sections["git_context"]["recent_commits"], sections["git_context"]["recent_commits"][0]["files_changed"]]
    filled += [
        sections["git_context"]["uncommitted_changes"],
        sections["previous_agent_outputs"],
        unread or sections["metadata"]["dependencies"],
    ]
    assert all(filled), "an empty array would compare with anything"
    assert sections["git_context"]["uncommitted_changes"] == [
        {"path": "src/greeting.py", "status": "modified", "diff": "+1 -1"}
    ]
    assert sections["git_context"]["recent_commits"][0]["message"] == "Greet politely", "newest first"
    first = next(output for output in sections["previous_agent_outputs"] if output["agent"] == "chief-architect")
    assert first["decision"] == "Use FastAPI for the backend"
    assert first["rationale"] == "Best performance for async endpoints"
    assert first["files_affected"] == ["requirements.txt"]


def test_clearing_the_cache_counts_what_was_there(coder: Client, issue: str) -> None:
    sizes = 0
    for agent_type in ("python-specialist", "test-engineer", "security-auditor"):
        sizes += len(coder.get(f"/api/context/{issue}/{agent_type}").content) // 2
    answer = coder.delete(f"/api/cache/context/{issue}")
    assert answer.status_code == 200
    same_shape(CLEARED, answer.json())
    assert answer.json()["entries_removed"] == 3
    assert answer.json()["bytes_freed"] > sizes
    assert coder.delete(f"/api/cache/context/{issue}").status_code == 404


# -- results


@pytest.mark.parametrize(
    "body", [FULL_RESULT, SHORT_RESULT, WORKFLOW_RESULT, RUST_RESULT], ids=["schema", "short", "workflow", "rust"]
)
def test_every_documented_result_is_stored_as_it_was_sent(
    service: Service, coder: Client, body: dict[str, Any]
) -> None:
    answer = coder.post("/api/results", body)
    assert answer.status_code == 201
    stored = answer.json()
    same_shape(STORED, stored)
    assert stored["stored"] is True and stored["event_published"] is True
    assert stored["storage_path"] == str(service.storage / f"results/{PROJECT}/{ISSUE}/{body['agent_type']}.json")
    again = json.loads(Path(stored["storage_path"]).read_text())
    assert {name: again[name] for name in body} == body


SECRET = "gh" + "p_aB3xY7pQ9rT2vW5z8mN4cD6fG1hJ0kL2sE9u"


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ({"note": f"as {SECRET}"}, {"note": "as [REDACTED]"}),
        ({"notes": [{"by": SECRET}]}, {"notes": [{"by": "[REDACTED]"}]}),
        ({SECRET: 1}, {"[REDACTED]": 1}),
        ({"timestamp": SECRET}, {"timestamp": "[REDACTED]"}),
    ],
    ids=["text", "list", "name", "known field"],
)
def test_fields_beside_a_result_are_redacted_as_it_is_and_whose_it_is_stays(
    coder: Client, issue: str, more: dict[str, Any], kept: dict[str, Any]
) -> None:
    own = {"agent_id": f"key-{SECRET[4:]}", "issue_id": issue}
    answer = coder.post("/api/results", SHORT_RESULT | own | more)
    assert answer.status_code == 201, answer.text
    record = Path(answer.json()["storage_path"]).read_text()
    assert SECRET not in record
    assert (own | kept).items() <= json.loads(record).items()


def test_the_first_success_proposes_tester_and_auditor_as_documented(coder: Client, issue: str) -> None:
    proposed = coder.post("/api/results", SHORT_RESULT | {"issue_id": issue}).json()["next_agents"]
    assert {(agent["agent_type"], agent["priority"]) for agent in proposed} == {
        ("test-engineer", "high"),
        ("security-auditor", "medium"),
    }


# -- events


@pytest.mark.parametrize("body", [FULL_EVENT, SHORT_EVENT, WORKFLOW_EVENT], ids=["schema", "short", "workflow"])
def test_every_documented_event_is_accepted(coder: Client, body: dict[str, Any]) -> None:
    answer = coder.post(f"/api/events/{body['event_type']}", body)
    assert answer.status_code == 202
    published = answer.json()
    same_shape(PUBLISHED, published)
    assert published["published"] is True
    assert published["topic"] == "implementation"
    assert published["ttl_seconds"] == 86400
    assert published["subscriber_count"] == len(published["subscribers_notified"])


@pytest.mark.parametrize(
    "query",
    ["?timeout=30000&filter=issue_id:issue-123", "?timeout=30000&filter=issue_id%3Aissue-123"],
    ids=["curl", "encoded"],
)
def test_a_waiter_gets_the_event_in_the_documented_shape(service: Service, query: str) -> None:
    published = service.client("python-specialist").post("/api/events/agent_completed", FULL_EVENT).json()
    waiter = service.client("test-engineer")
    answer = waiter.get("/api/events/wait/agent_completed" + query)
    assert answer.status_code == 200
    arrived = answer.json()
    same_shape(
        ARRIVED,
        {**arrived, "events": [event for event in arrived["events"] if event["event_id"] == published["event_id"]]},
    )
    event = next(event for event in arrived["events"] if event["event_id"] == published["event_id"])
    assert {name: event[name] for name in FULL_EVENT} == FULL_EVENT
    assert "timeout" not in arrived


def test_an_event_without_correlation_id_has_null_there(coder: Client, issue: str) -> None:
    coder.post("/api/events/agent_completed", SHORT_EVENT | {"data": {"issue_id": issue}})
    arrived = coder.wait("agent_completed", filter=f"issue_id:{issue}")
    same_shape(ARRIVED | {"events": [{**ARRIVED["events"][0], "data": {}}]}, arrived, {"$.events[].correlation_id"})  # type: ignore[dict-item]
    assert arrived["events"][0]["correlation_id"] is None


def test_a_time_out_is_answered_in_the_documented_shape(coder: Client, issue: str) -> None:
    began = time.monotonic()
    answer = coder.get("/api/events/wait/agent_completed", timeout=200, filter=f"issue_id:{issue}")
    assert answer.status_code == 200
    assert time.monotonic() - began >= 0.2
    same_shape(TIMED_OUT, answer.json())
    assert answer.json()["timeout"] is True
    assert answer.json()["events"] == []


# -- agents


def test_a_spawn_is_answered_as_documented(spawner: Service) -> None:
    architect = spawner.client()
    answer = architect.post("/api/agents/spawn", SPAWN)
    assert answer.status_code == 201
    spawned = answer.json()
    same_shape(SPAWNED, spawned)
    assert spawned["spawned"] is True and spawned["context_injected"] is True
    assert spawned["process_id"] > 0
    assert spawned["webhook_url"] == f"/api/agents/{spawned['agent_id']}/status"
    assert architect.get(spawned["webhook_url"]).json()["agent_id"] == spawned["agent_id"]
    claims = jwt.decode(spawned["jwt_token"], options={"verify_signature": False})
    assert claims["sub"] == spawned["agent_id"]
    assert claims["agent_type"] == "python-specialist"
    assert claims["project_id"] == PROJECT
    assert sorted(claims["permissions"]) == sorted(ALL[:3])
    assert claims["exp"] - claims["iat"] == 3600
    assert spawned["environment_ignored"] == ["PROJECT_ROOT"]


# -- health and status


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/html"])
def test_health_has_every_documented_field(service: Service, accept: str) -> None:
    answer = Client(service.url, None).request("GET", "/health", headers={"Accept": accept})
    assert answer.status_code == 200
    same_shape(HEALTH, answer.json())
    assert answer.json()["status"] == "healthy"
    assert answer.json()["service"] == "orchestration-sidecar"


def test_status_has_every_documented_field(spawner: Service) -> None:
    architect = spawner.client()
    agent = architect.post("/api/agents/spawn", SPAWN).json()["agent_id"]
    assert architect.wait("agent_exited", filter=f"agent_id:{agent}")["events"]
    answer = architect.get("/status")
    assert answer.status_code == 200
    status = answer.json()
    counts = status["agents"].pop("by_type")
    same_shape(
        STATUS | {"agents": {name: value for name, value in STATUS["agents"].items() if name != "by_type"}}, status
    )  # type: ignore[attr-defined]
    assert all(json_type(count) == "number" for count in counts.values())
    assert status["storage"]["storage_path"] == str(spawner.storage)
    assert status["agents"]["spawned_total"] >= status["agents"]["completed"] >= 1


# -- errors


def test_an_error_has_every_documented_field(service: Service) -> None:
    now = int(time.time())
    answer = service.client("python-specialist", iat=now - 7200, exp=now - 3600).get("/status")
    assert answer.status_code == 401
    same_shape(ERROR, answer.json())
    assert answer.json()["error"] == "unauthorized"
    assert answer.json()["details"]["token_expired"] is True


READER, WRITER = {"permissions": ["read_context"]}, {"permissions": ["write_results"]}


@pytest.mark.parametrize(
    ("send", "status"),
    [
        (lambda s: Client(s.url, "eyJhbGci...").get("/api/context/issue-123/python-specialist"), 401),
        (lambda s: s.client("python-specialist", **WRITER).get("/api/context/issue-123/python-specialist"), 403),
        (lambda s: s.client("python-specialist").get("/api/context/issue-123/no-such-type"), 404),
        (lambda s: s.client("python-specialist").post("/api/results", {"result": {}}), 400),
        (lambda s: Client(s.url, None).post("/api/results", SHORT_RESULT), 401),
        (lambda s: s.client("documentation-expert").post("/api/results", SHORT_RESULT), 403),
        (lambda s: s.client("python-specialist").post("/api/events/agent_completed", {"topic": "implementation"}), 400),
        (lambda s: Client(s.url, None).post("/api/events/agent_completed", SHORT_EVENT), 401),
        (lambda s: s.client("documentation-expert").post("/api/events/agent_completed", SHORT_EVENT), 403),
        (
            lambda s: s.client("python-specialist").get(
                "/api/events/wait/agent_completed", filter="issue_id==issue-123"
            ),
            400,
        ),
        (lambda s: Client(s.url, None).get("/api/events/wait/agent_completed"), 401),
        (
            lambda s: s.client("chief-architect").post("/api/agents/spawn", {"task": "Implement user authentication"}),
            400,
        ),
        (lambda s: Client(s.url, None).post("/api/agents/spawn", SPAWN), 401),
        (lambda s: s.client("python-specialist").post("/api/agents/spawn", SPAWN), 403),
        (lambda s: Client(s.url, None).delete("/api/cache/context/issue-123"), 401),
        (lambda s: s.client("python-specialist").delete("/api/cache/context/issue-without-context"), 404),
        (lambda s: Client(s.url, None).get("/status"), 401),
    ],
)
def test_every_documented_refusal_has_its_status(
    service: Service, send: Callable[[Service], requests.Response], status: int
) -> None:
    answer = send(service)
    assert answer.status_code == status
    same_shape({name: value for name, value in ERROR.items() if name != "details"}, answer.json())


# -- the examples as a whole


@pytest.mark.any_storage
def test_the_complete_agent_workflow_runs(service: Service, issue: str) -> None:
    agent, listener = service.client("python-specialist", permissions=ALL[:3]), service.client("test-engineer")
    context = agent.get(f"/api/context/{issue}/python-specialist").json()
    assert context["context"]["relevant_files"]

    heard: list[Any] = []
    subscription = {"timeout": 60000, "filter": f"issue_id:{issue}"}
    background = threading.Thread(
        target=lambda: heard.append(listener.wait("implementation_complete", **subscription)), daemon=True
    )
    background.start()

    result = agent.post("/api/results", WORKFLOW_RESULT | {"issue_id": issue})
    assert result.status_code == 201
    assert [proposal["agent_type"] for proposal in result.json()["next_agents"]] == [
        "test-engineer",
        "security-auditor",
    ]

    event = agent.post(
        "/api/events/implementation_complete",
        WORKFLOW_EVENT | {"data": {"issue_id": issue, "status": "success", "files_changed": 2}},
    )
    assert event.status_code == 202
    background.join(60)
    assert heard, "the subscription in the background was not answered"
    assert [item["event_id"] for item in heard[0]["events"]] == [event.json()["event_id"]]


def test_the_rust_agent_runs(service: Service, issue: str) -> None:
    agent = service.client("rust-specialist", permissions=ALL[:3])
    agent.session.headers["User-Agent"] = ""  # reqwest sends none
    same_shape(CONTEXT["agent_type"], agent.get(f"/api/context/{issue}/rust-specialist").json()["agent_type"])
    stored = agent.post("/api/results", RUST_RESULT | {"issue_id": issue})
    assert stored.status_code == 201
    same_shape(STORED, stored.json())
    event = agent.post("/api/events/agent_completed", SHORT_EVENT)
    assert event.status_code == 202
    assert (
        agent.wait("agent_completed", timeout="30000", filter=f"issue_id:{issue}")["events"][0]["data"]["result_id"]
        == stored.json()["id"]
    )


@pytest.mark.parametrize("place", [PROJECT, f"{PROJECT}/issue-1", ".new"])
def test_no_result_is_written_where_a_link_leads(
    make_service: Callable[..., Service], tmp_path: Path, place: str
) -> None:
    service, elsewhere = make_service(), tmp_path / "elsewhere"
    service.client().store()
    elsewhere.mkdir()
    folder = service.storage / "results" / place
    shutil.rmtree(folder)
    folder.symlink_to(elsewhere)
    body = {"agent_id": "a", "agent_type": "qa-engineer", "issue_id": "issue-1", "project_id": PROJECT}
    refused = service.client().post("/api/results", body | {"result": {"status": "success"}})
    assert (refused.status_code, refused.json()["code"]) == (500, "STR_001")
    assert list(elsewhere.iterdir()) == []
    folder.unlink()
    service.client().store(issue="issue-1")
    assert (service.storage / f"results/{PROJECT}/issue-1/python-specialist.json").is_file()


@pytest.mark.needs_plugin("storage/guard puts in place what a crash left")
@pytest.mark.parametrize("place", [PROJECT, f"{PROJECT}/issue-1", ".new", ".new/{id}"])
def test_a_start_after_a_crash_writes_and_removes_nothing_where_a_link_leads(
    make_service: Callable[..., Service], tmp_path: Path, place: str
) -> None:
    service, elsewhere = make_service(), tmp_path / "elsewhere"
    stored, results = service.client().store(issue="issue-1"), service.storage / "results"
    assert service.stop() == 0
    linked = results / place.format(id=stored["id"])
    if place.endswith("{id}"):
        elsewhere.write_text("not ours")
    else:
        shutil.rmtree(linked)
        elsewhere.mkdir()
        (elsewhere / "file").write_text("not ours")
        (results / ".new" / stored["id"]).touch() if place != ".new" else (elsewhere / stored["id"]).touch()
    before = sorted(elsewhere.rglob("*"))
    linked.symlink_to(elsewhere)
    service.start()
    assert sorted(elsewhere.rglob("*")) == before
    assert (elsewhere if elsewhere.is_file() else elsewhere / "file").read_text() == "not ours"
    assert service.stop() == 0
    linked.unlink()
    (results / ".new").mkdir(exist_ok=True)
    (results / ".new" / stored["id"]).touch()  # the next start places it
    service.start()
    assert json.loads((results / PROJECT / "issue-1/python-specialist.json").read_text())["id"] == stored["id"]


@pytest.mark.needs_plugin("storage/guard tries to write a result's file")
@pytest.mark.parametrize("make", [
    lambda path: path.symlink_to(path.parents[3] / "theirs"), os.mkfifo, lambda path: path.symlink_to(path.parent),
])  # fmt: skip
def test_what_lies_where_health_tries_a_result_is_neither_written_to_nor_waited_for(
    make_service: Callable[..., Service], tmp_path: Path, make: Callable[[Path], Any]
) -> None:
    service = make_service()
    probe = service.storage / "results/.new/.probe"
    (tmp_path / "theirs").write_text("not ours")
    client = service.client()
    assert client.get("/health").status_code == 200
    make(probe)
    until(lambda: client.get("/health").status_code and not os.path.lexists(probe))  # it is looked at once a second
    assert (tmp_path / "theirs").read_text() == "not ours"
    until(lambda: client.get("/health").status_code == 200)
    client.store()

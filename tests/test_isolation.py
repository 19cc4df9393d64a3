"""Two projects never see each other: not with each other's tokens, not in one storage after another, and not through
shared names. Nor do tokens for two issues of one project.
"""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from conftest import PROJECT, Client, Service, body_of, every_route, until

MARK = "only-for-the-first-project"
PUBLIC = {"/health", "/openapi.json"}
EVENT = {"publisher": "tester", "topic": "test", "data": {"issue_id": "issue-1", "note": MARK}}
RESULT = body_of(decisions=[MARK])
SPAWN = {"agent_type": "python-specialist", "issue_id": "issue-1", "task": MARK}
QUESTION = {"kind": "question", "text": MARK, "issue_id": "issue-1"}
READING = {"name": "results", "arguments": {"issue_id": "issue-1"}}  # by a tool
BODIES = {
    "/api/approvals": QUESTION,
    "/api/approvals/{approval_id}/answer": {"answer": "yes"},
    "/api/hooks/{program}": {"hook_event_name": "SessionStart", "session_id": "s-1"},
    "/api/hooks/{program}/wait": {"hook_event_name": "Stop", "session_id": "s-1"},
    "/mcp": {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": READING},
    "/api/results": RESULT,
    "/api/events/{event_type}": EVENT,
    "/api/agents/spawn": SPAWN,
    "/api/auth/refresh": None,
    "/api/dashboard/token": {"code": "none"},
    "/api/runs": {"issue_id": "issue-1", "task": MARK},
}
RUN = {
    "run_id": "run-1",
    "issue_id": "issue-1",
    "state": "failed",
    "started_at": "2026-01-01T00:00:00Z",
    "lines": [MARK],
}


class Inhabited:
    """A service of a first project that has everything, and what its things are called."""

    def __init__(self, make_service: Callable[..., Service]) -> None:
        self.service = make_service("--no-synthesis", "--agent-command", f"echo {MARK}")
        architect = self.service.client()
        runs = self.service.storage / "runs" / PROJECT  # where the first request finds those of earlier times
        runs.mkdir(parents=True)
        (runs / "run-1.json").write_text(json.dumps(RUN))
        assert MARK in architect.get("/api/runs/run-1").text
        result = architect.post("/api/results", RESULT, headers={"Idempotency-Key": "key-1"})
        event = architect.post("/api/events/ping", EVENT, headers={"Idempotency-Key": "key-1"})
        agent = architect.post("/api/agents/spawn", SPAWN, headers={"Idempotency-Key": "key-1"}).json()["agent_id"]
        until(lambda: architect.get(f"/api/agents/{agent}/status").json()["ended_at"])
        assert MARK in architect.get("/api/context/issue-1/python-specialist").text
        assert architect.post("/api/events/dying", EVENT | {"ttl_seconds": 1}).status_code == 202
        until(lambda: architect.get("/api/events", dead="true").json()["events"])
        self.names = {
            "issue_id": "issue-1", "agent_type": "python-specialist", "result_id": result.json()["id"],
            "event_type": "ping", "agent_id": agent, "program": "claude", "run_id": "run-1",
            "approval_id": architect.post("/api/approvals", QUESTION).json()["approval_id"],
        }  # fmt: skip
        self.cursor = event.json()["event_id"]

    def walk(self, client: Client, routes: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
        """The answer of every route, with the names of this project's things."""
        answers = {}
        for method, path in routes:
            place = path.format(**self.names) + ("?timeout=0" if "/wait" in path else "")
            answers[method, path] = client.request(method, place, json=BODIES.get(path) if method == "POST" else None)
        return answers


@pytest.fixture
def inhabited(make_service: Callable[..., Service]) -> Inhabited:
    return Inhabited(make_service)


def routes_of(service: Service) -> list[tuple[str, str]]:
    """Every route that the service itself describes; those that take something away come last."""
    paths = Client(service.url, None).get("/openapi.json").json()["paths"]
    found = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    assert set(found) >= {(row.method, row.path) for row in every_route()}
    return sorted(found, key=lambda route: route[0] == "DELETE")


def test_a_token_of_another_project_opens_nothing(inhabited: Inhabited) -> None:
    service = inhabited.service
    before = service.client().get("/status").json()["events"]["total_published"]
    for agent_type in ("chief-architect", "python-specialist"):
        answers = inhabited.walk(service.client(agent_type, project_id="project-xyz"), routes_of(service))
        for (method, path), answer in answers.items():
            if path in PUBLIC:
                assert answer.status_code == 200
            elif path == "/api/dashboard/token":  # which looks at no token but at its code
                assert answer.status_code == 401
            else:
                assert (answer.status_code, answer.json()["code"]) == (403, "AUTH_003"), (method, path)
            assert MARK not in answer.text
    assert service.client().get("/status").json()["events"]["total_published"] == before
    assert service.client().get(f"/api/results/{inhabited.names['result_id']}").status_code == 200


OF_NO_ISSUE = {  # or of the token's own
    "/health", "/openapi.json", "/status", "/api/auth/refresh", "/api/hooks/{program}", "/api/hooks/{program}/wait",
    "/api/dashboard",
}  # fmt: skip
LISTS = {
    "/api/runs",
    "/api/issues",
    "/api/approvals",
    "/api/results",
    "/api/agents",
    "/api/events",
    "/api/events/wait/{event_type}",
}  # of which it gets its part


@pytest.mark.parametrize("agent_type", ["chief-architect", "test-engineer", "technical-researcher"])
def test_a_token_for_another_issue_sees_and_touches_nothing(inhabited: Inhabited, agent_type: str) -> None:
    service, names = inhabited.service, inhabited.names

    def client(issue_id: str) -> Client:
        return service.client(agent_type, issue_id=issue_id)  # a new subject, which no limit of rate stops

    def cached() -> int:
        return int(service.client().get("/status").json()["storage"]["context_cache_entries"])

    before = cached()
    for route in routes_of(service):
        if route[1].startswith(("/api/plugins", "/api/agent-types", "/v1/", "/api/dashboard/")):
            continue  # of no issue: for architects alone, running agents (test_meter), people (test_dashboard_service)
        (answer,) = inhabited.walk(client("issue-2"), [route]).values()
        reads = route[1] in OF_NO_ISSUE or (route[0] == "GET" and route[1] in LISTS)
        if route == ("GET", "/mcp"):
            assert answer.status_code == 405, "nothing is given but where a call was cut off"
        elif route[1] == "/mcp":
            assert (answer.status_code, "AUTH_003" in answer.text) == (200, True), answer.text
        else:
            assert answer.status_code == (200 if reads else 403), (route, answer.text)
        assert MARK not in answer.text and names["result_id"] not in answer.text, route
    for path in (
        "/api/results",
        "/api/agents",
        "/api/events",
        "/api/events?topic=test",
        "/api/events?type=agent_exited",
    ):
        for query in ({}, {"since": "earliest"}, {"limit": 1}):
            assert MARK not in client("issue-2").get(path, **query).text, (path, query)
    dead = client("issue-2").get("/api/events", dead="true")
    assert dead.status_code == (200 if agent_type == "chief-architect" else 403) and MARK not in dead.text
    for event_type in ("*", "ping", "agent_completed", "agent_exited"):
        for query in ({}, {"since": "earliest"}, {"filter": "issue_id:issue-1"}):
            assert client("issue-2").wait(event_type, timeout=0, **query)["events"] == []
    assert cached() == before + 1 > 1, "its own brief, and none is cleared"
    (agent,) = client("issue-1").get("/api/agents").json()["agents"]
    assert agent["agent_id"] == names["agent_id"] and MARK in agent["task"]
    assert MARK in client("issue-1").get(f"/api/agents/{names['agent_id']}/logs").text
    assert [row["id"] for row in client("issue-1").get("/api/results").json()["results"]] == [names["result_id"]]


def test_no_tool_tells_or_takes_anything_of_another_issue(inhabited: Inhabited) -> None:
    service, names = inhabited.service, inhabited.names
    own = {"issue_id": "issue-1"}
    refused = {  # each tool, with what names the first issue
        "brief": [own],
        "context": [own, own | {"section": "previous_agent_outputs"}, own | {"file": "src/main.py"}],
        "results": [own, {"result_id": names["result_id"]}],
        "store_result": [own | {"status": "success"}],
        "publish_event": [{"event_type": "ping", "data": own}],
        "agents": [own, {"agent_id": names["agent_id"]}],
        "spawn_agent": [own | {"agent_type": "python-specialist"}],
        "ask_human": [own | {"text": "May I?"}, {"approval_id": names["approval_id"]}],
    }
    empty: dict[str, list[dict[str, Any]]] = {
        "results": [{}, {"since": "earliest"}],
        "agents": [{}, {"since": "earliest"}],
        "wait_for_events": [
            {"since": "earliest", "timeout_seconds": 0},
            {"filter": "issue_id:issue-1", "timeout_seconds": 0},
        ],
    }

    def asked(method: str, **params: Any) -> Any:
        client = service.client(issue_id="issue-2", bound=True)  # a new one, which no limit of rate stops
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return client.post("/mcp", body).json()

    assert {tool["name"] for tool in asked("tools/list")["result"]["tools"]} == refused.keys() | empty.keys()
    for table in (refused, empty):
        for name, rows in table.items():
            for arguments in rows:
                result = asked("tools/call", name=name, arguments=arguments)["result"]
                text = result["content"][0]["text"]
                assert ("AUTH_003" in text) == result["isError"] == (table is refused), (name, arguments, text)
                assert MARK not in text and names["result_id"] not in text, (name, arguments)
    told = asked("resources/read", uri="cco://brief/issue-1")
    assert "error" in told and MARK not in json.dumps(told)
    assert [row["id"] for row in service.client().get("/api/results").json()["results"]] == [names["result_id"]]


def test_another_project_in_the_same_storage_finds_nothing_of_the_first(inhabited: Inhabited) -> None:
    """The same storage, secret, subject, issue and ids: only the project differs."""
    service = inhabited.service
    service.stop()
    service.arguments = ("--agent-command", "true", "--project", "project-two")
    service.start()
    client = service.client(project_id="project-two", sub="chief-architect-1")
    gone = {
        "/api/runs/{run_id}",
        "/api/agents/{agent_id}/brief",
        "/api/results/{result_id}/diff",
        "/api/issues/{issue_id}",
        "/api/issues/{issue_id}/timeline",
        "/api/issues/{issue_id}/export",
        "/api/approvals/{approval_id}",
        "/api/results/{result_id}",
        "/api/agents/{agent_id}",
        "/api/agents/{agent_id}/status",
        "/api/agents/{agent_id}/logs",
    }
    reading = [route for route in routes_of(service) if route[0] != "POST" and route[1] != "/mcp"]
    for (method, path), answer in inhabited.walk(client, reading).items():
        assert answer.status_code == (404 if path in gone else 200), (method, path, answer.text)
        assert MARK not in answer.text, (method, path)
    for path, name in (("/api/results", "results"), ("/api/events", "events"), ("/api/agents", "agents")):
        assert client.get(path).json()[name] == []
    assert client.get("/api/events", dead="true").json()["events"] == []
    for since in ("earliest", inhabited.cursor):
        answer = client.get("/api/events/wait/*", since=since, timeout=0)
        assert MARK not in answer.text
    status = client.get("/status").json()
    assert status["storage"]["results_stored"] == 0 and status["agents"]["completed"] == 0
    # the same keys of idempotency mean other requests
    stored = client.post("/api/results", RESULT | {"project_id": "project-two"}, headers={"Idempotency-Key": "key-1"})
    assert stored.status_code == 201 and "Idempotent-Replay" not in stored.headers
    places = sorted(
        path.relative_to(service.storage).as_posix() for path in (service.storage / "results").rglob("*.json")
    )
    assert places == [f"results/{project}/issue-1/python-specialist.json" for project in (PROJECT, "project-two")]
    assert Client(service.url, service.token()).get("/status").status_code == 403, (
        "nor the first project's tokens in the second"
    )


def test_every_table_of_things_says_whose_they_are(inhabited: Inhabited) -> None:
    with closing(sqlite3.connect(inhabited.service.storage / "sidecar.db")) as database:
        tables = [
            name
            for (name,) in database.execute(
                "select name from sqlite_master where type = 'table' and name not like 'sqlite_%'"
            )
        ]
        columns = {table: [row[1] for row in database.execute(f"pragma table_info({table})")] for table in tables}
        held = {table: database.execute(f"select * from {table}").fetchall() for table in tables}
    told = {table for table in tables if any(MARK in json.dumps(row, default=repr) for row in held[table])}
    assert told >= {"event", "result", "agent"}
    assert {table for table in told if "project" not in columns[table]} == set(), columns


NAMING_ANOTHER = [  # what an event says of issues; the last one is 1,000 of them
    {"data": {"issue_id": ["issue-1"] * 999 + ["issue-2"]}},
    {"data": {"issue_id": [["issue-1"] * 500, ["issue-1"] * 499 + ["issue-2"]]}},
    {"issue_id": ["issue-1"] * 999, "data": {"issue_id": "issue-2"}},
]
NAMING_TOO_MANY = [
    {"data": {"issue_id": ["issue-1"] * 1000 + ["issue-2"]}},
    {"data": {"issue_id": [["issue-1"] * 500, ["issue-1"] * 501]}},
    {"issue_id": ["issue-1"] * 1000, "data": {"issue_id": "issue-2"}},
]


@pytest.mark.parametrize("bound", ["issue-1", None])
def test_a_long_list_of_issues_hides_none(inhabited: Inhabited, bound: str | None) -> None:
    service = inhabited.service

    def answers(event: dict[str, Any], issue_id: str | None) -> tuple[int, str | None]:
        body = {"publisher": "p", "topic": "t", "data": {}} | event
        answer = service.client(issue_id=issue_id).post("/api/events/long", body)
        return answer.status_code, answer.json().get("code")

    for event in NAMING_TOO_MANY:
        assert answers(event, bound) == (400, "EVT_002")
    for event in NAMING_ANOTHER:
        assert answers(event, bound) == ((403, "AUTH_003") if bound else (202, None))
        assert answers(json.loads(json.dumps(event).replace("issue-2", "issue-1")), bound) == (202, None)
    newest = service.client(issue_id="issue-2").get("/api/events", type="long").json()["events"]
    assert len(newest) == (0 if bound else len(NAMING_ANOTHER)), "of a thousand elements the last one counts"

"""What agents spend, as their programs report it, and budgets, over HTTP with real processes."""

from __future__ import annotations

import contextlib
import gzip
import json
import shlex
import sqlite3
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from agent_harness import SAMPLE, nothing_left, request, spawn, state, status
from conftest import PROJECT, Client, Service, plugin, serving, until

__all__ = ["nothing_left"]

FIGURES = ("model", "requests", "input_tokens", "output_tokens", "cached_tokens", "cost_usd", "denials")
NOTHING = dict.fromkeys(FIGURES)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the sample agent bears the names of known programs."""
    folder = tmp_path_factory.mktemp("programs")
    for name in ("claude", "codex", "gemini", "qwen"):
        (folder / name).write_text(f'#!/bin/sh\nARGUMENTS="$*" exec {shlex.join(SAMPLE)}\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def service(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with serving(tmp_path_factory.mktemp("shared"), "--agent-command", f"{programs}/claude -p {{prompt}}") as running:
        yield running


def value(given: Any) -> dict[str, Any]:
    kind = {str: "stringValue", bool: "boolValue", int: "intValue", float: "doubleValue", list: "arrayValue"}[
        type(given)
    ]
    return {kind: {"values": [value(item) for item in given]} if isinstance(given, list) else given}


def attributes(named: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": value(given)} for key, given in named.items()]


NUMBERS = iter(range(1, 1_000_000))


def record(event: str, *, time: int | None = None, **its: Any) -> dict[str, Any]:
    """A record as Claude Code writes it."""
    named = {"event.name": event.partition(".")[2], **{key.replace("__", "."): given for key, given in its.items()}}
    moment = str(1795678648673000000 + (next(NUMBERS) if time is None else time))
    return {"timeUnixNano": moment, "body": {"stringValue": event}, "attributes": attributes(named)}


def ask(cost: float = 0.01, time: int | None = None, **more: Any) -> dict[str, Any]:
    facts = {
        "model": "opus",
        "input_tokens": 1000,
        "output_tokens": 50,
        "cache_read_tokens": 300,
        "cache_creation_tokens": 200,
    }
    return record("claude_code.api_request", time=time, **(facts | {"cost_usd": cost} | more))


def report(*records: Any, **resource: str) -> dict[str, Any]:
    named = {key.replace("__", "."): given for key, given in resource.items()}
    return {
        "resourceLogs": [{"resource": {"attributes": attributes(named)}, "scopeLogs": [{"logRecords": list(records)}]}]
    }


def environment_of(agent: dict[str, Any]) -> dict[str, str]:
    """The environment of an agent's program, which its shell sets."""
    process = psutil.Process(agent["process_id"])
    return until(lambda: "ARGUMENTS" in (found := process.environ()) and found)  # type: ignore[no-any-return]


def reporter(agent: dict[str, Any]) -> Client:
    """A client with the token that the agent's program was given for its reports."""
    environment = environment_of(agent)
    url, _, path = environment["OTEL_EXPORTER_OTLP_LOGS_ENDPOINT"].partition("/v1")
    assert path == "/logs"
    return Client(url, environment["OTEL_EXPORTER_OTLP_HEADERS"].removeprefix("Authorization=Bearer "))


def tell(client: Client, *records: Any, **resource: str) -> Any:
    answer = client.post("/v1/logs", report(*records, **resource))
    assert answer.status_code == 200, answer.text
    return answer.json()


def spent(client: Client, agent_id: str) -> dict[str, Any]:
    return {name: status(client, agent_id)[name] for name in FIGURES}


# -- the figures


@pytest.mark.parametrize(
    ("records", "wanted"),
    [
        ([ask(), ask()], ("opus", 2, 3000, 100, 600, 0.02, None)),
        ([ask(model="opus"), ask(model="haiku"), ask(model="opus")], ("opus", 3, 4500, 150, 900, 0.03, None)),
        ([record("claude_code.api_request", model="m", input_tokens="7", output_tokens=3)], ("m", 1, 7, 3, 0, None, None)),
        ([record("claude_code.user_prompt", prompt_length=5)], (None,) * 7),
        ([record("codex.sse_event", event__name="codex.sse_event", event__kind="response.created", model="gpt")], (None,) * 7),
        ([record("", event__name="codex.sse_event", input_token_count="1000", output_token_count="50",
                 cached_token_count="300", reasoning_token_count="7", model="gpt"),
          record("", event__name="codex.tool_decision", decision="approved"),
          record("", event__name="codex.tool_decision", decision="denied")], ("gpt", 1, 1000, 50, 300, None, 1)),
        ([record("API response from m. Status code: 200.", event__name="gemini_cli.api_response", model="m", input_token_count=1000,
                 output_token_count=50, cached_content_token_count=300, thoughts_token_count=7),
          record("", event__name="gemini_cli.tool_call", success=False, error_type="policy_violation"),
          record("", event__name="gemini_cli.tool_call", success=False, error_type="invalid_tool_params"),
          record("", event__name="gemini_cli.tool_call", success=True, decision="accept")], ("m", 1, 1000, 57, 300, None, 1)),
        ([record("", event__name="qwen-code.api_response", model="q", input_token_count=1000, output_token_count=50,
                 cached_content_token_count=300, thoughts_token_count=7),
          record("", event__name="qwen-code.tool_call", success=False, error_type="execution_denied")], ("q", 1, 1000, 50, 300, None, 1)),
    ],
    ids=["claude", "claude, two models", "claude, texts and gaps", "claude, another event", "codex, another event", "codex", "gemini", "qwen"],
)  # fmt: skip
def test_figures_are_those_that_the_program_reports_and_null_where_it_reports_none(
    service: Service, architect: Client, issue: str, records: list[Any], wanted: tuple[Any, ...]
) -> None:
    agent = spawn(architect, "hang", issue)
    assert spent(architect, agent["agent_id"]) == NOTHING
    assert tell(reporter(agent), *records) == {}
    assert spent(architect, agent["agent_id"]) == dict(zip(FIGURES, wanted, strict=True))


@pytest.mark.parametrize(
    ("version", "decisions", "denials"),
    [("2.1.332", ["accept", "reject", "reject"], 2), ("2.1.400", ["accept"], 0), ("3.0.0", ["accept", "accept"], 0),
     ("2.1.197", ["accept"], None), ("2.1.197", ["accept", "reject"], 1), ("", ["accept"], None)],
)  # fmt: skip
def test_denials_are_null_where_the_programs_version_tells_of_few(
    architect: Client, issue: str, version: str, decisions: list[str], denials: int | None
) -> None:
    agent = spawn(architect, "hang", issue)
    records = [record("claude_code.tool_decision", decision=decision, tool_name="Bash") for decision in decisions]
    tell(reporter(agent), *records, service__version=version)
    assert spent(architect, agent["agent_id"]) == NOTHING | (
        {"denials": denials, "requests": 0} if denials is not None else {}
    )


def test_figures_are_in_the_status_the_list_the_event_of_the_end_and_the_sums(
    service: Service, architect: Client, issue: str
) -> None:
    agents = [spawn(architect, "hang", issue) for _ in range(2)]
    for agent in agents:
        tell(reporter(agent), ask(0.25), record("claude_code.tool_decision", decision="reject"))
    wanted = dict(zip(FIGURES, ("opus", 1, 1500, 50, 300, 0.25, 1), strict=True))
    for agent in architect.get("/api/agents", issue_id=issue).json()["agents"]:
        assert agent | wanted == agent
    sums = {
        "requests": 2,
        "input_tokens": 3000,
        "output_tokens": 100,
        "cached_tokens": 600,
        "cost_usd": 0.5,
        "denials": 2,
    }
    told = architect.get("/status").json()["spent"]
    assert told["by_issue"][issue] == sums
    (day,) = told["by_day"].values()
    assert day["requests"] >= 2 and day["cost_usd"] >= 0.5
    for agent in agents:
        architect.delete(f"/api/agents/{agent['agent_id']}")
    events = until(lambda: [row for row in architect.get("/api/events", type="agent_exited", limit=1000).json()["events"]
                            if row["data"]["issue_id"] == issue][1:])  # fmt: skip
    assert all(row["data"] | wanted == row["data"] for row in events)
    assert spent(architect, agents[0]["agent_id"]) == wanted


def test_an_agent_that_reports_at_its_last_moment_is_counted(architect: Client, issue: str) -> None:
    agent = spawn(architect, "spend", issue, environment={"REPORT": json.dumps(report(ask(0.5)))})
    assert state(architect, agent["agent_id"])["cost_usd"] == 0.5


# -- reports that are odd


def test_a_record_that_comes_twice_counts_once_and_the_order_is_all_the_same(architect: Client, issue: str) -> None:
    agent = spawn(architect, "hang", issue)
    client, first, second, third = reporter(agent), ask(0.01, 100_001), ask(0.02, 100_002), ask(0.04, 100_003)
    tell(client, third)
    tell(client, first, third)
    tell(client, first, second, first)
    tell(client, {name: third[name] for name in reversed(third)})
    assert spent(architect, agent["agent_id"])["cost_usd"] == 0.07
    timeless = {name: given for name, given in first.items() if name != "timeUnixNano"}
    tell(client, timeless, timeless)  # nobody can tell these from two requests
    assert spent(architect, agent["agent_id"])["cost_usd"] == 0.09


@pytest.mark.parametrize(
    "figures",
    [{"cost_usd": -1.0}, {"cost_usd": "much"}, {"input_tokens": -5}, {"input_tokens": 1.5}, {"output_tokens": 10**15},
     {"output_tokens": "NaN"}, {"cost_usd": "1e400"}, {"cache_read_tokens": [1]}, {"input_tokens": "9" * 500}],
    ids=str,
)  # fmt: skip
def test_figures_that_are_none_are_refused_and_the_others_of_the_report_counted(
    architect: Client, issue: str, figures: dict[str, Any]
) -> None:
    agent = spawn(architect, "hang", issue)
    answer = tell(reporter(agent), ask(0.01), ask(**{"cost": 0.01} | figures), ask(0.01))
    assert answer["partialSuccess"]["rejectedLogRecords"] == 1 and answer["partialSuccess"]["errorMessage"]
    assert spent(architect, agent["agent_id"])["cost_usd"] == 0.02


JSON = "application/json"


@pytest.mark.parametrize(
    ("content", "headers", "expected", "code"),
    [
        (b"\x0a\x03abc", {"Content-Type": "application/x-protobuf"}, 415, "REQ_005"),
        (b"", {"Content-Type": "application/grpc"}, 415, "REQ_005"),
        (gzip.compress(json.dumps(report(ask())).encode()), {"Content-Type": JSON, "Content-Encoding": "gzip"}, 415, "REQ_005"),
        (b"", {"Content-Type": JSON}, 400, "REQ_001"),
        (b"{", {"Content-Type": JSON}, 400, "REQ_001"),
        (b"[]", {"Content-Type": JSON}, 400, "REQ_001"),
        (b'{"resourceLogs": 5}', {"Content-Type": JSON}, 400, "REQ_001"),
        (b'{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"attributes": [{"value": {}}]}]}]}]}', {"Content-Type": JSON}, 400, "REQ_001"),
        (b'{"resourceLogs": ' + b"[" * 100_000, {"Content-Type": JSON}, 400, "REQ_001"),
        (b" " * (8 * 1024 * 1024 + 1), {"Content-Type": JSON}, 413, "REQ_004"),
    ],
    ids=["protobuf", "grpc", "gzip", "nothing", "half", "list", "number", "nameless", "deep", "huge"],
)  # fmt: skip
def test_a_report_that_cannot_be_read_is_refused_with_what_is_wrong(
    architect: Client, issue: str, content: bytes, headers: dict[str, str], expected: int, code: str
) -> None:
    agent = spawn(architect, "hang", issue)
    answer = reporter(agent).request("POST", "/v1/logs", data=content, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (expected, code), answer.text
    if expected == 415:
        assert "must be application/json, not" in answer.json()["message"]
    assert spent(architect, agent["agent_id"]) == NOTHING


@pytest.mark.parametrize(
    "body",
    [{}, {"resourceLogs": []}, {"resourceLogs": [{}]}, {"resourceLogs": [{"scopeLogs": [{}]}], "more": 1},
     report({}), report({"body": {"stringValue": None}, "attributes": [{"key": "event.name", "value": {"arrayValue": {}}}]}),
     report({"attributes": [{"key": "model"}], "body": 5})],
    ids=str,
)  # fmt: skip
def test_a_report_that_holds_nothing_is_fine(architect: Client, issue: str, body: dict[str, Any]) -> None:
    agent = spawn(architect, "hang", issue)
    answer = reporter(agent).post("/v1/logs", body)
    assert (answer.status_code, answer.json()) == (200, {}), answer.text
    assert spent(architect, agent["agent_id"]) == NOTHING


def test_metrics_and_traces_are_taken_and_passed_over(architect: Client, issue: str) -> None:
    client = reporter(spawn(architect, "hang", issue))
    for path, body in (("/v1/metrics", {"resourceMetrics": [{}]}), ("/v1/traces", {"resourceSpans": []})):
        assert (client.post(path, body).status_code, client.post(path, body).json()) == (200, {})


# -- the token


def test_the_token_of_reports_can_do_nothing_else_and_ends_with_its_agent(architect: Client, issue: str) -> None:
    agent = spawn(architect, "hang", issue)
    client = reporter(agent)
    assert (
        client.get("/api/results").status_code
        == client.get(f"/api/agents/{agent['agent_id']}/status").status_code
        == 403
    )
    body = {"agent_id": agent["agent_id"], "agent_type": "python-specialist", "issue_id": issue, "project_id": PROJECT}
    assert client.post("/api/results", body | {"result": {"status": "success"}}).status_code == 403
    assert client.post("/api/events/x", {"publisher": agent["agent_id"], "topic": "x", "data": {}}).status_code == 403
    assert client.post("/api/agents/spawn", request(issue=issue)).status_code == 403
    assert tell(client, ask()) == {}
    architect.delete(f"/api/agents/{agent['agent_id']}")
    state(architect, agent["agent_id"])
    assert client.post("/v1/logs", report(ask())).status_code == 401


def test_only_a_running_agents_own_token_reports(service: Service, architect: Client, issue: str) -> None:
    agent = spawn(architect, "hang", issue)
    assert Client(service.url, agent["jwt_token"]).post("/v1/logs", report(ask(0.5))).status_code == 200
    who = {"sub": agent["agent_id"], "bound": False}
    for client in (architect, service.client("python-specialist", **who), service.client("documentation-expert")):
        answer = client.post("/v1/logs", report(ask(100.0)))
        assert (answer.status_code, answer.json()["code"]) == (403, "AUTH_003")
    assert Client(service.url, None).post("/v1/logs", report(ask())).status_code == 401
    assert spent(architect, agent["agent_id"])["cost_usd"] == 0.5


def test_reports_outlive_the_renewal_of_tokens_and_take_nothing_of_the_agents_own_rate(
    make_service: Callable[..., Service], programs: Path
) -> None:
    service = make_service("--token-ttl", "4", "--agent-command", f"{programs}/claude")
    architect = service.client()
    agent = spawn(architect, "hang", agent_type="documentation-expert")
    client, own = reporter(agent), Client(service.url, agent["jwt_token"])
    until(lambda: own.get("/api/agents").json().get("code") == "AUTH_002")
    for number in range(60):
        tell(client, ask(0.01, 200_000 + number))
    told = status(architect, agent["agent_id"])
    assert (told["requests"], told["last_call"]["path"]) == (60, "/api/agents")
    architect.delete(f"/api/agents/{agent['agent_id']}")
    state(architect, agent["agent_id"])


@pytest.mark.parametrize("name", ["claude", "codex", "gemini", "qwen"])
def test_programs_are_told_where_to_report_and_no_argument_holds_a_token(
    make_service: Callable[..., Service], programs: Path, name: str
) -> None:
    service = make_service("--agent-command", f"{programs}/{name} do {{task}}")
    architect = service.client()
    agent = spawn(architect, "hang")
    environment = environment_of(agent)
    assert "do hang" in environment["ARGUMENTS"] and "eyJ" not in environment["ARGUMENTS"]
    assert environment["OTEL_EXPORTER_OTLP_LOGS_ENDPOINT"] == f"{service.url}/v1/logs"
    told = {
        "claude": "CLAUDE_CODE_ENABLE_TELEMETRY",
        "gemini": "GEMINI_TELEMETRY_ENABLED",
        "qwen": "QWEN_TELEMETRY_ENABLED",
    }
    assert told[name] in environment if name in told else f"endpoint={service.url}/v1/logs" in environment["ARGUMENTS"]
    assert tell(reporter(agent), ask()) == {}
    architect.delete(f"/api/agents/{agent['agent_id']}")
    state(architect, agent["agent_id"])


@pytest.mark.parametrize(
    "theirs", [{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.example"}, {"OTEL_LOGS_EXPORTER": "console"}], ids=str
)
def test_a_user_who_collects_reports_elsewhere_goes_on_doing_so(
    make_service: Callable[..., Service], programs: Path, theirs: dict[str, str]
) -> None:
    service = make_service("--agent-command", f"{programs}/claude", env=theirs)
    architect = service.client()
    agent = spawn(architect, "hang")
    environment = environment_of(agent)
    assert environment | theirs == environment and "OTEL_EXPORTER_OTLP_HEADERS" not in environment
    architect.delete(f"/api/agents/{agent['agent_id']}")
    state(architect, agent["agent_id"])


# -- restarts, and the file


def test_figures_and_warnings_outlive_a_kill_of_the_service(
    make_service: Callable[..., Service], programs: Path
) -> None:
    service = make_service("--agent-command", f"{programs}/claude", "--budget-usd", "1/issue")
    architect = service.client()
    agent, repeated = spawn(architect, "hang"), ask(0.9)
    tell(reporter(agent), repeated)
    service.kill()
    service.start()
    architect = service.client()
    tell(
        reporter(agent) if service.url == reporter(agent).url else Client(service.url, reporter(agent).token),
        repeated,
        ask(0.05),
    )
    assert status(architect, agent["agent_id"])["cost_usd"] == 0.95
    assert architect.get("/status").json()["spent"]["by_issue"]["issue-1"]["cost_usd"] == 0.95
    assert len(architect.get("/api/events", type="budget_warning").json()["events"]) == 1
    assert stat.S_IMODE((service.storage / "meter.db").stat().st_mode) == 0o600
    architect.delete(f"/api/agents/{agent['agent_id']}")
    assert state(architect, agent["agent_id"])["cost_usd"] == 0.95


def test_what_is_old_is_forgotten(make_service: Callable[..., Service], programs: Path) -> None:
    service = make_service("--agent-command", f"{programs}/claude")
    architect = service.client()
    agent = spawn(architect, "hang")
    tell(reporter(agent), ask())
    with sqlite3.connect(service.storage / "meter.db") as database:
        database.execute(
            "insert into spent (agent, issue, day, model, requests) values ('a', 'old', '2020-01-01', 'm', 1)"
        )
        database.execute("insert into seen values ('a', x'00', '2020-01-01')")
    tell(reporter(agent), ask())
    with sqlite3.connect(service.storage / "meter.db") as database:
        assert database.execute("select count(*) from seen").fetchone() == (2,)
        assert database.execute("select distinct issue from spent").fetchall() == [("issue-1",)]
    architect.delete(f"/api/agents/{agent['agent_id']}")
    state(architect, agent["agent_id"])


def test_a_folder_in_the_place_of_the_meters_file_is_told_and_the_service_runs(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    (tmp_path / "storage").mkdir(mode=0o700)
    (tmp_path / "storage/meter.db").mkdir(mode=0o700)
    service = make_service()
    until(lambda: "plugin meter: nothing that agents spend is counted: meter.db: Is a directory" in service.log)
    assert service.client().get("/health").status_code == 200


def test_a_file_that_is_damaged_stops_the_start_only_where_a_budget_needs_it(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    storage.mkdir(mode=0o700)
    (storage / "meter.db").write_bytes(b"no database" * 100)
    (storage / "meter.db").chmod(0o600)
    service = make_service(storage=storage)
    until(lambda: "plugin meter: nothing that agents spend is counted: meter.db: file is not a database" in service.log)
    assert service.client().get("/status").json()["spent"] == {"by_issue": {}, "by_day": {}}
    service.stop()
    words = [*service.command, "--budget-tokens", "5"]
    ended = subprocess.run(words, cwd=service.root, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "meter.db: file is not a database; move it away" in ended.stderr


def test_figures_that_are_damaged_meanwhile_take_no_other_answer_down(
    make_service: Callable[..., Service], programs: Path
) -> None:
    service = make_service("--agent-command", f"{programs}/claude")
    architect = service.client()
    agent = spawn(architect, "hang")
    tell(reporter(agent), ask())
    with contextlib.closing(sqlite3.connect(service.storage / "meter.db")) as database:
        database.execute("drop table spent")
    assert architect.get("/status").json()["spent"] == {"by_issue": {}, "by_day": {}}
    (issue,) = architect.get("/api/issues").json()["issues"]
    assert (issue["issue_id"], issue["cost_usd"]) == ("issue-1", None)
    assert status(architect, agent["agent_id"])["cost_usd"] is None
    assert "meter: no such table: spent" in service.log
    architect.delete(f"/api/agents/{agent['agent_id']}")
    assert state(architect, agent["agent_id"])["state"] == "killed"


@pytest.mark.parametrize(
    "made",
    ["create table theirs (x)", "pragma application_id = 77", "pragma user_version = 3; create table spent (x)"],
)
def test_another_programs_database_in_the_meters_place_stays_as_it_is(
    make_service: Callable[..., Service], tmp_path: Path, made: str
) -> None:
    path = tmp_path / "storage/meter.db"
    path.parent.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(made)
    path.chmod(0o600)
    before = path.read_bytes()
    service = make_service(storage=path.parent)
    until(lambda: "nothing that agents spend is counted: meter.db: a newer version of this program" in service.log)
    assert service.stop() == 0
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.glob("meter.db-*")] == []
    ended = subprocess.run(
        [*service.command, "--budget-tokens", "5"], cwd=service.root, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1 and "or another program; move it away" in ended.stderr


# -- budgets


def refusal(answer: requests.Response) -> str:
    assert (answer.status_code, answer.json()["code"]) == (429, "AGT_003"), answer.text
    assert "retry_after_seconds" not in answer.json()  # `cco run` would wait for it
    return str(answer.json()["message"])


@pytest.mark.parametrize(
    ("options", "first", "then", "message"),
    [
        (["--budget-usd", "1/issue"], 0.8, 0.2, "issue issue-1 is spent: 1 of 1 USD; --budget-usd"),
        (["--budget-usd", "0.5"], 0.45, 0.4, "issue issue-1 is spent: 0.85 of 0.5 USD; --budget-usd"),
        (["--budget-tokens", "2500/issue"], 0.1, 0.1, "issue issue-1 is spent: 2500 of 2500 tokens; --budget-tokens"),
        (["--budget-usd", "100", "--budget-tokens", "2400/issue,9000/day"], 0.1, 0.1, "issue issue-1 is spent: 2500 of 2400 tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_a_budget_warns_once_at_80_percent_and_refuses_the_next_agent_when_it_is_spent(
    make_service: Callable[..., Service], programs: Path, options: list[str], first: float, then: float, message: str
) -> None:
    service = make_service("--agent-command", f"{programs}/claude", *options)
    architect = service.client()
    agent = spawn(architect, "hang")
    client = reporter(agent)
    tell(client, ask(first))
    if "--budget-tokens" in options:  # each request takes 1,250: what came from a cache is not counted
        assert architect.get("/api/events", type="budget_warning").json()["events"] == []
    tell(client, ask(then))
    tell(client, ask(0.0, input_tokens=0, output_tokens=0, cache_read_tokens=0, cache_creation_tokens=0))
    warnings = architect.wait("budget_warning", since="earliest", timeout=20_000, filter="issue_id:issue-1")["events"]
    assert [row["data"]["span"] for row in warnings] == ["issue"]
    data = warnings[0]["data"]
    assert data["percent"] >= 80 and data["spent"] >= 0.8 * data["budget"] and data["unit"] in ("usd", "tokens")
    assert message in refusal(architect.post("/api/agents/spawn", request()))
    assert status(architect, agent["agent_id"])["state"] == "running"  # a running agent goes on
    if len(options) == 2 and "/issue" in options[1]:
        architect.delete(f"/api/agents/{spawn(architect, 'succeed', 'issue-2')['agent_id']}")
    for row in architect.get("/api/agents", status="active").json()["agents"]:
        architect.delete(f"/api/agents/{row['agent_id']}")
        state(architect, row["agent_id"])


def test_a_budget_of_the_day_holds_for_all_issues_together(
    make_service: Callable[..., Service], programs: Path
) -> None:
    service = make_service("--agent-command", f"{programs}/claude", "--budget-usd", "5/issue,1/day")
    architect = service.client()
    for number in (1, 2):
        agent = spawn(architect, "hang", f"issue-{number}")
        tell(reporter(agent), ask(0.5))
        architect.delete(f"/api/agents/{agent['agent_id']}")
        state(architect, agent["agent_id"])
    (warning,) = architect.get("/api/events", type="budget_warning").json()["events"]
    assert warning["data"]["span"] == "day" and "issue_id" not in warning["data"]
    assert "The budget of this day (UTC) is spent: 1 of 1 USD" in refusal(
        architect.post("/api/agents/spawn", request(issue="issue-3"))
    )
    service.stop()
    service.start()
    refusal(service.client().post("/api/agents/spawn", request(issue="issue-4")))


def test_what_a_budget_cannot_count_is_said_where_the_agent_starts(
    make_service: Callable[..., Service], programs: Path
) -> None:
    commands = {"codex": "test-engineer", "other": "security-auditor"}
    (programs / "other").write_bytes((programs / "codex").read_bytes())
    (programs / "other").chmod(0o755)
    by_type = json.dumps({kind: f"{programs}/{name}" for name, kind in commands.items()})
    known = ("--agent-command", f"{programs}/claude", "--agent-commands", by_type)
    service = make_service(*known, "--budget-usd", "5", "--budget-tokens", "5000")
    assert service.log.count("does not report what it spends") == 3  # at the start
    for kind in ("python-specialist", *commands.values()):
        agent = spawn(service.client(), "succeed", agent_type=kind)
        state(service.client(), agent["agent_id"])
    said = {line.partition("WARNING")[2].strip() for line in service.log.splitlines() if "does not report" in line}
    assert {line.split(":")[-1].strip() for line in said} == {
        "--budget-usd counts nothing of it", "--budget-tokens counts nothing of it"
    }  # fmt: skip
    assert len(said) == 3 and not any("claude does" in line for line in said)


def test_nobody_else_publishes_a_warning(service: Service, architect: Client) -> None:
    body = {"publisher": "x", "topic": "x", "data": {}}
    assert architect.post("/api/events/budget_warning", body).status_code == 403


# -- the parts, as a table


@pytest.mark.parametrize(("text", "number"), [("5", 5), ("5.0", 5), (7, 7), (0, 0), (None, 0)])
def test_a_count_is_a_whole_number_that_may_be_written_as_a_text(text: Any, number: int) -> None:
    assert plugin("meter").count({"n": text}, "n") == number

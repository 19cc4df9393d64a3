"""The OpenAPI document: what generators make of it compiles and runs, and each answer of the service is as it says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import jsonschema
import npm
import pytest
import requests
from conftest import (
    ALL,
    ROOT,
    Client,
    Service,
    clean_environment,
    git,
    make_repository,
    needed,
    plugin,
    serving,
    until,
)
from test_errors import BY_CLIENT
from test_malformed import POST, SLOW, connect, exchange
from test_reference import FULL_EVENT, FULL_RESULT, SHORT_EVENT, SHORT_RESULT, SPAWN

import cco_sidecar

DOCUMENT = json.loads((ROOT / "vendor_schemas" / "openapi.json").read_text())
OPERATIONS = [
    (path, method, operation)
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
]
# What programs report has its tests in test_meter: an agent's own token may do it, without a limit of rate, and no other.
# /mcp has its own in test_mcp: in it every answer and refusal has a second form within that of HTTP.
FOR_ANY_TOKEN = [row for row in OPERATIONS if not row[0].startswith(("/v1/", "/mcp"))]
TYPESCRIPT = ROOT / "tests" / "typescript"
PACKAGES = (
    "openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3", "@types/node@20.19.43", "ajv@8.20.0",
    "ajv-formats@3.0.1",
)  # fmt: skip
AGENT = (
    "import os, time; print('hello from an agent', flush=True); time.sleep(float(os.environ.get('TEST_SECONDS', '0')))"
)


# ---- Is the answer as the document says? -----------------------------------------------------------------------------


FORMATS = jsonschema.FormatChecker(formats=())


@FORMATS.checks("date-time", raises=ValueError)
def is_moment(value: object) -> bool:
    return not isinstance(value, str) or (len(value) >= 20 and datetime.fromisoformat(value).tzinfo is not None)


def check_pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """As ECMA 262 has it, and jsonschema has not: `$` is the end, not also the place before a last newline."""
    if isinstance(value, str) and not re.search(re.sub(r"\$\Z", r"\\Z", pattern), value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern}")


VALIDATOR = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": check_pattern})


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that comes twice is no error to this interpreter, but to strict readers."""
    names = [name for name, _ in pairs]
    assert len(set(names)) == len(names), f"a key comes twice: {sorted(names)}"
    return dict(pairs)


class Conformance:
    """Holds answers to a document, and remembers which statuses of which operations it has seen."""

    # What every HTTP answer may carry: how it is sent, and for whom.
    PLUMBING = set(
        "connection content-encoding content-length content-type cache-control date server transfer-encoding vary"
        " content-disposition x-content-type-options x-frame-options access-control-allow-origin access-control-expose-headers".split()
    )

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.seen: defaultdict[str, set[int]] = defaultdict(set)
        self._validators: dict[str, Any] = {}

    def check(self, method: str, path: str, status: int, headers: dict[str, str], content: bytes) -> None:
        """That the document foresees an answer, and a request that got a good one. Other paths are passed over."""
        for template, operation in self._operations(method, path):
            if status < 300:
                self._check_request(operation, f"{method} {path}", template, path)
            self._check_answer(
                operation, f"{method} {path}: {status} {content[:500]!r}", method, status, headers, content
            )

    def _check_answer(
        self, operation: Any, where: str, method: str, status: int, headers: dict[str, str], content: bytes
    ) -> None:
        self.seen[operation["operationId"]].add(status)
        response = self._resolved(operation["responses"].get(str(status)))
        assert response, f"{where} is not in the document"
        self._check_headers(
            where, response.get("headers", {}), {name.lower(): value for name, value in headers.items()}
        )
        if method == "HEAD" or "content" not in response:
            assert content == b"", where
        else:
            kind = headers["Content-Type"]
            is_json = kind == "application/json"
            value = json.loads(content, object_pairs_hook=without_repeats) if is_json else content.decode()
            self._check(where, response["content"][kind]["schema"], value)

    def _check_request(self, operation: Any, where: str, template: str, path: str) -> None:
        place, _, query = path.partition("?")
        values = re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]*)", template), place)
        assert values
        in_path = {name: unquote(value) for name, value in values.groupdict().items()}
        given = {"path": in_path, "query": dict(parse_qsl(query, keep_blank_values=True))}
        described = {(parameter["in"], parameter["name"]): parameter["schema"] for parameter in operation["parameters"]}
        for kind, names in given.items():
            for name, value in names.items():
                assert (kind, name) in described, f"{where}: {name} is not in the document"
                self._check(f"{where}: {name}", described[kind, name], typed(value, described[kind, name]))

    def _operations(self, method: str, path: str) -> list[tuple[str, dict[str, Any]]]:
        """The operation that a request is for, with its path; all of the path, where the method is none of its."""
        matching = [
            template
            for template in self.document["paths"]
            if re.fullmatch(re.sub(r"\{\w+\}", "[^/]*", template), path.partition("?")[0])
        ]
        operations: dict[str, tuple[str, Any]] = {}
        for template in sorted(
            matching, key=lambda template: "{" not in template
        ):  # a path of its own comes before a pattern
            operations |= {name: (template, operation) for name, operation in self.document["paths"][template].items()}
        wanted = "get" if method == "HEAD" else method.lower()
        return (
            [] if method == "OPTIONS" else [operations[wanted]] if wanted in operations else list(operations.values())
        )

    def _resolved(self, part: Any) -> Any:
        while part and "$ref" in part:
            place = self.document
            for name in part["$ref"].removeprefix("#/").split("/"):
                place = place[name]
            part = place
        return part

    def _check_headers(self, where: str, described: dict[str, Any], headers: dict[str, str]) -> None:
        for name, reference in described.items():
            header = self._resolved(reference)
            value: Any = headers.get(name.lower())
            assert value is not None or not header.get("required"), f"{where}: no {name}"
            if value is not None:
                self._check(f"{where}: {name}", header["schema"], typed(value, header["schema"]))
        surplus = headers.keys() - self.PLUMBING - {name.lower() for name in described}
        assert not surplus, f"{where}: {surplus} are not in the document"

    def _check(self, where: str, schema: dict[str, Any], value: Any) -> None:
        key = json.dumps(schema)
        if key not in self._validators:
            whole = {**schema, "components": self.document["components"]}
            self._validators[key] = VALIDATOR(whole, format_checker=FORMATS)
        error = jsonschema.exceptions.best_match(self._validators[key].iter_errors(value))
        assert error is None, f"{where}: {error.json_path}: {error.message[:500]}"


def typed(text: str, schema: dict[str, Any]) -> Any:
    """What a header or parameter says, in the type that it has in the document."""
    return json.loads(text) if schema["type"] in ("integer", "boolean") else text


@pytest.fixture(scope="module")
def conformance() -> Conformance:
    return Conformance(DOCUMENT)


@pytest.fixture(autouse=True)
def every_answer_is_checked(conformance: Conformance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test here asks with a Client is held to the document."""
    ask = Client.request

    def request(self: Client, method: str, path: str, **keywords: Any) -> requests.Response:
        answer = ask(self, method, path, **keywords)
        conformance.check(
            method, answer.request.path_url or path, answer.status_code, dict(answer.headers), answer.content
        )
        return answer

    monkeypatch.setattr(Client, "request", request)


@pytest.mark.parametrize(
    ("status", "headers", "body", "found"),
    [
        (200, {"X-Request-ID": "req-1"}, {"token": "t", "expires_at": "2026-01-01T00:00:00Z"}, None),
        (299, {"X-Request-ID": "req-1"}, {}, "not in the document"),
        (200, {}, {"token": "t", "expires_at": "2026-01-01T00:00:00Z"}, "no X-Request-ID"),
        (200, {"X-Request-ID": "1"}, {"token": "t", "expires_at": "2026-01-01T00:00:00Z"}, "does not match"),
        (
            200,
            {"X-Request-ID": "req-1", "X-RateLimit-Limit": "0"},
            {"token": "t", "expires_at": "2026-01-01T00:00:00Z"},
            "less than the minimum",
        ),
        (
            200,
            {"X-Request-ID": "req-1", "X-Surprise": "!"},
            {"token": "t", "expires_at": "2026-01-01T00:00:00Z"},
            "x-surprise",
        ),
        (200, {"X-Request-ID": "req-1"}, {"token": "t"}, "is a required property"),
        (200, {"X-Request-ID": "req-1"}, {"token": 1, "expires_at": "2026-01-01T00:00:00Z"}, "is not of type"),
        (200, {"X-Request-ID": "req-1"}, {"token": "t", "expires_at": "tomorrow"}, "is not a 'date-time'"),
        (401, {"X-Request-ID": "req-1"}, {}, "no WWW-Authenticate"),
    ],
)
def test_the_check_of_answers_finds_what_differs(
    status: int, headers: dict[str, str], body: Any, found: str | None
) -> None:
    def check() -> None:
        all_headers = headers | {"Content-Type": "application/json"}
        Conformance(DOCUMENT).check("POST", "/api/auth/refresh", status, all_headers, json.dumps(body).encode())

    if found is None:
        return check()
    with pytest.raises(AssertionError, match=re.escape(found)):
        check()


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/api/events/wait/*?timeout=0&since=earliest", None),
        ("/api/events/wait/Ping", "does not match"),
        ("/api/events/wait/a%0A", "does not match"),
        ("/api/events/wait/ping?timeout=300001", "is greater than the maximum"),
        ("/api/events/wait/ping?patience=1", "patience is not in the document"),
    ],
)
def test_the_check_of_requests_that_were_answered_finds_what_the_document_forbids(path: str, found: str | None) -> None:
    answer = {
        "events": [],
        "more_available": False,
        "next_cursor": None,
        "scanned_to": "evt-1",
        "timeout": True,
        "timestamp": "2026-01-01T00:00:00Z",
    }
    headers = {"X-Request-ID": "req-1", "Content-Type": "application/json"}
    if found is None:
        return Conformance(DOCUMENT).check("GET", path, 200, headers, json.dumps(answer).encode())
    with pytest.raises(AssertionError, match=found):
        Conformance(DOCUMENT).check("GET", path, 200, headers, json.dumps(answer).encode())


# ---- The live service ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose agents print a line and live as long as $TEST_SECONDS says."""
    command = json.dumps([sys.executable, "-c", AGENT])
    with serving(tmp_path_factory.mktemp("described"), "--agent-command", command) as running:
        yield running


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The same, of a module that has no plugins beside it."""
    folder = tmp_path_factory.mktemp("lone")
    module, command = folder / "cco_sidecar.py", json.dumps([sys.executable, "-c", AGENT])
    shutil.copy(ROOT / "cco_sidecar.py", module)
    (folder / "plugins").mkdir()  # else those would be found that `pip install -e` has copied somewhere
    repository = make_repository(folder / "repository")
    with serving(folder, "--agent-command", command, module=module, root=repository) as running:
        yield running


def walk(architect: Client, issue: str, *, alone: bool = False) -> None:
    """Every operation, with good requests; what is optional is there once and once not."""
    context = architect.get(f"/api/context/{issue}/python-specialist", task="Greet", max_files=3)
    known = {"If-None-Match": context.headers["ETag"]}
    assert (
        architect.request(
            "GET", f"/api/context/{issue}/python-specialist?task=Greet&max_files=3", headers=known
        ).status_code
        == 304
    )
    changes = architect.get(f"/api/context/{issue}/python-specialist", since=known["If-None-Match"])
    assert changes.status_code == 200
    for body in (SHORT_RESULT, FULL_RESULT, SHORT_RESULT | {"timestamp": None, "more": {"a": [None]}}):
        for key in ("first", "second", "second"):
            headers = {} if alone else {"Idempotency-Key": f"{key} {len(body)}"}
            answer = architect.post("/api/results", body | {"issue_id": issue}, headers=headers)
            assert answer.status_code == 201, answer.text
    for body in (FULL_EVENT, SHORT_EVENT, SHORT_EVENT | {"correlation_id": None, "ttl_seconds": 1.5, "more": 1}):
        assert architect.post("/api/events/agent_completed", body).status_code == 202
    for event_type in ("agent_completed", "*", "nothing_of_this_type"):
        assert (
            architect.get(
                f"/api/events/wait/{event_type}", timeout=0, filter=f"issue_id:{issue}", since="earliest"
            ).status_code
            == 200
        )
    for dead in ("false", "true"):  # the module alone lists none
        assert architect.get("/api/events", type="agent_completed", dead=dead).status_code in (200, 404)
    agents = [
        architect.post("/api/agents/spawn", SPAWN | {"issue_id": issue, "environment": {"TEST_SECONDS": seconds}})
        for seconds in ("0", "60")
    ]
    short, long = (agent.json()["agent_id"] for agent in agents)
    if alone:
        os.kill(agents[1].json()["process_id"], signal.SIGTERM)
    else:
        assert architect.delete(f"/api/agents/{long}").status_code == 202
    for agent in (short, long):
        assert architect.wait("agent_exited", since="earliest", filter=f"agent_id:{agent}", timeout=20_000)["events"]
        assert architect.get(f"/api/agents/{agent}/status").status_code == 200
        for asked in ({"tail": 5}, {"timestamps": "true"}):
            logs = architect.get(f"/api/agents/{agent}/logs", **asked)
            assert logs.status_code in (200, 404)  # the module alone reads none
    assert architect.get("/api/agents", issue_id=issue, state="completed").status_code in (200, 404)
    assert architect.get(f"/api/context/{issue}/test-engineer").json()["context"]["previous_agent_outputs"]
    assert architect.delete(f"/api/cache/context/{issue}").status_code == 200
    assert architect.delete("/api/cache/all").status_code in (200, 404)
    assert architect.post("/api/auth/refresh").status_code in (200, 404)
    for path in ("/health", "/status"):
        assert architect.get(path).status_code == architect.request("HEAD", path).status_code == 200


def walk_approvals(architect: Client, issue: str) -> None:
    """The operations of what agents ask, with good requests."""
    question = {"kind": "question", "text": "Which?", "choices": ["a", "b"], "issue_id": issue}
    for body in (question, {"kind": "approval", "text": "May I?", "command": "rm x", "details": {"a": [1]}}):
        asked = architect.post("/api/approvals", body).json()
        assert architect.get(f"/api/approvals/{asked['approval_id']}", timeout=1).json() == asked
        place, answer = f"/api/approvals/{asked['approval_id']}/answer", {"answer": asked["choices"][0]}
        assert [architect.post(place, answer).status_code for _ in range(2)] == [200, 409]
    for path in ("/api/hooks/claude?event=Stop", "/api/hooks/gemini", "/api/hooks/codex/wait?timeout=1"):
        assert architect.post(path, {"session_id": issue, "hook_event_name": "AfterTool"}).status_code == 200
    assert architect.get("/api/approvals", issue_id=issue, state="answered").json()["approvals"][0]["answer"] == "a"


def walk_dashboard(architect: Client, issue: str) -> None:
    """The operations of the dashboard, with good requests, after a walk."""
    agent = architect.get("/api/agents", issue_id=issue).json()["agents"][0]["agent_id"]
    assert architect.get(f"/api/agents/{agent}/brief").text.startswith("# Brief")
    result = architect.get("/api/results", issue_id=issue).json()["results"][0]["id"]
    assert architect.get(f"/api/results/{result}/diff").json()["base"]
    for path in ("", f"/{issue}", f"/{issue}/timeline", f"/{issue}/export"):
        assert architect.get(f"/api/issues{path}").status_code == 200
    code = architect.post("/api/dashboard/code").json()["code"]
    assert Client(architect.url, None).post("/api/dashboard/token", {"code": code}).status_code == 200
    assert architect.get("/api/dashboard").json()["routes_missing"] == []
    run = architect.post("/api/runs", {"issue_id": f"{issue}-run", "task": "Greet", "rounds": 1}).json()
    assert architect.get("/api/runs").json()["runs"][0]["run_id"] == run["run_id"]
    assert architect.delete(f"/api/runs/{run['run_id']}").status_code == 202
    until(lambda: architect.get(f"/api/runs/{run['run_id']}").json()["state"] != "running", 30)


def walk_lists(architect: Client, issue: str) -> None:
    """The operations of the plugins that list results and plugins, after a walk."""
    listed = architect.get("/api/results", issue_id=issue, limit=2).json()["results"]
    assert architect.get(f"/api/results/{listed[0]['id']}").status_code == 200
    assert "plugin_list" in architect.get("/api/plugins").text
    assert "python-specialist" in architect.get("/api/agent-types").text


def test_every_operation_answers_good_requests_as_the_document_says(
    service: Service, conformance: Conformance, issue: str
) -> None:
    conformance.seen.clear()
    walk(service.client(), issue)
    walk_approvals(service.client(), issue)
    walk_lists(service.client(), issue)
    walk_dashboard(service.client(), issue)
    for method in ("GET", "HEAD"):
        assert service.client().request(method, "/openapi.json").status_code == 200
    assert well_answered(conformance) == {op["operationId"] for _, _, op in FOR_ANY_TOKEN}


def test_the_module_alone_answers_good_requests_to_its_endpoints_as_the_document_says(
    lone: Service, conformance: Conformance, issue: str
) -> None:
    conformance.seen.clear()
    walk(lone.client(), issue, alone=True)
    endpoints = {row.endpoint.__name__ for row in cco_sidecar.routes()}
    assert well_answered(conformance) == {name[0].lower() + name[1:] for name in endpoints}


def well_answered(conformance: Conformance) -> set[str]:
    return {name for name, statuses in conformance.seen.items() if statuses & {200, 201, 202}}


def test_every_type_of_an_answer_is_described() -> None:
    described = vars(plugin("openapi").answers)
    schemas = DOCUMENT["components"]["schemas"]
    own = described["__name__"]
    ours = {name for name, shape in described.items() if isinstance(shape, type) and shape.__module__ == own}
    assert ours <= schemas.keys() and "ErrorAnswer" in ours


def example_of(path: str) -> str:
    """The path with names that are well-formed; nothing has them."""
    names = {"agent_type": "python-specialist", "event_type": "ping"}
    return re.sub(r"\{(\w+)\}", lambda name: names.get(name[1], f"no-such-{name[1]}"), path)


@pytest.mark.parametrize(
    ("path", "method", "operation"), FOR_ANY_TOKEN, ids=[operation["operationId"] for _, _, operation in FOR_ANY_TOKEN]
)
def test_every_operation_refuses_bad_requests_as_the_document_says(
    service: Service, conformance: Conformance, path: str, method: str, operation: dict[str, Any]
) -> None:
    """Bad requests of every kind that the document forbids; each status is one that it foresees, with its headers."""
    conformance.seen.clear()
    architect, nobody, place = service.client(), Client(service.url, None), example_of(path)

    def ask(client: Client = architect, place: str = place, **keywords: Any) -> int:
        return client.request(method.upper(), place, **({"timeout": 60} | keywords)).status_code

    public = operation.get("security") == []
    metered = not public and operation["tags"] != ["hooks"]  # which programs call by themselves
    assert ask(nobody, headers={"Host": "evil.example"}) == 403
    assert ask(place=place + "?a=%ff") == 400
    assert nobody.request("PATCH", place).status_code == 405
    if not public:
        assert ask(nobody) == ask(Client(service.url, "eyJhbGci")) == 401
        assert ask(service.client(project_id="another")) == 403
        spent, at_once = (
            service.client("documentation-expert"),
            "?timeout=0" if operation["operationId"] == "waitForEvents" else "",
        )
        if metered:
            until(lambda: ask(spent, place + at_once) == 429)
    if permission := operation.get("x-permission"):
        assert ask(service.client("python-specialist", permissions=[name for name in ALL if name != permission])) == 403
    for parameter in operation["parameters"]:
        name, schema = parameter["name"], parameter["schema"]
        if parameter["in"] == "path":
            bad = path.replace(f"{{{name}}}", "a%0A" if schema["pattern"].startswith("^(?!") else "Not-A-Type")
            assert ask(place=example_of(bad)) == 400, name
        elif parameter["in"] == "query" and (
            schema.keys() & {"minimum", "enum", "pattern"} or schema["type"] == "boolean"
        ):
            assert ask(place=f"{place}?{name}=%2D1%0A") == 400, name
        elif parameter["in"] == "query" and schema.get("maxLength", 10_000) <= 4096:
            assert ask(place=f"{place}?{name}={'x' * (schema['maxLength'] + 1)}") == 400, name
        elif name == "Idempotency-Key":
            assert ask(headers={name: "x" * 256}, json={}) == 400
    if "requestBody" in operation:
        known = (b"{}", b'{"data": 1}') if metered else ()  # a program may say nothing to its hooks, or more
        for body in (b"", b"{", b"null", b"[]", *known, b"\xff"):
            assert ask(data=body, headers={"Content-Type": "application/json"}) == 400, body
        assert ask(data="data=1", headers={"Content-Type": "text/plain"}) == 415
        assert ask(data=b"{}", headers={"Content-Type": "application/json", "Content-Encoding": "gzip"}) == 415
    largest = {"storeResult": 32, "callHook": 16, "waitForNews": 16}  # MB
    beyond = cco_sidecar.MB * (largest.get(operation["operationId"], 1) + 1)
    assert ask(data=b" " * beyond, headers={"Content-Type": "application/json"}) == 413
    longest = 380_000 if operation["operationId"] == "getContext" else 9_000
    assert ask(place=f"{place}?a={'x' * longest}") == 414
    assert ask(headers={"X-Long": "x" * 70_000}) == 431
    if path.count("{") and method != "post" and operation["operationId"] not in ("getContext", "waitForEvents"):
        assert ask() == 404
    wanted = (
        {400, 403, 405, 413, 414, 431}
        | (set() if public else {401})
        | ({429} if metered else set())
        | ({415} if "requestBody" in operation else set())
    )
    assert wanted <= conformance.seen[operation["operationId"]]


@pytest.mark.parametrize("code", BY_CLIENT)
def test_each_code_of_a_refusal_is_as_the_document_says(
    service: Service, make_service: Callable[..., Service], code: str
) -> None:
    if code in ("CTX_002", "AGT_001"):
        service = make_service()  # without an agent command, and with a remote whose URL does not fit
        git(service.root, "remote", "set-url", "origin", f"https://github.com/{'x' * 2500}")
    assert BY_CLIENT[code](service).json()["code"] == code


def test_a_token_in_its_last_minutes_and_a_bounded_spawn_are_as_the_document_says(
    make_service: Callable[..., Service],
) -> None:
    service = make_service("--agent-command", "sleep 60", "--max-agents", "1")
    now = int(time.time())
    assert (
        "X-Refreshed-Token" in service.client("python-specialist", iat=now - 3500, exp=now + 100).get("/status").headers
    )
    body = {"agent_type": "python-specialist", "issue_id": "issue-1"}
    agent = service.client().post("/api/agents/spawn", body).json()["agent_id"]
    assert "Retry-After" in service.client().post("/api/agents/spawn", body).headers
    assert service.client().delete(f"/api/agents/{agent}").status_code == 202


def test_what_is_refused_before_it_is_a_request_is_as_the_document_says(
    make_service: Callable[..., Service], conformance: Conformance
) -> None:
    service = make_service("--request-timeout", "1", "--max-connections", "2")
    conformance.seen.clear()
    stalled = [
        (name, b"POST" if SLOW[name].startswith(POST) else b"GET") for name in SLOW if name != "in the request line"
    ]
    for name, method in stalled:
        path = "/health" if method == b"GET" else "/api/events/ping"
        status, headers, body = exchange(service, SLOW[name])
        conformance.check(method.decode(), path, status, titled(headers), json.dumps(body).encode())

    def crowded() -> bool:
        with connect(service), connect(service):  # which are ended after a second
            return refused_for_want_of_room(service, conformance)

    until(crowded)
    assert conformance.seen["publishEvent"] == {408} and conformance.seen["getHealth"] == {408, 503}


def titled(headers: dict[str, str]) -> dict[str, str]:
    return {name.title(): value for name, value in headers.items()}


def refused_for_want_of_room(service: Service, conformance: Conformance) -> bool:
    status, headers, body = exchange(service, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    conformance.check("GET", "/health", status, titled(headers), json.dumps(body).encode())
    return status == 503


def test_the_live_document_is_the_kept_one_at_its_own_address(service: Service) -> None:
    live = Client(service.url, None).get("/openapi.json").json()
    assert live["servers"][0]["url"] == service.url
    assert {**live, "servers": DOCUMENT["servers"]} == DOCUMENT
    assert DOCUMENT["servers"][0]["url"] == "http://localhost:3001"


# ---- What generators like --------------------------------------------------------------------------------------------


def parts(value: Any, place: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object in a document, with where it is."""
    if isinstance(value, dict):
        yield place, value
        for name, part in value.items():
            yield from parts(part, f"{place}.{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from parts(part, f"{place}[{number}]")


def schemas() -> list[tuple[str, dict[str, Any]]]:
    """Every schema in the document."""
    found = [(f"$.{name}", schema) for name, schema in DOCUMENT["components"]["schemas"].items()]
    inline = {"paths": DOCUMENT["paths"], "headers": DOCUMENT["components"]["headers"]}
    found += [(f"{place}.schema", part["schema"]) for place, part in parts(inline) if "schema" in part]
    return [item for place, schema in found for item in parts(schema, place)]


def test_no_schema_leaves_generators_guessing() -> None:
    for place, schema in schemas():
        for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
            assert choice, f"{place}: a choice of anything or something"
        if schema.get("type") == "object":
            assert schema.keys() & {"properties", "additionalProperties"}, (
                f"{place}: an object of which nothing is known"
            )
            assert not ("properties" in schema and isinstance(schema.get("additionalProperties"), dict)), place
        if schema.get("type") == "array":
            assert isinstance(schema.get("items"), dict), f"{place}: an array of what"
        assert schema.get("type") != "null" or re.search(r"\]$", place), (
            f"{place}: openapi-generator has no type for it"
        )
        assert "const" not in schema, f"{place}: openapi-generator compares it with text"
        if isinstance(schema.get("pattern"), str):
            assert not re.search(r"\\[ZzAGdDwWsS]|\(\?[P<#ia]", schema["pattern"]), f"{place}: {schema['pattern']}"
            assert schema["type"] == "string", place
        if isinstance(schema.get("enum"), list):
            assert schema["type"] == "string", place


def test_what_may_be_left_out_is_not_required_and_has_no_default_that_says_otherwise() -> None:
    """Where a property has a default, openapi-typescript and others take it for one that is always there."""
    assert [
        place
        for place, schema in schemas()
        if place.startswith("$.") and ".schema" not in place and "default" in schema
    ] == []
    required = {
        "ResultSubmission": {"agent_id", "agent_type", "issue_id", "project_id", "result"}, "ResultBody": {"status"},
        "EventSubmission": {"publisher", "topic", "data"}, "SpawnRequest": {"agent_type", "issue_id"},
        "FileEntry": {"path"}, "ResultMetrics": set(),
        "RelevantFile": {"path", "content", "last_modified", "size", "language", "checksum"},
    }  # fmt: skip
    for name, fields in required.items():
        assert set(DOCUMENT["components"]["schemas"][name].get("required", ())) == fields, name


def test_every_operation_has_a_good_name_a_tag_and_words_for_everything() -> None:
    names = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+([A-Z][a-z]+)*(API)?", name) for name in names), names
    tags = {tag["name"] for tag in DOCUMENT["tags"] if tag.get("description")}
    for path, method, operation in OPERATIONS:
        place = f"{method} {path}"
        assert set(operation["tags"]) <= tags and len(operation["tags"]) == 1, place
        assert 5 < len(operation["summary"]) < 100 and operation["summary"] in operation["description"], place
        assert all(parameter["description"] for parameter in operation["parameters"]), place
        assert set(re.findall(r"\{(\w+)\}", path)) == {
            item["name"] for item in operation["parameters"] if item["in"] == "path"
        }
        assert {"400", "403", "408", "413", "414", "431", "500", "503"} <= set(operation["responses"]), place
        assert operation.get("security") == [] or {"401", "429"} <= set(operation["responses"]), place
        assert all("$ref" in answer or answer["description"] for answer in operation["responses"].values()), place
        if "requestBody" in operation:
            shape = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            fields = DOCUMENT["components"]["schemas"][shape]["properties"]
            assert (
                operation["requestBody"]["description"]
                and [name for name, field in fields.items() if not field.get("description")] == []
            ), place
    for kind in ("schemas", "responses", "headers", "securitySchemes"):
        assert [name for name, part in DOCUMENT["components"][kind].items() if not part.get("description")] == [], kind
    assert DOCUMENT["components"]["securitySchemes"]["bearer"] | {"description": ""} == {
        "type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "",
    }  # fmt: skip


def test_every_figure_is_explained_and_no_words_are_of_a_field_that_is_gone() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    fields = [(name, *item) for name, schema in schemas.items() for item in schema["properties"].items()]
    assert [f"{name}.{field}" for name, field, value in fields if not value.get("description")] == []
    words = [key.split(".") for key in plugin("openapi").WORDS if "." in key]
    assert [row for row in words if row[0] in schemas and row[1] not in schemas[row[0]]["properties"]] == []


def test_every_code_of_a_refusal_is_named() -> None:
    assert set(DOCUMENT["components"]["schemas"]["ErrorAnswer"]["properties"]["code"]["enum"]) == set(
        cco_sidecar.ERRORS
    )


# ---- ajv -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules() -> Path:
    """The folder node_modules with all that is needed here."""
    return npm.install(*PACKAGES).parent


def run(*command: str | Path, cwd: Path, stdin: str = "", seconds: float = 300) -> subprocess.CompletedProcess[str]:
    words, environment = [str(word) for word in command], clean_environment()
    return subprocess.run(words, cwd=cwd, input=stdin, env=environment, capture_output=True, text=True, timeout=seconds)


def ask_ajv(modules: Path, folder: Path, questions: dict[str, Any]) -> Any:
    """What tests/typescript/ajv.mjs says to ``questions``: schemas by name, and values that are to be held to them."""
    (folder / "node_modules").symlink_to(modules)
    shutil.copy(TYPESCRIPT / "ajv.mjs", folder)
    done = run(needed("node"), folder / "ajv.mjs", cwd=folder, stdin=json.dumps(questions))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_every_schema_compiles_in_ajv(modules: Path, tmp_path: Path) -> None:
    """Draft 2020-12, strict, with formats: the files, each component of openapi.json, each parameter and header."""
    found = {
        path.name: json.loads(path.read_text()) for path in sorted((ROOT / "vendor_schemas").glob("*.schema.json"))
    }
    assert len(found) >= 20 and all(schema["$schema"].endswith("2020-12/schema") for schema in found.values())
    definitions = json.loads(json.dumps(DOCUMENT["components"]["schemas"]).replace("#/components/schemas/", "#/$defs/"))
    found |= {name: {"$ref": f"#/$defs/{name}", "$defs": definitions} for name in definitions}
    for place, part in parts(DOCUMENT):
        if isinstance(part.get("schema"), dict):
            found[place] = {
                **json.loads(json.dumps(part["schema"]).replace("#/components/schemas/", "#/$defs/")),
                "$defs": definitions,
            }
    broken = (
        {"type": "string", "pattern": r"\Z"},
        {"minimum": 1},
        {"type": "string", "format": "no-such"},
        {"x-more": 1},
    )
    found |= {f"broken {number}": schema for number, schema in enumerate(broken)}
    said = ask_ajv(modules, tmp_path, {"schemas": found, "values": []})
    assert {name for name, problem in said["problems"].items() if problem} == {
        f"broken {number}" for number in range(4)
    }, said["problems"]


SAMPLES: dict[str, list[Any]] = {
    "agent_type": [
        "a",
        "a.b",
        "a..b",
        "a\n",
        "\na",
        "a\r",
        "a\u2028",
        "",
        ".a",
        "a.",
        "ü",
        "٣",
        "a b",
        "a" * 128,
        "a" * 129,
        1,
        None,
    ],
    "event_type": ["a", "a.b", "a\n", "A", "", "*", "a" * 64, "a" * 65, "a\u2029", None, 1],
    "task": ["", "a", "a\n", "\x00", "a\x00", "\n", "a\x00\n", "ü\u2028", "😀" * 15_000, "😀" * 30_001, None],
    "environment": [
        {},
        {"A": "b"},
        {"A\n": "b"},
        {"A": "b\n"},
        {"": "b"},
        {"A=": "b"},
        {"=\n": "b"},
        {"A": "\x00"},
        {"A": 1},
        {"A": None},
        [],
    ],
    "priority": ["low", "high", "medium", "highest", "low\n", None],
    "permissions": [["read_context"], [], None, ["read_context\n"], ["all"]],
}
RESULT = {"agent_id": "a", "agent_type": "a", "issue_id": "b", "project_id": "c", "result": {"status": "failed"}}
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SpawnRequest": (cco_sidecar.SpawnRequest, {"agent_type": "a", "issue_id": "b"}),
    "EventSubmission": (cco_sidecar.EventSubmission, {"publisher": "a", "topic": "b", "data": {}}),
    "ResultSubmission": (cco_sidecar.ResultSubmission, RESULT),
}


def test_ajv_and_the_service_accept_the_same_bodies(modules: Path, tmp_path: Path) -> None:
    files = {name: json.loads((ROOT / "vendor_schemas" / f"{name}.schema.json").read_text()) for name in BODIES}
    values = [
        (name, body | {field: sample})
        for name, (shape, body) in BODIES.items()
        for field, samples in SAMPLES.items() if field in shape.__struct_fields__
        for sample in samples
    ]  # fmt: skip
    values += [
        (name, {key: value for key, value in body.items() if key != left_out})
        for name, (_, body) in BODIES.items()
        for left_out in body
    ]
    values += [
        (name, body | {"data": data})
        for name, (_, body) in BODIES.items()
        for data in ({}, [], {"a": {"b": None}}, None)
    ]
    files_of = ["a", {"path": "a"}, {"path": "a", "size": 1.5, "more": {}}, {"path": 1}, {}, 1, None]
    values += [
        ("ResultSubmission", RESULT | {"result": {"status": "success", "files_created": [entry]}}) for entry in files_of
    ]
    said = ask_ajv(modules, tmp_path, {"schemas": files, "values": values})["verdicts"]
    ours = [accepts(BODIES[name][0], value) for name, value in values]
    assert [(value, verdict) for value, verdict, our in zip(values, said, ours, strict=True) if verdict != our] == []
    assert min(ours.count(True), ours.count(False)) > 40, (ours.count(True), ours.count(False))


def accepts(shape: type, value: Any) -> bool:
    try:
        cco_sidecar.convert(value, shape)
    except cco_sidecar.ApiError:
        return False
    return True


@pytest.mark.parametrize("name", ["agent_id", "agent_type", "issue_id", "project_id"])
def test_a_newline_behind_an_identifier_is_refused(service: Service, name: str) -> None:
    assert service.client().post("/api/results", SHORT_RESULT | {name: SHORT_RESULT[name] + "\n"}).status_code in (
        400,
        403,
    )
    assert service.client().get(f"/api/results/{name}%0A").status_code == 400
    assert service.client().get("/api/events/wait/ping%0A", timeout=0).status_code == 400


# ---- A generated client in TypeScript --------------------------------------------------------------------------------

# How a compiler can be told to believe what it does not see; and what hands out `any` unasked.
CASTS = (
    r"\bas\b|\bany\b|@ts-|[\w)\]]!(?!=)|(?<![\w$])<\w|:\s*\w+ is\b|\basserts\b|\bdeclare\b|\beval\b|JSON\.parse"
    r"|\.json\(|Function|\.d\.ts"
)
WRONG = {  # what the compiler must refuse
    "a missing field": (
        'client.POST("/api/events/{event_type}", { params: { path: { event_type: "a" } },'
        ' body: { publisher: "a", topic: "b" } })'
    ),
    "an unknown status": 'client.POST("/api/results", { body: { ...identity, result: { status: "done" } } })',
    "a file without path": (
        'client.POST("/api/results", { body: { ...identity,'
        ' result: { status: "success", files_created: [{ size: 1 }] } } })'
    ),
    "a limit in words": 'client.GET("/api/results", { params: { query: { limit: "ten" } } })',
    "an unknown path": 'client.GET("/api/nothing")',
    "a wrong method": 'client.PUT("/api/results")',
    "a forgotten parameter": 'client.GET("/api/events/wait/{event_type}", { params: { query: { timeout: 1 } } })',
    "a null that is passed over": 'client.GET("/api/results").then((answer) => answer.data?.next_cursor.length)',
    "a refusal that is passed over": 'client.GET("/status").then((answer) => answer.data.agents)',
    "a code that is none": 'client.GET("/status").then((answer) => answer.error?.code === "AUTH_009")',
    "a time-out that is passed over": (
        'client.GET("/api/events/wait/{event_type}", { params: { path: { event_type: "*" } } })'
        ".then((answer) => answer.data?.next_cursor.length)"
    ),
    "a field that is not always there": (
        'client.GET("/api/context/{issue_id}/{agent_type}", { params: { path: { issue_id: "a", agent_type: "b" } } })'
        ".then((answer) => answer.data?.context.relevant_files.map((file) => file.reasons.length))"
    ),
    "an unknown priority": (
        'client.POST("/api/agents/spawn", { body: { agent_type: "a", issue_id: "b", priority: "urgent" } })'
    ),
}
HEAD = """import createClient from "openapi-fetch";
import type { paths } from "./api.js";
const client = createClient<paths>();
export const identity = { agent_id: "a", agent_type: "a", issue_id: "b", project_id: "c" };
export const answer = """
OPTIONS = {
    "target": "es2022", "module": "nodenext", "lib": ["es2023", "dom", "dom.iterable"], "types": ["node"],
    "outDir": "out", "strict": True, "noUncheckedIndexedAccess": True, "exactOptionalPropertyTypes": True,
    "noImplicitReturns": True, "noUnusedLocals": True, "noPropertyAccessFromIndexSignature": True,
    "skipLibCheck": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(service: Service, modules: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with the client of the live document and the workflow, and what the compiler said."""
    folder = tmp_path_factory.mktemp("typescript")
    (folder / "node_modules").symlink_to(modules)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "tsconfig.json").write_text(json.dumps({"compilerOptions": OPTIONS}))
    shutil.copy(TYPESCRIPT / "workflow.ts", folder)
    for number, code in enumerate(WRONG.values()):
        (folder / f"wrong_{number}.ts").write_text(f"{HEAD}{code};\n")
    generated = run(modules / ".bin/openapi-typescript", f"{service.url}/openapi.json", "-o", "api.d.ts", cwd=folder)
    assert generated.returncode == 0 and not re.search("warn|error", generated.stderr, re.IGNORECASE), (
        generated.stdout + generated.stderr
    )
    return folder, run(modules / ".bin/tsc", "-p", ".", "--pretty", "false", cwd=folder).stdout


def test_the_workflow_holds_no_cast() -> None:
    text = (TYPESCRIPT / "workflow.ts").read_text()
    assert re.findall(f".*(?:{CASTS}).*", text) == []
    for cast in (
        "a as B", "x: any", "a!", "f()!.b", "b[0]!.c", "// @ts-ignore", "<A>b", "function f(a: A): a is B", "asserts a",
        "declare const x", "JSON.parse(a)", "a.json()",
    ):  # fmt: skip
        assert re.search(CASTS, cast), cast


def test_the_workflow_runs_on_a_client_that_compiles_strictly(
    service: Service, compiled: tuple[Path, str], issue: str
) -> None:
    folder, said = compiled
    assert [line for line in said.splitlines() if not line.startswith((" ", "wrong_"))] == []
    tokens = [service.token("python-specialist", permissions=ALL[:3]), service.token("test-engineer"), service.token()]
    done = run(needed("node"), folder / "out/workflow.js", service.url, *tokens, issue, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr + service.log[-3_000:]
    seen = json.loads(done.stdout)
    assert any(file.startswith("src/session_store.py python ") for file in seen.pop("files"))
    assert {"agent_completed", "implementation_complete"} <= set(seen.pop("kinds"))
    assert {"src/api.py", "tests/test_api.py"} <= set(seen.pop("created"))
    assert seen.pop("results") >= 2 and seen.pop("cleared") >= 1 and seen.pop("active") >= 0
    assert seen == {
        "branch": "main", "more": True, "proposed": ["test-engineer high", "security-auditor medium"], "changed": 2,
        "spawned": True, "state": "completed", "logs": "hello from an agent\n", "ending": True, "whole": "partial",
        "extra": ["main", "nobody yet"], "events": 1,
        "agents": [0], "refreshed": True, "openapi": "3.1.0", "code": "AUTH_001", "patience": 0,
    }  # fmt: skip


def test_the_compiler_finds_wrong_uses_of_the_client(compiled: tuple[Path, str]) -> None:
    refused = {int(number) for number in re.findall(r"^wrong_(\d+)\.ts\(", compiled[1], re.MULTILINE)}
    assert [name for number, name in enumerate(WRONG) if number not in refused] == []
    assert re.findall(r"^wrong_\d+\.ts\([1-4],.*", compiled[1], re.MULTILINE) == [], "what is around them is right"


# ---- The cache of what comes from npm --------------------------------------------------------------------------------


def test_what_npm_installs_is_installed_once(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npm, "fill", lambda *_: pytest.fail("it is there already"))
    assert npm.install(*PACKAGES).parent == modules and npm.install(*reversed(PACKAGES)).parent == modules
    assert (modules / ".bin/tsc").exists() and not list(npm.CACHE.glob("npm-*/new"))


def test_several_at_once_install_once_and_a_failed_installation_leaves_room_for_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun: list[Path] = []

    def fill(_: str, folder: Path, *__: Any) -> None:
        begun.append(folder)
        folder.mkdir()
        (folder / "package.json").write_text("{}")
        if len(begun) == 1:
            raise OSError("the disk is full")

    def install(_: int) -> Path | None:
        with contextlib.suppress(OSError):
            return npm.install("a@1.0.0")

    monkeypatch.setattr(npm, "CACHE", tmp_path)
    monkeypatch.setattr(npm, "fill", fill)
    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(install, range(6)))
    (place,) = (path for path in tmp_path.iterdir() if path.suffix != ".lock")
    assert len(begun) == 2 and outcomes.count(None) == 1 and outcomes.count(place / "node_modules/.bin") == 5
    assert [path.name for path in place.iterdir()] == ["package.json"] and len(list(tmp_path.iterdir())) == 2


def test_without_npm_or_its_registry_tests_are_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(npm, "CACHE", tmp_path)
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    with pytest.raises(pytest.skip.Exception, match="is not reachable"):
        npm.install("no-such-package@1.0.0")
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"], "nothing half-made is left"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="npm is not installed"):
        npm.install("no-such-package@1.0.0")

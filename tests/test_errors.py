"""Every refusal is JSON with its code, its time and its request id, however broken the request was."""

import ast
import contextlib
import gc
import gzip
import http.client
import json
import os
import re
import signal
import socket
import sqlite3
import threading
import time
import typing
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import PROJECT, ROOT, Client, Service, body_of, described, git, until

import cco_sidecar

ISO = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
MB = 1024 * 1024
RESULT = body_of()
EVENT = {"publisher": "tester", "topic": "test", "data": {}}
SPAWN = {"agent_type": "python-specialist", "issue_id": "issue-1", "task": "nothing"}


def check_error(answer: requests.Response, code: str, status: int | None = None) -> dict[str, Any]:
    """That ``answer`` is the documented error; its body."""
    expected, _ = cco_sidecar.ERRORS[code]
    assert answer.status_code == (status or expected), answer.text
    assert answer.headers["Content-Type"] == "application/json"
    body: dict[str, Any] = answer.json()
    assert body["code"] == code, body
    of_status = cco_sidecar.ERROR_OF_STATUS[status or expected]
    assert body["error"] == ("rate_limit_exceeded" if code == "RATE_001" else of_status)
    assert body["message"] and "\n" not in body["message"]
    assert re.fullmatch(ISO, body["timestamp"])
    assert body["request_id"].startswith("req-")
    assert answer.headers["X-Request-ID"] == body["request_id"]
    assert "Traceback" not in answer.text
    return body


def expired(service: Service) -> Client:
    now = int(time.time())
    return service.client("python-specialist", iat=now - 7200, exp=now - 3600)


def spent(service: Service) -> Client:
    """A client that has used up its burst."""
    client = service.client("documentation-expert")
    until(lambda: client.get("/status").status_code == 429)
    return client


def reused_key(service: Service) -> requests.Response:
    client, headers = service.client(), {"Idempotency-Key": "the same"}
    assert client.post("/api/events/ping", EVENT, headers=headers).status_code == 202
    return client.post("/api/events/ping", EVENT | {"topic": "other"}, headers=headers)


BY_CLIENT: dict[str, Callable[[Service], requests.Response]] = {
    "AUTH_001": lambda s: Client(s.url, "garbage").get("/status"),
    "AUTH_002": lambda s: expired(s).get("/status"),
    "AUTH_003": lambda s: s.client("documentation-expert").post("/api/results", RESULT),
    "CTX_002": lambda s: s.client().get("/api/context/issue-large/python-specialist", max_bytes=2000),
    "EVT_002": lambda s: s.client().post("/api/events/ping", {"topic": "test", "data": {}}),
    "EVT_003": lambda s: s.client().get(
        "/api/events/wait/ping", since=s.client().publish()["event_id"][:-6] + "999999", timeout=0
    ),
    "AGT_001": lambda s: s.client().post(
        "/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": "issue-1"}
    ),
    "AGT_002": lambda s: s.client().post("/api/results", RESULT | {"agent_type": "no-such-type"}),
    "RATE_001": lambda s: spent(s).get("/status"),
    "REQ_001": lambda s: s.client().post("/api/results", {}),
    "REQ_002": lambda s: s.client().get("/api/agents/agent-unknown/status"),
    "REQ_003": lambda s: s.client().request("PUT", "/api/results"),
    "REQ_004": lambda s: s.client().post("/api/events/ping", EVENT | {"data": {"text": "x" * MB}}),
    "REQ_005": lambda s: s.client().request(
        "POST", "/api/events/ping", data="data=1", headers={"Content-Type": "text/plain"}
    ),
    "REQ_006": reused_key,
    "REQ_007": lambda s: s.client().request("GET", "/health", headers={"Host": "evil.example"}),
}


@pytest.fixture(scope="module")
def plain(service: Service) -> Service:
    """The module's service, with what the table needs: no agent command, and a remote whose URL fills a context."""
    git(service.root, "remote", "set-url", "origin", f"https://github.com/{'x' * 2500}")
    return service


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, marks=[pytest.mark.needs_plugin("http/repeats compares bodies")] * (code == "REQ_006"))
        for code in BY_CLIENT
    ],
)
def test_a_clients_mistake_is_answered_with_its_code(plain: Service, code: str) -> None:
    check_error(BY_CLIENT[code](plain), code)


@pytest.fixture
def broken(make_service: Callable[..., Service]) -> Callable[..., Service]:
    """A factory of services one of whose tables or folders is gone."""

    def make(table: str = "", file: str = "") -> Service:
        service = make_service("--no-watch")
        if table:
            with contextlib.closing(sqlite3.connect(service.storage / "sidecar.db")) as database:
                database.execute(f"drop table {table}")
        if file:
            (service.storage / file).parent.mkdir(exist_ok=True)
            (service.storage / file).write_text("in the way")
        return service

    return make


@pytest.mark.parametrize(
    ("broken_part", "code", "send"),
    [
        ({"table": "event"}, "EVT_001", lambda s: s.client().post("/api/events/ping", EVENT)),
        ({"table": "result"}, "STR_001", lambda s: s.client().post("/api/results", RESULT)),
        ({"file": f"results/{PROJECT}"}, "STR_001", lambda s: s.client().post("/api/results", RESULT)),
        ({"table": "agent"}, "STR_002", lambda s: s.client().get("/api/agents/agent-1/status")),
        ({"table": "result"}, "CTX_001", lambda s: s.client().get("/api/context/issue-1/python-specialist")),
    ],
    ids=["event bus", "storage write", "result file", "storage read", "context"],
)
def test_a_failure_of_the_service_is_answered_with_its_code(
    broken: Callable[..., Service], broken_part: dict[str, str], code: str, send: Callable[[Service], requests.Response]
) -> None:
    service = broken(**broken_part)
    answer = send(service)
    check_error(answer, code)
    assert str(service.storage) not in answer.text and str(service.root) not in answer.text
    check_error(Client(service.url, None).get("/api/nothing"), "REQ_002")  # and it goes on


def test_every_error_code_is_covered_here() -> None:
    by_service = {"EVT_001", "STR_001", "STR_002", "CTX_001", "AGT_003"}
    before_the_request = {"REQ_008", "REQ_009"}  # test_malformed.py
    assert set(BY_CLIENT) | by_service | before_the_request == set(cco_sidecar.ERRORS)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (413, "content_too_large"), (414, "uri_too_long"), (422, "unprocessable_content"), (404, "not_found"),
        (409, "conflict"), (429, "too_many_requests"), (431, "request_header_fields_too_large"), (599, "bad_request"),
    ],
)  # fmt: skip
def test_the_word_of_another_status_is_the_same_in_each_version_of_python(status: int, error: str) -> None:
    assert cco_sidecar.ApiError("REQ_001", status=status).error == error


def test_what_is_wrong_is_told_in_a_fixed_order(service: Service) -> None:
    """Host, size, token, permission, body: each request has one fault less than the one before; the rate is
    test_limits.py's.
    """
    large, small = json.dumps(EVENT | {"data": {"text": "x" * MB}}), "not JSON"
    for client, host, content, code in [
        (Client(service.url, "garbage"), "evil.example", large, "REQ_007"),
        (Client(service.url, "garbage"), "localhost", large, "REQ_004"),
        (Client(service.url, "garbage"), "localhost", small, "AUTH_001"),
        (service.client("documentation-expert"), "localhost", small, "AUTH_003"),
        (service.client("python-specialist"), "localhost", small, "REQ_001"),
    ]:
        answer = client.request(
            "POST", "/api/events/ping", data=content, headers={"Host": host, "Content-Type": "application/json"}
        )
        check_error(answer, code)


# -- paths and methods


@pytest.mark.parametrize(
    "path",
    ["/api", "/api/", "/api/nothing", "/api/results/a/b", "/health/", "//health", "/api/context/issue-1", "/API/results",
     "/favicon.ico", "/api/context/a%2Fb/c/d", "/openapi-json"],
)  # fmt: skip
def test_unknown_paths_are_404_with_and_without_a_token(service: Service, path: str) -> None:
    for client in (Client(service.url, None), service.client()):
        refused = check_error(client.request("GET", path), "REQ_002")
        assert refused["message"] == "No such path, and no plugin in use adds it"


ALLOWED = {
    "/api/results": "GET, HEAD, OPTIONS, POST",
    "/api/results/result-1": "GET, HEAD, OPTIONS",
    "/api/context/issue-1/python-specialist": "GET, HEAD, OPTIONS",
    "/api/events/ping": "OPTIONS, POST",
    "/api/events/wait/ping": "GET, HEAD, OPTIONS",
    "/api/agents/spawn": "DELETE, OPTIONS, POST",
    "/api/agents/agent-1": "DELETE, OPTIONS",
    "/api/cache/context/issue-1": "DELETE, OPTIONS",
    "/api/cache/all": "DELETE, OPTIONS",
    "/api/auth/refresh": "OPTIONS, POST",
    "/health": "GET, HEAD, OPTIONS",
    "/status": "GET, HEAD, OPTIONS",
    "/openapi.json": "GET, HEAD, OPTIONS",
}


@pytest.mark.parametrize("path", described(ALLOWED))
def test_wrong_methods_are_405_and_say_which_are_right(service: Service, path: str, setup: str) -> None:
    client, allowed = Client(service.url, None), ALLOWED[path]
    if setup == "alone":  # without http/cors, and agents/end, by which an agent of the name spawn could be ended
        ours = {method for row in cco_sidecar.routes() if row.matched(path) for method in row.methods}
        allowed = ", ".join(method for method in allowed.split(", ") if method in ours)
    some = {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "OPTIONS"}
    for method in sorted(some - set(allowed.split(", "))):
        answer = client.request(method, path)
        refused = check_error(answer, "REQ_003")
        assert answer.headers["Allow"] == allowed
        assert refused["message"] == f"Only {allowed} here; no plugin in use adds more"
    if setup == "alone":
        return
    answer = client.request("OPTIONS", path)
    assert answer.status_code == 204
    assert answer.headers["Allow"] == allowed
    assert answer.headers["X-Request-ID"].startswith("req-")


IGNORED = [  # request, what the header names, what the log says
    ("GET", "/api/events/wait/ping?timout=5&timeout=0", None, "timout", "timout, did you mean timeout?"),
    ("GET", "/api/results?isue_id=a&isue_id=b&x%0d%0ay=1", None, "isue_id, x%0D%0Ay", "issue_id?; x%0D%0Ay"),
    ("GET", "/status?gr%C3%B6%C3%9Fe=1", None, "gr%C3%B6%C3%9Fe", "gr%C3%B6%C3%9Fe"),
    ("GET", f"/status?{'&'.join(f'x{n:02}=1' for n in range(30, 0, -1))}", None,
     ", ".join(f"x{n:02}" for n in range(1, 11)), "x10"),
    ("GET", "/status?issue_id=a", None, "issue_id", "issue_id"),
    ("POST", "/api/approvals?now=1", {"kind": "question", "text": "?", "timeout": 5}, "now, timeout",
     "timeout, did you mean timeout_seconds?"),
]  # fmt: skip


@pytest.mark.needs_plugin("http/ignored")
@pytest.mark.parametrize(("method", "target", "body", "named", "told"), IGNORED)
def test_what_an_endpoint_does_not_know_is_named_by_a_header_and_in_the_log(
    service: Service, method: str, target: str, body: Any, named: str, told: str
) -> None:
    """It is refused for none of that."""
    answer = service.client().request(method, target, json=body)
    assert answer.ok and answer.headers["X-Ignored"] == named, answer.text
    said = f"{answer.headers['X-Request-ID']} passed over: "
    until(lambda: any(said in line and told in line for line in service.log.splitlines()))


def test_what_an_endpoint_knows_or_keeps_is_not_named_as_ignored(service: Service, issue: str) -> None:
    client = service.client()
    event = {"publisher": "me", "topic": "t", "data": {}, "my_own": 1}
    result = {"agent_id": "a", "agent_type": "test-engineer", "issue_id": issue, "project_id": PROJECT, "mine": 1}
    for answer in (
        client.post("/api/events/ping", event),
        client.post("/api/results", result | {"result": {"status": "success", "own": {}}}),
        client.get("/api/events/wait/ping", timeout=0, filter="topic:t", since="earliest", limit=1),
        Client(service.url, None).request("GET", "/health?against-caches=1"),
    ):
        assert answer.ok and "X-Ignored" not in answer.headers, answer.headers


@pytest.mark.needs_plugin("agents/hooks")
def test_fields_of_what_a_coding_program_sends_unasked_are_not_named_as_ignored(service: Service) -> None:
    body = {"hook_event_name": "SessionStart", "session_id": "s-1", "its_own": 1}
    answer = service.client().post("/api/hooks/claude", body)
    assert answer.ok and "X-Ignored" not in answer.headers, answer.headers


def test_a_token_that_stands_for_a_parameters_name_is_not_logged(make_service: Callable[..., Service]) -> None:
    service = make_service("--log-level", "debug")
    client = service.client()
    request_id = client.get(f"/status?{client.token}").headers["X-Request-ID"]
    until(lambda: f"{request_id} GET /status 200" in service.log)
    assert client.token[:60] not in service.log


@pytest.mark.parametrize("method", ["TRACE", "PROPFIND", "PUT", "OPTIONS"])
def test_any_method_on_an_unknown_path_is_404(service: Service, method: str) -> None:
    check_error(Client(service.url, None).request(method, "/api/nothing"), "REQ_002")


def test_trace_echoes_nothing(service: Service) -> None:
    answer = service.client().request("TRACE", "/status", headers={"X-Secret": "do not echo"})
    check_error(answer, "REQ_003")
    assert "do not echo" not in answer.text


@pytest.mark.parametrize(
    "path",
    described("/health /status /openapi.json /api/results /api/context/issue-1/python-specialist".split()),
)
def test_head_is_get_without_its_body(service: Service, path: str) -> None:
    client = service.client()
    got, head = client.get(path), client.request("HEAD", path)
    assert head.status_code == got.status_code == 200
    assert head.content == b""
    assert head.headers["Content-Type"] == "application/json"
    assert int(head.headers["Content-Length"]) > 0
    assert set(got.headers) - {"Connection"} == set(head.headers) - {"Connection"}


def test_head_errors_have_no_body_either(service: Service) -> None:
    answer = Client(service.url, None).request("HEAD", "/status")
    assert (answer.status_code, answer.content) == (401, b"")
    assert answer.headers["X-Request-ID"].startswith("req-")


def test_head_on_a_wait_takes_no_event_away(architect: Client, issue: str) -> None:
    published = architect.publish("headed", {"issue_id": issue})
    head = architect.request("HEAD", f"/api/events/wait/headed?timeout=0&filter=issue_id:{issue}")
    assert (head.status_code, head.content) == (200, b"")
    got = architect.wait("headed", timeout=0, filter=f"issue_id:{issue}")
    assert [event["event_id"] for event in got["events"]] == [published["event_id"]]


BAD_PATHS = "%2e%2e .. a..b .hidden -x a%20b a%2Fb %00 a%0Ab %ff ü %F0%9F%92%A9 a;b".split()


@pytest.mark.parametrize("name", [*BAD_PATHS, "x" * 129])
def test_names_in_paths_that_are_no_identifiers_are_400(service: Service, name: str, setup: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(service.url.rpartition(":")[2]), timeout=10)
    token = service.token()
    for method, path in [
        ("GET", f"/api/context/{name}/python-specialist"), ("GET", f"/api/agents/{name}/status"),
        ("DELETE", f"/api/cache/context/{name}"), *[("DELETE", f"/api/agents/{name}")] * (setup != "alone"),
    ]:  # fmt: skip
        connection._encode_request = lambda line: line.encode("utf-8")  # type: ignore[attr-defined]  # as careless clients do
        connection.putrequest(method, path, skip_host=False)
        connection.putheader("Authorization", f"Bearer {token}")
        connection.endheaders()
        answer = connection.getresponse()
        body = json.loads(answer.read())
        assert (answer.status, body["code"]) == (400, "REQ_001"), (method, path, body)
    connection.close()


def numbers_in_queries() -> list[tuple[str, str]]:
    """(path, parameter) of every number and switch that a query may hold."""
    names = {
        "issue_id": "issue-1",
        "agent_type": "python-specialist",
        "event_type": "ping",
        "result_id": "none",
        "agent_id": "none",
    }
    return [
        (route.path.format_map(names), name)
        for route in cco_sidecar.routes() if route.method == "GET"
        for name, kind in typing.get_type_hints(route.endpoint.query_type or object).items() if {int, bool} & {kind, *typing.get_args(kind)}
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value", ["1e3", "1_000", " 5", "5 ", "+5", "5.0", "-0", "0x5", "٣", "５", "007", "null", "", "1e400"]
)
def test_a_number_in_a_query_is_written_in_digits(architect: Client, value: str) -> None:
    """JSON knows more spellings of a whole number, and Python still more: one of them is enough for an address."""
    asked = numbers_in_queries()
    assert {name for _, name in asked} >= set("timeout limit max_bytes max_tokens max_files".split())
    for path, name in asked:
        assert f"$.{name}" in check_error(architect.get(path, **{name: value}), "REQ_001")["message"], path


@pytest.mark.needs_plugin("agents/logs reads them")
@pytest.mark.parametrize("since", ["٣", "２0２５-0１-0１", "1e3"])
def test_a_place_in_an_output_is_written_in_digits(architect: Client, since: str) -> None:
    for name in ("since", "tail"):
        answer = architect.get("/api/agents/none/logs", **{name: since})
        assert f"$.{name}" in check_error(answer, "REQ_001")["message"]


@pytest.mark.parametrize("query", ["timeout=0&limit=1000", "timeout=0&unknown=1e3", "timeout=0&filter=issue_id:1e3"])
def test_digits_are_taken(architect: Client, query: str) -> None:
    assert architect.get(f"/api/events/wait/ping?{query}").status_code == 200


@pytest.mark.needs_plugin("agents/end has one")
@pytest.mark.parametrize("value", ["true", "False", "1", "0"])
def test_switches_are_taken(architect: Client, value: str) -> None:
    assert architect.delete(f"/api/agents/none?force={value}").status_code == 404


# -- bodies


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"not json", b'{"a": 1,}', b"{'a': 1}", b'{"a": NaN}', b"\xff\xfe", b'{"a": "\xff"}', b'{"a": "\\ud800"}', b'{"a": 1} trailing',
     b"null", b"[]", b'"text"', b"1", b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
@pytest.mark.parametrize(
    ("path", "code"), [("/api/results", "REQ_001"), ("/api/events/ping", "EVT_002"), ("/api/agents/spawn", "REQ_001")]
)
def test_bodies_that_are_no_json_object_are_400(architect: Client, path: str, code: str, body: bytes) -> None:
    answer = architect.request("POST", path, data=body, headers={"Content-Type": "application/json"})
    is_json = body in (b"null", b"[]", b'"text"', b"1")
    check_error(answer, code if is_json else "REQ_001")


def test_nesting_is_either_stored_or_refused_and_never_a_failure(architect: Client, issue: str) -> None:
    outcomes = set()
    result = json.dumps(RESULT | {"issue_id": issue})
    for depth in (10, 100, *range(880, 1010, 5), 2_000, 300_000):
        for path, start, good in (
            ("/api/events/ping", json.dumps(EVENT)[:-2], 202),
            ("/api/results", result[:-1] + ', "more": {', 201),
        ):
            body = start + '"a":' + "[" * depth + "]" * depth + "}}"
            answer = architect.request("POST", path, data=body, headers={"Content-Type": "application/json"})
            assert answer.status_code in (good, 400), (depth, answer.text)
            outcomes.add(answer.status_code)
    assert outcomes == {201, 202, 400}
    assert architect.get("/api/events/wait/ping", since="earliest", limit=1000, timeout=0).status_code == 200
    assert architect.get(f"/api/context/{issue}/test-engineer").status_code == 200


@pytest.mark.parametrize(
    "number", ["1e999", "-1e999", "1" * 30, "-" + "9" * 400, "0." + "1" * 5000, "1e-999"], ids=lambda number: number[:8]
)
def test_extreme_numbers_are_either_kept_or_refused_and_never_a_failure(architect: Client, number: str) -> None:
    for path, body, good in (
        ("/api/events/ping", json.dumps(EVENT)[:-2] + f'"n": {number}}}}}', 202),
        ("/api/results", json.dumps(RESULT)[:-1] + f', "n": {number}}}', 201),
    ):
        answer = architect.request("POST", path, data=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (good, 400), answer.text


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json"]
)
def test_other_media_types_are_415(architect: Client, media_type: str) -> None:
    for path in ("/api/results", "/api/events/ping", "/api/agents/spawn"):
        check_error(
            architect.request("POST", path, data=json.dumps(RESULT), headers={"Content-Type": media_type}), "REQ_005"
        )


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "identity, gzip", "nonsense"])
def test_compressed_bodies_are_415(architect: Client, coding: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    answer = architect.request(
        "POST", "/api/events/ping", data=gzip.compress(b" " * 10_000_000 + b"{}"), headers=headers
    )
    check_error(answer, "REQ_005")
    assert answer.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("media_type", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON"])
def test_json_by_any_spelling_is_taken(architect: Client, media_type: str) -> None:
    answer = architect.request("POST", "/api/events/ping", data=json.dumps(EVENT), headers={"Content-Type": media_type})
    assert answer.status_code == 202


def test_a_bad_field_is_named_by_its_path(architect: Client) -> None:
    def named(path: str, body: Any) -> tuple[str, str]:
        answer = check_error(architect.post(path, body), "EVT_002" if "events" in path else "REQ_001")
        return answer["details"]["path"], answer["message"]

    files = ["a", {"path": "b"}, "c"]
    for change, path in [
        ({"result": {"status": "great"}}, "result.status"),
        ({"result": {}}, "result.status"),
        ({"result": []}, "result"),
        ({"result": {"status": "success", "files_created": [1]}}, "result.files_created[0]"),
        ({"result": {"status": "success", "files_created": [{"path": 1}]}}, "result.files_created[0].path"),
        ({"result": {"status": "success", "files_modified": [*files, {"size": 1}]}}, "result.files_modified[3].path"),
        (
            {"result": {"status": "success", "files_deleted": [*files, {"path": "d", "size": "big"}]}},
            "result.files_deleted[3].size",
        ),
        ({"result": {"status": "success", "decisions": "one"}}, "result.decisions"),
        ({"result": {"status": "success", "decisions": ["one", 2]}}, "result.decisions[1]"),
        ({"result": {"status": "success", "metrics": {"tokens_used": "many"}}}, "result.metrics.tokens_used"),
        ({"result": {"status": " - at `$.nowhere`"}}, "result.status"),
        ({"agent_id": "../etc"}, "agent_id"),
        ({"issue_id": 1}, "issue_id"),
    ]:
        told, message = named("/api/results", RESULT | change)
        assert told == path and f"`$.{path}`" in message
    for kind, body in (("/api/results", RESULT), ("/api/events/ping", EVENT), ("/api/agents/spawn", SPAWN)):
        for missing in body if kind != "/api/agents/spawn" else ("agent_type", "issue_id"):
            told, message = named(kind, {name: value for name, value in body.items() if name != missing})
            assert told == missing and f"`{missing}`" in message
        assert named(kind, [body])[0] == "$"


@pytest.mark.needs_plugin("http/choices names them")
@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/api/results", RESULT | {"result": {"status": "done"}}, "'done' is none of failed, partial, success - at "),
        ("/api/results", RESULT | {"result": {"status": " - at `$.x`"}}, "' - at `$.x`' is none of failed, partial, success"),
        ("/api/events/ping", EVENT | {"priority": "urgent"}, "'urgent' is none of critical, high, low, normal - at "),
        ("/api/agents/spawn", SPAWN | {"priority": "now"}, "'now' is none of critical, high, low, medium, normal - at "),
        (
            "/api/agents/spawn",
            SPAWN | {"permissions": ["read_context", "fly"]},
            "'fly' is none of publish_events, read_context, spawn_agents, write_results - at `$.permissions[1]`",
        ),
        ("/api/agents?status=gone", None, "'gone' is none of active, completed, failed - at `$.status`"),
        ("/api/results?status=done", None, "'done' is none of failed, partial, success - at `$.status`"),
        ("/api/results", RESULT | {"issue_id": "#7"}, "must be letters, digits, '.', '_' or '-', 128 at most, with a letter or digit first and no '..' - at `$.issue_id`"),
        ("/api/agents/spawn", SPAWN | {"issue_id": "a..b"}, "with a letter or digit first and no '..' - at `$.issue_id`"),
        ("/api/events/ping", EVENT | {"event_type": "A B"}, "must be small letters, digits, '.', '_' or '-', 64 at most, with a letter first - at `$.event_type`"),
        ("/api/agents?issue_id=a+b", None, "must be letters, digits, '.', '_' or '-', 128 at most"),
        ("/api/events/ping", EVENT | {"priority": 5}, "Expected `str`, got `int` - at `$.priority`"),
        ("/api/events/ping", EVENT | {"topic": 5}, "Expected `str`, got `int` - at `$.topic`"),
    ],
)  # fmt: skip
def test_a_refusal_says_in_words_what_may_stand_there(architect: Client, path: str, body: Any, said: str) -> None:
    answer = architect.post(path, body) if body else architect.get(path)
    assert answer.status_code == 400 and said in answer.json()["message"], answer.text


@pytest.mark.parametrize(
    ("change", "path"),
    [
        *(
            pytest.param(*row, marks=pytest.mark.needs_plugin("agents/environment says which of them it is"))
            for row in [
                ({"environment": {"GOOD": "1", "BAD": 2, "FINE": "3"}}, "environment.BAD"),
                ({"environment": {"GOOD": "1", "A=B": "2"}}, 'environment["A=B"]'),
                (
                    {"environment": {f"V{n}": "x" for n in range(1000)} | {"V617": "\0", "V900": None}},
                    "environment.V617",
                ),
                ({"environment": {"a\nb": 1}}, 'environment["a\\nb"]'),
            ]
        ),
        ({"environment": []}, "environment"),
        ({"permissions": ["read_context", "fly"]}, "permissions[1]"),
        pytest.param(
            {"context_requirements": ["metadata", "gossip"]},
            "context_requirements[1]",
            marks=pytest.mark.needs_plugin("agents/requirements refuses what is no section"),
        ),
        ({"context_requirements": ["metadata", 3]}, "context_requirements[1]"),
        ({"priority": "urgent"}, "priority"),
        ({"issue_only": "no"}, "issue_only"),
    ],
)
def test_a_bad_field_of_a_spawn_is_named_by_its_path(architect: Client, change: dict[str, Any], path: str) -> None:
    answer = check_error(architect.post("/api/agents/spawn", SPAWN | change), "REQ_001")
    assert answer["details"]["path"] == path and path in answer["message"] and "\n" not in answer["message"]


@pytest.mark.parametrize(
    ("method", "url", "path", "code"),
    described([
        ("GET", "/api/results?limit=0", "limit", "REQ_001"), ("GET", "/api/results?limit=1001", "limit", "REQ_001"),
        ("GET", "/api/results?status=nice", "status", "REQ_001"), ("GET", "/api/results?since=x", "since", "REQ_001"),
        ("GET", "/api/agents?state=asleep", "state", "REQ_001"), ("GET", "/api/agents?status=done", "status", "REQ_001"),
        ("GET", "/api/agents?since=x", "since", "REQ_001"), ("GET", "/api/events?dead=maybe", "dead", "REQ_001"),
        ("GET", "/api/events?since=yesterday", "since", "REQ_001"), ("GET", "/api/events?type=Bad", "type", "REQ_001"),
        *[("GET", f"/api/events/wait/ping?timeout={timeout}", "timeout", "REQ_001") for timeout in ("soon", "-1", "300001", "1.5")],
        *[("GET", f"/api/events/wait/ping?since={since}", "since", "REQ_001")
          for since in ("x", "evt-1", "-1", "0", "evt-zzzzzzzz-000000000001", "evt-00000000-1", "Earliest", "evt-00000000-00000000000१")],
        ("GET", "/api/events/wait/ping?filter=a==b", "filter", "EVT_002"),
        *[("GET", f"/api/events/wait/{name}", "event_type", "EVT_002") for name in ("Bad", "1st", "a b", "a" * 65, "a%2fb")],
        ("GET", "/api/context/-x/test-engineer", "issue_id", "REQ_001"), ("GET", "/api/context/issue-1/wizard", "agent_type", "AGT_002"),
        ("GET", "/api/context/issue-1/test-engineer?max_files=many", "max_files", "REQ_001"),
        ("GET", "/api/context/issue-1/test-engineer?max_bytes=1", "max_bytes", "REQ_001"),
        ("GET", "/api/context/issue-1/test-engineer?task=%ff", "", "REQ_001"),
        ("DELETE", "/api/agents/agent-1?force=perhaps", "force", "REQ_001"),
        ("DELETE", "/api/cache/context/issue-1?agent_type=..", "agent_type", "REQ_001"),
    ]),
)  # fmt: skip
def test_a_bad_part_of_a_url_is_named_by_its_path(
    architect: Client, method: str, url: str, path: str, code: str
) -> None:
    refused = check_error(architect.request(method, url), code, 404 if code == "AGT_002" else None)
    assert refused.get("details", {}).get("path", "") == path  # "": the whole query is no text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": []}, "$.data"), ({"data": None}, "$.data"), ({"topic": ""}, "$.topic"), ({"publisher": 1}, "$.publisher"),
        ({"ttl_seconds": 0}, "$.ttl_seconds"), ({"ttl_seconds": 86401}, "$.ttl_seconds"),
        ({"ttl_seconds": "60"}, "$.ttl_seconds"), ({"priority": "urgent"}, "$.priority"),
        ({"event_type": "pong"}, "pong"), ({"event_type": "Bad Type"}, "$.event_type"),
    ],
)  # fmt: skip
def test_a_bad_event_is_refused_with_the_events_own_code(architect: Client, change: dict[str, Any], named: str) -> None:
    answer = check_error(architect.post("/api/events/ping", EVENT | change), "EVT_002")
    assert named in answer["message"] and answer["details"]["path"] == next(iter(change))


# -- sizes and broken connections: a raw socket shows what a client library would hide


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=10)


def head_of(service: Service, method: str, path: str, *headers: str, token: str | None = None) -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {token or service.token()}",
        "Content-Type: application/json",
    ]
    return "\r\n".join([*lines, *headers, "", ""]).encode()


def read_answer(connection: socket.socket) -> tuple[int, http.client.HTTPMessage, dict[str, Any]]:
    """(status, headers, JSON body) of the next answer on a socket."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, answer.headers, json.loads(answer.read())


@pytest.mark.parametrize(
    ("path", "limit"), [("/api/results", 32 * MB), ("/api/events/ping", MB), ("/api/agents/spawn", MB)]
)
def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent(
    service: Service, path: str, limit: int
) -> None:
    with connect(service) as connection:
        connection.sendall(head_of(service, "POST", path, f"Content-Length: {limit + 1}"))
        status, headers, body = read_answer(connection)
        assert (status, body["code"], headers["X-Request-ID"]) == (413, "REQ_004", body["request_id"])
        assert str(limit) in body["message"]
        assert headers["Connection"] == "close"


def test_a_client_that_asks_before_sending_too_much_gets_one_answer(service: Service) -> None:
    with connect(service) as connection:
        connection.sendall(
            head_of(service, "POST", "/api/events/ping", f"Content-Length: {2 * MB}", "Expect: 100-continue")
        )
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert received.startswith(b"HTTP/1.1 413 ")
    assert received.count(b"HTTP/1.1 ") == 1, received


def test_a_client_that_asks_before_sending_is_told_to_go_on(service: Service) -> None:
    content = json.dumps(EVENT).encode()
    with connect(service) as connection:
        connection.sendall(
            head_of(service, "POST", "/api/events/ping", f"Content-Length: {len(content)}", "Expect: 100-continue")
        )
        until(lambda: b"100" in connection.recv(100))
        connection.sendall(content)
        assert read_answer(connection)[0] == 202


@pytest.mark.parametrize(("size", "status"), [(MB, 202), (MB + 1, 413)])
def test_the_limit_of_a_body_is_exact(architect: Client, size: int, status: int) -> None:
    empty = json.dumps(EVENT | {"data": {"text": ""}})
    body = json.dumps(EVENT | {"data": {"text": "x" * (size - len(empty))}})
    assert len(body) == size
    for sent in (body, iter([body[:1000].encode(), body[1000:].encode()])):  # with its length, and chunked
        answer = architect.request("POST", "/api/events/ping", data=sent, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, answer.text


def test_a_chunked_body_without_end_is_refused_and_cut_off(service: Service) -> None:
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with connect(service) as connection:
        connection.sendall(head_of(service, "POST", "/api/events/ping", "Transfer-Encoding: chunked"))
        sent = 0
        with pytest.raises(OSError):
            while sent < 512 * MB:
                connection.sendall(chunk)
                sent += len(chunk)
        assert sent < 64 * MB


@pytest.mark.needs_plugin("http/strict reads on after an answer that came early")
def test_a_chunked_body_that_is_too_large_is_answered(service: Service) -> None:
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with connect(service) as connection:
        connection.sendall(head_of(service, "POST", "/api/events/ping", "Transfer-Encoding: chunked"))
        for _ in range(17):
            connection.sendall(chunk)
        status, _, body = read_answer(connection)
        assert (status, body["code"]) == (413, "REQ_004")


@pytest.mark.needs_plugin("http/strict reads on after an answer that came early")
def test_who_sends_a_long_body_before_reading_is_told_why_it_is_refused(service: Service) -> None:
    for _ in range(5):
        with connect(service) as connection:
            head = head_of(service, "POST", "/api/results", f"Content-Length: {4 * MB}", token="garbage")
            connection.sendall(head + b"x" * 4 * MB)
            status, headers, body = read_answer(connection)
            assert (status, body["code"], headers["Connection"]) == (401, "AUTH_001", "close")


def test_a_large_body_without_a_good_token_is_refused_at_once(service: Service) -> None:
    for headers in (["Transfer-Encoding: chunked"], [f"Content-Length: {30 * MB}"]):
        with connect(service) as connection:
            connection.sendall(head_of(service, "POST", "/api/results", *headers, token="garbage"))
            status, _, body = read_answer(connection)
            assert (status, body["code"]) == (401, "AUTH_001")


def test_the_connection_goes_on_after_a_small_refused_body(service: Service) -> None:
    content = json.dumps(RESULT).encode()
    with connect(service) as connection:
        for _ in range(3):
            connection.sendall(
                head_of(service, "POST", "/api/results", f"Content-Length: {len(content)}", token="garbage") + content
            )
            assert read_answer(connection)[0] == 401
        connection.sendall(head_of(service, "GET", "/status"))
        assert read_answer(connection)[0] == 200


@pytest.mark.parametrize(
    "headers", [["Content-Length: 1000"], ["Transfer-Encoding: chunked"]], ids=["length", "chunked"]
)
def test_a_body_that_is_cut_off_changes_nothing(service: Service, headers: list[str], issue: str) -> None:
    content = json.dumps(RESULT | {"issue_id": issue}).encode()
    half = content if "chunked" not in headers[0] else b"%x\r\n%s\r\n" % (len(content), content)
    before = len(service.log)
    with connect(service) as connection:
        connection.sendall(head_of(service, "POST", "/api/results", *headers) + half)
    until(lambda: "POST /api/results 499" in service.log[before:])
    context = service.client().get(f"/api/context/{issue}/test-engineer").json()["context"]
    assert context["previous_agent_outputs"] == []


def test_hang_ups_leave_no_traceback_in_the_log(service: Service) -> None:
    """While headers are sent, while a body is sent, while a poll waits, while an answer is written."""
    before = len(service.log)
    for sent in (
        b"GET /hea", b"GET /health HTTP/1.1\r\nHost: loc", head_of(service, "POST", "/api/results", "Content-Length: 99999999"),
        head_of(service, "POST", "/api/events/ping", "Content-Length: 10") + b"{", head_of(service, "GET", "/api/events/wait/never?timeout=60000"),
        head_of(service, "GET", "/api/context/issue-1/python-specialist") * 5, b"\x16\x03\x01\x02\x00\x01\x00", b"\r\n\r\n", b"nonsense\r\n\r\n",
    ):  # fmt: skip
        for reset in (True, False):
            with connect(service) as connection:
                if reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                connection.sendall(sent)
    until(lambda: service.log[before:].count("/api/events/wait/never 499") == 2)
    assert service.client().get("/status").json()["events"]["active_subscriptions"] == 0
    assert "Traceback" not in service.log[before:], service.log[before:]


def test_polls_whose_clients_reset_the_connection_behind_their_head_are_forgotten(service: Service) -> None:
    for number in range(201):
        with connect(service) as connection:
            if number < 200:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(head_of(service, "GET", f"/api/events/wait/reset-{number}?timeout=60000"))
    until(lambda: "/api/events/wait/reset-200 499" in service.log)
    until(lambda: service.client().get("/status").json()["events"]["active_subscriptions"] == 0)


def test_a_client_that_is_gone_before_its_request_was_read_is_forgotten(service: Service, architect: Client) -> None:
    """A head and the end behind it come while the service is busy: both are there when it looks again."""
    before = len(service.log)
    for _ in range(10):
        with connect(service) as connection:
            connection.sendall(head_of(service, "GET", "/health"))
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
            os.kill(service.process.pid, signal.SIGSTOP)
            connection.sendall(head_of(service, "GET", "/api/events/wait/gone?timeout=60000"))
        os.kill(service.process.pid, signal.SIGCONT)
    until(lambda: service.log[before:].count("/api/events/wait/gone 499") == 10)
    assert architect.get("/status").json()["events"]["active_subscriptions"] == 0


# -- repeats


@pytest.fixture
def endpoints(
    make_service: Callable[..., Service], tmp_path: Path
) -> Iterator[tuple[Client, list[tuple[str, dict[str, Any], int]]]]:
    agent = f"sh -c 'touch {tmp_path}/{{agent_id}}; exec sleep 60'"  # lives on: a repeat tells of an agent's end
    service = make_service("--agent-command", agent, "--stop-agents")
    yield service.client(), [
        ("/api/results", RESULT, 201), ("/api/events/ping", EVENT, 202),
        ("/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": "issue-1"}, 201),
    ]  # fmt: skip


@pytest.mark.needs_plugin("http/repeats answers them")
def test_a_repeat_with_the_same_key_is_answered_again_and_not_done_again(endpoints: tuple[Client, list[Any]]) -> None:
    client, table = endpoints
    for path, body, status in table:
        first, second = (client.post(path, body, headers={"Idempotency-Key": "k-1"}) for _ in range(2))
        assert first.status_code == second.status_code == status
        assert "Idempotent-Replay" not in first.headers
        assert second.headers["Idempotent-Replay"] == "true"
        assert first.json() == second.json()
        check_error(client.post(path, body | {"more": 1}, headers={"Idempotency-Key": "k-1"}), "REQ_006")
        assert client.post(path, body, headers={"Idempotency-Key": "k-1"}).json() == first.json()
        third = client.post(path, body, headers={"Idempotency-Key": "k-2"})
        assert third.status_code == status
        assert third.json() != first.json()
    status = client.get("/status").json()
    assert (status["storage"]["results_stored"], status["agents"]["spawned_total"]) == (2, 2)
    assert len(client.wait("ping", since="earliest", timeout=0)["events"]) == 2


@pytest.mark.needs_plugin("http/repeats answers them")
def test_repeats_at_the_same_time_are_done_once(endpoints: tuple[Client, list[Any]]) -> None:
    client, table = endpoints
    for path, body, status in table:
        answers: list[requests.Response] = []

        def send(path: str = path, body: Any = body, answers: list[requests.Response] = answers) -> None:
            answers.append(Client(client.url, client.token).post(path, body, headers={"Idempotency-Key": "at once"}))

        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert [answer.status_code for answer in answers] == [status] * 8
        assert len({answer.text for answer in answers}) == 1
        assert sum("Idempotent-Replay" in answer.headers for answer in answers) == 7


def test_a_request_with_a_key_is_never_done_twice(setup: str, architect: Client, issue: str) -> None:
    event, result = EVENT | {"data": {"issue_id": issue}}, RESULT | {"issue_id": issue}
    for path, body in (("/api/events/ping", event), ("/api/results", result)):
        answers = [architect.post(path, body, headers={"Idempotency-Key": issue}) for _ in range(2)]
        if setup == "alone":
            assert ["plugin repeats" in check_error(answer, "REQ_001")["message"] for answer in answers] == [True, True]
        else:
            assert answers[0].ok and answers[0].text == answers[1].text
    stored = architect.wait("*", since="earliest", filter=f"issue_id:{issue}", timeout=0)["events"]
    types = [event["event_type"] for event in stored if event["event_type"] in ("ping", "agent_completed")]
    assert types == ([] if setup == "alone" else ["ping", "agent_completed"])


@pytest.mark.needs_plugin("http/repeats answers them")
def test_a_refused_request_does_not_use_up_its_key(architect: Client) -> None:
    headers = {"Idempotency-Key": "after a mistake"}
    check_error(architect.post("/api/results", RESULT | {"agent_type": "no-such-type"}, headers=headers), "AGT_002")
    assert architect.post("/api/results", RESULT, headers=headers).status_code == 201


@pytest.mark.needs_plugin("http/repeats reads them")
@pytest.mark.parametrize("key", ["", "x" * 256, "tab\there", "ü"], ids=["empty", "long", "tab", "not ASCII"])
def test_a_key_that_is_no_key_is_400(architect: Client, key: str) -> None:
    check_error(architect.post("/api/events/ping", EVENT, headers={"Idempotency-Key": key.encode()}), "REQ_001")


class Answering:
    """What ``Handler.error_content`` needs of the answer to a request."""

    allowance: typing.ClassVar[dict[str, str]] = {}
    request_id = "req-1"
    error: cco_sidecar.ApiError | None = None
    clear_header = set_status = set_header = lambda self, *values: None

    def refuse(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except cco_sidecar.ApiError as error:
            cco_sidecar.Handler.error_content(typing.cast(Any, self), error)


def garbage() -> None:
    try:
        json.loads("garbage")
    except ValueError:
        raise cco_sidecar.ApiError("REQ_001") from None


@pytest.mark.parametrize(
    "work",
    [
        garbage,
        lambda: cco_sidecar.convert({"limit": "x"}, cco_sidecar.WaitQuery, strict=False),
        lambda: cco_sidecar.EventBus.parse(typing.cast(Any, None), "a"),
        lambda: cco_sidecar.Tokens.decode(typing.cast(Any, None), "no token", "key" * 20, "HS256", cco_sidecar.Claims),
    ],
    ids=["body", "query", "filter", "token"],
)
def test_a_refused_request_is_gone_as_soon_as_it_is_answered(work: Callable[[], Any]) -> None:
    collecting = gc.isenabled()
    gc.disable()
    try:
        answering = Answering()
        answering.refuse(work)
        assert answering.error
        gone = weakref.ref(answering)
        del answering
        assert gone() is None
    finally:
        if collecting:
            gc.enable()


def test_whoever_takes_what_is_no_json_takes_what_is_no_text_too() -> None:
    """msgspec says of broken JSON that it is a DecodeError, of bytes that are no UTF-8 something else."""
    for file in (cco_sidecar.__file__, *sorted(map(str, (ROOT / "plugins").rglob("*.py")))):
        for node in ast.walk(ast.parse(Path(file).read_text())):
            caught = node.type if isinstance(node, ast.ExceptHandler) else None
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "contextlib.suppress":
                caught = ast.Tuple(node.args)
            named = ast.unparse(caught) if caught else ""
            assert "DecodeError" not in named.replace("UnicodeDecodeError", "").replace("TOMLDecodeError", "") or (
                re.search(r"UnicodeDecodeError|\bValueError", named)
            ), f"{file}:{getattr(node, 'lineno', '')}: {named}"

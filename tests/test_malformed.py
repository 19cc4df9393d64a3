"""What is no well-formed HTTP within bounds is refused in JSON, audited, and the line is closed; what looks odd and is
right is served.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, Client, Service, plugin, serving, until

from cco_sidecar import ApiError

check_head = plugin("strict").check_head

EVENT = json.dumps({"publisher": "tester", "topic": "test", "data": {}}).encode()
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /api/events/ping HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAuthorization: Bearer TOKEN\r\n"
WORDS = {413: "payload_too_large", 414: "uri_too_long"}  # for which each version of Python has others
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=20)


def read_all(line: socket.socket) -> bytes:
    answer = b""
    while chunk := line.recv(65_536):
        answer += chunk
    return answer


def exchange(service: Service, request: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
    """(status, headers, body) of the one answer on a line of its own, which the service then closes."""
    with connect(service) as line:
        line.sendall(request.replace(b"TOKEN", service.token().encode()))
        answer = read_all(line)
    head, _, content = answer.partition(b"\r\n\r\n")
    first, *fields = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
    assert int(headers["content-length"]) == len(content), "one answer, and nothing behind it"
    return int(first.split()[1]), headers, json.loads(content)


def check_refusal(service: Service, request: bytes, status: int, code: str) -> None:
    got, headers, body = exchange(service, request)
    assert (got, body["code"]) == (status, code), body
    assert (
        body["message"]
        and body["timestamp"]
        and body["error"] == WORDS.get(status, re.sub("[^a-z]+", "_", HTTPStatus(status).phrase.lower()))
    )
    assert (headers["connection"], headers["content-type"]) == ("close", "application/json")
    assert headers["x-request-id"] == body["request_id"]
    assert (headers["x-content-type-options"], headers["cache-control"], headers["server"]) == (
        "nosniff",
        "no-store",
        "cco-sidecar",
    )
    lines = until(lambda: [line for line in service.audit() if line["request_id"] == body["request_id"]])
    assert [(line["status"], line["outcome"], line["code"], line["reason"]) for line in lines] == [
        (status, "refused", code, body["message"])
    ]
    assert lines[0]["remote"] == "127.0.0.1"


MALFORMED = {
    "no request": b"GARBAGE\r\n\r\n",
    "empty lines": b"\r\n\r\n\r\n",
    "no version": b"GET /health\r\nHost: localhost\r\n\r\n",
    "version 2": b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n",
    "version in lower case": b"GET /health http/1.1\r\nHost: localhost\r\n\r\n",
    "two spaces": b"GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tabs": b"GET\t/health\tHTTP/1.1\r\nHost: localhost\r\n\r\n",
    "space before the method": b" GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "control character in the target": b"GET /hea\x01lth HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": GET + b"Host: localhost\r\n\r\n",
    "two hosts in one": b"GET /health HTTP/1.1\r\nHost: localhost, evil.example\r\n\r\n",
    "host that is none": b"GET /health HTTP/1.1\r\nHost: local host\r\n\r\n",
    "bare LF everywhere": b"GET /health HTTP/1.1\nHost: localhost\n\n",
    "bare LF after one line": GET + b"X: 1\nY: 2\r\n\r\n",
    "bare LF before a smuggled field": GET + b"X: 1\nTransfer-Encoding: chunked\r\n\r\n",
    "bare CR": GET + b"X: 1\rY: 2\r\n\r\n",
    "NUL in a value": GET + b"X: a\0b\r\n\r\n",
    "DEL in a value": GET + b"X: a\x7fb\r\n\r\n",
    "NUL in a name": GET + b"X\0: a\r\n\r\n",
    "folded line": GET + b"X: 1\r\n folded\r\n\r\n",
    "folded first line": b"GET /health HTTP/1.1\r\n Host: localhost\r\n\r\n",
    "space before the colon": GET + b"X : 1\r\n\r\n",
    "no colon": GET + b"X\r\n\r\n",
    "no name": GET + b": 1\r\n\r\n",
    "length no number": POST + b"Content-Length: abc\r\n\r\nhello",
    "length negative": POST + b"Content-Length: -1\r\n\r\n",
    "length with plus": POST + b"Content-Length: +5\r\n\r\nhello",
    "length hexadecimal": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "length empty": POST + b"Content-Length: \r\n\r\n",
    "length endless": POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
    "lengths that differ": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "lengths that agree": POST + b"Content-Length: 5\r\ncontent-length: 5\r\n\r\nhello",
    "lengths in one": POST + b"Content-Length: 5, 5\r\n\r\nhello",
    "length and chunks": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "another coding": POST + b"Transfer-Encoding: gzip\r\n\r\nhello",
    "two codings": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked with a strange blank": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk size no number": CHUNKED + b"xyz\r\n\r\n",
    "chunk size negative": CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
    "chunk size with plus": CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n",
    "chunk size with 0x": CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n",
    "chunk size with a blank": CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n",
    "chunk size empty": CHUNKED + b"\r\nhello\r\n0\r\n\r\n",
    "chunk size endless": CHUNKED + b"0" * 2000 + b"5\r\nhello\r\n0\r\n\r\n",
    "chunk size with bare LF": CHUNKED + b"15\nhello\r\n0\r\n\r\n",
    "chunk longer than its size": CHUNKED + b"3\r\nhello\r\n0\r\n\r\n",
    "chunk extension with NUL": CHUNKED + b"5;a\0b\r\nhello\r\n0\r\n\r\n",
    "chunk extension endless": CHUNKED + b"5;" + b"a" * 5000 + b"\r\nhello\r\n0\r\n\r\n",
    "chunk extensions without end": CHUNKED + (b"1;" + b"a" * 1000 + b"\r\n \r\n") * 17 + b"0\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_http_gets_one_json_refusal(service: Service, name: str) -> None:
    check_refusal(service, MALFORMED[name], 400, "REQ_001")
    assert "Traceback" not in service.log


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET /health?" + b"a" * 200_000, 414),
        (b"A" * 100_000, 414),
        (GET + b"X: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (GET + b"X: 1\r\n" * 20_000 + b"\r\n", 431),
        (GET + b"X: " + b"a" * 1_000_000, 431),
    ],
)
def test_what_is_too_long_before_the_body_is_told_so(service: Service, request_bytes: bytes, status: int) -> None:
    check_refusal(service, request_bytes, status, "REQ_004")


def test_long_heads_within_the_limit_are_served_however_they_are_cut(service: Service) -> None:
    head = GET + b"X: " + b"a" * 60_000 + b"\r\nConnection: close\r\n\r\n"
    assert exchange(service, head)[0] == 200
    with connect(service) as line:
        for start in range(0, len(head), 7_001):
            line.sendall(head[start : start + 7_001])
        assert read_all(line).startswith(b"HTTP/1.1 200 ")


def test_a_long_body_right_behind_a_short_head_is_no_long_head(service: Service) -> None:
    body = json.dumps({"publisher": "tester", "topic": "test", "data": {"text": "x" * 500_000}}).encode()
    assert exchange(service, POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)[0] == 202


GOOD = {
    "one chunk": CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(EVENT), EVENT),
    "chunk extensions": CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    + b'%X ;a="b;c";d\r\n%b\r\n0;last\r\n\r\n' % (len(EVENT), EVENT),
    "a byte at a time": CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    + b"".join(b"1\r\n%c\r\n" % byte for byte in EVENT) + b"0\r\n\r\n",
    "an empty line before": b"\r\n" + POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(EVENT) + EVENT,
    "names in any case": POST.replace(b"Host", b"hOST") + b"connection: CLOSE\r\ncontent-LENGTH:%d\r\n\r\n" % len(EVENT) + EVENT,
    "the whole URL": POST.replace(b"/api", b"http://127.0.0.1:3001/api") + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(EVENT) + EVENT,
    "HTTP/1.0": POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Content-Length: %d\r\n\r\n" % len(EVENT) + EVENT,
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_is_odd_but_right_is_served(service: Service, name: str) -> None:
    status, _, body = exchange(service, GOOD[name])
    assert status == 202, body


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        (b"http://127.0.0.1:3001/health", b"127.0.0.1:3001", 200), (b"http://localhost/health?x=1", b"localhost", 200),
        (b"HTTPS://LOCALHOST/health", b"localhost", 200), (b"http://localhost/health", b"evil.example", 200),
        (b"http://evil.example/health", b"localhost", 403), (b"http://evil.example/health", b"evil.example", 403),
        (b"http://localhost@evil.example/health", b"localhost", 404), (b"http://localhost", b"localhost", 404),
        (b"http:///health", b"localhost", 404),
    ],
)  # fmt: skip
def test_a_whole_url_is_served_for_the_host_that_it_names(
    service: Service, target: bytes, host: bytes, status: int
) -> None:
    request = b"GET %b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % (target, host)
    assert exchange(service, request)[0] == status


def test_options_asks_for_the_service_as_a_whole(service: Service) -> None:
    for target in (b"*", b"http://localhost"):
        with connect(service) as line:
            line.sendall(b"OPTIONS %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % target)
            head = read_all(line)
        assert head.startswith(b"HTTP/1.1 204 ") and b"\r\nAllow: DELETE, GET, HEAD, OPTIONS, POST\r\n" in head
    status, _, body = exchange(service, b"GET * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert (status, body["code"]) == (400, "REQ_001")
    assert exchange(service, b"OPTIONS * HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")[0] == 403


def test_pipelined_requests_are_answered_in_order_and_end_at_the_first_bad_one(service: Service) -> None:
    with connect(service) as line:
        line.sendall(
            GET + b"\r\n" + GET.replace(b"/health", b"/nothing") + b"\r\n" + GET + b"X : 1\r\n\r\n" + GET + b"\r\n"
        )
        answers = read_all(line)
    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", answers) == [b"200", b"404", b"400"]


# -- the rule itself


@pytest.mark.parametrize(
    "line", [b"GET / HTTP/1.1", b"M-SEARCH /a?b=c HTTP/1.0", b"OPTIONS * HTTP/1.1", b"GET /\xc3\xbc HTTP/1.1"]
)
def test_a_good_head_is_left_as_it_is(line: bytes) -> None:
    head = line + b"\r\nHost: localhost\r\nX-Empty:\r\nX: a\tb \xe4\r\n\r\n"
    assert check_head(head) == check_head(b"\r\n" + head) == head


def test_a_whole_url_loses_its_host_to_the_host_field() -> None:
    assert check_head(b"GET http://a.example:80/x?y HTTP/1.1\r\nX: 1\r\nhost: b\r\nY: 2\r\n\r\n") == (
        b"GET /x?y HTTP/1.1\r\nHost: a.example:80\r\nX: 1\r\nY: 2\r\n\r\n"
    )
    assert check_head(b"GET http://a.example?y HTTP/1.0\r\n\r\n") == b"GET /?y HTTP/1.0\r\nHost: a.example\r\n\r\n"
    with pytest.raises(ApiError):
        check_head(b"GET http://a.example/ HTTP/1.1\r\n\r\n")


# -- time and room


@pytest.fixture(scope="module")
def hurried(setup: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that waits one second for requests and has room for four connections."""
    with serving(tmp_path_factory.mktemp("hurried"), "--request-timeout", "1", "--max-connections", "4") as running:
        yield running


SLOW = {
    "in the request line": b"GET /hea",
    "in the headers": GET + b"X: ",
    "after the head": POST + b"Content-Length: 100\r\n\r\n",
    "in the body": POST + b"Content-Length: 100\r\n\r\n{",
    "in a chunk": CHUNKED + b"100\r\n{",
    "between chunks": CHUNKED + b"1\r\n{\r\n",
    "in a chunk's size": CHUNKED + b"1",
}


@pytest.mark.parametrize("name", SLOW)
def test_a_request_that_stalls_is_told_so(hurried: Service, name: str) -> None:
    until(lambda: Client(hurried.url, None).get("/health").status_code == 200)
    status, headers, body = exchange(hurried, SLOW[name])
    assert (status, body["code"], body["error"], headers["connection"]) == (408, "REQ_008", "request_timeout", "close")
    assert headers["x-request-id"] == body["request_id"]
    lines = until(lambda: [line for line in hurried.audit() if line["request_id"] == body["request_id"]])
    assert [(line["status"], line["code"]) for line in lines] == [(408, "REQ_008")]


def test_a_request_that_drips_is_ended_too(hurried: Service) -> None:
    with connect(hurried) as line:
        line.settimeout(0.05)
        answer = b""
        for byte in (GET + b"X: " + b"a" * 1000)[:]:
            try:
                line.sendall(bytes([byte]))
                answer += line.recv(65_536)
            except TimeoutError:
                continue
            except OSError:
                break
            if answer:
                break
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("name", ["with a length", "in two pieces", "in chunks"])
def test_a_body_that_has_come_may_be_worked_on_for_longer(
    make_service: Callable[..., Service], tmp_path: Path, name: str
) -> None:
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "slow.py").write_text(
        "import time\nfrom cco_sidecar import hookimpl\n\n@hookimpl\n"
        "def next_agents(result):\n    time.sleep(3)\n    return []\n"
    )
    service = make_service("--request-timeout", "2", "--plugins", str(tmp_path / "slow"))
    result = {"agent_id": "a-1", "agent_type": "python-specialist", "issue_id": "issue-1", "project_id": PROJECT}
    body = json.dumps(result | {"result": {"status": "success"}}).encode()
    head = POST.replace(b"TOKEN", service.token().encode()).replace(b"events/ping", b"results")
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    fields, pieces = {
        "with a length": (length, [body]),
        "in two pieces": (length, [body[:5], body[5:]]),
        "in chunks": (b"Transfer-Encoding: chunked\r\n\r\n", [b"%x\r\n%b\r\n" % (len(body), body), b"0\r\n\r\n"]),
    }[name]
    with connect(service) as line:
        line.sendall(head + b"Connection: close\r\nExpect: 100-continue\r\n" + fields)
        assert line.recv(100).startswith(b"HTTP/1.1 100 ")
        assert served(service), "so the head was worked on, and the body is awaited"
        for piece in pieces:
            line.sendall(piece)
        assert read_all(line).startswith(b"HTTP/1.1 201 ")


def test_a_crowd_is_turned_away_and_let_in_again(hurried: Service) -> None:
    until(lambda: Client(hurried.url, None).get("/health").status_code == 200)
    crowd: list[socket.socket] = []
    try:
        while len(crowd) < 10:
            crowd.append(connect(hurried))
        crowd[-1].sendall(GET + b"\r\n")
        answer = read_all(crowd[-1])
        head, _, content = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: 1" in head
        body = json.loads(content)
        assert (body["code"], body["retry_after_seconds"]) == ("REQ_009", 1)
        until(lambda: any(line["request_id"] == body["request_id"] for line in hurried.audit()))
    finally:
        for line in crowd:
            line.close()
    until(lambda: served(hurried))


def served(service: Service) -> bool:
    with connect(service) as line:
        line.sendall(GET + b"Connection: close\r\n\r\n")
        return read_all(line).startswith(b"HTTP/1.1 200 ")


def test_room_is_kept_for_files_where_the_system_has_little(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    for soft, wanted, limit in [
        (65_536, 10_000, 10_000),
        (1024, 10_000, 768),
        (100, 10_000, 50),
        (resource.RLIM_INFINITY, 10_000, 10_000),
    ]:
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert plugin("strict").connection_limit(wanted) == limit


def test_a_refusal_that_nobody_reads_holds_its_line_for_a_moment_only(
    tmp_path: Path, make_service: Callable[..., Service]
) -> None:
    service = make_service()
    with connect(service) as line:
        line.sendall(b"GARBAGE\r\n\r\n")
        until(lambda: "REQ_001" in service.log)
        assert service.stop() == 0
    assert "Traceback" not in service.log


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_connections_for_which_there_is_no_room_wait_and_do_not_fill_the_log(
    make_service: Callable[..., Service], tmp_path: Path, error: int
) -> None:
    fault = tmp_path / "fault"
    (tmp_path / "no_room.py").write_text(f"""
import os, pathlib, socket
from cco_sidecar import hookimpl

original = socket.socket.accept

def accept(listening):
    if pathlib.Path({str(fault)!r}).exists():
        raise OSError({error}, os.strerror({error}))
    return original(listening)

socket.socket.accept = accept

@hookimpl
def event_published(event):
    pass
""")
    service = make_service("--plugins", str(tmp_path))
    told = f"no connection can be taken for a second: {os.strerror(error)}"
    kept = service.client()
    assert kept.get("/health").status_code == 200  # on a connection that is there before the fault
    fault.touch()
    with connect(service) as line:
        line.sendall(GET + b"Connection: close\r\n\r\n")
        until(lambda: told in service.log)
        for _ in range(200):  # each is at least one turn of the loop, at which the one that waits is there
            assert kept.get("/health").status_code == 200
        assert service.log.count(told) < 20
        fault.unlink()
        assert read_all(line).startswith(b"HTTP/1.1 200 OK\r\n")
    assert "Traceback" not in service.log
    assert service.stop() == 0

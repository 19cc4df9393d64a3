"""Broken requests over raw sockets: well-formed ones of every kind, mutated by a seeded dice.

Every connection must come to its end, every byte that comes back must belong to a well-formed answer, no answer may be
a 5xx and every refusal must be JSON; afterwards the service must hold no connection, request, waiter or task for any of
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from conftest import PROJECT, Service, until

QUIET = 0.15  # seconds of silence after which the fuzzer takes it that the service waits for more, and ends its side
PATIENCE = 20.0  # seconds that an ended connection may take to be closed
AT_ONCE = 24

# A plugin that tells what the service holds at this moment.
GAUGE = """
import asyncio

from cco_sidecar import Endpoint, Route, hookimpl


class Gauge(Endpoint):
    public = True
    answers = {200: dict}

    async def respond(self):
        tasks = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]
        return {"requests": self.sidecar.open_requests - 1, "tasks": sorted(tasks)}


@hookimpl
def register_routes():
    return [Route("GET", "/gauge", Gauge)]
"""


def start_service(folder: Path, root: Path) -> Service:
    """A service that tells what it holds, spawns agents that end at once, and has something to find."""
    (folder / "plugins").mkdir()
    (folder / "plugins" / "gauge.py").write_text(GAUGE)
    service = Service(root, folder / "storage", "--agent-command", "true", "--plugins", str(folder / "plugins")).start()
    client = service.client()
    client.publish("done", {"issue_id": "issue-1"})
    client.store(decisions=["one"])
    return service


# ---- What is mutated
# --------------------------------------------------------------------------------------------------------------------

EVENT = {
    "publisher": "fuzz",
    "topic": "test",
    "data": {"issue_id": "issue-1", "text": "é \U0001f600", "list": [1, 2.5, None, True]},
}
RESULT = {
    "agent_id": "fuzz-1",
    "agent_type": "python-specialist",
    "issue_id": "issue-1",
    "project_id": PROJECT,
    "result": {"status": "success"},
}
SPAWN = {
    "agent_type": "python-specialist",
    "issue_id": "issue-1",
    "task": "nothing",
    "environment": {"NAME": "value"},
    "priority": "normal",
}

SEEDS: list[tuple[str, str, Any]] = [  # method, target, body
    ("GET", "/health", None), ("GET", "/status", None), ("GET", "/openapi.json", None), ("GET", "/nowhere", None), ("PUT", "/health", None),
    ("GET", "/api/context/issue-1/python-specialist?max_files=3&task=cookie", None), ("GET", "/api/results?issue_id=issue-1&limit=2", None),
    ("GET", "/api/results/result-1", None), ("GET", "/api/events?type=done&since=earliest&limit=5", None), ("GET", "/api/events?dead=true", None),
    ("GET", "/api/events/wait/done?timeout=0", None), ("GET", "/api/events/wait/*?timeout=40&filter=issue_id:issue-1,topic:!x|%22y%22*&since=latest", None),
    ("HEAD", "/api/events/wait/done?timeout=10&since=earliest&limit=1", None), ("GET", "/api/agents?state=completed", None),
    ("GET", "/api/agents/agent-1/status", None), ("GET", "/api/agents/agent-1/logs?tail=5&since=0", None), ("DELETE", "/api/agents/agent-1", None),
    ("DELETE", "/api/cache/context/issue-1", None), ("DELETE", "/api/cache/all", None), ("POST", "/api/auth/refresh", None),
    ("OPTIONS", "/api/results", None), ("OPTIONS", "*", None), ("POST", "/api/events/done", EVENT), ("POST", "/api/results", RESULT),
    ("POST", "/api/agents/spawn", SPAWN),
]  # fmt: skip

LINES = [
    "Content-Length: 5", "Content-Length: 0", "Content-Length: -1", "Content-Length: +5", "Content-Length: 5, 5", "Content-Length: 99999999999999999999",
    "Content-Length: 40000000", "Content-Length: 0x10", "Content-Length: ", "Content-Length : 5", "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked, identity", "Transfer-Encoding: \tchunked", "Transfer-encoding: CHUNKED",
    "Expect: 100-continue", "Expect: nonsense", "Connection: close", "Connection: keep-alive, Upgrade", "Upgrade: websocket", "Upgrade: h2c",
    "Host: evil.example", "Host: localhost", "Host: [::1", "Host: a@b", "Host: ", "Origin: null", "Origin: http://[", "Origin: http://localhost",
    "Authorization: Bearer x.y.z", "Authorization: Bearer ", "Authorization: Basic eDp5", "Authorization: \xe9", "Idempotency-Key: k", "Idempotency-Key: ",
    "Idempotency-Key: " + "k" * 300, "If-None-Match: *", 'If-None-Match: W/"x"', "Content-Type: text/plain", "Content-Type: multipart/form-data; boundary=",
    "Content-Type: application/x-www-form-urlencoded", "Content-Type: application/json; charset=utf-16", "Content-Encoding: gzip", "Range: bytes=0-1",
    "X-Request-ID: \x00", "Cookie: " + "a=b; " * 500, "X-Long: " + "x" * 9_000, " folded", "\tfolded", "no colon", ": no name", "\xff\xfe: x", "A\x0bB: c",
    "Accept-Encoding: gzip", "TE: trailers", "Trailer: Content-Length", "X-HTTP-Method-Override: DELETE", "Access-Control-Request-Method: DELETE",
]  # fmt: skip

TARGETS = [
    "*", "/", "//", "//evil.example/health", "http://localhost/health", "http://evil.example/health", "https:///health", "localhost:80", "/%", "/%zz", "/%00",
    "/%ff", "/api/results/%2e%2e%2f%2e%2e%2fetc", "/api/results/..", "/api/context/%2e%2e/python-specialist", "/api/context/issue-1/%00", "/health?",
    "/health?%ff=%ff", "/health?a=1&a=2&;&&=", "/health#x", "/health;x", "/api/events/wait/*?timeout=-1", "/api/events/wait/*?timeout=1e3",
    "/api/events/wait/*?timeout=0&since=%00", "/api/events/wait/*?timeout=0&filter=%22", "/api/events/wait/*?timeout=0&limit=999999999999999999999",
    "/api/events?since=evt-00000000-000000000001", "/api/events?since=evt-zzzzzzzz-999999999999999999999999", "/api/agents?since=%f0%9f%98%80",
    "/api/results?limit=0", "/api/results?issue_id=" + "a" * 5_000, "/" + "a" * 9_000, "/\xe9", "/ health", "/api/context/issue-1/python-specialist?max_bytes=2000",
]  # fmt: skip

BODIES = [
    b"", b"null", b"[]", b"{}", b"0", b'"', b"{", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"{" * 5_000, b"[" * 100_000, b'{"a":' * 3_000, b"1e999", b"NaN",
    b'{"publisher": "\\ud800", "topic": "t", "data": {}}', b'{"publisher": "a", "topic": "t", "data": {"\\u0000": "\\u0000"}}',
    b'{"publisher": "a", "topic": "t", "data": {"n": 123456789012345678901234567890}}', b'{"publisher": "a", "topic": "t", "data": {}, "ttl_seconds": 1e400}',
    b'{"publisher": "a", "publisher": 1, "topic": "t", "data": {}}', b"a=b&c=d", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n',
    b'{"agent_type": "python-specialist", "issue_id": "issue-1", "environment": {"A\\u0000B": "c"}}',
    b'{"agent_type": "python-specialist", "issue_id": "issue-1", "environment": {"A=B": "c\\u0000"}, "task": "\\u0000"}',
    b'{"agent_type": "python-specialist", "issue_id": "issue-1", "task": "\\ud800"}',
]  # fmt: skip

BYTES = [
    b"\r",
    b"\n",
    b"\r\n",
    b"\r\n\r\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b";",
    b"0",
    b"\xff",
    b"%00",
    b"\xc3",
    b"\x7f",
    b"0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"-1\r\n",
    b"PRI ",
]


class Composer:
    """Mutated requests, always the same for the same seed."""

    def __init__(self, seed: int, token: str) -> None:
        self.dice, self.token = random.Random(seed), token

    def message(self) -> bytes:
        """One request or several behind each other, with a few mistakes or none."""
        parts = [self._request() for _ in range(self.dice.choice([1, 1, 1, 1, 2, 3]))]
        data = b"".join(parts)
        for _ in range(self.dice.choice([0, 0, 1, 1, 2, 5])):
            data = self.dice.choice([self._insert, self._delete, self._repeat, self._flip, self._cut])(data)
        return data

    def _request(self) -> bytes:
        method, target, body = self.dice.choice(SEEDS)
        target = self.dice.choice(TARGETS) if self.dice.random() < 0.2 else target
        method = (
            self.dice.choice(["TRACE", "CONNECT", "get", "G\xe9T", "PATCH", "PRI", ""])
            if self.dice.random() < 0.05
            else method
        )
        content = b"" if body is None else json.dumps(body).encode()
        content = self.dice.choice(BODIES) if self.dice.random() < 0.2 else content
        version = (
            "HTTP/1.1"
            if self.dice.random() < 0.9
            else self.dice.choice(["HTTP/1.0", "HTTP/2.0", "HTTP/1.11", "HTTP/9", "http/1.1", ""])
        )
        lines = ["Host: localhost", f"Authorization: Bearer {self.token}", "Content-Type: application/json"]
        content, framing = self._framed(content)
        lines += framing
        for _ in range(self.dice.choice([0, 0, 0, 1, 1, 2, 4])):
            lines.insert(self.dice.randrange(len(lines) + 1), self.dice.choice(LINES))
        if self.dice.random() < 0.1:
            del lines[self.dice.randrange(len(lines))]
        return (
            f"{method} {target} {version}\r\n".encode("latin-1")
            + "".join(f"{line}\r\n" for line in lines).encode("latin-1")
            + b"\r\n"
            + content
        )

    def _framed(self, content: bytes) -> tuple[bytes, list[str]]:
        """The body by length or in chunks, and the line that says so."""
        if not content or self.dice.random() < 0.7:
            return content, [f"Content-Length: {len(content)}"] if content else []
        size = self.dice.randrange(1, 200)
        pieces = [content[n : n + size] for n in range(0, len(content), size)]
        extension = self.dice.choice([b"", b"", b";a=b", b" ", b';x="\r\n"'])
        chunks = b"".join(b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces)
        return chunks + self.dice.choice(
            [b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nX-Trailer: 1\r\n\r\n", b"00\r\n\r\n", b""]
        ), ["Transfer-Encoding: chunked"]

    def _place(self, data: bytes) -> int:
        return self.dice.randrange(len(data) + 1)

    def _insert(self, data: bytes) -> bytes:
        at, new = (
            self._place(data),
            self.dice.choice(BYTES) if self.dice.random() < 0.8 else self.dice.randbytes(self.dice.randrange(1, 40)),
        )
        return data[:at] + new + data[at:]

    def _delete(self, data: bytes) -> bytes:
        at = self._place(data)
        return data[:at] + data[at + self.dice.randrange(1, 12) :]

    def _repeat(self, data: bytes) -> bytes:
        at = self._place(data)
        return data[:at] + data[at : at + self.dice.randrange(1, 60)] * self.dice.randrange(2, 20) + data[at:]

    def _flip(self, data: bytes) -> bytes:
        at = self.dice.randrange(max(1, len(data)))
        return data[:at] + bytes([self.dice.randrange(256)]) + data[at + 1 :]

    def _cut(self, data: bytes) -> bytes:
        return data[: self._place(data)]

    def pieces(self, data: bytes) -> list[bytes]:
        """The message as it is written: mostly whole, sometimes in pieces."""
        cuts = sorted(self._place(data) for _ in range(self.dice.choice([0, 0, 0, 1, 3])))
        return [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


# ---- What must come back
# ----------------------------------------------------------------------------------------------------------------


def read_answers(data: bytes, asked: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """The answers in what came back, the last one possibly cut short. Raises AssertionError for bytes that are no
    answer.
    """
    answers = []
    while data:
        head, found, rest = data.partition(b"\r\n\r\n")
        if not found:
            assert b"HTTP/1.1 ".startswith(data[:9]) or data.startswith(b"HTTP/1.1 "), f"not an answer: {data[:100]!r}"
            break
        first, *lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.1 (\d{3}) .*", first)
        assert match, f"not a status line: {first[:100]!r}"
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        status = int(match[1])
        length = 0 if status in (100, 204, 304) else int(headers.get("content-length", -1))
        assert length >= 0, f"an answer without a length: {head!r}"
        if b"HEAD" in asked and not rest[:length].startswith((b"{", b"[")):
            length = 0  # the answer to a HEAD
        if status != 100:
            answers.append((status, headers, rest[:length]))
        data = rest[length:]
        assert len(rest) >= length or not data
    return answers


def check_answers(data: bytes, asked: bytes) -> list[int]:
    """The statuses that came back. Raises AssertionError where one breaks a promise."""
    if asked.startswith(b"PRI "):
        return []  # the beginning of HTTP/2, which the bundled plugin answers in frames
    answers = read_answers(data, asked)
    for number, (status, headers, content) in enumerate(answers):
        assert status < 500, f"{status}: {content!r}"
        assert headers.get("x-request-id"), f"{status} without X-Request-ID: {headers}"
        whole = len(content) == int(headers.get("content-length", 0))
        if status >= 400 and content and whole:
            error = json.loads(content)
            assert {"error", "message", "code", "timestamp", "request_id"} <= error.keys(), error
        if headers.get("connection") == "close":
            # Known: the refusal of a body that turns out to be malformed, which is the one answer without Server, comes
            # behind an early one.
            last = [answer for answer in answers if answer[0] != 400 or "server" in answer[1]] or answers
            assert number >= len(last) - 1, f"an answer after the one that said it was the last: {data!r}"
    return [status for status, _, _ in answers]


class HttpFuzzer:
    """Sends mutated requests to a service and looks at all that comes back."""

    def __init__(self, service: Service, seed: int) -> None:
        self.service, self.composer = service, Composer(seed, service.token())
        host, port = service.url.removeprefix("http://").split(":")
        self.address = host, int(port)
        self.statuses: Counter[int] = Counter()
        self.process = psutil.Process(service.info["pid"])

    def run(self, enough: Callable[[int], bool]) -> dict[str, Any]:
        """Ask until ``enough(connections so far)``; what came back. Raises AssertionError with the request that broke a
        promise.
        """
        self.settle()
        until(lambda: "WarmContexts.prepare" not in self._held()[0], PATIENCE)  # what the start does beside
        before = self._held()
        asked = asyncio.run(self._run(enough))
        self.settle(before)
        assert "Traceback" not in self.service.log and " unexpected" not in self.service.log, self.service.log[-5_000:]
        return {"connections": asked, "answers": self.statuses.total(), "statuses": dict(sorted(self.statuses.items()))}

    async def _run(self, enough: Callable[[int], bool]) -> int:
        count = 0
        while not enough(count):
            batch = [self.composer.message() for _ in range(AT_ONCE)]
            await asyncio.gather(*(self._ask(message, self.composer.pieces(message)) for message in batch))
            count += AT_ONCE
        return count

    async def _ask(self, message: bytes, pieces: list[bytes]) -> None:
        try:
            answer = await self._exchange(pieces)
            self.statuses.update(check_answers(answer, message))
        except (AssertionError, TimeoutError, ValueError) as broken:
            raise AssertionError(f"{type(broken).__name__} {broken}\nafter {message[:3000]!r}") from broken

    async def _exchange(self, pieces: list[bytes]) -> bytes:
        """All that comes back, until the service closes."""
        answer = b""
        reader, writer = await asyncio.open_connection(*self.address)
        try:
            with contextlib.suppress(OSError):  # the service may hang up at any moment
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                with contextlib.suppress(TimeoutError):
                    while chunk := await asyncio.wait_for(reader.read(65_536), QUIET):
                        answer += chunk
                writer.write_eof()
                while chunk := await asyncio.wait_for(reader.read(65_536), PATIENCE):
                    answer += chunk
        finally:
            writer.close()
        return answer

    def _held(self) -> tuple[list[str], int]:
        gauge = self.service.client().get("/gauge").json()
        return gauge["tasks"], gauge["requests"]

    def settle(self, before: tuple[list[str], int] | None = None) -> None:
        """Wait until the service holds nothing for anybody, or what it held before."""
        client = self.service.client()
        until(lambda: client.get("/status").json()["events"]["active_subscriptions"] == 0, PATIENCE)
        until(lambda: client.get("/status").json()["agents"]["active"] == 0, PATIENCE)
        client.session.close()
        until(
            lambda: not [c for c in self.process.net_connections("tcp") if c.status in ("ESTABLISHED", "CLOSE_WAIT")],
            PATIENCE,
        )
        if before:
            until(lambda: self._held() == before, PATIENCE)


def for_minutes(minutes: float) -> Callable[[int], bool]:
    end = time.monotonic() + 60 * minutes
    return lambda count: time.monotonic() > end

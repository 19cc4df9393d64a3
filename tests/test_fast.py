"""HTTP/1.1 by the plugin fast, beside Tornado's own server: what a client sees is the same.

The handlers are those of test_http2.py. What heads and chunks are refused is in test_malformed.py, which attacks both.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import re
import socket
import ssl
import typing
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from conftest import Service, make_repository, plugin, until
from test_http2 import Running, certificate, loop_factory, wait_for  # noqa: F401 - fixtures
from tornado import httputil
from tornado.iostream import StreamClosedError

from cco_sidecar import (
    ERRORS,
    ApiError,
    Application,
    Contexts,
    GetContext,
    GetHealth,
    GetStatus,
    Pool,
    Server,
    Sidecar,
    load_hooks,
    load_settings,
)

framing = plugin("_framing")
HEAD = b"GET %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n"


class Both(Running):
    """A server of the plugins strict and http2, on that of fast or on Tornado's own."""

    def __init__(self, new_loop: Any, fast: bool, seconds: float = 5.0, **options: Any) -> None:
        self.fast, self.seconds = fast, seconds
        super().__init__(new_loop, **options)

    def kind(self) -> type[Server]:
        settings = SimpleNamespace(no_fast=not self.fast, max_connections=50, request_timeout=self.seconds)
        kind = plugin("fast").part_class(settings, Server) or Server
        kind = plugin("strict").part_class(settings, plugin("http2").part_class(kind))
        return type("Tested", (kind,), {"request_callback": None, "BODY_LONGER": 0.0})

    def connect(self) -> socket.socket:
        line = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        return ssl._create_unverified_context().wrap_socket(line) if self.tls else line

    def ask(self, content: bytes) -> bytes:
        """All that comes back until the server closes."""
        with self.connect() as line:
            line.sendall(content)
            return read_all(line)

    def open_connections(self) -> int:
        return self.call(lambda: len(self.server._connections))


def read_all(line: socket.socket) -> bytes:
    return b"".join(iter(lambda: line.recv(65_536), b""))


@pytest.fixture
def make(loop_factory: Any) -> Iterator[Callable[..., Both]]:  # noqa: F811
    servers: list[Both] = []

    def begin(fast: bool = True, **options: Any) -> Both:
        servers.append(Both(loop_factory, fast, **options))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()
        assert not server.server._connections


@pytest.fixture(params=["fast", "Tornado's"])
def server(request: pytest.FixtureRequest, make: Callable[..., Both]) -> Both:
    return make(request.param == "fast")


# -- answers


def test_answers_have_their_form(server: Both) -> None:
    """(request, first line, what the head says, body): one connection a row, which the server closes."""
    close = b"Connection: close\r\n"
    old = b"GET %b HTTP/1.0\r\nHost: localhost\r\n\r\n"
    for request, status, words, body in [
        (HEAD % (b"/big?n=5", close), 200, ["Content-Length: 5", "Connection: close"], b"xxxxx"),
        (HEAD % (b"/streamed?n=3", close), 200, ["Transfer-Encoding: chunked"], b"2\r\n0\n\r\n2\r\n1\n\r\n2\r\n2\n\r\n0\r\n\r\n"),
        (old % b"/streamed?n=3", 200, [], b"0\n1\n2\n"),
        (HEAD.replace(b"GET", b"HEAD") % (b"/hello", close), 200, ["Content-Length: "], b""),
        (HEAD % (b"/odd/204", close), 204, [], b""),
        (HEAD % (b"/odd/304", close), 304, [], b""),
        (HEAD % (b"/boom", close), 500, ["Content-Length: "], None),
        (HEAD.replace(b"GET", b"BREW") % (b"/hello", close), 405, [], None),
    ]:  # fmt: skip
        head, _, content = server.ask(request).partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        assert lines[0].startswith(f"HTTP/1.1 {status} "), request
        assert all(any(line.startswith(word) for line in lines) for word in words), (request, lines)
        assert body is None or content == body, request
        assert "Transfer-Encoding: chunked" in words or not any(line.startswith("Transfer") for line in lines)


def test_a_connection_is_kept_as_long_as_both_want(server: Both) -> None:
    kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for _ in range(3):
        kept.request("GET", "/hello")
        answer = json.loads(kept.getresponse().read())
        assert (answer["version"], answer["ip"], answer["protocol"]) == ("HTTP/1.1", "127.0.0.1", "http")
    assert server.open_connections() == 1
    kept.close()
    with server.connect() as line:
        line.sendall(b"GET /big?n=3 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2)
        wait_for(lambda: line.recv(65_536, socket.MSG_PEEK).count(b"xxx") == 2)
        assert b"Connection: Keep-Alive" in line.recv(65_536)
        line.sendall(HEAD % (b"/big?n=3", b"Connection: close\r\n"))
        assert read_all(line).endswith(b"xxx")
    wait_for(lambda: server.open_connections() == 0)


def test_pipelined_requests_are_answered_in_order(server: Both) -> None:
    """A poll among them holds up those behind it; bodies and heads lie in one packet."""
    with server.connect() as line:
        post = b"POST /echo HTTP/1.1\r\nHost: localhost\r\n"
        line.sendall(
            post + b"Content-Length: 3\r\n\r\none" + post + b"Transfer-Encoding: chunked\r\n\r\n1\r\nt\r\n2\r\nwo\r\n0\r\n\r\n"
            + HEAD % (b"/poll", b"") + HEAD % (b"/big?n=7", b"Connection: close\r\n")
        )  # fmt: skip
        wait_for(lambda: server.world.waiting)
        server.wake()
        answers = re.findall(rb"\r\n\r\n(.*?)(?=HTTP/1|\Z)", read_all(line), re.DOTALL)
    assert answers == [b"one", b"two", b'{"woken": true}', b"x" * 7]


def test_a_request_for_another_protocol_is_served_as_it_is(make: Callable[..., Both]) -> None:
    server = make()
    more = b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nContent-Length: 5\r\n"
    body = b"GET /" + HEAD % (b"/boom", b"Connection: close\r\n")
    answer = server.ask(HEAD.replace(b"GET", b"POST") % (b"/echo", more) + body)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"HTTP/1.1 ") == 1


def test_long_answers_are_whole_for_who_reads_late(make: Callable[..., Both]) -> None:
    server = make(send_buffer=65_536)
    with server.connect() as line:
        line.sendall(HEAD % (b"/big?n=30000000", b"Connection: close\r\n"))
        wait_for(lambda: server.world.waiting)
        assert not server.world.outcomes, "the write waits for the client"
        assert len(read_all(line).partition(b"\r\n\r\n")[2]) == 30_000_000
    wait_for(lambda: server.world.outcomes == ["written"])


def test_a_client_that_goes_is_noticed(make: Callable[..., Both]) -> None:
    server = make(send_buffer=65_536)
    for path in (b"/poll", b"/callback", b"/big?n=30000000"):
        line = server.connect()
        line.sendall(HEAD % (path, b""))
        wait_for(lambda: server.world.waiting)
        line.close()
        wait_for(lambda: not server.world.waiting)
    wait_for(lambda: server.open_connections() == 0)
    assert server.world.outcomes == ["callback", "closed"]


@pytest.mark.parametrize("sent", [HEAD % (b"/hello", b""), HEAD % (b"/poll", b""), HEAD[:9], b"no request\r\n\r\n"])
def test_a_closed_connection_is_freed_without_a_search_for_garbage(server: Both, sent: bytes) -> None:
    gc.disable()
    try:
        with server.connect() as line:
            line.sendall(sent[:1])
            wait_for(server.open_connections)
            (stream,) = server.call(
                lambda: [weakref.ref(getattr(it, "stream", it)) for it in server.server._connections]
            )
            line.sendall(sent[1:])
            if b"/poll" in sent:
                wait_for(lambda: server.world.waiting)
            elif sent.endswith(b"\r\n\r\n"):
                assert line.recv(65_536).startswith(b"HTTP/1.1 ")  # who closes before it has all resets the connection
        wait_for(lambda: stream() is None, "connection freed")
    finally:
        gc.enable()


def test_an_answer_that_is_given_up_ends_the_connection(make: Callable[..., Both]) -> None:
    server = make(send_buffer=4096)
    with server.connect() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.sendall(HEAD % (b"/impatient", b""))
        wait_for(lambda: server.world.waiting)
        server.wake()
        wait_for(lambda: not server.world.waiting)
        assert len(read_all(line)) < 900_000
    assert server.world.outcomes == ["closed"]


def test_wrong_lengths_end_the_connection(server: Both) -> None:
    for kind in (b"short", b"long"):
        assert b"\r\n\r\nfour" not in server.ask(HEAD % (b"/odd/" + kind, b"Connection: close\r\n"))[:-4]


# -- bodies


def test_who_asks_is_told_to_send_its_body(server: Both) -> None:
    with server.connect() as line:
        line.sendall(
            HEAD.replace(b"GET", b"POST")
            % (b"/upload", b"Content-Length: 4\r\nExpect: 100-continue\r\nConnection: close\r\n")
        )
        assert line.recv(25).startswith(b"HTTP/1.1 100 ")
        line.sendall(b"four")
        assert read_all(line).endswith(b'{"size": 4}')
    with server.connect() as line:  # no need to, where it is refused by its head
        line.sendall(
            HEAD.replace(b"GET", b"POST") % (b"/upload?limit=3", b"Content-Length: 4\r\nExpect: 100-continue\r\n")
        )
        assert line.recv(12) == b"HTTP/1.1 413"


def test_a_body_waits_in_the_client_while_the_application_is_slow(server: Both) -> None:
    size = 30_000_000
    with server.connect() as line:
        line.settimeout(0.3)
        line.sendall(
            HEAD.replace(b"GET", b"POST") % (b"/upload?slow=1", b"Content-Length: %d\r\nConnection: close\r\n" % size)
        )
        sent, piece = 0, b"x" * 100_000
        with pytest.raises(TimeoutError):
            while True:
                sent += line.send(piece)
        assert server.world.delivered <= 300_000 and sent < size - 100_000
        server.wake()
        line.settimeout(10)
        while sent < size:
            sent += line.send(piece[: size - sent])
        assert read_all(line).endswith(b'{"size": %d}' % size)


def test_the_answer_to_half_a_body_arrives(server: Both) -> None:
    head = HEAD.replace(b"GET", b"POST") % (b"/upload?limit=100000", b"Transfer-Encoding: chunked\r\n")
    with server.connect() as line:
        line.sendall(head + b"100000\r\n" + b"x" * 0x100000 + b"\r\n")
        assert b"too_large" in read_all(line)


@pytest.mark.parametrize(
    ("head", "body", "status", "code"),
    [
        ("Authorization: Bearer TOKEN", b'{"publisher": "tester", "topic": "t", "data": {}}', 202, None),
        ("Authorization: Bearer TOKEN", b'{"publisher": "tester", "topic": "t"}', 400, "EVT_002"),
        ("Authorization: Bearer TOKEN", b"{", 400, "REQ_001"),
        ("Authorization: Bearer TOKEN\r\nContent-Type: text/plain", b"{}", 415, "REQ_005"),
        ("Authorization: Bearer nonsense", b"{}", 401, "AUTH_001"),
        ("X-Nobody: 1", b"{}", 401, "AUTH_001"),
        ("Authorization: Bearer TOKEN\r\nExpect: 100-continue", b'{"publisher": 1}', 400, "EVT_002"),
        ("Authorization: Bearer TOKEN", b" " * 70_000, 400, "REQ_001"),
    ],
)
def test_a_body_is_answered_alike_whether_it_comes_with_its_head_or_later(
    service: Service, head: str, body: bytes, status: int, code: str | None
) -> None:
    """Each connection goes on with a second request like the first."""
    head = head.replace("TOKEN", service.token(sub="tester"))
    start = f"POST /api/events/alike HTTP/1.1\r\nHost: localhost\r\n{head}\r\nContent-Length: {len(body)}\r\n\r\n"
    found = []
    for pieces in ([start.encode() + body], [start.encode(), body], [start.encode(), body[:1], body[1:]]):
        with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=20) as line:
            for _ in range(2):
                for piece in pieces:
                    line.sendall(piece)
                    service.client().get("/status")  # which is read behind the piece
                answer = http.client.HTTPResponse(line)
                answer.begin()
                if answer.status == 100:
                    answer = http.client.HTTPResponse(line)
                    answer.begin()
                found.append((answer.status, json.loads(answer.read()).get("code")))
    assert found == [(status, code)] * 6


HOSTS = ["localhost:3001", "LOCALHOST", "[::1]:80", "", "a, b", "a b", "x" * 400, None]


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize("target", ["/health", "/a%20b?", "/a?b=c&b=d+e"])
@pytest.mark.parametrize("host", HOSTS, ids=range(len(HOSTS)))
def test_a_request_has_what_tornado_gives_it(host: str | None, target: str, version: str) -> None:
    headers = httputil.HTTPHeaders({} if host is None else {"Host": host})
    line, server = httputil.RequestStartLine("GET", target, version), object()
    exchange: Any = SimpleNamespace(context=SimpleNamespace(remote_ip="127.0.0.1", protocol="https"))

    def facts(kind: Any, *words: Any, **options: Any) -> Any:
        try:
            return vars(kind(*words, **options)) | {"_start_time": 0}
        except httputil.HTTPInputError as error:
            return str(error)

    theirs = {"connection": exchange, "server_connection": server, "start_line": line, "headers": headers}
    expected = facts(httputil.HTTPServerRequest, **theirs)
    for _ in range(2):  # the second time the host is known
        assert facts(plugin("_short_way").ShortRequest, exchange, server, line, headers) == expected


@pytest.mark.parametrize("target", ["/a", "http://a/a", "/a?" + "b" * 2_000])
def test_the_fields_of_a_request_are_its_own(target: str) -> None:
    head = f"GET {target} HTTP/1.1\r\nHost: a\r\nX-Y: 1\r\nX-Y: 2\r\n\r\n".encode()
    heads = [framing.parse_head(head).headers.copy() for _ in range(2)]
    heads[0].add("X-Y", "3")
    heads[0].pop("Host")
    assert [list(head.get_all()) for head in heads] == [
        [("X-Y", "1"), ("X-Y", "2"), ("X-Y", "3")],
        [("Host", "a"), ("X-Y", "1"), ("X-Y", "2")],
    ]
    assert heads[1]["X-Y"] == "1,2"


@pytest.mark.parametrize("before", [[], ["1"], ["1", "2"]])
@pytest.mark.parametrize("change", ["add", "set", "delete", "parse_line"])
def test_what_is_done_to_the_fields_of_one_request_shows_in_no_other(before: list[str], change: str) -> None:
    first, own = framing.Fields(), httputil.HTTPHeaders()
    for value in before:
        first.add("X-Y", value)
        own.add("X-Y", value)
    one, other = first.copy(), first.copy()
    for fields in (one, own):
        if change == "add":
            fields.add("x-y", "3")
        elif change == "parse_line":
            fields.parse_line("X-Y: 3")
        elif change == "set":
            fields["X-Y"] = "3"
        else:
            fields.pop("X-Y", None)
    assert list(one.get_all()) == list(own.get_all()) and one.get("X-Y") == own.get("X-Y")
    assert [fields.get_list("X-Y") for fields in (first, other)] == [before, before]


def test_what_has_to_wait_goes_on_in_a_task() -> None:
    """(what the work waits for, how that ends, what the work says of it): its first step needs no task."""
    steps, said = plugin("_steps"), []

    async def work(waiting: Any) -> None:
        try:
            said.append(await waiting)
            async with asyncio.timeout(5):
                await asyncio.sleep(0)
        except (ValueError, asyncio.CancelledError) as error:
            said.append(type(error).__name__)
            said.append(await Pool("a", 1, 5).run(lambda: "cleaned up"))

    async def all_of_them() -> None:
        loop = asyncio.get_running_loop()
        done, coming, failing, cancelled = (loop.create_future() for _ in range(4))
        done.set_result("at once")
        assert steps.begin(done_work(done)) is None and said == ["at once"]
        tasks = [steps.begin(work(future)) for future in (coming, failing, cancelled)]
        assert said == ["at once"]
        coming.set_result("later")
        await tasks[0]
        failing.set_exception(ValueError())
        await tasks[1]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await tasks[2]
        in_thread = steps.begin(done_work(Pool("b", 1, 5).run(lambda: "a thread")))
        await in_thread

    async def done_work(waiting: Any) -> None:
        said.append(await waiting)

    asyncio.run(all_of_them())
    cleaned = ["ValueError", "cleaned up", "CancelledError", "cleaned up"]
    assert said == ["at once", "later", *cleaned, "a thread"]


@pytest.mark.parametrize(("part", "method"), [("Contexts", "get"), ("Project", "state"), ("AgentTypes", "find")])
def test_contexts_for_which_somebody_elses_part_is_asked_are_made_in_a_task(
    make_service: Callable[..., Service], tmp_path: Path, part: str, method: str
) -> None:
    """asyncio's time-outs need one."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/limited.py").write_text(LIMITED.replace("PART", part).replace("METHOD", method))
    client = make_service("--plugins", str(tmp_path / "plugins")).client()

    def cached() -> bool:
        answer = client.get("/api/context/i-1/python-specialist")
        assert answer.status_code == 200, answer.text
        return bool(answer.json()["cache_hit"])

    until(cached)


LIMITED = """
import asyncio
from cco_sidecar import PART, hookimpl

@hookimpl
def part_class(base):
    class Limited(base):
        async def METHOD(self, *asked, **named):
            async with asyncio.timeout(60):
                return await super().METHOD(*asked, **named)

    return Limited if issubclass(base, PART) else None
"""


def test_an_endpoint_that_somebody_else_derives_is_served_in_a_task() -> None:
    contexts = type("Contexts", (), {"__module__": "cco_sidecar", "project": None})()
    facts = {"__module__": "cco_sidecar", "sidecar": SimpleNamespace(contexts=contexts, agent_types=None)}
    ours = type("Ours", (GetHealth, plugin("ready").ReadyEndpoint), facts)
    theirs = type("Theirs", (ours,), {"__module__": "house"})
    other = type("Other", (GetStatus, plugin("ready").ReadyEndpoint), {"__module__": "cco_sidecar"})
    assert (ours.in_place, theirs.in_place, other.in_place) == (True, False, False)  # type: ignore[attr-defined]


def test_health_and_contexts_are_answered_in_place_behind_all_plugins(tmp_path: Path) -> None:
    settings = load_settings({"root": str(tmp_path), "storage": str(tmp_path / "storage")}, {})
    served = Application(Sidecar(settings, load_hooks(settings))).served
    in_place = {route.path for route, endpoint in served if endpoint.in_place}  # type: ignore[attr-defined]
    assert in_place == {"/health", "/api/context/{issue_id}/{agent_type}"}


@pytest.mark.parametrize(
    ("limit", "in_task", "said"),
    [(None, True, ["answered", "finish is over"]), (150.0, False, ["answered", "finish is over"]),
     (150.0, True, ["finish is over", "answered"])],
)  # fmt: skip
def test_no_time_limit_begins_in_the_task_of_a_connection(limit: float | None, in_task: bool, said: list[str]) -> None:
    """Which it would end. Tornado's connections have one, and so has TLS where a long head is served."""
    done: list[str] = []

    def begin(path: list[str]) -> None:
        done.append("answered")

    async def finish() -> None:
        delegate = plugin("ready").ReadyDelegate(SimpleNamespace(gathered=plugin("_turn").Gathered()), None, None)
        delegate._handler = SimpleNamespace(in_place=True, ANSWER_SECONDS=limit, begin=begin)
        delegate._values = []

        def end() -> None:
            delegate.finish()
            done.append("finish is over")

        end() if in_task else asyncio.get_running_loop().call_soon(end)
        while len(done) < 2:
            await asyncio.sleep(0)

    asyncio.run(finish())
    assert done == said


@pytest.mark.parametrize("no_fast", [False, True])
def test_a_context_that_is_begun_in_place_and_takes_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_fast: bool
) -> None:
    """And so is the next one; what does not wait is answered beside it."""

    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def answers() -> list[tuple[int, str]]:
        flags = {"root": str(make_repository(tmp_path / "repository")), "storage": str(tmp_path / "storage"), "port": 0}
        settings = load_settings(flags | {"no_fast": no_fast}, {})
        async with Sidecar(settings, load_hooks(settings)) as sidecar:
            token = {"Authorization": f"Bearer {sidecar.tokens.mint('reader', 'chief-architect')}"}

            def ask(path: str) -> tuple[int, str]:
                answer = httpx.get(sidecar.info.url + path, headers=token, trust_env=False, timeout=30)
                return answer.status_code, answer.json().get("code") or answer.json()["status"]

            contexts = ["/api/context/issue-1/chief-architect"] * 2
            return [await asyncio.to_thread(ask, path) for path in [*contexts, "/health"]]

    monkeypatch.setattr(GetContext, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(Contexts, "made", never)
    refused = (ERRORS["CTX_001"][0], "CTX_001")
    assert asyncio.run(answers()) == [refused, refused, (200, "healthy")]


def test_what_health_measures_is_shared_while_all_is_well() -> None:
    measured: list[str] = []

    async def measure() -> dict[str, Any]:
        measured.append(state)
        await asyncio.sleep(0)
        return {"storage": state, "event_bus": "healthy"}

    async def ask(shared: Any) -> int:
        measured.clear()
        answers = await asyncio.gather(*(shared.get(measure) for _ in range(3)), return_exceptions=True)
        assert [answer["storage"] for answer in [*answers, await shared.get(measure)]] == [state] * 4
        return len(measured)

    async def all_of_them(shared: Any) -> list[int]:
        nonlocal state
        well = [await ask(shared), await ask(shared)]
        shared.until, state = 0.0, "unhealthy: full"
        return [*well, await ask(shared)]

    state = "healthy"
    assert asyncio.run(all_of_them(plugin("ready").SharedChecks(60))) == [1, 0, 2]


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_chunks_are_the_same_however_they_are_cut(step: int) -> None:
    data = b'3\r\nabc\r\nA ;x="y"\r\n0123456789\r\n0\r\nX: 1\r\nY: 2\r\n\r\nGET /'
    chunks, buffer, body = framing.Chunks(), b"", b""
    for start in range(0, len(data), step):
        buffer += data[start : start + step]
        while not chunks.ended:
            piece, buffer = chunks.take(buffer)
            body += piece
            if not piece:
                break
    assert (body, buffer, chunks.ended) == (b"abc0123456789", b"GET /", True)


@pytest.mark.parametrize("begun", [b"5", b"5\r\nhello\r", b"0\r\nName: value"])
def test_half_a_line_of_a_chunk_is_looked_at_when_more_comes(
    make: Callable[..., Both], monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    looks: list[bytes] = []
    take = framing.Chunks.take
    monkeypatch.setattr(framing.Chunks, "take", lambda self, data: looks.append(data) or take(self, data))
    server = make()
    with server.connect() as line:
        line.sendall(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + begun)
        wait_for(lambda: looks)
        for _ in range(20):
            server.ask(HEAD % (b"/big?n=1", b"Connection: close\r\n"))
        assert len(looks) <= 4, "each time when something came, or was read"
        line.sendall(
            (b"5\r\nhello\r\n0\r\nName: value\r\n\r\n").removeprefix(begun) if begun[:1] == b"5" else b"\r\n\r\n"
        )
        assert b" 200 " in line.recv(1000)


def test_many_small_chunks_leave_the_loop_to_others() -> None:
    chunks = framing.Chunks()
    piece, rest = chunks.take(b"1\r\nx\r\n" * 5_000)
    assert 0 < len(piece) < 5_000 and len(rest) % 6 == 0 and not chunks.ended


@pytest.mark.parametrize(
    "trailers", [b"X\r\n\r\n", b"X: \0\r\n\r\n", b"\n", b"X: 1\n\n", b" x: 1\r\n\r\n", b"X: " + b"y" * 9_000]
)
def test_trailers_that_are_malformed_or_endless_are_refused(trailers: bytes) -> None:
    with pytest.raises(ApiError):
        framing.Chunks().take(b"0\r\n" + trailers)


# -- time and room


def test_what_is_idle_or_stuck_is_closed(make: Callable[..., Both]) -> None:
    server = make(seconds=1.0, idle_connection_timeout=1.0)
    assert server.ask(b"") == b"", "idle from the start"
    assert server.ask(HEAD % (b"/big?n=3", b"")).endswith(b"xxx"), "idle behind a request"
    assert server.ask(HEAD.replace(b"GET", b"POST") % (b"/upload", b"Content-Length: 9\r\n") + b"x") == b""
    assert server.ask(b"GET / HT").startswith(b"HTTP/1.1 408 ")
    wait_for(lambda: server.open_connections() == 0)


def test_what_is_pipelined_without_end_waits_in_the_client(make: Callable[..., Both]) -> None:
    server = make()
    with server.connect() as line:
        line.sendall(HEAD % (b"/poll", b""))
        wait_for(lambda: server.world.waiting)
        line.settimeout(0.3)
        piece, number = HEAD % (b"/big?n=1", b"") * 1000, 0
        with pytest.raises(TimeoutError):
            while number < 1000:
                line.sendall(piece)
                number += 1
        held = server.call(lambda: [len(connection._buffer) for connection in server.server._connections])
        assert held[0] < 2**20
        server.wake()
        line.settimeout(10)
        got = b""
        while got.count(b"HTTP/1.1 200") < 500:
            got += line.recv(65_536)


def test_who_ends_its_side_right_behind_a_request_is_answered(make: Callable[..., Both]) -> None:
    server = make()
    for request in (HEAD % (b"/big?n=3", b""), HEAD % (b"/big?n=2", b"") + HEAD % (b"/big?n=3", b"")):
        with server.connect() as line:
            line.sendall(request)
            line.shutdown(socket.SHUT_WR)
            assert read_all(line).endswith(b"xxx")
    for body in (b"Content-Length: 3\r\n\r\nxxx", b"Transfer-Encoding: chunked\r\n\r\n3\r\nxxx\r\n0\r\n\r\n"):
        request = HEAD.replace(b"GET", b"POST")[:-2] % (b"/upload", body)
        for end, answered in ((len(request), True), (-1, False)):
            with server.connect() as line:
                line.sendall(request[:end])
                line.shutdown(socket.SHUT_WR)
                assert (b" 200 " in read_all(line)) is answered, request[:end]
    with server.connect() as line:  # it may as well have gone: a poll ends soon
        line.sendall(HEAD % (b"/poll", b""))
        line.shutdown(socket.SHUT_WR)
        assert read_all(line) == b""
    wait_for(lambda: not server.world.waiting)


def test_a_stop_sends_what_was_answered_and_ends_the_rest(make: Callable[..., Both]) -> None:
    server = make()
    with server.connect() as idle, server.connect() as poll, server.connect() as half:
        poll.sendall(HEAD % (b"/poll", b""))
        half.sendall(b"GET /he")
        wait_for(lambda: server.world.waiting and server.call(server.server.connections) == 3)
        server.stop()
        assert [read_all(line) for line in (idle, poll, half)] == [b"", b"", b""]


def test_tls_is_served_in_the_same_way(make: Callable[..., Both], certificate: Any) -> None:  # noqa: F811
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = make(tls=context, send_buffer=65_536)
    assert server.ask(HEAD % (b"/streamed?n=2", b"Connection: close\r\n")).endswith(b"2\r\n1\n\r\n0\r\n\r\n")
    with server.connect() as line:
        line.sendall(HEAD % (b"/big?n=20000000", b"Connection: close\r\n"))
        wait_for(lambda: server.world.waiting)
        assert len(read_all(line)) > 20_000_000
    with server.connect() as line:
        line.sendall(HEAD % (b"/poll", b""))
        wait_for(lambda: server.world.waiting)
    wait_for(lambda: not server.world.waiting)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "Tornado's"])
def test_an_answer_to_a_tls_connection_that_has_just_ended_is_not_taken(
    make: Callable[..., Both],
    certificate: Any,  # noqa: F811
    fast: bool,
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = make(fast, tls=context)

    def answer() -> asyncio.Future[None]:
        """In the turn of the loop in which the stream ends, before the connection hears of it."""
        (handler,), (connection,) = server.world.waiting, server.server._connections
        typing.cast(Any, connection._transport._stream if fast else connection.stream).close()
        handler.gone.set()
        return typing.cast("asyncio.Future[None]", handler.finish(b"late"))

    for _ in range(3):
        with server.connect() as line:
            line.sendall(HEAD % (b"/poll", b""))
            wait_for(lambda: server.world.waiting)
            written = server.call(answer)
            wait_for(written.done)
            assert isinstance(written.exception(), StreamClosedError)
        wait_for(lambda: not server.world.waiting)


def test_each_answer_says_its_own_behind_what_the_last_one_said(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Service, "options", ())  # those that the whole suite is run with may choose one server
    context, limited, free = "/api/context/heads/python-specialist", "python-specialist", "chief-architect"
    asked = [
        (limited, context, {}), (limited, context, {"If-None-Match": "*"}), (free, context, {"If-None-Match": "*"}),
        (free, context, {}), (limited, context, {}), (free, "/status?unknown=1", {}), (limited, "/status", {}),
        (free, "/status", {}), (limited, "/status?unknown=1&other=2", {}), (limited, "/status?unknown=1&other=2", {}),
        (free, context, {"Connection": "close"}), (free, "/status", {"X-Request-ID": "theirs"}), (free, "/none", {}),
    ]  # fmt: skip
    own = ("date", "x-request-id", "x-ratelimit-reset", "x-ratelimit-remaining", "content-length", "etag")
    found = []
    for options in ((), ("--no-fast",)):
        service = make_service(*options)
        clients = {kind: service.client(kind) for kind in (limited, free)}
        heads = [clients[kind].get(path, headers=headers).headers for kind, path, headers in asked]
        assert len({head["X-Request-ID"] for head in heads}) == len(asked)
        assert ["X-RateLimit-Remaining" in head for head in heads] == [kind == limited for kind, *_ in asked]
        found.append([sorted(item for item in head.lower_items() if item[0] not in own) for head in heads])
        assert service.stop() == 0
    fast, tornado = found
    assert fast == tornado
    assert [dict(head).get("x-ignored") for head in fast[5:10]] == ["unknown", None, None, *["other, unknown"] * 2]


def test_polls_of_a_crowd_that_comes_first_have_no_tables_of_their_own(tmp_path: Path) -> None:
    (root := tmp_path / "root").mkdir()
    settings = load_settings({"root": str(root), "storage": str(tmp_path / "storage"), "port": "0"}, {})

    async def park() -> list[bool]:
        async with Sidecar(settings, load_hooks(settings)) as sidecar:
            url = json.loads((settings.storage / "sidecar.json").read_text())["url"]
            token = f"Authorization: Bearer {sidecar.tokens.mint('crowd', 'chief-architect')}\r\n".encode()
            lines = [await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2])) for _ in range(60)]
            for _, writer in lines:
                writer.write(HEAD % (b"/api/events/wait/x?timeout=60000", token))
            async with asyncio.timeout(30):
                while sidecar.bus.statistics()["active_subscriptions"] < len(lines):
                    await asyncio.sleep(0.01)
            polls = [each for each in gc.get_objects() if type(each).__name__ in ("WaitForEvents", "Http1Exchange")]
            own = {"request_id", "_close_callback"}
            tables = [
                any(type(held) is dict and own & held.keys() for held in gc.get_referents(poll)) for poll in polls
            ]
            for _, writer in lines:
                writer.close()
            return tables

    tables = asyncio.run(park())
    assert len(tables) >= 120
    assert not any(tables)


def test_the_banner_and_the_status_say_which_server_runs(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Service, "options", ())  # those that the whole suite is run with may choose one
    for options, words in [((), "fast HTTP/1.1 and HTTP/2"), (("--no-fast",), "HTTP/1.1 and HTTP/2")]:
        service = make_service(*options)
        assert service.client().get("/status").json()["performance"]["protocols"] == words
        until(lambda words=words, service=service: f"  {words}\n" in service.log)
        assert service.stop() == 0

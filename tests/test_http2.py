"""Tests of plugins/http/http2.py: a real server on port 0, asked by curl, nghttp, h2load, httpx and frames written by hand.

Every test runs on asyncio and on uvloop. Tests wait for conditions, with a generous limit, and end what they start.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import json
import logging
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h2.errors
import hpack
import httpx
import pytest
from conftest import needed
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from tornado import web
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets

from cco_sidecar import Server, import_file

http2 = import_file(Path(__file__).resolve().parent.parent / "plugins/http/http2.py")

PATIENCE = 20  # seconds that a condition may take on a busy machine
E = h2.errors.ErrorCodes
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


# ---- An application with everything that handlers do
# ------------------------------------------------------------------------------


class World:
    """What the handlers of one server saw; shared between its thread and the test's."""

    def __init__(self):
        self.waiting, self.hangups, self.begun, self.outcomes = set(), 0, 0, []
        self.wake: asyncio.Event | None = None
        self.delivered = 0


class Handler(web.RequestHandler):
    @property
    def world(self) -> World:
        return self.application.world

    def prepare(self):
        self.world.begun += 1

    def on_connection_close(self):
        super().on_connection_close()
        self.world.hangups += 1


class Hello(Handler):
    def get(self):
        self.write(
            {
                "hello": "world",
                "version": self.request.version,
                "host": self.request.host,
                "ip": self.request.remote_ip,
                "protocol": self.request.protocol,
                "seen": dict(self.request.headers),
            }
        )

    head = get


class Big(Handler):
    async def get(self):
        self.world.waiting.add(self)
        try:
            await self.finish(b"x" * int(self.get_argument("n")))
            self.world.outcomes.append("written")
        except StreamClosedError:
            self.world.outcomes.append("closed")
        finally:
            self.world.waiting.discard(self)


class Streamed(Handler):
    async def get(self):
        with contextlib.suppress(StreamClosedError):
            for n in range(int(self.get_argument("n"))):
                self.write(b"%d\n" % n)
                await self.flush()


class Poll(Handler):
    async def get(self):
        self.gone = asyncio.Event()
        self.world.waiting.add(self)
        waits = [asyncio.ensure_future(event.wait()) for event in (self.world.wake, self.gone)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self.world.waiting.discard(self)
        if not self.gone.is_set():
            self.write({"woken": True})

    def on_connection_close(self):
        super().on_connection_close()
        self.gone.set()


class Impatient(Handler):
    """Gives its answer up at once, as the sidecar does after a minute without progress."""

    async def get(self):
        self.world.waiting.add(self)
        written = self.finish(b"x" * 1_000_000)
        await self.world.wake.wait()
        self.request.connection.close()
        self.request.connection.close()
        try:
            await written
        except StreamClosedError:
            self.world.outcomes.append("closed")
        self.world.waiting.discard(self)


class CallbackPoll(Handler):
    """Sets its own callback on the connection, as the documentation of Tornado shows."""

    async def get(self):
        gone = asyncio.Event()
        self.request.connection.set_close_callback(gone.set)
        self.world.waiting.add(self)
        await gone.wait()
        self.world.waiting.discard(self)
        self.world.outcomes.append("callback")


class Echo(Handler):
    def post(self):
        self.write(self.request.body)


@web.stream_request_body
class Upload(Handler):
    """413 as JSON before the body was read, or in the middle of it; optionally as slow as the test likes."""

    async def prepare(self):
        super().prepare()
        self.size = 0
        self.request.connection.set_max_body_size(1 << 30)
        if int(self.request.headers.get("Content-Length", 0)) > int(self.get_argument("limit", 1 << 30)):
            self.refuse()

    def refuse(self):
        self.set_status(413)
        self.finish({"error": "too_large"})

    async def data_received(self, chunk):
        self.size += len(chunk)
        self.world.delivered += len(chunk)
        if self.get_argument("slow", ""):
            self.world.waiting.add(self)
            await self.world.wake.wait()
            self.world.waiting.discard(self)
        if self.size > int(self.get_argument("limit", 1 << 30)) and not self._finished:
            self.refuse()

    def post(self):
        self.write({"size": self.size})

    put = post


class Boom(Handler):
    def get(self):
        raise RuntimeError("boom")


class Odd(Handler):
    """Answers that HTTP/2 must not pass on as they are."""

    def get(self, kind):
        if kind == "fields":
            self.set_header("Connection", "close")
            self.set_header("Keep-Alive", "5")
            self.set_header("X-Refreshed-Token", "secret")
            self.set_header("X-Latin", "caf\xe9")
        elif kind == "short":
            self.set_header("Content-Length", "10")
            self.write(b"four")
        elif kind == "long":
            self.set_header("Content-Length", "2")
            self.write(b"four")
        elif kind == "304":
            self.set_status(304)
        elif kind == "204":
            self.set_status(204)
        elif kind == "detach":
            self.detach()


ROUTES = [
    ("/hello", Hello),
    ("/big", Big),
    ("/streamed", Streamed),
    ("/poll", Poll),
    ("/impatient", Impatient),
    ("/callback", CallbackPoll),
    ("/echo", Echo),
    ("/upload", Upload),
    ("/boom", Boom),
    (r"/odd/(\w+)", Odd),
]


# ---- A server in a thread
# ---------------------------------------------------------------------------------------------------------


class Running:
    """A server with its own loop in its own thread; `run` brings a coroutine function there."""

    def __init__(self, loop_factory, limits=None, tls=None, send_buffer=None, **options):
        self.world, self.limits, self.tls, self.send_buffer, self.options = World(), limits, tls, send_buffer, options
        self.started = threading.Event()
        self.thread = threading.Thread(target=self._main, args=(loop_factory,))
        self.thread.start()
        assert self.started.wait(PATIENCE)

    def _main(self, loop_factory):
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(self._serve())

    async def _serve(self):
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        self.world.wake = asyncio.Event()
        app = web.Application(ROUTES)
        app.world = self.world
        self.server = self.kind()(app, ssl_options=self.tls, **self.options)
        sockets = bind_sockets(0, "127.0.0.1")
        if self.send_buffer:
            sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.send_buffer)
        self.server.add_sockets(sockets)
        self.port = sockets[0].getsockname()[1]
        self.started.set()
        await self.over.wait()
        self.server.stop()
        await self.server.close_all_connections()

    def kind(self):
        return type("Server", (http2.Http2Server,), {"limits": self.limits or http2.Limits()})

    def run(self, work, *args):
        return asyncio.run_coroutine_threadsafe(work(*args), self.loop).result(PATIENCE)

    def call(self, work, *args):
        async def later():
            return work(*args)

        return self.run(later)

    def wake(self):
        self.call(self.world.wake.set)

    def statistics(self):
        return self.call(self.server.statistics)

    def url(self, path):
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}{path}"

    def pending(self):
        """Coroutines that wait in the server, apart from its own main one."""
        tasks = self.call(lambda: [t.get_coro().__qualname__ for t in asyncio.all_tasks(self.loop)])
        return [name for name in tasks if not name.endswith(("Running._serve", "later", "Connection._live"))]

    def stop(self):
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.over.set)
            self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


def wait_for(condition, what=""):
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"never happened: {what or condition}"
        time.sleep(0.005)
    return value


@pytest.fixture(params=["asyncio", "uvloop"])
def loop_factory(request):
    if request.param == "asyncio":
        return asyncio.new_event_loop
    return pytest.importorskip("uvloop").new_event_loop


@pytest.fixture
def faults():
    """Words of errors in the log that a test expects; any other error fails it."""
    return []


@pytest.fixture
def start(loop_factory, caplog, faults):
    """Starts servers; at the end stops them and looks at what they left."""
    caplog.set_level(logging.INFO)
    servers = []

    def begin(**options):
        servers.append(Running(loop_factory, **options))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()
        assert {
            **server.server.statistics(),
            "greeting": 0,
            "connections": 0,
            "streams": 0,
        } == server.server.statistics()
    logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not [line for line in logged if not any(word in line for word in faults)]


@pytest.fixture
def server(start):
    return start()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key.pem"
    name = "-days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -out cert.pem"
    run("openssl", "req", "-x509", *key.split(), *name.split(), cwd=folder)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def tls(certificate):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    return context


# ---- Clients
# ----------------------------------------------------------------------------------------------------------------------


def run(tool, *args, **options):
    """Output of a program."""
    return subprocess.run(
        [needed(tool), *args], check=True, capture_output=True, timeout=PATIENCE * 3, **options
    ).stdout


def curl(server, path, *args, **options):
    out = run(
        "curl", "-sk", "-m", str(PATIENCE), *args, "-w", "\n%{http_version} %{http_code}", server.url(path), **options
    )
    body, _, tail = out.rpartition(b"\n")
    return body, *tail.decode().split()


class Wire:
    """An HTTP/2 client that says exactly what it is told to, and remembers all that it hears."""

    def __init__(self, server, settings=None, preface=PREFACE, greet=True, receive_buffer=None):
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", server.port))
        self.socket.settimeout(PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self.buffer, self.frames, self.heads, self.closed = b"", [], {}, False
        if greet:
            self.send(preface, SettingsFrame(settings=settings or {}))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, *frames):
        """Returns False when the server no longer listens."""
        try:
            self.socket.sendall(b"".join(f if isinstance(f, bytes) else f.serialize() for f in frames))
            return True
        except (ConnectionError, TimeoutError):
            return False

    def head(self, stream, path="/hello", method="GET", fields=(), end=True):
        names = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "localhost"), *fields]
        flags = ["END_HEADERS", "END_STREAM"] if end else ["END_HEADERS"]
        return HeadersFrame(stream, data=self.encoder.encode(names), flags=flags)

    def ask(self, stream, *args, **options):
        self.send(self.head(stream, *args, **options))

    def hear(self, condition=lambda: False):
        """Reads until the condition holds or the server closes; says which."""
        while not condition():
            if self.closed:
                return False
            try:
                data = self.socket.recv(65536)
            except ConnectionError:
                data = b""
            self.closed = not data
            self.buffer += data
            while len(self.buffer) >= 9:
                frame, size = Frame.parse_frame_header(memoryview(self.buffer[:9]))
                if len(self.buffer) < 9 + size:
                    break
                frame.parse_body(memoryview(self.buffer[9 : 9 + size]))
                self.buffer = self.buffer[9 + size :]
                self._note(frame)
        return True

    def _note(self, frame):
        self.frames.append(frame)
        if isinstance(frame, HeadersFrame):
            self.heads.setdefault(frame.stream_id, []).append(dict(self.decoder.decode(frame.data)))

    def of(self, kind, stream=None):
        return [f for f in self.frames if isinstance(f, kind) and stream in (None, f.stream_id)]

    def body(self, stream):
        return b"".join(f.data for f in self.of(DataFrame, stream))

    def done(self, *streams):
        return all(
            any("END_STREAM" in f.flags for f in self.frames if f.stream_id == s) or self.of(RstStreamFrame, s)
            for s in streams
        )

    def status(self, stream):
        assert self.hear(lambda: stream in self.heads), "closed without an answer"
        return self.heads[stream][-1][":status"]

    def answer(self, stream):
        """Status and body, reading until they are complete."""
        assert self.hear(lambda: self.done(stream)), f"closed before the end of stream {stream}: {self.goodbye()}"
        return self.heads.get(stream, [{}])[-1].get(":status"), self.body(stream)

    def get(self, stream, path="/hello", **options):
        self.ask(stream, path, **options)
        return self.answer(stream)

    def goodbye(self):
        return [E(f.error_code) for f in self.of(GoAwayFrame)]

    def hear_goodbye(self):
        self.hear()
        return self.goodbye()[:1]

    def pinged(self):
        """A round trip: everything sent before has been dealt with."""
        mark = os.urandom(8)
        self.send(PingFrame(opaque_data=mark))
        return self.hear(lambda: any(f.opaque_data == mark for f in self.of(PingFrame)))


def window(stream, size):
    return WindowUpdateFrame(stream, window_increment=size)


def reset(stream, code=E.CANCEL):
    return RstStreamFrame(stream, error_code=code)


def still_serves(server):
    """Somebody else is answered meanwhile, over either protocol."""
    with Wire(server) as other:
        assert other.get(1)[0] == "200"
    plain = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    plain.request("GET", "/hello")
    assert plain.getresponse().status == 200
    plain.close()


# ---- Which protocol
# -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, version",
    [("--http1.1", "1.1"), ("--http2-prior-knowledge", "2"), ("--http2", "1.1"), ("--http1.0", "1.1")],
)
def test_one_cleartext_port_serves_both_protocols_and_ignores_upgrade(server, option, version):
    body, spoken, status = curl(server, "/hello", option)
    assert (json.loads(body)["hello"], spoken, status) == ("world", version, "200")


@pytest.mark.parametrize("option, version", [("--http1.1", "1.1"), ("--http2", "2")])
def test_one_tls_port_serves_both_protocols(start, tls, option, version):
    server = start(tls=tls)
    body, spoken, status = curl(server, "/hello", option)
    assert (json.loads(body)["protocol"], spoken, status) == ("https", version, "200")


def test_a_tls_client_without_alpn_gets_http_1(start, tls):
    server = start(tls=tls)
    context = ssl._create_unverified_context()
    client = http.client.HTTPSConnection("127.0.0.1", server.port, context=context, timeout=PATIENCE)
    client.request("GET", "/hello")
    assert json.loads(client.getresponse().read())["version"] == "HTTP/1.1"
    client.close()


def test_tls_options_as_a_dictionary_offer_http_2_too(start, certificate):
    server = start(tls={"certfile": str(certificate[0]), "keyfile": str(certificate[1])})
    assert curl(server, "/hello", "--http2")[1:] == ("2", "200")


@pytest.mark.parametrize(
    "message", [PREFACE + SettingsFrame().serialize(), b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"]
)
@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_slow_first_bytes_are_waited_for(server, message, cut):
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        wait_for(lambda: server.statistics()["greeting"] == 1, "connection seen, nothing said")
        sock.sendall(message[:cut])
        if PREFACE.startswith(message[:cut]) and cut < 4:
            assert server.statistics()["greeting"] == 1, "decided too early"
        sock.sendall(message[cut:])
        answer = sock.recv(9, socket.MSG_WAITALL)
        assert answer == b"HTTP/1.1 " if message.startswith(b"POST") else answer[3:] == b"\4\0\0\0\0\0", (
            "SETTINGS comes first"
        )


def test_who_stops_within_the_preface_is_left_to_http_1(start):
    server = start(limits=http2.Limits(handshake=1.0))
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        sock.sendall(b"P")
        wait_for(lambda: server.statistics()["greeting"] == 1)
        wait_for(lambda: server.statistics()["greeting"] == 0)
        sock.sendall(b"OST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi")
        assert sock.recv(15) == b"HTTP/1.1 200 OK"


def test_a_connection_opened_ahead_of_need_may_be_silent_for_longer_than_the_handshake(start):
    server = start(limits=http2.Limits(handshake=0.05, tick=0.02))
    with Wire(server, greet=False) as early, Wire(server, greet=False) as mute:
        wait_for(lambda: server.statistics()["greeting"] == 2)
        mute.send(PREFACE)
        assert not mute.hear(), "a preface without SETTINGS was waited for"
        early.send(PREFACE, SettingsFrame())
        assert early.get(1)[0] == "200"


def test_silence_ends_with_the_idle_time_out(start):
    server = start(idle_connection_timeout=1.0, limits=http2.Limits(tick=0.02))
    with Wire(server, greet=False) as silent, Wire(server) as idle:
        assert idle.get(1)[0] == "200"
        assert idle.hear_goodbye() == [E.NO_ERROR]
        assert not silent.hear()


def test_a_tls_client_that_says_nothing_is_hung_up_on(start, tls):
    server = start(tls=tls, limits=http2.Limits(handshake=0.1))
    with Wire(server, greet=False) as mute, Wire(server, greet=False) as rude:
        rude.send(b"GET / HTTP/1.1\r\n\r\n")
        rude.hear()
        assert not mute.hear()
    wait_for(lambda: server.statistics()["greeting"] == 0)


def test_hang_ups_around_the_tls_handshake_leave_nothing(start, tls):
    server = start(tls=tls)
    context = ssl._create_unverified_context()
    context.set_alpn_protocols(["h2"])
    for n in range(20):
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
            if n % 2:
                context.wrap_socket(sock).close()
    wait_for(lambda: server.statistics()["greeting"] == server.statistics()["connections"] == 0)


def test_who_hangs_up_under_tls_while_h2_is_imported_is_served_no_more(start, tls, monkeypatch, caplog):
    streams, imported, take, make = [], threading.Event(), http2.Http2Server.handle_stream, http2.connection_class
    monkeypatch.setattr(http2, "connection_class", lambda: imported.wait(PATIENCE) and make())
    monkeypatch.setattr(
        http2.Http2Server, "handle_stream", lambda self, *line: streams.append(line[0]) or take(self, *line)
    )
    server = start(tls=tls)
    context = ssl._create_unverified_context()
    context.set_alpn_protocols(["h2"])
    for n in range(3):
        with context.wrap_socket(socket.create_connection(("127.0.0.1", server.port), PATIENCE)):
            wait_for(lambda: server.call(lambda: server.server._importing))
        wait_for(lambda n=n: len(streams) == n + 1 and streams[n].closed(), "hang-up noticed")
    imported.set()
    wait_for(lambda: server.statistics()["greeting"] == server.statistics()["connections"] == 0)
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_hang_up_before_the_first_byte_leaves_nothing(server):
    for _ in range(20):
        Wire(server, greet=False).socket.close()
    wait_for(lambda: server.statistics()["greeting"] == 0)
    still_serves(server)


@pytest.mark.parametrize(
    "preface, first",
    [
        (PREFACE.replace(b"SM", b"XX"), SettingsFrame()),
        (PREFACE, PingFrame()),
        (PREFACE, HeadersFrame(1, data=b"", flags=["END_HEADERS"])),
    ],
)
def test_a_wrong_greeting_is_answered_with_goaway(server, preface, first):
    with Wire(server, greet=False) as wire:
        wire.send(preface, first)
        assert wire.hear_goodbye() == [E.PROTOCOL_ERROR]


# ---- Requests and answers
# -------------------------------------------------------------------------------------------------------------


def test_handlers_see_an_ordinary_request(server):
    with Wire(server) as wire:
        status, body = wire.get(
            1,
            "/hello?a=1",
            fields=[("x-one", "1"), ("cookie", "a=b"), ("cookie", "c=d"), ("x-two", "caf\xe9".encode("latin-1"))],
        )
        seen = json.loads(body)
        assert (status, seen["version"], seen["host"], seen["ip"], seen["protocol"]) == (
            "200",
            "HTTP/2.0",
            "localhost",
            "127.0.0.1",
            "http",
        )
        assert seen["seen"] == {"Host": "localhost", "X-One": "1", "Cookie": "a=b; c=d", "X-Two": "caf\xe9"}


def test_head_streamed_empty_and_failing_answers(server, faults):
    faults += ["boom", "500 GET"]
    with Wire(server) as wire:
        assert wire.get(1, method="HEAD") == ("200", b"") and int(wire.heads[1][0]["content-length"]) > 0
        assert wire.get(3, "/streamed?n=300") == ("200", b"".join(b"%d\n" % n for n in range(300)))
        assert wire.get(5, "/streamed?n=0") == ("200", b"")
        assert wire.get(7, "/odd/304") == ("304", b"") and wire.get(9, "/odd/204") == ("204", b"")
        assert wire.get(11, "/nowhere")[0] == "404" and wire.get(13, "/boom")[0] == "500"
        assert [f for f in wire.of(HeadersFrame) if f.stream_id in (1, 7, 9) and "END_STREAM" not in f.flags] == []


def test_fields_of_the_connection_are_dropped_and_secrets_not_indexed(server):
    with Wire(server) as wire:
        decoded, decode = [], wire.decoder.decode
        wire.decoder.decode = lambda data: (
            decoded.extend(fields := decode(data, raw=True)) or [(n.decode(), v.decode("latin-1")) for n, v in fields]
        )
        wire.get(1, "/odd/fields")
        assert not {"connection", "keep-alive"} & wire.heads[1][0].keys() and wire.heads[1][0]["x-latin"] == "caf\xe9"
        assert [f.indexable for f in decoded if f[0] in (b"x-refreshed-token", b"server")] == [True, False]


@pytest.mark.parametrize("kind", ["short", "long"])
def test_an_answer_that_breaks_its_content_length_is_reset(server, faults, kind):
    faults += [
        "Uncaught exception",
        "Exception in exception handler",
        "Cannot send error",
        "500 GET",
        "200 GET",
        "Content-Length",
    ]
    with Wire(server) as wire:
        wire.ask(1, "/odd/" + kind)
        assert wire.hear(lambda: wire.of(RstStreamFrame, 1)) and wire.get(3)[0] == "200"


def test_a_stream_cannot_be_detached(server, faults):
    faults += ["Uncaught exception", "500 GET"]
    with Wire(server) as wire:
        wire.ask(1, "/odd/detach")
        assert wire.pinged()  # the handler has failed, and only its own stream
        assert wire.get(3)[0] == "200"


@pytest.mark.parametrize(
    "method, path, status",
    [("GE T", "/hello", "400"), ("GET", "/a b", "400"), ("TRACE", "/hello", "405"), ("OPTIONS", "*", "404")],
)
def test_odd_request_lines_are_answered(server, method, path, status):
    with Wire(server) as wire:
        assert wire.get(1, path, method=method)[0] == status
        assert wire.get(3)[0] == "200"


def test_a_host_that_tornado_refuses_is_a_400(server):
    with Wire(server) as wire:
        wire.send(
            HeadersFrame(
                1,
                data=wire.encoder.encode(
                    [(":method", "GET"), (":path", "/hello"), (":scheme", "http"), (":authority", "a@b")]
                ),
                flags=["END_HEADERS", "END_STREAM"],
            )
        )
        assert wire.answer(1)[0] == "400" and wire.get(3)[0] == "200"


def test_a_server_behind_a_proxy_serves_http_2_and_trusts_only_the_socket(start):
    server = start(xheaders=True)
    with Wire(server) as wire:
        assert json.loads(wire.get(1, fields=[("x-forwarded-for", "9.9.9.9")])[1])["ip"] == "127.0.0.1"


def test_bodies_arrive_whole_with_padding_trailers_and_continue(server):
    with Wire(server) as wire:
        wire.ask(1, "/echo", "POST", end=False, fields=[("expect", "100-continue")])
        assert wire.status(1) == "100"
        sent = b""
        for n in range(400):  # more than a window of padding: all of it must come back
            wire.send(DataFrame(1, data=b"%d," % n, pad_length=255, flags=["PADDED"]))
            sent += b"%d," % n
        wire.send(HeadersFrame(1, data=wire.encoder.encode([("x-trailer", "1")]), flags=["END_HEADERS", "END_STREAM"]))
        assert wire.answer(1) == ("200", sent)


def test_large_bodies_in_both_directions(server, tmp_path):
    file = tmp_path / "body"
    file.write_bytes(os.urandom(5 << 20))
    assert curl(server, "/echo", "--http2-prior-knowledge", "-H", "Content-Type: x/y", "--data-binary", f"@{file}") == (
        file.read_bytes(),
        "2",
        "200",
    )


@pytest.mark.parametrize("upload", [["--data-binary", "@-"], ["-T", "-"]])
def test_an_answer_before_the_body_was_read_arrives(server, upload):
    """With Content-Length the handler refuses at once, without it in the middle."""
    answer = curl(server, "/upload?limit=1000", "--http2-prior-knowledge", *upload, input=b"x" * (3 << 20))
    assert answer == (b'{"error": "too_large"}', "2", "413")
    wait_for(lambda: not server.pending(), "handlers gone")


def test_reading_on_after_an_early_answer_is_bounded(start):
    server = start(limits=http2.Limits(discard=0.1, tick=0.02, discard_bytes=100_000))
    with Wire(server) as slow, Wire(server) as fast:
        slow.ask(1, "/upload?limit=1", "POST", end=False, fields=[("content-length", "500000")])
        assert slow.hear(lambda: slow.of(RstStreamFrame, 1)) and slow.of(RstStreamFrame)[0].error_code == E.NO_ERROR
        assert slow.heads[1][0][":status"] == "413" and slow.get(3)[0] == "200"
        fast.ask(1, "/upload?limit=1", "POST", end=False, fields=[("content-length", "500000")])
        fast.send(*[DataFrame(1, data=b"x" * 10_000)] * 6)
        fast.hear(lambda: fast.of(WindowUpdateFrame, 1) or fast.of(RstStreamFrame, 1))
        fast.send(*[DataFrame(1, data=b"x" * 10_000)] * 5)
        assert fast.hear(lambda: fast.of(RstStreamFrame, 1)) and fast.heads[1][0][":status"] == "413"
    wait_for(lambda: not server.pending(), "handlers gone")


@pytest.mark.parametrize("fields", [[], [("content-length", "2000")]])
def test_a_body_above_the_servers_limit_is_a_413(start, fields):
    server = start(max_body_size=1000)
    with Wire(server) as wire:
        wire.ask(1, "/echo", "POST", end=False, fields=fields)
        wire.send(DataFrame(1, data=b"x" * 2000, flags=["END_STREAM"]))
        assert wire.answer(1) == ("413", b"") and server.world.begun == 0
        wire.ask(3, "/echo", "POST", end=False)
        wire.send(DataFrame(3, data=b"x" * 1000, flags=["END_STREAM"]))
        assert wire.answer(3) == ("200", b"x" * 1000)


@pytest.mark.parametrize("protocol", ["h2", "h2 over TLS"])
def test_httpx_asks_fifty_things_at_once(start, tls, protocol):
    server = start(tls=tls if "TLS" in protocol else None)

    async def ask():
        async with httpx.AsyncClient(http1=False, http2=True, verify=False, timeout=PATIENCE) as client:
            answers = await asyncio.gather(
                *(
                    client.post(server.url("/echo"), content=b"%d" % n, headers={"content-type": "x/y"})
                    for n in range(50)
                )
            )
            assert [(a.http_version, a.content) for a in answers] == [("HTTP/2", b"%d" % n) for n in range(50)]

    asyncio.run(ask())
    assert server.statistics()["accepted"] == 1


def test_nghttp_and_h2load_are_content(server):
    assert run("nghttp", "-m", "20", server.url("/hello")).count(b'"HTTP/2.0"') == 20
    out = run("h2load", "-n", "2000", "-c", "5", "-m", "20", server.url("/hello")).decode()
    assert "2000 succeeded, 0 failed" in out


# ---- Long polls, cancelling, flow control
# ----------------------------------------------------------------------------------------------


def test_fifty_long_polls_wait_while_others_are_answered(server):
    with Wire(server) as wire:
        polls = range(1, 101, 2)
        wire.send(*[wire.head(n, "/poll") for n in polls])
        wait_for(lambda: len(server.world.waiting) == 50)
        times = []
        for n in range(101, 301, 2):
            begun = time.perf_counter()
            assert wire.get(n)[0] == "200"
            times.append(time.perf_counter() - begun)
        print(f"p50 {sorted(times)[50] * 1000:.1f} ms")
        assert not any(n in wire.heads for n in polls)
        server.wake()
        assert wire.hear(lambda: wire.done(*polls)) and all(wire.body(n) == b'{"woken": true}' for n in polls)


@pytest.mark.parametrize("path", ["/poll", "/callback"])
def test_a_cancelled_stream_frees_its_waiter_and_a_hang_up_all(server, path):
    with Wire(server) as wire:
        wire.send(*[wire.head(n, path) for n in range(1, 21, 2)])
        wait_for(lambda: len(server.world.waiting) == 10)
        wire.send(*[reset(n) for n in (1, 5, 9, 13)])
        wait_for(lambda: len(server.world.waiting) == 6)
        assert wire.get(21)[0] == "200" and (server.world.hangups or len(server.world.outcomes)) == 4
    wait_for(lambda: not server.world.waiting)
    assert (server.world.hangups or len(server.world.outcomes)) == 10
    wait_for(lambda: not server.pending(), "handlers gone")


def test_a_stream_reset_during_its_upload_ends_its_handler(server):
    with Wire(server) as wire:
        wire.ask(1, "/upload", "POST", end=False)
        wire.send(DataFrame(1, data=b"x" * 100))
        wait_for(lambda: server.world.delivered == 100)
        wire.send(reset(1))
        wait_for(lambda: server.world.hangups == 1)
        wait_for(lambda: not server.pending(), "handlers gone")
        assert wire.get(3)[0] == "200"


def test_a_client_that_never_opens_its_window_gets_what_it_allowed_and_holds_up_nobody(server):
    with Wire(server) as wire:
        wire.ask(1, "/big?n=5242880")
        assert wire.hear(lambda: len(wire.body(1)) == 65_535)
        assert wire.get(3, "/odd/204") == ("204", b"") and wire.get(5, method="HEAD")[0] == "200"
        assert len(wire.body(1)) == 65_535 and not server.world.outcomes
        wire.send(window(1, 1 << 24), window(0, 1 << 24))
        assert wire.answer(1) == ("200", b"x" * 5_242_880)
        wait_for(lambda: server.world.outcomes == ["written"])


def test_a_long_answer_does_not_hold_up_a_short_one(server):
    with Wire(server, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 1 << 30}) as wire:
        wire.send(window(0, 1 << 30), wire.head(1, "/big?n=20000000"), wire.head(3))
        assert wire.answer(3)[0] == "200" and not wire.done(1)
        assert len(wire.answer(1)[1]) == 20_000_000


def test_a_window_below_zero_is_respected(server):
    with Wire(server) as wire:
        wire.ask(1, "/big?n=100000")
        assert wire.hear(lambda: len(wire.body(1)) == 65_535)
        wire.send(SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: 100}), window(0, 1 << 20), window(1, 1000))
        assert wire.pinged() and len(wire.body(1)) == 65_535
        wire.send(SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: 1 << 20}))
        assert len(wire.answer(1)[1]) == 100_000


@pytest.mark.parametrize("end", ["reset", "hang up"])
def test_a_pending_answer_fails_when_its_peer_goes(server, end):
    with Wire(server) as wire:
        wire.ask(1, "/big?n=1000000")
        assert wire.hear(lambda: len(wire.body(1)) == 65_535) and not server.world.outcomes
        if end == "reset":
            wire.send(reset(1))
            wait_for(lambda: server.world.outcomes == ["closed"])
    wait_for(lambda: server.world.outcomes == ["closed"])


def test_a_handler_that_closes_its_connection_ends_its_own_stream_only(server):
    with Wire(server) as wire:
        wire.send(wire.head(1, "/impatient"), window(0, 1 << 20))
        assert wire.hear(lambda: len(wire.body(1)) == 65_535)
        server.wake()
        assert wire.hear(lambda: wire.of(RstStreamFrame, 1)) and wire.of(RstStreamFrame, 1)[0].error_code == E.CANCEL
        wait_for(lambda: server.world.outcomes == ["closed"])
        assert wire.get(3)[0] == "200"
    wait_for(lambda: not server.pending(), "handlers gone")


def test_an_answer_counts_as_written_only_when_the_socket_took_it(start):
    server = start(limits=http2.Limits(unsent=1 << 30, unsent_ever=1 << 30))
    with Wire(server, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 1 << 30}, receive_buffer=65536) as wire:
        wire.send(window(0, 1 << 30))
        wire.ask(1, "/big?n=8000000")
        wait_for(lambda: server.world.waiting)
        still_serves(server)
        assert not server.world.outcomes, "8 MB cannot have left"
        assert len(wire.answer(1)[1]) == 8_000_000
        wait_for(lambda: server.world.outcomes == ["written"])


def test_a_slow_handler_holds_up_only_its_own_upload(server):
    with Wire(server) as wire:
        for stream in range(1, 41, 2):  # 20 times a window: more than one stream could ever use up
            wire.ask(stream, "/upload?slow=1", "POST", end=False)
            wire.send(*[DataFrame(stream, data=b"x" * 13_107)] * 5)
        wait_for(lambda: len(server.world.waiting) == 20)
        wire.ask(101, "/upload", "POST", end=False)
        wire.send(*[DataFrame(101, data=b"x" * 10_000)] * 3, DataFrame(101, flags=["END_STREAM"]))
        assert wire.answer(101)[1] == b'{"size": 30000}'
        assert not wire.of(WindowUpdateFrame, 1), "window came back before the handler took the data"
        server.wake()
        assert wire.hear(lambda: all(wire.of(WindowUpdateFrame, n) for n in range(1, 41, 2)))


def test_data_of_dead_streams_gives_its_window_back(server):
    with Wire(server) as wire:
        assert wire.pinged()
        left = 65_535 + sum(f.window_increment for f in wire.of(WindowUpdateFrame, 0))
        for stream in range(1, 241, 2):
            wire.ask(stream, "/upload?slow=1", "POST", end=False)
            wire.send(
                *[DataFrame(stream, data=b"x" * 10_000, pad_length=200, flags=["PADDED"])] * 6,
                reset(stream),
                DataFrame(stream, data=b"x" * 1_000),
            )
            assert wire.pinged()
        left -= 120 * (6 * 10_201 + 1_000)
        left += sum(f.window_increment for f in wire.of(WindowUpdateFrame, 0)) - (
            left + 120 * (6 * 10_201 + 1_000) - 65_535
        )
        assert left > 1_000_000, "the connection's window leaks away"


def test_uploads_in_crumbs_are_not_a_flood(server):
    with Wire(server) as wire:
        wire.ask(1, "/upload", "POST", end=False)
        for _ in range(5):
            wire.send(*[DataFrame(1, data=b"x")] * 4_000)
        wire.send(DataFrame(1, flags=["END_STREAM"]))
        assert wire.answer(1) == ("200", b'{"size": 20000}')


def test_a_client_that_says_goaway_still_gets_its_answers(server):
    with Wire(server) as wire:
        wire.ask(1, "/poll")
        wait_for(lambda: server.world.waiting)
        wire.send(GoAwayFrame(last_stream_id=0, error_code=0))
        assert wire.pinged()
        server.wake()
        assert wire.answer(1) == ("200", b'{"woken": true}')
        assert wire.hear_goodbye() == [E.NO_ERROR]


# ---- Those who give nothing back
# ------------------------------------------------------------------------------------------------------


def test_more_streams_than_allowed_are_refused_and_nothing_else(server):
    """All at once, before the client can have read our limit."""
    with Wire(server, greet=False) as wire:
        streams = range(1, 301, 2)
        wire.send(PREFACE, SettingsFrame(), *[wire.head(n, "/poll") for n in streams])
        assert wire.hear(lambda: len(wire.of(RstStreamFrame)) == 50)
        assert {(f.stream_id, f.error_code) for f in wire.of(RstStreamFrame)} == {
            (n, E.REFUSED_STREAM) for n in streams[100:]
        }
        assert wire.of(SettingsFrame)[0].settings[SettingsFrame.MAX_CONCURRENT_STREAMS] == 100
        wait_for(lambda: len(server.world.waiting) == 100)
        server.wake()
        assert wire.hear(lambda: wire.done(*streams)) and wire.get(301)[0] == "200"


QUICK = http2.Limits(stall=0.2, tick=0.02)


@pytest.mark.parametrize("window_size", [0, 100])
def test_an_answer_that_nobody_takes_is_reset(start, window_size):
    server = start(limits=QUICK)
    with Wire(server, settings={SettingsFrame.INITIAL_WINDOW_SIZE: window_size}) as wire:
        wire.ask(1, "/big?n=1000000")
        assert wire.hear(lambda: wire.of(RstStreamFrame, 1)) and len(wire.body(1)) == window_size
        assert wire.get(3, "/odd/204")[0] == "204"
    wait_for(lambda: server.world.outcomes == ["closed"])


def test_a_window_that_opens_in_drips_is_no_progress(start):
    server = start(limits=http2.Limits(stall=0.2, tick=0.02, burst=10**9))
    with Wire(server) as wire:
        wire.ask(1, "/big?n=1000000")
        assert wire.hear(lambda: len(wire.body(1)) == 65_535)
        wire.send(window(0, 1 << 20))
        wait_for(lambda: wire.send(window(1, 1)) and wire.pinged() and wire.of(RstStreamFrame, 1))
    wait_for(lambda: server.world.outcomes == ["closed"])


def test_a_body_that_does_not_come_is_not_waited_for(start):
    server = start(limits=QUICK)
    with Wire(server) as wire:
        wire.ask(1, "/upload", "POST", end=False)
        wire.ask(3, "/echo", "POST", end=False)
        wire.ask(5, "/poll")
        assert wire.hear(lambda: wire.done(1, 3))
        assert server.world.waiting and 5 not in wire.heads, "a poll is not a stall"
    wait_for(lambda: not server.pending(), "handlers gone")


def test_the_body_time_out_of_the_server_holds(start):
    server = start(body_timeout=0.1, limits=http2.Limits(tick=0.02))
    with Wire(server) as wire:
        wire.ask(1, "/upload", "POST", end=False)
        assert wire.hear(lambda: wire.of(RstStreamFrame, 1))


def test_a_peer_that_asks_and_never_reads_costs_little_and_is_dropped(start):
    server = start(limits=http2.Limits(stall=0.5, tick=0.02))
    with Wire(server, receive_buffer=4096) as wire:
        wire.socket.settimeout(0.2)
        stream, most = 1, 0
        wait_for(lambda: server.statistics()["connections"])
        connection = next(iter(server.server.http2_connections))
        while wire.send(*[wire.head(stream + 2 * n, "/odd/204") for n in range(50)]) and stream < 1_000_000:
            stream += 100
            most = max(most, connection.unsent)
        wait_for(lambda: server.statistics()["connections"] == 0)
        assert most < 300_000
    still_serves(server)


def test_replies_that_nobody_reads_are_bounded(start):
    server = start(limits=http2.Limits(burst=10**9, unsent_ever=200_000), send_buffer=16_384)
    with Wire(server, receive_buffer=4096) as wire:
        wait_for(lambda: server.statistics()["connections"])
        connection = next(iter(server.server.http2_connections))
        while wire.send(*[PingFrame(opaque_data=b"12345678")] * 1_000):
            assert connection.unsent < 300_000
        wait_for(lambda: server.statistics()["connections"] == 0)


def test_answers_that_wait_for_one_peer_are_bounded(start):
    server = start(limits=http2.Limits(unread=1_000_000))
    with Wire(server) as wire:
        for stream in (1, 3, 5):
            wire.ask(stream, "/big?n=900000")
            wire.hear(lambda: stream in wire.heads or wire.of(RstStreamFrame, stream))
        assert [(f.stream_id, f.error_code) for f in wire.of(RstStreamFrame)] == [(5, E.ENHANCE_YOUR_CALM)]
        wire.send(window(0, 1 << 24), window(1, 1 << 24), window(3, 1 << 24))
        assert len(wire.answer(1)[1]) == len(wire.answer(3)[1]) == 900_000
        assert wire.get(7)[0] == "200"


def odd(count, first=1):
    return range(first, first + 2 * count, 2)


def bomb(wire):
    """A header of 4,000 bytes put into the table once, then named by one byte 10,000 times: 14 KB for 40 MB."""
    block = wire.encoder.encode(
        [(":method", "GET"), (":path", "/"), (":scheme", "http"), (":authority", "x"), ("x-bomb", "b" * 3_900)]
    )
    return HeadersFrame(1, data=block + b"\xbe" * 10_000, flags=["END_HEADERS", "END_STREAM"])


def many_fields(wire, stream):
    """2 KB that name a short header 1,800 times."""
    head = wire.head(stream, fields=[("x", "")])
    head.data += b"\xbe" * 1_800
    return head


def large_fields(wire):
    block = wire.encoder.encode(
        [
            (":method", "GET"),
            (":path", "/"),
            (":scheme", "http"),
            (":authority", "x"),
            *((f"x-{n}", "~" * 8_000) for n in range(10)),
        ],
        huffman=False,
    )
    pieces = [block[n : n + 16_000] for n in range(0, len(block), 16_000)]
    return [
        HeadersFrame(1, data=pieces[0], flags=["END_STREAM"]),
        *(ContinuationFrame(1, data=p) for p in pieces[1:-1]),
        ContinuationFrame(1, data=pieces[-1], flags=["END_HEADERS"]),
    ]


def unknown_settings(n):
    return SettingsFrame(settings={1_000 + n * 2_000 + k: 1 for k in range(2_000)})


def no_window(stream):
    return b"\0\0\4\x08\0" + stream.to_bytes(4) + b"\0\0\0\0"


def on_itself(stream):
    return b"\0\0\5\2\0" + stream.to_bytes(4) * 2 + b"\x10"


CALM, WRONG = E.ENHANCE_YOUR_CALM, E.PROTOCOL_ERROR
ATTACKS = {  # name: what is sent, the error codes that may answer it
    "rapid reset": (lambda w: [f for n in odd(5_000) for f in (w.head(n), reset(n))], {CALM}),
    "rapid reset of polls": (lambda w: [f for n in odd(5_000) for f in (w.head(n, "/poll"), reset(n))], {CALM}),
    "ping": (lambda w: [PingFrame(opaque_data=b"12345678")] * 20_000, {CALM}),
    "ping answers": (lambda w: [PingFrame(opaque_data=b"12345678", flags=["ACK"])] * 20_000, {CALM}),
    "settings": (lambda w: [SettingsFrame(settings={4: n}) for n in range(20_000)], {CALM}),
    "settings answers": (lambda w: [SettingsFrame(flags=["ACK"])] * 20_000, {CALM}),
    "unknown settings": (lambda w: [unknown_settings(n) for n in range(30)], {CALM}),
    "priority": (lambda w: [PriorityFrame(2 * n + 1, depends_on=0, stream_weight=3) for n in range(20_000)], {CALM}),
    "empty data": (lambda w: [w.head(1, "/upload", "POST", end=False)] + [DataFrame(1)] * 20_000, {CALM}),
    "padding only": (
        lambda w: [w.head(1, "/upload", "POST", end=False)] + [DataFrame(1, pad_length=1, flags=["PADDED"])] * 20_000,
        {CALM},
    ),
    "window update": (lambda w: [window(0, 1)] * 20_000, {CALM}),
    "window update of a stream": (lambda w: [w.head(1, "/poll")] + [window(1, 1)] * 20_000, {CALM}),
    "window update of a closed stream": (lambda w: [w.head(1), reset(1)] + [window(1, 1)] * 20_000, {CALM}),
    "window a byte at a time": (
        lambda w: [w.head(1, "/big?n=1000000")] + [window(1, 1), window(0, 1)] * 10_000,
        {CALM},
    ),
    "unknown frames": (lambda w: [b"\0\0\1\xfa\0\0\0\0\0x"] * 20_000, {CALM}),
    "resets of a closed stream": (lambda w: [w.head(1)] + [reset(1)] * 20_000, {CALM}),
    "data of a closed stream": (
        lambda w: [w.head(1, "/poll", end=False), reset(1)] + [DataFrame(1, data=b"x")] * 20_000,
        {CALM},
    ),
    "refused streams": (lambda w: [w.head(n, "/poll") for n in odd(5_000)], {CALM}),
    "made you reset": (lambda w: [f for n in odd(5_000) for f in (w.head(n, "/poll"), window(n, 2**31 - 1))], {CALM}),
    "made you reset by late data": (
        lambda w: [f for n in odd(5_000) for f in (w.head(n, "/poll"), DataFrame(n, data=b"x"))],
        {CALM, E.STREAM_CLOSED},
    ),
    "made you reset by a window of nothing": (
        lambda w: [f for n in odd(5_000) for f in (w.head(n, "/poll"), no_window(n))],
        {CALM, WRONG},
    ),
    "made you reset by a stream that depends on itself": (
        lambda w: [f for n in odd(5_000) for f in (w.head(n, "/poll"), on_itself(n))],
        {CALM, WRONG},
    ),
    "made you reset by a second head": (
        lambda w: [f for n in odd(5_000) for f in (w.head(n, "/poll"), w.head(n, "/poll"))],
        {CALM, WRONG, E.STREAM_CLOSED},
    ),
    "continuation with bytes": (
        lambda w: [HeadersFrame(1, data=b"")] + [ContinuationFrame(1, data=b"\0\1a\1b")] * 20_000,
        {CALM, WRONG},
    ),
    "continuation": (lambda w: [HeadersFrame(1, data=b"")] + [ContinuationFrame(1, data=b"")] * 20_000, {CALM, WRONG}),
    "hpack bomb": (lambda w: [bomb(w)], {CALM}),
    "large headers": (large_fields, {CALM}),
    "many fields": (lambda w: [many_fields(w, n) for n in odd(50)], {CALM}),
    "frame too large": (lambda w: [b"\x10\0\0\0\0\0\0\0\1"], {E.FRAME_SIZE_ERROR}),
    "push": (lambda w: [b"\0\0\5\5\4\0\0\0\1\0\0\0\2\x88"], {WRONG}),
    "window overflow": (lambda w: [window(0, 2**31 - 1)], {E.FLOW_CONTROL_ERROR}),
    "body longer than promised": (
        lambda w: [w.head(1, "/echo", "POST", end=False, fields=[("content-length", "1")]), DataFrame(1, data=b"xx")],
        {WRONG},
    ),
    "uppercase header": (lambda w: [w.head(1, fields=[("X-Upper", "1")])], {WRONG}),
    "connection header": (lambda w: [w.head(1, fields=[("connection", "close")])], {WRONG}),
    "two hosts": (lambda w: [w.head(1, fields=[("host", "elsewhere")])], {WRONG}),
    "even stream": (lambda w: [w.head(2)], {WRONG}),
    "older stream": (lambda w: [w.head(5), w.head(3)], {WRONG}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_end_their_own_connection_only(start, attack):
    server, (frames, codes) = start(limits=http2.Limits(linger=0.2)), ATTACKS[attack]
    with Wire(server) as victim, Wire(server) as wire, ThreadPoolExecutor(1) as other:
        victim.ask(1, "/poll")
        wait_for(lambda: len(server.world.waiting) == 1)
        data = b"".join(f if isinstance(f, bytes) else f.serialize() for f in frames(wire))
        sending = other.submit(wire.send, data)
        still_serves(server)
        goodbye = wire.hear_goodbye()
        sending.result()
        assert goodbye and goodbye[0] in codes and wire.of(GoAwayFrame)[0].last_stream_id < 800
        server.wake()
        assert victim.answer(1) == ("200", b'{"woken": true}')
        assert server.world.begun < 350, "handlers were started for the dead"
    wait_for(lambda: not server.pending(), "handlers gone")


def test_streams_reset_in_the_read_that_began_them_start_no_handler(server):
    with Wire(server) as wire:
        assert wire.pinged()
        wire.send(
            b"".join(f.serialize() for n in odd(100) for f in (wire.head(n, "/upload", "POST", end=False), reset(n)))
        )
        assert wire.pinged() and wire.get(301)[0] == "200"
        assert server.world.begun == 1


def test_the_table_for_our_headers_does_not_grow_with_the_peers_wish(server):
    with Wire(server, settings={SettingsFrame.HEADER_TABLE_SIZE: 1 << 30}) as wire:
        wire.decoder.max_allowed_table_size = 1 << 30
        assert wire.get(1)[0] == "200" and wire.decoder.header_table_size == 4096
        assert wire.get(3)[0] == "200"


@pytest.mark.parametrize("seed", range(4))
def test_the_books_balance_after_a_wild_but_lawful_client(start, seed):
    """Resets, windows, padding, crumbs and early ends in any order: no stream, byte or window is left over."""
    dice, server = random.Random(seed), start(limits=http2.Limits(burst=100_000))
    with Wire(server) as wire:
        assert wire.pinged()
        wire.send(window(0, 1 << 30))
        opened = 65_535 + sum(f.window_increment for f in wire.of(WindowUpdateFrame, 0))
        spent = 0
        for stream in odd(300):
            path, method = dice.choice(
                [
                    ("/hello", "GET"),
                    ("/big?n=150000", "GET"),
                    ("/poll", "GET"),
                    ("/upload", "POST"),
                    ("/upload?limit=9", "POST"),
                    ("/echo", "POST"),
                    ("/streamed?n=9", "GET"),
                    ("/nowhere", "PUT"),
                ]
            )
            wire.ask(stream, path, method, end=method == "GET")
            for _ in range(0 if method == "GET" else dice.randrange(6)):
                frame = DataFrame(
                    stream, data=b"x" * dice.randrange(1, 9_000), pad_length=dice.randrange(200), flags=["PADDED"]
                )
                wire.send(frame)
                spent += frame.flow_controlled_length
            if method != "GET" and dice.random() < 0.6:
                wire.send(DataFrame(stream, flags=["END_STREAM"]))
            if dice.random() < 0.4:
                wire.send(window(stream, dice.randrange(1, 200_000)))
            if dice.random() < 0.2 or path == "/poll":
                wire.send(reset(stream))
            elif dice.random() < 0.5:
                wire.pinged()
            if stream % 50 == 1:
                wire.send(*[reset(n) for n in odd(stream // 2 + 1)][-40:])
            assert not wire.goodbye()
        assert wire.pinged()
        connection = next(iter(server.server.http2_connections))
        wire.send(*[reset(n) for n in connection.streams])
        assert wire.pinged() and not wire.goodbye()
        wait_for(lambda: not connection.streams and not connection.tasks and not connection.unsent)
        assert connection.unread == 0 and not connection.promises and not connection.ready
        assert wire.pinged()
        left = opened - spent + sum(f.window_increment for f in wire.of(WindowUpdateFrame, 0)) - (opened - 65_535)
        assert left >= opened // 2
        assert wire.get(999)[0] == "200"
    wait_for(lambda: not server.pending(), "handlers gone")


@pytest.mark.parametrize("seed", range(8))
def test_random_frames_break_nothing(server, seed):
    dice = random.Random(seed)
    for _ in range(30):
        with Wire(server) as wire:
            for _ in range(dice.randrange(1, 40)):
                kind, flags = dice.choice([0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 99]), dice.randrange(256)
                stream = dice.choice([0, 1, 1, 3, 3, 5, 7, 2])
                body = dice.choice([b"", dice.randbytes(4), dice.randbytes(8), dice.randbytes(dice.randrange(300))])
                if kind == 1 and dice.random() < 0.8:
                    wire.ask(
                        stream or 1,
                        dice.choice(["/hello", "/poll", "/big?n=200000", "/upload"]),
                        dice.choice(["GET", "POST"]),
                        end=dice.random() < 0.5,
                    )
                else:
                    wire.send(len(body).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + body)
            if dice.random() < 0.5:
                wire.socket.shutdown(socket.SHUT_WR)
    still_serves(server)
    wait_for(lambda: server.statistics()["connections"] == 0)
    wait_for(lambda: not server.pending(), "handlers gone")


# ---- The end
# --------------------------------------------------------------------------------------------------------------------------


def test_shutdown_lets_streams_finish_and_then_says_goaway(start):
    server = start(limits=http2.Limits(drain=PATIENCE, settle=3.0))
    with Wire(server) as wire, ThreadPoolExecutor(1) as other:
        wire.ask(1, "/poll")
        wait_for(lambda: server.world.waiting)
        stopping = other.submit(server.stop)
        last = next(n for n in odd(1_000, 3) if wire.get(n, method="HEAD")[0] is None)
        assert [f.error_code for f in wire.of(RstStreamFrame)] == [E.REFUSED_STREAM]
        assert not wire.goodbye()
        server.wake()
        assert wire.answer(1) == ("200", b'{"woken": true}')
        answered = time.monotonic()
        assert wire.hear_goodbye() == [E.NO_ERROR] and wire.of(GoAwayFrame)[0].last_stream_id == last
        assert time.monotonic() - answered > 0.5, "httpx would lose answers that it has not looked at"
        stopping.result()


def test_shutdown_does_not_wait_for_ever(start):
    server = start(limits=http2.Limits(drain=0.2, linger=0.1))
    with Wire(server) as stuck, Wire(server, greet=False), Wire(server) as idle, Wire(server) as unread:
        stuck.ask(1, "/poll")
        unread.ask(1, "/big?n=10000000")
        idle.pinged()
        wait_for(lambda: len(server.world.waiting) == 2 and server.statistics()["greeting"] == 1)
        server.stop()
        assert server.world.hangups == 1 and server.world.outcomes == ["closed"]
        assert stuck.hear_goodbye() == idle.hear_goodbye() == [E.NO_ERROR]


def test_closing_twice_and_during_a_flood_is_no_trouble(start):
    server = start()
    with Wire(server) as flood, Wire(server) as quiet, ThreadPoolExecutor(1) as other:
        assert quiet.get(1)[0] == "200"
        sending = other.submit(
            flood.send, b"".join(f.serialize() for n in odd(5_000) for f in (flood.head(n, "/poll"), reset(n)))
        )
        closing = [
            asyncio.run_coroutine_threadsafe(server.server.close_all_connections(), server.loop) for _ in range(2)
        ]
        assert quiet.hear_goodbye() == [E.NO_ERROR]
        assert [task.result(PATIENCE) for task in closing] == [None, None]
        sending.result()
    wait_for(lambda: server.statistics()["connections"] == 0)


def test_httpx_gets_its_answers_at_shutdown(start):
    server = start(limits=http2.Limits(drain=PATIENCE))

    async def ask():
        async with httpx.AsyncClient(http1=False, http2=True, timeout=PATIENCE) as client:
            polls = [asyncio.create_task(client.get(server.url("/poll"))) for _ in range(20)]
            while len(server.world.waiting) < 20:
                await asyncio.sleep(0.005)
            stopping = asyncio.get_running_loop().run_in_executor(None, server.stop)
            server.loop.call_soon_threadsafe(server.world.wake.set)
            assert [answer.json() for answer in await asyncio.gather(*polls)] == [{"woken": True}] * 20
            await stopping

    asyncio.run(ask())


def test_a_thousand_long_polls_are_answered_before_the_end(start):
    server = start(limits=http2.Limits(drain=PATIENCE))
    wires = [Wire(server) for _ in range(20)]
    for wire in wires:
        wire.send(*[wire.head(n, "/poll") for n in odd(50)])
    wait_for(lambda: len(server.world.waiting) == 1_000)
    server.wake()
    with ThreadPoolExecutor(1) as other:
        stopping = other.submit(server.stop)
        for wire in wires:
            assert wire.hear(lambda: wire.done(*odd(50))) and not wire.of(RstStreamFrame)
            assert wire.hear_goodbye() == [E.NO_ERROR]
            wire.socket.close()
        stopping.result()


def test_nothing_of_a_closed_connection_stays_in_memory(server):
    with Wire(server) as wire:
        assert wire.pinged()
        connection = weakref.ref(next(iter(server.server.http2_connections)))
        wire.send(*[wire.head(n, "/poll") for n in odd(10)], wire.head(21, "/upload", "POST", end=False), reset(1))
        wait_for(lambda: len(server.world.waiting) == 9)
        assert wire.get(23)[0] == "200"
    wait_for(lambda: gc.collect() is None or connection() is None, "connection freed")


# ---- The sidecar over HTTP/2
# ------------------------------------------------------------------------------------------------------------


class Address:
    """Where a `Wire` finds a sidecar that runs as a process of its own."""

    def __init__(self, service):
        self.port = int(service.url.rpartition(":")[2])


def subscriptions(service):
    return service.client().get("/status").json()["events"]["active_subscriptions"]


def test_fifty_polls_of_the_sidecar_share_a_connection_with_other_requests(make_service, repository):
    service = make_service()
    publisher, bearer = service.client(), [("authorization", f"Bearer {service.token()}")]
    with Wire(Address(service)) as wire:
        polls, cancelled = list(odd(50)), list(odd(50))[::2]
        for n in polls:
            wire.ask(
                n,
                "/api/events/wait/done?timeout=60000&since=latest",
                fields=[("authorization", f"Bearer {service.token(sub=f'reader-{n}')}")],
            )
        wait_for(lambda: subscriptions(service) == 50)
        for n in odd(20, 101):
            assert wire.get(n, "/status", fields=bearer)[0] == "200"
        assert not any(n in wire.heads for n in polls)
        wire.send(*[reset(n) for n in cancelled])
        wait_for(lambda: subscriptions(service) == 25)
        assert len(publisher.publish("done")["subscribers_notified"]) == 25
        woken = [n for n in polls if n not in cancelled]
        for n in woken:
            status, body = wire.answer(n)
            assert status == "200" and json.loads(body)["events"][0]["event_type"] == "done"
        assert subscriptions(service) == 0 and not any(n in wire.heads for n in cancelled)
    assert "Traceback" not in service.log


STALLING = """
import cco_sidecar
from cco_sidecar import Endpoint, Route, hookimpl

Endpoint.STALL_SECONDS = 0.2


class Long(Endpoint):
    public = True
    answers = {200: dict}

    async def respond(self):
        return b'"' + b"x" * 50_000_000 + b'"'


@hookimpl
def register_routes():
    return [Route("GET", "/long", Long)]
"""


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/2"])
def test_the_sidecar_gives_up_an_answer_that_nobody_takes(make_service, tmp_path, protocol):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "stalling.py").write_text(STALLING)
    service = make_service("--plugins", str(tmp_path / "plugins"), "--log-level", "debug")
    if protocol == "HTTP/2":
        with Wire(Address(service)) as wire:
            wire.ask(1, "/long")
            assert (
                wire.hear(lambda: wire.of(RstStreamFrame, 1)) and wire.of(RstStreamFrame, 1)[0].error_code == E.CANCEL
            )
            assert wire.get(3, "/health")[0] == "200"
    else:
        with Wire(Address(service), greet=False, receive_buffer=4096) as wire:
            wire.send(b"GET /long HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_for(lambda: " GET /long " in service.log)
    assert service.client().get("/health").status_code == 200
    assert service.stop() == 0
    assert "Traceback" not in service.log and "unexpected" not in service.log


# ---- The plugin
# -------------------------------------------------------------------------------------------------------------------------


def test_the_hook_offers_the_server():
    import pluggy

    manager = pluggy.PluginManager("cco_sidecar")

    class Spec:
        @pluggy.HookspecMarker("cco_sidecar")(firstresult=True)
        def part_class(self, settings, base):
            """The server class."""

    manager.add_hookspecs(Spec)
    manager.register(http2)
    manager.check_pending()
    assert issubclass(manager.hook.part_class(settings=None, base=Server), http2.Http2Server)


@pytest.mark.parametrize(
    ("trick", "said"),
    [
        ("sys.modules['h2'] = None", "needs the package h2, `pip install h2`"),
        ("sys.modules['hpack'] = None", "needs the package h2, `pip install h2`"),
        ("metadata.version = lambda name: '4.3.0'", "needs h2 4.4.1 or later, found 4.3.0: `pip install --upgrade h2`"),
        ("metadata.version = lambda name: metadata.distribution('there-is-none').version", "does not tell its version"),
    ],
)
def test_without_a_fit_h2_the_plugin_says_what_to_install(trick, said):
    root = Path(http2.__file__).parent.parent.parent
    code = f"""if True:
        import sys; sys.path.insert(0, {str(root)!r})
        from importlib import metadata
        import cco_sidecar
        from pathlib import Path
        {trick}
        hooks = cco_sidecar.bundled_class(cco_sidecar.Hooks, "_hooks", "SafeHooks")([])
        hooks.load_files([Path("plugins/http/http2.py").resolve()])
        print(hooks.loaded)"""
    assert said in run(sys.executable, "-c", code, cwd=root).decode()


MODULES = """
import sys

from cco_sidecar import Endpoint, Route, hookimpl


class Modules(Endpoint):
    public = True
    answers = {200: list}

    async def respond(self):
        return sorted({name.partition(".")[0] for name in sys.modules} & {"h2", "hpack", "hyperframe"})


@hookimpl
def register_routes():
    return [Route("GET", "/modules", Modules)]
"""
LIBRARY = ["h2", "hpack", "hyperframe"]


@pytest.fixture
def serve_modules(make_service, tmp_path):
    """A sidecar that tells under /modules what it has imported."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "modules.py").write_text(MODULES)
    return lambda *options, **keywords: make_service("--plugins", str(tmp_path / "plugins"), *options, **keywords)


def test_the_banner_says_that_http2_is_off_and_why(make_service, tmp_path):
    (tmp_path / "h2-4.3.0.dist-info").mkdir()
    (tmp_path / "h2-4.3.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: h2\nVersion: 4.3.0\n")
    service = make_service(env={"PYTHONPATH": str(tmp_path)})
    banner = wait_for(lambda: service.log if "Stop:" in service.log else "")
    assert (
        "HTTP/1.1 (HTTP/2: off)" in banner and "Skipped:  http2 (HTTP/2 needs h2 4.4.1 or later, found 4.3.0" in banner
    )
    assert curl(Site(service), "/health", "--http1.1")[1:] == ("1.1", "200")


class Site:
    def __init__(self, service):
        self.url = lambda path: service.url + path


@pytest.mark.parametrize("secure", [False, True], ids=["prior knowledge", "TLS"])
def test_h2_is_imported_by_the_first_http2_connection_and_not_before(serve_modules, certificate, secure):
    service = serve_modules(*(("--tls-cert", certificate[0], "--tls-key", certificate[1]) if secure else ()))
    how = "--http2" if secure else "--http2-prior-knowledge"
    assert "HTTP/1.1 and HTTP/2" in wait_for(lambda: service.log if "Stop:" in service.log else "")
    for _ in range(2):
        assert curl(Site(service), "/modules", "--http1.1") == (b"[]", "1.1", "200")
    for kind in (how, "--http1.1"):
        body, version, status = curl(Site(service), "/modules", kind)
        assert (json.loads(body), version, status) == (LIBRARY, {"--http1.1": "1.1"}.get(kind, "2"), "200")
    assert service.stop() == 0 and "Traceback" not in service.log


def test_forty_first_connections_at_the_same_time_are_all_served(serve_modules):
    service = serve_modules()
    wires = [Wire(Address(service), greet=False) for _ in range(40)]
    for wire in wires[:20]:
        wire.send(PREFACE + SettingsFrame().serialize())
    for wire in wires[20:]:  # these come while h2 is being imported, in pieces
        wire.send(PREFACE[:3])
        wire.send(PREFACE[3:] + SettingsFrame().serialize())
    for wire in wires:
        with wire:
            status, body = wire.get(1, "/modules")
            assert (status, json.loads(body)) == ("200", LIBRARY)
    assert service.stop() == 0 and "Traceback" not in service.log


def test_who_hangs_up_or_stops_the_service_while_h2_is_imported_leaves_nothing_behind(serve_modules):
    service = serve_modules()
    for _ in range(5):
        Wire(Address(service)).socket.close()
    with Wire(Address(service)):
        assert service.stop() == 0
    assert "Traceback" not in service.log and "never retrieved" not in service.log


@pytest.mark.parametrize(
    "fault", ["raise RuntimeError('half installed')", "import nowhere_to_be_found", "def broken(:"]
)
def test_a_library_that_cannot_be_imported_leaves_http1_as_it_was(serve_modules, certificate, tmp_path, fault):
    site = tmp_path / "site"
    (site / "h2-4.4.1.dist-info").mkdir(parents=True)
    (site / "h2-4.4.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: h2\nVersion: 4.4.1\n")
    (site / "h2").mkdir()
    (site / "h2" / "__init__.py").write_text(fault)
    service = serve_modules("--tls-cert", certificate[0], "--tls-key", certificate[1], env={"PYTHONPATH": str(site)})
    with pytest.raises(subprocess.CalledProcessError):  # it had been offered
        curl(Site(service), "/health", "--http2")
    for _ in range(2):  # from then on it is not
        assert curl(Site(service), "/health", "--http2")[1:] == ("1.1", "200")
    assert service.log.count("HTTP/2 is off, its library cannot be imported") == 1
    assert service.stop() == 0 and "Traceback" not in service.log


def test_the_log_never_quotes_a_header(server, caplog):
    with Wire(server) as wire:
        wire.ask(1, fields=[("authorization", " Bearer hush-hush ")])
        assert wire.hear_goodbye() == [WRONG]
    assert "misbehaved" in server.statistics() and "hush" not in caplog.text

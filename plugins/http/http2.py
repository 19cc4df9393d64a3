"""HTTP/2 for the sidecar: the same port, the same application, one more protocol.

`Http2Server` finds out what a new connection speaks (ALPN under TLS, the first four bytes in cleartext) and gives
HTTP/1.1 to Tornado as if this file were not there. The first connection that speaks HTTP/2 imports
`_http2_connection.py` beside this file and with it h2, in a worker thread: who never speaks it pays neither their
memory nor their time.

Everything runs on the event loop; a method without `await` is atomic. Seconds and bytes throughout. RFC numbers in
comments: 9113 is HTTP/2, 7541 is HPACK. Not offered: server push, trailers, WebSocket over HTTP/2, priorities, the
`Upgrade: h2c` header (dropped by RFC 9113), Tornado's `decompress_request` and `xheaders` on HTTP/2 streams.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import importlib.util
import logging
import re
import socket
import ssl
from collections import Counter
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from tornado import iostream, netutil
from tornado.ioloop import IOLoop

from cco_sidecar import Server, hookimpl
from cco_sidecar_plugins.http._exchange import keep

if TYPE_CHECKING:
    from cco_sidecar_plugins.http._http2_connection import Connection

if not all(map(importlib.util.find_spec, ("h2", "hpack", "hyperframe"))):
    raise ImportError("HTTP/2 needs the package h2, `pip install h2` or `uv run --with h2`")
try:
    found = importlib.metadata.version("h2")
except importlib.metadata.PackageNotFoundError:
    found = "0, one that does not tell its version"
if tuple(map(int, re.findall(r"\d+", found)[:3])) < (4, 4, 1):  # older ones let requests be split or forged
    raise ImportError(f"HTTP/2 needs h2 4.4.1 or later, found {found}: `pip install --upgrade h2`")

log = logging.getLogger("cco_sidecar.http2")


@hookimpl
def part_class(base: type) -> type | None:
    """The sidecar listens with this class in place of Tornado's own server."""
    if not issubclass(base, Server):
        return None
    return type(
        "Http2Server", (Http2Server, base), {"protocols": base.protocols.replace(" (HTTP/2: off)", " and HTTP/2")}
    )


# ---- Vocabulary: what one peer may cost, and what its frames cost
# -------------------------------------------------------------


class Limits(Struct, frozen=True):
    """Bounds for one connection, in seconds and bytes. Replace the whole on a subclass of the server to change any."""

    streams: int = 100  # requests at once; fewer than this RFC 9113 advises against (6.5.2)
    window: int = 65_535  # body bytes of one request that may wait for its handler; all streams together: 6.5 MB
    unsent: int = 131_072  # answer bytes that may wait in the socket's buffer; the next ones stay in their streams
    unsent_ever: int = (
        1_048_576  # with what is not asked for room, such as PING's answers: who reads so little is hung up on
    )
    unread: int = (
        67_108_864  # answer bytes waiting for the peer; one more answer is still taken, then streams are reset
    )
    handshake: float = 10.0  # TLS handshake, preface, first SETTINGS: each
    stall: float = 30.0  # in each such period a peer that owes window or body must move ...
    stall_bytes: int = 16_384  # ... this much, or its stream is reset; a drip does not count as progress
    discard: float = 10.0  # after an early answer: how long its request body is still read, so that the answer arrives
    discard_bytes: int = 67_108_864  # and how much of it
    drain: float = 2.0  # shutdown waits so long for open streams, and this ...
    settle: float = (
        0.3  # ... from the last answer to GOAWAY: httpx drops what it has received but not looked at by then
    )
    linger: float = 0.5  # from GOAWAY to closing: time for the peer to read it and hang up first
    tick: float = 1.0  # how often all these are looked at
    burst: int = 1_000  # frames' worth of credit that a purse holds
    refill: int = 200  # credit a second


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


# ---- The server: which protocol, and who is connected
# -------------------------------------------------------------------------


class Http2Server(Server):
    """Tornado's HTTP server that also speaks HTTP/2 on the same port, under TLS by ALPN and in cleartext by prior
    knowledge.

    Takes what `HTTPServer` takes. `max_header_size`, `max_body_size`, `body_timeout` and `idle_connection_timeout`
    (here: time without any open stream) hold for both protocols, `limits` for HTTP/2 only.
    """

    limits = Limits()

    def initialize(self, *args: Any, **options: Any) -> None:
        """Tornado's constructor: makes a given TLS configuration offer HTTP/2."""
        super().initialize(*args, **options)
        if self.ssl_options is not None:
            self.ssl_options = offer_http2(netutil.ssl_options_to_context(self.ssl_options, server_side=True))
        self.counts: Counter[str] = Counter()
        self.http2_connections: set[Connection] = set()
        self._greetings: set[asyncio.Task[None]] = set()
        self._connection: type[Connection] | None = None  # not before it is needed
        self._importing: asyncio.Task[type[Connection]] | None = None
        self._broken = False

    def handle_stream(self, stream: iostream.IOStream, address: Any) -> None:
        """Serves a new connection at once when its first bytes are already there, else when they have come."""
        spoken = None if self.ssl_options else speaks_http2(stream.socket)
        if spoken is None or (spoken and self._connection is None):
            keep(self._greetings, self._greet(stream, address))
        else:
            self._serve(stream, address, spoken)

    async def _greet(self, stream: iostream.IOStream, address: Any) -> None:
        try:
            spoken = await (self._agreed(stream) if isinstance(stream, iostream.SSLIOStream) else self._heard(stream))
            if spoken and self._connection is None:
                await self._import()
            if stream.closed():  # hung up meanwhile
                raise iostream.StreamClosedError()
            self._serve(stream, address, spoken)
        except (OSError, asyncio.CancelledError):  # hung up, failed TLS, said nothing in time, or we are shutting down
            stream.close()

    async def _agreed(self, stream: iostream.SSLIOStream) -> bool:
        """True when the TLS handshake settled on HTTP/2."""
        async with asyncio.timeout(self.limits.handshake):
            await stream.wait_for_handshake()
        if stream.closed():  # hung up right behind it
            raise iostream.StreamClosedError()
        return stream.socket.selected_alpn_protocol() == "h2"

    async def _heard(self, stream: iostream.IOStream) -> bool:
        """True when the first bytes are the preface. Waits long for the first one (browsers connect ahead of need),
        shortly for the rest; who stops in the middle of it is left to HTTP/1.1 and its time-outs."""
        async with asyncio.timeout(self.conn_params.header_timeout):
            await readable(stream.socket.fileno())
        pause, end = 0.005, asyncio.get_running_loop().time() + self.limits.handshake
        while (spoken := speaks_http2(stream.socket)) is None and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(pause)  # the socket stays readable, so waiting for it again would spin
            pause = min(2 * pause, 0.1)
        return bool(spoken)

    async def _import(self) -> None:
        """Makes HTTP/2 ready, once for all who ask at the same time; without it HTTP/1.1 answers them, and nobody is
        offered more.
        """
        if self._importing is None:
            self._importing = asyncio.create_task(asyncio.to_thread(connection_class))
        try:
            self._connection = await asyncio.shield(self._importing)
        except Exception as error:  # a boundary: whatever is wrong with an installation
            if not self._broken:
                log.error("HTTP/2 is off, its library cannot be imported: %s: %s", type(error).__name__, error)
            self._broken = True
            if isinstance(self.ssl_options, ssl.SSLContext):
                self.ssl_options.set_alpn_protocols(["http/1.1"])

    def _serve(self, stream: iostream.IOStream, address: Any, http2: bool) -> None:
        if not http2 or self._connection is None:
            return super().handle_stream(stream, address)
        connection = self._connection(stream, address, self)
        self.http2_connections.add(connection)  # until it ends itself
        connection.start()

    def take_certificate(self, context: ssl.SSLContext) -> None:
        """In the place of TlsServer's: a renewed certificate offers HTTP/2 too."""
        self.ssl_options = context if self._broken else offer_http2(context)

    def connections(self) -> int:
        """How many are open now of HTTP/2 and of those that have not said what they speak."""
        return len(self.http2_connections) + len(self._greetings)

    async def close_all_connections(self) -> None:
        """Ends every connection. HTTP/2 streams get `Limits.drain` to finish before their peers are told to go, because
        some clients (httpx) give up open streams when they hear that; answer waiting polls before calling this."""
        for greeting in self._greetings:
            greeting.cancel()
        await asyncio.gather(*self._greetings, return_exceptions=True)
        await asyncio.gather(
            super().close_all_connections(), *(connection.close() for connection in self.http2_connections)
        )

    def statistics(self) -> dict[str, int]:
        """Counted now: connections, streams, and connections that have not said what they speak. Counted since the
        start: accepted connections, requests, refused ones, resets (by peers, by us), connections ended for
        misbehaviour.
        """
        streams = sum(len(connection.streams) for connection in self.http2_connections)
        return {
            "greeting": len(self._greetings),
            "connections": len(self.http2_connections),
            "streams": streams,
            **self.counts,
        }


@functools.cache
def connection_class() -> type[Connection]:
    """Imports what speaks HTTP/2. Blocks some 100 ms the first time."""
    from cco_sidecar_plugins.http._http2_connection import Connection

    return Connection


def offer_http2(context: ssl.SSLContext) -> ssl.SSLContext:
    """Makes a server's TLS context offer HTTP/2 before HTTP/1.1, with what RFC 9113 (9.2) forbids switched off."""
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    return context


def speaks_http2(sock: socket.socket) -> bool | None:
    """Looks at the first bytes without taking them: True, False, or None while they could still become either."""
    try:
        head = sock.recv(4, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return False  # HTTP/1.1 meets the same error and deals with it
    return head == PREFACE[:4] or (None if head and PREFACE.startswith(head) else False)


async def readable(fd: int) -> None:
    """Returns when a socket has something to read, its end included."""
    loop, ready = IOLoop.current(), asyncio.Event()
    loop.add_handler(fd, lambda *_: ready.set(), IOLoop.READ)
    try:
        await ready.wait()
    finally:
        loop.remove_handler(fd)

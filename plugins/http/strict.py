"""Refuses request heads that two readers might read differently, bounds them in size and time, says why in JSON, and
bounds the number of connections.

Tornado alone closes most of them with a bare 400, or waits. Here a head is checked before Tornado reads it. What is
answered before its end is read on for a while, so that the client sees why.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import socket
import time
import typing
import uuid
from collections.abc import Awaitable
from typing import Any, ClassVar

import tornado.concurrent
import tornado.iostream

from cco_sidecar import (
    MAX_FIELDS,
    MAX_LINE,
    MB,
    ApiError,
    Endpoint,
    GetContext,
    Server,
    hookimpl,
)
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.http._accepting import PatientServer
from cco_sidecar_plugins.http._finished import FinishedRequest, take_down
from cco_sidecar_plugins.http._framing import (
    MALFORMED,
    MAX_EXTENSIONS,
    MAX_SIZE_LINE,
    OF_CONTEXT,
    SIZE,
    TOO_LONG_FIELDS,
    TOO_LONG_LINE,
    check_head,
    whole_refusal,
)


@hookimpl
def part_class(settings: PluginSettings, base: type) -> type | None:
    if issubclass(base, Endpoint):
        return type("HurriedEndpoint", (HurriedEndpoint, base), {"seconds": float(settings.request_timeout)})
    if not issubclass(base, Server):
        return None
    most = connection_limit(settings.max_connections)
    facts: dict[str, Any] = {"max_connections": most, "request_timeout": float(settings.request_timeout)}
    return type("StrictServer", (StrictServer, base), facts)


class HurriedEndpoint(Endpoint):
    """Says why it gives up a body that does not come in time."""

    seconds: ClassVar[float]
    _too_late: asyncio.TimerHandle | None = None

    async def prepare(self) -> None:
        await super().prepare()
        body: asyncio.Future[None] = typing.cast(Any, self.request)._body_future
        if body.done() or self._finished:
            return
        headers, come = self.request.headers, str(len(self.upload))
        if "Transfer-Encoding" in headers or headers.get("Content-Length", "0") != come:
            late = self._too_late = asyncio.get_running_loop().call_later(self.seconds, self._give_up)
            body.add_done_callback(lambda _: late.cancel())

    def _give_up(self) -> None:
        if not self._finished:
            self.answer_early(self.error or ApiError("REQ_008", "The request's body did not come in time"))

    def answer_early(self, error: ApiError) -> None:
        if self._too_late:
            self._too_late.cancel()
        super().answer_early(error)


class StrictServer(PatientServer):
    """What is no well-formed request within bounds is answered in JSON, and audited, before it is parsed."""

    max_connections: int
    request_timeout: float  # seconds from a head's first byte to its last
    BODY_LONGER = 15.0  # seconds until a body ends the connection: HurriedEndpoint says why before that
    MAX_LONG_LINES = 100  # read at once, before anybody knows whose they are: 36 MB
    long_lines = 0
    LINGERING = 200  # refused connections that are still read for a while; more than these are closed at once

    def initialize(self, *args: Any, **options: Any) -> None:
        super().initialize(*args, **options | {"body_timeout": self.request_timeout + self.BODY_LONGER})
        self._lingering: set[asyncio.Task[None]] = set()

    def handle_stream(self, stream: tornado.iostream.IOStream, address: Any) -> None:
        strict = self._strict(stream)
        if self.connections() >= self.max_connections:
            return self.turn_away(strict)
        super().handle_stream(strict, address)

    def connections(self) -> int:
        """How many connections are open, of all protocols."""
        more = getattr(super(), "connections", int)()  # those of HTTP/2, where that is in use
        return len(self._connections) + int(more)

    def _strict(self, stream: tornado.iostream.IOStream) -> StrictStream:
        # Tornado makes the stream itself; a wrapper around it would cost each connection a third of a kilobyte.
        stream.__class__ = StrictSSLStream if isinstance(stream, tornado.iostream.SSLIOStream) else StrictStream
        strict = typing.cast(StrictStream, stream)
        strict.server = self
        super(StrictStream, strict).set_nodelay(True)
        return strict

    def turn_away(self, stream: StrictStream) -> None:
        """Tell a new connection that there is no room; under TLS, where an answer would need a handshake, only close
        it.
        """
        if not isinstance(stream, StrictSSLStream):
            stream.refuse(ApiError("REQ_009", retry_after=1))
        stream.close()

    def refused(self, error: ApiError, request_id: str, remote: str | None) -> None:
        """Have taken down what was refused before it was a request."""
        sidecar = getattr(self.request_callback, "settings", {}).get("sidecar")  # of Application
        if sidecar:
            facts: dict[str, Any] = {"remote": remote, "status": error.status, "error": error}
            take_down(sidecar.settings, FinishedRequest(moment=time.time(), request_id=request_id, **facts))

    def linger(self, stream: StrictStream) -> None:
        """Read on for a while, on a copy of the line: closing with unread input resets it, and the answer is lost."""
        if len(self._lingering) < self.LINGERING:
            try:
                line = socket.socket(fileno=os.dup(stream.socket.fileno()))
            except OSError:  # there is no file left for it
                return
            task = asyncio.ensure_future(drain(line))
            self._lingering.add(task)
            task.add_done_callback(self._lingering.discard)

    async def close_all_connections(self) -> None:
        await super().close_all_connections()
        for task in self._lingering:
            task.cancel()
        await asyncio.gather(*self._lingering, return_exceptions=True)


class StrictStream(tornado.iostream.IOStream):
    """A line whose request heads are bounded and checked before Tornado reads them, and whose refusals are JSON."""

    HEAD_OR_BYTE = rb"\A[\s\S]{1,%d}?\r\n\r\n|\A[\s\S]" % MAX_LINE
    PIECE = rb"\n|\A[^\n]{%d}" % MAX_LINE
    SIZE_LINE = rb"\n|\A[^\n]{%d}" % MAX_SIZE_LINE
    BARE = b"HTTP/1.1 400 Bad Request\r\n\r\n"  # Tornado's answer to what it cannot read

    IDLE, ASKED, UPLOADING, ANSWERED, ANSWERED_UPLOAD = range(5)  # a request with another method than GET may upload

    server: StrictServer
    phase = IDLE  # of the request at hand; of HTTP/2 always
    extensions = 0

    def read_until_regex(self, regex: bytes, max_bytes: int | None = None) -> Awaitable[bytes]:
        """The next request's head, which is what Tornado asks for in this way. Raises StreamClosedError where it was
        refused.
        """
        # For as long as the server lets a line be idle. Most heads come in one piece: then this is all the reading
        # there is, without a task.
        self.phase, head = self.IDLE, asyncio.get_running_loop().create_future()
        first = typing.cast(asyncio.Future[bytes], super().read_until_regex(self.HEAD_OR_BYTE, MAX_LINE + 8))
        first.add_done_callback(functools.partial(self._take, head))
        return head

    def _take(self, head: asyncio.Future[bytes], first: asyncio.Future[bytes]) -> None:
        """Hand over the head that came, or read on where that is its first byte."""
        if self.extensions:  # not set without need: one attribute more would make a line's dictionary five times larger
            self.extensions = 0
        try:
            content = first.result()
            if len(content) > 1:
                head.set_result(self._checked(content))
            else:
                tornado.concurrent.chain_future(asyncio.ensure_future(self._read_slowly(content)), head)
        except tornado.iostream.StreamClosedError as error:
            head.set_exception(error.with_traceback(None))  # this frame would hold both futures in a cycle

    def _checked(self, content: bytes) -> bytes:
        try:
            head = check_head(content)
        except ApiError as error:
            raise self.refuse(error) from None
        self.phase = self.ASKED if head.startswith((b"GET ", b"HEAD ")) else self.UPLOADING
        return head

    async def _read_slowly(self, first: bytes) -> bytes:
        try:
            async with asyncio.timeout(self.server.request_timeout):
                content = first + await self._read_head(first)
        except TimeoutError:
            raise self.refuse(ApiError("REQ_008", "The request's head did not come in time")) from None
        except ApiError as error:
            raise self.refuse(error) from None
        return self._checked(content)

    async def _read_head(self, first: bytes) -> bytes:
        """What follows the first byte. A pattern that also matches at the limit lets us answer where ``max_bytes``
        would close the line.
        """
        read, limit = super().read_until_regex, MAX_FIELDS
        line = await read(self.PIECE, MAX_LINE + 1)
        if first in b"\r\n" and not line.strip():  # an empty line before a request is to be ignored (RFC 9112, 2.2)
            first, line = b"", await read(self.PIECE, MAX_LINE + 1)
        if not line.endswith(b"\n") and OF_CONTEXT.match(first + line):
            line += await self._read_long_line(len(line))
        if not line.endswith(b"\n"):
            raise ApiError("REQ_004", TOO_LONG_LINE, status=414)
        rest = await read(
            rb"\A\r?\n|\r?\n\r?\n|\A(?=[\s\S]{%d})(?![\s\S]{0,%d}?\r?\n\r?\n)[\s\S]{%d}" % (limit, limit, limit),
            limit + 4,
        )
        if not rest.endswith((b"\n\n", b"\n\r\n")) and rest not in (b"\n", b"\r\n"):
            raise ApiError("REQ_004", TOO_LONG_FIELDS, status=431)
        return line + rest

    async def _read_long_line(self, length: int) -> bytes:
        """What follows the first ``length`` bytes of a line that holds a long task. Piece by piece, since each read
        searches all that has come.
        """
        if self.server.long_lines >= self.server.MAX_LONG_LINES:
            raise ApiError("REQ_009", retry_after=1)
        self.server.long_lines += 1
        try:
            pieces = [b""]
            while not pieces[-1].endswith(b"\n") and length < GetContext.max_line:
                pieces.append(await super().read_until_regex(self.PIECE, MAX_LINE + 1))
                length += len(pieces[-1])
            return b"".join(pieces)
        finally:
            self.server.long_lines -= 1

    def read_until(self, delimiter: bytes, max_bytes: int | None = None) -> Awaitable[bytes]:
        """The next chunk's size, which is what Tornado asks for in this way, without extensions: RFC 9112 (7.1.1) says
        to ignore them.
        """
        line = typing.cast(asyncio.Future[bytes], super().read_until_regex(self.SIZE_LINE, MAX_SIZE_LINE + 1))
        if line.done() and not line.exception() and re.fullmatch(rb"[0-9a-fA-F]{1,16}\r\n", line.result()):
            return line  # Tornado gathers small chunks as long as it sees that it need not wait
        return self._without_extension(line)

    async def _without_extension(self, coming: Awaitable[bytes]) -> bytes:
        line = SIZE.fullmatch(await coming)
        self.extensions += len(line[2]) if line else 0
        return (
            line[1] + b"\r\n" if line and self.extensions <= MAX_EXTENSIONS else b"no size\r\n"
        )  # which Tornado refuses

    def set_nodelay(self, value: bool) -> None:
        """Nothing: it is set for as long as the line is open. Tornado would do so for each answer and undo it after."""

    def write(self, data: bytes | memoryview) -> asyncio.Future[None]:
        if data == self.BARE:
            self.refuse(ApiError("REQ_001", MALFORMED))
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        if self.phase in (self.ASKED, self.UPLOADING) and not bytes(data[:12]).startswith(b"HTTP/1.1 100"):
            self.phase += 2
        return super().write(data)

    def refuse(self, error: ApiError) -> tornado.iostream.StreamClosedError:
        """The whole answer to what never became a request, and the line's end; returns what its reader is to get."""
        if self.closed():
            return tornado.iostream.StreamClosedError()
        request_id = f"req-{uuid.uuid4()}"
        with contextlib.suppress(OSError):  # the peer may be gone by now
            self.server.refused(error, request_id, self.socket.getpeername()[0])
            if self.phase < self.ANSWERED:
                super().write(whole_refusal(error, request_id)).add_done_callback(lambda written: written.exception())
            self.server.linger(self)
        self.phase = self.IDLE
        self.close()
        return tornado.iostream.StreamClosedError()

    def close(self, exc_info: Any = False) -> None:
        """Read on where an answer may have come before the end of what is uploaded."""
        if self.phase == self.ANSWERED_UPLOAD and not self.closed():
            self.server.linger(self)
        super().close(exc_info)


class StrictSSLStream(StrictStream, tornado.iostream.SSLIOStream):
    pass


async def drain(line: socket.socket, seconds: float = 2.0, limit: int = 16 * MB) -> None:
    """Tell the other side that we are done, and read what it still sends, within bounds; then close."""
    with line, contextlib.suppress(OSError, TimeoutError):
        line.setblocking(False)
        line.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(seconds):
            while limit > 0 and (data := await asyncio.get_running_loop().sock_recv(line, 65_536)):
                limit -= len(data)


def connection_limit(wanted: int) -> int:
    """``wanted`` connections, or fewer, so that files, agents and git find room under the limit of open files, which is
    raised to 65,536 as far as the system lets us: each parked poll is an open connection.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < more:
        with contextlib.suppress(ValueError, OSError):  # no right to change it
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - min(256, soft // 2)))

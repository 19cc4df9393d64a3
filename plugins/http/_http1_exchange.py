"""One request on an HTTP/1.1 connection, and the bytes of its answer."""

from __future__ import annotations

import asyncio
import math
import typing

from tornado import httputil, iostream

from cco_sidecar_plugins.http._exchange import Exchange, settle, share_names
from cco_sidecar_plugins.http._framing import Head

if typing.TYPE_CHECKING:
    from cco_sidecar_plugins.http._http1_connection import Connection


class Http1Exchange(Exchange):
    """One request on a connection, and its answer."""

    COPIED = 16 * 1024  # bytes of an answer that is copied behind its head: handing over two pieces takes longer

    received = False  # the whole request
    _chunked = False

    def __init__(self, connection: Connection, head: Head) -> None:
        super().__init__(connection.server.conn_params)
        self.connection, self.context, self.stream = connection, connection.peer, connection
        self.method, self.version_1_1 = head.line.method, head.line.version == "HTTP/1.1"
        self.began = connection.loop.time()
        asked = head.headers.get("Connection", "").lower()
        self.keep = "close" not in asked if self.version_1_1 else asked == "keep-alive"
        self.keep = self.keep and not connection.server.conn_params.no_keep_alive

    @property
    def delegate(self) -> httputil.HTTPMessageDelegate:
        assert self._delegate
        return self._delegate

    def expect_body(self, delegate: httputil.HTTPMessageDelegate) -> None:
        self._delegate = delegate

    def end_request(self, delegate: httputil.HTTPMessageDelegate) -> None:
        self.received, self._delegate = True, None
        delegate.finish()

    def write_headers(
        self,
        start_line: httputil.RequestStartLine | httputil.ResponseStartLine,
        headers: httputil.HTTPHeaders,
        chunk: bytes | None = None,
    ) -> asyncio.Future[None]:
        """The answer's head and, often, its only bytes. Raises ValueError as ``head_lines`` does."""
        assert isinstance(start_line, httputil.ResponseStartLine)
        code = start_line.code
        self.promise(code, headers)
        if self.unwritten == math.inf:  # nobody knows how long it will be
            self._chunked = self.version_1_1
            self.keep = self.keep and self.version_1_1
        if self._chunked:
            headers["Transfer-Encoding"] = "chunked"
        if "Connection" in headers and headers["Connection"].lower() == "close":
            self.keep = False
        elif not self.version_1_1 and self.keep:
            headers["Connection"] = "Keep-Alive"
        elif self.version_1_1 and not self.keep:
            headers["Connection"] = "close"
        fields = [f"{name}: {value}" for name, value in headers.get_all()]
        head = head_lines([f"HTTP/1.1 {code} {start_line.reason}", *fields]) + b"\r\n"
        return self._send(head + (self._framed(chunk) if chunk else b""))

    def is_plain(self, headers: httputil.HTTPHeaders) -> bool:
        """Whether the head of an answer needs no field about the connection, and its body no frame."""
        return self.keep and self.version_1_1 and self.method != "HEAD" and "Connection" not in headers

    def write_whole(self, head: bytes, content: bytes) -> asyncio.Future[None]:
        """An answer that is plain, and whose fields say how long it is."""
        self.head_written, self.unwritten = True, 0
        return self._send(head, content) if len(content) > self.COPIED else self._send(head + content)

    def write(self, chunk: bytes) -> asyncio.Future[None]:
        return self._send(self._framed(chunk))

    def _framed(self, chunk: bytes) -> bytes:
        self.deduct(chunk)
        return b"%x\r\n%b\r\n" % (len(chunk), chunk) if self._chunked and chunk else chunk

    def _send(self, data: bytes, more: bytes = b"") -> asyncio.Future[None]:
        if self.closed:
            promise = self.connection.loop.create_future()
            settle([promise], iostream.StreamClosedError())
            return promise
        return self.connection.send(data, more)

    def finish(self) -> None:
        if self.closed:
            return
        self.complete()
        if self._chunked:
            self._send(b"0\r\n\r\n")
        self.connection.finished(self)

    def close(self) -> None:
        """Gives up the answer, and the connection with it."""
        self._delegate = self._close_callback = None
        self.break_off()

    def break_off(self) -> None:
        if not self.closed:
            self.closed = True
            if self.connection.exchange is self:
                self.connection.abort()

    def lose(self) -> None:
        """The client is gone, or was refused."""
        self.closed = True
        self.connection.loop.call_soon(self.tell_gone)


share_names(
    Http1Exchange, "max_body_size", "body_timeout", "connection", "context", "stream", "method", "version_1_1", "began",
    "keep", "whole", "received", "_delegate", "_close_callback", "head_written", "unwritten", "finished", "closed",
)  # fmt: skip


def head_lines(texts: list[str]) -> bytes:
    """Lines of a head. Raises ValueError for a field that would break out of its own."""
    text = "\r\n".join([*texts, ""])
    if text.count("\r") + text.count("\n") != 2 * len(texts):
        raise ValueError("Illegal characters (CR or LF) in a header")
    return text.encode("latin-1")

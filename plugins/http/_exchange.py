"""One request and its answer as the application of cco_sidecar sees them: what the connections of HTTP/1.1 (``fast``)
and the streams of HTTP/2 (``http2``) share.

No private name of Tornado is used, but one is answered to: with `xheaders` its server calls `_apply_xheaders` and
`_unapply_xheaders` on a connection's `context`, so `Peer` has them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from tornado import httputil, iostream
from tornado.http1connection import HTTP1ConnectionParameters

log = logging.getLogger("cco.http")
ONE_PIECE = 256 * 1024  # bytes of an answer that is copied behind its head: writing twice takes longer


class Peer:
    """Who asks: what Tornado reads from `request.connection.context`."""

    def __init__(self, remote_ip: str, protocol: str) -> None:
        self.remote_ip, self.protocol = remote_ip, protocol

    def __str__(self) -> str:
        return self.remote_ip

    def _apply_xheaders(self, headers: httputil.HTTPHeaders) -> None:
        """Does nothing: requests share this object, so one's X-Forwarded-For would name another's sender."""

    def _unapply_xheaders(self) -> None:
        """The other half of nothing."""


def peer_of(stream: iostream.IOStream, address: Any, protocol: str | None) -> Peer:
    """The other end of a connection that was accepted."""
    by_ip = stream.socket.family in (socket.AF_INET, socket.AF_INET6)
    secure = isinstance(stream, iostream.SSLIOStream)
    remote_ip = address[0] if by_ip else "0.0.0.0"  # Tornado's word for a Unix socket's peer
    return Peer(remote_ip, protocol or ("https" if secure else "http"))


class Exchange(httputil.HTTPConnection):
    """What Tornado calls a connection: hands one request to the application and takes its answer.

    Futures that writing returns complete when the socket has taken the bytes, and raise `StreamClosedError` when the
    peer hung up before. After that every further write fails in the same way.
    """

    context: Peer
    stream: Any  # what has the connection's socket as ``socket``
    method = ""
    whole = False  # a short request, whose body has come with its head
    closed = head_written = finished = False
    unwritten: float = math.inf  # body bytes that Content-Length still promises
    _delegate: httputil.HTTPMessageDelegate | None = None  # while it is owed the end of the request
    _close_callback: Callable[[], None] | None = None

    def __init__(self, params: HTTP1ConnectionParameters) -> None:
        self.max_body_size: float = math.inf if params.max_body_size is None else params.max_body_size
        self.body_timeout = params.body_timeout

    def set_close_callback(self, callback: Callable[[], None] | None) -> None:
        """Runs `callback` when the peer is gone before the answer is complete."""
        self._close_callback = callback

    def set_max_body_size(self, size: int) -> None:
        self.max_body_size = size

    def set_body_timeout(self, timeout: float) -> None:
        self.body_timeout = timeout

    def detach(self) -> Any:
        """Raises: the socket belongs to all requests of its connection."""
        raise RuntimeError("an exchange cannot be detached from its connection")

    def has_body(self, code: int) -> bool:
        """Whether the answer with a status has a body, whatever its headers say."""
        return self.method != "HEAD" and code not in (204, 304)

    def promise(self, code: int, headers: httputil.HTTPHeaders) -> None:
        """Notes how long the answer's body will be, as its head says it."""
        self.head_written = True
        if not self.has_body(code):
            self.unwritten = 0
        elif (length := headers.get("Content-Length")) is not None:
            self.unwritten = int(length)

    def deduct(self, chunk: bytes | memoryview) -> None:
        self.unwritten -= len(chunk)
        if self.unwritten < 0:
            self._insist("Tried to write more data than Content-Length")

    def complete(self) -> None:
        """The application has written all of its answer."""
        if not self.head_written or self.unwritten not in (0, math.inf):
            self._insist("Tried to finish an answer without its head or all of its Content-Length")
        self.finished = True

    def _insist(self, fault: str) -> None:
        self.break_off()
        raise httputil.HTTPOutputError(fault)

    def break_off(self) -> None:
        """Ends the answer so that the peer does not take half of it for a whole one."""
        raise NotImplementedError

    def tell_gone(self) -> None:
        """Once: to the delegate while it waits for the request's end, to the close callback afterwards."""
        delegate, self._delegate = self._delegate, None
        callback, self._close_callback = self._close_callback, None
        gone = delegate.on_connection_close if delegate else callback
        try:
            if gone:
                gone()
        except Exception as bug:
            report("A handler failed when its peer had gone", bug)


def keep(tasks: set[asyncio.Task[Any]], work: Coroutine[Any, Any, Any]) -> None:
    """Starts a task that its owner can still find, until it is done."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def settle(promises: Iterable[asyncio.Future[None]], error: BaseException | None = None) -> None:
    for promise in promises:
        if promise.done():
            continue  # cancelled by who waited
        if error is None:
            promise.set_result(None)
        else:
            promise.set_exception(error)
            promise.exception()  # nobody has to look at it


def share_names(kind: type[Any], *names: str) -> None:
    """Have the attributes ``names`` of all objects of a class in one table. Python takes up only those that the first
    few objects have when others are made: where a crowd comes first, each would get a table of its own.
    """
    first = object.__new__(kind)
    for name in names:
        setattr(first, name, None)


def report(what: str, bug: BaseException) -> None:
    """A fault of ours: its kind in the log, its traceback only for who asks, since that may quote a request."""
    log.error("%s: %s", what, type(bug).__name__)
    log.debug("%s", what, exc_info=bug)

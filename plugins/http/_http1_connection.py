"""One HTTP/1.1 connection: what it reads, for how long, and how it ends.

Requests are served one after another. What comes meanwhile waits in the connection's buffer, and where that is full, in
the client. Everything runs on the event loop; a method without `await` is atomic. Seconds and bytes throughout.
"""

from __future__ import annotations

import asyncio
import functools
import math
import typing
import uuid
from collections.abc import Callable
from typing import Any

from tornado import gen, httputil, iostream

from cco_sidecar import MB, ApiError
from cco_sidecar_plugins.http._exchange import Peer, report, settle
from cco_sidecar_plugins.http._framing import (
    MALFORMED,
    Chunks,
    Fixed,
    Head,
    check_size,
    cut_head,
    parse_head,
    whole_refusal,
)
from cco_sidecar_plugins.http._http1_exchange import Http1Exchange

if typing.TYPE_CHECKING:
    from cco_sidecar_plugins.http.fast import FastServer

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Connection(asyncio.Protocol):
    """A client's connection: reads requests one by one, keeps their time, and ends."""

    PENDING = 64 * 1024  # bytes that wait here while a request is served
    LINGER = 2.0  # how long a body is read on behind its early answer ...
    LINGER_BYTES = 16 * MB  # ... and how much of it: closing with unread input would lose the answer
    RIGHT_BEHIND = 0.05  # who ends its side so soon after its request has said all and waits for the answer ...
    HALF_CLOSED = 1.0  # ... so long; who does it later is gone

    def __init__(self, server: FastServer, peer: Peer) -> None:
        self.server, self.peer, self.loop = server, peer, asyncio.get_running_loop()
        self.exchange: Http1Exchange | None = None  # the request at hand
        self.lost = False
        self._transport: asyncio.Transport | None = None
        self._buffer = b""  # what nobody has read yet
        self._body: Fixed | Chunks | None = None  # what is still to come of the request
        self._busy = False  # the application has not taken yet what it got
        self._head_began = self._long_line = self._leaving = self._half_closed = self._paused = False
        self._spare = 0  # bytes that are still read before a connection that ends is closed
        self._full = False  # the socket has not taken yet all that was written
        self._promises: list[asyncio.Future[None]] = []  # of who waits until it has
        self._deadline, self._timer_at = math.inf, math.inf
        self._late: Callable[[Connection], None] = Connection.abort  # a method of ours would hold us
        self._timer: asyncio.TimerHandle | None = None

    @property
    def socket(self) -> Any:
        return self._transport.get_extra_info("socket") if self._transport else None

    # -- what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = typing.cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)  # a write is done when the socket has all of it
        self._expect(self.server.conn_params.header_timeout, Connection.abort)

    def data_received(self, data: bytes) -> None:
        if self._leaving:
            self._spare -= len(data)
            return self.abort() if self._spare < 0 else None
        self._buffer = self._buffer + data if self._buffer else data
        if self.exchange is None and len(self._buffer) <= self.PENDING:
            self.server.serve_soon(self._advance)
        else:
            self._advance()

    def eof_received(self) -> bool:
        """Whether the connection goes on although the client has ended its side."""
        self._half_closed = True
        exchange = self.exchange
        if exchange is None:
            return self._buffer != b"" and not self._head_began  # the next request is there
        said = exchange.received or self._buffer != b"" or bool(self._body and self._body.ended)
        waits = said and self.loop.time() - exchange.began < self.RIGHT_BEHIND
        if waits:
            self._expect(self.HALF_CLOSED, Connection.abort)
        return waits

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        promises, self._promises = self._promises, []
        settle(promises)
        if self.exchange and self.exchange.finished:
            self._conclude(self.exchange)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self._free_long_line()
        if self._timer:
            self._timer.cancel()
        settle(self._promises, iostream.StreamClosedError())
        exchange, self.exchange = self.exchange, None
        if exchange:
            self.server.losses.do(exchange.lose)
        self.server.forget(self)

    # -- requests

    def _advance(self) -> None:
        """One step with what has come: a head, or a piece of a body."""
        exchange = self.exchange
        try:
            if not self._buffer or self._leaving or self.lost or self._ends():
                pass
            elif exchange is None:
                self._take_head()
            elif self._body and not self._busy and not exchange.finished:
                self._take_body(exchange, self._body)
        except ApiError as error:
            self.refuse(error)
        except httputil.HTTPInputError:
            self.refuse(ApiError("REQ_001", MALFORMED))
        except Exception as bug:
            self._fail(bug)
        self._regulate()

    def _ends(self) -> bool:
        """Whether the service has ended the connection since its bytes came."""
        return self.exchange is None and self._transport is not None and self._transport.is_closing()

    def _take_head(self) -> None:
        head, self._buffer = cut_head(self._buffer)
        if head:
            self._free_long_line()
            return self._serve(parse_head(head))
        if self._half_closed:
            return self.abort()
        if not self._head_began:
            self._head_began = True
            self._expect(self.server.request_timeout, Connection._refuse_late)
        if check_size(self._buffer) and not self._long_line:  # nobody knows yet whose it is
            if self.server.long_lines >= self.server.MAX_LONG_LINES:
                raise ApiError("REQ_009", retry_after=1)
            self.server.long_lines += 1
            self._long_line = True

    def _refuse_late(self) -> None:
        self.refuse(ApiError("REQ_008", "The request's head did not come in time"))

    def _free_long_line(self) -> None:
        self.server.long_lines -= self._long_line
        self._long_line = False

    def _serve(self, head: Head) -> None:
        self._head_began = False
        exchange = self.exchange = Http1Exchange(self, head)
        self._expect(self.HALF_CLOSED if self._half_closed else None, Connection.abort)
        exchange.whole = 0 < head.length <= min(len(self._buffer), self.PENDING)
        delegate = self.server.start_request(self, exchange)
        prepared = delegate.headers_received(head.line, head.headers.copy())
        if not head.length and not head.chunked:
            return exchange.end_request(delegate)
        if exchange.whole and prepared is None:  # neither its time nor its size is to be watched
            body, self._buffer = self._buffer[: head.length], self._buffer[head.length :]
            delegate.data_received(body)
            return exchange.end_request(delegate)
        exchange.expect_body(delegate)
        self._body = Chunks() if head.chunked else Fixed(head.length)
        self._wait_for(prepared, functools.partial(self._welcome, exchange, head))

    def _welcome(self, exchange: Http1Exchange, head: Head) -> None:
        """The application is ready for the request's body."""
        if head.length > exchange.max_body_size:
            return self.refuse(ApiError("REQ_004", status=413))
        if head.headers.get("Expect", "").lower() == "100-continue" and not self._buffer and exchange.version_1_1:
            self.send(CONTINUE)
        self._expect(self.HALF_CLOSED if self._half_closed else exchange.body_timeout, Connection.abort)
        self._advance()

    def _take_body(self, exchange: Http1Exchange, body: Fixed | Chunks) -> None:
        data = self._buffer
        piece, self._buffer = body.take(data)
        if len(self._buffer) == len(data) and not body.ended:  # a line has not ended: only what comes can help
            return self.abort() if self._half_closed else None
        taken = exchange.delegate.data_received(piece) if piece else None
        self._wait_for(taken, functools.partial(self._go_on, exchange, body))

    def _go_on(self, exchange: Http1Exchange, body: Fixed | Chunks) -> None:
        """The application has taken a piece of the body."""
        if exchange.finished:  # its answer came early
            return
        if body.ended:
            self._body = None
            self._expect(self.HALF_CLOSED if self._half_closed else None, Connection.abort)
            exchange.end_request(exchange.delegate)
        elif self._buffer:
            self.loop.call_soon(self._advance)  # so that who sends fast does not keep the loop to itself
        elif self._half_closed:
            self.abort()

    def _wait_for(self, work: Any, then: Callable[[], None]) -> None:
        """Go on with the request once the application has done what it was given."""
        future = gen.convert_yielded(work) if work is not None else None
        if future is None:
            return then()
        self._busy, exchange = True, self.exchange

        def done(future: asyncio.Future[None]) -> None:
            if self.exchange is not exchange or self._leaving:
                return
            self._busy = False
            try:
                future.result()
                if exchange and not exchange.finished:
                    then()
            except httputil.HTTPInputError:
                self.refuse(ApiError("REQ_001", MALFORMED))
            except (Exception, asyncio.CancelledError) as bug:
                self._fail(bug)

        future.add_done_callback(done)

    def _fail(self, bug: BaseException) -> None:
        report("A request failed outside its handler", bug)
        self.abort()

    # -- answers

    def send(self, data: bytes, more: bytes = b"") -> asyncio.Future[None]:
        """Done when the socket has taken it."""
        if self._transport and not self.lost:
            self._transport.writelines((data, more)) if more else self._transport.write(data)
            if not self._full:
                return self.server.done
        promise = self.loop.create_future()
        if self.lost:
            settle([promise], iostream.StreamClosedError())
        else:
            self._promises.append(promise)
        return promise

    def finished(self, exchange: Http1Exchange) -> None:
        """The application has written the whole answer."""
        if not self._full and self.exchange is exchange:
            self._conclude(exchange)

    def _conclude(self, exchange: Http1Exchange) -> None:
        """The socket has the whole answer."""
        if exchange.received and exchange.keep:
            self._next()
        elif exchange.received and not self._buffer:
            self.end()
        else:
            self._leave()
            exchange.lose()

    def _next(self) -> None:
        """Ready for the next request."""
        self.exchange = None
        self._expect(self.server.conn_params.header_timeout, Connection.abort)
        if self._buffer:
            self.server.serve_soon(self._advance)
        elif self._half_closed:
            self.abort()
        self._regulate()

    def refuse(self, error: ApiError) -> None:
        """The whole answer to what never became a request, and the connection's end."""
        if self.lost or self._leaving or not self._transport:
            return
        request_id = f"req-{uuid.uuid4()}"
        self.server.refused(error, request_id, self.peer.remote_ip)
        exchange, self.exchange = self.exchange, None
        if not exchange or not exchange.head_written:
            self._transport.write(whole_refusal(error, request_id))
        self._leave()
        if exchange:
            exchange.lose()

    # -- time, room, the end

    def _regulate(self) -> None:
        """Let the client wait where much waits here."""
        crowded = self.exchange is not None and len(self._buffer) > self.PENDING
        if crowded != self._paused and self._transport and not self._transport.is_closing():
            self._paused = crowded
            (self._transport.pause_reading if crowded else self._transport.resume_reading)()

    def _expect(self, seconds: float | None, late: Callable[[Connection], None]) -> None:
        """Call ``late`` unless this is called again within the time. One timer serves for all: most are never due."""
        self._deadline, self._late = (self.loop.time() + seconds if seconds else math.inf), late
        if self._deadline < self._timer_at:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer_at, self._timer = self._deadline, self.loop.call_at(self._deadline, self._ring)

    def _ring(self) -> None:
        self._timer_at, self._timer = math.inf, None
        if self.lost or self._deadline == math.inf:
            return
        if self.loop.time() >= self._deadline:
            self._late(self)
        else:
            self._set_timer()

    def _leave(self) -> None:
        """End the connection, and read on for a while: closing with unread input would reset it, and the answer would
        be lost.
        """
        self._leaving, self._buffer, self._body = True, b"", None
        self._regulate()
        self._spare = self.LINGER_BYTES
        if self._transport and not self.lost:
            if self._transport.can_write_eof():
                self._transport.write_eof()
            self._expect(self.LINGER, Connection.abort)

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()

    def end(self) -> None:
        """Close once all is sent."""
        if self._transport:
            self._transport.close()

    async def close(self) -> None:
        """End at once; what Tornado's server calls."""
        while not self.lost:
            self.abort()
            await asyncio.sleep(0.001)

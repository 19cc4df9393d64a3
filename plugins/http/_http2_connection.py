"""One HTTP/2 connection and its streams: what `http2` imports when the first such connection has come.

A `Connection` cuts what it reads into frames, charges each to the peer's `Purse` and shows it to h2, whose state
machine knows the protocol; what h2 reports becomes calls on a `Stream`. A `Stream` is what Tornado calls a connection:
handlers write to it and do not notice the difference.

Answers go the other way: a handler's bytes wait in their `Stream` until the peer's windows and the socket have room, so
what a peer does not read costs a bounded amount of memory and, after `Limits.stall`, its stream.

"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import typing
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hpack import NeverIndexedHeaderTuple
from hyperframe import frame as frames
from tornado import httputil, iostream

from cco_sidecar import MAX_FIELDS
from cco_sidecar_plugins.http._exchange import Exchange, keep, peer_of, report, settle
from cco_sidecar_plugins.http.http2 import PREFACE, Http2Server, Limits  # which is there: it imports this file

log = logging.getLogger("cco_sidecar.http2")

FRAME_HEAD = 9  # bytes before a frame's payload
MAX_FRAME = 16_384  # payload bytes; what RFC 9113 lets everybody send, and all we accept or send
READ_SIZE = 65_536
HEADER_TABLE = 4_096  # bytes of HPACK table that we keep for answers, however much the peer allows us

# Credit that a frame costs. What a peer can send without end to keep us busy costs something; what carries a request's
# body or is answered by a finished response earns it back (below). SETTINGS pays for each entry too, DATA only without
# bytes or stream.
PRICES = {
    frames.HeadersFrame.type: 1,
    frames.PriorityFrame.type: 1,
    frames.RstStreamFrame.type: 4,
    frames.SettingsFrame.type: 2,
    frames.PingFrame.type: 2,
    frames.WindowUpdateFrame.type: 1,
}
PRICE_OF_OTHERS = 4  # CONTINUATION and frames we do not know
PRICE_OF_NOTHING = 1
PRICE_OF_REFUSAL = 4  # a request above the limit of streams
PRICE_OF_OUR_RESET = 8  # a mistake that makes us reset the stream ("MadeYouReset", CVE-2025-8671)
FIELDS_A_CREDIT = 16  # header fields checked for one credit: indexed fields are one byte to send and 10 µs to check
EARNED_BY_ANSWER = 8
EARNED_BY_PIECE = 2  # a handler's write that was sent whole: readers answer it with two WINDOW_UPDATEs
BYTES_THAT_EARN = 1_024  # so do long answers, by length; one byte at a time earns nothing

CONNECTION_FIELDS = frozenset({"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"})
SECRET_FIELDS = frozenset({"set-cookie", "x-refreshed-token"})  # kept out of the compression table (RFC 7541, 7.1.3)
ILLEGAL_IN_FIELD = re.compile(r"[\0\r\n]")
METHOD = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
TARGET = re.compile(r"[!-~\x80-\xff]+")


class Misbehaviour(Exception):
    """The peer broke a rule that h2 does not watch; the connection ends with this error code."""

    def __init__(self, code: ErrorCodes) -> None:
        super().__init__(code.name)
        self.error_code = code


# ---- A connection: frames in, frames out
# ---------------------------------------------------------------------------------------


class Connection:
    """One peer's HTTP/2 connection: reads, keeps the books of h2, shares the socket among the streams, and ends it
    all.
    """

    def __init__(self, io: iostream.IOStream, address: Any, server: Http2Server) -> None:
        self.io, self.peer, self.server, self.limits = io, peer_of(io, address, server.protocol), server, server.limits
        self.loop = asyncio.get_running_loop()
        self.protocol = new_protocol(self.limits, server.conn_params.max_header_size)
        self.purse = Purse(self.limits, self.loop.time)
        self.streams: dict[int, Stream] = {}
        self.ready: deque[Stream] = deque()  # streams with something to send and a window to send it in, each once
        self.unread = 0  # bytes of answers still waiting in the streams
        self.unsent = 0  # bytes in the socket's buffer
        self.promises: list[
            asyncio.Future[None]
        ] = []  # of handlers whose bytes h2 holds: settled when the socket has taken them
        self.tasks: set[asyncio.Task[None]] = set()  # one a request, until its body is handed over
        self._incoming = bytearray()
        self._greeted = self._leaving = self._peer_leaves = self._closing = self._flushing = False
        self._moved_at = self._quiet_since = self.loop.time()

    def start(self) -> None:
        """Begins to read; the connection lives until the peer hangs up, misbehaves, idles too long or `close` is
        called.
        """
        self.server.counts["accepted"] += 1
        self.io.set_nodelay(True)  # frames are small and already gathered: waiting for more only delays them
        self._task = asyncio.create_task(self._live())

    async def _live(self) -> None:
        self._tick()
        try:
            self.flush()
            await self._read_preface()
            while True:
                await self._read()
        except iostream.StreamClosedError:
            pass
        except Exception as bug:
            report("HTTP/2 connection failed", bug)
        finally:
            self._end()

    async def _read_preface(self) -> None:
        if await self.io.read_bytes(len(PREFACE)) == PREFACE:
            self.protocol.receive_data(PREFACE)
        else:
            self._fail(Misbehaviour(ErrorCodes.PROTOCOL_ERROR))

    async def _read(self) -> None:
        """One read and all its frames."""
        self._incoming += await self.io.read_bytes(READ_SIZE, partial=True)
        try:
            await self._receive_frames()
        except (ProtocolError, Misbehaviour) as offence:
            self._fail(offence)
        self.flush()
        await asyncio.sleep(0)  # a peer that always has more to read must not keep the loop to itself

    async def _receive_frames(self) -> None:
        """Requests begun here start only after their whole read: one that is reset in the same read costs no
        handler.
        """
        crumbs = 0
        while not self._leaving and (frame := cut_frame(self._incoming)):
            self._receive(frame)
            crumbs += frame[3] == frames.DataFrame.type
            if crumbs == 128:  # bodies in crumbs are allowed (an iterator's lines), but not at the expense of others
                crumbs = 0
                await asyncio.sleep(0)
        if self._leaving:
            self._incoming.clear()

    def _receive(self, frame: bytes) -> None:
        kind, stream_id = frame[3], int.from_bytes(frame[5:9]) & 0x7FFFFFFF
        self.purse.pay(price(kind, len(frame) - FRAME_HEAD, stream_id in self.streams))
        if not self._greeted and kind != frames.SettingsFrame.type:
            raise Misbehaviour(ErrorCodes.PROTOCOL_ERROR)  # RFC 9113, 3.4
        self._greeted = True
        if kind == frames.GoAwayFrame.type and not stream_id and len(frame) >= FRAME_HEAD + 8:
            self._peer_leaves = True  # h2 must not see this: it would refuse to finish the open streams afterwards
            return self._leave_if_done()
        for event in self.protocol.receive_data(frame):
            if reaction := self.reactions.get(type(event)):  # h2 has dealt with the others
                reaction(self, event)

    # What h2 reports, and what follows from it.

    def _begin(self, event: RequestReceived) -> None:
        self.purse.pay(len(event.headers) / FIELDS_A_CREDIT)
        if self._closing or len(self.streams) >= self.limits.streams:
            self.server.counts["refused"] += 1
            self.reset(event.stream_id, ErrorCodes.REFUSED_STREAM)  # nothing was done: ask again (RFC 9113, 8.7)
            return self.purse.pay(PRICE_OF_REFUSAL)
        self.server.counts["requests"] += 1
        fields = typing.cast("list[tuple[str, str]]", event.headers)  # texts, as header_encoding says
        stream = self.streams[event.stream_id] = Stream(self, event.stream_id, fields)
        keep(self.tasks, stream.serve())

    def _take_data(self, event: DataReceived) -> None:
        if not event.data:
            self.purse.pay(PRICE_OF_NOTHING)
        if stream := self.streams.get(event.stream_id):
            stream.take(event.data, event.flow_controlled_length)
        else:  # the window that it used belongs to the living streams
            self.acknowledge(event.stream_id, event.flow_controlled_length)

    def _end_body(self, event: StreamEnded) -> None:
        if stream := self.streams.get(event.stream_id):
            stream.end_body()

    def _lose_stream(self, event: StreamReset) -> None:
        self.server.counts["resets"] += 1
        if stream := self.streams.get(event.stream_id):
            stream.lose()
        if not event.remote_reset:
            self.purse.pay(PRICE_OF_OUR_RESET)

    def _widen(self, event: WindowUpdated) -> None:
        for stream in [self.streams.get(event.stream_id)] if event.stream_id else self.streams.values():
            if stream:
                self.want(stream)

    def _heed(self, event: RemoteSettingsChanged) -> None:
        """h2 follows the peer's table size up to 4 GB; a smaller one is always allowed (RFC 7541, 4.2)."""
        if self.protocol.encoder.header_table_size > HEADER_TABLE:
            self.protocol.encoder.header_table_size = HEADER_TABLE
        for stream in self.streams.values():  # the initial window may have grown
            self.want(stream)

    reactions: dict[type[Event], Callable[[Connection, Any], None]] = {
        RequestReceived: _begin,
        DataReceived: _take_data,
        StreamEnded: _end_body,
        StreamReset: _lose_stream,
        WindowUpdated: _widen,
        RemoteSettingsChanged: _heed,
    }

    # What streams ask for.

    def want(self, stream: Stream) -> None:
        """Gives a stream its turn at the socket, soon: what handlers write in one go leaves in one go."""
        if stream.sendable and not stream.queued:
            stream.queued = True
            self.ready.append(stream)
            self.flush_soon()

    def acknowledge(self, stream_id: int, size: int) -> None:
        """Returns window for body bytes that nobody holds any more; also for streams that are gone."""
        if size and not self._leaving:
            self.protocol.acknowledge_received_data(size, stream_id)
            self.flush_soon()

    def reset(self, stream_id: int, code: ErrorCodes) -> None:
        if not self._leaving:
            self.server.counts["resets_by_us"] += 1
            self.protocol.reset_stream(stream_id, code)
            self.flush_soon()

    def drop(self, stream: Stream) -> None:
        """A stream has ended, one way or the other."""
        del self.streams[stream.id]
        if not self.streams:
            self._quiet_since = self.loop.time()
            self._leave_if_done()

    # Out: a turn for each stream, then the socket.

    def flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Writes what h2 has, after filling it up with answers; whoever waits for these bytes hears when they are
        gone.
        """
        self._flushing = False
        try:
            self._fill()
            self._write(self.protocol.data_to_send())
            if self.unsent > self.limits.unsent_ever:
                self.io.close()
        except Exception as bug:  # one connection's trouble, whatever it is, stays with that connection
            report("HTTP/2 connection failed while writing", bug)
            self.io.close()

    def _fill(self) -> None:
        """A frame for each stream in turn while the socket has room, so that a long answer does not hold up a short
        one.
        """
        room = self.limits.unsent - self.unsent
        while self.ready and room > 0:
            stream = self.ready.popleft()
            room -= stream.emit()
            stream.queued = stream.sendable
            if stream.queued:
                self.ready.append(stream)

    def _write(self, data: bytes) -> None:
        promises, self.promises = self.promises, []
        if self.io.closed():
            settle(promises, iostream.StreamClosedError())
        elif data:
            self._moved_at = self._moved_at if self.unsent else self.loop.time()
            self.unsent += len(data)
            self.io.write(data).add_done_callback(partial(self._written, len(data), promises))
        elif self.unsent:  # nothing of their own to wait for (an empty flush): with the bytes before them
            self.promises = promises
        else:
            settle(promises)

    def _written(self, size: int, promises: list[asyncio.Future[None]], written: asyncio.Future[None]) -> None:
        self._moved_at = self.loop.time()
        self.unsent -= size
        settle(promises, written.exception())
        if self.ready or self.promises:
            self.flush_soon()

    # Time, trouble, the end.

    def _tick(self) -> None:
        """Looks at every time-out of the connection and of its streams."""
        now = self.loop.time()
        self._tick_at = self.loop.call_later(self.limits.tick, self._tick)
        stuck = self.unsent and now - self._moved_at > self.limits.stall
        silent = not self._greeted and now - self._quiet_since > self.limits.handshake
        if stuck or silent:
            return self.io.close()
        for stream in list(self.streams.values()):
            stream.check(now)
        idle = self.server.conn_params.header_timeout
        if idle is not None and not self.streams and now - self._quiet_since > idle:
            self._farewell(ErrorCodes.NO_ERROR)

    def _fail(self, offence: ProtocolError | Misbehaviour) -> None:
        """Ends the connection for a peer's mistake. The log names the kind only: h2's messages quote header values."""
        self.server.counts["misbehaved"] += 1
        log.info("HTTP/2 from %s ended: %s, error %d", self.peer, type(offence).__name__, offence.error_code)
        self._farewell(offence.error_code, said=isinstance(offence, ProtocolError))

    def _leave_if_done(self) -> None:
        if self._peer_leaves and not self.streams:
            self.loop.call_soon(self._farewell, ErrorCodes.NO_ERROR)  # after the read or flush that we are in

    def _farewell(self, code: int, said: bool = False) -> None:
        """Writes GOAWAY, unless h2 has `said` it, and from then on only listens. By hand because h2 closes its books
        with its own one: what it holds of finished answers must still leave before this."""
        if self._leaving:
            return
        self._leaving = True
        self._lose_streams()
        self.flush()
        goaway = frames.GoAwayFrame(last_stream_id=self.protocol.highest_inbound_stream_id, error_code=code)
        self._write(b"" if said else goaway.serialize())
        self._linger()

    def _linger(self) -> None:
        """Closes once the peer has had time to read and to hang up first. Closing at once, with bytes of the peer's
        unread here, would make the system throw away what we wrote."""
        if self.unsent:  # not for ever: `_tick` goes on
            self.loop.call_later(self.limits.linger / 10, self._linger)
        else:
            self.loop.call_later(self.limits.linger, self.io.close)

    async def close(self) -> None:
        """Ends the connection politely, within `Limits.drain` plus `linger`; returns when its tasks are gone too."""
        self._closing = True
        end = self.loop.time() + self.limits.drain
        while not self._task.done() and self.loop.time() < min(end, self._quiet_at() + self.limits.settle):
            await asyncio.sleep(0.01)
        self._farewell(ErrorCodes.NO_ERROR)
        await asyncio.wait({self._task}, timeout=max(0, end - self.loop.time()) + self.limits.linger)
        self.io.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(self._task, *self.tasks, return_exceptions=True)

    def _quiet_at(self) -> float:
        """When the last answer had left; never, while one has not."""
        return math.inf if self.streams or self.unsent else max(self._moved_at, self._quiet_since)

    def _lose_streams(self) -> None:
        for stream in list(self.streams.values()):
            stream.lose()

    def _end(self) -> None:
        self._leaving = True
        self.io.close()
        self._tick_at.cancel()
        self._lose_streams()
        settle(self.promises, iostream.StreamClosedError())
        self.server.http2_connections.discard(self)


def new_protocol(limits: Limits, header_list: int) -> H2Connection:
    """h2's books of a new connection, its first SETTINGS ready to be sent."""
    protocol = Protocol(
        H2Configuration(
            client_side=False,
            header_encoding="latin-1",  # as Tornado reads HTTP/1.1
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
    )
    protocol.local_settings = own_settings(limits.streams, limits.window, header_list)
    protocol.decoder.max_header_list_size = header_list
    protocol.initiate_connection()
    # h2 ends the connection at the first stream above the limit, also of a client that had no chance to read it yet. So
    # the peer is told the limit, and h2 one more: that one we refuse ourselves, and politely.
    protocol.local_settings = own_settings(limits.streams + 1, limits.window, header_list)
    # One request whose handler takes its time must not use up the window of the others.
    protocol.increment_flow_control_window(max(1, limits.streams * limits.window - 65_535))
    return protocol


class Protocol(H2Connection):
    MAX_CLOSED_STREAMS = 1_000  # h2 remembers 65,536 of them, some 8 MB a connection, to judge late frames by


def own_settings(streams: int, window: int, header_list: int) -> Settings:
    return Settings(
        client=False,
        initial_values={
            SettingCodes.MAX_CONCURRENT_STREAMS: streams,
            SettingCodes.INITIAL_WINDOW_SIZE: window,
            SettingCodes.MAX_HEADER_LIST_SIZE: header_list,
        },
    )


def cut_frame(buffer: bytearray) -> bytes:
    """Takes the next whole frame off the front of `buffer`, or nothing. One by one, so that each can be charged,
    answered and kept from h2, and so that its head alone can condemn it: h2 would first collect up to 16 MB of it."""
    size = FRAME_HEAD + int.from_bytes(buffer[:3])
    if size > FRAME_HEAD + MAX_FRAME and len(buffer) >= FRAME_HEAD:
        raise Misbehaviour(ErrorCodes.FRAME_SIZE_ERROR)
    frame = bytes(buffer[:size]) if len(buffer) >= size else b""
    del buffer[: len(frame)]
    return frame


def price(kind: int, size: int, expected: bool) -> int:
    """Credit that a frame of `size` payload bytes costs; `expected` when it belongs to an open stream."""
    if kind == frames.DataFrame.type:
        return 0 if expected else PRICE_OF_NOTHING
    entries = size // 6 if kind == frames.SettingsFrame.type else 0  # h2 keeps up to 65,536 unknown settings for ever
    return PRICES.get(kind, PRICE_OF_OTHERS) + entries


class Purse:
    """A peer's credit: frames are paid from it, time and useful work fill it. Empty means flood."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits, self.clock = limits, clock
        self.credit, self.counted_at = float(limits.burst), clock()

    def pay(self, cost: float) -> None:
        now = self.clock()
        self.earn((now - self.counted_at) * self.limits.refill - cost)
        self.counted_at = now
        if self.credit < 0:
            raise Misbehaviour(ErrorCodes.ENHANCE_YOUR_CALM)

    def earn(self, credit: float) -> None:
        self.credit = min(self.credit + credit, self.limits.burst)


# ---- A stream: one request and its answer
# ---------------------------------------------------------------------------------------


class Stream(Exchange):
    """An exchange on a stream, which also ends where the peer resets it."""

    def __init__(self, connection: Connection, stream_id: int, fields: list[tuple[str, str]]) -> None:
        params = connection.server.conn_params
        super().__init__(params)
        self.connection, self.id, self._fields = connection, stream_id, fields
        self.context, self.stream = connection.peer, connection.io
        self.queued = False
        if params.max_body_size is None:
            self.max_body_size = connection.io.max_buffer_size
        self._body, self._body_size, self._body_ended = (
            bytearray(),
            0,
            False,
        )  # size: promised or arrived, whichever is more
        self._arrival: asyncio.Future[None] | None = (
            None  # what `serve` waits for when it has handed over all that came
        )
        self._began = self._marked_at = self._ended_at = connection.loop.time()
        self._head: list[tuple[bytes, bytes]] | None = None  # of the answer, until it is sent
        self._output: deque[tuple[memoryview, asyncio.Future[None]]] = deque()
        self._end_sent = False
        self._arrived = self._discarded = 0  # body bytes in all, and thrown away
        self._moved = self._marked = 0  # bytes in either direction: now, and when `_stalled` last saw progress

    # The request: from the peer to the application.

    async def serve(self) -> None:
        """Hands over head, body as it comes, and end; leaves early when the answer is complete or the stream is
        gone.
        """
        if self.closed:
            return  # reset in the read that began it: no handler for the dead
        try:
            await self._hand_over()
        except httputil.HTTPInputError:
            self._answer_ourselves(400)
            self.tell_gone()
        except Exception as bug:
            report("Request over HTTP/2 failed outside its handler", bug)
            self._abort(ErrorCodes.INTERNAL_ERROR)

    async def _hand_over(self) -> None:
        start_line, headers = request_head(self._fields)
        self.method, self._fields = start_line.method, []
        delegate = self.connection.server.start_request(self.connection, self)
        accepted = delegate.headers_received(start_line, headers)
        self._delegate = delegate
        await done(accepted)
        self._body_size = max(self._body_size, *map(int, headers.get_list("Content-Length")), 0)
        self._invite(headers)
        while piece := await self._next_piece():
            await done(delegate.data_received(piece))
            self.connection.acknowledge(self.id, len(piece))
        self._close_request()

    def _invite(self, headers: httputil.HTTPHeaders) -> None:
        """100 Continue for a client that asked whether to send its body."""
        wanted = headers.get("Expect", "").lower() == "100-continue" and self._wants_body()
        if wanted and not (self.head_written or self._body_ended):
            self.connection.protocol.send_headers(self.id, [(b":status", b"100")])
            self.connection.flush_soon()

    def _wants_body(self) -> bool:
        return not (self.closed or self.finished or self._body_size > self.max_body_size)

    async def _next_piece(self) -> bytes:
        """Body bytes that came since the last call, at most `Limits.window`; none when that was all or nobody wants
        more.
        """
        while self._wants_body() and not (self._body or self._body_ended):
            self._arrival = self.connection.loop.create_future()
            await self._arrival
        if not self._wants_body():
            return b""
        piece, self._body = bytes(self._body), bytearray()
        return piece

    def _close_request(self) -> None:
        """The application hears that the request is complete or, after an early answer, that the rest will not come."""
        delegate = self._delegate
        if delegate and self._wants_body():
            self._delegate = None
            return delegate.finish()
        if not (self.closed or self.finished):
            self._answer_ourselves(413)
        self.tell_gone()

    def _answer_ourselves(self, code: int) -> None:
        """A bare status for what no handler answers."""
        if self.head_written:
            return self._abort(ErrorCodes.INTERNAL_ERROR)
        self.write_headers(httputil.ResponseStartLine("", code, ""), httputil.HTTPHeaders({"Content-Length": "0"}))
        self.finish()

    def take(self, data: bytes, flow_size: int) -> None:
        """Body bytes from the peer. Its window reopens as the application takes them; for padding (the difference
        between the two sizes) and for what nobody wants any more, at once."""
        self._moved += len(data)
        self._arrived += len(data)
        self._body_size = max(self._body_size, self._arrived)
        self.connection.acknowledge(self.id, flow_size - len(data))
        self._body += data
        if self.finished:
            self._discard_body()
        self._wake()

    def _discard_body(self) -> None:
        """Reads on for a while after an early answer: curl loses the answer when its upload is cut off at once."""
        self.connection.acknowledge(self.id, len(self._body))
        self._discarded += len(self._body)
        self._body.clear()
        if self._discarded > self.connection.limits.discard_bytes:
            self._abort(ErrorCodes.NO_ERROR)

    def end_body(self) -> None:
        self._body_ended = True
        self._wake()
        if self._end_sent:
            self._leave()

    def _wake(self) -> None:
        if self._arrival and not self._arrival.done():
            self._arrival.set_result(None)

    # What Tornado calls on a connection.

    def close(self) -> None:
        """Gives up the answer: the peer's stream is reset, and whoever waits for its bytes hears that they will not
        arrive.
        """
        self._abort(ErrorCodes.CANCEL)

    def write_headers(
        self,
        start_line: httputil.RequestStartLine | httputil.ResponseStartLine,
        headers: httputil.HTTPHeaders,
        chunk: bytes | None = None,
    ) -> asyncio.Future[None]:
        """The answer's head and, often, its only bytes. Raises ValueError for a field that would break out of its
        line.
        """
        assert isinstance(start_line, httputil.ResponseStartLine)
        if not self.closed:
            self._head = answer_fields(start_line.code, headers)
            self.promise(start_line.code, headers)
        return self.write(chunk or b"")

    def write(self, chunk: bytes) -> asyncio.Future[None]:
        """Bytes of the body. They wait here for the peer's window, without limit for one answer, with one for all."""
        promise = self.connection.loop.create_future()
        if not self.closed and self.connection.unread > self.connection.limits.unread:
            self._abort(ErrorCodes.ENHANCE_YOUR_CALM)
        if self.closed:
            settle([promise], iostream.StreamClosedError())
            return promise
        self.deduct(chunk)
        self._output.append((memoryview(bytes(chunk)), promise))
        self.connection.unread += len(chunk)
        self.connection.want(self)
        return promise

    def break_off(self) -> None:
        self._abort(ErrorCodes.INTERNAL_ERROR)

    def finish(self) -> None:
        """The answer is complete. The stream ends when the peer has taken it all and sent all of its own."""
        if self.closed:
            return
        self.complete()
        self._wake()
        self._discard_body()
        self.connection.want(self)

    # The answer: from the application to the peer, a frame at a time.

    @property
    def sendable(self) -> bool:
        """True when `emit` would give a frame now."""
        if self.closed or self._end_sent:
            return False
        if self._head or not self._output:
            return bool(self._head) or self.finished
        return not self._output[0][0] or self._window() > 0

    def _window(self) -> int:
        return min(self.connection.protocol.local_flow_control_window(self.id), MAX_FRAME)

    def emit(self) -> int:
        """Gives h2 the next frame. Returns about how many bytes that were, 0 when there is nothing to send or no
        window.
        """
        if not self.sendable:
            return 0
        fields, self._head = self._head, None
        return self._emit_head(fields) if fields else self._emit_piece()

    def _emit_head(self, fields: list[tuple[bytes, bytes]]) -> int:
        bare = self.finished and not any(len(piece) for piece, _ in self._output)
        self.connection.protocol.send_headers(self.id, fields, end_stream=bare)
        if bare:
            self.connection.promises += [promise for _, promise in self._output]
            self._output.clear()
            self._sent()
        return sum(len(name) + len(value) for name, value in fields)

    def _emit_piece(self) -> int:
        none: tuple[memoryview, asyncio.Future[None] | None] = (memoryview(b""), None)
        piece, promise = self._output.popleft() if self._output else none
        size = min(len(piece), self._window()) if piece else 0
        if promise and size < len(piece):
            self._output.appendleft((piece[size:], promise))
        elif promise:
            self.connection.promises.append(promise)
            self.connection.purse.earn(EARNED_BY_PIECE)
        self._send(piece[:size], last=self.finished and not self._output)
        return FRAME_HEAD + size

    def _send(self, data: memoryview, last: bool) -> None:
        self._moved += len(data)
        self.connection.unread -= len(data)
        self.connection.purse.earn(len(data) / BYTES_THAT_EARN)
        if data:
            self.connection.protocol.send_data(self.id, data, end_stream=last)
        elif last:
            self.connection.protocol.end_stream(self.id)  # send_data would object to a window below zero
        if last:
            self._sent()

    def _sent(self) -> None:
        self._end_sent, self._ended_at = True, self.connection.loop.time()
        self.connection.purse.earn(EARNED_BY_ANSWER)
        if self._body_ended:
            self._leave()

    # The end.

    def _leave(self) -> None:
        self.closed = True
        self._close_callback = None
        self.connection.drop(self)

    def lose(self) -> None:
        """The peer has reset the stream or is gone: gives back what it held and tells whoever waits for it."""
        if self.closed:
            return
        self.closed = True
        self.connection.acknowledge(self.id, len(self._body))
        self.connection.unread -= sum(len(piece) for piece, _ in self._output)
        settle([promise for _, promise in self._output], iostream.StreamClosedError())
        self._output.clear()
        self._wake()
        self.connection.drop(self)
        self.connection.loop.call_soon(self.tell_gone)

    def _abort(self, code: ErrorCodes) -> None:
        if not self.closed:
            self.connection.reset(self.id, code)
            self.lose()

    def check(self, now: float) -> None:
        """Ends the stream when its peer has let it wait too long."""
        limits = self.connection.limits
        late = self.body_timeout and not self._body_ended and now - self._began > self.body_timeout
        if self._end_sent and now - self._ended_at > limits.discard:
            self._abort(ErrorCodes.NO_ERROR)  # the answer was complete (RFC 9113, 8.1)
        elif late or self._stalled(now):
            self._abort(ErrorCodes.CANCEL)

    def _stalled(self, now: float) -> bool:
        """True when the peer owed window or body all through `Limits.stall` and moved less than `stall_bytes` in it."""
        owes = self._output or (self._arrival and not self._arrival.done())
        if not owes or self._moved - self._marked >= self.connection.limits.stall_bytes:
            self._marked_at, self._marked = now, self._moved
        return now - self._marked_at > self.connection.limits.stall


def request_head(fields: list[tuple[str, str]]) -> tuple[httputil.RequestStartLine, httputil.HTTPHeaders]:
    """HTTP/1.1's form of a request's head. Raises HTTPInputError for what Tornado would not let in by that way
    either.
    """
    if sum(len(name) + len(value) for name, value in fields if name != ":path") > MAX_FIELDS:
        raise httputil.HTTPInputError("The headers are too large")
    pseudo = {name: value for name, value in fields if name[0] == ":"}
    headers = httputil.HTTPHeaders()
    if ":authority" in pseudo:
        headers["Host"] = pseudo[":authority"]  # h2 has made sure that a `host` beside it says the same
    for name, value in fields:
        if name[0] != ":" and not (name == "host" and "Host" in headers):
            headers.add(name, value)
    method, target = pseudo[":method"], pseudo.get(":path", "*")  # CONNECT has no path
    if not METHOD.fullmatch(method) or not TARGET.fullmatch(target):
        raise httputil.HTTPInputError("Malformed method or target")
    return httputil.RequestStartLine(method, target, "HTTP/2.0"), headers


def answer_fields(code: int, headers: httputil.HTTPHeaders) -> list[tuple[bytes, bytes]]:
    """HTTP/2's form of an answer's head: lower case, nothing about the connection, secrets never compressed."""
    fields = [(b":status", b"%d" % code)]
    for name, value in headers.get_all():
        name = name.lower()
        if ILLEGAL_IN_FIELD.search(name + value):
            raise ValueError(f"Illegal character in header {name!r}")
        if name not in CONNECTION_FIELDS:
            field = name.encode("latin-1"), value.strip().encode("latin-1")
            fields.append(NeverIndexedHeaderTuple(*field) if name in SECRET_FIELDS else field)
    return fields


# ---- Small words
# ----------------------------------------------------------------------------------------------------------------


async def done(work: Awaitable[None] | None) -> None:
    """Tornado's delegates return something to wait for, or None."""
    if work is not None:
        await work

"""HTTP/1.1 by the event loop's own transports in place of Tornado's streams, into the same Tornado application.

`FastServer` takes over each connection that Tornado has accepted, and that does not speak HTTP/2. The rules of heads
and chunks are those of the plugin strict, and so are the answers to what breaks them.

A parser in C gains nothing: a head of seven fields takes 7.3 µs here, and 8.0 µs by httptools behind the same
rules. That one also knows a fixed list of methods, and skips the body of a request that asks for another protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import socket
import typing
from collections.abc import Callable, Iterable
from typing import Any

from tornado import iostream

from cco_sidecar import ApiError, Server, hookimpl
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins._turns import Turns
from cco_sidecar_plugins.context._turn import Gathered
from cco_sidecar_plugins.http._exchange import keep, peer_of
from cco_sidecar_plugins.http._http1_connection import Connection
from cco_sidecar_plugins.http.strict import StrictServer


@hookimpl
def part_class(settings: PluginSettings, base: type) -> type | None:
    if settings.no_fast or not issubclass(base, Server):
        return None
    facts: dict[str, Any] = {"protocols": base.protocols.replace("HTTP/1.1", "fast HTTP/1.1")}
    with contextlib.suppress(ImportError):  # the extra ``fast``
        facts["new_loop"] = importlib.import_module("uvloop").new_event_loop
    return type("FastServer", (FastServer, base), facts)


class FastServer(Server):
    """Tornado's HTTP server whose HTTP/1.1 connections are served by protocols of asyncio."""

    ENDING = 0.5  # seconds that answers have to be taken when the service stops

    # What plugins/http/strict.py adds to whatever server it finds.
    MAX_LONG_LINES = StrictServer.MAX_LONG_LINES
    long_lines: int
    request_timeout: float
    refused: Callable[[ApiError, str, str | None], None]

    def initialize(self, *args: Any, **options: Any) -> None:
        super().initialize(*args, **options)
        self._adopting: set[asyncio.Task[None]] = set()
        # Has a connection served once all that is there was read of all connections.
        self.serve_soon = Gathered().do_soon
        self.losses = Turns()  # in which what clients have left is given up

    def handle_stream(self, stream: iostream.IOStream, address: Any) -> None:
        connection = Connection(self, peer_of(stream, address, self.protocol))
        self._connections.add(typing.cast(Any, connection))  # what is asked of one, ours has
        if isinstance(stream, iostream.SSLIOStream):
            keep(self._adopting, StreamTransport(stream, connection).serve())
        else:
            keep(self._adopting, self._adopt(stream.socket, connection))

    async def _adopt(self, accepted: socket.socket, connection: Connection) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, accepted)
        except OSError:  # it has gone
            accepted.close()
            connection.connection_lost(None)

    @functools.cached_property
    def done(self) -> asyncio.Future[None]:
        """What a write returns whose bytes the socket took at once."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future

    def forget(self, connection: Connection) -> None:
        self._connections.discard(typing.cast(Any, connection))

    async def close_all_connections(self) -> None:
        for connection in self._connections:
            typing.cast(Connection, connection).end()
        end = asyncio.get_running_loop().time() + self.ENDING
        while self._connections and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.005)
        await super().close_all_connections()
        for task in self._adopting:
            task.cancel()
        await asyncio.gather(*self._adopting, return_exceptions=True)


class StreamTransport(asyncio.Transport):
    """A TLS stream of Tornado in the place of an event loop's transport."""

    def __init__(self, stream: iostream.SSLIOStream, connection: Connection) -> None:
        super().__init__({"socket": stream.socket})
        self._stream, self._connection = stream, connection
        self._unsent = 0  # writes that the socket has not taken
        self._reading = asyncio.Event()
        self._reading.set()
        self._closing = False

    async def serve(self) -> None:
        """Until one of both sides ends it."""
        connection = self._connection
        try:
            connection.connection_made(self)
            while True:
                await self._reading.wait()
                connection.data_received(await self._stream.read_bytes(65_536, partial=True))
        except iostream.StreamClosedError:
            pass
        finally:
            self._stream.close()
            connection.connection_lost(None)

    def write(self, data: Any) -> None:
        try:
            written = self._stream.write(data)
        except iostream.StreamClosedError:
            self._reading.set()  # ``serve`` hears of it at its next read
            return self._connection.pause_writing()
        if not written.done():
            self._unsent += 1
            self._connection.pause_writing()
            written.add_done_callback(self._sent)

    def _sent(self, written: asyncio.Future[None]) -> None:
        self._unsent -= 1
        if not self._unsent and not written.exception():
            self._connection.resume_writing()
            if self._closing:
                self._stream.close()

    def writelines(self, data: Iterable[Any]) -> None:
        self.write(b"".join(data))

    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return self._closing or self._stream.closed()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Every write that the socket does not take at once fills it."""

    def pause_reading(self) -> None:
        self._reading.clear()

    def resume_reading(self) -> None:
        self._reading.set()

    def close(self) -> None:
        self._closing = True
        if not self._unsent:
            self._stream.close()

    def abort(self) -> None:
        self._stream.close()
        self._reading.set()

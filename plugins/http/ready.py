"""Answers what is known without a task and a time-out of its own: ``/health`` and contexts that are cached, or that the
client has already. Requests and whole answers go around what Tornado does for what no endpoint here has.

The first step of an endpoint's coroutine is made in place; what waits there goes on in a task, as always. What
``/health`` measures is shared by all who ask, for a quarter of a second where all was well.
"""

from __future__ import annotations

import asyncio
import functools
import typing
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ClassVar

from tornado import httputil, web

import cco_sidecar
from cco_sidecar import ApiError, Application, Endpoint, GetContext, Route, Server, StorageError, hookimpl
from cco_sidecar_plugins._steps import begin, go_on
from cco_sidecar_plugins._turns import Shared
from cco_sidecar_plugins.context._turn import Gathered
from cco_sidecar_plugins.http._short_way import ShortAnswer, ShortRequest


@hookimpl
def part_class(base: type) -> type | None:
    if issubclass(base, Server):
        return type("ReadyServer", (ReadyServer, base), {})
    facts = {"shared": SharedChecks(0.25)}  # of this service
    return type("ReadyEndpoint", (ReadyEndpoint, base), facts) if issubclass(base, Endpoint) else None


@hookimpl
def register_routes() -> list[Route]:
    return [Route("GET", "/health", GetHealth)]


class ReadyServer(Server):
    """Hands requests to their endpoints in the short way, where no proxy speaks for who asks."""

    def initialize(self, request_callback: Any, *args: Any, **options: Any) -> None:
        super().initialize(request_callback, *args, **options)
        self.gathered = Gathered()
        if isinstance(request_callback, Application):
            self._found_again = functools.lru_cache(1000)(request_callback.found)

    @functools.cached_property
    def ended(self) -> asyncio.Future[None]:
        """The end of the bodies that are not awaited."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future

    def start_request(self, server_conn: object, request_conn: Any) -> httputil.HTTPMessageDelegate:
        if self.xheaders or not isinstance(self.request_callback, Application):
            return super().start_request(server_conn, request_conn)
        return ReadyDelegate(self, server_conn, request_conn)

    def endpoint_of(self, request: httputil.HTTPServerRequest) -> tuple[Endpoint, list[bytes]]:
        """The endpoint of a request, and the values in its path."""
        application = typing.cast(Application, self.request_callback)
        find = self._found_again if len(request.path) < 300 else application.found
        endpoint, values = find(str(request.method), request.path)
        return endpoint(application, request), values


class ReadyDelegate(httputil.HTTPMessageDelegate):
    """Hands a request to its endpoint, which may answer it in place, and else runs from the head on; from its end on
    where no body is to be waited for.
    """

    _handler: Any = None
    _task: asyncio.Task[None] | None = None
    _ended: asyncio.Future[None] | None = None  # the end of a body that is awaited

    def __init__(self, server: ReadyServer, connection: object, exchange: httputil.HTTPConnection) -> None:
        self._server, self._connection, self._exchange = server, connection, exchange

    def headers_received(self, start_line: Any, headers: httputil.HTTPHeaders) -> Awaitable[None] | None:
        request: Any = ShortRequest(self._exchange, self._connection, start_line, headers)
        self._handler, self._values = self._server.endpoint_of(request)
        framed = start_line.version == "HTTP/2.0"  # where a frame says whether there is a body
        length = headers.get("Content-Length", "0")
        if getattr(self._exchange, "whole", False):
            awaited = int(length) > self._handler.max_body  # which is refused without it
        else:
            awaited = framed or length != "0" or "Transfer-Encoding" in headers
        if not awaited:
            request._body_future = self._server.ended
            return None
        request._body_future = self._ended = asyncio.Future()
        self._run()
        prepared: asyncio.Future[None] = asyncio.Future()
        self._handler._prepared_future = prepared
        return prepared

    def _run(self) -> None:
        handler = self._handler
        transforms = [transform(handler.request) for transform in handler.application.transforms]
        self._task = asyncio.get_running_loop().create_task(handler._execute(transforms, *self._values))

    def data_received(self, chunk: bytes) -> None:
        self._handler.data_received(chunk)

    def finish(self) -> None:
        if self._ended and not self._ended.done():
            self._ended.set_result(None)
        if self._task:
            return
        if not self._handler.in_place:
            self._run()
        elif self._handler.ANSWER_SECONDS is None or asyncio.current_task() is None:
            self._begin()
        else:  # in the task of a connection, which a time limit of what is begun in it would end
            self._server.gathered.do_soon(self._begin)

    def _begin(self) -> None:
        try:
            path = [value.decode() for value in self._values]
        except UnicodeDecodeError:
            self._run()  # Tornado refuses it
        else:
            self._task = self._handler.begin(path)

    def on_connection_close(self) -> None:
        if self._handler:
            self._handler.on_connection_close()


class ReadyEndpoint(ShortAnswer):
    """Answers in place where it can."""

    shared: ClassVar[SharedChecks]
    in_place: ClassVar[bool] = False  # what it waits for is often there

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if issubclass(cls, (cco_sidecar.GetHealth, GetContext)):
            contexts, types = cls.sidecar.contexts, cls.sidecar.agent_types
            asked = is_ours(type(contexts)) and is_ours(type(contexts.project)) and is_ours(type(types))
            cls.in_place = asked and is_ours(cls)

    def begin(self, path: list[str]) -> asyncio.Task[None] | None:
        """Do as much as needs no waiting; the task of the rest, which has the time limit."""
        self.ANSWER_SECONDS = None  # asyncio's limits need a task
        self.path_args, self._transforms = path, [kind(self.request) for kind in self.application.transforms]
        return begin(self._work(path), self._go_on)

    async def _work(self, path: list[str]) -> None:
        try:
            await self.prepare()
            await self._serve(*path)
        except Exception as error:  # a boundary: as Tornado's
            self._handle_request_exception(error)

    async def _go_on(self, work: Coroutine[Any, Any, None], waiting: Any) -> None:
        try:
            async with asyncio.timeout(type(self).ANSWER_SECONDS):
                await go_on(work, waiting)
        except TimeoutError as error:
            if self._headers_written:  # the client does not read
                return self.close()
            await self.send(self.error_content(self._unexpected(error)))

    def _unexpected(self, error: Exception) -> ApiError:
        if isinstance(error, StorageError):
            self.shared.until = 0.0
        return super()._unexpected(error)


OURS = frozenset(kind.__module__.partition(".")[0] for kind in (object, web.RequestHandler, Endpoint, ShortAnswer))


def is_ours(kind: type) -> bool:
    """False for what somebody else's plugin derives: that may need a task."""
    return all(base.__module__.partition(".")[0] in OURS for base in kind.__mro__)


class GetHealth(cco_sidecar.GetHealth):
    """Whether the service works, measured at most a quarter of a second ago; 503 when it does not."""

    shared: SharedChecks

    async def checks(self) -> dict[str, Any]:
        """What is counted and not measured is as it is now."""
        measured, sidecar = await self.shared.get(super().checks), self.sidecar
        watching = getattr(sidecar.contexts, "watching", "off")  # of the plugin project_index
        return measured | {"active_agents": sidecar.agents.count(), "watching": watching}


class SharedChecks(Shared[dict[str, Any]]):
    """What ``/health`` measured last, or is measuring. What was not well is measured anew."""

    async def _looked(self, look: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        checks = await super()._looked(look)
        if not checks["storage"] == checks["event_bus"] == "healthy":
            self.until = 0.0
        return checks

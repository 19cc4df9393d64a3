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

import msgspec
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
        if self._task or not self._handler.in_place:
            self._go_on()
        elif self._handler.ANSWER_SECONDS is None or asyncio.current_task() is None:
            self._answer()
        else:  # in the task of a connection, which a time limit of what is begun in it would end
            self._server.gathered.do_soon(self._answer)

    def _answer(self) -> None:
        if not self._handler.answered(self._values):
            self._go_on()

    def _go_on(self) -> None:
        if self._ended and not self._ended.done():
            self._ended.set_result(None)
        if not self._task:
            self._run()

    def on_connection_close(self) -> None:
        if self._handler:
            self._handler.on_connection_close()


class ReadyEndpoint(ShortAnswer):
    """Answers in place where it can."""

    OURS = frozenset(kind.__module__.partition(".")[0] for kind in (object, web.RequestHandler, Endpoint, ShortAnswer))

    shared: ClassVar[SharedChecks]
    in_place: ClassVar[bool] = False  # may be answered so: what it waits for is often there
    asked = False  # path and query are known
    content: bytes | None = None  # the answer
    sending: asyncio.Task[None] | None = None

    def __init_subclass__(cls) -> None:
        """What somebody else's plugin changes of an endpoint may need a task."""
        ours = all(kind.__module__.partition(".")[0] in cls.OURS for kind in cls.__mro__)
        cls.in_place = ours and issubclass(cls, (cco_sidecar.GetHealth, GetContext))

    def answered(self, values: list[bytes]) -> bool:
        """Whether the request is answered; else it is served in a task, which goes on with what was begun here."""
        if not self.in_place or self.request.method != "GET":
            return False
        try:
            path = tuple(map(bytes.decode, values))
        except UnicodeDecodeError:
            return False
        content = self._content(path)
        if content is None:
            return False
        self.content, self.path_args = content, list(path)
        self._transforms = [transform(self.request) for transform in self.application.transforms]
        self.sending = begin(self._serve(*path))
        return True

    def _content(self, path: tuple[str, ...]) -> bytes | None:
        """The answer; None where it has to be waited for, or is a refusal."""
        if self._begun("prepare") is UNFINISHED:
            return None
        answer = UNFINISHED
        if not self.error:
            try:
                self._read_path_and_query(path)
                self.asked = True
                answer = self._begun("work", path)
            except ApiError as error:
                self.error = error
        if answer is UNFINISHED:
            setattr(self, "prepare", lambda: None)  # noqa: B010 - it is done
            return None
        return answer if isinstance(answer, bytes) else msgspec.json.encode(answer)

    def _begun(self, name: str, *arguments: Any) -> Any:
        """What a method returns; UNFINISHED where it waits, or fails: who calls it next goes on with that."""
        work = getattr(self, name)(*arguments)
        try:
            waiting = work.send(None)
        except StopIteration as done:
            return done.value
        except Exception as error:  # a boundary: of the endpoint, which deals with it
            self._replace(name, failed(error))
        else:
            self._replace(name, go_on(work, waiting))
        return UNFINISHED

    def _replace(self, name: str, rest: Coroutine[Any, Any, Any]) -> None:
        """Let the next call of a method be ``rest``."""

        def method(*_: Any) -> Coroutine[Any, Any, Any]:
            delattr(self, name)
            return rest

        setattr(self, name, method)

    def _read_path_and_query(self, path: tuple[str, ...]) -> None:
        if not self.asked:
            super()._read_path_and_query(path)

    async def _answer(self, path: tuple[str, ...]) -> None:
        content, self.content = self.content, None
        await (super()._answer(path) if content is None else self.send(content))

    def _unexpected(self, error: Exception) -> ApiError:
        if isinstance(error, StorageError):
            self.shared.until = 0.0
        return super()._unexpected(error)


class GetHealth(cco_sidecar.GetHealth):
    """Whether the service works, measured at most a quarter of a second ago; 503 when it does not."""

    shared: SharedChecks

    async def checks(self) -> dict[str, Any]:
        """What is counted and not measured is as it is now."""
        measured, sidecar = await self.shared.get(super().checks), self.sidecar
        watching = getattr(sidecar.contexts, "watching", "off")  # of the plugin project_index
        return measured | {"active_agents": len(sidecar.agents.active), "watching": watching}


class SharedChecks(Shared[dict[str, Any]]):
    """What ``/health`` measured last, or is measuring. What was not well is measured anew."""

    async def _looked(self, look: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        checks = await super()._looked(look)
        if not checks["storage"] == checks["event_bus"] == "healthy":
            self.until = 0.0
        return checks


UNFINISHED = object()


async def failed(error: Exception) -> None:
    raise error

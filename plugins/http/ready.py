"""Answers what is known without a task and a time-out of its own: ``/health`` and contexts that are cached, or that the
client has already. Requests and whole answers go around what Tornado does for what no endpoint here has.

The first step of an endpoint's coroutine is made in place; what waits there goes on in a task, as always.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, ClassVar

import msgspec
from tornado import httputil, web

from cco_sidecar import ApiError, Application, Delegate, Endpoint, GetContext, GetHealth, Server, hookimpl
from cco_sidecar_plugins._steps import begin, go_on
from cco_sidecar_plugins.http._short_way import ShortAnswer, ShortRequest


@hookimpl
def part_class(base: type) -> type | None:
    if issubclass(base, Server):
        return type("ReadyServer", (ReadyServer, base), {})
    return type("ReadyEndpoint", (ReadyEndpoint, base), {}) if issubclass(base, Endpoint) else None


class ReadyServer(Server):
    """Hands requests to their endpoints in the short way, where no proxy speaks for who asks."""

    def start_request(self, server_conn: object, request_conn: Any) -> httputil.HTTPMessageDelegate:
        if self.xheaders or not isinstance(self.request_callback, Application):
            return super().start_request(server_conn, request_conn)
        return ReadyDelegate(self.request_callback, server_conn, request_conn)


class ReadyDelegate(Delegate):
    """Hands a request to its endpoint, which may answer it in place."""

    _handler: Any = None

    def __init__(self, application: Application, server: object, exchange: httputil.HTTPConnection) -> None:
        self._application, self._server, self._exchange = application, server, exchange

    def headers_received(self, start_line: Any, headers: httputil.HTTPHeaders) -> Awaitable[None] | None:
        request = ShortRequest(self._exchange, self._server, start_line, headers)
        super().__init__(*self._application.endpoint_of(request))
        return super().headers_received(start_line, headers)

    def finish(self) -> None:
        if self._task or not self._handler.answered(self._values):
            super().finish()

    def on_connection_close(self) -> None:
        if self._handler:
            super().on_connection_close()


class ReadyEndpoint(ShortAnswer):
    """Answers in place where it can."""

    OURS = frozenset(kind.__module__.partition(".")[0] for kind in (object, web.RequestHandler, Endpoint, ShortAnswer))

    in_place: ClassVar[bool] = False  # may be answered so: what it waits for is often there
    asked = False  # path and query are known
    content: bytes | None = None  # the answer
    sending: asyncio.Task[None] | None = None

    def __init_subclass__(cls) -> None:
        """What somebody else's plugin changes of an endpoint may need a task."""
        ours = all(kind.__module__.partition(".")[0] in cls.OURS for kind in cls.__mro__)
        cls.in_place = ours and getattr(cls, "respond", None) in (GetHealth.respond, GetContext.respond)

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


UNFINISHED = object()


async def failed(error: Exception) -> None:
    raise error

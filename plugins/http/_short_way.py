"""Requests and answers without the work that Tornado does for what no endpoint here has: cookies, forms, ETags of its
own, other applications behind the same server. What can be seen of both is as Tornado makes it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from typing import Any, ClassVar

from tornado import httputil

from cco_sidecar import Application, Endpoint
from cco_sidecar_plugins._program import LogLines
from cco_sidecar_plugins.http._exchange import share_names
from cco_sidecar_plugins.http._framing import Fields, usual
from cco_sidecar_plugins.http._http1_exchange import Http1Exchange, head_lines

LOG = logging.getLogger("cco")


class ShortAnswer(Endpoint):
    """Sends an answer that is whole at once."""

    ui: Any
    alike: ClassVar[Alike]

    NAMES = """
        application request ui _headers_written _finished _auto_finish _prepared_future _headers _write_buffer
        _status_code _reason request_id claims allowance hang_up upload _transforms path_args path_kwargs query parked
        _accounted short answer error given
    """

    def __init_subclass__(cls) -> None:
        cls.alike = Alike()
        share_names(cls, *cls.NAMES.split())

    def __init__(self, application: Application, request: httputil.HTTPServerRequest) -> None:
        """What Tornado's does, without the helpers of templates."""
        self.application, self.request, self.ui = application, request, None
        self._headers_written = self._finished = False
        self._auto_finish, self._prepared_future = True, None
        self.clear()
        connection: Any = request.connection
        connection.set_close_callback(self.on_connection_close)
        self.initialize()

    def clear(self) -> None:
        """Begin an answer without Tornado's own headers: ``flush`` sets what every answer has."""
        self._headers, self._write_buffer = Fields(), []
        self.set_status(200)

    def log(self, level: int, template: str, *facts: Any) -> None:
        handler = logging.root.handlers[0] if logging.root.handlers else None
        if not (level == logging.INFO and type(handler) is LogLines and handler.emit_line(template, *facts)):
            super().log(level, template, *facts)

    REPRESENTATION = ("Content-Type", "Content-Encoding", "Content-Language")  # a 304 says nothing of these

    def finish(self, chunk: Any = None) -> asyncio.Future[None]:
        status, begun = self.get_status(), self._finished or self._headers_written or self._write_buffer
        if begun or (chunk is not None if status == 304 else type(chunk) is not bytes or status == 204):
            return super().finish(chunk)
        for name in self.REPRESENTATION if status == 304 else ():
            if name in self._headers:
                del self._headers[name]
        if status != 304 and "Content-Length" not in self._headers:
            self._headers["Content-Length"] = str(len(chunk))
        connection: Any = self.request.connection
        connection.set_close_callback(None)
        future = self._write_whole(connection, chunk or b"")
        connection.finish()
        self._finished = True
        self.on_finish()
        return future

    def _write_whole(self, connection: httputil.HTTPConnection, content: bytes) -> asyncio.Future[None]:
        headers = self._headers
        if self._transforms or not isinstance(connection, Http1Exchange) or not connection.is_plain(headers):
            self._write_buffer += [content] if content else []
            return self.flush(include_footers=True)
        self._headers_written = True
        common = {**self.common_headers()}
        of_one = ("X-Request-ID", "X-Refreshed-Token", *self.allowance)
        own = {usual(name): common.pop(name) for name in of_one if name in common}
        for name in [name for name in headers if name in own]:  # ours count, as where Tornado writes the head
            del headers[name]
        head = self.alike.lines(self.get_status(), self._reason, headers, common)
        head += head_lines([f"{name}: {value}" for name, value in own.items()]) + b"\r\n"
        return connection.write_whole(head, content)


class Alike:
    """What an endpoint's answers have in common is written once for those that follow each other."""

    _facts: Any = None
    _lines = b""

    def lines(self, code: int, reason: str, fields: httputil.HTTPHeaders, common: dict[str, str]) -> bytes:
        """The first lines of a head with ``fields``, some of which ``common`` replaces."""
        if self._facts != (code, reason, fields, common):
            whole = fields.copy()
            for name, value in common.items():
                whole[name] = value
            said = [f"{name}: {value}" for name, value in whole.get_all()]
            self._lines = head_lines([f"HTTP/1.1 {code} {reason}", *said])
            self._facts = code, reason, fields.copy(), common
        return self._lines


class ShortRequest(httputil.HTTPServerRequest):
    """A request whose host name and query are read once for all that have them."""

    def __init__(
        self,
        exchange: httputil.HTTPConnection,
        server: object,
        start_line: httputil.RequestStartLine,
        headers: httputil.HTTPHeaders,
    ) -> None:
        target = start_line.path
        path, _, query = target.partition("?")
        host = headers.get("Host", "")
        name = host_name(host) if 0 < len(host) < 300 else None
        if name is None or len(query) > 1_000:  # Tornado knows how to refuse the one
            super().__init__(connection=exchange, server_connection=server, start_line=start_line, headers=headers)
            return
        given, asked = (arguments(query), arguments(query)) if query else ({}, {})
        context: Any = getattr(exchange, "context", None)
        self.method, self.uri, self.version = start_line
        self.headers, self.body, self.files = headers, b"", {}
        self.remote_ip, self.protocol = context.remote_ip, context.protocol
        self.host, self.host_name = host, name
        self.path, self.query = path, query
        self.arguments, self.query_arguments, self.body_arguments = given, asked, {}
        self.connection, self.server_connection = exchange, server
        self._start_time, self._finish_time = time.time(), None


@functools.lru_cache(1000)
def host_name(host: str) -> str | None:
    """The name in a Host field, None where Tornado refuses it."""
    try:
        line = httputil.RequestStartLine("GET", "/", "HTTP/1.1")
        return httputil.HTTPServerRequest(start_line=line, headers=httputil.HTTPHeaders({"Host": host})).host_name
    except httputil.HTTPInputError:
        return None


def arguments(query: str) -> dict[str, list[bytes]]:
    """The arguments of a query. Raises HTTPInputError as Tornado does."""
    return {name: values[:] for name, values in read_arguments(query).items()}


@functools.lru_cache(1000)
def read_arguments(query: str) -> dict[str, list[bytes]]:
    line = httputil.RequestStartLine("GET", f"/?{query}", "HTTP/1.0")
    return httputil.HTTPServerRequest(start_line=line).arguments

"""Requests and answers without the work that Tornado does for what no endpoint here has: cookies, forms, ETags of its
own, other applications behind the same server. What can be seen of both is as Tornado makes it.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable
from typing import Any

from tornado import httputil

from cco_sidecar import Application, Delegate, Endpoint


class ShortAnswer(Endpoint):
    """Sends an answer that is whole at once."""

    def finish(self, chunk: Any = None) -> asyncio.Future[None]:
        whole = type(chunk) is bytes and not (self._finished or self._headers_written or self._write_buffer)
        if not whole or self.get_status() in (204, 304):
            return super().finish(chunk)
        if "Content-Length" not in self._headers:
            self._headers["Content-Length"] = str(len(chunk))
        self._write_buffer.append(chunk)
        connection: Any = self.request.connection
        connection.set_close_callback(None)
        future = self.flush(include_footers=True)
        connection.finish()
        self._finished = True
        self.on_finish()
        return future


class ShortDelegate(httputil.HTTPMessageDelegate):
    """Hands a request to the application."""

    _delegate: Delegate | None = None

    def __init__(self, application: Application, server: object, exchange: httputil.HTTPConnection) -> None:
        self._application, self._server, self._exchange = application, server, exchange

    def headers_received(self, start_line: Any, headers: httputil.HTTPHeaders) -> Awaitable[None] | None:
        request = ShortRequest(self._exchange, self._server, start_line, headers)
        delegate = self._delegate = self._application.find_handler(request)
        return delegate.headers_received(start_line, headers)

    def data_received(self, chunk: bytes) -> None:
        assert self._delegate
        self._delegate.data_received(chunk)

    def finish(self) -> None:
        assert self._delegate
        self._delegate.finish()

    def on_connection_close(self) -> None:
        if self._delegate:
            self._delegate.on_connection_close()


class ShortRequest(httputil.HTTPServerRequest):
    """A request whose host name is remembered; Tornado's own where it has a query."""

    def __init__(
        self,
        exchange: httputil.HTTPConnection,
        server: object,
        start_line: httputil.RequestStartLine,
        headers: httputil.HTTPHeaders,
    ) -> None:
        _, target, version = start_line
        path, _, query = target.partition("?")
        host = headers.get("Host", "")
        name = host_name(host) if 0 < len(host) < 300 else None
        if query or name is None:  # Tornado knows how to read the one, and how to refuse the other
            super().__init__(connection=exchange, server_connection=server, start_line=start_line, headers=headers)
            return
        context: Any = getattr(exchange, "context", None)
        vars(self).update(
            method=start_line.method, uri=target, version=version, headers=headers, body=b"", files={},
            remote_ip=context.remote_ip, protocol=context.protocol, host=host, host_name=name,
            connection=exchange, server_connection=server, path=path, query=query,
            arguments={}, query_arguments={}, body_arguments={}, _start_time=time.time(), _finish_time=None,
        )  # fmt: skip


@functools.lru_cache(1000)
def host_name(host: str) -> str | None:
    """The name in a Host field, None where Tornado refuses it."""
    try:
        line = httputil.RequestStartLine("GET", "/", "HTTP/1.1")
        return httputil.HTTPServerRequest(start_line=line, headers=httputil.HTTPHeaders({"Host": host})).host_name
    except httputil.HTTPInputError:
        return None

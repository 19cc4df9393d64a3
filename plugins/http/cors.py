"""Lets web pages of allowed origins read answers (CORS), and answers OPTIONS, by which browsers ask for that before.
Which pages may call is the core's.
"""

from __future__ import annotations

import functools
import typing
from typing import Any, ClassVar

import tornado.httputil
import tornado.web

from cco_sidecar import ApiError, Application, Server, Settings, UnknownRoute, hookimpl, origin_allowed

ALLOWED_HEADERS = (
    "Authorization, Content-Type, Idempotency-Key, If-None-Match, MCP-Protocol-Version, Mcp-Method, Mcp-Name"
)
EXPOSED_HEADERS = (
    "X-Request-ID, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, X-Refreshed-Token,"
    " Retry-After, ETag, Idempotent-Replay, Location, X-Ignored"
)


@hookimpl
def part_class(settings: Settings, base: type) -> type | None:
    origins = {"origins": settings.cors_origin}
    return type("CorsServer", (CorsServer, base), origins) if issubclass(base, Server) else None


class CorsServer(Server):
    """Has each answer of the application go through CorsHeaders, early ones and refusals too."""

    origins: tuple[str, ...] = ()

    def initialize(self, request_callback: Any, *args: Any, **options: Any) -> None:
        super().initialize(request_callback, *args, **options)
        if isinstance(request_callback, Application):
            request_callback.add_transform(typing.cast(Any, functools.partial(CorsHeaders, self.origins)))
            request_callback.unknown = type("Preflight", (Preflight, request_callback.unknown), {})


class Preflight(UnknownRoute):
    """Also answers OPTIONS: which methods a path has; ``*`` is the service as a whole."""

    status = 204
    answers: ClassVar[dict[int, None]] = {204: None}

    async def respond(self) -> bytes:
        if self.request.method == "OPTIONS" and (allowed := self.allowed_methods()):
            self.set_header("Allow", ", ".join(sorted(allowed)))
            return b""
        if self.request.path == "*":
            raise ApiError("REQ_001", "Only OPTIONS may ask for *")
        raise self.refusal()

    def allowed_methods(self) -> set[str]:
        if self.request.path == "*":
            return {"OPTIONS"}.union(*(route.methods for route, _ in self.application.served))
        found = super().allowed_methods()
        return found | {"OPTIONS"} if found else found


class CorsHeaders(tornado.web.OutputTransform):
    """Adds the headers by which a browser lets a page read the answer to one request."""

    __slots__ = ("_origins", "_request")  # each parked poll has one

    def __init__(self, origins: tuple[str, ...], request: tornado.httputil.HTTPServerRequest) -> None:
        self._origins, self._request = origins, request

    def transform_first_chunk(
        self, status_code: int, headers: tornado.httputil.HTTPHeaders, chunk: bytes, finishing: bool
    ) -> tuple[int, tornado.httputil.HTTPHeaders, bytes]:
        asked = self._request.headers
        origin = asked.get("Origin")
        if origin and origin_allowed(origin, self._origins):
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
            headers.add("Vary", "Origin")
            if self._request.method == "OPTIONS" and status_code == 204:  # a browser asks before it lets a page call
                headers["Access-Control-Allow-Methods"] = headers["Allow"]
                headers["Access-Control-Allow-Headers"] = ALLOWED_HEADERS
                headers["Access-Control-Max-Age"] = "600"
                if asked.get("Access-Control-Request-Private-Network"):
                    headers["Access-Control-Allow-Private-Network"] = "true"
        return status_code, headers, chunk

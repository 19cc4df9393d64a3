"""Lets web pages of allowed origins read answers (CORS), and answers OPTIONS, by which browsers ask for that before.
Which pages may call is the core's.
"""

from __future__ import annotations

from typing import Any, ClassVar

from cco_sidecar import ApiError, Application, Endpoint, Server, Settings, UnknownRoute, hookimpl, origin_allowed

ALLOWED_HEADERS = (
    "Authorization, Content-Type, Idempotency-Key, If-None-Match, MCP-Protocol-Version, Mcp-Method, Mcp-Name"
)
EXPOSED_HEADERS = (
    "X-Request-ID, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, X-Refreshed-Token,"
    " Retry-After, ETag, Idempotent-Replay, Location, X-Ignored"
)


@hookimpl
def part_class(settings: Settings, base: type) -> type | None:
    if issubclass(base, Endpoint):
        return type("ReadableEndpoint", (ReadableEndpoint, base), {"origins": settings.cors_origin})
    return type("CorsServer", (CorsServer, base), {}) if issubclass(base, Server) else None


class ReadableEndpoint(Endpoint):
    """Each answer, early ones and refusals too, has the headers by which a browser lets the page that asked read it."""

    origins: ClassVar[tuple[str, ...]]

    def common_headers(self) -> dict[str, str]:
        origin, headers = self.request.headers.get("Origin"), super().common_headers()
        return headers | self._readable_by(origin) if origin and origin_allowed(origin, self.origins) else headers

    def _readable_by(self, origin: str) -> dict[str, str]:
        headers = {
            "Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": EXPOSED_HEADERS,
            "Vary": ", ".join([*self._headers.get_list("Vary"), "Origin"]),
        }  # fmt: skip
        if self.request.method == "OPTIONS" and self.get_status() == 204:  # a browser asks before it lets a page call
            headers["Access-Control-Allow-Methods"] = self._headers["Allow"]
            headers["Access-Control-Allow-Headers"] = ALLOWED_HEADERS
            headers["Access-Control-Max-Age"] = "600"
            if self.request.headers.get("Access-Control-Request-Private-Network"):
                headers["Access-Control-Allow-Private-Network"] = "true"
        return headers


class CorsServer(Server):
    """Its application answers OPTIONS."""

    def initialize(self, request_callback: Any, *args: Any, **options: Any) -> None:
        super().initialize(request_callback, *args, **options)
        if isinstance(request_callback, Application):
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

"""The dashboard, a page under ``/dashboard``: its files, a token for whoever opens it, and the facts that it asks once.

``cco dashboard`` asks for a code and opens the page with it behind the ``#``, which no request and no log holds. The
page changes it for a token of the type ``operator``, a person's. A code is good once, for a minute, and only for the
run of the service that made it, so that it is worth nothing in a browser's history. While the browser starts, other
users of the machine may see it in the list of processes: on Linux their connections are told and refused.
Everywhere a code that comes twice ends the token of its first use, as RFC 6749 (4.1.2) has it for such codes.

The page's files lie in the folder ``dashboard`` beside this file. They hold no data and need no token.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import socket
import time
import weakref
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from cco_sidecar import (
    CATEGORIES,
    PERMISSIONS,
    READ,
    SPAWN,
    ApiError,
    Application,
    Claims,
    Endpoint,
    Route,
    Server,
    Settings,
    Sidecar,
    UnknownRoute,
    clean_text,
    hookimpl,
    iso,
)
from cco_sidecar_plugins._files import content_of
from cco_sidecar_plugins.tokens._foreign import ForeignClaims

log = logging.getLogger("cco")

FOLDER = Path(__file__).with_suffix("")
TYPES = {  # of the page's files; no other is served
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml", ".png": "image/png", ".webp": "image/webp", ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json", ".woff2": "font/woff2",
}  # fmt: skip
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self';"
    " connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'"
)
HEADERS = {  # beside X-Frame-Options and nosniff, which every answer has
    "Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip
AGAIN = "run `cco dashboard` again"
ASKED = (  # the routes that the page works with; some are plugins', which may be turned off
    "GET /api/issues", "GET /api/issues/{issue_id}", "GET /api/issues/{issue_id}/timeline",
    "GET /api/issues/{issue_id}/export", "GET /api/agents", "GET /api/agents/{agent_id}/status",
    "GET /api/agents/{agent_id}/logs", "GET /api/agents/{agent_id}/brief", "GET /api/results",
    "GET /api/results/{result_id}", "GET /api/results/{result_id}/diff", "GET /api/events",
    "GET /api/events/wait/{event_type}", "GET /api/approvals", "POST /api/approvals/{approval_id}/answer",
    "POST /api/agents/spawn", "DELETE /api/agents/{agent_id}", "POST /api/events/{event_type}", "POST /api/runs",
    "GET /api/runs", "GET /api/runs/{run_id}", "DELETE /api/runs/{run_id}",
)  # fmt: skip


@hookimpl(trylast=True)  # a repository's own agents do not take the type's name
def register_agent_types() -> dict[str, str]:
    return {"operator": "operator"}


@hookimpl
def register_routes() -> list[Route]:
    return [
        Route("GET", "/dashboard", GetPage),
        Route("GET", "/dashboard/", GetPage),
        Route("GET", "/dashboard/{file}", GetPage),
        Route("GET", "/dashboard/{folder}/{file}", GetPage),
        Route("GET", "/api/dashboard", GetDashboard),
        Route("POST", "/api/dashboard/code", MakeCode),
        Route("POST", "/api/dashboard/token", TakeToken),
    ]


@hookimpl
def part_class(base: type) -> type | None:
    return type("FrontServer", (FrontServer, base), {}) if issubclass(base, Server) else None


class FrontServer(Server):
    def initialize(self, request_callback: Any, *args: Any, **options: Any) -> None:
        super().initialize(request_callback, *args, **options)
        if isinstance(request_callback, Application):
            request_callback.unknown = type("FrontDoor", (FrontDoor, request_callback.unknown), {})


class FrontDoor(UnknownRoute):
    """Tells whoever types the service's address into a browser where the page is."""

    def refusal(self) -> ApiError:
        if self.request.path != "/":
            return super().refusal()
        described = any(row.path == "/openapi.json" for row, _ in self.application.served)
        also = ", /openapi.json describes the API" if described else ""
        return ApiError("REQ_002", f"Nothing is here: `cco dashboard` opens the page{also}")


# -- the page


class GetPage(Endpoint):
    """A file of the page, its index.html where none is named."""

    public = True
    answers = {200: None}
    problems = (304,)
    cache_control = "no-cache"

    async def respond(self, *names: str) -> bytes:
        path = FOLDER.joinpath(*names or ("index.html",))
        if path.suffix not in TYPES:
            raise ApiError("REQ_002", "The page has no such file")
        content = await asyncio.to_thread(page_file, path)
        for name, value in HEADERS.items():
            self.set_header(name, value)
        self.content_type, etag = TYPES[path.suffix], f'W/"{hashlib.sha256(content).hexdigest()[:32]}"'
        self.set_header("ETag", etag)
        if self.check_etag_header():
            self.set_status(304)
            return b""
        return content


def page_file(path: Path) -> bytes:
    """The content of a file of the page. Raises REQ_002 where there is none. Blocks."""
    try:
        return path.read_bytes()
    except OSError:
        raise ApiError("REQ_002", "The page has no such file") from None


# -- the token


class DashboardCode(Struct):
    """A code that opens the dashboard, once and until ``expires_at``."""

    code: str
    expires_at: str


class CodeSubmission(Struct):
    """Body of POST /api/dashboard/token."""

    code: Annotated[str, Meta(min_length=1, max_length=200)]


class OperatorToken(Struct):
    """A token of the type operator, and what it allows."""

    token: str
    expires_at: str
    permissions: list[str]


class MakeCode(Endpoint):
    """Make a code for a token of a person's own, which is good once and for a minute. Takes no agent's token."""

    permission = SPAWN
    answers = {200: DashboardCode}
    holds_token = True

    async def respond(self) -> DashboardCode:
        if self.claims.bound:
            raise ApiError("AUTH_003", "An agent's token opens no dashboard: that is for people")
        if isinstance(self.claims, ForeignClaims):
            raise ApiError("AUTH_003", "This token was issued elsewhere: give it to the page itself")
        code, expires = codes_of(self.sidecar).make(self.claims)
        return DashboardCode(code, iso(expires))


class TakeToken(Endpoint):
    """Change a code for an operator's token, once. Pages of another origin may not."""

    public = True
    body = CodeSubmission
    answers = {200: OperatorToken}
    problems = (401,)
    holds_token = True

    async def respond(self, body: dict[str, Any]) -> OperatorToken:
        request, tokens = self.request, self.sidecar.tokens
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.host:
            raise ApiError("REQ_007", "Only the dashboard of this service itself may ask for its token")
        await asyncio.to_thread(check_owner, request.connection.stream.socket)  # type: ignore[union-attr]
        subject = f"operator-{secrets.token_hex(4)}"
        maker, earlier = codes_of(self.sidecar).take(body["code"], subject)
        if maker is None:
            if earlier:
                tokens.revoked.add(earlier)
                await self.sidecar.storage.write(lambda records: records.revoke(self.sidecar.settings.project, earlier))
            raise ApiError("AUTH_001", f"This code was used, has expired, or is another run's of the service: {AGAIN}")
        self.acted_on = {"agent_id": subject, "issue_id": maker.issue_id or ""}
        may = sorted(maker.permissions, key=PERMISSIONS.index)
        token = tokens.mint(subject, "operator", permissions=may, issue_id=maker.issue_id)
        claims = tokens.verify(f"Bearer {token}")
        allowed = sorted(claims.permissions, key=PERMISSIONS.index)
        return OperatorToken(token, iso(claims.exp), allowed)


class Codes:
    """Codes of the last minute, each with the claims of who asked for it, and once it was used with the subject of the
    token that it gave. They are kept in memory alone.
    """

    SECONDS = 60.0
    KEPT = 100

    def __init__(self) -> None:
        self._made: dict[str, tuple[float, Claims, str]] = {}  # oldest first

    def make(self, claims: Claims) -> tuple[str, float]:
        """A new code, and when it expires."""
        code, expires = secrets.token_urlsafe(32), time.time() + self.SECONDS
        while len(self._made) >= self.KEPT:
            del self._made[next(iter(self._made))]
        self._made[code] = (expires, claims, "")
        return code, expires

    def take(self, code: str, subject: str) -> tuple[Claims | None, str]:
        """Whose code it is, which ``subject`` has now used; else None and who used it before."""
        expires, claims, earlier = self._made.get(code, (0.0, None, ""))
        if claims is None or earlier or expires <= time.time():
            return None, earlier
        self._made[code] = (expires, claims, subject)
        return claims, ""


# -- whose connection it is


def check_owner(connection: socket.socket) -> None:
    """Raises AUTH_003 where another user of this machine has the other end. Blocks."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    try:
        ports = connection.getpeername()[1], connection.getsockname()[1]
    except OSError:  # the client has gone, and gets no answer
        return
    tables = [content_of(Path(f"/proc/net/{name}")).decode("ascii", "replace") for name in ("tcp", "tcp6")]
    if strangers := owners("\n".join(tables), *ports) - {0, os.getuid()} if any(tables) else set():
        log.warning("a code for the dashboard came from the user with the number %s, and was refused", *strangers)
        raise ApiError("AUTH_003", "Another user of this machine may not open the dashboard: paste a token instead")


def owners(table: str, local: int, remote: int) -> set[int]:
    """The users who have the ends at the port ``local`` of connections to ``remote``, as /proc/net/tcp names them (man
    5 proc): of ends in this machine's own network alone.
    """
    ends = (f":{local:04X}", f":{remote:04X}")
    rows = (row.split() for row in table.splitlines())
    return {int(row[7]) for row in rows if len(row) > 7 and (row[1][-5:], row[2][-5:]) == ends}


PARTS: weakref.WeakKeyDictionary[Sidecar, Codes] = weakref.WeakKeyDictionary()


def codes_of(sidecar: Sidecar) -> Codes:
    """The codes of a service."""
    return PARTS.setdefault(sidecar, Codes())


# -- what the page asks once


class NamedType(Struct):
    """An agent type and its category."""

    name: str
    category: str


class ServiceLimits(Struct):
    """What bounds the work here; by "issue" and "day" for each unit what may be spent."""

    max_agents: int
    max_agents_per_issue: int
    agent_timeout_seconds: int
    storage_limit_mb: int | None
    event_limit: int
    event_retention_seconds: int
    budgets: dict[str, dict[str, float]]


class DashboardFacts(Struct):
    """The service as the page shows it; ``routes_missing`` are those that it works with and this service lacks."""

    project_id: str
    root_name: str
    version: str
    instance_id: str
    started_at: str
    agent_types: list[NamedType]
    permissions: list[str]
    limits: ServiceLimits
    routes_missing: list[str]


class GetDashboard(Endpoint):
    """What the dashboard asks once: which service this is, and what the token may."""

    permission = READ
    answers = {200: DashboardFacts}

    async def respond(self) -> DashboardFacts:
        sidecar, info = self.sidecar, self.sidecar.info
        types, may = sidecar.agent_types, self.claims.permissions
        there = {f"{route.method} {route.path}" for route, _ in self.application.served}
        named = sorted(types.categories.items())
        return DashboardFacts(
            info.project_id, clean_text(sidecar.settings.root.name), info.version, info.instance_id, info.started_at,
            [NamedType(name, category) for name, category in named if not CATEGORIES[category].people],
            sorted(may, key=PERMISSIONS.index), limits_of(sidecar.settings),
            [route for route in ASKED if route not in there],
        )  # fmt: skip


def limits_of(settings: Settings) -> ServiceLimits:
    """The limits that hold; those of plugins are read where their options are there."""
    budgets = {unit: getattr(settings, f"budget_{unit}", {}) for unit in ("usd", "tokens")}
    return ServiceLimits(
        settings.max_agents, settings.max_agents_per_issue, settings.agent_timeout,
        getattr(settings, "storage_limit_mb", None), settings.event_limit, settings.event_retention, budgets,
    )  # fmt: skip

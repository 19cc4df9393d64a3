"""The Model Context Protocol at /mcp: what agents' programs need of the service, as tools.

    POST /mcp -> Endpoint.prepare (host, size, token) -> read_request (the message, its revision)
              -> a method: for tools/call the rate, the tool, and through it an endpoint of the API
              -> the answer as JSON; as a stream where it is long in coming, with a sign of life every few seconds

Nothing is kept between two messages: no session, and only a call that waits is known, so that it can be cancelled. A
stream begins with an event's id that holds all that a later process needs to answer who was cut off (SEP-1699).
Only calls of tools and reading a resource count as requests of an agent, whose program asks the rest by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Any, ClassVar

import msgspec
import tornado.iostream
from tornado.httputil import HTTPHeaders

from cco_sidecar import ERRORS, READ, ApiError, Endpoint, Route, StoreResult, hookimpl
from cco_sidecar_plugins._files import NO_JSON
from cco_sidecar_plugins._words import did_you_mean
from cco_sidecar_plugins.agents.details import heard_from, note_refusal
from cco_sidecar_plugins.http._mcp_protocol import (
    CUT,
    FRESH_MS,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    OLDER,
    PARSE_ERROR,
    REVISIONS,
    SERVER,
    UNKNOWN_METHOD,
    Request,
    RpcError,
    RpcFailure,
    RpcMessage,
    event_of,
    read_request,
)
from cco_sidecar_plugins.http._mcp_shapes import page_of, schema_of
from cco_sidecar_plugins.http._mcp_tools import INSTRUCTIONS, TOOLS, WORDS, Call, Tool
from cco_sidecar_plugins.http.unsent import counted

CAPABILITIES: dict[str, Any] = {"tools": {}, "resources": {}}
BRIEF = "cco://brief"  # of the caller's own issue; with a slash and an issue behind it of that one


@hookimpl
def register_routes() -> list[Route]:
    return [Route("POST", "/mcp", AnswerMcp), Route("GET", "/mcp", ResumeMcp)]


class AnswerMcp(Endpoint):
    """Answer one message of the Model Context Protocol, in revision 2026-07-28, 2025-11-25 or 2025-06-18.

    The tools are those that the token's permissions allow. Errors of HTTP, such as a token that is none, have the form
    of all errors here; errors of the protocol have its own.
    """

    body = RpcMessage
    max_body = StoreResult.max_body
    answers: ClassVar[dict[int, Any]] = {200: dict[str, Any], 202: None, 400: RpcFailure, 404: RpcFailure}
    aside = True
    reading = True  # for the audit log, until a tool writes
    ANSWER_SECONDS = None  # a call that waits has its own, any other that of CALL_SECONDS

    CALL_SECONDS = 150.0
    SILENT_SECONDS = 5.0  # how long nothing is sent; programs give up after 60
    RETRY_MS = 15_000  # programs try twice: a restart may take half a minute

    message_id: Any = None
    waiting: asyncio.Future[Any] | None = None  # what ends with the connection

    async def work(self, path: tuple[str, ...]) -> Any:
        message = self.given or {}
        self.message_id = message.get("id")
        asked = read_request(message, self.request.headers)
        method = METHODS.get((asked.method, asked.modern))
        if asked.id is None:
            if asked.method == "notifications/cancelled":
                self._cancel(asked.params.get("requestId"))
            self.set_status(202)
            return b""
        if method is None:
            raise asked.refusal(UNKNOWN_METHOD, f"Method not found: {asked.method[:100]}", code="REQ_002")
        return await method(self, asked)

    async def _read_body(self) -> None:
        """Take the body as a message. Raises RpcError, and REQ_005."""
        if self.upload.lstrip()[:1] == b"[":
            raise RpcError(INVALID_REQUEST, "Batches are not taken: send one message")
        try:
            await super()._read_body()
        except RecursionError:
            raise RpcError(PARSE_ERROR, "The body is nested too deeply") from None
        except ApiError as error:
            if error.code != "REQ_001":
                raise
            raise RpcError(INVALID_REQUEST if error.details else PARSE_ERROR, error.message) from None

    def error_content(self, error: ApiError) -> bytes:
        content = super().error_content(error)
        if not isinstance(error, RpcError):
            return content
        return msgspec.json.encode(error.message_for(self.message_id))

    def on_finish(self, status: int = 0) -> None:
        """A tool's error is an answer to the protocol, with status 200, and a refusal in the log."""
        super().on_finish(status or (ERRORS[self.error.code][0] if self.error else 0))

    # -- methods

    async def tell(self, asked: Request) -> Any:
        return TOLD[asked.method](asked, self.claims.permissions)

    async def list_resources(self, asked: Request) -> Any:
        known = READ in self.claims.permissions and Call(self, {}).own_issue
        resource = {"uri": BRIEF, "name": "brief", "mimeType": "text/markdown", "description": TOOLS["brief"].words}
        return asked.result({"resources": [resource] if known else []}, FRESH_MS)

    async def list_templates(self, asked: Request) -> Any:
        template = {"uriTemplate": BRIEF + "/{issue_id}", "name": "brief of an issue", "mimeType": "text/markdown"}
        may = READ in self.claims.permissions
        return asked.result({"resourceTemplates": [template] if may else []}, FRESH_MS)

    async def read_resource(self, asked: Request) -> Any:
        uri = asked.params.get("uri")
        if not isinstance(uri, str) or not (uri == BRIEF or uri.startswith(BRIEF + "/")):
            raise asked.refusal(INVALID_PARAMS, "Resource not found", code="REQ_002", uri=str(uri)[:200])
        issue_id = uri.removeprefix(BRIEF).removeprefix("/")
        try:
            self._begin("brief", TOOLS["brief"])
            text = await TOOLS["brief"].call(Call(self, {"issue_id": issue_id} if issue_id else {}))
        except ApiError as error:
            rpc = INTERNAL_ERROR if error.status >= 500 else INVALID_PARAMS
            raise asked.refusal(rpc, error.message, code=error.code, uri=uri[:200]) from None
        return asked.result({"contents": [{"uri": uri, "mimeType": "text/markdown", "text": text}]}, 0)

    async def call_tool(self, asked: Request) -> Any:
        name, given = asked.params.get("name"), asked.params.get("arguments")
        tool = TOOLS.get(name) if isinstance(name, str) else None
        if tool is None:
            near = did_you_mean(str(name)[:100], TOOLS)
            raise asked.refusal(INVALID_PARAMS, f"Unknown tool: {str(name)[:100]}{near}", code="REQ_002")
        if not isinstance(given, dict) and given is not None:
            raise asked.refusal(INVALID_PARAMS, "params.arguments must be an object")
        call = Call(self, given or {})
        outcome = asyncio.ensure_future(self._outcome(str(name), tool, call))
        streams = "text/event-stream" in ", ".join(self.request.headers.get_list("Accept"))
        try:
            with self._known(tool, asked, outcome):
                if streams and not await self._is_done(outcome, 0.0 if tool.waits else self.SILENT_SECONDS):
                    await self._stream(asked, outcome)
                else:
                    await asyncio.wait({outcome})
                    await self.send(msgspec.json.encode(self._result_of(asked, outcome)))
        finally:
            await asyncio.wait({outcome})  # what was begun is done, also where nobody is left to read of it
        if call.delivered:
            call.delivered()
        return b""

    # -- calls of tools

    def _begin(self, name: str, tool: Tool) -> None:
        """Count a request of the agent. Raises RATE_001."""
        self.request.path += f"/{name}"  # as the request logs show it
        self.reading = not tool.writes
        heard_from(self.sidecar.agents, self.claims.sub, "POST", self.request.path)
        self.allowance = self.sidecar.limits.spend(self.claims)

    async def _outcome(self, name: str, tool: Tool, call: Call) -> tuple[str, bool]:
        """(the answer's text, whether it is an error)."""
        began = time.monotonic()
        try:
            self._begin(name, tool)
            async with asyncio.timeout(None if tool.waits else self.CALL_SECONDS):
                return await tool.call(call), False
        except ApiError as error:
            failure = error
        except Exception as error:  # a boundary: the model hears that it failed, the log why
            failure = self._unexpected(error)
        finally:
            self.parked = time.monotonic() - began if tool.waits else 0.0
        if name == "store_result":
            note_refusal(self.sidecar.agents, self.claims.sub, failure)
        self.error, self.allowance = failure, failure.allowance or self.allowance
        told = f"{failure.code}: {failure.message}".replace("$.result.", "$.").replace("$.query.", "$.")
        return page_of(told, 1), True

    @contextlib.contextmanager
    def _known(self, tool: Tool, asked: Request, outcome: asyncio.Future[Any]) -> Iterator[None]:
        """While it lasts, a call that waits is ended by a client that hangs up or cancels it."""
        calls: dict[Any, asyncio.Future[Any]] = self.application.settings.setdefault("mcp calls", {})
        key = (self.claims.sub, asked.id)
        if tool.waits:
            self.waiting = self.hang_up.future = calls[key] = outcome
        try:
            yield
        finally:
            if calls.get(key) is outcome:
                del calls[key]
            if tool.waits:
                outcome.cancel()

    def _cancel(self, message_id: Any) -> None:
        """End the call of this token that waits under an id: the client would pass over its answer, and what is
        answered counts as read.
        """
        calls = self.application.settings.get("mcp calls", {})
        if isinstance(message_id, (str, int)) and (outcome := calls.get((self.claims.sub, message_id))):
            outcome.cancel()

    def _result_of(self, asked: Request, outcome: asyncio.Future[tuple[str, bool]]) -> dict[str, Any]:
        """The message with a call's result. Raises StreamClosedError where nobody is left to read it."""
        if self.hang_up.happened:
            raise tornado.iostream.StreamClosedError
        text, failed = ("The client has cancelled this call.", False) if outcome.cancelled() else outcome.result()
        return asked.result({"content": [{"type": "text", "text": text}], "isError": failed})

    async def _is_done(self, outcome: asyncio.Future[Any], seconds: float) -> bool:
        return bool((await asyncio.wait({outcome}, timeout=seconds))[0])

    async def _stream(self, asked: Request, outcome: asyncio.Future[tuple[str, bool]]) -> None:
        """The answer as a stream: its head at once, then signs of life, then the result."""
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("X-Accel-Buffering", "no")  # else a proxy may keep the signs of life to itself
        progress, began = asked.meta.get("progressToken"), time.monotonic()
        place = json.dumps([process_of(self), asked.modern, asked.id])
        resumable = len(place) <= 1000  # as a head can bear it
        # Of a type of its own: as a message some programs would read it as JSON.
        begin = f"event: begin\nid: {place}\nretry: {self.RETRY_MS}\ndata:\n\n" if resumable else ": waiting\n\n"
        await self._send_part(begin.encode())
        while not await self._is_done(outcome, self.SILENT_SECONDS):
            alive = b": waiting\n\n"
            if isinstance(progress, (str, int)):
                told = {"progressToken": progress, "progress": round(time.monotonic() - began, 1), "message": "waiting"}
                alive = event_of({"jsonrpc": "2.0", "method": "notifications/progress", "params": told})
            await self._send_part(alive)
        await self._send_part(event_of(self._result_of(asked, outcome)))
        self.finish()

    async def _send_part(self, content: bytes) -> None:
        """A part of a stream. Raises StreamClosedError where the client does not take it."""
        try:
            with counted(self, content):
                self.write(content)
                await self._taken(self.flush())
        finally:
            self.hang_up.future = self.waiting


class ResumeMcp(Endpoint):
    """Answer a call whose stream ended with the service.

    `Last-Event-ID` is the id that began the stream. 405 where this process gave that id, and where there is none: no
    stream is offered.
    """

    answers: ClassVar[dict[int, Any]] = {200: str}
    content_type = "text/event-stream"
    aside = True

    async def respond(self) -> bytes:
        with contextlib.suppress(*NO_JSON):
            place = self.request.headers.get("Last-Event-ID", "")
            process, modern, message_id = msgspec.json.decode(place, type=tuple[str, bool, str | int])
            if process != process_of(self):
                asked = Request("tools/call", message_id, {}, {}, modern)
                return event_of(asked.result({"content": [{"type": "text", "text": CUT}], "isError": True}))
        self.set_header("Allow", "OPTIONS, POST")
        raise ApiError("REQ_003", "Only OPTIONS, POST here: no stream is offered, and of this process none is resumed")


def process_of(endpoint: Endpoint) -> str:
    """What tells this life of the service from others."""
    return str(endpoint.application.settings.setdefault("mcp process", uuid.uuid4().hex[:8]))


# -- what is known without a service


def shake_hands(asked: Request, may: Collection[str]) -> dict[str, Any]:
    wanted = asked.params.get("protocolVersion")
    revision = wanted if wanted in OLDER else OLDER[0]
    server = {"capabilities": CAPABILITIES, "serverInfo": SERVER, "instructions": INSTRUCTIONS}
    return asked.result({"protocolVersion": revision} | server)


def discover(asked: Request, may: Collection[str]) -> dict[str, Any]:
    known = {"supportedVersions": REVISIONS, "capabilities": CAPABILITIES, "instructions": INSTRUCTIONS}
    return asked.result(known, FRESH_MS)


def list_tools(asked: Request, may: Collection[str]) -> dict[str, Any]:
    shown = [described(name) for name, tool in TOOLS.items() if tool.permission in (None, *may)]
    return asked.result({"tools": shown}, FRESH_MS)


def described(name: str) -> dict[str, Any]:
    """A tool as clients list it."""
    tool = TOOLS[name]
    schema = schema_of(tool.takes(), WORDS | tool.fields)
    return {"name": name, "description": tool.words, "inputSchema": schema, "annotations": tool.annotations()}


TOLD: dict[str, Callable[[Request, Collection[str]], dict[str, Any]]] = {
    "initialize": shake_hands,
    "ping": lambda asked, may: asked.result({}),
    "server/discover": discover,
    "tools/list": list_tools,
}


def told_without_service(message: Any, headers: dict[str, str], may: Collection[str]) -> dict[str, Any] | None:
    """The answer to a message that needs no service, so that a program keeps its tools until one runs; None for any
    other, and for one that the service would refuse.
    """
    try:
        asked = read_request(msgspec.to_builtins(msgspec.convert(message, RpcMessage)), HTTPHeaders(headers))
    except (msgspec.ValidationError, RpcError):
        return None
    answered = asked.id is not None and (asked.method, asked.modern) in METHODS and asked.method in TOLD
    return TOLD[asked.method](asked, may) if answered else None


Method = Callable[[AnswerMcp, Request], Awaitable[Any]]
BOTH: dict[str, Method] = {
    "tools/list": AnswerMcp.tell,
    "tools/call": AnswerMcp.call_tool,
    "resources/list": AnswerMcp.list_resources,
    "resources/templates/list": AnswerMcp.list_templates,
    "resources/read": AnswerMcp.read_resource,
}
METHODS: dict[tuple[str, bool], Method] = {  # by name, and whether it is a method of the modern revisions
    ("initialize", False): AnswerMcp.tell,
    ("ping", False): AnswerMcp.tell,
    ("server/discover", True): AnswerMcp.tell,
    **{(name, modern): method for name, method in BOTH.items() for modern in (True, False)},
}

"""The Model Context Protocol as messages: revisions, what a message must be, and the forms of results and errors.

The specification is that of modelcontextprotocol.io. In revision 2026-07-28 each request says its revision and stands
alone; the older ones begin with ``initialize``. A request that says no revision is in an older one.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, Literal

import msgspec
import tornado.httputil
from msgspec import UNSET, Struct, UnsetType

from cco_sidecar import ApiError, __version__

MODERN = ("2026-07-28",)
OLDER = ("2025-11-25", "2025-06-18")  # the newest first
REVISIONS = MODERN + OLDER

META = "io.modelcontextprotocol/"
SERVER = {"name": "cco-sidecar", "title": "Orchestration sidecar", "version": __version__}
NAMED_BY = {"tools/call": "name", "resources/read": "uri", "prompts/get": "name"}  # what Mcp-Name repeats
FRESH_MS = 300_000  # how long a client may keep a list
CUT = "the service ended before it had answered; look whether what you asked for was done before you ask again"

PARSE_ERROR, INVALID_REQUEST, UNKNOWN_METHOD, INVALID_PARAMS = -32700, -32600, -32601, -32602
INTERNAL_ERROR, HEADER_MISMATCH, UNSUPPORTED_REVISION = -32603, -32020, -32022


class RpcMessage(Struct):
    """One message of the Model Context Protocol, in JSON-RPC 2.0: a request, or without an id a notification."""

    jsonrpc: Literal["2.0"]
    method: str
    id: str | int | UnsetType = UNSET
    params: dict[str, Any] | None = None


class RpcError(ApiError):
    """A refusal in JSON-RPC's form; ``rpc`` is its code there, and ``code`` what the request logs have."""

    def __init__(
        self, rpc: int, message: str, *, code: str = "REQ_001", status: int = 400, data: dict[str, Any] | None = None
    ) -> None:
        super().__init__(code, message, status=status)
        self.rpc, self.data = rpc, data

    def message_for(self, message_id: Any) -> dict[str, Any]:
        """The body; without an id where the request's could not be read."""
        error: dict[str, Any] = {"code": self.rpc, "message": self.message}
        error |= {"data": self.data} if self.data else {}
        named = {} if message_id is None else {"id": message_id}
        return {"jsonrpc": "2.0", **named, "error": error}


class RpcFailure(Struct, omit_defaults=True):
    """The protocol's own form of an error."""

    jsonrpc: str
    error: dict[str, Any]
    id: str | int | UnsetType = UNSET


class Request(Struct, frozen=True):
    """A request or notification that may be answered: ``params`` without ``_meta``, which is apart."""

    method: str
    id: str | int | None  # None for a notification
    params: dict[str, Any]
    meta: dict[str, Any]
    modern: bool

    def result(self, content: dict[str, Any], fresh_ms: int | None = None) -> dict[str, Any]:
        """The answer; ``fresh_ms`` where its kind of result says how long it may be kept."""
        if self.modern:
            content = content | {"resultType": "complete", "_meta": {META + "serverInfo": SERVER}}
            content |= {} if fresh_ms is None else {"ttlMs": fresh_ms, "cacheScope": "private"}
        return {"jsonrpc": "2.0", "id": self.id, "result": content}

    def refusal(self, rpc: int, message: str, *, code: str = "REQ_001", **data: Any) -> RpcError:
        """An error that the older revisions send with status 200: their clients take 404 for the end of a session."""
        modern_status = 404 if rpc == UNKNOWN_METHOD else 400
        return RpcError(rpc, message, code=code, status=modern_status if self.modern else 200, data=data)


def read_request(message: dict[str, Any], headers: tornado.httputil.HTTPHeaders) -> Request:
    """A message that is shaped as RpcMessage, in the revision that it says. Raises RpcError."""
    method, params = message["method"], message.get("params") or {}
    meta = params.get("_meta") or {}
    if not isinstance(meta, dict):
        raise RpcError(INVALID_PARAMS, "params._meta must be an object")
    modern = is_modern(message, meta, headers.get("MCP-Protocol-Version"))
    if modern and "id" in message:
        check_modern(method, params, meta, headers)
    given = {name: value for name, value in params.items() if name != "_meta"}
    return Request(method, message.get("id"), given, meta, modern)


def is_modern(message: dict[str, Any], meta: dict[str, Any], header: str | None) -> bool:
    """Whether a message is in a revision without ``initialize``. Raises RpcError for a revision that is not known
    here.
    """
    declared = meta.get(META + "protocolVersion")
    if declared is not None and not isinstance(declared, str):
        raise RpcError(INVALID_PARAMS, f"params._meta: {META}protocolVersion must be a text")
    if message["method"] == "initialize" and declared is None:  # it says its revision in its own way
        return False
    asked = declared or header
    if asked and asked not in REVISIONS and header in (None, asked):
        data = {"supported": list(REVISIONS), "requested": asked[:100]}
        raise RpcError(UNSUPPORTED_REVISION, "Unsupported protocol version", data=data)
    return declared in MODERN or header in MODERN


def check_modern(
    method: str, params: dict[str, Any], meta: dict[str, Any], headers: tornado.httputil.HTTPHeaders
) -> None:
    """Raise RpcError where a request lacks what each must say, or its headers say something else than its body."""
    missing = [name for name in ("protocolVersion", "clientCapabilities") if META + name not in meta]
    if missing:
        raise RpcError(INVALID_PARAMS, f"params._meta lacks {', '.join(META + name for name in missing)}")
    expected = {"MCP-Protocol-Version": meta[META + "protocolVersion"], "Mcp-Method": method}
    if method in NAMED_BY:
        expected["Mcp-Name"] = params.get(NAMED_BY[method])
    for name, value in expected.items():
        header = decoded(headers.get(name)) if name == "Mcp-Name" else headers.get(name)
        if header is None or (value is not None and header != value):
            problem = "is missing" if header is None else f"value {header[:100]!r} does not match the body's"
            raise RpcError(HEADER_MISMATCH, f"Header mismatch: {name} {problem}")


def decoded(header: str | None) -> str | None:
    """A header's value, which is Base64 where it begins and ends as such; None where that is broken."""
    if header is None or not (header.startswith("=?base64?") and header.endswith("?=")):
        return header
    try:
        return base64.b64decode(header[9:-2], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None


def event_of(message: dict[str, Any]) -> bytes:
    """A message as an event of a stream (text/event-stream)."""
    return b"event: message\ndata: " + msgspec.json.encode(message) + b"\n\n"

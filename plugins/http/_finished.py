"""Finished requests as records: what the plugin audit writes down, and others hand to it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from cco_sidecar import NOBODY, ApiError, Claims, Endpoint, Settings

log = logging.getLogger("cco")


class FinishedRequest(Struct, frozen=True, kw_only=True):
    """A request that was answered; ``method`` is None where it was refused before its head was read."""

    moment: float  # epoch seconds
    request_id: str
    remote: str | None  # the peer's address
    method: str | None = None
    path: str = ""  # without what looks like a token
    status: int  # 499 where the client hung up
    seconds: float = 0.0  # without those that a long poll waited
    claims: Claims = NOBODY
    error: ApiError | None = None
    reading: bool = False  # it changes nothing
    acted_on: dict[str, str] = {}  # by issue_id, agent_id, result_id and so on: what path, body and answer name


RECORDERS: weakref.WeakKeyDictionary[Settings, Callable[[FinishedRequest], None]] = weakref.WeakKeyDictionary()


def take_down(settings: Settings, request: FinishedRequest) -> None:
    """Log what was no request to an endpoint as requests are, and hand it to the audit log where there is one."""
    code = request.error.code if request.error else "-"
    facts = (request.request_id, request.method or "-", request.path or "-", request.status, code)
    log.info("%s %s %s %d 0.0 ms - %s", *facts)
    if record := RECORDERS.get(settings):
        record(request)


def ids_of(endpoint: Endpoint, answer: Any = None) -> dict[str, str]:
    """The ids that path, body and answer of a request name, and what its endpoint says beside."""
    # Tornado refuses an unknown method before it has looked at the path.
    found = dict(zip(endpoint.path_names, getattr(endpoint, "path_args", ()), strict=False))
    body = endpoint.given or {}
    found |= named(body.get("data"), "issue_id") | named(body, "issue_id", "agent_id") | (endpoint.acted_on or {})
    if isinstance(answer, bytes) and "Idempotent-Replay" in endpoint._headers:
        answer = msgspec.json.decode(answer)
    return found | named(answer, "agent_id", "event_id", "id")


def named(source: Any, *fields: str) -> dict[str, str]:
    ids = {}
    for name in fields:
        value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
        if isinstance(value, str):
            ids["result_id" if name == "id" else name] = value[:128]
    return ids

"""Cached contexts are cleared by agent type too, and all at once: ``?agent_type=`` and DELETE /api/cache/all."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

import cco_sidecar
from cco_sidecar import SPAWN, ApiError, Identifier, Route, hookimpl, iso


@hookimpl
def register_routes() -> list[Route]:
    return [
        Route("DELETE", "/api/cache/context/{issue_id}", ClearCache),
        Route("DELETE", "/api/cache/all", ClearWholeCache),
    ]


class CacheQuery(Struct):
    agent_type: Identifier | None = None


class ClearCache(cco_sidecar.ClearCache):
    """Forget the cached contexts of an issue."""

    query_type = CacheQuery

    async def respond(self, issue_id: str | None = None) -> dict[str, Any]:
        self.sidecar.tokens.check_issue(self.claims, issue_id)
        agent_type = self.query.agent_type
        entries, size = self.sidecar.contexts.clear(
            lambda key: issue_id in (None, key.issue_id) and agent_type in (None, key.agent_type)
        )
        if issue_id and not entries:
            whose = f" and {self.query.agent_type}" if self.query.agent_type else ""
            raise ApiError("REQ_002", f"No cached context for issue {issue_id}{whose}")
        return {"cleared": True, "entries_removed": entries, "bytes_freed": size, "timestamp": iso()}


class ClearWholeCache(ClearCache):
    """Forget all cached contexts."""

    permission = SPAWN

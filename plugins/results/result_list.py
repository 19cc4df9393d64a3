"""Stored results: ``GET /api/results``, a list with the newest last, and ``GET /api/results/{result_id}``."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Raw, Struct

from cco_sidecar import READ, ApiError, Endpoint, Identifier, Limit, Route, Since, hookimpl
from cco_sidecar_plugins.storage._pages import PartOfId, page


@hookimpl
def register_routes() -> list[Route]:
    return [Route("GET", "/api/results", ListResults), Route("GET", "/api/results/{result_id}", GetResult)]


class ResultQuery(Struct):
    id: PartOfId | None = None
    issue_id: Identifier | None = None
    agent_type: Identifier | None = None
    status: Literal["success", "failed", "partial"] | None = None
    since: Since = ""
    limit: Limit = 100


class ListResults(Endpoint):
    """Stored results, newest last."""

    permission = READ
    query_type = ResultQuery
    answers = {200: "ResultList"}

    async def respond(self) -> dict[str, Any]:
        query, select = self.query, "select id, body from result"
        equal = {"issue": query.issue_id, "agent_type": query.agent_type, "status": query.status}
        rows, more = page(self.sidecar.storage.read, "result", select, self.claims.project_id, query, equal, query.id)
        bodies = [Raw(row["body"]) for row in rows]
        return {"results": bodies, "next_cursor": rows[-1]["id"] if rows else None, "has_more": more}


class GetResult(Endpoint):
    """One stored result."""

    permission = READ
    answers = {200: "StoredResult"}
    problems = (404,)

    async def respond(self, result_id: str) -> bytes:
        select = "select issue, body from result where project = ? and id = ?"
        for row in self.sidecar.storage.read.rows(select, self.claims.project_id, result_id):
            self.sidecar.tokens.check_issue(self.claims, row["issue"])
            return bytes(row["body"])
        raise ApiError("REQ_002", f"No result {result_id}")

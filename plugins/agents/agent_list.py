"""Agents in a list, newest last: ``GET /api/agents``."""

from __future__ import annotations

import typing
from typing import Any, Literal

from msgspec import Struct

from cco_sidecar import FAILED_STATES, READ, AgentState, Endpoint, Identifier, Limit, Route, Since, agent_row, hookimpl
from cco_sidecar_plugins.agents.details import DetailedAgents
from cco_sidecar_plugins.storage._pages import PartOfId, page


@hookimpl
def register_routes() -> list[Route]:
    return [Route("GET", "/api/agents", ListAgents)]


GROUPS = {"active": ("starting", "running"), "completed": ("completed",), "failed": FAILED_STATES}


class AgentQuery(Struct):
    id: PartOfId | None = None
    state: AgentState | None = None
    status: Literal["active", "completed", "failed"] | None = None
    agent_type: Identifier | None = None
    issue_id: Identifier | None = None
    since: Since = ""
    limit: Limit = 100


class ListAgents(Endpoint):
    """Agents, newest last."""

    permission = READ
    query_type = AgentQuery
    answers = {200: "AgentList"}

    async def respond(self) -> dict[str, Any]:
        query, agents = self.query, typing.cast(DetailedAgents, self.sidecar.agents)
        states: list[str] | None = [query.state] if query.state else None
        if query.status:
            states = [state for state in GROUPS[query.status] if query.state in (None, state)]
        equal = {"state": states, "type": query.agent_type, "issue": query.issue_id}
        read = self.sidecar.storage.read
        found, more = page(read, "agent", read.AGENTS, self.claims.project_id, query, equal, query.id)
        rows = [agents.whole(agent_row(row)) for row in found]
        described = await agents.disk.run(lambda: [agents.describe(row) for row in rows])
        return {"agents": described, "next_cursor": rows[-1]["id"] if rows else None, "has_more": more}

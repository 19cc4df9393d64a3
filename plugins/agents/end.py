"""Agents are ended by order (``DELETE /api/agents/ID``); an order that a crash cut off is carried out after it."""

from __future__ import annotations

import asyncio
import logging
import typing
from typing import Any

from msgspec import Struct

from cco_sidecar import SPAWN, AgentEndpoint, Agents, Route, Running, StorageError, hookimpl, iso, one_line

log = logging.getLogger("cco")


@hookimpl(trylast=True)  # so that the agents of the plugin nats, which ask other sidecars first, derive from these
def part_class(base: type) -> type | None:
    return type("EndedAgents", (EndedAgents, base), {}) if issubclass(base, Agents) else None


@hookimpl
def register_routes() -> list[Route]:
    return [Route("DELETE", "/api/agents/{agent_id}", EndAgent)]


class EndQuery(Struct):
    force: bool = False


class EndAgent(AgentEndpoint):
    """Order an agent's end: SIGTERM to its whole tree, grace, SIGKILL."""

    permission = SPAWN
    query_type = EndQuery
    status = 202
    failure = "AGT_001"
    answers = {202: "AgentEnding"}

    async def respond(self, agent_id: str) -> dict[str, Any]:
        row = self.find(agent_id)
        agents = typing.cast(EndedAgents, self.sidecar.agents)
        ending = not row["ended"] and await agents.end(agent_id, force=self.query.force)
        return {"agent_id": agent_id, "ending": ending, "state": row["state"], "timestamp": iso()}


class EndedAgents(Agents):
    """Ends agents by order. A crash does not forget that: ``ordered`` in the agent's row says so, where that can be
    written.
    """

    NOTING_SECONDS = 2.0

    async def end(self, agent_id: str, *, force: bool = False) -> bool:
        """Order an agent's end, at once with ``force``; False where it has ended."""
        running = self.active.get(agent_id)
        if running is None:
            return False
        running.grace = 0.0 if force else running.grace
        if not running.ended_as:
            try:
                async with asyncio.timeout(self.NOTING_SECONDS):
                    await self.storage.write(lambda records: records.add_outcome(agent_id, ordered=1))
            except (StorageError, OSError) as error:  # it may be this agent that fills the disk
                problem = one_line(error) or "it takes long"
                log.warning("agent %s is ended, which cannot be written down now: %s", agent_id, problem)
            finally:  # also where the request is cut off: the order may be in the ledger by then
                running.end("killed")
        return True

    async def begin_watch(self, running: Running) -> None:
        if running.row.get("ordered"):  # before this start: then it has ended by that, whatever is known of how
            running.ended_as = "killed"
            running.ending.set()
        await super().begin_watch(running)

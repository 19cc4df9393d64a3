"""Asks plugins about agents that end: why one failed or cannot work, and a result (`agent_failure`, `agent_result`)."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from cco_sidecar import WRITE, AgentEnds, ApiError, Running, agent_facts, hookimpl, one_line, redact
from cco_sidecar_plugins._settings import PluginSettings

log = logging.getLogger("cco")


@hookimpl
def agent_part(base: type) -> type | None:
    return type("AskedEnds", (AskedEnds, base), {}) if issubclass(base, AgentEnds) else None


class AskedEnds(AgentEnds):
    """The first answer that a plugin gives is taken."""

    settings: PluginSettings

    async def failure(self, running: Running, *, ended: bool) -> str | None:
        row = running.row
        if not self.hooks.implementations("agent_failure"):
            return None
        if not ended:  # asked whenever it has written something
            written = await self.disk.run(self.processes.output(row["id"]).size)
            if written == running.heard:
                return None
            running.heard = written
        try:
            reason = await self._ask("agent_failure", row, "output")
        except TimeoutError:
            return None
        return redact(" ".join(reason.split()))[0][:500] if reason else None

    async def speak_for(self, row: dict[str, Any]) -> None:
        """If the agent could store a result and did not, and a plugin has one. Who was killed meanwhile finds it."""
        stored = self.ledger.find(row["project"], row["id"])["result_id"]
        if stored or self.settings.no_synthesis or WRITE not in row["permissions"]:
            return
        others = self.ledger.storage.read.others_since(row["project"], row["id"], row["started"])
        folder, root = self.settings.storage / "agents" / row["id"], self.settings.root
        facts = {"folder": str(folder), "root": str(root), "alone": not others}
        try:
            if (result := await self._ask("agent_result", row, "lines", **facts)) is not None:
                body = {name: agent_facts(row)[name] for name in ("agent_id", "agent_type", "issue_id")}
                body |= {"project_id": row["project"], "source": "sidecar", "result": msgspec.to_builtins(result)}
                await self.results.store(body, None)
        except (ApiError, OSError) as error:
            log.error("agent %s: no result can be stored in its name: %s", row["id"], one_line(error))

    async def _ask(self, hook: str, row: dict[str, Any], name: str, **facts: Any) -> Any:
        """The first answer about an agent, whose last lines are asked by ``name``. Raises TimeoutError."""
        facts |= {"agent": agent_facts(row), name: await self.disk.run(self.processes.output(row["id"]).tail, 100)}
        return await self.hooks.pool.run(self.hooks.first, hook, **facts)

"""Tells plugins of agents that start (``agent_starting``), and asks about those that end: why one failed or cannot
work, and a result (``agent_failure``, ``agent_result``).
"""

from __future__ import annotations

import collections
import logging
import time
import weakref
from typing import Any

import msgspec

from cco_sidecar import (
    WRITE,
    AgentCommand,
    AgentLaunch,
    Agents,
    ApiError,
    Launcher,
    Running,
    agent_facts,
    hookimpl,
    one_line,
    redact,
)
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.agents.keeper import output_of
from cco_sidecar_plugins.results._latest import latest_result

log = logging.getLogger("cco")

# whether another agent had a process at some time since then
OTHERS = (
    "select 1 from agent where project = ?1 and id != ?2 and pid is not null and (ended is null or ended > ?3) limit 1"
)


@hookimpl
def part_class(base: type) -> type | None:
    if issubclass(base, Launcher):
        return type("TellingLauncher", (TellingLauncher, base), {})
    return type("AskingAgents", (AskingAgents, base), {}) if issubclass(base, Agents) else None


class TellingLauncher(Launcher):
    def _prepare(self, launch: AgentLaunch, files: dict[str, bytes]) -> AgentCommand:
        command = super()._prepare(launch, files)
        collections.deque(self.hooks.ask("agent_starting", launch=launch, root=str(self.settings.root)), maxlen=0)
        return command


class AskingAgents(Agents):
    """The first answer that a plugin gives is taken."""

    settings: PluginSettings

    PROBATION = 120.0  # seconds in which plugins may find that an agent cannot work

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        # when its output was last written, as plugins were asked about it
        self._heard: weakref.WeakKeyDictionary[Running, float | None] = weakref.WeakKeyDictionary()

    async def tend(self, running: Running) -> None:
        await super().tend(running)
        if time.monotonic() < running.began + self.PROBATION and self.hooks.implementations["agent_failure"]:
            written = await self.disk.run(lambda: output_of(self, running.row["id"]).last_written())
            if written != self._heard.get(running):
                self._heard[running] = written
                if reason := await self._failure(running.row):
                    running.row["reason"] = reason
                    running.ending.set()

    async def judge(self, running: Running) -> None:
        await super().judge(running)
        row = running.row
        if running.ended_as in (None, "timeout") and (reason := row["reason"] or await self._failure(row)):
            row |= {"state": running.ended_as or "failed", "reason": reason}
        if row["state"] == "completed" and row["exit_code"] == 0:
            await self._speak_for(row)

    async def _failure(self, row: dict[str, Any]) -> str | None:
        """Why an agent that has ended by itself failed, or one that began a moment ago cannot work; one line."""
        if not self.hooks.implementations["agent_failure"]:
            return None
        try:
            reason = await self._ask("agent_failure", row, "output")
        except TimeoutError:
            return None
        return redact(" ".join(reason.split()))[0][:500] if reason else None

    async def _speak_for(self, row: dict[str, Any]) -> None:
        """Store a result in the name of an agent that could store one and did not, where a plugin has one. Who was
        killed meanwhile finds it.
        """
        stored = latest_result(self.storage.read, row["project"], row["id"])["result_id"]
        if stored or self.settings.no_synthesis or WRITE not in row["permissions"]:
            return
        others = self.storage.read.one(OTHERS, row["project"], row["id"], row["started"])
        facts = {"root": str(self.settings.root), "alone": not others}
        try:
            if (result := await self._ask("agent_result", row, "lines", **facts)) is not None:
                made = msgspec.to_builtins(result)
                if refused := row.get("refused"):
                    made["errors"] = [f"its result was refused, {refused}", *made.get("errors", [])]
                body = {name: agent_facts(row)[name] for name in ("agent_id", "agent_type", "issue_id")}
                body |= {"project_id": row["project"], "source": "sidecar", "result": made}
                await self.results.store(body)
        except (ApiError, OSError) as error:
            log.error("agent %s: no result can be stored in its name: %s", row["id"], one_line(error))

    async def _ask(self, hook: str, row: dict[str, Any], name: str, **facts: Any) -> Any:
        """The first answer about an agent, whose last lines are asked by ``name``. Raises TimeoutError."""
        stored = latest_result(self.storage.read, row["project"], row["id"])["result_id"]
        facts |= {"agent": agent_facts(row) | {"result_id": stored}}
        facts |= {"folder": str(self.settings.storage / "agents" / row["id"])}
        facts |= {name: await self.disk.run(lambda: output_of(self, row["id"]).tail(100))}
        return await self.hooks.pool.run(self.hooks.first, hook, **facts)

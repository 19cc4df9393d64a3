"""The agent types of the running service, with the program that runs each: ``GET /api/agent-types``."""

from __future__ import annotations

import contextlib
import importlib
import typing

from msgspec import Struct

from cco_sidecar import CATEGORIES, SPAWN, AgentTypes, Endpoint, Route, hookimpl
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.agents._agent_types import BUILT_IN
from cco_sidecar_plugins.agents.launchers import default_program


@hookimpl
def register_routes() -> list[Route]:
    return [Route("GET", "/api/agent-types", ListAgentTypes)]


class TypeFacts(Struct, rename={"source": "from"}):
    """An agent type: what its agents may, and the first word of the command that runs them, where there is one."""

    agent_type: str
    category: str
    permissions: list[str]
    per_minute: int | None
    source: str
    program: str | None


class AgentTypeList(Struct):
    """The agent types; ``default_program`` runs those without a command of their own, and is ``configured`` where it is
    not just the first known one on PATH.
    """

    agent_types: list[TypeFacts]
    default_program: str | None
    configured: bool


class ListAgentTypes(Endpoint):
    """The agent types of this service: where each comes from, what its agents may and which program runs them."""

    permission = SPAWN
    answers = {200: AgentTypeList}

    async def respond(self) -> AgentTypeList:
        """Plugins are asked again, since a repository may have new agents; what is known stays as it is."""
        sidecar, settings = self.sidecar, typing.cast(PluginSettings, self.sidecar.settings)
        found = await sidecar.hooks.pool.run(AgentTypes, sidecar.hooks, settings)
        return await sidecar.agents.disk.run(type_list, found.categories | sidecar.agent_types.categories, settings)


def type_list(types: dict[str, str], settings: PluginSettings) -> AgentTypeList:
    """By category, then by name; without those of people. Blocks."""
    sources = dict.fromkeys(BUILT_IN, "built in") | dict.fromkeys(settings.agent_types, "settings")
    with contextlib.suppress(ImportError):  # its file may be gone
        discovery = importlib.import_module("cco_sidecar_plugins.agents.discovery")
        sources |= {name: agent.place for name, agent in discovery.discover(settings.root).agents.items()}
    default, commands = default_program(settings), settings.agent_commands
    rows = [
        TypeFacts(name, category, list(role.permissions), role.per_minute, sources.get(name, "a plugin"),
                  commands[name][0] if name in commands else default)
        for category, role in CATEGORIES.items() for name in sorted(types)
        if types[name] == category and not role.people
    ]  # fmt: skip
    return AgentTypeList(rows, default, settings.agent_command is not None)

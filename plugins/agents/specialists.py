"""More agent types than one for each language and the chief roles: of frameworks, platforms, data, research and design;
those of ``--agent-types``; one that is misspelt is refused with the nearest that is known; and plugins are asked again
for one that is not known.

What a repository's own agents or another plugin call by one of these names keeps the category that it has here.
"""

from cco_sidecar import AgentTypes, Hooks, Settings, hookimpl
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins._words import did_you_mean
from cco_sidecar_plugins.agents._agent_types import MORE_TYPES


@hookimpl(trylast=True)  # the last answer counts
def register_agent_types(settings: PluginSettings) -> dict[str, str]:
    return MORE_TYPES | settings.agent_types


@hookimpl
def part_class(base: type) -> type | None:
    return type("NearestTypes", (NearestTypes, base), {}) if issubclass(base, AgentTypes) else None


class NearestTypes(AgentTypes):
    def __init__(self, hooks: Hooks, settings: Settings) -> None:
        super().__init__(hooks, settings)
        self._asked = hooks, settings

    async def find(self, agent_type: str, status: int = 400) -> str:
        """Plugins are asked again where a type is not known: a repository may have a new agent."""
        if agent_type not in self.categories:
            found = await self._asked[0].pool.run(AgentTypes, *self._asked)
            self.categories = found.categories | self.categories  # what is known stays as it is
        return await super().find(agent_type, status)

    def problem(self, agent_type: str) -> str:
        known = agent_type in self.categories
        return super().problem(agent_type) + ("" if known else did_you_mean(agent_type, sorted(self.categories)))

"""More agent types than one for each language and the chief roles: of frameworks, platforms, data, research and design;
those of ``--agent-types``; and one that is misspelt is refused with the nearest that is known.

What a repository's own agents or another plugin call by one of these names keeps the category that it has here.
"""

from cco_sidecar import AgentTypes, hookimpl
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
    def problem(self, agent_type: str) -> str:
        known = agent_type in self.categories
        return super().problem(agent_type) + ("" if known else did_you_mean(agent_type, sorted(self.categories)))

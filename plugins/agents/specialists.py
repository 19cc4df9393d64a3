"""More agent types than one for each language and the chief roles: of frameworks, platforms, data, research and design;
those of ``--agent-types``; one that is misspelt is refused with the nearest that is known; and plugins are asked again
for one that is not known.

What a repository's own agents or another plugin call by one of these names keeps the category that it has here.
"""

from collections.abc import Iterable

from cco_sidecar import AGENT_TYPES, AgentTypes, ApiError, Hooks, Settings, hookimpl
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins._words import did_you_mean, nearest
from cco_sidecar_plugins.agents._agent_types import MORE_TYPES, categories_of


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
        """Off the loop where plugins are to be asked again."""
        if agent_type in self.categories:
            return self.category(agent_type, status)
        return await self._asked[0].pool.run(self.category, agent_type, status)

    def category(self, agent_type: str, status: int = 400, *, people: bool = False) -> str:
        """Plugins are asked again where a type is not known, which blocks: a repository may have a new agent. On the
        loop only known ones are asked for. The type that may have been meant is told: for one word a type that has it
        as a part, our own before others.
        """
        if agent_type not in self.categories:
            self.categories = AgentTypes(*self._asked).categories | self.categories  # what is known stays as it is
        try:
            return super().category(agent_type, status, people=people)
        except ApiError as refused:
            meant = "" if agent_type in self.categories else nearest_type(agent_type, self.categories)
            problem = refused.message + meant
            raise ApiError(refused.code, problem, status=refused.status, details=refused.details) from None


def nearest_type(agent_type: str, names: Iterable[str]) -> str:
    """The end of a message that refuses ``agent_type``: the nearest, for one word up to three with such a part, own
    first; where none is near, what lists them.
    """
    known = sorted(names, key=lambda name: (name not in OWN_TYPES, name))
    part = nearest(agent_type, sorted({part for name in known for part in name.split("-")}))
    sharing = [name for name in known if any(alike(part, other) for other in name.split("-"))]
    if "-" not in agent_type and 0 < len(sharing) < 10:  # more would share "specialist"
        *others, last = sharing[:3]
        return f", did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
    return did_you_mean(agent_type, known) or "; `cco agent types` lists them"


def alike(part: str, other: str) -> bool:
    """Whether two parts of names begin alike, as test and tester do."""
    shorter, longer = sorted((part, other), key=len)
    return part == other or (len(shorter) >= 4 and longer.startswith(shorter))


OWN_TYPES = categories_of(AGENT_TYPES)

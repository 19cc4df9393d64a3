"""More agent types than one for each language and the chief roles: of frameworks, platforms, data, research and design.

What a repository's own agents or another plugin call by one of these names keeps the category that it has here.
"""

from cco_sidecar import hookimpl
from cco_sidecar_plugins.agents._agent_types import MORE_TYPES


@hookimpl(trylast=True)  # the last answer counts
def register_agent_types() -> dict[str, str]:
    return MORE_TYPES

"""Events, results and agents of one project on many machines: a log on NATS JetStream, of which each sidecar keeps a
replica that it reads.
"""

from __future__ import annotations

from cco_sidecar import Agents, Endpoint, Records, StartError, Storage, hookimpl
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.cluster._options import log_options


@hookimpl(tryfirst=True)
def part_class(settings: PluginSettings, base: type) -> type | None:
    if not settings.backend or not issubclass(base, (Storage, Records, Agents, Endpoint)):
        return None
    if issubclass(base, Storage):
        return storage_class(settings, base)
    if issubclass(base, Records):
        from cco_sidecar_plugins.cluster._replica import Replica

        return type("Replica", (Replica, base), {})
    if issubclass(base, Agents):
        from cco_sidecar_plugins.cluster._owners import OwningAgents

        return type("OwningAgents", (OwningAgents, base), {})
    from cco_sidecar_plugins.cluster._replicated import CatchingUp

    return type("CatchingUp", (CatchingUp, base), {})


def storage_class(settings: PluginSettings, base: type[Storage]) -> type[Storage]:
    options = log_options(settings)
    try:  # nothing of it is imported where it is not used
        from cco_sidecar_plugins.cluster._replicated import ReplicatedStorage
    except ModuleNotFoundError as error:
        needed = f"needs the package {error.name}: pip install '.[cluster]', or nats-py"
        raise StartError(f"{settings.where('backend')}: {needed}") from None
    return type("ReplicatedStorage", (ReplicatedStorage, base), {"options": options})

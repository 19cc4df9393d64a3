"""How deep agents may spawn agents, and how many there may be on one issue: `--max-depth`, `--max-agents-per-issue`."""

from __future__ import annotations

from typing import Any

from cco_sidecar import Agents, ApiError, Records, hookimpl
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins._words import counted

ON_ISSUE = (  # those that never had a process do not count
    "select count(*) from agent where project = ? and issue = ? and not (state = 'failed' and pid is null)"
)


@hookimpl
def part_class(base: type) -> type | None:
    return type("LimitedAgents", (LimitedAgents, base), {}) if issubclass(base, Agents) else None


class LimitedAgents(Agents):
    """Counts from the ledger, whatever who spawns says."""

    settings: PluginSettings

    def admit(self, row: dict[str, Any], records: Records) -> dict[str, Any]:
        parent = records.agent(row["project"], row["parent"])  # None: no agent of ours asks
        row["depth"] = 1 + (parent["depth"] or 1 if parent else 0)
        if row["depth"] > self.settings.max_depth:
            who = f"{row['parent']} is an agent of depth {row['depth'] - 1}"
            raise ApiError("AGT_003", f"{who}, --max-depth allows it no agents of its own")
        (spawned,) = records.rows(ON_ISSUE, row["project"], row["issue"])[0]
        if spawned >= self.settings.max_agents_per_issue:
            many = f"{row['issue']} has had {counted(spawned, 'agent')}"
            raise ApiError("AGT_003", f"{many}, --max-agents-per-issue allows no more")
        return super().admit(row, records)

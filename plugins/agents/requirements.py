"""The sections that ``context_requirements`` names are all that a spawned agent's context has; a name that is none is
refused.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cco_sidecar import ApiError, Launcher, Running, hookimpl
from cco_sidecar_plugins.context._sections import measured

ALIASES = {
    "previous_decisions": "previous_agent_outputs", "previous_results": "previous_agent_outputs",
    "git_history": "git_context", "dependencies": "metadata", "project_metadata": "metadata",
} | dict.fromkeys(
    ("all_files", "source_files", "test_files", "security_policies", "dependency_manifests"), "relevant_files"
)  # fmt: skip


@hookimpl
def part_class(base: type) -> type | None:
    return type("RequiredLauncher", (RequiredLauncher, base), {}) if issubclass(base, Launcher) else None


class RequiredLauncher(Launcher):
    async def files(self, running: Running, body: dict[str, Any]) -> dict[str, bytes]:
        """Raises REQ_001 where a name is neither a section of the context nor an alias."""
        files = await super().files(running, body)
        if names := body.get("context_requirements"):
            files["context.json"] = required(files["context.json"], names)
        return files


def required(content: bytes, names: list[str]) -> bytes:
    """The context with only the sections that were asked for. Raises REQ_001."""
    context = msgspec.json.decode(content)
    sections, wanted = context["context"], set()
    for position, name in enumerate(names):
        wanted.add(section := ALIASES.get(name, name))
        if section not in sections:
            path, known = f"context_requirements[{position}]", ", ".join(sorted({*sections, *ALIASES}))
            problem = f"{name[:128]!r} is not a context section - at `$.{path}`; known are {known}"
            raise ApiError("REQ_001", problem, details={"path": path})
    if "relevant_files" not in wanted:
        sections["metadata"]["redactions"] -= sum(file.get("redactions", 0) for file in sections["relevant_files"])
    context["context"] = {name: value for name, value in sections.items() if name in wanted}
    return msgspec.json.encode(measured(context))

"""The plugins of the running service: ``GET /api/plugins``."""

from __future__ import annotations

from typing import Any

from cco_sidecar import SPAWN, Endpoint, Route, hookimpl


@hookimpl
def register_routes() -> list[Route]:
    return [Route("GET", "/api/plugins", GetPlugins)]


class GetPlugins(Endpoint):
    """The plugins of this service: which are in use, which are not and why, and what went wrong last in each."""

    permission = SPAWN
    answers = {200: "PluginList"}

    async def respond(self) -> dict[str, Any]:
        return {"plugins": self.sidecar.hooks.loaded}

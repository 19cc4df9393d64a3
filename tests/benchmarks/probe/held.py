"""A route that says for how long callbacks kept the event loop from others: ``GET /bench/held``."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from cco_sidecar import Endpoint, Route, hookimpl

INTERVAL = 0.001  # seconds between two looks; a look costs some 5 microseconds


@hookimpl
def register_routes() -> list[Route]:
    return [Route("GET", "/bench/held", Held)]


class Held(Endpoint):
    """Milliseconds by which each look since the last request came late. The first request begins, ?end=1 ends."""

    public = True
    late: list[float] = []  # of the one service in this process
    timer: asyncio.TimerHandle | None = None

    async def respond(self) -> dict[str, Any]:
        found, Held.late = Held.late, []
        if Held.timer:
            Held.timer.cancel()
            Held.timer = None
        if not self.request.query:
            look(time.perf_counter())
        return {"late_ms": found}


def look(before: float) -> None:
    now = time.perf_counter()
    Held.late.append(round(max(0.0, now - before - INTERVAL) * 1000, 2))
    Held.timer = asyncio.get_running_loop().call_later(INTERVAL, look, now)

"""A route that says for how long the event loop let others wait: ``GET /bench/held``."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from cco_sidecar import Endpoint, Route, hookimpl

INTERVAL = 0.001  # seconds between two looks; a look costs some 6 microseconds
SCHEDULE = Path("/proc/thread-self/schedstat")  # of Linux


@hookimpl
def register_routes() -> list[Route]:
    return [Route("GET", "/bench/held", Held)]


class Held(Endpoint):
    """Milliseconds by which each look since the last request came late, less those for which the system gave the
    processor to other processes, such as the clients. The first request begins, ?end=1 ends.
    """

    public = True
    late: list[float] = []  # of the one service in this process
    timer: asyncio.TimerHandle | None = None
    schedule = -1  # the open file of the loop's thread

    async def respond(self) -> dict[str, Any]:
        found, Held.late = Held.late, []
        if Held.timer:
            Held.timer.cancel()
            Held.timer = None
        if Held.schedule < 0 and SCHEDULE.exists():
            Held.schedule = os.open(SCHEDULE, os.O_RDONLY)
        if not self.request.query:
            look(time.perf_counter(), starved())
        return {"late_ms": found}


def look(before: float, starved_before: float) -> None:
    now, starved_now = time.perf_counter(), starved()
    late = now - before - INTERVAL - (starved_now - starved_before)
    Held.late.append(round(max(0.0, late) * 1000, 2))
    Held.timer = asyncio.get_running_loop().call_later(INTERVAL, look, now, starved_now)


def starved() -> float:
    """Seconds for which the loop's thread could have run and had no processor; 0 where the system does not say."""
    return int(os.pread(Held.schedule, 100, 0).split()[1]) / 1e9 if Held.schedule >= 0 else 0.0

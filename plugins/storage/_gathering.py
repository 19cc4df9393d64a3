"""Writes that are handed to the writer thread together: those of one turn of the loop, and with them what nobody waits
for, after a moment.
"""

from __future__ import annotations

import asyncio
from typing import Any

from cco_sidecar import Job, Records, Settings, Storage, Write


class GatheringStorage(Storage):
    """Wakes the writer thread once for what is written in a turn of the loop."""

    BEHIND_SECONDS = 0.02  # after which is written what nobody waits for

    def __init__(self, settings: Settings, records: type[Records]) -> None:
        super().__init__(settings, records)
        self._gathered: list[Write] = []
        self._due = False  # at the end of this turn

    def _put(self, job: Job, behind: bool = False) -> asyncio.Future[Any]:
        future = self._loop.create_future()
        self._gathered.append((job, future))
        if behind:
            self._loop.call_later(self.BEHIND_SECONDS, self._hand_over)
        elif not self._due:
            self._due = True
            self._loop.call_soon(self._hand_over)
        return future

    def _hand_over(self) -> None:
        gathered, self._gathered, self._due = self._gathered, [], False
        for write in gathered:
            self._queue.put(write)

    def close(self) -> None:
        self._hand_over()
        super().close()

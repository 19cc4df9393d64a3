"""Thousands of polls at once: those that one event wakes share one search, find the newest events in memory, and go on
by portions, so that others get their turn; who polls without end leaves them time, too. What the polls of a turn have
changed is written down together.
"""

from __future__ import annotations

import asyncio
import collections
import gc
import itertools
import time
from collections.abc import Coroutine, Iterable
from typing import Any

import msgspec

from cco_sidecar import Channel, Claims, EventBus, Filter, HangUp, NewEvent, Poll, Row, WaitQuery, Waking, hookimpl
from cco_sidecar_plugins._turns import Turns


@hookimpl(tryfirst=True)  # before the log is searched for what a filter requires, the newest events are looked at
def part_class(base: type) -> type | None:
    return type("CrowdedBus", (CrowdedBus, base), {}) if issubclass(base, EventBus) else None


class CrowdedBus(EventBus):
    PORTION = 400  # polls that are woken in one turn: the more turns it takes, the later Tornado's server answers all
    SHARED_SECONDS = 0.05  # how long polls share one search; no longer, as events expire
    REST_SECONDS = 0.002  # after which a poll without a time-out says that there is nothing: who asks without end waits
    # Python searches for garbage among new objects once so many were made and not freed, among those that outlived this
    # after so many of these searches, and among all after so many of those. All that parked polls hold is gone through
    # each time, while the loop stands still: with Python's own numbers (700, 10, 10) that was a sixth of the work of
    # thousands of polls. The second takes 6 ms for its 20,000 objects; for 110,000 it took 30 ms.
    SEARCHES = 5_000, 2, 100
    SMALL = 16 * 1024  # bytes of an event that is kept in memory while it is one of the last STEP

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        gc.set_threshold(*self.SEARCHES)
        self._turns, self._wakes = Turns(self.PORTION), 0
        self._due: dict[Waking, int | None] = {}  # polls, and the numbers of the events that wake them
        self._recent: collections.deque[dict[str, Any]] = collections.deque(maxlen=self.STEP)  # without a gap
        # The last search that found something, and the last that did not: who is answered soon parks again.
        self._latest: dict[bool, tuple[Any, float, Poll]] = {}
        self._answered: list[Poll] = []  # in this turn of the loop

    def wake_waiters(self, event: NewEvent, seq: int) -> None:
        self._wakes += 1
        if len(event.body) > self.SMALL or (self._recent and self._recent[-1]["seq"] != seq - 1):
            self._recent.clear()
        if len(event.body) <= self.SMALL:
            self._recent.append(msgspec.structs.asdict(event) | {"seq": seq, "delivered": 0})
        super().wake_waiters(event, seq)

    def wake(self, parked: Iterable[Waking], seq: int | None) -> None:
        waiting = bool(self._due)
        for future in parked:
            self._due.setdefault(future, seq)  # what several events wake has one turn
        if not waiting:
            self._wake_due()

    def _wake_due(self) -> None:
        """As many as this turn has room for, in order; the others in the next ones."""
        for future in list(itertools.islice(self._due, self.PORTION)):
            if not self._turns.has_room():
                break
            super().wake((future,), self._due.pop(future))
        if self._due:
            self._turns.do(self._wake_due)

    def wait(
        self, claims: Claims, event_type: str, query: WaitQuery, hang_up: HangUp
    ) -> Coroutine[Any, Any, Poll]:  # fmt: skip
        polling = super().wait(claims, event_type, query, hang_up)
        return polling if query.timeout else self._rested(polling)

    async def _rested(self, polling: Coroutine[Any, Any, Poll]) -> Poll:
        poll = await polling
        if poll.rows:
            return poll
        began = time.monotonic()
        await asyncio.sleep(self.REST_SECONDS)  # a timer may be early
        return msgspec.structs.replace(poll, parked=time.monotonic() - began)

    async def search(self, channel: Channel, filter: Filter, after: int, limit: int) -> Poll:
        asked, now = (channel, filter.text, after, limit, self._wakes), time.monotonic()
        for before, moment, found in self._latest.values():
            if before == asked and now - moment < self.SHARED_SECONDS:
                return found
        found = await super().search(channel, filter, after, limit)
        if asked[-1] == self._wakes:
            self._latest[bool(found.rows)] = (asked, now, found)
        return found

    def step(self, channel: Channel, filter: Filter, after: int) -> tuple[list[Row], int]:
        head, now = self._storage.head, time.time()
        if after >= head:
            return [], after
        if not self._recent or self._recent[-1]["seq"] != head or after < self._recent[0]["seq"] - 1:
            return super().step(channel, filter, after)
        project, event_type = channel
        newer = itertools.takewhile(lambda row: row["seq"] > after, reversed(self._recent))
        rows = [row for row in newer if row["project"] == project and event_type in (row["type"], "*")]
        return [row for row in reversed(rows) if row["expires"] > now], head

    def note(self, polls: list[Poll]) -> None:
        """What the polls of a turn have changed is written down together."""
        if not self._answered:
            asyncio.get_running_loop().call_soon(self._note_all)
        self._answered += polls

    def _note_all(self) -> None:
        polls, self._answered = self._answered, []
        super().note(polls)

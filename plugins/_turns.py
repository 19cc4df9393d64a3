"""What comes in a crowd is done by portions, so that others get their turn on the loop, or once for all of it.

Of cco_sidecar: what does not say so counts as the repository's own where the plugins are copied into one.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Turns:
    """Does in each turn of the loop only so much, and what is left in the next ones, in order."""

    AT_ONCE = 50

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once, self._done, self._left = at_once, 0, collections.deque[Callable[[], Any]]()

    def do(self, call: Callable[[], Any]) -> None:
        """Call now or, where this turn has done enough, in a later one."""
        if not self.has_room():
            self._left.append(call)
        else:
            call()

    def has_room(self) -> bool:
        """Whether the caller may do one more thing in this turn, which is counted then."""
        if not self._done:
            asyncio.get_running_loop().call_soon(self._go_on)
        room = self._done < self._at_once and not self._left
        self._done += room
        return room

    def _go_on(self) -> None:
        self._done = min(len(self._left), self._at_once)
        if self._done:
            asyncio.get_running_loop().call_soon(self._go_on)
        for _ in range(self._done):
            self._left.popleft()()


def heard(done: asyncio.Future[Any]) -> None:
    """Take note of how ``done`` ended, since asyncio logs an error that nobody asked for."""
    if not done.cancelled():
        done.exception()


class Shared(Generic[T]):
    """What was found last, for some seconds. All who come while it is looked for wait for the one who looks."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._found: asyncio.Future[T] | None = None
        self.until = 0.0  # monotonic; then it is looked for anew

    async def get(self, look: Callable[[], Awaitable[T]]) -> T:
        """Raises what ``look`` raises, and then the next one looks. Who gives up waiting does not end the look."""
        now = time.monotonic()
        if self._found is None or (self._found.done() and now > self.until):
            self.until, self._found = now + self._seconds, asyncio.ensure_future(self._looked(look))
            self._found.add_done_callback(heard)  # also where all who asked have gone
        return self._found.result() if self._found.done() else await asyncio.shield(self._found)

    async def _looked(self, look: Callable[[], Awaitable[T]]) -> T:
        try:
            return await look()
        except BaseException:
            self.until = 0.0
            raise

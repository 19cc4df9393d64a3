"""Requests that are served together, after all of them had come: what is proven for one holds for the others.

Of cco_sidecar: what does not say so counts as the repository's own where the plugins are copied into one.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable

from cco_sidecar_plugins._turns import Turns


class Turn:
    """Their time: nothing may be read from a client in this context, and nothing awaited."""

    over = False  # true from its end on, also for tasks that were begun in it

    def __enter__(self) -> None:
        self._before = CURRENT.set(self)

    def __exit__(self, *_: object) -> None:
        self.over = True
        CURRENT.reset(self._before)


CURRENT: contextvars.ContextVar[Turn | None] = contextvars.ContextVar("turn", default=None)


def current() -> Turn | None:
    """The turn that the caller is served in; None outside of one."""
    turn = CURRENT.get()
    return turn if turn and not turn.over else None


class Gathered:
    """Does in one turn what was given to it in one step of the event loop."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def do_soon(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        if len(self._calls) == 1:
            asyncio.get_running_loop().call_soon(self._do_all)

    def _do_all(self) -> None:
        calls, self._calls = self._calls[: Turns.AT_ONCE], self._calls[Turns.AT_ONCE :]
        if self._calls:
            asyncio.get_running_loop().call_soon(self._do_all)
        with Turn():
            for call in calls:
                call()

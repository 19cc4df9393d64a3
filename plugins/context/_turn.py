"""Requests that are served together, after all of them had come: what is proven for one holds for the others.

Of cco_sidecar: what does not say so counts as the repository's own where the plugins are copied into one.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator


class Turn:
    """Their time; ``over`` from its end on, also for tasks that were begun in it."""

    over = False


CURRENT: contextvars.ContextVar[Turn | None] = contextvars.ContextVar("turn", default=None)


def current() -> Turn | None:
    """The turn that the caller is served in; None outside of one."""
    turn = CURRENT.get()
    return turn if turn and not turn.over else None


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Nothing may be read from a client in this context, and nothing awaited."""
    ours = Turn()
    before = CURRENT.set(ours)
    try:
        yield
    finally:
        ours.over = True
        CURRENT.reset(before)

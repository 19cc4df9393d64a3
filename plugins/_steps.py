"""Coroutines that often need not wait: their first step in place, and the rest in a task, or where it was begun.

Of cco_sidecar: what does not say so counts as the repository's own where the plugins are copied into one.
"""

from __future__ import annotations

import asyncio
import functools
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any


async def go_on(work: Coroutine[Any, Any, Any], waiting: Any) -> Any:
    """What is left of a coroutine whose first step was made, and gave what it waits for."""
    return await rest_of(work, waiting)


@types.coroutine
def rest_of(work: Coroutine[Any, Any, Any], waiting: Any) -> Generator[Any, None, Any]:
    while True:
        try:
            yield waiting
        except BaseException as error:
            step: Callable[[], Any] = functools.partial(work.throw, error)
        else:
            step = functools.partial(work.send, None)
        try:
            waiting = step()
        except StopIteration as done:
            return done.value


def begin(
    work: Coroutine[Any, Any, None], rest: Callable[..., Coroutine[Any, Any, None]] = go_on
) -> asyncio.Task[None] | None:
    """Do as much of ``work`` as needs no waiting; the task of the rest. Nothing before that may need a task."""
    try:
        waiting = work.send(None)
    except StopIteration:
        return None
    return asyncio.get_running_loop().create_task(rest(work, waiting))

"""Lets contexts make ready, after the start, what requests would wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from cco_sidecar import Contexts, FileFact

Listener = Callable[[list[FileFact]], object]


class PreparedContexts(Contexts):
    """Plugins derive from this; each does its part in ``prepare``."""

    _starting: asyncio.Future[Any]

    def start(self) -> None:
        super().start()
        self._starting = asyncio.gather(self.prepare(), return_exceptions=True)

    async def close(self) -> None:
        await asyncio.wait([self._starting], timeout=1)
        await super().close()

    async def prepare(self) -> None:
        """Begun at the start, which does not wait for it."""

    def beside(self) -> Listener:
        """A look at the project begins, on the loop. What is given is told, in the look's thread, which files edits
        changed, before git is asked what they changed.
        """
        return lambda edited: None

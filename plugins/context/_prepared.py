"""Lets contexts make ready, after the start, what requests would wait for."""

from __future__ import annotations

import asyncio
from typing import Any

from cco_sidecar import Contexts, FileFact


class PreparedContexts(Contexts):
    """Plugins derive from this; each does its part in ``prepare``."""

    _starting: asyncio.Future[Any]
    _loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        super().start()
        self._loop = asyncio.get_running_loop()
        self._starting = asyncio.gather(self.prepare(), return_exceptions=True)

    async def close(self) -> None:
        await asyncio.wait([self._starting], timeout=1)
        await super().close()

    async def prepare(self) -> None:
        """Begun at the start, which does not wait for it."""

    def edited(self, files: list[FileFact]) -> None:
        """Told, in a look's thread, which known files edits changed, before git is asked what they changed."""

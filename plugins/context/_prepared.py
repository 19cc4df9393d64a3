"""Lets contexts make ready, after the start, what requests would wait for."""

from __future__ import annotations

import asyncio
from typing import Any

from cco_sidecar import Contexts


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

"""Hears of changes in a folder, by inotify on Linux."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path


class FolderChanges:
    """Whether an entry of ``folder`` came, went, or was written and closed, or the folder itself was moved or removed.
    Elsewhere than on Linux nobody tells.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._changed, self._queue = os.fsencode(folder), asyncio.Event(), -1
        with contextlib.suppress(OSError, ImportError):  # the system's limit of queues, or another system
            if sys.platform == "linux":
                from cco_sidecar_plugins.context._inotify import new_queue

                self._queue = new_queue()
                asyncio.get_running_loop().add_reader(self._queue, self._hear)

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._queue, 65_536)
        self._changed.set()

    def watch(self) -> bool:
        """Whether changes from now on are told. To be called again where the folder may be another one now."""
        if self._queue < 0:
            return False
        from watchdog.observers.inotify_c import InotifyConstants, inotify_add_watch

        from cco_sidecar_plugins.context._inotify import ENTRIES

        kinds = InotifyConstants
        mask = ENTRIES | kinds.IN_CLOSE_WRITE | kinds.IN_MOVE_SELF | kinds.IN_DELETE_SELF | kinds.IN_ONLYDIR
        return bool(inotify_add_watch(self._queue, self._folder, mask) >= 0)

    async def wait(self) -> None:
        """Until something has changed since the last call."""
        await self._changed.wait()
        self._changed.clear()

    def close(self) -> None:
        if self._queue >= 0:
            asyncio.get_running_loop().remove_reader(self._queue)
            os.close(self._queue)
            self._queue = -1

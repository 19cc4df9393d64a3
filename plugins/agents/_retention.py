"""Removes what ended agents have left: their folders, by age and by size."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from pathlib import Path

from cco_sidecar import MB, Pool, log_once, one_line
from cco_sidecar_plugins._files import folder_size
from cco_sidecar_plugins._settings import PluginSettings

LOOK = 600.0  # seconds between two looks


async def prune_for_ever(folder: Path, settings: PluginSettings) -> None:
    """Keep the agents' folders in ``folder`` within what the settings allow."""
    pool, keep, limit = Pool("retention", 1, 600), settings.agent_retention, settings.agent_retention_mb * MB
    while True:
        try:
            await pool.run(prune_folders, folder, time.time() - keep, limit)
        except OSError as error:  # it may be over at the next look
            log_once(f"what ended agents left is not pruned: {one_line(error) or type(error).__name__}")
        await asyncio.sleep(min(LOOK, keep))


def prune_folders(folder: Path, oldest: float, limit: int) -> None:
    """Remove the folders of ended agents that were last changed before ``oldest``, and of the others the oldest beyond
    ``limit`` bytes. Blocks. An agent that has not ended, or whose end is not recorded yet, has a token there.
    """
    ended, total = list[tuple[float, Path]](), 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # somebody removes it at this moment
            if not (path / "token").exists():
                ended.append((path.stat().st_mtime, path))
    for changed, path in sorted(ended, reverse=True):
        total += folder_size(path)
        if changed < oldest or total > limit:
            shutil.rmtree(path, ignore_errors=True)

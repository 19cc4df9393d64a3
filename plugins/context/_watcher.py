"""The watcher, by which the project index hears of changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cco_sidecar_plugins.context._inotify import Inotify
    from cco_sidecar_plugins.context._watchdog import Watcher


def new_watcher(root: Path, changed: Callable[[], None], on_change: Callable[[str], None]) -> Inotify | Watcher:
    """On Linux a watcher that proves what has not changed; elsewhere one that hints at what has."""
    if sys.platform == "linux":
        from cco_sidecar_plugins.context._inotify import Inotify

        return Inotify(root, changed)
    from cco_sidecar_plugins.context._watchdog import Watcher

    return Watcher(root, on_change)


def folder_limit() -> int:
    """How many folders are watched at most."""
    if sys.platform == "linux":
        from cco_sidecar_plugins.context import _inotify

        return _inotify.folder_limit()
    from cco_sidecar_plugins.context._watchdog import Watcher

    return Watcher.BUDGET

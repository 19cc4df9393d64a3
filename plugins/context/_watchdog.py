"""The watcher of systems other than Linux, by watchdog's observers: a hint at changes, and no proof."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import watchdog.events
import watchdog.observers

from cco_sidecar import one_line
from cco_sidecar_plugins.context._git_facts import NOT_OURS

log = logging.getLogger("cco")


class Watcher:
    """Tells that something below the root changed, through watchdog: a fast hint and never the proof.

    ``state`` is "starting", "full", or "partial: why": what changes there is found by the look at the disk.
    """

    BUDGET = 4_000  # folders
    KINDS = [  # without this filter mere reading counts as a change
        watchdog.events.FileCreatedEvent, watchdog.events.FileModifiedEvent, watchdog.events.FileDeletedEvent,
        watchdog.events.FileMovedEvent, watchdog.events.DirCreatedEvent, watchdog.events.DirDeletedEvent,
        watchdog.events.DirMovedEvent,
    ]  # fmt: skip

    def __init__(self, root: Path, changed: Callable[[str], None]) -> None:
        self._root, self._changed, self._budget = root, changed, self.BUDGET
        self.state = "starting"
        self._observer: Any = None  # holds handles of the kernel's once it is made
        self._handler = watchdog.events.FileSystemEventHandler()
        self._handler.on_any_event = self._on_event  # type: ignore[method-assign]  # watchdog wants a subclass

    def start(self) -> None:
        """Watch the root itself, and each folder in it with all below while the budget lasts. Blocks."""
        try:
            self._observer = watchdog.observers.Observer()
            self._observer.schedule(self._handler, str(self._root), event_filter=self.KINDS)
            self._observer.start()
            for folder in sorted(self._root.iterdir()):
                self._watch(folder)
        except (OSError, RuntimeError) as error:  # the system's limit of watches
            self.state = f"partial: {one_line(error)}"
            log.warning("watching is %s", self.state)
        if self.state == "starting":
            self.state = "full"

    def _watch(self, folder: Path) -> None:
        if folder.name in NOT_OURS or folder.is_symlink() or not folder.is_dir():
            return
        number = sum(1 for _ in os.walk(folder))
        if number > self._budget:
            self.state = f"partial: {folder.name} has too many folders"
            return
        self._budget -= number
        self._observer.schedule(self._handler, str(folder), recursive=True, event_filter=self.KINDS)

    def _on_event(self, event: watchdog.events.FileSystemEvent) -> None:
        path = Path(os.fsdecode(event.dest_path or event.src_path))
        if path.suffix != ".lock":
            self._changed(str(path))
        if event.is_directory and path.parent == self._root:
            with contextlib.suppress(OSError, RuntimeError):  # gone already: then there is nothing to watch
                self._watch(path)

    apart: Sequence[str] = ()

    def quiet(self) -> bool:
        return False

    def suspects(self, proof: Mapping[str, Any]) -> None:
        """All paths may have changed."""

    def suspect(self, paths: Iterable[str]) -> Set[str]:
        return set()

    def cover(self, proof: Mapping[str, Any], changed: Iterable[str]) -> None:
        """All folders are watched already."""

    def stop(self) -> None:
        if self._observer and self._observer.is_alive():
            self._observer.stop()
            self._observer.join(2)

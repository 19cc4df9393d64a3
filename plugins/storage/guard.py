"""The core's storage with its guards: a database that is damaged is not opened, one whose files are deleted, replaced
or cut is not written to, what is stored stays within ``--storage-limit-mb``, and what clients need, or a crash kept
from its place, is written again.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

from cco_sidecar import (
    LOG_BYTES,
    Endpoint,
    EventBus,
    Inserted,
    Job,
    Records,
    SidecarInfo,
    Storage,
    StorageError,
    hookimpl,
    write_file,
)
from cco_sidecar_plugins._files import content_of
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.storage._database import DatabaseFile, check_database, check_places
from cco_sidecar_plugins.storage._folder import FolderChanges
from cco_sidecar_plugins.storage._limit import ForgettingRecords, LimitedStorage, TellingBus
from cco_sidecar_plugins.storage._log import database_files, lengthen_log, take_salvaged
from cco_sidecar_plugins.storage._recovery import RecoveredFiles

log = logging.getLogger("cco")


@hookimpl(trylast=True)  # what is answered again needs no room
def part_class(base: type) -> type | None:
    if issubclass(base, Records):
        return type("ForgettingRecords", (ForgettingRecords, base), {})
    if issubclass(base, Storage):
        return type("GuardedStorage", (GuardedStorage, base), {})
    if issubclass(base, EventBus):
        return type("TellingBus", (TellingBus, base), {})
    return type("BoundedBody", (BoundedBody, base), {}) if issubclass(base, Endpoint) else None


class BoundedBody(Endpoint):
    """A body is only taken where there is room for it."""

    def work(self, path: tuple[str, ...]) -> Coroutine[Any, Any, Any]:
        storage = self.sidecar.storage
        bounded = self.body is not None and isinstance(storage, LimitedStorage)
        return self._in_room(storage, path) if bounded else super().work(path)

    async def _in_room(self, storage: Any, path: tuple[str, ...]) -> Any:
        size = len(self.upload)
        await storage.take_room(size)
        try:
            return await super().work(path)
        finally:
            storage.leave_room(size)


class GuardedStorage(LimitedStorage):
    """Looks at the database's files at the start, and before and after each commit, and when the storage folder has
    changed at those by which clients find the service and tokens are signed; twice a second where no change is told.
    """

    KEEP_SECONDS = 0.5
    _keeping: asyncio.Task[None] | None = None

    def __init__(self, settings: PluginSettings, records: type[Records]) -> None:
        super().__init__(settings, records)
        self._files: list[DatabaseFile] = []
        self.files: RecoveredFiles = RecoveredFiles(settings.storage / "results")

    def start(self) -> None:
        take_salvaged(self.path)
        check_database(self.path)
        check_places(self.path.parent)
        super().start()
        self.files.recover(self.read)
        if min(self._limit, shutil.disk_usage(self.path.parent).free) > 10 * LOG_BYTES:
            lengthen_log(self.path)
        self._files = [DatabaseFile(path) for path in database_files(self.path) if path.exists()]

    def commit(self, records: Records, jobs: list[Job]) -> tuple[list[Any], Inserted]:
        done = None
        try:
            self._check()
            done = super().commit(records, jobs)
            self._check()
        except StorageError as error:  # what was committed is lost
            return [error] * len(jobs), []
        except Exception as error:  # a boundary: the thread has to go on
            problem = f"the database cannot be looked at: {getattr(error, 'strerror', '') or type(error).__name__}"
            log.error("storage: %s", problem)
            return done or ([StorageError(problem)] * len(jobs), [])
        return done

    def _check(self) -> None:
        for file in self._files:
            file.check()

    def announce(self, info: SidecarInfo) -> None:
        """Of what is kept nothing is read after the announcement: whoever sees that may change it at once."""
        secret = self.path.with_name("jwt.secret")
        files = {} if self._settings.jwt_secret else {secret: secret.read_bytes()}
        files[self.path.with_name(SidecarInfo.FILE)] = msgspec.json.format(msgspec.json.encode(info)) + b"\n"
        super().announce(info)
        self._keeping = asyncio.create_task(self._keep(files))

    async def _keep(self, files: dict[Path, bytes]) -> None:
        """Write ``sidecar.json`` and the signing secret again where a cleaner took them, as long as their folder is
        there. A command that did not find the secret makes another one, whose tokens would be refused.
        """
        told, changes = "", FolderChanges(self.path.parent)
        while True:
            watched = changes.watch()
            problems: dict[str, str] = {}
            for path, content in files.items():
                try:
                    if content_of(path) != content:
                        write_file(path, content)
                        log.warning("%s was removed or replaced: the one in use is written again", path.name)
                except OSError as error:
                    problems[path.name] = str(error.strerror)
            problem = f"{' and '.join(problems)} cannot be written again: {', '.join(set(problems.values()))}"
            if problems and problem != told:
                log.error("%s", problem)
            told = problem
            try:
                if watched and not problems:
                    await changes.wait()
                await asyncio.sleep(self.KEEP_SECONDS)  # who removes the whole folder is not disturbed
            except asyncio.CancelledError:
                changes.close()
                raise

    def close(self) -> None:
        if self._keeping:
            self._keeping.cancel()
        super().close()
        for file in () if self._thread.is_alive() else self._files:  # a commit that goes on looks at them
            file.close()

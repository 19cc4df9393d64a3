"""The core's storage with its guards: a database that is damaged is not opened, one whose files are deleted, replaced
or cut is not written to, and what is stored stays within ``--storage-limit-mb``.
"""

from __future__ import annotations

from cco_sidecar import Storage, hookimpl
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.storage._database import DatabaseFile, check_database
from cco_sidecar_plugins.storage._limit import LimitedStorage
from cco_sidecar_plugins.storage._log import database_files


@hookimpl
def storage(settings: PluginSettings) -> Storage:
    return GuardedStorage(settings)


class GuardedStorage(LimitedStorage):
    """Looks at the database's files at the start, and before and after each commit."""

    def __init__(self, settings: PluginSettings) -> None:
        super().__init__(settings)
        self._files: list[DatabaseFile] = []

    def start(self) -> None:
        check_database(self.path)
        super().start()
        self._files = [DatabaseFile(path) for path in database_files(self.path) if path.exists()]

    def check(self) -> None:
        for file in self._files:
            file.check()

    def close(self) -> None:
        super().close()
        for file in self._files:
            file.close()

"""What a crash of cco_sidecar left of results' files is put in place; what stands in their places is named."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cco_sidecar import Records, ResultFiles, StorageError
from cco_sidecar_plugins._files import misplaced

log = logging.getLogger("cco")

LATEST = (  # of the same agent type on the same issue as a result
    "select * from result where (project, issue, agent_type) ="
    " (select project, issue, agent_type from result where id = ?) order by seq desc limit 1"
)
KINDS = ("folder", "folder", "folder", "file")  # results, a project, an issue, the record of an agent type


class RecoveredFiles(ResultFiles):
    """Looks into NEW for what was committed, and could not be moved to its path. Says why none can be written."""

    def write(self, rows: list[dict[str, Any]]) -> None:
        try:
            super().write(rows)
        except StorageError:
            storage = Path(self._folder).parent
            for row in rows:
                project = f"results/{row['project']}"
                folders = ("results", f"results/{self.NEW}", project, f"{project}/{row['issue']}")
                files = (f"results/{self.NEW}/{row['id']}", os.path.relpath(self.path(row), storage))
                for name in (*folders, *files):
                    if wrong := misplaced(storage, name, "folder" if name in folders else "file"):
                        raise StorageError(wrong) from None
            raise

    def recover(self, read: Records) -> None:
        """Replace what is in NEW by the latest committed records. Blocks."""
        for new in () if os.path.islink(self._new) else Path(self._new).glob("*"):
            self.replace(new, read.rows(LATEST, new.name))

    def replace(self, new: Path, rows: list[Any]) -> None:
        """Put committed records in place, and leave nothing in NEW; where that fails the next start tries again."""
        try:
            self.write(rows)
            self.place()
            if new.name not in [row["id"] for row in rows]:  # else it was moved, or is for the next start
                new.unlink(missing_ok=True)
        except (OSError, StorageError) as error:
            self._written = {}  # else it is placed with the next one, and may be cut
            log.error("the file of %s cannot be written: %s", new.name, getattr(error, "strerror", error))

    def put(self, rows: list[Any]) -> None:
        """Put committed records in place, each for itself."""
        for row in rows:
            self.replace(Path(self._new, row["id"]), [row])


def misplaced_results(storage: Path, name: str = "results", kinds: tuple[str, ...] = KINDS) -> Iterator[str]:
    """What stands where a folder or file of results belongs, and what to do, for each such place. Blocks."""
    if wrong := misplaced(storage, name, kinds[0]):
        yield wrong
    elif kinds[1:] and (storage / name).exists():
        for below in sorted(os.listdir(storage / name)):
            if below == ResultFiles.NEW:
                yield from misplaced_results(storage, f"{name}/{below}", ("folder",))
            elif not below.startswith("."):  # as no project, issue or agent type does
                yield from misplaced_results(storage, f"{name}/{below}", kinds[1:])

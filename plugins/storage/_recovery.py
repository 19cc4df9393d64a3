"""What a crash of cco_sidecar left of results' files is put in place."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cco_sidecar import Records, ResultFiles, StorageError

log = logging.getLogger("cco")

LATEST = (  # of the same agent type on the same issue as a result
    "select * from result where (project, issue, agent_type) ="
    " (select project, issue, agent_type from result where id = ?) order by seq desc limit 1"
)


class RecoveredFiles(ResultFiles):
    """Looks into NEW for what was committed, and could not be moved to its path."""

    def recover(self, read: Records) -> None:
        """Replace what is in NEW by the latest committed records. Blocks."""
        for new in () if os.path.islink(self._new) else Path(self._new).glob("*"):
            try:
                self.write(read.rows(LATEST, new.name))
                self.place()
                new.unlink(missing_ok=True)
            except (OSError, StorageError) as error:
                self._written = {}  # the next start tries again
                log.error("the file of %s cannot be written: %s", new.name, getattr(error, "strerror", error))

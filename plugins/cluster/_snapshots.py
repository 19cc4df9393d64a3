"""Snapshots of a replica, beside the log: who was away for long, or is new, begins with the newest one.

A snapshot lies in pieces among what is large, under an index that is written last. The log is cut up to the one before
the newest, so that who was away for a moment goes on without it.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from cco_sidecar import MB, log
from cco_sidecar_plugins.cluster._nats_log import NatsLog

BLOCK = MB


class Snapshots:
    """All methods block, and none may be called on the client's thread. They raise StorageError and OSError."""

    SECONDS = 120.0  # that a transfer may take
    BYTES = 64 * MB  # of entries, after which one is due although they are few
    PREFIX = ".snapshot-"  # of a folder for a copy of the database

    def __init__(self, nats_log: NatsLog, database: Path, every: int) -> None:
        self._log, self._database, self._every = nats_log, database, every
        self._last, self._weight = 0, 0
        for folder in database.parent.glob(f"{self.PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)  # a sidecar that ended meanwhile has left it

    def newest(self) -> int | None:
        """The entry up to which the newest snapshot goes."""
        return max(self._all(), default=None)

    def _all(self) -> list[int]:
        found: list[int] = self._log.call(self._log.large.whole()).result(self.SECONDS)
        return found

    @contextlib.contextmanager
    def fetched(self, seq: int) -> Iterator[Path]:
        """The database in a snapshot, as a file."""
        content = self._log.call(self._log.large.get_whole(str(seq))).result(self.SECONDS)
        with tempfile.TemporaryDirectory(dir=self._database.parent, prefix=self.PREFIX) as folder:
            path, unpacked = Path(folder, "snapshot.db"), zlib.decompressobj()
            with path.open("wb") as file:
                for at in range(0, len(content), BLOCK):
                    file.write(unpacked.decompress(content[at : at + BLOCK]))
                file.write(unpacked.flush())
            yield path

    def make_when_due(self, applied: int, weight: int) -> None:
        """Make one where so many entries, or bytes of them, were applied since the newest."""
        if applied - self._last < self._every and weight - self._weight < self.BYTES:
            return
        known, self._last = self._last, self.newest() or 0
        if self._last == known or applied - self._last >= self._every:  # and no other sidecar was first
            self._make()
        self._weight = weight

    def _make(self) -> None:
        with tempfile.TemporaryDirectory(dir=self._database.parent, prefix=self.PREFIX) as folder:
            copy = Path(folder, "snapshot.db")
            with contextlib.closing(sqlite3.connect(self._database, isolation_level=None)) as database:
                database.execute("vacuum into ?", (str(copy),))
            with contextlib.closing(sqlite3.connect(copy)) as database:
                rows = dict(database.execute("select name, value from meta where name in ('applied', 'log')"))
            seq, packed = int(rows["applied"]), bytearray()
            packer = zlib.compressobj(1)
            with copy.open("rb") as file:
                while block := file.read(BLOCK):
                    packed += packer.compress(block)
            packed += packer.flush()
        self._log.call(self._log.large.put_whole(str(seq), bytes(packed))).result(self.SECONDS)
        self._last = seq
        log.info("the log at NATS: a snapshot of entries up to %d was made, %d bytes", seq, len(packed))
        self._remove_before()

    def _remove_before(self) -> None:
        """Remove all that the newest two snapshots make superfluous."""
        kept = sorted(self._all())[-2:]
        if len(kept) < 2:
            return
        self._log.call(self._log.large.cut(kept[0])).result(self.SECONDS)

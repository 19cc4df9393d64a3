"""The database's files: whether they are sound before SQLite opens them, and still the same while they are in use."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
from pathlib import Path

from cco_sidecar import APPLICATION_ID, LOG_BYTES, MB, SCHEMA_VERSION, StartError, StorageError
from cco_sidecar_plugins._files import misplaced
from cco_sidecar_plugins.storage._log import check_log, damaged, database_files, unusable


def check_database(path: Path, *, thorough: bool = False, in_use: bool = False) -> None:
    """Raise StartError, and touch nothing, where ``path`` is newer than this program, another program's, or damaged.

    Every page is checked where the file is below 64 MB, or when ``thorough``; else only what opening it reads.
    """
    for file in database_files(path):
        if wrong := misplaced(file.parent, file.name, "file"):
            raise StartError(f"{file.parent}/{wrong}", 1)
    if not path.exists():
        return
    if path.stat().st_size == 0:
        check_empty(path)
        return
    check_log_length(path)
    if not in_use:
        check_log(path)
    check_owner(path)
    if thorough or path.stat().st_size < 64 * MB:
        try:
            with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=5)) as database:
                verdict = database.execute("pragma quick_check(1)").fetchone()[0]
        except sqlite3.Error as error:
            raise unusable(path, error) from None
        if verdict != "ok":
            raise damaged(path, verdict)


def check_places(storage: Path) -> None:
    """Raise StartError where something else stands in the place of a file or folder that the service makes."""
    for name, kind in PLACES.items():
        if wrong := misplaced(storage, name, kind):
            raise StartError(f"{storage}/{wrong}", 1)


PLACES = {"agents": "folder", "index": "folder", "results": "folder", "agents.lock": "file"}


def check_owner(path: Path) -> None:
    """Raise StartError where a newer version of this program made the database, or another program, or nothing can be
    read of it.
    """
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=5)) as database:
            questions = ("pragma user_version", "pragma application_id", "select count(*) from sqlite_master")
            version, application, tables = (database.execute(question).fetchone()[0] for question in questions)
    except sqlite3.Error as error:
        raise unusable(path, error) from None
    ours = application == APPLICATION_ID
    if (ours and version > SCHEMA_VERSION) or (not ours and (version or tables)):
        owner = "a newer version of this program" if ours else "another program"
        problem = f"the storage {path} was made by {owner}; it is left as it is. Use another --storage"
        raise StartError(f"{problem}, or update", 1)


def check_empty(path: Path) -> None:
    """Raise StartError where the empty database held something, rather than that its first start was interrupted."""
    secret, log = path.with_name("jwt.secret"), database_files(path)[1]
    others = [path.with_name(name) for name in ("results", "agents", "sidecar.json")]
    old = secret.exists() and path.stat().st_mtime - secret.stat().st_mtime > 60
    if old or (log.exists() and log.stat().st_size) or any(map(os.path.exists, others)):
        remedy = "put a copy of it back, or remove it to begin anew"
        raise StartError(f"the storage {path} is empty, and was not always; it is left as it is: {remedy}", 1)


def check_log_length(path: Path) -> None:
    """Raise StartError where the log's index, which a kill leaves behind, knows of commits that the log has not: SQLite
    would leave them out. The formats: sqlite.org/walformat.html.
    """
    log, index = database_files(path)[1:]
    with contextlib.suppress(FileNotFoundError), log.open("rb") as log_file, index.open("rb") as index_file:
        log_head, head = log_file.read(32), index_file.read(136)
        if len(head) == 136 and head[:48] == head[48:96] and log_head[16:24] in (b"", head[32:40]):
            page, committed, copied = (*struct.unpack_from("=HI", head, 14), *struct.unpack_from("=I", head, 96))
            short = log.stat().st_size < 32 + committed * (24 + page)
            if copied < committed and (short or log_head[:3] != b"\x37\x7f\x06"):
                raise damaged(log, "its beginning or its end is not there")


class DatabaseFile:
    """A file of the database while it is in use: what others do to it SQLite does not notice, and what is written then
    would be lost.
    """

    HEAD = 12  # bytes that never change: of the database its name, of the log its kind, version and page size

    def __init__(self, path: Path) -> None:
        self._path, self._size, self._is_log = path, 0, path.name.endswith("-wal")
        self._head_counts = not path.name.endswith("-shm")
        # Not to be closed before SQLite's own are: the first close ends all locks that this process has on the file.
        self._file = path.open("rb", buffering=0)
        self._number, self._place, self._inode = self._file.fileno(), str(path), os.fstat(self._file.fileno())
        self._head = self._read_head()

    def check(self) -> None:
        """Raise StorageError where it is not what lies at its path, or its beginning or its end is not there; OSError
        where it cannot be looked at.
        """
        try:
            facts, head = os.lstat(self._place), self._read_head()
            there = os.path.samestat(self._inode, facts)
        except (FileNotFoundError, NotADirectoryError):
            there = False
        if not there:
            raise StorageError(f"{self._path.name} was deleted or replaced while it was in use")
        if facts.st_size < self._size or head != self._head:
            raise StorageError(f"{self._path.name} was cut or overwritten while it was in use")
        self._size = min(facts.st_size, LOG_BYTES) if self._is_log else facts.st_size

    def forget_size(self) -> None:
        """It may have become smaller: we did that."""
        self._size = 0

    def _read_head(self) -> bytes:
        return os.pread(self._number, self.HEAD, 0) if self._head_counts else b""

    def close(self) -> None:
        self._file.close()

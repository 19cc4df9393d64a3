"""The database's write-ahead log at the start: what SQLite would leave out without a word is told."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sqlite3
import struct
from pathlib import Path

from cco_sidecar import LOG_BYTES, MB, StartError, one_line
from cco_sidecar_plugins._called import own_command

log = logging.getLogger("cco")


def database_files(path: Path) -> list[Path]:
    """The database, its log of what was committed last, and the log's index."""
    return [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))]


def take_salvaged(path: Path) -> None:
    """Put what doctor --salvage made anew of the database in its place, where that has been killed before it did."""
    new = path.with_name(SALVAGED)
    if new.exists() and path.name != REPLICA:
        for file in database_files(path)[1:]:  # first: to the new database they would be a log of its own
            file.unlink(missing_ok=True)
        os.replace(new, path)


SALVAGED = "salvaged.db"  # whole, and the damaged files are kept aside
REPLICA = "replica.db"  # in the place of the database, where many machines share a log


def damaged(path: Path, problem: str) -> StartError:
    salvage = f"{own_command()} doctor --salvage {shlex.quote(f'--storage={path.parent}')}"
    remedy = f"`{salvage}` saves what can be read of it; or move it away to begin anew"
    if path.name.startswith(REPLICA):
        remedy = "Move it away: the next start makes it anew of the log"
    return StartError(f"the storage {path} is damaged ({problem}); it is left as it is. {remedy}", 1)


# What SQLite meets that says nothing of the database: a full disk and a lock of another program for instance.
CIRCUMSTANCES = (
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL,
)  # fmt: skip
UNREAD = (sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS)


def unusable(path: Path, error: sqlite3.Error) -> StartError:
    """What a start is refused with where SQLite cannot read the database: damage is told only where it is that."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    if code & 0xFF not in CIRCUMSTANCES or code in UNREAD:
        return damaged(path, one_line(error))
    problem = f"{one_line(error)} ({error.sqlite_errorname})"
    full = ", its disk is full" if shutil.disk_usage(path.parent).free < MB else ""
    return StartError(f"the storage {path} cannot be opened: {problem}{full}; it is left as it is", 1)


def check_log(path: Path) -> bool:
    """Raise StartError, and touch nothing, where the database's write-ahead log is damaged: SQLite would leave out what
    follows the damage, without a word. False where it was not checked: it has 64 MB or more. Must not be called while
    it is in use.

    The log's index, which outlives a kill, tells how many frames were committed. Without it a bad frame is damage where
    two commits follow: only the last one may have been cut by a loss of power. The formats: sqlite.org/walformat.html.
    """
    files = [file for file in database_files(path) if file.exists()]
    if path not in files or sum(file.stat().st_size for file in files[1:]) >= 64 * MB:
        return False
    log_path, index_path = database_files(path)[1:]
    content, index = (file.read_bytes() if file in files else b"" for file in (log_path, index_path))
    salts, good, commits_behind = read_log(content)
    head = index[:48]
    known = len(index) >= 136 and head == index[48:96] and log_sums(head[:40], "=") == struct.unpack("=2I", head[40:])
    if known and salts in (b"", head[32:40]):
        committed, copied = (struct.unpack_from("=I", index, at)[0] for at in (16, 96))
        bad = copied < committed > good
    else:
        bad = commits_behind > 1 or (not salts and any(content[:32]) and len(content) > 32)
    if bad:
        raise damaged(log_path, f"{good} of its frames are good, and more were committed")
    return True


def lengthen_log(path: Path) -> None:
    """Give the database's log, into which nobody may write meanwhile, the length at which SQLite begins it anew. A
    commit that lengthens it takes twice as long as one that overwrites it: the new size has to be on the disk, too.
    """
    log_path = database_files(path)[1]
    try:
        with log_path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.write(bytes(max(0, LOG_BYTES - size)))  # no frame begins so: it would have the salts of the head
    except OSError as error:
        log.warning("%s cannot be made longer: %s", log_path.name, error.strerror)


def read_log(content: bytes) -> tuple[bytes, int, int]:
    """(salts, good frames, commits behind those) of a write-ahead log: the salts are empty where its head is bad, the
    commits are those of the same log.
    """
    order = {b"\x37\x7f\x06\x82": "<", b"\x37\x7f\x06\x83": ">"}.get(content[:4], "")
    sums = log_sums(content[:24], order) if order and len(content) >= 32 else None
    if sums is None or sums != struct.unpack(">2I", content[24:32]):
        return b"", 0, 0
    page, salts, good, commits_behind, sound = int.from_bytes(content[8:12]), content[16:24], 0, 0, True
    for at in range(32, len(content) - 24 - page + 1, 24 + page):
        head = content[at : at + 24]
        if sound:
            sums = log_sums(head[:8] + content[at + 24 : at + 24 + page], order, sums)
            sound = head[8:16] == salts and struct.unpack(">2I", head[16:]) == sums
        good += sound
        commits_behind += not sound and head[8:16] == salts and any(head[4:8])
    return salts, good, commits_behind


def log_sums(content: bytes, order: str, sums: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """SQLite's checksum of words of this byte order, going on from the one before."""
    first, second = sums
    for one, other in struct.iter_unpack(f"{order}2I", content):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second

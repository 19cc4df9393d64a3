"""Small files that clients and plugins read, whatever somebody has put in their place, and the size of folders."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection
from pathlib import Path

import msgspec

from cco_sidecar import SidecarInfo

NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what msgspec raises for content that is none


def read_sidecar_json(folder: Path) -> SidecarInfo | None:
    """What the service on a storage says of itself, None where there is nothing that can be so."""
    try:
        return msgspec.json.decode(content_of(folder / SidecarInfo.FILE), type=SidecarInfo)
    except NO_JSON:
        return None


def content_of(path: Path, at_most: int = -1) -> bytes:
    """The content of a file; empty where it cannot be read, and where a link, a folder or a pipe is in its place."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(path.lstat().st_mode):
            with path.open("rb") as file:
                return file.read(at_most)
    return b""


STANDS = {
    stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a device", stat.S_IFCHR: "a device",
}  # fmt: skip


def misplaced(folder: Path, name: str, kind: str) -> str:
    """What stands at ``name`` in a folder where a ``kind`` belongs, "file" or "folder", and what to do; also that a
    folder cannot be written. "" where nothing is wrong, and where nothing stands there.
    """
    path = folder / name
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        stands = STANDS[stat.S_IFMT(path.lstat().st_mode)]
        if stands != f"a {kind}":
            return f"{name} is {stands}, and a {kind} belongs there: move it away"
        if kind == "folder" and not os.access(path, os.W_OK | os.X_OK):
            return f"{name} cannot be written or entered: make it your own and chmod u+rwx it"
    return ""


def explained(error: OSError) -> str:
    """The error in one line; of a file that is denied also whose it is, and what to do."""
    if not isinstance(error.filename, str) or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return str(error)
    return f"{error.filename}: {error.strerror}; {what_denies(Path(error.filename))}, or use another --storage or place"


def what_denies(path: Path) -> str:
    """Which file or folder keeps us from ``path``, the nearest one that can be looked at, and what to do about it."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            owner = place.lstat().st_uid
            if hasattr(os, "geteuid") and owner != os.geteuid():
                return f"{place} belongs to {name_of_user(owner)}: chown -R it to yourself"
            return f"{place} is yours: chmod u+rwX it, if its disk can be written"
    return "nothing of it can be looked at: see whose it is"


def name_of_user(number: int) -> str:
    with contextlib.suppress(ImportError, KeyError):  # Windows has no such module
        import pwd

        return f"{pwd.getpwuid(number).pw_name} (user id {number})"
    return f"user id {number}"


def denied(file: Path) -> str:
    """Why a file cannot be read, or its folder looked into, that are there; "" where they can and where none is."""
    try:
        with os.scandir(file.parent):
            file.lstat()
        if os.access(file, os.R_OK):
            return ""
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
    except PermissionError as error:
        return explained(error)
    except OSError:
        return ""


def folder_size(folder: Path, without: Collection[str] = ()) -> int:
    """Bytes in the files below ``folder`` that have other names than those. Blocks."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in set(names).difference(without):
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total

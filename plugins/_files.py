"""Small files that clients and plugins read, whatever somebody has put in their place, and the size of folders."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection
from pathlib import Path

import msgspec

from cco_sidecar import SidecarInfo


def read_sidecar_json(folder: Path) -> SidecarInfo | None:
    """What the service on a storage says of itself, None where there is nothing that can be so."""
    try:
        return msgspec.json.decode(content_of(folder / SidecarInfo.FILE), type=SidecarInfo)
    except (msgspec.DecodeError, RecursionError):
        return None


def content_of(path: Path) -> bytes:
    """The content of a file; empty where it cannot be read, and where a link, a folder or a pipe is in its place."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(path.lstat().st_mode):
            return path.read_bytes()
    return b""


def folder_size(folder: Path, without: Collection[str] = ()) -> int:
    """Bytes in the files below ``folder`` that have other names than those. Blocks."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in set(names).difference(without):
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total

"""Fingerprints of files: what shows that one has changed since it was looked at."""

from __future__ import annotations

import os
import stat

import cco_sidecar

# of a file or folder: mtime and ctime in nanoseconds, size, inode, mode, number of its hard links
Fingerprint = tuple[int, int, int, int, int, int]
MAX_INT64 = 2**63 - 1  # what SQLite and arrays hold; some disks claim a later year than 2262, or a larger inode


def fingerprint(path: str) -> Fingerprint | None:
    """Facts of the file or folder at ``path``, one of which changes with it; None where nothing is. Follows no link."""
    try:
        facts = os.lstat(path)
    except (OSError, ValueError):
        return None
    mtime, ctime = min(facts.st_mtime_ns, MAX_INT64), min(facts.st_ctime_ns, MAX_INT64)
    return mtime, ctime, facts.st_size, facts.st_ino & MAX_INT64, facts.st_mode, facts.st_nlink


def is_linked(facts: Fingerprint | None) -> bool:
    """Whether the fingerprint is that of a file with several hard links."""
    return facts is not None and facts[5] > 1 and not stat.S_ISDIR(facts[4])


def is_young(facts: Fingerprint | None, now: int) -> bool:
    """Whether a change right after ``now`` (nanoseconds, taken before looking) could leave the same fingerprint."""
    moment = 0 if facts is None else facts[0] if os.name == "nt" else facts[1]
    return cco_sidecar.is_young(moment, now)

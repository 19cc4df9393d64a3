"""Fingerprints of files: what shows that one has changed since it was looked at, for the plugins of cco_sidecar."""

from __future__ import annotations

import os
import stat

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
    return is_recent(moment, now)


def is_recent(moment: int, now: int) -> bool:
    """Whether a change right after ``now``, taken before looking, could leave the time ``moment`` too (nanoseconds)."""
    step = 12_000_000  # stamps move in steps of up to 10 ms, or of whole seconds (some network and removable disks)
    return now - (step if moment % 1_000_000_000 else 2_100_000_000) < moment <= now + step

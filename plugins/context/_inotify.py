"""Names what may have changed in folders, by Linux' inotify: what it does not name has not changed.

The kernel puts an event into the queue before the system call that causes it returns, and gives the events of one
queue in one order (inotify(7)). So once the queue was read until it is empty, every change made before is known.
Watchman makes a file, a cookie, and waits for its event, since another thread reads its queue. Here whoever asks reads
the queue: nothing is written, and nothing is waited for.

No event comes of what other machines do in a network file system, of writes through a mapping of a file until it is
closed, nor of a new hard link in a folder that is not watched, and writes through that.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import select
import stat
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import psutil
from watchdog.observers.inotify_c import InotifyConstants as In
from watchdog.observers.inotify_c import inotify_add_watch, inotify_init, inotify_rm_watch

from cco_sidecar import one_line
from cco_sidecar_plugins.context._fingerprints import is_linked

log = logging.getLogger("cco")

ENTRIES = In.IN_MOVED_FROM | In.IN_MOVED_TO | In.IN_CREATE | In.IN_DELETE  # the folder itself has changed too
GONE = In.IN_DELETE_SELF | In.IN_MOVE_SELF | In.IN_UNMOUNT | In.IN_IGNORED  # the folder is not where it was
MASK = (
    In.IN_MODIFY | In.IN_ATTRIB | In.IN_CLOSE_WRITE  # the last comes also where a mapping that was written to ends
    | ENTRIES | In.IN_DELETE_SELF | In.IN_MOVE_SELF | In.IN_ONLYDIR | In.IN_DONT_FOLLOW
)  # fmt: skip
HEAD = struct.Struct("iIII")  # of an event: number of the watch, mask, cookie, length of the name that follows
AT_ONCE = 65_536  # bytes of events that are read and handled in one go: some two milliseconds
LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "tmpfs", "ramfs"})

Proof = Mapping[str, Any]  # fingerprints by absolute path


class Inotify:
    """Watches the folders of a proof, and names the paths in it that may have changed since it was made.

    ``state`` is "starting", "full", "off", or "partial: why"; then all paths may have changed.
    """

    MOST = 10_000  # paths that are remembered; after more, all may have changed

    def __init__(self, root: Path, changed: Callable[[], None]) -> None:
        self._root, self._changed, self._lock = str(root), changed, threading.Lock()
        self.state = "starting"
        self.apart: list[str] = []  # paths of the proof of which no event tells
        self._thread: threading.Thread | None = None
        self._queue = self._mounts = -1
        self._wake = (-1, -1)
        self._folders: dict[Any, str] = {}  # by the number of their watch
        self._numbers: dict[str, Any] = {}
        self._proof: Proof = {}  # the one that was covered last
        self._wanted: Set[str] = frozenset()  # its folders
        self._identity: tuple[int, int] | None = None  # of the root that is watched
        self._here: list[tuple[str, str, str]] = []  # file systems of the root and below
        self._lost = True  # all may have changed, and the watches are of no use
        self._paths: set[str] = set()  # these may have changed,
        self._below: set[str] = set()  # these, and all below them,
        self._new: set[str] = set()  # and these with what they hold, which were not watched when the proof was made

    def start(self) -> None:
        """Begin to listen; a look may be on its way. Blocks."""
        with self._lock:
            try:
                self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY)
                self._wake = os.pipe()
                self._queue = new_queue()  # the last one: with a queue there is all that reading it takes
            except OSError as error:  # the system's limit of queues or of files, or no /proc
                self._give_up(one_line(error))
                return
            self._poll = select.poll()
            self._poll.register(self._queue, select.POLLIN)
            self._poll.register(self._mounts, select.POLLPRI)  # something was mounted or unmounted
            self.state = "full"
            self._mounted()
            self._thread = threading.Thread(target=self._listen, name="inotify", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Once more it does nothing: others have the numbers of what it closed."""
        self.state = "off"
        if self._thread:
            os.write(self._wake[1], b"!")
            self._thread.join(2)
        with self._lock:
            handles = self._queue, self._mounts, *self._wake
            self._thread, self._queue, self._mounts, self._wake = None, -1, -1, (-1, -1)
            for handle in handles:
                if handle >= 0:
                    os.close(handle)

    def _give_up(self, why: str) -> None:
        self.state = f"partial: {why}"
        log.warning("watching is %s", self.state)

    # -- what may have changed

    def quiet(self) -> bool:
        """Whether no path that was covered can have changed but those ``apart``. Waits for nothing."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self.state != "full" or (self._read() and self._read()) or self._lost or self._moved():
                return False
            self._paths &= self._proof.keys()
            return not (self._lost or self._paths or self._below or self._new)
        finally:
            self._lock.release()

    def suspects(self, proof: Proof) -> Set[str] | None:
        """The paths of ``proof``, which was covered, that may have changed since the last call. None: all. Blocks."""
        with self._lock:
            self._read_all()
            if self._lost or self._moved():
                self._begin_anew()
            known = self.state == "full" and self._identity
            found = self._named(proof) | (proof.keys() & self.apart) if known else None
            self._paths, self._below, self._new = set(), set(), set()
            return found

    def suspect(self, paths: Iterable[str]) -> Set[str]:
        """From now on these may have changed; those of them that no event named. Blocks."""
        with self._lock:
            self._read_all()
            untold = set() if self._lost else set(paths) - self._named(self._proof).union(self.apart)
            self._paths.update(paths)
            return untold

    def _named(self, proof: Proof) -> set[str]:
        found = self._paths & proof.keys()
        if self._below:
            prefixes = tuple(f"{folder}/" for folder in self._below)
            found |= {path for path in proof if path in self._below or path.startswith(prefixes)}
        if self._new:
            found |= {path for path in proof if path in self._new or path.rpartition("/")[0] in self._new}
        return found

    def _moved(self) -> bool:
        """Whether another folder than the one that is watched is at the root's path, or nothing was covered."""
        return identity(self._root) != self._identity

    def _begin_anew(self) -> None:
        """Drop all watches, and events that may speak of folders that have other names by now."""
        if self.state != "full":  # events hint at changes, and prove nothing
            self._lost = False
            return
        self._folders, self._numbers, self._wanted, self._proof, self._identity = {}, {}, frozenset(), {}, None
        try:
            fresh = new_queue()
        except OSError as error:
            self._give_up(one_line(error))
            return
        os.dup2(fresh, self._queue, inheritable=False)  # drops the old one
        os.close(fresh)
        os.write(self._wake[1], b"!")  # the thread still waits for the old one
        self._lost = False

    # -- what is watched

    def cover(self, proof: Proof, changed: Iterable[str]) -> None:
        """Watch the folders of ``proof``, which was made after the last call of ``suspects`` and differs from the one
        before in what is ``changed``. Blocks.

        What a folder that was not watched before holds may have changed since.
        """
        with self._lock:
            if self.state != "full" or self._lost:
                return
            others = proof.keys() != self._proof.keys()
            if others:
                self._wanted = folders_of(proof, self._root)
                for folder in self._numbers.keys() - self._wanted:
                    self._forget(folder)
            try:
                deaf = self._watch(sorted(self._wanted - self._numbers.keys()))
            except OSError as error:
                self._give_up(one_line(error))
                return
            if others or deaf or any(is_linked(proof.get(path)) for path in changed):
                self.apart = apart(proof, self._root, deaf)
            self._proof = proof
            self._identity = self._identity or identity(self._root)

    def _watch(self, folders: list[str]) -> tuple[str, ...]:
        """Watch these, of which each comes before those in it; those that cannot be. Raises OSError."""
        if len(self._numbers) + len(folders) > (most := folder_limit()):
            raise OSError(f"more than {most:,} folders")
        deaf: tuple[str, ...] = ()  # with a slash
        for folder in folders:
            number = -1 if folder.startswith(deaf) else inotify_add_watch(self._queue, os.fsencode(folder), MASK)
            if number >= 0:
                self._numbers.pop(self._folders.get(number, ""), None)  # its former name
                self._folders[number], self._numbers[folder] = folder, number
                self._new.add(folder)
            elif folder.startswith(deaf):
                continue
            elif ctypes.get_errno() in (errno.ENOSPC, errno.ENOMEM):  # the system's limit of watches
                raise OSError(ctypes.get_errno(), "no more folders can be watched")
            elif os.path.lexists(folder):  # a link, or unreadable; where nothing is, the folder above tells
                deaf += (f"{folder}/",)
        return deaf

    def _forget(self, folder: str) -> None:
        number = self._numbers.pop(folder, None)
        if number is not None and self._folders.pop(number, None) is not None:
            inotify_rm_watch(self._queue, number)

    # -- events

    def _listen(self) -> None:
        """Read events while nobody asks, so that the queue does not overflow, and call ``changed``."""
        poll, wake = select.poll(), self._wake[0]
        poll.register(self._queue, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while True:
            ready = [handle for handle, _ in poll.poll()]
            if wake in ready:
                os.read(wake, 100)
            with self._lock:
                if self.state == "off":
                    return
                self._read()
                concerned = self._lost or self._below or not self._paths.isdisjoint(self._proof)
            if concerned:
                self._changed()

    def _read_all(self) -> None:
        while self._queue >= 0 and not self._lost and self._read():
            pass

    def _read(self) -> bool:
        """Take events out of the queue; False where there was none."""
        ready = [handle for handle, _ in self._poll.poll(0)] if self._queue >= 0 else []
        if self._mounts in ready:
            self._mounted()
        if self._queue in ready:
            self._handle(os.read(self._queue, AT_ONCE))
        return bool(ready)

    def _mounted(self) -> None:
        """Something was mounted or unmounted somewhere."""
        here = mounts_of(self._root)
        if here != self._here:
            self._lost, self._here = True, here
        kind = next((kind for _, _, kind in here if kind not in LOCAL), None)
        if kind and self.state == "full":
            self._give_up(f"not every change on {kind} makes an event")

    def _handle(self, events: bytes) -> None:
        at = 0
        while at < len(events):
            number, mask, _, length = HEAD.unpack_from(events, at)
            name = events[at + HEAD.size : at + HEAD.size + length].rstrip(b"\0")
            at += HEAD.size + length
            if mask & In.IN_Q_OVERFLOW:
                self._lost = True
            elif folder := self._folders.get(number):
                self._note(folder, mask, os.fsdecode(name))
        if len(self._paths) > self.MOST:
            self._lost = True

    def _note(self, folder: str, mask: int, name: str) -> None:
        path = f"{folder}/{name}" if name else folder
        self._paths.add(path)
        if mask & ENTRIES:
            self._paths.add(folder)
        if mask & GONE:
            self._lost = self._lost or folder == self._root
            self._below.add(folder)
            self._forget(folder)
        elif mask & ENTRIES and mask & In.IN_ISDIR:
            self._below.add(path)
            if mask & (In.IN_MOVED_FROM | In.IN_MOVED_TO):  # those in it have other names now
                for below in [other for other in self._numbers if f"{other}/".startswith(f"{path}/")]:
                    self._forget(below)


def new_queue() -> int:
    handle = int(inotify_init())
    if handle < 0:
        raise OSError(ctypes.get_errno(), "no more inotify queues can be had")
    os.set_inheritable(handle, False)
    return handle


def folder_limit() -> int:
    """How many folders are watched at most: half of what the system lets this user watch."""
    try:
        return int(Path("/proc/sys/fs/inotify/max_user_watches").read_text()) // 2
    except (OSError, ValueError):
        return 100_000


def identity(folder: str) -> tuple[int, int]:
    try:
        facts = os.stat(folder)
    except OSError:
        return (0, 0)
    return facts.st_dev, facts.st_ino


def mounts_of(root: str) -> list[tuple[str, str, str]]:
    """(device, where, kind) of the file system that ``root`` lies on, and of those below it."""
    inside = f"{os.path.realpath(root)}/"
    mounts = {part.mountpoint: part for part in psutil.disk_partitions(all=True)}  # of two at one place the last counts
    above = [place for place in mounts if inside.startswith(f"{place.rstrip('/')}/")]
    below = [place for place in mounts if place.startswith(inside)]
    if not above:
        return [("", "", "an unknown file system")]
    return [(mounts[place].device, place, mounts[place].fstype) for place in [max(above, key=len), *below]]


def folders_of(proof: Proof, root: str) -> Set[str]:
    """The folders in ``proof``, those that its paths lie in, and those above them, up to ``root``."""
    inside = f"{root}/"
    found = {path.rpartition("/")[0] for path in proof if path.startswith(inside)}
    found |= {path for path, facts in proof.items() if facts and stat.S_ISDIR(facts[4]) and path.startswith(inside)}
    for folder in list(found):
        while folder != root and (folder := folder.rpartition("/")[0]) not in found:
            found.add(folder)
    return found | {root}


def apart(proof: Proof, root: str, deaf: tuple[str, ...]) -> list[str]:
    """The paths of ``proof`` that may change without an event that names them: those outside of ``root``, those in a
    folder that cannot be watched, and files with several hard links.
    """
    inside = f"{root}/"
    linked = {facts[3] for facts in proof.values() if is_linked(facts)}
    return [
        path for path, facts in proof.items()
        if not f"{path}/".startswith(inside)
        or (deaf and f"{path}/".startswith(deaf))
        or (facts and facts[3] in linked)
    ]  # fmt: skip

"""Finds named pipes in the place of files that git reads: opening one git waits for a writer, up to its time limit."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from cco_sidecar import GitError, clean_text, in_thread

READ_IN_TREE = (".git", ".gitignore", ".gitattributes", ".gitmodules", ".mailmap")


class Pipes:
    """The pipes that held git in the repository around ``root``. They are looked for where git is slow; one for whose
    writer nobody waits is none of them.
    """

    def __init__(self, root: Path) -> None:
        around = (folder for folder in (root, *root.parents) if os.path.lexists(folder / ".git"))
        self._root, self._top = root, next(around, root)
        self._found: list[str] = []
        self.suspects: list[str] = []  # pipes that the last search came upon, before it let anybody go on

    def refuse(self) -> None:
        """Raises GitError where a pipe that was found is still there."""
        self._found = [path for path in self._found if is_pipe(path)]
        for path in self._found:
            inside = path.startswith(os.path.join(self._top, ""))
            name = clean_text(os.path.relpath(path, self._top) if inside else os.path.basename(path))
            raise GitError(f"git would wait for a writer to the named pipe {name}: remove it")

    def search(self, also: Iterable[str] = ()) -> None:
        """Look for pipes, among ``also`` too, and let those go on who wait for their writers. Raises GitError where
        there is one. Blocks.
        """
        git = [self._top / ".git"]
        git += [Path(self._top, found.removeprefix("gitdir: ")) for found in [pointer(git[0])] if found]
        git += [Path(git[-1], found) for found in [pointer(git[-1] / "commondir")] if found]
        in_git = (path for folder in git for path in pipes_below(str(folder)))
        in_tree = (path for path in pipes_below(str(self._top)) if os.path.basename(path) in READ_IN_TREE)
        self.suspects = [*dict.fromkeys((*in_git, *in_tree, *filter(is_pipe, also)))]
        self._found = [path for path in self.suspects if lets_go(path)]
        if self._found:
            in_thread("pipes", functools.partial(let_go, self.suspects))
        self.refuse()


def is_pipe(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):  # it is gone
        return False


def lets_go(path: str) -> bool:
    """Whether somebody waited for the writer of a pipe, and goes on now."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def let_go(pipes: Iterable[str]) -> None:
    """Let those go on who wait for the writers of ``pipes``, until for a second nobody has come. Blocks."""
    quiet = 0
    while quiet < 50:  # git opens some files again and again
        quiet = 0 if sum(map(lets_go, pipes)) else quiet + 1
        time.sleep(0.02)


def pipes_below(place: str) -> Iterator[str]:
    """The pipes in a folder and in those below it, links to pipes too; ``place`` itself where it is one. Blocks."""
    pending = [place]
    if is_pipe(place):
        yield place
    while pending:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif not entry.is_file() and is_pipe(entry.path):
                    yield entry.path


def pointer(path: Path) -> str:
    """What a small file says that leads to something; "" where it is none."""
    with (
        contextlib.suppress(OSError, ValueError),
        open(path, "rb", opener=lambda name, _: os.open(name, NO_WAIT)) as file,
    ):
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return os.fsdecode(file.read(5_000)).rstrip("\r\n")
    return ""


NO_WAIT = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # a FIFO must not block

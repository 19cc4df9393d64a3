"""How fast contexts of 100 kB are on trees of any size, beside what has to be done in any case.

    python -m tests.benchmarks.context TREE [TREE ...]

measures git repositories of your choice; ``python -m tests.benchmarks`` makes some. A TREE is copied, and
only the copy is changed. The limit of a context that nobody asked for before is ``git status``,
and reading and hashing the files that the answer gives.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil

from cco_sidecar import kind_of
from tests.benchmarks import Row, row, table
from tests.benchmarks.servers import Sidecar, running_sidecar
from tests.benchmarks.trees import make_tree
from tests.benchmarks.wire import connect, request_bytes, run
from tests.conftest import clean_environment

SIZES = (100, 500, 2_000, 7_000, 20_000, 50_000)  # files
BUDGET = 100_000
LIMIT = "git status and reading"


def rows(quick: bool) -> Iterator[Row]:
    for number in (100, 500) if quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            root = make_tree(Path(folder) / "tree", number)
            yield from measure(root, Path(folder), 3 if quick else 15)


def measure(root: Path, folder: Path, rounds: int) -> Iterator[Row]:
    """The rows of the repository ``root``, whose files are changed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, env=clean_environment(), check=True
    ).stdout
    names = [os.fsdecode(name) for name in listed.split(b"\0") if name]
    sizes = [(root / name).lstat().st_size for name in names if kind_of(name) != "other"]
    indexed = sum(size for size in sizes if size <= 400_000) / 1e6
    began, title = time.perf_counter(), f"{len(names):,} files"
    usual = len(names) <= 11_000  # what these goals are about
    with running_sidecar(folder, root=root) as sidecar, Memory(sidecar.process.pid) as memory:
        asked, task = Asking(sidecar), tasks(names)
        first = asked(text := next(task))
        yield row(f"{title}: from the start to a first context", [time.perf_counter() - began], unit="s")
        healths = []
        while asked(text, max_files=1)["context"]["metadata"]["index"] != "ready":
            healths.append(timed(lambda: sidecar.get("/health"))[0] * 1000)
            time.sleep(0.05)
        ready = time.perf_counter() - began
        yield row(f"{title}: to one of full quality", [ready], unit="s", held=sidecar.held())
        yield row(f"{title}: text indexed a second", [indexed / ready], unit="MB/s")
        if healths:
            yield row(f"{title}: the slowest /health meanwhile", [max(healths)], unit="ms")
        given = [file["path"] for file in first["context"]["relevant_files"]]
        least = limit(root, given)
        cold, edited = [], []
        for number in range(rounds):
            asked(next(task))
            cold.append(asked.milliseconds)
            edit(root / given[number % len(given)], number)
            asked(next(task))
            edited.append(asked.milliseconds)
        common, size = {"unit": "ms", "limit_is": LIMIT}, len(names)
        yield row(
            f"{title}: a new context",
            cold,
            [least] * rounds,
            goal="value <= 200" * usual,
            point=("contexts", "new", size),
            **common,
        )
        yield row(f"{title}: a new context after an edit", edited, [least] * rounds, goal="ratio <= 1.5",
                  point=("contexts", "new, after an edit", size), held=sidecar.held(), **common)  # fmt: skip
        yield row(f"{title}: a cached context", hits(asked, text, rounds), unit="ms", goal="value <= 5",
                  point=("contexts", "cached", size), held=sidecar.held(end=True))  # fmt: skip
    yield row(f"{title}: most memory of the service", [memory.service / 1e6], unit="MB", goal="value <= 200" * usual)
    yield row(f"{title}: most memory of the index's builder", [memory.children / 1e6], unit="MB")


class Asking:
    """Contexts of a service by one kept connection; ``milliseconds`` has how long the last answer took."""

    def __init__(self, sidecar: Sidecar) -> None:
        self._sidecar, self.milliseconds = sidecar, 0.0
        sidecar.held()

    def __call__(self, task: str, **more: Any) -> Any:
        path = "/api/context/issue-1/python-specialist?" + urlencode({"task": task, "max_bytes": BUDGET} | more)
        self.milliseconds, status, content = run(self._ask(request_bytes("GET", path, self._sidecar.token())))
        assert status == 200, content
        return json.loads(content)

    async def _ask(self, content: bytes) -> tuple[float, int, bytes]:
        (wire,) = await connect(self._sidecar.port, 1)
        began = time.perf_counter()
        status, body = await wire.ask(content)
        took = (time.perf_counter() - began) * 1000
        wire.transport.close()
        return took, status, body


def hits(asked: Asking, task: str, rounds: int) -> list[float]:
    """Milliseconds of answers from the cache."""
    asked(task)
    time.sleep(0.1)  # older than the resolution of a time stamp, so that it may be cached
    asked(task)
    found = []
    for _ in range(rounds):
        assert asked(task)["cache_hit"]
        found.append(asked.milliseconds)
    return found


def copied(tree: Path, folder: Path) -> Path:
    """A copy of ``tree``; not of hard links, since files that have several are looked at at each request."""
    return Path(shutil.copytree(tree, folder / "tree", symlinks=True))


def tasks(names: list[str]) -> Iterator[str]:
    """Tasks that nobody asked about before, out of words that the tree's paths hold."""
    words = sorted({word.lower() for name in names for word in re.findall(r"[A-Za-z]{4,}", name)})
    for number in itertools.count():
        yield "Handle {} when {} has no {}".format(
            *(words[(number * 7919 + step * 104_729) % len(words)] for step in range(3))
        )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def limit(root: Path, names: list[str]) -> float:
    """Milliseconds of ``git status`` and of reading and hashing ``names``."""

    def work() -> None:
        subprocess.run(
            ["git", "status", "--porcelain"],
            cwd=root,
            capture_output=True,
            env=clean_environment(GIT_OPTIONAL_LOCKS="0"),
        )
        for name in names:
            hashlib.sha256((root / name).read_bytes()).hexdigest()

    return statistics.median(timed(work)[0] for _ in range(5)) * 1000


class Memory(threading.Thread):
    """The most memory of a process, and of its children together, while it is looked at every 50 ms."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process, self._end = psutil.Process(pid), threading.Event()
        self.service = self.children = 0

    def __enter__(self) -> Memory:
        self.start()
        return self

    def run(self) -> None:
        while not self._end.wait(0.05):
            with contextlib.suppress(psutil.Error):
                self.service = max(self.service, self._process.memory_info().rss)
                self.children = max(
                    self.children, sum(child.memory_info().rss for child in self._process.children(recursive=True))
                )

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()


def edit(path: Path, number: int) -> None:
    """Save as editors do: a new file in the place of the old one."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(path.read_bytes() + f"\n# edited {number}\n".encode())
    fresh.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.context", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("trees", type=Path, nargs="+", metavar="TREE")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for tree in options.trees:
        with tempfile.TemporaryDirectory() as folder:
            print(table(measure(copied(tree, Path(folder)), Path(folder), options.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

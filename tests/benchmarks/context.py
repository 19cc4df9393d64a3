"""How fast contexts are, on trees of any size, each figure beside what it cannot be faster than.

    python -m tests.benchmarks.context TREE [TREE ...] [--rounds 15] [--no-plugins]

A TREE is a git repository; it is copied (hard links, where the system has them) and only the copy is changed. The limit
is what has to be done in any case: ``git status``, and reading and hashing the files that the answer gives.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
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

import psutil

from cco_sidecar import kind_of
from tests.conftest import Client, Service, clean_environment

BUDGET = 100_000


def copied(tree: Path, folder: Path) -> Path:
    """A copy of ``tree`` of which files may be replaced (not written into: they may be shared with the original)."""
    copy = folder / "tree"
    flags = ["-al"] if sys.platform == "linux" else ["-a"]
    if subprocess.run(["cp", *flags, str(tree), str(copy)], capture_output=True).returncode:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tree, copy, symlinks=True)
    return copy


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


def get(client: Client, task: str, issue: str = "issue-1", **more: Any) -> Any:
    answer = client.get(f"/api/context/{issue}/python-specialist", task=task, max_bytes=BUDGET, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def limit(root: Path, names: list[str]) -> float:
    """Seconds of ``git status`` and of reading and hashing ``names``."""

    def work() -> None:
        subprocess.run(
            ["git", "status", "--porcelain"],
            cwd=root,
            capture_output=True,
            env=clean_environment(GIT_OPTIONAL_LOCKS="0"),
        )
        for name in names:
            hashlib.sha256((root / name).read_bytes()).hexdigest()

    return statistics.median(timed(work)[0] for _ in range(5))


class Memory(threading.Thread):
    """The most memory of a process, and of its children together, while it is looked at every 20 ms."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process, self._end = psutil.Process(pid), threading.Event()
        self.service = self.children = 0

    def run(self) -> None:
        while not self._end.wait(0.02):
            with contextlib.suppress(psutil.Error):
                self.service = max(self.service, self._process.memory_info().rss)
                self.children = max(
                    self.children, sum(child.memory_info().rss for child in self._process.children(recursive=True))
                )

    def stop(self) -> None:
        self._end.set()
        self.join()


def edit(path: Path, number: int) -> None:
    """Save as editors do: a new file in the place of the old one."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(path.read_bytes() + f"\n# edited {number}\n".encode())
    fresh.replace(path)


def measure(tree: Path, rounds: int, arguments: list[str]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        root = copied(tree, Path(folder))
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=root, capture_output=True, env=clean_environment(), check=True
        ).stdout
        names = [os.fsdecode(name) for name in listed.split(b"\0") if name]
        sizes = [(root / name).lstat().st_size for name in names if kind_of(name) != "other"]
        indexed = sum(size for size in sizes if size <= 400_000)
        began = time.perf_counter()
        service = Service(root, Path(folder) / "storage", "--log-level", "warning", *arguments).start()
        assert service.process
        memory = Memory(service.process.pid)
        memory.start()
        try:
            client, task = service.client(), tasks(names)
            first = get(client, text := next(task))
            first_answer = time.perf_counter() - began
            slowest_health = 0.0
            while get(client, text, max_files=1)["context"]["metadata"]["index"] != "ready":
                slowest_health = max(slowest_health, timed(lambda: client.get("/health"))[0])
                time.sleep(0.05)
            ready = time.perf_counter() - began
            given = [file["path"] for file in first["context"]["relevant_files"]]
            cold = statistics.median(timed(lambda: get(client, next(task)))[0] for _ in range(rounds))
            edits = []
            for number in range(rounds):
                edit(root / given[number % len(given)], number)
                edits.append(timed(lambda: get(client, next(task)))[0])
            least = limit(root, given)
            get(client, text)
            time.sleep(0.1)  # older than the resolution of a time stamp, so that it may be cached
            get(client, text)
            hits = [timed(lambda: get(client, text)) for _ in range(rounds)]
            assert all(answer["cache_hit"] for _, answer in hits)
        finally:
            memory.stop()
            service.stop()
        hit = statistics.median(seconds for seconds, _ in hits)
        yield f"| {len(names):,} | {indexed / 1e6:.1f} | {first_answer:.2f} | {ready:.2f} | {indexed / 1e6 / ready:.1f} "
        yield f"| {1000 * slowest_health:.0f} "
        yield f"| {1000 * cold:.0f} | {1000 * statistics.median(edits):.0f} | {1000 * least:.0f} | {1000 * hit:.1f} "
        yield f"| {memory.service / 1e6:.0f} | {memory.children / 1e6:.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.context", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("trees", type=Path, nargs="+", metavar="TREE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-plugins", action="store_true", help="the module's own ranking")
    options = parser.parse_args()
    print(
        "Times of 100 kB contexts, medians. From the start of the service: first answer, and first of full quality (s); that is also"
    )
    print(
        "how long the index takes (MB/s of text). Slowest /health meanwhile, cold context on a warm index, context after an edit, its limit"
    )
    print(
        "(git status, reading and hashing the files given), and a cache hit (ms). Most memory of the service and of its children (MB).\n"
    )
    print(
        "| files | MB of text | first s | full s | MB/s | health ms | cold ms | edited ms | limit ms | hit ms | MB | children MB |"
    )
    print("|" + "---:|" * 12)
    for tree in options.trees:
        print("".join(measure(tree, options.rounds, ["--no-plugins"] if options.no_plugins else [])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the service costs while nobody asks, and how soon it answers: installed by pip, and as a script."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.benchmarks import Row, row
from tests.benchmarks.servers import ROOT, Program, running_bare, running_sidecar
from tests.benchmarks.trees import make_tree

GOALS = {"installed": 50, "as a script": 60}  # MB


def rows(quick: bool) -> Iterator[Row]:
    rounds, seconds = (1, 3) if quick else (7, 60)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root, copies = make_tree(folder / "repository", 100), programs(folder)
        yield from starts(folder, root, copies, rounds)
        for words, program in copies.items():
            place = Path(tempfile.mkdtemp(dir=folder))
            with running_sidecar(place, root=root, program=program, probed=False) as sidecar:
                sidecar.get("/health")
                time.sleep(2)  # what a start leaves to be done is done
                memory = sidecar.memory() / 1e6
                yield row(f"idle, {words}: resident memory", [memory], unit="MB", goal=f"value <= {GOALS[words]}")
                if words == "installed":
                    yield from idle(sidecar.process.pid, seconds)


def starts(folder: Path, root: Path, copies: dict[str, Program], rounds: int) -> Iterator[Row]:
    """Seconds from the start of a process to its first answer, the storage being new."""
    times: dict[str, list[float]] = {"bare": []}
    for number in range(rounds + 1):
        began = time.perf_counter()
        with running_bare() as bare:
            with contextlib.suppress(OSError):  # a 404
                urllib.request.urlopen(f"http://127.0.0.1:{bare.port}/")
            times["bare"] += [time.perf_counter() - began] * bool(number)  # the first compiles and reads from the disk
        for words, program in copies.items():
            place = Path(tempfile.mkdtemp(dir=folder))
            began = time.perf_counter()
            with running_sidecar(place, root=root, program=program, probed=False) as sidecar:
                sidecar.get("/health")
                times.setdefault(words, []).extend([time.perf_counter() - began] * bool(number))
    for words in copies:
        yield row(f"start to the first answer, {words}", times[words], times["bare"], unit="s", goal="value <= 0.4")


def idle(pid: int, seconds: float) -> Iterator[Row]:
    """What a process and its children use while nobody asks."""
    before, slept = processor_seconds(pid), sleeps(pid)
    time.sleep(seconds)
    used, counts = (processor_seconds(pid) - before) / seconds, sleeps(pid)
    yield row(f"idle for {seconds:.0f} s: one core's share", [100 * used], unit="%", goal="value <= 0.1")
    if counts:
        rate = sum(count - slept.get(thread, 0) for thread, count in counts.items()) / seconds
        yield row(f"idle for {seconds:.0f} s: wake-ups", [rate], unit="/s")


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def processor_seconds(pid: int) -> float:
    """Of a process and its children, those that have ended included."""
    return float(sum(sum(process.cpu_times()[:4]) for process in family(pid)))


def sleeps(pid: int) -> dict[str, int]:
    """How often each living thread of a process and of its children slept; empty where the system does not say."""
    found = {}
    for file in [file for process in family(pid) for file in Path(f"/proc/{process.pid}/task").glob("*/status")]:
        with contextlib.suppress(OSError):  # a thread that has just ended
            count = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", file.read_text(), re.MULTILINE)
            found[file.parent.name] = int(count[1]) if count else 0
    return found


def programs(folder: Path) -> dict[str, Program]:
    """Copies of the program as pip installs it and as a script, each with nothing beside it but what it needs:
    what else is installed here would be found and loaded.
    """
    packages, installed, script = folder / "packages", folder / "installed", folder / "script"
    for place in (packages, installed, script):
        place.mkdir()
    for name in needed("cco-sidecar"):
        link(name, packages)
    for place, plugins, schemas in (
        (installed, "cco_sidecar_plugins", "cco_sidecar_schemas"),
        (script, "plugins", "vendor_schemas"),
    ):
        shutil.copy(ROOT / "cco_sidecar.py", place)
        shutil.copytree(ROOT / "plugins", place / plugins, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "vendor_schemas", place / schemas)
    start = "import sys; sys.argv[0] = 'cco'; from cco_sidecar import main; sys.exit(main())"
    return {
        "installed": Program((sys.executable, "-S", "-c", start), f"{installed}:{packages}"),
        "as a script": Program((sys.executable, "-S", str(script / "cco_sidecar.py")), str(packages)),
    }


def needed(name: str) -> set[str]:
    """The packages that ``name`` needs without its extras, and those that they need."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for requirement in importlib.metadata.requires(waiting.pop()) or []:
            package = re.split(r"[\s<>=!~;\[(]", requirement)[0]
            for_others = "extra ==" in requirement or "python_version <" in requirement  # than this program
            if not for_others and package not in found and installed_here(package):
                found.add(package)
                waiting.append(package)
    return found


def installed_here(package: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(package))
    return False


def link(package: str, folder: Path) -> None:
    """Put the package's files into ``folder`` by links."""
    distribution = importlib.metadata.distribution(package)
    for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        with contextlib.suppress(FileExistsError):
            (folder / top).symlink_to(Path(str(distribution.locate_file(top))))

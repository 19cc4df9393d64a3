"""What plugins/README.md says of many machines, typed: three servers and three sidecars, from nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from cluster import server_program
from conftest import ROOT, clean_environment, git, make_repository, until
from test_readme import read_steps, shows

CHAPTER = [step for step in read_steps((ROOT / "plugins/README.md").read_text()) if step.section == "cluster"]
SETUP = [step for step in CHAPTER if step.shown is None]
SHOWN = [step for step in CHAPTER if step.shown is not None]


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the chapter's scripts have been typed, once all three sidecars answer."""
    folder = tmp_path_factory.mktemp("team")
    make_repository(folder / "shop")
    script = "\n".join(step.typed for step in SETUP) + "\nwait\n"
    with open(folder / "terminal", "wb") as terminal:
        shell = subprocess.Popen(["bash", "-e", "-c", script], cwd=folder, stdout=terminal, stderr=terminal,
                                 env=environment(folder), start_new_session=True)  # fmt: skip
    try:
        for number in (1, 2, 3):
            until(lambda number=number: answers(f"http://127.0.0.1:301{number}/health"), 60)
        yield folder
    finally:
        with contextlib.suppress(ProcessLookupError):
            family = psutil.Process(shell.pid).children(recursive=True)
            os.killpg(shell.pid, signal.SIGTERM)
            _, left = psutil.wait_procs(family, 20)
            for process in left:
                process.kill()
        shell.wait()


def environment(folder: Path) -> dict[str, str]:
    """A home of its own; ``cco`` and ``nats-server`` are those of this interpreter."""
    path = os.pathsep.join([str(Path(sys.executable).parent), str(Path(server_program()).parent), os.environ["PATH"]])
    return clean_environment(PATH=path, HOME=str(folder / "home"), COLUMNS="120")


def answers(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(url, timeout=2).status_code == 200
    return False


def test_what_is_published_at_one_machine_is_there_at_the_others(team: Path) -> None:
    *before, last = SHOWN
    typed = "".join(f"{step.typed.strip()}; echo =====\n" for step in before)
    *printed, _ = str(typed_at(team, typed)).split("=====\n")
    for step, output in zip(before, printed, strict=True):
        assert shows(step.shown or "", output), (step.typed, output)
    seen = until(lambda: typed_at(team, f"cd machine-3; {last.typed}", "deployed"), 20)
    assert shows(last.shown or "", seen), seen


def test_a_machine_whose_server_is_lost_goes_on(team: Path) -> None:
    """What the chapter promises of the loss of one of three servers, at the terminal."""
    (server,) = [p for p in psutil.process_iter(["cmdline", "cwd"])
                 if "nats-2.conf" in (p.info["cmdline"] or []) and p.info["cwd"] == str(team)]  # fmt: skip
    server.kill()
    publish = "cd machine-2; cco events publish survived --idempotency-key one --format json"
    until(lambda: typed_at(team, publish, '"published": true'), 40)
    seen = until(lambda: typed_at(team, "cd machine-1; cco events list --format json", "survived"), 20)
    assert seen.count("survived") == 1
    assert git(team / "machine-1", "status", "--porcelain") == ""


def typed_at(team: Path, commands: str, word: str = "") -> str | None:
    """What these commands print at a terminal that has read team.env; None where one fails or ``word`` is missing."""
    found = subprocess.run(["bash", "-e", "-c", f". ./team.env\n{commands}"], cwd=team, env=environment(team),
                           capture_output=True, text=True, timeout=60)  # fmt: skip
    return found.stdout if found.returncode == 0 and word in found.stdout else None

"""The tests' own way to start the program: a fork behaves as what a new interpreter makes of the same words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import MODULE, Service, clean_environment
from forkserver import Forkserver, Popen, RealPopen

pytestmark = pytest.mark.skipif(str(MODULE) not in Forkserver.of, reason="CCO_TEST_FORK=0")


def started(*words: str, python: tuple[str, ...] = (), **keywords: Any) -> Popen:
    keywords = {"env": clean_environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | keywords
    return Popen([sys.executable, *python, str(MODULE), *words], **keywords)


@pytest.mark.parametrize("words", ["--version", "agent types --format json", "token --tipe x", "health", "plugins", ""])
def test_output_and_exit_code_are_the_same(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for popen in (Popen, RealPopen):
        monkeypatch.setattr(subprocess, "Popen", popen)
        environment = clean_environment(XDG_STATE_HOME=str(tmp_path / "state"), TZ="Asia/Tokyo", CCO_SIDECAR_PORT="x")
        ended = subprocess.run(
            [sys.executable, str(MODULE), *words.split()],
            cwd=tmp_path, env=environment, input=b"", capture_output=True, timeout=30,
        )  # fmt: skip
        told.append((ended.returncode, ended.stdout, ended.stderr))
    assert told[0] == told[1] and any(told[0]), told


def test_it_is_a_process_with_a_folder_variables_and_a_session_of_its_own(service: Service, tmp_path: Path) -> None:
    assert isinstance(service.process, Popen) and service.process._server
    seen = psutil.Process(service.process.pid)
    assert (seen.cwd(), seen.num_fds() > 3, os.getpgid(seen.pid)) == (str(service.root), True, os.getpgid(0))
    (tmp_path / "root").mkdir()
    words = ["serve", "--storage", str(tmp_path / "st"), "--port", "0"]
    with started(*words, cwd=tmp_path / "root", start_new_session=True) as own:
        assert own.stdout and b"Orchestration sidecar" in own.stdout.readline() and os.getsid(own.pid) == own.pid
        with pytest.raises(subprocess.TimeoutExpired):
            own.wait(0.05)
        assert own.poll() is None
        own.send_signal(signal.SIGKILL)
        assert own.wait() == own.poll() == -signal.SIGKILL


@pytest.mark.parametrize("differs", [
    {"python": ("-u",)}, {"env": clean_environment(PYTHONIOENCODING="ascii")}, {"env": clean_environment(LC_ALL="C")},
    {"preexec_fn": lambda: None},
])  # fmt: skip
def test_what_an_interpreter_looks_at_when_it_starts_gets_one(differs: dict[str, Any]) -> None:
    with started("--version", **differs) as other:
        assert other._server is None and other.communicate()[0].startswith(b"cco ") and other.returncode == 0

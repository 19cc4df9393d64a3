"""What the tests of agents share: how to start and ask them, and the proof that nothing of them is left."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import MODULE, ROOT, Client, Service, marked_processes, until

SAMPLE = [sys.executable, str(ROOT / "tests/sample_agent.py")]
COMMAND = ("--agent-command", json.dumps(SAMPLE))
ENDED = ("completed", "failed", "killed", "timeout", "lost")


# How long the daemons of these tests sleep. They have shed their environment, so this odd number is what they are known
# by.
NAP = f"600.{os.getpid():08}"


def agents_left() -> list[psutil.Process]:
    """Living processes of agents: those that carry the tests' mark and an agent's name, and daemons that have shed
    everything.

    What the service runs for itself (git, the builder of an index) carries the mark alone, and takes its time on a busy
    machine.
    """
    found = []
    for process in marked_processes():
        with contextlib.suppress(psutil.Error):
            if "AGENT_ID" in process.environ():
                found.append(process)
    return found + [process for process in daemons_left() if process not in found]


def daemons_left() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:] == [NAP] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def keepers(service: Service) -> list[psutil.Process]:
    """The living keepers of a storage's agents."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(service.storage / "agents") in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture(autouse=True)
def nothing_left(service: Service) -> Iterator[None]:
    """After every test no process of its agents is left: those that it let run are ended by the service, thoroughly."""
    yield
    architect = service.client()
    for token in (service.storage / "agents").glob("*/token"):  # those that run have one
        architect.delete(f"/api/agents/{token.parent.name}")
    alone = Service.module != MODULE or "--no-plugins" in service.arguments  # where there is no order for that
    for process in agents_left() if alone else ():
        with contextlib.suppress(psutil.Error):
            process.kill()
    try:
        until(lambda: not agents_left())
    # a daemon that sheds everything would outlive its test by ten minutes, and every later test would fail for it
    finally:
        for process in agents_left():
            with contextlib.suppress(psutil.Error):
                process.kill()


def request(
    task: str = "hang", issue: str = "issue-1", agent_type: str = "python-specialist", **more: Any
) -> dict[str, Any]:
    return {"agent_type": agent_type, "issue_id": issue, "task": task} | more


def spawn(client: Client, task: str = "hang", issue: str = "issue-1", **more: Any) -> dict[str, Any]:
    answer = client.post("/api/agents/spawn", request(task, issue, **more))
    assert answer.status_code == 201, answer.text
    return answer.json()  # type: ignore[no-any-return]


def status(client: Client, agent_id: str) -> dict[str, Any]:
    answer = client.get(f"/api/agents/{agent_id}/status")
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def state(client: Client, agent_id: str, *wanted: str) -> dict[str, Any]:
    """The agent's status once it is in one of the wanted states (any ended one by default)."""
    return until(lambda: (found := status(client, agent_id))["state"] in (wanted or ENDED) and found)  # type: ignore[no-any-return]


def output(client: Client, agent_id: str) -> str:
    file = folder_of(Service.by_url[client.url], agent_id) / "output.log"
    if file.exists():  # no plugin keeps or reads it
        return file.read_text()
    return client.get(f"/api/agents/{agent_id}/logs").json()["text"]  # type: ignore[no-any-return]


def says(client: Client, agent_id: str, text: str) -> None:
    until(lambda: text in output(client, agent_id))


def tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may be collected between two looks
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def folder_of(service: Service, agent_id: str) -> Path:
    return service.storage / "agents" / agent_id

"""The module's own owner of agents' processes: what differs from the keeper's. (What is the same, test_agents shows of both.)"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import time
import types
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from agent_harness import (
    COMMAND,
    agents_left,
    folder_of,
    nothing_left,
    output,
    request,
    says,
    spawn,
    state,
    status,
)
from conftest import Client, Service, serving, until

from cco_sidecar import AgentCommand, Agents, Running, load_settings

__all__ = ["nothing_left"]
ALONE = ("--no-plugins", *COMMAND)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("processes"), *ALONE) as running:
        yield running


@pytest.mark.parametrize(
    ("task", "ends_as", "exit_code", "by_signal"),
    [("succeed", "completed", 0, None), ("fail", "failed", 3, None), ("die", "failed", -signal.SIGKILL, 9)],
)
def test_an_exit_code_is_known(
    service: Service, architect: Client, issue: str, task: str, ends_as: str, exit_code: int, by_signal: int | None
) -> None:
    spawned = spawn(architect, task, issue)
    ended = state(architect, spawned["agent_id"])
    assert (ended["state"], ended["exit_code"], ended["signal"]) == (ends_as, exit_code, by_signal)
    assert "usage" not in ended  # nothing was measured
    (told,) = architect.wait("agent_exited", filter=f"agent_id:{spawned['agent_id']}", timeout=20_000)["events"]
    assert told["data"]["exit_code"] == exit_code and "cpu_seconds" not in told["data"]
    assert not psutil.pid_exists(spawned["process_id"])


def test_an_agent_leads_a_session_and_writes_into_a_file_of_its_users_alone(
    service: Service, architect: Client, issue: str
) -> None:
    spawned = spawn(architect, "hang", issue)
    says(architect, spawned["agent_id"], "hanging")
    assert os.getsid(spawned["process_id"]) == spawned["process_id"]
    file = folder_of(service, spawned["agent_id"]) / "output.log"
    assert (file.stat().st_mode & 0o777, file.read_text()) == (0o600, "hanging\n")
    os.kill(spawned["process_id"], signal.SIGTERM)
    assert state(architect, spawned["agent_id"])["signal"] == signal.SIGTERM


def test_output_of_a_run_without_plugins_is_read_whole_by_tail_and_onwards_later(
    make_service: Callable[..., Service],
) -> None:
    service = make_service(*ALONE)
    agent_id = spawn(service.client(), "write")["agent_id"]
    state(service.client(), agent_id)
    service.stop()
    service.arguments = tuple(word for word in service.arguments if word != "--no-plugins")
    architect = service.start().client()
    assert state(architect, agent_id)["output_tail"][-1] == "line 19999"
    path = f"/api/agents/{agent_id}/logs"
    whole = architect.get(path).json()
    assert whole["text"] == "".join(f"line {number}\n" for number in range(20_000))
    assert architect.get(path, tail=2).json()["text"] == "line 19998\nline 19999\n"
    onwards = architect.get(path, since=whole["next_offset"] - 11).json()
    assert (onwards["text"], onwards["offset"]) == ("line 19999\n", whole["next_offset"] - 11)
    for asked in ({"timestamps": True}, {"since": "2026-01-01"}):
        answer = architect.get(path, **asked)
        assert (answer.status_code, answer.json()["code"]) == (400, "REQ_001") and "keeper" in answer.text


@pytest.mark.parametrize("down", [Service.stop, Service.kill], ids=["stop", "kill -9"])
def test_agents_outlive_the_service_and_are_adopted(
    make_service: Callable[..., Service], tmp_path: Path, down: Callable[[Service], Any]
) -> None:
    service, gate = make_service(*ALONE), tmp_path / "gate"
    client = service.client()
    lives, gone, stored = (spawn(client, task)["agent_id"] for task in ("hang", "hang", "store_and_hang"))
    talks = spawn(client, "pieces", environment={"TEST_GATE": str(gate)})["agent_id"]
    says(client, stored, "stored"), says(client, talks, "one ")
    pids = {agent_id: status(client, agent_id)["pid"] for agent_id in (lives, gone, stored, talks)}
    down(service)
    for agent_id in (gone, stored):
        os.kill(pids[agent_id], signal.SIGKILL)
        until(lambda agent_id=agent_id: not psutil.pid_exists(pids[agent_id]))
    gate.touch()
    service.start()
    client = service.client()
    assert (status(client, lives)["state"], status(client, lives)["pid"]) == ("running", pids[lives])
    for agent_id, ends_as in ((gone, "lost"), (stored, "lost"), (talks, "lost")):
        ended = state(client, agent_id)
        assert (ended["state"], ended["exit_code"]) == (ends_as, None)
    assert output(client, talks) == "one line\nanother é\n"
    os.kill(pids[lives], signal.SIGTERM)
    assert state(client, lives)["state"] == "lost"
    assert not agents_left()


def test_a_process_that_the_ledger_does_not_know_yet_is_ended_and_a_strangers_number_is_not(
    make_service: Callable[..., Service],
) -> None:
    """As after a kill between a start and its note; and with this test's number in the place of the agent's."""
    service = make_service(*ALONE)
    unknown, forged = (spawn(service.client(), "family")["agent_id"] for _ in range(2))
    for agent_id in (unknown, forged):
        says(service.client(), agent_id, "family")
    service.kill()
    with closing(sqlite3.connect(service.storage / "sidecar.db")) as database, database:
        for agent_id, number in ((unknown, None), (forged, os.getpid())):
            database.execute("update agent set pid = ? where id = ?", (number, agent_id))
    service.start()
    assert [state(service.client(), agent_id)["state"] for agent_id in (unknown, forged)] == ["lost", "lost"]
    assert not agents_left()


def test_a_process_that_starts_when_its_spawn_was_given_up_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = subprocess.Popen

    def late(*arguments: Any, **named: Any) -> subprocess.Popen[bytes]:
        time.sleep(0.5)
        return popen(*arguments, **named)

    async def scene() -> int:
        settings = load_settings({"root": str(tmp_path), "storage": str(tmp_path / "storage")}, {})
        storage = types.SimpleNamespace(write=lambda job: asyncio.sleep(0))
        tokens, hooks = types.SimpleNamespace(revoked=set()), types.SimpleNamespace(part=lambda base, _: base)
        launcher: Any = types.SimpleNamespace(tokens=tokens, hooks=hooks, settings=settings)
        agents = Agents(storage, launcher, None)  # type: ignore[arg-type]
        running = Running({"id": "agent-1", "pid": None}, tmp_path / "agent-1")
        running.folder.mkdir()
        try:
            async with asyncio.timeout(0.1):
                await agents.processes.start(running, AgentCommand(["sleep", "60"]))
        except TimeoutError as error:
            await agents._give_up(running, error)
        async with asyncio.timeout(10):
            while running.child is None or running.child.poll() is None:
                await asyncio.sleep(0.01)
        return running.child.returncode

    monkeypatch.setattr(subprocess, "Popen", late)
    assert asyncio.run(scene()) == -signal.SIGKILL


@pytest.mark.parametrize("more", [(), ("--no-plugins",)], ids=["with plugins", "without"])
def test_a_program_that_cannot_be_run_is_said_and_leaves_nothing(
    make_service: Callable[..., Service], tmp_path: Path, more: tuple[str, ...]
) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF" + bytes(100))
    broken.chmod(0o755)
    service = make_service(*more, "--agent-command", json.dumps([str(broken)]))
    answer = service.client().post("/api/agents/spawn", request())
    assert (answer.status_code, answer.json()["code"]) == (500, "AGT_001")
    assert "broken: " in answer.json()["message"] and str(tmp_path) not in answer.text
    assert list((service.storage / "agents").iterdir()) == []

"""Agents can be trusted: whatever they do and whoever is killed, all of them is found, ended, measured and written
down.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jwt
import psutil
import pytest
import requests
from agent_harness import (
    COMMAND,
    NAP,
    agents_left,
    alive,
    daemons_left,
    folder_of,
    keepers,
    nothing_left,
    output,
    request,
    says,
    spawn,
    state,
    status,
)  # fmt: skip
from conftest import ROOT, Client, Service, clean_environment, git_alone, make_repository, plugin, serving, until
from msgspec.structs import replace

from cco_sidecar import MB, AgentCommand, Pool, Records, Running, Sidecar, StorageError, load_hooks, load_settings

__all__ = ["nothing_left"]
keeper = plugin("keeper")
Proof, Seen, Snapshot, StampedOutput = keeper.Proof, keeper.Seen, keeper.Snapshot, keeper.StampedOutput
OutputWriter = plugin("_keeper_program").OutputWriter
ONE_SECOND = {"CCO_SIDECAR_LOG_LEVEL": "info", "NAP": NAP}
MORE = ("--max-agents", "60", "--max-agents-per-issue", "1000")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for the tests of this module, with the sample agent as its agents."""
    with serving(tmp_path_factory.mktemp("trust"), *COMMAND, *MORE, env=ONE_SECOND) as running:
        yield running
    until(lambda: not keepers(running))
    complaints = running.storage / "keeper.log"
    assert not complaints.exists() or complaints.read_text() == ""


def claims_of(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


# -- the proof that the tests would see a leak


def test_a_process_that_is_left_is_seen_whether_it_kept_its_environment_or_not() -> None:
    kept = subprocess.Popen(["/bin/sleep", "600"], env=clean_environment(AGENT_ID="x"), start_new_session=True)
    shed = subprocess.Popen(["/bin/sleep", NAP], env={}, start_new_session=True)
    try:
        until(lambda: {kept.pid, shed.pid} <= {process.pid for process in agents_left()})
    finally:
        for process in (kept, shed):
            process.kill()
            process.wait()
    assert not agents_left()


# -- whose a process is


def seen(pid: int, parent: int = 1, *, birth: str = "b", session: int = 0, mark: int = 0, marker: str = "") -> Seen:
    return Seen(pid, birth, float(pid), parent, session or pid, mark, marker, 0.0, 0, 0.0)


@pytest.mark.parametrize(
    ("processes", "proof", "members"),
    [
        ([seen(10), seen(11)], Proof(7, "/t"), []),
        ([seen(10), seen(11)], Proof(7, "/t", (10, "b")), [10]),
        ([seen(10, birth="later")], Proof(7, "/t", (10, "b")), []),
        ([seen(10), seen(11, 10), seen(12, 11), seen(13, 1)], Proof(7, "/t", (10, "b")), [10, 11, 12]),
        ([seen(10), seen(11, session=10)], Proof(7, "/t", (10, "b")), [10, 11]),
        ([seen(10, birth="later"), seen(11, session=10)], Proof(7, "/t", (10, "b")), []),
        ([seen(11, session=10)], Proof(7, "/t", (10, "b")), []),
        ([seen(11, mark=7), seen(12, mark=8), seen(13, 11)], Proof(7, "/t"), [11, 13]),
        ([seen(11, marker="/t"), seen(12, marker="/u")], Proof(7, "/t"), [11]),
        ([seen(11), seen(12)], Proof(7, "/t", known={(11, "b"), (12, "before")}), [11]),
        ([seen(10, 11), seen(11, 10)], Proof(7, "/t", (10, "b")), [10, 11]),
    ],
    ids=[
        "nothing proves nothing", "the first one", "a reused number", "descendants", "its session while its leader lives",
        "a session whose number was reused", "a session without its leader", "its mark", "its token file", "one seen before", "a circle",
    ],
)  # fmt: skip
def test_only_what_is_proved_to_be_an_agents_is_its(processes: list[Seen], proof: Proof, members: list[int]) -> None:
    assert sorted(item.pid for item in Snapshot(processes).members(proof)) == members


def test_a_signal_reaches_exactly_the_process_that_was_seen() -> None:
    look = keeper.look_at_linux if sys.platform == "linux" else keeper.look_at_others
    child = subprocess.Popen(["/bin/sleep", NAP])
    try:
        found = until(lambda: look({child.pid}).get(child.pid))
        earlier = replace(found, birth="another one's")
        assert earlier.send_signal(signal.SIGKILL) is False
        assert child.poll() is None
        assert found.send_signal(signal.SIGKILL) is True
        assert child.wait(5) == -signal.SIGKILL
        assert found.send_signal(signal.SIGKILL) is False
    finally:
        child.kill()


def has_begun(pid: int) -> bool:
    """Whether the process is ``sleep`` with its environment, which the kernel tells a moment later than its name."""
    process = psutil.Process(pid)
    return process.name() == "sleep" and bool(process.environ())


def test_both_ways_to_look_at_processes_agree() -> None:
    child = subprocess.Popen(["/bin/sleep", NAP], env={"CCO_TOKEN_FILE": "/t"}, start_new_session=True)
    try:
        until(lambda: has_begun(child.pid))
        portable = keeper.look_at_others(None)[child.pid]
        assert (portable.parent, portable.session, portable.marker) == (os.getpid(), child.pid, "/t")
        if sys.platform == "linux":
            linux = keeper.look_at_linux(None)[child.pid]
            assert (linux.parent, linux.session, linux.marker) == (os.getpid(), child.pid, "/t")
            assert abs(linux.memory - portable.memory) < 1_000_000 and abs(linux.cpu - portable.cpu) < 1
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    "environment", [{"CCO_TOKEN_FILE": "/t"}, {"A": "x" * 70_000, "CCO_TOKEN_FILE": "/t"}, {"MY_CCO_TOKEN_FILE": "/t"}]
)
@pytest.mark.skipif(sys.platform != "linux", reason="of /proc")
def test_the_marker_is_found_wherever_it_stands_in_the_environment(environment: dict[str, str]) -> None:
    child = subprocess.Popen(["/bin/sleep", NAP], env=environment)
    try:
        until(lambda: has_begun(child.pid))
        assert keeper.look_at_linux({child.pid})[child.pid].marker == environment.get("CCO_TOKEN_FILE", "")
    finally:
        child.kill()
        child.wait()


HARDENED = """
import asyncio, ctypes, os, signal, sys, types
from pathlib import Path
import cco_sidecar

keeper = cco_sidecar.import_file(Path(sys.argv[1]))
owner, kind, program, prctl = *sys.argv[2:4], os.open(sys.argv[4], os.O_PATH), ctypes.CDLL(None).prctl
if os.geteuid() == 0:  # who has no files that are root's in /proc
    os.setuid(65534)
told, tell = os.pipe()
first = os.fork()
if not first:
    os.setsid()
    prctl(4, 1, 0, 0, 0)
    if kind == "a child asks for it" and os.fork():
        signal.pause()
    os.write(tell, str(os.getpid()).encode())
    if kind == "its program cannot be read":
        os.execve(program, ["sleep", "1000"], {})
    prctl(4, 0, 0, 0, 0)
    signal.pause()
hidden = int(os.read(told, 10))
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.alarm(30)
try:
    while os.stat(f"/proc/{hidden}/stat").st_uid == os.geteuid():
        os.sched_yield()
    if owner == "keeper":
        identity = keeper.look_at_linux({first})[first].identity
        for item in keeper.Snapshot(keeper.look_at_linux(None).values()).members(keeper.Proof(1, "/nowhere", identity)):
            assert item.send_signal(signal.SIGKILL)
    else:
        row = {"id": "a", "pid": first, "birth": cco_sidecar.birth_of(first)}
        processes = cco_sidecar.Processes(types.SimpleNamespace(root="/"))
        asyncio.run(asyncio.wait_for(processes.end(cco_sidecar.Running(row, Path("/nowhere"))), 20))
    while cco_sidecar.birth_of(hidden):
        os.sched_yield()
finally:
    for pid in {hidden, first}:
        if cco_sidecar.birth_of(pid):
            os.kill(pid, signal.SIGKILL)
"""


@pytest.mark.parametrize("owner", ["keeper", "alone"])
@pytest.mark.parametrize("kind", ["it asks for it", "a child asks for it", "its program cannot be read"])
@pytest.mark.skipif(sys.platform != "linux", reason="of /proc")
def test_processes_that_let_nobody_look_into_them_are_found_and_ended(owner: str, kind: str, tmp_path: Path) -> None:
    program = Path(shutil.copy("/bin/sleep", tmp_path))
    program.chmod(0o111)
    words = [str(ROOT / "plugins/agents/keeper.py"), owner, kind, str(program)]
    subprocess.run([sys.executable, "-c", HARDENED, *words], check=True, timeout=60)


OTHER = "setpriv --reuid 65534 --clear-groups /bin/sleep $NAP"


@pytest.mark.parametrize("line", [f"exec {OTHER}", f"{OTHER} & wait", f"setsid -f {OTHER}; sleep $NAP"])
@pytest.mark.skipif(not shutil.which("setpriv") or os.geteuid() != 0, reason="only root becomes another user")
def test_what_an_agent_of_roots_service_runs_as_another_user_is_found_and_ended(
    make_service: Callable[..., Service], line: str
) -> None:
    service = make_service("--agent-command", json.dumps(["/bin/sh", "-c", line]), env={"NAP": NAP})
    agent_id = spawn(service.client())["agent_id"]
    until(lambda: 65534 in users_of_naps())
    assert service.client().delete(f"/api/agents/{agent_id}").json()["ending"] is True
    assert state(service.client(), agent_id)["state"] == "killed"
    assert users_of_naps() == []


def users_of_naps() -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline() == ["/bin/sleep", NAP]:
                found.append(process.uids().real)
    return found


@pytest.mark.parametrize("number", [2, 20, 119])
def test_all_who_ask_for_a_census_meanwhile_share_the_next_one(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = list[float](), threading.Event()

    def look(pids: set[int] | None) -> dict[int, Any]:
        began.append(time.monotonic())
        go_on.wait()
        return {}

    async def crowd() -> None:
        census = keeper.Census(keeper.Keeper(Path("/"), Path("/"), print, print), Pool("processes", 8, 20))
        first = asyncio.create_task(census.look())
        while not began:
            await asyncio.sleep(0)
        asked, late = time.monotonic(), [asyncio.create_task(census.look()) for _ in range(number)]
        await asyncio.sleep(0)
        late[0].cancel()  # the others get theirs
        go_on.set()
        await asyncio.gather(first, *late[1:])
        assert len(began) == 2 and began[1] >= asked

    monkeypatch.setattr(keeper, "look_at", look)
    asyncio.run(crowd())


@pytest.mark.parametrize("problem", ["its pipe is broken", "no room", ""])
def test_a_keeper_that_dies_while_an_order_is_sent_is_told_to_who_ordered_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    left: list[dict[str, Any]] = []
    answers = list[weakref.ref[Any]]()

    def send(mine: Any, order: dict[str, Any]) -> None:
        answers.append(weakref.ref(mine._starting["a"]))
        mine._loop.call_soon_threadsafe(mine._lost)
        if problem:
            raise OSError(0, problem)

    async def order() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: left.append(context))
        mine = keeper.Keeper(tmp_path, tmp_path, print, lambda: None)
        await mine.open()
        with pytest.raises(OSError, match=problem or "has died"):
            await mine.start_agent("a", AgentCommand([sys.executable]), 0)
        while answers[0]():  # what nobody has looked at is told when it goes
            gc.collect()
            await asyncio.sleep(0)

    monkeypatch.setattr(keeper.Keeper, "_send", send)
    asyncio.run(order())
    assert not left


def test_of_an_agents_processes_those_without_its_mark_are_noted(tmp_path: Path) -> None:
    kept = keeper.KeptProcess(Running({}, tmp_path))
    kept.measure([seen(10, mark=kept.proof.mark), seen(11, mark=7), seen(12)], time.time())
    assert kept.unmarked == {(11, "b"), (12, "b")} and kept.proof.known == kept.unmarked | {(10, "b")}


# -- ends


def test_a_daemon_that_shed_everything_is_ended_by_order(architect: Client, issue: str) -> None:
    spawned = spawn(architect, "vanish_and_hang", issue)
    says(architect, spawned["agent_id"], "vanished")
    (daemon,) = until(daemons_left)
    assert daemon.environ() == {}
    architect.delete(f"/api/agents/{spawned['agent_id']}")
    assert state(architect, spawned["agent_id"])["state"] == "killed"
    assert not alive([daemon])


def test_a_daemon_that_an_agent_left_behind_is_ended_with_it(architect: Client, issue: str) -> None:
    assert state(architect, spawn(architect, "vanish", issue)["agent_id"])["state"] == "completed"
    assert not daemons_left()


@pytest.mark.parametrize("agent_too", [False, True], ids=["the agent lives", "the agent was killed meanwhile"])
def test_a_daemon_is_found_again_after_a_crash(make_service: Callable[..., Service], agent_too: bool) -> None:
    service = make_service(*COMMAND, env=ONE_SECOND)
    agent_id = spawn(service.client(), "vanish_and_hang")["agent_id"]
    says(service.client(), agent_id, "vanished")
    pid = status(service.client(), agent_id)["pid"]
    (daemon,) = until(daemons_left)
    service.kill()
    assert alive([daemon])
    if agent_too:
        psutil.Process(pid).kill()
    service.start()
    if agent_too:
        assert state(service.client(), agent_id)["exit_code"] == -signal.SIGKILL
    else:
        assert status(service.client(), agent_id)["state"] == "running"
        service.client().delete(f"/api/agents/{agent_id}")
        assert state(service.client(), agent_id)["state"] == "killed"
    assert not alive([daemon])


def test_many_orders_at_once_end_an_agent_once(service: Service, architect: Client, issue: str) -> None:
    agent_id = spawn(architect, "hang", issue)["agent_id"]
    headers = {"Authorization": f"Bearer {architect.token}"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda _: requests.delete(f"{service.url}/api/agents/{agent_id}", headers=headers, timeout=30), range(8)
            )
        )
    assert {answer.status_code for answer in answers} == {202}
    state(architect, agent_id, "killed")
    told = architect.wait("*", filter=f"agent_id:{agent_id}", timeout=20_000)["events"]
    assert [event["event_type"] for event in told] == ["agent_exited"]


def test_an_order_that_is_cut_off_while_it_is_written_down_is_carried_out() -> None:
    async def scene() -> bool:
        writing = asyncio.Event()

        async def write(_: object) -> None:
            writing.set()
            await asyncio.Event().wait()

        agents = plugin("end").EndedAgents.__new__(plugin("end").EndedAgents)
        running = Running({"id": "a-1"}, Path())
        agents.storage, agents.active = SimpleNamespace(write=write), {"a-1": running}
        ordering = asyncio.create_task(agents.end("a-1"))
        await writing.wait()
        ordering.cancel()
        await asyncio.gather(ordering, return_exceptions=True)
        return running.ended_as == "killed" and running.ending.is_set()

    assert asyncio.run(scene())


def test_an_ordered_end_survives_a_crash(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND)
    agent_id = spawn(service.client(), "ignore")["agent_id"]
    says(service.client(), agent_id, "ignoring")
    assert service.client().delete(f"/api/agents/{agent_id}").status_code == 202
    service.kill()
    assert agents_left()
    service.start()
    assert state(service.client(), agent_id)["state"] == "killed"
    assert not agents_left()


@pytest.mark.parametrize("stop_agents", [True, False])
def test_spawns_during_a_stop_leave_whole_agents_or_none(
    make_service: Callable[..., Service], stop_agents: bool
) -> None:
    service = make_service(*COMMAND, *MORE, *(["--stop-agents"] if stop_agents else []))
    token, stopped = service.token(), False

    def spawn_on(number: int) -> None:
        with contextlib.suppress(requests.RequestException):
            while not stopped:
                headers = {"Authorization": f"Bearer {token}"}
                requests.post(
                    f"{service.url}/api/agents/spawn",
                    json=request(issue=f"issue-{number}"),
                    headers=headers,
                    timeout=30,
                )

    with ThreadPoolExecutor(4) as pool:
        for number in range(4):
            pool.submit(spawn_on, number)
        until(lambda: len(agents_left()) > 8)
        assert service.stop() == 0
        stopped = True
    assert bool(agents_left()) is not stop_agents
    left = {process.environ()["AGENT_ID"] for process in agents_left()}
    assert "Traceback" not in service.log
    service.start()
    listed = service.client().get("/api/agents", limit=1000).json()["agents"]
    assert {agent["agent_id"] for agent in listed if agent["state"] == "running"} == left
    for agent_id in left:
        service.client().delete(f"/api/agents/{agent_id}")
    until(lambda: not agents_left())


# -- the keeper


def test_agents_outlive_their_keeper_and_their_output_goes_on(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    service = make_service(*COMMAND)
    architect, gate = service.client(), tmp_path / "gate"
    agent_id = spawn(architect, "pieces", environment={"TEST_GATE": str(gate)})["agent_id"]
    says(architect, agent_id, "one ")
    (process,) = keepers(service)
    process.kill()
    until(lambda: [found for found in keepers(service) if found != process])
    other = spawn(architect, "fail")["agent_id"]
    assert state(architect, other)["exit_code"] == 3
    assert status(architect, agent_id)["state"] == "running"
    gate.touch()
    ended = state(architect, agent_id)
    assert (ended["state"], ended["exit_code"]) == ("lost", None)
    assert output(architect, agent_id) == "one line\nanother é\n"
    assert len(keepers(service)) == 1, "it stays as long as the service"
    until(lambda: not keepers(service)) if service.stop() == 0 else pytest.fail(service.log)


def test_a_keeper_that_stands_still_holds_up_spawns_alone(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND, "--max-agents", "60")
    architect, large = service.client(), {f"LARGE_{number}": "x" * 60_000 for number in range(5)}
    lives = spawn(architect, "hang")["agent_id"]
    (keeper,) = keepers(service)
    keeper.suspend()
    try:
        with ThreadPoolExecutor(20) as threads:
            refused = [
                threads.submit(service.client().post, "/api/agents/spawn", request(environment=large), timeout=90)
                for _ in range(20)
            ]
            until(lambda: architect.get("/status").json()["agents"]["active"] == 21)
            until(lambda: len(list((service.storage / "agents").glob("*/prompt"))) == 21)
            for number in range(10):
                service.client("python-specialist").store(issue=f"issue-{number}")
                assert architect.get(f"/api/context/issue-{number}/test-engineer").status_code == 200
                assert architect.get("/status").status_code == 200
                assert status(architect, lives)["state"] == "running"
                assert number or not all(future.done() for future in refused)
            answers = [future.result() for future in refused]
        assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(500, "AGT_001")}
        assert "no answer from the keeper" in answers[0].json()["message"]
    finally:
        keeper.resume()
    ended = state(architect, spawn(architect, "fail", environment=large)["agent_id"])
    assert (ended["state"], ended["exit_code"]) == ("failed", 3)
    until(lambda: {process.environ()["AGENT_ID"] for process in agents_left()} == {lives})


def test_a_service_stops_and_starts_again_beside_a_keeper_that_stands_still(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    patient = "from cco_sidecar_plugins.agents.keeper import Keeper\n\nKeeper.START_SECONDS = 600.0  # of cco_sidecar\n"
    (tmp_path / "more/patient.py").write_text(patient)
    service = make_service(*COMMAND, "--plugins", str(tmp_path / "more"))
    lives = spawn(service.client(), "hang")["agent_id"]
    (keeper,) = keepers(service)
    keeper.suspend()
    try:
        with ThreadPoolExecutor(3) as threads:
            for _ in range(3):
                large = {"LARGE": "x" * 100_000}
                threads.submit(service.client().post, "/api/agents/spawn", request(environment=large), timeout=90)
            until(lambda: len(list((service.storage / "agents").glob("*/prompt"))) == 4)
            assert service.stop() == 0, service.log  # who waits for a keeper does so for longer
        service.start()
        assert status(service.client(), lives)["state"] == "running"
    finally:
        keeper.resume()
    until(lambda: [process.environ()["AGENT_ID"] for process in agents_left()] == [lives])


def test_output_goes_on_while_the_service_is_dead(make_service: Callable[..., Service], tmp_path: Path) -> None:
    service, gate = make_service(*COMMAND), tmp_path / "gate"
    agent_id = spawn(service.client(), "pieces", environment={"TEST_GATE": str(gate)})["agent_id"]
    says(service.client(), agent_id, "one ")
    service.kill()
    gate.touch()
    until(lambda: not agents_left())
    until(lambda: not keepers(service))  # it has written everything down and ended with its last agent
    service.start()
    state(service.client(), agent_id)
    assert output(service.client(), agent_id) == "one line\nanother é\n"


def test_one_keeper_serves_all_agents_and_holds_nothing_of_ours(
    service: Service, architect: Client, issue: str
) -> None:
    for _ in range(5):
        spawn(architect, "hang", issue)
    (process,) = keepers(service)
    assert set(process.environ()) <= {"LC_CTYPE", "LD_LIBRARY_PATH"}
    assert process.memory_full_info().uss < 15_000_000
    for each in [process, *process.children(recursive=True)]:
        assert "eyJ" not in " ".join(each.cmdline())


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_a_keeper_keeps_nothing_of_agents_that_have_ended(service: Service, architect: Client, issue: str) -> None:
    agent_id = spawn(architect, "hang", issue)["agent_id"]
    says(architect, agent_id, "hanging")  # the file for its output is opened after the answer
    (process,) = keepers(service)
    before = process.num_fds()
    for _ in range(5):
        state(architect, spawn(architect, "succeed", issue)["agent_id"], "completed")
    until(lambda: process.num_fds() <= before and process.num_threads() <= 2)


# -- limits


def test_agents_may_spawn_agents_only_so_deep(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND, "--max-depth", "3")
    architect = service.client()
    spawn(architect, "spawn_another", agent_type="chief-architect")
    agents = until(
        lambda: (
            len(found := architect.get("/api/agents").json()["agents"]) == 3
            and all(a["ended_at"] for a in found)
            and found
        )
    )
    assert [agent["depth"] for agent in agents] == [1, 2, 3]
    assert [agent["parent"] for agent in agents[1:]] == [agent["agent_id"] for agent in agents[:2]]
    refusal = agents[2]["output_tail"][0]
    assert (
        refusal.startswith("429 ")
        and "AGT_003" in refusal
        and "--max-depth" in refusal
        and "retry_after" not in refusal
    )
    assert architect.get("/status").json()["agents"]["spawned_total"] == 3


def test_depth_follows_the_token_and_nothing_that_the_caller_says(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND, "--max-depth", "1", "--stop-agents")
    spawned = spawn(service.client(), "hang", agent_type="chief-architect")
    agent = Client(service.url, spawned["jwt_token"])
    refreshed = Client(service.url, agent.post("/api/auth/refresh").json()["token"])
    for client in (agent, refreshed):
        answer = client.post("/api/agents/spawn", request() | {"depth": 0, "parent": None}, headers={"X-Depth": "0"})
        assert (answer.status_code, answer.json()["code"]) == (429, "AGT_003")


def test_an_agent_that_spawns_in_a_loop_comes_to_an_end(make_service: Callable[..., Service], tmp_path: Path) -> None:
    service = make_service(*COMMAND, "--max-agents-per-issue", "6", "--max-agents", "4")
    architect = service.client()
    spawned = spawn(architect, "spawn_in_a_loop", agent_type="chief-architect")
    ended = state(architect, spawned["agent_id"])
    assert "AGT_003" in ended["output_tail"][-1] and "--max-agents-per-issue" in ended["output_tail"][-1]
    until(lambda: architect.get("/status").json()["agents"]["active"] == 0)
    assert len(architect.get("/api/agents", limit=1000).json()["agents"]) == 6
    assert architect.post("/api/agents/spawn", request("succeed")).status_code == 429  # ended ones count
    assert architect.post("/api/agents/spawn", request("succeed", issue="another")).status_code == 201


def test_a_spawn_that_is_refused_leaves_no_row(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND, "--max-agents-per-issue", "1")
    state(service.client(), spawn(service.client(), "succeed")["agent_id"])
    for _ in range(3):
        refused = service.client().post("/api/agents/spawn", request())
        assert refused.status_code == 429 and "issue-1 has had 1 agent, --max-" in refused.json()["message"]
    service.stop()
    with contextlib.closing(sqlite3.connect(service.storage / "sidecar.db")) as database:
        for table in ("agent", "agent_evidence", "agent_outcome", "revoked"):
            assert database.execute(f"select count(*) from {table}").fetchone() == (1,), table


def test_spawns_that_never_got_a_process_do_not_count(make_service: Callable[..., Service]) -> None:
    service = make_service("--agent-command", "no-such-program-anywhere", "--max-agents-per-issue", "1")
    for _ in range(3):
        assert service.client().post("/api/agents/spawn", request()).status_code == 500


# -- tokens


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        (None, ["read_context", "publish_events"]),
        (["publish_events", "write_results"], ["publish_events"]),
        ([], []),
        (["spawn_agents"], []),
    ],
)
def test_permissions_only_shrink(service: Service, issue: str, asked: list[str] | None, granted: list[str]) -> None:
    spawner = service.client(permissions=["spawn_agents", "read_context", "publish_events"])
    spawned = spawn(spawner, "hang", issue, permissions=asked)
    assert claims_of(spawned["jwt_token"])["permissions"] == granted


def test_an_agent_can_be_narrowed_to_its_issue(service: Service, architect: Client, issue: str) -> None:
    assert "issue_id" not in claims_of(spawn(architect, "hang", issue)["jwt_token"])
    narrow = Client(service.url, spawn(architect, "hang", issue, issue_only=True)["jwt_token"])
    assert narrow.get(f"/api/context/{issue}/python-specialist").status_code == 200
    assert narrow.get("/api/context/another/python-specialist").status_code == 403
    bound = service.client(issue_id=issue)
    assert claims_of(spawn(bound, "hang", issue, issue_only=False)["jwt_token"])["issue_id"] == issue


def test_a_repeated_spawn_gives_a_token_that_is_good_now_and_none_when_the_agent_has_ended(
    make_service: Callable[..., Service],
) -> None:
    service = make_service(*COMMAND, "--token-ttl", "2")
    architect = service.client(sub="repeater")
    key = {"Idempotency-Key": "one"}
    body = request(environment={"APP_NEW": "1", "PROJECT_ROOT": "/", "LD_PRELOAD": "x"})
    first = architect.post("/api/agents/spawn", body, headers=key).json()
    assert first["environment_ignored"] == ["LD_PRELOAD", "PROJECT_ROOT"]

    def is_good(token: str) -> bool:  # for a second at least: on a busy machine it may be over by then
        return Client(service.url, token).get("/status").status_code == 200

    until(lambda: claims_of(first["jwt_token"])["exp"] < time.time())
    assert not is_good(first["jwt_token"])
    for restart in (False, True):
        if restart:
            service.kill()
            service.start()
            architect = service.client(sub="repeater")
        again = architect.post("/api/agents/spawn", body, headers=key)
        assert again.headers["Idempotent-Replay"] == "true"
        assert again.json() | {"jwt_token": ""} == first | {"jwt_token": ""}
        if not restart:
            repeated = functools.partial(architect.post, "/api/agents/spawn", body, headers=key)
            until(lambda call=repeated: is_good(call().json()["jwt_token"]))
    architect.delete(f"/api/agents/{first['agent_id']}")
    state(architect, first["agent_id"], "killed")
    last = architect.post("/api/agents/spawn", body, headers=key).json()
    assert (last["agent_id"], last["state"], last["jwt_token"]) == (first["agent_id"], "killed", "")
    assert service.stop() == 0
    for path in [*service.storage.glob("sidecar.db*"), service.log_path, service.storage / "audit.log"]:
        assert b"eyJ" not in path.read_bytes(), path


def test_an_agent_that_loses_its_token_file_gets_it_back(architect: Client, issue: str) -> None:
    ended = state(architect, spawn(architect, "lose_token", issue)["agent_id"])
    assert (ended["state"], ended["output_tail"]) == ("completed", ["True"])


def test_curl_takes_the_token_from_a_file(architect: Client, issue: str) -> None:
    ended = state(architect, spawn(architect, "curl", issue)["agent_id"])
    assert ended["state"] == "completed" and ended["result_id"], ended


# -- context


def test_a_spawn_whose_context_cannot_be_built_leaves_nothing(
    make_service: Callable[..., Service],
) -> None:
    service = make_service(*COMMAND)
    (service.root / ".git/HEAD").write_text("no reference\n")
    answer = service.client().post("/api/agents/spawn", request())
    assert (answer.status_code, answer.json()["code"]) == (500, "AGT_001"), answer.text
    assert "context" in answer.json()["message"]
    assert list((service.storage / "agents").iterdir()) == []
    assert service.client().get("/api/agents").json()["agents"] == [] and not agents_left()
    assert service.client().get("/status").json()["agents"]["active"] == 0


# -- status


def test_status_is_measured_and_says_how_old_each_measurement_is(
    service: Service, architect: Client, issue: str
) -> None:
    spawned = spawn(architect, "burn", issue)
    says(architect, spawned["agent_id"], "burnt")
    Client(service.url, spawned["jwt_token"]).get("/api/results")
    found = until(
        lambda: (
            (now := status(architect, spawned["agent_id"]))["usage"]["processes"] == 1
            and now["usage"]["cpu_seconds"] > 0.4
            and now
        )
    )
    assert (
        found["usage"]["memory_bytes"] > 50_000_000
        and found["usage"]["peak_memory_bytes"] >= found["usage"]["memory_bytes"]
    )
    assert (found["last_call"]["method"], found["last_call"]["path"]) == ("GET", "/api/results")
    for at, seconds in (
        (found["usage"]["measured_at"], found["usage"]["age_seconds"]), (found["last_output_at"], found["last_output_age_seconds"]),
        (found["last_call"]["at"], found["last_call"]["age_seconds"]), (found["started_at"], found["state_age_seconds"]),
    ):  # fmt: skip
        assert at.endswith("Z") and seconds >= 0
    architect.delete(f"/api/agents/{spawned['agent_id']}")
    ended = state(architect, spawned["agent_id"])
    assert ended["usage"]["cpu_seconds"] > 0.4 and ended["usage"]["processes"] == ended["usage"]["memory_bytes"] == 0
    assert ended["last_call"]["path"] == "/api/results" and ended["output_tail"][-1].startswith("burnt")


def test_what_is_not_known_is_null(architect: Client, issue: str) -> None:
    found = status(architect, spawn(architect, "hang", issue)["agent_id"])
    assert (found["last_call"], found["exit_code"], found["result_id"], found["depth"]) == (None, None, None, 1)


def test_the_time_limit_is_that_of_the_process_whatever_the_clock_says(make_service: Callable[..., Service]) -> None:
    """The ledger's start is moved a day back, as if the clock had been set forward while the service was down."""
    service = make_service(*COMMAND, "--agent-timeout", "3600", "--stop-agents")
    agent_id = spawn(service.client(), "hang")["agent_id"]
    service.kill()
    with contextlib.closing(sqlite3.connect(service.storage / "sidecar.db")) as database, database:
        assert database.execute("update agent set started = started - 86400 where id = ?", (agent_id,)).rowcount == 1
    service.start()
    other = spawn(service.client(), "succeed")["agent_id"]
    state(service.client(), other)
    assert status(service.client(), agent_id)["state"] == "running"


# -- logs


def test_lines_have_times(architect: Client, issue: str) -> None:
    before = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    spawned = spawn(architect, "family", issue)
    says(architect, spawned["agent_id"], "family")
    path = f"/api/agents/{spawned['agent_id']}/logs"
    stamped = architect.get(path, timestamps=True).json()["text"]
    stamp, word = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (\w+)\n", stamped).groups()
    assert before <= stamp and word == "family"
    assert architect.get(path, since=stamp).json()["text"] == "family\n"
    assert architect.get(path, since=before).json()["text"] == "family\n"
    assert architect.get(path, since="2999-01-01").json()["text"] == ""
    assert architect.get(path, since="yesterday").status_code == 400


def test_a_flood_neither_fills_the_disk_nor_stops_the_agent(service: Service, architect: Client, issue: str) -> None:
    spawned = spawn(architect, "flood", issue, environment={"BYTES": "100000000"})
    folder, sizes = folder_of(service, spawned["agent_id"]), [0]

    def ended() -> dict[str, Any] | None:
        with contextlib.suppress(FileNotFoundError):
            sizes.append(sum(path.stat().st_size for path in folder.glob("output.*.log")))
        now = status(architect, spawned["agent_id"])
        return now if now["ended_at"] else None

    found = until(ended, 60)
    assert (found["state"], found["output_tail"][-1]) == ("completed", "flooded")
    assert 4_000_000 < max(sizes) < 10 * MB
    path = f"/api/agents/{spawned['agent_id']}/logs"
    page, lines = architect.get(path).json(), 0
    assert page["offset"] > 90_000_000
    while page["text"]:
        assert set(page["text"].replace("flooded", "x")) == {"x", "\n"}
        lines += page["text"].count("\n")
        page = architect.get(path, since=page["next_offset"]).json()
    assert lines > 30_000


def test_a_line_without_end_is_broken(service: Service, architect: Client, issue: str) -> None:
    spawned = spawn(architect, "one_line", issue)
    assert state(architect, spawned["agent_id"])["state"] == "completed"
    lines = architect.get(f"/api/agents/{spawned['agent_id']}/logs").json()["text"].splitlines()
    assert len(lines) > 1 and set("".join(lines)) == {"y"}
    assert sum(path.stat().st_size for path in folder_of(service, spawned["agent_id"]).glob("output.*.log")) < 10 * MB


def test_what_a_full_disk_swallowed_is_said_when_there_is_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, real, room = OutputWriter(str(tmp_path)), os.write, [1_000_000]

    def write(file: int, content: bytes) -> int:
        if room[0] <= 0:
            room[0] -= 1
            raise OSError(28, "No space left on device")
        written = real(file, content[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    writer.write(b"before\n", 0.0)
    room[0] = 30
    writer.write(b"half of this is lost\n", 1.0)
    writer.write(b"and this\n", 2.0)
    room[0] = 1_000_000
    writer.write(b"after\n", 3.0)
    room[0] = 0
    writer.write(b"the last word", 4.0)
    writer.ROOM_SECONDS = 0.01
    with ThreadPoolExecutor(1) as threads:
        closing = threads.submit(writer.close)
        tried = room[0]
        until(lambda: room[0] < tried - 1)
        assert not closing.done()
        room[0] = 1_000_000
        closing.result(30)
    place, text, following = StampedOutput(tmp_path).read(0)
    lines = text.splitlines()
    assert (lines[0], lines[1], lines[3]) == ("before", "half ", "after") and len(lines) == 5
    for line in lines[2], lines[4]:
        assert re.fullmatch(r"\[\d+ bytes were lost here: No space left on device\]", line)
    assert place == 0 and following == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_start_that_fails_leaves_nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object) -> None:
        raise StorageError("disk I/O error")

    async def scene() -> set[asyncio.Task[Any]]:
        root = make_repository(tmp_path / "repository")
        settings = load_settings({"root": str(root), "storage": str(tmp_path / "storage"), "port": 0}, {})
        with pytest.raises(StorageError):
            async with Sidecar(settings, load_hooks(settings)):
                pass
        return {task for task in asyncio.all_tasks() if "KeptProcesses" in repr(task)}

    monkeypatch.setattr(Records, "unfinished_agents", unreadable)
    assert asyncio.run(scene()) == set()


@pytest.mark.parametrize("size", [1, 7, 26, 100, 5000])
def test_output_reads_the_same_in_whatever_pieces_it_comes_and_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(StampedOutput, "READ", max(60, size))
    text = "".join(f"line {number} é \r x\n" * (number % 3) + "\n" for number in range(200)) + "the end"
    content, writer = text.encode(), OutputWriter(str(tmp_path))
    for start in range(0, len(content), size):
        if start % 3 == 0:
            writer.close()
            writer = OutputWriter(str(tmp_path))  # as the next keeper would go on
        writer.write(content[start : start + size], start / 1000)
    writer.close()
    output, found, place = StampedOutput(tmp_path), "", 0
    while True:
        at, piece, following = output.read(place)
        assert at == place
        if following == place:
            break
        found, place = found + piece, following
    assert found == text
    monkeypatch.undo()
    assert output.tail(3) == text.split("\n")[-3:]


@pytest.mark.parametrize("size", [3, 100, 999])
def test_rotation_drops_whole_lines_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(OutputWriter, "SEGMENT", 2000)
    content, writer = (
        b"".join(b"line %d\n" % number for number in range(1000)) + b"the end",
        OutputWriter(str(tmp_path)),
    )
    for start in range(0, len(content), size):
        writer.write(content[start : start + size], start / 1000)
    writer.close()
    place, text, _ = StampedOutput(tmp_path).read(0)
    assert len(list(tmp_path.iterdir())) == 2 and place > 20_000
    assert text.startswith("line ") and content.decode().endswith("\n" + text)


def test_files_of_an_agents_own_neither_stop_its_output_nor_stand_for_it(
    service: Service, architect: Client, issue: str
) -> None:
    spawned = spawn(architect, "flood_beside_own_files", issue, environment={"BYTES": "10000000"})
    found = state(architect, spawned["agent_id"])
    assert (found["state"], found["output_tail"][-1]) == ("completed", "flooded")
    text = architect.get(f"/api/agents/{spawned['agent_id']}/logs").json()["text"]
    assert set(text.replace("flooded", "x")) == {"x", "\n"}
    folder = folder_of(service, spawned["agent_id"])
    assert (folder / "output.log").read_text() == "its own\n" and (folder / "output.5.log").is_dir()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("elsewhere")])
def test_where_something_else_has_the_files_name_output_is_lost_and_said_to_be(
    tmp_path: Path, make: Callable[[Path], Any]
) -> None:
    path = tmp_path / "output.0.log"
    make(path)
    writer = OutputWriter(str(tmp_path))
    writer.write(b"lost\n", 0.0)
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()
    writer.write(b"written\n", 0.0)
    writer.close()
    lost, written = StampedOutput(tmp_path).read(0)[1].splitlines()
    assert re.fullmatch(r"\[\d+ bytes were lost here: .+\]", lost) and written == "written"
    assert not (tmp_path / "elsewhere").exists()


# -- commands


def test_the_command_can_depend_on_the_agent_type(
    make_service: Callable[..., Service], repository: Path, tmp_path: Path
) -> None:
    code = "import sys; print(sys.argv[1:])"
    (repository / "cco.toml").write_text(
        f"agent-command = {json.dumps([sys.executable, '-c', code, 'default'])}\n"
        f"[agent-commands]\ntest-engineer = {json.dumps([sys.executable, '-c', code, 'tester {issue_id}'])}\nqa-engineer = 'claude'\n"
    )
    architect = make_service(env={"PATH": git_alone(tmp_path)}).client()
    for agent_type, said in (("python-specialist", "['default']\n"), ("test-engineer", "['tester issue-1']\n")):
        agent_id = spawn(architect, agent_type=agent_type)["agent_id"]
        state(architect, agent_id, "completed")
        assert output(architect, agent_id) == said
    answer = architect.post("/api/agents/spawn", request(agent_type="qa-engineer"))
    assert (answer.status_code, answer.json()["code"]) == (500, "AGT_001") and "claude: not on PATH" in answer.json()[
        "message"
    ]

"""The bundled plugin `pipeline`: `cco run` with the real service and real agents, killed at every place where it hurts."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import MODULE, PROJECT, ROOT, Service, clean_environment, end_stragglers, marked_processes, until

from cco_sidecar import NextAgent, import_file, read_sidecar_json

pipeline = import_file(ROOT / "plugins/pipeline.py")
TEAM = json.dumps([sys.executable, str(ROOT / "tests/sample_team.py")])
ALL = ["chief-architect", "python-specialist", "test-engineer", "security-auditor", "documentation-expert"]


class Runs:
    """`cco run` on one repository and storage, with the sample team as agents."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root, self.storage, self.log = folder, root, folder / "storage", folder / "team.log"
        self.started: list[subprocess.Popen[bytes]] = []

    @property
    def env(self) -> dict[str, str]:
        return {"TEAM_LOG": str(self.log), "CCO_SIDECAR_AGENT_COMMAND": TEAM, "COLUMNS": "200"}

    def start(self, *words: str, script: Any = None, out: Any = None, **env: str) -> subprocess.Popen[bytes]:
        """Run in the background; what it prints goes to a file of its own, `output` reads it."""
        task = [] if script is None else ["--task", json.dumps(script)]
        command = [sys.executable, str(MODULE), "run", "--root", str(self.root), "--storage", str(self.storage), "--project", PROJECT, *task, *words]
        number = len(self.started)
        with self.path(number, "out").open("wb") as stdout, self.path(number, "err").open("wb") as stderr:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out or stdout, "stderr": stderr}
            process = subprocess.Popen(command, env=clean_environment(**self.env | env), **streams)
        self.started.append(process)
        return process

    def path(self, number: int, kind: str) -> Path:
        return self.folder / f"run{number}.{kind}"

    def output(self, process: subprocess.Popen[bytes], kind: str = "out") -> str:
        return self.path(self.started.index(process), kind).read_text()

    def events(self, process: subprocess.Popen[bytes], name: str = "") -> list[dict[str, Any]]:
        """What a run with --format json has printed so far, every line of it."""
        lines = self.output(process).splitlines(keepends=True)
        return [event for event in (json.loads(line) for line in lines if line.endswith("\n")) if name in ("", event["event"])]

    def run(self, *words: str, script: Any = None, code: int = 0, **env: str) -> list[dict[str, Any]]:
        """Run to the end, which must be `code`; what it printed as JSON."""
        process = self.start("--format", "json", *words, script=script, **env)
        assert process.wait(60) == code, self.output(process) + self.output(process, "err")
        return self.events(process)

    def refuse(self, *words: str, code: int) -> str:
        """Run to an end that is one line on stderr."""
        process = self.start(*words)
        assert process.wait(60) == code, self.output(process) + self.output(process, "err")
        error = self.output(process, "err")
        assert error.startswith("cco: ") and error.count("\n") == 1
        return error

    def worked(self) -> list[str]:
        """The types of all agents that have started to work, in order."""
        return self.log.read_text().split() if self.log.exists() else []

    def open_gate(self) -> None:
        (self.folder / "open").touch()

    def service(self, process: subprocess.Popen[bytes]) -> psutil.Process:
        """The service that a run has started."""
        return until(lambda: next((child for child in psutil.Process(process.pid).children() if "run-service" in child.cmdline()), None))


def lives(process: psutil.Process) -> bool:
    """Whether it still runs; one whose parent has gone may stay behind as a zombie where nobody collects those."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def runs(tmp_path: Path, repository: Path) -> Iterator[Runs]:
    found = Runs(tmp_path, repository)
    yield found
    for process in found.started:
        if process.poll() is None:
            process.kill()
            process.wait()
    until(lambda: not [process for process in marked_processes() if "run-service" in process.cmdline()], 20)
    end_stragglers()


@pytest.fixture
def served(runs: Runs, make_service: Callable[..., Service]) -> Service:
    """A service for this repository that runs already."""
    return make_service(env=runs.env)


def at_the_gate(runs: Runs, process: subprocess.Popen[bytes], agent_type: str = "python-specialist") -> dict[str, Any]:
    """The agent of that type, once it waits at the gate."""
    until(lambda: agent_type in runs.worked())
    return until(lambda: next((event for event in runs.events(process, "agent_started") if event["agent_type"] == agent_type), None))


# -- the rules


def proposals(text: str) -> list[NextAgent]:
    return [NextAgent(*item.split(":"), f"after {text}") for item in text.split()]


def outcome(text: str) -> Any:
    """`python-specialist coding success test-engineer:high`"""
    agent_type, category, status, *proposed = text.split(maxsplit=3)
    return pipeline.Outcome(f"{agent_type}-1", agent_type, category, status, proposals(" ".join(proposed)))


def plan_after(*outcomes: str, until: str | None = None) -> Any:
    plan = pipeline.Plan(NextAgent("chief-architect", "high", "first"), until)
    for text in outcomes:
        plan.take(outcome(text))
    return plan


DESIGNED = "chief-architect architect success python-specialist:high test-engineer:medium"
CODED = "python-specialist coding success test-engineer:high security-auditor:medium"
TESTED = "test-engineer qa success documentation-expert:low"
UNSAFE = "security-auditor security failed python-specialist:high"


@pytest.mark.parametrize(
    ("outcomes", "queue"),
    [
        ([], "chief-architect"),
        ([DESIGNED], "python-specialist test-engineer"),
        ([DESIGNED, CODED], "test-engineer security-auditor"),
        ([DESIGNED, CODED, TESTED], "security-auditor documentation-expert"),  # what was proposed before is not forgotten
        ([DESIGNED, CODED, TESTED, "security-auditor security success"], "documentation-expert"),
        ([DESIGNED, CODED, TESTED, "security-auditor security success", "documentation-expert documentation success"], ""),
        ([DESIGNED, CODED, "test-engineer qa failed python-specialist:high"], "python-specialist security-auditor"),
        ([DESIGNED, CODED, TESTED, UNSAFE, CODED], "test-engineer security-auditor documentation-expert"),
        (["chief-architect architect failed"], "chief-architect"),  # routing names nobody: it tries again by itself
        (["documentation-expert documentation failed"], "documentation-expert"),
        ([CODED], "test-engineer security-auditor"),  # begun by hand: no architect
        (["x coding success b:low a:low c:high", "y coding success a:low d:low"], "c b a d"),  # a keeps its place
        (["x coding success a:high", "y coding success a:low b:medium"], "a b"),  # and its priority
    ],
)
def test_the_queue_follows_from_the_outcomes(outcomes: list[str], queue: str) -> None:
    plan = plan_after(*outcomes)
    assert [item.agent_type for item in plan.queue()] == queue.split()


@pytest.mark.parametrize(
    ("goal", "outcomes", "reached"),
    [
        ("coding", [DESIGNED], False),
        ("coding", [DESIGNED, CODED], True),
        ("python-specialist", [DESIGNED, CODED], True),
        ("coding", [CODED, TESTED], True),
        ("coding", [CODED, "test-engineer qa failed python-specialist:high"], False),
        ("qa", [CODED, TESTED, UNSAFE], False),
        ("qa", [CODED, TESTED, CODED], False),
        ("qa", [CODED, TESTED, CODED, TESTED], True),
        ("qa", [CODED, "test-engineer qa partial python-specialist:medium"], False),
        (None, [CODED], False),
    ],
)
def test_until_is_reached_by_a_success_that_nothing_has_put_in_doubt(goal: str | None, outcomes: list[str], reached: bool) -> None:
    assert plan_after(*outcomes, until=goal).reached is reached


def test_failures_are_counted_in_a_row() -> None:
    plan = plan_after("a coding failed a:high", "a coding partial a:high", "b qa failed a:high", "b qa success")
    assert plan.failures == {"a": 2, "b": 0}


AGENT = {"agent_type": "coder", "state": "completed", "exit_code": 0, "signal": None, "output_tail": ["one", " ", "two", "three", "four"]}


@pytest.mark.parametrize(
    ("facts", "may_write", "ordered", "status", "words"),
    [
        ({}, True, "", "failed", "coder ended without storing a result; its last lines: two | three | four"),
        ({}, False, "", "success", "four"),
        ({"output_tail": []}, True, "", "failed", "coder ended without storing a result; it wrote nothing"),
        ({"state": "failed", "exit_code": 3}, False, "", "failed", "coder failed with exit code 3 without storing a result; its last lines"),
        ({"state": "failed", "exit_code": -9, "signal": 9}, True, "", "failed", "coder failed with signal 9 without"),
        ({"state": "lost"}, True, "", "failed", "coder was lost with the service without"),
        ({"state": "killed"}, True, "", "failed", "coder was ended from outside without"),
        ({"state": "killed"}, True, "took longer than 5 s", "failed", "coder took longer than 5 s; its last lines"),
        ({"state": "timeout"}, True, "", "failed", "coder was ended by the service's --agent-timeout without"),
    ],
)
def test_what_is_said_of_an_agent_that_stored_nothing(facts: dict[str, Any], may_write: bool, ordered: str, status: str, words: str) -> None:
    result = pipeline.silent_result(AGENT | facts, may_write, ordered)
    assert result["status"] == status and result["artifacts"]["reported_by"] == "pipeline"
    assert pipeline.short_decision(result).startswith(words)


def test_secrets_in_last_words_are_not_stored() -> None:
    result = pipeline.silent_result(AGENT | {"output_tail": ["the token is ghp_" + "a1B2" * 9]}, True)
    assert "ghp_" not in json.dumps(result) and "REDACTED" in json.dumps(result)


@pytest.mark.parametrize(
    ("text", "columns", "shown"),
    [("hello", 9, "hello"), ("hello", 3, "hel"), ("日本語", 5, "日本"), ("e\u0301e\u0301e", 2, "e\u0301e\u0301"), ("", 5, "")],
)
def test_a_line_is_cut_to_the_columns_that_it_takes(text: str, columns: int, shown: str) -> None:
    assert pipeline.fitting(text, columns) == shown


@pytest.mark.parametrize("text", ["\x1b[31mred\x1b[0m", "\x1b]0;title\x07red", "red", "\x1b[2Jred"])
def test_what_an_agent_writes_does_not_steer_the_terminal(text: str) -> None:
    assert pipeline.plain(text) == "red"


# -- the whole way


def test_an_issue_goes_from_the_architect_to_the_documentation(runs: Runs, served: Service) -> None:
    events = runs.run("--issue", "i-1", script={})
    assert runs.worked() == ALL
    begin, end = events[0], events[-1]
    assert begin["event"] == "pipeline_started" and begin["url"] == served.url and begin["service"] == "running" and not begin["going_on"]
    assert end["event"] == "pipeline_ended" and (end["state"], end["exit_code"]) == ("done", 0)
    assert [row["agent_type"] for row in end["agents"]] == ALL
    assert {row["state"] for row in end["agents"]} == {"completed"} and {row["status"] for row in end["agents"]} == {"success"}
    assert [row["files_changed"] for row in end["agents"]] == [1, 1, 1, 1, 0]  # the last one may not store results: its exit code is one
    assert end["agents"][1]["decision"] == "python-specialist says success" and end["agents"][4]["decision"] == "documentation-expert is done"
    assert end["agents"][1]["reason"].startswith("architecture-success") and end["agents"][4]["reason"].startswith("qa-success")
    tasks = [agent["task"] for agent in served.client().get("/api/agents", issue_id="i-1").json()["agents"]]
    assert tasks[0] == "{}" and tasks[1] == "{}\n\nYour part: architecture-success: implementation of what was designed"
    ended = served.client().get("/api/events", type="pipeline_ended").json()["events"]
    assert [event["data"]["state"] for event in ended] == ["done"]

    again = runs.run("--issue", "i-1", "--until", "documentation")
    assert runs.worked() == ALL and again[-1]["state"] == "reached" and [row["status"] for row in again[-1]["agents"]] == ["success"] * 5
    assert served.process and served.process.poll() is None


def test_with_no_service_it_starts_one_and_leaves_no_process(runs: Runs) -> None:
    process = runs.start("--issue", "i-1", "--agent-command", TEAM, script={}, CCO_SIDECAR_AGENT_COMMAND="false")
    assert process.wait(60) == 0, runs.output(process, "err")
    shown = runs.output(process)
    assert "a service of its own" in shown and runs.output(process, "err") == ""
    rows = [line.split() for line in shown.partition("\n\n")[2].splitlines()]
    assert rows[0] == "TYPE STATE TIME RESULT FILES DECISION WHY".split()
    assert [row[:2] for row in rows[1:]] == [[name, "completed"] for name in ALL]
    assert marked_processes() == [] and read_sidecar_json(runs.storage) is None
    assert runs.run("--issue", "i-1")[-1]["state"] == "done" and runs.worked() == ALL


def test_until_stops_there_and_a_later_run_goes_on(runs: Runs, served: Service) -> None:
    assert runs.run("--issue", "i-1", "--until", "coding", script={})[-1]["state"] == "reached"
    assert runs.worked() == ALL[:2]
    assert runs.run("--issue", "i-1", "--until", "coding")[-1]["state"] == "reached" and runs.worked() == ALL[:2]
    events = runs.run("--issue", "i-1", "--until", "security-auditor")
    assert events[0]["going_on"] and events[0]["task"] == "{}" and events[0]["pending"] == ["test-engineer", "security-auditor"]
    assert runs.worked() == ALL[:4]


def test_another_first_type_and_results_that_are_there_already(runs: Runs, served: Service) -> None:
    runs.run("--issue", "i-1", "--type", "python-specialist", "--until", "coding")
    assert runs.worked() == ["python-specialist"]
    served.client().store("python-specialist", issue="i-2")
    assert runs.run("--issue", "i-2", "--until", "qa")[0]["pending"] == ["test-engineer", "security-auditor"]
    assert runs.worked() == ["python-specialist", "test-engineer"]


def test_restart_begins_anew_and_a_run_after_that_goes_on_with_the_new_one(runs: Runs, served: Service) -> None:
    runs.run("--issue", "i-1", "--until", "coding", script={})
    events = runs.run("--issue", "i-1", "--restart", "--until", "architect", script={})
    assert not events[0]["going_on"] and len(events[-1]["agents"]) == 1
    assert runs.run("--issue", "i-1", "--until", "coding")[-1]["agents"][0]["agent_id"] == events[-1]["agents"][0]["agent_id"]
    assert runs.worked() == ALL[:2] + ALL[:2]


# -- failures


def test_a_failure_is_repaired_as_routing_says(runs: Runs, served: Service) -> None:
    events = runs.run("--issue", "i-1", script={"python-specialist": ["failed", "success"], "test-engineer": ["failed", "success"]})
    assert runs.worked() == [*ALL[:2], "python-specialist", "test-engineer", "python-specialist", *ALL[2:]]
    assert events[-1]["state"] == "done"
    assert [row["status"] for row in events[-1]["agents"]] == ["success", "failed", "success", "failed", "success", "success", "success", "success"]


def test_crashes_bring_back_the_architect_and_then_end_it_for_good(runs: Runs, served: Service) -> None:
    events = runs.run("--issue", "i-1", script={"python-specialist": ["crash"]}, code=1)
    assert runs.worked() == ["chief-architect", *["python-specialist"] * 3, "chief-architect", "python-specialist"]
    assert events[-1]["state"] == "failed" and "python-specialist has failed 4 times in a row (--retries 3)" in events[-1]["reason"]
    row = events[-1]["agents"][1]
    assert row["state"] == "failed" and row["status"] == "failed"
    assert row["decision"] == "python-specialist failed with exit code 7 without storing a result; its last lines: \x1b[31mout of luck\x1b[0m"

    events = runs.run("--issue", "i-1", "--retries", "0", script={})  # the cause is gone: another run has all its attempts again
    assert events[-1]["state"] == "done" and runs.worked()[6:] == ALL[1:]


def test_retries_and_a_type_for_which_routing_has_no_remedy(runs: Runs, served: Service) -> None:
    events = runs.run("--issue", "i-1", "--retries", "1", script={"chief-architect": ["failed"]}, code=1)
    assert runs.worked() == ["chief-architect"] * 2 and events[-1]["state"] == "failed"
    assert [event["reason"] for event in events if event["event"] == "agent_started"][1] == "pipeline: another attempt"


def test_an_agent_that_stores_no_result_has_failed_and_its_last_lines_say_why(runs: Runs, served: Service) -> None:
    events = runs.run("--issue", "i-1", "--retries", "0", script={"chief-architect": ["silent"]}, code=1)
    words = "chief-architect ended without storing a result; its last lines: I forgot something | what was it?"
    assert [event["decision"] for event in events if event["event"] == "agent_ended"] == [words]
    stored = served.client().get("/api/results", issue_id="i-1").json()["results"]
    assert [result["result"]["errors"] for result in stored] == [[words]] and stored[0]["result"]["artifacts"]["reported_by"] == "pipeline"


def test_a_result_counts_whatever_becomes_of_its_agent(runs: Runs, served: Service) -> None:
    events = runs.run("--issue", "i-1", "--until", "qa", script={"python-specialist": ["store_and_crash"]})
    assert runs.worked() == ALL[:3]
    assert [(row["state"], row["status"]) for row in events[-1]["agents"]][1] == ("failed", "success")


def test_a_time_limit_ends_an_agent(runs: Runs, served: Service) -> None:
    events = runs.run("--issue", "i-1", "--timeout", "1", "--retries", "0", script={"chief-architect": ["hang"]}, code=1)
    row = events[-1]["agents"][0]
    assert row["state"] == "killed" and row["decision"] == "chief-architect took longer than 1 s (--timeout); its last lines: hanging"


def test_an_agent_that_somebody_ends_has_failed(runs: Runs, served: Service) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", "--retries", "0", script={"chief-architect": ["hang"]})
    agent = at_the_gate(runs, process, "chief-architect")["agent_id"]
    assert served.client().delete(f"/api/agents/{agent}").status_code == 202
    assert process.wait(30) == 1
    assert runs.events(process)[-1]["agents"][0]["decision"].startswith("chief-architect was ended from outside without storing a result")


def test_the_number_of_agents_is_limited_and_another_run_goes_on(runs: Runs, served: Service) -> None:
    events = runs.run("--issue", "i-1", "--rounds", "2", script={}, code=1)
    assert events[-1]["state"] == "limit" and "(--rounds 2), test-engineer would be next" in events[-1]["reason"]
    assert runs.run("--issue", "i-1", "--rounds", "3")[-1]["state"] == "done" and runs.worked() == ALL


def test_it_waits_for_room_among_the_agents(runs: Runs, make_service: Callable[..., Service]) -> None:
    service = make_service("--max-agents", "1", env=runs.env)
    body = {"agent_type": "go-specialist", "issue_id": "other", "task": json.dumps({"go-specialist": ["gate"]})}
    assert service.client().post("/api/agents/spawn", body).status_code == 201
    process = runs.start("--format", "json", "--issue", "i-1", "--until", "architect", script={})
    waiting = until(lambda: runs.events(process, "waiting"))[0]
    assert "--max-agents" in waiting["reason"] and waiting["seconds"] == 5
    runs.open_gate()
    assert process.wait(30) == 0 and runs.worked() == ["go-specialist", "chief-architect"]


# -- crashes


def test_the_runner_is_killed_and_the_next_one_waits_for_the_running_agent(runs: Runs, served: Service) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"python-specialist": ["gate"]})
    agent = at_the_gate(runs, process)["agent_id"]
    process.kill()
    process.wait()
    again = runs.start("--format", "json", "--issue", "i-1")
    until(lambda: [event for event in runs.events(again, "agent_output") if event["agent_id"] == agent])
    runs.open_gate()
    assert again.wait(60) == 0 and runs.worked() == ALL
    assert agent in [event["agent_id"] for event in runs.events(again, "agent_ended")]


def test_the_runner_is_killed_and_the_agent_crashes_before_the_next_one(runs: Runs, served: Service) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"python-specialist": ["hang", "success"]})
    started = at_the_gate(runs, process)
    process.kill()
    process.wait()
    os.kill(started["pid"], signal.SIGKILL)
    path = f"/api/agents/{started['agent_id']}/status"
    until(lambda: served.client().get(path).json()["ended_at"])
    events = runs.run("--issue", "i-1", "--until", "coding")
    assert runs.worked() == [*ALL[:2], "python-specialist"]
    assert events[-1]["agents"][1]["decision"].startswith("python-specialist failed with signal 9 without storing a result")


def test_the_runner_and_with_it_its_service_are_killed(runs: Runs) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"python-specialist": ["gate"]})
    agent = at_the_gate(runs, process)["agent_id"]
    service = runs.service(process)
    process.kill()
    process.wait()
    again = runs.start("--format", "json", "--issue", "i-1")  # at once: the old service is still about to stop
    until(lambda: [event for event in runs.events(again, "agent_output") if event["agent_id"] == agent])
    assert not lives(service) and runs.service(again).pid != service.pid
    runs.open_gate()
    assert again.wait(60) == 0 and runs.worked() == ALL and marked_processes() == []


def test_both_are_killed_at_once(runs: Runs) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"python-specialist": ["gate"]})
    at_the_gate(runs, process)
    service = runs.service(process)
    service.kill()
    process.kill()
    process.wait()
    runs.open_gate()
    assert runs.run("--issue", "i-1")[-1]["state"] == "done"
    assert runs.worked() in (ALL, [*ALL[:2], *ALL[1:]])  # an agent that found no service to store its result in has failed
    assert marked_processes() == []


def test_a_service_that_is_killed_and_started_again_is_waited_for(runs: Runs, served: Service) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"python-specialist": ["gate"]})
    at_the_gate(runs, process)
    served.kill()
    until(lambda: runs.events(process, "waiting"))
    served.start()
    runs.open_gate()
    assert process.wait(60) == 0, runs.output(process, "err")
    assert runs.worked() == ALL


@pytest.mark.parametrize("moment", ["while no service runs", "after the restart"])
@pytest.mark.parametrize("down", [Service.stop, Service.kill], ids=["stop", "kill -9"])
def test_an_agent_that_ends_around_a_restart_is_not_run_again(runs: Runs, served: Service, down: Callable[[Service], Any], moment: str) -> None:
    """Of a type that may store no result the exit code alone says how it ended."""
    process = runs.start("--format", "json", "--issue", "i-1", "--type", "documentation-expert", script={"documentation-expert": ["gate"]})
    agent = at_the_gate(runs, process, "documentation-expert")
    down(served)
    if moment == "while no service runs":
        runs.open_gate()
        until(lambda: not psutil.pid_exists(agent["pid"]))
    served.start()
    runs.open_gate()
    assert process.wait(60) == 0, runs.output(process, "err")
    (row,) = runs.events(process)[-1]["agents"]
    assert runs.worked() == ["documentation-expert"] and (row["state"], row["status"]) == ("completed", "success")


def test_its_own_service_is_started_again(runs: Runs) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"python-specialist": ["gate"]})
    at_the_gate(runs, process)
    first = runs.service(process)
    first.kill()
    until(lambda: (info := read_sidecar_json(runs.storage)) and info.pid != first.pid)
    runs.open_gate()
    assert process.wait(60) == 0, runs.output(process, "err")
    assert runs.worked() == ALL and marked_processes() == []


def test_a_service_that_stays_away_is_exit_code_3(runs: Runs, served: Service) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", "--patience", "0", script={"chief-architect": ["gate"]})
    at_the_gate(runs, process, "chief-architect")
    served.kill()
    assert process.wait(30) == 3
    assert "is not reachable" in runs.output(process, "err") and runs.events(process)[-1]["exit_code"] == 3
    runs.open_gate()
    assert runs.run("--issue", "i-1", "--until", "architect")[-1]["state"] == "reached"


def test_a_runner_that_slept_for_longer_than_its_token_lives_goes_on(runs: Runs, served: Service) -> None:
    words = ["--format", "json", "--issue", "i-1", "--token-ttl", "1", "--until", "architect"]
    process = runs.start(*words, script={"chief-architect": ["gate"]})
    agent = at_the_gate(runs, process, "chief-architect")["agent_id"]
    process.send_signal(signal.SIGSTOP)
    runs.open_gate()
    until(lambda: served.client().get(f"/api/agents/{agent}/status").json()["ended_at"])
    expired = time.time() + 2
    until(lambda: time.time() > expired)
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == 0, runs.output(process, "err")
    assert "AUTH_002" not in runs.output(process, "err") and " 401 " in served.log


def test_results_whose_events_have_expired_are_not_guessed_about(runs: Runs, make_service: Callable[..., Service]) -> None:
    service = make_service("--event-retention", "1", env=runs.env)
    service.client().store("python-specialist", issue="i-1")
    until(lambda: not service.client().get("/api/events").json()["events"])
    assert "have expired; begin anew with --restart" in runs.refuse("--issue", "i-1", code=1)
    runs.run("--issue", "i-1", "--restart", "--type", "test-engineer", "--until", "qa")
    assert runs.worked() == ["test-engineer"]


# -- one after the other, and side by side


def test_two_pipelines_on_one_issue_are_one_too_many(runs: Runs, served: Service) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", "--until", "architect", script={"chief-architect": ["gate"]})
    at_the_gate(runs, process, "chief-architect")
    assert "a pipeline for i-1 is already running" in runs.refuse("--issue", "i-1", code=1)
    runs.open_gate()
    assert process.wait(30) == 0


def test_a_service_that_another_pipeline_still_uses_stays_until_that_has_ended(runs: Runs) -> None:
    first = runs.start("--format", "json", "--issue", "i-1", "--until", "architect", script={"chief-architect": ["gate"]})
    at_the_gate(runs, first, "chief-architect")
    service = runs.service(first)
    second = runs.start("--format", "json", "--issue", "i-2", "--type", "go-specialist", "--until", "coding", script={"go-specialist": ["hang"]})
    agent = at_the_gate(runs, second, "go-specialist")
    runs.open_gate()
    assert first.wait(30) == 0
    assert "another pipeline uses the service" in runs.events(first)[-1]["reason"]
    assert lives(service) and second.poll() is None
    os.kill(agent["pid"], signal.SIGTERM)  # fails, is tried again
    until(lambda: len(runs.events(second, "agent_started")) == 2)
    second.send_signal(signal.SIGTERM)
    assert second.wait(30) == 130
    until(lambda: not lives(service))


# -- interruptions


def test_ctrl_c_ends_the_agent_and_leaves_nothing_running(runs: Runs) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"chief-architect": ["hang", "success"]})
    at_the_gate(runs, process, "chief-architect")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert marked_processes() == [] and runs.output(process, "err") == ""
    assert runs.events(process)[-1]["state"] == "interrupted" and "run --issue i-1` goes on from here" in runs.events(process)[-1]["reason"]

    events = runs.run("--issue", "i-1", "--retries", "0", "--until", "architect")  # being interrupted is no failure
    assert [(row["state"], row["status"]) for row in events[-1]["agents"]] == [("killed", None), ("completed", "success")]


def test_a_second_ctrl_c_ends_at_once(runs: Runs, served: Service) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"chief-architect": ["ignore"]})
    agent = at_the_gate(runs, process, "chief-architect")["agent_id"]
    until(lambda: "ignoring" in served.client().get(f"/api/agents/{agent}/logs").json()["text"])
    process.send_signal(signal.SIGINT)
    until(lambda: f"DELETE /api/agents/{agent}" in served.log)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and not runs.events(process, "pipeline_ended")
    until(lambda: served.client().get(f"/api/agents/{agent}/status").json()["state"] == "killed", 30)


def test_a_reader_that_goes_away_ends_the_agent_too(runs: Runs) -> None:
    reader, writer = os.pipe()
    process = runs.start("--format", "json", "--issue", "i-1", script={"chief-architect": ["chatter"]}, out=writer)
    os.close(writer)
    until(lambda: "chief-architect" in runs.worked())
    os.close(reader)
    assert process.wait(60) == 130, runs.output(process, "err")
    assert marked_processes() == []


# -- what is refused


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--issue", "../x"], 2, "--issue: '../x' must match"),
        (["--issue", "a..b"], 2, "--issue: 'a..b' must match"),
        ([], 2, "--issue"),
        (["--issue", "i", "--until", "codding"], 2, "--until: 'codding' is neither an agent type nor one of the categories architect, coding"),
        (["--issue", "i", "--rounds", "0"], 2, "'0' is not a whole number from 1 on"),
        (["--issue", "i", "--retries", "-1"], 2, "--retries"),
        (["--issue", "i", "--timeout", "soon"], 2, "'soon' is not a whole number from 1 on"),
        (["--issue", "i", "--format", "csv"], 2, "--format"),
        (["--issue", "i", "--type", "wizard"], 2, "--type: Unknown agent type wizard"),
        (["--issue", "i", "--url", "http://127.0.0.1:9", "--patience", "0"], 3, "is not reachable"),
        (["--issue", "i", "--tls-cert", "/nowhere", "--tls-key", "/nowhere"], 2, "the service did not start: --tls-cert"),
        (["--issue", "i", "--agent-command", "/nowhere/agent"], 1, "500 AGT_001: Agent spawn failed: agent: No such file or directory"),
    ],
)
def test_wrong_use_is_one_line(runs: Runs, words: list[str], code: int, says: str) -> None:
    assert says in runs.refuse(*words, code=code)
    assert runs.worked() == [] and marked_processes() == []


def test_a_sick_start_is_said_as_json_too(runs: Runs) -> None:
    events = runs.run("--issue", "i-1", "--agent-command", "/nowhere/agent", code=1)
    assert events[-1]["event"] == "pipeline_ended" and events[-1]["state"] == "error" and "AGT_001" in events[-1]["reason"]


# -- what is shown


def test_on_a_terminal_the_running_agents_line_is_written_in_place(runs: Runs, served: Service) -> None:
    ours, theirs = pty.openpty()
    process = runs.start("--issue", "i-1", "--until", "architect", script={"chief-architect": ["crash", "gate"]}, out=theirs, COLUMNS="60")
    os.close(theirs)
    seen = b""

    def shows(text: bytes) -> bool:
        nonlocal seen
        if select.select([ours], [], [], 0)[0]:
            seen += os.read(ours, 4096)
        return text in seen

    until(lambda: shows(b"at the gate"))
    runs.open_gate()
    until(lambda: shows(b"WHY"))
    assert process.wait(30) == 0
    os.close(ours)
    shown = [part for part in seen.decode().split("\r\x1b[K") if "at the gate" in part]
    assert shown and "chief-architect running" in shown[0] and all(len(part) < 60 for part in shown if "\n" not in part)
    assert b"\x1b[31m" not in seen and b"out of luck" in seen


def test_the_table_says_what_happened_line_by_line(runs: Runs, served: Service) -> None:
    process = runs.start("--issue", "i-1", "--until", "coding", script={"chief-architect": ["silent", "success"]})
    assert process.wait(60) == 0
    lines = runs.output(process).splitlines()
    assert f"i-1 begins at {served.url}" in lines[0]
    assert any("chief-architect failed after" in line and "ended without storing a result; its last lines: I forgot" in line for line in lines)
    assert any(line.endswith("  next: python-specialist (high), architecture-success: implementation of what was designed") for line in lines)
    assert any("reached: coding has succeeded" in line for line in lines) and "\x1b" not in "".join(lines) and "\r" not in "".join(lines)

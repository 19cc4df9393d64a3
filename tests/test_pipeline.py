"""The bundled plugin `pipeline`: `cco run` with the real service and real agents, killed at every place where it
hurts.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import requests
from agent_harness import alive
from conftest import MODULE, PROJECT, ROOT, Service, clean_environment, end_stragglers, marked_processes, plugin, until

from cco_sidecar import NextAgent, birth_of

rules, view = plugin("_pipeline_plan"), plugin("_pipeline_view")
read_sidecar_json = plugin("_files").read_sidecar_json
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

    def start(
        self, *words: str, script: Any = None, out: Any = None, stdin: Any = subprocess.DEVNULL, **env: str
    ) -> subprocess.Popen[bytes]:
        """Run in the background; what it prints goes to a file of its own, `output` reads it."""
        task = [] if script is None else ["--task", json.dumps(script)]
        where = [f"--root={self.root}", f"--storage={self.storage}", f"--project={PROJECT}", "--pause=0"]
        command = [sys.executable, str(MODULE), "run", *where, *task, *words]
        number = len(self.started)
        with self.path(number, "out").open("wb") as stdout, self.path(number, "err").open("wb") as stderr:
            streams = {"stdin": stdin, "stdout": out or stdout, "stderr": stderr}
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
        return [
            event
            for event in (json.loads(line) for line in lines if line.endswith("\n"))
            if name in ("", event["event"])
        ]

    def run(self, *words: str, script: Any = None, code: int = 0, **env: str) -> list[dict[str, Any]]:
        """Run to the end, which must be `code`; what it printed as JSON."""
        process = self.start("--format", "json", *words, script=script, **env)
        assert process.wait(180) == code, self.output(process) + self.output(process, "err")
        return shown_in_pairs(self.events(process))

    def refuse(self, *words: str, code: int) -> str:
        """Run to an end that is one line on stderr."""
        process = self.start(*words)
        assert process.wait(180) == code, self.output(process) + self.output(process, "err")
        error = self.output(process, "err")
        assert error.startswith("cco: ") and error.count("\n") == 1
        return error

    def worked(self) -> list[str]:
        """The types of all agents that have started to work, in order."""
        return self.log.read_text().split() if self.log.exists() else []

    def open_gate(self) -> None:
        (self.folder / "open").touch()

    def mend(self, agent_type: str) -> None:
        """From now on it succeeds, whatever its task says."""
        (self.folder / f"mended-{agent_type}").touch()

    def service(self, process: subprocess.Popen[bytes]) -> psutil.Process:
        """The service that a run has started."""
        return until(
            lambda: next(
                (child for child in psutil.Process(process.pid).children() if "run-service" in words_of(child)), None
            )
        )


def shown_in_pairs(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of a run, in which each agent begins once, ends once, and is in the summary."""
    begun = [event["agent_id"] for event in events if event["event"] in ("agent_started", "agent_found")]
    ended = [event["agent_id"] for event in events if event["event"] == "agent_ended"]
    assert begun == ended and len(set(begun)) == len(begun), events
    (end,) = [event for event in events if event["event"] == "pipeline_ended"]
    assert end["state"] == "error" or set(begun) <= {row["agent_id"] for row in end["agents"]}
    return events


@pytest.fixture
def runs(tmp_path: Path, repository: Path) -> Iterator[Runs]:
    found = Runs(tmp_path, repository)
    yield found
    for process in found.started:
        if process.poll() is None:
            process.kill()
            process.wait()
    until(lambda: not any("run-service" in words_of(process) for process in marked_processes()), 20)
    end_stragglers()


@pytest.fixture
def served(runs: Runs, make_service: Callable[..., Service]) -> Service:
    """A service for this repository that runs already."""
    return make_service("--log-level", "debug", env=runs.env)


def at_the_gate(runs: Runs, process: subprocess.Popen[bytes], agent_type: str = "python-specialist") -> dict[str, Any]:
    """The agent of that type, once it waits at the gate."""
    until(lambda: agent_type in runs.worked())
    return until(
        lambda: next(
            (event for event in runs.events(process, "agent_started") if event["agent_type"] == agent_type), None
        )
    )


# -- the rules


def proposals(text: str) -> list[NextAgent]:
    return [NextAgent(*item.split(":"), f"after {text}") for item in text.split()]


def outcome(text: str) -> Any:
    """`python-specialist coding success test-engineer:high`"""
    agent_type, category, status, *proposed = text.split(maxsplit=3)
    return rules.Outcome(f"{agent_type}-1", agent_type, category, status, proposals(" ".join(proposed)))


def plan_after(*outcomes: str, until: str | None = None) -> Any:
    plan = rules.Plan(NextAgent("chief-architect", "high", "first"), until)
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
        (
            [DESIGNED, CODED, TESTED],
            "security-auditor documentation-expert",
        ),  # what was proposed before is not forgotten
        ([DESIGNED, CODED, TESTED, "security-auditor security success"], "documentation-expert"),
        (
            [
                DESIGNED,
                CODED,
                TESTED,
                "security-auditor security success",
                "documentation-expert documentation success",
            ],
            "",
        ),
        ([DESIGNED, CODED, "test-engineer qa failed python-specialist:high"], "python-specialist security-auditor"),
        ([DESIGNED, CODED, TESTED, UNSAFE, CODED], "test-engineer security-auditor documentation-expert"),
        (["chief-architect architect failed"], "chief-architect"),  # routing names nobody: it tries again by itself
        (["documentation-expert documentation failed"], "documentation-expert"),
        ([CODED], "test-engineer security-auditor"),  # begun by hand: no architect
        (["x coding success b:low a:low c:high", "y coding success a:low d:low"], "c b a d"),  # a keeps its place
        (["x coding success a:high", "y coding success a:low b:medium"], "a b"),  # and its priority
        # also when it is tried again: nobody tests what is half done
        ([DESIGNED, "python-specialist coding partial python-specialist:medium"], "python-specialist test-engineer"),
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
def test_until_is_reached_by_a_success_that_nothing_has_put_in_doubt(
    goal: str | None, outcomes: list[str], reached: bool
) -> None:
    assert plan_after(*outcomes, until=goal).reached is reached


@pytest.mark.parametrize(
    ("agent_type", "task", "outcomes", "reason"),
    [
        ("chief-architect", "x", [], "first"),  # it is pending
        ("chief-architect", "x", [DESIGNED], "first"),
        ("chief-architect", "x", [DESIGNED, CODED], "first"),
        ("python-specialist", "x", [DESIGNED], "after python-specialist:high"),  # it is pending
        ("python-specialist", "x\n\nYour part: asked before", [DESIGNED], "asked before"),
        ("python-specialist", "x\n\nYour part: asked before", [DESIGNED, CODED], "asked before"),
        ("chief-architect", "x\n\nYour part: the third in a row", [DESIGNED, CODED], "the third in a row"),
        ("go-specialist", "x", [DESIGNED, CODED], ""),  # nobody of the pipeline asked it
    ],
)
def test_an_agent_that_was_killed_keeps_its_reason_when_another_has_done_its_work(
    agent_type: str, task: str, outcomes: list[str], reason: str
) -> None:
    killed = {"agent_id": f"{agent_type}-0", "agent_type": agent_type, "task": task}
    assert plan_after(*outcomes).reason(killed).startswith(reason)
    assert bool(plan_after(*outcomes).reason(killed)) is bool(reason)


def test_failures_are_counted_in_a_row() -> None:
    plan = plan_after("a coding failed a:high", "a coding partial a:high", "b qa failed a:high", "b qa success")
    assert plan.failures == {"a": 2, "b": 0}


AGENT = {
    "agent_type": "coder",
    "state": "completed",
    "exit_code": 0,
    "signal": None,
    "output_tail": ["one", " ", "two", "three", "four"],
}


@pytest.mark.parametrize(
    ("facts", "may_write", "ordered", "status", "words"),
    [
        ({}, True, "", "failed", "coder ended without storing a result; its last lines: two | three | four"),
        ({}, False, "", "success", "four"),
        ({"output_tail": []}, True, "", "failed", "coder ended without storing a result; it wrote nothing"),
        (
            {"state": "failed", "exit_code": 3},
            False,
            "",
            "failed",
            "coder failed with exit code 3 without storing a result; its last lines",
        ),
        ({"state": "failed", "exit_code": -9, "signal": 9}, True, "", "failed", "coder failed with signal 9 without"),
        (
            {"state": "failed", "reason": "it has no licence"},
            True,
            "",
            "failed",
            "coder cannot work: it has no licence; its",
        ),
        ({"state": "lost"}, True, "", "failed", "coder was lost with the service without"),
        ({"state": "killed"}, True, "", "failed", "coder was ended from outside without"),
        ({"state": "killed"}, True, "took longer than 5 s", "failed", "coder took longer than 5 s; its last lines"),
        ({"state": "timeout"}, True, "", "failed", "coder was ended by the service's --agent-timeout without"),
    ],
)
def test_what_is_said_of_an_agent_that_stored_nothing(
    facts: dict[str, Any], may_write: bool, ordered: str, status: str, words: str
) -> None:
    result = rules.silent_result(AGENT | facts, may_write, ordered)
    assert result["status"] == status and result["artifacts"]["reported_by"] == "pipeline"
    assert rules.short_decision(result).startswith(words)


@pytest.mark.parametrize(
    ("result", "number"),
    [
        ({"status": "success"}, 0),
        ({"files_created": ["a", {"path": "b"}], "files_modified": ["a"]}, 2),
        ({"status": "partial", "warnings": ["Which files it changed is not known: there is no git repository"]}, None),
        ({"warnings": ["Written after the agent's end, by whom is not known: a"]}, None),
        ({"warnings": ["Whether it changed files in the submodules without a commit is not known"]}, None),
        ({"status": "success", "warnings": ["The limit is not known"]}, 0),
        ({"status": "partial", "warnings": ["Changed already, and not committed, before the agent began: a"]}, 0),
        (rules.silent_result(AGENT, True), None),
        (rules.silent_result(AGENT, False), None),
        (rules.done_result({"files_modified": ["a"]}, "r"), 1),
        ({}, None),  # there is none
    ],
)
def test_files_that_nobody_knows_are_not_none(result: dict[str, Any], number: int | None) -> None:
    known = rules.files_of(result)
    assert (known if known is None else len(known)) == number
    row = {
        "status": "partial",
        "state": "completed",
        "seconds": 1,
        "files_changed": number,
        "decision": "it said so",
        "source": "",
    }
    facts = row | {"agent_type": "go-specialist", "next_agents": []}
    (line,) = view.ended_line(facts)
    said = {None: "", 1: ", 1 file changed"}.get(number, f", {number} files changed")
    assert line == f"go-specialist partial after 1.0 s{said}: it said so"
    line, _ = view.ended_line(facts | {"source": "sidecar"})
    assert line == f"go-specialist partial after 1.0 s{said or ', which files it changed is not known'}: it said so"
    assert view.SUMMARY["files"](row) == ("?" if number is None else str(number))


def test_secrets_in_last_words_are_not_stored() -> None:
    result = rules.silent_result(AGENT | {"output_tail": ["the token is ghp_" + "a1B2" * 9]}, True)
    assert "ghp_" not in json.dumps(result) and "REDACTED" in json.dumps(result)


@pytest.mark.parametrize("text", ["\x1b[31mred\x1b[0m", "\x1b]0;title\x07red", "red", "\x1b[2Jred"])
def test_what_an_agent_writes_does_not_steer_the_terminal(text: str) -> None:
    assert view.plain(text) == "red"


# -- the whole way


def test_an_issue_goes_from_the_architect_to_the_documentation(runs: Runs, served: Service) -> None:
    events = runs.run("--issue", "i-1", script={})
    assert runs.worked() == ALL
    begin, end = events[0], events[-1]
    assert (
        begin["event"] == "pipeline_started"
        and begin["url"] == served.url
        and begin["service"] == "running"
        and not begin["going_on"]
    )
    assert end["event"] == "pipeline_ended" and (end["state"], end["exit_code"]) == ("done", 0)
    assert [row["agent_type"] for row in end["agents"]] == ALL
    assert {row["state"] for row in end["agents"]} == {"completed"} and {row["status"] for row in end["agents"]} == {
        "success"
    }
    assert [row["files_changed"] for row in end["agents"]] == [1, 1, 1, 1, None]  # the last one may not store results
    assert (
        end["agents"][1]["decision"] == "python-specialist says success"
        and end["agents"][4]["decision"] == "documentation-expert is done"
    )
    assert end["agents"][1]["reason"].startswith("architecture-success") and end["agents"][4]["reason"].startswith(
        "qa-success"
    )
    tasks = [agent["task"] for agent in served.client().get("/api/agents", issue_id="i-1").json()["agents"]]
    assert tasks[0] == "{}" and tasks[1] == "{}\n\nYour part: architecture-success: implementation of what was designed"
    ended = served.client().get("/api/events", type="pipeline_ended").json()["events"]
    assert [event["data"]["state"] for event in ended] == ["done"]

    again = runs.run("--issue", "i-1", "--until", "documentation")
    assert (
        runs.worked() == ALL
        and again[-1]["state"] == "reached"
        and [row["status"] for row in again[-1]["agents"]] == ["success"] * 5
    )
    assert served.process and served.process.poll() is None


def test_with_no_service_it_starts_one_and_leaves_no_process(runs: Runs) -> None:
    process = runs.start("--issue", "i-1", "--agent-command", TEAM, script={}, CCO_SIDECAR_AGENT_COMMAND="false")
    assert process.wait(120) == 0, runs.output(process, "err")
    shown = runs.output(process)
    assert "a service of its own" in shown and runs.output(process, "err") == ""
    rows = [line.split() for line in shown.partition("\n\n")[2].splitlines()]
    assert rows[0] == "TYPE STATE TIME RESULT FILES DECISION WHY".split()
    assert [row[:2] for row in rows[1:]] == [[name, "completed"] for name in ALL]
    until(lambda: not marked_processes())
    assert read_sidecar_json(runs.storage) is None
    assert runs.run("--issue", "i-1")[-1]["state"] == "done" and runs.worked() == ALL


@pytest.mark.parametrize(("more", "told"), [
    (["--budget-usd", "2"], r"\S+ does not report what it spends in usd: --budget-usd counts nothing of it"),
    (["--budget-tokens", "9", "--format", "json"], r"does not report what it spends in tokens: --budget-tokens counts"),
    (["--agent-commands", '{"go-specialist": "no-such"}', "--log-format", "json"],
     "--agent-commands: no agent of the type go-specialist can be started: no-such is not on PATH"),
])  # fmt: skip
def test_what_its_own_service_warns_of_is_in_its_output_once(runs: Runs, more: list[str], told: str) -> None:
    process = runs.start("--issue", "issue-1", "--until", "chief-architect", *more, script={})
    process.wait(120)
    assert len(re.findall(f"the service warns: .*{told}", runs.output(process))) == 1, runs.output(process)


def test_what_an_agent_asks_is_told_once_with_the_command_that_answers_it(runs: Runs) -> None:
    words = ["--issue", "issue-1", "--until", "architect", "--format", "json"]
    process = runs.start(*words, script={"chief-architect": ["ask"]})

    def told() -> list[str]:
        return [note["reason"] for note in runs.events(process, "note") if " asks: " in note["reason"]]

    until(lambda: len(told()) == 3)
    runs.open_gate()
    assert process.wait(120) == 0
    for note, (asked, command) in zip(
        told(),
        [
            ("Up or down?", r"answer \d+ TEXT` answers it, where TEXT is one of up, down"),
            ("Which port?", r"answer \d+ TEXT` answers it"),
            ("Bash: git tag x", r"approve \d+` or `[^`]* deny \d+` answers it"),
        ],
        strict=True,
    ):
        assert re.fullmatch(rf"chief-architect asks: {re.escape(asked)}; `[^`]* {command}", note), note


def test_an_agent_that_works_on_another_issue_meanwhile_is_told_once(runs: Runs, served: Service) -> None:
    client, gated = served.client(), {"chief-architect": ["gate"]}

    def told(events: list[dict[str, Any]]) -> list[str]:
        return [event["reason"].partition(":")[0] for event in events if event["event"] == "note"]

    client.spawn("i-1", "go-specialist", task=json.dumps({"go-specialist": ["gate"]}))
    until(lambda: "go-specialist" in runs.worked())
    assert told(runs.run("--issue", "i-2", "--until", "coding", script={})) == [
        "go-specialist works on i-1 at the same time"
    ]
    runs.open_gate()
    until(lambda: not client.get("/api/agents", status="active").json()["agents"])
    assert told(runs.run("--issue", "i-2", "--until", "qa")) == []
    (runs.folder / "open").unlink()
    first, second = (
        runs.start("--issue", name, "--until", "architect", "--format", "json", script=gated) for name in ("a", "b")
    )
    until(lambda: told(runs.events(first) + runs.events(second)))  # whichever came second
    runs.open_gate()
    assert (first.wait(120), second.wait(120)) == (0, 0)
    notes = told(runs.events(first) + runs.events(second))
    assert set(notes) <= {f"chief-architect works on {name} at the same time" for name in "ab"}


def test_until_stops_there_and_a_later_run_goes_on(runs: Runs, served: Service) -> None:
    assert runs.run("--issue", "i-1", "--until", "coding", script={})[-1]["state"] == "reached"
    assert runs.worked() == ALL[:2]
    assert runs.run("--issue", "i-1", "--until", "coding")[-1]["state"] == "reached" and runs.worked() == ALL[:2]
    events = runs.run("--issue", "i-1", "--until", "security-auditor")
    assert (
        events[0]["going_on"]
        and events[0]["task"] == "{}"
        and events[0]["pending"] == ["test-engineer", "security-auditor"]
    )
    assert runs.worked() == ALL[:4]


def test_another_first_type_and_results_that_are_there_already(runs: Runs, served: Service) -> None:
    runs.run("--issue", "i-1", "--type", "python-specialist", "--until", "coding", script={})
    assert runs.worked() == ["python-specialist"]
    served.client().store("python-specialist", issue="i-2")
    assert runs.run("--issue", "i-2", "--until", "qa", script={})[0]["pending"] == ["test-engineer", "security-auditor"]
    assert runs.worked() == ["python-specialist", "test-engineer"]


def test_restart_begins_anew_and_a_run_after_that_goes_on_with_the_new_one(runs: Runs, served: Service) -> None:
    runs.run("--issue", "i-1", "--until", "coding", script={})
    events = runs.run("--issue", "i-1", "--restart", "--until", "architect", script={})
    assert not events[0]["going_on"] and len(events[-1]["agents"]) == 1
    assert (
        runs.run("--issue", "i-1", "--until", "coding")[-1]["agents"][0]["agent_id"]
        == events[-1]["agents"][0]["agent_id"]
    )
    assert runs.worked() == ALL[:2] + ALL[:2]


# -- the task


@pytest.fixture
def half_done(runs: Runs, served: Service) -> Runs:
    """An issue of which two agents have succeeded and two are to come."""
    runs.run("--issue", "i-1", "--until", "coding", script={})
    return runs


def test_an_unfinished_issue_keeps_its_task_and_its_first_agent(half_done: Runs) -> None:
    error = half_done.refuse("--issue", "i-1", "--task", "something else", code=1)
    assert "i-1 is being worked on with the task '{}': leave --task out to go on with that, or begin anew" in error
    error = half_done.refuse("--issue", "i-1", "--type", "go-specialist", code=1)
    assert "i-1 has begun with chief-architect: leave --type out" in error
    assert half_done.worked() == ALL[:2]
    half_done.run("--issue", "i-1", "--type", "chief-architect", "--until", "qa", script={})  # the same words again
    assert half_done.worked() == ALL[:3]


def test_a_finished_issue_takes_no_new_task(half_done: Runs) -> None:
    half_done.run("--issue", "i-1", "--until", "documentation")
    other = ["--task", "something else"]
    for words in (other, ["--type", "go-specialist"], [*other, "--until", "coding"]):
        error = half_done.refuse("--issue", "i-1", *words, code=1)
        assert "i-1 is done (its task was '{}'): begin it anew with --restart, or give what is new an issue" in error
    for script in (None, {}):
        end = half_done.run("--issue", "i-1", script=script)[-1]
        assert (end["state"], end["reason"], len(end["agents"])) == ("done", "routing has nothing more to propose", 5)
    assert half_done.worked() == ALL
    words = ["--issue", "i-1", "--restart", "--until", "architect"]
    assert half_done.run(*words, script={"a": []})[0]["task"] == '{"a": []}' and half_done.worked() == [*ALL, ALL[0]]
    assert half_done.run(*words)[0]["task"] == '{"a": []}'  # which is the issue's from then on


def test_an_issue_that_was_done_by_hand_takes_no_task_either(runs: Runs, served: Service) -> None:
    for agent_type in ("python-specialist", "test-engineer", "security-auditor"):
        served.client().store(agent_type, issue="i-1")
    spawn_by_hand(served, "documentation-expert", "{}")
    assert runs.run("--issue", "i-1")[-1]["state"] == "done"
    assert "i-1 is done (its task was '{}')" in runs.refuse("--issue", "i-1", "--task", "more", code=1)
    assert runs.worked() == ["documentation-expert"]


def spawn_by_hand(served: Service, agent_type: str, task: str) -> None:
    body = {"agent_type": agent_type, "issue_id": "i-1", "task": task}
    agent = served.client().post("/api/agents/spawn", body).json()["agent_id"]
    until(lambda: served.client().get(f"/api/agents/{agent}/status").json()["ended_at"])


def test_an_issue_without_a_task_needs_one(runs: Runs, served: Service) -> None:
    words = ["--issue", "i-1", "--until", "coding"]
    assert "--task: i-1 has no task yet, so say what is to be done" in runs.refuse(*words, code=2)
    served.client().store("chief-architect", issue="i-1")
    assert "--task: i-1 has no task yet" in runs.refuse(*words, code=2)
    spawn_by_hand(served, "chief-architect", "")
    assert "--task: i-1 has no task yet" in runs.refuse("--restart", *words, code=2)
    for task in ("", " \n\t"):
        assert "--task: is empty" in runs.refuse("--issue", "i-1", "--task", task, code=2)
    assert "30,000 are the most" in runs.refuse("--issue", "i-1", "--task", "x" * 30_001, code=2)
    assert "task: 'caf\\udce9' is not UTF-8" in runs.refuse("--issue", "i-1", "--task", os.fsdecode(b"caf\xe9"), code=2)
    assert runs.run("--restart", *words, "--until", "architect", code=2)[-1]["exit_code"] == 2

    spawn_by_hand(served, "chief-architect", "as said by hand")
    events = runs.run("--issue", "i-1", "--until", "coding")
    assert events[0]["task"] == "as said by hand" and runs.worked() == [ALL[0], *ALL[:2]]


ISSUES = """
from cco_sidecar import IssueNotFound, hookimpl

@hookimpl
def resolve_issue(issue_id):
    if issue_id.startswith("gone"):
        raise IssueNotFound
    return KNOWN.get(issue_id)

KNOWN = {
    "i-1": {"title": "Greet", "body": "Say hello."}, "i-2": {"title": "Only this"}, "i-3": {}, "i-5": "Greet",
    "i-4": {"body": "long " * 20_000},
}
"""


def test_a_plugin_that_knows_the_issue_gives_the_task(runs: Runs) -> None:
    (runs.folder / "issues").mkdir()
    (runs.folder / "issues/issues.py").write_text(ISSUES)
    (runs.root / "cco.toml").write_text(f"plugins = ['{runs.folder}/issues']\n")
    for issue, task in {"i-1": "Greet\n\nSay hello.", "i-2": "Only this", "i-4": ("long " * 20_000)[:30_000]}.items():
        assert runs.run("--issue", issue, "--until", "architect")[0]["task"] == task
    assert runs.run("--issue", "i-3", "--until", "architect", script={})[0]["task"] == "{}"
    for issue in ("i-3", "i-5", "unknown"):
        code = 0 if issue == "i-3" else 2  # it has got one by now
        assert runs.run("--issue", issue, "--until", "architect", code=code)[-1]["exit_code"] == code
    assert "there is no issue gone-1" in runs.refuse("--issue", "gone-1", code=1)


# -- failures


def test_a_failure_is_repaired_as_routing_says(runs: Runs, served: Service) -> None:
    events = runs.run(
        "--issue", "i-1", script={"python-specialist": ["failed", "success"], "test-engineer": ["failed", "success"]}
    )
    assert runs.worked() == [*ALL[:2], "python-specialist", "test-engineer", "python-specialist", *ALL[2:]]
    assert events[-1]["state"] == "done"
    assert [
        row["status"] for row in events[-1]["agents"]
    ] == "success failed success failed success success success success".split()


def test_crashes_bring_back_the_architect_and_then_end_it_for_good(runs: Runs, served: Service) -> None:
    events = runs.run("--issue", "i-1", script={"python-specialist": ["crash"]}, code=1)
    assert runs.worked() == ["chief-architect", *["python-specialist"] * 3, "chief-architect", "python-specialist"]
    assert (
        events[-1]["state"] == "failed"
        and "python-specialist has failed 4 times in a row (--retries 3)" in events[-1]["reason"]
    )
    row = events[-1]["agents"][1]
    assert row["state"] == "failed" and row["status"] == "failed"
    assert (
        row["decision"]
        == "python-specialist failed with exit code 7 without storing a result; its last lines: out of luck"
    )

    runs.mend("python-specialist")  # the cause is gone: another run has all its attempts again
    events = runs.run("--issue", "i-1", "--retries", "0")
    assert events[-1]["state"] == "done" and runs.worked()[6:] == ALL[1:]


def test_an_agent_that_cannot_work_at_all_is_not_tried_again(runs: Runs, tmp_path: Path) -> None:
    """Trying again would cost time and change nothing; another run begins with all attempts."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more/licences.py").write_text(
        "from cco_sidecar import hookimpl\n@hookimpl\ndef agent_failure(agent, output):\n"
        "    return 'it has no licence' if 'out of luck' in str(output) else None\n"
    )
    more = ("--issue", "i-1", "--plugins", str(tmp_path / "more"))
    events = runs.run(*more, script={"python-specialist": ["crash"]}, code=1)
    assert runs.worked() == ["chief-architect", "python-specialist"]
    assert events[-1]["reason"].startswith("python-specialist cannot work: it has no licence;")
    runs.mend("python-specialist")
    assert runs.run(*more)[-1]["state"] == "done"


def test_after_agents_that_fail_it_waits_longer_each_time(runs: Runs, served: Service) -> None:
    script = {"python-specialist": ["failed", "crash"], "chief-architect": ["success", "crash", "success"]}
    words = ("--issue", "i-1", "--pause", "1", "--rounds", "5")
    events = runs.run(*words, script=script, code=1)
    ended = [(row["agent_type"], row["state"], row["status"]) for row in events[-1]["agents"]]
    assert ended[1] == ("python-specialist", "completed", "failed")  # which was work
    waits = [(event["seconds"], event["reason"]) for event in events if event["event"] == "waiting"]
    crashed = [agent_type for agent_type, state, _ in ended if state == "failed"]
    assert waits[0] == (1, f"{crashed[0]} has failed (--pause 1)")
    wait = next(event for event in events if event["event"] == "waiting")
    (line,) = view.LINES["waiting"](wait)
    assert line == f"waits 1 s: {waits[0][1]}"
    assert view.LINES["waiting"](wait | {"at_most": True}) == [line.replace("waits", "waits at most")]
    assert waits[1] == (2, "2 agents in a row have failed (--pause 1)")

    waiting = runs.start("--format", "json", "--issue", "i-2", "--pause", "600", script={"chief-architect": ["crash"]})
    (wait,) = until(lambda: runs.events(waiting, "waiting"))
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(30) == 130 and wait["seconds"] == 600
    assert "goes on from here" in shown_in_pairs(runs.events(waiting))[-1]["reason"]


def test_retries_and_a_type_for_which_routing_has_no_remedy(runs: Runs, served: Service) -> None:
    events = runs.run("--issue", "i-1", "--retries", "1", script={"chief-architect": ["failed"]}, code=1)
    assert runs.worked() == ["chief-architect"] * 2 and events[-1]["state"] == "failed"
    assert [event["reason"] for event in events if event["event"] == "agent_started"][1] == "pipeline: another attempt"


def test_an_agent_that_stores_no_result_gets_a_partial_one_of_its_last_lines_which_counts_as_failed(
    runs: Runs, served: Service
) -> None:
    events = runs.run("--issue", "i-1", "--retries", "0", script={"chief-architect": ["silent"]}, code=1)
    lines = ["I forgot something", "what was it?"]
    (ended,) = (event for event in events if event["event"] == "agent_ended")
    assert (ended["status"], ended["decision"]) == ("partial", "I forgot something; what was it?")
    assert "it stored no result" in "".join(plugin("_pipeline_view").ended_line(ended))
    (stored,) = served.client().get("/api/results", issue_id="i-1").json()["results"]
    assert (stored["source"], stored["result"]["decisions"]) == ("sidecar", lines)


def test_who_ends_with_0_changes_files_and_stores_nothing_has_done_its_step(runs: Runs, served: Service) -> None:
    edits = {name: ["edit"] for name in ALL[:2]} | {"test-engineer": ["failed", "success"]}
    events = runs.run("--issue", "i-1", script=edits)
    assert runs.worked() == [*ALL[:3], "python-specialist", *ALL[2:]]
    assert [row["status"] for row in events[-1]["agents"]] == ["success"] * 2 + ["failed"] + ["success"] * 4
    ended = next(event for event in events if event["event"] == "agent_ended")
    assert (ended["files_changed"], ended["decision"]) == (1, "I changed src/main.py")
    assert "changed files is taken as success" in "".join(plugin("_pipeline_view").ended_line(ended))
    results = served.client().get("/api/results", issue_id="i-1").json()["results"]
    own = [each["result"] for each in results if each["agent_id"] == ended["agent_id"]]
    assert [each["status"] for each in own] == ["partial", "success"]
    assert own[1]["files_modified"] == ["src/main.py"] and own[1]["artifacts"]["reported_by"] == "pipeline"
    # Both are kept; whoever reads the story hears of the step once.
    where = [f"--root={runs.root}", f"--storage={runs.storage}", f"--project={PROJECT}"]
    command = [sys.executable, str(MODULE), "results", "list", "--issue", "i-1", *where]
    listed = subprocess.run(command, env=clean_environment(COLUMNS="200"), capture_output=True, text=True, timeout=60)
    story = served.client().get("/api/issues/i-1/export", format="markdown").text
    brief = served.client().request("GET", "/api/context/i-1/go-specialist", headers={"Accept": "text/markdown"}).text
    decided = brief.partition("## What was decided")[2].partition("\n## ")[0]
    for text, words in ((listed.stdout, "chief-architect"), (story, "| result |"), (decided, "- `chief-architect`")):
        lines = [line for line in text.splitlines() if words in line and "chief-architect" in line]
        assert len(lines) == 1 and "success" in lines[0], text
    assert story.count("As it was stored:") == 7 == len(rules.told_once(results))
    assert len(served.client().get("/api/issues/i-1/export").json()["results"]) == len(results)
    assert runs.run("--issue", "i-1")[-1]["agents"] == events[-1]["agents"]  # the same story, read again
    assert len(runs.worked()) == 7


@pytest.mark.parametrize(
    ("agent_type", "deed"),
    [("test-engineer", "edit"), ("security-auditor", "silent"), ("test-engineer", "crash"), ("test-engineer", "die")],
)
def test_who_judges_and_gives_no_verdict_is_tried_again_itself_and_ends_it_at_last(
    runs: Runs, served: Service, agent_type: str, deed: str
) -> None:
    """It may have seen that all tests fail; nor has a coder anything to repair."""
    events = runs.run("--issue", "i-1", "--retries", "1", script={agent_type: [deed]}, code=1)
    before = ALL[: ALL.index(agent_type)]
    assert [name for name in runs.worked() if name in before] == before
    assert runs.worked()[-1] == agent_type and runs.worked().count(agent_type) == 2
    judged = [event for event in events if event.get("agent_type") == agent_type]
    assert not {event["status"] for event in judged if event["event"] == "agent_ended"} & {"success"}
    again = f"{'security' if 'security' in agent_type else 'qa'}-silence: another attempt, since it gave no verdict"
    assert [event["reason"] for event in judged if event["event"] == "agent_started"][1] == again
    reason = events[-1]["reason"]
    assert reason.startswith(f"{agent_type} has failed 2 times in a row (--retries 1) and gave no verdict: `"), reason
    assert (
        f"agent logs {events[-1]['agents'][-1]['agent_id']}` shows what it did; `" in reason
        and " results store` stores one in its" in reason
    )
    runs.mend(agent_type)
    assert runs.run("--issue", "i-1")[-1]["state"] == "done"


@pytest.mark.parametrize(
    ("category", "deed", "statuses"), [("qa", "edit", ["partial"] * 2), ("documentation", "silent", ["success"])]
)
def test_a_type_that_only_the_running_service_knows_counts_by_its_category_there(
    runs: Runs, make_service: Callable[..., Service], category: str, deed: str, statuses: list[str]
) -> None:
    make_service("--agent-types", f"other={category}", env=runs.env)
    words = ["--issue", "i-1", "--type", "other", "--retries", "1"]
    events = runs.run(*words, script={"other": [deed]}, code=int(category == "qa"))
    assert [row["status"] for row in events[-1]["agents"] if row["agent_type"] == "other"] == statuses


def played(program: str, folder: Path) -> dict[str, str]:
    """The environment of a command whose agents are started as that program, which the team plays."""
    (folder / "bin").mkdir()
    (folder / "bin" / program).write_text(f"#!/bin/sh\nexec {shlex.join(json.loads(TEAM))}\n")
    (folder / "bin" / program).chmod(0o755)
    return {"CCO_SIDECAR_AGENT_COMMAND": program, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.parametrize(("program", "attempts"), [("claude", 2), ("gemini", 2), ("aider", 1)])
def test_a_program_that_can_store_a_result_and_stored_none_has_not_done_its_step(
    runs: Runs, tmp_path: Path, program: str, attempts: int
) -> None:
    words = ["--issue", "i-1", "--until", "coding"]
    events = runs.run(*words, script={"python-specialist": ["edit", "success"]}, **played(program, tmp_path))
    assert runs.worked() == ["chief-architect", *["python-specialist"] * attempts]
    assert [row["status"] for row in events[-1]["agents"][1:]] == ["partial", "success"][-attempts:]


def test_who_ends_with_0_changes_nothing_and_stores_nothing_is_tried_twice(
    runs: Runs, make_service: Callable[..., Service]
) -> None:
    make_service(env=runs.env)
    script = {"chief-architect": ["silent", "success"], "python-specialist": ["silent"]}
    events = runs.run("--issue", "i-1", script=script, code=1)
    assert [runs.worked().count(name) for name in ALL[:2]] == [2, 2] and runs.worked()[-1] == "python-specialist"
    assert (
        "python-specialist has ended twice with exit code 0 and stored no result, and git tells of no file"
        in events[-1]["reason"]
    )
    assert f"agent logs {events[-1]['agents'][-1]['agent_id']}" in events[-1]["reason"]
    runs.mend("python-specialist")
    assert runs.run("--issue", "i-1")[-1]["state"] == "done"  # who starts it again has looked into it


@pytest.mark.parametrize(
    ("program", "advice"),
    [("claude", "claude can do both"), ("gemini", "gemini can do both"), ("aider", "a program that can neither call")],
)
def test_where_an_agent_did_nothing_it_is_said_whether_its_program_could_have(
    runs: Runs, tmp_path: Path, program: str, advice: str
) -> None:
    events = runs.run("--issue", "i-1", script={"chief-architect": ["silent"]}, code=1, **played(program, tmp_path))
    assert f"shows what it did; {advice}" in events[-1]["reason"]


@pytest.mark.parametrize("status", ["failed", "success", "partial"])
def test_what_somebody_stored_after_an_agent_that_stored_nothing_stands(
    runs: Runs, make_service: Callable[..., Service], status: str
) -> None:
    client = make_service(env=runs.env).client()
    script = json.dumps({"chief-architect": ["edit", "success"]})
    spawned = client.spawn("i-1", "chief-architect", task=script)
    until(lambda: client.get(f"/api/agents/{spawned['agent_id']}/status").json()["ended_at"])
    until(lambda: client.get("/api/results", issue_id="i-1").json()["results"])
    client.store("chief-architect", status, "i-1")
    runs.run("--issue", "i-1", "--until", "architect", script=json.loads(script))
    results = client.get("/api/results", issue_id="i-1").json()["results"]
    assert [each["result"]["status"] for each in results[:2]] == ["partial", status]
    assert not any("made_of" in str(each["result"].get("artifacts")) for each in results)
    assert len(runs.worked()) == (1 if status == "success" else 2)


def test_who_may_have_changed_files_is_tried_as_often_as_others(
    runs: Runs, make_service: Callable[..., Service]
) -> None:
    shutil.rmtree(runs.root / ".git")
    make_service(env=runs.env)
    events = runs.run("--issue", "i-1", "--retries", "2", script={"chief-architect": ["edit"]}, code=1)
    assert len(runs.worked()) == 3 and "has failed 3 times in a row" in events[-1]["reason"]


NO_RESULTS = """
from cco_sidecar import hookimpl

@hookimpl
def permission_policy(claims, path, method):
    if claims.agent_type == "chief-architect" and (method, path) == ("POST", "/api/results"):
        return "no results today"
"""


@pytest.mark.parametrize("way", ["invalid", "by policy", "by MCP", "invalid MCP"])
def test_who_changed_files_and_whose_result_was_refused_has_not_done_its_step(
    runs: Runs, make_service: Callable[..., Service], tmp_path: Path, way: str
) -> None:
    (more := tmp_path / "more").mkdir()
    if "invalid" not in way:
        (more / "none.py").write_text(NO_RESULTS)
    make_service("--plugins", str(more), env=runs.env)
    events = runs.run("--issue", "i-1", script={"chief-architect": [way]}, code=1)
    assert runs.worked() == ["chief-architect"] * 2
    why = "its result was refused, " + ("REQ_001" if "invalid" in way else "AUTH_003")
    assert f"ended twice with exit code 0 and stored no result: {why}" in events[-1]["reason"]
    assert all(row["decision"].startswith(why) and row["status"] == "partial" for row in events[-1]["agents"])


def test_without_synthesis_the_pipeline_says_that_an_agent_has_failed(
    runs: Runs, make_service: Callable[..., Service]
) -> None:
    served = make_service("--no-synthesis", env=runs.env)
    events = runs.run("--issue", "i-1", "--retries", "0", script={"chief-architect": ["silent"]}, code=1)
    words = "chief-architect ended without storing a result; its last lines: I forgot something | what was it?"
    assert [event["decision"] for event in events if event["event"] == "agent_ended"] == [words]
    (stored,) = served.client().get("/api/results", issue_id="i-1").json()["results"]
    assert stored["result"]["errors"] == [words] and stored["result"]["artifacts"]["reported_by"] == "pipeline"


def test_a_result_counts_whatever_becomes_of_its_agent(runs: Runs, served: Service) -> None:
    events = runs.run("--issue", "i-1", "--until", "qa", script={"python-specialist": ["store_and_crash"]})
    assert runs.worked() == ALL[:3]
    assert [(row["state"], row["status"]) for row in events[-1]["agents"]][1] == ("failed", "success")


TIME_LIMITS = 3, 15, 60  # the next one where an agent has not come to speak, as on a busy machine


def test_a_time_limit_ends_an_agent(runs: Runs, served: Service) -> None:
    for seconds in TIME_LIMITS:
        asked = served.log.count("GET /api/approvals")
        words = ["--issue", f"i-{seconds}", "--timeout", str(seconds), "--retries", "0"]
        (row,) = runs.run(*words, script={"chief-architect": ["ignore"]}, code=1)[-1]["agents"]
        if "ignoring" in row["decision"]:
            break
    assert (
        row["state"] == "killed"
        and row["decision"] == f"chief-architect took longer than {seconds} s (--timeout); its last lines: ignoring"
    )
    looks = served.log.count(f"GET /api/agents/{row['agent_id']}/status")
    assert served.log.count("GET /api/approvals") == asked + 1 < asked + looks  # nothing was published until its end


def test_an_agent_that_somebody_ends_has_failed(runs: Runs, served: Service) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", "--retries", "0", script={"chief-architect": ["hang"]})
    agent = at_the_gate(runs, process, "chief-architect")["agent_id"]
    assert served.client().delete(f"/api/agents/{agent}").status_code == 202
    assert process.wait(120) == 1
    (row,) = shown_in_pairs(runs.events(process))[-1]["agents"]
    assert row["decision"].startswith("chief-architect was ended from outside without storing a result")


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
    assert process.wait(120) == 0 and runs.worked() == ["go-specialist", "chief-architect"]


def test_room_that_an_issue_will_never_have_is_not_waited_for(runs: Runs, make_service: Callable[..., Service]) -> None:
    make_service("--max-agents-per-issue", "2", env=runs.env)
    process = runs.start("--issue", "i-1", script={})
    assert process.wait(120) == 1 and runs.worked() == ALL[:2]
    assert "--max-agents-per-issue allows no more" in runs.output(process, "err")


class Late(http.server.BaseHTTPRequestHandler):
    """A way to the service on which each look at the list of agents comes after the ends of all of them."""

    service: Service

    def do_GET(self) -> None:
        while self.path.startswith("/api/agents?") and self.service.client().get("/status").json()["agents"]["active"]:
            time.sleep(0.01)
        content = self.rfile.read(int(self.headers["Content-Length"])) if self.headers["Content-Length"] else None
        names = ("Authorization", "Content-Type", "Idempotency-Key")
        headers = {name: self.headers[name] for name in names if self.headers[name]}
        answer = requests.request(self.command, self.service.url + self.path, data=content, headers=headers, timeout=60)
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def late_url(served: Service) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("LateHere", (Late,), {"service": served}))
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("script", "words", "code", "states"),
    [
        ({}, [], 0, ["completed"] * 5),
        ({"chief-architect": ["crash", "silent"]}, ["--retries", "1"], 1, ["failed", "completed"]),
        ({"chief-architect": ["die"]}, ["--retries", "1"], 1, ["failed"] * 2),
        ({"chief-architect": ["crash"]}, ["--retries", "11"], 1, ["failed"] * 12),
    ],
)
def test_an_agent_that_ends_before_it_is_looked_at_is_shown_as_ended(
    runs: Runs, served: Service, late_url: str, script: Any, words: list[str], code: int, states: list[str]
) -> None:
    events = runs.run("--issue", "i-1", "--url", late_url, *words, script=script, code=code, JWT_TOKEN=served.token())
    ends = [event for event in events if event["event"] == "agent_ended"]
    assert [event["state"] for event in ends] == states


def test_a_command_that_is_not_there_is_told_before_an_issue_begins(runs: Runs) -> None:
    for more in (["/nowhere/agent"], ["no-such-agent"], ["README.md"]):
        words = ("--issue", "i-1", "--task", "x", "--agent-command", *more)
        assert f"no chief-architect can be started: {more[0]}: " in runs.refuse(*words, code=1)
    assert runs.run("--issue", "i-1", "--until", "architect", script={})[0]["going_on"] is False
    words = ("--issue", "i-1", "--agent-command", "no-such-agent")
    assert "no python-specialist can be started: no-such-agent: " in runs.refuse(*words, code=1)
    events = runs.run("--issue", "i-1", "--until", "architect", "--agent-command", "no-such-agent")
    assert events[-1]["state"] == "reached"
    words = ("--issue", "i-2", "--retries", "0")
    assert runs.run(*words, "--task", "x", "--agent-command", "false", code=1)[-1]["state"] == "failed"
    assert "no chief-architect can be started: no-such: " in runs.refuse(*words, "--agent-command", "no-such", code=1)


def test_an_agent_whose_command_cannot_be_run_has_not_failed_at_its_work(
    runs: Runs, make_service: Callable[..., Service]
) -> None:
    service = make_service("--agent-command", "/nowhere/agent")
    assert "AGT_001" in runs.refuse("--issue", "i-1", "--task", "x", code=1)
    service.stop()
    events = runs.run("--issue", "i-1", "--until", "architect", script={})  # nor has that begun: another task is fine
    assert [row["state"] for row in events[-1]["agents"]] == ["completed"] and not events[0]["going_on"]


# -- crashes


def test_the_runner_is_killed_and_the_next_one_waits_for_the_running_agent(runs: Runs, served: Service) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"python-specialist": ["gate"]})
    agent = at_the_gate(runs, process)["agent_id"]
    process.kill()
    process.wait()
    again = runs.start("--format", "json", "--issue", "i-1")
    until(lambda: [event for event in runs.events(again, "agent_output") if event["agent_id"] == agent])
    runs.open_gate()
    assert again.wait(120) == 0 and runs.worked() == ALL
    shown_in_pairs(runs.events(again))
    assert [event["agent_id"] for event in runs.events(again, "agent_found")] == [agent]


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
    assert events[-1]["agents"][1]["decision"].startswith(
        "python-specialist failed with signal 9 without storing a result"
    )


def test_the_runner_and_with_it_its_service_are_killed(runs: Runs) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"python-specialist": ["gate"]})
    agent = at_the_gate(runs, process)["agent_id"]
    service = runs.service(process)
    process.kill()
    process.wait()
    again = runs.start("--format", "json", "--issue", "i-1")  # at once: the old service is still about to stop
    until(lambda: [event for event in runs.events(again, "agent_output") if event["agent_id"] == agent])
    assert not alive([service]) and runs.service(again).pid != service.pid
    runs.open_gate()
    assert again.wait(120) == 0 and runs.worked() == ALL
    until(lambda: not marked_processes())
    shown_in_pairs(runs.events(again))


def test_both_are_killed_at_once(runs: Runs) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"python-specialist": ["gate"]})
    at_the_gate(runs, process)
    service = runs.service(process)
    service.kill()
    process.kill()
    process.wait()
    runs.open_gate()
    assert runs.run("--issue", "i-1")[-1]["state"] == "done"
    assert runs.worked() in (
        ALL,
        [*ALL[:2], *ALL[1:]],
    )  # an agent that found no service to store its result in has failed
    until(lambda: not marked_processes())


@pytest.mark.parametrize("runner_dies", [True, False])
def test_an_agent_that_ends_well_while_there_is_no_service_is_not_run_again(
    runs: Runs, served: Service, runner_dies: bool
) -> None:
    words = ["--format", "json", "--issue", "i-1", "--type", "documentation-expert"]
    process = runs.start(*words, script={"documentation-expert": ["gate"]})
    agent = at_the_gate(runs, process, "documentation-expert")
    served.kill()
    if runner_dies:
        process.kill()
        process.wait()
    runs.open_gate()
    until(lambda: not psutil.pid_exists(agent["pid"]))
    served.start()
    if runner_dies:
        process = runs.start(*words)
    assert process.wait(120) == 0, runs.output(process, "err")
    (row,) = shown_in_pairs(runs.events(process))[-1]["agents"]
    assert (row["agent_id"], row["state"], row["status"]) == (agent["agent_id"], "completed", "success")
    assert runs.worked() == ["documentation-expert"]


def test_a_service_that_is_killed_and_started_again_is_waited_for(runs: Runs, served: Service) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"python-specialist": ["gate"]})
    at_the_gate(runs, process)
    served.kill()
    until(lambda: runs.events(process, "waiting"))
    served.start()
    runs.open_gate()
    assert process.wait(120) == 0, runs.output(process, "err")
    assert runs.worked() == ALL
    shown_in_pairs(runs.events(process))


@pytest.mark.parametrize("down", [Service.stop, Service.kill], ids=["stop", "kill -9"])
def test_that_a_result_was_refused_is_known_after_a_restart(
    runs: Runs, served: Service, down: Callable[[Service], Any]
) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", "--rounds", "1", script={"chief-architect": ["late"]})
    agent = at_the_gate(runs, process, "chief-architect")["agent_id"]
    path = f"/api/agents/{agent}/status"
    until(lambda: "waiting" in served.client().get(path).json()["output_tail"])
    with contextlib.closing(sqlite3.connect(served.storage / "sidecar.db")) as database:  # it is written behind
        until(lambda: database.execute("select 1 from agent_outcome where outcome like '%refused%'").fetchone())
    down(served)
    served.start()
    runs.open_gate()
    assert process.wait(60) == 1, runs.output(process, "err")
    (row,) = runs.events(process)[-1]["agents"]
    assert row["decision"].startswith("its result was refused, REQ_001")


@pytest.mark.parametrize("moment", ["while no service runs", "after the restart"])
@pytest.mark.parametrize("down", [Service.stop, Service.kill], ids=["stop", "kill -9"])
def test_an_agent_that_ends_around_a_restart_is_not_run_again(
    runs: Runs, served: Service, down: Callable[[Service], Any], moment: str
) -> None:
    """Of a type that may store no result the exit code alone says how it ended."""
    words = "--format json --issue i-1 --type documentation-expert"
    process = runs.start(*words.split(), script={"documentation-expert": ["gate"]})
    agent = at_the_gate(runs, process, "documentation-expert")
    down(served)
    if moment == "while no service runs":
        runs.open_gate()
        until(lambda: not psutil.pid_exists(agent["pid"]))
    served.start()
    runs.open_gate()
    assert process.wait(120) == 0, runs.output(process, "err")
    (row,) = runs.events(process)[-1]["agents"]
    assert runs.worked() == ["documentation-expert"] and (row["state"], row["status"]) == ("completed", "success")


def test_its_own_service_is_started_again(runs: Runs) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"python-specialist": ["gate"]})
    at_the_gate(runs, process)
    first = runs.service(process)
    first.kill()
    until(lambda: (info := read_sidecar_json(runs.storage)) and info.pid != first.pid)
    runs.open_gate()
    assert process.wait(120) == 0, runs.output(process, "err")
    assert runs.worked() == ALL
    until(lambda: not marked_processes())
    shown_in_pairs(runs.events(process))


def test_a_service_that_stays_away_is_exit_code_3(runs: Runs, served: Service) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", "--patience", "0", script={"chief-architect": ["gate"]})
    at_the_gate(runs, process, "chief-architect")
    served.kill()
    assert process.wait(120) == 3
    assert "is not reachable" in runs.output(process, "err") and runs.events(process)[-1]["exit_code"] == 3
    runs.open_gate()
    assert runs.run("--issue", "i-1", "--until", "architect")[-1]["state"] == "reached"


@pytest.mark.parametrize("moment", ["agent_started", "at the gate"])
def test_a_service_that_is_stopped_is_named_and_the_same_command_goes_on(
    runs: Runs, served: Service, moment: str
) -> None:
    words = ["--issue", "i-1", "--patience", "0", "--until", "architect"]
    process = runs.start("--format", "json", *words, script={"chief-architect": ["gate"]})
    if moment == "agent_started":  # it is not among the agents that the pipeline has read yet
        until(lambda: runs.events(process, moment))
    else:
        at_the_gate(runs, process, "chief-architect")
    served.process.send_signal(signal.SIGSTOP)
    try:
        assert process.wait(180) == 3
    finally:
        served.process.send_signal(signal.SIGCONT)
    said = runs.output(process, "err")
    assert f"pid {served.process.pid} is stopped" in said, said
    assert "its agent goes on, and `" in said and said.endswith("` goes on from here\n") and "start the" not in said
    runs.open_gate()
    assert runs.run(*words)[-1]["state"] == "reached" and runs.worked() == ["chief-architect"]


def test_a_runner_that_slept_for_longer_than_its_token_lives_goes_on(runs: Runs, served: Service) -> None:
    words = ["--format", "json", "--issue", "i-1", "--until", "architect"]
    process = runs.start(*words, script={"chief-architect": ["gate"]}, CCO_SIDECAR_TOKEN_TTL="3")
    agent = at_the_gate(runs, process, "chief-architect")["agent_id"]
    process.send_signal(signal.SIGSTOP)
    runs.open_gate()
    until(lambda: served.client().get(f"/api/agents/{agent}/status").json()["ended_at"])
    expired = time.time() + 4  # a token of 1 second may be over before a busy machine sends it
    until(lambda: time.time() > expired)
    process.send_signal(signal.SIGCONT)
    assert process.wait(120) == 0, runs.output(process, "err")
    assert "AUTH_002" not in runs.output(process, "err") and " 401 " in served.log


def test_results_whose_events_have_expired_are_not_guessed_about(
    runs: Runs, make_service: Callable[..., Service]
) -> None:
    service = make_service("--event-retention", "1", env=runs.env)
    service.client().store("python-specialist", issue="i-1")
    until(lambda: not service.client().get("/api/events").json()["events"])
    assert "have expired; begin anew with --restart" in runs.refuse("--issue", "i-1", "--task", "{}", code=1)
    runs.run("--issue", "i-1", "--restart", "--type", "test-engineer", "--until", "qa", script={})
    assert runs.worked() == ["test-engineer"]


def test_an_agent_of_somebody_else_is_found_and_shown_as_ended(runs: Runs, served: Service) -> None:
    body = {"agent_type": "python-specialist", "issue_id": "i-1", "task": json.dumps({"python-specialist": ["gate"]})}
    agent = served.client().post("/api/agents/spawn", body).json()["agent_id"]
    process = runs.start("--format", "json", "--issue", "i-1", "--until", "coding")
    (found,) = until(lambda: runs.events(process, "agent_found"))
    assert found["agent_id"] == agent and found["pid"]
    runs.open_gate()
    assert process.wait(120) == 0
    assert [row["agent_id"] for row in shown_in_pairs(runs.events(process))[-1]["agents"]] == [agent]


# -- whose service, with which options


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--agent-command", TEAM], "--agent-command"),
        (["--max-agents", "10"], "--max-agents"),  # what it has is not known
        (["--agent-timeout", "60", "--max-depth", "2"], "--agent-timeout, --max-depth"),
        (["--port", "1"], "--port"),
        (["--project", "another"], "--project"),
        (["--no-watch"], "--no-watch"),
        (["--token-ttl", "60"], "--token-ttl"),
        (["--cors-origin", "http://a", "--cors-origin", "http://b"], "--cors-origin"),
    ],
)
def test_what_the_running_service_decides_is_refused(runs: Runs, served: Service, words: list[str], flags: str) -> None:
    error = runs.refuse("--issue", "i-1", "--task", "x", *words, code=2)
    where = f"{served.url}, pid {served.info['pid']}"
    assert error.startswith(f"cco: {flags}: decided by the service that runs already ({where}): start that again with")
    assert re.search(r"in its cco\.toml; where none runs, `\S*python\S* .+ run` starts one of its own", error)
    error = runs.refuse("--issue", "i-1", "--task", "x", "--url", served.url, *words, code=2)
    assert error.startswith(f"cco: {flags}: decided by the service that runs already ({served.url}): ")
    assert runs.worked() == []


def test_what_the_running_service_is_known_to_have_is_fine(runs: Runs, served: Service) -> None:
    words = ["--issue", "i-1", "--until", "architect", "--port", served.url.rpartition(":")[2], "--project", PROJECT]
    assert runs.run(*words, script={})[-1]["state"] == "reached"
    runs.run("--issue", "i-1", "--until", "coding", "--url", served.url, "--project", PROJECT, JWT_TOKEN=served.token())
    assert runs.worked() == ALL[:2]


def test_a_second_pipeline_may_have_the_same_options_as_the_first(runs: Runs) -> None:
    options = ["--max-agents", "3", "--agent-command", TEAM, "--no-watch"]
    first = runs.start("--format", "json", "--issue", "i-1", *options, script={"chief-architect": ["gate"]})
    at_the_gate(runs, first, "chief-architect")
    for words in (["--max-agents", "4"], ["--agent-command", "false"], ["--watch"], ["--token-ttl", "5", *options]):
        assert "run` has started it with other values" in runs.refuse("--issue", "i-2", "--task", "x", *words, code=2)
    options += ["--token-ttl", "3600", "--port", "0"]  # the defaults
    events = runs.run("--issue", "i-2", "--until", "architect", *options, script={})
    assert events[0]["service"] == "running" and events[-1]["state"] == "reached"
    runs.open_gate()
    assert first.wait(120) == 0 and shown_in_pairs(runs.events(first))[-1]["state"] == "done"
    assert runs.run("--issue", "i-1", "--max-agents", "4")[-1]["state"] == "done"  # the service has gone: another one


@pytest.mark.parametrize("whose", ["its own", "one that had its pid", "an older version"])
def test_what_a_pipeline_has_noted_of_its_service_is_said_of_no_later_one_with_that_pid(
    runs: Runs, served: Service, whose: str
) -> None:
    pid = served.info["pid"]
    facts = {"birth": birth_of(pid if whose == "its own" else os.getpid()), "settings": {"root": "", "max_agents": 7}}
    (runs.storage / "pipelines").mkdir()
    (runs.storage / f"pipelines/service-{pid}.json").write_text(
        json.dumps(facts["settings"] if whose == "an older version" else facts)
    )
    told = runs.refuse("--issue", "i-1", "--task", "x", "--max-agents", "10", code=2)
    assert ("run` has started it with other values" in told) is (whose == "its own"), told
    assert ("start that again with" in told) is (whose != "its own"), told


def test_how_to_go_on_is_said_with_the_options_of_its_own_service(runs: Runs) -> None:
    process = runs.start("--issue", "i-1", "--rounds", "1", "--max-agents", "3", "--no-watch", script={})
    assert process.wait(120) == 1
    words = runs.output(process).partition("cco_sidecar.py run ")[2].partition("`")[0]
    assert shlex.split(words)[:2] == ["--issue", "i-1"] and "--max-agents 3" in words and "--no-watch" in words
    command = [sys.executable, str(MODULE), "run", *shlex.split(words)]
    again = subprocess.run(command, env=clean_environment(**runs.env), capture_output=True, timeout=60)
    assert again.returncode == 0 and runs.worked() == ALL


# -- one after the other, and side by side


def test_two_pipelines_on_one_issue_are_one_too_many(runs: Runs, served: Service) -> None:
    process = runs.start(
        "--format", "json", "--issue", "i-1", "--until", "architect", script={"chief-architect": ["gate"]}
    )
    at_the_gate(runs, process, "chief-architect")
    assert "a pipeline for i-1 is already running" in runs.refuse("--issue", "i-1", code=1)
    runs.open_gate()
    assert process.wait(120) == 0


def test_pipelines_that_begin_at_once_share_the_service_that_one_of_them_has_started(runs: Runs) -> None:
    folder = runs.storage / "pipelines"
    options = ["--format", "json", "--until", "architect", "--max-agents", "3"]
    started = [runs.start("--issue", f"i-{number}", *options, script={}) for number in range(3)]
    for process in started:
        assert process.wait(120) == 0, runs.output(process, "err") + runs.output(process)
    assert [runs.events(each, "pipeline_started")[0]["service"] for each in started].count("its own") >= 1
    assert [runs.events(each, "pipeline_ended")[0]["state"] for each in started] == ["reached"] * 3
    assert "service.log" in os.listdir(folder)
    assert not list(folder.glob("service-*.log"))


@pytest.mark.parametrize(
    "words",
    [("--tls-cert", "/nowhere", "--tls-key", "/nowhere"), ("--host", "192.0.2.1"), ("--jwt-public-key", "/nowhere")],
)
def test_the_log_of_a_service_that_did_not_start_is_kept_where_that_of_any_other_is(
    runs: Runs, words: tuple[str, ...]
) -> None:
    said = runs.refuse("--issue", "i-1", "--task", "x", *words, code=1 if "--host" in words else 2)
    said = said.partition("did not start: ")[2]
    assert said and said in (runs.storage / "pipelines/service.log").read_text()
    assert not list((runs.storage / "pipelines").glob("service-*.log"))


def test_a_log_of_our_service_that_somebody_has_removed_ends_no_pipeline(runs: Runs) -> None:
    words = ("--format", "json", "--issue", "i-1", "--until", "architect")
    process = runs.start(*words, script={"chief-architect": ["gate"]})
    at_the_gate(runs, process, "chief-architect")
    (runs.storage / "pipelines/service.log").unlink()
    runs.open_gate()
    assert process.wait(120) == 0, runs.output(process, "err")


def test_a_log_that_was_swept_before_it_got_its_name_tells_nothing(tmp_path: Path) -> None:
    link = object.__new__(plugin("_pipeline_service").Link)
    link._log, link._log_read, link.own = tmp_path / "service-1.log", 0, True
    (tmp_path / "service.log").write_text("2026-01-01 00:00:00 WARNING of an earlier service\n")
    link._keep_log()
    assert link.warnings() == [] and link._last_words() == "it said nothing"


def test_a_service_that_another_pipeline_still_uses_stays_until_that_has_ended(runs: Runs) -> None:
    first = runs.start(
        "--format", "json", "--issue", "i-1", "--until", "architect", script={"chief-architect": ["gate"]}
    )
    at_the_gate(runs, first, "chief-architect")
    service = runs.service(first)
    words = "--format json --issue i-2 --type go-specialist --until coding"
    second = runs.start(*words.split(), script={"go-specialist": ["hang"]})
    agent = at_the_gate(runs, second, "go-specialist")
    runs.open_gate()
    assert first.wait(120) == 0
    assert "another pipeline uses the service" in runs.events(first)[-1]["reason"]
    assert alive([service]) and second.poll() is None
    os.kill(agent["pid"], signal.SIGTERM)  # fails, is tried again
    until(lambda: len(runs.events(second, "agent_started")) == 2)
    second.send_signal(signal.SIGTERM)
    assert second.wait(120) == runs.events(second)[-1]["exit_code"] == 143
    until(lambda: not alive([service]))


HOLDS = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.HOW)
print(flush=True)
time.sleep(SECONDS)
"""


@pytest.mark.parametrize(
    ("service_does", "shared", "seconds", "ends"),
    [
        (("LOCK_UN", "600"), False, 2.0, -signal.SIGKILL),
        (("LOCK_UN", "600"), True, 60.0, None),
        (("LOCK_EX", "2"), False, 60.0, 0),
    ],
    ids=["it hangs", "another pipeline uses it", "it stops"],
)
def test_a_service_that_has_not_ended_is_another_pipelines_where_one_shares_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service_does: tuple[str, str], shared: bool, seconds: float,
    ends: int | None,
) -> None:  # fmt: skip
    ours, told = plugin("_pipeline_service"), []
    link = object.__new__(ours.Link)
    link._settings, link._view = (
        SimpleNamespace(storage=tmp_path),
        SimpleNamespace(tell=lambda *_, **said: told.append(said)),
    )
    monkeypatch.setattr(ours.Link, "STOP_SECONDS", seconds)
    ours.pipelines_folder(link._settings).mkdir()

    def holder(how: str, seconds: str) -> subprocess.Popen[bytes]:
        code = HOLDS.replace("HOW", how).replace("SECONDS", seconds)
        words = [sys.executable, "-c", code, str(ours.users_file(link._settings))]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, env=clean_environment())
        assert process.stdout and process.stdout.readline() == b"\n"
        return process

    others = [holder("LOCK_SH", "600")] if shared else []
    service = holder(*service_does)
    try:
        link._wait_for_stop(service)
        assert (service.poll(), len(told)) == (ends, int(shared))
    finally:
        for process in [service, *others]:
            process.kill()
            process.wait()


# -- interruptions


def test_a_run_that_is_to_end_with_its_input_ends_where_that_cannot_be_read(runs: Runs, tmp_path: Path) -> None:
    with (tmp_path / "written").open("wb") as only_written:
        process = runs.start("--issue", "i-1", "--until-eof", script={"chief-architect": ["hang"]}, stdin=only_written)
    assert process.wait(120) in (130, 143), runs.output(process, "err")
    assert "Traceback" not in runs.output(process, "err")


def test_ctrl_c_ends_the_agent_and_leaves_nothing_running(runs: Runs) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"chief-architect": ["hang", "success"]})
    at_the_gate(runs, process, "chief-architect")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    until(lambda: not marked_processes())
    assert runs.output(process, "err") == ""
    end = shown_in_pairs(runs.events(process))[-1]
    assert end["state"] == "interrupted" and "run --issue i-1 --root " in end["reason"]

    events = runs.run("--issue", "i-1", "--retries", "0", "--until", "architect")  # being interrupted is no failure
    assert [(row["state"], row["status"]) for row in events[-1]["agents"]] == [
        ("killed", None),
        ("completed", "success"),
    ]
    assert [row["reason"] for row in events[-1]["agents"]] == ["pipeline: the first agent"] * 2


def test_a_second_ctrl_c_ends_at_once(runs: Runs, served: Service) -> None:
    process = runs.start("--format", "json", "--issue", "i-1", script={"chief-architect": ["ignore"]})
    agent = at_the_gate(runs, process, "chief-architect")["agent_id"]
    until(lambda: "ignoring" in served.client().get(f"/api/agents/{agent}/logs").json()["text"])
    process.send_signal(signal.SIGINT)
    until(lambda: f"DELETE /api/agents/{agent}" in served.log)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130 and not runs.events(process, "pipeline_ended")
    until(lambda: served.client().get(f"/api/agents/{agent}/status").json()["state"] == "killed", 30)


@pytest.mark.parametrize(("style", "act"), [("json", "chatter"), ("json", "hang"), ("table", "hang")])
def test_a_reader_that_goes_away_ends_the_agent_too(runs: Runs, style: str, act: str) -> None:
    reader, writer = os.pipe()
    process = runs.start("--format", style, "--issue", "i-1", script={"chief-architect": [act]}, out=writer)
    os.close(writer)
    until(lambda: "chief-architect" in runs.worked())
    os.close(reader)
    assert process.wait(120) == 130, runs.output(process, "err")
    until(lambda: not marked_processes())


# -- what is refused


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--issue", "../x"], 2, "--issue: '../x' must be letters, digits"),
        (["--issue", "a..b"], 2, "--issue: 'a..b' must be letters, digits"),
        ([], 2, "--issue"),
        (
            ["--issue", "i", "--until", "codding"],
            2,
            "--until: 'codding' is neither an agent type nor one of the categories architect, coding",
        ),
        (["--issue", "i", "--until", "codding"], 2, ", support, did you mean coding?"),
        (["--issue", "i", "--until", "pyhton-specialist"], 2, ", support, did you mean python-specialist?"),
        (["--issue", "i", "--until", "tester"], 2, "did you mean test-engineer, accessibility-tester or penetration-"),
        (["--issue", "i", "--rounds", "0"], 2, "'0' is not a whole number from 1 on"),
        (["--issue", "i", "--retries", "-1"], 2, "--retries"),
        (["--issue", "i", "--timeout", "soon"], 2, "'soon' is not a whole number from 1 on"),
        (["--issue", "i", "--format", "csv"], 2, "--format"),
        (["--issue", "i", "--task", "x", "--type", "wizard"], 2, "--type: Unknown agent type wizard"),
        (["--issue", "i", "--url", "http://127.0.0.1:9", "--patience", "0"], 3, "is not reachable"),
        (
            ["--issue", "i", "--tls-cert", "/nowhere", "--tls-key", "/nowhere"],
            2,
            "the service did not start: --tls-cert",
        ),
        (
            ["--issue", "i", "--task", "x", "--agent-command", "/nowhere/agent"],
            1,
            "no chief-architect can be started: /nowhere/agent: No such file or directory",
        ),
        (
            ["--issue", "i", "--task", "x", "--agent-command", "./agent"],
            1,
            "no chief-architect can be started: ./agent: not there, seen from the repository's root",
        ),
    ],
)
def test_wrong_use_is_one_line(runs: Runs, words: list[str], code: int, says: str) -> None:
    assert says in runs.refuse(*words, code=code)
    assert runs.worked() == []
    until(lambda: not marked_processes())


def test_a_sick_start_is_said_as_json_too(runs: Runs) -> None:
    events = runs.run("--issue", "i-1", "--task", "x", "--agent-command", "/nowhere/agent", code=1)
    assert (events[-1]["event"], events[-1]["state"]) == ("pipeline_ended", "error")
    assert "can be started: /nowhere/agent: No such file" in events[-1]["reason"]


# -- what is shown


def test_a_standard_output_that_is_full_ends_the_agent_and_is_said(runs: Runs) -> None:
    for words in (["--format", "json"], []):
        with open("/dev/full", "wb") as full:
            process = runs.start("--issue", f"i-{len(words)}", *words, script={"chief-architect": ["hang"]}, out=full)
        assert process.wait(120) == 1
        assert runs.output(process, "err") == "cco: output cannot be written: No space left on device\n"
        until(lambda: not marked_processes())


def test_a_terminal_without_the_characters_shows_others(runs: Runs, served: Service) -> None:
    for encoding, issue in {"ascii": "i-1", "cp1252": "i-2", "utf-8": "i-3"}.items():
        events = runs.run("--issue", issue, "--until", "architect", "--task", "grüße 日本", PYTHONIOENCODING=encoding)
        assert events[0]["task"] == "grüße 日本"
        process = runs.start("--issue", issue, PYTHONIOENCODING=encoding)
        assert process.wait(120) == 0 and runs.output(process, "err") == ""


SHOWN = "half a line "  # what a terminal shows of the last line of the deed `half`


def test_an_agents_last_line_is_not_glued_to_ours(runs: Runs, served: Service) -> None:
    for seconds in TIME_LIMITS:
        words = ["--retries", "0", "--timeout", str(seconds)]
        process = runs.start("--issue", f"i-{seconds}", *words, script={"chief-architect": ["half"]})
        assert process.wait(120) == 1
        stamped = runs.output(process).partition("\n\n")[0].splitlines()
        if "half a line" in stamped[-1]:
            break
    assert len(stamped) > 3 and all(re.match(r" *\d+\.\d\d s  \S", line) for line in stamped)
    assert [line.partition(" s  ")[2] for line in stamped if "chief-architect: " in line] == [
        f"chief-architect: {SHOWN}"
    ]
    took = f"chief-architect took longer than {seconds} s (--timeout)"
    assert stamped[3].endswith(f"{took}; its last lines: first | half a line")

    events = runs.run("--issue", "i-1", *words, script={"chief-architect": ["half"]}, code=1)
    assert [event["line"] for event in events if event["event"] == "agent_output"] == [SHOWN]
    assert events[-1]["agents"][0]["decision"].endswith("; its last lines: first | half a line")


@pytest.mark.parametrize("ending", ["failure", "Ctrl-C", "Ctrl-C twice", "the service's death"])
def test_on_a_terminal_what_follows_an_agents_line_begins_a_line(runs: Runs, served: Service, ending: str) -> None:
    ours, theirs = pty.openpty()
    deed = "ignore" if ending == "Ctrl-C twice" else "half"
    words = "--issue i-1 --retries 0 --patience 0" + " --timeout 10" * (ending == "failure")
    process = runs.start(*words.split(), script={"chief-architect": [deed]}, out=theirs, COLUMNS="90")
    seen = b""

    def shows(text: bytes) -> bool:
        nonlocal seen
        if select.select([ours], [], [], 0)[0]:
            seen += os.read(ours, 4096)
        return text in seen

    until(lambda: shows(b"ignoring" if deed == "ignore" else SHOWN.encode()))
    if ending.startswith("Ctrl-C"):
        process.send_signal(signal.SIGINT)
    if ending == "Ctrl-C twice":
        until(lambda: "DELETE /api/agents/" in served.log)
        process.send_signal(signal.SIGINT)
    if ending == "the service's death":
        served.kill()
    assert until(lambda: (shows(b"\0"), process.poll())[1]) in (1, 130, 3)
    os.write(theirs, b"$ ")  # the shell's prompt
    until(lambda: shows(b"$ "))
    os.close(theirs)
    os.close(ours)
    assert re.search(rb"(\n|\r\x1b\[K)\$ \Z", seen)
    lines = seen.decode().replace("\r\n", "\n").split("\n")
    live = [line for line in lines if SHOWN in line and "its last lines" not in line]
    assert all("\r\x1b[K" in line.rpartition(SHOWN)[2] for line in live)


def test_the_table_and_its_lines_are_read_by_programs_too(runs: Runs, served: Service) -> None:
    runs.open_gate()
    process = runs.start("--issue", "i-1", "--retries", "0", script={"chief-architect": ["half"]})
    assert process.wait(120) == 1
    text = runs.path(0, "out").read_bytes()
    assert text.endswith(b"\n") and b"\r" not in text and b"\x1b" not in text and text.decode()


def test_on_a_terminal_the_running_agents_line_is_written_in_place(runs: Runs, served: Service) -> None:
    ours, theirs = pty.openpty()
    words, script = "--issue i-1 --until architect", {"chief-architect": ["crash", "gate"]}
    process = runs.start(*words.split(), script=script, out=theirs, COLUMNS="60")
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
    assert process.wait(120) == 0
    os.close(ours)
    shown = [part for part in seen.decode().split("\r\x1b[K") if "at the gate" in part]
    assert shown and "chief-architect running" in shown[0] and all(len(part) < 60 for part in shown if "\n" not in part)
    assert b"\x1b[31m" not in seen and b"out of luck" in seen


def test_the_table_says_what_happened_line_by_line(runs: Runs, served: Service) -> None:
    process = runs.start("--issue", "i-1", "--until", "coding", script={"chief-architect": ["silent", "success"]})
    assert process.wait(120) == 0
    lines = runs.output(process).splitlines()
    assert f"i-1 begins at {served.url}" in lines[0]
    assert any("chief-architect partial after" in line and "I forgot something; what was it?" in line for line in lines)
    assert any(
        line.endswith("  next: python-specialist (high), architecture-success: implementation of what was designed")
        for line in lines
    )
    assert (
        any("reached: coding has succeeded" in line for line in lines)
        and "\x1b" not in "".join(lines)
        and "\r" not in "".join(lines)
    )


def test_the_last_line_of_each_agent_is_told_once_however_short_it_works(runs: Runs, served: Service) -> None:
    events = runs.run("--issue", "i-1", script={"python-specialist": ["edit"]})
    said = [(event["agent_type"], event["line"]) for event in events if event["event"] == "agent_output"]
    lines = [(name, f"{name} is done") for name in ALL]
    lines[1] = (ALL[1], "I changed src/main.py")
    assert said == lines


@pytest.mark.parametrize("event", ["agent_output", "agent_ended"])
def test_a_long_line_of_an_agents_is_cut(event: str) -> None:
    facts = {"line": "x" * 5000, "decision": "y" * 5000, "agent_type": "qa-engineer", "status": "failed", "seconds": 3}
    facts |= {"files_changed": 1, "source": None, "next_agents": []}
    (line,) = plugin("_pipeline_view").LINES[event](facts)
    assert len(line) < 300 and line.endswith("…")


def test_every_run_tells_the_same_time_of_an_agent(runs: Runs, served: Service) -> None:
    words = ("--issue", "i-1", "--until", "coding")
    told = [runs.run(*words, script={})[-1]["agents"], runs.run(*words, script={})[-1]["agents"]]
    assert told[0] and told[1] == told[0]


@pytest.mark.parametrize(("seconds", "said"), [
    (0.04, "0.0 s"), (0.2, "0.2 s"), (9.94, "9.9 s"), (9.96, "10 s"), (70, "70 s"), (1530, "26 min"), (9000, "2.5 h"),
])  # fmt: skip
def test_how_long_an_agent_took_is_said_in_the_unit_that_keeps_it_short(seconds: float, said: str) -> None:
    assert plugin("_pipeline_view").SUMMARY["time"]({"seconds": seconds}) == said


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def test_why_it_was_the_turn_of_an_agent_that_stored_nothing_is_not_what_others_left_since() -> None:
    plans = plugin("_pipeline_plan")
    plan = plans.Plan(NextAgent("chief-architect", "high", "the first"), None)
    agent = {"agent_id": "killed", "agent_type": "chief-architect", "task": "a greeting"}
    for number, status in enumerate(["failed", "success"]):
        plan.take(plans.Outcome(str(number), "chief-architect", "architect", status, []))
        assert plan.reason(agent) == "the first"
    coder = {"agent_id": "coder", "agent_type": "go-specialist", "task": f"a greeting{plans.PART}what was designed"}
    plan.pending["go-specialist"] = NextAgent("go-specialist", "high", "another attempt")
    assert plan.reason(coder) == "what was designed"
    assert plan.reason(coder | {"task": "by hand"}) == "another attempt"

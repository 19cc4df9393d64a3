"""The whole story: a team works on one issue through the service, which is then killed and forgets nothing."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import MODULE, PROJECT, ROOT, Client, Service, clean_environment, until

AGENT = json.dumps([sys.executable, str(ROOT / "tests/sample_agent.py")])


def token_from_the_command_line(service: Service) -> str:
    where = [f"--root={service.root}", f"--storage={service.storage}"]
    command = [sys.executable, str(MODULE), "token", "--type=chief-architect", *where]
    done = subprocess.run(
        [*command, "--project", PROJECT],
        capture_output=True,
        text=True,
        env=clean_environment(),
        cwd=service.root,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


class Poll(threading.Thread):
    """A long poll that waits in the background; ``answer`` is there once it was woken."""

    def __init__(self, client: Client, event_type: str, **params: Any) -> None:
        super().__init__()
        self.client, self.event_type, self.params = client, event_type, params
        self.answer: Any = None

    def run(self) -> None:
        self.answer = self.client.wait(self.event_type, **self.params)


def parked(architect: Client, number: int) -> bool:
    return bool(architect.get("/status").json()["events"]["active_subscriptions"] == number)


def test_a_team_finishes_an_issue_and_a_crash_loses_nothing(
    make_service: Callable[..., Service], issue: str, setup: str
) -> None:
    service = make_service("--agent-command", AGENT)
    token = token_from_the_command_line(service)
    architect = Client(service.url, token)

    # The architect decides, and waits for those who follow.
    designed = architect.store(
        "chief-architect", issue=issue, decisions=["Greet in every language"], rationale="users are everywhere"
    )
    assert [item["agent_type"] for item in designed["next_agents"]] == ["python-specialist", "test-engineer"]
    progress = Poll(Client(service.url, token), "progress", filter=f"issue_id:{issue}", timeout=30_000)
    completed = Poll(
        Client(service.url, token),
        "agent_completed",
        filter=f"issue_id:{issue},agent_type:python-specialist",
        timeout=30_000,
    )
    for poll in (progress, completed):
        poll.start()
    until(lambda: parked(architect, 2))

    # A real agent reads its context, says how it goes and stores what it did.
    coder = architect.spawn(issue, task="work")
    for poll in (progress, completed):
        poll.join(30)
    (told,) = progress.answer["events"]
    assert told["publisher"] == coder["agent_id"]
    assert told["data"]["seen"]["files"] > 0
    assert told["data"]["seen"]["branch"] == "main"
    assert "relevant_files" in told["data"]["seen"]["injected"]
    (done,) = completed.answer["events"]
    assert (done["publisher"], done["topic"], done["data"]["status"]) == (
        coder["agent_id"],
        "implementation",
        "success",
    )

    # Who follows is said with its reason, and that one sees what was decided before it.
    proposals = {item["agent_type"]: item for item in done["data"]["next_agents"]}
    assert {name: item["priority"] for name, item in proposals.items()} == {
        "test-engineer": "high",
        "security-auditor": "medium",
    }
    assert all(item["reason"].startswith("coding-success: ") for item in proposals.values())
    followed = until(lambda: (found := architect.get(coder["webhook_url"]).json())["state"] == "completed" and found)
    assert followed["exit_code"] == 0
    assert setup == "alone" or followed["result_id"] == done["data"]["result_id"]
    context = architect.get(f"/api/context/{issue}/test-engineer").json()["context"]
    outputs = [(output["agent"], output["decision"]) for output in context["previous_agent_outputs"]]
    assert outputs == [
        ("chief-architect-1", "Greet in every language"),
        (coder["agent_id"], "python-specialist has worked"),
    ]
    assert context["previous_agent_outputs"][1]["files_affected"] == ["src/main.py"]
    assert "Greet in every language" in context["previous_agent_outputs"][1]["rationale"]  # the coder had seen it too

    # The next one is spawned as proposed and works on top of that.
    tester = architect.spawn(issue, "test-engineer", task="work")
    until(lambda: architect.get(tester["webhook_url"]).json()["state"] == "completed")
    status = architect.get("/status").json()
    assert (status["agents"]["spawned_total"], status["agents"]["completed"], status["agents"]["active"]) == (2, 2, 0)
    assert status["storage"]["results_stored"] == 3
    assert status["events"]["total_published"] == 3 + 2 + 2  # completions, progress, exits
    assert status["events"]["total_delivered"] == 2

    # The service is killed and started again: all that was promised is still there.
    results = {path.name: path.read_text() for path in (service.storage / "results" / PROJECT / issue).iterdir()}
    events = architect.wait("*", since="earliest", timeout=0)["events"]
    assert (len(results), len(events)) == (3, 7)
    service.kill()
    service.start()
    architect = Client(service.url, token)
    kept = {path.name: path.read_text() for path in (service.storage / "results" / PROJECT / issue).iterdir()}
    assert kept == results
    assert architect.wait("*", since="earliest", timeout=0)["events"] == events
    assert [architect.get(agent["webhook_url"]).json()["state"] for agent in (coder, tester)] == ["completed"] * 2
    again = architect.get(f"/api/context/{issue}/documentation-expert").json()["context"]["previous_agent_outputs"]
    assert [output["agent"] for output in again] == ["chief-architect-1", coder["agent_id"], tester["agent_id"]]
    status = architect.get("/status").json()
    assert (status["agents"]["spawned_total"], status["agents"]["completed"], status["storage"]["results_stored"]) == (
        2,
        2,
        3,
    )
    assert status["events"]["total_published"] == 7
    later = architect.wait("agent_completed", filter=f"issue_id:{issue},agent_type:python-specialist", timeout=0)
    assert later["events"] == []  # was delivered before the crash, and is not delivered twice


LOUD = """
import os, pathlib, sys
from cco_sidecar import hookimpl

@hookimpl
def {hook}:
    os.dup2(os.pipe()[1], sys.stdout.fileno())  # nobody reads it
    pathlib.Path({called!r}).touch()
    sys.stdout.write("x" * 1_000_000)
"""


@pytest.mark.parametrize("hook", ["event_published(event)", "agent_command(launch)", "context_section(request)"])
def test_a_stop_waits_for_no_plugin_that_waits_for_the_reader_of_its_output(
    make_service: Callable[..., Service], tmp_path: Path, hook: str
) -> None:
    called = tmp_path / "called"
    plugin = tmp_path / "loud.py"
    plugin.write_text(LOUD.format(hook=hook, called=str(called)))
    service = make_service("--plugins", str(plugin.parent), "--agent-command", AGENT, env={"PYTHONUNBUFFERED": ""})
    client = service.client()
    until(lambda: "Ctrl-C" in service.log)
    client.publish()

    def spawn() -> None:
        with contextlib.suppress(requests.ConnectionError):  # the service may end before it has answered
            client.post("/api/agents/spawn", {"agent_type": "qa-engineer", "issue_id": "issue-1"})

    threading.Thread(target=spawn, daemon=True).start()
    until(called.exists)
    assert service.stop() == 0, service.log

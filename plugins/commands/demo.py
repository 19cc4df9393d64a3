"""The command ``demo``: everything once, on the user's repository, in a storage of its own.

The service, the agent and the crash are real; the agent is this file's other command, ``demo-agent``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import cco_sidecar
from cco_sidecar import GOOD, REFUSED, StartError, complain, hookimpl, in_thread, option_parser, settings_from
from cco_sidecar_plugins._files import read_sidecar_json
from cco_sidecar_plugins._words import counted
from cco_sidecar_plugins.commands._client import Client
from cco_sidecar_plugins.commands._table import Command, add_commands


@hookimpl
def register_commands(commands: Any) -> None:
    add_commands(commands, {
        "demo": Command("show everything once on this repository, in a storage of its own", command_demo,
            section="Start"),
        "demo-agent": Command("", command_demo_agent),
    })  # fmt: skip


def command_demo(options: argparse.Namespace) -> int:
    """Show spawn, context, result, event, routing and a kill -9 in a few seconds; leaves nothing behind."""
    settings = settings_from(options)
    with tempfile.TemporaryDirectory(prefix="cco-demo-") as folder:
        demo = Demo(settings.root, Path(folder))
        try:
            return demo.run()
        finally:
            demo.end()


class Demo:
    """The story of two agents and a crash, told with the real service as a real process."""

    ISSUE = "demo-1"
    TASK = "Find where the program starts and describe what it does"
    START_SECONDS = 60.0  # which a busy machine may need
    AGENT_SECONDS = 50
    END_SECONDS = 20.0  # in which the service ends: it gives its agents up to 15

    def __init__(self, root: Path, folder: Path) -> None:
        self._root, self._folder = root, folder
        self._began = time.monotonic()
        self._starting: Future[subprocess.Popen[bytes]] | None = None
        self._service: subprocess.Popen[bytes] | None = None
        where = [f"--root={root}", f"--storage={folder / 'storage'}"]
        self._arguments = [*where, "--port=0", "--project=demo", "--stop-agents"]

    def run(self) -> int:
        client = self._start_service()
        self._say(f"service listens on {client.url} for {self._root}")
        self._say("architect token minted")
        waiter = in_thread("demo", functools.partial(self._wait_for_event, client))
        while not client.call("GET", "/status")["events"]["active_subscriptions"]:
            time.sleep(0.01)
        self._say("test-engineer waits in a long poll for agent_completed on this issue")
        spawned = client.call(
            "POST", "/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": self.ISSUE, "task": self.TASK}
        )
        self._say(
            f"python-specialist spawned as a real process, pid {spawned['process_id']}, with its context in a file"
        )
        event = waiter.result()
        self._say(f"test-engineer woke: {event['publisher']} reports {event['data']['status']} ({event['event_id']})")
        for agent in event["data"]["next_agents"]:
            self._say(f"next: {agent['agent_type']} ({agent['priority']}), {agent['reason']}")
        self._show_context(client)
        while client.call("GET", "/status")["agents"]["active"]:
            time.sleep(0.02)
        before = self._counts(client)
        self._say(f"status: {before}")
        self._crash()
        client = self._start_service()
        after = self._counts(client)
        self._say(f"killed with SIGKILL and started again: {after}")
        if after != before:
            raise StartError("the service lost something over its crash", REFUSED)
        self._show_context(client)
        self._say("done: nothing of this is left running, and your repository was only read")
        return GOOD

    def _start_service(self) -> Client:
        program = [sys.executable, str(Path(cco_sidecar.__file__).resolve())]
        agent = json.dumps([*program, "demo-agent"])
        command = [*program, "serve", *self._arguments, "--agent-command", agent, "--log-level", "error"]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("CCO_")}

        def begin() -> subprocess.Popen[bytes]:
            # A file rather than a pipe: the service must not depend on whether somebody reads what it says.
            with (self._folder / "service.log").open("ab") as output:
                return subprocess.Popen(command, stdout=output, stderr=output, env=environ)

        self._starting = in_thread("service", begin)
        self._service = self._starting.result()
        deadline = time.monotonic() + self.START_SECONDS
        while (info := read_sidecar_json(self._folder / "storage")) is None or info.pid != self._service.pid:
            if self._service.poll() is not None or time.monotonic() > deadline:
                said = (self._folder / "service.log").read_text(errors="replace").strip()
                raise StartError(f"the service did not start: {said[-500:]}", REFUSED)
            time.sleep(0.01)
        return Client(option_parser().parse_args(self._arguments))

    def _wait_for_event(self, client: Client) -> dict[str, Any]:
        query = {"filter": f"issue_id:{self.ISSUE}", "since": "earliest", "timeout": self.AGENT_SECONDS * 1000}
        events: list[dict[str, Any]] = client.call("GET", "/api/events/wait/agent_completed", query=query)["events"]
        if not events:
            raise StartError(f"the agent reported nothing within {self.AGENT_SECONDS} s", REFUSED)
        return events[0]

    def _show_context(self, client: Client) -> None:
        context = client.call("GET", f"/api/context/{self.ISSUE}/test-engineer")["context"]
        output = context["previous_agent_outputs"][-1]
        number = len(context["relevant_files"])
        files = f"{number} file{'s' * (number != 1)}"
        self._say(f"test-engineer's context: {files}, and {output['agent_type']} decided: {output['decision']}")

    def _counts(self, client: Client) -> str:
        status = client.call("GET", "/status")
        return (
            f"{status['agents']['completed']} agent completed, {status['storage']['results_stored']} result,"
            f" {status['events']['total_published']} events published"
        )

    def _crash(self) -> None:
        assert self._service
        self._service.kill()
        self._service.wait()

    def end(self) -> None:
        """End the service. That it had to be killed is told."""
        if self._starting:
            self._service = self._starting.result()  # which an interrupted start has not waited for
        if self._service and self._service.poll() is None:
            self._service.terminate()
            try:
                self._service.wait(self.END_SECONDS)
            except subprocess.TimeoutExpired:
                complain(f"the service did not end within {self.END_SECONDS:.0f} s and was killed")
                self._crash()

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.2f} s  {text}", flush=True)


def command_demo_agent(options: argparse.Namespace) -> int:
    """What the demonstration's agent does: reads its context, stores a result, publishes an event. A model for one's
    own.
    """
    if "CCO_CONTEXT_FILE" not in os.environ:
        raise StartError("demo-agent: this is what `cco demo` starts as its agent")
    context = json.loads(Path(os.environ["CCO_CONTEXT_FILE"]).read_text("utf-8"))
    files = [file["path"] for file in context["context"]["relevant_files"]]
    client = Client(options)
    print(f"{os.environ['AGENT_ID']} works on {os.environ['TASK']!r} with {counted(len(files), 'file')}", flush=True)
    client.call("POST", "/api/events/progress", {
        "publisher": os.environ["AGENT_ID"], "topic": "progress",
        "data": {"issue_id": os.environ["ISSUE_ID"], "files_read": len(files)},
    })  # fmt: skip
    result = {
        "status": "success",
        "decisions": [f"Start reading at {files[0]}" if files else "The repository is empty"],
        "files_modified": [],
    }
    body = {
        "agent_id": os.environ["AGENT_ID"],
        "agent_type": os.environ["AGENT_TYPE"],
        "issue_id": os.environ["ISSUE_ID"],
    }
    stored = client.call("POST", "/api/results", body | {"project_id": os.environ["PROJECT_ID"], "result": result})
    print(f"stored {stored['id']}", flush=True)
    return GOOD

"""One issue as ``cco run`` sees it: what the service has of it, asked anew each time, and what was shown of it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Iterator
from typing import Any

from cco_sidecar import REFUSED, NextAgent, StartError
from cco_sidecar_plugins._terminal import last_shown
from cco_sidecar_plugins.commands._client import NotReachable, Refused
from cco_sidecar_plugins.commands._pipeline_plan import Plan, files_of, never_started, seconds_of, short_decision
from cco_sidecar_plugins.commands._pipeline_service import Link
from cco_sidecar_plugins.commands._pipeline_view import View


class Issue:
    """What the service knows of one issue, also a service that comes back in between."""

    END_PATIENCE = 20.0  # the service's grace is 5 s, then it kills

    def __init__(self, name: str, link: Link, interrupts: Interrupts) -> None:
        self.name, self._link, self._interrupts = name, link, interrupts
        self.ending = False  # a service that is lost now is not waited for

    def call(self, method: str, path: str, body: Any = None, *, whole: bool = False, **keywords: Any) -> Any:
        """The service's answer. ``whole``: not to be cut off by the first Ctrl-C."""
        renewed = False
        while True:
            try:
                with self._interrupts.deferred() if whole else contextlib.nullcontext():
                    return self._link.client.call(method, path, body, **keywords)
            except NotReachable as error:
                if self.ending:
                    raise
                self._link.recover(error)
            except Refused as error:
                if error.answer.get("code") != "AUTH_002" or renewed:
                    raise
                self._link.client, renewed = self._link.answering(), True  # the machine slept longer than a token lives

    def agents(self, after: str, known: dict[str, float]) -> dict[str, dict[str, Any]]:
        """The agents that were started after the one named ``after``, oldest first, by id.

        Without those whose command could not be run, unless they are ``known``.
        """
        found: dict[str, dict[str, Any]] = {}
        query = {"issue_id": self.name, "since": after or "earliest", "limit": 1000}
        while page := self.call("GET", "/api/agents", query=query)["agents"]:
            found |= {row["agent_id"]: row for row in page if row["agent_id"] in known or not never_started(row)}
            query["since"] = page[-1]["agent_id"]
        return found

    def end_agents(self, after: str, known: dict[str, float]) -> dict[str, dict[str, Any]]:
        """Have those agents ended and wait for it. Raises StartError where one goes on for END_PATIENCE."""
        deadline = time.monotonic() + self.END_PATIENCE
        ordered: set[str] = set()
        while True:
            found = self.agents(after, known)
            living = [agent_id for agent_id, agent in found.items() if not agent["ended_at"]]
            if not living:
                return found
            for agent_id in set(living) - ordered:
                self.call("DELETE", f"/api/agents/{agent_id}")
                ordered.add(agent_id)
            if time.monotonic() > deadline:
                raise StartError(f"{living[0]} is still running after {self.END_PATIENCE:.0f} s", REFUSED)
            self.wait("agent_exited", "latest", 0.25, filter="")

    def events(self, event_type: str, since: str) -> Iterator[dict[str, Any]]:
        """Every retained event after ``since``."""
        more = True
        while more:
            answer = self.wait(event_type, since, 0)
            yield from answer["events"]
            since, more = answer["scanned_to"], answer["more_available"]

    def wait(self, event_type: str, since: str, seconds: float, filter: str | None = None) -> Any:
        """A long poll for events of this issue, or of ``filter``; from the earliest on where ``since`` has expired."""
        query = {"timeout": int(seconds * 1000), "since": since, "limit": 1000}
        query["filter"] = f"issue_id:{self.name}" if filter is None else filter
        while True:
            try:
                return self.call("GET", f"/api/events/wait/{event_type}", query=query, timeout=seconds + 30)
            except Refused as error:
                if error.answer.get("code") != "EVT_003" or query["since"] == "earliest":
                    raise
                query["since"] = "earliest"

    def publish(self, event_type: str, data: dict[str, Any]) -> None:
        body = {"publisher": "pipeline", "topic": "pipeline", "data": {"issue_id": self.name, **data}}
        self.call("POST", f"/api/events/{event_type}", body, key=str(uuid.uuid4()))


class Story:
    """Shows each agent that runs, or has ended since the pipeline began, once as started or found and once as ended."""

    def __init__(self, issue: Issue, view: View, interrupts: Interrupts) -> None:
        self.view, self._issue, self._interrupts = view, issue, interrupts
        self.history: set[str] | None = None  # agents that had ended before we began; None until we have
        self.started: dict[str, float] = {}  # agents that were shown as started or found, and when they began
        self._told: set[str] = set()  # agents that were shown as ended
        self._lines: dict[str, str] = {}  # the last line that was shown of each

    def start(self, spawned: dict[str, Any], proposal: NextAgent, number: int) -> None:
        """Show an agent that was started for ``proposal``, as the pipeline's ``number``-th."""
        facts = {"agent_id": spawned["agent_id"], "agent_type": proposal.agent_type, "pid": spawned["process_id"]}
        with self._interrupts.deferred():
            self.started[spawned["agent_id"]] = time.monotonic()
            self.view.tell("agent_started", **facts, priority=proposal.priority, reason=proposal.reason, round=number)

    def go_on(self, agents: dict[str, dict[str, Any]], proposals: dict[str, list[Any]], plan: Plan) -> None:
        """Show what is new of ``agents``, also where an end came before our first look at the agent, or by an
        interruption. ``proposals`` are those that routing made after each.
        """
        for agent_id, agent in agents.items():
            if self.history is None or agent_id in self.history | self._told:
                continue
            if agent_id not in self.started:
                self._find(agent)
            if agent["ended_at"]:
                row = self.row(agent, plan)
                with self._interrupts.deferred():
                    self.show_output(agent)
                    self._told.add(agent_id)
                    self.view.tell("agent_ended", **row, exit_code=agent["exit_code"],
                        next_agents=proposals.get(agent_id, []))  # fmt: skip

    def show_output(self, agent: dict[str, Any]) -> None:
        """Show the last line that it has written, where that is another one than before."""
        agent_id = agent["agent_id"]
        line = next((text for each in reversed(agent["output_tail"]) if (text := last_shown(each)).strip()), "")
        changed = line != self._lines.get(agent_id, "")
        self.view.progress(agent, time.monotonic() - self.started[agent_id], line, changed=changed)
        self._lines[agent_id] = line

    def _find(self, agent: dict[str, Any]) -> None:
        age = max(0.0, time.time() - seconds_of(agent["started_at"]))
        facts = {name: agent[name] for name in ("agent_id", "agent_type", "pid")}
        with self._interrupts.deferred():
            self.started[agent["agent_id"]] = time.monotonic() - age
            self.view.tell("agent_found", **facts, seconds=int(age))

    def row(self, agent: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """An agent in the summary."""
        stored = agent["result_id"]
        record = self._issue.call("GET", f"/api/results/{stored}") if stored else {}
        result = record.get("result") or {}
        files = files_of(result)
        made = isinstance(result.get("artifacts"), dict) and "made_of" in result["artifacts"]
        source = "sidecar" if made else record.get("source")
        return {
            "agent_id": agent["agent_id"], "agent_type": agent["agent_type"], "state": agent["state"],
            "seconds": agent.get("run_seconds", 0) if agent["ended_at"] else 0,
            "status": result.get("status"), "source": source, "files_changed": None if files is None else len(files),
            "decision": short_decision(result), "reason": plan.reason(agent),
        }  # fmt: skip


class Interrupts:
    """The first SIGINT, SIGTERM or SIGHUP is a KeyboardInterrupt, later where a step must not be cut in two; the second
    ends at once.
    """

    def __init__(self, view: View) -> None:
        self._view, self._number, self._deferred = view, 0, False

    @property
    def exit_code(self) -> int:
        return 128 + (self._number or signal.SIGINT)  # as a shell has it; also where the reader has gone

    def on_signal(self, number: int, _: object) -> None:
        if self._number:
            self._view.clear()
            os._exit(128 + number)
        self._number = number
        if not self._deferred:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred, before = True, self._number
        try:
            yield
        finally:
            self._deferred = False
            if self._number != before:  # whatever else has happened
                raise KeyboardInterrupt

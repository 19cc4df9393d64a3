"""The command ``run``: takes an issue from the architect to the documentation without anybody's help.

It spawns the first agent, then whatever routing proposes, one at a time, until routing has nothing more to propose. It
keeps no file about where it is: what it does next follows from what the service has stored (the issue's agents and
``agent_completed`` events), read anew before each step. So it does not matter who was killed when: the same command
goes on.

From top to bottom: the command, the pipeline, its rules (which need no service), the service that it uses or starts,
and what is shown. Seconds everywhere but in the query of a long poll, which wants milliseconds.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from msgspec import Struct

import cco_sidecar
from cco_sidecar import (
    CATEGORIES,
    CLIENT_OPTIONS,
    GOOD,
    IDENTIFIER,
    NOT_REACHABLE,
    OPTIONS,
    REFUSED,
    SERVICE_OPTIONS,
    WRITE,
    WRONG_USE,
    AgentTypes,
    Client,
    Command,
    Hooks,
    IssueNotFound,
    NextAgent,
    NotReachable,
    Refused,
    Settings,
    StartError,
    add_commands,
    arg,
    cell,
    command_serve,
    hookimpl,
    iso,
    load_hooks,
    lock_file,
    own_command,
    prepare_storage_folder,
    print_table,
    read_sidecar_json,
    redact,
    running_settings,
    settings_from,
    write_file,
)

try:
    import fcntl
except ImportError:  # Windows: a service has to run already, since only these locks can be shared
    fcntl = None  # type: ignore[assignment]

INTERRUPTED = 130


# ======================================================================================================
# The command
# ======================================================================================================


@hookimpl
def register_commands(commands: Any) -> None:
    add_commands(commands, {
        "run": Command("take an issue through all agents that routing proposes, or go on where that was cut off",
            command_run, [
            arg("--issue", required=True, help="issue id"),
            arg("--task", type=task_text, help="what is to be done (default: what a plugin or an earlier run knows)"),
            arg("--type", help="the first agent (default: chief-architect)"),
            arg("--until", metavar="CATEGORY|TYPE",
                help="stop when this has succeeded, for example coding or documentation-expert"),
            arg("--rounds", type=at_least(1), default=12, metavar="N", help="agents started at most (default: 12)"),
            arg("--retries", type=at_least(0), default=3, metavar="N",
                help="a type that fails more often in a row ends it (default: 3)"),
            arg("--timeout", type=at_least(1), metavar="SECONDS",
                help="time limit of each agent (default: the service's)"),
            arg("--patience", type=at_least(0), default=30, metavar="SECONDS",
                help="wait so long for a lost service (default: 30)"),
            arg("--restart", action="store_true", help="begin anew, whatever has been done on the issue"),
        ], formats=("table", "json"), options=(*CLIENT_OPTIONS, *SERVICE_OPTIONS), section="Start"),
        "run-service": Command("", command_run_service, options=SERVICE_OPTIONS),
    })  # fmt: skip


def at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return read


def task_text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    if len(text) > TASK_LENGTH:
        raise argparse.ArgumentTypeError(f"has {len(text):,} characters, {TASK_LENGTH:,} are the most")
    if any("\ud800" <= character <= "\udfff" for character in text):  # a byte of the command line that is no character
        raise argparse.ArgumentTypeError("is not UTF-8")
    return text


def command_run(options: argparse.Namespace) -> int:
    """Run or go on with the pipeline of one issue; the exit code."""
    if not re.fullmatch(IDENTIFIER, options.issue) or ".." in options.issue:
        raise StartError(f"--issue: {options.issue!r} must match {IDENTIFIER}")
    asked = settings_from(options)
    hooks = load_hooks(asked)
    types = AgentTypes(hooks, asked).categories
    if options.until and options.until not in {*types, *CATEGORIES}:
        raise StartError(
            f"--until: {options.until!r} is neither an agent type nor one of the categories {', '.join(CATEGORIES)}"
        )
    view = view_of(options)
    try:
        with Interrupts(view) as interrupts, Link(options, asked, view) as link:
            return Pipeline(options, hooks, types, link, view, interrupts).run()
    except StartError as error:
        view.give_up(error)
        raise
    except NotWritten as error:
        if error.full:
            raise StartError(str(error), REFUSED) from None
        return INTERRUPTED
    finally:
        view.clear()


def command_run_service(options: argparse.Namespace) -> int:
    """Serve for as long as a pipeline uses the service: what a pipeline starts when no service runs."""
    settings = settings_from(options)
    facts = {"pid": os.getpid(), "settings": plain_settings(settings)}  # for pipelines that are given the same options
    write_file(pipelines_folder(settings) / "service.json", json.dumps(facts).encode())
    users = open_private(users_file(settings))

    def stop_when_unused() -> None:
        fcntl.flock(users, fcntl.LOCK_EX)  # a user's part of the lock dies with it, however it ends
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_unused, daemon=True).start()
    return command_serve(options)


class Interrupts:
    """The first SIGINT or SIGTERM is a KeyboardInterrupt, later where a step must not be cut in two; the second ends at
    once.
    """

    def __init__(self, view: View) -> None:
        self._view, self._number, self._deferred = view, 0, False

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as for a job in the background
                signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def _on_signal(self, number: int, _: object) -> None:
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


# ======================================================================================================
# The pipeline
# ======================================================================================================


class Pipeline:
    """One issue's way through its agents, one at a time since they share a working tree."""

    END_PATIENCE = 20.0  # the service's grace is 5 s, then it kills

    def __init__(
        self,
        options: argparse.Namespace,
        hooks: Hooks,
        types: dict[str, str],
        link: Link,
        view: View,
        interrupts: Interrupts,
    ) -> None:
        self._options, self._hooks, self._types = options, hooks, types
        self._link, self._view, self._interrupts = link, view, interrupts
        self._issue, self._began, self._rounds = options.issue, time.monotonic(), 0
        self._agents: dict[str, dict[str, Any]] = {}  # the ledger's rows of this pipeline, oldest first
        self._results: dict[str, dict[str, Any]] = {}  # the latest result of each agent
        self._history: set[str] | None = None  # agents that had ended before we began; None until we have
        self._started: dict[str, float] = {}  # agents that were shown as started or found, and when they began
        self._took: dict[str, float] = {}  # how long agents took that we saw start, or run, and end
        self._told: set[str] = set()  # agents that were shown as ended
        self._ordered: dict[str, str] = {}  # agents whose end we ordered, and why
        self._cursor = self._after_agent = ""
        self._ending = False

    def run(self) -> int:
        """Step by step to the end; the exit code."""
        try:
            self._begin()
            while True:
                self._catch_up()
                self._tell_news()
                if living := self._living():
                    self._follow(living[0])
                elif verdict := self._verdict():
                    return self._finish(*verdict)
                else:
                    self._spawn(self._plan.next())
        except KeyboardInterrupt:
            return self._interrupted()
        except NotWritten:
            self._view = View()
            self._interrupted()
            raise

    # -- where it stands

    def _begin(self) -> None:
        """Find the latest start of this issue's pipeline and go on from there; where there is none, or with --restart,
        begin here.
        """
        options, all_agents = self._options, self._read_agents()
        known = next((event["data"] for event in reversed(list(self._events("pipeline_started", "earliest")))), {})
        self._task = options.task or known.get("task") or self._task_elsewhere(all_agents)
        if not self._task:
            raise StartError(f"--task: {self._issue} has no task yet, so say what is to be done", WRONG_USE)
        known = {} if options.restart else known
        first = options.type or known.get("type") or "chief-architect"
        self._cursor, self._after_agent = known.get("since", "earliest"), known.get("after_agent", "")
        if options.restart:
            self._cursor = self._wait("*", "latest", 0)["scanned_to"]
            self._after_agent = next(reversed(all_agents), "")
        begin = {"type": first, "task": self._task, "since": self._cursor, "after_agent": self._after_agent}
        self._plan = Plan(NextAgent(first, "high", "pipeline: the first agent"), options.until)
        self._agents = self._read_agents()
        self._history = {agent_id for agent_id, agent in self._agents.items() if agent["ended_at"]}
        self._catch_up()
        self._check_history()
        self._check_given(known)
        self._plan.failures.clear()  # whoever starts it again has looked into what went wrong
        going_on = bool(self._agents or self._results)
        pending = [item.agent_type for item in self._plan.queue()]
        self._view.tell("pipeline_started", issue_id=self._issue, url=self._link.client.url, service=self._link.whose,
            going_on=going_on,
                        task=self._task, pending=pending)  # fmt: skip
        self._publish("pipeline_started", begin)

    def _task_elsewhere(self, agents: dict[str, dict[str, Any]]) -> str:
        """The task that a plugin knows the issue by, else that of its latest spawn; empty where there is none."""
        try:
            issue = self._hooks.first("resolve_issue", lambda it: isinstance(it, dict), issue_id=self._issue) or {}
        except IssueNotFound:
            raise StartError(f"there is no issue {self._issue}, says a plugin that knows", REFUSED) from None
        text = "\n\n".join(str(part) for part in (issue.get("title"), issue.get("body")) if part)[:TASK_LENGTH]
        spawned = [agent["task"].partition(PART)[0] for agent in reversed(agents.values())]
        return next((task for task in [text, *spawned] if task.strip()), "")

    def _check_given(self, known: dict[str, Any]) -> None:
        """Refuse a --task or --type that would be passed over: the issue is done, or has begun with another one."""
        given, going_on = self._options, bool(self._agents or self._results)
        other_task = given.task is not None and given.task.strip() != known.get("task", "").strip()
        first = known.get("type") or next((asked.agent_type for asked in self._plan.reasons.values()), given.type)
        other_type = given.type not in (None, first) and bool(self._results)
        if (other_task or other_type) and going_on and not self._plan.pending and not self._living():
            was = f" (its task was {shortened(known['task'])!r})" if known.get("task") else ""
            raise StartError(
                f"{self._issue} is done{was}: begin it anew with --restart, or give what is new an issue of its own",
                REFUSED,
            )  # fmt: skip
        if other_task and going_on and known.get("task"):
            raise StartError(
                f"{self._issue} is being worked on with the task {shortened(known['task'])!r}:"
                " leave --task out to go on with that, or begin anew with --restart", REFUSED,
            )  # fmt: skip
        if other_type:
            how = "leave --type out to go on, or begin anew with --restart"
            raise StartError(f"{self._issue} has begun with {first}: {how}", REFUSED)

    def _check_history(self) -> None:
        """Refuse to guess where what routing said has expired: the results are there, the events are not."""
        forgotten = any(agent["result_id"] for agent in self._agents.values())
        if self._cursor == "earliest" and not forgotten:
            forgotten = bool(self._call("GET", "/api/results", query={"issue_id": self._issue, "limit": 1})["results"])
        if forgotten and not self._results:
            raise StartError(
                f"{self._issue} has results, but the events that said who comes next have expired; begin anew with"
                " --restart,"
                " and with --type TYPE where the first agents need not work again", REFUSED,
            )  # fmt: skip

    def _catch_up(self) -> None:
        """Read the agents and results that are new, and speak for agents that have ended without a result."""
        self._agents = self._read_agents()
        silent = [agent for agent in self._agents.values() if self._is_silent(agent)]
        for agent in silent:
            self._report(agent)
        self._read_results()
        if silent:
            self._agents = self._read_agents()

    def _read_agents(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        cursor = self._after_agent or "earliest"
        while page := self._call("GET", "/api/agents", query={"issue_id": self._issue, "since": cursor, "limit": 1000})[
            "agents"
        ]:
            shown = [agent for agent in page if agent["agent_id"] in self._started or not never_started(agent)]
            found |= {agent["agent_id"]: agent for agent in shown}
            cursor = page[-1]["agent_id"]
        return found

    def _living(self) -> list[dict[str, Any]]:
        return [agent for agent in self._agents.values() if not agent["ended_at"]]

    def _read_results(self) -> None:
        for event in self._events("agent_completed", self._cursor):
            data, topic = event["data"], event["topic"]
            category = next((name for name, category in CATEGORIES.items() if category.topic == topic), "")
            proposals = [NextAgent(**item) for item in data["next_agents"]]
            self._plan.take(Outcome(event["publisher"], data["agent_type"], category, data["status"], proposals))
            self._results[event["publisher"]] = {
                "result_id": data["result_id"],
                "status": data["status"],
                "next_agents": data["next_agents"],
            }
            self._cursor = event["event_id"]

    def _is_silent(self, agent: dict[str, Any]) -> bool:
        """Ended without a result. One that was ended on purpose before we began is simply run again."""
        left_alone = agent["state"] == "killed" and agent["agent_id"] in (self._history or ())
        return bool(agent["ended_at"]) and agent["result_id"] is None and not left_alone

    def _report(self, agent: dict[str, Any]) -> None:
        """Store what can be said of an agent that did not say it itself, so that routing and the other agents learn of
        it.
        """
        may_write = WRITE in CATEGORIES[self._types.get(agent["agent_type"], "coding")].permissions
        result = silent_result(agent, may_write, self._ordered.get(agent["agent_id"], ""))
        who = {name: agent[name] for name in ("agent_id", "agent_type", "issue_id")} | {
            "project_id": self._link.client.project
        }
        self._call("POST", "/api/results", who | {"result": result}, key=f"pipeline-{agent['agent_id']}")

    def _verdict(self) -> tuple[str, str] | None:
        """(state, words) where the pipeline is at its end."""
        plan, options = self._plan, self._options
        if plan.reached:
            return "reached", f"{options.until} has succeeded"
        if hopeless := [name for name, number in plan.failures.items() if number > options.retries]:
            return (
                "failed",
                (
                    f"{hopeless[0]} has failed {counted(plan.failures[hopeless[0]], 'time')} in a row (--retries"
                    f" {options.retries})"
                ),
            )
        if not plan.pending:
            missed = f" (without reaching {options.until}, which routing did not propose)" if options.until else ""
            return "done", f"routing has nothing more to propose{missed}"
        if self._rounds >= options.rounds:
            return (
                "limit",
                (
                    f"{counted(self._rounds, 'agent')} started (--rounds {options.rounds}), {plan.next().agent_type}"
                    " would be next"
                ),
            )
        return None

    # -- one step

    def _spawn(self, proposal: NextAgent) -> None:
        """Start the agent, when there is room for it. Returns without one where the crash of the service came
        between.
        """
        body = {"agent_type": proposal.agent_type, "issue_id": self._issue, "task": self._task_of(proposal)}
        key, lost = str(uuid.uuid4()), self._link.losses
        while True:
            try:
                spawned = self._call("POST", "/api/agents/spawn", body, key=key, whole=True)
                break
            except Refused as error:
                if "retry_after_seconds" in error.answer:
                    self._wait_for_room(error)
                elif error.answer.get("code") == "AGT_001" and self._link.losses > lost:
                    return  # the ledger knows whether it was started, and the next look into it will tell
                elif error.answer.get("code") == "AGT_002" and proposal.agent_type == self._options.type:
                    raise StartError(
                        f"--type: {error.answer['message']}; `{own_command()} agent types` lists them", WRONG_USE
                    ) from None
                elif self._link.own and "start the service with" in str(error):
                    raise StartError(str(error).replace("start the service with", "give"), REFUSED) from None
                else:
                    raise
        self._rounds += 1
        with self._interrupts.deferred():
            self._started[spawned["agent_id"]] = time.monotonic()
            self._view.tell("agent_started", agent_id=spawned["agent_id"], agent_type=proposal.agent_type,
                            pid=spawned["process_id"], priority=proposal.priority, reason=proposal.reason,
                            round=self._rounds)  # fmt: skip

    def _task_of(self, proposal: NextAgent) -> str:
        """The task, and for all but the first why it is their turn, where the service's limit leaves room for that."""
        whole = f"{self._task}{PART}{proposal.reason}"
        return whole if (self._rounds or self._results) and len(whole) <= TASK_LENGTH else self._task

    def _wait_for_room(self, error: Refused) -> None:
        """Until an agent of the project ends, or the service's own ``retry_after_seconds``."""
        seconds = error.answer["retry_after_seconds"]
        self._view.tell("waiting", reason=error.answer.get("message", str(error)), seconds=seconds)
        self._wait("agent_exited", "latest", seconds, filter="")

    def _follow(self, agent: dict[str, Any]) -> None:
        """Show the agent until it has ended. Its events wake us: its status is read again after each, and at the view's
        pace.
        """
        agent_id, shown, cursor = agent["agent_id"], "", "latest"
        while True:
            cursor = (
                cursor if cursor != "latest" else self._wait("*", "latest", 0)["scanned_to"]
            )  # before the status: nothing is missed
            agent = self._call("GET", f"/api/agents/{agent_id}/status")
            if agent["ended_at"]:
                return
            elapsed = time.monotonic() - self._started[agent_id]
            latest = next((text for line in reversed(agent["output_tail"]) if (text := last_shown(line)).strip()), "")
            self._view.progress(agent, elapsed, latest, changed=latest != shown)
            shown, pace = latest, self._view.pace
            if limit := self._options.timeout:
                pace = min(pace, max(0.1, limit - elapsed))
                if elapsed >= limit and agent_id not in self._ordered:
                    self._ordered[agent_id] = f"took longer than {limit} s (--timeout)"
                    self._call("DELETE", f"/api/agents/{agent_id}")
            cursor = self._wait("*", cursor, pace, filter=f"publisher:{agent_id}")["scanned_to"]

    def _tell_news(self) -> None:
        """Show each agent that runs, or has ended since we began, once as started or found and once as ended, also
        where its end came before our first look at it, or by an interruption."""
        if self._history is None:
            return
        for agent in [agent for name, agent in self._agents.items() if name not in self._history | self._told]:
            agent_id, now = agent["agent_id"], time.monotonic()
            if agent_id in self._started and agent["ended_at"]:
                self._took[agent_id] = now - self._started[agent_id]
            if agent_id not in self._started:
                age = max(0.0, time.time() - seconds_of(agent["started_at"]))
                facts = {name: agent[name] for name in ("agent_id", "agent_type", "pid")}
                with self._interrupts.deferred():
                    self._started[agent_id] = now - age
                    self._view.tell("agent_found", **facts, seconds=int(age))
            if agent["ended_at"]:
                row, proposed = self._row(agent), self._results.get(agent_id, {}).get("next_agents", [])
                with self._interrupts.deferred():
                    self._told.add(agent_id)
                    self._view.tell("agent_ended", **row, exit_code=agent["exit_code"], next_agents=proposed)

    # -- the end

    def _finish(self, state: str, words: str) -> int:
        """Show and publish how it ended; the exit code."""
        code = {"reached": GOOD, "done": GOOD, "failed": REFUSED, "limit": REFUSED}[state]
        if code:
            words += f"; {self._how_to_go_on()}"
        rows = [self._row(agent) for agent in self._agents.values()]
        self._publish("pipeline_ended", {"state": state, "reason": words, "agents": len(rows)})
        self._view.tell(
            "pipeline_ended", state=state, reason=words, exit_code=code, seconds=self._elapsed(), agents=rows
        )
        return code

    def _interrupted(self) -> int:
        """End the agents of this issue that run, wait for their end, and say how to go on."""
        self._ending, rows = True, []
        try:
            self._end_living()
            self._tell_news()
            rows = [self._row(agent) for agent in self._agents.values()]
            words = self._how_to_go_on()
        except StartError as error:
            words = f"the running agent could not be ended: {error}"
        self._view.tell("pipeline_ended", state="interrupted", reason=words, exit_code=INTERRUPTED,
                        seconds=self._elapsed(), agents=rows)  # fmt: skip
        return INTERRUPTED

    def _end_living(self) -> None:
        deadline = time.monotonic() + self.END_PATIENCE
        ordered: set[str] = set()
        while True:
            self._agents = self._read_agents()
            living = [agent["agent_id"] for agent in self._living()]
            if not living:
                return
            for agent_id in set(living) - ordered:
                self._call("DELETE", f"/api/agents/{agent_id}")
                ordered.add(agent_id)
            if time.monotonic() > deadline:
                raise StartError(f"{living[0]} is still running after {self.END_PATIENCE:.0f} s", REFUSED)
            self._wait("agent_exited", "latest", 0.25, filter="")

    def _how_to_go_on(self) -> str:
        return f"`{own_command()} run {shlex.join(['--issue', self._issue, *self._link.said()])}` goes on from here"

    def _row(self, agent: dict[str, Any]) -> dict[str, Any]:
        """An agent in the summary."""
        stored = agent["result_id"]
        result = self._call("GET", f"/api/results/{stored}")["result"] if stored else {}
        files = {
            entry if isinstance(entry, str) else entry["path"]
            for kind in FILE_LISTS
            for entry in result.get(kind) or []
        }
        proposal = self._plan.reasons.get(agent["agent_id"]) or self._plan.pending.get(agent["agent_type"])
        return {
            "agent_id": agent["agent_id"], "agent_type": agent["agent_type"], "state": agent["state"],
            "seconds": self._seconds(agent), "status": result.get("status"),
            "files_changed": len(files), "decision": short_decision(result),
            "reason": proposal.reason if proposal else "",
        }  # fmt: skip

    def _seconds(self, agent: dict[str, Any]) -> float:
        """How long it took: measured where we saw its start and end, else the whole seconds that its times tell."""
        if agent["agent_id"] in self._took:
            return round(self._took[agent["agent_id"]], 2)
        return int(seconds_of(agent["ended_at"]) - seconds_of(agent["started_at"])) if agent["ended_at"] else 0

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._began, 2)

    # -- talking to the service

    def _call(self, method: str, path: str, body: Any = None, *, whole: bool = False, **keywords: Any) -> Any:
        """The answer, also of a service that comes back in between. ``whole``: not to be cut off by the first
        Ctrl-C.
        """
        renewed = False
        while True:
            try:
                with self._interrupts.deferred() if whole else contextlib.nullcontext():
                    return self._link.client.call(method, path, body, **keywords)
            except NotReachable as error:
                if self._ending:
                    raise
                self._link.recover(error)
            except Refused as error:
                if (
                    error.answer.get("code") != "AUTH_002" or renewed
                ):  # a machine that has slept for longer than a token lives
                    raise
                self._link.client, renewed = self._link.answering(), True

    def _wait(self, event_type: str, since: str, seconds: float, filter: str | None = None) -> Any:
        """A long poll for events of this issue, or of ``filter``."""
        query = {
            "timeout": int(seconds * 1000),
            "since": since,
            "limit": 1000,
            "filter": f"issue_id:{self._issue}" if filter is None else filter,
        }
        try:
            return self._call("GET", f"/api/events/wait/{event_type}", query=query, timeout=seconds + 30)
        except Refused as error:
            if error.answer.get("code") != "EVT_003":
                raise
            return self._call(
                "GET", f"/api/events/wait/{event_type}", query=query | {"since": "earliest"}, timeout=seconds + 30
            )

    def _events(self, event_type: str, since: str) -> Iterator[dict[str, Any]]:
        """Every retained event of this issue after ``since``."""
        more = True
        while more:
            answer = self._wait(event_type, since, 0)
            yield from answer["events"]
            since, more = answer["scanned_to"], answer["more_available"]

    def _publish(self, event_type: str, data: dict[str, Any]) -> None:
        body = {"publisher": "pipeline", "topic": "pipeline", "data": {"issue_id": self._issue, **data}}
        self._call("POST", f"/api/events/{event_type}", body, key=str(uuid.uuid4()))


# ======================================================================================================
# The rules, which need no service
# ======================================================================================================

TASK_LENGTH = 30_000  # what a spawn takes
PART = "\n\nYour part: "  # between the task and why it is an agent's turn
PRIORITIES = ("high", "medium", "low")
FILE_LISTS = ("files_created", "files_modified", "files_deleted")

SILENT_ENDS = {  # state: what happened to an agent that stored no result
    "completed": "ended without storing a result",
    "failed": "failed with {code} without storing a result",
    "killed": "was ended from outside without storing a result",
    "timeout": "was ended by the service's --agent-timeout without storing a result",
    "lost": "was lost with the service without storing a result",
}


class Outcome(Struct, frozen=True):
    """A stored result: whose it is, and whom routing proposed after it."""

    agent_id: str
    agent_type: str
    category: str
    status: str
    proposals: list[NextAgent]


class Plan:
    """Who is still to work, from all outcomes in their order.

    A proposal stays until its type has stored a result, whatever else is proposed meanwhile: routing names a type once
    per code change, so dropping one would lose it. A type that is proposed again keeps its place and the higher
    priority.
    """

    def __init__(self, first: NextAgent, until: str | None) -> None:
        self.pending: dict[str, NextAgent] = {first.agent_type: first}
        self.reasons: dict[str, NextAgent] = {}  # agent id: the proposal that it followed
        self.failures: collections.Counter[str] = collections.Counter()  # since the type's last success
        self.reached = False  # what --until names has succeeded, and nothing since has put it in doubt
        self._first, self._until = first, until

    def take(self, outcome: Outcome) -> None:
        asked = self.pending.pop(outcome.agent_type, None)
        if not self.reasons and asked is not self._first:  # the issue did not begin with the pipeline
            self.pending.clear()
        self.reasons[outcome.agent_id] = asked or NextAgent(outcome.agent_type, "medium", "not proposed")
        good = outcome.status == "success"
        self.failures[outcome.agent_type] = 0 if good else self.failures[outcome.agent_type] + 1
        again = NextAgent(outcome.agent_type, asked.priority if asked else "medium", "pipeline: another attempt")
        for proposal in outcome.proposals or ([] if good else [again]):
            known = self.pending.get(proposal.agent_type)
            if known is None or rank(proposal) <= rank(known):
                self.pending[proposal.agent_type] = proposal
        self._judge(outcome, good)

    def _judge(self, outcome: Outcome, good: bool) -> None:
        if self._until in (outcome.agent_type, outcome.category):
            self.reached = good
        elif not good or outcome.category == "coding":
            self.reached = False

    def queue(self) -> list[NextAgent]:
        """By priority, then in the order in which they were proposed."""
        return sorted(self.pending.values(), key=rank)

    def next(self) -> NextAgent:
        return self.queue()[0]


def rank(proposal: NextAgent) -> int:
    return PRIORITIES.index(proposal.priority)


def never_started(agent: dict[str, Any]) -> bool:
    """Whether it is a row of the ledger without a process: its command could not be run."""
    return agent["state"] == "failed" and agent["pid"] is None


def silent_result(agent: dict[str, Any], may_write: bool, ordered: str = "") -> dict[str, Any]:
    """The result of an agent that stored none: a failure that says what happened. Of a type that may not store any
    (documentation, support) the exit code is the result, and its last line what it decided."""
    lines = [redact(text)[0][:500] for line in agent["output_tail"] if (text := last_shown(line).strip())]
    about = {"reported_by": "pipeline", "state": agent["state"], "exit_code": agent["exit_code"], "output": lines}
    if agent["state"] == "completed" and not may_write:
        return {"status": "success", "decisions": lines[-1:], "artifacts": about}
    code = f"signal {agent['signal']}" if agent["signal"] else f"exit code {agent['exit_code']}"
    problem = f"{agent['agent_type']} {ordered or SILENT_ENDS[agent['state']].format(code=code)}"
    problem += f"; its last lines: {' | '.join(lines[-3:])}" if lines else "; it wrote nothing"
    return {"status": "failed", "errors": [problem], "artifacts": about}


def short_decision(result: dict[str, Any]) -> str:
    """What a result says of itself in one line: its first error where it failed, else its decisions."""
    said = result.get("decisions") or []
    if result.get("status") == "failed" and result.get("errors"):
        said = [
            error if isinstance(error, str) else json.dumps(error, ensure_ascii=False) for error in result["errors"][:1]
        ]
    return " ".join("; ".join(said).split())


def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:59] + "…"


def seconds_of(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# ======================================================================================================
# The service: the one that runs for the repository, else one of our own
# ======================================================================================================


class Link:
    """The way to the service. One that is started here lives for as long as any pipeline uses it, and not longer."""

    START_SECONDS = 20.0
    MAX_RESTARTS = 3

    def __init__(self, options: argparse.Namespace, asked: Settings, view: View) -> None:
        self._options, self._asked, self._settings, self._view = options, asked, running_settings(asked), view
        self._local = not (getattr(options, "url", None) or os.environ.get("SIDECAR_URL"))
        self._held: list[int] = []
        self.own: subprocess.Popen[bytes] | None = None
        self.client: Client
        self.losses = 0

    def __enter__(self) -> Link:
        if self._local:
            prepare_storage_folder(self._settings)
            pipelines_folder(self._settings).mkdir(mode=0o700, exist_ok=True)
            self._hold_issue()
            self._hold_service()
        try:
            self.client = self._find_or_start() if self._local else self._checked(self.answering())
        except BaseException:
            if self.own:  # nobody else has got to know it
                self.own.terminate()
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._held:
            os.close(file)
        if self.own:
            self._wait_for_stop(self.own)

    @property
    def whose(self) -> str:
        return "its own" if self.own else "running"

    def _hold_issue(self) -> None:
        """One pipeline per issue, or two would start the same agent. The lock dies with its holder."""
        file = open_private(pipelines_folder(self._settings) / f"{self._options.issue}.lock")
        self._held.append(file)
        try:
            lock_file(file)
        except OSError:
            raise StartError(f"a pipeline for {self._options.issue} is already running", REFUSED) from None

    def _hold_service(self) -> None:
        """Our part in the lock that keeps a pipeline's service alive; waits until one that is just stopping has
        gone.
        """
        if fcntl is None:
            return
        file = open_private(users_file(self._settings))
        self._held.append(file)
        deadline = time.monotonic() + self.START_SECONDS
        while not try_to_share(file):
            if time.monotonic() > deadline:
                raise StartError("the service of an earlier pipeline does not stop", REFUSED)
            time.sleep(0.05)

    def answering(self) -> Client:
        """A client of the service that answers now; raises NotReachable."""
        client = Client(self._options)
        health = client.call("GET", "/health", timeout=10)
        if self._local and health["project_id"] != client.project:  # it was killed, and another one has its port
            raise NotReachable(f"no sidecar runs for {self._settings.root}")
        client.project = health["project_id"]
        return client

    def _announced(self) -> bool:
        """Whether the service that clients find is our own."""
        info = read_sidecar_json(self._settings.storage)
        return self.own is not None and info is not None and info.pid == self.own.pid

    def _checked(self, client: Client) -> Client:
        """The client of a service that is not our own; raises StartError where it need not have the given options."""
        info = read_sidecar_json(self._settings.storage) if self._local else None
        theirs, ours = self._known(client, info.pid if info else 0), plain_settings(self._asked)
        for_us = {"root", "storage"} | ({"jwt_secret"} if self._local else set())  # where it is, and how we sign
        names = [name for name in self._given() if name not in for_us and ours.get(name) not in theirs.get(name, [])]
        if names:
            flags, where = ", ".join(map(flag, names)), f"{client.url}, pid {info.pid}" if info else client.url
            it = "it" if len(names) == 1 else "them"
            how = f"start that again with {it}, or with {it} in its cco.toml"
            if "root" in theirs:
                other = f"another `{own_command()} run`"
                how = f"{other} has started it with other values, and it stops with that: wait, or leave {it} out"
            elif self._local:
                how += f"; where none runs, `{own_command()} run` starts one of its own with {it}"
            raise StartError(f"{flags}: decided by the service that runs already ({where}): {how}")
        return client

    def _known(self, client: Client, pid: int) -> dict[str, list[Any]]:
        """The settings of a running service that can be known, each with the values that mean what it has."""
        known: dict[str, list[Any]] = {"project": [client.project], "port": [urllib.parse.urlsplit(client.url).port]}
        with contextlib.suppress(OSError):  # no pipeline has ever started one
            facts = json.loads((pipelines_folder(self._settings) / "service.json").read_bytes())
            if facts["pid"] == pid:
                return {name: [value, *known.get(name, [])] for name, value in facts["settings"].items()}
        return known

    def _given(self) -> dict[str, Any]:
        """The service's options that the user gave, as they were written."""
        return {name: vars(self._options)[name] for name in OPTIONS if name in vars(self._options)}

    def _find_or_start(self) -> Client:
        deadline = time.monotonic() + self.START_SECONDS
        while True:
            with contextlib.suppress(NotReachable):
                client = self.answering()
                if self.own and self.own.poll() is None and self._announced():
                    return client
                if self.own is None or self.own.poll() is not None:
                    self.own = None
                    return self._checked(client)
            if self.own is None or self.own.poll() is not None:
                self._start()
            if time.monotonic() > deadline:
                raise StartError(f"the service did not start: {self._last_words()}", REFUSED)
            time.sleep(0.05)
            self._check_start()

    def _start(self) -> None:
        if fcntl is None:
            raise NotReachable(f"no sidecar runs for {self._settings.root}; start it with `{own_command()}`")
        command = [sys.executable, str(Path(cco_sidecar.__file__).resolve()), "run-service", *self._flags()]
        environ = dict(os.environ) | self._variables()
        output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:  # a session of its own: Ctrl-C is for us, who have an agent to end first
            self.own = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, start_new_session=True
            )  # fmt: skip
        finally:
            os.close(output)

    def _flags(self) -> list[str]:
        """What the user said, on a free port unless the user named one."""
        settings = self._settings
        said = {name: value for name, value in self._given().items() if not in_variable(name, value)}
        own = {"root": str(settings.root), "project": settings.project, "storage": str(settings.storage)}
        if self._options.timeout and "agent_timeout" not in said:
            own["agent_timeout"] = str(max(settings.agent_timeout, self._options.timeout))
        return [f"{flag(name)}={value}" for name, value in pairs({"port": "0"} | said | own)]

    def _variables(self) -> dict[str, str]:
        """What is no flag with a value: switches, and a secret, which flags would show to everybody."""
        hidden = {name: value for name, value in self._given().items() if in_variable(name, value)}
        return {f"CCO_SIDECAR_{name.upper()}": str(value) for name, value in hidden.items()}

    def said(self) -> list[str]:
        """The options that another run needs to do the same, as words."""
        client = {name: vars(self._options)[name] for name in ("url",) if name in vars(self._options)}
        given = {name: value for name, value in self._given().items() if name != "jwt_secret" and value is not False}
        words = [[flag(name)] if value is True else [flag(name), str(value)] for name, value in pairs(client | given)]
        return [word for pair in words for word in pair]

    def _check_start(self) -> None:
        """Give up on a service of ours that has ended, unless another one has the storage: that one is about to answer,
        or to go.
        """
        if self.own and self.own.poll() is not None:
            if self.own.returncode == REFUSED and "already runs on this storage" in self._last_words():
                self.own = None
                time.sleep(0.2)
            else:
                raise StartError(
                    f"the service did not start: {self._last_words()}",
                    self.own.returncode if self.own.returncode > 0 else REFUSED,
                )

    @property
    def _log(self) -> Path:
        return pipelines_folder(self._settings) / "service.log"

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return lines[-1].removeprefix("cco: ") if lines else "it said nothing"

    def recover(self, error: NotReachable) -> None:
        """Return when the service answers again. Our own is started again, somebody else's is waited for; raises what
        was the matter.
        """
        self.losses += 1
        self._view.tell("waiting", reason=str(error), seconds=self._options.patience)
        deadline = time.monotonic() + self._options.patience
        while True:
            try:
                client = self.answering()
                self.client = client if self.own is None or self._announced() else self._find_or_start()
                return
            except (NotReachable, Refused):
                if self.own and self.own.poll() is not None:
                    self.client = self._start_again()
                    return
                if time.monotonic() > deadline:
                    raise error from None
                time.sleep(0.2)

    def _start_again(self) -> Client:
        if self.losses > self.MAX_RESTARTS:
            raise StartError(f"the service has died {self.losses} times: {self._last_words()}", NOT_REACHABLE)
        return self._find_or_start()

    def _wait_for_stop(self, own: subprocess.Popen[bytes]) -> None:
        """Our service stops by itself when its last user has gone: wait for that, unless another pipeline still uses
        it.
        """
        file, used = open_private(users_file(self._settings)), 0
        deadline = time.monotonic() + self.START_SECONDS
        while own.poll() is None and time.monotonic() < deadline and used < 20:
            shared = try_to_share(
                file
            )  # refused as soon as the service has taken the lock, which it does when nobody shares it
            if shared:
                fcntl.flock(file, fcntl.LOCK_UN)
            used = used + 1 if shared else 0
            time.sleep(0.05)
        os.close(file)
        if own.poll() is None and used >= 20:
            self._view.tell(
                "note",
                reason="another pipeline uses the service that was started here: it stays until that one has ended",
            )
        elif own.poll() is None:
            own.kill()
            own.wait()


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def in_variable(name: str, value: Any) -> bool:
    return name == "jwt_secret" or isinstance(value, bool)


def pairs(table: dict[str, Any]) -> list[tuple[str, Any]]:
    """The rows of a table of options, one for each value of those that may be repeated."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in table.items()}
    return [(name, value) for name, values in lists.items() for value in values]


def plain_settings(settings: Settings) -> dict[str, Any]:
    """The settings as JSON has them, without the secret."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    del found["jwt_secret"]
    return found


def pipelines_folder(settings: Settings) -> Path:
    return settings.storage / "pipelines"


def users_file(settings: Settings) -> Path:
    """Shared by every pipeline that uses the storage's service; wanted for itself alone by a service that a pipeline
    has started.
    """
    return pipelines_folder(settings) / ".users"


def open_private(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartError(f"{path.name}: {error.strerror}", REFUSED) from None


def try_to_share(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ======================================================================================================
# What is shown
# ======================================================================================================


class NotWritten(Exception):
    """Standard output takes nothing more: its reader has gone, or it is ``full``."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"output cannot be written: {error.strerror}")
        self.full = not isinstance(error, BrokenPipeError)


@contextlib.contextmanager
def written() -> Iterator[None]:
    """What is printed in here is written when this ends. Raises NotWritten; what is printed after that goes nowhere."""
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise NotWritten(error) from None


class View:
    """Gets every happening by name with its facts, and here shows nothing. ``pace`` is how often it wants to see a
    running agent, in seconds."""

    pace = 10.0

    def __init__(self) -> None:
        self._began = time.monotonic()

    def tell(self, event: str, **facts: Any) -> None:
        pass

    def progress(self, agent: dict[str, Any], elapsed: float, line: str, *, changed: bool) -> None:
        """The agent still runs; ``line`` is the last that it wrote, ``changed`` where it is another one than before."""
        if changed and line:
            who = {name: agent[name] for name in ("agent_id", "agent_type")}
            self.tell("agent_output", **who, seconds=round(elapsed, 2), line=line)

    def give_up(self, error: StartError) -> None:
        """The command ends with ``error``, which is said on stderr."""

    def clear(self) -> None:
        """What others print next begins a line. May be called by a signal's handler."""


class JsonView(View):
    """One JSON object a line."""

    def give_up(self, error: StartError) -> None:
        with contextlib.suppress(NotWritten):  # the error itself still is to be said
            facts = {"state": "error", "reason": str(error), "exit_code": error.exit_code}
            self.tell("pipeline_ended", **facts, seconds=round(time.monotonic() - self._began, 2), agents=[])

    def tell(self, event: str, **facts: Any) -> None:
        row = json.dumps({"event": event, "timestamp": iso(), **facts}, ensure_ascii=not speaks_utf8())
        with written():
            sys.stdout.write(f"{row}\n")  # in one: Ctrl-C must not come between


class TableView(View):
    """A line for each happening with the seconds since the start, and the summary as a table."""

    def tell(self, event: str, **facts: Any) -> None:
        with written():
            for line in LINES[event](facts):
                self._print(f"{time.monotonic() - self._began:7.2f} s  {plain(line)}\n")
            if event == "pipeline_ended" and facts["agents"]:
                print()
                print_table(list(SUMMARY), [[plain(show(row)) for show in SUMMARY.values()] for row in facts["agents"]])

    def _print(self, line: str) -> None:
        sys.stdout.write(line)


class LiveView(TableView):
    """On a terminal: the running agent's line is written again and again in its place."""

    pace = 1.0

    def progress(self, agent: dict[str, Any], elapsed: float, line: str, *, changed: bool) -> None:
        shown = (
            f"{time.monotonic() - self._began:7.2f} s  {agent['agent_type']} {agent['state']} {elapsed:.0f} s "
            f" {plain(line)}"
        )
        with written():
            sys.stdout.write(f"\r\x1b[K{fitting(shown, shutil.get_terminal_size().columns - 1)}")

    def _print(self, line: str) -> None:
        sys.stdout.write(f"\r\x1b[K{line}")

    def clear(self) -> None:
        with contextlib.suppress(OSError):  # the terminal has gone: there is nothing to clear
            os.write(sys.stdout.fileno(), b"\r\x1b[K")


def view_of(options: argparse.Namespace) -> View:
    if sys.stdout is None:  # it was closed before we began
        return View()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character must not end an agent
    return JsonView() if options.format == "json" else LiveView() if sys.stdout.isatty() else TableView()


def speaks_utf8() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


ESCAPES = re.compile(  # ECMA-48: control sequences, operating system commands, control strings, and the short ones
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|[ -/]*[0-~])"
)


def plain(text: str) -> str:
    """Nothing in ``text`` steers the terminal."""
    return cell(ESCAPES.sub("", text))


def last_shown(line: str) -> str:
    """What a terminal shows of a line of output in the end: carriage returns replace what came before them."""
    return cell(ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2])


def fitting(text: str, columns: int) -> str:
    """As much of ``text`` as fits; wide characters take two columns, combining ones none."""
    room = columns
    for position, character in enumerate(text):
        room -= 0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if room < 0:
            return text[:position]
    return text


def started_line(facts: dict[str, Any]) -> Iterable[str]:
    how = "goes on" if facts["going_on"] else "begins"
    yield f"{facts['issue_id']} {how} at {facts['url']}" + (
        ", a service of its own" if facts["service"] == "its own" else ""
    )


def ended_line(facts: dict[str, Any]) -> Iterable[str]:
    about = (
        f"{facts['status'] or facts['state']} after {facts['seconds']:.1f} s, {counted(facts['files_changed'], 'file')}"
        " changed"
    )
    yield f"{facts['agent_type']} {about}" + (f": {facts['decision']}" if facts["decision"] else "")
    for item in facts["next_agents"]:
        yield f"  next: {item['agent_type']} ({item['priority']}), {item['reason']}"


LINES: dict[str, Callable[[dict[str, Any]], Iterable[str]]] = {  # event: its lines
    "pipeline_started": started_line,
    "agent_started": lambda facts: [
        f"{facts['agent_type']} started, pid {facts['pid']} ({facts['priority']}), {facts['reason']}"
    ],
    "agent_found": lambda facts: [f"{facts['agent_type']} found, pid {facts['pid']}, started {facts['seconds']} s ago"],
    "agent_output": lambda facts: [f"{facts['agent_type']}: {facts['line']}"],
    "agent_ended": ended_line,
    "waiting": lambda facts: [f"waiting, at most {facts['seconds']} s: {facts['reason']}"],
    "note": lambda facts: [facts["reason"]],
    "pipeline_ended": lambda facts: [f"{facts['state']}: {facts['reason']}"],
}

SUMMARY: dict[str, Callable[[dict[str, Any]], str]] = {  # column: what it shows of an agent
    "type": lambda row: row["agent_type"],
    "state": lambda row: row["state"],
    "time": lambda row: f"{row['seconds']:.1f} s" if isinstance(row["seconds"], float) else f"{row['seconds']} s",
    "result": lambda row: row["status"] or "none",
    "files": lambda row: str(row["files_changed"]),
    "decision": lambda row: row["decision"],
    "why": lambda row: row["reason"],
}

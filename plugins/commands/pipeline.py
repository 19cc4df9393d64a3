"""The command ``run``: takes an issue from the architect to the documentation without anybody's help.

It spawns the first agent, then whatever routing proposes, one at a time, until routing has nothing more to propose. It
keeps no file about where it is: what it does next follows from what the service has stored (the issue's agents and
``agent_completed`` events), read anew before each step. So it does not matter who was killed when: the same command
goes on.

Here are the command and the pipeline; its rules, the service that it uses or starts, and what it shows stand in the
files ``_pipeline_*.py`` beside this one. Seconds everywhere but in the query of a long poll, which wants milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from cco_sidecar import (
    CATEGORIES,
    GOOD,
    IDENTIFIER,
    OPTIONS,
    REFUSED,
    WRITE,
    WRONG_USE,
    AgentTypes,
    Hooks,
    IssueNotFound,
    NextAgent,
    StartError,
    hookimpl,
    load_hooks,
    own_command,
    settings_from,
)
from cco_sidecar_plugins.commands._client import NotReachable, Refused
from cco_sidecar_plugins.commands._pipeline_plan import (
    FILE_LISTS,
    PART,
    TASK_LENGTH,
    Outcome,
    Plan,
    never_started,
    seconds_of,
    short_decision,
    shortened,
    silent_result,
)
from cco_sidecar_plugins.commands._pipeline_service import Link, command_run_service
from cco_sidecar_plugins.commands._pipeline_view import NotWritten, View, counted, last_shown, view_of
from cco_sidecar_plugins.commands._table import CLIENT_OPTIONS, Command, add_commands, arg

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
        ], formats=("table", "json"), options=(*CLIENT_OPTIONS, *OPTIONS), section="Start"),
        "run-service": Command("", command_run_service, options=OPTIONS),
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
        known: dict[str, Any] = next(
            (event["data"] for event in reversed(list(self._events("pipeline_started", "earliest")))), {}
        )
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

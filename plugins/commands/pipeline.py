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
import itertools
import os
import shlex
import signal
import threading
import time
import uuid
from typing import Any

from cco_sidecar import (
    CATEGORIES,
    GOOD,
    NAME_IN_WORDS,
    REFUSED,
    TASK_LENGTH,
    WRITE,
    WRONG_USE,
    AgentTypes,
    Hooks,
    IssueNotFound,
    NextAgent,
    Settings,
    StartError,
    hookimpl,
    is_identifier,
    load_hooks,
    option_table,
    settings_from,
)
from cco_sidecar_plugins._called import own_command
from cco_sidecar_plugins._program import handling_signals
from cco_sidecar_plugins._words import counted
from cco_sidecar_plugins.agents._agent_types import BUILT_IN
from cco_sidecar_plugins.agents.launchers import DECIDING, find_program
from cco_sidecar_plugins.agents.specialists import nearest_type
from cco_sidecar_plugins.commands._client import NotReachable, Refused
from cco_sidecar_plugins.commands._pipeline_issue import Interrupts, Issue, Story
from cco_sidecar_plugins.commands._pipeline_plan import (
    PART,
    Outcome,
    Plan,
    able_program,
    done_result,
    in_one_line,
    is_done,
    is_idle,
    silent_result,
    whole_task,
)
from cco_sidecar_plugins.commands._pipeline_service import Link, command_run_service
from cco_sidecar_plugins.commands._pipeline_view import NotWritten, View, view_of
from cco_sidecar_plugins.commands._table import CLIENT_OPTIONS, Command, add_commands, arg, number, text_or_input
from cco_sidecar_plugins.commands.approve import newly_asked
from cco_sidecar_plugins.results._routing import JUDGES, is_silent

FIRST = NextAgent("chief-architect", "high", "pipeline: the first agent")
LONGEST_PAUSE = 300  # seconds that failures make of a shorter --pause


# ==== The command =====================================================================================


@hookimpl
def register_commands(commands: Any) -> None:
    add_commands(commands, {
        "run": Command("take an issue through all its agents, or go on with one",
            command_run, [
            arg("--issue", required=True, help="issue id, any name"),
            arg("--task", type=task_text,
                help="what is to be done, - for standard input (default: what a plugin or an earlier run knows)"),
            arg("--type", help="the first agent (default: chief-architect)"),
            arg("--until", metavar="CATEGORY|TYPE",
                help="stop when this has succeeded, for example coding or documentation-expert"),
            arg("--rounds", type=number(1), default=12, metavar="N", help="agents started at most (default: 12)"),
            arg("--retries", type=number(0), default=3, metavar="N",
                help="a type that fails more often in a row ends it (default: 3)"),
            arg("--pause", type=number(0), default=5, metavar="SECONDS",
                help="wait so long after an agent that failed, twice as long after the next (default: 5)"),
            arg("--timeout", type=number(1), metavar="SECONDS",
                help="time limit of each agent (default: the service's)"),
            arg("--patience", type=number(0), default=30, metavar="SECONDS",
                help="wait so long for a lost service (default: 30)"),
            arg("--restart", action="store_true", help="begin anew, whatever has been done on the issue"),
            arg("--until-eof", action="store_true", help=argparse.SUPPRESS),  # the service runs it, and holds its input
        ], formats=("table", "json"), options=(*CLIENT_OPTIONS, *option_table()), section="Start"),
        "run-service": Command("", command_run_service, options=option_table()),
    })  # fmt: skip


def task_text(text: str) -> str:
    text = text_or_input(text)
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    if len(text) > TASK_LENGTH:
        raise argparse.ArgumentTypeError(f"has {len(text):,} characters, {TASK_LENGTH:,} are the most")
    return text


def command_run(options: argparse.Namespace) -> int:
    """Run or go on with the pipeline of one issue; the exit code."""
    if not is_identifier(options.issue):
        raise StartError(f"--issue: {options.issue!r} {NAME_IN_WORDS}")
    asked = settings_from(options)
    hooks = load_hooks(asked)
    types = AgentTypes(hooks, asked).categories
    categories = [name for name, category in CATEGORIES.items() if not category.people]
    if options.until and types.get(options.until, options.until) not in categories:
        known = f"neither an agent type nor one of the categories {', '.join(categories)}"
        raise StartError(f"--until: {options.until!r} is {known}{nearest_type(options.until, [*types, *categories])}")
    view = view_of(options)
    interrupts = Interrupts(view)
    try:
        with handling_signals(interrupts.on_signal), Link(options, asked, view) as link:
            if options.until_eof:
                threading.Thread(target=end_at_eof, daemon=True).start()
            return Pipeline(options, asked, hooks, types, link, view, interrupts).run()
    except StartError as error:
        view.give_up(error)
        raise
    except NotWritten as error:
        if error.full:
            raise StartError(str(error), REFUSED) from None
        return interrupts.exit_code
    finally:
        view.clear()


def check_program(hooks: Hooks, settings: Settings, agent_type: str) -> None:
    """Raise StartError where the configured command of an agent is not there, and neither a plugin nor a file of the
    repository gives another.
    """
    command = settings.command_of(agent_type)
    theirs = {row.plugin for row in hooks.implementations["agent_command"]} - DECIDING
    if command and "{" not in command[0] and not theirs and agent_type in BUILT_IN:
        try:
            find_program(command[0], settings.root)
        except OSError as error:
            raise StartError(f"no {agent_type} can be started: {command[0]}: {error.strerror}", REFUSED) from None


def has_failed(agent: dict[str, Any]) -> bool:
    """Whether its program did: a result that says so is work that was done."""
    return agent["state"] == "failed" and agent["result_status"] != "success"


def end_at_eof() -> None:
    """End the pipeline, as Ctrl-C does, at the end of standard input: it comes however the service ends."""
    with contextlib.suppress(OSError):  # what cannot be read on has ended too
        while os.read(0, 4096):
            pass
    if hasattr(signal, "pthread_kill"):  # which also ends what the main thread waits for
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    else:
        signal.raise_signal(signal.SIGINT)


# ==== The pipeline ====================================================================================


class Pipeline:
    """One issue's way through its agents, one at a time since they share a working tree."""

    def __init__(
        self,
        options: argparse.Namespace,
        settings: Settings,
        hooks: Hooks,
        types: dict[str, str],
        link: Link,
        view: View,
        interrupts: Interrupts,
    ) -> None:
        self._options, self._settings, self._hooks, self._types = options, settings, hooks, types
        self._link, self._view, self._name = link, view, options.issue
        self._interrupts, self._issue = interrupts, Issue(self._name, link, interrupts)
        self._story = Story(self._issue, view, interrupts)
        self._began, self._rounds = time.monotonic(), 0
        self._agents: dict[str, dict[str, Any]] = {}  # the ledger's rows of this pipeline, oldest first
        self._proposals: dict[str, list[Any]] = {}  # of each agent with a result: those that routing made after it
        self._plan = Plan(FIRST, options.until)
        self._made: dict[str, dict[str, Any]] = {}  # partial results by id: those that the service made
        self._ordered: dict[str, str] = {}  # agents whose end we ordered, and why
        self._paused_after = ""  # the failed agent
        self._asked: set[str] = set()  # what agents ask people, and was told
        self._others: set[str] = set()  # agents of other issues, which were told
        self._cursor = self._after_agent = ""

    def run(self) -> int:
        """Step by step to the end; the exit code."""
        try:
            self._begin()
            while True:
                self._catch_up()
                for words in self._link.warnings():
                    self._view.tell("note", reason=f"the service warns: {words}")
                self._story.go_on(self._agents, self._proposals, self._plan)
                if living := self._living():
                    self._follow(living[0])
                elif verdict := self._verdict():
                    return self._finish(*verdict)
                elif not self._paused():
                    self._spawn(self._plan.next())
        except KeyboardInterrupt:
            return self._interrupted()
        except NotReachable as error:
            unseen = self._story.started.keys() - self._agents.keys()  # started since the last look
            goes_on = "its agent goes on, and " if self._living() or unseen else ""
            raise NotReachable(f"{error}; {goes_on}{self._how_to_go_on()}") from None
        except NotWritten:
            self._view = self._story.view = View()
            self._interrupted()
            raise

    # -- where it stands

    def _begin(self) -> None:
        """Find the latest start of this issue's pipeline and go on from there; where there is none, or with --restart,
        begin here.
        """
        options, all_agents = self._options, self._read_agents()
        with contextlib.suppress(Refused):  # by a service without plugins
            told = self._issue.call("GET", "/api/agent-types")["agent_types"]
            self._types = self._types | {row["agent_type"]: row["category"] for row in told}
        starts = [event["data"] for event in self._issue.events("pipeline_started", "earliest")]
        known: dict[str, Any] = starts[-1] if starts else {}
        self._task = options.task or known.get("task") or task_elsewhere(options, self._hooks, all_agents)
        if not self._task:
            raise StartError(f"--task: {self._name} has no task yet, so say what is to be done", WRONG_USE)
        known = {} if options.restart else known
        first = options.type or known.get("type") or FIRST.agent_type
        self._cursor, self._after_agent = known.get("since", "earliest"), known.get("after_agent", "")
        if options.restart:
            self._cursor = self._issue.wait("*", "latest", 0)["scanned_to"]
            self._after_agent = next(reversed(all_agents), "")
        begin = {"type": first, "task": self._task, "since": self._cursor, "after_agent": self._after_agent}
        self._plan = Plan(NextAgent(first, FIRST.priority, FIRST.reason), options.until)
        self._agents = self._read_agents()
        self._story.history = {agent_id for agent_id, agent in self._agents.items() if agent["ended_at"]}
        self._catch_up()
        self._check_history()
        self._check_given(known)
        self._plan.failures.clear()  # whoever starts it again has looked into what went wrong
        if self._link.own and not self._living() and not self._verdict():
            check_program(self._hooks, self._settings, self._plan.next().agent_type)
        going_on = bool(self._agents or self._proposals)
        pending = [item.agent_type for item in self._plan.queue()]
        facts = {"url": self._link.client.url, "service": self._link.whose, "going_on": going_on, "task": self._task}
        self._view.tell("pipeline_started", issue_id=self._name, **facts, pending=pending)
        self._issue.publish("pipeline_started", begin)

    def _check_given(self, known: dict[str, Any]) -> None:
        """Refuse a --task or --type that would be passed over: the issue is done, or has begun with another one."""
        given, going_on = self._options, bool(self._agents or self._proposals)
        other_task = given.task is not None and given.task.strip() != known.get("task", "").strip()
        first = known.get("type") or next((asked.agent_type for asked in self._plan.reasons.values()), given.type)
        other_type = given.type not in (None, first) and bool(self._proposals)
        if (other_task or other_type) and going_on and not self._plan.pending and not self._living():
            was = f" (its task was {in_one_line(known['task'])!r})" if known.get("task") else ""
            raise StartError(
                f"{self._name} is done{was}: begin it anew with --restart, or give what is new an issue of its own",
                REFUSED,
            )  # fmt: skip
        if other_task and going_on and known.get("task"):
            raise StartError(
                f"{self._name} is being worked on with the task {in_one_line(known['task'])!r}:"
                " leave --task out to go on with that, or begin anew with --restart", REFUSED,
            )  # fmt: skip
        if other_type:
            how = "leave --type out to go on, or begin anew with --restart"
            raise StartError(f"{self._name} has begun with {first}: {how}", REFUSED)

    def _check_history(self) -> None:
        """Refuse to guess where what routing said has expired: the results are there, the events are not."""
        forgotten = any(agent["result_id"] for agent in self._agents.values())
        if self._cursor == "earliest" and not forgotten:
            query = {"issue_id": self._name, "limit": 1}
            forgotten = bool(self._issue.call("GET", "/api/results", query=query)["results"])
        if forgotten and not self._proposals:
            raise StartError(
                f"{self._name} has results, but the events that said who comes next have expired; begin anew with"
                " --restart, and with --type TYPE where the first agents need not work again", REFUSED,
            )  # fmt: skip

    def _catch_up(self) -> None:
        """Read the agents and results that are new, and speak for agents that have ended without a result."""
        self._agents = self._read_agents()
        spoken_for = [self._speak_for(agent) for agent in self._agents.values() if agent["ended_at"]]
        self._read_results()
        if any(spoken_for):
            self._agents = self._read_agents()

    def _read_agents(self) -> dict[str, dict[str, Any]]:
        return self._issue.agents(self._after_agent, self._story.started)

    def _living(self) -> list[dict[str, Any]]:
        return [agent for agent in self._agents.values() if not agent["ended_at"]]

    def _read_results(self) -> None:
        for event in self._issue.events("agent_completed", self._cursor):
            data, topic, self._cursor = event["data"], event["topic"], event["event_id"]
            if self._is_done(data["agent_type"], self._made_by_service(data["status"], data["result_id"])):
                continue  # ours takes its place
            category = next((name for name, category in CATEGORIES.items() if category.topic == topic), "")
            proposals = [NextAgent(**item) for item in data["next_agents"]]
            self._plan.take(Outcome(event["publisher"], data["agent_type"], category, data["status"], proposals))
            self._proposals[event["publisher"]] = data["next_agents"]

    def _made_by_service(self, status: str | None, result_id: str) -> dict[str, Any]:
        """A result that the service made of an agent that ended with 0 and stored none; empty for any other."""
        if status == "partial" and result_id not in self._made:
            record = self._issue.call("GET", f"/api/results/{result_id}")
            self._made[result_id] = record["result"] if record.get("source") == "sidecar" else {}
        return self._made.get(result_id, {})

    def _is_done(self, agent_type: str, made: dict[str, Any]) -> bool:
        """Whether the result that the service made is as good as a success. Of whoever judges others' work it never
        is: nobody knows what the verdict would have been.
        """
        return not self._judges(agent_type) and is_done(made)

    def _judges(self, agent_type: str) -> bool:
        return self._types.get(agent_type) in JUDGES

    def _speak_for(self, agent: dict[str, Any]) -> bool:
        """Whether a result was stored now for an agent that has ended and stored none itself."""
        made = self._made_by_service(agent["result_status"], agent["result_id"])
        if self._is_done(agent["agent_type"], made):
            asked = {"issue_id": agent["issue_id"], "agent_type": agent["agent_type"], "limit": 1}
            newest = self._issue.call("GET", "/api/results", query=asked)["results"]
            if newest and newest[-1]["id"] != agent["result_id"]:
                return False  # what was stored of its type since, by hand or by the next agent, stands
            self._store(agent, done_result(made, agent["result_id"]), "done")
            return True
        if silent := self._is_silent(agent):
            self._report(agent)
        return silent

    def _is_silent(self, agent: dict[str, Any]) -> bool:
        """Ended without a result. One that was ended on purpose before we began is simply run again."""
        left_alone = agent["state"] == "killed" and agent["agent_id"] in (self._story.history or ())
        return bool(agent["ended_at"]) and agent["result_id"] is None and not left_alone

    def _report(self, agent: dict[str, Any]) -> None:
        """Store what can be said of an agent that did not say it itself, so that routing and the other agents learn of
        it.
        """
        ordered = self._ordered.get(agent["agent_id"], "")
        self._store(agent, silent_result(agent, self._may_write(agent), ordered))

    def _may_write(self, agent: dict[str, Any]) -> bool:
        return WRITE in CATEGORIES[self._types.get(agent["agent_type"], "coding")].permissions

    def _store(self, agent: dict[str, Any], result: dict[str, Any], what: str = "pipeline") -> None:
        body = {name: agent[name] for name in ("agent_id", "agent_type", "issue_id")}
        body |= {"project_id": self._link.client.project, "result": result}
        self._issue.call("POST", "/api/results", body, key=f"{what}-{agent['agent_id']}")

    def _verdict(self) -> tuple[str, str] | None:
        """(state, words) where the pipeline is at its end."""
        plan, options = self._plan, self._options
        if plan.reached:
            return "reached", f"{options.until} has succeeded"
        earlier = self._story.history or set()
        if unable := [agent for agent in self._agents.values() if agent["reason"] and agent["agent_id"] not in earlier]:
            return "failed", f"{unable[-1]['agent_type']} cannot work: {unable[-1]['reason']}"
        for name in plan.pending:
            own = [agent for agent in self._agents.values() if agent["agent_type"] == name][-2:]
            made = [self._made_by_service(agent["result_status"], agent["result_id"]) for agent in own]
            idle = [is_idle(each) and (bool(each.get("errors")) or not self._judges(name)) for each in made]
            if len(own) == 2 and all(idle) and not earlier.intersection(each["agent_id"] for each in own):
                logs = self._link.client.command(f"agent logs {own[1]['agent_id']}")
                words = f"{name} has ended twice with exit code 0 and stored no result"
                refused = next(iter(made[1].get("errors") or []), "")
                words += f": {refused}" if refused else ", and git tells of no file that it changed"
                advice = "a program that can neither call the service nor change files does no step of a pipeline"
                advice = f"{program} can do both" if (program := able_program(made[1])) else advice
                advice = "the service's log and audit log name what refuses" if refused else advice
                return "failed", f"{words}: `{logs}` shows what it did; {advice}"
        if hopeless := [name for name, number in plan.failures.items() if number > options.retries]:
            times = counted(plan.failures[hopeless[0]], "time")
            words = f"{hopeless[0]} has failed {times} in a row (--retries {options.retries})"
            return "failed", words + self._without_verdict(hopeless[0])
        if not plan.pending:
            missed = f" (without reaching {options.until}, which routing did not propose)" if options.until else ""
            return "done", f"routing has nothing more to propose{missed}"
        if self._rounds >= options.rounds:
            started = f"{counted(self._rounds, 'agent')} started (--rounds {options.rounds})"
            return "limit", f"{started}, {plan.next().agent_type} would be next"
        return None

    def _without_verdict(self, agent_type: str) -> str:
        """What to do where the last agent of a type that judges others' work stored no result, else ""."""
        last = [agent for agent in self._agents.values() if agent["agent_type"] == agent_type][-1:]
        if not self._judges(agent_type) or not last or not (stored := last[0]["result_id"]):
            return ""
        if not is_silent(self._issue.call("GET", f"/api/results/{stored}")):
            return ""
        command = self._link.client.command
        logs, store = command(f"agent logs {last[0]['agent_id']}"), command("results store")
        advice = f"`{store}` stores one in its place, or have its program store its result"
        return f" and gave no verdict: `{logs}` shows what it did; {advice}"

    # -- one step

    def _paused(self) -> bool:
        """Whether it waited now: what makes agents fail one after the other, as a model that cannot be reached, takes
        a while to pass.
        """
        earlier = self._story.history or set()
        failed = list(itertools.takewhile(has_failed, reversed([
            agent for agent_id, agent in self._agents.items() if agent_id not in earlier
        ])))  # fmt: skip
        if not failed or not self._options.pause or failed[0]["agent_id"] == self._paused_after:
            return False
        self._paused_after = failed[0]["agent_id"]
        seconds = min(self._options.pause * 2 ** (len(failed) - 1), max(LONGEST_PAUSE, self._options.pause))
        who = f"{failed[0]['agent_type']} has" if len(failed) == 1 else f"{len(failed)} agents in a row have"
        self._view.tell(
            "waiting", reason=f"{who} failed (--pause {self._options.pause})", seconds=seconds, at_most=False
        )
        time.sleep(seconds)
        return True

    def _spawn(self, proposal: NextAgent) -> None:
        """Start the agent, when there is room for it. Returns without one where the crash of the service came
        between.
        """
        body = {"agent_type": proposal.agent_type, "issue_id": self._name, "task": self._task_of(proposal)}
        key, lost = str(uuid.uuid4()), self._link.losses
        while True:
            try:
                spawned = self._issue.call("POST", "/api/agents/spawn", body, key=key, whole=True)
                break
            except Refused as error:
                if "retry_after_seconds" in error.answer:
                    self._wait_for_room(error)
                elif error.answer.get("code") == "AGT_001" and self._link.losses > lost:
                    return  # the ledger knows whether it was started, and the next look into it will tell
                elif error.answer.get("code") == "AGT_002" and proposal.agent_type == self._options.type:
                    advice = f"`{self._link.client.command('agent types')}` lists them"
                    raise StartError(f"--type: {error.answer['message']}; {advice}", WRONG_USE) from None
                elif self._link.own and "start the service with" in str(error):
                    raise StartError(str(error).replace("start the service with", "give"), REFUSED) from None
                else:
                    raise
        self._rounds += 1
        self._story.start(spawned, proposal, self._rounds)
        self._tell_of_others()

    def _task_of(self, proposal: NextAgent) -> str:
        """The task, and for all but the first why it is their turn, where the service's limit leaves room for that."""
        whole = f"{self._task}{PART}{proposal.reason}"
        return whole if (self._rounds or self._proposals) and len(whole) <= TASK_LENGTH else self._task

    def _tell_of_others(self) -> None:
        """Say once of each agent of another issue that it works now too."""
        for row in self._issue.call("GET", "/api/agents", query={"status": "active", "limit": 1000})["agents"]:
            if row["issue_id"] != self._name and row["agent_id"] not in self._others:
                self._others.add(row["agent_id"])
                who = f"{row['agent_type']} works on {row['issue_id']} at the same time"
                advice = "in one work tree each sees the other's unfinished files; `git worktree` gives each its own"
                self._view.tell("note", reason=f"{who}: {advice}")

    def _wait_for_room(self, error: Refused) -> None:
        """Until an agent of the project ends, or the service's own ``retry_after_seconds``."""
        seconds = error.answer["retry_after_seconds"]
        self._view.tell("waiting", reason=error.answer.get("message", str(error)), seconds=seconds, at_most=True)
        self._issue.wait("agent_exited", "latest", seconds, filter="")

    def _follow(self, agent: dict[str, Any]) -> None:
        """Show the agent until it has ended. Its events wake us, and what it asks, which the service publishes: its
        status is read again after each, and at the view's pace; what it asks only then.
        """
        agent_id, cursor = agent["agent_id"], "latest"
        heard: dict[str, Any] = {"events": ["what it asked before"]}
        while True:
            if cursor == "latest":  # before the status: nothing is missed
                cursor = self._issue.wait("*", "latest", 0)["scanned_to"]
            agent = self._issue.call("GET", f"/api/agents/{agent_id}/status")
            if agent["ended_at"]:
                return
            elapsed = time.monotonic() - self._story.started[agent_id]
            for words in newly_asked(self._link.client, agent, self._asked, self._read) if heard["events"] else ():
                self._view.tell("note", reason=words)
            self._story.show_output(agent)
            pace = self._view.pace
            if limit := self._options.timeout:
                pace = min(pace, max(0.1, limit - elapsed))
                if elapsed >= limit and agent_id not in self._ordered:
                    self._ordered[agent_id] = f"took longer than {limit} s (--timeout)"
                    self._issue.call("DELETE", f"/api/agents/{agent_id}")
            heard = self._issue.wait("*", cursor, pace, filter=f"publisher:{agent_id}|cco-sidecar")
            cursor = heard["scanned_to"]

    def _read(self, path: str, query: dict[str, Any]) -> Any:
        return self._issue.call("GET", path, query=query)

    # -- the end

    def _finish(self, state: str, words: str) -> int:
        """Show and publish how it ended; the exit code."""
        code = {"reached": GOOD, "done": GOOD, "failed": REFUSED, "limit": REFUSED}[state]
        if code:
            words += f"; {self._how_to_go_on()}"
        rows = [self._story.row(agent, self._plan) for agent in self._agents.values()]
        self._issue.publish("pipeline_ended", {"state": state, "reason": words, "agents": len(rows)})
        self._view.tell(
            "pipeline_ended", state=state, reason=words, exit_code=code, seconds=self._elapsed(), agents=rows
        )
        return code

    def _interrupted(self) -> int:
        """End the agents of this issue that run, wait for their end, and say how to go on."""
        self._issue.ending, rows = True, []
        try:
            self._agents = self._issue.end_agents(self._after_agent, self._story.started)
            self._story.go_on(self._agents, self._proposals, self._plan)
            rows = [self._story.row(agent, self._plan) for agent in self._agents.values()]
            words = self._how_to_go_on()
        except StartError as error:
            words = f"the running agent could not be ended: {error}"
        code = self._interrupts.exit_code
        self._view.tell(
            "pipeline_ended", state="interrupted", reason=words, exit_code=code, seconds=self._elapsed(), agents=rows
        )
        return code

    def _how_to_go_on(self) -> str:
        if self._options.until_eof:
            return "the same run again goes on from here"
        return f"`{own_command()} run {shlex.join(['--issue', self._name, *self._link.said()])}` goes on from here"

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._began, 2)


def task_elsewhere(options: argparse.Namespace, hooks: Hooks, agents: dict[str, dict[str, Any]]) -> str:
    """The task that a plugin knows the issue by, else that of its latest spawn; empty where there is none."""
    try:
        issue = hooks.first("resolve_issue", issue_id=options.issue, settings=settings_from(options)) or {}
    except IssueNotFound:
        raise StartError(f"there is no issue {options.issue}, says a plugin that knows", REFUSED) from None
    text = "\n\n".join(str(part) for part in (issue.get("title"), issue.get("body")) if part)[:TASK_LENGTH]
    spawned = [whole_task(agent["task"]) for agent in reversed(agents.values())]
    return next((task for task in [text, *spawned] if task.strip()), "")

"""The rules of ``cco run``, which need no service: who is next, and what is said of an agent that said nothing."""

from __future__ import annotations

import collections
import json
from datetime import datetime
from typing import Any

from msgspec import Struct

from cco_sidecar import NextAgent, redact
from cco_sidecar_plugins._terminal import last_shown

PART = "\n\nYour part: "  # between the task and why it is an agent's turn
PRIORITIES = ("high", "medium", "low")
FILE_LISTS = ("files_created", "files_modified", "files_deleted")
MADE = "The agent ended with exit code 0"  # how the rationale begins of what is made of an agent that stored nothing
# How warnings begin that the service puts into a result which it makes, and that say that not all files are known.
FILES_UNKNOWN, WRITTEN_LATER = "Which files it changed is not known", "Written after the agent's end"
SUBMODULES_UNKNOWN = "Whether it changed files in the submodules without a commit is not known"
UNKNOWN = (FILES_UNKNOWN, WRITTEN_LATER, SUBMODULES_UNKNOWN)

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
    priority, that also for another attempt at its own work.
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
            if asked and proposal.agent_type == outcome.agent_type and rank(asked) < rank(proposal):
                proposal = NextAgent(proposal.agent_type, asked.priority, proposal.reason)
            known = self.pending.get(proposal.agent_type)
            if known is None or rank(proposal) <= rank(known):
                self.pending[proposal.agent_type] = proposal
        self._judge(outcome, good)

    def _judge(self, outcome: Outcome, good: bool) -> None:
        if self._until in (outcome.agent_type, outcome.category):
            self.reached = good
        elif not good or outcome.category == "coding":
            self.reached = False

    def reason(self, agent: dict[str, Any]) -> str:
        """Why it was, or is, the turn of ``agent``."""
        proposal = self.reasons.get(agent["agent_id"])
        if proposal is None and PART in agent["task"]:  # what is pending may have come of others that worked since
            return str(agent["task"].rpartition(PART)[2])
        if proposal is None:
            of_first = agent["agent_type"] == self._first.agent_type
            proposal = self._first if of_first else self.pending.get(agent["agent_type"])
        return proposal.reason if proposal else ""

    def queue(self) -> list[NextAgent]:
        """By priority, then in the order in which they were proposed."""
        return sorted(self.pending.values(), key=rank)

    def next(self) -> NextAgent:
        return self.queue()[0]


def rank(proposal: NextAgent) -> int:
    return PRIORITIES.index(proposal.priority)


def whole_task(task: str) -> str:
    """The issue's task in that of an agent, without the part that is for it alone."""
    return task.partition(PART)[0]


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
    known = f"cannot work: {agent['reason']}" if agent.get("reason") else ""
    problem = f"{agent['agent_type']} {ordered or known or SILENT_ENDS[agent['state']].format(code=code)}"
    problem += f"; its last lines: {' | '.join(lines[-3:])}" if lines else "; it wrote nothing"
    return {"status": "failed", "errors": [problem], "artifacts": about}


def able_program(made: dict[str, Any]) -> str:
    """The program that is known to be able to store a result, of an agent of which the service made this one, or ""."""
    about = made.get("artifacts")
    return str(about.get("could_store", "")) if isinstance(about, dict) else ""


def is_done(made: dict[str, Any]) -> bool:
    """Whether an agent of which the service made this result has done its step: it changed files, no result that it
    wanted to store was refused, and its program is not known to be able to store one.
    """
    return any(made.get(kind) for kind in FILE_LISTS) and not made.get("errors") and not able_program(made)


def is_idle(made: dict[str, Any]) -> bool:
    """Whether it is known that it has not: another attempt would hardly be another one."""
    return bool(made.get("errors") or (made and files_of(made) == set()))


def files_of(result: dict[str, Any]) -> set[str] | None:
    """The files that an agent changed, as its result has them. None where nobody knows: there is no result, it says so,
    or the pipeline made it, which does not look at files.
    """
    entries = [entry for kind in FILE_LISTS for entry in result.get(kind) or []]
    about = result.get("artifacts")
    silent = isinstance(about, dict) and about.get("reported_by") == "pipeline"
    unknown = not result or silent or any(str(text).startswith(UNKNOWN) for text in result.get("warnings") or [])
    return None if unknown and not entries else {each if isinstance(each, str) else each["path"] for each in entries}


def done_result(made: dict[str, Any], result_id: str) -> dict[str, Any]:
    """The result of an agent that ended with 0, changed files and stored none, of the one that the service made."""
    why = f"{MADE}, changed files and stored no result: the pipeline takes its step as done."
    about = {"reported_by": "pipeline", "made_of": result_id}
    return made | {"status": "success", "rationale": why, "artifacts": about}


def told_once(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored results without those of which the pipeline made another in the same agent's name: that one tells it."""
    about = [(row["agent_id"], row["result"].get("artifacts")) for row in results]
    made_of = {(agent_id, str(facts.get("made_of"))) for agent_id, facts in about if isinstance(facts, dict)}
    return [row for row in results if (row["agent_id"], row["id"]) not in made_of]


def short_decision(result: dict[str, Any]) -> str:
    """What a result says of itself in one line: its first error where it did not succeed, else its decisions."""
    said = result.get("decisions") or []
    if result.get("status") != "success" and result.get("errors"):
        said = [
            error if isinstance(error, str) else json.dumps(error, ensure_ascii=False) for error in result["errors"][:1]
        ]
    return " ".join("; ".join(said).split())


def in_one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:59] + "…"


def seconds_of(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()

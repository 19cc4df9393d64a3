"""Routes by an issue's whole history: nobody is proposed twice for the same work, a design that fails goes back, and
who was to judge and gave no verdict is asked again.

It takes the place of the built-in rules, whose proposals it goes through, so that results are still stored in one step.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import cco_sidecar
from cco_sidecar import NextAgent, Priority, ResultFact, hookimpl
from cco_sidecar_plugins.context._first_files import project_type

JUDGES = ("qa", "security")  # categories whose agents say whether others' work is good


class ReferenceRules(cco_sidecar.ReferenceRules):
    """The built-in rules; every third failure in a row of a coder is the architect's, and manifests say what a project
    is.
    """

    def project_type(self, root: Path, names: tuple[str, ...]) -> str:
        return project_type(root, names)

    @hookimpl(tryfirst=True)
    def next_agents(
        self,
        result: ResultFact,
        proposals: list[NextAgent],
        history: list[ResultFact],
        language: str,
        submission: dict[str, Any] | None = None,
    ) -> list[NextAgent]:
        """By PROPOSALS, without the types that are settled (``settled_types``)."""
        facts = [*history, result]
        priority: Priority = "medium" if result.status == "partial" else "high"
        if result.category in JUDGES and result.status != "success" and submission and is_silent(submission):
            why = f"{result.category}-silence: another attempt, since it gave no verdict"
            return [*proposals, NextAgent(result.agent_type, priority, why)]  # a coder would have nothing to repair
        own = (fact.status for fact in reversed(facts) if fact.agent_type == result.agent_type)
        failures = len(list(itertools.takewhile(lambda status: status != "success", own)))
        if result.category == "coding" and failures and failures % 3 == 0:
            why = "coding-failure: the third in a row, so the design is to be reconsidered"
            # Also where the architect is settled: a design that does not work out is not settled by being made.
            return [*proposals, NextAgent("chief-architect", priority, why)]
        found, settled = super().next_agents(result, [], history, language), settled_types(facts)
        return [*proposals, *(item for item in found if item.agent_type not in settled)]


def is_silent(stored: dict[str, Any]) -> bool:
    """Whether the service or the pipeline stored this result in the name of an agent that stored none."""
    about = stored["result"].get("artifacts")
    return stored.get("source") == "sidecar" or (isinstance(about, dict) and about.get("reported_by") == "pipeline")


def settled_types(facts: list[ResultFact]) -> set[str]:
    """Types that have succeeded since the last code change, or were proposed since the last change or failure."""
    newest_first = range(len(facts) - 1, -1, -1)
    changes = (at for at in newest_first if facts[at].category == "coding" and facts[at].status != "failed")
    change = next(changes, -1)
    failure = next((at for at in newest_first if at <= change or facts[at].status != "success"), -1)
    passed = {fact.agent_type for fact in facts[change + 1 :] if fact.status == "success"}
    return passed.union(*(fact.proposed for fact in facts[max(0, change, failure) :]))

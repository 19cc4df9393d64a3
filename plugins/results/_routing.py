"""Routes by an issue's whole history: nobody is proposed twice for the same work, and a design that fails goes back.

It takes the place of the built-in rules, whose proposals it goes through, so that results are still stored in one step.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import cco_sidecar
from cco_sidecar import NextAgent, Priority, ResultFact, hookimpl
from cco_sidecar_plugins.context._first_files import project_type


class ReferenceRules(cco_sidecar.ReferenceRules):
    """The built-in rules; every third failure in a row of a coder is the architect's, and manifests say what a project
    is.
    """

    def project_type(self, root: Path, names: tuple[str, ...]) -> str:
        return project_type(root, names)

    @hookimpl(tryfirst=True)
    def next_agents(
        self, result: ResultFact, proposals: list[NextAgent], history: list[ResultFact], language: str
    ) -> list[NextAgent]:
        """By PROPOSALS, without the types that are settled (``settled_types``)."""
        facts = [*history, result]
        own = (fact.status for fact in reversed(facts) if fact.agent_type == result.agent_type)
        failures = len(list(itertools.takewhile(lambda status: status != "success", own)))
        if result.category == "coding" and failures and failures % 3 == 0:
            priority: Priority = "medium" if result.status == "partial" else "high"
            why = "coding-failure: the third in a row, so the design is to be reconsidered"
            # Also where the architect is settled: a design that does not work out is not settled by being made.
            return [*proposals, NextAgent("chief-architect", priority, why)]
        found, settled = super().next_agents(result, [], history, language), settled_types(facts)
        return [*proposals, *(item for item in found if item.agent_type not in settled)]


def settled_types(facts: list[ResultFact]) -> set[str]:
    """Types that have succeeded since the last code change, or were proposed since the last change or failure."""
    newest_first = range(len(facts) - 1, -1, -1)
    changes = (at for at in newest_first if facts[at].category == "coding" and facts[at].status != "failed")
    change = next(changes, -1)
    failure = next((at for at in newest_first if at <= change or facts[at].status != "success"), -1)
    passed = {fact.agent_type for fact in facts[change + 1 :] if fact.status == "success"}
    return passed.union(*(fact.proposed for fact in facts[max(0, change, failure) :]))

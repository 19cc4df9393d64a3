"""Who works next is found beside the writer thread where plugins say so, and what all of them look at is remembered."""

from __future__ import annotations

import asyncio
import functools
import time
import typing
import weakref
from collections.abc import Callable
from typing import Any

from cco_sidecar import NextAgent, Records, ResultFact, Results, hookimpl, project_type
from cco_sidecar_plugins._hooks import SafeHooks


@hookimpl
def part_class(base: type) -> type | None:
    return type("ProposingResults", (ProposingResults, base), {}) if issubclass(base, Results) else None


class ProposingResults(Results):
    """Results, of which those of an issue are stored one by one where a plugin that may block says who is next."""

    REMEMBERED = 100  # issues

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._locks: weakref.WeakValueDictionary[Any, asyncio.Lock] = weakref.WeakValueDictionary()  # of issues
        # By issue the id of its last result, and all of them: up to twice as many as are read at once.
        self._histories: dict[tuple[str, str], tuple[str, list[ResultFact]]] = {}
        self._spoken = -1, ""  # the minute of the last look at the project's language, and that

    async def language(self) -> str:
        """Looked at again in each minute."""
        if self._spoken[0] != (minute := int(time.monotonic() // 60)):
            self._spoken = minute, await self._hooks.pool.run(project_type, self._settings.root, [])
        return self._spoken[1]

    async def write(self, body: dict[str, Any], category: str, language: str) -> dict[str, Any]:
        rules, at_once = typing.cast(SafeHooks, self._hooks).concerned("next_agents", settings=self._settings)
        propose = functools.partial(self.propose, rules, body, category, language)
        job = functools.partial(self.insert, body, category, propose)
        stored: dict[str, Any] = await self._storage.write(job, answers=True) if at_once else {}
        issue = body["project_id"], body["issue_id"]
        while not stored:  # again where another result of the issue came meanwhile
            async with self._locks.setdefault(issue, asyncio.Lock()):
                newest = self._storage.read.newest_result(*issue)
                proposals = await self._hooks.pool.run(propose, super().history(self._storage.read, *issue))
                job = functools.partial(self._insert_after, newest, body, category, proposals)
                stored = await self._storage.write(job, answers=True)
        return stored

    def _insert_after(
        self, newest: str, body: dict[str, Any], category: str, proposals: list[NextAgent], records: Records
    ) -> dict[str, Any]:
        """A job: store the result with these proposals; {} where the issue's newest result is no longer this one."""
        if newest != records.newest_result(body["project_id"], body["issue_id"]):
            return {}
        return self.insert(body, category, lambda history: proposals, records)

    def insert(
        self,
        body: dict[str, Any],
        category: str,
        propose: Callable[[list[ResultFact]], list[NextAgent]],
        records: Records,
    ) -> dict[str, Any]:
        answer = super().insert(body, category, propose, records)
        issue, proposed = (body["project_id"], body["issue_id"]), [each.agent_type for each in answer["next_agents"]]
        fact = ResultFact(body["agent_type"], category, body["result"]["status"], proposed)
        self._histories[issue] = answer["id"], [*self._histories[issue][1], fact]
        return answer

    def history(self, records: Records, project: str, issue: str) -> list[ResultFact]:
        """Remembered, by the writer thread, as long as the last result is what the database has."""
        newest, facts = self._histories.pop((project, issue), ("", []))
        if newest != records.newest_result(project, issue) or len(facts) >= 2 * self.HISTORY:
            newest, facts = "", super().history(records, project, issue)
        if len(self._histories) >= self.REMEMBERED:
            del self._histories[next(iter(self._histories))]
        self._histories[project, issue] = newest, facts
        return facts

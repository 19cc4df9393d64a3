"""Who works next is found beside the writer thread where plugins say so. What rules look at is remembered, and has the
last result of a coder, however many others followed.
"""

from __future__ import annotations

import asyncio
import functools
import typing
import weakref
from typing import Any

import msgspec

from cco_sidecar import Implementation, Records, ResultFact, Results, hookimpl
from cco_sidecar_plugins._hooks import SafeHooks
from cco_sidecar_plugins._turns import Shared
from cco_sidecar_plugins.context._first_files import project_type


@hookimpl
def part_class(base: type) -> type | None:
    return type("ProposingResults", (ProposingResults, base), {}) if issubclass(base, Results) else None


class ProposingResults(Results):
    """Results, of which those of an issue are stored one by one where a plugin that may block says who is next."""

    REMEMBERED = 100  # issues
    SHORT = 8 * 1024  # bytes of a result that is searched for secrets at once, which takes less than a thread's start

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._locks: weakref.WeakValueDictionary[Any, asyncio.Lock] = weakref.WeakValueDictionary()  # of issues
        # By issue the id of its last result, and all of them: up to twice as many as are read at once.
        self._histories: dict[tuple[str, str], tuple[str, list[ResultFact]]] = {}
        self._asked: tuple[list[Implementation], bool] | None = None  # in this turn of the loop
        self._language = Shared[str](60)  # of the project

    def start(self) -> None:
        """The project's language is looked at where it is asked for."""

    async def prepared(self, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """A short body is searched at once, and the language is looked at again each minute, once for all results."""
        look = functools.partial(self._pool.run, project_type, self._settings.root, [])
        language = await self._language.get(look)
        redact_json = self._redaction.redact_json
        short = len(msgspec.json.encode(body)) < self.SHORT
        redacted, _ = redact_json(body) if short else await self._pool.run(redact_json, body)
        return redacted, language

    async def write(self, facts: dict[str, Any]) -> dict[str, Any]:
        rules, at_once = self._rules()
        job = functools.partial(self.insert, rules, facts)
        stored: dict[str, Any] = await self._storage.write(job, answers=True) if at_once else {}
        issue = facts["submission"]["project_id"], facts["submission"]["issue_id"]
        while not stored:  # again where another result of the issue came meanwhile
            async with self._locks.setdefault(issue, asyncio.Lock()):
                newest, history = self._storage.read.newest_result(*issue), self._look(self._storage.read, *issue)
                proposals = await self._hooks.pool.run(self.propose, rules, facts | {"history": history})
                job = functools.partial(self._insert_after, issue, newest, facts | {"proposals": proposals})
                stored = await self._storage.write(job, answers=True)
        return stored

    def _rules(self) -> tuple[list[Implementation], bool]:
        """Those that are asked, and whether all are built in: looked at once for the results that are stored in a turn
        of the loop, all of which had come before.
        """
        if self._asked is None:
            self._asked = typing.cast(SafeHooks, self._hooks).concerned("next_agents", settings=self._settings)
            asyncio.get_running_loop().call_soon(setattr, self, "_asked", None)
        return self._asked

    def _insert_after(
        self, issue: tuple[str, str], newest: str, facts: dict[str, Any], records: Records
    ) -> dict[str, Any]:
        """A job: store the result, nobody being asked; {} where the issue's newest result is no longer this one."""
        return self.insert([], facts, records) if newest == records.newest_result(*issue) else {}

    def insert(self, rules: list[Implementation], facts: dict[str, Any], records: Records) -> dict[str, Any]:
        answer = super().insert(rules, facts, records)
        issue = facts["submission"]["project_id"], facts["submission"]["issue_id"]
        fact = msgspec.structs.replace(facts["result"], proposed=[each.agent_type for each in answer["next_agents"]])
        self._histories[issue] = answer["id"], [*self._histories[issue][1], fact]
        return answer

    def history(self, records: Records, project: str, issue: str) -> list[ResultFact]:
        """Remembered, by the writer thread, as long as the last result is what the database has."""
        newest, facts = self._histories.pop((project, issue), ("", []))
        if newest != records.newest_result(project, issue) or len(facts) >= 2 * self.HISTORY:
            newest, facts = "", self._look(records, project, issue)
        if len(self._histories) >= self.REMEMBERED:
            del self._histories[next(iter(self._histories))]
        self._histories[project, issue] = newest, facts
        return facts

    def _look(self, records: Records, project: str, issue: str) -> list[ResultFact]:
        """The issue's newest results; where no coder is among them the last one of a coder comes before them."""
        facts = super().history(records, project, issue)
        if len(facts) == self.HISTORY and not any(fact.category == "coding" for fact in facts):
            for kind, status, proposed in records.rows(LAST_OF_A_CODER, project, issue):
                facts.insert(0, ResultFact(kind, "coding", status, msgspec.json.decode(proposed)))
        return facts


LAST_OF_A_CODER = (
    "select agent_type, status, proposed from result"
    " where project = ? and issue = ? and category = 'coding' order by seq desc limit 1"
)

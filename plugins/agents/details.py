"""What answers about agents say beyond the reference: task, parent, result, last call and output, measured use.

The end of an agent also waits for what it had sent before.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Coroutine, Iterator
from typing import Any

from cco_sidecar import (
    Agents,
    ApiError,
    Endpoint,
    Running,
    StoreResult,
    hookimpl,
    iso,
    one_line,
    redact,
    without_tokens,
)
from cco_sidecar_plugins.agents._evidence import fact
from cco_sidecar_plugins.agents.keeper import output_of
from cco_sidecar_plugins.results._latest import latest_result

LIVE = "cpu memory peak_memory processes measured last_call".split()  # in memory alone while an agent runs


@hookimpl
def part_class(base: type) -> type | None:
    if issubclass(base, Endpoint):
        return type("NotingEndpoint", (NotingEndpoint, base), {})
    return type("DetailedAgents", (DetailedAgents, base), {}) if issubclass(base, Agents) else None


class NotingEndpoint(Endpoint):
    """Notes which agent called last for what, and that its end waits for what it stores."""

    async def prepare(self) -> None:
        await super().prepare()
        if not self.aside:
            heard_from(self.sidecar.agents, self.claims.sub, str(self.request.method), self.request.path)

    def error_content(self, error: ApiError) -> bytes:
        if isinstance(self, StoreResult):
            note_refusal(self.sidecar.agents, self.claims.sub, error)
        return super().error_content(error)

    def work(self, path: tuple[str, ...]) -> Coroutine[Any, Any, Any]:
        if not isinstance(self, StoreResult):
            return super().work(path)
        self.sidecar.agents.tokens.check_revoked(self.claims.sub)  # a long body is read for a while
        return self._heard_out(path) if self.claims.sub in self.sidecar.agents.active else super().work(path)

    async def _heard_out(self, path: tuple[str, ...]) -> Any:
        with heard_out(self.sidecar.agents, self.claims.sub):
            answer = await super().work(path)
        note_refusal(self.sidecar.agents, self.claims.sub, None)
        return answer


def heard_from(agents: Agents, subject: str, method: str, path: str) -> None:
    """An agent's token was used."""
    if running := agents.active.get(subject):
        running.row["last_call"] = (method, without_tokens(path)[:200], time.time())


def note_refusal(agents: Agents, subject: str, error: ApiError | None) -> None:
    """Why an agent's last result was refused; None for one that was stored. Written down: its end may be another
    service's to judge.
    """
    running, refused = agents.active.get(subject), error and one_line(error)
    if running and running.row.get("refused") != refused:
        running.row["refused"] = refused
        agents.storage.write_behind(lambda records: records.add_outcome(subject, refused=refused))


CALLS: weakref.WeakKeyDictionary[Running, int] = weakref.WeakKeyDictionary()  # requests that an agent's end waits for


@contextlib.contextmanager
def heard_out(agents: Agents, subject: str) -> Iterator[None]:
    """Answer an agent's request in this context: its end waits. Raises AUTH_001 after the end."""
    agents.tokens.check_revoked(subject)
    running = agents.active.get(subject)
    if running is None:  # no agent of ours
        yield
        return
    CALLS[running] = CALLS.get(running, 0) + 1
    try:
        yield
    finally:
        CALLS[running] -= 1


class DetailedAgents(Agents):
    """Adds to the core's answers; what is measured of running agents is written down at their end."""

    def find(self, project: str, agent_id: str) -> dict[str, Any]:
        return self.whole(super().find(project, agent_id))

    def whole(self, row: dict[str, Any]) -> dict[str, Any]:
        """An agent's row with what is known beside it at this moment: what is measured, its latest result. Called on
        the loop.
        """
        running = self.active.get(row["id"])
        live = {name: running.row.get(name) for name in LIVE} if running else {}
        if running and running.row.get("unrecorded") and not row["ended"]:
            code = running.row["exit_code"]
            how = running.row["state"] + (f", exit code {code}" if code is not None else "")
            live["reason"] = f"it has ended ({how}), and the storage does not take that; see /health"
        return row | live | latest_result(self.storage.read, row["project"], row["id"])

    def describe(self, row: dict[str, Any]) -> dict[str, Any]:
        """By a whole row, with the last lines of its output."""
        call, output = None, output_of(self, row["id"])
        if last_call := fact(row, "last_call"):
            method, path, moment = last_call
            call = {"method": method, "path": path, "at": iso(moment), "age_seconds": age(moment)}
        written = output.last_written()
        return super().describe(row) | {
            "result_id": row["result_id"], "output_tail": output.tail(20),
            "task": redact(row["task"])[0], "parent": row["parent"], "result_status": row["result_status"],
            "depth": row["depth"] or 1, "state_age_seconds": age(row["ended"] or row["started"]),
            "run_seconds": round(max(0.0, (row["ended"] or time.time()) - row["started"]), 3),
            "usage": None if row.get("measured") is None else usage(row), "last_call": call,
            "last_output_at": written and iso(written), "last_output_age_seconds": written and age(written),
        }  # fmt: skip

    def last_word(self, row: dict[str, Any]) -> dict[str, Any]:
        result = latest_result(self.storage.read, row["project"], row["id"])["result_id"]
        cpu = None if row.get("cpu") is None else round(row["cpu"], 3)
        return super().last_word(row) | {
            "result_id": result, "output_tail": row["output_tail"], "cpu_seconds": cpu,
            "peak_memory_bytes": row.get("peak_memory"),
        }  # fmt: skip

    async def _record(self, running: Running) -> None:
        try:
            await super()._record(running)
        except Exception:  # the core tries again: until then only this process knows of the end
            running.row["unrecorded"] = True
            raise

    async def judge(self, running: Running) -> None:
        while CALLS.get(running):  # what the agent had sent before its end
            await asyncio.sleep(0.01)
        await super().judge(running)
        row = running.row
        tail = await self.disk.run(lambda: output_of(self, row["id"]).tail(5))
        row["output_tail"] = [line[:300] for line in tail]
        facts = {name: row.get(name) for name in LIVE}
        self.storage.write_behind(lambda records: records.add_outcome(row["id"], **facts))


def usage(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "cpu_seconds": round(row.get("cpu") or 0.0, 3), "memory_bytes": row.get("memory") or 0,
        "peak_memory_bytes": row.get("peak_memory") or 0, "processes": row.get("processes") or 0,
        "measured_at": iso(row["measured"]), "age_seconds": age(row["measured"]),
    }  # fmt: skip


def age(moment: float) -> float:
    return round(max(0.0, time.time() - moment), 3)

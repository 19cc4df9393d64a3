"""An hour of a team's traffic in ten minutes: does memory stay flat, and does everything succeed?

Of 119 agents each does a round a minute of that hour: context, wait, result, event. Meanwhile files are edited, agents
are spawned, polls hang up, and requests come that have to be refused.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from statistics import median

from tests.benchmarks import Row, percentile, row
from tests.benchmarks.agents import TYPES
from tests.benchmarks.context import edit
from tests.benchmarks.servers import EVENT, Sidecar, running_sidecar
from tests.benchmarks.throughput import RESULT
from tests.benchmarks.trees import make_tree
from tests.benchmarks.wire import close, connect, request_bytes, run

HOUR = 3600
TEAM = [name for name, category in TYPES.items() if category not in ("documentation", "support")]
SPAWNED = ["/bin/sh", "-c", "echo at work; sleep 0.5; echo done"]


def rows(quick: bool) -> Iterator[Row]:
    yield from soak(20 if quick else 600)


def soak(seconds: float) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = make_tree(folder / "repository", 500)
        command = ["--agent-command", json.dumps(SPAWNED), "--max-agents-per-issue", "100000"]
        command += ["--cache-size-mb", "16"]  # full long before the middle
        with running_sidecar(folder, *command, root=root) as sidecar:
            sidecar.held()
            traffic = Traffic(sidecar, root, seconds)
            run(traffic.run(), seconds + 120)
            late = sidecar.held(end=True)
    memory = traffic.memory
    middle, end = (median(memory[int(len(memory) * share) :][: max(1, len(memory) // 10)]) for share in (0.5, 0.9))
    title = f"an hour in {seconds:,.0f} s"
    yield row(f"{title}: memory's growth in the second half", [100 * (end / middle - 1)], unit="%", goal="value <= 5")
    yield row(f"{title}: memory", [value / 1e6 for value in memory], unit="MB")
    share = 100 * traffic.good / traffic.asked
    yield row(f"{title}: {traffic.asked:,} requests answered as they should", [share], unit="%", goal="value >= 100",
              held=late)  # fmt: skip
    for step, times in traffic.times.items():
        yield row(f"{title}: {step}, p99", [1000 * percentile(times, 0.99)], unit="ms")


class Traffic:
    """What a team does in an hour, in ``seconds``."""

    def __init__(self, sidecar: Sidecar, root: Path, seconds: float) -> None:
        self._sidecar, self._files = sidecar, sorted(root.rglob("*.py"))
        self._seconds, self._end = seconds, 0.0
        self.memory: list[int] = []
        self.times: dict[str, list[float]] = {}
        self.asked = self.good = 0

    async def run(self) -> None:
        began = time.perf_counter()
        self._end = began + self._seconds
        minute = 60 * self._seconds / HOUR
        agents = [self.every(minute, self.agent(name), minute * place / len(TEAM)) for place, name in enumerate(TEAM)]
        others = {self.look: 1, self.edited: 10, self.spawn: 60, self.hang_up: 30, self.refused: 5}
        await asyncio.gather(
            *agents, *(self.every(pause * self._seconds / HOUR, work) for work, pause in others.items())
        )

    async def every(self, pause: float, work: Callable[[int], Awaitable[None]], first: float = 0.0) -> None:
        """Do ``work`` with its number each ``pause`` seconds until the end; a time that is missed is left out."""
        due = time.perf_counter() + first
        for number in itertools.count():
            due = max(due, time.perf_counter())
            if due >= self._end:
                return
            await asyncio.sleep(due - time.perf_counter())
            await work(number)
            due += pause

    async def ask(self, step: str, content: bytes, *expected: int) -> None:
        (wire,) = await connect(self._sidecar.port, 1)
        began = time.perf_counter()
        status, _ = await wire.ask(content)
        self.times.setdefault(step, []).append(time.perf_counter() - began)
        self.asked, self.good = self.asked + 1, self.good + (status in expected)
        close([wire])

    def agent(self, name: str) -> Callable[[int], Awaitable[None]]:
        async def work(number: int) -> None:
            """A round of one agent; the team works on twenty issues, each for some minutes."""
            token, issue = self._sidecar.token(f"soak-{name}", name), f"issue-{number // 3 % 20}"
            own = {"agent_type": name, "agent_id": f"soak-{name}", "issue_id": issue}
            path = f"/api/context/{issue}/{name}?task=Handle+the+session+of+{issue}&max_bytes=100000"
            await self.ask("context", request_bytes("GET", path, token), 200)
            path = "/api/events/wait/progress?since=latest&timeout=500"
            await self.ask("wait", request_bytes("GET", path, token), 200)
            await self.ask("result", request_bytes("POST", "/api/results", token, RESULT | own), 201)
            await self.ask("event", request_bytes("POST", "/api/events/progress", token, EVENT), 202)

        return work

    async def look(self, number: int) -> None:
        """What a page of the dashboard asks for; memory is noted with it."""
        self.memory.append(self._sidecar.memory())
        for path in ("/health", "/status", "/api/results?limit=20", "/api/events?limit=20"):
            await self.ask(path.partition("?")[0], request_bytes("GET", path, self._sidecar.token()), 200)

    async def edited(self, number: int) -> None:
        await asyncio.to_thread(edit, self._files[number * 7919 % len(self._files)], number)

    async def spawn(self, number: int) -> None:
        body = {"agent_type": "python-specialist", "issue_id": f"issue-{number % 20}", "task": "soak"}
        await self.ask("spawn", request_bytes("POST", "/api/agents/spawn", self._sidecar.token(), body), 201)

    async def hang_up(self, number: int) -> None:
        """Ten polls that are given up, and ten whose answer nobody reads to its end."""
        wires = await connect(self._sidecar.port, 20)
        token = self._sidecar.token()
        for place, wire in enumerate(wires):
            path = "/api/events/wait/never?timeout=60000" if place % 2 else "/api/results?limit=1000"
            wire.transport.write(request_bytes("GET", path, token))  # type: ignore[attr-defined]
        await asyncio.sleep(0.2)
        for wire in wires:
            wire.transport.abort()  # type: ignore[attr-defined]

    async def refused(self, number: int) -> None:
        """A request that is refused, of six kinds in turn."""
        token = self._sidecar.token()
        nobody = self._sidecar.token(f"documentation-{number}", "technical-writer")
        table: list[tuple[bytes, int]] = [
            (request_bytes("GET", "/status", "no token"), 401),
            (request_bytes("GET", f"/nowhere/{number}", token), 404),
            (request_bytes("PUT", "/api/results", token), 405),
            (request_bytes("POST", "/api/results", token, {"agent_id": number}), 400),
            (request_bytes("POST", "/api/results", nobody, RESULT), 403),
            (request_bytes("GET", f"/api/context/issue-1/nobody-{number}", token), 404),
        ]
        content, status = table[number % len(table)]
        await self.ask("what is refused", content, status)

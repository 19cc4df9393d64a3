"""A team of agents of all types at once: as clients that each take a context, wait, store a result and publish an
event, and as processes that the service spawns.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from cco_sidecar import CATEGORIES, PUBLISH, WRITE, import_file
from tests.benchmarks import Row, percentile, row
from tests.benchmarks.events import parked
from tests.benchmarks.servers import EVENT, ROOT, Sidecar, running_sidecar
from tests.benchmarks.throughput import RESULT
from tests.benchmarks.trees import make_tree
from tests.benchmarks.wire import Wire, close, connect, request_bytes, run

TYPES = import_file(ROOT / "plugins/agents/_agent_types.py").BUILT_IN


def rows(quick: bool) -> Iterator[Row]:
    yield from clients(1 if quick else 5)
    yield from processes(10 if quick else 119)


class Agent(NamedTuple):
    """One agent as a client: its type, its token and its connection."""

    agent_type: str
    token: str
    wire: Wire

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[float, bool]:
        """(seconds, whether the answer was a success) of one request."""
        began = time.perf_counter()
        status, _ = await self.wire.ask(request_bytes(method, path, self.token, body))
        return time.perf_counter() - began, status in (200, 201, 202)


def clients(rounds: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        root = make_tree(Path(name) / "repository", 500)
        with running_sidecar(Path(name), root=root) as sidecar:
            wait_for_index(sidecar)
            sidecar.held()
            found = [run(team(sidecar, number)) for number in range(rounds)]
            late = sidecar.held(end=True)
    asks = [ask for steps in found for step in steps.values() for ask in step]
    share = 100 * sum(good for _, good in asks) / len(asks)
    title = f"{len(TYPES)} agents of all types at once"
    yield row(f"{title}: requests that succeed", [share], unit="%", goal="value >= 100", held=late)
    for step, bound in (("context", 100), ("the same context again", 100), ("result", None), ("event", 50)):
        p99 = [1000 * percentile([seconds for seconds, _ in steps[step]], 0.99) for steps in found]
        yield row(f"{title}: {step}, p99", p99, unit="ms", goal=f"value <= {bound}" if bound else "")


def wait_for_index(sidecar: Sidecar) -> None:
    while sidecar.get("/api/context/issue/chief-architect?max_files=1")["context"]["metadata"]["index"] != "ready":
        time.sleep(0.05)


async def team(sidecar: Sidecar, number: int) -> dict[str, list[tuple[float, bool]]]:
    """(seconds, success) of each agent's requests by step; all agents take each step at once."""
    wires = await connect(sidecar.port, len(TYPES))
    agents = [
        Agent(agent_type, sidecar.token(f"{agent_type}-{number}", agent_type), wire)
        for agent_type, wire in zip(TYPES, wires, strict=True)
    ]
    issue, found = f"issue-{number}", {}

    async def step(method: str, path: str, body: Any = None, permission: str = "") -> list[tuple[float, bool]]:
        """Every agent's request at once, of those whose type has the permission."""
        asked = []
        for agent in agents:
            own = {"agent_type": agent.agent_type, "agent_id": f"{agent.agent_type}-{number}"}
            mine = body and {name: own.get(name, value) for name, value in body.items()}
            if not permission or permission in CATEGORIES[TYPES[agent.agent_type]].permissions:
                asked.append(agent.ask(method, path.format(agent.agent_type), mine))
        return await asyncio.gather(*asked)

    context = f"/api/context/{issue}/{{}}?task=Handle+the+session+of+round+{number}&max_bytes=100000"
    found["context"] = await step("GET", context)
    found["the same context again"] = await step("GET", context)
    waiting = asyncio.ensure_future(step("GET", "/api/events/wait/go?since=latest&timeout=60000"))
    await parked(sidecar, len(agents))
    (publisher,) = await connect(sidecar.port, 1)
    await publisher.ask(sidecar.post("go"))
    found["wait"] = await waiting
    found["result"] = await step("POST", "/api/results", RESULT | {"issue_id": issue}, WRITE)
    found["event"] = await step("POST", "/api/events/progress", EVENT, PUBLISH)
    close([*wires, publisher])
    return found


# Waits for a file, then stores a result with curl: what is measured is the service. It ends with its folder.
SCRIPT = """while [ ! -e "$GATE/go" ]; do [ -d "$GATE" ] || exit; sleep 0.2; done
result='{"agent_id": "'$AGENT_ID'", "agent_type": "'$AGENT_TYPE'", "issue_id": "'$ISSUE_ID'", "project_id": "'$PROJECT_ID'",'
curl -sS --fail "$SIDECAR_URL/results" -H @"$CCO_HEADER_FILE" -H "Content-Type: application/json" -d "$result"' "result": {"status": "success"}}'
"""


def processes(number: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder, command = Path(name), json.dumps(["/bin/sh", "-c", SCRIPT])
        (folder / "gate").mkdir()
        root = make_tree(folder / "repository", 500)
        with running_sidecar(folder, "--agent-command", command, "--max-agents", "200", root=root) as sidecar:
            wait_for_index(sidecar)
            try:
                yield from run(spawned(sidecar, number, folder / "gate"))
            finally:
                (folder / "gate").rename(folder / "no gate")


async def spawned(sidecar: Sidecar, number: int, gate: Path) -> list[Row]:
    (wire,) = await connect(sidecar.port, 1)
    empty = sidecar.memory()
    sidecar.held()
    seconds = await spawn_all(wire, sidecar, number, gate)
    assert (await ask(wire, "GET", "/status", sidecar))["agents"]["active"] == number
    full, keeper = sidecar.memory(), keeper_of(sidecar).memory_full_info()
    late = sidecar.held(end=True)
    before, now = sidecar.processor_seconds(), time.perf_counter()
    await asyncio.sleep(5)  # nothing happens but the service's own watching
    idle = (sidecar.processor_seconds() - before) / (time.perf_counter() - now)
    (gate / "go").touch()
    began, _ = time.perf_counter(), sidecar.held()
    while (await ask(wire, "GET", "/status", sidecar))["agents"]["active"]:
        await asyncio.sleep(0.1)
    took = time.perf_counter() - began
    late += sidecar.held(end=True)
    listed = (await ask(wire, "GET", "/api/agents?limit=1000", sidecar))["agents"]
    good = sum(bool(agent["result_id"]) for agent in listed)
    close([wire])
    title, unit = f"{number} spawned agents", "ms"
    return [
        row(f"{title} that succeed", [100 * good / number], unit="%", goal="value >= 100", held=late),
        row(f"{title}: a spawn, p50", [statistics.median(seconds) * 1000], unit=unit),
        row(f"{title}: a spawn, p99", [percentile(seconds, 0.99) * 1000], unit=unit),
        row(f"{title}: all store, end and are recorded", [took], unit="s"),
        row(f"{title}: what the service grows by", [(full - empty) / 1e6], unit="MB"),
        row(f"{title}: the one keeper, resident", [keeper.rss / 1e6], unit="MB"),
        row(f"{title}: one core's share for watching all", [idle * 100], unit="%"),
    ]


async def ask(wire: Wire, method: str, path: str, sidecar: Sidecar, body: dict[str, Any] | None = None) -> Any:
    status, content = await wire.ask(request_bytes(method, path, sidecar.token(), body))
    assert status in (200, 201), content
    return json.loads(content)


async def spawn_all(wire: Wire, sidecar: Sidecar, number: int, gate: Path) -> list[float]:
    """Seconds of each spawn, from the request to its answer, one after another."""
    seconds = []
    for index in range(number):
        body = {"agent_type": "python-specialist", "issue_id": f"issue-{index}", "task": "bench"}
        began = time.perf_counter()
        await ask(wire, "POST", "/api/agents/spawn", sidecar, body | {"environment": {"GATE": str(gate)}})
        seconds.append(time.perf_counter() - began)
    return seconds


def keeper_of(sidecar: Sidecar) -> psutil.Process:
    (keeper,) = (
        child for child in psutil.Process(sidecar.process.pid).children() if "keeper" in " ".join(child.cmdline())
    )
    return keeper

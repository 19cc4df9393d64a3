"""Many agents at once: they are spawned, wait for each other, store a result and end; how fast, and what it costs.

    python -m tests.benchmarks.agents [--agents 119]

The agents are shell scripts that wait for a file, then store a result with curl, so that what is measured is the
service.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.servers import Sidecar, running_sidecar
from tests.benchmarks.wire import close, connect, request_bytes

SCRIPT = """while [ ! -e "$GATE" ]; do sleep 0.2; done
result='{"agent_id": "'$AGENT_ID'", "agent_type": "'$AGENT_TYPE'", "issue_id": "'$ISSUE_ID'", "project_id": "'$PROJECT_ID'",'
curl -sS --fail "$SIDECAR_URL/results" -H @"$CCO_HEADER_FILE" -H "Content-Type: application/json" -d "$result"' "result": {"status": "success"}}'
"""


async def ask(wire: Any, method: str, path: str, sidecar: Sidecar, body: dict[str, Any] | None = None) -> Any:
    status, content = await wire.ask(request_bytes(method, path, sidecar.token(), body))
    assert status in (200, 201), content
    return json.loads(content)


async def spawn_all(wire: Any, sidecar: Sidecar, number: int, gate: Path) -> list[float]:
    """Seconds of each spawn, from the request to its answer, one after another."""
    seconds = []
    for index in range(number):
        body = {
            "agent_type": "python-specialist",
            "issue_id": f"issue-{index}",
            "task": "bench",
            "environment": {"GATE": str(gate)},
        }
        began = time.perf_counter()
        await ask(wire, "POST", "/api/agents/spawn", sidecar, body)
        seconds.append(time.perf_counter() - began)
    return seconds


def keeper_of(sidecar: Sidecar) -> psutil.Process:
    (keeper,) = (
        child for child in psutil.Process(sidecar.process.pid).children() if "keeper" in " ".join(child.cmdline())
    )
    return keeper


async def measure(number: int) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as name:
        folder, command = Path(name), json.dumps(["/bin/sh", "-c", SCRIPT])
        with running_sidecar(folder, "--agent-command", command, "--max-agents", "200", plugins=True) as sidecar:
            (wire,) = await connect(sidecar.port, 1)
            empty = sidecar.memory()
            seconds = await spawn_all(wire, sidecar, number, folder / "gate")
            assert (await ask(wire, "GET", "/status", sidecar))["agents"]["active"] == number
            full, keeper = sidecar.memory(), keeper_of(sidecar).memory_full_info()
            before, now = sum(psutil.Process(sidecar.process.pid).cpu_times()[:2]), time.perf_counter()
            await asyncio.sleep(5)  # nothing happens but the service's own watching
            idle = (sum(psutil.Process(sidecar.process.pid).cpu_times()[:2]) - before) / (time.perf_counter() - now)
            (folder / "gate").touch()
            began = time.perf_counter()
            while (agents := (await ask(wire, "GET", "/status", sidecar))["agents"])["active"]:
                await asyncio.sleep(0.1)
            took = time.perf_counter() - began
            listed = (await ask(wire, "GET", "/api/agents?limit=1000", sidecar))["agents"]
            assert agents["completed"] == number and all(agent["result_id"] for agent in listed), agents
            close([wire])
    ranked = sorted(seconds)
    return {
        "agents at once, all of which succeeded": str(number),
        "spawn, p50": f"{statistics.median(seconds) * 1000:.0f} ms",
        "spawn, p99": f"{ranked[int(len(ranked) * 0.99)] * 1000:.0f} ms",
        "from the signal to go until all had stored, ended and were recorded": f"{took:.1f} s",
        "memory of the service, before and with all": f"{empty / 1e6:.0f} MB, {full / 1e6:.0f} MB",
        "memory of the one keeper, resident and its own alone": f"{keeper.rss / 1e6:.0f} MB, {keeper.uss / 1e6:.0f} MB",
        "one core's share for watching all": f"{idle * 100:.1f} %",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=119)
    for name, figure in asyncio.run(measure(parser.parse_args(sys.argv[1:]).agents)).items():
        print(f"{name:70}{figure:>20}")


if __name__ == "__main__":
    main()

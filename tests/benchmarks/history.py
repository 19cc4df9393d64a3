"""What is read and written costs the same on a long history as on a short one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks import Row, row
from tests.benchmarks.servers import EVENT, Sidecar, running_sidecar
from tests.benchmarks.wire import close, connect, request_bytes, run

SHORT = 1000
MEASURED_FOR = 0.3  # seconds: until then /health tells what it has measured, which no history makes longer


def rows(quick: bool) -> Iterator[Row]:
    yield from big_log(20_000 if quick else 1_000_000, 1 if quick else 3)
    yield from long_history(5_000 if quick else 100_000, 20 if quick else 200)


def big_log(number: int, rounds: int) -> Iterator[Row]:
    """Starts and reads on a log of ``number`` events, and what a read that no index helps does to others."""
    with tempfile.TemporaryDirectory() as name:
        folders = {size: Path(name) / str(size) for size in (SHORT, number)}
        for size, folder in folders.items():
            folder.mkdir()
            with running_sidecar(folder):
                pass
            fill_log(folder / "storage", size)
        stored = (folders[number] / "storage/sidecar.db").stat().st_size
        starts: dict[int, list[float]] = {size: [] for size in folders}
        found: dict[int, dict[str, list[float]]] = {size: {} for size in folders}
        for _ in range(rounds):
            for size, folder in folders.items():
                began = time.perf_counter()
                with running_sidecar(folder) as sidecar:
                    starts[size].append((time.perf_counter() - began) * 1000)
                    for place, seconds in run(read_times(sidecar, size)).items():
                        found[size].setdefault(place, []).append(seconds * 1000)
        with running_sidecar(folders[number]) as sidecar:
            sidecar.held()
            scan, worst = run(worst_health_during_scan(sidecar))
            late = sidecar.held(end=True)
    beside = f"{SHORT:,} events"
    log = f"of {number:,} events"
    yield row(f"start on a log {log}", starts[number], starts[SHORT], unit="ms", goal="ratio <= 1.5", limit_is=beside)
    for place, times in found[number].items():
        yield row(f"a read {place} {log}", times, found[SHORT][place], unit="ms", goal="ratio <= 1.5", limit_is=beside)
    yield row(f"a read {log} that no index helps", [scan * 1000], unit="ms", held=late)
    yield row("the slowest /health meanwhile", [worst * 1000], unit="ms")
    yield row("storage an event", [stored / number], unit="bytes")


def long_history(number: int, asks: int) -> Iterator[Row]:
    """What is asked often, on a long history and on a short one."""
    with contextlib.ExitStack() as open_now:
        running = []
        for size in (SHORT, number):
            folder = Path(open_now.enter_context(tempfile.TemporaryDirectory()))
            with running_sidecar(folder):
                pass
            fill_history(folder / "storage", size)
            running.append(open_now.enter_context(running_sidecar(folder)))
        found = run(history_times(running, asks))
    for name, (short, long) in found.items():
        yield row(f"{name}, {number:,} events and results", [long * 1000], [short * 1000], unit="ms",
                  goal="ratio <= 1.3", limit_is=f"{SHORT:,}")  # fmt: skip


def fill_log(storage: Path, number: int) -> None:
    """Put ``number`` events into a stopped service's log, as the service itself writes them."""
    body = json.dumps(
        {
            "event_type": "bench",
            "publisher": "bench",
            "topic": "bench",
            "data": {"issue_id": "issue-1", "status": "success"},
            "timestamp": "2026-01-01T00:00:00Z",
            "correlation_id": None,
            "priority": "normal",
            "ttl_seconds": 86400,
        }
    ).encode()
    rare = body.replace(b"issue-1", b"issue-rare")
    now = time.time()
    common_row, rare_row = ("issue-1", now, now + 86_000, body), ("issue-rare", now, now + 86_000, rare)
    database = sqlite3.connect(storage / "sidecar.db")
    with database:
        database.executemany(
            "insert into event (project, type, topic, issue, created, expires, delivered, body) values ('bench', 'bench', 'bench', ?, ?, ?, 1, ?)",
            (rare_row if index % (number // 5) == 7 else common_row for index in range(number)),
        )
    database.execute("pragma wal_checkpoint(truncate)")
    database.close()


async def read_times(server: Sidecar, number: int) -> dict[str, float]:
    """Median seconds of reads at the places of the log where they could be slow."""
    wire = (await connect(server.port, 1))[0]
    first = json.loads((await wire.ask(server.wait("bench", "since=earliest&timeout=0&limit=1")))[1])["events"][0]
    epoch = first["event_id"].split("-")[1]
    near_end = f"evt-{epoch}-{number - 20:012d}"
    reads = {
        "near the end": f"since={near_end}&timeout=0",
        "near the floor": "since=earliest&timeout=0&limit=20",
        "a filter that matches little": "since=earliest&timeout=0&filter=issue_id:issue-rare",
    }
    found = {}
    for name, query in reads.items():
        times = []
        for _ in range(30):
            began = time.perf_counter()
            status, _ = await wire.ask(server.wait("bench", query))
            assert status == 200
            times.append(time.perf_counter() - began)
        found[name] = statistics.median(times)
    close([wire])
    return found


async def worst_health_during_scan(server: Sidecar) -> tuple[float, float]:
    """(seconds of a read whose filter no index helps, the slowest /health meanwhile)."""
    scanner, prober = await connect(server.port, 2)
    began = time.perf_counter()
    scan = scanner.send(server.wait("bench", "since=earliest&timeout=0&filter=status:never"))
    worst = 0.0
    health = request_bytes("GET", "/health")
    while not scan.done():
        start = time.perf_counter()
        await prober.ask(health)
        worst = max(worst, time.perf_counter() - start)
    close([scanner, prober])
    return time.perf_counter() - began, worst


def fill_history(storage: Path, number: int) -> None:
    """Put ``number`` undelivered events and ``number`` results on one issue into a stopped service's storage."""
    now = time.time()
    body = json.dumps(
        EVENT | {"event_type": "bench", "timestamp": "2026-01-01T00:00:00Z", "priority": "normal"}
    ).encode()
    output = json.dumps({"agent": "a", "agent_type": "test-engineer", "timestamp": "2026-01-01T00:00:00Z", "decision": "d",
        "rationale": "", "files_affected": [], "status": "success", "result_id": "r"})  # fmt: skip
    with contextlib.closing(sqlite3.connect(storage / "sidecar.db")) as database, database:
        database.executemany(
            "insert into event (project, type, topic, issue, created, expires, body) values ('bench', 'bench', 'bench', 'issue-1', ?, ?, ?)",
            ((now, now + 86_000, body) for _ in range(number)),
        )
        database.executemany(
            "insert into result (id, project, issue, agent_type, agent_id, category, status, stored, proposed, output, body)"
            " values (?, 'bench', 'issue-1', 'test-engineer', 'a', 'qa', 'success', ?, '[]', ?, ?)",
            ((f"result-{index}", now, output, output.encode()) for index in range(number)),
        )


async def history_times(servers: list[Sidecar], rounds: int) -> dict[str, list[float]]:
    """Lower quartile of the seconds of what is asked often, of each server; they are asked in turn."""
    wires = [(await connect(server.port, 1))[0] for server in servers]
    result = {
        "agent_id": "a",
        "agent_type": "test-engineer",
        "issue_id": "issue-1",
        "project_id": "bench",
        "result": {"status": "success"},
    }
    found = {}
    for name, method, path, body in (
        ("GET /health, measured anew", "GET", "/health", None),
        ("GET /api/events", "GET", "/api/events", None),
        ("GET /api/results", "GET", "/api/results", None),
        ("GET /api/results of one type", "GET", "/api/results?agent_type=test-engineer", None),
        ("GET /api/results of a type that has none", "GET", "/api/results?agent_type=qa-engineer", None),
        ("poll for any type that finds nothing", "GET", "/api/events/wait/*?since=latest&timeout=0", None),
        ("POST result", "POST", "/api/results", result),
    ):  # fmt: skip
        times: list[list[float]] = [[] for _ in servers]
        rest = MEASURED_FOR if path == "/health" else 0
        for _ in range(rounds // 5 if rest else rounds):
            await asyncio.sleep(rest)
            for values, wire, server in zip(times, wires, servers, strict=True):
                content = request_bytes(method, path, server.token(), body)
                began = time.perf_counter()
                status, _ = await wire.ask(content)
                values.append(time.perf_counter() - began)
                assert status in (200, 201), (name, status)
        found[name] = [statistics.quantiles(values)[0] for values in times]
    close(wires)
    return found

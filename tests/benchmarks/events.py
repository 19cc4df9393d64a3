"""How fast the event bus is, beside a bare Tornado server in the same run.

    python -m tests.benchmarks.events [--rounds 5] [--log-events 1000000] [--history-only]

Everything happens on 127.0.0.1, alternates between the two servers, and is bounded. Ratios are medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.servers import EVENT, Sidecar, running_bare, running_sidecar
from tests.benchmarks.wire import close, connect, request_bytes


async def throughput(server: Any, seconds: float = 2.0, connections: int = 32) -> float:
    """Publishes a second, nobody waiting."""
    wires = await connect(server.port, connections)
    content, done, end = server.post(), 0, time.perf_counter() + seconds

    async def work(wire: Any) -> None:
        nonlocal done
        while time.perf_counter() < end:
            status, _ = await wire.ask(content)
            assert status == 202, status
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*map(work, wires))
    took = time.perf_counter() - began
    close(wires)
    return done / took


async def wake_latency(server: Any, number: int = 100) -> float:
    """Median seconds from sending a publish to the waiter's answer, one at a time."""
    publisher, waiter = await connect(server.port, 2)
    times = []
    for _ in range(number):
        answer = waiter.send(server.wait())
        await asyncio.sleep(0.01)  # so that it is parked: the exchange itself is what is timed
        began = time.perf_counter()
        published = publisher.send(server.post())
        while not answer.done():
            await asyncio.wait({answer}, timeout=1)
            if not answer.done():  # the machine was busy and the waiter came late: it has missed this one
                await published
                published = publisher.send(server.post())
        times.append(time.perf_counter() - began)
        await published
    close([publisher, waiter])
    return statistics.median(times)


async def wake_many(server: Any, number: int = 2000) -> float:
    """Seconds from a publish until ``number`` parked waiters have their answers."""
    wires, answers = await park(server, number)
    publisher = (await connect(server.port, 1))[0]
    began = time.perf_counter()
    published = publisher.send(server.post())
    await asyncio.gather(*answers)
    took = time.perf_counter() - began
    await published
    close([*wires, publisher])
    return took


async def memory_per_waiter(server: Any, number: int = 5000, warm_up: int = 50) -> float:
    """Bytes of resident memory that a parked waiter costs; what the warm-up left to be used again is not counted on."""
    for count in (warm_up, number):
        before = server.memory()
        wires, answers = await park(server, count)
        grown = server.memory() - before
        close(wires)
        await asyncio.gather(*answers, return_exceptions=True)
        await asyncio.sleep(1)
    return grown / (number - warm_up)


async def park(server: Any, number: int) -> tuple[list[Any], list[Any]]:
    wires = await connect(server.port, number)
    content = server.wait()
    answers = [wire.send(content) for wire in wires]
    await parked(server, number)
    return wires, answers


async def parked(server: Any, number: int) -> None:
    """Until the server has parked them: the sidecar says so, the bare one is given the same pause."""
    if isinstance(server, Sidecar):
        wire = (await connect(server.port, 1))[0]
        status = request_bytes("GET", "/status", server.token())
        while json.loads((await wire.ask(status))[1])["events"]["active_subscriptions"] < number:
            await asyncio.sleep(0.02)
        close([wire])
    await asyncio.sleep(0.5)


async def publish_beside(server: Sidecar, number: int = 5000) -> tuple[float, float]:
    """Median seconds of a publish, with nobody waiting and while ``number`` waiters wait for other things."""
    publisher = (await connect(server.port, 1))[0]

    async def median() -> float:
        times = []
        for _ in range(200):
            began = time.perf_counter()
            await publisher.ask(server.post())
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    alone = await median()
    wires = await connect(server.port, number)
    answers = [
        wire.send(
            server.wait("bench", f"since=latest&timeout=60000&filter=issue_id:other-{index}", subject=f"s{index % 20}")
        )
        for index, wire in enumerate(wires)
    ]
    await parked(server, number)
    beside = await median()
    close([*wires, publisher])
    await asyncio.gather(*answers, return_exceptions=True)
    return alone, beside


async def publish_among(server: Sidecar, disturb: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of a publish alone, and while ``disturb`` (a coroutine function) goes on."""
    publisher = (await connect(server.port, 1))[0]

    async def median(until_done: asyncio.Task[Any] | None) -> float:
        times: list[float] = []
        while len(times) < 100 or (until_done is not None and not until_done.done()):
            began = time.perf_counter()
            await publisher.ask(server.post())
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    alone = await median(None)
    task = asyncio.create_task(disturb())
    beside = await median(task)
    close([publisher])
    return alone, beside


async def thousand_hang_ups(server: Sidecar) -> None:
    """1,000 polls that are parked and then all hang up at once."""
    wires = await connect(server.port, 1000)
    answers = [wire.send(server.wait("other", subject=f"s{index % 10}")) for index, wire in enumerate(wires)]
    await asyncio.sleep(0.5)
    for wire in wires:
        wire.transport.abort()  # type: ignore[attr-defined]
    await asyncio.gather(*answers, return_exceptions=True)


async def readers_that_never_read(server: Sidecar) -> None:
    """50 polls whose answers of 2 MB nobody reads for a second."""
    publisher = (await connect(server.port, 1))[0]
    heavy = request_bytes("POST", "/api/events/heavy", server.token(), EVENT | {"data": {"load": "x" * 500_000}})
    for _ in range(4):
        await publisher.ask(heavy)
    wires = await connect(server.port, 50)
    for wire in wires:
        wire.transport.pause_reading()  # type: ignore[attr-defined]
        wire.transport.write(server.wait("heavy", "since=earliest&timeout=0"))  # type: ignore[attr-defined]
    await asyncio.sleep(1)
    for wire in [*wires, publisher]:
        wire.transport.abort()  # type: ignore[attr-defined]


async def empty_polls(server: Sidecar) -> None:
    """Polls with a time-out of 0, as fast as one connection gets its answers, for a second."""
    wire, end = (await connect(server.port, 1))[0], time.perf_counter() + 1
    while time.perf_counter() < end:
        await wire.ask(server.wait("other", "since=latest&timeout=0"))
    close([wire])


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


async def history_times(servers: list[Sidecar], rounds: int = 200) -> dict[str, list[float]]:
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
        ("GET /health", "GET", "/health", None),
        ("GET /api/events", "GET", "/api/events", None),
        ("GET /api/results", "GET", "/api/results", None),
        ("GET /api/results of one type", "GET", "/api/results?agent_type=test-engineer", None),
        ("GET /api/results of a type that has none", "GET", "/api/results?agent_type=qa-engineer", None),
        ("poll for any type that finds nothing", "GET", "/api/events/wait/*?since=latest&timeout=0", None),
        ("POST result", "POST", "/api/results", result),
    ):  # fmt: skip
        times: list[list[float]] = [[] for _ in servers]
        for _ in range(rounds):
            for values, wire, server in zip(times, wires, servers, strict=True):
                content = request_bytes(method, path, server.token(), body)
                began = time.perf_counter()
                status, _ = await wire.ask(content)
                values.append(time.perf_counter() - began)
                assert status in (200, 201), (name, status)
        found[name] = [statistics.quantiles(values)[0] for values in times]
    close(wires)
    return found


def long_history(small: int, large: int) -> None:
    """What is asked often costs the same on a short and on a long history."""
    with contextlib.ExitStack() as open_now:
        servers = []
        for size in (small, large):
            folder = Path(open_now.enter_context(tempfile.TemporaryDirectory()))
            with running_sidecar(folder):
                pass
            fill_history(folder / "storage", size)
            servers.append(open_now.enter_context(running_sidecar(folder, plugins=True)))
        found = asyncio.run(history_times(servers))
    line("measure", f"{large:,}", f"{small:,} events, results", "ratio (goal)")
    for name, (short, long) in found.items():
        line(name, f"{long * 1000:.2f} ms", f"{short * 1000:.2f} ms", f"{long / short:.2f} (<= 1.3)")


def alternate(rounds: int, measure: Callable[[Any], Any], *servers: Any) -> list[list[Any]]:
    """What ``measure`` gives for each server, round by round."""
    found: list[list[Any]] = [[] for _ in servers]
    for _ in range(rounds):
        for values, server in zip(found, servers, strict=True):
            values.append(asyncio.run(measure(server)))
    return found


def line(name: str, ours: str, other: str, verdict: str) -> None:
    print(f"{name:<52} {ours:>14} {other:>14}   {verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--log-events", type=int, default=1_000_000)
    parser.add_argument("--history-only", action="store_true", help="what is asked often, on 1,000 and on 100,000")
    options = parser.parse_args()
    if options.history_only:
        return long_history(1_000, 100_000)
    line("measure", "sidecar", "bare", "ratio or difference (goal)")
    with tempfile.TemporaryDirectory() as name, running_bare() as bare, running_sidecar(Path(name)) as sidecar:
        mine, bares = (asyncio.run(memory_per_waiter(server)) / 1000 for server in (sidecar, bare))
        line("memory per parked waiter, of 5,000", f"{mine:.1f} kB", f"{bares:.1f} kB", "(<= 16 kB)")
    with tempfile.TemporaryDirectory() as name, running_bare() as bare, running_sidecar(Path(name)) as sidecar:
        ours, other = alternate(options.rounds, throughput, sidecar, bare)
        ratio = statistics.median(a / b for a, b in zip(ours, other, strict=True))
        rates = [f"{statistics.median(values):.0f}/s" for values in (ours, other)]
        line("durable publishes a second, 32 connections", *rates, f"{ratio:.2f} (>= 0.5)")
        ours, other = alternate(options.rounds, wake_latency, sidecar, bare)
        mine, bares = statistics.median(ours) * 1000, statistics.median(other) * 1000
        line(
            "publish to one waiter's answer, p50",
            f"{mine:.2f} ms",
            f"{bares:.2f} ms",
            f"+{mine - bares:.2f} ms (<= +1.5)",
        )
        ours, other = alternate(options.rounds, wake_many, sidecar, bare)
        ratio = statistics.median(a / b for a, b in zip(ours, other, strict=True))
        times = [statistics.median(values) * 1000 for values in (ours, other)]
        line("2,000 woken waiters answered", f"{times[0]:.0f} ms", f"{times[1]:.0f} ms", f"{ratio:.2f} (<= 1.3)")
        pairs = [asyncio.run(publish_beside(sidecar)) for _ in range(options.rounds)]
        ratio = statistics.median(beside / alone for alone, beside in pairs)
        alone, beside = (statistics.median(values) * 1000 for values in zip(*pairs, strict=True))
        line(
            "publish beside 5,000 other waiters / alone", f"{beside:.2f} ms", f"{alone:.2f} ms", f"{ratio:.2f} (<= 1.3)"
        )
        for name, disturb in (
            ("1,000 polls that hang up at once", thousand_hang_ups),
            ("50 readers that never read", readers_that_never_read),
            ("one that polls without end", empty_polls),
        ):
            pairs = [
                asyncio.run(publish_among(sidecar, functools.partial(disturb, sidecar))) for _ in range(options.rounds)
            ]
            ratio = statistics.median(beside / alone for alone, beside in pairs)
            alone, beside = (statistics.median(values) * 1000 for values in zip(*pairs, strict=True))
            line(f"publish beside {name} / alone", f"{beside:.2f} ms", f"{alone:.2f} ms", f"{ratio:.2f} (<= 2)")
    big_log(options.log_events)
    long_history(1_000, 100_000)


def big_log(number: int) -> None:
    found, starts, sizes = {}, {}, {}
    for size in (1000, number):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with running_sidecar(folder):
                pass
            fill_log(folder / "storage", size)
            sizes[size] = os.path.getsize(folder / "storage" / "sidecar.db")
            began = time.perf_counter()
            with running_sidecar(folder) as sidecar:
                starts[size] = time.perf_counter() - began
                found[size] = asyncio.run(read_times(sidecar, size))
                if size == number:
                    scan, worst = asyncio.run(worst_health_during_scan(sidecar))
    line("measure", f"{number:,} events", "1,000 events", "ratio (goal)")
    line(
        "start",
        f"{starts[number] * 1000:.0f} ms",
        f"{starts[1000] * 1000:.0f} ms",
        f"{starts[number] / starts[1000]:.2f} (<= 1.5)",
    )
    for name in found[number]:
        mine, small = found[number][name] * 1000, found[1000][name] * 1000
        line(f"read {name}", f"{mine:.2f} ms", f"{small:.2f} ms", f"{mine / small:.2f} (<= 1.5)")
    line(
        "a filter no index helps, whole log",
        f"{scan * 1000:.0f} ms",
        "",
        f"slowest /health meanwhile {worst * 1000:.0f} ms",
    )
    line(
        "database size",
        f"{sizes[number] / 1e6:.0f} MB",
        f"{sizes[1000] / 1e6:.2f} MB",
        f"{sizes[number] / number:.0f} bytes an event",
    )


if __name__ == "__main__":
    main()

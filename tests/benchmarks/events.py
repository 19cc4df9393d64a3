"""How fast events reach those who wait, and what a waiter costs, beside a bare Tornado server."""

from __future__ import annotations

import asyncio
import functools
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks import Row, row
from tests.benchmarks.servers import EVENT, FAST, Bare, Sidecar, in_turn, running_all
from tests.benchmarks.wire import close, connect, request_bytes, run


def rows(quick: bool) -> Iterator[Row]:
    rounds, many, parked_ones, others = (1, 500, 1000, 500) if quick else (5, 2000, 5000, 5000)
    with tempfile.TemporaryDirectory() as name, running_all(Path(name)) as (sidecars, bares):
        memory, limits, _ = in_turn(1, functools.partial(memory_per_waiter, number=parked_ones), sidecars, bares)
        for words in sidecars:
            yield row(
                f"memory a parked waiter, of {parked_ones:,}{words}",
                *scaled(memory, limits, words, 1e-3),
                unit="kB",
                goal="value <= 16",
            )
        took, limits, held = in_turn(
            rounds, functools.partial(wake_latency, number=30 if quick else 100), sidecars, bares
        )
        for words in sidecars:
            yield row(
                f"publish to a waiter's answer, p50{words}",
                *scaled(took, limits, words, 1e3),
                unit="ms",
                goal="value <= 1" if words == FAST else "difference <= 1.5",
                held=held[words],
            )
        took, limits, held = in_turn(rounds, functools.partial(wake_many, number=many), sidecars, bares)
        for words in sidecars:
            yield row(
                f"{many:,} woken waiters answered{words}",
                *scaled(took, limits, words, 1e3),
                unit="ms",
                goal="ratio <= 0.56" if words == FAST else "ratio <= 1.3",
                held=held[words],
            )
        yield from growth(
            [*sidecars.values()][-1], [*bares.values()][-1], (1, 10, 100) if quick else (1, 10, 100, 1_000, 10_000)
        )
        for words, sidecar in list(sidecars.items())[-1 if quick else 0 :]:
            yield from disturbed(words, sidecar, min(rounds, 3), others)


def scaled(
    values: dict[str, list[float]], limits: dict[str, list[float]], words: str, factor: float
) -> tuple[list[float], list[float]]:
    """The values of one of the sidecar's servers and of the bare one beside it, times ``factor``."""
    return [value * factor for value in values[words]], [value * factor for value in limits[words]]


def growth(sidecar: Sidecar, bare: Bare, numbers: tuple[int, ...]) -> Iterator[Row]:
    """What one publish takes that wakes 1 to 10,000 waiters: the points of a picture."""
    for number in numbers:
        times = 3 if number > 1_000 else 7
        limit = [median(step) * 1e3 for step in run(waking(bare, number, times))]
        ours = [median(step) * 1e3 for step in run(waking(sidecar, number, times))]
        title = f"a publish that wakes {number:,}:"
        for step, mine, other in zip(
            ("the publisher has its answer", "half of the waiters have it", "all waiters have it"),
            ours,
            limit,
            strict=True,
        ):
            yield row(f"{title} {step}", [mine], [other], unit="ms", point=("waiters", step, number))
        yield row(
            f"{title} all, bare Tornado", limit[2:], unit="ms", point=("waiters", "all waiters, bare Tornado", number)
        )


async def waking(server: Any, number: int, times: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds from a publish to its answer, to the answers of half of ``number`` waiters, and to all; ``times`` each."""
    wires, (publisher,) = await connect(server.port, number), await connect(server.port, 1)
    content, post = server.wait(), server.post()
    found: tuple[list[float], list[float], list[float]] = ([], [], [])
    for _ in range(times):
        answers = [wire.send(content) for wire in wires]
        await parked(server, number)
        came: list[float] = []
        for answer in answers:
            answer.add_done_callback(lambda _, came=came: came.append(time.perf_counter()))
        began = time.perf_counter()
        await publisher.ask(post)
        published = time.perf_counter()
        await asyncio.gather(*answers)
        for values, moment in zip(found, (published, came[(number - 1) // 2], came[-1]), strict=True):
            values.append(moment - began)
    close([*wires, publisher])
    return found


def disturbed(words: str, sidecar: Sidecar, rounds: int, others: int) -> Iterator[Row]:
    """What a publish takes while others do what could slow it, beside what it takes alone."""
    measures: dict[str, tuple[Callable[[Sidecar], Coroutine[Any, Any, tuple[float, float]]], str]] = {
        f"{others:,} who wait for other things": (functools.partial(publish_beside, number=others), "ratio <= 1.3"),
        "1,000 polls that hang up at once": (functools.partial(publish_among, disturb=thousand_hang_ups), "ratio <= 2"),
        "50 readers that never read": (functools.partial(publish_among, disturb=readers_that_never_read), "ratio <= 2"),
        "one that polls without end": (functools.partial(publish_among, disturb=empty_polls), "ratio <= 2"),
    }
    for name, (measure, goal) in measures.items():
        sidecar.held()
        alone, beside = zip(*(run(measure(sidecar)) for _ in range(rounds)), strict=True)
        late, ours, limit = sidecar.held(end=True), [value * 1e3 for value in beside], [value * 1e3 for value in alone]
        yield row(f"a publish beside {name}{words}", ours, limit, unit="ms", goal=goal, limit_is="alone", held=late)


async def wake_latency(server: Any, number: int = 100) -> float:
    """Median seconds from sending a publish to the waiter's answer, one at a time."""
    publisher, waiter = await connect(server.port, 2)
    wait, post, times = server.wait(), server.post(), []
    for _ in range(number):
        answer = waiter.send(wait)
        await asyncio.sleep(0.01)  # so that it is parked: the exchange itself is what is timed
        began = time.perf_counter()
        published = publisher.send(post)
        while not answer.done():
            await asyncio.wait({answer}, timeout=1)
            if not answer.done():  # the machine was busy and the waiter came late: it has missed this one
                await published
                published = publisher.send(post)
        times.append(time.perf_counter() - began)
        await published
    close([publisher, waiter])
    return median(times)


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
    """Until the server has parked them."""
    (wire,) = await connect(server.port, 1)
    while await server.waiters(wire) < number:
        await asyncio.sleep(0.02)
    close([wire])
    await asyncio.sleep(0.05)


async def publish_beside(server: Sidecar, number: int = 5000) -> tuple[float, float]:
    """Median seconds of a publish, with nobody waiting and while ``number`` waiters wait for other things."""
    publisher = (await connect(server.port, 1))[0]

    async def usual() -> float:
        times = []
        for _ in range(200):
            began = time.perf_counter()
            await publisher.ask(server.post())
            times.append(time.perf_counter() - began)
        return median(times)

    alone = await usual()
    wires = await connect(server.port, number)
    answers = [
        wire.send(
            server.wait("bench", f"since=latest&timeout=60000&filter=issue_id:other-{index}", subject=f"s{index % 20}")
        )
        for index, wire in enumerate(wires)
    ]
    await parked(server, number)
    beside = await usual()
    close([*wires, publisher])
    await asyncio.gather(*answers, return_exceptions=True)
    return alone, beside


async def publish_among(
    server: Sidecar, disturb: Callable[[Sidecar], Coroutine[Any, Any, None]]
) -> tuple[float, float]:
    """Median seconds of a publish alone, and while ``disturb`` (a coroutine function) goes on."""
    publisher = (await connect(server.port, 1))[0]

    async def usual(until_done: asyncio.Task[Any] | None) -> float:
        times: list[float] = []
        while len(times) < 100 or (until_done is not None and not until_done.done()):
            began = time.perf_counter()
            await publisher.ask(server.post())
            times.append(time.perf_counter() - began)
        return median(times)

    alone = await usual(None)
    task = asyncio.create_task(disturb(server))
    beside = await usual(task)
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

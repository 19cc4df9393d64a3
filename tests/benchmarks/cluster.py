"""Sidecars that share one log on NATS JetStream, beside one with the local storage: on one machine, over loopback."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks import Row, row
from tests.benchmarks.events import park
from tests.benchmarks.servers import ROOT, Sidecar, running_sidecar
from tests.benchmarks.wire import close, connect, repeated, run

sys.path.append(str(ROOT / "tests"))  # as pytest does: the tests' modules import each other without a package
from cluster import SECRET, servers

SERVERS = {
    "one server": (1, "sync_interval: always"),
    "three servers": (3, "sync_interval: always"),
    "three servers that write to disk later": (3, ""),
}
Team = list[Sidecar]  # one with the local storage, or three on one log


def rows(quick: bool) -> Iterator[Row]:
    rounds, seconds, many = (1, 0.5, 100) if quick else (3, 2.0, 1_000)
    measures: list[tuple[str, str, float, Callable[[Team], Coroutine[Any, Any, float]]]] = [
        ("events published through one sidecar", "/s", 1, functools.partial(publishes, seconds=seconds)),
        ("events published through all", "/s", 1, functools.partial(publishes_of_all, seconds=seconds)),
        ("a publish to its receiver at the same sidecar", "ms", 1e3, functools.partial(latency, receiver=0)),
        ("a publish to its receiver at another", "ms", 1e3, functools.partial(latency, receiver=-1)),
        (f"a publish to {3 * many:,} waiters of all", "ms", 1e3, functools.partial(wakes, number=3 * many)),
    ]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        teams = {"local": [stack.enter_context(sidecar(Path(name) / "local"))]}
        for words, (number, jetstream) in SERVERS.items():
            folder = Path(name) / words.replace(" ", "-")
            log = stack.enter_context(servers(folder, number, jetstream=jetstream))
            places = [folder / f"sidecar-{index}" for index in range(3)]
            teams[words] = [stack.enter_context(sidecar(place, "--backend", log.url)) for place in places]
        for title, unit, factor, measure in measures:
            values: dict[str, list[float]] = {words: [] for words in teams}
            for _ in range(rounds):
                for words, team in teams.items():
                    values[words].append(run(measure(team)) * factor)
            for words in SERVERS:
                yield row(f"{title}, {words}", values[words], values["local"], unit=unit, limit_is="local storage")


@contextlib.contextmanager
def sidecar(folder: Path, *options: str) -> Iterator[Sidecar]:
    """A service with the secret of all of them."""
    storage = folder / "storage"
    storage.mkdir(mode=0o700, parents=True)
    (storage / "jwt.secret").write_text(SECRET)
    (storage / "jwt.secret").chmod(0o600)
    with running_sidecar(folder, *options, probed=False) as found:
        yield found


async def publishes(team: Team, seconds: float) -> float:
    """Events a second that 32 clients of the first sidecar publish, each one at a time."""
    return await repeated(team[0].port, team[0].post(), 202, seconds)


async def publishes_of_all(team: Team, seconds: float) -> float:
    """The same by as many clients in all, spread over the sidecars."""
    share = 32 // len(team)
    rates = (repeated(member.port, member.post(), 202, seconds, connections=share) for member in team)
    return sum(await asyncio.gather(*rates))


async def latency(team: Team, receiver: int, number: int = 50) -> float:
    """Median seconds from a publish at the first sidecar to the answer of a poll at another one."""
    (publisher,), times = await connect(team[0].port, 1), []
    for _ in range(number):
        wires, answers = await park(team[receiver], 1)
        began = time.perf_counter()
        published = publisher.send(team[0].post())
        await asyncio.gather(*answers)
        times.append(time.perf_counter() - began)
        await published
        close(wires)
    close([publisher])
    return median(times)


async def wakes(team: Team, number: int) -> float:
    """Seconds from a publish at the first sidecar until ``number`` polls, spread over all, have their answers."""
    parked = [await park(member, number // len(team)) for member in team]
    (publisher,) = await connect(team[0].port, 1)
    began = time.perf_counter()
    published = publisher.send(team[0].post())
    await asyncio.gather(*(answer for _, answers in parked for answer in answers))
    took = time.perf_counter() - began
    await published
    close([wire for wires, _ in parked for wire in wires] + [publisher])
    return took

"""The same work by what users could pick instead: NATS JetStream and Redis, whose writes are on disk before the answer.

Every client is this process, over plain sockets, so that its own costs are alike. ``nats-server`` comes with the test
extra; ``redis-server`` is Debian's, and its rows are left out where it is not installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks import Row, row
from tests.benchmarks.events import wake_latency, wake_many
from tests.benchmarks.servers import EVENT, ROOT, Server, Sidecar, end, running_sidecar, servers
from tests.benchmarks.wire import repeated, run

sys.path.append(str(ROOT / "tests"))  # as pytest does: the tests' modules import each other without a package
from cluster import Node, ended_with_us, held_port
from conftest import until

PAYLOAD = json.dumps(EVENT).encode()
DELIVERED = re.compile(re.escape(PAYLOAD[-20:]) + rb"\r\n")
CONNECTIONS = 32


class Rival(Server):
    """Another server that keeps events: what is sent to it, and how its answers end."""

    name = ""
    hello, greeted = b"", re.compile(b"PONG\r\n")
    publish, stored = b"", re.compile(b"")

    async def waiting(self, lines: list[Line]) -> list[asyncio.Future[bytes]]:
        """The next event on each of these connections, once the server knows that they wait for it."""
        raise NotImplementedError


class JetStream(Rival):
    """Its readers hear of what is stored, by a consumer of the stream; a plain subscription is told before that."""

    name = "NATS, sync always"
    hello = b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\nSUB inbox.%d 1\r\nPING\r\n'
    publish = b"PUB bench.event inbox.%%d %d\r\n%s\r\n" % (len(PAYLOAD), PAYLOAD)
    stored = re.compile(rb'"seq":\d+.*\}\r\n')
    create = b"PUB $JS.API.CONSUMER.CREATE.bench inbox.%%d %d\r\n%s\r\n"

    async def waiting(self, lines: list[Line]) -> list[asyncio.Future[bytes]]:
        subject = f"heard.{lines[0].number}"
        await asyncio.gather(*(line.ask(b"SUB %s 2\r\nPING\r\n" % subject.encode(), self.greeted) for line in lines))
        consumer = {"deliver_subject": subject, "deliver_policy": "new", "ack_policy": "none"}
        request = json.dumps({"stream_name": "bench", "config": consumer}).encode()
        asking = await Line.open(self)
        await asking.ask(self.create % (len(request), request), re.compile(rb'"config".*\}\r\n'))
        asking.transport.close()
        return [line.ask(b"", DELIVERED) for line in lines]


class Redis(Rival):
    name = "Redis, fsync always"
    hello = b"PING\r\n"
    publish = b"*5\r\n$4\r\nXADD\r\n$5\r\nbench\r\n$1\r\n*\r\n$5\r\nevent\r\n$%d\r\n%s\r\n" % (len(PAYLOAD), PAYLOAD)
    stored = re.compile(rb"\$\d+\r\n\d+-\d+\r\n")

    async def waiting(self, lines: list[Line]) -> list[asyncio.Future[bytes]]:
        answers = [line.ask(b"XREAD BLOCK 60000 STREAMS bench $\r\n", DELIVERED) for line in lines]
        asking, clients = await Line.open(self), re.compile(rb"blocked_clients:(\d+)\r\n")
        while int(clients.search(await asking.ask(b"INFO clients\r\n", clients))[1]) < len(lines):  # type: ignore[index]
            await asyncio.sleep(0.02)
        asking.transport.close()
        return answers


class Line(asyncio.Protocol):
    """A connection on which one answer is waited for at a time."""

    numbers = 0
    transport: asyncio.Transport

    def __init__(self) -> None:
        Line.numbers += 1
        self.number, self._came = Line.numbers, b""
        self._answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._came += data
        if self._answer and not self._answer.done() and (b"-ERR" in self._came or b'"error"' in self._came):
            self._answer.set_exception(RuntimeError(self._came))
        elif self._answer and not self._answer.done() and self._end.search(self._came):
            self._answer.set_result(self._came)
            self._came = b""

    def ask(self, content: bytes, end: re.Pattern[bytes]) -> asyncio.Future[bytes]:
        """What comes after ``content`` was sent, until ``end`` is among it."""
        self._end, self._came = end, b""
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(content % self.number if b"%d" in content else content)
        return self._answer

    @classmethod
    async def open(cls, rival: Rival) -> Line:
        _, line = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", rival.port)
        await line.ask(rival.hello, rival.greeted)
        return line


def rows(quick: bool) -> Iterator[Row]:
    rounds, seconds, many = (1, 0.5, 200) if quick else (5, 2.0, 2_000)
    words, options = list(servers().items())[-1]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "sidecar").mkdir()
        ours = stack.enter_context(running_sidecar(folder / "sidecar", *options, probed=False))
        rivals = [stack.enter_context(running_jetstream(folder))]
        if shutil.which("redis-server"):
            rivals.append(stack.enter_context(running_redis(folder)))
        else:
            print("rivals: redis-server is not installed, so its rows are missing", file=sys.stderr)
        costs: dict[Server, list[float]] = {server: [] for server in (ours, *rivals)}
        measures: list[tuple[str, str, float, str, Callable[[Any], Coroutine[Any, Any, float]]]] = [
            ("durable publishes", "/s", 1, "ratio >= 1", functools.partial(publishes, seconds=seconds, costs=costs)),
            ("a durable publish to its receiver", "ms", 1e3, "value <= 1", latency),
            (f"each of {many:,} woken readers", "µs", 1e6 / many, "value <= 60", functools.partial(wakes, number=many)),
        ]
        for title, unit, factor, goal, measure in measures:
            values: dict[Server, list[float]] = {server: [] for server in costs}
            for _ in range(rounds):
                for server, found in values.items():
                    found.append(run(measure(server)) * factor)
            yield from beside(f"{title}{words}", values, rivals, unit, goal)
        yield from beside(f"processor time of a durable publish{words}", costs, rivals, "µs", "")


def beside(title: str, values: dict[Server, list[float]], rivals: list[Any], unit: str, goal: str) -> Iterator[Row]:
    """A row for each rival; the first one's has the goal."""
    (ours, *_) = values.values()
    for rival in rivals:
        name = f"{title}, beside {rival.name.partition(',')[0]}"
        yield row(name, ours, values[rival], unit=unit, goal=goal if rival is rivals[0] else "", limit_is=rival.name)


async def publishes(server: Server, seconds: float, costs: dict[Server, list[float]]) -> float:
    """Publishes a second by 32 clients, each of which waits for its answer; ``costs`` gets their microseconds of
    processor time.
    """
    before = server.processor_seconds()
    if isinstance(server, Sidecar):
        rate = await repeated(server.port, server.post(), 202, seconds)
    else:
        assert isinstance(server, Rival)
        lines = [await Line.open(server) for _ in range(CONNECTIONS)]
        began = time.perf_counter()
        rate = sum(await asyncio.gather(*(publish_for(line, server, began + seconds) for line in lines))) / seconds
        for line in lines:
            line.transport.close()
    costs[server].append((server.processor_seconds() - before) / (rate * seconds) * 1e6)
    return rate


async def publish_for(line: Line, rival: Rival, until_then: float) -> int:
    number = 0
    while time.perf_counter() < until_then:
        await line.ask(rival.publish, rival.stored)
        number += 1
    return number


async def latency(server: Server, number: int = 100) -> float:
    """Median seconds from sending a publish until its one reader has it."""
    if isinstance(server, Sidecar):
        return await wake_latency(server, number)
    return median([await woken(server, 1) for _ in range(number)])  # type: ignore[arg-type]


async def wakes(server: Server, number: int) -> float:
    """Seconds from a publish until ``number`` readers have it, each on a connection of its own."""
    return await (wake_many if isinstance(server, Sidecar) else woken)(server, number)  # type: ignore[operator]


async def woken(rival: Rival, number: int) -> float:
    readers, publisher = [await Line.open(rival) for _ in range(number)], await Line.open(rival)
    answers = await rival.waiting(readers)
    await asyncio.sleep(0.01)  # as for the sidecar: what was idle takes longer to wake
    began = time.perf_counter()
    stored = publisher.ask(rival.publish, rival.stored)
    await asyncio.gather(*answers)
    took = time.perf_counter() - began
    await stored
    for line in (*readers, publisher):
        line.transport.close()
    return took


@contextlib.contextmanager
def running_jetstream(folder: Path) -> Iterator[JetStream]:
    """One server whose every write is on disk before it is confirmed, and a stream of events."""
    import nats

    node = Node(folder, "jetstream")
    node.configure([node], "max_payload: 8MB", "sync_interval: always")
    node.start()
    try:
        until(lambda: node.monitor("healthz"), 20)

        async def prepare() -> None:
            client = await nats.connect(f"nats://127.0.0.1:{node.port}")
            await client.jetstream().add_stream(name="bench", subjects=["bench.>"])
            await client.close()

        run(prepare())
        assert node.process
        yield JetStream(node.process, node.port)
    finally:
        node.kill()


@contextlib.contextmanager
def running_redis(folder: Path) -> Iterator[Redis]:
    """A server whose log of changes is on disk before a write is confirmed."""
    place, line = folder / "redis", held_port()
    place.mkdir()
    port = line.getsockname()[1]
    line.close()
    options = ["--port", port, "--bind", "127.0.0.1", "--dir", place, "--save", "", "--appendonly", "yes"]
    options += ["--appendfsync", "always", "--maxclients", 20_000]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen([*ended_with_us(), "redis-server", *map(str, options)], stdout=log, stderr=log)
    try:
        until(lambda: b"Ready to accept" in (place / "log").read_bytes(), 20)
        yield Redis(process, port)
    finally:
        end(process)

"""Requests a second at 32 connections, beside a bare Tornado server that answers the same bytes."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks import Row, row
from tests.benchmarks.servers import EVENT, FAST, Bare, Sidecar, in_turn, running_all
from tests.benchmarks.trees import make_tree
from tests.benchmarks.wire import NEW, NUMBERS, connect, repeated, request_bytes, run
from tests.conftest import DOCUMENTED_RESULT

CONTEXT = "/api/context/issue-1/python-specialist?task=Handle+the+session&max_bytes=100000"
RESULT = {
    "agent_id": "bench",
    "agent_type": "chief-architect",
    "issue_id": f"issue-{NEW.decode()}",  # each on an issue of its own, so that each is routed
    "project_id": "bench",
    "result": DOCUMENTED_RESULT,
    "timestamp": "2025-11-18T10:05:00Z",
}


class Exchange(NamedTuple):
    """A request to the sidecar and the same exchange with the bare server."""

    request: bytes
    status: int
    limit: bytes


# Measure -> its goal with Tornado's server, and with the fast one.
GOALS = {
    "GET /health": ("ratio >= 0.8", "ratio >= 2"),
    "GET a cached context of 100 kB": ("ratio >= 0.8", "ratio >= 0.8"),
    "the same, unchanged (304)": ("", ""),
    "POST a result": ("ratio >= 0.4", "ratio >= 0.4"),
    "POST an event": ("ratio >= 0.5", "ratio >= 0.5"),
}


def rows(quick: bool) -> Iterator[Row]:
    rounds, seconds = (2, 0.2) if quick else (5, 0.7)
    with tempfile.TemporaryDirectory() as place:
        with contextlib.suppress(OSError):  # on ext4 the folders in it then lie apart from what tests have deleted
            subprocess.run(["chattr", "+T", place], stderr=subprocess.DEVNULL, check=False)
        root = make_tree(Path(place) / "repository", 200)
        with running_all(Path(place), root=root) as (sidecars, bares):
            sets: dict[Any, dict[str, Exchange]] = {}
            for words, sidecar in sidecars.items():
                sets[sidecar] = exchanges(sidecar, bares[words])
                sets[bares[words]] = {
                    name: found._replace(request=found.limit) for name, found in sets[sidecar].items()
                }
            rates = {}
            for name, goals in GOALS.items():
                measure = functools.partial(rate, sets, name, seconds)
                in_turn(1, measure, sidecars, bares)  # to warm up
                rates[name], limits, held = in_turn(rounds, measure, sidecars, bares)
                for words, ours in rates[name].items():
                    goal = goals[words == FAST]
                    yield row(f"{name}{words}", ours, limits[words], unit="/s", goal=goal, held=held[words])
            for words in sidecars:
                unchanged, health = rates["the same, unchanged (304)"][words], rates["GET /health"][words]
                yield row(f"a 304 beside GET /health{words}", unchanged, health, unit="/s", goal="ratio >= 0.9",
                          limit_is="/health")  # fmt: skip
        found = [folders(Path(place) / f"new-{number}", seconds) for number in range(rounds)]
        yield row("new folders with a file", found, unit="/s")


def folders(place: Path, seconds: float) -> float:
    """New folders a second into each of which a new file is moved: what results on issues of their own ask of the disk.
    ext4 without a journal looks at all that was deleted in the last minute for each of them.
    """
    (written := place / "written").mkdir(parents=True)
    number, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        folder = place / str(number)
        folder.mkdir()
        (written / "file").write_bytes(b"")
        (written / "file").rename(folder / "file")
        number += 1
    return number / passed


async def rate(sets: dict[Any, dict[str, Exchange]], name: str, seconds: float, server: Sidecar | Bare) -> float:
    """Answers a second to the request of that name."""
    exchange = sets[server][name]
    return await repeated(server.port, exchange.request, exchange.status, seconds)


def exchanges(sidecar: Sidecar, bare: Bare) -> dict[str, Exchange]:
    """Every measure's requests; the bare server is given what the sidecar answered."""
    while sidecar.get(CONTEXT)["context"]["metadata"]["index"] != "ready":
        time.sleep(0.05)
    while not sidecar.get(CONTEXT)["cache_hit"]:
        time.sleep(0.05)
    token, found = sidecar.token(), {}
    for name, method, path, body, status in (
        ("GET /health", "GET", "/health", None, 200),
        ("GET a cached context of 100 kB", "GET", CONTEXT, None, 200),
        ("POST a result", "POST", "/api/results", RESULT, 201),
        ("POST an event", "POST", "/api/events/bench", EVENT, 202),
    ):
        content = request_bytes(method, path, token, body)
        answered, head, answer = run(once(sidecar.port, content.replace(NEW, next(NUMBERS))))
        assert answered == status, answer
        etag = head.get("etag", "")
        kept = bare.keep(str(abs(hash(name))), answer, status, etag)
        found[name] = Exchange(content, status, request_bytes(method, kept, "", body))
        if etag:
            same = {"If_None_Match": etag}
            found["the same, unchanged (304)"] = Exchange(
                request_bytes(method, path, token, None, **same), 304, request_bytes(method, kept, "", None, **same)
            )
    return found


async def once(port: int, content: bytes) -> tuple[int, dict[str, str], bytes]:
    """(status, headers by their names in small letters, body) of one request's answer."""
    (wire,) = await connect(port, 1)
    status, body = await wire.ask(content)
    wire.transport.close()
    return status, wire.headers, body

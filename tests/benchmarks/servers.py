"""The servers that benchmarks talk to: the sidecar, with and without its fast HTTP server, and their limit."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jwt
import psutil

from tests.benchmarks.wire import Wire, request_bytes, run
from tests.conftest import clean_environment

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).parent / "probe"
EVENT = {
    "publisher": "bench",
    "topic": "bench",
    "data": {"issue_id": "issue-1", "status": "success", "files": ["a.py", "b.py"]},
}


class Program(NamedTuple):
    """A copy of the program: the command that runs it, and its PYTHONPATH."""

    command: tuple[str, ...]
    path: str = ""


CHECKOUT = Program((sys.executable, str(ROOT / "cco_sidecar.py")))


class Server:
    """A server process with its port."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port

    def memory(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def processor_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def held(self, end: bool = False) -> list[float]:
        """Milliseconds for which the event loop was kept from others, look by look, since the last call."""
        return []


class Sidecar(Server):
    def __init__(self, process: subprocess.Popen[bytes], port: int, secret: str, probed: bool) -> None:
        super().__init__(process, port)
        self._secret, self._probed = secret, probed
        self._tokens: dict[tuple[str, str], str] = {}

    def token(self, subject: str = "bench", agent_type: str = "chief-architect") -> str:
        """Made once, as an agent has it: making one takes a tenth of the time from a publish to its receiver."""
        if (subject, agent_type) not in self._tokens:
            now = int(time.time())
            claims = {"sub": subject, "agent_type": agent_type, "project_id": "bench", "iat": now, "exp": now + 3600}
            claims["permissions"] = ["read_context", "write_results", "publish_events", "spawn_agents"]
            self._tokens[subject, agent_type] = jwt.encode(claims, self._secret, algorithm="HS256")
        return self._tokens[subject, agent_type]

    def post(self, event_type: str = "bench") -> bytes:
        return request_bytes("POST", f"/api/events/{event_type}", self.token(), EVENT)

    def wait(
        self, event_type: str = "bench", query: str = "since=latest&timeout=60000", subject: str = "bench"
    ) -> bytes:
        return request_bytes("GET", f"/api/events/wait/{event_type}?{query}", self.token(subject))

    async def waiters(self, wire: Wire) -> int:
        """How many waiters are parked."""
        _, content = await wire.ask(request_bytes("GET", "/status", self.token()))
        return int(json.loads(content)["events"]["active_subscriptions"])

    def get(self, path: str) -> Any:
        """The JSON of an answer; blocks."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", headers={"Authorization": f"Bearer {self.token()}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def held(self, end: bool = False) -> list[float]:
        return self.get(f"/bench/held{'?end=1' * end}")["late_ms"] if self._probed else []


class Bare(Server):
    def post(self, event_type: str = "bench") -> bytes:
        return request_bytes("POST", "/post", "", EVENT)

    def wait(self, event_type: str = "bench", query: str = "", subject: str = "") -> bytes:
        return request_bytes("GET", "/wait")

    async def waiters(self, wire: Wire) -> int:
        """How many waiters are parked."""
        _, content = await wire.ask(request_bytes("GET", "/waiting"))
        return int(content)

    def keep(self, name: str, content: bytes, status: int = 200, etag: str = "") -> str:
        """The path that is answered by ``content`` from now on, whatever is sent there."""
        path = f"/kept/{name}"
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", content, {"X-Status": str(status), "X-ETag": etag}, method="PUT"
        )
        with urllib.request.urlopen(request, timeout=60):
            return path


@contextlib.contextmanager
def running_bare(words: str = "") -> Iterator[Bare]:
    """A bare server on the event loop that the sidecar's server of these words runs on."""
    flags = ["--uvloop"] if words == FAST and has_uvloop() else []
    command = [sys.executable, "-m", "tests.benchmarks.bare", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout
        yield Bare(process, int(process.stdout.readline()))
    finally:
        end(process)


def has_uvloop() -> bool:
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def running_sidecar(
    folder: Path, *arguments: str, root: Path | None = None, program: Program = CHECKOUT, probed: bool = True
) -> Iterator[Sidecar]:
    """A service with all that it does; its storage and its log lie in ``folder``. ``probed`` adds the route that says
    for how long the event loop was held.
    """
    root, storage = root or folder / "repository", folder / "storage"
    root.mkdir(exist_ok=True)
    options = ["--root", root, "--storage", storage, "--port", 0, "--project", "bench"]
    options += ["--event-limit", 100_000_000, "--max-connections", 100_000, *(["--plugins", PROBE] if probed else [])]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*program.command, "serve", *map(str, options), *arguments],
            stdout=log, stderr=log, env=clean_environment(PYTHONPATH=program.path)
        )  # fmt: skip
    try:
        while (info := announced(storage)) is None or info["pid"] != process.pid:
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.002)
        port = int(info["url"].rpartition(":")[2])
        yield Sidecar(process, port, (storage / "jwt.secret").read_text(), probed)
    finally:
        end(process)


def announced(storage: Path) -> Any:
    """What sidecar.json says; None while there is none."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((storage / "sidecar.json").read_text())
    return None


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process: ask, grace, force."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def running_all(
    folder: Path, *arguments: str, root: Path | None = None
) -> Iterator[tuple[dict[str, Sidecar], dict[str, Bare]]]:
    """A sidecar for each server that it has, and a bare one for each, by the words that follow a measure's name."""
    with contextlib.ExitStack() as stack:
        found = {}
        for number, (name, options) in enumerate(servers().items()):
            place = folder / f"sidecar-{number}"
            place.mkdir()
            found[name] = stack.enter_context(running_sidecar(place, *options, *arguments, root=root))
        yield found, {words: stack.enter_context(running_bare(words)) for words in found}


def in_turn(
    rounds: int,
    measure: Callable[[Any], Coroutine[Any, Any, float]],
    sidecars: dict[str, Sidecar],
    bares: dict[str, Bare],
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
    """What ``measure`` gives for each sidecar, and for each bare server, round by round, and for how long it held each
    sidecar's event loop.
    """
    values, limits, held = ({words: list[float]() for words in sidecars} for _ in range(3))
    for _ in range(rounds):
        for words, sidecar in sidecars.items():
            limits[words].append(run(measure(bares[words])))
            sidecar.held()
            values[words].append(run(measure(sidecar)))
            held[words] += sidecar.held(end=True)
    return values, limits, held


FAST = ", fast server"


def servers() -> dict[str, list[str]]:
    """The options of each HTTP server that the sidecar has, by the words that follow a measure's name; last the one
    that it runs by itself.
    """
    return {"": ["--no-fast"], FAST: []}

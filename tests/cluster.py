"""Real NATS servers on loopback, one or a cluster of three, and several sidecars on one project.

Servers start in the test's main thread: where that ends, also by SIGKILL, the kernel ends them too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nats
import nats.js.errors
import psutil
import requests
from conftest import Service, clean_environment, needed, until

SECRET = "the secret of a whole team, on every one of its machines"


def server_program() -> str:
    """The nats-server that the test extra installs beside this interpreter, else the one on PATH."""
    beside = Path(sys.executable).with_name("nats-server")
    return str(beside) if beside.exists() else needed("nats-server")


def ended_with_us() -> list[str]:
    """What a command begins with to be killed when the thread that starts it ends. Linux alone has this."""
    return ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []


def held_port() -> socket.socket:
    """A port that nobody gets by chance while this socket is open, and a server with SO_REUSEADDR may listen on."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    line.bind(("127.0.0.1", 0))
    return line


class Node:
    """One nats-server process. ``kill`` and ``pause`` are SIGKILL and SIGSTOP; its store outlives it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.folder = name, folder / name
        self.folder.mkdir(parents=True)
        self.held = [held_port() for _ in range(3)]
        self.port, self.cluster_port, self.monitor_port = (line.getsockname()[1] for line in self.held)
        self.process: subprocess.Popen[bytes] | None = None

    def configure(self, peers: list[Node], more: str, jetstream: str) -> None:
        """Write the server's configuration: ``more`` is added at its top level, ``jetstream`` in that block."""
        routes = ", ".join(f"nats://127.0.0.1:{peer.cluster_port}" for peer in peers)
        cluster = f'cluster {{ name: team, listen: "127.0.0.1:{self.cluster_port}", routes: [{routes}] }}'
        lines = [
            f'server_name: {self.name}\nlisten: "127.0.0.1:{self.port}"\nhttp: "127.0.0.1:{self.monitor_port}"',
            f"jetstream {{ store_dir: {json.dumps(str(self.folder / 'store'))}\n{jetstream} }}",
            cluster if len(peers) > 1 else "",
            more,
        ]
        (self.folder / "server.conf").write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            command = [*ended_with_us(), server_program(), "-c", str(self.folder / "server.conf")]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=clean_environment())

    def kill(self) -> None:
        """End it at once, also while it is paused."""
        if self.process:
            self.process.kill()
            self.process.wait(60)
            self.process = None

    def pause(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGSTOP)
        until(lambda: self.process and psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED)

    def resume(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGCONT)

    def monitor(self, path: str) -> Any:
        """What it tells of itself; None while it does not."""
        with contextlib.suppress(requests.RequestException, ValueError):
            return requests.get(f"http://127.0.0.1:{self.monitor_port}/{path}", timeout=2).json()
        return None

    def streams(self) -> dict[str, Any]:
        """What it tells of each stream, by its name."""
        accounts = (self.monitor("jsz?streams=1&accounts=1") or {}).get("account_details") or []
        return {detail["name"]: detail for account in accounts for detail in account.get("stream_detail") or []}

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


class Servers:
    """One server, or three that replicate everything. ``url`` is what ``--backend`` takes."""

    def __init__(
        self,
        folder: Path,
        count: int = 1,
        *,
        more: str = "",
        jetstream: str = "",
        login: str = "",
        scheme: str = "nats",
    ) -> None:
        self.nodes = [Node(folder, f"node-{number}") for number in range(count)]
        for node in self.nodes:
            node.configure(self.nodes, more, jetstream)
        self.url = f"{scheme}://{login}{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}"

    def start(self) -> Servers:
        """Start those that do not run, and wait until writing is possible."""
        for node in self.nodes:
            if not node.process:
                node.start()
        until(self.ready, 30)
        return self

    def ready(self) -> bool:
        """Whether all run, and a cluster knows all its nodes and has chosen who leads them."""
        for node in self.nodes:
            assert node.process and node.process.poll() is None, node.log
            told = node.monitor("jsz") or {}
            meta = told.get("meta_cluster") or {}
            whole = meta.get("leader") and meta.get("cluster_size") == len(self.nodes)
            if "config" not in told or not (whole or len(self.nodes) == 1):
                return False
        return True

    def leader(self, stream: str) -> Node:
        """The node that decides the order of the stream whose name ends with ``stream``."""
        return until(lambda: self._leader(stream))

    def _leader(self, stream: str) -> Node | None:
        for node in self.nodes:
            for name, detail in node.streams().items():
                if name.endswith(stream) and detail.get("cluster", {}).get("leader") == node.name:
                    return node
        return None

    def stop(self) -> None:
        for node in self.nodes:
            node.kill()
            for line in node.held:
                line.close()


class Relay(socketserver.ThreadingTCPServer):
    """The way to a server. So many more of the server's answers about a stream as it is ``behind`` tell of no entry, as
    those of one that is not up to date tell of fewer. While it is ``away`` nobody gets through, and behind each such
    answer so many are refused as it is ``silent``; ``cuts`` is how many more entries end their connection in place of
    arriving.
    """

    daemon_threads = True

    def __init__(self, node: Node, stream: str) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.node, self._stream, self.url = (
            node,
            b'"name":"%b"' % stream.encode(),
            f"nats://127.0.0.1:{self.server_address[1]}",
        )
        self.behind, self.told, self.cuts = 0.0, 0, 0
        self.away, self.refused = False, 0
        self.silent = self._to_refuse = 0
        self._lines: set[socket.socket] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.away or self._to_refuse:
            self._to_refuse = max(0, self._to_refuse - 1)
            self.refused += 1
            return
        try:
            with socket.create_connection(("127.0.0.1", self.node.port)) as server:
                self._lines |= {request, server}
                back = threading.Thread(target=self._pass_on, args=(server, request, self._answered), daemon=True)
                back.start()
                self._pass_on(request, server, self._asked)
                back.join()
        except OSError:
            pass  # whoever asks finds the connection closed, as at a server that is away

    def _pass_on(self, source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes]) -> None:
        with contextlib.suppress(OSError, ValueError), source.makefile("rb") as lines:
            for line in lines:
                target.sendall(change(line))
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _asked(self, line: bytes) -> bytes:
        if self.cuts and line.startswith(b"HPUB ") and b".log " in line:
            self.cuts -= 1
            raise ConnectionAbortedError
        return line

    def _answered(self, line: bytes) -> bytes:
        if not self.behind or self._stream not in line:
            return line
        self.told, self.behind = self.told + 1, self.behind - 1
        self._to_refuse = self.silent
        return re.sub(rb'("last_seq":)(\d+)', lambda found: found[1] + b"0".rjust(len(found[2])), line)

    def cut(self) -> None:
        """End all connections."""
        for line in self._lines:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        self._lines = set()

    def stop(self) -> None:
        self.shutdown()
        self.cut()
        self.server_close()


@contextlib.contextmanager
def servers(folder: Path, count: int = 1, **options: str) -> Iterator[Servers]:
    """Running servers, which end with the block."""
    made = Servers(folder, count, **options)
    try:
        yield made.start()
    finally:
        made.stop()


def write(url: str, messages: list[tuple[str, bytes, dict[str, str]]]) -> None:
    """(subject, content, headers) as any client of the same account may send them, in order."""

    async def send() -> None:
        client = await nats.connect(url)
        for subject, content, headers in messages:
            await client.publish(subject, content, headers=headers or None)
        await client.drain()

    asyncio.run(send())


def append(url: str, stream: str, subject: str, entries: list[tuple[bytes, dict[str, str]]]) -> None:
    """(content, headers), each behind the entry that is then the last one, as if a sidecar wrote it."""

    async def send() -> None:
        client = await nats.connect(url)
        js = client.jetstream()
        for content, headers in entries:
            while True:
                last = (await js.stream_info(stream)).state.last_seq
                try:
                    await js.publish(subject, content, headers={"Nats-Expected-Last-Sequence": str(last)} | headers)
                    break
                except nats.js.errors.BadRequestError as error:
                    assert error.err_code == 10071, error  # a sidecar's was first
        await client.close()

    asyncio.run(send())


def write_headers(url: str, subject: str, blocks: list[bytes]) -> None:
    """Messages with these bytes in the place of their headers, which the server does not read."""
    login, _, address = url.partition("//")[2].rpartition("@")
    user, _, password = login.partition(":")
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        hello = {"verbose": False, "headers": True, "user": user, "pass": password}
        line.sendall(b"CONNECT %b\r\n" % json.dumps(hello).encode())
        for block in blocks:
            line.sendall(b"HPUB %b %d %d\r\n%bx\r\n" % (subject.encode(), len(block), len(block) + 1, block))
        line.sendall(b"PING\r\n")
        with line.makefile("rb") as answers:
            assert b"PONG\r\n" in iter(answers.readline, b"")


def last_entry(url: str, stream: str) -> Any:
    """The newest message of a stream: seq, data, headers."""

    async def read() -> Any:
        client = await nats.connect(url)
        js = client.jetstream()
        message = await js.get_msg(stream, (await js.stream_info(stream)).state.last_seq)
        await client.close()
        return message

    return asyncio.run(read())


class Team:
    """Sidecars on one project, each with its own storage, one secret and one clone of the repository for all."""

    def __init__(self, folder: Path, root: Path, backend: str, *options: str) -> None:
        self.folder, self.root, self.options = folder, root, ("--backend", backend, *options)
        self.sidecars: list[Service] = []

    def sidecar(self, *options: str, secret: str = SECRET) -> Service:
        """One more, not started yet."""
        storage = self.folder / f"sidecar-{len(self.sidecars)}"
        storage.mkdir(mode=0o700, parents=True)
        (storage / "jwt.secret").write_text(secret)
        (storage / "jwt.secret").chmod(0o600)
        self.sidecars.append(Service(self.root, storage, *self.options, *options))
        return self.sidecars[-1]

    def start(self, count: int, *options: str) -> list[Service]:
        """So many more, started at the same time."""
        made = [self.sidecar(*options) for _ in range(count)]
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(Service.start, made))

    def stop(self) -> list[int | None]:
        """End those that run, at the same time, also where they are paused: their exit codes, None where killed."""
        running = [sidecar for sidecar in self.sidecars if sidecar.process and sidecar.process.poll() is None]
        with ThreadPoolExecutor(max(1, len(running))) as pool:
            return list(pool.map(self._stop, running))

    def _stop(self, sidecar: Service) -> int | None:
        assert sidecar.process
        sidecar.process.send_signal(signal.SIGCONT)
        try:
            return sidecar.stop()
        except subprocess.TimeoutExpired:
            sidecar.kill()
            return None

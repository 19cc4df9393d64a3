"""A lean HTTP/1.1 client for benchmarks: one protocol object a connection, requests made ahead, answers counted."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import json
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any

NEW = b"00000000"  # so long that the length of a request stays
NUMBERS = map(b"%08d".__mod__, itertools.count(1))
LENGTH = re.compile(rb"[Cc]ontent-[Ll]ength: (\d+)")


def request_bytes(method: str, path: str, token: str = "", body: Any = None, **headers: str) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {token}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


class Wire(asyncio.Protocol):
    """One kept-alive connection. ``ask`` sends a request and resolves to (status, body)."""

    head = b""  # of the last answer

    def __init__(self) -> None:
        self._buffer = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def send(self, content: bytes) -> asyncio.Future[tuple[int, bytes]]:
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(content)  # type: ignore[attr-defined]
        return self._answer

    async def ask(self, content: bytes) -> tuple[int, bytes]:
        return await self.send(content)

    @property
    def headers(self) -> dict[str, str]:
        """Those of the last answer, by their names in small letters."""
        lines = [line.partition(": ") for line in self.head.decode("latin-1").split("\r\n")[1:]]
        return {name.lower(): value for name, _, value in lines}

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        match = LENGTH.search(self._buffer, 0, end)
        size = int(match[1]) if match else 0
        if len(self._buffer) < end + 4 + size:
            return
        self.head = self._buffer[:end]
        body = self._buffer[end + 4 : end + 4 + size]
        status = int(self._buffer[9:12])
        self._buffer = self._buffer[end + 4 + size :]
        if self._answer and not self._answer.done():
            self._answer.set_result((status, body))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("closed"))


async def connect(port: int, number: int) -> list[Wire]:
    """``number`` open connections to 127.0.0.1."""
    loop = asyncio.get_running_loop()
    wires = []
    for _ in range(number):
        _, wire = await loop.create_connection(Wire, "127.0.0.1", port)
        wires.append(wire)
    return wires


def close(wires: list[Wire]) -> None:
    for wire in wires:
        wire.transport.close()


class Repeat(asyncio.Protocol):
    """One connection that sends a request again as soon as its answer is there, until ``end``; answers are counted.

    A number that nothing had before stands in the place of NEW in each request.
    """

    def __init__(self, content: bytes, status: int, end: float) -> None:
        self._content, self._status, self._end = content, b"HTTP/1.1 %d " % status, end
        self._varies = NEW in content
        self._head, self._missing = b"", -1  # bytes of the body that are still to come; -1 before its head is there
        self.done = 0
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._send()

    def _send(self) -> None:
        self._transport.write(self._content.replace(NEW, next(NUMBERS)) if self._varies else self._content)

    def data_received(self, data: bytes) -> None:
        if self._missing < 0:
            self._head += data
            if (end := self._head.find(b"\r\n\r\n")) < 0:
                return None
            if not self._head.startswith(self._status):
                return self.connection_lost(AssertionError(self._head[:300].decode("utf-8", "replace")))
            match = LENGTH.search(self._head, 0, end)
            self._missing = (int(match[1]) if match else 0) - (len(self._head) - end - 4)
        else:
            self._missing -= len(data)
        if self._missing == 0:
            self._head, self._missing = b"", -1
            self.done += 1
            if time.perf_counter() < self._end:
                self._send()
            elif not self.over.done():
                self.over.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(error or ConnectionResetError("closed"))


async def repeated(port: int, content: bytes, status: int = 200, seconds: float = 1.0, connections: int = 32) -> float:
    """Answers a second to one request that ``connections`` connections repeat; each waits for its answer."""
    loop, began = asyncio.get_running_loop(), time.perf_counter()
    made = [
        await loop.create_connection(lambda: Repeat(content, status, began + seconds), "127.0.0.1", port)
        for _ in range(connections)
    ]
    try:
        await asyncio.gather(*(repeat.over for _, repeat in made))
        return sum(repeat.done for _, repeat in made) / (time.perf_counter() - began)
    finally:
        for transport, _ in made:
            transport.close()


def run(work: Coroutine[Any, Any, Any], seconds: float = 600) -> Any:
    """What ``work`` returns, on the fastest event loop there is: the client must not be what is measured. Raises
    TimeoutError after ``seconds``.
    """
    factory: Callable[[], Any] | None = None
    with contextlib.suppress(ImportError):
        factory = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(asyncio.wait_for(work, seconds))

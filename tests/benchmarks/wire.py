"""A lean HTTP/1.1 client for benchmarks: one protocol object a connection, requests made ahead, answers counted."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

LENGTH = re.compile(rb"[Cc]ontent-[Ll]ength: (\d+)")


def request_bytes(method: str, path: str, token: str = "", body: Any = None) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {token}"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


class Wire(asyncio.Protocol):
    """One kept-alive connection. ``ask`` sends a request and resolves to (status, body)."""

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

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        match = LENGTH.search(self._buffer, 0, end)
        size = int(match[1]) if match else 0
        if len(self._buffer) < end + 4 + size:
            return
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

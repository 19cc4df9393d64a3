"""The short form of the fuzzers, always with the same dice, and what they found before."""

from __future__ import annotations

import socket

import pytest
from conftest import Service


def exchange(service: Service, message: bytes) -> bytes:
    """All that comes back for these bytes until the service closes the line."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(message)
        return b"".join(iter(lambda: line.recv(65_536), b""))


@pytest.mark.parametrize("method", ["POST", "TRACE"])
def test_what_follows_a_refusal_that_ends_the_connection_is_not_answered(service: Service, method: str) -> None:
    refused = f"{method} /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n"
    answer = exchange(service, refused.encode() + b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") == 1 and answer.startswith(b"HTTP/1.1 40") and b"\r\nConnection: close\r\n" in answer

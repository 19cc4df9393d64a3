"""What is not well-formed HTTP is refused in JSON too, and the line is closed."""

from __future__ import annotations

import json
import socket

import pytest
from conftest import Service

HEAD = "POST /api/results HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"


@pytest.mark.parametrize(
    "request_text",
    [
        "GARBAGE\r\n\r\n", "GET /health HTTP/1.1\r\n\r\n", "GET /health HTTP/1.1\r\nHost: localhost, evil.example\r\n\r\n",
        HEAD + "Content-Length: abc\r\n\r\nhello", HEAD + "Content-Length: -1\r\n\r\n", HEAD + "Content-Length: +5\r\n\r\nhello",
        HEAD + "Content-Length: 5, 6\r\n\r\nhello", HEAD + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + "Transfer-Encoding: gzip\r\n\r\nhello", HEAD + "Content-Length: \r\n\r\n", HEAD + "Transfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n",
    ],
)  # fmt: skip
def test_malformed_http_gets_one_json_refusal(service: Service, request_text: str) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(request_text.format(token=service.token()).encode())
        answer = b""
        while chunk := line.recv(65_536):
            answer += chunk
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    error = json.loads(content)  # one answer, and nothing behind it
    assert (error["code"], error["error"]) == ("REQ_001", "bad_request")
    assert error["request_id"].encode() in head and error["timestamp"]
    assert "Traceback" not in service.log

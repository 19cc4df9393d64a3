"""The short form of the fuzzers, always with the same dice, and what they found before."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from conftest import PROJECT, ROOT, Client, Service


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


@pytest.mark.parametrize("unit", ["0", "a_", "aB", "a/", "a.", "é", "a-"])
def test_a_long_word_in_a_task_holds_nobody_up(unit: str) -> None:
    """It is searched in a process of its own, which can be ended: a search of the length's square would take hours."""
    code = f"import cco_sidecar; print(cco_sidecar.named_files(['src/main.py', 'x.py'], {unit!r} * 400_000 + ' see src/main.py.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "{'src/main.py'}\n", done.stderr


def test_a_result_with_no_time_of_its_own_is_as_the_document_says(service: Service, coder: Client) -> None:
    body = {"agent_id": "a-1", "agent_type": "python-specialist", "issue_id": "issue-1", "project_id": PROJECT, "result": {"status": "success"}}
    stored = coder.post("/api/results", body | {"timestamp": None}).json()
    assert coder.get(f"/api/results/{stored['id']}").json()["timestamp"] is None
    schema = coder.get("/openapi.json").json()["components"]["schemas"]["StoredResult"]["properties"]["timestamp"]
    assert {"type": "null"} in schema["anyOf"]


def test_a_path_that_is_written_out_has_its_own_methods(service: Service, coder: Client) -> None:
    assert coder.request("OPTIONS", "/api/agents/spawn").headers["Allow"] == "OPTIONS, POST"
    assert coder.request("OPTIONS", "/api/agents/other").headers["Allow"] == "DELETE, OPTIONS"

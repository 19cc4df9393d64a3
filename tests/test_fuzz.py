"""The short form of the fuzzers, always with the same dice, and what they found before."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import ROOT, Client, Service, body_of, make_repository, until
from fuzz_api import fuzz_api
from fuzz_http import HttpFuzzer, start_service


@pytest.fixture(scope="module")
def fuzzed(setup: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    yield from started(tmp_path_factory)


@pytest.fixture(scope="module")
def documented(setup: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Not once for each server of HTTP/1.1: what is asked lies behind them."""
    yield from started(tmp_path_factory)


def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("fuzzed")
    running = start_service(folder, make_repository(folder / "repository"))
    yield running
    assert running.stop() == 0, running.log
    assert "Traceback" not in running.log, running.log


@pytest.mark.parametrize("seed", [0, 1])
def test_mutated_requests_get_well_formed_answers_and_leave_nothing_behind(fuzzed: Service, seed: int) -> None:
    fuzzer, wanted = HttpFuzzer(fuzzed, seed), {200, 201, 400, 401, 404}
    # On a busy machine what few requests are answered 201 may take so long that the fuzzer has ended its side: go on.
    found = fuzzer.run(lambda count: count >= 300 and (wanted <= fuzzer.statuses.keys() or count >= 1500))
    assert found["answers"] > 200 and wanted <= found["statuses"].keys()


def test_the_service_is_as_its_openapi_document_says(documented: Service) -> None:
    said = fuzz_api(documented, "-n", "10", "--generation-deterministic", seconds=200)
    assert " generated" in said
    HttpFuzzer(documented, 0).settle()


def exchange(service: Service, message: bytes) -> bytes:
    """All that comes back for these bytes until the service closes the line."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(message)
        return b"".join(iter(lambda: line.recv(65_536), b""))


@pytest.mark.parametrize("line", ["POST /api/results", "POST /api/events/noted", "TRACE /nowhere"])
def test_what_follows_a_refusal_that_ends_the_connection_is_not_answered(service: Service, line: str) -> None:
    refused = f"{line} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n"
    answer = exchange(
        service, refused.encode() + b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    assert (
        answer.count(b"HTTP/1.1 ") == 1 and answer.startswith(b"HTTP/1.1 40") and b"\r\nConnection: close\r\n" in answer
    )


@pytest.mark.parametrize("unit", ["0", "a_", "aB", "a/", "a.", "é", "a-"])
def test_a_long_word_in_a_task_holds_nobody_up(unit: str) -> None:
    """It is searched in a process of its own, which can be ended: a search of the length's square would take hours."""
    ours = "keywords = cco_sidecar.import_file(pathlib.Path('plugins/context/keywords.py').resolve())"
    code = f"import cco_sidecar, pathlib; {ours}; print(keywords.named_files(['src/main.py', 'x.py'], {unit!r} * 400_000 + ' see src/main.py.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "{'src/main.py'}\n", done.stderr


def test_a_result_with_no_time_of_its_own_is_as_the_document_says(service: Service, coder: Client) -> None:
    stored = coder.post("/api/results", body_of() | {"timestamp": None}).json()
    assert coder.get(f"/api/results/{stored['id']}").json()["timestamp"] is None
    schema = coder.get("/openapi.json").json()["components"]["schemas"]["StoredResult"]["properties"]["timestamp"]
    assert {"type": "null"} in schema["anyOf"]


@pytest.mark.parametrize("since", [2**53, 2**63 - 1, 2**63, 10**30])
def test_a_log_is_empty_behind_its_end_however_far(fuzzed: Service, since: int) -> None:
    client = fuzzed.client()
    agent = client.spawn()["agent_id"]
    until(lambda: client.get(f"/api/agents/{agent}/status").json()["state"] == "completed")
    answer = client.get(f"/api/agents/{agent}/logs", since=since)
    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 400 or answer.json() == {"agent_id": agent, "text": "", "next_offset": 0, "offset": 0}

"""The audit log names what was acted on, keeps within its size and loses nothing that it still has room for."""

import http.client
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from agent_harness import COMMAND, spawn
from conftest import ROOT, Client, Service, body_of, plugin, until

import cco_sidecar

AuditLog, FinishedRequest = plugin("audit").AuditLog, plugin("_finished").FinishedRequest


def line(number: int) -> Any:
    return FinishedRequest(moment=0, request_id=f"req-{number}", remote="127.0.0.1", method="POST", status=201)


def test_the_audit_log_is_rotated_and_stays_private(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, max_bytes=1000, files=2)
    for number in range(20):
        log.record(line(number))
    log.close()
    log.record(line(99))  # after its end it takes nothing, and says nothing
    names = ["audit.log.2", "audit.log.1", "audit.log"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    kept = [json.loads(text)["request_id"] for name in names for text in (tmp_path / name).read_text().splitlines()]
    assert kept == [f"req-{number}" for number in range(20 - len(kept), 20)]
    assert all(
        (tmp_path / name).stat().st_size <= 1000 and (tmp_path / name).stat().st_mode & 0o777 == 0o600 for name in names
    )


def test_the_audit_log_goes_on_where_an_earlier_run_ended(tmp_path: Path) -> None:
    for number in range(2):
        log = AuditLog(tmp_path)
        log.record(line(number))
        log.close()
    written = (tmp_path / "audit.log").read_text().splitlines()
    assert [json.loads(text)["request_id"] for text in written] == ["req-0", "req-1"]


def test_a_line_that_was_cut_stays_in_the_file_that_is_rotated(tmp_path: Path) -> None:
    (tmp_path / "audit.log").write_text("{" * 990)
    log = AuditLog(tmp_path, max_bytes=1000)
    log.record(line(1))
    log.close()
    assert (tmp_path / "audit.log.1").read_text() == "{" * 990
    (written,) = (tmp_path / "audit.log").read_text().splitlines()
    assert json.loads(written)["request_id"] == "req-1"


def test_a_log_that_cannot_be_rotated_goes_on_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(tmp_path, max_bytes=1000, files=1)
    (tmp_path / "audit.log.1" / "in the way").mkdir(parents=True)
    for number in range(10):
        log.record(line(number))
    log.close()
    written = (tmp_path / "audit.log").read_text().splitlines()
    assert [json.loads(text)["request_id"] for text in written] == [f"req-{number}" for number in range(10)]
    assert "audit log: it cannot be rotated: " in caplog.text


def test_a_line_that_the_disk_does_not_take_is_told_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "storage"
    folder.mkdir()
    log = AuditLog(folder, max_bytes=1)  # a new file for each line
    folder.rename(tmp_path / "moved")
    for number in range(2):
        log.record(line(number))
    assert caplog.text.count("audit log: No such file or directory") == 2
    folder.mkdir()
    log.record(line(2))
    log.close()
    assert json.loads((folder / "audit.log").read_text())["request_id"] == "req-2"


FULL = """
import resource, sys
from pathlib import Path
from test_audit import AuditLog, line
def room(size):  # of any file
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
logs = AuditLog(Path(sys.argv[1]))
logs.record(line(0))
room(logs._size + 20)
logs.record(line(1))
logs.record(line(2))
room(resource.RLIM_INFINITY)
logs.record(line(3))
room(logs._size + 20)
logs.record(line(4))
logs.close()
room(resource.RLIM_INFINITY)
logs = AuditLog(Path(sys.argv[1]))
logs.record(line(5))
"""


def test_a_line_that_the_disk_takes_in_part_is_told_and_spoils_no_other(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [text for text in done.stderr.splitlines() if "is cut" in text] == [
        f"audit log: the line of req-{number} is cut: the disk is full" for number in (1, 4)
    ]
    written = (tmp_path / "audit.log").read_text().splitlines()
    whole = [json.loads(text)["request_id"] for text in written if text.endswith("}")]
    assert whole == ["req-0", "req-3", "req-5"] and len(written) == 5


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_service_whose_audit_log_cannot_be_opened_does_not_start(
    make_service: Any, tmp_path: Path, repository: Path, make: Callable[[Path], None]
) -> None:
    (tmp_path / "storage").mkdir(mode=0o700)
    make(tmp_path / "storage/audit.log")
    service = Service(repository, tmp_path / "storage")
    with pytest.raises(AssertionError):
        service.start()
    assert service.process and service.process.wait(120) == 2
    assert "cco: the audit log in " in service.log and "Traceback" not in service.log


NAMES = ("issue_id", "agent_id", "result_id", "event_id")


def acted_on(service: Service, answer: requests.Response) -> dict[str, str]:
    """What the audit line of a request names."""
    (found,) = until(lambda: lines_of(service, answer.headers["X-Request-ID"]))
    return {name: found[name] for name in NAMES if found[name] is not None}


def lines_of(service: Service, request_id: str) -> list[dict[str, Any]]:
    return [line for line in service.audit() if line["request_id"] == request_id]


def test_what_was_stored_published_and_spawned_is_named(make_service: Any) -> None:
    service = make_service(*COMMAND, "--stop-agents")
    architect = service.client()
    event = {"publisher": "tester", "topic": "test", "data": {"issue_id": "issue-2"}}
    asked = {"agent_type": "python-specialist", "issue_id": "issue-3", "task": "hang"}
    for headers in ({}, {"Idempotency-Key": str(uuid.uuid4())}):
        for _ in range(2):  # with the key the second one is a replay, which names the same
            answer = architect.post("/api/results", body_of() | {"id": "a field of the sender"}, headers=headers)
            stored = answer.json()
            assert acted_on(service, answer) == {
                "issue_id": "issue-1", "agent_id": "python-specialist-1",
                "result_id": stored["id"], "event_id": stored["event_id"],
            }  # fmt: skip
            answer = architect.post("/api/events/noted", event, headers=headers)
            assert acted_on(service, answer) == {"issue_id": "issue-2", "event_id": answer.json()["event_id"]}
            answer = architect.post("/api/agents/spawn", asked, headers=headers)
            assert acted_on(service, answer) == {"issue_id": "issue-3", "agent_id": answer.json()["agent_id"]}


def test_what_was_ended_and_cleared_is_named(make_service: Any) -> None:
    service = make_service(*COMMAND, "--stop-agents")
    architect = service.client()
    agent_id = spawn(architect, "hang", "issue-1")["agent_id"]
    assert acted_on(service, architect.delete(f"/api/agents/{agent_id}")) == {
        "issue_id": "issue-1",
        "agent_id": agent_id,
    }
    architect.get("/api/context/issue-2/python-specialist")
    assert acted_on(service, architect.delete("/api/cache/context/issue-2")) == {"issue_id": "issue-2"}
    assert (
        acted_on(service, architect.delete("/api/cache/all"))
        == acted_on(service, architect.post("/api/auth/refresh"))
        == {}
    )


def test_what_a_refused_request_was_about_is_named(service: Service, architect: Client) -> None:
    narrow = service.client(issue_id="issue-1")
    body = body_of("issue-2")
    for answer, named in (
        (narrow.post("/api/results", body), {"issue_id": "issue-2", "agent_id": "python-specialist-1"}),
        (architect.post("/api/results", body | {"project_id": "another"}), {}),
        (narrow.get("/api/context/issue-3/python-specialist"), {"issue_id": "issue-3"}),
        (architect.get("/api/results/result-unknown"), {"result_id": "result-unknown"}),
        (architect.delete("/api/agents/nobody"), {"agent_id": "nobody"}),
        (narrow.post("/api/events/noted", {"publisher": "p", "topic": "t", "data": {"issue_id": ["x"]}}), {}),
        (
            narrow.post("/api/events/noted", {"publisher": "p", "topic": "t", "data": {"issue_id": "y" * 1000}}),
            {"issue_id": "y" * 128},
        ),
        (Client(service.url, None).delete("/api/agents/a-2"), {"agent_id": "a-2"}),
        (architect.delete("/api/cache/context/..%2F"), {}),
    ):
        assert answer.status_code >= 400 and acted_on(service, answer) == named, answer.text


@pytest.mark.parametrize("method", ["BREW", "get", "PROPFIND"])
@pytest.mark.parametrize("path", ["/api/results", "/api/results/result-1", "/nowhere"])
def test_a_method_that_nobody_knows_is_audited_and_no_failure(service: Service, method: str, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(service.url.rpartition(":")[2]), timeout=10)
    connection.request(method, path)
    answer = connection.getresponse()
    body = json.loads(answer.read())
    assert answer.status in (404, 405)
    connection.close()
    (line,) = until(lambda: lines_of(service, body["request_id"]))
    assert (line["method"], line["path"], line["status"], line["outcome"]) == (method, path, answer.status, "refused")
    assert "Traceback" not in service.log and "Uncaught" not in service.log, service.log


def test_the_body_of_a_client_that_hung_up_stays_until_it_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cco_sidecar.Handler, "finished", lambda *_: None)
    kind = plugin("audit").AuditedEndpoint
    endpoint = kind.__new__(kind)
    endpoint.given, endpoint.reading = {"topic": "t"}, True
    endpoint.finished(499, 0.0)
    assert endpoint.given == {"topic": "t"}
    endpoint.finished(202, 0.0)
    assert endpoint.given is None

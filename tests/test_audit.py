"""The audit log keeps within its size and loses nothing that it still has room for."""

import json
import os
from pathlib import Path

from cco_sidecar import AuditLine, AuditLog


def line(number: int) -> AuditLine:
    return AuditLine("2026-01-01T00:00:00Z", f"req-{number}", "127.0.0.1", "me", "qa-engineer", "POST", "/api/results", 201, "done", None, None)


def test_the_audit_log_is_rotated_and_stays_private(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, max_bytes=1000, files=2)
    log.open()
    for number in range(20):
        log.write(line(number))
    log.close()
    log.write(line(99))  # after its end it takes nothing, and says nothing
    names = ["audit.log.2", "audit.log.1", "audit.log"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    kept = [json.loads(text)["request_id"] for name in names for text in (tmp_path / name).read_text().splitlines()]
    assert kept == [f"req-{number}" for number in range(20 - len(kept), 20)]
    assert all((tmp_path / name).stat().st_size <= 1000 and (tmp_path / name).stat().st_mode & 0o777 == 0o600 for name in names)


def test_the_audit_log_goes_on_where_an_earlier_run_ended(tmp_path: Path) -> None:
    for number in range(2):
        log = AuditLog(tmp_path)
        log.open()
        log.write(line(number))
        log.close()
    assert [json.loads(text)["request_id"] for text in (tmp_path / "audit.log").read_text().splitlines()] == ["req-0", "req-1"]

"""GET /health and GET /status tell what was measured."""

from pathlib import Path

import pytest
from conftest import Client, Service

from cco_sidecar import FolderSize


def test_health_needs_no_token_and_reports_real_checks(service: Service) -> None:
    answer = Client(service.url, None).get("/health")
    assert answer.status_code == 200
    health = answer.json()
    assert health["status"] == health["checks"]["storage"] == health["checks"]["event_bus"] == "healthy"
    assert health["checks"]["memory_usage_mb"] > 10
    assert health["checks"]["disk_space_available_mb"] > 0
    assert health["project_id"] == "project-abc"
    assert health["instance_id"] == service.info["instance_id"] and len(service.info["instance_id"]) >= 32


@pytest.mark.parametrize("seconds", [0.0, 0.01, 2.0])
def test_the_storage_is_counted_again_after_fifty_times_as_long_as_counting_took(
    tmp_path: Path, seconds: float
) -> None:
    times = iter([10.0, 10.0 + seconds, 10.0 + 50 * seconds, 10.0 + 52 * seconds, 10.0 + 52 * seconds])
    size = FolderSize(tmp_path, lambda: next(times))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/first").write_bytes(b"x" * 7)
    assert size.look() == 7
    (tmp_path / "second").write_bytes(b"x" * 5)
    if seconds:
        assert size.look() == 7
    assert size.look() == 12


def test_status_needs_a_token(service: Service) -> None:
    assert Client(service.url, None).get("/status").status_code == 401


def test_status_counts_what_happened(architect: Client, issue: str) -> None:
    before = architect.get("/status").json()
    architect.publish("counted", {"issue_id": issue})
    assert architect.wait("counted", filter=f"issue_id:{issue}")["events"]
    architect.store("python-specialist", issue=issue)
    after = architect.get("/status").json()
    assert after["events"]["total_published"] == before["events"]["total_published"] + 2
    assert after["events"]["total_delivered"] == before["events"]["total_delivered"] + 1
    assert after["storage"]["results_stored"] == before["storage"]["results_stored"] + 1
    assert after["performance"]["requests_per_second"] > 0

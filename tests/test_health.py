"""GET /health and GET /status tell what was measured."""

import time
from types import SimpleNamespace

import psutil
import pytest
from conftest import Client, Service, until

import cco_sidecar


def test_health_needs_no_token_and_reports_real_checks(service: Service) -> None:
    answer = Client(service.url, None).get("/health")
    assert answer.status_code == 200
    health = answer.json()
    assert health["status"] == health["checks"]["storage"] == health["checks"]["event_bus"] == "healthy"
    assert health["checks"]["memory_usage_mb"] > 10
    assert health["checks"]["disk_space_available_mb"] > 0
    assert health["project_id"] == "project-abc"
    assert health["instance_id"] == service.info["instance_id"] and len(service.info["instance_id"]) >= 32


def test_nothing_wakes_a_service_that_nobody_asks(service: Service) -> None:
    assert service.process
    process = psutil.Process(service.process.pid)

    def slept() -> bool:
        before = process.num_ctx_switches().voluntary
        time.sleep(1.5)  # what looks again and again does so at least once in a second
        return process.num_ctx_switches().voluntary == before

    until(slept)


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
    assert before["storage"]["total_size_mb"] > 0.01  # an empty database has a page for each table and index


@pytest.mark.parametrize(("each_second", "seconds"), [(1, 300), (100, 90), (150, 30), (3_000, 70), (15_000, 3)])
def test_rates_are_true_of_few_and_of_many_requests(
    each_second: int, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 1_000.0
    monkeypatch.setattr(cco_sidecar, "time", SimpleNamespace(monotonic=lambda: clock))
    metrics = cco_sidecar.Metrics()
    for number in range(each_second * seconds):
        clock = 1_000.0 + number / each_second
        metrics.record(0.002, failed=number % 10 == 0)
    told = metrics.statistics()
    assert told["requests_per_second"] == pytest.approx(each_second, rel=0.03)
    assert told["errors_per_minute"] == pytest.approx(6 * each_second, rel=0.1)
    assert told["avg_response_time_ms"] == told["p99_response_time_ms"] == 2.0

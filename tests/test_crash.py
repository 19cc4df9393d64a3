"""The short forms of the crash tests."""

from pathlib import Path

from crash_agents import CrashAgents
from crash_events import CrashTest


def test_no_confirmed_event_is_lost_or_out_of_order_over_kills(tmp_path: Path) -> None:
    found = CrashTest(tmp_path, publishers=4, consumers=4).run(3)
    assert found["confirmed"] > 60


def test_every_process_belongs_to_a_running_agent_over_kills(tmp_path: Path) -> None:
    found = CrashAgents(tmp_path).run(5)
    assert found["confirmed"] > 10 and found["processes left"] == found["strangers killed"] == 0

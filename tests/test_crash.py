"""The short form of the crash test."""

from pathlib import Path

from crash_events import CrashTest


def test_no_confirmed_event_is_lost_or_out_of_order_over_kills(tmp_path: Path) -> None:
    found = CrashTest(tmp_path, publishers=4, consumers=4).run(3)
    assert found["confirmed"] > 60

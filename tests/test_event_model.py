"""Random publishes, waits, hang-ups, restarts and expiries against a plain model of what the bus promises."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import Client, Service, git, until
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import cco_sidecar

TYPES = st.sampled_from(["alpha", "beta"])
ISSUES = st.sampled_from(["issue-1", "issue-2"])
READERS = st.sampled_from(["ann", "bob"])
WATCHED = st.sampled_from(["alpha", "beta", "*"])
FILTERS = st.sampled_from(["", "issue_id:issue-1", "issue_id:!issue-1", "number:1*"])


def passes(filter: str, event: dict[str, Any]) -> bool:
    issue, number = event["data"]["issue_id"], str(event["data"]["number"])
    return {
        "": True,
        "issue_id:issue-1": issue == "issue-1",
        "issue_id:!issue-1": issue != "issue-1",
        "number:1*": number.startswith("1"),
    }[filter]


class BusMachine(RuleBasedStateMachine):
    """The model: a list of events, a position per reader, type and filter, and a cursor that the client keeps."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name) / "repository"
        root.mkdir()
        git(root, "init", "-q")
        self.service = Service(root, Path(self.folder.name) / "storage").start()
        self.log: list[dict[str, Any]] = []
        self.positions: dict[tuple[str, str, str], int] = {}
        self.cursor, self.cursor_at = "earliest", 0

    def client(self, name: str = "publisher") -> Client:
        return self.service.client("chief-architect", sub=name)

    @rule(type=TYPES, issue=ISSUES, brief=st.sampled_from([False, False, False, True]))
    def publish(self, type: str, issue: str, brief: bool) -> None:
        data = {"issue_id": issue, "number": len(self.log)}
        answer = self.client().publish(type, data, **({"ttl_seconds": 1} if brief else {}))
        self.log.append({"id": answer["event_id"], "type": type, "data": data, "brief": brief})

    def expected(self, begin: int, watched: str, filter: str) -> list[str]:
        return [
            e["id"] for e in self.log[begin:] if not e["brief"] and watched in ("*", e["type"]) and passes(filter, e)
        ]

    def check(self, answer: Any, begin: int, watched: str, filter: str) -> None:
        """Brief events may have expired or not; everything else must be there, once, in order, and nothing besides."""
        brief = {event["id"] for event in self.log if event["brief"]}
        got = [event["event_id"] for event in answer["events"]]
        assert got == sorted(set(got))
        assert [id for id in got if id not in brief] == self.expected(begin, watched, filter)
        assert answer["more_available"] is False
        assert bool(got) is not answer.get("timeout", False)

    @rule(reader=READERS, watched=WATCHED, filter=FILTERS)
    def wait(self, reader: str, watched: str, filter: str) -> None:
        answer = self.client(reader).wait(watched, filter=filter, timeout=0, limit=1000)
        self.check(answer, self.positions.get((reader, watched, filter), 0), watched, filter)
        self.positions[reader, watched, filter] = len(self.log)

    @rule(watched=WATCHED, filter=FILTERS)
    def wait_since(self, watched: str, filter: str) -> None:
        answer = self.client("cursor").wait(watched, filter=filter, since=self.cursor, timeout=0, limit=1000)
        self.check(answer, self.cursor_at, watched, filter)
        self.cursor, self.cursor_at = answer["scanned_to"], len(self.log)

    @rule(type=TYPES, issue=ISSUES)
    def wake(self, type: str, issue: str) -> None:
        """A waiter that is parked gets exactly the event that is published next."""
        waiter, answers = self.client("waker"), []
        thread = threading.Thread(
            target=lambda: answers.append(waiter.wait(type, filter=f"issue_id:{issue}", since="latest", timeout=20_000))
        )
        thread.start()
        until(lambda: self.client().get("/status").json()["events"]["active_subscriptions"] == 1)
        self.publish(type=type, issue=issue, brief=False)
        thread.join(20)
        assert [event["event_id"] for event in answers[0]["events"]] == [self.log[-1]["id"]]

    @rule(reader=READERS, watched=WATCHED)
    def hang_up(self, reader: str, watched: str) -> None:
        """A poll that goes away before anything came moves nothing."""
        filter = "number:none"
        client = self.client(reader)
        with contextlib.suppress(OSError):
            client.request("GET", f"/api/events/wait/{watched}?filter={filter}&timeout=20000", timeout=(5, 0.05))
        client.session.close()
        until(lambda: self.client().get("/status").json()["events"]["active_subscriptions"] == 0)

    @rule()
    def restart(self) -> None:
        assert self.service.stop() == 0, self.service.log
        self.service.start()

    @invariant()
    def ids_sort_in_order(self) -> None:
        known = [event["id"] for event in getattr(self, "log", [])]
        assert known == sorted(set(known))

    def teardown(self) -> None:
        if hasattr(self, "service"):
            self.service.stop()
            self.folder.cleanup()


TestBus = BusMachine.TestCase
EXAMPLES = int(os.environ.get("EVENT_MODEL_EXAMPLES", "5"))
TestBus.settings = settings(max_examples=EXAMPLES, stateful_step_count=15, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(
    ("value", "named"),
    [([], []), ([{"x": 1}, "I-1"], ["", "I-1"]), ({"x": 1}, [""]), (["I-1", 7], ["I-1", "7"]), (None, [])],
)
def test_what_is_no_scalar_is_an_issue_of_nobody(value: Any, named: list[str]) -> None:
    assert (
        cco_sidecar.issues_named({"issue_id": value})
        == cco_sidecar.issues_named({"data": {"issue_id": value}})
        == named
    )

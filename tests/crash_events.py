"""Kill the service again and again under load: every confirmed event reaches every consumer, in one order.

    python -m tests.crash_events --kills 30

Eight publishers, eight consumers (half keep a cursor with ``since``, half rely on the position that the service
remembers), SIGKILL at random moments, restart on the same storage. The suite runs a short form of this.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import Client, Service, git, until


class CrashTest:
    def __init__(self, folder: Path, *, publishers: int = 8, consumers: int = 8, seed: int = 0) -> None:
        root = folder / "repository"
        root.mkdir()
        git(root, "init", "-q")
        self.service = Service(root, folder / "storage", "--event-limit", "10000000").start()
        self.random = random.Random(seed)
        self.publishing = threading.Event()
        self.publishing.set()
        self.confirmed: set[str] = set()
        self.seen: list[list[str]] = [[] for _ in range(consumers)]
        self.threads = [
            threading.Thread(target=self._publish, args=(number,), daemon=True) for number in range(publishers)
        ]
        self.consumers = [
            threading.Thread(target=self._consume, args=(number,), daemon=True) for number in range(consumers)
        ]
        self.last: str | None = None

    def _client(self, name: str) -> Client:
        return self.service.client("chief-architect", sub=name)

    def _publish(self, number: int) -> None:
        client, count = self._client(f"publisher-{number}"), 0
        while self.publishing.is_set():
            try:
                event = client.publish("crash", {"from": number, "count": count})
            except (requests.RequestException, AssertionError):
                time.sleep(0.02)
                client = self._client(f"publisher-{number}")
                continue
            self.confirmed.add(event["event_id"])
            count += 1

    def _consume(self, number: int) -> None:
        """Even numbers keep a cursor, odd ones let the service remember. Ends with the last event."""
        client, params = self._client(f"consumer-{number}"), {"since": "earliest"} if number % 2 == 0 else {}
        while self.last is None or not self.seen[number] or max(self.seen[number]) < self.last:
            try:
                answer = client.wait("crash", timeout=1000, limit=200, **params)
            except (requests.RequestException, AssertionError):
                time.sleep(0.02)
                client = self._client(f"consumer-{number}")
                continue
            self.seen[number] += [event["event_id"] for event in answer["events"]]
            if "since" in params:
                params["since"] = answer["scanned_to"]

    def run(self, kills: int) -> dict[str, Any]:
        """Kill ``kills`` times, then check; what was found. Raises AssertionError."""
        for thread in (*self.threads, *self.consumers):
            thread.start()
        for _ in range(kills):
            before = len(self.confirmed)
            until(lambda before=before: len(self.confirmed) > before + 20, 60)  # some work between the crashes
            time.sleep(self.random.uniform(0, 0.3))  # the random moment is the point here
            self.service.kill()
            self.service.start()
        self.publishing.clear()
        for thread in self.threads:
            thread.join(60)
        self.last = self._client("closer").publish("crash", {"last": True})["event_id"]
        self.confirmed.add(self.last)
        for thread in self.consumers:
            thread.join(120)
            assert not thread.is_alive(), "a consumer never saw the last event"
        self._check()
        duplicates = sum(len(seen) - len(set(seen)) for seen in self.seen[1::2])
        assert self.service.stop() == 0
        return {
            "kills": kills,
            "confirmed": len(self.confirmed),
            "delivered": sum(map(len, self.seen)),
            "repeats to positions": duplicates,
        }

    def _check(self) -> None:
        for number, seen in enumerate(self.seen):
            assert not self.confirmed - set(seen), f"consumer {number} missed {len(self.confirmed - set(seen))} events"
            first_time = list(dict.fromkeys(seen))
            assert first_time == sorted(first_time), f"consumer {number} saw another order"
            assert number % 2 or seen == first_time, f"consumer {number} saw an event twice with since"
        assert len({tuple(dict.fromkeys(seen)) for seen in self.seen}) == 1, "consumers disagree"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(CrashTest(Path(folder), seed=options.seed).run(options.kills))


if __name__ == "__main__":
    main()

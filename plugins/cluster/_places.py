"""Where in the log an entry of ours is, if it is: the one behind the last that was applied decides."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

from cco_sidecar_plugins.cluster._follower import Follower
from cco_sidecar_plugins.cluster._nats_large import LogAway
from cco_sidecar_plugins.cluster._nats_log import Entry, NatsLog

TAKES_NOTHING = "the log takes nothing at this moment"
CAUSES = (
    "its servers choose a leader, too few of them are there, or the disk of one was full, which has to be started again"
    " then"
)
OURS = "ours"  # in the place of the id of an entry that the log has confirmed


class Places:
    """``find`` blocks; it is the writer thread's. ``stir`` is set when something was heard."""

    AGAIN = 1.0  # seconds between two attempts while the log takes nothing

    def __init__(self, nats_log: NatsLog, follower: Follower, node: str, patience: float) -> None:
        self._log, self._follower, self._node, self._patience = nats_log, follower, node, patience
        self.stir = threading.Event()
        self._closing = False
        self._try_at = 0.0  # while the log takes nothing: before that writers are refused at once
        self.refusal = f"{TAKES_NOTHING}: {CAUSES}"  # in words

    def close(self) -> None:
        """Nothing is waited for any longer."""
        self._closing = True
        self.stir.set()

    def problem(self) -> str | None:
        """Why nothing can be written, None where nothing is known to be in the way."""
        unread = None if self._follower.joined else "the log is not read yet"
        problem = self._follower.fault or self._log.problem or unread
        return problem and f"nats: {problem}"

    def find(self, content: bytes) -> int | None:
        """The number that our entry has in the log; None where its place has another one. Raises LogAway where nothing
        is decided in time: then whatever is heard next is applied, and be it ours.
        """
        now, problem = time.monotonic(), self.problem()
        if not self._follower.joined or self._follower.fault or now < self._try_at:
            raise LogAway(problem or f"nats: {self.refusal}")
        patience = 2 * self._log.API_SECONDS if self._try_at else self._patience
        deadline, id = now + patience + len(content) / 2_000_000, f"{self._node}-{uuid.uuid4().hex}"
        while time.monotonic() < deadline and not self._closing:
            attempt = self._log.publish(content, self._follower.applied, id)
            attempt.add_done_callback(lambda _: self.stir.set())
            try:
                entry = self._wait_for_place(attempt, deadline)
            except LogAway as error:
                if not self._log.problem:  # which says more
                    self.refusal = f"{TAKES_NOTHING} ({error}): {CAUSES}"
                continue
            if entry is not None:
                self._try_at, self.refusal = 0.0, f"{TAKES_NOTHING}: {CAUSES}"
                return entry.seq if entry.id in (id, OURS) else None
        self._try_at = time.monotonic() + self.AGAIN
        problem = self.problem()
        self._log.reconnect(self.refusal)
        raise LogAway(problem or f"nats: {self.refusal}")

    def _wait_for_place(self, attempt: Any, deadline: float) -> Entry | None:
        """The entry that has the next place in the log, None where the time is up. Raises LogAway where the attempt to
        write one failed, after a moment in which another sidecar's would have been heard.
        """
        following = self._follower.applied + 1
        while (left := deadline - time.monotonic()) > 0 and not self._closing:
            self.stir.clear()
            if (entry := self._follower.next_entry()) is not None:
                return entry
            if attempt.done():
                error = LogAway("cancelled") if attempt.cancelled() else attempt.exception()
                if error is None and attempt.result() == following:
                    return Entry(following, OURS, following - 1, b"")
                self.stir.wait(min(left, 0.1))
                if (entry := self._follower.next_entry()) is not None:
                    return entry
                raise error or LogAway("the log answered with another place")
            self.stir.wait(left)
        return None

"""What a sidecar does with the log of all: it applies each entry to its replica, in order, on the writer thread."""

from __future__ import annotations

import collections
import contextlib
import itertools
import sqlite3
import time
from collections.abc import Callable
from typing import Any

from cco_sidecar import SCHEMA_VERSION, Inserted, log, open_database
from cco_sidecar_plugins.cluster._nats_large import LogAway
from cco_sidecar_plugins.cluster._nats_log import Entry, Joined
from cco_sidecar_plugins.cluster._replica import EVENT, FORMAT, Replica, event_of
from cco_sidecar_plugins.cluster._snapshots import Snapshots
from cco_sidecar_plugins.storage._log import REPLICA
from cco_sidecar_plugins.storage._recovery import RecoveredFiles


class Follower:
    """``hear`` takes what comes out of the log, in the client's thread; all else is the writer thread's.

    ``tell`` gets the events that others published and the subjects whose tokens they revoked. After a snapshot it is
    called in any case: the events of what is new may have expired already.
    """

    AT_ONCE = 256  # entries that are applied in one transaction
    LATEST = (
        "select project, issue, agent_type, id, body from result where seq in"
        " (select max(seq) from result where seq > ? group by project, issue, agent_type)"
    )

    def __init__(
        self,
        replica: Replica,
        secret: str,
        files: RecoveredFiles,
        snapshots: Snapshots,
        tell: Callable[[Inserted, list[str]], None],
    ) -> None:
        self.replica, self._secret, self._tell, self._snapshots = replica, secret, tell, snapshots
        self._files = files
        self._heard: collections.deque[Joined | Entry] = collections.deque()
        self.epoch, self.applied = replica.meta("log") or "", int(replica.meta("applied") or 0)
        self.joined: Joined | None = None
        self.fault: str | None = None  # why this sidecar takes no part in the log, which is reached
        self.starting = True  # then it is for the start to say what is wrong
        self._told = ""  # the fault that the log was told of last
        self._newer = 0  # the snapshot that a newer version of this program made
        self.restored = 0  # how often a snapshot took the replica's place
        self.weight = 0  # bytes of the entries heard

    def hear(self, item: Joined | Entry) -> None:
        if isinstance(item, Entry):
            self.weight += len(item.content)
        self._heard.append(item)

    def waiting(self) -> bool:
        """Whether something that was heard is not applied yet."""
        return bool(self._heard)

    def next_entry(self) -> Entry | None:
        """The first entry that is not applied yet, where one was heard."""
        self._drop_applied()
        first = [self._heard[number] for number in range(min(3, len(self._heard)))]  # a Joined may come before it
        return next((item for item in first if isinstance(item, Entry) and item.seq > self.applied), None)

    def _drop_applied(self) -> None:
        while self._heard and isinstance(first := self._heard[0], Entry) and first.seq <= self.applied:
            self._heard.popleft()

    def catch_up(self) -> None:
        """Apply all that was heard. Raises StorageError where that cannot be done now: what is left is tried again."""
        while True:
            self._drop_applied()
            if not self._heard:
                return
            first = self._heard[0]
            if isinstance(first, Joined):
                self._take_part(first)
                self._heard.popleft()
            elif self.fault:
                self._heard.popleft()  # it is heard anew by who joins
            elif first.seq > self.applied + 1:
                self._jump(first.seq - 1)
            else:
                number = min(self.AT_ONCE, len(self._heard))
                heard = [self._heard[place] for place in range(number)]
                self._apply(list(itertools.takewhile(lambda item: isinstance(item, Entry), heard)))

    def _take_part(self, joined: Joined) -> None:
        """Make sure that the log is ours; note it where this is the first one that we know."""
        if fault := self._problem(joined):
            self._stand_aside(fault)
            return
        self.joined = self.fault = None
        epoch = joined.metadata["epoch"]
        if not self.epoch:
            self.replica.begin(time.time())
            self.replica.set_meta("log", epoch)
            self.replica.commit()
            self.epoch = epoch
        if joined.first > self.applied + 1:
            self._jump(joined.first - 1)
        if not self.fault:
            self.joined, self._told = joined, ""

    def _stand_aside(self, fault: str) -> None:
        """Take no part in the log, and say why once."""
        self.joined, self.fault = None, fault
        if fault != self._told and not self.starting:
            log.error("the log at NATS: %s", fault)
            self._told = fault

    def _problem(self, joined: Joined) -> str | None:
        """Why this sidecar cannot take part."""
        name, epoch = REPLICA, joined.metadata.get("epoch", "")
        if not epoch or joined.metadata.get("format") != str(FORMAT):
            return "the stream was made by another program, or by another version of this one"
        if joined.metadata.get("secret") != self._secret:
            problem = "this sidecar signs tokens with another secret than the others of its project"
            remedy = (
                "give all of them the same CCO_SIDECAR_JWT_SECRET, or a copy of one jwt.secret in the storage folder"
            )
            return f"{problem}: {remedy}"
        if self.epoch and epoch != self.epoch:
            return f"the log is another one than {name} has applied: move that file away to begin anew"
        if joined.applied > joined.last:
            return f"the log ends before what {name} has of it; if it stays so, move that file away to begin anew"
        return None

    def _apply(self, entries: list[Any]) -> None:
        """Apply entries of the log, as far as they follow each other, in one transaction, and tell what happened."""
        replica, applied = self.replica, self.applied
        try:
            replica.begin(time.time())
            for entry in entries:
                if entry.seq == applied + 1:
                    applied = entry.seq
                    if entry.after == entry.seq - 1:
                        replica.apply(entry.content)
                    else:
                        log.warning("entry %d of the log is not of a sidecar's: it is passed over", entry.seq)
                elif entry.seq > applied:
                    break
            self.note(applied)
        except BaseException:
            replica.rollback()
            raise
        self._files.put(replica.results)
        if replica.inserted or replica.ended:
            self._tell(replica.inserted, replica.ended)

    def note(self, applied: int) -> None:
        """Commit the transaction as the one that has applied this entry."""
        self.replica.set_meta("applied", str(applied))
        self.replica.commit()
        self.applied = applied

    def _jump(self, needed: int) -> None:
        """Take the newest snapshot in the place of entries that are no longer there, unless a newer version made it.
        Raises StorageError.
        """
        gone = f"entries {self.applied + 1} to {needed} of the log are not there"
        newest = self._snapshots.newest()
        if newest is None or newest < needed:
            raise LogAway(f"{gone}, and no snapshot has them")
        replica, head, stored = self.replica, self.replica.head(), self.replica.one("select max(seq) from result") or 0
        port = replica.meta("port")
        if not self._restore(newest):
            self._stand_aside("a newer version of this program made the snapshot that is needed: update this one")
            return
        log.info("the log at NATS: %s, a snapshot is", gone)
        self.restored += 1
        self.epoch, self.applied = replica.meta("log") or "", int(replica.meta("applied") or 0)
        replica.begin(time.time())
        if port:
            replica.set_meta("port", port)
        self.note(self.applied)  # also so that the database's log, which was just cut, has a beginning
        events = replica.rows(f"select seq, {', '.join(EVENT)} from event where seq > ? order by seq", head)
        told = [(event_of([row[name] for name in EVENT]), row["seq"]) for row in events]
        self._files.put(replica.rows(self.LATEST, stored))
        self._tell(told, [row[0] for row in replica.rows("select subject from revoked")])

    def _restore(self, snapshot: int) -> bool:
        """Let it take the replica's place; False where a newer version made it, as no later start would open that."""
        if snapshot != self._newer:
            with self._snapshots.fetched(snapshot) as file:
                with contextlib.closing(sqlite3.connect(file)) as found:
                    version = found.execute("pragma user_version").fetchone()[0]
                if version <= SCHEMA_VERSION:  # an older one lacks what this version and its plugins have added
                    with contextlib.closing(type(self.replica)(open_database(file))) as source:
                        self.replica.restore(source)
                    return True
            self._newer = snapshot
        return False

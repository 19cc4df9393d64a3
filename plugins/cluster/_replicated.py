"""A Storage whose transactions are entries of a log that many sidecars write, and that all of them apply."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import random
import re
import time
import typing
import uuid
from typing import Any

import msgspec

from cco_sidecar import (
    ApiError,
    Endpoint,
    Inserted,
    Job,
    Pool,
    Records,
    SidecarInfo,
    StartError,
    StorageError,
    log,
    one_line,
    write_file,
)
from cco_sidecar_plugins._files import content_of
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.cluster._follower import Follower
from cco_sidecar_plugins.cluster._nats_large import LogAway
from cco_sidecar_plugins.cluster._nats_log import Entry, Joined, NatsLog
from cco_sidecar_plugins.cluster._options import LogOptions
from cco_sidecar_plugins.cluster._peers import Peers
from cco_sidecar_plugins.cluster._places import Places
from cco_sidecar_plugins.cluster._replica import FORMAT, Replica
from cco_sidecar_plugins.cluster._seal import Seal
from cco_sidecar_plugins.cluster._snapshots import Snapshots
from cco_sidecar_plugins.storage._log import REPLICA
from cco_sidecar_plugins.storage.guard import GuardedStorage


class ReplicatedStorage(GuardedStorage):
    """The writer thread does the jobs on the replica and writes what they changed as one entry, which has to be the
    next one behind the last that was applied. The entry at this place decides: ours, and the transaction is committed;
    another sidecar's, and it is rolled back, that one is applied, and the jobs are done again.
    """

    _settings: PluginSettings

    FILE = REPLICA
    JOIN_SECONDS = 5.0  # for which a start waits for the log
    ENTRY_BYTES = 4_000_000  # after which no more jobs join a transaction
    PROBE_SECONDS = 1.9  # /health waits a little longer
    LOOK_SECONDS = 2.0  # between two looks whether a snapshot is due

    options: LogOptions

    def __init__(self, settings: PluginSettings, records: type[Records]) -> None:
        super().__init__(settings, records)
        self._woken = self._running = False
        self._restored = 0
        self._looking: asyncio.Task[None] | None = None
        self.on_revoked: Any = lambda subject: None
        self.node = self.url = ""

    # -- life

    def start(self) -> None:
        super().start()
        replica, self.node = typing.cast(Replica, self._writer), self._read_node()
        replica.node = typing.cast(Replica, self.read).node = self.node
        replica.rows("pragma synchronous = normal")  # the log is the truth: what is lost here is applied again
        secret = (self._settings.jwt_secret or "").encode() or content_of(self.path.with_name("jwt.secret"))
        seal = Seal(secret.strip())
        founding = {"format": str(FORMAT), "epoch": uuid.uuid4().hex[:8], "secret": seal.fingerprint}
        self.log = NatsLog(
            self.options, founding, self._hear, lambda: (self.follower.epoch, self.follower.applied), seal
        )
        self._snapshots = Snapshots(self.log, self.path, self._settings.nats_snapshot_entries)
        self.follower = Follower(replica, seal.fingerprint, self.files, self._snapshots, self._tell)
        self.peers = Peers(self.log, self.node, self._greeting, seal)
        self._places = Places(self.log, self.follower, self.node, self._settings.nats_timeout)
        self.log.start(known=bool(self.follower.epoch))
        try:
            self._join()
        except StartError:
            self.close()
            raise
        self._running, self.follower.starting, self.log.starting = True, False, False
        self.head = self.read.head()
        at = self.problem() or f"{self.log.server}, on {self.replicas()} server{'s' * (self.replicas() > 1)}"
        self.place += f", a replica of the log {self.options.stream} at NATS ({at})"
        self._looking = asyncio.create_task(self._look_for_ever())

    def _join(self) -> None:
        """Wait until the log is reached and applied, for a while. Raises StartError where that cannot come."""
        follower, applied = self.follower, -1
        deadline = time.monotonic() + self.JOIN_SECONDS
        while time.monotonic() < deadline:
            if self.log.refused or (follower.fault and not follower.joined):
                raise StartError(f"{self._settings.where('backend')}: {self.problem()}")
            if follower.joined and follower.applied >= follower.joined.last:
                self._warn()
                return
            if follower.applied > applied:
                deadline, applied = time.monotonic() + self.JOIN_SECONDS, follower.applied
            time.sleep(0.02)
        problem = self.problem() or "what is in it is not applied yet"
        log.warning("%s: until then this sidecar reads what it has, and writes nothing", problem)

    def _warn(self) -> None:
        """Say under which circumstances a write that was confirmed may be lost."""
        if self.replicas() < 3:
            log.warning("the log has replicas on %d of 3 servers: it is as safe as these alone", self.replicas())
        if not self._settings.nats_synced:
            log.warning(
                "the log's servers may confirm a write before it is on disk: a loss of power of most may cost it. Give"
                " them sync_interval: always in their jetstream block, and then --nats-synced here"
            )

    def replicas(self) -> int:
        return (self.log.info and self.log.info.config.num_replicas) or 0

    def problem(self) -> str | None:
        """Why nothing can be written, None where nothing is known to be in the way."""
        return self._places.problem()

    def close(self) -> None:
        self._places.close()
        if self._looking:
            self._looking.cancel()
        super().close()
        self.log.close()

    @property
    def epoch(self) -> str:
        """The log's. Raises LogAway where it was never reached."""
        if not self.follower.epoch:
            raise LogAway(f"the log was never reached, {self.problem()}")
        return self.follower.epoch

    @epoch.setter
    def epoch(self, value: str) -> None:
        """The database has one of its own, which counts for nothing."""

    def _read_node(self) -> str:
        """The name of this sidecar among the others, which its storage folder keeps."""
        path = self.path.with_name("node")
        node = content_of(path).decode("ascii", "replace")
        if not re.fullmatch("[0-9a-f]{12}", node):  # it is a part of a subject's name
            node = uuid.uuid4().hex[:12]
            write_file(path, node.encode())
        return node

    def announce(self, info: SidecarInfo) -> None:
        super().announce(info)
        self.url = info.url

    def _greeting(self) -> bytes:
        """What the others hear of this sidecar every two seconds."""
        return msgspec.json.encode({"node": self.node, "url": self.url, "applied": self.follower.applied})

    async def _look_for_ever(self) -> None:
        """Make snapshots when they are due, try again what could not be applied, and ask which servers are away."""
        pool = Pool("snapshot", 1, 2 * Snapshots.SECONDS)
        while True:
            await asyncio.sleep(self.LOOK_SECONDS * random.uniform(0.5, 1.5))  # seldom two sidecars at once
            try:
                if self.follower.waiting():
                    self._wake()
                if self.follower.fault:  # which a server may have told that was not up to date yet
                    self.log.reconnect()
                with contextlib.suppress(LogAway):  # the session says so
                    await asyncio.wrap_future(self.log.call(self.log.last()))
                if not self.problem():
                    await pool.run(self._snapshots.make_when_due, self.follower.applied, self.follower.weight)
            except Exception as error:  # a boundary: one bad look must not be the last
                log.warning("the log at NATS: no snapshot can be made: %s", one_line(error) or type(error).__name__)

    # -- hearing

    def _hear(self, item: Joined | Entry) -> None:
        """In the client's thread."""
        self.follower.hear(item)
        self._places.stir.set()
        self._wake()

    def _wake(self) -> None:
        """Let the writer thread apply what was heard."""
        if not self._woken:
            self._woken = True
            self._queue.put((lambda records: None, NOBODY_WAITS))

    def _tell(self, events: Inserted, revoked: list[str]) -> None:
        """Tell on the loop what others did; nobody waits yet during a start."""
        if self._running:
            with contextlib.suppress(RuntimeError):  # the loop is gone
                self._loop.call_soon_threadsafe(self._told, events, revoked)

    def _told(self, events: Inserted, revoked: list[str]) -> None:
        self._changed.set()  # what came is swept in time, also where the one that wrote it is gone
        for subject in revoked:
            self.on_revoked(subject)
        self.head = self.read.head()
        for event, seq in events:
            self.observer(event, seq)

    async def catch_up(self, before: int) -> bool:
        """Apply what the log has at this moment; whether more is applied than ``before``, the number of an entry. Less
        is applied where the log does not answer in time.
        """
        deadline = time.monotonic() + self.log.API_SECONDS
        with contextlib.suppress(LogAway):
            last = await asyncio.wrap_future(self.log.call(self.log.last()))
            while self.follower.applied < last and time.monotonic() < deadline:
                await asyncio.sleep(0.005)
        return self.follower.applied > before

    # -- writing, on the writer thread

    def commit(self, records: Records, jobs: list[Job]) -> tuple[list[Any], Inserted]:
        self._woken = False
        outcomes: list[Any] = []
        events: Inserted = []
        try:
            self._check()
            self._catch_up()
            while len(outcomes) < len(jobs):
                outcomes += self._transaction(jobs[len(outcomes) :])
                events += self.follower.replica.inserted
        except Exception as error:  # a boundary: the writers get it
            if not isinstance(error, StorageError):
                log.error("the log at NATS: a transaction", exc_info=error)
                error = StorageError(one_line(error))
            outcomes += [error] * (len(jobs) - len(outcomes))
        return outcomes, events

    def _catch_up(self) -> None:
        try:
            self.follower.catch_up()
        finally:  # some of it may be applied
            self.floor = self.follower.replica.number("floor")
        if self.follower.restored != self._restored:
            self._restored = self.follower.restored
            for file in self._files:
                file.forget_size()

    def _transaction(self, jobs: list[Job]) -> list[Any]:
        """Do the first of ``jobs``, as many as belong into one entry; where a result's file cannot be written the first
        one alone. Raises StorageError, and nothing is done.
        """
        replica, turns = self.follower.replica, 0
        while True:
            replica.begin(time.time())
            try:
                outcomes = self._do(jobs)
                if not replica.calls:
                    replica.commit()
                    return outcomes
                try:
                    if replica.results:
                        self.files.write(replica.results)
                except StorageError as error:
                    replica.rollback()
                    replica.inserted.clear()
                    self.files.drop()
                    return self._transaction(jobs[:1]) if jobs[1:] else [error]
                seq = self._places.find(replica.entry())
                if seq is not None:
                    self.follower.note(seq)
                    self.files.place()
                    return outcomes
            except BaseException:
                replica.rollback()
                self.files.drop()
                raise
            replica.rollback()
            self.files.drop()
            turns += 1
            self._catch_up()
            time.sleep(random.uniform(0, min(0.05, 0.001 * 2**turns)))  # so that each sidecar has its turn

    def _do(self, jobs: list[Job]) -> list[Any]:
        """The outcomes of the first of ``jobs``, until their entry gets large; a job that fails changes nothing."""
        replica, outcomes, size = self.follower.replica, list[Any](), 0
        for job in jobs:
            known, told, stored = len(replica.calls), len(replica.inserted), len(replica.results)
            replica.savepoint()
            try:
                outcomes.append(job(replica))
                replica.release()
            except Exception as error:  # a boundary: the job's caller gets it
                replica.undo()  # raises where SQLite has ended the whole transaction
                del replica.calls[known:], replica.inserted[told:], replica.results[stored:]
                outcomes.append(error)
            size += replica.size_since(known)
            if size > self.ENTRY_BYTES:
                break
        return outcomes

    async def probe(self) -> None:
        try:
            async with asyncio.timeout(self.PROBE_SECONDS):
                await super().probe()
        except TimeoutError:
            raise StorageError(f"nats: {self._places.refusal}") from None

    async def sweep(self) -> None:
        if not self.problem():
            await super().sweep()

    async def statistics(self) -> dict[str, Any]:
        return await super().statistics() | {"cluster": self.cluster()}

    def cluster(self) -> dict[str, Any]:
        """How this sidecar stands to the log and the others."""
        applied = self.follower.applied
        return {
            "backend": "nats", "servers": [without_login(server) for server in self.options.servers],
            "connected_to": self.log.server or None, "away": self.log.away, "problem": self.problem(),
            "stream": self.options.stream, "replicas": self.replicas(), "synced": self._settings.nats_synced,
            "applied": applied, "lag": max(0, self.log.heard - applied), "node": self.node,
            "peers": self.peers.seen(), "differs": DIFFERS,
        }  # fmt: skip


class CatchingUp(Endpoint):
    """Looks again for what is not there: another sidecar may have written it just now."""

    async def work(self, path: tuple[str, ...]) -> Any:
        storage = typing.cast(ReplicatedStorage, self.sidecar.storage)
        before = storage.follower.applied  # what is applied during the first look may have come too late for it
        try:
            return await super().work(path)
        except ApiError as error:
            if self.body is not None or error.status not in (404, 410) or not await storage.catch_up(before):
                raise
            return await super().work(path)


DIFFERS = (
    "a write is seen by the other sidecars a moment later",
    "subscribers_notified names waiters of this sidecar alone",
    "processes, contexts, rate limits, --max-agents and budgets are each machine's own",
)


def without_login(server: str) -> str:
    return server.replace("//" + server.partition("//")[2].rpartition("@")[0] + "@", "//", 1)


NOBODY_WAITS: Any = concurrent.futures.Future()  # in the place of a future that nobody waits for
NOBODY_WAITS.set_result(None)

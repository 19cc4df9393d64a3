"""Events, results and agents of one project on many machines: a log on NATS JetStream, of which each sidecar keeps a
replica that it reads.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import hmac
import random
import re
import ssl
import threading
import time
import uuid
from typing import Any

from cco_sidecar import (
    Job,
    NewEvent,
    Outcome,
    Records,
    StartError,
    Storage,
    StorageError,
    connect_database,
    content_of,
    hookimpl,
    log,
    one_line,
    write_file,
)
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.storage.guard import GuardedStorage

try:
    from cco_sidecar_plugins.cluster._nats_log import Entry, Joined, LogAway, LogOptions, NatsLog
    from cco_sidecar_plugins.cluster._replica import FORMAT, Replica
except ModuleNotFoundError as error:
    raise ImportError(f"it needs the package {error.name}: pip install '.[cluster]'") from None


@hookimpl(tryfirst=True)
def storage(settings: PluginSettings) -> Storage | None:
    return ReplicatedStorage(settings, log_options(settings)) if settings.backend else None


def log_options(settings: PluginSettings) -> LogOptions:
    """Raises StartError, which does not show what may be a password."""
    servers = server_urls(str(settings.backend))
    if not servers:
        form = "nats://host:4222,host2:4222 (or tls://, with user:password@ or token@ before the first host)"
        raise StartError(f"{settings.where('backend')}: must be like {form}")
    credentials = settings.nats_creds
    if credentials and not credentials.is_file():
        raise StartError(f"{settings.where('nats_creds')}: {credentials} is no file")
    return LogOptions(
        servers=servers, prefix=settings.nats_prefix, project=token(settings.project),
        replicas=settings.nats_replicas or None, domain=settings.nats_domain,
        credentials=str(credentials) if credentials else None, tls=tls_of(settings, servers),
    )  # fmt: skip


def server_urls(text: str) -> tuple[str, ...]:
    """Each server by its own address; what the first one says of the scheme and of who we are holds for those behind it
    that say nothing. Empty where the text is not like that.
    """
    form = re.compile(r"((?:nats|tls)://)?([^\s/@,]+@)?([^\s/@:,\[\]]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?/?")
    scheme, login, urls = "", "", []
    for part in text.split(","):
        found = form.fullmatch(part.strip())
        if not found or not (found[1] or scheme):
            return ()
        scheme, login = found[1] or scheme, found[2] or login
        urls.append(f"{scheme}{login}{found[3]}{found[4] or ':4222'}")
    return tuple(urls)


def tls_of(settings: PluginSettings, servers: tuple[str, ...]) -> ssl.SSLContext | None:
    """Raises StartError."""
    authority, certificate = settings.nats_tls_ca, settings.nats_tls_cert
    if not (authority or certificate or any(server.startswith("tls:") for server in servers)):
        return None
    where = "nats_tls_ca"
    try:
        context = ssl.create_default_context(cafile=str(authority) if authority else None)
        if certificate:
            where = "nats_tls_cert"
            context.load_cert_chain(certificate, settings.nats_tls_key)
        return context
    except OSError as error:  # also ssl.SSLError
        raise StartError(f"{settings.where(where)}: {one_line(error)}") from None


def token(project: str) -> str:
    """A project's id as part of a subject and of a stream's name, which have no dots."""
    return re.sub(r"[^A-Za-z0-9-]", lambda found: f"_{ord(found[0]):02X}", project)


class ReplicatedStorage(GuardedStorage):
    """A Storage whose transactions are entries of a log that many sidecars write and all of them apply.

    The writer thread does the jobs on the replica and writes what they changed as one entry, which has to be the next
    one behind the last that was applied. The entry at this place decides: ours, and the transaction is committed;
    another sidecar's, and it is rolled back, that one applied, and the jobs are done again.
    """

    FILE = "replica.db"
    PATIENCE = 10.0  # seconds in which an entry must find its place, or its writers are told that it did not
    AGAIN = 1.0  # seconds between two attempts while the log takes nothing
    JOIN_SECONDS = 5.0  # for which a start waits for the log
    ENTRY_BYTES = 4_000_000  # after which no more jobs join a transaction
    APPLIED_AT_ONCE = 256

    def __init__(self, settings: PluginSettings, options: LogOptions) -> None:
        super().__init__(settings)
        self._heard: collections.deque[Joined | Entry] = collections.deque()
        self._stir = threading.Event()  # something was heard, or an attempt to write has ended
        self._wake_queued = self._closing = self._running = False
        self._options, self._epoch, self._applied = options, "", 0
        self._joined: Joined | None = None
        self._fault: str | None = None  # why this sidecar takes no part, where the log is reached
        self._try_at = 0.0  # while the log takes nothing: before that writers are refused at once

    # -- life

    def start(self) -> None:
        super().start()
        self.node = self._read_node()
        self.read.close()
        self.read = Replica(connect_database(self.path, read_only=True), self.node)
        self._writer.execute("pragma synchronous = normal")  # the log is the truth: what is lost here is applied again
        self._replica = Replica(self._writer, self.node)
        self._epoch, self._applied = self.read.meta("log") or "", int(self.read.meta("applied") or 0)
        founding = {"format": str(FORMAT), "epoch": self._epoch or uuid.uuid4().hex[:8], "secret": self._fingerprint()}
        self.log = NatsLog(self._options, founding, self._hear)
        self.log.start(self._applied)
        self._join()
        self._running = True

    def _join(self) -> None:
        """Wait until the log is reached and applied, for a while. Raises StartError where that cannot come."""
        deadline, applied = time.monotonic() + self.JOIN_SECONDS, -1
        while time.monotonic() < deadline:
            if self._fault or self.log.refused:
                self.close()
                raise StartError(f"{self._settings.where('backend')}: {self._fault or self.log.problem}")
            if self._joined and self._applied >= self._joined.last:
                return
            if self._applied > applied:
                deadline, applied = time.monotonic() + self.JOIN_SECONDS, self._applied
            time.sleep(0.02)
        problem = "what is in the log is not applied yet" if self._joined else self.log.problem
        log.warning("the log at NATS: %s: this sidecar reads what it has, and writes nothing until then", problem)

    def close(self) -> None:
        self._closing = True
        self._stir.set()
        super().close()
        self.log.close()

    async def catch_up(self) -> bool:
        """Apply what the log has at this moment; whether there was anything. False where it does not say so in time."""
        applied, deadline = self._applied, time.monotonic() + self.log.API_SECONDS
        with contextlib.suppress(LogAway):
            last = await asyncio.wrap_future(self.log.call(self.log.last()))
            while self._applied < last and time.monotonic() < deadline:
                await asyncio.sleep(0.005)
        return self._applied > applied

    @property
    def epoch(self) -> str:
        """The log's. Raises LogAway where it was never reached."""
        if not self._epoch:
            raise LogAway(f"the log at NATS was not reached yet: {self._fault or self.log.problem}")
        return self._epoch

    @epoch.setter
    def epoch(self, value: str) -> None:
        """The database has one of its own, which counts for nothing."""

    def _read_node(self) -> str:
        """The name of this sidecar among the others, which its storage folder keeps."""
        path = self.path.with_name("node")
        if not (node := content_of(path).decode()):
            node = uuid.uuid4().hex[:12]
            write_file(path, node.encode())
        return node

    def _fingerprint(self) -> str:
        """Of the signing secret, which all sidecars of a project have in common."""
        secret = (self._settings.jwt_secret or "").encode() or content_of(self.path.with_name("jwt.secret"))
        return hmac.new(secret.strip(), b"cco-sidecar cluster", hashlib.sha256).hexdigest()[:32]

    # -- hearing: in the client's thread, then on the writer thread

    def _hear(self, item: Joined | Entry) -> None:
        self._heard.append(item)
        self._stir.set()
        if not self._wake_queued:
            self._wake_queued = True
            self._queue.put((no_job, None, NOBODY_WAITS))

    def commit(self, records: Records, jobs: list[Job]) -> list[Outcome]:
        self._wake_queued = False
        outcomes: list[Outcome] = []
        try:
            self._check()
            self._apply_heard()
            while len(outcomes) < len(jobs):
                outcomes += self._transaction(jobs[len(outcomes) :])
        except StorageError as error:
            outcomes += [(error, [])] * (len(jobs) - len(outcomes))
        return outcomes

    def _apply_heard(self) -> None:
        """Apply all that was heard. Raises StorageError where that cannot be done, which is tried again."""
        while self._heard and not self._fault:
            if isinstance(first := self._heard[0], Joined):
                self._take_part(first)
                self._heard.popleft()
                continue
            entries: list[Entry] = []
            for item in list(self._heard)[: self.APPLIED_AT_ONCE]:
                if isinstance(item, Joined):
                    break
                entries.append(item)
            self._apply(entries)
            for _ in entries:
                self._heard.popleft()

    def _take_part(self, joined: Joined) -> None:
        """Make sure that the log is ours; note it where this is the first one that we know."""
        epoch, theirs = joined.metadata.get("epoch", ""), joined.metadata.get("secret")
        if not epoch or joined.metadata.get("format") != str(FORMAT):
            self._fault = "the stream was made by another program, or by a newer version of this one"
        elif theirs != self._fingerprint():
            self._fault = (
                "this sidecar signs tokens with another secret than the others of the project: give all of them the"
                " same by CCO_SIDECAR_JWT_SECRET, or copy jwt.secret into the storage folder"
            )
        elif self._epoch and epoch != self._epoch:
            self._fault = f"the log is another one than {self.FILE} has applied: move that file away to begin anew"
        elif self._applied > joined.last:
            self._fault = f"the log has lost entries that {self.FILE} has: move that file away to begin anew"
        if self._fault:
            log.error("the log at NATS: %s", self._fault)
            return
        if not self._epoch:
            self._replica.begin(time.time())
            self._replica.set_meta("log", epoch)
            self._replica.commit()
            self._epoch = epoch
        self._joined = joined

    def _apply(self, entries: list[Entry]) -> None:
        """Apply entries of the log in one transaction, and tell what happened."""
        replica, applied = self._replica, self._applied
        try:
            replica.begin(time.time())
            for entry in entries:
                if entry.seq <= applied:
                    continue
                if entry.seq != applied + 1:
                    raise StorageError(f"entries {applied + 1} to {entry.seq - 1} of the log are not there")
                applied = entry.seq
                if entry.after == entry.seq - 1:
                    replica.apply(entry.content)
                else:
                    log.warning("entry %d of the log was not written by a sidecar: it is passed over", entry.seq)
            self._note_applied(applied)
        except Exception:
            replica.rollback()
            raise
        self._tell(replica.inserted)

    def _note_applied(self, applied: int) -> None:
        self._replica.set_meta("applied", str(applied))
        self._replica.commit()
        self._applied = applied

    def _tell(self, events: list[tuple[NewEvent, int]]) -> None:
        """Tell on the loop of events that others published; nobody waits yet during a start."""
        if events and self._running:
            with contextlib.suppress(RuntimeError):  # the loop is gone
                self._loop.call_soon_threadsafe(self._observe, events)

    def _observe(self, events: list[tuple[NewEvent, int]]) -> None:
        for event, seq in events:
            self.observer(event, seq)

    # -- writing, on the writer thread

    def _transaction(self, jobs: list[Job]) -> list[Outcome]:
        """Do the first of ``jobs``, as many as belong into one entry. Raises StorageError, and nothing is done."""
        replica, turns = self._replica, 0
        while True:
            replica.begin(time.time())
            try:
                outcomes = self._do(jobs)
                if not replica.calls:
                    replica.commit()
                    return outcomes
                seq = self._decide(replica.entry())
                if seq is not None:
                    self._note_applied(seq)
                    return outcomes
            except BaseException:
                replica.rollback()
                raise
            replica.rollback()
            turns += 1
            self._apply_heard()
            time.sleep(random.uniform(0, min(0.05, 0.001 * 2**turns)))  # so that each sidecar has its turn

    def _do(self, jobs: list[Job]) -> list[Outcome]:
        """The outcomes of the first of ``jobs``, until their entry gets large; a job that fails changes nothing."""
        replica, outcomes, size = self._replica, list[Outcome](), 0
        told: list[tuple[NewEvent, int]] = []
        for job in jobs:
            replica.inserted, known = [], len(replica.calls)
            replica.savepoint()
            try:
                outcomes.append((job(replica), replica.inserted))
                replica.release()
                told += replica.inserted
            except StorageError:
                raise
            except Exception as error:  # a boundary: the job's caller gets it
                replica.undo()
                del replica.calls[known:]
                outcomes.append((error, []))
            size += replica.size_since(known)
            if size > self.ENTRY_BYTES:
                break
        return outcomes

    def _decide(self, content: bytes) -> int | None:
        """The number that our entry has in the log; None where its place has another one. Raises LogAway where nothing
        is decided in time: then whatever is heard next is applied, and be it ours.
        """
        if self._fault or not self._joined:
            raise LogAway(self._fault or self.log.problem or "not joined yet")
        now = time.monotonic()
        if self._try_at and now < self._try_at:
            raise LogAway(self.log.problem or "the log takes nothing at this moment")
        deadline = now + (self.PATIENCE if not self._try_at else 2 * self.log.API_SECONDS) + len(content) / 2_000_000
        id = f"{self.node}-{uuid.uuid4().hex}"
        problem = ""
        while (now := time.monotonic()) < deadline and not self._closing:
            attempt = self.log.publish(content, self._applied, id)
            attempt.add_done_callback(lambda _: self._stir.set())
            until = deadline
            while (left := until - time.monotonic()) > 0 and not self._closing:
                self._stir.clear()
                if (entry := self._next_heard()) is not None:
                    self._try_at = 0.0
                    return entry.seq if entry.id == id and entry.seq == self._applied + 1 else None
                if attempt.done() and until == deadline:
                    if not attempt.cancelled() and attempt.exception() is None:
                        if attempt.result() == self._applied + 1:
                            self._try_at = 0.0
                            return self._applied + 1
                    else:
                        problem = "cancelled" if attempt.cancelled() else str(attempt.exception())
                    until = min(deadline, time.monotonic() + 0.25)  # where another was first, it is heard about now
                    continue
                self._stir.wait(left)
            attempt.cancel()
        self._try_at = time.monotonic() + self.AGAIN
        self.log.reconnect()
        raise LogAway(problem or "the log did not answer in time")

    def _next_heard(self) -> Entry | None:
        """The first entry that is not applied yet, where one was heard."""
        for item in list(self._heard)[:8]:
            if isinstance(item, Entry) and item.seq > self._applied:
                return item
        return None

    async def statistics(self) -> dict[str, Any]:
        return await super().statistics() | {"cluster": self.cluster()}

    def cluster(self) -> dict[str, Any]:
        """How this sidecar stands to the log."""
        info = self.log.info
        return {
            "backend": "nats", "connected_to": self.log.server or None, "problem": self._fault or self.log.problem,
            "node": self.node, "applied": self._applied, "stream": self._options.stream,
            "replicas": info.config.num_replicas if info else None,
        }  # fmt: skip


def no_job(records: Records) -> None:
    """Wakes the writer thread, so that it applies what was heard."""


class Nobody:
    """In the place of a future that nobody waits for."""

    @staticmethod
    def done() -> bool:
        return True


NOBODY_WAITS: Any = Nobody()

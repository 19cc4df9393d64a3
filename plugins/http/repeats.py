"""Requests with an Idempotency-Key are done once: a repeat gets the first answer, for 24 hours and over restarts.

What is known of an answer is stored in the transaction that does the work, the rest of it after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hashlib
import re
import sqlite3
import time
import typing
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import msgspec

from cco_sidecar import (
    Agents,
    ApiError,
    Claims,
    Endpoint,
    Job,
    PublishEvent,
    Records,
    Row,
    SpawnAgent,
    Storage,
    StorageError,
    StoreResult,
    hookimpl,
    log,
    one_line,
)
from cco_sidecar_plugins.storage._schema import add_to_schema


@hookimpl(trylast=True)  # what others do with an answer they also do with one that is given again
def part_class(base: type) -> type | None:
    own = {Storage: KeepingStorage, Records: AnswerRecords, Agents: RepeatedAgents, Endpoint: RepeatedEndpoint}
    mine = next((mine for part, mine in own.items() if issubclass(base, part)), None)
    return type(mine.__name__, (mine, base), {}) if mine else None


def takes_keys(endpoint: type[Endpoint]) -> bool:
    """Whether requests are done once by their key: the job that gives the answer says that it ``answers`` then."""
    return issubclass(endpoint, (StoreResult, PublishEvent, SpawnAgent)) or getattr(endpoint, "idempotent", False)


class RepeatedEndpoint(Endpoint):
    """Answers a repeat with the first answer, and does what is new under a lock of its key."""

    def work(self, path: tuple[str, ...]) -> Coroutine[Any, Any, Any]:
        keys = self.request.headers.get_list("Idempotency-Key")
        if not keys:
            return super().work(path)
        del self.request.headers["Idempotency-Key"]  # which the core refuses
        return self._work_once("\n".join(keys), path) if takes_keys(type(self)) else super().work(path)

    async def _work_once(self, key: str, path: tuple[str, ...]) -> Any:
        where = f"{self.request.method} {self.request.path}"
        ticket = IdempotencyTicket(self.sidecar.storage, self.claims, where, key, bytes(self.upload))

        async def work() -> Any:
            answer = await super(RepeatedEndpoint, self).work(path)
            await ticket.complete(answer | {"jwt_token": ""} if isinstance(self, SpawnAgent) else answer)
            return answer

        answer, first = await ticket.once(work)
        if first is None:
            return answer
        self.set_header("Idempotent-Replay", "true")
        if isinstance(self, SpawnAgent):
            return typing.cast(RepeatedAgents, self.sidecar.agents).with_token(first)
        return first


class RepeatedAgents(Agents):
    def with_token(self, answer: bytes) -> bytes:
        """A remembered spawn answer as it is true now: with a valid token while the agent lives, and with its state."""
        spawned = msgspec.json.decode(answer)
        row = self.find(self.settings.project, spawned["agent_id"])
        if row["pid"] is None:
            problem = "The first spawn with this Idempotency-Key was cut off before it had a process: use another key"
            raise ApiError("AGT_001", problem)
        running = None if row["ended"] else self.active.get(row["id"])
        if running and not running.token:  # it is being adopted at this moment
            running.token = self.launcher.token(row)
        token = running.token if running else ""
        spawned.setdefault("environment_ignored", [])  # where it was cut off before the first answer
        facts = {"process_id": row["pid"], "jwt_token": token, "state": row["state"]}
        return msgspec.json.encode(spawned | facts)


class IdempotencyTicket:
    """One request with an Idempotency-Key. Raises REQ_001 for what is no key."""

    def __init__(self, storage: Storage, claims: Claims, endpoint: str, key: str, content: bytes) -> None:
        if not re.fullmatch(r"[\x20-\x7e]{1,255}", key):
            raise ApiError("REQ_001", "Idempotency-Key must be one line of 1 to 255 printable characters")
        self.key = (claims.project_id, claims.sub, endpoint, key)
        self._storage, self._digest, self._stored = storage, hashlib.sha256(content).hexdigest(), b""
        self._working = False

    async def once(self, work: Callable[[], Awaitable[Any]]) -> tuple[Any, bytes | None]:
        """(what ``work`` gives, None), or (None, the first answer) where the request was done before. A repeat waits
        for the first one. Raises REQ_006 for another body than that had.
        """
        async with self._lock():
            while (first := self._recall()) is None:
                with contextlib.suppress(DoneElsewhere), self._answering():
                    return await work(), None
        return None, first

    def _lock(self) -> asyncio.Lock:
        """Held while the request is done: a repeat waits for it."""
        return LOCKS.setdefault(self._storage, weakref.WeakValueDictionary()).setdefault(self.key, asyncio.Lock())

    def _recall(self) -> bytes | None:
        """The first answer, None where this is the first request. Raises REQ_006 for another body than that had."""
        known = self._known(self._storage.read)
        if known and known["digest"] != self._digest:
            raise ApiError("REQ_006")
        return known["answer"] if known else None

    def _known(self, records: Records) -> Row | None:
        """What is kept of the request; a spawn that failed may be tried again."""
        known = typing.cast(AnswerRecords, records).recall(*self.key, time.time() - KeepingStorage.KEPT_ANSWERS)
        spawned = msgspec.json.decode(known["answer"]) if known and b'"spawned"' in known["answer"] else {}
        agent = records.agent(self.key[0], spawned["agent_id"]) if "spawned" in spawned else None
        return None if agent and agent["state"] == "failed" and agent["pid"] is None else known

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """While the request is done: the job that gives its answer also keeps it. Raises DoneElsewhere."""
        self._stored, self._working, before = b"", True, KEEPING.set(self._keeping)
        try:
            yield
        finally:
            self._working = False  # tasks that were begun meanwhile keep the variable
            KEEPING.reset(before)

    def _keeping(self, job: Job) -> Job:
        def keep(records: Records) -> Any:
            answer = job(records)
            if answer:
                if self._known(records) is not None:
                    raise DoneElsewhere
                self._remember(records, answer)
            return answer

        # What comes after the answer is another's: an agent may end, and its result be stored, within its spawn.
        return keep if self._working and not self._stored else job

    def _remember(self, records: Records, answer: Any) -> None:
        self._stored = msgspec.json.encode(answer)
        typing.cast(AnswerRecords, records).remember(*self.key, self._digest, self._stored)

    async def complete(self, answer: Any) -> None:
        """Store the answer of the work that is done."""
        if msgspec.json.encode(answer) == self._stored:
            return
        try:
            await self._storage.write(lambda records: self._remember(records, answer))
        except StorageError as error:  # the work is done all the same; a repeat gets what was known before
            log.error("storage: an answer could not be kept for repeats: %s", one_line(error))

    def forget(self, records: Records) -> None:
        """A job: the next request with the key is a new one."""
        typing.cast(AnswerRecords, records).forget(*self.key)


class DoneElsewhere(Exception):
    """Another service on the same log has done the same request meanwhile."""


class KeepingStorage(Storage):
    """Keeps the answers to requests with a key, each in the transaction of the job that gives it."""

    KEPT_ANSWERS = 86_400.0  # seconds

    def write(self, job: Job, *, answers: bool = False) -> asyncio.Future[Any]:
        return super().write(KEEPING.get()(job) if answers else job, answers=answers)

    def _sweep(self, records: Records) -> bool:
        before, limit = time.time() - self.KEPT_ANSWERS, self.SWEEP_ROWS
        forgotten = typing.cast(AnswerRecords, records).forget_old(before, limit)
        return super()._sweep(records) or forgotten == limit


# Makes of a job that gives the answer to the request at hand one that also keeps it.
KEEPING = contextvars.ContextVar[Callable[[Job], Job]]("KEEPING", default=lambda job: job)


class AnswerRecords(Records):
    """First answers to requests, in a table of their own."""

    TABLE = """
    create table if not exists idempotency (
      project text not null, subject text not null, endpoint text not null, key text not null,
      digest text not null, answer blob not null, made real not null,
      primary key (project, subject, endpoint, key)) without rowid;
    create index if not exists idempotency_by_age on idempotency (made);
    """
    KEY = "project, subject, endpoint, key"

    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__(connection)
        add_to_schema(connection, self.TABLE)

    def recall(self, project: str, subject: str, endpoint: str, key: str, since: float) -> Row | None:
        """The digest of a request's body and the answer to it, where that is not older."""
        sql = f"select digest, answer from idempotency where ({self.KEY}) = (?, ?, ?, ?) and made > ?"
        return next(iter(self.rows(sql, project, subject, endpoint, key, since)), None)

    def remember(self, project: str, subject: str, endpoint: str, key: str, digest: str, answer: bytes) -> None:
        sql = f"insert or replace into idempotency ({self.KEY}, digest, answer, made) values (?, ?, ?, ?, ?, ?, now())"
        self.change(sql, project, subject, endpoint, key, digest, answer)

    def forget(self, project: str, subject: str, endpoint: str, key: str) -> None:
        self.change(f"delete from idempotency where ({self.KEY}) = (?, ?, ?, ?)", project, subject, endpoint, key)

    def forget_old(self, before: float, limit: int) -> int:
        """Forget at most ``limit`` answers that were made before a time; how many."""
        old = f"select {self.KEY} from idempotency where made < ? order by made limit ?"
        return self.change(f"delete from idempotency where ({self.KEY}) in ({old})", before, limit).rowcount


LOCKS: weakref.WeakKeyDictionary[Storage, weakref.WeakValueDictionary[Any, asyncio.Lock]] = weakref.WeakKeyDictionary()

"""Requests with an Idempotency-Key are done once: a repeat gets the first answer, for 24 hours and over restarts.

What is known of an answer is stored in the transaction that does the work, the rest of it after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
import typing
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import msgspec

from cco_sidecar import (
    ANSWERING,
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


@hookimpl(trylast=True)  # what others do with an answer they also do with one that is given again
def part_class(base: type) -> type | None:
    if issubclass(base, Agents):
        return type("RepeatedAgents", (RepeatedAgents, base), {})
    return type("RepeatedEndpoint", (RepeatedEndpoint, base), {}) if issubclass(base, Endpoint) else None


def takes_keys(endpoint: type[Endpoint]) -> bool:
    """Whether requests are done once by their key: the job that gives the answer is ANSWERING then."""
    return issubclass(endpoint, (StoreResult, PublishEvent, SpawnAgent)) or getattr(endpoint, "idempotent", False)


class RepeatedEndpoint(Endpoint):
    """Answers a repeat with the first answer, and does what is new under a lock of its key."""

    heeds_keys = True

    def work(self, path: tuple[str, ...]) -> Coroutine[Any, Any, Any]:
        keys = self.request.headers.get_list("Idempotency-Key") if takes_keys(type(self)) else []
        return self._work_once("\n".join(keys), path) if keys else super().work(path)

    async def _work_once(self, key: str, path: tuple[str, ...]) -> Any:
        where = f"{self.request.method} {self.request.path}"
        ticket = IdempotencyTicket(self.sidecar.storage, self.claims, where, key, bytes(self.upload))

        async def work() -> Any:
            answer = await super(RepeatedEndpoint, self).work(path)
            await ticket.complete(answer | {"jwt_token": ""} if self.holds_token else answer)
            return answer

        answer, first = await ticket.once(work)
        if first is None:
            return answer
        self.set_header("Idempotent-Replay", "true")
        return typing.cast(RepeatedAgents, self.sidecar.agents).with_token(first) if self.holds_token else first


class RepeatedAgents(Agents):
    def with_token(self, answer: bytes) -> bytes:
        """A remembered spawn answer as it is true now: with a valid token while the agent lives, and with its state."""
        spawned = msgspec.json.decode(answer)
        row = self.find(self.settings.project, spawned["agent_id"])
        if row["pid"] is None:
            problem = "The first spawn with this Idempotency-Key was cut off before it had a process: use another key"
            raise ApiError("AGT_001", problem)
        running = self.active.get(row["id"])
        if running and not running.token:  # it is being adopted at this moment
            running.token = self.launcher.token(row)
        token = running.token if running else ""
        return msgspec.json.encode(spawned | {"process_id": row["pid"], "state": row["state"], "jwt_token": token})


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
        known = records.recall(*self.key, time.time() - self._storage.KEPT_ANSWERS)
        spawned = msgspec.json.decode(known["answer"]) if known and b'"spawned"' in known["answer"] else {}
        agent = records.agent(self.key[0], spawned["agent_id"]) if "spawned" in spawned else None
        return None if agent and agent["state"] == "failed" and agent["pid"] is None else known

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """While the request is done: the job that gives its answer also keeps it. Raises DoneElsewhere."""
        self._working, before = True, ANSWERING.set(self._keeping)
        try:
            yield
        finally:
            self._working = False  # tasks that were begun meanwhile keep the variable
            ANSWERING.reset(before)

    def _keeping(self, job: Job) -> Job:
        def keep(records: Records) -> Any:
            answer = job(records)
            if answer:
                if self._known(records) is not None:
                    raise DoneElsewhere
                self._remember(records, answer)
            return answer

        return keep if self._working else job

    def _remember(self, records: Records, answer: Any) -> None:
        self._stored = msgspec.json.encode(answer)
        records.remember(*self.key, self._digest, self._stored)

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
        records.forget(*self.key)


class DoneElsewhere(Exception):
    """Another service on the same log has done the same request meanwhile."""


LOCKS: weakref.WeakKeyDictionary[Storage, weakref.WeakValueDictionary[Any, asyncio.Lock]] = weakref.WeakKeyDictionary()

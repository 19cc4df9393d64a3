"""A storage that does not grow beyond ``--storage-limit-mb`` or its disk, and forgets what is old."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shutil
import sqlite3
import time
import typing
from collections.abc import Coroutine
from typing import Any

import msgspec

from cco_sidecar import (
    MB,
    MINE,
    PAGE_BYTES,
    ApiError,
    Channel,
    Claims,
    EventBus,
    Filter,
    HangUp,
    Inserted,
    Job,
    Poll,
    Pool,
    Records,
    Row,
    Storage,
    StorageError,
    WaitQuery,
    Write,
    one_line,
)
from cco_sidecar_plugins._files import folder_size
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.storage._schema import add_to_schema

log = logging.getLogger("cco")


SMALL = 1_000  # bytes of a body


class ForgettingRecords(Records):
    """Also finds what is kept no longer, forgets readers' positions, and reads no more than an answer can hold."""

    OUTPUT_BYTES = 10 * MB  # of a context
    INDEX = "create index if not exists position_by_age on position (moved);"

    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__(connection)
        add_to_schema(connection, self.INDEX)

    def portion(self, sql: str, *values: Any, most: int = PAGE_BYTES) -> list[Row]:
        """Rows until their last columns have more than ``most`` bytes."""
        rows, size = list[Row](), 0
        with contextlib.closing(self._db.execute(sql, values)) as found:  # else the log grows behind it
            while size <= most and (row := found.fetchone()):
                rows.append(row)
                size += len(row[-1])
        return rows

    def issue_outputs(self, project: str, issue: str, limit: int) -> list[str]:
        """The oldest is the one with which there are too many of them for a context: so it shows that some are cut."""
        sql = f"select output {MINE} order by seq desc limit ?"
        rows = self.portion(sql, project, issue, limit, most=self.OUTPUT_BYTES)
        return [row["output"] for row in reversed(rows)]

    def outlived(self, before: float, upto: int, limit: int) -> list[int]:
        """The numbers of those events, of the first ``limit`` ones, that were made before a time or have a number up to
        another one.
        """
        first = "select seq, created from event order by seq limit ?"
        rows = self.rows(f"select seq from ({first}) where created < ? or seq <= ?", limit, before, upto)
        return [row["seq"] for row in rows]

    def forget_positions(self, before: float, limit: int) -> int:
        """Forget at most ``limit`` that were moved last before a time; how many."""
        reader = "project, subject, type, filter"
        old = f"select {reader} from position where moved < ? order by moved limit ?"
        return self.change(f"delete from position where ({reader}) in ({old})", before, limit).rowcount


class TellingBus(EventBus):
    """Tells a reader once that retention has removed events after its position, by ``missed`` in the answer."""

    MISSED = b',"missed":'  # at the end of an answer
    MISSED_BYTES = 110  # more than it takes there, and less than it takes with what stands before it

    def wait(
        self, claims: Claims, event_type: str, query: WaitQuery, hang_up: HangUp
    ) -> Coroutine[Any, Any, Poll]:  # fmt: skip
        floor = self._storage.floor
        if query.since or not floor:
            return super().wait(claims, event_type, query, hang_up)
        filter = self.parse(query.filter).within(claims.issue_id)
        position = self.position((claims.project_id, claims.sub, event_type, filter.text))
        polling = super().wait(claims, event_type, query, hang_up)
        return self._telling(polling, position, floor) if 0 <= position < floor else polling

    async def _telling(self, polling: Coroutine[Any, Any, Poll], position: int, floor: int) -> Poll:
        return self._told(await polling, position, floor)

    async def search(self, channel: Channel, filter: Filter, after: int, limit: int) -> Poll:
        """Also tells what retention removed since the poll began: after a start, or while others have their turn."""
        found = await super().search(channel, filter, after, limit)
        floor = self._storage.floor  # set before events are removed: read later it is that of all that are gone
        gone = 0 < after < floor and (not found.rows or found.rows[0]["seq"] > floor)
        return self._told(found, after, floor) if gone else found

    def _told(self, poll: Poll, position: int, floor: int) -> Poll:
        """``poll`` with what was missed between ``position`` and ``floor``, or the newer floor that it tells of."""
        content, upto = poll.content, self.event_id(floor)
        if (told := content.rfind(self.MISSED, len(content) - self.MISSED_BYTES)) >= 0:
            upto = content[told:].split(b'"')[-2].decode()
            content = content[:told] + b"}"
        missed = msgspec.json.encode({"position": self.event_id(position), "floor": upto})
        return msgspec.structs.replace(poll, content=content[:-1] + self.MISSED + missed + b"}")


class GatheringStorage(Storage):
    """Wakes the writer thread once for what is written in a turn of the loop; what nobody waits for is written with it,
    or after a moment.
    """

    BEHIND_SECONDS = 0.02

    def __init__(self, settings: PluginSettings, records: type[Records]) -> None:
        super().__init__(settings, records)
        self._gathered: list[Write] = []
        self._due = False  # at the end of this turn

    def write(self, job: Job, *, answers: bool = False) -> asyncio.Future[Any]:
        if not self._due:
            self._due = True
            self._loop.call_soon(self._hand_over)
        return super().write(job, answers=answers)

    def write_behind(self, job: Job) -> asyncio.Future[Any]:
        self._loop.call_later(self.BEHIND_SECONDS, self._hand_over)
        return super().write_behind(job)

    def _put(self, job: Job) -> asyncio.Future[Any]:
        future = self._loop.create_future()
        self._gathered.append((job, future))
        return future

    def _hand_over(self) -> None:
        gathered, self._gathered, self._due = self._gathered, [], False
        for write in gathered:
            self._queue.put(write)

    def close(self) -> None:
        self._hand_over()
        super().close()


class LimitedStorage(GatheringStorage):
    """Refuses bodies beyond the limit, after what is older than retention allows has been removed."""

    _settings: PluginSettings

    MEASURE_SECONDS = 30.0  # between two looks at how large the files beside the database are
    DISK_RESERVE = 16 * MB  # stays free on the disk
    COPIES = 5  # of a body: a result and what later agents see of it in the database, both in its log, and a file
    LOOK_SECONDS = 0.25  # between two looks at the database and the disk, while there is room
    POSITION_SECONDS = 30 * 86_400.0  # a reader's position that nobody touched for so long is forgotten
    PROBE_BYTES = 256 * 1024  # a small result takes 100 kB of log

    def __init__(self, settings: PluginSettings, records: type[Records]) -> None:
        super().__init__(settings, records)
        self._changed = asyncio.Event()  # since the last sweep
        self._pruning, self._pool = asyncio.Lock(), Pool("storage-size", 1, 60)
        self._limit, self._full = settings.storage_limit_mb * MB, False
        # Bytes of the files beside the database when they were measured and since then, and of what is being stored.
        self._others, self._new, self._coming = 0, 0, 0
        self._measured = -math.inf
        self._looked, self._room = -math.inf, 0.0  # when it was looked, and how much room there was

    async def take_room(self, size: int) -> None:
        """Make room for a body of ``size`` bytes, until ``leave_room``. Raises STR_001 where there is none."""
        needed = self.COPIES * size
        full = not await self._has(needed)
        if full and not self._full:
            log.error("the storage has %d MB and is full: nothing more is stored", self._used() / MB)
        self._full = full
        if full:
            raise ApiError("STR_001", f"Storage write failed: {self._why_full()}")
        self._coming += needed

    def leave_room(self, size: int) -> None:
        """The body was stored, or refused."""
        self._coming -= self.COPIES * size
        self._room -= self.COPIES * size
        self._new += size

    async def probe(self) -> None:
        """Also raises StorageError where there is no room for a small body."""
        if self._measured > 0 and not await self._has(self.COPIES * SMALL):
            raise StorageError(self._why_full())
        await super().probe()
        # After the commit, which may have filled the disk: it copies the log at times.
        await self.write(self._try_growth)

    def _try_growth(self, records: Records) -> None:
        """A job: whether a file takes what a small result takes, and one as long as the log can grow by it (a process
        may have a limit for the size of files). Raises StorageError.
        """
        row = {"id": ".probe", "project": self._settings.project, "issue": ".probe", "agent_type": ""}
        try:
            self.files.write([row | {"body": bytes(self.PROBE_BYTES)}])
            log_bytes = self.path.with_name(f"{self.FILE}-wal").stat().st_size
            os.truncate(self.path.with_name("results") / self.files.NEW / row["id"], log_bytes + self.PROBE_BYTES)
        except OSError as error:
            raise StorageError(f"the folder results: {error.strerror}") from None
        finally:
            self.files.drop()

    async def _has(self, needed: int) -> bool:
        """Whether there are so many bytes, after what may go has been removed."""
        if time.monotonic() - self._looked > self.LOOK_SECONDS or needed > self._room - self._coming:
            self._looked, self._room = time.monotonic(), self._left() + self._coming
        if needed > self._room - self._coming:
            await self._prune()
            self._room = self._left() + self._coming
        return needed <= self._room - self._coming

    def _why_full(self) -> str:
        return f"the storage or its disk is full (--storage-limit-mb is {self._limit // MB})"

    async def statistics(self) -> dict[str, Any]:
        used = round(self._used() / MB, 3)
        return {"total_size_mb": used, "limit_mb": self._limit // MB, "full": self._full}

    def _used(self) -> int:
        """Bytes that are stored; what was removed from the database is room for more."""
        pages = "(select page_count from pragma_page_count) - (select freelist_count from pragma_freelist_count)"
        database = self.read.one(f"select ({pages}) * page_size from pragma_page_size")
        with contextlib.suppress(OSError):
            database += self.path.with_name(f"{self.FILE}-wal").stat().st_size
        return int(database) + self._others + self._new

    def _left(self) -> float:
        left: float = self._limit - self._used() if self._measured > 0 else -1  # measure first
        with contextlib.suppress(OSError):  # where the folder is gone the write says so
            left = min(left, shutil.disk_usage(self.path.parent).free - self.DISK_RESERVE)
        return left - self._coming

    async def _prune(self) -> None:
        """Remove what may go, and measure, unless that was just done."""
        async with self._pruning:
            if time.monotonic() - self._measured > self.SWEEP_SECONDS:
                with contextlib.suppress(StorageError, OSError):  # the write itself says why
                    await self._sweep_all()
                await self._measure()

    def _answer(self, writes: list[Write], outcomes: list[Any], events: Inserted) -> None:
        self._changed.set()
        super()._answer(writes, outcomes, events)

    async def _sweep_for_ever(self) -> None:
        """After a commit, when an event expires, and each minute or as retention asks: an idle service sleeps."""
        while True:
            try:
                await self.sweep()
                self._changed.clear()
                seconds = min(self.read.next_expiry() - time.time(), self._settings.event_retention, 60.0)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._changed.wait()
            except Exception as error:  # a boundary: it is tried again
                log.warning("housekeeping waits for the storage: %s", one_line(error))
            await asyncio.sleep(self.SWEEP_SECONDS)

    async def sweep(self) -> None:
        """Remove what may go, and measure now and then."""
        await self._sweep_all()
        if time.monotonic() - self._measured > self.MEASURE_SECONDS:
            async with self._pruning:
                await self._measure()

    async def _sweep_all(self) -> None:
        """Remove what may go, in steps that hold the writer for a few milliseconds."""
        while await self.write(self._sweep):
            await asyncio.sleep(0.005)

    def _sweep(self, records: Records) -> bool:
        forgetting, now, limit = typing.cast(ForgettingRecords, records), time.time(), self.SWEEP_ROWS
        number = forgetting.forget_positions(now - self.POSITION_SECONDS, limit)
        oldest, newest = now - self._settings.event_retention, records.head() - self._settings.event_limit
        outlived = forgetting.outlived(oldest, newest, limit)
        if outlived:
            self.floor = outlived[-1]  # on the loop nobody may look for them any more once they are gone
            records.remove_events(outlived, self.DEAD_LETTERS)
            records.set_meta("floor", str(outlived[-1]))
        return super()._sweep(records) or bool(outlived) or number == limit

    async def _measure(self) -> None:
        self._new = 0
        try:
            self._others = await self._pool.run(folder_size, self.path.parent, {self.FILE, f"{self.FILE}-wal"})
        except (OSError, TimeoutError) as error:
            log.warning("the storage cannot be measured: %s", one_line(error))
        self._measured = time.monotonic()

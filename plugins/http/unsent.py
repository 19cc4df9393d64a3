"""Bounds the memory of answers that clients have not read yet, by token and in all (``--max-unsent-mb``).

Long answers beyond that are refused. Short ones and those of polls are counted apart, so that no long one is in their
way: beyond it those are given up that have waited longest.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any, ClassVar

from cco_sidecar import MB, ApiError, Endpoint, GetStatus, WaitForEvents, hookimpl
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins._steps import go_on
from cco_sidecar_plugins.http._exchange import ONE_PIECE

SHORT = 64 * 1024  # bytes of an answer of which nobody minds how long it waits for its client


@hookimpl(tryfirst=True)  # before what changes an answer: those that share one share its bytes
def part_class(settings: PluginSettings, base: type) -> type | None:
    if not issubclass(base, Endpoint):
        return None
    return type("BoundedEndpoint", (BoundedEndpoint, base), {"bounds": Bounds(settings.max_unsent_mb * MB // 2)})


class BoundedEndpoint(Endpoint):
    """Counts each answer until it was sent; a short one only where its client does not take it at once."""

    bounds: ClassVar[Bounds]
    short: bytes | None = None

    def send(self, content: bytes) -> Coroutine[Any, Any, None]:
        if len(content) > SHORT and not isinstance(self, WaitForEvents):
            return self._send_long(content)
        self.short = content
        return super().send(content)

    async def _send_long(self, content: bytes) -> None:
        if self.bounds.long.bytes[None]:
            with self.bounds.long.counting(self, content):
                return await super().send(content)
        work = super().send(content)
        try:
            waiting = work.send(None)  # most clients take it at once; the only one that waits always fits
        except StopIteration:
            return None
        with self.bounds.long.counting(self, content):
            await go_on(work, waiting)

    async def _taken(self, written: asyncio.Future[None]) -> None:
        if written.done() and not written.cancelled() and not written.exception():
            return None  # most clients take it at once
        if self.short is None or written.done():
            return await super()._taken(written)
        with self.bounds.others.counting(self, self.short):
            await super()._taken(written)

    def work(self, path: tuple[str, ...]) -> Coroutine[Any, Any, Any]:
        return self._told(path) if isinstance(self, GetStatus) else super().work(path)

    async def _told(self, path: tuple[str, ...]) -> Any:
        answer = await super().work(path)
        answer["performance"]["unsent_bytes"] = self.bounds.long.bytes[None] + self.bounds.others.bytes[None]
        return answer


def counted(endpoint: Endpoint, part: bytes) -> contextlib.AbstractContextManager[None]:
    """While a part of an answer that comes in parts is sent."""
    if not isinstance(endpoint, BoundedEndpoint):
        return contextlib.nullcontext()
    return endpoint.bounds.others.counting(endpoint, part)


class Bounds:
    def __init__(self, limit: int) -> None:
        self.long, self.others = Unsent(limit, refuses=True), Unsent(limit, refuses=False)


class Unsent:
    """Answers that wait for their clients; one that several wait for counts once, unless each client has a copy."""

    def __init__(self, limit: int, refuses: bool) -> None:
        self._limit, self._refuses = limit, refuses
        self._waiting: dict[Endpoint, bytes] = {}  # the one that has waited longest first
        self._holders: collections.Counter[tuple[str | None, int]] = collections.Counter()  # by subject and answer
        self.bytes: collections.Counter[str | None] = collections.Counter()  # by subject; None is all

    def add(self, endpoint: Endpoint, content: bytes) -> None:
        """Count an answer until it is removed; the only one always fits. Raises RATE_001 and REQ_009."""
        by_token = "REQ_009" if endpoint.public else "RATE_001"
        for who, limit, code in ((endpoint.claims.sub, self._limit // 4, by_token), (None, self._limit, "REQ_009")):
            size = 0 if (who, held(endpoint, content)) in self._holders else len(content)
            while size and self.bytes[who] and self.bytes[who] + size > limit:
                if self._refuses:
                    raise ApiError(code, f"Answers of {self.bytes[who]} bytes wait to be read", retry_after=5)
                oldest = next(other for other in self._waiting if who in (None, other.claims.sub))
                self.remove(oldest)
                oldest.close()
        self._waiting[endpoint] = content
        self._count(endpoint, content, 1)

    @contextlib.contextmanager
    def counting(self, endpoint: Endpoint, content: bytes) -> Iterator[None]:
        self.add(endpoint, content)
        try:
            yield
        finally:
            self.remove(endpoint)

    def remove(self, endpoint: Endpoint) -> None:
        if (content := self._waiting.pop(endpoint, None)) is not None:
            self._count(endpoint, content, -1)

    def _count(self, endpoint: Endpoint, content: bytes, step: int) -> None:
        what = held(endpoint, content)
        for who in (endpoint.claims.sub, None):
            holders = self._holders.pop((who, what), 0)
            if holders + step:
                self._holders[who, what] = holders + step
            if not holders or not holders + step:
                self.bytes[who] += step * len(content)
            if not self.bytes[who]:
                del self.bytes[who]


def held(endpoint: Endpoint, content: bytes) -> int:
    """The identity of what waits: of ``content``, which others may wait for too, or of a copy that is sent in one."""
    shared = len(content) > ONE_PIECE and hasattr(endpoint, "compression")  # without that part all are copied
    return id(content) if shared else id(endpoint)

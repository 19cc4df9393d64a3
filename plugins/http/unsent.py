"""Bounds the memory of answers that clients have not read yet, by token and in all (``--max-unsent-mb``).

Long answers beyond that are refused. Short ones and those of polls are counted apart, so that no long one is in their
way: beyond it those are given up that have waited longest.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Iterator

from cco_sidecar import MB, AnswerFilter, ApiError, Endpoint, WaitForEvents, hookimpl
from cco_sidecar_plugins._settings import PluginSettings


@hookimpl(tryfirst=True)  # before what changes an answer: those that share one share its bytes
def answer_filter(settings: PluginSettings) -> AnswerFilter:
    return Bounds(settings.max_unsent_mb * MB // 2)


@contextlib.contextmanager
def counted(endpoint: Endpoint, part: bytes) -> Iterator[None]:
    """While a part of an answer that comes in parts is sent."""
    bounds = [found.others for found in endpoint.sidecar.answer_filters if isinstance(found, Bounds)]
    for unsent in bounds:
        unsent.add(endpoint, part)
    try:
        yield
    finally:
        for unsent in bounds:
            unsent.remove(endpoint)


class Bounds:
    """Counts each answer until it was sent; a short one only where its client does not take it at once."""

    def __init__(self, limit: int) -> None:
        self._long, self.others = Unsent(limit, refuses=True), Unsent(limit, refuses=False)

    async def __call__(self, endpoint: Endpoint, content: bytes) -> bytes:
        if len(content) > Endpoint.SHORT and not isinstance(endpoint, WaitForEvents):
            self._count(self._long, endpoint, content)
        else:  # most of these are sent at once
            endpoint.when_slow = functools.partial(self._count, self.others, endpoint, content)
        return content

    def _count(self, unsent: Unsent, endpoint: Endpoint, content: bytes) -> None:
        unsent.add(endpoint, content)
        endpoint.when_sent = functools.partial(unsent.remove, endpoint)

    def statistics(self) -> dict[str, int]:
        return {"unsent_bytes": self._long.bytes[None] + self.others.bytes[None]}


class Unsent:
    """Answers that wait for their clients; one that several wait for counts once."""

    def __init__(self, limit: int, refuses: bool) -> None:
        self._limit, self._refuses = limit, refuses
        self._waiting: dict[Endpoint, bytes] = {}  # the one that has waited longest first
        self._holders: collections.Counter[tuple[str | None, int]] = collections.Counter()  # by subject and answer
        self.bytes: collections.Counter[str | None] = collections.Counter()  # by subject; None is all

    def add(self, endpoint: Endpoint, content: bytes) -> None:
        """Count an answer until it is removed; the only one always fits. Raises RATE_001 and REQ_009."""
        by_token = "REQ_009" if endpoint.public else "RATE_001"
        for who, limit, code in ((endpoint.claims.sub, self._limit // 4, by_token), (None, self._limit, "REQ_009")):
            size = 0 if (who, id(content)) in self._holders else len(content)
            while size and self.bytes[who] and self.bytes[who] + size > limit:
                if self._refuses:
                    raise ApiError(code, f"Answers of {self.bytes[who]} bytes wait to be read", retry_after=5)
                oldest = next(other for other in self._waiting if who in (None, other.claims.sub))
                self.remove(oldest)
                oldest.close()
        self._waiting[endpoint] = content
        self._count(endpoint, content, 1)

    def remove(self, endpoint: Endpoint) -> None:
        if (content := self._waiting.pop(endpoint, None)) is not None:
            self._count(endpoint, content, -1)

    def _count(self, endpoint: Endpoint, content: bytes, step: int) -> None:
        for who in (endpoint.claims.sub, None):
            holders = self._holders.pop((who, id(content)), 0)
            if holders + step:
                self._holders[who, id(content)] = holders + step
            if not holders or not holders + step:
                self.bytes[who] += step * len(content)
            if not self.bytes[who]:
                del self.bytes[who]

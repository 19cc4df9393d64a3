"""Answers as gzip (RFC 1952) where the client takes it; a context is compressed once. What stays long is not copied."""

from __future__ import annotations

import asyncio
import collections
import functools
import re
import typing
import zlib
from collections.abc import Coroutine
from typing import Any, ClassVar

from cco_sidecar import MB, Endpoint, SpawnAgent, hookimpl
from cco_sidecar_plugins.http._exchange import ONE_PIECE


@hookimpl
def part_class(base: type) -> type | None:
    if not issubclass(base, Endpoint):
        return None
    return type("CompressedEndpoint", (CompressedEndpoint, base), {"compression": Compression()})


class CompressedEndpoint(Endpoint):
    """Sends what is long as gzip, and what is still long without a copy."""

    compression: ClassVar[Compression]

    def send(self, content: bytes) -> Coroutine[Any, Any, None]:
        short = len(content) < Compression.LEAST and "ETag" not in self._headers
        return super().send(content) if short else self._send_filtered(content)

    async def _send_filtered(self, content: bytes) -> None:
        content = await self.compression.filter(self, content)
        if len(content) <= ONE_PIECE or self.request.method == "HEAD" or self.hang_up.happened:
            return await super().send(content)
        self.set_header("Content-Type", self.content_type)
        self.set_header("Content-Length", str(len(content)))
        await self._taken(self.flush())
        await self._taken(typing.cast(Any, self.request.connection).write(content))
        self.finish()


class Compression:
    """Answers as gzip (RFC 1952). A context is compressed once, and all who wait for it share the compressed form."""

    LEAST = 1024  # bytes; a shorter answer fits into one packet anyway
    ON_LOOP = 32 * 1024  # a millisecond's work; longer answers are compressed in a thread
    CACHE_BYTES = 16 * MB

    def __init__(self) -> None:
        self._cache: collections.OrderedDict[Key, bytes] = collections.OrderedDict()
        self._making: dict[Key, asyncio.Task[bytes]] = {}
        self._bytes = 0
        self.hits = 0

    async def filter(self, endpoint: Endpoint, content: bytes) -> bytes:
        """The answer as sent; one that holds a token stays as it is: its compressed length would tell of it
        (BREACH).
        """
        if getattr(endpoint, "holds_token", isinstance(endpoint, SpawnAgent)):
            return content
        etag = endpoint._headers.get("ETag")
        if "Accept-Encoding" not in (vary := endpoint._headers.get("Vary", "")):
            endpoint._headers["Vary"] = f"{vary}, Accept-Encoding" if vary else "Accept-Encoding"
        if len(content) < self.LEAST or not accepts_gzip(endpoint.request.headers.get("Accept-Encoding", "")):
            return content
        endpoint.set_header("Content-Encoding", "gzip")
        return await self.gzip(content, etag)

    async def gzip(self, content: bytes, etag: str | None) -> bytes:
        """``content`` compressed; what has an ETag is kept for the next one."""
        short = len(content) <= self.ON_LOOP
        if not etag:
            return compress(content) if short else await asyncio.to_thread(compress, content)
        key = (etag, len(content), hash(content))  # which Python takes once of the bytes that a cache gives
        if key in self._cache:
            self.hits += 1
            self._cache.move_to_end(key)
            return self._cache[key]
        if short:
            return self._keep(key, compress(content))
        if key not in self._making:
            self._making[key] = asyncio.create_task(self._make(key, content))
        return await asyncio.shield(self._making[key])

    async def _make(self, key: Key, content: bytes) -> bytes:
        compressed = await asyncio.to_thread(compress, content)
        del self._making[key]
        return self._keep(key, compressed)

    def _keep(self, key: Key, compressed: bytes) -> bytes:
        self._cache[key] = compressed
        self._bytes += len(compressed)
        while self._bytes > self.CACHE_BYTES:
            self._bytes -= len(self._cache.popitem(last=False)[1])
        return compressed


Key = tuple[str, int, int]  # ETag, length, hash
compress = functools.partial(zlib.compress, wbits=31)


@functools.lru_cache(32)
def accepts_gzip(accepted: str) -> bool:
    """Whether an Accept-Encoding header lets an answer be gzip (RFC 9110, 12.5.3): named, and not with a quality of
    0.
    """
    found = {
        name.strip().lower(): quality for name, _, quality in (item.partition(";") for item in accepted.split(","))
    }
    quality = found.get("gzip", found.get("x-gzip", found.get("*", "q=0")))
    return not re.fullmatch(r"\s*q\s*=\s*0(\.0{0,3})?\s*", quality, re.IGNORECASE)

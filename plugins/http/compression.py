"""Answers as gzip (RFC 1952) where the client takes it; what hits and builds of one context share is deflated once."""

from __future__ import annotations

import asyncio
import collections
import re
import struct
import zlib

from msgspec import Struct

from cco_sidecar import MB, AnswerFilter, Endpoint, hookimpl


@hookimpl
def answer_filter() -> AnswerFilter:
    return Compression().filter


class Compressed(Struct, frozen=True):
    """The first part of an answer, deflated up to a byte's end so that more may follow, with its checksum."""

    deflated: bytes
    crc: int
    length: int


class Compression:
    """Answers as gzip (RFC 1952). Of a context, where hit and build differ in a few last bytes only, the long part is
    deflated once.
    """

    LEAST = 1024  # bytes; a shorter answer fits into one packet anyway
    ON_LOOP = 32 * 1024  # a millisecond's work; longer answers are compressed in a thread
    CACHE_BYTES = 16 * MB
    HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"

    def __init__(self) -> None:
        self._cache: collections.OrderedDict[tuple[str, int, int], Compressed] = collections.OrderedDict()
        self._bytes = 0
        self.hits = 0

    async def filter(self, endpoint: Endpoint, content: bytes) -> bytes:
        """The answer as sent; one that holds a token stays as it is: its compressed length would tell of it
        (BREACH).
        """
        etag = endpoint._headers.get("ETag")
        if endpoint.holds_token or (len(content) < self.LEAST and not etag):
            return content
        if "Accept-Encoding" not in endpoint._headers.get("Vary", ""):
            endpoint.add_header("Vary", "Accept-Encoding")
        if len(content) < self.LEAST or not accepts_gzip(endpoint.request.headers.get("Accept-Encoding", "")):
            return content
        endpoint.set_header("Content-Encoding", "gzip")
        return await self.gzip(content, etag)

    async def gzip(self, content: bytes, etag: str | None) -> bytes:
        """``content`` compressed. Answers of one ``etag`` begin alike up to their time stamp."""
        split = max(0, content.rfind(b'"timestamp":')) if etag else 0
        if len(content) <= self.ON_LOOP:
            return self._join(deflate(content[:split]), content[split:])
        key = (etag or "", split, await asyncio.to_thread(zlib.crc32, memoryview(content)[:split]))
        head = self._cache.get(key)
        if head is None:
            head = await asyncio.to_thread(deflate, memoryview(content)[:split])
            self._keep(key, head)
        else:
            self.hits += 1
            self._cache.move_to_end(key)
        return await asyncio.to_thread(self._join, head, content[split:])

    def _join(self, head: Compressed, rest: bytes) -> bytes:
        compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        tail = compressor.compress(rest) + compressor.flush()
        return (
            self.HEAD
            + head.deflated
            + tail
            + struct.pack("<LL", zlib.crc32(rest, head.crc), (head.length + len(rest)) & 0xFFFFFFFF)
        )

    def _keep(self, key: tuple[str, int, int], head: Compressed) -> None:
        if key[0] and key not in self._cache and len(head.deflated) <= self.CACHE_BYTES:
            self._cache[key] = head
            self._bytes += len(head.deflated)
        while self._bytes > self.CACHE_BYTES:
            self._bytes -= len(self._cache.popitem(last=False)[1].deflated)


def deflate(content: bytes | memoryview) -> Compressed:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    # After a full flush nothing refers back, so that another compressor may write on (zlib's manual).
    return Compressed(
        compressor.compress(content) + compressor.flush(zlib.Z_FULL_FLUSH), zlib.crc32(content), len(content)
    )


def accepts_gzip(accepted: str) -> bool:
    """Whether an Accept-Encoding header lets an answer be gzip (RFC 9110, 12.5.3): named, and not with a quality of
    0.
    """
    found = {
        name.strip().lower(): quality for name, _, quality in (item.partition(";") for item in accepted.split(","))
    }
    quality = found.get("gzip", found.get("x-gzip", found.get("*", "q=0")))
    return not re.fullmatch(r"\s*q\s*=\s*0(\.0{0,3})?\s*", quality, re.IGNORECASE)

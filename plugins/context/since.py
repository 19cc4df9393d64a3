"""Answers ``?since=ETAG`` of a context with only the files that the answer with that ETag did not give as they are now.

It remembers which files each of the last answers gave, by path and checksum. An ETag that is not remembered (too old,
or of before a restart) gets everything, and ``since: null``.
"""

from __future__ import annotations

import asyncio
import collections
from typing import Any, ClassVar

import msgspec
from msgspec import Struct

from cco_sidecar import ContextQuery, Contexts, Endpoint, GetContext, hookimpl

Given = dict[str, str]  # path and checksum of each relevant file of an answer


@hookimpl(tryfirst=True)  # before what compresses
def part_class(base: type) -> type | None:
    if issubclass(base, Endpoint):
        return type("SinceEndpoint", (SinceEndpoint, base), {"since": Since()})
    return type("OwnContexts", (OwnContexts, base), {}) if issubclass(base, Contexts) else None


class SinceEndpoint(Endpoint):
    """Sends only what changed where that was asked for."""

    since: ClassVar[Since]

    async def send(self, content: bytes) -> None:
        if isinstance(self, GetContext):
            content = await self.since.cut(self, content)
        await super().send(content)


class OwnContexts(Contexts):
    """Gives who asks with ``since`` bytes of their own, which no other answer has: so they are counted as unsent."""

    async def get(
        self, issue_id: str, agent_type: str, query: ContextQuery, known: str = "", reader: object = None
    ) -> tuple[bytes, str]:
        content, etag = await super().get(issue_id, agent_type, query, known, reader)
        return content[:-1] + b"}" if query.since and content and not reader else content, etag


class GivenFile(Struct):
    path: str
    checksum: str


class GivenFiles(Struct):
    relevant_files: list[GivenFile]


class GivenContext(Struct):
    context: GivenFiles


class Since:
    """Sees each context before it is sent, and cuts those that were asked for with ``since``."""

    REMEMBERED = 1_000  # answers

    def __init__(self) -> None:
        self._given: collections.OrderedDict[str, asyncio.Task[Given]] = collections.OrderedDict()
        self._decoder = msgspec.json.Decoder(GivenContext)

    async def cut(self, endpoint: Endpoint, content: bytes) -> bytes:
        if endpoint.get_status() != 200:
            return content
        if endpoint.content_type != GetContext.content_type:  # a brief
            return content
        tag = bare(endpoint._headers["ETag"])
        if tag not in self._given:
            self._given[tag] = asyncio.create_task(asyncio.to_thread(self._files, content))
        self._given.move_to_end(tag)
        if len(self._given) > self.REMEMBERED:
            self._given.popitem(last=False)
        given, asked = self._given[tag], bare(endpoint.query.since)
        if not asked:
            return content
        before = await asyncio.shield(self._given[asked]) if asked in self._given else None
        return await asyncio.to_thread(changes, content, asked, before, await asyncio.shield(given))

    def _files(self, content: bytes) -> Given:
        return {file.path: file.checksum for file in self._decoder.decode(content).context.relevant_files}


def changes(content: bytes, asked: str, before: Given | None, now: Given) -> bytes:
    """The answer ``content`` without the files that were given ``before`` as they are ``now``. Blocks."""
    answer: dict[str, Any] = msgspec.json.decode(content)
    known = before or {}
    files = answer["context"]["relevant_files"]
    changed = [file for file in files if known.get(file["path"]) != file["checksum"]]
    answer["context"]["relevant_files"] = changed
    unchanged = [file for file in files if known.get(file["path"]) == file["checksum"]]
    answer["context"]["metadata"]["redactions"] -= sum(file.get("redactions", 0) for file in unchanged)
    answer |= {"file_count": len(changed), "total_size_bytes": len(msgspec.json.encode(answer["context"]))}
    answer |= {"since": None if before is None else f'W/"{asked}"', "unchanged_files": len(files) - len(changed)}
    answer |= {"removed_files": sorted(known.keys() - now.keys())}
    return msgspec.json.encode(answer)


def bare(etag: str) -> str:
    """The tag alone, without quotes, weakness and the suffix of a compressed answer."""
    return etag.strip().removeprefix("W/").strip('"').partition("-")[0]

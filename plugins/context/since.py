"""Answers ``?since=ETAG`` of a context with only the files that the answer with that ETag did not give as they are now.

It remembers which files each of the last answers gave, by path and checksum. An ETag that is not remembered (too old,
or of before a restart) gets everything, and ``since: null``.
"""

from __future__ import annotations

import asyncio
import collections
import sys
from collections.abc import Coroutine
from typing import Any, ClassVar

import msgspec
from msgspec import Struct

from cco_sidecar import ContextQuery, Contexts, Endpoint, GetContext, hookimpl
from cco_sidecar_plugins.context._sections import measured

Given = dict[str, str]  # path and checksum of each relevant file of an answer


@hookimpl(tryfirst=True)  # before what compresses
def part_class(base: type) -> type | None:
    if issubclass(base, Endpoint):
        return type("SinceEndpoint", (SinceEndpoint, base), {"since": Since()})
    return type("OwnContexts", (OwnContexts, base), {}) if issubclass(base, Contexts) else None


class SinceEndpoint(Endpoint):
    """Sends only what changed where that was asked for."""

    since: ClassVar[Since]

    def send(self, content: bytes) -> Coroutine[Any, Any, None]:
        return self._send_changes(content) if isinstance(self, GetContext) else super().send(content)

    async def _send_changes(self, content: bytes) -> None:
        await super().send(await self.since.cut(self, content))


class OwnContexts(Contexts):
    """Gives who asks with ``since`` bytes of their own, which no other answer has: so they are counted as unsent."""

    async def get(
        self, issue_id: str, agent_type: str, query: ContextQuery, known: str = "", sub: str = ""
    ) -> tuple[bytes, str]:
        content, etag = await super().get(issue_id, agent_type, query, known, sub)
        return content[:-1] + b"}" if query.since and content and not query.reader else content, etag


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
    PAUSE = 0.5  # seconds: what a team that asks at once waits for goes first

    def __init__(self) -> None:
        self._given: collections.OrderedDict[str, Given | bytes] = collections.OrderedDict()  # bytes: not read yet
        self._reading: asyncio.Task[None] | None = None

    async def cut(self, endpoint: Endpoint, content: bytes) -> bytes:
        if endpoint.get_status() != 200:
            return content
        if endpoint.content_type != GetContext.content_type:  # a brief
            return content
        tag, asked = bare(endpoint._headers["ETag"]), bare(endpoint.query.since)
        before = self._given.get(asked)
        if tag in self._given:
            self._given.move_to_end(tag)
        else:
            self._remember(tag, content)
        return await asyncio.to_thread(changes, content, asked, before) if asked else content

    def _remember(self, tag: str, content: bytes) -> None:
        self._given[tag] = content
        if len(self._given) > self.REMEMBERED:
            self._given.popitem(last=False)
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        """Keep of each answer only what it gave."""
        while unread := [(tag, given) for tag, given in self._given.items() if isinstance(given, bytes)]:
            await asyncio.sleep(self.PAUSE)
            given = await asyncio.to_thread(lambda: [given_by(content) for _, content in unread])
            for (tag, _), files in zip(unread, given, strict=True):
                if tag in self._given:
                    self._given[tag] = files


def given_by(content: bytes) -> Given:
    """The files of an answer; texts that others have too are there once. Blocks."""
    files = GIVEN_CONTEXT.decode(content).context.relevant_files
    return {sys.intern(file.path): sys.intern(file.checksum) for file in files}


GIVEN_CONTEXT = msgspec.json.Decoder(GivenContext)


def changes(content: bytes, asked: str, before: Given | bytes | None) -> bytes:
    """The answer ``content`` without the files that were given ``before`` as they are now. Blocks."""
    answer: dict[str, Any] = msgspec.json.decode(content)
    known = given_by(before) if isinstance(before, bytes) else before or {}
    files = answer["context"]["relevant_files"]
    changed = [file for file in files if known.get(file["path"]) != file["checksum"]]
    answer["context"]["relevant_files"] = changed
    unchanged = [file for file in files if known.get(file["path"]) == file["checksum"]]
    answer["context"]["metadata"]["redactions"] -= sum(file.get("redactions", 0) for file in unchanged)
    answer |= {"since": None if before is None else f'W/"{asked}"', "unchanged_files": len(files) - len(changed)}
    answer |= {"removed_files": sorted(known.keys() - {file["path"] for file in files})}
    return msgspec.json.encode(measured(answer))


def bare(etag: str) -> str:
    """The tag alone, without quotes, weakness and the suffix of a compressed answer."""
    return etag.strip().removeprefix("W/").strip('"').partition("-")[0]

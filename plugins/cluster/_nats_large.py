"""What is too large for a message of NATS, in pieces in a stream of its own: entries of the log, and snapshots."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import uuid
from collections.abc import Callable

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js import JetStreamContext

from cco_sidecar import StorageError
from cco_sidecar_plugins.cluster._seal import Seal

NatsError = (nats.errors.Error, OSError, TimeoutError)  # what goes wrong with a server


class LogAway(StorageError):
    """The log takes nothing at this moment; what was to be written was not, or will be seen in the log."""

    retry_after = 2


class Large:
    """In the client's thread. Subjects below ``large``: entry.N.ID.PIECE, snapshot.N.ID.PIECE and index.N, where N is
    the number of the last entry before it, or in it. Raises NatsError and LogAway.
    """

    PIECE = 512 * 1024  # bytes
    AT_ONCE = 8
    NUMBERED = re.compile(r"(entry|snapshot|index)\.([0-9]{1,18})(?:\.|$)")

    def __init__(
        self,
        connected: Callable[[], tuple[Client, JetStreamContext]],
        log_stream: str,
        subject: str,
        seal: Seal,
        epoch: Callable[[], str],
    ) -> None:
        self._seal, self._epoch = seal, epoch
        self.connected, self._log_stream, self._stream = connected, log_stream, f"{log_stream}-large"
        self._subject = f"{subject}.large"

    async def put(self, name: str, content: bytes) -> str:
        """Store what is large, in pieces; by what is returned it is found again."""
        client, js = self.connected()
        size = min(self.PIECE, client.max_payload - 1024)
        pieces = range(0, len(content), size)
        for first in range(0, len(pieces), self.AT_ONCE):
            batch = pieces[first : first + self.AT_ONCE]
            await asyncio.gather(
                *(
                    js.publish(self._piece(name, number), content[at : at + size], 5.0, self._stream)
                    for number, at in enumerate(batch, first)
                )
            )
        return f"{name} {len(pieces)} {len(content)} {hashlib.sha256(content).hexdigest()}"

    async def get(self, found: str) -> bytes:
        """What is large, by what ``put`` returned."""
        name, pieces, size, digest = found.split()
        content = bytearray()
        for number in range(int(pieces)):
            _, js = self.connected()
            piece = await js.get_msg(self._stream, subject=self._piece(name, number), direct=True)
            content += piece.data or b""
        if len(content) != int(size) or hashlib.sha256(content).hexdigest() != digest:
            raise LogAway("what is large is not whole")
        return bytes(content)

    def _piece(self, name: str, number: int) -> str:
        return f"{self._subject}.{name}.{number}"

    async def put_whole(self, name: str, content: bytes) -> None:
        """Store what is large so that it is found by its name, once it is whole; others may do the same meanwhile."""
        found = await self.put(f"snapshot.{name}.{uuid.uuid4().hex}", content)
        _, js = self.connected()
        index = self._seal.wrap(self._about(name), found.encode())
        await js.publish(f"{self._subject}.index.{name}", index, 5.0, self._stream)

    def _about(self, name: str) -> str:
        return f"snapshot {self._epoch()} {name}"

    async def get_whole(self, name: str) -> bytes:
        """What ``put_whole`` stored."""
        return await self.get(await self._found(name))

    async def _found(self, name: str) -> str:
        _, js = self.connected()
        message = await js.get_msg(self._stream, subject=f"{self._subject}.index.{name}", direct=True)
        return self._seal.unwrap(self._about(name), message.data or b"").decode()

    async def whole(self) -> list[int]:
        """The names of what ``put_whole`` stored. What others wrote there counts for nothing."""
        names = []
        for _, number in await self._numbered("index.*"):
            with contextlib.suppress(StorageError, nats.js.errors.NotFoundError):
                await self._found(str(number))
                names.append(number)
        return names

    async def _numbered(self, pattern: str) -> set[tuple[str, int]]:
        """(kind, number of an entry) of all that is large and has such a name."""
        _, js = self.connected()
        info = await js.stream_info(self._stream, f"{self._subject}.{pattern}")
        names = (self.NUMBERED.match(name, len(self._subject) + 1) for name in info.state.subjects or {})
        return {(name[1], int(name[2])) for name in names if name}

    async def cut(self, seq: int) -> None:
        """Remove the entries up to this one, with all that is large and no later one needs."""
        _, js = self.connected()
        large = self._subject
        await js.purge_stream(self._log_stream, seq=seq + 1)
        for kind, number in await self._numbered(">"):
            if number < seq:  # an entry's number is the one before it
                await js.purge_stream(self._stream, subject=f"{large}.{kind}.{number}" + ".>" * (kind != "index"))

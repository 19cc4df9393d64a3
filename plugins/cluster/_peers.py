"""The other sidecars of a project: who is there, and what one asks another."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from cco_sidecar import StorageError, log, one_line
from cco_sidecar_plugins.cluster._nats_large import NatsError
from cco_sidecar_plugins.cluster._nats_log import NatsLog
from cco_sidecar_plugins.cluster._seal import Seal


class Peers:
    """Messages that nobody keeps. ``answer`` gets what others ask this sidecar, in the client's thread."""

    ALIVE = 2.0  # seconds between two greetings
    SEEN = 7.0  # seconds for which a sidecar counts as seen

    def __init__(self, nats_log: NatsLog, node: str, greeting: Callable[[], bytes], seal: Seal) -> None:
        self._seal = seal
        self._log, self.node, self._greeting, self._subject = nats_log, node, greeting, nats_log.options.subject
        self._peers: dict[str, tuple[float, dict[str, Any]]] = {}  # by node: when it was heard of, and what
        self.answer: Callable[[bytes], Awaitable[bytes]] | None = None
        nats_log.on_session = self.meet

    async def meet(self, client: Client) -> None:
        """Tell the others that we are there, hear that they are, and answer what they ask."""

        async def greeted(message: Msg) -> None:
            with contextlib.suppress(StorageError):  # others may write there, too
                told = msgspec.json.decode(self._seal.unwrap("alive", message.data))
                self._peers[str(told["node"])] = (time.monotonic(), told)

        async def asked(message: Msg) -> None:
            if self.answer:
                with contextlib.suppress(*NatsError, StorageError):
                    question = self._seal.unwrap(f"ask {self.node}", message.data)
                    answer = await self.answer(question)
                    await message.respond(self._seal.wrap(f"answer {question.decode()}", answer))

        answered = [(f"{self._subject}.alive", greeted), (f"{self._subject}.ask.{self.node}", asked)]
        while True:  # as long as the session: what fails once is tried again
            try:
                while answered:
                    await client.subscribe(answered[-1][0], cb=answered[-1][1])
                    answered.pop()
                await client.publish(f"{self._subject}.alive", self._seal.wrap("alive", self._greeting()))
            except NatsError as error:
                log.debug("nats: a greeting: %s", one_line(error))
            await asyncio.sleep(self.ALIVE)

    def ask(self, node: str, question: dict[str, Any]) -> concurrent.futures.Future[bytes]:
        """What another sidecar answers. Raises StorageError."""
        asked = msgspec.json.encode(question | {"nonce": uuid.uuid4().hex})  # so that no old answer fits

        async def request() -> bytes:
            client, _ = self._log.connected()
            subject = f"{self._subject}.ask.{node}"
            message = self._seal.wrap(f"ask {node}", asked)
            answer = await client.request(subject, message, timeout=self._log.API_SECONDS)
            return self._seal.unwrap(f"answer {asked.decode()}", answer.data)

        return self._log.call(request())

    def is_seen(self, node: str) -> bool:
        return time.monotonic() - self._peers.get(node, (-self.SEEN, {}))[0] < self.SEEN

    def forget(self, node: str) -> None:
        """It does not answer: it is not asked again before it is heard of."""
        self._peers.pop(node, None)

    def name_of(self, node: str) -> str:
        """A sidecar for readers."""
        url = self._peers.get(node, (0.0, {}))[1].get("url")
        return f"the sidecar {node}" + (f" at {url}" if url else "")

    def seen(self) -> list[dict[str, Any]]:
        """The other sidecars that were heard of in the last seconds."""
        return [told for node, (_, told) in sorted(self._peers.items()) if node != self.node and self.is_seen(node)]

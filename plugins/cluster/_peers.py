"""The other sidecars of a project: who is there, and what one asks another."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from cco_sidecar_plugins.cluster._nats_large import NatsError
from cco_sidecar_plugins.cluster._nats_log import NatsLog


class Peers:
    """Messages that nobody keeps. ``answer`` gets what others ask this sidecar, in the client's thread."""

    ALIVE = 2.0  # seconds between two greetings
    SEEN = 7.0  # seconds for which a sidecar counts as seen

    def __init__(self, nats_log: NatsLog, node: str, greeting: Callable[[], bytes]) -> None:
        self._log, self.node, self._greeting, self._subject = nats_log, node, greeting, nats_log.options.subject
        self._peers: dict[str, tuple[float, dict[str, Any]]] = {}  # by node: when it was heard of, and what
        self.answer: Callable[[bytes], Awaitable[bytes]] | None = None
        nats_log.on_session = self.meet

    async def meet(self, client: Client) -> None:
        """Tell the others that we are there, hear that they are, and answer what they ask."""

        async def greeted(message: Msg) -> None:
            with contextlib.suppress(msgspec.DecodeError, KeyError, TypeError):
                told = msgspec.json.decode(message.data)
                self._peers[str(told["node"])] = (time.monotonic(), told)

        async def asked(message: Msg) -> None:
            if self.answer:
                with contextlib.suppress(*NatsError):
                    await message.respond(await self.answer(message.data))

        with contextlib.suppress(*NatsError):
            await client.subscribe(f"{self._subject}.alive", cb=greeted)
            await client.subscribe(f"{self._subject}.ask.{self.node}", cb=asked)
            while True:
                await client.publish(f"{self._subject}.alive", self._greeting())
                await asyncio.sleep(self.ALIVE)

    def ask(self, node: str, question: dict[str, Any]) -> concurrent.futures.Future[bytes]:
        """What another sidecar answers. Raises LogAway."""

        async def request() -> bytes:
            client, _ = self._log.connected()
            subject = f"{self._subject}.ask.{node}"
            return (await client.request(subject, msgspec.json.encode(question), timeout=self._log.API_SECONDS)).data

        return self._log.call(request())

    def is_seen(self, node: str) -> bool:
        return time.monotonic() - self._peers.get(node, (-self.SEEN, {}))[0] < self.SEEN

    def forget(self, node: str) -> None:
        """It does not answer: it is not asked again before it is heard of."""
        self._peers.pop(node, None)

    def name_of(self, node: str) -> str:
        """A sidecar for readers."""
        url = self._peers[node][1].get("url") if node in self._peers else None
        return f"the sidecar {node}" + (f" at {url}" if url else "")

    def seen(self) -> list[dict[str, Any]]:
        """The other sidecars that were heard of in the last seconds."""
        return [told for node, (_, told) in sorted(self._peers.items()) if node != self.node and self.is_seen(node)]

"""The log of a project on NATS JetStream: a stream, in a client's thread of its own, connected as long as it lives.

Each message is one entry: what one sidecar wrote in one transaction. It is stored only where it follows the entry that
its writer knew as the last one. What is too large for a message lies in pieces in a second stream.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import nats.errors
import nats.js.errors
from msgspec import Struct
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    Header,
    StorageType,
    StreamConfig,
    StreamInfo,
)

from cco_sidecar import StorageError, log, one_line
from cco_sidecar_plugins.cluster._nats_large import Large, LogAway, NatsError
from cco_sidecar_plugins.cluster._options import LogOptions
from cco_sidecar_plugins.cluster._seal import Seal


class Entry(Struct, frozen=True):
    """A message of the log: its number, who wrote it by which id, behind which number it belongs, and its content.
    No sidecar of the project wrote it where ``after`` is -1.
    """

    seq: int
    id: str
    after: int
    content: bytes


class Joined(Struct, frozen=True):
    """The log was found, or made: what its first maker wrote down, the numbers between which it has entries, and the
    number of the one that was applied here last before it was asked: what is applied later ``last`` does not know.
    """

    metadata: dict[str, str]
    first: int
    last: int
    applied: int


class ReadingClient(Client):
    """Reads on behind a message whose headers are malformed: nats-py would stop for ever, whoever wrote it."""

    async def _process_headers(self, headers: Any) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (IndexError, ValueError):
            return None


def is_of_use(record: logging.LogRecord) -> bool:
    """Not what asyncio says of each connection that was encrypted after it began, as those of nats-py are, when the
    server ends it.
    """
    return "eof_received() has no effect" not in str(record.msg)


class NatsLog:
    """``start`` begins to connect; ``hear`` is called in the client's thread with each Joined and Entry, in order.
    ``founding`` is written down with a stream that is made, ``place`` tells which log is known and which entry of it
    need not be heard again.
    """

    API_SECONDS = 2.0
    HEARTBEAT = 0.5
    START_PATIENCE = 2.0  # with servers that are not up to date, of the seconds for which a start waits
    SILENCE = 2.0  # without a heartbeat, after which the consumer is made anew

    def __init__(
        self, options: LogOptions, founding: dict[str, str], hear: Callable[[Joined | Entry], None],
        place: Callable[[], tuple[str, int]], seal: Seal,
    ) -> None:  # fmt: skip
        self.options, self._founding, self._hear = options, founding, hear
        self._place, self._known, self._seal = place, False, seal
        self._behind_at = self._behind_for = 0.0  # when a server answered last that was not up to date; for how long
        self._epoch = ""
        self.starting = True
        self.on_session: Callable[[Client], Coroutine[Any, Any, None]] | None = None  # goes on beside each session
        self.heard = 0  # the number of the last entry that was given to ``hear``
        self.problem: str | None = "not connected yet"
        self.refused = self._refusal = False  # one of the servers refuses our credentials, and no other one takes them
        self.server = self._said = ""  # what the log was told of the connection
        self._why = ""  # it ends
        self.info: StreamInfo | None = None
        self.large = Large(self.connected, options.stream, options.subject, seal, lambda: self._epoch)
        self._client: Client | None = None
        self._js: JetStreamContext | None = None
        self._gone = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="nats", daemon=True)
        self._main: asyncio.Task[None] | None = None

    def start(self, *, known: bool) -> None:
        """``known``: this sidecar has read the log before, so that nobody makes it anew where it is not there."""
        self._known = known
        logging.getLogger("asyncio").addFilter(is_of_use)
        self._thread.start()

    def close(self) -> None:
        """End the connection. Blocks for a few seconds at most."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(lambda: self._main and self._main.cancel())
            self._thread.join(5)
        if not self._thread.is_alive():
            self._loop.close()  # an interpreter that ends would complain

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._main = self._loop.create_task(self._stay_connected())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main)
        for task in (tasks := asyncio.all_tasks(self._loop)):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

    # -- the connection: nats-py's own reconnecting sends again what was to be sent before, and keeps dead servers

    async def _stay_connected(self) -> None:
        servers = random.sample(self.options.servers, len(self.options.servers))
        while True:
            for server in servers:
                try:
                    await self._session(server)
                except Exception as error:  # a boundary: whatever is wrong with one session, there is a next one
                    if not isinstance(error, (*NatsError, LogAway)):
                        log.error("the log %s at NATS: what was not expected", self.options.stream, exc_info=error)
                    self._told(error)
                await asyncio.sleep(0.2)
            self.refused = self._refusal

    def _told(self, error: BaseException) -> None:
        """Write down why there is no log, and log it once."""
        words = in_words(error)
        self._refusal = self._refusal or words == REFUSED
        self.problem = REFUSED if self._refusal else words
        if self._why:
            self._say("away", "the log %s at NATS is not reached: %s", words)

    def _say(self, state: str, words: str, fact: str) -> None:
        """Log that the log went away, or is there again; of the start its own lines tell."""
        if self._said != state and not self.starting:
            log.log(logging.INFO if state == "there" else logging.WARNING, words, self.options.stream, fact)
        self._said = state

    async def _session(self, server: str) -> None:
        """Use one server for as long as it serves. Raises what it failed by."""
        client, self._gone, self._why = ReadingClient(), (gone := asyncio.Event()), "the connection was lost"
        problems: list[BaseException] = []

        async def closed() -> None:
            gone.set()

        async def failed(error: Exception) -> None:
            problems.append(error)

        options = self.options
        try:
            connecting = client.connect(
                [server], name="cco-sidecar", allow_reconnect=False, max_reconnect_attempts=1, reconnect_time_wait=0,
                connect_timeout=2, ping_interval=1, max_outstanding_pings=2, closed_cb=closed, error_cb=failed,
                user_credentials=options.credentials, tls=options.tls,
            )  # fmt: skip
            await within(3, connecting)
            js, (epoch, applied) = client.jetstream(domain=options.domain, timeout=self.API_SECONDS), self._place()
            info = self.info = await log_stream(client, js, self.options, None if self._known else self._founding)
            state, metadata = info.state, info.config.metadata or {}
            if metadata.get("epoch") == epoch and self._is_behind(info, applied):
                raise LogAway("the server that answers is not up to date yet")
            self._client, self._js, self.problem = client, js, None
            self._epoch = metadata.get("epoch", "")
            self.refused = self._refusal = False
            self.heard, self._known = self._place()[1], True  # what was heard and not applied is heard again
            self.server = client.connected_url.netloc.rpartition("@")[2] if client.connected_url else ""
            self._said = "there" if self.starting else self._said
            self._hear(Joined(metadata, state.first_seq or state.last_seq + 1, state.last_seq, applied))
            beside = asyncio.create_task(self.on_session(client)) if self.on_session else None
            try:
                while not gone.is_set():
                    await self._listen(client, js, gone)
            finally:
                if beside:
                    beside.cancel()
            raise problems[-1] if problems else LogAway(self._why or "it is looked at again")
        except NatsError as error:
            raise (problems[-1] if problems and not one_line(error) else error) from None
        finally:
            self._client = self._js = None
            gone.set()
            with contextlib.suppress(*NatsError):
                await within(1, client.close())

    def _is_behind(self, info: StreamInfo, applied: int) -> bool:
        """Whether servers that replicate lack an entry that was applied here, as after an election: they are asked
        again for as long as a write waits for the log, or a part of a start. What they lack then they have lost. Of the
        time between two such answers a quarter of that counts at most: that no server answers tells nothing.
        """
        if info.state.last_seq >= applied or not (info.cluster and info.cluster.replicas):
            self._behind_for = 0.0
            return False
        now, timeout = time.monotonic(), self.options.timeout
        patience = min(timeout, self.START_PATIENCE) if self.starting else timeout
        self._behind_for += min(now - self._behind_at, patience / 4)
        self._behind_at = now
        return self._behind_for < patience

    async def last(self) -> int:
        """The number of the newest entry."""
        _, js = self.connected()
        self.info = await js.stream_info(self.options.stream)
        return self.info.state.last_seq

    @property
    def away(self) -> list[str]:
        """The names of the log's servers that do not have what is newest, as their leader told when it was asked last:
        away, or back and not yet up to date. Their own word ``offline`` comes much later.
        """
        cluster = self.info.cluster if self.info else None
        return sorted(str(server.name) for server in (cluster and cluster.replicas) or [] if not server.current)

    def reconnect(self, why: str = "") -> None:
        """Leave the server for the next one. The log is told why, and nothing where only its state is asked anew."""
        self._why = why
        self._loop.call_soon_threadsafe(self._gone.set)

    # -- hearing

    async def _listen(self, client: Client, js: JetStreamContext, gone: asyncio.Event) -> None:
        """Hear until the consumer fails, or the connection."""
        loop, again, busy = asyncio.get_running_loop(), asyncio.Event(), False
        beat = loop.time()

        async def on_message(message: Msg) -> None:
            nonlocal beat, busy
            headers = message.headers or {}
            beat, busy = loop.time(), True
            try:
                if not message.reply.startswith("$JS.ACK."):  # an entry may have any header: others write, too
                    stalled = message.reply or headers.get("Nats-Consumer-Stalled")
                    if stalled:
                        await client.publish(stalled)
                    elif int(headers.get("Nats-Last-Stream", 0)) > self.heard:
                        again.set()
                    elif self._client is client:
                        self.problem = None
                elif not again.is_set():
                    await self._take(message)
            except (*NatsError, ValueError, StorageError) as error:
                log.debug("nats: what was heard: %s", one_line(error))
                self.problem = f"entry {self.heard + 1} of the log cannot be read: {in_words(error)}"
                again.set()
            finally:
                beat, busy = loop.time(), False

        inbox = client.new_inbox()
        subscription = await client.subscribe(inbox, cb=on_message)
        try:
            await self._make_consumer(js, inbox)
            self._say("there", "the log %s at NATS is there again: %s", self.server)
            beat = loop.time()
            while not (gone.is_set() or again.is_set() or (loop.time() - beat > self.SILENCE and not busy)):
                await first_of(gone.wait(), again.wait(), seconds=self.HEARTBEAT)
        finally:
            with contextlib.suppress(*NatsError):
                await subscription.unsubscribe()
        await asyncio.sleep(0.05)  # where something cannot be read it is not asked for without a pause

    async def _make_consumer(self, js: JetStreamContext, inbox: str) -> None:
        """Have what is new sent to ``inbox``; servers that just choose a leader are asked again for a while."""
        config = ConsumerConfig(
            deliver_subject=inbox, deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=self.heard + 1,
            ack_policy=AckPolicy.NONE, max_deliver=1, mem_storage=True, num_replicas=1,
            idle_heartbeat=self.HEARTBEAT, flow_control=True,
        )  # fmt: skip
        deadline = time.monotonic() + self.SILENCE
        while True:
            try:
                await js.add_consumer(self.options.stream, config)
                return
            except nats.js.errors.ServiceUnavailableError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)

    async def _take(self, message: Msg) -> None:
        seq, headers = message.metadata.sequence.stream, message.headers or {}
        if seq <= self.heard:
            return
        content, large, id = message.data, headers.get("Cco-Large", ""), headers.get(Header.MSG_ID, "")
        entry = Entry(seq, "", -1, b"")
        if self._seal.fits(headers.get("Cco-Seal", ""), self._epoch, seq - 1, id, large, content):
            entry = Entry(seq, id, seq - 1, await self.large.get(large) if large else content)
        self.heard = seq
        self._hear(entry)

    # -- writing

    def publish(self, content: bytes, after: int, id: str) -> concurrent.futures.Future[int]:
        """The number of a new entry behind ``after``. Raises LogAway; what came of it then only the log itself says."""
        return self.call(self._publish(content, after, id))

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """The outcome of a coroutine in the client's thread. Raises LogAway."""
        return asyncio.run_coroutine_threadsafe(self._answered(coroutine), self._loop)

    async def _answered(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What a coroutine returns; raises LogAway for all that goes wrong with the server."""
        try:
            return await coroutine
        except NatsError as error:
            raise LogAway(in_words(error)) from None

    def connected(self) -> tuple[Client, JetStreamContext]:
        if self._client is None or self._js is None:
            raise LogAway(self.problem or "not connected")
        return self._client, self._js

    async def _publish(self, content: bytes, after: int, id: str) -> int:
        client, js = self.connected()
        headers: dict[str, Any] = {Header.EXPECTED_LAST_SEQUENCE: str(after), Header.MSG_ID: id}
        if len(content) > client.max_payload - 1024:
            headers["Cco-Large"], content = await self.large.put(f"entry.{after}.{id}", content), b""
        headers["Cco-Seal"] = self._seal.of(self._epoch, after, id, headers.get("Cco-Large", ""), content)
        ack = await js.publish(
            f"{self.options.subject}.log", content, self.API_SECONDS, self.options.stream, headers=headers
        )
        return ack.seq


NAME_IN_USE = 10058  # an error of JetStream's


async def log_stream(
    client: Client, js: JetStreamContext, options: LogOptions, founding: dict[str, str] | None
) -> StreamInfo:
    """The log's stream, beside the one for what is large; both are made where there are none, unless ``founding``
    is None. Raises NatsError and LogAway.
    """
    info: StreamInfo | None = None
    clustered = bool(client._server_info.get("cluster"))
    replicas = options.replicas or (3 if clustered else 1)
    common: dict[str, Any] = {
        "storage": StorageType.FILE, "num_replicas": replicas, "allow_direct": True, "discard": DiscardPolicy.NEW,
    }  # fmt: skip
    for config in (
        StreamConfig(
            name=f"{options.stream}-large", subjects=[f"{options.subject}.large.>"], max_msgs_per_subject=1,
            **common | {"discard": DiscardPolicy.OLD},
        ),
        StreamConfig(
            name=options.stream, subjects=[f"{options.subject}.log"], duplicate_window=120,
            metadata=founding, **common,
        ),
    ):  # fmt: skip
        try:
            info = await js.stream_info(str(config.name))
        except nats.js.errors.NotFoundError:
            if founding is None:
                raise LogAway(f"the stream {config.name} is not there any more") from None
            try:
                await js.add_stream(config)
            except nats.js.errors.BadRequestError as error:
                if error.err_code != NAME_IN_USE:  # by another sidecar, which was first
                    raise
            info = await js.stream_info(str(config.name))
    assert info
    return info


REFUSED = "the server refuses our credentials"


def in_words(error: BaseException) -> str:
    """What is wrong, for people; which credentials we have is not for a log."""
    words = one_line(error).removeprefix("nats: ")
    if re.search("authori[sz]ation|authentication|certificate required|bad certificate", words, re.IGNORECASE):
        return REFUSED
    if isinstance(error, TimeoutError) or "no servers available" in words:
        return "no server answers in time"
    return words.partition("description=")[2].strip("'\"") or words or type(error).__name__


async def first_of(*coroutines: Coroutine[Any, Any, Any], seconds: float) -> None:
    """Wait for one of them, for so many seconds at most."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


async def within(seconds: float, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns, or raises; raises TimeoutError where it took longer. Where the caller is cancelled this
    ends as cancelled, and the coroutine's own error is dropped: asyncio.wait_for either raises that instead, or leaves
    it to be logged as never retrieved.
    """
    task = asyncio.ensure_future(coroutine)
    try:
        await asyncio.wait([task], timeout=seconds)
    finally:
        task.cancel()
        outcome = (await asyncio.gather(task, return_exceptions=True))[0]
    if isinstance(outcome, asyncio.CancelledError):
        raise TimeoutError
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome

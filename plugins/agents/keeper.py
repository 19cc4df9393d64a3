"""Owns agents' processes with a keeper: exit codes over crashes, what they use, every daemon, output with times.

The core's own Processes starts agents as its children. Here a small process of its own, the keeper, is their parent and
writes their output down: one for all agents of a run of the service. It ends with the service, or where agents outlive
that with the last of them. Every process of an agent is found by proofs, of which one, a mark in the kernel, cannot be
shed.
"""

from __future__ import annotations

import asyncio
import codecs
import collections
import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import psutil
from msgspec import Meta, Struct

from cco_sidecar import (
    MB,
    AgentCommand,
    Agents,
    Pool,
    Processes,
    Running,
    StartError,
    hookimpl,
    in_thread,
    lock_file,
    log_once,
    one_line,
    redact,
)
from cco_sidecar_plugins._files import NO_JSON, content_of
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.agents import _keeper_program
from cco_sidecar_plugins.agents._evidence import fact
from cco_sidecar_plugins.agents._keeper_program import KeeperProgram, output_files
from cco_sidecar_plugins.agents._retention import prune_for_ever
from cco_sidecar_plugins.agents.launchers import find_program

log = logging.getLogger("cco")

# a + before a column keeps SQLite from going by that column's index, in which far more rows match
SUCCESS = "select 1 from result where project = ? and agent_id = ? and stored >= ? and +status = 'success' limit 1"

Identity = tuple[int, str]  # pid, and what tells it from an earlier or later process with the same number


@hookimpl
def part_class(base: type) -> type | None:
    if issubclass(base, Processes):
        return type("KeptProcesses", (KeptProcesses, base), {})
    return type("NotingAgents", (NotingAgents, base), {}) if issubclass(base, Agents) else None


class NotingAgents(Agents):
    """Notes in the ledger which processes are an agent's although nothing in the kernel says so: the next run of the
    service has to find them.
    """

    def check_here(self, agent_id: str) -> None:
        """Raise REQ_002 where an agent's files are on another machine."""

    async def tend(self, running: Running) -> None:
        agent_id, owner = running.row["id"], self.processes
        kept = owner.kept.get(agent_id) if isinstance(owner, KeptProcesses) else None
        if kept and kept.unmarked != kept.noted:
            kept.noted = kept.unmarked
            seen = sorted(kept.noted)
            self.storage.write_behind(lambda records: records.add_outcome(agent_id, seen=seen))
        await super().tend(running)

    async def start(self) -> None:
        owner = self.processes
        if not isinstance(owner, KeptProcesses):
            return await super().start()
        owner.opening = asyncio.create_task(owner.open())
        try:
            await super().start()
            await owner.opening
        except BaseException:
            owner.opening.cancel()
            await asyncio.gather(owner.opening, return_exceptions=True)
            await owner.close()
            raise

    async def stop(self) -> None:
        await super().stop()
        if left := [name for name, running in self.active.items() if not running.ending.is_set()]:
            log.info("agents go on, and the next start finds them: %s", ", ".join(left))
        if isinstance(self.processes, KeptProcesses):
            await self.processes.close()

    async def judge(self, running: Running) -> None:
        await super().judge(running)
        row = running.row
        if row["state"] == "lost" and self.storage.read.one(SUCCESS, row["project"], row["id"], row["started"] - 1):
            row["state"] = "completed"  # a success that the agent stored speaks for it
        self.storage.write_behind(lambda records: records.add_outcome(row["id"], seen=[]))


class KeptProcesses(Processes):
    """Agents' processes as their keeper and a census of all processes know them."""

    LOOK = 2.0  # seconds between two looks at one agent, of whose end the keeper tells
    SURVEY = 0.25  # seconds between two looks at all agents, at least
    SELDOM = 1.0  # seconds at most, where there are so many processes that looks take long
    SHARE = 0.02  # of a processor's time, which looks take at most until then
    PATIENCE = 40  # looks without its first process after which an agent is gone although its keeper has not said so
    KEEPER_SECONDS = 10.0  # how long an end waits where nobody knows whether its keeper lives
    opening: asyncio.Task[None]
    OUTPUT_SECONDS = 2.0  # how long an end waits for the last lines to be written down

    def __init__(self, settings: PluginSettings) -> None:
        super().__init__(settings)
        self._folder = settings.storage / "agents"
        self._keeper = Keeper(self._folder, self._root, self._on_exit, self._on_keeper_lost)
        self._census = Census(self._keeper, self._pool)
        self.kept: dict[str, KeptProcess] = {}
        self._some = asyncio.Event()  # set while there may be some
        self._settings, self._tasks = settings, list[asyncio.Task[None]]()

    async def open(self) -> None:
        """What adoptions wait for."""
        await self._keeper.open()
        self._at_start = await self._census.look()  # for all adoptions
        pruning = prune_for_ever(self._folder, self._settings)
        self._tasks = [asyncio.create_task(self._survey()), asyncio.create_task(pruning)]

    async def start(self, running: Running, command: AgentCommand) -> None:
        agent_id = running.row["id"]
        kept = self.kept[agent_id] = KeptProcess(running)
        self._some.set()
        try:
            pid = await self._keeper.start_agent(agent_id, command, kept.proof.mark)
            # It may have ended before we look: it was started all the same.
            found = (await self._pool.run(look_at, {pid})).get(pid)
            kept.proof.first = found.identity if found else None
            running.row |= {"pid": pid, "birth": found.birth if found else None}
        except BaseException:  # it may have been started before what failed
            running.exit()
            running.grace = 0.0
            await self.end(running)
            raise

    async def adopt(self, running: Running) -> None:
        await self.opening
        row, kept = running.row, KeptProcess(running)
        self.kept[row["id"]] = kept
        self._some.set()
        kept.proof.known = kept.noted = kept.unmarked = {(pid, birth) for pid, birth in fact(row, "seen") or []}
        row["pid"] = pid = row["pid"] or await self._pool.run(noted_pid, running.folder)
        members = self._at_start.members(kept.proof)
        first = min((item for item in members if pid in (None, item.pid)), key=lambda item: item.order, default=None)
        if first is None or row["birth"] not in (None, first.birth):
            running.exit()
            return
        kept.proof.first = first.identity
        row |= {"pid": first.pid, "birth": first.birth}
        running.began -= first.age
        self._keeper.follow(row["id"])

    async def end(self, running: Running) -> None:
        await super().end(running)
        await self._hear_keeper(self.kept[running.row["id"]])
        del self.kept[running.row["id"]]

    def look(self, running: Running) -> None:
        """The keeper and the survey tell of ends."""

    async def members(self, running: Running) -> set[Any]:
        kept, seen = self.kept[running.row["id"]], await self._census.look()
        members = set(seen.members(kept.proof))
        kept.proof.known |= {item.identity for item in members}
        return members

    async def _hear_keeper(self, kept: KeptProcess) -> None:
        """Nothing of the agent is alive: wait until its keeper has written down how it ended and, within bounds, its
        last output. The keeper's word is waited for as long as it lives, also while it is stopped.
        """
        folder = kept.running.folder
        await until(lambda: kept.told or not is_kept(folder), self.KEEPER_SECONDS)
        while kept.running.row["pid"] and not kept.told and is_kept(folder, unknown=False):
            log_once(f"agent {kept.running.row['id']} has ended, and its keeper, which lives, does not answer: waiting")
            await asyncio.sleep(self.SURVEY)
        if not kept.told and (end := await self._pool.run(written_end, folder)):
            kept.hear(end)
        await until(lambda: not (folder / KeeperProgram.PIPE).exists(), self.OUTPUT_SECONDS)
        kept.running.row |= {"processes": 0, "memory": 0}

    def output(self, agent_id: str) -> WholeOutput:
        folder = self._folder / agent_id
        is_ours = os.path.lexists(folder / KeeperProgram.PID)  # it is there before the agent's first process
        return StampedOutput(folder) if is_ours else WholeOutput(folder)

    async def close(self) -> None:
        """Leave all processes to themselves."""
        for task in self._tasks:
            task.cancel()
        await self._keeper.close()

    async def _survey(self) -> None:
        """Look at all agents again and again: what they use, and whether adopted ones still live."""
        while True:
            await self._some.wait()
            await asyncio.sleep(min(max(self.SURVEY, self._census.cost / self.SHARE), self.SELDOM))
            if not self.kept:
                self._some.clear()
            try:
                seen, now = await self._census.look(), time.time()
                for kept in list(self.kept.values()):
                    self._survey_one(kept, seen, now)
            except Exception as error:  # a boundary: one bad look must not be the last
                log.error("agents: survey failed", exc_info=error)

    def _survey_one(self, kept: KeptProcess, seen: Snapshot, now: float) -> None:
        running = kept.running
        if running.row["pid"] is None:  # it is being started
            return
        if members := seen.members(kept.proof):
            kept.measure(members, now)
        if running.exited:
            return
        kept.missing = 0 if seen.of(kept.proof.first) else kept.missing + 1
        if kept.missing and (kept.missing > self.PATIENCE or not is_kept(running.folder)):
            running.exit()

    def _on_exit(self, agent_id: str, end: AgentEnd) -> None:
        """The keeper has reaped an agent's first process."""
        if kept := self.kept.get(agent_id):
            kept.hear(end)

    def _on_keeper_lost(self) -> None:
        """The keeper died: its agents go on, watched as adopted ones are, and a new keeper goes on with their
        output.
        """
        for agent_id, kept in self.kept.items():
            if not kept.running.exited:
                self._keeper.follow(agent_id)


class KeptProcess:
    """What is known of a running agent's processes, and what proves that they are its."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.proof = Proof(mark=mark_of(running.folder), marker=str(running.folder / "token"))
        self.unmarked: set[Identity] = set()  # those of its processes that do not carry the kernel's mark
        self.noted: set[Identity] = set()  # these, as the ledger has them
        self.told = False  # its keeper has said how it ended
        self.missing = 0  # looks on end that did not find its first process

    def measure(self, members: Sequence[Seen], now: float) -> None:
        """Take down what a census found. Processor time counts what has ended, memory is that of the moment."""
        memory = sum(item.memory for item in members)
        self._use(sum(item.cpu for item in members), memory, now)
        self.running.row |= {"memory": memory, "processes": len(members)}
        self.proof.known = {item.identity for item in members}
        self.unmarked = {item.identity for item in members if item.mark != self.proof.mark}

    def hear(self, end: AgentEnd) -> None:
        self.told = True
        self._use(end.cpu, end.memory, min(end.time, time.time()))
        self.running.exit(end.code, end.time)

    def _use(self, cpu: float, memory: int, now: float) -> None:
        row = self.running.row
        row["cpu"], row["measured"] = max(row.get("cpu") or 0.0, cpu), now
        row["peak_memory"] = max(row.get("peak_memory") or 0, memory)


async def until(condition: Callable[[], Any], seconds: float) -> None:
    deadline, pause = time.monotonic() + seconds, 0.01
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(pause)
        pause = min(2 * pause, 0.1)


class AgentEnd(Struct, frozen=True):
    """How an agent's first process ended, as its keeper tells it, and writes it down for a later run of the service."""

    code: Annotated[int, Meta(ge=-255, lt=1 << 32)]  # below 0: the signal that ended it
    cpu: Annotated[float, Meta(ge=0, le=1e9)]
    memory: Annotated[int, Meta(ge=0, lt=1 << 53)]  # at its most
    time: float


def written_end(folder: Path) -> AgentEnd | None:
    """How an agent ended by what its keeper has written down, None where there is nothing that can be so. Blocks.

    The agent itself can write there: what is no small file of these facts is passed over.
    """
    try:
        file = os.open(
            folder / KeeperProgram.END, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        )
    except OSError:
        return None
    try:
        return msgspec.json.decode(os.read(file, 300), type=AgentEnd)
    except (OSError, *NO_JSON) as error:
        log.warning("agent %s: what is written of its end cannot be used: %s", folder.name, one_line(error))
        return None
    finally:
        os.close(file)


def is_kept(folder: Path, *, unknown: bool = True) -> bool:
    """Whether a keeper has yet to write down how the agent ends: it holds this lock until then, and no longer than it
    lives; ``unknown`` where the lock cannot be looked at. Blocks.
    """
    try:
        flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # the agent itself can write there
        file = os.open(folder / KeeperProgram.PID, os.O_RDWR | flags)
    except FileNotFoundError:
        return False
    except OSError:  # too many files are open, or the like
        return unknown
    try:
        lock_file(file)
        return False
    except OSError:
        return True
    finally:
        os.close(file)


def noted_pid(folder: Path) -> int | None:
    """The first process of an agent by its keeper's note, which comes before the ledger's; None where it is not there
    or is no note: the agent itself can write there. Blocks.
    """
    with contextlib.suppress(ValueError):
        return int(content_of(folder / KeeperProgram.PID, 20))
    return None


class Keeper:
    """The service's end of its keeper, which is started with the first agent, and again when it has died."""

    START_SECONDS = 20.0

    def __init__(
        self, folder: Path, root: Path, on_exit: Callable[[str, AgentEnd], None], on_lost: Callable[[], None]
    ) -> None:
        self._folder, self._root, self._on_exit, self._on_lost = folder, root, on_exit, on_lost
        self._process: subprocess.Popen[bytes] | None = None
        self._pool = Pool("keeper", 4, 20)
        self._orders = Pool("orders", 1, self.START_SECONDS)  # what is given up while it waits here is never sent
        self._lock = threading.Lock()
        self._starting: dict[str, asyncio.Future[int]] = {}
        self._stopped = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def open(self) -> None:
        """Wait until no keeper of an earlier run can start an agent any more, so that every agent there is can be
        found.
        """
        self._loop = asyncio.get_running_loop()
        try:
            await self._pool.run(self._wait_for_gate)
        except TimeoutError:
            problem = (
                f"a keeper of an earlier run is in the middle of a start, and stands still; see {KeeperProgram.GATE}"
            )
            raise StartError(problem, 1) from None

    def _wait_for_gate(self) -> None:
        gate = os.open(self._folder.parent / KeeperProgram.GATE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if sys.platform != "win32":
                import fcntl

                fcntl.flock(gate, fcntl.LOCK_EX)
        finally:
            os.close(gate)

    async def start_agent(self, agent_id: str, command: AgentCommand, mark: int) -> int:
        """The pid of a new agent in a session of its own. Raises OSError, also where the keeper does not answer."""
        program = await self._pool.run(find_program, command.argv[0], self._root, command.environment.get("PATH"))
        order = {"start": agent_id, "program": program, "mark": mark, "root": str(self._root)}
        answer = self._starting[agent_id] = self._loop.create_future()
        try:
            async with asyncio.timeout(self.START_SECONDS):
                await self._orders.run(self._send, order | msgspec.structs.asdict(command))
                return typing.cast(int, await answer)
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, "no answer from the keeper", program) from None
        except OSError as error:
            error.filename = program
            raise
        finally:
            del self._starting[agent_id]

    def follow(self, agent_id: str) -> None:
        """Go on with the output of an agent whose keeper has died, or as soon as it does."""
        in_thread("orders", lambda: self._try_to_send({"follow": agent_id}))

    def _try_to_send(self, order: dict[str, Any]) -> None:
        try:
            self._send(order)
        except OSError as error:
            log.error("keeper of agents: %s", error.strerror)

    def _send(self, order: dict[str, Any]) -> None:
        """Blocks for as long as the keeper takes to read."""
        with self._lock:
            # Of one that has died it is known in a moment, and it then is None.
            process = self._process = self._process or self._boot()
            assert process.stdin
            line = memoryview(json.dumps(order).encode() + b"\n")
            while line:
                line = line[process.stdin.write(line) :]

    def _boot(self) -> subprocess.Popen[bytes]:
        """A bare interpreter: no site packages, none of our memory, and none of our environment, which may hold
        secrets.
        """
        needed = (
            "SYSTEMROOT",
            "LD_LIBRARY_PATH",
            "DYLD_LIBRARY_PATH",
        )  # where the interpreter's own libraries may be found through these
        environment = {name: os.environ[name] for name in needed if name in os.environ}
        command = [sys.executable, "-I", "-S", _keeper_program.__file__, str(self._folder), str(os.getpid())]
        with open(self._folder.parent / "keeper.log", "ab", opener=functools.partial(os.open, mode=0o600)) as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=self._root, env=environment,
                start_new_session=True, bufsize=0  # closing a buffer would wait for a keeper that does not read
            )  # fmt: skip
        threading.Thread(target=self._listen, args=(process,), name="keeper", daemon=True).start()
        return process

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        with open(process.stdout.fileno(), "rb", closefd=False) as news:
            for line in news:
                self._call(self._told, json.loads(line))
        process.wait()
        self._call(self._lost)

    def _call(self, function: Callable[..., None], *values: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody is left to be told
            self._loop.call_soon_threadsafe(function, *values)

    def _told(self, news: dict[str, Any]) -> None:
        if "ended" in news:
            return self._on_exit(news["agent"], AgentEnd(**news["ended"]))
        answer = self._starting.get(news["agent"])
        if answer and not answer.done():
            if "pid" in news:
                answer.set_result(news["pid"])
            else:
                answer.set_exception(OSError(news["errno"], news["reason"]))

    def _lost(self) -> None:
        self._process = None
        if not self._stopped:
            log.error("the keeper of agents has died; its agents go on, but their exit codes will not be known")
            for answer in self._starting.values():
                if not answer.done():
                    answer.set_exception(OSError(errno.EPIPE, "the keeper of agents has died"))
                    answer.exception()  # its order may not have been sent yet, and then fails by itself
            self._on_lost()

    async def close(self) -> None:
        """Take no more news. A keeper that has agents goes on with them, another one ends."""
        self._stopped = True
        process = self._process
        if process is None:
            return
        assert process.stdin
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await self._pool.run(process.wait, 0.5)


def output_of(agents: Agents, agent_id: str) -> WholeOutput:
    """An agent's output, also where somebody else owns the processes."""
    if isinstance(owner := agents.processes, KeptProcesses):
        return owner.output(agent_id)
    return WholeOutput(agents.settings.storage / "agents" / agent_id)


def open_unwaiting(path: Path) -> typing.BinaryIO:
    """A file, whatever an agent has put in its place; a pipe then fails where it is sought in. Raises OSError."""
    return open(path, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))


class WholeOutput:
    """Reads an agent's output from any place on. Offsets are in bytes. All methods block."""

    READ = MB
    TAIL = 256 * 1024  # bytes in which the last lines are looked for

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def last_written(self) -> float | None:
        """When the last byte was written down, None before the first."""
        with contextlib.suppress(OSError):
            for _, path in reversed(self._files()):
                if (facts := path.stat()).st_size:
                    return facts.st_mtime
        return None

    def _files(self) -> list[tuple[int, Path]]:
        """(offset of the first byte, path) of each file, oldest first."""
        return [(0, self.folder / Processes.OUTPUT)]

    def read(self, start: int, *, number: int | None = None) -> tuple[int, str, int]:
        """(offset, text, next offset) from ``start``, or the oldest byte there is, ``number`` or READ bytes at most."""
        offset, content = self.content(start, self.READ if number is None else number)
        text, held_back = decode_whole(content)
        return offset, text, offset + len(content) - held_back

    def tail(self, number: int) -> list[str]:
        """The last lines, without their times and secrets."""
        _, text, _ = self.read(max(0, self.size() - self.TAIL), number=self.TAIL)
        lines = text.split("\n")
        text = redact("\n".join(lines[-number - 61 :]))[0]  # a key that begins before the lines is known by its head
        return [line[:2000] for line in text.removesuffix("\n").split("\n")[-number:]] if text else []

    def size(self) -> int:
        """The number of bytes written in all."""
        with contextlib.suppress(OSError):
            return (self.folder / Processes.OUTPUT).stat().st_size
        return 0

    def content(self, start: int, number: int) -> tuple[int, bytes]:
        """(offset, content): ``number`` bytes at most from ``start`` on, or from the oldest that there is."""
        with contextlib.suppress(OSError), open_unwaiting(self.folder / Processes.OUTPUT) as file:
            file.seek(start)
            return start, file.read(number)
        return start, b""


def decode_whole(content: bytes) -> tuple[str, int]:
    """(text, how many bytes at the end are the beginning of a character)."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(content), len(decoder.getstate()[0])


class StampedOutput(WholeOutput):
    """Reads what a keeper has written down of one agent: text with stamps at the lines' beginnings, in files named by
    their offset.
    """

    STAMP = len("2025-01-01T00:00:00.000Z ")

    def _files(self) -> list[tuple[int, Path]]:
        return [(first, Path(path)) for first, path in output_files(str(self.folder))]

    def content(self, start: int, number: int) -> tuple[int, bytes]:
        content, offset = b"", start
        for first, path in self._files():
            try:
                with open_unwaiting(path) as file:
                    end = file.seek(0, os.SEEK_END) + first
                    if end <= offset or len(content) >= number:
                        continue
                    offset = offset if content else max(offset, first)
                    file.seek(offset + len(content) - first)
                    content += file.read(number - len(content))
            except OSError:  # rotated away at this moment, or no file
                continue
        return offset, content

    def read(self, start: int, *, number: int | None = None, timestamps: bool = False) -> tuple[int, str, int]:
        """(offset, text, next offset) from ``start`` on, ``number`` or READ bytes at most; it is larger where what was
        there is gone.
        """
        begin = max(0, start - self.STAMP)
        offset, content = self.content(begin, (self.READ if number is None else number) + start - begin)
        skip = max(0, start - offset)
        before, content, offset = content[:skip], content[skip:], offset + skip
        stamp = self.STAMP - (len(before) - before.rfind(b"\n") - 1)  # how much of the first line's follows
        lines = re.findall(rb"[^\n]*\n|[^\n]+", content)
        if lines and not lines[-1].endswith(b"\n") and len(lines[-1]) < (self.STAMP if len(lines) > 1 else stamp):
            content = content[: -len(lines.pop())]  # half a stamp: the next reader gets it whole
        if not timestamps:
            lines = [line[self.STAMP if position else stamp :] for position, line in enumerate(lines)]
        text, held_back = decode_whole(b"".join(lines))
        return offset, text, offset + len(content) - held_back

    def offset_of(self, since: str) -> int:
        """Where the first line begins that is not older than a moment."""
        wanted = since.rstrip("Z").encode()
        for first, path in self._files():
            with contextlib.suppress(OSError), open_unwaiting(path) as file:
                offset = first
                for line in file:
                    if line[: len(wanted)] >= wanted:
                        return offset
                    offset += len(line)
        return self.size()

    def size(self) -> int:
        """How much has been written down in all."""
        for first, path in reversed(self._files()):
            with contextlib.suppress(OSError):
                return first + path.stat().st_size
        return 0


# -- processes: which ones are an agent's, and signals to no others


class Seen(Struct, frozen=True, eq=False):
    """A living process as a census found it; equal is what has its identity. ``mark`` is 0, and ``marker`` empty, where
    it carries none.
    """

    pid: int
    birth: str
    order: float  # seconds from the boot, or the epoch, until it began
    parent: int
    session: int
    mark: int
    marker: str
    cpu: float  # seconds, of the children that it has waited for too
    memory: int
    age: float

    @property
    def identity(self) -> Identity:
        return self.pid, self.birth

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seen) and other.identity == self.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def send_signal(self, number: int) -> bool:
        """Signal exactly the process that a census found, and no later one with its number; whether it was there."""
        handle = None
        try:
            handle = process_handle(self.pid)
            if (now := look_at({self.pid}).get(self.pid)) is None or now.birth != self.birth:
                return False
            if handle is None:
                psutil.Process(self.pid).send_signal(number)
            else:
                signal.pidfd_send_signal(handle, number)
        except (OSError, psutil.Error):  # it has just ended
            return False
        finally:
            if handle is not None:
                os.close(handle)
        return True


class Proof(Struct):
    """What proves that a process is one agent's."""

    mark: int
    marker: str
    first: Identity | None = None
    known: set[Identity] = set()


def mark_of(folder: Path) -> int:
    """The number that the kernel keeps for all processes of the agent with this folder: 55 bits, which no real limit
    looks like.
    """
    return int.from_bytes(hashlib.sha256(os.fsencode(folder)).digest()[:7]) | 1 << 54


class Snapshot:
    """The processes of one moment, each under whatever may prove that it is an agent's, so that a look for the members
    of one agent takes no longer where there are many others.
    """

    def __init__(self, processes: Iterable[Seen]) -> None:
        self._by_pid: dict[int, Seen] = {}
        self._children, self._sessions, self._marks = (collections.defaultdict[int, list[Seen]](list) for _ in range(3))
        self._markers: dict[str, list[Seen]] = collections.defaultdict(list)
        for item in processes:
            self._by_pid[item.pid] = item
            self._children[item.parent].append(item)
            self._sessions[item.session].append(item)
            self._marks[item.mark].append(item)
            self._markers[item.marker].append(item)

    def of(self, identity: Identity | None) -> Seen | None:
        """Exactly this process, and no later one with its number."""
        item = self._by_pid.get(identity[0]) if identity else None
        return item if item and item.identity == identity else None

    def members(self, proof: Proof) -> list[Seen]:
        """The processes that are provably the agent's: its first, known ones, carriers of its mark or marker, its
        session, and all their descendants.
        """
        first = self.of(proof.first)
        sure = [first, *map(self.of, proof.known)]
        sure += [*self._marks.get(proof.mark, ()), *self._markers.get(proof.marker, ())]
        # While its leader lives, nobody else can have this session's number.
        sure += self._sessions.get(first.pid, ()) if first else ()
        found = {item.pid: item for item in sure if item}
        unvisited = list(found)
        while unvisited:
            for child in self._children.get(unvisited.pop(), ()):
                if child.pid not in found:
                    found[child.pid] = child
                    unvisited.append(child.pid)
        return list(found.values())


class Census:
    """This user's processes at one moment, for root all, without the service and its keeper."""

    def __init__(self, keeper: Keeper, pool: Pool) -> None:
        self._keeper, self._pool, self._turn = keeper, pool, asyncio.Lock()
        self._next: asyncio.Task[Snapshot] | None = None  # the look that has not begun
        self.cost = 0.0  # seconds of a processor that the last look took

    async def look(self) -> Snapshot:
        """What there is, no older than this call: those who ask while a look is made share the next one. Raises
        TimeoutError.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._look_in_turn())
        return await asyncio.shield(self._next)

    async def _look_in_turn(self) -> Snapshot:
        async with self._turn:
            self._next = None  # who asks from now on comes too late for this look
            return await self._pool.run(self._look)

    def _look(self) -> Snapshot:
        began, ourselves = time.thread_time(), {os.getpid(), self._keeper.pid}
        found = Snapshot(item for item in look_at(None).values() if item.pid not in ourselves)
        self.cost = time.thread_time() - began
        return found


def look_at(pids: set[int] | None) -> dict[int, Seen]:
    """This user's processes by pid, for root all; only ``pids`` where given. Blocks."""
    return look_at_linux(pids) if sys.platform == "linux" else look_at_others(pids)


def look_at_linux(pids: set[int] | None) -> dict[int, Seen]:
    """Straight from /proc, some 20 us a process. Blocks."""
    boot, tick, page, now, user = (
        Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        os.sysconf("SC_CLK_TCK"),
        os.sysconf("SC_PAGE_SIZE"),
        time.clock_gettime(time.CLOCK_BOOTTIME),
        os.geteuid(),
    )
    found = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) if pids is None else pids:
        try:
            if user and os.stat(f"/proc/{pid}").st_uid != user:
                continue
            fields = read_of(pid, "stat").rpartition(b") ")[2].split()
            if fields[0] in (b"Z", b"X"):
                continue
            mark, marker = proofs_of(pid)
        except OSError:  # ended while we looked
            continue
        began = int(fields[19]) / tick
        found[pid] = Seen(
            pid, f"{boot}/{fields[19].decode()}", began, int(fields[1]), int(fields[3]), mark, marker,
            sum(map(int, fields[11:15])) / tick, int(fields[21]) * page, max(0.0, now - began),
        )  # fmt: skip
    return found


def proofs_of(pid: int) -> tuple[int, str]:
    """The mark and the marker of a process, as far as it lets us look into it: another user's does not, nor what sets
    PR_SET_DUMPABLE of prctl(2), as ssh-agent and earlier versions of Codex do. Raises OSError.
    """
    import resource

    mark, environment = 0, b""
    with contextlib.suppress(PermissionError):
        mark = max(0, resource.prlimit(pid, KeeperProgram.RLIMIT_LOCKS)[0])
    with contextlib.suppress(PermissionError):
        environment = b"" if mark else b"\0" + read_of(pid, "environ")
    marker = re.search(rb"\0CCO_TOKEN_FILE=([^\0]*)", environment)
    return mark, os.fsdecode(marker[1]) if marker else ""


def read_of(pid: int, name: str) -> bytes:
    """A file of /proc, whose reads give all that they can. Raises OSError."""
    file, content, most = os.open(f"/proc/{pid}/{name}", os.O_RDONLY), b"", 64 * 1024
    try:
        while len(chunk := os.read(file, most)) == most:
            content += chunk
        return content + chunk
    finally:
        os.close(file)


def look_at_others(pids: set[int] | None) -> dict[int, Seen]:
    """By psutil, where there is no /proc. Blocks."""
    found = {}
    for process in psutil.process_iter() if pids is None else map(psutil.Process, pids):
        with contextlib.suppress(psutil.Error, OSError), process.oneshot():
            user = os.geteuid() if hasattr(os, "geteuid") else 0
            if (user and process.uids().effective != user) or process.status() == psutil.STATUS_ZOMBIE:
                continue
            began, times = process.create_time(), process.cpu_times()
            session = os.getsid(process.pid) if hasattr(os, "getsid") else 0
            found[process.pid] = Seen(
                process.pid, f"{began:.2f}", began, process.ppid(), session, 0,
                process.environ().get("CCO_TOKEN_FILE", ""),
                times.user + times.system, process.memory_info().rss, max(0.0, time.time() - began),
            )  # fmt: skip
    return found


def process_handle(pid: int) -> int | None:
    """Something that means this process for ever, while its number may come to mean another one; None where the system
    has no such thing.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:  # Linux before 5.3, or a sandbox that forbids it
        return None

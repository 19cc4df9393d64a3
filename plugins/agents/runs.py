"""Runs of the pipeline that the service starts for people: ``POST /api/runs`` is ``cco run`` as a process of its own.

A run ends with its service, however that ends: it reads its standard input, which the service holds open, and stops at
its end as at Ctrl-C. After a stop or a kill its agents go on, as all agents do, and a new run on the issue goes on from
there. What a run printed lies in ``STORAGE/runs/PROJECT/ID.json``; one whose record still says ``running`` was cut off.
Its token lies beside it in ``ID.token`` until its revocation is stored.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
import re
import secrets
import subprocess
import sys
import time
import typing
import weakref
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

import cco_sidecar
from cco_sidecar import (
    CATEGORIES,
    READ,
    SPAWN,
    TASK_LENGTH,
    WRITE,
    Agents,
    ApiError,
    Claims,
    Endpoint,
    Identifier,
    Limit,
    Pool,
    Route,
    Sidecar,
    SidecarInfo,
    Storage,
    Text,
    Tokens,
    harmless,
    hookimpl,
    in_thread,
    iso,
    lock_file,
    one_line,
    redact,
    write_file,
)
from cco_sidecar_plugins._files import NO_JSON, content_of
from cco_sidecar_plugins._patterns import late_pattern
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.agents.end import EndedAgents

log = logging.getLogger("cco")

RunState = Literal["running", "completed", "failed", "stopped"]
TOKEN_SECONDS = 7 * 86_400
ENDING = late_pattern(r"^ *[\d.]+ s  (?:done|reached|failed|limit|interrupted): (.*)|^cco: (.*)", re.DOTALL)
STALE = "The service ended while it went on. Run it again: it goes on from there."


@hookimpl
def register_routes() -> list[Route]:
    return [
        Route("POST", "/api/runs", StartRun),
        Route("GET", "/api/runs", ListRuns),
        Route("GET", "/api/runs/{run_id}", GetRun),
        Route("DELETE", "/api/runs/{run_id}", StopRun),
    ]


@hookimpl
def part_class(base: type) -> type | None:
    return type("RunsAgents", (RunsAgents, base), {}) if issubclass(base, Agents) else None


@hookimpl
def shutdown(info: SidecarInfo) -> None:
    for sidecar, runs in list(PARTS.items()):
        if sidecar.info.instance_id == info.instance_id:
            runs.close()


# -- the wire


class RunRequest(Struct, omit_defaults=True):
    """Body of POST /api/runs: the options of ``cco run``. The command and the number of agents at once are the
    service's own settings.
    """

    issue_id: Identifier
    task: Annotated[Text, Meta(max_length=TASK_LENGTH)] | None = None
    type: Identifier | None = None
    until: Identifier | None = None
    rounds: Annotated[int, Meta(ge=1, le=1000)] | None = None
    retries: Annotated[int, Meta(ge=0, le=1000)] | None = None
    pause: Annotated[int, Meta(ge=0, le=31_536_000)] | None = None
    timeout: Annotated[int, Meta(ge=1, le=31_536_000)] | None = None
    restart: bool = False
    agent_command: None = None
    max_agents: None = None


class Run(Struct):
    """A run of the pipeline on an issue. ``reason`` is what it said at its end."""

    run_id: str
    issue_id: str
    state: RunState
    started_at: str
    ended_at: str | None = None
    exit_code: int | None = None
    reason: str | None = None
    started_by: str = ""


class RunDetails(Run):
    """A run with the last lines of its output."""

    lines: list[str] = []


class RunList(Struct):
    """Runs, newest last."""

    runs: list[Run]
    has_more: bool


class RunEnding(Struct):
    """Answer of DELETE /api/runs/{run_id}: the end has been ordered and follows, that of the run's agents too."""

    run_id: str
    ending: bool
    state: RunState


class RunQuery(Struct):
    issue_id: Identifier | None = None
    limit: Limit = 100


# -- the endpoints


class StartRun(Endpoint):
    """Start `cco run` on an issue, one at a time on each. Takes no agent's token."""

    permission = SPAWN
    body = RunRequest
    status = 202
    answers = {202: Run}
    problems = (409, 429)
    failure = "AGT_001"

    async def respond(self, body: dict[str, Any]) -> Run:
        check_person(self.claims)
        request, types = msgspec.convert(body, RunRequest), self.sidecar.agent_types
        if request.type is not None:
            types.category(request.type)
        kinds = [name for name, category in CATEGORIES.items() if not category.people]
        if request.until and types.categories.get(request.until, request.until) not in kinds:
            problem = f"until: {request.until} is neither an agent type nor a category"
            raise ApiError("AGT_002", problem, details={"path": "until"})
        if request.task is not None and not request.task.strip():
            raise ApiError("REQ_001", "The task is empty", details={"path": "task"})
        return await (await runs_of(self.sidecar)).start(self.claims, request)


class ListRuns(Endpoint):
    """Runs that the service has started, newest last."""

    permission = READ
    query_type = RunQuery
    answers = {200: RunList}

    async def respond(self) -> RunList:
        query, runs = self.query, await runs_of(self.sidecar)
        found = [run for run in runs.known.values() if query.issue_id in (None, run.issue_id)]
        return RunList(found[-query.limit :], len(found) > query.limit)


class RunEndpoint(Endpoint):
    """The base of the endpoints about one run."""

    permission = READ
    problems = (404,)

    async def find(self, run_id: str) -> Run:
        """Raises REQ_002, and AUTH_003 where it is on another issue than the token's."""
        if (run := (await runs_of(self.sidecar)).known.get(run_id)) is None:
            raise ApiError("REQ_002", f"No run {run_id}")
        self.acted_on = {"issue_id": run.issue_id}
        self.sidecar.tokens.check_issue(self.claims, run.issue_id)
        return run


class GetRun(RunEndpoint):
    """A run and what it printed."""

    answers = {200: RunDetails}

    async def respond(self, run_id: str) -> RunDetails:
        run = await self.find(run_id)
        return RunDetails(**msgspec.structs.asdict(run), lines=await (await runs_of(self.sidecar)).lines(run_id))


class StopRun(RunEndpoint):
    """End a run and the agents that it has started, as Ctrl-C ends `cco run`. Takes no agent's token."""

    permission = SPAWN
    status = 202
    answers = {202: RunEnding}
    failure = "AGT_001"

    async def respond(self, run_id: str) -> RunEnding:
        check_person(self.claims)
        run = await self.find(run_id)
        return RunEnding(run_id, (await runs_of(self.sidecar)).stop(run_id), run.state)


def check_person(claims: Claims) -> None:
    """Raises AUTH_003 for a token that a program holds: a run may more than its agents."""
    if claims.bound:
        raise ApiError("AUTH_003", "An agent's token starts and ends no run: that is for people")


# -- the part


class Active:
    """A run whose process lives."""

    def __init__(self, run: Run, process: subprocess.Popen[str], lines: collections.deque[str]) -> None:
        self.run, self.process, self.lines = run, process, lines
        self.stopped = ""  # why it is to end
        self.subject = f"run-{run.run_id}"

    def end(self, why: str) -> None:
        """Have it end, as at Ctrl-C. May be called in any thread."""
        self.stopped = self.stopped or why
        assert self.process.stdin
        with contextlib.suppress(OSError):  # it has ended meanwhile
            self.process.stdin.close()


class Runs:
    """The runs of a service, on the loop, but for the thread of each that reads what it prints."""

    AT_ONCE, KEPT = 20, 200
    LINES, LINE = 500, 500  # how many of the last lines are kept, and how many characters of each
    PATIENCE = 30.0  # for a run that is to end its agents first

    def __init__(self, sidecar: Sidecar) -> None:
        self._sidecar, self._settings = sidecar, typing.cast(PluginSettings, sidecar.settings)
        self._folder = sidecar.settings.storage / "runs" / sidecar.settings.project
        self._loop, self._disk = asyncio.get_running_loop(), Pool("runs", 2, 20)
        self.known: dict[str, Run] = {}  # oldest first
        self._active: dict[str, Active] = {}
        self._unwanted: set[str] = set()  # runs that were stopped before they had a process
        self.loaded = asyncio.ensure_future(self._load())

    async def _load(self) -> None:
        """Take in the runs of earlier times; those that were cut off have ended."""
        earlier = await self._disk.run(self._read_all)
        for run in earlier:
            if run.state == "running":
                run.state, run.reason = "stopped", STALE
                with contextlib.suppress(OSError):  # then the next start finds it so once more
                    await self._disk.run(self._write, run, await self.lines(run.run_id))
        self.known = {run.run_id: run for run in earlier} | self.known

    def _read_all(self) -> list[Run]:
        """The records, oldest first, of which the newest KEPT stay. Blocks."""
        found = []
        for path in self._folder.glob("*.json"):
            try:
                found.append(msgspec.json.decode(content_of(path), type=Run))
            except NO_JSON as error:  # half a file, or another's
                log.warning("runs: %s is passed over: %s", path.name, one_line(error))
        found.sort(key=lambda run: (run.started_at, run.run_id))
        for run in found[: -self.KEPT]:
            remove(self._folder / f"{run.run_id}.json")
        return found[-self.KEPT :]

    # -- starting

    async def start(self, claims: Claims, request: RunRequest) -> Run:
        """Start a run. Raises REQ_001 with status 409 where one goes on, AGT_003 where too many do, AGT_001."""
        if going := next((run for run in self._running() if run.issue_id == request.issue_id), None):
            problem = f"A run goes on for {request.issue_id} already: {going.run_id}"
            raise ApiError("REQ_001", problem, status=409, details={"run_id": going.run_id})
        if (number := len(self._running())) >= self.AT_ONCE:  # those among them that have no process yet
            raise ApiError("AGT_003", f"{number} runs go on already", retry_after=10)
        name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        run = Run(name, request.issue_id, "running", iso(), started_by=claims.sub)
        self.known[name] = run  # from here on a second one is refused
        return await asyncio.shield(asyncio.ensure_future(self._start(run, request, self._token(claims, name))))

    async def _start(self, run: Run, request: RunRequest, token: str) -> Run:
        """Start the process of a run: wholly or not at all, also where the client hangs up meanwhile."""
        try:
            process = await asyncio.wrap_future(in_thread("run", lambda: self._begin(run, request, token)))
        except BaseException as error:
            del self.known[run.run_id]
            self._unwanted.discard(run.run_id)
            if isinstance(error, OSError):
                raise ApiError("AGT_001", f"The run cannot be started: {error.strerror}") from None
            raise
        active = self._active[run.run_id] = Active(run, process, collections.deque(maxlen=self.LINES))
        in_thread(f"run-{run.run_id}", lambda: self._follow(active))
        log.info("run %s started on %s, pid %d", run.run_id, run.issue_id, process.pid)
        if run.run_id in self._unwanted:
            self._unwanted.discard(run.run_id)
            self.stop(run.run_id)
        return run

    def _running(self) -> list[Run]:
        return [run for run in self.known.values() if run.state == "running"]

    def _token(self, claims: Claims, name: str) -> str:
        """A run's own token: an architect's, for what whoever starts it may, and for the same issue."""
        tokens, types = self._sidecar.tokens, self._sidecar.agent_types
        may = set(claims.permissions) | ({WRITE} if CATEGORIES[types.categories[claims.agent_type]].people else set())
        return tokens.mint(
            f"run-{name}", "chief-architect", ttl=TOKEN_SECONDS, permissions=sorted(may), issue_id=claims.issue_id
        )

    def _begin(self, run: Run, request: RunRequest, token: str) -> subprocess.Popen[str]:
        """The process. Raises OSError, and REQ_001 where somebody else runs the pipeline on the issue. Blocks."""
        check_lock(self._settings.storage / "pipelines" / f"{run.issue_id}.lock", run.issue_id)
        for folder in (self._folder.parent, self._folder):  # parents=True would make one by the umask alone
            folder.mkdir(mode=0o700, exist_ok=True)
        try:
            write_file(self._folder / f"{run.run_id}.token", token.encode())
            self._write(run, [])
            return self._process(run, request)
        except BaseException:
            for ending in ("token", "json"):
                (self._folder / f"{run.run_id}.{ending}").unlink(missing_ok=True)
            raise

    def _process(self, run: Run, request: RunRequest) -> subprocess.Popen[str]:
        own = {"root": self._settings.root, "project": self._settings.project, "storage": self._settings.storage}
        asked = {"task": request.task, "type": request.type, "until": request.until, "rounds": request.rounds,
                 "retries": request.retries, "pause": request.pause, "timeout": request.timeout}  # fmt: skip
        given = {name: value for name, value in asked.items() if value is not None}
        if request.task == "-":  # which alone stands for standard input
            given["task"] = "- "
        words = [f"--{name}={value}" for name, value in (own | given).items()]
        words += ["--restart"] if request.restart else []
        command = [sys.executable, str(Path(cco_sidecar.__file__).resolve()), "run", "--until-eof"]
        return subprocess.Popen(
            [*command, f"--issue={run.issue_id}", *words], cwd=self._settings.root, env=self._environment(run),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
            errors="replace", start_new_session=True,
        )  # fmt: skip

    def _environment(self, run: Run) -> dict[str, str]:
        """This environment without another agent's identity; what the service was told by flags by variables."""
        hidden = ("SIDECAR_URL", "JWT_TOKEN", "PROJECT_ID", "CCO_SIDECAR_JWT_SECRET", "COLUMNS")
        kept = {name: value for name, value in os.environ.items() if name not in hidden}
        types = ",".join(f"{name}={category}" for name, category in self._settings.agent_types.items())
        told = {"PLUGINS": ",".join(map(str, self._settings.plugins)), "AGENT_TYPES": types}
        kept |= {f"CCO_SIDECAR_{name}": value for name, value in told.items() if value}
        return kept | {"CCO_TOKEN_FILE": str(self._folder / f"{run.run_id}.token"), "PYTHONIOENCODING": "utf-8"}

    # -- following and ending

    def _follow(self, active: Active) -> None:
        """Read what a run prints, to its end; then write down how it ended. In a thread of its own."""
        assert active.process.stdout
        for line in lines_of(active.process.stdout, self.LINE):
            active.lines.append(redact(harmless(line))[0])
        run, code = active.run, active.process.wait()
        active.process.stdout.close()
        told = [found for line in reversed(active.lines) if (found := ENDING.match(line))]
        reason = active.stopped or next((found[1] or found[2] for found in told), None)
        run.exit_code, run.ended_at, run.reason = code, iso(), reason
        run.state = "stopped" if active.stopped or code in (130, 143) else "completed" if code == 0 else "failed"
        try:
            self._write(run, list(active.lines))
        except OSError as error:
            log.error("run %s: its record cannot be written: %s", run.run_id, error.strerror)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the service has stopped
            self._loop.call_soon_threadsafe(self._ended, active)

    def _ended(self, active: Active) -> None:
        active.end("")
        del self._active[active.run.run_id]
        revoke(self._folder / f"{active.run.run_id}.token", self._sidecar.tokens, self._sidecar.storage)
        ended = [run.run_id for run in self.known.values() if run.state != "running"]
        for name in ended[: -self.KEPT]:
            del self.known[name]
            remove(self._folder / f"{name}.json")
        log.info("run %s ended: %s, exit code %s", active.run.run_id, active.run.state, active.run.exit_code)

    def stop(self, run_id: str) -> bool:
        """Have a run end its agents and itself; False where it has ended."""
        if (active := self._active.get(run_id)) is None:
            if starts := self.known[run_id].state == "running":
                self._unwanted.add(run_id)
            return starts
        if not active.stopped:
            active.end("It was stopped. Run it again: it goes on from there.")
            self._loop.call_later(self.PATIENCE, lambda: asyncio.ensure_future(self._force(active)))
        return True

    async def _force(self, active: Active) -> None:
        """End a run that does not end, and its agents in its place."""
        if active.process.poll() is None:
            active.process.kill()
            agents = typing.cast(EndedAgents, self._sidecar.agents)
            for running in list(agents.active.values()):
                if running.row["parent"] == active.subject:
                    await agents.end(running.row["id"])

    def close(self) -> None:
        """End all runs; their agents go on, as all agents do. Blocks, in a thread."""
        ending = list(self._active.values())
        for active in ending:
            active.end("The service stopped. Run it again: it goes on from there.")
        deadline = time.monotonic() + 2.5
        for active in ending:
            try:
                active.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                active.process.kill()
                active.process.wait()

    # -- records

    async def lines(self, run_id: str) -> list[str]:
        """What a run has printed, or its last lines."""
        if active := self._active.get(run_id):
            return list(active.lines)
        content = await self._disk.run(content_of, self._folder / f"{run_id}.json")
        try:
            return msgspec.json.decode(content, type=RunDetails).lines
        except NO_JSON:  # somebody has taken it away
            return []

    def _write(self, run: Run, lines: list[str]) -> None:
        record = RunDetails(**msgspec.structs.asdict(run), lines=lines)
        write_file(self._folder / f"{run.run_id}.json", msgspec.json.encode(record))


class RunsAgents(Agents):
    """Begins by revoking the tokens of runs that ended with an earlier service."""

    async def start(self) -> None:
        folder = self.settings.storage / "runs" / self.settings.project
        for path in folder.glob("*.token"):  # before the first await: requests are answered from then on
            revoke(path, self.tokens, self.storage)
        await super().start()


def revoke(path: Path, tokens: Tokens, storage: Storage) -> None:
    """Revoke the token of the run after which its file is named, and remove the file when that is stored."""

    def stored(future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and not future.exception():
            remove(path)

    subject, project = f"run-{path.stem}", path.parent.name
    tokens.revoked.add(subject)
    storage.write_behind(lambda records: records.revoke(project, subject)).add_done_callback(stored)


def remove(path: Path) -> None:
    """Remove a file of ours. Where that cannot be, it is tried again at the next start."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("runs: %s cannot be removed: %s", path.name, error.strerror)


def lines_of(stream: IO[str], longest: int) -> Any:
    """The lines of a stream, each cut to ``longest`` characters, however long it is."""
    whole = True
    while piece := stream.readline(longest):
        if whole:
            yield piece.rstrip("\n")
        whole = piece.endswith("\n")


def check_lock(path: Path, issue_id: str) -> None:
    """Raise REQ_001 with status 409 where a pipeline that somebody typed holds the issue. Blocks."""
    with contextlib.suppress(FileNotFoundError):
        file = os.open(path, os.O_RDWR)
        try:
            lock_file(file)
        except OSError:
            raise ApiError("REQ_001", f"`cco run` goes on for {issue_id} in a terminal", status=409) from None
        finally:
            os.close(file)


PARTS: weakref.WeakKeyDictionary[Sidecar, Runs] = weakref.WeakKeyDictionary()


async def runs_of(sidecar: Sidecar) -> Runs:
    """The runs of a service, those of earlier times among them."""
    runs = PARTS.get(sidecar)
    if runs is None or (runs.loaded.done() and runs.loaded.exception()):  # the disk may answer by now
        runs = PARTS[sidecar] = Runs(sidecar)
    await asyncio.shield(runs.loaded)
    return runs

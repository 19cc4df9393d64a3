#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "tornado>=6.6",
#   "pyjwt>=2.12",
#   "pluggy>=1.5",
#   "watchdog>=7.1",
#   "msgspec>=0.20",
#   "psutil>=6.0",
# ]
# ///
"""Orchestration sidecar: one service that lets a team of coding agents work on one repository.

Run ``python cco_sidecar.py`` inside a repository. Agents then fetch the context that their task needs, store results
that the next agent sees, wake each other with events, and are started, watched and ended.

The path of a request, from top to bottom of this file:

    routes -> Endpoint.prepare (host, size, token, rate, permission, policies)
           -> Endpoint._serve (path, query, body) -> respond
           -> a part (Results, EventBus, Contexts, Agents) -> Storage.write (one writer thread, one commit)
           -> EventBus.wake_waiters (on the loop, in commit order) -> Endpoint.send

This file alone serves the whole reference and makes tokens. Files in ``plugins/`` add to it, or do a part better, by
hooks (``Asks``, ``Tells``, ``Parts``) or, before these are loaded, by a class that ``bundled_class`` names.

Units: seconds and bytes, unless a name says otherwise (``mtime_ns``).

Threads: all is on the event loop, where a method without ``await`` is atomic, except
  * the writer thread of Storage, which alone changes the database, and asks the rules who works next;
  * worker threads (``Pool``) for what blocks: git, files, processes, and plugins' hooks, which get values alone.
"""

from __future__ import annotations

import gc
import os
import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler and (
    __name__ == "__main__" or os.path.basename("".join(sys.argv[:1])) in ("cco", "cco.exe")
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends a start without a traceback; _program.py has it interrupt
if collecting := gc.isenabled():
    gc.disable()  # while modules are imported, which stay: collections took 4 % of the start
if sys.version_info < (3, 11):  # noqa: UP036 - the file may be started by any interpreter
    sys.exit("cco: Python 3.11 or newer is needed, this is " + sys.version.split()[0])
if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # this file's folder: a secrets.py of the repository is not to be imported as ours

import argparse
import asyncio
import errno
import hashlib
import http
import importlib.machinery
import importlib.util
import inspect
import ipaddress
import json
import logging
import math
import queue
import random
import re
import secrets
import shlex
import shutil
import socket
import sqlite3
import stat
import subprocess
import tempfile
import threading
import time
import types
import typing
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AsyncExitStack, ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import cache, cached_property, lru_cache, partial
from itertools import accumulate, chain, islice, product, takewhile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

try:
    import jwt
    import msgspec
    import pluggy
    import psutil
    import tornado.escape
    import tornado.http1connection
    import tornado.httpserver
    import tornado.iostream
    import tornado.netutil
    import tornado.web
    from msgspec import UNSET, Meta, Raw, Struct
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.stderr.write(
        f"cco: the package {missing.name!r} is missing: run `pip install tornado pyjwt pluggy watchdog msgspec psutil`,"
        " or start with `uv run cco_sidecar.py`, which needs no installation\n"
    )
    sys.exit(2)

if collecting:
    gc.enable()
__version__ = "1.0.0"

MB = 1024 * 1024
TASK_LENGTH = 30_000  # characters, of up to 12 bytes each in a URL
MAX_LINE = 8 * 1024  # bytes of a request's target; RFC 9112 (3) recommends 8,000 or more
MAX_FIELDS = 64 * 1024  # bytes of a request's headers


# ==== Vocabulary: the options, roles, errors and shapes that everything below speaks of ====


# -- options: how each is read, their table, their sources


def read_paths(value: Any) -> tuple[Path, ...]:
    return tuple(map(read_path, read_list(value)))


def read_command(value: Any) -> tuple[str, ...]:
    """An argv: a TOML list, a JSON array, or words quoted as for a shell, which never sees it."""
    words = value
    if not isinstance(value, list):
        try:
            words = json.loads(text) if (text := read_text(value))[0] == "[" else shlex.split(text)
        except ValueError as error:
            raise ValueError(f"cannot be read as a command: {error}") from None
    if not words or not all(isinstance(word, str) and "\0" not in word for word in words):
        raise ValueError("must be a command: a list of words that is not empty")
    return tuple(words)


def read_bool(value: Any) -> bool:
    return read_choice("1", "0", "true", "false", "yes", "no")(str(value).lower()) in ("1", "true", "yes")


def read_number(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if not re.fullmatch(r"-?[0-9]{1,15}", str(value)) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return read


def read_choice(*choices: str) -> Callable[[Any], str]:
    return read_match("|".join(choices), f"must be one of {', '.join(choices)}")


def read_list(value: Any) -> tuple[str, ...]:
    """Texts separated by commas; a TOML list or a repeated flag is a list of these."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(part, str) and part.strip(", ") for part in parts):
        raise ValueError("must be a list of texts that are not empty")
    return tuple(item.strip() for part in parts for item in part.split(",") if item.strip())


def read_path(value: Any) -> Path:
    """A path in the encoding of the file system, where ``~`` is a home folder."""
    try:
        return Path(os.fsdecode(read_text(value).encode("utf-8", "surrogateescape"))).expanduser()
    except RuntimeError as error:  # the home folder of ~ or ~name is not known
        raise ValueError(f"has no meaning here: {error}") from None


def read_match(pattern: str, problem: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.DOTALL):
            raise ValueError(problem if isinstance(value, str) else f"{problem}, in quotes")
        return value

    return read


read_text = read_match(r"[^\0]+", "must be a text that is not empty and holds no NUL")
read_secret = read_match(r"[^\0]{32,}", "must be at least 32 characters long")
read_host = read_match(r"(?a)[\w:%-]{1,63}(\.[\w:%-]{1,63})*\.?", "must be a host name or an address")
IDENTIFIER = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
NAME = rf"(?!.*\.\.){IDENTIFIER}"
NAME_IN_WORDS = "must be letters, digits, '.', '_' or '-', 128 at most, with a letter or digit first and no '..'"
read_project = read_match(NAME, NAME_IN_WORDS)


class Option(Struct, frozen=True):
    """One setting, called for its default; ``read`` makes its value of text or of TOML's, and raises ValueError."""

    default: Any
    read: Callable[[Any], Any]
    help: str
    metavar: str

    def __call__(self) -> Any:
        return self.default


def option(default: Any, read: Callable[[Any], Any], help: str, metavar: str = "VALUE") -> Any:
    """A field of Settings."""
    return msgspec.field(default_factory=Option(default, read, help, metavar))


class Settings(Struct, frozen=True, eq=False, kw_only=True, weakref=True):
    """Every option: flag ``--max-agents``, else variable ``CCO_SIDECAR_MAX_AGENTS``, else the default here."""

    root: Path = option(None, read_path, "repository to serve (default: this folder's git top level)", "DIR")
    project: str = option(None, read_project, "project id (default: the root folder's name as a slug)", "ID")
    storage: Path = option(None, read_path, "where state is kept (default: a folder per project)", "DIR")
    host: str = option("127.0.0.1", read_host, "address to listen on")
    port: int = option(3001, read_number(0, 65535), "TCP port; 0 takes a free one", "N")
    allowed_host: tuple[str, ...] = option((), read_list, "more Host names that are answered", "NAME")
    cors_origin: tuple[str, ...] = option((), read_list, "more web origins that may call", "ORIGIN")
    jwt_secret: str | None = option(None, read_secret, "secret of 32 characters or more (default: made)")
    token_ttl: int = option(3600, read_number(1, 31_536_000), "life of a token", "SECONDS")
    cache_size_mb: int = option(256, read_number(0, 65_536), "memory for cached contexts", "MB")
    agent_command: tuple[str, ...] | None = option(
        None, read_command, "command that runs an agent, with {task}, {prompt} and their like", "CMD"
    )
    agent_timeout: int = option(3600, read_number(1, 31_536_000), "time limit of an agent", "SECONDS")
    max_agents: int = option(10, read_number(0, 10_000), "agents running at once", "N")
    stop_agents: bool = option(False, read_bool, "a stop by signal ends the agents too")
    plugins: tuple[Path, ...] = option((), read_paths, "one more folder of plugins", "DIR")
    no_plugins: bool = option(False, read_bool, "the service runs no plugins")
    log_level: str = option("info", read_choice("debug", "info", "warning", "error"), "what is logged")
    places: dict[str, str] = {}  # by option: the flag, variable or line

    def where(self, name: str) -> str:
        """Where an option is set, for messages."""
        return self.places.get(name, flag_of(name))

    def command_of(self, agent_type: str) -> tuple[str, ...] | None:
        return self.agent_command  # with plugins/_settings.py there are some for one type alone

    def log_handler(self) -> logging.Handler:
        return logging.StreamHandler()

    @classmethod
    def read_files(cls, root: Path) -> dict[str, tuple[str, Any, Path]]:
        """By option (where it is set, value, folder of relative paths), from settings files. Alone StartError."""
        for name, mark in {"cco.toml": "", "pyproject.toml": r"^[\[ \t]*+tool[\s.\]\"']+cco-sidecar(?![\w-])"}.items():
            file = root / name
            if file.is_file() and re.search(mark, file.read_text("utf-8-sig", "replace"), re.MULTILINE):
                raise StartError(f"{name}: settings files are not read; {ABSENT}")
        return {}


def load_settings(flags: dict[str, Any], environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from the ``flags`` that were given, ``environ`` and the root's files. Raises StartError."""
    here = Path.cwd()
    variables = {name: f"CCO_SIDECAR_{name.upper()}" for name in option_table()}
    given = {name: (variable, environ[variable], here) for name, variable in variables.items() if variable in environ}
    given |= {name: (flag_of(name), value, here) for name, value in flags.items()}
    root = read_option("root", *given["root"]) if "root" in given else discover_root(here)
    if not root.is_dir():
        raise StartError(f"{given['root'][0]}: {root} is not a folder")
    root = root.resolve()
    sources = settings_class().read_files(root) | given
    values = {name: read_option(name, *source) for name, source in sources.items()}
    slug = re.sub(r"\.(?=\.)", "", re.sub(r"[^a-z0-9._-]+", "-", root.name.lower())).strip("-._")[:128]
    values = {"project": slug or "project"} | values | {"root": root}
    values["storage"] = values.get("storage") or default_storage(root, values["project"])
    return settings_class()(**values, places={name: where for name, (where, *_) in sources.items()})


def read_option(name: str, where: str, value: Any, folder: Path | None = None) -> Any:
    """The value of an option that was set at ``where``; relative paths start at ``folder``. Raises StartError."""
    folder = folder or Path.cwd()
    try:
        found = option_table()[name].read(value)
    except (ValueError, RecursionError) as error:
        text = value[0] if isinstance(value, list) and len(value) == 1 else value  # of a flag that may be repeated
        shown = f"{text!r} " if isinstance(text, str) and name != "jwt_secret" else ""
        raise StartError(f"{where}: {shown[:200]}{one_line(error)}") from None
    if isinstance(found, tuple):
        return tuple(folder / item if isinstance(item, Path) else item for item in found)
    return folder / found if isinstance(found, Path) else found


@cache
def option_table() -> dict[str, Option]:
    rows = {field.name: field.default_factory for field in msgspec.structs.fields(settings_class())}
    return {name: row for name, row in rows.items() if isinstance(row, Option)}


def settings_class() -> type[Settings]:
    return bundled_class(Settings, "_settings", "PluginSettings")


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def discover_root(folder: Path) -> Path:
    """The git top level around ``folder``, else ``folder`` itself."""
    found = run_git(folder, "rev-parse", "--show-toplevel")
    top = Path(os.fsdecode(found.removesuffix(b"\n"))) if found else folder
    # A top level without a .git is what a repository's core.worktree names, perhaps a whole home.
    return top if not found or (top / ".git").exists() else folder


def default_storage(root: Path, project: str) -> Path:
    """A folder per user and project, where the platform keeps state. Raises StartError."""
    places = {"win32": ("LOCALAPPDATA", "AppData/Local"), "darwin": ("", "Library/Application Support")}
    variable, below_home = places.get(sys.platform, ("XDG_STATE_HOME", ".local/state"))
    given = os.environ.get(variable, "")
    base = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~"), below_home)  # as XDG has it
    if not base.is_absolute():
        raise StartError("your home folder, in which state is kept, is not known: set HOME, or use --storage DIR")
    return base / "cco-sidecar" / f"{project}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"


# -- roles


class Category(Struct, frozen=True):
    """What one category of agent types may do. ``people`` are no agents, but those that they spawn store results."""

    permissions: tuple[str, ...]
    per_minute: int | None
    burst: int | None
    topic: str  # of results
    people: bool = False


READ, WRITE, PUBLISH, SPAWN = PERMISSIONS = ("read_context", "write_results", "publish_events", "spawn_agents")

CATEGORIES = {
    "architect": Category(PERMISSIONS, None, None, "architecture"),
    "coding": Category((READ, WRITE, PUBLISH), 60, 10, "implementation"),
    "qa": Category((READ, WRITE, PUBLISH), 60, 10, "testing"),
    "security": Category((READ, WRITE, PUBLISH), 60, 10, "security"),
    "documentation": Category((READ,), 30, 5, "documentation"),
    "support": Category((READ, PUBLISH), 30, 5, "support"),
    "operator": Category((READ, PUBLISH, SPAWN), None, None, "coordination", people=True),  # of the plugin dashboard
}
CategoryName: Any = Literal[tuple(CATEGORIES)]
Permission: Any = Literal[PERMISSIONS]

ERRORS = {  # code: status, default message
    "AUTH_001": (401, "Invalid or missing JWT token"),
    "AUTH_002": (401, "Expired JWT token"),
    "AUTH_003": (403, "Insufficient permissions"),
    "CTX_001": (500, "Context generation failed"),
    "CTX_002": (500, "Context too large"),
    "EVT_001": (500, "Event bus unavailable"),
    "EVT_002": (400, "Invalid event schema"),
    "EVT_003": (410, "The cursor is outside of what is retained"),
    "STR_001": (500, "Storage write failed"),
    "STR_002": (500, "Storage read failed"),
    "AGT_001": (500, "Agent spawn failed"),
    "AGT_002": (400, "Unknown agent type"),
    "AGT_003": (429, "Too many agents"),
    "RATE_001": (429, "Too many requests"),
    "REQ_001": (400, "Malformed request"),
    "REQ_002": (404, "Not found"),
    "REQ_003": (405, "Method not allowed"),
    "REQ_004": (413, "Body too large"),
    "REQ_005": (415, "The body must be application/json"),
    "REQ_006": (422, "The Idempotency-Key was used with another body"),
    "REQ_007": (403, "Host or Origin refused"),
    "REQ_008": (408, "The request did not come in time"),
    "REQ_009": (503, "Too many connections, or answers that are not read"),
}
ERROR_OF_STATUS = {status.value: status.phrase.lower().replace(" ", "_") for status in http.HTTPStatus}
ERROR_OF_STATUS |= {413: "content_too_large", 414: "uri_too_long", 422: "unprocessable_content"}  # as in RFC 9110


# -- shapes of bodies and queries; plugins/http/_answers.py has those of answers


class ResultSubmission(Struct, omit_defaults=True):
    """Body of POST /api/results. Fields that are not named here are kept."""

    agent_id: Identifier
    agent_type: Identifier
    issue_id: Identifier
    project_id: Identifier
    result: ResultBody
    timestamp: str | None = None


class ResultBody(Struct, omit_defaults=True):
    status: Literal["success", "failed", "partial"]
    files_created: list[str | FileEntry] = []
    files_modified: list[str | FileEntry] = []
    files_deleted: list[str | FileEntry] = []
    decisions: list[str] = []
    rationale: str | None = None
    metrics: ResultMetrics | None = None
    artifacts: dict[str, Any] = {}
    errors: list[Any] = []
    warnings: list[Any] = []
    next_steps: list[Any] = []


class FileEntry(Struct, omit_defaults=True):
    path: str
    size: float | None = None
    language: str | None = None
    checksum: str | None = None
    diff: str | None = None
    changes: list[str] = []


class ResultMetrics(Struct, omit_defaults=True):
    execution_time_ms: float | None = None
    tokens_used: float | None = None
    test_coverage: float | None = None
    lines_of_code: float | None = None
    complexity_score: float | None = None


class EventSubmission(Struct, omit_defaults=True):
    """Body of POST /api/events/{event_type}. Fields that are not named here are kept."""

    publisher: Annotated[str, Meta(min_length=1, max_length=256)]
    topic: Annotated[str, Meta(min_length=1, max_length=256)]
    data: dict[str, Any]
    event_type: EventType | None = None
    correlation_id: Annotated[str, Meta(max_length=256)] | None = None
    ttl_seconds: Annotated[float, Meta(ge=1, le=86400)] = 86400
    priority: Literal["low", "normal", "high", "critical"] = "normal"


class SpawnRequest(Struct, omit_defaults=True):
    agent_type: Identifier
    issue_id: Identifier
    task: Annotated[Text, Meta(max_length=TASK_LENGTH)] = ""
    context_requirements: list[str] = []
    context_tokens: Annotated[int, Meta(ge=500, le=2_500_000)] | None = None
    environment: Environment = {}
    priority: Literal["low", "normal", "medium", "high", "critical"] = "normal"
    permissions: list[Permission] | None = None
    project_id: Identifier | None = None
    issue_only: bool = False  # the agent's token works on this issue only


AgentState = Literal["starting", "running", "completed", "failed", "killed", "timeout", "lost"]
FAILED_STATES = ("failed", "timeout", "lost")


class ContextQuery(Struct):
    reader: ClassVar[object] = None  # whose brief is asked for, in the plugin brief
    task: Annotated[str, Meta(max_length=TASK_LENGTH)] = ""
    max_bytes: Annotated[int, Meta(ge=2_000, le=10 * MB)] = 10 * MB
    max_tokens: Annotated[int, Meta(ge=500)] = 10 * MB
    max_files: Annotated[int, Meta(ge=0, le=1000)] = 50
    since: Since = ""


class WaitQuery(Struct):
    timeout: Annotated[int, Meta(ge=0, le=300_000)] = 30_000
    filter: Annotated[str, Meta(max_length=4096)] = ""
    since: Since = ""
    limit: Limit = 100


EVENT_TYPE = r"[a-z][a-z0-9_.-]{0,63}"
EVENT_TYPE_IN_WORDS = "must be small letters, digits, '.', '_' or '-', 64 at most, with a letter first"
is_identifier = re.compile(NAME).fullmatch
Identifier = Annotated[str, Meta(pattern=rf"^{NAME}\Z")]
EventType = Annotated[str, Meta(pattern=rf"^{EVENT_TYPE}\Z")]
Text = Annotated[str, Meta(pattern=r"^[^\x00]*\Z")]  # for programs
Environment = dict[Annotated[str, Meta(pattern=r"^[^=\x00]+\Z")], Text]
Limit = Annotated[int, Meta(ge=1, le=1000)]
Since = Annotated[str, Meta(max_length=128)]
Priority = Literal["high", "medium", "low"]
Sections = dict[str, Any]


# ==== Hooks: what plugins can add, how they are loaded, how they are asked ====

hookimpl = pluggy.HookimplMarker("cco_sidecar")
PACKAGE = "cco_sidecar_plugins"


class Asks:
    """Hooks by which anybody's code gives a value; all but register_routes may block. None is no answer; where one is
    wanted, the first wins. An implementation may take fewer arguments. Who raises, or returns what JSON cannot say or
    has another type, is logged and passed over. plugins/examples/_every_hook.py has the smallest useful one of each.
    """

    def register_agent_types(self, settings: Settings) -> dict[Identifier, CategoryName]:
        """More agent types with their category; one that is known keeps its own. Asked at the start and by ``cco
        token``, with plugins/ also where a type is not known.
        """

    def context_section(self, request: ContextRequest) -> Sections:
        """JSON values by name of section, kept until a file, git or the issue's results change. The plugin loaded last
        wins; an object for ``metadata`` adds to what is there. The reference's keep their shape, which alone nobody
        checks.
        """

    def rank_files(self, request: RankRequest) -> list[RankedFile] | None:
        """The project's files, most relevant first, for a task."""

    def next_agents(
        self, result: ResultFact, proposals: list[NextAgent], history: list[ResultFact], language: str,
        submission: dict[str, Any], settings: Settings,
    ) -> list[NextAgent]:  # fmt: skip
        """``proposals`` with some added, removed or replaced; of several for one type the last counts. ``history`` has
        the issue's newest 200 results, oldest first, with plugins/ also a coder's last one. Alone all writing waits.
        """

    def permission_policy(self, claims: Claims, permission: str | None, method: str, path: str) -> bool | str | None:
        """Refuse a request that the token allows: False or a reason; None or True leaves it. Who fails refuses.
        ``permission`` is None where any token does.
        """

    def agent_command(self, launch: AgentLaunch, settings: Settings) -> Argv | AgentCommand | None:
        """The argv that runs an agent, or an AgentCommand; AgentLaunch's fields in braces are filled in."""

    def register_routes(self) -> list[Route]:
        """More endpoints, classes derived from Endpoint; one with another's method and path takes its place."""


class Tells:
    """Hooks by which observers hear of what happened, in order, after the commit, in a thread of their own."""

    def result_stored(self, result: dict[str, Any]) -> None:
        """A result was stored: the body as it was posted, with its ``id`` and ``stored_at``."""

    def event_published(self, event: dict[str, Any]) -> None:
        """An event was published; ``event`` is as readers get it."""

    def agent_ended(self, agent: dict[str, Any]) -> None:
        """An agent ended: the data of its ``agent_exited`` event."""

    def startup(self, info: SidecarInfo) -> None:
        """The service listens, and waits for you."""

    def shutdown(self, info: SidecarInfo) -> None:
        """The service has answered its last request, and waits for you to close your files: no ``atexit`` follows."""


class Parts:
    """The hook by which a trusted plugin does one part of the work."""

    def part_class(self, settings: Settings, base: type) -> type | None:
        """A class derived from ``base``, or None where you leave that part as it is. Asked at the start: for Endpoint
        on the loop, else before there are a loop and a storage folder. StartError ends the program, other errors leave
        the part as it is. ``base`` is one of these, whose docstrings have the promises, or what the plugin before yours
        made of it: Storage, Records, Server, Endpoint, AgentTypes, Tokens, EventBus, Results, Contexts, Project,
        Agents, Launcher or Processes. Of every endpoint ``work`` gives the answer, ``send`` gets its bytes,
        ``finished`` hears of it.
        """


def load_hooks(settings: Settings, strict: bool = False) -> Hooks:
    """The built-in plugins and, unless --no-plugins, all others. For faulty ones ``strict``, alone always, raises
    StartError.
    """
    rules = bundled_class(ReferenceRules, "results/_routing", "ReferenceRules")
    hooks = bundled_class(Hooks, "_hooks", "SafeHooks")([rules()])
    hooks.load(settings, strict)
    return hooks


class Hooks:
    """The loaded plugins, called one by one. Who fails is passed over and logged, at its loading it ends the start."""

    MANAGER = pluggy.PluginManager
    SPECS = {name: spec for kind in (Asks, Tells, Parts) for name, spec in vars(kind).items() if name[0] != "_"}
    NO_DATA = vars(Tells).keys() | {"register_routes", "part_class"}  # by their answers

    def __init__(self, built_in: Iterable[object]) -> None:
        self._manager = self.MANAGER("cco_sidecar")
        self.implementations: dict[str, list[Implementation]] = {hook: [] for hook in self.SPECS}
        self._untold: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
        self._teller: Future[None] | None = None
        self.pool = Pool("asks", 16, 5)
        self.loaded: list[Any] = []  # of Plugin
        for plugin in built_in:
            name = f"built-in:{type(plugin).__name__}"
            self.loaded.append(Plugin(name, "built in", self.register(plugin, name)))
        self._trusted = {plugin.name for plugin in self.loaded}  # whose errors pass through

    def load(self, settings: Settings, strict: bool) -> None:
        folders = (sorted(path.glob("[!_.]*.py")) if path.is_dir() else [path] for path in settings.plugins)
        for file in () if settings.no_plugins else chain(*folders):
            try:
                self.loaded.append(Plugin(file.stem, str(file), self.register(import_file(file), file.stem)))
            except (Exception, SystemExit) as error:
                problem = f"plugin {file.stem}: {type(error).__name__}: {one_line(error)}"
                raise StartError(f"{settings.where('plugins')}: {problem}") from None

    def banner_lines(self, settings: Settings) -> list[str]:
        """The banner's lines on plugins and tokens."""
        own = [plugin.name for plugin in self.loaded if plugin.source != "built in"]
        flags = [f"--{name}={getattr(settings, name)}" for name in ("root", "project", "storage")]
        return [
            f"  Plugins:  {', '.join([*own, '0 bundled'])}",
            f"  Alone:    {ALONE}: {ABSENT}",
            f"  Token:    {own_command(*flags)} token --type python-specialist",
        ]

    def register(self, plugin: object, name: str) -> list[str]:
        """The hooks that ``plugin`` implements. Raises ImportError where there is none, or a misspelt one."""
        marks = {each: self._manager.parse_hookimpl_opts(plugin, each) for each in dir(plugin)}
        hooks = {each: mark["specname"] or each for each, mark in marks.items() if mark}
        for each, hook in hooks.items():
            self.check(hook, getattr(plugin, each))
        if not hooks:
            raise ImportError("it has no hook: @hookimpl marks them; the name of a file that only helps begins with _")
        self._manager.register(plugin, name)
        for hook in hooks.values():
            rows = reversed(getattr(self._manager.hook, hook).get_hookimpls())  # what was loaded last comes first
            self.implementations[hook] = [Implementation(hook, row.plugin_name, row.function) for row in rows]
        return sorted(hooks.values())

    def check(self, hook: str, function: Callable[..., Any]) -> None:
        """Raises ImportError where ``function`` cannot be ``hook``."""
        known = arguments_of(self.SPECS[hook]) if hook in self.SPECS else ()
        if not known or set(arguments_of(function)).difference(known):
            raise ImportError(f"there is no hook {hook!r} with these arguments: misspelt, or {ABSENT}")

    def ask(self, hook: str, **facts: Any) -> Iterator[tuple[str, Any]]:
        """(plugin, answer) of every implementation that gives one. Blocks."""
        for row in self.implementations[hook]:
            if (answer := self.ask_one(row, **facts)) is not None:
                yield row.plugin, answer

    def first(self, hook: str, **facts: Any) -> Any:
        """The first answer, None where there is none. Blocks."""
        return next((answer for _, answer in self.ask(hook, **facts)), None)

    def refusal(self, **facts: Any) -> str | None:
        """Why a permission policy refuses or fails, None where all agree. Blocks."""
        for row in self.implementations["permission_policy"]:
            verdict = self.ask_one(row, f"the policy {row.plugin} could not decide; the service logged why", **facts)
            if verdict not in (None, True):
                return verdict or f"the policy {row.plugin} refuses"
        return None

    def ask_one(self, row: Implementation, otherwise: Any = None, /, **facts: Any) -> Any:
        """Its answer, ``otherwise`` where it fails. Blocks."""
        if row.plugin in self._trusted:
            return row.call(facts)
        try:
            return self.call(row, facts)
        except BaseException as error:  # a boundary: a thread that asks plugins ends for none of them
            if row.hook == "part_class" and isinstance(error, StartError):
                raise
            self.failed(row, error)
            return otherwise

    def call(self, row: Implementation, facts: dict[str, Any]) -> Any:
        """What the plugin returns, data as new plain data. Raises what it raises."""
        answer = row.call(facts)
        if answer is None or row.hook in self.NO_DATA:
            return answer
        shape = typing.get_type_hints(self.SPECS[row.hook], include_extras=True)["return"]
        if row.hook != "rank_files":
            return msgspec.json.decode(msgspec.json.encode(answer), type=shape)
        ranked = msgspec.convert(msgspec.to_builtins(answer), shape)  # JSON has no place for paths that are not UTF-8
        "".join(text for item in ranked for text in (item.path, *item.reasons)).encode(errors="surrogateescape")
        return ranked

    def failed(self, row: Implementation, error: BaseException) -> None:
        log.warning("plugin %s: %s: %s: %s", row.plugin, row.hook, type(error).__name__, one_line(error))

    def tell(self, hook: str, **facts: Any) -> None:
        """Tell every observer, in order, in a thread of its own. Returns at once."""
        if self.implementations[hook]:
            self._untold.put((hook, facts))
            self._teller = self._teller or in_thread("observers", self._tell_all)

    def _tell_all(self) -> None:
        while told := self._untold.get():
            list(self.ask(told[0], **told[1]))

    async def close(self, info: SidecarInfo) -> None:
        await asyncio.wrap_future(in_thread("shutdown", lambda: list(self.ask("shutdown", info=info))))

    def part(self, base: type[T], settings: Settings) -> type[T]:
        """``base``, or what plugins derive from it. Raises StartError."""
        for row in reversed(self.implementations["part_class"]):
            made = self.ask_one(row, base, settings=settings, base=base) or base
            if isinstance(made, type) and issubclass(made, base):
                base = made
            else:
                self.failed(row, TypeError(f"{getattr(made, '__name__', made)} is not derived from {base.__name__}"))
        return base


class IssueNotFound(Exception):
    """Raised by ``resolve_issue`` (plugins/_hooks.py) where there is no such issue."""


class Plugin(Struct):
    name: str
    source: str
    hooks: list[str]


class Implementation(Struct, frozen=True):
    hook: str
    plugin: str
    function: Callable[..., Any]

    def call(self, facts: dict[str, Any]) -> Any:
        return self.function(**{name: facts[name] for name in arguments_of(self.function) if name in facts})


@cache
def arguments_of(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


@cache
def bundled_class(base: type[T], file: str, name: str) -> type[T]:
    """The class ``name``, derived from ``base``, in a file of the bundled plugins; without them ``base``."""
    path = Path(bundled_folder() or "/nowhere", f"{file}.py")
    ours = False
    with suppress(OSError):  # there is none for us to read
        ours = f"class {name}(".encode() in path.read_bytes()
    return getattr(import_file(path), name) if ours else base


@cache
def bundled_folder() -> Path | None:
    """``plugins`` beside the module, else the installed copy, None where there is none."""
    beside = Path(__file__).resolve().parent / "plugins"
    if beside.is_dir():
        return beside
    found = importlib.util.find_spec(PACKAGE)
    return Path(next(iter(found.submodule_search_locations or []))) if found else None


def import_file(file: Path) -> types.ModuleType:
    """The module in ``file``, one of our package where it is bundled. Raises what its code raises."""
    # Run as a script this is __main__, and a plugin's import would make a second copy of every class.
    sys.modules.setdefault("cco_sidecar", sys.modules[__name__])
    if not file.is_file():
        raise ImportError("it is no file" if file.exists() else "it is not there")
    if (folder := bundled_folder()) and file.is_relative_to(folder):
        package = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
        package.submodule_search_locations = [str(folder)]
        sys.modules.setdefault(PACKAGE, importlib.util.module_from_spec(package))
        return importlib.import_module(".".join((PACKAGE, *file.relative_to(folder).with_suffix("").parts)))
    name = f"cco_sidecar_user_plugins.{file.stem}"
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = str(file)
    importlib.machinery.SourceFileLoader(name, str(file)).exec_module(module)
    return module


# ==== The sidecar: all parts, started and stopped together, and how fast they answer ====


class Sidecar:
    """One running service: ``async with Sidecar(settings, hooks) as sidecar`` listens until the block ends.

    Its start raises StartError, OSError. Its stop answers every waiting poll, then gives requests 3 s, agents that were
    ordered to end 10 s, and plugins the time of their hooks.
    """

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        self.settings, self.hooks = settings, hooks

        def part(base: type[T]) -> type[T]:
            return hooks.part(base, settings)

        self.storage: Storage = part(Storage)(settings, part(Records))
        self.agent_types = part(AgentTypes)(hooks, settings)
        self.metrics = Metrics()
        self.tokens = part(Tokens)(settings, self.agent_types)
        self.limits = RateLimits(self.agent_types)
        self.bus = part(EventBus)(self.storage, settings, hooks)
        self.results = part(Results)(self.storage, self.bus, hooks, self.agent_types, settings)
        self.contexts = part(Contexts)(self.storage, hooks, self.agent_types, settings)
        launcher = part(Launcher)(self.contexts, self.tokens, self.agent_types, hooks, settings)
        self.agents = part(Agents)(self.storage, launcher, self.results)
        self.server_class = part(Server)
        self.open_requests = 0
        try:
            self.process = psutil.Process()
            self.process.cpu_percent()  # each call covers the time since the one before
        except (psutil.Error, OSError):
            raise StartError("processes, agents' too, cannot be looked at here: is /proc mounted?", 1) from None

    async def __aenter__(self) -> Sidecar:
        settings = self.settings
        prepare_storage_folder(settings)
        async with AsyncExitStack() as parts:  # what was started is ended in reverse order
            parts.enter_context(instance_lock(settings.storage))
            parts.callback(remove_sidecar_json, settings.storage)
            self.tokens.load_secret()
            self.storage.start()
            parts.callback(self.storage.close)
            self._listen()
            parts.callback(self._server.stop)
            self.storage.announce(self.info)
            self.tokens.revoked.update(row["subject"] for row in self.storage.read.revoked(settings.project))
            self.results.start()
            self.contexts.start()
            parts.push_async_callback(self.contexts.close)
            self.agents.launcher.url = self.info.url + "/api"
            await self.agents.start()
            self._parts = parts.pop_all()
        await asyncio.wrap_future(in_thread("startup", lambda: list(self.hooks.ask("startup", info=self.info))))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.stop()
        self.bus.close()
        self.agents.close(end_all=self.settings.stop_agents)  # whatever requests hang
        deadline = time.monotonic() + 3.0
        while self.open_requests and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await self.agents.stop()
        await self._server.close_all_connections()
        await self.hooks.close(self.info)
        await self._parts.aclose()

    def _listen(self) -> None:
        settings, last = self.settings, self.storage.read.meta("port")
        self._server = self.server_class(
            Application(self),
            # Endpoint refuses in JSON; Tornado's own limit would answer without a body.
            max_body_size=1 << 40,
            max_header_size=MAX_FIELDS + GetContext.max_line,
            body_timeout=60.0,
            idle_connection_timeout=300.0,
        )
        sockets = listening(settings.host, int(last) if last and not settings.port else 0, settings.port)
        self._server.add_sockets(sockets)
        self.port: int = sockets[0].getsockname()[1]
        if settings.port == 0:
            self.storage.write_behind(lambda records: records.set_meta("port", str(self.port)))
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
        shown = f"[{host}]" if ":" in host else host
        url = f"{self.server_class.scheme}://{shown}:{self.port}"
        root = clean_text(str(settings.root))
        self.info = SidecarInfo(os.getpid(), url, settings.project, root, __version__, iso(), secrets.token_hex(16))


def listening(host: str, last: int, port: int) -> list[socket.socket]:
    """The sockets of ``port``, of the ``last`` one where there is one and it is free. Raises StartError."""
    with suppress(OSError):
        if last:
            return tornado.netutil.bind_sockets(last, host, backlog=4096)
    try:
        return tornado.netutil.bind_sockets(port, host, backlog=4096)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        advice = "; use --port with another number, or --port 0 for a free one" if taken else ""
        raise StartError(f"cannot listen on {host} port {port}: {error.strerror or error}{advice}", 1) from error


class SidecarInfo(Struct, frozen=True):
    """``sidecar.json``, by which clients find the running service."""

    FILE: ClassVar[str] = "sidecar.json"

    pid: int
    url: str
    project_id: str
    root: str
    version: str
    started_at: str
    instance_id: str = ""  # of this run; ``/health`` tells it to clients


def prepare_storage_folder(settings: Settings) -> None:
    """Make the storage folder, for the user alone. Raises StartError."""
    folder, encoding = settings.storage, sys.getfilesystemencoding().upper()
    try:
        if clean_text(str(folder)) != str(folder):
            raise StartError(f"the name of {folder} is not {encoding}, in which paths are kept")
        if folder.resolve().is_relative_to(settings.root):
            raise StartError(f"{folder} lies inside the repository, where no secret may lie: name another folder")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = list(folder.iterdir())
        make_private(folder, trusted=not found)
        for path in found:
            with suppress(FileNotFoundError):  # gone
                make_private(path)
    except (StartError, OSError) as error:
        unnamed = isinstance(error, OSError) and "storage" not in settings.places
        hint = "; unless you name it, it lies below $XDG_STATE_HOME or your home folder" if unnamed else ""
        raise StartError(f"{settings.where('storage')}: {error}{hint}") from None


def make_private(path: Path, trusted: bool = False) -> None:
    """Take the permissions of group and others from ``path``. Raises StartError for what somebody else made or may have
    changed; ``trusted`` is a folder that was empty.
    """
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode):
        raise StartError(f"{path} is a link, which could lead anywhere: remove it, or replace it by what it leads to")
    if path.name in ("jwt.secret", SidecarInfo.FILE, "sidecar.db", "lock") and not stat.S_ISREG(facts.st_mode):
        raise StartError(f"{path} is no file, and a file belongs there: remove it")
    if not hasattr(os, "geteuid"):
        return
    if facts.st_uid != os.geteuid():
        raise StartError(f"{path} belongs to somebody else (user id {facts.st_uid}): use another --storage")
    if facts.st_mode & 0o022 and not trusted:
        raise StartError(f"others may write {path} and may have done so: look at it, then chmod go-rwx it")
    if facts.st_mode & 0o077 and path.name == "jwt.secret":
        raise StartError(f"others can read {path}: chmod 600 it, or delete it to end all tokens")
    if facts.st_mode & 0o077:
        path.chmod(stat.S_IMODE(facts.st_mode) & 0o700)


@contextmanager
def instance_lock(folder: Path) -> Iterator[None]:
    """Hold a storage folder by OS locks, of its file ``lock`` and, lest that is deleted, of the folder. Raises
    StartError where another has it.
    """
    places = {folder / "lock": os.O_RDWR | os.O_CREAT} | ({} if sys.platform == "win32" else {folder: os.O_RDONLY})
    with ExitStack() as held:
        for path, flags in places.items():
            file = os.open(path, flags, 0o600)
            held.callback(os.close, file)
            try:
                lock_file(file, 20)  # a child of a killed one may have it for a moment
            except OSError as error:
                if path == folder and error.errno != errno.EWOULDBLOCK:
                    continue  # NFS locks none
                who = ""
                with suppress(OSError, UnicodeDecodeError, msgspec.DecodeError):  # not announced yet
                    info = msgspec.json.decode((folder / SidecarInfo.FILE).read_bytes(), type=SidecarInfo)
                    who = f" (pid {info.pid}, {info.url})"
                problem = f"a sidecar already runs on this storage{who}; stop it first, or use another --storage"
                raise StartError(problem, 1) from None
        yield


def lock_file(file: int, tries: int = 1) -> None:
    """Take the exclusive lock of an open file; a try takes 50 ms. Raises OSError."""
    system: Any = importlib.import_module("msvcrt" if sys.platform == "win32" else "fcntl")
    try:
        if sys.platform == "win32":
            system.locking(file, system.LK_NBLCK, 1)
        else:
            system.flock(file, system.LOCK_EX | system.LOCK_NB)
    except OSError:
        if tries == 1:
            raise
        time.sleep(0.05)
        lock_file(file, tries - 1)


def remove_sidecar_json(folder: Path) -> None:
    try:
        (folder / SidecarInfo.FILE).unlink(missing_ok=True)
    except OSError as error:
        log.error("%s cannot be removed: %s", SidecarInfo.FILE, error.strerror)


class Metrics:
    """Response times and errors of the last minute."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._requests = deque[tuple[float, float, bool]](maxlen=20_000)  # when, seconds, failed

    def record(self, duration: float, *, failed: bool) -> None:
        self._requests.append((time.monotonic(), duration, failed))

    def statistics(self) -> dict[str, Any]:
        now = time.monotonic()
        recent = [request for request in self._requests if request[0] >= now - 60]
        times = sorted(duration * 1000 for _, duration, _ in recent) or [0.0]
        p95, p99 = (times[max(0, math.ceil(share * len(times)) - 1)] for share in (0.95, 0.99))  # by nearest rank
        since = self.began if len(self._requests) < 20_000 else self._requests[0][0]
        span = max(1.0, min(60.0, now - since))
        figures = {
            "avg_response_time_ms": sum(times) / len(times), "p95_response_time_ms": p95, "p99_response_time_ms": p99,
            "requests_per_second": len(recent) / span, "errors_per_minute": 60 * sum(row[2] for row in recent) / span,
        }  # fmt: skip
        return {name: round(figure, 3) for name, figure in figures.items()}


# ==== HTTP: the routes, what every endpoint shares, then one small class per endpoint ====


class Route:
    """A method and a path whose ``{names}`` the endpoint's ``respond`` gets; HEAD goes where GET goes."""

    def __init__(self, method: str, path: str, endpoint: type[Endpoint]) -> None:
        self.method, self.path, self.endpoint = method, path, endpoint
        self.methods = {"GET", "HEAD"} if method == "GET" else {method}
        self.path_names = tuple(re.findall(r"\{(\w+)\}", path))
        self.matched = re.compile("([^/]*)".join(map(re.escape, re.split(r"\{\w+\}", path))) + "$").match


def routes() -> list[Route]:
    return [
        Route("GET", "/api/context/{issue_id}/{agent_type}", GetContext),
        Route("POST", "/api/results", StoreResult),
        Route("GET", "/api/events/wait/{event_type}", WaitForEvents),
        Route("POST", "/api/events/{event_type}", PublishEvent),
        Route("POST", "/api/agents/spawn", SpawnAgent),
        Route("GET", "/api/agents/{agent_id}/status", GetAgentStatus),
        Route("DELETE", "/api/cache/context/{issue_id}", ClearCache),
        Route("GET", "/health", GetHealth),
        Route("GET", "/status", GetStatus),
    ]


class Application(tornado.web.Application):
    """Finds the endpoint of a request: ``served`` has every route, with the class that serves it."""

    def __init__(self, sidecar: Sidecar) -> None:
        super().__init__(log_function=lambda handler: None, sidecar=sidecar)  # on_finish logs
        settings = sidecar.settings
        names = ["localhost", settings.host, *settings.allowed_host, *["*"] * (settings.host in ("0.0.0.0", "::"))]
        self.hosts = frozenset(map(str.lower, names))
        self.headers = {"Server": "cco-sidecar", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}
        common = sidecar.hooks.part(Endpoint, settings)

        def serving(row: Route) -> type[Endpoint]:
            """The row's endpoint with the plugins' Endpoint behind it."""
            if not issubclass(endpoint := row.endpoint, Endpoint):
                raise TypeError(f"{endpoint.__name__} is not an Endpoint")
            return type(endpoint.__name__, (endpoint, common), {"sidecar": sidecar, "path_names": row.path_names})

        served = {(row.method, row.path): (row, serving(row)) for row in routes()}
        for name, rows in sidecar.hooks.ask("register_routes"):
            try:
                served |= {(row.method, row.path): (row, serving(row)) for row in rows}
            except Exception as error:  # a boundary: anybody's objects
                log.warning("plugin %s: register_routes: did not return a list of Route: %s", name, one_line(error))
        self.served = list(served.values())
        self.unknown = serving(Route("", "", UnknownRoute))

    def found(self, method: str, path: str) -> tuple[type[Endpoint], list[bytes]]:
        """(endpoint, values in the path)"""
        for route, endpoint in self.served:
            if method in route.methods and (match := route.matched(path)):
                values = [tornado.escape.url_unescape(value, encoding=None, plus=False) for value in match.groups()]
                return endpoint, values
        return self.unknown, []

    def find_handler(self, request: tornado.httputil.HTTPServerRequest, **_: Any) -> Any:
        endpoint, values = self.found(str(request.method), request.path)
        return self.get_handler_delegate(request, endpoint, path_args=values)


class Server(tornado.httpserver.HTTPServer):
    """Tornado's HTTP/1.1 server."""

    scheme = "http"  # of the service's URL
    protocols = "HTTP/1.1 (HTTP/2: off)"  # as the banner says it
    new_loop: ClassVar[Callable[[], asyncio.AbstractEventLoop] | None] = None  # asyncio's own


@tornado.web.stream_request_body
class Handler(tornado.web.RequestHandler):
    """A request: its body, the whole answer with our headers, errors in our words, one line in the log."""

    max_body = MB
    failure = "STR_002"  # the code of an unexpected error
    cache_control = "no-store"
    content_type = "application/json"
    acted_on: dict[str, str] | None = None  # ids that it is about, beside those of path, body and answer

    STALL_SECONDS = 60.0  # for a client that does not read

    application: Application
    sidecar: Sidecar
    path_names: tuple[str, ...]
    query: Any
    error: ApiError | None = None  # why the request is refused
    parked = 0.0  # seconds that a long poll waited
    _accounted = False

    def initialize(self) -> None:
        del self.ui  # half a kilobyte of a parked poll
        self.request_id = f"req-{random.getrandbits(128):032x}"
        self.claims = NOBODY
        self.allowance: Mapping[str, str] = {}  # headers
        self.hang_up = HangUp()
        self.began = time.monotonic()
        self.upload = bytearray()
        self.sidecar.open_requests += 1

    def data_received(self, chunk: bytes) -> None:
        if not self.error:
            self.upload += chunk
            if len(self.upload) > self.max_body:  # only a chunked body gets here
                self.answer_early(too_large(self.max_body))

    def answer_early(self, error: ApiError) -> None:
        """Refuse a request whose body has not ended. Tornado closes the connection behind the answer."""
        self.upload.clear()
        self.set_header("Connection", "close")
        self.finish(self.error_content(error))

    # -- the answer

    def flush(self, include_footers: bool = False) -> asyncio.Future[None]:
        for name, value in () if self._headers_written else self.common_headers().items():
            self._headers[name] = value  # set_header's check is a tenth of a small answer's cost
        return super().flush(include_footers)

    def common_headers(self) -> dict[str, str]:
        cache_control = self.cache_control if self.get_status() < 400 else "no-store"
        ours = {"Date": http_date(int(time.time())), "X-Request-ID": self.request_id, "Cache-Control": cache_control}
        return {**ours, **self.application.headers, **self.allowance}

    async def _taken(self, written: asyncio.Future[None]) -> None:
        """Wait until the client has taken what was written. Raises StreamClosedError where it does not."""
        if not written.done():
            self.hang_up.future = written  # Tornado forgets it where the client hangs up
            await asyncio.wait({written}, timeout=self.STALL_SECONDS)
        if not written.done() or written.cancelled() or written.exception():
            self.close()
            raise tornado.iostream.StreamClosedError  # the future's own keeps the answer in a cycle

    def close(self) -> None:
        """Give up the answer, and with HTTP/1.1 the connection."""
        typing.cast(Any, self.request.connection).close()
        self.on_connection_close()  # Tornado only tells of clients that close it

    def compute_etag(self) -> None:
        """None: Tornado would hash every answer."""

    # -- errors

    def error_content(self, error: ApiError) -> bytes:
        """The body of a refusal; sets its status and headers."""
        error.__context__ = error.__traceback__ = None  # a cycle of frames and the answer
        self.error = error
        self.allowance = self.allowance or error.allowance
        self.clear_header("ETag")
        self.set_status(error.status)
        self.set_header("Content-Type", "application/json")
        if error.retry_after is not None:
            self.set_header("Retry-After", str(error.retry_after))
        if error.status == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        return msgspec.json.encode(error.answer(self.request_id))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Tornado's own refusals (of a path that is not UTF-8, say) in our words."""
        self.answer_early(ApiError(self.failure if status_code >= 500 else "REQ_001"))

    def log_exception(self, *details: Any) -> None:
        """Tornado's own refusals, and hang-ups, are no errors of ours."""
        if not isinstance(details[1], (tornado.web.HTTPError, tornado.iostream.StreamClosedError)):
            log.error("%s unexpected", self.request_id, exc_info=details)

    # -- afterwards

    def on_connection_close(self) -> None:
        super().on_connection_close()  # ends the wait for a body that will never be whole
        self.hang_up.happen()
        self.on_finish(499)  # Tornado calls it only after finish()

    def on_finish(self, status: int = 0) -> None:
        """Count the request, once."""
        if self._accounted:
            return
        self._accounted = True
        status, seconds = status or self.get_status(), time.monotonic() - self.began - self.parked
        self.sidecar.open_requests -= 1
        self.sidecar.metrics.record(seconds, failed=status >= 400 and status != 499)
        self.finished(status, seconds)

    def finished(self, status: int, seconds: float) -> None:
        """Log the request, at DEBUG if it only read: ``status`` 499 is a hang-up."""
        level = logging.DEBUG if self.request.method in ("GET", "HEAD") and status < 400 else logging.INFO
        if log.isEnabledFor(level):
            who, code = self.claims.sub or "-", self.error.code if self.error else "-"
            asked = without_tokens(f"{self.request.method} {self.request.path}")
            self.log(level, "%s %s %d %.1f ms %s %s", self.request_id, asked, status, seconds * 1000, who, code)

    def log(self, level: int, template: str, *facts: Any) -> None:
        log.log(level, template, *facts)


class Endpoint(Handler):
    """The base of every endpoint. A subclass says what it requires in class attributes and implements ``respond``.

    ``respond`` gets the values of the path's names and, where ``body`` is set, the validated body as a dict;
    ``self.query`` holds the parameters. It returns what becomes the answer's JSON, or ready bytes, or raises ApiError.
    """

    permission: str | None = None
    public = False
    query_type: type[Struct] | None = None
    body: type[Struct] | None = None
    status = 200  # of an answer
    max_line = MAX_LINE
    invalid = "REQ_001"  # the code of a body that does not validate
    aside = False  # sent by an agent's program unasked: not limited
    ANSWER_SECONDS: float | None = 150.0  # for all that an answer waits for

    respond: Callable[..., Awaitable[Any]]
    given: dict[str, Any] | None = None  # the body, once it was checked

    async def prepare(self) -> None:
        """Check what is known before the body. A refusal waits for a short body: then the connection goes on."""
        request, sidecar = self.request, self.sidecar
        stated = request.headers.get("Content-Length", "")[:18]  # Tornado refuses later what is no number
        length = math.inf if "Transfer-Encoding" in request.headers else int(stated) if stated.isdecimal() else 0
        try:
            self.check_access()
            if len(request.uri or "") > self.max_line:
                raise ApiError("REQ_004", f"The request line may have {self.max_line} bytes at most", status=414)
            if self.max_body < length < math.inf:
                raise too_large(self.max_body)
            if not self.public:
                # Popped: a parked poll keeps no token.
                self.claims = sidecar.tokens.verify(request.headers.pop("Authorization", None))
                if not self.aside:
                    self.allowance = sidecar.limits.spend(self.claims)
                sidecar.tokens.check_permission(self.claims, self.permission)
                if sidecar.hooks.implementations["permission_policy"]:
                    await check_policies(self)
        except ApiError as error:
            self.error = error
            if length > MB:
                self.answer_early(error)

    def check_access(self) -> None:
        """DNS rebinding and hostile web pages end here. Raises REQ_007."""
        if not host_allowed(self.request.host, self.application.hosts):
            raise ApiError("REQ_007", "This Host is not answered here; --allowed-host allows more")
        origin = self.request.headers.get("Origin")
        if origin is not None and not origin_allowed(origin, self.sidecar.settings.cors_origin):
            raise ApiError("REQ_007", "Pages of this Origin may not call; --cors-origin allows more")

    async def _serve(self, *path: str) -> None:
        connection = self.request.connection
        if isinstance(connection, tornado.http1connection.HTTP1Connection) and connection.stream.closed():
            self.on_connection_close()  # Tornado tells nobody of what closed while a request was read
        try:
            if self.error:
                raise self.error
            await self._answer(path)
        except tornado.iostream.StreamClosedError:
            self.hang_up.happened = True
        except asyncio.CancelledError:
            if not self.hang_up.happened:
                raise
        except Exception as error:  # a boundary: the caller gets JSON, the log what was not expected
            content = self.error_content(error if isinstance(error, ApiError) else self._unexpected(error))
            if not self.hang_up.happened:
                await self.send(content)

    get = head = post = put = patch = delete = options = _serve

    async def _answer(self, path: tuple[str, ...]) -> None:
        """Apart from ``_serve``, so that no refused answer is kept while its refusal is sent."""
        self._read_path_and_query(path)
        async with asyncio.timeout(self.ANSWER_SECONDS) if self.ANSWER_SECONDS else nullcontext():
            self.sidecar.tokens.check_revoked(self.claims.sub)  # while the body came
            if self.body is not None:
                await self._read_body()
            self.set_status(self.status)  # ``respond`` may set another
            answer = await self.work(path)
        if not self._finished:
            await self.send(answer if isinstance(answer, bytes) else msgspec.json.encode(answer))

    def _read_path_and_query(self, path: tuple[str, ...]) -> None:
        for name, value in zip(self.path_names, path, strict=True):
            check_identifier(name, value)
            if name == "issue_id":
                self.sidecar.tokens.check_issue(self.claims, value)
        request = self.request
        try:
            arguments = {key: values[-1].decode("utf-8") for key, values in request.query_arguments.items()}
        except UnicodeDecodeError:
            raise ApiError("REQ_001", "The query is not UTF-8") from None
        self.query = read_query(self.query_type, *arguments.items()).__copy__() if self.query_type else None
        if self.claims.issue_id is not None and hasattr(self.query, "issue_id"):  # a list of what there is on issues
            self.query.issue_id = self.query.issue_id or self.claims.issue_id
            self.sidecar.tokens.check_issue(self.claims, self.query.issue_id)
        request.arguments = request.query_arguments = {}  # no need to park these

    async def work(self, path: tuple[str, ...]) -> Any:
        """The answer to a request that was checked."""
        if self.body is None:
            return await self.respond(*path)
        if "Idempotency-Key" in self.request.headers:
            raise ApiError("REQ_001", "Nothing was done: an Idempotency-Key needs the plugin repeats")
        return await self.respond(*path, body=self.given)

    async def _read_body(self) -> None:
        """Take the body, which must satisfy ``self.body`` and be about the token's project and issue."""
        media_type = self.request.headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
        coding = self.request.headers.get("Content-Encoding", "").strip()
        if media_type != "application/json" or coding:
            self.set_header("Accept-Encoding", "identity")  # RFC 9110, 15.5.16
            raise ApiError("REQ_005", f"The body must be application/json, not {(coding or media_type)[:100]}")
        content, decode = bytes(self.upload), msgspec.json.decode
        try:
            body = decode(content) if len(content) <= 256 * 1024 else await asyncio.to_thread(decode, content)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ApiError("REQ_001", f"The body is not JSON: {one_line(error)}") from None
        convert(body, self.body, code=self.invalid)
        if (project := body.get("project_id")) not in (None, self.claims.project_id):
            raise forbidden("This token belongs to another project", project_id=project)
        self.given, issues = body, issues_named(body, 1001)
        if len(issues) > 1000:
            raise ApiError(self.invalid, "issue_id names over 1,000 issues", path="issue_id")
        for issue_id in issues if self.claims.issue_id is not None else ():
            self.sidecar.tokens.check_issue(self.claims, issue_id)

    async def send(self, content: bytes) -> None:
        """Raises StreamClosedError where nobody is left to read the answer."""
        if self.hang_up.happened:
            raise tornado.iostream.StreamClosedError
        if content:
            self._headers["Content-Type"] = "application/json" if self.error else self.content_type
        await self._taken(self.finish(content or None))  # not even an empty chunk after a 204 or 304

    def _unexpected(self, error: Exception) -> ApiError:
        if isinstance(error, RecursionError) and self.body:  # while its JSON is read, or written
            return ApiError("REQ_001", "The body is nested too deeply")
        if not isinstance(error, (StorageError, TimeoutError)):
            log.error("%s unexpected", self.request_id, exc_info=error)
            return ApiError(self.failure)
        reason = "no answer in time"
        if isinstance(error, StorageError):
            reason = f"the storage cannot be used ({getattr(error, 'sqlite_errorname', error)})"
        log.error("%s %s: %s: %s", self.request_id, type(self).__name__, reason, one_line(error))
        wait = getattr(error, "retry_after", None)
        reason = f"{ERRORS[self.failure][1]}: {reason}"
        return ApiError(self.failure, reason, status=503 if wait else 0, retry_after=wait)


# the same contexts and events are asked for again and again
read_query = lru_cache(128)(lambda shape, *arguments: convert(dict(arguments), shape, strict=False))


def convert(value: Any, shape: Any, *, code: str = "REQ_001", strict: bool = True) -> Any:
    """``value`` as ``shape``; raises ApiError(code) that names the bad field, such as ``result.files_created[3].path``,
    in ``details.path`` too. A query's texts are not ``strict``, but their numbers are digits alone: msgspec also takes
    1e3 and null for whole numbers.
    """
    try:
        converted = msgspec.convert(value, shape, strict=strict)
        for name in () if strict else value.keys() & set(converted.__struct_fields__):
            plain = re.fullmatch("[0-9]+|true|false", value[name], re.IGNORECASE)
            if not plain and not isinstance(getattr(converted, name), str):
                raise msgspec.ValidationError(f"Expected digits, or true or false for a switch - at `$.{name}`")
        return converted
    except msgspec.ValidationError as error:
        message = str(error)
        problem, _, place = message.rpartition(" - at ") if " - at " in message else (message, "", "")
        path = place.removeprefix("`key` in ").strip("`$").removeprefix(".")
        if missing := re.search(r"missing required field `(.+)`", problem):
            path = f"{path}.{missing[1]}".lstrip(".")
        where = f" - at `$.{path}`" if path else ""
        raise ApiError(code, f"{ERRORS[code][1]}: {problem}{where}", path=path or "$") from None


def too_large(limit: int) -> ApiError:
    return ApiError("REQ_004", f"The body may have {limit} bytes at most")


async def check_policies(endpoint: Endpoint) -> None:
    permission, request = endpoint.permission, endpoint.request
    facts = {"claims": endpoint.claims, "permission": permission, "method": request.method, "path": request.path}
    reason: str | None = "the policies have not decided in time"
    try:
        reason = await endpoint.sidecar.hooks.pool.run(endpoint.sidecar.hooks.refusal, **facts)
    except TimeoutError:
        log.warning("%s: %s", endpoint.request_id, reason)
    if reason:
        raise forbidden(f"Refused by policy: {reason}", permission=permission, policy=reason)


def without_tokens(text: str) -> str:
    """500 letters of ``text`` for a log, without a token or its beginning."""
    text = re.sub(r"eyJ[\w.-]*\Z", REDACTED, text[:500]) if text[500:] else text
    return redact(text)[0] if "eyJ" in text else text


class UnknownRoute(Endpoint):
    """Known paths: 405 with Allow. Others: 404."""

    public = True

    async def respond(self) -> bytes:
        raise self.refusal()

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.answer_early(self.refusal())  # of a method that Tornado does not know

    def refusal(self) -> ApiError:
        if not (allowed := self.allowed_methods()):
            return ApiError("REQ_002", "No such path, and no plugin in use adds it")
        self.set_header("Allow", methods := ", ".join(sorted(allowed)))
        return ApiError("REQ_003", f"Only {methods} here; no plugin in use adds more")

    def allowed_methods(self) -> set[str]:
        return set().union(*(row.methods for row, _ in self.application.served if row.matched(self.request.path)))


def origin_allowed(origin: str, more: tuple[str, ...]) -> bool:
    """Pages on loopback, web views of editors, and what --cors-origin names."""
    if origin in more:
        return True
    scheme, _, host = origin.partition("://")  # no URL parser: it raises for what a hostile client may send
    if scheme in ("vscode-webview", "vscode-file"):
        return bool(host)
    return scheme in ("http", "https") and host_allowed(host, frozenset({"localhost"}))


@lru_cache(64)
def host_allowed(host: str, allowed: frozenset[str]) -> bool:
    """Whether a Host header names one of ``allowed``, a loopback address or, with "*" in it, any address: rebinding
    needs a name.
    """
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]*)(?::([0-9]{0,5}))?", host.lower())
    if not match or not 0 < int(match[2] or 1) < 65536:  # an empty port is the scheme's own (RFC 3986, 3.2.3)
        return False
    name = match[1].strip("[]").removesuffix(".")
    if name in allowed:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address  # what [::ffff:127.0.0.1] means (RFC 4291, 2.5.5.2)
    return address.is_loopback or "*" in allowed or str(address) in allowed


def check_identifier(name: str, value: str) -> None:
    """Check a value out of a path; event types have a narrower form. Raises REQ_001 and EVT_002."""
    if name == "event_type":
        if value != "*" and not re.fullmatch(EVENT_TYPE, value):
            raise ApiError("EVT_002", f"event_type {EVENT_TYPE_IN_WORDS}", path=name)
    elif not is_identifier(value):
        raise ApiError("REQ_001", f"{name} {NAME_IN_WORDS}", path=name)


# -- the endpoints, in the order of the reference


class GetContext(Endpoint):
    """Context for an agent type on an issue. ETag and If-None-Match are honoured."""

    permission = READ
    query_type = ContextQuery
    max_line = MAX_LINE + 12 * TASK_LENGTH
    failure = "CTX_001"
    cache_control = "private, no-cache"

    async def respond(self, issue_id: str, agent_type: str) -> bytes:
        asked = self.query, self.request.headers.get("If-None-Match", ""), self.claims.sub
        content, self._headers["ETag"] = await self.sidecar.contexts.get(issue_id, agent_type, *asked)
        if not content:
            self.set_status(304)
        return content


class StoreResult(Endpoint):
    """Store a result; it, its agent_completed event and the proposals of who is next are one transaction."""

    permission = WRITE
    body = ResultSubmission
    status = 201
    max_body = 32 * MB
    failure = "STR_001"

    async def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        self.sidecar.tokens.check_identity(self.claims, body["agent_id"], body["agent_type"])
        if body.get("source") == "sidecar":
            raise ApiError("AUTH_003", "Only the service stores results in others' names", path="source")
        return await self.sidecar.results.store(body)


class PublishEvent(Endpoint):
    """Publish an event: stored, then waiters woken, then answered."""

    permission = PUBLISH
    body = EventSubmission
    status = 202
    invalid = "EVT_002"
    failure = "EVT_001"

    async def respond(self, event_type: str, body: dict[str, Any]) -> dict[str, Any]:
        if event_type == "*" or body.get("event_type") not in (event_type, None):
            problem = f"The path says {event_type}, the body {body.get('event_type')}"
            raise ApiError("EVT_002", problem, path="event_type")
        self.sidecar.tokens.check_event_type(self.claims, event_type)
        self.sidecar.tokens.check_identity(self.claims, body["publisher"])
        return await self.sidecar.bus.publish(self.claims.project_id, event_type, body)


class WaitForEvents(Endpoint):
    """Long poll for events of a type; ``*`` is any type."""

    query_type = WaitQuery
    failure = "EVT_001"
    ANSWER_SECONDS = None  # a poll and a client that does not read have their own

    async def respond(self, event_type: str) -> bytes:
        poll = await self.sidecar.bus.wait(self.claims, event_type, self.query, self.hang_up)
        self.sidecar.tokens.check_revoked(self.claims.sub)  # meanwhile
        self.parked = poll.parked
        await self.send(poll.content)  # raises where nobody is left to read it
        if self.request.method != "HEAD":  # HEAD delivers nothing
            self.sidecar.bus.answered(poll)
        return b""


class SpawnAgent(Endpoint):
    """Start an agent as a real process, with its context in a file and a token of its own."""

    permission = SPAWN
    body = SpawnRequest
    status = 201
    failure = "AGT_001"

    async def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self.sidecar.agents.spawn(self.claims, body)


class AgentEndpoint(Endpoint):
    """The base of the endpoints about one agent."""

    permission = READ

    def find(self, agent_id: str) -> dict[str, Any]:
        """The agent's row. Raises REQ_002, and AUTH_003 where it works on another issue than the token's."""
        row = self.sidecar.agents.find(self.claims.project_id, agent_id)
        self.acted_on = {"issue_id": row["issue"]}
        self.sidecar.tokens.check_issue(self.claims, row["issue"])
        return row


class GetAgentStatus(AgentEndpoint):
    """What is known of one agent."""

    async def respond(self, agent_id: str) -> dict[str, Any]:
        return await self.sidecar.agents.disk.run(self.sidecar.agents.describe, self.find(agent_id))


class ClearCache(Endpoint):
    """Forget the cached contexts of an issue."""

    async def respond(self, issue_id: str) -> dict[str, Any]:
        entries, size = self.sidecar.contexts.clear(lambda key: key.issue_id == issue_id)
        if not entries:
            raise ApiError("REQ_002", f"No cached context for issue {issue_id}")
        return {"cleared": True, "entries_removed": entries, "bytes_freed": size, "timestamp": iso()}


class GetHealth(Endpoint):
    """Whether the service works, measured anew; 503 when it does not."""

    public = True
    ANSWER_SECONDS = None  # each check has its own

    async def respond(self) -> dict[str, Any]:
        sidecar, checks = self.sidecar, await self.checks()
        if not (healthy := checks["storage"] == checks["event_bus"] == "healthy"):
            self.set_status(503)
        return {
            "status": "healthy" if healthy else "unhealthy", "service": "orchestration-sidecar", "version": __version__,
            "uptime_seconds": int(time.monotonic() - sidecar.metrics.began), "project_id": sidecar.settings.project,
            "instance_id": sidecar.info.instance_id, "checks": checks, "timestamp": iso(),
        }  # fmt: skip

    async def checks(self) -> dict[str, Any]:
        sidecar, storage, bus = self.sidecar, "healthy", "healthy"
        try:
            async with asyncio.timeout(2):
                await sidecar.storage.probe()
        except (StorageError, OSError, TimeoutError) as error:
            storage = f"unhealthy: {one_line(error) or 'no answer within 2 s'}"
            bus = "unhealthy: storage does not take events"
        else:
            if not await sidecar.bus.round_trip():
                bus = "unhealthy: a waiter did not wake within 2 s"
        memory, waiting, free, cpu = 0, 0, 0, 0.0
        with suppress(StorageError, OSError, psutil.Error):  # the checks say why
            memory, cpu = sidecar.process.memory_info().rss, sidecar.process.cpu_percent()
            free = shutil.disk_usage(sidecar.settings.storage).free
            waiting = sidecar.storage.read.number(f"undelivered:{sidecar.settings.project}")
        return {
            "storage": storage, "event_bus": bus, "memory_usage_mb": round(memory / MB, 1), "cpu_usage_percent": cpu,
            "active_agents": sidecar.agents.count(), "event_queue_size": waiting,
            "disk_space_available_mb": free // MB,
        }  # fmt: skip


class GetStatus(Endpoint):
    """What happened so far, counted and timed."""

    async def respond(self) -> dict[str, Any]:
        sidecar, settings = self.sidecar, self.sidecar.settings
        read = sidecar.storage.read
        # Jobs run in order: what is queued is counted too.
        with suppress(StorageError):
            await sidecar.storage.write(lambda records: None)
        return {
            "agents": agent_statistics(read, settings.project),
            "storage": sidecar.contexts.statistics() | await sidecar.storage.statistics() | {
                "results_stored": read.number(f"results:{settings.project}"), "storage_path": str(settings.storage),
            },
            "events": sidecar.bus.statistics(), "timestamp": iso(),
            "performance": sidecar.metrics.statistics() | {"protocols": sidecar.server_class.protocols},
        }  # fmt: skip


# ==== Tokens and rate limits: who may do what, and how often ====


class Tokens:
    """Makes and checks JSON Web Tokens (RFC 7519 and 8725), HS256 and nothing else. Checks of claims raise AUTH_003."""

    def __init__(self, settings: Settings, agent_types: AgentTypes) -> None:
        self._settings, self._agent_types = settings, agent_types
        self._read = lru_cache(4_000)(self._verified)  # a signature costs 40 us, what is kept 1.1 kB
        self.revoked: set[str] = set()  # subjects; who adds one stores it too (Records.revoke)

    def load_secret(self) -> None:
        """Take the configured secret, else the storage's."""
        self._secret = self._settings.jwt_secret or make_or_read_secret(self._settings.storage / "jwt.secret")

    def mint(
        self, subject: str, agent_type: str, *, ttl: int | None = None, permissions: Sequence[str] | None = None,
        issue_id: str | None = None, bound: bool = False,
    ) -> str:  # fmt: skip
        """A token; ``ttl`` in seconds, ``permissions`` only narrow the type's. Raises AGT_002."""
        allowed = CATEGORIES[self._agent_types.category(agent_type, people=True)].permissions
        now = int(time.time())
        claims: dict[str, Any] = {
            "sub": subject, "agent_type": agent_type, "project_id": self._settings.project, "iat": now,
            "permissions": [name for name in allowed if permissions is None or name in permissions],
            "exp": now + (ttl or self._settings.token_ttl), "jti": secrets.token_hex(16), "iss": "cco-sidecar",
        }  # fmt: skip
        claims |= ({"issue_id": issue_id} if issue_id else {}) | ({"bound": True} if bound else {})
        return jwt.encode(claims, self._secret, "HS256")

    def verify(self, authorization: str | None) -> Claims:
        """The claims of an ``Authorization`` header. Raises AUTH_001, 002 (expired), 003 (other project)."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or len(token) > 8192:
            raise ApiError("AUTH_001")
        claims = self._read(token.strip())
        if claims.exp <= time.time():
            raise ApiError("AUTH_002", details={"token_expired": True, "expiry_time": iso(claims.exp)})
        self.check_revoked(claims.sub)
        if claims.project_id != self._settings.project:
            raise forbidden("This token belongs to another project", project_id=claims.project_id)
        return claims

    def check_revoked(self, subject: str) -> None:
        if subject in self.revoked:
            raise ApiError("AUTH_001", "This token was revoked")

    def _verified(self, token: str) -> Claims:
        return self.decode(token, self._secret, "HS256", Claims)

    def decode(self, token: str, key: Any, algorithm: str, kind: type[Claims]) -> Claims:
        """The claims of a token, perhaps expired, that ``key`` signed, with those permissions that its type has. Raises
        AUTH_001.
        """
        options: Any = {"verify_exp": False, "verify_aud": False}
        try:  # another clock may be ahead of ours
            claims = msgspec.convert(jwt.decode(token, key, [algorithm], options, leeway=60.0), kind)
        except (jwt.PyJWTError, msgspec.ValidationError, ValueError, OverflowError, TypeError, RecursionError):
            raise ApiError("AUTH_001") from None
        category = CATEGORIES.get(self._agent_types.categories.get(claims.agent_type, ""))
        if not (category and claims.sub and claims.sub.isprintable() and 0 < claims.exp < 1e11):  # nor NaN
            raise ApiError("AUTH_001")
        allowed = [name for name in category.permissions if name in claims.permissions]
        return msgspec.structs.replace(claims, permissions=allowed)

    def check_permission(self, claims: Claims, permission: str | None) -> None:
        if permission and permission not in claims.permissions:
            raise forbidden(f"This token lacks the permission {permission}", permission=permission)

    def check_identity(self, claims: Claims, subject: str, agent_type: str | None = None) -> None:
        if claims.bound and (subject != claims.sub or agent_type not in (None, claims.agent_type)):
            raise forbidden(f"This token speaks only for {claims.sub} ({claims.agent_type})", sub=claims.sub)

    def check_issue(self, claims: Claims, issue_id: Any) -> None:
        if claims.issue_id is not None and issue_id != claims.issue_id:
            raise forbidden(f"This token is for issue {claims.issue_id} only", issue_id=claims.issue_id)

    def check_event_type(self, claims: Claims, event_type: str) -> None:
        """The service's own are refused; agent_completed is left, as the reference has it, to tokens that could cause
        it by a result.
        """
        speaks_for_all = not claims.bound and claims.issue_id is None and WRITE in claims.permissions
        if event_type in OWN_EVENTS and not (event_type == "agent_completed" and speaks_for_all):
            raise forbidden(f"The service publishes {event_type}, not this token", event_type=event_type)


def make_or_read_secret(path: Path) -> str:
    """The secret in ``path``, made by the first of its users."""
    if not path.exists():
        with suppress(FileExistsError):  # another was faster
            write_file(path, secrets.token_urlsafe(48).encode(), first=True)
    secret = path.read_text("utf-8", "backslashreplace").strip()
    if len(secret.encode()) < 32:
        problem = "is shorter than 32 bytes: delete it, a new one is made (old tokens end)"
        raise StartError(f"the signing secret in {path} {problem}", 1)
    return secret


class Claims(Struct, frozen=True, kw_only=True):
    """``bound`` claims speak only for their own ``sub`` and ``agent_type``."""

    sub: str
    agent_type: str
    project_id: str
    permissions: list[str]
    exp: float
    iat: float
    jti: str = ""
    iss: str = ""
    issue_id: str | None = None
    bound: bool = False


NOBODY = Claims(sub="", agent_type="", project_id="", permissions=[], exp=math.inf, iat=0.0)  # without a token


class RateLimits:
    """Per subject: a bucket of ``burst`` tokens, refilled at limit/60 a second, and at most ``limit`` in any minute."""

    def __init__(self, agent_types: AgentTypes, clock: Callable[[], float] = time.monotonic) -> None:
        self._agent_types, self._clock = agent_types, clock
        # By subject, the least recent first: its last request, the tokens left then, the requests of the minute before.
        # A dict would find its first behind all deleted ones.
        self._recent = OrderedDict[tuple[str, str], tuple[float, float, list[float]]]()

    def spend(self, claims: Claims) -> dict[str, str]:
        """Take one request; the headers that tell what is left, none without a limit. Raises RATE_001."""
        category = CATEGORIES[self._agent_types.categories[claims.agent_type]]
        limit, burst = category.per_minute, category.burst
        if limit is None or burst is None:
            return {}
        subject, now = (claims.project_id, claims.sub), self._clock()
        before, tokens, times = self._recent.pop(subject, (now, burst, []))
        tokens = min(burst, tokens + (now - before) * limit / 60)
        times = [moment for moment in times if moment > now - 60]

        def wait(number: int) -> float:
            """Seconds until ``number`` requests may come at once."""
            leaves = times[number - limit - 1] + 60 if len(times) + number > limit else now
            return max(0.0, (number - tokens) * 60 / limit, leaves - now)

        seconds = math.ceil(wait(1) - 1e-9)  # 0 where it may come now
        if not seconds:
            tokens, times = tokens - 1, [*times, now]
        self._recent[subject] = now, tokens, times
        while next(iter(self._recent.values()))[0] <= now - 60:  # its bucket is full
            self._recent.popitem(last=False)
        allowance = {
            "X-RateLimit-Limit": str(limit),
            "X-RateLimit-Remaining": str(max(0, min(int(tokens + 1e-9), limit - len(times)))),
            "X-RateLimit-Reset": str(math.ceil(time.time() + wait(burst))),
        }
        if not seconds:
            return allowance
        message = f"Too many requests. Please wait {seconds} seconds."
        raise ApiError("RATE_001", message, retry_after=seconds, allowance=allowance)


class AgentTypes:
    """Every agent type with its category."""

    def __init__(self, hooks: Hooks, settings: Settings) -> None:
        """Blocks."""
        self.categories: dict[str, str] = {}
        for _, table in hooks.ask("register_agent_types", settings=settings):
            self.categories |= table

    async def find(self, agent_type: str, status: int = 400) -> str:
        """As ``category``; a plugin may look for an unknown type."""
        return self.category(agent_type, status)

    def category(self, agent_type: str, status: int = 400, *, people: bool = False) -> str:
        """The category of a type. Raises AGT_002 where it is unknown, or for people and ``people`` is not set."""
        category = self.categories.get(agent_type)
        if category and (people or not CATEGORIES[category].people):
            return category
        problem = "The type {} is for people: no agent has it" if category else "Unknown agent type {}"
        raise ApiError("AGT_002", problem.format(agent_type), status=status, path="agent_type")


# ==== Storage: one SQLite file, one writer thread ====


class Storage:
    """Everything that outlives the service: events and positions, results, agents, revoked tokens.

    No other part speaks SQL, and a plugin may put another storage in the place of this class and ``Records``
    (``part_class``). What the other parts rely on:

    - A job is all or nothing, and durable once ``write`` has answered. It changes the storage by methods of Records,
      whose arguments are plain data. It may run twice before it is committed: it looks again at what it decides on, and
      its other effects may come twice.
    - Events get rising sequence numbers in the order of commits, none of them twice.
    - Each committed event, also one of another service on the same log, is told to ``observer`` with its number, on the
      loop, in this order, before any writer of its batch is answered.
    - ``read`` answers at once, on the loop, and knows all that was told: a poll that finds nothing and then parks,
      without an await in between, misses no event.
    - What was written behind is durable once something that was written after it is.
    - ``epoch`` tells cursors of this log from those of another.
    - StorageError is raised for every fault. One that passes has ``retry_after`` (seconds), and leaves open whether the
      job was committed.
    """

    FILE = "sidecar.db"
    MAX_BATCH = 256
    SWEEP_SECONDS = 2.0
    SWEEP_ROWS = 200
    DEAD_LETTERS = 10_000

    read: Records  # for the loop alone
    epoch: str
    head: int  # the newest event that was told
    floor: int  # a plugin's retention has removed events up to here

    def __init__(self, settings: Settings, records: type[Records]) -> None:
        self.path, self._settings, self._records = settings.storage / self.FILE, settings, records
        self.place = str(settings.storage)  # for people
        self.files = ResultFiles(settings.storage / "results")
        self.observer: Callable[[NewEvent, int], None] = lambda event, seq: None
        self._queue: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="storage-writer", daemon=True)

    def start(self) -> None:
        """Open, or make, the database. Raises StartError where it is newer than this program, or damaged."""
        try:
            self._writer = self._records(open_database(self.path))
            self.read = self._records(connect_database(self.path, read_only=True))
        except sqlite3.Error as error:
            raise StartError(f"the storage {self.path} cannot be opened: {error}; it is left as it is", 1) from None
        self.epoch, self.head, self.floor = str(self.read.meta("epoch")), self.read.head(), self.read.number("floor")
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._sweeper = asyncio.create_task(self._sweep_for_ever())

    def write(self, job: Job, *, answers: bool = False) -> asyncio.Future[Any]:
        """The result of ``job``, once its transaction is on disk; jobs run in the order of the calls. ``answers`` says
        that it is the answer to the request at hand, which plugins may keep.

        Raises what the job raised, or StorageError. Cancelling the wait does not undo the write.
        """
        return self._put(job)

    def write_behind(self, job: Job) -> asyncio.Future[Any]:
        """Write what can be found again after a crash; a failure is logged."""

        def written(future: asyncio.Future[Any]) -> None:
            if not future.cancelled() and (error := future.exception()):
                log.error("storage: a background write failed: %s", one_line(error))

        future = self._put(job)
        future.add_done_callback(written)
        return future

    def _put(self, job: Job) -> asyncio.Future[Any]:
        """Give a job to the writer thread."""
        future = self._loop.create_future()
        self._queue.put((job, future))
        return future

    async def probe(self) -> None:
        """A real write, and no more. Raises StorageError."""
        await self.write(lambda records: records.set_meta("probe", str(time.time())))

    def announce(self, info: SidecarInfo) -> None:
        """Write sidecar.json. Raises OSError."""
        write_file(self.path.with_name(SidecarInfo.FILE), msgspec.json.format(msgspec.json.encode(info)) + b"\n")

    async def statistics(self) -> dict[str, Any]:
        size = self.read.one("select page_count * page_size from pragma_page_count, pragma_page_size")
        return {"total_size_mb": round(size / MB, 3)}

    def close(self) -> None:
        """Finish what is queued, then close. Blocks for at most a few seconds."""
        self._sweeper.cancel()
        self._queue.put(None)
        self._thread.join(5)
        if not self._thread.is_alive():  # else it commits, and the end of the program closes them
            self.read.close()
            self._writer.close()

    def _run(self) -> None:
        """The writer thread: jobs that wait at the same time share one transaction and one fsync."""
        while True:
            batch = [self._queue.get()]
            while len(batch) < self.MAX_BATCH and not self._queue.empty():  # nobody else takes from it
                batch.append(self._queue.get())
            if writes := [write for write in batch if write is not None]:
                outcomes, events = self.commit(self._writer, [job for job, _ in writes])
                with suppress(RuntimeError):  # the loop is gone
                    self._loop.call_soon_threadsafe(self._answer, writes, outcomes, events)
            if len(writes) < len(batch):
                return

    def commit(self, records: Records, jobs: list[Job]) -> tuple[list[Any], Inserted]:
        """Do ``jobs`` in one transaction, on the writer thread: the result or the error of each, and their events.
        Where one fails, each is done alone.
        """
        try:
            records.begin()
            outcomes = [job(records) for job in jobs]
            if records.results:
                self.files.write(records.results)
            records.commit()
            self.files.place()
            return outcomes, records.inserted
        except Exception as error:  # a boundary: the job's caller gets it
            with suppress(StorageError):  # if it fails, so does the next begin, which rolls back
                records.rollback()
            self.files.drop()
            if not jobs[1:]:
                return [error], []
            alone = [self.commit(records, [job]) for job in jobs]
            return [outcome for (outcome,), _ in alone], [event for _, events in alone for event in events]

    def _answer(self, writes: list[Write], outcomes: list[Any], events: Inserted) -> None:
        """On the loop, after a commit: tell what happened, then answer the writers, in commit order."""
        self.head = events[-1][1] if events else self.head
        for event, seq in events:
            try:
                self.observer(event, seq)
            except Exception as error:  # a boundary: the others are to be answered
                log.error("storage: after a commit", exc_info=error)
        for (_, future), outcome in zip(writes, outcomes, strict=True):
            if not future.done():
                future.set_exception(outcome) if isinstance(outcome, Exception) else future.set_result(outcome)

    async def _sweep_for_ever(self) -> None:
        """Remove expired events, in steps that hold the writer for a few milliseconds."""
        while True:
            await asyncio.sleep(self.SWEEP_SECONDS)
            try:
                while self.read.next_expiry() <= time.time():
                    await self.write(self._sweep)
            except Exception as error:  # a boundary: it is tried again
                log.warning("housekeeping waits for the storage: %s", one_line(error))

    def _sweep(self, records: Records) -> bool:
        """A job: one step; whether there may be more to do."""
        expired = records.expired(time.time(), self.SWEEP_ROWS)
        records.remove_events([row["seq"] for row in expired], self.DEAD_LETTERS)
        return len(expired) == self.SWEEP_ROWS


# -- methods of Records that do one statement with their arguments: they give its first value, or ``otherwise``; its
# rows; how many rows it changed


def select_value(sql: str, otherwise: T) -> Callable[..., T]:
    return lambda self, *values: otherwise if (found := self.one(sql, *values)) is None else found


def select_rows(sql: str) -> Callable[..., list[Row]]:
    return lambda self, *values: self.rows(sql, *values)


def modify(sql: str) -> Callable[..., int]:
    return lambda self, *values: self.change(sql, *values).rowcount


CHOSEN = "seq in (select value from json_each(?))"
MINE = "from result where project = ? and issue = ?"
SPAWNED = "from agent where project = ?"


class Records:
    """What is kept, over one connection: the writer thread's, or the loop's for reading. Raises StorageError."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db, self.close, self.rollback = connection, connection.close, connection.rollback
        self.inserted: Inserted = []  # the events of the transaction
        self.results: list[dict[str, Any]] = []  # those that it stores

    def begin(self) -> None:
        self.inserted, self.results = [], []
        self._db.execute("begin immediate")

    def commit(self) -> None:
        self._db.commit()

    def change(self, sql: str, *values: Any) -> sqlite3.Cursor:
        return self._db.execute(sql, values)

    def rows(self, sql: str, *values: Any) -> list[Row]:
        return self._db.execute(sql, values).fetchall()

    portion = rows  # a plugin's may end early, by bytes of the last column: callers go on behind it

    def one(self, sql: str, *values: Any) -> Any:
        """The first column of the first row, None where there is none."""
        row = self._db.execute(sql, values).fetchone()
        return None if row is None else row[0]

    def insert(self, table: str, row: dict[str, Any]) -> int:
        """The sequence number of a new row."""
        if table == "result":
            self.results.append(row)
        sql = f"insert into {table} ({', '.join(row)}) values ({', '.join('?' * len(row))})"
        return typing.cast(int, self.change(sql, *row.values()).lastrowid)

    # -- facts by name

    meta: Callable[..., str | None] = select_value("select value from meta where name = ?", None)
    number = select_value("select cast(value as int) from meta where name = ?", 0)
    set_meta = modify("insert or replace into meta (name, value) values (?, ?)")

    # -- events

    head = select_value("select seq from sqlite_sequence where name = 'event'", 0)  # the newest number
    count_dead_letters = select_value("select count(*) from dead_letter where project = ?", 0)
    next_expiry = select_value("select min(expires) from event", math.inf)
    expired = select_rows("select seq from event where expires <= ? order by expires limit ?")

    def insert_event(self, event: NewEvent) -> int:
        """Its sequence number. Storage.observer is told of it after the commit."""
        columns = "project", "type", "topic", "issue", "created", "expires", "body"
        seq = self.insert("event", {name: getattr(event, name) for name in columns})
        self.inserted.append((event, seq))
        return seq

    def events(self, project: str, after: int, upto: int, limit: int, type: str, issue: str | None) -> list[Row]:
        """The first events with after < seq <= upto that have not expired: of one type or, where it is ``*``, of all,
        with ``issue`` those that may name it.
        """
        source = "event" if type != "*" else "event not indexed"  # the planner would sort; the table is in order
        given = {"project = ?": project, "seq > ?": after, "seq <= ?": upto, "expires > ?": time.time()}
        given |= {"type = ?": type} if type != "*" else {}
        wanted = [given]
        if issue is not None:  # by the type's index every row would have to be looked at
            source = "event indexed by event_by_issue"
            wanted = [given | {"issue = ?": named} for named in {issue, ANY_ISSUE}]
        select = f"select seq, type, topic, created, delivered, body from {source} where "
        sql = " union all ".join(select + " and ".join(values) for values in wanted) + " order by seq limit ?"
        return self.portion(sql, *chain.from_iterable(values.values() for values in wanted), limit)

    def mark_delivered(self, seqs: Collection[int], deliveries: int) -> None:
        """Some readers got these events; ``deliveries`` counts each reader of each event."""
        self.change(f"update event set delivered = 1 where {CHOSEN} and delivered = 0", json.dumps(list(seqs)))
        add = "on conflict do update set value = value + excluded.value"
        self.change(f"insert into meta values ('deliveries', ?) {add}", deliveries)

    def remove_events(self, seqs: list[int], keep_dead: int) -> None:
        """Remove events; those that nobody got become dead letters, of which the newest ``keep_dead`` are kept."""
        chosen, columns = json.dumps(seqs), "seq, project, type, topic, body"
        dead = f"select {columns} from event where {CHOSEN} and delivered = 0"
        self.change(f"insert or ignore into dead_letter ({columns}) {dead}", chosen)
        self.change(f"delete from event where {CHOSEN}", chosen)
        last = "select seq from dead_letter order by seq desc limit 1 offset ?"
        self.change(f"delete from dead_letter where seq <= ({last})", keep_dead)

    # -- how far each reader has come: a position never goes back

    position = select_value(
        "select seq from position where project = ? and subject = ? and type = ? and filter = ?", -1
    )
    move_position = modify(
        "insert into position (project, subject, type, filter, seq, moved) values (?, ?, ?, ?, ?, now())"
        " on conflict do update set seq = max(seq, excluded.seq), moved = excluded.moved"
    )

    # -- results: ``body`` is the whole record, ``output`` what later agents see of it, both as JSON

    newest_result = select_value(f"select id {MINE} order by seq desc limit 1", "")
    issue_facts = select_rows(  # the newest first, from an index alone
        f"select agent_type, category, status, proposed {MINE} order by seq desc limit ?"
    )

    def issue_outputs(self, project: str, issue: str, limit: int) -> list[str]:
        """The ``output`` of the issue's newest results, oldest first."""
        rows = self.rows(f"select output {MINE} order by seq desc limit ?", project, issue, limit)
        return [row["output"] for row in reversed(rows)]

    # -- agents: a row, what its token may, and as JSON what else is known; readers get all as one

    AGENTS = (
        "select * from agent left join agent_evidence on agent_evidence.agent = agent.id"
        " left join agent_outcome on agent_outcome.agent = agent.id"
    )
    COLUMNS = "id project type issue task parent state pid started ended exit_code signal time_limit".split()
    count_agents = select_rows(f"select state, count(*) {SPAWNED} group by state")
    count_active_types = select_rows(
        f"select type, count(*) {SPAWNED} and state in ('starting', 'running') group by type"
    )
    mean_agent_seconds = select_value(f"select avg(ended - started) {SPAWNED} and pid is not null", 0.0)
    task_of = select_value(
        "select coalesce((select task from agent where id = ? and issue = ? and task != ''),"
        f" (select task {SPAWNED} and issue = ? and task != '' order by seq desc limit 1))", ""
    )  # fmt: skip

    def insert_agent(self, row: dict[str, Any]) -> None:
        """``row`` has what is known of COLUMNS, and depth, permissions and only_issue of its token."""
        self.insert("agent", {name: row.get(name) for name in self.COLUMNS})
        token = {"depth": row["depth"], "permissions": json.dumps(row["permissions"]), "only_issue": row["only_issue"]}
        self.insert("agent_evidence", {"agent": row["id"], **token})

    def update_agent(self, id: str, **values: Any) -> None:
        """Set COLUMNS."""
        assignments = ", ".join(f"{name} = ?" for name in values)
        self.change(f"update agent set {assignments} where id = ?", *values.values(), id)

    def add_outcome(self, id: str, **facts: Any) -> None:
        """Add what else is known of an agent; what is None is left out."""
        patch = "on conflict do update set outcome = json_patch(outcome, excluded.outcome)"
        self.change(f"insert into agent_outcome values (?, ?) {patch}", id, json.dumps(facts))

    def agent(self, project: str, id: str) -> dict[str, Any] | None:
        return next(map(agent_row, self.rows(f"{self.AGENTS} where project = ? and id = ?", project, id)), None)

    def unfinished_agents(self, project: str) -> list[dict[str, Any]]:
        where = "where project = ? and state in ('starting', 'running') order by seq"
        return list(map(agent_row, self.rows(f"{self.AGENTS} {where}", project)))

    # -- revoked subjects

    revoke = modify("insert or ignore into revoked (project, subject, since) values (?, ?, now())")
    revoked = select_rows("select subject from revoked where project = ?")


Job = Callable[[Records], Any]
Inserted = list[tuple["NewEvent", int]]  # events, with their sequence numbers
Row = Any  # of a table: ``row["column"]``
Write = tuple[Job, "asyncio.Future[Any]"]


def agent_row(row: Row) -> dict[str, Any]:
    """All that is known of an agent, its JSON decoded."""
    facts = {"birth": None, "reason": None} | dict(row) | json.loads(row["outcome"] or "{}")
    return facts | {"permissions": json.loads(row["permissions"] or "[]")}


SCHEMA_VERSION = 2
APPLICATION_ID = 0x63636F31  # "cco1": says that a database is ours

SCHEMA = """
create table if not exists meta (name text primary key, value text not null) without rowid;

create table if not exists event (
  seq integer primary key autoincrement, project text not null, type text not null, topic text not null,
  issue text, created real not null, expires real not null, delivered integer not null default 0,
  body blob not null);  -- the envelope as readers get it, without its id
create index if not exists event_by_type on event (project, type, seq);
create index if not exists event_by_issue on event (project, issue, seq) where issue is not null;
create index if not exists event_by_expiry on event (expires);

create table if not exists dead_letter (
  seq integer primary key, project text not null, type text not null, topic text not null, body blob not null);
create index if not exists dead_letter_by_project on dead_letter (project);

create table if not exists position (
  project text not null, subject text not null, type text not null, filter text not null,
  seq integer not null, moved real not null, primary key (project, subject, type, filter)) without rowid;

create table if not exists result (
  seq integer primary key autoincrement, id text not null unique, project text not null, issue text not null,
  agent_type text not null, agent_id text not null, category text not null, status text not null, stored real not null,
  proposed text not null, output text not null, body blob not null);
create index if not exists result_facts on result (project, issue, seq, agent_type, category, status, proposed);

create table if not exists agent (
  seq integer primary key autoincrement, id text not null unique, project text not null, type text not null,
  issue text not null, task text not null, parent text, state text not null, pid integer,
  started real not null, ended real, exit_code integer, signal integer, time_limit real not null);
create index if not exists agent_by_project on agent (project, state);
create index if not exists agent_by_issue on agent (project, issue, seq);

create table if not exists agent_evidence (
  agent text primary key, depth integer not null, permissions text not null, only_issue text) without rowid;
create table if not exists agent_outcome (agent text primary key, outcome text not null) without rowid;  -- JSON

create table if not exists revoked (
  project text not null, subject text not null, since real not null, primary key (project, subject)) without rowid;

-- what is kept as a number in meta; no trigger counts removed results: they are counted anew at each start
create trigger if not exists event_stored after insert on event begin
  insert into meta values ('published:' || new.project, 1), ('undelivered:' || new.project, new.delivered = 0)
  on conflict do update set value = value + excluded.value; end;
create trigger if not exists event_delivered after update of delivered on event begin
  update meta set value = value - 1 where name = 'undelivered:' || new.project; end;
create trigger if not exists event_removed after delete on event when old.delivered = 0 begin
  update meta set value = value - 1 where name = 'undelivered:' || old.project; end;
create trigger if not exists result_stored after insert on result begin
  insert into meta values ('results:' || new.project, 1) on conflict do update set value = value + 1; end;
delete from meta where name like 'results:%';
insert into meta select 'results:' || project, count(*) from result group by project;
-- tells this store's cursors from another's
insert or ignore into meta values ('epoch', lower(hex(randomblob(4))));
"""
LOG_BYTES = 4 * MB  # to which SQLite cuts a longer log when it begins it anew


def open_database(path: Path) -> sqlite3.Connection:
    """The database for writing, made where there is none. Raises sqlite3.Error where it is not ours to open."""
    if not path.exists():
        path.touch(0o600, exist_ok=False)  # -wal and -shm take this mode too
    database = connect_database(path)
    owned = f"pragma application_id = {APPLICATION_ID}; pragma user_version = {SCHEMA_VERSION};"
    database.executescript(f"begin immediate; {SCHEMA} {owned} commit;")
    return database


def connect_database(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Looks whose the database is before it changes the file. Raises as ``open_database``."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5, cached_statements=256)
    facts = "select user_version, application_id, (select count(*) from sqlite_master)"
    version, owner, tables = database.execute(f"{facts} from pragma_user_version, pragma_application_id").fetchone()
    if version > SCHEMA_VERSION or (owner != APPLICATION_ID and any((version, owner, tables))):
        raise sqlite3.DatabaseError("a newer version of this program made it, or another program")
    database.row_factory = sqlite3.Row
    database.create_function("now", 0, time.time)
    database.executescript(
        f"pragma journal_mode = wal; pragma journal_size_limit = {LOG_BYTES}; pragma query_only = {read_only};"
        "pragma synchronous = full;"  # a 2xx is on disk
        "pragma temp_store = memory;"  # else parts of results come to lie in /var/tmp
    )
    return database


# ==== Results: what agents leave behind, and who works next ====


class Results:
    """Stores results, each with its agent_completed event, its routing decision and its file in one transaction."""

    HISTORY = 200  # earlier results of an issue that routing looks at

    def __init__(
        self, storage: Storage, bus: EventBus, hooks: Hooks, agent_types: AgentTypes, settings: Settings
    ) -> None:
        self._storage, self._bus, self._hooks, self._agent_types = storage, bus, hooks, agent_types
        self._settings, self._redaction = settings, redaction()
        self._pool = Pool("results", 8, 60)

    def start(self) -> None:
        """Look what language the project is in, without waiting for it."""
        listed = partial(run_git, self._settings.root, "ls-files", "-z")
        self._main_language = in_thread("language", lambda: main_language(tuple(split_z(listed()))))

    async def store(self, body: dict[str, Any]) -> dict[str, Any]:
        """Store ``body``, tell the waiters, propose who is next. Raises AGT_002 for an unknown type."""
        category = await self._agent_types.find(body["agent_type"])
        # Other agents read what it says. Whose it is stays as it is.
        whose = {name: body[name] for name in ("agent_id", "agent_type", "issue_id", "project_id")}
        said, language = await self.prepared({name: value for name, value in body.items() if name not in whose})
        body = whose | said
        facts = {
            "result": ResultFact(body["agent_type"], category, body["result"]["status"]), "proposals": [],
            "language": language, "submission": body, "settings": self._settings,
        }  # fmt: skip
        stored = await self.write(facts)
        self._hooks.tell("result_stored", result=body | {"id": stored["id"], "stored_at": stored["timestamp"]})
        return stored

    async def prepared(self, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """``body`` without the secrets in it, and the project's language."""
        redacted, _ = await self._pool.run(self._redaction.redact_json, body)
        language = await asyncio.wrap_future(self._main_language)
        if language == "unknown":  # for the next result: a new project has files by then
            self.start()
        return redacted, language

    async def write(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The answer, once the result is stored; the writer thread finds who is next."""
        job = partial(self.insert, self._hooks.implementations["next_agents"], facts)
        answer: dict[str, Any] = await self._storage.write(job, answers=True)
        return answer

    def insert(self, rules: list[Implementation], facts: dict[str, Any], records: Records) -> dict[str, Any]:
        """A job: store a result, with who is next; the answer."""
        body, result, now = facts["submission"], facts["result"], time.time()
        project, issue = body["project_id"], body["issue_id"]
        result_id = f"result-{int(now * 1e6):x}-{random.getrandbits(64):016x}"  # in index order
        proposals = self.propose(rules, facts | {"history": self.history(records, project, issue)})
        row = msgspec.structs.asdict(result) | {
            "id": result_id, "project": project, "issue": issue, "agent_id": body["agent_id"], "stored": now,
            "proposed": msgspec.json.encode([each.agent_type for each in proposals]).decode(),
            "output": msgspec.json.encode(previous_output(body, result_id, now)).decode(),
            "body": msgspec.json.encode(body | {"id": result_id, "stored_at": iso(now)}),
        }  # fmt: skip
        told = {
            "issue_id": issue, "agent_type": body["agent_type"], "status": result.status, "result_id": result_id,
            "next_agents": msgspec.to_builtins(proposals),
        }  # fmt: skip
        said = {"publisher": body["agent_id"], "topic": CATEGORIES[result.category].topic, "data": told}
        event_id = self._bus.event_id(records.insert_event(new_event(project, "agent_completed", said)))
        records.insert("result", row)
        return {
            "id": result_id, "stored": True, "storage_path": self._storage.files.path(row),
            "next_agents": proposals, "event_published": True, "event_id": event_id, "timestamp": iso(now),
        }  # fmt: skip

    def propose(self, rules: list[Implementation], facts: dict[str, Any]) -> list[NextAgent]:
        """Who is next: each rule gets the proposals as those before it left them. Blocks."""
        proposals = facts["proposals"]
        for rule in rules:
            found = self._hooks.ask_one(rule, **facts | {"proposals": list(proposals)})
            known = []
            for item in found or []:
                try:
                    self._agent_types.category(item.agent_type)
                    known.append(item)
                except ApiError as error:
                    log.warning("plugin %s: next_agents: %s", rule.plugin, one_line(error))
            proposals = known if known or found == [] else proposals  # [] removes all, unknown types alone nothing
        last, redacted = {item.agent_type: item for item in proposals}, self._redaction.redact  # one each
        return [NextAgent(item.agent_type, item.priority, redacted(item.reason)[0]) for item in last.values()]

    def history(self, records: Records, project: str, issue: str) -> list[ResultFact]:
        """The issue's results that routing looks at, oldest first."""
        rows = reversed(records.issue_facts(project, issue, self.HISTORY))
        return [ResultFact(kind, category, status, json.loads(proposed)) for kind, category, status, proposed in rows]


class ResultFiles:
    """The latest record of each agent type on each issue, in <project>/<issue>/<agent_type>.json. Everything blocks.

    A record is written into NEW before its commit and moved to its path after it. The plugin guard puts in place
    what a crash left.
    """

    NEW = ".new"  # no project can have this name
    FLAGS = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

    def __init__(self, folder: Path) -> None:
        self._folder, self._new = str(folder), f"{folder}/{self.NEW}"
        self._written: dict[str, str] = {}  # where a record lies until its commit, by its path

    def path(self, row: dict[str, Any] | Row) -> str:
        return f"{self._folder}/{row['project']}/{row['issue']}/{row['agent_type']}.json"

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write records before their commit, and make their folders. Raises StorageError."""
        try:
            latest = {self.path(row): row for row in rows}
            issues = {os.path.dirname(path) for path in latest}
            projects = {os.path.dirname(issue) for issue in issues}
            for folder in (self._folder, self._new, *projects, *issues):
                with suppress(FileNotFoundError):
                    if stat.S_ISDIR(os.lstat(folder).st_mode):
                        continue
                os.mkdir(folder, 0o700)  # makedirs would go by the umask; it refuses a link, which could lead out
            for path, row in latest.items():
                if os.path.isdir(path):
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                self._written[path] = new = f"{self._new}/{row['id']}"
                unwritten, file = row["body"], os.open(new, self.FLAGS, 0o600)  # through no link, to no FIFO
                try:
                    while unwritten:  # a file object would cost more than all else here
                        unwritten = unwritten[os.write(file, unwritten) :]
                finally:
                    os.close(file)
        except OSError as error:
            raise StorageError(f"the folder results: {error.strerror}") from None

    def place(self) -> None:
        """Make the records that were written the latest."""
        for path, new in self._written.items():
            try:
                os.replace(new, path)
            except OSError as error:
                log.error("the file of %s cannot be written: %s", os.path.basename(new), error.strerror)
        self._written = {}

    def drop(self) -> None:
        """Remove the records that were written."""
        for new in self._written.values():
            with suppress(OSError):
                os.unlink(new)
        self._written = {}


def previous_output(body: dict[str, Any], result_id: str, stored: float) -> dict[str, Any]:
    """A result as later agents see it in their context."""
    result = body["result"]
    entries = [entry for key in ("files_created", "files_modified", "files_deleted") for entry in result.get(key) or []]
    files = dict.fromkeys(entry if isinstance(entry, str) else entry["path"] for entry in entries)
    return {
        "agent": body["agent_id"], "agent_type": body["agent_type"], "timestamp": iso(stored),
        "decision": "; ".join(result.get("decisions") or []), "rationale": str(result.get("rationale") or ""),
        "files_affected": list(files), "status": result["status"], "result_id": result_id,
    }  # fmt: skip


# -- what hooks about results get and give


class ResultFact(Struct, frozen=True):
    """One result on an issue, and the agent types that the answer to it proposed."""

    agent_type: str
    category: str
    status: str
    proposed: list[str] = []


class NextAgent(Struct):
    """Who should work on the issue next, and why."""

    agent_type: Identifier
    priority: Priority
    reason: str


# ==== Event bus: the log is the truth, waking is a hint ====


class EventBus:
    """Publish and long-poll: store, commit, wake, answer. A reader's position moves once its answer was written.

    Nothing is awaited between the last look into the log and parking, so no event can slip between.
    """

    STEP = 100  # rows looked at before others get their turn on the loop
    TERM = re.compile(r'[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*:[^!,:|"*][^,:|"*]*')

    def __init__(self, storage: Storage, settings: Settings, hooks: Hooks) -> None:
        self._storage, self._settings, self._hooks = storage, settings, hooks
        # By project, type and the one issue that the filter asks for, if it does.
        self._parked: dict[tuple[str, str, str | None], dict[Waking, Waiter]] = {}
        self._closed = False
        self._positions: dict[PositionKey, int] = {}  # not written down yet
        self._times: deque[float] = deque(maxlen=1000)  # seconds from publishing to writing
        storage.observer = self.wake_waiters

    def parse(self, text: str) -> Filter:
        """``field:value``, comma for and: the field has the value, or an array with it. Raises EVT_002."""
        parts = text.split(",") if text else []
        if len(parts) > 32 or not all(map(EventBus.TERM.fullmatch, parts)):
            problem = "Invalid filter: field:value, 32 at most, with commas; other forms need the plugin filters"
            raise ApiError("EVT_002", problem, path="filter")
        terms = [part.split(":") for part in parts]
        has = (lambda event, field=field, value=value: value in event.texts(field) for field, value in terms)
        return Filter(text, tuple(has), dict(terms).get("issue_id"))

    # -- publishing

    async def publish(self, project: str, event_type: str, body: dict[str, Any]) -> dict[str, Any]:
        """Store an event and wake its waiters; the answer names their subjects."""
        event = new_event(project, event_type, body)

        def insert(records: Records) -> dict[str, Any]:
            """A job."""
            event_id = self.event_id(records.insert_event(event))
            facts = {name: event.envelope[name] for name in ("timestamp", "topic", "ttl_seconds")}
            return {"event_id": event_id, "published": True, "subscribers_notified": [], "subscriber_count": 0, **facts}

        answer: dict[str, Any] = await self._storage.write(insert, answers=True)
        return answer | {"subscribers_notified": list(event.woken), "subscriber_count": len(event.woken)}

    def event_id(self, seq: int) -> str:
        """Sorts like the sequence; the epoch tells it from another store's."""
        return f"evt-{self._storage.epoch}-{seq:012d}"

    def wake_waiters(self, event: NewEvent, seq: int) -> None:
        """Wake the polls that an event matches, tell the plugins."""
        envelope = {"event_id": self.event_id(seq), **event.envelope}
        known, verdicts = KnownEvent(envelope), dict[str, bool]()  # thousands may wait with one filter
        woken = list[Waking]()
        issues = dict.fromkeys([*texts_of(find_field(envelope, "issue_id")), None])
        for key in product((event.project,), (event.type, "*"), issues):
            for future, (subject, filter, after) in self._parked.get(key, {}).items():
                if filter.text not in verdicts:
                    verdicts[filter.text] = filter.matches(known)
                if verdicts[filter.text] and seq > after and not future.done():
                    woken.append(future)
                    event.woken[subject] = None
        self.wake(woken, seq)
        self._hooks.tell("event_published", event=envelope)

    def wake(self, parked: Iterable[Waking], seq: int | None) -> None:
        """Give parked polls that still wait what wakes them."""
        for future in parked:
            if not future.done():
                future.set_result(seq)

    # -- waiting

    async def wait(self, claims: Claims, event_type: str, query: WaitQuery, hang_up: HangUp) -> Poll:
        """The matching events after the reader's position or ``since``, as soon as there are any; none on time-out.

        Raises EVT_002 (filter), REQ_001, EVT_003 (since) and CancelledError (the client hung up).
        """
        filter, floor = self.parse(query.filter).within(claims.issue_id), self._storage.floor
        channel = (claims.project_id, event_type)
        key = None if query.since else (claims.project_id, claims.sub, event_type, filter.text)
        after = max(floor, self.position(key) if key else self.parse_cursor(query.since, floor))
        began, parked = time.monotonic(), 0.0
        while True:
            found = await self.search(channel, filter, after, query.limit)
            left = query.timeout / 1000 - (time.monotonic() - began)
            if found.rows or self._closed or left <= 0:
                return Poll(found.rows, found.scanned, found.content, key, parked)
            if hang_up.happened:
                raise asyncio.CancelledError
            after = found.scanned
            del found  # thousands are parked below
            seq = await self.park(channel, (claims.sub, filter, after), left, hang_up)
            parked = time.monotonic() - began
            after = max(after, (seq or 0) - 1)  # nothing between matches: the first that does wakes

    async def park(self, channel: Channel, waiter: Waiter, seconds: float, hang_up: HangUp) -> int | None:
        """The number of the event that woke ``waiter``, None on time-out or stop."""
        loop, key = asyncio.get_running_loop(), (*channel, waiter[1].issue)
        future = hang_up.future = loop.create_future()
        timer = loop.call_later(seconds, self.wake, (future,), None)
        parked = self._parked.setdefault(key, {})
        parked[future] = waiter
        try:
            return await future
        finally:
            timer.cancel()
            del parked[future]
            if not parked:
                del self._parked[key]

    def parse_cursor(self, text: str, floor: int) -> int:
        """The number of an event id, a cursor, ``earliest`` or ``latest``. Raises REQ_001, EVT_003."""
        read, head = self._storage.read, self._storage.head
        if text in ("earliest", "latest"):
            return floor if text == "earliest" else head
        match = re.fullmatch(r"evt-([0-9a-f]{8})-(\d{12,18})", text, re.ASCII)
        if not match:
            problem = "since must be an event id, a cursor, earliest or latest"
            raise ApiError("REQ_001", problem, path="since")
        seq = int(match[2])
        own = match[1] == self._storage.epoch
        if own and floor <= seq and (seq <= head or seq <= read.head()):  # what is committed may not be told yet
            return seq
        reason = "another store" if not own else "retention" if seq < floor else "beyond the head"
        details = {"floor": self.event_id(floor), "head": self.event_id(head), "reason": reason}
        raise ApiError("EVT_003", f"The cursor is outside of what is kept: {reason}", details=details)

    async def search(self, channel: Channel, filter: Filter, after: int, limit: int) -> Poll:
        """The next matches. Others get their turn between steps; nothing is awaited after the last."""
        rows, size, more = list[Row](), 0, False
        while True:
            step, upto = self.step(channel, filter, after)
            for row in step:
                if filter.text and not filter.matches(KnownEvent(msgspec.json.decode(self.envelope(row)))):
                    continue
                size += len(row["body"])
                if len(rows) == limit or (rows and size > PAGE_BYTES):
                    more, upto = True, row["seq"] - 1
                    break
                rows.append(row)
            after = upto
            if more or after >= self._storage.head:
                break
            await asyncio.sleep(0)
        cursor = self.event_id(after)
        events = [Raw(self.envelope(row)) for row in rows]
        answer = {"events": events, "more_available": more, "next_cursor": cursor if rows else None}
        answer |= {"scanned_to": cursor, "timestamp": iso()} | ({} if rows else {"timeout": True})
        return Poll(rows, after, msgspec.json.encode(answer))

    def step(self, channel: Channel, filter: Filter, after: int) -> tuple[list[Row], int]:
        """At most STEP events that may match, and up to where there are no others."""
        (project, type), head = channel, self._storage.head
        if after >= head:
            return [], after
        rows = self._storage.read.events(project, after, head, self.STEP, type, filter.issue)
        return rows, rows[-1]["seq"] if rows else head

    def envelope(self, row: Row) -> bytes:
        """A stored event as readers get it."""
        return b'{"event_id":"%s",' % self.event_id(row["seq"]).encode() + row["body"][1:]

    # -- readers

    def position(self, key: PositionKey) -> int:
        """Up to where this reader's polls were answered, -1 before the first."""
        known = self._positions.get(key)
        return self._storage.read.position(*key) if known is None else known

    def answered(self, poll: Poll) -> None:
        """The answer was written to a live connection: move the position, note the delivery."""
        if poll.key and poll.scanned > self.position(poll.key):
            self._positions[poll.key] = poll.scanned
        if poll.parked:
            now = time.time()
            self._times.extend(max(0.0, now - row["created"]) for row in poll.rows)
        self.note([poll])

    def note(self, polls: list[Poll]) -> None:
        """Write down what answered polls have changed."""
        positions = {poll.key: self._positions[poll.key] for poll in polls if poll.key in self._positions}
        rows = [row for poll in polls for row in poll.rows]

        def write(records: Records) -> None:
            """A job."""
            for key, seq in positions.items():
                records.move_position(*key, seq)
            if rows:
                records.mark_delivered({row["seq"] for row in rows if not row["delivered"]}, len(rows))

        def written(future: asyncio.Future[None]) -> None:
            """A position that has moved on meanwhile is still to be written."""
            for key, seq in () if future.cancelled() or future.exception() else positions.items():
                if self._positions.get(key) == seq:
                    del self._positions[key]

        if positions or rows:
            self._storage.write_behind(write).add_done_callback(written)

    # -- life

    def close(self) -> None:
        """Answer waiting polls now, and later ones at once, with the time-out shape."""
        self._closed = True
        self.wake(chain.from_iterable(self._parked.values()), None)

    async def round_trip(self) -> bool:
        """Whether a waiter that is parked and woken, as everybody's are, wakes within 2 s."""
        channel = "", "probe"
        asyncio.get_running_loop().call_soon(lambda: self.wake(self._parked[(*channel, None)], 1))
        return await self.park(channel, ("health", Filter(), 0), 2.0, HangUp()) == 1

    def statistics(self) -> dict[str, Any]:
        read, project, times = self._storage.read, self._settings.project, self._times
        return {
            "total_published": read.number(f"published:{project}"), "total_delivered": read.number("deliveries"),
            "active_subscriptions": sum(map(len, self._parked.values())),
            "queue_depth": read.number(f"undelivered:{project}"),
            "avg_delivery_time_ms": round(sum(times) / len(times) * 1000, 3) if times else 0.0,
            "dead_letter_queue_size": read.count_dead_letters(project),
        }  # fmt: skip


PAGE_BYTES = 8 * MB  # a list, or the answer to a poll, ends before it gets larger


class Poll(Struct, frozen=True):
    """Matching events, and the answer as JSON; every event up to ``scanned`` has been looked at."""

    rows: list[Row]
    scanned: int
    content: bytes = b""
    key: PositionKey | None = None  # whose position it moves
    parked: float = 0.0  # seconds


PositionKey = tuple[str, str, str, str]  # project, subject, type, filter
Channel = tuple[str, str]  # project, type or *
Waiter = tuple[str, "Filter", int]  # subject, filter, the number up to which it has looked
Waking = asyncio.Future[int | None]  # what ``park`` gives


class HangUp:
    """Whether the client has hung up; ``happen`` cancels what is waited for on its behalf."""

    happened = False
    future: asyncio.Future[Any] | None = None

    def happen(self) -> None:
        self.happened = True
        if self.future:
            self.future.cancel()


class NewEvent(Struct, frozen=True):
    """An event before it has its number; ``body`` is the envelope as JSON, ``woken`` whose polls it woke, in order."""

    project: str
    type: str
    topic: str
    issue: str | None
    created: float
    expires: float
    envelope: dict[str, Any]
    body: bytes
    woken: dict[str, None] = {}


OWN_EVENTS = (  # those of plugins too: nobody may forge, while one is off, what it later reads out of the log
    "agent_completed", "agent_exited", "agent_failed", "budget_warning",
    "approval_wanted", "approval_answered", "question_asked", "question_answered",
)  # fmt: skip
ANY_ISSUE = "*"  # the issue of an event whose issue_id is a list: every issue's readers look at it


def new_event(project: str, event_type: str, submission: dict[str, Any]) -> NewEvent:
    """An event of a validated submission, whose unknown fields stay."""
    now = time.time()
    first = dict.fromkeys(("event_type", "publisher", "topic", "data", "timestamp", "correlation_id"))
    ours = {"event_type": event_type, "timestamp": iso(now)}
    envelope: dict[str, Any] = first | {"priority": "normal", "ttl_seconds": 86_400} | submission | ours
    envelope.pop("event_id", None)
    issues = texts_of(find_field(envelope, "issue_id"))
    issue = ANY_ISSUE if issues[1:] else next(iter(issues), None)
    body, expires = msgspec.json.encode(envelope), now + envelope["ttl_seconds"]
    return NewEvent(project, event_type, envelope["topic"], issue, now, expires, envelope, body)


class Filter(Struct, frozen=True):
    """The events for which every term is true."""

    text: str = ""
    terms: tuple[Callable[[KnownEvent], bool], ...] = ()
    issue: str | None = None  # the only issue_id that matches, None where the filter leaves it open

    def within(self, issue: str | None) -> Filter:
        """For a token bound to ``issue``, if it is: of events that name issues, only its own match. No client can send
        a ``text`` that begins with ``!``, so such tokens have positions of their own.
        """
        if issue is None:
            return self
        terms = (lambda event: not (named := issues_named(event)) or issue in named), *self.terms
        return msgspec.structs.replace(self, text=f"!{json.dumps(issue)},{self.text}", terms=terms)

    def matches(self, event: KnownEvent) -> bool:
        return all(term(event) for term in self.terms)


class KnownEvent(dict[str, Any]):
    """An event that makes the texts of a field once for all filters and terms."""

    made = cached_property[dict[str, Any]](lambda event: {})

    def texts(self, field: str) -> dict[str, None]:
        if field not in self.made:
            self.made[field] = dict.fromkeys(texts_of(find_field(self, field)))
        return typing.cast(dict[str, None], self.made[field])


def issues_named(body: dict[str, Any], most: int | None = None) -> list[str]:
    """The issues in ``issue_id`` of an event or another body, and of its ``data``; what is no scalar is nobody's."""
    holders = [holder for holder in (body, body.get("data")) if isinstance(holder, dict)]
    values = [value for holder in holders if (value := holder.get("issue_id")) is not None]
    items = (item for value in values for item in (value if isinstance(value, list) else [value]))
    return list(islice((text for item in items for text in texts_of(item) or [""]), most))


def find_field(event: dict[str, Any], field: str) -> Any:
    """The value of a dotted path in the envelope, where null is none, else in data; UNSET where there is none."""
    for holder in (event, event.get("data")):
        value: Any = holder
        for name in field.split("."):
            value = value.get(name, UNSET) if isinstance(value, dict) else UNSET
        if value is not UNSET and (value is not None or holder is not event):
            return value
    return UNSET


def texts_of(value: Any) -> list[str]:
    """The texts of a scalar, or of an array's items, as JSON writes them; none of UNSET."""
    items = value if isinstance(value, list) else [value]
    texts = [item for item in items if isinstance(item, str)]
    others = [item for item in items if item is not UNSET and not isinstance(item, (str, dict, list))]
    return texts + (msgspec.json.encode(others)[1:-1].decode().split(",") if others else [])


# ==== Context: the assembler, its cache and budget, the project on disk, git, secrets ====


class Contexts:
    """Contexts, built in worker threads, cached, and never older than the disk.

    Each request looks at the project first. The state that it finds, the issue's results and what was asked for make
    the ETag; a cached context is given where it has this one.
    """

    def __init__(self, storage: Storage, hooks: Hooks, agent_types: AgentTypes, settings: Settings) -> None:
        self._storage, self._hooks, self._agent_types, self._settings = storage, hooks, agent_types, settings
        self._pool = Pool("contexts", 8, 120)
        self._cache = OrderedDict[ContextKey, tuple[str, bytes]]()  # ETag, and what all answers share
        self._bytes = self._hits = self._misses = 0
        # by the newest event, which each result comes with: a query gives up the GIL, and waits for those who build
        self._newest = lru_cache(1000)(lambda seq, *issue: storage.read.newest_result(*issue))
        self._tag = lru_cache(256)(lambda *facts: f'W/"{checksum(repr(facts))[7:39]}"')
        self.project = hooks.part(Project, settings)(settings.root, settings.storage)
        self._index_folder = settings.storage / "index"
        code = __version__, settings.project, sorted(plugin.name for plugin in hooks.loaded)
        self._code = checksum(repr(code))  # short: it is hashed with each request

    def start(self) -> None:
        self._index_folder.mkdir(mode=0o700, exist_ok=True)

    async def close(self) -> None:
        """The service ends."""

    async def get(
        self, issue_id: str, agent_type: str, query: ContextQuery, known: str = "", sub: str = ""
    ) -> tuple[bytes, str]:
        """The context as JSON, and its ETag; no content where ``known``, an If-None-Match, names it; ``sub`` asks.
        Raises AGT_002 and REQ_002 (404), CTX_001, CTX_002.
        """
        category = await self._agent_types.find(agent_type, status=404)
        try:
            state = await self.project.state()
        except OSError as error:
            log.error("the project cannot be read: %s", one_line(error))
            why = str(error) if isinstance(error, GitError) else ""  # others name paths here
            raise ApiError("CTX_001", why and f"The project cannot be read: {why}") from None
        key = ContextKey(
            issue_id=issue_id, agent_type=agent_type, category=category, max_files=query.max_files, reader=query.reader,
            max_bytes=min(query.max_bytes, BYTES_PER_TOKEN * query.max_tokens),
            task=query.task or await self.task(issue_id, sub),
        )  # fmt: skip
        etag = self._etag(key, state)
        if any(tag.strip() in (etag, etag[2:], "*") for tag in known.split(",")):  # with W/ or without
            self._hits += 1
            return b"", etag
        if content := self.kept(key, state, etag):
            self._hits += 1
        else:
            content, _, etag = await self.made(key, state, etag)
        return content, etag

    def _etag(self, key: ContextKey, state: ProjectState) -> str:
        """Weak: a hit, a build and their compressed forms differ in bytes alone (RFC 9110, 8.8.1)."""
        results = self._newest(self._storage.head, self._settings.project, key.issue_id)
        return self._tag(key, self._code, state.digest, results)

    async def task(self, issue_id: str, sub: str) -> str:
        """For a request that says none: the agent's own task, else the issue's latest, else ""."""
        return self._storage.read.task_of(sub, issue_id, self._settings.project, issue_id)

    def kept(self, key: ContextKey, state: ProjectState, etag: str) -> bytes:
        """The cached context with this ETag, else b""."""
        before, content = self._cache.get(key, ("", b""))
        if before != etag:
            return b""
        self._cache.move_to_end(key)
        return content

    async def made(self, key: ContextKey, state: ProjectState, etag: str) -> BuiltContext:
        """A new context. Raises CTX_001, CTX_002."""
        self._misses += 1
        rows = self._storage.read.issue_outputs(self._settings.project, key.issue_id, 200)
        built = await self._pool.run(self._build, key, rows, state, etag)
        if built[2] == etag:
            self._drop(key)
            self._cache[key] = etag, built[1]
            self._bytes += len(built[1])
        while self._bytes > self._settings.cache_size_mb * MB:
            self._drop(next(iter(self._cache)))
        return built

    def _build(self, key: ContextKey, rows: list[bytes], state: ProjectState, etag: str) -> BuiltContext:
        """``made``'s work. Blocks. A plugin returns another ETag to keep it out of the cache."""
        try:  # What changes after the state's files were looked at shows at the next look.
            outputs = [json.loads(row) for row in rows]
            ranked = self.rank(key, outputs, state)
            request = ContextRequest(**msgspec.structs.asdict(key), outputs=outputs, project=state, ranked=ranked)
            return *self.answer(request, self.redacted(self.sections(request))), etag
        except ApiError:
            raise
        except Exception as error:  # a boundary: whatever a repository may hold
            log.error("context for %s could not be built", key.issue_id, exc_info=error)
            raise ApiError("CTX_001") from None

    def redacted(self, sections: Sections) -> Sections:
        """``sections`` without secrets, and with their number."""
        contents = [file.pop("content") for file in sections["relevant_files"]]
        parts = [redaction().redact_json({name: part}) for name, part in sections.items()]  # a plugin remembers them
        sections = {name: part for redacted, _ in parts for name, part in redacted.items()}
        sections["metadata"]["redactions"] = sum(number for _, number in parts)
        for file, content in zip(sections["relevant_files"], contents, strict=True):
            file["content"], number = redact(content)
            if number:
                file |= {"redactions": file.get("redactions", 0) + number, "checksum": checksum(file["content"])}
        return sections

    def answer(self, request: ContextRequest, sections: Sections) -> tuple[bytes, bytes]:
        """The JSON for those who waited, and for those who get it from the cache. Raises CTX_002."""
        found = sections["relevant_files"]
        sections["relevant_files"] = found[: request.max_files]
        room = request.max_bytes - 600 - len(request.issue_id) - len(request.agent_type)  # what surrounds the context
        cut = self.fit(request, sections, room)
        files = sections["relevant_files"]
        cut |= len(found) > request.max_files or any(file.get("truncated") for file in files)
        strategy = "semantic_chunking" if any(file.get("line_ranges") for file in files) else "smart"
        strategy = strategy if request.task else "file_sampling"
        sections["metadata"]["redactions"] += sum(file.get("redactions", 0) for file in files)
        content = msgspec.json.encode(sections)
        facts = {
            "issue_id": request.issue_id, "agent_type": request.agent_type, "context": Raw(content), "truncated": cut,
            "truncation_strategy": strategy if cut else "none",
            "total_size_bytes": len(content), "estimated_tokens": -(-len(content) // BYTES_PER_TOKEN),
            "file_count": len(files), "timestamp": iso(),
        }  # fmt: skip
        head = msgspec.json.encode(facts)[:-1]
        return head + b',"cache_hit":false}', head + b',"cache_hit":true}'

    def fit(self, request: ContextRequest, sections: Sections, max_bytes: int) -> bool:
        """Cut ``sections``, in place, to ``max_bytes`` of JSON; whether something went. Raises CTX_002.

        The least relevant files go first, and the one that fits in part ends at a line's end. Then the oldest outputs
        go, then half of each list again and again, the structure's last.
        """
        files, sections["relevant_files"] = sections["relevant_files"], []
        git, structure, cut = sections["git_context"], sections["project_structure"], False
        lists = [(sections, "previous_agent_outputs"), (git, "uncommitted_changes"), (git, "recent_commits")]
        for holder, name in [*lists, (structure, "files"), (structure, "directories")]:
            while holder[name] and json_size(sections) > max_bytes:
                rest, cut = holder[name], True
                holder[name] = rest[1:] if holder is sections else rest[: len(rest) // 2]
        room = max_bytes - json_size(sections)
        if room < 0:
            raise ApiError("CTX_002", f"The context cannot be cut below {max_bytes} bytes: ask for more")
        for file in files:
            fits, content = json_size(file) < room, file["content"]
            while content and json_size(file) >= room:
                content = content[: content.rfind("\n", 0, len(content) * 7 // 8) + 1]
                file |= {"content": content, "truncated": True, "checksum": checksum(content)}
            if fits or content:
                sections["relevant_files"].append(file)
            if not fits:
                return True
            room -= json_size(file) + 1
        return cut

    def rank(self, key: ContextKey, outputs: list[dict[str, Any]], state: ProjectState) -> list[RankedFile]:
        """The first ranking that a plugin gives, else the built-in one."""
        files = self.project.readable(state.files)
        request = RankRequest(
            root=state.root, index_folder=str(self._index_folder), files=files, category=key.category, task=key.task,
            agent_type=key.agent_type, outputs=outputs, head=state.head,
            changed=[change.path for change in state.git.uncommitted_changes],
        )  # fmt: skip
        known, ranked = {file.path for file in files}, self._hooks.first("rank_files", request=request)
        return [item for item in ranked if item.path in known]  # a plugin may name anything

    def sections(self, request: ContextRequest) -> Sections:
        """The sections that the plugins give."""
        sections: Sections = {}
        for name, answer in reversed(list(self._hooks.ask("context_section", request=request))):  # later plugins win
            try:
                given = msgspec.json.decode(msgspec.json.encode(answer), type=dict[str, Any])
                sections |= given | {"metadata": sections.get("metadata", {}) | given.get("metadata", {})}
            except (TypeError, ValueError, RecursionError) as error:
                log.warning("plugin %s: context_section: %s", name, one_line(error))
        return sections

    def _drop(self, key: ContextKey) -> int:
        size = len(self._cache.pop(key, ("", b""))[1])
        self._bytes -= size
        return size

    def clear(self, chosen: Callable[[ContextKey], bool]) -> tuple[int, int]:
        """Forget the ``chosen`` ones; (entries, bytes) that were there."""
        keys = list(filter(chosen, self._cache))
        return len(keys), sum(map(self._drop, keys))

    def statistics(self) -> dict[str, Any]:
        return {
            "context_cache_entries": len(self._cache), "context_cache_bytes": self._bytes,
            "cache_hit_rate": round(self._hits / max(1, self._hits + self._misses), 4),
        }  # fmt: skip


BuiltContext = tuple[bytes, bytes, str]  # as ``answer`` gives it, and its ETag
BYTES_PER_TOKEN = 4  # an estimate for English and code


def json_size(value: Any) -> int:
    return len(msgspec.json.encode(value))


# -- the project on disk


class Project:
    """The repository on disk, asked anew at each look."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self._root, self._scratch = root, scratch
        self.also: Sequence[str] = ()  # files that plugins read although git may ignore them
        self._looks = Pool("look", 2, 120)

    async def state(self) -> ProjectState:
        """As it was at some moment since this call. Raises OSError."""
        return await self._looks.run(self.look)

    def look(self) -> ProjectState:
        """Blocks."""
        names, git, head = self.ask()
        now, found = time.time_ns(), {}
        for name in (*names, *self.also):
            with suppress(OSError, ValueError):  # it is gone
                facts = os.lstat(os.path.join(self._root, name))
                found[name] = facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_ino, facts.st_mode
        files = [FileFact(name, it[2], it[0]) for name in names if (it := found.get(name)) and not stat.S_ISDIR(it[4])]
        times = [max(mtime, ctime) for mtime, ctime, *_ in found.values()]
        # stamps move in steps of up to 10 ms, on some disks of whole seconds
        young = any(abs(now - moment) < (12_000_000 if moment % 10**9 else 2_100_000_000) for moment in times)
        digest = secrets.token_hex(16) if young else checksum(repr((found, git, head)))
        return ProjectState(str(self._root), files, git, head, digest)

    def readable(self, files: list[FileFact]) -> list[FileFact]:
        """The files whose contents contexts may give."""
        return [file for file in files if not is_secret(file.path)]

    def ask(self) -> tuple[list[str], GitContext, str | None]:
        """(names of files, what git says, the commit), without the copy that this file is there. Raises GitError."""

        def said(*words: str) -> str:
            return clean_text(os.fsdecode(run_git(root, *words) or b"").strip())

        root, own = self._root, os.path.realpath(__file__).removeprefix(os.path.join(self._root, ""))
        try:
            prefix = os.fsdecode(ask_git(root, "rev-parse", "--show-prefix").removesuffix(b"\n"))
        except GitError as error:
            broken = any(os.path.lexists(folder / ".git") for folder in (root, *root.parents))
            if broken or "not a git repository (or any" not in str(error):
                raise
            return sorted({*walk_files(root)} - {own}), GitContext(None, [], [], None, None), None
        shape = ("--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", ".")
        codes = {row[3:].removeprefix(prefix): row[:2] for row in split_z(ask_git(root, "status", *shape))}
        codes.pop(own, None)
        tracked = split_z(ask_git(root, "ls-files", "-z", "--deduplicate"))
        names = {*tracked, *(name for name, code in codes.items() if code == "??")} - {own}
        branch = said("symbolic-ref", "-q", "--short", "HEAD") or None
        url = without_credentials(said("remote", "get-url", "origin")) or None
        git = GitContext(branch, list(read_commits(root)), read_changes(root, codes), url and "origin", url)
        return sorted(names), git, said("rev-parse", "-q", "--verify", "HEAD") or None


class ProjectState(Struct, frozen=True):
    """The project at one moment. While a change could leave no trace, ``digest`` is one of a kind."""

    root: str
    files: list[FileFact]
    git: GitContext
    head: str | None
    digest: str

    def describe(self, path: str) -> dict[str, Any] | None:
        return describe_file(self.root, path)


class GitContext(Struct):
    """Null and empty where there is no repository."""

    branch: str | None
    recent_commits: list[Commit]
    uncommitted_changes: list[Change]
    remote: str | None
    remote_url: str | None


class Commit(Struct):
    hash: str
    message: str
    author: str
    timestamp: str | None  # null where git can read none
    files_changed: list[str]  # empty where it is not known


class Change(Struct):
    path: str
    status: Literal["modified", "added", "deleted", "renamed", "untracked"]
    diff: str | None  # "+added -removed" lines, null for untracked and binary files


# -- what git says


def read_changes(root: Path, codes: dict[str, str]) -> list[Change]:
    """The uncommitted changes, staged or not, by git's two letters for each name."""
    shape = ("--numstat", "-z", "--relative", "--no-renames", "--no-ext-diff", "--no-textconv", "HEAD", "--", ".")
    rows = (row.split("\t", 2) for row in split_z(run_git(root, "diff", *shape)))
    counts = {name: f"+{plus} -{minus}" for plus, minus, name in rows if plus != "-" and codes.get(name) != "??"}

    def status(code: str) -> Any:
        return "untracked" if "?" in code else "deleted" if "D" in code else "added" if "A" in code else "modified"

    return [Change(clean_text(name), status(code), counts.get(name)) for name, code in codes.items()]


def read_commits(root: Path) -> Iterator[Commit]:
    """The latest commits; none where git fails."""
    separator = secrets.token_hex(8)  # that nobody can have put into a subject or a name
    shape = ("-n10", "-z", "--name-only", "--no-renames", "--relative", "-m", "--first-parent", "--encoding=UTF-8")
    form = f"--pretty=format:{separator}" + separator.join(("%h", "%ct", "%an", "%s"))
    parts = clean_text(os.fsdecode(run_git(root, "log", *shape, form) or b"")).split(separator)[1:]
    for short, moment, author, last in zip(*(parts[at::4] for at in range(4)), strict=True):
        subject, _, names = last.partition("\n")
        when = iso(float(moment)) if re.fullmatch("[0-9]{1,11}", moment) else None  # of a year with four digits
        yield Commit(short, subject.rstrip("\0"), author, when, list(filter(None, names.split("\0"))))


def walk_files(root: Path) -> Iterator[str]:
    """The files of a folder without git, but for those of hidden folders."""
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (Path(place, name).relative_to(root).as_posix() for name in names)


def without_credentials(url: str) -> str:
    """A URL, or scp's form of one, without user info (RFC 3986, 3.2.1; scp's only with a password) and parameters."""
    url = re.sub(r"^((?:[\w+.-]+:)?//+)[^/?#]*@|^[^/@:]*:[^/]*@", lambda match: match[1] or "", url)
    return re.sub(r"[?#].*", "", url, flags=re.DOTALL)


def run_git(folder: Path | str, *arguments: str, **named: Any) -> bytes | None:
    """As ``ask_git``; None where it fails. Blocks."""
    try:
        return ask_git(folder, *arguments, **named)
    except OSError as error:
        log.debug("git %s: %s", arguments[0], error)
        return None


def ask_git(folder: Path | str, *arguments: str, env: dict[str, str] | None = None, listed: bytes = b"") -> bytes:
    """The output of git, which runs nothing the repository names; ``listed`` that of LIST_SETTINGS. Raises GitError."""
    command = ["git", "-C", str(folder), *(word for setting in HARMLESS_GIT for word in ("-c", setting))]
    environ = {name: value for name, value in os.environ.items() if not GIT_ELSEWHERE.match(name)}
    environ |= GIT_ENVIRONMENT | (env or {})
    if arguments[0] not in ("status", "diff"):
        return git_output([*command, *arguments], environ)
    settings = split_z(listed or git_output([*command, *LIST_SETTINGS], environ))
    keys = [(scope, key) for scope, key in zip(settings[::2], settings[1::2], strict=False) if key[:7] == "filter."]
    every = {key.rpartition(".")[0] for _, key in keys}
    theirs = {key.rpartition(".")[0] for scope, key in keys if scope in ("local", "worktree")}
    try:  # the user's own, such as LFS, go on
        return git_output([*command, *without_filters(theirs), *arguments], environ)
    except GitError:
        if theirs == every:
            raise
        output = git_output([*command, *without_filters(every), *arguments], environ)
        log_once(f"git is asked without filters, one of which fails: {', '.join(sorted(it[7:] for it in every))}")
        return output


def without_filters(names: set[str]) -> list[str]:
    """Options by which git runs none of these filters; not by ``-c``, since a filter's name may hold =."""
    off = ("clean=CCO_EMPTY", "smudge=CCO_EMPTY", "process=CCO_EMPTY", "required=CCO_FALSE")
    return [f"--config-env={name}.{setting}" for name in sorted(names) for setting in off]


def git_output(command: list[str], environ: dict[str, str]) -> bytes:
    try:
        child = Git(command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise GitError("git is not installed" if missing else f"git cannot be run: {error.strerror}") from None
    with child:
        try:
            output, errors = child.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            child.kill()
            raise GitError("git took more than 30 seconds") from None
    if child.returncode:
        said = re.search(r"(?ms)^(?:error|fatal): (?:(?!\nusage: ).){,4000}", errors.decode("utf-8", "replace"))
        why = MACHINE_PATH.sub(r"\1\2", said[0] if said else f"it ended by {child.returncode}")
        failed = GitError(f"git: {' '.join(redact(why)[0].split())}"[:500])
        failed.output = output
        raise failed
    return output


class Git(subprocess.Popen[bytes]):
    def wait(self, timeout: float | None = None) -> int:
        return super().wait()  # its output has ended: Popen would look in steps of 1 ms and more


class GitError(OSError):
    """Git failed: why, without paths of this machine."""

    output = b""  # what it had printed by then


LIST_SETTINGS = ("config", "--list", "--show-scope", "--name-only", "-z")
# In the command that git asks its user for, the whole path is needed.
MACHINE_PATH = re.compile(r"(safe\.directory .*)|(?:[A-Za-z]:)?(?<![\w.])[\\/](?:[^'\"\n]*[\\/])?([^\s'\"\\/]+)")
HARMLESS_GIT = (  # what a repository's own configuration could have git run, and what would change its output
    "core.quotepath=off", "core.fsmonitor=false", "core.hooksPath=/dev/null", "core.pager=cat", "diff.external=",
    "log.showSignature=false", "log.showRoot=true", "log.diffMerges=separate", "diff.orderFile=/dev/null",
    "protocol.allow=never",  # a partial clone fetches what it lacks, by a transport that may be any command
    # looking into them would go by their own configurations
    "diff.ignoreSubmodules=dirty", "diff.submodule=short", "status.submoduleSummary=false",
)  # fmt: skip
# What git sets for its helpers leads elsewhere; a user's own settings go on.
GIT_ELSEWHERE = re.compile(r"GIT_(?!(?:CONFIG_(?:GLOBAL|(?:NO)?SYSTEM|COUNT|(?:KEY|VALUE)_\d+)|CEILING_DIRECTORIES)\Z)")
GIT_ENVIRONMENT = {  # without optional locks reading never writes the index
    "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C",
    "CCO_EMPTY": "", "CCO_FALSE": "false",
}  # fmt: skip


def split_z(output: bytes | None) -> list[str]:
    return [os.fsdecode(item) for item in (output or b"").split(b"\0") if item]


# -- reading files: no links, no secrets


def describe_file(root: str, path: str) -> dict[str, Any] | None:
    """What contexts say of a text file, with the secrets in it; None for others. Blocks."""
    if (found := read_text_file(root, path, MB)) is None:
        return None
    content, facts, cut = found
    return {
        "path": clean_text(path), "content": content, "last_modified": iso(facts.st_mtime), "size": facts.st_size,
        "language": language_of(path), "checksum": checksum(content),
    } | ({"truncated": True} if cut else {})  # fmt: skip


def checksum(content: str) -> str:
    return "sha256:" + hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def read_text_file(root: str, path: str, limit: int) -> tuple[str, os.stat_result, bool] | None:
    """(content, facts, whether it was cut) of a text file really in ``root``; None for others, links too. Blocks."""
    full = os.path.join(root, path)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a FIFO must not block
    try:
        with open(full, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            facts, opened = os.fstat(file.fileno()), f"/proc/self/fd/{file.fileno()}"
            # On Linux it is that of the open file itself: nobody can put a link in the way.
            real_path = os.readlink(opened) if os.path.lexists(opened) else os.path.realpath(full)
            if not stat.S_ISREG(facts.st_mode) or not real_path.startswith(root.rstrip("/") + os.sep):
                return None
            # To ask for more than there is takes longer. Some file systems tell no size.
            content = file.read(min(facts.st_size or limit, limit) + 1)
    except (OSError, ValueError):  # gone, a link, or a folder by now
        return None
    if b"\0" in content[:8192]:
        return None
    if cut := len(content) > limit:
        content = content[: content.rfind(b"\n", 0, limit) + 1]
    return content.decode("utf-8", "replace"), facts, cut


@lru_cache(400_000)
def is_secret(path: str) -> bool:
    """Whether a path suggests credentials, that of source text by dot-names."""
    where = f"/{path.lower()}"
    return re.search(SECRET_FILE, re.sub(r"/[^./][^/]*", "/", where) if is_source(path) else where) is not None


SECRET_FILE = (  # compiled when first needed; re keeps it
    r"/\.(?:ssh|gnupg|aws|azure|kube|docker|config|local|m2|gradle|gem|password-store|secrets?|envs?)/|[/._-](?:env"
    r"|envrc|flaskenv|netrc|npmrc|pypirc|yarnrc|pgpass|my\.cnf|htpasswd|htdigest|s3cfg|dockercfg)(?:[\W_\d]|$)"
    r"|/\.\w*hist|[._-](?:pem|key|p12|pfx|jks|keystore|kdbx?|ppk|keytab|ovpn|tfstate|tfvars|asc|gpg|age)(?:[\W_\d]|$)"
    r"|(?:^|[/._-])id_(?:rsa|dsa|ecdsa|ed25519)|credential|secret|passw|passphrase|token|vault|wallet|shadow|kubeconfig"
    r"|(?:service|firebase)[_-]?(?:account|admin)|(?:api|access|private|master|signing|deploy)[_-]?keys?[^/]*$"
)


def redact(content: str) -> tuple[str, int]:
    """``content`` without its secrets, and their number. Lines keep their numbers. Blocks."""
    return redaction().redact(content)


def redaction() -> Redaction:
    return bundled_class(Redaction, "context/_redaction", "MeasuredRedaction")()


class Redaction:
    """Takes what has the form of a secret, or is given to what calls itself one, out of texts."""

    def redact(self, content: str) -> tuple[str, int]:
        number = 0
        for pattern in SECRETS if len(content) >= SHORTEST else ():
            content, found = without_secrets(content, re.compile(pattern))
            number += found
        return content, number

    def redact_json(self, value: Any) -> tuple[Any, int]:
        """The JSON ``value`` without the secrets in its texts, names of fields too, and their number. Blocks."""
        number, field = 0, ""

        def clean(match: re.Match[bytes]) -> bytes:
            nonlocal number, field
            text = msgspec.json.decode(match[1], type=str)
            redacted, found = self.redact(text) if match[2] else self.redact_given(text, field[-80:])
            number, field = number + found, text if match[2] else field
            return msgspec.json.encode(redacted) + match[2]

        return msgspec.json.decode(JSON_TEXT.sub(clean, msgspec.json.encode(value))), number

    def redact_given(self, text: str, name: str) -> tuple[str, int]:
        """``redact`` for a text in a field ``name`` of JSON: as code would give it, where the name tells so."""
        if len(text) >= SHORTEST and SECRET_NAME.search(name):
            redacted, number = self.redact(f'{name} = "{text}"')
            if redacted.endswith(REDACTED + '"'):
                return redacted[:-1].removeprefix(f'{name} = "'), number
        return self.redact(text)


def without_secrets(content: str, pattern: re.Pattern[str], looks_real: Callable[..., bool] = bool) -> tuple[str, int]:
    """``content`` without the matches, or their last groups, that look real, and their number. Blocks."""
    kept, last, begin = [], 0, 0
    for end in range(WINDOW, len(content) + WINDOW, WINDOW):  # one long search would hold up all threads
        while (match := pattern.search(content, begin, end + WINDOW // 2)) and match.start() < end:
            match = pattern.match(content, match.start()) or match  # it may go on
            begin = match.end()
            if looks_real(match):
                first, past = match.span(match.lastindex or 0)
                kept.append(content[last:first] + REDACTED + "\n" * content.count("\n", first, past))
                last = past
        begin = max(begin, end)
    return "".join([*kept, content[last:]]), len(kept)


WINDOW = 64 * 1024  # letters in which a secret begins
SHORTEST = 8  # letters of a text that holds a secret
JSON_TEXT = re.compile(rb'("(?:[^"\\]++|\\.)*+")(:?)')  # names of fields end in a colon
REDACTED = "[REDACTED]"
SECRET_NAME = re.compile(
    r"(?i:secret|token|passw(?:or)?d|passphrase|pwd|credential|authorization|(?:api|access|auth|account)[_-]?key)"
)
SECRETS = (  # possessive, only keys unbounded: no text makes them slow; the secret is the group, if any
    r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[\s\\nr\"',#|+]{0,20}(?:[A-Za-z-]{4,20}: [^\n]{0,200}|[A-Za-z0-9+/=]{16,}+))++"
    r"(?:\s?[\w+/=]{0,15}\s?-{5}END)?",
    r"PuTTY-User-Key-File-\d: (?:(?!PuTTY|Private-MAC)[^\n]{0,200}+\n){1,100}+Private-MAC: \w+",
    r"eyJ(?:(?!eyJ)[\w-]){10,1000}+\.eyJ[\w-]{10,20000}+\.[\w-]{20,}+",
    r"AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|SK[0-9a-f]{32}|:AA[\w-]{33}|(?:slack\.com/services|/webhooks)/[\w/-]{30,}",
    r"(?:gh[pousr]_|github_pat_|gl[a-z]{2,5}-|xox[a-z]-|xapp-|[rs]k[_-]|whsec_|AIza|GOCSPX-|ya29\.|gsk_|xai-|pplx-"
    r"|r8_|hf_|npm_|pypi-|SG\.|do[opr]_v1_|shp[a-z]{2}_|key-|hvs\.|glsa_|dckr_pat_|lin_api_|rubygems_|NRAK-|PMAK-"
    r"|sbp_|sntrys_|tfp_|dapi|pul-|AGE-SECRET-KEY-|\.atlasv1\.|ntn_|figd_|dp\.[ps]t\.)"
    r"(?=[a-z_.-]{0,200}+[0-9A-Z])[\w.+/=-]{20,}+",
    r"://((?!\[)[^\s/:@\"'`<>]{0,100}+:(?!\d+/)(?=[^\s\"'`<>,|\\@]{0,200}+@)[^\s\"'`<>,|\\]{3,200}"
    r"|[\w.~+=-]{20,200}+)@",
    r"(?:(?i:[?&;]sig)|" + SECRET_NAME.pattern + r")[\w\"'`\])]{0,30}+(?:\s{0,4}[:=,]>?\s{0,4}|\s{1,4})[\"'`]?"
    r"(?i:(?:bearer|basic|token|apikey) {1,4})?((?=[A-Za-z+/_.~-]{0,200}+[0-9])[A-Za-z0-9+/_.~%-]{12,2000}+=*)",
)


# -- what hooks get and give


class ContextKey(Struct, frozen=True, kw_only=True):
    """The parameters of a context: requests with equal ones share one."""

    issue_id: str
    agent_type: str
    category: str
    task: str
    max_bytes: int
    max_files: int
    reader: object = None  # as in ContextQuery


class ContextRequest(ContextKey, frozen=True, kw_only=True):
    """What sections are made from."""

    outputs: list[dict[str, Any]]  # earlier results, newest last
    project: ProjectState
    ranked: list[RankedFile]


class RankRequest(Struct, frozen=True, kw_only=True):
    """What files are ranked by; contexts may give ``files`` alone."""

    root: str
    index_folder: str
    files: list[FileFact]
    agent_type: str
    category: str
    task: str
    changed: list[str]
    outputs: list[dict[str, Any]]  # earlier results, newest last
    head: str | None


class RankedFile(Struct, frozen=True, gc=False):
    path: str
    score: float
    reasons: list[str] = []
    chunks: list[tuple[int, float]] = []  # (first line, score) of its best 50 lines each
    matched: bool = True  # a word of the task occurs


class FileFact(Struct, frozen=True, gc=False):
    """A file: relative path with slashes, bytes, and mtime in nanoseconds."""

    path: str
    size: int
    mtime_ns: int


# ==== Agents: real processes, in the ledger before they start and until nothing of them is left ====


class Agents:
    """Spawns, watches, adopts and ends agents.

    An agent's states, each on disk before what comes of it goes on::

        starting -> running -> completed | failed   it ended by itself, with exit code 0 or another
            |          |-----> killed | timeout     it was ended, by an order or by its time limit
            |          '-----> lost                 it ended, and nobody can know how
            '-> failed                              it never got a process
    """

    def __init__(self, storage: Storage, launcher: Launcher, results: Results) -> None:
        self.storage, self.launcher, self.results = storage, launcher, results
        self.tokens, self.hooks, self.settings = launcher.tokens, launcher.hooks, launcher.settings
        self._folder = self.settings.storage / "agents"
        self.disk = Pool("agents", 8, 20)
        self.processes = self.hooks.part(Processes, self.settings)(self.settings)
        self.active: dict[str, Running] = {}
        self._stopping = False

    async def spawn(self, claims: Claims, body: dict[str, Any]) -> dict[str, Any]:
        """Start an agent, also where the caller hangs up; of one that fails or is cancelled its row alone is left.
        Raises AGT_001, also where there is no context, AGT_002, AGT_003, StorageError.
        """
        await self.launcher.types.find(body["agent_type"])
        if self._stopping:
            raise ApiError("AGT_001", "The service is stopping")
        if (number := self.count()) >= self.settings.max_agents:
            raise ApiError("AGT_003", f"{number} already running, --max-agents allows no more", retry_after=5)
        row, asked = self.launcher.row(claims, body), body.get("environment") or {}
        # It counts from here on: a thousand cannot pass the limit.
        running = self.active[row["id"]] = Running(row, self._folder / row["id"], task=asyncio.current_task())
        try:
            files = await self.launcher.files(running, body)
            answer = await self.storage.write(partial(self.admit, row), answers=True)
            running.token = self.launcher.token(row)
            command = await self.launcher.command(running, files, asked)
            await self.processes.start(running, command)
            await self.begin_watch(running)
        except BaseException as error:
            raise await self._give_up(running, error) from None
        log.info("agent %s started, pid %d", row["id"], row["pid"])
        ignored = sorted(name for name in asked if command.environment.get(name) != asked[name])
        facts = {"process_id": row["pid"], "jwt_token": running.token, "environment_ignored": ignored}
        return {**answer, **facts, "state": row["state"]}

    def count(self) -> int:
        return sum(not running.row.get("ended") for running in self.active.values())

    def admit(self, row: dict[str, Any], records: Records) -> dict[str, Any]:
        """A job: store an agent's row; what is known of the answer. Plugins that raise AGT_003 keep it out."""
        records.insert_agent(row)
        return {
            "agent_id": row["id"], "spawned": True, "context_injected": True, "timestamp": iso(),
            "webhook_url": f"/api/agents/{row['id']}/status",
        }  # fmt: skip

    async def begin_watch(self, running: Running) -> None:
        """Note that an agent runs, and watch it."""
        running.row["state"] = "running"
        id, pid, birth = (running.row[name] for name in ("id", "pid", "birth"))

        def job(records: Records) -> None:
            records.update_agent(id, state="running", pid=pid)
            records.add_outcome(id, birth=birth)

        await self.storage.write(job)
        running.task = asyncio.create_task(self._watch(running))

    async def _give_up(self, running: Running, error: BaseException) -> BaseException:
        """Leave nothing but its row of a spawn that failed; the error for its caller."""
        self.tokens.revoked.add(running.row["id"])
        running.ending.set()
        if running.row["pid"]:
            running.grace = 0.0
            await self._insist(self.processes.end, running)
        if isinstance(error, OSError):
            what = f"{Path(str(error.filename)).name}: " if error.filename else ""
            error = ApiError("AGT_001", f"Agent spawn failed: {what}{error.strerror or 'no answer in time'}")
        elif isinstance(error, ApiError) and error.code[:3] == "CTX":
            error = ApiError("AGT_001", f"Agent spawn failed: its context could not be built: {error.message}")
        reason = getattr(error, "message", None)
        running.row |= {"state": "failed", "ended": time.time(), "pid": None, "reason": reason}
        with suppress(StorageError):  # the caller is told what failed first
            await self.storage.write(partial(end_agent, running.row, []))
        self.active.pop(running.row["id"], None)
        with suppress(TimeoutError):
            await self.disk.run(shutil.rmtree, running.folder, ignore_errors=True)
        return error

    async def _watch(self, running: Running) -> None:
        for step in (self._wait, self.processes.end, self._record):
            await self._insist(step, running)

    async def _insist(self, step: Callable[[Running], Awaitable[None]], running: Running) -> None:
        """Take a step towards an agent's end, again where it fails."""
        while True:
            try:
                return await step(running)
            except Exception as error:  # a boundary: nobody else watches it
                problem = f"{step.__name__.strip('_')} is tried again: {type(error).__name__}: {one_line(error)}"
                expected = isinstance(error, (StorageError, OSError))
                log_once(f"agent {running.row['id']}: {problem}", exc_info=not expected)
                await asyncio.sleep(1)

    async def _wait(self, running: Running) -> None:
        """Until its end has begun."""
        while not running.ending.is_set():
            self.processes.look(running)
            if (left := running.began + running.row["time_limit"] - time.monotonic()) < 0:
                running.end("timeout")
            await self.tend(running)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(self.processes.LOOK, left)):
                    await running.ending.wait()

    async def tend(self, running: Running) -> None:
        """Called repeatedly while an agent runs."""

    async def _record(self, running: Running) -> None:
        row, now = running.row, time.time()
        row["ended"] = running.ended = min(max(running.ended or now, row["started"]), now)
        self.tokens.revoked.add(row["id"])
        await self.judge(running)
        told = {"publisher": row["id"], "topic": "coordination", "data": self.last_word(row)}
        names = ["agent_exited", "agent_failed"][: 2 if row["state"] in FAILED_STATES else 1]
        events = [new_event(row["project"], name, told) for name in names]
        await self.storage.write(partial(end_agent, row, events))
        self.active.pop(row["id"], None)
        self.hooks.tell("agent_ended", agent=told["data"])
        log.info("agent %s ended: %s, exit code %s", row["id"], row["state"], row["exit_code"])

    async def judge(self, running: Running) -> None:
        """Set in the row how an agent ended. Called again after a crash."""
        code = running.exit_code
        by_itself: AgentState = "lost" if code is None else "failed" if code else "completed"
        died = -code if code and code < 0 else None
        running.row |= {"state": running.ended_as or by_itself, "exit_code": code, "signal": died}

    async def start(self) -> None:
        """Adopt the agents of an earlier run; record the end of those that are gone."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        rows = self.storage.read.unfinished_agents(self.settings.project)
        # Before the first await: requests are answered from then on.
        self.active.update((row["id"], Running(row, self._folder / row["id"])) for row in rows)
        for row in rows:
            running = self.active[row["id"]]
            await self.processes.adopt(running)
            log.info("agent %s %s, pid %s", row["id"], "is gone" if running.exited else "adopted", row["pid"])
            await self.begin_watch(running)

    def close(self, *, end_all: bool) -> None:
        """Start no more agents; with ``end_all`` end all, half started ones too."""
        self._stopping = True
        for running in self.active.values() if end_all else ():
            running.end("killed")

    async def stop(self) -> None:
        """Wait for those that are ending; leave the others to the next start."""
        for running in self.active.values():
            running.grace = min(running.grace, 2.0)
        deadline = time.monotonic() + 10.0  # a look at many processes takes seconds
        while any(running.ending.is_set() for running in self.active.values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        tasks = [running.task for running in self.active.values() if running.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def find(self, project: str, agent_id: str) -> dict[str, Any]:
        """An agent's row; raises REQ_002."""
        if row := self.storage.read.agent(project, agent_id):
            return row
        raise ApiError("REQ_002", f"No agent {agent_id}")

    def describe(self, row: dict[str, Any]) -> dict[str, Any]:
        """An agent as readers get it. Blocks. ``last_word``, of its own: as the events of its end have it."""
        return agent_facts(row)

    last_word = describe


def end_agent(row: dict[str, Any], events: list[NewEvent], records: Records) -> None:
    """A job: record an agent's end, its events and the end of its token, where it is in the ledger."""
    if records.agent(row["project"], row["id"]):
        names = ("state", "ended", "exit_code", "signal", "pid")
        records.update_agent(row["id"], **{name: row[name] for name in names})
        records.add_outcome(row["id"], reason=row["reason"])
        records.revoke(row["project"], row["id"])
        for event in events:
            records.insert_event(event)


def agent_statistics(read: Records, project: str) -> dict[str, Any]:
    by_state, by_type = dict(read.count_agents(project)), dict(read.count_active_types(project))
    return {
        "active": sum(by_type.values()), "completed": by_state.get("completed", 0),
        "failed": sum(by_state.get(state, 0) for state in FAILED_STATES),
        "killed": by_state.get("killed", 0), "spawned_total": sum(by_state.values()), "by_type": by_type,
        "avg_execution_time_ms": round(read.mean_agent_seconds(project) * 1000, 3),
    }  # fmt: skip


def agent_facts(row: dict[str, Any]) -> dict[str, Any]:
    """What answers about an agent and events of its end share."""
    return {
        "agent_id": row["id"], "agent_type": row["type"], "issue_id": row["issue"], "started_at": iso(row["started"]),
        "ended_at": row["ended"] and iso(row["ended"]),
    } | {name: row[name] for name in ("state", "exit_code", "signal", "pid", "reason")}  # fmt: skip


class Launcher:
    """Makes what an agent is started with."""

    HOW_TO_HAVE_ONE = "start with --agent-command 'your-agent {prompt}'"

    def __init__(self, contexts: Contexts, tokens: Tokens, types: AgentTypes, hooks: Hooks, settings: Settings) -> None:
        self.contexts, self.tokens, self.types, self.hooks, self.settings = contexts, tokens, types, hooks, settings
        self._pool, self.url = Pool("launch", 8, 30), ""
        self.inherited = {name: os.environ[name] for name in os.environ if not name.startswith("CCO_SIDECAR_")}

    def row(self, claims: Claims, body: dict[str, Any]) -> dict[str, Any]:
        """The row of an agent that may no more than its type, than was asked for, than its spawner."""
        category = CATEGORIES[self.types.categories[body["agent_type"]]]
        asked, own = body.get("permissions"), set(claims.permissions)
        own |= {WRITE} if CATEGORIES[self.types.categories[claims.agent_type]].people else set()
        may = [name for name in category.permissions if name in own and (asked is None or name in asked)]
        nothing_yet = dict.fromkeys("pid birth ended exit_code signal reason".split())
        return nothing_yet | {
            "id": f"{body['agent_type'][:80]}-{secrets.token_hex(6)}", "project": self.settings.project,
            "type": body["agent_type"], "issue": body["issue_id"], "task": body.get("task", ""), "parent": claims.sub,
            "state": "starting", "started": time.time(), "time_limit": self.settings.agent_timeout, "permissions": may,
            "only_issue": body["issue_id"] if body.get("issue_only") else claims.issue_id, "depth": 1,
        }  # fmt: skip

    def token(self, row: dict[str, Any], ttl: int = 0) -> str:
        """A token with what the row grants, for as long as the agent may run."""
        granted = {"permissions": row["permissions"], "issue_id": row["only_issue"], "bound": True}
        return self.tokens.mint(row["id"], row["type"], ttl=ttl or int(row["time_limit"]) + 60, **granted)

    async def files(self, running: Running, body: dict[str, Any]) -> dict[str, bytes]:
        """What an agent is to read, by name. Raises as ``Contexts.get``."""
        query = ContextQuery(task=body.get("task", ""), max_tokens=body.get("context_tokens") or 50_000)
        content, _ = await self.contexts.get(body["issue_id"], body["agent_type"], query)
        return {"context.json": content}

    def launch(self, running: Running, files: Collection[str]) -> AgentLaunch:
        """What an agent with the ``files`` is told."""
        row, context = running.row, str(running.folder / "context.json")
        return AgentLaunch(
            agent_id=row["id"], agent_type=row["type"], issue_id=row["issue"], task=row["task"], context_file=context,
            agent_folder=str(running.folder), configured=self.settings.command_of(row["type"]),
            prompt=f"{row['task']}\n\nRead your context first: {context}\n",
        )  # fmt: skip

    def may_set(self, variable: str) -> bool:
        """Whether a request may set ``variable``, given in capitals: alone, what steers no program."""
        own = r"(APP|FEATURE|TESTS?|VITE|NEXT_PUBLIC|REACT_APP)_.*|(?!CCO_).*_(VERSION|TOKEN|KEY)|API_BASE_URL"
        return re.fullmatch(own, variable) is not None

    async def command(self, running: Running, files: dict[str, bytes], asked: dict[str, str]) -> AgentCommand:
        """Write the files; the command, whose environment ``asked`` adds to. Raises AGT_001, OSError."""
        row, root, launch = running.row, str(self.settings.root), self.launch(running, files)
        texts = {"prompt": launch.prompt, "task": launch.task, "token": running.token}
        files = files | {name: text.encode() for name, text in texts.items()}
        own = {
            "AGENT_ID": row["id"], "AGENT_TYPE": row["type"], "ISSUE_ID": row["issue"], "PROJECT_ID": row["project"],
            "PROJECT_ROOT": root, "PWD": root, "SIDECAR_URL": self.url, "JWT_TOKEN": running.token, "TASK": row["task"],
            "CCO_TOKEN_FILE": str(running.folder / "token"), "CCO_CONTEXT_FILE": launch.context_file,
        }  # fmt: skip
        command = await self._pool.run(self._prepare, launch, files)
        given = {name: asked[name] for name in asked if name.upper() not in own and self.may_set(name.upper())}
        return msgspec.structs.replace(command, environment=self.inherited | command.environment | given | own)

    def _prepare(self, launch: AgentLaunch, files: dict[str, bytes]) -> AgentCommand:
        """The command, with the fields of ``launch`` for its placeholders. Blocks."""
        folder = Path(launch.agent_folder)
        for made in (folder.parent, folder):  # the storage itself may have been moved
            made.mkdir(mode=0o700, exist_ok=True)
        for name, content in files.items():
            write_file(folder / name, content)
        found = self.hooks.first("agent_command", launch=launch, settings=self.settings) or launch.configured
        if found is None:
            raise ApiError("AGT_001", f"No agent command: {self.HOW_TO_HAVE_ONE}")
        command = found if isinstance(found, AgentCommand) else AgentCommand(found)
        values = {name: value for name, value in msgspec.structs.asdict(launch).items() if isinstance(value, str)}
        fill = partial(re.compile(r"\{(\w+)\}").sub, lambda match: values.get(match[1], match[0]))
        environment = {name: fill(value) for name, value in command.environment.items()}
        return AgentCommand([*map(fill, command.argv)], fill(command.stdin), environment)


class Processes:
    """Starts, adopts and ends agents' processes, which outlive a crash of the service; exit codes do not.

    An agent's are those of its session while the first one lives, those whose environment names its token file, and
    their descendants.
    """

    LOOK = 0.1  # seconds between two looks
    OUTPUT = "output.log"

    def __init__(self, settings: Settings) -> None:
        self._root, self._pool = settings.root, Pool("processes", 8, 20)

    async def start(self, running: Running, command: AgentCommand) -> None:
        """Start a process; its pid and birth go into the row. Raises OSError, leaving nothing."""

        def popen() -> None:
            path, private = running.folder / self.OUTPUT, partial(os.open, mode=0o600)
            with open(path, "ab", opener=private) as output, open(command.stdin or os.devnull) as source:
                child = running.child = subprocess.Popen(
                    command.argv, env=command.environment, cwd=self._root, stdin=source, stdout=output, stderr=output,
                    start_new_session=True,
                )  # fmt: skip
            running.row |= {"pid": child.pid, "birth": birth_of(child.pid)}
            if running.ending.is_set():  # who waited has given up, maybe before there was a pid
                child.kill()

        await self._pool.run(popen)

    async def adopt(self, running: Running) -> None:
        """Go on with an agent of an earlier run, or see that it has ended."""
        running.began -= max(0.0, time.time() - running.row["started"])
        self.look(running)

    def look(self, running: Running) -> None:
        """See whether the first process has ended."""
        row, child = running.row, running.child
        lives = child.poll() is None if child else row["birth"] is not None and birth_of(row["pid"]) == row["birth"]
        if not running.exited and not lives:
            running.exit(child.returncode if child else None, time.time())

    async def end(self, running: Running) -> None:
        """SIGTERM to all, SIGKILL after the grace, which may become less; until none is found."""
        began, asked = time.monotonic(), set[Any]()
        while True:
            self.look(running)
            try:
                members = await self.members(running)
            except TimeoutError:  # the look hangs in the system
                log.error("agent %s: its processes cannot be looked at", running.row["id"])
                await asyncio.sleep(1)
                continue
            if not members and running.exited:
                return
            passed = time.monotonic() - began
            force = passed >= running.grace
            for member in members if force else members - asked:
                with suppress(psutil.Error, OSError):  # it has just ended
                    member.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM) if force else signal.SIGTERM)
            asked |= members
            await asyncio.sleep(0.02 if passed < 1 else 0.1)

    async def members(self, running: Running) -> set[Any]:
        """The living processes: each has a ``send_signal`` that reaches no other. Raises TimeoutError."""
        return await self._pool.run(self._find, running)

    def _find(self, running: Running) -> set[Any]:
        first, marker = None if running.exited else running.row["pid"], str(running.folder / "token")
        session_of = getattr(os, "getsid", int)  # Windows has no sessions
        found = set[psutil.Process]()
        for item in psutil.process_iter():
            with suppress(psutil.Error, OSError):  # it has just ended, or is another user's
                if (first and session_of(item.pid) == first) or item.environ().get("CCO_TOKEN_FILE") == marker:
                    found |= {item, *item.children(recursive=True)}
        return found


class Running:
    """An agent that has not ended, and what is known of its first process."""

    token = ""
    child: subprocess.Popen[bytes] | None = None  # where we started it
    grace = 5.0  # seconds between SIGTERM and SIGKILL
    ended_as: AgentState | None = None  # set where it does not end by itself
    exited = False  # its first process has ended
    exit_code: int | None = None  # below 0: the signal that ended it
    ended: float | None = None

    def __init__(self, row: dict[str, Any], folder: Path, task: asyncio.Task[Any] | None = None) -> None:
        self.row, self.folder, self.began = row, folder, time.monotonic()
        self.task = task  # that spawns it, then the one that watches it
        self.ending = asyncio.Event()  # set where its end has begun

    def end(self, how: AgentState) -> None:
        """Have it ended, unless it has just ended by itself."""
        if not self.exited:
            self.ended_as = self.ended_as or how
        self.ending.set()

    def exit(self, code: int | None = None, moment: float | None = None) -> None:
        """Its first process has ended; None is what is not known."""
        self.exited, self.exit_code, self.ended = True, code, moment
        self.ending.set()


def birth_of(pid: int) -> str | None:
    """What tells a living process from others with its pid, None where there is none. Blocks."""
    with suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if sys.platform != "linux":
            return f"{process.create_time():.2f}"
        # Linux counts births from the boot, which does not depend on the clock.
        boot, facts = (Path(f"/proc/{name}").read_bytes() for name in ("sys/kernel/random/boot_id", f"{pid}/stat"))
        return f"{boot.decode().strip()}/{facts.rpartition(b') ')[2].split()[19].decode()}"
    return None


class AgentLaunch(Struct, frozen=True, kw_only=True):
    """An agent that is to be started."""

    agent_id: str
    agent_type: str
    issue_id: str
    task: str
    context_file: str
    agent_folder: str
    prompt: str
    brief_file: str = ""  # by a plugin
    configured: tuple[str, ...] | None = None  # its type's command by the settings


class AgentCommand(Struct):
    """A command that runs an agent, with placeholders such as ``{prompt}``."""

    argv: Argv
    stdin: Text = ""  # a file
    environment: Environment = {}


Argv = Annotated[Sequence[Text], Meta(min_length=1)]


# ==== Built-in plugins: the reference's own behaviour, as hook implementations like anybody's ====


class ReferenceRules:
    SEARCHED_BYTES = 16 * MB  # of a file, which git reads whole for each word

    @hookimpl
    def register_agent_types(self) -> dict[str, str]:
        return {name: category for category, names in AGENT_TYPES.items() for name in names.split()}

    @hookimpl(trylast=True)
    def context_section(self, request: ContextRequest) -> Sections:
        project = request.project
        names = tuple(file.path for file in project.files)
        size, kind = sum(file.size for file in project.files), self.project_type(Path(project.root), names)
        unknown = ("python_version", "test_coverage", "last_build_status", "last_build_time", "security_scan_status")
        matched = any(item.matched for item in request.ranked) if request.task else None
        return {
            "project_structure": {"root": clean_text(project.root), **list_names(names), "total_size_bytes": size},
            "relevant_files": choose_files(request),
            "git_context": project.git,
            "previous_agent_outputs": request.outputs,
            "metadata": {
                "project_type": kind, "dependencies": [], "dependency_versions": {}, **dict.fromkeys(unknown),
                "index": "ready", "task_matched": matched,
            },
        }  # fmt: skip

    def project_type(self, root: Path, names: tuple[str, ...]) -> str:
        return main_language(names)

    @hookimpl(trylast=True)
    def rank_files(self, request: RankRequest) -> list[RankedFile]:
        """By the task's words in path and text, the rare ones more, and by the agent's kind of file."""
        of_kind = KIND_WEIGHTS | {OWN_KINDS.get(request.category, "source"): 1.0}
        newest_first = sorted(request.files, key=lambda file: -file.mtime_ns)
        weights = {file.path: of_kind[kind_of(file.path)] for file in newest_first}
        words = dict.fromkeys(re.findall(r"[^\W_]{2,}", request.task.lower()))
        holding: dict[str, set[str]] = {}
        large = [f":(exclude,literal){file.path}" for file in request.files if file.size > self.SEARCHED_BYTES]
        for word in [word for word in words if word not in STOP_WORDS][:16]:  # git looks into all files for each
            shape = ("-lziIF", "--untracked", "--no-recurse-submodules", "--no-full-name", "--no-color", "-e", word)
            having = set(split_z(run_git(request.root, "grep", *shape, "--", ".", *large, env={"LC_ALL": "C.UTF-8"})))
            holding[f"matches {word}"] = {path for path in weights if path in having or word in path.lower()}
        holding["named in the task"] = {path for path in weights if path in request.task}
        matched = set[str]().union(*holding.values())
        touched = (output.get("files_affected", []) for output in request.outputs)
        holding["changed by an earlier agent"] = set(chain.from_iterable(touched))
        holding["uncommitted change"] = set(request.changed)
        shares = {why: math.log(1 + len(weights) / len(paths)) for why, paths in holding.items() if paths}
        ranked = []
        for path, weight in weights.items():
            why = sorted((why for why in shares if path in holding[why]), key=lambda why: -shares[why])
            score, reasons = sum(shares[each] for each in why), why[:4] or [f"{kind_of(path)} of the project"]
            ranked.append(RankedFile(path, weight * (0.1 + score), reasons, [], path in matched))
        return sorted(ranked, key=lambda item: -item.score)

    @hookimpl(tryfirst=True)
    def next_agents(
        self, result: ResultFact, proposals: list[NextAgent], history: list[ResultFact], language: str
    ) -> list[NextAgent]:
        """By PROPOSALS, without who has succeeded since the last code change."""
        work = "architecture" if result.category == "architect" else result.category
        rule = f"{work}-{'success' if result.status == 'success' else 'failure'}"
        newest_first = (result, *reversed(history))
        since = takewhile(lambda fact: fact.category != "coding" or fact.status == "failed", newest_first)
        passed = {fact.agent_type for fact in since if fact.status == "success"}
        coder = f"{language}-specialist" if language in SPECIALISTS else "fullstack-developer"
        last_coder = next((fact.agent_type for fact in reversed(history) if fact.category == "coding"), coder)
        names = {"the coder": coder, "the last coder": last_coder, "the same type": result.agent_type}
        found = [
            NextAgent(names.get(who, who), "medium" if result.status == "partial" else priority, f"{rule}: {why}")
            for after, who, priority, why in PROPOSALS
            if after == rule
        ]
        return [*proposals, *(item for item in found if item.agent_type not in passed)]


@lru_cache(2)  # an edit changes no name
def list_names(names: tuple[str, ...]) -> dict[str, Any]:
    shown = tuple(map(clean_text, names))
    nearest = {name.rpartition("/")[0] for name in shown} - {""}
    folders = {above for path in nearest for above in accumulate(path.split("/"), "{}/{}".format)}
    return {"files": shown, "directories": tuple(sorted(folders)), "total_files": len(shown)}


def choose_files(request: ContextRequest) -> list[dict[str, Any]]:
    """The text files worth reading, best first, some more than can be given. Blocks."""
    chosen: list[dict[str, Any]] = []
    left = 1.25 * request.max_bytes  # some may find no room
    for item in request.ranked:
        if len(chosen) > request.max_files or left <= 0:  # one too many shows that there are more
            break
        if (file := request.project.describe(item.path)) is None:
            continue
        left -= min(len(file["content"]), request.max_bytes / 8)
        chosen.append(file | {"score": round(item.score, 4), "reasons": list(map(clean_text, item.reasons))})
    return chosen


@lru_cache(2)
def main_language(names: tuple[str, ...]) -> str:
    """The language of most source files, else "unknown"."""
    code = [name for name in names if kind_of(name) == "source" and name[-2:] != ".h"]  # .h is C++ too
    return Counter(map(language_of, code)).most_common(1)[0][0] if code else "unknown"


# -- languages and kinds of files


@lru_cache(400_000)
def language_of(path: str) -> str:
    name = re.sub(r"\.(erb|eex|heex|tmpl|tpl|j2|in)$", "", path.rpartition("/")[2].lower())  # show.html.erb is HTML
    return LANGUAGES.get(name) or LANGUAGES.get(os.path.splitext(name)[1]) or "unknown"


def is_source(path: str) -> bool:
    """Of a programming language, by an ending that no data have."""
    return language_of(path) not in MAY_HOLD_SECRETS and not re.search(r"\.([dfmstv]|el|mm|nix)$", path.lower())


@lru_cache(400_000)
def kind_of(path: str) -> str:
    """source, test, docs, config or other (vendored and minified files too), by the path alone."""
    path, language = path.lower(), language_of(path)
    if language == "unknown" or FOREIGN_FILE.search(path):
        return "other"
    if language in PROSE or language in DATA:
        return "docs" if language in PROSE else "config"
    if TEST_FILE.search(path):
        return "test"
    return "docs" if path.startswith(("doc/", "docs/")) else "source"


# A group's first word is the language; with a dot a word is an ending, with "file" a whole name.
ENDINGS = """\
javascript .js .jsx .mjs .cjs; rust .rs; python .py .pyi .pyx; .go; .java; typescript .ts .tsx .mts .cts
kotlin .kt .kts; csharp .cs; .swift; .cpp .cc .cxx .hpp .hh .hxx .inl .cu; .php; .c .h; ruby .rb .rake
elixir .ex .exs; .scala; .nim; erlang .erl .hrl; perl .pl .pm .t; clojure .clj .cljs .cljc; haskell .hs; .lua
julia .jl; .dart; .sql; .r .rmd; .zig; powershell .ps1 .psm1 .psd1; shell .sh .bash .zsh .fish .bats
.html .htm .cshtml .razor .haml .jsp .hbs; cobol .cob .cbl .cpy; fortran .f .f90 .f95 .fypp; ada .adb .ads
pascal .pas; assembly .asm .s; .elm; .d; objectivec .m .mm; verilog .v .sv; .vhdl .vhd; ocaml .ml .mli
lisp .el .lisp .scm .rkt; crystal .cr; .groovy; .tcl; fsharp .fs; solidity .sol; gdscript .gd
.glsl .vert .frag .gdshader; .nix; starlark .bzl; .astro; latex .tex; .vue; .svelte; .rst; .markdown .md .mdx
asciidoc .adoc .asciidoc; text .txt; .css .scss .sass .less; .graphql .gql; protobuf .proto; .toml; .json; .yaml .yml
.xml .xaml; .ini .cfg .conf .properties; makefile; dockerfile; terraform .tf"""
LANGUAGES = {
    name: one.split()[0].lstrip(".") for one in re.split("[;\n]", ENDINGS) for name in re.findall(r"\.\w+|\w+file", one)
}
PROSE = frozenset({"markdown", "rst", "asciidoc", "text"})
DATA = frozenset({"yaml", "toml", "json", "xml", "ini", "dockerfile", "makefile", "text"})
MAY_HOLD_SECRETS = DATA | {"unknown", "shell", "powershell"}
SPECIALISTS = frozenset(  # the languages that have one
    """python rust go javascript typescript java kotlin scala csharp cpp c swift ruby php perl elixir erlang haskell
    clojure lua r julia dart shell powershell sql vue svelte graphql terraform""".split()
)
AGENT_TYPES = {  # the plugin specialists has eighty more
    "architect": "chief-architect",
    "coding": "".join(f"{language}-specialist " for language in SPECIALISTS)
    + "frontend-developer backend-developer fullstack-developer",
    "qa": "test-engineer qa-engineer performance-engineer",
    "security": "security-auditor",
    "documentation": "documentation-expert technical-writer",
    "support": "technical-researcher code-reviewer issue-triager",
}
FOREIGN_FILE = re.compile(r"(^|/)(vendor|node_modules|third_party)/|\.min\.(js|css)$|-lock\.(json|yaml)$")
TEST_FILE = re.compile(
    r"(^|/)(tests?|testing|specs?|__tests__|e2e|testdata|fixtures)/|(^|[/._-])(tests?|spec|conftest)[._-][^/]*$"
)

KIND_WEIGHTS = {"source": 0.7, "test": 0.6, "config": 0.2, "docs": 0.1, "other": 0.05}
OWN_KINDS = {"qa": "test", "documentation": "docs", "support": "docs"}  # of a category's agents, "source" of the others
STOP_WORDS = frozenset(
    "a add an and are as be by do fix for from how if in is it not of on or should the this to use we when with".split()
)

PROPOSALS: tuple[tuple[str, str, Priority, str], ...] = (  # who is next after a category's outcome, and why
    ("architecture-success", "the coder", "high", "implementation of what was designed"),
    ("architecture-success", "test-engineer", "medium", "tests for what was designed"),
    ("coding-success", "test-engineer", "high", "validation of the implementation"),
    ("coding-success", "security-auditor", "medium", "security review of the change"),
    ("coding-failure", "the same type", "high", "another attempt"),
    ("qa-success", "documentation-expert", "low", "documentation of what was validated"),
    ("qa-success", "security-auditor", "medium", "security review that has not passed yet"),
    ("qa-failure", "the last coder", "high", "repair of what the tests found"),
    ("security-success", "documentation-expert", "low", "documentation of what was reviewed"),
    ("security-failure", "the last coder", "high", "repair of what the review found"),
)


# ==== Command line: the commands that need no plugin ====

GOOD, REFUSED, WRONG_USE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    words = [os.fsencode(word).decode("utf-8", "surrogateescape") for word in given]  # in any locale
    return bundled_class(Program, "_program", "WholeProgram")().run(words)


class Program:
    def run(self, words: list[str]) -> int:
        try:
            options = self.parse(words)
            return int(options.run(options))
        except SystemExit:  # --help and --version
            return GOOD
        except (StartError, OSError) as error:
            complain(str(error))
            return error.exit_code if isinstance(error, StartError) else REFUSED
        except KeyboardInterrupt:
            return 130

    def parse(self, words: list[str]) -> argparse.Namespace:
        parser = CommandParser(prog=own_command(), parents=[option_parser()], allow_abbrev=False)
        parser.usage = "%(prog)s [serve | token --type TYPE] [OPTIONS]"
        parser.description = "Serves a repository to agents, or prints a token."
        parser.epilog = "Exit codes: 0 good, 1 refused, 2 wrong use."
        parser.add_argument("--version", action="version", version=f"cco {__version__}")
        parser.add_argument("--type", help="a token's agent type, such as python-specialist")
        options, rest = parser.parse_known_args(words)
        command = rest.pop(0) if rest[:1] in (["serve"], ["token"]) else "serve"
        if command == "serve" and options.type is not None:
            rest.append("--type")
        if rest:
            raise StartError(f"{rest[0]}: no such command or option, see --help; {ABSENT}", WRONG_USE)
        if command == "token" and options.type is None:
            parser.error("token needs --type")
        for name in sorted(os.environ):
            option = name.removeprefix("CCO_SIDECAR_")
            if option != name and option.lower() not in option_table():  # perhaps a plugin's
                raise StartError(f"{name}: no such option; {ABSENT}")
        options.run = command_token if command == "token" else command_serve
        return options


def own_command(*flags: str) -> str:
    program = ["uv", "run"] if "UV" in os.environ else [sys.executable]
    return clean_text(shlex.join([*program, *sys.argv[:1], *flags]))


class CommandParser(argparse.ArgumentParser):
    """Wrong use is one line and exit code 2."""

    def error(self, message: str) -> typing.NoReturn:
        raise StartError(f"{message.removeprefix('argument ')} (see {self.prog} --help)", WRONG_USE)


def option_parser() -> CommandParser:
    """The flags of the settings; what was not given is left out."""
    parser = CommandParser(prog="cco", add_help=False, allow_abbrev=False)
    for name, option in option_table().items():
        default, many = option.default, option.read in (read_list, read_paths)
        told = f" (default: {default})" if isinstance(default, (str, int)) and default is not False else ""
        text = f"{option.help}{', may be repeated' * many}{told}".replace("%", "%%")
        kind: dict[str, Any] = {"metavar": option.metavar, "action": "append" if many else "store"}
        if option.read is read_bool:
            kind = {"action": "store_const", "const": True}
        parser.add_argument(flag_of(name), dest=name, default=argparse.SUPPRESS, help=text, **kind)
    return parser


def complain(message: str) -> None:
    with suppress(OSError):  # nobody can be told
        print(f"cco: {harmless(message)}", file=sys.stderr)


def harmless(text: str) -> str:
    """``text`` without what steers a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", clean_text(text))


# -- serving


def command_serve(options: argparse.Namespace) -> typing.NoReturn:
    settings = settings_from(options)
    set_up_logging(settings)
    hooks = load_hooks(settings, strict=True)
    sys.setswitchinterval(0.001)  # worker threads make way for the loop after 1 ms instead of 5
    sidecar = Sidecar(settings, hooks)
    with asyncio.Runner(loop_factory=sidecar.server_class.new_loop) as runner:
        runner.run(serve(sidecar))
    wait([in_thread("log", logging.shutdown), in_thread("output", lambda: sys.stdout.flush())], 1)
    os._exit(GOOD)  # the interpreter's own end waits for a stream that a thread holds, or aborts


def settings_from(options: argparse.Namespace) -> Settings:
    return load_settings({name: value for name, value in vars(options).items() if name in option_table()})


def set_up_logging(settings: Settings) -> None:
    shape, level = "%(asctime)s %(levelname)s %(message)s", settings.log_level.upper()
    logging.basicConfig(level=level, format=shape, handlers=[settings.log_handler()], force=True)
    for name in ("tornado", "asyncio", "watchdog"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.root.level))


async def serve(sidecar: Sidecar) -> None:
    """Run until a signal; a second one ends the process at once."""
    stopped = asyncio.Event()

    def on_signal(number: int) -> None:
        if stopped.is_set():
            os._exit(128 + number)
        log.info("stopping on %s", signal.Signals(number).name)
        stopped.set()

    hangup = () if sys.platform == "win32" or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    for number in (signal.SIGINT, signal.SIGTERM, *hangup):  # a closed terminal too, but not under nohup
        try:
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda number, _: on_signal(number))
    async with sidecar:
        try:
            print(banner(sidecar), flush=True)
        except (OSError, UnicodeError) as error:
            log.warning("the banner cannot be printed: %s", one_line(error))
        await stopped.wait()


def banner(sidecar: Sidecar) -> str:
    return "\n".join([
        f"Orchestration sidecar {__version__}",
        f"  URL:      {sidecar.info.url}  {sidecar.server_class.protocols}",
        f"  Project:  {sidecar.info.project_id}",
        f"  Root:     {sidecar.info.root}",
        f"  Storage:  {sidecar.storage.place}",
        *sidecar.hooks.banner_lines(sidecar.settings),
        "  Stop:     Ctrl-C",
    ])  # fmt: skip


ALONE = (
    "no TLS, audit log, HTTP/2, compression, repeats, file index, dependencies, briefs, known coding programs, budgets,"
    " orders to end agents, exit codes after crashes, lists, plugins but --plugins, MCP, dashboard and client commands"
)
ABSENT = f"is plugins/ beside {Path(__file__).name}? `pip install .` in a checkout brings it"


# -- tokens


def command_token(options: argparse.Namespace) -> int:
    print(mint_token(settings_from(options), options.type))
    return GOOD


def mint_token(settings: Settings, agent_type: str, subject: str | None = None, **facts: Any) -> str:
    """A token from the storage's secret, for a new ``subject`` unless one is given. Raises StartError."""
    prepare_storage_folder(settings)
    logging.getLogger("cco").setLevel(logging.ERROR)  # the service tells of faulty plugins
    hooks = load_hooks(settings)
    tokens = Tokens(settings, hooks.part(AgentTypes, settings)(hooks, settings))
    tokens.load_secret()
    try:
        return tokens.mint(subject or f"cli-{agent_type}-{secrets.token_hex(4)}", agent_type, **facts)
    except ApiError as error:
        raise StartError(f"--type: {error.message}") from None


# ==== Small tools of every section: errors, times, threads, files, words ====


class StartError(Exception):
    """Ends the program with ``exit_code``; the message is printed as one line."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


StorageError = sqlite3.Error  # every fault of the storage is one


class ApiError(Exception):
    """A refusal with its code of ERRORS and the ``path`` of a bad field, which the base handler answers."""

    def __init__(
        self, code: str, message: str = "", *, path: str = "", details: Any = None, status: int = 0,
        retry_after: int | None = None, allowance: Mapping[str, str] = {},
    ) -> None:  # fmt: skip
        self.code, self.retry_after, self.allowance = code, retry_after, allowance
        self.details = {"path": path} if path else details
        usual, standard = ERRORS[code]
        self.status, self.message = status or usual, message or standard
        self.error = ERROR_OF_STATUS.get(self.status, ERROR_OF_STATUS[usual])
        if code == "RATE_001":  # the reference's own word
            self.error = "rate_limit_exceeded"
        super().__init__(f"{code}: {self.message}")

    def answer(self, request_id: str) -> dict[str, Any]:
        body = {
            "error": self.error, "message": self.message, "code": self.code, "details": self.details,
            "retry_after_seconds": self.retry_after,
            "limit": int(self.allowance["X-RateLimit-Limit"]) if self.allowance else None,
            "timestamp": iso(), "request_id": request_id,
        }  # fmt: skip
        return {name: value for name, value in body.items() if value is not None}


def forbidden(message: str, **details: Any) -> ApiError:
    return ApiError("AUTH_003", message, details=details)


def clean_text(text: str) -> str:
    """Text that JSON can carry: for what is not UTF-8 the replacement character."""
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def iso(moment: float | None = None) -> str:
    """ISO 8601 in UTC, to the second, of ``moment`` (epoch seconds, default now), in the year 9999 at most."""
    return iso_second(int(time.time() if moment is None else min(max(moment, 0.0), 253_402_300_799.0)))


iso_second = lru_cache(4096)(lambda seconds: f"{datetime.fromtimestamp(seconds, UTC):%FT%TZ}")
http_date = lru_cache(2)(tornado.httputil.format_timestamp)  # of epoch seconds
log = logging.getLogger("cco")
log_once = lru_cache(1000)(partial(log.warning, "%s"))


def one_line(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:500]
    except BaseException as worse:  # of somebody's own class of errors
        return f"its message cannot be had ({type(worse).__name__})"


class Pool:
    """So many threads for one kind of waiting; what hangs in them holds up no other kind."""

    def __init__(self, name: str, threads: int, seconds: float) -> None:
        self._name, self._free, self._seconds = name, asyncio.Semaphore(threads), seconds

    async def run(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """What ``function`` returns or raises; TimeoutError, and its thread is left to itself."""
        if asyncio.current_task() is None:  # plugins/_steps.py takes a first step without one
            await asyncio.sleep(0)
        loop = asyncio.get_running_loop()

        def release(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed: the service has stopped
                loop.call_soon_threadsafe(self._free.release)

        async with asyncio.timeout(self._seconds):
            await self._free.acquire()
            try:
                outcome = in_thread(self._name, partial(function, *arguments, **named))
            except RuntimeError:  # the system has no room for a thread
                self._free.release()
                raise
            outcome.add_done_callback(release)
            return await asyncio.wrap_future(outcome)


def in_thread(name: str, call: Callable[[], T]) -> Future[T]:
    """The outcome of ``call`` in a daemon thread."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # who gives it up does not end it
    try:
        inbox = FREE_THREADS.pop()
    except IndexError:  # to start one takes milliseconds
        inbox = queue.SimpleQueue()
        threading.Thread(target=work_from, args=[inbox], name=name, daemon=True).start()
    inbox.put((call, outcome))
    return outcome


def work_from(inbox: queue.SimpleQueue[Any]) -> None:
    """Work, and end after two seconds without any."""
    while True:
        try:
            call, outcome = inbox.get(timeout=2)
        except queue.Empty:
            with suppress(ValueError):  # somebody took it at this moment
                FREE_THREADS.remove(inbox)
                return
            continue
        try:
            outcome.set_result(call())
        except BaseException as error:  # a boundary: whoever waits gets it
            outcome.set_exception(error)
        del call, outcome  # a thread that waits keeps nothing
        FREE_THREADS.append(inbox)


FREE_THREADS: deque[queue.SimpleQueue[Any]] = deque()  # their inboxes
T = typing.TypeVar("T")


def write_file(path: Path, content: bytes, *, first: bool = False) -> None:
    """Replace ``path`` by ``content`` in one step, for the user alone; ``first`` syncs and replaces nothing. Blocks."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            if first:
                file.flush()
                os.fsync(handle)
        (os.link if first else os.replace)(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())

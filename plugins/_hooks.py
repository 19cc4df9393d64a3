"""Plugins kept apart: what one of them does when it is imported, asked or made to wait harms neither the others nor the
request, and its author hears of mistakes in the words of the hook.

What is not the core's own is imported and called in a thread of its own, which is left behind after five seconds.
The stop waits as long for what observers have not heard.
Answers to asks are taken as JSON says them. An error is told with its line in the plugin's file.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import gc
import importlib.metadata
import inspect
import logging
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import pluggy
from msgspec import Meta

from cco_sidecar import (
    ABSENT,
    ALONE,
    MB,
    PACKAGE,
    AgentLaunch,
    ApiError,
    CommandParser,
    ContextRequest,
    Hooks,
    Implementation,
    IssueNotFound,
    Plugin,
    Pool,
    ResultBody,
    Sections,
    Settings,
    SidecarInfo,
    StartError,
    arguments_of,
    bundled_folder,
    import_file,
    in_thread,
    log,
    one_line,
    option_table,
)  # fmt: skip
from cco_sidecar_plugins._called import own_command
from cco_sidecar_plugins._words import did_you_mean
from cco_sidecar_plugins.agents._reader import Reader

Function = TypeVar("Function", bound=Callable[..., Any])
MARGIN = 200  # levels of nesting: what surrounds an answer later must not make it too deep
MAX_ANSWER = 16 * MB  # of JSON


class MoreAsks:
    """Hooks that bundled plugins ask, like those of Asks."""

    def section_files(self) -> list[str]:
        """Files below the root that your sections are made from although git may ignore them. Asked at the start by the
        plugin budget.
        """

    def register_commands(self, commands: argparse._SubParsersAction[CommandParser]) -> None:
        """More commands. ``run`` gets the parsed arguments, our options among them, and returns the exit code."""

    def resolve_issue(self, issue_id: str, settings: Settings) -> dict[str, Any] | None:
        """``{"title": ..., "body": ...}`` of an issue. Raises IssueNotFound where there is none. Asked by the plugin
        issue_files.
        """

    def index_state(self, root: str, index_folder: str) -> dict[str, Any] | None:
        """``{"state": "building" | "ready" | "absent", ...}`` of the index behind your ranking. While one is building,
        contexts say so and are not cached. Asked by the plugin relevance.
        """

    def context_brief(self, request: ContextRequest, sections: Sections, reader: Reader) -> str | None:
        """A context as Markdown of 10 kB at most. ``sections`` are redacted and have no ``relevant_files``: see
        ``request.ranked``. Asked by the plugin brief.
        """

    def agent_failure(
        self, agent: dict[str, Any], output: list[str], folder: str
    ) -> Annotated[str, Meta(pattern=r"\S")] | None:
        """Why an agent failed, by the data of its ``agent_exited`` event, its last 100 lines and the files in its
        folder; in its first two minutes an answer ends it. Asked by the plugin endings.
        """

    def agent_result(
        self, agent: dict[str, Any], lines: list[str], folder: str, root: str, alone: bool
    ) -> ResultBody | None:
        """The result of an agent that ended well and stored none; ``alone``: no other agent ran. Asked by endings."""


class MoreTells:
    """Hooks of which bundled plugins tell, like those of Tells."""

    def agent_starting(self, launch: AgentLaunch, root: str) -> None:
        """An agent's files are there, its process is not: the start waits for you. Where it fails, no agent_ended
        follows. Told by the plugin endings.
        """


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """While much is made that stays: the garbage collector would look through all of it again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class QuickManager(pluggy.PluginManager):
    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        """As pluggy's, whose search through what a module has by any name takes longer than its import."""
        if name.startswith("__"):
            return None
        if not isinstance(plugin, types.ModuleType):
            return super().parse_hookimpl_opts(plugin, name)
        found = vars(plugin).get(name)
        return vars(found).get("cco_sidecar_impl") if isinstance(found, types.FunctionType) else None


class LoadedPlugin(Plugin):
    """A plugin that was found: ``problem`` says why it is not in use, ``faulty`` that its author must mend it before
    the service starts, ``failure`` what went wrong last in one of its hooks.
    """

    problem: str | None = None
    faulty: bool = False
    failures: int = 0
    failure: str | None = None


class Failing(threading.local):
    """``names``: the plugins that failed when this thread asked them, since whoever wants to know cleared it."""

    def __init__(self) -> None:
        self.names = set[str]()


failing = Failing()


class SafeHooks(Hooks):
    MANAGER = QuickManager
    SPECS = Hooks.SPECS | {
        name: spec for kind in (MoreAsks, MoreTells) for name, spec in vars(kind).items() if name[0] != "_"
    }
    NO_DATA = Hooks.NO_DATA | vars(MoreTells).keys() | {"register_commands"}
    TIMEOUT = 5.0
    MAX_STUCK = 4  # calls of one plugin that may hang at a time before it is passed over
    MAX_UNTOLD = 10_000

    def __init__(self, built_in: Iterable[object]) -> None:
        self._stuck: dict[tuple[str, str], list[Future[Any]]] = collections.defaultdict(list)  # by plugin and hook
        self._modules: dict[types.ModuleType, str] = {}  # the plugins that are modules, with their names
        self._made_parts: set[str] = set()  # plugins whose part_class gave something, or failed, which was told
        super().__init__(built_in)
        self.pool = Pool("asks", 16, 60)  # each plugin that is asked has five seconds of its own
        self.loaded = [LoadedPlugin(*msgspec.structs.astuple(plugin)) for plugin in self.loaded]

    @without_collections()
    def load(self, settings: Settings, strict: bool) -> None:
        """Load all plugins. Where ``strict`` raises StartError for faulty ones and options of plugins not in use."""
        if not settings.no_plugins:
            self.load_files(bundled_plugins())
            self.load_folders(settings.plugins, settings.where("plugins"))
        if strict and self.faults():
            raise StartError("; ".join(self.faults()))
        for fault in self.faults():
            log.warning("%s", fault)
        in_use = {plugin.name for plugin in self.loaded if not plugin.problem}
        for name, row in option_table().items() if strict else ():
            reader = getattr(row, "plugin", "")
            if reader and reader not in in_use and getattr(settings, name) != row.default:
                off = f": plugins are turned off by {settings.where('no_plugins')}" if settings.no_plugins else ""
                raise StartError(f"{settings.where(name)}: the plugin {reader}, which reads it, is not loaded{off}")

    def banner_lines(self, settings: Settings) -> list[str]:
        """Also who is skipped, and what is missing only where no bundled plugin is in use."""
        used = [plugin for plugin in self.loaded if plugin.source != "built in" and not plugin.problem]
        own = [plugin.name for plugin in used if bundled_folder() not in Path(plugin.source).parents]
        absent = f"turned off by {settings.where('no_plugins')}" if settings.no_plugins else ABSENT
        everywhere = [f"  Open:     on all interfaces ({settings.host})"] if settings.host in ("0.0.0.0", "::") else []
        return [
            *everywhere,
            f"  Plugins:  {', '.join([*own, f'{len(used) - len(own)} bundled'])}",
            *(f"  Skipped:  {plugin.name} ({plugin.problem})" for plugin in self.loaded if plugin.problem),
            *([f"  Alone:    {ALONE}: {absent}"] if len(own) == len(used) else []),
            f"  Token:    {own_command(settings)} token --type python-specialist",
        ]

    def load_folders(self, folders: Iterable[Path], where: str = "--plugins") -> None:
        """Load the plugins in ``folders``, which ``where`` names, and those of entry points."""
        for folder in folders:
            self.load_files(sorted(folder.glob("[!_.]*.py")))
            if not folder.is_dir():
                problem = f"{where}: {folder} is not a folder"
                self.loaded.append(LoadedPlugin(folder.name, str(folder), [], problem, faulty=True))
        for entry in importlib.metadata.entry_points(group="cco_sidecar"):
            self._load_one(entry.name, f"entry point {entry.value}", entry.load)

    def load_files(self, files: Iterable[Path]) -> None:
        for file in files:
            self._load_one(file.stem, str(file), functools.partial(import_file, file))

    def _load_one(self, name: str, source: str, load: Callable[[], Any]) -> None:
        plugin = LoadedPlugin(name, source, [])
        self.loaded.append(plugin)
        try:
            if self._manager.has_plugin(name):
                raise ImportError("another plugin has this name")
            plugin.hooks = self.register(self.imported(name, load), name)
        except (Exception, SystemExit) as error:
            plugin.faulty = isinstance(error, PluginFault)
            # An ImportError is the plugin's own word for what it needs: the banner and `cco plugins` pass it on.
            told = plugin.faulty or type(error) is ImportError
            plugin.problem = one_line(error) if told else self.describe(error, source)
            log.log(logging.DEBUG if told else logging.WARNING, "plugin %s is skipped: %s", name, plugin.problem)
            log.debug("plugin %s", name, exc_info=error)

    def faults(self) -> list[str]:
        """Faults of plugins that their authors must mend, a line each."""
        return [f"plugin {plugin.name}: {plugin.problem}" for plugin in self.loaded if plugin.faulty]

    def imported(self, name: str, load: Callable[[], Any]) -> Any:
        """The plugin ``name``, which ``load`` gives, within TIMEOUT. Standard streams are afterwards as before."""
        with contextlib.redirect_stderr(sys.stderr), contextlib.redirect_stdout(sys.stderr):
            importing = in_thread(f"import-{name}", load)
            in_time = concurrent.futures.wait([importing], self.TIMEOUT).done
        if not in_time:
            raise TimeoutError(f"its import has not ended within {self.TIMEOUT:.0f} s")
        try:
            return outcome(importing)
        except (Exception, SystemExit):
            sys.modules.pop(f"cco_sidecar_user_plugins.{name}", None)  # no half module is left behind
            raise

    def register(self, plugin: object, name: str) -> list[str]:
        """As the module does. Raises ImportError where the plugin is loaded already: it would be asked twice."""
        if not isinstance(plugin, types.ModuleType):
            return super().register(plugin, name)
        if plugin in self._modules:
            raise ImportError(f"it is loaded as {self._modules[plugin]}")
        hooks = super().register(hooks_alone(plugin), name)
        self._modules[plugin] = name
        return hooks

    def check(self, hook: str, function: Callable[..., Any]) -> None:
        if hook not in self.SPECS:
            raise PluginFault(f"there is no hook {hook!r}{did_you_mean(hook, self.SPECS)}")
        yields, is_async = inspect.isgeneratorfunction(function), inspect.iscoroutinefunction(function)
        if yields or is_async or inspect.isasyncgenfunction(function):
            plain_function = "a hook is a plain function that returns its answer; it runs in a thread and may block"
            raise PluginFault(f"{hook} {'yields' if yields else 'is async'}: {plain_function}")
        known = arguments_of(self.SPECS[hook])[1:]
        for name in [name for name in arguments_of(function) if name not in known]:
            parameter = inspect.signature(function).parameters[name]
            if parameter.default is parameter.empty:
                argument = str(parameter).partition(":")[0]
                takes = f"{hook} takes {', '.join(known) or 'nothing'}; it has no argument {argument!r}"
                raise PluginFault(takes + did_you_mean(name, known))

    def concerned(self, hook: str, **facts: Any) -> tuple[list[Implementation], bool]:
        """The implementations that may have an answer to these facts, and whether none blocks: all are built in. Left
        out are those bundled ones that say, by ``only_where``, that they have none.
        """
        rows = self.implementations[hook]
        rows = [row for row in rows if not is_bundled(row) or getattr(row.function, "only_where", bool)(facts)]
        return rows, all(row.plugin in self._trusted for row in rows)

    def ask(self, hook: str, **facts: Any) -> Iterator[tuple[str, Any]]:
        """As the module does. When ``startup`` is asked all parts are made: who had none for any of them is named."""
        for row in self.implementations["part_class"] if hook == "startup" else ():
            if row.plugin not in self._made_parts and not is_bundled(row):
                asked = "ask which part it is by issubclass(base, EventBus), for example"
                log.warning("plugin %s: part_class gave no class for any part; %s", row.plugin, asked)
        return super().ask(hook, **facts)

    def call(self, row: Implementation, facts: dict[str, Any]) -> Any:
        """Within TIMEOUT, as plain data; a bundled plugin's answer is what it should be and is not read anew. Who is
        long about making a part is waited for, and named again and again.
        """
        patient = row.hook == "part_class"
        if is_bundled(row) and (patient or "waits_for_nothing" in vars(row.function)):
            return row.call(facts)
        stuck = self._stuck[row.plugin, row.hook]
        stuck[:] = [call for call in stuck if not call.done()]
        if len(stuck) >= self.MAX_STUCK and not patient:
            raise TimeoutError(f"{len(stuck)} earlier calls have not come back")
        ask = row.call if is_bundled(row) else functools.partial(self.bounded, row)
        call = in_thread(f"plugin-{row.plugin}", functools.partial(ask, facts))
        while not concurrent.futures.wait([call], self.TIMEOUT).done:
            if not patient:
                stuck.append(call)
                raise TimeoutError(f"no answer within {self.TIMEOUT:.0f} s")
            log.warning("plugin %s: %s: no answer yet, which is waited for", row.plugin, row.hook)
        if patient and (call.exception() is not None or call.result() is not None):
            self._made_parts.add(row.plugin)
        answer = outcome(call)
        if patient and not isinstance(answer, type | None):
            raise TypeError(f"a class is wanted, or None, and {type(answer).__name__} was returned")
        return answer

    def bounded(self, row: Implementation, facts: dict[str, Any]) -> Any:
        """What the plugin returns, as plain data that is neither too large nor nested too deeply."""
        try:
            answer = nested = super().call(row, facts)
        except msgspec.ValidationError as error:
            raise msgspec.ValidationError(self.in_words(row.hook, str(error))) from None
        if row.hook in self.NO_DATA or row.hook == "rank_files":  # which is as long as the project is large
            return answer
        for _ in range(MARGIN):
            nested = [nested]
        if len(content := msgspec.json.encode(nested)) > MAX_ANSWER:
            raise ValueError(f"its answer has more than {MAX_ANSWER // MB} MB")
        if sys.version_info >= (3, 14):  # there it takes more of the stack than what it was written with
            msgspec.json.decode(content)
        return answer

    def in_words(self, hook: str, problem: str) -> str:
        """What is wrong with an answer to ``hook``, with the values that may stand there, as the API's refusals say."""
        from cco_sidecar_plugins.http.choices import name_choices

        place = problem.partition(" - at `$")[2].removesuffix("`")
        told = ApiError("REQ_001", problem, details={"path": place.removeprefix(".")})
        name_choices(told, typing.get_type_hints(self.SPECS[hook], include_extras=True)["return"])
        return told.message

    def tell(self, hook: str, **facts: Any) -> None:
        """Drop it where MAX_UNTOLD wait for observers."""
        if self._untold.qsize() < self.MAX_UNTOLD:
            super().tell(hook, **facts)
        else:
            log.warning("observers are too slow: one %s was not told", hook)

    async def close(self, info: SidecarInfo) -> None:
        """Tell observers first what they have not heard, for TIMEOUT at most."""
        self._untold.put(None)
        if self._teller:
            heard, _ = await asyncio.wait([asyncio.wrap_future(self._teller)], timeout=self.TIMEOUT)
            if not heard:
                log.warning("observers are too slow: some were not told what happened last")
        await super().close(info)

    def failed(self, row: Implementation, error: BaseException) -> None:
        if row.hook == "resolve_issue" and isinstance(error, IssueNotFound):
            raise error
        if isinstance(error, KeyboardInterrupt):  # the user's, while we waited: a plugin's own is a Raised
            raise error
        failing.names.add(row.plugin)
        code: Any = getattr(inspect.unwrap(row.function), "__code__", None)
        place = (code.co_filename, code.co_firstlineno) if code else ("", 0)
        failure = f"{row.hook}: {self.describe(error, *place)}"
        loaded = (plugin for plugin in self.loaded if plugin.name == row.plugin and not plugin.problem)
        plugin = next(loaded, None) or LoadedPlugin(row.plugin, "registered by hand", [])
        # Asked for each part it fails at the same line each time, which is told once.
        again = row.hook == "part_class" and (plugin.failure or "").rpartition(" (")[2] == failure.rpartition(" (")[2]
        log.log(logging.DEBUG if again else logging.WARNING, "plugin %s: %s", row.plugin, failure)
        plugin.failures, plugin.failure = plugin.failures + 1, failure
        log.debug("plugin %s: %s", row.plugin, row.hook, exc_info=error)

    def describe(self, error: BaseException, file: str, line: int = 0) -> str:
        """One line: the error, and the line of ``file`` in which it arose, without the file's folder. ``line`` is told
        where it arose elsewhere, such as from what was returned.
        """
        error = error.error if isinstance(error, Raised) else error
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        text = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        if isinstance(error, SyntaxError) and error.filename:
            file, lines, text = error.filename, [error.lineno], error.msg
        where = f" ({Path(file).name}:{[line, *lines][-1]})" if line or lines else ""
        return f"{type(error).__name__}: {text}".removesuffix(": ") + where


def hooks_alone(module: types.ModuleType) -> types.ModuleType:
    """A module with the hooks of ``module`` and nothing else: pluggy looks through all that a module has, twice."""
    found = types.ModuleType(module.__name__)
    functions = {name: each for name, each in vars(module).items() if isinstance(each, types.FunctionType)}
    vars(found).update({name: each for name, each in functions.items() if "cco_sidecar_impl" in vars(each)})
    return found


def contains(file: Path, *texts: bytes) -> bool:
    """Whether all of ``texts`` are in a file that is there and for us to read."""
    try:
        content = file.read_bytes() if file.is_file() else b""
    except OSError:
        return False
    return all(text in content for text in texts)


def bundled_plugins(saying: str = "cco_sidecar") -> list[Path]:
    """The files of the bundled plugins that say so, sorted: a `plugins` folder beside the module may be another's."""
    folder = bundled_folder() or Path("/nowhere")
    files = [*folder.glob("[!_.]*.py"), *folder.glob("[!_.]*/[!_.]*.py")]
    return [file for file in sorted(files) if contains(file, b"cco_sidecar", saying.encode())]


class PluginFault(Exception):
    """A plugin implements a hook that does not exist, or takes an argument that its hook does not have."""


def only_where(check: Callable[[dict[str, Any]], bool]) -> Callable[[Function], Function]:
    """The mark of a bundled plugin's hook that has an answer only where ``check`` says so of the facts, at once and on
    the loop.
    """

    def mark(function: Function) -> Function:
        vars(function)["only_where"] = check
        return function

    return mark


def waits_for_nothing(function: Function) -> Function:
    """The mark of a bundled plugin's hook that is called where it is asked: handing it over takes longer."""
    vars(function)["waits_for_nothing"] = True
    return function


def is_bundled(row: Implementation) -> bool:
    return str(getattr(row.function, "__module__", "")).startswith(f"{PACKAGE}.")


class Raised(Exception):
    """What a plugin raised in its thread and is no Exception, such as KeyboardInterrupt, which is not for ours."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def outcome(call: Future[Any]) -> Any:
    """The result of a call that has ended. Raises what it raised."""
    error = call.exception()
    if error is not None and not isinstance(error, Exception):
        raise Raised(error) from error
    return call.result()

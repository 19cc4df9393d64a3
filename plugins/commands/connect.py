"""The commands ``cco connect`` and ``cco disconnect``: own sessions in this repository as members of the team.

A session's program gets the tools of /mcp by ``cco mcp``, which it starts itself, and what its hooks tell by ``cco
hook``. What connect adds to a settings file is noted in the storage; disconnect takes exactly that away.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from cco_sidecar import (
    GOOD,
    REFUSED,
    WRONG_USE,
    Settings,
    StartError,
    default_storage,
    discover_root,
    harmless,
    hookimpl,
    lock_file,
    one_line,
    prepare_storage_folder,
    run_git,
    settings_from,
    write_file,
)
from cco_sidecar_plugins._called import own_command
from cco_sidecar_plugins._files import NO_JSON, explained
from cco_sidecar_plugins._words import meant
from cco_sidecar_plugins.agents._hook_settings import DIALECTS, MODULAR, hook_settings, opencode_plugin
from cco_sidecar_plugins.commands import _edits
from cco_sidecar_plugins.commands._edits import APPENDED, Addition, NotEditable
from cco_sidecar_plugins.commands._mcp_bridge import SESSION, command_mcp
from cco_sidecar_plugins.commands._running import running_settings, work_trees
from cco_sidecar_plugins.commands._table import Command, add_commands, arg
from cco_sidecar_plugins.context._git_facts import git_prefix

NAME = "cco"  # of the server in programs' settings
LIMIT = 16 * 1024 * 1024  # bytes of a settings file
PATIENCE = 30  # seconds for others that connect at the same time
STARTING, CALLING = 30, 330  # seconds that a program gives the start of the server, and a call that waits


@hookimpl
def register_agent_types() -> dict[str, str]:
    return {SESSION: "architect"}


@hookimpl
def register_commands(commands: Any) -> None:
    add_commands(commands, COMMANDS)


# -- what each program is told

Server = Callable[[list[str]], dict[str, Any]]


def plain(words: list[str], **more: Any) -> dict[str, Any]:
    return {"command": words[0], "args": words[1:], **more}


def local(words: list[str]) -> dict[str, Any]:
    return {"type": "local", "command": words, "enabled": True, "timeout": STARTING * 1000}


class Program(Struct, frozen=True):
    """Where a program's settings have MCP servers, as a path of keys in a file of the repository or, with ~, of the
    user; ``{tree}`` in the path is the repository as ``shared_root`` has it. Of several files the first that is there,
    else the last.
    """

    files: tuple[str, ...]
    path: tuple[str, ...]
    server: Server
    tried: str = ""  # the version, empty for a program that was not to be had
    trust: str = ""  # what its user has to do before it reads that


PROGRAMS = {
    "claude": Program(
        ("~/.claude.json",), ("projects", "{tree}", "mcpServers", NAME),
        lambda words: {"type": "stdio"} | plain(words, env={}, alwaysLoad=True), "2.1.332"),
    "codex": Program(
        (".codex/config.toml",), ("mcp_servers", NAME),
        lambda words: plain(words, startup_timeout_sec=STARTING, tool_timeout_sec=CALLING,
                            default_tools_approval_mode="approve"), "0.171.0",
        trust="codex reads .codex where you trust the repository, and runs the hooks once you trust them in /hooks"),
    "gemini": Program(
        (".gemini/settings.json",), ("mcpServers", NAME),
        lambda words: plain(words, trust=True, timeout=CALLING * 1000), "0.61.0",
        trust="gemini reads .gemini where you trust the folder"),
    "opencode": Program(("opencode.jsonc", "opencode.json"), ("mcp", NAME), local, "1.18.33"),
    "kilo": Program(("kilo.jsonc", "kilo.json"), ("mcp", NAME), local, "7.7.7"),
    "qwen": Program(
        (".qwen/settings.json",), ("mcpServers", NAME),
        lambda words: plain(words, trust=True, timeout=CALLING * 1000), "0.24.4"),
    "copilot": Program(
        (".mcp.json", ".github/mcp.json"), ("mcpServers", NAME),  # the second only where the first is not there
        lambda words: {"type": "stdio"} | plain(words, tools=["*"]), "1.0.102",
        trust="copilot reads them where you trust the folder: it asks; behind -p say --trust-folder"),
    "vscode": Program((".vscode/mcp.json",), ("servers", NAME), lambda words: {"type": "stdio"} | plain(words)),
    "cursor": Program((".cursor/mcp.json",), ("mcpServers", NAME), plain),
}  # fmt: skip

IN_WINDOWS = ("vscode", "cursor")  # which need not be on PATH

NEW = {  # they add that themselves
    "opencode.json": '{\n  "$schema": "https://opencode.ai/config.json"\n}\n',
    "kilo.json": '{\n  "$schema": "https://app.kilo.ai/config.json"\n}\n',
}


def own_words() -> list[str]:
    """The command line of this program, for another working directory and PATH."""
    start = sys.argv[0] or "cco"
    found = shutil.which(start) if os.path.basename(start) == start else os.path.abspath(start)
    script = found or os.path.abspath(start)
    return [sys.executable, script] if script.endswith(".py") or not os.access(script, os.X_OK) else [script]


def wanted(program: str, settings: Settings, trees: list[Path]) -> list[tuple[str, Addition]]:
    """(file, what is added to it) for a program's sessions in this repository, which has these work trees."""
    row, root, tree = PROGRAMS[program], str(settings.root), shared_root(settings.root, trees)
    place = server = ["--root", root]
    moved = settings.storage != default_storage(settings.root, settings.project)
    if moved or os.environ.get("XDG_STATE_HOME"):  # codex starts servers without that
        place = [*place, "--storage", str(settings.storage)]
    if "{tree}" not in row.path or moved:
        server = place
    elif settings.root in trees[1:]:  # the bridge finds the tree of each session
        server = ["--root", str(tree)]
    file = next((name for name in row.files if on_disk(settings.root, name).exists()), row.files[-1])
    path = tuple(str(tree) if key == "{tree}" else key for key in row.path)
    found: list[tuple[str, Addition]] = [(file, (path, row.server([*own_words(), "mcp", program, *server])))]
    if program in DIALECTS and importlib.util.find_spec("cco_sidecar_plugins.commands.hook"):
        hooks = DIALECTS[program].settings
        found += [(hooks, addition) for addition in wanted_hooks(program, place)]
        if program in MODULAR:  # named, since opencode installs packages in a .opencode that is there
            found.append((file, (("plugin", APPENDED), (settings.root / hooks).as_uri())))
    return found


def shared_root(root: Path, trees: list[Path]) -> Path:
    """Where claude keeps what is of a repository: the top of the work tree around ``root``, but for a linked one the
    first that git lists. Blocks.
    """
    top = discover_root(root)
    return trees[0] if top in trees[1:] else top


def wanted_hooks(program: str, place: list[str]) -> list[Addition]:
    """What is added to the file of a program's hooks."""
    event = ["{event}"] if program == "copilot" else []  # which does not say it on standard input
    line = shlex.join([*own_words(), "hook", program, *event, *place])
    if program in MODULAR:
        return [((), opencode_plugin(line))]
    hooks = hook_settings(program, line, wait=shlex.join([*own_words(), "wait", "--rewake", *place]))
    if program == "copilot":
        return [((), json.dumps({"version": 1, "hooks": hooks}, indent=2) + "\n")]
    return [(("hooks", event, APPENDED), one) for event, rows in hooks.items() for one in rows]


def on_disk(root: Path, name: str) -> Path:
    """The file behind a name; claude's own moves with its variable."""
    if name == "~/.claude.json" and (moved := os.environ.get("CLAUDE_CONFIG_DIR")):
        return Path(moved, ".claude.json")
    return Path(os.path.expanduser(name)) if name[0] == "~" else root / name


# -- what was written


class Written(Struct):
    """What connect did to a file: the whole text where it made it, else the pieces that it put in. ``exclude`` is its
    line in git's info/exclude, ``folders`` those that it made, ``tree`` the root and ``repository`` git's folder.
    """

    name: str
    additions: list[tuple[list[str], Any]]
    pieces: list[str] = []
    made: str | None = None
    exclude: str = ""
    folders: list[str] = []
    tree: str = ""
    repository: str = ""

    def as_additions(self) -> list[Addition]:
        return [(tuple(path), value) for path, value in self.additions]


class Notes:
    """The notes of what was written, in the storage, by program."""

    FILE = "connections.json"

    def __init__(self, storage: Path) -> None:
        self._path = storage / self.FILE
        self.by_program: dict[str, list[Written]] = {}
        with contextlib.suppress(FileNotFoundError):
            try:
                self.by_program = msgspec.json.decode(self._path.read_bytes(), type=dict[str, list[Written]])
            except NO_JSON as error:
                raise StartError(f"{self._path} cannot be read: {one_line(error)}") from None

    @classmethod
    def of_other_trees(cls, settings: Settings, trees: list[Path], program: str = "") -> list[tuple[Path, Written]]:
        """(root, what was written) of the repository's other work trees, which share git's info/exclude and what a
        program keeps for the repository; of one program or of all. Raises StartError. Blocks.
        """
        found = []
        for root in trees:
            places = default_storage(root, "").parent.glob(f"*{default_storage(root, '').name}")
            for storage in places if root != settings.root and root.is_dir() else ():
                known = cls(storage).by_program
                found += [(root, row) for name in known if program in ("", name) for row in known[name]]
        return found

    @classmethod
    def of_removed_trees(cls, settings: Settings) -> list[Notes]:
        """Those of work trees of the repository that are gone without a disconnect. Blocks."""
        found, repository = [], repository_of(settings.root)
        for file in default_storage(settings.root, "").parent.glob(f"*/{cls.FILE}") if repository else ():
            with contextlib.suppress(StartError):  # most are of other repositories, and no matter of ours
                notes = cls(file.parent)
                if any(row.repository == repository and not os.path.isdir(row.tree) for row in notes.rows()):
                    found.append(notes)
        return found

    def rows(self, program: str = "") -> list[Written]:
        """What was written for one program or for all."""
        return [row for name, rows in self.by_program.items() if program in ("", name) for row in rows]

    def save(self) -> None:
        write_file(self._path, msgspec.json.format(msgspec.json.encode(self.by_program)))


def repository_of(root: Path) -> str:
    """Git's folder, which all work trees of a repository share; "" outside of git. Blocks."""
    found = run_git(root, "rev-parse", "--git-common-dir") if shutil.which("git") else None
    return os.path.realpath(root / os.fsdecode(found.removesuffix(b"\n"))) if found else ""


@contextlib.contextmanager
def alone(settings: Settings) -> Iterator[None]:
    """While it lasts, no other connect or disconnect of this repository changes anything."""
    prepare_storage_folder(settings)
    deadline = time.monotonic() + PATIENCE
    with (settings.storage / "connections.lock").open("w") as file:
        while True:
            try:
                lock_file(file.fileno())
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise StartError("another cco connect or disconnect does not end", REFUSED) from None
                time.sleep(0.05)
        yield


# -- changes


class Change(Struct):
    """A settings file and what becomes of it: None is no file."""

    name: str
    path: Path
    before: str | None
    after: str | None
    note: Written | None = None


def read(settings: Settings, name: str) -> tuple[Path, str | None]:
    """(the file, its text, None where there is none). Raises NotEditable, which names no content."""
    path = Path(os.path.realpath(on_disk(settings.root, name)))
    if name[0] != "~" and not path.is_relative_to(os.path.realpath(settings.root)):
        raise NotEditable("it is a link that leads out of the repository")
    try:
        if not path.is_file():
            if path.exists() or path.is_symlink():  # such as one that leads to itself
                raise NotEditable("it is no regular file")
            return path, None
        with path.open("rb") as file:
            content = file.read(LIMIT + 1)
        if len(content) > LIMIT:
            raise NotEditable("it has over 16 MB")
        return path, content.decode()
    except (UnicodeDecodeError, OSError) as error:
        raise NotEditable(error.strerror if isinstance(error, OSError) else "it is not UTF-8") from None


def connecting(settings: Settings, program: str, notes: list[Written], trees: list[Path]) -> list[Change]:
    """The changes that connect a program, from whatever an earlier connection left. Raises StartError."""
    additions, repository = wanted(program, settings, trees), repository_of(settings.root)
    changes = {change.name: change for change in disconnecting(settings, notes, additions)}
    for name, addition in additions:
        try:
            path, text = read(settings, name)
            change = changes.setdefault(name, Change(name, path, text, text))
            if not change.note:
                folders = missing_folders(settings.root, path)
                change.note = Written(name, [], folders=folders, tree=str(settings.root), repository=repository)
            note = change.note
            note.additions.append((list(addition[0]), addition[1]))
            if change.after is None:
                note.made = ""
            change.after, piece = _edits.add(name, change.after or NEW.get(name, ""), addition)
            note.pieces += [piece] if piece else []
        except NotEditable as error:
            raise StartError(f"{name} cannot be edited: {error}; nothing was written") from None
    for change in changes.values():
        if change.note and change.note.made is not None:
            change.note.made = change.after
            change.note.exclude = exclude_line(settings, change.name)
    return list(changes.values())


def disconnecting(settings: Settings, notes: list[Written], additions: list[tuple[str, Addition]]) -> list[Change]:
    """The changes that take away what was written, and those ``additions`` that nobody noted. Raises StartError."""
    known = {note.name: note for note in notes}
    unknown = [(name, addition) for name, addition in additions if name not in known]
    changes = []
    for name in dict.fromkeys([*known, *(name for name, _ in unknown)]):
        try:
            path, text = read(settings, name)
            if text is None:
                continue
            # also what nobody noted, as after a lost storage, but not a server of the user's own that has our name
            unnoted = [
                (list(keys), value)
                for file, (keys, value) in unknown
                if file == name and is_in(text, name, keys, value)
            ]
            note = known.get(name) or Written(name, unnoted)
            gone = note.made is not None and text == note.made
            ours = note.as_additions()
            after = None if gone else _edits.take(name, text, ours, note.pieces)
            if name not in known and after not in (None, text) and _edits.says_nothing(name, after, ours):
                after = after if is_tracked(settings, name) else None  # it is ours: nobody else wrote into it
            changes.append(Change(name, path, text, after))
        except NotEditable as error:
            raise StartError(f"{name} cannot be edited: {error}; nothing was written") from None
    return changes


def is_in(text: str, name: str, keys: _edits.Path, value: Any) -> bool:
    """Whether an addition is in a file as we would write it. Raises NotEditable."""
    if not keys:
        return text == value
    whole = _edits.tables(text) if name.endswith(".toml") else _edits.parse(text).value
    return keys[-1] == APPENDED or _edits.value_of(whole, keys) == value


def missing_folders(root: Path, path: Path) -> list[str]:
    """The folders that are to be made for a file, the deepest first."""
    return [str(folder) for folder in path.parents if not folder.exists() and folder != root]


def exclude_line(settings: Settings, name: str) -> str:
    """The line by which git passes over a file of the repository that it does not know; "" where that needs none."""
    prefix = git_prefix(settings.root) if name[0] != "~" and shutil.which("git") else None
    if prefix is None or run_git(settings.root, "check-ignore", "-q", "--", name) is not None:
        return ""
    return "" if is_tracked(settings, name) else line_of(prefix + name)


def line_of(path: str) -> str:
    return "/" + re.sub(r"([\\*?\[\]#! ])", r"\\\1", path)


def is_tracked(settings: Settings, name: str) -> bool:
    return name[0] != "~" and bool(run_git(settings.root, "ls-files", "--", name))


def apply(settings: Settings, changes: list[Change]) -> None:
    """Write the changed files, each in one step, and with the rights that it had. Raises OSError, and StartError where
    somebody else has written one meanwhile.
    """
    for change in changes:
        if change.after == change.before:
            continue
        if not is_as_it_was(settings, change):
            raise StartError(f"{change.name} was changed meanwhile: say it again")
        if change.after is None:
            change.path.unlink()
            continue
        for folder in reversed(missing_folders(settings.root, change.path)):
            Path(folder).mkdir()
        mode = change.path.stat().st_mode & 0o777 if change.before is not None else 0o600
        write_file(change.path, change.after.encode())
        change.path.chmod(mode)


def is_as_it_was(settings: Settings, change: Change) -> bool:
    try:
        return read(settings, change.name) == (change.path, change.before)
    except NotEditable:
        return False


def set_excluded(settings: Settings, add: list[str], remove: list[str]) -> None:
    """Lines of git's info/exclude, which no commit holds."""
    found = run_git(settings.root, "rev-parse", "--git-path", "info/exclude") if shutil.which("git") else None
    if not found or not (add or remove):
        return
    path = Path(os.path.realpath(settings.root / os.fsdecode(found.removesuffix(b"\n"))))
    text = path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else ""
    for line in remove:
        text = re.sub(rf"(?m)\A{re.escape(line)}\n|\n{re.escape(line)}$", "", text, count=1)
    for line in add:
        if line not in text.split("\n"):
            text = f"{text}{line}\n" if not text or text.endswith("\n") else f"{text}\n{line}"
    if not text:  # we made it: that of a repository begins with comments
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    write_file(path, text.encode("utf-8", "surrogateescape"))
    path.chmod(mode)


# -- the commands


def command_connect(options: argparse.Namespace) -> int:
    """Show what would be written for a program's sessions; with --write write it."""
    checked_program(options.program)
    settings = running_settings(settings_from(options))
    with alone(settings) if options.write else contextlib.nullcontext():
        return connect(options, settings)


def connect(options: argparse.Namespace, settings: Settings) -> int:
    notes, trees = Notes(settings.storage), work_trees(settings.root)
    old = notes.by_program.get(options.program, [])
    others = [row for each in Notes.of_removed_trees(settings) for row in each.rows(options.program)]
    others += [row for _, row in Notes.of_other_trees(settings, trees, options.program)]
    shared = [row for row in others if row.name[0] == "~" and row.name not in {own.name for own in old}]
    changes = connecting(settings, options.program, [*old, *shared], trees)
    print("".join(shown(settings, changes, patches=not options.write)), end="")
    real = [change for change in changes if change.after != change.before]
    new = [change.note for change in changes if change.note]
    for note in new:  # folders that an earlier connection made are still its own
        note.folders += [name for row in old if row.name == note.name for name in row.folders]
        lines = [note.exclude, *(row.exclude for row in [*old, *others] if row.name == note.name)]
        note.exclude = next(filter(None, lines), "")
    if options.write:
        notes.by_program[options.program] = new
        notes.save()  # first: what a kill leaves is then known
        apply(settings, changes)
        set_excluded(settings, [note.exclude for note in new if note.exclude], [])
        for change in real:
            print(harmless(f"{change.path}: {'removed' if change.after is None else 'written'}"))
    own = own_command(settings)
    if trust := PROGRAMS[options.program].trust:
        print(f"Note: {trust}.")
    if is_missing(options.program):
        print(f"Note: {options.program} is not on PATH; the connection is there for it when it is installed.")
    if not real:
        print(f"{options.program} is connected; its sessions in {settings.root} have the tools of {NAME}.")
    elif not options.write:
        print(f"Nothing was written: `{own} connect {options.program} --write` does, `{own} disconnect` takes it away.")
    else:
        print(f"Written: start {options.program} anew in {settings.root}, while `{own}` serves it.")
    return GOOD


def shown(settings: Settings, changes: list[Change], patches: bool) -> Iterator[str]:
    """What git makes of each changed file, and with ``patches`` before it the lines that are ours."""
    import difflib  # here alone, since the service loads this file too and needs none

    for change in changes:
        if change.after == change.before:
            continue
        name, known = str(change.path), is_tracked(settings, change.name)
        before, after = (text.splitlines(True) if text else [] for text in (change.before, change.after))
        for line in difflib.unified_diff(before, after, name, name, n=0) if patches else ():
            yield harmless(line.rstrip("\r\n")) + "\n"
        if known:
            yield f"# git tracks {change.name}: the change shows in `git status`; it holds no token\n"
        elif change.note and change.note.exclude:
            yield f"# {change.name} is new: git is told to pass over it by .git/info/exclude\n"


def command_disconnect(options: argparse.Namespace) -> int:
    """Take away what connect wrote, of one program or of all; one that cannot be edited keeps none of the others."""
    settings = running_settings(settings_from(options))
    with alone(settings):
        return disconnect(options, settings)


def disconnect(options: argparse.Namespace, settings: Settings) -> int:
    notes, trees, removed = Notes(settings.storage), work_trees(settings.root), Notes.of_removed_trees(settings)
    known = dict.fromkeys(name for each in (notes, *removed) for name in each.by_program)
    every = [*known, *(name for name in PROGRAMS if name not in known and is_unnoted(name, settings, trees))]
    programs = [checked_program(options.program)] if options.program else every
    problems, code = [], GOOD
    for program in programs:
        try:
            disconnect_program(program, settings, notes, removed, trees)
        except (StartError, OSError) as error:
            problems.append(f"{program}: {explained(error) if isinstance(error, OSError) else error}")
            code = max(code, getattr(error, "exit_code", REFUSED))
    if problems:
        raise StartError("; ".join(problems), code)
    if not programs:
        print("No program is connected.")
    return GOOD


def is_unnoted(program: str, settings: Settings, trees: list[Path]) -> bool:
    """Whether a program's settings say that it is connected, though no note does: as after a lost storage."""
    shared = {row.name for _, row in Notes.of_other_trees(settings, trees, program)}
    with contextlib.suppress(StartError):  # what cannot be read tells no program of us either
        changes = disconnecting(settings, [], wanted(program, settings, trees))
        return any(change.after != change.before and change.name not in shared for change in changes)
    return False


def disconnect_program(program: str, settings: Settings, notes: Notes, removed: list[Notes], trees: list[Path]) -> None:
    """What ``disconnect`` does of one program. Raises StartError and OSError."""
    excluded = {row.exclude for _, row in Notes.of_other_trees(settings, trees)}
    old = notes.by_program.get(program, [])
    gone = [row for each in removed for row in each.rows(program)]
    users = {row.name: root for root, row in Notes.of_other_trees(settings, trees, program) if row.name[0] == "~"}
    noted = [*(row for row in gone if row.name[0] == "~"), *old]
    changes = disconnecting(settings, noted, wanted(program, settings, trees))
    changes = [change for change in changes if change.name not in users]
    real = [change for change in changes if change.after != change.before]
    names = {row.name for row in noted}
    unnoted = [change for change in real if change.name not in names and change.name[0] != "~" and not change.after]
    prefix = (git_prefix(settings.root) or "") if unnoted else ""  # raises before anything is written
    apply(settings, changes)
    lines = [*(row.exclude for row in [*old, *gone]), *(line_of(prefix + change.name) for change in unnoted)]
    set_excluded(settings, [], [line for line in lines if line and line not in excluded])
    folders = [name for note in old for name in note.folders]
    root = Path(os.path.realpath(settings.root))
    above = {str(folder) for change in unnoted for folder in change.path.parents if root in folder.parents}
    for folder in [*folders, *sorted(above, key=len, reverse=True)]:
        with contextlib.suppress(OSError):  # something else is in it, or it is gone
            os.rmdir(folder)
    for each in (notes, *removed):
        if each.by_program.pop(program, None) is not None:
            each.save()
    for change in real:
        print(harmless(f"{program}: {change.path}{' removed' if change.after is None else ' without it again'}"))
    for name, root in users.items():
        print(harmless(f"{program}: {name} stays as it is for {root}, another work tree of this repository."))
    if gone:
        print(f"{program}: what a work tree that was removed had left is gone.")
    elif not real and not users:
        print(f"{program} is not connected.")


def findings(settings: Settings) -> dict[str, tuple[str, str]]:
    """For ``cco doctor``: of each connected program, whether its settings still say so, and whether a note does."""
    try:
        known = Notes(settings.storage).by_program
    except StartError as error:
        return {"connections": ("bad", str(error))}
    found, trees = {}, work_trees(settings.root)
    for program, notes in known.items():
        again = f"say `{own_command(settings)} connect {program} --write`"
        try:
            changed = [
                change for change in connecting(settings, program, notes, trees) if change.after != change.before
            ]
            files = ", ".join(note.name for note in notes)
            files += f"; {program} itself is not on PATH" if is_missing(program) else ""
            told = ("note", f"{changed[0].name} no longer says what it should: {again}") if changed else ("good", files)
        except StartError as error:
            told = "bad", str(error)
        found[f"connection of {program}"] = told
    own = own_command(settings)
    try:
        unnoted = [name for name in PROGRAMS if name not in known and is_unnoted(name, settings, trees)]
    except StartError as error:  # the notes of another work tree
        return found | {"connections": ("bad", str(error))}
    for program in unnoted:
        how = f"`{own} connect {program} --write` notes it, `{own} disconnect {program}` takes it away"
        found[f"connection of {program}"] = "note", f"in its settings, and no longer noted in the storage: {how}"
    return found


def is_missing(program: str) -> bool:
    return program not in IN_WINDOWS and not shutil.which(program)


def checked_program(program: str) -> str:
    if program not in PROGRAMS:
        raise StartError(f"PROGRAM: {program!r} is none that can be connected{meant(program, PROGRAMS)}", WRONG_USE)
    return program


PROGRAM = arg("program", metavar="PROGRAM", help=", ".join(PROGRAMS))
COMMANDS = {
    "connect": Command("connect your own sessions of a coding program in this repository", command_connect, [
        PROGRAM, arg("--write", action="store_true", help="write what is shown")], formats=("text",), section="Set up"),
    "disconnect": Command("take away what connect wrote", command_disconnect, [
        arg("program", nargs="?", metavar="PROGRAM", help="only this one (default: all)")],
        formats=("text",), section="Set up"),
    "mcp": Command("serve a coding program the service's tools over standard input and output", command_mcp, [PROGRAM],
        formats=("json",), section=""),
}  # fmt: skip

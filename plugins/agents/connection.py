"""Spawned agents find the service's tools: their programs are told of /mcp as the table of launchers says.

What is written for that lies in the agent's own folder, for the user alone, and none of the user's files is changed. A
program is connected that was chosen by its name, or as the first one on PATH; its prompt and brief then speak of tools.
Whoever configures a command of his own, or a plugin's, is told how to use curl.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from cco_sidecar import (
    AgentCommand,
    ApiError,
    Launcher,
    Running,
    hookimpl,
    one_line,
    write_file,
)
from cco_sidecar_plugins.agents._reader import Reader, ReadingLauncher, lasting_token
from cco_sidecar_plugins.agents.launchers import DECIDING, LASTING, PROGRAMS, Program, known_name
from cco_sidecar_plugins.http._mcp_tools import by_tools

log = logging.getLogger("cco")

HOME = "home"  # a folder of this name in the agent's stands for the user's own home


@hookimpl
def part_class(base: type) -> type | None:
    return type("ConnectingLauncher", (ConnectingLauncher, base), {}) if issubclass(base, Launcher) else None


class ConnectingLauncher(ReadingLauncher):
    """Connects the programs of which it is known how."""

    def reader(self, row: dict[str, Any], folder: Path | None) -> Reader:
        reader = super().reader(row, folder)
        connects = folder is not None and self._program(row["type"])
        return msgspec.structs.replace(reader, how=by_tools(reader)) if connects else reader

    async def command(self, running: Running, files: dict[str, bytes], asked: dict[str, str]) -> AgentCommand:
        command = await super().command(running, files, asked)
        if not self.reader(running.row, running.folder).how or not (program := PROGRAMS.get(command.argv[0])):
            return command
        folder, token = running.folder, lasting_token(self, running.row)
        facts = {"{url}": self.url.removesuffix("/api"), "{agent_folder}": str(folder), "{token}": token}
        try:
            return await asyncio.to_thread(connected, program, command, folder, facts, self.settings.root)
        except ValueError as error:
            raise ApiError("AGT_001", f"Agent spawn failed: its settings cannot be joined: {one_line(error)}") from None

    def _program(self, agent_type: str) -> Program | None:
        """The program of a type's agents where it can be connected."""
        deciding = {row.plugin for row in self.hooks.implementations["agent_command"]}
        serving = {plugin.name for plugin in self.hooks.loaded if not plugin.problem}
        name = known_name(self.settings.command_of(agent_type))
        if deciding - DECIDING or "mcp" not in serving or not name:
            return None
        program = PROGRAMS[name]
        return program if program.connects and homes_can_be_lent(program) else None


def homes_can_be_lent(program: Program) -> bool:
    """Whether the user's settings, where the program needs them beside ours, can be read."""
    for name in program.mcp_files:
        if name.startswith(f"{HOME}/"):
            try:
                settings_in(Path.home() / name.removeprefix(f"{HOME}/"))
            except ValueError as error:
                log.warning("an agent is not connected to the service's tools: %s: %s", name, one_line(error))
                return False
            if sys.platform == "win32":  # where links need a privilege
                return False
    return True


def connected(program: Program, command: AgentCommand, folder: Path, facts: dict[str, str], root: Path) -> AgentCommand:
    """``command``, whose program finds the tools by files that this writes. Blocks. Raises ValueError, OSError."""
    for name, content in program.mcp_files.items():
        told = filled(content, facts)
        if name.startswith(f"{HOME}/"):
            own = Path(command.environment.get("HOME") or Path.home()) / name.removeprefix(f"{HOME}/")
            told = joined(settings_in(own), told)
            lend_home(folder / name, own)
        write_file(folder / name, json.dumps(told, indent=1).encode())
    environment = command.environment | {LASTING: facts["{token}"]}
    for name, value in program.mcp_environment.items():
        told = filled(value, facts)
        environment[name] = told if isinstance(told, str) else json.dumps(joined(json.loads(environment[name]), told))
    first, *others = command.argv
    apart = words_apart(program, root)
    argv = [first, *apart, *filled(list(program.mcp_argv), facts), *others, *filled(list(program.mcp_last), facts)]
    return msgspec.structs.replace(command, argv=argv, environment=environment)


def words_apart(program: Program, root: Path) -> list[str]:
    """What keeps the program from a server that the user's sessions in this repository have under our name."""
    name, text, words = program.mcp_apart
    try:
        joins = bool(name) and text in (root / name).read_text("utf-8", "replace")
    except OSError:
        return []
    return [word.replace("{root}", json.dumps(str(root))) for word in words] if joins else []


def filled(value: Any, facts: dict[str, str]) -> Any:
    """``value`` with the placeholders of its texts filled in."""
    if isinstance(value, dict):
        return {name: filled(item, facts) for name, item in value.items()}
    if isinstance(value, list):
        return [filled(item, facts) for item in value]
    if isinstance(value, str):
        for name, fact in facts.items():
            value = value.replace(name, fact)
    return value


def joined(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Two objects as one, lists in both one behind the other; of any other field in both, ours."""
    both = dict(theirs)
    for name, value in ours.items():
        known = theirs.get(name)
        if isinstance(value, dict) and isinstance(known, dict):
            both[name] = joined(known, value)
        else:
            both[name] = known + value if isinstance(value, list) and isinstance(known, list) else value
    return both


def settings_in(path: Path) -> dict[str, Any]:
    """The object in a file of settings; empty where there is none. Lines of comment are passed over. Raises
    ValueError.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(error.strerror) from None
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("//")]
    settings = json.loads("\n".join(lines) or "{}")
    if not isinstance(settings, dict):
        raise ValueError("it is no object")
    return settings


def lend_home(settings: Path, own: Path) -> None:
    """Make the folder of ``settings``, with links to all that lies beside the user's ``own`` (logins, memory)."""
    for folder in (*reversed(settings.parent.parents), settings.parent):
        folder.mkdir(mode=0o700, exist_ok=True)  # with ``parents`` those above would go by the umask
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(own.parent):
            if name != own.name:
                (settings.parent / name).symlink_to(own.parent / name)

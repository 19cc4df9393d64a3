"""Tables of commands, as the plugins beside this file have them: a row of Command each, added by ``add_commands``."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from msgspec import Struct

from cco_sidecar import StartError, flag_of, iso
from cco_sidecar_plugins._program import reading
from cco_sidecar_plugins.commands._printing import tell_of_terminal

FORMATS = ("table", "json", "csv")
CLIENT_OPTIONS = ("url", "format", "root", "project", "storage", "jwt_secret", "plugins", "no_plugins")


class Command(Struct, frozen=True):
    """A row of a table of commands. One without ``run`` is a group, whose commands are rows named "group command".

    ``run`` gets the parsed arguments and returns the exit code; ``options`` are those of ours that it takes, and given
    another one it is refused; ``formats`` are what --format may say, the default first; ``section`` is where the help
    lists it, if it has ``help``; "" for one that only programs type.
    """

    help: str
    run: Callable[[argparse.Namespace], int] | None = None
    arguments: Sequence[tuple[tuple[str, ...], dict[str, Any]]] = ()
    formats: Sequence[str] = FORMATS
    options: Collection[str] = CLIENT_OPTIONS
    section: str = "More"


def arg(*names: str, **keywords: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """An argument of a command, as ``add_argument`` of argparse takes it."""
    return names, keywords


def number(least: float, most: float = 1e15, kind: type = int) -> Callable[[str], Any]:
    """Reads a number of an option, in the digits 0 to 9. What argparse calls raises ArgumentTypeError."""
    what, shape = ("whole number", r"-?\d{1,16}") if kind is int else ("number", r"-?\d{1,16}(\.\d{1,16})?")

    def read(text: str) -> Any:
        if not re.fullmatch(shape, text, re.ASCII) or not least <= kind(text) <= most:
            limits = f"from {least:g} to {most:.16g}" if most < 1e15 else f"from {least:g} on"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what} {limits}")
        return kind(text)

    return read


def time_ago(text: str) -> str:
    """Reads where a list begins: 90s, 30m, 1h and 2d are so long ago; anything else stays as it is."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text, re.ASCII)
    return iso(time.time() - int(found[1]) * UNITS[found[2]]) if found else text


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def text_or_input(text: str) -> str:
    """Reads an option of free text or JSON: ``-`` stands for what comes on standard input, whose last newlines are left
    out, as the shell does with what a command prints.
    """
    if text != "-":
        return text
    content = standard_input()
    try:
        return content.decode(json.detect_encoding(content)).rstrip("\r\n")
    except ValueError:
        raise argparse.ArgumentTypeError("standard input is no text in UTF-8, UTF-16 or UTF-32") from None


def standard_input() -> bytes:
    """All of standard input. Raises StartError the second time, and where it cannot be read."""
    if sys.stdin.closed:
        raise StartError("- stands for standard input, which can be read once")
    tell_of_terminal("standard input is read, so type it here")
    with sys.stdin, reading():
        return sys.stdin.buffer.read()


def add_commands(commands: Any, table: dict[str, Command]) -> None:
    """Add the rows of ``table`` to what ``register_commands`` got; a command that is there already stays."""
    for name, row in table.items():
        group, _, word = name.rpartition(" ")
        place = commands.choices[group].commands if group else commands
        if word not in place.choices:
            listed: dict[str, Any] = {"help": row.help, "description": row.help} if row.help else {}
            parser = place.add_parser(word, **listed)
            for names, keywords in row.arguments:
                parser.add_argument(*names, **keywords)
            settle(parser, row, commands)


def settle(parser: Any, row: Command, commands: Any) -> None:
    """Have a command's parser do what its row says."""
    parser.row = row
    if row.run is None:
        parser.add_group().more = commands.more
        return
    parser.set_defaults(run=row.run)
    needed = [
        (*action.option_strings[-1:], str(action.metavar or action.dest.upper()))
        for action in parser._actions
        if action.required
    ]
    places = [f"[{action.metavar}]" for action in parser._actions if not (action.option_strings or action.required)]
    parser.usage = " ".join(["%(prog)s", *itertools.chain(*needed), *places, "[options]"])
    if "url" in row.options:
        more = [flag_of(name) for name in row.options if name not in CLIENT_OPTIONS]
        also = f". Also {', '.join(more)}" if 0 < len(more) < 5 else ". Also the options of cco serve" if more else ""
        shown = f"{'|'.join(row.formats)} (default: {row.formats[0]})" if row.formats[1:] else row.formats[0]
        parser.epilog = f"Connection: --url URL, --format {shown}, --root DIR, --storage DIR{also}"

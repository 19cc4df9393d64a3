"""What commands print with: --format's JSON, CSV and tables, tables that fit into the terminal, YAML for people."""

from __future__ import annotations

import argparse
import codecs
import csv
import json
import math
import os
import re
import select
import shutil
import stat
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TextIO

from cco_sidecar import GOOD
from cco_sidecar_plugins._program import drop_unwritten
from cco_sidecar_plugins._terminal import printable

# -- on standard error


def tell(text: str) -> None:
    """Write on standard error; what a full disk does not take goes nowhere: it changes nothing of what is done. Raises
    BrokenPipeError where its reader has gone.
    """
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BrokenPipeError:
        raise
    except OSError:
        drop_unwritten(sys.stderr)


def tell_of_terminal(words: str) -> None:
    """Say what a command waits for where its standard input is a terminal."""
    if sys.stdin.isatty():
        tell(f"cco: {words}; {'Ctrl-Z and Enter end' if os.name == 'nt' else 'Ctrl-D ends'} it\n")


# -- on standard output


def reader_poll() -> Callable[..., list[Any]] | None:
    """Waits until the reader of a pipe goes, or so many milliseconds; what is returned is empty where it has not. None
    where standard output is no pipe.
    """
    try:
        is_pipe = stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode)
    except OSError:  # it is closed, or no file of the system's
        return None
    if not is_pipe or not hasattr(select, "poll"):
        return None
    reader = select.poll()
    reader.register(sys.stdout.fileno(), 0)  # for what is told unasked: that it is gone
    return reader.poll


# -- as --format says


def show(options: argparse.Namespace, answer: Any, rows: str | None = None) -> int:
    """Print an answer as --format wants it; ``rows`` names the list in it that a table shows. A table of one thing
    leaves out what is null, and has a line for each text of a list.
    """
    if options.format == "json":
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return GOOD
    if rows:
        table = [flatten(row) for row in answer[rows]]
    elif options.format == "csv":
        table = [{"field": key, "value": value} for key, value in flatten(answer).items()]
    else:
        texts = {key: value if is_texts(value) else [value] for key, value in flatten(answer).items()}
        table = [
            {"field": "" if number else key, "value": value}
            for key, values in texts.items()
            for number, value in enumerate(values)
            if value is not None
        ]
    columns = list(dict.fromkeys(key for row in table for key in row))
    lines = [[cell(row.get(column, "")) for column in columns] for row in table]
    if options.format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([columns, *lines] if columns else [])
    else:
        print_table(columns, lines)
    return GOOD


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, dict) and item else {f"{prefix}{key}": item}
    return flat


def cell(value: Any) -> str:
    return printable(
        value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    )


def print_table(columns: list[str], lines: list[list[str]]) -> None:
    lines = [[*map(shortened, line[:-1]), *line[-1:]] for line in lines]
    widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    for line in [[column.upper() for column in columns], *lines] if columns else []:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    if not lines:
        print("(none)")


def duration(seconds: float) -> str:
    """A time as people say it, in the unit that keeps it short."""
    if seconds < 120:
        return f"{seconds:.{int(seconds < 9.95)}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def shortened(text: str) -> str:
    """At most 60 characters; a path keeps its end, which tells it from others."""
    if len(text) <= 60:
        return text
    return "…" + text[-59:] if text.startswith("/") else text[:59] + "…"


# -- YAML 1.2, which YAML 1.1 readers such as PyYAML read alike

PLAIN = re.compile(r"[A-Za-z_](?:[A-Za-z0-9_./@+,()-]| (?! ))*(?<! )")
WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}  # no strings, without quotes
# What a YAML stream must not hold, and what it takes for the end of a line beside \n.
SPECIAL = "[^\n\t\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
NOT_ASCII = "[^\n\t\x20-\x7e]"
LONGEST_KEY = 1000  # characters; readers refuse a key of more than 1024 before its colon


def special() -> re.Pattern[str]:
    """What is written as an escape, for standard output's encoding."""
    return re.compile(SPECIAL if speaks_unicode(sys.stdout) else NOT_ASCII)


def yaml_lines(value: Any, indent: str = "") -> Iterator[str]:
    """The lines of a YAML document that holds ``value``, which is as JSON gives it."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            name = yaml_scalar(str(key))
            if len(name) > LONGEST_KEY:
                yield f"{indent}? {name}\n"
            yield from yaml_value(f"{indent}:" if len(name) > LONGEST_KEY else f"{indent}{name}:", item, indent)
    elif isinstance(value, list) and value:
        for item in value:
            lines = yaml_lines(item, indent + "  ") if is_nested(item) else yaml_value(f"{indent}-", item, indent)
            yield indent + "- " + next(lines)[len(indent) + 2 :]
            yield from lines
    else:
        yield from yaml_value("", value, indent)


def is_nested(value: Any) -> bool:
    return isinstance(value, (dict, list)) and bool(value)


def yaml_value(start: str, value: Any, indent: str) -> Iterator[str]:
    """The lines of a value after ``start``: a key with its colon, a dash, or nothing."""
    if is_nested(value):
        yield start + "\n"
        yield from yaml_lines(value, indent + "  ")
    elif isinstance(value, str) and "\n" in value.strip("\n") and not special().search(value):
        leading = "2" if value[0] in " \t\n" else ""  # how far the text is indented cannot be seen on its first line
        trailing = "+" if value.endswith("\n\n") else "" if value.endswith("\n") else "-"
        yield f"{start} |{leading}{trailing}\n".lstrip(" ") if not start else f"{start} |{leading}{trailing}\n"
        yield from (f"{indent}  {line}\n" if line else "\n" for line in value.removesuffix("\n").split("\n"))
    else:
        yield f"{start} {yaml_scalar(value)}\n" if start else f"{yaml_scalar(value)}\n"


def yaml_scalar(value: Any) -> str:
    """A value on one line; strings in quotes where they would be read as something else."""
    if isinstance(value, str):
        if PLAIN.fullmatch(value) and value.lower() not in WORDS:
            return value
        return special().sub(escape, json.dumps(value, ensure_ascii=False))
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    text = json.dumps(value)
    return (
        text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text
    )  # YAML 1.1 takes 1e+16 for a string


def escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


# -- tables

NARROW, LAST = 10, 20  # what a column may be cut down to, and the last one, which has the most to say


def print_fitted(
    columns: Sequence[str], lines: list[list[str]], *, whole: Sequence[str] = (), spare: Sequence[str] = ()
) -> list[int]:
    """Print a table that is no wider than the terminal, or than 120 columns where there is none; the numbers of lines
    that were cut.

    Columns are cut; ``whole`` ones and titles are not, and ``spare`` ones are left out instead.
    """
    if not lines:
        print("(none)")
        return []
    space = shutil.get_terminal_size((120, 24)).columns
    space = space if sys.stdout.isatty() else min(space, 120)
    rows = [dict(zip(columns, map(cell, line), strict=True)) for line in lines]
    widths = {name: min(space, max(len(name), *(width_of(row[name]) for row in rows))) for name in columns}
    least = {name: max(len(name), LAST if name == columns[-1] else NARROW) for name in columns}
    least |= {name: widths[name] for name in columns if name in (*whole, *spare) or widths[name] < least[name]}
    for name in spare:
        if line_width(least.values()) > space and name in least:
            del least[name], widths[name]
    while line_width(widths.values()) > space and widths != least:
        widths[max(least, key=lambda name: (widths[name] > least[name], widths[name]))] -= 1
    for row in [{name: name.upper() for name in columns}, *rows]:
        print(cut("  ".join(pad(row[name], width) for name, width in widths.items()).rstrip(), space))
    too_wide = line_width(widths.values()) > space
    return [
        number
        for number, row in enumerate(rows)
        if too_wide or any(width_of(row[name]) > widths[name] for name in widths)
    ]


def line_width(widths: Collection[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def width_of(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return len(text) if text.isascii() else sum(map(character_width, text))


def character_width(character: str) -> int:
    return 0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int) -> str:
    """The text, shortened to ``width`` columns where it is wider."""
    if width_of(text) <= width:
        return text
    taken, used = "", 0
    for character in text:
        used += character_width(character)
        if used > width - 1:
            break
        taken += character
    return taken.rstrip("… ") + "…"  # a cell of a row that is cut may be cut already


def pad(text: str, width: int) -> str:
    text = cut(text, width)
    return text + " " * (width - width_of(text))


def speaks_unicode(stream: TextIO) -> bool:
    """Whether ``stream`` can write all that JSON and YAML hold, in an encoding that their readers recognize."""
    return codecs.lookup(stream.encoding or "ascii").name.startswith(("utf-8", "utf-16", "utf-32"))

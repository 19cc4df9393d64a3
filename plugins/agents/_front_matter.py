"""Front matter of Markdown files for cco_sidecar: the few fields that are wanted, without a library for YAML.

Texts are read as YAML 1.2 has them: plain, in single or double quotes, literal (``|``) and folded (``>``). Other fields
are passed over, and so are numbers' and dates' meanings: every value is text. Plain text may hold ``: ``, which YAML
forbids and the programs that these files are for take.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from cco_sidecar_plugins._patterns import late_pattern

ESCAPES = {
    "0": "\0", "a": "\a", "b": "\b", "t": "\t", "\t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r", "e": "\x1b",
    "N": "\x85", "_": "\xa0", "L": "\u2028", "P": "\u2029",
} | {sign: sign for sign in ' "/\\'}  # fmt: skip
FIELD = late_pattern(r"([A-Za-z_][\w.-]*|\"[\w.-]+\"|'[\w.-]+')[ \t]*:(?:[ \t]+(.*)|)\Z")
BLOCK = late_pattern(r"[|>](?:([1-9])?([+-])?|([+-])([1-9]))(?:[ \t]+#.*|[ \t]*)\Z")
BREAKS = re.compile(r"[ \t]*+\n((?:[ \t]*\n)*)[ \t]*|[ \t]++")  # the second, so that long blanks are looked at once
IN_DOUBLE = late_pattern(
    r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|\n((?:[ \t]*\n)*)[ \t]*|(.))|" + BREAKS.pattern
)
NOTHING = ("", "~", "null", "Null", "NULL")


def read_front_matter(text: str, wanted: tuple[str, ...]) -> dict[str, str]:
    """The wanted fields of the front matter of ``text`` that are there; none where it has no front matter. Raises
    ValueError, which names the line, where they cannot be read.
    """
    found = {}
    for name, number, lines in fields_of(text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")):
        if name in found:
            raise ValueError(f"line {number}: {name} is there twice")
        found[name] = ""
        if name in wanted:
            try:
                found[name] = scalar(lines)
            except ValueError as error:
                raise ValueError(f"line {number}: {name}: {error}") from None
    return {name: value for name, value in found.items() if name in wanted}


def fields_of(text: str) -> Iterator[tuple[str, int, list[str]]]:
    """(name, number of its line, what stands behind its colon and the lines below it) of each field."""
    lines = text.split("\n")
    if lines[0].rstrip() != "---":
        return
    ends = [number for number, line in enumerate(lines) if number and line.rstrip() in ("---", "...")]
    if not ends:
        raise ValueError("line 1: the front matter has no end")
    name, number, own = "", 1, [""]
    for at, line in enumerate(lines[1 : ends[0]], 2):
        if name and (not line.strip() or line[0] in " \t" or line.startswith(("- ", "#")) or line == "-"):
            own.append(line)
        elif match := FIELD.match(line):
            if name:
                yield name, number, own
            name, number, own = match[1].strip("\"'"), at, [match[2] or ""]
        elif line.strip() and line[0] != "#":
            raise ValueError(f"line {at}: it is no field")
    if name:
        yield name, number, own


def scalar(lines: list[str]) -> str:
    """The text that a field's lines hold. Raises ValueError."""
    first = lines[0].strip(" \t\n")
    if first.startswith(("|", ">")):
        return block(first, lines[1:])
    while len(lines) > 1 and lines[-1][:1] in ("", "#"):
        lines.pop()  # comments between fields
    if not first or first.startswith("#"):
        lines = list(
            itertools.dropwhile(lambda line: not line.strip(" \t\n") or line.strip(" \t\n")[0] == "#", lines)
        ) or [""]
        first = lines[0].strip(" \t\n")
        if first.startswith(("|", ">")) or re.match(r"-(\s|\Z)", first) or FIELD.match(first):
            raise ValueError("it is no text")
    if first.startswith('"'):
        return double_quoted(quoted(lines, r'"((?:[^"\\]|\\.)*)"'))
    if first.startswith("'"):
        return fold(quoted(lines, r"'((?:[^']|'')*)'")).replace("''", "'")
    return plain(lines)


def quoted(lines: list[str], form: str) -> str:
    if any(line[:1] in ("-", "#") for line in lines[1:]):
        raise ValueError("its lines are not indented")
    match = re.match(form + r"\s*(?:(?<=\s)#[^\n]*(?:\n\s*|\Z))*\Z", "\n".join(lines).lstrip(" \t\n"), re.DOTALL)
    if not match:
        raise ValueError("its quotes do not end it")
    return match[1]


def double_quoted(text: str) -> str:
    def read(match: re.Match[str]) -> str:
        short, middle, long, joined, sign, breaks = match.groups()
        if code := short or middle or long:
            return chr(int(code, 16))  # ValueError above U+10FFFF
        if joined is not None:
            return "\n" * joined.count("\n")
        if sign is not None and sign not in ESCAPES:
            raise ValueError(f"\\{sign} means nothing")
        return ESCAPES[sign] if sign is not None else folded(breaks, match)

    return IN_DOUBLE.sub(read, text)


def fold(text: str) -> str:
    """``text`` with a blank for each end of a line, and an end of a line for each empty line."""
    return BREAKS.sub(lambda match: folded(match[1], match), text)


def folded(breaks: str | None, match: re.Match[str]) -> str:
    return match[0] if breaks is None else "\n" * breaks.count("\n") or " "


def plain(lines: list[str]) -> str:
    kept = []
    for number, line in enumerate(lines):
        if number and line[:1] in ("-", "#"):
            raise ValueError("its lines are not indented")
        text, comment = re.fullmatch(r"(.*?)((?:(?<![^ \t]))#.*)?", line.strip(" \t\n"), re.DOTALL).groups()  # type: ignore
        kept.append(text.strip(" \t\n"))
        if comment is not None:
            if any(rest.strip(" \t\n") and rest.strip(" \t\n")[0] != "#" for rest in lines[number + 1 :]):
                raise ValueError("text goes on after a comment")
            break
    text = fold("\n".join(kept).strip(" \t\n"))
    if text[:1] in tuple(",[]{}&*!|>%@`") or re.match(r"[?-](\s|\Z)", text):
        raise ValueError(f"it is no text: it begins with {text[0]}")
    return "" if text in NOTHING else text


def block(header: str, lines: list[str]) -> str:
    """A literal or folded text, as PyYAML reads it."""
    match = BLOCK.match(header)
    if not match:
        raise ValueError(f"{header[:20]!r} is no text")
    given, chomping = match[1] or match[4], match[2] or match[3] or ""
    while lines and lines[-1].startswith("#"):
        lines = lines[:-1]  # a comment between fields
    indents = [len(line) - len(line.lstrip(" ")) for line in lines if line.strip(" ")]
    indent = int(given) if given else indents[0] if indents else max([1, *(len(line) for line in lines)])
    leading = max((len(line) for line in itertools.takewhile(lambda line: not line.strip(" "), lines)), default=0)
    if indent < 1 or (indents and (min(indents) < indent or leading > indent)):
        raise ValueError("its lines are not indented alike")
    rows = [line[indent:] for line in lines]
    last = max((number for number, row in enumerate(rows) if row), default=-1)
    parts: list[str] = []
    pending = 0
    for number, row in enumerate(rows[: last + 1]):
        if not row:
            pending += 1
            continue
        if parts:
            before = next(rows[at] for at in range(number - 1, -1, -1) if rows[at])
            folds = header[0] == ">" and before[0] not in " \t" and row[0] not in " \t"
            parts.append((" " if not pending else "") if folds else "\n")
        parts.append("\n" * pending + row)
        pending = 0
    end = "" if chomping == "-" or last < 0 else "\n"
    return "".join(parts) + end + "\n" * (len(rows) - 1 - last if chomping == "+" else 0)

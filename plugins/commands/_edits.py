"""Additions of cco_sidecar to settings files, as text: what stands there stays as it is, byte for byte.

JSON may have comments and commas at the end of lists. An addition is one piece of text, put in at one place; taking it
away takes that piece out, and where somebody has written around it or has the file written anew, the member alone.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from msgspec import Struct

from cco_sidecar_plugins._patterns import late_pattern

Path = tuple[str, ...]
Addition = tuple[Path, Any]  # keys from the top; what is appended to a list has the list's own path and the key "+",
# and a whole file of ours has none
APPENDED = "+"


class NotEditable(ValueError):
    """Why a file cannot be edited."""


def add(name: str, text: str, addition: Addition) -> tuple[str, str]:
    """(the new text, the piece that was put in; "" where it is there already). Raises NotEditable."""
    if addition[0]:
        return add_toml(text, addition) if name.endswith(".toml") else add_json(text or "{}\n", addition)
    if text not in ("", addition[1]):
        raise NotEditable("it is there already, with another content")
    return addition[1], "" if text else addition[1]


def take(name: str, text: str, additions: list[Addition], pieces: list[str]) -> str | None:
    """``text`` without the additions, None where the file goes with them. Raises NotEditable."""
    if not additions:
        return text
    if additions[0][0]:
        return (take_toml if name.endswith(".toml") else take_json)(text, additions, pieces)
    if text != additions[0][1]:
        raise NotEditable("it was changed since: remove it by hand")
    return None


def says_nothing(name: str, text: str, additions: list[Addition]) -> bool:
    """Whether a settings file has no comment, and nothing but empty containers in which ``additions`` stood."""
    if name.endswith(".toml"):
        return not text.strip()
    try:
        value = json.loads(text)
    except ValueError:  # such as one with comments, which say something
        return False
    made = {path[:depth] for path, _ in additions for depth in range(len(path))}

    def is_empty(value: Any, path: Path = ()) -> bool:
        if path == ("$schema",):
            return True
        if isinstance(value, dict):
            return path in made and all(is_empty(item, (*path, key)) for key, item in value.items())
        return path in made and value == []

    return is_empty(value)


# -- JSON


class Node(Struct):
    """A value in a text, from ``start`` to ``end``. ``parts`` are (key, where it begins, value) of an object or list;
    ``comma`` is where a comma behind the last one ends, else 0.
    """

    value: Any
    start: int
    end: int
    parts: list[tuple[str, int, Node]] = []
    comma: int = 0


SPACE = late_pattern(r"(?:[ \t\r\n\ufeff]|//[^\n]*|/\*.*?\*/)*+", re.DOTALL)
SCALAR = late_pattern(r'"(?:[^"\\\x00-\x1f]|\\.)*+"|-?[0-9][0-9.eE+-]*|true|false|null')


def parse(text: str) -> Node:
    """The value of a JSON text that may have comments. Raises NotEditable."""
    try:
        node, end = value_at(text, skip(text, 0))
    except RecursionError:
        raise NotEditable("it is nested too deeply") from None
    if skip(text, end) != len(text):
        raise NotEditable(f"line {line_at(text, end)}: something follows the value")
    return node


def skip(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return match.end() if match else at


def line_at(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def value_at(text: str, at: int) -> tuple[Node, int]:
    if text[at : at + 1] in ("{", "["):
        return compound_at(text, at)
    match = SCALAR.match(text, at)
    try:
        value = json.loads(match[0]) if match else None
    except ValueError:
        match = None
    if not match:
        raise NotEditable(f"line {line_at(text, at)}: it is no JSON")
    return Node(value, at, match.end()), match.end()


def compound_at(text: str, start: int) -> tuple[Node, int]:
    is_object = text[start] == "{"
    node, at = Node({} if is_object else [], start, start), skip(text, start + 1)
    while text[at : at + 1] != ("}" if is_object else "]"):
        if node.parts and not node.comma:
            raise NotEditable(f"line {line_at(text, at)}: a comma is missing")
        began, key = at, ""
        if is_object:
            name, at = value_at(text, at)
            at = skip(text, at)
            if not isinstance(name.value, str) or text[at : at + 1] != ":":
                raise NotEditable(f"line {line_at(text, at)}: it is no member of an object")
            if name.value in node.value:
                raise NotEditable(f"line {line_at(text, began)}: {name.value!r} is there twice")
            key, at = name.value, skip(text, at + 1)
        part, at = value_at(text, at)
        node.parts.append((key, began, part))
        if is_object:
            node.value[key] = part.value
        else:
            node.value.append(part.value)
        at, node.comma = skip(text, at), 0
        if text[at : at + 1] == ",":
            node.comma = at + 1
            at = skip(text, at + 1)
    node.end = at + 1
    return node, at + 1


def find(node: Node, path: Path) -> tuple[Node, Path]:
    """The deepest value on ``path`` that is there, and the keys that are left."""
    for number, key in enumerate(path):
        part = next((part for name, _, part in node.parts if name == key and isinstance(node.value, dict)), None)
        if part is None:
            return node, path[number:]
        node = part
    return node, ()


def add_json(text: str, addition: Addition) -> tuple[str, str]:
    """(the new text, the piece that was put in; "" where it is there already). Raises NotEditable."""
    path, value = addition
    node, rest = find(parse(text), path)
    if not rest:
        if node.value == value:
            return text, ""
        raise NotEditable(f"{'.'.join(path)} is there already, with another value")
    if rest == (APPENDED,) and isinstance(node.value, list):
        if value in node.value:
            return text, ""
        member = rendered(value)
    elif isinstance(node.value, dict) and rest[0] != APPENDED:
        for key in reversed(rest[1:]):
            value = [value] if key == APPENDED else {key: value}
        member = f"{json.dumps(rest[0])}: {rendered(value)}"
    else:
        raise NotEditable(f"{'.'.join(path[: len(path) - len(rest)]) or 'its value'} is of another kind than ours")
    return put_in(text, node, member)


def rendered(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def put_in(text: str, node: Node, member: str) -> tuple[str, str]:
    newline = "\r\n" if "\r\n" in text else "\n"
    outer = indent_at(text, node.start)
    in_lines = not node.parts or "\n" in text[node.start : node.end]
    inner = indent_at(text, node.parts[0][1]) if node.parts and in_lines else outer + "  "
    member = member.replace("\n", newline + inner)
    if node.parts:
        at = node.comma or node.parts[-1][2].end
        piece = ("" if node.comma else ",") + (newline + inner if in_lines else " ") + member
    else:
        at = node.start + 1
        closes = "\n" in text[at : node.end] and not text[at : node.end - 1].strip()
        piece = newline + inner + member + ("" if closes else newline + outer)
    return text[:at] + piece + text[at:], piece


def indent_at(text: str, at: int) -> str:
    match = re.match(r"[ \t]*", text[text.rfind("\n", 0, at) + 1 :])
    return match[0] if match else ""


def take_json(text: str, additions: list[Addition], pieces: list[str]) -> str:
    """``text`` without the additions. Raises NotEditable."""
    wanted = without(parse(text).value, additions)
    taken = text
    for piece in reversed(pieces):
        if piece and taken.count(piece) == 1:
            taken = taken.replace(piece, "")
    try:
        if parse(taken).value == wanted or (pieces and without(parse(taken).value, additions) == parse(taken).value):
            return taken
    except NotEditable:  # somebody wrote behind our piece
        pass
    for addition in additions:
        text = take_member(text, addition)
    return text


def without(value: Any, additions: list[Addition]) -> Any:
    """The value without what the additions name; containers stay."""
    value = copy.deepcopy(value)
    for path, ours in additions:
        inner = value
        for key in path[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if path[-1] == APPENDED and isinstance(inner, list):
            inner[:] = [item for item in inner if item != ours]
        elif isinstance(inner, dict):
            inner.pop(path[-1], None)
    return value


def value_of(value: Any, path: Path) -> Any:
    """What stands at the end of ``path``; None where nothing does."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def take_member(text: str, addition: Addition) -> str:
    path, ours = addition
    node, rest = find(parse(text), path[:-1])
    if rest:
        return text
    for number, (key, began, part) in enumerate(node.parts):
        listed = isinstance(node.value, list) and path[-1] == APPENDED and part.value == ours
        if listed or (isinstance(node.value, dict) and key == path[-1]):
            if number:
                start, end = node.parts[number - 1][2].end, part.end
            elif len(node.parts) > 1:
                start, end = began, node.parts[1][1]
            else:
                start, end = node.start + 1, node.end - 1
            return text[:start] + text[end:]
    return text


# -- TOML


def add_toml(text: str, addition: Addition) -> tuple[str, str]:
    """A table at the end. Raises NotEditable."""
    path, value = addition
    there = value_of(tables(text), path)
    if there == value:
        return text, ""
    if there is not None:
        raise NotEditable(f"{'.'.join(path)} is there already, with another value")
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = [f"[{'.'.join(path)}]", *(f"{key} = {json.dumps(item, ensure_ascii=False)}" for key, item in value.items())]
    piece = (newline if text and not text.endswith("\n") else "") + (newline if text else "")
    piece += newline.join(lines) + newline
    if value_of(tables(text + piece), path) != value:  # raises where an inline table of that name takes no more
        raise NotEditable(f"{'.'.join(path[:-1])} is of another kind than ours")
    return text + piece, piece


def tables(text: str) -> dict[str, Any]:
    import tomllib  # here alone: where no file is TOML the start does without

    try:
        return tomllib.loads(text.removeprefix("\ufeff").replace("\r\n", "\n"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise NotEditable(str(error)) from None


def take_toml(text: str, additions: list[Addition], pieces: list[str]) -> str:
    """``text`` without the additions, and without what somebody wrote into their tables. Raises NotEditable."""
    wanted = without(tables(text), additions)
    taken = text
    for piece in reversed(pieces):
        if piece and taken.count(piece) == 1:
            taken = taken.replace(piece, "")
    if not is_toml_of(taken, wanted):  # somebody wrote behind our piece, or into it
        taken = text
        for path, _ in additions:
            header = rf"\[\[?{re.escape('.'.join(path))}(?:\.[^\]\n]*)?\]"
            taken = re.sub(rf"(?m)^{header}[^\n]*\n?(?:(?!\s*\[)[^\n]*(?:\n|\Z))*", "", taken)
    if not is_toml_of(taken, wanted):
        raise NotEditable("our table was moved: take it away by hand")
    return taken


def is_toml_of(text: str, wanted: dict[str, Any]) -> bool:
    """Whether a text says what is wanted; of tables that are empty it may be silent."""
    try:
        left = tables(text)
    except NotEditable:
        return False
    return left in (wanted, {key: item for key, item in wanted.items() if item != {}})

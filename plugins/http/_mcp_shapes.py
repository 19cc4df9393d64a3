"""The arguments of tools: types made of those of the API, their JSON Schemas, and pages of text.

A schema says the simplest form that is accepted, without references, patterns and null, which not every program takes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from cco_sidecar import ApiError, convert
from cco_sidecar_plugins._words import did_you_mean
from cco_sidecar_plugins.http.choices import name_choices
from cco_sidecar_plugins.http.openapi import refined, words_for

PAGE = 10_000  # bytes of a tool's answer, which reach every program whole
NOTE = 150  # of them for the last line, which says how to go on
PASSED_OVER = frozenset({"wait_for_previous"})  # gemini lets its model say this to any tool


def arguments_of(
    name: str, source: type[Struct], picked: str = "", without: str = "", **own: Any
) -> Callable[[], type[Struct]]:
    """Gives, made when it is first asked for, a type of a tool's arguments: the fields of ``source`` that are picked,
    or all but some, and ``own`` ones as (type, default), a type alone where there must be one.
    """

    @functools.cache
    def made() -> type[Struct]:
        table = {row.name: row for row in msgspec.structs.fields(source)}
        rows: dict[str, Any] = {}
        for field in picked.split() or [name for name in table if name not in without.split()]:
            row = table[field]
            if row.default is not msgspec.NODEFAULT:
                rows[field] = (row.type, row.default)
            elif row.default_factory is not msgspec.NODEFAULT:
                rows[field] = (row.type, msgspec.field(default_factory=row.default_factory))
            else:
                rows[field] = row.type
        rows |= own
        required = [(field, shape) for field, shape in rows.items() if not isinstance(shape, tuple)]
        optional = [(field, *shape) for field, shape in rows.items() if isinstance(shape, tuple)]
        return msgspec.defstruct(name, [*required, *optional], kw_only=True)

    return made


def checked(given: dict[str, Any], shape: type[Struct]) -> dict[str, Any]:
    """The arguments of a call that are none of null. Raises REQ_001, which names the bad one."""
    said = {name: value for name, value in given.items() if value is not None and name not in PASSED_OVER}
    known = shape.__struct_fields__
    for name in said:
        if name not in known:
            near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise ApiError("REQ_001", f"Unknown argument {name[:100]}{near}", details={"path": name[:100]})
    try:
        convert(said, shape)
    except ApiError as error:
        name_choices(error, shape)
        raise
    return said


def schema_of(shape: type[Struct], words: dict[str, str]) -> dict[str, Any]:
    """The JSON Schema of a tool's arguments; ``words`` describe fields that the API's document has no words for."""
    (whole,), parts = msgspec.json.schema_components([shape], ref_template="{name}")
    table = parts[whole["$ref"]]
    properties = {}
    for name, field in table["properties"].items():
        said = words.get(name) or words_for(shape.__name__, name)
        properties[name] = simple(field, parts) | ({"description": said} if said else {})
    required = {"required": table["required"]} if table.get("required") else {}
    return {"type": "object", "properties": properties, **required, "additionalProperties": False}


def simple(schema: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """The plainest form of a schema: of several choices the first that is not null."""
    if "$ref" in schema:
        return simple(parts[schema["$ref"]], parts)
    if "anyOf" in schema:
        choices = [choice for choice in schema["anyOf"] if choice != {"type": "null"}]
        return simple(choices[0], parts)
    kept = {name: value for name, value in refined(schema).items() if name not in LEFT_OUT and value != []}
    if kept.get("default", "") in (None, "", [], {}):
        kept.pop("default", None)
    if kept.get("type") == "array":
        kept["items"] = simple(schema["items"], parts) if schema.get("items") else {"type": "string"}
    if "properties" in kept:
        kept["properties"] = {name: simple(field, parts) for name, field in schema["properties"].items()}
    if isinstance(kept.get("additionalProperties"), dict):
        kept["additionalProperties"] = simple(schema["additionalProperties"], parts)
    return kept


LEFT_OUT = ("pattern", "title", "propertyNames")


# -- pages


def page_of(text: str, number: int) -> str:
    """A page of ``text``, from 1, with a last line that says how to go on. Raises REQ_001."""
    found = pages(text)
    if not 1 <= number <= len(found):
        raise ApiError("REQ_001", f"There is no page {number} of {len(found)} - at `$.page`", details={"path": "page"})
    more = f"; page={number + 1} goes on" if number < len(found) else ""
    return found[number - 1] + (f"\n[page {number} of {len(found)}{more}]" if len(found) > 1 else "")


def pages(text: str) -> list[str]:
    """``text`` in pieces that fit, cut at line ends, and in lines that are longer."""
    if len(text.encode("utf-8", "replace")) <= PAGE:
        return [text]
    found, lines, size = [], list[str](), 0
    for line in text.split("\n"):
        for piece in pieces(line, PAGE - NOTE):
            length = len(piece.encode("utf-8", "replace")) + 1
            if lines and size + length > PAGE - NOTE:
                found.append("\n".join(lines))
                lines, size = [], 0
            lines.append(piece)
            size += length
    return [*found, "\n".join(lines)]


def pieces(line: str, limit: int) -> list[str]:
    """A line in pieces of fewer than ``limit`` bytes, whole characters each."""
    if len(line.encode("utf-8", "replace")) < limit:
        return [line]
    width = (limit - 1) // 4  # characters of up to 4 bytes
    return [line[at : at + width] for at in range(0, len(line), width)]


def as_line(value: Any) -> str:
    """``value`` as one line of JSON, with blanks for readers."""
    return json.dumps(value, ensure_ascii=False)


def as_lines(value: Any) -> str:
    """``value`` as JSON, one value a line."""
    return json.dumps(value, ensure_ascii=False, indent=1)

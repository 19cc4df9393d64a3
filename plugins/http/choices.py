"""Refusals of a value say in words what may stand in its place, such as the few values of an event's ``priority``."""

from __future__ import annotations

import re
import typing
from typing import Any

from msgspec import inspect

from cco_sidecar import EVENT_TYPE_IN_WORDS, NAME_IN_WORDS, ApiError, Endpoint, EventType, Identifier, hookimpl
from cco_sidecar_plugins.agents import logs


@hookimpl
def part_class(base: type) -> type | None:
    return type("ChoiceEndpoint", (ChoiceEndpoint, base), {}) if issubclass(base, Endpoint) else None


class ChoiceEndpoint(Endpoint):
    def error_content(self, error: ApiError) -> bytes:
        name_choices(error, *filter(None, (self.query_type, self.body)))
        return super().error_content(error)


def name_choices(error: ApiError, *shapes: Any) -> None:
    """Have a refusal of what should be of one of ``shapes`` say in words what may stand in its place."""
    if refused := re.search(r"Invalid enum value (.*?)( - at `\$[^`]*`)?\Z", error.message, re.DOTALL):
        steps = path_steps(error.details.get("path", "") if isinstance(error.details, dict) else "")
        values = dict.fromkeys(value for shape in shapes for value in choices(inspect.type_info(shape), steps))
        if values:
            said = f"{refused[1]} is none of {', '.join(values)}{refused[2] or ''}"
            error.message = error.message[: refused.start()] + said
    for pattern, words in IN_WORDS.items():
        error.message = error.message.replace(f"Expected `str` matching regex {pattern!r}", words)


IN_WORDS = {
    typing.get_args(Identifier)[1].pattern: NAME_IN_WORDS,
    typing.get_args(EventType)[1].pattern: EVENT_TYPE_IN_WORDS,
    logs.SINCE: logs.SINCE_IN_WORDS,
}


def path_steps(path: str) -> list[str]:
    """``files[3].name`` as files, [3], name."""
    return re.findall(r"\[[^\]]*\]|[^.\[]+", path)


def choices(kind: inspect.Type, steps: list[str]) -> list[str]:
    """The texts that may stand where ``steps`` lead from a type, none where they are not a few."""
    if isinstance(kind, inspect.Metadata):
        return choices(kind.type, steps)
    if isinstance(kind, inspect.UnionType):
        return [value for each in kind.types for value in choices(each, steps)]
    if not steps:
        return list(map(str, kind.values)) if isinstance(kind, inspect.LiteralType) else []
    inner: list[inspect.Type] = []
    if isinstance(kind, inspect.StructType):
        inner = [field.type for field in kind.fields if field.encode_name == steps[0]]
    elif isinstance(kind, inspect.ListType):
        inner = [kind.item_type]
    elif isinstance(kind, inspect.DictType):
        inner = [kind.value_type]
    return [value for each in inner for value in choices(each, steps[1:])]

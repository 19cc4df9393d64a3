"""Refusals of a value that is none of a few, such as an event's ``priority``, name those that there are."""

from __future__ import annotations

import re
from typing import Any

from msgspec import inspect

from cco_sidecar import ApiError, Endpoint, hookimpl


@hookimpl
def part_class(base: type) -> type | None:
    return type("ChoiceEndpoint", (ChoiceEndpoint, base), {}) if issubclass(base, Endpoint) else None


class ChoiceEndpoint(Endpoint):
    def error_content(self, error: ApiError) -> bytes:
        for shape in (self.query_type, self.body):
            if shape:
                name_choices(error, shape)
        return super().error_content(error)


def name_choices(error: ApiError, shape: Any) -> None:
    """Have a refusal of what should be of ``shape`` say what may stand in its place, where that is one of a few."""
    refused = re.search(r"Invalid enum value (.*?)( - at `\$[^`]*`)?\Z", error.message, re.DOTALL)
    path = error.details.get("path", "") if isinstance(error.details, dict) else ""
    if refused and (values := choices(inspect.type_info(shape), path_steps(path))):
        said = f"{refused[1]} is none of {', '.join(values)}{refused[2] or ''}"
        error.message = error.message[: refused.start()] + said


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

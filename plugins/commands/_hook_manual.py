"""What ``cco plugins --hooks`` prints: each hook with what it takes and returns, and the fields of those types.

Read out of the specs in cco_sidecar and ``_hooks.py``, so that it says what a plugin is called with.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

import msgspec

from cco_sidecar import CATEGORIES, NAME_IN_WORDS, Priority, ResultSubmission, Settings
from cco_sidecar_plugins._hooks import SafeHooks
from cco_sidecar_plugins.http._answers import Event

DICTIONARIES: dict[str, type[msgspec.Struct]] = {  # what arguments hold that are dictionaries
    "result": ResultSubmission, "submission": ResultSubmission, "event": Event,
}  # fmt: skip

PLAIN = {  # types that have no fields
    "Argv": "A list of Text, one at least: a command's words.",
    "CategoryName": f"One of {', '.join(CATEGORIES)}.",
    "Environment": "A dict[str, Text] of variables by their names, which are not empty and hold no =.",
    "Identifier": f"A str: it {NAME_IN_WORDS}.",
    "Priority": f"One of {', '.join(typing.get_args(Priority))}.",
    "Sections": "A dict[str, Any] of a context's sections by their names.",
    "Text": "A str without zero bytes.",
}


def manual() -> dict[str, list[dict[str, Any]]]:
    """``hooks`` and ``types``, a row each."""
    hooks = []
    for name, spec in SafeHooks.SPECS.items():
        signature = inspect.signature(spec)
        takes = [argument(each) for each in list(signature.parameters.values())[1:]]
        hooks.append({"hook": name, "takes": takes, "returns": signature.return_annotation, "text": in_line(spec)})
    types = [
        {"type": kind.__name__, "fields": fields_of(kind), "text": in_line(kind)}
        for kind in dict.fromkeys(structs(specs_types()))
    ]
    types += [{"type": name, "fields": [], "text": text} for name, text in PLAIN.items()]
    return {"hooks": hooks, "types": types}


def argument(each: inspect.Parameter) -> str:
    kind = DICTIONARIES.get(each.name) if each.annotation.startswith("dict") else None
    return f"{each.name}: {each.annotation}{f' like {kind.__name__}' if kind else ''}"


def specs_types() -> list[Any]:
    """The types of all that hooks take and return."""
    found: list[Any] = list(DICTIONARIES.values())
    for name, spec in SafeHooks.SPECS.items():
        if name != "register_commands":  # whose argument is argparse's, which has no such type while it runs
            found += typing.get_type_hints(spec).values()
    return found


def structs(types: list[Any]) -> Iterator[type[msgspec.Struct]]:
    """Those of ``types``, and of what they are made of, that have fields which a plugin reads."""
    for kind in types:
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind is not Settings:
            yield kind
            yield from structs([field.type for field in msgspec.structs.fields(kind)])
        else:
            yield from structs(list(typing.get_args(kind)))


def fields_of(kind: type[msgspec.Struct]) -> list[str]:
    told: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        told |= inspect.get_annotations(base)
    return [f"{name}: {told[name]}" for name in kind.__struct_fields__]


def in_line(documented: Any) -> str:
    return " ".join((documented.__doc__ or "").split())  # getdoc would give a class without one its base's


def print_manual(told: dict[str, list[dict[str, Any]]]) -> None:
    for row in told["hooks"]:
        print(f"{row['hook']}({', '.join(row['takes'])}) -> {row['returns']}\n    {row['text']}\n")
    for row in told["types"]:
        print(f"{row['type']}: {row['text']}")
        print("".join(f"    {field}\n" for field in row["fields"]))

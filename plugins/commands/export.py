"""The command ``cco export``: an issue's whole story as one file, for readers who have no service."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cco_sidecar import GOOD, NAME_IN_WORDS, REFUSED, StartError, hookimpl, is_identifier, read_path
from cco_sidecar_plugins.commands._client import Client
from cco_sidecar_plugins.commands._table import Command, add_commands, arg


@hookimpl
def register_commands(commands: Any) -> None:
    add_commands(commands, {
        "export": Command("write an issue's whole story as one file", command_export, [
            arg("issue", metavar="ISSUE", help="issue id"),
            arg("-o", "--output", metavar="FILE", help="write it there (default: standard output)")],
            formats=("markdown", "json"), section="Agents and what they exchange"),
    })  # fmt: skip


def command_export(options: argparse.Namespace) -> int:
    if not is_identifier(options.issue):
        raise StartError(f"export: {options.issue!r} {NAME_IN_WORDS}")
    accept = "text/markdown" if options.format == "markdown" else "application/json"
    path = f"/api/issues/{options.issue}/export"
    story = Client(options).call("GET", path, query={"format": options.format}, accept=accept)
    text = story if isinstance(story, str) else json.dumps(story, indent=2, ensure_ascii=False) + "\n"
    if options.output is None:
        sys.stdout.write(text)
        return GOOD
    target = Path(read_path(options.output))
    try:
        target.write_bytes(text.encode("utf-8", "replace"))
    except OSError as error:
        raise StartError(f"--output: {options.output}: {error.strerror}", REFUSED) from None
    print(f"{options.issue} written to {options.output}")
    return GOOD

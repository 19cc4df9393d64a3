"""The shape of the module in figures, measured on its text and on four requests to a running service.

    python -m tests.house

Lines and bytes, the largest class and function, which share of the references between top-level names points down, and
how many of the module's functions each request enters (background work is left out).
"""

from __future__ import annotations

import ast
import asyncio
import json
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import cco_sidecar
from cco_sidecar import Hooks, Sidecar, load_hooks, load_settings
from tests.conftest import make_repository

MODULE = Path(cco_sidecar.__file__)
BACKGROUND = {  # what goes on beside any request
    "_watch", "_insist", "_wait", "tend", "sweep", "remove_events", "_sweep", "_sweep_for_ever", "retention_mark", "bury_expired", "delete_expired", "forget_old",
}  # fmt: skip
RESULT = {
    "agent_id": "a",
    "agent_type": "python-specialist",
    "issue_id": "i",
    "project_id": "p",
    "result": {"status": "success"},
}
REQUESTS: dict[str, tuple[str, str, Any]] = {
    "POST result": ("POST", "/api/results", RESULT),
    "wait": ("GET", "/api/events/wait/nothing?timeout=200", None),
    "context, built": ("GET", "/api/context/i/python-specialist?task=main", None),
    "context, hit": ("GET", "/api/context/i/python-specialist?task=main", None),
    "spawn": ("POST", "/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": "i", "task": "t"}),
}


def shape() -> Iterator[tuple[str, str]]:
    """(figure, value) of the module's text."""
    text = MODULE.read_text()
    tree = ast.parse(text)
    yield "lines", f"{text.count(chr(10)):,} of at most {max(map(len, text.splitlines()))} columns"
    yield "bytes", f"{len(text.encode()):,}"
    for kind, types in (("class", (ast.ClassDef,)), ("function", (ast.FunctionDef, ast.AsyncFunctionDef))):
        found = [node for node in ast.walk(tree) if isinstance(node, types)]
        spans = {f"{node.name}": (node.end_lineno or 0) - node.lineno + 1 for node in found}
        longest = max(spans, key=lambda name: spans[name])
        yield f"largest {kind}", f"{longest}, {spans[longest]} lines, of {len(found)}"
    yield "references that point down", f"{references_down(tree):.0%}"


def references_down(tree: ast.Module) -> float:
    """The share of references between top-level names whose target stands below; each pair counts once."""
    places: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            places[node.name] = node.lineno
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            places |= {
                name.id: node.lineno for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
    pairs = set()
    for node in tree.body:
        for name in ast.walk(node):
            if (
                isinstance(name, ast.Name)
                and isinstance(name.ctx, ast.Load)
                and places.get(name.id, node.lineno) != node.lineno
            ):
                pairs.add((node.lineno, places[name.id]))
    return sum(there > here for here, there in pairs) / len(pairs)


class Trace:
    """Which functions of the module were entered, in every thread, while it is on."""

    def __init__(self) -> None:
        self.entered: dict[str, None] = {}
        self._on = False
        threading.setprofile(self._note)  # for the threads to come

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if (
            self._on
            and event == "call"
            and code.co_filename == str(MODULE)
            and code.co_name[0] != "<"
            and code.co_name not in BACKGROUND
        ):
            self.entered[code.co_qualname] = None

    def __enter__(self) -> Trace:
        self.entered, self._on = {}, True
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        sys.setprofile(None)


def ask(url: str, token: str, method: str, path: str, body: Any) -> None:
    content = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(urllib.request.Request(url + path, content, headers, method=method), timeout=30).read()


async def walk(flags: dict[str, Any], trace: Trace) -> dict[str, int]:
    """How many functions each request enters."""
    settings = load_settings(flags, {})
    hooks: Hooks = load_hooks(settings)
    counts = {}
    async with Sidecar(settings, hooks) as sidecar:
        if starting := getattr(sidecar.contexts, "_starting", None):
            await starting  # the first look at the project is no part of a request
        await sidecar.results.prepared({})  # likewise the look at its language, once a minute
        token = sidecar.tokens.mint("walker", "chief-architect")
        for name, (method, path, body) in REQUESTS.items():
            with trace:
                await asyncio.to_thread(ask, sidecar.info.url, token, method, path, body)
            counts[name] = len(trace.entered)
    return counts


def main() -> None:
    for figure, value in shape():
        print(f"{figure:32} {value}")
    trace = Trace()
    for name, alone in (("alone", True), ("with plugins", False)):
        with tempfile.TemporaryDirectory() as folder:
            root = make_repository(Path(folder) / "repository")
            flags = {"root": str(root), "storage": f"{folder}/storage", "port": "0", "project": "p"}
            flags |= {
                "agent_command": '["/bin/sleep", "2"]',
                "stop_agents": True,
                "no_plugins": alone,
                "log_level": "error",
            }
            counts = asyncio.run(walk(flags, trace))
        print(
            f"{'functions entered, ' + name:32} {', '.join(f'{request} {number}' for request, number in counts.items())}"
        )


if __name__ == "__main__":
    main()

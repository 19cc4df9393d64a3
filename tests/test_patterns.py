"""No regular expression takes an endless time, whatever a client sends or a repository holds.

While one is searched for no other thread runs, so that a single text could hold up the whole service.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from conftest import ROOT
from msgspec import Struct

import cco_sidecar
from cco_sidecar import import_file

SIGNS = "a0_ ./-:@#,\"'\\=[\n"
TEXTS = [(one + other) * 60 + end for one in SIGNS for other in SIGNS for end in ("\x01", "+")]
WORD = re.compile(r"[A-Za-z]{2,}")  # of a pattern: what may lead to its slow part
SEARCHED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
sys.path.insert(0, sys.argv[1])
import test_patterns
for name, pattern in test_patterns.patterns():
    print(name, flush=True)
    test_patterns.search(pattern)
print("done")
"""


def modules() -> Iterator[types.ModuleType]:
    yield cco_sidecar
    for path in sorted((ROOT / "plugins").rglob("*.py")):
        yield import_file(path)


def patterns() -> Iterator[tuple[str, re.Pattern[Any]]]:
    """Those that modules and their classes keep, alone, in tables or as the method that uses them, and those that are
    written in one text where they are used.
    """
    seen = set()
    for module in modules():
        of_lines = [*vars(module).get("DEFINITIONS", {}).values(), *vars(module).get("IMPORTS", {}).values()]
        programs = vars(module).get("PROGRAMS", {}).values() if module.__name__.endswith("launchers") else ()
        of_lines += [[row.logged_out, row.offline, row.refused, row.follows[0]] for row in programs]
        file = Path(str(module.__file__))
        places = [module, *(kind for kind in vars(module).values() if isinstance(kind, type))]
        kept = [(name, patterns_in(value)) for place in places for name, value in vars(place).items()]
        for name, found in [
            *kept,
            ("in a call", written_in(file.read_text())),
            ("of lines", (re.compile(text, re.MULTILINE) for texts in of_lines for text in texts)),
        ]:
            for pattern in found:
                if (pattern.pattern, pattern.flags) not in seen:
                    seen.add((pattern.pattern, pattern.flags))
                    yield f"{file.name}: {name}: {pattern.pattern!r}", pattern


def written_in(source: str) -> Iterator[re.Pattern[Any]]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="re")), args=[ast.Constant(value=str(text)), *more]):
                words = " ".join(map(ast.unparse, [*more, *(keyword.value for keyword in node.keywords)]))
                yield re.compile(text, sum({getattr(re, name) for name in re.findall(r"\bre\.([A-Z]+)\b", words)}))


def patterns_in(value: Any) -> Iterator[re.Pattern[Any]]:
    value = getattr(value, "__self__", value) if isinstance(value, types.BuiltinMethodType) else value
    if isinstance(value, re.Pattern):
        yield value
    elif type(value).__name__ == "FirstUse":
        yield re.compile(*value._arguments)
    elif type(value).__name__ == "SecretForm":
        yield re.compile(value.pattern)
    elif isinstance(value, (list, tuple, dict, Struct)):
        items = msgspec.structs.astuple(value) if isinstance(value, Struct) else value
        for item in items.values() if isinstance(items, dict) else items:
            yield from patterns_in(item)


def search(pattern: re.Pattern[Any]) -> None:
    words = WORD.findall(pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode())[:10]
    for text in [*TEXTS, *(word + text for word in words for text in TEXTS[::17])]:
        said = text if isinstance(pattern.pattern, str) else text.encode()
        pattern.search(said)
        pattern.fullmatch(said)


def test_no_pattern_takes_an_endless_time() -> None:
    command = [sys.executable, "-c", SEARCHED, str(ROOT / "tests")]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    told = done.stdout.splitlines()
    assert told[-1:] == ["done"], f"{told[-1:]} takes too long, or failed: {done.stderr[-2000:]}"
    assert len(told) > 170, "the patterns are kept elsewhere now"
    for place in ("_kinds.py: TASK_KINDS", "_definitions.py: of lines"):
        assert any(line.startswith(place) for line in told), place


OUTPUT = """
import resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_launchers
from test_launchers import CANNOT_WORK, launchers
folder = sys.argv[2]
Path(folder, "program").write_text(" ".join(launchers.PROGRAMS))
for written in dict.fromkeys(row[0] for row in CANNOT_WORK):
    print(written.encode(), flush=True)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 15, -1))  # for some tenths of a second of work
    said = written.splitlines() or ["", ""]
    for lines in (
        [line.ljust(2000) for line in said],  # as a terminal's tables are
        [line[: len(line) * 9 // 10] + " " * 1000 + line for line in said],
        [(line + " ") * (2000 // (len(line) + 1)) for line in said],
    ):
        for code, state in ((None, "running"), (0, "completed"), (1, "failed"), (41, "failed"), (-15, "timeout")):
            for all_lines in (lines, [*lines, "The end."], (lines * 100)[:100], [*(lines * 100)[:99], "The end."]):
                launchers.agent_failure({"exit_code": code, "state": state, "result_id": None}, all_lines, folder)
print("done")
"""


def test_no_output_of_an_agent_takes_an_endless_time(tmp_path: Path) -> None:
    """However wide the lines are that its program writes when it cannot work, and whatever follows."""
    command = [sys.executable, "-c", OUTPUT, str(ROOT / "tests"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    told = done.stdout.splitlines()
    assert told[-1:] == ["done"], f"{told[-1:]} takes too long, or failed: {done.stderr[-2000:]}"


def test_the_search_above_finds_what_takes_an_endless_time() -> None:
    for pattern in (r"(?:[a-z]*\d?|\d+)(?:_(?:[a-z]*\d?|\d+))+", r"password(\w+\s?)*$"):
        one = f"[('x', test_patterns.re.compile({pattern!r}))]"
        script = SEARCHED.replace("60, 60", "2, 2").replace("test_patterns.patterns()", one)
        command = [sys.executable, "-c", script, str(ROOT / "tests")]
        done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
        assert done.stdout == "x\n", pattern

"""Test coverage, build status and security scan out of the project's report files, for the section ``metadata`` of
contexts.

Coverage comes from coverage.xml, lcov.info, Jest's coverage-summary.json or the ``.coverage`` file where the report is
newer than the sources, the build from a JUnit report, the scan from bandit.json or results.sarif. What no file tells is
null.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import sqlite3
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

from cco_sidecar import (
    MB,
    ContextRequest,
    Sections,
    fingerprint,
    hookimpl,
    iso,
    kind_of,
    read_text_file,
)
from cco_sidecar_plugins.context._parsing import REPORTS, parsed


@hookimpl
def context_section(request: ContextRequest) -> Sections:
    root, files = Path(request.project.root), request.project.given
    newest = max((file.mtime_ns for file in files if kind_of(file.path) in ("source", "test")), default=0)
    status, moment = read_build(root)
    facts = {"test_coverage": read_coverage(root, newest), "last_build_status": status, "last_build_time": moment}
    return {"metadata": facts | {"security_scan_status": read_security_scan(root)}}


def read_coverage(root: Path, newest_source_ns: int) -> float | None:
    """Percent of lines covered, of the first report that is newer than every source. Blocks."""
    readers: dict[str, Callable[[str], float | None]] = {
        "coverage.xml": lambda text: float(ElementTree.fromstring(text).attrib["line-rate"]) * 100,
        "coverage/coverage-summary.json": lambda text: float(json.loads(text)["total"]["lines"]["pct"]),
        "coverage/lcov.info": lcov_percent,
        "lcov.info": lcov_percent,
        ".coverage": lambda _: coverage_data_percent(root),
    }
    for name, read in readers.items():
        facts = fingerprint(str(root / name))
        if facts and facts[0] >= newest_source_ns:
            percent: float | None = parsed(root / name, read)
            if percent is not None:
                return round(percent, 2)
    return None


def coverage_data_percent(root: Path) -> float | None:
    """Percent of statements that ran, of the data file that coverage.py writes (it holds the lines that ran, as bits).
    Blocks.
    """
    covered = total = 0
    with contextlib.closing(sqlite3.connect(f"file:{root / '.coverage'}?mode=ro", uri=True)) as database:
        sql = "select file.path, line_bits.numbits from file left join line_bits on line_bits.file_id = file.id"
        ran: dict[str, set[int]] = {}
        for path, bits in database.execute(sql):
            lines = ran.setdefault(os.path.relpath(path, root) if os.path.isabs(path) else path, set())
            lines.update(
                8 * place + bit for place, byte in enumerate(bits or b"") for bit in range(8) if byte >> bit & 1
            )
    for path, lines in ran.items():
        found = read_text_file(str(root), path, MB)
        statements = statement_lines(found[0]) if found else set()
        covered, total = covered + len(statements & lines), total + len(statements)
    return covered / total * 100 if total else None


def statement_lines(source: str) -> set[int]:
    """The lines on which statements begin that can run: no docstrings, nothing under a "pragma: no cover"."""
    lines = source.split("\n")
    found: set[int] = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        own = {getattr(node, "lineno", 0), *(item.lineno for item in getattr(node, "decorator_list", []))}
        if any(number and "pragma: no cover" in lines[number - 1] for number in own):
            continue
        constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not constant and not isinstance(node, ast.Global | ast.Nonlocal):
            found |= own
        pending += ast.iter_child_nodes(node)
    return found


def lcov_percent(text: str) -> float:
    found, hit = (
        sum(int(number) for number in re.findall(rf"^{mark}:(\d+)", text, re.MULTILINE)) for mark in ("LF", "LH")
    )
    return hit / found * 100 if found else 0.0


def read_build(root: Path) -> tuple[str | None, str | None]:
    """("success" or "failed", when) of the newest JUnit report; Nones where there is none. Blocks."""
    reports = [root / name for name in REPORTS if name.endswith(".xml") and "coverage" not in name]
    present = [(facts[0], path) for path in reports if (facts := fingerprint(str(path)))]
    if not present:
        return None, None
    moment, path = max(present)
    suites = parsed(path, lambda text: list(ElementTree.fromstring(text).iter("testsuite")))
    if suites is None:
        return None, None
    bad = sum(int(suite.attrib.get(name) or 0) for suite in suites for name in ("failures", "errors"))
    return ("failed" if bad else "success"), iso(moment / 1e9)


def read_security_scan(root: Path) -> str | None:
    """ "passed" or "failed" by the report of bandit or a SARIF file; None without one. Blocks."""
    findings = parsed(root / "bandit.json", lambda text: len(json.loads(text)["results"]))
    if findings is None:
        findings = parsed(
            root / "results.sarif", lambda text: sum(len(run.get("results") or []) for run in json.loads(text)["runs"])
        )
    return None if findings is None else "failed" if findings else "passed"


# -- relevance: the task's words in names and texts, the agent's kinds of file first

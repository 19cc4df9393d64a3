"""Test coverage, build status and security scan out of the project's report files, for the section ``metadata`` of
contexts.

Coverage comes from coverage.xml (Cobertura, JaCoCo or Clover), lcov.info, Istanbul's coverage-summary.json or the
``.coverage`` file where the report is newer than the sources; the build from a report of JUnit, NUnit, xUnit, TestNG
or Visual Studio; the scan from bandit.json and results.sarif. What no file tells is null. A report that cannot be read
costs one line in the log, and the next one is asked.
"""

from __future__ import annotations

import ast
import contextlib
import os
import posixpath
import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

from cco_sidecar import MB, ContextRequest, Sections, hookimpl, iso, kind_of, read_text_file
from cco_sidecar_plugins.context._parsing import REPORTS, File, ProjectFiles, number_of

LARGEST = 16 * MB


@hookimpl
def section_files() -> list[str]:
    return list(REPORTS)


@hookimpl
def context_section(request: ContextRequest) -> Sections:
    root, files = Path(request.project.root), request.project.context_files
    newest = max((file.mtime_ns for file in files if kind_of(file.path) in ("source", "test")), default=0)
    status, moment = read_build(root)
    facts = {"test_coverage": read_coverage(root, newest), "last_build_status": status, "last_build_time": moment}
    return {"metadata": facts | {"security_scan_status": read_security_scan(root)}}


# -- coverage


def read_coverage(root: Path, newest_source_ns: int) -> float | None:
    """Percent of lines covered, of the first report that says it and is newer than every source. Blocks."""
    files = ProjectFiles(root)
    readers: dict[str, Callable[[File], float | None]] = {
        "coverage.xml": xml_percent,
        "coverage/coverage-summary.json": istanbul_percent,
        "coverage/lcov.info": lcov_percent,
        "lcov.info": lcov_percent,
        ".coverage": coverage_data_percent,
    }
    for name, read in readers.items():
        moment = files.moment(name)
        if moment is not None and moment >= newest_source_ns:
            percent = files.parsed(name, read, LARGEST)
            if percent is not None:
                return round(percent, 2)
    return None


def percent_of(covered: int | None, total: int | None) -> float | None:
    """None where a count is not known, or there was nothing to cover. Raises ValueError where both cannot be true."""
    if covered is None or not total:
        return None
    if covered > total:
        raise ValueError(f"{covered} of {total} lines are covered")
    return covered / total * 100


def xml_percent(file: File) -> float | None:
    report = file.xml(keep={"group", "package", "counter", "project", "file", "class", "metrics"})
    if report.tag == "report":  # JaCoCo; counters of its parts are not its direct children
        for counter in report.iterfind("counter[@type='LINE']"):
            covered, missed = number_of(counter.get("covered")), number_of(counter.get("missed"))
            return None if covered is None or missed is None else percent_of(covered, covered + missed)
        return None
    if report.tag != "coverage":
        raise ValueError(f"it is no report of coverage but <{report.tag[:40]}>")
    metrics = report.find("project/metrics")
    if metrics is not None:  # Clover
        return percent_of(number_of(metrics.get("coveredstatements")), number_of(metrics.get("statements")))
    return cobertura_percent(report)


def cobertura_percent(report: Element) -> float | None:
    rate, covered, valid = report.get("line-rate"), None, None
    with contextlib.suppress(ValueError):  # the rate may still tell
        covered, valid = number_of(report.get("lines-covered")), number_of(report.get("lines-valid"))
    if (covered is not None and valid is not None) or rate is None:
        return percent_of(covered, valid)
    number = float(rate.removesuffix("%"))
    is_rate = number <= 1 and not rate.endswith("%")  # some tools write percentages
    return bounded(number * 100 if is_rate else number)


def bounded(percent: float) -> float:
    """``percent``. Raises ValueError where it is none."""
    if not 0 <= percent <= 100:
        raise ValueError(f"{percent} is no percentage")
    return percent


def istanbul_percent(file: File) -> float | None:
    """``pct`` of all lines (Istanbul cuts it off at two digits), unless the counts beside it say otherwise."""
    lines = file.table(file.json(), "total", "lines")
    covered, total, told = (
        value if isinstance(value, int | float) and not isinstance(value, bool) else None
        for value in (lines.get("covered"), lines.get("total"), lines.get("pct"))
    )
    if total == 0 or (told is None and (covered is None or total is None)):
        return None
    if isinstance(covered, int) and isinstance(total, int):
        counted = percent_of(covered, total)
        if told is None or (counted is not None and abs(counted - told) > 0.1):
            return counted
    return None if told is None else bounded(float(told))


def lcov_percent(file: File) -> float | None:
    """Of all lines that the records name. The records of one source (one a test run) count it once: by their lines, or
    where these are not listed by the largest totals.
    """
    lines: dict[str, dict[str, bool]] = {}
    totals: dict[str, dict[str, int]] = {}
    source = ""
    for number, line in enumerate(file.text().splitlines()):
        mark, _, value = line.strip().partition(":")
        if mark == "end_of_record":
            source = f"\0record that ends before line {number}"  # the next may name no source
        elif mark == "SF":
            source = posixpath.normpath(value.strip().replace("\\", "/"))
        elif mark == "DA" and (match := re.match(r"(\d{1,9}),(-?\d{1,15})(,|$)", value)):
            known = lines.setdefault(source, {})
            known[match[1]] = known.get(match[1], False) or int(match[2]) > 0
        elif mark in ("LF", "LH") and re.fullmatch(r"\d{1,15}", value):
            known_totals = totals.setdefault(source, {})
            known_totals[mark] = max(known_totals.get(mark, 0), int(value))
        elif mark in ("DA", "LF", "LH"):
            file.odd(f"a line {mark} holds no counts")
    counted = [(sum(hits.values()), len(hits)) for hits in lines.values()]
    for told in (told for source, told in totals.items() if source not in lines and len(told) == 2):
        if told["LH"] <= told["LF"]:
            counted.append((told["LH"], told["LF"]))
        else:
            file.odd("a record has more lines hit than lines")
    return percent_of(sum(hit for hit, _ in counted), sum(found for _, found in counted))


def coverage_data_percent(file: File) -> float | None:
    """Percent of statements that ran, of the data file that coverage.py writes. It holds the lines that ran, as bits,
    or with --branch the jumps between them. It is read from a copy in memory, so nothing beside it is made.
    """
    deadline = time.monotonic() + 3
    covered = total = 0
    for path, ran in lines_that_ran(file.content, file.files.root, deadline).items():
        found = read_text_file(file.files.root, path, MB) if path.endswith((".py", ".pyw")) else None
        if found is None or found[2]:
            continue  # gone, a template, or too large
        if time.monotonic() > deadline:
            raise TimeoutError("it takes too long to count the statements")
        try:
            statements = statement_lines(found[0])
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            file.odd(f"{path} cannot be parsed ({type(error).__name__})")
            continue
        covered += sum(ran >> line & 1 for line in statements)
        total += len(statements)
    return percent_of(covered, total)


LAST_LINE = 100_000  # lines after this one are not counted: a data file could name any number


def lines_that_ran(data: bytes, root: str, deadline: float) -> dict[str, int]:
    """By path, relative to the root: an integer whose bit N is set where line N ran."""
    ran: dict[str, int] = {}

    def known(path: str) -> str:
        path = os.path.normpath(os.path.relpath(path, root) if os.path.isabs(path) else path)
        ran.setdefault(path, 0)
        return path

    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(data)
        # its tables may be views that never end
        database.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
        for path, bits in database.execute("select path, numbits from file left join line_bits on file_id = file.id"):
            ran[known(path)] |= int.from_bytes((bits or b"")[: LAST_LINE // 8], "little")
        for path, *lines in database.execute("select path, fromno, tono from file join arc on file_id = file.id"):
            for line in lines:
                if 0 < line < LAST_LINE:  # a negative one enters or leaves a function
                    ran[known(path)] |= 1 << line
    return ran


def statement_lines(source: str) -> set[int]:
    """The lines on which statements begin that can run: no docstrings, nothing under a "pragma: no cover"."""
    excluded = {number for number, line in enumerate(source.split("\n"), 1) if "pragma: no cover" in line}
    found: set[int] = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        own = {getattr(node, "lineno", 0), *(item.lineno for item in getattr(node, "decorator_list", []))}
        if not excluded.isdisjoint(own):
            continue
        constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not constant and not isinstance(node, ast.Global | ast.Nonlocal):
            found |= own
        pending += ast.iter_child_nodes(node)
    return found


# -- the build


class Dialect(NamedTuple):
    """How a kind of test report names what it counts."""

    suites: tuple[str, ...]  # elements with counters
    total: str
    bad: tuple[str, ...]  # counters, of which a suite that tells how its tests ended has the first at least
    case: str


JUNIT = Dialect(("testsuites", "testsuite"), "tests", ("failures", "errors"), "testcase")
XUNIT = Dialect(("assembly", "collection"), "total", ("failed", "errors"), "test")
DIALECTS = {  # by the report's root element
    "testsuites": JUNIT,
    "testsuite": JUNIT,
    "assemblies": XUNIT,
    "assembly": XUNIT,
    "test-results": Dialect(("test-results",), "total", ("failures", "errors", "invalid"), "test-case"),  # NUnit 2
    "test-run": Dialect(("test-run", "test-suite"), "total", ("failed",), "test-case"),  # NUnit 3
    "TestRun": Dialect(("Counters",), "total", ("failed", "error", "timeout", "aborted"), "UnitTestResult"),  # TRX
    "testng-results": Dialect(("testng-results",), "total", ("failed",), "test-method"),
}
OUTCOMES = ("result", "outcome", "status")
FAILED = frozenset("fail failed failure error errored timeout timedout aborted invalid disconnected cancelled".split())
UNDECIDED = frozenset("skipped inconclusive warning ignored notexecuted notrunnable inprogress pending".split())
READ = {"failure", "error", "ResultSummary", "test-suite"}.union(
    *((*dialect.suites, dialect.case) for dialect in DIALECTS.values())
)


def read_build(root: Path) -> tuple[str | None, str | None]:
    """("success" or "failed", when) of the newest test report that tells it; Nones where none does. Blocks."""
    files = ProjectFiles(root)
    names = [name for name in REPORTS if name.endswith(".xml") and "coverage" not in name]
    present = [(moment, name) for name in names if (moment := files.moment(name)) is not None]
    for moment, name in sorted(present, reverse=True):
        if status := files.parsed(name, lambda file: build_status(file.xml(keep=READ)), LARGEST):
            return status, iso(moment / 1e9)
    return None, None


def build_status(report: Element) -> str | None:
    """ "failed" where anything in the report failed, "success" where it tells of tests and none failed, else None.
    Raises ValueError where it is no report, or a counter of failures is none.
    """
    dialect = DIALECTS.get(report.tag)
    if dialect is None:
        raise ValueError(f"it is no report of tests but <{report.tag[:40]}>")
    if any(map(says_failed, report.iter())):
        return "failed"
    suites = [item for item in report.iter() if item.tag in dialect.suites]
    odd = ""
    for text in (suite.get(name) for suite in suites for name in dialect.bad):
        try:
            if number_of(text):
                return "failed"
        except ValueError as error:
            odd = str(error)
    if odd:
        raise ValueError(odd)
    summary = report.find("ResultSummary")
    undecided = outcome(summary if summary is not None else report) in UNDECIDED
    return "success" if not undecided and all_passed(report, dialect, suites) else None


def says_failed(item: Element) -> bool:
    return item.tag in ("failure", "error") or outcome(item) in FAILED or item.get("success", "").lower() == "false"


def outcome(item: Element) -> str:
    return next((item.get(name, "").lower() for name in OUTCOMES if item.get(name)), "")


def all_passed(report: Element, dialect: Dialect, suites: list[Element]) -> bool:
    """Whether the report, in which nothing failed, tells of any test, and of every suite how its tests ended: by a
    count of failures (its own, or that of a suite around it) or by listing them.
    """
    known, told = set[int](), 0
    for suite in suites:  # outer ones first
        total, inner = number_of(suite.get(dialect.total)) or 0, [item.tag for item in suite]
        if id(suite) in known or suite.get(dialect.bad[0]) is not None:
            known.update(map(id, suite))
            told += total
        elif inner.count(dialect.case) < total and not set(inner).intersection(dialect.suites):
            return False
    return bool(told or next(report.iter(dialect.case), None) is not None)


# -- the security scan


def read_security_scan(root: Path) -> str | None:
    """ "failed" where a report of bandit or a SARIF file has findings or says that the scan failed, "passed" where one
    says that there are none; None where none tells. Blocks.
    """
    files = ProjectFiles(root)
    readers = (("bandit.json", bandit_status), ("results.sarif", sarif_status))
    told = {files.parsed(name, read, LARGEST) for name, read in readers}
    return "failed" if "failed" in told else "passed" if "passed" in told else None


def bandit_status(file: File) -> str | None:
    report = file.table(file.json())
    if not isinstance(report.get("results"), list):
        return None
    return "failed" if report["results"] else None if report.get("errors") else "passed"  # errors: files not scanned


def sarif_status(file: File) -> str | None:
    runs = [run for run in file.table(file.json()).get("runs") or [] if isinstance(run, dict)]
    told = {run_status(file, run) for run in runs}
    return "failed" if "failed" in told else "passed" if "passed" in told else None


def run_status(file: File, run: dict[str, Any]) -> str | None:
    """None for a run without results: it did not scan (SARIF 2.1.0, 3.14.23)."""
    invocations = [item for item in run.get("invocations") or [] if isinstance(item, dict)]
    if any(item.get("executionSuccessful") is False for item in invocations):
        return "failed"
    results = run.get("results")
    if not isinstance(results, list):
        return None
    levels = rule_levels(file, run)
    findings = [is_finding(result, levels) for result in results if isinstance(result, dict)]
    return "failed" if any(findings) else "passed" if len(findings) == len(results) else None


def is_finding(result: dict[str, Any], levels: dict[Any, str]) -> bool:
    """Whether a result is a warning or an error that stands: not suppressed, and not gone since the baseline."""
    if (result.get("kind") or "fail") != "fail" or result.get("baselineState") == "absent":
        return False
    rule = result["rule"] if isinstance(result.get("rule"), dict) else {}
    names = (result.get("ruleId"), rule.get("id"), result.get("ruleIndex"), rule.get("index"))
    default = next((levels[name] for name in names if isinstance(name, str | int) and name in levels), "warning")
    if (result.get("level") or default) in ("none", "note"):
        return False
    suppressions = [item for item in result.get("suppressions") or [] if isinstance(item, dict)]
    return not suppressions or any(item.get("status") in ("underReview", "rejected") for item in suppressions)


def rule_levels(file: File, run: dict[str, Any]) -> dict[Any, str]:
    """The level that each rule gives its results, by the rule's name and by its place."""
    levels: dict[Any, str] = {}
    rules = file.table(run, "tool", "driver").get("rules")
    for index, rule in enumerate(rules if isinstance(rules, list) else []):
        level = file.table(rule, "defaultConfiguration").get("level")
        if isinstance(rule, dict) and isinstance(level, str):
            levels[index] = level
            levels |= {rule["id"]: level} if isinstance(rule.get("id"), str) else {}
    return levels

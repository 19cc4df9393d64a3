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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cco_sidecar import MB, ContextRequest, ProjectState, Sections, hookimpl, iso, kind_of, read_text_file
from cco_sidecar_plugins.context._parsing import REPORTS, Facts, File, ProjectFiles, number_of, remembered

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

LARGEST = 16 * MB


@hookimpl
def section_files() -> list[str]:
    return list(REPORTS)


@hookimpl
def context_section(request: ContextRequest) -> Sections:
    return {"metadata": read_reports(request.project)}


@remembered
def read_reports(project: ProjectState) -> tuple[Facts, ProjectFiles]:
    root = Path(project.root)
    files = ProjectFiles(root)
    sources = (file.mtime_ns for file in project.files if kind_of(file.path) in ("source", "test"))
    newest = max(sources, default=0) if any(os.path.lexists(root / name) for name in COVERAGE) else 0
    status, moment = read_build(files)
    facts = {"test_coverage": read_coverage(files, newest), "last_build_status": status, "last_build_time": moment}
    return facts | {"security_scan_status": read_security_scan(files)}, files


# -- coverage


def read_coverage(files: ProjectFiles, newest_source_ns: int) -> float | None:
    """Percent of lines covered, of the first report that says it and is newer than every source. Blocks."""
    for name, read in COVERAGE.items():
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


class Record(NamedTuple):
    """A record of lcov: whether each line that it lists was hit, and the totals LF and LH that it gives."""

    lines: dict[str, bool]
    totals: dict[str, int]

    def counts(self) -> tuple[int, int]:
        """Lines hit and lines. Raises ValueError where the record does not tell, or tells it two ways."""
        listed = {"LH": sum(self.lines.values()), "LF": len(self.lines)}
        told = {**listed, **self.totals} if self.lines else self.totals
        if self.lines and told != listed:
            raise ValueError("a record's totals are not those of its lines")
        hit, found = told.get("LH"), told.get("LF")
        if found == 0 or not told:
            hit, found = hit or 0, found or 0
        if hit is None or found is None or hit > found:
            raise ValueError("a record does not tell how many lines were hit")
        return hit, found


def lcov_percent(file: File) -> float | None:
    """Of all lines that the records name. The records of one source (one a test run) count it once: by their lines, or
    where these are not listed by the largest totals. Raises ValueError where one record cannot be read.
    """
    sources: dict[str, list[Record]] = {}
    for source, record in lcov_records(file.text()):
        record.counts()
        sources.setdefault(source, []).append(record)
    counted = [counts_of_source(records) for records in sources.values()]
    return percent_of(sum(hit for hit, _ in counted), sum(found for _, found in counted))


def lcov_records(text: str) -> Iterator[tuple[str, Record]]:
    """The records with the names of their sources. Raises ValueError where a line of counts holds none."""
    source, record = "", Record({}, {})
    for number, line in enumerate(text.splitlines()):
        mark, _, value = line.strip().partition(":")
        if mark in ("end_of_record", "SF"):
            yield source, record
            record = Record({}, {})
            # after the end of a record the next may name no source
            source = posixpath.normpath(value.strip().replace("\\", "/")) if mark == "SF" else f"\0{number}"
        elif mark == "DA" and (match := re.match(r"([0-9]{1,9}),([0-9]+)(,|$)", value)):
            record.lines[match[1]] = record.lines.get(match[1], False) or bool(match[2].strip("0"))
        elif mark in ("LF", "LH") and re.fullmatch(r"[0-9]{1,15}", value):
            if record.totals.setdefault(mark, int(value)) != int(value):
                raise ValueError(f"a record gives {mark} twice")
        elif mark in ("DA", "LF", "LH"):
            raise ValueError(f"a line {mark} holds no counts")
    yield source, record


def counts_of_source(records: list[Record]) -> tuple[int, int]:
    lines: dict[str, bool] = {}
    for record in records:
        lines |= {number: hit or lines.get(number, False) for number, hit in record.lines.items()}
    counts = [record.counts() for record in records if not record.lines]
    largest = max((hit for hit, _ in counts), default=0), max((found for _, found in counts), default=0)
    if lines and largest[1]:
        raise ValueError("some records of a source list its lines, some do not")
    return largest if not lines else (sum(lines.values()), len(lines))


def coverage_data_percent(file: File) -> float | None:
    """``measured_percent``; a file that took too long is not tried again for a while, or each context would take as
    long.
    """
    key = hash(file.content)
    until, why = GIVEN_UP.get(key, (0.0, ""))
    if time.monotonic() < until:
        raise TimeoutError(why)
    try:
        return measured_percent(file)
    except TimeoutError as error:
        GIVEN_UP.clear()
        GIVEN_UP[key] = time.monotonic() + RETRY, str(error)
        raise


GIVEN_UP: dict[int, tuple[float, str]] = {}  # by the hash of the last such file: until when, and why
RETRY = 600.0  # seconds


def measured_percent(file: File) -> float | None:
    """Percent of statements that ran, of the data file that coverage.py writes. It holds the lines that ran, as bits,
    or with --branch the jumps between them. It is read from a copy in memory, so nothing beside it is made.
    """
    deadline = time.monotonic() + 3
    covered = total = 0
    try:
        ran_by_path = lines_that_ran(file.content, file.files.root, deadline)
    except sqlite3.OperationalError:
        if time.monotonic() > deadline:
            raise TimeoutError("it takes too long to read its tables") from None
        raise
    for path, ran in ran_by_path.items():
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


COVERAGE: dict[str, Callable[[File], float | None]] = {
    "coverage.xml": xml_percent,
    "coverage/coverage-summary.json": istanbul_percent,
    "coverage/lcov.info": lcov_percent,
    "lcov.info": lcov_percent,
    ".coverage": coverage_data_percent,
}
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
    idle: tuple[str, ...]  # counters of tests that did not run, none of which counts what another counts
    case: str


JUNIT = Dialect(
    ("testsuites", "testsuite"), "tests", ("failures", "errors"), ("skipped", "skip", "disabled", "ignored"), "testcase"
)
XUNIT = Dialect(("assembly", "collection"), "total", ("failed", "errors"), ("skipped", "not-run"), "test")
TRX_BAD, TRX_IDLE = ("failed", "error", "timeout", "aborted"), ("notExecuted", "notRunnable", "inconclusive")
DIALECTS = {  # by the report's root element
    "testsuites": JUNIT,
    "testsuite": JUNIT,
    "assemblies": XUNIT,
    "assembly": XUNIT,
    "test-results": Dialect(  # NUnit 2
        ("test-results",), "total", ("failures", "errors", "invalid"), ("not-run", "inconclusive"), "test-case"
    ),
    "test-run": Dialect(  # NUnit 3
        ("test-run", "test-suite"), "total", ("failed",), ("skipped", "inconclusive"), "test-case"
    ),
    "TestRun": Dialect(("TestRun",), "total", TRX_BAD, (*TRX_IDLE, "pending", "inProgress"), "UnitTestResult"),
    "testng-results": Dialect(("testng-results",), "total", ("failed",), ("skipped", "ignored"), "test-method"),
}
OUTCOMES = ("result", "outcome", "status")
FAILED = frozenset(
    "fail failed failure error errored timeout timedout aborted invalid disconnected cancelled panicked".split()
)
PASSED = frozenset("pass passed success successful succeeded ok run executed complete completed finished".split())
IDLE = frozenset(
    "skip skipped inconclusive warning ignored notexecuted notrunnable notrun pending suppressed disabled "
    "explicit".split()
)
IDLE_MARKS = ("skipped", "disabled", "ignored")  # elements of a test that did not run
READ = {"failure", "error", "ResultSummary", "Counters", "RunInfo", "test-suite", *IDLE_MARKS}.union(
    *((*dialect.suites, dialect.case) for dialect in DIALECTS.values())
)


def read_build(files: ProjectFiles) -> tuple[str | None, str | None]:
    """("success" or "failed", when) of the newest test report that tells it; Nones where none does. Blocks."""
    names = [name for name in REPORTS if name.endswith(".xml") and "coverage" not in name]
    present = [(moment, name) for name in names if (moment := files.moment(name)) is not None]
    for moment, name in sorted(present, reverse=True):
        if status := files.parsed(name, lambda file: build_status(file.xml(keep=READ)), LARGEST):
            return status, iso(moment / 1e9)
    return None, None


def build_status(report: Element) -> str | None:
    """ "failed" where anything in the report failed, "success" where it tells that tests ran and passed, else None.
    Raises ValueError where it is no report, or a counter is none.
    """
    dialect = DIALECTS.get(report.tag)
    if dialect is None:
        raise ValueError(f"it is no report of tests but <{report.tag[:40]}>")
    for counters in report.iter("Counters"):  # where Visual Studio keeps what the others write at the suite
        report.attrib.update(counters.attrib)
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
    whole = outcomes(summary if summary is not None else report)
    known = all(outcomes(item) <= PASSED | IDLE for item in report.iter()) and whole.isdisjoint(IDLE)
    return "success" if known and all_told(suites, dialect) and tests_run(report, dialect)[1] > 0 else None


def says_failed(item: Element) -> bool:
    failed = not outcomes(item).isdisjoint(FAILED) or item.get("success", "").lower() == "false"
    return failed or item.tag in ("failure", "error")


def outcomes(item: Element) -> set[str]:
    return {item.get(name, "").lower() for name in OUTCOMES if item.get(name)}


def all_told(suites: list[Element], dialect: Dialect) -> bool:
    """Whether every suite of a report tells how its tests ended: by a count of failures (its own, or that of a suite
    around it) or by listing them.
    """
    known = set[int]()
    for suite in suites:  # outer ones first
        total, inner = number_of(suite.get(dialect.total)) or 0, [item.tag for item in suite]
        if id(suite) in known or suite.get(dialect.bad[0]) is not None:
            known.update(map(id, suite))
        elif inner.count(dialect.case) < total and not set(inner).intersection(dialect.suites):
            return False
    return True


def tests_run(item: Element, dialect: Dialect) -> tuple[int, int]:
    """How many tests an element of a report tells of, and how many of these ran at most, by its counters and by what
    it lists, whichever says less.
    """
    if item.tag == dialect.case:
        idle = not outcomes(item).isdisjoint(IDLE) or item.get("executed", "").lower() == "false"
        idle = idle or any(mark.tag in IDLE_MARKS for mark in item)
        return (0, 0) if item.get("is-config") == "true" else (1, int(not idle))
    inner = [tests_run(child, dialect) for child in item]
    total, ran = sum(count for count, _ in inner), sum(count for _, count in inner)
    if item.tag not in dialect.suites:
        return total, ran
    told = number_of(item.get(dialect.total))
    if told is not None:
        total, ran = told, ran + max(0, told - total)  # what it does not list may have run
    idle_count = sum(number_of(item.get(name)) or 0 for name in dialect.idle)
    most = [count for name in ("passed", "executed") if (count := number_of(item.get(name))) is not None]
    return total, min(ran, total - idle_count, *most)


# -- the security scan


def read_security_scan(files: ProjectFiles) -> str | None:
    """ "failed" where a report of bandit or a SARIF file has findings or says that the scan failed, "passed" where one
    says that there are none; None where none tells. Blocks.
    """
    readers = (("bandit.json", bandit_status), ("results.sarif", sarif_status))
    told = {files.parsed(name, read, LARGEST) for name, read in readers}
    return "failed" if "failed" in told else "passed" if "passed" in told else None


def bandit_status(file: File) -> str | None:
    report = file.table(file.json())
    if not isinstance(report.get("results"), list):
        return None
    return "failed" if report["results"] else None if report.get("errors") else "passed"  # errors: files not scanned


def sarif_status(file: File) -> str | None:
    """ "failed" where one run is, "passed" where one is and all others did not scan, else None."""
    runs = file.table(file.json()).get("runs")
    told = {run_status(file, run) for run in (runs if isinstance(runs, list) else [])}
    return "failed" if "failed" in told else "passed" if told in ({"passed"}, {"passed", "none"}) else None


def run_status(file: File, run: Any) -> str | None:
    """ "failed", "passed" or None where a run of a scanner leaves it open; "none" for one without results: it did not
    scan (SARIF 2.1.0, 3.14.23).
    """
    if not isinstance(run, dict):
        return None
    levels = {kind: Levels(file, run, *kind) for kind in (RULES, NOTICES)}
    ends = {ended_well(invocation, levels[NOTICES]) for invocation in invocations_of(run)}
    if False in ends:
        return "failed"
    results = run.get("results")
    if not isinstance(results, list):
        return None if None in ends else "none"
    findings = set[bool | None]()
    for result in results:
        findings.add(is_finding(result, levels[RULES]))
        if True in findings:
            return "failed"
    elsewhere = file.table(run, "externalPropertyFileReferences").get("results")
    return None if None in ends | findings or elsewhere else "passed"


def invocations_of(run: dict[str, Any]) -> list[Any]:
    return as_list(run.get("invocations"))


def ended_well(invocation: Any, levels: Levels) -> bool | None:
    """Whether the scanner came to its end; None where that is not said, or something speaks against it."""
    if not isinstance(invocation, dict):
        return None
    successful = invocation.get("executionSuccessful", True)
    if successful is False:
        return False
    is_cut_off = any(invocation.get(name) not in (None, "") for name in CUT_OFF)
    is_bad_code = "executionSuccessful" not in invocation and invocation.get("exitCode") not in (None, 0)
    notices = [notice for name in NOTIFICATIONS for notice in as_list(invocation.get(name))]
    is_bad_notice = any(levels.of(notice, invocation) not in ("none", "note", "warning") for notice in notices)
    return True if successful is True and not (is_cut_off or is_bad_code or is_bad_notice) else None


def is_finding(result: Any, levels: Levels) -> bool | None:
    """Whether a result is a warning or an error that stands: not suppressed, and not gone since the baseline. None
    where it is not decided.
    """
    if not isinstance(result, dict):
        return None
    suppressions = [item for item in as_list(result.get("suppressions")) if isinstance(item, dict)]
    if suppressions and not any(lower(item.get("status")) in ("underreview", "rejected") for item in suppressions):
        return False
    kind = lower(result.get("kind") or "fail")
    if result.get("baselineState") == "absent" or kind in ("pass", "informational", "notapplicable"):
        return False
    if kind != "fail":
        return None
    told = {FINDINGS.get(levels.of(result, invocation)) for invocation in levels.invocations(result)}
    return told.pop() if len(told) == 1 else None


CUT_OFF = ("processStartFailureMessage", "exitSignalName", "exitSignalNumber")
NOTIFICATIONS = ("toolExecutionNotifications", "toolConfigurationNotifications")
FINDINGS = {"none": False, "note": False, "warning": True, "error": True}  # by level
RULES = ("rules", "rule", "ruleConfigurationOverrides")
NOTICES = ("notifications", "descriptor", "notificationConfigurationOverrides")
Key = tuple[int | None, str | int]  # a tool component, None for any, and a descriptor's name or place in it


class Levels:
    """The levels in force of a run's results or notifications. The tool's driver and extensions have ``descriptors`` of
    their kinds, the items have a ``reference`` to one, an invocation has ``overrides`` of their settings.
    """

    def __init__(self, file: File, run: dict[str, Any], descriptors: str, reference: str, overrides: str) -> None:
        self._file, self._reference, self._overrides = file, reference, overrides
        self._described: dict[Key, Key] = {}  # to the key of component and place
        self._settings: dict[Key, dict[str, Any]] = {}
        self._names: dict[Key, Any] = {}
        self._components: dict[str | int, int] = {}
        self._changes: dict[int, dict[Key | str, dict[str, Any]]] = {}
        self._invocations = invocations_of(run)
        self._changing = [item for item in self._invocations if isinstance(item, dict) and item.get(overrides)]
        if len(self._changing) > 20:  # each would be looked at for each result
            raise ValueError("more than 20 invocations change levels")
        extensions = file.table(run, "tool").get("extensions")
        components = [file.table(run, "tool", "driver"), *(extensions if isinstance(extensions, list) else [])]
        for number, component in enumerate(components, -1):  # the driver is before the first extension
            table = component if isinstance(component, dict) else {}
            self._components |= {number: number} | dict.fromkeys(texts(table, "name", "guid"), number)
            listed = table.get(descriptors)
            for index, descriptor in enumerate(listed if isinstance(listed, list) else []):
                self._add((number, index), descriptor if isinstance(descriptor, dict) else {})

    def _add(self, place: Key, descriptor: dict[str, Any]) -> None:
        self._settings[place] = self._file.table(descriptor, "defaultConfiguration")
        self._names[place] = descriptor.get("id")
        self._described[place] = place
        for name in texts(descriptor, "id", "guid"):
            self._described.setdefault((place[0], name), place)
            self._described.setdefault((None, name), place)

    def invocations(self, result: dict[str, Any]) -> list[Any]:
        """Those whose settings may hold for a result: the one that it names, else all that have any."""
        provenance = result.get("provenance")
        index = provenance.get("invocationIndex") if isinstance(provenance, dict) else None
        if isinstance(index, int) and 0 <= index < len(self._invocations):
            return [self._invocations[index]]
        return self._changing or [None]

    def of(self, item: Any, invocation: Any) -> str:
        """In small letters: the item's own level, else that which the invocation sets for its rule, else the rule's,
        else "warning" (SARIF 2.1.0, 3.27.10). "" where the rule is switched off or the item is none.
        """
        if not isinstance(item, dict):
            return ""
        reference = {"id": item.get("ruleId"), "index": item.get("ruleIndex")}
        reference |= self._file.table(item, self._reference)
        names = [*parents(reference.get("id")), *parents(item.get("ruleId"))]
        place = self._place(reference, names)
        changes = self._changed(invocation)
        changed = next((changes[key] for key in (*names, place) if key is not None and key in changes), {})
        default = self._settings[place] if place else {}
        own = item.get("level")
        if changed.get("enabled", own is not None or default.get("enabled", True)) is False:
            return ""
        return lower(own or changed.get("level") or default.get("level") or "warning")

    def _place(self, reference: dict[str, Any], names: list[str]) -> Key | None:
        """Of the descriptor that a reference means. ``names`` are its name and the names above it."""
        told = reference.get("toolComponent")
        component = self._component(told) if isinstance(told, dict) else -1
        index = reference.get("index")
        keys: list[Key] = [(component, name) for name in (*names, *texts(reference, "guid"))]
        if component is not None and isinstance(index, int) and (component, index) in self._names:
            name = self._names[component, index]
            keys += [(component, index)] if not names or name is None or name in names else []
        if not isinstance(told, dict):
            keys += [(None, name) for name in names]
        return next((self._described[key] for key in keys if key in self._described), None)

    def _component(self, told: dict[str, Any]) -> int | None:
        index = told.get("index")
        keys = [index] if isinstance(index, int) and index >= 0 else texts(told, "guid", "name")
        return next((self._components[key] for key in keys if key in self._components), None if keys else -1)

    def _changed(self, invocation: Any) -> dict[Key | str, dict[str, Any]]:
        """What the invocation sets, by the place of a rule, or by a name that no rule has."""
        if id(invocation) in self._changes:
            return self._changes[id(invocation)]
        changes: dict[Key | str, dict[str, Any]] = {}
        overrides = invocation.get(self._overrides) if isinstance(invocation, dict) else None
        for override in overrides if isinstance(overrides, list) else []:
            target = self._file.table(override, "descriptor")
            names = texts(target, "id")
            key = self._place(target, names) or next(iter(names), None)
            if key is not None:
                changes[key] = changes.get(key, {}) | self._file.table(override, "configuration")
        return self._changes.setdefault(id(invocation), changes)


def as_list(value: Any) -> list[Any]:
    """The list, or one with what stands in its place; empty for null."""
    return value if isinstance(value, list) else [] if value is None else [value]


def texts(table: dict[str, Any], *keys: str) -> list[str]:
    """The values of ``keys`` that are texts."""
    return [value for key in keys if isinstance(value := table.get(key), str)]


def parents(name: Any) -> list[str]:
    """A hierarchical name ``a/b/c``, ``a/b`` and ``a``; nothing for what is no name."""
    if not isinstance(name, str):
        return []
    parts = name.split("/", 20)
    return [name, *("/".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))]


def lower(value: Any) -> str:
    return value.lower() if isinstance(value, str) else ""

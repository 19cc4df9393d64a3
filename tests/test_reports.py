"""Coverage, build status and security scan: null unless a report really says so."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Client, Service, plugin, table, write

from cco_sidecar import FileFact, GitContext, ProjectState

manifests, reports = plugin("metadata"), plugin("reports")
ProjectFiles = plugin("_parsing").ProjectFiles
MakeService = Callable[..., Service]


def context_of(client: Client) -> dict[str, Any]:
    answer = client.get("/api/context/issue-1/python-specialist")
    assert answer.status_code == 200, answer.text
    return answer.json()["context"]  # type: ignore[no-any-return]


def iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# -- coverage


COVERAGE = {
    "coverage.xml": ('<coverage line-rate="0.855"></coverage>', 85.5),
    "coverage/coverage-summary.json": ('{"total": {"lines": {"pct": 71.25}}}', 71.25),
    "coverage/lcov.info": ("SF:a\nLF:10\nLH:4\nend_of_record\nSF:b\nLF:30\nLH:30\nend_of_record\n", 85.0),
    "lcov.info": ("LF:3\nLH:1\n", 33.33),
}


@pytest.mark.parametrize("name", COVERAGE)
def test_coverage_counts_while_its_report_is_newer_than_the_sources(tmp_path: Path, name: str) -> None:
    content, percent = COVERAGE[name]
    report = write(tmp_path / name, content)
    moment = report.stat().st_mtime_ns
    assert reports.read_coverage(ProjectFiles(tmp_path), moment - 1) == percent
    assert reports.read_coverage(ProjectFiles(tmp_path), moment + 1) is None


def test_coverage_out_of_the_data_file_is_what_coverage_itself_reports(tmp_path: Path) -> None:
    write(
        tmp_path / "main.py",
        '''"""A module."""
import functools


def used(number):
    """Tells a sign."""
    if number > 0:
        return "positive"
    elif number < 0:
        return "negative"
    for item in range(3):
        number += item
    return "zero"


@functools.lru_cache
def unused(
    number,
):
    try:
        return 1 / number
    except ZeroDivisionError:  # pragma: no cover
        return None


print(used(1))
''',
    )
    run = functools.partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True, text=True)
    run([sys.executable, "-m", "coverage", "run", "--source=.", "main.py"])
    reported = float(run([sys.executable, "-m", "coverage", "report", "--format=total", "--precision=2"]).stdout)
    found = reports.read_coverage(ProjectFiles(tmp_path), 0)
    assert found is not None and abs(found - reported) < 0.01
    assert reports.read_coverage(ProjectFiles(tmp_path), time.time_ns() + 10**9) is None
    write(tmp_path / ".coverage", "not a database")
    assert reports.read_coverage(ProjectFiles(tmp_path), 0) is None


@pytest.mark.parametrize("content", ["", "<coverage/>", "<coverage line-rate='many'/>", "\0"])
def test_a_spoilt_coverage_report_tells_nothing(tmp_path: Path, content: str) -> None:
    write(tmp_path / "coverage.xml", content)
    assert reports.read_coverage(ProjectFiles(tmp_path), 0) is None


def test_reports_are_read_although_git_ignores_them_and_forgotten_when_the_source_moves_on(
    make_service: MakeService, repository: Path
) -> None:
    client = make_service().client()
    metadata = context_of(client)["metadata"]
    assert metadata["project_type"] == "python"
    assert metadata["dependencies"] == ["fastapi", "pydantic"]
    assert metadata["python_version"] == "3.11"
    names = ("test_coverage", "last_build_status", "last_build_time", "security_scan_status")
    assert {name: metadata[name] for name in names} == dict.fromkeys(names)

    write(repository / ".git/info/exclude", "*.xml\nbandit.json\n")
    write(repository / "coverage.xml", COVERAGE["coverage.xml"][0])
    junit = write(repository / "junit.xml", '<testsuites><testsuite tests="3" failures="0" errors="0"/></testsuites>')
    write(repository / "bandit.json", '{"results": []}')
    metadata = context_of(client)["metadata"]
    assert {name: metadata[name] for name in names} == {
        "test_coverage": 85.5, "last_build_status": "success", "last_build_time": iso(junit.stat().st_mtime), "security_scan_status": "passed",
    }  # fmt: skip
    write(repository / "README.md", "# Not a source\n")
    assert context_of(client)["metadata"]["test_coverage"] == 85.5
    later = time.time() + 1
    write(repository / "src/main.py", "def main(): ...\n")
    os.utime(repository / "src/main.py", (later, later))
    assert context_of(client)["metadata"]["test_coverage"] is None
    junit.write_text('<testsuites><testsuite tests="3" failures="1" errors="0"/><testsuite tests="1"/></testsuites>')
    write(repository / "bandit.json", '{"results": [{"issue": 1}]}')
    metadata = context_of(client)["metadata"]
    assert (metadata["last_build_status"], metadata["security_scan_status"]) == ("failed", "failed")
    junit.unlink()
    assert context_of(client)["metadata"]["last_build_status"] is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('<testsuite tests="1" failures="0" errors="0"/>', "success"),
        ('<testsuite tests="1" failures="0" errors="2"/>', "failed"),
        ("<testsuites/>", None),
        ("not xml", None),
    ],
)
def test_the_build_status_is_that_of_the_junit_report(tmp_path: Path, content: str, expected: str | None) -> None:
    write(tmp_path / "junit.xml", content)
    assert reports.read_build(ProjectFiles(tmp_path))[0] == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bandit.json", '{"results": []}', "passed"),
        ("bandit.json", '{"results": [{}]}', "failed"),
        ("bandit.json", "{}", None),
        ("results.sarif", '{"runs": [{"results": []}, {}]}', "passed"),
        ("results.sarif", '{"runs": [{"results": [{}]}]}', "failed"),
        ("results.sarif", "[", None),
        ("other.json", "{}", None),
    ],
)
def test_the_security_status_is_that_of_the_scanners_report(
    tmp_path: Path, name: str, content: str, expected: str | None
) -> None:
    write(tmp_path / name, content)
    assert reports.read_security_scan(ProjectFiles(tmp_path)) == expected


JACOCO = '<!DOCTYPE report PUBLIC "-//JACOCO//DTD Report 1.1//EN" "report.dtd"><report name="x">{}</report>'
XML_COVERAGE: dict[str, tuple[str | bytes, float | None]] = {
    "the counts before the rounded rate": ('<coverage line-rate="0.67" lines-valid="3" lines-covered="2"/>', 66.67),
    "a percentage where a rate belongs": ('<coverage line-rate="85.5"/>', 85.5),
    "a percentage with its sign": ('<coverage line-rate="0.5%"/>', 0.5),
    "the whole": ('<coverage line-rate="1"/>', 100.0),
    "more than the whole": ('<coverage line-rate="855"/>', None),
    "less than nothing": ('<coverage line-rate="-0.1"/>', None),
    "no number": ('<coverage line-rate="NaN"/>', None),
    "infinity": ('<coverage line-rate="1e999"/>', None),
    "no lines at all": ('<coverage line-rate="1" lines-valid="0" lines-covered="0"/>', None),
    "odd counts beside a rate": ('<coverage line-rate="0.5" lines-valid="1.0" lines-covered="1"/>', 50.0),
    "counts that cannot be": ('<coverage line-rate="0.5" lines-valid="1" lines-covered="2"/>', None),
    "a document type that lies elsewhere": (
        '<?xml version="1.0"?><!DOCTYPE coverage SYSTEM "http://cobertura.sourceforge.net/xml/coverage-04.dtd"><coverage line-rate="0.25"/>', 25.0,
    ),
    "entities": ('<!DOCTYPE coverage [<!ENTITY a "0.5">]><coverage line-rate="&a;"/>', None),
    "UTF-16": ('<?xml version="1.0" encoding="utf-16"?><coverage line-rate="0.25"/>'.encode("utf-16"), 25.0),
    "UTF-8 that calls itself UTF-16": ('<?xml version="1.0" encoding="utf-16"?><coverage line-rate="0.25"/>', 25.0),
    "Latin-1": ('<?xml version="1.0" encoding="iso-8859-1"?><coverage a="é" line-rate="0.25"/>'.encode("latin-1"), 25.0),
    "JaCoCo": (
        JACOCO.format('<package><counter type="LINE" missed="9" covered="0"/></package><counter type="INSTRUCTION" missed="9" covered="0"/><counter type="LINE" missed="1" covered="3"/>'),
        75.0,
    ),
    "JaCoCo without lines": (JACOCO.format('<counter type="INSTRUCTION" missed="9" covered="1"/>'), None),
    "JaCoCo of nothing": (JACOCO.format('<counter type="LINE" missed="0" covered="0"/>'), None),
    "Clover": (
        '<coverage generated="1" clover="4.2"><project><file><metrics statements="9" coveredstatements="0"/></file><metrics statements="8" coveredstatements="2"/></project></coverage>', 25.0,
    ),
    "Clover of nothing": ('<coverage><project><metrics statements="0" coveredstatements="0"/></project></coverage>', None),
    "another namespace": ('<c:coverage xmlns:c="urn:x" line-rate="0.25"/>', 25.0),
    "a page": ('<!DOCTYPE html><html><body line-rate="0.5">404</body></html>', None),
    "a report of tests": ('<testsuites line-rate="0.5"/>', None),
    "100,000 levels": ("<coverage>" * 100_000, None),
}  # fmt: skip


@table(XML_COVERAGE)
def test_coverage_out_of_xml(tmp_path: Path, given: str | bytes, expected: float | None) -> None:
    write(tmp_path / "coverage.xml", given)
    assert reports.read_coverage(ProjectFiles(tmp_path), 0) == expected


@table({
    "lines only": ("SF:a\nDA:1,3\nDA:2,0\nend_of_record\nSF:b\nDA:1,1\nend_of_record\n", 66.67),
    "one source of two runs": ("TN:x\nSF:a\nDA:1,1\nDA:2,0\nLF:2\nLH:1\nend_of_record\nTN:y\nSF:a\nDA:1,0\nDA:2,1\nLF:2\nLH:1\nend_of_record\nSF:b\nDA:1,0\nend_of_record\n", 66.67),
    "one source written two ways": ("SF:src/a\nDA:1,1\nDA:2,0\nend_of_record\nSF:./src\\a\nDA:1,1\nDA:2,0\nend_of_record\nSF:b\nDA:1,1\nend_of_record\n", 66.67),
    "a repeated source without lines": ("SF:a\nLF:4\nLH:1\nend_of_record\nSF:a\nLF:4\nLH:1\nend_of_record\nSF:b\nLF:4\nLH:4\nend_of_record\n", 62.5),
    "records that name no source": ("LF:4\nLH:1\nend_of_record\nLF:4\nLH:3\nend_of_record\n", 50.0),
    "checksums and CRLF": ("SF:a\r\nDA:1,3,abc==\r\nDA:2,0,x\r\nend_of_record\r\n", 50.0),
    "odd counts": ("SF:a\nDA:x,1\nDA:1,1\nDA:2," + "9" * 5000 + "\nDA:3,-1\nend_of_record\nSF:b\nLF:2\nLH:3\nend_of_record\nSF:c\nLF:2.0\nLH:1\nend_of_record\n", None),
    "a count of twenty digits and more": ("SF:a\nDA:1,18446744073709551615\nDA:2," + "9" * 5000 + "\nDA:3,000\nDA:4,0\nend_of_record\n", 50.0),
    "a count in powers of ten": ("SF:a\nDA:1,1.8e+19\nDA:2,0\nend_of_record\n", None),
    "a count with a fraction": ("SF:a\nDA:1,0.5\nend_of_record\nSF:b\nDA:1,1\nend_of_record\n", None),
    "a negative count": ("SF:b\nDA:1,1\nend_of_record\nSF:a\nDA:7,-12\nend_of_record\n", None),
    "digits of other scripts": ("SF:a\nDA:1,\u0663\nend_of_record\n", None),
    "no count at all": ("SF:a\nDA:1,1\nDA:2\nend_of_record\n", None),
    "fewer lines than the total": ("SF:a\nDA:4,2\nDA:5,1\nLF:40\nLH:2\nend_of_record\n", None),
    "more lines than the total": ("SF:a\nDA:1,1\nDA:2,0\nDA:3,0\nLF:1\nLH:1\nend_of_record\n", None),
    "other hits than the total": ("SF:a\nDA:1,1\nDA:2,0\nLH:2\nLF:2\nend_of_record\n", None),
    "the second record contradicts itself": ("SF:a\nDA:1,1\nLF:1\nLH:1\nend_of_record\nSF:b\nDA:1,0\nLF:1\nLH:1\n", None),
    "two totals of one record": ("SF:a\nLF:4\nLH:2\nLH:3\nend_of_record\n", None),
    "more hits than lines beside a good record": ("SF:a\nDA:1,1\nend_of_record\nSF:b\nLF:2\nLH:3\nend_of_record\n", None),
    "a total without hits beside a good record": ("SF:a\nDA:1,1\nend_of_record\nSF:b\nLF:2\nend_of_record\n", None),
    "one source with lines and without": ("SF:a\nDA:1,1\nend_of_record\nSF:a\nLF:10\nLH:2\nend_of_record\n", None),
    "totals of their own lines": ("SF:a\nDA:1,1\nDA:2,0\nLF:2\nLH:1\nend_of_record\nSF:b\nDA:9,0\nDA:9,3\nLF:1\nLH:1\nend_of_record\n", 66.67),
    "an empty file": ("", None),
    "records without lines": ("SF:a\nFNF:1\nFNH:1\nLF:0\nLH:0\nend_of_record\n", None),
    "branches only": ("SF:a\nBRF:2\nBRH:1\nend_of_record\n", None),
    "a total without what was hit": ("SF:a\nLF:2\nend_of_record\n", None),
    "a page": ("<html>404</html>", None),
    "UTF-16": ("SF:a\nDA:1,1\nend_of_record\n".encode("utf-16"), 100.0),
})  # fmt: skip
def test_coverage_out_of_lcov(tmp_path: Path, given: str | bytes, expected: float | None) -> None:
    write(tmp_path / "coverage/lcov.info", given)
    assert reports.read_coverage(ProjectFiles(tmp_path), 0) == expected
    if expected is None:
        write(tmp_path / "lcov.info", "SF:a\nLF:4\nLH:1\nend_of_record\n")
        assert reports.read_coverage(ProjectFiles(tmp_path), 0) == 25.0  # what tells nothing hides nothing


@table({
    "as Istanbul cuts it off": ({"total": 3, "covered": 2, "skipped": 0, "pct": 66.66}, 66.66),
    "a rate in its place": ({"total": 4, "covered": 3, "pct": 0.75}, 75.0),
    "the counts alone": ({"total": 4, "covered": 3}, 75.0),
    "nothing to cover": ({"total": 0, "covered": 0, "pct": 100}, None),
    "Unknown": ({"total": 0, "covered": 0, "pct": "Unknown"}, None),
    "a text": ({"pct": "85.5"}, None),
    "true": ({"pct": True}, None),
    "more than all": ({"pct": 855}, None),
    "no number": ({"pct": float("nan")}, None),
    "null": (None, None),
    "a list": ([{"pct": 5}], None),
})  # fmt: skip
def test_coverage_out_of_istanbuls_summary(tmp_path: Path, given: Any, expected: float | None) -> None:
    write(tmp_path / "coverage/coverage-summary.json", json.dumps({"total": {"lines": given}}))
    assert reports.read_coverage(ProjectFiles(tmp_path), 0) == expected


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"total": ' * 100_000,
        "null",
        "[]",
        '{"total": 5}',
        '{"total": {"lines": {"pct": ' + "9" * 5000 + "}}}",
    ],
)
def test_an_odd_summary_hides_no_later_report(tmp_path: Path, content: str) -> None:
    write(tmp_path / "coverage.xml", "<html/>")
    write(tmp_path / "coverage/coverage-summary.json", content)
    write(tmp_path / "coverage/lcov.info")
    write(tmp_path / "lcov.info", "DA:1,1\n")
    assert reports.read_coverage(ProjectFiles(tmp_path), 0) == 100.0


DATA = """create table file (id integer primary key, path text); create table line_bits (file_id integer, context_id integer, numbits blob);
    create table arc (file_id integer, context_id integer, fromno integer, tono integer);"""


def coverage_data(path: Path, script: str) -> None:
    path.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(DATA + script)


@pytest.mark.parametrize("folder", ["C#", "100%", "what?", "a%20b", "a&mode=rwc", "ünï code"])
def test_the_data_file_is_read_wherever_it_lies_and_nothing_is_made_beside_it(tmp_path: Path, folder: str) -> None:
    root = tmp_path / folder
    write(root / "a.py", "x = 1\ny = 2\n")
    coverage_data(
        root / ".coverage",
        "insert into file values (1, 'a.py'); insert into line_bits values (1, 1, x'02'), (1, 2, x'02');",
    )
    os.chmod(root / ".coverage", 0o400)
    before = sorted(tmp_path.rglob("*"))
    assert reports.read_coverage(ProjectFiles(root), 0) == 50.0
    write(tmp_path / "empty" / folder / ".coverage")
    assert reports.read_coverage(ProjectFiles(tmp_path / "empty" / folder), 0) is None
    assert [path for path in sorted(tmp_path.rglob("*")) if "empty" not in path.parts] == before
    assert [path.name for path in (tmp_path / "empty" / folder).iterdir()] == [".coverage"]


@table({
    "branches": ("insert into file values (1, 'a.py'); insert into arc values (1, 1, -1, 1), (1, 1, 1, 2), (1, 1, 2, -1);", 66.67),
    "one file under two names": ("insert into file values (1, 'a.py'), (2, '{root}/./a.py'); insert into line_bits values (1, 1, x'02'), (2, 1, x'06');", 66.67),
    "files that are gone, elsewhere, no Python or broken": (
        "insert into file values (1, 'a.py'), (2, 'gone.py'), (3, '../out.py'), (4, 'page.html'), (5, 'broken.py'); insert into line_bits values (1, 1, x'0e');", 100.0,
    ),
    "no file": ("", None),
    "a file that never ran": ("insert into file values (1, 'a.py');", 0.0),
    "enormous line numbers": ("insert into file values (1, 'a.py'); insert into arc values (1, 1, 1, 1152921504606846976), (1, 1, 99999999999, 2);", 66.67),
    "no bits": ("insert into file values (1, 'a.py'); insert into line_bits values (1, 1, 'text');", None),
    "tables without end": (
        "drop table file; create view file as with recursive n(id) as (select 1 union all select id + 1 from n) select id, 'a.py' as path from n;", None,
    ),
})  # fmt: skip
def test_coverage_out_of_the_data_file(tmp_path: Path, given: str, expected: float | None) -> None:
    root = tmp_path / "root"
    write(root / "a.py", "x = 1\ny = 2\nz = 3\n")
    write(root / "broken.py", "def (:\n")
    write(root / "page.html", "{{ x }}\n")
    write(tmp_path / "out.py", "x = 1\n")
    coverage_data(root / ".coverage", given.format(root=root))
    assert reports.read_coverage(ProjectFiles(root), 0) == expected


# -- the build


def case(*inner: str) -> str:
    return "".join(f'<testcase name="{number}">{text}</testcase>' for number, text in enumerate(inner))


BUILDS: dict[str, tuple[str | bytes, str | None]] = {
    "JUnit: counters of the root alone": ('<testsuites tests="3" failures="0"><testsuite name="a"/></testsuites>', "success"),
    "JUnit: counters of the suites alone": ('<testsuites tests="3"><testsuite tests="3" failures="0" errors="0"/></testsuites>', "success"),
    "JUnit: listed tests without counters": (f"<testsuites><testsuite>{case('', '<skipped/>')}</testsuite></testsuites>", "success"),
    "JUnit: a listed failure without counters": (f"<testsuites><testsuite>{case('', '<failure/>')}</testsuite></testsuites>", "failed"),
    "JUnit: a listed error against the counters": (f'<testsuite tests="1" failures="0" errors="0">{case("<error/>")}</testsuite>', "failed"),
    "JUnit: a failure deep in nested suites": (f'<testsuites failures="0" tests="1"><testsuite><testsuite tests="1">{case("<failure/>")}</testsuite></testsuite></testsuites>', "failed"),
    "JUnit: nested suites, the inner ones count": ('<testsuites><testsuite><testsuite tests="1" failures="0"/><testsuite tests="2" failures="1"/></testsuite></testsuites>', "failed"),
    "JUnit: a flaky test that passed in the end": (f'<testsuite tests="1" failures="0">{case("<flakyFailure/>")}</testsuite>', "success"),
    "JUnit: a suite that does not tell": ('<testsuites><testsuite tests="2" failures="0"/><testsuite tests="1"/></testsuites>', None),
    "JUnit: a namespace": ('<testsuites xmlns="urn:junit"><testsuite tests="1" failures="1"/></testsuites>', "failed"),
    "JUnit: a prefix": ('<j:testsuite xmlns:j="urn:junit" tests="1" failures="0"><j:testcase/></j:testsuite>', "success"),
    "JUnit: a prefix that nobody declared": ('<testsuite xsi:schema="x" tests="1" failures="2"/>', "failed"),
    "JUnit: no tests": ('<testsuites tests="0" failures="0" errors="0"/>', None),
    "JUnit: a count that is none": ('<testsuite tests="3" failures="2.0" errors="0"/>', None),
    "JUnit: 6,000 digits": (f'<testsuite tests="3" failures="0" errors="{"7" * 6000}"/>', None),
    "JUnit: other odd counts": ('<testsuite tests="3" failures="-1"/>', None),
    "JUnit: an empty count": ('<testsuite tests="3" failures="" errors="0"/>', None),
    "JUnit: an odd count beside a failure": ('<testsuites><testsuite tests="3" failures="many"/><testsuite tests="1" failures="1"/></testsuites>', "failed"),
    "JUnit: output that looks like markup": (f'<testsuite tests="1" failures="0">{case("<system-out><![CDATA[<failure/><!ENTITY]]></system-out>")}</testsuite>', "success"),
    "JUnit: UTF-16": ('<?xml version="1.0" encoding="UTF-16"?><testsuite tests="1" failures="1"/>'.encode("utf-16"), "failed"),
    "JUnit: cut off": ('<testsuite tests="1" failures="0"><testcase', None),
    "JUnit: its own entities": ('<!DOCTYPE t [<!ENTITY a "&#60;b/>">]><testsuite tests="1" failures="0">&a;</testsuite>', None),
    "NUnit 3 passed": ('<test-run total="2" passed="2" failed="0" result="Passed"><test-suite result="Passed" total="2" failed="0"><test-case result="Passed"/></test-suite></test-run>', "success"),
    "NUnit 3 failed": ('<test-run total="2" passed="1" failed="1" result="Failed"/>', "failed"),
    "NUnit 3: a suite that could not start": ('<test-run total="0" failed="0"><test-suite result="Failed" label="Invalid"/></test-run>', "failed"),
    "NUnit 3: inconclusive": ('<test-run total="2" passed="0" failed="0" inconclusive="2" result="Inconclusive"/>', None),
    "NUnit 2 passed": ('<test-results total="2" errors="0" failures="0" not-run="1"><test-suite success="True" result="Success"/></test-results>', "success"),
    "NUnit 2 failed": ('<test-results total="2" errors="0" failures="2"/>', "failed"),
    "NUnit 2: a case alone": ('<test-results><test-suite><test-case executed="True" success="False"/></test-suite></test-results>', "failed"),
    "xUnit passed": ('<assemblies><assembly total="2" passed="2" failed="0" skipped="0" errors="0"><collection total="2" failed="0"><test result="Pass"/></collection></assembly></assemblies>', "success"),
    "xUnit failed": ('<assemblies><assembly total="2" passed="2" failed="0" errors="0"/><assembly total="1" failed="1"/></assemblies>', "failed"),
    "xUnit: an error outside the tests": ('<assembly total="1" passed="1" failed="0" errors="1"><errors><error type="assembly-cleanup"/></errors></assembly>', "failed"),
    "xUnit: nothing ran": ("<assemblies/>", None),
    "Visual Studio passed": (
        '<TestRun xmlns="http://microsoft.com/schemas/VisualStudio/TeamTest/2010"><Results><UnitTestResult outcome="Passed"/></Results>'
        '<ResultSummary outcome="Completed"><Counters total="1" executed="1" passed="1" failed="0" error="0"/></ResultSummary></TestRun>', "success",
    ),
    "Visual Studio failed": ('<TestRun><ResultSummary outcome="Failed"><Counters total="0" failed="0"/></ResultSummary></TestRun>', "failed"),
    "Visual Studio: a case alone": ('<TestRun><Results><UnitTestResult outcome="Failed"/></Results></TestRun>', "failed"),
    "TestNG passed": ('<testng-results skipped="0" failed="0" total="3" passed="3"/>', "success"),
    "TestNG failed": ('<testng-results><suite><test><class><test-method status="FAIL"/></class></test></suite></testng-results>', "failed"),
    "JUnit: every test was skipped": (f'<testsuite tests="3" failures="0" errors="0" skipped="3">{case(*["<skipped/>"] * 3)}</testsuite>', None),
    "JUnit: some disabled, the others skipped": ('<testsuites tests="5" failures="0" disabled="2" skipped="3"/>', None),
    "JUnit: every listed test was skipped": (f"<testsuite>{case('<skipped/>', '<skipped/>')}</testsuite>", None),
    "JUnit: the suites tell that all was skipped": ('<testsuites tests="3" failures="0"><testsuite tests="1" failures="0" skipped="1"/><testsuite tests="2" failures="0" skipped="2"/></testsuites>', None),
    "JUnit: one counted and not listed test ran": (f'<testsuite tests="3" failures="0" skipped="2">{case("<skipped/>", "<skipped/>")}</testsuite>', "success"),
    "JUnit: what is listed was skipped, what is counted was not": (f'<testsuite tests="1" failures="0" skipped="0">{case("<skipped/>")}</testsuite>', None),
    "JUnit: no tests are counted, one is listed": (f'<testsuite tests="0" failures="0">{case("")}</testsuite>', None),
    "JUnit: nose": ('<testsuite name="nosetests" tests="2" errors="0" failures="0" skip="2"/>', None),
    "googletest: a test was interrupted": ('<testsuites tests="2" failures="0"><testsuite tests="2" failures="0"><testcase status="run" result="completed"/><testcase status="run" result="interrupted"/></testsuite></testsuites>', None),
    "googletest: nothing was run": ('<testsuites tests="1" failures="0"><testsuite tests="1" failures="0"><testcase status="notrun" result="suppressed"/></testsuite></testsuites>', None),
    "googletest: one ran, one is disabled": ('<testsuites tests="2" failures="0" disabled="1"><testsuite tests="2" failures="0" disabled="1"><testcase status="run" result="completed"/><testcase status="notrun" result="suppressed"/></testsuite></testsuites>', "success"),
    "Ginkgo: a test that panicked": ('<testsuite tests="1" failures="0"><testcase status="panicked"/></testsuite>', "failed"),
    "an outcome that nobody knows": ('<testsuite tests="1" failures="0"><testcase status="quarantined"/></testsuite>', None),
    "NUnit 3: none passed": ('<test-run total="3" passed="0" failed="0" skipped="1" inconclusive="2" result="Passed"/>', None),
    "NUnit 3: one is inconclusive": ('<test-run total="2" passed="1" failed="0" inconclusive="1" result="Passed"><test-case result="Passed"/><test-case result="Inconclusive"/></test-run>', "success"),
    "NUnit 2: nothing was run": ('<test-results total="2" errors="0" failures="0" not-run="2"><test-suite><test-case executed="False" result="Ignored"/></test-suite></test-results>', None),
    "xUnit: all skipped": ('<assemblies><assembly total="4" passed="0" failed="0" skipped="4" errors="0"><collection total="4" passed="0" failed="0" skipped="4"/></assembly></assemblies>', None),
    "xUnit: listed as skipped": ('<assembly total="1" failed="0"><collection total="1" failed="0"><test result="Skip"/></collection></assembly>', None),
    "Visual Studio: nothing executed": ('<TestRun><ResultSummary outcome="Completed"><Counters total="3" executed="0" passed="0" failed="0" notExecuted="0"/></ResultSummary></TestRun>', None),
    "Visual Studio: results say that nothing executed": ('<TestRun><Results><UnitTestResult outcome="NotExecuted"/></Results><ResultSummary outcome="Completed"><Counters total="1" failed="0"/></ResultSummary></TestRun>', None),
    "Visual Studio: one of two executed": ('<TestRun><Results><UnitTestResult outcome="NotExecuted"/><UnitTestResult outcome="Passed"/></Results><ResultSummary outcome="Completed"><Counters total="2" executed="1" passed="1" failed="0"/></ResultSummary></TestRun>', "success"),
    "Visual Studio: still running": ('<TestRun><Results><UnitTestResult outcome="InProgress"/></Results><ResultSummary outcome="Completed"><Counters total="2" passed="1" failed="0"/></ResultSummary></TestRun>', None),
    "Visual Studio: the run tells of an error": ('<TestRun><ResultSummary outcome="Completed"><Counters total="1" executed="1" passed="1" failed="0"/><RunInfos><RunInfo outcome="Error"/></RunInfos></ResultSummary></TestRun>', "failed"),
    "Visual Studio: the run warns": ('<TestRun><ResultSummary outcome="Completed"><Counters total="1" executed="1" passed="1" failed="0"/><RunInfos><RunInfo outcome="Warning"/></RunInfos></ResultSummary></TestRun>', "success"),
    "Visual Studio: passed but aborted": ('<TestRun><ResultSummary outcome="PassedButRunAborted"><Counters total="1" passed="1" failed="0"/></ResultSummary></TestRun>', None),
    "TestNG: all skipped": ('<testng-results skipped="1" failed="0" total="1" passed="0"><test-method status="PASS" is-config="true"/><test-method status="SKIP"/></testng-results>', None),
    "TestNG: passed when it was tried again": ('<testng-results skipped="0" failed="0" total="1" passed="1"><test-method status="SKIP"/><test-method status="PASS"/></testng-results>', "success"),
    "a page": ("<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>", None),
    "a page that is no XML": ("<!doctype html><html><body><br>Sign in<p>", None),
    "another document": ('<project tests="3" failures="0"/>', None),
    "an empty file": ("", None),
}  # fmt: skip


@table(BUILDS)
def test_the_build_status_in_each_dialect(tmp_path: Path, given: str | bytes, expected: str | None) -> None:
    report = write(tmp_path / "test-results.xml", given)
    moment = iso(report.stat().st_mtime) if expected else None
    assert reports.read_build(ProjectFiles(tmp_path)) == (expected, moment)


def test_the_newest_report_that_tells_the_build_status_counts(tmp_path: Path) -> None:
    for age, name, content in (
        (1, "junit.xml", "<html/>"),
        (2, "test-results.xml", "<testsuites/>"),
        (3, "reports/junit.xml", '<testsuite tests="1" failures="1"/>'),
        (4, "build/test-results.xml", '<testsuite tests="1" failures="0"/>'),
    ):
        moment = 1_700_000_000 - age
        os.utime(write(tmp_path / name, content), (moment, moment))
    assert reports.read_build(ProjectFiles(tmp_path)) == ("failed", iso(1_699_999_997))


def test_a_report_of_another_age_tells_all_that_has_a_date(tmp_path: Path) -> None:
    report = write(tmp_path / "junit.xml", '<testsuite tests="1" failures="0"/>')
    for moment, year in ((-(10**9), "1970"), (10**10, "2286")):
        os.utime(report, (moment, moment))
        status, when = reports.read_build(ProjectFiles(tmp_path))
        assert status == "success" and when.startswith(year)


# -- the security scan


def sarif(*runs: Any) -> str:
    return json.dumps({"version": "2.1.0", "runs": runs})


def run(*results: Any, **more: Any) -> dict[str, Any]:
    return {"tool": {"driver": {"name": "x"}}, "results": results, **more}


RULES = {"driver": {"rules": [{"id": "minor", "defaultConfiguration": {"level": "note"}}, {"id": "other"}]}}
SCANS: dict[str, tuple[str | bytes, str | None]] = {
    "no results": (sarif(run()), "passed"),
    "one of several runs": (sarif(run(), run({"level": "error"})), "failed"),
    "suppressed in the source": (sarif(run({"level": "error", "suppressions": [{"kind": "inSource"}]})), "passed"),
    "suppressed and accepted": (sarif(run({"suppressions": [{"kind": "external", "status": "accepted"}]})), "passed"),
    "suppression rejected": (sarif(run({"suppressions": [{"kind": "external", "status": "rejected"}]})), "failed"),
    "suppression under review": (sarif(run({"suppressions": [{"kind": "external"}, {"status": "underReview"}]})), "failed"),
    "an empty list of suppressions": (sarif(run({"suppressions": []})), "failed"),
    "one suppressed, one not": (sarif(run({"suppressions": [{}]}, {"level": "warning"})), "failed"),
    "what passed or is for information": (sarif(run({"kind": "pass"}, {"kind": "informational"}, {"kind": "notApplicable"}, {"level": "none"}, {"level": "note"})), "passed"),
    "a rule's own level": (sarif(run({"ruleId": "minor"}, {"ruleIndex": 0}, {"rule": {"id": "minor"}}, tool=RULES)), "passed"),
    "a rule without one is a warning": (sarif(run({"ruleId": "other"}, tool=RULES)), "failed"),
    "the result's level before the rule's": (sarif(run({"ruleId": "minor", "level": "error"}, tool=RULES)), "failed"),
    "gone since the baseline": (sarif(run({"level": "error", "baselineState": "absent"})), "passed"),
    "a run that failed": (sarif(run(invocations=[{"executionSuccessful": False}])), "failed"),
    "a run that failed without results": (sarif({"invocations": [{"executionSuccessful": True}, {"executionSuccessful": False}]}, run()), "failed"),
    "a scanner's exit code is no failure": (sarif(run(invocations=[{"executionSuccessful": True, "exitCode": 1}])), "passed"),
    "no runs": (sarif(), None),
    "runs that did not scan": (sarif({"results": None}, {}), None),
    "odd results": (sarif(run(None, 5)), None),
    "odd runs": (sarif(None, 5, "x"), None),
    "odd rules": (sarif(run({"ruleId": ["x"], "ruleIndex": {}, "rule": 5, "level": "note"}, tool={"driver": {"rules": [5, {"id": []}]}})), "passed"),
    "no object": ("[]", None),
    "a mark": ("\ufeff" + sarif(run()), "passed"),
    "UTF-16": (sarif(run({})).encode("utf-16"), "failed"),
    "nested 100,000 deep": ('{"runs": ' + "[" * 100_000, None),
    "thousands of digits elsewhere": (sarif(run()).replace('"2.1.0"', "9" * 5000), "passed"),
    "a page": ("<html/>", None),
}  # fmt: skip


def ended(*invocations: Any, **more: Any) -> str:
    return sarif(run(invocations=list(invocations), **more))


OK = {"executionSuccessful": True}
CUT_OFF: dict[str, tuple[str | bytes, str | None]] = {
    "ended by a signal": (ended(OK | {"exitSignalName": "SIGKILL"}), None),
    "ended by a signal without a name": (ended({"exitSignalNumber": 9, "exitCode": 137}), None),
    "the second did not start": (ended(OK, {"processStartFailureMessage": "not found"}), None),
    "none did start": (ended({"processStartFailureMessage": "not found"}), None),
    "an exit code alone": (ended({"exitCode": 2}), None),
    "an exit code of nothing wrong": (ended({"exitCode": 0}), "passed"),
    "a text for a truth value": (ended({"executionSuccessful": "false"}), None),
    "another text": (ended({"executionSuccessful": "True"}), None),
    "null": (ended({"executionSuccessful": None}), None),
    "one that is none": (ended(OK, "x"), None),
    "an object for the list": (sarif(run(invocations={"executionSuccessful": False})), "failed"),
    "an error of the scanner": (ended(OK | {"toolExecutionNotifications": [{"level": "note"}, {"level": "Error"}]}), None),
    "an error of its configuration": (ended(OK | {"toolConfigurationNotifications": [{"level": "error"}]}), None),
    "notices of a level that nobody knows": (ended(OK | {"toolExecutionNotifications": [{"level": "fatal"}, 5]}), None),
    "notices by their descriptor": (
        ended(OK | {"toolExecutionNotifications": [{"descriptor": {"id": "E1"}}]}, tool={"driver": {"notifications": [{"id": "E1", "defaultConfiguration": {"level": "error"}}]}}), None,
    ),
    "warnings and notes of the scanner": (ended(OK | {"toolExecutionNotifications": [{"level": "warning"}, {}, {"level": "none"}]}), "passed"),
    "a finding before the cut": (sarif(run({"level": "error"}, invocations=[{"exitCode": 1}])), "failed"),
    "one run was cut off, another passed": (sarif(run(), run(invocations=[{"exitSignalName": "SIGTERM"}])), None),
    "one run was cut off before its results": (sarif(run(), {"invocations": [{"exitCode": 3}]}), None),
    "open": (sarif(run({"kind": "open"})), None),
    "to be reviewed, beside what passed": (sarif(run({"kind": "pass"}, {"kind": "Review", "level": "none"})), None),
    "to be reviewed, beside a finding": (sarif(run({"kind": "review"}, {"level": "warning"})), "failed"),
    "a kind that nobody knows": (sarif(run({"kind": "maybe"})), None),
    "a level that nobody knows": (sarif(run({"level": "critical"})), None),
    "reviewed and suppressed": (sarif(run({"kind": "review", "suppressions": [{"kind": "inSource"}]})), "passed"),
    "results in another file": (sarif(run(externalPropertyFileReferences={"results": [{"itemCount": 3}]})), None),
}  # fmt: skip


def overridden(*overrides: Any, **more: Any) -> dict[str, Any]:
    return {"invocations": [OK | {"ruleConfigurationOverrides": list(overrides)}], **more}


def rule(name: str, level: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": name, "defaultConfiguration": ({"level": level} if level else {}) | more}


PACKS = {"driver": {"name": "CodeQL", "rules": [rule("py/own", "error")]}, "extensions": [
    {"name": "packs", "guid": "g-0"},
    {"name": "queries", "guid": "g-1", "rules": [rule("py/loud", "error"), rule("py/quiet", "note"), rule("py/own", "note")]},
]}  # fmt: skip
QUIET = {"descriptor": {"id": "a"}, "configuration": {"level": "note"}}
LEVELS: dict[str, tuple[str | bytes, str | None]] = {
    "an extension's rule by its place": (sarif(run({"rule": {"index": 1, "toolComponent": {"index": 1}}}, tool=PACKS)), "passed"),
    "an extension's loud rule by its place": (sarif(run({"rule": {"index": 0, "toolComponent": {"index": 1}}}, tool=PACKS)), "failed"),
    "an extension's rule by its name": (sarif(run({"ruleId": "py/quiet", "rule": {"id": "py/quiet", "toolComponent": {"name": "queries"}}}, tool=PACKS)), "passed"),
    "an extension by its guid": (sarif(run({"ruleId": "py/own", "rule": {"toolComponent": {"guid": "g-1"}}}, tool=PACKS)), "passed"),
    "the driver's rule of the same name": (sarif(run({"ruleId": "py/own", "ruleIndex": 0}, tool=PACKS)), "failed"),
    "an extension's rule by its name alone": (sarif(run({"ruleId": "py/quiet"}, tool=PACKS)), "passed"),
    "an extension that is not there": (sarif(run({"rule": {"index": 1, "toolComponent": {"index": 7}}}, tool=PACKS)), "failed"),
    "a name below the rule's": (sarif(run({"ruleId": "a/b/c"}, tool={"driver": {"rules": [rule("a", "note")]}})), "passed"),
    "the nearest name above": (sarif(run({"ruleId": "a/b/c"}, tool={"driver": {"rules": [rule("a", "note"), rule("a/b", "error")]}})), "failed"),
    "a name below another in an extension": (sarif(run({"ruleId": "py/quiet/x", "rule": {"index": 1, "toolComponent": {"index": 1}}}, tool=PACKS)), "passed"),
    "a name that only begins alike": (sarif(run({"ruleId": "ab"}, tool={"driver": {"rules": [rule("a", "note")]}})), "failed"),
    "made quiet": (sarif(run({"ruleId": "a"}, **overridden(QUIET, tool={"driver": {"rules": [rule("a", "error")]}}))), "passed"),
    "made quiet by its place": (sarif(run({"ruleId": "a"}, **overridden({"descriptor": {"index": 0}, "configuration": {"level": "none"}}, tool={"driver": {"rules": [rule("a", "error")]}}))), "passed"),
    "made quiet where no rules are listed": (sarif(run({"ruleId": "a/b"}, **overridden(QUIET))), "passed"),
    "made loud": (sarif(run({"ruleId": "a"}, **overridden({"descriptor": {"id": "a"}, "configuration": {"level": "error"}}, tool={"driver": {"rules": [rule("a", "note")]}}))), "failed"),
    "one name below made quiet, not the others": (sarif(run({"ruleId": "a/c"}, **overridden({"descriptor": {"id": "a/b"}, "configuration": {"level": "note"}}, tool={"driver": {"rules": [rule("a", "error")]}}))), "failed"),
    "an extension's rule made quiet": (
        sarif(run({"ruleId": "py/loud", "rule": {"index": 0, "toolComponent": {"index": 1}}}, **overridden({"descriptor": {"index": 0, "toolComponent": {"index": 1}}, "configuration": {"level": "note"}}, tool=PACKS))), "passed",
    ),
    "another rule made quiet": (sarif(run({"ruleId": "b"}, **overridden(QUIET))), "failed"),
    "switched off": (sarif(run({"ruleId": "a"}, **overridden({"descriptor": {"id": "a"}, "configuration": {"enabled": False}}))), None),
    "switched off although its result is loud": (sarif(run({"ruleId": "a", "level": "error"}, **overridden({"descriptor": {"id": "a"}, "configuration": {"enabled": False}}))), None),
    "off unless it is switched on": (sarif(run({"ruleId": "a"}, tool={"driver": {"rules": [rule("a", enabled=False)]}})), None),
    "off, and switched on": (sarif(run({"ruleId": "a"}, **overridden({"descriptor": {"id": "a"}, "configuration": {"enabled": True}}, tool={"driver": {"rules": [rule("a", "note", enabled=False)]}}))), "passed"),
    "of another invocation": (sarif(run({"ruleId": "a", "provenance": {"invocationIndex": 0}}, invocations=[OK, OK | {"ruleConfigurationOverrides": [QUIET]}])), "failed"),
    "two invocations that differ": (
        sarif(run({"ruleId": "a"}, invocations=[OK | {"ruleConfigurationOverrides": [QUIET]}, OK | {"ruleConfigurationOverrides": [QUIET | {"configuration": {"level": "error"}}]}])), None,
    ),
    "the result's level before the override": (sarif(run({"ruleId": "a", "level": "error"}, **overridden(QUIET))), "failed"),
    "capitals": (sarif(run({"level": "Note"}, {"level": "NONE"}, {"ruleId": "a"}, tool={"driver": {"rules": [rule("a", "NOTE")]}})), "passed"),
    "capitals of a finding": (sarif(run({"level": "Warning"})), "failed"),
    "odd parts": (
        sarif(run({"ruleId": 5, "rule": {"id": [], "index": True, "toolComponent": 3}, "level": "note", "provenance": []}, **overridden(5, {"descriptor": 5}, tool={"driver": {"rules": {}}, "extensions": [5, {"rules": [5]}]}))), "passed",
    ),
}  # fmt: skip


@table(SCANS | CUT_OFF | LEVELS)
def test_the_security_status_of_a_sarif_file(tmp_path: Path, given: str | bytes, expected: str | None) -> None:
    write(tmp_path / "results.sarif", given)
    assert reports.read_security_scan(ProjectFiles(tmp_path)) == expected


@table({
    "findings": ({"results": [{"issue_severity": "LOW"}], "errors": []}, "failed"),
    "none": ({"results": [], "errors": []}, "passed"),
    "files that could not be scanned": ({"results": [], "errors": [{"filename": "a.py", "reason": "syntax error"}]}, "sarif"),
    "findings beside such files": ({"results": [{}], "errors": [{}]}, "failed"),
    "null": ({"results": None}, "sarif"),
    "an object": ({"results": {}}, "sarif"),
    "a list": ([], "sarif"),
})  # fmt: skip
def test_the_security_status_of_bandit(tmp_path: Path, given: Any, expected: str) -> None:
    write(tmp_path / "bandit.json", json.dumps(given))
    assert reports.read_security_scan(ProjectFiles(tmp_path)) == (None if expected == "sarif" else expected)
    write(tmp_path / "results.sarif", sarif(run({"suppressions": [{}]})))
    assert reports.read_security_scan(ProjectFiles(tmp_path)) == expected.replace("sarif", "passed")
    write(tmp_path / "results.sarif", sarif(run({})))
    assert reports.read_security_scan(ProjectFiles(tmp_path)) == "failed"


# -- where they lie, and in a context


def test_reports_are_not_read_through_links_that_leave_the_root(tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    root.mkdir()
    for name, content in (
        ("coverage.xml", '<coverage line-rate="1"/>'),
        ("junit.xml", '<testsuite tests="1" failures="0"/>'),
        ("bandit.json", '{"results": []}'),
    ):
        (root / name).symlink_to(write(out / name, content))
    coverage_data(out / ".coverage", "insert into file values (1, 'a.py'); insert into line_bits values (1, 1, x'02');")
    write(root / "a.py", "x = 1\n")
    (root / ".coverage").symlink_to(out / ".coverage")
    assert reports.read_coverage(ProjectFiles(root), 0) is None
    assert reports.read_build(ProjectFiles(root)) == (None, None)
    assert reports.read_security_scan(ProjectFiles(root)) is None
    (root / "junit.xml").unlink()
    (root / "junit.xml").symlink_to(
        write(root / "made/junit.xml", '<testsuite tests="1" failures="0"/>').relative_to(root)
    )
    assert reports.read_build(ProjectFiles(root))[0] == "success"


def test_a_context_gives_all_other_facts_beside_odd_reports(make_service: MakeService, repository: Path) -> None:
    write(repository / "junit.xml", '<testsuite tests="3" failures="1.0" errors="0"/>')
    write(repository / "coverage/coverage-summary.json", "[" * 100_000)
    write(repository / "coverage/lcov.info")
    write(repository / "lcov.info", "SF:a\nDA:1,1\nDA:2,0\nend_of_record\n")
    write(repository / "results.sarif", '{"runs": ' + "[" * 100_000)
    service = make_service()
    metadata = context_of(service.client())["metadata"]
    assert (metadata["test_coverage"], metadata["last_build_status"], metadata["last_build_time"]) == (50.0, None, None)
    assert (metadata["security_scan_status"], metadata["dependencies"]) == (None, ["fastapi", "pydantic"])
    log = service.log_path.read_text()
    for name in ("junit.xml", "coverage-summary.json", "results.sarif"):
        assert log.count(f"{name}: left out: ") == 1, log


def test_facts_are_read_again_only_where_the_project_may_be_another(tmp_path: Path) -> None:
    def facts(digest: str) -> tuple[Any, Any]:
        files = [FileFact("pyproject.toml", 1, 1)]
        state = ProjectState(str(tmp_path), files, GitContext(None, [], [], None, None), None, digest)
        return manifests.read_manifests(state)["dependencies"], reports.read_reports(state)["security_scan_status"]

    def depends_on(name: str) -> None:
        write(tmp_path / "pyproject.toml", f'[project]\ndependencies = ["{name}"]\n')

    depends_on("one")
    assert facts("first") == (["one"], None)
    depends_on("two")  # which the digest does not tell: what says so is that it is not read
    assert facts("first") == (["one"], None)
    assert facts("second") == (["two"], None)
    ignored = write(tmp_path / "build/scan.json", '{"results": []}')
    (tmp_path / "bandit.json").symlink_to(ignored)
    assert facts("second") == (["two"], "passed")
    write(ignored, '{"results": [{"issue": 1}]}')
    os.utime(ignored, (1, 1))
    assert facts("second") == (["two"], "failed")  # although no digest tells of what lies behind a link


BITS = "insert into line_bits values (1, 1, x'02');"
MANY_ROWS = """drop table file; create view file as
    with recursive n(id) as (select 1 union all select id + 1 from n limit 50000) select id, 'a.py' as path from n;"""


@pytest.mark.parametrize(
    ("fault", "tables", "told"),
    [
        (OSError(errno.EMFILE, "too many open files"), "insert into file values (1, 'a.py');", ([], None, None)),
        (OSError(errno.EIO, "a fault of the disk"), "insert into file values (1, 'a.py');", ([], None, None)),
        ("too slow to count", "insert into file values (1, 'a.py');", (["one"], "passed", None)),
        ("too slow to read", MANY_ROWS, (["one"], "passed", None)),
    ],
)
def test_facts_are_read_again_where_a_file_could_not_be_read_or_not_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: OSError | str, tables: str, told: tuple[Any, ...]
) -> None:
    sources = [FileFact("pyproject.toml", 1, 1), FileFact("a.py", 1, 1)]
    state = ProjectState(str(tmp_path), sources, GitContext(None, [], [], None, None), None, "digest")

    def facts() -> tuple[Any, ...]:
        found = manifests.read_manifests(state) | reports.read_reports(state)
        return found["dependencies"], found["security_scan_status"], found["test_coverage"]

    def fail(*_: Any) -> Any:
        raise fault

    write(tmp_path / "pyproject.toml", '[project]\ndependencies = ["one"]\n')
    write(tmp_path / "a.py", "x = 1\n")
    write(tmp_path / "bandit.json", '{"results": []}')
    write(tmp_path / "junit.xml/a", "its report is not there, which passes no sooner")
    coverage_data(tmp_path / ".coverage", tables + BITS)
    with monkeypatch.context() as patched:
        if isinstance(fault, OSError):
            patched.setattr(ProjectFiles, "_read", fail)
        else:
            patched.setattr(reports, "time", SimpleNamespace(monotonic=itertools.count(step=5).__next__))
        assert facts() == told
    reports.GIVEN_UP.clear()  # what takes too long is tried again ten minutes later
    assert facts() == (["one"], "passed", 100.0)
    monkeypatch.setattr(ProjectFiles, "_read", lambda *_: None)
    assert facts() == (["one"], "passed", 100.0), "these are remembered"


def test_data_of_coverage_that_take_too_long_are_read_once_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def slow(file: Any) -> float:
        tried.append(file)
        if len(tried) < 3:
            raise TimeoutError("it takes too long")
        return 100.0

    monkeypatch.setattr(reports, "measured_percent", slow)
    now = [1000.0]
    monkeypatch.setattr(reports, "time", SimpleNamespace(monotonic=lambda: now[0]))
    coverage_data(tmp_path / ".coverage", MANY_ROWS + BITS)
    for _ in range(3):  # contexts of three states of the project
        assert reports.read_coverage(ProjectFiles(tmp_path), 0) is None and len(tried) == 1
    (tmp_path / ".coverage").unlink()
    coverage_data(tmp_path / ".coverage", MANY_ROWS + BITS + "create table another (x);")
    assert reports.read_coverage(ProjectFiles(tmp_path), 0) is None and len(tried) == 2
    assert reports.read_coverage(ProjectFiles(tmp_path), 0) is None and len(tried) == 2
    now[0] += reports.RETRY
    assert reports.read_coverage(ProjectFiles(tmp_path), 0) == 100.0 and len(tried) == 3


def test_an_odd_report_costs_one_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "junit.xml", f'<testsuite tests="1" failures="{"8" * 5000}"/>')
    with caplog.at_level(logging.WARNING, "cco"):
        for _ in range(3):
            assert reports.read_build(ProjectFiles(tmp_path)) == (None, None)
    assert len(caplog.records) == 1 and len(caplog.records[0].getMessage()) < 300


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("coverage.xml", "<coverage>" + "<line/>" * 2_000_000),
        ("coverage/lcov.info", "SF:a\n" + "DA:1,1" * 300_000),
        ("junit.xml", "<testsuites tests='1'>" + "<testsuite tests='9'>" * 300_000),
        ("junit.xml", '<testsuite failures="' + " " * 1_000_000 + '"/>'),
        (
            "results.sarif",
            sarif(
                run(
                    *[{"ruleId": "b", "level": "note"}] * 99_000,
                    invocations=[OK | {"ruleConfigurationOverrides": [QUIET]}] * 30_000,
                )
            ),
        ),
        ("junit.xml", "<testsuite>" * 100_000 + "</testsuite>" * 100_000),
        ("results.sarif", sarif(run(*[{"level": "open"}] * 200_000, **overridden(QUIET)))),
        (
            "results.sarif",
            sarif(run(*[{"ruleId": "/" * 900, "kind": "fail", "level": "x"}] * 15_000, **overridden(QUIET))),
        ),
    ],
)
def test_no_report_keeps_a_thread_busy(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path / name, content)
    started = time.thread_time()
    assert reports.read_coverage(ProjectFiles(tmp_path), 0) is None and reports.read_build(ProjectFiles(tmp_path)) == (
        None,
        None,
    )
    assert reports.read_security_scan(ProjectFiles(tmp_path)) is None
    assert time.thread_time() - started < 8


def test_a_source_of_one_long_line_is_counted_at_once(tmp_path: Path) -> None:
    write(tmp_path / "a.py", "x = 1; " * 20_000)
    coverage_data(
        tmp_path / ".coverage", "insert into file values (1, 'a.py'); insert into line_bits values (1, 1, x'02');"
    )
    started = time.thread_time()
    assert reports.read_coverage(ProjectFiles(tmp_path), 0) == 100.0
    assert time.thread_time() - started < 4

"""The benchmarks' parts: rows and goals, the table, the pictures, and that the limit answers what the service answers."""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cco_sidecar import import_file
from tests.benchmarks import compare, percentile, row, table
from tests.benchmarks.__main__ import DECIDING, IN_FULL, MODULES, in_full, in_readme, main
from tests.benchmarks.pictures import FOLDER, apart, draw
from tests.benchmarks.servers import PROBE, ROOT, running_all
from tests.benchmarks.throughput import exchanges, once
from tests.benchmarks.trees import make_tree
from tests.benchmarks.wire import NEW, repeated, run

README, FULL = (ROOT / "README.md").read_text(), IN_FULL.read_text()


@pytest.mark.parametrize(
    ("ours", "limit", "goal", "met", "cells"),
    [
        ([90, 80, 70], [100, 100, 100], "ratio >= 0.8", True, "80.0 /s | 100 /s | 0.80 (0.70 to 0.90) | >= 0.8"),
        ([90, 70, 60], [100, 100, 100], "ratio >= 0.8", False, "70.0 /s | 100 /s | 0.70 (0.60 to 0.90) | >= 0.8: missed"),
        ([1, 4], [1, 2], "ratio <= 1.5", True, "2.50 /s | 1.50 /s | 1.50 (1.00 to 2.00) | <= 1.5"),
        ([3.0], [1.0], "difference <= 1.5", False, "3.00 /s | 1.00 /s | +2.00 /s | <= +1.5 /s: missed"),
        ([1234.5, 1300, 900], [], "value <= 2000", True, "1,234 /s (900 to 1,300) |  |  | <= 2000 /s"),
        ([0.0], [], "", None, "0.00 /s |  |  | "),
        ([5.0], [0.0], "", None, "5.00 /s | 0.00 /s |  | "),
    ],
)  # fmt: skip
def test_a_row_is_judged_by_the_median_of_its_rounds(
    ours: list[float], limit: list[float], goal: str, met: bool | None, cells: str
) -> None:
    found = row("what", ours, limit, unit="/s", goal=goal, held=[1.0] * 99 + [7.5])
    assert found["met"] is met and found["held_ms"] == {"p99": 1.0, "most": 7.5}
    assert json.loads(json.dumps(found)) == found
    head, rule, line = table([found]).splitlines()
    assert [re.sub(" +", " ", cell.strip()) for cell in line.strip("|").split("|")] == [
        "what", *map(str.strip, cells.split("|")), "1.0, 7.5 ms",
    ]  # fmt: skip
    assert len(head) == len(rule) == len(line)


def test_a_percentile_is_one_of_the_values() -> None:
    assert [percentile(range(1, 101), share) for share in (0.5, 0.99, 1)] == [50, 99, 100]
    assert [percentile([3, 1, 2], share) for share in (0.01, 0.5, 0.99)] == [1, 2, 3]


def rows_of_pictures() -> list[dict[str, Any]]:
    return [
        row("x", [number * factor], unit="ms", goal="value <= 9" if factor == 2 else "", point=(picture, name, number))
        for picture in ("waiters", "contexts")
        for name, factor in (("new", 1), ("cached", 1.01), ("edited", 2))
        for number in (1, 100, 10_000)
    ]


def test_pictures_are_small_the_same_bytes_each_time_with_text_as_text(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        draw(rows_of_pictures(), tmp_path / folder)
    for name in ("waiters.svg", "contexts.svg"):
        text = (tmp_path / "first" / name).read_text()
        assert text == (tmp_path / "second" / name).read_text()
        assert ">edited: 20,000 ms<" in text and ">10,000<" in text
        assert len(text) < 30_000 and "<dc:date>" not in text and "<image" not in text
        assert 'style="fill: #ffffff' not in text, "the page's own background is seen, be it light or dark"


def test_labels_that_would_overlap_are_moved_apart() -> None:
    assert apart([1, 10, 100], 1, 100) == [0, 0.5, 1]
    places = apart([90, 91, 100, 1], 1, 100)
    assert places[3] == 0 and places[1] - places[0] == pytest.approx(0.085) == places[2] - places[1]


def test_rows_that_were_kept_are_drawn_again_and_put_into_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "rows.json"
    kept.write_text(json.dumps({"rows": rows_of_pictures()}))
    assert main(["--from", str(kept), "--pictures", str(tmp_path), "--json", str(tmp_path / "again.json")]) == 0
    assert capsys.readouterr().out.count("\n") == 2 + len(rows_of_pictures())
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == json.loads(kept.read_text())["rows"]
    assert (tmp_path / "waiters.svg").is_file()
    new = in_full(FULL, rows_of_pictures())
    assert new.count("20,000 ms") == 2 and "| 10,000 ms" not in new and in_full(new, rows_of_pictures()) == new
    assert FULL.splitlines()[:9] == new.splitlines()[:9] and FULL.splitlines()[-9:] == new.splitlines()[-9:]
    assert in_readme(README, rows_of_pictures()) == README, "none of these is a row of its tables"


def test_the_readme_has_the_rows_that_one_decides_by_as_the_page_of_all_has_them() -> None:
    short, full = (figures_in(text) for text in (README, FULL))
    assert list(short) == list(DECIDING) and 20 <= len(short) <= 25
    assert {name: full[name] for name in short} == short
    assert figures_in(FULL.partition("\n## Many machines\n")[2])
    goals = [cells[3] for cells in full.values() if cells[3]]
    told = f"{sum('missed' in goal for goal in goals)} of {len(goals)} goals are missed"
    assert README.count(told) == FULL.count(told) == 1


def test_rows_are_put_into_the_tables_of_both_pages() -> None:
    measured = [
        row(DECIDING[0], [90.0], [100.0], unit="/s", goal="ratio >= 0.95"),
        row("an inner matter", [1.0], unit="ms", goal="value <= 2"),
        row("a publish, three servers", [5.0], unit="ms") | {"group": "cluster"},
    ]
    short, full = in_readme(README, measured), in_full(FULL, measured)
    for page in (short, full):
        assert "1 of 2 goals are missed" in page and "90.0 /s" in page
    for name in ("an inner matter", "a publish, three servers"):
        assert name in full and name not in short
    assert in_readme(README, []) == README and in_full(FULL, []) == FULL


def figures_in(text: str) -> dict[str, list[str]]:
    """The cells of the first table of rows, by the name of the row."""
    lines = text[re.search(r"\| measure +\|", text).start() :].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {name: cells for name, *cells in rows}


def test_the_readme_is_written_of_all_rows_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--quick", "--only", "idle", "--readme"])
    assert ended.value.code == 2 and "--readme goes with all rows" in capsys.readouterr().err
    assert (ROOT / "README.md").read_text() == README


def test_every_benchmark_is_named_and_the_readme_shows_the_pictures() -> None:
    for name in MODULES:
        assert f"`{name}`" in FULL, name
    for name in ("waiters.svg", "contexts.svg"):
        assert f"tests/benchmarks/pictures/{name}" in README and (FOLDER / name).is_file()


def test_the_limit_answers_the_same_bytes_and_the_event_loop_is_looked_at(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "repository", 3)
    with running_all(tmp_path, root=root) as (sidecars, bares):
        for words, sidecar in sidecars.items():
            bare = bares[words]
            for name, exchange in exchanges(sidecar, bare).items():
                (status, headers, content), (limit_status, limit_headers, limit_content) = (
                    run(once(server.port, sent.replace(NEW, b"%08d" % 9)))
                    for server, sent in ((sidecar, exchange.request), (bare, exchange.limit))
                )
                assert status == limit_status == exchange.status, name
                assert headers.get("etag") == limit_headers.get("etag"), name
                assert abs(len(content) - len(limit_content)) < 20, name  # numbers that go up
            sidecar.held()
            assert run(repeated(bare.port, exchange.limit, exchange.status, 0.02, 2)) > 0
            assert run(repeated(sidecar.port, exchange.request, exchange.status, 0.02, 2)) > 0
            assert sidecar.held(end=True) and not sidecar.held(end=True)


def test_the_processor_time_of_a_request_in_one_checkout_stands_beside_that_in_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (other := tmp_path / "other").mkdir()
    for name in ("cco_sidecar.py", "plugins"):
        (other / name).symlink_to(ROOT / name)
    words = ["--only", "GET /health", "--only", "POST an event", "--rounds", "1", "--seconds", "0.1"]
    assert compare.main([*words, "--no-fast", str(ROOT), str(other)]) == 0
    found = figures_in(capsys.readouterr().out + "\n\n")
    assert list(found) == [f"{name}: {place}" for name in ("GET /health", "POST an event") for place in (ROOT, other)]
    for one, another in zip(*[iter(found.values())] * 2, strict=True):
        assert one[0].endswith(" µs") and another[1] == f"{one[0]} ({ROOT})" and float(another[2]) > 0


@pytest.mark.parametrize(("starved", "least", "most"), [(0.0, 4_999, math.inf), (2.0, 2_999, math.inf), (1e6, 0, 0)])
def test_the_event_loop_is_not_blamed_for_the_time_in_which_it_had_no_processor(
    monkeypatch: pytest.MonkeyPatch, starved: float, least: float, most: float
) -> None:
    probe = import_file(PROBE / "held.py")
    monkeypatch.setattr(probe, "starved", lambda: 10 + starved)

    async def scene() -> None:
        probe.look(time.perf_counter() - 5 - probe.INTERVAL, 10)
        probe.Held.timer.cancel()

    asyncio.run(scene())
    (late,) = probe.Held.late
    assert least <= late <= most


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says it")
def test_the_time_without_a_processor_is_that_of_the_loops_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = import_file(PROBE / "held.py")
    with probe.SCHEDULE.open("rb") as file:
        monkeypatch.setattr(probe.Held, "schedule", file.fileno())
        before, own = probe.starved(), int(probe.SCHEDULE.read_text().split()[1]) / 1e9
        assert 0 <= before <= own <= probe.starved()

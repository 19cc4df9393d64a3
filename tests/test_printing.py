"""What client commands print with: YAML that a YAML library reads back, tables that stay within their width."""

from __future__ import annotations

import argparse
import io
import math
import os
import shutil
import sys
from typing import Any

import pytest
import yaml
from conftest import plugin
from hypothesis import example, given, settings
from hypothesis import strategies as st

printing = plugin("_printing")

TEXT = st.text(st.characters(exclude_categories=[])) | st.text(
    st.sampled_from("ab \n\t\r:#-'\"\\|>&*!%@`{}[],?0.e~\x85\u2028\ufeff\x00é👍")
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)
TRAPS = [
    "yes", "No", "ON", "null", "~", "Null", "true", "1", "0x1F", "1_000", "1e3", "1.5", ".5", ".inf", "-.inf", ".NaN",
    "12:30:45", "2026-01-31", "2026-01-31T12:00:00Z", "<<", "=", "-", "- a", "? a", ": a", "a: b", "a:", "a #b", "#a",
    "", " ", " a", "a ", "a  b", "%a", "---", "...", "!t", "&a", "*a", "[a", "{a", "'a'", "\"a\"", "@a", "`a", "|",
    ">", "a\nb", "a\nb\n", "a\nb\n\n", "\na\nb", "  a\nb", "\ta\nb", "a\n  b", "a\n\n\nb", "a\n ", "\n", "\n\n",
    "a\r\nb", "a\rb", "a\x85b\nc", "a\u2028b\nc", "\u0000", "\x7f", "\ud800", "\ufeff", "\uffff", "é", "日本\n語",
    "👍\nb", "y", "a - b", "a, b (c) + d", "src/main.py", "# x\n- y\n", "k: v\n", "a\n...\nb", "a\n---\nb",
]  # fmt: skip


def read_back(value: Any) -> Any:
    return yaml.safe_load("".join(printing.yaml_lines(value)))


@settings(max_examples=500)
@given(VALUES)
@example({"nested": [{"a": [[1, [2, {}]], []], "b": {"c": {"d": "e\nf"}}}, ["x", ["y\nz\n"]]]})
@example(1e16)
@example([-0.0, 1e-7, 5e300, 10**30])
@example({"k" * 2000: {"k: " * 500: ["v"], "l" * 1100: "a\nb"}})
def test_what_is_printed_as_yaml_is_read_back_by_a_yaml_library(value: Any) -> None:
    assert read_back(value) == value


@pytest.mark.parametrize("text", TRAPS)
def test_a_string_stays_the_string_that_it_is_wherever_it_stands(text: str) -> None:
    for value in (
        text,
        [text],
        {"key": text},
        {text: 1},
        {"a": [{text: text}, text]},
        {"a": text, "b": text},
        [[text], text],
    ):
        assert read_back(value) == value


def test_yaml_is_written_for_people() -> None:
    value = {
        "path": "src/main.py",
        "content": "def main():\n    pass\n",
        "reasons": ["text matches a, b"],
        "size": 3,
        "none": None,
        "more": {},
    }
    assert "".join(printing.yaml_lines({"files": [value]})) == (
        "files:\n  - path: src/main.py\n    content: |\n      def main():\n          pass\n    reasons:\n"
        "      - text matches a, b\n    size: 3\n    none: null\n    more: {}\n"
    )
    assert [read_back(number) for number in (math.inf, -math.inf)] == [math.inf, -math.inf] and math.isnan(
        read_back(math.nan)
    )


COLUMNS = ["id", "agent_type", "issue_id", "state", "started_at", "task"]
ROWS = [
    [
        "a7bf761d",
        "python-specialist",
        "issue-124",
        "running",
        "2026-01-31T12:00:00Z",
        "Explain how routes are matched " * 9,
    ],
    ["b7bf761d", "t" * 60, "i" * 128, "failed 3", "2026-01-31T12:00:00Z", "日本語のとても長い説明" * 20],
    ["c7bf761d", "x", "i", "lost", "2026-01-31T12:00:00Z", "e\u0301\x1b[2J" * 99],
]


def table(width: int, rows: list[list[str]], monkeypatch: pytest.MonkeyPatch, *, terminal: bool = True) -> list[str]:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    screen = Screen()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        patch.setattr(shutil, "get_terminal_size", lambda _: os.terminal_size((width, 24)))
        printing.print_fitted(COLUMNS, rows, whole=["id"], spare=["started_at"])
    return screen.getvalue().splitlines()


@pytest.mark.parametrize("width", [*range(30, 130), 200, 500])
def test_a_table_is_no_wider_than_the_terminal_and_keeps_its_ids_whole(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows in (ROWS, ROWS[:1], ROWS[1:], ROWS[2:]):
        lines = table(width, rows, monkeypatch)
        assert max(map(printing.width_of, lines)) <= width and "……" not in "".join(lines)
        assert [line.split()[0] for line in lines] == ["ID", *(row[0] for row in rows)]
        assert not any(character in line for line in lines for character in "\x1b\t")
        if width >= 80:
            assert (
                lines[0].split()[-1] == "TASK" and printing.width_of(lines[0][: lines[0].index("TASK")]) <= width - 20
            )


@pytest.mark.parametrize("width", [40, 44, 50, 56])
def test_a_list_on_a_narrow_terminal_keeps_what_says_most(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = {
        "agent_id": "python-specialist-a7bf761da6bf", "agent_type": "python-specialist", "issue_id": "issue-124",
        "state": "completed", "exit_code": 0, "pid": 7, "result_status": "success", "run_seconds": 3.21,
        "started_at": "2026-01-31T12:00:00Z", "task": "Explain how routes are matched",
    }  # fmt: skip
    result = {
        "id": "result-6615-a38971f5caeee89", "issue_id": "issue-124", "agent_type": "python-specialist", "agent_id": "a",
        "stored_at": "2026-01-31T12:00:00Z", "result": {"status": "success", "decisions": ["Routes are matched"]},
    }  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(width))
    view = plugin("_client_view")
    for name, row, columns in (("agents", agent, "STATE TASK"), ("results", result, "STATUS DECISION")):
        answer = {name: [row], "has_more": False}
        view.show_list(argparse.Namespace(format="table", since=None), answer, name)
        titles, shown = capsys.readouterr().out.splitlines()
        assert titles.split() == ["ID", "AGENT_TYPE", *columns.split()] and max(len(titles), len(shown)) <= width
        assert shown.split()[2] in ("completed", "success")


def test_a_table_uses_the_width_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = table(79, ROWS[:1], monkeypatch), table(110, ROWS[:1], monkeypatch)
    assert "STARTED_AT" not in narrow[0] and "STARTED_AT" in wide[0]
    assert narrow[1].startswith("a7bf761d  python-specialist  issue-124  running  Explain how")
    assert 75 <= len(narrow[1]) <= 79 and 105 <= len(wide[1]) <= 110 and wide[1].endswith("…")
    assert len(table(1000, ROWS[:1], monkeypatch)[1]) == len("  ".join(ROWS[0]).rstrip())
    assert max(map(len, table(1000, ROWS[:1], monkeypatch, terminal=False))) <= 120
    assert table(80, [], monkeypatch) == ["(none)"]


@pytest.mark.parametrize(("text", "columns", "shown"), [
    ("hello", 5, "hello"), ("hello", 3, "he…"), ("日本語", 6, "日本語"), ("日本語", 5, "日本…"), ("日本語", 4, "日…"),
    ("e\u0301e\u0301", 2, "e\u0301e\u0301"), ("e\u0301e\u0301e", 2, "e\u0301…"), ("", 5, ""),
])  # fmt: skip
def test_a_text_is_cut_to_the_columns_that_it_takes(text: str, columns: int, shown: str) -> None:
    assert printing.cut(text, columns) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/x" * 60 + "/room/name.py", "…" + ("/x" * 60 + "/room/name.py")[-59:]),
        ("a sentence " * 9, ("a sentence " * 9)[:59] + "…"),
        ("/short/room/name.py", "/short/room/name.py"),
        ("/" + "x" * 59, "/" + "x" * 59),
    ],
)
def test_a_wide_cell_is_cut_where_it_tells_least_and_the_last_column_never(
    text: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printing.print_table(["source", "problem"], [[text, text]])
    assert capsys.readouterr().out.splitlines()[1] == f"{shown}  {text}".rstrip()

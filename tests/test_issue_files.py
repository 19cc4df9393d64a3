"""Issues that are written down: which place tells which issue, what odd files do, what gh says."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from conftest import Service, plugin, until

from cco_sidecar import ApiError, IssueNotFound, Pool, Settings, load_settings

issue_files = plugin("issue_files")
turns = plugin("_turn")
go_on = plugin("_steps").go_on
KEY = "ghp_" + "a1B2c3D4e5F6" * 3


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("PATH", "/nowhere")
    (tmp_path / "project").mkdir()
    return load_settings({"root": str(tmp_path / "project")})


def write(settings: Settings, files: dict[str, str]) -> None:
    for name, content in files.items():
        (settings.root / name).parent.mkdir(parents=True, exist_ok=True)
        (settings.root / name).write_text(content)


def lines(*entries: Any) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


BEAD = {
    "id": "bd-a1",
    "title": "Cookies",
    "description": "are lost",
    "design": "in SessionStore",
    "status": "open",
    "priority": 1,
}


@pytest.mark.parametrize(("files", "issue_id", "title", "body"), [
    ({"issues/PROJ-12.md": "# Login fails\n\nAlways."}, "proj-12", "Login fails", "# Login fails\n\nAlways."),
    ({"docs/issues/x.md": "---\nid: PROJ-12\ntitle: 'It''s late'\n---\n# H\n"}, "PROJ-12", "It's late", "# H"),
    ({"issues/x.md": "---\r\nid: 'PROJ-12\r\n---\r\n# PROJ-12: Broken\r\n"}, "PROJ-12", "PROJ-12: Broken", "# PROJ-12: Broken"),
    ({"todo/a/b/x.md": "intro\n# [PROJ-12] Deep #\n"}, "PROJ-12", "[PROJ-12] Deep", "intro\n# [PROJ-12] Deep #"),
    ({".github/issues/0012-login.md": "No heading"}, "12", "0012-login", "No heading"),
    ({"issues/12.md": ""}, "GH-12", "12", ""),
    ({"issues/a.md": "# 12. One", "issues/b.md": "---\nnumber: 12\n---\nTwo", "issues/z/12.md": "Three"}, "12", "12", "Three"),
    ({"issues/a.md": "# 12. One", "issues/b.md": "---\nnumber: 12\n---\nTwo"}, "12", "b", "Two"),
    ({"issues/12-a.md": "One", "issues/b.md": "# 12 Two"}, "12", "12 Two", "# 12 Two"),
    ({"issues/12-b.md": "Two", "issues/12-a.md": "One"}, "12", "12-a", "One"),
    ({"todo/12.md": "Later", "issues/12-a.md": "First"}, "12", "12-a", "First"),
    ({".beads/issues.jsonl": lines({**BEAD, "title": "Old"}, {"id": "bd-a10"}, BEAD), ".beads/base.jsonl": lines({"id": "bd-a1", "title": "?"})},
     "bd-a1", "Cookies", "are lost\n\nDesign: in SessionStore\n\nStatus: open"),
    ({"issues.json": json.dumps([{"number": 7, "id": 99, "title": "T", "body": None, "state": "OPEN"}])}, "7", "T", "Status: OPEN"),
    ({"issues.json": "\ufeff" + json.dumps({"issues": [{"key": "A-7", "summary": "S", "description": "D"}]})}, "a-7", "S", "D"),
    ({"issues.jsonl": "no json\n\n[1, null]\n" + lines({"id": True, "title": "T"}, {"id": "q", "title": 5})}, "q", "", ""),
    ({"issues/s.md": f"# S-1: {KEY}\ntoken = {KEY}"}, "S-1", "S-1: [REDACTED]", "# S-1: [REDACTED]\ntoken = [REDACTED]"),
    ({"issues/long.md": "x" * 40_000}, "long", "long", "x" * 30_000),
    ({"issues/cut.md": "x " * 14_990 + KEY}, "cut", "cut", "x " * 14_990 + "[REDACTED]"),
    # what would keep a pattern busy that looks at the same text again and again
    ({"issues/12.md": "---" + "\n" * 900_000 + "x"}, "12", "12", "---" + "\n" * 29_997),
    ({"issues/12.md": "# " + "#" * 8_000 + "x"}, "12", "#" * 8_000 + "x", "# " + "#" * 8_000 + "x"),
    ({"issues/12.md": "# 12" + " #" * 4_000 + "x"}, "12", "12" + " #" * 4_000 + "x", "# 12" + " #" * 4_000 + "x"),
    ({"issues/12.md": "---\nid: 12\n---" + " " * 4_000 + "\nx"}, "12", "12", "x"),
])  # fmt: skip
def test_the_first_place_that_knows_an_issue_tells_it(
    project: Settings, files: dict[str, str], issue_id: str, title: str, body: str
) -> None:
    write(project, files)
    for _ in range(2):  # also where it is remembered
        assert issue_files.resolve_issue(issue_id, project) == {"title": title, "body": body}


@pytest.mark.parametrize("files", [
    {}, {"issues/121.md": "", "issues/x12.md": "# About 12"}, {"issues/README.md": "# Issues"}, {"issues/.12.md": "hidden"},
    {"issues/a/b/c/12.md": "too deep"}, {"issues.json": "[" * 100_000}, {"issues.json": '[{"number": 12'}, {"issues.json": "12"},
    {"issues.jsonl": lines(12, "12", [12], {"id": None}, {"title": "12"})}, {"issues/12.txt": ""}, {"issues": "a file"}, {"tickets/12.md": ""},
    {"issues/12.md": "\0"},
])  # fmt: skip
def test_an_issue_that_is_not_there_is_none_of_ours(project: Settings, files: dict[str, str]) -> None:
    write(project, files)
    assert issue_files.resolve_issue("12", project) is None


def test_no_link_leads_out_and_places_are_for_the_user_to_name(project: Settings, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write(
        msgspec.structs.replace(project, root=elsewhere),
        {"12.md": "Secret", "export.json": '[{"id": "e", "title": "E"}]'},
    )
    (project.root / "issues").symlink_to(elsewhere)
    (project.root / "docs").symlink_to(tmp_path)
    (tmp_path / "issues").symlink_to(elsewhere)
    (project.root / "todo").mkdir()
    (project.root / "todo/12.md").symlink_to(elsewhere / "12.md")
    os.mkfifo(project.root / "todo/13.md")
    assert issue_files.resolve_issue("12", project) is None and issue_files.resolve_issue("13", project) is None
    named = msgspec.structs.replace(project, issue_files=(str(elsewhere), str(elsewhere / "export.json")))
    assert issue_files.resolve_issue("12", named) == {"title": "12", "body": "Secret"}
    assert issue_files.resolve_issue("e", named) == {"title": "E", "body": ""}


def test_a_changed_file_is_told_as_it_is_now(project: Settings) -> None:
    for number in range(3):
        write(
            project,
            {"issues/a.md": f"# A-{number}: x", "issues.json": json.dumps([{"id": f"E-{number}", "title": "E"}])},
        )
        old = time.time() - 100  # as if long ago, so that what is read is remembered
        os.utime(project.root / "issues/a.md", (old, old + number))
        assert issue_files.resolve_issue(f"A-{number}", project) and issue_files.resolve_issue(f"E-{number}", project)
        assert number == 0 or issue_files.resolve_issue(f"A-{number - 1}", project) is None
        assert number == 0 or issue_files.resolve_issue(f"E-{number - 1}", project) is None


@pytest.mark.parametrize("place", [".beads/issues.jsonl", "issues.jsonl", "issues.json"])
def test_of_an_export_that_is_edited_again_and_again_one_version_is_kept(project: Settings, place: str) -> None:
    mark = [f"of a version of {project.root / place}"]
    for number in range(3):
        entry = {"id": f"E-{number}", "title": "E", "labels": mark}
        write(project, {place: json.dumps(entry) + " " * number})
        until(lambda: issue_files.unchanged(str(project.root / place)))
        assert issue_files.resolve_issue(f"E-{number}", project)
        entries = issue_files.entries_of(str(project.root), place)
        assert issue_files.entries_of(str(project.root), place) is entries
        del entries
        assert sum(type(each) is list and each == mark and each is not mark for each in gc.get_objects()) == 1


GH = """\
import json, os, sys, time
with open("called", "a") as file:
    print(*sys.argv[1:], file=file)
number = sys.argv[3]
if number == "3":
    time.sleep(60)
if number == "2":
    sys.exit("GraphQL: Could not resolve to an issue")
if number == "4":
    print("[]")
else:
    print(json.dumps({"number": int(number), "title": "From GitHub", "body": "token = KEY", "state": "OPEN"}))
"""


def test_gh_tells_of_numbers_once_in_some_minutes(
    project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gh").write_text(f"#!{sys.executable}\n{GH.replace('KEY', KEY)}")
    (tmp_path / "gh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(issue_files, "GH_SECONDS", 3.0)  # of which gh needs a few tenths
    told = {"title": "From GitHub", "body": "token = [REDACTED]\n\nStatus: OPEN"}
    for issue_id, expected in (
        ("1", told),
        ("gh-1", told),
        ("2", None),
        ("2", None),
        ("3", None),
        ("4", None),
        ("issue-1", None),
        ("01", None),
    ):
        assert issue_files.resolve_issue(issue_id, project) == expected, issue_id
    fields = "--json number,title,body,state"
    assert (project.root / "called").read_text().splitlines() == [
        f"issue view {number} {fields}" for number in (1, 2, 3, 4)
    ]
    write(project, {"issues/1.md": "Written down"})
    assert issue_files.resolve_issue("1", project)["body"] == "Written down"
    without = msgspec.structs.replace(project, issue_files=("./gh",))
    assert issue_files.resolve_issue("5", without) is None


def test_where_gh_said_nothing_nobody_is_asked_for_a_minute(
    project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    contexts = asking_contexts(project, noting(asked))
    assert [task_of(contexts, issue) for issue in ("2", "gh-2", "2", "1")] == [""] * 4  # gh is not installed
    assert asked == ["2", "1"]
    (tmp_path / "gh").write_text(f"#!{sys.executable}\n{GH.replace('KEY', KEY)}")
    (tmp_path / "gh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 61)
    assert [task_of(contexts, issue)[:11] for issue in ("2", "2", "1", "GH-1")] == ["", "", *["From GitHub"] * 2]
    assert asked[2:] == ["2", "1", "GH-1"]


def test_a_context_has_the_task_of_its_issue(make_service: Callable[..., Service], repository: Path) -> None:
    service = make_service("--issue-files", "docs/tickets")
    url = "/api/context/T-9/python-specialist"
    assert service.client().get(url).json()["context"]["metadata"]["task_matched"] is None
    (repository / "docs/tickets").mkdir()
    (repository / "docs/tickets/T-9.md").write_text(f"# Cookies are not kept\n\nsave_cookie forgets; token = {KEY}")
    context = service.client().get(url).json()["context"]
    assert context["metadata"]["task_matched"] is True
    brief = service.client().request("GET", url, headers={"Accept": "text/markdown"}).text
    assert "Cookies are not kept" in brief and KEY not in brief + json.dumps(context)


def test_what_is_written_down_is_listed_but_for_what_is_over(project: Settings) -> None:
    write(project, {
        "issues/12-login.md": "# The login fails\n", "issues/PAY-7_refund.md": "Text", "issues/README.md": "# Issues\n",
        "issues/plain.md": "---\nid: X-1\ntitle: Named\n---\nText\n", "issues/odd name.md": "# No id\n",
        "issues/key.md": f"# {KEY}\n", "issues/cut.md": f"# {'x ' * 240}{KEY}\n", ".beads/issues.jsonl": lines(
            {"id": "b-1", "title": "Old", "status": "open"}, {"id": "b-1", "title": "New", "status": "open"},
            {"id": "b-2", "title": "Over", "status": "closed"}, {"id": "../x", "title": "Out"}, {"id": 5}, "nonsense"),
        "issues.json": "{",
    })  # fmt: skip
    (project.root / "issues/link.md").symlink_to("/etc/passwd")
    found = {row.issue_id: (row.title, row.source) for row in issue_files.written_issues(project)}
    assert found == {
        "12": ("The login fails", "issues/12-login.md"), "PAY-7": ("PAY-7_refund", "issues/PAY-7_refund.md"),
        "X-1": ("Named", "issues/plain.md"), "key": ("[REDACTED]", "issues/key.md"),
        "cut": ("x " * 240 + "[REDACTED]", "issues/cut.md"),
        "b-1": ("New", ".beads/issues.jsonl"), "5": ("", ".beads/issues.jsonl"),
    }  # fmt: skip


def asking_contexts(settings: Settings, first: Callable[..., Any], *plugins: Callable[..., Any]) -> Any:
    """Contexts whose plugins are asked by ``first``; ``plugins`` are those that are asked about issues beside ours."""
    contexts = issue_files.AskingContexts.__new__(issue_files.AskingContexts)
    rows = [SimpleNamespace(function=function) for function in (issue_files.resolve_issue, *plugins)]
    contexts._settings = settings
    contexts._hooks = SimpleNamespace(first=first, implementations={"resolve_issue": rows})
    contexts._storage = SimpleNamespace(read=SimpleNamespace(task_of=lambda *_: ""))
    return contexts


def noting(asked: list[str]) -> Callable[..., Any]:
    """Who asks for an issue as the service does, and notes its id."""

    def first(hook: str, issue_id: str, settings: Settings) -> Any:
        asked.append(issue_id)
        return issue_files.resolve_issue(issue_id, settings)

    return first


def task_of(contexts: Any, issue_id: str) -> str:
    async def task() -> str:
        contexts._hooks.pool = Pool("hooks", 4, 5)
        told: str = await contexts.task(issue_id, "")
        return told

    return asyncio.run(task())


COMING: dict[str, Callable[[Settings], Any]] = {  # how the issue A-1 comes
    "a file in a folder": lambda project: write(project, {"issues/A-1.md": "# Cookies"}),
    "a file in a folder's folder": lambda project: write(project, {"docs/issues/A-1.md": "# Cookies"}),
    "a bead": lambda project: write(project, {".beads/issues.jsonl": lines({"id": "A-1", "title": "Cookies"})}),
    "an export": lambda project: write(project, {"issues.json": '[{"id": "A-1", "title": "Cookies"}]'}),
    "a link to a folder": lambda project: (
        write(project, {"elsewhere/issues/A-1.md": "# Cookies"}), (project.root / "docs").symlink_to("elsewhere")
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", COMING)
def test_nobody_is_asked_while_no_place_is_there_and_an_issue_that_comes_is_told_at_once(
    project: Settings, how: str
) -> None:
    asked: list[str] = []
    contexts = asking_contexts(project, noting(asked))
    write(
        project, {".github/workflows/ci.yml": "", "src/main.py": ""} | ({"docs/a.md": ""} if "link" not in how else {})
    )
    assert task_of(contexts, "A-1") == "" and asked == []
    COMING[how](project)
    assert "Cookies" in task_of(contexts, "A-1") and asked == ["A-1"]


@pytest.mark.parametrize("who", ["gh", "another plugin", "a place elsewhere", "a place above"])
def test_who_can_know_an_issue_without_a_place_in_the_project_is_always_asked(project: Settings, who: str) -> None:
    elsewhere = {"a place elsewhere": "~/issues", "a place above": "../issues"}
    settings = msgspec.structs.replace(project, issue_files=(elsewhere.get(who, "issues"), "gh"))
    plugins = [lambda issue_id: {"title": "Cookies"}] if who == "another plugin" else []
    contexts = asking_contexts(settings, lambda hook, issue_id, settings: {"title": f"of {issue_id}"}, *plugins)

    issue_id = "12" if who == "gh" else "A-1"
    assert task_of(contexts, issue_id) == f"of {issue_id}"
    assert task_of(contexts, "A-2") == ("" if who == "gh" else "of A-2")


def test_requests_that_are_served_together_ask_once_for_an_issue(project: Settings) -> None:
    asked: list[str] = []

    def first(hook: str, issue_id: str, settings: Settings) -> dict[str, str]:
        asked.append(issue_id)
        if issue_id == "gone":
            raise IssueNotFound
        return {"title": issue_id}

    contexts = asking_contexts(project, first, lambda issue_id: None)

    async def ask() -> list[Any]:
        contexts._hooks.pool = Pool("hooks", 4, 5)
        with turns.Turn():
            begun = [contexts.task(issue, "") for issue in ("12", "12", "12", "gone", "gone", "13")]
            waited_for = [coroutine.send(None) for coroutine in begun]
        begun.pop(0).close()  # its client hung up
        answers = [asyncio.ensure_future(go_on(*each)) for each in zip(begun, waited_for[1:], strict=True)]
        answers += [asyncio.ensure_future(contexts.task("12", "")) for _ in range(2)]  # outside of a turn each asks
        return await asyncio.gather(*answers, return_exceptions=True)

    *known, first_gone, second_gone, other, alone, also = asyncio.run(ask())
    assert [*known, alone, also, other] == ["12"] * 4 + ["13"]
    assert all(isinstance(error, ApiError) and error.code == "REQ_002" for error in (first_gone, second_gone))
    assert sorted(asked) == ["12", "12", "12", "13", "gone"]

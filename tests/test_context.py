"""Contexts: every field is measured on a real repository, nothing is older than the disk, and no secret gets out."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from conftest import MODULE, Client, Service, git, make_repository, outside_repositories, plugin, serving, until, write
from freshness import stale_answers
from hypothesis import given, settings
from hypothesis import strategies as st

import cco_sidecar
from cco_sidecar import ApiError, Contexts, RankedFile, choose_files, language_of, read_text_file, redact

budget, keywords, withheld = plugin("budget"), plugin("keywords"), plugin("_withheld")
MakeService = Callable[..., Service]
KEYWORDS_ONLY = ["--plugins", str(Path(__file__).parent / "keywords_only")]
RANKINGS = [
    pytest.param([], id="the ranking by an index, or the module's own"),
    pytest.param(KEYWORDS_ONLY, id="keywords", marks=pytest.mark.needs_plugin("context/keywords ranks so")),
]


def answer_of(
    client: Client, issue: str = "issue-1", agent_type: str = "python-specialist", **params: Any
) -> dict[str, Any]:
    answer = client.get(f"/api/context/{issue}/{agent_type}", **params)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def context_of(
    client: Client, issue: str = "issue-1", agent_type: str = "python-specialist", **params: Any
) -> dict[str, Any]:
    return answer_of(client, issue, agent_type, **params)["context"]  # type: ignore[no-any-return]


def files_of(client: Client, **params: Any) -> dict[str, dict[str, Any]]:
    """The relevant files by path, most relevant first."""
    return {file["path"]: file for file in context_of(client, **params)["relevant_files"]}


def iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# -- files


def test_the_structure_is_what_git_lists(service: Service, architect: Client) -> None:
    write(service.root / "build/output.py", "ignored")
    write(service.root / "noise.log", "ignored")
    structure = context_of(architect)["project_structure"]
    names = sorted(git(service.root, "ls-files").splitlines())
    assert structure["root"] == str(service.root)
    assert structure["files"] == names
    assert structure["directories"] == ["docs", "src", "tests"]
    assert structure["total_files"] == len(names)
    assert structure["total_size_bytes"] == sum((service.root / name).stat().st_size for name in names)


def test_every_file_is_described_by_what_is_on_disk(service: Service, architect: Client) -> None:
    answer = answer_of(architect, agent_type="chief-architect")
    files = answer["context"]["relevant_files"]
    assert {"src/main.py", "tests/test_main.py", "docs/guide.md", "pyproject.toml"} <= {file["path"] for file in files}
    for file in files:
        path = service.root / file["path"]
        assert file["content"] == path.read_text()
        assert file["checksum"] == "sha256:" + hashlib.sha256(file["content"].encode()).hexdigest()
        assert file["size"] == path.stat().st_size
        assert file["last_modified"] == iso(path.stat().st_mtime)
        assert file["language"] == language_of(file["path"])
    assert answer["file_count"] == len(files)
    assert answer["truncated"] is False
    assert answer["truncation_strategy"] == "none"
    assert answer["total_size_bytes"] == len(
        json.dumps(answer["context"], separators=(",", ":"), ensure_ascii=False).encode()
    )
    assert abs(time.time() - datetime.fromisoformat(answer["timestamp"]).timestamp()) < 60


def test_alone_git_is_not_asked_for_the_words_of_very_large_files(repository: Path) -> None:
    rules, large = cco_sidecar.ReferenceRules(), "docs/:(x) dump.sql"
    write(repository / large, "cookie\n" * (rules.SEARCHED_BYTES // 7 + 1))
    files = cco_sidecar.Project(repository, repository).look().files
    request = cco_sidecar.RankRequest(
        root=str(repository), index_folder="", files=files, agent_type="python-specialist", category="coding",
        task="the cookie", changed=[], outputs=[], head=None,
    )  # fmt: skip
    matched = {item.path: item.matched for item in rules.rank_files(request)}
    assert matched[large] is False and matched["src/session_store.py"] is True


def test_alone_a_folder_that_is_no_repository_has_the_files_that_are_not_hidden(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = outside_repositories(tmp_path) / "folder"
    for name in ("main.py", "src/deep/part.py", ".secret/key.pem", ".hidden"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x = 1\n")
    state = cco_sidecar.Project(folder, tmp_path).look()
    assert [file.path for file in state.files] == [".hidden", "main.py", "src/deep/part.py"]
    assert (state.git.branch, state.head) == (None, None)
    (folder / ".git").write_text("gitdir: /nowhere\n")
    with pytest.raises(cco_sidecar.GitError, match="not a git repository"):
        cco_sidecar.Project(folder, tmp_path).look()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(cco_sidecar.GitError, match="git is not installed"):
        cco_sidecar.Project(repository, tmp_path).look()


def test_git_is_waited_for_without_looking_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = write(tmp_path / "git", "#!/bin/sh\necho said; exec >&- 2>&-; sleep 0.3; exit $CODE\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"sleeps for {seconds} s"))
    monkeypatch.setenv("CODE", "0")
    assert cco_sidecar.ask_git(tmp_path, "version") == b"said\n"
    monkeypatch.setenv("CODE", "7")
    with pytest.raises(cco_sidecar.GitError, match="it ended by 7"):
        cco_sidecar.ask_git(tmp_path, "version")
    assert cco_sidecar.run_git(tmp_path, "version") is None


def test_an_unknown_agent_type_is_not_found(architect: Client) -> None:
    answer = architect.get("/api/context/issue-1/fortune-teller")
    assert (answer.status_code, answer.json()["code"]) == (404, "AGT_002")


def test_any_issue_starts_somewhere(architect: Client, issue: str) -> None:
    answer = answer_of(architect, issue)
    assert (answer["issue_id"], answer["agent_type"]) == (issue, "python-specialist")
    assert answer["context"]["previous_agent_outputs"] == []


@pytest.mark.parametrize("params", [{"max_bytes": 1}, {"max_bytes": "x"}, {"max_files": -1}, {"max_bytes": 11 << 20}])
def test_a_budget_that_makes_no_sense_is_refused(architect: Client, params: dict[str, Any]) -> None:
    assert architect.get("/api/context/issue-1/python-specialist", **params).status_code == 400


# -- git


def test_commits_are_those_of_git(service: Service, architect: Client) -> None:
    found = context_of(architect)["git_context"]
    assert found["branch"] == "main"
    commits = found["recent_commits"]
    assert [commit["message"] for commit in commits] == ["Greet politely", "Initial commit"]
    assert [commit["hash"] for commit in commits] == git(service.root, "log", "--format=%h").split()
    assert [commit["author"] for commit in commits] == ["developer"] * 2
    assert [commit["timestamp"] for commit in commits] == [
        iso(float(moment)) for moment in git(service.root, "log", "--format=%ct").split()
    ]
    assert commits[0]["files_changed"] == ["src/greeting.py"]
    assert sorted(commits[1]["files_changed"]) == sorted(git(service.root, "ls-files").splitlines())


def test_the_remote_comes_without_user_info(architect: Client) -> None:
    answer = architect.get("/api/context/issue-1/python-specialist")
    found = answer.json()["context"]["git_context"]
    assert (found["remote"], found["remote_url"]) == ("origin", "https://github.com/org/project")
    assert "password" not in answer.text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pass@example.com/a/b", "https://example.com/a/b"),
        ("https://token@example.com/a@b", "https://example.com/a@b"),
        ("ssh://git@example.com:22/a", "ssh://example.com:22/a"),
        ("https://example.com/a", "https://example.com/a"),
        ("git@github.com:org/project.git", "git@github.com:org/project.git"),
        ("https://user:p@ss@example.com/a", "https://example.com/a"),
        ("https://user:p/a@s?s#@example.com:8443/a/b.git", "https://example.com:8443/a/b.git"),
        ("https://user:a b c@example.com/a", "https://example.com/a"),
        ("https://u:p@ss/w?rd x@git.example.org:8443/a/b.git?token=abc", "https://git.example.org:8443/a/b.git"),
        ("https://u:p@example.com/a.git@v1.0", "https://example.com/a.git@v1.0"),
        ("https://user:a/b@[::1]:8443/a", "https://[::1]:8443/a"),
        ("https://[::1]:8443/a@b", "https://[::1]:8443/a@b"),
        ("https://example.com:8443/a@b", "https://example.com:8443/a@b"),
        ("https://example.com/a.git?private_token=abc", "https://example.com/a.git"),
        ("https://example.com/a.git#access_token=abc", "https://example.com/a.git"),
        ("/srv/git//a@b/c", "/srv/git//a@b/c"),
        ("https://u:Zq9@w0rd/x@host/o/r.git", "https://host/o/r.git"),
        ("https://u:Zq@9.WO/RD@host/r", "https://host/r"),
        ("https://u:1234/w@host/r", "https://host/r"),
        ("https://u:Zq9@w/l X@host/x.git?token=abc#a=b", "https://host/x.git"),
        ("https://me@example.com:Z/q9@host/r", "https://host/r"),
        ("https://half/a#token@host/r", "https://host/r"),
        ("https:/u:Zq9@host/r", "https:/host/r"),
        ("//u:Zq/9@host/r", "//host/r"),
        ("u:Zq9@host:r.git", "host:r.git"),
        ("me@example.com:Zq/9@[::1]:r.git", "[::1]:r.git"),
        ("https:u:Zq9@host/r", "host/r"),
        ("file://u:Zq9@host/r", "file://host/r"),
        ("https://host/r;token=Zq9", "https://host/r"),
        ("https://host/r&sig=Zq9", "https://host/r"),
        ('ext::sh -c "a http://b.c/ b https://u:Zq9@h"', 'ext::sh -c "a http://b.c/ b https://h"'),
        ("http://registry:4873/@scope/pkg", "http://registry:4873/@scope/pkg"),
        ("git+ssh://git@github.com/o/r@v1#semver:^1", "git+ssh://github.com/o/r@v1#semver:^1"),
        ("npm:@scope/pkg@^1.2", "npm:@scope/pkg@^1.2"),
        ("patch:foo@npm:1.0#~/.yarn/x.patch", "patch:foo@npm:1.0#~/.yarn/x.patch"),
        ("file:../@scope/pkg", "file:../@scope/pkg"),
        ("user@host:path/x", "user@host:path/x"),
        (">=1.0; python_version > '3'", ">=1.0; python_version > '3'"),
        *((f"https://{part * 50_000}@host", "") for part in ("a", "://u:", "u:x")),  # at once
    ],
)
def test_user_info_is_removed(url: str, shown: str) -> None:
    assert plugin("_urls").without_credentials(url) == shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pass@example.com/a/b?token=x#y", "https://example.com/a/b"),
        ("ssh://git@example.com:22/a", "ssh://example.com:22/a"), ("//u:p@ss@example.com/a@b", "//example.com/a@b"),
        ("git@github.com:org/project.git", "git@github.com:org/project.git"), ("u:Zq9@host:r.git", "host:r.git"),
        ("../a@b/c", "../a@b/c"), ("/srv/git/a:b@c", "/srv/git/a:b@c"),
    ],
)  # fmt: skip
def test_the_module_alone_removes_user_info_of_urls_in_the_standards_form(url: str, shown: str) -> None:
    assert cco_sidecar.without_credentials(url) == shown


def test_uncommitted_changes_have_their_real_line_counts(
    make_service: MakeService, repository: Path, setup: str
) -> None:
    write(repository / "src/main.py", "def main():\n    value = greet('you')\n    return value\n")
    write(repository / "src/staged.py", "one\ntwo\n")
    write(repository / "fresh/new file.txt", "untracked\n")
    write(repository / "binary.bin", b"\0\1\2")
    git(repository, "add", "src/staged.py", "binary.bin")
    git(repository, "rm", "-q", "tests/test_main.py")
    (repository / "README.md").unlink()
    git(repository, "rm", "-q", "--cached", "pyproject.toml")
    git(repository, "mv", "docs/guide.md", "docs/manual.md")
    moved = {"docs/manual.md": ("renamed", "+0 -0")}
    if setup == "alone":
        moved = {"docs/guide.md": ("deleted", "+0 -3"), "docs/manual.md": ("added", "+3 -0")}
    changes = context_of(make_service().client())["git_context"]["uncommitted_changes"]
    assert {change["path"]: (change["status"], change["diff"]) for change in changes} == {
        "src/main.py": ("modified", "+2 -1"),
        "src/staged.py": ("added", "+2 -0"),
        "fresh/new file.txt": ("untracked", None),
        "binary.bin": ("added", None),
        "tests/test_main.py": ("deleted", "+0 -2"),
        "README.md": ("deleted", "+0 -1"),
        "pyproject.toml": ("untracked", None),
    } | moved


def test_a_detached_head_has_no_branch(make_service: MakeService, repository: Path) -> None:
    git(repository, "checkout", "-q", "--detach", "HEAD~1")
    found = context_of(make_service().client())["git_context"]
    assert found["branch"] is None
    assert [commit["message"] for commit in found["recent_commits"]] == ["Initial commit"]


@pytest.mark.needs_plugin("context/project_index tells what git waits to go on with")
@pytest.mark.parametrize(
    ("begin", "end", "told", "conflict"),
    [
        ("merge other", "merge --abort", "merge of other", True),
        ("rebase other", "rebase --abort", "rebase of main", True),
        ("cherry-pick other", "cherry-pick --abort", "cherry-pick of {other}", True),
        ("revert HEAD~1", "revert --abort", "revert of {last}", True),
        ("merge --no-commit --no-ff beside", "merge --abort", "merge of beside", False),
        ("cherry-pick other", "cherry-pick --quit", "cherry-pick of {other}", True),
        ("bisect start", "bisect reset", "bisect from main", False),
        ("am -q .git/0001-To-be-other.patch", "am --abort", "am", False),
        ("stash pop", "reset -q --hard", None, True),
    ],
)
def test_what_git_waits_to_go_on_with_and_what_is_in_conflict_is_told_until_it_is_over(
    fresh: Service, begin: str, end: str, told: str | None, conflict: bool
) -> None:
    root, client = fresh.root, fresh.client()
    commits = [("main", "before", "README.md"), ("beside", "beside", "beside.md"), ("other", "other", "README.md")]
    for branch, text, name in [*commits, ("main", "after", "README.md")]:
        git(root, "checkout", "-q", *([branch] if branch == "main" else ["-b", branch, "main"]))
        write(root / name, f"{text}\n")
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", f"To be {text}")
    write(root / "README.md", "stashed\n")
    git(root, "stash", "-q")
    write(root / "README.md", "meanwhile\n")
    git(root, "commit", "-q", "-a", "-m", "To be meanwhile")
    git(root, "format-patch", "-q", "-1", "-o", ".git", "other")
    hashes = {name: git(root, "rev-parse", ref)[:10] for name, ref in (("other", "other"), ("last", "HEAD~1"))}

    def state() -> tuple[str | None, set[str]]:
        found = context_of(client)["git_context"]
        return found.get("in_progress"), {each["path"] for each in found["uncommitted_changes"] if each.get("conflict")}

    assert state() == (None, set())
    with contextlib.suppress(subprocess.CalledProcessError):  # a conflict
        git(root, *begin.split())
    assert state() == (told and told.format(**hashes), {"README.md"} if conflict else set())
    brief = client.request("GET", "/api/context/issue-1/python-specialist", headers={"Accept": "text/markdown"}).text
    assert (f"In progress: `{told.format(**hashes)}`, " if told else "\n1 file in conflict.") in brief
    assert ("- in conflict `README.md`" in brief) is conflict
    git(root, *end.split())
    over = end.endswith("--quit")  # which leaves the tree as it is
    assert state() == (None, {"README.md"} if over else set())


@pytest.mark.needs_plugin("context/project_index counts lines before the first commit")
def test_an_unborn_branch_has_a_name_and_no_commits(make_service: MakeService, tmp_path: Path) -> None:
    root = tmp_path / "unborn"
    root.mkdir()
    git(root, "init", "-q", "-b", "trunk")
    write(root / "first.py", "a\nb\n")
    write(root / "second.py", "c\n")
    git(root, "add", "first.py")
    context = context_of(make_service(root=root).client())
    found = context["git_context"]
    assert (found["branch"], found["recent_commits"], found["remote"], found["remote_url"]) == ("trunk", [], None, None)
    changes = {change["path"]: (change["status"], change["diff"]) for change in found["uncommitted_changes"]}
    assert changes == {"first.py": ("added", "+2 -0"), "second.py": ("untracked", None)}
    assert context["project_structure"]["files"] == ["first.py", "second.py"]


def test_a_linked_worktree_is_served_with_its_own_branch_and_stays_fresh(
    make_service: MakeService, repository: Path, tmp_path: Path
) -> None:
    root = tmp_path / "linked"
    git(repository, "worktree", "add", "-q", "-b", "side", str(root))
    client = make_service(root=root).client()
    assert context_of(client)["git_context"]["branch"] == "side"
    assert context_of(client)["git_context"]["remote_url"] == "https://github.com/org/project"
    write(root / "src/side.py", "x = 1\n")
    git(root, "add", "-A")
    assert context_of(client)["git_context"]["uncommitted_changes"] == [
        {"path": "src/side.py", "status": "added", "diff": "+1 -0"}
    ]
    git(root, "commit", "-q", "-m", "On the side")
    context = context_of(client)
    assert context["git_context"]["recent_commits"][0]["message"] == "On the side"
    assert context["git_context"]["uncommitted_changes"] == []
    assert "src/side.py" in context["project_structure"]["files"]


def test_a_subfolder_is_served_with_paths_of_its_own(make_service: MakeService, repository: Path) -> None:
    write(repository / "src/main.py", "changed\n")
    write(repository / "README.md", "changed outside\n")
    client = make_service(root=repository / "src").client()
    context = context_of(client)
    assert context["project_structure"]["files"] == ["greeting.py", "main.py", "session_store.py"]
    assert context["git_context"]["branch"] == "main"
    assert context["git_context"]["uncommitted_changes"] == [{"path": "main.py", "status": "modified", "diff": "+1 -2"}]
    commits = context["git_context"]["recent_commits"]
    assert [sorted(commit["files_changed"]) for commit in commits] == [
        ["greeting.py"],
        ["greeting.py", "main.py", "session_store.py"],
    ]
    git(repository, "commit", "-q", "-a", "-m", "From above")
    assert context_of(client)["git_context"]["recent_commits"][0]["message"] == "From above"


@pytest.mark.needs_plugin("context/project_index reads folders without git")
def test_a_folder_without_git_is_served_with_its_ignore_rules(make_service: MakeService, tmp_path: Path) -> None:
    root = tmp_path / "plain"
    write(root / "app.py", "x = 1\n")
    write(root / "secret.log", "ignored")
    write(root / "node_modules/library/index.js", "not ours")
    write(root / ".gitignore", "*.log\n")
    client = make_service(root=root).client()
    context = context_of(client)
    assert context["project_structure"]["files"] == [".gitignore", "app.py"]
    empty = {"branch": None, "recent_commits": [], "uncommitted_changes": [], "remote": None, "remote_url": None}
    assert context["git_context"] == empty
    write(root / "package/new.py", "y = 2\n")
    assert context_of(client)["project_structure"]["files"] == [".gitignore", "app.py", "package/new.py"]


IGNORING: dict[str, Callable[[Path], object]] = {  # what may exclude files, for which git has to be asked
    "a repository": lambda root: git(root, "init", "-q"),
    "a file of rules": lambda root: write(root / ".gitignore", "*.log\n"),
    "rules in a folder": lambda root: write(root / "inner/.gitignore", "!x\n"),
    "a repository around it": lambda root: git(root.parent, "init", "-q"),
    "a work tree's pointer": lambda root: write(root / ".git", "gitdir: ../elsewhere\n"),
}


@pytest.mark.needs_plugin("context/project_index reads folders without git")
@pytest.mark.parametrize("what", [*IGNORING, "nothing"])
def test_a_machine_without_git_gets_files_where_nothing_excludes_any(
    make_service: MakeService, tmp_path: Path, what: str
) -> None:
    (tmp_path / "empty").mkdir()
    root = outside_repositories(tmp_path) / "around/plain"
    write(root / "app.py", "x = 1\n")
    write(root / "secret.log", "ignored")
    IGNORING.get(what, str)(root)
    client = make_service(root=root, env={"PATH": str(tmp_path / "empty")}).client()
    answer = client.get("/api/context/issue-1/python-specialist")
    if what == "nothing":
        assert answer.json()["context"]["project_structure"]["files"] == ["app.py", "secret.log"]
        assert answer.json()["context"]["git_context"]["recent_commits"] == []
    else:
        assert (answer.status_code, answer.json()["code"]) == (500, "CTX_001")
        assert "git is not installed" in answer.json()["message"] and "app.py" not in answer.text


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.rs", "b.rs", "c.py"], "rust"),
        (["README.md", "x.json"], "unknown"),
        (["a.tf", "lib.hs"], "terraform"),
        (["LICENSE"], "unknown"),
        (["CMakeLists.txt", "a.c", "b.c", "main.cpp"], "c"),
        (["CMakeLists.txt", "a.cpp", "a.h", "b.h"], "cpp"),
        (["a.v", "b.v", "tests/a.s", "tests/b.s", "tests/c.s"], "verilog"),
    ],
)
def test_without_a_manifest_the_language_of_most_files_says_what_a_project_is(
    tmp_path: Path, names: list[str], kind: str
) -> None:
    assert plugin("_first_files").project_type(tmp_path, names) == cco_sidecar.main_language(tuple(names)) == kind


# -- never older than the disk


@pytest.fixture(params=["watched", "not watched"])
def fresh(request: pytest.FixtureRequest, make_service: MakeService) -> Service:
    return make_service(*(["--no-watch"] if request.param == "not watched" else []))


def test_every_kind_of_change_shows_in_the_next_get(fresh: Service) -> None:
    client, root = fresh.client(), fresh.root
    main = root / "src/main.py"

    def content(path: str) -> str | None:
        return files_of(client).get(path, {}).get("content")

    def branch_and_changes() -> tuple[Any, list[str]]:
        found = context_of(client)["git_context"]
        return found["branch"], [change["path"] for change in found["uncommitted_changes"]]

    assert content("src/main.py") == main.read_text()
    write(main, "edited\n")
    assert content("src/main.py") == "edited\n"
    before = main.stat()
    write(main, "EDITED\n")  # the same size, and the same time stamp
    os.utime(main, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content("src/main.py") == "EDITED\n"
    write(root / "src/.swap", "saved by an editor\n").replace(main)
    assert content("src/main.py") == "saved by an editor\n"
    main.rename(root / "src/renamed.py")
    assert (content("src/main.py"), content("src/renamed.py")) == (None, "saved by an editor\n")
    (root / "src/renamed.py").unlink()
    assert content("src/renamed.py") is None
    write(root / "deep/er/new.py", "new\n")
    assert content("deep/er/new.py") == "new\n"
    write(root / ".gitignore", "deep/\n")
    assert content("deep/er/new.py") is None
    write(root / ".gitignore", "")
    assert content("deep/er/new.py") == "new\n"
    write(root / ".git/info/exclude", "deep/\n")
    assert content("deep/er/new.py") is None
    write(root / ".git/info/exclude", "")
    assert branch_and_changes() == ("main", [".gitignore", "src/main.py", "deep/er/new.py"])
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "All of it")
    assert branch_and_changes() == ("main", [])
    assert context_of(client)["git_context"]["recent_commits"][0]["message"] == "All of it"
    git(root, "checkout", "-q", "-b", "other")
    assert branch_and_changes() == ("other", [])
    write(root / "src/greeting.py", "stashed away\n")
    assert branch_and_changes() == ("other", ["src/greeting.py"])
    git(root, "stash", "-q")
    assert branch_and_changes() == ("other", [])
    assert content("src/greeting.py") != "stashed away\n"
    git(root, "stash", "pop", "-q")
    assert content("src/greeting.py") == "stashed away\n"
    git(root, "checkout", "-q", "-f", "--detach", "main~1")
    assert branch_and_changes() == (None, [])
    assert content("src/main.py") is not None
    git(root, "remote", "set-url", "origin", "https://example.com/moved")
    assert context_of(client)["git_context"]["remote_url"] == "https://example.com/moved"
    client.store(
        "chief-architect", decisions=["first", "second"], files_created=["a.py", {"path": "b.py"}], rationale="because"
    )
    (output,) = context_of(client)["previous_agent_outputs"]
    assert (output["agent"], output["agent_type"], output["decision"]) == (
        "chief-architect-1",
        "chief-architect",
        "first; second",
    )
    assert (output["rationale"], output["files_affected"]) == ("because", ["a.py", "b.py"])
    client.store("python-specialist", "failed")
    assert [output["agent_type"] for output in context_of(client)["previous_agent_outputs"]] == [
        "chief-architect",
        "python-specialist",
    ]
    assert context_of(client, issue="issue-2")["previous_agent_outputs"] == []


@pytest.mark.parametrize("seed", range(2))
def test_after_each_of_many_random_changes_a_get_shows_the_disk(fresh: Service, seed: int) -> None:
    done, wrong = stale_answers(fresh, 40, seed)
    assert (done >= 40, wrong) == (True, [])


def test_a_folder_that_is_no_longer_ignored_is_looked_into(make_service: MakeService, repository: Path) -> None:
    (repository / "build/empty").mkdir(parents=True)
    client = make_service("--no-watch").client()
    assert "build/empty/new.py" not in files_of(client)
    write(repository / ".gitignore", "")
    assert "build/empty/new.py" not in files_of(client)
    write(repository / "build/empty/new.py", "new\n")
    assert files_of(client)["build/empty/new.py"]["content"] == "new\n"


def test_a_submodule_is_a_change_when_it_is_at_another_commit(
    make_service: MakeService, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = make_repository(tmp_path / "other")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(other), "library")
    git(repository, "commit", "-q", "-m", "A library")
    client = make_service("--no-watch").client()
    context = context_of(client)
    assert (
        "library" not in context["project_structure"]["files"]
        and "library/src/main.py" not in context["project_structure"]["files"]
    )
    assert context["git_context"]["uncommitted_changes"] == []
    git(repository / "library", "checkout", "-q", "--detach", "HEAD~1")
    assert [change["path"] for change in context_of(client)["git_context"]["uncommitted_changes"]] == ["library"]


@pytest.mark.needs_plugin("context/project_index reads folders without git")
def test_a_folder_becomes_a_repository_while_it_is_served(make_service: MakeService, tmp_path: Path) -> None:
    write(tmp_path / "plain/main.py", "print()\n")
    client = make_service("--no-watch", root=tmp_path / "plain").client()
    assert context_of(client)["git_context"]["branch"] is None
    git(tmp_path / "plain", "init", "-q", "-b", "trunk")
    assert context_of(client)["git_context"]["branch"] == "trunk"
    assert [change["status"] for change in context_of(client)["git_context"]["uncommitted_changes"]] == ["untracked"]


# -- the cache


@pytest.fixture
def cached(make_service: MakeService) -> Service:
    """Without the watcher, which empties the cache when it likes: what stays cached is then certain."""
    service = make_service("--no-watch", "--cache-size-mb", "1")
    time.sleep(0.05)  # older than the resolution of a time stamp
    return service


def test_a_second_get_is_a_hit_and_says_so(cached: Service) -> None:
    client = cached.client()
    first, second = answer_of(client), answer_of(client)
    assert (first.pop("cache_hit"), second.pop("cache_hit")) == (False, True)
    first.pop("timestamp"), second.pop("timestamp")
    assert first == second
    assert answer_of(client, task="another")["cache_hit"] is False
    statistics = client.get("/status").json()["storage"]
    assert (statistics["context_cache_entries"], statistics["cache_hit_rate"]) == (2, 0.3333)
    write(cached.root / "src/main.py", "changed\n")
    assert answer_of(client)["cache_hit"] is False


@pytest.mark.needs_plugin("context/project_index hears of changes")
def test_a_watched_change_empties_the_cache(make_service: MakeService) -> None:
    client = make_service().client()
    until(lambda: client.get("/health").json()["checks"]["watching"] == "full")
    until(lambda: answer_of(client)["cache_hit"])
    write(Path(context_of(client)["project_structure"]["root"]) / "src/main.py", "changed\n")
    until(lambda: client.get("/status").json()["storage"]["context_cache_entries"] == 0)


@pytest.mark.needs_plugin("context/project_index hears of changes")
def test_a_change_that_no_context_shows_leaves_the_cache_alone(make_service: MakeService, repository: Path) -> None:
    write(repository / "build/output.log", "1\n")
    client = make_service().client()
    until(lambda: client.get("/health").json()["checks"]["watching"] == "full")
    until(lambda: answer_of(client)["cache_hit"])
    write(repository / "build/output.log", "1\n2\n")
    write(repository / "src/main.py.log", "3\n").unlink()  # its folder is looked at, so this one counts
    until(lambda: client.get("/status").json()["storage"]["context_cache_entries"] == 0)
    until(lambda: answer_of(client)["cache_hit"])
    write(repository / "build/output.log", "1\n2\n3\n")
    assert answer_of(client)["cache_hit"] is True


@pytest.mark.needs_plugin("context/project_index hears of changes")
def test_a_new_folder_is_watched_too(make_service: MakeService) -> None:
    service = make_service()
    client = service.client()
    until(lambda: client.get("/health").json()["checks"]["watching"] == "full")
    path = write(service.root / "fresh/deep/new.py", "new = 1\n")

    def emptied() -> bool:
        until(lambda: answer_of(client)["cache_hit"])
        write(path, path.read_text() + "more = 1\n")
        with contextlib.suppress(AssertionError):
            return bool(until(lambda: client.get("/status").json()["storage"]["context_cache_entries"] == 0, seconds=1))
        return False

    until(emptied)


def test_names_that_cannot_be_given_are_left_out_deepest_first_and_counted() -> None:
    names = ("a/b/c.py", "a/d.py", "e.py")
    for most, listed in ((100, names), (18, names), (17, names[1:]), (10, ("a/d.py", "e.py")), (4, ("e.py",)), (3, ())):
        structure = budget.without_deepest(cco_sidecar.list_names(names), most)
        assert (structure["files"], structure["total_files"]) == (listed, 3)
    assert structure["directories"] == ("a",)


@pytest.mark.parametrize("max_bytes", [4_000, 40_000, 100_000])
def test_names_are_cut_early_where_files_fill_the_context_and_then_to_no_less(max_bytes: int) -> None:
    def request(max_files: int = 50) -> Any:
        return SimpleNamespace(max_bytes=max_bytes, max_files=max_files)

    full, part = [{"content": "x" * (max_bytes // 4)}] * 4, {"content": "x" * (max_bytes // 4 - 1)}
    share, whole = (budget.most_letters(request(), files) for files in (full, [*full[1:], part]))
    assert whole == dict.fromkeys(budget.SHARES, max_bytes)
    assert share == {name: int(max_bytes * share) for name, share in budget.SHARES.items()}
    for odd in (full[1:], None, 5, [None], [{}], {"content": "x"}):
        assert budget.most_letters(request(), odd) == whole
    assert budget.most_letters(request(max_files=3), full) == whole
    names = tuple(sorted(f"{'folder/' * (number % 5)}{'n' * (number % 37)}{number}.py" for number in range(4_000)))
    limit, shown = share["project_structure"], []
    for most in (2 * limit, 2 * max_bytes):
        structure = budget.without_deepest(cco_sidecar.list_names(names), most)
        sections = {"project_structure": json.loads(msgspec.json.encode(structure))}
        assert budget.cut_structure(sections, limit) and cco_sidecar.json_size(sections["project_structure"]) <= limit
        shown.append(set(sections["project_structure"]["files"]))
    early, late = shown
    assert early >= late


def test_of_outputs_that_are_too_many_the_newest_are_looked_at_and_one_that_shows_it() -> None:
    outputs = [{"decision": "x" * 86} for _ in range(9)]  # of 101 bytes
    for most, looked_at in ((2_000, 9), (908, 9), (907, 9), (808, 9), (807, 8), (101, 2), (100, 1), (0, 1)):
        assert budget.without_oldest(outputs, most) == outputs[9 - looked_at :], most
    assert budget.without_oldest([], 0) == []


def test_of_large_outputs_no_more_is_read_than_a_context_holds(fresh: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    client = fresh.client()
    rationale = "…" * 1_333_333  # 4 MB that are soon searched for secrets: the file alone searches them all again
    for number in range(3):
        client.store("python-specialist", decisions=[f"decided {number}"], rationale=rationale)
    answer = answer_of(client)
    (*_, newest) = answer["context"]["previous_agent_outputs"]
    assert newest["decision"] == "decided 2" and answer["truncated"]
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.row_factory = sqlite3.Row
        database.executescript(cco_sidecar.SCHEMA)
        records = plugin("guard").ForgettingRecords(database)
        for number in range(6):
            row = {"id": str(number), "project": "p", "issue": "i", "agent_type": "t", "agent_id": "a", "category": "c"}
            row |= {"status": "success", "stored": 0, "proposed": "[]", "output": f"{number}" * 100, "body": b""}
            records.insert("result", row)
        for most, read in ((1_000, 6), (500, 6), (499, 5), (100, 2), (99, 1)):
            monkeypatch.setattr(type(records), "OUTPUT_BYTES", most)
            assert records.issue_outputs("p", "i", 9) == [f"{number}" * 100 for number in range(6 - read, 6)], most
        assert records.issue_outputs("p", "i", 0) == []
        database.commit()
        database.execute("drop table result")  # which an unfinished reading would keep


@pytest.mark.parametrize("sizes", [[5000], [5000, 3, 700], [12, 11, 10, 9], [400, 399, 398], []])
@pytest.mark.parametrize("limit", [300, 2_000, 30_000])
def test_commits_of_many_files_are_cut_before_they_are_measured_to_the_same_as_after(
    sizes: list[int], limit: int
) -> None:
    commits = [
        cco_sidecar.Commit(
            f"{number}", "m", "a", None, [f"folder/{'n' * (name % 97)}{name}.py" for name in range(size)]
        )
        for number, size in enumerate(sizes)
    ]
    git = cco_sidecar.GitContext("main", commits, [], None, None)
    early, late = (
        {"git_context": json.loads(msgspec.json.encode(each))}
        for each in (budget.without_endless_commits(git, limit), git)
    )
    assert cco_sidecar.json_size(early) < 2 * len(commits) * (limit + 2_500) + 200  # 5,000 names have 300 kB
    assert budget.cut_git(early, limit) == budget.cut_git(late, limit)
    assert early == late and [len(commit.files_changed) for commit in git.recent_commits] == sizes


def test_an_etag_saves_the_body_while_nothing_has_changed(cached: Service) -> None:
    client = cached.client()
    path = "/api/context/issue-1/python-specialist"
    first = client.get(path)
    assert first.headers["Cache-Control"] == "private, no-cache"
    etag = first.headers["ETag"]
    same = client.request("GET", path, headers={"If-None-Match": etag})
    assert (same.status_code, same.content, same.headers["ETag"]) == (304, b"", etag)
    assert client.request("GET", path, headers={"If-None-Match": '"other"'}).status_code == 200
    opaque = etag.removeprefix("W/")
    for known in ("*", opaque, f'"other", {etag}', f'{opaque},"other"', f'W/"other" ,  {etag}'):
        assert client.request("GET", path, headers={"If-None-Match": known}).status_code == 304, known
    for known in (
        f"{etag}y",
        f'"x{opaque[1:]}',
        f"{opaque[:-1]}y{opaque[-1]}",
        opaque.strip('"'),
        opaque[1:-5],
        f"w/{opaque}",
    ):
        assert client.request("GET", path, headers={"If-None-Match": known}).status_code == 200, known
    assert client.request("DELETE", "/api/cache/context/issue-1").status_code == 200
    assert client.request("GET", path, headers={"If-None-Match": etag}).status_code == 304  # built anew from the same
    write(cached.root / "src/main.py", "changed\n")
    changed = client.request("GET", path, headers={"If-None-Match": etag})
    assert changed.status_code == 200
    assert "changed\\n" in changed.text
    client.store()
    assert client.request("GET", path, headers={"If-None-Match": changed.headers["ETag"]}).status_code == 200


@pytest.mark.needs_plugin("context/clearing does so")
def test_clearing_may_be_of_one_agent_type(cached: Service) -> None:
    client = cached.client()
    pairs = [
        (issue, name)
        for issue in ("issue-1", "issue-2")
        for name in ("python-specialist", "test-engineer", "documentation-expert")
    ]

    def hits() -> list[bool]:
        return [client.get(f"/api/context/{issue}/{name}").json()["cache_hit"] for issue, name in pairs]

    assert not any(hits()) and all(hits())
    assert client.delete("/api/cache/context/issue-1?agent_type=test-engineer").json()["entries_removed"] == 1
    assert hits() == [pair != ("issue-1", "test-engineer") for pair in pairs]
    assert client.delete("/api/cache/context/issue-1?agent_type=rust-specialist").status_code == 404
    assert client.delete("/api/cache/all?agent_type=test-engineer").json()["entries_removed"] == 2
    assert hits() == [name != "test-engineer" for _, name in pairs]
    coder = cached.client("python-specialist").delete("/api/cache/all")
    assert (coder.status_code, coder.json()["code"]) == (403, "AUTH_003")
    assert client.delete("/api/cache/all").json()["entries_removed"] == len(pairs)
    assert client.delete("/api/cache/all").json()["entries_removed"] == 0


def test_clearing_counts_what_it_removed(cached: Service) -> None:
    client = cached.client()
    sizes = [len(client.get(f"/api/context/issue-1/{name}").content) for name in ("python-specialist", "test-engineer")]
    answer_of(client, issue="issue-2")
    coder = cached.client("python-specialist")
    cleared = coder.delete("/api/cache/context/issue-1").json()
    assert (cleared["cleared"], cleared["entries_removed"]) == (True, 2)
    assert sum(sizes) * 0.9 < cleared["bytes_freed"] <= sum(sizes)
    again = coder.delete("/api/cache/context/issue-1")
    assert (again.status_code, again.json()["code"]) == (404, "REQ_002")
    assert answer_of(client, issue="issue-2")["cache_hit"] is True
    assert answer_of(client)["cache_hit"] is False


def test_the_cache_stays_within_its_size_and_forgets_the_least_recently_used(cached: Service) -> None:
    write(cached.root / "src/large.py", "x = 1  # long enough\n" * 18_000)
    client = cached.client()
    time.sleep(0.05)
    for issue in ("one", "two"):
        answer_of(client, issue=issue)
    assert answer_of(client, issue="one")["cache_hit"] is True
    answer_of(client, issue="three")  # 0.4 MB each: the third does not fit into 1 MB beside the others
    assert [answer_of(client, issue=issue)["cache_hit"] for issue in ("one", "three", "two")] == [True, True, False]
    statistics = client.get("/status").json()["storage"]
    assert statistics["context_cache_entries"] == 2
    assert statistics["context_cache_bytes"] <= 1 << 20


def test_a_cache_of_size_zero_keeps_nothing(make_service: MakeService) -> None:
    client = make_service("--cache-size-mb", "0").client()
    assert [answer_of(client)["cache_hit"] for _ in range(3)] == [False] * 3
    assert client.get("/status").json()["storage"]["context_cache_entries"] == 0
    assert client.delete("/api/cache/context/issue-1").status_code == 404


SLOW_PLUGIN = """
import time
from pathlib import Path
from cco_sidecar import Hooks, hookimpl

for hooks in Hooks.__subclasses__():
    hooks.TIMEOUT = 60.0

@hookimpl(trylast=True)
def context_section(request):
    with Path({log!r}).open("a") as file:
        file.write(request.issue_id + "\\n")
    if request.issue_id.startswith("slow"):
        time.sleep(1.5)
    if request.issue_id.startswith("held"):
        until = time.monotonic() + 25
        while not Path({log!r}).with_name("go").exists() and time.monotonic() < until:
            time.sleep(0.01)
    return {{"counted": len(request.outputs)}}
"""


@pytest.fixture
def builds(tmp_path: Path) -> tuple[Path, Callable[[str], int]]:
    """A folder with a plugin that is asked last in every build, and how many builds of an issue it has seen."""
    log = tmp_path / "builds.txt"
    write(tmp_path / "plugins/slow.py", SLOW_PLUGIN.format(log=str(log)))
    return tmp_path / "plugins", lambda issue: log.read_text().split().count(issue) if log.exists() else 0


def test_an_etag_of_before_a_restart_still_saves_the_build(make_service: MakeService, builds: Any) -> None:
    folder, count = builds
    service = make_service("--plugins", str(folder), "--no-watch")
    until(lambda: answer_of(service.client())["cache_hit"])
    etag = service.client().get("/api/context/issue-1/python-specialist").headers["ETag"]
    service.stop()
    service.start()
    built = count("issue-1")
    again = service.client().request("GET", "/api/context/issue-1/python-specialist", headers={"If-None-Match": etag})
    assert (again.status_code, count("issue-1")) == (304, built)


@pytest.mark.needs_plugin("context/alike makes one for all who ask at the same time")
@pytest.mark.parametrize("arguments", [[], ["--cache-size-mb", "0"]], ids=["cached", "not cached"])
def test_same_requests_at_the_same_time_are_built_once(
    make_service: MakeService, builds: Any, arguments: list[str]
) -> None:
    folder, count = builds
    service = make_service("--plugins", str(folder), "--no-watch", *arguments)
    client = service.client()
    address = urlsplit(service.url)
    assert address.hostname
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(100):
            connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
            connections.append(stack.enter_context(contextlib.closing(connection)))
            path = "/api/context/held-1/python-specialist"
            connection.request("GET", path, headers={"Authorization": f"Bearer {client.token}"})
        until(lambda: count("held-1"))
        assert client.get("/health").status_code == 200  # what came before it has been read
        folder.with_name("go").touch()
        answers = [json.loads(connection.getresponse().read()) for connection in connections]
    assert count("held-1") == 1
    assert all(answer["context"] == answers[0]["context"] for answer in answers)
    assert sum(answer["cache_hit"] is False for answer in answers) >= 1
    if not arguments:
        assert service.client().get("/status").json()["storage"]["context_cache_entries"] == 1


BY_TYPE = """
from cco_sidecar import hookimpl

@hookimpl
def context_section(request):
    return {"who": request.agent_type}
"""


@pytest.mark.needs_plugin("context/alike makes one for several types")
def test_agent_types_that_are_given_the_same_share_one_context_where_no_plugin_goes_by_the_type(
    make_service: MakeService, repository: Path, tmp_path: Path
) -> None:
    write(repository / "web/view.ts", "export function handler() {}\n")
    write(repository / "Dockerfile", "FROM python\nCMD handler\n")
    write(tmp_path / "plugins/by_type.py", BY_TYPE)
    alike = make_service("--no-watch")
    apart = make_service("--no-watch", "--plugins", str(tmp_path / "plugins"), storage=tmp_path / "apart")
    time.sleep(0.05)
    hits = {}
    for name in "python rust go flask react typescript debugging refactoring docker kubernetes ci-cd".split():
        asked = {"agent_type": f"{name}-specialist", "task": "handler"}
        answer, own = answer_of(alike.client(), **asked), answer_of(apart.client(), **asked)
        assert (own["context"].pop("who"), own["cache_hit"]) == (answer["agent_type"], False)
        assert (answer["agent_type"], answer["context"]) == (f"{name}-specialist", own["context"])
        hits[name] = answer["cache_hit"]
    assert [name for name in hits if hits[name]] == ["go", "flask", "typescript", "refactoring", "kubernetes", "ci-cd"]
    assert alike.client().get("/status").json()["storage"]["context_cache_entries"] == 5  # no copy is kept
    asked = {"agent_type": "go-specialist", "task": "handler"}
    assert answer_of(alike.client(), **asked)["cache_hit"] is True
    assert alike.client().delete("/api/cache/context/issue-1?agent_type=go-specialist").json()["entries_removed"] == 1
    assert alike.client().get("/status").json()["storage"]["context_cache_entries"] == 4
    assert answer_of(alike.client(), **asked)["agent_type"] == "go-specialist"
    write(repository / "src/lib.rs", "fn handler() {}\n")
    rust, go = (files_of(alike.client(), agent_type=f"{name}-specialist", task="handler") for name in ("rust", "go"))
    assert "src/lib.rs" in rust and rust != go
    alike.client().store()
    again = answer_of(alike.client(), agent_type="go-specialist", task="handler")
    assert len(again["context"]["previous_agent_outputs"]) == 1


def test_a_get_during_a_build_shows_what_changed_after_that_began(make_service: MakeService, builds: Any) -> None:
    folder, count = builds
    service = make_service("--plugins", str(folder))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(context_of, service.client(), "slow-1")
        until(lambda: count("slow-1") == 1)  # its files are read
        write(service.root / "src/main.py", "changed meanwhile\n")
        second = context_of(service.client(), "slow-1")
        assert {file["path"]: file["content"] for file in second["relevant_files"]}[
            "src/main.py"
        ] == "changed meanwhile\n"
        first.result()
        first = pool.submit(context_of, service.client(), "slow-2")
        until(lambda: count("slow-2") == 1)
        service.client().store("chief-architect", issue="slow-2", decisions=["decided meanwhile"])
        second = context_of(service.client(), "slow-2")
        assert [output["decision"] for output in second["previous_agent_outputs"]] == ["decided meanwhile"]
        assert first.result()["previous_agent_outputs"] == []


def test_health_answers_while_the_context_of_a_large_project_is_built(
    make_service: MakeService, repository: Path
) -> None:
    for number in range(1200):
        write(
            repository / f"many/{number % 50}/file_{number}.py",
            f"def function_{number}(value):\n    return value + {number}\n" * 20,
        )
    service = make_service()
    asked = Client(service.url, None)
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(answer_of, service.client(), task="function value")
        answered = 0
        while not building.done():
            assert asked.get("/health").json()["status"] == "healthy"
            answered += not building.done()
        assert building.result()["context"]["project_structure"]["total_files"] == 1208
    assert answered >= 3


# -- the budget

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
CHUNKS = st.lists(st.tuples(st.integers(0, 6).map(lambda n: 50 * n + 1), st.floats(0, 9)), max_size=8)
LINES = st.builds(lambda line, number: (line.replace("\n", " ") + "\n") * number, TEXT, st.integers(0, 300))


def make_file(path: str, content: str) -> dict[str, Any]:
    return {
        "path": path, "content": content, "last_modified": iso(0), "size": len(content.encode()), "language": "python",
        "checksum": cco_sidecar.checksum(content),
    }  # fmt: skip


@st.composite
def sections(draw: Any) -> dict[str, Any]:
    paths = draw(st.lists(st.from_regex(r"\A([a-z]{1,8}/){0,4}[a-z]{1,12}\.py\Z"), max_size=60, unique=True))
    messages = draw(st.lists(TEXT, max_size=5))
    commits = [
        {"hash": "abc", "message": text, "author": "x", "timestamp": iso(0), "files_changed": paths}
        for text in messages
    ]
    return {
        "project_structure": {
            "root": "/project", "files": sorted(paths), "directories": sorted({path.rpartition("/")[0] for path in paths} - {""}),
            "total_files": len(paths), "total_size_bytes": 123_456,
        },
        "relevant_files": [make_file(path, draw(LINES)) for path in paths[:12]],
        "git_context": {"branch": "main", "recent_commits": commits, "uncommitted_changes": [], "remote": None, "remote_url": None},
        "previous_agent_outputs": [{"agent": "a", "decision": text * 5} for text in draw(st.lists(TEXT, max_size=8))],
        "metadata": {"project_type": "python", "dependencies": [], "redactions": 0},
    }  # fmt: skip


def fitted(
    sections: dict[str, Any], max_bytes: int, task: str, max_files: int = 1000, plugin: bool = True, chunks: Any = ()
) -> bytes:
    """A context's JSON, fitted by the plugin budget or by the module alone; ``chunks`` are those of each file."""
    kind = budget.BoundedContexts if plugin else Contexts
    state = kind.__new__(kind)
    paths = [file["path"] for file in sections["relevant_files"]]
    request: Any = SimpleNamespace(
        issue_id="issue-1", agent_type="python-specialist", task=task, max_bytes=max_bytes, max_files=max_files,
        ranked=[cco_sidecar.RankedFile(path, 1.0, [], best) for path, best in zip(paths, chunks, strict=False)],
    )  # fmt: skip
    return state.answer(request, sections)[0]


@settings(max_examples=40)
@given(sections(), st.integers(2000, 60_000), st.integers(0, 20), st.sampled_from(["", "a task"]))
def test_the_module_alone_keeps_the_budget_too(
    given_sections: dict[str, Any], size: int, number: int, task: str
) -> None:
    before = copy.deepcopy(given_sections)
    body = fitted(given_sections, size, task, number, plugin=False)
    assert len(body) <= size
    answer = json.loads(body)
    files = answer["context"]["relevant_files"]
    assert answer["file_count"] == len(files) <= number
    assert answer["context"]["project_structure"]["total_files"] == before["project_structure"]["total_files"]
    originals = [file["path"] for file in before["relevant_files"]]
    assert [file["path"] for file in files] == originals[: len(files)], "the least relevant go first"
    contents = {file["path"]: file["content"] for file in before["relevant_files"]}
    for file in files:
        assert contents[file["path"]].startswith(file["content"])
        assert file["checksum"] == cco_sidecar.checksum(file["content"])
        assert file.get("truncated", False) == (file["content"] != contents[file["path"]])
    complete = len(files) == len(originals) and not any(file.get("truncated") for file in files)
    same = all(answer["context"][name] == before[name] for name in ("git_context", "previous_agent_outputs"))
    structure = answer["context"]["project_structure"] == before["project_structure"]
    assert answer["truncated"] is not (complete and same and structure)


@settings(max_examples=60)
@given(
    sections(), st.integers(2000, 60_000), st.integers(0, 20), st.sampled_from(["", "a task"]),
    st.lists(CHUNKS, min_size=12, max_size=12),
)  # fmt: skip
def test_a_context_never_exceeds_its_budget(
    given_sections: dict[str, Any], max_bytes: int, max_files: int, task: str, chunks: Any
) -> None:
    before = copy.deepcopy(given_sections)
    body = fitted(given_sections, max_bytes, task, max_files, chunks=chunks)
    assert len(body) <= max_bytes
    answer = json.loads(body)
    context, files = answer["context"], answer["context"]["relevant_files"]
    assert answer["file_count"] == len(files) <= max_files
    assert answer["total_size_bytes"] == len(cco_sidecar.msgspec.json.encode(context))
    assert context["project_structure"]["total_files"] == before["project_structure"]["total_files"]
    assert context["project_structure"]["total_size_bytes"] == 123_456
    originals = {file["path"]: file["content"] for file in before["relevant_files"]}
    for file in files:
        assert (
            shown(file) == file["content"].split("\n")
            if "line_ranges" in file
            else originals[file["path"]].startswith(file["content"])
        )
        assert all(
            line in originals[file["path"]].split("\n")
            for line in file["content"].split("\n")
            if not line.startswith("[lines ")
        )
        assert file["checksum"] == cco_sidecar.checksum(file["content"])
        assert file.get("truncated", False) == (file["content"] != originals[file["path"]])
        assert not file.get("truncated") or file["content"].endswith("\n")
    assert [file["path"] for file in files] == [path for path in originals if path in {file["path"] for file in files}]
    complete = context == before
    assert answer["truncated"] is (not complete)
    in_chunks = any("line_ranges" in file for file in files)
    assert answer["truncation_strategy"] == (
        "none" if complete else "file_sampling" if not task else "semantic_chunking" if in_chunks else "smart"
    )
    smallest = min((file for file in before["relevant_files"]), key=lambda file: len(json.dumps(file)), default=None)
    if smallest and max_files >= len(originals) and len(json.dumps(smallest)) < 0.4 * max_bytes - 900:
        assert files  # never empty while something fits


def shown(file: dict[str, Any]) -> list[str]:
    """The lines of a file that is given in part, checked against the ranges that it names."""
    lines = file["content"].split("\n")
    heads = [
        tuple(map(int, re.findall(r"\d+", line)[:2]))
        for line in lines
        if re.fullmatch(r"\[lines \d+-\d+ of \d+\]", line)
    ]
    assert [list(head) for head in heads] == file["line_ranges"]
    assert len(lines) == sum(last - first + 2 for first, last in heads) + 1
    return lines


@pytest.mark.needs_plugin("context/budget gives the best parts of a file")
@pytest.mark.parametrize("agent_type", ["documentation-expert", "python-specialist", "test-engineer"])
def test_a_few_large_files_do_not_displace_all_others(
    make_service: MakeService, repository: Path, agent_type: str
) -> None:
    folder, end = {"d": ("docs", ".md"), "p": ("src", ".py"), "t": ("tests", "_test.py")}[agent_type[0]]
    for number in range(6):
        write(repository / f"{folder}/large{number}{end}", "# rotate the cookie of a session\n" * 1_500)
    write(repository / f"{folder}/small{end}", "# rotate nothing\n")
    given = answer_of(
        make_service().client(), agent_type=agent_type, task="rotate the cookie of a session", max_bytes=40_000
    )
    paths = {file["path"] for file in given["context"]["relevant_files"]}
    assert paths >= {f"{folder}/small{end}", *(f"{folder}/large{number}{end}" for number in range(6))}, paths


@pytest.mark.needs_plugin("context/budget gives the best parts of a file")
def test_of_a_large_file_the_parts_that_the_task_is_about_are_given(
    make_service: MakeService, repository: Path
) -> None:
    blocks = [f"def step_{number}(value):\n" + f"    value += {number}\n" * 49 for number in range(40)]
    blocks[31] = blocks[31].replace("value += 31\n", "value = rotate_cookie(value)\n", 3)
    large = write(repository / "src/large.py", "".join(blocks)).read_text().split("\n")
    client = make_service().client()
    answer = answer_of(client, task="rotate_cookie loses the session", max_bytes=12_000)
    (file,) = [file for file in answer["context"]["relevant_files"] if file["path"] == "src/large.py"]
    assert answer["truncation_strategy"] == "semantic_chunking" and file["truncated"] is True
    assert any(first <= 1552 <= last for first, last in file["line_ranges"])
    assert "    value = rotate_cookie(value)" in shown(file)
    parts = [large[first - 1 : last] for first, last in file["line_ranges"]]
    assert [line for line in file["content"].split("\n")[:-1] if not line.startswith("[lines ")] == [
        line for part in parts for line in part
    ]
    assert file["size"] == (repository / "src/large.py").stat().st_size
    whole = {
        file["path"]: file
        for file in answer_of(client, task="rotate_cookie loses the session")["context"]["relevant_files"]
    }
    assert whole["src/large.py"]["content"] == "\n".join(large) and "truncated" not in whole["src/large.py"]


def test_a_budget_in_tokens_is_one_in_bytes(bulky: Service) -> None:
    client = bulky.client()
    for tokens in (500, 5_000):
        answer = client.get("/api/context/issue-1/python-specialist", max_tokens=tokens)
        assert len(answer.content) <= 4 * tokens and answer.json()["truncated"] is True
        assert answer.json()["estimated_tokens"] == -(-answer.json()["total_size_bytes"] // 4)
    assert (
        len(client.get("/api/context/issue-1/python-specialist", max_tokens=50_000, max_bytes=9_000).content) <= 9_000
    )
    assert client.get("/api/context/issue-1/python-specialist", max_tokens=10).status_code == 400


# -- only what changed


def since(client: Client, etag: str, **params: Any) -> Any:
    answer = client.get("/api/context/issue-1/python-specialist", since=etag, **params)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.needs_plugin("context/since remembers what answers gave")
def test_since_gives_only_the_files_that_changed_and_names_those_that_went(make_service: MakeService) -> None:
    service = make_service()
    client, root = service.client(), service.root
    full = client.get("/api/context/issue-1/python-specialist")
    number = full.json()["file_count"]
    nothing = since(client, full.headers["ETag"])
    assert nothing.headers["ETag"] == full.headers["ETag"]
    assert (nothing.json()["file_count"], nothing.json()["removed_files"], nothing.json()["unchanged_files"]) == (
        0,
        [],
        number,
    )
    write(root / "src/main.py", "changed\n")
    write(root / "src/new.py", "new\n")
    (root / "tests/test_main.py").unlink()
    first = since(client, full.headers["ETag"])
    body = first.json()
    assert {file["path"]: file["content"] for file in body["context"]["relevant_files"]} == {
        "src/main.py": "changed\n",
        "src/new.py": "new\n",
    }
    assert (body["since"], body["removed_files"], body["unchanged_files"]) == (
        full.headers["ETag"],
        ["tests/test_main.py"],
        number - 2,
    )
    size = len(cco_sidecar.msgspec.json.encode(body["context"]))
    assert (body["file_count"], body["total_size_bytes"], body["estimated_tokens"]) == (2, size, -(-size // 4))
    assert body["context"]["project_structure"] != full.json()["context"]["project_structure"]
    write(root / "src/new.py", "newer\n")
    second = since(client, first.headers["ETag"].strip('"')).json()
    assert [file["path"] for file in second["context"]["relevant_files"]] == ["src/new.py"]
    assert [file["path"] for file in since(client, full.headers["ETag"]).json()["context"]["relevant_files"]] != [
        "src/new.py"
    ]


@pytest.mark.needs_plugin("context/since remembers what answers gave")
def test_since_an_answer_that_is_not_known_gives_everything_and_says_so(architect: Client) -> None:
    full = answer_of(architect)
    body = since(architect, '"nobody-knows-this"').json()
    assert (body["since"], body["removed_files"], body["unchanged_files"], body["file_count"]) == (
        None,
        [],
        0,
        full["file_count"],
    )
    assert "since" not in full
    assert architect.get("/api/context/issue-1/python-specialist", since="x" * 200).status_code == 400


def test_what_an_answer_gave_is_read_once_however_often_it_is_given() -> None:
    module = plugin("since")

    class Counted(module.Since):
        PAUSE = 0.0
        begun = 0

        def _read(self) -> Any:
            self.begun += 1
            return super()._read()

    async def give(remembered: Any) -> None:
        for tag in ("one", "two", "one", "one", "two"):
            endpoint = SimpleNamespace(
                get_status=lambda: 200, content_type="application/json", query=SimpleNamespace(since=""),
                _headers={"ETag": f'W/"{tag}"'},
            )  # fmt: skip
            await remembered.cut(endpoint, b'{"context":{"relevant_files":[{"path":"a.py","checksum":"1"}]}}')
            await remembered._reading

    remembered = Counted()
    asyncio.run(give(remembered))
    assert remembered.begun == 2 and remembered._given == {"one": {"a.py": "1"}, "two": {"a.py": "1"}}


def test_what_cannot_be_cut_is_refused() -> None:
    section = {
        "project_structure": {"root": "/", "files": [], "directories": [], "total_files": 0, "total_size_bytes": 0},
        "relevant_files": [],
    }
    git_context = {"branch": None, "recent_commits": [], "uncommitted_changes": [], "remote": None, "remote_url": None}
    section |= {
        "git_context": git_context,
        "previous_agent_outputs": [],
        "metadata": {"redactions": 0},
        "more": "x" * 3000,
    }
    for by_plugin in (True, False):
        with pytest.raises(ApiError, match="CTX_002"):
            fitted(copy.deepcopy(section), 2500, "", plugin=by_plugin)


@pytest.mark.needs_plugin("context/budget weighs sections")
def test_a_section_for_which_there_is_no_room_is_left_out(make_service: MakeService, tmp_path: Path) -> None:
    source = "from cco_sidecar import hookimpl\n@hookimpl\ndef context_section(request):\n    return {'NAME': 'x' * 6_000_000}\n"
    for name in ("first", "second"):
        write(tmp_path / f"plugins/{name}.py", source.replace("NAME", name))
    service = make_service("--plugins", str(tmp_path / "plugins"))
    context = service.client().get("/api/context/issue-1/python-specialist").json()["context"]
    assert len({"first", "second"} & context.keys()) == 1 and context["relevant_files"]
    assert "no room" in service.log


@pytest.fixture(scope="module")
def bulky(setup: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A project of 400 files and 2 MB."""
    folder = tmp_path_factory.mktemp("bulky")
    root = make_repository(folder / "repository")
    for number in range(400):
        write(root / f"package_{number % 7}/deep/module_{number}.py", f"value_{number} = {number}\n" * 300)
    with serving(folder, root=root) as running:
        yield running


@pytest.mark.parametrize("max_bytes", [2_000, 3_000, 10_000, 100_000, 1_000_000, 10 << 20])
@pytest.mark.parametrize("task", ["", "the greeting and value_77"])
def test_an_answer_never_exceeds_the_bytes_asked_for(bulky: Service, max_bytes: int, task: str) -> None:
    answer = bulky.client().get(
        "/api/context/issue-1/python-specialist", max_bytes=max_bytes, task=task, max_files=1000
    )
    assert answer.status_code == 200, answer.text
    assert len(answer.content) <= max_bytes
    body = answer.json()
    assert body["context"]["project_structure"]["total_files"] == 408
    assert body["truncated"] is (max_bytes < 10 << 20)
    in_chunks = any("line_ranges" in file for file in body["context"]["relevant_files"])
    with_task = "semantic_chunking" if in_chunks else "smart"
    assert body["truncation_strategy"] == ("none" if not body["truncated"] else with_task if task else "file_sampling")
    assert len(answer.content) > max_bytes // 3 or max_bytes > 1_000_000 or max_bytes < 10_000  # the room is used


def test_no_more_files_than_asked_for_and_fifty_by_default(bulky: Service) -> None:
    client = bulky.client()
    for asked, number in ((0, 0), (1, 1), (7, 7), (None, 50)):
        answer = answer_of(client, **({} if asked is None else {"max_files": asked}))
        assert answer["file_count"] == len(answer["context"]["relevant_files"]) == number
        assert answer["truncated"] is True
        assert answer["truncation_strategy"] == "file_sampling"
        assert len(answer["context"]["project_structure"]["files"]) == 408
    assert answer_of(client, max_files=1000)["truncated"] is False


# -- what never gets out


def test_secrets_binaries_and_what_lies_outside_stay_out(
    make_service: MakeService, repository: Path, tmp_path: Path
) -> None:
    outside = write(tmp_path / "outside/neighbour.py", "OUTSIDE = 'classified'\n")
    write(repository / ".gitignore", "")
    for name in (
        ".env", ".env.production", "prod.env", "id_rsa", "keys/server.pem", "keys/server.key", ".aws/config", ".ssh/known.txt", ".netrc",
        "credentials.json", "secrets.yaml", "terraform.tfstate", ".npmrc",
    ):  # fmt: skip
        write(repository / name, "classified\n")
    write(repository / "binary.py", b"classified\0\1\2")
    (repository / "link.py").symlink_to(outside)
    (repository / "folder").symlink_to(outside.parent)
    (repository / "loop").symlink_to(repository)
    (repository / "dangling.py").symlink_to(tmp_path / "nothing")
    os.mkfifo(repository / "pipe.py")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        here = os.getcwd()
        os.chdir(repository)  # the path of a socket must be short
        listener.bind("socket.py")
        os.chdir(here)
        write(repository / "src/public.py", "PUBLIC = 'announced'\n")
        git(repository, "add", "src/public.py", ".env", "link.py")
        client = make_service().client()
        for agent_type in ("python-specialist", "security-auditor", "chief-architect"):
            for task in ("", "classified neighbour OUTSIDE .env id_rsa link.py binary.py pipe.py"):
                answer = client.get(f"/api/context/issue-1/{agent_type}", task=task, max_files=1000)
                assert answer.status_code == 200
                contents = "".join(file["content"] for file in answer.json()["context"]["relevant_files"])
                assert "classified" not in contents
                assert "OUTSIDE" not in contents
                assert task or "announced" in contents


def test_names_of_every_kind_are_survived(make_service: MakeService, repository: Path) -> None:
    odd = [
        "new\nline.py",
        "quote'\".py",
        "späße 漢字.py",
        " leading.py",
        "-dash.py",
        "tab\t.py",
        "percent%20.py",
        "back\\slash.py",
    ]
    for name in odd:
        write(repository / name, "odd = True\n")
    (Path(os.fsdecode(os.fsencode(repository) + b"/not-utf8-\xff.py"))).write_text("odd = 'bytes'\n")
    client = make_service().client()
    answer = answer_of(client)
    files = {file["path"]: file["content"] for file in answer["context"]["relevant_files"]}
    assert {name: files.get(name) for name in odd} == dict.fromkeys(odd, "odd = True\n")
    assert files["not-utf8-\ufffd.py"] == "odd = 'bytes'\n"
    changes = {change["path"]: change["status"] for change in answer["context"]["git_context"]["uncommitted_changes"]}
    assert {changes.get(name) for name in [*odd, "not-utf8-\ufffd.py"]} == {"untracked"}
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "Odd\x02 names")
    commit = context_of(client)["git_context"]["recent_commits"][0]
    assert sorted(commit["files_changed"]) == sorted([*odd, "not-utf8-\ufffd.py"])


def test_content_that_is_not_utf8_is_readable_json(make_service: MakeService, repository: Path) -> None:
    write(repository / "src/latin.py", "name = 'caf\xe9'\n".encode("latin-1"))
    file = files_of(make_service().client())["src/latin.py"]
    assert file["content"] == "name = 'caf\ufffd'\n"
    assert file["checksum"] == "sha256:" + hashlib.sha256(file["content"].encode()).hexdigest()


def test_a_huge_file_is_cut_at_a_line_end(make_service: MakeService, repository: Path) -> None:
    path = write(repository / "src/huge.py", "number = 12345\n" * 200_000)
    write(repository / "src/one_line.py", "x" * 2_000_000)
    answer = answer_of(make_service().client())
    files = {file["path"]: file for file in answer["context"]["relevant_files"]}
    file = files["src/huge.py"]
    assert 900_000 < len(file["content"]) <= 1 << 20
    assert file["content"].endswith("12345\n")
    assert (file["size"], file["truncated"]) == (path.stat().st_size, True)
    assert file["checksum"] == "sha256:" + hashlib.sha256(file["content"].encode()).hexdigest()
    assert answer["truncated"] is True
    assert len(files["src/one_line.py"]["content"]) == 0


def test_a_repository_inside_the_repository_is_not_ours(make_service: MakeService, repository: Path) -> None:
    make_repository(repository / "vendor/inner")
    write(repository / "vendor/ours.py", "ours = 1\n")
    context = context_of(make_service().client())
    names = context["project_structure"]["files"]
    assert "vendor/ours.py" in names
    assert not [name for name in names if name.startswith("vendor/inner/")]
    assert not [file["path"] for file in context["relevant_files"] if file["path"].startswith("vendor/inner")]


def test_files_that_vanish_while_a_context_is_built_do_no_harm(make_service: MakeService, repository: Path) -> None:
    service = make_service()
    client, stop = service.client(), threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            path = write(repository / f"churn/file_{number % 5}.py", f"x = {number}\n" * 100)
            if number % 2:
                path.unlink()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for number in range(8):
            assert "README.md" in context_of(client, task=f"churn {number}")["project_structure"]["files"]
    finally:
        stop.set()
        thread.join()
    write(repository / "churn/last.py", "last = 1\n")
    assert files_of(client, max_files=1000)["churn/last.py"]["content"] == "last = 1\n"
    assert "Traceback" not in service.log


def test_what_one_context_says_of_a_file_shows_in_no_other() -> None:
    remembered = {path: {"path": path, "content": path} for path in ("a.py", "b.py", "c.py")}

    def chosen(score: float) -> list[dict[str, Any]]:
        ranked = [RankedFile(path, score, [f"scored {score}"]) for path in remembered]
        project = SimpleNamespace(describe=remembered.get)
        return choose_files(SimpleNamespace(ranked=ranked, max_bytes=10_000, max_files=9, project=project))  # type: ignore[arg-type]

    first, _ = chosen(1.0), chosen(2.0)
    assert [(file["path"], file["score"], file["reasons"]) for file in first] == [
        (path, 1.0, ["scored 1.0"]) for path in remembered
    ]
    assert all(file.keys() == {"path", "content"} for file in remembered.values())


def test_read_text_file_never_leaves_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root / "inside.txt", "inside")
    write(tmp_path / "outside/file.txt", "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "name.txt").symlink_to(root / "inside.txt")
    found = read_text_file(str(root), "inside.txt", 100)
    assert found and found[0] == "inside"
    for path in (
        "link/file.txt",
        "../outside/file.txt",
        str(tmp_path / "outside/file.txt"),
        "name.txt",
        "missing.txt",
        ".",
        "a\0b",
    ):
        assert read_text_file(str(root), path, 100) is None, path


LETTERS = "Zz9yX8wV7uT6sR5qP4oN3mL2kJ1hG0fE" * 2  # put together here, so that no scanner takes this file for a leak
SECRETS = {
    "AWS": "AKI" + "A" + "ABCDEFGHIJ234567",
    "GitHub": "gh" + "p_" + LETTERS[:36],
    "JWT": "ey" + "J" + LETTERS[:20] + ".ey" + "J" + LETTERS[:40] + "." + LETTERS[:43],
}


def test_lines_after_a_redacted_key_keep_their_numbers() -> None:
    key = "-----BEGIN PRIVATE KEY-----\n" + "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC\n" * 12 + "-----END PRIVATE KEY-----\n"
    content, number = redact(f"first\n{key}last\n")
    assert (number, content.count("[REDACTED]"), content.count("MIIE")) == (1, 1, 0)
    assert content.split("\n").index("last") == f"first\n{key}last\n".split("\n").index("last")


def test_redactions_are_said_and_counted(make_service: MakeService, repository: Path) -> None:
    write(repository / "src/config.py", f'A = "{SECRETS["GitHub"]}"\nB = "{SECRETS["AWS"]}"\n')
    write(repository / "docs/setup.md", f"use {SECRETS['JWT']} for it\n")
    client = make_service().client()
    answer = client.get("/api/context/issue-1/python-specialist")
    context = answer.json()["context"]
    files = {file["path"]: file for file in context["relevant_files"]}
    assert files["src/config.py"]["content"] == 'A = "[REDACTED]"\nB = "[REDACTED]"\n'
    assert files["src/config.py"]["redactions"] == 2
    assert (
        files["src/config.py"]["checksum"]
        == "sha256:" + hashlib.sha256(files["src/config.py"]["content"].encode()).hexdigest()
    )
    assert context["metadata"]["redactions"] == 3
    assert not [name for name, secret in SECRETS.items() if secret in answer.text]
    assert "redactions" not in files["src/main.py"]
    assert context_of(client, max_files=1, task="src/config.py")["metadata"]["redactions"] == 2


# -- which files, and in which order


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("src/main.py", "source"), ("main.rs", "source"), ("tests/test_main.py", "test"), ("test_main.py", "test"), ("conftest.py", "test"),
        ("src/main_test.go", "test"), ("web/button.test.tsx", "test"), ("web/__tests__/button.js", "test"), ("spec/models/user.rb", "test"),
        ("src/UserTest.java", "test"), ("src/user-test.js", "test"), ("src/contest.py", "source"), ("src/latest.py", "source"),
        ("docs/guide.md", "docs"), ("README", "docs"), ("README.md", "docs"), ("LICENSE", "docs"), ("notes.txt", "docs"),
        ("docs/conf.py", "docs"), ("requirements.txt", "config"), ("requirements-dev.txt", "config"), ("pyproject.toml", "config"),
        (".github/workflows/ci.yml", "config"), ("Dockerfile", "config"), ("Makefile", "config"), ("image.png", "other"), ("data.bin", "other"),
        (".gitignore", "other"), ("web/app.min.js", "other"), ("package-lock.json", "other"), ("vendor/inner/main.go", "other"),
        ("node_modules/left/index.js", "other"), ("third_party/zlib/inflate.c", "other"), ("src/vendor.py", "source"),
        ("go.mod", "config"), ("CMakeLists.txt", "config"), ("x.gemspec", "config"), ("Dockerfile.dev", "config"),
        ("app/views/show.html.erb", "source"), ("lib/web/show.html.heex", "source"), ("config/database.yml.erb", "config"), ("guide.adoc", "docs"),
        ("src/payroll.cob", "source"), ("test/test_solver.f90", "test"), ("contracts/token/Token.sol", "source"), ("MODULE.bazel", "config"),
        ("dune-project", "config"), ("chart/templates/_helpers.tpl", "source"), ("src/main/java/acme/test/Probe.java", "source"),
        ("tests/Baselines/junit.approved.txt", "other"), ("src/report.golden.md", "other"), ("tests/README.md", "docs"), ("spec/protocol.txt", "docs"),
        ("pkg/testdata/input.md", "other"), ("tests/words.txt", "other"), ("docs/fixtures/guide.md", "docs"), ("src/snapshots/plan.md", "docs"),
    ],
)  # fmt: skip
def test_the_kind_of_a_file(path: str, kind: str) -> None:
    assert plugin("_kinds").kind_of(path) == kind
    assert cco_sidecar.kind_of(path) == ALONE_KINDS.get(path, kind)


ALONE_KINDS = {  # where the module's own rules are too plain
    "README": "other", "LICENSE": "other", "requirements.txt": "docs", "requirements-dev.txt": "docs",
    "src/UserTest.java": "source", "go.mod": "other", "CMakeLists.txt": "docs", "x.gemspec": "other", "Dockerfile.dev": "other",
    "MODULE.bazel": "other", "dune-project": "other", "chart/templates/_helpers.tpl": "other",
    "src/main/java/acme/test/Probe.java": "test", "tests/Baselines/junit.approved.txt": "docs", "src/report.golden.md": "docs",
    "pkg/testdata/input.md": "docs", "tests/words.txt": "docs",
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "language"),
    [
        ("a.py", "python"), ("a.PY", "python"), ("x/y.tsx", "typescript"), ("a.jsx", "javascript"), ("a.go", "go"), ("a.rs", "rust"),
        ("a.h", "c"), ("a.hpp", "cpp"), ("Dockerfile", "dockerfile"), ("x/Makefile", "makefile"), ("a.yml", "yaml"), ("a.md", "markdown"),
        ("noending", "unknown"), ("a.unheard", "unknown"), ("a.d.ts", "typescript"), ("a.sql", "sql"), ("folder.py/x", "unknown"),
        ("show.html.erb", "html"), ("show.html.heex", "html"), ("a.js.erb", "javascript"), ("database.yml.erb", "yaml"), ("a.txt.eex", "text"),
        ("values.yaml.tmpl", "yaml"), ("Dockerfile.j2", "dockerfile"), ("motd.erb", "unknown"), (".env.erb", "unknown"), ("erb", "unknown"),
        ("Index.cshtml", "html"), ("Page.razor", "html"), ("show.haml", "html"), ("a.mdx", "markdown"), ("guide.adoc", "asciidoc"), ("a.fs", "fsharp"),
        ("PAYROLL.CBL", "cobol"), ("condition.tpl.cob", "cobol"), ("solver.fypp", "fortran"), ("lexer.mli", "ocaml"), ("Token.sol", "solidity"),
        ("flake.nix", "nix"), ("parser.adb", "ada"), ("player.gd", "gdscript"), ("AppDelegate.mm", "objectivec"), ("rules.bzl", "starlark"),
        ("thesis.tex", "latex"), ("Setup.psm1", "powershell"), ("config.h.in", "c"), ("application.properties", "ini"), ("guide.asciidoc", "asciidoc"),
        ("secrets/julia", "unknown"), ("Ruby", "unknown"), ("text", "unknown"), ("x/terraform", "unknown"), (".env.d", "d"), ("t/a.t", "perl"),
    ],
)  # fmt: skip
def test_the_language_of_a_file(path: str, language: str) -> None:
    assert language_of(path) == language


@pytest.mark.parametrize(
    ("path", "task", "named"),
    [
        ("src/main.py", "fix src/main.py", True),
        ("src/main.py", "fix main.py please", True),
        ("src/main.py", "see `main.py`, line 3", True),
        ("src/main.py", "main.py.", True),
        ("src/main.py", "other/main.py", False),
        ("src/main.py", "domain.py", False),
        ("src/main.py", "main.pyi", False),
        ("src/main.py", "the main function", False),
        ("Makefile", "the Makefile", False),
        ("a+b.py", "a+b.py", True),
        ("src/main.py", "/home/me/project/src/main.py:12", True),
        ("src/main.py", "./src/main.py", True),
        ("deep/src/main.py", "src/main.py", True),
        (".env.example", "see .env.example.", True),
        ("src/main.py", "", False),
    ],
)
def test_whether_a_task_names_a_file(path: str, task: str, named: bool) -> None:
    assert keywords.named_files([path, "unrelated.py"], task) == ({path} if named else set())


@pytest.fixture(scope="module", params=RANKINGS)
def ranked(setup: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a service with either ranking."""
    with serving(tmp_path_factory.mktemp("ranked"), *request.param) as running:
        yield running.client()


def test_the_agents_category_says_which_kind_comes_first(ranked: Client) -> None:
    first = {
        agent_type: cco_sidecar.kind_of(next(iter(files_of(ranked, agent_type=agent_type))))
        for agent_type in (
            "python-specialist",
            "test-engineer",
            "documentation-expert",
            "security-auditor",
            "issue-triager",
            "chief-architect",
        )
    }
    assert first == {
        "python-specialist": "source", "test-engineer": "test", "documentation-expert": "docs", "security-auditor": "source",
        "issue-triager": "docs", "chief-architect": "source",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("task", "path"),
    [
        ("The cookie is lost when a session ends", "src/session_store.py"),
        ("SessionStore forgets", "src/session_store.py"),
        ("say hello in a friendlier way", "src/greeting.py"),
        ("The session store and its cookie: begin in src/main.py", "src/main.py"),
        ("cookies, sessions and greeting.py", "src/greeting.py"),
    ],
)
def test_the_task_ranks_the_files(ranked: Client, task: str, path: str) -> None:
    files = files_of(ranked, task=task)
    assert next(iter(files)) == path
    assert files[path]["reasons"]
    scores = [file["score"] for file in files.values()]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("arguments", RANKINGS)
def test_what_is_being_worked_on_comes_before_what_only_matches(
    make_service: MakeService, repository: Path, arguments: list[str]
) -> None:
    for name in ("alpha", "beta", "gamma"):
        write(repository / f"src/{name}.py", "def parse_invoice(text):\n    return text\n")
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "Invoices")
    client = make_service(*arguments).client()
    matching = [path for path in files_of(client, task="parse the invoice") if path.startswith("src/")]
    assert set(matching[:3]) == {"src/alpha.py", "src/beta.py", "src/gamma.py"}
    write(repository / "src/gamma.py", "def parse_invoice(text):\n    return text.strip()\n")
    files = files_of(client, task="parse the invoice")
    assert next(iter(files)) == "src/gamma.py"
    assert "uncommitted change" in files["src/gamma.py"]["reasons"]
    git(repository, "checkout", "-q", "src/gamma.py")
    client.store("python-specialist", files_modified=["src/beta.py"])
    files = files_of(client, task="parse the invoice")
    assert next(iter(files)) == "src/beta.py"
    assert "changed by an earlier agent" in files["src/beta.py"]["reasons"]


@pytest.mark.needs_plugin("context/relevance says whose words match")
@pytest.mark.parametrize("task", ["zzqqx wwvvk", "Überbrückung größtenteils", "?!"])
def test_words_of_earlier_decisions_are_not_called_words_of_a_task_that_does_not_occur(
    make_service: Callable[..., Service], task: str
) -> None:
    client = make_service().client()
    client.store(decisions=["Greetings of the session store greet politely"])

    def matching() -> list[str]:
        """As soon as the index is ready, whose ranking alone looks at decisions."""
        context = client.get("/api/context/issue-1/python-specialist", task=task).json()["context"]
        assert context["metadata"]["task_matched"] is False
        return [why for file in context["relevant_files"] for why in file["reasons"] if "text matches" in why]

    assert all(why.endswith(" of earlier agents' decisions") for why in until(matching))


@pytest.mark.parametrize(
    "task",
    [
        "fix the bug",
        "It should not be",
        "zzqqx wwvvk",
        "Überbrückung größtenteils",
        "(?:[unclosed",
        ".* \\d+ ^$",
        "x" * 5_000,
        "?!",
        " ",
    ],
)
def test_a_task_none_of_whose_words_occur_gets_the_order_without_a_task_and_is_told_so(
    ranked: Client, task: str
) -> None:
    without, asked = context_of(ranked), context_of(ranked, task=task)
    assert (without["metadata"]["task_matched"], asked["metadata"]["task_matched"]) == (None, False)
    paths = [file["path"] for file in without["relevant_files"]]
    assert set(paths) == set(without["project_structure"]["files"]) - {".gitignore", "docs/guide.md"}
    assert paths[0].startswith("src/")
    assert [file["path"] for file in asked["relevant_files"]] == paths
    assert [file["score"] for file in asked["relevant_files"]] == [file["score"] for file in without["relevant_files"]]
    for plain, told in zip(without["relevant_files"], asked["relevant_files"], strict=True):
        assert told["reasons"] == ["no word of the task occurs", *plain["reasons"]]


def test_files_that_match_come_first_and_the_other_own_ones_follow(ranked: Client) -> None:
    context = context_of(ranked, task="the cookies of a SessionStore")
    assert context["metadata"]["task_matched"] is True
    assert not [file for file in context["relevant_files"] if "no word of the task occurs" in file["reasons"]]
    assert context["relevant_files"][0]["path"] == "src/session_store.py"
    own = [path for path in context["project_structure"]["files"] if path.endswith(".py")]
    assert sorted(file["path"] for file in context["relevant_files"]) == own
    assert context["relevant_files"][0]["score"] > 1.2 * context["relevant_files"][1]["score"]


@pytest.mark.needs_plugin("context/keywords and relevance weigh what is the agent's own")
def test_without_a_task_manifests_and_entry_documents_are_not_buried_under_source(
    make_service: MakeService, tmp_path: Path
) -> None:
    root = make_repository(tmp_path / "large")
    for number in range(120):
        write(root / f"src/deep/down/part_{number}.py", f"value = {number}\n")
    write(root / "docs/README.md", "# Another\n")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "Grow")
    paths = list(files_of(make_service(*KEYWORDS_ONLY, root=root).client()))
    assert len(paths) == 50 and {"README.md", "pyproject.toml"} <= set(paths) and "docs/README.md" not in paths
    assert paths[0].startswith("src/")


WORDS = {
    "src/größe.py": "def überschrift():\n    return 'Straße'\n", "src/menu.py": "МЕНЮ = 'обед'\n", "src/page.py": "# σελίδα\n",
    "src/chat.py": "# 会话 存储\n", "src/pattern.py": "a.b*c = r'^(x|y)[z]+$'\n", "src/café.py": "open = True\n",
}  # fmt: skip


@pytest.mark.parametrize("arguments", RANKINGS)
@pytest.mark.parametrize(
    "git_is",
    [
        "there",
        *(
            pytest.param(how, marks=pytest.mark.needs_plugin("context/project_index reads folders without git"))
            for how in ("not used", "not installed")
        ),
    ],
)
def test_words_of_any_script_are_found_with_git_and_without(
    make_service: MakeService, tmp_path: Path, git_is: str, arguments: list[str]
) -> None:
    root = outside_repositories(tmp_path) / "words"
    for name, content in {**WORDS, "src/plain.py": "print()\n", "node_modules/left/index.js": "// zanzibar\n"}.items():
        write(root / name, content)
    if git_is == "there":
        write(root / ".gitignore", "node_modules/\n")
        git(root, "init", "-q")
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", "Begin")
    client = make_service(
        *arguments, root=root, env={"PATH": str(tmp_path)} if git_is == "not installed" else {}
    ).client()
    for task, path in {
        "die ÜBERSCHRIFT ist falsch": "src/größe.py", "Größe": "src/größe.py", "где меню": "src/menu.py", "Σελίδα": "src/page.py",
        "修复 会话": "src/chat.py", "Café": "src/café.py", "a.b*c|(pattern": "src/pattern.py", "[z]+ (x|y) PATTERN.*": "src/pattern.py",
    }.items():  # fmt: skip
        context = context_of(client, task=task)
        assert (context["relevant_files"][0]["path"], context["metadata"]["task_matched"]) == (path, True), task
    assert context_of(client, task="zanzibar")["metadata"]["task_matched"] is False


@pytest.mark.parametrize("arguments", RANKINGS)
def test_what_may_not_be_read_says_nothing_about_a_task(
    make_service: MakeService, repository: Path, tmp_path: Path, arguments: list[str]
) -> None:
    write(tmp_path / "outside/notes.py", "# quokka\n")
    write(repository / "build/made.py", "# zanzibar\n")
    write(repository / "deploy/secrets.yaml", "password: wombat\n")
    write(repository / ".ssh/config", "Host axolotl\n")
    write(repository / "blob.bin", b"\0okapi\0")
    (repository / "notes.py").symlink_to(tmp_path / "outside/notes.py")
    (repository / "elsewhere").symlink_to(tmp_path / "outside")
    git(repository, "add", "-f", "deploy", ".ssh", "notes.py", "elsewhere", "blob.bin")
    git(repository, "commit", "-q", "-m", "Much")
    client = make_service(*arguments).client()
    for word in ("zanzibar", "wombat", "axolotl", "quokka", "okapi"):
        assert context_of(client, task=f"the {word}")["metadata"]["task_matched"] is False, word
    assert context_of(client, task="the cookie and the wombat")["metadata"]["task_matched"] is True


FILLERS = ["lorem{} ", "long" * 2_000 + "{} ", "(.*{}[ ", "größe{} ", "\n{}\n", "_{}", "save the cookie, fix {}. "]


@pytest.mark.parametrize("arguments", RANKINGS)
def test_a_task_of_30000_characters_is_answered_like_any_other(
    make_service: MakeService, repository: Path, arguments: list[str]
) -> None:
    client = make_service(*arguments, "--agent-command", "true").client()
    for number, filler in enumerate(FILLERS):
        body = "".join(map(filler.format, range(10_000)))
        task = f"The session loses its cookie\n{body}"[:30_000]
        client.spawn(f"long-{number}", task=task)
        context = context_of(client, issue=f"long-{number}")
        assert context["relevant_files"][0]["path"] == "src/session_store.py", filler
        assert context["metadata"]["task_matched"] is True, filler


def test_the_words_of_a_task_are_few_those_of_its_beginning_first() -> None:
    body = "the spinner spins; " * 100 + " ".join(f"word{letter * 3}" for letter in "abcdefghijklmnopqrstuvwxyz" * 50)
    words = keywords.task_words(f"Fix SessionStore.save_cookie in queries\n{body}", 12)
    assert list(words.values())[:7] == ["sessionstore", "session", "store", "save_cookie", "save", "cookie", "queries"]
    assert (
        list(words.items())[6:9] == [("quer", "queries"), ("spinner", "spinner"), ("spins"[:4], "spins")]
        and len(words) == 12
    )
    assert keywords.task_words("fix the bug: a 1 _ " + "y" * 81, 12) == {}


def test_each_copy_is_known_by_its_first_lines() -> None:
    assert withheld.OWN_FIRST_LINE in MODULE.read_text()[:600] and MODULE.stat().st_size > 50_000


OTHERS = {
    "web/basket.ts": "export const basket = 1\n", "svc/main.go": "package main\nfunc voucher() {}\n",
    "deploy/values.yaml": "replicas: 2\n", "notes/tax.md": "The levy.\n", "data.csv": "zebra\n",
}  # fmt: skip
PYTHON = {"src/greeting.py", "src/main.py", "src/session_store.py", "tests/test_main.py"}


@pytest.fixture
def among_others(request: pytest.FixtureRequest, make_service: MakeService, repository: Path) -> Client:
    for name, text in OTHERS.items():
        write(repository / name, text)
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "More")
    return make_service().client()


SPOKEN_FOR = [
    ("python-specialist", "", PYTHON | {"README.md", "pyproject.toml"}),
    ("go-specialist", "", {"svc/main.go", "README.md", "pyproject.toml"}),
    ("typescript-specialist", "", {"web/basket.ts", "README.md", "pyproject.toml"}),
    ("fullstack-developer", "", PYTHON | {"web/basket.ts", "svc/main.go", "README.md", "pyproject.toml"}),
    ("python-specialist", "the voucher", PYTHON | {"svc/main.go"}),
    ("python-specialist", "the number of replicas", PYTHON | {"deploy/values.yaml"}),
    ("python-specialist", "see data.csv", PYTHON | {"data.csv"}),
    ("go-specialist", "the levy", {"svc/main.go", "notes/tax.md"}),
    ("ruby-specialist", "the voucher", {"svc/main.go"}),
]


@pytest.mark.needs_plugin("context/keywords and relevance weigh what is the agent's own")
def test_files_of_others_come_where_something_speaks_for_them(among_others: Client, repository: Path) -> None:
    for agent_type, task, paths in SPOKEN_FOR:
        assert set(files_of(among_others, agent_type=agent_type, task=task)) == paths, (agent_type, task)

    for agent_type, task in itertools.product(
        ("ruby-specialist", "swift-specialist", "haskell-specialist"), ("", "zzqqx wwvvk", "?!")
    ):
        context = context_of(among_others, agent_type=agent_type, task=task)
        assert {file["path"] for file in context["relevant_files"]} == set(context["project_structure"]["files"])
        for file in context["relevant_files"]:
            assert file["reasons"][-1].endswith("as no file is of the agent's kinds and language"), (agent_type, task)

    for number, path in enumerate(("web/basket.ts", "deploy/values.yaml", "notes/tax.md")):
        told, changed = f"told-{number}", f"changed-{number}"
        assert path not in files_of(among_others, task="greeting", issue=told), path
        among_others.store("go-specialist", issue=told, files_modified=[path])
        assert path in files_of(among_others, task="greeting", issue=told), path
        assert path not in files_of(among_others, task="greeting", issue=changed), path
        write(repository / path, "changed\n")
        assert path in files_of(among_others, task="greeting", issue=changed), path


# -- what is ours


def test_a_module_that_runs_beside_the_project_is_none_of_its_files(
    make_service: MakeService, repository: Path
) -> None:
    copied = write(repository / "tools/team.py", MODULE.read_bytes())
    context = context_of(make_service("--no-plugins", module=copied).client(), max_files=1000)
    assert "tools/team.py" not in json.dumps(context) and "src/main.py" in context["project_structure"]["files"]


@pytest.mark.needs_plugin("context/project_index knows every copy, and plugins")
@pytest.mark.parametrize(
    ("copied_to", "runs"),
    [
        ("cco_sidecar.py", "the copy"), ("cco_sidecar.py", "another"), ("tools/agents/team.py", "the copy"),
        ("bin/cco", "another"),
    ],
)  # fmt: skip
def test_the_service_gives_the_projects_files_and_not_its_own(
    make_service: MakeService, repository: Path, copied_to: str, runs: str
) -> None:
    copied = write(repository / copied_to, MODULE.read_bytes())
    files = (path for path in MODULE.parent.glob("plugins/**/*.*") if path.suffix != ".pyc")
    bundled = {path.relative_to(MODULE.parent / "plugins").as_posix() for path in files}
    for name in bundled:
        write(copied.parent / "plugins" / name, (MODULE.parent / "plugins" / name).read_bytes())
    theirs = write(copied.parent / "plugins/deploy.py", "def deploy_everything(): ...\n")
    write(repository / "src/plugins/pipeline.py", "import cco_sidecar  # a cookie of ours\n")
    git(repository, "add", "src", copied_to)  # the plugins stay untracked
    client = make_service(module=copied if runs == "the copy" else MODULE).client()
    everything = {"agent_type": "chief-architect", "max_files": 1000}  # but for .gitignore, which is nobody's
    context = context_of(client, **everything)
    folder = copied_to.rpartition("/")[0]
    ours = {copied_to, *(f"{folder}/plugins/{name}".lstrip("/") for name in bundled)}
    assert not ours & set(context["project_structure"]["files"])
    assert not ours & {change["path"] for change in context["git_context"]["uncommitted_changes"]}
    given = {file["path"] for file in context["relevant_files"]}
    assert given | {".gitignore"} == set(context["project_structure"]["files"]) - ours
    assert {theirs.relative_to(repository).as_posix(), "src/plugins/pipeline.py"} <= given
    for task in ("explain", "the keeper adopts idempotency", "bm25 relevance of the orchestration"):
        context = context_of(client, task=task, **everything)
        assert {file["path"] for file in context["relevant_files"]} == given and context["metadata"][
            "task_matched"
        ] is False, task
    assert files_of(client, task=f"see {copied_to}", **everything).keys() == given
    assert (
        context_of(client, task="deploy everything")["relevant_files"][0]["path"]
        == theirs.relative_to(repository).as_posix()
    )


@pytest.mark.needs_plugin("context/project_index knows every copy, and plugins")
def test_our_own_language_is_not_the_projects(make_service: MakeService, tmp_path: Path) -> None:
    root = tmp_path / "ours"
    write(root / "one.go", "package one\n")
    write(root / "cco_sidecar.py", MODULE.read_bytes())
    shutil.copytree(MODULE.parent / "plugins", root / "plugins", ignore=shutil.ignore_patterns("__pycache__"))
    git(root, "init", "-q")
    git(root, "add", "-A")
    client = make_service(root=root, module=root / "cco_sidecar.py").client()
    context = context_of(client)
    assert (context["metadata"]["project_type"], [file["path"] for file in context["relevant_files"]]) == (
        "go",
        ["one.go"],
    )
    assert client.store("chief-architect")["next_agents"][0]["agent_type"] == "go-specialist"


@pytest.mark.needs_plugin("context/project_index knows every copy, and plugins")
@pytest.mark.parametrize(("name", "developed"), [("cco-sidecar", True), ("cco-sidecar-fork", False), ("sample", False)])
def test_whoever_develops_the_sidecar_sees_it(
    make_service: MakeService, repository: Path, name: str, developed: bool
) -> None:
    shutil.copytree(MODULE.parent / "plugins", repository / "plugins", ignore=shutil.ignore_patterns("__pycache__"))
    write(repository / "cco_sidecar.py", MODULE.read_bytes())
    write(repository / "pyproject.toml", f'[project]\nname = "{name}"\n')
    given = files_of(
        make_service(module=repository / "cco_sidecar.py").client(), task="idempotency of the demo", max_files=1000
    )
    assert {path in given for path in ("cco_sidecar.py", "plugins/commands/demo.py")} == {developed}


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("a = 1\nkey = 'gh" + "p_aB3xY7pQ9rT2vW5z8mN4cD6fG1hJ0kL2sE9u'\n", "a = 1\nkey = '[REDACTED]'\n"),
        ("client_secret = 'aB3xY7pQ9rT2vW5z8mN4'\n" * 2, "client_secret = '[REDACTED]'\n" * 2),
        ("nothing of the kind\n", "nothing of the kind\n"),
    ],
    ids=["token", "two secrets", "nothing"],
)
def test_files_that_a_plugin_gives_are_redacted_too(
    make_service: MakeService, tmp_path: Path, content: str, kept: str
) -> None:
    file = {"path": "their/notes.txt", "content": content, "last_modified": "2026-01-31T12:00:00Z", "size": 9}
    file |= {"language": "text", "checksum": cco_sidecar.checksum(content)}
    source = f"from cco_sidecar import hookimpl\n@hookimpl\ndef context_section():\n    return {{'relevant_files': [{file}]}}\n"
    write(tmp_path / "plugins/theirs.py", source)
    context = context_of(make_service("--plugins", str(tmp_path / "plugins")).client(), max_files=1)
    (given,) = context["relevant_files"]
    number = kept.count("REDACTED")
    assert (given["content"], given["checksum"], given.get("redactions", 0)) == (
        kept,
        cco_sidecar.checksum(kept),
        number,
    )
    assert context["metadata"]["redactions"] >= number


@pytest.mark.parametrize(
    "answer", ["5", "'text'", "[1]", "{'metadata': 'text'}", "{'more': object()}", "{'more': '\\ud800'}"]
)
def test_sections_that_cannot_be_taken_are_passed_over(make_service: MakeService, tmp_path: Path, answer: str) -> None:
    source = f"from cco_sidecar import hookimpl\n@hookimpl\ndef context_section():\n    return {answer}\n"
    write(tmp_path / "plugins/theirs.py", source)
    service = make_service("--plugins", str(tmp_path / "plugins"))
    context = context_of(service.client())
    assert context["relevant_files"] and context["metadata"]["project_type"] == "python" and "more" not in context
    assert "plugin theirs: context_section: " in service.log


@pytest.mark.parametrize(
    ("answer", "written"),
    [("{'a'}", ["a"]), ("(1, 2)", [1, 2]), ("datetime.date(2026, 1, 31)", "2026-01-31"), ("b'ab'", "YWI=")],
)
def test_what_a_section_has_beside_the_types_of_json_is_written_by_them(
    make_service: MakeService, tmp_path: Path, answer: str, written: Any
) -> None:
    source = "import datetime\nfrom cco_sidecar import hookimpl\n@hookimpl\ndef context_section():\n"
    write(tmp_path / "plugins/theirs.py", f"{source}    return {{'more': {answer}}}\n")
    assert context_of(make_service("--plugins", str(tmp_path / "plugins")).client())["more"] == written


@pytest.mark.needs_plugin("context/issue_files asks plugins about issues")
def test_a_plugin_that_knows_issues_gives_the_task_or_says_that_there_is_none(
    make_service: MakeService, tmp_path: Path
) -> None:
    source = (
        "from cco_sidecar import IssueNotFound, hookimpl\n"
        "@hookimpl\ndef resolve_issue(issue_id):\n"
        "    if issue_id == 'gone':\n        raise IssueNotFound\n"
        "    return {'title': 'Cookies', 'body': 'The session store loses them'} if issue_id == 'known' else None\n"
    )
    write(tmp_path / "plugins/tracker.py", source)
    client = make_service("--plugins", str(tmp_path / "plugins")).client()
    answer = client.get("/api/context/gone/python-specialist")
    assert (answer.status_code, answer.json()["code"]) == (404, "REQ_002")
    assert next(iter(files_of(client, issue="known"))) == "src/session_store.py"
    assert answer_of(client, issue="elsewhere")["context"]["previous_agent_outputs"] == []

"""The plugin project_index: what it remembers is what the module's own reader finds anew, whatever happens to the
repository.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    MODULE,
    Service,
    clean_environment,
    git,
    make_repository,
    outside_repositories,
    plugin,
    until,
    write,
)

import cco_sidecar
from cco_sidecar import GitError, ProjectState

project_index = plugin("project_index")
git_facts, is_young = plugin("_git_facts"), plugin("_fingerprints").is_young


@pytest.fixture
def readers(repository: Path, tmp_path: Path) -> tuple[Any, Any]:
    """(the plugin's reader, the module's own)."""
    index = project_index.ProjectIndex(repository, tmp_path)
    own = project_index.GitProject(repository, tmp_path)
    return index, own


def test_those_who_wait_share_a_look_that_began_since_they_asked(
    readers: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, looks = readers[0], []
    look = index.look
    monkeypatch.setattr(index, "look", lambda: looks.append(look()) or looks[-1])

    async def ask() -> list[ProjectState]:
        return await asyncio.gather(*(index.state() for _ in range(20)))

    first, *others = asyncio.run(ask())
    assert len(looks) == 2  # the first one's, and one for all who asked while that went on
    assert first is looks[0] and all(state is looks[1] for state in others)


def test_the_watcher_of_other_systems_hears_of_changes(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watching = plugin("_watchdog")
    heard: list[str] = []
    for budget, state in ((4_000, "full"), (0, "partial: ")):
        monkeypatch.setattr(watching.Watcher, "BUDGET", budget)
        watcher = watching.Watcher(repository, heard.append)
        watcher.start()
        try:
            assert watcher.suspects({}) is None and not watcher.quiet()  # hints, and no proof
            (repository / "src" / "new.py" if budget else repository / "new.py").write_text("new = 1\n")
            until(lambda: any(path.endswith("new.py") for path in heard))
            assert watcher.state.startswith(state)
        finally:
            watcher.stop()
        heard.clear()


def facts(state: ProjectState) -> tuple[Any, ...]:
    return state.root, state.files, state.git, state.head


CHANGES: dict[str, Callable[[Path], Any]] = {
    "an edit": lambda root: (root / "src/main.py").write_text("def main():\n    return 'edited'\n"),
    "an edit of the same length": lambda root: (root / "src/main.py").write_text("def main():\n    return 'EDITED'\n"),
    "a new file": lambda root: (root / "src/new.py").write_text("new = 1\n"),
    "a new folder": lambda root: (
        (root / "deep/er").mkdir(parents=True),
        (root / "deep/er/file.go").write_text("package x\n"),
    ),
    "a deletion": lambda root: (root / "src/new.py").unlink(),
    "a file that is replaced": lambda root: shutil.copy(root / "README.md", root / "src/other.md").replace(
        root / "README.md"
    ),
    "a file staged": lambda root: git(root, "add", "-A"),
    "a commit": lambda root: git(root, "commit", "-q", "-m", "Everything"),
    "a rename": lambda root: git(root, "mv", "src/main.py", "src/program.py"),
    "a branch": lambda root: git(root, "checkout", "-q", "-b", "side"),
    "an ignore rule": lambda root: (root / ".gitignore").write_text("deep/\n"),
    "a file below what is ignored": lambda root: (root / "deep/er/second.go").write_text("package y\n"),
    "a stash": lambda root: git(root, "stash", "-q", "-u"),
    "a stash taken back": lambda root: git(root, "stash", "pop", "-q"),
    "another remote": lambda root: git(root, "remote", "set-url", "origin", "https://github.com/org/other"),
    "no repository any more": lambda root: shutil.rmtree(root / ".git"),
    "a repository again": lambda root: git(root, "init", "-q"),
}


def test_what_is_remembered_is_what_a_new_look_finds(readers: tuple[Any, Any], repository: Path) -> None:
    index, own = readers
    assert facts(index.look()) == facts(own.look())
    for name, change in CHANGES.items():
        change(repository)
        assert facts(index.look()) == facts(own.look()), name


KINDS_OF_CHANGE: dict[str, tuple[Callable[[Path], Any], bool]] = {  # with whether it changes which files there are
    "an edit": (lambda root: (root / "src/main.py").write_text("edited = 1\n"), False),
    "a file staged": (lambda root: git(root, "add", "-A"), False),
    "a rule that ignores nothing": (lambda root: (root / ".gitignore").write_text("build/\nnothing\n"), False),
    "a new file of credentials": (lambda root: (root / "src/deploy.pem").write_text("new\n"), True),
    "a rename": (lambda root: git(root, "mv", "src/main.py", "src/main.go"), True),
    "a deletion": (lambda root: (root / "src/deploy.pem").unlink(), True),
    "a rule that ignores a file": (lambda root: (root / ".gitignore").write_text("*.go\n*.md\n"), False),
    "a file removed that is ignored now": (lambda root: git(root, "rm", "-q", "--cached", "src/main.go"), True),
}


def test_what_depends_on_the_names_alone_is_made_anew_where_one_changed_and_only_there(
    readers: tuple[Any, Any], repository: Path
) -> None:
    index, _ = readers
    remembered = (cco_sidecar.list_names, cco_sidecar.main_language, git_facts.secret_among)
    (repository / ".gitignore").write_text("build/\n")

    def misses() -> list[int]:
        return [each.cache_info().misses for each in remembered]

    def told(state: ProjectState) -> list[Any]:
        open_files = index.readable(state.files)
        names = tuple(file.path for file in state.files)
        return [cco_sidecar.list_names(names), cco_sidecar.main_language(names), [file.path for file in open_files]]

    told(index.look())
    for name, (change, changes_names) in KINDS_OF_CHANGE.items():
        before = misses()
        change(repository)
        found = told(state := index.look())
        assert (misses() != before) is changes_names, name
        for each in remembered:
            each.cache_clear()  # as in a service that has just been started
        assert found == told(state), name


HOW_FILES_ARE: dict[str, Callable[[Path, str], Any]] = {  # before they are edited
    "clean": lambda root, name: None,
    "modified": lambda root, name: (root / name).write_text("before\n"),
    "staged": lambda root, name: ((root / name).write_text("before\n"), git(root, "add", f"./{name}")),
    "staged and modified": lambda root, name: (
        (root / name).write_text("staged\n"), git(root, "add", f"./{name}"), (root / name).write_text("before\n")
    ),
    "untracked": lambda root, name: git(root, "rm", "-q", "--cached", f"./{name}"),
    "to be added": lambda root, name: (git(root, "rm", "-q", "--cached", f"./{name}"), git(root, "add", "-N", f"./{name}")),
    "assumed to be unchanged": lambda root, name: git(root, "update-index", "--assume-unchanged", f"./{name}"),
    "not asked about its time": lambda root, name: git(root, "config", "diff.autoRefreshIndex", "false"),
    "without a data type": lambda root, name: (root / ".gitattributes").write_text("* -diff\n"),
    "of Windows": lambda root, name: (root / ".gitattributes").write_text("* text eol=crlf\n"),
}  # fmt: skip
EDITS: dict[str, Callable[[Path], Any]] = {
    "other text": lambda path: path.write_text("edited\nlines\n"),
    "as committed": lambda path: path.write_text("first\n"),
    "a byte that no text has": lambda path: path.write_bytes(b"\0binary"),
    "another mode": lambda path: path.chmod(0o755),
    "touched": lambda path: os.utime(path, ns=(1_600_000_000_000_000_000,) * 2),
    "replaced by a link": lambda path: (path.unlink(), path.symlink_to("elsewhere")),
}


@pytest.mark.parametrize("how", HOW_FILES_ARE)
@pytest.mark.parametrize("below", ["", "packages/one/"])
def test_an_edit_alone_is_told_as_by_a_look_at_everything_and_asks_git_once(
    home: Path, tmp_path: Path, how: str, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "repository"
    root = top / below
    root.mkdir(parents=True)
    git(top, "init", "-q")
    names = [":colon.py", "tab\tand\nline.py", "plain.py", "folder/deep.py"]
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("first\n")
    git(top, "add", "-A")
    git(top, "commit", "-q", "-m", "first")
    for name in names:
        HOW_FILES_ARE[how](root, name)
    index, own = project_index.ProjectIndex(root, tmp_path), project_index.GitProject(root, tmp_path)
    assert facts(index.look()) == facts(own.look())
    for edit, change in EDITS.items():
        for name in names:
            change(root / name)
            index.look()
        until(lambda: index.look().digest == index.look().digest)  # old enough to be trusted
        assert facts(index.look()) == facts(own.look()), edit
    asked: list[str] = []
    ask_git = git_facts.ask_git
    monkeypatch.setattr(git_facts, "ask_git", lambda *words, **more: asked.append(words[1]) or ask_git(*words, **more))

    def asked_of_an_edit() -> list[str]:
        asked.clear()
        (root / "plain.py").unlink()
        (root / "plain.py").write_text(f"edited {time.time_ns()}\n")
        index.look()
        return [word for word in asked if word in ("status", "diff", "ls-files")]

    until(lambda: how not in ("clean", "modified") or asked_of_an_edit() == ["diff"])


CONFIGURED: dict[str, Callable[[Path, str], Any]] = {  # a filter, where nothing but an edit was looked at before
    "by the repository": lambda root, trap: git(root, "config", "filter.late.clean", trap),
    "by a file that it includes": lambda root, trap: git(root, "config", "-f", "more.config", "filter.late.clean", trap),
    "for another branch": lambda root, trap: (
        git(root, "config", "-f", "side.config", "filter.late.clean", trap), git(root, "checkout", "-q", "-b", "side")
    ),
    "for the work tree": lambda root, trap: git(root, "config", "--worktree", "filter.late.clean", trap),
}  # fmt: skip


@pytest.mark.parametrize("where", CONFIGURED)
def test_what_git_was_told_to_run_after_its_settings_were_remembered_is_not_run(
    repository: Path, readers: tuple[Any, Any], tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trap := tmp_path / "trap.sh").write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\ncat\n")
    trap.chmod(0o755)
    (repository / ".gitattributes").write_text("*.py filter=late\n")
    git(repository, "config", "extensions.worktreeConfig", "true")
    git(repository, "config", "include.path", "../more.config")
    git(repository, "config", "includeIf.onbranch:side.path", "../side.config")
    asked: list[str] = []
    git_output = cco_sidecar.git_output
    monkeypatch.setattr(
        cco_sidecar, "git_output", lambda words, env: asked.append(str(words)) or git_output(words, env)
    )

    def asks_once() -> bool:
        asked.clear()
        (repository / "src/main.py").write_text(f"edited = {time.time_ns()}\n")
        readers[0].look()
        return [word for line in asked for word in ("config", "diff", "status") if f"'{word}'" in line] == ["diff"]

    until(asks_once)
    CONFIGURED[where](repository, str(trap))
    until(asks_once)
    assert facts(readers[0].look()) == facts(readers[1].look()) and not (tmp_path / "sprung").exists()
    git(repository, "diff")
    assert (tmp_path / "sprung").exists()


def test_a_short_file_is_read_once_until_it_changes(repository: Path, readers: tuple[Any, Any]) -> None:
    index, _ = readers
    file, path = repository / "src/main.py", "src/main.py"
    project_index.described.cache_clear()

    def read() -> tuple[str, int]:
        """What is said of the file once it is older than the resolution of time stamps, and how many were read."""
        until(lambda: not is_young(project_index.fingerprint(str(file)), time.time_ns()))
        content = index.look().describe(path)["content"]
        return content, project_index.described.cache_info().misses

    assert read() == read() == (file.read_text(), 1)
    file.write_text(file.read_text().upper())  # as long as before
    assert read() == (file.read_text(), 2)
    file.write_text("long = 1\n" * 10_000)
    assert read() == (file.read_text(), 2)  # such ones are not kept
    file.unlink()
    assert index.look().describe(path) is None


@pytest.mark.parametrize("folder", ["src", "src/deep", "src/deep/er"])
def test_nothing_is_told_of_a_file_whose_folder_has_become_a_link_that_leaves_the_root(
    repository: Path, readers: tuple[Any, Any], folder: str
) -> None:
    path = "src/deep/er/inner.py"
    file = write(repository / path, "inner = 1\n")
    git(repository, "add", path)
    until(lambda: not is_young(project_index.fingerprint(str(file)), time.time_ns()))
    states = [reader.look() for reader in readers]
    assert [state.describe(path)["content"] for state in states] == ["inner = 1\n"] * 2
    (repository / folder).rename(repository.parent / "away")
    (repository / folder).symlink_to(repository.parent / "away")
    for reader in readers:
        state = reader.look()
        assert state.describe(path) is None
        assert path in [
            change.path for change in state.git.uncommitted_changes if change.status in ("deleted", "added")
        ]
    (repository / folder).unlink()
    (repository.parent / "away").rename(repository / folder)
    assert [reader.look().describe(path)["content"] for reader in readers] == ["inner = 1\n"] * 2


def run(*words: str | bytes | Path, input: bytes = b"") -> str:
    return subprocess.run(words, check=True, capture_output=True, input=input).stdout.decode().strip()


def commit_of(date: str) -> Callable[[Path], None]:
    """A commit whose date is ``date``, as other programs than git have written them."""

    def make(root: Path) -> None:
        head, tree = git(root, "rev-parse", "HEAD", "HEAD^{tree}").split()
        text = f"tree {tree}\nparent {head}\nauthor a <a@b> {date}\ncommitter a <a@b> {date}\n\nOddly dated\n"
        words = ("git", "-C", root, "hash-object", "-t", "commit", "-w", "--literally", "--stdin")
        git(root, "update-ref", "HEAD", run(*words, input=text.encode()))

    return make


def submodule(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def add(root: Path) -> None:
        inner = make_repository(root.parent / "inner")
        git(root, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(inner), "library")
        git(root, "commit", "-q", "-m", "A library")
        make(root / "library")

    return add


def object_of(root: Path, name: str) -> Path:
    hash = git(root, "rev-parse", name).strip()
    return root / ".git/objects" / hash[:2] / hash[2:]


def set_pointer(content: bytes) -> Callable[[Path], None]:
    return submodule(lambda folder: (folder / ".git").write_bytes(content))


# what happened to the repository, and which facts are then other ones than those of the fixture
ODD: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "a branch in Latin-1": (
        lambda root: run("git", "-C", root, "checkout", "-q", "-b", b"caf\xe9"),
        {"branch": "caf\ufffd"},
    ),
    "a branch in Shift JIS": (
        lambda root: run("git", "-C", root, "checkout", "-q", "-b", "\u30c6\u30b9\u30c8".encode("shift-jis")),
        {"branch": "\u30c6\u30b9\u30c8".encode("shift-jis").decode("utf-8", "replace")},
    ),
    "a submodule's branch in Latin-1": (
        submodule(lambda folder: run("git", "-C", folder, "checkout", "-q", "-b", b"caf\xe9")),
        {"messages": ["A library", "Greet politely", "Initial commit"]},
    ),
    **{
        f"a submodule whose .git holds {what}": (
            set_pointer(content),
            {"messages": ["A library", "Greet politely", "Initial commit"]},
        )
        for what, content in {
            "NUL": b"gitdir: \0\n",
            "garbage": b"\xff\xfe\0g\0",
            "10 kB": b"gitdir: " + b"a" * 10_000,
            "nothing": b"",
        }.items()
    },
    "a submodule whose .git is a pipe": (
        submodule(lambda folder: ((folder / ".git").unlink(), os.mkfifo(folder / ".git"))),
        {"messages": ["A library", "Greet politely", "Initial commit"]},
    ),
    **{
        f"a commit with the date {date!r}": (
            commit_of(date),
            {"messages": ["Oddly dated", "Greet politely", "Initial commit"], "dates": [False, True, True]},
        )
        for date in ("-1 +0000", "", "yesterday", "253402300800 +0000", "99999999999999999999 +0000")
    },
    "a file of the year 2500": (lambda root: os.utime(root / "src/main.py", ns=(2**64, 2**64)), {}),
    "a file of 1823": (lambda root: os.utime(root / "src/main.py", ns=(-(2**62), -(2**62))), {}),
    "a head that does not exist": (
        lambda root: (root / ".git/refs/heads/main").write_text("1" * 40 + "\n"),
        {"messages": []},
    ),
    "a damaged commit": (
        lambda root: (object_of(root, "HEAD").chmod(0o600), object_of(root, "HEAD").write_text("?")),
        {"messages": []},
    ),
    "a missing tree": (lambda root: object_of(root, "HEAD~1^{tree}").unlink(), {"numbers": [0, 0]}),
    "no files shown for first commits": (lambda root: git(root, "config", "log.showRoot", "false"), {}),
    "no files shown for merges": (lambda root: git(root, "config", "log.diffMerges", "off"), {}),
    "an order of files that is not there": (lambda root: git(root, "config", "diff.orderFile", "/no/where"), {}),
    "another encoding of the log": (
        lambda root: (
            git(root, "config", "i18n.logOutputEncoding", "latin1"),
            git(root, "commit", "--allow-empty", "-q", "-m", "Caf\xe9"),
        ),
        {"messages": ["Caf\xe9", "Greet politely", "Initial commit"], "numbers": [0, 1, 8]},
    ),
    "a second URL": (
        lambda root: git(root, "remote", "set-url", "--add", "origin", "https://example.com/mirror"),
        {"remote_url": "https://github.com/org/project"},
    ),
    "an author who knows our separators": (
        lambda root: git(root, "commit", "--allow-empty", "-q", "-m", "Odd", "--author", "a\x02b\x02c <a@b>"),
        {"messages": ["Odd", "Greet politely", "Initial commit"], "numbers": [0, 1, 8]},
    ),
    "a bare repository inside": (lambda root: git(root, "init", "-q", "--bare", "mirror.git"), {"added": []}),
    "a clone's database beside its .git file": (
        lambda root: ((root / ".git").rename(root / ".bare"), (root / ".git").write_text("gitdir: ./.bare\n")),
        {"added": []},
    ),
}


BROKEN: dict[str, Callable[[Path], Any]] = {
    "HEAD": lambda root: (root / ".git/HEAD").write_text("garbage"),
    "a folder of git that is elsewhere, and gone": lambda root: (
        shutil.rmtree(root / ".git"),
        (root / ".git").write_text("gitdir: /gone"),
    ),
    "the index": lambda root: (root / ".git/index").write_bytes(b"garbage"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_no_reader_takes_a_damaged_repository_for_an_empty_folder(
    readers: tuple[Any, Any], repository: Path, name: str
) -> None:
    BROKEN[name](repository)
    for reader in (*readers, cco_sidecar.Project(repository, repository)):
        with pytest.raises(GitError):
            reader.look()


@pytest.mark.parametrize("name", ODD)
def test_an_odd_fact_takes_no_other_with_it(readers: tuple[Any, Any], repository: Path, name: str) -> None:
    change, expected = ODD[name]
    index, own = readers
    if "damaged" not in name and "missing" not in name:  # what was read before that stays true
        index.look()
    before = {file.path for file in own.look().files}
    change(repository)
    for state in (own.look(), index.look(), project_index.ProjectIndex(repository, own._scratch).look()):
        assert facts(state) == facts(own.look())
        commits = state.git.recent_commits
        seen = {
            "branch": state.git.branch, "messages": [commit.message for commit in commits],
            "dates": [commit.timestamp is not None for commit in commits], "remote_url": state.git.remote_url,
            "added": sorted({file.path for file in state.files} - before - {".gitmodules"}),
        }  # fmt: skip
        usual = {
            "branch": "main", "messages": ["Greet politely", "Initial commit"], "dates": [True] * len(commits),
            "remote_url": "https://github.com/org/project", "added": [],
        }  # fmt: skip
        wanted = usual | expected
        if "numbers" in wanted:
            assert [len(commit.files_changed) for commit in commits] == wanted.pop("numbers")
        elif len(commits) > 1:
            assert [len(commit.files_changed) for commit in commits[-2:]] == [1, 8]
        assert seen == wanted
        assert state.files and before <= {file.path for file in state.files}


def test_inodes_and_times_of_any_size_are_fingerprints(
    readers: tuple[Any, Any], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.lstat

    def lstat(path: Any) -> os.stat_result:
        facts = real(path)
        return os.stat_result([facts[0], facts[1] | 2**63, *facts[2:10]], {"st_mtime_ns": 2**70, "st_ctime_ns": 2**71})

    monkeypatch.setattr(os, "lstat", lstat)
    for reader in readers:
        state = reader.look()
        assert {file.mtime_ns for file in state.files} == {2**63 - 1} and state.digest


DAMAGED: dict[str, Callable[[Path], Any]] = {
    "the index": lambda root: (root / ".git/index").write_text("garbage"),
    "a part of the index": lambda root: os.truncate(root / ".git/index", 20),
    "HEAD": lambda root: (root / ".git/HEAD").write_text("garbage"),
    "HEAD is gone": lambda root: (root / ".git/HEAD").unlink(),
    "no objects": lambda root: shutil.rmtree(root / ".git/objects"),
    "the configuration": lambda root: (root / ".git/config").write_text("[core\n"),
    "a version that git does not know": lambda root: git(root, "config", "core.repositoryFormatVersion", "99"),
    "an extension that git does not know": lambda root: (
        git(root, "config", "core.repositoryFormatVersion", "1"),
        git(root, "config", "extensions.tomorrow", "true"),
    ),
    "a .git file that leads nowhere": lambda root: (
        shutil.rmtree(root / ".git"),
        (root / ".git").write_text("gitdir: /nonexistent/place\n"),
    ),
    "the user's configuration": lambda root: Path(os.environ["HOME"], ".gitconfig").write_text("[user\n"),
    "a value in the user's configuration": lambda root: Path(os.environ["HOME"], ".gitconfig").write_text(
        "[core]\n\tbare = perhaps\n"
    ),
    "XDG's configuration": lambda root: (
        Path(os.environ["HOME"], ".config/git").mkdir(parents=True),
        Path(os.environ["HOME"], ".config/git/config").write_text("= nothing\n"),
    ),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder that git goes by."""
    (tmp_path / "home").mkdir()
    for name in [name for name in os.environ if name.startswith(("GIT_", "XDG_CONFIG"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("where", ["the top", "a folder below"])
@pytest.mark.parametrize("name", DAMAGED)
def test_where_git_fails_nothing_that_it_ignores_is_listed_and_the_error_says_why(
    home: Path, repository: Path, tmp_path: Path, name: str, where: str
) -> None:
    (repository / "src/private.log").write_text("ignored")
    (repository / ".git/info").mkdir(exist_ok=True)
    (repository / ".git/info/exclude").write_text("*.own\n")
    (repository / "src/private.own").write_text("ignored")
    root = repository if where == "the top" else repository / "src"
    for reader in (project_index.ProjectIndex(root, tmp_path), project_index.GitProject(root, tmp_path)):
        assert not [file.path for file in reader.look().files if "private" in file.path]
    index = project_index.ProjectIndex(root, tmp_path)
    if name != "no objects":  # what was read before that stays true
        index.look()
    DAMAGED[name](repository)
    for reader in (index, project_index.ProjectIndex(root, tmp_path), project_index.GitProject(root, tmp_path)):
        with pytest.raises(GitError, match=r"git: (fatal|error): ") as caught:
            reader.look()
        assert str(tmp_path) not in str(caught.value) and "/nonexistent" not in str(caught.value)


def unknown_extensions(root: Path, *names: str) -> None:
    with (root / ".git/config").open("a") as file:
        file.write("[core]\n\trepositoryFormatVersion = 1\n[extensions]\n")
        file.writelines(f"\t{name} = true\n" for name in names)


def another_owner(root: Path) -> None:
    """As if the repository were another user's."""
    cco_sidecar.GIT_ENVIRONMENT["GIT_TEST_ASSUME_DIFFERENT_OWNER"] = "1"


LONG_REASONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another owner": (
        another_owner,
        r"detected dubious ownership in repository at 'repository' .*git config --global --add safe\.directory {root}",
    ),
    "unknown extensions": (
        lambda root: unknown_extensions(root, "later", "tomorrow"),
        "unknown repository extensions found: later tomorrow",
    ),
    "an extension of a later version": (
        lambda root: git(root, "config", "extensions.objectFormat", "sha1"),
        "v1-only extensions? found: .*objectformat",
    ),
    "the index": (lambda root: (root / ".git/index").write_bytes(bytes(400)), "bad signature .*index file corrupt"),
}


@pytest.mark.parametrize("name", LONG_REASONS)
def test_a_reason_of_git_with_several_lines_is_said_whole_in_one(
    home: Path, readers: tuple[Any, Any], repository: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(cco_sidecar, "GIT_ENVIRONMENT", dict(cco_sidecar.GIT_ENVIRONMENT))
    damage, reason = LONG_REASONS[name]
    damage(repository)
    for reader in readers:
        with pytest.raises(GitError) as caught:
            reader.look()
        said = str(caught.value)
        assert re.fullmatch("git: (fatal|error): .*" + reason.format(root=re.escape(str(repository))), said), said


def test_what_the_log_an_answer_and_the_doctor_say_of_git_is_its_whole_reason(
    make_service: Callable[..., Service], repository: Path, tmp_path: Path
) -> None:
    unknown_extensions(repository, "later", "tomorrow")
    service, reason = make_service(), "git: fatal: unknown repository extensions found: later tomorrow"
    answer = service.client().get("/api/context/issue-1/python-specialist")
    assert (answer.status_code, answer.json()["code"]) == (500, "CTX_001")
    assert answer.json()["message"] == f"The project cannot be read: {reason}"
    assert f"the project cannot be read: {reason}\n" in service.log
    command = [sys.executable, str(MODULE), "doctor", "--root", str(repository), "--storage", str(tmp_path / "other")]
    told = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False)
    assert f"{reason}\n" in told.stdout, told


@pytest.fixture
def without_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services obey the rights of files, also root's."""
    command = Service.command.fget
    assert command
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    monkeypatch.setattr(Service, "command", property(lambda service: [*drop, *command(service)]))


@pytest.mark.usefixtures("without_rights")
@pytest.mark.parametrize("kind", ["unstaged", "staged", "a branch without commits"])
def test_while_a_file_cannot_be_read_the_lines_of_all_others_are_counted(
    make_service: Callable[..., Service], repository: Path, kind: str
) -> None:
    names = ["README.md", "src/main.py", "odd [*] name.py"]
    write(repository / names[2], "odd = 1\n")
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "An odd name")
    if kind == "a branch without commits":
        git(repository, "checkout", "-q", "--orphan", "fresh")
    closed = [repository / name for name in names[1:]]
    for name in names:
        with (repository / name).open("a") as file:
            file.write("# more\n")
        if kind == "staged":
            git(repository, "add", name)
    for path in closed:
        path.chmod(0)
    client = make_service().client()

    def counted() -> dict[str, str | None]:
        context = client.get("/api/context/issue-1/python-specialist").json()["context"]
        changes = context["git_context"]["uncommitted_changes"]
        return {change["path"]: change["diff"] for change in changes if change["path"] in names}

    def more(found: dict[str, str | None]) -> int:
        """How many lines README.md has more."""
        return int((found["README.md"] or "+0").split()[0])

    lines = more(counted())
    assert lines >= 1 and counted() == {names[0]: f"+{lines} -0", names[1]: None, names[2]: None}
    with (repository / names[0]).open("a") as file:  # another one is edited, then a closed one
        file.write("# and more\n")
    until(lambda: counted() == {names[0]: f"+{lines + 1} -0", names[1]: None, names[2]: None})
    closed[0].chmod(0o644)
    until(lambda: (counted()[names[1]] or "").endswith(" -0"))
    write(closed[0], "closed = 2\n")
    closed[0].chmod(0)
    until(lambda: counted() == {names[0]: f"+{lines + 1} -0", names[1]: None, names[2]: None})
    for path in closed:
        path.chmod(0o644)
    until(lambda: None not in counted().values())


def test_lines_that_git_cannot_count_are_asked_for_once(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(repository / "src/main.py", "staged = 1\n")
    git(repository, "add", "src/main.py")
    object_of(repository, "HEAD:src/main.py").unlink()
    asked, ask = [], git_facts.ask_git
    monkeypatch.setattr(git_facts, "ask_git", lambda *words, **named: asked.append(words[1]) or ask(*words, **named))
    _, codes = git_facts.read_status(repository, "")
    assert codes == [("M ", "src/main.py")] and asked == ["status"]
    assert git_facts.line_counts(repository, codes) == {} and asked == ["status", "diff"]


@pytest.mark.parametrize(("late", "asked_in_all"), [(False, 2), (True, 1)])
def test_lines_that_git_took_too_long_to_count_are_not_asked_for_without_what_cannot_be_read(
    repository: Path, monkeypatch: pytest.MonkeyPatch, late: bool, asked_in_all: int
) -> None:
    """Git's own time is made to be over at once; that a file cannot be read is made up, too."""
    write(repository / "src/main.py", "changed = 1\n")
    asked, communicate = [], cco_sidecar.Git.communicate

    def wait(child: cco_sidecar.Git, **how: Any) -> Any:
        if "diff" not in child.args:
            return communicate(child, **how)
        asked.append(child.args)
        if late:
            raise subprocess.TimeoutExpired(child.args, 30)
        output, errors = communicate(child, **how)
        child.returncode = child.returncode or 128
        return output, errors

    monkeypatch.setattr(git_facts, "is_closed", lambda path: True)
    monkeypatch.setattr(cco_sidecar.Git, "communicate", wait)
    assert git_facts.line_counts(repository, [(" M", "src/main.py")]) == {} and len(asked) == asked_in_all


@pytest.mark.usefixtures("without_rights")
@pytest.mark.parametrize("when", ["from the start", "later"])
def test_a_git_folder_that_cannot_be_read_is_named(
    make_service: Callable[..., Service], repository: Path, when: str
) -> None:
    folder = repository / ".git"
    try:
        if when == "from the start":
            folder.chmod(0)
        client = make_service().client()
        if when == "later":
            assert client.get("/api/context/issue-1/python-specialist").status_code == 200
            folder.chmod(0)
        until(lambda: client.get("/api/context/issue-1/python-specialist").status_code == 500)
        answer = client.get("/api/context/issue-1/python-specialist")
    finally:
        folder.chmod(0o755)
    reason = "git's folder .git cannot be read: Permission denied"
    assert answer.json()["message"] == f"The project cannot be read: {reason}"
    until(lambda: client.get("/api/context/issue-1/python-specialist").status_code == 200)


def test_a_reason_of_git_is_redacted_and_bounded_and_no_manual(home: Path, repository: Path) -> None:
    with pytest.raises(GitError, match=r"^git: error: unknown option `no-such-option'$"):
        cco_sidecar.ask_git(repository, "config", "--no-such-option")
    secret = "AKIA" + "QWERTYUIOPASDFGH"
    with pytest.raises(GitError, match=r"^git: fatal: .*\[REDACTED\]") as caught:
        cco_sidecar.ask_git(repository, "log", secret)
    assert secret not in str(caught.value)
    unknown_extensions(repository, *(f"later{number}" for number in range(200)))
    with pytest.raises(GitError, match="later0 later1 later2 ") as caught:
        cco_sidecar.ask_git(repository, "log")
    assert len(str(caught.value)) <= 500


def test_a_linked_work_tree_is_read_again_where_its_own_table_of_references_changes(
    home: Path, repository: Path, tmp_path: Path
) -> None:
    """Where references are in tables, the branch that a linked work tree is on stands in a table of its own."""
    linked = tmp_path / "linked"
    git(repository, "worktree", "add", "-q", "-b", "other", str(linked))
    own = repository / ".git/worktrees/linked"
    index = project_index.ProjectIndex(linked, tmp_path)
    (linked / "src/main.py").write_text("changed\n")
    assert index.look().git.branch == "other"
    for place in (own, repository / ".git"):
        before = index.look().proof
        (place / "reftable").mkdir()
        (place / "reftable/tables.list").write_text("0x1-0x1.ref\n")
        after = index.look().proof
        assert [path for path in after if after[path] != before.get(path) and path.endswith("tables.list")] == [
            str(place / "reftable/tables.list")
        ]


NO_REMOTE: dict[str, Callable[[Path], Any]] = {
    "no remote": lambda root: None,
    "changes": lambda root: ((root / "src/main.py").write_text("changed\n"), (root / "new.py").write_text("new\n")),
    "staged changes": lambda root: ((root / "new.py").write_text("new\n"), git(root, "add", ".")),
    "another branch": lambda root: git(root, "checkout", "-q", "-b", "other"),
    "no branch": lambda root: git(root, "checkout", "-q", "--detach"),
}


@pytest.mark.parametrize("name", NO_REMOTE)
def test_no_question_to_git_fails_in_an_ordinary_repository_without_a_remote(
    home: Path, readers: tuple[Any, Any], repository: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    git(repository, "remote", "remove", "origin")
    NO_REMOTE[name](repository)
    ask, failed = cco_sidecar.git_output, list[Any]()

    def ask_and_note(command: list[str], environ: dict[str, str]) -> bytes:
        try:
            return ask(command, environ)
        except GitError as error:
            failed.append((command, error))
            raise

    monkeypatch.setattr(cco_sidecar, "git_output", ask_and_note)
    for reader in readers:
        git_state = reader.look().git
        assert git_state.recent_commits and (git_state.remote, git_state.remote_url) == (None, None)
    assert not failed


@pytest.mark.parametrize(
    ("attributes", "configured"),
    [
        ("*.py filter=lfs", '[filter "lfs"]\n\tprocess = no-git-lfs filter-process\n\trequired = true\n'),
        ("*.py filter=late", '[filter "late"]\n\tprocess = sleep 0.2\n\trequired = true\n'),
        ("*.py filter=talks", '[filter "talks"]\n\tprocess = echo hello\n\trequired = true\n'),
        ("*.py filter=crypt", '[filter "crypt"]\n\tclean = no-git-crypt clean\n\trequired = true\n'),
        ("*.py filter=odd.name", '[filter "odd.name"]\n\tclean = false\n\trequired = true\n'),
    ],
)
def test_a_filter_of_the_user_that_fails_leaves_all_that_git_knows_without_it(
    home: Path, readers: tuple[Any, Any], repository: Path, attributes: str, configured: str
) -> None:
    (repository / ".gitattributes").write_text(attributes + "\n")
    (home / ".gitconfig").write_text(configured)
    (repository / "src/main.py").write_text("changed\n")
    (repository / "noise.log").write_text("ignored")
    for reader in readers:
        state = reader.look()
        assert "noise.log" not in [file.path for file in state.files] and state.git.branch == "main"
        assert [(change.path, change.diff) for change in state.git.uncommitted_changes] == [
            ("src/main.py", "+1 -2"),
            (".gitattributes", None),
        ]


@pytest.mark.parametrize(
    "variables", [{"GIT_CONFIG_PARAMETERS": "garbage"}, {"GIT_CEILING_DIRECTORIES": "::/:"}], ids=str
)
def test_odd_variables_of_git_change_nothing(
    home: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    (repository / "noise.log").write_text("ignored")
    wanted = facts(project_index.GitProject(repository, tmp_path).look())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert facts(project_index.ProjectIndex(repository, tmp_path).look()) == wanted
    assert facts(project_index.GitProject(repository, tmp_path).look()) == wanted


def test_settings_that_the_environment_gives_to_git_hold(
    home: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rules").write_text("*.md\n")
    (repository / "new.md").write_text("ignored")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.excludesFile")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", str(tmp_path / "rules"))
    for reader in (project_index.ProjectIndex(repository, tmp_path), project_index.GitProject(repository, tmp_path)):
        assert "new.md" not in [file.path for file in reader.look().files]
    monkeypatch.setenv("GIT_CONFIG_COUNT", "abc")  # git then works nowhere
    for reader in (project_index.ProjectIndex(repository, tmp_path), project_index.GitProject(repository, tmp_path)):
        with pytest.raises(GitError, match="GIT_CONFIG_COUNT"):
            reader.look()


# each hides new/*.txt (named by the folder below home, or the repository), and is changed to hide nothing
RULES: dict[str, Callable[[Path, Path], Path]] = {
    "git's own ignore file": lambda home, root: write(home / ".config/git/ignore", "*.txt\n"),
    "a configured ignore file": lambda home, root: (
        write(home / ".gitconfig", "[core]\n\texcludesFile = ~/mine\n"),
        write(home / "mine", "*.txt\n"),
    )[1],
    "a relative one of the repository": lambda home, root: (
        git(root, "config", "core.excludesFile", "rules/ours"),
        write(root / "rules/ours", "*.txt\n"),
    )[1],
    "an included configuration": lambda home, root: (
        write(home / "rules", "*.txt\n"),
        write(home / ".gitconfig", "[include]\n\tpath = more/config\n"),
        write(home / "more/config", "[core]\n\texcludesFile = ~/rules\n"),
    )[2],
    "an included configuration of an included one": lambda home, root: (
        write(home / "rules", "*.txt\n"),
        git(root, "config", "include.path", "../one.inc"),
        write(root / "one.inc", "[include]\n\tpath = two.inc\n"),
        git(root, "add", "one.inc"),
        write(root / "two.inc", "[core]\n\texcludesFile = ~/rules\n"),
        git(root, "add", "two.inc"),
    )[4],
    "a configuration under a condition": lambda home, root: (
        write(home / "rules", "*.txt\n"),
        write(home / ".gitconfig", f'[includeIf "gitdir:{root}/"]\n\tpath = {home}/conditional\n'),
        write(home / "conditional", "[core]\n\texcludesFile = ~/rules\n"),
    )[2],
    "a rule through links": lambda home, root: (
        write(home / "dotfiles/ignore", "*.txt\n"),
        (home / ".config/git").mkdir(parents=True),
        (home / "second").symlink_to("dotfiles/ignore"),
        (home / ".config/git/ignore").symlink_to("../../second"),
    )[0],
    "a rule above the root": lambda home, root: write(root / ".gitignore", "*.txt\n"),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_of_every_place_show_at_the_next_look(home: Path, tmp_path: Path, name: str) -> None:
    top = make_repository(tmp_path / "repository")
    write(top / "deep/er/new.txt", "new\n")
    rule = RULES[name](home, top)
    for root in (top, top / "deep/er"):
        index, own = project_index.ProjectIndex(root, tmp_path), project_index.GitProject(root, tmp_path)
        hides = rule.read_text()
        for content, shown in ((hides, False), ("", True), (hides, False), (None, True), (hides, False)):
            if content is None:
                rule.unlink()
            else:
                rule.write_text(content)
            until(lambda index=index: index.look().digest == index.look().digest)
            state = index.look()
            assert facts(state) == facts(own.look())
            assert any(file.path.endswith("new.txt") for file in state.files) is shown


@pytest.mark.parametrize("name", ["a\nb", "a\n", "\n", "sp\u00e4\tce \U0001f600"])
def test_the_path_of_a_repository_may_hold_anything(home: Path, tmp_path: Path, name: str) -> None:
    root = make_repository(tmp_path / "x" / name / "in\nner")
    git(root, "worktree", "add", "-q", "-b", "side", str(root.parent / "si\nde"))
    for place, branch in ((root, "main"), (root.parent / "si\nde", "side")):
        index, own = project_index.ProjectIndex(place, tmp_path), project_index.GitProject(place, tmp_path)
        assert index.look().git.branch == branch and index._state
        for number in range(3):
            write(place / "src/main.py", f"number = {number}\n")
            git(place, "commit", "-q", "-a", "-m", f"Number {number}")
            assert index.look().git.recent_commits[0].message == f"Number {number}"
            assert facts(index.look()) == facts(own.look())


CLONES = {
    "shallow": (["--depth=2"], [0, 1]),
    "shallow and without trees": (["--depth=2", "--filter=tree:0"], None),
    "without trees": (["--filter=tree:0"], None),
    "without blobs": (["--filter=blob:none"], [8, 1, 1, 1]),
    "whole": ([], [8, 1, 1, 1]),
}


@pytest.mark.parametrize("name", CLONES)
def test_a_clone_tells_its_commits_and_only_changes_that_it_knows(
    home: Path, repository: Path, tmp_path: Path, name: str
) -> None:
    for number in range(2):
        write(repository / "src/main.py", f"number = {number}\n")
        git(repository, "commit", "-q", "-a", "-m", f"Number {number}")
    git(repository, "config", "uploadpack.allowFilter", "true")
    flags, numbers = CLONES[name]
    root = tmp_path / "clone"
    git(tmp_path, "clone", "-q", *flags, f"file://{repository}", str(root))
    for reader in (project_index.ProjectIndex(root, tmp_path), project_index.GitProject(root, tmp_path)):
        commits = reader.look().git.recent_commits
        messages = ["Number 1", "Number 0", "Greet politely", "Initial commit"]
        assert [commit.message for commit in commits] == messages[: 2 if "shallow" in name else 4]
        found = [len(commit.files_changed) for commit in commits]
        assert found == numbers[::-1] if numbers else max(found) <= 1


def merge_and_lose(root: Path) -> None:
    git(root, "checkout", "-q", "-b", "side", "HEAD~2")
    git(root, "commit", "-q", "--allow-empty", "-m", "Aside")
    git(root, "checkout", "-q", "main")
    git(root, "merge", "-q", "-m", "Join", "side")
    object_of(root, "side").unlink()


def empty_object(root: Path) -> None:
    object_of(root, "HEAD~1").chmod(0o600)
    object_of(root, "HEAD~1").write_bytes(b"")


def detach_and_lose(root: Path) -> None:
    git(root, "checkout", "-q", "--detach", "HEAD~1")
    object_of(root, "HEAD~1").unlink()


LOST: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "the parent of HEAD": (lambda root: object_of(root, "HEAD~1").unlink(), ["Number 1"]),
    "an older one": (lambda root: object_of(root, "HEAD~2").unlink(), ["Number 1", "Number 0"]),
    "the first": (lambda root: object_of(root, "HEAD~3").unlink(), ["Number 1", "Number 0", "Greet politely"]),
    "that of a detached HEAD": (detach_and_lose, ["Number 0"]),
    "an object's content": (empty_object, ["Number 1"]),
    "a side of a merge": (merge_and_lose, ["Join", "Number 1", "Number 0", "Greet politely", "Initial commit"]),
    "a shallow clone's list": (lambda root: (root / ".git/shallow").unlink(), ["Number 1", "Number 0"]),
}


@pytest.mark.parametrize("name", LOST)
def test_where_a_parent_is_missing_the_commits_that_can_be_read_are_given(
    home: Path, repository: Path, tmp_path: Path, name: str
) -> None:
    for number in range(2):
        write(repository / "src/main.py", f"number = {number}\n")
        git(repository, "commit", "-q", "-a", "-m", f"Number {number}")
    root, (lose, messages) = repository, LOST[name]
    if "clone" in name:
        root = tmp_path / "clone"
        git(tmp_path, "clone", "-q", "--depth=2", f"file://{repository}", str(root))
    lose(root)
    for reader in (project_index.ProjectIndex(root, tmp_path), project_index.GitProject(root, tmp_path)):
        found = reader.look().git
        assert [commit.message for commit in found.recent_commits] == messages
        assert found.recent_commits[-1].files_changed == [] or name == "a side of a merge"
        assert found.branch == (None if "detached" in name else "main")


OTHER_HISTORY: dict[str, list[Callable[[Path], object]]] = {
    "a replaced commit": [lambda root: git(root, "replace", "HEAD", "HEAD~1"), lambda root: git(root, "replace", "-d", "HEAD")],
    "a replacement that is packed": [
        lambda root: git(root, "replace", "HEAD", "HEAD~1"),
        lambda root: git(root, "pack-refs", "--all"),
        lambda root: git(root, "replace", "-d", "HEAD"),
    ],
    "a second replacement": [
        lambda root: git(root, "replace", "HEAD~1", "HEAD~2"),
        lambda root: git(root, "replace", "HEAD", "HEAD~2"),
    ],
    "a graft": [
        lambda root: write(root / ".git/info/grafts", git(root, "rev-parse", "HEAD")),
        lambda root: (root / ".git/info/grafts").unlink(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_HISTORY)
def test_commits_that_git_is_told_to_see_otherwise_show_at_the_next_look(
    home: Path, repository: Path, readers: tuple[Any, Any], name: str
) -> None:
    git(repository, "commit", "-q", "--allow-empty", "-m", "Nothing")
    index, own = readers
    seen = [index.look().git.recent_commits]
    for change in OTHER_HISTORY[name]:
        until(lambda: index.look().digest == index.look().digest)
        change(repository)
        seen.append(index.look().git.recent_commits)
        assert seen[-1] == own.look().git.recent_commits
    assert seen[1] != seen[0]


def test_a_repository_of_sha256_counts_lines_from_its_beginning(home: Path, tmp_path: Path) -> None:
    root = tmp_path / "new"
    git(tmp_path, "init", "-q", "--object-format=sha256", "-b", "trunk", str(root))
    write(root / "one.py", "a\nb\n")
    git(root, "add", "-A")
    for commits in ([], ["First"]):
        for reader in (project_index.ProjectIndex(root, tmp_path), project_index.GitProject(root, tmp_path)):
            found = reader.look().git
            assert [commit.message for commit in found.recent_commits] == commits and found.branch == "trunk"
            assert [change.diff for change in found.uncommitted_changes] == ([] if commits else ["+2 -0"])
        if not commits:
            git(root, "commit", "-q", "-m", "First")


@pytest.mark.parametrize("inside", ["", "hooks", "objects", "refs/heads"])
@pytest.mark.parametrize("kind", ["a bare repository", "a .git folder", "a .bare folder", "a linked worktree's"])
def test_gits_database_is_no_project(home: Path, repository: Path, tmp_path: Path, kind: str, inside: str) -> None:
    root = repository / ".git"
    if kind == "a bare repository":
        root = tmp_path / "server.git"
        git(tmp_path, "clone", "-q", "--bare", str(repository), str(root))
    elif kind == "a .bare folder":
        root = root.rename(repository / ".bare")
        (repository / ".git").write_text("gitdir: ./.bare\n")
        git(root, "config", "core.bare", "true")
    elif kind == "a linked worktree's":
        git(repository, "worktree", "add", "-q", str(tmp_path / "side"))
        root = root / "worktrees"
    (root / inside).mkdir(exist_ok=True, parents=True)
    for reader in (
        project_index.ProjectIndex(root / inside, tmp_path),
        project_index.GitProject(root / inside, tmp_path),
    ):
        assert reader.look().files == []


def test_a_folder_of_worktrees_is_served_without_the_database_beside_them(
    home: Path, repository: Path, tmp_path: Path
) -> None:
    root = tmp_path / "project"
    git(tmp_path, "clone", "-q", "--bare", str(repository), str(root / ".bare"))
    git(tmp_path, "clone", "-q", "--bare", str(repository), str(root / "mirrors/other.git"))
    for pointed in (False, True):
        if pointed:
            (root / ".git").write_text("gitdir: ./.bare\n")
            git(root, "worktree", "add", "-q", "main")
        write(root / "notes.md", "ours\n")
        for reader in (project_index.ProjectIndex(root, tmp_path), project_index.GitProject(root, tmp_path)):
            assert [file.path for file in reader.look().files] == ["notes.md"]


def test_a_repository_around_ours_counts_as_soon_as_ours_is_none_and_no_longer(home: Path, tmp_path: Path) -> None:
    root = make_repository(tmp_path / "outer/inner")
    index, own = project_index.ProjectIndex(root, tmp_path), project_index.GitProject(root, tmp_path)
    branches = []
    for change in (
        lambda: None,
        lambda: git(root.parent, "init", "-q", "-b", "around"),
        lambda: (root / ".git/HEAD").rename(tmp_path / "HEAD"),
        lambda: (tmp_path / "HEAD").rename(root / ".git/HEAD"),
    ):
        change()
        assert facts(index.look()) == facts(own.look())
        branches.append(index.look().git.branch)
    assert branches == ["main", "main", "around", "main"]


def test_an_empty_folder_called_git_is_no_repository(home: Path, tmp_path: Path) -> None:
    root = tmp_path / "plain"
    (root / ".git").mkdir(parents=True)
    write(root / "app.py", "x = 1\n")
    for reader in (project_index.ProjectIndex(root, tmp_path), project_index.GitProject(root, tmp_path)):
        assert [file.path for file in reader.look().files] == ["app.py"]


def test_the_digest_of_a_state_is_the_same_for_the_same_state_alone(readers: tuple[Any, Any], repository: Path) -> None:
    for reader in readers:
        until(lambda reader=reader: reader.look().digest == reader.look().digest)  # no file is so young any more
        before = reader.look().digest
        (repository / "src/main.py").write_text(f"by = {type(reader).__name__!r}\n")
        assert reader.look().digest != before


@pytest.mark.parametrize(
    "judge",
    [
        cco_sidecar.language_of, cco_sidecar.kind_of, cco_sidecar.is_secret, plugin("_kinds").kind_of,
        plugin("_withheld").is_secret,
    ],
)  # fmt: skip
def test_what_the_paths_of_a_large_project_say_is_found_out_once(judge: Any) -> None:
    judge.cache_clear()
    for _ in range(2):  # in order, as contexts do
        for number in range(150_000):
            judge(f"src/module{number}.py")
    assert judge.cache_info().misses == 150_000
    judge.cache_clear()


@pytest.mark.parametrize(
    ("moment", "young"),
    [
        (-1_000_000_123, False),
        (-20_000_001, False),
        (-5_000_001, True),
        (0, True),
        (5_000_001, True),
        (60_000_000_001, False),
    ],
)
def test_a_fingerprint_is_young_while_a_second_change_could_look_the_same(moment: int, young: bool) -> None:
    now = 1_700_000_000_500_000_000
    assert is_young((now + moment, now + moment, 1, 1, 1, 1), now) is young
    assert is_young(None, now) is False


def test_whole_seconds_are_young_for_longer() -> None:
    now = 1_700_000_000_500_000_000
    assert is_young((0, 1_699_999_999_000_000_000, 1, 1, 1, 1), now) is True
    assert is_young((0, 1_699_999_998_000_000_000, 1, 1, 1, 1), now) is False


@pytest.mark.parametrize("case", ["nothing committed", "nothing but an index", "a commit", "its object is lost"])
def test_a_history_that_is_cut_is_told_and_one_that_has_not_begun_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("a = 1\n")
    if case != "nothing committed":
        git(tmp_path, "add", ".")
    if case in ("a commit", "its object is lost"):
        git(tmp_path, "commit", "-q", "-m", "first")
    if case == "its object is lost":
        head = git(tmp_path, "rev-parse", "HEAD").strip()
        (tmp_path / ".git/objects" / head[:2] / head[2:]).unlink()
    cco_sidecar.log_once.cache_clear()
    found, complete = git_facts.git_log(tmp_path, "-n", "5")
    assert len(found) == (case == "a commit") and complete is (case == "a commit")
    assert ("not known in full" in caplog.text) is (case == "its object is lost")


REPOSITORIES: dict[str, tuple[str, tuple[str, ...]]] = {  # where one comes, and what git is told
    "in the folder": ("above/folder", ("init", "-q")),
    "above the folder": ("above", ("init", "-q")),
    "with its database elsewhere": ("above/folder", ("init", "-q", "--separate-git-dir=../../elsewhere")),
    "around the folder, without a work tree": ("above", ("init", "-q", "--bare")),
}


@pytest.mark.parametrize("where", REPOSITORIES)
def test_a_folder_without_git_is_listed_by_one_call_and_a_repository_that_comes_shows_at_the_next_look(
    home: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = outside_repositories(tmp_path) / "above/folder"
    root.mkdir(parents=True)
    (root / ".gitignore").write_text("*.log\n")
    (root / "main.py").write_text("x = 1\n")
    (root / "main.log").write_text("ignored\n")
    (scratch := tmp_path / "scratch").mkdir()
    readers = project_index.ProjectIndex(root, scratch), project_index.GitProject(root, scratch)
    asked: list[str] = []
    git_output = cco_sidecar.git_output
    monkeypatch.setattr(
        cco_sidecar, "git_output", lambda words, env: asked.append(str(words)) or git_output(words, env)
    )
    for reader in readers:
        reader.look()
        asked.clear()
        assert [file.path for file in reader.look().files] == [".gitignore", "main.py"]
        assert len(asked) == 1 and "ls-files" in asked[0]
    place, words = REPOSITORIES[where]
    git(tmp_path / place, *words)
    is_bare = "--bare" in words
    for reader in readers:
        state = reader.look()
        assert [file.path for file in state.files] == ([] if is_bare else [".gitignore", "main.py"])
        assert (state.git.branch is None) is is_bare
    shutil.rmtree(tmp_path / place / ".git", ignore_errors=True)
    (tmp_path / place / ".git").unlink(missing_ok=True)
    (tmp_path / place / "HEAD").unlink(missing_ok=True)
    for reader in readers:
        assert [file.path for file in reader.look().files] == [".gitignore", "main.py"]


@pytest.mark.parametrize(
    "name",
    [".git/HEAD", ".git/config", ".git/index", ".git/packed-refs", ".git/info/exclude", ".gitignore",
     "src/.gitignore", ".git/refs/heads/main",],
)  # fmt: skip
def test_a_pipe_that_would_hold_git_is_named_and_the_project_is_read_once_it_is_gone(
    readers: tuple[Any, Any], repository: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, place, kept = readers[0], repository / name, repository.parent / "kept"
    monkeypatch.setattr(index, "PATIENCE", 0.0)  # so that pipes are looked for before git comes to them too
    (repository / "src/.gitignore").write_text("ignored.py\n")

    async def scene() -> None:
        before = await index.state()
        if os.path.lexists(place):
            place.rename(kept)
        os.mkfifo(place)
        for _ in range(2):
            with pytest.raises(GitError, match=f"a writer to the named pipe {re.escape(name)}: remove it"):
                await index.state()
        place.unlink()
        if os.path.lexists(kept):
            kept.rename(place)
        assert facts(await index.state()) == facts(before)

    asyncio.run(scene())


@pytest.mark.parametrize("name", [".git/tool.pipe", "src/.gitignore", "src/pipe"])
def test_a_look_that_takes_long_is_watched_once_for_all_and_a_pipe_that_holds_nobody_is_no_fault(
    readers: tuple[Any, Any], repository: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, look, searches = readers[0], readers[0].look, list[Any]()  # those who come during a look share the next one
    pipes, searched = index._pipes, threading.Event()

    def slow_look() -> Any:
        assert searched.wait(30)
        (repository / name).unlink(missing_ok=True)
        return look()

    def search(*also: Any) -> None:
        searches.append(also)
        try:
            type(pipes).search(pipes, *also)
        finally:
            searched.set()

    monkeypatch.setattr(index, "PATIENCE", 0.01)
    monkeypatch.setattr(index, "look", slow_look)
    monkeypatch.setattr(pipes, "search", search)

    async def scene() -> list[Any]:
        return await asyncio.gather(*(index.state() for _ in range(20)))

    os.mkfifo(repository / name)
    assert facts(asyncio.run(scene())[0]) == facts(readers[1].look()) and 0 < len(searches) <= 2

"""The plugin project_index: what it remembers is what the module's own reader finds anew, whatever happens to the
repository.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import git, plugin, until

from cco_sidecar import Project, ProjectState, is_young

project_index = plugin("project_index")


@pytest.fixture
def readers(repository: Path, tmp_path: Path) -> Iterator[tuple[Any, Project]]:
    """(the plugin's reader, the module's own)."""
    index = project_index.ProjectIndex(repository, tmp_path)
    own = Project(repository, tmp_path)
    yield index, own
    index.close()
    own.close()


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


def test_what_is_remembered_is_what_a_new_look_finds(readers: tuple[Any, Project], repository: Path) -> None:
    index, own = readers
    assert facts(index.look()) == facts(own.look())
    for name, change in CHANGES.items():
        change(repository)
        assert facts(index.look()) == facts(own.look()), name


def test_the_digest_of_a_state_is_the_same_for_the_same_state_alone(
    readers: tuple[Any, Project], repository: Path
) -> None:
    for reader in readers:
        until(lambda reader=reader: reader.look().digest == reader.look().digest)  # no file is so young any more
        before = reader.look().digest
        (repository / "src/main.py").write_text(f"by = {type(reader).__name__!r}\n")
        assert reader.look().digest != before


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
    assert is_young((now + moment, now + moment, 1, 1, 1), now) is young
    assert is_young(None, now) is False


def test_whole_seconds_are_young_for_longer() -> None:
    now = 1_700_000_000_500_000_000
    assert is_young((0, 1_699_999_999_000_000_000, 1, 1, 1), now) is True
    assert is_young((0, 1_699_999_998_000_000_000, 1, 1, 1), now) is False

"""The watcher of the plugin project_index: what no event names is as it was, and what makes no event is found."""

from __future__ import annotations

import asyncio
import mmap
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import git, plugin, until, write

from cco_sidecar import ProjectState

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux'")
project_index = plugin("project_index")
inotify: Any = plugin("_inotify") if sys.platform == "linux" else None


@pytest.fixture
def readers(repository: Path, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """(the plugin's reader, which watches, the module's own)."""
    index = project_index.ProjectIndex(repository, tmp_path)
    index.start(lambda: None)
    yield index, project_index.GitProject(repository, tmp_path)
    index.close()


def facts(state: ProjectState) -> tuple[Any, ...]:
    """What readers get. The index tells the time of a file that has changed and kept it by some nanoseconds less."""
    files = [(file.path, file.size, round(file.mtime_ns, -6)) for file in state.files]
    return state.root, files, state.git, state.head


def now(index: Any) -> ProjectState:
    """As a request gets it."""
    found: ProjectState = index._known_now() or index.look()
    return found


def proven(index: Any) -> ProjectState:
    """A state that events alone prove."""
    found: ProjectState = until(lambda: index.look() and index._known_now())
    return found


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_what_lies_in_a_folder_whose_rights_change_is_looked_at_and_what_lies_elsewhere_is_not_read_again(
    readers: tuple[Any, Any], repository: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    index, own = readers
    folder, looked, look = repository / "src", list[str](), project_index.fingerprint
    monkeypatch.setattr(project_index, "fingerprint", lambda path: looked.append(path) or look(path))
    try:
        for rights in (mode, 0o755):
            proven(index)
            looked.clear()
            folder.chmod(rights)
            until(lambda: now(index) and str(folder / "main.py") in looked)
            assert facts(now(index)) == facts(own.look())
        proven(index)
        looked.clear()
        write(repository / "docs/guide.md", "An edit\n")
        until(lambda: now(index) and str(repository / "docs/guide.md") in looked)
        assert str(folder / "main.py") not in looked
    finally:
        folder.chmod(0o755)


def test_requests_of_one_turn_share_a_proof_and_those_of_the_next_one_do_not(
    readers: tuple[Any, Any], repository: Path
) -> None:
    index, _ = readers
    before, turns = proven(index), plugin("_turn")

    async def states() -> tuple[ProjectState, ProjectState, ProjectState]:
        with turns.Turn():  # both had been sent before what follows
            first = await index.state()
            write(repository / "src/new.py", "new = 1\n")
            task, second = asyncio.create_task(index.state()), await index.state()
        return first, second, await task  # which begins after the turn that it was made in

    first, second, third = asyncio.run(states())
    assert first is second is before
    assert any(file.path == "src/new.py" for file in third.files)


def write_through_mapping(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[0:3] = b"DEF"


def exchange(one: Path, other: Path) -> None:
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


def ignored(root: Path, rule: str) -> None:
    write(root / ".gitignore", rule)


def many(root: Path) -> None:
    for number in range(1000):
        write(root / f"many/{number % 20}/{number}.py", f"number = {number}\n")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "Many")


CHANGES: dict[str, Callable[[Path], Any]] = {
    "an edit": lambda root: write(root / "src/main.py", "def main():\n    return 'edited'\n"),
    "an edit of the same length": lambda root: write(root / "src/main.py", "def main():\n    return 'EDITED'\n"),
    "an append": lambda root: (root / "src/main.py").open("a").write("more = 1\n"),
    "a write through a mapping": lambda root: write_through_mapping(root / "src/main.py"),
    "a truncation": lambda root: os.truncate(root / "src/main.py", 3),
    "an older time": lambda root: os.utime(root / "src/main.py", (1, 1)),
    "a mode": lambda root: (root / "src/main.py").chmod(0o755),
    "a file saved as editors do": lambda root: write(root / "src/.main.py~", "saved = 1\n").replace(root / "src/main.py"),
    "nested folders at once": lambda root: [write(root / f"a/b/c/d{n}/e/f.py", "deep = 1\n") for n in range(5)],
    "a file in a new folder": lambda root: write(root / "a/b/c/d3/e/f.py", "deep = 22\n"),
    "another file in a new folder": lambda root: write(root / "a/b/c/d3/e/g.py", "deep = 22\n"),
    "a folder renamed": lambda root: (root / "a/b").rename(root / "a/z"),
    "a file in a renamed folder": lambda root: write(root / "a/z/c/d3/e/f.py", "deep = 333\n"),
    "a folder below a renamed one renamed": lambda root: (root / "a/z/c/d3").rename(root / "a/z/c/d9"),
    "a file in that": lambda root: write(root / "a/z/c/d9/e/f.py", "deep = 4444\n"),
    "folders like each other": lambda root: [write(root / f"{n}/same.py", f"n = '{n}'\n") for n in ("p", "q")],
    "all committed": lambda root: (git(root, "add", "-A"), git(root, "commit", "-q", "-m", "All")),
    "folders exchanged": lambda root: exchange(root / "p", root / "q"),
    "a file in an exchanged folder": lambda root: write(root / "p/same.py", "n = 'P'\n"),
    "a folder moved out": lambda root: (root / "q").rename(root.parent / "q"),
    "a file in it there": lambda root: write(root.parent / "q/same.py", "n = 'Q'\n"),
    "the folder moved in": lambda root: (root.parent / "q").rename(root / "q"),
    "a folder deleted and made": lambda root: (shutil.rmtree(root / "q"), write(root / "q/same.py", "n = '9'\n")),
    "a link": lambda root: (root / "link").symlink_to("src"),
    "another link in its place": lambda root: ((root / "link").unlink(), (root / "link").symlink_to("a")),
    "a hard link": lambda root: (root / "hard.py").hardlink_to(root / "src/main.py"),
    "a write through a hard link": lambda root: write(root / "hard.py", "hard = 1\n"),
    "a new hard link and a write through it": lambda root: (
        (root / "new.py").hardlink_to(root / "src/greeting.py"), write(root / "new.py", "hard = 22\n"),
    ),
    "a file replaced by a hard link and a write through it": lambda root: (
        (root / "other.py").hardlink_to(root / "tests/test_main.py"), (root / "other.py").replace(root / "hard.py"),
        write(root / "hard.py", "hard = 333\n"),
    ),
    "an ignore rule": lambda root: ignored(root, "a/\n"),
    "a file in an ignored folder": lambda root: write(root / "a/z/new.py", "new = 1\n"),
    "a rule less": lambda root: ignored(root, "\n"),
    "a file that was ignored": lambda root: write(root / "a/z/new.py", "new = 22\n"),
    "an ignore rule below": lambda root: write(root / "a/z/.gitignore", "*.py\n"),
    "an ignored file that is tracked": lambda root: (git(root, "add", "-f", "a/z/new.py"), ignored(root, "a/\n")),
    "its edit": lambda root: write(root / "a/z/new.py", "new = 333\n"),
    "rules of the repository": lambda root: write(root / ".git/info/exclude", "hard.py\n"),
    "1,000 files": many,
    "a branch without them": lambda root: git(root, "checkout", "-q", "-f", "-b", "side", "HEAD~1"),
    "the branch with them": lambda root: git(root, "checkout", "-q", "-f", "main"),
    "an edit in a thousand": lambda root: write(root / "many/7/7.py", "number = 'seven'\n"),
    "a stash": lambda root: git(root, "stash", "-q", "-u"),
    "a commit elsewhere": lambda root: git(root, "commit", "-q", "--allow-empty", "-m", "Empty"),
    "a stash taken back": lambda root: git(root, "stash", "pop", "-q"),
    "a reset": lambda root: git(root, "reset", "-q", "--hard", "HEAD~1"),
    "a rebase": lambda root: (
        git(root, "checkout", "-q", "-f", "side"), write(root / "r.py", "r = 1\n"), git(root, "add", "r.py"),
        git(root, "commit", "-q", "-m", "R"), git(root, "rebase", "-q", "main"),
    ),
    "a branch deeper": lambda root: git(root, "checkout", "-q", "-b", "deep/er/branch"),
    "a commit on it": lambda root: git(root, "commit", "-q", "--allow-empty", "-m", "Deep"),
    "packed references": lambda root: git(root, "pack-refs", "--all"),
    "another commit on it": lambda root: git(root, "commit", "-q", "--allow-empty", "-m", "Deeper"),
    "the whole tree moved away and back": lambda root: exchange(root, Path(shutil.copytree(root, root.parent / "copy"))),
    "an edit in the copy": lambda root: write(root / "src/main.py", "copied = 1\n"),
    "no repository any more": lambda root: shutil.rmtree(root / ".git"),
    "a repository again": lambda root: git(root, "init", "-q"),
    "an edit at the end": lambda root: write(root / "src/main.py", "end = 1\n"),
}  # fmt: skip


def test_what_no_event_names_is_as_it_was(readers: tuple[Any, Any], repository: Path) -> None:
    index, own = readers
    assert facts(proven(index)) == facts(own.look())
    for name, change in CHANGES.items():
        change(repository)
        found, expected = facts(now(index)), facts(own.look())
        assert found == expected, name
        if name != "no repository any more":
            assert facts(proven(index)) == expected, name
            assert index._watcher.state == "full"


def test_changes_within_one_time_stamp_are_told_by_events_and_not_waited_out(
    readers: tuple[Any, Any], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, path = readers[0], repository / "src/main.py"
    before = {proven(index).digest}
    real, young = project_index.fingerprint, project_index.is_young

    def coarse(name: str) -> Any:
        return (7, 7, *real(name)[2:]) if name == str(path) else real(name)

    monkeypatch.setattr(project_index, "fingerprint", coarse)
    monkeypatch.setattr(project_index, "is_young", lambda facts, now: (facts and facts[0] == 7) or young(facts, now))
    for word in ("one", "two", "six"):
        write(path, word)
        state = index.look()
        assert index._known_now() is state and state.digest not in before
        before.add(state.digest)
    index.check()  # a write through a mapping makes no event
    assert index._known_now() is None and index.look().digest not in before


def test_the_event_of_a_change_is_there_before_the_change_is_over(tmp_path: Path) -> None:
    """What the proof stands on: a process on another processor changes a file and says so; the event is there."""
    kinds = """
def write(n): open(f"f{n % 3}", "a").write("x")
def rename(n): open("t", "w").close(); os.replace("t", "f0")
def mode(n): os.chmod("f0", 0o600 + n % 8)
def come_and_go(n): os.mkdir("d"); os.rmdir("d")
def link(n): os.symlink("x", "l"); os.unlink("l")
"""
    script = f"import os, sys\nos.chdir(sys.argv[1])\n{kinds}\nall = [write, rename, mode, come_and_go, link]\n"
    script += "for n, line in enumerate(sys.stdin.buffer): all[n % 5](n); os.write(1, b'!')"
    queue = inotify.new_queue()
    assert inotify.inotify_add_watch(queue, os.fsencode(tmp_path), inotify.MASK) > 0
    poll = select.poll()
    poll.register(queue, select.POLLIN)
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin and process.stdout
        for number in range(500):
            process.stdin.write(b"\n")
            assert process.stdout.read(1) == b"!"
            assert poll.poll(0), number
            while poll.poll(0):
                os.read(queue, 4096)
        process.stdin.close()
    os.close(queue)


def test_a_queue_that_overflows_has_everything_looked_at(readers: tuple[Any, Any], repository: Path) -> None:
    index, own = readers
    proven(index)
    with index._watcher._lock:  # so that nobody reads the queue
        for number in range(10_000):
            write(repository / f"f{number % 2}", "")
        (repository / "src/main.py").write_text("unheard = 1\n")
        (repository / "src").rename(repository / "source")
    assert index._known_now() is None
    assert facts(index.look()) == facts(own.look())
    write(repository / "source/main.py", "heard = 1\n")
    assert facts(now(index)) == facts(own.look()) == facts(proven(index))


PARTIAL: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "partial: more than 2 folders": lambda patch: patch.setattr(inotify, "folder_limit", lambda: 2),
    "partial: [Errno 28] no more folders can be watched": lambda patch: (
        patch.setattr(inotify, "inotify_add_watch", lambda *_: -1),
        patch.setattr(inotify.ctypes, "get_errno", lambda: 28),
    ),
    "partial: [Errno 24] no more inotify queues can be had": lambda patch: (
        patch.setattr(inotify, "inotify_init", lambda: -1),
        patch.setattr(inotify.ctypes, "get_errno", lambda: 24),
    ),
    "partial: not every change on nfs4 makes an event": lambda patch: patch.setattr(
        inotify, "mounts_of", lambda _: [("server:/x", "/", "nfs4")]
    ),
}


@pytest.mark.parametrize("state", PARTIAL)
def test_where_not_all_is_heard_of_everything_is_looked_at(
    repository: Path, tmp_path: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    PARTIAL[state](monkeypatch)
    index = project_index.ProjectIndex(repository, tmp_path)
    index.start(lambda: None)
    try:
        for number in range(3):
            until(lambda: index.look().digest == index.look().digest)
            assert index._known_now() is None
            write(repository / "src/main.py", f"number = {number}\n")
            assert facts(now(index)) == facts(project_index.GitProject(repository, tmp_path).look())
        assert index.watching == state
    finally:
        index.close()


def refuse(*_: Any) -> Any:
    raise OSError(24, "no more")


STOPPED: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "full": lambda patch: None,
    "partial: [Errno 24] no more inotify queues can be had": PARTIAL[
        "partial: [Errno 24] no more inotify queues can be had"
    ],
    "partial: [Errno 24] no more": lambda patch: patch.setattr(os, "pipe", refuse),
}


@pytest.mark.parametrize("state", STOPPED)
def test_a_watcher_that_is_stopped_twice_leaves_alone_what_others_have_opened_since(
    tmp_path: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = inotify.Inotify(tmp_path, lambda: None)
    with monkeypatch.context() as patch:
        STOPPED[state](patch)
        watcher.start()
    assert watcher.state == state
    watcher.stop()
    opened = [os.open(tmp_path / f"of others {number}", os.O_RDWR | os.O_CREAT) for number in range(4)]
    watcher.stop()
    assert watcher.state == "off"
    for handle in opened:
        assert os.fstat(handle).st_size == 0
        os.close(handle)


MOUNTS = [
    ("/dev/sda", "/", "ext4"), ("home", "/home", "nfs4"), ("/dev/sdb", "/home/me/work", "xfs"),
    ("overlay", "/home/me/work/tree/box", "overlay"), ("tmpfs", "/tmp", "tmpfs"), ("x", "/home/me/work/tree2", "9p"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("root", "kinds"),
    [
        ("/srv/tree", ["ext4"]),
        ("/home/me", ["nfs4", "xfs", "overlay", "9p"]),
        ("/home/me/work/tree", ["xfs", "overlay"]),
        ("/home/me/work/tree/box/inner", ["overlay"]),
        ("/tmp", ["tmpfs"]),
    ],
)
def test_the_file_systems_of_a_tree_are_those_above_and_below_it(
    root: str, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [SimpleNamespace(device=device, mountpoint=place, fstype=kind) for device, place, kind in MOUNTS]
    monkeypatch.setattr(inotify.psutil, "disk_partitions", lambda all: parts)
    assert [kind for _, _, kind in inotify.mounts_of(root)] == kinds


def test_a_link_on_the_way_to_what_git_reads_is_looked_at_each_time(
    readers: tuple[Any, Any], repository: Path, tmp_path: Path
) -> None:
    index, own = readers
    shutil.move(repository / ".git/info", tmp_path / "info")
    (repository / ".git/info").symlink_to(tmp_path / "info")
    write(repository / "new.py", "new = 1\n")
    proven(index)
    write(tmp_path / "info/exclude", "new.py\n")
    assert facts(now(index)) == facts(own.look())
    assert "new.py" not in [file.path for file in now(index).files]


def test_what_changes_without_an_event_is_found_in_the_background(
    readers: tuple[Any, Any], repository: Path, tmp_path: Path
) -> None:
    index, own = readers
    path = repository / "src/other.py"
    write(path, "other = 1\n")
    before = proven(index)
    (tmp_path / "outside.py").hardlink_to(repository / "src/main.py")
    write(tmp_path / "outside.py", "from = 'outside'\n")
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[0:5] = b"OTHER"
        index.check()
        assert index._known_now() is None and facts(index.look()) == facts(own.look())
        assert index.look().digest != before.digest
        assert index._known_now() is None  # not trusted for a while
    index._distrust = 0.0
    assert facts(proven(index)) == facts(own.look())
    write(tmp_path / "outside.py", "known = 'by now'\n")
    assert facts(now(index)) == facts(own.look())
    proven(index)
    (tmp_path / "outside.py").unlink()  # changes nothing but a ctime
    index.check()
    assert index._distrust == 0.0


def test_a_folder_that_cannot_be_watched_is_looked_at(
    readers: tuple[Any, Any], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = inotify.inotify_add_watch
    monkeypatch.setattr(
        inotify, "inotify_add_watch", lambda queue, path, mask: -1 if path.endswith(b"/src") else add(queue, path, mask)
    )
    index, own = readers
    proven(index)
    assert str(repository / "src/main.py") in index._watcher.apart
    write(repository / "src/main.py", "unwatched = 1\n")
    assert facts(now(index)) == facts(own.look())

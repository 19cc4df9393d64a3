"""Change a repository in every way, again and again: the context that is asked for right after a change shows it.

    python -m tests.freshness --changes 1000 [--no-watch]

Edits, also of the same size and time stamp or through a mapping, deletions, renames of files and folders, atomic saves,
modes, commits, checkouts, rebases, stashes, ignore rules, links and stored results, one to three at a time, at random.
The suite runs a short form of this.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import mmap
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import Client, Service, git, make_repository

MOST_FILES = 350  # that all are given: of larger trees a ranking names the first 400


class Changer:
    """Changes a repository at random, as people, editors, agents and git do."""

    def __init__(self, root: Path, client: Client, seed: int) -> None:
        self.root, self.client, self.random, self.number, self.stored = root, client, random.Random(seed), 0, 0
        self.done: collections.Counter[str] = collections.Counter()

    def change(self) -> str:
        """Do one of the changes; its name."""
        self.number += 1
        name = self.random.choice([name for name in dir(self) if name.startswith("do_")])
        with contextlib.suppress(subprocess.CalledProcessError):  # nothing to commit, nothing stashed, a conflict
            getattr(self, name)()
        self.done[name] += 1
        return name

    def some_file(self) -> Path:
        files = [
            path
            for path in sorted(self.root.glob("**/*.py"))
            if ".git" not in path.parts and path.is_file() and not path.is_symlink()
        ]
        return self.random.choice(files) if files else self.write(f"again{self.number}.py", "again = True\n")

    def write(self, name: str | Path, content: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def do_edit(self) -> None:
        self.write(self.some_file(), f"number = {self.number}\n")

    def do_same_size(self) -> None:
        path = self.some_file()
        self.write(path, path.read_bytes().swapcase())

    def do_same_size_and_time(self) -> None:
        path = self.some_file()
        before = path.stat()
        self.write(path, path.read_bytes().swapcase())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def do_append(self) -> None:
        with self.some_file().open("a") as file:
            file.write(f"more = {self.number}\n")

    def do_create(self) -> None:
        self.write(f"made{self.number}/new.py", "new = True\n")

    def do_delete(self) -> None:
        self.some_file().unlink()

    def do_rename(self) -> None:
        path = self.some_file()
        path.rename(path.with_name(f"moved{self.number}.py"))

    def do_rename_folder(self) -> None:
        folder = self.some_file().parent
        if folder != self.root:
            folder.rename(folder.with_name(f"folder{self.number}"))

    def do_exchange_folders(self) -> None:
        one, two = self.some_file().parent, self.some_file().parent
        if one != two and not one.is_relative_to(two) and not two.is_relative_to(one):
            one.rename(self.root / "aside")
            two.rename(one)
            (self.root / "aside").rename(two)

    def do_make_nested_folders(self) -> None:
        for place in ("", "deep/", "deep/er/"):
            self.write(f"nested{self.number}/{place}new.py", f"nested = {self.number}\n")

    def do_map(self) -> None:
        path = self.some_file()
        if content := path.read_bytes():
            with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
                mapping[:] = content.swapcase()  # unread before: of a page that was read tmpfs notes no write

    def do_mode(self) -> None:
        path = self.some_file()
        path.chmod(path.stat().st_mode ^ 0o100)

    def do_hard_link(self) -> None:
        (self.root / f"hard{self.number}.py").hardlink_to(self.some_file())

    def do_many(self) -> None:
        for number in range(200):
            self.write(f"many{number % 5}/file{number}.py", f"many = {self.number}\n")

    def do_rebase(self) -> None:
        branches = git(self.root, "for-each-ref", "--format=%(refname:short)", "refs/heads").split()
        try:
            git(self.root, "rebase", "-q", "--autostash", self.random.choice(branches))
        except subprocess.CalledProcessError:
            git(self.root, "rebase", "--abort")

    def do_save_atomically(self) -> None:
        self.write("temporary", f"saved = {self.number}\n").replace(self.some_file())

    def do_swap(self) -> None:
        one, two = self.some_file(), self.some_file()
        if one != two:
            one.rename(self.root / "temporary")
            two.rename(one)
            (self.root / "temporary").rename(two)

    def do_link(self) -> None:
        (self.root / f"link{self.number}.py").symlink_to(self.some_file())

    def do_link_anew(self) -> None:
        links = [path for path in sorted(self.root.glob("link*.py")) if path.is_symlink()]
        if links:
            link = self.random.choice(links)
            link.unlink()
            link.symlink_to(self.some_file())

    def do_add(self) -> None:
        git(self.root, "add", "-A")

    def do_commit(self) -> None:
        git(self.root, "commit", "-q", "-a", "-m", f"Commit {self.number}")

    def do_amend(self) -> None:
        git(self.root, "commit", "-q", "-a", "--amend", "-m", f"Amended {self.number}")

    def do_branch(self) -> None:
        git(self.root, "checkout", "-q", "-b", f"branch{self.number}")

    def do_checkout(self) -> None:
        branches = git(self.root, "for-each-ref", "--format=%(refname:short)", "refs/heads").split()
        git(self.root, "checkout", "-q", "-f", self.random.choice(branches))

    def do_reset(self) -> None:
        git(self.root, "reset", "-q", "--hard", "HEAD~1")

    def do_detach(self) -> None:
        git(self.root, "checkout", "-q", "-f", "--detach", "HEAD")

    def do_stash(self) -> None:
        git(self.root, "stash", "-q")

    def do_unstash(self) -> None:
        git(self.root, "stash", "pop", "-q")

    def do_ignore(self) -> None:
        self.write(".gitignore", f"made{self.random.randint(1, self.number)}/\n*.log\n")

    def do_ignore_in_folder(self) -> None:
        self.write(self.some_file().parent / ".gitignore", self.random.choice(["", "new.py\n", "moved*\n"]))

    def do_exclude(self) -> None:
        self.write(".git/info/exclude", f"made{self.random.randint(1, self.number)}/\n")

    def do_result(self) -> None:
        self.client.store(
            self.random.choice(["python-specialist", "test-engineer"]), self.random.choice(["success", "failed"])
        )
        self.stored += 1


def on_disk(root: Path, stored: int) -> dict[str, Any]:
    """What a context has to show, by git and the files themselves."""
    names = sorted(set(git(root, "ls-files", "-z", "-co", "--exclude-standard").split("\0")) - {""})
    head = subprocess.run(
        ["git", "symbolic-ref", "-q", "--short", "HEAD"], cwd=root, capture_output=True, text=True
    ).stdout.strip()
    lines = git(root, "status", "--porcelain", "--no-renames", "-uall").splitlines()
    return {
        "files": {
            name: (root / name).read_text()
            for name in names
            if name.endswith(".py") and os.path.lexists(root / name) and not (root / name).is_symlink()
        },
        "names": [name for name in names if os.path.lexists(root / name)],
        "branch": head or None,
        "commits": git(root, "log", "-n10", "--format=%h").split(),
        "changed": sorted({line[3:] for line in lines}),
        "results": stored,
    }


def in_context(client: Client) -> dict[str, Any]:
    """The same, by the service."""
    answer = client.get("/api/context/issue-1/python-specialist", max_files=1000)
    assert answer.status_code == 200, answer.text
    context = answer.json()["context"]
    return {
        "files": {file["path"]: file["content"] for file in context["relevant_files"] if file["path"].endswith(".py")},
        "names": sorted(context["project_structure"]["files"]),
        "branch": context["git_context"]["branch"],
        "commits": [commit["hash"] for commit in context["git_context"]["recent_commits"]],
        "changed": sorted(change["path"] for change in context["git_context"]["uncommitted_changes"]),
        "results": len(context["previous_agent_outputs"]),
    }


def stale_answers(
    service: Service, changes: int, seed: int
) -> tuple[int, list[tuple[list[str], dict[str, Any], dict[str, Any]]]]:
    """(number of changes done, what was wrong after which of them)."""
    client = service.client()
    changer = Changer(service.root, client, seed)
    git(service.root, "config", "status.renames", "false")  # so that each side names both paths
    wrong, done = [], 0
    while done < changes:
        names = [changer.change() for _ in range(changer.random.choice([1, 1, 1, 2, 3]))]
        done += len(names)
        given, again, real = in_context(client), in_context(client), on_disk(service.root, changer.stored)
        for answer in (given, again):  # the second may be a cached one
            expected = real
            if len(real["files"]) > MOST_FILES:
                expected = real | {"files": {name: real["files"].get(name) for name in answer["files"]}}
            if different := [key for key in real if answer[key] != expected[key]]:
                shown = [{key: side[key] for key in different} for side in (answer, expected)]
                wrong.append((names, *shown))
    return done, wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.freshness", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--changes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-watch", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "repository").mkdir()
        root = make_repository(Path(folder) / "repository")
        service = Service(root, Path(folder) / "storage", *(["--no-watch"] if options.no_watch else [])).start()
        try:
            done, wrong = stale_answers(service, options.changes, options.seed)
        finally:
            service.stop()
    for names, given, real in wrong:
        print(f"after {', '.join(names)}: given {given}, on disk {real}")
    print(f"{done} changes, {len(wrong)} stale answers")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

"""Asks git for all that a context says of a project, whatever state the repository is in.

A clone may lack objects, a folder may be no repository, git may be missing: what can be known is told, and nothing that
git would have ignored.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import secrets
import shutil
import subprocess
import typing
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import msgspec

from cco_sidecar import (
    Commit,
    FileFact,
    GitContext,
    GitError,
    Project,
    ProjectState,
    ask_git,
    clean_text,
    in_thread,
    iso,
    log_once,
    run_git,
    split_z,
)
from cco_sidecar_plugins.context._fingerprints import MAX_INT64
from cco_sidecar_plugins.context._pipes import pointer
from cco_sidecar_plugins.context._sections import GitChange, GitState
from cco_sidecar_plugins.context._urls import without_credentials
from cco_sidecar_plugins.context._withheld import is_secret, own_files

log = logging.getLogger("cco")


class GitProject(Project):
    """The repository or folder on disk, asked anew at each look."""

    def ask(self) -> tuple[list[str], GitContext, str | None]:
        root, prefix = self._root, git_prefix(self._root)
        listed = in_thread("git", lambda: list_files(root, prefix, self._scratch))
        git, head = read_git(root, prefix)
        return listed.result(), git, head

    def look(self) -> ProjectState:
        state = super().look()
        own = own_files(str(self._root), state.files)
        files = [
            msgspec.structs.replace(file, mtime_ns=MAX_INT64) if file.mtime_ns > MAX_INT64 else file
            for file in without(state.files, own)
        ]
        return msgspec.structs.replace(state, files=files, git=without_changes(state.git, own))

    def readable(self, files: list[FileFact]) -> list[FileFact]:
        return without(files, secret_among(tuple(file.path for file in files)))


@functools.lru_cache(2)  # an edit changes no name
def secret_among(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(filter(is_secret, names))


def without(files: list[FileFact], names: Set[str]) -> list[FileFact]:
    return [file for file in files if file.path not in names] if names else files


def without_changes(git: GitContext, names: Set[str]) -> GitContext:
    """What git says, without the uncommitted changes of the files with these ``names``."""
    if not names:
        return git
    shown = set(map(clean_text, names))
    changes = [change for change in git.uncommitted_changes if change.path not in shown]
    return msgspec.structs.replace(git, uncommitted_changes=changes)


def list_files(root: Path, prefix: str | None, scratch: Path) -> list[str]:
    """The names that git lists, or by its rules would list if this were a repository. Raises GitError. Blocks."""
    perhaps_inside = prefix is None and not is_outside_git(root)
    if perhaps_inside and run_git(root, "rev-parse", "--is-inside-git-dir") == b"true\n":
        return []
    try:
        environ = borrowed_git(root, scratch) if prefix is None else None
        listed = ask_git(root, "ls-files", "-z", "-c", "-o", "--exclude-standard", "--deduplicate", env=environ)
    except GitError:
        if shutil.which("git"):
            raise
        names = sorted(walk_files(root))
        if any(os.path.lexists(folder / ".git") for folder in (root, *root.parents)) or any(
            name.rpartition("/")[2] == ".gitignore" for name in names
        ):
            raise GitError("git is not installed, so what .gitignore excludes is not known") from None
        return without_databases(root, names)
    return without_databases(root, sorted(split_z(listed)))


def borrowed_git(root: Path, scratch: Path) -> dict[str, str]:
    """Lets git's own ignore rules speak for a folder that is no repository, through an empty one in our storage."""
    empty = scratch / "empty.git"
    if not (empty / "HEAD").exists():
        ask_git(scratch, "init", "--quiet", "--bare", str(empty))
    (empty / "info").mkdir(exist_ok=True)
    (empty / "info/exclude").write_text("".join(f"{name}/\n" for name in sorted(NOT_OURS)))
    return {"GIT_DIR": str(empty), "GIT_WORK_TREE": str(root)}


def walk_files(root: Path) -> Iterator[str]:
    """Files below ``root`` where git is not installed."""
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_OURS]
        yield from (os.path.relpath(os.path.join(place, name), root).replace(os.sep, "/") for name in names)


NOT_OURS = frozenset({  # folders that are not looked into where git does not say what is ignored
    ".git", ".hg", ".svn", "node_modules", ".venv", "venv", "__pycache__", ".tox", ".nox", ".mypy_cache",
    ".pytest_cache", ".ruff_cache", ".idea", "target", "dist", "build",
})  # fmt: skip


def git_prefix(root: Path) -> str | None:
    """The path of ``root`` in its work tree, "" or "path/"; None where it is in none. Raises GitError. Blocks."""
    if is_outside_git(root):
        return None
    try:
        found = ask_git(root, "rev-parse", "--is-inside-work-tree", "--show-prefix")
    except GitError as error:
        outside = "not a git repository (or any" in str(error) and not is_damaged(root)
        if outside or shutil.which("git") is None:
            return None
        raise
    inside, _, prefix = os.fsdecode(found).partition("\n")
    return prefix.removesuffix("\n") if inside == "true" else None


def is_outside_git(root: Path) -> bool:
    """Whether no repository can be around ``root``, which git need not be asked then: neither it nor a folder above
    holds the name ``.git``, nor ``HEAD``, without which git takes no folder for a database. Blocks.
    """
    nearest = root.resolve()
    for place in (folder / name for folder in (nearest, *nearest.parents) for name in (".git", "HEAD")):
        try:
            os.lstat(place)
        except FileNotFoundError:
            continue
        except OSError:  # it is not for us to see, and may be there
            pass
        return False
    return True


def is_damaged(root: Path) -> bool:
    """Whether git takes the nearest ``.git`` around ``root`` for no repository even when it is asked right there, and
    not for lying beyond a file system or GIT_CEILING_DIRECTORIES. Raises GitError. Blocks.
    """
    for folder in (root, *root.parents):
        try:
            found = os.path.isfile(folder / ".git") or (os.path.isdir(folder / ".git") and os.listdir(folder / ".git"))
        except OSError as error:
            raise GitError(f"git's folder .git cannot be read: {error.strerror}") from None
        if found:
            return run_git(folder, "rev-parse", "--git-dir") is None
    return False


def read_git(root: Path, prefix: str | None) -> tuple[GitContext, str | None]:
    """(state of the repository, the commit that is checked out). Blocks."""
    if prefix is None:
        return GitState(None, [], [], None, None), None
    latest, remote = in_thread("git", lambda: read_commits(root)), in_thread("git", lambda: read_remote(root))
    try:
        branch, codes = read_status(root, prefix)
    except GitError as error:
        log_once(f"uncommitted changes are not known: {error}")
        named = os.fsdecode(run_git(root, "symbolic-ref", "--short", "HEAD") or b"")
        branch, codes = clean_text(named.removesuffix("\n")) or None, []
    changes, (commits, head) = describe_changes(codes, line_counts(root, codes)), latest.result()
    folder = os.fsdecode(run_git(root, "rev-parse", "--absolute-git-dir") or b"").removesuffix("\n")
    return GitState(branch, commits, changes, *remote.result(), in_progress(Path(folder))), head


def in_progress(folder: Path) -> str | None:
    """What git waits to go on with, by the files in its ``folder``; None where nothing is. Blocks."""
    for name, operation in OPERATIONS.items():
        if not os.path.lexists(folder / name):
            continue
        of = pointer(folder / name / "head-name" if name.startswith("rebase") else folder / name).partition("\n")[0]
        if name == "MERGE_HEAD" and (named := MERGED.match(pointer(folder / "MERGE_MSG"))):
            of = named[1]
        of = of[:10] if OBJECT_NAME.fullmatch(of) else of.removeprefix("refs/heads/")
        return clean_text(f"{operation} {of}"[:200] if of else operation.partition(" ")[0])
    return None


OPERATIONS = {  # what is in git's folder meanwhile; a rebase may merge and pick commits
    "rebase-merge": "rebase of", "rebase-apply/applying": "am", "rebase-apply": "rebase of", "MERGE_HEAD": "merge of",
    "CHERRY_PICK_HEAD": "cherry-pick of", "REVERT_HEAD": "revert of", "BISECT_START": "bisect from",
}  # fmt: skip
MERGED = re.compile(r"Merge (?:remote-tracking )?(?:branch|tag) '([^'\n]+)'")
OBJECT_NAME = re.compile("[0-9a-f]{40,64}")


def read_commits(root: Path, number: int = 10) -> tuple[list[Commit], str | None]:
    """(the latest commits, the whole name of the first). Blocks."""
    found, complete = git_log(root, *LOG_WITH_NAMES)
    if not complete:  # trees that a partial clone lacks, or a damaged object; the last one's names may be cut off
        named = {facts[0]: names for *facts, names in found[:-1]}
        found, complete = git_log(root, f"-n{number}", "--first-parent")
        while not complete and len(found) < number:  # git shows none of which a parent is missing, unless it is named
            following = found[-1][2].split()[:1] if found else ["HEAD"]
            one = git_log(root, "-n1", "--no-walk=unsorted", *following)[0] if following else []
            if not one:
                break
            found += one
        found = [(*facts, named.get(facts[0], [])) for *facts, _ in found]
    return as_commits(root, found), found[0][0] if found else None


LOG_WITH_NAMES = ("-n10", "-z", "--name-only", "--no-renames", "--relative", "-m", "--first-parent")


def git_log(root: Path, *flags: str) -> tuple[list[tuple[Any, ...]], bool]:
    """((hash, short hash, parents, date, author, subject, names) of the latest commits, whether all). Blocks."""
    separator = secrets.token_hex(8)  # that nobody can have put into a subject or a name
    shape = f"--pretty=format:{separator}" + separator.join(("%H", "%h", "%P", "%ct", "%an", "%s"))
    try:
        output, complete = ask_git(root, "log", "--encoding=UTF-8", *flags, shape, env=BOUNDED), True
    except GitError as error:
        output, complete = error.output, False
        if run_git(root, "rev-list", "-n", "1", "--all") != b"":  # else nothing was committed yet
            log_once(f"the history is not known in full: {error}")
    found = []
    parts = output.split(separator.encode())[1:]
    for *facts, last in zip(*(parts[at::6] for at in range(6)), strict=False):
        subject, _, names = last.partition(b"\n")
        texts = map(shortened, (*facts, subject.rstrip(b"\0")))
        found.append((*texts, [clean_text(name) for name in split_z(names)]))
    return found, complete


def shortened(text: bytes) -> str:
    """A line of a commit, which may have any length: of a long one as many whole words as a reader may want. So no
    secret is cut in two, which nobody would know for one.
    """
    text = text if len(text) <= LONGEST else text[:LONGEST].rpartition(b" ")[0]
    return clean_text(os.fsdecode(text))


LONGEST = 2_000  # bytes
# of one allocation: enough for two million names of one commit; a tree of a few kilobytes can have billions
BOUNDED = {"GIT_ALLOC_LIMIT": "16m"}


def as_commits(root: Path, found: list[tuple[Any, ...]]) -> list[Commit]:
    """Commits out of what ``git_log`` found; a shallow clone's last one names no files, as git says all. Blocks."""
    rootless = any(not parents for _, _, parents, *_ in found)
    is_shallow = rootless and run_git(root, "rev-parse", "--is-shallow-repository") == b"true\n"
    commits = []
    for _, short, parents, moment, author, subject, names in found:
        known = moment.isdecimal() and float(moment) < 253_402_300_800  # of a year that ISO 8601 can write
        if not known:
            log_once(f"commit {short} has no usable date")
        files = [] if is_shallow and not parents else names
        commits.append(Commit(short, subject, author, iso(float(moment)) if known else None, files))
    return commits


Codes = list[tuple[str, str]]  # status code and path of changed files, as ``git status`` gives them


def all_status(root: Path, prefix: str, *flags: str, names: Sequence[str] = (".",)) -> tuple[str | None, Codes]:
    """(branch, code and path of what changed or is untracked among ``names``). Raises GitError. Blocks."""
    shape = ("--porcelain=v1", "-z", "--branch", "--no-ahead-behind", "--untracked-files=all", *flags)
    literal = {"GIT_LITERAL_PATHSPECS": "1"}
    listed = split_z(ask_git(root, "status", *shape, "--ignore-submodules=dirty", "--", *names, env=literal))
    if listed and UNENDED.match(listed[0]):
        listed[0] = listed[0].removeprefix("## ")
    named = listed and listed[0].startswith("## ")  # git says nothing of a branch that is damaged
    tokens = iter(listed if named else ["## HEAD (no branch)", *(line for line in listed if line)])
    branch = next(tokens).removeprefix("## ").removeprefix("No commits yet on ").partition("...")[0]
    codes = []
    for token in tokens:
        code, path = token[:2], token[3:]
        if "R" in code or "C" in code:
            next(tokens, None)  # the old name
        codes.append((code, path.removeprefix(prefix)))
    return None if branch == "HEAD (no branch)" else clean_text(branch), codes


# Where HEAD names what can be no branch git leaves out its name and the end of its line: a status code follows at once.
UNENDED = re.compile("## ([ MTADRCU?!]{2} |$)")

# the first of these letters in a status code decides
CONFLICTS = frozenset("DD AU UD UA DU AA UU".split())
CHANGE_STATUS = {"?": "untracked", "R": "renamed", "D": "deleted", "A": "added", "C": "added"}


def describe_changes(codes: Codes, counts: dict[str, str]) -> list[GitChange]:
    """Uncommitted changes against the last commit, staged and not; ``counts`` are the lines of each file."""
    changes = []
    for code, path in codes:
        status = next((word for letter, word in CHANGE_STATUS.items() if letter in code), "modified")
        counted = None if code == "??" else counts.get(path)  # what is in git's index no more may be there still
        changes.append(GitChange(clean_text(path), typing.cast(Any, status), counted, code in CONFLICTS))
    return changes


def line_counts(root: Path, codes: Codes, names: Sequence[str] = (".",)) -> dict[str, str]:
    """ "+added -removed" of every changed text file among ``names``. Blocks."""
    if all(code == "??" for code, _ in codes):
        return {}

    def lines(*than: str, without: Sequence[str] = ()) -> bytes | None:
        literal = [f":(literal){name}" for name in names] + [f":(exclude,literal){name}" for name in without]
        try:
            return ask_git(root, "diff", *LINES, *than, "--", *literal)
        except GitError as error:
            log.debug("lines are not counted: %s", error)
            late = isinstance(error.__context__, subprocess.TimeoutExpired)
            return b"" if late else None  # asked again it would take as long

    # where nothing is staged, git's index tells as much, and much faster
    than = ["HEAD"] if any(code[0] not in " ?" for code, _ in codes) else []
    output = lines(*than)
    if than and output is None and not run_git(root, "rev-parse", "--verify", "HEAD"):
        than = [empty_tree(root)]  # an unborn branch is compared with it
        output = lines(*than)
    if output is None and (closed := [path for _, path in codes if is_closed(root / path)]):
        output = lines(*than, without=closed)  # for one file that cannot be read git counts none
    tokens, counts = iter(split_z(output)), {}
    for token in tokens:
        added, removed, path = [*token.split("\t", 2), "", ""][:3]
        if not path:  # a rename: the old and the new name follow
            next(tokens, None)
            path = next(tokens, "")
        if added != "-":
            counts[path] = f"+{added} -{removed}"
    return counts


def is_closed(path: Path) -> bool:
    """Whether it is a file that cannot be read. Blocks."""
    try:
        if path.is_file() and not path.is_symlink():  # not a pipe, which would wait for a writer
            path.open("rb").close()
    except OSError:
        return True
    return False


LINES = ("--numstat", "-z", "--relative", "--no-ext-diff", "--no-textconv", "--ignore-submodules=dirty", "-M")


def unstaged_changes(root: Path, names: Sequence[str], listed: bytes) -> tuple[Codes, dict[str, str]]:
    """(code and path, "+added -removed") of those of ``names`` that differ from git's index: as ``read_status`` and
    ``line_counts`` say of files that are there, tracked and not staged, by one call of git, whose settings are
    ``listed``. Raises GitError. Blocks.
    """
    literal = {"GIT_LITERAL_PATHSPECS": "1"}
    output = ask_git(root, "diff", "--raw", *LINES, "--", *names, env=literal, listed=listed) if names else b""
    tokens, letters, same_modes = iter(split_z(output)), dict[str, str](), set[str]()
    counts, differing = {}, set[str]()
    for token in tokens:  # all names with their modes and a letter, then all of them with their lines
        if token.startswith(":"):
            before, after, *_, letter = token[1:].split(" ")
            path = next(tokens, "")
            letters[path] = letter[:1]
            if before == after:
                same_modes.add(path)
        else:
            added, removed, path = token.split("\t", 2)
            differing.add(path)
            if added != "-":
                counts[path] = f"+{added} -{removed}"
    touched = same_modes - differing  # where diff.autoRefreshIndex is off, git names those too
    return [(f" {letter}", path) for path, letter in letters.items() if path not in touched], counts


def read_status(root: Path, prefix: str, *flags: str, names: Sequence[str] = (".",)) -> tuple[str | None, Codes]:
    """(branch, code and path of what changed or is untracked among ``names``), without git's databases. Raises
    GitError. Blocks.
    """
    branch, codes = all_status(root, prefix, *flags, names=names)
    ours = set(without_databases(root, [path for _, path in codes]))
    return branch, [(code, path) for code, path in codes if path in ours]


def without_databases(root: Path, names: list[str]) -> list[str]:
    """``names`` without what lies in a database of git, whatever its folder is called. Blocks."""
    folders = (name.removesuffix("HEAD") for name in names if name == "HEAD" or name.endswith("/HEAD"))
    found = tuple(path for path in folders if all((root / path / name).is_dir() for name in ("objects", "refs")))
    return [name for name in names if not name.startswith(found)] if found else names


def read_remote(root: Path) -> tuple[str | None, str | None]:
    """(name, URL) of origin, else of the first remote. Blocks."""
    settings = split_z(run_git(root, "config", "--list", "-z"))  # asked for remotes alone, git fails where none is
    parts = (clean_text(each).partition("\n") for each in settings)
    pairs = [(key[7:-4], url) for key, _, url in parts if REMOTE_URL.fullmatch(key)]
    urls = dict(reversed(pairs))  # git fetches from a remote's first URL
    name = "origin" if "origin" in urls else pairs[0][0] if pairs else None
    return name, without_credentials(urls[name]) if name else None


REMOTE_URL = re.compile(r"remote\..*\.url", re.DOTALL)


def empty_tree(root: Path) -> str:
    """The name of the tree without files in the repository's kind of hash. Blocks."""
    return (run_git(root, "hash-object", "-t", "tree", "--stdin") or b"").decode().strip()

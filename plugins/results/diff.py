"""What changed in the files that a result names, as git tells it: ``GET /api/results/{result_id}/diff``.

The files as they are now are compared with the commit at which the agent began; which of them had been changed by then
and not committed is said, as the difference shows that too. A file outside of the project, one that
git ignores and one that holds credentials by its name are left out, and that is said.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from cco_sidecar import (
    MB,
    READ,
    REDACTED,
    ApiError,
    Endpoint,
    GitError,
    Pool,
    Route,
    ask_git,
    clean_text,
    hookimpl,
    iso,
    one_line,
    read_text_file,
    redact,
    run_git,
    split_z,
)
from cco_sidecar_plugins._files import NO_JSON
from cco_sidecar_plugins.agents.synthesis import named as listed
from cco_sidecar_plugins.agents.synthesis import read_beginning
from cco_sidecar_plugins.context._git_facts import empty_tree, git_prefix
from cco_sidecar_plugins.context._withheld import is_secret

Status = Literal[
    "added", "modified", "deleted", "unchanged", "missing", "outside", "ignored", "secret", "binary", "too large"
]
FILES = 200  # of a result at most
ONE_FILE, ALL_FILES, SHOWN = 4 * MB, 16 * MB, MB  # bytes: of a file, of all that are compared, of the difference
LITERAL = {"GIT_LITERAL_PATHSPECS": "1"}
LETTERS: dict[str, Status] = {"A": "added", "D": "deleted"}
POOL = Pool("diffs", 2, 60)


@hookimpl
def register_routes() -> list[Route]:
    return [Route("GET", "/api/results/{result_id}/diff", GetDiff)]


class ChangedFile(Struct):
    """A file that a result names, and what became of it; from "missing" on the difference does not show it."""

    path: str
    status: Status


class ResultDiff(Struct):
    """Git's difference of the files that a result names; ``base`` says in words what is compared, ``reason`` why there
    is no difference.
    """

    files: list[ChangedFile]
    diff: str
    truncated: bool
    base: str | None
    reason: str | None


class GetDiff(Endpoint):
    """What changed in the files that a result names since the commit at which its agent began."""

    permission = READ
    answers = {200: ResultDiff}
    problems = (404,)

    async def respond(self, result_id: str) -> ResultDiff:
        read, project = self.sidecar.storage.read, self.claims.project_id
        select = "select issue, agent_id, stored, body from result where project = ? and id = ?"
        rows = read.rows(select, project, result_id)
        if not rows:
            raise ApiError("REQ_002", f"No result {result_id}")
        (row,) = rows
        self.sidecar.tokens.check_issue(self.claims, row["issue"])
        agent, settings = read.agent(project, row["agent_id"]), self.sidecar.settings
        began = agent["started"] if agent else row["stored"]
        folder = settings.storage / "agents" / row["agent_id"] if agent else None
        return await POOL.run(difference, settings.root, named_files(row["body"]), folder, began)


class NamedFiles(Struct):
    """The lists of files of a result."""

    files_created: list[Any] = []
    files_modified: list[Any] = []
    files_deleted: list[Any] = []


class Body(Struct):
    result: NamedFiles


def named_files(body: bytes) -> list[str]:
    """The paths that a stored result names, each once."""
    result = msgspec.json.decode(body, type=Body).result
    entries = [*result.files_created, *result.files_modified, *result.files_deleted]
    return list(dict.fromkeys(entry if isinstance(entry, str) else str(entry["path"]) for entry in entries))


def difference(root: Path, named: list[str], folder: Path | None, began: float) -> ResultDiff:
    """The answer; ``folder`` is the agent's, who began at ``began``. Blocks, as all below do."""
    answer = ResultDiff([], "", len(named) > FILES, None, None)
    paths = {path: inside(root, path) for path in named[:FILES]}
    try:
        if not named:
            raise GitError("the result names no files")
        if git_prefix(root) is None:
            raise GitError("there is no git repository")
        base, answer.base, before = base_of(root, folder, began)
        looked = dict(statuses(root, base, [path for path in paths.values() if path]))
        answer.files = [ChangedFile(path, looked[its] if its else "outside") for path, its in paths.items()]
        changed = [path for path in looked if looked[path] in ("added", "modified", "deleted")]
        if mixed := [path for path in changed if clean_text(path) in before]:
            answer.base += f"; changed already, and not committed, before it began: {listed(mixed)}"
        text = redacted(root, base, "".join(shown(root, base, changed)), changed)
        answer.diff, cut = cut_at_line(text, SHOWN)
        answer.truncated |= cut
        answer.reason = None if text else "git finds no difference in these files"
    except OSError as error:  # GitError among them
        answer.reason = one_line(error)
    return answer


def inside(root: Path, path: str) -> str | None:
    """A path that a result names as git names it, relative to ``root``; None where it leads out."""
    if "\0" in path or len(path) > 4096 or path.startswith("~"):
        return None
    full = os.path.normpath(os.path.join(root, path.replace("\\", "/") if os.name == "nt" else path))
    return os.path.relpath(full, root).replace(os.sep, "/") if full.startswith(f"{root}{os.sep}") else None


def base_of(root: Path, folder: Path | None, began: float) -> tuple[str, str, Collection[str]]:
    """The commit that the files are compared with, words for the comparison, and the files that were not as in that
    commit when the agent began, as far as it is known. Raises GitError.
    """
    head, how, before = None, "the last commit before", dict[str, Any]()
    with contextlib.suppress(GitError, *NO_JSON):
        if folder:
            beginning = read_beginning(folder)
            head, how, before = beginning.head, "the commit that was checked out when", beginning.changed
    if head is None or run_git(root, "cat-file", "-e", f"{head}^{{commit}}") is None:
        found = run_git(root, "rev-list", "-1", f"--before={int(began)}", "HEAD")
        head, how = (found or b"").decode().strip(), "the last commit before"
    if not head:
        return (
            empty_tree(root),
            f"nothing, as there was no commit at {iso(began)}, and the files as they are now",
            before,
        )
    return head, f"{head[:12]}, {how} the agent began at {iso(began)}, and the files as they are now", before


def statuses(root: Path, base: str, paths: list[str]) -> Iterator[tuple[str, Status]]:
    """What became of each path since ``base``."""
    if not paths:
        return
    shape = ("--name-status", "-z", "--no-renames", "--relative", "--no-ext-diff", "--no-textconv")
    told = split_z(ask_git(root, "diff", *shape, "--ignore-submodules=dirty", base, "--", *paths, env=LITERAL))
    codes = dict(zip(told[1::2], (code[0] for code in told[::2]), strict=True))
    listed = set(split_z(ask_git(root, "ls-files", "-z", "-c", "--", *paths, env=LITERAL)))
    others = ("-z", "-o", "--exclude-standard")
    untracked = set(split_z(ask_git(root, "ls-files", *others, "--", *paths, env=LITERAL)))
    sizes, room = dict(blob_sizes(root, base, paths)), ALL_FILES
    for path in paths:
        there = os.path.lexists(root / path) and not os.path.isdir(root / path)
        size = max(sizes.get(path, 0), os.lstat(root / path).st_size if there else 0)
        if is_secret(path):
            yield path, "secret"
        elif path not in codes and path not in untracked:
            yield path, "unchanged" if path in listed else "ignored" if there else "missing"
        elif size > ONE_FILE or size > room:
            yield path, "too large"
        elif path not in codes and read_text_file(str(root), path, ONE_FILE) is None:
            yield path, "binary"
        else:
            room -= size
            yield path, "added" if path not in codes else LETTERS.get(codes[path], "modified")


def blob_sizes(root: Path, base: str, paths: list[str]) -> Iterator[tuple[str, int]]:
    """The sizes of those paths that are files in ``base``."""
    for line in split_z(ask_git(root, "ls-tree", "-r", "-l", "-z", base, "--", *paths, env=LITERAL)):
        facts, _, path = line.partition("\t")
        size = facts.split()[-1]
        yield path, int(size) if size.isdigit() else 0


def shown(root: Path, base: str, paths: list[str]) -> Iterator[str]:
    """Git's difference of the paths, those of untracked files in the same form."""
    if not paths:
        return
    shape = ("--no-color", "--no-renames", "--relative", "--no-ext-diff", "--no-textconv", "--ignore-submodules=dirty")
    prefixes = ("--src-prefix=a/", "--dst-prefix=b/")
    for words, env in pathspecs(root, base, paths):
        yield ask_git(root, "diff", *shape, *prefixes, base, "--", *words, env=env).decode("utf-8", "replace")
    others = ("-z", "-o", "--exclude-standard")
    for path in split_z(ask_git(root, "ls-files", *others, "--", *paths, env=LITERAL)):
        if path not in paths:
            continue
        if read := read_text_file(str(root), path, ONE_FILE):
            lines, name = read[0].split("\n"), quoted(path)
            end = [] if lines[-1] else [lines.pop()]
            yield f"diff --git a/{name} b/{name}\nnew file, not tracked\n--- /dev/null\n+++ b/{name}\n"
            yield f"@@ -0,0 +1,{len(lines)} @@\n" + "".join(f"+{line}\n" for line in lines)
            yield "" if end or not lines else "\\ No newline at end of file\n"


def pathspecs(root: Path, base: str, paths: list[str]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Words by which git takes these files alone, and the environment for them: where one is or was a folder, too,
    other files lie in it, which may be secret.
    """
    shape = ("--name-only", "-z", "--no-renames", "--relative", "--no-ext-diff", "--ignore-submodules=dirty")
    told = split_z(ask_git(root, "diff", *shape, base, "--", *paths, env=LITERAL))
    folders = [path for path in paths if any(name.startswith(f"{path}/") for name in told)]
    if files := [path for path in paths if path not in folders]:
        yield files, LITERAL
    if folders:
        yield [f":({magic}literal){path}{end}" for magic, end in (("", ""), ("exclude,", "/")) for path in folders], {}


def quoted(path: str) -> str:
    """A path in one line, as it stands in a difference."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in clean_text(path))


def redacted(root: Path, base: str, text: str, paths: Iterable[str]) -> str:
    """A difference without secrets: those that its lines hold, and lines of secrets that only whole files show."""
    secret: set[str] = set()
    for path in paths if text else ():
        read, before = read_text_file(str(root), path, ONE_FILE), run_git(root, "show", f"{base}:./{path}")
        for content in (read[0] if read else "", (before or b"")[:ONE_FILE].decode("utf-8", "replace")):
            pairs = zip(content.split("\n"), redact(content)[0].split("\n"), strict=False)
            secret |= {line for line, without in pairs if line != without and line.strip()}
    lines = text.split("\n")
    kept = [line[:1] + (REDACTED if line[1:] in secret else line[1:]) for line in lines]
    clean = redact("\n".join(line[1:] for line in kept))[0].split("\n")
    return "\n".join(line[:1] + without for line, without in zip(kept, clean, strict=True))


def cut_at_line(text: str, limit: int) -> tuple[str, bool]:
    """The text, cut at a line's end where it has more than ``limit`` bytes, and whether it was."""
    content = text.encode()
    if len(content) <= limit:
        return text, False
    return content[: content.rfind(b"\n", 0, limit) + 1].decode("utf-8", "ignore"), True

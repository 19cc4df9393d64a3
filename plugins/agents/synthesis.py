"""A result in the name of an agent that ended well and stored none: what it changed, and its last lines.

Which files it changed is the difference between the work tree at its start and at its end, as git tells it. That is
only known where no other agent ran meanwhile. Changes that were not committed at its start count as its own where they
have changed since, and are named; whoever else edits files while an agent runs is not told from it. What was written
after its end, while no service ran, is not its own; in the first seconds its last processes may have written, and so
such files are its own, and named. Git does not look into submodules for uncommitted changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import re
import stat
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta, Struct

from cco_sidecar import (
    MB,
    AgentCommand,
    GitError,
    Launcher,
    ProjectState,
    Running,
    ask_git,
    clean_text,
    hookimpl,
    one_line,
    redact,
    split_z,
    write_file,
)
from cco_sidecar_plugins._files import NO_JSON, content_of
from cco_sidecar_plugins._terminal import last_shown
from cco_sidecar_plugins.agents.launchers import storing_program
from cco_sidecar_plugins.commands._pipeline_plan import FILES_UNKNOWN, MADE, SUBMODULES_UNKNOWN, WRITTEN_LATER
from cco_sidecar_plugins.context._fingerprints import Fingerprint, fingerprint
from cco_sidecar_plugins.context._git_facts import empty_tree, git_prefix, read_status

LINES = 5  # decisions at most: every later agent reads them in its brief
GIVEN = ("brief.md", "prompt", "task")  # in an agent's folder: what it was told, and may show again
FILES = 1000  # of each kind at most
SMALL = 64 * 1024  # bytes of a file whose content is noted, of so many files
LATE = 15.0  # seconds after an agent's end in which its last processes may still write
ACCOUNT = "tokens used"  # after its transcript codex writes this, their number, and its answer once more
WHY = f"{MADE} and stored no result: this is from its last lines and from git."


Noted = str | Fingerprint | None  # mode and digest, of many or large files what also shows a touch, nothing of none


class Beginning(Struct):
    """The work tree at an agent's start; ``problem`` says why it is not known."""

    FILE: ClassVar[str] = "beginning.json"  # in the agent's folder

    head: Annotated[str, Meta(pattern=r"^[0-9a-f]{40,64}\Z")] | None = None  # the commit, None before the first
    changed: dict[str, Noted] = {}
    problem: str | None = None


@hookimpl
def part_class(base: type) -> type | None:
    return type("NotingLauncher", (NotingLauncher, base), {}) if issubclass(base, Launcher) else None


class NotingLauncher(Launcher):
    """Notes the work tree at an agent's start."""

    async def command(self, running: Running, files: dict[str, bytes], asked: dict[str, str]) -> AgentCommand:
        started = await super().command(running, files, asked)
        try:
            note = functools.partial(beginning_of, await self.contexts.project.state())
        except OSError as error:
            note = functools.partial(Beginning, problem=one_line(error))
        await asyncio.to_thread(lambda: write_file(running.folder / Beginning.FILE, msgspec.json.encode(note())))
        return started


def beginning_of(project: ProjectState) -> Beginning:
    changed = [change.path for change in project.git.uncommitted_changes]
    whole = len(changed) <= FILES
    return Beginning(project.head, {path: noted(os.path.join(project.root, path), whole) for path in changed})


def noted(path: str, whole: bool) -> Noted:
    """What changes with a file. ``whole``: with its content and rights alone, where it is small."""
    facts = fingerprint(path)
    if not whole or facts is None or not stat.S_ISREG(facts[4]) or facts[2] > SMALL:
        return facts
    return f"{facts[4]:o} {hashlib.sha256(content_of(Path(path), SMALL)).hexdigest()}"


@hookimpl
def agent_result(agent: dict[str, Any], lines: list[str], folder: str, root: str, alone: bool) -> dict[str, Any]:
    try:
        if not alone:
            raise GitError("other agents worked at the same time")
        ended = datetime.fromisoformat(agent["ended_at"]).timestamp()
        files, warnings = files_between(Path(root), read_beginning(Path(folder)), ended)
    except (GitError, *NO_JSON) as error:
        files, warnings = {}, [f"{FILES_UNKNOWN}: {one_line(error)}"]
    said: dict[str, Any] = {"status": "partial", "decisions": said_last(lines, told(Path(folder))), "rationale": WHY}
    if program := storing_program(Path(folder)):
        said |= {"rationale": f"{WHY} {program} can store one.", "artifacts": {"could_store": program}}
    return said | files | {"warnings": warnings}


def said_last(lines: list[str], given: frozenset[str]) -> list[str]:
    """The last lines that say something and were not given, as a terminal shows them, each once, without secrets."""
    shown = redact("\n".join(last_shown(line).strip() for line in lines))[0].split("\n")
    if ACCOUNT in shown:
        shown = shown[len(shown) - shown[::-1].index(ACCOUNT) + 1 :] or shown
    said = dict.fromkeys(line[:500] for line in reversed(shown) if re.search(r"\w", line) and line not in given)
    return list(said)[:LINES][::-1]


def told(folder: Path) -> frozenset[str]:
    """The lines of an agent's brief, prompt and task, without secrets. Blocks."""
    texts = (content_of(folder / name, MB).decode("utf-8", "replace") for name in GIVEN)
    return frozenset(line.strip() for text in texts for line in redact(text)[0].splitlines())


def read_beginning(folder: Path) -> Beginning:
    """The work tree at an agent's start. The agent itself can write there. Raises GitError and msgspec.DecodeError.
    Blocks, as all below do.
    """
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with open(folder / Beginning.FILE, "rb", opener=lambda path, mode: os.open(path, mode | flags)) as file:
            beginning = msgspec.json.decode(file.read(64 * MB), type=Beginning)
    except OSError as error:
        raise GitError(f"what was noted at its start cannot be read ({error.strerror})") from None
    if beginning.problem:
        raise GitError(beginning.problem)
    return beginning


def changed_files(root: Path) -> list[str]:
    """The files that are not as the last commit has them, untracked ones too. Raises GitError, also where there is no
    repository.
    """
    if (prefix := git_prefix(root)) is None:
        raise GitError("there is no git repository")
    return [clean_text(path) for _, path in read_status(root, prefix)[1]]


def files_between(root: Path, beginning: Beginning, ended: float) -> tuple[dict[str, list[str]], list[str]]:
    """The lists of files of a result, and warnings. Raises GitError where they are not known."""
    before, warnings = beginning.changed, []
    codes = dict.fromkeys([*before, *changed_files(root)], "A") | differences(root, beginning.head)  # A: untracked
    for path, known in before.items():
        there = noted(os.path.join(root, path), isinstance(known, str))
        codes[path] = "" if known == there else "D" if there is None else "M" if known else "A"
    moments = {path: written(root, path) for path, code in sorted(codes.items()) if code}
    if late := [path for path, moment in moments.items() if moment > ended + LATE]:
        codes |= dict.fromkeys(late, "")
        warnings.append(f"{WRITTEN_LATER}, by whom is not known: {named(late)}")
    if soon := [path for path, moment in moments.items() if ended + 1 <= moment <= ended + LATE]:  # whole seconds
        warnings.append(f"Written in the {LATE:.0f} s after the agent's end, and counted as its own: {named(soon)}")
    if any(line.startswith("160000 ") for line in split_z(ask_git(root, "ls-files", "-s", "-z", "--", "."))):
        warnings.append(SUBMODULES_UNKNOWN)
    kinds = {"files_created": "A", "files_modified": "MTU", "files_deleted": "D"}
    found = {kind: sorted(path for path, code in codes.items() if code and code in its) for kind, its in kinds.items()}
    warnings += [f"{kind}: {len(names) - FILES} more" for kind, names in found.items() if len(names) > FILES]
    if mixed := sorted(path for path in before if codes[path]):
        warnings.append(f"Changed already, and not committed, before the agent began: {named(mixed)}")
    return {kind: names[:FILES] for kind, names in found.items() if names}, warnings


def named(paths: list[str]) -> str:
    return ", ".join(paths[:20]) + (f" and {len(paths) - 20} more" if len(paths) > 20 else "")


def written(root: Path, path: str) -> float:
    """When a file was changed last; of one that is gone, when its folder was."""
    for place in (root / path, *(root / path).parents):
        with contextlib.suppress(OSError):
            return place.lstat().st_ctime
    return 0.0


def differences(root: Path, head: str | None) -> dict[str, str]:
    """How the tracked files differ from a commit, or from nothing: by path A, M, D, T or U. Raises GitError."""
    head = head or empty_tree(root)
    shape = ("--name-status", "-z", "--no-renames", "--relative", "--no-ext-diff", "--no-textconv")
    told = split_z(ask_git(root, "diff", *shape, "--ignore-submodules=dirty", head, "--", "."))
    return dict(zip(map(clean_text, told[1::2]), (code[0] for code in told[::2]), strict=True))

"""Issues that a project has written down: Markdown files, .beads, exports as JSON, and those that ``gh`` tells of.

``--issue-files`` lists the places, of which the first that knows an issue tells it. A folder holds Markdown files and
JSONL, a few levels deep; what ends in .json or .jsonl is an export; ``gh`` is GitHub's own program.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from cco_sidecar import (
    MB,
    TASK_LENGTH,
    ApiError,
    Contexts,
    IssueNotFound,
    hookimpl,
    is_identifier,
    log_once,
    read_text_file,
    redact,
)
from cco_sidecar_plugins._files import NO_JSON
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.agents._front_matter import read_front_matter
from cco_sidecar_plugins.commands._pipeline_plan import whole_task
from cco_sidecar_plugins.context._fingerprints import Fingerprint, fingerprint, is_young
from cco_sidecar_plugins.context._turn import Turn, current
from cco_sidecar_plugins.context._withheld import is_secret

HEAD = 8 * 1024  # characters of a Markdown file in which its id and title stand
EXPORT = 16 * MB
DEPTH, MAX_FILES = 3, 2_000  # of a folder
IDS = ("number", "key", "identifier", "id", "iid", "issue")
TITLES, BODIES = ("title", "summary", "name"), ("body", "description", "content")
MORE = {"design": "Design", "acceptance_criteria": "Acceptance criteria", "notes": "Notes", "status": "Status",
        "state": "Status"}  # fmt: skip
# Files are anybody's: none of these patterns looks twice at the same text.
FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*+\n(?s:.*?)(?<=\n)(?:---|\.\.\.)[ \t]*+(?:\n|\Z)")
HEADING = re.compile(r"^#[ \t]+(.+)$", re.MULTILINE)
Issue = dict[str, str]


@hookimpl
def resolve_issue(issue_id: str, settings: PluginSettings) -> Issue | None:
    for place in settings.issue_files:
        issue = ask_gh(settings.root, issue_id) if place == "gh" else from_place(settings.root, place, issue_id)
        if issue:
            return {name: redact(text)[0][:TASK_LENGTH] for name, text in issue.items()}
    return None


@hookimpl
def part_class(base: type) -> type | None:
    return type("AskingContexts", (AskingContexts, base), {}) if issubclass(base, Contexts) else None


class AskingContexts(Contexts):
    """Asks plugins for the task of an issue. Requests that are served together, after all had come, ask once. Where no
    place is there, as in most projects, nobody is asked: that takes a thread and a millisecond.
    """

    _settings: PluginSettings
    _asked: tuple[Turn | None, dict[str, asyncio.Task[Issue | None] | None]] = (None, {})

    async def task(self, issue_id: str, sub: str) -> str:
        """What a plugin knows of the issue, and what the agent or the latest spawn was told: of a pipeline's task, the
        part is for the agent alone that it was written for. Raises REQ_002 (404).
        """
        spawned, asking = await super().task(issue_id, sub), self._asking(issue_id)
        if (whole := whole_task(spawned)) != spawned:
            own = self._storage.read.task_of(sub, issue_id, self._settings.project, "")
            spawned = spawned if spawned == own else whole
        if asking is None:
            return spawned
        try:
            issue = await asyncio.shield(asking) or {}  # others wait for it too
        except IssueNotFound:
            raise ApiError("REQ_002", f"No issue {issue_id}") from None
        return "\n\n".join(str(text) for text in (issue.get("title"), issue.get("body"), spawned) if text)

    def _asking(self, issue_id: str) -> asyncio.Task[Issue | None] | None:
        """None where nobody can know the issue."""
        now = current()
        if now is None or now is not self._asked[0]:
            self._asked = now, {}
        asking = self._asked[1]
        if issue_id not in asking:
            ask = functools.partial(self._hooks.first, "resolve_issue", settings=self._settings)
            told = self._may_be_told(issue_id)
            asking[issue_id] = asyncio.create_task(self._hooks.pool.run(ask, issue_id=issue_id)) if told else None
        return asking[issue_id]

    def _may_be_told(self, issue_id: str) -> bool:
        """Whether a place, gh or another plugin may know the issue, by a look at a few names alone."""
        settings = self._settings
        if self._ways is None or ("gh" in settings.issue_files and may_tell(settings.root, issue_id)):
            return True
        return any(map(leads_somewhere, self._ways))

    @functools.cached_property
    def _ways(self) -> list[list[str]] | None:
        """By place: the paths from the root to it. None where one is elsewhere, or another plugin is asked too."""
        root, places = self._settings.root, [Path(place) for place in self._settings.issue_files if place != "gh"]
        functions = [row.function for row in self._hooks.implementations["resolve_issue"]]
        elsewhere = (place.is_absolute() or str(place)[:1] == "~" or ".." in place.parts for place in places)
        if functions != [resolve_issue] or any(elsewhere):
            return None
        return [[str(root / path) for path in (*reversed(place.parents), place)][1:] for place in places]


def leads_somewhere(way: list[str]) -> bool:
    """Whether something may be at the end of these paths: a link is not followed, which can lead to a slow disk."""
    for path in way:
        facts = fingerprint(path)
        if facts is None or stat.S_ISLNK(facts[4]):
            return facts is not None
    return True


def same(issue_id: str, written: Any) -> bool:
    """Whether ``written`` is the id ``issue_id``: in any case of letters, a number also as #12 and GH-12."""
    if isinstance(written, bool) or not isinstance(written, (str, int)):
        return False
    asked, found = issue_id.lower(), str(written).strip().lower().lstrip("#")
    return found in (asked, asked.removeprefix("gh-")) or (found.isdigit() and found.lstrip("0") == asked.lstrip("0"))


# -- files


def located(root: Path, place: str) -> tuple[Path, str]:
    """(folder, path in it) of a place, which the user may have named outside of ``root``. Blocks."""
    full = os.path.join(root, os.path.expanduser(place))
    inside = os.path.relpath(full, root) if os.path.normpath(full).startswith(f"{root}{os.sep}") else ""
    if inside:
        return root, inside
    folder, inside = (Path(full), "") if os.path.isdir(full) else (Path(full).parent, os.path.basename(full))
    return Path(os.path.realpath(folder)), inside


def from_place(root: Path, place: str, issue_id: str) -> Issue | None:
    """The issue from a folder or an export; None where it is not there. Blocks."""
    root, inside = located(root, place)
    if place.endswith((".json", ".jsonl")):
        return from_export(str(root), inside, issue_id)
    found: list[tuple[int, str, Issue]] = []
    for path in files_in(root, inside):
        if path.endswith(".md"):
            rank, issue = from_markdown(str(root), path, issue_id)
            found += [(rank, path, issue)] if issue else []
        elif issue := from_export(str(root), path, issue_id):
            found.append((0 if os.path.basename(path) == "issues.jsonl" else 4, path, issue))  # others are copies
    return min(found, key=lambda row: row[:2])[2] if found else None


def files_in(root: Path, folder: str) -> Iterator[str]:
    """The paths of Markdown and JSONL files in a folder, sorted, without hidden ones. Follows no link."""
    top, number = os.path.join(root, folder), 0
    if os.path.islink(top) and folder:
        return
    for here, folders, names in os.walk(top):
        level = 1 if here == top else os.path.relpath(here, top).count(os.sep) + 2
        folders[:] = sorted(name for name in folders if name[0] != "." and level < DEPTH)
        for name in sorted(names):
            path = os.path.relpath(os.path.join(here, name), root)
            if name.endswith((".md", ".jsonl")) and name[0] != "." and not is_secret(path):
                if (number := number + 1) > MAX_FILES:
                    log_once(f"{folder}: only the first {MAX_FILES} files are looked at for issues")
                    return
                yield path


def unchanged(path: str) -> Fingerprint | None:
    """By what a file is known to be as it was; None where it may change without that. Blocks."""
    now, facts = time.time_ns(), fingerprint(path)
    return None if is_young(facts, now) else facts


def from_markdown(root: str, path: str, issue_id: str) -> tuple[int, Issue | None]:
    """How well a file fits, 0 is best, and the issue if it is that one. Blocks."""
    stem = os.path.basename(path)[:-3]
    facts = unchanged(os.path.join(root, path))
    named, title, _ = (markdown_head if facts else markdown_head.__wrapped__)(root, path, facts)
    rank = next((
        number for number, fits in enumerate((
            same(issue_id, stem), named and same(issue_id, named),
            begins_with(issue_id, title), begins_with(issue_id, stem),
        )) if fits
    ), -1)  # fmt: skip
    if rank < 0 or not (read := read_text_file(root, path, MB)):
        return rank, None
    text = FRONT_MATTER.sub("", read[0].replace("\r\n", "\n"))
    return rank, {"title": title or stem, "body": text.strip()}


def begins_with(issue_id: str, text: str) -> bool:
    first = re.match(r"\W*((?:gh-)?[A-Za-z0-9][\w.-]*)", text)
    if not first or not text:
        return False
    word = first[1].rstrip(".-:")
    parts = [word[: found.start()] for found in re.finditer(r"[-_.]", word)]
    return any(same(issue_id, part) for part in (word, *parts))


@functools.lru_cache(4 * MAX_FILES)
def markdown_head(root: str, path: str, facts: Fingerprint | None) -> tuple[str, str, bool]:
    """(id, title, whether it is readable) of a Markdown file: from its front matter, else its first heading."""
    read = read_text_file(root, path, HEAD)
    if not read:
        return "", "", False
    text = read[0].replace("\r\n", "\n")
    try:
        fields = read_front_matter(text, ("id", "issue", "key", "number", "title"))
    except ValueError:
        fields = {}
    named = next((fields[name] for name in ("id", "issue", "key", "number") if fields.get(name)), "")
    heading = HEADING.search(text)
    return named, fields.get("title") or (heading[1].rstrip(" \t#") if heading else ""), True


def from_export(root: str, path: str, issue_id: str) -> Issue | None:
    """The issue from a JSON array or JSONL; of several entries the last one tells, as in a log. Blocks."""
    for entry in entries_of(root, path):
        if any(same(issue_id, entry.get(name)) for name in IDS):
            told = {name: next((entry[key] for key in keys if isinstance(entry.get(key), str)), "")
                    for name, keys in (("title", TITLES), ("body", BODIES))}  # fmt: skip
            more = {label: entry[key] for key, label in MORE.items() if isinstance(entry.get(key), str) and entry[key]}
            told["body"] = "\n\n".join([told["body"], *(f"{label}: {text}" for label, text in more.items())]).strip()
            return told
    return None


EXPORTS = 4  # whose entries are kept: some four times the size of the file
_entries: dict[tuple[str, str], tuple[Fingerprint, list[dict[str, Any]]]] = {}  # of the last version, by root and path
_entries_lock = threading.Lock()


def entries_of(root: str, path: str) -> list[dict[str, Any]]:
    """The entries of an export, the last one first, read anew where it may have changed. Blocks."""
    key, facts = (root, path), unchanged(os.path.join(root, path))
    with _entries_lock:
        found = _entries.pop(key, None)
        if facts and found and found[0] == facts:
            _entries[key] = found  # as the one that was asked for last
            return found[1]
    del found  # the version before makes room
    entries = read_entries(root, path)
    if facts:
        with _entries_lock:
            _entries[key] = facts, entries
            for other in [*_entries][:-EXPORTS]:
                del _entries[other]
    return entries


def read_entries(root: str, path: str) -> list[dict[str, Any]]:
    """The entries of an export, the last one first. Blocks."""
    if not (read := read_text_file(root, path, EXPORT)):
        return []
    if read[2]:
        log_once(f"{path}: it has over {EXPORT // MB} MB and is not read for issues")
        return []
    content = read[0].removeprefix("\ufeff")
    decode, found = msgspec.json.Decoder().decode, []
    for number, line in enumerate(content.splitlines() if path.endswith(".jsonl") else [content], 1):
        try:
            value = decode(line) if line.strip() else []
        except NO_JSON:
            log_once(f"{path}: line {number} is no JSON")
            continue
        if isinstance(value, dict) and isinstance(rows := value.get("issues") or value.get("items"), list):
            value = rows
        found += [row for row in (value if isinstance(value, list) else [value]) if isinstance(row, dict)]
    return found[::-1]


# -- lists

NO_ISSUES = {"readme", "index", "template", "changelog", "contributing"}  # stems of files beside issues
OVER = {"closed", "done", "resolved", "completed", "cancelled", "wontfix"}
LEADING_ID = re.compile(r"(?:(?:[A-Za-z][A-Za-z0-9]*-)?\d+)(?=[-_. ]|\Z)")  # of a file's name: 12-fix, ISSUE-12_fix


class Written(NamedTuple):
    """An issue that is written down: its id, title, the path of its file, and when that changed."""

    issue_id: str
    title: str
    source: str
    changed: float


def written_issues(settings: PluginSettings) -> Iterator[Written]:
    """The issues that are written down and not over, but for those that only ``gh`` knows. Blocks."""
    for place in settings.issue_files:
        if place == "gh":
            continue
        root, inside = located(settings.root, place)
        is_export = place.endswith((".json", ".jsonl"))
        for path in [inside] if is_export else files_in(root, inside):
            with contextlib.suppress(OSError):  # it is not there, or no longer
                changed = os.stat(os.path.join(root, path)).st_mtime
                for issue_id, title in in_markdown(root, path) if path.endswith(".md") else in_export(root, path):
                    if is_identifier(issue_id):
                        yield Written(issue_id, redact(title)[0][:500], path, changed)


def in_markdown(root: Path, path: str) -> Iterator[tuple[str, str]]:
    """(id, title) of the issue in a Markdown file."""
    stem, facts = os.path.basename(path)[:-3], unchanged(os.path.join(root, path))
    named, title, readable = (markdown_head if facts else markdown_head.__wrapped__)(str(root), path, facts)
    if readable and stem.lower() not in NO_ISSUES:
        leading = LEADING_ID.match(stem)
        yield named.lstrip("#") or (leading[0] if leading else stem), title or stem


def in_export(root: Path, path: str) -> Iterator[tuple[str, str]]:
    """(id, title) of the issues in an export; of several entries with an id the last one tells."""
    seen = set[str]()
    for entry in entries_of(str(root), path):
        issue_id = next((str(entry[name]) for name in IDS if isinstance(entry.get(name), (str, int))), "")
        if issue_id not in seen and str(entry.get("status") or entry.get("state")).lower() not in OVER:
            yield issue_id, next((entry[name] for name in TITLES if isinstance(entry.get(name), str)), "")
        seen.add(issue_id)


# -- GitHub

GH_SECONDS = 4.0  # of the five that a plugin has
GH_ISSUE = re.compile(r"(?:gh-)?([1-9][0-9]{0,8})", re.IGNORECASE)
GH_FIELDS = "number,title,body,state"
KEPT, KEPT_NOTHING = 300.0, 60.0  # seconds for which an answer of gh is good
_told: dict[tuple[str, str], tuple[float, Issue | None]] = {}  # by root and number
_told_lock = threading.Lock()
NOT_ASKED = 0.0, None


def ask_gh(root: Path, issue_id: str) -> Issue | None:
    """What gh says of the issue that a number or GH-number names, asked again after some minutes. Blocks."""
    number = GH_ISSUE.fullmatch(issue_id)
    if not number:
        return None
    key, now = (str(root), number[1]), time.monotonic()
    good_until, issue = _told.get(key, NOT_ASKED)
    if good_until <= now:
        issue = run_gh(root, number[1])
        with _told_lock:
            if len(_told) >= 1_000:
                _told.clear()
            _told[key] = now + (KEPT if issue else KEPT_NOTHING), issue
    return issue


def may_tell(root: Path, issue_id: str) -> bool:
    """Whether gh knows the issue, or is to be asked: not where it said nothing a moment ago."""
    number = GH_ISSUE.fullmatch(issue_id)
    if not number:
        return False
    good_until, issue = _told.get((str(root), number[1]), NOT_ASKED)
    return issue is not None or good_until <= time.monotonic()


def run_gh(root: Path, number: str) -> Issue | None:
    """None where gh is not installed, no such issue, nobody logged in, no network, or no answer in time."""
    program = shutil.which("gh")
    if program is None:
        return None
    quiet = {"GH_PROMPT_DISABLED": "1", "GH_NO_UPDATE_NOTIFIER": "1", "NO_COLOR": "1"}
    words = [program, "issue", "view", number, "--json", GH_FIELDS]
    try:
        said = subprocess.run(
            words, cwd=root, env=os.environ | quiet, stdin=subprocess.DEVNULL, capture_output=True, timeout=GH_SECONDS
        )
        told = msgspec.json.decode(said.stdout, type=dict[str, Any]) if said.returncode == 0 else {}
    except (OSError, subprocess.TimeoutExpired, *NO_JSON) as error:
        log_once(f"gh does not tell of issues: {type(error).__name__}")
        return None
    if not isinstance(told.get("title"), str):
        return None
    state = f"\n\nStatus: {told['state']}" if isinstance(told.get("state"), str) else ""
    return {"title": told["title"], "body": f"{told.get('body') or ''}{state}".strip()}

"""Fits a context into its budget so that little of what the task needs is lost.

Sections that take more than their share give way as far as the files need it, then large files are given as their best
chunks of 50 lines, then the least relevant files go; what room remains goes to those that were cut.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import math
import secrets
from collections.abc import Callable
from typing import Any

import msgspec

from cco_sidecar import (
    ApiError,
    BuiltContext,
    ContextKey,
    ContextRequest,
    Contexts,
    GitContext,
    ProjectState,
    Sections,
    checksum,
    clean_text,
    hookimpl,
    json_size,
    log,
    one_line,
)
from cco_sidecar_plugins._hooks import failing
from cco_sidecar_plugins.context._sections import SECTION_TYPES
from cco_sidecar_plugins.context.keywords import WORDS, task_words

SHARES = {  # of the budget, what a section keeps at most where the files need the room
    "project_structure": 0.05, "git_context": 0.05, "previous_agent_outputs": 0.25,
}  # fmt: skip
LEAST = 800  # bytes: less of a file than this is not worth having


CUTTABLE_SECTIONS = SECTION_TYPES.keys() - {"metadata"}


@hookimpl(trylast=True)  # nearest to the core's own: others take what it gives
def part_class(base: type) -> type | None:
    return type("BoundedContexts", (BoundedContexts, base), {}) if issubclass(base, Contexts) else None


class BoundedContexts(Contexts):
    """Passes over sections for which there is no room, and those that are not what their names say. A context names the
    plugins that failed while it was built, and is not kept where there are any.
    """

    def start(self) -> None:
        for shape in SECTION_TYPES.values():  # msgspec 0.22 crashes where two threads are the first to use a type
            msgspec.json.Decoder(shape)
        named = {str(name) for _, names in self._hooks.ask("section_files") for name in names}
        self.project.also = sorted({*self.project.also, *named})
        super().start()

    def _build(self, key: ContextKey, rows: list[bytes], state: ProjectState, etag: str) -> BuiltContext:
        failing.names.clear()
        fresh, shared, etag = super()._build(key, rows, state, etag)
        return fresh, shared, f'W/"{secrets.token_hex(16)}"' if failing.names else etag

    def sections(self, request: ContextRequest) -> Sections:
        sections: Sections = {}
        room = request.max_bytes - 1_000
        answers = list(self._hooks.ask("context_section", request=request))
        most = most_letters(
            request, next((answer["relevant_files"] for _, answer in answers if "relevant_files" in answer), [])
        )
        for name, answer in reversed(answers):  # so that later plugins win
            try:
                if isinstance(structure := answer.get("project_structure"), dict):
                    answer = answer | {"project_structure": without_deepest(structure, 2 * most["project_structure"])}
                if isinstance(git := answer.get("git_context"), GitContext):
                    answer = answer | {"git_context": without_endless_commits(git, most["git_context"])}
                if isinstance(outputs := answer.get("previous_agent_outputs"), list):
                    answer = answer | {"previous_agent_outputs": without_oldest(outputs, request.max_bytes)}
                given = msgspec.json.decode(msgspec.json.encode(answer))
                size = json_size({name: part for name, part in given.items() if name not in CUTTABLE_SECTIONS})
                if size > room:
                    raise ValueError(f"its sections have {size:,} bytes, for which there is no room")
                room -= size
                for section in SECTION_TYPES.keys() & given.keys():
                    msgspec.convert(given[section], SECTION_TYPES[section])
                if "metadata" in given:
                    given["metadata"] = sections.get("metadata", {}) | given["metadata"]
                sections |= given
            except (TypeError, ValueError, LookupError, AttributeError) as error:
                log.warning("plugin %s: context_section: %s", name, one_line(error))
                failing.names.add(name)
        if missing := SECTION_TYPES.keys() - sections.keys():
            raise RuntimeError(f"sections {sorted(missing)} could not be made")
        if failing.names:
            sections["metadata"]["plugins_failed"] = sorted(failing.names)
        more = [name for name in sections if name not in SECTION_TYPES]
        return {name: sections[name] for name in [*SECTION_TYPES, *more]}

    def fit(self, request: ContextRequest, sections: Sections, max_bytes: int) -> bool:
        files, sections["relevant_files"] = sections["relevant_files"], []
        chunks = {clean_text(item.path): item.chunks for item in request.ranked}
        for file in files:
            if not chunks.get(file["path"]) and request.task and len(file["content"]) > request.max_bytes / 8:
                chunks[file["path"]] = score_chunks(file["content"], request.task)
        sizes = {id(file): json_size(file) + 1 for file in files}
        wanted = sum(min(size, max_bytes + 1) for size in sizes.values())
        cut = cut_sections(sections, max_bytes, wanted)
        left = max_bytes - json_size(sections)
        if left < 0:
            raise ApiError("CTX_002", f"The context cannot be cut below {max_bytes} bytes: ask for more")
        chosen = sections["relevant_files"] = choose_files(files, sizes, chunks, left)
        return cut or len(chosen) < len(files)


def most_letters(request: ContextRequest, files: Any) -> dict[str, int]:
    """How many letters the names in a section may have: as many as the context, its share where ``files`` fill that."""
    letters = 0
    with contextlib.suppress(TypeError, LookupError):  # a plugin's may be anything
        letters = sum(len(file["content"]) for file in files[: request.max_files])
    full = letters >= request.max_bytes
    return {name: int(request.max_bytes * (share if full else 1)) for name, share in SHARES.items()}


def without_deepest(structure: dict[str, Any], most: int) -> dict[str, Any]:
    """The structure without the names that are deepest beyond ``most`` letters of files, and as many of folders: so
    that nobody looks for secrets in what cannot be given.
    """
    lists = {kind: shallowest(tuple(structure[kind]), most) for kind in ("files", "directories")}
    return structure | {kind: names for kind, names in lists.items() if len(names) < len(structure[kind])}


@functools.lru_cache(8)  # an edit changes no name
def shallowest(names: tuple[str, ...], most: int) -> tuple[str, ...]:
    by_depth = sorted(names, key=lambda name: name.count("/"))
    ends = list(itertools.accumulate(map(len, by_depth), initial=0))
    return tuple(sorted(by_depth[: bisect.bisect(ends, most) - 1])) if ends[-1] > most else names


def without_oldest(outputs: list[Any], most: int) -> list[Any]:
    """The newest outputs, up to the one with which they have more than ``most`` bytes, for the same reason."""
    sizes = itertools.accumulate(json_size(output) for output in reversed(outputs))
    fitting = sum(1 for _ in itertools.takewhile(lambda size: size <= most, sizes))
    return outputs[max(0, len(outputs) - fitting - 1) :]


def without_endless_commits(git: GitContext, most: int) -> GitContext:
    """What git says, with the first half of a commit's names, again and again, while that half alone has more than
    ``most`` letters. ``cut_git`` comes to the same, but only after all names were searched for secrets and measured.
    """
    commits = []
    for commit in git.recent_commits:
        names = commit.files_changed
        while len(names) > FEW_NAMES and sum(map(len, names[: len(names) // 2])) > most:
            names = names[: len(names) // 2]
        commits.append(msgspec.structs.replace(commit, files_changed=names))
    return msgspec.structs.replace(git, recent_commits=commits)


FEW_NAMES = 10  # of a commit: so many are not cut while there is anything else


def cut_sections(sections: Sections, room: int, wanted: int) -> bool:
    """Cut what is not files, first to its share and only as far as ``wanted`` bytes of files need, then as far as it
    must.
    """
    cut, total = False, json_size(sections)
    for share, needed in ((SHARES, wanted), (dict.fromkeys(SHARES, 0.0), 0)):
        for name in reversed(share):  # the structure last
            over = total + needed - room
            if over > 0:
                size = json_size(sections[name])
                cut = CUTTERS[name](sections, max(int(share[name] * room), size - over)) or cut
                total += json_size(sections[name]) - size
    return cut


def cut_outputs(sections: Sections, limit: int) -> bool:
    """Leave out the oldest outputs until the JSON of the rest has at most ``limit`` bytes."""
    outputs = sections["previous_agent_outputs"]
    sizes = [json_size(output) + 1 for output in outputs]
    first, total = 0, sum(sizes) + 2
    while first < len(outputs) and total > limit:
        total -= sizes[first]
        first += 1
    sections["previous_agent_outputs"] = outputs[first:]
    return first > 0


def cut_git(sections: Sections, limit: int) -> bool:
    """Shorten the longest list of the git section, by halves, until its JSON has at most ``limit`` bytes."""
    git = sections["git_context"]
    cut = False
    while json_size(git) > limit:
        commits = [commit for commit in git["recent_commits"] if len(commit["files_changed"]) > FEW_NAMES]
        lists = [(git, name) for name in ("recent_commits", "uncommitted_changes") if git[name]]
        lists = [(commit, "files_changed") for commit in commits] or lists
        if not lists:
            break
        holder, name = max(lists, key=lambda item: json_size(item[0][item[1]]))
        holder[name], cut = holder[name][: len(holder[name]) // 2], True
    return cut


def cut_structure(sections: Sections, limit: int) -> bool:
    """Shorten the lists of files and folders, deepest first, until the JSON has at most ``limit`` bytes."""
    structure, cut = sections["project_structure"], False
    size = json_size(structure)
    for name in ("files", "directories"):
        by_depth = sorted(sorted(structure[name]), key=lambda path: path.count("/")) if size > limit else []
        while size > limit and by_depth:
            by_depth = by_depth[: min(int(len(by_depth) * limit / size), len(by_depth) - 1)]
            structure[name], cut = sorted(by_depth), True
            size = json_size(structure)
    return cut


CUTTERS: dict[str, Callable[[Sections, int], bool]] = {
    "project_structure": cut_structure, "git_context": cut_git, "previous_agent_outputs": cut_outputs,
}  # fmt: skip


Chunks = list[tuple[int, float]]  # of a file: first line and score


def choose_files(
    files: list[dict[str, Any]], sizes: dict[int, int], chunks: dict[str, Chunks], room: int
) -> list[dict[str, Any]]:
    """What fits into ``room`` bytes of JSON, most relevant first; ``sizes`` by ``id`` and with a comma, ``chunks`` by
    path.

    All of them whole where there is room; else each up to a quarter of the room that those before it have left, so that
    no few of them take it all, and what then remains goes to those that were given in part.
    """
    if sum(sizes.values()) <= room:
        return files
    chosen: list[tuple[dict[str, Any], dict[str, Any], int]] = []  # (whole, as given, its size)
    for file in files:
        limit, given, size = min(room, max(LEAST, room // 4)), file, sizes[id(file)]
        if size > limit:
            shorter = cut_file(file, limit - 1, chunks.get(file["path"], [])) if limit >= LEAST else None
            if shorter is None:
                continue
            given, size = shorter, json_size(shorter) + 1
        chosen.append((file, given, size))
        room -= size
    for number, (file, given, size) in enumerate(chosen):
        if given is not file and room >= LEAST:
            whole = sizes[id(file)] <= size + room
            more = file if whole else cut_file(file, size + room - 1, chunks.get(file["path"], [])) or given
            room += size - json_size(more) - 1
            chosen[number] = (file, more, json_size(more) + 1)
    return [given for _, given, _ in chosen]


def cut_file(file: dict[str, Any], limit: int, chunks: Chunks) -> dict[str, Any] | None:
    """The file in part, its JSON at most ``limit`` bytes: its best chunks, else its beginning; None where not one line
    fits.
    """
    shorter = {**file, "truncated": True, "checksum": checksum("")}
    lines = file["content"].split("\n")
    ranges = best_ranges(lines, chunks, limit - json_size({**shorter, "content": "", "line_ranges": []}))
    if ranges:
        shorter |= {"line_ranges": ranges, "content": "".join(excerpt(lines, first, last) for first, last in ranges)}
    else:
        content = cut_text(file["content"], limit - json_size({**shorter, "content": ""}))
        if not content:
            return None
        shorter["content"] = content
    return shorter | {"checksum": checksum(shorter["content"])}


CHUNK_LINES = 50


def best_ranges(lines: list[str], chunks: Chunks, room: int) -> list[tuple[int, int]]:
    """(first, last) of the lines, numbered from 1, of the best chunks that fit into ``room`` bytes; in file order,
    neighbours joined.
    """
    taken: list[int] = []
    for first, _ in sorted(chunks, key=lambda chunk: -chunk[1]):
        last = min(first + CHUNK_LINES - 1, len(lines))
        size = json_size(excerpt(lines, first, last)) + len(f"[{first},{last}],")
        if first <= last and size <= room and first not in taken:
            taken.append(first)
            room -= size
    ranges: list[tuple[int, int]] = []
    for first in sorted(taken):
        last = min(first + CHUNK_LINES - 1, len(lines))
        if ranges and ranges[-1][1] >= first - 1:
            ranges[-1] = (ranges[-1][0], last)
        else:
            ranges.append((first, last))
    return ranges


def excerpt(lines: list[str], first: int, last: int) -> str:
    """Lines ``first`` to ``last`` under a line that says which they are."""
    return f"[lines {first}-{last} of {len(lines)}]\n" + "\n".join(lines[first - 1 : last]) + "\n"


def score_chunks(content: str, task: str) -> Chunks:
    """(first line, score) of a text's 50-line chunks by the task's words that they hold, the rare ones more; for
    rankings that give none.
    """
    lines = content.split("\n")
    blocks = [
        (first + 1, "\n".join(lines[first : first + CHUNK_LINES]).lower())
        for first in range(0, len(lines), CHUNK_LINES)
    ]
    scores = dict.fromkeys((first for first, _ in blocks), 0.0)
    for word in task_words(task, WORDS):
        holding = [(first, text.count(word)) for first, text in blocks if word in text]
        for first, count in holding:
            scores[first] += math.log(1 + len(blocks) / len(holding)) * count / (count + 1)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def cut_text(content: str, room: int) -> str:
    """The beginning of ``content``, to a line's end, of which JSON takes ``room`` bytes at most (without quotes)."""
    while content and (size := json_size(content) - 2) > room:
        keep = int(len(content) * max(0, room) / size)
        content = content[: content.rfind("\n", 0, min(keep, len(content) - 1)) + 1]
    return content

"""The brief: a context in Markdown of 10 kB at most, in lines of at most 200 characters, which every program can read.

Task, what its reader may do and how, what earlier agents decided, the files worth reading with their best lines, the
state of git, and what plugins add. Whatever others wrote (tasks, decisions, names, commit messages) stands in code,
which has no markup: the task and what plugins add as indented blocks, all else as a span in a line of its own. No
command is folded, however long its paths.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import textwrap
import typing
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import msgspec

import cco_sidecar
from cco_sidecar import (
    BYTES_PER_TOKEN,
    CATEGORIES,
    AgentCommand,
    AgentEndpoint,
    AgentLaunch,
    ApiError,
    ContextKey,
    ContextRequest,
    Contexts,
    Launcher,
    ProjectState,
    RankedFile,
    Route,
    Running,
    Sections,
    hookimpl,
    redact,
)
from cco_sidecar_plugins._files import content_of
from cco_sidecar_plugins._hooks import failing
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins._words import counted
from cco_sidecar_plugins.agents._reader import BriefQuery, Reader, ReadingLauncher, brief_query
from cco_sidecar_plugins.agents.keeper import NotingAgents
from cco_sidecar_plugins.agents.prompts import EXAMPLE, instructions, reader_of
from cco_sidecar_plugins.commands._pipeline_plan import MADE
from cco_sidecar_plugins.context._sections import SECTION_TYPES

log = logging.getLogger("cco")

Neighbours = dict[str, set[str]]  # kind of neighbour: paths

try:
    from cco_sidecar_plugins.context.relevance import neighbours
except ImportError:

    def neighbours(root: str, paths: Sequence[str]) -> dict[str, Neighbours]:
        """Without the plugin relevance none are known."""
        return {}


BYTES, LINE = 10_000, 200
FOLDED = re.compile(rf".{{1,{LINE - 4}}}(?:\s|$)|.{{{LINE - 4}}}")
BRIEF = "brief.md"  # in an agent's folder
CHUNK_LINES = 50
TASK, DECISIONS, GIT = 1_600, 1_800, 1_000  # bytes at most; what they leave is for files
ADDED = 2_000  # for all sections of plugins together
DETAILED = 12  # files with reasons
CENTRAL = 5  # files with their neighbours
LISTED = 80
NEIGHBOURS = 4  # of a kind

NO_MATCH = "No word of the task occurs in the project: these files are in the order without a task."
OWN_CURL_FILE = """\
Here CURL_FILE is a file that nobody else can read, with these two lines and your token:
  header = "Authorization: Bearer TOKEN"
  header = "Content-Type: application/json"
"""


@hookimpl
def register_routes() -> list[Route]:
    return [
        Route("GET", "/api/context/{issue_id}/{agent_type}", GetContext),
        Route("GET", "/api/agents/{agent_id}/brief", GetAgentBrief),
    ]


class GetContext(cco_sidecar.GetContext):
    """Context for an agent type on an issue. ETag and If-None-Match are honoured."""

    async def respond(self, issue_id: str, agent_type: str) -> bytes:
        self._headers["Vary"] = "Accept"  # nothing else has come to stand there yet
        if prefers_markdown(", ".join(self.request.headers.get_list("Accept"))):
            self.content_type = "text/markdown; charset=utf-8"
            self.query = brief_query(self.query, reader_of(self.sidecar.agents, self.claims, issue_id))
        return await super().respond(issue_id, agent_type)


class GetAgentBrief(AgentEndpoint):
    """The brief that an agent got at its start, as long as it is kept."""

    answers = {200: str}
    content_type = "text/markdown; charset=utf-8"

    async def respond(self, agent_id: str) -> bytes:
        self.find(agent_id)
        agents = typing.cast(NotingAgents, self.sidecar.agents)
        agents.check_here(agent_id)
        folder = self.sidecar.settings.storage / "agents" / agent_id
        brief = await agents.disk.run(content_of, folder / BRIEF)
        if not brief:
            kept = "got no brief" if folder.exists() else "has none any more (--agent-retention)"
            raise ApiError("REQ_002", f"The agent {agent_id} {kept}")
        text: str = brief[: 10 * BYTES].decode("utf-8", "replace")
        return text.encode()


@functools.lru_cache(32)
def prefers_markdown(accept: str) -> bool:
    """Whether an Accept header (RFC 9110, 12.5.1) wants text/markdown more than application/json; for each the most
    specific range counts. Where it wants both alike, or says nothing, JSON is given.
    """
    ranges: dict[str, float] = {}
    for item in accept.lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        weight = next((part[2:].strip() for part in parameters if part.startswith("q=")), "1")
        ranges[name] = float(weight) if re.fullmatch(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?", weight) else 0.0
    wanted = [
        next((ranges[name] for name in (kind, f"{kind.partition('/')[0]}/*", "*/*") if name in ranges), 0.0)
        for kind in ("text/markdown", "application/json")
    ]
    return wanted[0] > wanted[1]


@hookimpl
def context_brief(request: ContextRequest, sections: Sections, reader: Reader) -> str:
    title = f"# Brief for {code(request.agent_type)} on {code(request.issue_id)}"
    no_file = not reader.how and not reader.curl_file.startswith("/")
    how = instructions(reader) + (f"\n{OWN_CURL_FILE}" if no_file else "")
    whose = []
    if reader.agent_type != request.agent_type:
        may = ", ".join(CATEGORIES[request.category].permissions)
        whose = [f"An agent of the type {code(request.agent_type, 60)} may: {may}.", ""]
        whose += [f"Your token is of the type {code(reader.agent_type, 60)}:", ""]
    limit = min(BYTES, request.max_bytes)
    share = limit / BYTES
    outputs, git = sections["previous_agent_outputs"], sections["git_context"]
    parts = [
        [title, "", "## Task", "", *task_lines(redact(request.task)[0], int(TASK * share))],
        ["", "## What you may do, and how", "", *whose, *textwrap.indent(how.strip(), "    ").split("\n")],
        ["", "## What was decided so far, newest first", "", *decision_lines(outputs, int(DECISIONS * share))],
        ["", "## Git", "", *git_lines(git, int(GIT * share))],
        *added_parts(sections, int(ADDED * share)),
    ]
    unmatched = bool(request.task) and not any(item.matched for item in request.ranked)
    head = ["", "## Files worth reading, best first", "", *([NO_MATCH, ""] if unmatched else [])]
    files = [*head, *file_lines(request)] if request.ranked else [*head, "None."]
    parts.insert(3, fitting(files, limit - sum(map(size, parts))))
    return "\n".join(fitting([line for part in parts for line in part], limit)) + "\n"


# -- for a spawned agent


@hookimpl(tryfirst=True)  # it remembers what the others give
def part_class(base: type) -> type | None:
    if issubclass(base, Contexts):
        return type("BriefContexts", (BriefContexts, base), {})
    return type("BriefLauncher", (BriefLauncher, base), {}) if issubclass(base, Launcher) else None


class Shared:
    """What the contexts for one spawn, each cut to another size, and its brief have in common."""

    built: tuple[ContextRequest, bytes, bytes] | None = None  # the largest, and its sections, without files too

    def of(self, key: ContextKey, outputs: Any, digest: str) -> tuple[ContextRequest, bytes, bytes] | None:
        """What was built of the same project and results, None where that is too little."""
        if self.built is None:
            return None
        before = self.built[0]
        same = (before.project.digest, before.task, before.outputs) == (digest, key.task, outputs)
        holds = key.reader or (before.max_files >= key.max_files and before.max_bytes >= key.max_bytes)
        return self.built if same and holds else None


class Redacted(dict[str, Any]):
    """Sections that hold no secrets any more."""


class BriefContexts(Contexts):
    """Answers a reader by a brief. A spawn's contexts and its brief share one ranking and its redacted sections."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._sharing: weakref.WeakValueDictionary[tuple[str, str], Shared] = weakref.WeakValueDictionary()

    @contextlib.contextmanager
    def sharing(self, issue_id: str, agent_type: str) -> Iterator[Shared]:
        """What is asked for meanwhile is built from what was built meanwhile, where that is still so."""
        shared = self._sharing.setdefault((issue_id, agent_type), Shared())
        yield shared  # and it lives until then

    def _shared(self, key: ContextKey) -> Shared | None:
        return self._sharing.get((key.issue_id, key.agent_type))

    def rank(self, key: ContextKey, outputs: list[dict[str, Any]], state: ProjectState) -> list[RankedFile]:
        shared = self._shared(key)
        known = shared and shared.of(key, outputs, state.digest)
        return known[0].ranked if known else super().rank(key, outputs, state)

    def sections(self, request: ContextRequest) -> Sections:
        shared = self._shared(request)
        if not shared or not (known := shared.of(request, request.outputs, request.project.digest)):
            return super().sections(request)
        _, whole, lean = known
        sections = Redacted(msgspec.json.decode(lean if request.reader else whole))
        failing.names.update(sections["metadata"].get("plugins_failed", ()))
        return sections

    def redacted(self, sections: Sections) -> Sections:
        return dict(sections) if isinstance(sections, Redacted) else super().redacted(sections)

    def answer(self, request: ContextRequest, sections: Sections) -> tuple[bytes, bytes]:
        lean = sections | {"relevant_files": []}
        if request.reader is None:
            shared = self._shared(request)
            if shared and type(request.ranked) is list:  # one of another type: an index was not whole
                shared.built = request, msgspec.json.encode(sections), msgspec.json.encode(lean)
            return super().answer(request, sections)
        text = self._hooks.first("context_brief", request=request, sections=lean, reader=request.reader)
        if text is None:
            raise ApiError("CTX_001", "No brief could be made; ask for application/json")
        brief = redact(text)[0].encode("utf-8", "replace")
        return brief, brief


class BriefLauncher(ReadingLauncher):
    """Gives an agent a brief beside its context, and that with one value a line, within its limit."""

    settings: PluginSettings
    contexts: BriefContexts

    async def files(self, running: Running, body: dict[str, Any]) -> dict[str, bytes]:
        with self.contexts.sharing(body["issue_id"], body["agent_type"]):
            files = await self._context(running, body)
            return files | await self._brief(body, self.reader(running.row, running.folder))

    async def _context(self, running: Running, body: dict[str, Any]) -> dict[str, bytes]:
        limit = body.get("context_tokens") or self.settings.agent_context_tokens
        room, most, text = limit - limit // 16, limit * BYTES_PER_TOKEN, b""
        while True:
            try:
                files = await super().files(running, body | {"context_tokens": room})
            except ApiError:
                if not text:
                    raise
                break  # it cannot be cut further
            text = msgspec.json.format(files["context.json"], indent=1)
            if (size := len(text)) <= most or room <= 500:
                break
            room = max(500, min(room, len(files["context.json"]) // BYTES_PER_TOKEN) * most // size - 50)  # indented
        return files | {"context.json": text}

    def launch(self, running: Running, files: Collection[str]) -> AgentLaunch:
        launch = super().launch(running, files)
        return msgspec.structs.replace(launch, brief_file=str(running.folder / BRIEF)) if BRIEF in files else launch

    async def command(self, running: Running, files: dict[str, bytes], asked: dict[str, str]) -> AgentCommand:
        command = await super().command(running, files, asked)
        if BRIEF in files:
            command.environment["CCO_BRIEF_FILE"] = str(running.folder / BRIEF)
        return command

    async def _brief(self, body: dict[str, Any], reader: Reader) -> dict[str, bytes]:
        query = BriefQuery(task=body.get("task", ""), reader=reader)
        try:
            content, _ = await self.contexts.get(body["issue_id"], body["agent_type"], query)
            return {BRIEF: content}
        except ApiError as error:
            log.error("agent %s: %s", reader.agent_id, error.message)
            return {}


# -- the sections


def task_lines(task: str, room: int) -> list[str]:
    whole = indented(task)
    lines = fitting(whole, room)
    return [*lines, *(["", "The task goes on: $TASK has the rest."] if lines < whole else [])] or ["None was given."]


def decision_lines(outputs: list[dict[str, str]], room: int) -> list[str]:
    """A line a decision, the newest result's first. What an agent's later result says again is told by that one, and
    the prompt's own example, sent back as it was, is no decision.
    """
    lines, told = [], set[tuple[str, str]]()
    for output in reversed(outputs):
        made = output["rationale"].startswith(MADE)  # by the service, and then by the pipeline in other words
        if (said_by := (output["agent"], output["decision"] or ("" if made else output["rationale"]))) in told:
            continue
        told.add(said_by)
        who = f"- {code(output['agent_type'], 60)}, {output['status']}, {output['timestamp'][:16]}: "
        said = [text for text in output["decision"].split("; ") if text not in ("", EXAMPLE)]
        said = said or [output["rationale"] or "no decision"]
        lines += [who + code(text, LINE - len(who) - 8) for text in said]
    return fitting(lines, room, "- and {} earlier") or ["Nothing yet."]


def git_lines(git: dict[str, Any], room: int) -> list[str]:
    changes, commits = git["uncommitted_changes"], git["recent_commits"]
    branch = (
        f"Branch {code(git['branch'] or 'none')}" if git["branch"] or not commits else "No branch: HEAD is detached"
    )
    lines = [f"{branch}, {counted(len(changes), 'uncommitted change')}, {counted(len(commits[:5]), 'last commit')}."]
    conflicts = sum(item.get("conflict", False) for item in changes)
    if conflicts or git.get("in_progress"):
        operation = f"In progress: {code(git['in_progress'])}, " if git.get("in_progress") else ""
        lines += [f"{operation}{counted(conflicts, 'file')} in conflict."]
    lines += ["", *(f"- commit {code(commit['hash'], 40)} {code(commit['message'], 100)}" for commit in commits[:5])]
    told = ["in conflict" if item.get("conflict") else item["status"] for item in changes]
    changed = [
        f"- {status} {path_code(item['path'])} {item['diff'] or ''}".rstrip()
        for status, item in zip(told, changes, strict=True)
    ]
    return [*lines, *fitting(changed, room - size(lines), "- and {} more")]


def file_lines(request: ContextRequest) -> Iterator[str]:
    """The ranked files: the first with reasons and neighbours, then more of them by name."""
    known = {file.path for file in request.project.files}
    ranked = request.ranked[:LISTED]
    order = {item.path: place for place, item in enumerate(request.ranked)}
    central = [item.path for item in ranked[:CENTRAL]] if request.task else []
    near = neighbours(request.project.root, central)
    for place, item in enumerate(ranked):
        line = f"- {path_code(item.path)}{best_lines(item)}"
        reasons, room = redact("; ".join(item.reasons))[0] if place < DETAILED else "", LINE - len(line) - 8
        yield f"{line}: {code(reasons, room)}" if room > 20 and reasons else line
        yield from neighbour_lines(near.get(item.path, {}), order, known)


def neighbour_lines(near: Neighbours, order: dict[str, int], known: set[str]) -> Iterator[str]:
    """A line for each kind of neighbour, the best ranked ones of it."""
    for kind, paths in near.items():
        line = f"  - {kind} "
        best = sorted(known & paths, key=lambda path: (order.get(path, len(order)), path))[:NEIGHBOURS]
        spans = [path_code(path) for path in best]
        while spans and len(line) + len(", ".join(spans)) > LINE:
            spans.pop()
        if spans:
            yield line + ", ".join(spans)


def best_lines(item: RankedFile) -> str:
    """The lines of a file's two best chunks; nothing where the ranking knows none, or all of the file is worth it."""
    last = max((first for first, _ in item.chunks), default=0)
    least = max(0.01, item.chunks[0][1] / 4) if item.chunks else 0.0  # below only a neighbour matches, or nothing does
    best = sorted(first for first, score in item.chunks[:2] if score > least)
    if len(best) == 2 and best[1] == best[0] + CHUNK_LINES:
        best, width = best[:1], 2 * CHUNK_LINES
    else:
        width = CHUNK_LINES
    ends = ["end" if first + width > last else str(first + width - 1) for first in best]
    return " lines " + ", ".join(f"{first}-{end}" for first, end in zip(best, ends, strict=True)) if best else ""


# -- others' text in Markdown

BREAKS = (  # control signs, what is not seen or turns the direction, and halves of pairs
    "\\x00-\\x1f\\x7f-\\x9f\\xad\\u061c\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ud800-\\udfff"
)


def code(text: str, limit: int = 150) -> str:
    """``text``, cut to ``limit`` characters, as one code span (CommonMark 0.31, 6.1), whatever it holds."""
    return span(re.sub(rf"[\s{BREAKS}]+", " ", text).strip(), limit)


def path_code(path: str) -> str:
    """The same for a path, whose blanks count."""
    return span(re.sub(rf"[{BREAKS}]", "\ufffd", path), 160)


def span(text: str, limit: int) -> str:
    text = text if len(text) <= limit else text[: max(0, limit - 3)] + "..."
    longest = max(map(len, re.findall("`+", text)), default=0)
    if longest > 3:
        text, longest = text.replace("`", "'"), 0
    fence = "`" * (longest + 1)
    pad = " " if not text.strip() or "`" in (text[0], text[-1]) else ""
    return f"{fence}{pad}{text or '-'}{pad}{fence}"


def added_parts(sections: Sections, room: int) -> Iterator[list[str]]:
    """The sections that plugins add, which share the room."""
    added = {name: value for name, value in sections.items() if name not in SECTION_TYPES}
    for name, value in added.items():
        head = ["", f"## {code(name, 60)}", ""]
        whole = indented(msgspec.json.format(msgspec.json.encode(value), indent=1).decode())
        rest = "The context in JSON has the rest."
        lines = fitting(whole, room // len(added) - size([*head, "", rest]))
        yield [*head, *lines, *(["", rest] if lines < whole else [])]


def indented(text: str) -> list[str]:
    """``text`` as an indented code block (CommonMark 0.31, 4.4); a long line is folded, between words if it can be."""
    lines = []
    for line in text.strip().expandtabs(4).splitlines():
        line = re.sub(rf"[{BREAKS}]", "\ufffd", line.rstrip())
        lines += ["    " + part.rstrip() for part in FOLDED.findall(line)] or [""]
    return lines


def fitting(lines: Iterable[str], room: int, rest: str = "") -> list[str]:
    """The first lines that fit into ``room`` bytes; ``rest`` then says how many do not."""
    lines = list(lines)
    taken: list[str] = []
    for number, line in enumerate(lines):
        room -= size([line])
        if (room < len(rest) + 10 * bool(rest) and number < len(lines) - 1) or room < 0:
            return [*taken, rest.format(len(lines) - number)] if rest else taken
        taken.append(line)
    return taken


def size(lines: list[str]) -> int:
    return sum(len(line.encode("utf-8", "replace")) + 1 for line in lines)

"""Relevance: the files that an agent's task is about, from an index that keeps itself up to date.

The ranking is lexical and looks at more than the text of a file. Every identifier is taken apart (``SessionCookie`` is
also session and cookie), files are searched in chunks of 50 lines, and what a file defines, is called, lies beside,
imports, is tested by and was changed for adds to its score:

    query     words of the task, title heavier than body, then of what earlier agents decided (_query.py)
    features  thirteen numbers per file, each divided by its largest in the project (_ranking.py, as all that follows)
    stages    the sum of what the query alone says picks the best files; their folders, imports and tests then add to
              the sums of others
    score     the sum times a factor for the file's kind and language, plus what is certain

Sources: Robertson and Zaragoza, The Probabilistic Relevance Framework (BM25; SQLite's bm25() computes it); Saha et al.,
BLUiR (identifiers taken apart, definitions apart from text); Zhou et al., BugLocator (past changes with similar
descriptions). The weights are fitted to the histories of open-source projects and flat: no single one matters much.

The index is one SQLite file with FTS5 tables, ``relevance.sqlite``, and can be thrown away at any time. Small changes
are taken up within a call. The first build and large changes are the work of a child process (``relevance.py build``)
that leaves the service's interpreter alone; until it is done the answer is "not now". Every write is a transaction over
whole files, so a reader or a builder that dies at any moment leaves an index that is used and completed.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # the builder: the module is where its starter says, and need not be on the path
    import importlib.util
    from pathlib import Path

    _spec = importlib.util.spec_from_file_location("cco_sidecar", sys.argv[2])
    assert _spec and _spec.loader
    sys.modules["cco_sidecar"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["cco_sidecar"])
    sys.modules["cco_sidecar"].import_file(Path(__file__).with_name("_withheld.py"))  # makes the package of plugins

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import secrets
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

import cco_sidecar
from cco_sidecar import (
    BuiltContext,
    ContextKey,
    ContextQuery,
    ContextRequest,
    Contexts,
    FileFact,
    ProjectState,
    RankedFile,
    RankRequest,
    Sections,
    hookimpl,
    in_thread,
    redact,
)
from cco_sidecar_plugins._hooks import waits_for_nothing
from cco_sidecar_plugins.context._facts import Facts, Neighbours, Past, module_path
from cco_sidecar_plugins.context._identifiers import pair_stem
from cco_sidecar_plugins.context._index import MAX_FILE, Index
from cco_sidecar_plugins.context._prepared import PreparedContexts
from cco_sidecar_plugins.context._query import DECISIONS
from cco_sidecar_plugins.context._ranking import Ranking, ranking_of
from cco_sidecar_plugins.context._stop_words import NO_MATCH

log = logging.getLogger("cco_sidecar.relevance")

SMALL_UPDATE = (200, 2_000_000, 300)  # files, bytes and commits that are taken up within a call


class Builder:
    """A child process that brings an index up to date, with a thread that feeds it and waits for it."""

    def __init__(self, root: str, index: Path, files: list[FileFact], head: str | None) -> None:
        self.done = threading.Event()
        self.problem: str | None = None
        self.seconds = 0.0
        self._request = (root, index, files, head)
        command = [sys.executable, "-P", os.path.abspath(__file__), "build", os.path.abspath(str(cco_sidecar.__file__))]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=root,
        )
        threading.Thread(target=self._attend, name="relevance-builder", daemon=True).start()

    def _attend(self) -> None:
        root, index, files, head = self._request
        request = {
            "root": root,
            "index": str(index),
            "head": head,
            "files": [(file.path, file.size, file.mtime_ns) for file in files],
        }
        process = self.process
        assert process.stdin and process.stdout
        output = b""
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            output = process.stdout.read()
        finally:
            code = process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.stdout.close()
            last = (output.decode("utf-8", "replace").strip().splitlines() or [""])[-1]
            try:
                self.seconds = float(json.loads(last)["seconds"])
            except (ValueError, KeyError, TypeError):
                self.problem = f"the builder ended with code {code}: {last[:300]}"
            self._request = (root, index, [], head)
            self.done.set()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()
        self.done.wait(5)


class Project:
    """The index of one folder: opened, brought up to date and asked, by one thread at a time."""

    PATIENCE = 2.0  # seconds to wait for another process's write; the service waits five for an answer
    MAX_BUSY = 3
    BACK_OFF = (5.0, 600.0)

    def __init__(self, root: str, folder: str) -> None:
        self.root = root
        self.path = Path(folder) / "relevance.sqlite"
        self.lock = threading.Lock()
        self.builder: Builder | None = None
        self.index: Index | None = None
        self.facts = Facts()
        self.past: Past | None = None
        self.ranking: Ranking | None = None  # the last: agents of a team ask about the same
        self.seconds = 0.0
        self.problem: str | None = None
        self._version = -1
        self._failures = 0
        self._retry_at = 0.0
        self._busy = 0
        self._ended = False

    def rank(self, request: RankRequest) -> list[RankedFile] | None:
        """The files for a request, best first; None while the index is being built, or where it cannot be."""
        with self.lock, self._recovering():
            if self._building() or self._ended or time.monotonic() < self._retry_at:
                return None
            index = self._opened()
            if not self._up_to_date(index, request):
                return None
            answer = self._ranking_of(index, request).ranked(request)
            self._busy = 0
            return answer
        return None

    def begin(self, edited: list[FileFact], request: RankRequest | None) -> None:
        """Do of ``rank`` what does not depend on git, where files that are indexed were ``edited`` and nothing else
        changed; without a request take them up.
        """
        with self.lock, self._recovering(turns=0):
            if self.past is None or self._building() or self._ended:
                return
            index = self._opened()
            fresh = self.facts.unread(file for file in edited if file.path in self.facts.known)
            if is_small(fresh):
                self._take_up(index, fresh)
                if request:
                    self._ranking_of(index, request)

    def _ranking_of(self, index: Index, request: RankRequest) -> Ranking:
        assert self.past is not None
        self.ranking = ranking_of(self.ranking, index, self.facts, self.past, request)
        return self.ranking

    @contextlib.contextmanager
    def _recovering(self, turns: int = 1) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self._recover(error, turns)
        except OSError as error:
            self._failed(f"{type(error).__name__}: {error}")

    def _building(self) -> bool:
        """Whether the builder is at work; takes note when it has ended."""
        builder = self.builder
        if builder is None:
            return False
        if not builder.done.is_set():
            return True
        self.builder = None
        if builder.problem:
            self._failed(builder.problem)
        else:
            self.seconds, self.problem, self._failures, self._retry_at = builder.seconds, None, 0, 0.0
        return False

    def _failed(self, problem: str) -> None:
        """Say it once, and try again later, each time after twice the pause."""
        self._close()
        self._failures += 1
        self._retry_at = time.monotonic() + min(self.BACK_OFF[1], self.BACK_OFF[0] * 2 ** (self._failures - 1))
        (log.warning if self.problem is None else log.debug)("the relevance index of %s: %s", self.root, problem)
        self.problem = problem

    def _recover(self, error: sqlite3.Error, turns: int = 1) -> None:
        """A lock of somebody else's passes; an index that stays locked for MAX_BUSY ``turns`` or is damaged is thrown
        away.
        """
        self._close()
        code = getattr(error, "sqlite_errorcode", None)
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            self._failed(str(error))
            return
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            self._busy += turns
            if self._busy < self.MAX_BUSY:
                return
        log.warning("the relevance index of %s is made anew: %s", self.root, error)
        self._busy = 0
        try:
            discard(self.path)
        except OSError as problem:
            self._failed(str(problem))

    def _opened(self) -> Index:
        """The index with the facts that fit it; opened anew when another process replaced or wrote it."""
        if self.index and (not self.path.exists() or self.path.stat().st_ino != self.index.inode):
            self._close()
        if self.index is None:
            self.index = Index(self.path, self.PATIENCE)
            self._version = -1
        version = self.index.value("pragma data_version")
        if version != self._version:
            self.facts = Facts()
            self.facts.load(self.index)
            self.past = Past(self.index)
            self._version = version
        return self.index

    def _up_to_date(self, index: Index, request: RankRequest) -> bool:
        """Take up what changed; False where that is left to the builder, which then is at work."""
        fresh, gone = self.facts.compare(request.files)
        commits, dropped = index.commit_plan(self.root, request.head)
        if not is_small(fresh, len(gone), len(commits) + len(dropped)):
            self._close()
            self.builder = Builder(self.root, self.path, request.files, request.head)
            return False
        self._take_up(index, fresh, gone)
        if commits or dropped or index.value("select value from meta where key = 'head'") != request.head:
            index.update_commits(self.root, request.head, commits, dropped)
            self.past = Past(index)
        return True

    def _take_up(self, index: Index, fresh: list[FileFact], gone: Sequence[str] = ()) -> None:
        for numbers in index.update_files(self.root, fresh, gone) if fresh or gone else ():
            for path in gone:
                self.facts.remove(path)
            self.facts.load(index, numbers)
        self.facts.taken.update((file.path, file) for file in fresh)

    def neighbours(self, paths: Sequence[str]) -> dict[str, Neighbours]:
        """By path: the files that it imports, that import it, and its tests; only of what is indexed."""
        with self.lock:
            index, facts = self.index, self.facts
            ids = [facts.ids[path] for path in paths if path in facts.ids]
            if index is None or not ids:
                return {}
            try:
                return {facts.files[id].path: self._neighbours(index, facts, id) for id in ids}
            except sqlite3.Error as error:
                self._recover(error)
                return {}

    def _neighbours(self, index: Index, facts: Facts, id: int) -> Neighbours:
        file = facts.files[id]
        last = module_path(file).rpartition("/")[2].encode("utf-8", "replace").decode()
        imported = (index.value("select imports from file where id = ?", id) or "").split("\n")
        found = {target for module in imported if module for target in facts.resolve(file, module)}
        rows = index.database.execute("select id, imports from file where instr(imports, ?)", (last,)).fetchall()
        naming = {
            other
            for other, modules in rows
            for module in modules.split("\n")
            if module.rpartition("/")[2] == last and other in facts.files
            if id in facts.resolve(facts.files[other], module)
        }
        tests = {other for other in facts.pairs.get(pair_stem(file.path)) if facts.files[other].kind == "test"}
        kinds = {"imports": found, "imported by": naming, "tested by": tests if file.kind != "test" else set()}
        return {kind: {facts.files[other].path for other in ids - {id}} for kind, ids in kinds.items()}

    def _close(self) -> None:
        if self.index:
            self.index.close()
        self.index, self.past, self.facts, self.ranking = None, None, Facts(), None

    def end(self) -> None:
        self._ended = True
        if self.builder:
            self.builder.stop()
        with self.lock:
            self._close()

    def state(self) -> dict[str, Any]:
        """Waits for nobody. What the builder has made counts as being built until a ranking has taken it up."""
        builder, past, facts = self.builder, self.past, self.facts
        failed = builder and builder.done.is_set() and builder.problem
        state = "building" if builder and not failed else "ready" if past else "absent"
        return {
            "name": "relevance", "state": state, "files": len(facts.known), "bytes": facts.bytes,
            "commits": past.commits if past else 0, "seconds": round(self.seconds, 3), "error": self.problem,
        }  # fmt: skip


def is_small(fresh: list[FileFact], gone: int = 0, commits: int = 0) -> bool:
    """Whether so much is taken up within a call."""
    amount = (len(fresh) + gone, sum(min(file.size, MAX_FILE) for file in fresh), commits)
    return all(number <= limit for number, limit in zip(amount, SMALL_UPDATE, strict=True))


def discard(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


_projects: dict[tuple[str, str], Project] = {}
_projects_lock = threading.Lock()


def project_of(root: str, folder: str) -> Project:
    with _projects_lock:
        if (project := _projects.get((root, folder))) is None:
            project = _projects[root, folder] = Project(root, folder)
        return project


def end_project(root: str, folder: str) -> None:
    """End its builder and close its index. Blocks."""
    with _projects_lock:
        project = _projects.pop((root, folder), None)
    if project:
        project.end()


def neighbours(root: str, paths: Sequence[str]) -> dict[str, Neighbours]:
    """By path, of those that are indexed: what it imports, what imports it, its tests. Blocks."""
    with _projects_lock:
        projects = [project for key, project in _projects.items() if key[0] == root]
    return projects[-1].neighbours(paths) if projects else {}


def begin_ranking(root: str, folder: str, edited: list[FileFact], request: RankRequest | None) -> None:
    """As ``Project.begin``, where there is an index. Blocks."""
    with _projects_lock:
        project = _projects.get((root, folder))
    if project:
        project.begin(edited, request)


@hookimpl
def rank_files(request: RankRequest) -> list[RankedFile] | None:
    ranked = project_of(request.root, request.index_folder).rank(request)
    if not request.task or not ranked or ranked[0].matched:  # all are, or none is
        return ranked
    return [msgspec.structs.replace(item, reasons=[NO_MATCH, *item.reasons]) for item in ranked]


@hookimpl
@waits_for_nothing
def index_state(root: str, index_folder: str) -> dict[str, Any] | None:
    return project_of(root, index_folder).state()


@hookimpl
def part_class(base: type) -> type | None:
    return type("WarmContexts", (WarmContexts, base), {}) if issubclass(base, Contexts) else None


def keep_for_good() -> None:
    """The collector of garbage, for which all threads wait, no more looks through what is there now. Blocks."""
    gc.collect(1)  # all of it would hold up the start
    gc.freeze()
    if sys.platform == "linux":  # what the start alone needed goes back to the system: 3 MB, in a millisecond
        with contextlib.suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


class Unfinished(list[RankedFile]):
    """A ranking that was made while an index was not whole."""


class WarmContexts(PreparedContexts):
    """Begins the index of a large project before somebody waits for it; contexts say while an index is being made."""

    WARM_FROM = 1_000  # files: the index of a smaller project is begun when it is first asked for

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._waiting: list[tuple[str, str, ContextQuery]] = []  # by the requests that are being answered
        self._thread = threading.local()  # ``unfinished``: a ranking was, of the context that this thread builds

    async def get(
        self, issue_id: str, agent_type: str, query: ContextQuery, known: str = "", sub: str = ""
    ) -> tuple[bytes, str]:
        self._waiting.append(asked := (issue_id, agent_type, query))
        try:
            return await super().get(issue_id, agent_type, query, known, sub)
        finally:
            self._waiting.remove(asked)

    def edited(self, files: list[FileFact]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the service has stopped
            self._loop.call_soon_threadsafe(self._begin, files)

    def _begin(self, edited: list[FileFact]) -> None:
        """Take up what was edited, and begin the ranking that requests wait for where all want the same."""
        waiting, request = self._waiting, None
        root, folder = str(self._settings.root), str(self._index_folder)
        if waiting and waiting[0][2].task and waiting.count(waiting[0]) == len(waiting):
            issue_id, agent_type, query = waiting[0]
            rows = self._storage.read.issue_outputs(self._settings.project, issue_id, DECISIONS)
            request = RankRequest(
                root=root, index_folder=folder, files=[], agent_type=agent_type, task=query.task, changed=[], head=None,
                category=self._agent_types.categories.get(agent_type, ""), outputs=list(map(json.loads, rows)),
            )  # fmt: skip
        # as a future of asyncio's, which logs the error that nobody asks for
        asyncio.wrap_future(in_thread("relevance", lambda: begin_ranking(root, folder, edited, request)))

    async def prepare(self) -> None:
        await asyncio.gather(super().prepare(), self._warm())
        await self._pool.run(redact, "")  # whose patterns the first result would wait for
        await self._pool.run(keep_for_good)

    async def close(self) -> None:
        await super().close()
        root, folder = str(self._settings.root), str(self._index_folder)
        ending = asyncio.wrap_future(in_thread("relevance", lambda: end_project(root, folder)))
        await asyncio.wait([ending], timeout=2)  # it waits for a ranking that goes on

    async def _warm(self) -> None:
        state = await self.project.state()
        if len(state.files) >= self.WARM_FROM:
            agent_type, category = "chief-architect", "architect"
            key = ContextKey(issue_id="", agent_type=agent_type, category=category, task="", max_bytes=0, max_files=1)
            await self._pool.run(self.rank, key, [], state)

    def rank(self, key: ContextKey, outputs: list[dict[str, Any]], state: ProjectState) -> list[RankedFile]:
        before, ranked = self._unfinished(), super().rank(key, outputs, state)
        self._thread.unfinished = before or self._unfinished()
        return Unfinished(ranked) if self._thread.unfinished else ranked

    def _build(self, key: ContextKey, rows: list[bytes], state: ProjectState, etag: str) -> BuiltContext:
        self._thread.unfinished = False
        fresh, shared, etag = super()._build(key, rows, state, etag)
        return fresh, shared, f'W/"{secrets.token_hex(16)}"' if self._thread.unfinished else etag

    def sections(self, request: ContextRequest) -> Sections:
        sections = super().sections(request)
        if isinstance(request.ranked, Unfinished):
            sections["metadata"]["index"] = "building"
        return sections

    def _unfinished(self) -> bool:
        """Whether an index of any ranking is still being made. Blocks."""
        facts = {"root": str(self._settings.root), "index_folder": str(self._index_folder)}
        states = [answer for _, answer in self._hooks.ask("index_state", **facts)]
        return any(state.get("state") == "building" for state in states)


def build(root: str, path: Path, files: list[FileFact], head: str | None) -> None:
    """Bring the index up to date; a damaged one is thrown away and made anew, once."""
    try:
        _build(root, path, files, head)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR):
            raise
        discard(path)
        _build(root, path, files, head)


def _build(root: str, path: Path, files: list[FileFact], head: str | None) -> None:
    index = Index(path, patience=60.0)
    with contextlib.closing(index):
        known = index.known()
        listed = {file.path for file in files}
        fresh = [file for file in files if known.get(file.path) != file]
        gone = [path for path in known if path not in listed]
        for _ in index.update_files(root, fresh, gone):
            pass
        index.update_commits(root, head, *index.commit_plan(root, head))
        if len(fresh) * 4 > len(files):
            index.optimize()


def main() -> int:
    """Read one request from standard input, build, say how long it took; end at once when standard input closes."""
    began = time.monotonic()
    if hasattr(os, "nice"):
        os.nice(10)
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(3)), daemon=True).start()
    build(request["root"], Path(request["index"]), [FileFact(*file) for file in request["files"]], request["head"])
    print(json.dumps({"seconds": round(time.monotonic() - began, 3)}), flush=True)
    os._exit(0)  # the thread above holds standard input


if __name__ == "__main__":
    sys.exit(main())

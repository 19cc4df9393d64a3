"""Looks at the repository faster: remembers every file's fingerprint, asks git only about what changed, and watches it.

``GitProject`` asks git for everything at each look. This one takes a fingerprint (``lstat``) of
the files, of the folders that are not ignored, and of git's own files, and reads again only what has another one now.
What it tells is the same. Where there is no repository, or one that it
cannot follow, it asks git at each look too.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import functools
import hashlib
import itertools
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from cco_sidecar import (
    LIST_SETTINGS,
    Change,
    Commit,
    Contexts,
    FileFact,
    GitContext,
    Project,
    ProjectState,
    ask_git,
    clean_text,
    describe_file,
    hookimpl,
    in_thread,
    language_of,
    log_once,
    one_line,
    split_z,
)
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.context._fingerprints import Fingerprint, fingerprint, is_linked, is_young
from cco_sidecar_plugins.context._git_facts import (
    OPERATIONS,
    Codes,
    GitProject,
    describe_changes,
    git_prefix,
    in_progress,
    is_closed,
    line_counts,
    read_commits,
    read_remote,
    read_status,
    unstaged_changes,
    without,
    without_changes,
    without_databases,
)
from cco_sidecar_plugins.context._pipes import Pipes, pointer
from cco_sidecar_plugins.context._prepared import PreparedContexts
from cco_sidecar_plugins.context._sections import GitState
from cco_sidecar_plugins.context._turn import Turn, current
from cco_sidecar_plugins.context._watcher import new_watcher
from cco_sidecar_plugins.context._withheld import may_tell_own, own_files

Proof = dict[str, Fingerprint | None]  # by absolute path


@hookimpl
def part_class(settings: PluginSettings, base: type) -> type | None:
    if issubclass(base, Contexts):
        return type("WatchingContexts", (WatchingContexts, base), {})
    watched = {"watched": not settings.no_watch}
    return type("ProjectIndex", (ProjectIndex, base), watched) if issubclass(base, Project) else None


class WatchingContexts(PreparedContexts):
    """Empties the cache where the project is heard to have changed: a fast hint and never the proof."""

    async def prepare(self) -> None:
        loop = asyncio.get_running_loop()

        def changed() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the service has stopped
                loop.call_soon_threadsafe(self.clear, lambda _: True)

        await super().prepare()
        if isinstance(self.project, ProjectIndex):
            self.project.edited = self.edited
            await self._pool.run(self.project.start, changed)

    async def close(self) -> None:
        await super().close()
        if isinstance(self.project, ProjectIndex):
            await self._pool.run(self.project.close)

    @property
    def watching(self) -> str:
        return self.project.watching if isinstance(self.project, ProjectIndex) else "off"

    def statistics(self) -> dict[str, Any]:
        return super().statistics() | {"watching": self.watching}


class ProvenState(ProjectState, frozen=True, kw_only=True):
    """A state with the fingerprints that prove it; ``settled`` where none is so young that a second change could hide
    behind it. ``languages`` are those of its files.
    """

    proof: Proof
    own: frozenset[str]  # the service's files, which are not in ``files``
    languages: frozenset[str]
    total: int  # the sum of the hashes of what it holds: changed where a file changes, and the same in any order
    settled: bool

    def describe(self, path: str) -> dict[str, Any] | None:
        """The same, remembered for files that are short: agents of a team are given the same ones."""
        full = os.path.join(self.root, path)
        facts = self.proof.get(full)
        if (
            facts is None
            or facts[2] > SHORT
            or is_young(facts, time.time_ns())  # what it holds may change unseen
            or not is_folder(self.proof.get(os.path.dirname(full)))  # but a link that may leave the root
        ):
            return super().describe(path)
        return described(self.root, path, facts)


SHORT = 64 * 1024  # bytes


@functools.lru_cache(200)
def described(root: str, path: str, facts: Fingerprint) -> dict[str, Any] | None:
    """What contexts say of the file while it has this fingerprint. Blocks."""
    return describe_file(root, path)


def is_folder(facts: Fingerprint | None) -> bool:
    return facts is not None and stat.S_ISDIR(facts[4])


def may_be_closed(before: Fingerprint | None, now: Fingerprint | None) -> bool:
    """Whether a folder has other rights: those of others change its ctime alone."""
    if before is None or now is None or not (is_folder(before) and is_folder(now)):
        return False
    return before[4] != now[4] or (before[0] == now[0] and before[1] != now[1])


def total_of(proof: Proof, before: Proof, total: int) -> int:
    """The sum of the hashes of what ``proof`` holds, out of ``total``, which is that of ``before``."""
    for path, facts in proof.items():
        known = before.get(path, UNKNOWN)
        if known is not facts:
            total += hash_of(path, facts) - (0 if known is UNKNOWN else hash_of(path, known))
    for path in before.keys() - proof.keys():
        total -= hash_of(path, before[path])
    return total % 2**256


UNKNOWN: Any = object()


def hash_of(path: str, facts: Fingerprint | None) -> int:
    return int.from_bytes(hashlib.sha256(f"{path}\0{facts}".encode("utf-8", "surrogateescape")).digest(), "big")


def facts_of(facts: Fingerprint | None) -> Any:
    """What a new or a removed hard link of the file leaves as it is."""
    return facts and (facts[0], *facts[2:5])


def time_size_and_mode(facts: Fingerprint) -> Any:
    return facts[0], facts[2], facts[4]


def other_links(found: Proof, before: Proof) -> Proof:
    """The fingerprints that files of ``before`` have now which are hard links of what is new or changed in ``found``:
    an event names the one link through which a file was changed, or under which it came.
    """
    changed = {facts[3] for path, facts in found.items() if facts and is_linked(facts) and before.get(path) != facts}
    if not changed:
        return {}
    return {path: fingerprint(path) for path, facts in before.items() if facts and facts[3] in changed}


RULES = (".gitignore", ".gitattributes", ".gitmodules")  # files that say something of other files


class Listing(Struct, frozen=True):
    """What git says of the work tree, names below the root: ``ignored`` folders end in a slash, ``changes`` are (code,
    path).
    """

    branch: str | None
    tracked: list[str]
    untracked: list[str]
    ignored: frozenset[str]
    changes: Codes

    def same_names(self, other: Listing) -> bool:
        return (self.tracked, self.untracked, self.ignored) == (other.tracked, other.untracked, other.ignored)


class ProjectIndex(GitProject):
    """The repository on disk, of which only what a fingerprint shows to have changed is read again.

    All that a state tells was read after the fingerprints that prove it were taken, so what changes later, even while
    it is being read, shows at the next look.
    """

    CHECK = 30.0  # seconds after which a request has everything looked at in the background
    DISTRUST = 600.0  # seconds for which everything is looked at after a change without an event
    ATTEMPTS = 4  # before a project that changes all the time is taken as it is, and not cached
    FEW = 50  # changed files that git is asked about by name
    PATIENCE = 2.0  # seconds of a look, after which pipes are looked for that may hold git
    watched = True

    def __init__(self, root: Path, scratch: Path) -> None:
        super().__init__(root, scratch)
        self._watcher = new_watcher(root, self._tell, self._on_change)
        self._lock = threading.Lock()  # held by a look
        self._changed: Callable[[], None] = lambda: None
        self.edited: Callable[[list[FileFact]], None] = lambda files: None  # as PreparedContexts has it
        self._looked = 0.0  # when everything was looked at last
        self._distrust = 0.0  # until then events prove nothing
        self._check: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[ProjectState] | None = None
        self._git_places = [os.path.join(folder, ".git") for folder in (root, *root.parents)]
        self._nearest = len(self._git_places)  # of these, those that decide where git's folder is
        self._pipes = Pipes(root)
        self._prefix = os.path.join(root, "")  # joined by hand below: os.path.join takes longer than the look at a file
        self._state: ProvenState | None = None
        self._young: set[str] = set()  # what an event names may be another than was read, with the same fingerprint
        self._turn: tuple[Turn | None, ProvenState | None] = None, None  # the state that was proven last, and when
        self._listing = Listing(None, [], [], frozenset(), [])
        self._staged: set[str] = set()  # names of what differs between the last commit and git's index,
        self._untracked: set[str] = set()  # and of what is not in the index
        self._entries: dict[str, int] = {}  # folder, and a hash of the names in it
        self._kept: dict[str, tuple[Any, int, Any]] = {}
        self._seen_by: GitFolders | None = None  # what the state is of
        self._rules: set[str] = set()  # files outside git's folder that say how git reads the tree
        self._earlier: dict[str, int] = {}  # path, and by how many nanoseconds less than it is its time is told

    @property
    def watching(self) -> str:
        """How far changes are heard of: "off", "starting", "full", or "partial: why"."""
        return self._watcher.state if self.watched else "off"

    def start(self, changed: Callable[[], None]) -> None:
        """Call ``changed``, in any thread, where the state has changed. Blocks."""
        self._changed = changed
        if self.watched:
            self._watcher.start()

    def close(self) -> None:
        """The service ends. Blocks."""
        self._watcher.stop()

    def _tell(self) -> None:
        self._changed()

    def _on_change(self, path: str) -> None:
        """Something changed: what the latest state was not read from, nor from its folder, is passed over."""
        proof = self._state.proof if self._state else None
        if proof is None or path in proof or os.path.dirname(path) in proof:
            self._changed()

    async def state(self) -> ProjectState:
        """The project as it was at some moment since this call, at once where no event says that it changed."""
        turn, known = current(), self._state
        if turn is None or turn is not self._turn[0] or known is not self._turn[1]:
            known = self._known_now()
            self._turn = turn, known
        if known and time.monotonic() - self._looked > self.CHECK and (self._check is None or self._check.done()):
            self._check = asyncio.create_task(self._looks.run(self.check))
        return known or await self._shared_look()

    async def _shared_look(self) -> ProjectState:
        """A look that began since this call; those who wait share one. Raises GitError where a pipe holds git."""
        if running := self._looking:  # it began before this call, and may have missed what changed since
            await asyncio.wait({running})
        if self._looking is running:
            self._looking = asyncio.create_task(self._watched_look())
        assert self._looking is not None
        return await asyncio.shield(self._looking)

    async def _watched_look(self) -> ProjectState:
        """A look. Where it takes long, pipes are looked for beside it: one that holds git lets it go on and raises
        GitError, also at the next looks, until it is gone.
        """
        self._pipes.refuse()
        look = asyncio.create_task(self._looks.run(self.look))
        suspected = True
        while suspected and not (await asyncio.wait({look}, timeout=self.PATIENCE))[0]:
            search = asyncio.create_task(self._looks.run(self._pipes.search, frozenset(self._rules)))
            for task in (look, search):  # of which nobody may ask for the error
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.wait({look, search}, return_when=asyncio.FIRST_COMPLETED)
            if search.done() or self._pipes.suspects:  # git may have gone on only as it was let
                await search
            suspected = bool(self._pipes.suspects)  # which git may come to later
        return await look

    def _known_now(self) -> ProvenState | None:
        """The last state where events prove that it is still true; the few files of which none tell are looked at."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            state = self._state
            if state is None or not state.settled or time.monotonic() < self._distrust or not self._watcher.quiet():
                return None
            apart = self._watcher.apart
            same = len(apart) <= self.FEW and all(fingerprint(path) == state.proof[path] for path in apart)
            return state if same and self._kept["folders"][0] == self._git_folders_key() else None
        finally:
            self._lock.release()

    def check(self) -> None:
        """Look at everything, whatever events say, while requests go on by them. Blocks.

        Some changes make none: a write through a mapping of a file, or a new hard link to it and a write through that.
        """
        self._looked = time.monotonic()
        state = self._state
        if state is None:
            return
        found = {path: facts for path in state.proof if (facts := fingerprint(path)) != state.proof[path]}
        with self._lock:
            untold = self._watcher.suspect(found)
            self._watcher.suspect(self._young)
            if state is self._state and any(facts_of(found[path]) != facts_of(state.proof[path]) for path in untold):
                log_once("project_index: files change without an event; for a while each is looked at")
                self._distrust = time.monotonic() + self.DISTRUST

    def look(self) -> ProjectState:
        """The project as it is now. Blocks; one at a time."""
        with self._lock:
            return self._looked_at()

    def _looked_at(self) -> ProjectState:
        try:
            folders = self._folders()
            if folders != self._seen_by:
                self._state, self._seen_by = None, folders
            if folders:
                return self._look()
        except Exception as error:  # a boundary: whatever a repository may hold
            log_once(f"project_index: git is asked anew at each look: {one_line(error)}")
            self._kept.pop("folders", None)  # perhaps git's folder is none any more, and one above is
        self._state = None
        self._pipes.refuse()
        return super().look()

    def _look(self) -> ProvenState:
        before = self._state
        proof = before.proof if before else {}
        suspects = self._watcher.suspects(proof)  # of what changes from here on the next look is told
        now = time.time_ns()
        told = suspects is not None
        if before is None or suspects is None or time.monotonic() < self._distrust:
            told, suspects, self._looked = False, proof.keys(), time.monotonic()
        fresh = {path: fingerprint(path) for path in suspects}
        fresh |= other_links(fresh, proof)
        changed = [path for path, facts in fresh.items() if proof[path] != facts or path in self._young]
        if told and any(may_be_closed(proof[path], fresh[path]) for path in changed):  # no event names what is below
            told, fresh = False, {path: fingerprint(path) for path in proof}
            changed = [path for path, facts in fresh.items() if proof[path] != facts or path in self._young]
        if before is None or changed or not before.settled:
            self._state = before = self._read(proof | fresh, changed, now, told)
            self._changed()
        self._watcher.cover(before.proof, changed)
        return before

    def _known(self) -> ProvenState:
        assert self._state
        return self._state

    def _read(self, fresh: Proof, changed: list[str], now: int = 0, told: bool = False) -> ProvenState:
        """A new state; ``fresh`` are the fingerprints of what the last one knew, ``changed`` those of them that are
        others now; ``told``: whether an event says what changes again, unless it is apart.
        """
        self._tell_apart(fresh, changed)
        if told:  # no need to wait until a further change has another time
            young = (self._young | set(changed)).difference(self._watcher.apart)
            self._young = {path for path in young if is_young(fresh[path], now)}
        else:
            self._young = set()
        calm = settle(fresh, [path for path in changed if path not in self._young], now)
        few = self._only_contents(changed) if calm and self._state and self._state.settled else None
        if few is not None:
            return self._with_contents(fresh, few, changed)
        calm = settle(fresh, changed, now) and calm
        self._young.difference_update(changed)
        listing = self._listing if fresh else self._listed()
        for _ in range(self.ATTEMPTS):
            now = time.time_ns()
            proof = self._fingerprints(listing, fresh)
            settled = settle(proof, [path for path in proof if proof[path] is not fresh.get(path)], now) and calm
            seen = self._listed()
            if seen.same_names(listing):
                break
            same_folders = seen.ignored == listing.ignored
            listing, fresh, calm = seen, proof if same_folders else {}, settled or not same_folders
        else:
            settled = False
        self._listing = seen
        return self._assembled(proof, seen, settled)

    def _with_contents(self, proof: Proof, names: set[str], changed: list[str]) -> ProvenState:
        """The last state, with what has become of the contents of ``names``; ``changed``: where ``proof`` differs."""
        state = self._known()
        files, fresh = list(state.files), list[FileFact]()
        for name in names:
            if facts := proof[self._prefix + name]:
                fresh.append(self._fact(name, facts))
                files[place_of(files, name)] = fresh[-1]
        if fresh:
            self.edited(fresh)
        git = msgspec.structs.replace(state.git, uncommitted_changes=self._changes_among(names))
        own = state.own
        if own or any(map(may_tell_own, fresh)):
            own = own | own_files(str(self._root), files)
        now, before = ({path: each[path] for path in changed} for each in (proof, state.proof))
        total = total_of(now, before, state.total)
        return self._proven(files, git, state.head, proof, True, state.languages, own, total)

    def _tell_apart(self, proof: Proof, changed: list[str]) -> None:
        """Rankings go by size and time: what changed and kept both gets another time for them, if not by its mode."""
        before = self._state.proof if self._state else {}
        for path in changed:
            facts, known = proof[path], before.get(path)
            if facts and known and facts != known and time_size_and_mode(facts) == time_size_and_mode(known):
                self._earlier[path] = self._earlier.get(path, 0) + 1

    def _fact(self, name: str, facts: Fingerprint) -> FileFact:
        return FileFact(name, facts[2], facts[0] - self._earlier.get(self._prefix + name, 0))

    def _assembled(self, proof: Proof, listing: Listing, settled: bool) -> ProvenState:
        files = []
        self._staged = {path for code, path in listing.changes if code[0] not in " ?"}
        self._untracked = {path for code, path in listing.changes if code == "??"}
        for name in dict.fromkeys(sorted([*listing.tracked, *listing.untracked])):
            facts = proof.get(self._prefix + name)
            if facts and not stat.S_ISDIR(facts[4]):
                files.append(self._fact(name, facts))
        key = tuple(facts for path, facts in self._of_git(self._known_folders()).items() if not path.endswith("index"))
        (commits, head), (name, url) = self._kept_by("history", key, self._history)
        changes = describe_changes(listing.changes, line_counts(self._root, listing.changes))
        git = GitState(listing.branch, commits, changes, name, url, in_progress(self._known_folders().own))
        languages = frozenset(language_of(file.path) for file in files)
        own = own_files(str(self._root), files)
        total = total_of(proof, *((self._state.proof, self._state.total) if self._state else ({}, 0)))
        return self._proven(files, git, head, proof, settled, languages, own, total)

    def _proven(
        self, files: list[FileFact], git: GitContext, head: str | None, proof: Proof, settled: bool,
        languages: frozenset[str], own: Set[str], total: int,
    ) -> ProvenState:  # fmt: skip
        """A state of ``files`` without the service's ``own``."""
        return ProvenState(
            root=str(self._root), files=without(files, own), git=without_changes(git, own),
            head=head, own=frozenset(own), languages=languages, proof=proof, total=total, settled=settled,
            digest=f"{total:x}" if settled and not self._young else secrets.token_hex(16),
        )  # fmt: skip

    def _history(self) -> tuple[tuple[list[Commit], str | None], tuple[str | None, str | None]]:
        remote = in_thread("git", lambda: read_remote(self._root))
        return read_commits(self._root), remote.result()

    # -- fingerprints

    def _fingerprints(self, listing: Listing, known: Proof) -> Proof:
        """Of git's files, what plugins read, every folder that is not ignored, and every file; those that are
        ``known`` are not looked at again.
        """
        proof = self._of_git(self._known_folders())
        proof |= self._of_rules(self._known_folders())
        proof |= {path: fingerprint(path) for path in (self._prefix + name for name in self.also)}
        proof |= self._of_folders(listing.ignored, known)
        for name in itertools.chain(listing.tracked, listing.untracked):
            path = self._prefix + name
            facts = proof[path] = known.get(path) or fingerprint(path)
            if facts and stat.S_ISDIR(facts[4]):
                proof |= of_submodule(path)
        others = other_links(proof, self._state.proof if self._state else {})
        return proof | {path: facts for path, facts in others.items() if path in proof}

    def _of_git(self, folders: GitFolders) -> Proof:
        """Of git's files whose change can change a context: head, index, branches, ignore rules, configuration."""
        own, common = folders.own, folders.common
        names = [own / name for name in ("HEAD", REFTABLES, "index", "logs/HEAD", "config.worktree", *OPERATIONS)]
        names += [
            common / name
            for name in (
                "packed-refs",
                "config",
                "info/exclude",
                "info/attributes",
                "refs/heads",
                "refs/stash",
                "refs/replace",
                "info/grafts",
                "shallow",
                REFTABLES,
            )
        ]
        proof = {str(name): fingerprint(str(name)) for name in names}
        if branch := head_file(own, common):  # read after HEAD's own
            proof[branch] = fingerprint(branch)
        return proof

    def _of_rules(self, folders: GitFolders) -> Proof:
        """Of every file outside git's folder that configures git, its ignore rules above the root among them.

        Those that git names are asked for again after the fingerprints were taken, until none is new.
        """
        found = {path: fingerprint(path) for path in self._rules}
        while more := rule_files(self._root, folders) - found.keys():
            found |= {path: fingerprint(path) for path in more}
        self._rules = set(found)
        return found

    def _of_folders(self, ignored: frozenset[str], known: Proof) -> Proof:
        """Of the root and each folder below it, and of each .gitignore: a new name changes its folder."""
        before = self._state.proof if self._state else {}
        found: Proof = {}
        pending = [""]
        if not known:
            self._entries = {}
        else:  # those that did not change hold no other folders than before
            for link in [f"{path}/" for path in self._entries if path in known and not is_folder(known[path])]:
                known = {path: facts for path, facts in known.items() if not path.startswith(link)}  # seen through it
            unchanged = {path for path, facts in known.items() if is_folder(facts) and before.get(path) == facts}
            found = {path: known[path] for path in unchanged}
            found |= {path: known[path] for path in known if path.endswith("/.gitignore")}
            pending = [
                f"{path[len(self._prefix) :]}/".lstrip("/") for path, facts in known.items()
                if is_folder(facts) and path not in unchanged
                and path.startswith(str(self._root))
            ]  # fmt: skip
        while pending:
            relative = pending.pop()
            folder = (self._prefix + relative).rstrip("/") or "/"
            found[folder] = fingerprint(folder)
            names = folder_names(folder)
            self._entries[folder] = hash(names)
            if names >= {"HEAD", "objects/", "refs/"}:  # a database of git
                continue
            if ".gitignore" in names:
                found[f"{self._prefix}{relative}.gitignore"] = fingerprint(f"{self._prefix}{relative}.gitignore")
            below = [
                name for name in names if name.endswith("/") and name != ".git/" and relative + name not in ignored
            ]
            pending += [relative + name for name in below if f"{self._prefix}{relative}{name[:-1]}" not in found]
        return found

    # -- what git says

    def _folders(self) -> GitFolders | None:
        """None without git. Blocks where a repository came or went."""
        kept = self._kept.get("folders")
        if kept is None or kept[0] != self._git_folders_key():
            self._nearest = len(self._git_places)
            key, found = self._git_folders_key(), find_git_folder(self._root)
            if found and str(found.own) == self._git_places[0]:  # git looks no further
                self._nearest = 1
            kept = self._kept["folders"] = (key[: self._nearest], 0, found)
        return kept[2]

    def _git_folders_key(self) -> tuple[Any, ...]:
        found = {path: fingerprint(path) for path in self._git_places[: self._nearest]}
        return tuple(
            (facts[3:5], os.path.lexists(f"{path}/HEAD")) if facts and stat.S_ISDIR(facts[4]) else facts
            for path, facts in found.items()
        )

    def _kept_by(self, name: str, key: tuple[Fingerprint | None, ...], read: Callable[[], Any]) -> Any:
        """What ``read`` gave when the fingerprints were ``key``; read again where one of them is too young to be
        trusted.
        """
        kept = self._kept.get(name)
        if kept is None or kept[0] != key or any(is_young(facts, kept[1]) for facts in key):
            kept = self._kept[name] = (key, time.time_ns(), read())
        return kept[2]

    def _known_folders(self) -> GitFolders:
        assert self._seen_by
        return self._seen_by

    def _listed(self) -> Listing:
        folders = self._known_folders()
        tracked = in_thread("git", lambda: self._tracked(folders))
        branch, codes = read_status(self._root, folders.prefix, "--ignored=matching")
        untracked = [path for code, path in codes if code == "??" and not path.endswith("/")]
        ignored = frozenset(path for code, path in codes if code == "!!" and path.endswith("/"))
        changes = [(code, path) for code, path in codes if code != "!!"]
        return Listing(branch, tracked.result(), untracked, ignored, changes)

    def _tracked(self, folders: GitFolders) -> list[str]:
        key = (fingerprint(str(folders.own / "index")),)
        names: list[str] = self._kept_by(
            "tracked", key, lambda: split_z(ask_git(self._root, "ls-files", "-z", "-c", "--deduplicate"))
        )
        return without_databases(self._root, names)

    def _only_contents(self, changed: list[str]) -> set[str] | None:
        """The names of the changed files where nothing but contents of known files changed, None where more did.

        A file that was replaced changes its folder too, which then holds the same names as before.
        """
        state = self._known()
        if (
            len(changed) > self.FEW
            or not self._rules.isdisjoint(changed)
            or any(change.status == "renamed" for change in state.git.uncommitted_changes)
        ):
            return None
        files = {path.removeprefix(self._prefix) for path in changed if path not in self._entries}
        known = all(place_of(state.files, name) >= 0 for name in files)
        good = known and all(fingerprint(self._prefix + name) and not name.endswith(RULES) for name in files)
        same = all(hash(folder_names(path)) == self._entries[path] for path in changed if path in self._entries)
        return files if good and same else None

    def _changes_among(self, names: set[str]) -> list[Change]:
        """The uncommitted changes now that the contents of ``names`` alone are others."""
        state = self._known()
        if not names:
            return state.git.uncommitted_changes
        asked = sorted(names)
        if names & self._staged or any(is_closed(self._root / name) for name in asked):
            _, codes = read_status(self._root, self._known_folders().prefix, names=asked)
            counts = line_counts(self._root, codes, asked)
        else:  # as git's index is what it was, none of them is staged or has become tracked now
            tracked = [name for name in asked if name not in self._untracked]
            codes, counts = unstaged_changes(self._root, tracked, self._git_settings())
            codes += [("??", name) for name in asked if name in self._untracked]
        others = [
            change
            for change in state.git.uncommitted_changes
            if change.path not in {clean_text(name) for name in names}
        ]
        return sorted(
            [*others, *describe_changes(codes, counts)],
            key=lambda change: (change.status == "untracked", change.path),
        )

    def _git_settings(self) -> bytes:
        """What git says of its settings, asked again where a file that sets them may be another one; by
        ``includeIf.onbranch`` they depend on the branch too.
        """
        own, common = self._known_folders().own, self._known_folders().common
        files = (own / "HEAD", own / REFTABLES, own / "config.worktree", common / "config")
        key = tuple(fingerprint(path) for path in sorted(self._rules.union(map(str, files))))
        listed: bytes = self._kept_by("settings", key, lambda: ask_git(self._root, *LIST_SETTINGS))
        return listed


def place_of(files: list[FileFact], name: str) -> int:
    """Where the file called ``name`` stands in ``files``, which are in the order of their names; -1 for nowhere."""
    at = bisect.bisect_left(files, name, key=lambda file: file.path)
    return at if at < len(files) and files[at].path == name else -1


class GitFolders(Struct, frozen=True):
    """The git dir of a work tree, the one that it shares with other work trees, and where in the tree the root is (""
    or "path/").
    """

    own: Path
    common: Path
    prefix: str


def find_git_folder(root: Path) -> GitFolders | None:
    """The git folders of the work tree that ``root`` lies in; None without git. Raises GitError. Blocks."""
    prefix = git_prefix(root)
    if prefix is None:
        return None
    asked = ("--absolute-git-dir", "--git-common-dir")  # one at a time: a path may hold a newline
    own, common = (os.fsdecode(ask_git(root, "rev-parse", what).removesuffix(b"\n")) for what in asked)
    return GitFolders(Path(own), (root / common).resolve(), prefix)


def rule_files(root: Path, folders: GitFolders) -> set[str]:
    """The files, there or not, by which git goes beside those in its own folder, and the links on the way to them.

    They are the user's and the system's configuration, what any configuration includes or may include, the ignore
    rules and attributes that it names, and those of the folders above ``root``. Blocks.
    """
    above = root.parents[: folders.prefix.count("/")]
    top = str(above[-1] if above else root)
    home = os.path.expanduser("~")  # stays as it is where there is no home folder
    config = os.path.join(os.environ.get("XDG_CONFIG_HOME") or f"{home}/.config", "git")
    found = {
        "/etc/gitconfig",
        f"{home}/.gitconfig",
        *(f"{config}/{name}" for name in ("config", "ignore", "attributes")),
    }
    found |= {os.environ[name] for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM") if os.environ.get(name)}
    found |= {str(folder / name) for folder in above for name in RULES}
    listed = iter(split_z(ask_git(root, "config", "--list", "--show-origin", "-z")))
    for origin, setting in zip(listed, listed, strict=False):
        key, _, value = setting.partition("\n")
        place = os.path.join(top, origin.removeprefix("file:")) if origin.startswith("file:") else top
        found.add(place)
        if value and (key in ("core.excludesfile", "core.attributesfile") or re.fullmatch(INCLUDES, key, re.DOTALL)):
            base = os.path.dirname(place) if key.endswith(".path") else top
            found.add(os.path.join(base, os.path.expanduser(value.removeprefix("%(prefix)/"))))
    for path in list(found):
        for _ in range(10):  # links to links; a loop ends here
            if not os.path.islink(path):
                break
            path = os.path.join(os.path.dirname(path), os.readlink(path))
            found.add(path)
    return found - {top}


REFTABLES = "reftable/tables.list"  # names the tables of references; those of a linked work tree hold its own HEAD
INCLUDES = r"include\.path|includeif\..*\.path"


def folder_names(folder: str) -> frozenset[str]:
    """The names in a folder, those of folders with a slash; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(
                f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries
            )
    except OSError:
        return frozenset()


def settle(proof: Proof, paths: Iterable[str], now: int) -> bool:
    """Look again at what was looked at so soon after a change that another could hide; False where it keeps changing.
    Blocks.
    """
    young = [path for path in paths if is_young(proof[path], now)]
    for _ in range(4):
        if not young:
            break
        time.sleep(0.015)
        now = time.time_ns()
        proof |= {path: fingerprint(path) for path in young}
        young = [path for path in young if is_young(proof[path], now)]
    return not young


def head_file(own: Path, common: Path) -> str | None:
    """The file of the branch that is checked out; None where no branch is."""
    head = pointer(own / "HEAD")
    return os.path.join(common, head[5:]) if head.startswith("ref: ") else None


def of_submodule(path: str) -> Proof:
    """Of the files that say at which commit a repository inside ours is."""
    own = Path(path, pointer(Path(path, ".git")).removeprefix("gitdir: ") or ".git")
    names = [str(own / "HEAD"), str(own / "packed-refs")]
    if branch := head_file(own, own):
        names.append(branch)
    return {name: fingerprint(name) for name in names}

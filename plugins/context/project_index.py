"""Looks at the repository faster: remembers a fingerprint of every file and asks git only about what changed.

``Project``, the core's own reader, asks git for everything at each look. This one takes a fingerprint (``lstat``) of
the files, of the folders that are not ignored, and of git's own files, and reads again only what has another one now.
What it tells is the same.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import itertools
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from cco_sidecar import (
    NO_GIT,
    NOT_OURS,
    Change,
    Codes,
    Commit,
    FileFact,
    Fingerprint,
    GitContext,
    Project,
    ProjectState,
    Settings,
    borrowed_git,
    clean_text,
    describe_changes,
    fingerprint,
    git_prefix,
    hookimpl,
    is_young,
    read_commits,
    read_remote,
    read_status,
    run_git,
    split_z,
    walk_files,
)
from cco_sidecar_plugins.context._parsing import REPORTS

Proof = dict[str, Fingerprint | None]  # by absolute path


@hookimpl
def project_reader(settings: Settings) -> Project:
    return ProjectIndex(settings.root, settings.storage)


class ProvenState(ProjectState, frozen=True, dict=True):
    """A state with the fingerprints that prove it; ``settled`` where none is so young that a second change could hide
    behind it.
    """

    proof: Proof
    settled: bool


def proven(
    root: str, files: list[FileFact], git: GitContext, head: str | None, proof: Proof, settled: bool
) -> ProvenState:
    return ProvenState(root, files, git, head, digest_of(proof) if settled else secrets.token_hex(16), proof, settled)


def digest_of(proof: Proof) -> str:
    paths = sorted(proof)
    numbers = array.array("q", itertools.chain.from_iterable(proof[path] or (0,) * 5 for path in paths))
    names = "\0".join(paths).encode("utf-8", "surrogateescape")
    return hashlib.sha256(numbers.tobytes() + names).hexdigest()


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


class ProjectIndex(Project):
    """The repository on disk, of which only what a fingerprint shows to have changed is read again.

    All that a state tells was read after the fingerprints that prove it were taken, so what changes later, even while
    it is being read, shows at the next look.
    """

    ATTEMPTS = 4  # before a project that changes all the time is taken as it is, and not cached
    FEW = 50  # changed files that git is asked about by name

    def __init__(self, root: Path, scratch: Path) -> None:
        super().__init__(root, scratch)
        self._prefix = os.path.join(root, "")  # joined by hand below: os.path.join takes longer than the look at a file
        self._state: ProvenState | None = None
        self._listing = Listing(None, [], [], frozenset(), [])
        self._entries: dict[str, int] = {}  # folder, and a hash of the names in it
        self._kept: dict[str, tuple[Any, int, Any]] = {}

    def look(self) -> ProjectState:
        """The project as it is now. Blocks; one at a time."""
        before = self._state
        if before is None:
            self._state = self._read({}, [])
            return self._state
        now = time.time_ns()
        fresh = {path: fingerprint(path) for path in before.proof}
        changed = [path for path, facts in before.proof.items() if fresh[path] != facts]
        if changed or not before.settled:
            self._state = self._read(fresh, changed, now)
        return self._state or before

    def _known(self) -> ProvenState:
        assert self._state
        return self._state

    def knows(self, path: str) -> bool:
        """Whether the latest state was read from ``path`` or its folder."""
        return self._state is not None and (path in self._state.proof or os.path.dirname(path) in self._state.proof)

    def _read(self, fresh: Proof, changed: list[str], now: int = 0) -> ProvenState:
        """A new state; ``fresh`` are the fingerprints of what the last one knew, ``changed`` those of them that are
        others now.
        """
        calm = settle(fresh, changed, now)
        few = self._only_contents(changed) if calm and self._state and self._state.settled else None
        if few is not None:
            return self._with_contents(fresh, few)
        listing = self._listing if fresh else self._listed()
        for _ in range(self.ATTEMPTS):
            now = time.time_ns()
            proof = self._fingerprints(listing, fresh)
            settled = settle(proof, [path for path in proof if proof[path] is not fresh.get(path)], now) and calm
            seen = self._listed()
            if seen.same_names(listing):
                break
            listing, fresh, calm = seen, {}, True
        else:
            settled = False
        self._listing = seen
        return self._assembled(proof, seen, settled)

    def _with_contents(self, proof: Proof, names: set[str]) -> ProvenState:
        """The last state, with what has become of the contents of ``names``."""
        state = self._known()
        files = list(state.files)
        for number, file in enumerate(files):
            facts = proof[self._prefix + file.path] if file.path in names else None
            if facts:
                files[number] = FileFact(file.path, facts[2], facts[0])
        git = msgspec.structs.replace(state.git, uncommitted_changes=self._changes_among(names))
        return proven(state.root, files, git, state.head, proof, True)

    def _assembled(self, proof: Proof, listing: Listing, settled: bool) -> ProvenState:
        files = []
        for name in sorted({*listing.tracked, *listing.untracked}):
            facts = proof.get(self._prefix + name)
            if facts and not stat.S_ISDIR(facts[4]):
                files.append(FileFact(name, facts[2], facts[0]))
        folders = self._folders()
        if not folders:
            return proven(str(self._root), files, NO_GIT, None, proof, settled)
        key = tuple(facts for path, facts in self._of_git(folders).items() if not path.endswith("index"))
        (commits, head), remote = self._kept_by("history", key, self._history)
        git = GitContext(listing.branch, commits, describe_changes(self._root, listing.changes), *remote)
        return proven(str(self._root), files, git, head, proof, settled)

    def _history(self) -> tuple[tuple[list[Commit], str | None], tuple[str | None, str | None]]:
        remote = self._git.submit(read_remote, self._root)
        return read_commits(self._root), remote.result()

    # -- fingerprints

    def _fingerprints(self, listing: Listing, known: Proof) -> Proof:
        """Of git's files, the reports, every folder that is not ignored, and every file; those that are ``known`` are
        not looked at again.
        """
        folders = self._folders()
        if folders:
            proof = self._of_git(folders)
        else:  # a repository may be made around us
            proof = {str(parent / ".git"): fingerprint(str(parent / ".git")) for parent in self._root.parents}
        proof |= {path: fingerprint(path) for path in (self._prefix + name for name in REPORTS)}
        proof |= self._of_folders(listing.ignored, frozenset({".git"}) if folders else NOT_OURS, known)
        for name in itertools.chain(listing.tracked, listing.untracked):
            path = self._prefix + name
            facts = proof[path] = known.get(path) or fingerprint(path)
            if facts and stat.S_ISDIR(facts[4]):
                proof |= of_submodule(path)
        return proof

    def _of_git(self, folders: GitFolders) -> Proof:
        """Of git's files whose change can change a context: head, index, branches, ignore rules, configuration."""
        own, common = folders.own, folders.common
        names = [own / name for name in ("HEAD", "index", "logs/HEAD", "MERGE_HEAD", "config.worktree")]
        names += [
            common / name
            for name in (
                "packed-refs",
                "config",
                "info/exclude",
                "refs/heads",
                "refs/stash",
                "shallow",
                "reftable/tables.list",
            )
        ]
        home = Path(os.path.expanduser("~"))  # stays as it is where there is no home folder
        names += [home / name for name in (".gitconfig", ".config/git/config", ".config/git/ignore")]
        proof = {str(name): fingerprint(str(name)) for name in names}
        if branch := head_file(own, common):  # read after HEAD's own
            proof[branch] = fingerprint(branch)
        return proof

    def _of_folders(self, ignored: frozenset[str], skip: frozenset[str], known: Proof) -> Proof:
        """Of the root and each folder below it, and of each .gitignore: a new name changes its folder."""
        before = self._state.proof if self._state else {}
        found: Proof = {}
        pending = [""]
        if not known:
            self._entries = {}
        else:  # those that did not change hold no other folders than before
            unchanged = {
                path for path, facts in known.items() if facts and stat.S_ISDIR(facts[4]) and before.get(path) == facts
            }
            found = {path: known[path] for path in unchanged}
            found |= {path: known[path] for path in known if path.endswith("/.gitignore")}
            pending = [
                f"{path[len(self._prefix) :]}/".lstrip("/") for path, facts in known.items()
                if facts and stat.S_ISDIR(facts[4]) and path not in unchanged
                and path.startswith(str(self._root))
            ]  # fmt: skip
        while pending:
            relative = pending.pop()
            folder = (self._prefix + relative).rstrip("/") or "/"
            found[folder] = fingerprint(folder)
            names = folder_names(folder)
            self._entries[folder] = hash(names)
            if ".gitignore" in names:
                found[f"{self._prefix}{relative}.gitignore"] = fingerprint(f"{self._prefix}{relative}.gitignore")
            below = [
                name
                for name in names
                if name.endswith("/") and name[:-1] not in skip and relative + name not in ignored
            ]
            pending += [relative + name for name in below if f"{self._prefix}{relative}{name[:-1]}" not in found]
        return found

    # -- what git says

    def _folders(self) -> GitFolders | None:
        """None without git. Blocks where a repository came or went."""
        found = (fingerprint(str(folder / ".git")) for folder in (self._root, *self._root.parents))
        key = tuple(facts and facts[3:] for facts in found)
        kept = self._kept.get("folders")
        if kept is None or kept[0] != key:
            kept = self._kept["folders"] = (key, 0, find_git_folder(self._root))
        return kept[2]

    def _kept_by(self, name: str, key: tuple[Fingerprint | None, ...], read: Callable[[], Any]) -> Any:
        """What ``read`` gave when the fingerprints were ``key``; read again where one of them is too young to be
        trusted.
        """
        kept = self._kept.get(name)
        if kept is None or kept[0] != key or any(is_young(facts, kept[1]) for facts in key):
            kept = self._kept[name] = (key, time.time_ns(), read())
        return kept[2]

    def _listed(self) -> Listing:
        folders = self._folders()
        environ = None if folders else borrowed_git(self._root, self._scratch)
        tracked = self._git.submit(self._tracked, folders)
        status = read_status(self._root, folders.prefix if folders else "", "--ignored=matching", env=environ)
        if status is None and folders:
            raise OSError("git cannot list the files of this repository")
        if status is None:  # git is not installed
            tracked.cancel()
            return Listing(None, [], sorted(walk_files(self._root)), frozenset(), [])
        branch, codes = status
        untracked = [path for code, path in codes if code == "??" and not path.endswith("/")]
        ignored = frozenset(path for code, path in codes if code == "!!" and path.endswith("/"))
        changes = [(code, path) for code, path in codes if code != "!!"]
        return Listing(branch, tracked.result(), untracked, ignored, changes)

    def _tracked(self, folders: GitFolders | None) -> list[str]:
        if folders is None:
            return []
        key = (fingerprint(str(folders.own / "index")),)
        names: list[str] = self._kept_by(
            "tracked", key, lambda: split_z(run_git(self._root, "ls-files", "-z", "-c", "--deduplicate"))
        )
        return names

    def _only_contents(self, changed: list[str]) -> set[str] | None:
        """The names of the changed files where nothing but contents of known files changed, None where more did.

        A file that was replaced changes its folder too, which then holds the same names as before.
        """
        state = self._known()
        if len(changed) > self.FEW or any(change.status == "renamed" for change in state.git.uncommitted_changes):
            return None
        known = {file.path for file in state.files}
        files = {path.removeprefix(self._prefix) for path in changed if path not in self._entries}
        good = files <= known and all(fingerprint(self._prefix + name) and not name.endswith(RULES) for name in files)
        same = all(hash(folder_names(path)) == self._entries[path] for path in changed if path in self._entries)
        return files if good and same else None

    def _changes_among(self, names: set[str]) -> list[Change]:
        """The uncommitted changes now that the contents of ``names`` alone are others."""
        state = self._known()
        if not names or not (folders := self._folders()):
            return state.git.uncommitted_changes
        asked = sorted(names)
        _, codes = read_status(self._root, folders.prefix, names=asked) or (None, [])
        others = [
            change
            for change in state.git.uncommitted_changes
            if change.path not in {clean_text(name) for name in names}
        ]
        return sorted(
            [*others, *describe_changes(self._root, codes, asked)],
            key=lambda change: (change.status == "untracked", change.path),
        )


class GitFolders(Struct, frozen=True):
    """The git dir of a work tree, the one that it shares with other work trees, and where in the tree the root is (""
    or "path/").
    """

    own: Path
    common: Path
    prefix: str


def find_git_folder(root: Path) -> GitFolders | None:
    """The git folders of the work tree that ``root`` lies in; None without git. Blocks."""
    prefix = git_prefix(root)
    found = run_git(root, "rev-parse", "--absolute-git-dir", "--git-common-dir")
    if prefix is None or not found:
        return None
    own, common, *_ = os.fsdecode(found).split("\n")
    return GitFolders(Path(own), (root / common).resolve(), prefix)


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
    with contextlib.suppress(OSError):
        head = (own / "HEAD").read_text().strip()
        if head.startswith("ref: "):
            return str(common / head[5:])
    return None


def of_submodule(path: str) -> Proof:
    """Of the files that say at which commit a repository inside ours is."""
    dot = Path(path, ".git")
    own = dot
    with contextlib.suppress(OSError):
        if dot.is_file():
            own = (dot.parent / dot.read_text("utf-8", "surrogateescape").strip().removeprefix("gitdir: ")).resolve()
    proof = {str(name): fingerprint(str(name)) for name in (own / "HEAD", own / "packed-refs")}
    branch = head_file(own, own)
    return proof | ({branch: fingerprint(branch)} if branch else {})

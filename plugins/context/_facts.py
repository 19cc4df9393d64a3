"""What a query of the plugin relevance needs of every file and commit, kept in memory and changed with the index."""

from __future__ import annotations

import bisect
import collections
import math
import os
import posixpath
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from cco_sidecar import FileFact, language_of
from cco_sidecar_plugins.context._definitions import FAMILIES
from cco_sidecar_plugins.context._identifiers import bare_stem, pair_stem, run_together
from cco_sidecar_plugins.context._index import Index

Scores = dict[int, float]  # by file number
Neighbours = dict[str, set[str]]  # kind of neighbour: paths

FIRST_STAGE_KIND = {"source": 1.0, "test": 0.75, "aux": 0.5}  # everything else 0.4

MAX_RANKED = 400


class File(Struct, frozen=True, gc=False):
    """A file as the ranking sees it."""

    id: int
    path: str
    kind: str
    language: str
    folders: tuple[str, ...]
    base: tuple[str, ...]
    stem: str
    bytes: int
    chunks: int


class Lists:
    """Numbers of files by words or names. Most have one file, whose number is in no list: all threads wait while the
    collector of garbage looks through tens of thousands of lists.
    """

    def __init__(self) -> None:
        self._of: dict[str, int | list[int]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._of

    def get(self, key: str) -> Sequence[int]:
        found = self._of.get(key, ())
        return (found,) if isinstance(found, int) else found

    def add(self, key: str, id: int) -> None:
        found = self._of.get(key)
        if isinstance(found, list):
            found.append(id)
        else:
            self._of[key] = id if found is None else [found, id]

    def remove(self, key: str, id: int) -> None:
        rest = list(self.get(key))
        rest.remove(id)
        if rest:
            self._of[key] = rest if rest[1:] else rest[0]
        else:
            del self._of[key]


class Facts:
    """All files, and the lists by which a query finds them."""

    def __init__(self) -> None:
        self.known: dict[str, FileFact] = {}
        self.listed: list[FileFact] | None = None  # the request's files that these facts were last compared with
        self.taken: dict[str, FileFact] = {}  # as they were said to be when they were taken up last
        self.files: dict[int, File] = {}
        self.ids: dict[str, int] = {}
        self.base = Lists()  # stem of a word -> files with it in their name
        self.folder = Lists()  # the same for folders
        self.inside = Lists()  # folder -> files directly in it
        self.called = Lists()  # last part of a module path -> files
        self.pairs = Lists()
        self.named = Lists()  # base name -> files
        self.bytes = 0
        self.revision = 0  # another one after each change
        self.paths_revision = 0  # another one after each change of paths
        self._rarities: dict[str, float] = {}  # of words in paths, by their stems,
        self._names: Scores = {}  # and of all in a file's name
        self._stems: tuple[str, list[int], list[int]] | None = None
        self._words: dict[str, tuple[str, ...]] = {}  # most folders' and many names' words are those of others

    COLUMNS = "select id, path, size, mtime_ns, kind, folders, base, bytes, chunks from file"

    def load(self, index: Index, numbers: Sequence[int] | None = None) -> None:
        """Take up all files of the index, or these."""
        wanted = f"{self.COLUMNS} where id in ({','.join(map(str, numbers))})" if numbers is not None else self.COLUMNS
        for row in index.database.execute(wanted):
            self.add(*row)

    def add(
        self,
        id: int,
        name: bytes,
        size: int,
        mtime_ns: int,
        kind: str,
        folders: str,
        base: str,
        bytes: int,
        chunks: int,
    ) -> None:
        path = os.fsdecode(name)
        if self.ids.get(path) == id:  # in all lists by its path already
            self.known[path] = FileFact(path, size, mtime_ns)
            self.bytes += bytes - self.files[id].bytes
            self.files[id] = msgspec.structs.replace(self.files[id], bytes=bytes, chunks=chunks)
            self.revision += 1
            return
        self.remove(path)
        self.known[path] = FileFact(path, size, mtime_ns)
        if kind == "secret":
            return
        language = sys.intern(language_of(path))
        words = [self._words.setdefault(text, tuple(map(sys.intern, text.split()))) for text in (folders, base)]
        file = File(
            id, path, sys.intern(kind), language, words[0], words[1], run_together(bare_stem(path)), bytes, chunks
        )
        self.files[id], self.ids[path] = file, id
        self.bytes += bytes
        for listing, key in self._listings(file):
            listing.add(key, id)
        self._changed()

    def compare(self, files: list[FileFact]) -> tuple[list[FileFact], list[str]]:
        """(new or changed files, paths that are gone), which are to be taken up before the next call."""
        last = self.listed or []
        others = [pair for pair in zip(files, last, strict=False) if pair[0] is not pair[1]]  # most are the last call's
        same_paths = len(files) == len(last) and all(file.path == before.path for file, before in others)
        if self.listed is not None and same_paths:
            fresh, gone = self.unread([file for file, _ in others]), []
        else:
            fresh, listed = self.unread(files), {file.path for file in files}
            gone = [path for path in self.known if path not in listed]
        self.listed = list(files)
        return fresh, gone

    def unread(self, files: Iterable[FileFact]) -> list[FileFact]:
        """Those that may hold something else than when they were taken up. One that is the same object is of the same
        look at the file, after which it was read.
        """
        return [file for file in files if self.known.get(file.path) != file and self.taken.get(file.path) is not file]

    def remove(self, path: str) -> None:
        self.known.pop(path, None)
        self.taken.pop(path, None)
        file = self.files.pop(self.ids.pop(path, -1), None)
        if file is None:
            return
        self.bytes -= file.bytes
        for listing, key in self._listings(file):
            listing.remove(key, file.id)
        self._changed()

    def _changed(self) -> None:
        self.revision += 1
        self.paths_revision += 1
        self._rarities.clear()
        self._names.clear()
        self._stems = None

    def _listings(self, file: File) -> Iterator[tuple[Lists, str]]:
        yield from ((self.base, word) for word in file.base)
        yield from ((self.folder, word) for word in file.folders)
        yield self.inside, file.path.rpartition("/")[0]
        yield self.named, file.path.rpartition("/")[2]
        if file.kind in FIRST_STAGE_KIND:
            yield self.called, module_path(file).rpartition("/")[2]
            yield self.pairs, pair_stem(file.path)

    def containing(self, word: str) -> Iterator[tuple[int, int]]:
        """(file, length of its name) of the files whose name contains ``word``."""
        if self._stems is None:
            ids = list(self.files)
            starts, place = [], 0
            for id in ids:
                starts.append(place)
                place += len(self.files[id].stem) + 1
            self._stems = "\n".join([self.files[id].stem for id in ids]), starts, ids
        text, starts, ids = self._stems
        place = text.find(word)
        while place >= 0:
            row = bisect.bisect_right(starts, place) - 1
            yield ids[row], len(self.files[ids[row]].stem)
            place = text.find(word, starts[row + 1]) if row + 1 < len(starts) else -1

    def resolve(self, importer: File, module: str) -> list[int]:
        """The files that ``module`` can mean: those whose path agrees with it in the most parts from the right."""
        if module.startswith("."):
            module = posixpath.normpath(posixpath.join(posixpath.dirname(importer.path), module))
            last = module.rpartition("/")[2]
            return [id for id in self.called.get(last) if module_path(self.files[id]) == module]
        parts = module.split("/")
        family = FAMILIES.get(importer.language)
        best: list[int] = []
        agreement = min(2, len(parts))
        for id in self.called.get(parts[-1]):
            file = self.files[id]
            if FAMILIES.get(file.language) != family or (file.kind == "test" and importer.kind != "test"):
                continue
            common = agreeing(parts, module_path(file).split("/"))
            if common > agreement:
                best, agreement = [], common
            if common == agreement:
                best.append(id)
        return best

    def rarity(self, number: int) -> float:
        return math.log(1 + len(self.files) / max(1, number))

    def rarity_in_paths(self, stem: str) -> float:
        if (found := self._rarities.get(stem)) is None:
            number = len(self.base.get(stem)) + len(self.folder.get(stem))
            found = self._rarities[stem] = self.rarity(number)
        return found

    def rarity_of_name(self, id: int) -> float:
        """The sum of the rarities of the words in a file's name."""
        if (found := self._names.get(id)) is None:
            found = self._names[id] = sum([self.rarity_in_paths(stem) for stem in self.files[id].base])
        return found


def module_path(file: File) -> str:
    """The path by which code imports a file: without ending; the folder for packages and for Go."""
    folder, _, name = file.path.rpartition("/")
    stem = name.partition(".")[0]
    if folder and (file.language == "go" or stem in ("__init__", "index", "mod", "lib")):
        return folder
    return f"{folder}/{stem}" if folder else stem


def agreeing(one: Sequence[str], other: Sequence[str]) -> int:
    """In how many parts, from the right, two paths are the same."""
    number = 0
    for left, right in zip(reversed(one), reversed(other), strict=False):
        if left != right:
            break
        number += 1
    return number


class Past:
    """The commits that a query needs, by today's paths: exact renames are followed backwards."""

    def __init__(self, index: Index) -> None:
        self.touched: dict[int, list[str]] = {}
        self.recent: dict[str, float] = collections.defaultdict(float)
        names: dict[str, str] = {}  # a former path -> the path today
        same: dict[str, str] = {}  # every path once
        rows = index.database.execute("select id, number, paths, renames from past order by id desc")
        self.commits = 0
        for age, (id, number, paths, renames) in enumerate(rows):
            self.commits += 1
            if renames:
                pairs = os.fsdecode(renames).split("\0")
                names |= {old: names.get(new, new) for old, new in zip(pairs[::2], pairs[1::2], strict=True)}
            if paths:
                today = [
                    same.setdefault(path, path)
                    for name in os.fsdecode(paths).split("\0")
                    for path in (names.get(name, name),)
                ]
                self.touched[id] = today
                if number <= 30:
                    weight = math.exp(-age / 500)
                    for path in today:
                        self.recent[path] += weight
        self._by_file: tuple[Any, Scores, list[int]] = (None, {}, [])

    def by_file(self, facts: Facts) -> tuple[Scores, list[int]]:
        """(the feature `recent` of every file that has it, the files with the most)."""
        if self._by_file[0] != (moment := (id(facts), facts.paths_revision)):
            scores = normal(
                {facts.ids[path]: math.log(1 + weight) for path, weight in self.recent.items() if path in facts.ids}
            )
            self._by_file = moment, scores, sorted(scores, key=lambda id: -scores[id])[:MAX_RANKED]
        return self._by_file[1:]


def normal(scores: Scores) -> Scores:
    top = max(scores.values(), default=0.0)
    return {id: score / top for id, score in scores.items()} if top > 0 else {}

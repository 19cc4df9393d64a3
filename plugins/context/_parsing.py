"""Reads a project's own files for ``metadata`` and ``reports``.

Nothing outside the root is read, no secret file, and never more than a bound. A file that cannot be read tells nothing
and costs one line in the log.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import stat
import time
import typing
from collections.abc import Callable, Collection, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import Struct

from cco_sidecar import MB, ProjectState, one_line
from cco_sidecar_plugins.context._fingerprints import is_recent
from cco_sidecar_plugins.context._withheld import is_secret

if TYPE_CHECKING:  # each is imported where a project has a file for it: all of them would hold up the start
    from configparser import ConfigParser
    from xml.etree.ElementTree import Element

log = logging.getLogger("cco")
T = TypeVar("T")
Facts = dict[str, Any]  # for the section ``metadata``

REPORTS = (  # files that tell about a project and may be ignored by git, so they are looked for by name
    ".coverage", "coverage.xml", "coverage/coverage-summary.json", "coverage/lcov.info", "lcov.info", "junit.xml",
    "test-results.xml", "reports/junit.xml", "build/test-results.xml", "bandit.json", "results.sarif",
    ".python-version",
)  # fmt: skip


class ProjectFiles:
    """The files below ``root`` that may be read; with ``listed`` only those (and REPORTS, which git may ignore). Once
    ``room`` bytes were read no further file is.
    """

    def __init__(self, root: Path, listed: Collection[str] | None = None, room: float = math.inf) -> None:
        self.root = os.path.realpath(root)
        self._listed, self._room = None if listed is None else tuple(listed), room
        self._counted = dict[str, int]()  # bytes of the files that were read
        self.incomplete = False  # a file that is there could not be read, or not in time: later it may be
        self.told, self.before = Told(self._listed), Told(None)

    def parsed(self, name: str, parse: Callable[[File], T], limit: int = MB) -> T | None:
        """What ``parse`` makes of the file ``name`` (relative to the root); None where it is missing, has more than
        ``limit`` bytes, must not be read or makes ``parse`` raise. Blocks.
        """
        try:
            if self._room <= 0 and name not in self._counted:
                self.tell("", "further manifests, as those that were read are too large together")
                return None
            content = self._read(name, limit)
            self._count(name, len(content or b""))
            return None if content is None else parse(File(self, name, content))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # a boundary: whatever a repository may hold
            if isinstance(error, OSError) and not isinstance(error, IsADirectoryError):  # TimeoutError is one too
                self.incomplete = True
            shows_content = type(error).__module__ == "configparser"  # its message quotes lines of the file
            self.tell(name, type(error).__name__ if shows_content else one_line(error)[:200])
            return None

    def parsed_once(self, name: str, parse: Callable[..., T], *given: Any) -> T | None:
        """What ``parse`` makes of the file and of what is ``given``, for which it asks no other file. It is kept for
        those who ask again, and by ``while_unchanged`` until the file or what is given is another. Blocks.
        """
        key = name, parse
        kept = self.told.kept.get(key) or self._kept_before(name, parse)
        if not kept or kept[0] != given:
            found = self.parsed(name, lambda file: parse(file, *given))
            kept = given, found, self._counted.get(name)
        self.told.kept[key] = kept
        return typing.cast("T | None", kept[1])

    def _kept_before(self, name: str, parse: Any) -> Kept | None:
        """What ``parse`` made of the file, where that is the same now. Blocks."""
        kept, looked = self.before.kept.get((name, parse)), self.before.looked.get(name)
        if not kept or not looked or self._room <= 0:
            return None
        if (self._lists(looked[0]), facts_of(self._place(name))) != looked[1:]:
            return None
        self.told.looked.setdefault(name, looked)
        if kept[2] is not None:
            self._count(name, kept[2])
        return kept

    def _count(self, name: str, size: int) -> None:
        self._room -= 0 if name in self._counted else size
        self._counted[name] = size

    def ending_with(self, *endings: str) -> list[str]:
        """The listed files whose names end so, in any case; those near the root first, at most 300."""
        found = self.told.endings[endings] = self._ending_with(endings)
        return found

    def _ending_with(self, endings: tuple[str, ...]) -> list[str]:
        there = any(f"{ending}\n" in self._names for ending in endings)  # in most projects of most none is
        found = [name for name in self._listed or () if name.lower().endswith(endings)] if there else []
        return sorted(found, key=lambda name: (name.count("/"), name))[:300]

    @functools.cached_property
    def _names(self) -> str:
        return "\n".join((*(self._listed or ()), "")).lower()

    def would_tell(self, told: Told) -> bool:
        """Whether all that was ``told`` would be told now. Blocks."""
        return all(facts_of(self._place(name)) == facts for name, (_, _, facts) in told.looked.items()) and (
            self._listed == told.listed  # to look through all names takes longer
            or (
                all(self._ending_with(endings) == names for endings, names in told.endings.items())
                and all(self._lists(inside) == is_listed for inside, is_listed, _ in told.looked.values())
            )
        )

    def moment(self, name: str) -> int | None:
        """When the file was last changed, in nanoseconds; None where there is none. Blocks."""
        try:
            return os.stat(os.path.join(self.root, name)).st_mtime_ns
        except (OSError, ValueError):
            return None

    def tell(self, name: str, why: str) -> None:
        """Log once that (part of) a file tells nothing."""
        tell_once(os.path.join(self.root, name), why)

    def _read(self, name: str, limit: int) -> bytes | None:
        place = os.path.realpath(self._place(name))
        self._look(name, self._inside(place))
        self._check(place)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a FIFO must not block
        with open(place, "rb", opener=lambda path, _: os.open(path, flags)) as file:
            opened = f"/proc/self/fd/{file.fileno()}"
            # A link may have been put in the way since.
            self._check(os.readlink(opened) if os.path.lexists(opened) else os.path.realpath(place))
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            content = file.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"it has more than {limit} bytes")
        return content

    def _look(self, name: str, inside: str) -> None:
        """Take note of what shows that the file, which is at ``inside``, is another one; before it is read. Blocks."""
        now, facts = time.time_ns(), facts_of(self._place(name))
        hides_changes = any(is_recent(moment, now) for moment in facts[:2])
        looked = inside, self._lists(inside), None if hides_changes else facts
        self.told.looked.setdefault(name, looked)  # so one that changes between two looks is another the next time

    def _place(self, name: str) -> str:
        return os.path.join(self.root, name)

    def _lists(self, inside: str) -> bool:
        return self._listed is None or inside in self._listed_names

    @functools.cached_property
    def _listed_names(self) -> frozenset[str]:
        return frozenset(self._listed or ())

    def _inside(self, place: str) -> str:
        return os.path.relpath(place, self.root).replace(os.sep, "/")

    def _check(self, place: str) -> None:
        inside = self._inside(place)
        if inside.startswith("../") or os.path.isabs(inside):
            raise ValueError("it lies outside the project")
        if is_secret(inside) or ".git" in inside.split("/"):
            raise ValueError("it may hold secrets")
        if not self._lists(inside) and inside not in REPORTS and os.path.exists(place):
            raise ValueError("git ignores it")


Looked = tuple[str, bool, Any]  # of a file where it is, whether that is listed, and its facts
Kept = tuple[tuple[Any, ...], Any, int | None]  # what was given, what was made of it and a file, and the file's size


class Told(Struct):
    """What was told of files: the names that were listed, those with the endings that were asked for, what was looked
    at, and what was made of a file and of what else was given.
    """

    listed: tuple[str, ...] | None
    endings: dict[tuple[str, ...], list[str]] = {}
    looked: dict[str, Looked] = {}
    kept: dict[tuple[str, Any], Kept] = {}


def remembered(read: Callable[[ProjectState], tuple[Facts, ProjectFiles]]) -> Callable[[ProjectState], Facts]:
    """The facts of ``read``, which gives them with the files that it read. It is called again where these are
    incomplete, and where the project may be another one: its digest is, or a report's time, since a report may be a
    link to a file that git ignores.
    """
    last: tuple[Any, Facts] = (None, {})

    @functools.wraps(read)
    def facts(project: ProjectState) -> Facts:
        nonlocal last
        key = (project.root, project.digest, *map(ProjectFiles(Path(project.root)).moment, REPORTS))
        known, found = last
        if known != key:
            found, files = read(project)
            if not files.incomplete:
                last = key, found
        return found

    return facts


def facts_of(path: str) -> tuple[int, ...]:
    """The times, size, number and kind of the file behind ``path``; none where none is. Blocks."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return ()
    return facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_ino, facts.st_dev, facts.st_mode


def while_unchanged(read: Callable[[ProjectFiles], Facts]) -> Callable[[ProjectFiles], Facts]:
    """The facts of ``read``, which is called again where what its files told it is another now: most edits are of
    other files, and parsing hundreds of manifests takes a quarter of a second. What it parses once stays of those that
    are the same.
    """
    last: tuple[str, Told, Facts] | None = None

    @functools.wraps(read)
    def facts(files: ProjectFiles) -> Facts:
        nonlocal last
        known = last if last and last[0] == files.root else None
        if known and files.would_tell(known[1]):
            found = known[2]
            told = msgspec.structs.replace(known[1], listed=files.told.listed)
        else:
            files.before = known[1] if known else files.before
            found, told = read(files), files.told
        last = None if files.incomplete else (files.root, told, found)
        return found

    return facts


@functools.lru_cache(1000)
def tell_once(path: str, why: str) -> None:
    log.warning("%s: left out: %s", path, why)


class File:
    """A file's content in whatever form it is wanted; each raises where the file is not of that form."""

    def __init__(self, files: ProjectFiles, name: str, content: bytes) -> None:
        self.files, self.name, self.content = files, name, content

    def odd(self, why: str) -> None:
        """Log once that a part of this file is left out."""
        self.files.tell(self.name, why)

    def text(self) -> str:
        """The text, by the file's byte order mark or the NULs of UTF-16 and UTF-32, else as UTF-8."""
        return self.content.decode(json.detect_encoding(self.content), "replace")

    def json(self) -> Any:
        """The value. An integer of thousands of digits is null, since Python refuses to read it."""
        return json.loads(self.text(), parse_int=lambda digits: int(digits) if len(digits) < 4000 else None)

    def toml(self) -> dict[str, Any]:
        text = self.text()
        if LONG_KEY.search(text):
            raise ValueError("it has a key of a hundred parts")
        import tomllib

        return tomllib.loads(text)

    def ini(self) -> ConfigParser:
        from configparser import ConfigParser

        config = ConfigParser(interpolation=None, strict=False)
        # its pattern for a line takes time by the square of a run of blanks
        config.read_string(re.sub(r"(?<=\S)[^\S\n]{2,}", " ", self.text()))
        return config

    def table(self, value: Any, *path: str) -> dict[str, Any]:
        """The table below ``path``; empty where it is missing or null, or (with a line in the log) something else."""
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict):
            self.odd(f"{'.'.join(path) or 'its content'} is no table")
        return value if isinstance(value, dict) else {}

    def xml(self, keep: Set[str] | None = None) -> Element:
        """The root element, names without their prefixes. With ``keep`` only it and the elements of these names, each
        below the nearest one that is kept, and no text. Entities are not expanded: a file that declares a document type
        of its own is refused.
        """
        from xml.etree import ElementTree
        from xml.parsers import expat

        builder, kept = ElementTree.TreeBuilder(), list[str]()
        parser = expat.ParserCreate()
        number = 0

        def start(name: str, attributes: dict[str, str]) -> None:
            nonlocal number
            number += 1
            if number > 1_000_000:
                raise ValueError("it has more than a million elements")
            name = name.rpartition(":")[2]
            kept.append(name if keep is None or number == 1 or name in keep else "")
            if kept[-1]:
                builder.start(name, {key: value for key, value in attributes.items() if ":" not in key})

        def end(_: str) -> None:
            if name := kept.pop():
                builder.end(name)

        def refuse_own_type(name: str, system: str | None, public: str | None, has_subset: bool) -> None:
            if has_subset:
                raise ValueError("it declares a document type of its own")

        parser.StartElementHandler, parser.EndElementHandler = start, end
        parser.StartDoctypeDeclHandler = refuse_own_type
        if keep is None:
            parser.CharacterDataHandler = builder.data
        parser.Parse(self._xml_text(), True)
        return builder.close()

    def _xml_text(self) -> str:
        """The text by its mark, else by its declaration, unless that says UTF-16 of what is plainly not."""
        declared = re.match(rb"""\s*<\?xml[^>]{0,100}?encoding\s*=\s*["']([\w.-]{1,40})""", self.content)
        encoding: str = json.detect_encoding(self.content)
        if encoding == "utf-8" and declared and not re.match(rb"(?i)utf-?(16|32)|ucs|iso-10646", declared[1]):
            encoding = declared[1].decode("ascii")
        return self.content.decode(encoding, "replace")


LONG_KEY = re.compile(  # tomllib takes time by the square of its parts
    r"""(?:\.[ \t]{0,99}(?:[\w-]{1,99}|"[^"\n]{0,99}"|'[^'\n]{0,99}')[ \t]{0,99}){99}"""
)


def number_of(text: str | None) -> int | None:
    """The count that a report's attribute gives, None without it. Raises ValueError where it is no count."""
    if text is not None and not re.fullmatch(r"\s*[0-9]{1,15}\s*", text):
        raise ValueError(f"{text[:20]!r} is no count")
    return None if text is None else int(text)

"""Relevance: the files that an agent's task is about, from an index that keeps itself up to date.

The ranking is lexical and looks at more than the text of a file. Every identifier is taken apart (``SessionCookie`` is
also session and cookie), files are searched in chunks of 50 lines, and what a file defines, is called, lies beside,
imports, is tested by and was changed for adds to its score:

    query     words of the task, title heavier than body, then of what earlier agents decided
    features  thirteen numbers per file, each divided by its largest in the project (FEATURES: what and how much)
    stages    the sum of what the query alone says picks the best files; their folders, imports and tests then add to
    others score     the sum times a factor for the file's kind (KIND_FACTORS) and language, plus what is certain
    (BOOSTS)

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
import bisect
import collections
import contextlib
import ctypes
import functools
import gc
import hashlib
import heapq
import json
import logging
import math
import os
import posixpath
import re
import secrets
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

import cco_sidecar
from cco_sidecar import (
    DATA,
    PROSE,
    ContextKey,
    ContextRequest,
    Contexts,
    FileFact,
    ProjectState,
    RankedFile,
    RankRequest,
    Sections,
    hookimpl,
    in_thread,
    is_young,
    language_of,
    read_text_file,
    redact,
    run_git,
)
from cco_sidecar_plugins._hooks import waits_for_nothing
from cco_sidecar_plugins._patterns import late_pattern
from cco_sidecar_plugins.context._first_files import FIRST_FILES
from cco_sidecar_plugins.context._kinds import SPOKEN_KIND, is_build_file, kinds_of_task, reading_of
from cco_sidecar_plugins.context._languages import WEB, spoken_by
from cco_sidecar_plugins.context._prepared import PreparedContexts
from cco_sidecar_plugins.context._stop_words import NO_MATCH, STOP_WORDS
from cco_sidecar_plugins.context._withheld import is_secret

log = logging.getLogger("cco_sidecar.relevance")

Scores = dict[int, float]  # by file number
Neighbours = dict[str, set[str]]  # kind of neighbour: paths

# ---- Tables: what counts how much
# --------------------------------------------------------------------------------------------

FEATURES = {
    "chunk": 4.4,  # bm25 of the file's best chunk
    "hmax": 1.5,  # bm25 of the best past commit that touched it
    "recent": 1.35,  # how often and how lately it was changed
    "dirs": 1.1,  # what the best files of its folder got
    "pdir": 1.05,  # query words among its folders
    "sym": 0.65,  # bm25 of all names that it defines
    "defx": 0.6,  # a query word is a name that it defines
    "sub": 0.6,  # a query word is part of its name
    "hdoc": 0.55,  # all matching past commits together
    "pcov": 0.5,  # how much of its name the query says
    "pbase": 0.4,  # query words in its name
    "imp": 0.4,  # the best files import it
    "pair": 0.35,  # the test of a good file, the file of a good test
}
SPEAKING = ("chunk", "sym", "defx", "sub", "pdir", "pbase")  # a word of the task is in the file, or in its path
FIRST_STAGE_KIND = {"source": 1.0, "test": 0.75, "aux": 0.5}  # everything else 0.4

KIND_FACTORS = {  # by what reading_of says
    "coding": {"source": 1.0, "test": 0.7, "markup": 0.2, "config": 0.1, "aux": 0.08, "docs": 0.05, "other": 0.03},
    "architect": {"source": 1.0, "docs": 0.6, "config": 0.6, "markup": 0.4, "test": 0.4, "aux": 0.2, "other": 0.05},
    "infrastructure": {
        "config": 1.0,
        "markup": 0.8,
        "aux": 0.6,
        "source": 0.4,
        "docs": 0.3,
        "test": 0.15,
        "other": 0.05,
    },
    "qa": {"test": 1.0, "source": 0.25, "markup": 0.1, "config": 0.1, "aux": 0.08, "docs": 0.05, "other": 0.03},
    "security": {"source": 1.0, "config": 0.7, "markup": 0.6, "test": 0.4, "aux": 0.2, "docs": 0.1, "other": 0.05},
    "documentation": {
        "docs": 1.0,
        "source": 0.5,
        "markup": 0.25,
        "aux": 0.25,
        "config": 0.2,
        "test": 0.1,
        "other": 0.05,
    },
    "support": {"docs": 1.0, "source": 0.8, "config": 0.5, "markup": 0.5, "test": 0.3, "aux": 0.3, "other": 0.05},
}
OWN_KIND = 0.2  # from this factor on a kind is the agent's own; other files come where something speaks for them
OTHER_LANGUAGE = 0.5  # factor for code in a language that is not the specialist's

BOOSTS = {  # added after all factors: a best file scores some 5 to 10
    "named in the task": 12.0,
    "changed by an earlier agent": 3.0,
    "uncommitted change": 2.0,
}

MAX_RANKED = 400
EXPLAINED = 50  # of them with words from the index
MAX_CHUNKED = 120  # of them with their best chunks
MAX_FILE = 400_000  # bytes; what is longer is data
MAX_LINE = 400  # characters on average; what has longer lines was made by a machine
CHUNK_LINES = 50
MAX_CHUNKS = 4096  # row number of a chunk = file number * MAX_CHUNKS + chunk number
MAX_COMMITS = 12_000
MAX_TOUCHED = 60  # files in a commit that still says something about each of them
MAX_TERMS = 64
MAX_PAIRS = 24  # adjacent words of a task that are looked for as phrases
BODY = 1_500  # characters of a task's text after its title
SMALL_UPDATE = (200, 2_000_000, 300)  # files, bytes and commits that are taken up within a call

SECURITY_WORDS = """auth authentication authorization login password passwd credential token session cookie jwt oauth
    permission role access
    crypto encrypt decrypt hash hmac sign verify certificate tls ssl secret key random csrf cors xss sanitize escape
    validate injection
    upload request header redirect deserialize pickle yaml eval exec shell subprocess path traversal middleware admin"""
GENERAL_WORDS = frozenset(  # say that something is to be looked at, not what
    """audit review check scan analyze analyse assess inspect look find security secure vulnerability vulnerabilities
    risk threat model code
    codebase repository repo project application app whole entire full complete general file files source issue issues
    report""".split()
)

# ---- Kinds and languages of files, by path
# -----------------------------------------------------------------------------------

MARKUP = frozenset("html css sql protobuf graphql terraform shell powershell".split())
OWN_LANGUAGE = (".y", ".yy", ".g4", ".peg", ".pest", ".ipynb")  # source in a language of its own
TEST_FOLDERS = frozenset(
    "test tests testing __tests__ spec specs e2e testdata test-data test_data testsuite fixtures __snapshots__ mocks"
    " __mocks__ playground".split()
)
AUX_FOLDERS = frozenset(
    """doc docs documentation website site example examples demo demos sample samples bench benches benchmark
    benchmarks tools scripts script ci extras changelog changelogs release licenses locale locales migrations .github
    .gitlab .circleci""".split()
)
FOREIGN_FOLDERS = frozenset(
    "vendor vendored third_party third-party node_modules bower_components dist out target deps .venv venv"
    " site-packages".split()
)
TEST_NAME = late_pattern(r"^(test_|tests?\.|conftest\.)|([._-](tests?|spec))\.[a-z]+$", re.IGNORECASE)
TEST_CLASS = late_pattern(r"[a-z0-9](Tests?|TestCase|Spec|IT)\.(java|kt|kts|cs|scala|groovy|swift|php)$")
MADE_NAME = late_pattern(
    r"\.d\.ts$|\.pb\.(go|cc|h)$|_pb2(_grpc)?\.pyi?$|[._-]generated[._]|^zz_generated|^generated_.*\.(go|py|js|ts)$|\.g\.(dart|cs)$",
    re.IGNORECASE,
)
SETUP_NAMES = frozenset(
    "setup.py noxfile.py conf.py tasks.py __version__.py version.py version.go version.rb version.ts version.js".split()
)
DATA_NAME = late_pattern(
    r"\.(map|snap|lock|svg|csv|tsv|po|pot)$|[.-]lock\.(json|ya?ml)$|^(go\.sum|npm-shrinkwrap\.json)$|\.min\.(js|css)$",
    re.IGNORECASE,
)
PICTURE = late_pattern(r"(?<=\").{2000,}(?=\")")  # and other output in a notebook, which is one line of it
PLAIN_NAMES = frozenset("readme license changelog changes contributing authors news history todo".split())


def classify(path: str) -> tuple[str, bool]:
    """(kind, whether its content is worth indexing) by the path alone; kinds are those of KIND_FACTORS, and secret."""
    *folders, name = path.split("/")
    places = {folder.lower() for folder in folders}
    language = language_of(path)
    if is_secret(path):
        return "secret", False
    if FOREIGN_FOLDERS & places or folders[:1] == ["build"]:  # deeper down a folder called build may well be source
        return "other", False
    if DATA_NAME.search(name):
        return "other", False
    if is_build_file(name):
        return ("other" if TEST_FOLDERS & places else "config"), True
    if language in PROSE or (language == "unknown" and name.lower() in PLAIN_NAMES):
        return ("config" if name.startswith("requirements") else "docs"), True
    if language in DATA:
        return ("other" if TEST_FOLDERS & places else "config"), True
    if language == "unknown" and not name.endswith(OWN_LANGUAGE):
        return "other", False
    made = bool(MADE_NAME.search(name))
    if TEST_FOLDERS & places or TEST_NAME.search(name) or TEST_CLASS.search(name):
        return ("other" if language in MARKUP else "test"), not made
    if made or AUX_FOLDERS & places or name in SETUP_NAMES:
        return "aux", not made or name.endswith(".d.ts")
    return ("markup" if language in MARKUP else "source"), True


# ---- Words: identifiers taken apart, and stems
# -------------------------------------------------------------------------------

IDENTIFIER = re.compile(r"\w+")
PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


def parts_of(identifier: str) -> list[str]:
    if identifier.isascii():
        return [part.lower() for part in PARTS.findall(identifier)]
    return [part for part in identifier.lower().split("_") if part]


class Splitter(dict[str, str]):
    """Identifier -> its words in lower case, for a compound also all of them as one; remembers what it has seen."""

    LIMIT = 200_000
    LONGEST = 80  # characters; longer ones are encoded data

    def __missing__(self, identifier: str) -> str:
        parts = parts_of(identifier) if len(identifier) <= self.LONGEST else []
        if len(self) >= self.LIMIT:
            self.clear()
        found = self[identifier] = " ".join([*parts, "".join(parts)] if len(parts) > 1 else parts)
        return found

    def text(self, text: str) -> str:
        return " ".join(map(self.__getitem__, IDENTIFIER.findall(text)))


class Stemmer:
    """The stems of words as SQLite's porter tokenizer makes them, so that ours are always the same as the index's."""

    LIMIT = 100_000

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._database.executescript(
            "create virtual table word using fts5 (body, tokenize = 'porter unicode61');"
            "create virtual table stem using fts5vocab (word, instance);"
        )

    def stems(self, words: Iterable[str]) -> dict[str, str]:
        """Word -> stem, for words that Splitter gives."""
        with self._lock:
            words = list(words)
            if len(self._known) > self.LIMIT:
                self._known.clear()
            if unknown := [word for word in dict.fromkeys(words) if word not in self._known]:
                self._known |= {word: word for word in unknown}
                self._database.execute("begin")
                self._database.executemany("insert into word (rowid, body) values (?, ?)", enumerate(unknown))
                self._known |= {
                    unknown[row]: stem
                    for row, stem in self._database.execute('select doc, term from stem where "offset" = 0')
                }
                self._database.execute("rollback")
            return {word: self._known[word] for word in words}


def bare_stem(path: str) -> str:
    """The base name without endings and punctuation; of ``__init__.py`` and the like the folder's: what a file is
    called.
    """
    folder, _, name = path.rpartition("/")
    stem = name.partition(".")[0] if name[0] != "." else name[1:]
    if stem in ("__init__", "index", "mod", "lib", "main", "__main__") and folder:
        stem = folder.rpartition("/")[2]
    return stem


def run_together(name: str) -> str:
    return "".join(parts_of(name))


TEST_AFFIX = late_pattern(
    r"^tests?[._-](?=.)|(?<=.)[._-](tests?|spec)(?=\.|$)|^Test(?=[A-Z])|(?<=[a-z0-9])(Tests?|TestCase|Spec|IT)(?=\.|$)"
)


def pair_stem(path: str) -> str:
    """What a source file and its test are both called."""
    folder, _, name = path.rpartition("/")
    return run_together(bare_stem(f"{folder}/{TEST_AFFIX.sub('', name, count=1)}"))


# ---- Definitions and imports
# -------------------------------------------------------------------------------------------------

START = r"^[ \t]*(?:export[ \t]+)?(?:default[ \t]+)?(?:declare[ \t]+)?(?:abstract[ \t]+)?(?:async[ \t]+)?"
RUST_START = r"^[ \t]*(?:pub(?:\([^)\n]*\))?[ \t]+)?"
CLASS_WORDS = (
    "class|interface|enum|record|object|trait|struct|protocol|extension|fun|func|function|def|namespace|typealias"
)
MODIFIERS = "public|private|protected|internal|static|final|override|abstract|async|virtual|synchronized"
METHOD_START = r"^[ \t]+(?:(?:static|async|get|set|public|private|protected|readonly)[ \t]+)*"
DEFINITIONS = {  # by family, of lines; compiled when they are needed
    "python": [r"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)", r"^([A-Za-z_]\w*)[ \t]*(?::[^=\n]+)?=(?!=)"],
    "ruby": [
        r"^[ \t]*(?:def[ \t]+(?:self\.)?|class[ \t]+|module[ \t]+)([\w:]+)",
        r"^[ \t]*(?:attr_\w+|scope)[ \t]+:(\w+)", r"^[ \t]*([A-Z]\w*)[ \t]*=",
    ],
    "go": [r"^func[ \t]+(?:\([^)\n]*\)[ \t]*)?(\w+)", r"^(?:type|var|const)[ \t]+(\w+)",
        r"^\t(\w+)[ \t]+(?:struct|interface)\b"],
    "rust": [
        RUST_START + r"(?:(?:default|async|unsafe|const|extern[ \t]+\"C\")[ \t]+)*"
        r"(?:fn|struct|enum|trait|mod|type|const|static)[ \t]+(\w+)",
        r"^[ \t]*macro_rules![ \t]*(\w+)",
    ],
    "web": [
        START + r"(?:function\*?|class|interface|type|enum|namespace)[ \t]+(\w+)",
        r"^(?:export[ \t]+)?(?:const|let|var)[ \t]+(\w+)",
        r"^[ \t]+(?:const|let|var)[ \t]+(\w+)[ \t]*=[ \t]*"
        r"(?:async[ \t]*)?(?:function|\([^)\n]*\)[ \t]*(?::[^=\n]+)?=>|\w+[ \t]*=>)",
        METHOD_START + r"(?!(?:if|for|while|switch|catch|function|return)\b)(\w+)[ \t]*\([^()\n]*\)[^;\n]*\{$",
    ],
    "classes": [
        rf"^[ \t]*(?:[\w@]+[ \t]+){{0,6}}?(?:{CLASS_WORDS})[ \t]+(\w+)",
        rf"^[ \t]+(?:(?:{MODIFIERS})[ \t]+)+[\w<>\[\],.?]+[ \t]+(\w+)[ \t]*\(",
    ],
    "c": [
        r"^[A-Za-z_][\w \t*&:<>,~]*?[ \t*&:](~?\w+)[ \t]*\([^;\n]*$",
        r"^[ \t]*(?:typedef[ \t]+)?(?:struct|enum|union|class|namespace)[ \t]+(\w+)",
        r"^[ \t]*#[ \t]*define[ \t]+(\w+)",
    ],
    "any": [
        r"^[ \t]*(?:local[ \t]+)?(?:defp?|defmodule|defmacro|function|sub|package"
        r"|fn|func|class|module|proc|message|service)[ \t]+([\w.:]+)",
    ],
}  # fmt: skip
IMPORTS = {  # by family, of lines; compiled when they are needed
    "python": [r"^[ \t]*from[ \t]+([.\w]+)[ \t]+import[ \t]+\(?([\w, \t]*)", r"^[ \t]*import[ \t]+([\w.]+)()"],
    "ruby": [r"^[ \t]*require(?:_relative)?[ \t(]+[\"']([^\"'\n]+)()"],
    "go": [r"^(?:import)?[ \t]+(?:[\w.]+[ \t]+)?\"([\w./-]+)\"()"],
    "rust": [RUST_START + r"use[ \t]+([\w:]+)()", RUST_START + r"mod[ \t]+(\w+);()"],
    "web": [r"(?:\bfrom|\bimport|\brequire|\bexport)[ \t(]*[\"']([^\"'\n]+)[\"']()"],
    "classes": [r"^[ \t]*(?:import|using|use)[ \t]+(?:static[ \t]+)?([\w.\\]+)()"],
    "c": [r"^[ \t]*#[ \t]*include[ \t]*[<\"]([^>\"\n]+)()"],
    "any": [],
}  # fmt: skip
FAMILIES = {
    **{name: name for name in ("python", "ruby", "go", "rust")}, **dict.fromkeys(WEB, "web"),
    **dict.fromkeys(("c", "cpp"), "c"),
    **dict.fromkeys(("java", "kotlin", "scala", "csharp", "swift", "php", "dart"), "classes"),
    **dict.fromkeys(
        "perl elixir erlang haskell clojure lua r julia shell powershell sql zig nim protobuf graphql".split(), "any"
    ),
}  # fmt: skip


def definitions(language: str, text: str) -> collections.Counter[str]:
    """The names that a file defines, as written, and how often."""
    return collections.Counter(
        name
        for pattern in DEFINITIONS.get(FAMILIES.get(language, ""), ())
        for name in re.findall(pattern, text, re.MULTILINE)
    )


def imports(language: str, text: str) -> list[str]:
    """What a file imports, as paths without endings; relative ones begin with a dot."""
    family = FAMILIES.get(language, "")
    found: dict[str, None] = {}
    for pattern in IMPORTS.get(family, ()):
        for module, names in re.findall(pattern, text, re.MULTILINE):
            module = import_path(family, module)
            found[module] = None
            for name in names.replace(",", " ").split()[:20]:  # from package import module
                found[f"{module}/{name}"] = None
    return [module for module in found if module.strip("./")][:200]


def import_path(family: str, module: str) -> str:
    if family == "python":
        bare = module.lstrip(".")
        dots = len(module) - len(bare)
        return ("./" + "../" * (dots - 1) if dots else "") + bare.replace(".", "/")
    if family == "rust":
        return module.replace("crate::", "").replace("self::", "").replace("super::", "").replace("::", "/")
    if family == "classes":
        return module.replace("\\", "/").replace(".", "/")
    return re.sub(r"\.(js|mjs|cjs|jsx|ts|mts|cts|tsx|vue|svelte|h|hpp|hh|rb)$", "", module)


# ---- The index: files in a SQLite database, written by whole files in transactions
# -----------------------------------------

SCHEMA_VERSION = 5  # to be raised with every change of the schema, of kinds, words, definitions or imports
APPLICATION_ID = 0x63636F72
SCHEMA = """
create table meta (key text primary key, value) without rowid;
create table file (
    id integer primary key, path blob not null unique, size integer not null, mtime_ns integer not null, hash blob,
    kind text not null, folders text not null, base text not null, bytes integer not null, chunks integer not null,
    imports text not null
);
create table name (name text not null, file integer not null, shown text not null, number integer not null, primary key
    (name, file)) without rowid;
create index name_of_file on name (file);
create table past (id integer primary key, hash text not null unique, subject text not null, number integer not null,
    paths blob, renames blob);
create virtual table chunk using fts5 (body, tokenize = 'porter unicode61');
create virtual table symbol using fts5 (body, tokenize = 'porter unicode61');
create virtual table message using fts5 (body, tokenize = 'porter unicode61');
"""


class Foreign(sqlite3.DatabaseError):
    """The database is not an index of this version."""


class Content(Struct):
    """What the index takes from a file's text."""

    hash: bytes | None = None
    bytes: int = 0
    chunks: list[str] = []
    names: collections.Counter[str] = msgspec.field(default_factory=collections.Counter)
    imports: list[str] = []


class Index:
    """The database. One thread at a time, but for ``beside``; raises sqlite3.Error. Opening makes an empty one where
    there is none.
    """

    BATCH = (400, 4_000_000)  # files and bytes in a transaction

    def __init__(self, path: Path, patience: float) -> None:
        self.path = path
        self.splitter = Splitter()
        self.stemmer = Stemmer()
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        self.inode = path.stat().st_ino
        self.database, self._second = (
            sqlite3.connect(path, isolation_level=None, timeout=patience, check_same_thread=False) for _ in range(2)
        )
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        for pragma in ("journal_mode = wal", "synchronous = normal", "cache_size = -16000"):
            self.database.execute(f"pragma {pragma}")
        self._second.execute("pragma cache_size = -8000")
        if self._is_empty():  # asked without the lock first: a builder of another process may hold it for long
            with self.transaction():
                if self._is_empty():
                    for statement in SCHEMA.split(";\n"):
                        self.database.execute(statement)
                    self.database.execute(f"pragma application_id = {APPLICATION_ID}")
                    self.database.execute(f"pragma user_version = {SCHEMA_VERSION}")
        if (self.value("pragma application_id"), self.value("pragma user_version")) != (APPLICATION_ID, SCHEMA_VERSION):
            raise Foreign("not an index of this version")

    def _is_empty(self) -> bool:
        return bool(self.value("select count(*) from sqlite_schema") == 0)

    def close(self) -> None:
        self._second.close()
        self.database.close()

    @contextlib.contextmanager
    def beside(self, sql: str, *parameters: Any) -> Iterator[Future[list[Any]]]:
        """The rows, which another thread looks for while the block runs: SQLite leaves the interpreter to others."""
        rows = in_thread("relevance", lambda: self._second.execute(sql, parameters).fetchall())
        try:
            yield rows
        finally:
            wait([rows])  # nobody may close the index before

    def value(self, sql: str, *parameters: Any) -> Any:
        row = self.database.execute(sql, parameters).fetchone()
        return row[0] if row else None

    def set_meta(self, key: str, value: Any) -> None:
        self.database.execute("insert or replace into meta (key, value) values (?, ?)", (key, value))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        self.database.execute("begin immediate")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                self.database.execute("rollback")
            raise
        self.database.execute("commit")

    def known(self) -> dict[str, FileFact]:
        rows = self.database.execute("select path, size, mtime_ns from file")
        return {(name := os.fsdecode(path)): FileFact(name, size, mtime) for path, size, mtime in rows}

    def update_files(self, root: str, fresh: Sequence[FileFact], gone: Sequence[str]) -> Iterator[list[int]]:
        """Take up files batch by batch; yields the numbers of each batch after its commit."""
        for batch in self._batches(fresh) or [[]]:
            with self.transaction():
                for path in gone:
                    self._remove(path)
                numbers = [self._take_up(root, file) for file in batch]
            gone = ()
            yield numbers

    def _batches(self, fresh: Sequence[FileFact]) -> list[list[FileFact]]:
        batches: list[list[FileFact]] = []
        size = self.BATCH[1]
        for file in fresh:
            if size >= self.BATCH[1] or len(batches[-1]) >= self.BATCH[0]:
                batches.append([])
                size = 0
            batches[-1].append(file)
            size += min(file.size, MAX_FILE)
        return batches

    def _remove(self, path: str) -> None:
        number = self.value("select id from file where path = ?", os.fsencode(path))
        if number is not None:
            self._empty(number)
            self.database.execute("delete from file where id = ?", (number,))

    def _empty(self, number: int) -> None:
        first = number * MAX_CHUNKS
        self.database.execute("delete from chunk where rowid between ? and ?", (first, first + MAX_CHUNKS - 1))
        self.database.execute("delete from symbol where rowid = ?", (number,))
        self.database.execute("delete from name where file = ?", (number,))

    def _take_up(self, root: str, file: FileFact) -> int:
        """The number of the file, whose rows then are those of its content now. What another process wrote before is
        replaced.
        """
        path = os.fsencode(file.path)
        if is_young(file.mtime_ns, time.time_ns()):  # a further change may have the same time: it is read again
            file = msgspec.structs.replace(file, mtime_ns=0)
        kind, wanted = classify(file.path)
        content = self._read(root, file) if wanted and file.size <= MAX_FILE else Content()
        row = self.database.execute("select id, hash from file where path = ?", (path,)).fetchone()
        if row and row[1] == content.hash:
            self.database.execute(
                "update file set size = ?, mtime_ns = ? where id = ?", (file.size, file.mtime_ns, row[0])
            )
            return int(row[0])
        if row:
            self._empty(row[0])
        folders, base = self._path_words(file.path)
        known = (row and row[0], path, file.size, file.mtime_ns, content.hash)
        found = (kind, folders, base, content.bytes, len(content.chunks), "\n".join(content.imports))
        cursor = self.database.execute(
            "insert or replace into file values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*known, *found)
        )
        assert cursor.lastrowid is not None
        self._fill(cursor.lastrowid, content)
        return cursor.lastrowid

    def _fill(self, number: int, content: Content) -> None:
        first = number * MAX_CHUNKS
        self.database.executemany("insert into chunk (rowid, body) values (?, ?)", enumerate(content.chunks, first))
        if content.names:
            names: dict[str, tuple[str, int]] = {}
            for name, count in content.names.items():
                if key := run_together(name):
                    names[key] = (name, names.get(key, ("", 0))[1] + count)
            words = " ".join(
                [self.splitter[name] for name, count in content.names.items() for _ in range(min(count, 5))]
            )
            self.database.execute("insert into symbol (rowid, body) values (?, ?)", (number, words))
            self.database.executemany(
                "insert into name (name, file, shown, number) values (?, ?, ?, ?)",
                [(key, number, *value) for key, value in names.items()],
            )

    def _read(self, root: str, file: FileFact) -> Content:
        found = read_text_file(root, file.path, MAX_FILE)
        if found is None or found[2]:
            return Content()
        text = found[0]
        if file.path.endswith(".ipynb"):
            text = PICTURE.sub("", text)
        lines = text.split("\n")
        if len(text) > MAX_LINE * len(lines):
            return Content()
        language = language_of(file.path)
        split = self.splitter.text
        chunks = [split("\n".join(lines[start : start + CHUNK_LINES])) for start in range(0, len(lines), CHUNK_LINES)][
            :MAX_CHUNKS
        ]
        encoded = text.encode("utf-8", "replace")
        return Content(
            hashlib.blake2b(encoded, digest_size=16).digest(),
            len(encoded),
            chunks,
            definitions(language, text),
            imports(language, text),
        )

    def _path_words(self, path: str) -> tuple[str, str]:
        """Stems of the words of a path's folders and of its name, those of a compound name also as one."""
        folder = path.rpartition("/")[0].encode("utf-8", "replace").decode()
        base = bare_stem(path).encode("utf-8", "replace").decode()
        folders, name = self.splitter.text(folder).split(), self.splitter.text(base).split()
        stems = self.stemmer.stems([*folders, *name])
        return " ".join(dict.fromkeys(stems[word] for word in folders)), " ".join(
            dict.fromkeys(stems[word] for word in name)
        )

    # -- history

    def update_commits(self, root: str, head: str | None, fresh: Sequence[str], gone: Sequence[str]) -> None:
        """Make the commits those that ``head`` reaches; ``fresh`` are newest first."""
        for start in range(0, len(fresh), 500):
            oldest = fresh[max(0, len(fresh) - start - 500) : len(fresh) - start]
            commits = read_log(root, oldest)
            with self.transaction():
                for commit in reversed(commits):
                    self._add_commit(commit)
        with self.transaction():
            dropped = [
                row[0]
                for row in self.database.execute(
                    "select hash from past order by id desc limit -1 offset ?", (MAX_COMMITS,)
                )
            ]
            for hash in [*gone, *dropped]:
                self.database.execute("delete from message where rowid = (select id from past where hash = ?)", (hash,))
                self.database.execute("delete from past where hash = ?", (hash,))
            self.set_meta("head", head)

    def _add_commit(self, commit: Commit) -> None:
        paths = b"\0".join(os.fsencode(path) for path in commit.paths) if len(commit.paths) <= MAX_TOUCHED else None
        renames = b"\0".join(os.fsencode(path) for pair in commit.renames for path in pair) or None
        cursor = self.database.execute(
            "insert or ignore into past (hash, subject, number, paths, renames) values (?, ?, ?, ?, ?)",
            (commit.hash, commit.subject[:200], len(commit.paths), paths, renames),
        )
        if cursor.rowcount:
            text = self.splitter.text(f"{commit.subject}\n{commit.subject}\n{commit.body[:800]}")
            self.database.execute("insert into message (rowid, body) values (?, ?)", (cursor.lastrowid, text))

    def commit_plan(self, root: str, head: str | None) -> tuple[list[str], list[str]]:
        """(hashes to add, newest first, hashes to drop) for the history to be that of ``head``."""
        old = self.value("select value from meta where key = 'head'")
        if old == head:
            return [], []
        known = {row[0] for row in self.database.execute("select hash from past")}
        if head is None:
            return [], sorted(known)
        grown = old is not None and run_git(root, "merge-base", "--is-ancestor", old, head) is not None
        listed = run_git(
            root, "rev-list", "--no-merges", f"--max-count={MAX_COMMITS}", head, *([f"^{old}"] if grown else [])
        )
        hashes = (listed or b"").decode().split()
        return [hash for hash in hashes if hash not in known], [] if grown else sorted(known - set(hashes))

    def optimize(self) -> None:
        for table in ("chunk", "symbol", "message"):
            self.database.execute(f"insert into {table} ({table}) values ('optimize')")


class Commit(Struct):
    hash: str
    subject: str
    body: str
    paths: list[str]
    renames: list[tuple[str, str]]  # (old, new): the same content left one path and came at another


EMPTY_BLOB = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def read_log(root: str, hashes: Sequence[str]) -> list[Commit]:
    """These commits, with their paths relative to ``root``. Nothing is fetched, no signature checked. Blocks."""
    mark = secrets.token_hex(8)  # what no message or path can hold, whoever wrote it
    shape = f"--format={mark}%H%x02%s%x02%b{mark}"
    flags = (
        "--no-walk=unsorted",
        "-z",
        "--raw",
        "--no-abbrev",
        "--no-renames",
        "--relative",
        "--no-show-signature",
        "--encoding=UTF-8",
    )
    output = run_git(root, "log", *flags, shape, *hashes, env={"GIT_NO_LAZY_FETCH": "1"}) if hashes else b""
    pieces = os.fsdecode(output or b"").split(mark)
    commits = []
    for header, raw in zip(pieces[1::2], pieces[2::2], strict=True):
        hash, subject, body = [text.encode("utf-8", "replace").decode() for text in header.split("\x02", 2)]
        commits.append(Commit(hash, subject, body, *changed_paths(raw)))
    return commits


def changed_paths(raw: str) -> tuple[list[str], list[tuple[str, str]]]:
    """(paths, renames) of a commit, from what ``git log --raw -z`` says about it."""
    paths, left, came = [], {}, []
    tokens = iter(raw.strip("\n\0").split("\0"))
    for token in tokens:
        facts = token.lstrip("\n:").split(" ")
        path = next(tokens, "")
        if len(facts) != 5 or not path:
            continue
        paths.append(path)
        if facts[4] == "D" and facts[2] != EMPTY_BLOB:
            left[facts[2]] = path
        elif facts[4] == "A":
            came.append((facts[3], path))
    return paths, [(left[blob], path) for blob, path in came if blob in left]


# ---- Facts: what a query needs of every file, kept in memory and changed with the index
# ------------------------------------


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
        self.listed: list[FileFact] | None = None  # the request's files that these facts were last compared with,
        self.again: list[FileFact] = []  # and those of them that were new or changed then
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
        self._rarities: dict[str, float] = {}  # of words in paths, by their stems
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
            changed = {file.path: file for file, _ in others}
            doubtful = {file.path: file for file in self.again} | changed
            fresh, gone = [file for file in doubtful.values() if self.known.get(file.path) != file], []
        else:
            fresh, listed = [file for file in files if self.known.get(file.path) != file], {file.path for file in files}
            gone = [path for path in self.known if path not in listed]
        self.listed, self.again = list(files), fresh
        return fresh, gone

    def remove(self, path: str) -> None:
        self.known.pop(path, None)
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


# ---- The query
# -----------------------------------------------------------------------------------------------------------------

COMMIT_TYPE = late_pattern(
    r"^\s*(?:feat|feature|fix|bug|chore|refactor|perf|docs?|tests?|build|ci|style|revert)(?:\(([^)]*)\))?!?:\s*",
    re.IGNORECASE,
)


class Query(Struct):
    """``terms``: stem -> (word, weight), heaviest first; ``names``: what a definition may be called -> weight."""

    terms: dict[str, tuple[str, float]]
    names: dict[str, float]
    runs: set[str]
    pairs: list[str]  # adjacent words of the task, as they stand in indexed text

    @property
    def match(self) -> str:
        """For FTS5; a title's words stand twice, which doubles their weight in bm25()."""
        return " OR ".join(f'"{word}"' for word, weight in self.terms.values() for _ in range(2 if weight >= 1 else 1))

    @property
    def match_with_pairs(self) -> str:
        """The same for texts: words that stand together, as in the task, weigh more."""
        return " OR ".join([self.match, *(f'"{pair}"' for pair in self.pairs)])


def make_query(texts: Iterable[tuple[str, float]], stemmer: Stemmer) -> Query:
    """The query of (text, weight of each word in it), the task's title and body first."""
    texts = list(texts)
    pairs = list(dict.fromkeys(pair for text, _ in texts[:2] for pair in adjacent_words(text)))[:MAX_PAIRS]
    words: dict[str, float] = collections.defaultdict(float)
    names: dict[str, float] = {}
    runs: set[str] = set()
    for text, weight in texts:
        before: list[str] = []
        for token in re.findall(r"\w+|[.!?:;\n]", text):
            parts = [part for part in parts_of(token) if len(part) > 1 or not part.isascii()]
            content = [part for part in parts if part not in STOP_WORDS]
            if not content or len(token) > Splitter.LONGEST:
                before = []
                continue
            whole = run_together(token)
            for word in content if len(parts) == 1 else [*content, whole]:
                words[word] += weight
            names[whole] = max(names.get(whole, 0.0), weight)
            before = [*before[-2:], whole]
            for length in (2, 3):
                if len(before) >= length:
                    runs.add(joined := "".join(before[-length:]))
                    names[joined] = max(names.get(joined, 0.0), 0.7 * weight)
    stems = stemmer.stems(words)
    terms: dict[str, tuple[str, float]] = {}
    for word, weight in words.items():
        stem = stems[word]
        terms[stem] = (terms[stem][0] if stem in terms else word, weight + (terms[stem][1] if stem in terms else 0.0))
    damped = {stem: (word, 1 + math.log(weight) if weight > 1 else weight) for stem, (word, weight) in terms.items()}
    heaviest = sorted(damped.items(), key=lambda item: -item[1][1])[:MAX_TERMS]
    return Query(dict(heaviest), names, runs, pairs)


def adjacent_words(text: str) -> Iterator[str]:
    """The pairs of neighbouring words in ``text``, within identifiers too, as Splitter writes them; none with a
    stop-word between or in it, none across punctuation or a line's end.
    """
    last = ""
    for token in re.findall(r"\w+|[.!?:;,()\n]", text):
        parts = parts_of(token)
        for word in parts if len(token) <= Splitter.LONGEST else ():
            known = word not in STOP_WORDS and (len(word) > 1 or not word.isascii())
            if known and last:
                yield f"{last} {word}"
            last = word if known else ""
        if not parts or len(token) > Splitter.LONGEST:
            last = ""
        elif last and len(parts) > 1:
            last = "".join(parts)  # which follows the parts in indexed text


def texts_of(request: RankRequest, decisions: bool = True) -> list[tuple[str, float]]:
    """The texts that a request is about, with the weight of their words: its task and earlier agents' ``decisions``."""
    task = request.task.strip()
    title, _, body = task.partition("\n")
    scope = COMMIT_TYPE.match(title)
    if scope:
        title = f"{scope[1] or ''}\n{title[scope.end() :]}"
    texts = [(title[:BODY], 1.0), (body[:BODY], 0.5)]
    for output in request.outputs[-5:] if decisions else ():
        texts.append((str(output.get("decision") or "")[:BODY], 0.3))
    words = {part for token in IDENTIFIER.findall(task) for part in parts_of(token)}
    if request.category == "security" and words <= STOP_WORDS | GENERAL_WORDS:
        texts.append((SECURITY_WORDS, 0.5))
    return texts


# ---- The ranking: features, their sum, reasons
# ---------------------------------------------------------------------------------


def normal(scores: Scores) -> Scores:
    top = max(scores.values(), default=0.0)
    return {id: score / top for id, score in scores.items()} if top > 0 else {}


class Ranking:
    """What the words of one request say: the features of all files that have any, their sum, and the answers for agents
    of several types, for whom the kinds and languages of files count otherwise.
    """

    def __init__(self, index: Index, facts: Facts, past: Past, request: RankRequest) -> None:
        self.index, self.facts, self.past, self.request = index, facts, past, request
        self.texts, self.revision = texts_of(request), facts.revision
        self.query = make_query(self.texts, index.stemmer)
        self.features: dict[str, Scores] = {}
        self.chunks: dict[int, list[tuple[int, float]]] = collections.defaultdict(list)
        self.all_others = False  # whether files are given that nothing speaks for, rather than none
        self.commit_of: dict[int, int] = {}  # the past commit that speaks for a file
        self.why: dict[int, dict[str, str]] = collections.defaultdict(dict)  # file -> feature -> what to say
        self.shown: dict[int, dict[str, str]] = {}  # the same of what was looked up for the best files of an answer
        self.without_task: Ranking | None = None
        self.said: dict[tuple[int, bool], list[str]] = {}  # what is said of a file, looked up or not, strongest first
        self.occurs = not request.task or self._occurs()
        self.total = self._search() if self.occurs else {}

    def holds(self, facts: Facts, past: Past, request: RankRequest) -> bool:
        """Whether another request is about the same, and no file or commit is another one by now."""
        same = self.request.task == request.task and self.texts == texts_of(request)
        return same and self.facts is facts and self.revision == facts.revision and self.past is past

    def ranked(self, request: RankRequest) -> list[RankedFile]:
        self.request = request
        if self.occurs:
            return self._answer(self.total)
        plain = msgspec.structs.replace(request, task="")  # the order without the task, and it is said
        self.without_task = ranking_of(self.without_task, self.index, self.facts, self.past, plain)
        return [msgspec.structs.replace(item, matched=False) for item in self.without_task.ranked(plain)]

    def _search(self) -> Scores:
        """The sum of all features of each file that has any."""
        if self.query.terms:
            # Sorted outside of FTS5, whose own sorter carries every position along.
            sql = "select rowid, bm25(chunk) as rank from chunk where chunk match ? order by rank limit 4000"
            with self.index.beside(sql, self.query.match_with_pairs) as chunks:
                self._symbols()
                self._definitions()
                self._path_words()
                self._parts_of_names()
                self._commits()
            self._text(chunks.result())
        self.features = {name: normal(scores) for name, scores in self.features.items()}
        matching = set().union(*self.features.values())
        recent, often = self.past.by_file(self.facts)
        self.features["recent"] = {id: recent[id] for id in matching.union(often) if id in recent}
        total: Scores = collections.defaultdict(float)
        self._add(self.features, total)
        if self.query.terms:
            said_by_others = self._second_stage(total)
            self._add(said_by_others, total)
            self.features |= said_by_others
        return total

    def _occurs(self) -> bool:
        """Whether a word of the task itself, not of what earlier agents decided, is in a text, name or past commit."""
        if named_files(self.request.task, self.facts):
            return True
        query = make_query(texts_of(self.request, decisions=False), self.index.stemmer)
        if any(stem in self.facts.base or stem in self.facts.folder for stem in query.terms):
            return True
        if any(any(self.facts.containing(stem)) for stem in query.terms if len(stem) >= 4):
            return True
        holding = [f"select 1 from {table} where {table} match ? limit 1" for table in ("chunk", "symbol", "message")]
        return bool(query.terms) and any(self.index.value(sql, query.match) for sql in holding)

    def _add(self, features: dict[str, Scores], total: Scores) -> None:
        for name, scores in features.items():
            weight = FEATURES[name]
            for id, score in scores.items():
                total[id] += weight * score

    # -- what the query alone says

    def _text(self, chunks: list[Any]) -> None:
        best: Scores = {}
        for row, rank in chunks:
            id, chunk = divmod(row, MAX_CHUNKS)
            if id in self.facts.files:
                best.setdefault(id, -rank)
                self.chunks[id].append((chunk, -rank))
        self.features["chunk"] = best

    def _symbols(self) -> None:
        sql = "select rowid, bm25(symbol) as rank from symbol where symbol match ? order by rank limit 2000"
        rows = self.index.database.execute(sql, (self.query.match,)).fetchall()
        self.features["sym"] = {id: -rank for id, rank in rows if id in self.facts.files}

    def _definitions(self) -> None:
        names = list(self.query.names)[:500]
        sql = f"select name, file, shown, number from name where name in ({','.join('?' * len(names))})"
        rows = self.index.database.execute(sql, names).fetchall()
        spread = collections.Counter(row[0] for row in rows)
        scores: Scores = collections.defaultdict(float)
        strongest: Scores = {}
        for name, id, shown, number in rows:
            if id in self.facts.files:
                score = self.query.names[name] * self.facts.rarity(spread[name]) * number / (number + 0.4)
                scores[id] += score
                if score > strongest.get(id, 0.0):
                    strongest[id] = score
                    self.why[id]["defx"] = f"defines {shown}"
        self.features["defx"] = scores

    def _path_words(self) -> None:
        facts = self.facts
        pbase: Scores = collections.defaultdict(float)
        pdir: Scores = collections.defaultdict(float)
        mass: Scores = collections.defaultdict(float)
        words: dict[int, list[tuple[float, str]]] = collections.defaultdict(list)
        for stem, (word, weight) in self.query.terms.items():
            named, inside = facts.base.get(stem), facts.folder.get(stem)
            if not named and not inside:
                continue
            rarity = facts.rarity_in_paths(stem)
            for id in named:
                pbase[id] += weight * rarity
                mass[id] += rarity
                words[id].append((-weight * rarity, word))
            if inside:
                here = set(named)
                for id in inside:
                    if id not in here:
                        pdir[id] += weight * rarity
        self.features |= {"pbase": pbase, "pdir": pdir}
        self.features["pcov"] = {
            id: found / sum([facts.rarity_in_paths(stem) for stem in facts.files[id].base])
            for id, found in mass.items()
        }
        for id, found in words.items():
            self.why[id]["pbase"] = "name matches " + ", ".join(word for _, word in sorted(found)[:3])

    def _parts_of_names(self) -> None:
        scores: Scores = collections.defaultdict(float)
        words = {stem: weight for stem, (_, weight) in self.query.terms.items() if len(stem) >= 4}
        words |= {run: 0.7 * self.query.names[run] for run in self.query.runs if len(run) >= 4 and run not in words}
        for word, weight in words.items():
            found = list(self.facts.containing(word))
            rarity = self.facts.rarity(len(found))
            for id, length in found:
                scores[id] += weight * rarity * min(1.0, len(word) / length + 0.3)
        self.features["sub"] = scores

    def _commits(self) -> None:
        sql = "select rowid, bm25(message) as rank from message where message match ? order by rank limit 150"
        rows = self.index.database.execute(sql, (self.query.match_with_pairs,)).fetchall()
        best: Scores = {}
        mass: Scores = collections.defaultdict(float)
        for commit, rank in rows:
            paths = self.past.touched.get(commit, ())
            for path in paths:
                id = self.facts.ids.get(path)
                if id is not None:
                    mass[id] += (rank / rows[0][1]) ** 2 / math.sqrt(len(paths))
                    score = -rank / len(paths) ** 0.25
                    if score > best.get(id, 0.0):
                        best[id], self.commit_of[id] = score, commit
        self.features["hmax"] = best
        self.features["hdoc"] = {id: x / (x + 1) for id, x in mass.items()}

    # -- what the best files say about others

    def _second_stage(self, first: Scores) -> dict[str, Scores]:
        files = self.facts.files
        factors = FIRST_STAGE_KIND
        stage = {id: score * factors.get(files[id].kind, 0.4) for id, score in first.items()}
        best = self._first(stage, 60)
        imported, paired = self._imports(stage, best[:8]), self._pairs(stage, best)
        found = {"dirs": self._folders(stage, best), "imp": imported, "pair": paired}
        return {name: normal(scores) for name, scores in found.items()}

    def _folders(self, stage: Scores, best: list[int]) -> Scores:
        inside: dict[str, list[float]] = collections.defaultdict(list)
        for id in best:
            inside[self.facts.files[id].path.rpartition("/")[0]].append(stage[id])
        sums = {folder: math.sqrt(sum(scores[:4])) for folder, scores in inside.items()}
        return {id: score for folder, score in sums.items() for id in self.facts.inside.get(folder)}

    def _imports(self, stage: Scores, best: list[int]) -> Scores:
        scores: Scores = collections.defaultdict(float)
        rows = self.index.database.execute(f"select id, imports from file where id in ({','.join(map(str, best))})")
        texts = dict(rows.fetchall())
        for id in best:
            importer = self.facts.files[id]
            modules = texts.get(id, "").split("\n")
            targets = dict.fromkeys(
                target
                for module in modules
                if module
                for target in self.facts.resolve(importer, module)
                if target != id
            )
            for target in targets:
                scores[target] += stage[id] / stage[best[0]] / math.sqrt(len(targets)) if stage[best[0]] else 0.0
                self.why[target].setdefault("imp", f"imported by {importer.path}")
        return scores

    def _pairs(self, stage: Scores, best: list[int]) -> Scores:
        scores: Scores = {}
        for id in best:
            file = self.facts.files[id]
            for other in self.facts.pairs.get(pair_stem(file.path)):
                mate = self.facts.files[other]
                if (file.kind == "test") != (mate.kind == "test") and stage[id] > scores.get(other, 0.0):
                    scores[other] = stage[id]
                    self.why[other]["pair"] = (
                        f"test of {file.path}" if mate.kind == "test" else f"tested by {file.path}"
                    )
        return scores

    # -- the answer

    def _answer(self, total: Scores) -> list[RankedFile]:
        files, request = self.facts.files, self.request
        reading = reading_of(request.agent_type, request.category)
        reader = reading, spoken_by(request.agent_type), kinds_of_task(request.task)
        boosts = self._boosts()
        added = {id: sum(value for value, _ in found) for id, found in boosts.items()}
        plain = not self.query.terms
        scores = {}
        spoken_for = boosts.keys() | set().union(*(self.features.get(name, {}) for name in SPEAKING))
        asked = request.task and spoken_for
        self.all_others = not asked and not any(
            standing(file.kind, file.language, *reader)[1] for file in files.values()
        )
        found = set(files) if plain or self.all_others or len(files) <= MAX_RANKED else total.keys() | boosts.keys()
        for id in found:
            file = files[id]
            first = not request.task and file.path.lower() in FIRST_FILES
            factor, own = standing(file.kind, file.language, *reader)
            if not (own or first or id in spoken_for or self.all_others):
                continue
            score = total.get(id, 0.0)
            if plain:
                factor, score = factor**2, score + 0.5 / (1 + file.path.count("/"))
            scores[id] = factor * score + added.get(id, 0.0)
        best = self._first(scores, MAX_RANKED)
        self._explain(best[:EXPLAINED])
        return [
            RankedFile(
                files[id].path,
                scores[id],
                self._reasons(id, boosts.get(id, []), place < EXPLAINED),
                self._best_chunks(id) if place < MAX_CHUNKED else [],
            )
            for place, id in enumerate(best)
        ]

    def _first(self, scores: Scores, number: int) -> list[int]:
        """The best files, ties by path."""
        least = heapq.nlargest(number, scores.values())[-1] if len(scores) > number else 0.0
        return sorted(
            (id for id, score in scores.items() if score >= least),
            key=lambda id: (-scores[id], self.facts.files[id].path),
        )[:number]

    def _boosts(self) -> dict[int, list[tuple[float, str]]]:
        boosts: dict[int, list[tuple[float, str]]] = collections.defaultdict(list)
        affected = [
            path
            for output in self.request.outputs
            for path in output.get("files_affected") or ()
            if isinstance(path, str)
        ]
        for reason, paths in (
            ("named in the task", named_files(self.request.task, self.facts)),
            ("changed by an earlier agent", affected), ("uncommitted change", self.request.changed),
        ):  # fmt: skip
            ids = {self.facts.ids[path] for path in paths if path in self.facts.ids}
            for id in ids:
                boosts[id].append((BOOSTS[reason] * min(1.0, math.sqrt(20 / len(ids))), reason))
        return boosts

    def _best_chunks(self, id: int) -> list[tuple[int, float]]:
        """(first line, score) of a file's chunks, best first: what matches, then what lies nearest to it."""
        file = self.facts.files[id]
        if file.bytes < 4_000 or file.chunks < 2:
            return []
        scores = dict(self.chunks.get(id, ()))
        top = max(scores.values(), default=1.0)
        spread = {}
        for chunk in range(file.chunks):
            near = max(scores.get(chunk - 1, 0.0), scores.get(chunk + 1, 0.0))
            spread[chunk] = scores.get(chunk, 0.0) + 0.1 * near + 0.001 * top / (1 + chunk)
        order = sorted(spread, key=lambda chunk: (-spread[chunk], chunk))
        return [(chunk * CHUNK_LINES + 1, round(spread[chunk], 4)) for chunk in order]

    def _explain(self, best: list[int]) -> None:
        """Words for what needs a look into the index: matching text and past commits."""
        fresh = [id for id in best if id not in self.shown]
        wanted = {self.commit_of[id] for id in fresh if id in self.commit_of}
        subjects = {}
        if wanted:
            rows = self.index.database.execute(
                f"select id, hash, subject from past where id in ({','.join(map(str, wanted))})"
            )
            subjects = {id: f"{hash[:7]} {shorten(subject)}" for id, hash, subject in rows}
        best_chunks = [id * MAX_CHUNKS + self.chunks[id][0][0] for id in fresh if self.chunks.get(id)]
        sql = f"select rowid, body from chunk where rowid in ({','.join(map(str, best_chunks))})"
        texts = {row // MAX_CHUNKS: body for row, body in self.index.database.execute(sql).fetchall()}
        for id in fresh:
            shown = self.shown[id] = {}
            if id in self.commit_of:
                shown["hmax"] = f"changed with {subjects.get(self.commit_of[id], 'an earlier commit')}"
            if words := self._words_in(texts.get(id, "")):
                shown["chunk"] = f"text matches {', '.join(words[:3])}{self._whose_words()}"

    def _whose_words(self) -> str:
        """Of a ranking without a task: whose words its words are."""
        return "" if self.request.task else " of earlier agents' decisions"

    def _words_in(self, body: str) -> list[str]:
        body = f" {body}"  # a word begins after a space
        return [word for stem, (word, _) in self.query.terms.items() if f" {stem}" in body or f" {word}" in body]

    def _reasons(self, id: int, boosts: list[tuple[float, str]], explained: bool) -> list[str]:
        """At most four, strongest first."""
        if (id, explained) not in self.said:
            self.said[id, explained] = self._said(id, explained)
        ordered = [*(text for _, text in sorted(boosts, key=lambda item: -item[0])), *self.said[id, explained]]
        kind = self.facts.files[id].kind
        if self.all_others:
            return [*ordered[:3], f"{kind}, as no file is of the agent's kinds and language"]
        return ordered[:4] or ["lies near files that match" if self.query.terms else f"{kind} of the project"]

    def _said(self, id: int, explained: bool) -> list[str]:
        why = self.why.get(id, {}) | (self.shown[id] if explained else {})
        said = [(FEATURES[name] * self.features[name].get(id, 0.0), text) for name, text in why.items()]
        if "chunk" not in why and self.features.get("chunk", {}).get(id):
            said.append(
                (FEATURES["chunk"] * self.features["chunk"][id], f"text matches{self._whose_words() or ' the task'}")
            )
        recent = FEATURES["recent"] * self.features["recent"].get(id, 0.0)
        if recent > 0.3:
            said.append((recent, "changed recently"))
        return [text for _, text in sorted(said, key=lambda item: -item[0])]


def ranking_of(last: Ranking | None, index: Index, facts: Facts, past: Past, request: RankRequest) -> Ranking:
    """The ``last`` ranking where it is about the same, else a new one."""
    return last if last and last.holds(facts, past, request) else Ranking(index, facts, past, request)


@functools.cache
def standing(
    kind: str, language: str, reading: str, spoken: tuple[str, ...], asked_for: frozenset[str]
) -> tuple[float, bool]:
    """The factor for a file's kind and language, and whether it is the agent's own: of its kinds, in its languages, or
    of a kind that it is ``asked_for``.
    """
    factors = KIND_FACTORS.get(reading, KIND_FACTORS["coding"])
    factor = factors[kind]
    if kind in asked_for:
        return max(factor, SPOKEN_KIND), True
    if spoken and kind == "markup":
        return (factors["source"], True) if language in spoken else (factor, False)
    code = kind in ("source", "test", "aux") and language != "unknown"  # or one of OWN_LANGUAGE
    if spoken and code and language not in spoken:
        return factor * OTHER_LANGUAGE, False
    return factor, factor >= OWN_KIND


def shorten(subject: str) -> str:
    return subject if len(subject) <= 60 else subject[:57].rstrip() + "..."


PATH_LIKE = re.compile(r"[\w@.+~/\\:-]+")  # one class and nothing to go back for: a task may be one long word


def named_files(task: str, facts: Facts) -> set[str]:
    """The paths that a task names: whole, by their last parts, by a base name that few have, or as dotted modules."""
    named: set[str] = set()
    for token in dict.fromkeys(PATH_LIKE.findall(task)):
        token = token.replace("\\", "/").rstrip("./:").removeprefix("./")
        if len(token) > 300 or not (re.search(r"[./]|::", token) or token.endswith("file")):
            continue
        known = [facts.files[id].path for id in facts.named.get(token.rpartition("/")[2])]
        found = [path for path in known if path == token or path.endswith("/" + token)]
        if not found:
            found = dotted_module(token, facts)
        if token in found:
            named.add(token)
        elif len(found) <= 3:
            named.update(found)
    return named


def dotted_module(token: str, facts: Facts) -> list[str]:
    """Files for ``package.module`` or ``package.module.name``; one part alone says too little."""
    parts = token.replace("::", ".").split(".")
    for end in (len(parts), len(parts) - 1):
        if end < 2:
            break
        wanted = "/" + "/".join(parts[:end])
        found = [facts.files[id] for id in facts.called.get(parts[end - 1])]
        if hits := [
            file.path for file in found if ("/" + module_path(file)).endswith(wanted) and file.language != "go"
        ]:
            return hits
    return []


# ---- Projects: the index of a folder, its builder, and calls from several threads
# ------------------------------------------


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

    def rank(self, request: RankRequest, wait: bool = False) -> list[RankedFile] | None:
        """The ranking; None while the index is being built, or where it cannot be."""
        while True:
            with self.lock:
                answer = self._rank(request)
                builder = self.builder
            if answer is not None or not wait or builder is None:
                return answer
            builder.done.wait()

    def _rank(self, request: RankRequest) -> list[RankedFile] | None:
        if self._building() or self._ended or time.monotonic() < self._retry_at:
            return None
        try:
            index = self._opened()
            if not self._up_to_date(index, request):
                return None
            assert self.past is not None
            self.ranking = ranking_of(self.ranking, index, self.facts, self.past, request)
            answer = self.ranking.ranked(request)
            self._busy = 0
            return answer
        except sqlite3.Error as error:
            self._recover(error)
        except OSError as error:
            self._failed(f"{type(error).__name__}: {error}")
        return None

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

    def _recover(self, error: sqlite3.Error) -> None:
        """A lock of somebody else's passes; an index that stays locked or is damaged is thrown away."""
        self._close()
        code = getattr(error, "sqlite_errorcode", None)
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            self._failed(str(error))
            return
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            self._busy += 1
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
        facts = self.facts
        fresh, gone = facts.compare(request.files)
        commits, dropped = index.commit_plan(self.root, request.head)
        size = sum(min(file.size, MAX_FILE) for file in fresh)
        amount = (len(fresh) + len(gone), size, len(commits) + len(dropped))
        if any(number > limit for number, limit in zip(amount, SMALL_UPDATE, strict=True)):
            self._close()
            self.builder = Builder(self.root, self.path, request.files, request.head)
            return False
        if fresh or gone:
            for numbers in index.update_files(self.root, fresh, gone):
                for path in gone:
                    facts.remove(path)
                facts.load(index, numbers)
        if commits or dropped or index.value("select value from meta where key = 'head'") != request.head:
            index.update_commits(self.root, request.head, commits, dropped)
            self.past = Past(index)
        return True

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


def discard(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


# ---- Hooks
# ----------------------------------------------------------------------------------------------------------------------

_projects: dict[tuple[str, str], Project] = {}
_projects_lock = threading.Lock()


def project_of(root: str, folder: str) -> Project:
    with _projects_lock:
        return _projects.setdefault((root, folder), Project(root, folder))


def rank(request: RankRequest, wait: bool = False) -> list[RankedFile] | None:
    """The files for a request, best first; None while the index is being built, which ``wait`` waits for."""
    return project_of(request.root, request.index_folder).rank(request, wait)


def neighbours(root: str, paths: Sequence[str]) -> dict[str, Neighbours]:
    """By path, of those that are indexed: what it imports, what imports it, its tests. Blocks."""
    with _projects_lock:
        projects = [project for key, project in _projects.items() if key[0] == root]
    return projects[-1].neighbours(paths) if projects else {}


@hookimpl
def rank_files(request: RankRequest) -> list[RankedFile] | None:
    ranked = rank(request)
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

    async def prepare(self) -> None:
        await asyncio.gather(super().prepare(), self._warm())
        await self._pool.run(redact, "")  # whose patterns the first result would wait for
        await self._pool.run(keep_for_good)

    async def _warm(self) -> None:
        state = await self.project.state()
        if len(state.files) >= self.WARM_FROM:
            agent_type, category = "chief-architect", "architect"
            key = ContextKey(issue_id="", agent_type=agent_type, category=category, task="", max_bytes=0, max_files=1)
            await self._pool.run(self.rank, key, [], state)

    def rank(self, key: ContextKey, outputs: list[dict[str, Any]], state: ProjectState) -> list[RankedFile]:
        before, ranked = self._unfinished(), super().rank(key, outputs, state)
        return Unfinished(ranked) if before or self._unfinished() else ranked

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


@hookimpl
def shutdown(info: Any) -> None:
    """End the builders of the service's project and close its index."""
    with _projects_lock:
        ended = [key for key in _projects if key[0] == info.root]
        projects = [_projects.pop(key) for key in ended]
    for project in projects:
        project.end()


# ---- The builder's process
# -------------------------------------------------------------------------------------------------------


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

"""The index of the plugin relevance: files and commits in a SQLite database, written by whole files in transactions."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from cco_sidecar import FileFact, in_thread, language_of, read_text_file, run_git
from cco_sidecar_plugins.context._definitions import definitions, imports
from cco_sidecar_plugins.context._fingerprints import is_recent
from cco_sidecar_plugins.context._git_facts import BOUNDED
from cco_sidecar_plugins.context._identifiers import Splitter, Stemmer, bare_stem, run_together
from cco_sidecar_plugins.context._path_kinds import PICTURE, classify

MAX_FILE = 400_000  # bytes; what is longer is data
MAX_LINE = 400  # characters on average; what has longer lines was made by a machine
CHUNK_LINES = 50
MAX_CHUNKS = 4096  # row number of a chunk = file number * MAX_CHUNKS + chunk number
MAX_COMMITS = 12_000
MAX_TOUCHED = 60  # files in a commit that still says something about each of them

SCHEMA_VERSION = 9  # to be raised with every change of the schema, of kinds, words, definitions or imports
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
    def beside(self, most: int, sql: str, *parameters: Any) -> Iterator[Future[list[Any]]]:
        """The first rows, which another thread looks for while the block runs: SQLite leaves the interpreter to
        others.
        """
        rows = in_thread("relevance", lambda: self._second.execute(sql, parameters).fetchmany(most))
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
        if is_recent(file.mtime_ns, time.time_ns()):  # a further change may have the same time: it is read again
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


LONGEST = 4_000  # bytes of a subject or body, which may have any length; of a body 800 letters are used
EMPTY_BLOB = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def read_log(root: str, hashes: Sequence[str]) -> list[Commit]:
    """These commits, with their paths relative to ``root``. Nothing is fetched, no signature checked. Blocks."""
    mark = secrets.token_hex(8)  # what no message or path can hold, whoever wrote it
    shape = f"--format={mark}%H%x02%s%x02%b{mark}"
    flags = "--no-walk=unsorted -z --raw --no-abbrev --no-renames --relative --no-show-signature --encoding=UTF-8"
    output = run_git(root, "log", *flags.split(), shape, *hashes, env=BOUNDED) if hashes else b""
    pieces = (output or b"").split(mark.encode())
    commits = []
    for header, raw in zip(pieces[1::2], pieces[2::2], strict=True):
        hash, subject, body = (text[:LONGEST].decode("utf-8", "replace") for text in header.split(b"\x02", 2))
        commits.append(Commit(hash, subject, body, *changed_paths(os.fsdecode(raw))))
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

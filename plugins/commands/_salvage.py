"""What `cco doctor --salvage` does: a new database out of what can still be read of a damaged one.

It works on a copy. A table is read from its beginning to the first page that cannot be read, then from its end, then,
where rows are numbered, number by number between. Where the first page is gone, which says where the tables are, it is
made anew: the pages that hold the schema are looked for, whatever version or plugins it is of. A schema that fits on
the first page is the core's own, made by one script, so it lies as in a new database.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cco_sidecar
from cco_sidecar import Settings, StartError
from cco_sidecar_plugins.http.repeats import AnswerRecords
from cco_sidecar_plugins.storage._database import check_database, check_log_length
from cco_sidecar_plugins.storage._log import REPLICA, SALVAGED, check_log, database_files, take_salvaged

KEYS = {  # what each table is read in the order of
    "event": "seq", "dead_letter": "seq", "position": "project, subject, type, filter", "result": "seq",
    "agent": "seq", "agent_evidence": "agent", "agent_outcome": "agent", "revoked": "project, subject",
    "idempotency": "project, subject, endpoint, key", "meta": "name",  # at last, as the others are counted in it
}  # fmt: skip
# What is no JSON in them would be given to somebody as JSON.
JSON_COLUMNS = ("body", "output", "proposed", "outcome", "answer", "seen", "last_call")
TEXTS = ("birth", "seen", "last_call")  # of the columns that version 1 had for facts about agents; others are numbers
NOT_KEPT = ("epoch", "probe")  # of meta: cursors of events that were lost shall not lead to other ones
PAGE = 4096  # bytes
SCHEMA_ROW = (
    re.compile(  # as SQLite stores it: bytes, number (group 1), a head, and what kind of thing the row describes
        rb"[\x80-\xff]?[\x00-\x7f]([\x80-\xff]?[\x00-\x7f])[\x06-\x0a][\x17\x1b].{4,8}?(?:table|index|trigger)",
        re.DOTALL,
    )
)
MOST_NUMBERS = 100_000  # looked for one by one where a table's end cannot be found, ten times as many where it can


def salvage(settings: Settings) -> str:
    """Put a new database in the damaged one's place, which is kept aside; what was saved. Raises StartError,
    also where nothing is damaged."""
    path = settings.storage / cco_sidecar.Storage.FILE
    if not path.exists() and (replica := path.with_name(REPLICA)).exists():
        raise StartError(f"there is no {path} to be saved; {replica} is made anew of the log where it is moved away", 1)
    if not path.exists():
        raise StartError(f"there is no {path} to be saved", 1)
    with cco_sidecar.instance_lock(settings.storage):
        aside = settings.storage / f"damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
        work = settings.storage / "salvage"
        shutil.rmtree(work, ignore_errors=True)  # of one that was interrupted
        work.mkdir(mode=0o700)
        take_salvaged(path)
        try:
            counts, unread = rebuild(path, work)
            if not unread and is_sound(path):
                raise StartError(f"nothing is damaged of {path}, which is left as it is", 1)
            (work / aside.name).mkdir(mode=0o700)
            for file in filter(Path.exists, database_files(path)):
                keep(file, work / aside.name / file.name)
            (work / aside.name).rename(aside)
            # From here on a kill leaves the rest to the next start.
            os.replace(work / "new.db", path.with_name(SALVAGED))
            take_salvaged(path)
        finally:
            shutil.rmtree(work)
    saved = ", ".join(f"{number} {table.replace('_', ' ')}" for table, number in counts.items() if number)
    lost = f"some may be lost of: {', '.join(unread).replace('_', ' ')}" if unread else "none was lost"
    read = f"(rows: {saved or 'none'}; {lost})"
    return f"{path} is made anew of what could be read {read}; the damaged files are in {aside}"


def keep(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # no links on this file system
        shutil.copy2(file, target)


def is_sound(path: Path) -> bool:
    """Whether a start would take the database, and its indexes hold what its tables do."""
    try:
        check_database(path)
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            return bool(database.execute("pragma integrity_check(1)").fetchone()[0] == "ok")
    except (StartError, sqlite3.Error):
        return False


def rebuild(path: Path, work: Path) -> tuple[dict[str, int], list[str]]:
    """Make work/new.db: (how many rows of each table are in it, what could not be read whole)."""
    unread: list[str] = []
    with contextlib.closing(cco_sidecar.open_database(work / "new.db")) as new:
        new.executescript(AnswerRecords.TABLE)
        columns = {table: [row["name"] for row in new.execute(f"pragma table_info({table})")] for table in KEYS}
        with contextlib.closing(open_damaged(path, work, unread)) as old:
            there = tables_of(old)
            new.execute("begin")
            counts = {table: copy_table(old, new, table, columns[table], unread) for table in KEYS}
            unread += [table for table in KEYS if table in there - {*unread} and not whole(old, table)]
            keep_earlier_facts(old, new, columns["agent_evidence"])
            number_on(new, old)
        new.execute("commit")
        new.execute("pragma wal_checkpoint(truncate)")
    return counts, unread


def open_damaged(path: Path, work: Path, unread: list[str]) -> sqlite3.Connection:
    """A copy of the database, and of its log, as far as SQLite can be made to open it. ``unread`` gets the log where
    SQLite leaves out some of it.
    """
    copy, log = work / path.name, database_files(path)[1]
    sound = log_is_sound(path)
    for file, target in zip(database_files(path)[:2], database_files(copy), strict=False):
        if file.exists():
            shutil.copyfile(file, target)
    for make_first_page in (None, found_first_page, new_first_page):
        if make_first_page:
            if not (page := make_first_page(copy)):
                continue
            with copy.open("r+b") as damaged:
                damaged.write(page)
            sound = sound and not (log.exists() and log.stat().st_size)  # which may hold the bad page
        database = sqlite3.connect(copy, isolation_level=None)
        database.text_factory = lambda raw: raw.decode("utf-8", "replace")
        try:
            database.execute("pragma writable_schema = on")  # SQLite opens what is shorter than it should be
            if tables_of(database) >= KEYS.keys() - {"idempotency", "agent_outcome"}:  # which not every database has
                unread += [] if sound else [f"{log.name}, what was committed last"]
                if make_first_page is new_first_page and any(schema_pages(copy)):  # more than the core's own
                    unread.append("idempotency")
                return database
        except (sqlite3.Error, UnicodeDecodeError) as error:
            problem = str(error)
        else:
            problem = "its tables are not ours"
        database.close()
    raise StartError(f"nothing can be read of {path}: {problem}", 1)


def log_is_sound(path: Path) -> bool:
    """Whether the log is known to be sound, which one that is too large to be checked is not."""
    try:
        check_log_length(path)
        return check_log(path)
    except StartError:
        return False


def tables_of(database: sqlite3.Connection) -> set[str]:
    return {row[0] for row in database.execute("select name from sqlite_master where type = 'table'")}


def found_first_page(copy: Path) -> bytes:
    """A first page over the pages that hold the schema, empty where there are none. The format, also of the numbers
    below: sqlite.org/fileformat2.html.
    """
    leaves = sorted(schema_pages(copy))
    if not leaves:
        return b""
    pointers = cells = b""
    for _, row, number in leaves[:-1]:
        cells = number.to_bytes(4) + row + cells
        pointers += (PAGE - len(cells)).to_bytes(2)
    head = struct.pack(">BHHHBI", 5, 0, len(leaves) - 1, PAGE - len(cells), 0, leaves[-1][2])
    file_head = new_database(copy)[0][:100]
    return file_head + (head + pointers).ljust(PAGE - len(file_head) - len(cells), b"\0") + cells


def schema_pages(copy: Path) -> Iterator[tuple[int, bytes, int]]:
    """(length of its last row's number, that number as it is stored, its own number) of each that has rows of it: the
    first two give their order.
    """
    with copy.open("rb") as file:
        for number, page in enumerate(iter(lambda: file.read(PAGE), b""), 1):
            rows = int.from_bytes(page[3:5])
            if len(page) == PAGE and page[0] == 13 and 0 < rows < PAGE // 4:
                (last,) = struct.unpack_from(">H", page, 6 + 2 * rows)
                if row := SCHEMA_ROW.match(page, last):
                    yield len(row[1]), row[1], number


def new_first_page(copy: Path) -> bytes:
    """That of a new database, empty where a table or an index in the copy lies where a new one has the other."""
    page, kinds = new_database(copy)
    with copy.open("rb") as file:
        for number, others in kinds.items():
            file.seek((number - 1) * PAGE)
            if file.read(1) in others:
                return b""
    return page


def new_database(copy: Path) -> tuple[bytes, dict[int, tuple[bytes, bytes]]]:
    """(The first page of a new database with as many pages as the copy, how no page begins that is the root of one of
    its tables or indexes)"""
    path = copy.with_name("empty.db")
    path.unlink(missing_ok=True)
    cco_sidecar.open_database(path).close()
    page = bytearray(path.read_bytes()[:PAGE])
    page[28:32] = (copy.stat().st_size // PAGE).to_bytes(4)
    page[32:40] = bytes(8)  # no free ones
    with contextlib.closing(sqlite3.connect(path)) as database:
        roots = "select rootpage, type = 'index' or sql like '%without rowid' from sqlite_master where rootpage > 0"
        kinds = {
            number: (b"\x05", b"\x0d") if is_index else (b"\x02", b"\x0a")
            for number, is_index in database.execute(roots)
        }
    return bytes(page), kinds


def copy_table(
    old: sqlite3.Connection, new: sqlite3.Connection, table: str, columns: list[str], unread: list[str]
) -> int:
    """How many rows were copied: those that make sense, each once. ``unread`` gets the table where some make none."""
    names, copied = ", ".join(columns), 0
    verb = "replace" if table == "meta" else "ignore"
    for row in readable_rows(old, table, names):
        values = dict(zip(columns, row, strict=True))
        if table == "meta" and values["name"] in NOT_KEPT:
            continue
        if all(is_json(values[name]) for name in JSON_COLUMNS if name in values):
            marks = ", ".join("?" * len(columns))
            with contextlib.suppress(sqlite3.IntegrityError):  # a row that a bad page made up
                copied += new.execute(f"insert or {verb} into {table} ({names}) values ({marks})", row).rowcount
        elif table not in unread:
            unread.append(table)
    return copied


def keep_earlier_facts(old: sqlite3.Connection, new: sqlite3.Connection, columns: list[str]) -> None:
    """What version 1 had columns for is among the other facts about agents, which are newer, in this one."""
    found = [row[1] for row in until_damage(old, "pragma table_info(agent_evidence)")]
    names = ["agent", *(name for name in found if name not in columns)]
    for agent, *values in readable_rows(old, "agent_evidence", ", ".join(names)) if names[1:] else ():
        facts = {name: value for name, value in zip(names[1:], values, strict=True) if is_fact(name, value)}
        known = new.execute("select outcome from agent_outcome where agent = ?", (agent,)).fetchone()
        newer = json.loads(known[0]) if known else {}
        if agent is not None and isinstance(newer, dict):
            new.execute("insert or replace into agent_outcome values (?, ?)", (agent, json.dumps(facts | newer)))


def is_fact(name: str, value: Any) -> bool:
    """Whether a column can have the value; a bad page makes up others."""
    return isinstance(value, str if name in TEXTS else (int, float)) and (name not in JSON_COLUMNS or is_json(value))


def is_json(value: Any) -> bool:
    try:
        json.loads(value)
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def readable_rows(old: sqlite3.Connection, table: str, names: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a table that can be read; some may come twice."""
    key = KEYS[table]
    select = f"select {names} from {table} not indexed"
    low = 0
    for row in until_damage(old, f"{select} order by {key}"):
        low = row[0] if key == "seq" else low
        yield row
    if whole(old, table):
        return
    high = None
    for row in until_damage(old, f"{select} order by {key.replace(',', ' desc,')} desc"):
        high = row[0] if key == "seq" else None
        yield row
    if key == "seq":
        given = [row[0] for row in until_damage(old, "select max(seq) from sqlite_sequence where name = ?", table)]
        last = high or (given and given[0]) or low + MOST_NUMBERS
        for seq in range(low + 1, min(last + 1, low + 10 * MOST_NUMBERS)):
            yield from until_damage(old, f"{select} where seq = ?", seq)


def whole(old: sqlite3.Connection, table: str) -> bool:
    """Whether all of a table can be read."""
    try:
        old.execute(f"select count(*) from {table} not indexed").fetchone()
        return not any(row[0] != "ok" for row in old.execute(f"pragma quick_check({table})"))
    except sqlite3.Error:
        return False


def until_damage(old: sqlite3.Connection, sql: str, *values: Any) -> Iterator[tuple[Any, ...]]:
    """What a statement gives before it fails."""
    with contextlib.suppress(sqlite3.Error):
        yield from old.execute(sql, values)


def number_on(new: sqlite3.Connection, old: sqlite3.Connection) -> None:
    """No event gets a number that a reader has passed, or that another event had."""
    newest = [
        new.execute(f"select max(seq) from {table}").fetchone()[0] for table in ("event", "dead_letter", "position")
    ]
    given = until_damage(old, "select seq from sqlite_sequence where name = 'event'")
    newest += [row[0] for row in given if isinstance(row[0], int) and row[0] < 1 << 53]  # a bad page says anything
    new.execute("delete from sqlite_sequence where name = 'event'")
    new.execute("insert into sqlite_sequence values ('event', ?)", (max(number or 0 for number in newest),))

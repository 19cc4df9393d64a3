"""Records that write down which of their methods changed something, so that others can do the same again."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from cco_sidecar import NewEvent, Records, StorageError, one_line

FORMAT = 2  # of an entry: a newer sidecar's is not read
LOCAL = ("port", "log", "applied")  # facts of this machine alone
Call = tuple[str, tuple[Any, ...], dict[str, Any]]  # of a changing method of Records
CHANGING = (  # the methods of Records that change something, also those of the plugins guard and repeats
    "insert", "set_meta", "insert_event", "mark_delivered", "remove_events", "move_position", "forget_positions",
    "insert_agent", "update_agent", "add_outcome", "revoke", "remember", "forget", "forget_old",
)  # fmt: skip
EVENT = ("project", "type", "topic", "issue", "created", "expires", "body")
TABLES = ("result",)  # that jobs insert into by the table's name


class Replica(Records):
    """Records of one sidecar of many, ``node``: ``calls`` are what the transaction has changed, in the order of the
    calls.
    """

    node = ""

    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__(connection)
        self.calls, self.moment = list[Call](), 0.0
        self.ended: list[str] = []  # subjects
        self._depth = 0
        connection.create_function("now", 0, lambda: self.moment or time.time())

    def begin(self, moment: float = 0.0) -> None:
        """Begin a transaction at a moment, which is the same wherever it is done again."""
        super().begin()
        self.calls, self.ended, self.moment = [], [], moment

    def restore(self, source: Replica) -> None:
        """Take everything from another database."""
        source._db.backup(self._db)
        self._db.execute("pragma wal_checkpoint(truncate)")  # the file has its new size from now on

    def savepoint(self) -> None:
        self._db.execute("savepoint job")

    def release(self) -> None:
        self._db.execute("release job")

    def undo(self) -> None:
        """Take back what was changed since the savepoint."""
        self._db.execute("rollback to job")
        self._db.execute("release job")

    def change(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if not self._depth:
            raise StorageError("what is to be changed on all machines is changed by methods of Records alone")
        return super().change(sql, *values)

    def do(self, name: str, method: Callable[..., Any], values: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a changing method, and note it where it changed something and no other one called it."""
        before = self._db.total_changes
        self._depth += 1
        try:
            result = method(*values, **named)
        finally:
            self._depth -= 1
        if name == "revoke":
            self.ended.append(values[1])
        local = name == "set_meta" and values[0] in LOCAL
        if not self._depth and not local and self._db.total_changes > before:
            self.calls.append((name, values, named))
        return result

    def insert_agent(self, row: dict[str, Any]) -> None:
        """A new agent belongs to the machine that started it."""
        own = {name: row[name] for name in (*self.COLUMNS, "depth", "permissions", "only_issue")}
        self.do("insert_agent", self._insert_owned_agent, (own | {"node": row.get("node", self.node)},), {})

    def _insert_owned_agent(self, row: dict[str, Any]) -> None:
        super().insert_agent(row)
        self.add_outcome(row["id"], node=row["node"])

    def update_agent(self, id: str, **values: Any) -> None:
        self.do("update_agent", self._update_agent, (id,), values)

    def _update_agent(self, id: str, **values: Any) -> None:
        """Entries of earlier versions have facts, too, for which there were columns then."""
        own = {name: value for name, value in values.items() if name in self.COLUMNS}
        others = {name: value for name, value in values.items() if name not in own}
        if own:
            super().update_agent(id, **own)
        if others:
            self.add_outcome(id, **others)

    def size_since(self, number: int) -> int:
        """About how many bytes the calls behind the first ``number`` have."""
        values = (value for _, values, named in self.calls[number:] for value in (*values, *named.values()))
        return sum(len(msgspec.msgpack.encode(plain(value))) for value in values)

    def entry(self) -> bytes:
        """What the transaction has changed, as an entry of the log."""
        calls = [(name, [plain(value) for value in values], named) for name, values, named in self.calls]
        return msgspec.msgpack.encode([FORMAT, self.node, self.moment, calls])

    def apply(self, content: bytes) -> None:
        """Do what an entry says, in the transaction that has begun. Raises StorageError for what is no entry."""
        self.moment, calls = calls_of(content)
        for name, values, named in calls:
            getattr(self, name)(*values, **named)

    def unfinished_agents(self, project: str) -> list[dict[str, Any]]:
        """This machine's alone: the others look after theirs."""
        return [row for row in super().unfinished_agents(project) if row.get("node", self.node) == self.node]


def plain(value: Any) -> Any:
    """An argument as an entry has it."""
    return [getattr(value, name) for name in EVENT] if isinstance(value, NewEvent) else value


def event_of(values: Sequence[Any]) -> NewEvent:
    """An event by its columns."""
    facts = dict(zip(EVENT, values, strict=True))
    return NewEvent(**facts, envelope=msgspec.json.decode(facts["body"]))


def calls_of(content: bytes) -> tuple[float, list[Call]]:
    """The moment and the calls of an entry. Raises StorageError where it is not one that this version reads."""
    try:
        version, _, moment, calls = msgspec.msgpack.decode(content)
        if version != FORMAT:
            raise StorageError(f"an entry of the log has the form {version}, which a newer version reads: update")
        return moment, [checked(*call) for call in calls]
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise StorageError(f"what is in the log is no entry: {one_line(error)}") from None


def checked(name: str, values: list[Any], named: dict[str, Any]) -> Call:
    """A call out of an entry. Raises ValueError where it is none of a changing method with names of columns."""
    columns = [*named, *(values[1] if name == "insert" else ())]
    if name not in CHANGING or (name == "insert" and values[0] not in TABLES) or not all(map(COLUMN, columns)):
        raise ValueError(f"no call of {name}")
    if name == "insert_event":
        values = [event_of(values[0])]
    return name, tuple(values), named


COLUMN = re.compile("[a-z_]+").fullmatch


def logged(name: str) -> Callable[..., Any]:
    """A changing method, of Records or of what plugins made of it, that writes itself down."""
    return lambda self, *values, **named: self.do(name, getattr(super(Replica, self), name), values, named)


for _name in CHANGING:
    if _name not in vars(Replica):
        setattr(Replica, _name, logged(_name))

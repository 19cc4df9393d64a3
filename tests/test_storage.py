"""Storage: what was answered is on disk, what failed left nothing, and nobody else's data is touched."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import http.client
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import MODULE, PROJECT, Client, Service, body_of, clean_environment, make_repository, plugin, until, write

import cco_sidecar
from cco_sidecar import (
    LOG_BYTES,
    MB,
    PAGE_BYTES,
    ApiError,
    Claims,
    EventBus,
    HangUp,
    Hooks,
    Metrics,
    NewEvent,
    Records,
    ResultFiles,
    StartError,
    Storage,
    StorageError,
    WaitQuery,
    load_settings,
    new_event,
)

Turns = plugin("_turns").Turns


def refused_start(root: Path, storage: Path, *more: str, under: Sequence[str] = ()) -> str:
    """The line with which the service does not start on ``storage``; ``under`` is a command that runs it."""
    command = [
        *under,
        sys.executable,
        str(MODULE),
        "--root",
        str(root),
        "--storage",
        str(storage),
        "--port",
        "0",
        *more,
    ]
    # Python would leave half a file of its bytecode to other tests where files cannot grow.
    env = clean_environment(**({"PYTHONDONTWRITEBYTECODE": "1"} if under else {}))
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode in (1, 2) and ended.stdout == "", ended.stderr
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("cco: "), ended.stderr
    return ended.stderr


def opened(tmp_path: Path, alone: bool = False) -> Storage:
    (tmp_path / "root").mkdir(exist_ok=True)
    (tmp_path / "state").mkdir(exist_ok=True)
    settings = load_settings({"root": str(tmp_path / "root"), "storage": str(tmp_path / "state")}, {})
    if alone:
        return Storage(settings, Records)
    classes = (plugin("repeats").part_class(plugin("guard").part_class(base)) for base in (Storage, Records))
    storage: Storage = next(classes)(settings, next(classes))
    return storage


def with_storage(tmp_path: Path, scene: Callable[[Storage], Awaitable[Any]], alone: bool = False) -> Any:
    """What ``scene`` returns, on a storage of its own that is open meanwhile."""

    async def run() -> Any:
        storage = opened(tmp_path, alone)
        storage.start()
        try:
            return await scene(storage)
        finally:
            storage.close()

    return asyncio.run(run())


# -- the database


def test_the_schema_version_is_recorded_and_a_restart_keeps_the_store(tmp_path: Path) -> None:
    async def epoch(storage: Storage) -> str:
        return storage.epoch

    first = with_storage(tmp_path, epoch)
    with sqlite3.connect(tmp_path / "state" / Storage.FILE) as database:
        assert database.execute("pragma user_version").fetchone() == (cco_sidecar.SCHEMA_VERSION,)
        assert database.execute("pragma application_id").fetchone() == (cco_sidecar.APPLICATION_ID,)
        assert database.execute("pragma journal_mode").fetchone() == ("wal",)
    assert with_storage(tmp_path, epoch) == first


EARLIER = """
drop table agent_evidence;
create table agent_evidence (
  agent text primary key, depth integer not null, permissions text not null, only_issue text,
  birth text, seen text not null default '[]', ordered integer not null default 0,
  cpu real, memory integer, peak_memory integer, processes integer, measured real, last_call text) without rowid;
insert into agent (id, project, type, issue, task, state, pid, started, ended, exit_code, time_limit)
  values ('a-1', :project, 'python-specialist', 'i-1', 'look', 'completed', 7, 1.0, 2.0, 0, 60.0);
insert into agent (id, project, type, issue, task, state, pid, started, time_limit)
  values ('a-2', :project, 'python-specialist', 'i-1', 'look', 'running', 4194305, 1.0, 60.0);  -- whose end was ordered
insert into agent_evidence values
  ('a-1', 3, '["read_context"]', null, 'birth', '[[7, "birth"]]', 0, 1.5, 2, 3, 4, 5.0, '["GET", "/api/results", 1.5]'),
  ('a-2', 3, '["read_context"]', null, 'birth', '[[4194305, "birth"]]', 1, 1.5, 2, 3, 4, 5.0, '["GET", "/api/results", 1.5]');
pragma user_version = 1;
"""


def test_what_the_earlier_version_kept_of_agents_is_told_with_plugins_alone_and_with_plugins_again(
    make_service: Callable[..., Service],
) -> None:
    service = make_service()
    service.stop()
    with contextlib.closing(sqlite3.connect(service.storage / Storage.FILE)) as database:
        database.executescript(EARLIER.replace(":project", f"'{PROJECT}'"))
    for arguments in ((), ("--no-plugins",), ()):
        service.arguments = arguments
        service.start()
        client = service.client()
        until(lambda client=client: client.get("/api/agents/a-2/status").json()["state"] == "killed")
        told = client.get("/api/agents/a-1/status").json()
        assert (told["state"], told["exit_code"], told["pid"]) == ("completed", 0, 7)
        for agent in () if arguments else ("a-1", "a-2"):
            told = client.get(f"/api/agents/{agent}/status").json()
            usage, call = told["usage"], told["last_call"]
            assert (told["depth"], usage["cpu_seconds"], usage["peak_memory_bytes"]) == (3, 1.5, 3)
            assert (call["method"], call["path"]) == ("GET", "/api/results")
            assert agent != "a-1" or usage["processes"] == 4
        service.stop()


def newer(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.executescript(
            f"pragma application_id = {cco_sidecar.APPLICATION_ID}; pragma user_version = {cco_sidecar.SCHEMA_VERSION + 1};"
        )


def another_programs(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.executescript("create table song (title text); pragma user_version = 1;")


def another_programs_without_a_version(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.executescript("create table song (title text); insert into song values ('x');")


def no_database(path: Path) -> None:
    path.write_bytes(b"this is not a database, but it is somebody's work\n" * 100)


def marked_by_another_program(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.executescript("create table song (title text); pragma application_id = 7;")


def another_programs_with_a_log(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.executescript(
            "pragma journal_mode = wal; create table song (title text); create table artist (name text);"
        )
    database.close()  # which copies the log


def another_programs_without_a_table(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.executescript("create view song as select 'x' as title;")


@pytest.mark.parametrize("spoil", [
    newer, marked_by_another_program, no_database, another_programs, another_programs_without_a_version,
    another_programs_with_a_log, another_programs_without_a_table,
])  # fmt: skip
def test_the_file_alone_refuses_a_database_that_says_it_is_not_ours_and_leaves_it(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    path = tmp_path / Storage.FILE
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(StartError, match=r"cannot be opened: .*; it is left as it is"):
        Storage(load_settings({"root": str(tmp_path), "storage": str(tmp_path)}, {}), Records).start()
    assert path.read_bytes() == before


def cut_off(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.executescript(
            f"{cco_sidecar.SCHEMA} pragma application_id = {cco_sidecar.APPLICATION_ID}; pragma user_version = {cco_sidecar.SCHEMA_VERSION};"
        )
    os.truncate(path, path.stat().st_size // 2)


def overwritten_in_the_middle(path: Path) -> None:
    cut_off(path)
    path.unlink()
    with sqlite3.connect(path) as database:
        database.executescript(
            f"{cco_sidecar.SCHEMA}"
            f" pragma application_id = {cco_sidecar.APPLICATION_ID}; pragma user_version = {cco_sidecar.SCHEMA_VERSION};"
        )
    with path.open("r+b") as file:
        file.seek(2 * 4096)
        file.write(b"\xff" * 4096)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (newer, "newer version"), (another_programs, "another program"), (another_programs_without_a_version, "another program"),
        (no_database, "damaged"), (cut_off, "damaged"), (overwritten_in_the_middle, "damaged"),
    ],
)  # fmt: skip
def test_a_database_that_is_not_ours_to_open_is_refused_and_left_as_it_is(
    tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    storage, path = opened(tmp_path), tmp_path / "state" / Storage.FILE
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(StartError, match=said) as refused:
        storage.start()
    assert "left as it is" in str(refused.value) and refused.value.exit_code == 1
    assert path.read_bytes() == before and os.listdir(path.parent) == [Storage.FILE]


def test_the_service_itself_refuses_a_damaged_database_in_one_line(repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "storage" / Storage.FILE
    path.parent.mkdir()
    no_database(path)
    before = path.read_bytes()
    assert "damaged" in refused_start(repository, path.parent)
    assert path.read_bytes() == before and not (path.parent / "sidecar.json").exists()


@contextlib.contextmanager
def held_by_another_program(path: Path) -> Iterator[list[str]]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("pragma locking_mode = exclusive")
        other.execute("begin exclusive")
        yield []


@contextlib.contextmanager
def no_room(path: Path) -> Iterator[list[str]]:
    yield ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh"]


@contextlib.contextmanager
def little_room(path: Path) -> Iterator[list[str]]:
    yield ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh"]


@pytest.mark.parametrize(
    ("hinder", "said"),
    [
        (held_by_another_program, "database is locked (SQLITE_BUSY)"), (no_room, "disk I/O error (SQLITE_IOERR_SHMOPEN)"),
        (little_room, "disk I/O error (SQLITE_IOERR_SHMSIZE)"),
    ],
)  # fmt: skip
def test_a_sound_database_that_cannot_be_opened_now_is_not_called_damaged(
    tmp_path: Path, hinder: Callable[[Path], Any], said: str
) -> None:
    with_storage(tmp_path, lambda storage: asyncio.sleep(0))
    path = tmp_path / "state" / Storage.FILE
    write(path.with_name("jwt.secret"), "s" * 40).chmod(0o600)
    before = path.read_bytes()
    with hinder(path) as words:
        told = refused_start(tmp_path / "root", path.parent, under=words)
    assert told == f"cco: the storage {path} cannot be opened: {said}; it is left as it is\n"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "command", ["serve", "token --type qa-engineer", "token --type qa-engineer --permissions read_context"]
)
def test_a_storage_into_which_nothing_can_be_written_is_no_fault_of_the_output(tmp_path: Path, command: str) -> None:
    (tmp_path / "root").mkdir()
    where = ["--root", str(tmp_path / "root"), "--storage", str(tmp_path / "state")]
    words = [sys.executable, str(MODULE), *command.split(), *where]
    ended = subprocess.run(
        ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *words], capture_output=True, text=True, timeout=60,
        env=clean_environment(PYTHONDONTWRITEBYTECODE="1"), cwd=tmp_path,
    )  # fmt: skip
    told = f"cco: [Errno {errno.EFBIG}] File too large: '{tmp_path / 'state/jwt.secret'}'\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", told)


@pytest.mark.parametrize("program", ["claude", "codex", "gemini"])
def test_a_file_that_cannot_be_written_is_named_and_is_no_fault_of_the_output(
    tmp_path: Path, repository: Path, program: str
) -> None:
    words = [sys.executable, str(MODULE), "connect", program, "--write", "--storage", str(tmp_path / "state")]
    ended = subprocess.run(
        ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *words], capture_output=True, text=True, timeout=60,
        env=clean_environment(PYTHONDONTWRITEBYTECODE="1", HOME=str(tmp_path)), cwd=repository,
    )  # fmt: skip
    told = f"cco: [Errno {errno.EFBIG}] File too large: '{tmp_path / 'state/connections.json'}'\n"
    assert (ended.returncode, ended.stderr) == (1, told) and not list(tmp_path.glob("state/.*"))


def test_what_has_a_files_name_is_named_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError) as refused:
        cco_sidecar.write_file(tmp_path / "taken", b"x")
    assert refused.value.filename == str(tmp_path / "taken") and os.listdir(tmp_path) == ["taken"]


# -- files that are gone


def healthy(service: Service) -> tuple[int, dict[str, Any]]:
    answer = Client(service.url, None).get("/health")
    return answer.status_code, answer.json()


def moved_away_and_copied_back(folder: Path) -> None:
    """A cleaner's backup and restore: the same bytes in another file."""
    shutil.copy2(folder / Storage.FILE, folder / "copy")
    (folder / "copy").rename(folder / Storage.FILE)


GONE = {
    "the database": lambda folder: (folder / Storage.FILE).unlink(),
    "its log": lambda folder: (folder / f"{Storage.FILE}-wal").unlink(),
    "the log's index": lambda folder: (folder / f"{Storage.FILE}-shm").unlink(),
    "all three": lambda folder: [file.unlink() for file in folder.glob(f"{Storage.FILE}*")],
    "the whole folder": shutil.rmtree,
    "the folder, moved": lambda folder: folder.rename(folder.parent / "elsewhere"),
    "the database, restored from a copy": moved_away_and_copied_back,
    "the database, emptied and made anew": lambda folder: [(folder / Storage.FILE).unlink(), (folder / Storage.FILE).touch()],
}  # fmt: skip


@pytest.mark.parametrize("what", GONE)
def test_what_could_not_be_kept_is_refused_once_the_storage_is_gone(
    make_service: Callable[..., Service], what: str
) -> None:
    service = make_service()
    architect = service.client()
    architect.store()
    files = {path: path.stat().st_ino for path in (service.storage / "results").rglob("*.json")}
    GONE[what](service.storage)
    event = architect.post("/api/events/noted", {"publisher": "p", "topic": "t", "data": {}})
    assert (event.status_code, event.json()["code"]) == (500, "EVT_001")
    result = architect.post("/api/results", body_of("issue-1"))
    assert (result.status_code, result.json()["code"]) == (500, "STR_001")
    assert "deleted or replaced" in result.json()["message"] and str(service.storage) not in result.text
    status, health = healthy(service)
    assert (status, health["status"]) == (503, "unhealthy") and health["checks"]["storage"].startswith("unhealthy: ")
    assert health["checks"]["memory_usage_mb"] > 10 and isinstance(health["checks"]["event_queue_size"], int)
    assert all(path.stat().st_ino == inode for path, inode in files.items() if path.exists())


def test_a_storage_that_is_put_back_is_used_again(make_service: Callable[..., Service]) -> None:
    service = make_service()
    database, aside = service.storage / Storage.FILE, service.storage / "aside"
    database.rename(aside)
    until(lambda: healthy(service)[0] == 503)
    aside.rename(database)
    assert healthy(service)[0] == 200
    kept = service.client().publish("noted")["event_id"]
    service.kill()
    service.start()
    assert [event["event_id"] for event in service.client().wait(timeout=0)["events"]] == [kept]


def link_to_itself_elsewhere(folder: Path) -> None:
    (folder / Storage.FILE).rename(folder / "x.db")
    (folder / Storage.FILE).symlink_to("x.db")


def end_of_frames(log: Path) -> int:
    """Where the zeros behind the last frame begin."""
    frame, written = 24 + 4096, len(log.read_bytes().rstrip(b"\0"))
    return 32 + -(-(written - 32) // frame) * frame


DATABASE, LOG = Storage.FILE, f"{Storage.FILE}-wal"
CUT: dict[str, tuple[Callable[[Path], Any], str]] = {  # and what the next start says; "": its log has what was lost
    "the database emptied": (lambda folder: os.truncate(folder / DATABASE, 0), "is empty, and was not always"),
    "the database cut to a page": (lambda folder: os.truncate(folder / DATABASE, 4096), "damaged"),
    "the database cut to half": (lambda folder: os.truncate(folder / DATABASE, (folder / DATABASE).stat().st_size // 2), "damaged"),
    "the log emptied": (lambda folder: os.truncate(folder / LOG, 0), "damaged"),
    "the log cut to half": (lambda folder: os.truncate(folder / LOG, (folder / LOG).stat().st_size // 2), ""),
    "the log cut by a byte": (lambda folder: os.truncate(folder / LOG, (folder / LOG).stat().st_size - 1), ""),
    "half of what the log holds cut": (lambda folder: os.truncate(folder / LOG, end_of_frames(folder / LOG) // 2), "damaged"),
    "a byte of what the log holds cut": (lambda folder: os.truncate(folder / LOG, end_of_frames(folder / LOG) - 1), "damaged"),
    "the database's head overwritten": (lambda folder: overwrite(folder / DATABASE, 0, b"garbage"), ""),
    "the database's head made zeros": (lambda folder: overwrite(folder / DATABASE, 0, bytes(4096)), ""),
    "the log's head overwritten": (lambda folder: overwrite(folder / LOG, 0, b"garbage"), "damaged"),
    "a link to the database": (link_to_itself_elsewhere, "replace it by what it leads to"),
}  # fmt: skip


@pytest.mark.parametrize("what", CUT)
def test_what_could_not_be_kept_is_refused_once_the_database_is_cut_and_so_is_the_next_start(
    make_service: Callable[..., Service], repository: Path, what: str
) -> None:
    service = make_service()
    kept = [service.client().publish()["event_id"] for _ in range(3)]
    assert service.stop() == 0, "the log is in the database now"
    service.start()
    kept.append(service.client().publish()["event_id"])
    cut, said = CUT[what]
    cut(service.storage)
    event = service.client().post("/api/events/noted", {"publisher": "p", "topic": "t", "data": {}})
    assert (event.status_code, event.json()["code"]) == (500, "EVT_001")
    result = service.client().post("/api/results", body_of("issue-1"))
    assert (result.status_code, result.json()["code"]) == (500, "STR_001")
    status, health = healthy(service)
    assert (status, health["status"]) == (503, "unhealthy")
    assert str(service.storage) not in event.text + result.text + str(health)
    service.kill()
    if said:
        assert said in refused_start(repository, service.storage)
    else:
        service.start()
        assert [event["event_id"] for event in service.client().wait(timeout=0)["events"]] == kept


@pytest.mark.parametrize("name", [DATABASE, LOG])
def test_what_somebody_appends_to_the_database_loses_nothing(make_service: Callable[..., Service], name: str) -> None:
    service = make_service()
    kept = [service.client().publish()["event_id"]]
    for garbage in (b"x", bytes(5000), b"garbage" * 9000):
        overwrite(service.storage / name, 1, garbage)
        kept += [service.client().publish()["event_id"] for _ in range(3)]
        assert healthy(service)[0] == 200
    service.kill()
    service.start()
    assert [event["event_id"] for event in service.client().wait(timeout=0)["events"]] == kept


def test_a_log_that_sqlite_itself_cuts_is_in_order(tmp_path: Path) -> None:
    async def scene(storage: Storage) -> None:
        log, sizes = storage.path.with_name(LOG), []
        with contextlib.closing(sqlite3.connect(storage.path)) as reader:
            reader.execute("begin")
            reader.execute("select count(*) from event").fetchone()  # the log cannot begin anew before this ends
            for text in "abc":
                await storage.write(lambda records, text=text: records.set_meta("large", text * cco_sidecar.LOG_BYTES))
        for text in "defgh":
            sizes.append(log.stat().st_size)
            await storage.write(lambda records, text=text: records.set_meta("small", text))
        assert sizes[0] > 2 * cco_sidecar.LOG_BYTES and sizes[-1] == cco_sidecar.LOG_BYTES, sizes

    with_storage(tmp_path, scene)


def with_old_secret(folder: Path) -> None:
    os.utime(folder / "jwt.secret", (time.time() - 3600,) * 2)


@pytest.mark.parametrize("trace", [
    lambda folder: (folder / "results").mkdir(mode=0o700), lambda folder: (folder / "agents").mkdir(mode=0o700),
    lambda folder: (folder / LOG).write_bytes(b"x"), lambda folder: (folder / "sidecar.json").write_text("{}"), with_old_secret,
])  # fmt: skip
def test_an_empty_database_that_was_not_always_is_refused(
    repository: Path, tmp_path: Path, trace: Callable[[Path], Any]
) -> None:
    storage = tmp_path / "storage"
    storage.mkdir(mode=0o700)
    (storage / "jwt.secret").write_text("s" * 40)
    (storage / DATABASE).touch()
    trace(storage)
    for file in storage.iterdir():
        file.chmod(0o700 if file.is_dir() else 0o600)
    assert "is empty, and was not always" in refused_start(repository, storage)
    assert (storage / DATABASE).stat().st_size == 0


@pytest.mark.parametrize("made", [(), ("lock",), ("lock", "jwt.secret"), ("audit.log", LOG, f"{DATABASE}-shm")])
def test_a_first_start_that_was_interrupted_is_begun_again(
    make_service: Callable[..., Service], made: tuple[str, ...]
) -> None:
    service = make_service()
    service.kill()
    shutil.rmtree(service.storage)
    service.storage.mkdir(mode=0o700)
    for name in (*made, DATABASE):
        (service.storage / name).touch(0o600)
    if "jwt.secret" in made:
        (service.storage / "jwt.secret").write_text("s" * 40)
    service.start()
    service.client().publish()
    assert healthy(service)[0] == 200


@pytest.mark.parametrize("name", [LOG, f"{DATABASE}-shm"])
def test_what_is_no_file_in_the_databases_place_is_named(repository: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / name).mkdir(mode=0o700)
    line = refused_start(repository, tmp_path / "state")
    assert f"{name} is a folder" in line and "salvage" not in line
    (tmp_path / "state" / name).rmdir()
    os.mkfifo(tmp_path / "state" / name, 0o600)
    assert f"{name} is a pipe" in refused_start(repository, tmp_path / "state")


@pytest.mark.parametrize("name", ["agents", "index", "results", "agents.lock"])
def test_what_is_in_the_place_of_a_file_or_folder_is_named_with_what_to_do(
    repository: Path, tmp_path: Path, name: str
) -> None:
    place, kind = tmp_path / "state" / name, "file" if "." in name else "folder"
    place.parent.mkdir(mode=0o700)
    other = ("a folder", os.mkdir) if kind == "file" else ("a file", lambda path, mode: path.touch(mode))
    for stands, make in (("a pipe", os.mkfifo), other):
        make(place, 0o700)
        said = f"{place} is {stands}, and a {kind} belongs there: move it away"
        assert said in refused_start(repository, place.parent)
        told = examined(repository, place.parent)
        assert told.returncode == 1 and said in told.stdout
        place.rmdir() if place.is_dir() else place.unlink()


def examined(repository: Path, storage: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(MODULE), "doctor", "--root", str(repository), "--storage", str(storage)]
    return subprocess.run(words, env=clean_environment(), capture_output=True, text=True, timeout=60)


def in_place_of(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(results: Path) -> None:
        shutil.rmtree(results, ignore_errors=True)
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        make(results / name)

    return change


RECORD = f"{PROJECT}/issue-1/python-specialist.json"


@pytest.mark.parametrize(("name", "make", "stands", "kind"), [
    (".", Path.touch, "a file", "folder"), (".", lambda path: path.symlink_to("nowhere"), "a link", "folder"),
    (".", os.mkfifo, "a pipe", "folder"), (".new", Path.touch, "a file", "folder"),
    (".new", lambda path: path.symlink_to("/proc"), "a link", "folder"), (PROJECT, Path.touch, "a file", "folder"),
    (PROJECT, lambda path: path.symlink_to("/proc"), "a link", "folder"),
    (f"{PROJECT}/issue-1", Path.touch, "a file", "folder"), (RECORD, Path.mkdir, "a folder", "file"),
])  # fmt: skip
def test_where_no_result_can_be_written_everybody_is_told_the_path_and_what_stands_there(
    make_service: Callable[..., Service], name: str, make: Callable[[Path], Any], stands: str, kind: str
) -> None:
    service = make_service()
    results = service.storage / "results"
    in_place_of(name, make)(results)
    told = f"{os.path.normpath(f'results/{name}')} is {stands}, and a {kind} belongs there: move it away"
    answer = service.client().post("/api/results", body_of("issue-1"))
    assert (answer.status_code, answer.json()["code"]) == (500, "STR_001")
    assert told in answer.json()["message"] and told in service.log
    if name in (".", ".new", PROJECT):  # of one issue alone the service knows by its results
        status, health = healthy(service)
        assert status == 503 and told in health["checks"]["storage"], health
        assert str(service.storage) not in str(health)
    doctor = examined(service.root, service.storage)
    assert doctor.returncode == 1 and told in doctor.stdout, doctor
    results.unlink() if not results.is_dir() else shutil.rmtree(results)
    assert healthy(service)[0] == 200
    service.client().store(issue="issue-1")
    assert "belongs there" not in examined(service.root, service.storage).stdout


@pytest.mark.parametrize("clean", [
    lambda lock: lock.unlink(), lambda lock: [lock.unlink(), lock.touch()], lambda lock: lock.rename(lock.with_name("old"))
])  # fmt: skip
def test_a_storage_whose_lock_was_deleted_still_lets_no_second_service_in(
    make_service: Callable[..., Service], repository: Path, clean: Callable[[Path], Any]
) -> None:
    service = make_service()
    clean(service.storage / "lock")
    assert f"pid {service.info['pid']}" in refused_start(repository, service.storage)
    service.client().publish()
    assert healthy(service)[0] == 200
    service.kill()
    service.start()  # the locks have died with their holder


@pytest.mark.parametrize("held", [["lock"], ["."], ["lock", "."]])
def test_a_lock_that_is_held_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[str]
) -> None:
    """As by a child of a service that was killed, until it runs its program, or by the doctor's look."""
    (tmp_path / "lock").touch()
    files = [os.open(tmp_path / name, os.O_RDONLY) for name in held]
    for file in files:
        cco_sidecar.lock_file(file)
    monkeypatch.setattr(cco_sidecar.time, "sleep", lambda seconds: files and os.close(files.pop()))
    with cco_sidecar.instance_lock(tmp_path):
        assert not files
        with pytest.raises(cco_sidecar.StartError, match="a sidecar already runs"):
            cco_sidecar.instance_lock(tmp_path).__enter__()


@pytest.mark.parametrize("call", ["os.open", "os.statvfs and disk_usage", "process figures"])
def test_health_keeps_its_shape_whatever_fails(make_service: Callable[..., Service], tmp_path: Path, call: str) -> None:
    code = {
        "os.open": """
import errno
original = os.open
def full(path, flags, *more, **keywords):
    if FAULT.exists() and flags & os.O_CREAT:
        raise OSError(errno.ENOSPC, "No space left on device")
    return original(path, flags, *more, **keywords)
os.open = full
""",
        "os.statvfs and disk_usage": """
import shutil
original = shutil.disk_usage
def gone(path):
    if FAULT.exists():
        raise FileNotFoundError(2, "No such file or directory")
    return original(path)
shutil.disk_usage = gone
""",
        "process figures": """
import psutil
original = psutil.Process.memory_info
def denied(self):
    if FAULT.exists():
        raise psutil.AccessDenied(1)
    return original(self)
psutil.Process.memory_info = denied
""",
    }[call]
    service = faulty(make_service, tmp_path, code)
    status, before = healthy(service)
    assert status == 200
    (tmp_path / "fault").touch()
    measured = time.monotonic()
    until(lambda: time.monotonic() > measured + 0.5)  # what was measured before is told for a while
    if call == "os.open":  # without inodes the database could still be written
        until(lambda: healthy(service)[0] == 503)
    status, health = healthy(service)
    assert status == (503 if call == "os.open" else 200)
    assert health.keys() == before.keys() and health["checks"].keys() == before["checks"].keys()
    if call == "os.open":
        assert "No space left" in health["checks"]["storage"]


@pytest.mark.parametrize("seconds", [-36_000, -60, 36_000])
def test_a_clock_that_is_set_changes_no_length_of_time_and_loses_no_event(
    make_service: Callable[..., Service], tmp_path: Path, seconds: int
) -> None:
    code = f"""
original = time.time
time.time = lambda: original() + ({seconds} if FAULT.exists() else 0)
"""
    service = faulty(make_service, tmp_path, code)
    client = service.client(exp=int(time.time()) + 80_000)
    client.publish("noted", ttl_seconds=86_400)
    with ThreadPoolExecutor() as pool:
        poll = pool.submit(service.client(exp=int(time.time()) + 80_000).wait, "awaited")
        until(lambda: client.get("/status").json()["events"]["active_subscriptions"] == 1)
        (tmp_path / "fault").touch()
        client.publish("awaited")
        assert len(poll.result()["events"]) == 1
    performance = client.get("/status").json()["performance"]
    assert 0 <= performance["avg_response_time_ms"] <= performance["p99_response_time_ms"] < 36_000_000
    status, health = healthy(service)
    assert status == 200 and 0 <= health["uptime_seconds"] < 36_000
    client.publish("noted", ttl_seconds=86_400)
    client.store()
    assert client.get("/status").json()["events"]["avg_delivery_time_ms"] >= 0
    found = client.wait(timeout=0)["events"]
    assert [event["event_type"] for event in found] == ["noted", "awaited", "noted", "agent_completed"]


@pytest.mark.parametrize("call", ["pread(number, *a)", "lstat(path, *a)", "path.samestat(*a)"])
@pytest.mark.parametrize(
    "error", ["OSError(5, 'Input/output error')", "PermissionError(13, 'Permission denied')", "MemoryError()"]
)
def test_a_database_that_cannot_be_looked_at_for_a_while_ends_no_writing(
    make_service: Callable[..., Service], tmp_path: Path, call: str, error: str
) -> None:
    name, arguments = call.removesuffix(")").split("(")
    code = f"""
import threading

original = os.{name}

def faulty({arguments}):
    if threading.current_thread().name == "storage-writer" and FAULT.exists():
        raise {error}
    return original({arguments})

os.{name} = faulty
"""
    service = faulty(make_service, tmp_path, code)
    service.client().store(issue="issue-1")
    (tmp_path / "fault").touch()
    refused = service.client().post("/api/results", body_of("issue-1"))
    assert (refused.status_code, refused.json()["code"]) == (500, "STR_001")
    (tmp_path / "fault").unlink()
    service.client().store(issue="issue-1")
    assert healthy(service)[0] == 200


@pytest.mark.parametrize(
    "error", ["OSError(5, 'Input/output error')", "PermissionError(13, 'Permission denied')", "MemoryError()"]
)
def test_what_is_committed_is_answered_and_told_where_the_database_cannot_be_looked_at_right_afterwards(
    make_service: Callable[..., Service], tmp_path: Path, error: str
) -> None:
    code = f"""
import threading

lstat, place, placed = os.lstat, c.ResultFiles.place, []

def place_and_note(self):
    place(self)
    placed.extend([True] * FAULT.exists())

def faulty(path, **more):
    if placed and threading.current_thread().name == "storage-writer":
        placed.clear()
        raise {error}
    return lstat(path, **more)

os.lstat, c.ResultFiles.place = faulty, place_and_note
"""
    service = faulty(make_service, tmp_path, code)
    client = service.client()
    client.store(issue="issue-1")
    (tmp_path / "fault").touch()
    stored = client.store(issue="issue-2")
    events = client.wait("agent_completed", filter="issue_id:issue-2", since="earliest", timeout=0)["events"]
    assert [event["event_id"] for event in events] == [stored["event_id"]]
    assert "cannot be looked at" in service.log


def test_health_says_so_where_the_disk_is_so_full_that_nothing_is_taken(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    code = """
import shutil
original = shutil.disk_usage
shutil.disk_usage = lambda path: original(path)._replace(free=15_000_000) if FAULT.exists() else original(path)
"""
    service = faulty(make_service, tmp_path, code)
    service.client().store(issue="issue-1")
    (tmp_path / "fault").touch()
    until(lambda: service.client().post("/api/results", body_of("issue-1")).status_code == 500)
    until(lambda: healthy(service)[0] == 503)
    assert "the storage or its disk is full" in healthy(service)[1]["checks"]["storage"]
    (tmp_path / "fault").unlink()
    until(lambda: healthy(service)[0] == 200)
    service.client().store(issue="issue-1")


# -- the database's log


def test_the_log_has_its_length_from_the_start_and_no_commit_changes_it(make_service: Callable[..., Service]) -> None:
    service, kept = make_service(), []
    log = service.storage / LOG
    for end in (service.stop, service.kill, service.stop):
        assert log.stat().st_size == LOG_BYTES
        kept += [service.client().publish()["event_id"] for _ in range(5)]
        assert log.stat().st_size == LOG_BYTES
        end()
        service.start()
        assert [event["event_id"] for event in service.client().wait(since="earliest", timeout=0)["events"]] == kept


def test_the_log_takes_no_more_than_a_tenth_of_what_may_be_stored(make_service: Callable[..., Service]) -> None:
    service = make_service("--storage-limit-mb", "40")
    before = (service.storage / LOG).stat().st_size
    service.client().publish()
    assert before < (service.storage / LOG).stat().st_size < LOG_BYTES / 4


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a service that was killed when much of what it had answered was in the log alone."""
    folder = tmp_path_factory.mktemp("killed")
    service = Service(make_repository(folder / "repository"), folder / "storage").start()
    client = service.client()
    for number in range(12):
        client.publish("noted", {"number": number, "load": "x" * 9000})
        client.store(issue=f"issue-{number}")
    service.kill()
    return service.storage


@pytest.fixture
def log(killed: Path, tmp_path: Path) -> Path:
    """The log of a copy of that storage, without the zeros behind what it holds."""
    shutil.copytree(killed, tmp_path / "state")
    log = tmp_path / "state" / f"{Storage.FILE}-wal"
    os.truncate(log, end_of_frames(log))
    return log


def overwrite(path: Path, at: float, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * at))
        file.write(content)


DAMAGE = {
    "a bit in the middle": lambda log: overwrite(log, 0.5, b"\xaa"),
    "a bit in the middle, with zeros at the end": lambda log: (
        overwrite(log, 0.5, b"\xaa"),
        os.truncate(log, LOG_BYTES),
    ),
    "cut in the middle, with zeros at the end": lambda log: (
        os.truncate(log, log.stat().st_size // 2),
        os.truncate(log, LOG_BYTES),
    ),
    "a page near the beginning": lambda log: overwrite(log, 0.2, b"\xff" * 4096),
    "its head": lambda log: overwrite(log, 0, b"\0" * 32),
    "cut in the middle": lambda log: os.truncate(log, log.stat().st_size // 2),
    "cut by one frame": lambda log: os.truncate(log, log.stat().st_size - 4120),
    "emptied": lambda log: os.truncate(log, 0),
    "deleted": lambda log: log.unlink(),
    "somebody's text": lambda log: log.write_text("notes\n" * 100),
}


def index_of(log: Path) -> Path:
    return log.with_name(f"{Storage.FILE}-shm")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_log_stops_the_start_and_is_left_as_it_is(tmp_path: Path, log: Path, damage: str) -> None:
    DAMAGE[damage](log)
    before = {path: path.read_bytes() for path in log.parent.glob(f"{Storage.FILE}*")}
    with pytest.raises(StartError, match=r"damaged.*left as it is.* doctor --salvage --storage="):
        opened(tmp_path).start()
    assert {path: path.read_bytes() for path in log.parent.glob(f"{Storage.FILE}*")} == before


@pytest.mark.parametrize(
    "damage",
    [
        "a bit in the middle",
        "a bit in the middle, with zeros at the end",
        "a page near the beginning",
        "somebody's text",
    ],
)
def test_a_damaged_log_is_known_without_its_index_too(tmp_path: Path, log: Path, damage: str) -> None:
    index_of(log).unlink()
    DAMAGE[damage](log)
    with pytest.raises(StartError, match="damaged"):
        opened(tmp_path).start()


def half_a_frame_more(log: Path) -> None:
    """As a kill leaves it in the midst of a write."""
    content = log.read_bytes()
    log.write_bytes(content + content[-4120:-2000])


def a_last_commit_that_is_torn(log: Path) -> None:
    """As a loss of power may leave it: nobody was answered yet."""
    index_of(log).unlink()
    overwrite(log, 1 - 10 / log.stat().st_size, b"\xff" * 10)


@pytest.mark.parametrize("crash", [
    lambda log: None, lambda log: os.truncate(log, LOG_BYTES), half_a_frame_more, a_last_commit_that_is_torn, lambda log: index_of(log).unlink(),
    lambda log: index_of(log).write_bytes(b"\xff" * 32768),
])  # fmt: skip
def test_a_log_as_a_crash_leaves_it_does_not_stop_the_start(
    tmp_path: Path, log: Path, crash: Callable[[Path], None]
) -> None:
    crash(log)

    async def scene(storage: Storage) -> int:
        return len(storage.read.events(PROJECT, 0, 100, 100, "*", None))

    assert with_storage(tmp_path, scene) >= 22


# -- what is forgotten


@pytest.mark.parametrize(("days", "kept"), [(31, False), (400, False), (29, True), (0, True)])
def test_a_position_that_nobody_touched_for_30_days_is_forgotten(tmp_path: Path, days: int, kept: bool) -> None:
    key = ("p", "reader", "noted", "")

    async def scene(storage: Storage) -> int | None:
        moved = time.time() - days * 86_400
        for number in range(450):  # more than a step
            await storage.write(lambda records, n=number: records.move_position("p", f"r{n}", "t", "", 1))
        await storage.write(lambda records: records.move_position(*key, 5))
        await storage.write(lambda records: records.change("update position set moved = ?", moved))
        while await storage.write(storage._sweep):
            pass
        found = storage.read.one("select count(*) from position")
        assert found == (451 if kept else 0)
        return storage.read.position(*key)

    assert with_storage(tmp_path, scene) == (5 if kept else -1)


# -- what must not grow with history


def statements(scene: Callable[[cco_sidecar.Records], Any]) -> list[str]:
    """How SQLite carries out what ``scene`` reads."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(
            cco_sidecar.SCHEMA + plugin("indexes").INDEXES + plugin("_limit").ForgettingRecords.INDEX
        )
        plans: list[str] = []

        class Explained(cco_sidecar.Records):
            def rows(self, sql: str, *values: Any) -> list[Any]:
                plans.extend(row[3] for row in database.execute(f"explain query plan {sql}", values))
                return []

            portion = rows

            def one(self, sql: str, *values: Any) -> None:
                self.rows(sql, *values)

        scene(Explained(database))
    return plans


@pytest.mark.parametrize("name", ["guard", "indexes", "repeats"])
def test_what_a_plugin_has_in_the_database_is_made_once_by_who_writes(tmp_path: Path, name: str) -> None:
    path, part = tmp_path / "x.db", plugin(name).part_class(Records)
    writer = cco_sidecar.open_database(path)
    with contextlib.closing(writer), contextlib.closing(cco_sidecar.connect_database(path, read_only=True)) as reader:
        facts = "select group_concat(name), (select schema_version from pragma_schema_version) from sqlite_master"
        before = reader.execute(facts).fetchone()[:]
        part(reader)
        assert reader.execute(facts).fetchone()[:] == before
        part(writer)
        made = reader.execute(facts).fetchone()[:]
        assert made[0] != before[0]
        for again in (writer, reader):
            part(again)
        assert reader.execute(facts).fetchone()[:] == made


event_list, result_list, pages = plugin("event_list"), plugin("result_list"), plugin("_pages")
latest_result = plugin("_latest").latest_result


def page(read: Records, table: str, **equal: str | list[str] | None) -> Any:
    """The newest of a list."""
    select = read.AGENTS if table == "agent" else "select id, body from result"
    return pages.page(read, table, select, "p", result_list.ResultQuery(limit=9), equal)


READS = {
    "events": lambda read: read.events("p", 0, 9, 9, "*", None),
    "events of a type": lambda read: read.events("p", 0, 9, 9, "t", None),
    "events, newest": lambda read: event_list.step(read, "p", event_list.EventQuery(), 0, 9, 9),
    "events of a type, newest": lambda read: event_list.step(read, "p", event_list.EventQuery(type="t"), 0, 9, 9),
    "events of an issue": lambda read: read.events("p", 0, 9, 9, "*", "i"),
    "events with some bytes": lambda read: pages.events_with(read, b"x", "p", 0, 9, 9, "*"),
    "events of a type with some bytes": lambda read: pages.events_with(read, b"x", "p", 0, 9, 9, "t"),
    "dead letters": lambda read: event_list.step(read, "p", event_list.EventQuery(dead=True), 0, 9, 9),
    "undelivered": lambda read: read.number("undelivered:p"),
    "how many results": lambda read: read.number("results:p"),
    "results": lambda read: page(read, "result"),
    "results of a type": lambda read: page(read, "result", agent_type="t"),
    "results of a status": lambda read: page(read, "result", status="failed"),
    "results of an issue": lambda read: page(read, "result", issue="i", status="failed"),
    "what routing looks at": lambda read: read.issue_facts("p", "i", 9),
    "the last coder": lambda read: read.rows(plugin("proposals").LAST_OF_A_CODER, "p", "i"),
    "outputs": lambda read: read.issue_outputs("p", "i", 9),
    "the newest result": lambda read: read.newest_result("p", "i"),
    "an agent's result": lambda read: latest_result(read, "p", "a"),
    "an agent's success": lambda read: read.one(plugin("keeper").SUCCESS, "p", "a", 0),
    "agents": lambda read: page(read, "agent"),
    "agents of a type": lambda read: page(read, "agent", type="t"),
    "agents of an issue": lambda read: page(read, "agent", issue="i"),
}


@pytest.mark.parametrize("read", READS)
def test_what_is_asked_often_is_read_in_order_from_an_index_and_nothing_is_sorted(read: str) -> None:
    plans = statements(READS[read])
    named = re.compile(
        r"LIST SUBQUERY|SCAN json_each|REUSE LIST|CREATE BLOOM FILTER|MERGE|LEFT$|RIGHT$"
    )  # a page's rows, one by one
    plans = [plan for plan in plans if not named.match(plan)]
    assert plans and not [plan for plan in plans if plan.startswith("SCAN") or "TEMP B-TREE" in plan], plans
    assert all("(" in plan for plan in plans), plans  # each begins at a key


LARGE = {  # what is read after and up to a number
    "events": lambda read, after, upto: read.events("p", after, upto, 100, "*", None),
    "events of an issue": lambda read, after, upto: read.events("p", after, upto, 100, "*", "i"),
    "events with some bytes": lambda read, after, upto: pages.events_with(read, b"yyy", "p", after, upto, 100, "t"),
    "a list": lambda read, after, upto: event_list.step(
        read, "p", event_list.EventQuery(since="earliest"), after, upto, 100
    ),
}


@pytest.mark.parametrize("kind", LARGE)
def test_large_events_are_read_by_portions_and_none_is_left_out(tmp_path: Path, kind: str) -> None:
    issues = ("i", ["i", "j"], ["j", "i"])

    async def scene(storage: Storage) -> list[list[Any]]:
        for number in range(30):
            data = {"issue_id": issues[number % 3], "text": "y" * MB}
            event = new_event("p", "t", {"publisher": "me", "topic": "t", "data": data})
            await storage.write(lambda records, event=event: records.insert_event(event))
        portions, after = [], 0
        while rows := LARGE[kind](storage.read, after, 30):
            portions.append([(row["seq"], len(row["body"])) for row in rows])
            after = rows[-1]["seq"]
        return portions

    portions = with_storage(tmp_path, scene)
    assert [seq for portion in portions for seq, _ in portion] == list(range(1, 31))
    assert all(sum(size for _, size in portion[:-1]) <= PAGE_BYTES for portion in portions)


def test_numbers_that_are_kept_are_those_that_counting_gives(make_service: Callable[..., Service]) -> None:
    service = make_service()
    client = service.client()

    def counted() -> dict[str, int]:
        with contextlib.closing(sqlite3.connect(service.storage / Storage.FILE)) as database:
            asked = {
                "queue_depth": "select count(*) from event where delivered = 0",
                "results_stored": "select count(*) from result",
                "dead_letter_queue_size": "select count(*) from dead_letter",
            }
            return {name: database.execute(sql).fetchone()[0] for name, sql in asked.items()}

    def told() -> dict[str, int]:
        answer = client.get("/status").json()
        found = answer["storage"] | answer["events"]
        return {name: found[name] for name in ("queue_depth", "results_stored", "dead_letter_queue_size")}

    for number in range(6):
        client.publish("kept", {"number": number})
        client.store(issue=f"issue-{number % 2}")
    for _ in range(6):
        client.publish("short", ttl_seconds=5)
    assert told() == counted() == {"queue_depth": 18, "results_stored": 6, "dead_letter_queue_size": 0}
    client.wait("kept", timeout=0, limit=4)
    client.wait("kept", timeout=0, since="earliest")  # some of them a second time
    until(lambda: told()["dead_letter_queue_size"] == 6)
    assert told() == counted() == {"queue_depth": 6, "results_stored": 6, "dead_letter_queue_size": 6}
    assert healthy(service)[1]["checks"]["event_queue_size"] == 6
    with contextlib.closing(sqlite3.connect(service.storage / Storage.FILE)) as database, database:
        database.execute("update meta set value = '77' where name like 'results:%'")
    service.stop()
    service.start()
    client = service.client()
    assert told() == counted()


def test_a_context_and_routing_look_at_the_newest_of_an_issues_results(make_service: Callable[..., Service]) -> None:
    service = make_service()
    client = service.client()
    client.store("go-specialist")
    service.stop()
    with contextlib.closing(sqlite3.connect(service.storage / Storage.FILE)) as database, database:
        copied = "project, issue, 'test-engineer', agent_id, 'qa', status, stored, '[]'"
        database.execute(
            "with recursive n(i) as (select 1 union all select i + 1 from n where i < 1500)"
            f" insert into result select null, 'r-' || i, {copied}, json_set(output, '$.result_id', 'r-' || i), body"
            " from result, n"
        )
    service.start()
    client = service.client()
    outputs = client.get("/api/context/issue-1/python-specialist").json()["context"]["previous_agent_outputs"]
    assert [output["result_id"] for output in outputs] == [f"r-{number}" for number in range(1301, 1501)]
    proposed = client.store("test-engineer", "failed")["next_agents"]
    assert [item["agent_type"] for item in proposed] == ["go-specialist"]  # the coder of 1,500 results before


# -- the writer


def count_commits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    commits: list[int] = []
    commit = Records.commit

    def counted(records: Records) -> None:
        commits.append(1)
        commit(records)

    monkeypatch.setattr(Records, "commit", counted)
    return commits


def test_writes_at_the_same_time_share_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = count_commits(monkeypatch)

    async def scene(storage: Storage) -> list[str | None]:
        jobs = [storage.write(lambda records, n=number: records.set_meta(f"key-{n}", str(n))) for number in range(500)]
        await asyncio.gather(*jobs)
        return [storage.read.meta(f"key-{number}") for number in range(500)]

    assert with_storage(tmp_path, scene) == [str(number) for number in range(500)]
    assert 2 <= len(commits) <= 50


def test_a_job_that_raises_is_rolled_back_alone(tmp_path: Path) -> None:
    def failing(records: Records) -> None:
        records.set_meta("bad", "written and taken back")
        raise ValueError("no")

    async def scene(storage: Storage) -> tuple[list[Any], list[str | None]]:
        blocked = threading.Event()
        storage.write_behind(lambda records: blocked.wait(30))  # so that the next three wait together
        jobs = [storage.write(lambda records: records.set_meta("a", "1")), storage.write(failing)]
        jobs.append(storage.write(lambda records: records.set_meta("b", "2")))
        blocked.set()
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        return outcomes, [storage.read.meta(name) for name in ("a", "bad", "b")]

    outcomes, kept = with_storage(tmp_path, scene)
    assert [type(outcome) for outcome in outcomes] == [int, ValueError, int]
    assert kept == ["1", None, "2"]


def test_a_commit_that_fails_is_told_to_its_writers_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(storage: Storage) -> tuple[Any, list[str | None]]:
        with monkeypatch.context() as patch:

            def full(records: Records) -> None:
                raise sqlite3.OperationalError("database or disk is full")

            patch.setattr(Records, "commit", full)
            outcomes = await asyncio.gather(
                storage.write(lambda records: records.set_meta("lost", "1")), return_exceptions=True
            )
        await storage.write(lambda records: records.set_meta("kept", "1"))
        return outcomes[0], [storage.read.meta("lost"), storage.read.meta("kept")]

    outcome, kept = with_storage(tmp_path, scene)
    assert isinstance(outcome, StorageError) and kept == [None, "1"]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("others", [0, 1, 5])
def test_a_rollback_that_fails_ends_no_later_write(tmp_path: Path, others: int, alone: bool) -> None:
    def failing(records: Records) -> None:
        records.set_meta("bad", "written and taken back")
        raise ValueError("no")

    async def scene(storage: Storage) -> tuple[list[Any], list[str | None]]:
        rollback, faults = storage._writer.rollback, [sqlite3.OperationalError("disk I/O error")]

        def faulty() -> None:
            if faults:
                raise faults.pop()
            rollback()

        storage._writer.rollback = faulty
        jobs = [storage.write(lambda records: records.set_meta("other", "1")) for _ in range(others)]
        async with asyncio.timeout(10):
            outcomes = await asyncio.gather(storage.write(failing), *jobs, return_exceptions=True)
            with contextlib.suppress(StorageError):  # the one that found the transaction still open
                await storage.write(lambda records: records.set_meta("next", "1"))
            await storage.write(lambda records: records.set_meta("last", "1"))
        assert not faults
        return outcomes, [storage.read.meta(name) for name in ("bad", "last")]

    outcomes, kept = with_storage(tmp_path, scene, alone)
    assert isinstance(outcomes[0], (ValueError, StorageError)) and kept == [None, "1"]


@pytest.mark.parametrize("alone", [True, False])
def test_a_job_that_outlasts_the_close_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    go = threading.Event()

    def slow(records: Records) -> None:
        go.wait(10)
        records.set_meta("late", "1")

    async def scene(storage: Storage) -> None:
        join = storage._thread.join
        with monkeypatch.context() as patch:
            patch.setattr(storage._thread, "join", lambda seconds: join(0.1))
            storage.write_behind(slow)
            storage.close()
        assert storage._thread.is_alive()
        go.set()
        join(10)

    with_storage(tmp_path, scene, alone)
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / Storage.FILE)) as database:
        assert database.execute("select value from meta where name = 'late'").fetchall() == [("1",)]


def test_committed_events_are_told_in_order_before_their_writers_are_answered_and_those_taken_back_never(
    tmp_path: Path,
) -> None:
    def name_of(event: NewEvent) -> str:
        return str(event.envelope["data"]["name"])

    async def scene(storage: Storage) -> list[str]:
        said: list[str] = []
        storage.observer = lambda event, seq: said.append(f"told {name_of(event)} {seq}")

        async def write(*names: str, fails: bool = False) -> None:
            def insert(records: Records) -> None:
                for name in names:
                    records.insert_event(
                        new_event("p", "noted", {"publisher": "me", "topic": "t", "data": {"name": name}})
                    )
                if fails:
                    raise ValueError

            with contextlib.suppress(ValueError):
                await storage.write(insert)
            said.append(f"answered {' '.join(names)}")

        await asyncio.gather(write("a", "b"), write("c", fails=True), write("d"))
        assert storage.read.head() == 3 and len(storage.read.events("p", 0, 3, 10, "*", None)) == 3
        return said

    said = with_storage(tmp_path, scene)
    assert [line for line in said if line.startswith("told")] == ["told a 1", "told b 2", "told d 3"]
    assert said.index("told b 2") < said.index("answered a b") and said.index("told d 3") < said.index("answered d")


@pytest.mark.parametrize("alone", [True, False])
def test_what_is_queued_is_written_before_the_storage_closes(tmp_path: Path, alone: bool) -> None:
    async def fill(storage: Storage) -> None:
        for number in range(1000):
            storage.write_behind(lambda records, n=number: records.set_meta("last", str(n)))

    async def look(storage: Storage) -> str | None:
        return storage.read.meta("last")

    with_storage(tmp_path, fill, alone)
    assert with_storage(tmp_path, look, alone) == "999"


@pytest.mark.parametrize("raised", [None, ValueError, SystemExit])
def test_a_thread_that_waits_keeps_nothing_of_what_it_did(raised: type[BaseException] | None) -> None:
    class Large:
        def work(self) -> None:
            threads.append(threading.current_thread())
            if raised:
                raise raised

    def is_forgotten() -> bool:
        large = Large()
        known = weakref.ref(large)
        with contextlib.suppress(raised or ()):
            cco_sidecar.in_thread("kept", large.work).result(5)
        del large
        gc.collect()  # what was raised holds the frames that it went through
        return known() is None and threads[-1].is_alive()

    threads: list[threading.Thread] = []
    until(is_forgotten)


def test_reading_connections_cannot_write(tmp_path: Path) -> None:
    async def scene(storage: Storage) -> None:
        with pytest.raises(StorageError, match="readonly"):
            storage.read.set_meta("x", "y")

    with_storage(tmp_path, scene)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not tell which files are open")
@pytest.mark.parametrize("change", ["mark_delivered", "remove_events", "a statement of its own"])
def test_a_large_change_leaves_no_part_of_the_storage_in_the_systems_folder(tmp_path: Path, change: str) -> None:
    def job(records: Records) -> list[str]:
        event = new_event("p", "t", {"publisher": "p", "topic": "t", "data": {"text": "x" * 500, "issue_id": "i"}})
        seqs = [records.insert_event(event) for _ in range(500)]
        if change == "mark_delivered":
            records.mark_delivered(seqs, 1)
        elif change == "remove_events":
            records.remove_events(seqs, 10)
        else:
            assert records.change("update event set project = 'q', issue = 'j', expires = 1").rowcount == 500
        opened = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
        return [path for path in opened if "etilqs" in path]  # SQLite's name for a file of its own

    async def scene(storage: Storage) -> list[str]:
        found: list[str] = await storage.write(job)
        return found

    assert with_storage(tmp_path, scene) == []


def test_of_results_that_are_committed_together_the_last_one_of_each_type_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    place = ResultFiles.place

    def noted(files: ResultFiles) -> None:
        written.extend(path.name for path in (tmp_path / "state/results/.new").glob("*"))
        place(files)

    def insert(records: Records, number: int, agent_type: str) -> None:
        texts = dict.fromkeys(("agent_id", "category", "status", "proposed", "output"), "")
        row = {"id": f"r-{number}", "project": "p", "issue": "i", "agent_type": agent_type, "stored": 0.0, **texts}
        records.insert("result", row | {"body": b"%d" % number})
        if number == 4:
            raise ValueError("this one is not stored")

    async def scene(storage: Storage) -> list[str]:
        monkeypatch.setattr(ResultFiles, "place", noted)
        begun, blocked = threading.Event(), threading.Event()
        holding = storage.write(lambda records: (begun.set(), blocked.wait(30)))
        await asyncio.to_thread(begun.wait, 30)  # so that the next ones wait together
        kinds = ("coder", "coder", "tester", "coder")
        jobs = [storage.write(lambda records, n=n, kind=kind: insert(records, n, kind)) for n, kind in enumerate(kinds)]
        blocked.set()
        await asyncio.gather(holding, *jobs)
        with pytest.raises(ValueError, match="not stored"):
            await storage.write(lambda records: insert(records, 4, "coder"))
        return [path.read_text() for path in sorted((tmp_path / "state/results").rglob("*.json"))]

    assert with_storage(tmp_path, scene) == ["3", "2"] and sorted(written) == ["r-2", "r-3"]
    assert [path.name for path in (tmp_path / "state/results/.new").iterdir()] == []


def test_the_log_of_many_sidecars_knows_each_method_that_changes_something() -> None:
    classes = (Records, plugin("guard").ForgettingRecords, plugin("repeats").AnswerRecords)
    found = [item for each in classes for item in vars(each).items()]
    methods = {name: inspect.getsource(method) for name, method in found if inspect.isfunction(method)}
    changing = {name for name, source in methods.items() if re.search(r"self\.(change|insert)\(", source)}
    assert changing == set(plugin("_replica").CHANGING)


def test_what_another_service_has_done_meanwhile_is_not_done_again(tmp_path: Path) -> None:
    from cco_sidecar_plugins.http.repeats import IdempotencyTicket

    claims: Any = types.SimpleNamespace(project_id=PROJECT, sub="s")

    async def scene(storage: Storage) -> list[Any]:
        async def work(found: str, elsewhere: bool = False) -> Any:
            if elsewhere:
                there = IdempotencyTicket(storage, claims, "POST /x", "key", b"body")
                await storage.write(lambda records: there._remember(records, {"found": "there"}))
            return await storage.write(lambda records: {"found": found}, answers=True)

        tickets = [IdempotencyTicket(storage, claims, "POST /x", key, b"body") for key in ("key", "key", "other")]
        done = [await tickets[0].once(functools.partial(work, "here", elsewhere=True))]
        done += [await tickets[1].once(functools.partial(work, "again")), await tickets[2].once(lambda: work("new"))]
        return done

    there = (None, b'{"found":"there"}')
    assert with_storage(tmp_path, scene) == [there, there, ({"found": "new"}, None)]


def test_what_comes_together_is_done_in_order_and_in_portions() -> None:
    async def scene() -> tuple[list[int], list[int]]:
        turns, done, sizes = Turns(), list[int](), list[int]()
        for number in range(3 * Turns.AT_ONCE):
            turns.do(functools.partial(done.append, number))
        while len(done) < 3 * Turns.AT_ONCE:
            sizes.append(len(done))
            await asyncio.sleep(0)
        turns.do(functools.partial(done.append, -1))
        return done, sizes

    done, sizes = asyncio.run(scene())
    assert done[: 3 * Turns.AT_ONCE] == list(range(3 * Turns.AT_ONCE))
    assert sizes[0] == Turns.AT_ONCE and max(b - a for a, b in itertools.pairwise(sizes)) <= Turns.AT_ONCE


@pytest.mark.parametrize("of", ["the project's language", "the issues that are written down", "the service's health"])
def test_what_many_ask_for_at_the_same_time_is_looked_for_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, of: str
) -> None:
    looks, go_on = list[int](), threading.Event()

    def look(*_: Any) -> Any:
        looks.append(len(looks))
        assert go_on.wait(20)
        if len(looks) == 1:
            raise OSError("the first look fails")
        return {"the project's language": "rust", "the issues that are written down": []}.get(of, WELL)

    monkeypatch.setattr(plugin("proposals"), "project_type", look)
    monkeypatch.setattr(plugin("stories"), "written_issues", look)
    settings, health = load_settings({"root": str(tmp_path)}, {}), plugin("ready").SharedChecks(60)
    results = plugin("proposals").ProposingResults(None, None, None, None, settings)
    stories = plugin("stories").Stories(types.SimpleNamespace(settings=settings, hooks=None, metrics=Metrics()))
    ask = {
        "the project's language": lambda: results.prepared({"result": "done"}),
        "the issues that are written down": stories.written,
        "the service's health": lambda: health.get(lambda: asyncio.to_thread(look)),
    }[of]

    async def scene() -> list[Any]:
        asking = [asyncio.create_task(ask()) for _ in range(5)]
        await asyncio.to_thread(until, lambda: looks)
        asking[0].cancel()  # the client of the one who looks hangs up
        go_on.set()
        failed = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(error) for error in failed] == [asyncio.CancelledError, *[OSError] * 4]
        found = await asyncio.gather(*(ask() for _ in range(5)))
        return [*found, await ask()]

    first, *others = asyncio.run(scene())
    assert others == [first] * 5 and first in (({"result": "done"}, "rust"), {}, WELL)
    assert looks == [0, 1]


WELL = {"storage": "healthy", "event_bus": "healthy"}


def test_a_crowd_that_events_wake_shares_one_search_in_portions_and_misses_no_event(tmp_path: Path) -> None:
    woken: list[int | None] = []
    searches: list[Any] = []

    class Counting(EventBus):
        async def search(self, *asked: Any) -> Any:
            searches.append(asked)
            return await super().search(*asked)

        def wake(self, parked: Iterable[asyncio.Future[int | None]], seq: int | None) -> None:
            woken.extend(seq for _ in parked)
            super().wake(parked, seq)

    class Bus(plugin("crowds").CrowdedBus, Counting):  # type: ignore[misc]
        PORTION = 7
        SHARED_SECONDS = 60.0

    async def scene(storage: Storage) -> list[list[int]]:
        bus = Bus(storage, load_settings({"root": str(tmp_path), "storage": str(tmp_path)}, {}), Hooks([]))
        claims = [
            Claims(sub=f"reader-{n}", agent_type="t", project_id="p", permissions=[], exp=0, iat=0) for n in range(30)
        ]
        polls = [asyncio.ensure_future(bus.wait(reader, "noted", WaitQuery(60_000), HangUp())) for reader in claims]
        while bus.statistics()["active_subscriptions"] < 30:
            await asyncio.sleep(0)
        assert len(searches) == 1
        bodies = [
            {"publisher": "me", "topic": "t", "data": {"n": n, "text": "x" * (n == 2) * 20_000}} for n in range(4)
        ]
        publishing = asyncio.gather(*(bus.publish("p", "noted", body) for body in bodies[:2]))
        done = [0]
        while done[-1] < 30:
            await asyncio.sleep(0)
            done.append(sum(poll.done() for poll in polls))
        assert max(after - before for before, after in itertools.pairwise(done)) == 7
        assert len(woken) == 30 and (await publishing)[0]["subscriber_count"] == 30
        first = await asyncio.gather(*polls)
        assert len({id(poll.rows) for poll in first}) == 1
        for poll in first:
            bus.answered(poll)
        for body in bodies[2:]:
            await bus.publish("p", "noted", body)
        second = [await bus.wait(reader, "noted", WaitQuery(0), HangUp()) for reader in claims]
        return [[json.loads(row["body"])["data"]["n"] for row in poll.rows] for poll in first + second]

    assert with_storage(tmp_path, scene) == [[0, 1]] * 30 + [[2, 3]] * 30


@pytest.mark.parametrize(
    ("position", "before", "during", "is_told"),
    [(2, 0, 5, True), (4, 3, 6, True), (2, 3, 6, True), (2, 3, 3, True), (4, 0, 3, False)],
)
def test_a_poll_tells_of_what_is_removed_between_its_beginning_and_its_search(
    tmp_path: Path, position: int, before: int, during: int, is_told: bool
) -> None:
    async def remove(storage: Storage, upto: int) -> None:
        storage.floor = upto
        await storage.write(lambda records: records.remove_events(list(range(1, upto + 1)), 0))

    class Late(EventBus):
        removing = False

        async def search(self, *asked: Any) -> Any:
            if self.removing:
                await remove(self._storage, during)
            return await super().search(*asked)

    class Bus(plugin("_limit").TellingBus, Late):  # type: ignore[misc]
        pass

    async def scene(storage: Storage) -> Any:
        bus = Bus(storage, load_settings({"root": str(tmp_path), "storage": str(tmp_path)}, {}), Hooks([]))
        reader = Claims(sub="r", agent_type="t", project_id="p", permissions=[], exp=0, iat=0)
        for number in range(1, 9):
            await bus.publish("p", "noted", {"publisher": "me", "topic": "t", "data": {}})
            if number == position:
                bus.answered(await bus.wait(reader, "noted", WaitQuery(0), HangUp()))
        await remove(storage, before)
        Late.removing = True
        answer = json.loads((await bus.wait(reader, "noted", WaitQuery(0), HangUp())).content)
        assert len(answer["events"]) == 8 - max(position, before, during)
        return answer.get("missed"), {"position": bus.event_id(position), "floor": bus.event_id(max(before, during))}

    missed, expected = with_storage(tmp_path, scene)
    assert missed == (expected if is_told else None)


def test_garbage_is_seldom_searched_for_while_a_crowd_waits_and_in_small_parts(tmp_path: Path) -> None:
    searched: list[int] = []

    def note(phase: str, facts: dict[str, int]) -> None:
        if phase == "start" and facts["generation"] == 1:
            searched.append(len(gc.get_objects(0)) + len(gc.get_objects(1)))

    async def scene(storage: Storage) -> int:
        bus = plugin("crowds").CrowdedBus(
            storage, load_settings({"root": str(tmp_path), "storage": str(tmp_path)}, {}), Hooks([])
        )
        claims = Claims(sub="reader", agent_type="t", project_id="p", permissions=[], exp=0, iat=0)
        gc.collect()
        before = gc.get_stats()[0]["collections"]
        polls = [asyncio.ensure_future(bus.wait(claims, "noted", WaitQuery(60_000), HangUp())) for _ in range(500)]
        while bus.statistics()["active_subscriptions"] < 500:
            await asyncio.sleep(0)
        await bus.publish("p", "noted", {"publisher": "me", "topic": "t", "data": {}})
        await asyncio.gather(*polls)
        return int(gc.get_stats()[0]["collections"] - before)

    usual = gc.get_threshold()
    gc.callbacks.append(note)
    try:
        assert with_storage(tmp_path, scene) <= 4
        kept: list[list[int]] = [[] for _ in range(150_000)]
        assert kept and 0 < max(searched) < 25_000
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*usual)


@pytest.mark.parametrize("base", [Storage, plugin("guard").GuardedStorage])
def test_what_has_expired_is_removed_also_after_a_fault(tmp_path: Path, base: type[Storage]) -> None:
    class Faulty(base):  # type: ignore[misc, valid-type]
        SWEEP_SECONDS, faults = 0.01, 0

        def _sweep(self, records: Records) -> bool:
            self.faults += 1
            if self.faults == 1:
                raise TypeError("a plugin's")
            return bool(super()._sweep(records))

    async def scene() -> int:
        settings = load_settings({"root": str(tmp_path), "storage": str(tmp_path)}, {})
        storage = Faulty(settings, plugin("guard").part_class(Records))
        storage.start()
        try:
            body = {"publisher": "me", "topic": "t", "data": {}, "ttl_seconds": 0.01}
            await storage.write(lambda records: records.insert_event(new_event("p", "brief", body)))
            async with asyncio.timeout(20):
                while not storage.read.count_dead_letters("p"):
                    await asyncio.sleep(0.01)
            return int(storage.faults)
        finally:
            storage.close()

    assert asyncio.run(scene()) > 1


def test_a_look_that_fails_after_all_who_asked_have_gone_is_no_error_of_the_loop() -> None:
    async def ask() -> None:
        loop, shared = asyncio.get_running_loop(), plugin("_turns").Shared(60)
        loop.set_exception_handler(lambda _, context: told.append(context["message"]))
        looking, begun = loop.create_future(), asyncio.Event()

        async def look() -> None:
            begun.set()
            await looking

        asker = asyncio.create_task(shared.get(look))
        await begun.wait()
        asker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asker
        looking.set_exception(ValueError("it is gone"))
        await asyncio.wait([shared._found])

    told: list[str] = []
    asyncio.run(ask())
    gc.collect()
    assert told == []


def test_who_polls_without_end_leaves_others_their_turns(tmp_path: Path) -> None:
    class Bus(plugin("crowds").CrowdedBus):  # type: ignore[misc]
        REST_SECONDS = 0.5

    async def scene(storage: Storage) -> list[float]:
        bus = Bus(storage, load_settings({"root": str(tmp_path), "storage": str(tmp_path)}, {}), Hooks([]))
        await bus.publish("p", "noted", {"publisher": "me", "topic": "t", "data": {}})
        reader = Claims(sub="r", agent_type="t", project_id="p", permissions=[], exp=0, iat=0)
        times = [time.monotonic()]
        for event_type in ("noted", "nothing"):
            await bus.wait(reader, event_type, WaitQuery(0), HangUp())
            times.append(time.monotonic())
        return [after - before for before, after in itertools.pairwise(times)]

    found, nothing = with_storage(tmp_path, scene)
    assert found < Bus.REST_SECONDS <= nothing


def test_what_retention_removed_before_is_gone_for_the_file_alone_too(tmp_path: Path) -> None:
    said, state = {"publisher": "me", "topic": "t"}, tmp_path / "state"
    state.mkdir()
    with contextlib.closing(Records(cco_sidecar.open_database(state / Storage.FILE))) as records:
        seqs = [records.insert_event(new_event("p", "noted", {**said, "data": {"n": n}})) for n in range(6)]
        records.remove_events(seqs[:4], 100)
        records.set_meta("floor", str(seqs[3]))
        records.move_position("p", "late", "noted", "", seqs[1])

    async def scene(storage: Storage) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        bus = EventBus(storage, load_settings({"root": str(tmp_path), "storage": str(tmp_path)}, {}), Hooks([]))
        late = Claims(sub="late", agent_type="t", project_id="p", permissions=[], exp=0, iat=0)
        polls = [await bus.wait(late, "noted", WaitQuery(0, since=since), HangUp()) for since in ("earliest", "")]
        with pytest.raises(ApiError) as refused:
            await bus.wait(late, "noted", WaitQuery(0, since=bus.event_id(3)), HangUp())
        return [json.loads(poll.content) for poll in polls], {"code": refused.value.code, **refused.value.details}

    answers, refused = with_storage(tmp_path, scene, alone=True)
    assert [[event["data"]["n"] for event in answer["events"]] for answer in answers] == [[4, 5]] * 2
    assert (refused["code"], refused["reason"], refused["floor"][-2:]) == ("EVT_003", "retention", "04")


# -- results


def completed(client: Client, issue: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.wait(
        "agent_completed", filter=f"issue_id:{issue}", since="earliest", timeout=0
    )["events"]
    return found


@pytest.mark.any_storage
def test_a_result_its_event_its_routing_and_its_file_say_the_same(
    service: Service, architect: Client, issue: str
) -> None:
    body = body_of(
        issue, decisions=["Use a lock"], files_created=["a.py", {"path": "b.py", "size": 3}], unknown={"kept": [1]}
    ) | {"extra": "kept"}
    answer = architect.post("/api/results", body)
    assert answer.status_code == 201
    stored = answer.json()
    assert stored["stored"] is True and stored["event_published"] is True
    record = architect.get(f"/api/results/{stored['id']}").json()
    assert record == body | {"id": stored["id"], "stored_at": record["stored_at"]}
    path = service.storage / "results" / PROJECT / issue / "python-specialist.json"
    assert stored["storage_path"] == str(path) and json.loads(path.read_text()) == record
    (event,) = completed(architect, issue)
    assert (event["event_id"], event["topic"], event["publisher"]) == (
        stored["event_id"],
        "implementation",
        body["agent_id"],
    )
    assert event["data"] == {
        "issue_id": issue, "agent_type": "python-specialist", "status": "success", "result_id": stored["id"],
        "next_agents": stored["next_agents"],
    }  # fmt: skip
    assert [item["agent_type"] for item in stored["next_agents"]] == ["test-engineer", "security-auditor"]


def test_the_ids_of_results_are_in_the_order_of_their_storing_so_that_their_index_grows_at_its_end(
    architect: Client, issue: str
) -> None:
    ids = [architect.post("/api/results", body_of(issue)).json()["id"] for _ in range(5)]
    assert ids == sorted(set(ids))


@pytest.mark.any_storage
def test_a_result_whose_file_cannot_be_written_leaves_neither_result_nor_event(
    service: Service, architect: Client, issue: str
) -> None:
    path = service.storage / "results" / PROJECT / issue
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")
    before = architect.get("/status").json()
    answer = architect.request(
        "POST", "/api/results", json=body_of(issue), headers={"Idempotency-Key": f"blocked-{issue}"}
    )
    assert (answer.status_code, answer.json()["code"]) == (500, "STR_001")
    assert str(service.storage) not in answer.text
    assert architect.get("/api/results", issue_id=issue).json()["results"] == [] and completed(architect, issue) == []
    after = architect.get("/status").json()
    assert after["storage"]["results_stored"] == before["storage"]["results_stored"]
    assert after["events"]["total_published"] == before["events"]["total_published"]

    path.unlink()  # a failure is not remembered: the same key may try again
    again = architect.request(
        "POST", "/api/results", json=body_of(issue), headers={"Idempotency-Key": f"blocked-{issue}"}
    )
    assert again.status_code == 201 and "Idempotent-Replay" not in again.headers
    assert len(completed(architect, issue)) == 1


@pytest.mark.any_storage
def test_the_file_holds_the_latest_record_whole_at_every_moment_and_earlier_ones_stay_readable(
    service: Service, architect: Client, issue: str
) -> None:
    path = service.storage / "results" / PROJECT / issue / "python-specialist.json"
    first = architect.store(issue=issue, rationale="0" * 200_000)
    seen, stop = set(), threading.Event()

    def read() -> None:
        while not stop.is_set():
            record = json.loads(path.read_text())
            seen.add((record["id"], len(record["result"]["rationale"])))

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read)
        later = [architect.store(issue=issue, rationale=str(number) * 200_000)["id"] for number in range(1, 9)]
        until(lambda: later[-1] in {name for name, _ in seen} or reading.done())
        stop.set()
        reading.result()
    assert {length for _, length in seen} == {200_000}
    assert json.loads(path.read_text())["id"] == later[-1]
    assert architect.get(f"/api/results/{first['id']}").json()["result"]["rationale"][0] == "0"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.any_storage
def test_results_at_once_on_one_issue_route_as_if_one_came_after_the_other(service: Service, issue: str) -> None:
    clients = [service.client("chief-architect") for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        stored = list(pool.map(lambda client: client.store(issue=issue, status="failed"), clients))
    proposed = {item["id"]: [agent["agent_type"] for agent in item["next_agents"]] for item in stored}
    order = [record["id"] for record in clients[0].get("/api/results", issue_id=issue).json()["results"]]
    again, escalated = ["python-specialist"], ["chief-architect"]
    assert [proposed[result_id] for result_id in order] == [again, again, escalated, again, again, escalated]
    assert [event["data"]["result_id"] for event in completed(clients[0], issue)] == order


@pytest.mark.any_storage
def test_pages_of_large_results_are_bounded_in_bytes_and_lose_nothing(architect: Client, issue: str) -> None:
    ids = [architect.store(issue=issue, rationale="x" * 3_000_000)["id"] for _ in range(4)]
    newest = architect.get("/api/results", issue_id=issue)
    assert len(newest.content) < 10_000_000
    assert [record["id"] for record in newest.json()["results"]] == ids[2:] and newest.json()["has_more"] is True
    found: list[str] = []
    cursor = "earliest"
    while True:
        answer = architect.get("/api/results", issue_id=issue, since=cursor)
        assert len(answer.content) < 10_000_000
        page = answer.json()
        if not page["results"]:
            break
        found += [record["id"] for record in page["results"]]
        cursor = page["next_cursor"]
    assert found == ids


# -- idempotency keys


def keyed(client: Client, path: str, body: dict[str, Any], key: str) -> Any:
    return client.request("POST", path, json=body, headers={"Idempotency-Key": key})


@pytest.mark.any_storage
def test_a_repeat_gives_the_first_answer_again_and_does_nothing_twice(architect: Client, issue: str) -> None:
    first = keyed(architect, "/api/results", body_of(issue), issue)
    again = keyed(architect, "/api/results", body_of(issue), issue)
    assert "Idempotent-Replay" not in first.headers and again.headers["Idempotent-Replay"] == "true"
    assert (again.status_code, again.json()) == (first.status_code, first.json()) and first.status_code == 201
    assert len(architect.get("/api/results", issue_id=issue).json()["results"]) == len(completed(architect, issue)) == 1


@pytest.mark.any_storage
def test_a_key_belongs_to_one_subject_and_one_endpoint(service: Service, architect: Client, issue: str) -> None:
    event = {"publisher": "tester", "topic": "test", "data": {"issue_id": issue}}
    answers = [
        keyed(client, f"/api/events/{kind}", event, issue)
        for client in (architect, service.client())
        for kind in ("one", "two")
    ]
    assert [answer.status_code for answer in answers] == [202] * 4
    assert len({answer.json()["event_id"] for answer in answers}) == 4
    assert not any("Idempotent-Replay" in answer.headers for answer in answers)


@pytest.mark.parametrize("keys", [("one", "two"), ("one", "one"), ("one", "two", "three")])
def test_keys_in_several_lines_are_refused(architect: Client, issue: str, keys: tuple[str, ...]) -> None:
    content = json.dumps(body_of(issue)).encode()
    connection = http.client.HTTPConnection(architect.url.removeprefix("http://"), timeout=10)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/api/results")
        for name, value in (("Authorization", f"Bearer {architect.token}"), ("Content-Length", str(len(content)))):
            connection.putheader(name, value)
        for key in keys:
            connection.putheader("Idempotency-Key", key)
        connection.endheaders(content)
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["code"]) == (400, "REQ_001")
    assert architect.get("/api/results", issue_id=issue).json()["results"] == []


# -- the file follows the database


def faulty(make_service: Callable[..., Service], tmp_path: Path, code: str) -> Service:
    """A service in which something goes wrong while the file ``fault`` is there."""
    folder = tmp_path / "faults"
    folder.mkdir()
    names = f"import os, signal, sqlite3, time\nfrom pathlib import Path\nimport cco_sidecar as c\nFAULT = Path({str(tmp_path / 'fault')!r})\n"
    (folder / "fault.py").write_text(names + code)
    return make_service("--plugins", str(folder))


def file_id(service: Service, issue: str = "issue-1", agent_type: str = "python-specialist") -> str:
    return str(json.loads((service.storage / "results" / PROJECT / issue / f"{agent_type}.json").read_text())["id"])


def unplaced(service: Service) -> list[str]:
    return [path.name for path in (service.storage / "results/.new").iterdir()]


KILLED = "os.kill(os.getpid(), signal.SIGKILL) if FAULT.exists() else None"
MOMENTS = {
    "between the commit and the file": f"place = c.ResultFiles.place\nc.ResultFiles.place = lambda *a: {KILLED} or place(*a)\n",
    "in the transaction, with the file written": f"""
write = c.ResultFiles.write
def dies(self, rows):
    write(self, rows)
    if any(row['id'] != '.probe' for row in rows): {KILLED}
c.ResultFiles.write = dies
""",
    "before the commit": f"commit = c.Records.commit\nc.Records.commit = lambda self: {KILLED} or commit(self)\n",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_file_is_as_new_as_the_database_after_a_kill_and_a_start(
    make_service: Callable[..., Service], tmp_path: Path, moment: str
) -> None:
    service = faulty(make_service, tmp_path, MOMENTS[moment])
    architect = service.client()
    first, other = architect.store(), architect.store("test-engineer", issue="issue-2")
    (tmp_path / "fault").touch()
    with pytest.raises(requests.ConnectionError):
        architect.store()
    assert service.process and service.process.wait(120) == -signal.SIGKILL
    assert file_id(service) == first["id"]
    (tmp_path / "fault").unlink()
    untouched = service.storage / "results" / PROJECT / "issue-2/test-engineer.json"
    written = untouched.stat().st_mtime_ns
    service.start()
    results = service.client().get("/api/results", issue_id="issue-1").json()["results"]
    assert len(results) == (2 if moment.startswith("between") else 1)
    assert file_id(service) == results[-1]["id"] and unplaced(service) == []
    assert file_id(service, "issue-2", "test-engineer") == other["id"] and untouched.stat().st_mtime_ns == written


def test_a_refused_result_is_never_the_latest(make_service: Callable[..., Service], tmp_path: Path) -> None:
    code = """
commit = c.Records.commit
def full(self):
    if FAULT.exists():
        raise sqlite3.OperationalError('database or disk is full')
    commit(self)
c.Records.commit = full
"""
    service = faulty(make_service, tmp_path, code)
    architect = service.client()
    first = architect.store()
    (tmp_path / "fault").touch()
    answer = architect.post("/api/results", body_of("issue-1"))
    assert (answer.status_code, answer.json()["code"]) == (500, "STR_001")
    assert file_id(service) == first["id"] and unplaced(service) == []
    (tmp_path / "fault").unlink()
    assert file_id(service) == first["id"] != architect.store()["id"] == file_id(service)


@pytest.mark.parametrize("place", ["", "/issue-1", "/issue-1/python-specialist.json"])
def test_a_result_whose_file_has_no_place_is_refused(make_service: Callable[..., Service], place: str) -> None:
    service = make_service()
    path = service.storage / "results" / (PROJECT + place)
    path.parent.mkdir(parents=True)
    if place.endswith(".json"):
        path.mkdir()
    else:
        path.touch()
    answer = service.client().post("/api/results", body_of("issue-1"))
    assert (answer.status_code, answer.json()["code"]) == (500, "STR_001")
    assert service.client().get("/api/results").json()["results"] == []


def test_what_lies_among_the_files_to_place_does_not_stop_a_start(make_service: Callable[..., Service]) -> None:
    service = make_service()
    stored = service.client().store()
    assert service.stop() == 0
    folder = service.storage / "results/.new"
    (folder / "result-of-nobody").write_text("{}")
    (folder / "a-folder").mkdir()
    (folder / stored["id"]).write_text("torn")
    service.start()
    assert file_id(service) == stored["id"] and unplaced(service) == ["a-folder"]


def test_a_file_that_cannot_be_moved_to_its_place_is_there_once_a_start_can(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    """Nor is it lost by a start that cannot either."""
    code = """
move = c.os.replace
def fails(path, place):
    if FAULT.exists() and '/results/' in str(place):
        raise OSError(c.errno.ENOSPC, 'No space left on device')
    move(path, place)
c.os.replace = fails
"""
    service = faulty(make_service, tmp_path, code)
    first, fault = service.client().store(), tmp_path / "fault"
    fault.touch()
    second = service.client().store()
    for _ in range(2):
        assert file_id(service) == first["id"] and unplaced(service) == [second["id"]]
        assert service.stop() == 0
        service.start()
    fault.unlink()
    assert service.stop() == 0
    service.start()
    assert file_id(service) == second["id"] and unplaced(service) == []


# -- what is counted


@pytest.mark.any_storage
def test_status_counts_what_has_been_answered(make_service: Callable[..., Service], tmp_path: Path) -> None:
    """Each commit takes a third of a second: what is written behind an answer is counted all the same."""
    code = "commit = c.Records.commit\nc.Records.commit = lambda self: (time.sleep(0.3) if FAULT.exists() else None) or commit(self)\n"
    service = faulty(make_service, tmp_path, code)
    architect = service.client()
    (tmp_path / "fault").touch()

    def counted() -> dict[str, Any]:
        found = architect.get("/status").json()
        names = {"storage": ("results_stored",), "events": ("total_published", "total_delivered", "queue_depth")}
        return {name: found[part][name] for part in names for name in names[part]}

    before = counted()
    for number in range(1, 4):
        architect.store(issue=f"issue-{number}")  # and its agent_completed
        architect.publish("noted")
        assert counted() == before | {
            "results_stored": number,
            "total_published": 2 * number,
            "queue_depth": 2,
            "total_delivered": 2 * number - 2,
        }
        assert len(architect.wait(timeout=0)["events"]) == 2
        assert counted() == before | {
            "results_stored": number,
            "total_published": 2 * number,
            "queue_depth": 0,
            "total_delivered": 2 * number,
        }


def test_status_answers_where_nothing_can_be_written(make_service: Callable[..., Service]) -> None:
    service = make_service()
    architect = service.client()
    architect.store()
    with contextlib.closing(sqlite3.connect(service.storage / Storage.FILE)) as other:
        other.execute("begin immediate")
        assert architect.get("/status").json()["storage"]["results_stored"] == 1


# -- over crashes


def test_files_and_database_agree_after_kills_at_any_moment(make_service: Callable[..., Service]) -> None:
    service = make_service()
    token, answered = service.token(sub="worker"), []

    def work(number: int) -> None:
        with contextlib.suppress(requests.RequestException):  # the crash
            while True:
                answered.append(
                    Client(service.url, token).store(issue=f"issue-{number % 2}", rationale="x" * 50_000)["id"]
                )

    for kill in range(5):
        with ThreadPoolExecutor() as pool:
            workers = [pool.submit(work, number) for number in range(4)]
            before = len(answered)
            until(lambda before=before: len(answered) > before + 8)
            time.sleep(kill / 500)  # the moment is the point here
            service.kill()
            for worker in workers:
                worker.result()
        service.start()
        for number in range(2):
            (newest,) = (
                Client(service.url, token).get("/api/results", issue_id=f"issue-{number}", limit=1).json()["results"]
            )
            assert newest["id"] == file_id(service, f"issue-{number}")
        assert unplaced(service) == []


@pytest.mark.any_storage
def test_everything_that_was_answered_is_there_after_kill_9_under_load(make_service: Callable[..., Service]) -> None:
    service = make_service("--agent-command", json.dumps([sys.executable, "-c", "pass"]))
    token = service.token(sub="worker")
    answered: list[tuple[str, str, str]] = []

    def work(name: str) -> None:
        client = Client(service.url, token)
        for number in range(10_000):
            try:
                stored = keyed(client, "/api/results", body_of(f"{name}-{number}"), f"{name}-{number}").json()
                event = client.publish("noted", {"name": name, "number": number})
            except OSError:  # the crash
                return
            answered.append((f"{name}-{number}", stored["id"], event["event_id"]))

    with ThreadPoolExecutor() as pool:
        workers = [pool.submit(work, f"w{number}") for number in range(4)]
        until(lambda: len(answered) > 40)
        service.kill()
        for worker in workers:
            worker.result()
    service.start()
    client = Client(service.url, token)
    results, events = set(), []
    cursor = position = "earliest"
    while page := client.get("/api/results", limit=1000, since=cursor).json()["results"]:
        results |= {record["id"] for record in page}
        cursor = page[-1]["id"]
    while found := client.wait(since=position, timeout=0, limit=1000)["events"]:
        events += found
        position = found[-1]["event_id"]
    assert {result_id for _, result_id, _ in answered} <= results
    assert {event_id for _, _, event_id in answered} <= {event["event_id"] for event in events}
    completions = {event["data"]["result_id"] for event in events if event["event_type"] == "agent_completed"}
    assert completions == results, "a result without its event, or an event without its result"
    issue, result_id, _ = answered[0]
    replay = keyed(client, "/api/results", body_of(issue), issue)
    assert replay.headers["Idempotent-Replay"] == "true" and replay.json()["id"] == result_id
    assert (
        json.loads((service.storage / f"results/{PROJECT}/{issue}/python-specialist.json").read_text())["id"]
        == result_id
    )


def test_a_copy_of_the_storage_without_its_lock_and_announcement_is_a_whole_service(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    service = make_service()
    stored = service.client().store()
    service.stop()
    shutil.copytree(service.storage, tmp_path / "copy", ignore=shutil.ignore_patterns("lock", "sidecar.json"))
    moved = make_service(storage=tmp_path / "copy")
    assert moved.client().get(f"/api/results/{stored['id']}").json()["id"] == stored["id"]

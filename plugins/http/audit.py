"""An audit log in the storage: JSON lines of who did what, on what, with what outcome.

One line for every change and for every request that was refused, also before it became one. A part, since an observer
that falls behind may miss something, and an audit log must not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import typing
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from cco_sidecar import MB, Endpoint, Server, Settings, StartError, hookimpl, is_identifier, iso, redact, without_tokens
from cco_sidecar_plugins.http._finished import RECORDERS, FinishedRequest, ids_of

log = logging.getLogger("cco.audit")


@hookimpl
def part_class(settings: Settings, base: type) -> type | None:
    if issubclass(base, Server):
        return type("AuditedServer", (AuditedServer, base), {"settings": settings})
    return type("AuditedEndpoint", (AuditedEndpoint, base), {}) if issubclass(base, Endpoint) else None


class AuditedServer(Server):
    """Its audit log begins and ends with it."""

    settings: Settings

    def initialize(self, *args: Any, **options: Any) -> None:
        folder = self.settings.storage
        try:
            self.audit_log = AuditLog(folder)
        except OSError as error:
            raise StartError(f"the audit log in {folder} cannot be opened: {error.strerror}") from None
        RECORDERS[self.settings] = self.audit_log.record
        super().initialize(*args, **options)

    async def close_all_connections(self) -> None:
        await super().close_all_connections()
        self.audit_log.close()


class AuditedEndpoint(Endpoint):
    """Hands each request to the audit log when it has ended."""

    reading = False  # it changes nothing although its method says that it may
    answer: Any = None

    async def work(self, path: tuple[str, ...]) -> Any:
        self.answer = await super().work(path)
        return self.answer

    def finished(self, status: int, seconds: float) -> None:
        super().finished(status, seconds)
        if self.error or not (self.reading or self.request.method in AuditLog.READING):
            self._take_down(status, seconds)
        if status != 499:  # the request of a client that hung up may still be worked on
            self.given = self.answer = None

    def _take_down(self, status: int, seconds: float) -> None:
        request = self.request
        RECORDERS[self.sidecar.settings](FinishedRequest(
            moment=time.time(), request_id=self.request_id, remote=request.remote_ip,
            method=without_tokens(str(request.method)), path=without_tokens(request.path),
            status=status, seconds=seconds, claims=self.claims, error=self.error,
            reading=self.reading, acted_on=ids_of(self, self.answer),
        ))  # fmt: skip


class AuditLog:
    """At ``max_bytes`` the file is renamed to audit.log.1, that one to audit.log.2, and so on up to ``files``."""

    READING = ("GET", "HEAD", "OPTIONS")
    HOOKS = "/api/hooks/"  # what programs ask at every step, and which changes nothing

    def __init__(self, folder: Path, *, max_bytes: int = 10 * MB, files: int = 5) -> None:
        self._path = folder / "audit.log"
        self._max_bytes, self._files = max_bytes, files
        self._closed = False
        self._open()

    def _open(self) -> None:
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)  # a FIFO must not block
        self._file: int | None = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._file).st_size
        self._torn = False  # its last line was cut by a full disk
        if self._size:
            with self._path.open("rb") as written:
                written.seek(-1, os.SEEK_END)
                self._torn = written.read() != b"\n"

    def record(self, request: FinishedRequest) -> None:
        """Append a line. A disk that does not take it is logged: the request itself has been answered."""
        reading = request.reading or request.method in self.READING
        if self._closed or (reading and not request.error):
            return
        content = msgspec.json.encode(line_of(request))
        content = (redact(content.decode())[0].encode() if b"eyJ" in content else content) + b"\n"
        try:
            if self._file is None or self._size + self._torn + len(content) > self._max_bytes:
                self._rotate()
            content = b"\n" * self._torn + content
            written = os.write(typing.cast(int, self._file), content)
            self._size, self._torn = self._size + written, written < len(content)
            if self._torn:
                log.error("audit log: the line of %s is cut: the disk is full", request.request_id)
        except OSError as error:
            log.error("audit log: %s", error.strerror)

    def _rotate(self) -> None:
        """Begin a new file; go on with the old one where it cannot be renamed. Raises OSError where there is none."""
        self._close()
        try:
            for number in range(self._files - 1, -1, -1):
                older = Path(f"{self._path}.{number}") if number else self._path
                with contextlib.suppress(FileNotFoundError):
                    older.replace(f"{self._path}.{number + 1}")
        except OSError as error:
            log.error("audit log: it cannot be rotated: %s", error.strerror)
        self._open()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def close(self) -> None:
        self._closed = True
        self._close()


class AuditLine(Struct, frozen=True):
    """Who did what, on what, with what outcome."""

    time: str
    request_id: str
    remote: str | None
    who: str | None
    agent_type: str | None
    method: str | None
    path: str
    status: int
    outcome: str
    code: str | None
    reason: str | None
    issue_id: str | None  # what was acted on, as far as the path, the body and the answer name it
    agent_id: str | None
    result_id: str | None
    event_id: str | None
    decision: str | None  # what somebody was asked or answered


def line_of(request: FinishedRequest) -> AuditLine:
    status, claims, error = request.status, request.claims, request.error
    acted_on = [named(request.acted_on.get(name)) for name in ("issue_id", "agent_id", "result_id", "event_id")]
    outcome = "refused" if 400 <= status < 500 else "failed" if status >= 500 else "done"
    return AuditLine(
        iso(request.moment), request.request_id, request.remote, claims.sub or None, claims.agent_type or None,
        request.method, request.path, status, outcome, error.code if error else None, error.message if error else None,
        *acted_on, *[request.acted_on.get("decision")],
    )  # fmt: skip


def named(value: str | None) -> str | None:
    """``value`` where it is an identifier; what a caller put in the place of one stays out of the audit log."""
    return value if value and is_identifier(value) else None

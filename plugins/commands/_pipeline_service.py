"""The service that ``cco run`` uses: the one that runs for the repository, else one of its own.

One that a pipeline starts lives for as long as any pipeline uses it: each pipeline shares a lock, and the service ends
when it gets that lock for itself alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

import msgspec
import psutil

import cco_sidecar
from cco_sidecar import (
    REFUSED,
    Settings,
    StartError,
    birth_of,
    command_serve,
    flag_of,
    lock_file,
    option_table,
    prepare_storage_folder,
    settings_from,
    write_file,
)
from cco_sidecar_plugins._called import own_command
from cco_sidecar_plugins._files import read_sidecar_json
from cco_sidecar_plugins.commands._client import NOT_REACHABLE, Client, NotAnswering, NotReachable, Refused
from cco_sidecar_plugins.commands._pipeline_view import View
from cco_sidecar_plugins.commands._running import running_settings

try:
    import fcntl
except ImportError:  # Windows: a service has to run already, since only these locks can be shared
    fcntl = None  # type: ignore[assignment]


def command_run_service(options: argparse.Namespace) -> int:
    """Serve for as long as a pipeline uses the service: what a pipeline starts when no service runs."""
    settings = settings_from(options)
    facts = {
        "birth": birth_of(os.getpid()),
        "settings": plain_settings(settings),
    }  # for pipelines with the same options
    write_file(service_file(settings, os.getpid(), "json"), json.dumps(facts).encode())
    users = open_private(users_file(settings))

    def stop_when_unused() -> None:
        fcntl.flock(users, fcntl.LOCK_EX)  # a user's part of the lock dies with it, however it ends
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_unused, daemon=True).start()
    return command_serve(options)


class Link:
    """The way to the service. One that is started here lives for as long as any pipeline uses it, and not longer."""

    START_SECONDS = 60.0  # of one that hangs: one that fails is seen at once, and a busy machine needs its time
    STOP_SECONDS = 20.0
    MAX_RESTARTS = 3

    def __init__(self, options: argparse.Namespace, asked: Settings, view: View) -> None:
        self._options, self._asked, self._settings, self._view = options, asked, running_settings(asked), view
        self._local = not (getattr(options, "url", None) or os.environ.get("SIDECAR_URL"))
        self._held: list[int] = []
        self.own: subprocess.Popen[bytes] | None = None
        self.client: Client
        self.losses = 0
        self._log: Path  # of our service
        self._log_read = 0  # bytes of it, from which warnings were taken

    def __enter__(self) -> Link:
        if self._local:
            prepare_storage_folder(self._settings)
            pipelines_folder(self._settings).mkdir(mode=0o700, exist_ok=True)
            self._hold_issue()
            self._hold_service()
        try:
            self.client = self._find_or_start() if self._local else self._checked(self.answering())
        except BaseException:
            if self.own:  # nobody else has got to know it
                self.own.terminate()
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.own:
            self._keep_log()
        service_file(self._settings, os.getpid(), "log").unlink(missing_ok=True)  # of one that came too late
        for file in self._held:
            os.close(file)
        if self.own:
            self._wait_for_stop(self.own)

    @property
    def whose(self) -> str:
        return "its own" if self.own else "running"

    def _hold_issue(self) -> None:
        """One pipeline per issue, or two would start the same agent. The lock dies with its holder."""
        file = open_private(pipelines_folder(self._settings) / f"{self._options.issue}.lock")
        self._held.append(file)
        try:
            lock_file(file)
        except OSError:
            raise StartError(f"a pipeline for {self._options.issue} is already running", REFUSED) from None

    def _hold_service(self) -> None:
        """Our part in the lock that keeps a pipeline's service alive; waits until one that is just stopping has
        gone.
        """
        if fcntl is None:
            return
        file = open_private(users_file(self._settings))
        self._held.append(file)
        deadline = time.monotonic() + self.STOP_SECONDS
        while not try_to_lock(file, fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise StartError("the service of an earlier pipeline does not stop", REFUSED)
            time.sleep(0.05)

    def answering(self) -> Client:
        """A client of the service that answers now; raises NotReachable."""
        client = Client(self._options)
        client.project = client.call("GET", "/health", timeout=10)["project_id"]
        return client

    def _announced(self) -> bool:
        """Whether the service that clients find is our own."""
        info = read_sidecar_json(self._settings.storage)
        return self.own is not None and info is not None and info.pid == self.own.pid

    def _checked(self, client: Client) -> Client:
        """The client of a service that is not our own; raises StartError where it need not have the given options."""
        info = read_sidecar_json(self._settings.storage) if self._local else None
        theirs, ours = self._known(client, info.pid if info else 0), plain_settings(self._asked)
        for_us = {"root", "storage"} | ({"jwt_secret"} if self._local else set())  # where it is, and how we sign
        names = [name for name in self._given() if name not in for_us and ours.get(name) not in theirs.get(name, [])]
        if names:
            flags, where = ", ".join(map(flag_of, names)), f"{client.url}, pid {info.pid}" if info else client.url
            it = "it" if len(names) == 1 else "them"
            how = f"start that again with {it}, or with {it} in its cco.toml"
            if "root" in theirs:
                other = f"another `{own_command(self._settings)} run`"
                how = f"{other} has started it with other values, and it stops with that: wait, or leave {it} out"
            elif self._local:
                how += f"; where none runs, `{own_command(self._settings)} run` starts one of its own with {it}"
            raise StartError(f"{flags}: decided by the service that runs already ({where}): {how}")
        return client

    def _known(self, client: Client, pid: int) -> dict[str, list[Any]]:
        """The settings of a running service that can be known, each with the values that mean what it has."""
        known: dict[str, list[Any]] = {"project": [client.project], "port": [urllib.parse.urlsplit(client.url).port]}
        with contextlib.suppress(OSError):  # no pipeline has ever started one
            facts = json.loads(service_file(self._settings, pid, "json").read_bytes())
            if (birth := birth_of(pid)) and birth == facts.get("birth"):  # else one that has ended had that pid
                return {name: [value, *known.get(name, [])] for name, value in facts["settings"].items()}
        return known

    def _given(self) -> dict[str, Any]:
        """The service's options that the user gave, as they were written."""
        return {name: vars(self._options)[name] for name in option_table() if name in vars(self._options)}

    def _find_or_start(self) -> Client:
        deadline = time.monotonic() + self.START_SECONDS
        while True:
            try:
                client = self.answering()
                if self.own and self.own.poll() is None and self._announced():
                    self._keep_log()
                    return client
                if self.own is None or self.own.poll() is not None:
                    self.own = None
                    return self._checked(client)
            except NotAnswering:
                if self.own is None:  # none can be started beside it
                    raise
            except NotReachable:
                pass
            if self.own is None or self.own.poll() is not None:
                self._start()
            if time.monotonic() > deadline:
                raise StartError(f"the service did not start: {self._last_words()}", REFUSED)
            time.sleep(0.05)
            self._check_start()

    def _start(self) -> None:
        if fcntl is None:
            raise NotReachable(
                f"no sidecar runs for {self._settings.root}; start it with `{own_command(self._settings)}`"
            )
        command = [sys.executable, str(Path(cco_sidecar.__file__).resolve()), "run-service", *self._flags()]
        environ = dict(os.environ) | self._variables()
        sweep(pipelines_folder(self._settings))
        self._log, self._log_read = service_file(self._settings, os.getpid(), "log"), 0  # others may start one now too
        output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:  # a session of its own: Ctrl-C is for us, who have an agent to end first
            self.own = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, start_new_session=True
            )  # fmt: skip
        finally:
            os.close(output)

    def _flags(self) -> list[str]:
        """What the user said, on a free port unless the user named one."""
        settings = self._settings
        said = {name: value for name, value in self._given().items() if not in_variable(name, value)}
        own = {"root": str(settings.root), "project": settings.project, "storage": str(settings.storage)}
        if self._options.timeout and "agent_timeout" not in said:
            own["agent_timeout"] = str(max(settings.agent_timeout, self._options.timeout))
        return [f"{flag_of(name)}={value}" for name, value in pairs({"port": "0"} | said | own)]

    def _variables(self) -> dict[str, str]:
        """What is no flag with a value: switches, and a secret, which flags would show to everybody."""
        hidden = {name: value for name, value in self._given().items() if in_variable(name, value)}
        return {f"CCO_SIDECAR_{name.upper()}": str(value) for name, value in hidden.items()}

    def said(self) -> list[str]:
        """The options that another run needs to do the same, as words."""
        client = {name: vars(self._options)[name] for name in ("url",) if name in vars(self._options)}
        given = {name: value for name, value in self._given().items() if name != "jwt_secret" and value is not False}
        words = [
            [flag_of(name)] if value is True else [flag_of(name), str(value)] for name, value in pairs(client | given)
        ]
        return [word for pair in words for word in pair]

    def _check_start(self) -> None:
        """Give up on a service of ours that has ended, unless another one has the storage: that one is about to answer,
        or to go.
        """
        if self.own and self.own.poll() is not None:
            if self.own.returncode == REFUSED and "already runs on this storage" in self._last_words():
                self.own = None
                time.sleep(0.2)
            else:
                raise StartError(
                    f"the service did not start: {self._last_words()}",
                    self.own.returncode if self.own.returncode > 0 else REFUSED,
                )

    def _keep_log(self) -> None:
        """Give the log of our service, also of one that did not start, the name that the manual tells."""
        with contextlib.suppress(FileNotFoundError):  # swept by a pipeline that does not see our processes
            self._log = self._log.replace(self._log.with_name("service.log"))

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return lines[-1].removeprefix("cco: ") if lines else "it said nothing"

    def warnings(self) -> list[str]:
        """What our own service has warned of since the last call: nobody else sees its log."""
        if not self.own:
            return []
        try:
            with self._log.open("rb") as file:
                file.seek(self._log_read)
                lines, _, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:  # swept, as above
            return []
        self._log_read += len(lines) + 1 if lines else 0
        return [words for line in lines.decode("utf-8", "replace").splitlines() if (words := warning_of(line))]

    def recover(self, error: NotReachable) -> None:
        """Return when the service answers again. Our own is started again, somebody else's is waited for; raises what
        was the matter.
        """
        self.losses += 1
        self._view.tell("waiting", reason=str(error), seconds=self._options.patience, at_most=True)
        deadline = time.monotonic() + self._options.patience
        while True:
            try:
                client = self.answering()
                self.client = client if self.own is None or self._announced() else self._find_or_start()
                return
            except (NotReachable, Refused):
                if self.own and self.own.poll() is not None:
                    self.client = self._start_again()
                    return
                if time.monotonic() > deadline:
                    raise error from None
                time.sleep(0.2)

    def _start_again(self) -> Client:
        if self.losses > self.MAX_RESTARTS:
            raise StartError(f"the service has died {self.losses} times: {self._last_words()}", NOT_REACHABLE)
        return self._find_or_start()

    def _wait_for_stop(self, own: subprocess.Popen[bytes]) -> None:
        """Our service stops by itself when its last user has gone: wait for that, unless another pipeline still uses
        it.
        """
        file, used = open_private(users_file(self._settings)), 0
        deadline = time.monotonic() + self.STOP_SECONDS
        while own.poll() is None and time.monotonic() < deadline and used < 20:
            # One that hangs, or that is still starting, has not taken the lock, which is no sign of another pipeline.
            used = used + 1 if not try_to_lock(file, fcntl.LOCK_EX) and try_to_lock(file, fcntl.LOCK_SH) else 0
            fcntl.flock(file, fcntl.LOCK_UN)
            time.sleep(0.05)
        os.close(file)
        if own.poll() is None and used >= 20:
            self._view.tell(
                "note",
                reason="another pipeline uses the service that was started here: it stays until that one has ended",
            )
        elif own.poll() is None:
            own.kill()
            own.wait()


def warning_of(line: str) -> str:
    """What a line of a service's log warns of, as text or as JSON; "" where it is of another level."""
    if found := re.fullmatch(r"\S+ \S+ WARNING (.*)", line):
        return found[1]
    with contextlib.suppress(ValueError, KeyError, TypeError):
        row = json.loads(line)
        return str(row["message"]) if row["level"] == "warning" else ""
    return ""


def in_variable(name: str, value: Any) -> bool:
    return name == "jwt_secret" or isinstance(value, bool)


def pairs(table: dict[str, Any]) -> list[tuple[str, Any]]:
    """The rows of a table of options, one for each value of those that may be repeated."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in table.items()}
    return [(name, value) for name, values in lists.items() for value in values]


def plain_settings(settings: Settings) -> dict[str, Any]:
    """The settings as JSON has them, without the secret."""
    found: dict[str, Any] = json.loads(json.dumps(msgspec.structs.asdict(settings), default=str))
    del found["jwt_secret"]
    return found


def pipelines_folder(settings: Settings) -> Path:
    return settings.storage / "pipelines"


def service_file(settings: Settings, pid: int, kind: str) -> Path:
    """The settings of the service with that pid, or the log of the one that this pipeline is starting: several may
    start one at the same time, of which one gets the storage.
    """
    return pipelines_folder(settings) / f"service-{pid}.{kind}"


def sweep(folder: Path) -> None:
    """Remove such files of processes that have ended."""
    for path in folder.glob("service-*.*"):
        pid = path.stem.removeprefix("service-")
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            path.unlink(missing_ok=True)


def users_file(settings: Settings) -> Path:
    """Shared by every pipeline that uses the storage's service; wanted for itself alone by a service that a pipeline
    has started.
    """
    return pipelines_folder(settings) / ".users"


def open_private(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartError(f"{path.name}: {error.strerror}", REFUSED) from None


def try_to_lock(file: int, how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

"""Processes of the program that begin as copies of one in which the module is imported.

A new interpreter compiles and imports for 0.3 s of processor time before the program's first line, and the suite starts
the program thousands of times. ``Popen`` takes the place of subprocess.Popen: what would run ``python cco_sidecar.py
WORDS`` is forked from a server that has imported the module and its plugins, and calls ``main``. It is a process like
any other, with a number, words, a folder, an environment, streams and an exit code of its own.

A new interpreter is started where it, or what comes between fork and exec, is what differs: options, PYTHON...
variables, a locale, another module. With CCO_TEST_FORK=0 it always is.
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import io
import json
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOOKED_AT = ("PYTHON", "LC_", "LANG", "LD_", "COVERAGE_")  # by an interpreter at its start
PLAIN = {"executable": None, "shell": False, "pass_fds": (), "preexec_fn": None, "close_fds": True}
HANDLES = "p2cread p2cwrite c2pread c2pwrite errread errwrite".split()
LENGTH = struct.Struct("!I")

RealPopen = subprocess.Popen


class Forkserver:
    """A process that has imported ``module``, from the first fork to ``close``, and our connection to it."""

    of: dict[str, Forkserver] = {}  # by the module's path; a module that is not here has none

    def __init__(self, module: Path, environment: dict[str, str]) -> None:
        self.module, self.environment = module, environment
        self.process: subprocess.Popen[bytes] | None = None
        self.closed = False
        self._lock = threading.Lock()
        if os.environ.get("CCO_TEST_FORK") != "0":
            self.of[str(module)] = self

    def _start(self) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:  # by the last word the harness tells a service from an agent, and so it does our forks
            command = [sys.executable, __file__, str(self.module), str(theirs.fileno()), "serve"]
            self.process = RealPopen(command, env=self.environment, pass_fds=[theirs.fileno()])

    def can(self, given: dict[str, Any]) -> bool:
        """Whether a fork is like the process that these arguments of subprocess.Popen would start."""
        environment = os.environ if given["env"] is None else given["env"]
        return (
            os.fsdecode(given["args"][0]) == sys.executable
            and all(given[name] == plain for name, plain in PLAIN.items())
            and looked_at(environment) == looked_at(self.environment)
        )

    def ask(self, question: dict[str, Any], descriptors: list[int]) -> Any:
        text = json.dumps(question).encode()
        with self._lock:
            if self.process is None:
                self._start()
            socket.send_fds(self._connection, [LENGTH.pack(len(text))], descriptors)
            self._connection.sendall(text)
            return json.loads(received(self._connection, *LENGTH.unpack(received(self._connection, LENGTH.size))))

    def close(self) -> None:
        self.of.pop(str(self.module), None)
        self.closed = True
        if self.process:
            self._connection.close()
            assert self.process.wait(15) == 0


class Popen(RealPopen):  # type: ignore[type-arg]
    """subprocess.Popen, by fork where that is alike."""

    _server: Forkserver | None = None

    def _execute_child(self, *arguments: Any) -> None:
        given = inspect.signature(RealPopen._execute_child).bind(self, *arguments).arguments  # type: ignore[attr-defined]
        words = given["args"]
        server = Forkserver.of.get(str(words[1])) if isinstance(words, list) and len(words) > 1 else None
        if server is None or not server.can(given):
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        environment = os.environ if given["env"] is None else given["env"]
        question = {
            "words": [os.fsdecode(word) for word in words[1:]],
            "folder": os.path.abspath(os.fsdecode(given["cwd"] or ".")),
            "environment": {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()},
            "session": given["start_new_session"],
        }
        streams = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        self.pid = server.ask(question, [own if own != -1 else number for number, own in enumerate(streams)])
        self._server, self._child_created = server, True
        self._close_pipe_fds(*(given[name] for name in HANDLES))  # type: ignore[attr-defined]

    def _internal_poll(self, *arguments: Any, **keywords: Any) -> int | None:
        if self._server is None:
            return super()._internal_poll(*arguments, **keywords)  # type: ignore[misc, no-any-return]
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[has-type]
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()
        return self.returncode

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._server is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc, no-any-return]
        if not wait_flags & os.WNOHANG:
            handle = os.pidfd_open(self.pid)
            select.select([handle], [], [])
            os.close(handle)
        if self._server.closed:
            return self.pid, 0  # what subprocess says of a child whose status nobody knows any more
        status = self._server.ask({"pid": self.pid}, [])
        return (self.pid, status) if status is not None else (0, 0)


def looked_at(environment: Mapping[Any, Any]) -> dict[str, str]:
    named = {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()}
    return {name: value for name, value in named.items() if name.startswith(LOOKED_AT) and value}


def received(connection: socket.socket, length: int) -> bytes:
    """Raises EOFError."""
    text = b""
    while len(text) < length:
        if not (more := connection.recv(length - len(text))):
            raise EOFError
        text += more
    return text


# -- in the server


def serve(module: Path, connection: socket.socket) -> int:
    """Answer until the connection ends. In a fork returns what the program does."""
    del sys.path[0]  # as the module does where it is the program
    spec = importlib.util.spec_from_file_location("cco_sidecar", module)
    assert spec and spec.loader
    cco_sidecar = sys.modules["cco_sidecar"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cco_sidecar)
    assert threading.active_count() == 1
    hooks = cco_sidecar.bundled_class(cco_sidecar.Hooks, "_hooks", "SafeHooks")
    for file in getattr(sys.modules[hooks.__module__], "bundled_plugins", list)():  # the file alone has none
        try:
            cco_sidecar.import_file(file)
        except ImportError:  # what it needs is not installed: the program says so
            continue
    gc.freeze()
    while True:
        head, descriptors, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
        if not head:
            return 0
        head += received(connection, LENGTH.size - len(head))
        question = json.loads(received(connection, *LENGTH.unpack(head)))
        if "pid" in question:
            pid, status = os.waitpid(question["pid"], os.WNOHANG)
            answer = status if pid else None
        else:
            answer = os.fork()
            if not answer:
                connection.close()
                become(descriptors, **question)
                return int(cco_sidecar.main())
            for descriptor in descriptors:
                os.close(descriptor)
        text = json.dumps(answer).encode()
        connection.sendall(LENGTH.pack(len(text)) + text)


def become(descriptors: list[int], words: list[str], folder: str, environment: dict[str, str], session: bool) -> None:
    """What a new interpreter finds at its start."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    tempfile.tempdir = None
    sys.argv = words
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        was = getattr(sys, name)
        lines = name == "stderr" or os.isatty(number)
        raw = open(number, mode + "b", closefd=False)  # noqa: SIM115 - open as long as the process is
        stream = io.TextIOWrapper(raw, was.encoding, was.errors, "\n", lines, was.write_through)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))))

"""The keeper of cco_sidecar's agents: their parent, which writes down their output and ends and outlives the service.

A bare interpreter runs this file, ``python -I -S _keeper_program.py FOLDER SERVICE``: it imports neither cco_sidecar
nor a package, and has some 10 MB.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes as long to import as all the rest
    from collections.abc import Iterator
    from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)


def output_files(folder: str) -> list[tuple[int, str]]:
    """(offset of the first byte, path) of each file of an agent's output, oldest first. The agent itself can write in
    the folder: what has another name, or is no file, is passed over.
    """
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = re.fullmatch(r"output\.(0|[1-9][0-9]{0,17})\.log", entry.name)
            if match and entry.is_file(follow_symlinks=False):
                found.append((int(match[1]), entry.path))
    return sorted(found)


class OutputWriter:
    """What an agent writes, each line after the time at which it began to arrive, in two files of SEGMENT bytes or so
    at most.

    A file's name says how many bytes came before it, so a cursor stays true over rotation and crashes. A file begins
    with a line. Where the disk is full, or something else has the file's name, output is dropped, which is said as soon
    as there is room again, also behind the last of it; the agent is never blocked.
    """

    SEGMENT = 4 * 1024 * 1024
    LONGEST_LINE = 256 * 1024  # a longer one is broken, so that a file can end
    ROOM_SECONDS = 1.0  # between looks for room

    def __init__(self, folder: str) -> None:
        self._folder = folder
        files = output_files(folder)
        self._lost, self._reason, self._full, self._line = 0, "", False, 0
        self._file, self._place, self._size, self._fresh = -1, files[-1][0] if files else 0, 0, True
        with contextlib.suppress(OSError):  # then it is opened with the first that is written
            self._open(self._place)

    def _open(self, place: int) -> None:
        """Go on in the file of this name. Raises OSError, and then the one before stays open."""
        path = os.path.join(self._folder, f"output.{place}.log")
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            size = os.fstat(file).st_size
            fresh = os.lseek(file, 0, os.SEEK_END) == 0 or os.pread(file, 1, size - 1) == b"\n"  # a pipe has no end
        except OSError:
            os.close(file)
            raise
        if self._file >= 0:
            os.close(self._file)
        self._file, self._place, self._size, self._fresh = file, place, size, fresh

    def write(self, chunk: bytes, now: float) -> None:
        """Append what was read at ``now``."""
        stamp = self._stamp(now)
        if self._lost and not self._admit(stamp):
            self._lost += len(chunk)
            return
        text = (stamp if self._fresh else b"") + chunk.replace(b"\n", b"\n" + stamp)
        text = text[: -len(stamp)] if chunk.endswith(b"\n") else text
        self._line = len(chunk) - 1 - chunk.rfind(b"\n") + (0 if b"\n" in chunk else self._line)
        if self._line > self.LONGEST_LINE:
            text, self._line = text + b"\n", 0
        if self._size + len(text) > self.SEGMENT and (end := text.rfind(b"\n") + 1):
            self._append(text[:end])
            self._rotate()
            text = text[end:]
        self._append(text)

    def close(self) -> None:
        """End, once it is said what was lost: while the disk is full, that takes until there is room."""
        while self._lost and not self._admit(self._stamp(time.time())) and self._full:
            time.sleep(self.ROOM_SECONDS)
        if self._file >= 0:
            os.close(self._file)

    def _stamp(self, now: float) -> bytes:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)).encode() + b".%03dZ " % (now % 1 * 1000)

    def _admit(self, stamp: bytes) -> bool:
        """Say what was lost; whether there is room for that."""
        lost, self._lost = self._lost, 0
        self._append(
            (b"" if self._fresh else b"\n") + stamp + f"[{lost} bytes were lost here: {self._reason}]\n".encode()
        )
        self._line, again = 0, self._lost > 0
        self._lost += lost if again else 0
        return not again

    def _append(self, text: bytes) -> None:
        try:
            if self._file < 0:
                self._open(self._place)
            while text:
                written = os.write(self._file, text)
                self._size += written
                self._fresh = text[written - 1 : written] == b"\n"
                text = text[written:]
        except OSError as error:
            self._lost += len(text)
            self._reason, self._full = error.strerror or "unknown", error.errno in FULL

    def _rotate(self) -> None:
        """Begin another file; only the one before it is kept."""
        before = self._place
        try:
            self._open(before + self._size)
        except OSError as error:  # no room for a new file: go on with the old one
            self._reason = error.strerror or "unknown"
            return
        for place, path in output_files(self._folder):
            if place < before:
                with contextlib.suppress(OSError):  # the agent may have removed it
                    os.unlink(path)


class KeeperProgram:
    """One JSON order a line on stdin, one JSON line of news each on stdout.

    An agent's output goes through a named pipe that the agent itself holds open for reading too: without a keeper it
    waits when the pipe is full and is never ended by SIGPIPE, and the next keeper finds the pipe by its name. A kernel
    limit that nothing uses (RLIMIT_LOCKS, since Linux 2.4.25) carries the agent's mark: it is inherited by whatever the
    agent starts, and neither setsid nor another environment takes it off.
    """

    PIPE = "output.pipe"
    PID = "pid"  # locked until END is written
    END = "exit"
    GATE = "agents.lock"
    RLIMIT_LOCKS = 10
    SET_CHILD_SUBREAPER = 36

    def __init__(self, folder: str, service: str) -> None:
        self._folder, self._service = folder, int(service)
        self._agents: dict[int, tuple[str, int]] = {}  # by its first process: an agent, and its open note
        self._unwritten: dict[str, tuple[int, dict[str, Any]]] = {}
        self._starting = False
        self._unclaimed: dict[int, dict[str, Any]] = {}  # what ended while a start goes on, whose pid is not known yet
        self._copying: set[threading.Thread] = set()

    def run(self) -> None:
        if sys.platform == "linux":
            import ctypes

            ctypes.CDLL(None).prctl(
                self.SET_CHILD_SUBREAPER, 1, 0, 0, 0
            )  # orphans of the agents become our children, not init's
        if sys.platform != "win32":
            signal.signal(signal.SIGCHLD, lambda *_: self._reap())
        for line in sys.stdin.buffer if sys.platform == "win32" else self._orders():
            if line.endswith(b"\n"):  # else the service died in the middle of a word
                order = json.loads(line)
                self._starting = "start" in order
                self._start(**order) if self._starting else self._follow(order["follow"])
                self._starting = False
        while self._has_children() or self._unwritten or any(thread.is_alive() for thread in self._copying):
            time.sleep(0.1)
            for agent in list(self._unwritten):
                self._write_end(agent)

    def _orders(self) -> Iterator[bytes]:
        """The lines of stdin. A signal that comes a moment before a read, or to another thread, interrupts none, and
        its handler would wait for the next order: so what is waited for is also the byte that Python writes for each.
        """
        woken, waker = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        poll, text, more = select.poll(), b"", True
        poll.register(0, select.POLLIN)
        poll.register(woken, select.POLLIN)
        while more:
            ready = [file for file, _ in poll.poll()]
            if woken in ready:
                os.read(woken, 4096)  # the handler runs before the next line of ours
            if 0 in ready:
                found = os.read(0, 65_536)
                more = bool(found)
                *lines, text = (text + found).split(b"\n")
                yield from (line + b"\n" for line in lines)
        signal.set_wakeup_fd(-1)

    def _tell(self, **news: Any) -> None:
        with contextlib.suppress(OSError):  # the service is gone
            os.write(1, json.dumps(news).encode() + b"\n")

    # -- starting

    def _start(self, start: str, root: str, **what: Any) -> None:
        """Start an agent: ``what`` are the arguments of ``_spawn`` except the output."""
        try:
            os.chdir(root)
            if sys.platform == "win32":
                return self._start_on_windows(start, **what)
            note = self._open_note(start)
            try:
                pid, reader = self._spawn_with_pipe(start, what)
            except OSError:
                os.close(note)
                raise
        except OSError as error:
            return self._tell(agent=start, errno=error.errno, reason=error.strerror)
        with contextlib.suppress(OSError):  # no room on the disk: then the oldest process is taken for it
            os.write(note, b"%d" % pid)
        self._agents[pid] = (start, note)
        self._tell(agent=start, pid=pid)
        self._copy(start, reader)
        if pid in self._unclaimed:
            self._ended(pid, self._unclaimed.pop(pid))

    def _open_note(self, agent: str) -> int:
        """For a service that is killed before it has read what we tell. Without the pid in it a daemon of the agent
        could be taken for the agent; its lock, which dies with us, says that we shall write down how the agent
        ended.
        """
        import fcntl

        note = os.open(self._path(agent, self.PID), os.O_WRONLY | os.O_CREAT, 0o600)
        fcntl.flock(note, fcntl.LOCK_EX)
        return note

    def _spawn_with_pipe(self, agent: str, what: dict[str, Any]) -> tuple[int, int]:
        """The pid of the new process, and where its output is read. Raises OSError."""
        reader, writer = self._make_pipe(agent)
        try:
            return self._spawn(output=writer, **what), reader
        except OSError:
            os.unlink(self._path(agent, self.PIPE))
            os.close(reader)
            raise
        finally:
            os.close(writer)

    def _make_pipe(self, agent: str) -> tuple[int, int]:
        path = self._path(agent, self.PIPE)
        os.mkfifo(path, 0o600)
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK), os.open(path, os.O_RDWR)

    def _spawn(
        self, program: str, argv: list[str], environment: dict[str, str], stdin: str, mark: int, output: int
    ) -> int:
        """The pid of the new process. Raises OSError, also where the service has died meanwhile: nobody would know of
        it.
        """
        import fcntl

        gate = os.open(os.path.join(os.path.dirname(self._folder), self.GATE), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(gate, fcntl.LOCK_EX)
            if os.getppid() != self._service:
                raise OSError(5, "the service is gone")
            self._unclaimed.clear()
            self._set_mark(mark)
            files = [
                (os.POSIX_SPAWN_OPEN, 0, stdin or os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
            ]
            ignored = [signal.SIGPIPE, signal.SIGXFSZ]  # by this interpreter, and so by what it starts
            return os.posix_spawn(
                program, argv, environment, file_actions=files, setsid=True, setsigmask=[], setsigdef=ignored
            )
        finally:
            self._set_mark(None)
            os.close(gate)

    def _set_mark(self, mark: int | None) -> None:
        if sys.platform == "linux":
            import resource

            with contextlib.suppress(
                ValueError, OSError
            ):  # somebody has set a hard limit: AGENT_ID and the session still tell
                hard = resource.getrlimit(self.RLIMIT_LOCKS)[1]
                resource.setrlimit(self.RLIMIT_LOCKS, (hard if mark is None else mark, hard))

    def _start_on_windows(
        self, agent: str, program: str, argv: list[str], environment: dict[str, str], stdin: str, mark: int
    ) -> None:
        with open(stdin or os.devnull, "rb") as source:
            process = subprocess.Popen(
                argv, executable=program, env=environment, stdin=source, stdout=-1, stderr=-2, creationflags=0x200
            )
        open(self._path(agent, self.PIPE), "wb").close()
        self._tell(agent=agent, pid=process.pid)
        assert process.stdout
        self._copy(agent, process.stdout.fileno())
        self._agents[process.pid] = agent, os.open(self._path(agent, self.PID), os.O_WRONLY | os.O_CREAT)
        threading.Thread(
            target=lambda: self._ended(process.pid, {"code": process.wait(), "cpu": 0.0, "memory": 0}), daemon=True
        ).start()

    # -- output

    def _follow(self, agent: str) -> None:
        with contextlib.suppress(OSError):  # no pipe: all of its output has been written down
            self._copy(agent, os.open(self._path(agent, self.PIPE), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))

    def _copy(self, agent: str, reader: int) -> None:
        self._copying = {thread for thread in self._copying if thread.is_alive()}
        thread = threading.Thread(target=self._copy_all, args=(agent, reader), daemon=True)
        self._copying.add(thread)
        thread.start()

    def _copy_all(self, agent: str, reader: int) -> None:
        """Write an agent's output down until nobody is left who could write; of several keepers one at a time does."""
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(reader, fcntl.LOCK_EX)
            os.set_blocking(reader, True)
        output = OutputWriter(self._path(agent, ""))
        while chunk := os.read(reader, 16 * 1024):
            output.write(chunk, time.time())
        with contextlib.suppress(OSError):  # the agent's whole folder may be gone
            os.unlink(self._path(agent, self.PIPE))
        os.close(reader)
        output.close()

    def _path(self, agent: str, name: str) -> str:
        return os.path.join(self._folder, agent, name)

    # -- ends

    def _has_children(self) -> bool:
        if sys.platform == "win32":
            return False
        self._reap()
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    def _reap(self) -> None:
        """Collect whatever has ended: agents, and orphans that they have left."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if not pid:
                    return
                unit = 1 if sys.platform == "darwin" else 1024
                facts = {
                    "code": os.waitstatus_to_exitcode(status),
                    "cpu": usage.ru_utime + usage.ru_stime,
                    "memory": usage.ru_maxrss * unit,
                }
                if pid in self._agents:
                    self._ended(pid, facts)
                elif self._starting:  # of the many orphans of a long time nothing is kept
                    self._unclaimed[pid] = facts

    def _ended(self, pid: int, facts: dict[str, Any]) -> None:
        agent, note = self._agents.pop(pid)
        facts["time"] = time.time()
        self._unwritten[agent] = note, facts
        self._tell(agent=agent, ended=facts)  # first: of many that end together the last is not to wait for all writes
        self._write_end(agent)

    def _write_end(self, agent: str) -> None:
        """Write down how an agent ended, in one step; where the disk is full, again before we end."""
        note, facts = self._unwritten[agent]
        path = self._path(agent, self.END)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + "~")
            file = os.open(
                path + "~", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600
            )  # nothing that the agent may have put there
            try:
                os.write(file, json.dumps(facts).encode())
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(path + "~", path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(path + "~")
            if error.errno in FULL:
                return
        del self._unwritten[agent]
        os.close(note)


if __name__ == "__main__":
    KeeperProgram(*sys.argv[1:]).run()

"""The program around a command, whatever its caller has left it: standard streams that are closed, full or of another
encoding, and words and variables that nothing reads.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import errno
import functools
import io
import json
import logging
import math
import os
import re
import select
import signal
import stat
import sys
import time
import typing
from collections.abc import Callable, Iterator
from typing import Any

from cco_sidecar_plugins._fitting import fitting

with fitting():
    from cco_sidecar import GOOD, REFUSED, Program, StartError, complain, option_table
    from cco_sidecar_plugins._words import nearest

log = logging.getLogger("cco")


class WholeProgram(Program):
    def run(self, words: list[str]) -> int:
        with fitting():
            return self.run_whole(words)

    def run_whole(self, words: list[str]) -> int:
        hold_standard_streams()
        take_signals()
        if not os.environ.get("HOME", "unset"):
            del os.environ["HOME"]  # Python and git take an empty one for "/"
        code = super().run(words)
        unwritten = drop_unwritten(sys.stdout)
        if unwritten and not isinstance(unwritten, BrokenPipeError) and code == GOOD:
            complain(f"output cannot be written: {unwritten.strerror}")
            code = REFUSED
        drop_unwritten(sys.stderr)
        return code

    def parse(self, words: list[str]) -> argparse.Namespace:
        from cco_sidecar_plugins.commands import _command_line

        with writing():
            options = _command_line.parse(words)
        for name, value in vars(options).items():
            texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
            if name not in option_table() and any(re.search(r"[\ud800-\udfff]", text) for text in texts):
                raise StartError(f"argument {name}: {value!r} is not UTF-8")  # other bytes arrive as lone surrogates
        for name in sorted(name for name in os.environ if name.startswith("CCO_SIDECAR_")):
            if (option := name.removeprefix("CCO_SIDECAR_").lower()) not in option_table():
                close = nearest(option, option_table())
                meant = f", did you mean CCO_SIDECAR_{close.upper()}?" if close else ""
                complain(f"{name}: unknown variable{meant}")
        if options.run is not _command_line.serve:  # which takes signals by its event loop
            options.run = interruptible(options.run)
        options.run = writing()(options.run)
        return options


def interruptible(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """``run``, a command that ends what it started: in it SIGINT, SIGTERM and SIGHUP are a KeyboardInterrupt, and 128
    with the signal's number is its exit code then. Before and after that they end the program at once, so that no
    module that is imported then has a traceback.
    """

    taken = int(signal.SIGINT)

    def interrupt(number: int, _: Any) -> None:
        nonlocal taken
        taken = number
        raise KeyboardInterrupt

    def interrupted(options: argparse.Namespace) -> int:
        try:
            with handling_signals(interrupt):
                return run(options)
        except KeyboardInterrupt:
            return 128 + taken

    return interrupted


@contextlib.contextmanager
def handling_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP call ``handler``, but for one that is ignored, as SIGINT is of a job in the
    background.
    """
    hangup = () if sys.platform == "win32" else (signal.SIGHUP,)
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
    taken = [number for number, before in found.items() if before not in (signal.SIG_IGN, None)]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, found[number])


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """While output is written. Raises StartError where that cannot be, and ends the command where nobody reads on."""
    try:
        yield
    except BrokenPipeError:  # as in `cco events list | head -1`
        raise SystemExit(GOOD) from None
    except StartError as error:
        from cco_sidecar_plugins._files import explained

        cause = error.__context__
        if not isinstance(cause, PermissionError):
            raise
        raise StartError(str(error).replace(str(cause), explained(cause)), error.exit_code) from None
    except OSError as error:
        from cco_sidecar_plugins._files import explained

        problem = explained(error) if error.filename else f"output cannot be written: {error.strerror}"
        raise StartError(problem, REFUSED) from error


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """While standard input is read. Raises StartError where that cannot be."""
    try:
        yield
    except OSError as error:
        raise StartError(f"standard input cannot be read: {error.strerror}") from None


class LogLines(logging.StreamHandler[typing.TextIO]):
    """Lines for a reader that may stop: a full pipe is waited for once, for a second; then lines are dropped.

    What a turn of the event loop logs is written in one piece at its end, or before an error. Where every turn logs, a
    piece is what PAUSE seconds bring: writing costs a fifth of answering a short request. No single write is larger
    than what a pipe takes at once.

    The same error, of a full disk say, is told once in MINUTE seconds, then with how often it came since.
    """

    PATIENCE = 1.0  # seconds
    MINUTE = 60.0
    PAUSE = 0.05
    AT_ONCE = 1.0  # seconds whose pieces, twenty, may come all together: what is written now and then does not wait

    _full = False
    _not_before = 0.0  # of the loop's clock
    _owed = ""  # the end of a line whose second half was dropped

    def __init__(self, stream: typing.TextIO) -> None:
        super().__init__(stream)
        self._write_now = direct_writer(stream)
        self._lines: list[str] = []
        self._errors: dict[str, tuple[float, int]] = {}  # when each was told, and how often it came since; oldest first
        logging._srcfile = None  # as Python's documentation says: no line tells from where
        logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False

    def setFormatter(self, fmt: logging.Formatter | None) -> None:
        super().setFormatter(PlainFormatter() if type(fmt) is logging.Formatter else fmt)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if record.levelno >= logging.ERROR and not self._is_news(record):
                return
            self._lines.append(self.format(record) + self.terminator)
        except Exception:  # a boundary, as in every handler: what is logged may be of anybody's class
            self.handleError(record)
        if record.levelno >= logging.ERROR:
            self.flush()
        elif len(self._lines) == 1:
            self._flush_soon()

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Whether an error was not told within the last MINUTE; its text gets how often it came since."""
        text, now = record.getMessage(), time.monotonic()
        told, since = self._errors.pop(text, (-math.inf, 0))
        news = now - told >= self.MINUTE
        if news and since:
            record.msg, record.args = f"{text} ({since} times more since it was told last)", ()
        if len(self._errors) >= 100:
            del self._errors[next(iter(self._errors))]
        self._errors[text] = (now, 0) if news else (told, since + 1)
        return news

    def emit_line(self, template: str, *facts: Any) -> bool:
        """Do what ``emit`` does, of a line at INFO, without a record of it, which costs more than all else of a line.
        False where something else would see the record.
        """
        root, plain = logging.root, type(self.formatter) is PlainFormatter
        if not plain or self.filters or root.handlers != [self] or log.handlers or log.filters or not log.propagate:
            return False
        moment = time.time()
        line = f"{local_second(int(moment))},{int(moment % 1 * 1000):03} INFO {template % facts}{self.terminator}"
        with self.lock or contextlib.nullcontext():
            self._lines.append(line)
            if len(self._lines) == 1:
                self._flush_soon()
        return True

    def _flush_soon(self) -> None:
        """At once where no event loop runs here."""
        if (loop := asyncio._get_running_loop()) is None:
            return self.flush()
        now = loop.time()
        begin = max(now, self._not_before)
        self._not_before = max(now - self.AT_ONCE, self._not_before) + self.PAUSE
        loop.call_at(begin, self.flush) if begin > now else loop.call_soon(self.flush)

    def flush(self) -> None:
        with self.lock or contextlib.nullcontext():
            lines, self._lines = self._lines, []
            text, begin = self._owed + "".join(lines), 0
            until = time.monotonic() + (0 if self._full else self.PATIENCE)
            with contextlib.suppress(OSError, ValueError):  # full or closed: nobody reads
                while begin < len(text) and self._is_taken(until):
                    end = end_of_piece(text, begin)
                    self._write(text[begin:end])
                    begin = end
            if begin:
                self._owed = "" if text[begin - 1] == "\n" else self.terminator

    def _write(self, piece: str) -> None:
        if self._write_now is None:
            self.stream.write(piece)
            return super().flush()
        content = piece.encode(self.stream.encoding, "backslashreplace")
        while content:
            content = content[self._write_now(content) :]

    def _is_taken(self, until: float) -> bool:
        with contextlib.suppress(OSError, ValueError):  # no file of the system's, or on Windows no socket
            self._full = not select.select((), (self.stream,), (), max(0, until - time.monotonic()))[1]
        return not self._full


def direct_writer(stream: typing.TextIO) -> Callable[[bytes], int] | None:
    """What writes bytes to the file of ``stream`` past its lock, which a plugin's thread may hold for as long as nobody
    reads, and raises BlockingIOError where the room in a pipe was filled meanwhile. None for what is no such file.
    """
    try:
        is_pipe = stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return None
    if sys.platform == "win32":
        return None

    def write(content: bytes) -> int:
        number = stream.fileno()  # asked for each time: the number of a file that was closed may be another's
        if is_pipe and DO_NOT_WAIT:
            try:
                return os.pwritev(number, [content], -1, DO_NOT_WAIT)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):  # as with older kernels
                    raise
        return os.write(number, content)

    return write


DO_NOT_WAIT = getattr(os, "RWF_NOWAIT", 0)  # Linux has it, but not with every C library


class PlainFormatter(logging.Formatter):
    """What the core's format gives, in a third of the time."""

    def format(self, record: logging.LogRecord) -> str:
        moment = local_second(int(record.created))
        line = f"{moment},{record.msecs:03.0f} {record.levelname} {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


@functools.lru_cache(2)
def local_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def end_of_piece(text: str, begin: int) -> int:
    """Where the piece of ``text`` ends that a pipe takes whole once it takes anything: after a line, if one ends there.

    A larger write may find room for a part, and waits for the reader with the rest.
    """
    size = getattr(select, "PIPE_BUF", 512)
    end = begin + size
    if not text.isascii():
        end = begin + size // 10  # bytes of the longest escape of a character
    return len(text) if end >= len(text) else text.rfind("\n", begin, end) + 1 or end


def hold_standard_streams() -> None:
    """Open the standard streams that the caller closed, so that no file or socket of ours gets their numbers, and let
    standard output escape what it cannot encode.
    """
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:  # output then fails as on a closed stream; nobody hears complaints
            handle = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            os.set_inheritable(handle, True)
            setattr(sys, name, os.fdopen(handle, mode, encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=escape_unencodable.__name__)


def take_signals() -> None:
    """Undo what a parent may have left to this process and its children. A blocked SIGTERM would end nobody. Where
    SIGCHLD is ignored the system forgets how children ended, and every failure of git looks like a success.
    """
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def escape_unencodable(error: UnicodeError) -> tuple[str, int]:
    """Error policy of standard output: what it cannot encode is written as JSON writes it."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error(escape_unencodable.__name__, escape_unencodable)


def drop_unwritten(stream: typing.TextIO) -> OSError | None:
    """Flush ``stream``. Where that fails returns the error and drops what is left, lest the interpreter's own flush at
    the end fails too.
    """
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None

"""What ``cco run`` shows: a line for each happening and a table at the end, or one JSON object a line."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cco_sidecar import StartError, iso
from cco_sidecar_plugins._terminal import plain
from cco_sidecar_plugins._words import counted
from cco_sidecar_plugins.commands._printing import cut, duration, print_table, reader_poll

LINE_WIDTH = 200  # columns that a text of an agent's has in a line


class NotWritten(Exception):
    """Standard output takes nothing more: its reader has gone, or it is ``full``."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"output cannot be written: {error.strerror}")
        self.full = not isinstance(error, BrokenPipeError)


@contextlib.contextmanager
def written() -> Iterator[None]:
    """What is printed in here is written when this ends. Raises NotWritten; what is printed after that goes nowhere."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise NotWritten(error) from None


class View:
    """Gets every happening by name with its facts, and here shows nothing. ``pace`` is how often it wants to see a
    running agent, in seconds."""

    pace = 10.0

    def __init__(self) -> None:
        self._began, self._reader_poll = time.monotonic(), reader_poll()

    def tell(self, event: str, **facts: Any) -> None:
        pass

    def progress(self, agent: dict[str, Any], elapsed: float, line: str, *, changed: bool) -> None:
        """The agent still runs; ``line`` is the last that it wrote, ``changed`` where it is another one than before.
        Raises NotWritten where the reader has gone, as it may have a long time before there is something to write.
        """
        if self._reader_poll and self._reader_poll(0):
            with written():
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        if changed and line:
            who = {name: agent[name] for name in ("agent_id", "agent_type")}
            self.tell("agent_output", **who, seconds=round(elapsed, 2), line=line)

    def give_up(self, error: StartError) -> None:
        """The command ends with ``error``, which is said on stderr."""

    def clear(self) -> None:
        """What others print next begins a line. May be called by a signal's handler."""


class JsonView(View):
    """One JSON object a line."""

    def give_up(self, error: StartError) -> None:
        with contextlib.suppress(NotWritten):  # the error itself still is to be said
            facts = {"state": "error", "reason": str(error), "exit_code": error.exit_code}
            self.tell("pipeline_ended", **facts, seconds=round(time.monotonic() - self._began, 2), agents=[])

    def tell(self, event: str, **facts: Any) -> None:
        row = json.dumps({"event": event, "timestamp": iso(), **facts}, ensure_ascii=False)
        with written():
            sys.stdout.write(f"{row}\n")  # in one: Ctrl-C must not come between


class TableView(View):
    """A line for each happening with the seconds since the start, and the summary as a table."""

    def tell(self, event: str, **facts: Any) -> None:
        with written():
            for line in LINES[event](facts):
                self._print(f"{time.monotonic() - self._began:7.2f} s  {plain(line)}\n")
            if event == "pipeline_ended" and facts["agents"]:
                print()
                print_table(list(SUMMARY), [[plain(show(row)) for show in SUMMARY.values()] for row in facts["agents"]])

    def _print(self, line: str) -> None:
        sys.stdout.write(line)


class LiveView(TableView):
    """On a terminal: the running agent's line is written again and again in its place."""

    pace = 1.0

    def progress(self, agent: dict[str, Any], elapsed: float, line: str, *, changed: bool) -> None:
        shown = (
            f"{time.monotonic() - self._began:7.2f} s  {agent['agent_type']} {agent['state']} {elapsed:.0f} s "
            f" {plain(line)}"
        )
        with written():
            sys.stdout.write(f"\r\x1b[K{cut(shown, shutil.get_terminal_size().columns - 1)}")

    def _print(self, line: str) -> None:
        sys.stdout.write(f"\r\x1b[K{line}")

    def clear(self) -> None:
        with contextlib.suppress(OSError):  # the terminal has gone: there is nothing to clear
            os.write(sys.stdout.fileno(), b"\r\x1b[K")


def view_of(options: argparse.Namespace) -> View:
    return JsonView() if options.format == "json" else LiveView() if sys.stdout.isatty() else TableView()


def started_line(facts: dict[str, Any]) -> Iterable[str]:
    how = "goes on" if facts["going_on"] else "begins"
    yield f"{facts['issue_id']} {how} at {facts['url']}" + (
        ", a service of its own" if facts["service"] == "its own" else ""
    )


def ended_line(facts: dict[str, Any]) -> Iterable[str]:
    number, about = facts["files_changed"], f"{facts['status'] or facts['state']} after {duration(facts['seconds'])}"
    if number is not None:
        about += f", {counted(number, 'file')} changed"
    elif facts["source"] == "sidecar":  # of a result that the pipeline made, and of none, nobody expects them
        about += ", which files it changed is not known"
    yield f"{facts['agent_type']} {about}" + (f": {cut(facts['decision'], LINE_WIDTH)}" if facts["decision"] else "")
    if facts["source"] == "sidecar" and facts["status"] == "success":
        yield "  it stored no result: that it ended with 0 and changed files is taken as success"
    elif facts["source"] == "sidecar":
        yield "  it stored no result, so it counts as failed: the service made it of its last lines and git's diff"
    for item in facts["next_agents"]:
        yield f"  next: {item['agent_type']} ({item['priority']}), {item['reason']}"


LINES: dict[str, Callable[[dict[str, Any]], Iterable[str]]] = {  # event: its lines
    "pipeline_started": started_line,
    "agent_started": lambda facts: [
        f"{facts['agent_type']} started, pid {facts['pid']} ({facts['priority']}), {facts['reason']}"
    ],
    "agent_found": lambda facts: [f"{facts['agent_type']} found, pid {facts['pid']}, started {facts['seconds']} s ago"],
    "agent_output": lambda facts: [f"{facts['agent_type']}: {cut(facts['line'], LINE_WIDTH)}"],
    "agent_ended": ended_line,
    "waiting": lambda facts: [f"waits {'at most ' if facts['at_most'] else ''}{facts['seconds']} s: {facts['reason']}"],
    "note": lambda facts: [facts["reason"]],
    "pipeline_ended": lambda facts: [f"{facts['state']}: {facts['reason']}"],
}

SUMMARY: dict[str, Callable[[dict[str, Any]], str]] = {  # column: what it shows of an agent
    "type": lambda row: row["agent_type"],
    "state": lambda row: row["state"],
    "time": lambda row: duration(row["seconds"]),
    "result": lambda row: row["status"] or "none",
    "files": lambda row: "?" if row["files_changed"] is None else str(row["files_changed"]),
    "decision": lambda row: row["decision"],
    "why": lambda row: row["reason"],
}

"""The commands ``cco hook`` and ``cco wait``: what coding programs run at moments of a user's own session.

Neither may disturb the session: whatever goes wrong in it, ``cco hook`` prints nothing and ends with 0; with
CCO_SIDECAR_LOG_LEVEL=debug it says on standard error what did. A program that it does not know it refuses.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

import msgspec
import psutil

from cco_sidecar import GOOD, READ, REFUSED, Settings, StartError, hookimpl, mint_token
from cco_sidecar_plugins._called import own_command
from cco_sidecar_plugins._program import reading
from cco_sidecar_plugins.agents._hook_settings import DIALECTS, PATIENT
from cco_sidecar_plugins.commands._client import Client, NotReachable, Refused
from cco_sidecar_plugins.commands._mcp_bridge import for_own_tree, session_process, session_subject
from cco_sidecar_plugins.commands._running import with_secret
from cco_sidecar_plugins.commands._table import Command, add_commands, arg, number

WOKEN = 2  # the exit code by which claude takes what stands on standard error for a prompt
SLICE = 30  # seconds of one poll
INPUT = 16 * 1024 * 1024


@hookimpl
def register_commands(commands: Any) -> None:
    add_commands(commands, COMMANDS)


class SessionClient(Client):
    """A client with a token in the name of a session's tools, which reads and does nothing else."""

    def __init__(self, options: argparse.Namespace, given: dict[str, Any]) -> None:
        name = str(given["session_id"])
        of_its_tools = session_subject(options.program, getattr(options, "session_pid", None))
        self._subject = of_its_tools or f"session-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        super().__init__(options)

    def _find_token(self) -> str:
        """The agent's own token where one calls, else a session's: not that of ``cli``, whose events it is to hear."""
        own = self._environ.get("CCO_TOKEN_FILE") or self._environ.get("JWT_TOKEN")
        if own or not self._settings:
            return super()._find_token()
        known = msgspec.structs.replace(self._settings, no_plugins=True)
        return mint_token(with_secret(known), "chief-architect", self._subject, permissions=[READ], bound=True)

    def _advice(self, settings: Settings) -> str:
        """Looks at no port and no other work tree: a session waits for its hooks, and nobody reads what they say."""
        return f"start it with `{own_command(settings)}`"


def command_hook(options: argparse.Namespace) -> int:
    """Hand on what a program gives its hook, and print the answer, if there is one."""
    if options.program not in DIALECTS:  # not with 2, by which some programs cancel a tool
        raise StartError(f"hook: {options.program!r} is none of {', '.join(DIALECTS)}", REFUSED)
    try:
        answer_hook(options)
    except Exception:  # a boundary: the session goes on
        if os.environ.get("CCO_SIDECAR_LOG_LEVEL") == "debug":
            traceback.print_exc()
    return GOOD


def answer_hook(options: argparse.Namespace) -> None:
    """What ``command_hook`` does where nothing goes wrong."""
    given = read_hook_input()
    event = options.event or str(given.get("hook_event_name", ""))
    patient = DIALECTS[options.program].moment(event) == "permission"
    if options.program == "codex":  # which reads the hooks of the main work tree, also in a linked one
        options = for_own_tree(options)
    client = SessionClient(options, given)
    path, query = f"/api/hooks/{options.program}", {"event": event}
    answer = client.call("POST", path, given, query=query, timeout=PATIENT if patient else 5)
    if answer:
        print(json.dumps(answer))
    if options.queue and DIALECTS[options.program].moment(event) == "stop" and not answer:
        wait_apart(options, given)


def read_hook_input() -> dict[str, Any]:
    """The JSON object on standard input, empty where a program gives none, with the session as ``session_id``, whatever
    the program calls it. Raises ValueError.
    """
    with reading():
        content = sys.stdin.buffer.read(INPUT + 1) if not sys.stdin.isatty() else b""
    given = json.loads(content or b"{}")
    if len(content) > INPUT or not isinstance(given, dict):
        raise ValueError("no object, or too long")
    names = ("session_id", "sessionId", "sessionID")  # copilot has the second
    return given | {"session_id": next((given[name] for name in names if given.get(name)), "")}


def command_wait(options: argparse.Namespace) -> int:
    """Wait for an event that the session is to hear of: print it, with --rewake on standard error, and end with 2."""
    try:
        session = psutil.Process(options.session_pid) if options.session_pid else process_of(options.program)
        if options.rewake and ends_by_itself(session.cmdline()):  # but not before this does
            return GOOD
    except psutil.Error:
        return GOOD
    over = threading.Event()
    threading.Thread(target=end_with, args=(session, over), daemon=True).start()
    try:
        return wait_and_tell(options)
    finally:
        over.set()


def wait_and_tell(options: argparse.Namespace) -> int:
    """What ``command_wait`` does while the session lives."""
    try:
        given = read_hook_input()
    except (ValueError, RecursionError) as error:
        raise StartError(f"standard input is not what a hook is given: {error}") from None
    text = wait_for_news(options, given)
    if not text:
        return GOOD
    if options.queue:
        message = ["codex", "queue", "--thread", str(given["session_id"]), "--message", text]
        return subprocess.run(message, stdin=subprocess.DEVNULL, timeout=60).returncode
    print(text, file=sys.stderr if options.rewake else sys.stdout)
    return WOKEN if options.rewake else GOOD


def ends_by_itself(words: list[str]) -> bool:
    """Whether a session answers one prompt: one of a program that feeds it prompts by a stream goes on."""
    return bool({"-p", "--print"} & set(words)) and not any(word.startswith("--input-format") for word in words)


def wait_for_news(options: argparse.Namespace, given: dict[str, Any]) -> str:
    """The text of the events that came, "" where none did in time or the session goes on without."""
    deadline, client, began = time.monotonic() + options.timeout, None, False
    while (left := deadline - time.monotonic()) > 0:
        try:
            client = client or SessionClient(options, given)
            query = {"timeout": int(min(left, SLICE) * 1000)}
            path = f"/api/hooks/{options.program}/wait"
            news = client.call("POST", path, given, query=query, timeout=SLICE + 30)
            began = True
        except (NotReachable, Refused):
            if not began and not options.rewake:
                raise
            if not began:  # a hook says nothing
                return ""
            client = None  # it may be started again
            time.sleep(min(left, 2))
            continue
        if news["text"] or news["over"]:
            return str(news["text"])
    return ""


def process_of(program: str) -> psutil.Process:
    """The process of the session, our parent where none is called like its program. Raises psutil.Error, also where
    that is outside of the container that we are in.
    """
    if process := session_process(program) or psutil.Process().parent():
        return process
    raise psutil.NoSuchProcess(os.getppid())


def end_with(session: psutil.Process, over: threading.Event) -> None:
    """End this process when the session's has ended, since nobody is left to be woken, unless the command is over."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while session.is_running() and session.status() != psutil.STATUS_ZOMBIE:
            if over.wait(1):
                return
    os._exit(GOOD)


def wait_apart(options: argparse.Namespace, given: dict[str, Any]) -> None:
    """Wait in a process of its own, for a program whose hooks cannot, as long as the session lives."""
    words = [sys.executable, sys.argv[0], "wait", "--queue", "--program", options.program]
    words += ["--session-pid", str(process_of(options.program).pid)]
    for name in ("url", "root", "storage"):
        words += [f"--{name}", str(value)] if (value := getattr(options, name, None)) else []
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdin
    process.stdin.write(json.dumps({"session_id": given["session_id"]}).encode())
    process.stdin.close()


PROGRAM = arg("program", metavar="PROGRAM", help=", ".join(DIALECTS))
COMMANDS = {
    "hook": Command("answer a hook of a coding program, as its settings have it run", command_hook, [
        PROGRAM, arg("event", nargs="?", metavar="EVENT", help="for a program that does not say it on standard input"),
        arg("--queue", action="store_true", help="at the end of a turn wait for events, and queue them (codex)")],
        formats=("json",), section=""),
    "wait": Command("wait for an event that an idle session is to hear of", command_wait, [
        arg("--rewake", action="store_true", help="print it on standard error and end with 2, as claude wants it"),
        arg("--queue", action="store_true", help="hand it to `codex queue`"),
        arg("--program", choices=list(DIALECTS), default="claude", help="whose hook this is (default: claude)"),
        arg("--session-pid", type=number(1), metavar="PID", help="end with this process (default: the one around us)"),
        arg("--timeout", type=number(0, 86_400, float), default=3600.0, metavar="SECONDS",
            help="how long (default: 3600)")],
        formats=("text",), section=""),
}  # fmt: skip

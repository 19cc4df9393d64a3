"""The command ``cco mcp``: a program speaks MCP with it on standard input and output, and it with the service's /mcp.

So no settings file holds a token or a port: the bridge makes the session's token itself, anew before it ends, and finds
the service again after a restart, or when it starts after the session. It ends with its standard input. Each message
is handed on in a thread of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import sys
import threading
import time
import typing
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from cco_sidecar import (
    GOOD,
    MB,
    PERMISSIONS,
    WRONG_USE,
    StartError,
    birth_of,
    discover_root,
    is_identifier,
    mint_token,
    one_line,
    settings_from,
)
from cco_sidecar_plugins._program import reading
from cco_sidecar_plugins.commands._client import Client, Refused
from cco_sidecar_plugins.commands._printing import tell_of_terminal
from cco_sidecar_plugins.commands._running import (
    running_service,
    running_settings,
    settings_of_tree,
    with_secret,
    work_trees,
)

SESSION = "session"  # the agent type of connected sessions; their tokens are bound, as those of spawned agents
LIFE = 3600  # seconds of a session's token
RENEWED = LIFE / 2
MAX_LINE = 33 * MB
MOST = 1_000  # messages that are handed on or wait for room, of a thread each
SILENT = 60  # seconds; the service gives a sign of life every five
LAST_WORDS = 5.0  # seconds for answers that are under way when the program has gone
LOOK = "look whether what you asked for was done before you ask again"
VERSION = "io.modelcontextprotocol/protocolVersion"


def session_process(program: str) -> psutil.Process | None:
    """The process of the session around us: the nearest one that is called like its program, or whose script is."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            names = [process.name(), *(Path(word).name for word in process.cmdline()[:2])]
            if any(program in name for name in names):
                return process
    return None


def session_subject(program: str, pid: int | None = None) -> str | None:
    """In whose name a session speaks, by its tools and its hooks; None where its process is not found."""
    process = None if pid else session_process(program)
    pid = process.pid if process else pid
    birth = birth_of(pid) if pid else None
    return f"{SESSION}-{program}-{hashlib.sha256(f'{birth}/{pid}'.encode()).hexdigest()[:8]}" if birth else None


class SessionClient(Client):
    """A client with the token of a session, bound to a name that no other session has."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._subject = session_subject(options.program) or f"{SESSION}-{options.program}-{uuid.uuid4().hex[:8]}"
        self._made = 0.0
        self._options = options
        super().__init__(options)

    def _find_token(self) -> str:
        if not self._settings:  # an address was given
            return super()._find_token()
        self._made = time.monotonic()
        return mint_token(with_secret(self._settings), SESSION, self._subject, ttl=LIFE, bound=True)

    def open(self, content: bytes, headers: dict[str, str]) -> Any:
        """The open answer to a message. Raises StartError, and HTTPError for a refusal."""
        for last in (False, True):
            self._look_for_it()
            self._check_who_answers()
            if time.monotonic() > self._made + RENEWED:
                self.token = self._find_token()
            request = urllib.request.Request(f"{self.url}/mcp", content, headers, method="POST")
            request.add_header("Authorization", f"Bearer {self.token}")
            try:
                with cut_ones_told():
                    return self._opener.open(request, timeout=SILENT)
            except urllib.error.HTTPError as error:
                if error.code != 401 or last:
                    raise
                if self._settings:  # another storage may have another secret
                    self._settings = running_settings(settings_from(self._options))
                self.token = self._find_token()


@contextlib.contextmanager
def cut_ones_told() -> Iterator[None]:
    """Raises HTTPException, as http.client does of a connection that was ended, of one that was reset or is silent too,
    but not where the request has reached nobody, which is urllib's URLError.
    """
    try:
        yield
    except urllib.error.URLError:
        raise
    except OSError as error:
        raise http.client.HTTPException(str(error)) from error


class Message:
    """A line of the program's; ``cancels`` are those earlier ones that it takes back."""

    def __init__(self, line: bytes, earlier: Iterable[Message]) -> None:
        self.line, self.content = line.strip(), typing.cast(Any, None)
        self.problem = typing.cast(Exception | None, None)
        self.cancelled = self.sent = False
        self.known = threading.Event()  # the service has it, or will never get it
        try:
            self.content = json.loads(line)
        except (ValueError, RecursionError) as error:
            self.problem = error
        asked = self.content if isinstance(self.content, dict) else {}
        self.id, params = asked.get("id"), asked.get("params")
        named = params.get("requestId") if isinstance(params, dict) else None
        cancels = asked.get("method") == "notifications/cancelled" and named is not None
        self.cancels = [one for one in earlier if cancels and one.id == named]
        for one in self.cancels:
            one.cancelled = True


class NoMessage(Exception):
    """What the service answered is none."""


def object_in(content: bytes) -> dict[str, Any]:
    """The message that the service sent. Raises NoMessage."""
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError, RecursionError) as error:
        raise NoMessage(one_line(error)[:200]) from None


def next_line() -> bytes:
    """The program's next message, empty at the end. Raises StartError where nothing can be read."""
    with reading():
        return sys.stdin.buffer.readline(MAX_LINE)


class Bridge:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._client = options, typing.cast(SessionClient | None, None)
        self._connecting, self._writing = threading.Lock(), threading.Lock()
        self._room = threading.Semaphore(64)  # of requests: a cancellation passes by those that wait
        self._under_way: dict[threading.Thread, Message] = {}
        self._out = sys.stdout.buffer  # while plugins are loaded sys.stdout is another one

    def run(self) -> int:
        """Hand messages on until standard input ends."""
        while line := next_line():
            if not line.strip():
                continue
            message = Message(line, list(self._under_way.values()))
            if message.id is not None and len(self._under_way) >= MOST:
                message.problem = StartError(f"{MOST} calls are under way; ask again when one has ended")
            thread = threading.Thread(target=self._hand_on, args=(message,), daemon=True)
            self._under_way[thread] = message
            thread.start()
        deadline = time.monotonic() + LAST_WORDS
        for thread in list(self._under_way):
            thread.join(max(0.0, deadline - time.monotonic()))
        return GOOD

    def _hand_on(self, asked: Message) -> None:
        message = asked.content
        try:
            try:
                with contextlib.nullcontext() if asked.id is None or asked.problem else self._room:
                    self._answer(asked)
            except NoMessage as error:
                self._fail(message, -32000, f"what the service answered is no message: {error}; {LOOK}")
            except (ValueError, RecursionError) as error:
                self._fail(message, -32700, f"This is no message: {one_line(error)[:200]}")
            except http.client.HTTPException:  # the answer, or its beginning, was cut
                from cco_sidecar_plugins.http._mcp_protocol import CUT  # costs what only this needs

                self._fail(message, -32000, CUT)
            except (StartError, OSError) as error:
                if answer := told_without_service(message):
                    self._write(json.dumps(answer).encode())
                else:
                    self._fail(message, -32000, one_line(error))
        except BrokenPipeError:  # the program has gone
            os._exit(GOOD)
        finally:
            asked.known.set()
            del self._under_way[threading.current_thread()]

    def _answer(self, asked: Message) -> None:
        if asked.problem:
            raise asked.problem
        if asked.cancelled:  # while there was no room for it
            return
        for one in asked.cancels:  # the service knows of no call that has not reached it
            one.known.wait(SILENT)
        if asked.cancels and not any(one.sent for one in asked.cancels):
            return
        asked.sent = True
        with self._connecting:
            self._client = self._client or SessionClient(for_own_tree(self._options))
        try:
            answer = self._client.open(asked.line, headers_of(asked.content))
        except urllib.error.HTTPError as error:
            with error, cut_ones_told():
                self._refuse(asked.content, error.code, error.read(MB))
            return
        with answer, cut_ones_told():
            asked.known.set()
            if answer.headers.get_content_type() == "text/event-stream":
                self._hand_back(answer)
            elif content := answer.read().strip():
                object_in(content)
                self._write(content)

    def _hand_back(self, stream: Iterable[bytes]) -> None:
        """Write each message of a stream, of which the last one is the answer: how the stream ends after that is all
        the same. Raises IncompleteRead where it does not come, for which urllib ends a stream that was cut as one that
        is complete.
        """
        last, problem = dict[str, Any](), typing.cast(Exception, http.client.IncompleteRead(b""))
        try:
            for part in stream:
                if part.startswith(b"data:") and part.endswith(b"\n") and (content := part[5:].strip()):
                    last = object_in(content)
                    self._write(content)
        except (OSError, http.client.HTTPException) as error:
            problem = error
        if "id" not in last:
            raise problem

    def _refuse(self, message: Any, status: int, content: bytes) -> None:
        """Hand on a refusal: the protocol's own under the message's id, which the service may not have been able to
        read, any other as an error of the protocol.
        """
        try:
            error = dict(json.loads(content)["error"])
        except (ValueError, LookupError, TypeError, RecursionError):
            error = {"code": -32000, "message": str(Refused(status, content))}
        self._answer_error(message, error)

    def _fail(self, message: Any, code: int, problem: str) -> None:
        self._answer_error(message, {"code": code, "message": problem})

    def _answer_error(self, message: Any, error: dict[str, Any]) -> None:
        asked = message if isinstance(message, dict) else {"id": None}
        if "id" in asked:  # a notification is not answered
            self._write(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "error": error}).encode())

    def _write(self, content: bytes) -> None:
        with self._writing:
            self._out.write(content + b"\n")
            self._out.flush()


def for_own_tree(options: argparse.Namespace) -> argparse.Namespace:
    """The options for the work tree that the session works in, where a service runs for that or none for their root:
    claude has one entry for all work trees of a repository, and codex one set of hooks.
    """
    settings, own = settings_from(options), discover_root(Path.cwd())
    if own == settings.root or "storage" in settings.places or own not in work_trees(settings.root):
        return options
    here, elsewhere = (running_service(settings_of_tree(settings, root)) for root in (own, settings.root))
    return argparse.Namespace(**vars(options) | {"root": str(own)}) if here or not elsewhere else options


def told_without_service(message: Any) -> Any:
    """What a session may hear while no service runs: programs drop a server that does not introduce itself."""
    from cco_sidecar_plugins.http import mcp  # costs what only this needs

    return mcp.told_without_service(message, headers_of(message), PERMISSIONS)


def headers_of(message: Any) -> dict[str, str]:
    """What the protocol wants beside a message over HTTP, since revision 2026-07-28."""
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    params = message.get("params") if isinstance(message, dict) else None
    meta = params.get("_meta") if isinstance(params, dict) else None
    if isinstance(params, dict) and isinstance(meta, dict) and isinstance(meta.get(VERSION), str):
        told = {"MCP-Protocol-Version": meta[VERSION], "Mcp-Method": message.get("method")}
        told["Mcp-Name"] = params.get("uri" if message.get("method") == "resources/read" else "name")
        headers |= {name: text for name, text in told.items() if isinstance(text, str) and text.isascii()}
    return headers


def command_mcp(options: argparse.Namespace) -> int:
    if not is_identifier(options.program):
        raise StartError(f"PROGRAM: {options.program!r} is no program's name", WRONG_USE)
    tell_of_terminal("a program speaks MCP with this by standard input")
    return Bridge(options).run()

"""Takes no connections for a while where no more files can be opened, instead of failing at each turn of the loop."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Iterable
from typing import Any

import tornado.netutil

from cco_sidecar import Server

log = logging.getLogger("cco")

NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class PatientServer(Server):
    """Tornado's own accepting raises these errors, and is called again at once: the connection still waits."""

    PAUSE = 1.0  # seconds; asyncio's own servers wait as long

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        sockets = list(sockets)
        super().add_sockets(sockets)
        for listening in sockets:
            self._handlers[listening.fileno()]()  # ends Tornado's own accepting
            self._accept_from(listening)

    def _accept_from(self, listening: socket.socket) -> None:
        if not self._stopped:
            source: Any = Accepting(listening, self._pause)
            number = listening.fileno()
            self._handlers[number] = tornado.netutil.add_accept_handler(source, self._handle_connection)

    def _pause(self, listening: socket.socket, error: OSError) -> None:
        log.error("no connection can be taken for a second: %s", error.strerror)
        self._handlers[listening.fileno()]()
        self._handlers[listening.fileno()] = lambda: None  # which ``stop`` calls
        asyncio.get_running_loop().call_later(self.PAUSE, self._accept_from, listening)


class Accepting:
    """A listening socket, of which Tornado hears that nobody waits where there is no room for a connection."""

    def __init__(self, listening: socket.socket, pause: Callable[[socket.socket, OSError], None]) -> None:
        self._listening, self._pause, self.fileno = listening, pause, listening.fileno

    def accept(self) -> tuple[socket.socket, Any]:
        try:
            return self._listening.accept()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self._pause(self._listening, error)
            raise BlockingIOError from None

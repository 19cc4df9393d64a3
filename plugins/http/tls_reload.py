"""Renewed certificates are served without a restart; a pair that cannot be loaded is logged, and the old one goes
on.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable
from pathlib import Path

from cco_sidecar import Server, Settings, StartError, hookimpl, tls_context

log = logging.getLogger("cco.tls")

CHECK_SECONDS = 2.0


@hookimpl
def part_class(settings: Settings, base: type) -> type | None:
    if not issubclass(base, Server) or not settings.tls_cert or not settings.tls_key:
        return None
    return type("ReloadingServer", (ReloadingServer, base), {"settings": settings})


class ReloadingServer(Server):
    """Looks at the certificate's files as long as it listens. Connections that are open go on with what they have."""

    settings: Settings
    _watching: asyncio.Task[None] | None = None

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        super().add_sockets(sockets)
        self._watching = asyncio.create_task(self._watch(self._signatures()))

    async def close_all_connections(self) -> None:
        if self._watching:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await super().close_all_connections()

    def _signatures(self) -> list[tuple[int, int, int] | None]:
        return [signature_behind(path) for path in (self.settings.tls_cert, self.settings.tls_key) if path]

    async def _watch(self, served: list[tuple[int, int, int] | None]) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            seen = self._signatures()  # before the files are read: later changes show
            if seen == served:
                continue
            # a new context: one that lives would serve the old certificate beside a new one of another kind of key
            try:
                if context := tls_context(self.settings):
                    self.take_certificate(context)
                log.info("the renewed certificate is served from now on")
            except StartError as error:  # half a renewal is mended by its other half, at the next look
                log.error(
                    "--tls-cert/--tls-key have changed and cannot be loaded, the old certificate goes on: %s",
                    reason(error.__context__),
                )
            served = seen


def signature_behind(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file that ``path`` leads to does: renewed certificates often are a link turned
    elsewhere.
    """
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino, facts.st_size


def reason(error: BaseException | None) -> str:
    """Why a certificate cannot be loaded, without a path."""
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__)

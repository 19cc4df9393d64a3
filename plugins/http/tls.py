"""HTTPS by ``--tls-cert`` and ``--tls-key``, TLS 1.2 or newer. Renewed certificates are served without a restart; a
pair that cannot be loaded is logged, and the old one goes on. Agents trust the certificate, and so do commands on this
machine that name no address. Without one a warning says where others can read tokens.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from cco_sidecar import (
    AgentCommand,
    AgentLaunch,
    Application,
    Launcher,
    Server,
    StartError,
    hookimpl,
    log_once,
    one_line,
)
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins._trust import certificates_in, trusting, write_trust

log = logging.getLogger("cco.tls")

CHECK_SECONDS = 2.0


@hookimpl(trylast=True)  # so that the server of the plugin http2 derives from this one, and sees each certificate
def part_class(settings: PluginSettings, base: type) -> type | None:
    secure = settings.tls_cert and settings.tls_key
    if issubclass(base, Launcher) and secure:
        return type("TrustingLauncher", (TrustingLauncher, base), {})
    if not issubclass(base, Server):
        return None
    if not secure:
        return type("PlainServer", (PlainServer, base), {})
    facts = {"certificate": (settings.tls_cert, settings.tls_key), "storage": settings.storage}
    return type("TlsServer", (TlsServer, base), facts | {"where": settings.where("tls_cert")})


def tls_context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    """The context of a server with the certificate and the key in two files. Raises OSError. Blocks."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Without a password OpenSSL would ask for one on the terminal, and wait.
    context.load_cert_chain(*certificate, password=lambda: "")
    if not certificates_in([str(certificate[0])]):  # OpenSSL also reads others, which few clients do
        raise ssl.SSLError(0, "it has no -----BEGIN CERTIFICATE-----, which openssl x509 -in FILE writes")
    return context


class TrustingLauncher(Launcher):
    """Agents trust the service's certificate, whoever signed it, beside what they trusted before."""

    def _prepare(self, launch: AgentLaunch, files: dict[str, bytes]) -> AgentCommand:
        command = super()._prepare(launch, files)
        environment = trusting(self.settings.storage) | command.environment
        return msgspec.structs.replace(command, environment=environment)


class PlainServer(Server):
    """Warns at the start where it listens on more than loopback."""

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        sockets = list(sockets)
        super().add_sockets(sockets)
        for host, port in (each.getsockname()[:2] for each in sockets):
            if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
                shown = f"[{host}]" if ":" in host else host
                log.warning(
                    "http://%s:%d is open to other machines without TLS: tokens go over the network in plain text;"
                    " --tls-cert and --tls-key serve HTTPS",
                    shown, port,
                )  # fmt: skip


class TlsServer(Server):
    """Looks at the certificate's files as long as it listens. Connections that are open go on with what they have."""

    scheme = "https"
    certificate: ClassVar[tuple[Path, Path]]  # and its key
    where: ClassVar[str]  # they are set
    storage: ClassVar[Path]
    _watching: asyncio.Task[None] | None = None

    def initialize(self, request_callback: Any, *args: Any, **options: Any) -> None:
        """Raises StartError."""
        try:
            options["ssl_options"] = tls_context(self.certificate)
        except OSError as error:
            raise StartError(f"{self.where}: it cannot be loaded: {one_line(error)}") from None
        try:
            write_trust(self.storage, self.certificate[0])
        except OSError as error:
            raise StartError(f"{self.storage / 'tls'}: it cannot be written: {one_line(error)}") from None
        super().initialize(request_callback, *args, **options)
        if isinstance(request_callback, Application):
            request_callback.headers["Strict-Transport-Security"] = "max-age=31536000"

    def take_certificate(self, context: ssl.SSLContext) -> None:
        """Serve the connections to come with another certificate."""
        self.ssl_options = context

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        super().add_sockets(sockets)
        self._watching = asyncio.create_task(self._watch(self._signatures()))

    async def close_all_connections(self) -> None:
        if self._watching:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await super().close_all_connections()

    def _signatures(self) -> list[tuple[int, int, int] | None]:
        return [signature_behind(path) for path in self.certificate]

    async def _watch(self, served: list[tuple[int, int, int] | None]) -> None:
        told = True  # agents and commands are told of the certificate that is served
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            seen = self._signatures()  # before the files are read: later changes show
            if seen != served:
                # a new context: one that lives would serve the old certificate beside a new one of another kind of key
                try:
                    self.take_certificate(tls_context(self.certificate))
                    log.info("the renewed certificate is served from now on")
                    told = False
                except OSError as error:  # half a renewal is mended by its other half, at the next look
                    log.error(
                        "--tls-cert/--tls-key have changed and cannot be loaded, the old certificate goes on: %s",
                        reason(error),
                    )
                served = seen
            if not told:
                try:
                    await asyncio.to_thread(write_trust, self.storage, self.certificate[0])
                    told = True
                except (OSError, RuntimeError) as error:  # the disk is full, or no thread can be had
                    log_once(f"agents and commands do not trust the renewed certificate yet: {one_line(error)}")


def signature_behind(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file that ``path`` leads to does: renewed certificates often are a link turned
    elsewhere.
    """
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino, facts.st_size


def reason(error: OSError) -> str:
    """Why a certificate cannot be loaded, without a path."""
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__)

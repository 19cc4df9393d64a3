"""Where the log of ``--backend`` is, out of the options."""

from __future__ import annotations

import re
import ssl

from msgspec import Struct

from cco_sidecar import StartError, one_line
from cco_sidecar_plugins._settings import PluginSettings


class LogOptions(Struct, frozen=True, kw_only=True):
    """Where the log is, and how it is reached."""

    servers: tuple[str, ...]
    prefix: str
    project: str  # as it may stand in a subject
    timeout: int  # seconds for which a write waits
    replicas: int | None = None  # None: three where the server is one of a cluster, else one
    domain: str | None = None
    credentials: str | None = None  # a file
    tls: ssl.SSLContext | None = None

    @property
    def stream(self) -> str:
        return f"{self.prefix}-{self.project}"

    @property
    def subject(self) -> str:
        return f"{self.prefix}.{self.project}"


def log_options(settings: PluginSettings) -> LogOptions:
    """Raises StartError, which does not show what may be a password."""
    servers = server_urls(str(settings.backend))
    if not servers:
        form = "nats://host:4222,host2:4222 (or tls://, with user:password@ or token@ before the first host)"
        raise StartError(f"{settings.where('backend')}: must be like {form}")
    credentials = settings.nats_creds
    if credentials and not credentials.is_file():
        raise StartError(f"{settings.where('nats_creds')}: {credentials} is no file")
    return LogOptions(
        servers=servers, prefix=settings.nats_prefix, project=token(settings.project),
        timeout=settings.nats_timeout, replicas=settings.nats_replicas or None, domain=settings.nats_domain,
        credentials=str(credentials) if credentials else None, tls=tls_of(settings, servers),
    )  # fmt: skip


def server_urls(text: str) -> tuple[str, ...]:
    """Each server by its own address; what the first one says of the scheme and of who we are holds for those behind it
    that say nothing. Empty where the text is not like that.
    """
    form = re.compile(r"((?:nats|tls)://)?([^\s/@,]+@)?([^\s/@:,\[\]]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?/?")
    scheme, login, urls = "", "", []
    for part in text.split(","):
        found = form.fullmatch(part.strip())
        if not found or not (found[1] or scheme) or not 0 < int((found[4] or ":4222")[1:]) < 65536:
            return ()
        scheme, login = found[1] or scheme, found[2] or login
        urls.append(f"{scheme}{login}{found[3]}{found[4] or ':4222'}")
    return tuple(urls)


def tls_of(settings: PluginSettings, servers: tuple[str, ...]) -> ssl.SSLContext | None:
    """Raises StartError."""
    authority, certificate = settings.nats_tls_ca, settings.nats_tls_cert
    if not (authority or certificate or any(server.startswith("tls:") for server in servers)):
        return None
    where = "nats_tls_ca"
    try:
        context = ssl.create_default_context(cafile=str(authority) if authority else None)
        if certificate:
            where = "nats_tls_cert"
            context.load_cert_chain(certificate, settings.nats_tls_key)
        return context
    except OSError as error:  # also ssl.SSLError
        raise StartError(f"{settings.where(where)}: {one_line(error)}") from None


def token(project: str) -> str:
    """A project's id as part of a subject and of a stream's name, which have no dots."""
    return re.sub(r"[^A-Za-z0-9-]", lambda found: f"_{ord(found[0]):02X}", project)

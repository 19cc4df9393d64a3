"""Who answers on a port: a sidecar, of which project, or something else."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import ssl
import urllib.parse
from typing import Any

from cco_sidecar import Settings, in_thread, is_identifier

LOCAL_SECONDS = 3.0  # for an answer from this machine, which may be busy


def explain_bind_error(settings: Settings, error: OSError) -> str:
    """The message that the port cannot be used: who has it, where that is a sidecar, and what to do."""
    where = f"{settings.host} port {settings.port}"
    if error.errno != errno.EADDRINUSE:
        return f"cannot listen on {where}: {error.strerror or error}"
    holder = ""
    with contextlib.suppress(OSError, http.client.HTTPException):
        if health := read_health(ask_health(url_of_port(settings), LOCAL_SECONDS)[1]):
            holder = f" by the sidecar of project {health['project_id']}"
    return f"{where} is already taken{holder}; use --port with another number, or --port 0 for a free one"


def url_of_port(settings: Settings) -> str:
    """Where a service with these settings would answer."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    scheme = "https" if getattr(settings, "tls_cert", None) else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}"


def ask_health(url: str, seconds: float) -> tuple[int, bytes]:
    """The status and at most 64 kB of the answer of /health, of whoever listens there. No token is sent, so any
    certificate will do. Raises OSError, also after ``seconds``, ValueError and http.client.HTTPException.
    """

    def ask() -> tuple[int, bytes]:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        connection = http.client.HTTPConnection(host, parts.port, timeout=seconds)
        if parts.scheme == "https":
            trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # without the authorities, which take long to load
            trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
            connection = http.client.HTTPSConnection(host, parts.port, timeout=seconds, context=trusting)
        with contextlib.closing(connection):
            connection.request("GET", f"{parts.path}/health")
            answer = connection.getresponse()
            return answer.status, answer.read(64_000)

    try:
        return in_thread("health", ask).result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None


def about_certificate(error: ssl.SSLCertVerificationError) -> str:
    """What to do about a certificate that is not trusted."""
    if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
        return "have it made for the address that --url or sidecar.json names, as the README's Deployment does"
    return "name its certificate in SSL_CERT_FILE"


def read_health(content: bytes) -> dict[str, Any]:
    """What a sidecar's /health says; empty where this is nothing of the kind."""
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError):
        health = json.loads(content)
        if health["service"] == "orchestration-sidecar" and is_identifier(health["project_id"]):
            return dict(health)
    return {}

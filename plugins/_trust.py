"""By which certificates the programs of this user trust a service of cco_sidecar that has one of its own."""

from __future__ import annotations

import contextlib
import os
import re
import ssl
from collections.abc import Iterable
from pathlib import Path

from cco_sidecar import write_file

AUTHORITIES = (  # where systems keep theirs; the Python of uv looks in none of these by itself
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)  # fmt: skip
CHOOSING = ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE")  # variables that name all that is trusted
ADDING = "NODE_EXTRA_CA_CERTS"  # the variable that names more
BLOCK = rb"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----"
TRUSTED, ADDED = "trusted.pem", "added.pem"  # in the storage's folder tls


def write_trust(storage: Path, certificate: Path) -> None:
    """Write down for agents and commands what is trusted: the service's own ``certificate`` too. Blocks."""
    folder = storage / "tls"
    folder.mkdir(mode=0o700, exist_ok=True)
    named = [os.environ.get(name, "") for name in CHOOSING]
    known = [ssl.get_default_verify_paths().openssl_cafile or "", *AUTHORITIES, *named]
    folders = [*os.environ.get("SSL_CERT_DIR", "").split(os.pathsep), *filter(os.path.isdir, named)]
    for place in filter(None, folders):  # curl heeds one of both
        with contextlib.suppress(OSError):
            known += map(str, sorted(Path(place).iterdir()))
    own = certificates_in([str(certificate)])
    if before := certificates_in(known):
        write_file(folder / TRUSTED, text_of([*before, *own]))
    else:  # programs have their own authorities, which such a file would take from them
        (folder / TRUSTED).unlink(missing_ok=True)
    write_file(folder / ADDED, text_of([*certificates_in([os.environ.get(ADDING, "")]), *own]))


def trusting(storage: Path) -> dict[str, str]:
    """The variables by which curl, Python, Node, Go and Rust find what ``write_trust`` wrote."""
    file = storage / "tls" / TRUSTED
    chosen = dict.fromkeys(CHOOSING, str(file)) if file.is_file() else {}
    return chosen | {ADDING: str(storage / "tls" / ADDED)}


def own_certificate(storage: Path) -> tuple[Path | None, int]:
    """The file with the certificate of the service on this storage, None where there is none, and when it changed."""
    file = storage / "tls" / ADDED
    try:
        return file, file.stat().st_mtime_ns
    except OSError:
        return None, 0


def context_trusting(certificate: Path | None) -> ssl.SSLContext:
    """The context of a client that trusts what SSL_CERT_FILE names and the file holds, be they signed by an authority
    that is not there. Raises OSError.
    """
    context = ssl.create_default_context()
    if certificate:
        context.load_verify_locations(certificate)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def certificates_in(files: Iterable[str]) -> list[bytes]:
    """The certificates in those files that can be read; no keys, which may stand beside them, and nothing broken, for
    which programs would refuse all that stands in one file with it.
    """
    blocks: dict[bytes, None] = {}  # each once: systems keep theirs in a file and in a folder
    for file in filter(os.path.isfile, files):
        with contextlib.suppress(OSError):
            blocks |= dict.fromkeys(re.findall(BLOCK, Path(file).read_bytes()))
    found: list[bytes] = []
    reader = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for block in blocks:
        with contextlib.suppress(ssl.SSLError):
            reader.load_verify_locations(cadata=block.decode())
            found.append(block)
    return found


def text_of(certificates: list[bytes]) -> bytes:
    """Each of them once."""
    return b"\n".join([*dict.fromkeys(certificates), b""])

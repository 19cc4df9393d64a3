"""Tokens of another issuer: ``--jwt-public-key FILE`` names its public key, whose type fixes the one algorithm that is
taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cco_sidecar import StartError, hookimpl, one_line
from cco_sidecar_plugins._settings import PluginSettings


@hookimpl
def token_keys(settings: PluginSettings) -> list[tuple[Any, str]] | None:
    try:
        return [read_public_key(settings.jwt_public_key)] if settings.jwt_public_key else None
    except StartError as error:
        raise StartError(f"{settings.where('jwt_public_key')}: {error}") from None


def read_public_key(path: Path) -> tuple[Any, str]:
    """The public key in ``path`` and the algorithm that its type stands for. Raises StartError."""
    try:
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError:
        raise StartError(
            "it needs the package 'cryptography': run `pip install cryptography`, or install the extra `crypto`"
        ) from None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror}") from None
    if b"PRIVATE KEY" in content:
        raise StartError(f"{path} is a private key, which belongs to the issuer alone: give its public half")
    try:
        key = load_pem_public_key(content)
    except Exception as error:  # cryptography raises many kinds
        raise StartError(f"{path} is not a public key in PEM form: {one_line(error)[:200]}") from None
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048:
        return key, "RS256"
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key, "ES256"
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key, "EdDSA"
    raise StartError(f"{path} must be RSA of 2048 bits or more, P-256 or Ed25519")

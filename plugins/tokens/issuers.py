"""Tokens of another issuer: ``--jwt-public-key FILE`` names its public key, whose type fixes the one algorithm that is
taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from cco_sidecar import ApiError, Claims, StartError, Tokens, hookimpl, one_line
from cco_sidecar_plugins._settings import PluginSettings
from cco_sidecar_plugins.tokens._foreign import ForeignClaims


@hookimpl
def part_class(settings: PluginSettings, base: type) -> type | None:
    if not settings.jwt_public_key or not issubclass(base, Tokens):
        return None
    try:
        return type("IssuersTokens", (IssuersTokens, base), {"issuer": read_public_key(settings.jwt_public_key)})
    except StartError as error:
        raise StartError(f"{settings.where('jwt_public_key')}: {error}") from None


class IssuersTokens(Tokens):
    """Takes what the issuer's key has signed beside our own tokens."""

    issuer: ClassVar[tuple[Any, str]]  # key and algorithm

    def _verified(self, token: str) -> Claims:
        try:
            return super()._verified(token)
        except ApiError:
            return self.decode(token, *self.issuer, ForeignClaims)


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

"""What tells the words of a project's sidecars from those of others that may write to the same servers."""

from __future__ import annotations

import hmac

import msgspec

from cco_sidecar import StorageError


class Seal:
    """Made with the secret that signs tokens (HMAC-SHA256, RFC 2104), which all sidecars of a project share."""

    SIZE = 32  # hexadecimal digits, 128 bits

    def __init__(self, secret: bytes) -> None:
        self.fingerprint = self._digest(secret, b"cco-sidecar cluster")  # may be read by others
        self._key = hmac.digest(secret, b"cco-sidecar cluster seal", "sha256")

    def of(self, *facts: bytes | str | int) -> str:
        return self._digest(self._key, msgspec.msgpack.encode(facts))

    def fits(self, seal: str, *facts: bytes | str | int) -> bool:
        try:
            return hmac.compare_digest(seal.encode(), self.of(*facts).encode())
        except UnicodeEncodeError:  # a header may have any bytes
            return False

    def wrap(self, about: str, content: bytes) -> bytes:
        """A message, its seal before it."""
        return self.of(about, content).encode() + content

    def unwrap(self, about: str, message: bytes) -> bytes:
        """The content of a message. Raises StorageError where none of us wrote it, or about something else."""
        seal, content = message[: self.SIZE], message[self.SIZE :]
        if not self.fits(seal.decode("latin-1"), about, content):
            raise StorageError("this is not from a sidecar of the project")
        return content

    def _digest(self, key: bytes, content: bytes) -> str:
        return hmac.digest(key, content, "sha256").hex()[: self.SIZE]

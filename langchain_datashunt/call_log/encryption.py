"""Encryption of what the store keeps, with the user's key; nothing is encrypted without one."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Sequence

from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import ConfigurationError, StoreError

KEY_VARIABLE = "DATASHUNT_STORE_KEY"
"""The environment variable with the key of every store that is not given one; several keys are separated by commas."""

SEALED = b"e"
"""What encrypted content begins with."""


class Seal:
    """Encrypts and decrypts, and makes keyed hashes, so that who has the file cannot try texts against its hashes.

    Args:
        keys: Fernet keys (`cryptography.fernet.Fernet.generate_key()`). The first encrypts; all decrypt, so that a key
            is replaced by putting a new one in front.

    Raises:
        ConfigurationError: A key is none.
        MissingExtraError: The package cryptography is not installed.
    """

    def __init__(self, keys: Sequence[str | bytes]) -> None:
        fernet = require("cryptography.fernet", "encryption")
        self._invalid = fernet.InvalidToken
        given = [key.encode() if isinstance(key, str) else bytes(key) for key in keys]
        try:
            self._fernet = fernet.MultiFernet([fernet.Fernet(key) for key in given])
            self._secrets = [hashlib.sha256(b"datashunt\0" + base64.urlsafe_b64decode(key)).digest() for key in given]
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                "A store key is no Fernet key. Make one with: python -c 'from cryptography.fernet import Fernet; "
                "print(Fernet.generate_key().decode())'"
            ) from error

    @classmethod
    def from_key(cls, key: str | bytes | Sequence[str | bytes] | None) -> Seal | None:
        """The seal of a key or of several, else of the environment variable; None where there is none."""
        if key is None:
            told = os.environ.get(KEY_VARIABLE, "").strip()
            key = [part.strip() for part in told.split(",") if part.strip()]
        keys = [key] if isinstance(key, str | bytes) else list(key)
        return cls(keys) if keys else None

    def seal(self, data: bytes) -> bytes:
        """Encrypted, and marked as that."""
        return SEALED + base64.urlsafe_b64decode(self._fernet.encrypt(data))

    def open(self, data: bytes) -> bytes:
        """Decrypted.

        Raises:
            StoreError: It was encrypted with another key, or was changed.
        """
        try:
            plain: bytes = self._fernet.decrypt(base64.urlsafe_b64encode(data[1:]))
        except self._invalid as error:
            raise StoreError(
                "A record is encrypted with another key, or was changed. Give the key that it was written with."
            ) from error
        return plain

    def hashes(self, data: bytes) -> list[bytes]:
        """16 bytes that stand for data, by each key."""
        return [hmac.new(secret, data, hashlib.sha256).digest()[:16] for secret in self._secrets]

    def __repr__(self) -> str:
        return f"Seal({len(self._secrets)} keys)"

    def __reduce__(self) -> str:
        raise TypeError("A store key is not pickled; let each process read it from the environment.")


def sealed(data: bytes, seal: Seal | None) -> bytes:
    """Content as it is stored: encrypted where there is a key."""
    return data if seal is None else seal.seal(data)


def opened(data: bytes, seal: Seal | None) -> bytes:
    """Content that may be encrypted, decrypted.

    Raises:
        StoreError: It is encrypted, and no key is given.
    """
    if not data.startswith(SEALED):
        return data
    if seal is None:
        raise StoreError(f"A record is encrypted. Give the store its key, or set {KEY_VARIABLE}.")
    return seal.open(data)

"""Encrypt the texts of the call log with the user's key; nothing is encrypted without a key."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Sequence

from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import ConfigurationError, StoreError

KEY_VARIABLE = "DATASHUNT_STORE_KEY"
"""Environment variable with the key of every call log that gets none; several keys are separated by commas."""


class Seal:
    """Encrypts and decrypts texts, and keys hashes, so that texts cannot be tried against the hashes of a stolen file.

    Args:
        keys: Fernet keys (`cryptography.fernet.Fernet.generate_key()`). The first one encrypts, all decrypt: to
            replace a key, put the new one in front.

    Raises:
        ConfigurationError: A key is not a Fernet key.
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
                "A key of the call log is not a Fernet key. Make one with: python -c 'from "
                "cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'"
            ) from error

    @classmethod
    def from_key(cls, key: str | bytes | Sequence[str | bytes] | None) -> Seal | None:
        """Return the seal of a key, of several, or of the environment variable; None if there is no key."""
        if key is None:
            told = os.environ.get(KEY_VARIABLE, "").strip()
            key = [part.strip() for part in told.split(",") if part.strip()]
        keys = [key] if isinstance(key, str | bytes) else list(key)
        return cls(keys) if keys else None

    def seal_text(self, text: str) -> str:
        """Return a text encrypted, as a Fernet token."""
        token: bytes = self._fernet.encrypt(text.encode())
        return token.decode()

    def open_text(self, token: str) -> str:
        """Return an encrypted text in clear.

        Raises:
            StoreError: It was encrypted with another key, or was changed.
        """
        try:
            plain: bytes = self._fernet.decrypt(token.encode())
        except self._invalid as error:
            raise StoreError(
                "A record was encrypted with another key, or was changed. Pass the key that it was written with."
            ) from error
        return plain.decode()

    def hashes(self, data: bytes) -> list[bytes]:
        """Return 16 bytes that identify the data, for each key."""
        return [hmac.new(secret, data, hashlib.sha256).digest()[:16] for secret in self._secrets]

    def __repr__(self) -> str:
        return f"Seal({len(self._secrets)} keys)"

    def __reduce__(self) -> str:
        raise TypeError("Keys are not pickled. Let each process read its key from the environment.")

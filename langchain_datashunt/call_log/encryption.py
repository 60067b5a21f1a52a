"""Optional encryption of the call log's texts with the user's key."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Sequence

from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import ConfigurationError, StoreError

KEY_VARIABLE = "DATASHUNT_STORE_KEY"
"""Environment variable that holds the key of call logs created without `key`. Separate several keys by commas."""


class Seal:
    """Encryption of texts and keyed hashing with the user's keys.

    Hashes are keyed so that guessed texts cannot be checked against the hashes of a stolen file.

    Args:
        keys: Fernet keys (`cryptography.fernet.Fernet.generate_key()`). The first key encrypts, and all keys decrypt.
            To rotate keys, put the new key first.

    Raises:
        ConfigurationError: If a key is not a Fernet key.
        MissingExtraError: If the package cryptography is not installed.
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
                "A key of the call log is not a Fernet key. Generate one with: python -c 'from "
                "cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'"
            ) from error

    @classmethod
    def from_key(cls, key: str | bytes | Sequence[str | bytes] | None) -> Seal | None:
        """Create a seal from one or more keys, or from the environment. Return None without keys."""
        if key is None:
            value = os.environ.get(KEY_VARIABLE, "").strip()
            key = [part.strip() for part in value.split(",") if part.strip()]
        keys = [key] if isinstance(key, str | bytes) else list(key)
        return cls(keys) if keys else None

    def seal_text(self, text: str) -> str:
        """Encrypt a text to a Fernet token."""
        token: bytes = self._fernet.encrypt(text.encode())
        return token.decode()

    def open_text(self, token: str) -> str:
        """Decrypt a Fernet token.

        Raises:
            StoreError: If the text was encrypted with another key, or the token was modified.
        """
        try:
            plain: bytes = self._fernet.decrypt(token.encode())
        except self._invalid as error:
            raise StoreError(
                "A record was encrypted with another key, or was changed. Pass the key that encrypted it."
            ) from error
        return plain.decode()

    def hashes(self, data: bytes) -> list[bytes]:
        """Return the keyed hash of the data for each key, 16 bytes each."""
        return [hmac.new(secret, data, hashlib.sha256).digest()[:16] for secret in self._secrets]

    def __repr__(self) -> str:
        return f"Seal({len(self._secrets)} keys)"

    def __reduce__(self) -> str:
        raise TypeError("Keys are not pickled. Let each process read its key from the environment.")

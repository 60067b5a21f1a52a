"""Token counts estimated offline: exact ones need the provider's vocabulary, which comes over the network."""

from __future__ import annotations

import math
from collections.abc import Iterable

CHARACTERS_PER_TOKEN = 4.0
"""The rule of thumb that OpenAI publishes for English text."""

TOKENS_PER_MESSAGE = 4
"""What the chat format adds to each message."""

TOKENS_PER_REPLY = 3
"""What the chat format adds to each request."""


def estimate_tokens(text: str) -> int:
    """Estimated tokens of an English text."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def estimate_message_tokens(texts: Iterable[str]) -> int:
    """Estimated prompt tokens of a chat request with these messages."""
    return TOKENS_PER_REPLY + sum(TOKENS_PER_MESSAGE + estimate_tokens(text) for text in texts)

"""Offline estimates of token counts. Exact counts would require downloading the provider's vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterable

CHARACTERS_PER_TOKEN = 4.0
"""Characters per token of English text, a rule of thumb published by OpenAI."""

TOKENS_PER_MESSAGE = 4
"""Tokens that the chat format adds to each message."""

TOKENS_PER_REPLY = 3
"""Tokens that the chat format adds to each request."""


def estimate_tokens(text: str) -> int:
    """Return the estimated number of tokens of an English text."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def estimate_message_tokens(texts: Iterable[str]) -> int:
    """Return the estimated number of prompt tokens of a chat request with these messages."""
    return TOKENS_PER_REPLY + sum(TOKENS_PER_MESSAGE + estimate_tokens(text) for text in texts)

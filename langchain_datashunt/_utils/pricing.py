"""Token prices from the public price list of genai-prices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec

from langchain_core.messages.ai import UsageMetadata


def cost_usd(usage: Mapping[str, UsageMetadata]) -> float | None:
    """Return the price in USD of token counts by model name.

    Return None if the price of a model is unknown, or if genai-prices is not installed.
    """
    total = 0.0
    for model, counts in usage.items():
        details = counts.get("input_token_details") or {}
        cached, written = details.get("cache_read") or 0, details.get("cache_creation") or 0
        price = token_price(model, counts["input_tokens"], counts["output_tokens"], cached, written)
        if price is None:
            return None
        total += price
    return total


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("genai_prices") is not None


def token_price(
    model: str, input_tokens: int, output_tokens: int, cached_tokens: int = 0, written_tokens: int = 0
) -> float | None:
    """Return the price in USD of one model's tokens, or None if it is unknown.

    Args:
        model: Model name in the provider's API.
        input_tokens: All input tokens, including cached ones.
        output_tokens: Output tokens.
        cached_tokens: Input tokens read from the provider's cache.
        written_tokens: Input tokens written to the provider's cache.
    """
    if not _installed():
        return None
    from genai_prices import Usage, calc_price

    try:
        usage = Usage(
            input_tokens=input_tokens, output_tokens=output_tokens, cache_read_tokens=cached_tokens,
            cache_write_tokens=written_tokens,
        )  # fmt: skip
        return float(calc_price(usage, model_ref=model).total_price)
    except LookupError:
        return None

"""Helpers that build the networks of bundles without running code that a bundle names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from langchain_datashunt._utils.optional import require

_CODE = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "custom_pipelines")
"""Settings by which a transformers configuration names code to fetch or run."""


def safe_config(settings: Mapping[str, Any]) -> Any:
    """Return a transformers configuration without settings that name code, at any depth."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cleaned(one) for key, one in value.items() if key not in _CODE}
        return [cleaned(one) for one in value] if isinstance(value, list) else value

    config = cleaned(settings)
    return require("transformers", "torch").AutoConfig.for_model(config.pop("model_type"), **config)


def shapes_of(build: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's parameters and buffers by name, without allocating memory for them."""
    torch = require("torch", "torch")
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}


def unique_labels(names: list[str]) -> tuple[str, ...]:
    """Return unique output names: the position is appended to a name that was used before."""
    seen: set[str] = set()
    found = []
    for i, name in enumerate(names):
        unique = name if name not in seen else f"{name} ({i})"
        seen.add(unique)
        found.append(unique)
    return tuple(found)

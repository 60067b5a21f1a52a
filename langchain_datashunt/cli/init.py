"""`datashunt init`: from a file of labels to a bundle that stands where there is no small model yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_datashunt.cli.train import TRAINABLE
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.small_models import ColdStartModel


def cold_start_bundle(labels: Path, out: Path, first: str) -> dict[str, Any]:
    """Save the bundle of a task whose first small model is still to be trained; returns what was done, JSON-ready.

    Raises:
        DataError: The file of labels cannot be used.
        ConfigurationError: There is no such kind of small model.
    """
    if first not in TRAINABLE:
        raise ConfigurationError(f"--first {first!r} is not known; use {', '.join(TRAINABLE)}.")
    try:
        lines = [line.strip() for line in labels.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{labels} cannot be read: {error}.") from error
    model = ColdStartModel(labels=tuple(line for line in lines if line), first=first, model_id="cold start")
    model.save(out)
    return {"kind": model.kind(), "labels": len(model.labels), "first": first, "out": str(out)}

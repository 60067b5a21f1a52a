"""`datashunt init`: create a cold-start bundle from a file of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_datashunt.cli.train import TRAINABLE
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.small_models import ColdStartModel


def cold_start_bundle(labels: Path, out: Path, first: str) -> dict[str, Any]:
    """Save a bundle for a task without a small model, and return a JSON-ready summary.

    Raises:
        DataError: If the file of labels cannot be read.
        ConfigurationError: If `first` is not a trainable kind, or there are fewer than two labels.
    """
    if first not in TRAINABLE:
        raise ConfigurationError(f"Expected one of {', '.join(TRAINABLE)} for --first, got {first!r}.")
    try:
        lines = [line.strip() for line in labels.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the file of labels {labels}: {error}. Check --labels.") from error
    model = ColdStartModel(labels=tuple(line for line in lines if line), first=first, model_id="cold start")
    model.save(out)
    return {"kind": model.kind(), "labels": len(model.labels), "first": first, "out": str(out)}

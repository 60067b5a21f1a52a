"""`datashunt compare-engines`: agreement and speed of another precision or engine on a file of texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from langchain_datashunt._utils.table_files import texts_of
from langchain_datashunt.evaluation.agreement import agreement
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.policies.thresholds import Threshold
from langchain_datashunt.prediction import PredictionBatch
from langchain_datashunt.routing.settings import policy_for
from langchain_datashunt.small_models import SmallModel, load_small_model

REFERENCE = {"engine": "plain", "dtype": "float32"}
"""Settings of the reference, Transformers in float32."""

_WARM_UP = 32


def compare_bundle(
    bundle: Path, data: Path, text: str, *, threshold: float | None, computed: dict[str, Any], limit: int | None
) -> dict[str, Any]:
    """Compare predictions with the settings `computed` with those of the reference.

    Returns:
        Agreement and speed, JSON-ready.

    Raises:
        ShuntError: If the bundle or the data cannot be used, or the bundle does not support the settings.
    """
    texts = texts_of(data, text)[:limit]
    if not texts:
        raise DataError(f"{data} has no rows. Pass a file of typical inputs of the model.")
    on = {name: computed[name] for name in ("device",) if name in computed}
    small, trusted = load_small_model(bundle, **computed), load_small_model(bundle, **{**REFERENCE, **on})
    (found, seconds), (wanted, seconds_of_reference) = _predicted(small, texts), _predicted(trusted, texts)
    policy = policy_for(small, None if threshold is None else Threshold(threshold))
    figures = agreement(found, wanted, policy).to_dict()
    return {**figures, "texts_per_second": len(texts) / seconds, "times_as_fast": seconds_of_reference / seconds}


def _predicted(model: SmallModel, texts: list[str]) -> tuple[PredictionBatch, float]:
    """Return predictions and their duration in seconds, after a warm-up that selects the engine."""
    model.predict_batch(texts[:_WARM_UP])
    started = time.perf_counter()
    return model.predict_batch(texts), time.perf_counter() - started

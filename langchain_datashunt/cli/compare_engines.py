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
"""Transformers itself, in single precision."""

_WARM_UP = 32


def compare_bundle(
    bundle: Path, data: Path, text: str, *, threshold: float | None, computed: dict[str, Any], limit: int | None
) -> dict[str, Any]:
    """Compute the texts of a file as `computed` says, and by transformers in float32; JSON-ready.

    Raises:
        ShuntError: The bundle or the data cannot be used, or the bundle not be computed like that.
    """
    texts = texts_of(data, text)[:limit]
    if not texts:
        raise DataError(f"{data} has no rows. Give texts of the kind that the model is asked.")
    on = {name: computed[name] for name in ("device",) if name in computed}
    small, trusted = load_small_model(bundle, **computed), load_small_model(bundle, **{**REFERENCE, **on})
    (found, seconds), (wanted, seconds_of_reference) = _predicted(small, texts), _predicted(trusted, texts)
    policy = policy_for(small, None if threshold is None else Threshold(threshold))
    told = agreement(found, wanted, policy).to_dict()
    return {**told, "texts_per_second": len(texts) / seconds, "times_as_fast": seconds_of_reference / seconds}


def _predicted(model: SmallModel, texts: list[str]) -> tuple[PredictionBatch, float]:
    """Predictions, and seconds, after an engine was chosen and made."""
    model.predict_batch(texts[:_WARM_UP])
    started = time.perf_counter()
    return model.predict_batch(texts), time.perf_counter() - started

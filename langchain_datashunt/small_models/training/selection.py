"""Model selection: train several kinds of small model within a time budget and compare them on held-out data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from langchain_datashunt.evaluation import metrics
from langchain_datashunt.evaluation.offline import positions
from langchain_datashunt.exceptions import DataError, MissingExtraError
from langchain_datashunt.small_models.base import SmallModel
from langchain_datashunt.small_models.bundles.loading import small_model_class
from langchain_datashunt.small_models.kinds.on_embeddings import OnEmbeddings
from langchain_datashunt.small_models.training.training import TrainingSettings, split_examples

CANDIDATES = ("embedding", "neighbours", "ensemble", "textcnn", "lstm", "contrastive", "transformers")
"""Kinds that are tried by default, the cheapest first."""

HELD_OUT = 0.2
"""Fraction of each label's examples held out for the comparison if no validation set is given."""

CLOSE = 0.01
"""Largest difference in loss, in nats, at which AURC decides instead."""


@dataclass(frozen=True)
class Candidate:
    """Result of one kind of small model in the comparison.

    Attributes:
        kind: Name of the kind.
        nll: Held-out negative log-likelihood in nats, or NaN if it was not trained.
        aurc: Held-out area under the risk-coverage curve, or NaN if it was not trained.
        accuracy: Held-out accuracy, or NaN if it was not trained.
        seconds: Training time in seconds.
        note: Reason why it was not trained or was stopped, else empty.
    """

    kind: str
    nll: float = float("nan")
    aurc: float = float("nan")
    accuracy: float = float("nan")
    seconds: float = 0.0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serializable dictionary, with None for NaN."""
        return {name: None if value != value else value for name, value in vars(self).items()}


def train_best(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    validation: tuple[Sequence[str], Sequence[str]] | None = None,
    settings: TrainingSettings | None = None,
    kinds: Sequence[str] = CANDIDATES,
    time_budget: float = 300.0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    on_candidate: Callable[[Candidate], Any] | None = None,
) -> tuple[SmallModel, list[Candidate]]:
    """Train several kinds of small model, and return the best one with the results of all.

    The best kind has the lowest held-out negative log-likelihood. Among kinds within 0.01 nats of the lowest, the one
    with the lowest AURC is chosen. Without a validation set, a fifth of each label's examples is held out. The best
    kind is then trained again on all examples.

    Args:
        texts: `n` training texts.
        labels: `n` labels.
        validation: Texts and labels for the comparison. None holds out a part of the training set.
        settings: Training settings for every kind. None uses the defaults.
        kinds: Kinds to try, in this order.
        time_budget: Seconds for the comparison. When it is used up, networks stop and no further kind is tried. The
            final training on all examples has a limit of the same length.
        options: Further arguments of `train`, by kind.
        on_candidate: Function called with each result as it becomes available.

    Raises:
        DataError: If the training set is not valid, or no kind could be trained.
    """
    chosen, started = settings or TrainingSettings(), time.perf_counter()
    held = chosen.model_copy(update={"validation_fraction": HELD_OUT})
    split = split_examples(texts, labels, validation=validation, settings=held)
    learn = (split.train.texts, [split.labels[i] for i in split.train.targets.argmax(axis=1)])
    judged = (split.validation.texts, [split.labels[i] for i in split.validation.targets.argmax(axis=1)])
    judges = set(judged[0])  # pseudo-labels for these texts would bias the comparison
    trials = {kind: _without(judges, dict((options or {}).get(kind, {}))) for kind in kinds}
    table: list[Candidate] = []
    models: dict[str, SmallModel] = {}
    for kind in kinds:
        left = time_budget - (time.perf_counter() - started)
        if left <= 0:
            found = Candidate(kind, note="not tried: the time budget was used up")
        else:
            found, model = _tried(kind, learn, judged, split.labels, chosen, left, trials[kind])
            if model is not None:
                models[kind] = model
        table.append(found)
        if on_candidate is not None:
            on_candidate(found)
    if not models:
        raise DataError("No kind of small model could be trained: " + "; ".join(f"{c.kind}: {c.note}" for c in table))
    best = _best([candidate for candidate in table if candidate.kind in models])
    if validation is not None:
        return models[best.kind], table
    cls: Any = small_model_class(best.kind)
    bounded = chosen.model_copy(update={"max_seconds": time_budget})
    final: SmallModel = cls.train(
        list(texts), list(labels), settings=bounded, label_set=split.labels, **dict((options or {}).get(best.kind, {}))
    )
    return final, table


def _without(texts: set[str], options: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `train` without `texts` among the unlabelled texts."""
    if "unlabelled" not in options:
        return options
    return {**options, "unlabelled": [text for text in options["unlabelled"] if text not in texts]}


def _best(candidates: list[Candidate]) -> Candidate:
    least = min(candidate.nll for candidate in candidates)
    return min((c for c in candidates if c.nll <= least + CLOSE), key=lambda c: c.aurc)


def _tried(
    kind: str,
    learn: tuple[list[str], list[str]],
    judged: tuple[list[str], list[str]],
    labels: tuple[str, ...],
    settings: TrainingSettings,
    seconds: float,
    options: dict[str, Any],
) -> tuple[Candidate, SmallModel | None]:
    cls: Any = small_model_class(kind)
    given = settings.model_copy(update={"max_seconds": seconds, "checkpoint": None, "log": None})
    started = time.perf_counter()
    try:
        model: SmallModel = cls.train(*learn, settings=given, label_set=labels, **options)
    except (MissingExtraError, DataError, MemoryError) as error:
        return Candidate(kind, seconds=time.perf_counter() - started, note=f"not trained: {error}"), None
    took = time.perf_counter() - started
    batch = model.predict_batch(judged[0])
    truth = positions(batch.labels, judged[1])
    right = batch.best == truth
    stopped = took >= seconds and not issubclass(cls, OnEmbeddings)
    found = Candidate(
        kind,
        metrics.negative_log_likelihood(batch.probabilities, truth),
        metrics.aurc(batch.confidence, right),
        float(np.mean(right)),
        round(took, 2),
        "stopped by the time budget" if stopped else "",
    )
    return found, model

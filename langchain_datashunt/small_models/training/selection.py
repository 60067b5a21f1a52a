"""Which kind of small model suits a task: each is trained within a time budget and judged on what was held out."""

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
"""In the order in which they are tried: the cheap ones first."""

HELD_OUT = 0.2
"""Share of each label's examples that judges, where no validation set is given."""

CLOSE = 0.01
"""Losses that differ by less, in nats, are told apart by AURC."""


@dataclass(frozen=True)
class Candidate:
    """What became of one kind.

    Attributes:
        kind: Which.
        nll: Held-out negative log-likelihood, nats; NaN where it was not trained.
        aurc: Held-out area under the risk-coverage curve.
        accuracy: Held-out.
        seconds: Training time.
        note: Why it was not tried, or stopped; empty for neither.
    """

    kind: str
    nll: float = float("nan")
    aurc: float = float("nan")
    accuracy: float = float("nan")
    seconds: float = 0.0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
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
    """Try kinds of small model, and return the best with a table of all.

    The best has the least held-out negative log-likelihood; of those within 0.01 nats the least AURC. Without a
    validation set a fifth of each label's examples judges, and the best kind is then trained on all.

    Args:
        texts: `n` training texts.
        labels: Their labels.
        validation: Texts and labels that judge.
        settings: Of every kind; networks stop when the budget is used up.
        kinds: To be tried, in this order.
        time_budget: Seconds for all of them; a kind is not begun when it is used up.
        options: More arguments of `train`, by kind.
        on_candidate: Called with each result as it comes.

    Raises:
        DataError: The training set cannot be used, or no kind could be trained.
    """
    chosen, started = settings or TrainingSettings(), time.perf_counter()
    held = chosen.model_copy(update={"validation_fraction": HELD_OUT})
    split = split_examples(texts, labels, validation=validation, settings=held)
    learn = (split.train.texts, [split.labels[i] for i in split.train.targets.argmax(axis=1)])
    judged = (split.validation.texts, [split.labels[i] for i in split.validation.targets.argmax(axis=1)])
    judges = set(judged[0])  # a text whose label a candidate had guessed would flatter it
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
    """Arguments of `train` with these texts not among the unlabelled ones."""
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

"""`datashunt train`: from a file of labelled texts to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_datashunt.data.reading import labelled_texts, sample_per_label
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.small_models import small_model_class
from langchain_datashunt.small_models.training import TrainingSettings

TRAINABLE = ("embedding", "neighbours", "ensemble", "textcnn", "lstm", "transformers")

ON_EMBEDDINGS = ("embedding", "neighbours", "ensemble")
"""Kinds that take an encoder, and can learn what labels mean."""


def train_bundle(
    data: Path,
    text: str,
    label: str,
    model: str,
    out: Path,
    *,
    per_label: int | None,
    validation: Path | None,
    device: str | None,
    name_labels: bool = False,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Train and save; returns what was done, JSON-ready.

    Raises:
        DataError: The data cannot be used.
        ConfigurationError: There is no such model.
    """
    kind, _, base = model.partition(":")
    if kind not in TRAINABLE or (base and kind != "transformers"):
        raise ConfigurationError(
            f"--model {model!r} is not known; use embedding, neighbours, ensemble, textcnn, lstm, "
            f"transformers or transformers:PATH_OR_ID."
        )
    texts, labels = labelled_texts(data, text, label)
    if per_label is not None:
        texts, labels = sample_per_label(texts, labels, per_label, settings["seed"])
    held_out = None if validation is None else labelled_texts(validation, text, label)
    if held_out is not None and (unknown := sorted(set(held_out[1]) - set(labels))):
        raise DataError(f"{validation} has labels without a training example: {', '.join(unknown[:5])}.")
    more: dict[str, Any] = {"base": base} if base else {}
    if device is not None and kind not in ON_EMBEDDINGS:
        more["device"] = device
    elif device is not None:
        from langchain_datashunt.small_models.encoder import shared_encoder

        more["embeddings"] = shared_encoder(None, device)
    if name_labels:
        if kind not in ON_EMBEDDINGS:
            raise ConfigurationError(f"--name-labels is for {', '.join(ON_EMBEDDINGS)}; {kind} does not read names.")
        more["label_texts"] = {name: name.replace("_", " ") for name in sorted(set(labels))}
    chosen = TrainingSettings(**{key: value for key, value in settings.items() if value is not None})
    kind_class: Any = small_model_class(kind)
    trained = kind_class.train(texts, labels, validation=held_out, settings=chosen, **more)
    trained.save(out)
    lineage = trained.lineage
    return {
        "kind": kind,
        "labels": len(trained.labels),
        "examples": lineage["examples"],
        "validation_examples": lineage["validation_examples"],
        "validation_nll": round(lineage["validation_nll"], 4),
        "temperature": round(trained.temperature, 4),
        "seconds": lineage["seconds"],
        "out": str(out),
    }

"""`datashunt train`: train a bundle on a file of labelled texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_datashunt._utils.table_files import labelled_texts, sample_per_label, texts_of
from langchain_datashunt.cli.output import console
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.small_models import SmallModel, small_model_class
from langchain_datashunt.small_models.training.selection import Candidate, train_best
from langchain_datashunt.small_models.training.training import TrainingSettings

TRAINABLE = ("embedding", "neighbours", "ensemble", "contrastive", "textcnn", "lstm", "transformers")

AUTO = "auto"

ON_EMBEDDINGS = ("embedding", "neighbours", "ensemble")
"""Kinds that train a head on the embeddings of an encoder."""

READ_NAMES = (*ON_EMBEDDINGS, "contrastive")
"""Kinds that can train on the names of labels."""

READ_UNLABELLED = ("contrastive",)
"""Kinds that can train on texts without labels."""

WITH_BASE = ("contrastive", "transformers")
"""Kinds that fine-tune an encoder, optionally given as KIND:PATH_OR_ID."""


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
    label_names_as_examples: bool = False,
    unlabelled: Path | None = None,
    time_budget: float = 300.0,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Train a small model, save it, and return a JSON-ready summary.

    Raises:
        DataError: If the data cannot be used.
        ConfigurationError: If the kind of model is unknown, or does not support an option.
    """
    kind, _, base = model.partition(":")
    if kind not in (*TRAINABLE, AUTO) or (base and kind not in WITH_BASE):
        raise ConfigurationError(
            f"Expected auto, {', '.join(TRAINABLE)}, "
            f"{' or '.join(f'{one}:PATH_OR_ID' for one in WITH_BASE)} for --model, got {model!r}."
        )
    texts, labels = labelled_texts(data, text, label)
    if per_label is not None:
        texts, labels = sample_per_label(texts, labels, per_label, settings["seed"])
    held_out = None if validation is None else labelled_texts(validation, text, label)
    if held_out is not None and (unknown := sorted(set(held_out[1]) - set(labels))):
        raise DataError(
            f"{validation} has labels without training examples: {', '.join(unknown[:5])}. Add training examples, or "
            f"remove these rows."
        )
    names = {name: name.replace("_", " ") for name in sorted(set(labels))} if label_names_as_examples else None
    if label_names_as_examples and kind not in (*READ_NAMES, AUTO):
        raise ConfigurationError(
            f"Expected --model {', '.join(READ_NAMES)} or auto with --label-names-as-examples, got {kind}."
        )
    if unlabelled is not None and kind not in (*READ_UNLABELLED, AUTO):
        raise ConfigurationError(
            f"Expected --model {' or '.join(READ_UNLABELLED)} or auto with --unlabelled, got {kind}."
        )
    others = None if unlabelled is None else texts_of(unlabelled, text)
    chosen = TrainingSettings(**{key: value for key, value in settings.items() if value is not None})
    table: list[Candidate] = []
    trained: SmallModel
    if kind == AUTO:
        options = {one: _options(one, device, names, others) for one in TRAINABLE}
        trained, table = train_best(
            texts, labels, validation=held_out, settings=chosen, time_budget=time_budget, options=options,
            on_candidate=lambda found: console.print(_line(found), highlight=False),
        )  # fmt: skip
        kind = type(trained).kind()
    else:
        more = _options(kind, device, names, others) | ({"base": base} if base else {})
        kind_class: Any = small_model_class(kind)
        trained = kind_class.train(texts, labels, validation=held_out, settings=chosen, **more)
    trained.save(out)
    lineage = trained.lineage
    return {
        "kind": kind,
        "labels": len(trained.labels),
        "examples": lineage["examples"],
        **({"unlabelled": lineage["unlabelled"]} if lineage.get("unlabelled") else {}),
        "validation_examples": lineage["validation_examples"],
        "validation_nll": round(lineage["validation_nll"], 4),
        "temperature": round(trained.temperature, 4),
        "seconds": lineage["seconds"],
        "out": str(out),
        **({"tried": [candidate.to_dict() for candidate in table]} if table else {}),
    }


def _options(
    kind: str, device: str | None, names: dict[str, str] | None, unlabelled: list[str] | None
) -> dict[str, Any]:
    """Return the keyword arguments of a kind's `train`."""
    options: dict[str, Any] = {}
    if device is not None and kind in ON_EMBEDDINGS:
        from langchain_datashunt.small_models.kinds.encoder import shared_encoder

        options["embeddings"] = shared_encoder(None, device)
    elif device is not None:
        options["device"] = device
    if names is not None and kind in READ_NAMES:
        options["label_texts"] = names
    if unlabelled is not None and kind in READ_UNLABELLED:
        options["unlabelled"] = unlabelled
    return options


def _line(found: Candidate) -> str:
    if found.nll != found.nll:
        return f"  {found.kind}: {found.note}"
    figures = f"NLL {found.nll:.3f}, AURC {found.aurc:.4f}, accuracy {100 * found.accuracy:.1f}%, {found.seconds:.1f} s"
    return f"  {found.kind}: {figures}{'; ' + found.note if found.note else ''}"

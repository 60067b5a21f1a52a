"""A labelled task with recorded answers of a large model: what the demo and the benchmarks run on."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from langchain_datashunt._utils.table_files import labelled_texts, read_rows
from langchain_datashunt.exceptions import DataError

DATA_DIR_VARIABLE = "DATASHUNT_DATA_DIR"
"""The environment variable that points to the folder with benchmark data."""

BANKING77_FOLDER = "banking77_gpt4"

BANKING77_URL = "https://raw.githubusercontent.com/stogiannidis/OCaTS/c0c680b732d150f7e5620a5b0e64f72ecd934b62/data"
"""Where the recorded answers are published (MIT; Banking77 itself CC-BY-4.0), at a fixed commit."""

_PUBLISHED = {
    "train.csv": ("processed/banking77/train.csv", "9f5711694a5049e12205d6e9983720fe8eb34bcfab29326f7b21a4883d27f0e7"),
    "dev.csv": ("processed/banking77/dev.csv", "4318d9f7890bb91c4fdd3ea4d713a40fa4f8c5fad96b2cc86c702738a62beed6"),
    "test.csv": ("raw/banking77/test.csv", "a11f6bc990121b19f55b8cba0d0f3dcf54fa8bb962b16ee3b97342b580bf74c3"),
    "few_shot.csv": ("processed/banking77/best3_train.csv", None),
}
"""File -> where it is published, and the SHA-256 of its content (label names are checked by their own)."""

_NAMES_SHA256 = "ed1d5424fdac859aabd25c36a95b4a28a21697b602f1307173036c9b82ae1326"


@dataclass(frozen=True)
class Labelled:
    """Texts with true labels and, where recorded, the large model's answers.

    Attributes:
        texts: `n` texts.
        labels: `n` label names.
        large: `n` answers of the large model, empty where there are none.
    """

    texts: Sequence[str]
    labels: Sequence[str]
    large: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, n: int) -> Labelled:
        """The first `n` of them."""
        return Labelled(self.texts[:n], self.labels[:n], self.large[:n])


@dataclass(frozen=True)
class BenchmarkTask:
    """A task: labelled training texts, a development and a test split with recorded large answers.

    Attributes:
        name: Short name.
        source: What the figures come from, in words.
        large_model: Name of the model whose answers are recorded, for prices; None where it has none.
        large_in_words: What the large side is.
        train: Labelled texts.
        dev: To choose the threshold on.
        test: To score once.
        descriptions: What labels mean, by label.
    """

    name: str
    source: str
    large_model: str | None
    large_in_words: str
    train: Labelled
    dev: Labelled
    test: Labelled
    descriptions: Mapping[str, str]

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, sorted."""
        return tuple(sorted({*self.train.labels, *self.dev.labels, *self.test.labels}))


def banking77_folder() -> Path | None:
    """The folder with Banking77 and GPT-4's answers, where the environment names one that is complete."""
    root = os.environ.get(DATA_DIR_VARIABLE)
    if not root:
        return None
    folder = Path(root) / BANKING77_FOLDER
    return folder if all((folder / name).is_file() for name in _PUBLISHED) else None


def load_banking77(folder: Path) -> BenchmarkTask:
    """Banking77 (77 intents of bank customers) with the answers that GPT-4 gave without any hint.

    Raises:
        DataError: A file or a column is missing.
    """
    names = _label_names(folder / "few_shot.csv")

    def named(file: str, answers: str | None) -> Labelled:
        texts, ids = labelled_texts(folder / file, "text", "label")
        large = [names[str(row[answers])] for row in read_rows(folder / file)] if answers else []
        return Labelled(texts, [names[i] for i in ids], large)

    return BenchmarkTask(
        name="banking77",
        source=(
            "Banking77 test.csv with the answers of GPT-4 that OCaTS recorded (column gpt-label, commit c0c680b7); "
            "they were given without any small-model hint"
        ),
        large_model="gpt-4",
        large_in_words="GPT-4, recorded answers",
        train=named("train.csv", None),
        dev=named("dev.csv", "gpt-label"),
        test=named("test.csv", "gpt-label"),
        descriptions={},
    )


def download_banking77(root: Path, base_url: str = BANKING77_URL) -> Path:
    """Download the four files into `root/banking77_gpt4`, checksummed; files that are there and right stay.

    Raises:
        DataError: A file cannot be fetched, or is not the one that was published.
    """
    folder = root / BANKING77_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, (where, digest) in _PUBLISHED.items():
        target = folder / name
        if not target.is_file() or not _is_published(target, digest):
            partial = target.with_name(f"partial-{name}")
            url = f"{base_url}/{where}"
            try:
                with urllib.request.urlopen(url, timeout=60) as reply:
                    partial.write_bytes(reply.read())
            except OSError as error:
                raise DataError(
                    f"{url} cannot be fetched: {error}. Try again, or put the file there by hand."
                ) from error
            if not _is_published(partial, digest):
                partial.unlink()
                raise DataError(
                    f"{url} is not the file that was published (its checksum differs); it was not kept. Try again."
                )
            partial.replace(target)
    return folder


def load_messages(seed: int = 0) -> BenchmarkTask:
    """The messages that the package ships: 432 to an invented shop, 12 intents, without recorded answers yet.

    Split by seed and label: 15 of each label to train, 9 to choose on, 12 to score.
    """
    package = files("langchain_datashunt.cli.demo")
    rows = [json.loads(line) for line in package.joinpath("messages.jsonl").read_text(encoding="utf-8").splitlines()]
    rng = np.random.default_rng(seed)
    parts: dict[str, list[dict[str, str]]] = {"train": [], "dev": [], "test": []}
    for label in sorted({row["label"] for row in rows}):
        mine = [row for row in rows if row["label"] == label]
        order = [mine[i] for i in rng.permutation(len(mine))]
        parts["train"] += order[:15]
        parts["dev"] += order[15:24]
        parts["test"] += order[24:]

    def labelled(part: str) -> Labelled:
        return Labelled([row["text"] for row in parts[part]], [row["label"] for row in parts[part]])

    return BenchmarkTask(
        name="messages",
        source="432 customer messages written for this package (12 intents), split by seed",
        large_model=None,
        large_in_words=(
            "a stronger local stand-in, no language model: a classifier trained on all other messages and the "
            "labels' descriptions"
        ),
        train=labelled("train"),
        dev=labelled("dev"),
        test=labelled("test"),
        descriptions=json.loads(package.joinpath("descriptions.json").read_text(encoding="utf-8")),
    )


def _label_names(file: Path) -> dict[str, str]:
    names = {str(row["label"]): str(row["label_name"]) for row in read_rows(file)}
    if not names:
        raise DataError(f"{file} names no labels. Get it again as it was published.")
    return names


def _is_published(file: Path, digest: str | None) -> bool:
    if digest is not None:
        return hashlib.sha256(file.read_bytes()).hexdigest() == digest
    return names_digest(file) == _NAMES_SHA256


def names_digest(file: Path) -> str | None:
    """SHA-256 of the label names that a file gives, whatever else stands in it; None where it gives none."""
    try:
        names = _label_names(file)
    except (DataError, KeyError):
        return None
    return hashlib.sha256(json.dumps(sorted(names.items())).encode()).hexdigest()

"""Labelled tasks with recorded answers of a large model, for the demo and the benchmarks."""

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
"""Environment variable with the path of the benchmark data folder."""

BANKING77_FOLDER = "banking77_gpt4"

BANKING77_URL = "https://raw.githubusercontent.com/stogiannidis/OCaTS/c0c680b732d150f7e5620a5b0e64f72ecd934b62/data"
"""Source of the recorded answers at a fixed commit, under MIT (Banking77 itself is under CC-BY-4.0)."""

_PUBLISHED = {
    "train.csv": ("processed/banking77/train.csv", "9f5711694a5049e12205d6e9983720fe8eb34bcfab29326f7b21a4883d27f0e7"),
    "dev.csv": ("processed/banking77/dev.csv", "4318d9f7890bb91c4fdd3ea4d713a40fa4f8c5fad96b2cc86c702738a62beed6"),
    "test.csv": ("raw/banking77/test.csv", "a11f6bc990121b19f55b8cba0d0f3dcf54fa8bb962b16ee3b97342b580bf74c3"),
    "few_shot.csv": ("processed/banking77/best3_train.csv", None),
}
"""Published path and SHA-256 of each file. None means that the label names are hashed instead of the file."""

_NAMES_SHA256 = "ed1d5424fdac859aabd25c36a95b4a28a21697b602f1307173036c9b82ae1326"


@dataclass(frozen=True)
class Labelled:
    """Texts with true labels and, if recorded, the large model's answers.

    Attributes:
        texts: `n` texts.
        labels: `n` label names.
        large: `n` answers of the large model, or an empty sequence if none are recorded.
    """

    texts: Sequence[str]
    labels: Sequence[str]
    large: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, n: int) -> Labelled:
        """Return the first `n` examples."""
        return Labelled(self.texts[:n], self.labels[:n], self.large[:n])


@dataclass(frozen=True)
class BenchmarkTask:
    """Task with labelled training texts, and development and test splits with recorded answers.

    Attributes:
        name: Short name.
        source: Description of the data.
        large_model: Name of the model with the recorded answers, used for prices, or None.
        large_in_words: Description of the large model.
        train: Training split.
        dev: Development split, used to choose the threshold.
        test: Test split, used once to compute the figures.
        descriptions: Descriptions of labels, by label.
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
        """All labels of the three splits, sorted."""
        return tuple(sorted({*self.train.labels, *self.dev.labels, *self.test.labels}))


def banking77_folder() -> Path | None:
    """Return the folder with Banking77 and the answers of GPT-4, or None if it is not set or incomplete."""
    root = os.environ.get(DATA_DIR_VARIABLE)
    if not root:
        return None
    folder = Path(root) / BANKING77_FOLDER
    return folder if all((folder / name).is_file() for name in _PUBLISHED) else None


def load_banking77(folder: Path) -> BenchmarkTask:
    """Load Banking77 (77 intents of bank customers) with GPT-4's answers to prompts without hints.

    Raises:
        DataError: If a file or a column is missing.
    """
    names = _label_names(folder / "few_shot.csv")

    def named(file: str, answers: str | None) -> Labelled:
        texts, ids = labelled_texts(folder / file, "text", "label")
        large = [names[str(row[answers])] for row in read_rows(folder / file)] if answers else []
        return Labelled(texts, [names[i] for i in ids], large)

    return BenchmarkTask(
        name="banking77",
        source=(
            "Banking77 test.csv with the answers of GPT-4 recorded by OCaTS (column gpt-label, commit c0c680b7), "
            "without hints of a small model"
        ),
        large_model="gpt-4",
        large_in_words="GPT-4, recorded answers",
        train=named("train.csv", None),
        dev=named("dev.csv", "gpt-label"),
        test=named("test.csv", "gpt-label"),
        descriptions={},
    )


def download_banking77(root: Path, base_url: str = BANKING77_URL) -> Path:
    """Download the four files into `root/banking77_gpt4` and verify their checksums.

    Files that are already there are only downloaded if their checksum differs.

    Raises:
        DataError: If a file cannot be downloaded, or its checksum differs from the published file.
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
                raise DataError(f"Cannot download {url}: {error}. Try again, or download the file manually.") from error
            if not _is_published(partial, digest):
                partial.unlink()
                raise DataError(
                    f"Expected the published file at {url}, but the checksum differs. The download was discarded. Try "
                    f"again."
                )
            partial.replace(target)
    return folder


def load_messages(seed: int = 0) -> BenchmarkTask:
    """Load the 432 messages in the package, written to an invented shop with 12 intents and without recorded answers.

    Each label has 15 training, 9 development and 12 test messages, drawn with the seed.
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
        source="432 customer messages written for this package (12 intents), split at random by seed",
        large_model=None,
        large_in_words=(
            "a stronger local stand-in instead of a language model: a classifier trained on all other messages and the "
            "descriptions of the labels"
        ),
        train=labelled("train"),
        dev=labelled("dev"),
        test=labelled("test"),
        descriptions=json.loads(package.joinpath("descriptions.json").read_text(encoding="utf-8")),
    )


def _label_names(file: Path) -> dict[str, str]:
    names = {str(row["label"]): str(row["label_name"]) for row in read_rows(file)}
    if not names:
        raise DataError(f"Expected label names in {file}, got none. Download the published file again.")
    return names


def _is_published(file: Path, digest: str | None) -> bool:
    if digest is not None:
        return hashlib.sha256(file.read_bytes()).hexdigest() == digest
    return names_digest(file) == _NAMES_SHA256


def names_digest(file: Path) -> str | None:
    """Return the SHA-256 of the label names in a file, or None if the file has none."""
    try:
        names = _label_names(file)
    except (DataError, KeyError):
        return None
    return hashlib.sha256(json.dumps(sorted(names.items())).encode()).hexdigest()

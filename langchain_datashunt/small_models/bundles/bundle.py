"""The bundle: a folder that holds a small model. Settings are JSON, weights safetensors; nothing is pickled.

    config.json           kind, labels, calibration, threshold, lineage, package version, and a checksum of each file
    model.safetensors     all parameters
    ...                   further files of the kind, for example tokenizer.json

A bundle is written beside its place and moved there at once. Two renames are needed where there was one before; a
reader that comes in between, or half-way, reads again (`unless_replaced`), and so finds the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from langchain_datashunt._utils.atomic_dir import put_in_place, unless_replaced
from langchain_datashunt._utils.optional import require
from langchain_datashunt._version import __version__
from langchain_datashunt.exceptions import (
    BundleError,
    BundleMismatchError,
    BundleTooNewError,
    BundleTruncatedError,
)

FORMAT = 1
"""The format that this version writes; it reads this one and older ones."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class FileStamp(BaseModel):
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


class BundleInfo(BaseModel):
    """What config.json says. `files` maps each other file to its size and SHA-256."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format: int = FORMAT
    package_version: str = __version__
    kind: str
    labels: tuple[str, ...] = Field(min_length=1)
    model_id: str = ""
    temperature: float = Field(default=1.0, gt=0.0)
    threshold: float | None = None
    policy: dict[str, Any] | None = None
    fusion: dict[str, Any] | None = None
    input_key: str = "input"
    settings: dict[str, Any] = Field(default_factory=dict)
    lineage: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, FileStamp] = Field(default_factory=dict)

    @field_validator("labels")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := repeated(value):
            raise ValueError(f"{twice[0]!r} is named more than once")
        return value

    def shared(self) -> dict[str, Any]:
        """The fields that every kind of small model is made with."""
        names = ("labels", "model_id", "temperature", "threshold", "input_key", "lineage")
        return {name: getattr(self, name) for name in names}


def write_bundle(
    folder: Path,
    info: BundleInfo,
    weights: dict[str, NDArray[Any]],
    write_files: Callable[[Path], None] | None = None,
) -> Path:
    """Write a bundle atomically; returns its absolute path.

    Raises:
        BundleError: `folder` exists and is not a bundle, or holds files that are none of the bundle's.
    """
    folder = folder.absolute()
    unless_replaced(folder, lambda: _check_replaceable(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        staging.chmod(0o755)
        contiguous = {name: np.asarray(array, order="C") for name, array in weights.items()}
        if contiguous:
            require("safetensors.numpy", "torch").save_file(contiguous, str(staging / WEIGHTS_FILE))
        if write_files is not None:
            write_files(staging)
        stamped = info.model_copy(update={"files": _stamp_all(staging)})
        (staging / CONFIG_FILE).write_text(stamped.model_dump_json(indent=2) + "\n", encoding="utf-8")
        put_in_place(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return folder


def read_info(folder: Path) -> BundleInfo:
    """Read config.json.

    Raises:
        BundleTruncatedError: It is missing or cut short.
        BundleTooNewError: A newer format.
        BundleError: It is no valid configuration.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise BundleTruncatedError(f"{folder} is no bundle: {CONFIG_FILE} is missing. Train or copy it again.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise BundleTruncatedError(f"{file} is cut short or damaged ({error}). Copy the bundle again.") from error
    written = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise BundleTooNewError(
            f"{folder} was written in format {written} by version {raw.get('package_version')}; this version "
            f"({__version__}) reads up to format {FORMAT}. Upgrade: pip install -U langchain-datashunt."
        )
    try:
        return BundleInfo.model_validate(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the top level"
        raise BundleError(f"{file} is not valid at {where}: {problem['msg']}. Train or copy it again.") from error


def read_bundle(folder: Path) -> tuple[BundleInfo, dict[str, NDArray[Any]]]:
    """Read and verify a whole bundle.

    Raises:
        BundleTruncatedError: A file is missing, cut short or changed.
        BundleError: See `read_info`.
    """
    info = read_info(folder)
    for name, stamp in info.files.items():
        _verify(folder, name, stamp)
    if WEIGHTS_FILE not in info.files:
        return info, {}
    safetensors = require("safetensors", "torch")
    try:
        return info, require("safetensors.numpy", "torch").load_file(str(folder / WEIGHTS_FILE))
    except (safetensors.SafetensorError, ValueError) as error:
        raise BundleTruncatedError(f"{folder / WEIGHTS_FILE} holds no safetensors weights: {error}.") from error


def check_weights(
    info: BundleInfo, weights: dict[str, NDArray[Any]], expected: dict[str, tuple[int | None, ...]]
) -> None:
    """Compare weights with the shapes that the labels and settings ask for (None: any size).

    Raises:
        BundleMismatchError: One is missing, too many, or of another shape; the message says which.
    """
    for name, shape in expected.items():
        if name not in weights:
            raise BundleMismatchError(f"The bundle of kind {info.kind!r} lacks the weight {name!r}.")
        found = weights[name].shape
        fits = len(found) == len(shape) and all(w in (None, f) for w, f in zip(shape, found, strict=True))
        if not fits:
            raise BundleMismatchError(
                f"The bundle names {len(info.labels)} labels, for which the weight {name!r} must have shape "
                f"{list(shape)}; it has {list(found)}. Labels and weights are of different models: train again."
            )
    if extra := sorted(set(weights) - set(expected)):
        raise BundleMismatchError(
            f"The bundle of kind {info.kind!r} has unknown weights: {', '.join(extra[:5])}. Save it again."
        )


def check_tied_weights(info: BundleInfo, weights: dict[str, NDArray[Any]], shapes: dict[str, tuple[int, ...]]) -> None:
    """As `check_weights`, where parameters that are tied to others may be missing.

    Raises:
        BundleMismatchError: One has another shape or is unknown, or so many are missing that they cannot all be tied.
    """
    check_weights(info, weights, {name: shape for name, shape in shapes.items() if name in weights})
    missing = [name for name in shapes if name not in weights]
    kept = {tuple(array.shape) for array in weights.values()}
    if strange := [name for name in missing if shapes[name] not in kept]:
        raise BundleMismatchError(f"The bundle of kind {info.kind!r} lacks the weight {strange[0]!r}.")


def _stamp_all(folder: Path) -> dict[str, FileStamp]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _stamp(path) for path in files}


def _stamp(path: Path) -> FileStamp:
    with path.open("rb") as stream:
        return FileStamp(size=path.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def _verify(folder: Path, name: str, stamp: FileStamp) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"The bundle {folder} names a file outside itself: {name!r}. Do not trust it.")
    if not path.is_file():
        raise BundleTruncatedError(f"The bundle {folder} lacks its file {name!r}. Copy it again.")
    if path.stat().st_size != stamp.size:
        raise BundleTruncatedError(
            f"{path} has {path.stat().st_size} bytes where {stamp.size} were saved. Copy the bundle again."
        )
    if _stamp(path).sha256 != stamp.sha256:
        raise BundleTruncatedError(f"{path} was changed since it was saved (its checksum differs). Copy it again.")


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace what is no bundle, or more than one: all of it would be removed."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file; give an empty or a new folder.")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if not there and not any(folder.iterdir()):
        return
    try:
        own = {CONFIG_FILE, *read_info(folder).files}
    except BundleError as error:
        raise BundleError(f"{folder} exists and is no bundle; give an empty or a new folder.") from error
    if foreign := sorted(there - own):
        raise BundleError(
            f"{folder} holds what is no part of its bundle, and would be removed: {', '.join(foreign[:3])}. Move it "
            f"away, or give a new folder."
        )


def repeated(labels: Sequence[str]) -> list[str]:
    """The labels that stand in a label set more than once."""
    return [label for label, n in Counter(labels).items() if n > 1]

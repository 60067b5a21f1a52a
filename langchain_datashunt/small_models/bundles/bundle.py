"""Bundles: folders that hold a saved small model as JSON settings and safetensors weights, with nothing pickled.

    config.json           kind, labels, calibration, threshold, lineage, package version, and a checksum of each file
    model.safetensors     all parameters
    ...                   further files of the kind, for example tokenizer.json

A bundle is written to a temporary folder and then renamed into place. Replacing an existing bundle takes two renames.
A concurrent reader retries (`unless_replaced`), so that it reads either the old or the new bundle.
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
"""Bundle format that this version writes. It also reads older formats."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class FileStamp(BaseModel):
    """Size in bytes and SHA-256 checksum of one file."""

    size: int
    sha256: str


class BundleInfo(BaseModel):
    """Contents of a bundle's config.json. `files` maps every other file to its size and checksum."""

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
            raise ValueError(f"the label {twice[0]!r} appears more than once")
        return value

    def shared(self) -> dict[str, Any]:
        """Return the fields that the constructor of every kind takes."""
        names = ("labels", "model_id", "temperature", "threshold", "input_key", "lineage")
        return {name: getattr(self, name) for name in names}


def write_bundle(
    folder: Path,
    info: BundleInfo,
    weights: dict[str, NDArray[Any]],
    write_files: Callable[[Path], None] | None = None,
) -> Path:
    """Write a bundle atomically and return its absolute path.

    Args:
        folder: Destination folder. A bundle in it is replaced.
        info: Contents of config.json, except for the checksums.
        weights: Parameters by name.
        write_files: Function that writes further files into the folder that it is called with. None writes none.

    Raises:
        BundleError: If `folder` exists and is not a bundle, or holds files that do not belong to the bundle.
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
    """Read and validate the config.json of a bundle.

    Raises:
        BundleTruncatedError: If the file is missing or not valid JSON.
        BundleTooNewError: If the bundle has a newer format than this version reads.
        BundleError: If a setting is not valid.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise BundleTruncatedError(f"{folder} is not a bundle: {CONFIG_FILE} is missing. Train or copy it again.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise BundleTruncatedError(f"{file} is truncated or damaged ({error}). Copy the bundle again.") from error
    written = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise BundleTooNewError(
            f"{folder} was written in format {written} by version {raw.get('package_version')}. This version "
            f"({__version__}) reads formats up to {FORMAT}. Upgrade: pip install -U langchain-datashunt."
        )
    try:
        return BundleInfo.model_validate(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the top level"
        raise BundleError(f"{file} is not valid at {where}: {problem['msg']}. Train or copy it again.") from error


def read_bundle(folder: Path) -> tuple[BundleInfo, dict[str, NDArray[Any]]]:
    """Read a bundle, verify the checksums of its files, and return its settings and weights.

    Raises:
        BundleTruncatedError: If a file is missing, truncated or changed.
        BundleError: If config.json cannot be used, see `read_info`, or names a file outside the bundle.
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
        raise BundleTruncatedError(
            f"Cannot read {folder / WEIGHTS_FILE} as safetensors weights: {error}. Train or copy it again."
        ) from error


def check_weights(
    info: BundleInfo, weights: dict[str, NDArray[Any]], expected: dict[str, tuple[int | None, ...]]
) -> None:
    """Check that weights have the names and shapes that follow from the labels and settings.

    Args:
        info: Contents of config.json.
        weights: Parameters by name.
        expected: Expected shapes by name. A dimension of None accepts any size.

    Raises:
        BundleMismatchError: If a weight is missing, unknown or of the wrong shape. The message names it.
    """
    for name, shape in expected.items():
        if name not in weights:
            raise BundleMismatchError(
                f"The bundle of kind {info.kind!r} lacks the weight {name!r}. Train or copy it again."
            )
        found = weights[name].shape
        fits = len(found) == len(shape) and all(w in (None, f) for w, f in zip(shape, found, strict=True))
        if not fits:
            raise BundleMismatchError(
                f"Expected shape {list(shape)} for the weight {name!r} of a bundle with {len(info.labels)} labels, "
                f"got {list(found)}. Its labels and weights belong to different models. Train or copy it again."
            )
    if extra := sorted(set(weights) - set(expected)):
        raise BundleMismatchError(
            f"The bundle of kind {info.kind!r} has unknown weights: {', '.join(extra[:5])}. Save the model again."
        )


def check_tied_weights(info: BundleInfo, weights: dict[str, NDArray[Any]], shapes: dict[str, tuple[int, ...]]) -> None:
    """Check weights as `check_weights` does, but allow weights to be missing if they may be tied to others.

    A missing weight may be tied if a saved weight has the same shape.

    Raises:
        BundleMismatchError: If a weight is unknown, has the wrong shape, or is missing and cannot be tied.
    """
    check_weights(info, weights, {name: shape for name, shape in shapes.items() if name in weights})
    missing = [name for name in shapes if name not in weights]
    kept = {tuple(array.shape) for array in weights.values()}
    if strange := [name for name in missing if shapes[name] not in kept]:
        raise BundleMismatchError(
            f"The bundle of kind {info.kind!r} lacks the weight {strange[0]!r}. Train or copy it again."
        )


def _stamp_all(folder: Path) -> dict[str, FileStamp]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _stamp(path) for path in files}


def _stamp(path: Path) -> FileStamp:
    with path.open("rb") as stream:
        return FileStamp(size=path.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def _verify(folder: Path, name: str, stamp: FileStamp) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"The bundle {folder} names a file outside its folder: {name!r}. Do not trust this bundle.")
    if not path.is_file():
        raise BundleTruncatedError(f"The bundle {folder} lacks the file {name!r}. Copy the bundle again.")
    if path.stat().st_size != stamp.size:
        raise BundleTruncatedError(
            f"Expected {stamp.size} bytes in {path}, got {path.stat().st_size}. Copy the bundle again."
        )
    if _stamp(path).sha256 != stamp.sha256:
        raise BundleTruncatedError(
            f"{path} was changed after it was saved (its checksum differs). Copy the bundle again."
        )


def _check_replaceable(folder: Path) -> None:
    """Raise if `folder` holds anything other than a bundle, since replacing it would remove all of it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file. Choose a new or empty folder.")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if not there and not any(folder.iterdir()):
        return
    try:
        own = {CONFIG_FILE, *read_info(folder).files}
    except BundleError as error:
        raise BundleError(f"{folder} exists and is not a bundle. Choose a new or empty folder.") from error
    if foreign := sorted(there - own):
        raise BundleError(
            f"{folder} holds files that do not belong to its bundle and would be removed: {', '.join(foreign[:3])}. "
            f"Move them away or choose a new folder."
        )


def repeated(labels: Sequence[str]) -> list[str]:
    """Return the labels that appear more than once."""
    return [label for label, n in Counter(labels).items() if n > 1]

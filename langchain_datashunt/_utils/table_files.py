"""Readers of CSV, JSONL and Parquet files, row by row in constant memory, with errors that name the row."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import DataError

Row = dict[str, Any]


def read_rows(file: str | Path) -> Iterator[Row]:
    """Return an iterator over the rows of a .csv, .jsonl, .ndjson or .parquet file.

    Raises:
        DataError: If the file is missing or has another extension, or, during iteration, if a row is invalid.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"No such file: {path}. Check the path.")
    readers = {".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"Unsupported file type of {path.name}. Use one of {', '.join(readers)}.")
    return reader(path)


def columns_of(file: str | Path) -> list[str]:
    """Return the column names of a file, read from its first row.

    Raises:
        DataError: If the file has no rows.
    """
    first = next(read_rows(file), None)
    if first is None:
        raise DataError(f"{Path(file).name} has no rows.")
    return list(first)


def require_columns(file: str | Path, *names: str) -> None:
    """Raise a `DataError` unless the file has the given columns. The message lists the existing columns."""
    there = columns_of(file)
    for name in names:
        if name not in there:
            raise DataError(f"{Path(file).name} has no column {name!r}. Available columns: {', '.join(there)}.")


def cell(file: str | Path, i: int, row: Row, name: str) -> Any:
    """Return the value of a column in a row.

    Args:
        file: File of the row, for the error message.
        i: Number of the row, from 1, for the error message.
        row: Row.
        name: Column.

    Raises:
        DataError: If the row does not have the column, or if its value is None.
    """
    if row.get(name) is None:
        what = "is empty" if name in row else "is missing"
        raise DataError(f"{Path(file).name}, row {i}: column {name!r} {what}. Fill or remove the row.")
    return row[name]


def labelled_texts(file: str | Path, text: str, label: str) -> tuple[list[str], list[str]]:
    """Return the texts and labels of a file, both as strings.

    Raises:
        DataError: If a column is missing, or if a row has no text or no label. The message names the row.
    """
    require_columns(file, text, label)
    texts: list[str] = []
    labels: list[str] = []
    for i, row in enumerate(read_rows(file), start=1):
        for name in (text, label):
            if row.get(name) is None or not str(row[name]).strip():
                raise DataError(f"{Path(file).name}, row {i}: column {name!r} is empty. Fill or remove the row.")
        texts.append(str(row[text]))
        labels.append(str(row[label]).strip())
    return texts, labels


def texts_of(file: str | Path, text: str) -> list[str]:
    """Return the texts of a file.

    Raises:
        DataError: If the column is missing, or empty in a row. The message names the row.
    """
    require_columns(file, text)
    texts = [row.get(text) for row in read_rows(file)]
    for i, found in enumerate(texts, start=1):
        if found is None or not str(found).strip():
            raise DataError(f"{Path(file).name}, row {i}: column {text!r} is empty. Fill or remove the row.")
    return [str(found) for found in texts]


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            names = reader.fieldnames or ()
            if twice := [name for i, name in enumerate(names) if name in names[:i]]:
                raise DataError(f"{path.name} has more than one column {twice[0]!r}. Rename the duplicates.")
            for i, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise DataError(
                        f"{path.name}, row {i}: expected {len(names)} fields as in the header. Check commas and quotes."
                    )
                yield row
        except UnicodeDecodeError as error:  # raised for a block read ahead, so reader.line_num is wrong
            where = _undecodable_line(path)
            raise DataError(f"{path.name}, line {where}: invalid UTF-8. Save the file as UTF-8.") from error
        except csv.Error as error:
            raise DataError(
                f"{path.name}: invalid CSV after line {reader.line_num}: {error}. Check commas and quotes."
            ) from error


def _undecodable_line(path: Path) -> int:
    """Return the number of the first line that is not valid UTF-8, or 0 if there is none."""
    with path.open("rb") as stream:
        for i, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return i
    return 0


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for i, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError includes invalid UTF-8
                raise DataError(f"{path.name}, line {i}: invalid JSON: {error}. Fix or remove the line.") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path.name}, line {i}: expected a JSON object, got {type(row).__name__}. Fix or remove it."
                )
            yield row


def _parquet(path: Path) -> Iterator[Row]:
    parquet = require("pyarrow.parquet", "cli")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name} is not a valid Parquet file: {error}.") from error
    try:
        for batch in file.iter_batches():
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"Reading {path.name} failed, the file may be damaged: {error}.") from error


def sample_per_label(
    texts: Sequence[str], labels: Sequence[str], per_label: int, seed: int
) -> tuple[list[str], list[str]]:
    """Return a random sample of at most `per_label` examples of each label, in a reproducible order."""
    import numpy as np

    rng = np.random.default_rng(seed)
    by_label: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        by_label.setdefault(label, []).append(i)
    chosen = [
        rng.choice(rows, size=min(per_label, len(rows)), replace=False).tolist() for _, rows in sorted(by_label.items())
    ]
    rows = list(itertools.chain.from_iterable(chosen))
    return [texts[i] for i in rows], [labels[i] for i in rows]
